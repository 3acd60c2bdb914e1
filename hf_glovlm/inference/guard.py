"""Guard against images unlike the support: fitted on the support itself, without other labels.

The distance is Mahalanobis's, on the mean patch token behind the vision tower's middle block, so
that every method's model has it. Each group of the support in turn is measured by the others; the
limit is the upper 97.5% prediction limit of those distances for a further group.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.guard import SupportGuard
from .cache import FeatureCache
from .prediction import Predictions, embed_twice

if TYPE_CHECKING:
    from datasets import Dataset

SHARE = 0.975  # of further images of the same kind that the limit is meant to let through
SHRINKAGE = 0.5  # of the covariance within the classes, towards a multiple of the identity
MIN_IMAGES = 4  # that others of their class, of other groups, can measure
MOST_IMAGES = 1000  # that a guard is fitted on; more are drawn from
FOLDS = 20  # of groups that are left out at a time; fewer where the support is large
NO_GUARD = (
    "Whether an image is unlike those that the model learned from is not checked: it has no guard."
)


def add_guard(
    classifier: Any,
    processor: Any,
    support: "Dataset",
    labels: Sequence[int],
    groups: Sequence[str] | None = None,
    cache: FeatureCache | None = None,
) -> None:
    """Fit a guard on the support of an adapted model and put it into the model.

    Args:
        classifier: A `GloVLMForImageClassification`; without a guard afterwards where the support
            is too small for one.
        processor: Its processor.
        support: Rows with `image`.
        labels: Class number of each.
        groups: Patient, case or slide of each; by default each image is one of its own.
        cache: Where pooled vectors are looked up and stored.
    """
    guard = None
    if len(support):
        _, vectors = embed_twice(classifier.glovlm, processor, support, cache=cache)
        guard = fit_guard(vectors, labels, groups)
    classifier.set_guard(guard)


def fit_guard(
    vectors: NDArray[np.float32], labels: Sequence[int], groups: Sequence[str] | None = None
) -> SupportGuard | None:
    """Fit a guard on vectors of the support.

    Args:
        vectors: `[n, width]`, the second of `embed_twice`.
        labels: Class number of each.
        groups: Patient, case or slide of each; by default each image is one of its own.

    Returns:
        The guard; `None` where fewer than 4 images have others of their class in other groups, or
        all of these are one image.
    """
    from scipy.stats import t

    if len(labels) < MIN_IMAGES:
        return None
    y = np.unique(np.asarray(labels), return_inverse=True)[1]
    known = range(len(y)) if groups is None else groups
    group = np.unique(np.asarray([str(g) for g in known]), return_inverse=True)[1]
    if len(y) > MOST_IMAGES:
        drawn = np.random.default_rng(0).permutation(len(y))[:MOST_IMAGES]
        vectors, y, group = vectors[drawn], y[drawn], group[drawn]
        y, group = (np.unique(v, return_inverse=True)[1] for v in (y, group))
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    fold = group % min(FOLDS, max(5, 5 * MOST_IMAGES // len(y)))
    distances = []
    for left_out in np.unique(fold):
        inside, outside = fold != left_out, fold == left_out
        outside &= np.isin(y, y[inside])
        others = _fit(unit[inside], y[inside])
        if others is not None and outside.any():
            distances.append(others(torch.from_numpy(unit[outside])).numpy())
    measured = np.concatenate(distances) if distances else np.zeros(0)
    guard = _fit(unit, y)
    n = min(len(measured), int(group.max(initial=-1)) + 1)
    if guard is None or len(measured) < MIN_IMAGES or n < 3:
        return None
    spread = t.ppf(SHARE, n - 1) * measured.std(ddof=1) * (1 + 1 / n) ** 0.5
    guard.threshold = float(measured.mean() + spread)
    guard.images, guard.groups = len(measured), int(group.max()) + 1
    return guard


def count_unlike(predictions: Predictions) -> str:
    """A sentence for the notes of results: how many images are unlike the support."""
    unlike = predictions.unlike_support
    if unlike is None:
        return NO_GUARD
    return (
        f"{int(unlike.sum())} of {len(unlike)} images are unlike the support, so that their "
        "predictions may mean nothing; they are measured, too."
    )


def _fit(unit: NDArray[np.float64], y: NDArray[np.int64]) -> SupportGuard | None:
    """Class means and shrunk covariance of unit vectors; the limit is 1 as yet."""
    classes = np.unique(y)
    freedom = len(unit) - len(classes)
    if freedom < 1:
        return None
    means = np.stack([unit[y == k].mean(0) for k in classes])
    rest = unit - means[np.searchsorted(classes, y)]
    _, values, directions = np.linalg.svd(rest, full_matrices=False)
    eigenvalues = values**2 / freedom
    kept = eigenvalues > 1e-12
    if not kept.any():
        return None
    floor = SHRINKAGE * eigenvalues.sum() / unit.shape[1]
    variances = (1 - SHRINKAGE) * eigenvalues[kept] + floor
    guard = SupportGuard(
        unit.shape[1], len(classes), int(kept.sum()), float(floor), 1.0, len(unit), len(unit)
    )
    guard.means.copy_(torch.from_numpy(means))
    guard.directions.copy_(torch.from_numpy(directions[kept]))
    guard.shrinkage.copy_(torch.from_numpy(1 - np.sqrt(floor / variances)))
    return guard
