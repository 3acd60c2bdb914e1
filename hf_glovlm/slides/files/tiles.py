"""Tissue mask and tile grid of a slide.

The mask comes from an overview of bounded size, the grid from arithmetic: nothing here grows with
the slide but the list of coordinates.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ...errors import GloVLMError
from .wsi import Slide

MAX_OVERLAP = 0.9
MAX_TILES = 20_000_000
# Whatever Otsu's threshold, thinner than the first is glass and denser than the second is tissue:
# one dark fold moves his threshold. In optical density, as `find_tissue` measures it.
DENSITY_RANGE = (0.06, 0.25)


@dataclass(frozen=True)
class TissueMask:
    """Tissue mask on the overview of a slide.

    Attributes:
        array: Boolean `[rows, columns]`.
        downsample: Pixels of level 0 per pixel of the mask, `(x, y)`.
        threshold: The density above which a pixel counts as tissue.
    """

    array: NDArray[np.bool_]
    downsample: tuple[float, float]
    threshold: float

    @property
    def fraction(self) -> float:
        """Tissue fraction of the slide."""
        return float(self.array.mean())


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


def find_tissue(
    slide: Slide, *, max_side: int = 2048, min_speck: int = 64, max_hole: int = 256
) -> TissueMask:
    """Segment tissue from glass and pen on an overview of the slide.

    How much the most absorbed channel is darker than the glass, in optical density, plus its lead
    over the least absorbed one (colour separates pale eosin from shadow), is split by Otsu's
    threshold (Otsu 1979) within `DENSITY_RANGE`. Ink is no tissue: near black, or saturated blue or
    green with hardly any red. An empty slide gives an empty mask. Shadows of a cover slip and folds
    count as tissue.

    Args:
        slide: The open slide.
        max_side: Of the overview, in pixels.
        min_speck: Connected tissue of fewer pixels of the overview is dropped.
        max_hole: Enclosed glass of at most as many is filled.
    """
    # Of a small slide a quarter of the size is enough: single nuclei are neither ink nor specks.
    side = min(max_side, max(512, max(slide.size) // 4))
    overview = np.asarray(slide.thumbnail(side), np.float32)
    smooth = ndimage.gaussian_filter(overview, (1, 1, 0))
    glass = _glass_colour(smooth)
    absorbed = -np.log10(np.maximum(smooth, 1) / glass)
    density = 2 * absorbed.max(-1) - absorbed.min(-1)
    ink = ndimage.binary_dilation(_without_small(_is_ink(smooth), min_speck), iterations=3)
    usable = density[~ink]
    threshold = float(np.clip(_otsu(usable), *DENSITY_RANGE))
    tissue = (density > threshold) & ~ink
    tissue = _without_small(tissue, min_speck)
    tissue = ~_without_small(~tissue, max_hole + 1, edge_counts=True) & ~ink
    height, width = tissue.shape
    return TissueMask(tissue, (slide.size[0] / width, slide.size[1] / height), threshold)


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


def _glass_colour(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour of empty glass `[3]`: the median of what is bright and grey, else white."""
    bright = (image.min(-1) >= 200) & (np.ptp(image, axis=-1) <= 25)
    if bright.mean() < 0.01:
        return np.full(3, 255, np.float32)
    colour: NDArray[np.float32] = np.median(image[bright], axis=0)
    return colour


def _is_ink(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    red, green, blue = np.moveaxis(image, -1, 0)
    black = (image.max(-1) < 75) & (np.ptp(image, axis=-1) < 35)
    blue_ink = (red < 90) & (blue > red + 80) & (blue > green + 20)
    green_ink = (red < 110) & (green > red + 40) & (green > blue + 10)
    ink: NDArray[np.bool_] = black | blue_ink | green_ink
    return ink


def _otsu(values: NDArray[np.float32]) -> float:
    """Otsu's threshold, which separates two groups best; 0 where there is one value."""
    if values.size == 0 or values.max() <= values.min():
        return 0.0
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    apart = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * apart**2))])


def _without_small(
    mask: NDArray[np.bool_], least: int, *, edge_counts: bool = False
) -> NDArray[np.bool_]:
    """Remove small connected components; with `edge_counts` those at the edge stay."""
    labels, n = ndimage.label(mask)
    large = np.bincount(labels.ravel(), minlength=n + 1) >= least
    if edge_counts:  # glass that goes on beyond the edge is no hole
        edge = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        large[np.unique(np.concatenate(edge))] = True
    large[0] = False
    kept: NDArray[np.bool_] = large[labels]
    return kept
