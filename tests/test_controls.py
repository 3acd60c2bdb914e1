"""Negative controls: planted shortcuts are flagged, and what shows nothing stays near chance."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny import tiny_clip, tiny_images

from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.data.folder import column, open_image
from hf_glovlm.data.outlines import open_outlined
from hf_glovlm.runs import run, study_controls
from hf_glovlm.runs.config import TrainConfig
from hf_glovlm.runs.controls import (
    CONTROLS,
    ControlTables,
    Draw,
    hide_inside,
    measure_controls,
    permute_labels,
    read_tables,
)
from hf_glovlm.runs.shortcuts import fit_predict
from hf_glovlm.runs.study import StudyConfig, run_study

KEYS = {"title", "metric", "value", "ci95", "chance", "flagged", "note"}


def task(seed: int = 0) -> tuple[np.ndarray, list[str], list[Draw]]:
    """40 patients of 2 images of each of 2 classes, three draws of 4 labels a class."""
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 0, 1, 1], 40)
    groups = [f"p{i // 4:02}" for i in range(160)]
    draws = []
    for draw in range(3):
        patients = rng.permutation(40)
        support = [int(4 * p + i) for p in patients[:2] for i in range(4)]
        test = [int(4 * p + i) for p in sorted(patients[10:]) for i in range(4)]
        draws.append(Draw(support, test, draw))
    return labels, groups, draws


def tables(labels: np.ndarray, seed: int = 0) -> ControlTables:
    """Size is planted, the file says nothing, and image features are the classes themselves."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(labels), 3))
    features = {
        "size": noise + 2 * labels[:, None],
        "file_statistics": rng.normal(size=(len(labels), 4)),
        "permuted_labels": np.eye(8)[labels] + 0.1 * rng.normal(size=(len(labels), 8)),
    }
    return ControlTables(features, {"outside_of_the_outline": "3 of 160 images have no outline"})


# ------------------------------------------------------------------------------------ measuring


def test_a_planted_shortcut_is_flagged_and_nothing_else_is():
    labels, groups, draws = task()
    controls = measure_controls(tables(labels), draws, labels, groups, 2, n_resamples=300)
    assert list(controls) == list(CONTROLS)
    assert {name for name, one in controls.items() if one["flagged"]} == {"size"}
    assert all(set(one) == KEYS for one in controls.values())
    assert controls["size"]["ci95"][0] > 0.6
    assert "Flagged" in controls["size"]["note"]
    for name in ("file_statistics", "permuted_labels"):
        low, high = controls[name]["ci95"]
        assert low < 0.5 < high, name
        assert abs(controls[name]["value"] - 0.5) < 0.2, name
    absent = controls["outside_of_the_outline"]
    assert (absent["value"], absent["ci95"], absent["flagged"]) == (None, None, False)
    assert absent["note"] == "Not computed: 3 of 160 images have no outline."


def test_a_value_is_the_mean_over_draws_of_the_area_of_a_plain_classifier():
    labels, groups, draws = task(3)
    given = tables(labels, 3)
    areas = []
    for draw in draws:
        support, test = list(draw.support), list(draw.test)
        of = given.features["file_statistics"]
        p = fit_predict(of[support], labels[support], of[test], 2)
        areas.append(roc_auc_score(labels[test], p[:, 1]))
    controls = measure_controls(given, draws, labels, groups, 2, n_resamples=50)
    assert controls["file_statistics"]["value"] == pytest.approx(np.mean(areas))


def test_without_labelled_images_of_two_classes_nothing_is_computed():
    labels, groups, draws = task()
    for support in ((), (0, 1)):
        none = [Draw(support, draws[0].test, 0)]
        controls = measure_controls(tables(labels), none, labels, groups, 2)
        assert {one["value"] for one in controls.values()} == {None}
        assert "no labelled images of two classes" in controls["size"]["note"]


def test_labels_are_permuted_within_groups_that_mix_classes_and_else_among_all():
    rng = np.random.default_rng(0)
    mixed = np.tile([0, 1, 2], 8)
    groups = [f"p{i // 3}" for i in range(24)]
    for _ in range(5):
        permuted, within = permute_labels(mixed, groups, rng)
        assert within
        for start in range(0, 24, 3):
            assert sorted(permuted[start : start + 3]) == [0, 1, 2]
    pure = np.repeat([0, 1, 2], 8)  # two groups hold two classes, the others one
    moved = []
    for _ in range(40):
        permuted, within = permute_labels(pure, groups, rng)
        assert not within
        assert sorted(permuted) == sorted(pure)
        moved.append((permuted != pure).mean())
    assert np.mean(moved) == pytest.approx(2 / 3, abs=0.1)


