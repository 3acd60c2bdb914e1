"""Aggregators: one interface for all, formulas against float64 numpy, memory linear in the bag."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import case_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.mil.aggregators import (
    AGGREGATORS,
    Aggregator,
    build_aggregator,
    nystrom_attention,
    register_aggregator,
)

DIM, CLASSES = 12, 3
# Settings of every aggregator of AGGREGATORS for a small bag.
SMALL: dict[str, dict[str, Any]] = {
    "mean": {"width": 16},
    "max": {"width": 16},
    "abmil": {"width": 16, "hidden": 8},
    "transmil": {"width": 16, "heads": 4, "landmarks": 8},
}
NAMES = list(AGGREGATORS)


def small(name: str, **settings: Any) -> Aggregator:
    torch.manual_seed(3)
    where = "SMALL in tests/test_aggregators.py"
    own = case_of(SMALL, name, "AGGREGATORS", where, "its settings for a small bag")
    return build_aggregator(name, DIM, CLASSES, {"layer_norm": True, **own, **settings}).eval()


def bag(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def softmax(x: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def test_every_aggregator_is_in_the_table_under_its_name_and_says_what_it_is() -> None:
    for name, kind in AGGREGATORS.items():
        row = kind.describe()
        assert row["name"] == name
        assert "arXiv" in row["citation"]
        assert row["settings"] == {**row["settings"], "layer_norm": False}


def test_an_aggregator_must_describe_itself() -> None:
    class Silent(Aggregator):
        name = "silent"

        def aggregate(self, features: Tensor) -> Any:
            return features

    with pytest.raises(TypeError, match="Silent must state 'citation'"):
        register_aggregator(Silent)
    with pytest.raises(TypeError, match="already an aggregator 'abmil'"):
        register_aggregator(AGGREGATORS["abmil"])


# ------------------------------------------------------------------------------- one interface


@pytest.mark.parametrize("n", [1, 2, 7, 60])
@pytest.mark.parametrize("name", NAMES)
def test_a_bag_gives_logits_attention_and_tile_scores(name: str, n: int) -> None:
    aggregator = small(name)
    with torch.no_grad():
        observed = aggregator(bag(n))
    assert observed.logits.shape == (CLASSES,)
    assert observed.tile_scores.shape == (n, CLASSES)
    assert observed.logits.dtype == observed.tile_scores.dtype == torch.float32
    assert torch.isfinite(observed.logits).all()
    assert observed.tile_scores.sum(1).abs().max() < 1e-5  # centred over the classes
    assert (observed.attention is not None) == aggregator.has_attention
    if observed.attention is not None:
        assert observed.attention.shape == (n,)
        assert (observed.attention >= 0).all()
        assert float(observed.attention.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_the_tiles(name: str) -> None:
    aggregator = small(name).train()
    tiles = bag(30).requires_grad_()
    loss = nn.functional.cross_entropy(aggregator(tiles).logits[None], torch.tensor([1]))
    loss.backward()
    dead = [n for n, p in aggregator.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert tiles.grad is not None
    moved = tiles.grad.abs().sum(1) > 0
    assert moved.all() or name == "max"  # of each class one tile alone
    assert moved.any()


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40))
def test_the_order_of_the_tiles_matters_only_where_it_is_said_to(
    name: str, seed: int, n: int
) -> None:
    aggregator, tiles = small(name), bag(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        one, other = aggregator(tiles), aggregator(tiles[order])
    if not aggregator.permutation_invariant:
        return
    assert torch.allclose(one.logits, other.logits, atol=1e-5)
    assert torch.allclose(one.tile_scores[order], other.tile_scores, atol=1e-5)
    if one.attention is not None:
        assert torch.allclose(one.attention[order], other.attention, atol=1e-6)


def test_the_positional_encoding_sees_the_order() -> None:
    aggregator, tiles = small("transmil"), bag(20)
    with torch.no_grad():
        moved = (aggregator(tiles).logits - aggregator(tiles.flip(0)).logits).abs().max()
    assert moved > 1e-5


@pytest.mark.parametrize("name", ["mean", "abmil"])
def test_tile_scores_share_out_the_slides_logits(name: str) -> None:
    with torch.no_grad():
        observed = small(name)(bag(25))
    assert torch.allclose(
        observed.tile_scores.sum(0), observed.logits - observed.logits.mean(), atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_features_are_standardised_as_the_training_slides_say(name: str) -> None:
    plain, standard = small(name, layer_norm=False), small(name, layer_norm=False)
    mean, spread = torch.linspace(-3, 3, DIM), torch.linspace(0, 50, DIM)
    standard.standardise(mean, spread)
    spread[0] = 1  # a dimension that never varies is left as it is
    with torch.no_grad():
        one, other = plain(bag(9)), standard(bag(9) * spread + mean)
    assert torch.allclose(one.logits, other.logits, atol=1e-4)
    assert torch.allclose(one.tile_scores, other.tile_scores, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_off_in_evaluation_and_on_in_training(name: str) -> None:
    aggregator, tiles = small(name, dropout=0.5), bag(9)
    with torch.no_grad():
        assert torch.equal(aggregator(tiles).logits, aggregator(tiles).logits)
        aggregator.train()
        assert not torch.equal(aggregator(tiles).logits, aggregator(tiles).logits)


# ------------------------------------------------------------------- formulas, restated in numpy


def weights(aggregator: Aggregator) -> dict[str, NDArray[np.float64]]:
    return {n: p.detach().double().numpy() for n, p in aggregator.named_parameters()}


def layer_norm(
    x: NDArray[np.float64], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def embedded(w: dict[str, NDArray[np.float64]], tiles: Tensor) -> NDArray[np.float64]:
    normed = layer_norm(tiles.double().numpy(), w["embed.0.weight"], w["embed.0.bias"])
    return np.maximum(normed @ w["embed.1.weight"].T + w["embed.1.bias"], 0)


def test_mean_and_max_pool_the_logits_of_an_instance_classifier() -> None:
    tiles = bag(11)
    for name, pool in (("mean", np.mean), ("max", np.max)):
        aggregator = small(name)
        w = weights(aggregator)
        logits = embedded(w, tiles) @ w["classify.weight"].T + w["classify.bias"]
        with torch.no_grad():
            observed = aggregator(tiles)
        np.testing.assert_allclose(observed.logits, pool(logits, axis=0), atol=1e-5)
        share = logits - logits.mean(1, keepdims=True)
        np.testing.assert_allclose(
            observed.tile_scores, share / (11 if name == "mean" else 1), atol=1e-5
        )


def test_abmil_is_gated_attention_over_embedded_tiles() -> None:
    aggregator, tiles = small("abmil"), bag(11)
    w = weights(aggregator)
    h = embedded(w, tiles)
    signal = np.tanh(h @ w["feature.weight"].T + w["feature.bias"])
    gate = 1 / (1 + np.exp(-(h @ w["gate.weight"].T + w["gate.bias"])))
    attention = softmax((signal * gate) @ w["weigh.weight"][0])
    logits = w["classify.weight"] @ (attention @ h) + w["classify.bias"]
    with torch.no_grad():
        observed = aggregator(tiles)
    np.testing.assert_allclose(observed.attention, attention, atol=1e-6)
    np.testing.assert_allclose(observed.logits, logits, atol=1e-5)


def exact_attention(
    query: NDArray[np.float64], key: NDArray[np.float64], value: NDArray[np.float64]
) -> NDArray[np.float64]:
    scores = np.einsum("htd,hsd->hts", query, key) / math.sqrt(query.shape[-1])
    return np.einsum("hts,hsd->htd", softmax(scores), value)


def test_transmil_with_few_tiles_is_two_layers_of_exact_attention() -> None:
    aggregator, tiles = small("transmil", landmarks=64), bag(9)
    w = weights(aggregator)
    tokens = np.concatenate([w["class_token"], embedded(w, tiles)])  # nine tiles: a square of 3

    def attend(x: NDArray[np.float64], layer: str) -> tuple[Any, Any]:
        normed = layer_norm(x, w[f"{layer}.norm.weight"], w[f"{layer}.norm.bias"])
        parts = np.split(normed @ w[f"{layer}.query_key_value.weight"].T, 3, axis=1)
        query, key, value = (p.reshape(len(x), 4, 4).transpose(1, 0, 2) for p in parts)
        mixed = exact_attention(query, key, value).transpose(1, 0, 2).reshape(len(x), 16)
        rows = softmax(np.einsum("hd,hsd->hs", query[:, 0], key) / 2)
        return mixed @ w[f"{layer}.out.0.weight"].T + w[f"{layer}.out.0.bias"], rows

    tokens = tokens + attend(tokens, "first")[0]
    square = tokens[1:].reshape(3, 3, 16)
    encoded = square.copy()
    for i, size in enumerate((7, 5, 3)):
        half = size // 2
        padded = np.pad(square, ((half, half), (half, half), (0, 0)))
        kernel = w[f"pyramid.layers.{i}.weight"][:, 0]
        for y in range(3):
            for x in range(3):
                window = padded[y : y + size, x : x + size]
                encoded[y, x] += np.einsum("yxc,cyx->c", window, kernel)
                encoded[y, x] += w[f"pyramid.layers.{i}.bias"]
    tokens = np.concatenate([tokens[:1], encoded.reshape(9, 16)])
    update, rows = attend(tokens, "last")
    final = layer_norm(tokens[0] + update[0], w["norm.weight"], w["norm.bias"])
    attention = rows.mean(0)[1:] / rows.mean(0)[1:].sum()
    with torch.no_grad():
        observed = aggregator(tiles)
    np.testing.assert_allclose(
        observed.logits, w["classify.weight"] @ final + w["classify.bias"], atol=1e-5
    )
    np.testing.assert_allclose(observed.attention, attention, atol=1e-6)


def test_nystrom_attention_is_what_its_paper_says() -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        torch.randn(2, 24, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    q, k, v = query.numpy(), key.numpy(), value.numpy()
    few_q, few_k = (x.reshape(2, 6, 4, 4).mean(2) for x in (q, k))  # runs of four tokens
    expected = np.empty_like(v)
    for head in range(2):
        one, two, three = (
            softmax(a @ b.T / 2)
            for a, b in (
                (q[head], few_k[head]),
                (few_q[head], few_k[head]),
                (few_q[head], k[head]),
            )
        )
        inverse = two.T / (two.sum(0).max() * two.sum(1).max())
        eye = np.eye(6)
        for _ in range(6):
            az = two @ inverse
            inverse = inverse @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        expected[head] = one @ inverse @ three @ v[head]
    np.testing.assert_allclose(nystrom_attention(query, key, value, 6), expected, atol=1e-10)
    exact = nystrom_attention(query, key, value, 24)
    np.testing.assert_allclose(exact, exact_attention(q, k, v), atol=1e-10)
    assert np.abs(expected - exact.numpy()).max() > 1e-3


def test_tokens_that_repeat_in_runs_are_attended_exactly() -> None:
    """Then a landmark is no approximation, once the pseudo-inverse has converged."""
    generator = torch.Generator().manual_seed(1)
    query, value = (
        (2 * torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)).repeat_interleave(5, 1)
        for _ in range(2)
    )
    approximate = nystrom_attention(query, query, value, 4)
    exact = exact_attention(query.numpy(), query.numpy(), value.numpy())
    np.testing.assert_allclose(approximate, exact, atol=5e-3)


# ------------------------------------------------------------------------------- large bags


class Largest(TorchDispatchMode):
    """Notes the most numbers that one tensor of a pass holds."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_20000_tiles_takes_memory_that_grows_with_it_and_not_with_its_square(
    name: str,
) -> None:
    """With the published sizes; forward and backward, on tensors without storage."""
    numbers = []
    for n in (5_000, 20_000):
        with FakeTensorMode(), Largest() as largest:
            aggregator = build_aggregator(name, 64, 2)
            aggregator(torch.empty(n, 64)).logits.sum().backward()
        numbers.append(largest.numbers)
    assert numbers[1] <= 4.1 * numbers[0]
    assert numbers[1] <= 2_100 * 20_000  # 168 MB: heads times landmarks a tile


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_20000_tiles_is_aggregated(name: str) -> None:
    with torch.no_grad():
        observed = small(name, **({"landmarks": 64} if name == "transmil" else {}))(bag(20_000))
    assert torch.isfinite(observed.logits).all()
    assert torch.isfinite(observed.tile_scores).all()
    if observed.attention is not None:
        assert float(observed.attention.sum()) == pytest.approx(1, abs=1e-3)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("shape", [(0, DIM), (4, DIM + 1), (DIM,), (1, 4, DIM)])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_bag_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(GloVLMError, match=r"at least one tile with features of width 12, found"):
        small(name)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("abmill", {}, r"Unknown aggregator 'abmill'.*Did you mean 'abmil'\?"),
        ("abmil", {"hiden": 3}, r"no setting 'hiden' .*Did you mean 'hidden'\?"),
        ("mean", {"hidden": 3}, r"no setting 'hidden'"),
        ("abmil", {"hidden": 0}, r"'hidden' of aggregator 'abmil' must be 1 or more; found 0"),
        ("abmil", {"hidden": True}, r"'hidden' .* must be a whole number"),
        ("abmil", {"hidden": 2.5}, r"'hidden' .* must be a whole number"),
        ("max", {"dropout": 1.0}, r"'dropout' .* must be 0 or more and below 1"),
        ("max", {"dropout": "a"}, r"'dropout' .* must be a number"),
        ("max", {"layer_norm": 1}, r"'layer_norm' .* must be true or false"),
        ("transmil", {"width": 20, "heads": 8}, r"width must be a multiple of heads"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        build_aggregator(name, DIM, CLASSES, settings)


@pytest.mark.parametrize(("dim", "classes"), [(0, 2), (4, 1)])
def test_an_aggregator_needs_features_and_two_classes(dim: int, classes: int) -> None:
    with pytest.raises(GloVLMError, match="at least two classes"):
        build_aggregator("abmil", dim, classes)
