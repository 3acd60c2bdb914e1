"""Stain of an image: from a column or the user; a file's name contradicts them, and never decides.

Names of stains are the terminology's (`HE` is `H&E`, `PASM` is `silver`, `Masson` is `trichrome`);
a stain that it does not know keeps its own.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..tables import normal_text, spelling
from .folder import column
from .groups import in_quotes
from .terminology import match_key, stain_names

if TYPE_CHECKING:
    from datasets import Dataset

STAIN = "stain"  # the column
_NO_VALUE = frozenset({"", "-", "na", "n/a", "nan", "none", "null", "unknown"})
_WORDS = 4  # of the longest name of a stain


@lru_cache(2**12)
def name_stain(text: str | None) -> str | None:
    """Canonical name of a stain as somebody wrote it; `None` where that says nothing.

    Args:
        text: Such as `PASM`, `h&e`, `Congo red`; one that the terminology does not know stays.
    """
    written = normal_text(text or "")
    if written.casefold() in _NO_VALUE:
        return None
    return stain_names().get(match_key(written), written)


@lru_cache(2**16)  # of the same rows it is asked again and again
def find_stain_in_name(name: str) -> str | None:
    """Stain that the name of a slide or file seems to say, as a whole word of it.

    Args:
        name: Such as `p07_PASM_2` or `S-18-162_PAS.svs`.

    Returns:
        The canonical name; `None` where it has none, or several that differ.
    """
    known, words = stain_names(), match_key(name).split()
    seen = {
        known[key]
        for start in range(len(words))
        for end in range(start + 1, min(start + _WORDS, len(words)) + 1)
        if (key := " ".join(words[start:end])) in known
    }
    return seen.pop() if len(seen) == 1 else None


def read_stains(rows: "Dataset") -> list[str | None]:
    """Canonical stain of each row, by its column `stain`; `None` where that is empty or absent.

    Spellings that differ in case or separators alone are one stain, called as the first of them.
    """
    if STAIN not in rows.column_names:
        return [None] * len(rows)
    values: list[Any] = column(rows, STAIN)
    names = getattr(rows.features[STAIN], "names", None)  # of a `ClassLabel`
    if names is not None:
        values = [names[v] if v is not None and v >= 0 else None for v in values]
    first: dict[str, str] = {}
    stains = [None if value is None else name_stain(str(value)) for value in values]
    return [s and first.setdefault(spelling(s), s) for s in stains]


def state_stains(rows: "Dataset", given: str | None = None) -> tuple["Dataset", list[str]]:
    """State the stain of each row in its column `stain`, in canonical names.

    Args:
        rows: Images, with a column `stain` or without.
        given: By the user: of the rows whose stain no column states.

    Returns:
        The rows, and a sentence where the user and the column differ, and one where a stain is
        written in several ways.
    """
    named = name_stain(given)
    before: list[Any] = column(rows, STAIN) if STAIN in rows.column_names else [None] * len(rows)
    stains, notes = read_stains(rows), []
    if others := Counter(s for s in stains if s and named and not is_same_stain(s, named)):
        notes.append(
            f"The stain was given as {named}, and the column {STAIN} says {_counted(others)} "
            "images: the column counts."
        )
    written: dict[str, set[str]] = {}
    for stain, text in zip(stains, before, strict=True):
        if stain is not None and isinstance(text, str):
            written.setdefault(stain, set()).add(normal_text(text))
    notes += [
        f"The column {STAIN} writes {stain} in several ways ({in_quotes(sorted(texts))}): they are "
        "one stain."
        for stain, texts in sorted(written.items())
        if len(texts) > 1
    ]
    stains = [stain or named for stain in stains]
    if stains == before or not any(stains):
        return rows, notes
    return _with_column(rows, stains), notes


def contradictions(rows: "Dataset") -> list[str]:
    """Sentences where names of files or slides say another stain than is stated, or where none is.

    Args:
        rows: Images, with `file_name`, `slide_id` and `stain` where known.
    """
    columns = [column(rows, n) for n in ("file_name", "slide_id") if n in rows.column_names]
    seen = [
        {s for s in (find_stain_in_name(str(name)) for name in names if name) if s}
        for names in (zip(*columns, strict=True) if columns else [()] * len(rows))
    ]
    by_name = [names.pop() if len(names) == 1 else None for names in seen]
    return compare_names(read_stains(rows), by_name)


def compare_names(stated: Sequence[str | None], by_name: Sequence[str | None]) -> list[str]:
    """Sentences where stated stains and those of names differ, with counts.

    Args:
        stated: Canonical stain of each image or slide, `None` where it is not stated.
        by_name: What its name seems to say.
    """
    pairs = Counter(
        (a, b) for a, b in zip(stated, by_name, strict=True) if b and not is_same_stain(a, b)
    )
    notes = [
        f"The stain is stated as {a}, and {n} {'name says' if n == 1 else 'names say'} {b}: check "
        "which is right; what is stated counts."
        for (a, b), n in pairs.items()
        if a is not None
    ]
    silent = Counter({b: n for (a, b), n in pairs.items() if a is None})
    if silent:
        notes.append(
            f"No stain is stated where names seem to say {_counted(silent)} images: a column "
            f"{STAIN} takes it, or --stain for all; it is not taken from names."
        )
    return notes


def is_same_stain(a: str | None, b: str | None) -> bool:
    """Whether two canonical names are one stain, but for their spelling."""
    return a is not None and b is not None and spelling(a) == spelling(b)


def list_stains(stains: Iterable[str | None]) -> list[str]:
    """The different stains, sorted."""
    return sorted({stain for stain in stains if stain is not None})


def _counted(counts: Counter[str]) -> str:
    """`PAS of 12 and silver of 3`."""
    return " and ".join(f"{stain} of {n}" for stain, n in sorted(counts.items()))


def _with_column(rows: "Dataset", stains: Sequence[str | None]) -> "Dataset":
    """The rows with this column `stain`, in the place of the one there was."""
    from datasets import Value

    order = rows.column_names
    rest = rows.remove_columns(STAIN) if STAIN in order else rows
    with_stains = rest.add_column(STAIN, list(stains), feature=Value("string"))
    return with_stains.select_columns(order) if STAIN in order else with_stains
