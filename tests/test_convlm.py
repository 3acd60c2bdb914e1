"""ConVLM as a method: its losses, its recipe, its controls, and that no label reaches prediction.

As a script, this file is what each of two processes runs.
"""

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from attaching import CLASSES, NAMES, adapt_with
from by_hand import pixels
from datasets import Dataset
from fresh_process import load_without_the_package, run_two_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distributed import furthest
from tiny import tiny_bert, tiny_clip, tiny_dinov2, tiny_images, tiny_pair, tiny_siglip
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import predict
from hf_glovlm.lab.benches.context import _block_operations, bench_context
from hf_glovlm.lab.benches.towers import Shape
from hf_glovlm.methods import METHODS, Recipe, TowerMethod, give_joint_space
from hf_glovlm.model import GloVLMForImageClassification
from hf_glovlm.training import Adapted, adapt, adaptation
from hf_glovlm.training.loop import TensorSource, _optimizer, draw_order, fit, learning_rate, plan
from hf_glovlm.training.losses import HeadStep, TowerStep

LABELS = torch.tensor([0, 1, 2, 2, 1])
PLAIN = {"context": "none", "keep": 1.0}
FEW = {"autoencoder_steps": 20}
QUICK = {"epochs": 3, "batch_size": 6, "lr": 1e-3}


def _vit(config: Any, model: Any, folder: Path) -> str:
    """A pair of a vision transformer and the small BERT."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
        shutil.copy(tiny_dinov2() / "preprocessor_config.json", folder)
    return f"{folder}+{tiny_bert()}"


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tower of each family, as `--backbone` takes it."""
    folder = tmp_path_factory.mktemp("towers")
    registers = Dinov2WithRegistersConfig(**_SIZES, mlp_ratio=2, num_register_tokens=4)
    return {
        "clip": str(tiny_clip()),
        "pair": tiny_pair(),
        "registers": _vit(registers, Dinov2WithRegistersModel, folder / "registers"),
        "vit": _vit(ViTConfig(**_SIZES, intermediate_size=64), ViTModel, folder / "vit"),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "support", per_class=4)


@pytest.fixture(scope="module")
def rows(images: Path) -> Dataset:
    """Three classes, four images each."""
    return all_rows(load_dataset(images))


def with_captions(rows: Dataset, texts: list[str]) -> Dataset:
    kept = rows.remove_columns([c for c in ("caption",) if c in rows.column_names])
    return kept.add_column("caption", texts)


def quick(
    backbone: str, rows: Dataset, dtype: torch.dtype = torch.float32, **options: Any
) -> Adapted:
    """Adapt with ConVLM in a few small steps.

    In float64 where two ways to the same weights are compared: AdamW divides by the size of a
    gradient, which would blow up what rounding leaves.
    """
    model, processor = load_backbone(backbone)
    model.to(dtype)
    given: dict[str, Any] = {"processor": processor, "classes": CLASSES, "recipe": QUICK}
    given["method_config"] = {**FEW, **options.pop("method_config", {})}
    return adapt_with(model, "convlm", rows, **{**given, **options})


def method() -> TowerMethod:
    actual = METHODS["convlm"]
    assert isinstance(actual, TowerMethod)
    return actual


def attached(backbone: str, **settings: Any) -> tuple[Any, Any, TowerMethod]:
    """A model in float64 with the method attached and autoencoders that show."""
    model, processor = load_backbone(backbone)
    torch.manual_seed(0)
    if model.config.is_pair:
        texts = nn.functional.normalize(torch.randn(3, 32), dim=-1)
        give_joint_space(model, torch.randn(6, 64), torch.arange(6) % 3, texts)
    model.double().requires_grad_(False)
    tuning = method().attach(model, processor, CLASSES, method().configure(settings))
    for parameter in model.context.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, processor, tuning


def weights(adapted: Adapted) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in adapted.model.state_dict().items()}


