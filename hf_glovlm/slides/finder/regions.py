"""Outlined regions, and what a finder outlines itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...errors import GloVLMError
from ..files.shapes import Polygon, filled_area


@dataclass(frozen=True, eq=False)
class Region:
    """Outlined region: a picture with every glomerulus in it outlined.

    Attributes:
        name: Of its file.
        group: Whose it is: the patient, else the slide. Groups are left out whole.
        picture: `[height, width, 3]`, uint8.
        polygons: Of each glomerulus its polygons, in pixels of the picture.
        labels: Of each glomerulus its class, `None` where it has none.
        mpp: Micrometres per pixel of the picture, where known.
        stain: As written; empty where unknown.
    """

    name: str
    group: str
    picture: NDArray[np.uint8]
    polygons: Sequence[tuple[Polygon, ...]] = field(default_factory=tuple)
    labels: Sequence[str | None] = field(default_factory=tuple)
    mpp: float | None = None
    stain: str = ""


@dataclass(frozen=True, eq=False)
class Detection:
    """Detected glomerulus.

    Attributes:
        ring: Its outline, closed, `[points, 2]` in pixels (x, y) of the picture.
        score: In 0 ... 1; larger is surer.
        cut: Whether the picture's border cuts it.
    """

    ring: NDArray[np.float64]
    score: float
    cut: bool = False


def diameters(region: Region) -> list[float]:
    """Diameter of each outlined glomerulus: of the disc of its area, in pixels."""
    return [
        math.sqrt(4 / math.pi * sum(filled_area(outline) for outline, *_ in one))
        for one in region.polygons
    ]


def check_picture(picture: NDArray[np.uint8], name: str) -> None:
    """Refuse what is no RGB picture.

    Raises:
        GloVLMError: It is not `[height, width, 3]` of uint8, or has no pixel.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise GloVLMError(
            f"Expected {name} as an RGB picture [height, width, 3] of uint8, found shape "
            f"{picture.shape} of {picture.dtype}: convert it (Pillow: image.convert('RGB'))."
        )
