"""Whole-slide images: opened with their scale or an unknown one, and read in pieces.

OpenSlide reads what it knows (SVS, pyramidal TIFF, NDPI, MRXS, SCN, BIF, DICOM and more); tifffile
reads the rest (plain TIFF, OME-TIFF with its pyramid, QPTIFF). Only the picture of the slide is
ever decoded: label and macro images may show a name and are not touched. Colour profiles are
ignored, and whatever the scanner left out is white.
"""

import math
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...data.folder import MAX_PIXELS, positive
from ...errors import GloVLMError
from ...files import describe_file, digest_value, is_same_file

BLOCK = 2048  # side of the largest piece of a level that is decoded at once, in its pixels
CACHE_BYTES = 64 * 2**20  # decoded tiles or strips of a TIFF that are kept
SCALE_TAGS = (0.02, 20.0)  # micrometres per pixel; TIFF tags beyond it describe paper, not glass
CONTRADICTION = 1.1  # between the scale that was given and that of the file
_INSTALL = "pip install 'hf-glovlm[slides]'"
_NOT_THE_SLIDE = re.compile(r"label|macro|thumbnail|overview|barcode|map", re.IGNORECASE)


class _Reader(Protocol):
    """Image pyramid of a file, the finest level first, and the scale that the file states."""

    name: str
    levels: list[tuple[int, int]]
    downsamples: list[float]
    mpp: tuple[float, float] | None
    magnification: float | None
    notes: list[str]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image: ...

    def close(self) -> None: ...


class Slide:
    """Whole-slide image, open; open a fresh one in every process.

    Attributes:
        path: The file.
        name: Its name without folder and suffix.
        size: Width and height of level 0 in pixels.
        mpp: Micrometres per pixel of level 0; `None` is unknown.
        mpp_source: Where that comes from: the `file`, 10 / `magnification`, `given` or `unknown`.
        magnification: Of the objective, as the file says; `None` is unknown.
        reader: `openslide` or `tifffile`, with the format.
        flags: Sentences for a person: about the scale, and what the name may give away.
    """

    def __init__(self, path: Path, reader: _Reader, mpp: float | None = None) -> None:
        self.path = path
        self.name = slide_name(path)
        self.size = reader.levels[0]
        self.reader = reader.name
        self.magnification = reader.magnification
        self.flags = [*name_flags(self.name), *reader.notes]
        self._file = reader
        self.mpp: float | None = None
        self.mpp_source: Literal["file", "magnification", "given", "unknown"] = "unknown"
        self._find_scale(reader.mpp, mpp)

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
        for top in range(0, out[1], step[1]):
            for left in range(0, out[0], step[0]):
                columns, rows = min(step[0], out[0] - left), min(step[1], out[1] - top)
                box = (
                    x / unit + left * ratio[0],
                    y / unit + top * ratio[1],
                    x / unit + (left + columns) * ratio[0],
                    y / unit + (top + rows) * ratio[1],
                )
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
                f"be read ({_reason(error)}); copy or export it again."
            ) from None
        if image.size == (width, height):
            return image
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(image, (left - x, top - y))
        return canvas

    def _find_scale(self, of_file: tuple[float, float] | None, given: float | None) -> None:
        """Set the scale, and flag contradictions."""
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
            if known and max(given / known, known / given) > CONTRADICTION:
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


