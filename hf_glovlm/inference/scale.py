"""Scale of images: micrometres per pixel, at a model's input too, and their comparison.

What is compared with the images that a model learned from is micrometres per pixel as they were
scanned; what an outline's crop measures depends on the glomerulus and is reported. The image
transform resizes, so the scale at a model's input is the image's own times the factor by which it
shrinks: tiles, all of one size, are cut so that this one fits. A scale that is not known stays
`None` and is written as `unknown`; it is never guessed.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..data.columns import LOOK
from ..data.folder import column, positive
from ..data.image_tables import listed_cells
from ..errors import GloVLMError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_RATIO = 1.5  # between the scale that a model was adapted at and that of the images
NOT_COMPARED = (
    "The model states no micrometres per pixel of the images that it learned from (it was made by "
    "an earlier version), so the scale was not compared."
)
_SPREAD = {"low": 0, "p5": 5, "median": 50, "p95": 95, "high": 100}  # percentiles


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
    scales = [input_mpp(image_processor, mpp, *size) for mpp, size in _known(rows)]
    return median(scales) if scales else None


def support_scale(rows: "Dataset") -> dict[str, float] | None:
    """Scale of the images that a model learns from, as its config keeps it.

    Args:
        rows: Images, see `known_scale`.

    Returns:
        `mpp`, their median micrometres per pixel, and of their longer sides in micrometres `low`,
        `p5`, `median`, `p95` and `high`; `None` where no scale is known.
    """
    known = _known(rows)
    if not known:
        return None
    sides = [mpp * max(size) for mpp, size in known]
    spread = zip(_SPREAD, np.percentile(sides, [*_SPREAD.values()]).tolist(), strict=True)
    return {"mpp": float(median(mpp for mpp, _ in known))} | dict(spread)


@dataclass(frozen=True)
class ImageScale:
    """Scale of images beside a model's.

    Attributes:
        mpp: Median micrometres per pixel of the images, or `unknown`.
        input_mpp: The same at the model's input, after its resizing.
        notes: What was not compared, and sizes unlike those that the model learned from.
    """

    mpp: float | Literal["unknown"]
    input_mpp: float | Literal["unknown"]
    notes: tuple[str, ...] = ()


def check_scale(model: Any, processor: Any, rows: "Dataset", *, allow: bool = False) -> ImageScale:
    """Check that the scale of images fits a model's; see `compare_scale`.

    Args:
        model: The classifier.
        processor: Its processor.
        rows: Images, see `known_scale`.
        allow: Accept any scale.

    Raises:
        GloVLMError: Both scales are known and too far apart.
    """
    known = _known(rows)
    return compare_scale(
        model, processor, [mpp for mpp, _ in known], [size for _, size in known], allow=allow
    )


def compare_scale(
    model: Any,
    processor: Any,
    mpps: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    *,
    allow: bool = False,
) -> ImageScale:
    """Compare micrometres per pixel of images with those that a model learned from.

    Sizes are reported beside the support's and never refused: glomeruli differ, and what is small
    in one biopsy is no other scale.

    Args:
        model: The classifier; its config's `image_scale` is that of its support (see
            `support_scale`), where known.
        processor: Its processor.
        mpps: Micrometres per pixel of the images whose scale is known.
        sizes: Width and height of each in pixels.
        allow: Accept any scale.

    Raises:
        GloVLMError: The medians lie more than `MAX_RATIO` times apart.
    """
    if not mpps:
        return ImageScale("unknown", "unknown")
    images = processor.image_processor
    seen = [input_mpp(images, mpp, *size) for mpp, size in zip(mpps, sizes, strict=True)]
    actual, support = median(mpps), _support_of(model.config)
    notes = []
    if support is None:
        if model.config.mpp is not None:
            notes.append(NOT_COMPARED)
    else:
        expected = support["mpp"]
        ratio = max(expected / actual, actual / expected)
        if ratio > MAX_RATIO:
            apart = (
                f"The model learned from images of {expected:.3g} micrometres per pixel, and these "
                f"have {actual:.3g}: {ratio:.1f} times apart"
            )
            if not allow:
                raise GloVLMError(
                    f"{apart}, at most {MAX_RATIO:g}. Correct their scale (mpp), cut or rescale "
                    "them to the model's, or give --allow-scale."
                )
            notes.append(f"{apart}.")
        sides = [mpp * max(size) for mpp, size in zip(mpps, sizes, strict=True)]
        notes += _size_notes(sides, support)
    return ImageScale(float(f"{actual:.4g}"), float(f"{median(seen):.4g}"), tuple(notes))


def _support_of(config: Any) -> dict[str, float] | None:
    """Scale of a model's support; `None` where its config states none, or no whole one."""
    stated = getattr(config, "image_scale", None)
    if not isinstance(stated, dict):
        return None
    values = {name: positive(stated.get(name)) for name in ("mpp", *_SPREAD)}
    known = {name: value for name, value in values.items() if value is not None}
    return known if known.keys() == values.keys() else None


def _size_notes(sides: Sequence[float], support: Mapping[str, float]) -> list[str]:
    """A sentence where sizes in micrometres lie outside of the support's."""
    slack = 0.01  # crops are cut at whole pixels
    low, high = support["low"] * (1 - slack), support["high"] * (1 + slack)
    outside = sum(not low <= side <= high for side in sides)
    usual = support["p5"] * (1 - slack) <= median(sides) <= support["p95"] * (1 + slack)
    if not outside and usual:
        return []
    return [
        f"{outside} of {len(sides)} images are smaller or larger than all that the model learned "
        f"from: their longer sides are {min(sides):.0f} to {max(sides):.0f} micrometres (median "
        f"{median(sides):.0f}), and those were {support['low']:.0f} to {support['high']:.0f} "
        f"(median {support['median']:.0f})."
    ]


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
    cells = listed_cells(images, "mpp")
    return [None if cell is None else positive(cell) for cell in cells]


def _known(rows: "Dataset") -> list[tuple[float, tuple[int, int]]]:
    """Micrometres per pixel and size of each image whose scale is known."""
    given = column(rows, "mpp") if "mpp" in rows.column_names else []
    known = [row for row, mpp in enumerate(given) if mpp is not None]
    if not known:
        return []
    chosen, sizes = rows.select(known), list[tuple[int, int] | None]()
    if LOOK in rows.column_names:
        sizes += [(look["width"], look["height"]) for look in column(chosen, LOOK)]
    else:
        sizes += map(_size, column(chosen, "image"))
    return [(given[i], size) for i, size in zip(known, sizes, strict=True) if size is not None]


def _size(value: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height from a file's header; decoding reports what cannot be read."""
    try:
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        with Image.open(source) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
