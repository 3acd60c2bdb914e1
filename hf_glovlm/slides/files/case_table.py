"""Case table: `cases.csv`, which says of slides whose they are, their stain and their scale."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from ...data.columns import SYNONYMS
from ...data.folder import positive
from ...data.groups import differing_spellings, in_quotes
from ...data.listing import few
from ...errors import GloVLMError, nearest
from ...tables import Table, read_table
from .names import names_of, slide_stem
from .pixel_size import LIMITS

# What each column may be called; the first is its name.
COLUMNS = {
    "slide": ("slide_id", "slide"),
    "case": ("case_id", "case"),
    "patient": ("patient_id", "patient"),
    "biopsy": ("biopsy", "biopsy_id"),
    "stain": ("stain",),
    "mpp": ("mpp",),
    "scene": ("scene",),
}
T = TypeVar("T")
NO_VALUE = frozenset({"", "na", "n/a", "nan", "none", "null"})


@dataclass(frozen=True)
class CaseRow:
    """Row of a case table: one slide.

    Attributes:
        slide: Its name, without folder and suffix.
        case: From `case_id`.
        patient: From `patient_id`.
        biopsy: Which biopsy of the patient it is of.
        stain: As written.
        mpp: Micrometres per pixel of level 0.
        scene: Which picture of a file that holds several: its number, from 1, or its name.
    """

    slide: str
    case: str | None = None
    patient: str | None = None
    biopsy: str | None = None
    stain: str | None = None
    mpp: float | None = None
    scene: str | None = None

    @property
    def specimen(self) -> str | None:
        """The case as named, else the patient's biopsy; `None` where neither is known."""
        if self.case or not self.biopsy:
            return self.case
        return f"{self.patient} / {self.biopsy}" if self.patient else self.biopsy

    @property
    def counted_as(self) -> str | None:
        """What the slide's counts belong to: the case, else the biopsy, else the patient."""
        return self.specimen or self.patient


@dataclass(frozen=True)
class CaseTable:
    """Case table: what is known of slides.

    Attributes:
        path: The file.
        rows: By the slide's name, in the file's order.
        names_cases: Whether it has a column that names cases, patients or biopsies.
        notes: Sentences, such as on columns that are not read.
    """

    path: Path
    rows: Mapping[str, CaseRow]
    names_cases: bool
    notes: list[str] = field(default_factory=list)

    def row_of(self, slide: Path | str) -> CaseRow:
        """The row of a slide, by its exact name.

        Args:
            slide: Its file, or its name without suffix.

        Raises:
            GloVLMError: No row, or two that differ: says which name is near.
        """
        names = [slide] if isinstance(slide, str) else names_of(slide)
        rows = [self.rows[name] for name in names if name in self.rows]
        if not rows:
            raise GloVLMError(
                f"{self.path} has no row for the slide {names[0]}: add it; names must be the same "
                f"but for the suffix of the file.{nearest(names[0], self.rows)}"
            )
        first, *others = rows
        if any(asdict(other) | {"slide": first.slide} != asdict(first) for other in others):
            raise GloVLMError(
                f"{self.path} names the slide {names[0]} as {in_quotes(names)}, with different "
                "values: keep one row."
            )
        return first

    def cases_of(self, slides: Iterable[Path | str]) -> list[str | None]:
        """What the counts of each slide belong to; `None` where the table names no cases.

        Raises:
            GloVLMError: A slide without a row, or without a case in a table that names cases.
        """
        rows = [self.row_of(slide) for slide in slides]
        without = [row.slide for row in rows if self.names_cases and not row.counted_as]
        if without:
            raise GloVLMError(
                f"{self.path} names no case of {few(without)}: fill in case_id or patient_id."
            )
        return [row.counted_as for row in rows]


def read_case_table(path: Path) -> CaseTable:
    """Read a table of slides and the cases that they belong to.

    A CSV file with the column `slide_id` (a file name, whose folder and suffix are taken off) and
    any of `case_id`, `patient_id`, `biopsy`, `stain`, `mpp` (micrometres per pixel of level 0) and
    `scene`; `slide`, `case` and `patient` are taken as the same. `NA` and the like are empty. Other
    columns are not read, and a note names them.

    Args:
        path: The file.

    Raises:
        GloVLMError: No column of slides, one that is nearly of a known name or stands there twice,
            a row without slide, a slide named twice with different values, a scale that is no
            number of micrometres, patients or cases that differ in spelling only, a case of two
            patients.
    """
    path = Path(path)
    table = read_table(path, "a CSV file of slides and cases")
    places, notes = _choose_columns(table)
    if not table.rows:
        raise GloVLMError(f"{path} has a header and no rows; write one row per slide.")
    rows: dict[str, CaseRow] = {}
    lines: dict[str, int] = {}
    for line, cells in zip(table.lines, table.rows, strict=True):
        texts = {role: cells[place] for role, place in places.items()}
        if not texts["slide"]:
            raise GloVLMError(f"{path}: no {COLUMNS['slide'][0]} in line {line}; fill it in.")
        row = _read_row(texts, table)
        other = rows.setdefault(row.slide, row)
        if other != row:
            differing = [n for n, value in asdict(row).items() if value != getattr(other, n)]
            raise GloVLMError(
                f"{path} names the slide {row.slide} in the lines {lines[row.slide]} and {line}, "
                f"with different values ({', '.join(COLUMNS[n][0] for n in differing)}); keep one "
                "row a slide."
            )
        lines.setdefault(row.slide, line)
    _check_names(path, rows.values())
    names_cases = not {"case", "patient", "biopsy"}.isdisjoint(places)
    return CaseTable(path, rows, names_cases, notes)


