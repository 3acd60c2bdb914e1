"""Bags of tile features: one file a slide, as other tools read it, written resumably.

A finished bag is `NAME.h5` with the datasets `features` float32 `[n, dim]` and `coords` int64
`[n, 2]` (x, y of a tile's top left corner at level 0) and, from a classifier, `scores` float32
`[n, classes]` (logits). Attributes of the file say how it came about, of which slide, and what the
checksums of its content are; `coords` carries those that CLAM and TRIDENT look for. An unfinished
bag is `NAME.h5.part`: one line of JSON, then records of fixed length with a checksum each, only
ever appended to. A process killed in the middle of a record leaves a tail that is no record and is
dropped; an HDF5 file killed in the middle of a write may be lost as a whole. So `NAME.h5` is there
completely or not at all.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from ...errors import GloVLMError
from ...files import digest_value, explaining_disk, replacing
from .tile_attributes import DEFAULT_ENGINE
from .tiles import MAX_TILES
from .wsi import describe_slide, is_elsewhere, is_same_slide

# Of what lies in a bag: raise it when rows of an old one may not stand in for those of a new one.
BAG_VERSION = 2
COPY_ROWS = 4096  # rows at a time between the unfinished and the finished file
SUFFIXES = (".h5", ".hdf5")
MAX_RATIO = 50  # of a dataset over its file: no compression saves more on features
_OURS = ("settings", "checksums", "complete", "version")  # attributes of a bag that is ours

# Attributes that other tools look for on the coordinates rather than on the file.
_ON_COORDS = (
    "patch_size",
    "patch_size_level0",
    "patch_level",
    "level0_magnification",
    "target_magnification",
    "overlap",
    "name",
    "level0_width",
    "level0_height",
)


@dataclass(frozen=True)
class Bag:
    """Bag: the tile features of one slide.

    Attributes:
        features: Float32 `[n, dim]`, not normalised.
        coords: Int64 `[n, 2]`: x, y of the tiles at level 0.
        name: Of the slide.
        attributes: Of the file; `classes` names the columns of `scores`.
        scores: Float32 `[n, classes]`, logits; `None` where they were not asked for.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None


