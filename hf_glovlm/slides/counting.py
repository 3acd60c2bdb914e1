"""Lesion counts with intervals, and percentages corrected for the classifier's errors.

The percentage that a classifier's calls give is biased by its errors: where few glomeruli are
sclerosed, false calls outnumber true ones. A confusion matrix measured on labelled data undoes the
expected part of that (`prevalence`), and trusts that the classifier errs here as it did there. So a
corrected percentage stands beside the count and never in its place; `lab.counting` measures both.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from ..data.listing import few
from ..errors import GloVLMError
from .lesions import ClassSet
from .prevalence import (
    CONTRADICTION,
    LIMIT,
    MARGIN,
    check_confusion,
    corrected_percentages,
    informative_calls,
    unexplained_calls,
)

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
SECTIONS = (
    "A glomerulus on several sections counts in each lesion that one of them shows, and as "
    "globally sclerotic where all of them show it, so counts may add up to more than n; they are "
    "not corrected, as errors over several sections are not those that were measured."
)
UNKNOWN_ERRORS = (
    "Percentages are not corrected: the classifier's errors are not known, as no confusion matrix "
    "was measured with it."
)


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
        ids: Which glomerulus each row shows. Rows of one group with the same id are one object: it
            counts in every lesion that one of them is called, and in global sclerosis only where
            all of them are (`ClassSet.over_sections`); so counts may add up to more than `n`, and
            none are corrected.
        unit: What a row is; for tiles the note says that they are not independent.
        confusion: Calls by true class `[K, K]`, rows are labels, counted on labelled objects that
            the classifier did not learn from; adds `corrected` to the objects of each class whose
            calls are informative. Tiles are not corrected: the matrix is not of them.
        seed: Of the draws behind that interval.

    Returns:
        By group, in the order given: `unit`, `n`, `classes` and `notes`. A class has `count`,
        `percent` and `ci95` (Wilson's, in per cent) of the calls, as if they were all right; and
        `corrected`: `percent`, the share of these objects that truly is of the class (posterior
        median), and `ci95` of the fraction that they are a sample of, which holds counting and the
        errors (`prevalence.estimate_fractions`). Without an object a percentage is `None`.

    Raises:
        GloVLMError: A shape, class number or length is wrong.
    """
    names = [str(name) for name in class_names]
    votes = _votes(calls, len(names))
    groups = ["all"] * len(votes) if groups is None else [str(group) for group in groups]
    if len(groups) != len(votes) or (ids is not None and len(ids) != len(votes)):
        given = len(groups) if len(groups) != len(votes) else len(ids or ())
        raise GloVLMError(f"Expected a group and an id for each of {len(votes)} rows, not {given}.")
    matrix = None if confusion is None else check_confusion(confusion, len(names))
    group_names = list(dict.fromkeys(groups)) or ["all"]
    rows_of: dict[str, list[int]] = {group: [] for group in group_names}
    for row, group in enumerate(groups):
        rows_of[group].append(row)
    result = {}
    for group, rows in rows_of.items():
        own = votes[rows].argmax(axis=1)
        n, shown = len(rows), own
        if ids is not None:
            n, shown = _over_sections(own, [ids[row] for row in rows], names)
        counts = np.bincount(shown, minlength=len(names)).astype(np.int64)
        joined = n < len(rows)
        result[group] = _counted(counts, n, names, unit, matrix, joined, seed)
    return result


def _counted(
    counts: Ints,
    n: int,
    names: Sequence[str],
    unit: str,
    confusion: Ints | None,
    joined: bool,
    seed: int,
) -> dict[str, Any]:
    """Counts `[K]` of the `n` objects of one slide or case, as the results hold them."""
    classes: dict[str, dict[str, Any]] = {}
    for name, count in zip(names, counts.tolist(), strict=True):
        classes[name] = {
            "count": count,
            "percent": 100 * count / n if n else None,
            "ci95": [100 * bound for bound in wilson_interval(count, n)] if n else None,
        }
    notes = [NOT_A_SCORE, SAMPLING]
    if unit == "tiles":
        notes.append(NEIGHBOURS)
    elif joined:
        notes.append(SECTIONS)
    elif n:
        corrected = None if confusion is None else _correct(classes, counts, confusion, seed)
        notes += [UNKNOWN_ERRORS] if corrected is None else corrected
    return {"unit": unit, "n": n, "classes": classes, "notes": notes}


