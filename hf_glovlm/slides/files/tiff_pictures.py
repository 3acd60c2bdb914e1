"""Pictures of a TIFF: which there are, which is the slide, and whether that is brightfield RGB.

Everything is found in the headers before any reader is chosen; no pixel is decoded.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...data.listing import few, short
from ...errors import GloVLMError, nearest
from .ome import OmeImage, read_ome

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ASIDE = frozenset({"label", "macro", "thumbnail", "overview", "barcode", "map"})
_PAGES = "IQ"  # axes along which tifffile lines up pages that nothing describes
_RGB, _PALETTE, _YCBCR = 2, 3, 6  # photometric interpretations
_JPEG = (6, 7, 33007, 34892)  # compressions whose decoder turns YCbCr into RGB
INSTALL = "pip install 'hf-glovlm[slides]'"


@dataclass(frozen=True)
class TiffPicture:
    """One picture of a TIFF with its pyramid.

    Attributes:
        number: Among the pictures that can be chosen, from 1.
        name: As the file has it; may be empty.
        levels: Pages of every level, the finest first: one of all samples, or one a colour.
        axes: Of the whole series that it is of, as tifffile names them, with their lengths.
        image: What OME-XML says of it.
        is_aside: Whether it is a label, a macro image and the like, which are never read.
    """

    number: int
    name: str
    levels: list[list[Any]]
    axes: dict[str, int]
    image: OmeImage | None
    is_aside: bool = False

    @property
    def key(self) -> Any:
        """Page that describes level 0."""
        return self.levels[0][0].keyframe

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0."""
        return int(self.key.imagewidth), int(self.key.imagelength)


