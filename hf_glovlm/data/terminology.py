"""Terminology of glomerular lesions: definitions, class systems, stains, and prompts.

The terms are in `terminology.yaml`; this module reads them strictly and makes prompts of them. Two
rules hold for every prompt: it names nothing that only electron microscopy or a whole biopsy can
show, and no stain that does not show the lesion.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import GloVLMError, nearest
from ..settings import from_mapping, read_yaml

logger = logging.getLogger("hf_glovlm")
_FILE = Path(__file__).with_name("terminology.yaml")
T = TypeVar("T")


# ------------------------------------------------------------------------------------- terms


@dataclass(frozen=True, kw_only=True)
class Term:
    """One entry of the terminology.

    Attributes:
        name: Unique; a bracket at its end keeps two class systems apart and is not in prompts.
        definition: One line.
        system: The class system whose cut-offs the definition follows.
        stains: Canonical stain names in which, by a source, the lesion shows.
        verified: False for domain knowledge not checked against a source; `describe` shows it.
        source: Where the definition comes from.
        synonyms: In prompts beside the name.
        aliases: Accepted by `find_term`, never in prompts.
        level: `crop` (one glomerulus can show it) or `biopsy` (a label of the whole biopsy).
        seen_in: Of a `crop`, the outermost place that a picture must show for it: the `tuft`, the
            `capsule` (Bowman's space and capsule), `around` (outside of the capsule) or `anywhere`.
        em_only: Only electron microscopy shows it.
        note: A trap, if there is one.
    """

    name: str
    definition: str
    system: str
    stains: tuple[str, ...]
    verified: bool
    source: str
    synonyms: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    level: Literal["crop", "biopsy"] = "crop"
    seen_in: Literal["tuft", "capsule", "around", "anywhere"] = "anywhere"
    em_only: bool = False
    note: str = ""

    @property
    def promptable(self) -> bool:
        """Whether a crop seen by light microscopy can show it, so that a prompt may name it."""
        return self.level == "crop" and not self.em_only

    @property
    def phrases(self) -> tuple[str, ...]:
        """Phrases for the term in a prompt, the name first, without brackets."""
        words = (re.sub(r"\s*\([^)]*\)$", "", word) for word in (self.name, *self.synonyms))
        return tuple(dict.fromkeys(_phrase(word) for word in words))

    def describe(self) -> str:
        """One line for a table or a card; it ends in UNVERIFIED where no source was checked."""
        sure = "" if self.verified else " UNVERIFIED."
        # The source contains the mark too (see `read_terminology`): printed once, at the end.
        clauses = re.split(r"(?<=[,;:.])\s+", self.source)
        source = " ".join(part for part in clauses if "unverified" not in part.casefold())
        facts = "; ".join(part for part in (self.system, source.rstrip(",;:. ")) if part)
        return f"{self.name}: {self.definition} [{facts}.{sure}]"


@dataclass(frozen=True, kw_only=True)
class _Stain:
    phrase: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Adequacy:
    """Adequacy rule: a verdict on a biopsy, and the least numbers that it asks for.

    Attributes:
        verdict: `adequate` or `minimal`; a biopsy that meets no rule is unsatisfactory.
        glomeruli: At least so many.
        arteries: At least so many; 0 where arteries do not matter.
    """

    verdict: Literal["adequate", "minimal"]
    glomeruli: int
    arteries: int

    @property
    def words(self) -> str:
        """Such as `at least 10 glomeruli and 2 arteries`."""
        arteries = f" and {self.arteries} arter{'y' if self.arteries == 1 else 'ies'}"
        return f"at least {self.glomeruli} glomeruli{arteries if self.arteries else ''}"


@dataclass(frozen=True, kw_only=True)
class DeclaredSystem:
    """Class system that a biopsy is declared to be read by.

    Attributes:
        name: As a table of cases writes it.
        title: In words.
        terms: Which systems of the terms are its own.
        adequacy: Rules, the best verdict first.
        source: Where the rules come from.
        verified: False for rules that are recalled and not checked.
        parts: Terms whose lesion of single glomeruli each of its letters is made of.
        never: What it grades and no glomerulus can show, and why.
    """

    name: str
    title: str
    terms: tuple[str, ...]
    adequacy: tuple[Adequacy, ...]
    source: str
    verified: bool
    parts: dict[str, Any] = field(default_factory=dict)
    never: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Top:
    stains: dict[str, Any]
    templates: tuple[str, ...]
    systems: dict[str, Any]
    declared: list[Any]
    terms: list[Any]


@dataclass(frozen=True)
class Terminology:
    """Parsed terminology, with look-up tables of terms and stains by any of their names."""

    terms: tuple[Term, ...]
    by_key: Mapping[str, Term]
    stains: Mapping[str, _Stain]
    stain_by_key: Mapping[str, str]
    templates: tuple[str, ...]
    declared: Mapping[str, DeclaredSystem]


def match_key(name: str) -> str:
    """Normalised class name: equal for spellings that differ in case, `_`, `-` or plural.

    Example:
        >>> match_key("Global_Glomerulosclerosis"), match_key("Viable Glomeruli")
        ('global glomerulosclerosis', 'viable glomerulus')
    """
    words = re.sub(r"[\W_]+", " ", name.casefold()).split()
    return " ".join("glomerulus" if word == "glomeruli" else word for word in words)


def terms() -> list[Term]:
    """All terms, in the order of the file."""
    return list(_terminology().terms)


def find_term(name: str) -> Term:
    """Look up a term by name, synonym or alias; case, hyphens and underscores do not matter.

    A word that several class systems define gives the entry of the RPS consensus or, without one,
    needs its system: `"mesangial hypercellularity (Oxford)"`.

    Raises:
        GloVLMError: No such term; names the nearest.
    """
    table = _terminology()
    key = match_key(name)
    if key not in table.by_key:
        known = [word for t in table.terms for word in (t.name, *t.synonyms, *t.aliases)]
        raise GloVLMError(
            f"The terminology has no term '{name}'.{nearest(name, known)} "
            "Give the class its own prompts in classes.yaml if it is not a glomerular lesion."
        )
    return table.by_key[key]


def find_stain(name: str) -> str:
    """Canonical name of a stain: `HE` -> `H&E`, `Jones` -> `silver`.

    Raises:
        GloVLMError: No such stain; names the nearest and lists all.
    """
    table = _terminology()
    key = match_key(name)
    if key not in table.stain_by_key:
        known = [*table.stains, *(alias for s in table.stains.values() for alias in s.aliases)]
        raise GloVLMError(
            f"Unknown stain '{name}'.{nearest(name, known)} Stains: {', '.join(table.stains)}."
        )
    return table.stain_by_key[key]


def stain_names() -> Mapping[str, str]:
    """Canonical name of every stain by the `match_key` of each of its names."""
    return _terminology().stain_by_key


def declared_system(name: str) -> DeclaredSystem:
    """Class system by the name that a table of cases declares: `oxford`, `isn_rps` or `banff`.

    Raises:
        GloVLMError: No such system; names the nearest.
    """
    known = _terminology().declared
    if name not in known:
        raise GloVLMError(
            f"Unknown class system '{name}'; expected one of {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    return known[name]


def prompts_for(term: str | Term, stain: str | None = None) -> list[str]:
    """Prompts for a lesion: every template with the name and each synonym.

    A stain that is not known to show the lesion is left out of the prompts, with a warning: the
    prompt then asserts nothing that the image could not show. When several classes are compared,
    use `load_classes(..., prompts="terminology", stain=...)`, which names the stain for all
    classes or for none, so that the stain's words favour no class.

    Args:
        term: A `Term`, or a name as `find_term` takes it.
        stain: For example `PAS`, `HE`, `Jones silver`; None for prompts without a stain.

    Returns:
        At least one prompt, without duplicates.

    Raises:
        GloVLMError: Unknown term or stain, or a term that no crop can show (electron microscopy
            only, or a label of a whole biopsy).
    """
    table = _terminology()
    entry = find_term(term) if isinstance(term, str) else term
    if not entry.promptable:
        why = (
            "only electron microscopy shows it"
            if entry.em_only
            else f"it is a label of a whole biopsy ({entry.system})"
        )
        raise GloVLMError(
            f"'{entry.name}' cannot be a class of single light-microscopy crops: {why}; "
            "label the crops by the lesion that each of them shows."
        )
    ending = ""
    if stain is not None:
        canonical = find_stain(stain)
        if canonical in entry.stains:
            ending = f", {table.stains[canonical].phrase}"
        else:
            logger.warning(
                "%s is not known to show '%s': its prompts do not name the stain.",
                canonical,
                entry.name,
            )
    return [
        template.format(phrase) + ending for phrase in entry.phrases for template in table.templates
    ]


def described_prompts(term: str | Term) -> list[str]:
    """Prompts for a lesion, first plain, then with its definition.

    Templates x names, without and with the definition up to its first semicolon: what follows is
    about the use of the word, not about an image. They name no stain.

    Args:
        term: A `Term`, or a name as `find_term` takes it.

    Returns:
        An even number of prompts, without duplicates.

    Raises:
        GloVLMError: As `prompts_for`.
    """
    entry = find_term(term) if isinstance(term, str) else term
    plain = prompts_for(entry)
    look = entry.definition.split(";")[0].rstrip(".")
    return [*plain, *(f"{prompt}: {look[0].lower()}{look[1:]}" for prompt in plain)]


def terms_of(classes: Iterable[Iterable[str]]) -> list[Term | None]:
    """Terms for the classes of a task.

    Args:
        classes: For each class its names; the first one in the terminology counts.

    Returns:
        For each class its term; `None` where there is none, a crop cannot show it, or another
        class has the same one, so that prompts could not distinguish the two.
    """
    known = _terminology().by_key
    matches = [
        next((known[match_key(name)] for name in names if match_key(name) in known), None)
        for names in classes
    ]
    alone = {term for term, times in Counter(matches).items() if times == 1}
    return [
        term if term in alone and term is not None and term.promptable else None for term in matches
    ]


def _phrase(word: str) -> str:
    """`viable glomerulus` -> `a viable glomerulus`; `spikes` -> `a glomerulus with spikes`."""
    if word.endswith("tissue"):
        return word
    if word.endswith("glomerulus"):
        return ("an " if word[0].lower() in "aeiou" else "a ") + word
    return f"a glomerulus with {word}"


@lru_cache(maxsize=1)
def _terminology() -> Terminology:
    return read_terminology(_FILE)


def read_terminology(path: Path) -> Terminology:
    """Read a terminology file, strictly.

    Raises:
        GloVLMError: Names the file, the term and the key that is unknown, missing or wrong.
    """
    file = path.name
    top = from_mapping(_Top, read_yaml(path), file)
    for template in top.templates:
        if template.count("{}") != 1:
            raise GloVLMError(f"{file}: the template '{template}' must hold {{}} once.")
    stains = {
        name: from_mapping(_Stain, value, f"{file}: stain '{name}'")
        for name, value in top.stains.items()
    }
    entries = []
    for i, item in enumerate(top.terms):
        title = item.get("name", i + 1) if isinstance(item, dict) else i + 1
        where = f"{file}: term '{title}'"
        term = from_mapping(Term, item, where)
        _check_known(term.system, top.systems, f"{where}: 'system'")
        for stain in term.stains:
            _check_known(stain, stains, f"{where}: 'stains'")
        if term.em_only and term.stains:
            raise GloVLMError(f"{where}: 'em_only' and 'stains' exclude each other.")
        if (term.level == "crop") != ("seen_in" in item):
            raise GloVLMError(
                f"{where}: 'seen_in' (tuft, capsule, around or anywhere) must be there if, and "
                "only if, 'level' is crop."
            )
        if term.verified == ("unverified" in term.source):
            raise GloVLMError(
                f"{where}: 'source' must contain unverified if, and only if, 'verified' is false."
            )
        entries.append(term)
    return Terminology(
        terms=tuple(entries),
        by_key=_unique(
            ((word, t) for t in entries for word in (t.name, *t.synonyms, *t.aliases)), file
        ),
        stains=stains,
        stain_by_key=_unique(
            ((word, name) for name, s in stains.items() for word in (name, *s.aliases)), file
        ),
        templates=top.templates,
        declared={
            one.name: one for one in (_declared(item, top, entries, file) for item in top.declared)
        },
    )


def _declared(raw: Any, top: _Top, entries: Iterable[Term], file: str) -> DeclaredSystem:
    """One of the declared systems, all that it names checked."""
    where = f"{file}: declared '{raw.get('name') if isinstance(raw, dict) else raw}'"
    rules = raw.get("adequacy") if isinstance(raw, dict) else None
    listed = rules if isinstance(rules, list) else []
    parsed = tuple(from_mapping(Adequacy, rule, f"{where}: 'adequacy'") for rule in listed)
    given = {**raw, "adequacy": parsed} if isinstance(raw, dict) else raw
    system = from_mapping(DeclaredSystem, given, where)
    for name in system.terms:
        _check_known(name, top.systems, f"{where}: 'terms'")
    names = [term.name for term in entries]
    for letter, words in system.parts.items():
        for word in words if isinstance(words, list) else [words]:
            _check_known(word, names, f"{where}: '{letter}'")
    if [*parsed] != sorted(parsed, key=lambda rule: (-rule.glomeruli, -rule.arteries)):
        raise GloVLMError(f"{where}: 'adequacy' must begin with the rule that asks for most.")
    if system.verified == ("unverified" in system.source):
        raise GloVLMError(
            f"{where}: 'source' must contain unverified if, and only if, 'verified' is false."
        )
    return system


def _check_known(name: str, known: Iterable[str], where: str) -> None:
    names = list(known)
    if name not in names:
        raise GloVLMError(f"{where}: unknown '{name}'.{nearest(name, names)}")


def _unique(pairs: Iterable[tuple[str, T]], file: str) -> dict[str, T]:
    table: dict[str, T] = {}
    for word, value in pairs:
        if match_key(word) in table:
            raise GloVLMError(f"{file}: '{word}' stands for two entries; a word names only one.")
        table[match_key(word)] = value
    return table
