"""Readers of labelled images: folders, tables, parquet files, the Hub and data in memory.

`datasets`' own ImageFolder builder guesses (labels from a metadata file stay text, a file name
with `_test_` becomes a split, images without a row vanish), so the files are listed here and every
decision is explicit, and noted where it is not the usual one.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import GloVLMError, nearest
from ..files import read_manifest
from ..tables import TABLE_SUFFIXES, Table, column_name, read_table
from .columns import (
    FLOAT_COLUMNS,
    GROUP_IDS,
    MANIFEST,
    MASK,
    Columns,
    has_column,
    missing_column,
)
from .listing import (
    SHEETS,
    SUFFIXES,
    FileNames,
    Listing,
    few,
    follow_moves,
    list_files,
    look_like_patients,
    plain_path,
    short,
    split_notes,
    split_role,
    split_roles,
)

if TYPE_CHECKING:
    from datasets import Dataset

PARQUET = (".parquet", ".pq")
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Folders that say what kind of files they hold, not of which class these are.
_GENERIC = {
    "images", "image", "imgs", "img", "pictures", "photos", "png", "jpg", "jpeg", "tif", "tiff",
    "data", "dataset", "raw", "crops", "tiles", "patches", "files", "masks", "mask", "labels",
    "annotations",
}  # fmt: skip


@dataclass
class RawRows:
    """Unchecked rows of a reader, one an image; values are text.

    Attributes:
        origin: Where they come from, for sentences.
        images: pyarrow array of struct<bytes, path>.
        file_names: Relative POSIX paths, or row ids.
        labels: Class names.
        splits: Given splits as written.
        extra: The MANIFEST columns and `caption`.
        masks: pyarrow array like `images`, null for an image without a mask; or none at all.
        notes: How the data were read, where that is not the usual way.
        named: Notes that, in full, name files.
        left_out: Number of files that were not read, by kind.
        mask_names: Relative paths of the masks, which are no images without a row.
        to_label: Whether rows without a label are such that a person labels later: crops.
    """

    origin: str
    images: Any
    file_names: list[str]
    labels: list[str | None]
    splits: list[str | None] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    masks: Any = None
    notes: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    mask_names: list[str] = field(default_factory=list)
    to_label: bool = False

    def drop_unlabelled(self) -> None:
        """Leave out the rows without a label, and note their number."""
        kept = [label is not None for label in self.labels]
        number = kept.count(False)
        if not number:
            return
        self.images = self.images.filter(pa.array(kept))
        self.file_names, self.labels = (
            [*compress(self.file_names, kept)],
            [*filter(None, self.labels)],
        )
        self.splits = self.splits and [*compress(self.splits, kept)]
        self.masks = None if self.masks is None else self.masks.filter(pa.array(kept))
        self.extra = {name: [*compress(values, kept)] for name, values in self.extra.items()}
        self.notes.append(f"{number} of {len(kept)} rows have no label yet and are left out")
        self.left_out["without a label"] = number


# ---------------------------------------------------------------------------------------- folders


def read_folder(root: Path, columns: Columns) -> list[RawRows]:
    """Read a folder: by its table of images, else by its class folders."""
    listing = list_files(root)
    rows = _tables_of(root, listing, columns)
    if rows:
        _count_unlisted(listing, rows)
    else:
        rows = [_read_class_folders(root, listing, columns)]
    unread = {*listing.tables} - {path for path in listing.tables if _is_read(root, path, rows)}
    for path in sorted(unread):
        listing.leave_out(os.path.splitext(path)[1].lower(), path)
    rows[0].left_out.update(listing.left_out)
    if listing.left_out:
        rows[0].notes.append(listing.note(named=False))
        rows[0].named[rows[0].notes[-1]] = listing.note()
    return rows


def _count_unlisted(listing: Listing, rows: Sequence[RawRows]) -> None:
    """Count the images that no table lists."""
    listed = {name for table in rows for name in (*table.file_names, *table.mask_names)}
    without_row = len({*listing.images} - listed)
    if without_row:
        rows[0].notes.append(f"{without_row} images without a row are left out")
        rows[0].left_out["without a row"] = without_row


def _is_read(root: Path, path: str, rows: Sequence[RawRows]) -> bool:
    return str(root / path) in {one.origin for one in rows}


def read_file(path: Path, columns: Columns) -> list[RawRows]:
    """Read a parquet file, or a table of images with the files below its folder."""
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return [_read_parquet(path, columns)]
    if suffix not in TABLE_SUFFIXES:
        raise GloVLMError(
            f"{path} is neither a folder nor a .parquet file nor a table ("
            f"{', '.join(sorted(TABLE_SUFFIXES))}); give the folder that holds the images (with "
            "class folders or a metadata.csv)."
        )
    listing = list_files(path.parent)
    rows = [_read_images_table(path.parent, path.name, listing, columns)]
    _count_unlisted(listing, rows)
    return rows


def _tables_of(root: Path, listing: Listing, columns: Columns) -> list[RawRows]:
    """Rows of the table or tables that label a folder's images; none where folders do."""

    def read(path: str, split: str | None = None) -> RawRows:
        if path.lower().endswith(PARQUET):
            return _read_parquet(root / path, columns)
        return _read_images_table(root, path, listing, columns, split)

    own = [path for path in listing.tables if _stem(path) == "metadata" and "/" not in path]
    if own:
        return [read(min(own, key=lambda path: (_ORDER.index(_suffix(path)), path)))]
    if not listing.images:
        raise _no_images(root, listing)
    tops = sorted({name.split("/")[0] for name in listing.images if "/" in name})
    parts = {
        top: [path for path in listing.tables if _stem(path) == f"{top}/metadata"] for top in tops
    }
    with_metadata = [top for top in tops if parts[top]]
    if with_metadata and all(map(split_role, with_metadata)):
        if with_metadata != tops:
            without = sorted(set(tops) - set(with_metadata))
            raise GloVLMError(
                f"{root}: the folders {few(with_metadata)} have a metadata.csv but "
                f"{few(without)} not; write one for each, or a single {root / 'metadata.csv'}."
            )
        roles = split_roles(tops, str(root))
        tables = [read(parts[top][0], roles[top]) for top in tops]
        tables[0].notes += split_notes(roles)
        return tables
    labelling = [path for path in listing.tables if _labels_images(root / path, columns)]
    problem = None
    try:
        layout = _find_layout(root, listing.images)
    except GloVLMError as error:  # a table may label them still
        layout, problem = None, error
    if layout is not None and len(layout.classes) > 1:
        return _agreeing(root, layout, listing, columns, read)
    part_of = {path: path.split("/")[0] if "/" in path else _stem(path) for path in labelling}
    of_splits = [path for path in labelling if split_role(part_of[path])]
    roles = split_roles(map(part_of.__getitem__, of_splits), str(root))
    if "train" in roles.values() and len(of_splits) == len({*roles.values()}) > 1:
        tables = [read(path, roles[part_of[path]]) for path in of_splits]
        tables[0].notes.append(f"the split is that of the tables {', '.join(of_splits)}")
        return tables
    if len(labelling) > 1:
        raise GloVLMError(
            f"{root} holds several tables that may label its images ({few(labelling)}); give the "
            "one you mean in place of the folder, or name it metadata.csv."
        )
    if labelling:
        rows = read(labelling[0])
        rows.notes.append(f"classes are read from {labelling[0]}")
        return [rows]
    beside = listing.tables or _sheets(root) or any("/" not in name for name in listing.images)
    if layout is None or beside:  # one folder, and something that may say more
        raise (
            _unlabelled(root, listing) if listing.tables else problem or _unlabelled(root, listing)
        )
    return []


