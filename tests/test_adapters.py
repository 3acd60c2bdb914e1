"""Each method is the formula of its paper, with the numbers of its paper."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import TrainableTokensConfig, get_peft_model
from sklearn.linear_model import LogisticRegression, Ridge
from tiny import tiny_bert, tiny_clip, tiny_pair, tiny_siglip
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
)

from hf_glovlm.adapters import (
    METHODS,
    FeatureMethod,
    HeadMethod,
    Recipe,
    Support,
    TowerMethod,
    Tuning,
    get_method,
    give_joint_space,
    prototype_head,
)
from hf_glovlm.adapters.contract import register
from hf_glovlm.adapters.text import ContextEmbedding, find_embedding, free_token_ids
from hf_glovlm.adapters.weights import attention_modules, tower_layers
from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import ClassInfo
from hf_glovlm.errors import GloVLMError
from hf_glovlm.model import GloVLMConfig, GloVLMModel, MLPHead

NAMES = ("mesangial", "sclerosed", "viable")
CLASSES = [ClassInfo(n, n, (f"a {n} glomerulus", f"this photo shows {n}")) for n in NAMES]
PROMPTS = [list(c.prompts) for c in CLASSES]
TOWER_METHODS = sorted(name for name, m in METHODS.items() if isinstance(m, TowerMethod))


def clip() -> tuple[Any, Any]:
    model, processor = load_backbone(str(tiny_clip()))
    return model.requires_grad_(False), processor


def pair() -> tuple[Any, Any]:
    """A pair with a joint space, as `adapt` hands it to a method."""
    model, processor = load_backbone(tiny_pair())
    pooled, labels = torch.randn(6, 64), torch.tensor([0, 0, 1, 1, 2, 2])
    give_joint_space(model, pooled, labels, unit(3, 32))
    return model.requires_grad_(False), processor


def unit(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def attach(name: str, model: Any, processor: Any, **settings: Any) -> Tuning:
    method = METHODS[name]
    assert isinstance(method, TowerMethod)
    return method.attach(model, processor, CLASSES, method.configure(settings))


def trained_names(model: nn.Module, tuning: Tuning) -> list[set[str]]:
    """Names of what trains, one set for each optimiser group."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in tuning.groups]


# ------------------------------------------------------------------------------------ ridge start


