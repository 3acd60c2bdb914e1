"""Lesion counts with intervals, and prevalence correction by a confusion matrix.

The percentage that a classifier's calls give is biased by its errors: where few glomeruli are
sclerosed, false calls outnumber true ones. A confusion matrix measured on labelled data undoes the
expected part of that (Rogan and Gladen 1978 for two classes; least squares on the simplex for
more), and trusts that the classifier errs here as it did there. So a corrected percentage stands
beside the count and never in its place; `lab.counting` measures both.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls
from scipy.stats import binomtest

from ..errors import GloVLMError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOT_A_SCORE = "These are lesion counts, not an Oxford or Banff score."
SAMPLING = (
    "Intervals are 95% Wilson intervals of counting, given the classifier's calls: they do not "
    "hold the classifier's errors."
)
NEIGHBOURS = (
    "Tiles of one slide are neighbours, not independent draws: their intervals are too narrow."
)
PRIOR_COUNT = 0.5  # Jeffreys: what each cell of a small confusion matrix is given beforehand


# ------------------------------------------------------------------------------------- counting


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson score interval (95%) of a binomial fraction.

    Wilson 1927 (JASA 22:209): the fractions that the score test does not reject.

    Args:
        count: Successes, 0 ... n.
        n: Trials; with none the interval is 0 ... 1.

    Returns:
        Lower and upper bound, in 0 ... 1.

    Raises:
        GloVLMError: The count is not among 0 ... n.
    """
    if not 0 <= count <= n:
        raise GloVLMError(f"Expected a count in 0 ... {n}, found {count}.")
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return float(low), float(high)


