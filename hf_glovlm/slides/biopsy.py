"""Facts of a biopsy's sheet: its glomeruli counted once, and lesions with their denominators.

Each number stands on what was read. A lesion that nobody looked for is not absent, a glomerulus
that is sclerosed as a whole cannot show another lesion, and sections are joined by the ids of
glomeruli alone. The page (`reports.biopsy`) shows what stands here and computes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.listing import few
from ..data.stains import is_same_stain, name_stain
from ..data.terminology import declared_system
from ..errors import GloVLMError, describe_error
from ..progress import counted
from .biopsy_lesions import Biopsy, describe_lesions
from .biopsy_rules import chance_to_miss, judge_adequacy, limits_of
from .files.annotations import SlideObject
from .files.case_table import SYSTEMS, CaseRow, CaseTable, read_case_table
from .files.wsi import name_flags
from .finder_recall import FinderRecall, read_recall
from .lesions import Lesion
from .readings import Reading, open_corrections
from .sections import CUT, Glomerulus, ModelResults, Section, open_results, read_section

KIND, VERSION = "biopsy_sheet", 1


@dataclass(frozen=True)
class Biopsies:
    """Facts of the sheets of some biopsies.

    Attributes:
        sheets: The content of `sheet.json` by case.
        objects: Outlines of the glomeruli by slide.
        failed: Cases that could not be described, slides without a case, and why.
        notes: Sentences on the table and the results as a whole.
    """

    sheets: dict[str, dict[str, Any]]
    objects: dict[str, list[SlideObject]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe_biopsies(
    cases: Path,
    slides: Sequence[Path],
    *,
    corrections: Path | None = None,
    signed_by: str | None = None,
    finder: Path | None = None,
) -> Biopsies:
    """Describe each biopsy of a table of cases by the results of its slides.

    Args:
        cases: The table of cases.
        slides: Output folders of `glovlm slide`, one a model or stain. Where two of them tell of
            the same lesion of a slide the first counts.
        corrections: Output folder of `glovlm correct`.
        signed_by: The reader whose corrections are followed; the sheet of a biopsy that this reader
            read in full is no draft.
        finder: Folder of `glovlm find train`, for the recall of its classes.

    Raises:
        GloVLMError: A table or folder cannot be read, or nobody of that name corrected anything.
            What is wrong with one biopsy stands in `failed`.
    """
    if signed_by is not None and corrections is None:
        raise GloVLMError(
            f"--signed-by {signed_by} needs --corrections: a name alone shows nobody's reading."
        )
    table = read_case_table(Path(cases))
    folders = _open_all(slides)
    readings = None if corrections is None else open_corrections(Path(corrections), signed_by)
    recall = None if finder is None else read_recall(Path(finder))
    known = {name for folder in folders for name in folder.entries}
    _check_corrected(readings, known)
    result = Biopsies({}, notes=list(table.notes))
    by_case: dict[str, list[CaseRow]] = {}
    for row in table.rows.values():
        if row.counted_as is not None:
            by_case.setdefault(row.counted_as, []).append(row)
        elif row.slide in known:
            result.failed[f"slide {row.slide}"] = (
                f"{table.path.name} names no case of it: fill in case_id."
            )
    for name in sorted(known - {*table.rows}):
        numbered = any(folder.numbered and name in folder.entries for folder in folders)
        result.failed[f"slide {name}"] = f"{table.path.name} has no row for it" + (
            "; the results bear numbers in place of names (--anonymise): call the slides so in a "
            "copy of the table."
            if numbered
            else ": add one, with its case."
        )
    # A table of the whole archive may serve: of what nothing was classified there is no sheet.
    absent = [case for case, rows in by_case.items() if known.isdisjoint(r.slide for r in rows)]
    if absent:
        those = "case has" if len(absent) == 1 else "cases have"
        result.notes.append(f"{len(absent)} {those} no results here, and no sheet: {few(absent)}.")
    described = {case: rows for case, rows in by_case.items() if case not in absent}
    for case, rows in counted([*described.items()], "cases"):
        try:
            sheet, objects = _describe(case, rows, table, folders, readings, recall)
        except Exception as error:  # what is wrong with one biopsy stays with it
            result.failed[case] = describe_error(error)
        else:
            result.sheets[case] = sheet
            result.objects.update(objects)
    return result


def _open_all(slides: Sequence[Path]) -> list[ModelResults]:
    if not slides:
        raise GloVLMError("Expected an output folder of `glovlm slide` (--slides), found none.")
    places = [Path(path).expanduser() for path in slides]
    resolved = [place.resolve() for place in places]
    twice = [
        place for place, real in zip(places, resolved, strict=True) if resolved.count(real) > 1
    ]
    if twice:
        raise GloVLMError(f"'{twice[0]}' is given twice (--slides): give each folder once.")
    return [open_results(place) for place in places]


def _check_corrected(readings: Reading | None, known: set[str]) -> None:
    """Refuse corrections of slides that no results hold."""
    if readings is None:
        return
    slides = {slide for one in readings.records.values() for slide in one["slides"]}
    if slides and not slides & known:
        raise GloVLMError(
            f"'{readings.folder}' holds corrections of {few(sorted(slides))}, and the results of "
            f"{few(sorted(known))}: give the results that were corrected."
        )


def _describe(
    case: str,
    rows: Sequence[CaseRow],
    table: CaseTable,
    folders: Sequence[ModelResults],
    readings: Reading | None,
    recall: FinderRecall | None,
) -> tuple[dict[str, Any], dict[str, list[SlideObject]]]:
    """The sheet of one biopsy, and the outlines on its sections."""
    rows = sorted(rows, key=lambda row: row.slide)
    _check_rows(case, rows)
    for folder in folders:
        _check_stated(case, rows, table, folder)
    sections = [read_section(row, folders, readings) for row in rows]
    if all(section.why_not is not None for section in sections):
        reasons = "; ".join(f"{section.slide}: {section.why_not}" for section in sections)
        raise GloVLMError(f"The case {case} has no section that can be counted ({reasons}).")
    used, left, join = _join(sections)
    _check_finder(used, recall)
    biopsy = _unite(case, table.stated_of(case), used, recall)
    lesions, not_shown, notes = describe_lesions(biopsy)
    status = _status(used, readings, biopsy)
    n = len(biopsy.units)
    confirmed = sum(any(one.confirmed for one in unit) for unit in biopsy.units)
    counts = {
        "n": n,
        "confirmed": confirmed,
        "provisional": n - confirmed,
        "cut": sum(all(CUT in one.quality for one in unit) for unit in biopsy.units),
        "not_assessable": sum(all(one.quality for one in unit) for unit in biopsy.units),
    }
    notes += [note for section in sections for note in section.notes]
    notes += _notes_on_readers(used)
    notes += [
        f"{section.slide}: {flag}." for section in sections for flag in name_flags(section.slide)
    ]
    if all(row.case is None and row.biopsy is None for row in rows):
        notes.append(
            f"{table.path.name} names patients, and no cases or biopsies: all sections are taken "
            "for one biopsy."
        )
    stated = biopsy.stated
    sheet = {
        "kind": KIND,
        "version": VERSION,
        "research_use_only": True,
        "synthetic": any(bool(r.content.get("synthetic")) for s in used for r in s.results),
        "case": case,
        "status": status,
        "stated": {name: stated.get(name) for name in ("system", "kidney", "arteries", "biopsy")},
        "sections": [_section(section, dict(left_of(left))) for section in sections],
        "join": join,
        "counts": counts,
        "adequacy": judge_adequacy(biopsy, confirmed, complete=not left),
        "chance_to_miss": chance_to_miss(n),
        "lesions": lesions,
        "not_shown": not_shown,
        "limits": limits_of(biopsy, counts, [section.stain for section in used]),
        "glomeruli": _list_glomeruli(biopsy),
        "notes": list(dict.fromkeys(notes)),
    }
    return sheet, {section.slide: [one.item for one in section.glomeruli] for section in used}


# ------------------------------------------------------------------------------ what is refused


def _check_rows(case: str, rows: Sequence[CaseRow]) -> None:
    """Refuse several biopsies in one case, and a level that stands there twice."""
    biopsies = list(dict.fromkeys(row.biopsy for row in rows if row.biopsy is not None))
    if len(biopsies) > 1:
        raise GloVLMError(
            f"The case {case} holds the biopsies {few(biopsies)}: a sheet is of one; give each a "
            "case_id of its own."
        )
    places: dict[tuple[Any, ...], str] = {}
    for row in rows:
        if row.level is None:
            continue
        place = (row.block, row.level, name_stain(row.stain))
        if place in places:
            what = f"block {row.block or 'not stated'}, level {row.level}, {place[2] or 'no stain'}"
            raise GloVLMError(
                f"The slides {places[place]} and {row.slide} of the case {case} are both {what}: "
                "leave one of them out, or correct block, level or stain."
            )
        places[place] = row.slide


def _check_stated(
    case: str, rows: Sequence[CaseRow], table: CaseTable, folder: ModelResults
) -> None:
    """Refuse a table that says of a case what the table of the results did not."""
    entries = folder.entries
    present = [row for row in rows if row.slide in entries]
    now = table.stated_of(case)
    of_case = {str(one["case"]): one.get("stated") or {} for one in folder.content["cases"]}
    for row in present:
        entry = entries[row.slide]
        named = entry.get("case")
        if named is not None and named != case and not folder.numbered:
            raise GloVLMError(
                f"{row.slide} is of the case {case} in {table.path.name}, and of {named} in "
                f"'{folder.folder}': correct the table, or run `glovlm slide` with it again."
            )
        before = {**(entry.get("stated") or {}), **of_case.get(str(named), {})}
        for name in ("system", "kidney"):
            then, stated = before.get(name), now.get(name)
            if then is not None and stated is not None and then != stated:
                raise GloVLMError(
                    f"The {name} of the case {case} is {stated} in {table.path.name}, and was "
                    f"{then} when '{folder.folder}' was made: correct the table, or run `glovlm "
                    "slide` with it again."
                )
        stain, ran = name_stain(row.stain), entry.get("stain")
        if stain is not None and ran is not None and not is_same_stain(stain, ran):
            raise GloVLMError(
                f"The stain of {row.slide} is {stain} in {table.path.name}, and was {ran} when "
                f"'{folder.folder}' was made: correct the table, or run `glovlm slide` again."
            )


def _check_finder(used: Sequence[Section], recall: FinderRecall | None) -> None:
    """Refuse the recall of another finder than the one that outlined the glomeruli."""
    if recall is None or not recall.fingerprint:
        return
    for section in used:
        other = {one.finder for one in section.glomeruli if one.finder is not None}
        wrong = sorted(name for name in other if not recall.fingerprint.startswith(name))
        if wrong:
            raise GloVLMError(
                f"The finder {wrong[0]} outlined glomeruli of {section.slide}, and --finder is "
                f"{recall.fingerprint[:12]}: give the folder of the finder that outlined them."
            )


# ------------------------------------------------------------------------------------- sections


def _join(
    sections: Sequence[Section],
) -> tuple[list[Section], list[tuple[Section, str]], dict[str, str]]:
    """Sections that are counted, the others and why not, and how they are joined."""
    left = [(section, section.why_not) for section in sections if section.why_not is not None]
    able = [section for section in sections if section.why_not is None]
    if len(able) == 1:
        sentence = f"Counted on one section, {able[0].slide}."
        return able, left, {"by": "single section", "sentence": sentence}
    shown = [section for section in able if section.glomeruli]
    if shown and all(section.has_ids for section in able):
        sentence = (
            f"{len(able)} sections are joined by the ids of their glomeruli: one that several of "
            "them show is one glomerulus."
        )
        return able, left, {"by": "glomerulus id", "sentence": sentence}
    most = max(able, key=lambda section: len(section.glomeruli))
    why = "its glomeruli bear no ids that would join it with others, and sections are not summed"
    others = [(section, why) for section in able if section is not most]
    sentence = (
        f"The glomeruli of the {len(able)} sections bear no ids in all of them, so they cannot be "
        f"joined: {most.slide}, the section with the most glomeruli ({len(most.glomeruli)}), is "
        "counted, and no sections are summed."
    )
    return [most], [*left, *others], {"by": "one section", "sentence": sentence}


def left_of(left: Sequence[tuple[Section, str]]) -> list[tuple[str, str]]:
    """Why a section is not counted, by its slide."""
    return [(section.slide, why) for section, why in left]


def _section(section: Section, left: Mapping[str, str]) -> dict[str, Any]:
    row = section.row
    return {
        "slide": section.slide,
        "stain": section.stain,
        "block": row.block,
        "level": row.level,
        "section_um": row.section_um,
        "reader": row.reader,
        "read": None if row.read is None else [*row.read],
        "model": " and ".join(dict.fromkeys(results.model for results in section.results)),
        "n": len(section.glomeruli),
        "used": section.slide not in left,
        "why_not": left.get(section.slide),
    }


def _unite(
    case: str,
    stated: Mapping[str, Any],
    used: Sequence[Section],
    recall: FinderRecall | None,
) -> Biopsy:
    """The biopsy's glomeruli, each once, with the states of its lesions over sections."""
    lesions: dict[str, Lesion] = {}
    for section in used:
        for key, lesion in section.lesions.items():
            lesions.setdefault(key, lesion)
    units: dict[str, list[Glomerulus]] = {}
    for section in used:
        for one in section.glomeruli:
            key = f"{one.slide} {one.item.id}"
            if len(used) > 1:
                key = f"glomerulus {one.glomerulus}"
            units.setdefault(key, []).append(one)
    name = stated.get("system")
    system = None if name in (None, SYSTEMS[0]) else declared_system(name)
    return Biopsy(
        case=case,
        stated=stated,
        system=system,
        sections=used,
        lesions=lesions,
        units=list(units.values()),
        recall=recall,
    )


