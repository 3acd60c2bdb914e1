"""Corrections (`glovlm correct`): what a reader changed in the results of slides, and counts anew.

The results are never changed. Every reader has a folder of his own beside those of others; slides
may be corrected one by one, and the same file again gives the same bytes.

An object counts as *read* where its class is the reader's: one that the reader added or gave
another class, or any where the reader declares that all of the slide were looked at. One that was
left as it was is not read: nobody may have looked.
"""

import datetime
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.groups import differing_spellings, in_quotes
from ..data.listing import few
from ..errors import GloVLMError, WriteError, describe_error, nearest
from ..files import (
    UNFINISHED,
    check_fields,
    digest_file,
    is_plain_name,
    one_writer,
    put_in_place,
    read_json,
    read_results,
    staging,
    write_csv,
    write_json,
)
from ..progress import counted
from .cases import join_sections
from .counting import NOT_A_SCORE, count_classes
from .differences import Correction, Difference, compare_objects, corrected_object, read_all
from .files.annotations import SlideObject, find_repeats, write_geojson
from .files.matching import match_objects
from .files.names import OUTLINES, files_below, outlined_slide
from .numbering import NUMBERS
from .objects import GLOMERULUS, glomerulus_of
from .result_objects import SlideResults, read_slide_results
from .split_table import TEST, split_cases

FILE = "corrections.json"
CORRECTED, LABELLED, COUNTS, SPLIT = "corrected", "labelled", "counts.csv", "cases.csv"
KIND = "corrections"
SAMPLING = (
    "Intervals are 95% Wilson intervals of counting; they hold neither the classifier's errors nor "
    "the reader's."
)
_PARTLY = (
    "A run was tested on this slide's patient, and the slide was read in part: what was corrected "
    "is no random part of it, so it is not written for training and testing. Read all of it, and "
    "say so (--all-read)."
)
RECORD: dict[str, tuple[type, ...]] = {  # of a slide in a reader's corrections
    "date": (str,), "all_read": (bool,), "results": (str,), "corrected": (str,), "changes": (dict,),
    "counts": (dict,),
}  # fmt: skip
logger = logging.getLogger("hf_glovlm")


@dataclass(frozen=True)
class _Reading:
    """Who read, what that person declares, and of which results."""

    reader: str
    all_read: bool
    date: str | None
    classes: Sequence[str]  # the model's, then the reader's own
    tested: Collection[str]  # slides on which a run was tested
    results: Mapping[str, Any]
    source: Path

    def slide(self, name: str) -> SlideResults:
        """A slide of the results with its objects."""
        entries = {str(entry["slide"]): entry for entry in self.results["slides"]}
        return read_slide_results(self.source, entries.get(name) or {"slide": name})

    def compare(self, slide: SlideResults, path: Path) -> Difference:
        """What a file changes in a slide."""
        size = slide.entry.get("size")
        return compare_objects(
            slide.objects,
            path,
            self.classes,
            origin=slide.origin,
            exclude=self.results.get("settings", {}).get("exclude") or (),
            size=None if size is None else (int(size[0]), int(size[1])),
            mpp=slide.entry.get("mpp"),
        )


@dataclass(frozen=True)
class _Rows:
    """Objects of a slide to be counted: probabilities `[n, K]`, glomerulus, and whether read."""

    values: NDArray[np.float64]
    ids: list[str]
    read: list[bool]


