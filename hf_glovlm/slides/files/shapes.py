"""Shapes: polygons in pixels, their area, and which of many lie on or in one another.

Work is bounded: outlines are compared with those near them alone, on rasters of one size.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...errors import GloVLMError

Ring: TypeAlias = NDArray[np.float64]  # [points, 2]: x, y; the first point stands again at the end
Polygon: TypeAlias = tuple[Ring, ...]  # the outline, then its holes
Polygons: TypeAlias = Sequence[Polygon]
Bounds: TypeAlias = tuple[float, float, float, float]  # x0, y0, x1, y1

MOST_PAIRS = 5_000_000  # of outlines near each other; real slides have some thousands
_RASTER = 256  # pixels along the longer side, when the overlap of two outlines is measured
_COARSE = 1024  # the same, when it is asked what lies inside a large one
_LINES = 256  # across an outline that crosses itself
_MOST_CROSSINGS = 20_000_000  # of its edges with these lines; fewer lines beyond
_AT_ONCE = 4_000_000  # of an outline's edges with the rows of a raster
_MANY = 2048  # points beyond which those that fall on one pixel are merged


def ring_area(ring: Ring) -> float:
    """Area inside a closed ring `[points, 2]`, by the shoelace formula; at least 0."""
    x, y = (ring - ring[0]).T  # far from the slide's corner the products would lose digits
    return 0.5 * abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1]))


def filled_area(ring: Ring) -> float:
    """Area that a closed ring fills by the even-odd rule, as it is drawn.

    The shoelace formula where the ring turns once, as every ring does that does not cross itself;
    else the sum over 256 lines across at most, good to about a percent.
    """
    if abs(_turns(ring)) == 1:
        return ring_area(ring)
    low, height = float(ring[:, 1].min()), float(np.ptp(ring[:, 1]))
    if height == 0:
        return 0.0
    lines = _LINES
    while True:
        scaled = (ring - (0, low)) * (1, lines / height)
        first, times = _lines_across(scaled, 0, lines)
        if times.sum() <= _MOST_CROSSINGS or lines == 1:
            break
        lines //= 2
    x, line = _crossings(scaled, first, times)
    x = x[np.lexsort((x, line))]
    return float((x[1::2] - x[::2]).sum()) * height / lines


def fill(
    shape: Polygons, x0: float, y0: float, scale: float, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Pixels `[height, width]` whose middle lies in a shape, moved by `x0, y0` and scaled.

    Each ring is filled by the even-odd rule; holes are taken off their own polygon. `draw` is
    quicker and also takes the pixels that an edge touches.
    """
    total = np.zeros((size[1], size[0]), bool)
    for outline, *holes in shape:
        part = np.zeros_like(total) if holes else total
        _fill_ring(part, (outline - (x0, y0)) * scale, True)
        for hole in holes:
            _fill_ring(part, (hole - (x0, y0)) * scale, False)
        if holes:
            total |= part
    return total


def _fill_ring(raster: NDArray[np.bool_], ring: Ring, value: bool, top: int = 0) -> None:
    """Set the pixels of a raster, or of its rows from `top` on, whose middle lies in a ring."""
    height, width = raster.shape
    first, times = _lines_across(ring, top, top + height)
    if times.sum() > _AT_ONCE and height > 1:
        half = height // 2
        _fill_ring(raster[:half], ring, value, top)
        _fill_ring(raster[half:], ring, value, top + half)
        return
    x, line = _crossings(ring, first, times)
    if not len(x):
        return
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    left, start = int(column.min()), int(line.min())
    changes = np.zeros((int(line.max()) - start + 1, int(column.max()) - left + 1), np.uint8)
    np.bitwise_xor.at(changes, (line - start, column - left), 1)
    inside = np.bitwise_xor.accumulate(changes[:, :-1], axis=1).astype(bool)
    rows, columns = inside.shape
    start -= top
    raster[start : start + rows, left : left + columns][inside] = value


def _lines_across(ring: Ring, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lines y = k + 0.5 that each edge of a closed ring crosses, `start` <= k < `stop`.

    Returns:
        The first k and the number of lines of each edge, `[points - 1]`.
    """
    y0, y1 = ring[:-1, 1], ring[1:, 1]
    first, last = (
        np.clip(np.ceil(end - 0.5), start, stop).astype(np.int64)
        for end in (np.minimum(y0, y1), np.maximum(y0, y1))
    )
    return first, last - first


def _crossings(
    ring: Ring, first: NDArray[np.int64], times: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Where edges cross the lines of `_lines_across`: x, and k of the line, of each crossing."""
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    edge = np.repeat(np.arange(len(times)), times)
    line = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(times) - times, times)
    y = line + 0.5
    return x0[edge] + (y - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge]), line


def _turns(ring: Ring) -> int:
    """Turning number of a closed ring: 1 or -1 unless it crosses itself (Whitney, 1937)."""
    steps = np.diff(ring, axis=0)
    steps = steps[steps.any(axis=1)]
    if len(steps) < 3:
        return 0
    along = np.concatenate([steps[1:], steps[:1]])
    cross = steps[:, 0] * along[:, 1] - steps[:, 1] * along[:, 0]
    return round(float(np.arctan2(cross, (steps * along).sum(axis=1)).sum()) / (2 * math.pi))