def read_mpp(text: str, slide: str, path: Path) -> float | None:
    """Micrometres per pixel of a cell with a decimal point; `None` for an empty one.

    Raises:
        GloVLMError: No positive number, or one that no scan of a slide has.
    """
    if not text:
        return None
    number = positive(text)
    least, most = LIMITS
    if number is None or not least <= number <= most:
        raise GloVLMError(
            f"{path}: expected a positive number of micrometres in mpp, found '{text}' for "
            f"{slide}; {least:g} to {most:g} is possible{_other_unit(number)}."
        )
    return number


def agreed(option: str, given: T | None, stated: T | None, slide: str, path: Path) -> T | None:
    """Value of an option that a case table may state as well.

    Args:
        option: Its name, for the sentence.
        given: By the option, for every slide.
        stated: By the table, for this one.
        slide: Its name.
        path: The table.

    Raises:
        GloVLMError: They differ.
    """
    if given is not None and stated is not None and given != stated:
        raise GloVLMError(
            f"{option} is {given} and {path} has {stated} for the slide {slide}: correct one of "
            "them, or leave the option out."
        )
    return stated if given is None else given


def _other_unit(number: float | None) -> str:
    """What a scale out of range may be meant in; the scale of most scans is .1 to 2."""
    if number is not None and 1e-4 <= number <= 2e-3:
        return f", and millimetres would be {number * 1e3:g}"
    if number is not None and 100 <= number <= 2000:
        return f", and nanometres would be {number / 1e3:g}"
    return ""


def _choose_columns(table: Table) -> tuple[dict[str, int], list[str]]:
    """Place of each column that is there, and a note on others."""
    places: dict[str, int] = {}
    known = [name for names in COLUMNS.values() for name in names]
    for role, names in COLUMNS.items():
        there = [name for name in names if name in table.names]
        if len(there) > 1:
            raise GloVLMError(
                f"{table.path} has the columns {' and '.join(there)}; keep one of them."
            )
        if there:
            places[role] = table.names.index(there[0])
    others = [name for name in table.names if name and name not in known]
    for role in [role for role in COLUMNS if role not in places]:
        meant = [name for name in others if _is_nearly(name, COLUMNS[role])]
        if meant:
            raise GloVLMError(
                f"{table.path}: unknown column '{meant[0]}'. Did you mean '{COLUMNS[role][0]}'? "
                "Rename or drop it."
            )
    if "slide" not in places:
        raise GloVLMError(
            f"{table.path} has no column slide_id (or slide); its header is: "
            f"{', '.join(table.header) or 'empty'}.{nearest('slide_id', table.names)}"
        )
    if len(places) == 1:
        raise GloVLMError(
            f"{table.path} names slides and nothing of them; expected any of "
            f"{', '.join(names[0] for names in COLUMNS.values() if names[0] != 'slide_id')}."
        )
    notes = [f"{table.path.name}: not read: {', '.join(others)}."] if others else []
    return places, notes


def _is_nearly(name: str, names: Sequence[str]) -> bool:
    """Whether a column is most likely one of these: what others call it, or a slip."""
    return name in SYNONYMS.get(names[0], ()) or bool(get_close_matches(name, names, cutoff=0.8))


def _read_row(texts: Mapping[str, str], table: Table) -> CaseRow:
    values = {
        role: None if text.casefold() in NO_VALUE and role != "slide" else text
        for role, text in texts.items()
    }
    mpp = table.number(values.pop("mpp", None) or "")
    slide = slide_stem(str(values.pop("slide")))
    return CaseRow(slide, mpp=read_mpp(mpp, slide, table.path), **values)


def _check_names(path: Path, rows: Iterable[CaseRow]) -> None:
    """Refuse ids that differ in spelling only, and one case of two patients."""
    named = [*rows]
    for what, values in (
        ("patient_id", [row.patient for row in named]),
        ("case_id", [row.counted_as for row in named]),
    ):
        for written in differing_spellings(filter(None, values)):
            raise GloVLMError(
                f"{path}: the values {in_quotes(written)} of {what} differ in spelling only; write "
                "each in one way."
            )
    patient_of: dict[str, str] = {}
    for row in named:
        if row.case and row.patient and patient_of.setdefault(row.case, row.patient) != row.patient:
            raise GloVLMError(
                f"{path}: the case {row.case} is of the patients {patient_of[row.case]} and "
                f"{row.patient}; give the cases of each patient names of their own."
            )