def correct_results(
    results: str | Path,
    corrected: str | Path,
    reader: str,
    output_dir: str | Path,
    *,
    all_read: bool = False,
    date: str | None = None,
    classes: Sequence[str] = (),
    run: str | Path | None = None,
    cases: str | Path | None = None,
) -> dict[str, Any]:
    """Read a reader's corrections of slides as differences, and count lesions anew.

    Into `output_dir/READER/`: `corrections.json` (per slide what was added, removed, reclassified
    and redrawn, counts before and after, by whom and when), `counts.csv`, `corrected/NAME.geojson`
    (all objects as the reader left them) and `labelled/NAME.geojson` (those that were read, for
    `glovlm data crops`); with `run` and `cases` also `cases.csv` with the column `split`. Into
    `output_dir/corrections.json` all readers, and where they differ.

    Args:
        results: Output folder of `glovlm slide`.
        corrected: GeoJSON from QuPath, or a folder of `NAME.geojson`, called as the slides are.
        reader: Who corrected: a name, initials or a number that can name a folder.
        output_dir: Where corrections are written; other slides and readers in it stay.
        all_read: The reader looked at every object of these slides, so that all classes in the
            files are the reader's, also those left as they were.
        date: Of the correction, `YYYY-MM-DD`; by default that of each file's last change.
        classes: Classes that the reader uses and the model does not have, to be counted too.
        run: Run of `glovlm train` whose split the patients of these slides keep.
        cases: Table of cases that says whose the slides are.

    Returns:
        What the reader's `corrections.json` holds, with `failed`: the slides whose file cannot be
        used, and why.

    Raises:
        GloVLMError: No such results, no file of any slide, a reader's name that names no folder,
            or an output folder that holds something else.
    """
    source, output = Path(results).expanduser(), Path(output_dir).expanduser()
    content = read_results(source, "slides")
    if not content.get("class_names"):
        raise GloVLMError(
            f"'{source}' holds no classes: only a classifier's results are corrected."
        )
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
        raise GloVLMError(
            f"'{output}' lies in the results, which are never changed: give another --output-dir."
        )
    if bool(run) != bool(cases):
        raise GloVLMError("Give --run and --cases together: whose split, and whose slides.")
    _check_reader(reader)
    if date is not None:
        _check_date(date)
    files = _match_files(Path(corrected).expanduser(), source, content)
    with one_writer(output), staging(output) as work:
        former = _read_former(output, reader)
        mine = former.get(reader, {"classes": [], "slides": {}})
        names = [*dict.fromkeys((*content["class_names"], *mine["classes"], *classes))]
        _check_classes(names)
        split = None
        if run is not None and cases is not None:
            split = split_cases(Path(run), Path(cases), {*mine["slides"], *files})
        tested = {name for name, side in split.sides.items() if side == TEST} if split else set()
        reading = _Reading(reader, all_read, date, names, tested, content, source)
        records, rows, failed = dict(mine["slides"]), {}, {}
        for name, path in counted([*files.items()], "slides"):
            try:
                before = mine["slides"].get(name, {})
                records[name], rows[name] = _correct_slide(name, path, reading, before, work)
            except WriteError:
                raise
            except Exception as error:  # what is wrong with one slide stays with it
                failed[name] = describe_error(error)
        if len(failed) == len(files):
            raise GloVLMError("; ".join(failed.values()))
        for name in [name for name in records if name not in rows]:
            rows[name] = _rows_of_earlier(name, records[name], reading, output)
        described: dict[str, Any] = {
            "kind": KIND,
            "research_use_only": True,
            "reader": reader,
            "class_names": list(content["class_names"]),
            "classes": [name for name in names if name not in content["class_names"]],
            "slides": {name: records[name] for name in sorted(records)},
            "cases": _count_cases(reading, rows),
        }
        write_json(work / reader / FILE, described, ensure_ascii=False, allow_nan=False)
        _write_counts(work / reader / COUNTS, described, names)
        if split is not None:
            split.save(work / reader / SPLIT)
            described["split"] = split.counts
        summary = _summarise(former | {reader: described}, work, output)
        write_json(work / FILE, summary, ensure_ascii=False, allow_nan=False)
        places = [f"{CORRECTED}/{name}.geojson" for name in rows if name in files]
        places += [
            f"{LABELLED}/{name}.geojson"
            for name, one in records.items()
            if (name in files and name in rows) or (name in tested and not one["all_read"])
        ]
        places += [FILE, COUNTS, *([SPLIT] if split else [])]
        put_in_place(work, output, [*(f"{reader}/{place}" for place in places), FILE])
    return described | {"failed": failed, "between_readers": summary["between_readers"]}


