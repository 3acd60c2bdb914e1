"""Sections of a biopsy: the glomeruli that results show, with what models and readers say of each.

A reader ticks further lesions, and what is wrong with a picture, on an object in QuPath: metadata
`lesions` (names separated by semicolons, `crescent: cellular; segmental sclerosis`) and `quality`
(`cut by the border; folded; blurred; wrong stain`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.listing import few
from ..data.stains import name_stain
from ..errors import GloVLMError, nearest
from ..files import read_results
from ..tables import spelling
from .files.annotations import SlideObject, by_name, find_repeats
from .files.case_table import CaseRow
from .files.matching import match_objects
from .lesions import (
    ABSENT,
    PRESENT,
    ClassSet,
    Lesion,
    State,
    is_lesion,
    lesion_of,
    wider_lesions,
)
from .numbering import NUMBERS
from .objects import glomerulus_of
from .readings import Reading, SlideReading
from .result_objects import SlideResults, read_slide_results

LESIONS, QUALITY, GIVEN, FINDER = "lesions", "quality", "given class", "finder"
SCORE, CUT_MEASURED = "finder score", "cut by border"  # measurements of a finder
CUT = "cut by the border"
QUALITIES = (CUT, "folded", "blurred", "wrong stain")
_CUT_NAMES = ("cut_by_border", "partial")  # columns of crops, as properties
MODEL = "model"


@dataclass(frozen=True)
class ModelResults:
    """Output folder of `glovlm slide`, opened.

    Attributes:
        folder: The folder.
        content: Of its `results.json`.
        classes: Its classes.
    """

    folder: Path
    content: Mapping[str, Any]
    classes: ClassSet

    @property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """Its slides by name."""
        return {str(entry["slide"]): entry for entry in self.content["slides"]}

    @property
    def numbered(self) -> bool:
        """Whether its slides bear numbers in place of names."""
        return (self.folder / NUMBERS).is_file()

    @property
    def model(self) -> str:
        """Backbone and fingerprint of the model, in short."""
        about = self.content.get("model") or {}
        short = str(about.get("fingerprint") or "")[:8]
        name = str(about.get("backbone") or "unknown").rsplit("/", 1)[-1]
        return f"{name} ({short})" if short else name


def open_results(folder: Path) -> ModelResults:
    """Open an output folder of `glovlm slide`.

    Args:
        folder: The folder.

    Raises:
        GloVLMError: It holds no such results, or those of a backbone, which has no classes.
    """
    content = read_results(folder, "slides")
    if not content.get("class_names"):
        raise GloVLMError(
            f"'{folder}' holds no classes of glomeruli: run `glovlm slide` with a classifier and "
            "--objects."
        )
    return ModelResults(folder, content, ClassSet(list(content["class_names"])))


@dataclass(frozen=True, kw_only=True)
class Glomerulus:
    """Glomerulus as one section shows it.

    Attributes:
        slide: The section.
        item: Its outline.
        glomerulus: Its id over sections, where stated.
        label: Its class.
        by: Who gave it that: `model`, or a reader.
        probability: Of the class, by the model.
        doubt: What the model left for all other classes.
        confirmed: Whether a reader read it, or outlined the section.
        finder_score: Where a finder outlined it.
        finder: Which finder, in short.
        quality: What is wrong with its picture, of QUALITIES.
        unlike_support: Whether it is unlike what the model learned from.
        classes: The model's prediction set.
        states: Of lesions by key, before the rules that hold for all of them.
        calls: Its class by each of the folders.
        notes: Sentences.
    """

    slide: str
    item: SlideObject
    glomerulus: str | None
    label: str | None
    by: str
    probability: float | None
    doubt: float | None
    confirmed: bool
    finder_score: float | None
    finder: str | None
    quality: Sequence[str]
    unlike_support: bool | None
    classes: Sequence[str] | None
    states: Mapping[str, State]
    calls: Mapping[Path, str]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """Section of a biopsy: a slide with what the table states of it, and its glomeruli.

    Attributes:
        slide: Its name.
        row: Of the table of cases.
        stain: Canonical; `None` where nobody states it.
        results: Folders that hold it, in the order given.
        glomeruli: Those that it shows, each once.
        lesions: That its classes and readers tell of.
        unsuited: Classes that no glomerulus has, and why.
        why_not: Why it cannot be counted, in words.
        reading: What a reader did there.
        notes: Sentences.
    """

    slide: str
    row: CaseRow
    stain: str | None
    results: Sequence[ModelResults] = ()
    glomeruli: Sequence[Glomerulus] = ()
    lesions: Mapping[str, Lesion] = field(default_factory=dict)
    unsuited: Mapping[str, str] = field(default_factory=dict)
    why_not: str | None = None
    reading: SlideReading | None = None
    notes: Sequence[str] = ()

    @property
    def all_read(self) -> bool:
        """Whether a reader declared that all of it was read."""
        return self.reading is not None and self.reading.all_read

    @property
    def has_ids(self) -> bool:
        """Whether every glomerulus bears an id."""
        return all(one.glomerulus is not None for one in self.glomeruli)


def read_section(
    row: CaseRow, folders: Sequence[ModelResults], readings: Reading | None
) -> Section:
    """Read what results and readers say of a section.

    Args:
        row: Of the table of cases.
        folders: Every folder of results.
        readings: Corrections to follow; `None` for none.

    Raises:
        GloVLMError: Folders that outline other objects on it, readers that contradict, corrections
            of other results, an unknown word of quality, or a glomerulus that it shows twice.
    """
    slide = row.slide
    having = [folder for folder in folders if slide in folder.entries]
    stain = name_stain(row.stain)
    if not having:
        return Section(slide=slide, row=row, stain=stain, why_not="no results of it are given")
    entry = having[0].entries[slide]
    stain = stain or entry.get("stain")
    counted, reasons = [], []
    for folder in having:
        reason = _why_not(folder.entries[slide])
        counted += [] if reason else [folder]
        reasons += [reason] if reason else []
    if not counted:
        return Section(
            slide=slide, row=row, stain=stain, results=having, why_not="; ".join({*reasons})
        )
    parts = [read_slide_results(folder.folder, folder.entries[slide]) for folder in counted]
    reading = readings.of_slide(slide, parts) if readings is not None else None
    if reading is not None:  # what was corrected goes first: its ids are the reader's
        order = sorted(range(len(parts)), key=lambda i: (i != reading.place, i))
        counted, parts = [counted[i] for i in order], [parts[i] for i in order]
    return _Builder(row, stain, counted, parts, reading).build()


def _why_not(entry: Mapping[str, Any]) -> str | None:
    """Why the objects of a slide cannot be counted."""
    if entry.get("status") != "done":
        return f"it failed: {entry.get('error') or 'no reason is stated'}"
    counts = entry.get("counts")
    if not counts or counts.get("unit") != "objects":
        return "its tiles were counted, and tiles are no glomeruli: give outlines (--objects)"
    return None


class _Builder:
    """Puts together what folders and a reader say of one section."""

    def __init__(
        self,
        row: CaseRow,
        stain: str | None,
        folders: Sequence[ModelResults],
        parts: Sequence[SlideResults],
        reading: SlideReading | None,
    ) -> None:
        self.row, self.stain, self.folders, self.parts = row, stain, folders, parts
        self.reading = reading
        self.notes: list[str] = []
        # A reader chose among the classes of what was corrected, and the reader's own.
        names = folders[0].classes.names if reading is None else reading.classes
        self.chosen = ClassSet(list(dict.fromkeys(names)))
        self.sets = [ClassSet([*folder.classes.names]) for folder in folders]
        self.ticked: dict[str, Lesion] = {}
        self.declared = [
            self._lesion(name, "read, in the table of cases") for name in row.read or ()
        ]
        self.matches = [self._match(i) for i in range(1, len(parts))]

    def _match(self, i: int) -> dict[str, str]:
        """Ids of a further folder's objects by those of the first.

        Raises:
            GloVLMError: The two do not outline the same objects.
        """
        first, other = self.parts[0].objects, self.parts[i].objects
        pairs = match_objects(first, other)
        if len(pairs) < max(len(first), len(other)):
            raise GloVLMError(
                f"The outlines of {self.row.slide} differ between '{self.folders[0].folder}' "
                f"({len(first)}) and '{self.folders[i].folder}' ({len(other)}; {len(pairs)} are "
                "the same): classify the same outlines (--objects) with both models."
            )
        return {first[a].id: other[b].id for a, b in pairs}

    def build(self) -> Section:
        """The section."""
        items = self._objects()
        for item in items:  # before any state, as a tick is known to all
            for lesion in self._ticks(item):
                self.ticked.setdefault(lesion.key, lesion)
        glomeruli = [self._glomerulus(item) for item in items]
        glomeruli = self._once(glomeruli)
        self._check_ids(glomeruli)
        lesions: dict[str, Lesion] = {}
        for known in (*self.sets, self.chosen):
            for key, lesion in known.lesions.items():
                lesions.setdefault(key, lesion)
        for lesion in (*self.ticked.values(), *self.declared):
            for one in (lesion, *wider_lesions(lesion)):
                lesions.setdefault(one.key, one)
        unsuited = {name: why for known in self.sets for name, why in known.unsuited.items()}
        return Section(
            slide=self.row.slide,
            row=self.row,
            stain=self.stain,
            results=self.folders,
            glomeruli=glomeruli,
            lesions=lesions,
            unsuited=unsuited | self.chosen.unsuited,
            reading=self.reading,
            notes=self.notes,
        )

    def _objects(self) -> list[SlideObject]:
        """Outlines that count: those of the results, or as the reader left them."""
        first = self.parts[0]
        known = {*self.chosen.names}
        if self.reading is None:
            counted = first.columns.get("counted", {})
            items = [item for item in first.objects if counted.get(item.id, True)]
        else:
            items = list(self.reading.objects)
            other = [item for item in items if item.label not in known]
            if other:
                named = sorted({item.label or "without a class" for item in other})
                self.notes.append(
                    f"{self.row.slide}: {len(other)} objects of other classes ({few(named)}) are "
                    "not counted."
                )
            items = [item for item in items if item.label in known]
        nothing = [i for i in items if not self.chosen.is_glomerulus(i.label)]
        if nothing:
            self.notes.append(
                f"{self.row.slide}: {len(nothing)} objects that are called tissue without a "
                "glomerulus are not counted."
            )
        return [item for item in items if item not in nothing]

    def _once(self, glomeruli: list[Glomerulus]) -> list[Glomerulus]:
        """Of outlines of one object the one that was read, else the first."""
        if self.reading is None or not glomeruli:
            return glomeruli
        first = find_repeats([one.item for one in glomeruli]).tolist()
        kept: dict[int, Glomerulus] = {}
        for one, place in zip(glomeruli, first, strict=True):
            if place not in kept or (kept[place].by == MODEL and one.by != MODEL):
                kept[place] = one
        return list(kept.values())

    def _check_ids(self, glomeruli: Sequence[Glomerulus]) -> None:
        """Refuse a glomerulus that stands on one section twice."""
        ids = [one.glomerulus for one in glomeruli if one.glomerulus is not None]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise GloVLMError(
                f"{self.row.slide} shows the glomerulus {twice[0]} {ids.count(twice[0])} times: "
                "one section shows a glomerulus once; correct its glomerulus_id."
            )

    def _glomerulus(self, item: SlideObject) -> Glomerulus:
        """One object, with what every source says of it."""
        first, reading = self.parts[0], self.reading
        reader = None if reading is None else reading.read_by.get(item.id)
        names = self._ids(item.id)
        calls = {
            folder.folder: str(part.columns["label"][name])
            for folder, part, name in zip(self.folders, self.parts, names, strict=True)
            if name in part.columns.get("label", {})
        }
        states: dict[str, State] = {}
        if reader is not None:
            known = (*self.ticked, *(lesion.key for lesion in self.declared))
            states |= self.chosen.states(item.label, known)
        else:
            for folder, known_set in zip(self.folders, self.sets, strict=True):
                if folder.folder in calls:
                    states = known_set.states(calls[folder.folder]) | states
        states |= self._by_hand(item, states, reader)
        numbers = by_name(item.properties.get("measurements"))
        metadata = by_name(item.properties.get("metadata"))
        score = numbers.get(SCORE)
        outlined = self.row.reader is not None and score is None and item.id in first.probabilities
        touched = reading is not None and item.id in reading.touched
        label = item.label
        values = first.probabilities.get(item.id)
        called = None if values is None else float(values.max())
        by_model = reader is None
        sets = first.columns.get("set", {}).get(item.id)
        unlike = first.columns.get("unlike_support", {}).get(item.id)
        others = [
            f"'{call}' by {f.model}" for f in self.folders[1:] if (call := calls.get(f.folder))
        ]
        return Glomerulus(
            slide=self.row.slide,
            item=item,
            glomerulus=first.glomeruli.get(item.id) or glomerulus_of(item),
            label=label,
            by=MODEL if reader is None else reader,
            probability=called if by_model else None,
            doubt=first.columns.get("doubt", {}).get(item.id) if by_model else None,
            confirmed=reader is not None or touched or outlined,
            finder_score=float(score) if isinstance(score, int | float) else None,
            finder=str(metadata[FINDER]) if FINDER in metadata else None,
            quality=self._quality(item, numbers, metadata),
            unlike_support=None if unlike is None or not by_model else unlike == "yes",
            classes=[part.strip() for part in str(sets).split(" or ")]
            if sets and by_model
            else None,
            states=states,
            calls=calls,
            notes=[f"Called {' and '.join(others)}."] if others and by_model else [],
        )

    def _ids(self, name: str) -> list[str]:
        """Id of an object of the first folder in each of them."""
        return [name, *(match.get(name, "") for match in self.matches)]

    def _by_hand(
        self, item: SlideObject, states: Mapping[str, State], reader: str | None
    ) -> dict[str, State]:
        """What ticks say, and what a lesion that is declared read says where it is not ticked."""
        marked = {lesion.key for lesion in self._ticks(item)}
        given = by_name(item.properties.get("metadata")).get(GIVEN)
        table_reader = self.row.reader
        by_finder = SCORE in by_name(item.properties.get("measurements"))
        # Nobody marked what a finder outlined, unless it was read.
        declares = (reader is not None or not by_finder) and (
            reader is None or table_reader is None or spelling(reader) == spelling(table_reader)
        )
        stated: dict[str, State] = dict.fromkeys(marked, PRESENT)
        if declares:
            by_class = self.chosen.states(str(given)) if reader is None and given else {}
            for lesion in self.declared:
                shown = lesion.key in marked or by_class.get(lesion.key) == PRESENT
                # Without a class from before the model may have repeated what the reader gave.
                may_be = states.get(lesion.key) == PRESENT and (reader is not None or not given)
                if shown or not may_be:
                    stated[lesion.key] = PRESENT if shown else ABSENT
        return stated

    def _ticks(self, item: SlideObject) -> list[Lesion]:
        """Lesions that are ticked on an object, the wider ones with them."""
        text = by_name(item.properties.get("metadata")).get(LESIONS, item.properties.get(LESIONS))
        lesions = []
        for part in _parts(text, item, self.row.slide, LESIONS):
            lesion = self._lesion(part, f"{LESIONS} of the object {item.id}")
            known = self.chosen.lesions.get(lesion.key, lesion)
            lesions += [known, *wider_lesions(lesion)]
        return lesions

    def _lesion(self, name: str, where: str) -> Lesion:
        """A lesion by a word that a reader wrote.

        Raises:
            GloVLMError: The word says that there is none.
        """
        lesion = lesion_of(name)
        if not is_lesion(lesion):
            raise GloVLMError(
                f"{self.row.slide}: '{name}' is no lesion ({where}): give it as the class of the "
                "object."
            )
        return lesion

    def _quality(
        self, item: SlideObject, numbers: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> list[str]:
        """What is wrong with an object's picture, by measurement, place and by hand."""
        text = metadata.get(QUALITY, item.properties.get(QUALITY))
        known = {spelling(name): name for name in QUALITIES}
        known |= {spelling(name): CUT for name in ("cut", "cut by border", *_CUT_NAMES)}
        wrong = {}
        for part in _parts(text, item, self.row.slide, QUALITY):
            if spelling(part) not in known:
                raise GloVLMError(
                    f"{self.row.slide}: the object {item.id} has the quality '{part}'; expected "
                    f"{', '.join(QUALITIES)}, separated by semicolons.{nearest(part, QUALITIES)}"
                )
            wrong[known[spelling(part)]] = True
        size = self.parts[0].entry.get("size")
        x0, y0, x1, y1 = item.bounds
        at_edge = size is not None and (x0 <= 0 or y0 <= 0 or x1 >= size[0] or y1 >= size[1])
        stated = any(
            str(source.get(name, "")).casefold() in ("1", "1.0", "true", "yes")
            for name in _CUT_NAMES
            for source in (item.properties, metadata)
        )
        if numbers.get(CUT_MEASURED) or at_edge or stated:
            wrong[CUT] = True
        return [name for name in QUALITIES if name in wrong]


def _parts(text: Any, item: SlideObject, slide: str, name: str) -> Iterable[str]:
    """Words of a text that semicolons separate."""
    if text is None:
        return []
    values = text if isinstance(text, list) else [text]
    if not all(isinstance(value, str) for value in values):
        raise GloVLMError(
            f"{slide}: expected words separated by semicolons in {name} of the object {item.id}, "
            f"found {type(text).__name__}."
        )
    return [part.strip() for value in values for part in value.split(";") if part.strip()]
