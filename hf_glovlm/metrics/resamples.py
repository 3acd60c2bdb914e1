"""Samples of labelled predictions, and bootstrap resamples of their groups.

A group is what was sampled, a patient, a case or a slide; its images are not independent. So a
bootstrap draws groups with replacement and keeps all images of a drawn group. A resample is a
column of group multiplicities; the value is the same computation with all multiplicities one, so
that value and interval cannot drift apart.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..roc import (
    FEW_IMAGES,
    Ranks,
    Thresholds,
    compare_pairs,
    count_wins,
    is_counting_cheaper,
    rank_class,
    threshold_class,
    weigh_ranks,
    weigh_thresholds,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Rows times resamples held at once: 8 MB an array, so that the whole stays far below 200 MB.
_CHUNK = 1_000_000


@dataclass(eq=False)
class Sample:
    """Labelled predictions whose sums over groups are kept.

    Attributes:
        labels: Class indices, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        group: Number of each image's group, `[n]` in 0 ... G-1.
        n_groups: G.
        similarities: Cosines of images and class texts, `[n, K]`, where there are some.
        grades: Grade of each class, 0 ... K-1 from the least to the most, where they are grades.
        n_resamples: How many weightings of the groups are to come.
        top: Most probable class (the first one on a tie), `[n]`.
        right: Whether that is the label, `[n, 1]`.
        actual: Images of each class, `[G, K]`.
        hits: Images of each class that are classified right, `[G, K]`.
        predicted: Images that are classified as each class, `[G, K]`.
    """

    labels: Ints
    probabilities: Floats
    group: Ints
    n_groups: int
    similarities: Floats | None = None
    n_resamples: int = 0
    grades: Ints | None = None

    def __post_init__(self) -> None:
        top = self.probabilities.argmax(1)
        right = top == self.labels
        self.top: Ints = top
        self.right: NDArray[np.bool_] = right[:, None]
        self.actual = self._count(self.labels, self.group)
        self.hits = self._count(self.labels[right], self.group[right])
        self.predicted = self._count(top, self.group)
        self._sums: dict[PerImage, Floats] = {}

    @cached_property
    def one_hot(self) -> Floats:
        """1 in the column of each image's class, `[n, K]`."""
        return np.asarray(np.eye(self.probabilities.shape[1])[self.labels])

    def _count(self, classes: Ints, group: Ints) -> Floats:
        n_classes = self.probabilities.shape[1]
        cells = np.bincount(group * n_classes + classes, minlength=self.n_groups * n_classes)
        return cells.reshape(self.n_groups, n_classes).astype(np.float64)

    def _sum(self, values: Floats) -> Floats:
        block = values[:, None] if values.ndim == 1 else values
        sums = np.zeros((self.n_groups, block.shape[1]))
        np.add.at(sums, self.group, block)
        return sums

    def by_group(self, per_image: "PerImage") -> Floats:
        """Sums over the images of each group, `[G, c]`, of a function's `[n]` or `[n, c]`."""
        if per_image not in self._sums:
            self._sums[per_image] = self._sum(per_image(self))
        return self._sums[per_image]

    @cached_property
    def ranks(self) -> list[Ranks]:
        """Each class against the others."""
        columns = enumerate(self.probabilities.T)
        return [rank_class(scores, self.labels == c, self.group) for c, scores in columns]

    @cached_property
    def thresholds(self) -> list[Thresholds]:
        """Each class against the others, by its own scores."""
        columns = enumerate(self.probabilities.T)
        return [
            threshold_class(scores, self.labels == c, self.group, self.n_groups)
            for c, scores in columns
        ]

    @cached_property
    def wins(self) -> Floats | None:
        """Wins of each class in every pair of groups, `[K, G, G]`; a tie is half of one.

        A win: an image of the class in the first group scores above another's in the second.
        `None` where the ranks are cheaper.
        """
        n, n_classes = self.probabilities.shape
        if not is_counting_cheaper(n, self.n_groups, n_classes, self.n_resamples):
            return None
        if n > FEW_IMAGES:
            return np.stack([count_wins(ranks, self.n_groups) for ranks in self.ranks])
        return compare_pairs(self.probabilities, self.labels, self.group, self.n_groups)

    @cached_property
    def class_shares(self) -> Floats:
        """Share of each group in the images of each class, `[G, K]`; NaN without an image."""
        with np.errstate(invalid="ignore"):
            shares: Floats = self.actual / self.actual.sum(0)
        return shares

    def shares(self, over_classes: bool) -> Floats:
        """Weight of each group in a metric, `[G]`: of its images, or a mean over classes."""
        if over_classes:
            return np.asarray(np.nanmean(self.class_shares, axis=1))
        return np.asarray(self.actual.sum(1) / len(self.labels))


