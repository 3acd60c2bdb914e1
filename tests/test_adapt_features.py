"""Methods on bare features, how settings are chosen, and no way in for a test label."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, FeatureMethod, Fitted, Fold, HeadMethod, Support
from hf_glovlm.methods.contract import score_logits
from hf_glovlm.model.heads import linear_head
from hf_glovlm.training import AdaptedFeatures, adapt, adapt_features
from hf_glovlm.training.adaptation import _leave_groups_out

ON_FEATURES = [n for n, m in METHODS.items() if isinstance(m, FeatureMethod | HeadMethod)]
# These take 300 steps of a fit, a dozen times; the others of their kind do the same in less.
LONG = ("zs_lp", "clap", "prolip")
WITHOUT_LONG = [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in ON_FEATURES]
WITH_LABELS = [n for n in WITHOUT_LONG if n != "zero_shot"]


def clusters(counts: tuple[int, ...], dim: int = 16, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Support features and labels, class texts, and one unseen feature of each class."""
    rng = np.random.default_rng(seed)
    texts = np.linalg.qr(rng.normal(size=(dim, dim)))[0][: len(counts)]
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = 0.3 / dim**0.5
    features = texts[labels] + noise * rng.normal(size=(len(labels), dim))
    unseen = texts + noise * rng.normal(size=texts.shape)
    return features, labels, texts, unseen


def fit(name: str, *given_: Any, **options: Any) -> AdaptedFeatures:
    if METHODS[name].transductive:
        options.setdefault("query_features", given_[0])
    return adapt_features(name, *given_, **options)


@pytest.mark.parametrize(
    "counts", [pytest.param((4, 4, 4), marks=pytest.mark.long), (1, 1), (6, 1, 2)]
)
@pytest.mark.parametrize("name", ON_FEATURES)
def test_separable_classes_are_learned_from_any_support(name: str, counts: tuple[int, ...]) -> None:
    features, labels, texts, unseen = clusters(counts)
    fitted = fit(name, features, labels, texts)
    logits = fitted.predict_logits(unseen)
    assert logits.shape == (len(counts), len(counts))
    assert logits.dtype == np.float32
    assert logits.argmax(1).tolist() == list(range(len(counts)))


@pytest.mark.parametrize("name", WITH_LABELS)
def test_without_texts_the_class_means_stand_in_and_a_note_is_made(name: str) -> None:
    features, labels, _, unseen = clusters((3, 2, 4))
    fitted = fit(name, features, labels)
    assert fitted.predict_logits(unseen).argmax(1).tolist() == [0, 1, 2]
    assert any("No joint space" in note for note in fitted.notes) == METHODS[name].needs_text
    assert (fitted.facts.get("joint_space") is False) == METHODS[name].needs_text


@pytest.mark.parametrize("name", WITHOUT_LONG)
def test_a_seed_decides_everything(name: str) -> None:
    features, labels, texts, unseen = clusters((3, 3))
    first = fit(name, features, labels, texts, seed=3).predict_logits(unseen)
    torch.rand(7)
    assert np.array_equal(fit(name, features, labels, texts, seed=3).predict_logits(unseen), first)


@cache
def _plain_logits(name: str) -> Any:
    features, labels, texts, unseen = clusters((3, 2))
    return fit(name, features, labels, texts).predict_logits(unseen)


@pytest.mark.parametrize("name", WITHOUT_LONG)
@given(power=st.integers(-3, 3))
@settings(max_examples=2)
def test_the_length_of_features_does_not_matter(name: str, power: int) -> None:
    if name in ("classifier", "prolip"):  # they see the features as they are
        return
    features, labels, texts, unseen = clusters((3, 2))
    plain = _plain_logits(name)
    longer = fit(name, 2.0**power * features, labels, 2.0**power * texts)
    assert np.abs(longer.predict_logits(2.0**power * unseen) - plain).max() < 2e-3


def test_a_transductive_method_answers_for_its_queries() -> None:
    features, labels, texts, unseen = clusters((3, 3))
    fitted = adapt_features("transclip", features, labels, texts, query_features=unseen)
    assert fitted.query_logits.shape == (2, 2)
    assert any("no longer transductive" in note for note in fitted.notes)
    with pytest.raises(GloVLMError, match="quer"):
        adapt_features("transclip", features, labels, texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "lora"}, "trains inside a tower.*linear_probe"),
        ({"support_labels": [0, 1]}, "Expected 4 whole class numbers"),
        ({"support_labels": [0.0, 1.0, 0.0, 1.0]}, "whole class numbers"),
        ({"support_labels": [0, 1, 2, 0]}, "from 0 to 1"),
        ({"support_labels": [0, -1, 1, 0]}, "from 0 to 1"),
        ({"support_labels": [0, 0, 0, 0]}, "none of: class 1"),
        ({"support_features": np.full((4, 16), np.nan)}, "with NaN"),
        ({"support_features": np.ones(4)}, "matrix"),
        ({"support_features": [["a"]]}, "matrix of numbers"),
        ({"text_features": np.ones((2, 3))}, "one width; found 16 and 3"),
        ({"method_config": {"c": 1}}, "has no setting 'c'"),
        ({"method": "zero_shot", "text_features": None}, "give text_features"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change: dict[str, Any], words: str) -> None:
    features, labels, texts, _ = clusters((2, 2))
    good = {"method": "linear_probe", "support_features": features, "support_labels": labels}
    with pytest.raises(GloVLMError, match=words):
        adapt_features(**{**good, "text_features": texts, **change})