def logits(adapted: Adapted) -> Tensor:
    with torch.no_grad():
        actual: Tensor = adapted.model(**pixels(adapted.processor, adapted.model.dtype)).logits
    return actual


# -------------------------------------------------------------------------------- pinned constants


def test_settings_are_the_published_ones() -> None:
    assert METHODS["convlm"].describe()["settings"] == {
        "layers": [],
        "theta": 0.9,
        "keep": 0.9,
        "keep_schedule": "constant",
        "keep_start": 0.25,
        "fuse": True,
        "renormalize": False,
        "context": "classes",
        "target": "final",
        "weight_v": 1.0,
        "weight_c": 1.0,
        "logits": "raw",
        "blocks": 0,
        "autoencoder_steps": 400,  # published: 0, and thousands of steps
        "autoencoder_lr": 1e-3,
        "projection_lr": 5e-3,
    }


def test_the_recipe_is_the_published_one(backbones: dict[str, str]) -> None:
    recipe = method().recipe(8, method().configure({}))
    expected = {"lr": 1e-5, "weight_decay": 1e-4, "epochs": 40, "batch_size": 256, "steps": None}
    expected |= {"optimizer": "adam", "schedule": "steps", "sampling": "class_balanced"}
    assert {key: asdict(recipe)[key] for key in expected} == expected
    assert recipe.patience > recipe.epochs
    model, _, tuning = attached(backbones["clip"])
    optimizer = _optimizer(tuning.groups, recipe)
    assert type(optimizer) is torch.optim.Adam  # weight decay goes through the moments
    names = {id(p): n for n, p in model.named_parameters()}
    inside, projection = optimizer.param_groups
    assert (inside["lr"], inside["weight_decay"]) == (1e-5, 1e-4)
    assert (projection["lr"], projection["weight_decay"]) == (5e-3, 1e-5)
    assert inside["betas"] == projection["betas"] == (0.9, 0.999)
    assert [names[id(p)] for p in projection["params"]] == ["backbone.visual_projection.weight"]
    actual = {names[id(p)] for p in inside["params"]}
    own = {n for n in names.values() if n.startswith(("backbone.vision_model.", "context."))}
    assert actual == own
    assert not any(p.requires_grad for p in model.backbone.text_model.parameters())


def test_adam_decays_as_torchs_does() -> None:
    torch.manual_seed(0)
    recipe = method().recipe(8, method().configure({}))
    mine, theirs = (nn.Parameter(torch.arange(4.0)) for _ in range(2))
    groups = [{"params": [mine], "lr": 1e-2, "weight_decay": 0.5}]
    optimizers = (_optimizer(groups, recipe), torch.optim.Adam([theirs], 1e-2, weight_decay=0.5))
    for _ in range(3):
        for parameter, optimizer in zip((mine, theirs), optimizers, strict=True):
            parameter.grad = torch.ones(4)
            optimizer.step()
    assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("epochs", [40, 8, 7, 3])
