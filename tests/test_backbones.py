"""Every way to name a backbone, a sentence for every way to get it wrong, one contract for all."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import published
import pytest
import torch
from PIL import Image
from tiny import CONTEXT, tiny_bert, tiny_clip, tiny_dinov2, tiny_pair, tiny_siglip, tiny_siglip2
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_glovlm import backbones
from hf_glovlm.adapters import get_method
from hf_glovlm.backbones import (
    BACKBONES,
    NOT_VERIFIED,
    Backbone,
    convert_backbone,
    known_rows,
    load_backbone,
    pretraining_notes,
)
from hf_glovlm.cli import main
from hf_glovlm.data import ClassInfo
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
        assert (row.mean is None) == (row.std is None) == (row.kind == "text")
        assert (row.text_context > 0) == (row.kind != "vision")
        assert all((row.pretrained_on, row.license, row.citation, row.magnification))
        assert row.gated or not row.no_derivatives
        assert row.layout in published.LAYOUTS or row.layout in backbones._NATIVE
        assert ("non-commercial" in row.restrictions) == row.non_commercial
        assert row.page == (row.hub_id and f"https://huggingface.co/{row.hub_id}")
    # What the issue of a licence turns on is not left to a slip.
    assert {n for n, row in BACKBONES.items() if row.no_derivatives} == {"conch", "uni", "virchow2"}
    assert {n for n, row in BACKBONES.items() if row.non_commercial} == {
        "conch", "uni", "virchow2", "phikon-v2",
    }  # fmt: skip
    assert len({row.hub_id for row in BACKBONES.values()}) == len(BACKBONES) == 24


# -------------------------------------------------------------------------- one contract for all

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
    assert images.equal(again[0])
    assert texts.equal(again[1])

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
        found: torch.Tensor = model.class_prototypes(**processor.encode_prompts(tuning.prompts))
        return found

    weight = torch.linspace(1, 2, model.config.text_feature_dim)
    (prototypes() * weight).sum().backward()
    assert context.shape == (3, model.config.backbone_config.text_config.hidden_size)
    trained = context.grad.abs().sum(1) > 0
    # The end of a text has the id 2 in mini, for which transformers' CLIP reads the features off
    # at the highest id instead: the context's first token, as the last in the vocabulary.
    assert trained[0] if model.config.backbone_name == "mini" else trained.all()
    with torch.no_grad():
        context.normal_(std=0.1)
        learned = prototypes()
        tuning.finish(tmp_path / "adapter")
        torch.testing.assert_close(prototypes(), learned, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- layouts of others


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def _listen(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.clear()
    said: list[str] = []
    with caplog.at_level(logging.WARNING, logger="hf_glovlm"):
        yield said
    said += [record.getMessage() for record in caplog.records]


def test_a_local_folder_is_converted_once(
    tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published.quiltnet(tmp_path / "QuiltNet-B-32")
    with _listen(caplog) as said:
        model, processor = load_backbone(str(folder))
    assert [line for line in said if "Converting QuiltNet-B-32 once" in line]
    assert model.config.backbone_name == "QuiltNet-B-32"
    assert str(tmp_path) not in json.dumps(model.config.to_dict())
    assert model.name_or_path == ""
    with _listen(caplog) as said:
        again, _ = load_backbone(str(folder))
    assert said == []
    assert _features(model, processor)[0].equal(_features(again, processor)[0])
    made = list(cache_folder.glob("backbones/local/*"))
    assert len(made) == 1
    # Other weights in the same place are another checkpoint.
    published.quiltnet(folder, quick=False)
    other, _ = load_backbone(str(folder))
    assert not _features(model, processor)[0].equal(_features(other, processor)[0])


def test_a_tower_in_a_layout_of_others_pairs(cache_folder: Path, tmp_path: Path) -> None:
    folder = published.virchow2(tmp_path / "Virchow2")
    model, _ = load_backbone(f"{folder}+{tiny_bert()}")
    assert model.config.backbone_name == "Virchow2+tiny_bert"
    assert model.config.backbone_config.vision_config.model_type == "dinov2_with_registers"
    assert str(tmp_path) not in json.dumps(model.config.to_dict())
    with pytest.raises(GloVLMError, match=r"not a dual encoder.*Pair a vision tower"):
        load_backbone(str(folder))


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published.uni(tmp_path / "uni")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "surprise": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(GloVLMError, match="surprise"):
        load_backbone(f"{folder}+{tiny_bert()}")
    assert not [path for path in cache_folder.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "file"))
    folder = published.uni(tmp_path / "uni")
    with pytest.raises(GloVLMError, match=r"cannot be written.*set GLOVLM_CACHE"):
        load_backbone(f"{folder}+{tiny_bert()}")


def test_a_dual_encoder_without_a_tokenizer(cache_folder: Path, tmp_path: Path) -> None:
    folder = published.conch(tmp_path / "conch")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(GloVLMError, match=r"no usable tokenizer.*convert the folder again"):
        load_backbone(str(folder))
    tokenizer = published.conch(tmp_path / "other") / "tokenizer.json"
    tokenizer.rename(folder / "tokenizer.json")
    _, processor = load_backbone(str(folder))
    assert processor.max_length == published.CONTEXT - 1


@pytest.mark.parametrize("layout", published.LAYOUTS)
def test_convert_into_a_folder(layout: str, tmp_path: Path) -> None:
    folder = published.LAYOUTS[layout](tmp_path / layout)
    report = convert_backbone(str(folder), tmp_path / "made")
    assert report.kind == layout
    name = str(tmp_path / "made")
    model, _ = load_backbone(f"{name}+{tiny_bert()}" if layout == "timm" else name)
    assert model.config.backbone_name in ("made", "made+tiny_bert")


def test_the_origin_of_converted_weights_travels(tmp_path: Path) -> None:
    """What `glovlm backbones convert ID` writes knows its checkpoint, commit and licence."""
    folder = published.conch(tmp_path / "conch")
    convert_backbone(str(folder), tmp_path / "made", kind="conch")
    origin = {"hub_id": "MahmoodLab/conch", "revision": "0" * 40}
    (tmp_path / "made" / "backbone.json").write_text(json.dumps(origin))
    model, processor = load_backbone(str(tmp_path / "made"))
    assert model.config.backbone_name == "MahmoodLab/conch"
    assert model.config.backbone_revision == "0" * 40
    assert model.config.backbone_license == "cc-by-nc-nd-4.0"
    assert model.config.backbone_restrictions == ["non-commercial", "no-derivatives"]
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load_backbone(str(tmp_path / "saved"))
    assert again.config.backbone_restrictions == ["non-commercial", "no-derivatives"]


def test_a_licence_is_said_once_a_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "_told", set())
    convert_backbone(str(published.uni(tmp_path / "uni")), tmp_path / "made")
    origin = {"hub_id": "MahmoodLab/UNI", "revision": "0" * 40}
    (tmp_path / "made" / "backbone.json").write_text(json.dumps(origin))
    with _listen(caplog) as said:
        model, _ = load_backbone(f"{tmp_path / 'made'}+{tiny_bert()}")
        load_backbone(f"{tmp_path / 'made'}+{tiny_bert()}")
    assert len(said) == 1
    assert "not for commercial use" in said[0]
    assert "no derivatives" in said[0]
    assert model.config.backbone_restrictions == ["no-derivatives", "non-commercial"]
    assert model.config.backbone_revision == "0" * 40 + "+unknown"


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = tiny_clip(tmp_path)
    state = load_file(place / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(GloVLMError, match=r"'visual_projection.weight' is missing"):
        load_backbone(str(place))


def test_a_text_tower_may_lack_a_pooler_that_nobody_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = tiny_bert(tmp_path)
    state = load_file(place / "model.safetensors")
    without = {k: v for k, v in state.items() if not k.startswith("pooler.")}
    save_file(without, place / "model.safetensors", {"format": "pt"})
    load_backbone(f"{tiny_dinov2()}+{place}")
    with pytest.raises(GloVLMError, match=r"pooler.*is missing"):
        load_backbone(f"{tiny_dinov2()}+{place}", text_pooling="pooler")


# --------------------------------------------------------------------------- the command, notes


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, made = published.quiltnet(tmp_path / "quiltnet"), tmp_path / "made"
    command = ["backbones", "convert", str(folder), "--output-dir", str(made), "--json"]
    assert main([*command, "--kind", "open_clip"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["kind"] == "open_clip"
    assert str(made) in said.err
    load_backbone(str(made))
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*command[:3], "--output-dir", str(tmp_path / "b"), "--kind", "conk"]) == 2
    assert "Did you mean 'conch'" in capsys.readouterr().err
    assert main(["backbones", "convert", "plip", "--output-dir", str(tmp_path / "c")]) == 2
    assert "nothing to convert" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(BACKBONES)
    assert rows["uni"]["stains"] == ["H&E"]
    assert rows["uni"]["restrictions"] == ["non-commercial", "no-derivatives"]
    assert rows["plip"]["license"] == NOT_VERIFIED
    assert main(["backbones"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in BACKBONES)


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("uni", {"stain": "PAS"}, "uni was pretrained on H&E: PAS lies outside"),
        ("uni", {"stain": "H&E"}, None),
        ("conch", {"stain": "silver"}, None),
        ("virchow2", {"stain": "trichrome"}, "H&E and IHC: trichrome lies outside"),
        ("plip", {"stain": "PAS"}, None),
        ("dinov2-small", {"stain": "H&E"}, "no histology in particular"),
        ("minilm", {"stain": "H&E"}, None),
        ("phikon-v2", {"data": "TCGA-KIRC"}, "saw TCGA in pretraining.*contaminated"),
        ("phikon-v2", {"data": "ours"}, None),
        ("uni", {"mpp": 1.2}, "at 0.5 micrometres per pixel.*at 1.2"),
        ("uni", {"mpp": 0.6}, None),
        ("conch", {"mpp": 9.0}, None),
    ],
)
def test_pretraining_notes(name: str, task: dict[str, Any], expected: str | None) -> None:
    notes = pretraining_notes(BACKBONES[name], **task)
    assert len(notes) == (expected is not None)
    assert not expected or re.search(expected, notes[0])


def test_rows_by_the_name_in_a_config() -> None:
    names = [
        row.name for row in known_rows("MahmoodLab/UNI+sentence-transformers/all-MiniLM-L6-v2")
    ]
    assert names == ["uni", "minilm"]
    assert [row.name for row in known_rows("mini")] == ["mini"]
    assert known_rows("somebody/else") == known_rows(None) == []


def test_a_run_says_where_its_task_lies() -> None:
    from datasets import Dataset

    from hf_glovlm.runs import TrainConfig, _pretraining_notes

    model = GloVLMModel(load_backbone("mini")[0].config)
    model.config.backbone_name, model.config.mpp = "MahmoodLab/UNI+somebody/else", 1.0
    adapted: Any = SimpleNamespace(model=model)
    config = TrainConfig(data="/data/GTEx kidney", output_dir="o", stain="Jones silver")
    rows = Dataset.from_dict({"stain": ["PAS", None, "pas", "HE", "no such stain"]})
    notes = _pretraining_notes(adapted, config, rows)
    assert [re.sub(r"[:;].*", "", note) for note in notes] == [
        "uni was pretrained on H&E",
        "uni saw GTEX in pretraining",
        "uni was pretrained at 0.5 micrometres per pixel (20x)",
    ]
    without = _pretraining_notes(adapted, config, rows.remove_columns("stain"))
    assert "silver lies outside of it" in " ".join(without)
