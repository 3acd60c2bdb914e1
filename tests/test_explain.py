"""Heat maps lie where their patches lie, equal their formulas, and can fail their own checks."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import published
import pytest
import torch
from cases import case_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_backbone_contract import _registers
from tiny import (
    CLASSES,
    tiny_bert,
    tiny_clip,
    tiny_dinov2,
    tiny_images,
    tiny_pair,
    tiny_siglip,
    tiny_siglip2,
)
from torch import Tensor, nn
from transformers import CLIPImageProcessor, Siglip2ImageProcessor, SwinConfig, SwinModel

from hf_glovlm import adapt, load_backbone, load_dataset
from hf_glovlm.data.splits import all_rows
from hf_glovlm.errors import GloVLMError
from hf_glovlm.explain import (
    HEAT_MAPS,
    HeatMap,
    MapMethod,
    View,
    attention,
    compare_with_shuffled,
    evaluate_maps,
    explain,
    explain_files,
    heat_inside,
    load_masks,
    measure_faithfulness,
    overlay,
    register_map,
    save_figure,
    summarise_maps,
)
from hf_glovlm.explain.patches import central_ellipse, mean_colour, reveal, view_image
from hf_glovlm.lab.phantoms import render_cohort
from hf_glovlm.model import GloVLMForImageClassification

# What each heat map of HEAT_MAPS is drawn of: `plain`, any vision transformer, or one with
# `context`-guided layers.
MAP_CASES = {
    "rollout": "plain",
    "gradient": "plain",
    "similarity": "plain",
    "occlusion": "plain",
    "kept": "context",
}
PATCHED = [name for name in HEAT_MAPS if MAP_CASES.get(name) == "plain"]


@cache
def _folder(name: str) -> str:
    if name == "pair":
        return tiny_pair()
    if name == "registers":
        return f"{_registers()}+{tiny_bert()}"
    if name == "swin":
        folder = tiny_clip().parent / "swin"
        sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
        SwinModel(SwinConfig(image_size=32, patch_size=4, **sizes)).save_pretrained(folder)
        transform = (tiny_dinov2() / "preprocessor_config.json").read_text()
        (folder / "preprocessor_config.json").write_text(transform)
        return f"{folder}+{tiny_bert()}"
    if name == "conch":
        return str(published.conch(tiny_clip().parent / "conch"))
    return str({"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}[name]())


def classifier(name: str, **options: Any) -> tuple[Any, Any]:
    """A tiny backbone with a head of random weights."""
    torch.manual_seed(0)
    model, processor = load_backbone(_folder(name), **options)
    model.config.id2label = dict(enumerate(CLASSES))
    observed = GloVLMForImageClassification(model.config, model).eval()
    nn.init.normal_(observed.head.weight)
    return observed, processor


def picture(width: int = 52, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


# ----------------------------------------------------------------- a model that can be seen through


class Toy(nn.Module):
    """Logits `[0, w . b]` with `b` the mean brightness of each cell of 16 pixels."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64).flatten())
        self.config = SimpleNamespace(id2label={0: "no", 1: "yes"}, synthetic=True)
        tower = nn.Module()
        tower.config = SimpleNamespace()  # type: ignore[assignment]
        self.glovlm = nn.Module()
        self.glovlm.backbone = nn.Module()
        self.glovlm.backbone.vision_model = tower
        self.glovlm.get_image_features = self._features
        self.head = nn.Identity()

    def _features(self, pixel_values: torch.Tensor) -> Any:
        cells = nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 16)
        return SimpleNamespace(pooler_output=cells.flatten(1))

    def classify_features(self, features: torch.Tensor) -> torch.Tensor:
        yes = features @ self.weights
        return torch.stack([torch.zeros_like(yes), yes], dim=1)


class ToyProcessor:
    """An image transform that only brings an image to 64 pixels."""

    torchvision_crop = False

    def __init__(self, **options: Any) -> None:
        square = {"height": 64, "width": 64}
        defaults: dict[str, Any] = {"size": {"shortest_edge": 64}, "crop_size": square}
        self.image_processor = CLIPImageProcessor(do_normalize=False, **(defaults | options))

    def __call__(self, images: Any, return_tensors: str) -> Any:
        return self.image_processor(images, return_tensors=return_tensors)


def toy(seed: int = 0) -> tuple[Toy, ToyProcessor, Image.Image]:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 216, (4, 4, 1)).repeat(16, 0).repeat(16, 1)
    pixels = (cells + rng.integers(0, 40, (64, 64, 3))).astype(np.uint8)
    return Toy(rng.normal(0, 1, 16)), ToyProcessor(), Image.fromarray(pixels)


