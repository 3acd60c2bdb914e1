"""Context-guided towers: which patches go on, what the text changes, and when nothing changes."""

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import tiny_clip, tiny_pair, tiny_siglip
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SwinConfig,
    VisionTextDualEncoderConfig,
    ViTConfig,
)

from hf_glovlm.backbones import load_backbone
from hf_glovlm.inference import encoder_key
from hf_glovlm.methods import target_modules
from hf_glovlm.model import ContextGuide, GloVLMConfig, GloVLMModel
from hf_glovlm.model.context import keep_count

WIDTH, HEADS, TEXT, SIZE = 16, 2, 12, 32  # 16 patches of 8 px
Array = NDArray[Any]
_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 3,
    "image_size": SIZE,
    "patch_size": 8,
}
_BERT = BertConfig(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    num_hidden_layers=1,
    intermediate_size=WIDTH,
    vocab_size=30,
)
VISION: dict[str, Callable[..., Any]] = {
    "dinov2": lambda **k: Dinov2Config(**{**_SHAPE, "mlp_ratio": 2, **k}),
    "swiglu": lambda **k: Dinov2Config(**{**_SHAPE, "use_swiglu_ffn": True, **k}),
    "registers": lambda **k: Dinov2WithRegistersConfig(
        **{**_SHAPE, "mlp_ratio": 2, "num_register_tokens": 4, **k}
    ),
    "vit": lambda **k: ViTConfig(**{**_SHAPE, "intermediate_size": 2 * WIDTH, **k}),
}
FAMILIES = ("clip", *VISION)
PARTS = {  # norm, attention, its output, norm, and what scales both branches
    "clip": ("layer_norm1", "self_attn", "out_proj", "layer_norm2", ()),
    "vit": ("layernorm_before", "attention", "o_proj", "layernorm_after", ()),
    "dinov2": ("norm1", "attention", "o_proj", "norm2", ("layer_scale1", "layer_scale2")),
}