def test_the_rate_is_halved_after_each_quarter(epochs: int) -> None:
    recipe = replace(method().recipe(8, method().configure({})), epochs=epochs)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    milestones = [-(-epochs * k // 4) for k in (1, 2, 3)]  # of 40: 10, 20, 30
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.5)
    for epoch in range(epochs):
        assert learning_rate(recipe, 2.0, epoch, epochs) == 2 * scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_classes_are_drawn_equally_often() -> None:
    labels = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    recipe = method().recipe(8, method().configure({}))
    draws = torch.stack([draw_order(recipe, labels, 3, epoch) for epoch in range(200)])
    assert draws.shape == (200, 100)
    share = labels[draws].flatten().bincount().double() / draws.numel()
    assert (share - 1 / 3).abs().max() < 0.01  # sd .0033
    within = draws[labels[draws] == 1].bincount()[80:95].double()
    assert (within / within.sum() - 1 / 15).abs().max() < 0.01
    assert draws[0].unique().numel() < 100  # with replacement
    assert draw_order(recipe, labels, 3, 1).equal(draws[1])
    assert not draw_order(recipe, labels, 4, 1).equal(draws[1])
    shuffled = draw_order(replace(recipe, sampling="shuffled"), labels, 3, 1)
    assert shuffled.sort().values.equal(torch.arange(100))


def test_a_checkpoint_from_before_goes_on(tmp_path: Path) -> None:
    """It lacks fields that a recipe has now, whose defaults are what was done, and a checksum."""
    source = TensorSource(torch.randn(6, 4), torch.arange(6) % 2)
    recipe = Recipe(lr=0.1, epochs=4, batch_size=3)

    def train(epochs: int, folder: Path | None, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        step = HeadStep(nn.Linear(4, 2))
        stop = {"validate": iter([0.5] * epochs).__next__} if epochs < 4 else {}
        with suppress(StopIteration):
            fit(
                step,
                [{"params": list(step.parameters())}],
                source,
                recipe,
                accelerator=Accelerator(cpu=True),
                output_dir=folder,
                resume=resume,
                **stop,  # type: ignore[arg-type]
            )
        return step.state_dict()

    straight = train(4, None)
    train(2, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    del facts["recipe"]["sampling"]
    facts["best_value"], facts["stale"] = float("-inf"), 0
    tensors = {k: v for k, v in tensors.items() if not k.startswith("best.")}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})
    actual = train(4, tmp_path, resume=True)
    assert all(t.equal(straight[n]) for n, t in actual.items())


# ------------------------------------------------------------------------------------------ losses


def _autoencoder(layers: Any, x: Tensor) -> np.ndarray[Any, Any]:
    value = x.detach().numpy()
    for layer in layers:
        if isinstance(layer, nn.Linear):
            value = value @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        else:
            relu = isinstance(layer, nn.ReLU)
            value = np.maximum(value, 0) if relu else 1 / (1 + np.exp(-value))
    return value


@pytest.mark.parametrize("name", ["clip", "pair"])
@pytest.mark.parametrize("target", ["final", "layer"])
@pytest.mark.parametrize("kind", ["raw", "cosine"])
@pytest.mark.parametrize("context", ["classes", "captions"])
def test_the_loss_is_the_one_written_out(
    name: str, target: str, kind: str, context: str, backbones: dict[str, str]
) -> None:
    settings = {"weight_v": 0.7, "weight_c": 0.3, "theta": 0.4, "keep": 0.5}
    model, processor, tuning = attached(
        backbones[name], target=target, logits=kind, context=context, **settings
    )
    step = TowerStep(tuning, "prototypes")
    images, index = torch.randn(5, 3, 32, 32).double(), torch.tensor([4, 0, 2, 2, 1])
    captions = ["a tuft", "PAS stain", "collagen", "open loops", "a crescent"]
    if context == "captions":
        tuning.read_support(Dataset.from_dict({"caption": captions}))
    step.train()
    weight, total = torch.tensor([1.0, 1, 1, 0, 1]), 8
    actual = step(images, LABELS, weight, total, rows=index)

    with torch.no_grad():
        prototypes = model.class_prototypes(**processor.encode_prompts(tuning.class_texts))
        text = prototypes[LABELS]
        if context == "captions":
            text = torch.stack([
                model.class_prototypes(**processor.encode_prompts([[captions[i]]]))[0]
                for i in index
            ])  # fmt: skip
        with model.context.read(text) as seen:
            features = model.get_image_features(images).pooler_output
    scale = float(model.logit_scale.exp())
    x = features.numpy()
    if kind == "cosine":
        x = scale * x / np.linalg.norm(x, axis=1, keepdims=True)
    z = x @ prototypes.numpy().T
    cross = np.log(np.exp(z).sum(1)) - z[np.arange(5), LABELS.numpy()]
    counted = weight.numpy() > 0
    expected = cross[counted].sum() / total
    for number in range(2):
        token = seen.final if target == "final" else seen.tokens[number]
        assert token is not None
        guess = _autoencoder(model.context.to_vision[number], text)
        back = _autoencoder(model.context.to_text[number], seen.queries[number])
        loss_v = np.abs(guess - token.numpy())[counted].mean()
        loss_c = np.abs(back - text.numpy())[counted].mean()
        expected += 4 / total * (0.7 * loss_v + 0.3 * loss_c)
    assert actual.item() == pytest.approx(expected, abs=2e-6)
    actual.backward()
    for part in (*model.context.to_vision, *model.context.to_text):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip", {}),
        ("registers", {}),
        ("vit", {}),
        ("pair", {"blocks": 2}),
        ("clip", {"blocks": 2, "theta": 1.0}),
        ("pair", {"theta": 1.0}),
        ("pair", {"weight_v": 0.0}),
        ("pair", {"weight_c": 0.0}),
        ("pair", {"theta": 1.0, "weight_v": 0.0, "weight_c": 0.0}),
        ("pair", {"context": "none"}),
    ],
    ids=str,
)
def test_every_parameter_that_trains_gets_a_gradient(
    name: str, settings: dict[str, Any], backbones: dict[str, str]
) -> None:
    """Or several processes would wait for each other."""
    model, _, tuning = attached(backbones[name], **settings)
    step = TowerStep(tuning, "prototypes").train()
    images = torch.randn(5, 3, 32, 32).double()
    step(images, LABELS, torch.ones(5), 5, rows=torch.arange(5)).backward()
    trained = tuning.trained
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained)
    tower = [p.requires_grad for p in model.backbone.vision_model.parameters()]
    assert any(tower) == ("blocks" not in settings)


