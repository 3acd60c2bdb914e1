"""Labelled images as a `datasets.DatasetDict`: read, checked row by row, and decoded.

`readers.py` reads folders, tables, parquet files and the Hub. Nothing is decoded while loading;
`open_image` is the one decoder.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ..errors import GloVLMError, nearest
from ..files import finish_interrupted
from .columns import CAPTION, FLOAT_COLUMNS, GROUP_IDS, MANIFEST, MASK, OUTLINE, Columns
from .listing import (
    PARENT,
    SPLIT_NAMES,
    few,
    groups_from,
    propose_groups,
    short,
    split_notes,
    split_roles,
)
from .readers import IMAGE_TYPE, RawRows, read_file, read_folder, read_hub, read_memory

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_READING = "Reading: "  # in a description, before the JSON of how the data were read
SYNTHETIC = "Synthetic images"  # in the description of data that were drawn
MAX_PIXELS = 80_000_000

# Pillow would also open EPS (through Ghostscript) and dozens of rare formats: only these are read.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
SPLIT_ORDER = ("train", "validation", "test")
_NO_VALUE = frozenset({"", "na", "n/a", "nan", "none", "null"})
ImageValue = Mapping[str, Any] | str | Path | Image.Image
_T = TypeVar("_T")
_R = TypeVar("_R")

logger = logging.getLogger("hf_glovlm")


@dataclass
class Reading:
    """How a data set was read, beside its rows.

    Attributes:
        notes: What is not as usual or was left out, a sentence each, without names of files or
            patients, so that results may hold it.
        named: The same with names, where a note has some.
        left_out: Number of files and rows that were not read, by kind.
    """

    notes: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def in_full(self) -> list[str]:
        """The notes, with names."""
        return [self.named.get(note, note) for note in self.notes]


def load_dataset(
    source: "str | Path | Dataset | DatasetDict",
    *,
    revision: str | None = None,
    columns: Columns | None = None,
) -> "DatasetDict":
    """Read a data set of labelled images; nothing is decoded.

    Sources, tried in this order:

    * a folder with `metadata.csv` (or `.tsv`, `.jsonl`, `.parquet`; columns `file_name,label` and
      optionally `split` and the MANIFEST columns). The file wins over class folders; images without
      a row are left out. A given split may also be `train/metadata.csv` and `test/metadata.csv`.
    * a folder of class folders. The first folder below the root is the class; deeper folders belong
      to it. Folders without images are no class. The folder holds a given split when its folders
      bear usual split names, whatever their case (`Training`, `val`, `dev`, `holdout`; `eval` is
      the test), each with class folders, or when every class folder holds such folders; a class
      folder that merely bears the name `test` is a class, and file names never make a split.
    * a folder of images with one other table that names them and their classes (`labels.csv`).
    * such a table itself, or a `.parquet` file: an image column of `{bytes, path}` or of paths
      relative to the file.
    * a Hub id `owner/name`: columns `image` and `label`, or else the only Image and the only
      ClassLabel feature.
    * a `Dataset` or `DatasetDict` in memory, with columns as on the Hub.

    Tables are read in the dialects of `read_table`. Columns that people call otherwise (`filename`,
    `class`, `Patient ID`) are taken where there is one of the kind. What is not as usual, and every
    file that was left out, is logged and stated by `describe_reading`.

    Args:
        source: Folder, table, Hub id (`~` is expanded), or a data set in memory.
        revision: Commit, tag or branch of a Hub data set.
        columns: Which columns hold images, classes and patients, or how file names hold patients.

    Returns:
        `{"all"}` where nothing is split, else `{"train", "test"[, "validation"]}` (a `validation`
        without a `test` serves as test, which is logged). Columns: `image`; `label` (ClassLabel,
        names sorted); `file_name` (relative POSIX path, or a row id); the MANIFEST columns
        that are there, `mpp` and `section_um` (micrometres) as floats, the others as text,
        missing values as None; and `caption`, if there is one, as text, empty where an image has
        none. All other columns are dropped.

    Raises:
        GloVLMError: Missing or empty source, a row without its file or its label, an unknown split,
            a file named twice, columns or patients that are not there, and the like.
    """
    columns = columns or Columns()
    if not isinstance(source, str | Path):
        before = describe_reading(source) if isinstance(source, dict) else Reading()
        return _assemble(read_memory(source, columns), columns, before)
    path = Path(source).expanduser()
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise GloVLMError(
            f"The name of {str(path)!r} is not UTF-8, and its images could not be named: rename it."
        ) from None
    if path.is_dir():
        finish_interrupted(path)
        tables = read_folder(path, columns)
    elif path.is_file():
        tables = read_file(path, columns)
    else:
        tables = read_hub(str(source), path, revision, columns)
    loaded = _assemble(tables, columns)
    if is_synthetic(path):
        for part in loaded.values():  # stays with what is selected or shuffled in memory
            part.info.description = f"{SYNTHETIC}\n{part.info.description}"
    return loaded


def describe_reading(ds: "DatasetDict") -> Reading:
    """How a data set was read, as `load_dataset` stated it in the description of its parts."""
    for part in ds.values():
        for line in (part.info.description or "").splitlines():
            if line.startswith(_READING):
                return Reading(**json.loads(line.removeprefix(_READING)))
    return Reading()


def is_synthetic(source: "str | Path | Dataset | DatasetDict") -> bool:
    """Whether data are marked as synthetic: a folder by its file `DRAWINGS` (`write_cohort`).

    Data in memory that were loaded from such a folder are marked in their description.
    """
    if isinstance(source, str | Path):
        return (Path(source).expanduser() / "DRAWINGS").is_file()
    parts = source.values() if isinstance(source, dict) else [source]
    return any(SYNTHETIC in (part.info.description or "") for part in parts)


def column(rows: "Dataset", name: str) -> list[Any]:
    """Column of a data set as a list; `image`, `mask` as undecoded `{"bytes", "path"}` values."""
    if name in ("image", MASK):
        from datasets import Image as ImageFeature

        rows = rows.select_columns([name]).cast_column(name, ImageFeature(decode=False))
    elif rows.format["type"] is None:  # plain values, without the walk through a formatter
        stored = rows.data.column(name)
        chosen = stored if rows._indices is None else stored.take(rows._indices.column(0))
        return cast(list[Any], chosen.to_pylist())
    return cast(list[Any], rows[name][:])


# --------------------------------------------------------------------------------- assembling


def _assemble(
    tables: list[RawRows], columns: Columns, before: Reading | None = None
) -> "DatasetDict":
    """Check the readers' rows and build the `DatasetDict`; `before` is an earlier reading."""
    from datasets import DatasetDict, concatenate_datasets

    origin = tables[0].origin
    for table in tables:
        pairs = zip(table.file_names, table.labels, strict=True)
        unlabelled = [name for name, label in pairs if label is None]
        if unlabelled and table.to_label:
            if len(unlabelled) == len(table.labels):
                raise GloVLMError(
                    f"{origin}: none of {len(unlabelled)} rows has a label yet; fill in the column "
                    "label, row by row (its image is named in file_name)."
                )
            table.drop_unlabelled()
        elif unlabelled:
            raise GloVLMError(
                f"{origin}: {len(unlabelled)} of {len(table.labels)} rows have no label "
                f"({few(unlabelled)}); label them or delete the rows."
            )
    _unique_file_names(tables)
    reading = before or Reading()
    for table in tables:
        reading.notes += table.notes
        reading.named |= table.named
    reading.left_out |= sum((table.left_out for table in tables), Counter())
    _set_groups(tables, columns, reading)
    names = sorted({label for table in tables for label in table.labels if label is not None})
    kept = [name for name in (*MANIFEST, CAPTION) if any(name in table.extra for table in tables)]
    parts: dict[str | None, list[Dataset]] = {}
    masked = any(table.masks is not None for table in tables)
    for table in tables:
        if masked and table.masks is None:
            table.masks = pa.nulls(len(table.labels), IMAGE_TYPE)
        extra = _clean_manifest(table, kept)
        for split, mask in _by_split(table, reading):
            parts.setdefault(split, []).append(_dataset(table, extra, mask, names))
    built = {
        split: part[0] if len(part) == 1 else concatenate_datasets(part)
        for split, part in parts.items()
    }
    if len(built) == 1:
        built = {"all": next(iter(built.values()))}
    elif "train" not in built:
        raise GloVLMError(
            f"{origin} has a given split of test and validation but no train part; name the part "
            "that the shots are drawn from 'train'."
        )
    elif "test" not in built:
        reading.notes.append("no test part is given; the validation part is the test")
        built["test"] = built.pop("validation")
    reading.notes = list(dict.fromkeys(reading.notes))
    for note in reading.in_full:
        logger.warning("%s: %s.", origin, note)
    for part in built.values():
        part.info.description = _READING + json.dumps(asdict(reading))
    return DatasetDict({name: built[name] for name in ("all", *SPLIT_ORDER) if name in built})


