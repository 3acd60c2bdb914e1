"""Training-free pooling of tile scores into slide scores (MI-Zero).

Of every class the j tiles that score highest for it are averaged, each class by its own tiles (Lu
et al. 2023, arXiv:2306.07831, which adds them up; the mean, as CONCH takes it, ranks the classes
the same way and does not grow with j). Scores may be smoothed over neighbouring tiles before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from ..errors import GloVLMError

Floats = NDArray[np.float64]
Kind = Literal["cosine", "logit", "probability"]

TOP_J = (1, 5, 10, 50, 100)
NEIGHBOURS = 8
_KINDS = ("cosine", "logit", "probability")
_CHUNK = 65_536  # tiles whose neighbours are held at once


@dataclass(frozen=True)
class SlideScore:
    """Pooled scores of a slide.

    Attributes:
        label: The class with the highest score, the first one on a tie.
        scores: Pooled score of each class, of the kind that was given.
        probabilities: Probability of each class. They are as good as the tiles' are, and were
            calibrated on no slide.
        pooling: `top_J` or `mean`.
        n_tiles: Tiles of the slide.
    """

    label: str
    scores: dict[str, float]
    probabilities: dict[str, float]
    pooling: str
    n_tiles: int


def score_tiles(features: ArrayLike, prototypes: ArrayLike) -> Floats:
    """Cosine similarity of each tile to each class prototype.

    Args:
        features: `[n, dim]` in the joint space of image and text; normalised here.
        prototypes: `[K, dim]`, one a class; normalised here.

    Returns:
        `[n, K]` in [-1, 1].

    Raises:
        GloVLMError: The widths differ, or a vector is zero or not finite.
    """
    tiles, classes = np.asarray(features, np.float64), np.asarray(prototypes, np.float64)
    if tiles.ndim != 2 or classes.ndim != 2 or tiles.shape[1] != classes.shape[1]:
        raise GloVLMError(
            f"Expected tile features [n, dim] and prototypes [K, dim] of one width, found "
            f"{list(tiles.shape)} and {list(classes.shape)}: take both from the same model."
        )
    units = []
    for name, vectors in (("tile features", tiles), ("prototypes", classes)):
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(length) & (length > 0)).all():
            raise GloVLMError(f"Expected {name} that are finite and not zero; encode them again.")
        units.append(vectors / length)
    return units[0] @ units[1].T


def smooth_scores(scores: ArrayLike, coords: ArrayLike, k: int = NEIGHBOURS) -> Floats:
    """Spatial smoothing: each tile's scores become the mean over its k nearest, itself included.

    Where several tiles lie equally far and not all have a place among the k, they share the places
    that are left, so that no direction is preferred and the order of the tiles does not matter. On
    a full square grid with k = 8 that is the tile, its four sides, and three quarters of each of
    its four corners.

    Args:
        scores: `[n, K]`.
        coords: `[n, 2]` x, y of the tiles, in one unit.
        k: Number of tiles that are averaged; all of them where there are fewer.

    Returns:
        `[n, K]`.

    Raises:
        GloVLMError: The lengths differ, or k is below 1.
    """
    values = _checked(scores)
    places = np.asarray(coords, np.float64)
    if places.shape != (len(values), 2) or k < 1:
        raise GloVLMError(
            f"Expected coords [{len(values)}, 2] for {len(values)} tiles and k of 1 or more, found "
            f"{list(places.shape)} and {k}."
        )
    k = min(k, len(values))
    tree = cKDTree(places)
    smooth = np.empty_like(values)
    for first in range(0, len(values), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        near, weight = _neighbours(tree, places[chunk], k)
        smooth[chunk] = np.einsum("nm,nmk->nk", weight, values[near]) / k
    return smooth


def _neighbours(tree: Any, places: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """Indices `[n, m]` of the tiles that may have a place, and weights `[n, m]` that sum to k."""
    n_near = min(2 * k + 4, tree.n)
    while True:
        distance, near = tree.query(places, k=np.arange(1, n_near + 1))
        last = distance[:, k - 1 : k]
        tied = np.isclose(distance, last, rtol=1e-9, atol=0)
        if n_near == tree.n or not tied[:, -1].any():
            break
        n_near = min(2 * n_near, tree.n)  # more tiles may lie equally far
    inside = (distance < last) & ~tied
    left = k - inside.sum(1, keepdims=True)
    return near, inside + tied * left / tied.sum(1, keepdims=True)


def pool_scores(scores: ArrayLike, j: int | None = None) -> Floats:
    """Top-j pooling: mean of the j highest scores of each class, each by its own tiles.

    Args:
        scores: `[n, K]`, any kind.
        j: Number of tiles a class; all tiles where there are fewer, or for `None` (the mean).

    Returns:
        `[K]`.

    Raises:
        GloVLMError: There is no tile, a score is not finite, or j is below 1.
    """
    values = _checked(scores)
    if j is not None and j < 1:
        raise GloVLMError(f"Expected j of 1 or more tiles, found {j}.")
    if j is None or j >= len(values):
        return values.mean(0)
    top: Floats = np.partition(values, len(values) - j, axis=0)[-j:]
    return top.mean(0)


def pool_slide(
    scores: ArrayLike,
    class_names: Sequence[str],
    *,
    j: int | None = 10,
    coords: ArrayLike | None = None,
    neighbours: int = 0,
    kind: Kind = "cosine",
    scale: float = 100.0,
) -> SlideScore:
    """Slide-level label and scores, pooled from the scores of its tiles.

    Args:
        scores: `[n, K]`: cosines of `score_tiles`, logits or probabilities of a classifier.
        class_names: `[K]`.
        j: Tiles a class, see `pool_scores`; `None` for the mean of all.
        coords: `[n, 2]`, to smooth by.
        neighbours: Number of tiles that scores are smoothed over first (MI-Zero: 8); 0 for none.
        kind: What the scores are. Probabilities of the slide are the softmax of the pooled logits,
            of the pooled cosines times `scale`, or the pooled probabilities divided by their sum.
        scale: The backbone's factor between cosines and logits.

    Raises:
        GloVLMError: The scores do not fit the classes or the coordinates.
    """
    values = _checked(scores)
    if values.shape[1] != len(class_names) or len(class_names) < 2:
        raise GloVLMError(
            f"Expected a score of each of {len(class_names)} classes (at least two), found "
            f"{values.shape[1]} columns."
        )
    if kind not in _KINDS:
        raise GloVLMError(f"Scores are {', '.join(_KINDS)}; found '{kind}'.")
    if kind == "probability" and (values.min() < -1e-6 or values.max() > 1 + 1e-6):
        raise GloVLMError("Expected probabilities between 0 and 1; are these logits?")
    if neighbours:
        if coords is None:
            raise GloVLMError("Smoothing over neighbours needs the coords of the tiles.")
        values = smooth_scores(values, coords, neighbours)
    pooled = pool_scores(values, j)
    if kind == "probability":
        share = pooled / pooled.sum() if pooled.any() else np.full(len(pooled), 1 / len(pooled))
    else:
        logits = pooled * (scale if kind == "cosine" else 1)
        powers = np.exp(logits - logits.max())
        share = powers / powers.sum()
    return SlideScore(
        label=class_names[int(pooled.argmax())],
        scores=dict(zip(class_names, map(float, pooled), strict=True)),
        probabilities=dict(zip(class_names, map(float, share), strict=True)),
        pooling="mean" if j is None else f"top_{j}",
        n_tiles=len(values),
    )


def pool_ways(
    scores: ArrayLike, class_names: Sequence[str], **options: Any
) -> dict[str, SlideScore]:
    """Slide scores by every pooling: `top_1`, `top_5`, `top_10`, `top_50`, `top_100` and `mean`.

    Which of them to use is chosen before the test is seen, or on other slides. For two ways that
    take all tiles of a small slide the scores are the same.

    Args:
        scores: `[n, K]`.
        class_names: `[K]`.
        options: Of `pool_slide`, without `j`.
    """
    pooled = (pool_slide(scores, class_names, j=j, **options) for j in (*TOP_J, None))
    return {slide.pooling: slide for slide in pooled}


def _checked(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise GloVLMError(
            "Expected finite scores [tiles, classes] of at least one tile, found an array of shape "
            f"{list(values.shape)}."
        )
    return values
