"""The model equals the bare transformers modules it wraps, and comes back from disk unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_process import load_without_the_package
from PIL import Image
from tiny import (
    CONTEXT,
    tiny_bert,
    tiny_clip,
    tiny_dinov2,
    tiny_pair,
    tiny_siglip,
    tiny_siglip2,
)
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPTextModel,
    VisionTextDualEncoderConfig,
    pipeline,
)

from hf_glovlm.backbones import load_backbone
from hf_glovlm.model import (
    ClassWeights,
    GloVLMConfig,
    GloVLMForImageClassification,
    GloVLMModel,
    GloVLMProcessor,
    MLPHead,
)

DUAL: dict[str, Callable[..., Path]] = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "siglip2": tiny_siglip2,
}
NAMES = ["mesangial", "sclerosed", "viable"]
TEXTS = ["a sclerosed glomerulus", "viable", "an ischemic tuft, wrinkled, away from the capsule"]
PROMPTS = [["a viable glomerulus"], ["sclerosed", "a globally sclerosed tuft"], ["crescent"]]
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 36 + 4 * i, 3), dtype=np.uint8))
    for i in range(4)
]
LABELS = torch.tensor([0, 1, 2, 1])


def backbone_name(name: str) -> str:
    return tiny_pair() if name == "pair" else str(DUAL[name]())


@pytest.fixture(params=[*DUAL, "pair"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(name: str) -> tuple[GloVLMModel, GloVLMProcessor]:
    """A model with a joint space: a pair gets the projection that adaptation would fit."""
    model, processor = load_backbone(backbone_name(name))
    if name == "pair":
        model.backbone.set_visual_projection(torch.randn(32, 64) / 8, torch.randn(32) / 8)
    return model, processor


@pytest.fixture
def classifier(loaded: tuple[GloVLMModel, GloVLMProcessor]) -> GloVLMForImageClassification:
    return with_head(loaded[0])


def with_head(model: GloVLMModel, head: nn.Module | None = None) -> GloVLMForImageClassification:
    config = model.config
    config.id2label = dict(enumerate(NAMES))
    config.label2id = {name: k for k, name in enumerate(NAMES)}
    config.prompts, config.temperature = PROMPTS, 1.5
    if head is None:
        head = MLPHead(config.image_feature_dim, 3, hidden=16)
        nn.init.normal_(head.layers[1].running_mean)  # so that a lost buffer shows
    return GloVLMForImageClassification(config, glovlm=model, head=head).eval()


def pixels(processor: Any) -> dict[str, Tensor]:
    return dict(processor(images=IMAGES, return_tensors="pt"))


def tokens(processor: Any, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(processor(text=texts, return_tensors="pt"))


@torch.no_grad()
def logits_of(model: Any, processor: Any) -> Tensor:
    output: Tensor = model(**pixels(processor)).logits
    return output


# ------------------------------------------------------------------ equal to the bare modules


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_dual_encoders_equal_the_bare_module(name: str) -> None:
    folder = DUAL[name]()
    model, processor = load_backbone(str(folder))
    bare = AutoModel.from_pretrained(folder).eval()
    images = AutoImageProcessor.from_pretrained(folder)(images=IMAGES, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "clip":
        texts = tokenizer(TEXTS, padding=True, return_tensors="pt")
    else:  # as its authors use it: padded to the full context, without a mask
        padded = tokenizer(TEXTS, padding="max_length", max_length=CONTEXT, return_tensors="pt")
        texts = {"input_ids": padded["input_ids"]}
    vision, text = bare.get_image_features(**images), bare.get_text_features(**texts)
    actual = model.get_image_features(**pixels(processor))
    assert_same_numbers(actual.pooler_output, vision.pooler_output)
    assert_same_numbers(actual.last_hidden_state, vision.last_hidden_state)
    actual = model.get_text_features(**tokens(processor))
    assert_same_numbers(actual.pooler_output, text.pooler_output)
    assert vision.pooler_output.shape[1] == model.config.image_feature_dim
    assert text.pooler_output.shape[1] == model.config.text_feature_dim
    expected = bare(**images, **texts)
    both = model(**pixels(processor), **tokens(processor))
    for key in ("logits_per_image", "image_embeds", "text_embeds"):
        assert_same_numbers(both[key], expected[key])


@pytest.mark.parametrize("text_pooling", ["pooler", "cls", "mean"])
@pytest.mark.parametrize("vision_pooling", ["pooler", "cls", "mean", "cls_mean"])
@torch.no_grad()
def test_pairs_equal_the_bare_towers(vision_pooling: str, text_pooling: str) -> None:
    model, processor = load_backbone(
        tiny_pair(), vision_pooling=vision_pooling, text_pooling=text_pooling
    )
    images, texts = pixels(processor), tokens(processor)
    vision = AutoModel.from_pretrained(tiny_dinov2()).eval()(**images)
    text = AutoModel.from_pretrained(tiny_bert()).eval()(**texts)
    patches = vision.last_hidden_state[:, 1:]
    mask = texts["attention_mask"].bool()
    expected_image = {
        "pooler": vision.pooler_output,
        "cls": vision.last_hidden_state[:, 0],
        "mean": patches.sum(1) / 16,
        "cls_mean": torch.cat([vision.last_hidden_state[:, 0], patches.sum(1) / 16], 1),
    }[vision_pooling]
    expected_text = {
        "pooler": text.pooler_output,
        "cls": text.last_hidden_state[:, 0],
        "mean": torch.stack(
            [states[m].mean(0) for states, m in zip(text.last_hidden_state, mask, strict=True)]
        ),
    }[text_pooling]
    actual = model.get_image_features(**images).pooler_output
    unit = expected_image / expected_image.norm(dim=1, keepdim=True)
    assert_same_numbers(actual, unit)
    actual = model.get_text_features(**texts).pooler_output
    assert_same_numbers(actual, expected_text)
    assert expected_image.shape[1] == model.config.vision_pooled_dim
    assert expected_text.shape[1] == model.config.text_feature_dim


def pair_config(**kwargs: Any) -> GloVLMConfig:
    towers = VisionTextDualEncoderConfig(
        vision_config=AutoConfig.from_pretrained(tiny_dinov2()).to_dict(),
        text_config=AutoConfig.from_pretrained(kwargs.pop("text", tiny_bert())).to_dict(),
    )
    return GloVLMConfig(
        backbone_config=towers, **{"vision_pooling": "cls", "text_pooling": "mean", **kwargs}
    )


@pytest.mark.parametrize("vision_projection", ["none", "linear", "mlp"])
@pytest.mark.parametrize("text_projection", ["linear", "mlp"])
@torch.no_grad()
def test_projections(vision_projection: str, text_projection: str) -> None:
    config = pair_config(
        vision_projection=vision_projection, text_projection=text_projection, projection_dim=20
    )
    model = GloVLMModel(config).eval()
    _, processor = load_backbone(tiny_pair())
    images, texts = pixels(processor), tokens(processor)
    vision = model.backbone.vision_model(**images).last_hidden_state[:, 0]
    states, mask = model.backbone.text_model(**texts).last_hidden_state, texts["attention_mask"]
    text = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    weights = dict(model.backbone.named_parameters())

    def project(x: Tensor, kind: str, prefix: str) -> Tensor:
        layers = {"none": [], "linear": [""], "mlp": [".0", ".2"]}[kind]
        for i, layer in enumerate(layers):
            x = nn.functional.gelu(x) if i else x
            x = x @ weights[f"{prefix}{layer}.weight"].T + weights[f"{prefix}{layer}.bias"]
        return x

    actual = model.get_image_features(**images).pooler_output
    expected = project(vision, vision_projection, "visual_projection")
    assert_same_numbers(actual, expected)
    assert actual.shape[1] == config.image_feature_dim
    actual = model.get_text_features(**texts).pooler_output
    expected = project(text, text_projection, "text_projection")
    assert_same_numbers(actual, expected)
    assert actual.shape[1] == config.text_feature_dim == 20


@torch.no_grad()
def test_a_text_tower_pooled_at_its_end_token() -> None:
    bare = CLIPTextModel.from_pretrained(tiny_clip()).eval()
    towers = VisionTextDualEncoderConfig(
        vision_config=AutoConfig.from_pretrained(tiny_dinov2()).to_dict(),
        text_config=bare.config.to_dict(),
    )
    config = GloVLMConfig(backbone_config=towers, vision_pooling="cls", text_pooling="eos")
    model = GloVLMModel(config).eval()
    model.backbone.text_model.load_state_dict(bare.state_dict())
    texts = AutoTokenizer.from_pretrained(tiny_clip())(TEXTS, padding=True, return_tensors="pt")
    actual = model.get_text_features(**texts).pooler_output
    assert_same_numbers(actual, bare(**texts).pooler_output)  # CLIP's own pooling


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"text_pooling": "eos"}, "needs an eos_token_id"),
        ({"vision_projection": "linear"}, "needs projection_dim"),
    ],
)
def test_poolings_that_cannot_be(kwargs: dict[str, Any], sentence: str) -> None:
    _, processor = load_backbone(tiny_pair())
    with pytest.raises(ValueError, match=sentence):
        GloVLMModel(pair_config(**kwargs)).get_text_features(**tokens(processor))


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"prompts": [["a"]], "head": {}, "num_labels": 3}, "3 classes, 1 lists"),
        ({"vision_pooling": "max"}, "one of pooler, cls, mean, cls_mean, attentional; found 'max'"),
        ({"text_pooling": "cls_mean"}, "text_pooling must be one of"),
        ({"vision_projection": "affine"}, "one of none, linear, mlp; found 'affine'"),
    ],
)
def test_configurations_that_cannot_be(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pair_config(**kwargs)


@torch.no_grad()
def test_project_after_pool_is_the_feature(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    images = pixels(processor)
    pooled = model.pool_images(**images)
    assert pooled.shape == (4, model.config.vision_pooled_dim)
    features = model.get_image_features(**images).pooler_output
    assert_same_numbers(model.project_images(pooled), features)


@torch.no_grad()
def test_class_prototypes(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    actual = model.class_prototypes(**processor.encode_prompts(PROMPTS))
    for k, texts in enumerate(PROMPTS):
        features = model.get_text_features(**tokens(processor, texts)).pooler_output.numpy()
        mean = np.mean([f / np.linalg.norm(f) for f in features], axis=0)
        np.testing.assert_allclose(actual[k], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
@torch.no_grad()
def test_siglip_texts_are_padded_whoever_tokenised_them(name: str) -> None:
    model, processor = load_backbone(backbone_name(name))
    expected = model.get_text_features(**tokens(processor)).pooler_output
    short = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert short["input_ids"].shape[1] < CONTEXT
    assert_same_numbers(model.get_text_features(**short).pooler_output, expected)
    for text, row in zip(TEXTS, expected, strict=True):
        alone = model.get_text_features(**processor.tokenizer(text, return_tensors="pt"))
        torch.testing.assert_close(alone.pooler_output[0], row, atol=1e-5, rtol=1e-4)


def test_long_texts_are_cut(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    ids = tokens(processor, [" ".join(TEXTS * 9), "viable"])["input_ids"]
    assert ids.shape == (2, CONTEXT)
    assert model.get_text_features(ids).pooler_output.isfinite().all()


def test_a_learned_context_stands_after_the_start_token() -> None:
    processor = load_backbone(backbone_name("clip"))[1]
    plain = processor.encode_prompts(PROMPTS)
    assert plain["class_index"].tolist() == [0, 1, 1, 2]
    processor.context_token_ids = [460, 461]
    unified = processor.encode_prompts(PROMPTS)
    assert unified["input_ids"][:, 1:3].tolist() == [[460, 461]] * 4
    without = torch.cat([unified["input_ids"][:, :1], unified["input_ids"][:, 3:]], 1)
    assert without.equal(plain["input_ids"])
    assert unified["attention_mask"].sum(1).equal(plain["attention_mask"].sum(1) + 2)
    processor.context_token_ids = [[460], [461], [462]]
    per_class = processor.encode_prompts(PROMPTS)
    assert per_class["input_ids"][:, 1].tolist() == [460, 461, 461, 462]


def test_two_towers_without_a_joint_space_are_not_compared() -> None:
    model, processor = load_backbone(tiny_pair())
    assert not model.has_joint_space
    with pytest.raises(ValueError, match="never trained together"):
        model(**pixels(processor), **tokens(processor))


def test_images_and_texts_are_both_needed(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="give pixel_values and input_ids"):
        loaded[0](**tokens(loaded[1]))


# ------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("head", ["mlp", "class_weights"])
def test_save_and_load_is_exact(loaded: tuple[Any, Any], tmp_path: Path, head: str) -> None:
    model, processor = loaded
    weights = ClassWeights(model.config.image_feature_dim, 3, normalize=False, cosine=True)
    nn.init.normal_(weights.weight)
    saved = with_head(model, weights if head == "class_weights" else None)
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    read = GloVLMForImageClassification.from_pretrained(tmp_path)
    assert not read.training
    assert type(read.head) is type(saved.head)
    assert read.state_dict().keys() == saved.state_dict().keys()
    assert all(value.equal(read.state_dict()[key]) for key, value in saved.state_dict().items())
    again = GloVLMProcessor.from_pretrained(tmp_path)
    assert_same_numbers(logits_of(read, again), logits_of(saved, processor))
    texts = model.get_text_features(**tokens(processor)).pooler_output
    assert_same_numbers(read.glovlm.get_text_features(**tokens(again)).pooler_output, texts)
    for field in ("id2label", "prompts", "temperature", "head", "vision_pooling", "backbone_name"):
        assert getattr(read.config, field) == getattr(saved.config, field), field
    assert (again.max_length, again.pad_to_max) == (processor.max_length, processor.pad_to_max)


def test_auto_classes(classifier: Any, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    classifier.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GloVLMConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is GloVLMProcessor
    images = AutoImageProcessor.from_pretrained(tmp_path)
    assert images.to_dict() == processor.image_processor.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS)["input_ids"] == processor.tokenizer(TEXTS)["input_ids"]
    read = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_numbers(logits_of(read, processor), logits_of(classifier, processor))
    expected = model.get_image_features(**pixels(processor)).pooler_output
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        read, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(read) is GloVLMModel
        assert not report["missing_keys"]
        actual = read.get_image_features(**pixels(processor)).pooler_output
        assert_same_numbers(actual, expected)


def test_every_weight_survives_being_wrapped(tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(tiny_clip())
    for parameter in bare.parameters():
        nn.init.constant_(parameter, 0.125)
    model = with_head(GloVLMModel(GloVLMConfig(backbone_config=bare.config), backbone=bare))
    model.save_pretrained(tmp_path)
    for read in (model, GloVLMForImageClassification.from_pretrained(tmp_path)):
        assert all((p == 0.125).all() for p in read.glovlm.parameters())


def test_a_folder_in_half_precision(
    classifier: Any, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    expected = {k: v.half().float() for k, v in classifier.glovlm.state_dict().items()}
    classifier.half().save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert value.float().equal(expected[key].float()), key
    assert model.get_image_features(**pixels(loaded[1])).pooler_output.dtype == torch.float32


TOWERS = """
from transformers import AutoModel
towers = AutoModel.from_pretrained(folder, trust_remote_code=True)
prompts = processor.encode_prompts(model.config.prompts)
found["prototypes"] = towers.class_prototypes(**prompts).tolist()
task = "zero-shot-image-classification"
compare = pipeline(task, model=str(folder), trust_remote_code=True)
rows = compare(image, candidate_labels=["viable", "sclerosed"])
found["compared"] = [row["label"] for row in rows]
found["module"] = type(model).__module__.split(".")[0]
"""


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.long)])
def test_remote_code_without_the_package(fresh: bool, tmp_path: Path) -> None:
    expected, folders = {}, []
    for name in [*DUAL, "pair", "outlined"]:
        model, processor = load_backbone(backbone_name("clip" if name == "outlined" else name))
        image = IMAGES[0].copy()
        if name == "pair":
            model.backbone.set_visual_projection(torch.randn(32, 64), torch.randn(32))
        if name == "outlined":
            model.config.outline = processor.outline = "blank+pool"
            alpha = Image.new("L", image.size)
            alpha.paste(255, (6, 8, 30, 34))
            image.putalpha(alpha)
        saved = with_head(model)
        folders.append(tmp_path / name)
        saved.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
        image.save(folders[-1] / "image.png")
        with torch.no_grad():
            inputs = processor(images=[image], return_tensors="pt")
            text = model.class_prototypes(**processor.encode_prompts(PROMPTS))
            expected[name] = saved(**inputs).logits[0].tolist(), text.tolist()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = load_without_the_package(folders, elsewhere, TOWERS, fresh=fresh)
    for name, (logits, text) in expected.items():
        actual = result[name]
        assert actual["module"] == "transformers_modules"
        assert_same_numbers(actual["logits"], logits)
        assert_same_numbers(actual["prototypes"], text)
        probabilities = dict(zip(NAMES, torch.tensor(logits).softmax(0).tolist(), strict=True))
        assert actual["scores"] == pytest.approx(probabilities, abs=1e-5)
        assert next(iter(actual["scores"])) == NAMES[int(np.argmax(logits))]
        assert set(actual["compared"]) == {"viable", "sclerosed"}


# ---------------------------------------------------------------------------------- pipelines


def test_image_classification_pipeline(
    classifier: Any, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    expected = logits_of(classifier, loaded[1])[0].softmax(0)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for classify in (
        pipeline("image-classification", model=str(tmp_path)),
        pipeline(
            "image-classification", model=classifier, image_processor=processor.image_processor
        ),
    ):
        actual = {row["label"]: row["score"] for row in classify(IMAGES[0])}
        assert actual == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5)


def test_zero_shot_pipeline(classifier: Any, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, own = loaded
    classifier.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    with torch.no_grad():
        inputs = own(images=IMAGES[:1], text=TEXTS, return_tensors="pt")
        expected = model(**inputs).logits_per_image[0].softmax(0)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for compare in (
        pipeline("zero-shot-image-classification", model=str(tmp_path)),
        pipeline(
            "zero-shot-image-classification",
            model=model,
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
        ),
    ):
        rows = compare(IMAGES[0], candidate_labels=TEXTS, hypothesis_template="{}")
        actual = {row["label"]: row["score"] for row in rows}
        assert actual == pytest.approx(dict(zip(TEXTS, expected.tolist(), strict=True)), abs=1e-5)


# ---------------------------------------------------------------------------------- attention


def test_sdpa_is_the_default_and_equals_eager(
    classifier: Any, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    processor = loaded[1]

    def back_ends(model: Any) -> set[str]:
        towers = (model.glovlm.backbone.vision_model, model.glovlm.backbone.text_model)
        return {tower.config._attn_implementation for tower in towers}

    assert back_ends(classifier) == {"sdpa"}  # wrapping loaded towers must not reset it
    classifier.save_pretrained(tmp_path)
    for back_end in ("sdpa", "eager"):
        read = GloVLMForImageClassification.from_pretrained(tmp_path, attn_implementation=back_end)
        assert back_ends(read) == {back_end}
        torch.testing.assert_close(
            logits_of(read, processor), logits_of(classifier, processor), atol=1e-5, rtol=1e-4
        )
    classifier.set_attn_implementation("eager")
    assert back_ends(classifier) == {"eager"}


@torch.no_grad()
def test_attentions_and_hidden_states(
    name: str, loaded: tuple[Any, Any], classifier: Any, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path)
    eager = GloVLMForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    images, texts = pixels(loaded[1]), tokens(loaded[1])
    length = 17 if name in ("clip", "pair") else 16
    actual = eager(**images, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in actual.attentions] == [(4, 4, length, length)] * 2
    assert [h.shape for h in actual.hidden_states] == [(4, length, 32)] * 3
    assert actual.attentions[0].sum(-1).allclose(torch.ones(()), atol=1e-5)
    both = eager.glovlm(**images, **texts, output_attentions=True)
    words = texts["input_ids"].shape[1]
    assert [a.shape for a in both.vision_model_output.attentions] == [(4, 4, length, length)] * 2
    assert [a.shape for a in both.text_model_output.attentions] == [(3, 4, words, words)] * 2
    assert actual.to_tuple()[0].equal(eager(**images, return_dict=False)[0])


@pytest.mark.parametrize("name", ["clip", "siglip", "pair"])
@torch.no_grad()
def test_another_image_size(name: str, loaded: tuple[Any, Any], classifier: Any) -> None:
    large = torch.rand(2, 3, 48, 64)
    actual = classifier(large, interpolate_pos_encoding=True, output_hidden_states=True)
    assert actual.logits.shape == (2, 3)
    assert actual.hidden_states[0].shape[1] - 48 in (0, 1)  # 6 x 8 patches
    if name != "pair":
        bare = AutoModel.from_pretrained(DUAL[name]())
        expected = bare.get_image_features(large, interpolate_pos_encoding=True).pooler_output
        assert_same_numbers(actual.image_embeds, expected)
        with pytest.raises((ValueError, RuntimeError), match=r"doesn't match|must match"):
            classifier(large)


# ----------------------------------------------------------------------------------- training


def test_labels_give_a_loss(classifier: Any, loaded: tuple[Any, Any]) -> None:
    with torch.no_grad():
        actual = classifier(**pixels(loaded[1]), labels=LABELS)
        raw = classifier.head(actual.image_embeds)
    assert_same_numbers(actual.logits, raw / 1.5)
    chosen = actual.logits.softmax(-1)[torch.arange(4), LABELS]
    torch.testing.assert_close(actual.loss, -chosen.log().mean())
    assert logits_of(classifier, loaded[1]).equal(actual.logits)


def _binary(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy as the formula states it, in double precision."""
    p = logits.double().sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()