def toy_probability(model: Toy, image: Image.Image, shown: Any) -> Any:
    """The same in numpy, of an image of 64 pixels with some cells at its mean colour."""
    pixels = np.asarray(image, np.float64) / 255
    cells = pixels.reshape(4, 16, 4, 16, 3).mean((1, 3, 4)).ravel()
    bright = np.where(shown, cells, pixels.mean())
    return 1 / (1 + np.exp(-(bright @ model.weights.detach().numpy())))


def test_occlusion_is_the_drop_of_the_probability() -> None:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion", target="yes")  # type: ignore[arg-type]
    whole = toy_probability(model, image, np.ones(16, bool))
    drops = whole - toy_probability(model, image, ~np.eye(16, dtype=bool))
    np.testing.assert_allclose(heat.values.ravel(), drops, atol=1e-6)
    np.testing.assert_allclose(heat.score, whole, atol=1e-6)
    assert heat.synthetic


def test_a_window_blanks_its_patches_together() -> None:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion", target=1, window=3)  # type: ignore[arg-type]
    corner = np.zeros((4, 4), bool)
    corner[3:, :3] = True
    drop = toy_probability(model, image, np.ones(16, bool))
    drop -= toy_probability(model, image, ~corner.ravel())
    np.testing.assert_allclose(heat.values[corner], drop, atol=1e-6)


def test_curves_are_those_of_a_model_that_can_be_seen_through() -> None:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion", target="yes")  # type: ignore[arg-type]
    curves = measure_faithfulness(model, processor, image, heat, steps=5, orders=2)
    order = np.argsort(-heat.values.ravel())
    cuts = [0, 3, 6, 10, 13, 16]
    gone = np.array([np.isin(np.arange(16), order[:cut]) for cut in cuts])
    np.testing.assert_allclose(curves.fractions, np.array(cuts) / 16)
    np.testing.assert_allclose(curves.deletion, toy_probability(model, image, ~gone), atol=1e-6)
    np.testing.assert_allclose(curves.insertion, toy_probability(model, image, gone), atol=1e-6)
    areas, width = curves.areas(), np.diff(cuts) / 16
    mean = (curves.deletion[1:] + curves.deletion[:-1]) / 2
    assert areas["deletion"] == pytest.approx((mean * width).sum())
    assert areas["deletion_gain"] > 0.02
    assert areas["insertion_gain"] > 0.02
    for name in ("random_deletion", "random_insertion"):
        ends = getattr(curves, name)[[0, -1]]
        np.testing.assert_allclose(ends, getattr(curves, name[7:])[[0, -1]])


def test_a_map_turned_round_loses() -> None:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion", target="yes")  # type: ignore[arg-type]
    wrong = HeatMap(**{**vars(heat), "values": -heat.values})
    areas = measure_faithfulness(model, processor, image, wrong).areas()
    assert areas["deletion_gain"] < -0.02
    assert areas["insertion_gain"] < -0.02


def test_blanked_scores() -> None:
    model, processor, image = toy()
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    heat = explain(model, processor, image, method="occlusion", target="yes", mask=mask)  # type: ignore[arg-type]
    cells = mask[::16, ::16].ravel()
    # Colours of the image are whole numbers, and so is the one that fills.
    for observed, shown in ((heat.glomerulus_blanked, ~cells), (heat.context_blanked, cells)):
        assert observed[1] == pytest.approx(toy_probability(model, image, shown), abs=0.01)
    assert heat.mask == "given"


def test_the_ellipse_that_stands_in() -> None:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion")  # type: ignore[arg-type]
    inside = central_ellipse(64, 64)
    again = explain(model, processor, image, method="occlusion", mask=inside)  # type: ignore[arg-type]
    assert heat.mask == "central ellipse"
    assert heat.glomerulus_blanked == again.glomerulus_blanked
    assert inside.mean() == pytest.approx(np.pi / 4 * 0.64, abs=0.01)


# ------------------------------------------------------------------------------------ where it lies

