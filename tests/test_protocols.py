"""The published protocol beside the strict one: what its ten runs share and what they do not."""

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from test_splits import CLASSES, cohort, make_rows
from tiny import CLASSES as TINY_CLASSES
from tiny import tiny_clip, tiny_images

from hf_glovlm.data import Episode, draw_episode, group_rows
from hf_glovlm.data.protocols import DISJOINT, POOL, RUNS, draw_glo_vlms, protocol_notes
from hf_glovlm.errors import GloVLMError
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig

SHOTS = (1, 2, 4, 8, 16, 32)  # those of the article


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    """18 slides of 10 images of each class: 60 or so of each in training."""
    return cohort(18, 10)


@pytest.fixture(scope="module")
def drawn(rows: datasets.Dataset) -> dict[tuple[int, int], Episode]:
    """Every run of the protocol at every number of shots."""
    groups = group_rows(rows)
    return {
        (draw, shots): draw_glo_vlms(rows, shots=shots, seed=7, draw=draw, groups=groups)
        for draw in range(RUNS)
        for shots in SHOTS
    }


def of_class(labels: list[int], episode: Episode, k: int) -> set[int]:
    return {row for row in episode.support if labels[row] == k}


def test_all_runs_share_one_split_in_which_no_slide_is_on_two_sides(rows, drawn):
    groups = np.array(group_rows(rows).ids)
    sides = {(e.validation, e.test) for e in drawn.values()}
    assert len(sides) == 1
    validation, test = (list(side) for side in sides.pop())
    for rows_of in (validation, test):  # all images of their slides
        assert set(rows_of) == set(np.flatnonzero(np.isin(groups, groups[rows_of])))
    for episode in drawn.values():
        held = [set(groups[list(s)]) for s in (episode.support, validation, test)]
        assert not any(one & other for one, other in combinations(held, 2))
    strict = draw_episode(rows, shots=4, seed=7, validation_shots=1)
    assert list(strict.test) == test


def test_small_supports_of_two_runs_share_no_image_and_are_nested(rows, drawn):
    for shots in (1, 2, 4):
        times = Counter(row for run in range(RUNS) for row in drawn[run, shots].support)
        assert set(times.values()) == {1}
        assert len(times) == RUNS * shots * len(CLASSES)
    for draw in range(RUNS):
        assert set(drawn[draw, 1].support) < set(drawn[draw, 2].support)
        assert set(drawn[draw, 2].support) < set(drawn[draw, 4].support)


def test_larger_supports_come_from_a_pool_of_32_and_are_not_nested(rows, drawn):
    nested, labels = 0, list(rows["label"])
    for draw in range(RUNS):
        for k in range(len(CLASSES)):
            pool = of_class(labels, drawn[draw, 32], k)
            assert len(pool) == POOL
            for shots in SHOTS:
                support = of_class(labels, drawn[draw, shots], k)
                assert len(support) == shots
                assert support <= pool
        nested += set(drawn[draw, 8].support) < set(drawn[draw, 16].support)
    assert nested < RUNS
    pools = [set(drawn[draw, 32].support) for draw in range(RUNS)]
    assert all(one & other for one, other in combinations(pools, 2))
    assert len({frozenset(pool) for pool in pools}) == RUNS


def test_the_slices_deal_out_every_training_image_once(rows):
    """Restated: shuffled images of a class are dealt to ten runs in turn, as cards are."""
    small = cohort(12, 7)  # 28 training images of each class: slices of 3 and of 2
    labels = np.array(small["label"])
    draws = [
        draw_glo_vlms(small, shots=DISJOINT, seed=3, draw=draw, allow_fewer=True)
        for draw in range(RUNS)
    ]
    outside = {*draws[0].validation, *draws[0].test}
    for k in range(len(CLASSES)):
        training = {int(row) for row in np.flatnonzero(labels == k)} - outside
        deck = list(training)
        dealt = [len(deck[run::RUNS]) for run in range(RUNS)]
        supports = [[row for row in draw.support if labels[row] == k] for draw in draws]
        slices = [one[:size] for one, size in zip(supports, dealt, strict=True)]
        assert sorted(row for one in slices for row in one) == sorted(training)
        assert all(len({*one}) == DISJOINT for one in supports)  # filled up from the others


