"""The grid on a tiny CLIP: every cell once, and a report that is what one computes by hand."""

import copy
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_clip, tiny_images

from hf_glovlm.backbones import describe_weights, load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import Predictions, embed_prompts, encoder_key
from hf_glovlm.inference.frozen import share_towers
from hf_glovlm.methods import METHODS, TowerMethod
from hf_glovlm.metrics import PairedRun, paired_differences, recall_by_group
from hf_glovlm.runs import TrainConfig, loading, run
from hf_glovlm.runs.study import StudyConfig, render_report, run_study, write_report

DRAWS = 3
RESAMPLES = 50


def grid(data: Path, **changes: Any) -> StudyConfig:
    values = {
        "data": str(data),
        "backbone": str(tiny_clip()),
        "methods": ["linear_probe", "zero_shot"],
        "shots": 2,
        "draws": DRAWS,
        "n_resamples": RESAMPLES,
    }
    return StudyConfig.from_mapping({**values, **changes})


def run_recorded(
    config: StudyConfig, output: Path, **options: Any
) -> tuple[dict[str, Any], list[Any]]:
    events: list[Any] = []
    report = run_study(
        config, output, on_event=lambda kind, what: events.append((kind, what)), **options
    )
    return report, events


def statuses(events: list[Any]) -> list[str]:
    return [what["status"] for _, what in events]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "discs", groups=6)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished study; read it, or work on a copy."""
    output = tmp_path_factory.mktemp("study") / "O"
    report, events = run_recorded(grid(data), output)
    assert statuses(events) == ["done"] * 2 * DRAWS
    assert [what["done"] for _, what in events] == list(range(1, 2 * DRAWS + 1))
    return output, report


def cell(output: Path, method: str, draw: int) -> Path:
    return output / "cells" / tiny_clip().name / method / "2" / f"draw-{draw:02d}"


def read(folder: Path) -> tuple[dict[str, Any], Predictions]:
    results = json.loads((folder / "results.json").read_text())
    return results, Predictions.load(folder / "predictions.parquet")


def test_every_cell_is_a_run_of_its_own_without_weights(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    output, report = finished
    folders = {p.parent for p in output.rglob("results.json")}
    assert folders == {
        cell(output, m, d) for m in ("linear_probe", "zero_shot") for d in range(DRAWS)
    }
    assert all((folder / "predictions.parquet").is_file() for folder in folders)
    assert not list(output.rglob("*.safetensors"))
    assert json.loads((output / "report.json").read_text()) == report
    assert (output / "report.md").read_text() == render_report(report)
    assert (report["failures"], report["missing"]) == ([], [])


def test_the_report_says_what_one_computes_by_hand(finished: tuple[Path, dict[str, Any]]) -> None:
    output, report = finished
    (section,) = report["sections"]
    lines = {m["name"]: m for m in section["methods"]}
    runs = {m: [read(cell(output, m, d)) for d in range(DRAWS)] for m in lines}
    pairs = []
    for draw in range(DRAWS):
        (_, a), (_, b) = runs["linear_probe"][draw], runs["zero_shot"][draw]
        assert a.labels is not None
        assert a.groups is not None
        pairs.append(PairedRun(draw, a.labels, a.groups, a.probabilities, b.probabilities))
    expected = paired_differences(
        pairs, ("macro_auc", "balanced_accuracy"), RESAMPLES, 0, unit="patients"
    )
    adjusted = {name: row["p_value"] for name, row in expected.items()}  # the only comparison
    versus = {"draws": [0, 1, 2], "metrics": expected, "p_holm": adjusted}
    assert lines["zero_shot"]["versus_reference"] == versus
    assert lines["linear_probe"]["versus_reference"] is None
    for name, line in lines.items():
        values = [r["metrics"]["macro_auc"]["value"] for r, _ in runs[name]]
        shown = line["metrics"]["macro_auc"]
        assert shown["mean"] == pytest.approx(np.mean(values))
        assert shown["sd"] == pytest.approx(np.std(values, ddof=1))

    for row in section["recall"]:
        for name, summary in row["methods"].items():
            recalls = [
                r["recall"]
                for _, p in runs[name]
                for r in recall_by_group(
                    p.labels, p.probabilities.argmax(1), p.groups or [], p.class_names
                )
                if (r["group"], r["class"]) == (row["group"], row["class"])
            ]
            assert summary["n_draws"] == len(recalls)
            assert summary["mean"] == pytest.approx(np.mean(recalls))


def test_the_report_states_what_a_number_needs(finished: tuple[Path, dict[str, Any]]) -> None:
    _, report = finished
    lines = {m["name"]: m for m in report["sections"][0]["methods"]}
    budget = lines["linear_probe"]["label_budget"]
    assert budget["labels"] == [6, 6]
    assert all(of == {"labels": [2, 2], "groups": [2, 2]} for of in budget["per_class"].values())
    assert lines["zero_shot"]["label_budget"]["labels"] == [0, 0]
    text = render_report(report)
    assert "Research use only, not for diagnosis." in text
    assert "Labels of each draw: 2 mesangial (of 2 patients)" in text
    assert "over patients" in text
    assert "synthetic" not in text
    versus = lines["zero_shot"]["versus_reference"]["metrics"]["macro_auc"]
    low, high = versus["ci95"]
    row = f"{versus['value']:+.3f} [{low:+.3f}, {high:+.3f}] | {versus['verdict']}"
    assert row in text
    assert "too few groups" in text  # of 6 patients


def test_the_report_shows_the_largest_groups(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = finished
    rows = report["sections"][0]["recall"]
    assert "largest of" not in render_report(report)
    monkeypatch.setattr("hf_glovlm.runs.study_report.RECALL_ROWS", 3)
    report = report | {"sections": [report["sections"][0] | {"recall": [
        row | {"n": 1 + i} for i, row in enumerate(rows)
    ]}]}  # fmt: skip
    text = render_report(report)
    assert f"The 3 largest of {len(rows)} rows" in text
    for i, row in enumerate(rows):
        line = f"| {row['group']} | {row['class']} | {1 + i} |"
        assert (line in text) is (i >= len(rows) - 3)


def test_headings_mark_synthetic_images(data: Path, tmp_path: Path) -> None:
    drawn = Path(shutil.copytree(data, tmp_path / "drawn"))
    (drawn / "DRAWINGS").touch()
    report = run_study(grid(drawn, methods=["linear_probe"], draws=1), tmp_path / "O")
    headings = re.findall(r"^#.*$", render_report(report), re.MULTILINE)
    assert len(headings) >= 5
    assert all("synthetic images" in heading for heading in headings)


def test_a_finished_cell_is_never_run_again(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished[0], tmp_path / "O"))
    before = {p: p.stat().st_mtime_ns for p in output.rglob("results.json")}
    report, events = run_recorded(grid(data), output)
    assert statuses(events) == ["skipped"] * 2 * DRAWS
    assert {p: p.stat().st_mtime_ns for p in output.rglob("results.json")} == before
    assert report["sections"] == finished[1]["sections"]

    lost = cell(output, "zero_shot", 1)
    (lost / "results.json").unlink()  # as a run leaves it that was killed before its last file
    partial = write_report(grid(data), output)
    assert partial["missing"] == [lost.relative_to(output / "cells").as_posix()]
    assert "Not run yet: 1 cells" in render_report(partial)
    report, events = run_recorded(grid(data), output)
    assert [what["name"] for _, what in events if what["status"] == "done"] == partial["missing"]
    for section, old in zip(report["sections"], finished[1]["sections"], strict=True):
        assert section["recall"] == old["recall"]
        for line, was in zip(section["methods"], old["methods"], strict=True):
            assert line["versus_reference"] == was["versus_reference"]

    _, events = run_recorded(grid(data, draws=DRAWS + 1), output)  # a study may grow
    assert statuses(events) == ["skipped"] * 2 * DRAWS + ["done"] * 2


def test_other_settings_than_those_of_a_finished_cell_are_refused(
    data: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(GloVLMError, match=r"test_fraction = 0\.5, and the study now says 0\.4"):
        run_study(grid(data, test_fraction=0.4), finished[0])


def test_a_failure_is_recorded_and_the_rest_goes_on(data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "classes.yaml"
    broken = {"name": "zero_shot", "label": "with-prompts", "prompts": str(prompts)}
    config = grid(data, methods=[broken, "linear_probe"], draws=2)
    report, events = run_recorded(config, tmp_path / "O")
    assert statuses(events) == ["failed", "done"] * 2
    assert [f["cell"].split("/")[1] for f in report["failures"]] == ["with-prompts"] * 2
    assert all(str(prompts) in f["error"] for f in report["failures"])
    assert str(prompts) in render_report(report)

    names = ("mesangial", "sclerosed", "viable")
    of = "\n".join(f"  {n}: {{display_name: {n}, prompts: [a {n} tuft]}}" for n in names)
    prompts.write_text(f"classes:\n{of}\n")
    report, events = run_recorded(config, tmp_path / "O")
    assert sorted(statuses(events)) == ["done", "done", "skipped", "skipped"]
    assert report["failures"] == []
    assert not list((tmp_path / "O").rglob("failure.json"))


def test_all_cells_failing_says_why(data: Path, tmp_path: Path) -> None:
    config = grid(data, backbone=str(tmp_path / "nothing"), methods=["linear_probe"], draws=1)
    with pytest.raises(GloVLMError, match=r"No cell of the study .* is finished: .*nothing"):
        run_study(config, tmp_path / "O")


@pytest.mark.parametrize("setting", [{"seed": 1}, {"shots_from": "one_group"}])
def test_other_splits_or_supports_are_not_paired(
    setting: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    other = {"name": "linear_probe", "label": "other", **setting}
    report = run_study(grid(data, methods=["linear_probe", other], draws=1), tmp_path / "O")
    runs = [read(cell(tmp_path / "O", name, 0))[1] for name in ("linear_probe", "other")]
    assert (runs[0].file_names == runs[1].file_names) == ("seed" not in setting)
    assert report["sections"][0]["methods"][1]["versus_reference"] is None
    assert "no draw in common" in render_report(report)


def test_frozen_episodes_and_what_they_record(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    runs = [cell(finished[0], "linear_probe", draw) for draw in range(DRAWS)]
    files = [json.loads((run / "episodes.json").read_text()) for run in runs]
    names = ("balanced_accuracy", "macro_auc", "macro_f1")
    for draw, file in enumerate(files):
        metrics = read(runs[draw])[0]["metrics"]
        file["draws"][0]["reference_logistic_regression"] = {k: metrics[k]["value"] for k in names}
    files[1]["draws"][0]["reference_logistic_regression"]["macro_f1"] -= 0.25
    frozen = tmp_path / "episodes.json"
    frozen.write_text(json.dumps({**files[0], "draws": [f["draws"][0] for f in files]}))

    methods = [{"name": "linear_probe", "draws": [0, 1]}]
    values = {"data": str(data), "backbone": str(tiny_clip()), "episodes": str(frozen)}
    every = StudyConfig.from_mapping({**values, "methods": ["linear_probe"]})
    assert every.methods[0].draws == (0, 1, 2)
    assert every.shots == (2,)
    config = StudyConfig.from_mapping({**values, "methods": methods, "n_resamples": RESAMPLES})
    report = run_study(config, tmp_path / "O")
    recorded = report["sections"][0]["recorded"]
    assert recorded["n_draws"] == 2
    assert recorded["largest_difference"] == pytest.approx(
        {"balanced_accuracy": 0.0, "macro_auc": 0.0, "macro_f1": 0.25}
    )
    assert "Macro-F1 0.2500" in render_report(report)
    with pytest.raises(GloVLMError, match="asks for draw 3, and the episodes file holds 3 draws"):
        StudyConfig.from_mapping({**values, "methods": ["linear_probe"], "draws": 4})
    with pytest.raises(GloVLMError, match="have 2 shots, the study asks for"):
        StudyConfig.from_mapping({**values, "methods": methods, "shots": 4})


@pytest.mark.long
def test_two_workers_find_the_same(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report, events = run_recorded(grid(data, draws=1), tmp_path / "O", workers=2)
    assert statuses(events) == ["done", "done"]
    assert report["failures"] == []
    for method in ("linear_probe", "zero_shot"):
        ours, theirs = (read(cell(o, method, 0))[1] for o in (tmp_path / "O", finished[0]))
        assert ours.file_names == theirs.file_names
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": None}, "needs 'methods:'"),
        ({"methodes": 1}, "no setting 'methodes'. Did you mean 'methods'"),
        ({"methods": ["linear_prob"], "reference": "linear_prob"}, "Unknown method 'linear_prob'"),
        ({"reference": "zero"}, "reference 'zero' is none of the methods"),
        ({"methods": ["linear_probe"] * 2}, "comes twice"),
        ({"methods": [{"name": "linear_probe", "label": "a/b"}]}, "'label:' of letters"),
        ({"methods": [{"name": "linear_probe", "shots": 4}]}, "no setting 'shots'"),
        ({"methods": [{"draws": 4}]}, "Expected the name of a method"),
        ({"draws": 0}, "Expected draws"),
        ({"draws": [1, 1]}, "Expected draws"),
        ({"shots": "many"}, "shots must be a list of whole numbers; found ('many',)"),
        ({"shots": 0}, "needs labelled images"),
        ({"lr": [1]}, "lr must be a number or nothing; found [1]"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"shots": 10**12}, "shots must be at most"),
        ({"draws": 10**12}, "at most 100,000 draws"),
        ({"draws": 90_000}, "at most 100,000 cells"),
        ({"backbones": [1]}, "backbones must be a list of texts"),
        ({"output_dir": "x"}, "no setting 'output_dir'"),
    ],
)
def test_a_wrong_grid_is_told_in_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(GloVLMError, match=re.escape(sentence).replace("\\ ", " ")):
        grid(tmp_path, **changes)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    config = grid(tmp_path, methods=["linear_probe", {"name": "vanilla", "lr": "1e-6"}])
    assert config.methods[1].settings == {"lr": 1e-6}
    assert [c.method.name for c in config.cells()] == ["linear_probe", "vanilla"] * DRAWS


def test_a_folder_of_other_things_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GloVLMError, match="is no study of ours"):
        run_study(grid(data), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------ what its cells share


def test_no_method_changes_what_cells_share(data: Path, tmp_path: Path) -> None:
    name, loader = str(tiny_clip()), loading.Loader(keep=True)
    shared = loader._load(name)
    before = describe_weights(*shared)
    on_features = [m for m, method in METHODS.items() if not isinstance(method, TowerMethod)]
    answers = []
    for place, method in enumerate(["linear_probe", *on_features, "linear_probe"]):
        output = tmp_path / f"{place}"
        epochs = {"epochs": 1} if hasattr(METHODS[method], "recipe") else {}
        config = TrainConfig(
            data=str(data), backbone=name, method=method, shots=2, output_dir=str(output),
            n_resamples=1, save_model=False, **epochs,
        )  # fmt: skip
        run(config, loader=loader)
        assert describe_weights(*shared) == before, method
        answers.append(Predictions.load(output / "predictions.parquet").logits)
    np.testing.assert_array_equal(answers[0], answers[-1])  # whatever ran before it
    for method in METHODS.values():
        towers = loader.backbone(name, method)[0].backbone.vision_model
        is_shared = towers is shared[0].backbone.vision_model
        assert is_shared is not isinstance(method, TowerMethod), method.name


def test_what_is_asked_of_shared_towers_follows_their_weights() -> None:
    model, processor = load_backbone(str(tiny_clip()))
    prompts = [["a viable tuft"], ["a sclerosed tuft"]]
    ours, own = share_towers(model, processor)
    assert ours.config is not model.config
    assert ours.backbone.visual_projection is not model.backbone.visual_projection
    keys, texts = [], []
    for tower in (None, model.backbone.vision_model, model.backbone.text_model):
        if tower is not None:
            with torch.no_grad():
                next(tower.parameters()).mul_(1.5)
        for _ in range(2):  # the second time it is known
            keys.append(encoder_key(ours, own))
            texts.append(embed_prompts(ours, own, prompts))
        alone = copy.deepcopy((model, processor))
        assert keys[-1] == keys[-2] == encoder_key(*alone)
        np.testing.assert_array_equal(texts[-1], embed_prompts(*alone, prompts))
        texts[-1][:] = 0  # its caller may change it
    assert len(set(keys)) == 2
    assert not np.array_equal(texts[0], texts[4])
    ours.backbone.text_projection.weight.data.mul_(-1)  # its own, so part of what is asked
    np.testing.assert_allclose(embed_prompts(ours, own, prompts), -texts[4], atol=1e-6)


# ------------------------------------------------------------- what its cells are made of


def change_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["visual_projection.weight"] += 0.5
    save_file(weights, path, metadata={"format": "pt"})


def test_a_study_on_other_weights_is_refused(data: Path, tmp_path: Path) -> None:
    backbone, output = tiny_clip(tmp_path), tmp_path / "O"
    run_study(grid(data, backbone=str(backbone), methods=["linear_probe"], draws=1), output)
    change_weight(backbone)
    with pytest.raises(GloVLMError, match=r"the backbone weights have changed"):
        run_study(grid(data, backbone=str(backbone), draws=1), output)
    assert not list(output.rglob("zero_shot"))


def test_a_study_on_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    own, output = Path(shutil.copytree(data, tmp_path / "own")), tmp_path / "O"
    run_study(grid(own, methods=["linear_probe"], draws=1), output)
    table = own / "metadata.csv"
    table.write_text(table.read_text().replace("patient_5", "patient_6"))
    with pytest.raises(GloVLMError, match=r"the groups have changed"):
        run_study(grid(own, draws=1), output)


def test_a_damaged_cell_is_refused(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished[0], tmp_path / "O"))
    path = cell(output, "zero_shot", 1) / "predictions.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for act in (run_study, write_report):
        with pytest.raises(GloVLMError, match=r"draw-01/predictions\.parquet.* has changed"):
            act(grid(data), output)


def test_a_finished_study_reads_data_and_backbone_once(
    data: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    for name in ("load_backbone", "describe_weights"):
        real = getattr(loading, name)

        def count(*given: Any, _name: str = name, _real: Any = real) -> Any:
            loads.append(_name)
            return _real(*given)

        monkeypatch.setattr(loading, name, count)
    _, events = run_recorded(grid(data), finished[0])
    assert statuses(events) == ["skipped"] * 2 * DRAWS
    assert loads == ["load_backbone", "describe_weights"]


def test_a_second_study_into_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(kind: str, what: dict[str, Any]) -> None:
        try:
            run_study(grid(data, draws=1), tmp_path / "O")
        except GloVLMError as error:
            refused.append(str(error))

    run_study(grid(data, draws=1), tmp_path / "O", on_event=second)
    assert len(refused) == 2
    assert all("Another process writes to" in sentence for sentence in refused)


@pytest.mark.parametrize("label", ["..", ".", "a/../../x", "/tmp/x", "", "CON", "a.", "a b"])
def test_a_label_that_is_no_folder_is_refused(label: str, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "O" / "cells" / tiny_clip().name / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (tmp_path / "O" / "study.json").write_text("{}")
    line = {"name": "linear_probe", "label": label}
    with pytest.raises(GloVLMError, match=r"'label:' of letters"):
        run_study(grid(data, methods=[line], reference=label, draws=1), tmp_path / "O")
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("backbone", ["x/..", "..", ".", "x/../..", "~"])
def test_a_backbone_of_any_path_removes_nothing_elsewhere(
    backbone: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny_clip(tmp_path)
    (place / "x").mkdir()
    (place / "x" / "y").mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(
        place / "x" if backbone == ".." else place / "x" / "y" if "/../" in backbone else place
    )
    output = tmp_path / "O"
    kept = output / "cells" / "linear_probe" / "2" / "draw-00" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (output / "study.json").write_text("{}")
    with suppress(GloVLMError):
        run_study(grid(data, backbone=backbone, methods=["linear_probe"], draws=1), output)
    assert kept.is_file()


def test_names_that_differ_by_case_alone_are_refused(data: Path, tmp_path: Path) -> None:
    lines = [{"name": "linear_probe", "label": label} for label in ("a", "A")]
    with pytest.raises(GloVLMError, match="would share a folder"):
        run_study(grid(data, methods=lines, reference="a", draws=1), tmp_path / "O")
    assert not (tmp_path / "O").exists()


ORPHAN = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from hf_glovlm.environment import end_with_parent

def write(path):
    while True:
        with open(path, "a") as file:
            file.write(".")
        time.sleep(0.02)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
    pool.submit(write, sys.argv[1])
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    os.kill(os.getpid(), 9)
"""


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script, written = tmp_path / "orphan.py", tmp_path / "written"
    script.write_text(ORPHAN)
    done = subprocess.run([sys.executable, str(script), str(written)], check=False, timeout=60)
    assert done.returncode == -9
    time.sleep(0.5)
    size = written.stat().st_size
    time.sleep(0.3)
    assert written.stat().st_size == size
