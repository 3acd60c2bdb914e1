"""Corrected percentages of simulated biopsies hold the truth at least 93 times in 100."""

from itertools import product

import pytest

from hf_glovlm.lab.prevalence_bench import simulate_cell

pytestmark = pytest.mark.long


@pytest.mark.parametrize("prevalence", [0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_hold_the_truth(classes: int, prevalence: float) -> None:
    cells = product((10, 40), (0.6, 0.8, 0.95), (16, 200))
    rows = [simulate_cell(classes, n, a, prevalence, labels, draws=500) for n, a, labels in cells]
    # of 500 biopsies, a share of .93 is .905 or more, two standard errors below
    assert min(row["coverage"] for row in rows) >= 0.905, rows
