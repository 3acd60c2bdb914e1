"""From scores to glomeruli: parted, outlined as polygons, and marked where the border cuts them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from skimage import measure
from skimage.transform import resize

from ..files.shapes import Polygon, fill
from .agreement import is_cut
from .regions import Detection

_FINE = 4  # samples along a cell's side, for the share of it that an outline covers


def cover_cells(
    polygons: Sequence[tuple[Polygon, ...]], size: tuple[int, int], grid: tuple[int, int]
) -> NDArray[np.float32]:
    """Share of each cell of a grid that outlined glomeruli cover.

    Args:
        polygons: Of each glomerulus its polygons, in pixels of the picture.
        size: Width and height of the picture.
        grid: Rows and columns of the cells.

    Returns:
        `[rows, columns]` in 0 ... 1.
    """
    rows, columns = grid
    inside = np.zeros((rows * _FINE, columns * _FINE), bool)
    factor = np.array([columns * _FINE / size[0], rows * _FINE / size[1]])
    for one in polygons:
        scaled = [tuple(ring * factor for ring in polygon) for polygon in one]
        inside |= fill(scaled, 0, 0, 1.0, (columns * _FINE, rows * _FINE))
    return inside.reshape(rows, _FINE, columns, _FINE).mean((1, 3), dtype=np.float32)


def outline_components(
    scores: NDArray[np.float32],
    threshold: float,
    size: tuple[int, int],
    *,
    least: float = 0.0,
    finer: int = _FINE,
) -> list[Detection]:
    """Connected components of a score map above a threshold, as polygons.

    Args:
        scores: `[rows, columns]` in 0 ... 1.
        threshold: Cells from it on belong to a glomerulus.
        size: Width and height of the picture that the map covers.
        least: Least area of a component, in cells.
        finer: Samples along a cell's side, between which scores are interpolated.

    Returns:
        A detection for each component, its score the mean over it.
    """
    rows, columns = scores.shape
    fine = resize(scores, (rows * finer, columns * finer), order=1, mode="edge")
    labels = measure.label(fine >= threshold, connectivity=1)
    detections = []
    for part in measure.regionprops(labels, intensity_image=fine):
        if part.num_pixels < max(least * finer**2, 1):
            continue
        cell = (size[0] / fine.shape[1], size[1] / fine.shape[0])
        ring = trace(part.image_filled, (part.bbox[1], part.bbox[0]), cell)
        detections.append(
            Detection(ring, float(np.clip(part.intensity_mean, 0, 1)), is_cut(ring, size))
        )
    return detections


def trace(
    mask: NDArray[np.bool_], corner: tuple[float, float], cell: tuple[float, float]
) -> NDArray[np.float64]:
    """Outline of a mask without holes: the longest contour around it.

    Args:
        mask: `[rows, columns]`.
        corner: Its first column and row in the map.
        cell: Width and height of a cell, in pixels of the picture.

    Returns:
        Closed ring `[points, 2]` in pixels (x, y).
    """
    contour = max(measure.find_contours(np.pad(mask, 1).astype(float), 0.5), key=len)
    # A sample stands in the middle of its cell, and the padding moved it by one.
    ring: NDArray[np.float64] = (contour[:, ::-1] - 0.5 + corner) * cell
    return ring