def test_features_of_another_width_are_refused() -> None:
    features, labels, texts, _ = clusters((2, 2))
    with pytest.raises(GloVLMError, match="width 16, found 3"):
        fit("linear_probe", features, labels, texts).predict_logits(np.ones((1, 3)))


@pytest.mark.parametrize("function", [adapt, adapt_features])
def test_no_argument_could_carry_a_test_label(function: Any) -> None:
    names = set(inspect.signature(function).parameters)
    assert not {name for name in names if "test" in name}
    assert {"query_labels", "labels"}.isdisjoint(names)


# ----------------------------------------------------------------------------- choosing settings


@dataclass(frozen=True)
class ShrinkConfig:
    """A setting that a fold can tell apart."""

    flip: bool = False
    scale: float = 1.0


class Shrink(FeatureMethod):
    """Class means; `flip` makes it wrong, `scale` makes it more or less sure."""

    name, family, trains = "shrink", "training-free", "nothing"
    needs_text, citation = False, "a test"
    validation = "search"
    Config = ShrinkConfig
    grid = {"flip": (True, False), "scale": (0.1, 1.0, 10.0)}  # noqa: RUF012

    def fit(self, support: Support, config: ShrinkConfig) -> Fitted:
        means = torch.stack(
            [support.features[support.labels == k].mean(0) for k in range(support.num_classes)]
        )
        sign = -1.0 if config.flip else 1.0
        return Fitted(linear_head(sign * config.scale * means, torch.zeros(len(means))))


def test_settings_are_chosen_by_balanced_accuracy_then_likelihood_then_the_default() -> None:
    features, labels, _, unseen = clusters((5, 3))
    support = Support(torch.tensor(features).float(), torch.tensor(labels), 2)
    fold = Fold(support, torch.tensor(unseen).float(), torch.tensor([0, 1]))
    method = Shrink()
    assert method.choose([fold], ShrinkConfig(flip=True)) == ShrinkConfig(False, 10.0)
    nothing_to_learn = Fold(support, torch.zeros(2, 16), torch.tensor([0, 1]))
    assert method.choose([nothing_to_learn], ShrinkConfig(True, 5.0)) == ShrinkConfig(True, 5.0)


def test_the_score_weighs_classes_equally() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 0.0]])
    labels = torch.tensor([0] * 9 + [1])
    accuracy, likelihood = score_logits(logits, labels)
    assert accuracy == pytest.approx(0.5)
    sure, wrong = np.log(1 + np.exp(-1.0)), np.log(1 + np.exp(1.0))
    assert likelihood == pytest.approx(-(sure + wrong) / 2)


@pytest.mark.parametrize(("per_class", "folds"), [(4, 4), (3, 0), (6, 6)])
def test_groups_are_left_out_one_at_a_time_if_there_are_enough(per_class: int, folds: int) -> None:
    features, labels, _, _ = clusters((12, 12))
    groups = [f"patient {i % per_class}" for i in range(24)]
    given_ = Support(torch.tensor(features), torch.tensor(labels), 2)
    actual, noted = _leave_groups_out(given_, groups, stands_in=False)
    assert len(actual) == folds
    assert ("kept at their defaults" in noted) == (folds == 0)
    for fold in actual:
        assert len(fold.support.labels) + len(fold.labels) == 24
        assert not {tuple(row) for row in fold.features.tolist()} & {
            tuple(row) for row in fold.support.features.tolist()
        }


def test_a_stand_in_never_sees_the_group_that_is_left_out() -> None:
    features, labels, _, _ = clusters((8, 8))
    groups = [f"patient {i % 4}" for i in range(16)]
    given_ = Support(torch.tensor(features), torch.tensor(labels), 2, torch.zeros(2, 16))
    for fold in _leave_groups_out(given_, groups, stands_in=True)[0]:
        unit = nn.functional.normalize(fold.support.features, dim=-1)
        means = torch.stack([unit[fold.support.labels == k].mean(0) for k in (0, 1)])
        expected = nn.functional.normalize(means, dim=-1)
        assert torch.allclose(fold.support.texts, expected, atol=1e-12)