def open_slide(path: str | Path, *, mpp: float | None = None) -> Slide:
    """Open a slide of any supported format.

    Args:
        path: SVS, pyramidal or plain TIFF, OME-TIFF, brightfield QPTIFF, a `.dcm` file of a DICOM
            slide, and what else OpenSlide reads.
        mpp: Micrometres per pixel of level 0, where the file's own scale is missing or wrong.

    Raises:
        GloVLMError: The file is missing, of another kind, damaged, a fluorescence slide, or needs
            a package that is not installed.
    """
    path = Path(path).expanduser()
    if mpp is not None and not 0 < mpp < math.inf:
        raise GloVLMError(f"Expected a positive number of micrometres per pixel, found {mpp}.")
    if path.is_dir():
        hint = "one of its .dcm files" if any(path.glob("*.dcm")) else "one file"
        raise GloVLMError(f"{path} is a folder, a slide is a file: give {hint}.")
    if not path.is_file():
        raise GloVLMError(f"There is no slide {path}: correct the path.")
    if path.stat().st_size == 0:
        raise GloVLMError(f"{path} is empty (0 bytes): copy or export it again.")
    slide = Slide(path, _open_reader(path), mpp)
    try:
        for level in (0, len(slide.levels) - 1):  # a header that opens may sit on broken pixels
            columns, rows = slide.levels[level]
            slide._canvas(level, columns // 2, rows // 2, 1, 1)
    except GloVLMError:
        slide.close()
        raise
    return slide


def describe_slide(path: Path, *, dated: bool = True) -> list[dict[str, Any]]:
    """Identity of a slide: that of each of its files, see `files.describe_file`.

    Args:
        path: The slide.
        dated: Whether times are kept, which spare reading large files as a whole again, and a
            digest of the place.
    """
    left_out = () if dated else ("modified",)
    parts = [describe_file(part) for part in _files_of(path)]
    parts = [{k: v for k, v in part.items() if k not in left_out} for part in parts]
    return [parts[0] | {"place": _digest_place(path)}, *parts[1:]] if dated else parts


def is_same_slide(path: Path, known: Any) -> bool:
    """Whether a slide holds the bytes that `describe_slide` saw; never for a file that is gone."""
    try:
        parts = _files_of(path)
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
    return digest_value(os.path.realpath(path))


def _files_of(path: Path) -> list[Path]:
    """Files of a slide: the picture of a MIRAX slide lies in a folder beside it."""
    folder = path.with_suffix("")
    if path.suffix.lower() != ".mrxs" or not folder.is_dir():
        return [path]
    return [path, *sorted(part for part in folder.rglob("*") if part.is_file())]


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


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tagged_scale(x: float | None, y: float | None) -> tuple[tuple[float, float] | None, list[str]]:
    """Micrometres per pixel by TIFF resolution tags, unless they describe paper."""
    if x is None or y is None:
        return None, []
    if not all(SCALE_TAGS[0] <= value <= SCALE_TAGS[1] for value in (x, y)):
        return None, [
            f"the TIFF resolution of {25400 / x:.4g} dpi is a default for printing, not a scale"
        ]
    return (x, y), []


def _open_reader(path: Path) -> _Reader:
    """Reader of a slide: OpenSlide where it knows the format, tifffile for the rest."""
    openslide, failed = _openslide(), None
    if openslide is not None:
        vendor = openslide.OpenSlide.detect_format(path)
        # OpenSlide sees the first level alone of an OME-TIFF, and not what its channels are.
        if vendor is not None and not (vendor == "generic-tiff" and _has_own_metadata(path)):
            try:
                return _OpenSlideReader(openslide, path, vendor)
            except openslide.OpenSlideError as error:
                failed = _reason(error)
    with path.open("rb") as file:
        head = file.read(4)
    if head not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        if failed:
            raise GloVLMError(f"{path} is a damaged slide ({failed}): copy or export it again.")
        if openslide is None:
            raise GloVLMError(
                f"{path} is no TIFF; other slides are read by openslide, which is not installed: "
                f"{_INSTALL}."
            )
        raise GloVLMError(
            f"{path} is no slide that can be read (SVS, TIFF, OME-TIFF, QPTIFF, NDPI, MRXS, "
            "DICOM): convert it to a pyramidal TIFF, or give a picture to `glovlm predict`."
        )
    return _TiffReader(path)


def _has_own_metadata(path: Path) -> bool:
    """Whether a TIFF is an OME-TIFF or a QPTIFF."""
    try:
        with _tifffile().TiffFile(path) as file:
            return bool(file.is_ome or file.is_qpi)
    except Exception:  # damaged, or tifffile is missing: then OpenSlide's way is the only one
        return False


class _OpenSlideReader:
    """A slide by OpenSlide; its associated images are never read."""

    def __init__(self, openslide: Any, path: Path, vendor: str) -> None:
        self._slide = openslide.OpenSlide(path)
        about = self._slide.properties
        self.name = f"openslide ({vendor})"
        self.levels = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
        self.downsamples = [float(d) for d in self._slide.level_downsamples]
        x, y = (positive(about.get(f"openslide.mpp-{axis}")) for axis in "xy")
        stated = ((x, y) if x and y else None), list[str]()
        self.mpp, self.notes = _tagged_scale(x, y) if vendor == "generic-tiff" else stated
        self.magnification = positive(about.get("openslide.objective-power"))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        at = round(x * self.downsamples[level]), round(y * self.downsamples[level])
        part = self._slide.read_region(at, level, (width, height))
        image = Image.new("RGB", part.size, "white")
        image.paste(part, mask=part.getchannel("A"))  # what was not scanned is transparent
        return image

    def close(self) -> None:
        self._slide.close()


class _TiffReader:
    """A TIFF by tifffile: only the tiles or strips under the requested part are decoded."""

    def __init__(self, path: Path) -> None:
        tifffile = _tifffile()
        self._path = path
        self._file: Any = None
        try:
            self._file = tifffile.TiffFile(path)
            self._find_pyramid()
        except Exception as error:
            if self._file is not None:
                self._file.close()
            if isinstance(error, GloVLMError):
                raise
            raise GloVLMError(
                f"{path} is a damaged TIFF ({_reason(error)}): copy or export it again."
            ) from None

    def _find_pyramid(self) -> None:
        """Find the pyramid of the slide among the series; labels and overviews are left alone."""
        series = [s for s in self._file.series if not _NOT_THE_SLIDE.search(s.name or "")]
        if not series:
            raise GloVLMError(f"{self._path} holds no picture of a slide.")
        chosen = max(series, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength)
        self._refuse_unless_rgb(chosen)
        self._pages = [level.pages[0] for level in chosen.levels]
        self._keys = [level.keyframe for level in chosen.levels]
        self.levels = [(int(k.imagewidth), int(k.imagelength)) for k in self._keys]
        width, height = self.levels[0]
        self.downsamples = [(width / w + height / h) / 2 for w, h in self.levels]
        self._mapped = [self._must_be_mapped(key) for key in self._keys]
        kind = "OME-TIFF" if self._file.is_ome else "QPTIFF" if self._file.is_qpi else "TIFF"
        self.name = f"tifffile ({kind})"
        self.mpp, self.magnification, self.notes = self._read_scale(self._pages[0])
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8] | None] = OrderedDict()
        self._cached = 0

    def _refuse_unless_rgb(self, series: Any) -> None:
        key = series.keyframe
        channels = dict(zip(series.axes, series.shape, strict=True))
        n = max(channels.get("C", 1), channels.get("S", 1))
        if "C" in channels or "S" not in channels:
            names = [_first(r"<Name>([^<]+)</Name>", _description(p)) for p in series.pages]
            named = f" ({', '.join(filter(None, names))})" if any(names) else ""
            many = f"{n} separate channels{named}" if n > 1 else "one grey channel"
            raise GloVLMError(
                f"{self._path} holds {many}, as fluorescence does; brightfield slides in RGB are "
                "read: export it as RGB."
            )
        several = [f"{channels[axis]} along {axis}" for axis in series.axes if axis not in "YXS"]
        if several:
            raise GloVLMError(
                f"{self._path} holds a stack of pictures ({', '.join(several)}), a slide is one: "
                "export the plane that you need."
            )
        rgb = key.photometric in (2, 6) and n in (3, 4) and key.planarconfig == 1
        if not rgb or key.dtype != np.uint8:
            raise GloVLMError(
                f"{self._path} holds {n} x {key.dtype} of kind {key.photometric.name}; expected "
                "interleaved RGB of 8 bits: convert it."
            )

    def _must_be_mapped(self, key: Any) -> bool:
        """Whether a level is one piece so large that it is read through the file system."""
        columns, rows = _segment_size(key)
        if key.is_tiled or columns * rows <= BLOCK**2:
            return False
        if not key.is_memmappable and columns * rows > MAX_PIXELS:
            raise GloVLMError(
                f"{self._path} is compressed in one piece of {columns * rows:,} pixels (at most "
                f"{MAX_PIXELS:,} are decoded at once): convert it to a tiled, pyramidal TIFF."
            )
        return bool(key.is_memmappable)

    def _read_scale(self, page: Any) -> tuple[tuple[float, float] | None, float | None, list[str]]:
        """Scale and magnification out of the metadata of OME, QPTIFF, Aperio, or the tags."""
        text = _description(page)
        lens = positive(
            _first(r"AppMag ?= ?([\d.]+)", text)
            or _first(r"<Objective>([\d.]+)x?</Objective>", text)
            or _first(r'NominalMagnification="([\d.]+)"', text)
        )
        if self._file.is_ome:
            x, y = (_ome_size(text, axis) for axis in "XY")
            if x and y:
                return (x, y), lens, []
        for pattern in (r"MPP ?= ?([\d.]+)", r"<PixelSizeMicrons>([\d.eE+-]+)</PixelSizeMicrons>"):
            if size := positive(_first(pattern, text)):
                return (size, size), lens, []
        unit = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof("ResolutionUnit", 0) or 0))
        tags = [page.tags.valueof(f"{axis}Resolution") for axis in "XY"]
        per_unit = [positive(t[0] / t[1]) if t and t[1] else None for t in tags]
        sizes = [unit / p if unit and p else None for p in per_unit]
        mpp, notes = _tagged_scale(*sizes)
        return mpp, lens, notes

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        key = self._keys[level]
        if self._mapped[level]:
            shape = (key.imagelength, key.imagewidth, key.samplesperpixel)
            offset = self._pages[level].dataoffsets[0]
            rows = np.memmap(self._path, np.uint8, "r", offset, shape)[y : y + height]
            return _rgb(np.array(rows[:, x : x + width]))
        part = np.full((height, width, key.samplesperpixel), 255, np.uint8)
        columns, rows_ = _segment_size(key)
        across = -(-key.imagewidth // columns)
        for row in range(y // rows_, (y + height - 1) // rows_ + 1):
            for column in range(x // columns, (x + width - 1) // columns + 1):
                segment = self._segment(level, row * across + column)
                if segment is None:  # never written
                    continue
                left, top = column * columns - x, row * rows_ - y
                h, w = segment.shape[:2]
                h, w = min(h, height - top), min(w, width - left)
                part[max(0, top) : top + h, max(0, left) : left + w] = segment[
                    max(0, -top) : h, max(0, -left) : w
                ]
        return _rgb(part)

    def _segment(self, level: int, index: int) -> NDArray[np.uint8] | None:
        """One decoded tile or strip `[h, w, samples]`, from the cache if it was used lately."""
        if (level, index) in self._cache:
            self._cache.move_to_end((level, index))
            return self._cache[level, index]
        page, key = self._pages[level], self._keys[level]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        segment = None
        if count:
            self._file.filehandle.seek(offset)
            content = self._file.filehandle.read(count)
            tables = (
                {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
                if key.compression in (6, 7, 34892, 33007)
                else {}
            )
            decoded = key.decode(content, index, **tables)[0]
            segment = None if decoded is None else decoded[0]
        self._cache[level, index] = segment
        self._cached += 0 if segment is None else segment.nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached -= 0 if old is None else old.nbytes
        return segment

    def close(self) -> None:
        self._file.close()


def _segment_size(key: Any) -> tuple[int, int]:
    """Width and height of a level's tiles or strips."""
    if key.is_tiled:
        return int(key.tilewidth), int(key.tilelength)
    return int(key.imagewidth), int(min(key.rowsperstrip, key.imagelength))


def _rgb(pixels: NDArray[np.uint8]) -> Image.Image:
    """RGB, or RGBA over white."""
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    part = Image.fromarray(pixels)
    image = Image.new("RGB", part.size, "white")
    image.paste(part, mask=part.getchannel("A"))
    return image


def _openslide() -> Any:
    """OpenSlide, or `None`: tifffile alone reads much already."""
    try:
        import openslide
    except ImportError:
        return None
    return openslide


def _tifffile() -> Any:
    try:
        import imagecodecs  # noqa: F401 - tifffile decodes with it
        import tifffile
    except ImportError:
        raise GloVLMError(
            f"This slide is read by tifffile with imagecodecs, which are not installed: {_INSTALL}."
        ) from None
    return tifffile


def _description(page: Any) -> str:
    return str(getattr(page, "description", "") or "")


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _ome_size(text: str, axis: str) -> float | None:
    """Micrometres per pixel of the first picture in OME-XML; other units than lengths say none."""
    size = positive(_first(rf'PhysicalSize{axis}="([^"]+)"', text))
    unit = _first(rf'PhysicalSize{axis}Unit="([^"]+)"', text) or "µm"
    per = {"µm": 1.0, "&#181;m": 1.0, "&#xB5;m": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
    return size * per[unit] if size and unit in per else None