def _set_groups(tables: list[RawRows], columns: Columns, reading: Reading) -> None:
    """Patients from file names, where that was asked for; else a proposal where none is known."""
    names = [name for table in tables for name in table.file_names]
    labels = [label for table in tables for label in table.labels]
    known = [
        name
        for name in GROUP_IDS
        if any(_cell(value) is not None for table in tables for value in table.extra.get(name, ()))
    ]
    if columns.group_from is None:
        proposal = None if known else propose_groups(names, labels)
        if proposal is not None:
            note, patients = proposal
            reading.notes.append(note)
            reading.named[note] = f"{note} ({few(patients)})"
        return
    ids = iter(groups_from(columns.group_from, names, labels))
    for table in tables:
        table.extra["patient_id"] = [next(ids) for _ in table.file_names]
    where = "folders" if columns.group_from == PARENT else "file names"
    reading.notes.append(f"patients are read from {where}")
    if "patient_id" in known:
        reading.notes.append("the column patient_id is not read, since group_from takes its place")


def _unique_file_names(tables: list[RawRows]) -> None:
    counts = Counter(name for table in tables for name in table.file_names)
    twice = [name for name, n in counts.items() if n > 1]
    if twice:
        raise GloVLMError(
            f"{tables[0].origin} names {len(twice)} files more than once ({few(twice)}); keep one "
            "row per file."
        )


