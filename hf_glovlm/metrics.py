"""Classification metrics with bootstrap intervals over groups: arrays in, dict out.

A group is what was sampled, a patient, a case or a slide; its images are not independent. So every
interval is made (by `intervals`) from a bootstrap that draws groups with replacement and keeps all
images of a drawn group. A resample is a column of group multiplicities; the value is the same
computation with all multiplicities one, so that value and interval cannot drift apart.

Undefined is not zero. A mean over classes (balanced accuracy, macro-AUC, macro-F1) is undefined in
a resample where a class of the labels vanished, because the mean over the remaining classes is
another quantity. Such resamples are left out of the interval and counted.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_glovlm import intervals
from hf_glovlm.arrays import check_cosines, check_groups, check_labels, check_predictions
from hf_glovlm.errors import GloVLMError, nearest
from hf_glovlm.roc import (
    FEW_IMAGES,
    Ranks,
    compare_pairs,
    count_wins,
    is_counting_cheaper,
    rank_class,
    weigh_ranks,
)

__all__ = [
    "METRICS",
    "Metric",
    "PairedRun",
    "Resamples",
    "Sample",
    "compare_methods",
    "compute_metrics",
    "compute_subgroups",
    "evaluate_metric",
    "mean_of",
    "paired_differences",
    "recall_by_group",
    "summarise_draws",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ECE_BINS = 15
MIN_GROUPS = 10
MIN_GROUPS_PER_CLASS = 5
# Rows times resamples held at once: 8 MB an array, so that the whole stays far below 200 MB.
_CHUNK = 1_000_000
_KEPT = 8_000_000  # groups times resamples whose multiplicities are drawn once for all runs, 64 MB


@dataclass(eq=False)
class Sample:
    """Labelled predictions whose sums over groups are kept.

    Attributes:
        labels: Class indices, `[n]`.
        probabilities: `[n, K]`, rows sum to 1.
        group: Number of each image's group, `[n]` in 0 ... G-1.
        n_groups: G.
        similarities: Cosines of images and class texts, `[n, K]`, where there are some.
        n_resamples: How many weightings of the groups are to come.
        right: Whether the most probable class (the first one on a tie) is the label, `[n, 1]`.
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

    def __post_init__(self) -> None:
        top = self.probabilities.argmax(1)
        right = top == self.labels
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


PerImage = Callable[[Sample], Floats]
Statistic = Callable[[Resamples], Floats]


def mean_of(per_image: PerImage) -> Statistic:
    """The `function` of a metric that is the mean of a number per image, `[n]`."""
    return lambda resamples: resamples.total(per_image)[0] / resamples.n


def _bin_gaps(sample: Sample) -> Floats:
    """Accuracy minus confidence of each image, in the column of its confidence's bin."""
    confidence = sample.probabilities.max(1, keepdims=True)
    gaps: Floats = np.eye(ECE_BINS)[_bins(confidence[:, 0])] * (sample.right - confidence)
    return gaps


def _own_cosine(sample: Sample) -> Floats:
    assert sample.similarities is not None  # rows of similarities are left out without
    return np.take_along_axis(sample.similarities, sample.labels[:, None], axis=1)[:, 0]


def _cosine_gap(sample: Sample) -> Floats:
    assert sample.similarities is not None
    own, n_classes = _own_cosine(sample), sample.similarities.shape[1]
    gap: Floats = own - (sample.similarities.sum(1) - own) / (n_classes - 1)
    return gap


