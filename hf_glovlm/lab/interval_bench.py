"""How often the intervals over groups hold the true value: simulated cohorts whose truth is known.

A cohort has groups of unequal size (log-normal, 12 images on average) and unequal class mixture.
Every score of an image is noise of variance 1, plus a shift that all images of the group share, and
for the image's class a signal that the group shifts too; probabilities are the softmax. The signal
is chosen so that a metric has the true value that is asked for, which is then measured on a
population of many more groups.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ..errors import GloVLMError
from ..metrics import PairedRun, compute_metrics, paired_differences

Row = dict[str, Any]
Floats = NDArray[np.float64]

GROUPS = (8, 10, 20, 40)
VALUES = (0.6, 0.7, 0.8, 0.9, 0.95)
CLASSES = (2, 5)
SHIFT = 0.6  # standard deviation of what a group's images share: a quarter of a score's variance
MEAN_SIZE, SIZE_SPREAD = 12, 0.7  # images a group, and their coefficient of variation
POPULATION = 5_000
# The metric whose true value is set, and those that are measured on the same cohorts.
TUNED = {
    "balanced_accuracy": (
        *("accuracy", "balanced_accuracy", "macro_f1"),
        *("brier", "boundary_margin", "alignment", "similarity_gap"),
        *("auprc", "nll", "quadratic_kappa"),
    ),
    "macro_auc": ("macro_auc",),
}
# Paired runs: draws, the share of groups each tests, and how method b differs from a.
DRAWS, TESTED, GAIN, DRAW_SPREAD, GROUP_SPREAD = 5, 0.7, 0.25, 0.15, 0.3


class Cohort:
    """A cohort of images in groups, whose scores can be given any signal.

    Args:
        rng: Draws it.
        n_groups: Groups.
        n_classes: Classes.
        shift: Standard deviation of what the images of a group share.
    """

    def __init__(
        self, rng: np.random.Generator, n_groups: int, n_classes: int, shift: float = SHIFT
    ) -> None:
        spread = np.log1p(SIZE_SPREAD**2)
        sizes = MEAN_SIZE * np.exp(rng.normal(-spread / 2, spread**0.5, size=n_groups))
        self.group = np.repeat(np.arange(n_groups), np.maximum(1, np.round(sizes)).astype(int))
        n = len(self.group)
        mixture = rng.dirichlet(np.full(n_classes, 4.0), size=n_groups).cumsum(1)[self.group]
        self.labels = np.minimum((rng.random((n, 1)) > mixture).sum(1), n_classes - 1)
        shared = shift * rng.normal(size=(n_groups, n_classes + 1))[self.group]
        self.scores = rng.normal(size=(n, n_classes)) + shared[:, :-1]
        self.own = shared[:, -1]  # how much easier the group is

    def with_signal(self, signal: float | Floats) -> Floats:
        """Scores `[n, K]`, the signal (of all, or of each image) in the image's class."""
        scores = self.scores.copy()
        scores[np.arange(len(scores)), self.labels] += signal + self.own
        return scores


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _measure(cohort: Cohort, signal: float, n_resamples: int = 0) -> dict[str, Any]:
    scores = cohort.with_signal(signal)
    measured: dict[str, Any] = compute_metrics(
        cohort.labels,
        _softmax(scores),
        groups=[f"{g:06}" for g in cohort.group] if n_resamples else None,
        similarities=np.clip(0.25 + 0.02 * scores, -1, 1),
        grades=range(scores.shape[1]),
        n_resamples=n_resamples,
    )["metrics"]
    return measured


