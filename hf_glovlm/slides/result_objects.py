"""Objects of a slide in the results of `glovlm slide`: outlines, calls, and what limits them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..files import damaged_files, digest_file, read_manifest
from .differences import read_all
from .files.annotations import SlideObject
from .files.coordinates import Origin


@dataclass(frozen=True)
class SlideResults:
    """A slide of the results: its entry, its objects, and what was called of each.

    Attributes:
        entry: In `results.json`.
        objects: Outlines, in pixels of level 0.
        probabilities: Of each class, by the object's id.
        glomeruli: Which glomerulus each one is, by id, where its file said so.
        digest: Of `objects.geojson`.
        columns: Further columns of `objects.parquet`, such as `counted`, by name.
    """

    entry: Mapping[str, Any]
    objects: list[SlideObject]
    probabilities: Mapping[str, NDArray[np.float64]]
    glomeruli: Mapping[str, str | None]
    digest: str
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the slide is called in the results."""
        return str(self.entry["slide"])

    @property
    def origin(self) -> Origin:
        """Where its outlines count from."""
        stated = self.entry.get("origin") or {}
        return Origin(float(stated.get("x", 0)), float(stated.get("y", 0)))


def read_slide_results(source: Path, entry: Mapping[str, Any]) -> SlideResults:
    """The objects of a slide.

    Args:
        source: Output folder of `glovlm slide`.
        entry: Of the slide in its results.

    Raises:
        GloVLMError: It failed, has no outlined objects, or a file was changed since.
    """
    name = str(entry["slide"])
    folder = source / "slides" / name
    path = folder / "objects.geojson"
    if entry.get("status") != "done" or not path.is_file():
        raise GloVLMError(
            f"{name} has no counted objects in '{source}': count its outlines first (`glovlm slide "
            "--objects`)."
        )
    manifest = read_manifest(folder)
    damaged = damaged_files(folder, manifest, [path.name, "objects.parquet"]) if manifest else []
    if damaged:
        raise GloVLMError(
            f"'{folder / damaged[0]}' has changed since it was written: keep what came from QuPath "
            "elsewhere, and run `glovlm slide` again, which makes it anew."
        )
    table = pq.read_table(folder / "objects.parquet")
    columns = [column for column in table.column_names if column.startswith("p_")]
    ids = table["id"].to_pylist()
    values = np.stack([table[column].to_numpy() for column in columns], axis=1)
    others = [name for name in table.column_names if name not in (*columns, "id", "glomerulus")]
    return SlideResults(
        entry,
        read_all(path),
        dict(zip(ids, values, strict=True)),
        dict(zip(ids, table["glomerulus"].to_pylist(), strict=True)),
        digest_file(path),
        {other: dict(zip(ids, table[other].to_pylist(), strict=True)) for other in others},
    )
