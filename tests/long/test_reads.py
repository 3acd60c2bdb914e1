"""Reads and decodes of a run on real glomeruli."""

from collections import Counter
from pathlib import Path

import pytest
from image_counts import Counts

from hf_glovlm.runs import TrainConfig, run

pytestmark = pytest.mark.long


def test_a_warm_run_on_real_glomeruli_reads_each_once_and_decodes_none(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    counts = Counts(monkeypatch)

    def probe(name: str) -> tuple[Counter[int], int]:
        config = TrainConfig(
            data=str(shared / "data/glomeruli_sclerosis"), output_dir=str(tmp_path / name),
            backbone="mini", method="linear_probe", n_resamples=20,
        )  # fmt: skip
        return counts.of(lambda: run(config))

    cold, decoded = probe("cold")
    assert max(cold) == 2
    assert decoded == cold[1] + 2 * cold[2]
    assert probe("warm") == (Counter({1: 1094}), 0)