class BagWriter:
    """Append the tiles of one slide to a bag; a later writer goes on where an earlier one stopped.

    What an earlier one left of another slide, by another version of the package, or damaged, is
    begun again.

    Args:
        path: Of the finished file, `NAME.h5`.
        dim: Width of the features.
        n_scores: Number of scores per tile; 0 for none.
        attributes: JSON values that decide what the rows are. A run that resumes must give the
            same, so nothing that changes from run to run belongs here.
        slide: The file whose tiles these are, known by its content; `None` is not compared.
        dated: Whether the slide's time of change is kept, which spares reading a large one again.

    Attributes:
        rows: Number of rows so far.
        is_complete: Whether the finished file is there.
        notes: What lay there and is begun again, and why, in sentences.

    Raises:
        GloVLMError: What lies there was written with other settings, or is no bag of ours.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dim: int,
        n_scores: int = 0,
        attributes: Mapping[str, Any],
        slide: Path | None = None,
        dated: bool = True,
    ) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.dim, self.n_scores, self.slide = dim, n_scores, slide
        self.notes: list[str] = []
        self._record = np.dtype(
            [
                ("coords", "<i8", (2,)),
                ("features", "<f4", (dim,)),
                ("scores", "<f4", (n_scores,)),
                ("checksum", "<u8"),
            ]
        )
        self._header: dict[str, Any] = {
            "version": BAG_VERSION,
            "dim": dim,
            "n_scores": n_scores,
            "attributes": json.loads(json.dumps(dict(attributes))),
        }
        with explaining_disk(self.part):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            finished = self._read_finished()
            self.is_complete = finished is not None
            known = finished or self._read_part()
            if known is None:
                known = {"slide": slide and describe_slide(slide, dated=dated)}
                self._begin(known["slide"])
            self._header["slide"] = known["slide"]
            if finished is not None:
                self.rows = int(finished["rows"])
                self.part.unlink(missing_ok=True)  # a kill had left it
                return
        self._start = len(_beginning(self.part))
        self.keep(self._count_rows())

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the bag."""
        return dict(self._header["attributes"])

    @property
    def source(self) -> Any:
        """Identity of the slide, as `describe_slide` gives it; `None` where none was given."""
        return self._header["slide"]

    def keep(self, rows: int) -> None:
        """Drop everything behind the first rows, and a record that was cut off."""
        self.rows = rows
        with explaining_disk(self.part):
            os.truncate(self.part, self._start + rows * self._record.itemsize)

    def read_coords(self) -> NDArray[np.int64]:
        """The coordinates of the rows so far, `[rows, 2]`."""
        parts = [np.empty((0, 2), np.int64), *(block["coords"] for block in self._blocks())]
        coords: NDArray[np.int64] = np.concatenate(parts)
        return coords

    def append(
        self, features: ArrayLike, coords: ArrayLike, scores: ArrayLike | None = None
    ) -> None:
        """Write rows to the disk.

        Args:
            features: `[k, dim]`, finite.
            coords: `[k, 2]`.
            scores: `[k, n_scores]`, finite; only and always where `n_scores` is not 0.

        Raises:
            GloVLMError: Other shapes, a number that is not finite, or the bag is finished.
        """
        if self.is_complete:
            raise GloVLMError(f"{self.path} is finished; delete it to write it again.")
        k = np.shape(features)[0]
        given: dict[str, NDArray[Any]] = {
            "features": np.asarray(features, np.float32),
            "coords": np.asarray(coords, np.int64),
            "scores": np.empty((k, 0)) if scores is None else np.asarray(scores, np.float32),
        }
        block = np.empty(k, self._record)
        for name, values in given.items():
            if values.shape != block[name].shape:
                raise GloVLMError(
                    f"{self.path}: expected {name} of shape {list(block[name].shape)}, found "
                    f"{list(values.shape)}."
                )
            if not np.isfinite(values).all():
                raise GloVLMError(
                    f"{self.path}: {name} of {k} tiles hold numbers that are not finite; check the "
                    "model's weights, or load them in float32."
                )
            block[name] = values
        block["checksum"] = self._checksums(block)
        with explaining_disk(self.part), self.part.open("r+b", buffering=0) as file:
            file.seek(self._start + self.rows * self._record.itemsize)
            _write_all(file, block.tobytes())
        self.rows += k

    def complete(self) -> Path:
        """Turn the rows into the finished file and remove the unfinished one.

        Raises:
            GloVLMError: There is no row, or h5py is not installed.
        """
        if self.is_complete:
            return self.path
        if self.rows == 0:
            raise GloVLMError(f"{self.path} would hold no tile: a bag needs at least one.")
        with replacing(self.path) as fresh, _H5Stream(fresh) as stream:
            with _h5py().File(stream, "w") as file:
                self._fill(file)
            stream.check()
        self.part.unlink(missing_ok=True)
        self.is_complete = True
        return self.path

    def _fill(self, file: Any) -> None:
        """Copy the rows into the finished file, with attributes and checksums."""
        width = {"features": (self.dim, np.float32), "coords": (2, np.int64)}
        width |= {"scores": (self.n_scores, np.float32)} if self.n_scores else {}
        tables, sums = {}, {}
        for name, (columns, dtype) in width.items():
            tables[name] = file.create_dataset(name, (self.rows, columns), dtype)
            sums[name] = _begin_checksum(tables[name])
        done = 0
        for block in self._blocks():
            rows = slice(done, done := done + len(block))
            for name, table in tables.items():
                values = np.ascontiguousarray(block[name])
                sums[name].update(values.data)
                table[rows] = values
        about = {"settings": json.dumps(self.attributes), "slide": json.dumps(self.source)}
        checksums = {name: str(value.hexdigest()) for name, value in sums.items()}
        checksums |= {name: digest_value(text) for name, text in about.items()}
        file.attrs.update(about)
        file.attrs["checksums"] = json.dumps(checksums)
        file.attrs["version"] = BAG_VERSION
        file.attrs["complete"] = True
        for name in _ON_COORDS:
            if self.attributes.get(name) is not None:
                tables["coords"].attrs[name] = self.attributes[name]

    def _blocks(self) -> Iterator[NDArray[Any]]:
        """The rows so far, some thousand at a time."""
        with self.part.open("rb") as file:
            file.seek(self._start)
            for done in range(0, self.rows, COPY_ROWS):
                count = min(COPY_ROWS, self.rows - done)
                content = file.read(count * self._record.itemsize)
                yield np.frombuffer(content, self._record, count)

    def _checksums(self, block: NDArray[Any]) -> list[int]:
        """Checksum of each record."""
        size, content = self._record.itemsize, memoryview(block.tobytes())
        return [
            int(xxhash.xxh3_64_intdigest(content[i : i + size - 8]))
            for i in range(0, len(content), size)
        ]

    def _count_rows(self) -> int:
        """Number of whole records before the first that is damaged."""
        self.rows = (self.part.stat().st_size - self._start) // self._record.itemsize
        good = 0
        for block in self._blocks():
            same = block["checksum"] == np.array(self._checksums(block), np.uint64)
            if not same.all():
                good += int(same.argmin())
                self.notes.append(f"{self.part.name} is damaged behind tile {good}")
                return good
            good += len(block)
        return good

    def _begin(self, slide: Any) -> None:
        """Begin the unfinished file."""
        header = self._header | {"slide": slide}
        line = {"digest": digest_value(header), **header}
        self.part.write_bytes(json.dumps(line).encode() + b"\n")

    def _read_finished(self) -> dict[str, Any] | None:
        """Slide and number of rows of the finished file, if it may stand for what is asked."""
        if not self.path.exists():
            return None
        with suppress(_Damage), _open(self.path) as file:
            if not _is_ours(file):
                raise GloVLMError(
                    f"{self.path} was not written by `glovlm slide`: move it, or write to another "
                    "folder."
                )
        damage = find_damage(self.path)
        if damage is not None:
            self.notes.append(f"{self.path.name} {damage}")
            return None
        with _open(self.path) as file:
            rows, dim = file["features"].shape
            header = {
                "version": int(file.attrs["version"]),
                "dim": int(dim),
                "n_scores": int(file["scores"].shape[1]) if "scores" in file else 0,
                "attributes": _parsed(file.attrs["settings"]),
                "slide": json.loads(file.attrs["slide"]),
            }
        return header | {"rows": rows} if self._may_stand(self.path, header) else None

    def _read_part(self) -> dict[str, Any] | None:
        """Header of the unfinished file, if it may be gone on with."""
        if not self.part.is_file() or not _beginning(self.part).endswith(b"\n"):
            return None
        header = _parsed(_beginning(self.part))
        if header.pop("digest", None) != digest_value(header):
            self.notes.append(f"{self.part.name} is damaged, or of an earlier version")
            return None
        return header if self._may_stand(self.part, header) else None

    def _may_stand(self, place: Path, header: dict[str, Any]) -> bool:
        """Whether rows are of this slide and version; refuses those of other settings."""
        if header["version"] != BAG_VERSION:
            self.notes.append(f"{place.name} is of another version")
            return False
        if self.slide is not None and not is_same_slide(self.slide, header["slide"]):
            if place == self.path and is_elsewhere(self.slide, header["slide"]):
                raise GloVLMError(
                    f"{place} holds the tiles of another slide of this name, from another folder: "
                    "write to another folder, or rename the slide."
                )
            self.notes.append(f"{place.name} is of another slide, or the slide's file has changed")
            return False
        _same_settings(place, header, self._header)
        return True