def _by_split(table: RawRows, reading: Reading) -> list[tuple[str | None, Any]]:
    """Given splits of a table, each with the mask of its rows (None: all rows)."""
    if table.splits is None or not any(table.splits):
        return [(None, None)]
    written = [value or "" for value in table.splits]
    meant = split_roles(dict.fromkeys(written), table.origin)
    for name, value in zip(table.file_names, written, strict=True):
        if meant[value] is None:
            raise GloVLMError(
                f"{table.origin}: expected train, test or validation in the column split, found "
                f"'{short(value)}' for {name}; fill every row or drop the column."
                f"{nearest(value[:60], SPLIT_NAMES)}"
            )
    roles = [str(meant[value]) for value in written]
    if len(set(roles)) == 1:
        return [(roles[0], None)]
    reading.notes += split_notes(meant)
    values = np.array(roles)
    return [(role, values == role) for role in SPLIT_ORDER if role in roles]


def _clean_manifest(table: RawRows, kept: list[str]) -> dict[str, list[Any]]:
    nothing = [None] * len(table.labels)
    clean: dict[str, list[Any]] = {}
    for name in kept:
        if name == CAPTION:
            texts = table.extra.get(name, nothing)
            clean[name] = ["" if text is None else str(text).strip() for text in texts]
            continue
        values = [_cell(value) for value in table.extra.get(name, nothing)]
        if name not in FLOAT_COLUMNS:
            clean[name] = values
            continue
        numbers = [positive(value) for value in values]
        for file_name, text, number in zip(table.file_names, values, numbers, strict=True):
            if text is not None and number is None:
                raise GloVLMError(
                    f"{table.origin}: expected a positive number of micrometres in {name}, found "
                    f"'{short(text)}' for {file_name}; correct it or leave it empty."
                )
        clean[name] = numbers
    return clean


