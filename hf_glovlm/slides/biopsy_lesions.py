"""Lesions of a biopsy: states of its glomeruli over sections, shares with their denominators."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.listing import few
from ..data.terminology import DeclaredSystem, Term, find_term, terms
from .counting import correct_share, wilson_interval
from .finder_recall import FinderRecall
from .lesions import (
    ABSENT,
    GLOBAL,
    KINDS,
    NOT_ASSESSABLE,
    NOT_READ,
    PRESENT,
    SCLEROTIC,
    ClassSet,
    Lesion,
    State,
    at_one_level,
    over_levels,
    why_unsuited,
    wider_lesions,
)
from .sections import MODEL, Glomerulus, ModelResults, Section

COUNTING, ERRORS, RECALL = (
    "counting", "the classifier's errors", "the finder's recall by class",
)  # fmt: skip
# Each detected glomerulus, the wrong ones too, stands for 1 / recall of them. Measured
# with a recall of a few per cent, the correction was off by 49 points (docs/sclerosis-results.md).
LEAST_RECALL = 0.5
_OXFORD_M = "mesangial hypercellularity (Oxford)"
_M_MICROMETRES = 3.0  # section on which Oxford's mesangial cells are counted


@dataclass(frozen=True, kw_only=True)
class Biopsy:
    """Biopsy: its sections, its glomeruli, and what they were read for.

    Attributes:
        case: Its name.
        stated: What the table of cases states of it.
        system: The class system that it is declared to be read by.
        sections: Those that are counted.
        lesions: That a class, a tick or the table names, by key.
        units: Its glomeruli, each as the sections show it.
        recall: Of the finder that was given.
    """

    case: str
    stated: Mapping[str, Any]
    system: DeclaredSystem | None
    sections: Sequence[Section]
    lesions: Mapping[str, Lesion]
    units: Sequence[Sequence[Glomerulus]]
    recall: FinderRecall | None = None

    @cached_property
    def keys(self) -> list[str]:
        """Lesions in the order of the sheet: global sclerosis, its kinds, then as the terms are."""
        order = [GLOBAL, *KINDS, *(term.name for term in terms())]
        known = [key for key in dict.fromkeys(order) if key in self.lesions or key == GLOBAL]
        return [*known, *sorted(key for key in self.lesions if key not in order)]

    def lesion(self, key: str) -> Lesion:
        """A lesion by its key; global sclerosis also where nothing tells of it."""
        return self.lesions.get(key) or Lesion(GLOBAL, GLOBAL, find_term(GLOBAL))

    @cached_property
    def unsuited(self) -> dict[str, str]:
        """Classes and lesions that are not shown, by name, and why."""
        reasons = {name: why for section in self.sections for name, why in section.unsuited.items()}
        for key in self.keys:
            if (why := why_unsuited(self.lesion(key))) is not None:  # ticked, or declared read
                reasons[self.lesion(key).name] = why
            if self.is_mesangial(key) and not any(map(self._suits_mesangium, self.sections)):
                reasons[self.lesion(key).name] = (
                    "Oxford's M is counted on PAS, on a section of stated thickness (about 3 µm): "
                    "state stain and section_um in the table of cases, or give a PAS section"
                )
        return reasons

    @cached_property
    def shown(self) -> list[str]:
        """Keys of the lesions that are shown."""
        return [key for key in self.keys if self.lesion(key).name not in self.unsuited]

    def letter_of(self, lesion: Lesion) -> str | None:
        """The letter of the declared system that a lesion is a part of."""
        for letter, words in (self.system.parts if self.system else {}).items():
            if lesion.key == letter.casefold() or (lesion.term and lesion.term.name in words):
                return str(letter)
        return None

    def is_mesangial(self, key: str) -> bool:
        """Whether a lesion is Oxford's mesangial hypercellularity."""
        lesion = self.lesion(key)
        by_letter = self.system is not None and self.system.name == "oxford"
        return key == _OXFORD_M or (by_letter and self.letter_of(lesion) == "M")

    @staticmethod
    def _suits_mesangium(section: Section) -> bool:
        return section.stain == "PAS" and section.row.section_um is not None

    def states_of(self, one: Glomerulus) -> dict[str, State]:
        """States of a glomerulus on one section, of every lesion."""
        section = next(each for each in self.sections if each.slide == one.slide)
        states: dict[str, State] = dict.fromkeys(self.keys, NOT_READ)
        states |= {key: state for key, state in one.states.items() if key in states}
        if not self._suits_mesangium(section):
            states |= {key: NOT_READ for key in self.keys if self.is_mesangial(key)}
        return at_one_level(states, spoiled=bool(one.quality))

    @cached_property
    def states(self) -> list[dict[str, State]]:
        """States of each glomerulus over its sections."""
        return [
            over_levels([self.states_of(one) for one in unit], self.keys) for unit in self.units
        ]

    @property
    def folders(self) -> list[ModelResults]:
        """Folders of results of its sections, each once."""
        every = [results for section in self.sections for results in section.results]
        return list({str(results.folder): results for results in every}.values())

    @property
    def by_finder(self) -> bool:
        """Whether a finder outlined some of its glomeruli."""
        return any(one.finder_score is not None for unit in self.units for one in unit)

    @property
    def all_read(self) -> bool:
        """Whether readers read all of its sections."""
        return all(section.all_read for section in self.sections)