def _correct(
    classes: dict[str, dict[str, Any]], counts: Ints, confusion: Ints, seed: int
) -> list[str]:
    """Add `corrected` to the classes where the calls say enough; returns notes on which and why."""
    names = list(classes)
    unlabelled = [name for name, row in zip(names, confusion, strict=True) if not row.any()]
    if unlabelled:
        return [
            "Percentages are not corrected: how the classifier calls its classes was measured on "
            f"no object of {few(unlabelled)}."
        ]
    informative = _informative(tuple(map(tuple, confusion.tolist())), seed)
    weak = [name for name, enough in zip(names, informative, strict=True) if not enough]
    notes = []
    if len(weak) < len(names):
        percent, bounds = corrected_percentages(counts, confusion, seed=seed)
        for k, name in enumerate(names):
            if informative[k]:
                classes[name]["corrected"] = {"percent": percent[k], "ci95": bounds[k]}
        notes.append(
            "Corrected percentages are the share of these objects that truly is of a class, by the "
            f"errors found on {int(confusion.sum())} labelled objects; their 95% intervals hold "
            "counting and these errors, and trust that the classifier errs here as it did there."
        )
        unlikely = unexplained_calls(counts, confusion, seed=seed)
        odd = [name for name, p in zip(names, unlikely, strict=True) if p <= CONTRADICTION]
        if odd:
            notes.append(
                f"No mixture of classes explains how many objects are called {few(odd)}: the "
                "classifier errs otherwise here than on the labelled objects, so do not rely on "
                "the corrected percentages."
            )
    if weak:
        notes.append(
            f"Not corrected: {few(weak)}. Such calls say too little: on the labelled objects they "
            f"are not clearly likelier (by {MARGIN:g}) from their own class than from any other; "
            f"for two classes, sensitivity + specificity is too near 1 (below {1 + MARGIN:g})."
        )
    return notes


def correct_share(
    calls: ArrayLike,
    class_names: Sequence[str],
    groups: Sequence[int],
    confusion: ArrayLike | None,
    *,
    recall: tuple[ArrayLike, ArrayLike] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any] | None, str | None]:
    """Corrected percentage of a lesion that some classes show and others say is not there.

    Args:
        calls: Calls of each class `[K]`.
        class_names: `[K]`.
        groups: For each class 1 where it shows the lesion, 0 where it says that there is none, and
            -1 where it is out of the denominator.
        confusion: Counts `[K, K]`, rows are labels; `None` where the calls are the true classes.
        recall: Of each class, found ones and all; see `prevalence.estimate_fractions`.
        seed: Of the draws.

    Returns:
        `percent` and `ci95`; or `None`, and why the percentage is not corrected.
    """
    counts = np.asarray(calls, np.int64)
    names = list(class_names)
    if confusion is not None:
        matrix = check_confusion(confusion, len(names))
        if unlabelled := [n for n, row in zip(names, matrix, strict=True) if not row.any()]:
            return None, f"the classifier's errors were measured on no object of {few(unlabelled)}"
        informative = _informative(tuple(map(tuple, matrix.tolist())), seed)
        weak = [n for n, g, ok in zip(names, groups, informative, strict=True) if g == 1 and not ok]
        if weak:
            return None, (
                f"calls of {few(weak)} say too little: on labelled objects they are not clearly "
                f"likelier (by {MARGIN:g}) from their own class than from any other"
            )
        unlikely = unexplained_calls(counts, matrix, seed=seed)
        if odd := [n for n, p in zip(names, unlikely, strict=True) if p <= CONTRADICTION]:
            return None, (
                f"no mixture of classes explains how many are called {few(odd)}: the classifier "
                "errs otherwise here than where its errors were measured"
            )
    percent, bounds = corrected_percentages(
        counts, confusion, recall=recall, groups=groups, seed=seed
    )
    return {"percent": percent[1], "ci95": bounds[1]}, None


@lru_cache(maxsize=8)  # every slide of a run has the same matrix
def _informative(confusion: tuple[tuple[int, ...], ...], seed: int) -> tuple[bool, ...]:
    return tuple((informative_calls(confusion, seed=seed) >= LIMIT).tolist())


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


def _over_sections(calls: Ints, ids: Sequence[str], names: Sequence[str]) -> tuple[int, Ints]:
    """How many objects the ids are of, and the classes in which they count, one entry each."""
    called: dict[str, list[str]] = {}
    for name, call in zip(ids, calls.tolist(), strict=True):
        called.setdefault(name, []).append(names[call])
    classes = ClassSet(list(names))
    shown = [one for each in called.values() for one in classes.over_sections(each)]
    return len(called), np.array([names.index(one) for one in shown], np.int64)