# ----------------------------------------------------------------------- what no label may change


@pytest.mark.parametrize("blocks", [0, 1])
def test_labels_reach_training_and_nothing_else(blocks: int, backbones: dict[str, str]) -> None:
    _, _, tuning = attached(backbones["clip"], theta=0.1, keep=0.5, blocks=blocks)
    step = TowerStep(tuning, "prototypes")
    images, rows = torch.randn(5, 3, 32, 32).double(), torch.arange(5)
    with torch.no_grad():
        expected = step.classify(images)
        passes = []
        for labels in (LABELS, (LABELS + 1) % 3):
            step.train()
            with tuning.guide_images(labels, rows, step.current_prototypes()):
                passes.append(step.image_features(images))
                step.eval()
                assert step.classify(images).equal(expected)
        assert not torch.allclose(*passes)  # in training they see their own text
        step.train()
        assert step.image_features(images).equal(step.eval().image_features(images))


def test_predictions_do_not_depend_on_labels_or_captions(
    rows: Dataset, backbones: dict[str, str]
) -> None:
    support = with_captions(rows, [f"a tuft, number {i}" for i in range(12)])
    adapted = quick(backbones["clip"], support, method_config={"context": "captions", "theta": 0.1})
    first = predict(adapted.model, adapted.processor, rows)
    other = rows.remove_columns("label").add_column("label", [2] * 12)
    other = other.cast_column("label", rows.features["label"])
    again = predict(adapted.model, adapted.processor, with_captions(other, ["viable"] * 12))
    assert np.array_equal(first.logits, again.logits)
    assert again.labels is not None
    assert not np.array_equal(first.labels, again.labels)


# ----------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("name", ["clip", "pair", "registers", "vit"])
def test_with_all_switched_off_it_is_fine_tuning_of_the_plain_tower(
    name: str, rows: Dataset, backbones: dict[str, str]
) -> None:
    off = {"theta": 1.0, "keep": 1.0, "weight_v": 0.0, "weight_c": 0.0}
    controls = [quick(backbones[name], rows, torch.float64, method_config=s) for s in (off, PLAIN)]
    assert furthest(*(weights(c) for c in controls)) < 1e-6
    assert [row["loss"] for row in controls[0].log] == pytest.approx(
        [row["loss"] for row in controls[1].log], abs=1e-6
    )
    adapted = controls[0]
    inputs = pixels(adapted.processor, torch.float64)
    actual = logits(adapted)
    adapted.model.glovlm.remove_context()
    with torch.no_grad():
        assert_same_numbers(adapted.model(**inputs).logits, actual)


