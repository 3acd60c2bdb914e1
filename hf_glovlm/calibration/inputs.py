"""Checked inputs of calibration: tables `[n, K]` of numbers and their labels `[n]`."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import GloVLMError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def softmax(logits: Floats) -> Floats:
    """Softmax of logits `[n, K]` over the classes."""
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = exponential / exponential.sum(axis=1, keepdims=True)
    return result


def checked_logits(values: ArrayLike) -> Floats:
    """Finite numbers `[n, K]`, n at least 1, K at least 2; else a `GloVLMError`."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise GloVLMError("Expected a table of numbers [n, K], found something else.") from None
    if table.ndim != 2 or len(table) == 0 or table.shape[1] < 2:
        raise GloVLMError(
            f"Expected a table [n, K] with n >= 1 and K >= 2, found the shape {table.shape}: give "
            "a row per image and a column per class."
        )
    if not np.isfinite(table).all():
        row = int((~np.isfinite(table)).any(axis=1).argmax())
        raise GloVLMError(f"Expected finite numbers, found another in row {row}: predict it anew.")
    return table


def checked_probabilities(values: ArrayLike) -> Floats:
    """Rows `[n, K]` of numbers in [0, 1] that sum to 1 within 1e-4; else a `GloVLMError`."""
    p = checked_logits(values)
    off = np.where((p < 0).any(axis=1), np.inf, np.abs(p.sum(axis=1) - 1))
    if off.max() > 1e-4:
        raise GloVLMError(
            "Expected probabilities of 0 or more whose rows sum to 1, found "
            f"{np.round(p[off.argmax()], 6).tolist()}: apply softmax over the classes."
        )
    return p


def checked_labels(labels: ArrayLike, n_classes: int, n: int | None = None) -> Ints:
    """Class indices below `n_classes`, `n` of them where that is given; else a `GloVLMError`."""
    y = np.asarray(labels)
    whole = y.dtype.kind in "iu"
    if y.ndim != 1 or not whole or (len(y) and not 0 <= y.min() <= y.max() < n_classes):
        bounds = f" from {y.min()} to {y.max()}" if whole else ""
        raise GloVLMError(
            f"Expected labels as class indices [n] in 0 ... {n_classes - 1}, found {y.dtype} of "
            f"shape {y.shape}{bounds}."
        )
    if n is not None and len(y) != n:
        raise GloVLMError(f"Expected one label per row, found {len(y)} labels and {n} rows.")
    return y.astype(np.int64)


def checked_prior(values: ArrayLike | None, n_classes: int) -> Floats:
    """Class fractions `[K]` above 0 with sum 1 (uniform for None); else a `GloVLMError`."""
    if values is None:
        return np.full(n_classes, 1 / n_classes)
    prior = np.asarray(values, dtype=np.float64)
    if prior.shape != (n_classes,) or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-3:
        raise GloVLMError(
            f"Expected {n_classes} class fractions above 0 that sum to 1, found "
            f"{prior.tolist()}: give the prevalence of every class."
        )
    result: Floats = prior / prior.sum()
    return result
