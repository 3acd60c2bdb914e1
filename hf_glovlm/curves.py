"""ROC and precision-recall curves with bands over groups, and thresholds chosen beforehand.

Arrays in, plain values out. A curve is thinned to at most `POINTS` points a class. Its band holds
at each point alone (pointwise), and is made as every interval is, see `intervals`: groups are drawn
with replacement, and all images of a drawn group stay together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_glovlm import intervals
from hf_glovlm.arrays import check_groups, check_predictions
from hf_glovlm.errors import GloVLMError

__all__ = [
    "POINTS",
    "RESAMPLES",
    "RULE",
    "choose_thresholds",
    "compute_curves",
    "count_by_group",
    "measure_thresholds",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

POINTS = 60  # of a curve
RESAMPLES = 200  # of a band: its standard error alone is the bootstrap's
RULE = "largest sum of sensitivity and specificity (Youden 1950)"
_CELLS = 2_000_000  # images times resamples that are held at once
_DECIMALS = 4  # of a curve: finer than it can be drawn


def compute_curves(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """ROC and precision-recall curves of every class against the others.

    Of a class with at most 59 negatives the ROC curve has a point at every rate that it can take,
    and so has the precision-recall curve of one with at most 60 positives: the mean of `precision`
    is then the average precision.

    Args:
        labels: Class indices in 0 ... K-1, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        groups: Patient, case or slide of each image, `[n]`; by default each is its own.
        class_names: `[K]`; by default the class numbers.
        n_resamples: Bootstrap resamples of the bands; 0 gives curves without.
        seed: Of the bootstrap.

    Returns:
        `classes` (class -> `roc` with `fpr`, `sensitivity`, `low`, `high`, and `precision_recall`
        with `recall`, `precision`, `low`, `high`; `None` for a class without positives or without
        negatives), `unit`, `n_resamples`. Where several thresholds have one false positive rate,
        the highest sensitivity counts; a precision is that of the highest threshold that reaches
        the recall.

    Raises:
        GloVLMError: An input has a wrong shape, range or length.
    """
    y, p = check_predictions(labels, probabilities)
    names = [str(c) for c in (range(p.shape[1]) if class_names is None else class_names)]
    group, n_groups = _number_groups(groups, len(y))
    drawn = min(n_resamples, RESAMPLES)
    weights = _draw_groups(n_groups, drawn, seed)
    classes: dict[str, Any] = {}
    for c, name in enumerate(names):
        own = y == c
        if own.all() or not own.any():
            classes[name] = None
            continue
        shares = np.bincount(group[own], minlength=n_groups) / own.sum()
        effective = intervals.count_effective_groups(shares)
        order = np.argsort(-p[:, c], kind="stable")
        ends = np.flatnonzero(np.diff(p[order, c], append=-1.0))  # of images of one score
        ranked = own[order], group[order], ends
        at = _grid(int((~own).sum()), POINTS - 1), _grid(int(own.sum()), POINTS)[1:]
        point = [curve[0] for curve in _trace(ranked, np.ones((n_groups, 1)), at)]
        step = max(1, _CELLS // len(y))
        parts = [
            _trace(ranked, weights[:, start : start + step], at) for start in range(0, drawn, step)
        ]
        low, high = _band(point[0], [part[0] for part in parts], effective)
        if low is not None and high is not None:  # a sensitivity never falls, so neither do these
            low, high = np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]
        roc = {"fpr": at[0], "sensitivity": point[0], "low": low, "high": high}
        low, high = _band(point[1], [part[1] for part in parts], effective)
        recall = {"recall": at[1], "precision": point[1], "low": low, "high": high}
        classes[name] = {"roc": _rounded(roc), "precision_recall": _rounded(recall)}
    unit = "images" if groups is None else "groups"
    return {"classes": classes, "unit": unit, "n_resamples": drawn}


def choose_thresholds(
    labels: ArrayLike, probabilities: ArrayLike, class_names: Sequence[str]
) -> dict[str, float | None]:
    """Threshold on the probability of each class, by `RULE`, on images that are not measured.

    It lies midway between two scores; of equally good ones it is the one of the highest
    sensitivity. `None` for a class without positives or without negatives.

    Args:
        labels: Class indices in 0 ... K-1, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        class_names: `[K]`.

    Raises:
        GloVLMError: An input has a wrong shape, range or length.
    """
    y, p = check_predictions(labels, probabilities)
    chosen: dict[str, float | None] = {}
    for c, name in enumerate(class_names):
        own = y == c
        if own.all() or not own.any():
            chosen[str(name)] = None
            continue
        scores = np.unique(p[:, c])[::-1]
        sure, rest = np.sort(p[own, c]), np.sort(p[~own, c])
        sensitivity = 1 - np.searchsorted(sure, scores, side="left") / len(sure)
        above = 1 - np.searchsorted(rest, scores, side="left") / len(rest)
        gain = sensitivity - above
        best = int(np.flatnonzero(gain >= gain.max() - 1e-12)[-1])
        lower = scores[best + 1] if best + 1 < len(scores) else 0.0
        chosen[str(name)] = float((scores[best] + lower) / 2)
    return chosen


def measure_thresholds(
    labels: ArrayLike,
    probabilities: ArrayLike,
    thresholds: Mapping[str, float | None],
    *,
    groups: Sequence[str] | None = None,
    class_names: Sequence[str],
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Sensitivity and specificity of every class at its threshold, with intervals over groups.

    An image counts as of a class where its probability is the threshold or more: each class is
    asked for alone, so an image may count as of several or of none.

    Args:
        labels: Class indices in 0 ... K-1, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        thresholds: Of each class, see `choose_thresholds`.
        groups: Patient, case or slide of each image, `[n]`; by default each is its own.
        class_names: `[K]`.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        Class -> `threshold`, `sensitivity` and `specificity` (each `value`, `ci95`, `note`,
        `undefined_resamples`).

    Raises:
        GloVLMError: An input has a wrong shape, range or length, or a class has no threshold.
    """
    y, p = check_predictions(labels, probabilities)
    if missing := [name for name in class_names if name not in thresholds]:
        raise GloVLMError(f"Expected a threshold (or None) for every class, found none: {missing}.")
    group, n_groups = _number_groups(groups, len(y))
    weights = _draw_groups(n_groups, n_resamples, seed)
    rows: dict[str, Any] = {}
    for c, name in enumerate(class_names):
        threshold = thresholds[name]
        own, above = y == c, p[:, c] >= (np.inf if threshold is None else threshold)
        sides = {"sensitivity": (own, above), "specificity": (~own, ~above)}
        rows[name] = {"threshold": threshold} | {
            key: _fraction(among, right & among, group, weights, known=threshold is not None)
            for key, (among, right) in sides.items()
        }
    return rows


