"""Windows of a slide at a finder's scale, and one outline from what several of them show.

Windows overlap by more than the largest glomerulus of the support, so that each glomerulus lies
whole in one of them. What the border of a window cuts, and not the slide's, is taken from the
window that shows it whole.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import shapely
from numpy.typing import NDArray

from ..files.tissue import TissueMask
from .agreement import NEAR_BORDER
from .regions import Detection

Box: TypeAlias = tuple[int, int, int, int]  # x, y, width, height in pixels of level 0

SIDE = 1344  # working pixels of a window, at least: patches of 14 and of 16 divide it
SPARE = 1.25  # overlap of windows over the largest diameter of the support
SAME = 0.5  # part of the smaller of two outlines that both show, from which they are one object
MEETING = 0.1  # and from which two parts that windows cut are of one object
DECIMALS = 2  # of coordinates, as QuPath keeps them


@dataclass(frozen=True)
class WindowGrid:
    """Windows of a slide, row by row.

    Attributes:
        size: Width and height of the slide at level 0.
        downsample: Pixels of level 0 per working pixel.
        overlap: Of neighbours, in working pixels.
        boxes: At level 0; those without tissue are not among them.
    """

    size: tuple[int, int]
    downsample: float
    overlap: int
    boxes: Sequence[Box]


@dataclass(frozen=True)
class Part:
    """What one window shows of a glomerulus.

    Attributes:
        ring: Closed, `[points][2]` in pixels of level 0.
        score: In 0 ... 1.
        cut: Whether the slide's border cuts it.
        open: Whether the window's border does, and not the slide's.
    """

    ring: Sequence[Sequence[float]]
    score: float
    cut: bool = False
    open: bool = False

    def describe(self) -> dict[str, Any]:
        """Plain values, from which `read_part` makes it again."""
        return {"ring": self.ring, "score": self.score, "cut": self.cut, "open": self.open}


def read_part(values: Mapping[str, Any]) -> Part:
    """Part that `describe` described.

    Raises:
        KeyError, TypeError, ValueError: It did not.
    """
    ring = [[float(x), float(y)] for x, y in values["ring"]]
    return Part(ring, float(values["score"]), bool(values["cut"]), bool(values["open"]))


@dataclass(frozen=True)
class JoinedParts:
    """Glomeruli of a slide, each once.

    Attributes:
        objects: From top to bottom.
        repeats: Parts that show what another one shows, and are not among them.
        unconfirmed: Parts cut by a window's border that no neighbour confirmed.
        joined: Objects larger than the overlap, of parts of several windows.
    """

    objects: list[Part]
    repeats: int = 0
    unconfirmed: int = 0
    joined: int = 0


def lay_windows(
    size: tuple[int, int],
    downsample: float,
    largest: float,
    tissue: TissueMask | None = None,
) -> WindowGrid:
    """Lay windows over the tissue of a slide, spread evenly from edge to edge.

    Args:
        size: Width and height of the slide at level 0.
        downsample: Pixels of level 0 per working pixel.
        largest: Largest diameter of a glomerulus of the support, in working pixels.
        tissue: Of the slide; without, every window is laid.
    """
    overlap = math.ceil(SPARE * largest)
    side = max(SIDE, 3 * overlap)
    extent, step = round(side * downsample), max(round((side - overlap) * downsample), 1)
    columns, rows = (_starts(length, extent, step) for length in size)
    width, height = (min(extent, length) for length in size)
    boxes = [
        (x, y, width, height)
        for y in rows
        for x in columns
        if tissue is None or _share(tissue, (x, y, width, height)) > 0
    ]
    return WindowGrid(size, downsample, overlap, boxes)


def _starts(length: int, extent: int, step: int) -> list[int]:
    if length <= extent:
        return [0]
    count = math.ceil((length - extent) / step) + 1
    return [round(place) for place in np.linspace(0, length - extent, count).tolist()]


def _share(tissue: TissueMask, box: Box) -> float:
    """Part of a box that is tissue."""
    x, y, width, height = box
    across, down = tissue.downsample
    columns = slice(math.floor(x / across), math.ceil((x + width) / across))
    rows = slice(math.floor(y / down), math.ceil((y + height) / down))
    inside = tissue.array[rows, columns]
    return float(inside.mean()) if inside.size else 0.0


def place_detections(
    detections: Sequence[Detection],
    box: Box,
    pixels: tuple[int, int],
    slide: tuple[int, int],
) -> list[Part]:
    """Detections of a window as parts in pixels of level 0.

    Args:
        detections: In pixels of the window.
        box: The window at level 0.
        pixels: Width and height of the window as it was read.
        slide: Width and height of the slide at level 0.
    """
    corner, scale = np.array(box[:2]), np.array(box[2:]) / pixels
    at_start = np.array(box[:2]) <= 0
    at_end = np.array(box[:2]) + box[2:] >= slide
    parts = []
    for one in detections:
        low, high = one.ring.min(axis=0), one.ring.max(axis=0)
        before, behind = low <= NEAR_BORDER, high >= np.array(pixels) - 1 - NEAR_BORDER
        ring = np.clip(np.round(corner + one.ring * scale, DECIMALS), 0, slide)
        parts.append(
            Part(
                ring.tolist(),
                round(float(one.score), 6),
                cut=bool((before & at_start).any() or (behind & at_end).any()),
                open=bool((before & ~at_start).any() or (behind & ~at_end).any()),
            )
        )
    return parts


def join_parts(parts: Sequence[Part]) -> JoinedParts:
    """Join what overlapping windows show to one outline a glomerulus.

    Of outlines that show the same (more than half of the smaller one lies in the other), a whole
    one is taken before one that a window cuts, then the surest. What is cut in every window, as it
    is larger than the overlap, is joined of its parts; a part whose neighbour shows nothing there
    is left out, as the neighbour saw all of it.

    Args:
        parts: Of all windows, in their order.
    """
    shapes = np.array([_shape(part.ring) for part in parts], object)
    areas = shapely.area(shapes) if len(parts) else np.empty(0)
    first, second, share = _overlaps(shapes, areas)
    neighbours: dict[int, list[int]] = {}
    for i, j in zip(first[share > SAME].tolist(), second[share > SAME].tolist(), strict=True):
        neighbours.setdefault(i, []).append(j)
    order = sorted(range(len(parts)), key=lambda i: (parts[i].open, -parts[i].score, i))
    whole: set[int] = set()
    cut: list[int] = []
    repeats = 0
    for i in order:
        if areas[i] <= 0:
            continue
        if whole.isdisjoint(neighbours.get(i, ())):
            if parts[i].open:
                cut.append(i)
            else:
                whole.add(i)
        else:
            repeats += 1
    objects = [_plain(parts[i]) for i in whole]
    joined = unconfirmed = 0
    for group in _groups(cut, zip(first[share > MEETING], second[share > MEETING], strict=True)):
        if len(group) < 2:
            unconfirmed += 1
            continue
        union = _largest(shapely.union_all(shapes[group]))
        ring = np.round(np.asarray(union.exterior.coords), DECIMALS).tolist()
        score = max(parts[i].score for i in group)
        objects.append(Part(ring, score, any(parts[i].cut for i in group)))
        joined += 1
    objects.sort(key=lambda part: _place(part.ring))
    return JoinedParts(objects, repeats, unconfirmed, joined)


def _plain(part: Part) -> Part:
    return Part(part.ring, part.score, part.cut)


def _place(ring: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    return min(y for _, y in ring), min(x for x, _ in ring), len(ring)


def _shape(ring: Sequence[Sequence[float]]) -> Any:
    """Valid polygon of a ring; an empty one where it has no area."""
    if len(ring) < 4:
        return shapely.Polygon()
    shape = shapely.Polygon(ring)
    return shape if shape.is_valid else _largest(shapely.make_valid(shape))


def _largest(shape: Any) -> Any:
    """The largest polygon of a geometry."""
    parts = [part for part in shapely.get_parts(shape) if part.geom_type == "Polygon"]
    nested = [part for part in shapely.get_parts(shape) if part.geom_type == "MultiPolygon"]
    parts += [part for several in nested for part in shapely.get_parts(several)]
    return max(parts, key=lambda part: part.area, default=shapely.Polygon())


def _overlaps(
    shapes: NDArray[Any], areas: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of shapes that meet, in both orders, and how much of the smaller one both share."""
    if not len(shapes):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    apart = first != second
    first, second = first[apart], second[apart]
    shared = shapely.area(shapely.intersection(shapes[first], shapes[second]))
    smaller = np.minimum(areas[first], areas[second])
    return first, second, np.divide(shared, smaller, out=np.zeros_like(shared), where=smaller > 0)


def _groups(chosen: Sequence[int], pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of those chosen that pairs connect, each sorted, in the order of their first."""
    root = {i: i for i in sorted(chosen)}

    def root_of(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, j in pairs:
        if i in root and j in root:
            a, b = root_of(int(i)), root_of(int(j))
            root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in root:
        groups.setdefault(root_of(i), []).append(i)
    return list(groups.values())
