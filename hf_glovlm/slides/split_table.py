"""Split of cases: on which side of a run's split the patients of a table of slides stand.

What a reader corrected becomes training data, and the patients stay where they were: those whose
images a run learned from, or chose and calibrated something on, are trained on and never measured;
those that it was tested on are tested on and never learned from; new ones are trained on.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ..data.listing import few
from ..errors import GloVLMError
from ..files import read_json, read_results, write_csv
from ..runs.provenance import UNKNOWN, Provenance, hash_groups
from ..tables import read_table, spelling
from .files.case_table import CaseRow, read_case_table
from .files.crops import is_crop_of
from .files.names import slide_stem

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class SplitTable:
    """Table of cases with the side of each slide.

    Attributes:
        header: Names of the columns; those of the table, and `split`.
        rows: Its cells.
        sides: `train` or `test`, by the slide's name.
        new: Slides of patients that the run knows nothing of; they stand in `train`.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sides: Mapping[str, str]
    new: Collection[str]

    def save(self, path: Path) -> None:
        """Write the table, which `glovlm data crops --cases` takes."""
        write_csv(path, self.header, self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Slides on each side, and how many of them are new."""
        sides = list(self.sides.values())
        return {side: sides.count(side) for side in (TRAIN, TEST)} | {"new": len(self.new)}


def split_cases(run: Path, cases: Path, slides: Iterable[str] = ()) -> SplitTable:
    """Side of the slides of a table in the split of a run.

    Args:
        run: Output folder of `glovlm train`.
        cases: Table of cases, as `read_case_table` takes it.
        slides: Slides that must have a row.

    Raises:
        GloVLMError: No such run; it holds no split; the table lacks a slide, or what the run's
            groups are (such as `patient_id`); or its own column `split` says otherwise.
    """
    run, cases = run.expanduser(), cases.expanduser()
    table, raw = read_case_table(cases), read_table(cases)
    for name in slides:
        table.row_of(name)
    known = _Sides(run)
    place, given = raw.need("slide_id", "slide"), raw.index("split")
    sides: dict[str, str] = {}
    new: set[str] = set()
    rows = []
    for cells in raw.rows:
        row = table.rows[slide_stem(cells[place])]
        side = known.of(row, cases)
        if side is None:
            new.add(row.slide)
        sides[row.slide] = side = side or TRAIN
        if row.split not in (None, side):
            raise GloVLMError(
                f"{cases} has the split '{row.split}' for the slide {row.slide}, and its patient "
                f"stands in {side} of '{run}': correct it, or leave the column out."
            )
        rows.append([*(cell for i, cell in enumerate(cells) if i != given), side])
    header = [name for i, name in enumerate(raw.header) if i != given]
    return SplitTable([*header, "split"], rows, sides, new)


class _Sides:
    """The split of a run: what it learned from by hash, and what it was tested on by name."""

    def __init__(self, run: Path) -> None:
        results = read_results(run, "adaptation")
        self.run = run
        self.learned = Provenance.of_results(results)
        if not self.learned.groups:
            raise GloVLMError(f"'{run}' knows no patients, cases or slides. {UNKNOWN}")
        frozen = read_json(run / "episodes.json")
        draws = frozen.get("draws")
        if not isinstance(draws, list) or not draws:
            raise GloVLMError(f"'{run / 'episodes.json'}' is damaged: train again.")
        self.column = str(frozen.get("group_column"))
        self.tested = {spelling(str(g)) for draw in draws for g in draw.get("test_groups", ())}
        files = pq.read_table(run / "predictions.parquet", columns=["file_name"])
        self.files = [str(name) for name in files["file_name"].to_pylist()]

    def of(self, row: CaseRow, cases: Path) -> str | None:
        """Side of a slide; `None` where the run knows nothing of its patient."""
        named = {"patient_id": row.patient, "case_id": row.specimen, "slide_id": row.slide}
        ids = {name: value for name, value in named.items() if value is not None}
        if named.get(self.column, "") is None or self.column not in named:
            known = few([name for name in named if name in self.learned.groups])
            raise GloVLMError(
                f"'{self.run}' was split by {self.column}, and {cases} has none for the slide "
                f"{row.slide}: fill it in{f' (the run knows {known})' if known else ''}."
            )
        for name, value in ids.items():
            keys = hash_groups((spelling(value), value))
            if keys & {*self.learned.groups.get(name, ())}:
                return TRAIN
        tested = spelling(ids[self.column]) in self.tested
        if tested or any(is_crop_of(name, row.slide) for name in self.files):
            return TEST
        return None
