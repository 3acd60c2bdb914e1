"""Synthetic slides of Leica (SCN), whose scanned part lies somewhere on an empty canvas."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

Array = NDArray[np.uint8]
_SCN = "http://www.leica-microsystems.com/scn/2010/10/01"
_NANOMETRES = 500  # per pixel


def write_scn(path: Path, size: tuple[int, int], regions: Sequence[tuple[int, int, Array]]) -> None:
    """Write a slide of Leica (SCN) that OpenSlide opens: scanned regions on an empty canvas.

    Args:
        path: Where to write.
        size: Width and height of level 0, even, at 0.5 micrometres per pixel.
        regions: Left and upper edge of each, even, and its pixels `[h, w, 3]` of even sides.
    """
    macro = np.full((size[1] // 16, size[0] // 16, 3), 230, np.uint8)
    pages = [macro]
    images = [_scn_image("macro", [macro], 0, (0, 0), size)]
    for i, (x, y, pixels) in enumerate(regions):
        levels = [pixels, pixels[::2, ::2]]
        extent = pixels.shape[1], pixels.shape[0]
        images.append(_scn_image(f"region {i}", levels, len(pages), (x, y), extent))
        pages += levels
    canvas = f'sizeX="{size[0] * _NANOMETRES}" sizeY="{size[1] * _NANOMETRES}"'
    text = (
        f'<?xml version="1.0"?><scn xmlns="{_SCN}" uuid="a"><collection name="a" uuid="a" {canvas}>'
        f"<barcode>MQ==</barcode>{''.join(images)}</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for i, page in enumerate(pages):
            file.write(
                page,
                photometric="rgb" if page.ndim == 3 else "minisblack",
                tile=(64, 64),
                compression="deflate",
                description=None if i else text,
                resolution=(1e7 / _NANOMETRES, 1e7 / _NANOMETRES),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _scn_image(
    name: str, levels: list[Array], first: int, at: tuple[int, int], extent: tuple[int, int]
) -> str:
    """Image element: its pages from `first`, and where it lies on the canvas."""
    pixels = [
        f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{r}" ifd="{first + r}"/>'
        for r, level in enumerate(levels)
    ]
    x, y, width, height = (_NANOMETRES * side for side in (*at, *extent))
    return (
        f'<image name="{name}" uuid="{name}"><creationDate>2011-01-01T00:00:00Z</creationDate>'
        '<device model="SCN400" version="1"/>'
        f'<pixels sizeX="{levels[0].shape[1]}" sizeY="{levels[0].shape[0]}">{"".join(pixels)}'
        f'</pixels><view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}" '
        'spacingZ="0"/><scanSettings><objectiveSettings><objective>20</objective>'
        "</objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "</scanSettings></image>"
    )