def read_bag(path: str | Path, *, scores: bool = False) -> Bag:
    """Read the features of one slide, written here or by CLAM, TRIDENT, STAMP and their like.

    Args:
        path: An H5 file with `features` (or, by STAMP, `feats`) `[n, dim]` (or `[1, n, dim]`) and
            `coords` `[n, 2]`.
        scores: Whether to read the classifier's scores too.

    Raises:
        GloVLMError: The file is missing, unfinished, of another layout, or holds no scores.
    """
    path = Path(path)
    with _open(path) as file:
        attributes: dict[str, Any] = {}
        if _is_ours(file):
            _check_version(path, file)
            attributes = _parsed(file.attrs["settings"])
        else:
            for holder in (file, file[_features_of(file)], file["coords"]):
                values = {str(k): _plain(v) for k, v in holder.attrs.items()}
                attributes |= {k: v for k, v in values.items() if v is not None}
        features = _matrix(path, file, _features_of(file)).astype(np.float32, copy=False)
        coords = _whole(_matrix(path, file, "coords"))
        if coords.shape != (len(features), 2):
            raise GloVLMError(
                f"{path}: expected coords of shape [{len(features)}, 2] for {len(features)} "
                f"features, found {list(coords.shape)}; write the file again."
            )
        if scores and "scores" not in file:
            raise GloVLMError(
                f"{path} holds features without scores: encode the slide with a classifier (what "
                "`glovlm train` wrote) rather than with a backbone."
            )
        logits = _matrix(path, file, "scores").astype(np.float32) if scores else None
    name = str(attributes.get("name") or path.stem)
    return Bag(features, coords, name, attributes, logits)


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a bag of ours, finished (`NAME.h5`) or not (`NAME.h5.part`), unchecked.

    Args:
        path: The file.

    Returns:
        Its attributes; empty where the file cannot be read, or is of another kind.
    """
    if path.suffix == ".part":
        held = _parsed(_beginning(path)).get("attributes") if path.is_file() else None
        return held if isinstance(held, dict) else {}
    if path.suffix in SUFFIXES:
        with suppress(GloVLMError), _open(path) as file:
            return _parsed(file.attrs.get("settings"))
    return {}


def find_damage(path: Path) -> str | None:
    """What is wrong with a bag of ours, in some words; `None` where all checksums are right.

    Its datasets are read in pieces, so the memory does not grow with the slide.

    Args:
        path: The finished file.
    """
    if not path.is_file():
        return "is missing"
    try:
        with _open(path) as file:
            _check_version(path, file)
            for name in file:
                _check_size(path, file, name)
                rows = range(0, len(file[name]), COPY_ROWS)
                blocks = (file[name][i : i + COPY_ROWS] for i in rows)
                _check(path, file, name, blocks)
    except GloVLMError as error:
        return str(error).removeprefix(f"{path} ").partition(":")[0]
    return None


def list_bags(folder: str | Path) -> list[Path]:
    """The finished bags of a folder, sorted by name; unfinished ones are left out.

    Raises:
        GloVLMError: The folder is missing or holds no feature file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GloVLMError(f"Expected a folder of feature files (NAME.h5), found nothing: {folder}.")
    bags = sorted(
        p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".")
    )
    if not bags:
        parts = len(list(folder.glob("*.part")))
        begun = f" {parts} unfinished ones lie there: run `glovlm slide` again." if parts else ""
        raise GloVLMError(
            f"Expected feature files (NAME.h5) in {folder}, found none: `glovlm slide` writes "
            f"them.{begun}"
        )
    return bags


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise GloVLMError(
            "Feature files need h5py, which is not installed: pip install 'hf-glovlm[slides]'."
        ) from None
    return h5py


