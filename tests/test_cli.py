"""The command line: one sentence and exit code 2 for bad input, the same numbers everywhere."""

import csv
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from command_line import Completed, Glovlm
from PIL import Image
from tiny import CLASSES, tiny_clip, tiny_images

from hf_glovlm.cli import app, console
from hf_glovlm.runs import RunResult

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data"), per_class=12, groups=6)


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run; tests read it and never write into it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert app.main(train_arguments(data, folder)) == 0
    return folder


def train_arguments(data: Path, folder: Path, *more: object) -> list[str]:
    arguments = ["train", "--data", data, "--backbone", tiny_clip(), "--output-dir", folder]
    return list(map(str, [*arguments, "--shots", 2, "--n-resamples", 50, *more]))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def snapshot(*folders: Path) -> dict[Path, int]:
    """Every file and folder below, and when it was last changed."""
    return {p: p.stat().st_mtime_ns for f in folders for p in [f, *f.rglob("*")]}


# -------------------------------------------------------------------------------------- bad input


class Place(NamedTuple):
    """What a bad input may be made of."""

    data: Path
    run: Path
    new: Path  # does not exist, and must not after

    def folder(self, name: str) -> Path:
        folder = self.new.parent / name
        folder.mkdir(exist_ok=True)
        return folder

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.new.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, *more: object, data: Path | None = None) -> list[str]:
        return train_arguments(data or self.data, self.new, *more)

    def copy(self, lines: str = "", **options: Any) -> Path:
        """A data set of its own, to be spoilt."""
        folder = tiny_images(self.new.parent / "copy", **options)
        if lines:
            with open(folder / "metadata.csv", "a") as stream:
                stream.write(lines)
        return folder


def spoilt_image(place: Place, content: bytes) -> list[str]:
    folder = place.copy()
    (folder / "viable" / "image_03.png").write_bytes(content)
    return place.train(data=folder)


def leaking_split(place: Place) -> list[str]:
    folder = place.copy()
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    split = [f"{row},{'train' if i % 8 < 4 else 'test'}" for i, row in enumerate(rows)]
    (folder / "metadata.csv").write_text("\n".join([header + ",split", *split]))
    return place.train(data=folder)


def yaml_file(place: Place, **values: object) -> list[str]:
    values = {"data": str(place.data), "output_dir": str(place.new), **values}
    return ["train", "--config", place.file("run.yaml", yaml.safe_dump(values))]


def classes_yaml(place: Place) -> list[str]:
    content = yaml.safe_dump({"classes": {"sclerosd": {"prompts": ["a sclerosed glomerulus"]}}})
    return place.train("--prompts", place.file("classes.yaml", content))


def evaluate_arguments(place: Place, model: Path | str, data: Path | None = None) -> list[str]:
    output = place.new / "results.json"
    return ["evaluate", str(model), "--data", str(data or place.data), "--output", str(output)]