def _agreeing(
    root: Path,
    layout: "_Layout",
    listing: Listing,
    columns: Columns,
    read: Callable[[str], RawRows],
) -> list[RawRows]:
    """Rows of the one table beside class folders that says the same and more; else none.

    Raises:
        GloVLMError: It gives an image another class than its folder.
    """
    at_root = [path for path in listing.tables if "/" not in path]
    tables = [
        path for path in at_root if _labels_images(root / path, columns, {"label", *GROUP_IDS})
    ]
    if len(tables) != 1:
        return []
    try:
        rows = read(tables[0])
    except GloVLMError:  # of other images
        return []
    for name, label in zip(rows.file_names, rows.labels, strict=True):
        parts = name.split("/")
        if len(parts) > layout.label + 1 and label not in (None, parts[layout.label]):
            raise GloVLMError(
                f"{root}: {tables[0]} gives {name} the class '{short(str(label))}', its folder "
                f"'{parts[layout.label]}'; name the table metadata.csv if it is right, or move it "
                "away if the folders are."
            )
    unsplit = layout.split is not None and rows.splits is None
    if unsplit or len(rows.labels) < len(listing.images) - layout.loose:
        return []
    rows.notes.append(f"beside the folders, {tables[0]} is read")
    return [rows]


def metadata_of(folder: Path) -> Path | None:
    """The table `metadata` right in a folder, as CSV or JSON lines."""
    places = (folder / f"metadata{suffix}" for suffix in _ORDER if suffix not in PARQUET)
    return next((path for path in places if path.is_file()), None)