# ------------------------------------------------------------------------------------- pictures


def write_outlined(folder: Path, *, outside: bool) -> Path:
    """Crops with outlines; the class is the colour outside of them, or inside."""
    folder.mkdir()
    lines = ["file_name,label,patient_id"]
    rng = np.random.default_rng(0)
    across = np.mgrid[:24, :24]
    inside = ((across - 11.5) ** 2).sum(0) < 64
    for i in range(48):
        label, pixels = i % 2, rng.integers(90, 130, size=(24, 24, 4), dtype=np.uint8)
        pixels[~inside if outside else inside, 0] += np.uint8(80 * label)
        pixels[..., 3] = np.where(inside, 255, 0)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        lines.append(f"{i:02}.png,{'ab'[label]},p{i // 4:02}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def mean_colours(rows: Any) -> np.ndarray:
    return np.array([np.asarray(open_image(one)).mean((0, 1)) for one in column(rows, "image")])


@pytest.mark.parametrize("outside", [True, False])
def test_with_the_inside_hidden_only_what_lies_around_can_predict(tmp_path, outside: bool):
    rows = all_rows(load_dataset(write_outlined(tmp_path / "crops", outside=outside)))
    labels, groups = column(rows, "label"), column(rows, "patient_id")
    draw = Draw(range(8), range(8, 48), 0)
    read = read_tables(rows, range(48), mean_colours)
    controls = measure_controls(read, [draw], labels, groups, 2, n_resamples=200)
    hidden = controls["outside_of_the_outline"]
    assert hidden["flagged"] == outside
    assert outside or hidden["value"] < 0.7
    assert not controls["size"]["flagged"]
    areas = read.features["size"][:, -1]
    picture = open_outlined(column(rows, "image")[0])
    assert np.exp(areas) == pytest.approx((np.asarray(picture)[..., 3] == 255).sum())


def test_hiding_the_inside_leaves_the_outside_as_it_is():
    pixels = np.random.default_rng(0).integers(255, size=(8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[2:5, 3:6, 3] = 255
    hidden = np.asarray(hide_inside(Image.fromarray(pixels)))
    inside = pixels[..., 3] == 255
    assert (hidden[inside] == 200).all()
    assert (hidden[~inside] == pixels[~inside][:, :3]).all()
    assert np.asarray(hide_inside(Image.new("RGB", (3, 2)))).tolist() == [[[200] * 3] * 3] * 2


def test_images_without_outlines_have_no_outside(tmp_path):
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images", per_class=2)))
    read = read_tables(rows, range(3), mean_colours)
    assert read.why_not == {"outside_of_the_outline": "3 of 3 images have no outline"}
    assert np.isnan(read.features["permuted_labels"][3:]).all()  # of rows that are not used


# -------------------------------------------------------------------------- in runs and studies


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images", per_class=8, groups=4)


def test_a_run_keeps_its_controls_and_no_other_number_changes(images: Path, tmp_path: Path):
    shared: dict[str, Any] = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 20}
    shared |= {"data": str(images), "save_model": False}
    without = run(TrainConfig(output_dir=str(tmp_path / "without"), **shared))
    results = run(TrainConfig(output_dir=str(tmp_path / "with"), controls=True, **shared))
    stored = json.loads((tmp_path / "with" / "results.json").read_text())
    assert stored["controls"] == results["controls"]
    assert set(stored["controls"]) == set(CONTROLS)
    assert "controls" not in without
    for key in ("metrics", "per_class", "confusion_matrix"):
        assert results[key] == without[key]


def test_a_study_measures_controls_once_and_is_not_lost_for_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values: dict[str, Any] = {
        "data": str(images),
        "backbones": [str(tiny_clip())],
        "methods": ["linear_probe"],
        "shots": [1, 2],
        "draws": 2,
        "n_resamples": 20,
    }
    plain = run_study(StudyConfig.from_mapping(values), tmp_path / "study")
    assert plain["controls"] == []
    config = StudyConfig.from_mapping(values | {"controls": True})

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(study_controls, "read_tables", fail)
        report = run_study(config, tmp_path / "study")  # its finished cells are as they were
    assert report["failures"] == []
    assert [one["note"] for one in report["controls"]] == ["No controls: broken"] * 2
    report = run_study(config, tmp_path / "study")
    assert [(one["shots"], one["n_draws"]) for one in report["controls"]] == [(1, 2), (2, 2)]
    for one in report["controls"]:
        assert set(one["controls"]) == set(CONTROLS)
    with monkeypatch.context() as patch:
        patch.setattr(study_controls, "read_tables", fail)
        assert run_study(config, tmp_path / "study")["controls"] == report["controls"]
