"""Readers of labelled images (folders, CSV, parquet, Hub) into a `datasets.DatasetDict`.

`datasets`' own ImageFolder builder guesses (labels from a metadata file stay text, a file name
with `_test_` becomes a split, images without a row vanish), so the files are listed here and every
decision is explicit. Nothing is decoded while loading; `open_image` is the one decoder.
"""

import hashlib
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import GloVLMError, nearest
from ..files import finish_interrupted
from ..tables import column_name, read_table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MANIFEST = (
    "patient_id",
    "case_id",
    "slide_id",
    "glomerulus_id",
    "group_id",
    "block",
    "level",
    "stain",
    "mpp",
    "section_um",
    "scanner",
    "institution",
    "reader",
)
FLOAT_COLUMNS = frozenset({"mpp", "section_um"})
SYNTHETIC = "Synthetic images"  # in the description of data that were drawn
CAPTION = "caption"  # a text about the image, not about its origin as the MANIFEST columns
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
MAX_PIXELS = 80_000_000

# Pillow would also open EPS (through Ghostscript) and dozens of rare formats: only these are read.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
_SPLITS = {
    "train": "train",
    "support": "train",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
SPLIT_ORDER = ("train", "validation", "test")
_NO_VALUE = frozenset({"", "na", "n/a", "nan", "none", "null"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

ImageValue = Mapping[str, Any] | str | Path | Image.Image
_T = TypeVar("_T")
_R = TypeVar("_R")

logger = logging.getLogger("hf_glovlm")


@dataclass
class _Table:
    """Unchecked table of a reader, one row per image; values are text."""

    origin: str
    images: Any  # pyarrow array of struct<bytes, path>
    file_names: list[str]
    labels: list[str | None]
    splits: list[str | None] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)


def load_dataset(
    source: "str | Path | Dataset | DatasetDict", *, revision: str | None = None
) -> "DatasetDict":
    """Read a data set of labelled images; nothing is decoded.

    Sources, tried in this order:

    * a folder with `metadata.csv` (columns `file_name,label` and optionally `split` and the
      MANIFEST columns). The file wins over class folders; images without a row are left out and
      their number is logged. A given split may also be `train/metadata.csv` and
      `test/metadata.csv`.
    * a folder of class folders. The first folder below the root is the class; deeper folders belong
      to it. Folders without images are no class, hidden files are ignored. The folder holds a given
      split when a `train` (or `support`) and a `test` or `validation` (or `val`) folder lie in it,
      each with class folders; a class folder that merely bears the name `test` is a class, and
      file names never make a split.
    * a `.parquet` file: an image column of `{bytes, path}` or of paths relative to the file.
    * a Hub id `owner/name`: columns `image` and `label`, or else the only Image and the only
      ClassLabel feature.
    * a `Dataset` or `DatasetDict` in memory, with columns as on the Hub.

    Args:
        source: Folder, parquet file, Hub id (`~` is expanded), or a data set in memory.
        revision: Commit, tag or branch of a Hub data set.

    Returns:
        `{"all"}` where nothing is split, else `{"train", "test"[, "validation"]}` (a `validation`
        without a `test` serves as test, which is logged). Columns: `image`; `label` (ClassLabel,
        names sorted); `file_name` (relative POSIX path, or a row id); the MANIFEST columns
        that are there, `mpp` and `section_um` (micrometres) as floats, the others as text,
        missing values as None; and `caption`, if there is one, as text, empty where an image has
        none. All other columns are dropped.

    Raises:
        GloVLMError: Missing or empty source, a row without its file or its label, an unknown split,
            a file named twice, and the like.
    """
    if not isinstance(source, str | Path):
        return _assemble(_read_memory(source))
    path = Path(source).expanduser()
    if path.is_dir():
        finish_interrupted(path)
        tables = _read_folder(path)
    elif path.is_file():
        if path.suffix.lower() != ".parquet":
            raise GloVLMError(
                f"{path} is neither a folder nor a .parquet file; give the folder that holds the "
                "images (with class folders or a metadata.csv)."
            )
        tables = [_read_parquet(path)]
    else:
        tables = _read_hub(str(source), path, revision)
    loaded = _assemble(tables)
    if is_synthetic(path):
        for part in loaded.values():  # stays with what is selected or shuffled in memory
            part.info.description = SYNTHETIC
    return loaded


def is_synthetic(source: "str | Path | Dataset | DatasetDict") -> bool:
    """Whether data are marked as synthetic: a folder by its file `DRAWINGS` (`write_cohort`).

    Data in memory that were loaded from such a folder are marked in their description.
    """
    if isinstance(source, str | Path):
        return (Path(source).expanduser() / "DRAWINGS").is_file()
    parts = source.values() if isinstance(source, dict) else [source]
    return any(SYNTHETIC in (part.info.description or "") for part in parts)


def column(rows: "Dataset", name: str) -> list[Any]:
    """Column of a data set as a list; `image` as undecoded `{"bytes", "path"}` values."""
    if name == "image":
        from datasets import Image as ImageFeature

        rows = rows.select_columns([name]).cast_column(name, ImageFeature(decode=False))
    values: list[Any] = rows[name][:]
    return values


# ---------------------------------------------------------------------------------- readers


def _read_folder(root: Path) -> list[_Table]:
    files = _list_images(root)
    if (root / "metadata.csv").is_file():
        return [_read_metadata(root, "", files, None)]
    if not files:
        parquet = next(root.rglob("*.parquet"), None)
        hint = f"; give the file {parquet} instead" if parquet else ""
        raise GloVLMError(
            f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); expected one folder per class"
            f" with images in it, or a metadata.csv with file_name and label{hint}."
        )
    tops = sorted({name.split("/")[0] for name in files if "/" in name})
    with_metadata = [top for top in tops if (root / top / "metadata.csv").is_file()]
    if with_metadata and all(top.lower() in _SPLITS for top in with_metadata):
        if with_metadata != tops:
            without = sorted(set(tops) - set(with_metadata))
            raise GloVLMError(
                f"{root}: the folders {few(with_metadata)} have a metadata.csv but "
                f"{few(without)} not; write one for each, or a single {root / 'metadata.csv'}."
            )
        return [_read_metadata(root, top, files, _SPLITS[top.lower()]) for top in tops]
    return [_read_class_folders(root, files, tops)]


def _list_images(root: Path) -> list[str]:
    """Relative POSIX paths of all images below a folder, sorted; without hidden ones."""
    images: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if prefix == "." else prefix + "/"
        images += [
            prefix + name
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(images)


def _read_class_folders(root: Path, files: list[str], tops: list[str]) -> _Table:
    if not tops:
        raise GloVLMError(
            f"{root} holds {len(files)} images but nothing that labels them; put them into one "
            "folder per class or write a metadata.csv with file_name and label."
        )
    parts = [name.split("/") for name in files]
    roles = {_SPLITS.get(top.lower()) for top in tops}
    images = [p for p in parts if len(p) > 1]
    two_deep = all(len(p) > 2 for p in images)
    # Only `train` beside `test` or `validation` is a split; one such name may be a class.
    split = "train" in roles and bool(roles & {"test", "validation"})
    wrapped = len(tops) == 1 and None not in roles and two_deep
    if split and None in roles:
        other = [top for top in tops if top.lower() not in _SPLITS]
        raise GloVLMError(
            f"{root} holds folders of a given split beside other folders with images "
            f"({few(other)}); expected train, test and validation folders only, or class folders "
            "only: move the others away or write a metadata.csv."
        )
    if split and not two_deep:
        raise GloVLMError(
            f"{root} holds train and test folders whose images lie in no class folder; expected "
            "train/CLASS/image and test/CLASS/image, or a metadata.csv with file_name,label,split."
        )
    loose = len(parts) - len(images)
    if loose:
        logger.warning("%s: %d images outside any class folder are left out.", root, loose)
    depth = 1 if split or wrapped else 0
    names = ["/".join(p) for p in images]
    return _Table(
        origin=str(root),
        images=_image_paths(root, names),
        file_names=names,
        labels=[p[depth] for p in images],
        splits=[_SPLITS[p[0].lower()] for p in images] if split else None,
    )


def _read_metadata(root: Path, prefix: str, files: list[str], split: str | None) -> _Table:
    path = root / prefix / "metadata.csv"
    table = read_table(path, "a table of images")
    header, rows = table.names, table.rows
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    for needed in ("file_name", "label"):
        if needed not in columns:
            raise GloVLMError(
                f"{path} has no column {needed}; expected file_name,label and optionally split and "
                f"{', '.join(MANIFEST[:3])}; found {', '.join(header)}.{nearest(needed, header)}"
            )
    if not rows:
        raise GloVLMError(f"{path} has a header and no rows; write one row per image.")
    base = root / prefix
    below = prefix + "/" if prefix else ""
    known = {name[len(below) :] for name in files if name.startswith(below)}
    names: list[str] = []
    missing: list[str] = []
    for written in columns["file_name"]:
        name = "/".join(p for p in written.strip().replace("\\", "/").split("/") if p != ".")
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise GloVLMError(
                f"{path}: expected file names relative to and inside {base}, found '{written}'; "
                "correct that row."
            )
        if name not in known:
            if not (base / name).is_file():
                missing.append(name)
            elif os.path.splitext(name)[1].lower() not in SUFFIXES:
                raise GloVLMError(
                    f"{path} names {name}, which is no image of a known kind "
                    f"({', '.join(sorted(SUFFIXES))}); convert it or delete its row."
                )
        names.append(name)
    if missing:
        raise GloVLMError(
            f"{path}: {len(missing)} of {len(names)} rows name a file that is not there "
            f"({few(missing)}); add the files or delete the rows."
        )
    without_row = len(known.difference(names))
    if without_row:
        logger.warning("%s: %d images without a row are left out.", path, without_row)
    names = [below + name for name in names]
    given: list[str | None] | None = None
    if split is not None:
        given = [split] * len(names)
    elif "split" in columns:
        given = [value.strip() or None for value in columns["split"]]
    return _Table(
        origin=str(path),
        images=_image_paths(root, names),
        file_names=names,
        labels=[value.strip() or None for value in columns["label"]],
        splits=given,
        extra=_manifest_of(columns, str(path)),
    )


def _manifest_of(columns: Mapping[str, list[Any]], origin: str) -> dict[str, list[Any]]:
    """MANIFEST columns; a near miss gives a warning, since lost patient ids leak."""
    kept = {name: columns[name] for name in (*MANIFEST, CAPTION) if name in columns}
    ids = [name for name in MANIFEST if name.endswith("_id") and name not in kept]
    for name in columns:
        if name not in {*MANIFEST, CAPTION, "file_name", "label", "split", "image"}:
            squeezed = name.replace("_", "")
            meant = next((i for i in ids if squeezed in {i.replace("_", ""), i[:-3]}), None)
            if meant:
                logger.warning(
                    "%s: column %s is ignored; rename it to %s if it is that.", origin, name, meant
                )
    return kept


def _image_paths(root: Path, names: Iterable[str]) -> Any:
    base = os.path.abspath(root)
    return _image_array([{"bytes": None, "path": os.path.join(base, name)} for name in names])


def _image_array(values: Any) -> Any:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array(values, type=kind)


def _read_parquet(path: Path) -> _Table:
    from datasets import Features

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise GloVLMError(
            f"{path} is not a readable parquet file ({reason}); write it again."
        ) from None
    features = dict(Features.from_arrow_schema(table.schema))
    return _read_table(table, features, str(path), path.parent)


def _read_hub(source: str, path: Path, revision: str | None) -> list[_Table]:
    from .catalog import catalog_entries

    known = {entry.name: entry for entry in catalog_entries()}
    if source in known:
        raise GloVLMError(
            f"'{source}' is an entry of the catalogue, not data on this machine; get the images "
            f"from {known[source].source} and give the folder they lie in."
        )
    parent = path.parent
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not parent.is_dir()
    if not is_hub_id:
        siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        raise GloVLMError(
            f"{path} does not exist; expected a folder of images, a .parquet file, a Hub id "
            f"(owner/name) or a name of the catalogue.{nearest(path.name, [*siblings, *known])}"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(source, revision=revision)
    except Exception as error:  # network, authorisation and builder errors share no base class
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise GloVLMError(
            f"'{source}' is no folder here and could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the name, the network and, for a gated "
            "data set, your access, or give a local folder."
        ) from error
    return _read_splits(loaded, source)


def _read_memory(data: Any) -> list[_Table]:
    from datasets import Dataset, DatasetDict

    if not isinstance(data, Dataset | DatasetDict):
        raise GloVLMError(
            "Expected a folder, a .parquet file, a Hub id, a Dataset or a DatasetDict; found "
            f"{type(data).__name__}."
        )
    parts = data if isinstance(data, dict) else {"all": data}
    named = all("file_name" in rows.column_names for rows in parts.values())
    return _read_splits(parts, "the data set in memory", prefixed=not named)


def _read_splits(
    parts: Mapping[str, "Dataset"], origin: str, prefixed: bool = True
) -> list[_Table]:
    tables = []
    for name, split in _hub_splits(origin, list(parts)).items():
        # Formatted reading follows a selection or a shuffle, which the table below does not have.
        table, features = parts[name].with_format("arrow")[:], dict(parts[name].features)
        prefix = f"{name}/" if prefixed else ""
        tables.append(_read_table(table, features, origin, None, prefix, split))
    return tables


def _hub_splits(source: str, names: list[str]) -> dict[str, str | None]:
    if len(names) == 1:
        return {names[0]: None}
    roles: dict[str, str | None] = {name: _SPLITS.get(name.lower()) for name in names}
    unknown = [name for name, role in roles.items() if role is None]
    if unknown:
        raise GloVLMError(
            f"{source} has the splits {', '.join(names)}; expected train, validation and test only:"
            " download it and give the part you mean as a folder or parquet file."
        )
    return roles


def _read_table(
    table: Any,
    features: dict[str, Any],
    origin: str,
    base: Path | None,
    row_prefix: str = "",
    split: str | None = None,
) -> _Table:
    """Unchecked table from an Arrow table with `datasets` features."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    image = _pick("image", [n for n, f in features.items() if isinstance(f, ImageFeature)], table)
    label = _pick("label", [n for n, f in features.items() if isinstance(f, ClassLabel)], table)
    if image is None or label is None:
        expected, kind = ("image", "Image") if image is None else ("label", "ClassLabel")
        present = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
        raise GloVLMError(
            f"{origin} has no column '{expected}' and not exactly one {kind} column; found "
            f"{present}: rename the column you mean to '{expected}'."
        )
    names = features[label].names if isinstance(features[label], ClassLabel) else None
    labels = [_label_text(value, names, origin) for value in table.column(label).to_pylist()]
    others = {column_name(n): n for n in table.column_names if n not in (image, label)}
    kept = {
        key: table.column(name).to_pylist()
        for key, name in others.items()
        if key in {*MANIFEST, CAPTION, "file_name", "split"}
    }
    images, paths = _image_column(table.column(image), base, origin)
    written = kept.get("file_name", paths)
    if None in written or any(os.path.isabs(str(name)) for name in written):
        written = [f"{i:06d}" for i in range(len(labels))]
    splits: list[str | None] | None = None
    if split is not None:
        splits = [split] * len(labels)
    elif "split" in kept and base is not None:
        splits = [None if value is None else str(value) for value in kept["split"]]
    return _Table(
        origin=origin,
        images=images,
        file_names=[row_prefix + str(name).replace("\\", "/") for name in written],
        labels=labels,
        splits=splits,
        extra=_manifest_of({key: kept.get(key, []) for key in others}, origin),
    )


def _image_column(values: Any, base: Path | None, origin: str) -> tuple[Any, list[str | None]]:
    """Image column as `{bytes, path}` with absolute paths, and the paths as written."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        contents, paths = [None] * len(values), values.to_pylist()
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        contents, paths = values.to_pylist(), [None] * len(values)
    elif pa.types.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}:
        paths = pc.struct_field(values, "path").to_pylist()
        if pc.struct_field(values, "bytes").null_count == 0:
            return values, paths  # all embedded: never copied, it may be larger than memory
        contents = pc.struct_field(values, "bytes").to_pylist()
    else:
        raise GloVLMError(
            f"{origin}: expected images as {{bytes, path}} or as paths in the image column, found "
            f"{kind}; write it with `datasets` or as paths."
        )
    places = [None if p is None else os.path.join(os.path.abspath(base or ""), p) for p in paths]
    missing = []
    for row, (content, place) in enumerate(zip(contents, places, strict=True)):
        if content is None and not (place and os.path.isfile(place)):
            missing.append(str(paths[row] or f"row {row}"))
    if missing:
        raise GloVLMError(
            f"{origin}: {len(missing)} of {len(values)} rows name a file that is not there "
            f"({few(missing)}); add the files or delete the rows."
        )
    pairs = zip(contents, places, strict=True)
    return _image_array([{"bytes": content, "path": place} for content, place in pairs]), paths


def _pick(name: str, candidates: list[str], table: Any) -> str | None:
    if name in table.column_names:
        return name
    return candidates[0] if len(candidates) == 1 else None


def _label_text(value: Any, names: list[str] | None, origin: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, list | dict | float):
        raise GloVLMError(
            f"{origin}: expected one class per image in the label column, found {value!r}; "
            "give class names or whole numbers."
        )
    if names is None:
        return str(value).strip() or None
    return names[value] if 0 <= value < len(names) else None  # the Hub writes -1 for "unknown"


# --------------------------------------------------------------------------------- assembling


def _assemble(tables: list[_Table]) -> "DatasetDict":
    """Check the readers' tables and build the `DatasetDict`."""
    from datasets import DatasetDict, concatenate_datasets

    origin = tables[0].origin
    for table in tables:
        pairs = zip(table.file_names, table.labels, strict=True)
        unlabelled = [name for name, label in pairs if label is None]
        if unlabelled:
            raise GloVLMError(
                f"{origin}: {len(unlabelled)} of {len(table.labels)} rows have no label "
                f"({few(unlabelled)}); label them or delete the rows."
            )
    _unique_file_names(tables)
    names = sorted({label for table in tables for label in table.labels if label is not None})
    columns = (*MANIFEST, CAPTION)
    kept = [name for name in columns if any(name in table.extra for table in tables)]
    parts: dict[str | None, list[Dataset]] = {}
    for table in tables:
        extra = _clean_manifest(table, kept)
        for split, mask in _by_split(table):
            parts.setdefault(split, []).append(_dataset(table, extra, mask, names))
    built = {
        split: part[0] if len(part) == 1 else concatenate_datasets(part)
        for split, part in parts.items()
    }
    if len(built) == 1:
        return DatasetDict({"all": next(iter(built.values()))})
    if "train" not in built:
        raise GloVLMError(
            f"{origin} has a given split of test and validation but no train part; name the part "
            "that the shots are drawn from 'train'."
        )
    if "test" not in built:
        logger.warning("%s: no test part is given; the validation part is the test.", origin)
        built["test"] = built.pop("validation")
    return DatasetDict({name: built[name] for name in SPLIT_ORDER if name in built})


def _unique_file_names(tables: list[_Table]) -> None:
    counts = Counter(name for table in tables for name in table.file_names)
    twice = [name for name, n in counts.items() if n > 1]
    if twice:
        raise GloVLMError(
            f"{tables[0].origin} names {len(twice)} files more than once ({few(twice)}); keep one "
            "row per file."
        )


def _by_split(table: _Table) -> list[tuple[str | None, Any]]:
    """Given splits of a table, each with the mask of its rows (None: all rows)."""
    if table.splits is None or not any(table.splits):
        return [(None, None)]
    roles = []
    for name, value in zip(table.file_names, table.splits, strict=True):
        role = _SPLITS.get((value or "").lower())
        if role is None:
            raise GloVLMError(
                f"{table.origin}: expected train, test or validation in the column split, found "
                f"'{value or ''}' for {name}; fill every row or drop the column."
                f"{nearest(value or '', _SPLITS)}"
            )
        roles.append(role)
    if len(set(roles)) == 1:
        return [(roles[0], None)]
    values = np.array(roles)
    return [(role, values == role) for role in SPLIT_ORDER if role in roles]


def _clean_manifest(table: _Table, kept: list[str]) -> dict[str, list[Any]]:
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
                    f"'{text}' for {file_name}; correct it or leave it empty."
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


def _dataset(table: _Table, extra: dict[str, list[Any]], mask: Any, names: list[str]) -> "Dataset":
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
    from datasets import Image as ImageFeature
    from datasets.table import InMemoryTable

    features = {
        "image": ImageFeature(),
        "label": ClassLabel(names=names),
        "file_name": Value("string"),
        **{n: Value("float64" if n in FLOAT_COLUMNS else "string") for n in extra},
    }
    index = {name: i for i, name in enumerate(names)}
    columns = {
        "image": table.images.cast(features["image"].pa_type),
        "label": pa.array([index[label] for label in table.labels if label], pa.int64()),
        "file_name": pa.array(table.file_names, pa.string()),
        **{n: pa.array(v, features[n].pa_type) for n, v in extra.items()},
    }
    arrow = pa.table(columns)
    if mask is not None:
        arrow = arrow.filter(pa.array(mask))
    # By default `datasets` would hash all embedded images for its cache of results, which is not
    # used for tables in memory.
    info = DatasetInfo(features=Features(features))
    return Dataset(InMemoryTable(arrow), info=info, fingerprint=uuid4().hex)


def few(names: Sequence[str]) -> str:
    """The first three names, as an error lists them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------------- images


def open_image(value: ImageValue) -> Image.Image:
    """Decode an image to RGB.

    Grey, palette, 1-bit, CMYK and YCbCr are converted; alpha is composited over white (the colour
    of empty glass); the EXIF orientation is applied; of several frames the first is taken; colour
    profiles are ignored. Grey images deeper than 8 bits are rescaled by their bit depth, taken as
    the smallest of 8, 12, 16 and 31 bits that holds their largest value, so that value
    `2**bits - 1` becomes 255; floating point images whose largest value is at most 1 are scaled
    from 0..1, others like integers; negative values become 0. A picture is never stretched to its
    own minimum and maximum.

    Args:
        value: `{"path", "bytes"}` as `datasets` holds it undecoded, a path, or a Pillow image.

    Returns:
        Pillow image of mode RGB.

    Raises:
        GloVLMError: A missing, empty, truncated or foreign file, or more than MAX_PIXELS pixels.
    """
    name = _image_name(value)
    try:
        if isinstance(value, Image.Image):
            image = value
        else:
            content = _content(value)
            if not content:
                raise GloVLMError(f"{name} is empty (0 bytes); replace or remove it.")
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        return _to_rgb(_upright(image), name)
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
    if image.has_transparency_data:
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


def _image_name(value: ImageValue) -> str:
    if isinstance(value, Image.Image):
        return str(getattr(value, "filename", "") or "an image in memory")
    if isinstance(value, Mapping):
        return str(value.get("path") or "an image in memory")
    return str(value)


def _content(value: Mapping[str, Any] | str | Path) -> bytes:
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
        return hashlib.sha256(_content(value)).hexdigest()
    except OSError as error:
        raise GloVLMError(f"{_image_name(value)} cannot be read ({error.strerror}).") from None


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
