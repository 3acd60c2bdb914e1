"""Outlined regions for the comparison of finders: from GeoJSON, and from colour masks."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import open_image
from ..errors import GloVLMError
from ..slides.files.annotations import read_geojson
from ..slides.files.shapes import Polygon
from ..slides.finder.regions import Region
from .outlined_crops import SUFFIXES

_COLOURED = 100  # levels between the channels of a mask's pixel: more is an object's colour
SPECK = 100  # pixels; what is smaller in a mask is left over from its compression
SOLID = 0.92  # area over that of the convex hull, below which a blob holds two glomeruli that touch


@dataclass(frozen=True, eq=False)
class StudyRegion:
    """Outlined region of a comparison.

    Attributes:
        region: The picture and its outlines.
        merged: Whether each outline goes around two glomeruli that touch.
    """

    region: Region
    merged: tuple[bool, ...]


def read_regions(about: Mapping[str, Any], root: Path) -> list[StudyRegion]:
    """Read all pictures of a folder that have outlines, also those with none in them.

    Args:
        about: `pictures`: the folder. `outlines`: `geojson` for `NAME.geojson` with classes, or
            `mask` for `NAME_mask.png`, whose colours are `classes` (red, green, blue). `group` and
            `stain`: regular expressions whose first group is that of the picture's name.
        root: Folder that the path is relative to.

    Returns:
        The regions in the order of their names.

    Raises:
        GloVLMError: There is none, a name tells no group, or an outline has no class.
    """
    folder = root / about["pictures"]
    pictures = sorted(folder.iterdir()) if folder.is_dir() else []
    regions = []
    for path in pictures:
        if path.suffix.lower() not in SUFFIXES or path.stem.endswith("_mask"):
            continue
        picture = np.asarray(open_image(path).convert("RGB"))
        if about["outlines"] == "geojson":
            outlines = [(item.label, item.polygons, False) for item in _objects(path)]
        else:
            mask = np.asarray(open_image(path.with_name(f"{path.stem}_mask.png")))
            outlines = list(read_mask(mask, about["classes"]))
        if any(label is None for label, *_ in outlines):
            raise GloVLMError(f"An outline of {path.stem}.geojson has no class.")
        region = Region(
            path.stem,
            _part(about["group"], path.stem),
            picture,
            tuple(polygons for _, polygons, _ in outlines),
            tuple(label for label, *_ in outlines),
            stain=_part(about["stain"], path.stem),
        )
        regions.append(StudyRegion(region, tuple(merged for *_, merged in outlines)))
    if not regions:
        raise GloVLMError(f"Expected pictures with outlines in {folder}, found none.")
    return regions


def read_mask(
    mask: NDArray[np.uint8], classes: Mapping[str, str]
) -> Iterator[tuple[str, tuple[Polygon, ...], bool]]:
    """Outlines of the blobs of a colour mask, each of one colour.

    Args:
        mask: RGB `[height, width, 3]`.
        classes: Class of each colour: `red`, `green`, `blue`.

    Yields:
        Class, polygons in pixels, and whether the blob holds two glomeruli that touch: it is
        hollowed more than one glomerulus is.
    """
    from shapely import Polygon as Shape
    from skimage.measure import find_contours, label, regionprops

    channels = [mask[..., k].astype(np.int16) for k in range(3)]
    highest, lowest = (reduce(function, channels) for function in (np.maximum, np.minimum))
    colour = np.where(highest - lowest > _COLOURED, mask.argmax(-1) + 1, 0)
    for value, name in enumerate(("red", "green", "blue"), 1):
        for blob in regionprops(label(colour == value, connectivity=1)):
            if blob.area < SPECK:
                continue
            if name not in classes:
                raise GloVLMError(f"The mask holds {name}, of which no class is stated.")
            ring = max(find_contours(np.pad(blob.image_filled, 1), 0.5), key=len)
            top, left, *_ = blob.bbox
            # a pixel's middle lies half a pixel from its corner, and one row was put around
            polygon = (ring[:, ::-1] + (left - 0.5, top - 0.5),)
            shape = Shape(polygon[0])
            yield classes[name], (polygon,), bool(shape.area < SOLID * shape.convex_hull.area)


def _objects(path: Path) -> list[Any]:
    return read_geojson(path.with_suffix(".geojson"))


def _part(pattern: str, name: str) -> str:
    matched = re.match(pattern, name)
    if matched is None:
        raise GloVLMError(f"The name {name} does not match '{pattern}'.")
    return matched[1]
