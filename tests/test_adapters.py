"""What all methods share: the ridge start of a pair, zero-shot, the table and its words.

The formulae and numbers of each family are tested in a file of its own.
"""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from tiny import tiny_clip, tiny_pair
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPModel,
)

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import (
    METHODS,
    FeatureMethod,
    Fitted,
    Recipe,
    Support,
    get_method,
    give_joint_space,
)
from hf_glovlm.methods.contract import register
from hf_glovlm.model.heads import prototype_head


def clip() -> tuple[Any, Any]:
    model, processor = load_backbone(str(tiny_clip()))
    return model.requires_grad_(False), processor


def unit(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


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


# ------------------------------------------------------------------------------------- zero-shot


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
    logits = method.fit(nothing, method.configure({})).head(features).detach().numpy()
    x = features.double().numpy()
    expected = scale * (x / np.linalg.norm(x, axis=1, keepdims=True)) @ np.stack(prototypes).T
    assert np.abs(logits - expected).max() < 1e-3


def test_prototype_head_gives_scaled_cosines_of_whatever_it_is_given() -> None:
    head = prototype_head(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), 10.0)
    assert head.cosine
    assert head(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([6.0, 8.0])


# --------------------------------------------------------------------------------- table and words


# Every method of METHODS: its family, whether it needs texts, how it uses validation images, and
# whether it is transductive.
METHOD_CASES = {
    "zero_shot": ("training-free", True, "none", False),
    "prototype": ("training-free", False, "none", False),
    "ss_text": ("training-free", True, "none", False),
    "ss_text_plus": ("training-free", True, "none", False),
    "gda": ("training-free", True, "search", False),
    "tip_adapter": ("training-free", True, "search", False),
    "transclip": ("training-free", True, "search", True),
    "linear_probe": ("feature side", False, "search", False),
    "lp_plus_plus": ("feature side", True, "early stopping", False),
    "zs_lp": ("feature side", True, "early stopping", False),
    "clap": ("feature side", True, "early stopping", False),
    "taskres": ("feature side", True, "early stopping", False),
    "clip_adapter": ("feature side", True, "early stopping", False),
    "tip_adapter_f": ("feature side", True, "search", False),
    "prolip": ("feature side", True, "early stopping", False),
    "classifier": ("feature side", False, "early stopping", False),
    "vanilla": ("both sides", True, "early stopping", False),
    "full": ("both sides", True, "early stopping", False),
    "lora": ("both sides", True, "early stopping", False),
    "clip_lora": ("both sides", True, "early stopping", False),
    "prompt_tuning": ("text side", True, "early stopping", False),
    "kgcoop": ("text side", True, "early stopping", False),
    "prograd": ("text side", True, "early stopping", False),
    "biomedcoop": ("text side", True, "early stopping", False),
    "vpt": ("image side", True, "early stopping", False),
    "adapter": ("image side", True, "early stopping", False),
    "maple": ("both sides", True, "early stopping", False),
    "cocoop": ("text side", True, "early stopping", False),
    "convlm": ("image side", True, "early stopping", False),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_describe_themselves(name: str) -> None:
    where = "METHOD_CASES in tests/test_adapters.py"
    what = "its family, need of texts, use of validation and whether it is transductive"
    expected = case_of(METHOD_CASES, name, "METHODS", where, what)
    row = METHODS[name].describe()
    assert row["name"] == name
    assert row["trains"]
    assert row["citation"]
    assert isinstance(row["settings"], dict)
    keys = ("family", "needs_text", "validation", "transductive")
    assert tuple(row[key] for key in keys) == expected


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
        METHODS["ss_text"].configure({"r": 4})


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
    sentence = (
        r"Setting '\w+' of method '\w+' must be (a whole number|a number|true or false); found"
    )
    with pytest.raises(GloVLMError, match=sentence):
        METHODS[name].configure(settings)


def test_a_whole_number_serves_for_a_fraction() -> None:
    assert METHODS["linear_probe"].configure({"C": 1}).C == 1


def test_a_method_must_say_what_it_is() -> None:
    class Silent(FeatureMethod):
        name = "silent"

        def fit(self, support: Support, config: Any) -> Fitted:
            return Fitted(nn.Identity())

    with pytest.raises(TypeError, match="Silent must state 'family'"):
        register(Silent)
    with pytest.raises(TypeError, match="already a method 'lora'"):
        register(type(METHODS["lora"]))


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe(lr=1e-3, epochs=2, batch_size=4)
    assert replace(recipe, lr=1e-2) != recipe
    assert Recipe(**asdict(recipe)) == recipe
