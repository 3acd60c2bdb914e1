"""Cost of precisions: nothing for the reference itself, something for bf16, and what cannot be had.

The images are synthetic; no number of them says anything about tissue.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, tiny_images, tiny_pair

from hf_glovlm.data.folder import column
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.precision_study import LabelledSet, compare_features, run_study

ARMS = {
    "torch fp32": {"runtime": "torch", "precision": "fp32"},
    "the same": {"runtime": "torch", "precision": "fp32"},
    "torch bf16": {"runtime": "torch", "precision": "bf16"},
    "torch fp16": {"runtime": "torch", "precision": "fp16", "device": "cuda"},
}
PLAN: dict[str, Any] = {
    "sets": {
        "discs": {
            "folder": "discs",
            "classes": [*CLASSES[1:]],
            "group": "patient_id",
            "most": {"group": 2},
            "draws": {"count": 2, "least_groups": 1},
        }
    },
    "shots": 2,
    "methods": ["linear_probe"],
    "draw_seed": 1,
    "seed": 2,
    "bootstrap_seed": 3,
    "resamples": 20,
    "reference": "torch fp32",
    "arms": ARMS,
    "uses": {"throughout": "learned and used by the arm", "prediction": "used by the arm"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    tiny_images(folder / "discs", per_class=12)
    return folder


def test_the_cost_is_against_the_same_draws_and_zero_for_the_same_arm(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = PLAN | {"backbone": tiny_pair()}
    report = run_study(plan, root, tmp_path)
    assert report["sets"]["discs"]["images"] == 2 * 4 * 2  # classes, patients, at most
    rows = {(row["arm"], row["use"]): row for row in report["results"]}
    assert {*rows} == {(arm, use) for arm in ("the same", "torch bf16") for use in PLAN["uses"]}
    for use in PLAN["uses"]:
        same, rough = rows["the same", use], rows["torch bf16", use]
        assert same["changed"] == 0
        assert all(entry["value"] == 0 for entry in same["paired"].values())
        assert {*same["points"]} == {"ece", "boundary_margin"}
        assert rough["paired"]["brier"]["value"] != 0
    assert report["arms"]["the same"]["cosine"]["discs"]["largest"] == 0
    assert 0 < report["arms"]["torch bf16"]["cosine"]["discs"]["largest"] < 0.01
    assert "cuda" in report["arms"]["torch fp16"]["left_out"]
    before = (tmp_path / "report.md").read_text()
    assert "| the same | linear_probe | 0.00%" in before
    run_study(plan, root, tmp_path)  # from kept features and predictions
    assert (tmp_path / "report.md").read_text() == before


def test_sets_are_thinned_out_by_class_and_group(root: Path) -> None:
    about = PLAN["sets"]["discs"]
    for most, each in (({"group": 1}, 4), ({"class": 3}, 3), ({"group": 1, "class": 2}, 2)):
        labelled = LabelledSet(
            about | {"most": most, "draws": {"count": 1, "least_groups": 0}}, PLAN, root
        )
        names = labelled.rows.features["label"].names
        labels = [names[label] for label in column(labelled.rows, "label")]
        assert sorted(labels) == sorted([*CLASSES[1:]] * each)
    with pytest.raises(GloVLMError, match="found viabel"):
        LabelledSet(about | {"classes": ["viabel"]}, PLAN, root)
    with pytest.raises(GloVLMError, match="lacks reference"):
        run_study(
            {k: v for k, v in PLAN.items() if k != "reference"} | {"backbone": ""}, root, root
        )


def test_cosine_differences_of_nearly_equal_features_are_exact() -> None:
    one = np.array([[1, 0], [1, 1]], dtype=np.float32)
    other = np.array([[1, 1e-4], [2, 2]], dtype=np.float32)
    assert compare_features(one, other)["largest"] == pytest.approx(0.5e-8, rel=1e-6)
