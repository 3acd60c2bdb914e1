"""Scale of images at a model's input (micrometres per input pixel), and its check.

The image transform resizes, so the scale that a model sees is the image's own times the factor by
which it shrinks. A scale that is not known stays `None` and is written as `unknown`; it is never
guessed.
"""

import io
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, UnidentifiedImageError

from ..data.folder import column, positive
from ..data.listing import name_key
from ..data.readers import images_column, metadata_of
from ..errors import GloVLMError
from ..tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset

MAX_RATIO = 1.5  # between the scale that a model was adapted at and that of the images


def input_mpp(image_processor: Any, mpp: float, width: int, height: int) -> float:
    """Micrometres per input pixel of an image, after the resizing of an image transform.

    Where the transform squashes an image to a fixed size, the two axes are averaged geometrically.
    Cropping changes nothing.

    Args:
        image_processor: The transform.
        mpp: Micrometres per pixel of the image.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
    """
    if not image_processor.do_resize:
        return mpp
    patches = getattr(image_processor, "max_num_patches", None)
    if patches:  # SigLIP 2 keeps the aspect ratio and fills up a number of patches
        area = patches * image_processor.patch_size**2
    elif image_processor.size["shortest_edge"]:
        return mpp * min(width, height) / float(image_processor.size["shortest_edge"])
    else:
        area = image_processor.size["width"] * image_processor.size["height"]
    return mpp * math.sqrt(width * height / area)


def known_scale(image_processor: Any, rows: "Dataset") -> float | None:
    """Median scale of images at a model's input.

    Args:
        image_processor: The model's image transform.
        rows: Images; a column `mpp` holds the micrometres per pixel of each, where known.

    Returns:
        Median micrometres per input pixel over the images whose scale is known; `None` if none is.
    """
    given = column(rows, "mpp") if "mpp" in rows.column_names else []
    known = [row for row, mpp in enumerate(given) if mpp is not None]
    images = column(rows.select(known), "image") if known else []
    scales = [
        input_mpp(image_processor, given[row], *size)
        for row, size in zip(known, map(_size, images), strict=True)
        if size is not None
    ]
    return median(scales) if scales else None


def check_scale(
    model: Any, processor: Any, rows: "Dataset", *, allow: bool = False
) -> float | Literal["unknown"]:
    """Check that the scale of images fits a model's.

    Args:
        model: The classifier; `config.mpp` is the scale that it was adapted at, if known.
        processor: Its processor.
        rows: Images, see `known_scale`.
        allow: Accept any scale.

    Returns:
        The images' median micrometres per input pixel, as results hold it.

    Raises:
        GloVLMError: Both scales are known and lie more than `MAX_RATIO` times apart.
    """
    expected, actual = model.config.mpp, known_scale(processor.image_processor, rows)
    if expected is not None and actual is not None and not allow:
        ratio = max(expected / actual, actual / expected)
        if ratio > MAX_RATIO:
            raise GloVLMError(
                f"The model was adapted at {expected:.3g} micrometres per input pixel, and these "
                f"images reach it at {actual:.3g}: {ratio:.1f} times apart, at most {MAX_RATIO:g}. "
                "Cut or rescale them to the model's scale, or give --allow-scale."
            )
    return describe_scale(actual)


def describe_scale(mpp: float | None) -> float | Literal["unknown"]:
    """Scale as results hold it, to four digits."""
    return "unknown" if mpp is None else float(f"{mpp:.4g}")


def listed_mpp(images: Iterable[Path]) -> list[float | None]:
    """Scale of image files, from a `metadata.csv` in their folder or in the one above.

    Args:
        images: The files.

    Returns:
        Micrometres per pixel of each; `None` where that file has none.
    """
    read = cache(_read_metadata)
    scales: list[float | None] = []
    for image in images:
        folders = (image.parent, image.parent.parent)
        keys = [
            (read(folder), name_key(image.relative_to(folder).as_posix())) for folder in folders
        ]
        scales.append(next((table[key] for table, key in keys if key in table), None))
    return scales


def _read_metadata(folder: Path) -> dict[str, float | None]:
    """`mpp` by file name in one normal form, from a folder's table of images."""
    path = metadata_of(folder)
    if path is None:
        return {}
    table = read_table(path, "a table of images")
    place, mpp = images_column(table), table.index("mpp")
    if place is None or mpp is None:
        return {}
    return {name_key(row[place]): positive(table.number(row[mpp])) for row in table.rows}


def _size(value: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height from a file's header; decoding reports what cannot be read."""
    try:
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        with Image.open(source) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
