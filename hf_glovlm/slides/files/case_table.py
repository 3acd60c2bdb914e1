"""Case table: `cases.csv`, which says of slides whose they are and what is known of them.

What a table does not state is not assumed: it stays unknown in all that is made of it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from ...data.columns import SYNONYMS
from ...data.folder import positive
from ...data.groups import differing_spellings, in_quotes
from ...data.listing import few
from ...errors import GloVLMError, nearest
from ...tables import Table, read_table, spelling
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
    "kidney": ("kidney",),
    "system": ("system",),
    "arteries": ("arteries",),
    "block": ("block",),
    "level": ("level",),
    "section_um": ("section_um",),
    "reader": ("reader",),
    "read": ("read",),
    "split": ("split",),
}
KIDNEYS = ("native", "transplant")
SYSTEMS = ("none", "oxford", "isn_rps", "banff")
OF_CASE = ("biopsy", "kidney", "system", "arteries")  # the same in every row of a case
OF_SLIDE = ("block", "level", "section_um", "stain", "reader", "read")
# Columns of a table of images.
OF_CROPS = ("split", "kidney", "block", "level", "section_um", "reader")
NAMING = frozenset({"biopsy", "block", "reader"})  # may be a number or name of a person
SECTIONS = (0.5, 20.0)  # micrometres; renal sections are cut at 1 to 5
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
        kidney: Of the case: one of KIDNEYS.
        system: Class system that the case is read by: one of SYSTEMS; `none` is by none.
        arteries: Of the case: how many a person counted.
        block: Of the slide: which block it was cut from.
        level: Which level of the block.
        section_um: Micrometres: how thick the section is.
        reader: Who outlined or classified its objects.
        read: Lesions that the reader declared read, so that one that is not marked is not there.
        split: On which side of a given split its patient stands; see `data crops`.
    """

    slide: str
    case: str | None = None
    patient: str | None = None
    biopsy: str | None = None
    stain: str | None = None
    mpp: float | None = None
    scene: str | None = None
    kidney: str | None = None
    system: str | None = None
    arteries: int | None = None
    block: str | None = None
    level: str | None = None
    section_um: float | None = None
    reader: str | None = None
    read: tuple[str, ...] | None = None
    split: str | None = None

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

    def stated(self, *, hide: bool = False) -> dict[str, Any]:
        """What the table states of the slide, by the names OF_SLIDE; what it does not is not there.

        A slide that belongs to no case has what is of a case (OF_CASE) itself.

        Args:
            hide: Leave out what may name a person.
        """
        names = OF_SLIDE if self.counted_as else (*OF_SLIDE, *OF_CASE)
        return _known({name: getattr(self, name) for name in names}, hide)


def _known(values: Mapping[str, Any], hide: bool) -> dict[str, Any]:
    """Values that are there, as JSON holds them."""
    return {
        name: [*value] if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None and not (hide and name in NAMING)
    }


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

    def stated_of(self, case: str, *, hide: bool = False) -> dict[str, Any]:
        """What the table states of a case, in any of its rows, by the names OF_CASE.

        Args:
            case: What its slides are counted as.
            hide: Leave out what may name a person.
        """
        rows = [row for row in self.rows.values() if row.counted_as == case]
        values = {name: _distinct(rows, name) for name in OF_CASE}
        biopsies = "; ".join(values.pop("biopsy")) or None  # several, in a case that names them so
        agreed_on = {name: own[0] if own else None for name, own in values.items()}
        return _known({"biopsy": biopsies} | agreed_on, hide)

    def stated_for_crops(self, row: CaseRow) -> dict[str, str]:
        """What the table states of a slide and of its case, by the names OF_CROPS, as text."""
        stated = row.stated() | (self.stated_of(row.counted_as) if row.counted_as else {})
        stated |= {"split": row.split} if row.split else {}
        texts = {name: value for name, value in stated.items() if name in OF_CROPS}
        return {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in texts.items()}


def _distinct(rows: Iterable[CaseRow], name: str) -> list[Any]:
    """Values of a column that some rows have, each once."""
    values = (getattr(row, name) for row in rows)
    return [*dict.fromkeys(value for value in values if value is not None)]