def count_by_group(
    labels: ArrayLike, probabilities: ArrayLike, groups: Sequence[str]
) -> list[dict[str, int]]:
    """Images and right ones of every group, without its name: the groups of the most errors first.

    Args:
        labels: Class indices in 0 ... K-1, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        groups: Patient, case or slide of each image, `[n]`.

    Returns:
        Rows `n` and `right`, by ascending share of right images, then by descending `n`.
    """
    y, p = check_predictions(labels, probabilities)
    group, n_groups = _number_groups(groups, len(y))
    n = np.bincount(group, minlength=n_groups)
    right = np.bincount(group, weights=p.argmax(1) == y, minlength=n_groups).astype(int)
    pairs = sorted(
        zip(n.tolist(), right.tolist(), strict=True), key=lambda of: (of[1] / of[0], -of[0])
    )
    return [{"n": total, "right": hits} for total, hits in pairs]


# ------------------------------------------------------------------------------- groups and curves


def _number_groups(groups: Sequence[str] | None, n: int) -> tuple[Ints, int]:
    """Number of each image's group, and how many groups there are."""
    if groups is None:
        return np.arange(n), n
    ids, group = np.unique(check_groups(groups, n), return_inverse=True)
    return group.astype(np.int64), len(ids)


def _draw_groups(n_groups: int, n_resamples: int, seed: int) -> Floats:
    """Multiplicities of groups that are drawn with replacement, `[G, R]`."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    return np.asarray(drawn.T, np.float64)


def _grid(n: int, most: int) -> Floats:
    """Rates that n images can take, from 0 to 1; evenly spaced ones where these are too many."""
    return np.arange(n + 1) / n if n <= most else np.linspace(0, 1, most + 1)


def _trace(
    ranked: tuple[Flags, Ints, Ints], weights: Floats, at: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Sensitivities at false positive rates and precisions at recalls, `[R, points]` each.

    Resamples without positives or without negatives are left out.

    Args:
        ranked: Whether the class is the image's and the number of its group, by descending score;
            where images of one score end.
        weights: Multiplicities of the groups, `[G, R]`.
        at: False positive rates, and recalls.
    """
    own, group, ends = ranked
    copies = weights[group]
    true, false = (np.cumsum(copies * side[:, None], axis=0)[ends] for side in (own, ~own))
    kept = (true[-1] > 0) & (false[-1] > 0)  # resamples with positives and negatives
    true, false = true.T[kept], false.T[kept]
    start = np.zeros((len(true), 1))
    tpr = np.hstack([start, true / true[:, -1:]])
    fpr = np.hstack([start, false / false[:, -1:]])
    left = _places(fpr, at[0], "right") - 1
    right = np.minimum(left + 1, fpr.shape[1] - 1)
    before, after = (np.take_along_axis(fpr, i, 1) for i in (left, right))
    low, high = (np.take_along_axis(tpr, i, 1) for i in (left, right))
    width = np.where(after > before, after - before, 1.0)
    first = _places(tpr[:, 1:], at[1] - 1e-12, "left")
    hits, alarms = (np.take_along_axis(side, first, 1) for side in (true, false))
    return low + (at[0] - before) / width * (high - low), hits / (hits + alarms)


