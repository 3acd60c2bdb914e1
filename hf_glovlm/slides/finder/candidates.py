"""Candidates for glomeruli: parts of a score map at many levels, and what is measured on each.

At each level the connected components of the map (the nodes of its component tree; as in Matas et
al., maximally stable extremal regions, BMVC 2002), those of a component without its thin bridges,
and the parts of one that a watershed on its distance to the border makes. A glomerulus is a convex
blob, so that each is replaced by its convex hull. Which of them is one, a second head says.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure
from skimage.feature import peak_local_max
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed

from .logistic import sigmoid

FINER = 4  # samples along a cell's side
LEVELS = (-2.0, -1.4, -0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0)  # logits
LEAST = 60  # samples of a candidate's area: some 4 cells
MEASURES = 20
_SOLID = 0.93  # area over that of the hull, below which a component is parted
_BRIDGE = 4  # samples: bridges up to twice as wide are cut
_APART = 8  # samples between the middles of two parts, at least


@dataclass(frozen=True, eq=False)
class Candidate:
    """Candidate: a convex part of a score map.

    Attributes:
        mask: `[rows, columns]` within its bounds.
        row: Its first row in the map.
        column: Its first column.
        level: Logit at which it is a component.
    """

    mask: NDArray[np.bool_]
    row: int
    column: int
    level: float

    @property
    def area(self) -> int:
        """Number of samples."""
        return int(np.count_nonzero(self.mask))

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column behind its last."""
        return self.row + self.mask.shape[0], self.column + self.mask.shape[1]

    def shared(self, other: "Candidate") -> int:
        """Number of samples that it shares with another."""
        top, left = max(self.row, other.row), max(self.column, other.column)
        (a, b), (c, d) = self.corner, other.corner
        down, across = min(a, c), min(b, d)
        if down <= top or across <= left:
            return 0
        one, two = (
            part.mask[top - part.row : down - part.row, left - part.column : across - part.column]
            for part in (self, other)
        )
        return int(np.count_nonzero(one & two))


def list_candidates(logits: NDArray[np.float64]) -> list[Candidate]:
    """Candidates of a map `[rows, columns]` of logits, each once, from the lowest level on."""
    candidates: list[Candidate] = []
    seen: set[tuple[int, ...]] = set()
    for level in LEVELS:
        labels = measure.label(logits >= level, connectivity=1)
        for part in measure.regionprops(labels):
            if part.area < LEAST:
                continue
            top, left = part.bbox[:2]
            filled = part.image_filled
            hull = convex_hull_image(filled)
            parts = [(hull, top, left)]
            if np.count_nonzero(filled) < _SOLID * np.count_nonzero(hull):
                parts += [
                    (convex_hull_image(mask), top + row, left + column)
                    for mask, row, column in _parts(filled, logits.shape, top, left)
                ]
            for mask, row, column in parts:
                key = (row, column, *mask.shape, int(np.count_nonzero(mask)))
                if key not in seen:
                    seen.add(key)
                    candidates.append(Candidate(mask, row, column, level))
    return candidates


def _parts(
    component: NDArray[np.bool_], size: tuple[int, ...], top: int, left: int
) -> Iterator[tuple[NDArray[np.bool_], int, int]]:
    """Parts of a component that is not solid: mask, and first row and column within it."""
    # Beyond the map's border a component goes on; elsewhere it ends.
    edges = (
        (top == 0, top + component.shape[0] == size[0]),
        (
            left == 0,
            left + component.shape[1] == size[1],
        ),
    )
    padded = component
    for axis, sides in enumerate(edges):
        for side, goes_on in enumerate(sides):
            width = [(0, 0), (0, 0)]
            width[axis] = (1, 0) if side == 0 else (0, 1)
            padded = np.pad(padded, width, mode="edge" if goes_on else "constant")
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(padded)[1:-1, 1:-1], 1.5)
    middles = peak_local_max(
        distance,
        min_distance=_APART,
        labels=component.astype(int),
        exclude_border=False,
        threshold_abs=_BRIDGE,
    )
    parted = []
    if len(middles) > 1:
        markers = np.zeros(component.shape, int)
        markers[tuple(middles.T)] = np.arange(1, len(middles) + 1)
        parted.append(watershed(-distance, markers, mask=component))
    opened = measure.label(ndimage.binary_erosion(component, iterations=_BRIDGE))
    parted.append(opened)
    for labels in parted:
        for part in measure.regionprops(labels):
            mask = labels == part.label
            if labels is opened:
                mask = ndimage.binary_dilation(mask, iterations=_BRIDGE) & component
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            if np.count_nonzero(mask) < LEAST:
                continue
            inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            yield inner, int(rows[0]), int(columns[0])