@cache
def _signal(metric: str, value: float, n_classes: int, shift: float) -> float:
    """The signal at which a metric has a value in a large cohort, by bisection."""
    cohort = Cohort(np.random.default_rng(0), POPULATION // 5, n_classes, shift)
    low, high = -2.0, 10.0
    for _ in range(12):
        middle = (low + high) / 2
        if _measure(cohort, middle)[metric]["value"] < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@cache
def _population(n_classes: int, shift: float) -> Cohort:
    return Cohort(np.random.default_rng(1), POPULATION, n_classes, shift)


def _draw(rng: np.random.Generator, n_groups: int, n_classes: int, shift: float) -> Cohort:
    while True:  # a mean over the classes present is another quantity where one is absent
        cohort = Cohort(rng, n_groups, n_classes, shift)
        if len(np.unique(cohort.labels)) == n_classes:
            return cohort


def _row(
    metric: str, n_groups: int, value: float, truths: Sequence[float], bounds: Sequence[Any]
) -> Row:
    """Coverage of intervals `[low, high]`, each of a cohort with a truth of its own."""
    low, high = np.array(bounds, np.float64).T
    truth = np.array(truths)
    return {
        "metric": metric,
        "groups": n_groups,
        "value": value,
        "true": round(float(truth.mean()), 3),
        "cohorts": len(truth),
        "coverage": float(((low <= truth) & (truth <= high)).mean()),
        "too_low": float((high < truth).mean()),
        "too_high": float((low > truth).mean()),
        "width": float((high - low).mean()),
    }


def bench_intervals(
    *,
    cohorts: int = 2000,
    groups: Sequence[int] = GROUPS,
    values: Sequence[float] = VALUES,
    shift: float = SHIFT,
    n_resamples: int = 400,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Coverage of the 95% intervals of `compute_metrics` and `paired_differences`.

    Args:
        cohorts: Cohorts of each number of groups and each true value; half have 2 classes and half
            have 5.
        groups: Numbers of groups.
        values: True values of balanced accuracy (and so of accuracy) and of macro-AUC.
        shift: Standard deviation of what the images of a group share, beside noise of 1.
        n_resamples: Of each bootstrap; its standard error is all that is used.
        seed: Of the cohorts.
        on_row: Called with each row.

    Returns:
        Rows `metric`, `groups`, `value` (asked for), `true` (of the metric), `cohorts`,
        `coverage`, `too_low` and `too_high` (intervals on that side of the truth), `width`. Rows
        of differences between two methods are called `macro_auc, difference` and so on.

    Raises:
        GloVLMError: There is no cohort, or a cohort of fewer than two groups.
    """
    if cohorts < len(CLASSES) or min(groups, default=0) < 2:
        raise GloVLMError(
            f"Expected {len(CLASSES)} cohorts or more, of two groups or more; found {cohorts} and "
            f"{list(groups)}."
        )
    rows: list[Row] = []

    def add(new: Sequence[Row]) -> None:
        rows.extend(new)
        for row in new if on_row else ():
            on_row(row)  # type: ignore[misc]

    for n_groups in groups:
        for value in values:
            for tuned in TUNED:
                rng = np.random.default_rng([seed, n_groups, round(1000 * value), len(tuned)])
                add(_of_metrics(rng, cohorts, n_groups, tuned, value, shift, n_resamples))
        rng = np.random.default_rng([seed, n_groups])
        add(_of_differences(rng, cohorts, n_groups, shift, n_resamples))
    return rows


def _of_metrics(
    rng: np.random.Generator,
    cohorts: int,
    n_groups: int,
    tuned: str,
    value: float,
    shift: float,
    n_resamples: int,
) -> list[Row]:
    truths: dict[str, list[float]] = {name: [] for name in TUNED[tuned]}
    bounds: dict[str, list[Any]] = {name: [] for name in TUNED[tuned]}
    for n_classes in CLASSES:
        signal = _signal(tuned, value, n_classes, shift)
        true = _measure(_population(n_classes, shift), signal)
        for _ in range(cohorts // len(CLASSES)):
            measured = _measure(_draw(rng, n_groups, n_classes, shift), signal, n_resamples)
            for name in TUNED[tuned]:
                truths[name].append(true[name]["value"])
                bounds[name].append(measured[name]["ci95"])
    return [_row(name, n_groups, value, truths[name], bounds[name]) for name in TUNED[tuned]]


def _of_differences(
    rng: np.random.Generator, cohorts: int, n_groups: int, shift: float, n_resamples: int
) -> list[Row]:
    """Method b is better than a by an amount that draws and groups change; draws share groups."""
    names = ("balanced_accuracy", "macro_auc")
    truths: dict[str, list[float]] = {name: [] for name in names}
    bounds: dict[str, list[Any]] = {name: [] for name in names}
    for n_classes in CLASSES:
        signal = _signal("balanced_accuracy", 0.8, n_classes, shift)
        true = _true_differences(n_classes, shift, signal)
        for _ in range(cohorts // len(CLASSES)):
            cohort = _draw(rng, n_groups, n_classes, shift)
            runs = _paired_runs(rng, cohort, n_groups, signal)
            measured = paired_differences(runs, names, n_resamples=n_resamples)
            for name in names:
                truths[name].append(true[name])
                bounds[name].append(measured[name]["ci95"])
    rows = (_row(f"{n}, difference", n_groups, 0.8, truths[n], bounds[n]) for n in names)
    return list(rows)


def _paired_runs(
    rng: np.random.Generator, cohort: Cohort, n_groups: int, signal: float
) -> list[PairedRun]:
    by_group = GROUP_SPREAD * rng.normal(size=n_groups)[cohort.group]
    runs = []
    for draw in range(DRAWS):
        tested = rng.permutation(n_groups)[: max(2, round(TESTED * n_groups))]
        rows = np.flatnonzero(np.isin(cohort.group, tested))
        gain = GAIN + DRAW_SPREAD * rng.normal()
        a, b = cohort.with_signal(signal), cohort.with_signal(signal + gain + by_group)
        b += 0.5 * rng.normal(size=b.shape)
        labels, ids = cohort.labels[rows], [f"{g:06}" for g in cohort.group[rows]]
        runs.append(PairedRun(draw, labels, ids, _softmax(a[rows]), _softmax(b[rows])))
    return runs


@cache
def _true_differences(n_classes: int, shift: float, signal: float) -> dict[str, float]:
    rng = np.random.default_rng(2)
    cohort = _population(n_classes, shift)
    by_group = GROUP_SPREAD * rng.normal(size=POPULATION)[cohort.group]
    noise = 0.5 * rng.normal(size=cohort.scores.shape)
    names, steps = ("balanced_accuracy", "macro_auc"), 5
    sums = dict.fromkeys(names, 0.0)
    plain = compute_metrics(cohort.labels, _softmax(cohort.with_signal(signal)), n_resamples=0)[
        "metrics"
    ]
    for quantile in (np.arange(steps) + 0.5) / steps:
        gain = GAIN + DRAW_SPREAD * float(ndtri(quantile))
        scores = cohort.with_signal(signal + gain + by_group) + noise
        better = compute_metrics(cohort.labels, _softmax(scores), n_resamples=0)["metrics"]
        for name in names:
            sums[name] += (better[name]["value"] - plain[name]["value"]) / steps
    return sums


def summarise_coverage(rows: Sequence[Row]) -> list[Row]:
    """One row a metric and number of groups: the coverage at each true value, and the least.

    Args:
        rows: Of `bench_intervals`.

    Returns:
        Rows `metric`, `groups`, a column a value, `least`, `width` (the mean).
    """
    summary: dict[tuple[str, int], Row] = {}
    values = dict.fromkeys(f"{value:g}" for value in sorted({row["value"] for row in rows}))
    for row in rows:
        key = row["metric"], row["groups"]
        entry = summary.setdefault(key, {"metric": key[0], "groups": key[1], **values})
        entry[f"{row['value']:g}"] = round(row["coverage"], 3)
    for key, entry in summary.items():
        of = [row for row in rows if (row["metric"], row["groups"]) == key]
        entry["least"] = round(min(row["coverage"] for row in of), 3)
        entry["width"] = round(float(np.mean([row["width"] for row in of])), 3)
    return sorted(summary.values(), key=lambda entry: (entry["metric"], entry["groups"]))