def _places(rows: Floats, at: Floats, side: Literal["left", "right"]) -> Ints:
    """`np.searchsorted` of the same values, in 0 ... 1, in every ascending row: `[R, points]`."""
    apart = 2.0 * np.arange(len(rows))[:, None]  # one ascending row of all of them
    places = np.searchsorted((rows + apart).ravel(), (at + apart).ravel(), side=side)
    before = rows.shape[1] * np.arange(len(rows))[:, None]
    return np.asarray(places.reshape(len(rows), len(at)) - before, np.int64)


def _band(
    curve: Floats, parts: Sequence[Floats], effective: float
) -> tuple[Floats | None, Floats | None]:
    """Lower and upper bounds of a curve, pointwise 95%; `None` where there is no resample."""
    drawn = np.concatenate(parts) if parts else np.empty((0, len(curve)))
    return intervals.fraction_band(curve, drawn, effective) if len(drawn) else (None, None)


def _rounded(values: Mapping[str, Floats | None]) -> dict[str, list[float] | None]:
    return {
        name: None if part is None else np.round(part, _DECIMALS).tolist()
        for name, part in values.items()
    }


def _fraction(
    among: Flags, right: Flags, group: Ints, weights: Floats, *, known: bool
) -> dict[str, Any]:
    """Share of right images, with its interval over groups, as metrics have it."""
    n_groups, n_resamples = weights.shape
    held = np.bincount(group[among], minlength=n_groups).astype(np.float64)
    if not known or not held.sum():
        note = "undefined on these labels" if known else "no threshold: no image to choose it on"
        return {"value": None, "ci95": None, "note": note, "undefined_resamples": n_resamples}
    hits = np.bincount(group[right], minlength=n_groups)
    total = held @ weights
    drawn = (hits @ weights)[total > 0] / total[total > 0]
    value = float(hits.sum() / held.sum())
    effective = intervals.count_effective_groups(held / held.sum())
    ci95 = list(intervals.fraction_interval(value, drawn, effective)) if len(drawn) else None
    few = "too few groups" if n_groups < 10 or (held > 0).sum() < 5 else ""
    lost = int(n_resamples - len(drawn))
    return {"value": value, "ci95": ci95, "note": few, "undefined_resamples": lost}
