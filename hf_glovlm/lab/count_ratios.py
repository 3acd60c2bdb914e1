"""Ratios of counts over label draws, with intervals over groups.

Precision, recall and F1 are ratios of counts: within a draw the counts of all pictures are added
up, then divided, and the ratio is averaged over draws. The interval is a bootstrap over groups
crossed with draws, as `metrics.paired_differences` has it for metrics of probabilities: a resample
draws groups, whose pictures then count so many times in every draw, and draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..intervals import count_effective_groups, fraction_interval, mean_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CountedRun:
    """Counts on the test side of one draw.

    Attributes:
        draw: Number of the draw.
        groups: Patient or slide of each picture, `[n]`.
        counts: Numerator and denominator of each picture's part in the ratio, `[n, 2]`.
    """

    draw: int
    groups: Sequence[str]
    counts: Floats


def mean_ratio(
    runs: Sequence[CountedRun], *, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Mean over draws of a ratio in 0 ... 1, with its 95% interval over groups.

    Args:
        runs: One a draw.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        `value`, `ci95`, `sd` over draws, `n_groups`, `n_draws` (those in which the ratio is
        defined); the first three `None` where they are undefined.

    Raises:
        GloVLMError: A draw comes twice, or there is none.
    """
    union, sums = _sum_groups(runs)
    points = _ratios(sums, np.ones((len(union), 1)))[:, 0]
    defined = points[~np.isnan(points)]
    result: dict[str, Any] = {"value": None, "ci95": None, "sd": None}
    if len(defined):
        resampled = _resample(sums, n_resamples, seed)
        groups = count_effective_groups(_shares(sums))
        value = float(defined.mean())
        result["value"] = value
        result["ci95"] = list(fraction_interval(value, resampled, groups))
        result["sd"] = float(defined.std(ddof=1)) if len(defined) > 1 else None
    return result | {"n_groups": _holding(sums), "n_draws": len(defined)}


def paired_ratio(
    before: Sequence[CountedRun],
    after: Sequence[CountedRun],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean over draws of a ratio's gain, with its 95% interval over groups.

    Args:
        before: One run a draw.
        after: The same draws in the same order; their pictures are of the same groups.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        `value`, `ci95`, `sd`, `n_groups`, `n_draws`, as `mean_ratio`.

    Raises:
        GloVLMError: The runs are not paired, a draw comes twice, or there is none.
    """
    if [run.draw for run in before] != [run.draw for run in after] or any(
        set(a.groups) != set(b.groups) for a, b in zip(before, after, strict=True)
    ):
        raise GloVLMError("Expected runs on the same draws and groups, in one order.")
    (union, first), (_, second) = _sum_groups(before), _sum_groups(after)
    ones = np.ones((len(union), 1))
    points = (_ratios(second, ones) - _ratios(first, ones))[:, 0]
    defined = points[~np.isnan(points)]
    result: dict[str, Any] = {"value": None, "ci95": None, "sd": None}
    if len(defined):
        resampled = _resample(second, n_resamples, seed, first)
        groups = count_effective_groups((_shares(first) + _shares(second)) / 2)
        value = float(defined.mean())
        result["value"] = value
        result["ci95"] = list(mean_interval(value, resampled, groups, (-1.0, 1.0)))
        result["sd"] = float(defined.std(ddof=1)) if len(defined) > 1 else None
    return result | {"n_groups": _holding(first + second), "n_draws": len(defined)}


def _sum_groups(runs: Sequence[CountedRun]) -> tuple[NDArray[np.str_], Floats]:
    """Groups of all draws `[G]`, and sums `[draws, G, 2]`."""
    if not runs or len({run.draw for run in runs}) < len(runs):
        raise GloVLMError("Expected one run for each of some draws, found none, or a draw twice.")
    union = np.unique(np.concatenate([np.asarray(run.groups, np.str_) for run in runs]))
    sums = np.zeros((len(runs), len(union), 2))
    for run, of in zip(runs, sums, strict=True):
        np.add.at(of, np.searchsorted(union, np.asarray(run.groups, np.str_)), run.counts)
    return union, sums


def _ratios(sums: Floats, weights: Floats) -> Floats:
    """Ratio of each draw under weights `[G, R]` of groups: `[draws, R]`, NaN where undefined."""
    top, bottom = np.moveaxis(np.einsum("dgk,gr->dkr", sums, weights), 1, 0)
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def _resample(sums: Floats, size: int, seed: int, minus: Floats | None = None) -> Floats:
    """Means over drawn draws under drawn groups, those that are defined."""
    rng = np.random.default_rng(seed)
    times, weights = (draw_copies(rng, n, size) for n in sums.shape[:2])
    ratios = _ratios(sums, weights)
    if minus is not None:
        ratios = ratios - _ratios(minus, weights)
    times = np.where(np.isnan(ratios), 0, times)
    total, defined = (np.nan_to_num(ratios) * times).sum(0), times.sum(0)
    means: Floats = total[defined > 0] / defined[defined > 0]
    return means


def draw_copies(rng: np.random.Generator, n: int, size: int) -> Floats:
    """How often each of n things comes where n are drawn with replacement: `[n, size]`."""
    return rng.multinomial(n, np.full(n, 1 / n), size=size).T.astype(np.float64)


def _shares(sums: Floats) -> Floats:
    """Mean share of each group in the denominator, `[G]`, of sum 1."""
    bottom = sums[..., 1]
    held = bottom[bottom.sum(1) > 0]
    shares: Floats = (held / held.sum(1, keepdims=True)).mean(0)
    return shares


def _holding(sums: Floats) -> int:
    """Groups that are in the denominator of some draw."""
    return int((sums[..., 1].sum(0) > 0).sum())