def plain(family: str, pooling: str = "cls", **sizes: Any) -> GloVLMModel:
    """A small model with values everywhere that show, in float64."""
    torch.manual_seed(0)
    if family == "clip":
        vision = {**_SHAPE, "intermediate_size": 2 * WIDTH, **sizes}
        text = {**_BERT.to_diff_dict(), "vocab_size": 30}
        towers: Any = CLIPConfig(vision_config=vision, text_config=text, projection_dim=TEXT)
        model = GloVLMModel(GloVLMConfig(backbone_config=towers), CLIPModel(towers))
    else:
        towers = VisionTextDualEncoderConfig.from_vision_text_configs(
            VISION[family](**sizes), _BERT
        )
        model = GloVLMModel(
            GloVLMConfig(
                backbone_config=towers,
                vision_pooling=pooling,  # type: ignore[arg-type]
                text_pooling="mean",
                vision_projection="linear",
                text_projection="linear",
                projection_dim=TEXT,
            )
        )
    for parameter in model.backbone.vision_model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def guided(family: str, pooling: str = "cls", **spec: Any) -> GloVLMModel:
    """The same with a context at blocks 0 and 2, whose autoencoders have values that show."""
    model = plain(family, pooling)
    guide = model.add_context({"layers": [0, 2], "text_dim": TEXT, **spec})
    torch.manual_seed(1)
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def images(n: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def texts(n: int = 3) -> Tensor:
    return nn.functional.normalize(torch.randn(n, TEXT, dtype=torch.float64), dim=-1)


def tokens(model: Any, pixels: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.get_image_features(pixels, **kwargs)


# -------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("size", "counts"), [(224, [177, 161, 146]), (448, [706, 637, 575])], ids=str
)
@pytest.mark.parametrize("fuse", [True, False])
def test_as_many_tokens_go_on_as_published(size: int, counts: list[int], fuse: bool) -> None:
    shape = {"num_hidden_layers": 12, "image_size": size, "patch_size": 16}
    model = plain("vit", **shape)
    model.add_context({"layers": [3, 6, 9], "text_dim": TEXT, "fuse": fuse})
    pixels = images(2, size)
    start = (size // 16) ** 2
    if not fuse:
        counts = []
        for _ in range(3):
            counts.append(-(-9 * (counts[-1] if counts else start) // 10))
    kept = model.kept_patches(pixels)
    assert [k.shape for k in kept] == [(2, c + fuse) for c in counts]
    lengths = [h.shape[1] - 1 for h in tokens(model, pixels, output_hidden_states=True)[2]]
    a, b, c = (count + fuse for count in counts)
    assert lengths == [start] * 4 + [a] * 3 + [b] * 3 + [c] * 3


@given(st.integers(1, 100), st.integers(1, 4000))
def test_the_count_is_the_exact_ceiling(percent: int, patches: int) -> None:
    assert keep_count(percent / 100, patches) == math.ceil(Fraction(percent, 100) * patches)


@pytest.mark.parametrize("family", ["clip", "registers"])
def test_class_token_and_registers_stay_and_patches_are_numbered(family: str) -> None:
    model = guided(family, keep=0.5)
    before = 1 + 4 * (family == "registers")
    pixels = images()
    first, second = model.kept_patches(pixels)
    assert first.shape == (3, 9)
    assert second.shape == (3, 6)
    assert first.dtype == torch.int64
    assert tokens(model, pixels).last_hidden_state.shape[1] == before + 6
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        assert one[-1] == other[-1] == -1
        assert len(set(one[:-1])) == 8
        assert set(other[:-1]) <= set(one)
    # Only what is kept, or was put into a fused token, can change the result.
    model = guided(family, keep=0.5, fuse=False)
    last = model.kept_patches(pixels)[-1]
    changed = pixels.clone()
    for image, kept in zip(changed, last.tolist(), strict=True):
        for patch in kept:
            row, col = 8 * (patch // 4), 8 * (patch % 4)
            image[:, row : row + 8, col : col + 8] += 1
    assert not torch.allclose(tokens(model, pixels)[1], tokens(model, changed)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_those_go_on_that_the_class_token_attends_to_most(family: str) -> None:
    model = guided(family, keep=0.5)
    model.backbone.vision_model.set_attn_implementation("eager")
    pixels = images()
    attentions = tokens(model, pixels, output_attentions=True).attentions
    first, second = model.kept_patches(pixels)
    prefix = 5 if family == "registers" else 1
    scores = attentions[0].mean(1)[:, 0, prefix:]
    order = np.argsort(-scores.numpy(), axis=1)
    assert (first[:, :-1].numpy() == order[:, :8]).all()
    scores = attentions[2].mean(1)[:, 0, prefix:]  # of nine: the fused token is one
    order = torch.from_numpy(np.argsort(-scores.numpy(), axis=1)[:, :5])
    assert (second[:, :-1] == first.gather(1, order)).all()


# ---------------------------------------------------------------------------- nothing is different


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_theta_and_keep_at_one_it_is_the_plain_tower(family: str, dtype: torch.dtype) -> None:
    model, pixels = plain(family).to(dtype), images().to(dtype)
    expected = tokens(model, pixels, output_hidden_states=True)
    guide = model.add_context({"layers": [0, 1, 2], "text_dim": TEXT, "theta": 1.0, "keep": 1.0})
    guide.train()
    with guide.read(texts()):
        actual = tokens(model, pixels, output_hidden_states=True)
    for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_same_numbers(one, other)
    assert_same_numbers(actual.pooler_output, expected.pooler_output)
    assert_same_numbers(actual.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_can_be_taken_away(family: str) -> None:
    model, pixels = plain(family), images()
    expected = tokens(model, pixels).pooler_output
    names = list(model.state_dict())
    model.add_context({"layers": [0, 2], "text_dim": TEXT, "keep": 0.5})
    assert not torch.allclose(tokens(model, pixels).pooler_output, expected)
    assert [n for n in model.state_dict() if not n.startswith("context.")] == names
    model.remove_context()
    assert model.config.context is None
    assert list(model.state_dict()) == names
    assert tokens(model, pixels).pooler_output.equal(expected)
    blocks = [m for m in model.modules() if "forward" in vars(m)]
    assert blocks == []


def test_adapters_find_the_same_names() -> None:
    assert target_modules(guided("clip").backbone, mlp=True) == target_modules(
        plain("clip").backbone, mlp=True
    )


# ------------------------------------------------------------------------------ block against numpy


def _map(linear: Any, x: Array) -> Array:
    result: Array = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    return result


def _norm(layer: Any, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    result: Array = scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()
    return result


def _mlp(block: Any, x: Array, quick: bool) -> Array:
    mlp = block.mlp
    if hasattr(mlp, "gate_proj"):
        gate = _map(mlp.gate_proj, x)
        return _map(mlp.down_proj, gate / (1 + np.exp(-gate)) * _map(mlp.up_proj, x))
    hidden = _map(mlp.fc1, x)
    if quick:
        return _map(mlp.fc2, hidden / (1 + np.exp(-1.702 * hidden)))
    return _map(mlp.fc2, hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2)


def by_hand(
    block: Any,
    family: str,
    x: Array,
    *,
    guess: Array | None = None,
    theta: float = 0.9,
    kept: int,
    prefix: int = 1,
    renormalize: bool = False,
) -> Array:
    """One special block on the tokens of one image `[length, width]`."""
    norm1, attention, out, norm2, scales = PARTS[
        "dinov2" if family in ("swiglu", "registers") else family
    ]
    part = getattr(block, attention)
    normed = _norm(getattr(block, norm1), x)
    q, k, v = (_map(getattr(part, f"{name}_proj"), normed) for name in "qkv")
    if guess is not None:
        q[0] = theta * q[0] + (1 - theta) * guess
    mixed, row = [], np.zeros(len(x))
    for h in range(HEADS):
        cut = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        scores = np.exp(q[:, cut] @ k[:, cut].T / np.sqrt(WIDTH // HEADS))
        scores /= scores.sum(1, keepdims=True)
        row += scores[0] / HEADS
        mixed.append(scores @ v[:, cut])
    change = _map(getattr(part, out), np.concatenate(mixed, axis=1))
    if scales:
        change = change * getattr(block, scales[0]).lambda1.detach().numpy()
    x = x + change
    patches, row = x[prefix:], row[prefix:]
    if kept < len(patches):
        order = sorted(range(len(patches)), key=lambda i: -row[i])
        dropped = order[kept:]
        weight = row[dropped] / (row[dropped].sum() if renormalize else 1)
        fused = sum(w * patches[i] for w, i in zip(weight, dropped, strict=True))
        x = np.stack([*x[:prefix], *(patches[i] for i in order[:kept]), fused])
    change = _mlp(block, _norm(getattr(block, norm2), x), family == "clip")
    if scales:
        change = change * getattr(block, scales[1]).lambda1.detach().numpy()
    return x + change


def _guess(layers: Any, text: Array) -> Array:
    hidden = np.maximum(_map(layers[0], text), 0)
    hidden = np.maximum(_map(layers[2], hidden), 0)
    result: Array = 1 / (1 + np.exp(-_map(layers[4], hidden)))
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_text", [False, True])
def test_a_special_block_is_the_one_written_out(
    family: str, renormalize: bool, with_text: bool
) -> None:
    model = guided(family, theta=0.3, keep=[0.5, 0.7], renormalize=renormalize)
    guide, text = model.context, texts()
    assert guide is not None
    pixels = images()
    guide.train(with_text)
    with guide.read(text):
        hidden = tokens(model, pixels, output_hidden_states=True).hidden_states
    tower = model.backbone.vision_model
    blocks = next(list(m) for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    prefix = 5 if family == "registers" else 1
    for number, (layer, kept) in enumerate([(0, 8), (2, 7)]):
        for i in range(3):
            expected = by_hand(
                blocks[layer],
                family,
                hidden[layer][i].numpy(),
                guess=_guess(guide.to_vision[number], text[i].numpy()) if with_text else None,
                theta=0.3,
                kept=kept,
                prefix=prefix,
                renormalize=renormalize,
            )
            assert np.abs(hidden[layer + 1][i].numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_attention_is_the_slow_one(family: str) -> None:
    model, pixels, text = guided(family, keep=0.5), images(), texts()
    assert model.context is not None
    model.context.train()
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.backbone.vision_model.set_attn_implementation(implementation)
        with model.context.read(text) as seen:
            output = tokens(model, pixels, output_attentions=True, output_hidden_states=True)
        outputs.append((output, seen))
    (fast, seen_fast), (slow, seen_slow) = outputs
    assert not fast.attentions  # none of any block, as in the plain tower
    prefix = 5 if family == "registers" else 1
    lengths = [prefix + count for count in (16, 9, 9)]
    assert [a.shape for a in slow.attentions] == [(3, HEADS, n, n) for n in lengths]
    # CLIP takes its own softmax in float32, whatever the model is in.
    assert all((a.sum(-1) - 1).abs().max() < 1e-6 for a in slow.attentions)
    assert [h.shape[1] - prefix for h in slow.hidden_states] == [16, 9, 9, 6]
    for one, other in zip(fast.hidden_states, slow.hidden_states, strict=True):
        assert (one - other).abs().max() < 1e-5
    assert (fast.pooler_output - slow.pooler_output).abs().max() < 1e-5
    for one, other in zip(seen_fast.patches, seen_slow.patches, strict=True):
        assert one.equal(other)


# --------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("family", ["clip", "registers"])
def test_gradients_reach_both_autoencoders_of_every_layer_and_the_tower(family: str) -> None:
    model, text = guided(family, keep=0.5), texts()
    guide = model.context
    assert guide is not None
    guide.train()
    with guide.read(text) as seen:
        feature = model.get_image_features(images()).pooler_output
    assert seen.final is not None
    loss = feature.square().sum()  # reaches AE_c through the query
    for number, query in enumerate(seen.queries):
        loss = loss + (guide.to_text[number](query) - text).abs().mean()
    loss.backward()
    for part in (*guide.to_vision, *guide.to_text, model.backbone.vision_model.encoder):
        gradients = [p.grad for n, p in part.named_parameters() if "mask_token" not in n]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_not_mixed_in_is_noted_alone(family: str) -> None:
    model, text = guided(family, keep=0.5, theta=0.2), texts()
    guide, pixels = model.context, images()
    assert guide is not None
    expected = tokens(model, pixels).pooler_output
    guide.train()
    with guide.read(text, mix=False) as seen:
        assert tokens(model, pixels).pooler_output.equal(expected)
    with guide.read(text) as mixed:
        assert not torch.allclose(tokens(model, pixels).pooler_output, expected)
    assert seen.guesses[0].equal(mixed.guesses[0])
    assert torch.allclose(mixed.queries[0], 0.2 * seen.queries[0] + 0.8 * seen.guesses[0])


@pytest.mark.parametrize("blocks", [0, 2])
def test_in_evaluation_mode_no_text_is_looked_at(blocks: int) -> None:
    model = guided("dinov2", theta=0.2, keep=0.5, blocks=blocks, layers=[0, 1])
    guide, pixels = model.context, images()
    assert guide is not None
    expected = tokens(model, pixels).pooler_output
    with guide.read(texts()) as seen:
        assert tokens(model, pixels).pooler_output.equal(expected)
    assert seen.guesses == seen.queries == seen.tokens == []
    guide.train()
    assert tokens(model, pixels).pooler_output.equal(expected)  # none was given
    with guide.read(texts()) as seen:
        assert not torch.allclose(tokens(model, pixels).pooler_output, expected)
    assert len(seen.guesses) == len(seen.queries) == len(seen.tokens) == 2
    with pytest.raises(ValueError, match="one text: expected 3, found 2"), guide.read(texts(2)):
        tokens(model, pixels)
    assert tokens(model, pixels).pooler_output.equal(expected)  # nothing was left behind


def test_a_text_belongs_to_one_model_and_one_thread() -> None:
    model, pixels = guided("clip", theta=0.2), images()
    other = copy.deepcopy(model)
    for each in (model, other):
        assert each.context is not None
        each.context.train()
    expected = tokens(model, pixels).pooler_output
    assert model.context is not None
    with model.context.read(texts()), ThreadPoolExecutor(1) as pool:
        assert not torch.allclose(tokens(model, pixels).pooler_output, expected)
        assert_same_numbers(tokens(other, pixels).pooler_output, expected)
        elsewhere = pool.submit(lambda: tokens(model, pixels).pooler_output).result()
    assert_same_numbers(elsewhere, expected)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_copy_shares_nothing(blocks: int) -> None:
    model = guided("dinov2", keep=0.5, blocks=blocks, layers=[0, 1])
    twin, pixels = copy.deepcopy(model), images()
    expected = tokens(model, pixels).pooler_output
    assert_same_numbers(tokens(twin, pixels).pooler_output, expected)
    assert twin.context is not None
    twin.context.keep = [0.25, 0.25]
    for parameter in twin.parameters():
        parameter.data.mul_(2)
    assert tokens(model, pixels).pooler_output.equal(expected)
    assert twin.kept_patches(pixels)[0].shape == (3, 5)
    twin.remove_context()
    assert tokens(model, pixels).pooler_output.equal(expected)
    assert tokens(twin, pixels).last_hidden_state.shape[1] == 17


def test_a_schedule_holds_while_training_alone() -> None:
    model, pixels = guided("vit", keep=0.5), images()
    guide = model.context
    assert guide is not None
    names = list(model.state_dict())
    guide.keep_now = torch.tensor([1.0, 0.75])
    assert list(model.state_dict()) == names  # not a part of what is saved
    guide.train()
    assert [k.shape[1] for k in model.kept_patches(pixels)] == [16, 13]
    guide.eval()
    assert [k.shape[1] for k in model.kept_patches(pixels)] == [9, 6]


# -------------------------------------------------------------------------- pooling, blocks on top


@pytest.mark.parametrize("family", ["dinov2", "registers"])
@pytest.mark.parametrize("pooling", ["mean", "cls_mean", "cls", "pooler"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_pooling_takes_the_patches_that_are_left(family: str, pooling: str, keep: float) -> None:
    model, pixels = guided(family, pooling, keep=keep), images()
    with torch.no_grad():
        pooled = model.pool_images(pixels)
        last = model.backbone.vision_model(pixels).last_hidden_state
    prefix = 5 if family == "registers" else 1
    assert last.shape[1] == prefix + (6 if keep < 1 else 16)
    mean, first = last[:, prefix:].mean(1), last[:, 0]
    expected = {
        "mean": mean,
        "cls": first,
        "pooler": first,
        "cls_mean": torch.cat([first, mean], 1),
    }
    assert (pooled - expected[pooling]).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_on_top_are_guided_and_the_tower_stays(family: str) -> None:
    bare, pixels, text = plain(family), images(), texts()
    model = guided(family, blocks=3, keep=0.5, theta=0.3)  # of three, 0 and 2 are special
    guide = model.context
    assert guide is not None
    assert isinstance(guide.norm, nn.LayerNorm)
    assert guide.norm.eps == guide.blocks[0].layernorm_before.eps == 1e-6
    assert guide.blocks[0].mlp.fc1.out_features == 4 * WIDTH
    guide.train()
    with guide.read(text) as seen:
        output = tokens(model, pixels, output_hidden_states=True)
    with torch.no_grad():
        start = bare.backbone.vision_model(pixels, output_hidden_states=True)
    for one, other in zip(output.hidden_states, start.hidden_states, strict=True):
        assert_same_numbers(one, other)
    prefix = 5 if family == "registers" else 1
    actual = []
    for i in range(3):
        x = start.last_hidden_state[i].numpy()
        for layer, kept in enumerate((8, 99, 5)):
            number = layer // 2
            guess = _guess(guide.to_vision[number], text[i].numpy()) if layer != 1 else None
            block = guide.blocks[layer]
            x = by_hand(block, "vit", x, guess=guess, theta=0.3, kept=kept, prefix=prefix)
        actual.append(_norm(guide.norm, x))
    assert np.abs(output.last_hidden_state.numpy() - np.stack(actual)).max() < 1e-9
    assert seen.final is not None
    assert np.abs(seen.final.numpy() - np.stack(actual)[:, 0]).max() < 1e-9
    model.backbone.vision_model.set_attn_implementation("eager")
    with guide.read(text):
        slow = tokens(model, pixels).last_hidden_state
    assert (slow - output.last_hidden_state).abs().max() < 1e-5
    model.backbone.vision_model.set_attn_implementation("sdpa")
    model.remove_context()
    assert_same_numbers(tokens(model, pixels).last_hidden_state, start.last_hidden_state)


def test_clips_final_class_token_is_behind_its_last_norm() -> None:
    model, pixels = guided("clip", keep=0.5), images()
    assert model.context is not None
    with model.context.read() as seen:
        output = tokens(model, pixels)
    tower = model.backbone.vision_model
    assert seen.final is not None
    with torch.no_grad():
        assert_same_numbers(seen.final, tower.post_layernorm(output.last_hidden_state[:, 0]))
        assert_same_numbers(output.pooler_output, model.backbone.visual_projection(seen.final))


# -------------------------------------------------------------------------------- saved, and cached


def test_a_new_guide_starts_as_published() -> None:
    model = plain("vit", hidden_size=64, intermediate_size=64)
    guide = model.add_context({"layers": [0], "text_dim": 40})
    to_vision, to_text = (
        [m for m in part[0] if isinstance(m, nn.Linear)]
        for part in (guide.to_vision, guide.to_text)
    )
    shapes = [(m.in_features, m.out_features) for m in (*to_vision, *to_text)]
    assert shapes == [(40, 64), (64, 128), (128, 64), (64, 40), (40, 40)]
    names = [[type(m).__name__ for m in part[0]] for part in (guide.to_vision, guide.to_text)]
    assert names == [
        ["Linear", "ReLU", "Linear", "ReLU", "Linear", "Sigmoid"],
        ["Linear", "ReLU", "Linear", "ReLU"],
    ]
    for linear in (*to_vision, *to_text):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias.abs().max() == 0
    assert (guide.theta, guide.keep, guide.fuse, guide.renormalize) == (0.9, [0.9], True, False)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_saved_folder_brings_it_back(blocks: int, tmp_path: Any) -> None:
    model = guided("dinov2", keep=[0.5, 0.75], blocks=blocks, layers=[0, 1], renormalize=True)
    pixels = images()
    model.save_pretrained(tmp_path)
    again, report = GloVLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.config.context == model.config.context
    state = model.state_dict()
    assert all(v.equal(state[k]) for k, v in again.state_dict().items())
    again = again.double().eval()
    assert_same_numbers(tokens(again, pixels).pooler_output, tokens(model, pixels).pooler_output)
    # From the config alone: untrained, as published, and the same tower.
    fresh = GloVLMModel(model.config)
    assert fresh.context is not None
    assert fresh.context.to_text[1][0].weight.std().item() == pytest.approx(0.02, rel=0.4)


def test_cached_features_of_guided_and_plain_towers_differ() -> None:
    model, processor = load_backbone(str(tiny_clip()))
    keys = [encoder_key(model, processor)]
    spec = {"layers": [0], "text_dim": 24, "keep": 0.9, "fuse": True}
    guide = model.add_context(spec)
    keys.append(encoder_key(model, processor))
    for change in ({"keep": 0.5}, {"fuse": False}, {"layers": [1]}):
        model.remove_context()
        fresh = model.add_context({**spec, **change})
        fresh.load_state_dict(guide.state_dict())
        keys.append(encoder_key(model, processor))
    assert len(set(keys)) == len(keys)
    model.remove_context()
    assert encoder_key(model, processor) == keys[0]


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": [3]}, "among the 3 blocks 0 to 2 of Dinov2Model; found .3."),
        ({"layers": [-1]}, "among the 3 blocks"),
        ({"layers": []}, r"among the 3 blocks .*found \[\]"),
        ({"layers": [2], "blocks": 2}, "among the 2 blocks 0 to 1 of our own"),
        ({"keep": 0}, "keep is above 0 and at most 1"),
        ({"keep": [0.5]}, "one for each of 2 layers"),
        ({"theta": 1.5}, "theta is 0 to 1; found 1.5"),
        ({"kappa": 0.5}, "found kappa: this folder needs a newer version"),
    ],
    ids=str,
)
def test_a_spec_that_means_nothing_is_refused(spec: dict[str, Any], message: str) -> None:
    model = plain("dinov2")
    with pytest.raises(ValueError, match=message):
        model.add_context({"layers": [0, 2], "text_dim": TEXT, **spec})
    assert model.context is None
    assert model.config.context is None
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_a_tower_without_a_class_token_is_refused() -> None:
    model, _ = load_backbone(str(tiny_siglip()))
    with pytest.raises(ValueError, match=r"class token's attention, and SiglipVisionModel has no"):
        model.add_context({"layers": [0], "text_dim": 24})
    swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=SIZE, patch_size=4)
    towers = VisionTextDualEncoderConfig.from_vision_text_configs(swin, _BERT)
    spec = {"layers": [0], "text_dim": WIDTH}
    with pytest.raises(ValueError, match="SwinModel has no class token"):
        GloVLMModel(GloVLMConfig(backbone_config=towers, joint_space=False, context=spec))


def test_blocks_of_another_kind_can_be_read_but_not_guided() -> None:
    towers = VisionTextDualEncoderConfig.from_vision_text_configs(
        DINOv3ViTConfig(**_SHAPE, intermediate_size=WIDTH, num_register_tokens=4), _BERT
    )
    config = GloVLMConfig(backbone_config=towers, vision_pooling="cls", joint_space=False)
    model = GloVLMModel(config).eval()
    with pytest.raises(ValueError, match=r"DINOv3ViTLayer cannot be guided .*blocks of our own"):
        model.add_context({"layers": [0], "text_dim": WIDTH})
    model.add_context({"layers": [0], "text_dim": WIDTH, "blocks": 1, "keep": 0.5})
    pixels = images().float()
    assert tokens(model, pixels).last_hidden_state.shape[1] == 1 + 4 + 8 + 1


def test_a_context_and_inserted_tokens_do_not_go_together() -> None:
    spec = {"layers": [0], "text_dim": TEXT}
    prompts = {"vision": {"tokens": 2, "depth": 1}}
    model = plain("clip")
    model.add_context(spec)
    with pytest.raises(ValueError, match="start from the backbone without the other"):
        model.add_adapter_modules(prompts)
    with pytest.raises(ValueError, match="has a context already"):
        model.add_context(spec)
    model = plain("clip")
    with pytest.raises(ValueError, match="This model has no context"):
        model.kept_patches(images())
    model.add_adapter_modules(prompts)
    with pytest.raises(ValueError, match="start from the backbone without the other"):
        model.add_context(spec)
    with pytest.raises(ValueError, match="start from the backbone without the other"):
        GloVLMModel(
            GloVLMConfig(
                backbone_config=model.config.backbone_config, context=spec, inserts=prompts
            )
        )


def test_an_attention_mask_is_refused() -> None:
    model = guided("vit")
    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[:, -1] = False
    with pytest.raises(ValueError, match="leave the attention mask out"):
        model.backbone.vision_model(images(), attention_mask=mask)


def test_a_pair_of_the_table_can_be_guided() -> None:
    model, _ = load_backbone(tiny_pair())
    assert isinstance(model.add_context({"layers": [1], "text_dim": 32, "keep": 0.5}), ContextGuide)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    assert model.kept_patches(pixels)[0].shape == (2, 9)
    assert model.pool_images(pixels).shape == (2, 64)  # class token and mean
