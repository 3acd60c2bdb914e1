"""Reports of finished work: one page, written again from its files alone, by the kind it is of."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GloVLMError
from ..files import (
    KINDS,
    check_target,
    finish_interrupted,
    read_json,
    results_kind,
    short_path,
)

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
_RUNS = ("adaptation", "evaluation")
# What writes the report of other kinds: module of this package, and function of folder and page.
_WRITERS = {"study": ("study", "write_study")}
_INSTEAD = {  # of kinds that have no report
    "mil": "its README.md has the measures by slide",
    "slides": "`glovlm sheet` makes pages of its biopsies, and `glovlm correct` those of readers",
    "pretraining": "`glovlm card` writes its card",
    "crops": "`glovlm data check FOLDER --html` makes a page of the images",
    "corrections": "`glovlm sheet` makes pages of the corrected biopsies",
    "finder": "its finder.json has what was left out and found",
    "findings": "`glovlm sheet` makes pages of the outlined biopsies",
    "export": "the run that it was exported from has one",
}


def write_report(
    source: "str | Path | Mapping[str, Any]",
    *,
    with_images: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Write the report of a run, an evaluation or a study: one HTML page that needs nothing else.

    Args:
        source: The folder of `glovlm train` or `glovlm study`, the JSON file of `glovlm evaluate`,
            or what `run` or `evaluate` returned.
        with_images: Whether the page of a run shows mistakes, examples and heat maps, and the
            names of their files. Pages travel: without, no picture and no name is in it.
        output: The page; by default `report.html` in the folder, or beside the JSON file with its
            name.

    Returns:
        The page.

    Raises:
        GloVLMError: There is nothing of this kind, it is damaged, or the page may not be written.
    """
    if isinstance(source, Mapping):
        folder = Path(getattr(source, "folder", "."))
        kind = results_kind(source)
        if kind == "evaluation" and output is None:
            raise GloVLMError("An evaluation in memory has no folder: give output='report.html'.")
        results, place = dict(source), folder / "results.json"
    else:
        place = _find_results(Path(source).expanduser())
        results = read_json(place)
        kind = results_kind(results)
        folder = place.parent
    if kind not in (*_RUNS, *_WRITERS):
        what = KINDS.get(kind or "", "something else")
        instead = f": {_INSTEAD[kind]}" if kind in _INSTEAD else ""
        raise GloVLMError(
            f"Expected a run of `glovlm train`, an evaluation or a study, found {what} in "
            f"'{short_path(place)}'. There is no report of it{instead}."
        )
    named = kind == "evaluation" and not isinstance(source, Mapping)
    usual = place.with_suffix(".html") if named else folder / REPORT
    target = usual if output is None else Path(output).expanduser()
    check_target(target, "a report of ours", _is_report, [place])
    if kind in _WRITERS:
        if with_images:
            raise GloVLMError("The report of a study shows no images: leave --with-images out.")
        module, function = _WRITERS[kind]
        writer: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), function)
        writer(folder, target)
        return target
    from .run import write_run

    own = folder if kind == "adaptation" and (folder / "config.yaml").is_file() else None
    write_run(results, own, target, with_images=with_images)
    return target


def _find_results(place: Path) -> Path:
    """The JSON file that a report is written from."""
    if place.is_file():
        return place
    if not place.is_dir():
        raise GloVLMError(
            f"Expected the folder of a run or a JSON file of results, found nothing at "
            f"'{short_path(place)}'."
        )
    folder = place.parent if place.name == "model" else place
    finish_interrupted(folder)
    names = ("results.json", "report.json", "pretraining.json", "finder.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise GloVLMError(
        f"Expected the folder of a finished run, found no results.json in '{short_path(folder)}': "
        "give the folder that was its --output-dir."
    )


def _is_report(path: Path) -> bool:
    """Whether a page is one of ours, by its last words."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 20_000))
        return b"Made by hf-glovlm from results alone" in stream.read()