def describe_lesions(
    biopsy: Biopsy,
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[str]]:
    """Lesions of a biopsy as its sheet holds them; what is not shown and why; notes.

    Args:
        biopsy: The biopsy.
    """
    lesions = [_describe(biopsy, biopsy.lesion(key)) for key in biopsy.shown]
    not_shown = [{"class": name, "why": why} for name, why in sorted(biopsy.unsuited.items())]
    notes = []
    if biopsy.system is not None:
        system = biopsy.system
        for name, why in system.never.items():
            shown = f"{system.title.split()[0]} {name}"
            not_shown.append({"class": shown, "why": str(why)})
        kidney = biopsy.stated.get("kidney")
        if system.name == "banff" and kidney == "native":
            notes.append("The system is banff, which is for transplants, and the kidney is native.")
        if system.name in ("oxford", "isn_rps") and kidney == "transplant":
            notes.append(f"The {system.title} is for native kidneys, and this is a transplant.")
    return lesions, not_shown, notes


def _describe(biopsy: Biopsy, lesion: Lesion) -> dict[str, Any]:
    """One lesion: its definition, counts, shares and what they do not hold."""
    term = lesion.term
    counted = Counter(states[lesion.key] for states in biopsy.states)
    counts: dict[str, int] = {
        name: counted[name] for name in (PRESENT, ABSENT, NOT_ASSESSABLE, NOT_READ)
    }
    role, heading = _role(biopsy, lesion)
    shares = _shares(biopsy, lesion, counts)
    corrected, why = _correct(biopsy, lesion, counts, shares)
    return {
        "class": lesion.name,
        "words": term.name if term else lesion.name,
        "definition": term.definition if term else None,
        "system": term.system if term else None,
        "source": term.source if term else None,
        "verified": bool(term and term.verified),
        "note": (term.note or None) if term else None,
        "role": role,
        "heading": heading,
        "counts": counts,
        "shares": shares,
        "corrected": corrected,
        "why_not_corrected": why,
        "notes": _notes(biopsy, lesion, counts),
    }


def _role(biopsy: Biopsy, lesion: Lesion) -> tuple[str, str | None]:
    system, letter = biopsy.system, biopsy.letter_of(lesion)
    if lesion.is_global:
        return "global sclerosis", None
    if system is None:
        return "lesion", None
    if system.name == "oxford" and letter is not None:
        return "candidate", f"candidate for Oxford {letter}, to be confirmed"
    if system.name == "isn_rps":
        return "component", "component of single glomeruli, never summed to a class or an index"
    if system.name == "banff" and letter is not None:
        return "component", "share of glomeruli with glomerulitis; no grade of g, and no cg"
    return "lesion", None


