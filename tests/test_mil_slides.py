"""From synthetic slides to slide labels and heat maps: write, tile, encode with `mini`, learn.

What is measured is plumbing on drawings: pink blobs, in every second slide with three squares of
another texture. No number here says anything about tissue.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from slides_made import write_slide

from hf_glovlm.slides.encoding import encode_slide, load_encoder
from hf_glovlm.slides.files.bags import read_bag
from hf_glovlm.slides.mil import MilConfig, apply_mil, load_aggregator, train_mil

SIDE = 96  # of a tile and of a lesion: what `mini` sees, pixel by pixel


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def lit(coords: NDArray[np.int64], lesions: list[tuple[int, ...]]) -> NDArray[np.bool_]:
    """Which tiles lie in a planted square by at least half."""
    observed = np.zeros(len(coords), dtype=bool)
    for x, y, width, height in lesions:
        across = np.minimum(coords[:, 0] + SIDE, x + width) - np.maximum(coords[:, 0], x)
        down = np.minimum(coords[:, 1] + SIDE, y + height) - np.maximum(coords[:, 1], y)
        observed |= across.clip(0) * down.clip(0) >= SIDE**2 / 2
    return observed


@pytest.mark.long
def test_planted_lesions_on_synthetic_slides_are_learned_and_lit(tmp_path: Path) -> None:
    """Twenty slides, ten a class, one a patient. Five folds: the label of every slide and the heat
    of its tiles come from a model that learned from the sixteen slides of other folds."""
    model, processor = load_encoder("mini")
    lesions: dict[str, Any] = {}
    for i in range(22):  # the last two are in no table
        made = write_slide(
            tmp_path / f"s{i:02d}.tiff",
            1500,
            1500,
            lesions=3 if i % 2 else 0,
            lesion_side=SIDE,
            blobs=2,
            seed=i,
        )
        lesions[f"s{i:02d}"] = made["lesions"]
        bag = tmp_path / "features" / f"s{i:02d}.h5"
        encode_slide(model, processor, made["path"], bag, tile_size=SIDE, mpp=0.5, allow_scale=True)
    (tmp_path / "features" / "DRAWINGS").touch()  # what marks a folder as drawn
    with (tmp_path / "slides.csv").open("w", newline="") as stream:
        rows = [(f"s{i:02d}", "lesion" if i % 2 else "plain", f"p{i:02d}") for i in range(20)]
        csv.writer(stream).writerows([("slide", "label", "patient_id"), *rows])
    run = tmp_path / "run"
    results = train_mil(
        MilConfig(
            features=str(tmp_path / "features"),
            labels=str(tmp_path / "slides.csv"),
            output_dir=str(run),
            aggregator_config={"width": 64, "hidden": 64},
            folds=5,
            epochs=12,
            lr=2e-3,
            device="cpu",
            n_resamples=50,
        )
    )
    assert results["synthetic"] is True
    assert results["n"] == 20
    assert results["metrics"]["macro_auc"]["value"] >= 0.95
    truth, attention, scores = [], [], []
    for i in range(1, 20, 2):
        tiles = pq.read_table(run / "attention" / f"s{i:02d}.parquet").to_pydict()
        truth.append(lit(np.stack([tiles["x"], tiles["y"]], 1), lesions[f"s{i:02d}"]))
        attention.append(np.array(tiles["attention"]) * len(tiles["x"]))
        scores.append(np.array(tiles["score_lesion"]) * len(tiles["x"]))
    planted = np.concatenate(truth)
    assert 15 <= planted.sum() <= 30
    assert len(planted) > 300
    assert roc_auc_score(planted, np.concatenate(scores)) >= 0.9
    assert roc_auc_score(planted, np.concatenate(attention)) >= 0.9

    # The model that is kept, on two slides that no table named.
    kept = load_aggregator(run)
    for i, label in ((20, "plain"), (21, "lesion")):
        prediction = apply_mil(kept, read_bag(tmp_path / "features" / f"s{i}.h5"))
        assert prediction.label == label
        assert prediction.notes == ()