def measure_candidate(
    logits: NDArray[np.float64], candidate: Candidate, diameter: float
) -> list[float]:
    """What is measured on a candidate: its scores, the ring's around it, its size and its shape.

    Args:
        logits: The map.
        candidate: Of this map.
        diameter: Median diameter of the support's glomeruli, in samples.

    Returns:
        `MEASURES` numbers.
    """
    area = candidate.area
    width = max(2, round(0.18 * math.sqrt(area)))
    (down, across), pad = candidate.corner, width + 1
    top, left = max(candidate.row - pad, 0), max(candidate.column - pad, 0)
    window = logits[top : down + pad, left : across + pad]
    inside = np.zeros(window.shape, bool)
    row, column = candidate.row - top, candidate.column - left
    height, length = candidate.mask.shape
    inside[row : row + height, column : column + length] = candidate.mask
    outside = ndimage.distance_transform_edt(~inside)
    depth = ndimage.distance_transform_edt(inside)
    scores, rim = window[inside], window[inside & (depth <= width / 1.5)]
    around = window[(outside > 0) & (outside <= width)]
    around = around if len(around) else np.array([-3.0])
    shape: Any = measure.regionprops(inside.astype(np.uint8))[0]
    borders = (candidate.row == 0) + (candidate.column == 0)
    borders += (down == logits.shape[0]) + (across == logits.shape[1])
    size = math.log(math.sqrt(4 * area / math.pi) / diameter)
    mean, ring, edge = float(scores.mean()), float(around.mean()), float(rim.mean())
    return [
        mean, float(sigmoid(scores).mean()), float(np.percentile(scores, 90)),
        float(np.percentile(scores, 10)), float(scores.std()), ring, float(sigmoid(around).mean()),
        mean - ring, edge, edge - ring, size, size * size, math.log(area), float(shape.solidity),
        float(shape.eccentricity), float(shape.eccentricity**2),
        4 * math.pi * area / (float(shape.perimeter) + 1e-6) ** 2, float(borders > 0),
        float(borders > 1), candidate.level,
    ]  # fmt: skip


def best_overlaps(
    candidates: Sequence[Candidate], outlined: Sequence[NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Largest intersection over union of each candidate with any outlined glomerulus.

    Args:
        candidates: Of a map.
        outlined: Masks of the whole map.

    Returns:
        `[candidates]` in 0 ... 1; 0 where nothing is outlined.
    """
    best = np.zeros(len(candidates))
    for mask in outlined:
        total = np.count_nonzero(mask)
        for number, one in enumerate(candidates):
            down, across = one.corner
            part = mask[one.row : down, one.column : across]
            shared = np.count_nonzero(part & one.mask)
            union = one.area + total - shared
            best[number] = max(best[number], shared / union if union else 0.0)
    return best


def suppress(
    candidates: Sequence[Candidate], scores: NDArray[np.float64], least: float, overlap: float
) -> list[int]:
    """Non-maximum suppression: the surest candidates that do not lie on a surer one.

    Args:
        candidates: Of a map.
        scores: Of each.
        least: Least score.
        overlap: Share of the smaller of two beyond which the less sure one is dropped.

    Returns:
        Numbers of those kept, the surest first.
    """
    kept: list[int] = []
    areas = [one.area for one in candidates]
    for number in np.argsort(-scores, kind="stable"):
        if scores[number] < least:
            break
        one = candidates[number]
        if all(one.shared(candidates[k]) <= overlap * min(areas[number], areas[k]) for k in kept):
            kept.append(int(number))
    return kept
