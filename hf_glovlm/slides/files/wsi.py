"""Whole-slide images: opened with their scale or an unknown one, and read in pieces.

OpenSlide knows the formats of scanners (SVS, NDPI, MRXS, SCN, BIF, DICOM and more); the package's
own TIFF reader reads plain TIFF, OME-TIFF and QPTIFF, and in place of OpenSlide whatever it was
seen to read to the same bit, as it is faster. Only the picture of the slide is ever decoded: label
and macro images may show a name and are not touched. Colour profiles are ignored, and whatever the
scanner left out is white.
"""

import math
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ...data.folder import MAX_PIXELS
from ...errors import GloVLMError
from ...files import describe_file, digest_value, is_same_file
from .listing import files_of
from .pixel_size import check_given
from .readers import Reader, open_reader
from .tiff_pictures import reason
from .tiff_reader import BLOCK

CONTRADICTION = 1.1  # between the scale that was given and that of the file, from which it is told
REFUSED = 2.0  # and from which one of the two must be wrong


class Slide:
    """Whole-slide image, open; threads may share it, every process opens a fresh one.

    Attributes:
        path: The file.
        name: Its name without folder and suffix.
        size: Width and height of level 0 in pixels.
        mpp: Micrometres per pixel of level 0; `None` is unknown.
        mpp_source: Where that comes from: the `file`, 10 / `magnification`, `given` or `unknown`.
        magnification: Of the objective, as the file says; `None` is unknown.
        reader: `openslide` or `tifffile`, with the format.
        bounds: Corner (x, y) of the scanned part in pixels of level 0, where the file states one
            other than (0, 0), as slides of Leica, 3DHISTECH and Ventana do; QuPath counts from it.
        scene: Which picture of a file that holds several: its number from 1; `None` where there is
            one.
        flags: Sentences for a person: about the scale, further pictures, and what the name may
            give away.
    """

    def __init__(
        self,
        path: Path,
        reader: Reader,
        mpp: float | None = None,
        *,
        bounds: tuple[int, int] | None = None,
        scene: str | None = None,
        allow_scale: bool = False,
    ) -> None:
        self.path = path
        self.name = slide_name(path)
        self.size = reader.levels[0]
        self.reader = reader.name
        self.magnification = reader.magnification
        self.bounds = bounds
        self.scene = scene
        self.flags = [*name_flags(self.name), *reader.notes]
        self._file = reader
        self.mpp: float | None = None
        self.mpp_source: Literal["file", "magnification", "given", "unknown"] = "unknown"
        self._find_scale(reader.mpp, mpp, allow_scale)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Width and height of every level in pixels, the finest first."""
        return list(self._file.levels)

    def read(
        self, x: int, y: int, width: int, height: int, *, downsample: float = 1.0
    ) -> Image.Image:
        """Read a part of the slide; what lies outside of it is white.

        The nearest level that is at least as fine is read, in blocks where the part is large, and
        scaled down with a filter that averages (bilinear over the pixels that fall together).

        Args:
            x: Left edge, in pixels of level 0.
            y: Upper edge, in pixels of level 0.
            width: In pixels of level 0.
            height: In pixels of level 0.
            downsample: Pixels of level 0 per pixel of the result; below 1 enlarges.

        Returns:
            RGB of `round(width / downsample)` by `round(height / downsample)` pixels, at least 1.

        Raises:
            GloVLMError: An impossible request, too large a result, or a damaged file.
        """
        if min(width, height) < 1 or not 0 < downsample < math.inf:
            raise GloVLMError(
                f"Expected a part of at least one pixel and a positive downsample, found {width} x "
                f"{height} at {downsample}."
            )
        out = max(1, round(width / downsample)), max(1, round(height / downsample))
        if out[0] * out[1] > MAX_PIXELS:
            raise GloVLMError(
                f"A part of {out[0]:,} x {out[1]:,} pixels is too large to read at once (at most "
                f"{MAX_PIXELS:,}): read it coarser, or in tiles."
            )
        if out == (width, height):
            return self._canvas(0, x, y, width, height)
        # A hundredth finer than asked for is good enough: levels are rounded to whole pixels.
        fine = [k for k, d in enumerate(self._file.downsamples) if d <= 1.01 * downsample]
        level = fine[-1] if fine else 0
        unit = self._file.downsamples[level]
        ratio = width / unit / out[0], height / unit / out[1]
        step = [max(1, int(BLOCK / r)) for r in ratio]
        result = Image.new("RGB", out, "white")
        reach = [max(1.0, r) + 2 for r in ratio]  # of the filter beyond a block
        columns_in, rows_in = self._file.levels[level]
        for top in range(0, out[1], step[1]):
            for left in range(0, out[0], step[0]):
                columns, rows = min(step[0], out[0] - left), min(step[1], out[1] - top)
                box = (
                    x / unit + left * ratio[0],
                    y / unit + top * ratio[1],
                    x / unit + (left + columns) * ratio[0],
                    y / unit + (top + rows) * ratio[1],
                )
                across = -reach[0] < box[2] and box[0] < columns_in + reach[0]
                if across and -reach[1] < box[3] and box[1] < rows_in + reach[1]:
                    result.paste(self._scaled(level, box, (columns, rows)), (left, top))
        return result

    def thumbnail(self, max_side: int) -> Image.Image:
        """The whole slide with a longer side of at most `max_side` pixels, as RGB."""
        downsample = max(1.0, max(self.size) / max_side)
        return self.read(0, 0, *self.size, downsample=downsample)

    def _scaled(
        self, level: int, box: tuple[float, float, float, float], out: tuple[int, int]
    ) -> Image.Image:
        """A box of a level, which need not lie on whole pixels, at another size."""
        # The filter reaches one pixel of the result beyond the box; with these pixels there,
        # blocks meet without a seam.
        reach = [max(1.0, (box[i + 2] - box[i]) / out[i]) + 1 for i in (0, 1)]
        left, top = (math.floor(box[i] - reach[i]) for i in (0, 1))
        right, bottom = (math.ceil(box[i + 2] + reach[i]) for i in (0, 1))
        source = self._canvas(level, left, top, right - left, bottom - top)
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return source.resize(out, Image.Resampling.BILINEAR, box=inner)

    def _canvas(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """A part of a level in whole pixels, white beyond its edges."""
        columns, rows = self._file.levels[level]
        left, top = max(0, x), max(0, y)
        right, bottom = min(columns, x + width), min(rows, y + height)
        if left >= right or top >= bottom:
            return Image.new("RGB", (width, height), "white")
        try:
            image = self._file.read(level, left, top, right - left, bottom - top)
        except GloVLMError:
            raise
        except Exception as error:  # decoders fail on damaged files in a dozen ways
            raise GloVLMError(
                f"{self.path} is damaged: pixels around x {left}, y {top} of level {level} cannot "
                f"be read ({reason(error)}); copy or export it again."
            ) from None
        if image.size == (width, height):
            return image
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(image, (left - x, top - y))
        return canvas

    def _find_scale(
        self, of_file: tuple[float, float] | None, given: float | None, allow: bool
    ) -> None:
        """Set the scale, and refuse or flag contradictions."""
        stated = None
        if of_file is not None:
            stated = math.sqrt(of_file[0] * of_file[1])
            if max(of_file) / min(of_file) > 1.01:
                self.flags.append(
                    f"pixels are not square ({of_file[0]:.4g} x {of_file[1]:.4g} micrometres): "
                    f"{stated:.4g}, the geometric mean, is used"
                )
        by_lens = 10 / self.magnification if self.magnification else None
        if stated and by_lens and max(stated / by_lens, by_lens / stated) > 1.5:
            self.flags.append(
                f"the file says {stated:.4g} micrometres per pixel and {self.magnification:g}x, "
                f"which do not go together (about {by_lens:.3g} is usual)"
            )
        if given is not None:
            self.mpp, self.mpp_source = given, "given"
            known, source = stated or by_lens, "file" if stated else "magnification in the file"
            ratio = max(given / known, known / given) if known else 1.0
            # The margin is for 0.5 against a file's 0.2501. A magnification is only about a scale.
            if stated and ratio > 0.99 * REFUSED and not allow:
                raise GloVLMError(
                    f"{self.path}: the given {given:.4g} micrometres per pixel contradict the file "
                    f"({stated:.4g}, {ratio:.1f} times apart): correct --mpp or the table's mpp, "
                    "leave it out, or give --allow-scale if the file is wrong."
                )
            if known and ratio > CONTRADICTION:
                self.flags.append(
                    f"the given {given:.4g} micrometres per pixel contradict the {source}, which "
                    f"says {known:.4g}"
                )
        elif stated is not None:
            self.mpp, self.mpp_source = stated, "file"
        elif by_lens is not None:
            self.mpp, self.mpp_source = by_lens, "magnification"
            self.flags.append(
                f"{by_lens:.3g} micrometres per pixel is taken from the magnification "
                f"({self.magnification:g}x): the file states no scale"
            )
        else:
            self.flags.append("the file states no scale: give --mpp if you know it")


def open_slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    scene: str | None = None,
    allow_scale: bool = False,
) -> Slide:
    """Open a slide of any supported format.

    Args:
        path: SVS, pyramidal or plain TIFF, OME-TIFF, brightfield QPTIFF, NDPI, MRXS, SCN, BIF, any
            `.dcm` file of a DICOM series, and what else OpenSlide reads.
        mpp: Micrometres per pixel of level 0, where the file's own scale is missing or wrong.
        scene: Which picture of a file that holds several: its number, from 1, or its name; by
            default the largest. What else there is, is flagged.
        allow_scale: Accept an `mpp` that is twice or half of what the file states, or more.

    Raises:
        GloVLMError: The file is missing, of another kind, damaged, no brightfield RGB, holds no
            such scene, contradicts the given scale, or needs a package that is not installed.
    """
    path = Path(path).expanduser()
    check_given(mpp)
    if path.is_dir():
        hint = "one of its .dcm files" if any(path.glob("*.dcm")) else "one file"
        raise GloVLMError(f"{path} is a folder, a slide is a file: give {hint}.")
    if not path.is_file():
        raise GloVLMError(f"There is no slide {path}: correct the path.")
    if path.stat().st_size == 0:
        raise GloVLMError(f"{path} is empty (0 bytes): copy or export it again.")
    reader, chosen = open_reader(path, scene)
    with ExitStack() as stack:
        stack.callback(reader.close)
        slide = Slide(
            path, reader, mpp, bounds=reader.bounds, scene=chosen, allow_scale=allow_scale
        )
        for level in (0, len(slide.levels) - 1):  # a header that opens may sit on broken pixels
            columns, rows = slide.levels[level]
            slide._canvas(level, columns // 2, rows // 2, 1, 1)
        stack.pop_all()
    return slide


def describe_slide(path: Path, *, dated: bool = True) -> list[dict[str, Any]]:
    """Identity of a slide: that of each of its files, see `files.describe_file`.

    Args:
        path: The slide.
        dated: Whether times are kept, which spare reading large files as a whole again, and a
            digest of the place.
    """
    left_out = () if dated else ("modified",)
    parts = [describe_file(part) for part in files_of(path)]
    parts = [{k: v for k, v in part.items() if k not in left_out} for part in parts]
    return [parts[0] | {"place": _digest_place(path)}, *parts[1:]] if dated else parts


def is_same_slide(path: Path, known: Any) -> bool:
    """Whether a slide holds the bytes that `describe_slide` saw; never for a file that is gone."""
    try:
        parts = files_of(path)
        if not isinstance(known, list) or len(parts) != len(known):
            return False
        return all(map(is_same_file, parts, known))
    except (OSError, AttributeError):
        return False


def is_elsewhere(path: Path, known: Any) -> bool:
    """Whether a slide lies at another place than the one that `describe_slide` saw."""
    first = known[0] if isinstance(known, list) and known else None
    place = first.get("place") if isinstance(first, dict) else None
    return place is not None and place != _digest_place(path)


def _digest_place(path: Path) -> str:
    return digest_value(os.path.realpath(files_of(path)[0]))


def slide_name(path: Path) -> str:
    """Slide name: the file's without folder and suffix (`.ome.tif` is one)."""
    stem = path.stem
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def name_flags(name: str) -> list[str]:
    """Possible patient identifiers in a slide's name, one sentence each.

    Barcodes of TCGA are research ids and not flagged. What looks like a number, a date or a name
    may be none, so these are notes and nothing is refused.

    Args:
        name: File name without suffix.
    """
    if re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", name, re.IGNORECASE):
        return []
    name = _UUID.sub("", name)
    kinds = [what for what, pattern in _IDENTIFYING.items() if pattern.search(name)]
    words = re.findall(r"[^\W\d_]+", name)
    capitalised = re.fullmatch(r"[A-Z][a-zà-ÿ]+([_ ^][A-Z][a-zà-ÿ]+){1,2}(?![a-z])[\W_\d]*", name)
    if (
        "a person's name" not in kinds
        and capitalised
        and _NOT_NAMES.isdisjoint(map(str.lower, words))
    ):
        kinds.append("a person's name")
    return [
        f"the file name looks like it holds {what}: make sure that it identifies no patient"
        for what in kinds
    ]


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_YEAR, _MONTH, _DAY = r"(19|20)\d\d", r"(0?[1-9]|1[0-2])", r"(0?[1-9]|[12]\d|3[01])"
_IDENTIFYING = {
    "an accession number": re.compile(
        r"(?<![A-Za-z0-9])("
        r"[A-Z]{1,4}[-_ ]?\d{2}[-_ /]\d{3,7}"  # S19-12345, SP-21-1234
        r"|\d{2}[-_ ]?[A-Z]{1,4}[-_ ]?\d{3,7}"  # 21-S-04567, 21S04567
        r"|(19|20)\d{2}[-_ ][A-Z]{1,4}[-_ ]?\d{3,7}"
        r"|[A-Z]{0,2}\d{7,}"
        r")(?![A-Za-z0-9])"
    ),
    "a date": re.compile(
        rf"(?<!\d)({_YEAR}[-_.]{_MONTH}[-_.]{_DAY}"
        rf"|{_DAY}[-_.]{_MONTH}[-_.]{_YEAR}"
        rf"|{_MONTH}[-_.]{_DAY}[-_.]{_YEAR}"
        r"|(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01]))(?!\d)"
    ),
    "a person's name": re.compile(
        r"(?<![^\W\d_])((Mrs?|Ms|Herr|Frau|Dr)[._ ]+[A-Z][a-zà-ÿ]+"
        r"|[^\W\d_]{2,}(, ?|\^)[^\W\d_]{2,})"
    ),
}
_NOT_NAMES = frozenset((
    "biopsy", "block", "brain", "breast", "case", "colon", "control", "core", "cortex", "example",
    "glomeruli", "glomerulus", "group", "he", "image", "kidney", "level", "liver", "lung", "masson",
    "normal", "pas", "patient", "region", "renal", "roi", "sample", "scan", "section", "silver",
    "skin", "slide", "small", "specimen", "stain", "test", "tile", "tissue", "train", "trichrome",
    "tumor",
))  # fmt: skip
