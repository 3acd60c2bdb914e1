"""Bags of tile features: one file a slide, as other tools read it, written resumably.

A finished bag is `NAME.h5` with the datasets `features` float32 `[n, dim]` and `coords` int64
`[n, 2]` (x, y of a tile's top left corner at level 0) and, from a classifier, `scores` float32
`[n, classes]` (logits). Attributes of the file say how it came about; `coords` carries those that
CLAM and TRIDENT look for. An unfinished bag is `NAME.h5.part`: one line of JSON, then records of
fixed length, only ever appended to. A process killed in the middle of a record leaves a tail that
is shorter than one and is dropped; an HDF5 file killed in the middle of a write may be lost as a
whole. So `NAME.h5` is there completely or not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import GloVLMError
from ...files import replacing

COPY_ROWS = 4096  # rows at a time between the unfinished and the finished file
SUFFIXES = (".h5", ".hdf5")

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

    Args:
        path: Of the finished file, `NAME.h5`.
        dim: Width of the features.
        n_scores: Number of scores per tile; 0 for none.
        attributes: JSON values that decide what the rows are. A run that resumes must give the
            same, so nothing that changes from run to run belongs here.

    Raises:
        GloVLMError: What lies there was written with other settings, or is no bag.
    """

    def __init__(
        self, path: str | Path, *, dim: int, n_scores: int = 0, attributes: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.dim, self.n_scores = dim, n_scores
        self.attributes: dict[str, Any] = json.loads(json.dumps(dict(attributes)))
        self._record = np.dtype(
            [("coords", "<i8", (2,)), ("features", "<f4", (dim,)), ("scores", "<f4", (n_scores,))]
        )
        self._header = {"dim": dim, "n_scores": n_scores, "attributes": self.attributes}
        self.is_complete = self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.is_complete:
            self.rows = self._check_finished()
            return
        line = json.dumps(self._header).encode() + b"\n"
        self._start = len(line)
        if not self.part.is_file() or b"\n" not in _beginning(self.part):
            self.part.write_bytes(line)
        with self.part.open("rb") as file:
            _same_settings(self.part, _parsed(file.readline()), self._header)
        self.keep((self.part.stat().st_size - self._start) // self._record.itemsize)

    def keep(self, rows: int) -> None:
        """Drop everything behind the first rows, and a record that was cut off."""
        self.rows = rows
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
        with self.part.open("ab") as file:
            file.write(block.tobytes())
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
        with replacing(self.path) as fresh, _h5py().File(fresh, "w") as file:
            features = file.create_dataset("features", (self.rows, self.dim), np.float32)
            coords = file.create_dataset("coords", (self.rows, 2), np.int64)
            scores = (
                file.create_dataset("scores", (self.rows, self.n_scores), np.float32)
                if self.n_scores
                else None
            )
            done = 0
            for block in self._blocks():
                rows = slice(done, done := done + len(block))
                features[rows], coords[rows] = block["features"], block["coords"]
                if scores is not None:
                    scores[rows] = block["scores"]
            file.attrs["settings"] = json.dumps(self.attributes)
            file.attrs["complete"] = True
            for name in _ON_COORDS:
                if self.attributes.get(name) is not None:
                    coords.attrs[name] = self.attributes[name]
        self.part.unlink(missing_ok=True)
        self.is_complete = True
        return self.path

    def _blocks(self) -> Iterator[NDArray[Any]]:
        """The rows so far, some thousand at a time."""
        with self.part.open("rb") as file:
            file.seek(self._start)
            for done in range(0, self.rows, COPY_ROWS):
                count = min(COPY_ROWS, self.rows - done)
                content = file.read(count * self._record.itemsize)
                yield np.frombuffer(content, self._record, count)

    def _check_finished(self) -> int:
        with _opened(self.path) as file:
            rows, dim = file["features"].shape
            header = {
                "dim": int(dim),
                "n_scores": int(file["scores"].shape[1]) if "scores" in file else 0,
                "attributes": _parsed(file.attrs.get("settings")),
            }
        _same_settings(self.path, header, self._header)
        return int(rows)


def read_bag(path: str | Path, *, scores: bool = False) -> Bag:
    """Read the features of one slide, written here or by CLAM, TRIDENT and their like.

    Args:
        path: An H5 file with `features` `[n, dim]` (or `[1, n, dim]`) and `coords` `[n, 2]`.
        scores: Whether to read the classifier's scores too.

    Raises:
        GloVLMError: The file is missing, unfinished, of another layout, or holds no scores.
    """
    path = Path(path)
    with _opened(path) as file:
        attributes: dict[str, Any] = {}
        for holder in (file, file["features"], file["coords"]):
            attributes |= {str(k): _plain(v) for k, v in holder.attrs.items()}
        settings = attributes.pop("settings", None)
        attributes |= _parsed(settings)
        features = _matrix(path, file["features"], "features").astype(np.float32, copy=False)
        coords = _matrix(path, file["coords"], "coords").astype(np.int64, copy=False)
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
        logits = _matrix(path, file["scores"], "scores").astype(np.float32) if scores else None
    name = str(attributes.get("name") or path.stem)
    return Bag(features, coords, name, attributes, logits)


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


def _opened(path: Path) -> Any:
    """An H5 file that holds features and coordinates."""
    h5py = _h5py()
    if not path.is_file():
        part = path.with_name(path.name + ".part").is_file()
        begun = " The run that writes it was not finished: start it again." if part else ""
        raise GloVLMError(f"There is no feature file {path}.{begun}")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise GloVLMError(
            f"{path} is no readable H5 file: it is damaged or of another kind; encode the slide "
            "again."
        ) from None
    missing = [n for n in ("features", "coords") if not isinstance(file.get(n), h5py.Dataset)]
    if missing:
        held = ", ".join(file) or "nothing"
        file.close()
        raise GloVLMError(
            f"{path}: expected the datasets features and coords, found {held}; give feature files "
            "of `glovlm slide`, CLAM or TRIDENT."
        )
    return file


def _matrix(path: Path, dataset: Any, name: str) -> NDArray[Any]:
    values: NDArray[Any] = dataset[()]
    if values.ndim == 3 and len(values) == 1:  # a batch of one slide
        values = values[0]
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise GloVLMError(
            f"{path}: expected {name} as a matrix of numbers with one row a tile, found shape "
            f"{list(values.shape)} of {values.dtype}."
        )
    return values


def _plain(value: Any) -> Any:
    """An attribute as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


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
    if actual == expected:
        return
    old = {**actual, **(actual.get("attributes") or {})}
    new = {**expected, **expected["attributes"]}
    names = [k for k in {**new, **old} if k != "attributes" and old.get(k) != new.get(k)]
    first = names[0] if names else "attributes"
    raise GloVLMError(
        f"{path} was written with other settings ({first}: {old.get(first)}, now "
        f"{new.get(first)}): repeat them, delete the file, or write to another folder."
    )
