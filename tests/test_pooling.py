"""Pooling of tile scores: every formula against a plain restatement in float64, and properties."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from tolerance import assert_same_numbers

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides import pooling
from hf_glovlm.slides.pooling import (
    TOP_J,
    pool_scores,
    pool_slide,
    pool_ways,
    score_tiles,
    smooth_scores,
)

Floats = NDArray[np.float64]
NAMES = ["normal", "tumour", "other"]


def random_scores(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, 3))


SCORES = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 130), st.just(3)),
    elements=st.floats(-1, 1, width=32),
)


# ---------------------------------------------------------------------------------- cosines


def test_tile_scores_are_cosines_whatever_the_lengths() -> None:
    rng = np.random.default_rng(1)
    tiles, classes = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(3, 4))
    expected = [
        [float(np.dot(t, c) / np.sqrt(np.dot(t, t) * np.dot(c, c))) for c in classes]
        for t in tiles.astype(np.float64)
    ]
    np.testing.assert_allclose(score_tiles(tiles, classes), expected, atol=1e-12)
    np.testing.assert_allclose(score_tiles(7 * tiles, 0.1 * classes), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("tiles", "classes", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), r"one width, found \[2, 3\] and \[2, 4\]"),
        (np.ones(3), np.ones((2, 3)), "one width"),
        (np.zeros((2, 3)), np.ones((2, 3)), "tile features that are finite and not zero"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), "prototypes that are finite"),
    ],
)
def test_features_that_have_no_cosine_are_refused(tiles: Any, classes: Any, message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        score_tiles(tiles, classes)


# ---------------------------------------------------------------------------------- pooling


@given(scores=SCORES, j=st.integers(1, 150))
def test_top_j_is_the_mean_of_the_j_highest_of_each_class(scores: Floats, j: int) -> None:
    expected = [np.mean(sorted(scores[:, k], reverse=True)[:j]) for k in range(3)]
    np.testing.assert_allclose(pool_scores(scores, j), expected, atol=1e-12)


@given(scores=SCORES, seed=st.integers(0, 1000))
def test_pooling_does_not_see_the_order_of_the_tiles(scores: Floats, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(scores))
    for j in (*TOP_J, None):
        np.testing.assert_allclose(
            pool_scores(scores[order], j), pool_scores(scores, j), atol=1e-12
        )


@given(scores=SCORES)
def test_all_tiles_are_the_mean_and_fewer_score_higher(scores: Floats) -> None:
    n = len(scores)
    np.testing.assert_allclose(pool_scores(scores, n), scores.mean(0), atol=1e-12)
    np.testing.assert_allclose(pool_scores(scores, n + 5), pool_scores(scores), atol=1e-12)
    ranked = [pool_scores(scores, j) for j in TOP_J]
    assert all((a >= b - 1e-12).all() for a, b in itertools.pairwise(ranked))


def test_each_class_is_judged_by_its_own_tiles() -> None:
    scores = np.array([[0.9, 0.0], [0.1, 0.8], [0.5, 0.4]])
    np.testing.assert_allclose(pool_scores(scores, 1), [0.9, 0.8])
    np.testing.assert_allclose(pool_scores(scores, 2), [0.7, 0.6])


@pytest.mark.parametrize("scores", [np.empty((0, 2)), np.ones(3), [[np.nan, 1.0]]])
def test_scores_that_are_none_are_refused(scores: Any) -> None:
    with pytest.raises(GloVLMError, match=r"finite scores \[tiles, classes\]"):
        pool_scores(scores)


def test_no_tile_cannot_be_taken() -> None:
    with pytest.raises(GloVLMError, match="j of 1 or more tiles, found 0"):
        pool_scores(random_scores(4), 0)


# ------------------------------------------------------------------------------------- slides


@pytest.mark.parametrize("j", [1, 7, None])
def test_a_slide_is_labelled_by_its_highest_pooled_score(j: int | None) -> None:
    scores = random_scores(40)
    pooled = pool_scores(scores, j)
    result = pool_slide(scores, NAMES, j=j, kind="logit")
    assert result.label == NAMES[int(np.argmax(pooled))]
    assert list(result.scores.values()) == pytest.approx(pooled.tolist())
    expected = np.exp(pooled) / np.exp(pooled).sum()
    assert list(result.probabilities.values()) == pytest.approx(expected.tolist())
    assert result.pooling == ("mean" if j is None else f"top_{j}")
    assert result.n_tiles == 40


def test_cosines_are_scaled_and_probabilities_are_shared_out() -> None:
    scores = np.array([[0.30, 0.25], [0.20, 0.28]])
    cosine = pool_slide(scores, ["a", "b"], j=1, scale=50.0)
    assert cosine.probabilities["a"] == pytest.approx(1 / (1 + np.exp(50 * (0.28 - 0.30))))
    shared = pool_slide(scores, ["a", "b"], j=1, kind="probability")
    assert shared.probabilities == pytest.approx({"a": 0.30 / 0.58, "b": 0.28 / 0.58})
    nothing = pool_slide(np.zeros((3, 2)), ["a", "b"], kind="probability")
    assert nothing.probabilities == {"a": 0.5, "b": 0.5}


def test_large_logits_do_not_overflow() -> None:
    result = pool_slide([[1e4, -1e4]], ["a", "b"], kind="logit")
    assert result.probabilities == {"a": 1.0, "b": 0.0}


def test_all_ways_are_those_of_mi_zero_and_the_mean() -> None:
    scores = random_scores(60)
    ways = pool_ways(scores, NAMES, kind="logit")
    assert list(ways) == ["top_1", "top_5", "top_10", "top_50", "top_100", "mean"]
    assert ways["top_100"].scores == ways["mean"].scores
    assert ways["top_5"] == pool_slide(scores, NAMES, j=5, kind="logit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "each of 2 classes .* found 3 columns"),
        ({"kind": "odds"}, "found 'odds'"),
        ({"kind": "probability"}, "between 0 and 1"),
        ({"neighbours": 8}, "needs the coords"),
        ({"neighbours": 8, "coords": np.zeros((3, 2))}, r"coords \[20, 2\] for 20 tiles"),
        ({"neighbours": -1, "coords": np.zeros((20, 2))}, "k of 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        pool_slide(random_scores(20), **({"class_names": NAMES} | options))


# ---------------------------------------------------------------------------------- smoothing


def smoothed_slowly(scores: Floats, coords: NDArray[np.int64], k: int) -> Floats:
    """Tile by tile, with integers: all nearer tiles, and an equal share of the tied ones."""
    k = min(k, len(scores))
    out = np.empty_like(scores)
    for i, place in enumerate(coords):
        squared = ((coords - place) ** 2).sum(1)
        limit = np.sort(squared)[k - 1]
        inside, tied = scores[squared < limit], scores[squared == limit]
        out[i] = (inside.sum(0) + tied.mean(0) * (k - len(inside))) / k
    return out


@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), k=st.integers(1, 12))
def test_smoothing_is_the_mean_over_the_nearest_tiles(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    coords = 224 * rng.integers(0, 8, size=(n, 2))  # a grid with holes, and tiles on each other
    scores = rng.normal(size=(n, 3))
    expected = smoothed_slowly(scores, coords, k)
    np.testing.assert_allclose(smooth_scores(scores, coords, k), expected, atol=1e-10)
    order = rng.permutation(n)
    np.testing.assert_allclose(
        smooth_scores(scores[order], coords[order], k), expected[order], atol=1e-10
    )


def test_on_a_square_grid_it_is_the_tile_its_sides_and_its_corners() -> None:
    coords = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), -1).reshape(-1, 2)
    scores = np.zeros((25, 1))
    scores[12] = 1.0  # the middle
    smooth = smooth_scores(scores, 100 * coords).reshape(5, 5)
    np.testing.assert_allclose(
        smooth[1:4, 1:4] * 8, [[0.75, 1, 0.75], [1, 1, 1], [0.75, 1, 0.75]], atol=1e-12
    )


@pytest.mark.parametrize("n", [1, 3, 8])
def test_few_tiles_are_all_averaged(n: int) -> None:
    scores = random_scores(n)
    coords = np.random.default_rng(2).integers(0, 999, size=(n, 2))
    expected = np.broadcast_to(scores.mean(0), scores.shape)
    np.testing.assert_allclose(smooth_scores(scores, coords), expected, atol=1e-12)


def test_one_neighbour_is_the_tile_itself() -> None:
    coords = np.random.default_rng(3).permutation(900)[:40].reshape(20, 2)
    np.testing.assert_allclose(smooth_scores(random_scores(20), coords, 1), random_scores(20))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    coords = np.random.default_rng(4).integers(0, 99, size=(50, 2))
    whole = smooth_scores(random_scores(50), coords)
    monkeypatch.setattr(pooling, "_CHUNK", 7)
    assert_same_numbers(smooth_scores(random_scores(50), coords), whole)


def test_a_lone_bright_tile_is_smoothed_away_and_a_lesion_stays() -> None:
    coords = np.stack(np.meshgrid(np.arange(9), np.arange(9), indexing="ij"), -1).reshape(-1, 2)
    lone, lesion = np.full((81, 2), 0.2), np.full((81, 2), 0.2)
    lone[40, 1] = 1.0
    lesion[[30, 31, 32, 39, 40, 41, 48, 49, 50], 1] = 0.6
    plain = [pool_slide(s, ["a", "b"], j=1).scores["b"] for s in (lone, lesion)]
    smooth = [
        pool_slide(s, ["a", "b"], j=1, coords=coords, neighbours=8).scores["b"]
        for s in (lone, lesion)
    ]
    assert plain[0] > plain[1]
    assert smooth[0] < smooth[1] == pytest.approx(0.6)