_ORDER = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", *PARQUET)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _labels_images(
    path: Path, columns: Columns, either: frozenset[str] | set[str] = frozenset({"label"})
) -> bool:
    """Whether a table has columns of images and of classes, or of `either`."""
    try:
        if path.suffix.lower() in PARQUET:
            header = pq.read_schema(path).names
        else:
            header = read_table(path, "a table of images").header
        chosen, _ = columns.choose(header, str(path))
    except (GloVLMError, pa.ArrowException, OSError):
        return False
    return bool({"file_name", "image"} & {*chosen, *header} and either & {*chosen})


def _no_images(root: Path, listing: Listing) -> GloVLMError:
    parquet = next((path for path in listing.tables if path.lower().endswith(PARQUET)), None)
    hint = f"; give the file {root / parquet} instead" if parquet else ""
    others = f" {listing.note()}." if listing.left_out else ""
    return GloVLMError(
        f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); expected one folder per class"
        f" with images in it, or a metadata.csv with file_name and label{hint}.{others}"
    )


def _unlabelled(root: Path, listing: Listing) -> GloVLMError:
    """What to do with images that nothing labels; names the tables that may."""
    near = [*listing.tables, *_sheets(root)]
    if not near and root.parent != root:
        near = [f"../{name}" for name in _sheets(root.parent, TABLE_SUFFIXES | {*PARQUET, ".xlsx"})]
    text = (
        f"{root} holds {len(listing.images)} images but nothing that labels them; put them into "
        "one folder per class or write a metadata.csv with file_name and label."
    )
    if len(near) == 1 and near[0].lower().endswith(tuple(TABLE_SUFFIXES)):
        path = root / near[0]
        header = read_table(path, "a table of images").header
        chosen, _ = Columns().choose(header, str(path))
        roles = [role for role in ("file_name", "label") if role not in chosen]
        what = " and ".join(missing_column(role, header).rstrip(".") for role in roles)
        what = what or "give it in place of the folder, or move it above the images"
        return GloVLMError(f"{text} Beside them lies {near[0]} ({few(header)}): {what}.")
    if near:
        text += f" If {few(near)} has their classes, save it as metadata.csv in that form."
    return GloVLMError(text)


