"""The benches run and compare like with like. Nothing here depends on how long anything took."""

import numpy as np
import pytest
from tiny import tiny_clip

from hf_glovlm.bench import BENCHES, bench_metrics, plain_metrics, run_benches
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


def test_an_unknown_bench_is_named() -> None:
    with pytest.raises(GloVLMError, match="Did you mean 'cache'"):
        run_benches(["cahce"])
