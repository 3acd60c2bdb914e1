"""Class texts: their prototypes, and whether a text tower can tell the classes apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..files import digest_tensors
from .frozen import ask_once
from .prediction import exact_inference, model_device, to_array

if TYPE_CHECKING:
    from ..model import GloVLMModel, GloVLMProcessor

_SAME = 1e-6  # in any coordinate of two unit vectors: the rounding of float32 and nothing else


def embed_prompts(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    prompts: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    names: Sequence[str] | None = None,
) -> NDArray[np.float32]:
    """Text prototypes of classes, from their prompts.

    Args:
        model: The model.
        processor: Its processor, with the learned context if there is one.
        prompts: Per class, its texts; at least one.
        batch_size: Texts at a time; the texts of one class stay together.
        names: Names of the classes; with them, two classes of one vector are refused.

    Returns:
        `[classes, dim]`: each text's features normalised, averaged, normalised again.

    Raises:
        GloVLMError: A class has no prompt; with `names`, the texts of two classes give one vector.
    """
    empty = [k for k, texts in enumerate(prompts) if not texts]
    if empty or not prompts:
        raise GloVLMError(
            f"Every class needs at least one prompt; class number {empty[0] if empty else 0} has "
            "none: add one to classes.yaml."
        )
    backbone: Any = model.backbone
    projection = getattr(backbone, "text_projection", None)
    question = (
        tuple(map(tuple, prompts)),
        batch_size,
        processor.tokenizer,
        *(processor.max_length, processor.pad_to_max, str(processor.context_token_ids)),
        model.config.text_pooling,
        projection and digest_tensors(projection.state_dict().items()),
    )
    # A copy, which the caller may change.
    vectors = ask_once(
        model, question, lambda: _embed(model, processor, prompts, batch_size)
    ).copy()
    if names is not None:
        pair = find_equal(vectors)
        if pair is not None:
            raise GloVLMError(_explain(processor, prompts, names, *pair))
    return vectors


def _embed(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    prompts: Sequence[Sequence[str]],
    batch_size: int,
) -> NDArray[np.float32]:
    """Text prototypes `[classes, dim]`, so many texts at a time."""
    encoded = processor.encode_prompts([list(texts) for texts in prompts])
    encoded = {name: tensor.to(model_device(model)) for name, tensor in encoded.items()}
    ends = np.cumsum([len(texts) for texts in prompts])
    prototypes, begin = [], 0
    with exact_inference(model):
        while begin < len(prompts):
            done = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + batch_size, side="right")))
            rows = slice(done, ends[end - 1])
            prototypes.append(
                model.class_prototypes(
                    encoded["input_ids"][rows],
                    encoded["attention_mask"][rows],
                    encoded["class_index"][rows] - begin,
                )
            )
            begin = end
        return to_array(torch.cat(prototypes))


def find_equal(vectors: NDArray[np.float32]) -> tuple[int, int] | None:
    """The first two rows of `[n, dim]` that are one vector but for rounding; `None` without any."""
    for row in range(len(vectors) - 1):
        apart = np.abs(vectors[row + 1 :] - vectors[row]).max(1)
        if (apart <= _SAME).any():
            return row, row + 1 + int(np.argmax(apart <= _SAME))
    return None


def check_class_texts(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    prompts: Sequence[Sequence[str]],
    names: Sequence[str],
) -> list[str]:
    """Check that a text tower can tell classes apart by their texts.

    Args:
        model: The model.
        processor: Its processor.
        prompts: Per class, its texts.
        names: Names of the classes.

    Returns:
        A note on texts that are longer than the tower reads; empty without any.

    Raises:
        GloVLMError: The texts of two classes give one vector; says why.
    """
    embed_prompts(model, processor, prompts, names=names)
    flat = [text for texts in prompts for text in texts]
    cut = _cut(processor, flat)
    if not cut:
        return []
    return [
        f"{len(cut)} of {len(flat)} class texts are longer than the {_room(processor)} tokens that "
        f"the text tower reads, and the rest was cut (the first: '{_short(cut[0])}')."
    ]


def _room(processor: "GloVLMProcessor") -> int:
    """Tokens of a text that fit beside the learned context."""
    context = processor.context_token_ids or []
    one_class = context[0] if context and isinstance(context[0], list) else context
    return processor.max_length - len(one_class)


def _cut(processor: "GloVLMProcessor", texts: Sequence[str]) -> list[str]:
    rows = processor.tokenizer(list(texts), verbose=False)["input_ids"]
    room = _room(processor)
    return [text for text, ids in zip(texts, rows, strict=True) if len(ids) > room]


def _explain(
    processor: "GloVLMProcessor",
    prompts: Sequence[Sequence[str]],
    names: Sequence[str],
    first: int,
    second: int,
) -> str:
    """Why the texts of two classes give one vector, and what to do."""
    pair = [list(prompts[first]), list(prompts[second])]
    sentence = (
        f"The texts of '{names[first]}' and '{names[second]}' give one and the same vector, so no "
        "image could be told apart by them: "
    )
    if sorted(pair[0]) == sorted(pair[1]):
        return sentence + (
            f"both are '{_short(pair[0][0])}'. A template needs a place for the name of the class."
        )
    ids, whole = (
        [sorted(map(tuple, processor.tokenizer(texts, **how)["input_ids"])) for texts in pair]
        for how in ({"truncation": True, "max_length": _room(processor)}, {"verbose": False})
    )
    if whole[0] == whole[1]:
        return sentence + (
            f"the tokenizer reads '{_short(pair[0][0])}' and '{_short(pair[1][0])}' as the same "
            "tokens. Use words that its vocabulary keeps apart."
        )
    if ids[0] == ids[1]:
        return sentence + (
            f"they differ only behind the first {_room(processor)} tokens, where the text tower "
            "stops reading. Shorten them, or put the name of the class in front."
        )
    return sentence + (
        "they are different tokens, so the text tower pools them at a place in front of the "
        "difference. Its end token (eos_token_id) or text_pooling is set wrongly, or the weights "
        "are not a trained text tower."
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