def test_each_switch_changes_what_is_learned(rows: Dataset, backbones: dict[str, str]) -> None:
    """Or a setting that is lost on the way would pass unseen."""
    settings: list[dict[str, Any]] = [
        {},
        {"theta": 0.5},
        {"keep": 0.5},
        {"keep": 0.5, "fuse": False},
        {"keep": 0.5, "renormalize": True},
        {"keep": 0.5, "keep_schedule": "cosine"},
        {"context": "none"},
        {"target": "layer"},
        {"weight_v": 0.0},
        {"weight_c": 0.0},
        {"logits": "cosine"},
        {"layers": [1]},
        {"blocks": 1},
        {"autoencoder_steps": 21},
        {"autoencoder_lr": 2e-3},
    ]
    actual = [
        [r["loss"] for r in quick(backbones["clip"], rows, method_config=s).log] for s in settings
    ]
    for i, one in enumerate(actual):
        for other in actual[:i]:
            assert one != pytest.approx(other, abs=1e-7)


@pytest.mark.parametrize(("depth", "expected"), [(12, [3, 6, 9]), (10, [2, 5, 7]), (2, [0, 1])])
def test_layers_are_the_published_ones_or_as_far_down(depth: int, expected: list[int]) -> None:
    from transformers import CLIPConfig, CLIPModel

    from hf_glovlm.model import GloVLMConfig, GloVLMModel

    config = CLIPConfig.from_pretrained(tiny_clip())
    config.vision_config.num_hidden_layers = depth
    model = GloVLMModel(GloVLMConfig(backbone_config=config), CLIPModel(config))
    _, processor = load_backbone(str(tiny_clip()))
    tuning = method().attach(model.requires_grad_(False), processor, CLASSES, method().Config())
    assert model.context is not None
    assert model.context.layers == model.config.context["layers"] == expected  # type: ignore[index]
    assert tuning.notes == [f"Context-guided blocks: {', '.join(map(str, expected))} of {depth}."]
    model.remove_context()
    settings = method().configure({"blocks": 5})
    tuning = method().attach(model.requires_grad_(False), processor, CLASSES, settings)
    assert tuning.notes == ["Context-guided blocks: 0, 1, 2, 3, 4 of 5 of our own."]


# ----------------------------------------------------------------------------------------- captions


