"""Percentage of a class on a slide from a few labels of other slides: estimates, and their errors.

A classifier of one support reads the objects of one slide (`learn`, `read`); its estimates and
intervals of all slides and draws are compared with the slides' true percentages (`summarise`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..calibration import estimate_prior
from ..intervals import fraction_interval, mean_interval
from ..slides.counting import wilson_interval
from ..slides.prevalence import LIMIT, confusion_counts, estimate_fractions, informative_calls
from .outline_cells import choose_threshold, fit, left_out_probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ESTIMATES: dict[str, str] = {
    "counted": "calls of the class, counted",
    "youden": "counted from the threshold on at which sensitivity + specificity is largest on "
    "support slides left out",
    "keep_90": "counted from the highest threshold on that calls 90% of the class on support "
    "slides left out",
    "corrected": "share by the posterior, given the confusion matrix on support slides left out",
    "expected": "mean probability of the class",
    "em": "EM over the slide's unlabelled objects (transductive)",
}
THRESHOLDS = ("youden", "keep_90")


@dataclass(frozen=True)
class Learned:
    """Classifier of a support, and how it errs on support slides that were left out.

    Attributes:
        predict: From features `[m, dim]` to probabilities `[m, K]`.
        confusion: Counts `[K, K]` of the left-out calls, rows are labels.
        thresholds: Of the class in question, by rule; `None` where none could be chosen.
    """

    predict: Callable[[NDArray[Any]], Floats]
    confusion: Ints
    thresholds: Mapping[str, float | None]


@dataclass(frozen=True)
class Reading:
    """What a classifier says of the objects of one slide.

    Attributes:
        counts: Calls of each class `[K]`.
        confusion: Of the classifier, see `Learned`.
        percent: Per cent of the class by each of ESTIMATES that needs no posterior.
    """

    counts: Ints
    confusion: Ints
    percent: Mapping[str, float]


@dataclass(frozen=True)
class Percentages:
    """Estimates and intervals of one class, over slides and draws; `nan` without any object.

    Attributes:
        percent: By estimate, `[slides, draws]`.
        bounds: By kind of interval, lower and upper bound `[2, slides, draws]`: `wilson` around the
            counted percentage; `printed` as a sheet has it, by the posterior, else Wilson's.
        corrected: Where the calls say enough to be corrected, `[slides, draws]`.
    """

    percent: dict[str, Floats]
    bounds: dict[str, Floats]
    corrected: NDArray[np.bool_]


def learn(
    method: str,
    features: NDArray[Any],
    labels: Ints,
    groups: Sequence[str],
    rows: Ints,
    target: int,
    seed: int,
) -> Learned:
    """Fit a method on a support, and once more without each of its groups.

    Args:
        method: A method on features.
        features: `[n, dim]`.
        labels: Class numbers `[n]`.
        groups: Slide or patient of each row.
        rows: The support.
        target: Whose thresholds.
        seed: Of everything random in the method.
    """
    kept, p = left_out_probabilities(method, features, labels, groups, rows, seed)
    own = labels[kept]
    return Learned(
        fit(method, features, labels, rows, seed),
        confusion_counts(own, p.argmax(axis=1), int(labels.max()) + 1),
        {rule: choose_threshold(p[:, target], own == target, rule) for rule in THRESHOLDS},
    )


def read(learned: Learned, query: NDArray[Any], target: int) -> Reading | None:
    """Percentage of a class among the objects of a slide; `None` without any object.

    Args:
        learned: The classifier.
        query: Features of the objects `[m, dim]`.
        target: Whose percentage. A threshold that could not be chosen leaves the plain calls.
    """
    if not len(query):
        return None
    p = learned.predict(query)
    calls = p.argmax(axis=1)
    counted = float(np.mean(calls == target))
    percent = {
        "counted": counted,
        "expected": float(p[:, target].mean()),
        "em": float(estimate_prior(p).prior[target]),
    }
    for rule, limit in learned.thresholds.items():
        percent[rule] = counted if limit is None else float(np.mean(p[:, target] >= limit))
    counts = np.bincount(calls, minlength=p.shape[1])
    return Reading(counts, learned.confusion, {k: 100 * value for k, value in percent.items()})


def gather(
    readings: Sequence[Sequence[Reading | None]],
    target: int,
    *,
    recall: tuple[ArrayLike, ArrayLike] | None = None,
    seed: int = 0,
) -> Percentages:
    """Estimates and intervals of all readings, the posteriors at once.

    As in the results of `glovlm slide`, calls that say too little are not corrected: there the
    counted percentage stands, with Wilson's interval.

    Args:
        readings: `[slides][draws]`; `None` where a slide has no object.
        target: Whose percentage.
        recall: Objects of each class that a finder found where they are known, and of how many,
            each `[slides, draws, K]`; it enters the posterior.
        seed: Of the posterior's draws.
    """
    shape = len(readings), len(readings[0])
    flat = [reading for of_slide in readings for reading in of_slide]
    there = np.array([reading is not None for reading in flat])
    given = [reading for reading in flat if reading is not None]
    counts = np.stack([reading.counts for reading in given])
    tables = np.stack([reading.confusion for reading in given])
    if recall is not None:
        k = counts.shape[1]
        hits, of = (np.asarray(part, np.int64).reshape(-1, k)[there] for part in recall)
        posterior = estimate_fractions(counts, tables, recall=(hits, of), seed=seed)
    else:
        posterior = estimate_fractions(counts, tables, seed=seed)
    enough = np.array(
        [
            bool(table.any(axis=1).all() and informative_calls(table)[target] >= LIMIT)
            for table in tables
        ]
    )
    own = {
        name: np.array([reading.percent[name] for reading in given])
        for name in ESTIMATES
        if name != "corrected"
    }
    own["corrected"] = np.where(enough, 100 * posterior.share[:, target], own["counted"])
    wilson = 100 * np.array([wilson_interval(int(c[target]), int(c.sum())) for c in counts]).T
    by_posterior = 100 * np.stack([posterior.low[:, target], posterior.high[:, target]])

    def spread(values: Floats) -> Floats:
        everywhere = np.full((*values.shape[:-1], len(flat)), np.nan)
        everywhere[..., there] = values
        return everywhere.reshape(*values.shape[:-1], *shape)

    return Percentages(
        {name: spread(own[name]) for name in ESTIMATES},
        {"wilson": spread(wilson), "printed": spread(np.where(enough, by_posterior, wilson))},
        spread(enough.astype(np.float64)) == 1,
    )


# ------------------------------------------------------------------------------------- summaries


def crossed_mean(
    values: Floats, n_resamples: int, seed: int, *, of_fractions: bool = False
) -> dict[str, Any]:
    """Mean over slides and draws with its 95% interval, a bootstrap over slides crossed with draws.

    Args:
        values: `[slides, draws]`; `nan` is left out.
        n_resamples: Resamples.
        seed: Of the resamples.
        of_fractions: Whether the values are 0 or 1, and the mean a share.

    Returns:
        `value`, `ci95`.
    """
    n_slides, n_draws = values.shape
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    rng = np.random.default_rng(seed)
    slides = rng.multinomial(n_slides, np.full(n_slides, 1 / n_slides), size=n_resamples)
    draws = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=n_resamples)
    total, n = (((slides @ part) * draws).sum(axis=1) for part in (filled, known.astype(float)))
    resampled = total[n > 0] / n[n > 0]
    value = float(filled.sum() / known.sum())
    interval = fraction_interval if of_fractions else mean_interval
    return {"value": value, "ci95": list(interval(value, resampled, n_slides))}


def summarise(
    estimated: Percentages, truth: Floats, n_resamples: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Errors of estimates and coverage of intervals, in points, slides and draws weighing the same.

    Args:
        estimated: Estimates of every slide and draw.
        truth: Per cent of each slide `[slides]`.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        `estimates`: rows of `estimate`, `error` (mean absolute), `bias` (estimate minus truth),
        `against_counted` (its error minus that of counting, paired), each with `ci95`; `absent` and
        `present`: the mean absolute error on slides without and with the class, `None` where there
        are none. `intervals`: rows of `interval`, `coverage` with `ci95`, `width` in points,
        `corrected` (share of the evaluations in which the calls say enough).
    """
    true = truth[:, None]
    error = {name: np.abs(values - true) for name, values in estimated.percent.items()}
    mean = {name: crossed_mean(values, n_resamples, seed) for name, values in error.items()}
    sides = {"absent": truth == 0, "present": truth > 0}
    estimates = [
        {
            "estimate": name,
            "error": mean[name],
            "bias": crossed_mean(values - true, n_resamples, seed),
            "against_counted": crossed_mean(error[name] - error["counted"], n_resamples, seed),
            **{
                side: float(np.nanmean(error[name][rows])) if rows.any() else None
                for side, rows in sides.items()
            },
        }
        for name, values in estimated.percent.items()
    ]
    intervals = []
    for name, (low, high) in estimated.bounds.items():
        held = np.where(np.isnan(low), np.nan, (low - 1e-9 <= true) & (true <= high + 1e-9))
        intervals.append(
            {
                "interval": name,
                "coverage": crossed_mean(held, n_resamples, seed, of_fractions=True),
                "width": float(np.nanmean(high - low)),
                "corrected": float(estimated.corrected[~np.isnan(low)].mean()),
            }
        )
    return {"estimates": estimates, "intervals": intervals}