class TiffPictures:
    """Pictures of an open TIFF.

    Attributes:
        path: The file.
        file: It, open, by tifffile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Files that the metadata of others name are not opened: each is a slide of its own.
        self.file: Any = import_tifffile().TiffFile(path, _multifile=False)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @cached_property
    def pictures(self) -> list[TiffPicture]:
        """Pictures that can be chosen, numbered from 1 in the file's order.

        Raises:
            GloVLMError: There is none.
        """
        images = read_ome(self.file.ome_metadata) if self.file.is_ome else []
        listed = [p for series in self.file.series for p in self._pictures_of(series, images)]
        largest = max(listed, key=lambda picture: prod(picture.size), default=None)
        # The names in files of scanners are the format's own; in others people gave them.
        by_format = self.file.is_svs or self.file.is_qpi
        kept = [p for p in listed if not p.is_aside or (p is largest and not by_format)]
        if not kept:
            named = few([picture.name or "a reduced copy" for picture in listed])
            but = f", but {named}" if named else ""
            raise GloVLMError(f"{self.path} holds no picture of a slide{but}.")
        return [replace(picture, number=i) for i, picture in enumerate(kept, start=1)]

    @property
    def kind(self) -> str:
        """Kind of TIFF, as results name it."""
        kinds = {"OME-TIFF": "is_ome", "QPTIFF": "is_qpi", "SVS": "is_svs"}
        return next((name for name, has in kinds.items() if getattr(self.file, has)), "TIFF")

    def choose(self, scene: str | None) -> TiffPicture:
        """The picture of a scene, or the largest.

        Args:
            scene: Its number from 1, or its name.

        Raises:
            GloVLMError: There is none of that number or name, or several of that name.
        """
        if scene is None:
            return max(self.pictures, key=lambda picture: prod(picture.size))
        return self._choose(scene.strip())

    def _choose(self, scene: str) -> TiffPicture:
        """Picture of a scene by its name or its number."""
        chosen = [p for p in self.pictures if p.name == scene != ""] or [
            p for p in self.pictures if p.name.casefold() == scene.casefold() != ""
        ]
        if not chosen and scene.isdecimal():
            chosen = [p for p in self.pictures if p.number == int(scene[:9])]
        if len(chosen) == 1:
            return chosen[0]
        n = len(self.pictures)
        held = f"{n} pictures" if n > 1 else "one picture"
        if chosen:
            raise GloVLMError(
                f"{self.path} holds {len(chosen)} pictures of the name '{short(scene, 60)}': "
                f"choose by number ({describe_pictures(chosen)})."
            )
        raise GloVLMError(
            f"{self.path} holds {held} ({describe_pictures(self.pictures)}), and none is the scene "
            f"'{short(scene, 60)}': give a number from 1 to {n}, or a name as the file has it."
            f"{nearest(scene, [p.name for p in self.pictures if p.name])}"
        )

    def refuse_unless_brightfield(self, picture: TiffPicture) -> None:
        """Guard: brightfield RGB of 8 bits is read, and nothing else as if it were that.

        Raises:
            GloVLMError: It is grey, fluorescence, a palette, a stack of planes or deeper.
        """
        key, pages, axes = picture.key, len(picture.levels[0]), picture.axes
        if key.photometric == _PALETTE:
            raise GloVLMError(
                f"{self.path} holds a palette of colours, as masks of classes do; brightfield "
                "slides in RGB are read: export it as RGB."
            )
        if axes.get("C", 1) > 1 and pages == 1:
            names = list(picture.image.channels) if picture.image else []
            self._refuse_channels(
                f"{axes['C']} separate channels", names or _page_names(self.file.series)
            )
        colours = max(key.samplesperpixel, pages)
        if colours == 1:
            n = sum(axes.get(axis, 0) for axis in _PAGES)
            self._refuse_channels(f"one grey channel{f' a page ({n} pages)' if n > 1 else ''}", [])
        stack = [f"{n} along {axis}" for axis, n in axes.items() if axis not in f"YXSC{_PAGES}"]
        if stack:
            raise GloVLMError(
                f"{self.path} holds a stack of pictures ({', '.join(stack)}), a slide is one: "
                "export the plane that you need."
            )
        is_rgb = pages == 3 or (colours in (3, 4) and key.photometric in (_RGB, _YCBCR))
        if not is_rgb or key.dtype != np.uint8:
            kind = getattr(key.photometric, "name", key.photometric)
            raise GloVLMError(
                f"{self.path} holds {colours} x {key.dtype} of kind {kind}; expected RGB of 8 "
                "bits: convert it."
            )

    def refuse_unless_any_is_brightfield(self) -> None:
        """Guard of formats whose pictures OpenSlide puts together: the largest page is RGB."""
        page = max(self.file.pages, key=lambda page: page.imagewidth * page.imagelength).keyframe
        self.refuse_unless_brightfield(TiffPicture(1, "", [[page]], {}, None))

    def _refuse_channels(self, what: str, names: Sequence[str]) -> None:
        known = [short(name, 40) for name in names if name]
        named = f" ({', '.join(known[:8])})" if known else ""
        raise GloVLMError(
            f"{self.path} holds {what}{named}, as fluorescence does; brightfield slides in RGB are "
            "read: export it as RGB."
        )

    def _pictures_of(self, series: Any, images: list[OmeImage]) -> Iterator[TiffPicture]:
        """Pictures of a series: each of its pages where nothing makes them one."""
        axes = dict(zip(series.axes, map(int, series.shape), strict=True))
        levels = [list(level.pages) for level in series.levels[:1]]
        # A macro image may have half the size, and is no level: its kind says more than "reduced".
        levels += [list(v.pages) for v in series.levels[1:] if not v.keyframe.subfiletype & ~1]
        if any(page is None for pages in levels for page in pages):
            raise GloVLMError(
                f"{self.path} lacks pages that its OME-XML names: give a file that holds its whole "
                "picture."
            )
        key, pages = series.keyframe, levels[0]
        image = self._image_of(pages[0], images)
        name = (image.name if image else "") or (series.name or "").strip()
        words = re.findall(r"[^\W\d_]+", name.casefold())
        aside = bool(key.is_reduced or key.is_mask) or not _ASIDE.isdisjoint(words)
        order = image.colours if image else None
        if order is None and key.photometric == _RGB:
            order = 0, 1, 2
        if key.samplesperpixel == 1 and order and all(len(level) == 3 for level in levels):
            planes = [[level[i] for i in order] for level in levels]
            yield TiffPicture(0, name, planes, axes, image, aside)
            return
        further = [axis for axis in axes if axis not in "YXS"]
        paged = axes.get("S", 1) > 1 and all(axis in _PAGES for axis in further)
        levels = [level for level in levels if len(level) == len(pages)]
        for i in range(len(pages) if paged else 1):
            yield TiffPicture(0, name, [[level[i]] for level in levels], axes, image, aside)

    def _image_of(self, page: Any, images: list[OmeImage]) -> OmeImage | None:
        """What OME-XML says of the picture that begins with a page."""
        number = page.index if isinstance(page.index, int) else page.index[0]
        there = [image for image in images if image.page == number]
        # The metadata of several files count the pages of each from 0.
        own = [image for image in there if image.file.casefold() == self.path.name.casefold()]
        one = {(image.sizes, image.units, image.colours): image for image in own or there}
        return next(iter(one.values())) if len(one) == 1 else None


def describe_pictures(pictures: Sequence[TiffPicture]) -> str:
    """Numbers and sizes of pictures; their names may identify patients and are left out."""
    return few([f"{p.number}: {p.size[0]:,} x {p.size[1]:,} pixels" for p in pictures])


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in _MAGIC


def is_decoded_as_rgb(key: Any) -> bool:
    """Whether tifffile decodes a page's samples into red, green and blue."""
    return key.photometric != _YCBCR or key.compression in _JPEG


def reason(error: Exception) -> str:
    """First line of what another library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_tifffile() -> Any:
    """Import tifffile with its decoders.

    Raises:
        GloVLMError: One of them is not installed.
    """
    try:
        import imagecodecs  # noqa: F401 - tifffile decodes with it
        import tifffile
    except ImportError:
        raise GloVLMError(
            f"This slide is read by tifffile with imagecodecs, which are not installed: {INSTALL}."
        ) from None
    logger = logging.getLogger("tifffile")
    if not logger.handlers:  # else what it logs of a damaged file is printed between our sentences
        logger.addHandler(logging.NullHandler())
    return tifffile


def _page_names(series: Sequence[Any]) -> list[str]:
    """Names of the channels in a QPTIFF, one a page."""
    texts = [str(getattr(page, "description", "") or "") for page in series[0].pages]
    return [match.group(1) for text in texts if (match := re.search(r"<Name>([^<]+)</Name>", text))]