def positive(value: Any) -> float | None:
    """Positive, finite number of a cell or tag; `None` for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _cell(value: Any) -> str | None:
    """Text of a cell; `NA` and the like are missing, and 12.0 (a number beside gaps) is 12."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in _NO_VALUE else text


def _dataset(table: RawRows, extra: dict[str, list[Any]], mask: Any, names: list[str]) -> "Dataset":
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
    from datasets import Image as ImageFeature
    from datasets.table import InMemoryTable

    features = {
        "image": ImageFeature(),
        "label": ClassLabel(names=names),
        "file_name": Value("string"),
        **{n: Value("float64" if n in FLOAT_COLUMNS else "string") for n in extra},
        **({} if table.masks is None else {MASK: ImageFeature()}),
    }
    index = {name: i for i, name in enumerate(names)}
    columns = {
        "image": table.images.cast(features["image"].pa_type),
        "label": pa.array([index[label] for label in table.labels if label], pa.int64()),
        "file_name": pa.array(table.file_names, pa.string()),
        **{n: pa.array(v, features[n].pa_type) for n, v in extra.items()},
        **({} if table.masks is None else {MASK: table.masks.cast(features[MASK].pa_type)}),
    }
    arrow = pa.table(columns)
    if mask is not None:
        arrow = arrow.filter(pa.array(mask))
    # By default `datasets` would hash all embedded images for its cache of results, which is not
    # used for tables in memory.
    info = DatasetInfo(features=Features(features))
    return Dataset(InMemoryTable(arrow), info=info, fingerprint=uuid4().hex)


# ------------------------------------------------------------------------------------- images


def open_image(value: ImageValue, draft: int = 0) -> Image.Image:
    """Decode an image to RGB.

    Grey, palette, 1-bit, CMYK and YCbCr are converted; alpha is composited over white (the colour
    of empty glass), unless the file states that it is an outline (see `outlines.py`), which hides
    nothing; the EXIF orientation is applied; of several frames the first is taken; colour
    profiles are ignored. Grey images deeper than 8 bits are rescaled by their bit depth, taken as
    the smallest of 8, 12, 16 and 31 bits that holds their largest value, so that value
    `2**bits - 1` becomes 255; floating point images whose largest value is at most 1 are scaled
    from 0..1, others like integers; negative values become 0. A picture is never stretched to its
    own minimum and maximum.

    Args:
        value: `{"path", "bytes"}` as `datasets` holds it undecoded, a path, or a Pillow image.
        draft: Least width and height that a JPEG file is decoded at, by libjpeg at a half, a
            quarter or an eighth of its size; 0 decodes it in full.

    Returns:
        Pillow image of mode RGB.

    Raises:
        GloVLMError: A missing, empty, truncated or foreign file, or more than MAX_PIXELS pixels.
    """
    return _decode(value, _to_rgb, draft=draft)


def decode_image(value: ImageValue) -> Image.Image:
    """Decode an image and turn it upright; its mode and its alpha channel stay.

    Args:
        value: As `open_image` takes it.

    Raises:
        GloVLMError: As `open_image`.
    """
    return _decode(value, lambda image, name: image)


def open_decoded(image: Image.Image, name: str) -> Image.Image:
    """What `open_image` makes of an image that was decoded.

    Args:
        image: As `decode_image` returns it.
        name: Of its file, for errors.

    Raises:
        GloVLMError: As `open_image`.
    """
    return _decode(image, _to_rgb, name)


