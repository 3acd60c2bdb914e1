"""Crop images: the square around an outlined object, with the outline as its alpha channel.

One rule for the crops of a training set and for those that a model classifies on a slide: the same
object gives the same image, to the bit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...data.columns import OUTLINE
from ...data.listing import few
from ...data.outlines import outlined
from .shapes import Bounds

MAX_SIDE = 2048  # a larger crop is shrunk to this many pixels

Square = tuple[int, int, int]  # x, y and side in pixels of level 0
# From x0, y0 (level 0), pixels per pixel of level 0 and a size: the pixels inside, as `shapes.fill`
Fill = Callable[[float, float, float, tuple[int, int]], NDArray[np.bool_]]


class Picture(Protocol):
    """Slide or region image that crops are read from."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""

    def read(
        self, x: int, y: int, width: int, height: int, *, downsample: float = 1.0
    ) -> Image.Image:
        """Read a part, white beyond the picture, see `wsi.Slide.read`."""


def crop_square(bounds: Bounds, margin: float) -> Square:
    """Square crop around an object: x, y and side, `margin` times the longer side of its bounds."""
    x0, y0, x1, y1 = bounds
    side = max(round(margin * max(x1 - x0, y1 - y0)), 1)
    return round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side


def crop_downsample(side: int, max_side: int = MAX_SIDE) -> float:
    """Pixels of level 0 per pixel of a crop: 1 unless it would be larger than `max_side`."""
    return max(side / max_side, 1.0)


def read_crop(
    picture: Picture,
    square: Square,
    fill: Fill | None,
    *,
    structure: str | None = None,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Read a square and what lies inside the outline of its object.

    A pixel is inside where its middle is, on the picture itself: what lies beyond its edge is white
    and outside. Where no pixel is, as in an outline thinner than a pixel, the one in the middle of
    the square stands for the object, see `is_speck`.

    Args:
        picture: Where it lies.
        square: See `crop_square`.
        fill: Pixels inside the outline, of this object alone; `None`: no outline is wanted.
        structure: `capsule`, `tuft`, or `None` where that is not stated.
        max_side: A larger square is shrunk to this many pixels.

    Returns:
        RGBA of at most `max_side` pixels a side: the whole square, and 255 inside, 0 outside.
        `info["outline"]` is what was given, or `unstated`. Without `fill` RGB.
    """
    x, y, side = square
    image = picture.read(x, y, side, side, downsample=crop_downsample(side, max_side))
    if fill is None:
        return image
    scale = image.width / side
    inside = fill(x, y, scale, image.size)
    middles = (np.arange(image.width) + 0.5) / scale
    columns, rows = (
        (middles + start >= 0) & (middles + start < length)
        for start, length in zip((x, y), picture.size, strict=True)
    )
    inside &= rows[:, None] & columns
    if not inside.any():
        inside[_middle_of(rows), _middle_of(columns)] = True
    return outlined(image, inside, structure)


def _middle_of(there: NDArray[np.bool_]) -> int:
    """Place nearest to the middle that is there, or the middle where none is."""
    places = np.flatnonzero(there if there.any() else ~there)
    return int(places[np.abs(places - len(there) // 2).argmin()])


def is_speck(crop: Image.Image) -> bool:
    """Whether an outline holds no more than one pixel of its crop, so that it shows nothing."""
    return crop.mode == "RGBA" and crop.getchannel("A").histogram()[255] <= 1


def describe_specks(ids: Sequence[str]) -> list[str]:
    """Sentence on objects whose crops show nothing inside the outline, see `is_speck`."""
    if not ids:
        return []
    return [
        f"{len(ids)} outlines hold no more than a pixel of their crop ({few(ids)}), so the inside "
        "shows nothing: correct or delete them."
    ]


def write_crop(crop: Image.Image, target: Path | BinaryIO, *, packed: bool = True) -> None:
    """Write a crop as a PNG: RGB under any alpha is kept; the text `outline` is that of `info`.

    Args:
        crop: Of `read_crop`.
        target: A file or stream.
        packed: Small, and not at once.
    """
    about = PngInfo()
    about.add_text(OUTLINE, crop.info[OUTLINE])
    crop.save(target, "PNG", pnginfo=about, compress_level=6 if packed else 0)
