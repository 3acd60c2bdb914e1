"""Every way to name a backbone, and one sentence for every way to get it wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, tiny_bert, tiny_clip, tiny_dinov2, tiny_pair, tiny_siglip, tiny_siglip2
from transformers import AutoModel

from hf_glovlm.backbones import BACKBONES, load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.model import GloVLMForImageClassification, GloVLMModel, GloVLMProcessor


@pytest.mark.parametrize(
    ("folder", "pad_to_max"), [(tiny_clip, False), (tiny_siglip, True), (tiny_siglip2, True)]
)
def test_a_folder_with_a_dual_encoder(folder: Callable[[], Path], pad_to_max: bool) -> None:
    model, processor = load_backbone(str(folder()))
    assert type(model) is GloVLMModel
    assert type(processor) is GloVLMProcessor
    assert not model.training
    assert model.has_joint_space
    assert not model.config.is_pair
    assert model.config.backbone_name == folder().name
    assert (processor.max_length, processor.pad_to_max) == (CONTEXT, pad_to_max)
    expected = AutoModel.from_pretrained(folder()).state_dict()
    assert all(model.backbone.state_dict()[key].equal(value) for key, value in expected.items())


def test_a_pair() -> None:
    model, processor = load_backbone(f"{tiny_dinov2()} + {tiny_bert()}")
    assert not model.training
    assert not model.has_joint_space
    assert model.config.is_pair
    assert model.config.backbone_name == "tiny_dinov2+tiny_bert"
    config = model.config
    assert (config.vision_pooling, config.text_pooling) == ("cls_mean", "mean")
    assert config.normalize_pooled
    assert (processor.max_length, processor.pad_to_max) == (CONTEXT, False)
    for tower, folder in (("vision_model", tiny_dinov2()), ("text_model", tiny_bert())):
        found = model.backbone.get_submodule(tower).state_dict()
        expected = AutoModel.from_pretrained(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(found[key].equal(value) for key, value in expected.items())


def test_pooling_of_a_pair_can_be_chosen() -> None:
    model, _ = load_backbone(tiny_pair(), vision_pooling="mean", text_pooling="cls")
    assert (model.config.vision_pooling, model.config.text_pooling) == ("mean", "cls")


def test_a_plus_in_the_name_of_a_folder(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path).rename(tmp_path / "clip+pathology")
    assert load_backbone(str(folder))[0].config.backbone_name == "clip+pathology"


def test_a_folder_that_this_package_saved(tmp_path: Path) -> None:
    model, processor = load_backbone(tiny_pair())
    model.backbone.set_visual_projection(torch.randn(32, 64), torch.randn(32))
    GloVLMForImageClassification(model.config, glovlm=model).save_pretrained(tmp_path)
    processor.context_token_ids = [130, 131]
    processor.save_pretrained(tmp_path)
    read, again = load_backbone(str(tmp_path))
    assert type(read) is GloVLMModel
    assert not read.training
    assert read.has_joint_space
    assert read.config.backbone_name == model.config.backbone_name
    assert again.context_token_ids == [130, 131]
    assert read.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(read.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("folder", [tiny_clip, tiny_siglip])
def test_weights_stored_in_half_precision_come_back_in_single(
    folder: Callable[[Path], Path], tmp_path: Path
) -> None:
    place = folder(tmp_path)
    AutoModel.from_pretrained(place).half().save_pretrained(place)
    model, _ = load_backbone(str(place))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_siglip_is_padded_as_its_tokenizer_pads(tmp_path: Path) -> None:
    """Published SigLIP 2 files leave the id to a default that is another token for them."""
    place = tiny_siglip2(tmp_path)
    config = json.loads((place / "config.json").read_text())
    config["text_config"]["pad_token_id"] = 7
    (place / "config.json").write_text(json.dumps(config))
    model, processor = load_backbone(str(place))
    text = "a sclerosed glomerulus"
    full = processor(text=[text], return_tensors="pt")["input_ids"]
    assert (full == processor.tokenizer.pad_token_id).sum() > 20
    short = processor.tokenizer([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.get_text_features(full).pooler_output
        assert model.get_text_features(short).pooler_output.equal(expected)


def _no_config(tmp: Path) -> str:
    (tmp / "notes.txt").write_text("nothing here")
    return str(tmp)


def _no_weights(tmp: Path) -> str:
    place = tiny_clip(tmp)
    (place / "model.safetensors").unlink()
    return str(place)


def _broken_config(tmp: Path) -> str:
    place = tiny_clip(tmp)
    (place / "config.json").write_text("{")
    return str(place)


def _broken_weights(tmp: Path) -> str:
    place = tiny_clip(tmp)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return str(place)


def _no_tokenizer(tmp: Path) -> str:
    place = tiny_clip(tmp)
    for file in place.glob("tokenizer*"):
        file.unlink()
    return str(place)


def _no_transform(tmp: Path) -> str:
    place = tiny_clip(tmp)
    (place / "preprocessor_config.json").unlink()
    return str(place)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (lambda tmp: "minni", "Unknown backbone 'minni'.* Did you mean 'mini'"),
        (lambda tmp: "clip-vit-b32", "Did you mean 'clip-vit-b-32'"),
        (lambda tmp: str(tmp / "absent"), "no folder here"),
        (lambda tmp: "./absent", "no folder here"),
        (lambda tmp: "nobody/has-this", "'nobody/has-this' cannot be loaded"),
        (_no_config, "holds no model: expected config.json"),
        (_no_weights, "cannot be loaded"),
        (_broken_config, "cannot be loaded"),
        (_broken_weights, "cannot be loaded"),
        (_no_tokenizer, "no usable tokenizer"),
        (_no_transform, "cannot be loaded"),
        (lambda tmp: str(tiny_dinov2()), r"'dinov2' model, not a dual encoder.*VISION\+TEXT"),
        (lambda tmp: str(tiny_bert()), "'bert' model, not a dual encoder"),
        (lambda tmp: f"{tiny_bert()}+{tiny_dinov2()}", "Put the vision tower first"),
        (lambda tmp: f"{tiny_dinov2()}+{tiny_dinov2()}", "A pair is a vision tower"),
        (lambda tmp: f"{tiny_bert()}+{tiny_bert()}", "A pair is a vision tower"),
        (lambda tmp: f"{tiny_dinov2()}+minilmm", "Did you mean 'minilm'"),
        (lambda tmp: f"{tiny_dinov2()}+", "A pair is .*name both"),
        (lambda tmp: f" +{tiny_bert()}", "A pair is .*name both"),
        (lambda tmp: f"{tiny_clip()}+{tiny_bert()}", "vision tower"),
        (lambda tmp: " ", "No backbone was named"),
    ],
)
def test_names_that_mean_nothing(
    tmp_path: Path, name: Callable[[Path], str], sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence) as caught:
        load_backbone(name(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"vision_pooling": "man"}, "expected one of pooler, cls.* Did you mean 'mean'"),
        ({"text_pooling": "cls_mean"}, "expected one of .*eos"),
    ],
)
def test_poolings_that_do_not_exist(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        load_backbone(tiny_pair(), **kwargs)


def test_the_table() -> None:
    assert next(iter(BACKBONES)) == "mini"
    for name, row in BACKBONES.items():
        assert row.name == name == name.lower()
        assert row.kind in {"dual", "vision", "text"}
        assert row.hub_id is None or row.hub_id.count("/") == 1
        assert (row.image_size > 0) == (row.kind != "text")
        assert (row.text_context > 0) == (row.kind != "vision")
        assert all((row.pretrained_on, row.license, row.citation))
