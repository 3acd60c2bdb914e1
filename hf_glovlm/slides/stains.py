"""Stain of a slide beside what its name says and what the model learned from."""

from typing import Any

from ..data.stains import find_stain_in_name, is_same_stain
from ..inference.stains import find_centres
from ..tables import spelling


def stain_flags(model: Any, stain: str | None, name: str) -> list[str]:
    """Flags about the stain of a slide, in sentences.

    Args:
        model: A classifier or a backbone.
        stain: Canonical, as the user or the case table states it; `None` where nobody does.
        name: Of the slide's file, which contradicts and never decides.
    """
    flags = []
    by_name = find_stain_in_name(name)
    trained: list[str] = getattr(model.config, "stains", None) or []
    centres = getattr(model, "centres", None)
    if stain is not None and by_name is not None and not is_same_stain(stain, by_name):
        flags.append(
            f"the stain is stated as {stain}, and the slide's name says {by_name}: check which is "
            "right; what is stated counts"
        )
    if stain is not None and trained and spelling(stain) not in {*map(spelling, trained)}:
        flags.append(
            f"the slide is stained {stain}, and the model learned from {' and '.join(trained)}"
        )
    if stain is None and by_name is not None and (trained or centres is not None):
        flags.append(
            f"no stain is stated, and the slide's name seems to say {by_name}: --stain takes it, "
            "or a column stain of --cases"
        )
    if centres is not None and int(find_centres(centres, [stain])) < 0:
        flags.append(
            f"the model centres features by the stain and has no centre of this slide's "
            f"({stain or 'not stated'}; centres: {', '.join(centres.stains)}): the mean of the "
            "centres stands in"
        )
    return flags