def read_case_table(path: Path) -> CaseTable:
    """Read a table of slides and the cases that they belong to.

    A CSV file with the column `slide_id` (a file name, whose folder and suffix are taken off) and
    any others of COLUMNS, see `CaseRow`; `slide`, `case` and `patient` are taken as `slide_id`,
    `case_id` and `patient_id`. `NA` and the like are empty; so is `none`, but as a `system`. The
    lesions of `read` are separated by semicolons. Other columns are not read, and a note names
    them.

    Args:
        path: The file.

    Raises:
        GloVLMError: No column of slides, one that is nearly of a known name or stands there twice,
            a row without slide, a slide named twice with different values, a scale that is no
            number of micrometres, a word that `kidney` or `system` does not have, arteries that are
            no whole number, patients, cases or lesions that differ in spelling only, a case of two
            patients, or of two kidneys, systems or counts of arteries.
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
    notes += _check_cases(path, rows.values())
    notes += _odd_sections(path, rows.values())
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
    # What is nearly called `split` (set, phase) may be anything.
    for role in [role for role in COLUMNS if role not in (*places, "split")]:
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
    values: dict[str, Any] = {
        role: None if text.casefold() in NO_VALUE and role != "slide" else text
        for role, text in texts.items()
    }
    slide = slide_stem(values.pop("slide"))
    if texts.get("system", "").casefold() == SYSTEMS[0]:
        values["system"] = texts["system"]
    for role in ("mpp", "section_um", "arteries"):
        if values.get(role) is not None:
            values[role] = table.number(values[role])
    values["mpp"] = read_mpp(values.get("mpp") or "", slide, table.path)
    for role, words in (("kidney", KIDNEYS), ("system", SYSTEMS)):
        values[role] = _word(role, values.get(role), words, slide, table.path)
    values["section_um"] = _thickness(values.get("section_um"), slide, table.path)
    values["arteries"] = _whole(values.get("arteries"), slide, table.path)
    values["read"] = _lesions(values.get("read"), slide, table.path)
    return CaseRow(slide, **values)


def _word(role: str, text: str | None, words: Sequence[str], slide: str, path: Path) -> str | None:
    """A word of a column that has some few."""
    word = next((w for w in words if text is not None and spelling(w) == spelling(text)), None)
    if text is not None and word is None:
        raise GloVLMError(
            f"{path}: expected {', '.join(words[:-1])} or {words[-1]} in {role}, found '{text}' "
            f"for {slide}; empty is unknown.{nearest(text, words)}"
        )
    return word


def _thickness(text: str | None, slide: str, path: Path) -> float | None:
    number = None if text is None else positive(text)
    if text is not None and number is None:
        raise GloVLMError(
            f"{path}: expected a positive number of micrometres in section_um, found '{text}' for "
            f"{slide}; empty is unknown."
        )
    return number


def _whole(text: str | None, slide: str, path: Path) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,4}(\.0+)?", text):
        raise GloVLMError(
            f"{path}: expected how many arteries were counted, a whole number from 0 on, found "
            f"'{text}' for {slide}; empty is unknown."
        )
    return int(float(text))


def _lesions(text: str | None, slide: str, path: Path) -> tuple[str, ...] | None:
    if text is None:
        return None
    if "," in text and ";" not in text:
        raise GloVLMError(
            f"{path}: expected lesions separated by semicolons in read, found '{text}' for {slide}."
        )
    parts = (part.strip() for part in text.split(";"))
    return tuple(dict.fromkeys(filter(None, parts))) or None


def _check_names(path: Path, rows: Iterable[CaseRow]) -> None:
    """Refuse ids that differ in spelling only, and one case of two patients."""
    named = [*rows]
    for what, values in (
        ("patient_id", [row.patient for row in named]),
        ("case_id", [row.counted_as for row in named]),
        ("read", [lesion for row in named for lesion in row.read or ()]),
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


def _check_cases(path: Path, rows: Iterable[CaseRow]) -> list[str]:
    """Refuse rows of one case that differ in what is of the case; notes on several biopsies."""
    cases: dict[str, list[CaseRow]] = defaultdict(list)
    for row in rows:
        if row.counted_as:
            cases[row.counted_as].append(row)
    notes = []
    for case, own in cases.items():
        for name in OF_CASE:
            values = _distinct(own, name)
            if name != "biopsy" and len(values) > 1:
                slides = [next(r.slide for r in own if getattr(r, name) == v) for v in values[:2]]
                raise GloVLMError(
                    f"{path}: {name} of the case {case} is {values[0]} for {slides[0]} and "
                    f"{values[1]} for {slides[1]}; a case has one: correct a row, or give the "
                    "slides cases of their own."
                )
        biopsies = _distinct(own, "biopsy")
        if len(biopsies) > 1:
            notes.append(
                f"{path.name}: the case {case} holds the biopsies {few(biopsies)}, which are "
                "counted together."
            )
    return notes


def _odd_sections(path: Path, rows: Iterable[CaseRow]) -> list[str]:
    """Notes on sections that are thinner or thicker than sections are."""
    least, most = SECTIONS
    rows = [r for r in rows if r.section_um is not None and not least <= r.section_um <= most]
    if not rows:
        return []
    return [
        f"{path.name}: section_um is in micrometres, and sections are {least:g} to {most:g} thick; "
        f"check {few([f'{row.slide}: {row.section_um:g}' for row in rows])}."
    ]