@pytest.mark.parametrize(
    ("problem_type", "labels", "by_hand"),
    [
        (
            "single_label_classification",
            torch.tensor([0, 2, 1, 0]),
            lambda z, y: -z.double().log_softmax(1)[torch.arange(4), y].mean(),
        ),
        ("multi_label_classification", torch.tensor([[1.0, 1, 0]] * 3 + [[0, 0, 1]]), _binary),
        (None, torch.tensor([[0.0, 1, 0]] * 2 + [[1, 0, 1]] * 2), _binary),
        (
            "regression",
            torch.arange(12.0).reshape(4, 3) / 10,
            lambda z, y: ((z.double() - y) ** 2).mean(),
        ),
    ],
)
def test_the_loss_follows_the_problem_type(
    problem_type: str | None,
    labels: Tensor,
    by_hand: Any,
    classifier: Any,
    loaded: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classifier.config, "problem_type", problem_type)
    with torch.no_grad():
        found = classifier(**pixels(loaded[1]), labels=labels)
    assert float(found.loss) == pytest.approx(float(by_hand(found.logits, labels)), rel=1e-5)


def test_contrastive_loss(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = processor(images=IMAGES[:3], text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        actual = model(**inputs, return_loss=True)
    logits = actual.logits_per_image
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    expected = -(rows.mean() + columns.mean()) / 2
    if hasattr(model.backbone, "logit_bias"):  # SigLIP: each pair by itself
        together = 2 * torch.eye(len(logits)) - 1
        expected = -(together * logits).sigmoid().log().sum() / len(logits)
    torch.testing.assert_close(actual.loss, expected)
    assert actual.logits_per_text.T.equal(logits)


def gradients(model: Any, processor: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**pixels(processor), labels=LABELS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(classifier: Any, loaded: tuple[Any, Any]) -> None:
    classifier.train().head.eval()  # its dropout is random
    expected = gradients(classifier, loaded[1])
    assert any("vision_model" in name for name in expected)
    passes: list[int] = []
    blocks = classifier.glovlm.backbone.vision_model.encoder
    norm = next(module for module in blocks.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients(classifier, loaded[1])
    assert len(passes) == 1
    classifier.activation_checkpointing_enable()
    actual = gradients(classifier, loaded[1])
    assert len(passes) == 3  # forward, and once more on the way back
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-6, rtol=1e-4, msg=key)


def trained(model: Any, processor: Any, folder: Path, batch_size: int, accumulate: int) -> Any:
    """`transformers.Trainer`, two steps of plain gradient descent on all four images each."""
    from transformers import Trainer, TrainingArguments

    images = pixels(processor)
    rows = [
        {**{key: value[i] for key, value in images.items()}, "labels": LABELS[i]} for i in range(4)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.01,
        max_grad_norm=0,  # clipping would hide a gradient that is too large
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert np.isfinite(trainer.train().training_loss)
    return trainer.predict(rows)


def test_trainer(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    head = ClassWeights(model.config.image_feature_dim, 3)
    nn.init.normal_(head.weight)
    classifier = with_head(model, head)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    ends = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        classifier.load_state_dict(start)
        actual = trained(classifier, processor, tmp_path, batch_size, accumulate)
        assert actual.metrics["test_loss"] > 0
        expected = logits_of(classifier.eval(), processor)
        np.testing.assert_allclose(actual.predictions, expected, atol=1e-5)
        ends.append({name: value.clone() for name, value in classifier.state_dict().items()})
    moved = {name for name, value in ends[0].items() if not value.equal(start[name])}
    assert "head.weight" in moved
    assert any("vision_model" in name for name in moved)
    assert not any("text_model" in name for name in moved)
    for end in ends[1:]:
        for name, value in end.items():
            torch.testing.assert_close(value, ends[0][name], atol=1e-5, rtol=1e-4, msg=name)
