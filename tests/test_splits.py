"""Groups, splits by group, few-shot episodes: the invariants that keep a result honest."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from PIL import Image

from hf_glovlm.data import (
    Episode,
    all_rows,
    assert_disjoint,
    draw_episode,
    group_rows,
    load_dataset,
    load_episode,
    reserve_calibration,
    save_episodes,
    split_groups,
    split_hash,
)
from hf_glovlm.errors import GloVLMError

CLASSES = ["ischemic", "sclerotic", "viable"]
SAMPLERS = ["spread", "random", "one_group"]


def make_rows(labels: list[int], **columns: list[Any]) -> datasets.Dataset:
    """Rows as `load_dataset` makes them; the images are never opened here."""
    names = CLASSES[: max(labels) + 1]
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=names),
            "file_name": datasets.Value("string"),
            **{name: datasets.Value("string") for name in columns},
        }
    )
    files = [f"{names[label]}/{i:03d}.png" for i, label in enumerate(labels)]
    return datasets.Dataset.from_dict(
        {"label": labels, "file_name": files, **columns}, features=features
    )


def cohort(n_groups: int = 8, per_class: int = 3, n_classes: int = 3) -> datasets.Dataset:
    """Every slide holds some images of every class."""
    cells = [(g, k) for g in range(n_groups) for k in range(n_classes) for _ in range(per_class)]
    return make_rows([k for _, k in cells], slide_id=[f"s{g}" for g, _ in cells])


@st.composite
def cohorts(draw: st.DrawFn, least: int = 2) -> datasets.Dataset:
    """Uneven slides, so many at least; every class lies in at least two of them."""
    n_classes = draw(st.integers(2, 3))
    counts = draw(
        st.lists(
            st.lists(st.integers(0, 4), min_size=n_classes, max_size=n_classes),
            min_size=least,
            max_size=9,
        )
    )
    held = np.array(counts) > 0
    assume((held.sum(axis=0) >= 2).all())
    labels = [k for row in counts for k, n in enumerate(row) for _ in range(n)]
    slides = [f"s{g}" for g, row in enumerate(counts) for n in row for _ in range(n)]
    return make_rows(labels, slide_id=slides)


# ----------------------------------------------------------------------------------- groups

P = ["p1", "p1", "p2", None]
S = ["s1", "s2", "s3", "s3"]


@pytest.mark.parametrize(
    ("columns", "column", "ids", "note"),
    [
        pytest.param(
            {"patient_id": ["p", "p", "q", "q"], "slide_id": S}, "patient_id", "ppqq", "", id="p"
        ),
        pytest.param({"case_id": list("ccdd"), "slide_id": S}, "case_id", "ccdd", "cases", id="c"),
        pytest.param({"slide_id": S, "group_id": list("aaaa")}, "slide_id", S, "slides", id="s"),
        pytest.param({"group_id": list("abab")}, "group_id", "abab", "as given", id="g"),
        pytest.param(
            {"patient_id": [None] * 4, "slide_id": S}, "slide_id", S, "slides", id="empty patients"
        ),
        pytest.param(
            {"slide_id": ["s", "s", None, None]},
            "slide_id",
            ["s", "s", "ischemic/002.png", "ischemic/003.png"],
            "2 of 4 rows have no slide_id",
            id="missing: own group",
        ),
        pytest.param(
            {"patient_id": P, "slide_id": S},
            "patient_id",
            ["p1", "p1", "ischemic/003.png", "ischemic/003.png"],
            "1 of 4 rows have no patient_id and are grouped by slide_id",
            id="missing: joined by slide",
        ),
        pytest.param(
            {"slide_id": list("abcd"), "glomerulus_id": ["g1", "g2", "g1", None]},
            "slide_id",
            ["a", "b", "a", "d"],
            "1 groups were merged",
            id="glomerulus on two slides",
        ),
        pytest.param(
            {"slide_id": list("abcd"), "glomerulus_id": ["g1", "g1", None, None]},
            "slide_id",
            ["a", "a", "c", "d"],
            "merged",
            id="chain starts",
        ),
        pytest.param(
            {"slide_id": list("aabb"), "glomerulus_id": ["g1", "g2", "g2", "g3"]},
            "slide_id",
            "aaaa",
            "1 groups were merged",
            id="whole slides merge",
        ),
    ],
)
def test_group_columns(
    columns: dict[str, list[str | None]], column: str, ids: list[str], note: str
) -> None:
    groups = group_rows(make_rows([0] * 4, **columns))
    assert groups.column == column
    assert groups.ids == list(ids)
    assert note in groups.note
    assert ("patients are unknown" in groups.note) == (column != "patient_id")


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("uvwxyz")),
        min_size=1,
        max_size=14,
    )
)
def test_merged_groups_are_the_components_of_a_graph(pairs: list[tuple[str, str | None]]) -> None:
    slides, glomeruli = zip(*pairs, strict=True)
    columns = {"slide_id": list(slides), "glomerulus_id": list(glomeruli)}
    groups = group_rows(make_rows([0] * len(pairs), **columns))
    linked = np.array(
        [[a == c or (b is not None and b == d) for c, d in pairs] for a, b in pairs], dtype=int
    )
    reached = np.linalg.matrix_power(linked, len(pairs)).astype(bool)  # no scipy here
    assert groups.ids == [min(np.array(slides)[row]) for row in reached]


def _smooth(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((80, 80), Image.Resampling.BICUBIC)


def test_near_duplicates_are_groups_where_nothing_else_is_known(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    for seed in range(12):
        _smooth(seed).save(tmp_path / "a" / f"{seed:02d}.png")
    _smooth(3).save(tmp_path / "b" / "compressed.jpg", quality=60)
    _smooth(3).resize((60, 60)).save(tmp_path / "b" / "smaller.png")
    _smooth(4).point(lambda v: int(v * 1.03)).save(tmp_path / "b" / "brighter.png")
    _smooth(5).rotate(90).save(tmp_path / "b" / "turned.png")
    _smooth(6).point(lambda v: v // 2).save(tmp_path / "b" / "dark.png")
    groups = group_rows(load_dataset(tmp_path)["all"])
    assert groups.column == "near_duplicate"
    sizes = Counter(groups.ids)
    assert {g: n for g, n in sizes.items() if n > 1} == {"a/03.png": 3, "a/04.png": 2}
    assert "near-duplicate clusters" in groups.note
    assert "patients are unknown" in groups.note


def test_unknown_group_column() -> None:
    with pytest.raises(GloVLMError, match="group column 'case_id', found slide_id"):
        group_rows(cohort(), group_column="case_id")


def test_assert_disjoint_names_the_group_and_the_sides() -> None:
    ids = ["a", "a", "b", "c"]
    assert_disjoint(ids, support=[0, 1], validation=[], test=[2, 3])
    with pytest.raises(GloVLMError, match=r"1 group stands \(a\) on both the support and the test"):
        assert_disjoint(ids, support=[0], validation=[3], test=[1, 2])
    with pytest.raises(GloVLMError, match=r"2 groups stand \(a, b\) on both the train and"):
        assert_disjoint(ids, train=[0, 2], validation=[1, 2], test=[3])


# ----------------------------------------------------------------------------------- splits


@given(rows=cohorts(), seed=st.integers(0, 1000), fraction=st.sampled_from([0.3, 0.5, 0.7]))
def test_split_invariants(rows: datasets.Dataset, seed: int, fraction: float) -> None:
    labels, slides = np.array(rows["label"][:]), rows["slide_id"][:]
    if not _some_split_exists(labels, slides):
        with pytest.raises(GloVLMError, match="no split of the"):
            split_groups(labels, slides, seed=seed, test_fraction=fraction)
        return
    pool, test = split_groups(labels, slides, seed=seed, test_fraction=fraction)
    assert sorted([*pool, *test]) == list(range(len(labels)))
    assert_disjoint(slides, pool=pool, test=test)
    assert set(labels[pool]) == set(labels[test]) == set(labels)
    again = split_groups(labels, slides, seed=seed, test_fraction=fraction)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate([pool, test]))


def _some_split_exists(labels: np.ndarray, slides: list[str]) -> bool:
    """Brute force over all subsets of slides."""
    ids = sorted(set(slides))
    masks = np.array([1 << ids.index(slide) for slide in slides])
    held = [masks[labels == k] for k in set(labels.tolist())]
    return any(
        all((m & side != 0).any() and (m & side == 0).any() for m in held)
        for side in range(1, 2 ** len(ids) - 1)
    )


def test_half_of_the_groups_each_side_and_seeds_differ() -> None:
    rows = cohort(n_groups=10)
    slides = np.array(rows["slide_id"][:])
    tests = set()
    for seed in range(20):
        pool, test = split_groups(rows["label"][:], list(slides), seed=seed)
        assert len(set(slides[pool])) == len(set(slides[test])) == 5
        tests.add(frozenset(slides[test]))
    assert len(tests) > 10


def test_rare_classes_get_their_share_of_both_sides() -> None:
    # 20 common slides; the rare class has 5, 5, 1 and 1 images in 4 of them.
    labels = [0] * 40 + [1] * 12
    slides = [f"s{i // 2}" for i in range(40)] + [f"s{i}" for i in [0] * 5 + [1] * 5 + [2, 3]]
    for seed in range(20):
        _, test = split_groups(labels, slides, seed=seed)
        assert 3 <= sum(row >= 40 for row in test) <= 9


def test_search_finds_what_chance_does_not() -> None:
    # 12 classes of two slides each: one random half in 4,096 separates all pairs.
    labels = [k for k in range(12) for _ in range(2)] + [0] * 6
    slides = [f"s{i:02d}" for i in range(30)]
    for seed in range(5):
        pool, test = split_groups(labels, slides, seed=seed)
        values = np.array(labels)
        assert set(values[pool]) == set(values[test]) == set(range(12))
        assert len(set(np.array(slides)[test])) == 15


LONELY = ([0, 0, 0, 1, 1], ["a", "b", "c", "c", "c"])


@pytest.mark.parametrize(
    ("labels", "groups", "options", "sentence"),
    [
        (*LONELY, {"class_names": CLASSES}, r"all 2 images of the class sclerotic .* \(c\)"),
        ([0, 0, 1], list("aaa"), {}, r"all 3 images belong to one group \(a\)"),
        ([1, 1, 1], list("abc"), {}, r"at least two classes, found 1"),
        ([0, 1, 0, 1], list("aabb"), {"test_fraction": 1.0}, r"between 0 and 1, found 1\.0"),
        ([0, 1, 0, 1], list("aabb"), {"seed": -1}, r"expected seeds .* found -1"),
        ([0, 0, 1, 1, 2, 2], list("abbcca"), {}, r"no split of the 3 groups puts every class"),
    ],
)
def test_impossible_splits(
    labels: list[int], groups: list[str], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        split_groups(labels, groups, **{"seed": 0, **options})


def test_a_class_in_one_group_is_learned_where_fewer_is_allowed() -> None:
    for seed in range(10):
        pool, test = split_groups(*LONELY, seed=seed, allow_fewer=True)
        assert {3, 4} <= set(pool)
        assert len(test) > 0


# --------------------------------------------------------------------------------- episodes


def _sides(rows: datasets.Dataset, episode: Episode) -> list[set[str]]:
    slides = rows["slide_id"][:]
    return [{slides[r] for r in getattr(episode, s)} for s in ("support", "validation", "test")]


def _drawn(rows: datasets.Dataset, **setting: Any) -> Episode:
    """Draw an episode; an example in which none can be drawn does not count."""
    try:
        return draw_episode(rows, **setting)
    except GloVLMError:
        reject()


def _apart(*sides: set[str]) -> bool:
    return len(set().union(*sides)) == sum(len(side) for side in sides)


@given(
    rows=cohorts(),
    shots=st.integers(0, 6),
    setting=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 99),
            "draw": st.integers(0, 9),
            "shots_from": st.sampled_from(SAMPLERS),
            "allow_fewer": st.just(True),
            "validation_shots": st.integers(0, 2),
        }
    ),
)
def test_episode_invariants(rows: datasets.Dataset, shots: int, setting: dict[str, Any]) -> None:
    episode = _drawn(rows, shots=shots, **setting)
    support, validation, test = _sides(rows, episode)
    assert _apart(support, validation, test)
    assert episode == draw_episode(rows, shots=shots, **setting)
    assert len(set(episode.support)) == len(episode.support)
    labels = rows["label"][:]
    most = Counter(labels[row] for row in episode.support)
    assert all(n <= shots for n in most.values())
    more = draw_episode(rows, shots=shots + 2, **setting)
    assert set(episode.support) <= set(more.support)
    assert (more.test, more.validation) == (episode.test, episode.validation)
    everything = set(range(len(labels)))
    slides = rows["slide_id"][:]
    assert set(episode.test) == {row for row in everything if slides[row] in test}


def test_shots_are_balanced_and_draws_differ() -> None:
    rows = cohort()
    drawn = [draw_episode(rows, shots=4, seed=0, draw=d) for d in range(10)]
    for episode in drawn:
        summary = episode.summary(rows["label"][:], rows["slide_id"][:], CLASSES)
        assert summary == {
            "labels_per_class": dict.fromkeys(CLASSES, 4),
            "groups_per_class": dict.fromkeys(CLASSES, 4),
            "validation_labels": 0,
            "calibration_labels": 0,
            "label_budget": 12,
        }
    assert len({episode.support for episode in drawn}) == 10
    assert len({draw_episode(rows, shots=4, seed=s).support for s in range(10)}) == 10
    assert len({split_hash(rows, episode) for episode in drawn}) == 10


@pytest.mark.parametrize(("sampler", "groups"), [("spread", 4), ("one_group", 1)])
def test_samplers(sampler: Any, groups: int) -> None:
    rows = cohort(n_groups=8, per_class=6)
    for seed in range(5):
        episode = draw_episode(rows, shots=6, seed=seed, shots_from=sampler)
        summary = episode.summary(rows["label"][:], rows["slide_id"][:], CLASSES)
        assert set(summary["groups_per_class"].values()) == {groups}


def test_spread_takes_one_of_each_group_before_a_second() -> None:
    rows = cohort(n_groups=8, per_class=6)
    slides = rows["slide_id"][:]
    support = draw_episode(rows, shots=10, seed=1).support
    for first in range(0, 30, 10):
        turns = [slides[row] for row in support[first : first + 10]]
        assert len(set(turns[:4])) == 4
        assert turns[:4] == turns[4:8]
        assert turns[8:] == turns[:2]


def test_one_group_takes_the_largest() -> None:
    labels = [0] * 12 + [1] * 12
    slides = [*"aaaaabbbccdd"] * 2
    rows = make_rows(labels, slide_id=slides)
    episode = draw_episode(rows, shots=2, seed=0, shots_from="one_group")
    pool = set(slides) - {slides[row] for row in episode.test}
    assert {slides[row] for row in episode.support} == {min(pool)}


def test_unbalanced_shots() -> None:
    rows = cohort()
    shots = {"viable": 5, "ischemic": 2, "sclerotic": 0}
    episode = draw_episode(rows, shots=shots, seed=0)
    counts = Counter(CLASSES[rows["label"][row]] for row in episode.support)
    assert counts == {"viable": 5, "ischemic": 2}
    assert (episode.shots, episode.name) == (5, "spread-5")
    eight = draw_episode(rows, shots=8, seed=0)
    assert set(episode.support) <= set(eight.support)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"shots": 50},
            r"class ischemic: the support pool holds 12 images, 50 were asked for; "
            r"ask for 12 at most \(--shots 12\)",
        ),
        (
            {"shots": 4, "shots_from": "one_group"},
            r"largest group of the support pool holds 3.*\(--shots 3\)",
        ),
        ({"shots": 4, "shots_from": "spred"}, r"unknown shots_from 'spred'.*Did you mean 'spread'"),
        ({"shots": -1}, r"0 or more shots, found -1"),
        ({"shots": 1, "seed": -3}, r"seeds and draws of 0 or more, found -3"),
        ({"shots": {"viable": 1}}, r"no number for ischemic, sclerotic; give one for every class"),
        ({"shots": {"vable": 1}}, r"unknown class 'vable'.*Did you mean 'viable'\?"),
        ({"shots": {"viable": 1, "ischemic": 1, "sclerotic": 1.5}}, r"found 1\.5 for sclerotic"),
        ({"shots": 1, "validation_shots": -1}, r"0 or more validation shots"),
        (
            {"shots": 1, "validation_shots": 9},
            r"the validation pool holds 3 images.*validation-shots 3\)",
        ),
    ],
)
def test_impossible_episodes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        draw_episode(cohort(), **{"seed": 0, **options})


def test_fewer_are_taken_with_a_warning_where_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        episode = draw_episode(cohort(), shots=50, seed=0, allow_fewer=True)
    assert len(episode.support) == 36
    assert "class viable: the support pool holds 12 images, 50 were asked for" in caplog.text


def test_no_group_is_left_for_validation() -> None:
    with pytest.raises(GloVLMError, match="can be set aside for validation"):
        draw_episode(cohort(n_groups=2), shots=1, seed=0, validation_shots=1)


def test_validation_comes_from_groups_of_its_own() -> None:
    rows = cohort(n_groups=12)
    episode = draw_episode(rows, shots=4, seed=0, validation_shots=3)
    support, validation, test = _sides(rows, episode)
    assert len(episode.validation) == 9
    assert _apart(support, validation, test)
    assert episode.summary(rows["label"][:], rows["slide_id"][:], CLASSES)["label_budget"] == 21


# ---------------------------------------------------------------------------------- calibration


def _calibration_sides(rows: datasets.Dataset, episode: Episode) -> list[set[str]]:
    slides = rows["slide_id"][:]
    return [*_sides(rows, episode), {slides[row] for row in episode.calibration}]


# SHA-256 of support, validation and test as they were drawn before there was a calibration side.
DRAWS_BEFORE = "3978c2b9ae35ab8cc9491f55ca3576f50bf41939b996d23de02c4361c870e29c"


def test_without_calibration_groups_every_draw_is_as_it_was() -> None:
    rows = cohort(n_groups=14)
    digest = hashlib.sha256()
    for seed in range(3):
        for sampler in SAMPLERS:
            for shots in (2, 3):
                episode = draw_episode(
                    rows, shots=shots, seed=seed, shots_from=sampler, validation_shots=seed
                )
                assert episode.calibration == ()
                sides = [episode.support, episode.validation, episode.test]
                digest.update(json.dumps(sides).encode())
    assert digest.hexdigest() == DRAWS_BEFORE


@given(
    rows=cohorts(least=6),  # with fewer, nothing is left to set aside in most of them
    n=st.integers(1, 4),
    setting=st.fixed_dictionaries(
        {
            "shots": st.integers(0, 4),
            "seed": st.integers(0, 99),
            "shots_from": st.sampled_from(SAMPLERS),
            "allow_fewer": st.booleans(),
            "validation_shots": st.integers(0, 1),
        }
    ),
)
def test_calibration_invariants(rows: datasets.Dataset, n: int, setting: dict[str, Any]) -> None:
    episode = _drawn(rows, calibration_groups=n, **setting)
    sides = _calibration_sides(rows, episode)
    assert _apart(*sides)
    slides, labels = rows["slide_id"][:], rows["label"][:]
    held = sides[-1]
    assert len(held) == n
    # whole groups: their own prevalence
    assert list(episode.calibration) == [i for i, slide in enumerate(slides) if slide in held]
    assert episode == draw_episode(rows, calibration_groups=n, **setting)
    # the other sides that are drawn by group are as without it
    plain = draw_episode(rows, **setting | {"allow_fewer": True})
    assert (episode.test, episode.validation) == (plain.test, plain.validation)
    budget = episode.summary(labels, slides, rows.features["label"].names)
    assert budget["calibration_labels"] == len(episode.calibration)
    assert budget["label_budget"] == sum(
        len(side) for side in (episode.support, episode.validation, episode.calibration)
    )
    less = setting | {"shots": max(setting["shots"] - 1, 0)}
    fewer = draw_episode(rows, calibration_groups=n, **less)
    if fewer.calibration == episode.calibration:
        assert set(fewer.support) <= set(episode.support)
    assert split_hash(rows, replace(episode, calibration=())) == split_hash(rows, episode)


def test_calibration_groups_are_drawn() -> None:
    rows = cohort(n_groups=12)
    drawn = {draw_episode(rows, shots=2, seed=0, draw=d, calibration_groups=2) for d in range(8)}
    assert len({episode.calibration for episode in drawn}) > 4
    for seed in range(5):
        few, many = (draw_episode(rows, shots=k, seed=seed, calibration_groups=2) for k in (1, 8))
        assert few.calibration == many.calibration
        assert set(few.support) <= set(many.support)


def _one_large_slide() -> datasets.Dataset:
    """The first class lies in one slide of 8 images and five of 1; the second one everywhere."""
    held = [8, 1, 1, 1, 1, 1]
    labels = [k for n in held for k in [0] * n + [1] * 4]
    slides = [f"s{g}" for g, n in enumerate(held) for _ in range(n + 4)]
    parts = ["train"] * len(labels) + ["test"] * 2
    return make_rows([*labels, 0, 1], slide_id=[*slides, "t", "t"], split=parts)


@pytest.mark.parametrize(
    ("shots", "sampler", "taken"),
    [
        (10, "spread", False),  # of 13 images: the slide of 8 must stay
        (4, "one_group", False),  # the other slides hold 4 too, but not one of them
        (1, "one_group", True),
        (1, "spread", True),
    ],
)
def test_what_the_support_needs_stays(shots: int, sampler: Any, taken: bool) -> None:
    rows = _one_large_slide()
    slides = rows["slide_id"][:]
    requested = {"ischemic": shots, "sclerotic": 4 if sampler == "one_group" else 6}
    actual = set()
    for draw in range(20):
        episode = draw_episode(
            rows, shots=requested, seed=0, draw=draw, shots_from=sampler, calibration_groups=2
        )
        actual |= {slides[row] for row in episode.calibration}
    assert ("s0" in actual) == taken


@pytest.mark.parametrize("shots", [1, 5])
def test_a_class_of_one_group_is_not_set_aside(shots: int) -> None:
    # the third class lies in g
    rows = make_rows([0, 1] * 6 + [2, 0, 1], slide_id=[*"aabbccddeeff", *"ggg"])
    for seed in range(20):
        episode = draw_episode(rows, shots=shots, seed=seed, allow_fewer=True, calibration_groups=2)
        assert 12 in episode.support


def test_calibration_differs_between_draws_of_a_given_split() -> None:
    rows = cohort(n_groups=12)
    given_split = rows.add_column("split", ["train"] * 90 + ["test"] * 18)
    drawn = [
        draw_episode(given_split, shots=1, seed=s, draw=d, calibration_groups=3).calibration
        for s, d in [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    ]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"calibration_groups": -1}, "0 or more calibration groups, found -1"),
        ({"calibration_groups": 4}, "has 4 groups, so 4 cannot be set aside.*ask for 3 at most"),
        (
            {"calibration_groups": 2, "shots": 9},
            "pool without its 2 calibration groups holds 6 images, 9 were asked for",
        ),
    ],
)
def test_too_few_groups_for_calibration(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        draw_episode(cohort(), **{"shots": 1, "seed": 0, **options})


def test_groups_that_an_episode_does_not_use_are_reserved() -> None:
    rows = cohort(n_groups=24)
    slides = rows["slide_id"][:]
    episode = draw_episode(rows, shots=2, seed=0, validation_shots=1)
    for n in (1, 3):
        reserved = reserve_calibration(rows, episode, n, seed=1)
        assert reserved == reserve_calibration(rows, episode, n, 1, group_rows(rows))
        assert replace(reserved, calibration=()) == episode
        sides = _calibration_sides(rows, reserved)
        assert _apart(*sides)
        assert len(sides[-1]) == n
        assert list(reserved.calibration) == [
            i for i, slide in enumerate(slides) if slide in sides[-1]
        ]
    assert len({reserve_calibration(rows, episode, 2, seed=s).calibration for s in range(9)}) > 2
    unused = 24 - len(set().union(*_sides(rows, episode)))
    assert (
        len(_calibration_sides(rows, reserve_calibration(rows, episode, unused, 0))[-1]) == unused
    )
    with pytest.raises(
        GloVLMError, match=rf"leaves {unused} of 24 groups outside .*, {unused + 1} were asked for"
    ):
        reserve_calibration(rows, episode, unused + 1, seed=0)
    with pytest.raises(GloVLMError, match="found 0 calibration images and 0 groups"):
        reserve_calibration(rows, episode, 0, seed=0)
    with pytest.raises(GloVLMError, match="without calibration groups"):
        reserve_calibration(rows, reserved, 1, seed=0)


def test_a_frozen_episode_keeps_its_calibration(tmp_path: Path) -> None:
    rows = cohort(n_groups=10)
    drawn = [draw_episode(rows, shots=1, seed=0, draw=d, calibration_groups=2) for d in range(2)]
    path = tmp_path / "e.json"
    save_episodes(path, drawn, rows, "set")
    assert [load_episode(path, d, rows) for d in range(2)] == drawn
    frozen = json.loads(path.read_text())
    names = rows["file_name"][:]
    assert frozen["draws"][0]["calibration"] == [names[row] for row in drawn[0].calibration]
    frozen["draws"][0]["calibration"] = [names[drawn[0].support[0]]]
    path.write_text(json.dumps(frozen))
    with pytest.raises(GloVLMError, match="on both the support and the calibration side"):
        load_episode(path, 0, rows)
    plain = draw_episode(rows, shots=1, seed=0)
    save_episodes(path, [plain], rows, "set")
    assert "calibration" not in json.loads(path.read_text())["draws"][0]


# ------------------------------------------------------------------------------- given splits


def _given(sides: str, slides: str) -> datasets.Dataset:
    """Two classes in turn; sides t(rain), v(alidation), x (test)."""
    names = {"t": "train", "v": "validation", "x": "test"}
    return make_rows(
        [i % 2 for i in range(len(sides))], split=[names[s] for s in sides], slide_id=list(slides)
    )


def test_a_given_split_is_respected() -> None:
    rows = _given("ttttttvvvvxxxx", "aabbcceeffgghh")
    for seed in range(5):
        episode = draw_episode(rows, shots=2, seed=seed, validation_shots=1)
        assert set(episode.support) <= set(range(6))
        assert set(episode.validation) <= set(range(6, 10))
        assert episode.test == tuple(range(10, 14))


def test_validation_is_set_aside_from_a_given_train_part() -> None:
    rows = _given("ttttttttxxxx", "aabbccddgghh")
    episode = draw_episode(rows, shots=1, seed=0, validation_shots=1)
    support, validation, test = _sides(rows, episode)
    assert test == {"g", "h"}
    assert support <= set("abcd")
    assert validation < set("abcd") - support


@pytest.mark.parametrize(
    ("sides", "slides", "sentence"),
    [
        ("ttttxx", "aabbaa", r"\(a\) on both the train and the test side"),
        ("ttttvvxx", "aabbccbc", r"\(b\) on both the train and the test side"),
        ("ttttvvxx", "aabbccdc", r"\(c\) on both the validation and the test side"),
    ],
)
def test_a_group_on_two_sides_of_a_given_split(sides: str, slides: str, sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        draw_episode(_given(sides, slides), shots=1, seed=0)


def test_all_rows_of_a_given_split(tmp_path: Path) -> None:
    for i, name in enumerate(["train/a", "train/b", "val/a", "test/a", "test/b"]):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(tmp_path / name / "1.png")
    rows = all_rows(load_dataset(tmp_path))
    assert rows["split"][:] == ["train", "train", "validation", "test", "test"]
    assert rows.features["label"].names == ["a", "b"]


# ------------------------------------------------------------------------------ frozen episodes


@given(rows=cohorts(), seed=st.integers(0, 99), validation_shots=st.integers(0, 1))
def test_frozen_episodes_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    rows: datasets.Dataset,
    seed: int,
    validation_shots: int,
) -> None:
    setting = {"seed": seed, "allow_fewer": True, "validation_shots": validation_shots}
    drawn = [_drawn(rows, shots=2, draw=d, **setting) for d in range(3)]
    path = tmp_path_factory.mktemp("episodes") / "episodes.json"
    save_episodes(path, drawn, rows, "set")
    assert [load_episode(path, d, rows) for d in range(3)] == drawn
    shuffled = rows.shuffle(seed=seed).flatten_indices()
    for episode in drawn:
        moved = load_episode(path, episode.draw, shuffled)
        assert split_hash(shuffled, moved) == split_hash(rows, episode)


def test_the_frozen_format(tmp_path: Path) -> None:
    rows = cohort(n_groups=4)
    save_episodes(tmp_path / "e.json", [draw_episode(rows, shots=2, seed=3)], rows, "my set")
    frozen = json.loads((tmp_path / "e.json").read_text())
    assert {k: v for k, v in frozen.items() if k != "draws"} == {
        "set": "my set",
        "shots": 2,
        "sampler": "spread",
        "group_column": "slide_id",
    }
    (entry,) = frozen["draws"]
    assert len(entry["support"]) == 6
    assert len(entry["test_groups"]) == 2
    assert all(name in rows["file_name"][:] for name in entry["support"])
    assert list(tmp_path.iterdir()) == [tmp_path / "e.json"]


def test_frozen_groups_may_be_named_before_they_are_merged(tmp_path: Path) -> None:
    rows = make_rows(
        [0, 1, 0, 1, 0, 1],
        slide_id=list("aabbcc"),
        glomerulus_id=["1", "2", "3", "4", "3", "5"],  # slides b and c share a glomerulus
    )
    for test_groups in (["b", "c"], ["b"], ["c"]):
        content = {
            "shots": 1,
            "sampler": "by hand",
            "group_column": "slide_id",
            "draws": [
                {
                    "draw": 7,
                    "support": ["ischemic/000.png", "sclerotic/001.png"],
                    "test_groups": test_groups,
                }
            ],
        }
        (tmp_path / "e.json").write_text(json.dumps(content))
        episode = load_episode(tmp_path / "e.json", 7, rows)
        assert (episode.support, episode.test) == ((0, 1), (2, 3, 4, 5))
        assert (episode.name, episode.sampler, episode.seed) == ("e", "by hand", 0)


def test_rows_without_a_group_are_frozen_by_their_file_name(tmp_path: Path) -> None:
    rows = make_rows([i % 2 for i in range(12)], slide_id=[*"aabb", *[None] * 8])
    episode = draw_episode(rows, shots=1, seed=0)
    assert any(rows["slide_id"][row] is None for row in episode.test)
    save_episodes(tmp_path / "e.json", [episode], rows, "set")
    assert load_episode(tmp_path / "e.json", 0, rows) == episode


def test_an_episode_that_tests_a_part_of_a_group_is_not_frozen(tmp_path: Path) -> None:
    rows = cohort()
    episode = draw_episode(rows, shots=1, seed=0)
    part = replace(episode, test=episode.test[1:])
    with pytest.raises(GloVLMError, match="draw 0 tests only a part of its groups"):
        save_episodes(tmp_path / "e.json", [part], rows, "set")


def _frozen(path: Path, **changes: Any) -> Path:
    entry = {"draw": 0, "support": ["ischemic/000.png"], "test_groups": ["s1"]}
    top = {"shots": 1, "sampler": "x", "group_column": "slide_id"}
    for name, value in changes.items():
        (entry if name in entry else top)[name] = value
    path.write_text(json.dumps({**top, "draws": [entry]}))
    return path


@pytest.mark.parametrize(
    ("changes", "draw", "sentence"),
    [
        ({}, 3, r"has no draw 3; it holds 1 draws, 0 to 0"),
        ({"support": ["no.png"]}, 0, r"names 1 support files that are not in the data \(no\.png\)"),
        ({"test_groups": ["s1", "s9"]}, 0, r"tests 1 groups that are not in the data \(s9\)"),
        ({"test_groups": ["s0"]}, 0, r"1 group stands \(s0\) on both the support and the test"),
        ({"group_column": "patient_id"}, 0, r"group column 'patient_id', found slide_id"),
        ({"shots": "many"}, 0, r"is not a file of frozen episodes"),
        ({"support": 3}, 0, r"is not a file of frozen episodes"),
    ],
)
def test_bad_frozen_episodes(
    tmp_path: Path, changes: dict[str, Any], draw: int, sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        load_episode(_frozen(tmp_path / "e.json", **changes), draw, cohort())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"draws": [1]}', '{"draws": []}', "\x00"])
def test_files_that_are_no_episodes(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(GloVLMError, match="is not a file of frozen episodes"):
        load_episode(tmp_path / "e.json", 0, cohort())
    with pytest.raises(GloVLMError, match="Expected a file of frozen episodes at"):
        load_episode(tmp_path / "nowhere.json", 0, cohort())


def test_episodes_of_two_kinds_are_not_frozen_together(tmp_path: Path) -> None:
    rows = cohort()
    two = [draw_episode(rows, shots=k, seed=0, draw=k) for k in (1, 2)]
    with pytest.raises(GloVLMError, match="2 episodes of 2 kinds"):
        save_episodes(tmp_path / "e.json", two, rows, "set")
    with pytest.raises(GloVLMError, match="different draws"):
        save_episodes(tmp_path / "e.json", two[:1] * 2, rows, "set")


# --------------------------------------------------------------------------------- real data


def test_the_frozen_draws_of_the_real_glomeruli(shared: Path) -> None:
    folder = shared / "data" / "glomeruli_sclerosis"
    rows = all_rows(load_dataset(folder))
    groups = group_rows(rows)
    labels = rows["label"][:]
    assert (len(rows), len(set(groups.ids)), groups.column) == (1094, 20, "slide_id")
    for draw in range(30):
        episode = load_episode(folder / "episodes" / "spread-8.json", draw, rows)
        assert Counter(labels[row] for row in episode.support) == {0: 8, 1: 8}
        support = {groups.ids[row] for row in episode.support}
        assert support.isdisjoint(groups.ids[row] for row in episode.test)
        assert {labels[row] for row in episode.test} == {0, 1}
        assert (episode.name, episode.shots) == ("spread-8", 8)


def test_eight_shots_can_be_drawn_from_the_real_glomeruli(shared: Path) -> None:
    rows = all_rows(load_dataset(shared / "data" / "glomeruli_sclerosis"))
    for seed in range(30):
        assert len(draw_episode(rows, shots=8, seed=seed).support) == 16
