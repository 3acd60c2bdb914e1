"""Methods inside the towers: what trains, with which numbers, and that it saves as it trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attaching import PROMPTS, attach, default_recipe, trained_names, vit_b_16
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import (
    METHODS,
    StepState,
    TowerMethod,
    give_joint_space,
    tower_layers,
)
from hf_glovlm.methods.fine_tuning import target_modules
from hf_glovlm.methods.peft_tuners import UNSUITABLE, find_tuner, tuner_names
from hf_glovlm.model import GloVLMConfig, GloVLMModel
from hf_glovlm.training.loop import _optimizer, learning_rate, plan

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def clip() -> tuple[Any, Any]:
    model, processor = load_backbone(str(tiny_clip()))
    return model.requires_grad_(False), processor


def pair() -> tuple[Any, Any]:
    """A pair with a joint space, as `adapt` hands it to a method."""
    model, processor = load_backbone(tiny_pair())
    texts = nn.functional.normalize(torch.randn(3, 32), dim=-1)
    give_joint_space(model, torch.randn(6, 64), LABELS, texts)
    return model.requires_grad_(False), processor


def of_size(width: int, text_width: int) -> GloVLMModel:
    """The small CLIP with towers of two widths."""
    config = CLIPConfig.from_pretrained(tiny_clip())
    for tower, size in ((config.vision_config, width), (config.text_config, text_width)):
        tower.hidden_size, tower.intermediate_size = size, 2 * size
    model = GloVLMModel(GloVLMConfig(backbone_config=config), backbone=CLIPModel(config))
    return model.eval().requires_grad_(False)


class Task:
    """Six images against three classes."""

    def __init__(self, processor: Any) -> None:
        self.pixels = torch.randn(6, 3, 32, 32)
        self.text = processor.encode_prompts(PROMPTS)

    def logits(self, model: Any) -> Tensor:
        features = model.get_image_features(self.pixels).pooler_output
        prototypes: Tensor = model.class_prototypes(**self.text)
        return 20 * nn.functional.normalize(features, dim=-1) @ prototypes.T

    def train(
        self, model: Any, tuning: TowerMethod, steps: int = 8, lr: float = 1e-2
    ) -> list[float]:
        """AdamW as the loop runs it; the losses."""
        model.eval()  # what PEFT adds comes in training mode
        optimizer = torch.optim.AdamW(tuning.trained, lr=lr)
        tuning.begin(steps)
        losses = []
        for step in range(1, steps + 1):
            logits = self.logits(model)
            loss = nn.functional.cross_entropy(logits, LABELS)
            losses.append(loss.item())
            penalty = tuning.penalty(state(logits))
            loss = loss if penalty is None else loss + penalty
            loss.backward()
            optimizer.step()
            tuning.after_step(step)
            optimizer.zero_grad()
        return losses


def state(logits: Tensor) -> StepState:
    return StepState(torch.zeros(6, 4), torch.zeros(3, 4), logits, LABELS, torch.ones(6))


# -------------------------------------------------------------------------------- pinned constants

ADAMW = {"optimizer": "adamw", "eps": 1e-8, "patience": 7, "min_delta": 0.001, "warmup_epochs": 0}
CONSTANT = {**ADAMW, "schedule": "constant", "by_step": False, "steps": None}
CLIP_LORA = {
    **ADAMW,
    "lr": 2e-4,
    "weight_decay": 1e-2,
    "batch_size": 32,
    "schedule": "cosine",
    "final_lr": 5e-3,
    "by_step": True,
}
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    (
        "vanilla",
        8,
        {
            **CONSTANT,
            "lr": 1e-4,
            "weight_decay": 0.01,
            "epochs": 20,
            "batch_size": 5,
            "schedule": "cosine",
            "final_lr": 0.01,
        },
    ),
    ("full", 8, {**CONSTANT, "lr": 1e-5, "weight_decay": 0.01, "epochs": 20, "batch_size": 5}),
    ("lora", 8, {**CONSTANT, "lr": 2e-5, "weight_decay": 0.01, "epochs": 20, "batch_size": 5}),
    *(("clip_lora", k, {**CLIP_LORA, "steps": 500 * k}) for k in (1, 2, 4, 8, 16, 32)),
]
SETTINGS: dict[str, Mapping[str, Any]] = {
    "vanilla": {"vision_layers": 4, "text_layers": 2, "projection_lr": 1e-3},
    "full": {"projection_lr": 1e-3},
    "lora": {
        "tuner": "LORA",
        "tuner_config": {},
        "r": 4,
        "alpha": 16,
        "dropout": 0.1,
        "towers": "both",
        "last": 1,
        "layers": [],
        "projections": "qv",
        "mlp": False,
        "projection_lr": 1e-3,
    },
    "clip_lora": {"r": 2, "alpha": 1, "dropout": 0.25, "projection_lr": 1e-3},
}


@pytest.mark.parametrize(("name", "shots", "expected"), RECIPES)
def test_recipes_are_the_published_ones(name: str, shots: int, expected: dict[str, Any]) -> None:
    recipe = default_recipe(name, shots)
    assert {key: recipe[key] for key in expected} == expected


def test_settings_are_the_published_ones() -> None:
    assert {n: METHODS[n].describe()["settings"] for n in SETTINGS} == SETTINGS


def test_clip_loras_rate_falls_by_step_from_2e_4_to_1e_6() -> None:
    method = METHODS["clip_lora"]
    assert isinstance(method, TowerMethod)
    recipe = method.recipe(4, method.configure({}))
    epochs, steps = plan(recipe, n=80)  # three batches of at most 32
    assert (epochs, steps) == (667, 2000)
    t = np.array([0, 1, 2, 3, 500, 1000, 1999, 2000])
    expected = 1e-6 + (2e-4 - 1e-6) * (1 + np.cos(np.pi * t / 2000)) / 2
    actual = [learning_rate(recipe, recipe.lr, i // 3, epochs, i, steps) for i in t.tolist()]
    assert np.abs(np.array(actual) - expected).max() < 1e-15
    optimizer = _optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], recipe)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["weight_decay"] == 0.01


# ------------------------------------------------------------------------------------------- lora

LAST = "encoder.layers.1.self_attn"
LORA_OF_CLIP = {
    f"backbone.{tower}.{LAST}.{kind}_proj.lora_{half}.default.weight"
    for tower in ("vision_model", "text_model")
    for kind in "qv"
    for half in "AB"
}


def lora_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]


def test_lora_is_built_with_the_published_numbers() -> None:
    model, processor = clip()
    assert attach("lora", model, processor).notes == []
    layers = lora_layers(model)
    assert len(layers) == 4
    for layer in layers:
        assert layer.lora_A["default"].out_features == 4
        assert layer.scaling["default"] == 16 / 4
        assert layer.lora_dropout["default"].p == 0.1
        assert layer.lora_B["default"].weight.abs().max() == 0  # starts as the pretrained model


def test_lora_trains_q_and_v_of_the_last_block_of_both_towers() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor)
    assert trained_names(model, tuning) == [LORA_OF_CLIP]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == LORA_OF_CLIP
    assert (tuning.trains_vision, tuning.trains_text) == (True, True)
    assert tuning.class_texts == PROMPTS


def test_lora_on_a_pair_trains_its_projection_too_at_its_own_rate() -> None:
    model, processor = pair()
    tuning = attach("lora", model, processor)
    low_rank, projection = trained_names(model, tuning)
    assert len(low_rank) == 8
    assert all(".1." in n and (".lora_A." in n or ".lora_B." in n) for n in low_rank)
    assert {n.split(".")[1] for n in low_rank} == {"vision_model", "text_model"}
    assert {n.rpartition(".")[2] for n in projection} == {"weight", "bias"}
    assert all(n.startswith("backbone.visual_projection.") for n in projection)
    assert "lr" not in tuning.groups[0]
    assert tuning.groups[1]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 4, "projections": "qv", "last": 1}, 4 * 4 * 64),
        ({"r": 2, "projections": "qkvo", "last": 0}, 16 * 2 * 64),
        ({"r": 1, "projections": "k"}, 2 * 64),
        ({"r": 1, "projections": "k", "towers": "text"}, 64),
        ({"r": 1, "projections": "k", "towers": "vision", "layers": [0, -2]}, 64),
        ({"r": 1, "projections": "", "mlp": True, "layers": [0, 1]}, 8 * 96),
    ],
    ids=str,
)
def test_lora_has_r_times_in_plus_out_parameters_a_map(
    settings: dict[str, Any], expected: int
) -> None:
    for make, more in ((clip, 0), (pair, 64 * 32 + 32)):
        model, processor = make()
        tuning = attach("lora", model, processor, **settings)
        assert sum(p.numel() for p in tuning.trained) == expected + more


@pytest.mark.parametrize(("towers", "trains"), [("vision", (True, False)), ("text", (False, True))])
def test_lora_says_which_tower_trains(towers: str, trains: tuple[bool, bool]) -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, towers=towers)
    assert (tuning.trains_vision, tuning.trains_text) == trains
    (names,) = trained_names(model, tuning)
    assert {n.split(".")[1] for n in names} == {f"{towers}_model"}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"tuner": "LORA"}, 16 / 4), ({"tuner": "rslora"}, 16 / 2), ({"r": 2, "alpha": 3}, 1.5)],
    ids=str,
)
def test_an_adapted_map_is_the_old_one_plus_the_scaled_product(
    settings: dict[str, Any], scale: float
) -> None:
    model, processor = clip()
    attach("lora", model, processor, **settings)
    model.eval()
    for layer in lora_layers(model):
        layer.lora_B["default"].weight.data.normal_()
        a, b = (getattr(layer, f"lora_{half}")["default"].weight for half in "AB")
        x = torch.randn(5, 32)
        as_numpy = [t.detach().double().numpy() for t in (x, a, b, *layer.base_layer.parameters())]
        x_, a_, b_, weight, bias = as_numpy
        expected = x_ @ weight.T + bias + scale * (x_ @ a_.T) @ b_.T
        assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-4


# --------------------------------------------------------------------------------------- clip_lora


def test_clip_lora_trains_184320_numbers_of_a_vit_b_16_clip() -> None:
    model = vit_b_16()
    with torch.device("meta"):
        tuning = attach("clip_lora", model, None)
    assert sum(p.numel() for p in tuning.trained) == 184_320
    (names,) = trained_names(model, tuning)
    assert len(names) == 2 * 12 * 3 * 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 184_320


def test_clip_lora_is_rank_stabilised_and_starts_as_published() -> None:
    model = of_size(64, 32)
    tuning = attach("clip_lora", model, None)
    layers = lora_layers(model)
    assert len(layers) == 2 * 2 * 3
    assert {n.split(".")[-4] for n in trained_names(model, tuning)[0]} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    for layer in layers:
        assert layer.scaling["default"] == pytest.approx(1 / 2**0.5)
        assert layer.lora_dropout["default"].p == 0.25
        assert layer.lora_B["default"].weight.abs().max() == 0
        a = layer.lora_A["default"].weight
        bound = a.shape[1] ** -0.5  # Kaiming's uniform draw with a = sqrt(5)
        assert a.shape[0] == 2
        assert 0.8 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)


# ------------------------------------------------------------------------------- all tuners of PEFT

# What the default sizes of these do not fit into maps of 32 x 32.
SMALLER: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 100},
    "ROAD": {"group_size": 16},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 100},
}


def test_every_tuner_of_peft_serves_or_is_refused_with_a_reason() -> None:
    in_peft = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(UNSUITABLE) < in_peft
    assert {*tuner_names(), *UNSUITABLE} - in_peft == {"RSLORA", "DORA"}
    named = {"LORA", "RSLORA", "DORA", "VERA", "ADALORA", "IA3", "OFT", "BOFT", "HRA", "LOHA"}
    assert named | {"LOKR", "FOURIERFT", "VBLORA", "RANDLORA"} <= set(tuner_names())


# What PEFT and torch say while an adapter is loaded or run without this package.
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n")
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("tuner", tuner_names())
def test_a_tuner_trains_merges_and_reloads_exactly(tuner: str, tmp_path: Path) -> None:
    model, processor = clip()
    task = Task(processor)
    settings = {"tuner": tuner.lower(), "tuner_config": SMALLER.get(tuner, {})}
    tuning = attach("lora", model, processor, **settings)
    (names,) = trained_names(model, tuning)  # a checkpoint holds what stands inside the model
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("original_module" in n for n in names)
    losses = task.train(model, tuning)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = task.logits(model)
    tuning.finish(tmp_path)
    assert not any(type(m).__module__.startswith("peft") for m in model.modules())
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    assert model.backbone.state_dict().keys() == stock.state_dict().keys()
    with torch.no_grad():
        merged = task.logits(model)
        model.backbone = PeftModel.from_pretrained(stock, tmp_path).eval().base_model.model
        reloaded = task.logits(model)
    assert (merged - trained).abs().max() < 2e-5  # of logits up to 20
    assert (reloaded - trained).abs().max() < 2e-5


@pytest.mark.parametrize("tuner", ["LORA", "DORA", "ADALORA", "IA3", "OFT", "VERA", "VBLORA"])
def test_a_tuner_keeps_the_projection_of_a_pair(tuner: str, tmp_path: Path) -> None:
    model, processor = pair()
    task = Task(processor)
    settings = {"tuner": tuner, "tuner_config": SMALLER.get(tuner, {}), "mlp": tuner == "IA3"}
    tuning = attach("lora", model, processor, **settings)
    before = model.backbone.visual_projection.weight.detach().clone()
    losses = task.train(model, tuning)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = task.logits(model)
    tuning.finish(tmp_path)
    assert (model.backbone.visual_projection.weight - before).abs().max() > 1e-3
    fresh, _ = load_backbone(tiny_pair())
    fresh.backbone.set_visual_projection(torch.zeros(32, 64), torch.zeros(32))
    fresh.backbone = PeftModel.from_pretrained(fresh.backbone, tmp_path).eval().base_model.model
    with torch.no_grad():
        assert (task.logits(model) - trained).abs().max() < 2e-5
        assert (task.logits(fresh) - trained).abs().max() < 2e-5


@pytest.mark.parametrize(
    "tuner", ["LORA", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA"]
)
def test_a_tuner_serves_towers_of_two_widths(tuner: str) -> None:
    _, processor = clip()
    model, task = of_size(64, 32), Task(processor)
    settings = {"tuner": tuner, "tuner_config": SMALLER.get(tuner, {}), "last": 0}
    tuning = attach("lora", model, processor, **settings)
    losses = task.train(model, tuning, steps=4)
    assert min(losses[1:]) < losses[0]
    with torch.no_grad():
        trained = task.logits(model)
        tuning.finish(None)
        assert (task.logits(model) - trained).abs().max() < 2e-5


def test_frod_is_refused_for_maps_of_two_shapes() -> None:
    with pytest.raises(GloVLMError, match=r"FROD shares.*\(32, 32\), \(64, 64\).*one tower"):
        attach("lora", of_size(64, 32), None, tuner="FROD")
    attach("lora", of_size(64, 32), None, tuner="FROD", towers="vision")


@pytest.mark.parametrize(
    ("tuner", "expected"),
    [
        ("VERA", {"r": 256, "vera_dropout": 0.2}),  # r is the width of its shared random matrices
        ("OFT", {"oft_block_size": 32, "r": 0}),
        ("HRA", {"r": 2}),
        ("LOHA", {"r": 2, "alpha": 6, "module_dropout": 0.0}),
        ("ADALORA", {"target_r": 2, "init_r": 3, "lora_alpha": 6, "lora_dropout": 0.2}),
        ("BOFT", {"boft_dropout": 0.2}),
        ("dora", {"use_dora": True, "r": 2, "lora_alpha": 6, "lora_dropout": 0.2}),
    ],
)
def test_rank_alpha_and_dropout_go_where_a_tuner_has_them(
    tuner: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, tuner=tuner, r=2, alpha=6, dropout=0.2)
    assert len(tuning.notes) == 1 + (tuner == "VERA")
    given = {k: v for k, v in expected.items() if f"{k} {v}" in tuning.notes[0]}
    tuning.finish(tmp_path)
    held = PEFT_TYPE_TO_CONFIG_MAPPING[find_tuner(tuner)[0]].from_pretrained(tmp_path)
    assert {k: getattr(held, k) for k in expected} == expected
    assert given or tuner in ("OFT", "VERA")


def test_tuner_config_wins_over_the_shared_settings() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, tuner_config={"r": 7, "lora_dropout": 0.0})
    assert {layer.r["default"] for layer in lora_layers(model)} == {7}
    assert tuning.notes == ["PEFT tuner LORA: lora_dropout 0.0, r 7, lora_alpha 16."]


def test_ia3_scales_what_attention_gives_and_what_the_mlp_takes() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, tuner="IA3", projections="kv", mlp=True)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "ia3_l") and hasattr(m, "merge")}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        layer.ia3_l["default"].data.uniform_(0.5, 2.0)
        scale = layer.ia3_l["default"].flatten()
        x = torch.randn(3, layer.base_layer.in_features)
        base = layer.base_layer
        plain = nn.functional.linear(x, base.weight, None)
        expected = (
            nn.functional.linear(x * scale, base.weight, base.bias)
            if "mlp" in name
            else (plain + base.bias) * scale
        )
        assert (layer(x) - expected).abs().max() < 1e-5
    assert sum(p.numel() for p in tuning.trained) == 2 * (4 * 32 + 32 + 0)


def test_layer_norm_tuning_takes_the_norms_of_the_chosen_blocks() -> None:
    model, processor = clip()
    (names,) = trained_names(model, attach("lora", model, processor, tuner="LN_TUNING", last=1))
    assert len(names) == 2 * 2 * 2
    assert all("layers.1.layer_norm" in n for n in names)


@pytest.mark.parametrize("tuner", sorted(UNSUITABLE))
def test_a_tuner_that_cannot_serve_is_refused_with_its_reason(tuner: str) -> None:
    with pytest.raises(GloVLMError, match=f"PEFT's {tuner} .*: choose one of ADALORA, "):
        find_tuner(tuner.lower())


def test_an_unknown_tuner_names_the_nearest() -> None:
    with pytest.raises(GloVLMError, match=r"no tuner 'rs-loraa'.*Did you mean 'RSLORA'\?"):
        find_tuner("rs-loraa")


@pytest.mark.parametrize(
    ("tuner", "given", "message"),
    [
        (
            "LORA",
            {"use_rs_lora": True},
            r"LORA has no argument 'use_rs_lora' \(it has: .*rslora'\?",
        ),
        ("VERA", {"lora_alpha": 1}, r"VERA has no argument 'lora_alpha' \(it has: bias, d_initial"),
        (
            "LORA",
            {"target_modules": ["q"]},
            r"'target_modules' in tuner_config is set by the method",
        ),
        ("ADALORA", {"total_step": 5}, r"'total_step' in tuner_config is set by the method"),
        ("LORA", {"loftq_config": {}}, r"'loftq_config' of LORA needs quantised weights"),
        ("LORA", {"corda_config": {}}, r"'corda_config' of LORA needs a pass over data"),
        ("LORA", {"init_lora_weights": "eva"}, r"start 'eva' of LORA needs a pass over data"),
        (
            "C3A",
            {"block_size": 7},
            r"PEFT tuner C3A: block_size 7\. It cannot be built so: .*Change",
        ),
        ("LORA", {"r": 0}, r"It cannot be built so: .*`r` should be.*tuner_config"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(
    tuner: str, given: dict[str, Any], message: str
) -> None:
    model, processor = clip()
    with pytest.raises(GloVLMError, match=message):
        attach("lora", model, processor, tuner=tuner, tuner_config=given)


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "orthogonal", "mica"])
def test_other_starts_of_lora_reload_exactly(start: str, tmp_path: Path) -> None:
    model, processor = clip()
    task = Task(processor)
    settings = {"tuner_config": {"init_lora_weights": start, "lora_dropout": 0.0}}
    tuning = attach("lora", model, processor, **settings)
    task.train(model, tuning)
    tuning.finish(tmp_path)
    with torch.no_grad():
        merged = task.logits(model)
        stock = CLIPModel.from_pretrained(tiny_clip()).eval()
        model.backbone = PeftModel.from_pretrained(stock, tmp_path).eval().base_model.model
        assert (task.logits(model) - merged).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------- adalora


def adalora_parts(model: nn.Module) -> dict[str, list[Tensor]]:
    named = list(model.named_parameters())
    return {half: [p for n, p in named if f".lora_{half}." in n] for half in "ABE"}


def test_adaloras_penalty_is_the_distance_of_its_factors_from_orthogonal() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, tuner="AdaLoRA", r=2)
    parts = adalora_parts(model)
    norms = []
    for half, sign in (("A", 1), ("B", -1)):
        for factor in parts[half]:
            factor.data.normal_()
            rows = factor.detach().double().numpy()[::1]
            rows = rows if sign > 0 else rows.T
            assert rows.shape == (3, 32)
            norms.append(np.sqrt(((rows @ rows.T - np.eye(3)) ** 2).sum()))
    penalty = tuning.penalty(state(torch.zeros(6, 3)))
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * np.mean(norms), rel=1e-6)
    penalty.backward()
    assert all(p.grad is not None for half in "AB" for p in parts[half])


def test_adaloras_ranks_fall_to_the_budget_and_its_adapter_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = clip()
    task = Task(processor)
    tuning = attach("lora", model, processor, tuner="ADALORA", r=2, tuner_config={"tfinal": 3})

    def kept() -> int:
        return sum(int((e != 0).sum()) for e in adalora_parts(model)["E"])

    ranks = []
    after_step = tuning.after_step

    def watch(step: int) -> None:
        after_step(step)
        ranks.append(kept())

    monkeypatch.setattr(tuning, "after_step", watch)
    task.train(model, tuning, steps=12)
    assert ranks[0] > ranks[-1] == 4 * 2  # four maps, two ranks each on average
    assert ranks[8:] == [8] * 4  # the last tfinal steps train what is left
    with torch.no_grad():
        trained = task.logits(model)
    tuning.finish(tmp_path)
    with torch.no_grad():
        assert (task.logits(model) - trained).abs().max() < 2e-5
        stock = CLIPModel.from_pretrained(tiny_clip()).eval()
        model.backbone = PeftModel.from_pretrained(stock, tmp_path).eval().base_model.model
        assert (task.logits(model) - trained).abs().max() < 2e-5


def test_adalora_is_exact_when_an_earlier_epoch_was_the_best(tmp_path: Path) -> None:
    model, processor = clip()
    task = Task(processor)
    tuning = attach("lora", model, processor, tuner="ADALORA", r=1)
    best = [p.detach().clone().normal_() for p in tuning.groups[0]["params"]]
    task.train(model, tuning, steps=6)
    for parameter, value in zip(tuning.groups[0]["params"], best, strict=True):
        parameter.data.copy_(value)
    tuning.finish(tmp_path)
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    with torch.no_grad():
        merged = task.logits(model)
        model.backbone = PeftModel.from_pretrained(stock, tmp_path).eval().base_model.model
        assert (task.logits(model) - merged).abs().max() < 2e-4


def test_adalora_refuses_a_run_without_room_for_its_schedule() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor, tuner="ADALORA", tuner_config={"tinit": 3})
    tuning.begin(4)
    with pytest.raises(GloVLMError, match=r"a run of 3 leaves none between.*train longer"):
        tuning.begin(3)


# ------------------------------------------------------------------------------------ target names

CLIP_BLOCK = [
    *(f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2"),
]
DINO_BLOCK = [
    *(f"attention.{k}_proj" for k in "qkvo"),
    *("mlp.fc1", "mlp.fc2"),
]
BERT_BLOCK = [
    *(f"attention.self.{k}" for k in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]


def expected_names(tower: str, path: str, block: list[str], layers: list[int]) -> list[str]:
    return [f"{tower}_model.{path}.{i}.{n}" for i in layers for n in block]


@pytest.mark.parametrize(
    ("make", "vision", "text"),
    [
        (tiny_clip, ("encoder.layers", CLIP_BLOCK), ("encoder.layers", CLIP_BLOCK)),
        (tiny_siglip, ("encoder.layers", CLIP_BLOCK), ("encoder.layers", CLIP_BLOCK)),
        (tiny_siglip2, ("encoder.layers", CLIP_BLOCK), ("encoder.layers", CLIP_BLOCK)),
        (tiny_pair, ("encoder.layer", DINO_BLOCK), ("encoder.layer", BERT_BLOCK)),
    ],
)
def test_target_modules_names_every_map_of_every_block(
    make: Any, vision: tuple[str, list[str]], text: tuple[str, list[str]]
) -> None:
    model, _ = load_backbone(str(make()))
    backbone = model.backbone
    both = {"vision": vision, "text": text}
    for tower, (path, block) in both.items():
        actual = target_modules(backbone, tower, mlp=True)
        assert actual == expected_names(tower, path, block, [0, 1])
        assert all(isinstance(backbone.get_submodule(n), nn.Linear) for n in actual)
        assert target_modules(backbone, tower, projections="vq", last=1) == expected_names(
            tower, path, [block[2], block[0]], [1]
        )
        first = target_modules(backbone, tower, layers=[-2], projections="", mlp=True)
        assert first == expected_names(tower, path, block[4:], [0])
    assert target_modules(backbone) == [
        *target_modules(backbone, "vision"),
        *target_modules(backbone, "text"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projections": "qz"}, "are q, k, v and o; found 'z'"),
        ({"towers": "image"}, r"'towers' .* one of both, vision, text; found 'image'"),
        ({"layers": [0, 2]}, r"vision_model has blocks 0 to 1; found 2 in `layers`"),
        ({"projections": ""}, r"It cannot be built so|nothing"),
    ],
    ids=str,
)
def test_a_place_that_is_not_there_is_refused(settings: dict[str, Any], message: str) -> None:
    model, processor = clip()
    with pytest.raises(GloVLMError, match=message):
        attach("lora", model, processor, **settings)


def test_a_tower_without_blocks_is_refused() -> None:
    convolutional = ResNetModel(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
    )
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(GloVLMError, match=r"Sequential has no list of transformer blocks"):
        tower_layers(plain)
    backbone = SimpleNamespace(vision_model=convolutional)
    with pytest.raises(GloVLMError, match="'q' projection"):
        target_modules(backbone, "vision", last=1, projections="q")


# -------------------------------------------------------------------------------- vanilla and full


def test_vanilla_trains_the_last_blocks_and_the_logit_scale_and_nothing_else() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    stock = CLIPModel(
        CLIPConfig(
            vision_config={**tower, "num_hidden_layers": 6, "image_size": 16, "patch_size": 8},
            text_config={**tower, "num_hidden_layers": 5, "vocab_size": 50},
            projection_dim=8,
        )
    )
    model = GloVLMModel(GloVLMConfig(backbone_config=stock.config), backbone=stock)
    model.requires_grad_(False)
    tuning = attach("vanilla", model, clip()[1])
    blocks = [f"vision_model.encoder.layers.{i}." for i in (2, 3, 4, 5)]
    blocks += [f"text_model.encoder.layers.{i}." for i in (3, 4)]
    expected = {
        n
        for n, _ in model.named_parameters()
        if n == "backbone.logit_scale" or any(n.startswith(f"backbone.{b}") for b in blocks)
    }
    assert len(expected) == 6 * 16 + 1
    assert trained_names(model, tuning) == [expected]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def test_vanilla_on_a_pair_trains_its_projection_too() -> None:
    model, processor = pair()
    tuning = attach("vanilla", model, processor)
    towers, projection = trained_names(model, tuning)
    assert projection == {f"backbone.visual_projection.{n}" for n in ("weight", "bias")}
    assert tuning.groups[1]["lr"] == 1e-3
    assert "backbone.logit_scale" in towers
    assert {n for n, p in model.named_parameters() if p.requires_grad} == towers | projection


@pytest.mark.parametrize(
    ("vision_layers", "text_layers", "trains"), [(0, 1, (False, True)), (1, 0, (True, False))]
)
def test_vanilla_says_which_tower_trains(
    vision_layers: int, text_layers: int, trains: tuple[bool, bool]
) -> None:
    model, processor = clip()
    tuning = attach(
        "vanilla", model, processor, vision_layers=vision_layers, text_layers=text_layers
    )
    assert (tuning.trains_vision, tuning.trains_text) == trains
    (names,) = trained_names(model, tuning)
    still = "vision_model" if vision_layers == 0 else "text_model"
    assert not any(still in n for n in names)


def test_full_trains_everything_that_features_depend_on() -> None:
    model, processor = clip()
    tuning = attach("full", model, processor)
    assert trained_names(model, tuning) == [{n for n, _ in model.named_parameters()}]
    assert (tuning.trains_vision, tuning.trains_text) == (True, True)

    model, processor = pair()
    tuning = attach("full", model, processor)
    rest, projection = trained_names(model, tuning)
    assert projection == {f"backbone.visual_projection.{n}" for n in ("weight", "bias")}
    assert tuning.groups[1]["lr"] == 1e-3
    still = {n for n, _ in model.named_parameters()} - rest - projection
    assert still == {n for n, p in model.named_parameters() if not p.requires_grad}
    # The pair averages BERT's tokens and masks no patch.
    assert still == {
        "backbone.vision_model.embeddings.mask_token",
        "backbone.text_model.pooler.dense.weight",
        "backbone.text_model.pooler.dense.bias",
    }


@pytest.mark.parametrize("make", [clip, pair])
def test_full_learns(make: Any) -> None:
    model, processor = make()
    tuning = attach("full", model, processor)
    losses = Task(processor).train(model, tuning, lr=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


def test_a_recipe_of_steps_takes_the_place_of_epochs() -> None:
    method = METHODS["clip_lora"]
    assert isinstance(method, TowerMethod)
    recipe = method.recipe(1, method.configure({}))
    assert plan(recipe, 3) == (500, 500)
    assert plan(replace(recipe, steps=None, epochs=7), 64) == (7, 14)
