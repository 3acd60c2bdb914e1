"""Lesions of a glomerulus by its class: each is present, absent, not assessable, or not read.

A class of a classifier with one class for each glomerulus names what it saw first: that one is
called a crescent does not say that it has no segmental sclerosis. So a class says of a lesion only
what its words and the set that it was chosen from say, and the rest is not read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ..data.terminology import Term, find_term, match_key
from ..errors import GloVLMError

State = Literal["present", "absent", "not_assessable", "not_read"]
States = Mapping[str, State]  # by the key of a lesion; what is not there is not read
PRESENT: State = "present"
ABSENT: State = "absent"
NOT_ASSESSABLE: State = "not_assessable"
NOT_READ: State = "not_read"

GLOBAL, SCLEROTIC, CRESCENT = "global sclerosis", "sclerotic glomerulus", "crescent"
KINDS = ("obsolescent glomerulus", "solidified glomerulus", "disappearing glomerulus")
_NORMAL, _NON_SCLEROTIC, _NO_GLOMERULUS = (
    "viable glomerulus", "non-sclerotic glomerulus", "non-glomerular tissue",
)  # fmt: skip
_CRESCENTS = ("cellular crescent", "fibrocellular crescent", "fibrous crescent")
# The other class of two, where it says no more than that it is not the first.
_REST = frozenset(
    {"absent", "neg", "negative", "no", "no lesion", "none", "other", "others", "rest"}
)
# Letters and words of what no glomerulus shows; the grades T0 to T2 are terms.
_OUTSIDE = {
    "t": "tubules", "tubular atrophy": "tubules", "tubulitis": "tubules", "ct": "tubules",
    "i": "interstitium", "ci": "interstitium", "ti": "interstitium", "ifta": "interstitium",
    "interstitial fibrosis": "interstitium", "interstitial inflammation": "interstitium",
    "ptc": "peritubular capillaries", "peritubular capillaritis": "peritubular capillaries",
}  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """Lesion that some class names.

    Attributes:
        key: The same for all spellings of it.
        name: As the class is written, or as the term is where no class names it alone.
        term: Its entry in the terminology, `None` of a word that it lacks.
    """

    key: str
    name: str
    term: Term | None

    @property
    def is_global(self) -> bool:
        """Whether it is global sclerosis or a kind of it."""
        return self.key == GLOBAL or self.key in KINDS

    @property
    def is_crescent(self) -> bool:
        """Whether it is a crescent of any kind, in any class system."""
        return self.term is not None and _plain(self.term) in (CRESCENT, *_CRESCENTS)


def lesion_of(name: str) -> Lesion:
    """Lesion by the name of a class; `crescent: cellular` is a cellular crescent.

    Args:
        name: As written.
    """
    base, colon, kind = (part.strip() for part in name.partition(":"))
    # "sclerosis, global" and the like say by their words that all of the tuft is meant.
    words = match_key(name).split()
    sclerotic = any(word.startswith("scler") or word.endswith("sclerosis") for word in words)
    whole = not {"global", "globally"}.isdisjoint(words)
    if sclerotic and whole and {"non", "no", "not", "segmental", "without"}.isdisjoint(words):
        return Lesion(GLOBAL, name, find_term(GLOBAL))
    tried = [name] if not colon else [f"{kind} {base}", f"{base} {kind}"]
    term = next(filter(None, map(_term, tried)), None)
    if term is not None:
        return Lesion(term.name, name, term)
    key = f"{lesion_of(base).key}: {match_key(kind)}" if colon and kind else match_key(name)
    return Lesion(key, name, None)


def wider_lesions(lesion: Lesion) -> list[Lesion]:
    """What is present, too, where a lesion is: the lesion that it is a kind of.

    Args:
        lesion: Such as a cellular crescent, which is a crescent.
    """
    if lesion.key in KINDS:
        return [_named(GLOBAL)]
    if lesion.term is not None and _plain(lesion.term) in _CRESCENTS:
        return [_named(lesion.term.name.replace(_plain(lesion.term), CRESCENT, 1))]
    base, colon, _ = lesion.name.partition(":")
    if colon and lesion.term is None and base.strip():
        return [lesion_of(base.strip())]
    return []


def why_unsuited(lesion: Lesion) -> str | None:
    """Why a glomerulus cannot show what a word names; `None` where it can.

    Args:
        lesion: By the word.
    """
    if lesion.key in _OUTSIDE:
        return f"it is of the {_OUTSIDE[lesion.key]}, not of a glomerulus"
    if lesion.term is None or lesion.term.promptable:
        return None
    if lesion.term.em_only:
        return "only electron microscopy shows it"
    return "it is a label of a whole biopsy, and no class of a glomerulus"


def is_lesion(lesion: Lesion) -> bool:
    """Whether a word names a lesion, and not that there is none, or no glomerulus."""
    return lesion.key not in (_NORMAL, _NON_SCLEROTIC, _NO_GLOMERULUS)


@dataclass(frozen=True)
class ClassSet:
    """Classes of which each glomerulus is given one, and what each says of lesions.

    Attributes:
        names: The classes.
    """

    names: Sequence[str]
    _roles: dict[str, tuple[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_roles", {name: self._role(name) for name in self.names})

    def _role(self, name: str) -> tuple[str, str]:
        """What a class is (normal, lesion, not, nothing, unsuited), and of which lesion."""
        lesion = lesion_of(name)
        if lesion.key == _NORMAL:
            return "normal", ""
        if lesion.key == _NO_GLOMERULUS:
            return "nothing", ""
        if lesion.key == _NON_SCLEROTIC:
            others = {lesion_of(other).key for other in self.names}
            only = GLOBAL if GLOBAL in others and SCLEROTIC not in others else SCLEROTIC
            return "not", only
        if why_unsuited(lesion) is not None:
            return "unsuited", lesion.key
        if (denied := self._denied(name)) is not None:
            return "not", denied
        return "lesion", lesion.key

    def _denied(self, name: str) -> str | None:
        """The lesion that a class says is not there: `no crescent` beside `crescent`."""
        key = match_key(name)
        others = {match_key(other): lesion_of(other) for other in self.names if other != name}
        shown = re.fullmatch(r"(?:non|no|not|without)\s*(.+)", key)
        behind = re.fullmatch(r"(.+?) (?:absent|neg|negative)", key)
        for match in filter(None, (shown, behind)):
            meant = lesion_of(match[1])
            known = {lesion.key for lesion in others.values()}
            if meant.key in known or meant.term is not None:
                return meant.key
        if len(others) == 1 and key in _REST:
            (other,) = others.values()
            return None if other.key == _NORMAL else other.key
        return None

    @cached_property
    def lesions(self) -> dict[str, Lesion]:
        """Lesions that its classes tell of, by key, the wider ones with them."""
        table: dict[str, Lesion] = {}
        for name, (role, key) in self._roles.items():
            if role == "lesion":
                table.setdefault(key, lesion_of(name))
        for role, key in self._roles.values():
            if role == "not":
                table.setdefault(key, _named(key))
        for lesion in [*table.values()]:
            for wider in wider_lesions(lesion):
                table.setdefault(wider.key, wider)
        return table

    @cached_property
    def tells_global(self) -> bool:
        """Whether a class that is not global sclerosis says that there is none."""
        keys = {key for role, key in self._roles.values() if role == "lesion"}
        return GLOBAL in keys or keys.issuperset(KINDS)

    def is_glomerulus(self, name: str | None) -> bool:
        """Whether a class is of a glomerulus, and not of tissue without one."""
        return name is None or self._roles.get(name, ("", ""))[0] != "nothing"

    @cached_property
    def unsuited(self) -> dict[str, str]:
        """Classes that no glomerulus can have, and why."""
        reasons = {name: why_unsuited(lesion_of(name)) for name in self.names}
        return {name: why for name, why in reasons.items() if why is not None}

    def states(self, name: str | None, others: Iterable[str] = ()) -> dict[str, State]:
        """What one of the classes says of lesions, by key; what is not there is not read.

        Args:
            name: The class; `None` of a glomerulus without.
            others: Keys of lesions beyond those of the set that who chose the class knows.
        """
        role, key = self._roles.get(name or "", ("", ""))
        if role == "normal":
            return dict.fromkeys((GLOBAL, *self.lesions, *others), ABSENT)
        states: dict[str, State] = {}
        if role == "not":
            states |= dict.fromkeys((key, *self._kinds_of(key)), ABSENT)
        elif role == "lesion":
            states[key] = PRESENT
            states |= {wider.key: PRESENT for wider in wider_lesions(self.lesions[key])}
            if key in KINDS:  # one of several kinds is chosen
                states |= {kind: ABSENT for kind in KINDS if kind in self.lesions and kind != key}
        if role in ("lesion", "not") and self.tells_global and states.get(GLOBAL) != PRESENT:
            states |= {k: ABSENT for k in (GLOBAL, *KINDS) if k == GLOBAL or k in self.lesions}
        return states

    def over_sections(self, called: Sequence[str]) -> list[str]:
        """Classes in which a glomerulus counts that several sections show.

        Global sclerosis where every section is called so; else each lesion that some section shows,
        and without one the class of a section that is not globally sclerotic.

        Args:
            called: The class on each section.
        """
        distinct = [name for name in self.names if name in called]
        others = [name for name in distinct if not lesion_of(name).is_global]
        if not others:
            return distinct
        for role in ("lesion", "normal", "not"):
            of_role = [name for name in others if self._roles[name][0] == role]
            if of_role:
                return of_role if role == "lesion" else of_role[:1]
        return others[:1]

    def _kinds_of(self, key: str) -> list[str]:
        """Lesions of the set that are kinds of another one."""
        return [
            lesion.key
            for lesion in self.lesions.values()
            if key in {wider.key for wider in wider_lesions(lesion)}
        ]


# -------------------------------------------------------------------------------- putting together


def at_one_level(states: States, *, spoiled: bool = False) -> dict[str, State]:
    """States of a glomerulus on one section, by the rules that hold for every lesion.

    In a globally sclerotic one every other lesion is not assessable; in one that is cut, folded,
    blurred or of a wrong stain what is present counts, and what is absent is not assessable.

    Args:
        states: By key, as classes and readers say.
        spoiled: Whether it is cut, folded, blurred or of a wrong stain.
    """
    ruled = dict(states)
    if ruled.get(GLOBAL) == PRESENT:
        ruled = {k: v if k == GLOBAL or k in KINDS else NOT_ASSESSABLE for k, v in ruled.items()}
    if spoiled:
        ruled = {k: NOT_ASSESSABLE if v == ABSENT else v for k, v in ruled.items()}
    return ruled


def over_levels(levels: Sequence[States], lesions: Iterable[str]) -> dict[str, State]:
    """States of a glomerulus that several sections show.

    A focal lesion is present where any level shows it. Global sclerosis is present where every
    level that was read for it shows it, and none shows another lesion.

    Args:
        levels: States on each section, as `at_one_level` gives them.
        lesions: Keys to tell of.
    """
    keys = [*lesions]
    merged: dict[str, State] = {}
    focal = any(
        state == PRESENT
        for level in levels
        for key, state in level.items()
        if key != GLOBAL and key not in KINDS
    )
    for key in keys:
        values = [level.get(key, NOT_READ) for level in levels]
        known = [value for value in values if value != NOT_READ]
        if key == GLOBAL or key in KINDS:
            merged[key] = _everywhere(known, focal)
        else:
            merged[key] = _anywhere(known)
    if merged.get(GLOBAL) == PRESENT:
        return at_one_level(dict.fromkeys(keys, NOT_READ) | merged)
    if merged.get(GLOBAL) == ABSENT:
        merged |= {kind: ABSENT for kind in KINDS if kind in merged}
    return merged


def _everywhere(known: Sequence[State], focal: bool) -> State:
    if not known:
        return NOT_READ
    if ABSENT in known:
        return ABSENT
    if NOT_ASSESSABLE in known:
        return NOT_ASSESSABLE
    return NOT_READ if focal else PRESENT


def _anywhere(known: Sequence[State]) -> State:
    for state in (PRESENT, ABSENT, NOT_ASSESSABLE):
        if state in known:
            return state
    return NOT_READ


def _term(name: str) -> Term | None:
    try:
        return find_term(name)
    except GloVLMError:
        return None


def _plain(term: Term) -> str:
    """Name of a term without the bracket that keeps two class systems apart."""
    return re.sub(r"\s*\([^)]*\)$", "", term.name)


def _named(key: str) -> Lesion:
    """Lesion by its key, where no class names it."""
    return Lesion(key, key, _term(key))
