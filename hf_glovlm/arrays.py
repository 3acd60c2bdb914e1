"""Predictions as arrays: checks of labels, probabilities, cosines and groups."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_glovlm.errors import GloVLMError

__all__ = ["check_cosines", "check_groups", "check_labels", "check_predictions"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Ints, Floats]:
    """Class indices `[n]` and probabilities `[n, K]` as arrays.

    Raises:
        GloVLMError: A shape, a range or a length is wrong, or a row does not sum to 1.
    """
    p = _check_table(probabilities, "probabilities", (0, 1), "apply softmax first")
    y = check_labels(labels, p.shape[1], "labels")
    if len(y) != len(p):
        raise GloVLMError(f"Expected one label per row, found {len(y)} labels, {len(p)} rows.")
    off = np.abs(p.sum(1) - 1)
    if off.max() > 1e-4:
        given = f"{p[off.argmax()].sum():.6g} in row {off.argmax()}"
        raise GloVLMError(
            f"Expected rows of probabilities that sum to 1, found {given}: apply softmax over the "
            "classes, in float32 or better."
        )
    return y, p


def _check_table(values: ArrayLike, what: str, bounds: tuple[float, float], advice: str) -> Floats:
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise GloVLMError(f"Expected {what} as numbers [n, K], found something else.") from None
    if table.ndim != 2 or len(table) == 0 or table.shape[1] < 2:
        raise GloVLMError(
            f"Expected {what} of shape [n, K] with n >= 1 and K >= 2, found {table.shape}: give a "
            "row per image and a column per class."
        )
    low, high = bounds
    bad = ~((table >= low) & (table <= high))  # NaN compares false
    if bad.any():
        row = bad.any(1).argmax()
        given = f"{table[row][bad[row]][0]:.6g} in row {row}"
        raise GloVLMError(f"Expected {what} in {low} ... {high}, found {given}: {advice}.")
    return table


def check_cosines(values: ArrayLike) -> Floats:
    """Cosines of images and class texts as an array `[n, K]`.

    Raises:
        GloVLMError: The shape or the range is wrong.
    """
    # rounding can carry the cosine of float16 features a little beyond 1
    return _check_table(values, "similarities", (-1.001, 1.001), "give cosines without the scale")


def check_labels(values: ArrayLike, n_classes: int, what: str) -> Ints:
    """Class indices as an array `[n]`; `what` they are is for the sentence.

    Raises:
        GloVLMError: They are none, or not in 0 ... K-1.
    """
    try:
        y = np.asarray(values)
    except ValueError:
        raise GloVLMError(f"Expected {what} as class indices [n], found ragged lists.") from None
    if y.ndim != 1 or len(y) == 0 or y.dtype.kind not in "iu":
        given = f"{y.dtype} of shape {y.shape}"
    elif y.min() < 0 or y.max() >= n_classes:
        given = f"{y.min()} ... {y.max()}"
    else:
        return y.astype(np.int64)
    raise GloVLMError(
        f"Expected {what} as class indices [n] in 0 ... {n_classes - 1}, found {given}: map class "
        "names to indices first."
    )


def check_groups(groups: Sequence[str], n: int) -> NDArray[np.str_]:
    """Group of each image as an array `[n]`.

    Raises:
        GloVLMError: One is missing.
    """
    if len(groups) != n:
        raise GloVLMError(f"Expected {n} groups, one per image, found {len(groups)}.")
    for row, group in enumerate(groups):
        # NaN is how pandas writes a missing id; as a string it would merge unrelated images
        if group is None or group != group or str(group) == "":
            raise GloVLMError(
                f"Expected a group for every image, found none in row {row}: give an image of "
                "unknown origin an id of its own."
            )
    return np.array([str(group) for group in groups])
