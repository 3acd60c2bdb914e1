"""Region images: fields of view as JPEG or PNG, listed beside slides and opened as one is."""

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ...data.folder import open_image
from ...errors import GloVLMError
from .listing import list_slides
from .names import MASKS, files_below, is_mask_name
from .pixel_size import check_given
from .wsi import Slide, open_slide, slide_name

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})  # the rest are slides


def is_region_image(path: Path) -> bool:
    """Whether a file is a region image rather than a slide, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def list_pictures(given: Path, others: Iterable[Path] = (), *, masks: bool = False) -> list[Path]:
    """List the slides of a folder, else its region images.

    Args:
        given: A folder, searched with its subfolders, or one file, which is listed as it is.
        others: Folders and files of outlines and output, whose pictures are none of these.
        masks: Whether masks lie beside the pictures: `S1.png` of `S1.jpg`, `S1_mask.png`.

    Raises:
        GloVLMError: The folder holds neither.
    """
    if not os.path.isdir(given):
        return [given]
    barred = {Path(os.path.realpath(other)) for other in others} - {Path(os.path.realpath(given))}
    plain = files_below(given, SUFFIXES)
    try:
        slides = list_slides([given])
    except GloVLMError:
        if not plain:
            raise
        slides = []
    slides, plain = (
        [p for p in paths if barred.isdisjoint(Path(os.path.realpath(p)).parents)]
        for paths in (slides, plain)
    )
    if not masks:
        return slides or plain
    of_others = {slide_name(path) for path in plain if path.suffix.lower() not in MASKS}
    regions = [p for p in plain if p.suffix.lower() not in MASKS or slide_name(p) not in of_others]
    return [path for path in slides or regions if not is_mask_name(path.name)]


def open_picture(
    path: Path, *, mpp: float | None = None, scene: str | None = None, allow_scale: bool = False
) -> Slide:
    """Open a slide, or a region image as a slide of one level.

    A region image is decoded as a whole and stays in memory: 240 MB at most.

    Args:
        path: The file.
        mpp: As for `open_slide`; a region image states none of its own.
        scene: As for `open_slide`; a region image has none.
        allow_scale: As for `open_slide`.

    Raises:
        GloVLMError: It cannot be opened, or a scene of a region image was asked for.
    """
    path = Path(path).expanduser()
    if not is_region_image(path):
        return open_slide(path, mpp=mpp, scene=scene, allow_scale=allow_scale)
    refuse_scene(path, scene)
    check_given(mpp)
    return Slide(path, _ImageReader(open_image(path)), mpp)


def refuse_scene(path: Path, scene: str | None) -> None:
    """Refuse a scene of a region image.

    Raises:
        GloVLMError: One was asked for.
    """
    if scene is not None:
        raise GloVLMError(f"{path} is one picture and holds no scenes: leave the scene out.")


class _ImageReader:
    """Reader of one picture in memory."""

    name = "image"
    mpp: tuple[float, float] | None = None
    magnification: float | None = None
    bounds: tuple[int, int] | None = None

    def __init__(self, image: Image.Image) -> None:
        self.levels = [image.size]
        self.downsamples = [1.0]
        self.notes: list[str] = []
        self._image = image

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        return self._image.crop((x, y, x + width, y + height))

    def close(self) -> None:
        self._image.close()