def _macro_f1(resamples: Resamples) -> Floats:
    # scikit-learn does so with labels=range(K), zero_division=0. Its default, labels=None, is the
    # mean over the classes in labels or predictions: an absent class does not count.
    hits, actual = resamples.hits, resamples.actual
    f1 = np.divide(2 * hits, actual + resamples.predicted, out=np.zeros_like(hits), where=hits > 0)
    vanished = (actual[resamples.present] == 0).any(0)
    return np.where(vanished, np.nan, f1.mean(0))


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`: all that is known of a metric, so that a row is all it takes to add one.

    Attributes:
        title: In tables.
        definition: In one sentence.
        higher_is_better: None where a metric describes and does not rank.
        function: From resamples to a value each, `[R]`, NaN where undefined; see also `mean_of`.
        bounds: The lowest and the highest value.
        interval: On `log-odds`, for a fraction of its range; on the `plain` scale; or `none`, where
            its bootstrap is biased. By default log-odds from 0 to 1, else plain.
        of_similarities: Whether it needs cosines of images and class texts; else it is left out.
        over_classes: Whether it is a mean over classes; its note then names those without labels.
        summarised: Whether the report of a study has a column for it.
        hub_name: What the Hub calls it, if otherwise.
    """

    title: str
    definition: str
    higher_is_better: bool | None
    function: Statistic
    bounds: tuple[float, float] = (0.0, 1.0)
    interval: Literal["log-odds", "plain", "none"] | None = None
    of_similarities: bool = False
    over_classes: bool = False
    summarised: bool = True
    hub_name: str | None = None

    @property
    def scale(self) -> Literal["log-odds", "plain", "none"]:
        """Scale of its interval, `interval` with the default filled in."""
        return self.interval or ("log-odds" if self.bounds == (0, 1) else "plain")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "Accuracy",
        "Fraction of images whose top class is right.",
        True,
        lambda r: r.hits.sum(0) / r.n,
        summarised=False,
    ),
    "balanced_accuracy": Metric(
        "Balanced accuracy",
        "Mean recall over the classes present in the labels.",
        True,
        lambda r: (r.hits / r.actual)[r.present].mean(0),
        over_classes=True,
    ),
    "macro_auc": Metric(
        "Macro-AUC",
        "Mean over the classes present in the labels of the one-vs-rest area under the ROC curve "
        "(Mann-Whitney; a tie counts one half).",
        True,
        lambda r: r.auc[r.present].mean(0),
        over_classes=True,
        hub_name="roc_auc",
    ),
    "macro_f1": Metric(
        "Macro-F1",
        "Mean F1 over all classes of the task; an absent class counts 0.",
        True,
        _macro_f1,
        over_classes=True,
        hub_name="f1",
    ),
    "ece": Metric(
        "ECE",
        "Calibration error of the top class over 15 equal bins (lower, upper].",
        False,
        lambda r: np.abs(r.total(_bin_gaps)).sum(0) / r.n,
        interval="none",
    ),
    "brier": Metric(
        "Brier",
        "Mean squared error summed over classes, 0 to 2.",
        False,
        mean_of(lambda sample: ((sample.probabilities - sample.one_hot) ** 2).sum(1)),
        bounds=(0.0, 2.0),
        interval="log-odds",
        summarised=False,
        hub_name="brier_score",
    ),
    "boundary_margin": Metric(
        "Boundary margin",
        "Mean of the largest minus the second largest probability.",
        None,
        mean_of(lambda sample: np.diff(np.partition(sample.probabilities, -2)[:, -2:])[:, 0]),
        summarised=False,
    ),
    "alignment": Metric(
        "Alignment",
        "Mean cosine of an image and the text of its class.",
        None,
        mean_of(_own_cosine),
        bounds=(-1.0, 1.0),
        of_similarities=True,
        summarised=False,
    ),
    "similarity_gap": Metric(
        "Similarity gap",
        "Alignment minus the mean cosine with the other classes.",
        None,
        mean_of(_cosine_gap),
        bounds=(-2.0, 2.0),
        of_similarities=True,
        summarised=False,
    ),
}
# What every class has beside its counts: functions to `[K, R]`, under keys that no metric has.
_PER_CLASS: dict[str, Statistic] = {
    "recall of a class": lambda r: r.hits / r.actual,
    "specificity of a class": lambda r: (r.n - r.actual - r.predicted + r.hits) / (r.n - r.actual),
    "auc of a class": lambda r: r.auc,
}


@dataclass(frozen=True, eq=False)
class PairedRun:
    """Paired run: two methods, `a` and `b`, on the test side of one label draw.

    Attributes:
        draw: Number of the label draw (episode).
        labels: Class indices, `[n]`.
        groups: Group of each image, `[n]`; the same id is the same group in every run.
        probabilities_a: `[n, K]`, rows sum to 1.
        probabilities_b: `[n, K]`, the same images in the same order.
    """

    draw: int
    labels: ArrayLike
    groups: Sequence[str]
    probabilities_a: ArrayLike
    probabilities_b: ArrayLike


def compute_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    similarities: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of one set of predictions, every number with its interval over groups.

    Args:
        labels: Class indices in 0 ... K-1, `[n]`.
        probabilities: `[n, K]`, finite, in [0, 1], rows sum to 1 within 1e-4.
        groups: Patient, case or slide of each image, `[n]`. Without it every image is its own
            group and each note says so: such intervals are too narrow.
        class_names: `[K]`; without it the class numbers.
        similarities: Cosines of images and class texts, `[n, K]`; adds `alignment` and
            `similarity_gap` (Glo-VLMs, arXiv 2511.11984).
        n_resamples: Bootstrap resamples; 0 gives values without intervals.
        seed: Seed of the bootstrap. With groups the order of the images does not matter.

    Returns:
        `metrics` (name -> `value`, `ci95`, `note`, `undefined_resamples`), `per_class` (class ->
        `recall`, `specificity`, `auc`, `n`, `groups`), `confusion_matrix` (rows are labels),
        `reliability` (ECE bins with counts), `prior` (class fractions of the labels), `threshold`,
        `n`, `n_groups`, `bootstrap`: plain Python values, None where a number is undefined. The
        predicted class is the argmax of the probabilities as given, the first one on a tie. The
        ECE has no interval: resampling overstates it.

    Raises:
        GloVLMError: If an input has a wrong shape, range or length.
    """
    y, p = check_predictions(labels, probabilities)
    cosines = None if similarities is None else check_cosines(similarities)
    if cosines is not None and cosines.shape != p.shape:
        raise GloVLMError(
            f"Expected similarities {p.shape}, one per probability, found {cosines.shape}."
        )
    names = [str(c) for c in (range(p.shape[1]) if class_names is None else class_names)]
    if len(names) != p.shape[1] or len(set(names)) < len(names):
        raise GloVLMError(f"Expected {p.shape[1]} different class names, found {names}.")
    if n_resamples < 0:
        raise GloVLMError(f"Expected n_resamples >= 0, found {n_resamples}: 2000 is usual.")
    ids = np.arange(len(y)) if groups is None else check_groups(groups, len(y))
    group_ids, group = np.unique(ids, return_inverse=True)
    n_groups = len(group_ids)
    sample = Sample(y, p, group, n_groups, cosines, n_resamples)
    rows = {k: row for k, row in METRICS.items() if cosines is not None or not row.of_similarities}
    functions = {name: row.function for name, row in rows.items()} | _PER_CLASS
    value = _statistics(functions, sample, np.ones((n_groups, 1)))
    drawn = {key: f for key, f in functions.items() if key not in rows or rows[key].scale != "none"}
    resampled = {key: np.empty((len(value[key]), n_resamples)) for key in drawn}
    rng = np.random.default_rng(seed)
    for columns, weights in _resamples(n_groups, n_resamples, len(y), rng):
        for key, statistic in _statistics(drawn, sample, weights).items():
            resampled[key][:, columns] = statistic

    actual, shares = sample.actual, sample.class_shares
    others = actual.sum(1, keepdims=True) - actual
    with np.errstate(invalid="ignore"):
        other_shares = others / others.sum(0)
    holders = (actual > 0).sum(0)  # groups with an image of the class
    other_holders = (others > 0).sum(0)  # groups with an image of another
    unknown = "intervals over images: groups unknown" if groups is None and n_resamples else ""

    def entry(key: str, at: int, share: Floats, holding: int, note: str = "") -> dict[str, Any]:
        point, row = float(value[key][at, 0]), rows.get(key)
        bounds, plain = (row.bounds, row.scale == "plain") if row else ((0.0, 1.0), False)
        if key not in resampled:
            absent = "no interval: resampling overstates it" if n_resamples else ""
            return _entry(point, np.empty(0), share, bounds, plain, note, absent)
        few = _few(n_groups, holding) if n_resamples else ""
        return _entry(point, resampled[key][at], share, bounds, plain, note, unknown, few)

    def of_class(key: str, at: int, share: Floats, holding: int) -> dict[str, Any]:
        return entry(f"{key} of a class", at, share, holding)

    counts = np.bincount(y, minlength=len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    macro_note = f"no image of {', '.join(missing)}" if missing else ""
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (y, p.argmax(1)), 1)
    return {
        "metrics": {
            name: entry(
                name,
                0,
                sample.shares(row.over_classes),
                holders.min(),
                macro_note if row.over_classes else "",
            )
            for name, row in rows.items()
        },
        "per_class": {
            name: {
                "recall": of_class("recall", c, shares[:, c], holders[c]),
                "specificity": of_class("specificity", c, other_shares[:, c], other_holders[c]),
                "auc": of_class(
                    "auc",
                    c,
                    (shares[:, c] + other_shares[:, c]) / 2,
                    min(holders[c], other_holders[c]),
                ),
                "n": int(counts[c]),
                "groups": int(holders[c]),
            }
            for c, name in enumerate(names)
        },
        "confusion_matrix": confusion.tolist(),
        "reliability": {"bins": _reliability(y, p)},
        "prior": {name: float(n / len(y)) for name, n in zip(names, counts, strict=True)},
        # k images per class imply a uniform prior, whatever the prior of the labels
        "threshold": "argmax, uniform prior",
        "n": len(y),
        "n_groups": n_groups,
        "bootstrap": {
            "unit": "images" if groups is None else "groups",
            "interval": intervals.METHOD,
            "n_resamples": n_resamples,
            "seed": seed,
            "note": unknown,
        },
    }


def compute_subgroups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    columns: Mapping[str, Sequence[Any]],
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Metrics within subgroups: the images of each stain, each scanner and so on alone.

    Args:
        labels: Class indices `[n]`.
        probabilities: `[n, K]`.
        columns: What to divide the images by, and the value of each image `[n]`; `None` is unknown,
            and such images are in no subgroup.
        **options: `groups`, `class_names`, `n_resamples`, `seed`, as `compute_metrics` takes them.

    Returns:
        Column -> value -> `n`, `n_groups`, `metrics`. A column with fewer than two known values
        divides nothing and is left out.

    Raises:
        GloVLMError: If an input has a wrong shape, range or length.
    """
    y, p = check_predictions(labels, probabilities)
    groups = options.pop("groups", None)
    subgroups: dict[str, dict[str, Any]] = {}
    for column, values in columns.items():
        if len(values) != len(y):
            raise GloVLMError(f"Expected {len(y)} values of '{column}', found {len(values)}.")
        known = sorted({str(value) for value in values if value is not None})
        for name in known if len(known) > 1 else ():
            rows = [i for i, value in enumerate(values) if value is not None and str(value) == name]
            held = None if groups is None else [groups[i] for i in rows]
            measured = compute_metrics(y[rows], p[rows], groups=held, **options)
            kept = {key: measured[key] for key in ("n", "n_groups", "metrics")}
            subgroups.setdefault(column, {})[name] = kept
    return subgroups


def paired_differences(
    runs: Sequence[PairedRun],
    metrics: Sequence[str] = ("macro_auc", "balanced_accuracy"),
    n_resamples: int = 2000,
    seed: int = 0,
    *,
    unit: str = "groups",
) -> dict[str, dict[str, Any]]:
    """Paired differences of methods `b` and `a`: a bootstrap over groups crossed with draws.

    Label draws redraw the same few groups, so their spread alone is no interval. Each resample
    draws groups (from the union over all runs) and draws, both with replacement; the group
    multiplicities weight the images inside each drawn run, and the difference b - a is averaged
    over the drawn runs in which it is defined.

    Args:
        runs: One `PairedRun` per draw; test sides may differ.
        metrics: Names in `METRICS` that rank methods and need no similarities.
        n_resamples: Bootstrap resamples, at least 1.
        seed: Seed of the bootstrap.
        unit: What a group is, in the plural, for the verdict (`"slides"`).

    Returns:
        Per metric `value` (mean of b - a over draws), `ci95`, `note`, `n_groups`, `n_draws`,
        `undefined_resamples` (no drawn run was defined), `undefined_runs` (drawn runs left out of
        a mean, over all resamples), and `verdict` on b: "better" or "worse" if the interval
        excludes 0, else "not distinguishable with N <unit>".

    Raises:
        GloVLMError: If there is no run, a draw comes twice, or an input is bad.
    """
    return compare_methods({"b": runs}, metrics, n_resamples, seed, unit=unit)["b"]


def compare_methods(
    methods: Mapping[str, Sequence[PairedRun]],
    metrics: Sequence[str] = ("macro_auc", "balanced_accuracy"),
    n_resamples: int = 2000,
    seed: int = 0,
    *,
    unit: str = "groups",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences of several methods from one: `paired_differences` of each, by its name.

    Methods whose runs hold the very same draws, labels, groups and probabilities of `a` (the same
    objects) are compared together: what is of `a` and of the resamples is computed once.

    Args:
        methods: The runs of each method `b`; the others as `paired_differences` takes them.
        metrics: Names in `METRICS`.
        n_resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        unit: What a group is, in the plural.

    Raises:
        GloVLMError: As `paired_differences`.
    """
    for name in metrics:
        if name not in METRICS:
            raise GloVLMError(f"Expected a metric, found '{name}'.{nearest(name, METRICS)}")
        if METRICS[name].higher_is_better is None:
            raise GloVLMError(f"Expected a metric that ranks methods, '{name}' only describes.")
        if METRICS[name].of_similarities:
            raise GloVLMError(f"Expected a metric of probabilities, '{name}' is one of cosines.")
        if METRICS[name].scale == "none":
            raise GloVLMError(
                f"Expected a metric that has an interval, '{name}' has none: its bootstrap is "
                "biased. Compare macro_auc, balanced_accuracy or brier."
            )
    alike: dict[Any, list[str]] = {}
    for name, runs in methods.items():
        if not runs or n_resamples < 1:
            given = f"{len(runs)} runs and {n_resamples} resamples"
            raise GloVLMError(f"Expected at least one run and one resample, found {given}.")
        if len({run.draw for run in runs}) < len(runs):
            raise GloVLMError("Expected one run per draw, found a draw twice: pass each draw once.")
        parts = ((id(r.labels), id(r.groups), id(r.probabilities_a), r.draw) for r in runs)
        alike.setdefault(tuple(parts), []).append(name)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for names in alike.values():
        same = [methods[name] for name in names]
        rows |= zip(names, _compare(same, metrics, n_resamples, seed, unit), strict=True)
    return {name: rows[name] for name in methods}


def _compare(
    methods: Sequence[Sequence[PairedRun]],
    metrics: Sequence[str],
    n_resamples: int,
    seed: int,
    unit: str,
) -> list[dict[str, dict[str, Any]]]:
    """`compare_methods` of runs that differ in the probabilities of b alone."""
    runs = methods[0]
    checked, known = [], dict[int, NDArray[np.str_]]()  # runs often share their groups
    for run, *others in zip(*methods, strict=True):
        given = (run.probabilities_a, run.probabilities_b, *(r.probabilities_b for r in others))
        pairs = [check_predictions(run.labels, p) for p in given]
        y, key = pairs[0][0], id(run.groups)
        if key not in known or len(known[key]) != len(y):
            known[key] = check_groups(run.groups, len(y))
        checked.append((y, [p for _, p in pairs]))
    n_classes = {p.shape[1] for _, tables in checked for p in tables}
    if len(n_classes) > 1:
        raise GloVLMError(f"Expected the same classes in all runs, found {n_classes} columns.")

    union = np.unique(np.concatenate(list(known.values())))
    held = np.zeros((len(union), n_classes.pop()), dtype=bool)
    shares = np.zeros((2, len(union)))  # of images, and as a mean over classes
    rng = np.random.default_rng(seed)
    drawn = _multiplicities(rng, len(runs), n_resamples)
    points = np.empty((len(methods), len(metrics), len(runs)))
    total, defined = np.zeros((2, len(methods), len(metrics), n_resamples))
    most = max(len(labels) for labels, *_ in checked)
    # run by run, so that the tables of one are held at a time; all runs share the groups drawn
    draw = partial(_resamples, len(union), n_resamples, most)
    kept = list(draw(rng)) if len(union) * n_resamples <= _KEPT else None
    numbers = {key: np.unique(ids, return_inverse=True) for key, ids in known.items()}
    for at, (y, tables) in enumerate(checked):
        own, group = numbers[id(runs[at].groups)]
        place = np.searchsorted(union, own)
        held[place[group], y] = True
        of_a, *of_b = (Sample(y, p, group, len(own), None, n_resamples) for p in tables)
        for over_classes in (False, True):
            shares[int(over_classes), place] += of_a.shares(over_classes) / len(runs)
        points[:, :, at] = _differences(of_a, of_b, metrics, np.ones((len(own), 1)))[:, :, 0]
        for columns, weights in kept or draw(deepcopy(rng)):
            weights = weights if len(own) == len(union) else weights[place]
            difference = _differences(of_a, of_b, metrics, weights)
            undefined = np.isnan(difference)
            times = np.where(undefined, 0, drawn[at, columns])
            total[:, :, columns] += np.where(undefined, 0, difference) * times
            defined[:, :, columns] += times
    resampled = np.divide(total, defined, out=np.full_like(total, np.nan), where=defined > 0)

    def entry(of: int, i: int, name: str) -> dict[str, Any]:
        spread = summarise_draws(points[of, i].tolist())
        lost = len(runs) - spread["n_draws"]
        low, high = METRICS[name].bounds
        row = _entry(
            np.nan if spread["mean"] is None else spread["mean"],
            resampled[of, i],
            shares[int(METRICS[name].over_classes)],
            (low - high, high - low),
            # at its very bound a difference has no spread, and every group is one trial
            METRICS[name].scale == "plain" or abs(spread["mean"] or 0) < high - low,
            f"undefined in {lost} of {len(runs)} draws" if lost else "",
            _few(len(union), held.sum(0).min()),
        )
        low, high = row["ci95"] or (0, 0)
        verdict = f"not distinguishable with {len(union)} {unit}"
        if low > 0 or high < 0:
            verdict = "better" if (low > 0) == METRICS[name].higher_is_better else "worse"
        return row | {
            "n_groups": len(union),
            "n_draws": len(runs),
            "undefined_runs": int(n_resamples * len(runs) - defined[of, i].sum()),
            "verdict": verdict,
        }

    return [
        {name: entry(of, i, name) for i, name in enumerate(metrics)} for of in range(len(methods))
    ]


def summarise_draws(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and spread of one metric over label draws: no interval, since groups are not redrawn.

    Args:
        values: One value per draw; None or NaN where the metric is undefined.

    Returns:
        `mean`, `sd` (n - 1; None for fewer than two values), `n_draws` (defined ones), `note`.

    Raises:
        GloVLMError: If there is no draw.
    """
    if len(values) == 0:
        raise GloVLMError("Expected the value of at least one draw, found none: run a draw first.")
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    kept = array[~np.isnan(array)]
    note = "spread over label draws, not an interval over groups"
    if len(kept) < len(array):
        note += f"; undefined in {len(array) - len(kept)} of {len(array)} draws"
    return {
        "mean": float(kept.mean()) if len(kept) else None,
        "sd": float(kept.std(ddof=1)) if len(kept) > 1 else None,
        "n_draws": len(kept),
        "note": note,
    }


def recall_by_group(
    labels: ArrayLike, predictions: ArrayLike, groups: Sequence[str], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Recall of every class inside every group that holds it.

    Args:
        labels: Class indices, `[n]`.
        predictions: Predicted class indices, `[n]`.
        groups: Group of each image, `[n]`.
        class_names: `[K]`.

    Returns:
        Rows `group`, `class`, `n`, `correct`, `recall`, sorted by group, then class. A class that
        a group does not hold has no recall there, so no row.

    Raises:
        GloVLMError: If lengths differ or a class index is out of range.
    """
    y = check_labels(labels, len(class_names), "labels")
    predicted = check_labels(predictions, len(class_names), "predictions")
    if len(predicted) != len(y):
        raise GloVLMError(f"Expected {len(y)} predictions, found {len(predicted)}: one per label.")
    ids, group = np.unique(check_groups(groups, len(y)), return_inverse=True)
    n, correct = np.zeros((2, len(ids), len(class_names)), dtype=np.int64)
    np.add.at(n, (group, y), 1)
    np.add.at(correct, (group, y), predicted == y)
    return [
        {
            "group": str(ids[g]),
            "class": class_names[c],
            "n": int(n[g, c]),
            "correct": int(correct[g, c]),
            "recall": float(correct[g, c] / n[g, c]),
        }
        for g, c in np.argwhere(n)
    ]


def evaluate_metric(name: str, **options: Any) -> Any:
    """A metric as an `evaluate.Metric`; needs neither network nor Hub.

    `compute(predictions=probabilities, references=labels)` returns `{name: value}`; with
    `n_resamples=2000` (and `groups=[...]`) also `<name>_ci95`, `<name>_note` and
    `<name>_undefined_resamples`. `alignment` and `similarity_gap` take cosines as predictions.

    Args:
        name: A name in `METRICS`.
        **options: Passed to `evaluate.Metric`. `keep_in_memory` is on by default, so
            that predictions about patients are not written to the shared cache folder.

    Raises:
        GloVLMError: If there is no such metric.
    """
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise GloVLMError(f"Expected one of {known}, found '{name}'.{nearest(name, METRICS)}")
    return _evaluate_class(name, METRICS[name])(**{"keep_in_memory": True} | options)


@cache
def _evaluate_class(name: str, row: Metric) -> type[Any]:
    # `import evaluate` pulls in torch and transformers (9 s), so it waits until someone asks. A
    # factory, because with a module `__getattr__` mypy would accept every misspelt name of this
    # module; import_module and type(), because evaluate has no types to import or inherit from.
    evaluate, datasets = map(importlib.import_module, ("evaluate", "datasets"))
    low, high = row.bounds
    ranks = {True: " Higher is better.", False: " Lower is better.", None: ""}[row.higher_is_better]

    def _info(self: Any) -> Any:
        table = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=f"{row.definition} Range: {low:g} to {high:g}.{ranks}",
            citation="",
            inputs_description="predictions: [n, K]; references: class indices [n].",
            features=datasets.Features(predictions=table, references=datasets.Value("int64")),
        )

    def _compute(self: Any, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"n_resamples": 0} | options
        if row.of_similarities:
            cosines = check_cosines(predictions)
            arguments["similarities"] = cosines
            predictions = np.full(cosines.shape, 1 / cosines.shape[1])
        entry = compute_metrics(references, predictions, **arguments)["metrics"][name]
        if arguments["n_resamples"] == 0:
            return {name: entry["value"]}
        return {name if key == "value" else f"{name}_{key}": v for key, v in entry.items()}

    # evaluate names a metric after its class: MacroAuc is macro_auc
    title = name.title().replace("_", "")
    return type(title, (evaluate.Metric,), {"_info": _info, "_compute": _compute})


def _statistics(
    functions: Mapping[str, Statistic], sample: Sample, weights: Floats
) -> dict[str, Floats]:
    """Values under R weightings of the groups: `[G, R]` -> `[1 or K, R]`, NaN if undefined."""
    resamples = Resamples(sample, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: np.atleast_2d(function(resamples)) for name, function in functions.items()}


def _differences(
    of_a: Sample, of_b: Sequence[Sample], metrics: Sequence[str], weights: Floats
) -> Floats:
    """Metrics of each b minus those of a, `[b, metrics, R]`, under weightings `[G, R]`."""
    functions = {name: METRICS[name].function for name in metrics}
    rows = (_statistics(functions, sample, weights).values() for sample in (of_a, *of_b))
    values = np.stack([np.concatenate(list(row)) for row in rows])
    return np.asarray(values[1:] - values[0])


def _multiplicities(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Multiplicities of n things when n are drawn with replacement: `[n, size]`."""
    cells = rng.integers(n, size=(size, n)) * size + np.arange(size)[:, None]
    return np.bincount(cells.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)


def _resamples(
    n_groups: int, n_resamples: int, n_rows: int, rng: np.random.Generator
) -> Iterator[tuple[slice, Floats]]:
    step = max(1, _CHUNK // n_rows)
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        yield slice(start, start + size), _multiplicities(rng, n_groups, size)


def _few(n_groups: int, holding: int) -> str:
    scarce = n_groups < MIN_GROUPS or holding < MIN_GROUPS_PER_CLASS
    return "too few groups" if scarce else ""


def _entry(
    value: float,
    resampled: Floats,
    shares: Floats,
    bounds: tuple[float, float],
    plain: bool,
    *notes: str,
) -> dict[str, Any]:
    defined = resampled[~np.isnan(resampled)]
    undefined = bool(np.isnan(value))
    ci95 = None
    if len(defined) and not undefined:
        of = intervals.mean_interval if plain else intervals.fraction_interval
        ci95 = list(of(value, defined, intervals.count_effective_groups(shares), bounds))
    notes = ("undefined on these labels" if undefined else "", *notes)
    return {
        "value": None if undefined else value,
        "ci95": ci95,
        "note": "; ".join(note for note in notes if note),
        "undefined_resamples": len(resampled) - len(defined),
    }


def _bins(confidence: Floats) -> Ints:
    return np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], confidence, side="left")


def _reliability(y: Ints, p: Floats) -> list[dict[str, Any]]:
    confidence, right = p.max(1), p.argmax(1) == y
    bins = _bins(confidence)
    rows = []
    for b in range(ECE_BINS):
        held = {"confidence": confidence[bins == b], "accuracy": right[bins == b]}
        means = {name: float(v.mean()) if len(v) else None for name, v in held.items()}
        count = len(held["accuracy"])
        rows.append({"lower": b / ECE_BINS, "upper": (b + 1) / ECE_BINS, "count": count, **means})
    return rows