def _correct_slide(
    name: str, path: Path, reading: "_Reading", before: Mapping[str, Any], work: Path
) -> tuple[dict[str, Any], "_Rows"]:
    """Compare a slide with the reader's file and write both; its entry, and what is counted."""
    slide = reading.slide(name)
    difference = reading.compare(slide, path)
    rows = _rows(slide, difference, reading.classes, reading.all_read)
    date = reading.date or _date_of(path, before)
    partly = name in reading.tested and not reading.all_read
    every, labelled = [], []
    for one in difference.corrections:
        if one.after is None:
            continue
        is_read = one.is_read(reading.all_read)
        item = corrected_object(one, reading.reader, date, is_read=is_read)
        every.append(item)
        if is_read and item.label in reading.classes and not partly:
            labelled.append(item)
    folder = work / reading.reader
    write_geojson(folder / CORRECTED / f"{name}.geojson", every, origin=slide.origin)
    if labelled:
        write_geojson(folder / LABELLED / f"{name}.geojson", labelled, origin=slide.origin)
    kinds = {
        kind: [one.describe(kind) for one in difference.corrections if kind in one.kinds]
        for kind in ("added", "removed", "reclassified", "redrawn")
    }
    after = _count(rows, reading.classes, reading.reader)
    return {
        "date": date,
        "all_read": reading.all_read,
        "results": slide.digest,
        "corrected": digest_file(path),
        "changes": difference.counts,
        **kinds,
        "repeated": list(difference.repeated),
        "left_out": {reason: len(ids) for reason, ids in difference.left_out.items()},
        "counts": {"before": slide.entry["counts"], "after": after},
        "notes": [*difference.notes, *([_PARTLY] if partly else [])],
    }, rows


def _rows_of_earlier(
    name: str, record: Mapping[str, Any], reading: "_Reading", output: Path
) -> "_Rows":
    """What is counted of a slide that the reader corrected before.

    Raises:
        GloVLMError: Its results have changed since.
    """
    slide = reading.slide(name)
    if slide.digest != record["results"]:
        raise GloVLMError(
            f"The results of {name} have changed since {reading.reader} corrected them: give its "
            "corrected file too, or another --output-dir."
        )
    path = output / reading.reader / CORRECTED / f"{name}.geojson"
    return _rows(slide, reading.compare(slide, path), reading.classes, record["all_read"])


# ---------------------------------------------------------------------------------- what is given


def _check_reader(reader: str) -> None:
    if not is_plain_name(reader) or reader.casefold() in (FILE, UNFINISHED):
        raise GloVLMError(
            f"Expected a reader's name that can name a folder (--reader AB), found '{reader}': "
            'write initials or a number, without / \\ : * ? " < > | and without a dot in front.'
        )