@st.composite
def supports(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Vectors of any scale and offset, unbalanced labels with every class, unit class texts."""
    counts = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = np.repeat(np.arange(len(counts)), counts)
    scale = 10.0 ** draw(st.integers(-3, 3))
    pooled = scale * (rng.normal(size=(len(labels), 64)) + rng.normal(size=64))
    texts = rng.normal(size=(len(counts), 32))
    return pooled, rng.permutation(labels), texts / np.linalg.norm(texts, axis=1, keepdims=True)


def joined(
    pooled: NDArray[Any], labels: NDArray[Any], texts: NDArray[Any], penalty: float = 1.0
) -> Any:
    model, _ = load_backbone(tiny_pair())
    give_joint_space(
        model,
        torch.from_numpy(pooled).float(),
        torch.from_numpy(labels),
        torch.from_numpy(texts).float(),
        penalty,
    )
    return model


@given(supports(), st.sampled_from([0.01, 1.0, 10.0]))
@settings(max_examples=15)
def test_a_pair_starts_from_the_ridge_regression_that_it_names(
    given_support: tuple[NDArray[Any], ...], penalty: float
) -> None:
    pooled, labels, texts = given_support
    pooled = pooled.astype(np.float32).astype(np.float64)
    model = joined(pooled, labels, texts, penalty)
    # The primal form: (X'SX + lambda 1)^-1 X'ST, with S the weights that make classes equal.
    share = 1.0 / (len(texts) * np.bincount(labels)[labels])
    targets = texts.astype(np.float32).astype(np.float64)[labels]
    x_mean, t_mean = share @ pooled, share @ targets
    x, t = pooled - x_mean, targets - t_mean
    spread = (share * (x**2).sum(1)).sum()
    strength = penalty * spread / len(x)
    gram = (x * share[:, None]).T @ x + strength * np.eye(x.shape[1])
    matrix = np.linalg.solve(gram, (x * share[:, None]).T @ t).T
    expected = pooled @ matrix.T + (t_mean - matrix @ x_mean)

    features = model.project_images(torch.from_numpy(pooled).float()).detach().numpy()
    assert model.has_joint_space
    assert model.config.vision_projection == "linear"
    assert np.abs(features - expected).max() < 1e-4
    weight = model.backbone.visual_projection.weight.detach().numpy()
    assert np.abs(weight - matrix).max() < 1e-5 * max(1.0, np.abs(matrix).max())

    ridge = Ridge(alpha=strength, solver="cholesky").fit(pooled, targets, sample_weight=share)
    mine, theirs = features @ texts.T, ridge.predict(pooled) @ texts.T
    assert np.abs(mine - theirs).max() < 1e-4
    sure = np.ptp(np.sort(theirs, axis=1)[:, -2:], axis=1) > 1e-3
    assert (mine.argmax(1) == theirs.argmax(1))[sure].all()


def test_the_ridge_start_does_not_depend_on_the_scale_of_a_tower() -> None:
    rng = np.random.default_rng(0)
    pooled, labels = rng.normal(size=(9, 64)), np.arange(9) % 3
    texts = np.asarray(unit(3, 32))
    small, large = (
        joined(factor * pooled, labels, texts).project_images(torch.tensor(factor * pooled).float())
        for factor in (0.01, 100.0)
    )
    assert torch.allclose(small, large, atol=1e-4)


# ---------------------------------------------------------------------------------- feature side


@pytest.mark.parametrize("counts", [(4, 4, 4), (7, 1, 3), (6, 6), (9, 1), (2, 2, 2, 2, 2)])
def test_linear_probe_is_scikit_learns_logistic_regression(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features = 3 * torch.randn(len(labels), 12) + labels.unsqueeze(1)
    method = METHODS["linear_probe"]
    assert isinstance(method, FeatureMethod)
    support = Support(features, labels, len(counts))
    head = method.fit(support, method.configure({}))

    def unit_rows(x: torch.Tensor) -> NDArray[np.float64]:
        array = x.double().numpy()
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    oracle = LogisticRegression(C=100, max_iter=1000).fit(unit_rows(features), labels.numpy())
    fresh = 5 * torch.randn(40, 12)
    logits = head(fresh).detach().double()
    decision = oracle.decision_function(unit_rows(fresh))
    if len(counts) == 2:
        assert np.abs((logits[:, 1] - logits[:, 0]).numpy() - decision).max() < 1e-4
    else:
        assert np.abs(logits.numpy() - decision).max() < 1e-4
    probabilities = oracle.predict_proba(unit_rows(fresh))
    assert np.abs(logits.softmax(-1).numpy() - probabilities).max() < 1e-5


def test_linear_probe_takes_its_strength() -> None:
    method = METHODS["linear_probe"]
    assert isinstance(method, FeatureMethod)
    support = Support(torch.randn(9, 8), torch.arange(9) % 3, 3)
    weak, strong = (method.fit(support, method.configure({"C": c})) for c in (1e-3, 100.0))
    assert weak.weight.norm() < 0.05 * strong.weight.norm()


def test_zero_shot_averages_the_prompts_of_a_class_after_normalising() -> None:
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    prompts = [
        ["viable"],
        ["a sclerosed tuft", "collagen", "part of the tuft"],
        ["PAS", "crescent"],
    ]
    prototypes = []
    for texts in prompts:  # one text at a time: no padding, no mask
        total = np.zeros(24)
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                feature = stock.get_text_features(input_ids=ids).pooler_output[0].double().numpy()
            total += feature / np.linalg.norm(feature)
        prototypes.append(total / np.linalg.norm(total))
    model, processor = clip()
    encoded = processor.encode_prompts(prompts)
    with torch.no_grad():
        mine = model.class_prototypes(**encoded)
    assert np.abs(mine.numpy() - np.stack(prototypes)).max() < 1e-5

    method = METHODS["zero_shot"]
    assert isinstance(method, FeatureMethod)
    scale = float(model.logit_scale.exp())
    nothing = Support(torch.zeros(0, 24), torch.zeros(0, dtype=torch.long), 3, mine, scale)
    features = 4 * torch.randn(10, 24)
    logits = method.fit(nothing, method.configure({}))(features).detach().numpy()
    x = features.double().numpy()
    expected = scale * (x / np.linalg.norm(x, axis=1, keepdims=True)) @ np.stack(prototypes).T
    assert np.abs(logits - expected).max() < 1e-3


def test_prototype_head_gives_scaled_cosines_of_whatever_it_is_given() -> None:
    head = prototype_head(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), 10.0)
    assert head.cosine
    assert head(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([6.0, 8.0])


def test_classifier_has_the_published_layers() -> None:
    method = METHODS["classifier"]
    assert isinstance(method, HeadMethod)
    head = method.build(Support(torch.randn(6, 20), torch.arange(6) % 3, 3), method.configure({}))
    assert isinstance(head, MLPHead)
    linear, norm, _, dropout, last = head.layers
    assert [type(layer) for layer in head.layers] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
    ]
    assert (linear.in_features, linear.out_features) == (20, 512)
    assert norm.num_features == 512
    assert dropout.p == 0.5
    assert (last.in_features, last.out_features) == (512, 3)


# -------------------------------------------------------------------------------- pinned constants

ADAMW = {"optimizer": "adamw", "patience": 7, "min_delta": 0.001, "warmup_epochs": 0}
COOP = {
    "lr": 2e-3,
    "weight_decay": 5e-4,
    "batch_size": 32,
    "optimizer": "sgd",
    "schedule": "cosine",
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
}
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    ("classifier", 8, {"lr": 1e-3, "weight_decay": 1e-4, "epochs": 20, "batch_size": 16, **ADAMW}),
    (
        "vanilla",
        8,
        {
            "lr": 1e-4,
            "weight_decay": 0.01,
            "epochs": 20,
            "batch_size": 5,
            **ADAMW,
            "schedule": "cosine",
            "final_lr": 0.01,
        },
    ),
    (
        "lora",
        8,
        {
            "lr": 2e-5,
            "weight_decay": 0.01,
            "epochs": 20,
            "batch_size": 5,
            **ADAMW,
            "schedule": "constant",
        },
    ),
    *(("prompt_tuning", k, {**COOP, "epochs": e}) for k, e in ((1, 50), (2, 100), (4, 100))),
    *(("prompt_tuning", k, {**COOP, "epochs": 200}) for k in (8, 16)),
]
SETTINGS: dict[str, Mapping[str, Any]] = {
    "zero_shot": {},
    "linear_probe": {"C": 100.0, "max_iter": 1000},
    "classifier": {"hidden": 512, "dropout": 0.5},
    "vanilla": {"vision_layers": 4, "text_layers": 2, "projection_lr": 1e-3},
    "lora": {
        "r": 4,
        "alpha": 16,
        "dropout": 0.1,
        "last": 1,
        "projections": "qv",
        "projection_lr": 1e-3,
    },
    "prompt_tuning": {
        "context_tokens": 16,
        "class_specific": False,
        "init_std": 0.02,
        "projection_lr": 1e-3,
    },
}


@pytest.mark.parametrize(("name", "shots", "expected"), RECIPES)
def test_recipes_are_the_published_ones(name: str, shots: int, expected: dict[str, Any]) -> None:
    method = METHODS[name]
    assert isinstance(method, HeadMethod | TowerMethod)
    recipe = asdict(method.recipe(shots, method.configure({})))
    assert {key: recipe[key] for key in expected} == expected


def test_settings_are_the_published_ones() -> None:
    assert {n: METHODS[n].describe()["settings"] for n in SETTINGS} == SETTINGS


def test_every_method_that_trains_has_a_pinned_recipe() -> None:
    training = {n for n, m in METHODS.items() if isinstance(m, HeadMethod | TowerMethod)}
    assert training == {name for name, _, _ in RECIPES}
    assert set(METHODS) == set(SETTINGS)


def test_lora_is_built_with_the_published_numbers() -> None:
    model, processor = clip()
    attach("lora", model, processor)
    layers = [m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
    assert len(layers) == 4
    for layer in layers:
        assert layer.lora_A["default"].out_features == 4
        assert layer.scaling["default"] == 16 / 4
        assert layer.lora_dropout["default"].p == 0.1
        assert layer.lora_B["default"].weight.abs().max() == 0  # starts as the pretrained model


def test_context_starts_as_a_small_normal_draw() -> None:
    model, processor = clip()
    tuning = attach("prompt_tuning", model, processor, context_tokens=200, class_specific=False)
    (context,) = tuning.groups[0]["params"]
    assert context.shape == (200, 32)
    assert context.std().item() == pytest.approx(0.02, rel=0.1)


# ------------------------------------------------------------------------------------- what trains

LAST = "encoder.layers.1.self_attn"
CLIP_LORA = {
    f"backbone.{tower}.{LAST}.{kind}_proj.lora_{half}.default.weight"
    for tower in ("vision_model", "text_model")
    for kind in "qv"
    for half in "AB"
}


def test_lora_trains_q_and_v_of_the_last_block_of_both_towers() -> None:
    model, processor = clip()
    tuning = attach("lora", model, processor)
    assert trained_names(model, tuning) == [CLIP_LORA]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == CLIP_LORA
    assert (tuning.trains_vision, tuning.trains_text) == (True, True)
    assert tuning.prompts == PROMPTS


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
    ("r", "projections", "last", "expected"),
    [(4, "qv", 1, 4 * 4 * 64), (2, "qkvo", 0, 16 * 2 * 64), (1, "k", 1, 2 * 64)],
)
def test_lora_has_r_times_in_plus_out_parameters_a_projection(
    r: int, projections: str, last: int, expected: int
) -> None:
    for make, more in ((clip, 0), (pair, 64 * 32 + 32)):
        model, processor = make()
        tuning = attach("lora", model, processor, r=r, projections=projections, last=last)
        assert sum(p.numel() for g in tuning.groups for p in g["params"]) == expected + more


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


def test_prompt_tuning_trains_the_context_alone() -> None:
    model, processor = clip()
    tuning = attach("prompt_tuning", model, processor)
    name = "backbone.text_model.embeddings.token_embedding.context"
    assert trained_names(model, tuning) == [{name}]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {name}
    assert (tuning.trains_vision, tuning.trains_text) == (False, True)
    assert tuning.prompts == [[f"{n}."] for n in NAMES]

    model, processor = pair()
    tuning = attach("prompt_tuning", model, processor)
    context, projection = trained_names(model, tuning)
    assert {n.rpartition(".")[2] for n in context} == {"context"}
    assert projection == {f"backbone.visual_projection.{n}" for n in ("weight", "bias")}
    assert tuning.groups[1]["lr"] == 1e-3


# ------------------------------------------------------------------------------------ prompt tuning


def text_features(model: Any, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = model.get_text_features(
            encoded["input_ids"], encoded["attention_mask"]
        ).pooler_output
    return features


@pytest.mark.parametrize("folder", [tiny_clip, tiny_bert], ids=["clip", "bert"])
def test_the_compact_context_equals_pefts_trainable_tokens(folder: Any) -> None:
    model, processor = clip() if folder is tiny_clip else pair()
    theirs = copy.deepcopy(model)
    tuning = attach("prompt_tuning", model, processor, context_tokens=5)
    (context,) = tuning.groups[0]["params"]
    ids = processor.context_token_ids
    encoded = processor.encode_prompts(tuning.prompts)
    name, _ = find_embedding(theirs.backbone)
    wrapped = get_peft_model(
        theirs.backbone, TrainableTokensConfig(token_indices=ids, target_modules=[name])
    )
    for key, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.data.copy_(context.data)
    expected = text_features(theirs, encoded)
    assert (text_features(model, encoded) - expected).abs().max() < 1e-6

    # The gradients too, or training on one and saving the other would not be the same method.
    model.get_text_features(
        encoded["input_ids"], encoded["attention_mask"]
    ).pooler_output.square().sum().backward()
    theirs.get_text_features(
        encoded["input_ids"], encoded["attention_mask"]
    ).pooler_output.square().sum().backward()
    (delta,) = (p for n, p in wrapped.named_parameters() if "trainable_tokens_delta" in n)
    assert context.grad is not None
    assert (context.grad - delta.grad).abs().max() < 1e-5 * delta.grad.abs().max()

    tuning.finish(None)
    assert (text_features(model, encoded) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("class_specific", [False, True])
def test_prompt_tuning_equals_embeddings_spliced_in_by_hand(class_specific: bool) -> None:
    model, processor = clip()
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    tuning = attach(
        "prompt_tuning", model, processor, context_tokens=3, class_specific=class_specific
    )
    (context,) = tuning.groups[0]["params"]
    context.data.normal_(std=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    table = stock.text_model.embeddings.token_embedding
    with torch.no_grad():
        mine = model.class_prototypes(**processor.encode_prompts(tuning.prompts))
        for k, name in enumerate(NAMES):  # [start][v1 v2 v3][name].[end]
            ids = torch.tensor([tokenizer(f"{name}.")["input_ids"]])
            learned = context[3 * k : 3 * k + 3] if class_specific else context
            spliced = torch.cat([table(ids)[:, :1], learned[None], table(ids)[:, 1:]], dim=1)
            filled = torch.cat([ids[:, :1], torch.full((1, 3), 440), ids[:, 1:]], dim=1)
            hook = table.register_forward_hook(lambda *_, spliced=spliced: spliced)
            feature = stock.get_text_features(input_ids=filled).pooler_output
            hook.remove()
            assert (nn.functional.normalize(feature, dim=-1) - mine[k]).abs().max() < 1e-6


def test_class_specific_contexts_are_apart() -> None:
    model, processor = clip()
    tuning = attach("prompt_tuning", model, processor, context_tokens=4, class_specific=True)
    (context,) = tuning.groups[0]["params"]
    rows = processor.context_token_ids
    assert context.shape == (12, 32)
    assert [len(row) for row in rows] == [4, 4, 4]
    assert len({i for row in rows for i in row}) == 12
    encoded = processor.encode_prompts(tuning.prompts)
    for k in range(3):
        assert encoded["input_ids"][k, 1:5].tolist() == rows[k]
    before = text_features(model, encoded)
    with torch.no_grad():
        context[4:8].normal_()  # the context of the second class
    moved = (text_features(model, encoded) - before).abs().amax(1)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() == 0


@pytest.mark.parametrize("make", [tiny_clip, tiny_pair, tiny_siglip])
def test_the_context_stands_where_a_text_begins(make: Any) -> None:
    _, processor = load_backbone(str(make()))
    plain = processor.tokenizer("viable.")["input_ids"]
    processor.context_token_ids = [7, 8, 9]
    (row,) = processor.encode_prompts([["viable."]])["input_ids"].tolist()
    start = 0 if make is tiny_siglip else 1  # SigLIP has no start token
    assert row[: len(plain) + 3] == [*plain[:start], 7, 8, 9, *plain[start:]]


@given(
    st.sampled_from([tiny_clip, tiny_bert, tiny_siglip]),
    st.lists(st.text(max_size=30), min_size=1, max_size=4),
    st.integers(1, 40),
)
@settings(max_examples=40)
def test_the_rows_of_a_context_are_used_by_no_text(
    folder: Any, texts: list[str], count: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rows = len(tokenizer) + 16
    ids = free_token_ids(SimpleNamespace(tokenizer=tokenizer), rows, [texts], count)
    assert len(ids) == len(set(ids)) == count
    assert all(0 <= i < rows for i in ids)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert not set(ids) & {i for row in tokenizer(texts)["input_ids"] for i in row}


def test_a_context_stays_below_the_end_token_where_that_is_the_highest() -> None:
    words = [f"word{i}" for i in range(30)]
    vocab = {w: i for i, w in enumerate([*words, "<start>", "<end>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    # The embedding has rows above the end token, as resized models have.
    ids = free_token_ids(SimpleNamespace(tokenizer=tokenizer), 64, [["word29 word5"]], 4)
    assert ids == [28, 27, 26, 25]


def test_a_vocabulary_with_too_few_free_rows_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    with pytest.raises(GloVLMError, match=r"needs 999 vocabulary rows.*Lower context_tokens"):
        free_token_ids(SimpleNamespace(tokenizer=tokenizer), 300, PROMPTS, 999)


def test_a_context_embedding_leaves_every_other_row_alone() -> None:
    base = nn.Embedding(20, 6)
    context = ContextEmbedding(base, [19, 3, 7], init_std=1.0)
    ids = torch.arange(20).reshape(4, 5)
    out = context(ids).reshape(20, 6)
    for row in range(20):
        expected = context.context[[19, 3, 7].index(row)] if row in (3, 7, 19) else base.weight[row]
        assert torch.equal(out[row], expected)
    assert set(context.state_dict()) == {"context", "base.weight"}


# --------------------------------------------------------------------------------- table and words


def test_methods_describe_themselves() -> None:
    for name, method in METHODS.items():
        row = method.describe()
        assert row["name"] == name
        assert row["trains"]
        assert row["citation"]
        assert row["family"] in (
            *("training-free", "feature side", "text side", "image side", "both sides"),
        )
        assert isinstance(row["settings"], dict)
        assert row["needs_text"] == (name not in ("linear_probe", "classifier"))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("linear_prob", "linear_probe"), ("LORA", "lora"), ("prompt-tuning", "prompt_tuning")],
)
def test_an_unknown_method_names_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(GloVLMError, match=rf"Unknown method '{wrong}'.*Did you mean '{meant}'\?"):
        get_method(wrong)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(GloVLMError, match=r"'lora' has no setting 'drop_out'.*mean 'dropout'\?"):
        METHODS["lora"].configure({"drop_out": 0.0})
    with pytest.raises(GloVLMError, match=r"has no setting 'r' \(it has: none\)"):
        METHODS["zero_shot"].configure({"r": 4})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {"r": "4"}),
        ("lora", {"r": 4.5}),
        ("lora", {"r": True}),
        ("lora", {"dropout": "no"}),
        ("lora", {"dropout": True}),
        ("prompt_tuning", {"class_specific": 1}),
        ("linear_probe", {"C": None}),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(GloVLMError, match=r"Setting '\w+' of method '\w+' is a (int|float|bool)"):
        METHODS[name].configure(settings)


def test_a_whole_number_serves_for_a_fraction() -> None:
    assert METHODS["linear_probe"].configure({"C": 1}).C == 1


def test_a_tower_without_blocks_is_refused() -> None:
    convolutional = ResNetModel(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
    )
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(GloVLMError, match=r"Sequential has no list of transformer blocks"):
        tower_layers(plain)
    backbone = SimpleNamespace(vision_model=convolutional)
    with pytest.raises(GloVLMError, match="'q' projection"):
        attention_modules(backbone, "vision_model", 1, "q")


def test_an_unknown_projection_is_refused() -> None:
    model, processor = clip()
    with pytest.raises(GloVLMError, match="are q, k, v and o; found 'z'"):
        attach("lora", model, processor, projections="qz")


def test_a_method_must_say_what_it_is() -> None:
    class Silent(FeatureMethod):
        name = "silent"

        def fit(self, support: Support, config: Any) -> nn.Module:
            return nn.Identity()

    with pytest.raises(TypeError, match="Silent must state 'family'"):
        register(Silent)
    with pytest.raises(TypeError, match="already a method 'lora'"):
        register(type(METHODS["lora"]))


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe(lr=1e-3, epochs=2, batch_size=4)
    assert replace(recipe, lr=1e-2) != recipe
    assert Recipe(**asdict(recipe)) == recipe
