"""Every way to name a backbone, and one sentence for every way to get it wrong."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
from cases import case_of
from fresh_process import inherited, run_forks
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, tiny_bert, tiny_clip, tiny_dinov2, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers
from transformers import AutoModel, AutoTokenizer

from hf_glovlm.backbones import (
    BACKBONES,
    NOT_VERIFIED,
    convert_backbone,
    known_rows,
    load_backbone,
    loading,
    pretraining_notes,
)
from hf_glovlm.backbones.conversion import read_tensors
from hf_glovlm.cli import main
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
        actual = model.backbone.get_submodule(tower).state_dict()
        expected = AutoModel.from_pretrained(folder).state_dict()
        assert actual.keys() == expected.keys()
        assert all(actual[key].equal(value) for key, value in expected.items())


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


DUALS = [tiny_clip, tiny_siglip, tiny_siglip2]


@pytest.mark.parametrize("folder", DUALS)
def test_the_short_way_gives_what_transformers_gives(
    folder: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder()
    expected = AutoModel.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    monkeypatch.setattr(AutoModel, "from_pretrained", None)  # the long way is closed
    model, processor = load_backbone(str(place))
    towers = model.backbone
    for kind in ("named_parameters", "named_buffers"):
        actual, other = (dict(getattr(m, kind)()) for m in (towers, expected))
        assert actual.keys() == other.keys()
        assert all(actual[key].equal(value) for key, value in other.items())
    wants = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in towers.named_parameters()} == wants
    assert not any(module.training for module in towers.modules())
    own = expected.config.to_dict() | {"text_config": {}, "vision_config": {}}
    assert towers.config.to_dict() | {"text_config": {}, "vision_config": {}} == own
    assert towers.config._attn_implementation == expected.config._attn_implementation
    towers.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == expected.state_dict().keys()
    assert str(processor.tokenizer) == str(tokenizer)
    assert processor.tokenizer.init_kwargs == tokenizer.init_kwargs
    assert processor.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_tensor_that_the_model_has_not_is_no_hindrance(tmp_path: Path) -> None:
    """Older CLIP files hold position ids, which are no weight any more."""
    place = tiny_clip(tmp_path)
    tensors = load_file(place / "model.safetensors")
    more = tensors | {"text_model.embeddings.position_ids": torch.arange(CONTEXT)[None]}
    save_file(more, place / "model.safetensors", {"format": "pt"})
    model, _ = load_backbone(str(place))
    assert all(model.backbone.state_dict()[key].equal(value) for key, value in tensors.items())


@pytest.mark.parametrize("legacy", ["special_tokens_map.json", "added_tokens.json", "decoder"])
def test_tokens_listed_in_other_files_are_read(legacy: str, tmp_path: Path) -> None:
    """What versions before 5 wrote beside tokenizer.json, or into tokenizer_config.json."""
    place = tiny_clip(tmp_path)
    if legacy == "decoder":
        settings = json.loads((place / "tokenizer_config.json").read_text())
        token = {"content": "<new>", "special": True, "normalized": False}
        token |= {"lstrip": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = {"460": token}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    elif legacy == "added_tokens.json":
        (place / legacy).write_text(json.dumps({"<new>": 460}))
    else:
        (place / legacy).write_text(json.dumps({"mask_token": "<new>"}))
    expected = AutoTokenizer.from_pretrained(place)
    actual = load_backbone(str(place))[1].tokenizer
    assert "<new>" in actual.get_vocab()
    assert actual.get_vocab() == expected.get_vocab()
    assert str(actual) == str(expected)


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
        assert_same_numbers(model.get_text_features(short).pooler_output, expected)


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


def _no_weights_no_tokenizer(tmp: Path) -> str:
    """Of two faults that of the weights is reported."""
    place = Path(_no_tokenizer(tmp))
    (place / "model.safetensors").unlink()
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
        (_no_weights_no_tokenizer, "no file named model.safetensors"),
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
        assert row.layout in published.LAYOUTS or row.layout in loading._NATIVE
        assert ("non-commercial" in row.restrictions) == row.non_commercial
        assert row.page == (row.hub_id and f"https://huggingface.co/{row.hub_id}")
    assert len({row.hub_id for row in BACKBONES.values()}) == len(BACKBONES)


# Every backbone of BACKBONES: the restrictions of its licence, as read on its page. What may be
# published turns on them, so they are not left to a slip.
RESTRICTED = ("non-commercial", "no-derivatives")
RESTRICTIONS: dict[str, tuple[str, ...]] = {
    "mini": (),
    "clip-vit-b-32": (),
    "clip-vit-b-16": (),
    "clip-vit-l-14": (),
    "pubmedclip": (),
    "plip": (),
    "quiltnet-b-32": (),
    "quiltnet-b-16": (),
    "pathgen-clip": (),
    "biomedclip": (),
    "conch": RESTRICTED,
    "keep": (),
    "siglip-b-16": (),
    "siglip2-b-16": (),
    "medsiglip": (),
    "uni": RESTRICTED,
    "phikon-v2": ("non-commercial",),
    "virchow2": RESTRICTED,
    "hibou-b": (),
    "dinov2-small": (),
    "dinov2-base": (),
    "pubmedbert": (),
    "bioclinicalbert": (),
    "minilm": (),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_restrictions_of_a_licence_are_those_read_on_its_page(name: str) -> None:
    where, what = "RESTRICTIONS in tests/test_backbones.py", "the restrictions of its licence"
    expected = case_of(RESTRICTIONS, name, "BACKBONES", where, what)
    row = BACKBONES[name]
    assert tuple(row.restrictions) == expected
    assert (row.non_commercial, row.no_derivatives) == tuple(r in expected for r in RESTRICTED)


# ------------------------------------------------------------------------- layouts of others


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def _listen(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.clear()
    messages: list[str] = []
    with caplog.at_level(logging.WARNING, logger="hf_glovlm"):
        yield messages
    messages += [record.getMessage() for record in caplog.records]


def _features(model: Any, processor: Any) -> torch.Tensor:
    ids = processor(text=["a viable glomerulus"], return_tensors="pt")
    with torch.no_grad():
        actual: torch.Tensor = model.get_text_features(**ids).pooler_output
    return actual


def test_a_local_folder_is_converted_once(
    tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published.quiltnet(tmp_path / "QuiltNet-B-32")
    with _listen(caplog) as messages:
        model, processor = load_backbone(str(folder))
    assert [line for line in messages if "Converting QuiltNet-B-32 once" in line]
    assert model.config.backbone_name == "QuiltNet-B-32"
    assert str(tmp_path) not in json.dumps(model.config.to_dict())
    assert model.name_or_path == ""
    with _listen(caplog) as messages:
        again, _ = load_backbone(str(folder))
    assert messages == []
    assert_same_numbers(_features(again, processor), _features(model, processor))
    made = list(cache_folder.glob("backbones/local/*"))
    assert len(made) == 1
    # Other weights in the same place are another checkpoint.
    published.quiltnet(folder, quick=False)
    other, _ = load_backbone(str(folder))
    assert (_features(model, processor) - _features(other, processor)).abs().max() > 1e-2


def _add(file: Path, amount: float) -> None:
    """Other weights under a name, a length and a time."""
    status, state = file.stat(), read_tensors(file)
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor += amount
    if file.suffix == ".safetensors":
        save_file(state, file, {"format": "pt"})
    else:
        torch.save(state, file)
    assert file.stat().st_size == status.st_size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_weights_of_the_same_length_and_time_are_converted_again(
    tmp_path: Path, cache_folder: Path
) -> None:
    folder = published.quiltnet(tmp_path / "QuiltNet-B-32")
    model, processor = load_backbone(str(folder))
    (file,) = (path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    _add(file, 0.5)
    other, _ = load_backbone(str(folder))
    assert (_features(model, processor) - _features(other, processor)).abs().max() > 1e-2
    assert len(list(cache_folder.glob("backbones/local/*"))) == 1


def test_damage_of_converted_weights_is_named(
    tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published.quiltnet(tmp_path / "QuiltNet-B-32")
    model, processor = load_backbone(str(folder))
    (kept,) = cache_folder.glob("backbones/local/*")
    _add(kept / "model.safetensors", 0.5)
    with _listen(caplog) as messages:
        again, _ = load_backbone(str(folder))
    assert_same_numbers(_features(again, processor), _features(model, processor))
    assert [line for line in messages if "damaged" in line and "model.safetensors" in line]
    convert_backbone(str(folder), tmp_path / "made")
    _add(tmp_path / "made" / "model.safetensors", 0.5)
    with pytest.raises(GloVLMError, match=r"model\.safetensors' is damaged"):
        load_backbone(str(tmp_path / "made"))


@pytest.mark.long
def test_two_processes_convert_once(tmp_path: Path, cache_folder: Path) -> None:
    folder = published.quiltnet(tmp_path / "QuiltNet-B-32")
    script = "import logging, sys\nfrom hf_glovlm.backbones import load_backbone\n"
    script += "logging.basicConfig()\nload_backbone(sys.argv[1])\n"
    own = inherited() | {"GLOVLM_CACHE": str(cache_folder)}
    ended = run_forks(["-c", script, folder], folder=tmp_path, environments=[own, own])
    assert [one.code for one in ended] == [0, 0], [one.error[-2000:] for one in ended]
    assert sum(one.error.count("Converting QuiltNet-B-32 once") for one in ended) == 1
    (kept,) = cache_folder.glob("backbones/local/*")
    assert not {"unfinished", "journal.json"} & {path.name for path in kept.iterdir()}


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


def test_a_licence_is_logged_once_per_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_warned", set())
    convert_backbone(str(published.uni(tmp_path / "uni")), tmp_path / "made")
    origin = {"hub_id": "MahmoodLab/UNI", "revision": "0" * 40}
    (tmp_path / "made" / "backbone.json").write_text(json.dumps(origin))
    with _listen(caplog) as messages:
        model, _ = load_backbone(f"{tmp_path / 'made'}+{tiny_bert()}")
        load_backbone(f"{tmp_path / 'made'}+{tiny_bert()}")
    assert len(messages) == 1
    assert "not for commercial use" in messages[0]
    assert "no derivatives" in messages[0]
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
    output = capsys.readouterr()
    assert json.loads(output.out)["kind"] == "open_clip"
    assert str(made) in output.err
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


def test_a_run_notes_how_its_task_relates_to_pretraining() -> None:
    from datasets import Dataset

    from hf_glovlm.data.stains import state_stains
    from hf_glovlm.runs import TrainConfig
    from hf_glovlm.runs.workflow import _pretraining_notes

    model = GloVLMModel(load_backbone("mini")[0].config)
    model.config.backbone_name, model.config.mpp = "MahmoodLab/UNI+somebody/else", 1.0
    adapted: Any = SimpleNamespace(model=model)
    config = TrainConfig(data="/data/GTEx kidney", output_dir="o", stain="Jones silver")
    rows = Dataset.from_dict({"stain": ["PAS", None, "pas", "HE", "no such stain"]})
    notes = _pretraining_notes(adapted, config, rows)
    assert [re.sub(r"[:;].*", "", note) for note in notes] == [
        "uni saw GTEX in pretraining",
        "What 'somebody/else' was pretrained on is not known",
        "uni was pretrained at 0.5 micrometres per pixel (20x)",
        "uni was pretrained on H&E",
    ]
    stated, _ = state_stains(Dataset.from_dict({"file_name": ["1.png"]}), config.stain)
    without = _pretraining_notes(adapted, config, stated)
    assert "silver lies outside of it" in " ".join(without)
