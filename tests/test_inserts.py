"""Tokens, bottlenecks and conditioned texts equal a forward pass written out block by block."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attaching import NAMES, SGD, attach, default_recipe, vit_b_16
from by_hand import (
    BACKBONES,
    IMAGES,
    WORDS,
    deeper_tokens,
    features,
    image_by_hand,
    loaded,
    one,
    pixels,
    replacing,
    shake,
    spliced,
    start_tokens,
    text_by_hand,
    unit,
    word_vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_clip
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, SwinConfig, SwinModel

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import encoder_key
from hf_glovlm.methods import METHODS
from hf_glovlm.model import GloVLMForImageClassification
from hf_glovlm.model.heads import build_head, describe_head
from hf_glovlm.model.prompts import (
    TEXT_CHUNK,
    AdapterModules,
    Bottleneck,
    ConditionalPromptHead,
    tower_blocks,
    widen_mask,
)
from hf_glovlm.training.losses import TowerStep

MINE = ("vpt", "adapter", "maple", "cocoop")


# ------------------------------------------------------------------------------------ vision tokens


@pytest.mark.parametrize(
    ("name", "deep"), [(n, d) for n in ("deep", *BACKBONES) for d in (True, False)]
)
def test_vpt_equals_tokens_put_in_by_hand(name: str, deep: bool) -> None:
    model, processor = loaded(name)
    plain, inputs = copy.deepcopy(model), pixels(processor)
    attach("vpt", model, processor, tokens=3, deep=deep)
    shake(model.inserts)
    table = model.inserts.vision.table
    blocks = 5 if name == "deep" else 2
    assert table.shape == (blocks if deep else 1, 3, 32)
    actual = features(model, inputs)
    for i in range(len(IMAGES)):
        tokens = table.detach()
        expected = image_by_hand(plain, one(inputs, i), deeper_tokens(tokens), first=tokens[0])
        torch.testing.assert_close(actual[i], expected, atol=1e-9, rtol=1e-8)
    assert (actual - features(plain, inputs)).abs().max() > 1e-2


@given(depth=st.integers(1, 5), tokens=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_any_number_of_tokens_at_any_depth(depth: int, tokens: int, seed: int) -> None:
    model, processor = loaded("deep")
    plain, inputs = copy.deepcopy(model), one(pixels(processor), seed % 4)
    model.add_adapter_modules({"vision": {"tokens": tokens, "depth": depth}})
    torch.manual_seed(seed)
    table = model.inserts.vision.table.data.normal_()
    expected = image_by_hand(plain, inputs, replacing(table))
    torch.testing.assert_close(features(model, inputs)[0], expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BACKBONES)
def test_one_image_at_a_time_equals_all_at_once(name: str, attention: str) -> None:
    model, processor = loaded(name)
    model.set_attn_implementation(attention)
    inputs = pixels(processor)
    model.add_adapter_modules(
        {
            "vision": {"tokens": 2, "depth": 2},
            "bottleneck": {"layers": [0, 1], "width": 4},
        }
    )
    shake(model.inserts)
    together = features(model, inputs)
    for i in range(len(IMAGES)):
        alone = features(model, one(inputs, i))[0]
        torch.testing.assert_close(together[i], alone, atol=1e-9, rtol=1e-8)


def test_padding_of_siglip2_stays_hidden() -> None:
    model, processor = loaded("siglip2")
    inputs = pixels(processor)
    assert (inputs["pixel_attention_mask"] == 0).any(), "an image with padding is needed"
    model.add_adapter_modules({"vision": {"tokens": 2, "depth": 2}})
    shake(model.inserts)
    expected = features(model, inputs)
    padding = inputs["pixel_attention_mask"] == 0
    inputs["pixel_values"][padding] = 7.0
    torch.testing.assert_close(features(model, inputs), expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("kind", ["boolean", "added", "keys"])
def test_a_widened_mask_shows_the_new_tokens_and_hides_what_it_hid(kind: str, begin: int) -> None:
    seen = torch.tensor([[True, True, False, True], [True, True, True, True]])
    mask = seen[:, None, None, :].expand(2, 1, 4, 4)
    if kind == "added":
        mask = torch.zeros(2, 1, 4, 4).masked_fill(~mask, -torch.inf)
    if kind == "keys":
        mask = seen.long()
    wide = widen_mask(mask, begin, 3)
    expected = torch.cat([seen[:, :begin], torch.ones(2, 3, dtype=torch.bool), seen[:, begin:]], 1)
    if kind == "keys":
        assert wide.equal(expected.long())
        return
    assert wide.shape == (2, 1, 7, 7)
    shown = wide if kind == "boolean" else wide == 0
    assert shown.equal(expected[:, None, None, :].expand(2, 1, 7, 7))


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as a tensor, found object.*sdpa"):
        widen_mask(object(), 0, 2)


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_attentions_and_hidden_states_show_the_tokens(name: str, recorded_before: bool) -> None:
    model, processor = loaded(name, torch.float32)
    model.set_attn_implementation("eager")
    inputs = pixels(processor, torch.float32)
    requested = {"output_attentions": True, "output_hidden_states": True}
    length = model.get_image_features(**inputs, **requested).hidden_states[0].shape[1]
    if not recorded_before:  # transformers puts its hooks in at the first request
        model, _ = loaded(name, torch.float32)
        model.set_attn_implementation("eager")
    model.add_adapter_modules({"vision": {"tokens": 3, "depth": 2}})
    with torch.no_grad():
        actual = model.get_image_features(**inputs, **requested)
    assert [h.shape[1] for h in actual.hidden_states] == [length + 3, length + 3, length]
    assert actual.last_hidden_state.shape[1] == length
    begin = 1 if name in ("clip", "pair") else 0  # behind the class token
    first = actual.hidden_states[0][:, begin : begin + 3]
    assert first.equal(model.inserts.vision.table[0].expand(4, -1, -1))
    assert [a.shape[-2:] for a in actual.attentions] == [(length + 3, length + 3)] * 2
    torch.testing.assert_close(actual.attentions[1].sum(-1), torch.ones(4, 4, length + 3))


# -------------------------------------------------------------------------------------- bottlenecks


@pytest.mark.parametrize("placement", [None, "block"])
@pytest.mark.parametrize("name", ["deep", *BACKBONES])
def test_bottlenecks_equal_the_formula_in_or_behind_every_block(
    name: str, placement: str | None
) -> None:
    """Published, and so the default, is on what the MLP of a block adds."""
    model, processor = loaded(name)
    plain, inputs = copy.deepcopy(model), pixels(processor)
    attach(
        "adapter", model, processor, reduction=8, **({"placement": placement} if placement else {})
    )
    shake(model.inserts)
    weights = {k: v.detach().numpy() for k, v in model.inserts.named_parameters()}

    def after(layer: int, x: Tensor) -> Tensor:
        down, up = (f"bottlenecks.{layer}.{part}" for part in ("down", "up"))
        hidden = np.maximum(x.numpy() @ weights[f"{down}.weight"].T + weights[f"{down}.bias"], 0)
        change = hidden @ weights[f"{up}.weight"].T + weights[f"{up}.bias"]
        return x + torch.from_numpy(change)

    actual = features(model, inputs)
    for i in range(len(IMAGES)):
        where: Any = {"after" if placement else "added": after}
        expected = image_by_hand(plain, one(inputs, i), **where)
        torch.testing.assert_close(actual[i], expected, atol=1e-9, rtol=1e-8)
    assert (actual - features(plain, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", BACKBONES)
def test_a_bottleneck_of_zeros_is_the_plain_tower(name: str) -> None:
    model, processor = loaded(name, torch.float32)
    inputs = pixels(processor, torch.float32)
    expected = features(model, inputs)
    attach("adapter", model, processor)
    for bottleneck in model.inserts.bottlenecks.values():
        nn.init.zeros_(bottleneck.up.weight)
    assert_same_numbers(features(model, inputs), expected)


def test_bottlenecks_start_as_published() -> None:
    for placement, std in ((None, 0.02), ("block", 1e-3)):
        model, processor = loaded("deep")
        chosen = {"placement": placement} if placement else {}
        attach("adapter", model, processor, reduction=1, **chosen)
        weights = [p for n, p in model.inserts.named_parameters() if n.endswith("weight")]
        drawn = torch.cat([weight.flatten() for weight in weights])
        assert drawn.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("name", BACKBONES)
def test_models_saved_before_a_layout_had_a_name_read_as_they_did(name: str) -> None:
    """Tokens behind the first norm, bottlenecks behind the block."""
    model, processor = loaded(name)
    plain, inputs = copy.deepcopy(model), one(pixels(processor), 0)
    spec = {"vision": {"tokens": 3, "depth": 2}, "bottleneck": {"layers": [1], "width": 4}}
    model.add_adapter_modules(spec)
    shake(model.inserts)
    table, bottleneck = model.inserts.vision.table.detach(), model.inserts.bottlenecks["1"]
    after = lambda layer, x: bottleneck(x) if layer == 1 else x  # noqa: E731
    expected = image_by_hand(plain, inputs, replacing(table), after)
    torch.testing.assert_close(features(model, inputs)[0], expected, atol=1e-9, rtol=1e-8)


def test_a_bottleneck_is_almost_the_identity_at_first() -> None:
    bottleneck = Bottleneck(768, 64)
    for linear, shape in ((bottleneck.down, (64, 768)), (bottleneck.up, (768, 64))):
        assert linear.weight.shape == shape
        assert linear.weight.std().item() == pytest.approx(1e-3, rel=0.02)
        assert linear.weight.mean().item() == pytest.approx(0, abs=2e-5)
        assert not linear.bias.any()


def test_vision_tokens_start_as_a_small_normal_draw() -> None:
    model, processor = loaded("clip")
    attach("vpt", model, processor, tokens=200)
    assert model.inserts.vision.table.std().item() == pytest.approx(0.02, rel=0.02)


# -------------------------------------------------------------------------------------------- MaPLe


MAPLE = [("deep", 1), ("deep", 3), ("deep", 9), *((name, 9) for name in BACKBONES)]


@pytest.mark.parametrize(("name", "depth"), MAPLE)
def test_maple_equals_both_towers_written_out(name: str, depth: int) -> None:
    model, processor = loaded(name)
    plain, inputs = copy.deepcopy(model), pixels(processor)
    tuning = attach("maple", model, processor, depth=depth)
    coupled = model.inserts.vision
    used = min(depth, 4) if name == "deep" else 2
    start = coupled.first.detach()
    torch.testing.assert_close(start, word_vectors(plain, processor, ["a", "photo"]))
    shake(coupled)
    texts = [coupled.first.detach()]
    if used > 1:
        assert model.inserts.text.table is coupled.deeper
        texts += list(coupled.deeper.detach())
    assert len(texts) == used == len(coupled.couplings)
    table = torch.stack(
        [
            torch.from_numpy(
                text.numpy() @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
            )
            for text, linear in zip(texts, coupled.couplings, strict=True)
        ]
    )
    begin = start_tokens(processor)

    def deeper(layer: int, x: Tensor) -> Tensor:
        if not 1 <= layer < used:
            return x
        return torch.cat([x[:begin], texts[layer], x[begin + 2 :]])

    images = torch.stack(
        [
            image_by_hand(plain, one(inputs, i), deeper_tokens(table), first=table[0])
            for i in range(4)
        ]
    )
    classes = unit(
        torch.stack(
            [
                text_by_hand(plain, spliced(plain, processor, f"of a {n}.", texts[0]), deeper)
                for n in NAMES
            ]
        )
    )
    assert tuning.class_texts == [[f"of a {n}."] for n in NAMES]
    encoded = processor.encode_prompts(tuning.class_texts)
    for _ in ("while it trains", "and for good"):
        with torch.no_grad():
            actual = model.class_prototypes(**encoded)
        torch.testing.assert_close(actual, classes, atol=1e-9, rtol=1e-8)
        torch.testing.assert_close(features(model, inputs), images, atol=1e-9, rtol=1e-8)
        tuning.finish(None)

    assert type(model.get_input_embeddings()) is nn.Embedding
    changed = (model.get_input_embeddings().weight != plain.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(processor.context_token_ids)
    left = {"vision.table": used * 2 * 32}
    left |= {"text.table": (used - 1) * 2 * 32} if used > 1 else {}
    assert {k: p.numel() for k, p in model.inserts.named_parameters()} == left
    assert model.config.inserts == {
        "vision": {"tokens": 2, "depth": used, "normed": True},
        **({"text": {"token_ids": processor.context_token_ids, "depth": used}} if used > 1 else {}),
    }


@pytest.mark.parametrize("name", ["clip", "siglip", "pair"])
@torch.no_grad()
def test_a_text_without_the_context_is_read_as_before(name: str) -> None:
    model, processor = loaded(name)
    plain = copy.deepcopy(model)
    tuning = attach("maple", model, processor)
    shake(model.inserts.vision)
    tuning.finish(None)
    words = dict(processor(text=["viable", "an ischemic tuft of a kidney"], return_tensors="pt"))
    expected = plain.get_text_features(**words).pooler_output
    assert_same_numbers(model.get_text_features(**words).pooler_output, expected)


# ------------------------------------------------------------------------------------------- CoCoOp


@torch.no_grad()
def conditional_by_hand(
    plain: Any, processor: Any, head: ConditionalPromptHead, feature: Tensor, rest: str = ""
) -> Tensor:
    """Unit class texts `[K, dim]` of one image, given its unit feature."""
    weights = [p.detach().numpy() for p in head.shift.parameters()]
    hidden = np.maximum(weights[0] @ feature.numpy() + weights[1], 0)
    shift = torch.from_numpy(weights[2] @ hidden + weights[3])
    texts = [
        text_by_hand(plain, spliced(plain, processor, f"{rest}{n}.", head.context + shift))
        for n in NAMES
    ]
    return unit(torch.stack(texts))


@pytest.mark.parametrize(
    ("name", "tokens"), [("clip", 4), ("clip", 3), *((n, 4) for n in BACKBONES[1:])]
)
def test_cocoop_equals_a_text_pass_for_every_image(name: str, tokens: int) -> None:
    model, processor = loaded(name)
    plain, inputs = copy.deepcopy(model), pixels(processor)
    tuning = attach("cocoop", model, processor, context_tokens=tokens, reduction=4)
    assert processor.context_token_ids is None
    head = model.backbone.text_model.conditional_prompts
    start = word_vectors(plain, processor, WORDS[:tokens])
    torch.testing.assert_close(head.context.detach(), start)
    shake(head.shift)
    pooled = unit(features(plain, inputs))
    rest = " ".join(WORDS[tokens:])
    rest = f"{rest} " if rest else ""
    expected = torch.stack([conditional_by_hand(plain, processor, head, f, rest) for f in pooled])
    with torch.no_grad():
        actual = tuning.image_prototypes(pooled)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-8)
    assert (actual[0] - actual[1]).abs().max() > 1e-3

    tuning.finish(None)
    assert tuning.final_head(torch.zeros(3, 32)) is head
    assert not any("conditional" in key for key in model.state_dict())
    classifier = GloVLMForImageClassification(model.config, glovlm=model, head=head).eval()
    with torch.no_grad():
        logits = classifier(**inputs).logits
    scale = plain.logit_scale.exp().item()
    torch.testing.assert_close(
        logits, scale * torch.einsum("nd,nkd->nk", pooled, expected), atol=1e-7, rtol=1e-7
    )


def gradients(*parameters: nn.Parameter) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def conditional_head(
    model: Any, processor: Any, classes: int, seed: int = 0
) -> ConditionalPromptHead:
    """A head of many classes, each with a text of its own."""
    torch.manual_seed(seed)
    head = ConditionalPromptHead(24, classes, width=32, length=9, context=2, hidden=4)
    shake(head)
    head.input_ids.random_(3, 400)
    head.input_ids[:, -1] = processor.tokenizer.eos_token_id
    return head.to(model.dtype)


@given(n=st.integers(1, 4), classes=st.integers(2, 9), chunk=st.integers(1, 40))
@settings(max_examples=8)
def test_a_logit_depends_on_its_image_and_class_alone(n: int, classes: int, chunk: int) -> None:
    model, processor = loaded("clip")
    head = conditional_head(model, processor, classes)
    images = torch.randn(n, 24, dtype=torch.float64)
    expected = torch.cat([head(images[i : i + 1], model) for i in range(n)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_glovlm.model.prompts.TEXT_CHUNK", chunk)
        actual = head(3 * images, model)  # nor on the length of the feature
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-9)


def test_no_more_texts_than_a_chunk_go_through_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded("clip")
    head = conditional_head(model, processor, 200)
    sizes: list[int] = []
    model.backbone.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    images = unit(torch.randn(2, 24, dtype=torch.float64))
    prototypes = head.prototypes(images, model)
    assert prototypes.shape == (2, 200, 24)
    assert sizes == [TEXT_CHUNK, TEXT_CHUNK, TEXT_CHUNK, 400 - 3 * TEXT_CHUNK]
    prototypes.sum().backward()
    assert len(sizes) == 8  # forward, and once more on the way back
    monkeypatch.setattr("hf_glovlm.model.prompts.TEXT_CHUNK", 400)
    head.prototypes(images, model).sum().backward()
    assert sizes[8:] == [400]  # one chunk is kept


def test_gradients_through_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded("clip")
    head = conditional_head(model, processor, 5)
    images = unit(torch.randn(3, 24, dtype=torch.float64))
    actual = []
    for chunk in (4, 1000):
        monkeypatch.setattr("hf_glovlm.model.prompts.TEXT_CHUNK", chunk)
        head.zero_grad()
        head(images, model).log_softmax(-1)[:, 0].sum().backward()
        actual.append(gradients(head.context, *head.shift.parameters()))
    for chunked, whole in zip(*actual, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-10, rtol=1e-8)


def test_texts_of_another_thread_keep_their_own_words() -> None:
    from threading import Barrier, Thread

    model, processor = loaded("clip")
    head = conditional_head(model, processor, 3)
    images = unit(torch.randn(2, 24, dtype=torch.float64))
    words = dict(processor(text=["viable"] * 6, return_tensors="pt"))
    with torch.no_grad():
        expected = head(images, model), model.get_text_features(**words).pooler_output
    both, actual = Barrier(2), {}
    embedding = model.get_input_embeddings()

    def meet(module: nn.Module, args: Any) -> None:
        both.wait(timeout=30)  # so that each is inside its pass while the other is

    embedding.register_forward_pre_hook(meet)

    def run(key: int, call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            actual[key] = call()

    threads = [
        Thread(target=run, args=(0, lambda: head(images, model))),
        Thread(target=run, args=(1, lambda: model.get_text_features(**words).pooler_output)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    assert not embedding._forward_hooks


def test_the_head_is_described_without_its_weights() -> None:
    head = ConditionalPromptHead(24, 3, width=32, length=9, context=2, begin=0, hidden=4)
    again = build_head(json.loads(json.dumps(describe_head(head))), 24, 3)
    assert isinstance(again, ConditionalPromptHead)
    shapes = {k: v.shape for k, v in head.state_dict().items()}
    assert {k: v.shape for k, v in again.state_dict().items()} == shapes
    assert again.begin == 0


# ---------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("vpt", {}, 8 * 12 * 768),
        ("vpt", {"deep": False}, 8 * 768),
        ("adapter", {}, 12 * (768 * 64 + 64 + 64 * 768 + 768)),
        ("maple", {}, 9 * 2 * 512 + 9 * (512 * 768 + 768)),  # 3,555,072: 3.55 M as published
        ("cocoop", {}, 4 * 512 + 512 * 32 + 32 + 32 * 512 + 512),  # 35,360 as published
    ],
)
def test_parameters_on_a_vit_b_16(name: str, config: dict[str, Any], expected: int) -> None:
    _, processor = load_backbone(str(tiny_clip()))
    tuning = attach(name, vit_b_16(), processor, **config)
    assert sum(p.numel() for p in tuning.trained) == expected


@pytest.mark.parametrize("backbone", ["clip", "siglip", "pair"])
@pytest.mark.parametrize("name", MINE)
def test_gradients_reach_all_of_it_and_nothing_else(name: str, backbone: str) -> None:
    model, processor = loaded(backbone, torch.float32)
    # A network with one hidden unit, as 24 / 16 makes it, may be dead.
    tuning = attach(name, model, processor, **({"reduction": 4} if name == "cocoop" else {}))
    params = tuning.trained
    assert len({id(p) for p in params}) == len(params)
    step = TowerStep(tuning, "prototypes")
    asked = {id(p) for p in step.parameters() if p.requires_grad}
    assert asked == {id(p) for p in params}  # so that the loop's checkpoint finds them by name
    inputs = pixels(processor, torch.float32)["pixel_values"]
    if not tuning.trains_vision:
        inputs = model.pool_images(inputs)
    assert tuning.trains_vision == (name != "cocoop")
    assert tuning.trains_text == (name == "maple")
    step(inputs, torch.tensor([0, 1, 2, 1]), torch.ones(4), 4).backward()
    for key, parameter in step.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (id(parameter) in asked), key
    if backbone == "pair":
        assert tuning.groups[1]["lr"] == 1e-3
        assert {p.shape for p in tuning.groups[1]["params"]} == {(32, 64), (32,)}
    assert "lr" not in tuning.groups[0]
    assert not METHODS[name].saves_adapter


RECIPES: dict[str, dict[str, Any]] = {
    "vpt": {"lr": 2.5e-3, "epochs": 5, "batch_size": 4, **SGD},
    "maple": {"lr": 3.5e-3, "epochs": 5, "batch_size": 4, **SGD},
    "cocoop": {"lr": 2e-3, "epochs": 10, "batch_size": 1, **SGD},
    "adapter": {
        "lr": 1e-3,
        "epochs": 20,
        "batch_size": 5,
        "weight_decay": 0.01,
        "optimizer": "adamw",
        "schedule": "constant",
        "warmup_epochs": 0,
        "patience": 7,
        "min_delta": 0.001,
        "steps": None,
        "eps": 1e-8,
    },
}
SETTINGS = {
    "vpt": {"tokens": 8, "deep": True, "projection_lr": 1e-3},
    "maple": {"context_tokens": 2, "depth": 9, "init": "a photo of a", "projection_lr": 1e-3},
    "cocoop": {
        "context_tokens": 4,
        "init": "a photo of a",
        "reduction": 16,
        "projection_lr": 1e-3,
    },
    "adapter": {"placement": "mlp", "reduction": 12, "projection_lr": 1e-3},
}


@pytest.mark.parametrize("shots", [1, 4, 16])
@pytest.mark.parametrize("name", MINE)
def test_recipes_and_settings_are_the_published_ones(name: str, shots: int) -> None:
    recipe = default_recipe(name, shots)
    assert {key: recipe[key] for key in RECIPES[name]} == RECIPES[name]
    assert METHODS[name].describe()["settings"] == SETTINGS[name]


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("vpt", {"tokens": 0}, "'tokens' of method 'vpt' must be 1 or more; found 0"),
        ("adapter", {"reduction": 0}, "'reduction' .* must be 1 or more"),
        ("maple", {"depth": 0}, "'depth' .* must be 1 or more"),
        ("cocoop", {"reduction": -1}, "'reduction' .* must be 1 or more"),
        ("maple", {"context_tokens": 5}, r"has 4 words: lower context_tokens \(found 5"),
        ("cocoop", {"context_tokens": 0}, "found 0"),
        ("cocoop", {"init": " "}, "has 0 words"),
    ],
)
def test_settings_that_cannot_be(name: str, config: dict[str, Any], sentence: str) -> None:
    model, processor = loaded("clip")
    with pytest.raises(GloVLMError, match=sentence):
        attach(name, model, processor, **config)
    assert model.inserts is None


@pytest.mark.parametrize("name", ["vpt", "adapter", "maple"])
def test_a_model_that_has_inserts_takes_no_others(name: str) -> None:
    model, processor = loaded("clip")
    attach("adapter", model, processor)
    with pytest.raises(GloVLMError, match=r"already \(bottleneck\): start from the backbone"):
        attach(name, model, processor)


def test_towers_without_a_plain_list_of_blocks_are_refused() -> None:
    convolutional = ResNetModel(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
    )
    hierarchical = SwinModel(
        SwinConfig(image_size=32, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=2)
    )
    for tower in (convolutional, hierarchical):
        with pytest.raises(ValueError, match=r"plain transformer: expected a list of .* blocks"):
            tower_blocks(tower)
    model, _ = loaded("clip")
    with pytest.raises(ValueError, match="has 2 blocks, and 3 were requested"):
        model.add_adapter_modules({"vision": {"tokens": 2, "depth": 3}})
    with pytest.raises(ValueError, match=r"vision, text, bottleneck; found audio"):
        AdapterModules({"audio": {}}, model.backbone)
    spec = {"layers": [0], "width": 2, "placement": "attention"}
    with pytest.raises(ValueError, match="placement is mlp or block; found 'attention'"):
        AdapterModules({"bottleneck": spec}, model.backbone)


# ------------------------------------------------------------------------------ copies and casts


def with_everything(name: str) -> tuple[Any, Any]:
    """All kinds of inserts at once, with weights that show."""
    model, processor = loaded(name, torch.float32)
    rows = model.get_input_embeddings().num_embeddings
    processor.context_token_ids = [rows - 1, rows - 2]
    model.add_adapter_modules(
        {
            "vision": {"tokens": 3, "depth": 2, "normed": True},
            "text": {"token_ids": processor.context_token_ids, "depth": 2},
            "bottleneck": {"layers": [0, 1], "width": 4, "placement": "mlp"},
        }
    )
    shake(model.inserts)
    return model, processor


@torch.no_grad()
def both_features(model: Any, processor: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    images = features(model, pixels(processor, dtype))
    texts = model.class_prototypes(**processor.encode_prompts([["viable."], ["PAS."]]))
    return torch.cat([images, texts]).float()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["clip", "pair"])
def test_a_copy_has_hooks_and_weights_of_its_own(name: str, copied: Callable[[Any], Any]) -> None:
    model, processor = with_everything(name)
    before = both_features(model, processor)
    other = copied(model)
    assert_same_numbers(both_features(other, processor), before)
    for parameter in other.inserts.parameters():
        nn.init.zeros_(parameter)
    assert both_features(model, processor).equal(before)
    changed = (both_features(other, processor) - before).abs().amax(1)
    assert (changed > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "siglip2", "pair"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, processor = with_everything(name)
    expected = both_features(model, processor)
    model.to(dtype)
    assert {p.dtype for p in model.inserts.parameters()} == {dtype}
    actual = both_features(model, processor, dtype)
    # A tenth of what the inserts themselves do, or less.
    assert (unit(actual) - unit(expected)).norm(dim=1).max() < 0.05


@pytest.mark.parametrize("name", ["clip", "pair"])
def test_autocast_keeps_the_towers_precision(name: str) -> None:
    model, processor = with_everything(name)
    expected = both_features(model, processor)
    with torch.autocast("cpu", torch.bfloat16):
        actual = both_features(model, processor)
    assert (unit(actual) - unit(expected)).norm(dim=1).max() < 0.05


def test_block_checkpointing_gives_the_same_gradients() -> None:
    model, processor = with_everything("clip")
    inputs = pixels(processor, torch.float32)
    prompts = processor.encode_prompts([["viable."], ["PAS."]])

    def after_a_step() -> list[Tensor]:
        model.zero_grad()
        images = model.train().get_image_features(**inputs).pooler_output
        (images @ model.class_prototypes(**prompts).T).square().sum().backward()
        return gradients(*model.inserts.parameters())

    expected = after_a_step()
    assert len(expected) == 2 + 4 * 2
    model.backbone.activation_checkpointing_enable()
    for actual, target in zip(after_a_step(), expected, strict=True):
        torch.testing.assert_close(actual, target, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "pair"])
def test_maples_texts_in_chunks_give_the_same_gradients(name: str) -> None:
    model, processor = loaded(name)
    tuning = attach("maple", model, processor)
    coupled = model.inserts.vision
    shake(coupled)
    encoded = processor.encode_prompts(tuning.class_texts)
    actual = []
    for chunk in (1, 3):  # one text at a time is read once more on the way back
        model.zero_grad()
        model.class_prototypes(**encoded, chunk_size=chunk)[0].cumsum(0).prod().backward()
        actual.append(gradients(coupled.first, coupled.deeper))
    for chunked, whole in zip(*actual, strict=True):
        assert whole.abs().max() > 0
        assert_same_numbers(chunked, whole)


def test_the_cache_of_images_knows_what_changes_them() -> None:
    model, processor = loaded("clip", torch.float32)
    key = encoder_key(model, processor)
    attach("cocoop", model, processor)  # its images are those of the backbone
    assert encoder_key(model, processor) == key
    model.add_adapter_modules({"vision": {"tokens": 2, "depth": 1}})
    with_tokens = encoder_key(model, processor)
    shake(model.inserts)
    assert len({key, with_tokens, encoder_key(model, processor)}) == 3
