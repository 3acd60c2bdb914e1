"""Outlines of a task: what a model is adapted to see, and images that have none."""

from typing import TYPE_CHECKING, Any

from ..data.outlines import outlines_of, structure_of
from ..data.visibility import hidden_classes
from ..errors import GloVLMError
from ..model.outlines import pools
from .prediction import class_names

if TYPE_CHECKING:
    from datasets import Dataset

_NEEDED = ("blank", "pool", "blank+pool")


def set_outline(
    model: Any, processor: Any, config: Any, support: "Dataset", *, needs_text: bool = False
) -> list[str]:
    """Set what a model sees of outlined images, and check that it can.

    Args:
        model: A `GloVLMModel`; its config keeps it.
        processor: Its processor; keeps it, too.
        config: Has `outline` and `outline_of`.
        support: The images to learn from.
        needs_text: Whether the method compares images with class texts.

    Returns:
        Sentences for the results.

    Raises:
        GloVLMError: An image of the support has no outline and one is needed, outlines go around
            different structures, or the tower has no tokens to pool.
    """
    about, outline = model.config, config.outline
    _check_tower(about, outline)
    about.outline, processor.outline, about.outline_of = outline, outline, None
    notes = [FAR_FROM_TEXTS] if needs_text and pools(outline) and not about.is_pair else []
    classes = support.features["label"].names
    if outline in ("ignore", "centre"):
        if config.outline_of is not None:
            raise GloVLMError(
                f"outline_of says what outlines go around, and with outline '{outline}' none is "
                "used: leave it out, or give outline blank, pool or blank+pool."
            )
        return [*notes, *hidden_classes(classes, outline)]
    outlines = outlines_of(support)
    without = outlines.count(None)
    if without:
        raise GloVLMError(
            f"Outline '{outline}' needs the outline of every labelled image, and {without} of "
            f"{len(outlines)} have none: cut them with `glovlm data crops`, give a column mask, or "
            "use outline centre, which takes a circle in the middle."
        )
    about.outline_of = structure_of(outlines, config.outline_of)
    return [*notes, *hidden_classes(classes, outline, about.outline_of)]


FAR_FROM_TEXTS = (
    "This encoder learned to compare texts with its pooled output, not with the patch tokens that "
    "are averaged inside of the outline: class texts may say less here than with outline blank."
)


def hidden_notes(config: Any) -> list[str]:
    """Sentences on what a classifier cannot judge, since its outline hides where that is seen.

    Args:
        config: Of the classifier.
    """
    return hidden_classes(class_names(config), config.outline, config.outline_of)


def outline_notes(config: Any, rows: "Dataset") -> list[str]:
    """Sentences about images that a model gets without the outlines that it learned from.

    Args:
        config: Of the model.
        rows: Images.

    Raises:
        GloVLMError: A column or file states an unknown structure.
    """
    if config.outline not in _NEEDED or not len(rows):
        return []
    outlines = outlines_of(rows)
    notes, without = [], outlines.count(None)
    if without:
        notes.append(
            f"{without} of {len(outlines)} images have no outline, and the model was adapted to "
            f"outlined images (outline '{config.outline}'): it took the whole of them, so their "
            "classes may mean little."
        )
    other = {"capsule": "tuft", "tuft": "capsule"}.get(config.outline_of or "")
    if other and (n := outlines.count(other)):
        notes.append(
            f"{n} of {len(outlines)} outlines go around the {other}, and those that the model "
            f"learned from around the {config.outline_of}."
        )
    return notes


def _check_tower(about: Any, outline: str) -> None:
    """Refuse to pool tokens of a tower that has none, or in front of a projection for others."""
    if not pools(outline):
        if about.is_pair and about.pools_inside and about.vision_projection != "none":
            raise _other_outline(about, outline)
        return
    if "siglip2" in about.backbone_config.model_type:
        raise GloVLMError(
            f"Outline '{outline}' pools patch tokens inside of the outline, and SigLIP 2 takes "
            "each image in a shape of its own: use outline blank, or SigLIP."
        )
    changed = not about.pools_inside and about.vision_pooling == "cls_mean"
    if about.is_pair and changed and about.vision_projection != "none":
        raise _other_outline(about, outline)


def _other_outline(about: Any, outline: str) -> GloVLMError:
    return GloVLMError(
        f"This model was adapted with outline '{about.outline}', and its projection fits what is "
        f"pooled there, not with outline '{outline}': keep that, use blank, or start from the "
        "backbone."
    )