def test_a_seed_gives_one_episode_and_another_seed_another(rows, drawn):
    assert draw_glo_vlms(rows, shots=8, seed=7, draw=2) == drawn[2, 8]
    assert draw_glo_vlms(rows, shots=8, seed=8, draw=2).test != drawn[2, 8].test


def test_a_given_split_is_kept_and_a_patient_on_two_sides_refused():
    labels = [k for k in range(3) for _ in range(80)]
    sides = (["train"] * 40 + ["validation"] * 20 + ["test"] * 20) * 3
    slides = [f"{side}-{i % 5}" for i, side in enumerate(sides)]
    given = make_rows(labels, slide_id=slides, split=sides)
    episode = draw_glo_vlms(given, shots=8, seed=0)
    for side in ("validation", "test"):
        assert {sides[row] for row in getattr(episode, side)} == {side}
        assert len(getattr(episode, side)) == 60
    assert {sides[row] for row in episode.support} == {"train"}
    slides[0] = "test-0"
    with pytest.raises(GloVLMError, match="on both the train and the test side"):
        draw_glo_vlms(make_rows(labels, slide_id=slides, split=sides), shots=8, seed=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shots": 33}, "pools of 32 images a class; found shots 33"),
        ({"draw": 10}, "has 10 runs, draws 0 to 9; found draw 10"),
        ({"shots": {"ischemic": 2}}, "no number for sclerotic"),
    ],
)
def test_impossible_runs(rows, options: dict[str, Any], sentence: str):
    with pytest.raises(GloVLMError, match=sentence):
        draw_glo_vlms(rows, **{"shots": 8, "seed": 0} | options)


def test_a_class_needs_a_whole_pool_unless_fewer_are_allowed(caplog):
    small = cohort(6, 5)
    with pytest.raises(GloVLMError, match="hold 10 images, and protocol glo_vlms asks for 32"):
        draw_glo_vlms(small, shots=2, seed=0)
    episode = draw_glo_vlms(small, shots=16, seed=0, allow_fewer=True)
    assert len(episode.support) == 30
    assert "16 were asked for: all of them are taken" in caplog.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"episodes": "frozen.json"}, "protocol glo_vlms and episodes exclude each other"),
        ({"validation_shots": 2}, "it takes all images of the validation groups"),
        ({"calibration_groups": 1}, "calibration_groups exclude each other"),
        ({"shots_from": "random"}, "whatever their groups"),
        ({"cross_validate": True}, "it chooses on the validation groups"),
        ({"draw": 10}, "found draw 10"),
        ({"shots": 64}, "found shots 64"),
    ],
)
def test_settings_that_the_protocol_excludes(settings: dict[str, Any], sentence: str):
    with pytest.raises(GloVLMError, match=sentence):
        TrainConfig(data="x", output_dir="y", protocol="glo_vlms", **settings)


def test_a_run_counts_the_labels_that_choose_and_says_so(tmp_path: Path):
    images = tiny_images(tmp_path / "images", per_class=12, groups=6)
    grades = {name: {"grade": grade} for grade, name in enumerate(reversed(TINY_CLASSES))}
    (images / "classes.yaml").write_text(yaml.safe_dump({"classes": grades}))
    results = run(
        TrainConfig(
            data=str(images),
            output_dir=str(tmp_path / "run"),
            backbone=str(tiny_clip()),
            protocol="glo_vlms",
            shots=2,
            allow_fewer=True,
            n_resamples=20,
            save_model=False,
        )
    )
    support = results["data"]["support"]
    chosen = sum(results["data"]["counts"]["validation"].values())
    assert support["validation_labels"] == chosen > 0
    assert support["label_budget"] == sum(support["labels_per_class"].values()) + chosen
    assert results["data"]["sampler"] == results["config"]["protocol"] == "glo_vlms"
    assert [one["grade"] for one in results["data"]["classes"]] == [
        grades[one["name"]]["grade"] for one in results["data"]["classes"]
    ]
    assert results["metrics"]["quadratic_kappa"]["value"] is not None
    note = next(note for note in results["notes"] if "arXiv 2511.11984" in note)
    assert f"{chosen} validation labels" in note
    assert f"label budget of {support['label_budget']}" in note


def test_the_strict_protocol_has_no_note(rows):
    assert protocol_notes(draw_episode(rows, shots=2, seed=0)) == []
