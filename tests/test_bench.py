"""The benches run and compare like with like. Nothing here depends on how long anything took."""

import numpy as np
import pytest
from tiny import tiny_clip

from hf_glovlm.adapters import METHODS
from hf_glovlm.bench import (
    BENCHES,
    Shape,
    bench_methods,
    bench_metrics,
    plain_metrics,
    run_benches,
)
from hf_glovlm.errors import GloVLMError
from hf_glovlm.metrics import compute_metrics


def test_the_loop_computes_what_the_bootstrap_does() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=80)
    probabilities = rng.dirichlet(np.ones(3), size=80)
    plain = plain_metrics(labels, probabilities)
    ours = compute_metrics(labels, probabilities, n_resamples=0)
    for name in ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1", "brier"):
        assert plain[name] == pytest.approx(ours["metrics"][name]["value"])
    for k in range(3):
        for name in ("recall", "specificity", "auc"):
            assert plain[f"{name}_{k}"] == pytest.approx(ours["per_class"][str(k)][name]["value"])


def test_metrics_rows() -> None:
    rows = bench_metrics(n=200, n_groups=12, n_classes=3, n_resamples=40, loop_resamples=2)
    fast, *loops = rows
    assert fast["ratio"] is None
    for row in loops:
        assert row["ratio"] == pytest.approx(row["value"] / fast["value"], rel=0.02)
        assert "extrapolated from 2 resamples" in row["what"]


@pytest.mark.parametrize("name", ["cache", "encode"])
def test_encoding_rows(name: str) -> None:
    base, ours = BENCHES[name](backbone=str(tiny_clip()), n_patients=2, per_patient=3, repeats=1)
    assert base["ratio"] is None
    assert min(base["value"], ours["value"]) > 0
    # of two times and of two rates, each the way the row's text says
    expected = (base["value"] / ours["value"]) ** (1 if name == "cache" else -1)
    assert ours["ratio"] == pytest.approx(expected, rel=0.02)
    assert all("6 drawings" in row["what"] for row in (base, ours))


def test_methods_rows_compare_what_gives_the_same() -> None:
    shape = Shape(image_size=32, patch=8, vision=(64, 4), text=(64, 3), context=40)
    rows = bench_methods(
        shape=shape, n_classes=3, shots=4, dim=32, rows=60, loop_pairs=5, repeats=1
    )
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == len(rows)
    pairs = {
        "methods.text_cut_4": "methods.text_full_4",
        "methods.text_once": "methods.text_each_step",
        "methods.epoch_2_0_once": "methods.epoch_2_0_plain",
        "methods.search": "methods.search_loop",
    }
    for ours, plain in pairs.items():
        expected = by_name[plain]["value"] / by_name[ours]["value"]
        assert by_name[ours]["ratio"] == pytest.approx(expected, rel=0.02)
    free = {name for name, m in METHODS.items() if m.family == "training-free"}
    assert free <= {name.removeprefix("methods.") for name in by_name}


def test_an_unknown_bench_is_named() -> None:
    with pytest.raises(GloVLMError, match="Did you mean 'cache'"):
        run_benches(["cahce"])