# ---------------------------------------------------------------------------------------- status


def _status(used: Sequence[Section], readings: Reading | None, biopsy: Biopsy) -> dict[str, Any]:
    """Whether the sheet is a draft, and why."""
    reader = None if readings is None else readings.signed_by
    unreviewed = "DRAFT, unreviewed"
    if readings is None:
        reasons = ["No reader's corrections were given (--corrections)."]
        return {"draft": True, "signed_by": None, "words": unreviewed, "reasons": reasons}
    own = [section.reading for section in used if section.reading is not None]
    if reader is None:
        names = sorted({name for reading in own for name in reading.readers})
        reasons = ["No reader signs it (--signed-by)."]
        if names:
            reasons.append(f"It follows corrections by {few(names)}.")
        return {"draft": True, "signed_by": None, "words": unreviewed, "reasons": reasons}
    n = len(biopsy.units)
    read = sum(any(one.by == reader for one in unit) for unit in biopsy.units)
    partly = [section.slide for section in used if not section.all_read]
    if not partly:
        date = max(reading.date for reading in own)
        words = f"Read by {reader}, {date}"
        return {"draft": False, "signed_by": reader, "words": words, "reasons": []}
    reasons = [f"{reader} did not declare that all of {few(partly)} was read (--all-read)."]
    words = f"DRAFT, read in part by {reader}: {read} of {n} glomeruli" if own else unreviewed
    return {"draft": True, "signed_by": None, "words": words, "reasons": reasons}


