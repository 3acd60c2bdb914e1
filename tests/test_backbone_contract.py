"""One contract that every row of the table keeps, in a tiny version of its architecture."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from PIL import Image
from tiny import tiny_bert, tiny_clip, tiny_dinov2, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_glovlm.backbones import BACKBONES, Backbone, load_backbone
from hf_glovlm.data import ClassInfo
from hf_glovlm.methods import get_method

CLASSES = [ClassInfo(name, name, (f"a {name} glomerulus",)) for name in ("viable", "sclerosed")]
TEXTS = ["a viable glomerulus", "a pathology image of segmental sclerosis, PAS stain", "crescent"]


def tiny(row: Backbone) -> str:
    """A tiny version of a row's architecture, as `load_backbone` takes it."""
    if row.name == "mini":
        return "mini"
    if row.kind == "text":
        return tiny_pair()
    if row.kind == "vision":
        return f"{_tower(row.name)}+{tiny_bert()}"
    return str(_dual(row.name))


def _dual(name: str) -> Path:
    if name == "pathgen-clip":
        return _published("pathgen_clip")
    if BACKBONES[name].layout in published.LAYOUTS:
        return _published(published.LAYOUTS[BACKBONES[name].layout].__name__)
    if "siglip" in name:
        return tiny_siglip2() if "siglip2" in name else tiny_siglip()
    return tiny_clip()


def _tower(name: str) -> Path:
    if BACKBONES[name].layout == "timm":
        return _published(name)
    return _registers() if name == "hibou-b" else tiny_dinov2()


@cache
def _published(name: str) -> Path:
    folder: Path = getattr(published, name)(tiny_clip().parent / name)
    return folder


@cache
def _registers() -> Path:
    folder = tiny_clip().parent / "dinov2_with_registers"
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    transform = (tiny_dinov2() / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(transform)
    return folder


def _images(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 52), (61, 33), (32, 32)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes[:n]]


def _features(model: Any, processor: Any, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = processor(images=_images(n), return_tensors="pt")
    texts = processor(text=TEXTS[:n], return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(**inputs).pooler_output
        return images, model.get_text_features(**_known(texts)).pooler_output


def _known(texts: Any) -> dict[str, Any]:
    return {k: v for k, v in texts.items() if k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_contract(name: str, tmp_path: Path) -> None:
    model, processor = load_backbone(tiny(BACKBONES[name]))
    images, texts = _features(model, processor)
    assert images.shape == (3, model.config.image_feature_dim)
    assert texts.shape == (3, model.config.text_feature_dim)
    assert images.isfinite().all()
    assert texts.isfinite().all()
    assert (images[0] - images[1]).abs().max() > 1e-4
    assert (texts[0] - texts[1]).abs().max() > 1e-4

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = _features(*load_backbone(str(tmp_path / "saved")))
    assert_same_numbers(again[0], images)
    assert_same_numbers(again[1], texts)

    for alone, together in zip(_features(model, processor, 1), (images, texts), strict=True):
        torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=2e-5)

    _check_attention(model, processor)
    _check_gradients(model, processor)
    _check_lora(model, processor)
    _check_context(*load_backbone(tiny(BACKBONES[name])), tmp_path)


def _check_attention(model: Any, processor: Any) -> None:
    model.set_attn_implementation("eager")
    inputs = processor(images=_images(), return_tensors="pt")
    texts = _known(processor(text=TEXTS, return_tensors="pt"))
    with torch.no_grad():
        vision = model.get_image_features(**inputs, output_attentions=True)
        text = model.get_text_features(**texts, output_attentions=True)
    model.set_attn_implementation("sdpa")
    for tower, output in (("vision", vision), ("text", text)):
        config = getattr(model.config.backbone_config, f"{tower}_config")
        tokens = output.last_hidden_state.shape[1]
        assert len(output.attentions) == config.num_hidden_layers
        for maps in output.attentions:
            assert maps.shape == (3, config.num_attention_heads, tokens, tokens)
            torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def _check_gradients(model: Any, processor: Any) -> None:
    """Every weight of both towers that an output depends on gets one."""
    inputs = processor(images=_images(), return_tensors="pt")
    texts = _known(processor(text=TEXTS, return_tensors="pt"))
    for features in (model.get_image_features(**inputs), model.get_text_features(**texts)):
        weight = torch.linspace(1, 2, features.pooler_output.shape[-1])
        (features.pooler_output * weight).sum().backward()
    for tower in ("vision_model", "text_model"):
        parameters = dict(model.backbone.get_submodule(tower).named_parameters())
        matrices = {
            k: p for k, p in parameters.items() if p.dim() > 1 and p.numel() and "pooler" not in k
        }
        missing = [k for k, p in matrices.items() if p.grad is None or not p.grad.abs().sum() > 0]
        # Masked patches are for pretraining alone; whole segments and rows may be unused.
        assert [k for k in missing if "mask_token" not in k] == []
    model.zero_grad(set_to_none=True)


def _check_lora(model: Any, processor: Any) -> None:
    method = get_method("lora")
    config = method.configure({"r": 2, "last": 0, "projections": "qkvo", "mlp": True})
    tuning = method.attach(model, processor, CLASSES, config)
    model.eval()  # an adapter drops out while it trains
    before = _features(model, processor)
    with torch.no_grad():
        for parameter in tuning.groups[0]["params"]:
            parameter.normal_(std=0.1)
    adapted = _features(model, processor)
    tuning.finish(None)
    merged = _features(model, processor)
    for old, new, kept in zip(before, adapted, merged, strict=True):
        assert (old - new).abs().max() > 1e-4
        torch.testing.assert_close(new, kept, rtol=1e-4, atol=1e-4)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]


def _check_context(model: Any, processor: Any, tmp_path: Path) -> None:
    method = get_method("prompt_tuning")
    config = method.configure({"context_tokens": 3})
    tuning = method.attach(model, processor, CLASSES, config)
    (context,) = tuning.groups[0]["params"]

    def prototypes() -> torch.Tensor:
        actual: torch.Tensor = model.class_prototypes(
            **processor.encode_prompts(tuning.class_texts)
        )
        return actual

    weight = torch.linspace(1, 2, model.config.text_feature_dim)
    (prototypes() * weight).sum().backward()
    assert context.shape == (3, model.config.backbone_config.text_config.hidden_size)
    assert (context.grad.abs().sum(1) > 0).all()
    with torch.no_grad():
        context.normal_(std=0.1)
        learned = prototypes()
        tuning.finish(tmp_path / "adapter")
        torch.testing.assert_close(prototypes(), learned, rtol=1e-4, atol=1e-5)