def _sheets(folder: Path, suffixes: frozenset[str] | set[str] = SHEETS) -> list[str]:
    """Files right in a folder that may hold a table."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if _suffix(name) in suffixes and not name.startswith(".")]


@dataclass(frozen=True)
class _Layout:
    """Layout of class folders: which part of a path is the class, and which the split."""

    label: int
    split: int | None
    classes: frozenset[str]
    notes: tuple[str, ...] = ()
    loose: int = 0  # images above all classes


def _find_layout(root: Path, files: Sequence[str]) -> _Layout | None:
    """Layout of class folders, `None` where no folder can be a class.

    Raises:
        GloVLMError: Folders of a split beside other folders, without class folders, or two that
            may be one part.
    """
    paths = [name.split("/") for name in files if "/" in name]
    deep = min((len(path) for path in paths), default=1) - 1  # folders above every image

    def names(place: int) -> list[str]:
        return sorted({path[place] for path in paths if len(path) > place + 1})

    def is_split(place: int) -> bool:
        roles = {split_role(name) for name in names(place)} if deep > place else set()
        return "train" in roles and len(roles) > 1 and None not in roles

    place, notes = 0, []
    while deep > place + 1 and len(names(place)) == 1:
        (only,) = names(place)
        part = split_role(only)
        inside = part or only.casefold() in _GENERIC
        if not inside and not (is_split(place + 1) and deep > place + 2):
            break
        if part:
            notes.append(f"all images lie in '{only}', which is read as the {part} part alone")
        place += 1
        if part:
            return _Layout(place, None, frozenset(names(place)), tuple(notes))
    tops = names(place)
    if not tops:
        return None
    roles = split_roles(tops, str(root))
    given, others = {*roles.values()} - {None}, [top for top in tops if roles[top] is None]
    if len(given) > 1 and others:
        raise GloVLMError(
            f"{root} holds folders of a given split beside other folders with images "
            f"({few(others)}); expected train, test and validation folders only, or class folders "
            "only: move the others away or write a metadata.csv."
        )
    if given and not others:
        if deep < place + 2:
            raise GloVLMError(
                f"{root} holds {few(tops)} folders whose images lie in no class folder; expected "
                "train/CLASS/image and test/CLASS/image, or a metadata.csv with "
                "file_name,label,split."
            )
        return _Layout(place + 1, place, frozenset(names(place + 1)), tuple(split_notes(roles)))
    if all(top.casefold() in _GENERIC for top in tops):
        return None
    if is_split(place + 1):
        roles = split_roles(names(place + 1), str(root))
        return _Layout(place, place + 1, frozenset(tops), tuple(split_notes(roles)))
    for top in tops:
        if roles[top]:
            notes.append(f"'{top}' is read as a class, since it lies beside other classes")
    if look_like_patients(tops):
        notes.append(
            "the folders that are read as classes look like patients: put folders of classes above "
            "them, or write a metadata.csv with file_name, label and patient_id"
        )
    return _Layout(place, None, frozenset(tops), tuple(notes), len(files) - len(paths))


def _read_class_folders(root: Path, listing: Listing, columns: Columns) -> RawRows:
    layout = _find_layout(root, listing.images)
    if layout is None:
        raise _unlabelled(root, listing)
    for asked in ("image_column", "label_column", "group_column"):
        if getattr(columns, asked) is not None:
            raise GloVLMError(
                f"{root} has no table of images, so no column '{getattr(columns, asked)}': write a "
                f"metadata.csv, or leave --{asked.replace('_', '-')} out."
            )
    paths = [name.split("/") for name in listing.images]
    images = [path for path in paths if len(path) > layout.label + 1]
    names = ["/".join(path) for path in images]
    place = layout.split
    rows = RawRows(
        origin=str(root),
        images=_image_paths(root, names),
        file_names=names,
        labels=[path[layout.label] for path in images],
        splits=None if place is None else [split_role(path[place]) for path in images],
        notes=[*layout.notes],
    )
    loose = len(paths) - len(images)
    if loose:
        rows.notes.append(f"{loose} images outside any class folder are left out")
        rows.left_out["outside any class folder"] = loose
    for path in listing.tables:
        if "/" not in path and _labels_images(root / path, columns):
            rows.notes.append(
                f"{path} is not read, since folders label the images: name it metadata.csv to read "
                "it in their place"
            )
    return rows


# ----------------------------------------------------------------------------------------- tables


def _read_images_table(
    root: Path, name: str, listing: Listing, columns: Columns, split: str | None = None
) -> RawRows:
    """Rows of a table of images: `name` is its path below `root`."""
    path = root / name
    table = read_table(path, "a table of images")
    chosen, notes = columns.choose(table.header, str(path))
    layout = None
    if "file_name" in chosen and "label" not in chosen and not has_column("label", table.header):
        layout = _find_layout(root, listing.images)
        layout = layout if layout is not None and len(layout.classes) > 1 else None
        notes.append("classes are read from folders, since the table has none")
    for needed in ("file_name", "label"):
        if needed not in chosen and (needed == "file_name" or layout is None):
            raise GloVLMError(
                f"{path} has no column {needed}; expected file_name,label and optionally split and "
                f"{', '.join(MANIFEST[:3])}; found {short(', '.join(table.header), 1000)}: "
                f"{missing_column(needed, table.header)}"
            )
    if not table.rows:
        raise GloVLMError(f"{path} has a header and no rows; write one row per image.")
    values = {
        role: [row[table.header.index(written)] for row in table.rows]
        for role, written in chosen.items()
    }
    below = name.rpartition("/")[0]
    below = below + "/" if below else ""
    if not any(image.startswith(below) for image in listing.images):
        below = ""
    inside = {image.removeprefix(below) for image in listing.images if image.startswith(below)}
    to_label, followed = _are_crops(root), 0
    if to_label and layout is None:
        values["file_name"], values["label"], followed = follow_moves(
            values["file_name"], values["label"], inside
        )
    if followed:
        notes.append(f"{followed} crops lie in another folder now, whose class they have")
    names, moved = _find_images(root / below, path, inside, values.pop("file_name"))
    whole = [below + one for one in names]
    if layout is not None:
        values["label"] = [_folder_of(one, layout.label, path) for one in whole]
    if moved:
        notes.append(f"{moved} file names lie below other folders or are spelled otherwise")
    rows = RawRows(
        origin=str(path),
        images=_image_paths(root, whole),
        file_names=whole,
        labels=[value.strip() or None for value in values.pop("label")],
        splits=None if split is None else [split] * len(names),
        notes=notes,
        to_label=to_label,
    )
    if MASK in values:
        rows.mask_names = _find_masks(root, below, path, inside, values.pop(MASK), rows)
    if table.dialect:
        rows.notes.append(f"the table is read {table.dialect}")
    given = values.pop("split", None)
    if split is None and given is not None:
        own = column_name(chosen["split"]) == "split"
        if own or all(map(split_role, given)):
            rows.splits = [value.strip() or None for value in given]
        else:
            rows.notes.remove(f"split is read from the column '{chosen['split']}'")
    if rows.splits is None:
        tops = [one.split("/")[0] if "/" in one else "" for one in whole]
        roles = split_roles(dict.fromkeys(tops), str(root))
        if None not in roles.values() and "train" in roles.values() and len({*roles.values()}) > 1:
            rows.splits = [*tops]
            rows.notes.append("the split is that of the folders, since the table has none")
    rows.extra = {
        role: [*map(table.number, cells)] if role in FLOAT_COLUMNS else cells
        for role, cells in values.items()
    }
    rows.notes += _near_misses(table.names, chosen)
    return rows


def _are_crops(root: Path) -> bool:
    """Whether a folder was made by `data crops`: objects without a class are to be labelled."""
    try:
        manifest = read_manifest(root)
    except GloVLMError:  # of somebody else
        return False
    return manifest is not None and manifest.kind == "crops"


def _folder_of(name: str, place: int, path: Path) -> str:
    """Class folder of an image that a table without classes lists."""
    parts = name.split("/")
    if len(parts) < place + 2:
        raise GloVLMError(
            f"{path} has no column label, and {name} lies in no class folder; label it in the "
            "table or move it into one."
        )
    return parts[place]


def _find_images(
    base: Path, path: Path, inside: set[str], written: Sequence[str]
) -> tuple[list[str], int]:
    """Files that the names in a table mean, and how many are spelled or placed otherwise."""
    known = FileNames(inside, base)
    names, missing, moved = [], [], 0
    for cell in written:
        name = plain_path(cell)
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise GloVLMError(
                f"{path}: expected file names relative to and inside {base}, found "
                f"'{short(cell)}'; correct that row."
            )
        meant = known.find(cell)
        if meant is None:
            if not os.path.isfile(os.path.join(base, name)):
                missing.append(name)
            elif _suffix(name) not in SUFFIXES:
                raise GloVLMError(
                    f"{path} names {short(name)}, which is no image of a known kind "
                    f"({', '.join(sorted(SUFFIXES))}); convert it or delete its row."
                )
        elif meant != name:
            moved += 1
        names.append(meant or name)
    if missing:
        raise GloVLMError(
            f"{path}: {len(missing)} of {len(names)} rows name a file that is not there "
            f"({few(missing)}); add the files or delete the rows."
        )
    return names, moved


def _find_masks(
    root: Path, below: str, path: Path, inside: set[str], written: Sequence[str], rows: RawRows
) -> list[str]:
    """Read the column of masks into the rows; returns their relative paths."""
    places = [i for i, cell in enumerate(written) if cell.strip()]
    known = FileNames(inside, root / below)
    base = root / below
    there = [known.find(written[i]) or (base / plain_path(written[i])).is_file() for i in places]
    if not any(there):  # a column of that name that holds something else
        rows.notes.append("the column mask names no file and is not read")
        return []
    names, _ = _find_images(base, path, inside, [written[i] for i in places])
    values: list[dict[str, Any] | None] = [None] * len(written)
    for i, name in zip(places, names, strict=True):
        values[i] = {"bytes": None, "path": os.path.join(os.path.abspath(base), name)}
    rows.masks = pa.array(values, type=IMAGE_TYPE)
    return [below + name for name in names]


def images_column(table: Table) -> int | None:
    """Place of the column of a table that names its images, `None` without one."""
    chosen, _ = Columns(group_from="parent").choose(table.header, str(table.path))
    return table.header.index(chosen["file_name"]) if "file_name" in chosen else None


def _near_misses(names: Iterable[str], chosen: Mapping[str, str]) -> list[str]:
    """Columns that may be meant for one of the MANIFEST, since lost patient ids leak."""
    used = {column_name(written) for written in chosen.values()}
    ids = [name for name in MANIFEST if name.endswith("_id") and name not in chosen]
    notes = []
    for name in names:
        if name not in {*used, *MANIFEST}:
            squeezed = name.replace("_", "")
            meant = next((i for i in ids if squeezed in {i.replace("_", ""), i[:-3]}), None)
            if meant:
                notes.append(f"column {name} is ignored; rename it to {meant} if it is that")
    return notes


def _image_paths(root: Path, names: Iterable[str]) -> Any:
    base = os.path.abspath(root)
    return _image_array([{"bytes": None, "path": os.path.join(base, name)} for name in names])


def _image_array(values: Any) -> Any:
    return pa.array(values, type=IMAGE_TYPE)


# ------------------------------------------------------------------------------- parquet and Hub


def _read_parquet(path: Path, columns: Columns) -> RawRows:
    from datasets import Features

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise GloVLMError(
            f"{path} is not a readable parquet file ({reason}); write it again."
        ) from None
    try:
        features = dict(Features.from_arrow_schema(table.schema))
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GloVLMError(f"{path} has a column of a kind unknown here ({reason[:200]}).") from None
    return _read_arrow(table, features, str(path), columns, path.parent)


def read_hub(source: str, path: Path, revision: str | None, columns: Columns) -> list[RawRows]:
    """Read a data set of the Hub."""
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
    return _read_splits(loaded, source, columns)


def read_memory(data: Any, columns: Columns) -> list[RawRows]:
    """Read a data set in memory."""
    from datasets import Dataset, DatasetDict

    if not isinstance(data, Dataset | DatasetDict):
        raise GloVLMError(
            "Expected a folder, a .parquet file, a Hub id, a Dataset or a DatasetDict; found "
            f"{type(data).__name__}."
        )
    parts = data if isinstance(data, dict) else {"all": data}
    named = all("file_name" in rows.column_names for rows in parts.values())
    return _read_splits(parts, "the data set in memory", columns, prefixed=not named)


def _read_splits(
    parts: Mapping[str, "Dataset"], origin: str, columns: Columns, prefixed: bool = True
) -> list[RawRows]:
    roles = _hub_splits(origin, list(parts))
    read = []
    for name, split in roles.items():
        # Formatted reading follows a selection or a shuffle, which the table below does not have.
        table, features = parts[name].with_format("arrow")[:], dict(parts[name].features)
        prefix = f"{name}/" if prefixed else ""
        read.append(_read_arrow(table, features, origin, columns, None, prefix, split))
    read[0].notes += split_notes(roles)
    return read


def _hub_splits(source: str, names: list[str]) -> dict[str, str | None]:
    if len(names) == 1:
        return {names[0]: None}
    roles = split_roles(names, source)
    unknown = [name for name, role in roles.items() if role is None]
    if unknown:
        raise GloVLMError(
            f"{source} has the splits {', '.join(names)}; expected train, validation and test only:"
            " download it and give the part you mean as a folder or parquet file."
        )
    return roles


def _read_arrow(
    table: Any,
    features: dict[str, Any],
    origin: str,
    columns: Columns,
    base: Path | None,
    row_prefix: str = "",
    split: str | None = None,
) -> RawRows:
    """Unchecked rows of an Arrow table with `datasets` features."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    typed = {
        "file_name": _pick("image", ImageFeature, features),
        "label": _pick("label", ClassLabel, features),
    }
    known = {role: name for role, name in typed.items() if name is not None}
    chosen, notes = columns.choose(table.column_names, origin, known)
    image, label = chosen.pop("file_name", None), chosen.pop("label", None)
    if image is None or label is None:
        expected, kind = ("image", "Image") if image is None else ("label", "ClassLabel")
        present = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
        raise GloVLMError(
            f"{origin} has no column '{expected}' and not exactly one {kind} column; found "
            f"{present}: rename the column you mean to '{expected}' or give --{expected}-column."
        )
    names = features[label].names if isinstance(features[label], ClassLabel) else None
    labels = [_label_text(value, names, origin) for value in table.column(label).to_pylist()]
    images, paths = _image_column(table.column(image), base, origin)
    named = next((n for n in table.column_names if column_name(n) == "file_name"), None)
    written = paths if named in (None, image) else table.column(named).to_pylist()
    if None in written or any(os.path.isabs(str(name)) for name in written):
        written = [f"{i:06d}" for i in range(len(labels))]
    given = chosen.pop("split", None)
    splits: list[str | None] | None = None
    if split is not None:
        splits = [split] * len(labels)
    elif given is not None and column_name(given) == "split" and base is not None:
        values = table.column(given).to_pylist()
        splits = [None if value is None else str(value) for value in values]
    notes = [note for note in notes if not note.startswith("split is read")]
    masks = chosen.pop(MASK, None)
    spelled = [column_name(name) for name in table.column_names]
    used = {"file_name": image, "label": label, "split": given or "split", **chosen}
    return RawRows(
        origin=origin,
        images=images,
        file_names=[row_prefix + str(name).replace("\\", "/") for name in written],
        labels=labels,
        splits=splits,
        extra={role: table.column(name).to_pylist() for role, name in chosen.items()},
        masks=None if masks is None else _mask_column(table.column(masks), base, origin),
        notes=[*notes, *_near_misses(spelled, used)],
    )


def _mask_column(values: Any, base: Path | None, origin: str) -> Any:
    """Column of masks like that of the images, null where there is none; `None` without any."""
    given = pc.is_valid(values).to_pylist()
    if pa.types.is_struct(values.type) and {f.name for f in values.type} == {"bytes", "path"}:
        parts = (pc.struct_field(values, name) for name in ("bytes", "path"))
        present = zip(*(pc.is_valid(part).to_pylist() for part in parts), strict=True)
        given = [one and any(both) for one, both in zip(given, present, strict=True)]
    if not any(given):
        return None
    present, _ = _image_column(values.filter(pa.array(given)), base, origin)
    masks = iter(present.to_pylist())
    return _image_array([next(masks) if one else None for one in given])


def _pick(name: str, kind: type, features: Mapping[str, Any]) -> str | None:
    """The column of this name, else the only one of a kind."""
    if name in features:
        return name
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    return typed[0] if len(typed) == 1 else None


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
