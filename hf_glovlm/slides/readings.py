"""Readings of slides: what readers left in the corrections of results, followed or compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from ..data.listing import few
from ..errors import GloVLMError, nearest
from ..files import check_fields, read_json
from .corrections import CORRECTED, FILE, KIND, RECORD
from .differences import read_all
from .files.annotations import SlideObject, by_name
from .files.matching import match_objects
from .result_objects import SlideResults

HAND = ("lesions", "quality")  # metadata that a reader writes on an object


@dataclass(frozen=True, kw_only=True)
class SlideReading:
    """What readers left of one slide.

    Attributes:
        readers: Whose it is.
        objects: All objects as they were left; an object of the results keeps its id.
        classes: Among which the readers chose: those of the results, and their own.
        read_by: The reader of each object that was read, by id.
        touched: Ids of objects that a reader ticked, whether or not their class was read.
        all_read: Whether a reader declared that all of the slide was read.
        date: Of the latest correction.
        place: Which of the results were corrected.
        differing: Sentences on objects that another reader left otherwise.
    """

    readers: Sequence[str]
    objects: Sequence[SlideObject]
    classes: Sequence[str]
    read_by: Mapping[str, str]
    touched: frozenset[str]
    all_read: bool
    date: str
    place: int
    differing: Sequence[str] = ()


@dataclass(frozen=True)
class Reading:
    """Output folder of `glovlm correct`, opened.

    Attributes:
        folder: The folder.
        records: What each reader's `corrections.json` holds, by reader.
        signed_by: Whose corrections are followed; those of all where `None`.
    """

    folder: Path
    records: Mapping[str, Mapping[str, Any]]
    signed_by: str | None = None

    def of_slide(self, slide: str, parts: Sequence[SlideResults]) -> SlideReading | None:
        """What was read of a slide; `None` where nobody whose corrections are followed read it.

        Args:
            slide: Its name.
            parts: The slide in each folder of results.

        Raises:
            GloVLMError: The corrections are of other results, or readers contradict each other and
                none of them signs.
        """
        having = [name for name, one in self.records.items() if slide in one["slides"]]
        each = {name: self._of_reader(name, slide, parts) for name in having}
        if self.signed_by is not None:
            own = each.pop(self.signed_by, None)
            if own is None:
                return None
            differing = [
                f"{slide}: {name} left {text}."
                for name, other in each.items()
                for text in _contradictions(own, other, parts[own.place])
            ]
            return replace(own, differing=differing)
        for one, other in combinations(each.values(), 2):
            contradicting = _contradictions(one, other, parts[one.place])
            if contradicting:
                raise GloVLMError(
                    f"The readers {one.readers[0]} and {other.readers[0]} contradict each other on "
                    f"{slide}: {other.readers[0]} left {'; '.join(contradicting[:5])}"
                    f"{' ...' if len(contradicting) > 5 else ''}. Say whose counts the sheet shows "
                    f"(--signed-by {one.readers[0]}), or let them agree."
                )
        merged: SlideReading | None = None
        for reading in each.values():
            merged = reading if merged is None else _merge(merged, reading)
        return merged

    def _of_reader(self, reader: str, slide: str, parts: Sequence[SlideResults]) -> SlideReading:
        described = self.records[reader]
        record = described["slides"][slide]
        places = [i for i, part in enumerate(parts) if part.digest == record["results"]]
        if not places:
            raise GloVLMError(
                f"The corrections of {slide} by {reader} in '{self.folder}' were made from other "
                "results than those given (--slides): give the results that were corrected, or "
                "correct these."
            )
        before = {item.id: item for item in parts[places[0]].objects}
        objects = read_all(self.folder / reader / CORRECTED / f"{slide}.geojson")
        read_by, touched = {}, set()
        for item in objects:
            metadata = by_name(item.properties.get("metadata"))
            if metadata.get("read by") == reader:
                read_by[item.id] = reader
            earlier = before.get(item.id)
            old = by_name(earlier.properties.get("metadata")) if earlier is not None else {}
            if any(metadata.get(name) != old.get(name) for name in HAND):
                touched.add(item.id)
        return SlideReading(
            readers=[reader],
            objects=objects,
            classes=[*described["class_names"], *described["classes"]],
            read_by=read_by,
            touched=frozenset(touched),
            all_read=bool(record["all_read"]),
            date=str(record["date"]),
            place=places[0],
        )


def open_corrections(folder: Path, signed_by: str | None) -> Reading:
    """Open an output folder of `glovlm correct`.

    Args:
        folder: The folder.
        signed_by: Whose corrections are to be followed.

    Raises:
        GloVLMError: It holds no corrections, a damaged file, or none of this reader.
    """
    if not (folder / FILE).is_file():
        raise GloVLMError(
            f"Expected corrections, found no {FILE} in '{folder}': give the --output-dir of "
            "`glovlm correct`, not a reader's folder in it."
        )
    content = read_json(folder / FILE)
    if content.get("kind") != KIND or not isinstance(content.get("readers"), list):
        raise GloVLMError(
            f"'{folder / FILE}' is damaged, or is of one reader: give the --output-dir of `glovlm "
            "correct`."
        )
    names = [str(entry["reader"]) for entry in content["readers"]]
    if signed_by is not None and signed_by not in names:
        raise GloVLMError(
            f"'{folder}' holds no corrections by {signed_by} (--signed-by); its readers are "
            f"{few(names)}.{nearest(signed_by, names)}"
        )
    records = {}
    for name in names:
        path = folder / name / FILE
        records[name] = read_json(path)
        expected = {"slides": (dict,), "classes": (list,), "class_names": (list,)}
        check_fields(path, records[name], expected)
        for record in records[name]["slides"].values():
            check_fields(path, record, RECORD)
    return Reading(folder, records, signed_by)


def _contradictions(one: SlideReading, other: SlideReading, results: SlideResults) -> list[str]:
    """What the second left otherwise, of objects that both of them read, in words."""
    mine, theirs = ({item.id: item for item in each.objects} for each in (one, other))
    texts = []
    for item in results.objects:
        left = [_left(item.id, each, its) for each, its in ((one, mine), (other, theirs))]
        if None not in left and left[0] != left[1]:
            texts.append(f"the object {item.id} as {left[1]}, {one.readers[0]} as {left[0]}")
    known = {item.id for item in results.objects}
    added = [[item for item in each.objects if item.id not in known] for each in (one, other)]
    pairs = match_objects(*added)
    for i, j in pairs:
        a, b = added[0][i], added[1][j]
        if a.label != b.label:
            texts.append(f"the object {a.id} as {b.label}, {one.readers[0]} as {a.label}")
    if other.all_read:
        alone = {i for i, _ in pairs}
        texts += [
            f"the object {item.id} out, which {one.readers[0]} added"
            for i, item in enumerate(added[0])
            if i not in alone
        ]
    if one.all_read:
        alone = {j for _, j in pairs}
        texts += [
            f"the object {item.id} added, which {one.readers[0]} left out"
            for j, item in enumerate(added[1])
            if j not in alone
        ]
    return texts


def _left(name: str, reading: SlideReading, items: Mapping[str, SlideObject]) -> str | None:
    """How a reader left an object of the results, in words; `None` of one that was not read."""
    if name not in items:
        return "no object"
    return str(items[name].label) if name in reading.read_by else None


def _merge(one: SlideReading, other: SlideReading) -> SlideReading:
    """Readings of one slide that do not contradict each other."""
    theirs = {item.id: item for item in other.objects}
    mine = {item.id for item in one.objects}
    removed = {  # whatever either took away of the results
        *(mine - {*theirs} - {*one.read_by}),
        *({*theirs} - mine - {*other.read_by}),
    }
    objects = []
    for item in one.objects:
        again = theirs.get(item.id)
        if item.id in removed:
            continue
        chosen = item
        if again is not None and item.id not in one.read_by and item.id in other.read_by:
            chosen = again
        objects.append(chosen if again is None else _with_ticks(chosen, item, again))
    added = [item for item in other.objects if item.id not in mine and item.id not in removed]
    alone = [item for item in one.objects if item.id not in theirs]
    twice = {j for _, j in match_objects(alone, added)}
    objects += [item for j, item in enumerate(added) if j not in twice]
    return replace(
        one,
        readers=[*one.readers, *other.readers],
        objects=objects,
        classes=[*dict.fromkeys((*one.classes, *other.classes))],
        read_by={**other.read_by, **one.read_by},
        touched=one.touched | other.touched,
        all_read=one.all_read or other.all_read,
        date=max(one.date, other.date),
    )


def _with_ticks(item: SlideObject, *others: SlideObject) -> SlideObject:
    """An object with what several readers ticked on it."""
    metadata = by_name(item.properties.get("metadata"))
    for name in HAND:
        texts = [by_name(one.properties.get("metadata")).get(name) for one in others]
        parts = [
            part.strip() for text in texts if isinstance(text, str) for part in text.split(";")
        ]
        if any(parts):
            metadata[name] = "; ".join(dict.fromkeys(filter(None, parts)))
    return replace(item, properties={**item.properties, "metadata": metadata})
