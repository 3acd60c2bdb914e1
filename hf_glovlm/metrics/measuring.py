"""Metrics of one set of predictions: arrays in, dict out, every number with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import intervals
from ..arrays import check_cosines, check_groups, check_labels, check_predictions
from ..errors import GloVLMError
from .resamples import Floats, Ints, Sample, resample_groups, statistics
from .table import ECE_BINS, METRICS, PER_CLASS, Metric, confidence_bins

MIN_GROUPS = 10
MIN_GROUPS_PER_CLASS = 5


def compute_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    similarities: ArrayLike | None = None,
    grades: Sequence[int] | None = None,
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
        grades: Grade of each class, `[K]` different whole numbers from the least to the most
            severe, where the classes are grades; adds `quadratic_kappa`. Only their order counts.
        n_resamples: Bootstrap resamples; 0 gives values without intervals.
        seed: Seed of the bootstrap. With groups the order of the images does not matter.

    Returns:
        `metrics` (name -> `value`, `ci95`, `note`, `undefined_resamples`), `per_class` (class ->
        `recall`, `specificity`, `auc`, `auprc`, `n`, `groups`), `not_computed` (metric -> why it is
        not among them), `confusion_matrix` (rows are labels),
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
    sample = Sample(y, p, group, n_groups, cosines, n_resamples, _ranked(grades, len(names)))
    not_computed = {name: why for name, row in METRICS.items() if (why := _missing(row, sample))}
    rows = {name: row for name, row in METRICS.items() if name not in not_computed}
    functions = {name: row.function for name, row in rows.items()} | PER_CLASS
    value = statistics(functions, sample, np.ones((n_groups, 1)))
    drawn = {key: f for key, f in functions.items() if key not in rows or rows[key].scale != "none"}
    resampled = {key: np.empty((len(value[key]), n_resamples)) for key in drawn}
    rng = np.random.default_rng(seed)
    for columns, weights in resample_groups(n_groups, n_resamples, len(y), rng):
        for key, statistic in statistics(drawn, sample, weights).items():
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
        caveat = row.caveat(sample) if row and row.caveat else ""
        bounds, scale = (row.bounds, row.scale) if row else ((0.0, 1.0), "log-odds")
        if key not in resampled:
            absent = "no interval: resampling overstates it" if n_resamples else ""
            return make_entry(point, np.empty(0), share, bounds, scale, note, absent, caveat)
        few = note_few(n_groups, holding) if n_resamples else ""
        return make_entry(
            point, resampled[key][at], share, bounds, scale, note, unknown, few, caveat
        )

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
                "auprc": of_class(
                    "auprc",
                    c,
                    (shares[:, c] + other_shares[:, c]) / 2,
                    min(holders[c], other_holders[c]),
                ),
                "n": int(counts[c]),
                "groups": int(holders[c]),
            }
            for c, name in enumerate(names)
        },
        "not_computed": not_computed,
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


def _ranked(grades: Sequence[int] | None, n_classes: int) -> Ints | None:
    """Grades as 0 ... K-1."""
    if grades is None:
        return None
    if len(grades) != n_classes or len(set(grades)) < n_classes:
        raise GloVLMError(
            f"Expected {n_classes} different grades, one for each class, found {list(grades)}."
        )
    return np.argsort(np.argsort(np.asarray(grades)))


def _missing(row: Metric, sample: Sample) -> str:
    """Why a metric cannot be computed of a sample; empty where it can."""
    if row.of_similarities and sample.similarities is None:
        return "there are no cosines of images and class texts"
    if row.of_grades and sample.grades is None:
        return "no order of the classes is stated, such as that of grades"
    return ""


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


def note_few(n_groups: int, holding: int) -> str:
    """Note on an interval over so few groups, or where so few hold the class; empty for enough."""
    scarce = n_groups < MIN_GROUPS or holding < MIN_GROUPS_PER_CLASS
    return "too few groups" if scarce else ""


def make_entry(
    value: float,
    resampled: Floats,
    shares: Floats,
    bounds: tuple[float, float],
    scale: str,
    *notes: str,
) -> dict[str, Any]:
    """Value with its interval: `value`, `ci95`, `note`, `undefined_resamples`.

    Args:
        value: NaN where undefined.
        resampled: Values under resampled groups, `[R]`, NaN where undefined.
        shares: Weight of each group in the value, `[G]`.
        bounds: Lowest and highest value.
        scale: Of its interval, see `Metric.interval`; `none` has no resampled values.
        *notes: What belongs beside it; empty ones are left out.
    """
    defined = resampled[~np.isnan(resampled)]
    undefined = bool(np.isnan(value))
    ci95 = None
    if len(defined) and not undefined:
        of = intervals.SCALES[scale]
        ci95 = list(of(value, defined, intervals.count_effective_groups(shares), bounds))
    notes = ("undefined on these labels" if undefined else "", *notes)
    return {
        "value": None if undefined else value,
        "ci95": ci95,
        "note": "; ".join(note for note in notes if note),
        "undefined_resamples": len(resampled) - len(defined),
    }


def _reliability(y: Ints, p: Floats) -> list[dict[str, Any]]:
    confidence, right = p.max(1), p.argmax(1) == y
    bins = confidence_bins(confidence)
    rows = []
    for b in range(ECE_BINS):
        held = {"confidence": confidence[bins == b], "accuracy": right[bins == b]}
        means = {name: float(v.mean()) if len(v) else None for name, v in held.items()}
        count = len(held["accuracy"])
        rows.append({"lower": b / ECE_BINS, "upper": (b + 1) / ECE_BINS, "count": count, **means})
    return rows