class _Damage(GloVLMError):
    """A bag that cannot be read, or whose content is not what was written."""


class _H5Stream(io.FileIO):
    """File that keeps the disk's first error until `check`: HDF5 can neither report nor bear it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of it; after an error nothing more."""
        self._try(lambda: _write_all(super(_H5Stream, self), content))
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        """Set the length; after an error no more."""
        self._try(lambda: super(_H5Stream, self).truncate(size))
        return size or 0

    def _try(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error

    def check(self) -> None:
        """Raise the error."""
        if self.error is not None:
            raise self.error


def _write_all(file: Any, content: Any) -> None:
    """Write to a file without a buffer, which may take less at a time."""
    rest = memoryview(content)
    while len(rest):
        rest = rest[file.write(rest) :]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An H5 file that holds features and coordinates; whatever its reader stumbles on is damage."""
    h5py = _h5py()
    if not path.is_file():
        part = path.with_name(path.name + ".part").is_file()
        begun = " The run that writes it was not finished: start it again." if part else ""
        raise GloVLMError(f"There is no feature file {path}.{begun}")
    try:
        with h5py.File(path, "r") as file, np.errstate(all="ignore"):
            needed = (_features_of(file), "coords")
            missing = [name for name in needed if not _is_dataset(file, name)]
            if missing:
                if _is_ours(file):
                    raise _Damage(_changed(path, missing[0]))
                held = ", ".join(file) or "nothing"
                raise GloVLMError(
                    f"{path}: expected the datasets features and coords, found {held}; give "
                    "feature files of `glovlm slide`, CLAM, TRIDENT or STAMP."
                )
            yield file
    except GloVLMError:
        raise
    except PermissionError as error:
        raise GloVLMError(f"{path} cannot be read ({error.strerror}).") from None
    except Exception:  # HDF5 fails on damaged files in a dozen ways
        raise _Damage(
            f"{path} is no readable H5 file: it is damaged or of another kind; encode the slide "
            "again."
        ) from None


def _is_dataset(file: Any, name: str) -> bool:
    h5py = _h5py()
    try:
        return isinstance(file.get(name), h5py.Dataset)
    except (OSError, KeyError, RuntimeError):  # a link to nowhere
        return False


def _features_of(file: Any) -> str:
    """Name of the dataset of features: STAMP calls it `feats`."""
    return "features" if "features" in file or "feats" not in file else "feats"


def _is_ours(file: Any) -> bool:
    return any(name in file.attrs for name in _OURS)


def _check_version(path: Path, file: Any) -> None:
    """Refuse a bag of ours without checksums, or whose attributes have changed."""
    sums = _parsed(file.attrs.get("checksums"))
    if not sums or file.attrs.get("version") != BAG_VERSION:
        raise _Damage(
            f"{path} is of another version, or damaged: encode the slide again (`glovlm slide`)."
        )
    for name in ("settings", "slide"):
        if sums.get(name) != digest_value(file.attrs.get(name)):
            raise _Damage(_changed(path, name))
    missing = {"features", "coords", *sums} - {"settings", "slide", *file}
    if missing:
        raise _Damage(_changed(path, min(missing)))


def _check(path: Path, file: Any, name: str, blocks: Any) -> None:
    """Compare a dataset of ours with its checksum."""
    digest = _begin_checksum(file[name])
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    if _parsed(file.attrs["checksums"]).get(name) != digest.hexdigest():
        raise _Damage(_changed(path, name))


def _changed(path: Path, name: str) -> str:
    return (
        f"{path} is damaged ({name} are not what was written): encode the slide again (`glovlm "
        "slide`), or restore a copy."
    )


def _begin_checksum(dataset: Any) -> Any:
    return xxhash.xxh3_128(f"{dataset.dtype.str} {dataset.shape}".encode())


def _check_size(path: Path, file: Any, name: str) -> None:
    """Refuse a dataset of no numbers, or one that could not be in a file of this size."""
    dataset = file[name]
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8 or dataset.ndim not in (2, 3):
        raise GloVLMError(
            f"{path}: expected {name} as a matrix of numbers with one row a tile, found shape "
            f"{list(dataset.shape or ())} of {dataset.dtype}."
        )
    status = path.stat()
    stored = 512 * getattr(status, "st_blocks", 0) or status.st_size  # less, in a sparse file
    most = MAX_RATIO * max(min(status.st_size, stored), 2**16)
    if dataset.external or max(dataset.shape) > MAX_TILES or dataset.nbytes > most:
        shape = " x ".join(f"{n:,}" for n in dataset.shape)
        raise _Damage(
            f"{path} is damaged: its {name} are {shape} by its header, which a file of "
            f"{status.st_size:,} bytes cannot hold; write it again."
        )


def _matrix(path: Path, file: Any, name: str) -> NDArray[Any]:
    """A dataset as a matrix, with its checksum compared where the file is ours."""
    _check_size(path, file, name)
    values: NDArray[Any] = file[name][()]
    if _is_ours(file):
        _check(path, file, name, [values])
    if values.ndim == 3 and len(values) == 1:  # a batch of one slide
        values = values[0]
    if values.ndim != 2 or (name == "coords" and not np.isfinite(values).all()):
        raise GloVLMError(
            f"{path}: expected {name} as a matrix of numbers with one row a tile, found shape "
            f"{list(values.shape)} of {values.dtype}."
        )
    return values


def _whole(coords: NDArray[Any]) -> NDArray[np.int64]:
    """Coordinates as whole numbers; STAMP's are fractions of micrometres."""
    if coords.dtype.kind == "f":
        coords = np.rint(np.clip(coords, -(2.0**62), 2.0**62))
    return coords.astype(np.int64, copy=False)


def _plain(value: Any) -> Any:
    """An attribute as a plain Python value; `None` for what is none, such as a reference."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist() if value.dtype.kind in "fiubSUO" else None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        value = [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | list) else None


def _beginning(path: Path) -> bytes:
    """The first line, or what there is of it."""
    with path.open("rb") as file:
        return file.readline()


def _parsed(text: Any) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _same_settings(path: Path, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse to mix rows of two settings in one file."""
    old, new = (
        {name: part[name] for name in ("dim", "n_scores")} | DEFAULT_ENGINE | part["attributes"]
        for part in (actual, expected)
    )
    names = [name for name in {**new, **old} if name != "measured"]  # how a choice came about
    first = next((name for name in names if old.get(name) != new.get(name)), None)
    if first is not None:
        raise GloVLMError(
            f"{path} was written with other settings ({first}: {old.get(first)}, now "
            f"{new.get(first)}): repeat them, delete the file, or write to another folder."
        )