# ---------------------------------------------------------------------------------------- shares


def _shares(biopsy: Biopsy, lesion: Lesion, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Shares of a lesion: of what can be assessed, and of crescents also of all glomeruli."""
    present, known = counts[PRESENT], counts[PRESENT] + counts[ABSENT]
    complete = counts[NOT_READ] == 0
    if lesion.is_global:
        spoiled = counts[NOT_ASSESSABLE]
        of = "all glomeruli" if complete and not spoiled else "glomeruli assessable and read for it"
        whole = known + counts[NOT_READ] + spoiled
    else:
        of = "assessable glomeruli that are not globally sclerotic"
        unsure = sum(
            states[lesion.key] in (PRESENT, ABSENT) and states[GLOBAL] != ABSENT
            for states in biopsy.states
        )
        if unsure:
            of = f"assessable glomeruli, {unsure} of them not read for global sclerosis"
        if not complete:
            of += ", that were read for it"
        whole = known + counts[NOT_READ]
    shares = [_share(of, present, known, complete)]
    if lesion.is_crescent:
        sclerotic = sum(states[GLOBAL] == PRESENT for states in biopsy.states)
        every = "all glomeruli, globally sclerotic ones too"
        if counts[NOT_ASSESSABLE] > sclerotic:
            every = "all assessable glomeruli, and globally sclerotic ones"
        shares.append(_share(every, present, known + sclerotic, complete))
    if not complete and known and present:
        least = _share(of, present, whole, True)
        of = "glomeruli, read for it or not"
        if not lesion.is_global:
            of = "assessable glomeruli that are not globally sclerotic, read for it or not"
        shares.append(least | {"of": of, "ci95": None, "holds": [], "least": True})
    return shares


def _share(of: str, count: int, denominator: int, complete: bool) -> dict[str, Any]:
    """A share with Wilson's interval, in per cent; none where glomeruli were not read for it."""
    shown = complete and denominator > 0
    return {
        "of": of,
        "count": count,
        "denominator": denominator,
        "percent": 100 * count / denominator if shown else None,
        "ci95": [100 * bound for bound in wilson_interval(count, denominator)] if shown else None,
        "holds": [COUNTING] if shown else [],
        "least": False,
    }


def _notes(biopsy: Biopsy, lesion: Lesion, counts: Mapping[str, int]) -> list[str]:
    """Sentences on what the numbers of a lesion do not say."""
    notes = []
    term = lesion.term
    n = len(biopsy.units)
    present, known = counts[PRESENT], counts[PRESENT] + counts[ABSENT]
    if term is None:
        notes.append("The terminology lacks this class, so it is shown without a definition.")
    if lesion.key == GLOBAL and n and counts[NOT_READ] == n:
        notes.append("No class says which glomeruli are globally sclerotic.")
    elif counts[NOT_READ] and n:
        whole = known + counts[NOT_READ]
        notes.append(
            f"{glomeruli(counts[NOT_READ])} had a class that says nothing of it, so it has no "
            f"percentage: between {present} and {present + counts[NOT_READ]} of {whole} have it."
        )
    sclerotic = sum(states[GLOBAL] == PRESENT for states in biopsy.states)
    spoiled = counts[NOT_ASSESSABLE] - (0 if lesion.is_global else sclerotic)
    if sclerotic and not lesion.is_global and counts[NOT_ASSESSABLE]:
        notes.append(f"Not assessable in the {sclerotic} globally sclerotic ones.")
    if spoiled:
        least = 100 * present / (known + spoiled)
        notes.append(
            f"{glomeruli(spoiled)} cut, folded, blurred or of a wrong stain show none, which does "
            "not count as absent; where such ones show it they count, so the share leans upwards: "
            f"{least:.0f}% if these have none."
        )
    if lesion.key == SCLEROTIC:
        notes.append(
            "The class does not say whether the whole tuft is sclerosed, so it does not count as "
            "global sclerosis."
        )
    notes += _system_notes(biopsy, term)
    notes += _stain_notes(biopsy, lesion)
    notes += _kind_notes(biopsy, lesion, present)
    return notes


def glomeruli(n: int) -> str:
    """Such as `1 glomerulus`."""
    return f"{n} glomerul{'us' if n == 1 else 'i'}"


def _system_notes(biopsy: Biopsy, term: Term | None) -> list[str]:
    """A note where a term is of another class system than the declared one."""
    if term is None or biopsy.system is None:
        return []
    if term.system in ("general", "RPS consensus", *biopsy.system.terms):
        return []
    return [
        f"The class is of {term.system}, and the declared system is {biopsy.system.name}: it is "
        "shown by its own definition."
    ]


def _stain_notes(biopsy: Biopsy, lesion: Lesion) -> list[str]:
    """Notes on stains that are not known to show a lesion, and on Oxford's thickness."""
    notes = []
    term = lesion.term
    if term is not None and term.stains:
        stains = {section.stain for section in biopsy.sections}
        unknown = sorted(s for s in stains if s is not None and s not in term.stains)
        if unknown:
            notes.append(
                f"{few(unknown)} is not known to show it; the terminology names "
                f"{' and '.join(term.stains)}."
            )
    if biopsy.is_mesangial(lesion.key):
        odd = [
            f"{section.slide} ({section.row.section_um:g} µm)"
            for section in biopsy.sections
            if section.row.section_um not in (None, _M_MICROMETRES)
        ]
        if odd:
            notes.append(f"The cut-off is for sections of 3 µm, and these are not: {few(odd)}.")
    return notes


def _kind_notes(biopsy: Biopsy, lesion: Lesion, present: int) -> list[str]:
    """How many of a lesion are of which kind."""
    kinds = [
        other
        for other in (biopsy.lesion(key) for key in biopsy.keys)
        if lesion.key in {wider.key for wider in wider_lesions(other)}
    ]
    if kinds and present:
        of = {k.name: sum(s[k.key] == PRESENT for s in biopsy.states) for k in kinds}
        listed = ", ".join(f"{count} {name}" for name, count in of.items() if count)
        return [f"Kinds: {listed}."] if listed else []
    if lesion.is_crescent and not wider_lesions(lesion) and present:
        return ["The kind (cellular, fibrocellular, fibrous) is not stated."]
    return []


# ------------------------------------------------------------------------------------- corrected


def _correct(
    biopsy: Biopsy,
    lesion: Lesion,
    counts: Mapping[str, int],
    shares: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any] | None, str | None]:
    """Percentage corrected for the model's errors and what the finder missed; or why it is not."""
    if not biopsy.units:
        return None, "there is no glomerulus"
    if counts[NOT_READ]:
        return None, "some glomeruli were not read for it"
    if biopsy.all_read:
        return None, "a reader read all of it; the interval holds no reader's error"
    if any(len(unit) > 1 for unit in biopsy.units):
        return None, (
            "sections were joined, and errors over several of them are not those that were measured"
        )
    ones = [unit[0] for unit in biopsy.units if not unit[0].quality]
    if not ones:
        return None, "every glomerulus is cut, folded, blurred or of a wrong stain"
    by_model = {one.by == MODEL for one in ones}
    if len(by_model) > 1:
        return None, (
            "some glomeruli have a class that a reader gave and the others the model's, and those "
            "that were left are no random ones"
        )
    recall, missing = _recall_of(biopsy, ones)
    if by_model == {True}:
        return _correct_calls(biopsy, lesion, ones, recall, missing)
    if recall is None:
        return None, missing or "a reader gave the classes; the interval holds no reader's error"
    names = list(dict.fromkeys(str(one.label) for one in ones))
    sets = [section.reading.classes for section in biopsy.sections if section.reading is not None]
    chosen = ClassSet(list(dict.fromkeys(name for each in sets for name in each)))
    calls = Counter(str(one.label) for one in ones)
    return _apply(biopsy, lesion, names, chosen, calls, None, recall, len(ones))


