"""The shortcut probe on real sets with a known shortcut, and on synthetic sets without one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_glovlm.data import all_rows, group_rows, load_dataset
from hf_glovlm.data.file_statistics import STATISTICS, FileStatistics, read_file_statistics
from hf_glovlm.data.folder import column
from hf_glovlm.data.looks import look_at
from hf_glovlm.lab.phantoms import write_cohort
from hf_glovlm.runs.shortcuts import LIMIT, probe_labels

pytestmark = pytest.mark.long


def probe(folder: Path) -> dict[str, Any]:
    rows = all_rows(load_dataset(folder))
    looks = look_at(rows)
    groups = group_rows(rows, looks=looks).ids
    names = rows.features["label"].names
    return probe_labels(read_file_statistics(rows, looks), column(rows, "label"), names, groups)


def test_sclerosed_glomeruli_are_known_by_size_and_blur(shared: Path) -> None:
    found = probe(shared / "data/glomeruli_sclerosis")
    assert found["ci95"][0] > LIMIT
    assert found["carriers"][0] == "blur"
    assert "size" in found["carriers"]


def test_lung_and_colon_are_known_by_their_compression(shared: Path) -> None:
    found = probe(shared / "data/lc25000_dedup")
    assert found["groups"]["compression"]["ci95"][0] > LIMIT
    between = [pair for pair in found["pairs"] if len({n[:4] for n in pair["classes"]}) == 2]
    assert between == found["pairs"][:6]  # all pairs of a lung class and a colon class come first
    assert min(pair["groups"]["compression"] for pair in between) > 0.85
    within = found["pairs"][6:]
    assert max(pair["groups"]["compression"] for pair in within) < 0.75


def test_global_sclerosis_in_three_stains_is_known_by_its_magnification(shared: Path) -> None:
    found = probe(shared / "data/glomeruli_multistain/crops")
    assert found["classes"]["global_sclerosis"]["ci95"][0] > LIMIT
    assert {"magnification", "size"} <= {*found["carriers"]}


def test_one_of_twenty_clean_sets_is_flagged_at_most(tmp_path: Path) -> None:
    flagged = 0
    for seed in range(20):
        folder = write_cohort(tmp_path / str(seed), 24, 10, seed=100 + seed)
        flagged += probe(folder)["flagged"]
    assert flagged <= 1


def test_what_differs_between_patients_alone_is_seldom_flagged() -> None:
    flagged, names = 0, tuple(STATISTICS)
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        patient = np.repeat(np.arange(24), 10)
        drawn = rng.normal(size=(24, len(names)))[patient] + rng.normal(size=(240, len(names)))
        values = np.exp(0.7 * drawn)
        values[:, names.index("format")] = 0
        labels = rng.permutation(np.arange(24) % 5)[patient]
        groups = [f"P{p}" for p in patient]
        statistics = FileStatistics(names, values)
        found = probe_labels(statistics, labels.tolist(), list("abcde"), groups, n_resamples=300)
        flagged += found["flagged"]
    assert flagged <= 4
