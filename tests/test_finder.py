"""The finder's core: agreement, instances, candidates, heads, and groups left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from tiny import tiny_clip, tiny_pair

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.finder import heads
from hf_glovlm.slides.finder.agreement import (
    Agreement,
    add_up,
    is_cut,
    match_detections,
    measure_region,
)
from hf_glovlm.slides.finder.candidates import best_overlaps, list_candidates, suppress
from hf_glovlm.slides.finder.heads import Head, PlainHead
from hf_glovlm.slides.finder.instances import cover_cells, outline_components
from hf_glovlm.slides.finder.learning import (
    Finder,
    choose_threshold,
    leave_groups_out,
    part_groups,
    read_config,
)
from hf_glovlm.slides.finder.logistic import fit_weighted
from hf_glovlm.slides.finder.regions import Detection, Region
from hf_glovlm.slides.finder.tokens import TokenEncoder

Ring = NDArray[np.float64]
SIZE = (160, 120)


@pytest.fixture(scope="module")
def tower() -> tuple[Any, Any]:
    return load_backbone(tiny_pair())


@pytest.fixture(scope="module")
def encoder(tower: tuple[Any, Any]) -> TokenEncoder:
    return TokenEncoder(*tower, store={})


@pytest.fixture(scope="module")
def support() -> list[Region]:
    places = [(45, 40, 110, 80), (50, 85, 120, 35), (60, 50, 130, 95)]
    return [
        region(f"p{i}", [ellipse(a, b, 25, 22), ellipse(c, d, 24, 27)], seed=i)
        for i, (a, b, c, d) in enumerate(places)
    ]


@pytest.fixture(scope="module")
def finder(tower: tuple[Any, Any], encoder: TokenEncoder, support: list[Region]) -> Finder:
    return Finder.fit(*tower, support, encoder=encoder)


def ellipse(x: float, y: float, a: float, b: float) -> Ring:
    turn = np.linspace(0, 2 * np.pi, 65)
    return np.column_stack([x + a * np.cos(turn), y + b * np.sin(turn)])


def box(x0: float, y0: float, x1: float, y1: float) -> Ring:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], float)


def region(group: str, rings: Sequence[Ring], seed: int = 0, **more: Any) -> Region:
    """Picture in which glomeruli are dark blue on pink, with noise."""
    polygons = [((np.clip(ring, 0, SIZE),),) for ring in rings]
    inside = cover_cells(polygons, SIZE, (SIZE[1], SIZE[0]))[..., None] > 0.5
    picture = np.where(inside, (60, 50, 140), (220, 150, 180))
    noise = np.random.default_rng(seed).normal(0, 12, picture.shape)
    picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    labels = more.pop("labels", ("viable",) * len(rings))
    return Region(f"{group}-{seed}", group, picture, polygons, labels, **more)


def iou(one: Ring, other: Ring) -> float:
    a, b = shapely.Polygon(one), shapely.Polygon(other)
    return float(a.intersection(b).area / a.union(b).area)


# --------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("seed", range(4))
def test_matches_are_those_of_a_search_over_rasters(seed: int) -> None:
    draw = np.random.default_rng(seed)
    corners = draw.integers(0, 14, (18, 2))
    boxes = [
        box(x, y, x + w, y + h)
        for (x, y), (w, h) in zip(corners, draw.integers(3, 9, (18, 2)), strict=True)
    ]
    detected, outlined = boxes[:9], boxes[9:]
    masks = [cover_cells([((ring,),)], (24, 24), (24, 24)) > 0.5 for ring in boxes]
    ratio = np.array([[(a & b).sum() / (a | b).sum() for b in masks[9:]] for a in masks[:9]])
    expected = np.full(9, -1)
    while ratio.max() >= 0.3:
        i, k = np.unravel_index(ratio.argmax(), ratio.shape)
        expected[i] = k
        ratio[i], ratio[:, k] = 0, 0
    detections = [Detection(ring, 0.5) for ring in detected]
    matched = match_detections(detections, [((ring,),) for ring in outlined], iou=0.3)
    assert matched.tolist() == expected.tolist()
    assert (expected >= 0).any()


def test_agreement_counts_classes_and_cut_ones_apart() -> None:
    rings = [box(0, 10, 20, 40), box(50, 50, 80, 80), box(100, 20, 130, 50)]
    one = region("p", rings, labels=("sclerosed", "viable", None))
    detected = [
        Detection(rings[0], 0.9),
        Detection(rings[1] + 2, 0.8),
        Detection(rings[1] + 9, 0.7),
    ]
    total = add_up([measure_region(detected, one), measure_region([], one)])
    assert total.describe() == {
        "true_positives": 2,
        "false_positives": 1,
        "misses": 4,
        "precision": 2 / 3,
        "recall": 2 / 6,
        "f1": 4 / 9,
        "by_class": {
            "sclerosed": {"found": 1, "of": 2},
            "unlabelled": {"found": 0, "of": 2},
            "viable": {"found": 1, "of": 2},
        },
        "cut": {"found": 1, "of": 2},
        "whole": {"found": 1, "of": 4},
    }
    nothing = measure_region([], region("p", []))
    assert (nothing.precision, nothing.recall, nothing.f1) == (None, None, None)


def test_outlines_that_cross_themselves_match() -> None:
    bow = np.array([[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]], float)
    assert match_detections([Detection(bow, 1.0)], [((bow,),)]).tolist() == [0]


# --------------------------------------------------------------------------------------- instances


@pytest.mark.parametrize(("x", "cut"), [(70, False), (12, True), (SIZE[0] - 12, True)])
def test_components_are_outlined_where_they_are(x: float, cut: bool) -> None:
    known = np.clip(ellipse(x, 60, 30, 20), 0, SIZE)
    scores = cover_cells([((known,),)], SIZE, (30, 40))
    (detected,) = outline_components(scores, 0.5, SIZE)
    assert iou(detected.ring, known) > 0.93
    assert detected.cut == cut == is_cut(known, SIZE)
    assert outline_components(scores, 0.5, SIZE, least=200) == []


def test_touching_discs_are_parted() -> None:
    rows, columns = np.mgrid[:96, :128]
    discs = [np.hypot(rows - 48, columns - x) < 22 for x in (42, 84)]
    logits = ndimage.gaussian_filter(np.where(discs[0] | discs[1], 4.0, -4.0), 3)
    assert ndimage.label(logits > 0)[1] == 1
    detected = list_candidates(logits)
    assert [best_overlaps(detected, [disc]).max() > 0.85 for disc in discs] == [True, True]
    scores = best_overlaps(detected, discs)
    assert len(suppress(detected, scores, 0.5, 0.3)) == 2
    assert suppress(detected, scores, 1.01, 0.3) == []


# -------------------------------------------------------------------------------------- regression


def test_weighted_regression_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    rows, weights = draw.normal(size=(60, 4)), draw.uniform(0.1, 2, 60)
    targets = (rows[:, 0] + draw.normal(size=60) > 0).astype(float)
    ours = fit_weighted(rows, targets, weights, 0.05)
    theirs = LogisticRegression(C=1 / (0.05 * weights.sum()), tol=1e-8, max_iter=1000)
    theirs.fit(rows, targets, weights)
    np.testing.assert_allclose(ours.weight, theirs.coef_[0], atol=1e-4)
    np.testing.assert_allclose(ours.bias, theirs.intercept_[0], atol=1e-4)
    # A target between is a row of each side, by shares.
    soft = fit_weighted(rows, np.full(60, 0.3), weights, 0.05)
    twice = np.repeat([1.0, 0.0], 60), np.concatenate([0.3 * weights, 0.7 * weights])
    hard = fit_weighted(np.tile(rows, (2, 1)), *twice, 0.05)
    np.testing.assert_allclose(soft.weight, hard.weight, atol=1e-6)


def test_plain_is_balanced_regression_of_tokens_and_components(
    tower: tuple[Any, Any], encoder: TokenEncoder, support: list[Region]
) -> None:
    plain = Finder.fit(*tower, support, head="plain", encoder=encoder, leave_out=False)
    assert plain.threshold == 0.7
    maps = [encoder.encode(one.picture, (36, 48)).tokens for one in support]
    shares = np.concatenate([cover_cells(r.polygons, SIZE, (36, 48)).ravel() for r in support])
    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps])
    mean, deviation = tokens.mean(0), tokens.std(0)
    clear = abs(shares - 0.5) > 0.1
    weights = np.concatenate([np.full(n, 1 / n) for n in clear.reshape(len(support), -1).sum(1)])
    known = shares[clear] > 0.5
    for side in (True, False):
        weights[known == side] /= weights[known == side].sum()
    fitted = LogisticRegression(C=1 / (PlainHead.penalty * weights.sum()), tol=1e-8, max_iter=2000)
    fitted.fit((tokens[clear] - mean) / deviation, known, weights)
    picture = region("q", [ellipse(80, 60, 25, 25)], seed=9).picture
    expected = fitted.predict_proba(
        (encoder.encode(picture, (36, 48)).tokens.reshape(36 * 48, -1) - mean) / deviation
    )[:, 1].reshape(36, 48)
    scores, size = plain.score(picture)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert size == SIZE
    (detected,) = plain.detect(picture)
    assert iou(detected.ring, ellipse(80, 60, 25, 25)) > 0.6


# ------------------------------------------------------------------------------------------ finder


def test_finder_outlines_glomeruli_of_other_patients(finder: Finder) -> None:
    rings = [
        ellipse(45, 60, 24, 24),
        ellipse(115, 45, 26, 22),
        np.clip(ellipse(100, 120, 25, 25), 0, SIZE),
    ]
    other = region("q", rings, seed=50)
    detected = finder.detect(other.picture)
    agreement = measure_region(detected, other)
    assert (agreement.true_positives, agreement.false_positives) == (3, 0)
    assert sorted(one.cut for one in detected) == [False, False, True]
    assert [one.score for one in detected] == sorted((one.score for one in detected), reverse=True)
    assert finder.left_out["f1"] == 1.0
    assert (finder.left_out["regions"], finder.left_out["groups"]) == (3, 3)


def test_finder_works_at_the_scale_that_is_stated(
    tower: tuple[Any, Any], encoder: TokenEncoder, support: list[Region]
) -> None:
    stated = [
        region(r.group, [p[0][0] for p in r.polygons], i, mpp=4.0) for i, r in enumerate(support)
    ]
    finder = Finder.fit(*tower, stated, encoder=encoder, leave_out=False)
    assert finder.downsample(2.0) == 2 * finder.downsample(4.0)
    known = ellipse(80, 60, 25, 25)
    picture = region("q", [known], seed=9).picture
    (here,) = finder.detect(picture, mpp=4.0)
    twice = picture.repeat(2, 0).repeat(2, 1)
    (there,) = finder.detect(twice, mpp=2.0)
    assert iou(there.ring, 2 * known) > 0.8
    assert iou(here.ring, known) > 0.8
    with pytest.raises(GloVLMError, match="scale is not known"):
        finder.detect(picture)


def test_a_saved_finder_detects_the_same(
    finder: Finder, tower: tuple[Any, Any], tmp_path: Path
) -> None:
    finder.save(tmp_path)
    again = Finder.load(tmp_path, *tower)
    picture = region("q", [ellipse(80, 60, 25, 25)], seed=9).picture
    one, other = finder.detect(picture), again.detect(picture)
    assert [a.score for a in one] == [b.score for b in other]
    assert all(np.array_equal(a.ring, b.ring) for a, b in zip(one, other, strict=True))
    kept = ("threshold", "scale", "mpp", "diameters", "classes", "left_out", "fingerprint")
    assert {name: getattr(finder, name) for name in kept} == {
        name: getattr(again, name) for name in kept
    }
    with pytest.raises(GloVLMError, match="learned on the tower"):
        Finder.load(tmp_path, *load_backbone(str(tiny_clip())))
    (tmp_path / "head.safetensors").write_bytes(b"cut off")
    with pytest.raises(GloVLMError, match="missing or damaged"):
        Finder.load(tmp_path, *tower)
    (tmp_path / "finder.json").write_text('{"kind": "finder"}')
    with pytest.raises(GloVLMError, match="learn it again"):
        read_config(tmp_path)


class Witness(Head):
    """Head that remembers the colours it learned from, and is asked about others."""

    name = "witness"
    thresholds = (0.2, 0.8)
    asked: ClassVar[list[tuple[set[int], int]]] = []

    @classmethod
    def cell(cls, regions: Sequence[Region]) -> float:
        return 8.0

    def fit(self, encoder: Any, regions: Sequence[Region], scales: Any, seed: int) -> None:
        self.seen = {int(one.picture[0, 0, 0]) for one in regions}

    def score(self, encoder: Any, picture: NDArray[np.uint8], scale: float) -> Any:
        self.asked.append((self.seen, int(picture[0, 0, 0])))
        return picture

    def outline(self, scores: Any, threshold: float) -> list[Detection]:
        return [Detection(box(0, 0, 20, 20), 0.5)] if threshold < 0.5 else []

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        pass


def test_a_group_is_never_scored_by_a_head_that_saw_it(
    tower: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(heads.HEADS, "witness", Witness)
    monkeypatch.setattr(Witness, "asked", [])
    outlined = ((box(0, 0, 20, 20),),)
    regions = [
        Region(f"r{i}", f"p{i // 2}", np.full((30, 30, 3), i // 2, np.uint8), [outlined] * (i < 14))
        for i in range(16)
    ]
    left = leave_groups_out(*tower, regions, head="witness")
    assert sorted(group for _, group in Witness.asked) == [i // 2 for i in range(16)]
    assert [group for seen, group in Witness.asked if group in seen] == []
    assert (left.threshold, left.agreement.true_positives, left.regions, left.groups) == (
        0.2,
        14,
        16,
        8,
    )
    assert left.tried[0.8].misses == 14
    assert set().union(*part_groups(regions, 3)) == {f"p{i}" for i in range(8)}


@pytest.mark.parametrize(
    ("hits", "chosen"),
    [
        ([5], 0.1),  # the head's own
        ([5, 9], 0.2),
        ([0, 9, 0], 0.2),  # one neighbour on each side, so the middle alone
        ([9, 1, 5, 5, 5, 5, 5, 1, 1], 0.5),  # not the lucky first
        ([5, 5, 5, 5, 5, 5, 5], 0.3),  # of equals the lowest
        ([0, 0, 0, 0, 0, 0, 0], 0.3),
    ],
)
def test_a_threshold_is_chosen_with_its_neighbours(hits: list[int], chosen: float) -> None:
    # precision is 1, so that F1 grows with the hits of 10
    tried = {round(0.1 * (i + 1), 1): Agreement(n, 0, 10 - n) for i, n in enumerate(hits)}
    backwards = dict(reversed(tried.items()))
    assert choose_threshold(tried) == choose_threshold(backwards) == chosen


def test_one_group_leaves_nothing_out(
    tower: tuple[Any, Any], encoder: TokenEncoder, support: list[Region]
) -> None:
    alone = Finder.fit(*tower, support[:1], encoder=encoder)
    assert alone.left_out == {}
    assert "how many glomeruli it misses is not known" in alone.notes[0]
    with pytest.raises(GloVLMError, match="at least two groups, found 1"):
        leave_groups_out(*tower, support[:1], encoder=encoder)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "at least one outlined glomerulus, found none in 0 regions"),
        ([region("p", [])], "at least one outlined glomerulus"),
        (
            [Region("r", "p", np.zeros((9, 9, 3), np.uint8), [((box(20, 0, 30, 9),),)])],
            "outside of its picture",
        ),
        (
            [region("p", [ellipse(50, 50, 20, 20)], mpp=m) for m in (1.0, None)],
            "1 of 2 regions state",
        ),
        ([region("p", [box(9, 9, 50, 9)])], "Outline 1 of region 'p-0' has no area"),
        ([region("p", [box(0, 0, *SIZE)])], "No token of the regions lies outside"),
        ([region("p", [box(1, 1, 150, 110)] * 3 + [box(0, 0, *SIZE)])], "lies outside of the outl"),
        ([Region("r", "p", np.zeros((9, 9), np.uint8), [((box(0, 0, 9, 9),),)])], "RGB picture"),
        ([region("p", [ellipse(50, 50, 20, 20)], mpp=-1.0)], "above 0, found -1.0"),
    ],
    ids=[
        "no_region",
        "no_outline",
        "outside",
        "some_scales",
        "line",
        "all",
        "overlap",
        "grey",
        "mpp",
    ],
)
def test_regions_that_nothing_can_be_learned_from_are_refused(
    regions: list[Region], message: str, tower: tuple[Any, Any]
) -> None:
    with pytest.raises(GloVLMError, match=message):
        Finder.fit(*tower, regions)


def test_unknown_heads_are_refused(tower: tuple[Any, Any], support: list[Region]) -> None:
    with pytest.raises(GloVLMError, match="Did you mean 'plain'"):
        Finder.fit(*tower, support, head="plane")


# ------------------------------------------------------------------------------------------ tokens


def test_kept_tokens_are_not_encoded_again(
    tower: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = region("p", [ellipse(80, 60, 30, 30)]).picture
    keeping, fresh = TokenEncoder(*tower, store={}), TokenEncoder(*tower)
    first = keeping.encode(picture, (6, 8), depths=(0.5, 1.0))
    monkeypatch.setattr(keeping, "_encode", lambda *_: pytest.fail("encoded again"))
    again = keeping.encode(picture, (6, 8), depths=(1.0, 0.5))
    np.testing.assert_array_equal(first.tokens[..., :32], again.tokens[..., 32:])
    np.testing.assert_array_equal(
        first.tokens, fresh.encode(picture, (6, 8), depths=(0.5, 1.0)).tokens
    )


def test_large_pictures_are_encoded_in_windows_of_the_tower(
    tower: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = np.full((120, 160, 3), (200, 120, 160), np.uint8)
    flat[:, 80:] = (60, 50, 140)
    encoder = TokenEncoder(*tower)
    monkeypatch.setattr(TokenEncoder, "interpolates", False)
    sizes = []
    window = encoder._window
    monkeypatch.setattr(
        encoder,
        "_window",
        lambda pixels, *more: sizes.append(pixels.shape) or window(pixels, *more),
    )
    encoded = encoder.encode(flat, (9, 12))
    assert set(sizes) == {(32, 32, 3)}
    assert encoded.tokens.shape == (9, 12, 32)
    assert (encoded.size, encoded.grid) == ((160, 120), (9, 12))
    left, right = encoded.tokens[:, 1], encoded.tokens[:, 10]
    assert (
        np.linalg.norm(left - right, axis=1).min()
        > 5 * np.linalg.norm(left - left[0], axis=1).max()
    )
    assert encoder.encode(flat, (2, 3)).tokens.shape == (2, 3, 32)
