"""User errors: what was expected, what was found, what to do."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class GloVLMError(ValueError):
    """User error: bad input or an impossible request, in one sentence.

    The command line prints the sentence and exits with code 2; from Python it is a `ValueError`.
    """


class WriteError(GloVLMError, OSError):
    """Disk error: full, read-only, failing, or a path that it does not take. Nothing is left."""


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


def check_settings(
    values: Mapping[str, Any], known: Collection[str], required: Iterable[str]
) -> None:
    """Check a configuration for unknown and missing settings.

    Args:
        values: From YAML or flags.
        known: All settings.
        required: The required ones.

    Raises:
        GloVLMError: Names the first that is unknown or missing.
    """
    for key in values:
        if key not in known:
            raise GloVLMError(f"Unknown setting '{key}' in the configuration.{nearest(key, known)}")
    for key in required:
        if not values.get(key):
            flag = key.replace("_", "-")
            raise GloVLMError(f"A run needs {key}: give --{flag} or '{key}:' in the YAML file.")
