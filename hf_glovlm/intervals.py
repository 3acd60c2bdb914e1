"""Confidence intervals over groups: a t interval from the spread of a bootstrap that draws groups.

The percentiles of such a bootstrap are too narrow where groups are few: they know neither that the
spread of G values is estimated with G - 1 degrees of freedom, nor that a sample near 1 is likely to
have missed the groups in which the errors lie. So only the standard error is the bootstrap's. The
quantile is Student's, with as many degrees of freedom as there are groups of equal size that would
say as much, and what lies between 0 and 1 has its interval on the scale of log-odds. How often it
covers is measured by `lab.interval_bench`; docs/intervals.md has the table.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, expit, logit, stdtr, stdtrit

__all__ = [
    "LEVEL",
    "METHOD",
    "SCALES",
    "count_effective_groups",
    "fraction_interval",
    "loss_interval",
    "mean_interval",
    "no_difference",
]

Floats = NDArray[np.float64]

LEVEL = 0.95
METHOD = "95% t"
# Groups that say nothing but that groups differ as much as they can, put beside those there are.
PRIOR_GROUPS = 0.05
_TAIL = (1 - LEVEL) / 2
_NO_SPREAD = 1e-12  # a standard error of rounding


def count_effective_groups(shares: ArrayLike) -> float:
    """Effective number of groups (Kish 1965): `1 / sum of squared shares`, 1 to G.

    As many groups of one size say as much about the spread between groups.

    Args:
        shares: Weight of each group in the value, `[G]`, of sum 1.
    """
    weights = np.asarray(shares, np.float64)
    return float(1 / np.square(weights).sum())


def fraction_interval(
    value: float,
    resampled: ArrayLike,
    groups: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """95% interval of a value between two bounds, such as an accuracy or an area under a curve.

    With the value as a fraction v of its range, n groups and the bootstrap's variance s of v, the
    interval is `logit(v) +- t[n - 1] sqrt(u) / (v (1 - v))`, where `s n / (n - 1)` is the unbiased
    variance and u leans from it towards `v (1 - v) / n`, that of groups each wholly right or
    wholly wrong: the weights are `n - 1` and `PRIOR_GROUPS`. Where all groups agree, nothing is
    known of their spread, and every group counts as one trial (Clopper and Pearson 1934; the rule
    of three): eight groups without an error are 0.63 to 1.

    Args:
        value: The value.
        resampled: Values under resampled groups, `[R]`, defined ones only.
        groups: Effective number of groups; of one group alone the interval is the whole range.
        bounds: Lowest and highest value.

    Returns:
        Lower and upper bound, inside `bounds`, `value` between them.
    """
    low, high = bounds
    v = min(max((value - low) / (high - low), 0.0), 1.0)
    if groups <= 1 + 1e-9:
        return bounds
    spread = float(np.std(np.asarray(resampled, np.float64))) / (high - low)
    if spread <= _NO_SPREAD or v in (0.0, 1.0):
        ends = (
            float(betaincinv(groups * v, groups * (1 - v) + 1, _TAIL)) if v > 0 else 0.0,
            float(betaincinv(groups * v + 1, groups * (1 - v), 1 - _TAIL)) if v < 1 else 1.0,
        )
    else:
        most = v * (1 - v)
        variance = spread**2 * groups + PRIOR_GROUPS * most / groups
        error = np.sqrt(variance / (groups - 1 + PRIOR_GROUPS)) / most
        half = float(stdtrit(groups - 1, 1 - _TAIL)) * error
        ends = float(expit(logit(v) - half)), float(expit(logit(v) + half))
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def loss_interval(
    value: float,
    resampled: ArrayLike,
    groups: float,
    bounds: tuple[float, float] = (0.0, np.inf),
) -> tuple[float, float]:
    """95% interval of a mean negative log-likelihood x: that of the likelihood `exp(-x)`.

    A few images that are surely wrong make the distribution of x skew, and an interval on its own
    scale ends too low. `exp(-x)`, the geometric mean of the right classes' probabilities, is a
    fraction; see `fraction_interval`.

    Args:
        value: x, 0 or more.
        resampled: Of resampled groups, `[R]`, defined ones only.
        groups: Effective number of groups.
        bounds: The interval is cut there.
    """
    likelihoods = np.exp(-np.asarray(resampled, np.float64))
    low, high = fraction_interval(float(np.exp(-value)), likelihoods, groups)
    with np.errstate(divide="ignore"):
        ends = -np.log([high, low])
    return max(float(ends[0]), bounds[0]), min(float(ends[1]), bounds[1])


def fraction_band(values: Floats, resampled: Floats, groups: float) -> tuple[Floats, Floats]:
    """95% intervals of many values between 0 and 1 at once, each as `fraction_interval` makes it.

    Args:
        values: The values, `[n]`.
        resampled: Values under resampled groups, `[R, n]`, defined ones only.
        groups: Effective number of groups.

    Returns:
        Lower and upper bounds, `[n]` each.
    """
    v = values.clip(0, 1)
    if groups <= 1 + 1e-9:
        return np.zeros_like(v), np.ones_like(v)
    spread = resampled.std(0)
    plain = (spread > _NO_SPREAD) & (v > 0) & (v < 1)
    low, high = np.zeros_like(v), np.ones_like(v)
    some, own = v > 0, v[plain]
    low[some] = betaincinv(groups * v[some], groups * (1 - v[some]) + 1, _TAIL)
    some = v < 1
    high[some] = betaincinv(groups * v[some] + 1, groups * (1 - v[some]), 1 - _TAIL)
    most = own * (1 - own)
    variance = spread[plain] ** 2 * groups + PRIOR_GROUPS * most / groups
    half = stdtrit(groups - 1, 1 - _TAIL) * np.sqrt(variance / (groups - 1 + PRIOR_GROUPS)) / most
    low[plain], high[plain] = expit(logit(own) - half), expit(logit(own) + half)
    return low, high


def mean_interval(
    value: float,
    resampled: ArrayLike,
    groups: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[float, float]:
    """95% interval of a mean or a difference, symmetric: `value +- t[n - 1] s sqrt(n / (n - 1))`.

    Args:
        value: The value.
        resampled: Values under resampled groups, `[R]`, defined ones only.
        groups: Effective number n of groups; of one group alone the interval is the whole range.
        bounds: The interval is cut there.

    Returns:
        Lower and upper bound; both are the value where groups do not differ.
    """
    if groups <= 1 + 1e-9:
        return bounds
    spread = float(np.std(np.asarray(resampled, np.float64)))
    half = float(stdtrit(groups - 1, 1 - _TAIL)) * spread * np.sqrt(groups / (groups - 1))
    return max(value - half, bounds[0]), min(value + half, bounds[1])


def no_difference(value: float, resampled: ArrayLike, groups: float) -> float | None:
    """Two-sided p-value of no difference, by the Student distribution of `mean_interval`.

    It is below .05 where that interval excludes 0. Where groups do not differ at all, nothing is
    known of their spread, and each counts as one that has the same sign: `2 / 2^n` (sign test).

    Args:
        value: The mean difference.
        resampled: Differences under resampled groups, `[R]`, defined ones only.
        groups: Effective number n of groups.

    Returns:
        The p-value; `None` of one group alone.
    """
    if groups <= 1 + 1e-9:
        return None
    if value == 0:
        return 1.0
    error = float(np.std(np.asarray(resampled, np.float64))) * np.sqrt(groups / (groups - 1))
    if error <= _NO_SPREAD:
        return float(2.0 ** (1 - groups))
    return float(2 * stdtr(groups - 1, -abs(value) / error))


SCALES = {"log-odds": fraction_interval, "plain": mean_interval, "likelihood": loss_interval}