def _decode(
    value: ImageValue,
    convert: Callable[[Image.Image, str], Image.Image],
    name: str = "",
    draft: int = 0,
) -> Image.Image:
    """Decode an image, turn it upright and convert it, with an error that names the file."""
    name = name or image_name(value)
    try:
        if isinstance(value, Image.Image):
            image = value
        else:
            content = read_content(value)
            if not content:
                raise GloVLMError(f"{name} is empty (0 bytes); replace or remove it.")
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if draft and isinstance(image, JpegImageFile):
            image.draft(None, (draft, draft))
        image.load()
        return convert(_upright(image), name)
    except GloVLMError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise GloVLMError(
            f"{name} has more than {MAX_PIXELS:,} pixels, the limit; cut the glomeruli out first."
        ) from None
    except FileNotFoundError:
        raise GloVLMError(
            f"{name} does not exist; expected an image file, correct the path."
        ) from None
    except UnidentifiedImageError:
        raise GloVLMError(
            f"{name} is not an image that can be read (PNG, JPEG, TIFF, BMP, WebP); replace or "
            "remove it."
        ) from None
    except Exception as error:  # Pillow's decoders fail on broken files in a dozen ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GloVLMError(
            f"{name} is corrupt or truncated ({reason}); replace or remove it."
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # broken EXIF beside good pixels
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image, name).convert("RGB")
    if image.has_transparency_data and OUTLINE not in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "LAB":
        raise GloVLMError(f"{name} is in the colour space LAB; save it as RGB.")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise GloVLMError(f"{name} holds values that are not finite; save it as 16-bit grey.")
    high = values.max()
    if image.mode == "F" and high <= 1:
        full = 1
    else:
        full = 2 ** next((bits for bits in (8, 12, 16) if high < 2**bits), 31) - 1
    scaled = np.clip(np.rint(values * (255 / full)), 0, 255)
    return Image.fromarray(scaled.astype(np.uint8))


def image_name(value: ImageValue) -> str:
    """What an image is called in sentences."""
    if isinstance(value, Image.Image):
        return str(getattr(value, "filename", "") or "an image in memory")
    if isinstance(value, Mapping):
        return str(value.get("path") or "an image in memory")
    return str(value)


def read_content(value: Mapping[str, Any] | str | Path) -> bytes:
    """Content of an image's file."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path") or ""
        if not value:
            raise GloVLMError("An image value has neither bytes nor a path; give one of them.")
    return Path(value).expanduser().read_bytes()


def content_hash(value: ImageValue) -> str:
    """Content hash: SHA-256 of an image's file content (of the RGB pixels for a Pillow image).

    Raises:
        GloVLMError: The file cannot be read.
    """
    if isinstance(value, Image.Image):
        rgb = open_image(value)
        return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
    try:
        return hashlib.sha256(read_content(value)).hexdigest()
    except OSError as error:
        raise GloVLMError(f"{image_name(value)} cannot be read ({error.strerror}).") from None


def in_threads(function: Callable[[_T], _R], values: Iterable[_T]) -> list[_R]:
    """Parallel map over small files; reading and decoding release the interpreter lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, values))


def dataset_fingerprint(ds: "DatasetDict") -> str:
    """Fingerprint of a data set: SHA-256 over sorted pairs of file content and class name.

    It depends on neither file names, order, path nor split, so that two people can check that
    they measured on the same labelled images.
    """
    pairs: list[tuple[str, str]] = []
    for rows in ds.values():
        names = rows.features["label"].names
        labels = [names[label] for label in column(rows, "label")]
        pairs += zip(in_threads(content_hash, column(rows, "image")), labels, strict=True)
    return fingerprint_of(pairs)


def fingerprint_of(pairs: Iterable[tuple[str, str]]) -> str:
    """Fingerprint from pairs of content hash and class name."""
    digest = hashlib.sha256()
    for content, label in sorted(pairs):
        digest.update(f"{content} {label}\n".encode())
    return digest.hexdigest()
