"""Choice of the reader: which picture of a file is read, and by what.

The guard (brightfield RGB or nothing) and the choice of the picture stand before any reader. Our
own TIFF reader takes the place of OpenSlide only in files where both were seen to read the same.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...errors import GloVLMError
from .openslide_reader import OpenSlideReader, describe_format, import_openslide
from .tiff_pictures import (
    INSTALL,
    TiffPicture,
    TiffPictures,
    describe_pictures,
    is_decoded_as_rgb,
    is_tiff,
    reason,
)
from .tiff_reader import BLOCK, TiffReader, count_pieces, segment_size

_JPEG = 7
_TRIED = (1, 5, _JPEG, 8, 32946)  # compressions: none, LZW, JPEG, deflate


class Reader(Protocol):
    """Image pyramid of a file, the finest level first, and the scale that the file states.

    Several threads may read at a time, and get the same pixels as one.

    Attributes:
        name: Library and format.
        levels: Width and height of every level.
        downsamples: Pixels of level 0 per pixel of every level.
        mpp: Micrometres per pixel along x and y.
        magnification: Of the objective.
        bounds: Corner of the scanned part in pixels of level 0, where it is not (0, 0).
        notes: Sentences for a person.
    """

    name: str
    levels: list[tuple[int, int]]
    downsamples: list[float]
    mpp: tuple[float, float] | None
    magnification: float | None
    bounds: tuple[int, int] | None
    notes: list[str]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Part of a level, wholly inside of it, as RGB."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_reader(path: Path, scene: str | None) -> tuple[Reader, str | None]:
    """Open a file with the reader that is right for it, behind the guard.

    Args:
        path: A file that is there.
        scene: Which picture of several, by its number from 1 or its name; `None` is the largest.

    Returns:
        The reader, and the number of the picture that it shows where the file holds several.

    Raises:
        GloVLMError: See `wsi.open_slide`.
    """
    openslide = import_openslide()
    # OpenSlide tells formats apart by their content.
    vendor = openslide.OpenSlide.detect_format(path) if openslide is not None else None
    if is_tiff(path):
        try:
            with ExitStack() as stack:
                tiff = TiffPictures(path)
                stack.callback(tiff.close)
                opened = _open_tiff(tiff, openslide, vendor, scene)
                if isinstance(opened[0], TiffReader):
                    stack.pop_all()  # it reads through the same file
            return opened
        except GloVLMError:
            raise
        except Exception as error:  # headers that make no sense fail in a dozen ways
            raise GloVLMError(
                f"{path} is a damaged TIFF ({reason(error)}): copy or export it again."
            ) from None
    if vendor is None and openslide is None:
        raise GloVLMError(
            f"{path} is no TIFF; other slides are read by openslide, which is not installed: "
            f"{INSTALL}."
        )
    if vendor is None:
        raise GloVLMError(
            f"{path} is no slide that can be read (SVS, TIFF, OME-TIFF, QPTIFF, NDPI, MRXS, SCN, "
            "BIF, DICOM): convert it to a pyramidal TIFF, or give a picture to `glovlm predict`."
        )
    return _open_whole(openslide, path, vendor, scene), None


def _open_whole(openslide: Any, path: Path, vendor: str, scene: str | None) -> OpenSlideReader:
    """Slide of a format all of whose regions OpenSlide lays out on one picture."""
    if scene is not None and scene.strip() != "1":
        raise GloVLMError(
            f"{path} ({describe_format(vendor)}) is read as one picture on which all its scanned "
            f"regions lie, so there is no scene '{scene}': leave --scene out."
        )
    try:
        return OpenSlideReader(openslide, path, vendor)
    except openslide.OpenSlideError as error:
        raise GloVLMError(
            f"{path} is a damaged slide ({reason(error)}): copy or export it again."
        ) from None


def _open_tiff(
    tiff: TiffPictures, openslide: Any, vendor: str | None, scene: str | None
) -> tuple[Reader, str | None]:
    """Reader of a TIFF, whose picture is brightfield RGB."""
    path = tiff.path
    if vendor not in (None, "generic-tiff", "aperio"):
        tiff.refuse_unless_any_is_brightfield()
        return _open_whole(openslide, path, vendor, scene), None
    picture = tiff.choose(scene)
    tiff.refuse_unless_brightfield(picture)
    reader = _read_chosen(tiff, picture, openslide, vendor)
    further = [
        other
        for other in tiff.pictures
        if other is not picture and other.size not in reader.levels[1:]
    ]
    if further:
        reader.notes.append(
            f"holds {len(further)} further picture{'s' if len(further) > 1 else ''} "
            f"({describe_pictures(further)}), and {picture.number} is read: choose with --scene"
        )
    # A name may identify a patient, a number does not.
    return reader, str(picture.number) if len(tiff.pictures) > 1 else None


def _read_chosen(
    tiff: TiffPictures, picture: TiffPicture, openslide: Any, vendor: str | None
) -> Reader:
    """Own reader where OpenSlide does not read the picture, or reads the same pixels."""
    # OpenSlide shows the first page, and of an OME-TIFF or QPTIFF its first level alone.
    first = picture.levels[0][0].index == 0 and not (tiff.file.is_ome or tiff.file.is_qpi)
    if not all(is_decoded_as_rgb(pages[0].keyframe) for pages in picture.levels):
        if vendor is None or not first:
            raise GloVLMError(
                f"{tiff.path} holds YCbCr without JPEG, expected RGB of 8 bits: convert it."
            )
        return OpenSlideReader(openslide, tiff.path, vendor)
    own = TiffReader(tiff, picture)
    if vendor is None or not first:
        return own
    try:
        other = OpenSlideReader(openslide, tiff.path, vendor)
    except openslide.OpenSlideError:
        return own
    same = _reads_same(picture, own, other)
    other.close()  # after an error it reads nothing
    if same:
        return own
    other = OpenSlideReader(openslide, tiff.path, vendor)
    other.mpp, other.magnification, other.notes = own.mpp, own.magnification, own.notes
    return other


def _reads_same(picture: TiffPicture, own: TiffReader, other: OpenSlideReader) -> bool:
    """Whether both readers give the same pixels, bit by bit, where they are compared.

    Compared are two pieces of level 0: the one that took the most bytes, as it shows the most, and
    the last, which the edges cut. Of a level that is coded in another way, the first is: OpenSlide
    shifts the others by parts of a pixel where the level is no whole number of times coarser.
    """
    if own.levels != other.levels or len(picture.levels[0]) > 1:
        return False
    coded: set[Any] = set()
    for level, (page,) in enumerate(picture.levels):
        key, counts = page.keyframe, page.databytecounts
        if key.compression not in _TRIED or key.samplesperpixel != 3:
            return False
        if not all(counts):  # OpenSlide may fill what was never written from another level
            return False
        coding = key.compression, key.photometric, key.predictor, key.planarconfig, key.subsampling
        if coding in coded:
            continue
        coded.add(coding)
        width, height = own.levels[level]
        columns, rows = segment_size(key)
        across = -(-width // columns)
        pieces = count_pieces(key)
        for piece in {int(np.argmax(counts)) % pieces, pieces - 1} if level == 0 else {0}:
            x, y = piece % across * columns, piece // across * rows
            part = x, y, min(columns, width - x, BLOCK), min(rows, height - y, BLOCK)
            try:
                pixels = own.read(level, *part)
            except Exception:  # decoders fail in a dozen ways
                return False
            try:
                expected = other.read(level, *part)
            except Exception:  # of JPEG alone a decoder may go on where the file is damaged
                return key.compression != _JPEG
            if pixels.tobytes() != expected.tobytes():
                return False
    return True
