"""Visibility of lesions inside an outline: classes that cannot be judged, and their prompts.

A model that looks inside the outline of a glomerulus sees nothing else: by an outline of the tuft
neither Bowman's space nor the capsule, by one of the capsule not what lies around it. Where a
lesion is seen stands in the terminology.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Literal

from ..errors import GloVLMError
from .terminology import Term, find_term

Place = Literal["capsule", "around"]

_PLACES: dict[Place, str] = {  # in sentences
    "capsule": "in Bowman's space or at the capsule",
    "around": "around the glomerulus",
}
_WORDS: dict[Place, re.Pattern[str]] = {  # by which a text names the place
    "capsule": re.compile(r"capsul|bowman|crescent|extracapillar|adhesion|synech", re.I),
    "around": re.compile(r"kidney section|periglomerular|interstiti|\btubul", re.I),
}


def hidden_places(outline: str, outline_of: str | None) -> tuple[Place, ...]:
    """Places that a model does not see.

    Args:
        outline: What it does with the outline: `ignore`, `centre`, `blank`, `pool`, `blank+pool`.
        outline_of: What the outline goes around: `tuft`, `capsule`, or not known.
    """
    if outline == "ignore":
        return ()
    # A circle in the middle of the square goes around whatever the square was cut around.
    return ("capsule", "around") if outline_of == "tuft" and outline != "centre" else ("around",)


def hidden_classes(
    classes: Iterable[str], outline: str = "ignore", outline_of: str | None = None
) -> list[str]:
    """Sentences on what a model cannot judge, since its outline hides where that is seen.

    Args:
        classes: Names of its classes.
        outline: See `hidden_places`.
        outline_of: See `hidden_places`.

    Returns:
        Nothing where nothing is hidden; else what is hidden from any model of this kind, then the
        classes of this one that the terminology places there.
    """
    places = hidden_places(outline, outline_of)
    if not places:
        return []
    sentences = [_rule(outline, outline_of)]
    terms: dict[str, Term] = {}
    for name in classes:
        with suppress(GloVLMError):  # no glomerular lesion, or a word of several class systems
            terms[name.replace("_", " ")] = find_term(name)
    for place in places:
        there = {name: term for name, term in terms.items() if term.seen_in == place}
        if there:
            unsure = [name for name, term in there.items() if not term.verified]
            mark = f" (domain knowledge, unverified: {', '.join(unsure)})" if unsure else ""
            sentences.append(
                f"Classes that are seen {_PLACES[place]}, where this model does not look: "
                f"{', '.join(there)}{mark}. Its predictions of them rest on something else."
            )
    return sentences


def visible_prompts(
    prompts: Sequence[str], outline: str = "ignore", outline_of: str | None = None
) -> tuple[str, ...]:
    """Prompts of a class without words for what is hidden.

    Args:
        prompts: All of them.
        outline: See `hidden_places`.
        outline_of: See `hidden_places`.

    Returns:
        Those with the fewest such words: with none, or, where the class is itself one (a crescent),
        with no more than its name.
    """
    places = hidden_places(outline, outline_of)
    words = [sum(len(_WORDS[place].findall(prompt)) for place in places) for prompt in prompts]
    return tuple(p for p, n in zip(prompts, words, strict=True) if n == min(words))


def _rule(outline: str, outline_of: str | None) -> str:
    """What any model of this kind does not see."""
    if outline == "centre":
        return (
            "The model looks at a circle in the middle of each image and at nothing else: images "
            "must be cut around the glomerulus, and what lies around it, or beyond the circle, "
            "cannot be judged."
        )
    seen = f"The model looks inside the outline and at nothing else (outline: {outline})"
    if outline_of == "tuft":
        return (
            f"{seen}, and the outline goes around the tuft: crescents, adhesions, ischaemia and "
            "whatever else is seen in Bowman's space, at the capsule or around the glomerulus "
            "cannot be judged."
        )
    around = "what lies around the glomerulus cannot be judged"
    if outline_of == "capsule":
        return f"{seen}, and the outline goes around the capsule: {around}."
    return (
        f"{seen}: {around}. Whether it goes around the capsule or the tuft is not stated; if the "
        "tuft, crescents, adhesions and ischaemia cannot be judged either."
    )
