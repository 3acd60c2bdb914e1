"""Matching of outlines: which object of one file is which of another that was made from it.

QuPath keeps an id only where it is a UUID, writes coordinates to two decimals, may begin a ring
elsewhere, and before version 0.4 wrote no ids at all. So objects are matched by their ids where
these can be relied on, else by where they lie.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .annotations import SAME, SlideObject, overlap
from .shapes import Ring, meeting_pairs

MOVED = 1.0  # pixels of level 0 that an edge is moved by when an outline counts as drawn anew
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_AT_ONCE = 2_000_000  # distances of points from edges in memory


def match_objects(
    one: Sequence[SlideObject], other: Sequence[SlideObject]
) -> list[tuple[int, int]]:
    """Match the objects of two files, each to one at most.

    Two objects of one id are the same where the id is a UUID, or where they overlap: plain numbers
    may have been given anew. Of the others those are the same whose intersection is more than half
    of their union, the largest share first; among equal ones those of one class, then the earlier.

    Args:
        one: Objects of the first file.
        other: Objects of the second.

    Returns:
        Pairs of places in the two lists, by the first.

    Raises:
        GloVLMError: Too many lie on one another to compare them (see `shapes.meeting_pairs`).
    """
    if not one or not other:
        return []
    bounds = np.array([item.bounds for item in (*one, *other)])
    pairs = meeting_pairs(bounds)
    # A pair is sorted: one of each file is a place below len(one) and one from there on.
    across = pairs[(pairs[:, 0] < len(one)) & (pairs[:, 1] >= len(one))]
    near = {(i, j - len(one)) for i, j in across.tolist()}
    place = {item.id: j for j, item in enumerate(other)}
    matched: dict[int, int] = {}
    for i, item in enumerate(one):
        j = place.get(item.id)
        if j is None:
            continue
        if _UUID.fullmatch(item.id) or ((i, j) in near and overlap(item, other[j]) > 0):
            matched[i] = j
    used = set(matched.values())
    shares = []
    for i, j in near:
        if i in matched or j in used:
            continue
        share = overlap(one[i], other[j])
        if share > SAME:
            differs = one[i].label != other[j].label
            shares.append((-round(share, 3), differs, i, j))
    for _, _, i, j in sorted(shares):
        if i not in matched and j not in used:
            matched[i] = j
            used.add(j)
    return sorted(matched.items())


def is_redrawn(one: SlideObject, other: SlideObject) -> bool:
    """Whether an outline was changed by a person: some corner lies beside the other's edge.

    By more than `MOVED`, in either direction; so neither rounding, nor another first point, nor
    points that were put on an edge count.
    """
    first, second = (
        [ring for polygon in item.polygons for ring in polygon] for item in (one, other)
    )
    if len(first) == len(second) and all(map(np.array_equal, first, second)):
        return False
    return max(_farthest(first, second), _farthest(second, first)) > MOVED


def _farthest(rings: Sequence[Ring], others: Sequence[Ring]) -> float:
    """Largest distance of a corner of some rings from the nearest edge of others, in pixels."""
    points = np.concatenate(rings)
    start = np.concatenate([ring[:-1] for ring in others])
    step = np.concatenate([np.diff(ring, axis=0) for ring in others])
    length = np.maximum((step**2).sum(axis=1), 1e-12)
    farthest = 0.0
    for part in np.array_split(points, len(points) * len(start) // _AT_ONCE + 1):
        away: NDArray[np.float64] = part[:, None] - start  # [points, edges, 2]
        along = np.clip((away * step).sum(axis=2) / length, 0, 1)
        nearest = np.hypot(*np.moveaxis(away - along[..., None] * step, 2, 0)).min(axis=1)
        farthest = max(farthest, float(nearest.max()))
    return farthest
