"""Tile grid of a slide.

The grid comes from arithmetic: nothing here grows with the slide but the list of coordinates.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import GloVLMError
from .tissue import TissueMask
from .wsi import Slide

MAX_OVERLAP = 0.9
MAX_TILES = 20_000_000


@dataclass(frozen=True)
class TileGrid:
    """Tile grid over the tissue of a slide, row by row.

    Attributes:
        size_px: Side of a tile in pixels as it is read, before a model's own resizing.
        mpp: Micrometres per pixel of a tile; `None` where the slide's scale is unknown.
        downsample: Pixels of level 0 per pixel of a tile.
        overlap: The part of its side that a tile shares with its neighbour.
        step: Pixels of level 0 from one tile to the next.
        extent: Side of a tile in pixels of level 0.
        coords: Int64 `[n, 2]`: x, y of the upper left corner at level 0.
        tissue_fraction: Float32 `[n]`: the part of each tile that is tissue.
    """

    size_px: int
    mpp: float | None
    downsample: float
    overlap: float
    step: int
    extent: int
    coords: NDArray[np.int64]
    tissue_fraction: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.coords)


def lay_tiles(
    slide: Slide,
    mask: TissueMask,
    *,
    tile_size: int = 224,
    mpp: float | None = None,
    overlap: float = 0.0,
    min_tissue: float = 0.25,
) -> TileGrid:
    """Lay a regular grid from the slide's corner and keep the tiles with tissue.

    A tile spans a whole number of level 0 pixels, so tiles without overlap neither share a pixel
    nor leave one out. The last of a row or column may reach over the slide's edge, where it is
    white; its fraction of tissue counts the whole tile.

    Args:
        slide: The open slide.
        mask: Its tissue.
        tile_size: Side of a tile in pixels as it is read.
        mpp: Target micrometres per pixel; level 0 as it is when not given.
        overlap: The part of its side that a tile shares with the next, 0 to 0.9.
        min_tissue: Least part of a tile that is tissue, 0 to 1; 0 keeps every tile.

    Raises:
        GloVLMError: An impossible setting, a target scale for a slide of unknown scale, more
            than 20 million tiles, or no tile with tissue.
    """
    if tile_size < 1 or not 0 <= overlap <= MAX_OVERLAP or not 0 <= min_tissue <= 1:
        raise GloVLMError(
            f"Expected a tile of at least 1 pixel, an overlap from 0 to {MAX_OVERLAP} and a least "
            f"tissue from 0 to 1, found {tile_size}, {overlap} and {min_tissue}."
        )
    if mpp is not None and not 0 < mpp < math.inf:
        raise GloVLMError(f"Expected a positive number of micrometres per pixel, found {mpp}.")
    if mpp is not None and slide.mpp is None:
        raise GloVLMError(
            f"Tiles of {mpp:g} micrometres per pixel were asked for, and the scale of {slide.path} "
            "is unknown: give it with --mpp, or cut level 0 as it is."
        )
    scale = 1.0 if mpp is None or slide.mpp is None else mpp / slide.mpp
    extent = max(1, round(tile_size * scale))
    step = max(1, round(extent * (1 - overlap)))
    lines = [_starts(side, extent, step) for side in slide.size]
    if len(lines[0]) * len(lines[1]) > MAX_TILES:
        raise GloVLMError(
            f"{slide.path} would give {len(lines[0]) * len(lines[1]):,} tiles, at most "
            f"{MAX_TILES:,}: take larger tiles, a coarser scale or less overlap."
        )
    fractions = _tissue_fractions(mask, lines[0], lines[1], extent)
    kept = np.argwhere(fractions >= min_tissue - 1e-9)  # sums are rounded
    if not len(kept):
        raise GloVLMError(
            f"No tile of {slide.path} holds {min_tissue:.0%} tissue ({mask.fraction:.1%} of the "
            "slide is tissue): it is empty or out of focus, or lower the least tissue."
        )
    coords = np.stack([lines[0][kept[:, 1]], lines[1][kept[:, 0]]], axis=1)
    return TileGrid(
        size_px=tile_size,
        mpp=None if slide.mpp is None else slide.mpp * extent / tile_size,
        downsample=extent / tile_size,
        overlap=overlap,
        step=step,
        extent=extent,
        coords=coords,
        tissue_fraction=fractions[kept[:, 0], kept[:, 1]].astype(np.float32),
    )


def _starts(side: int, extent: int, step: int) -> NDArray[np.int64]:
    """Tile origins along an axis, so that the last tile reaches the edge."""
    return np.arange(1 + max(0, math.ceil((side - extent) / step)), dtype=np.int64) * step


def _tissue_fractions(
    mask: TissueMask, x: NDArray[np.int64], y: NDArray[np.int64], extent: int
) -> NDArray[np.float64]:
    """Tissue fraction of every tile, `[rows, columns]`.

    Sums over rectangles by a summed-area table (Crow 1984), interpolated between pixels of the
    mask, which is exact as tissue is constant within one.
    """
    rows, columns = mask.array.shape
    table = np.zeros((rows + 1, columns + 1))
    table[1:, 1:] = mask.array.cumsum(0, dtype=np.float64).cumsum(1)
    across = _interpolate(table.T, np.stack([x, x + extent]) / mask.downsample[0], columns)
    widths = (across[1] - across[0]).T  # [rows + 1, tiles in a row]
    down = _interpolate(widths, np.stack([y, y + extent]) / mask.downsample[1], rows)
    area: NDArray[np.float64] = (down[1] - down[0]) * mask.downsample[0] * mask.downsample[1]
    return np.clip(area / extent**2, 0, 1)


def _interpolate(table: NDArray[Any], at: NDArray[Any], end: int) -> NDArray[Any]:
    """Linear interpolation of a table's rows, `[*at.shape, columns]`, constant beyond the end."""
    at = np.minimum(at, end)
    low = np.minimum(at.astype(np.int64), end - 1)
    part = (at - low)[..., None]
    rows: NDArray[Any] = table[low] * (1 - part) + table[low + 1] * part
    return rows
