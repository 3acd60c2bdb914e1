"""Slide table: `slides.csv` with the labels that slide-level tasks and MIL learn from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.groups import differing_spellings, in_quotes
from ...data.listing import SPLIT_NAMES, few, split_role
from ...errors import GloVLMError, nearest
from ...tables import read_table
from .case_table import NO_VALUE, read_mpp
from .names import slide_stem

COLUMNS = ("slide", "label", "patient_id", "case_id", "split", "mpp")


@dataclass(frozen=True)
class SlideRow:
    """Row of a slide table: one slide.

    Attributes:
        slide: The file's name without folder and suffix, as slide and feature files share it.
        label: Its class.
        patient: From `patient_id`, else `case_id`; `None` where the table has neither.
        split: `train`, `validation` or `test`; `None` where the table splits nothing.
        mpp: Micrometres per pixel of level 0, where the table has it.
    """

    slide: str
    label: str
    patient: str | None = None
    split: str | None = None
    mpp: float | None = None


@dataclass(frozen=True)
class SlideTable:
    """Slide table: slides and their labels.

    Attributes:
        path: The file.
        rows: In the file's order.
        classes: All class names: as given to the reader, else those of the rows, sorted.
        patient_column: `patient_id` or `case_id`; `None` where patients are unknown.
    """

    path: Path
    rows: tuple[SlideRow, ...]
    classes: tuple[str, ...]
    patient_column: str | None

    @property
    def slides(self) -> list[str]:
        """The slides' names."""
        return [row.slide for row in self.rows]

    @property
    def labels(self) -> list[int]:
        """Class numbers, places in `classes`."""
        place = {name: i for i, name in enumerate(self.classes)}
        return [place[row.label] for row in self.rows]

    @property
    def groups(self) -> list[str]:
        """Group that stays within one split: the patient, else the slide itself."""
        return [row.patient if row.patient is not None else row.slide for row in self.rows]

    @property
    def splits(self) -> list[str] | None:
        """Declared split of each slide; `None` where none is declared."""
        declared = [row.split for row in self.rows if row.split is not None]
        return declared or None

    def match(self, files: Iterable[Path]) -> dict[str, Path]:
        """The slide or feature file of every row.

        Args:
            files: For example a folder's content; files of other slides are left alone.

        Returns:
            A file by slide, in the order of the rows.

        Raises:
            GloVLMError: A slide without a file, or with two; names them.
        """
        files_of: dict[str, list[Path]] = {}
        for file in files:
            files_of.setdefault(slide_stem(file.name), []).append(file)
        missing = [name for name in self.slides if name not in files_of]
        if missing:
            raise GloVLMError(
                f"{self.path}: {len(missing)} of {len(self.rows)} slides have no file "
                f"({few(missing)}); add the files or delete the rows."
                f"{nearest(missing[0], files_of)}"
            )
        twice = [name for name in self.slides if len(files_of[name]) > 1]
        if twice:
            names = ", ".join(file.name for file in files_of[twice[0]])
            raise GloVLMError(f"{self.path}: the slide {twice[0]} has several files ({names}).")
        return {name: files_of[name][0] for name in self.slides}


def read_slide_table(path: Path, *, classes: Sequence[str] | None = None) -> SlideTable:
    """Read a table of slides, strictly.

    A CSV file with the columns `slide` (or `slide_id`; a file name, whose folder and suffix are
    taken off) and `label`, and optionally `patient_id` or `case_id`, `split` (train, validation,
    test) and `mpp`.

    Args:
        path: The file.
        classes: The class names that may occur, for example those of a catalogue's set.

    Raises:
        GloVLMError: An unknown or missing column, a row without slide or label, a slide named
            twice, an unknown label or split, labels or patients that differ in spelling only, a
            patient on two sides, a `patient_id`, `case_id` or `split` that only some rows have.
    """
    header, lines = _read_csv(path)
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    for column in ("slide", "label"):
        empty = [str(i) for i, row in enumerate(rows, start=2) if not row[column]]
        if empty:
            raise GloVLMError(f"{path}: no {column} in line {few(empty)}; fill it in.")
    patient_column = next((name for name in ("patient_id", "case_id") if name in header), None)
    for optional in (patient_column, "split"):
        values = [bool(row.get(optional or "")) for row in rows]
        if any(values) and not all(values):
            raise GloVLMError(
                f"{path}: {values.count(False)} of {len(rows)} rows have no {optional} "
                f"({rows[values.index(False)]['slide']}); fill every row or drop the column."
            )
    table = tuple(
        SlideRow(
            slide=slide_stem(row["slide"]),
            label=row["label"],
            patient=row.get(patient_column or "") or None,
            split=_split(row.get("split", ""), row["slide"], path),
            mpp=read_mpp(row.get("mpp", ""), row["slide"], path),
        )
        for row in rows
    )
    twice = [name for name, n in Counter(row.slide for row in table).items() if n > 1]
    if twice:
        raise GloVLMError(
            f"{path} names {len(twice)} slides more than once ({few(twice)}); keep one row each."
        )
    for name in filter(None, ("label", patient_column)):
        for written in differing_spellings(filter(None, (row.get(name) for row in rows))):
            raise GloVLMError(
                f"{path}: the values {in_quotes(written)} of {name} differ in spelling only; write "
                "each in one way."
            )
    known = tuple(classes) if classes is not None else tuple(sorted({r.label for r in table}))
    for row in table:
        if row.label not in known:
            raise GloVLMError(
                f"{path}: unknown label '{row.label}' for {row.slide}.{nearest(row.label, known)} "
                f"Classes: {', '.join(known)}."
            )
    _refuse_shared_patients(table, patient_column, path)
    has_patients = patient_column is not None and table[0].patient is not None
    return SlideTable(Path(path), table, known, patient_column if has_patients else None)


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows, cells stripped; `NA` and the like are empty, save as a label."""
    table = read_table(path, "a table of slides", fill=False)
    rows = table.rows
    header = ["slide" if name == "slide_id" else name for name in table.names]
    for name, times in Counter(header).items():
        if name not in COLUMNS:
            raise GloVLMError(
                f"{path}: unknown column '{name}'.{nearest(name, COLUMNS)} "
                f"Columns: {', '.join(COLUMNS)}."
            )
        if times > 1:
            raise GloVLMError(f"{path} has the column {name} twice; keep one of them.")
    for name in ("slide", "label"):
        if name not in header:
            raise GloVLMError(
                f"{path} has no column '{name}'; found {', '.join(header) or 'none'}."
            )
    if not rows:
        raise GloVLMError(f"{path} has a header and no rows; write one row per slide.")
    for row in rows:
        for i, name in enumerate(header):
            if name != "label" and row[i].casefold() in NO_VALUE:
                row[i] = ""
            elif name == "mpp":
                row[i] = table.number(row[i])
    return header, rows


def _refuse_shared_patients(rows: Sequence[SlideRow], column: str | None, path: Path) -> None:
    sides: dict[str, str | None] = {}
    for row in rows:
        if row.patient is None:
            continue
        side = sides.setdefault(row.patient, row.split)
        if side != row.split:
            raise GloVLMError(
                f"{path}: {column} {row.patient} stands in {side} and in {row.split}; a patient "
                "belongs to one side."
            )


def _split(text: str, slide: str, path: Path) -> str | None:
    if not text:
        return None
    role = split_role(text)
    if role is None:
        raise GloVLMError(
            f"{path}: expected train, validation or test in the column split, found '{text}' for "
            f"{slide}.{nearest(text, SPLIT_NAMES)}"
        )
    return role