TRANSFORMS: dict[str, dict[str, Any]] = {
    "crop": {},
    "crop_more": {"size": {"shortest_edge": 80}},
    "squash": {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    "pad": {"size": {"shortest_edge": 40}},
}


@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("size", [(150, 90), (90, 151), (64, 64)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_patch_lies_where_the_model_saw_it(
    name: str, size: tuple[int, int], torchvision: bool
) -> None:
    model, processor = Toy(np.ones(16)), ToyProcessor(**TRANSFORMS[name])
    mask = np.zeros(size[::-1], bool)
    mask[size[1] // 4 : size[1] // 2, size[0] // 3 : size[0] // 2] = True
    bright = Image.fromarray(mask[..., None].repeat(3, 2) * np.uint8(255))
    processor.torchvision_crop = torchvision and name == "crop_more"
    view, inputs = view_image(model, processor, bright)
    seen = model._features(inputs["pixel_values"]).pooler_output.view(view.rows, view.columns)
    cover = view.cover(mask)
    assert cover.max() > 0.2
    np.testing.assert_allclose(cover, seen.numpy(), atol=0.08)
    spread = np.nan_to_num(view.spread(cover))
    for axis in (0, 1):
        place = np.arange(mask.shape[axis])
        true, observed = (place @ x.sum(1 - axis) / x.sum() for x in (mask, spread))
        assert observed == pytest.approx(true, abs=0.12 * min(size))


def test_flattened_patches_lie_where_the_model_saw_them() -> None:
    model, processor = classifier("siglip2")
    assert isinstance(processor.image_processor, Siglip2ImageProcessor)
    mask = np.zeros((60, 130), bool)
    mask[20:40, 30:70] = True
    bright = Image.fromarray(mask[..., None].repeat(3, 2) * np.uint8(255))
    view, inputs = view_image(model, processor, bright)
    n = view.rows * view.columns
    assert n < inputs["pixel_values"].shape[1]
    seen = inputs["pixel_values"][0, :n].mean(-1).view(view.rows, view.columns) / 2 + 0.5
    np.testing.assert_allclose(view.cover(mask), seen.numpy(), atol=0.12)
    colour = mean_colour(inputs)
    np.testing.assert_allclose(colour.numpy() / 2 + 0.5, mask.mean(), atol=0.03)
    shown = torch.arange(n).unsqueeze(0) != 2
    (blank,) = reveal(inputs, shown, colour, view, 8)
    changed = (blank["pixel_values"] != inputs["pixel_values"]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() in ([2], [])
    assert blank["pixel_values"][0, 2].allclose(colour.repeat(64))


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_bright_corner_is_found_in_the_original(corner: tuple[int, int]) -> None:
    pixels = np.full((150, 200, 3), 30, np.uint8)
    rows = slice(0, 40) if corner[0] == 0 else slice(110, 150)
    columns = slice(23, 60) if corner[1] == 0 else slice(137, 174)  # the centre crop begins at 23.5
    pixels[rows, columns] = 250
    model, processor = Toy(np.ones(16)), ToyProcessor()
    heat = explain(model, processor, Image.fromarray(pixels), method="occlusion", target="yes")  # type: ignore[arg-type]
    observed = heat.on_image()
    assert observed.shape == (150, 200)
    assert np.isnan(observed[:, :23]).all()
    assert np.isnan(observed[:, 175:]).all()
    row, column = np.unravel_index(np.nanargmax(observed), observed.shape)
    assert rows.start <= row < rows.stop
    assert columns.start <= column < columns.stop


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99)
)
def test_cover_adds_up(rows: int, columns: int, left: int, top: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((25, 30)) < 0.4
    box = (left - 4, top - 4, left - 4 + 2 * columns, top - 4 + 3 * rows)
    cover = View(rows, columns, box, (30, 25), (1, 1)).cover(mask)
    padded = np.pad(mask, 30)[box[1] + 30 : box[3] + 30, box[0] + 30 : box[2] + 30]
    by_hand = padded.reshape(rows, 3, columns, 2).mean((1, 3))
    np.testing.assert_allclose(cover, by_hand, atol=1e-6)


def test_spread_is_linear_between_patches() -> None:
    view = View(4, 5, (10.0, 20.0, 60.0, 60.0), (70, 90), (1, 1))
    centre_x, centre_y = 15 + 10 * np.arange(5), 25 + 10 * np.arange(4)
    observed = view.spread((2 * centre_x[None] + 3 * centre_y[:, None]).astype(np.float32))
    y, x = np.mgrid[25:55, 15:55]
    np.testing.assert_allclose(
        observed[25:55, 15:55], 2 * (x + 0.5) + 3 * (y + 0.5), rtol=0, atol=1e-3
    )
    assert np.isfinite(observed).sum() == 50 * 40


# ---------------------------------------------------------------------------- by attention, by hand


def _by_hand(
    model: Any, inputs: Any, pooling: str, target: int, begin: int = 1
) -> tuple[dict[str, Any], Any]:
    """Rollout and gradient-weighted attention in float64, off the model's own outputs."""
    kept: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        query, key, value = args
        mask = kwargs.get("attn_mask")
        kept["pooling"] = nn.MultiheadAttention.forward(
            module, query, key, value, attn_mask=mask, average_attn_weights=True
        )[1]

    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    handles = [head.register_forward_hook(keep, with_kwargs=True) for head in heads]
    before = model.config.backbone_config.vision_config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    model.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    for layer in outputs.attentions:
        layer.retain_grad()
    outputs.logits[0, target].backward()
    layers = [layer[0].detach().double().numpy() for layer in outputs.attentions]
    gradients = [layer.grad[0].double().numpy() for layer in outputs.attentions]
    length = layers[0].shape[-1]
    rollout, relevance = np.eye(length), np.eye(length)
    for layer, gradient in zip(layers, gradients, strict=True):
        rollout = (layer.mean(0) / 2 + np.eye(length) / 2) @ rollout
        relevance = relevance + np.maximum(layer * gradient, 0).mean(0) @ relevance
    row = np.zeros(length)
    n = 16
    if pooling == "attention":
        row[length - kept["pooling"].shape[-1] :] = kept["pooling"][0, 0].detach().numpy()
        return {"rollout": row @ rollout}, layers
    if pooling in ("cls", "cls_mean"):
        row[0] += 1
    if pooling in ("mean", "cls_mean"):
        row[length - n :] += 1 / n
    row /= row.sum()
    return {"rollout": row @ rollout, "gradient": row @ (relevance - np.eye(length))}, layers


@pytest.mark.parametrize(
    ("name", "pooling", "inserts"),
    [
        ("clip", "cls", 0),
        ("pair", "cls", 0),
        ("pair", "mean", 0),
        ("pair", "cls_mean", 0),
        ("registers", "cls_mean", 0),
        ("registers", "cls", 3),
        ("siglip", "attention", 0),
        ("siglip", "attention", 2),
        ("siglip2", "attention", 0),
    ],
)
def test_attention_by_hand(name: str, pooling: str, inserts: int) -> None:
    options = {"vision_pooling": pooling} if name in ("pair", "registers") else {}
    model, processor = classifier(name, **options)
    if inserts:
        model.glovlm.add_adapter_modules({"vision": {"tokens": inserts, "depth": 2}})
    image = picture(40, 40)
    inputs = processor(images=[image], return_tensors="pt")
    expected, layers = _by_hand(model, inputs, pooling, 2)
    prefix = {"clip": 1, "pair": 1, "registers": 5}.get(name, 0) + inserts
    assert layers[0].shape[-1] == prefix + 16
    for method, values in expected.items():
        heat = explain(model, processor, image, method=method, target=CLASSES[2])
        np.testing.assert_allclose(heat.values.ravel(), values[prefix:], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["siglip", "siglip2", "conch"])
def test_a_pooler_that_attends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is that of the pass, and its gradient that of a finite difference."""
    model, processor = classifier(name)
    model.double()
    image = picture(40, 40)
    view, inputs = view_image(model, processor, image)

    def score(features: torch.Tensor) -> torch.Tensor:
        return model.classify_features(features)[0, 1]  # type: ignore[no-any-return]

    plain = model.glovlm.get_image_features(**inputs).pooler_output
    with attention._watched(model.glovlm.backbone) as seen:
        torch.testing.assert_close(model.glovlm.get_image_features(**inputs).pooler_output, plain)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(seen[0].shape[:-1]).double())
    observed = attention.read_attention(model, inputs, view, score)
    assert observed.pooling is not None
    assert observed.pooling_gradient is not None

    size = observed.pooling_gradient.abs()
    head, token = divmod(int(size.argmax()), size.shape[1])
    attend = attention._attend

    def score_at(step: float) -> float:
        def nudged(query: Any, key: Any, value: Any, heads: int, mask: Any) -> Any:
            weights, mixed = attend(query, key, value, heads, mask)
            part = value.shape[-1] // heads
            of_head = slice(head * part, (head + 1) * part)
            mixed = mixed.clone()
            mixed[0, 0, of_head] += step * value[0, token, of_head]  # as a greater weight would
            return weights, mixed

        monkeypatch.setattr(attention, "_attend", nudged)
        with torch.no_grad(), attention._watched(model.glovlm.backbone):
            return float(score(model.glovlm.get_image_features(**inputs).pooler_output))

    slope = (score_at(1e-4) - score_at(-1e-4)) / 2e-4
    assert slope == pytest.approx(float(observed.pooling_gradient[head, token]), rel=1e-3)

    monkeypatch.undo()
    heat = explain(model, processor, image, method="gradient", target=CLASSES[1])
    relevance = np.eye(observed.layers[0].shape[-1])
    for layer, gradient in zip(observed.layers, observed.layer_gradients, strict=True):
        weighed = np.maximum((layer * gradient).numpy(), 0).mean(0)
        relevance = relevance + weighed @ relevance
    last = np.maximum((observed.pooling * observed.pooling_gradient).numpy(), 0).mean(0) @ relevance
    n = heat.values.size
    values = last[observed.prefix : observed.prefix + n]
    np.testing.assert_allclose(heat.values.ravel(), values, rtol=1e-4, atol=1e-9)


def test_the_back_end_comes_back() -> None:
    model, processor = classifier("pair")
    model.train()
    model.requires_grad_(False)
    tower = model.glovlm.backbone.vision_model.config
    before = tower._attn_implementation
    assert before != "eager"
    image = picture()
    inputs = processor(images=[image], return_tensors="pt")
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.train()
    explain(model, processor, image, method="gradient")
    assert tower._attn_implementation == before
    assert model.training
    assert model.head.training

    def broken(features: torch.Tensor) -> torch.Tensor:
        assert tower._attn_implementation == before  # the pass is over
        raise ZeroDivisionError

    view, tensors = view_image(model, processor, image)
    with pytest.raises(ZeroDivisionError):
        attention.read_attention(model, tensors, view, broken)
    with (
        pytest.raises(KeyError, match="eager"),
        attention._eager(model.glovlm.backbone.vision_model),
    ):
        raise KeyError(tower._attn_implementation)
    assert tower._attn_implementation == before
    with torch.inference_mode():
        explain(model, processor, image, method="gradient")
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------ patches and classes


def _tokens(model: Any, inputs: Any) -> Any:
    return model.glovlm.backbone.vision_model(**inputs).last_hidden_state[0]


def _clip_alone(model: Any, tokens: Any) -> Any:
    backbone = model.glovlm.backbone
    return backbone.visual_projection(backbone.vision_model.post_layernorm(tokens[1:]))


def _siglip_alone(model: Any, tokens: Any) -> Any:
    return model.glovlm.backbone.vision_model.head(tokens.unsqueeze(1))


def _joined_alone(model: Any, tokens: Any) -> Any:
    return torch.cat([tokens[:1].expand(len(tokens) - 1, -1), tokens[1:]], dim=-1)


def _coca_alone(model: Any, tokens: Any) -> Any:
    backbone = model.glovlm.backbone
    return backbone.visual_projection(backbone.vision_pooler(tokens[-16:].unsqueeze(1)))


@pytest.mark.parametrize(
    ("name", "pooling", "alone"),
    [
        ("clip", None, _clip_alone),
        ("siglip", None, _siglip_alone),
        ("pair", "cls_mean", _joined_alone),
        ("pair", "mean", lambda model, tokens: tokens[1:]),
        ("pair", "cls", lambda model, tokens: tokens[1:]),
        ("pair", "pooler", lambda model, tokens: tokens[1:]),
        ("registers", "mean", lambda model, tokens: tokens[5:]),
    ],
)
@pytest.mark.parametrize("cosine", [False, True])
def test_similarity_by_hand(name: str, pooling: str | None, alone: Any, cosine: bool) -> None:
    model, processor = classifier(name, **({"vision_pooling": pooling} if pooling else {}))
    model.head.cosine = cosine
    model.head.scale.data.fill_(3.0)
    image = picture(40, 40)
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        features = alone(model, _tokens(model, inputs)).double().numpy()
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    values = features @ model.head.weight.detach().double().numpy().T * (1 if cosine else 3)
    heat = explain(model, processor, image, method="similarity", target=CLASSES[1])
    expected = values[:, 1] - values[:, [0, 2]].mean(1)
    np.testing.assert_allclose(heat.values.ravel(), expected, rtol=1e-3, atol=1e-4)


def test_a_coca_patch_alone() -> None:
    model, processor = classifier("conch")
    image = picture(40, 40)
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model.classify_features(_coca_alone(model, _tokens(model, inputs)))
    heat = explain(model, processor, image, method="similarity", target=0)
    expected = (logits[:, 0] - logits[:, 1:].mean(1)).numpy()
    np.testing.assert_allclose(heat.values.ravel(), expected, rtol=1e-3, atol=1e-4)


def test_a_text_is_asked_about() -> None:
    model, processor = classifier("clip")
    image, text = picture(), "an ischemic tuft"
    heat = explain(model, processor, image, method="occlusion", text=text)
    encoded = processor(text=[text, *CLASSES], return_tensors="pt")
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model.glovlm(encoded["input_ids"], pixels, encoded["attention_mask"])
    expected = output.logits_per_image.softmax(-1)[0]
    np.testing.assert_allclose(heat.scores, expected.numpy(), rtol=1e-4)
    assert heat.classes == [text, *CLASSES]
    assert heat.target == text
    curves = measure_faithfulness(model, processor, image, heat, steps=2, orders=1)
    assert curves.deletion[0] == pytest.approx(heat.score, abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "pair", "registers", "siglip", "siglip2", "conch"])
@pytest.mark.parametrize("method", PATCHED)
def test_every_backbone_has_every_map(name: str, method: str) -> None:
    model, processor = classifier(name)
    heat = explain(model, processor, picture(61, 33), method=method)
    assert heat.values.shape == (heat.view.rows, heat.view.columns)
    assert heat.values.dtype == np.float32
    assert np.isfinite(heat.values).all()
    assert heat.values.std() > 0
    assert heat.index == int(np.argmax(heat.scores))
    assert sum(heat.scores) == pytest.approx(1)
    assert json.dumps(heat.describe())


@pytest.mark.parametrize("method", HEAT_MAPS)
def test_every_map_has_a_model_that_it_applies_to(method: str) -> None:
    where = "MAP_CASES in tests/test_explain.py"
    case = case_of(MAP_CASES, method, "HEAT_MAPS", where, "what the map is drawn of")
    model, processor = classifier("pair")
    if case == "context":
        model.glovlm.add_context({"layers": [0, 1], "text_dim": 32, "keep": 0.5})
    heat = explain(model, processor, picture(), method=method, target="sclerosed")
    assert heat.values.shape == (heat.view.rows, heat.view.columns)
    assert np.isfinite(heat.values).all()
    row = HEAT_MAPS[method]
    assert row.name == heat.method == method
    assert row.title
    assert "arXiv" in row.citation or "doi" in row.citation
    if row.of_class:
        assert heat.legend == "evidence for sclerosed"
    other = explain(model, processor, picture(), method=method, target="viable")
    assert np.array_equal(heat.values, other.values) != row.of_class
    assert ("the same for every class" in row.unit) != row.of_class


def test_kept_patches() -> None:
    model, processor = classifier("pair")
    image = picture()
    with pytest.raises(GloVLMError, match="convlm"):
        explain(model, processor, image, method="kept")
    model.glovlm.add_context({"layers": [0, 1], "text_dim": 32, "keep": 0.5})
    heat = explain(model, processor, image, method="kept")
    inputs = processor(images=[image], return_tensors="pt")
    layers = model.glovlm.kept_patches(inputs["pixel_values"])
    share = [sum(j in layer[0].tolist() for layer in layers) / 2 for j in range(16)]
    assert heat.values.ravel().tolist() == share
    assert heat.values.max() > heat.values.min()
    assert explain(model, processor, image, method="occlusion").values.std() > 0
    for method in ("rollout", "gradient", "similarity"):
        with pytest.raises(GloVLMError, match="context-guided"):
            explain(model, processor, image, method=method)


def test_what_is_no_vision_transformer() -> None:
    model, processor = classifier("swin", vision_pooling="pooler")
    heat = explain(model, processor, picture(), method="occlusion")
    assert heat.values.shape == (2, 2)
    for method in ("rollout", "gradient", "similarity"):
        with pytest.raises(GloVLMError, match="no plain vision transformer"):
            explain(model, processor, picture(), method=method)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "gradcam"}, "Unknown heat map 'gradcam'"),
    ({"method": "occlusions"}, "Did you mean 'occlusion'"),
    ({"target": "sclerosd"}, "Did you mean 'sclerosed'"),
    ({"target": 3}, "'3' is no class"),
    ({"target": -1}, "'-1' is no class"),
    ({"text": "a crescent"}, "these two do not: ask for a class"),
    ({"text": " "}, "it is empty"),
    ({"text": "a crescent", "target": "viable"}, "not for both"),
    ({"mask": np.ones((40, 51))}, r"a mask of 40 x 52 \(height, width\)"),
    ({"mask": np.ones((40, 52))}, "no outside"),
    ({"mask": np.zeros((40, 52))}, "nothing inside"),
    ({"window": 0}, "1 or more"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_cannot_be_explained(options: dict[str, Any], message: str) -> None:
    model, processor = classifier("pair")
    model.config.joint_space = False
    with pytest.raises(GloVLMError, match=message):
        explain(model, processor, picture(), **options)


# ----------------------------------------------------------------------------------- how true it is


@cache
def _mini() -> tuple[Any, Any, list[Any]]:
    folder = tiny_clip().parent / "phantoms"
    phantoms = render_cohort(4, 5, seed=0, size=96)
    names = sorted({p.class_name for p in phantoms})[:2]
    folder.mkdir(exist_ok=True)
    for i, phantom in enumerate(phantoms):
        (folder / phantom.class_name).mkdir(exist_ok=True)
        if phantom.class_name in names:
            phantom.image.save(folder / phantom.class_name / f"{i}.png")
    rows = all_rows(load_dataset(folder))
    adapted = adapt("mini", "linear_probe", rows)
    return adapted.model, adapted.processor, [p.image for p in phantoms[:3]]


def test_maps_change_with_the_weights() -> None:
    model, processor, images = _mini()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    observed = compare_with_shuffled(model, processor, images, window=2)
    assert set(observed) == set(PATCHED)
    for method, correlation in observed.items():
        assert abs(correlation) < 0.5, method
    for name, weight in model.named_parameters():
        assert weight.equal(before[name])


def test_the_same_weights_give_the_same_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    model, processor, images = _mini()
    monkeypatch.setattr("hf_glovlm.explain.faithfulness.shuffle_weights", lambda model, seed: model)
    observed = compare_with_shuffled(model, processor, images[:1], methods=["gradient"])
    assert observed == {"gradient": pytest.approx(1)}


def _heat(values: Any) -> HeatMap:
    model, processor, image = toy()
    heat = explain(model, processor, image, method="occlusion")  # type: ignore[arg-type]
    return HeatMap(**{**vars(heat), "values": np.asarray(values, np.float32)})


@given(st.integers(0, 10_000))
def test_heat_inside_a_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside = rng.random((4, 4)) < 0.5
    inside[0, :2] = True, False
    values = rng.integers(-2, 4, (4, 4)).astype(float)
    observed = heat_inside(heat_of(values), inside.repeat(16, 0).repeat(16, 1))
    hot = values.clip(min=0)
    share = hot[inside].sum() / hot.sum() if hot.sum() else inside.mean()
    assert observed["heat"] == pytest.approx(share)
    assert observed["area"] == pytest.approx(inside.mean())
    assert observed["auc"] == pytest.approx(roc_auc_score(inside.ravel(), values.ravel()))


@cache
def _plain_heat() -> HeatMap:
    return _heat(np.zeros((4, 4)))


def heat_of(values: Any) -> HeatMap:
    return HeatMap(**{**vars(_plain_heat()), "values": np.asarray(values, np.float32)})


def test_maps_of_many_images() -> None:
    weights = np.zeros((4, 4))
    weights[1:3, 1:3] = 0.5
    model, processor = Toy(weights), ToyProcessor()
    images, masks = [], []
    for seed in range(6):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        pixels[16:48, 16:48] = 180 + 10 * seed
        images.append(Image.fromarray(pixels))
        mask = np.zeros((64, 64), bool)
        mask[16:48, 16 : 48 + 16 * (seed % 2)] = True
        masks.append(mask)
    groups = ["a", "a", "b", "b", "c", "c"]
    observed = evaluate_maps(
        *(model, processor, images, masks, groups),
        targets=["yes"] * 6,
        curves=True,
    )
    assert set(observed["not_applicable"]) == {"rollout", "gradient", "similarity", "kept"}
    row = observed["methods"]["occlusion"]
    assert (row["images"], row["groups"]) == (6, 3)
    assert row["heat"]["value"] == pytest.approx(1, abs=1e-5)
    assert row["area"]["value"] == pytest.approx((4 / 16 + 6 / 16) / 2)
    assert row["excess"]["value"] == pytest.approx(1 - 5 / 16, abs=1e-5)
    assert row["ratio"]["value"] == pytest.approx(16 / 5, abs=1e-4)
    # Every slide has the same mean, so no resample of slides differs.
    assert row["area"]["ci95"] == pytest.approx([5 / 16, 5 / 16])
    assert row["glomerulus_blanked"]["value"] < row["score"]["value"]
    assert row["deletion_gain"]["value"] > 0.02


def test_the_interval_is_over_groups() -> None:
    rng = np.random.default_rng(0)
    groups = [f"s{i // 7}" for i in range(56)]
    level = rng.normal(0.5, 0.1, 8)
    rows = [
        {"image": i, "method": "rollout", "heat": level[i // 7], "area": 0.4} for i in range(56)
    ]
    entry = summarise_maps(rows, groups)["rollout"]["excess"]
    assert entry["value"] == pytest.approx(level.mean() - 0.4)
    half = 2.365 * level.std(ddof=1) / 8**0.5  # of t with 7 degrees of freedom
    assert entry["ci95"] == pytest.approx([entry["value"] - half, entry["value"] + half], abs=0.01)
    alone = summarise_maps(rows[:7], groups)["rollout"]["excess"]
    assert alone["ci95"] is None


def test_what_cannot_be_evaluated() -> None:
    model, processor, image = toy()
    with pytest.raises(GloVLMError, match="one group an image, found 1 images and 2"):
        evaluate_maps(model, processor, [image], [central_ellipse(64, 64)], ["a", "b"])
    heat = _heat(np.zeros((4, 4)))
    with pytest.raises(GloVLMError, match="another image"):
        measure_faithfulness(model, processor, picture(80, 64), heat)
    with pytest.raises(GloVLMError, match="1 step"):
        measure_faithfulness(model, processor, image, heat, steps=0)
    with pytest.raises(GloVLMError, match="Unknown heat map 'saliency'"):
        evaluate_maps(
            *(model, processor, [image], [central_ellipse(64, 64)], ["a"]),
            methods=["saliency"],
        )


# ----------------------------------------------------------------------------------------- pictures


def test_an_overlay() -> None:
    model, processor = Toy((np.arange(16) - 8) / 20), ToyProcessor()
    image = picture(100, 64)
    heat = explain(model, processor, image, method="occlusion", target="yes")  # type: ignore[arg-type]
    assert overlay(image, heat, opacity=0).tobytes() == image.tobytes()
    full = np.asarray(overlay(image, heat, opacity=1, colormap="gray"))
    seen = np.isfinite(heat.on_image())
    assert (full[~seen] == np.asarray(image)[~seen]).all()
    assert seen.sum() == 64 * 64
    grey = full[..., 0].astype(float)
    assert (full[seen] == full[seen][:, :1]).all()
    place = (heat.on_image()[seen] - heat.values.min()) / np.ptp(heat.values)
    np.testing.assert_allclose(grey[seen], 255 * place, atol=2)
    half = np.asarray(overlay(image, heat, colormap="gray")).astype(float)
    np.testing.assert_allclose(half, (full.astype(float) + np.asarray(image)) / 2, atol=1)
    flat = HeatMap(**{**vars(heat), "values": np.zeros((4, 4), np.float32)})
    assert overlay(image, flat, opacity=1, colormap="gray").getpixel((50, 32)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opacity": 1.2}, "opacity of 0 to 1, found 1.2"),
        ({"colormap": "cividus"}, "Did you mean 'cividis'"),
        ({"image": picture(3, 4)}, "64 x 64 pixels, found 3 x 4"),
    ],
)
def test_what_cannot_be_laid_over(options: dict[str, Any], message: str) -> None:
    heat, image = _heat(np.zeros((4, 4))), options.pop("image", picture(64, 64))
    with pytest.raises(GloVLMError, match=message):
        overlay(image, heat, **options)


def test_a_figure_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: list[str] = []
    plain = Figure.savefig

    def listen(figure: Any, *arguments: Any, **options: Any) -> None:
        texts.extend(text.get_text() for text in figure.findobj(Text))
        plain(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", listen)
    heat = _heat(np.eye(4))
    path = save_figure(tmp_path / "new" / "map.png", picture(64, 64), heat)
    with Image.open(path) as image:
        assert image.format == "PNG"
    assert [p.name for p in path.parent.iterdir()] == ["map.png"]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 110  # all fits
    text = " ".join(" ".join(texts).split())
    for part in (
        f"{heat.target}: {heat.score:.2f}",
        f"evidence for {heat.target}",
        f"glomerulus blanked {heat.glomerulus_blanked[heat.index]:.2f}",
        f"context blanked {heat.context_blanked[heat.index]:.2f}",
        "central ellipse that stands in",
        "learned from synthetic images",
        "Research use only, not for diagnosis",
    ):
        assert part in text
    save_figure(path, picture(64, 64), heat, title="PAS_$1_$2.tif")  # which is no formula


def test_files_are_explained(tmp_path: Path) -> None:
    model, processor = classifier("pair")
    folder = tiny_images(tmp_path / "patient_17", per_class=1)
    files = sorted(folder.rglob("*.png"))
    assert len({path.name for path in files}) == 1  # the same name in three folders
    rows = explain_files(
        model, processor, files, tmp_path / "out", method="rollout", target="viable"
    )
    assert len({row["figure"] for row in rows}) == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("image_00-2.rollout.png", "image_00-3.rollout.png", "image_00.rollout.png"),
        "rollout.json",
    ]
    text = (tmp_path / "out" / "rollout.json").read_text()
    about = json.loads(text)
    assert [row["target"] for row in about["images"]] == ["viable"] * 3
    assert "not for diagnosis" in about["note"]
    assert "patient_17" not in text
    with pytest.raises(GloVLMError, match="3 masks, one an image, found 1"):
        explain_files(model, processor, files, tmp_path / "out", masks=[None])
    with pytest.raises(GloVLMError, match="does not exist"):
        explain_files(model, processor, [tmp_path / "no.png"], tmp_path / "out")


def test_masks_are_found_by_name(tmp_path: Path) -> None:
    mask = central_ellipse(30, 20)
    (tmp_path / "viable").mkdir()
    Image.fromarray(mask * np.uint8(255)).save(tmp_path / "a.png")
    Image.fromarray(~mask * np.uint8(255)).save(tmp_path / "viable" / "a.png")
    observed = load_masks(tmp_path, ["elsewhere/a.jpg", "viable/a.jpg", "/elsewhere/a.tif"])
    assert [(m == mask).all() for m in observed] == [True, False, True]
    assert (observed[1] == ~mask).all()
    with pytest.raises(GloVLMError, match=r"no mask for b.jpg: expected b.png"):
        load_masks(tmp_path, ["viable/b.jpg"])


def test_a_map_must_describe_itself() -> None:
    class Silent(MapMethod):
        name = "silent"

        def draw(self, case: Any) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(TypeError, match="Silent must state 'title'"):
        register_map(Silent)
    with pytest.raises(TypeError, match="already a heat map 'rollout'"):
        register_map(type(HEAT_MAPS["rollout"]))
