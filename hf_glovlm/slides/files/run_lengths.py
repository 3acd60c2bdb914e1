"""Run-length masks (RLE) of COCO: decoded, and traced along the sides of their pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .geojson import FARTHEST, Unusable
from .shapes import ring_area

MOST_PIXELS = 2**25  # of the box around a mask; a human glomerulus has some two millions
MOST_PIECES = 1000
_LONGEST = 12  # characters of one number: 60 bits

Corners = list[list[list[int]]]  # rings of one piece: the outline, then its holes


def trace_mask(segmentation: Any) -> list[Corners]:
    """Polygons along the sides of the pixels of a COCO run-length mask.

    A piece is what shares sides (not corners) of its pixels. Every polygon fills exactly the
    pixels that the mask holds, in pixels of its image.

    Args:
        segmentation: `{"size": [height, width], "counts"}`; the counts, column by column, of
            pixels outside and inside in turn: numbers, or text as COCO's own tools compress them.

    Returns:
        Of each piece its closed rings.

    Raises:
        Unusable: Not of that form, empty, or too large.
    """
    height, width = _size_of(segmentation)
    counts = segmentation.get("counts")
    numbers = _decode_text(counts) if isinstance(counts, str) else counts
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unusable("a mask whose run lengths cannot be read")
    if sum(numbers) != height * width:
        raise Unusable("a mask whose run lengths do not fill its size")
    mask, (x, y) = _paint(np.array(numbers, np.int64), height)
    pieces, n = ndimage.label(mask)
    if n > MOST_PIECES:
        raise Unusable(f"a mask of more than {MOST_PIECES} pieces")
    traced = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(pieces), start=1):
        rings = _trace(pieces[rows, columns] == number, x + columns.start, y + rows.start)
        outer = max(range(len(rings)), key=lambda i: ring_area(np.array(rings[i], np.float64)))
        traced.append([rings[outer], *rings[:outer], *rings[outer + 1 :]])
    return traced


def _size_of(segmentation: Any) -> tuple[int, int]:
    """Height and width that a mask states."""
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    sides = size if isinstance(size, list) else []
    if len(sides) != 2 or not all(type(n) is int and 0 < n <= FARTHEST for n in sides):
        raise Unusable("a mask without a size [height, width]")
    return sides[0], sides[1]


def _decode_text(text: str) -> list[int]:
    """Run lengths of COCO's compressed text.

    Each number is written in groups of five bits, the lowest first, as the characters from `0` on:
    the sixth bit says that more follow, and the highest of the five, at the end, that the number is
    negative. From the fourth number on it is the difference from the last but one.
    """
    numbers: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift == 5 * _LONGEST:
            raise Unusable("a mask whose run lengths cannot be read")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = shift = 0
    if shift:
        raise Unusable("a mask whose run lengths cannot be read")
    return numbers


def _paint(counts: NDArray[np.int64], height: int) -> tuple[NDArray[np.bool_], tuple[int, int]]:
    """The box `[rows, columns]` around what a mask holds, and its corner x, y."""
    ends = np.cumsum(counts)
    first, last = ends[:-1:2], ends[1::2]  # of the runs inside
    first = first[: len(last)]
    there = last > first
    first, last = first[there], last[there] - 1  # the last pixel itself
    if not len(first):
        raise Unusable("a mask that holds nothing")
    left, right = first // height, last // height
    several = bool((right > left).any())  # a run over columns reaches from the bottom to the top
    x0, x1 = int(left.min()), int(right.max())
    y0 = 0 if several else int((first % height).min())
    y1 = height - 1 if several else int((last % height).max())
    if (x1 - x0 + 1) * (y1 - y0 + 1) > MOST_PIXELS:
        raise Unusable(f"a mask of more than {MOST_PIXELS >> 20} million pixels")
    times = right - left + 1
    column = np.repeat(left, times) + _steps(times)
    top = np.where(column == np.repeat(left, times), np.repeat(first % height, times), 0)
    bottom = np.where(
        column == np.repeat(right, times), np.repeat(last % height, times), height - 1
    )
    change = np.zeros((y1 - y0 + 2, x1 - x0 + 1), np.int8)
    np.add.at(change, (top - y0, column - x0), 1)
    np.add.at(change, (bottom - y0 + 1, column - x0), -1)
    return np.cumsum(change, axis=0, dtype=np.int8)[:-1] > 0, (x0, y0)


def _steps(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[2, 3]` -> `[0, 1, 0, 1, 2]`."""
    return np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)


def _trace(mask: NDArray[np.bool_], x: int, y: int) -> list[list[list[int]]]:
    """Closed rings around one piece and its holes.

    Along each row of the pixels' corners, those at which the outline turns pair off, in order, to
    its horizontal sides; down each column to its vertical ones. Where two pixels of the piece meet
    in a corner alone, that corner counts twice, once for each.
    """
    padded = np.pad(mask, 1)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    meeting = (a == d) & (b == c) & (a != b)
    rows, columns = np.nonzero((a ^ b ^ c ^ d) | meeting)
    twice = meeting[rows, columns]
    along = a[rows, columns]  # whether the two that meet lie upper left and lower right
    # The first copy is of the upper pixel; it ends the side that comes from the left or the one
    # that goes to the right.
    row = np.concatenate([rows, rows[twice]])
    column = np.concatenate([columns, columns[twice]])
    lower = np.concatenate([np.zeros(len(rows), np.int64), np.ones(int(twice.sum()), np.int64)])
    right = np.concatenate([np.where(twice & ~along, 1, 0), np.where(along[twice], 1, 0)])
    across, down = np.lexsort((right, column, row)), np.lexsort((lower, row, column))
    beside, below = _partners(across), _partners(down)
    rings = []
    free = [True] * len(row)
    place = np.stack([column + x, row + y], axis=1).tolist()
    for start in range(len(row)):
        if not free[start]:
            continue
        ring, at = [], start
        while free[at]:
            free[at] = False
            ring.append(place[at])
            at = beside[at]
            free[at] = False
            ring.append(place[at])
            at = below[at]
        rings.append([*ring, ring[0]])
    return rings


def _partners(order: NDArray[np.int64]) -> list[int]:
    """For each corner the other end of its side; they follow each other in pairs."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    ends: list[int] = partner.tolist()
    return ends