def _check_date(date: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise GloVLMError(f"Expected a date as YYYY-MM-DD (--date), found '{date}'.") from None


def _check_classes(names: Sequence[str]) -> None:
    """Refuse a class that differs from another in spelling only."""
    for written in differing_spellings(names):
        raise GloVLMError(
            f"The classes {in_quotes(written)} differ in spelling only: give the model's own "
            "spelling, or leave it out."
        )


def _date_of(path: Path, before: Mapping[str, Any]) -> str:
    """Date of a file's last change (UTC); of one whose content is known, the one stated before."""
    if before.get("corrected") == digest_file(path):
        return str(before["date"])
    changed = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return changed.date().isoformat()


def _match_files(given: Path, source: Path, content: Mapping[str, Any]) -> dict[str, Path]:
    """The reader's file of each slide that has one, by the slide's name.

    Raises:
        GloVLMError: There is none, or two of one slide.
    """
    slides = [str(entry["slide"]) for entry in content["slides"]]
    if os.path.isfile(given):
        if len(slides) == 1:
            return {slides[0]: given}
        listed = [given]
    elif os.path.isdir(given):
        listed = files_below(given, [suffix for suffix in OUTLINES if "json" in suffix])
    else:
        raise GloVLMError(
            f"Expected a GeoJSON file or a folder of NAME.geojson, found no '{given}'."
        )
    files: dict[str, Path] = {}
    unused = []
    for path in listed:
        name = outlined_slide(path)
        if name not in slides:
            unused.append(path.name)
        elif name in files:
            raise GloVLMError(
                f"{given} holds two files of the slide {name} ({files[name].name}, {path.name}): "
                "keep one of them."
            )
        else:
            files[name] = path
    if not files:
        hint = "".join(dict.fromkeys(nearest(outlined_slide(path), slides) for path in listed[:3]))
        numbered = " The slides are numbered there (--anonymise): call the files as the numbers."
        raise GloVLMError(
            f"{given} holds no file of any of the {len(slides)} slides ({few(slides)}): call it "
            f"NAME.geojson, as the slide is called.{hint}"
            f"{numbered if (source / NUMBERS).is_file() else ''}"
        )
    if unused:
        logger.warning("%d files are of no slide of the results (%s).", len(unused), few(unused))
    return files


def _read_former(output: Path, reader: str) -> dict[str, dict[str, Any]]:
    """What each reader's folder holds so far.

    Raises:
        GloVLMError: The folder holds something else, or a reader's name in another spelling.
    """
    path = output / FILE
    there = [place.name for place in output.iterdir() if not place.name.startswith(".")]
    there = [name for name in there if name != UNFINISHED]
    if not path.is_file():
        if there:
            raise GloVLMError(
                f"Output folder '{output}' holds files that are no corrections: give an empty or a "
                "new folder."
            )
        return {}
    readers = read_json(path).get("readers")
    if read_json(path).get("kind") != KIND or not isinstance(readers, list):
        raise GloVLMError(
            f"'{path}' is damaged or holds something else: give another --output-dir."
        )
    names = [str(entry["reader"]) for entry in readers]
    for written in differing_spellings([*names, reader]):
        raise GloVLMError(
            f"The readers {in_quotes(written)} differ in spelling only: write each in one way."
        )
    former = {}
    for name in names:
        path = output / name / FILE
        former[name] = read_json(path)
        check_fields(path, former[name], {"slides": (dict,), "classes": (list,)})
        for record in former[name]["slides"].values():
            check_fields(path, record, RECORD)
    return former


# -------------------------------------------------------------------------------------- counting


def _rows(
    slide: SlideResults, difference: Difference, names: Sequence[str], all_read: bool
) -> _Rows:
    """Objects of a slide that are counted, each outline of one object in one glomerulus.

    One that was read has probability 1 of its class; one that was not has the classifier's.
    """
    counted = [
        one for one in difference.corrections if one.after is not None and one.after.label in names
    ]
    objects = [one.after for one in counted if one.after is not None]
    first = find_repeats(objects).tolist()
    values = np.zeros((len(counted), len(names)))
    read = [one.is_read(all_read) for one in counted]
    for row, (one, item) in enumerate(zip(counted, objects, strict=True)):
        called = slide.probabilities.get(one.id)
        if read[row] or called is None:
            values[row, names.index(str(item.label))] = 1
        else:
            values[row, : len(called)] = called
    own = [
        slide.glomeruli.get(one.id) or glomerulus_of(item)
        for one, item in zip(counted, objects, strict=True)
    ]
    ids = [
        f"{slide.name} {counted[i].id}" if own[i] is None else f"{GLOMERULUS}{own[i]}"
        for i in first
    ]
    # Of outlines of one object those that were read count, else the first.
    was_read = {i for i, one in zip(first, read, strict=True) if one}
    kept = [row for row, i in enumerate(first) if (read[row] if i in was_read else row == i)]
    return _Rows(values[kept], [ids[row] for row in kept], [read[row] for row in kept])


def _count(rows: _Rows, names: Sequence[str], reader: str) -> dict[str, Any]:
    """Lesion counts of objects; where one glomerulus was read in some of its rows, those count."""
    was_read = {name for name, one in zip(rows.ids, rows.read, strict=True) if one}
    kept = [
        i
        for i, (name, one) in enumerate(zip(rows.ids, rows.read, strict=True))
        if one or name not in was_read
    ]
    values = rows.values[kept].reshape(-1, len(names))
    counts = count_classes(values, names, ids=[rows.ids[i] for i in kept])["all"]
    n, n_read = counts["n"], len(was_read)
    notes = [NOT_A_SCORE, SAMPLING]
    if n_read < n:
        notes.append(
            f"{n_read} of {n} objects have the class that {reader} gave them, the others the "
            "classifier's. Percentages are not corrected for its errors: the objects that were "
            "left are no random ones, so that it errs on them otherwise than where its errors were "
            "measured."
        )
    return counts | {"read": n_read, "notes": notes}


def _count_cases(reading: _Reading, rows: Mapping[str, _Rows]) -> list[dict[str, Any]]:
    """Counts of the cases with a corrected slide; their other slides as the classifier has them."""
    entries = reading.results["slides"]
    counted = []
    for case in reading.results["cases"]:
        of_case = [entry for entry in entries if entry["case"] == case["case"]]
        slides = [str(e["slide"]) for e in of_case if (e["counts"] or {}).get("unit") == "objects"]
        if not any(name in rows for name in slides):
            continue
        every: dict[str, _Rows] = {}
        for name in slides:
            part = rows.get(name)
            if part is None:
                slide = reading.slide(name)
                untouched = Difference([Correction(item, item) for item in slide.objects])
                part = _rows(slide, untouched, reading.classes, False)
            every[name] = part
        slides = join_sections({name: part.ids for name, part in every.items()})
        parts = [every[name] for name in slides]
        together = _Rows(
            np.concatenate([part.values for part in parts]),
            [name for part in parts for name in part.ids],
            [one for part in parts for one in part.read],
        )
        after = _count(together, reading.classes, reading.reader)
        counts = {"before": case["counts"], "after": after}
        counted.append({"case": case["case"], "slides": slides, "counts": counts})
    return counted


# --------------------------------------------------------------------------------------- writing


def _write_counts(path: Path, described: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write counts before and after, one row a slide, then one a case."""
    header = ["level", "name", "reader", "n_before", "n", "read"]
    for name in names:
        header += [f"count_before_{name}", f"count_{name}", f"percent_{name}"]
        header += [f"low_{name}", f"high_{name}"]
    entries = [("slide", name, one["counts"]) for name, one in described["slides"].items()]
    entries += [("case", one["case"], one["counts"]) for one in described["cases"]]
    table = []
    for level, name, counts in entries:
        before, after = counts["before"] or {"n": None, "classes": {}}, counts["after"]
        row = [level, name, described["reader"], before["n"], after["n"], after["read"]]
        for label in names:
            now = after["classes"].get(label, {"count": 0, "percent": None, "ci95": None})
            row += [before["classes"].get(label, {}).get("count"), now["count"], now["percent"]]
            row += now["ci95"] or [None, None]
        table.append(row)
    write_csv(path, header, table)


def _summarise(
    everyone: Mapping[str, Mapping[str, Any]], work: Path, output: Path
) -> dict[str, Any]:
    """All readers, and where two of them left an object of one slide differently."""
    readers = [
        {
            "reader": name,
            "slides": sorted(one["slides"]),
            "changes": {
                kind: sum(slide["changes"][kind] for slide in one["slides"].values())
                for kind in ("added", "removed", "reclassified", "redrawn", "unchanged")
            },
        }
        for name, one in sorted(everyone.items())
    ]
    between = []
    for one, other in combinations(sorted(everyone), 2):
        for slide in sorted({*everyone[one]["slides"]} & {*everyone[other]["slides"]}):
            places = []
            for reader in (one, other):
                place = Path(reader) / CORRECTED / f"{slide}.geojson"
                places.append(work / place if (work / place).is_file() else output / place)
            pair = [read_all(place) for place in places]
            between.append({"slide": slide, **_between((one, other), *pair)})
    return {
        "kind": KIND, "research_use_only": True, "readers": readers, "between_readers": between,
    }  # fmt: skip


def _between(
    readers: tuple[str, str], first: list[SlideObject], second: list[SlideObject]
) -> dict[str, Any]:
    """Objects of a slide that two readers left alike, and each that they left differently."""
    pairs = match_objects(first, second)
    differing: list[dict[str, Any]] = [
        {"id": first[i].id, readers[0]: first[i].label, readers[1]: second[j].label}
        for i, j in pairs
        if first[i].label != second[j].label
    ]
    alone = [
        (0, [item for i, item in enumerate(first) if i not in dict(pairs)]),
        (1, [item for j, item in enumerate(second) if j not in {b for _, b in pairs}]),
    ]
    for place, items in alone:
        for item in items:
            entry = {"id": item.id, readers[place]: item.label, readers[1 - place]: "no object"}
            differing.append(entry)
    same = len(pairs) - sum(first[i].label != second[j].label for i, j in pairs)
    return {"readers": list(readers), "alike": same, "differing": differing}