BAD: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    # data
    "missing folder": (lambda p: p.train(data=p.new.parent / "nowhere"), ["nowhere", "folder"]),
    "empty folder": (lambda p: p.train(data=p.folder("empty")), ["empty", "no images"]),
    "one class": (lambda p: p.train(data=p.copy(classes=["viable"])), ["two classes"]),
    "truncated image": (lambda p: spoilt_image(p, b"\x89PNG\r\n\x1a\n00"), ["viable/image_03.png"]),
    "zero-byte image": (lambda p: spoilt_image(p, b""), ["viable/image_03.png"]),
    "row without file": (
        lambda p: p.train(data=p.copy("viable/gone.png,viable,patient_0\n")),
        ["viable/gone.png"],
    ),
    "leaking split": (leaking_split, ["patient_", "train", "test"]),
    "too few images": (lambda p: p.train("--shots", 50), ["50", "--allow-fewer"]),
    # names, with the nearest
    "unknown method": (lambda p: p.train("--method", "lore"), ["lore", "mean 'lora'"]),
    "unknown backbone": (lambda p: p.train("--backbone", "mimi"), ["mimi", "mean 'mini'"]),
    "half a pair": (lambda p: p.train("--backbone", f"{tiny_clip()}+nothing"), ["nothing"]),
    "unknown label": (classes_yaml, ["sclerosd", "mean 'sclerosed'"]),
    "unknown class of shots": (
        lambda p: p.train("--shots", "viabel=2,sclerosed=2,mesangial=2"),
        ["viabel", "mean 'viable'"],
    ),
    "unknown loss": (lambda p: p.train("--loss", "infonse"), ["infonse", "mean 'infonce'"]),
    "unknown setting of a method": (lambda p: p.train("--set", "CC=1"), ["CC", "linear_probe"]),
    "unknown YAML key": (lambda p: yaml_file(p, shotz=3), ["shotz", "mean 'shots'"]),
    # values
    "shots 0 and training": (lambda p: p.train("--shots", 0), ["shots 0", "zero_shot"]),
    "shots in words": (lambda p: p.train("--shots", "many"), ["--shots", "'many'"]),
    "shots twice": (lambda p: p.train("--shots", "viable=1,viable=2"), ["once"]),
    "shots below 0": (lambda p: p.train("--shots", -1), ["-1"]),
    "text for a number": (lambda p: yaml_file(p, seed="one"), ["seed", "whole number", "'one'"]),
    "number for a switch": (lambda p: yaml_file(p, augment=1), ["augment", "true or false"]),
    "list of shots": (lambda p: yaml_file(p, method_config=[1]), ["method_config", "[1]"]),
    "text in shots": (lambda p: yaml_file(p, shots={"viable": "x"}), ["shots", "'x'"]),
    "--set without value": (lambda p: p.train("--set", "C"), ["KEY=VALUE", "'C'"]),
    "--set of no YAML": (lambda p: p.train("--set", "C=[1"), ["C=[1"]),
    "no such YAML": (lambda p: p.train("--config", p.new / "x.yaml"), ["x.yaml"]),
    "broken YAML": (lambda p: p.train("--config", p.file("x.yaml", "a: [")), ["x.yaml", "YAML"]),
    "no data": (lambda p: ["train", "--output-dir", p.new], ["--data"]),
    "no output": (lambda p: ["train", "--data", p.data], ["--output-dir"]),
    "unknown device": (lambda p: p.train("--device", "gpu"), ["gpu", "cpu"]),
    "no such episodes": (lambda p: p.train("--episodes", p.new / "e.json"), ["e.json"]),
    "negative seed": (lambda p: p.train("--seed", -1), ["-1"]),
    # the command line itself
    "unknown flag": (lambda p: p.train("--methods", "lora"), ["--methods", "glovlm train --help"]),
    "not a number": (lambda p: p.train("--seed", "one"), ["--seed", "integer"]),
    "unknown command": (lambda p: ["trian"], ["trian"]),
    "no command": (lambda p: ["data"], ["glovlm data --help"]),
    # places
    "finished run": (
        lambda p: train_arguments(p.data, p.run),
        ["already holds a run", "--overwrite", "--resume"],
    ),
    "somebody's folder": (
        lambda p: train_arguments(p.data, p.file("mine/thesis.txt", "x").parent),
        ["mine", "no run of ours"],
    ),
    "output is a file": (lambda p: train_arguments(p.data, p.file("f", "x")), ["folder"]),
    "output below a file": (lambda p: train_arguments(p.data, p.file("f", "x") / "o"), ["f"]),
    # models
    "no model": (lambda p: ["predict", p.new, p.data], ["nothing"]),
    "model is a file": (lambda p: ["predict", p.file("m", "x"), p.data], ["a file"]),
    "empty model folder": (lambda p: ["predict", p.folder("m"), p.data], ["no model"]),
    "a backbone": (lambda p: ["predict", tiny_clip(), p.data], ["CLIPModel", "--backbone"]),
    "a model of another kind": (
        lambda p: ["predict", p.file("m/config.json", "{}").parent, p.data],
        ["no classifier of ours"],
    ),
    "broken model config": (
        lambda p: ["predict", p.file("m/config.json", "{").parent, p.data],
        ["cannot be loaded"],
    ),
    "no such hub model": (lambda p: ["predict", "owner/name", p.data], ["owner/name"]),
    "evaluate no model": (lambda p: evaluate_arguments(p, p.new), ["nothing"]),
    "evaluate on what was learned": (
        lambda p: evaluate_arguments(p, p.run),
        ["groups", "--allow-seen"],
    ),
    "other classes": (
        lambda p: evaluate_arguments(p, p.run, p.copy(classes=["viabel", "sclerosed"])),
        ["viabel", "mean 'viable'"],
    ),
    "no such split": (lambda p: [*evaluate_arguments(p, p.run), "--split", "dev"], ["dev"]),
    "evaluate over a run": (
        lambda p: ["evaluate", p.run, "--data", p.data, "--output", p.run / "results.json"],
        ["belongs to a run"],
    ),
    # images
    "no image": (lambda p: ["predict", p.run, p.new / "x.png"], ["x.png"]),
    "no images": (lambda p: ["predict", p.run, p.folder("empty")], ["empty", ".png"]),
    "nothing readable": (
        lambda p: ["predict", p.run, p.file("x.png", "x"), "--output", p.new / "p.csv"],
        ["None of the 1"],
    ),
    "output is a folder": (
        lambda p: ["predict", p.run, p.data, "--output", p.folder("o")],
        ["a file"],
    ),
    # the rest
    "card of no run": (lambda p: ["card", p.folder("r")], ["results.json"]),
    "check of nothing": (lambda p: ["data", "check", p.new], ["folder"]),
    "clear what is not there": (lambda p: ["cache", "clear", "zzzz"], ["zzzz"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, glovlm: Glovlm, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    make, words = BAD[case]
    arguments = make(Place(data, run_folder, tmp_path / "new"))
    before = snapshot(tmp_path, data, run_folder)
    done = glovlm(*arguments)
    assert done.code == 2, done
    assert len(done.errors) == 1, done.err
    assert done.err.splitlines()[-1] == done.errors[0]
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.errors[0]
    assert done.out == ""
    assert snapshot(tmp_path, data, run_folder) == before, "something was written"


def test_a_loss_that_diverges_is_told(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    done = glovlm(*train_arguments(data, tmp_path / "o", "--method", "classifier", "--lr", 1e30))
    assert done.code == 2
    assert "loss became" in done.errors[0]
    assert not (tmp_path / "o" / "results.json").exists()
    assert not (tmp_path / "o" / "model").exists()


def test_an_interruption_is_no_error(
    glovlm: Glovlm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_glovlm.runs.run", interrupt)
    done = glovlm(*train_arguments(data, tmp_path / "o"))
    assert done.code == 130
    assert done.err.strip() == "interrupted: the last complete result is kept"


def test_a_bug_is_not_dressed_up_as_bad_input(
    glovlm: Glovlm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("hf_glovlm.runs.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        glovlm(*train_arguments(data, tmp_path / "o"))


# ------------------------------------------------------------------------------- flags and YAML


def test_train_has_a_flag_for_every_field() -> None:
    from hf_glovlm.runs.config import TrainConfig

    flags = set(inspect.signature(app.train).parameters)
    assert flags - {"context", "config", "settings", "as_json"} == {
        field.name for field in fields(TrainConfig) if field.name != "method_config"
    }


@pytest.fixture
def captured(glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """What `run` would be asked to do."""

    class Stop(Exception):
        pass

    def stop(config: Any, **_: Any) -> None:
        raise Stop(config)

    monkeypatch.setattr("hf_glovlm.runs.run", stop)

    def capture(*arguments: object) -> Any:
        with pytest.raises(Stop) as stopped:
            glovlm("train", *arguments)
        return stopped.value.args[0]

    return capture


def test_flags_win_over_yaml(captured: Callable[..., Any], tmp_path: Path) -> None:
    content = {"data": "a", "output_dir": "b", "seed": 5, "shots": 4, "augment": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content | {"method_config": {"C": 1.0}}))
    config = captured("--config", path, "--seed", 0, "--no-augment", "--data", "c", "--set", "C=2")
    assert (config.data, config.output_dir) == ("c", "b")
    assert (config.seed, config.shots, config.augment) == (0, 4, False)
    assert config.method_config == {"C": 2}
    assert captured("--config", path).method_config == {"C": 1.0}
    assert captured("--config", path).augment is True


def test_yaml_says_numbers_as_people_do(captured: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: d\noutput_dir: o\nmethod: lora\nlr: 1e-3\nclip_norm: 1\nmixed_precision: no\n"
        "shots: {viable: 3, sclerosed: 2}\nepochs: null\nmethod_config: {projection_lr: 1e-4}\n"
    )
    config = captured("--config", path)
    assert config.lr == 1e-3
    assert isinstance(config.clip_norm, float)
    assert config.mixed_precision == "no"
    assert config.shots == {"viable": 3, "sclerosed": 2}
    assert config.epochs is None
    assert config.method_config == {"projection_lr": 1e-4}


def test_shots_by_class(captured: Callable[..., Any]) -> None:
    base = ("--data", "d", "--output-dir", "o", "--shots")
    assert captured(*base, "3").shots == 3
    assert captured(*base, "a=b=1, viable=3").shots == {"a=b": 1, "viable": 3}


def test_defaults_are_those_of_the_config(captured: Callable[..., Any]) -> None:
    from hf_glovlm.runs.config import TrainConfig

    assert captured("--data", "d", "--output-dir", "o") == TrainConfig(data="d", output_dir="o")


# --------------------------------------------------------------------------------- the happy path


def test_train_says_what_it_did(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = glovlm(*train_arguments(data, folder))
    assert done.code == 0, done.err
    results = results_of(folder)
    lines = [line.split() for line in done.out.splitlines()]
    for name in CLASSES:
        assert [name, "2", "2"] in lines  # labels, contributing patients
    value = results["metrics"]["macro_auc"]["value"]
    assert any(line[:2] == ["Macro-AUC", f"{value:.3f}"] for line in lines)
    assert "too few groups" in done.out
    assert "of 3 patients" in done.out
    assert "synthetic" not in done.out
    assert str(folder) in done.err
    assert "Not for diagnosis" in (folder / "README.md").read_text()
    report = (folder / "report.html").read_text("utf-8")
    assert f"On {results['n']} images of {results['n_groups']} patients" in report
    assert (folder / "model" / "config.json").is_file()


def test_the_written_config_repeats_the_run(
    glovlm: Glovlm, run_folder: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    done = glovlm("train", "--config", run_folder / "config.yaml", "--output-dir", again, "--json")
    assert done.code == 0, done.err
    first, second = results_of(run_folder), results_of(again)
    assert json.loads(done.out) == second
    for key in ("metrics", "per_class", "confusion_matrix", "data"):
        assert first[key] == second[key]
    assert second["config"] | {"output_dir": ""} == first["config"] | {"output_dir": ""}


def test_drawings_are_called_drawings(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "data", per_class=8)
    (folder / "DRAWINGS").write_text("")
    done = glovlm(*train_arguments(folder, tmp_path / "run"))
    assert done.code == 0, done.err
    titles = [line for line in done.out.splitlines() if line.startswith(("Learned", "Metr", "Per"))]
    assert len(titles) == 3
    assert all("synthetic images" in title for title in titles)
    assert "synthetic" in (tmp_path / "run" / "README.md").read_text().split("\n# ")[1]
    done = glovlm("predict", tmp_path / "run", data)
    assert "synthetic images" in done.out.splitlines()[0]
    output = tmp_path / "r.json"
    done = glovlm(
        "evaluate", tmp_path / "run", "--data", folder, "--allow-seen", "--output", output
    )
    assert "(synthetic images" in done.out.splitlines()[0]
    assert json.loads(output.read_text())["synthetic"] is True


def test_evaluate_repeats_the_runs_numbers(
    glovlm: Glovlm, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    tested = only_tested(data, run_folder, tmp_path / "tested")
    output, parquet = tmp_path / "new" / "results.json", tmp_path / "p.parquet"
    done = glovlm(
        *("evaluate", run_folder / "model", "--data", tested, "--output", output),
        *("--predictions", parquet, "--n-resamples", 50),
    )
    assert done.code == 0, done.err
    found, expected = json.loads(output.read_text()), results_of(run_folder)
    assert found["n"] == expected["n"]
    for name, entry in expected["metrics"].items():
        assert found["metrics"][name]["value"] == pytest.approx(entry["value"], abs=1e-5)
        assert found["metrics"][name]["ci95"] == pytest.approx(entry["ci95"], abs=1e-5)
    assert found["data"]["groups_seen_in_training"] == 0
    assert parquet.is_file()
    assert "Macro-AUC" in done.out


def test_evaluate_tells_where_it_cannot_know(
    glovlm: Glovlm, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    import shutil

    model = Path(shutil.copytree(run_folder / "model", tmp_path / "alone"))
    done = glovlm("evaluate", model, "--data", data, "--output", tmp_path / "r.json", "--json")
    assert done.code == 0, done.err
    assert "cannot be known" in done.err
    assert json.loads(done.out) == json.loads((tmp_path / "r.json").read_text())


def test_evaluate_takes_the_test_of_a_given_split(
    glovlm: Glovlm, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_images(tmp_path / "split", per_class=12, groups=6, seed=1)
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    rows = [f"{r},{'test' if r[-1] in '01' else 'train'}".replace("patient", "other") for r in rows]
    (folder / "metadata.csv").write_text("\n".join([header + ",split", *rows]))
    output = tmp_path / "r.json"
    for more, n in (((), 12), (("--split", "train"), 24), (("--split", "all"), 36)):
        done = glovlm("evaluate", run_folder, "--data", folder, "--output", output, *more)
        assert done.code == 0, done.err
        assert json.loads(output.read_text())["n"] == n


def test_predict_agrees_with_the_run(
    glovlm: Glovlm, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    from hf_glovlm.inference import Predictions

    output = tmp_path / "new" / "predictions.csv"
    done = glovlm("predict", run_folder, data, "--output", output, "--batch-size", 5)
    assert done.code == 0, done.err
    rows = {row["file_name"]: row for row in csv.DictReader(output.read_text().splitlines())}
    assert len(rows) == 36
    expected = Predictions.load(run_folder / "predictions.parquet")
    for name, label, p in zip(
        expected.file_names, expected.predicted, expected.probabilities, strict=True
    ):
        assert rows[name]["predicted"] == label
        found = [float(rows[name][f"p_{c}"]) for c in expected.class_names]
        assert found == pytest.approx(p, abs=1e-5)
    assert [p.name for p in output.parent.iterdir()] == ["predictions.csv"]


def test_predict_leaves_out_what_it_cannot_read(
    glovlm: Glovlm, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for name, mode in (("a/grey.png", "L"), ("a/alpha.png", "RGBA"), ("b.png", "RGB")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (40, 30), 128 if mode == "L" else "red").save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    output = tmp_path / "p.csv"
    done = glovlm("predict", run_folder, folder, "--output", output)
    assert done.code == 1
    assert "broken.png" in done.err
    assert "empty.jpg" in done.err
    assert "2 of 5" in done.err
    names = [row["file_name"] for row in csv.DictReader(output.read_text().splitlines())]
    assert names == ["a/alpha.png", "a/grey.png", "b.png"]


def test_predict_single_images(glovlm: Glovlm, data: Path, run_folder: Path) -> None:
    images = [data / "viable" / "image_00.png", data / "sclerosed" / "image_00.png"]
    done = glovlm("predict", run_folder, *images, *images, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [row["file_name"] for row in rows] == [str(image) for image in images]
    assert all(sum(row[f"p_{c}"] for c in CLASSES) == pytest.approx(1, abs=1e-5) for row in rows)


def test_the_card_can_be_written_again(glovlm: Glovlm, run_folder: Path, tmp_path: Path) -> None:
    results = run_folder / "results.json"
    (tmp_path / "results.json").write_bytes(results.read_bytes())
    assert glovlm("card", tmp_path).code == 0
    assert (tmp_path / "README.md").read_bytes() == (run_folder / "README.md").read_bytes()


def test_a_real_card_leaks_nothing(data: Path, run_folder: Path) -> None:
    card = (run_folder / "README.md").read_text()
    assert "patient_0" not in card
    assert "image_0" not in card
    for path in (data.parent, run_folder.parent, tiny_clip().parent):
        assert str(path) not in card


def test_demo(
    glovlm: Glovlm, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command around `run_demo`, which has tests of its own."""
    results = results_of(run_folder) | {"synthetic": True}

    def run_demo(folder: Path, **_: Any) -> dict[str, Any]:
        (folder / "lora").mkdir(parents=True)
        (folder / "lora" / "results.json").write_text(json.dumps(results))
        figure = str(folder / "demo.png")
        runs = {"lora": RunResult(results, folder / "lora")}
        return {"runs": runs, "reload_difference": 1e-7, "figure": figure}

    shown: list[Path] = []
    monkeypatch.setattr("hf_glovlm.lab.demo.run_demo", run_demo)
    monkeypatch.setattr("hf_glovlm.cli.app.write_beside", shown.append)
    monkeypatch.chdir(tmp_path)
    for arguments in ([], [], ["--output-dir", "other"]):  # the second replaces the first
        done = glovlm("demo", *arguments)
        assert done.code == 0, done.err
        assert "synthetic images" in done.out.splitlines()[0]
        assert "synthetic" in done.err
    assert [place.name for place in shown] == ["lora"] * 3
    for folder in ("glovlm-demo", "other"):
        assert Path(folder, "lora", "results.json").is_file()
    done = glovlm("demo", "--output-dir", "third", "--json")
    assert json.loads(done.out)["runs"]["lora"] == results


def test_study(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    grid = {"data": str(data), "backbone": str(tiny_clip()), "shots": 2, "draws": 1}
    grid |= {"methods": ["linear_probe", "zero_shot"], "n_resamples": 50}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(grid))
    done = glovlm("study", "--config", path, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert "| zero_shot |" in done.out
    assert "cells: 2 done" in done.err
    done = glovlm("study", "--config", path, "--output-dir", tmp_path / "out", "--json")
    assert json.loads(done.out)["failures"] == []
    assert "cells: 2 skipped" in done.err
    path.write_text(yaml.safe_dump(grid | {"methods": ["linear_prob"]}))
    done = glovlm("study", "--config", path, "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert not (tmp_path / "other").exists()


def test_data_check(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    done = glovlm("data", "check", data, "--shots", "2")
    assert done.code == 0
    assert ["all", "12", "12", "12", "6"] in [line.split() for line in done.out.splitlines()]
    done = glovlm("data", "check", data, "--json")
    assert json.loads(done.out)["group_column"] == "patient_id"
    folder = tiny_images(tmp_path / "copy")
    (folder / "viable" / "image_03.png").write_bytes(b"")
    done = glovlm("data", "check", folder)
    assert done.code == 1
    assert "viable/image_03.png" in done.err


def test_cache(glovlm: Glovlm, run_folder: Path, tmp_path: Path) -> None:
    rows = json.loads(glovlm("cache", "list", "--json").out)
    assert rows
    assert {"key", "name", "images", "size"} <= set(rows[0])
    assert rows[0]["key"] in glovlm("cache").out
    assert "freed" in glovlm("cache", "clear", rows[0]["key"]).err
    assert rows[0]["key"] not in glovlm("cache", "list").out
    assert glovlm("cache", "clear").code == 0
    assert json.loads(glovlm("cache", "list", "--json").out) == []


# -------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize(
    ("command", "name"),
    [("methods", "linear_probe"), ("backbones", "mini"), ("datasets", "glomeruli_sclerosis")],
)
def test_tables(command: str, name: str, glovlm: Glovlm) -> None:
    rows = json.loads(glovlm(command, "--json").out)
    assert name in [row["name"] for row in rows]
    table = glovlm(command).out
    assert all(row["name"] in table for row in rows)


def test_a_terminal_gets_a_drawn_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.print_table("Title [x]", ["class"], [["[bold]odd[/bold]"]])
    drawn = capsys.readouterr().out
    assert "[bold]odd[/bold]" in drawn
    assert "─" in drawn or "━" in drawn


def test_only_the_main_process_speaks(
    glovlm: Glovlm, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    done = glovlm("train", "--data", data, "--method", "lore", "--output-dir", "o")
    assert done == Completed(2, "", "")


# ----------------------------------------------------------------------- processes of their own


def in_a_process(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True
    )


def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    """Neither the package nor its command line brings in what takes seconds."""
    code = (
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from hf_glovlm.cli.app import main\n"
        "code = main(['train', '--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\n"
        "sys.exit(code or (heavy and str(heavy)) or 0)"
    )
    done = in_a_process("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--shots" in done.stdout


@pytest.mark.long
def test_train_is_a_script_too(data: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "hf_glovlm" / "train.py"
    arguments = train_arguments(data, tmp_path / "run", "--method", "zero_shot", "--shots", 0)
    done = in_a_process(script, *arguments[1:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Macro-AUC" in done.stdout
    assert results_of(tmp_path / "run")["environment"]["num_processes"] == 1


def only_tested(data: Path, run_folder: Path, folder: Path) -> Path:
    """A data set of the run's test images alone."""
    from hf_glovlm.inference import Predictions

    tested = set(Predictions.load(run_folder / "predictions.parquet").file_names)
    header, *rows = (data / "metadata.csv").read_text().splitlines()
    kept = [row for row in rows if row.split(",")[0] in tested]
    for row in kept:
        name = row.split(",")[0]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((data / name).read_bytes())
    (folder / "metadata.csv").write_text("\n".join([header, *kept]))
    return folder
