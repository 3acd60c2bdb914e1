"""Simulated biopsies of two classes, of which a finder misses some glomeruli of each class."""

import numpy as np

from hf_glovlm.slides.prevalence import estimate_fractions


def simulate_recall(
    n: int,
    share: float,
    recall: tuple[float, float],
    *,
    draws: int,
    seed: int,
    known: int = 40,
    labelled: int = 200,
    accuracy: float = 0.95,
) -> tuple[dict[str, float], dict[str, float]]:
    """Coverage, bias and width of the second class, with the recall and without it.

    Args:
        n: Glomeruli of a biopsy.
        share: Of the second class.
        recall: Of each class.
        draws: Biopsies.
        seed: Of the draws.
        known: Glomeruli of each class on which the recall was measured.
        labelled: Objects of each class on which the classifier's errors were.
        accuracy: Of the classifier, in each class.
    """
    rng = np.random.default_rng(seed)
    rates = np.array([[accuracy, 1 - accuracy], [1 - accuracy, accuracy]])
    found = rng.binomial(rng.multinomial(n, [1 - share, share], size=draws), recall)
    calls = rng.multinomial(found, rates).sum(axis=1)
    tables = rng.multinomial(labelled, rates, size=(draws, 2))
    of = np.full((draws, 2), known)
    measured = rng.binomial(of, recall)
    some = calls.sum(axis=1) > 0
    both = []
    for given in ((measured[some], of[some]), None):
        result = estimate_fractions(calls[some], tables[some], recall=given, seed=seed)
        low, high, own = result.low[:, 1], result.high[:, 1], result.share[:, 1]
        both.append(
            {
                "coverage": float(((low <= share) & (share <= high)).mean()),
                "bias": float(own.mean() - share),
                "width": float((high - low).mean()),
            }
        )
    return both[0], both[1]