def test_a_caption_that_is_the_class_text_does_what_the_class_does(
    rows: Dataset, backbones: dict[str, str]
) -> None:
    classes = [replace(c, prompts=c.prompts[:1]) for c in CLASSES]
    support = with_captions(rows, [classes[k].prompts[0] for k in rows["label"]])
    actual = [
        quick(
            backbones["clip"],
            support,
            torch.float64,
            classes=classes,
            method_config={"context": context},
        )
        for context in ("classes", "captions")
    ]
    assert furthest(*(weights(f) for f in actual)) < 1e-6
    shuffled = with_captions(rows, [c.prompts[0] for c in classes] * 4)
    other = quick(
        backbones["clip"], shuffled, classes=classes, method_config={"context": "captions"}
    )
    assert furthest(weights(other), weights(actual[0])) > 1e-4


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            None,
            "needs a column 'caption' .* these have none: write them with `glovlm data caption`",
        ),
        (["a tuft"] * 10 + ["", None], "2 of 12 images have no caption"),
    ],
)
def test_captions_that_are_not_there_are_asked_for(
    texts: list[Any] | None, message: str, rows: Dataset, backbones: dict[str, str]
) -> None:
    support = rows if texts is None else with_captions(rows, texts)
    if texts is None and "caption" in rows.column_names:
        support = rows.remove_columns("caption")
    with pytest.raises(GloVLMError, match=message):
        quick(backbones["clip"], support, method_config={"context": "captions"})


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2]}, "among the 2 blocks 0 to 1 of CLIPVisionModel; found .2."),
        ({"keep": 0.0}, "'keep' .* must be above 0"),
        ({"theta": -0.1}, "'theta' .* must be 0 or more"),
        ({"context": "caption"}, "one of classes, captions, none; .*mean 'captions'"),
        ({"target": "last"}, "'target' .* one of final, layer"),
        ({"logits": "dot"}, "'logits' .* one of raw, cosine"),
        ({"keep_schedule": "linear"}, "one of constant, cosine"),
        ({"weight_v": -1.0}, "'weight_v' .* must be 0 or more"),
        ({"blocks": -1}, "'blocks' .* must be 0 or more"),
        ({"keep_start": 1.0}, "'keep_start' .* must be 0 or more and below 1"),
        ({"autoencoder_steps": -1}, "'autoencoder_steps' .* must be 0 "),
        ({"autoencoder_lr": 0.0}, "'autoencoder_lr' .* must be above 0"),
        ({"kappa": 0.9}, "has no setting 'kappa'"),
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused(
    settings: dict[str, Any], message: str, rows: Dataset, backbones: dict[str, str]
) -> None:
    with pytest.raises(GloVLMError, match=message):
        quick(backbones["clip"], rows, method_config=settings)


def test_what_it_cannot_do_is_refused(rows: Dataset, backbones: dict[str, str]) -> None:
    with pytest.raises(GloVLMError, match="SiglipVisionModel has no class token"):
        quick(str(tiny_siglip()), rows)
    with pytest.raises(GloVLMError, match="'convlm' knows loss 'prototypes' only; found 'infonce'"):
        quick(backbones["clip"], rows, loss="infonce")
    adapted = quick(backbones["clip"], rows)
    with pytest.raises(GloVLMError, match="has a context already"):
        adapt(adapted.model.glovlm, "convlm", rows, processor=adapted.processor)


# ------------------------------------------------------------------------- schedule, blocks, replay


def test_the_share_of_patches_falls_along_a_cosine(backbones: dict[str, str]) -> None:
    model, _, tuning = attached(backbones["clip"], keep=0.5, keep_schedule="cosine")
    guide = model.context
    tuning.begin(40)
    shares = [guide.keep_now.tolist()]
    for step in range(1, 41):
        tuning.after_step(step)
        shares.append(guide.keep_now.tolist())
    t = np.clip((np.arange(41) / 40 - 0.25) / 0.75, 0, 1)
    expected = 0.5 + 0.5 * (1 + np.cos(np.pi * t)) / 2
    assert np.abs(np.array(shares) - expected[:, None]).max() < 1e-6
    assert shares[10] == [1.0, 1.0]
    tuning.finish(None)
    assert guide.keep_now is None


