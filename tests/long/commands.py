"""The commands of the long checks: what begins a piece of work, and what goes on with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """A command that keeps something.

    Attributes:
        begin: Its arguments, from the inputs and the output folder.
        go_on: What they get after a kill.
        skip: File names that depend on when a process was stopped.
    """

    begin: Callable[[Path, Path], list[object]]
    go_on: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def _train(inputs: Path, output: Path) -> list[object]:
    return [
        *("train", "--data", inputs / "cohort", "--method", "lora", "--shots", "2"),
        *("--epochs", "4", "--lr", "0.001", "--n-resamples", "50", "--output-dir", output),
    ]


def _crops(inputs: Path, output: Path, slide: str = "s0") -> list[object]:
    files = (inputs / "slides" / f"{slide}.tiff", inputs / f"{slide}.geojson")
    return ["data", "crops", *files, "--output-dir", output, "--patient-id", f"P{slide}"]


def _slide(inputs: Path, output: Path) -> list[object]:
    slides = sorted((inputs / "slides").iterdir())[:4]
    return ["slide", inputs / "model", *slides, "--tile-size", "64", "--output-dir", output]


def _mil(inputs: Path, output: Path) -> list[object]:
    return [
        *("mil", "--features", inputs / "bags", "--labels", inputs / "slides.csv"),
        *("--epochs", "6", "--n-resamples", "50", "--output-dir", output),
    ]


def _study(inputs: Path, output: Path) -> list[object]:
    return ["study", "--config", inputs / "study.yaml", "--output-dir", output]


def _cache(inputs: Path, output: Path) -> list[object]:
    return ["predict", inputs / "model", inputs / "cohort", "--output", output / "answers.csv"]


WORKS = {
    "train": Work(_train, ("--resume",)),
    "crops": Work(_crops),
    "slide": Work(_slide),
    "slide-workers": Work(lambda i, o: [*_slide(i, o), "--workers", "2"]),
    "mil": Work(_mil, ("--resume",)),
    "study": Work(_study),
    "study-workers": Work(lambda i, o: [*_study(i, o), "--workers", "2"]),
    "cache": Work(_cache),
}


def crops_of(inputs: Path, output: Path, slide: str) -> list[object]:
    """Crops of another slide into the same folder."""
    return _crops(inputs, output, slide)
