"""What text costs in a training step: it is cut after the longest prompt, and read in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attaching import attach
from tiny import CONTEXT, tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers
from torch import nn

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import ClassInfo
from hf_glovlm.methods import METHODS, give_joint_space, tower_layers
from hf_glovlm.model.modeling_glovlm import TEXT_CHUNK
from hf_glovlm.training.losses import TowerStep

TEXTS = [["viable."], ["a globally sclerosed glomerulus, PAS stain."], ["mesangial expansion."]]
TEXT_SIDE = [n for n, m in METHODS.items() if m.family == "text side"]
SHARED_TEXT = [n for n in TEXT_SIDE if n != "cocoop"]  # one set of class texts for all images


def load(make: Any) -> tuple[Any, Any]:
    """A backbone with a joint space, frozen, as `adapt` hands it to a method."""
    model, processor = load_backbone(str(make()))
    if make is tiny_pair:
        give_joint_space(model, torch.randn(6, 64), torch.arange(6) % 3, torch.randn(3, 32))
    return model.requires_grad_(False), processor


def many(classes: int) -> list[ClassInfo]:
    return [ClassInfo(f"kind {i}", f"kind {i}", (f"a {i} tuft",)) for i in range(classes)]


def batch(classes: int, n: int = 4) -> tuple[Any, ...]:
    """Pooled vectors of the tiny CLIP, labels, weights and their number."""
    return torch.randn(n, 32), torch.arange(n) % classes, torch.ones(n), n


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, tiny_siglip2, tiny_pair])
@pytest.mark.parametrize("context", [None, [60, 61, 62, 63]])
def test_text_cut_after_the_longest_prompt_is_the_text_at_full_length(
    make: Any, context: list[int] | None
) -> None:
    model, processor = load(make)
    processor.context_token_ids = context
    encoded = processor.encode_prompts(TEXTS)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    missing = CONTEXT - ids.shape[1]
    assert (missing == 0) == processor.pad_to_max == (make in (tiny_siglip, tiny_siglip2))
    pad = processor.tokenizer.pad_token_id
    full = {
        "input_ids": nn.functional.pad(ids, (0, missing), value=pad),
        "attention_mask": nn.functional.pad(mask, (0, missing)),
        "class_index": encoded["class_index"],
    }
    with torch.no_grad():
        short, long = model.class_prototypes(**encoded), model.class_prototypes(**full)
    assert (short - long).abs().max() < 1e-5


@contextmanager
def texts_at_once(model: Any) -> Iterator[list[int]]:
    """Count the texts of every call of the text tower's first block."""
    seen: list[int] = []
    block = tower_layers(model.backbone.text_model)[1][0]
    hook = block.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("name", SHARED_TEXT)
@pytest.mark.parametrize("make", [tiny_clip, tiny_pair])
def test_text_in_chunks_gives_the_values_and_gradients_of_the_whole(make: Any, name: str) -> None:
    classes = many(2 * TEXT_CHUNK + 7)
    model, processor = load(make)
    tuning = attach(name, model, processor, classes)
    (context,) = tuning.groups[0]["params"]
    step = TowerStep(tuning, "prototypes")
    step.train()
    direction = torch.randn(len(classes), 24 if make is tiny_clip else 32)
    with texts_at_once(model) as seen:
        chunked = step.current_prototypes()
        (mine,) = torch.autograd.grad((chunked * direction).sum(), [context])
    assert max(seen) <= TEXT_CHUNK < sum(seen)
    encoded = processor.encode_prompts(tuning.class_texts)
    whole = model.class_prototypes(**encoded, chunk_size=len(classes))
    (expected,) = torch.autograd.grad((whole * direction).sum(), [context])
    assert_same_numbers(chunked, whole)
    assert_same_numbers(mine, expected)


@pytest.mark.parametrize("name", TEXT_SIDE)
def test_a_thousand_classes_train_a_chunk_of_texts_at_a_time(name: str) -> None:
    classes = many(1000)
    model, processor = load(tiny_clip)
    with texts_at_once(model) as seen:
        tuning = attach(name, model, processor, classes)
    step = TowerStep(tuning, "prototypes")
    step.train()
    with texts_at_once(model) as later:
        step(*batch(1000, n=2)).backward()
    assert max(seen + later) <= TEXT_CHUNK
    assert sum(later) >= 2 * 1000  # forward, and once more on the way back
    gradients = [p.grad for group in tuning.groups for p in group["params"]]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_activations_kept_for_the_gradient_do_not_grow_with_the_classes() -> None:
    def kept(classes: int) -> int:
        """Numbers that autograd holds between forward and backward."""
        model, processor = load(tiny_clip)
        tuning = attach("prompt_tuning", model, processor, many(classes))
        step = TowerStep(tuning, "prototypes")
        step.train()
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step(*batch(classes))
        loss.backward()
        return sum(held.values())

    small, large = kept(4 * TEXT_CHUNK), kept(8 * TEXT_CHUNK)
    # What is kept for a class is its feature, its ids and a few numbers, no text's activations.
    assert (large - small) / (4 * TEXT_CHUNK) < 24 * 4 * 16