def _correct_calls(
    biopsy: Biopsy,
    lesion: Lesion,
    ones: Sequence[Glomerulus],
    recall: FinderRecall | None,
    missing: str | None,
) -> tuple[dict[str, Any] | None, str | None]:
    """As `_correct`, where the model's calls alone were used."""
    folder = next((f for f in biopsy.folders if lesion.key in f.classes.lesions), None)
    if folder is None:
        return None, "no model calls it"
    if any(
        state != folder.classes.states(one.calls.get(folder.folder)).get(lesion.key, state)
        for one in ones
        if (state := one.states.get(lesion.key)) is not None
    ):
        return None, "some of it was ticked by hand, and not called by the model"
    confusion = (folder.content.get("model") or {}).get("confusion")
    if confusion is None:
        return (
            None,
            "the classifier's errors are not known: no confusion matrix was measured with it",
        )
    calls = Counter(one.calls[folder.folder] for one in ones)
    names = list(folder.classes.names)
    result, why = _apply(biopsy, lesion, names, folder.classes, calls, confusion, recall, len(ones))
    if result is not None and missing is not None:
        result["holds"].append(f"not: {missing}")
    return result, why


def _apply(
    biopsy: Biopsy,
    lesion: Lesion,
    names: Sequence[str],
    classes: ClassSet,
    calls: Mapping[str, int],
    confusion: Any,
    recall: FinderRecall | None,
    n: int,
) -> tuple[dict[str, Any] | None, str | None]:
    groups = []
    for name in names:
        states: dict[str, State] = dict.fromkeys(biopsy.keys, NOT_READ)
        state = at_one_level(states | classes.states(name))[lesion.key]
        if not classes.is_glomerulus(name) or name in classes.unsuited:
            state = NOT_ASSESSABLE
        if state == NOT_READ:
            return None, f"the class {name} says nothing of it"
        groups.append({PRESENT: 1, ABSENT: 0}.get(state, -1))
    if 1 not in groups or 0 not in groups:
        return None, "no two classes tell it from the others"
    counted = [calls.get(name, 0) for name in names]
    if not sum(c for c, group in zip(counted, groups, strict=True) if group >= 0):
        return None, "no glomerulus can be assessed for it"
    thinned: tuple[Any, Any] | None = None
    holds = [COUNTING, *([ERRORS] if confusion is not None else [])]
    if recall is not None:
        inside = [name for name, group in zip(names, groups, strict=True) if group >= 0]
        known, unmeasured = recall.of_classes(inside)
        if known is None:
            return None, f"the finder's recall of {few(unmeasured)} was not measured"
        weak = [
            f"{hits} of {of} {name}"
            for name, hits, of in zip(inside, *known, strict=True)
            if hits < LEAST_RECALL * of
        ]
        if weak:
            return None, (
                f"the finder detected {few(weak)} where these were left out: what it detects says "
                "next to nothing of how many there are"
            )
        place = {name: i for i, name in enumerate(inside)}
        hits, of = (
            np.array([part[place[name]] if name in place else 0 for name in names])
            for part in known
        )
        thinned = hits, of
        holds.append(RECALL)
    result, why = correct_share(counted, names, groups, confusion, recall=thinned)
    if result is None:
        return None, why
    what = "all glomeruli" if lesion.is_global else "glomeruli that are not globally sclerotic"
    if n < len(biopsy.units):
        what += f", estimated from the {n} that are not cut, folded, blurred or of a wrong stain"
    return result | {"holds": holds, "of": what}, None


def _recall_of(
    biopsy: Biopsy, ones: Iterable[Glomerulus]
) -> tuple[FinderRecall | None, str | None]:
    """The finder's recall where it applies to every glomerulus; else why it is not held."""
    made = [one.finder_score is not None for one in ones]
    if not any(made):
        return None, None
    if not all(made):
        return None, "the finder's recall, as some outlines are not the finder's"
    if biopsy.recall is None:
        return None, "the finder's recall, which was not given (--finder)"
    return biopsy.recall, None
