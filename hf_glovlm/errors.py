"""User errors: what was expected, what was found, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class GloVLMError(ValueError):
    """User error: bad input or an impossible request, in one sentence.

    The command line prints the sentence and exits with code 2; from Python it is a `ValueError`.
    """


class WriteError(GloVLMError, OSError):
    """Disk error: full, read-only, failing, or a path that it does not take. Nothing is left."""


MAX_WORDS = 200  # characters of an error that a library raised


def describe_error(error: Exception) -> str:
    """Error in a sentence; of one that is not ours its type and its first words."""
    if isinstance(error, GloVLMError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:MAX_WORDS]}".removesuffix(": ")


def nearest(name: str, known: Iterable[str]) -> str:
    """Near-miss suggestion for an unknown name.

    Args:
        name: What the user wrote.
        known: The names that exist.

    Returns:
        `" Did you mean 'x'?"`, or an empty string when nothing is close.
    """
    names = list(known)
    matches = get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    if not matches:
        return ""
    match = next(n for n in names if n.lower() == matches[0])
    return f" Did you mean '{match}'?"
