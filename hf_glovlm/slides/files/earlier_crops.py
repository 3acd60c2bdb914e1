"""Earlier crops of a slide: what a person wrote into their rows is never lost when it is cut anew.

A label in `metadata.csv` that is not the class of the outlines was typed by a person, as in a
folder of crops without a class. Objects are known again by their place and their id.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.listing import few
from ...errors import GloVLMError

_SAME_PLACE = 0.5  # intersection over union of two squares above which they are of one object
_SAME_ID = 0.5  # what the same id counts beside that; ids alone may be mere numbers

Row = Mapping[str, Any]
Square = tuple[float, float, float]  # x, y and side in pixels of level 0


@dataclass(frozen=True)
class EarlierCrops:
    """Crops of one slide that are there.

    Attributes:
        rows: Of `metadata.csv`, as they are now.
        labels: Class of each object by its id, as the outlines had it then; `None` in folders of
            earlier versions, whose subfolders tell.
        margin: With which they were cut.
        folder_of: Name of a class's folder.
    """

    rows: Sequence[Row]
    labels: Mapping[str, str | None] | None
    margin: float
    folder_of: Callable[[str], str]

    def match(self, ids: Sequence[str], squares: Sequence[Square]) -> list[Row | None]:
        """The row of each object that was cut before, by place and id; a row is of one object.

        Args:
            ids: Of the objects.
            squares: Around them, without margin.
        """
        matched: list[Row | None] = [None] * len(ids)
        if not self.rows:
            return matched
        before = np.array([self._square(row) for row in self.rows])
        names = np.array([str(row.get("object_id")) for row in self.rows])
        pairs: list[tuple[float, int, int]] = []
        for i, (name, square) in enumerate(zip(ids, squares, strict=True)):
            shared = _intersection_over_union(before, square)
            same = names == name
            places = np.flatnonzero((shared > _SAME_PLACE) | (same & (shared > 0)))
            pairs += [(float(shared[j] + _SAME_ID * same[j]), i, j) for j in places.tolist()]
        used: set[int] = set()
        for _, i, j in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
            if matched[i] is None and j not in used:
                matched[i] = self.rows[j]
                used.add(j)
        return matched

    def typed_label(self, row: Row) -> str | None:
        """Label that a person gave to a crop, other than the outlines had; else `None`.

        An emptied label is none: the class of the outlines is taken again.
        """
        label = str(row.get("label") or "").strip()
        if not label:
            return None
        if self.labels is not None:
            written = self.labels.get(str(row.get("object_id"))) or ""
        else:
            folder = PurePosixPath(str(row.get("file_name"))).parts[0]
            written = label if folder == self.folder_of(label) else ""
        return label if label != written else None

    def refuse_loss(self, kept: Sequence[Row | None], table: Path) -> None:
        """Refuse to remove crops whose label a person typed.

        Args:
            kept: Rows of the objects that are cut again.
            table: `metadata.csv`, for the sentence.

        Raises:
            GloVLMError: A typed label would be lost; names the crops.
        """
        there = {id(row) for row in kept if row is not None}
        lost = [row for row in self.rows if id(row) not in there and self.typed_label(row)]
        if lost:
            names = [f"{row.get('object_id')}: {self.typed_label(row)}" for row in lost]
            raise GloVLMError(
                f"{len(lost)} crops whose label was typed in {table} are not outlined any more, or "
                f"left out ({few(names)}), so their labels would be lost: outline them again, drop "
                "the option that leaves them out, or empty these labels first."
            )

    def common(self, column: str) -> str:
        """The one value of a column, such as the slide's patient; empty where rows differ."""
        values = {str(row.get(column) or "") for row in self.rows} - {""}
        return values.pop() if len(values) == 1 else ""

    def _square(self, row: Row) -> Square:
        try:
            x, y, side = (float(row[name]) for name in ("x", "y", "width"))
        except (KeyError, TypeError, ValueError):
            return 0.0, 0.0, 0.0
        inner = side / self.margin
        return x + (side - inner) / 2, y + (side - inner) / 2, inner


def _intersection_over_union(squares: NDArray[np.float64], one: Square) -> NDArray[np.float64]:
    """Of squares `[n, 3]` (x, y, side) and another one; `[n]`, 0 to 1."""
    x, y, side = squares.T
    across = np.minimum(x + side, one[0] + one[2]) - np.maximum(x, one[0])
    down = np.minimum(y + side, one[1] + one[2]) - np.maximum(y, one[1])
    shared = np.maximum(across, 0) * np.maximum(down, 0)
    union = side**2 + one[2] ** 2 - shared
    ratio: NDArray[np.float64] = shared / np.maximum(union, 1e-9)
    return ratio