def _notes_on_readers(used: Sequence[Section]) -> list[str]:
    notes: list[str] = []
    for section in used:
        reading = section.reading
        if reading is None:
            continue
        notes += reading.differing
        others = list(section.results[1:])
        if others and reading.read_by:
            notes.append(
                f"{section.slide}: {few(list(reading.readers))} corrected "
                f"'{section.results[0].folder.name}', so calls of "
                f"{few([results.model for results in others])} do not count for glomeruli that "
                "were read."
            )
        declared = section.row.reader
        if section.row.read and declared and declared not in reading.readers:
            notes.append(
                f"{section.slide}: the lesions that {declared} declared read do not count for what "
                f"{few(list(reading.readers))} read."
            )
    return notes


# ------------------------------------------------------------------------------------- glomeruli


def _list_glomeruli(biopsy: Biopsy) -> list[dict[str, Any]]:
    """Every object shown, sorted by doubt, the largest first; those without at the end."""
    rows: list[dict[str, Any]] = []
    for unit in biopsy.units:
        for one in unit:
            states = biopsy.states_of(one)
            shown = {biopsy.lesion(key).name: states[key] for key in biopsy.shown}
            rows.append(
                {
                    "slide": one.slide,
                    "object": one.item.id,
                    "glomerulus": one.glomerulus,
                    "class": one.label,
                    "by": one.by,
                    "probability": one.probability,
                    "doubt": one.doubt,
                    "confirmed": one.confirmed,
                    "finder_score": one.finder_score,
                    "quality": list(one.quality),
                    "unlike_support": one.unlike_support,
                    "set": None if one.classes is None else list(one.classes),
                    "states": shown,
                    "notes": list(one.notes),
                }
            )
    rows.sort(key=lambda r: (r["doubt"] is None, -(r["doubt"] or 0.0), r["slide"], r["object"]))
    return [
        {"slide": row.pop("slide"), "object": row.pop("object"),
         "glomerulus": row.pop("glomerulus"), "number": number, **row}
        for number, row in enumerate(rows, start=1)
    ]  # fmt: skip
