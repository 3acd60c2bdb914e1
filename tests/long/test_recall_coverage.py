"""Percentages of thinned samples hold the truth at least 93 times in 100, and are not pulled."""

import pytest
from thinned import simulate_recall

pytestmark = pytest.mark.long


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("recall", [(0.95, 0.6), (0.9, 0.9), (0.6, 0.9)], ids=str)
def test_intervals_hold_the_truth_of_found_and_missed(
    share: float, recall: tuple[float, float]
) -> None:
    for n, known in ((12, 60), (40, 10), (40, 60)):
        measured, plain = simulate_recall(n, share, recall, draws=300, seed=1, known=known)
        assert measured["coverage"] >= 0.9, (n, known)  # of 300, two standard errors below .93
        if recall[0] > recall[1] and share > 0 and n == 40:  # what is missed pulls down
            assert plain["bias"] < min(measured["bias"], -0.02), known
        if (n, known) == (40, 60):
            assert abs(measured["bias"]) <= 0.035, share
