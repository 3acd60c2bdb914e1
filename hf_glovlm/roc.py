"""Areas under ROC and precision-recall curves under many weightings of the groups.

Images are ranked once and never sorted anew. For the ROC curve, where that is cheaper
(`is_counting_cheaper`), wins are counted once for every pair of groups, and a weighting is a
product of matrices; else each weighting cumulates along the ranks. Both give one number: wins are
halves, multiplicities whole. Precision is no sum over pairs of groups, so that its average always
cumulates, along the thresholds of the positives alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

__all__ = [
    "FEW_IMAGES",
    "Ranks",
    "Thresholds",
    "compare_pairs",
    "count_wins",
    "is_counting_cheaper",
    "rank_class",
    "threshold_class",
    "weigh_ranks",
    "weigh_thresholds",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CELLS = 1_000_000  # of tables that are held at once
FEW_IMAGES = 300  # of which all pairs are compared sooner than they are ranked


class Ranks(NamedTuple):
    """Ranks of one class against the rest: negatives ascend, positives point into them."""

    positive: Ints  # group of each positive [P]
    negative: Ints  # group of each negative, by ascending score [N]
    below: Ints  # negatives with a smaller score than the positive [P]
    not_above: Ints  # and with a smaller or equal one [P]


def rank_class(scores: Floats, own: NDArray[np.bool_], group: Ints) -> Ranks:
    """Rank the images of a class among the others.

    Args:
        scores: Probability of the class, `[n]`.
        own: Whether the class is the image's, `[n]`.
        group: Number of each image's group, `[n]`.
    """
    rest = np.flatnonzero(~own)
    rest = rest[np.argsort(scores[rest], kind="stable")]
    below, not_above = (np.searchsorted(scores[rest], scores[own], s) for s in ("left", "right"))
    return Ranks(group[own], group[rest], below, not_above)


def is_counting_cheaper(n_images: int, n_groups: int, n_classes: int, n_weightings: int) -> bool:
    """Whether wins in pairs of groups are cheaper than ranks, by the operations of a class.

    R weightings of n images take `R n` steps along the ranks. Counting takes 1.5 of these for each
    image and group, `1.5 n G`; a product takes one for a hundred pairs of groups, `R G^2 / 100`
    (measured, one thread). The tables of all classes have to fit as well, 8 MB.

    Args:
        n_images: n.
        n_groups: G.
        n_classes: Each has a table `[G, G]`.
        n_weightings: R.
    """
    ranks = n_weightings * n_images
    pairs = 1.5 * n_images * n_groups + n_weightings * n_groups**2 / 100
    return pairs < ranks and n_classes * n_groups**2 <= _CELLS


def weigh_ranks(ranks: Ranks, weights: Floats) -> Floats:
    """Weighted wins `[R]` (Mann-Whitney; a tie is half of one) of multiplicities `[G, R]`."""
    below = np.zeros((len(ranks.negative) + 1, weights.shape[1]))
    np.cumsum(weights[ranks.negative], axis=0, out=below[1:])
    wins = below[ranks.below] + below[ranks.not_above]
    return np.asarray(np.einsum("pr,pr->r", weights[ranks.positive], wins) / 2)


def compare_pairs(scores: Floats, labels: Ints, group: Ints, n_groups: int) -> Floats:
    """`count_wins` of every class among few images, by comparing them all: `[K, G, G]`.

    Args:
        scores: Probabilities, `[n, K]`.
        labels: Class of each image, `[n]`; the image is a positive of this class alone.
        group: Number of each image's group, `[n]`.
        n_groups: G.
    """
    rows, n_classes = np.arange(len(labels)), scores.shape[1]
    members = np.zeros((len(labels), n_groups))
    members[rows, group] = 1
    cells = np.zeros((n_classes * n_groups, len(labels)))
    cells[labels * n_groups + group, rows] = 0.5
    positive, negative = scores[rows, labels][:, None], scores.T[labels]
    wins = np.add(positive > negative, positive >= negative, dtype=np.float64)
    wins *= labels[:, None] != labels
    return np.asarray(cells @ (wins @ members)).reshape(n_classes, n_groups, n_groups)


def count_wins(ranks: Ranks, n_groups: int) -> Floats:
    """Wins of the first group's positives over the second's negatives, `[G, G]`."""
    wins = np.zeros((n_groups, n_groups))
    step = max(1, _CELLS // (len(ranks.negative) + 1))
    for start in range(0, n_groups, step):
        columns = np.arange(start, min(start + step, n_groups))
        below = np.zeros((len(ranks.negative) + 1, len(columns)))
        np.cumsum(ranks.negative[:, None] == columns, axis=0, out=below[1:])
        rows = (below[ranks.below] + below[ranks.not_above]) / 2
        np.add.at(wins[:, columns[0] : columns[-1] + 1], ranks.positive, rows)
    return wins


class Thresholds(NamedTuple):
    """Thresholds of one class, the different scores of its images, from the highest down.

    Counts of images whose score reaches a threshold and not the one above it, `[T, G]`.
    """

    positive: sparse.csr_array  # of the class
    every: sparse.csr_array  # of any class


def threshold_class(
    scores: Floats, own: NDArray[np.bool_], group: Ints, n_groups: int
) -> Thresholds:
    """Count the images between the thresholds of a class.

    Args:
        scores: Probability of the class, `[n]`.
        own: Whether the class is the image's, `[n]`.
        group: Number of each image's group, `[n]`.
        n_groups: G.
    """
    levels = np.unique(scores[own])
    place = len(levels) - np.searchsorted(levels, scores, side="right")  # T: below all of them
    reached, shape = place < len(levels), (len(levels), n_groups)

    def count(rows: NDArray[np.bool_]) -> sparse.csr_array:
        ones = np.ones(int(rows.sum()))
        return sparse.csr_array((ones, (place[rows], group[rows])), shape=shape)

    return Thresholds(count(own), count(reached))


def weigh_thresholds(thresholds: Thresholds, weights: Floats) -> Floats:
    """Weighted average precision `[R]` of multiplicities `[G, R]`; NaN without a positive.

    The sum over thresholds of precision times the gain in recall; images of one score enter
    together, and nothing is interpolated (Davis and Goadrich 2006 on why).
    """
    positive = np.asarray(thresholds.positive @ weights)
    named = np.asarray(thresholds.every @ weights)
    np.cumsum(named, axis=0, out=named)
    precision = np.cumsum(positive, axis=0)
    total = precision[-1].copy() if len(precision) else np.zeros(weights.shape[1])
    precision /= np.maximum(named, 1, out=named)  # none named, none right: 0
    gained = np.einsum("tr,tr->r", positive, precision)
    return np.asarray(np.divide(gained, total, out=np.full_like(total, np.nan), where=total > 0))
