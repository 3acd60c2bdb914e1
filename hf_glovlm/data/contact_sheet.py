"""Contact sheets: small pictures of some images of a data set."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from PIL import Image

from .folder import column, in_threads, open_image

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["draw_thumbnails"]

SIDE = 128  # pixels of the longer side
_QUALITY = 80


def draw_thumbnails(rows: "Dataset", chosen: Iterable[int]) -> dict[int, bytes]:
    """JPEG of each chosen image, at most `SIDE` pixels wide and high.

    Args:
        rows: As `load_dataset` makes them.
        chosen: Their places, each of an image that can be read.

    Returns:
        File contents by place: a few kilobytes each.

    Raises:
        GloVLMError: An image cannot be read.
    """
    places = sorted({*chosen})
    images = column(rows.select(places), "image")

    def draw(value: dict[str, object]) -> bytes:
        picture = open_image(value, draft=SIDE)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()

    return dict(zip(places, in_threads(draw, images), strict=True))