def overlap_of(one: Polygons, a: Bounds, other: Polygons, b: Bounds) -> float:
    """Intersection over union of two shapes with their bounds, 0 to 1.

    Measured on a raster of about 256 pixels along the longer side of what both cover: good to a few
    hundredths, less for slivers.
    """
    if min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]):
        return 0.0
    x0, y0, x1, y1 = min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
    scale = _RASTER / max(x1 - x0, y1 - y0)
    size = math.ceil((x1 - x0) * scale) + 1, math.ceil((y1 - y0) * scale) + 1
    masks = [draw(shape, x0, y0, scale, size) for shape in (one, other)]
    union = np.count_nonzero(masks[0] | masks[1])
    return np.count_nonzero(masks[0] & masks[1]) / union if union else 0.0


def share_inside(
    shapes: Sequence[Polygons], outer: Polygons, bounds: Bounds
) -> NDArray[np.float64]:
    """Share `[n]` of each shape's points and middle that lies inside a larger one, 0 to 1.

    Args:
        shapes: The smaller ones.
        outer: The larger one, drawn once at about 1,024 pixels along its longer side.
        bounds: Of the larger one.
    """
    x0, y0, x1, y1 = bounds
    scale = _COARSE / max(x1 - x0, y1 - y0)
    size = math.ceil((x1 - x0) * scale) + 1, math.ceil((y1 - y0) * scale) + 1
    mask = draw(outer, x0, y0, scale, size)
    shares = []
    for shape in shapes:
        points = np.concatenate([polygon[0][:-1] for polygon in shape])
        points = np.concatenate([points[:: max(len(points) // 64, 1)], [points.mean(axis=0)]])
        x, y = np.floor((points - (x0, y0)) * scale).astype(np.int64).T
        inside = (x >= 0) & (y >= 0) & (x < size[0]) & (y < size[1])
        shares.append(float(mask[y[inside], x[inside]].sum()) / len(points))
    return np.array(shares)


def draw(
    shape: Polygons, x0: float, y0: float, scale: float, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Raster `[height, width]` of a shape, moved by `x0, y0` and scaled."""
    total = Image.new("1", size)
    canvas = ImageDraw.Draw(total)
    for outline, *holes in shape:
        rings = [_points(ring, x0, y0, scale) for ring in (outline, *holes)]
        if not holes:
            canvas.polygon(rings[0].ravel().tolist(), fill=1)
            continue
        corner = np.floor(rings[0].min(axis=0)).astype(int)
        far = np.ceil(rings[0].max(axis=0)).astype(int)
        part = Image.new("1", (int(far[0] - corner[0]) + 1, int(far[1] - corner[1]) + 1))
        own = ImageDraw.Draw(part)
        for i, ring in enumerate(rings):
            own.polygon((ring - corner).ravel().tolist(), fill=int(i == 0))
        total.paste(1, (int(corner[0]), int(corner[1])), part)
    return np.asarray(total)


def _points(ring: Ring, x0: float, y0: float, scale: float) -> Ring:
    points: Ring = (ring - (x0, y0)) * scale
    if len(points) > _MANY:
        places = np.round(4 * points)
        moved = np.concatenate([[True], (places[1:] != places[:-1]).any(axis=1)])
        points = points[moved]
    return points if len(points) > 1 else np.repeat(points, 2, axis=0)


def meeting_pairs(bounds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pairs of boxes that meet, each once, by place: `[m, 2]` of row numbers.

    A box stands in a grid whose cells have at least its longer side, and is compared with the boxes
    of its own grid and of the coarser ones in the four cells at most that it touches.

    Args:
        bounds: `[n, 4]`: x0, y0, x1, y1.

    Raises:
        GloVLMError: More than `MOST_PAIRS` are near each other.
    """
    sides = np.maximum(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1])
    levels = np.ceil(np.log2(np.maximum(sides, 1.0))).astype(np.int64)
    pairs = [np.empty((0, 2), np.int64)]
    count = 0
    for level in np.unique(levels).tolist():
        rows = np.flatnonzero(levels <= level)
        cells, places = _cells(bounds[rows], 2.0**level)
        own = levels[rows[places]] == level
        order = np.argsort(cells[own], kind="stable")
        there, longer = cells[own][order], rows[places[own]][order]
        start, stop = np.searchsorted(there, cells), np.searchsorted(there, cells, "right")
        count += int((stop - start).sum())
        if count > MOST_PAIRS:
            raise GloVLMError(
                f"More than {MOST_PAIRS:,} pairs of outlines lie on one another: that is no file "
                "of glomeruli. Export the annotations alone, without cells or tiles."
            )
        one = np.repeat(rows[places], stop - start)
        step = np.arange(len(one)) - np.repeat(
            np.cumsum(stop - start) - (stop - start), stop - start
        )
        other = longer[np.repeat(start, stop - start) + step]
        once = (levels[one] < level) | (one < other)  # of one level each finds the other
        one, other = one[once], other[once]
        low = np.maximum(bounds[one, :2], bounds[other, :2])
        high = np.minimum(bounds[one, 2:], bounds[other, 2:])
        meet = (low < high).all(axis=1)
        pairs.append(np.stack([one[meet], other[meet]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)  # two may share several cells


def _cells(bounds: NDArray[np.float64], side: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the grid cells that boxes touch, and the row of each; four a box at most."""
    low = np.floor(bounds[:, :2] / side).astype(np.int64)
    high = np.floor(bounds[:, 2:] / side).astype(np.int64)
    corner = low.min(axis=0)
    width = int(high[:, 1].max() - corner[1]) + 1
    cells, rows = [], []
    for right in (0, 1):
        for down in (0, 1):
            touched = np.flatnonzero((high - low >= (right, down)).all(axis=1))
            column, row = (low[touched] + (right, down) - corner).T
            cells.append(column * width + row)
            rows.append(touched)
    return np.concatenate(cells), np.concatenate(rows)