@pytest.mark.parametrize(
    "settings", [{"keep": 0.5, "keep_schedule": "cosine"}, {"blocks": 2}], ids=str
)
def test_an_interrupted_run_ends_as_a_straight_one(
    settings: dict[str, Any], rows: Dataset, backbones: dict[str, str], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Killed

    straight = quick(backbones["clip"], rows, method_config=settings)
    options: dict[str, Any] = {"method_config": settings, "output_dir": tmp_path}
    with pytest.raises(Killed):
        quick(backbones["clip"], rows, on_epoch=kill, **options)
    resumed = quick(backbones["clip"], rows, resume=True, **options)
    assert furthest(weights(resumed), weights(straight)) == 0
    assert [r["loss"] for r in resumed.log] == [r["loss"] for r in straight.log]


@pytest.mark.parametrize("name", ["clip", "pair"])
def test_blocks_on_a_frozen_tower_start_from_tokens_that_were_recorded_once(
    name: str, rows: Dataset, backbones: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []
    plain = adaptation.fit

    def noted(step: Any, groups: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        sources.append(type(source).__name__)
        return plain(step, groups, source, *args, **kwargs)

    monkeypatch.setattr(adaptation, "fit", noted)
    runs = [
        quick(backbones[name], rows, torch.float64, method_config={"blocks": 2}, replay=r)
        for r in (True, False)
    ]
    assert sources == ["TensorSource", "ImageSource"]
    assert furthest(*(weights(r) for r in runs)) < 1e-5
    original, _ = load_backbone(backbones[name])
    state = runs[0].model.glovlm.state_dict()
    for key, value in original.state_dict().items():
        assert "visual_projection" in key or state[key].equal(value.to(state[key].dtype)), key
    assert not runs[0].frozen_tower  # its plain features would not serve


# ------------------------------------------------------------------------------- learned and saved


def test_it_learns(rows: Dataset, backbones: dict[str, str], tmp_path: Path) -> None:
    unseen = all_rows(load_dataset(tiny_images(tmp_path / "unseen", per_class=8, seed=9)))
    settings, recipe = {"logits": "cosine", "keep": 0.7}, {"epochs": 20, "lr": 3e-3}
    adapted = quick(
        backbones["clip"], rows, method_config=settings, recipe={**recipe, "batch_size": 6}
    )
    predictions = predict(adapted.model, adapted.processor, unseen)
    assert predictions.labels is not None
    assert float((predictions.logits.argmax(1) == predictions.labels).mean()) >= 0.8
    raw = quick(backbones["clip"], rows, recipe={"epochs": 10, "lr": 2e-3, "batch_size": 6})
    assert raw.log[-1]["loss"] < 0.85 * raw.log[0]["loss"]


KEPT = """
found["kept"] = [k.tolist() for k in model.glovlm.kept_patches(inputs["pixel_values"])]
"""


def test_it_is_the_same_when_loaded_with_the_package_and_without(
    rows: Dataset, backbones: dict[str, str], tmp_path: Path
) -> None:
    runs = {}
    for name, backbone in backbones.items():
        for blocks in (2,) if name == "pair" else (0,):
            settings = {"keep": 0.5, "blocks": blocks}
            adapted = quick(backbone, rows, method_config=settings)
            folder = tmp_path / f"{name}-{blocks}"
            adapted.save(folder)
            rows[0]["image"].save(folder / "image.png")
            runs[folder.name] = adapted
            read, report = GloVLMForImageClassification.from_pretrained(
                folder, output_loading_info=True
            )
            assert not report["missing_keys"]
            assert not report["unexpected_keys"]
            assert furthest(read.state_dict(), weights(adapted)) == 0
            with torch.no_grad():
                inputs = pixels(adapted.processor, torch.float32)
                assert_same_numbers(read(**inputs).logits, logits(adapted))
            predicted = predict(read, adapted.processor, rows).logits
            assert (
                np.abs(predicted - predict(adapted.model, adapted.processor, rows).logits).max()
                < 1e-5
            )
    again, _ = load_backbone(str(tmp_path / "clip-0"))  # trains on
    assert again.context is not None
    assert again.context.to_text[0][0].weight.equal(
        runs["clip-0"].model.glovlm.context.to_text[0][0].weight
    )
    result = load_without_the_package([tmp_path / name for name in runs], tmp_path, KEPT)
    for name, adapted in runs.items():
        inputs = adapted.processor(images=[rows[0]["image"]], return_tensors="pt")
        with torch.no_grad():
            expected = adapted.model(**inputs).logits[0]
        actual = result[name]
        assert_same_numbers(actual["logits"], expected)
        mine = adapted.model.glovlm.kept_patches(inputs["pixel_values"])
        assert actual["kept"] == [k.tolist() for k in mine]
        probabilities = dict(zip(NAMES, expected.softmax(0).tolist(), strict=True))
        assert actual["scores"] == pytest.approx(probabilities, abs=1e-5)


# ------------------------------------------------------------------------------------ two processes

CASES: dict[str, dict[str, Any]] = {
    "classes": {"method_config": {**FEW, "keep": 0.5}, "accumulate": 2},
    "captions": {
        "method_config": {**FEW, "keep": 0.5, "context": "captions", "keep_schedule": "cosine"}
    },
    "blocks": {"method_config": {**FEW, "blocks": 1, "weight_c": 0.0}},
}


def work(folder: Path, backbone: str, place: Path) -> dict[str, Any]:
    """All cases, in this process or in each of several: writes the weights, returns the losses."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    rows = all_rows(load_dataset(place)).select([*range(6), *range(8, 12)])  # uneven classes
    rows = with_captions(rows, [f"a tuft with {i} loops" for i in range(10)])
    losses: dict[str, Any] = {}
    for case, options in CASES.items():
        model, processor = load_backbone(backbone)
        adapted = adapt_with(
            model.double(),
            "convlm",
            rows,
            processor=processor,
            classes=CLASSES,
            recipe={"epochs": 3, "batch_size": 7, "lr": 1e-3},
            accelerator=accelerator,
            **options,
        )
        losses[case] = [row["loss"] for row in adapted.log]
        save_file(weights(adapted), folder / f"{case}.safetensors")
    return losses


@pytest.mark.long
def test_two_processes_train_to_the_weights_of_one(images: Path, tmp_path: Path) -> None:
    run_two_ranks(Path(__file__).resolve(), tmp_path, tiny_clip(), images)
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    try:
        losses = work(tmp_path / "alone", str(tiny_clip()), images)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    for case in CASES:
        alone, first, second = (
            load_file(tmp_path / name / f"{case}.safetensors") for name in ("alone", "0", "1")
        )
        assert furthest(first, second) == 0
        assert furthest(first, alone) < 1e-8
        for rank in ("0", "1"):
            calls = json.loads((tmp_path / rank / "losses.json").read_text())
            assert calls[case] == pytest.approx(losses[case], abs=1e-6)
    assert plan(Recipe(lr=1, epochs=3, batch_size=7), 10) == (3, 6)


def test_the_penalty_is_zero_where_a_process_has_no_row(backbones: dict[str, str]) -> None:
    _, _, tuning = attached(backbones["clip"])
    step = TowerStep(tuning, "prototypes").train()
    loss = step(torch.randn(5, 3, 32, 32).double(), LABELS, torch.zeros(5), 5, rows=torch.arange(5))
    assert loss.item() == 0
    loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for group in tuning.groups
        for p in group["params"]
    )


def test_the_bench_compares_towers_of_one_shape() -> None:
    """The operations are those of the published token counts, by hand."""
    shape = Shape(image_size=32, patch=8, vision=(64, 4), text=(64, 1), context=40)
    rows = bench_context(shape=shape, keeps=(1.0, 0.5), batch_size=2, repeats=1)
    assert [row["name"] for row in rows] == ["context.keep_1.0", "context.keep_0.5"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(rows[1]["value"] / rows[0]["value"], rel=0.02)

    def cost(before: int, after: int) -> float:
        return 4 * before * 768**2 + 2 * before**2 * 768 + 8 * after * 768**2

    counts = [(197, 197)] * 3 + [(197, 179)] + [(179, 179)] * 2 + [(179, 163)] + [(163, 163)] * 2
    counts += [(163, 148)] + [(148, 148)] * 2
    expected = 196 * 768**2 + sum(cost(*pair) for pair in counts)
    assert _block_operations(Shape(), [3, 6, 9], 0.9) == expected


if __name__ == "__main__":
    place, backbone, image_folder = sys.argv[1:]
    mine = Path(place) / os.environ["RANK"]
    actual = work(mine, backbone, Path(image_folder))
    (mine / "losses.json").write_text(json.dumps(actual))