class Resamples:
    """A sample under R weightings of its groups, for all metrics; a weight is a number of copies.

    Attributes:
        sample: The predictions.
        weights: Multiplicity of each group, `[G, R]`; a column of ones is the sample itself.
        actual, hits: Images of each class as in `Sample`, `[K, R]`.
        n: Images, `[R]`.
        present: Which classes the labels of the sample hold, `[K]`.
    """

    def __init__(self, sample: Sample, weights: Floats) -> None:
        self.sample, self.weights = sample, weights
        self.actual, self.hits = (count.T @ weights for count in (sample.actual, sample.hits))
        self.n: Floats = self.actual.sum(0)
        self.present: NDArray[np.bool_] = sample.actual.sum(0) > 0

    @cached_property
    def predicted(self) -> Floats:
        """Images that are classified as each class, `[K, R]`."""
        return np.asarray(self.sample.predicted.T @ self.weights)

    def total(self, per_image: "PerImage") -> Floats:
        """Sums over the images of each resample, `[c, R]`; see `Sample.by_group`."""
        return self.sample.by_group(per_image).T @ self.weights

    @cached_property
    def auc(self) -> Floats:
        """Area under the ROC curve of each class against the others, `[K, R]`."""
        sample, weights = self.sample, self.weights
        if sample.wins is None:
            wins = np.stack([weigh_ranks(ranks, weights) for ranks in sample.ranks])
        else:
            rows = sample.wins.reshape(-1, len(weights)) @ weights
            wins = np.einsum("kgr,gr->kr", rows.reshape(-1, *weights.shape), weights)
        pairs = self.actual * (self.n - self.actual)
        areas: Floats = np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)
        return areas

    @cached_property
    def average_precision(self) -> Floats:
        """Area under the precision-recall curve of each class against the others, `[K, R]`."""
        areas = np.stack([weigh_thresholds(one, self.weights) for one in self.sample.thresholds])
        return np.where(self.n > self.actual, areas, np.nan)  # of others there must be some


PerImage = Callable[[Sample], Floats]
Statistic = Callable[[Resamples], Floats]


def mean_of(per_image: PerImage) -> Statistic:
    """The `function` of a metric that is the mean of a number per image, `[n]`."""
    return lambda resamples: resamples.total(per_image)[0] / resamples.n


def statistics(
    functions: Mapping[str, Statistic], sample: Sample, weights: Floats
) -> dict[str, Floats]:
    """Values under R weightings of the groups: `[G, R]` -> `[1 or K, R]`, NaN if undefined."""
    resamples = Resamples(sample, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: np.atleast_2d(function(resamples)) for name, function in functions.items()}


def multiplicities(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Multiplicities of n things when n are drawn with replacement: `[n, size]`."""
    cells = rng.integers(n, size=(size, n)) * size + np.arange(size)[:, None]
    return np.bincount(cells.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)


def resample_groups(
    n_groups: int, n_resamples: int, n_rows: int, rng: np.random.Generator
) -> Iterator[tuple[slice, Floats]]:
    """Bootstrap of groups in parts that fit in memory: which resamples, and weights `[G, part]`."""
    step = max(1, _CHUNK // n_rows)
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        yield slice(start, start + size), multiplicities(rng, n_groups, size)
