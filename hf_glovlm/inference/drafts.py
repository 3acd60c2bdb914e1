"""Draft decoding of a task: JPEG files far larger than a model's input, decoded smaller."""

from typing import Any

from ..errors import GloVLMError


def set_draft(model: Any, processor: Any, draft: bool) -> list[str]:
    """Set whether JPEG files are decoded smaller where they are far larger than the input.

    Args:
        model: A `GloVLMModel`; its config keeps it.
        processor: Its processor; keeps it, too.
        draft: Whether they are.

    Returns:
        A sentence for the results where they are.

    Raises:
        GloVLMError: The image transform resizes to no fixed size.
    """
    model.config.draft = processor.draft = draft
    if not draft:
        return []
    side = processor.draft_side
    if not side:
        model.config.draft = processor.draft = False
        raise GloVLMError(
            "draft decodes a JPEG at twice the size that the image transform resizes to or more, "
            f"and {type(processor.image_processor).__name__} resizes to no fixed size here: leave "
            "draft out."
        )
    return [
        f"JPEG files of {2 * side} pixels or more on their shorter side were decoded at a half, a "
        f"quarter or an eighth of their size, at least {side} (draft): their features differ a "
        "little from those of the whole, and `evaluate` and `predict` decode alike."
    ]