def count_classes(
    calls: ArrayLike,
    class_names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    unit: Literal["objects", "tiles"] = "objects",
    confusion: ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Lesion counts: the objects of each class in each slide or case, each object once.

    Args:
        calls: Class numbers `[n]`, or probabilities `[n, K]`, of which the largest is the call.
        class_names: The `K` classes.
        groups: Slide or case of each object; all are of one, named `all`, when not given.
        ids: Which glomerulus each row shows. Rows of one group with the same id are one object:
            their probabilities (or votes) are averaged.
        unit: What a row is; for tiles the note says that they are not independent.
        confusion: Calls by true class `[K, K]`, rows are labels, counted on labelled objects that
            the classifier did not learn from; adds `corrected`, whose interval holds the
            classifier's errors too.
        seed: Of the draws behind that interval.

    Returns:
        By group, in the order given: `unit`, `n`, `classes` (class -> `count`, `percent`, `ci95` in
        per cent; `corrected` with `percent` and `ci95`) and `notes`. Without an object a percentage
        is `None`.

    Raises:
        GloVLMError: A shape, class number or length is wrong.
    """
    names = [str(name) for name in class_names]
    votes = _votes(calls, len(names))
    groups = ["all"] * len(votes) if groups is None else [str(group) for group in groups]
    if len(groups) != len(votes) or (ids is not None and len(ids) != len(votes)):
        given = len(groups) if len(groups) != len(votes) else len(ids or ())
        raise GloVLMError(f"Expected a group and an id for each of {len(votes)} rows, not {given}.")
    matrix = None if confusion is None else _checked_confusion(confusion, len(names))
    group_names = list(dict.fromkeys(groups)) or ["all"]
    rows_of: dict[str, list[int]] = {group: [] for group in group_names}
    for row, group in enumerate(groups):
        rows_of[group].append(row)
    result = {}
    for group, rows in rows_of.items():
        own = votes[rows] if ids is None else _merged(votes[rows], [ids[row] for row in rows])
        counts = np.bincount(own.argmax(axis=1), minlength=len(names)).astype(np.int64)
        result[group] = _counted(counts, names, unit, matrix, seed)
    return result


def _counted(
    counts: Ints, names: Sequence[str], unit: str, confusion: Ints | None, seed: int
) -> dict[str, Any]:
    """Counts `[K]` of one slide or case, as the results hold them."""
    n = int(counts.sum())
    classes: dict[str, dict[str, Any]] = {}
    for name, count in zip(names, counts.tolist(), strict=True):
        classes[name] = {
            "count": count,
            "percent": 100 * count / n if n else None,
            "ci95": [100 * bound for bound in wilson_interval(count, n)] if n else None,
        }
    notes = [NOT_A_SCORE, SAMPLING, *([NEIGHBOURS] if unit == "tiles" else [])]
    if confusion is not None and n:
        if (confusion.sum(axis=1) > 0).all() and is_informative(confusion):
            percent, bounds = corrected_percentages(counts, confusion, seed=seed)
            for k, name in enumerate(names):
                classes[name]["corrected"] = {"percent": percent[k], "ci95": bounds[k]}
            notes.append(
                f"Corrected percentages undo the errors found on {int(confusion.sum())} labelled "
                "objects; their intervals hold counting and these errors, and trust that the "
                "classifier errs here as it did there."
            )
        else:
            notes.append(
                "Percentages are not corrected: the labelled objects lack a class, or a call is "
                "no likelier from its own class than from another."
            )
    return {"unit": unit, "n": n, "classes": classes, "notes": notes}


def _votes(calls: ArrayLike, n_classes: int) -> Floats:
    """Class numbers `[n]` or probabilities `[n, K]` as a table `[n, K]`."""
    values = np.asarray(calls)
    if values.size == 0:
        return np.empty((0, n_classes))
    if values.ndim == 2 and values.shape[1] == n_classes and np.isfinite(values).all():
        return values.astype(np.float64)
    if values.ndim == 1 and values.dtype.kind in "iu" and 0 <= values.min() <= values.max():
        if values.max() < n_classes:
            return np.eye(n_classes)[values]
        raise GloVLMError(f"Expected classes 0 ... {n_classes - 1}, found {values.max()}.")
    raise GloVLMError(
        f"Expected class numbers [n] or finite probabilities [n, {n_classes}], found "
        f"{values.dtype} of shape {values.shape}."
    )


def _merged(votes: Floats, ids: Sequence[str]) -> Floats:
    """Average the rows of each object."""
    place = {name: i for i, name in enumerate(dict.fromkeys(ids))}
    total, rows = np.zeros((len(place), votes.shape[1])), [place[name] for name in ids]
    np.add.at(total, rows, votes)
    mean: Floats = total / np.bincount(rows, minlength=len(place))[:, None]
    return mean


# ----------------------------------------------------------------------------------- correction


def confusion_counts(labels: ArrayLike, calls: ArrayLike, n_classes: int) -> Ints:
    """Confusion matrix of counts `[K, K]`, rows are labels.

    Args:
        labels: True class numbers `[n]`.
        calls: Called class numbers `[n]`.
        n_classes: K.
    """
    table = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(table, (np.asarray(labels, np.int64), np.asarray(calls, np.int64)), 1)
    return table


def is_informative(confusion: ArrayLike) -> bool:
    """Whether each call is likelier from its own class than from any other.

    For two classes: sensitivity + specificity > 1. Without it a count carries no information
    about the prevalence, or the opposite.

    Args:
        confusion: Counts or rates `[K, K]`, rows are labels, none of them empty.
    """
    rates = _rates(confusion)
    others = np.where(np.eye(len(rates), dtype=bool), -np.inf, rates).max(axis=0)
    return bool((np.diag(rates) > others).all())


def rogan_gladen(apparent: float, sensitivity: float, specificity: float) -> float:
    """Rogan-Gladen estimate: the fraction of positive calls, corrected for a test's errors.

    (apparent + specificity - 1) / (sensitivity + specificity - 1), cut to 0 ... 1. Rogan and
    Gladen 1978 (American Journal of Epidemiology 107:71).

    Args:
        apparent: Fraction of positive calls.
        sensitivity: Fraction of the positives that are called so.
        specificity: Fraction of the negatives that are called so.

    Raises:
        GloVLMError: The test is uninformative: sensitivity + specificity is 1 or less.
    """
    youden = sensitivity + specificity - 1
    if youden <= 0:
        raise GloVLMError(
            "Expected sensitivity + specificity above 1, found "
            f"{sensitivity + specificity:.3g}: such calls cannot be corrected."
        )
    return float(np.clip((apparent + specificity - 1) / youden, 0, 1))


def adjust_fractions(apparent: ArrayLike, confusion: ArrayLike) -> Floats:
    """Corrected class fractions: those whose expected calls come nearest to the counted calls.

    Least squares on the simplex of `rates.T @ p = apparent`: the black-box shift estimate (Lipton,
    Wang and Smola 2018, arXiv 1802.03916, equation 5) kept to valid fractions; with two classes it
    is `rogan_gladen`. As both sides sum to 1, the residual is linear in p without a constant,
    B p with B = rates.T - apparent 1^T, and the point of a simplex that makes |B p| least follows
    exactly from non-negative least squares (Lawson and Hanson 1974, chapter 23).

    Args:
        apparent: Fractions of calls `[K]`, or their counts.
        confusion: Counts or rates `[K, K]`, rows are labels, none of them empty.

    Returns:
        Fractions `[K]` of 0 or more that sum to 1.

    Raises:
        GloVLMError: A shape is wrong or the confusion matrix is not informative.
    """
    if not is_informative(confusion):
        raise GloVLMError(
            "The calls cannot be corrected: some call is no likelier from its own class than from "
            "another. Give a better classifier, or report the counts."
        )
    calls = np.asarray(apparent, np.float64)
    return _least_squares(calls / calls.sum(), _rates(confusion))


def _least_squares(apparent: Floats, rates: Floats) -> Floats:
    n_classes = len(apparent)
    residual = rates.T - apparent[:, None]
    stacked = np.vstack([residual, np.ones(n_classes)])
    weights, _ = nnls(stacked, np.append(np.zeros(n_classes), 1.0))
    fractions: Floats = weights / weights.sum()
    return fractions


def corrected_percentages(
    counts: ArrayLike, confusion: ArrayLike, *, n_draws: int = 2000, seed: int = 0
) -> tuple[list[float], list[list[float]]]:
    """Corrected percentages, with intervals that hold the error of counting and of the classifier.

    95% percentiles over draws of both uncertain things: the rates of each row of the confusion
    matrix and the fractions of calls, each from its Dirichlet posterior under Jeffreys' prior. An
    interval is widened to its estimate where that lies at a bound.

    Args:
        counts: Calls of each class `[K]` on one slide.
        confusion: Counts `[K, K]`, rows are labels.
        n_draws: Draws.
        seed: Of the draws.

    Returns:
        Per cent of each class, and its bounds.

    Raises:
        GloVLMError: As `adjust_fractions`.
    """
    calls, table = np.asarray(counts, np.float64), np.asarray(confusion, np.float64)
    point = adjust_fractions(calls, table)
    rng = np.random.default_rng(seed)
    apparent = rng.dirichlet(calls + PRIOR_COUNT, size=n_draws)
    rates = np.stack([rng.dirichlet(row + PRIOR_COUNT, size=n_draws) for row in table], axis=1)
    drawn = [_least_squares(a, r) for a, r in zip(apparent, rates, strict=True)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    bounds = np.stack([np.minimum(low, point), np.maximum(high, point)], axis=1)
    return (100 * point).tolist(), (100 * bounds).tolist()


def _rates(confusion: ArrayLike) -> Floats:
    table = np.asarray(confusion, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or (table.sum(axis=1) <= 0).any():
        raise GloVLMError(
            "Expected a square confusion matrix with labelled objects of every class, found the "
            f"shape {table.shape}, rows {table.sum(axis=-1).tolist()}."
        )
    rates: Floats = table / table.sum(axis=1, keepdims=True)
    return rates


def _checked_confusion(confusion: ArrayLike, n_classes: int) -> Ints:
    table = np.asarray(confusion)
    if table.shape != (n_classes, n_classes) or table.dtype.kind not in "iu" or (table < 0).any():
        raise GloVLMError(
            f"Expected a confusion matrix of counts [{n_classes}, {n_classes}], found "
            f"{table.dtype} of shape {table.shape}."
        )
    return table.astype(np.int64)
