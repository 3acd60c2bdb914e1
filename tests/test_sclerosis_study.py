"""Percentages of sclerosis: arithmetic by a second route, and a small run with a finder's polygons.

The pictures are synthetic; no number of them says anything about tissue.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_outline_study
from scipy import stats
from test_outline_study import TABLE

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab import detected_glomeruli
from hf_glovlm.lab.detected_glomeruli import deal_groups, draw_regions
from hf_glovlm.lab.sclerosis_arms import Labelled, pool_groups
from hf_glovlm.lab.sclerosis_study import choose_recipe, judge, run_study
from hf_glovlm.lab.slide_percentages import (
    ESTIMATES,
    Learned,
    Percentages,
    Reading,
    crossed_mean,
    gather,
    read,
    summarise,
)
from hf_glovlm.slides.prevalence import estimate_fractions

pictures = test_outline_study.root  # the fixture


@pytest.fixture(scope="module")
def root(pictures: Path) -> Path:
    """The pictures of the comparison of outlines, each a slide under its own name."""
    table = (pictures / "metadata.csv").read_text()
    (pictures / "by_picture.csv").write_text(table.replace(",S", ",P"))
    return pictures


# ------------------------------------------------------------------------------------- arithmetic


def _classifier(confusion: list[list[int]]) -> Learned:
    """The feature is the probability of the class."""
    return Learned(
        lambda x: np.stack([1 - x[:, 0], x[:, 0]], axis=1).astype(np.float64),
        np.array(confusion),
        {"youden": 0.3, "keep_90": None},
    )


def test_a_slide_is_read() -> None:
    reading = read(_classifier([[7, 1], [2, 6]]), np.array([[0.9], [0.4], [0.2], [0.3]]), 1)
    assert reading is not None
    assert reading.counts.tolist() == [3, 1]
    assert {name: reading.percent[name] for name in ("counted", "youden", "keep_90")} == {
        "counted": 25.0, "youden": 75.0, "keep_90": 25.0,  # one without a threshold keeps the calls
    }  # fmt: skip
    assert reading.percent["expected"] == pytest.approx(45)
    assert read(_classifier([[7, 1], [2, 6]]), np.empty((0, 1)), 1) is None


def test_what_says_too_little_is_not_corrected() -> None:
    """Slides by draws: a good classifier, one near chance, and a slide where nothing was found."""
    features = np.array([[0.9]] * 3 + [[0.1]] * 17)
    good, poor = _classifier([[8, 0], [1, 7]]), _classifier([[4, 4], [4, 4]])
    readings: list[list[Reading | None]] = [
        [read(good, features, 1), read(poor, features, 1)],
        [None, None],
    ]
    recall = np.array([[[40, 10]] * 2] * 2), np.array([[[50, 40]] * 2] * 2)
    values = gather(readings, 1, recall=recall)
    assert set(values.percent) == set(ESTIMATES)
    assert values.corrected.tolist() == [[True, False], [False, False]]
    assert np.isnan(values.percent["counted"][1]).all()
    share = estimate_fractions([17, 3], [[8, 0], [1, 7]], recall=([40, 10], [50, 40])).share[1]
    assert values.percent["corrected"][0, 0] == pytest.approx(100 * share, abs=1.5)
    assert values.percent["corrected"][0, 0] > values.percent["counted"][0, 0] + 10  # many missed
    assert values.percent["corrected"][0, 1] == values.percent["counted"][0, 1] == 15
    low, high = values.bounds["printed"]
    assert (low[0, 1], high[0, 1]) == pytest.approx((5.2, 36.0), abs=0.1)  # Wilson's, by hand
    assert high[0, 0] > high[0, 1]


def test_errors_bias_and_coverage_match_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    truth = np.array([0.0, 20.0, 50.0, 80.0])
    percent = {name: rng.uniform(0, 100, (4, 3)) for name in ("counted", "corrected")}
    bounds = np.sort(rng.uniform(0, 100, (2, 4, 3)), axis=0)
    bounds[:, 0, 0] = 0, 10
    bounds[:, 1, 1] = 20, 30  # a bound is inside
    result = summarise(
        Percentages(percent, {"printed": bounds}, np.ones((4, 3), bool)), truth, 200, 5
    )
    errors, gaps, held, widths = [], [], [], []
    for i in range(4):
        for d in range(3):
            errors.append(abs(percent["corrected"][i, d] - truth[i]))
            gaps.append(percent["corrected"][i, d] - truth[i])
            held.append(bounds[0, i, d] <= truth[i] <= bounds[1, i, d])
            widths.append(bounds[1, i, d] - bounds[0, i, d])
    own = result["estimates"][1]
    assert own["error"]["value"] == pytest.approx(np.mean(errors))
    assert own["bias"]["value"] == pytest.approx(np.mean(gaps))
    assert own["absent"] == pytest.approx(np.mean(errors[:3]))
    assert own["present"] == pytest.approx(np.mean(errors[3:]))
    counted = np.abs(percent["counted"] - truth[:, None]).mean()
    assert own["against_counted"]["value"] == pytest.approx(np.mean(errors) - counted)
    (interval,) = result["intervals"]
    assert interval["coverage"]["value"] == pytest.approx(np.mean(held))
    assert interval["width"] == pytest.approx(np.mean(widths))
    assert 0 <= interval["coverage"]["ci95"][0] <= interval["coverage"]["ci95"][1] <= 1


def test_intervals_are_over_slides_and_draws() -> None:
    """Without a spread over draws they are Student's over slides; with one they are wider."""
    by_slide = np.random.default_rng(1).normal(size=(12, 1))
    plain = crossed_mean(np.repeat(by_slide, 4, axis=1), 4000, 0)
    known = stats.t.interval(0.95, 11, by_slide.mean(), stats.sem(by_slide[:, 0]))
    assert plain["ci95"] == pytest.approx(list(known), abs=0.03)
    wide = crossed_mean(by_slide + np.array([-2, -1, 1, 2]), 4000, 0)
    assert wide["value"] == pytest.approx(by_slide.mean())
    assert np.ptp(wide["ci95"]) > 1.5 * np.ptp(plain["ci95"])
    gaps = np.array([[1.0, np.nan], [3.0, 5.0]])
    assert crossed_mean(gaps, 100, 0)["value"] == 3  # what is not there is left out


def test_pools_folds_and_regions() -> None:
    patients = [f"p{i // 2}" for i in range(22)]
    pools = pool_groups(patients, {"count": 3, "seed": 1})
    assert pool_groups(patients, None) == patients
    members = {
        name: {g for g, p in zip(patients, pools, strict=True) if p == name} for name in pools
    }
    assert sorted(map(len, members.values())) == [3, 4, 4]
    assert sum(map(len, members.values())) == 11  # no patient in two
    folds = deal_groups(patients, 4, 2)
    assert sorted(name for fold in folds for name in fold) == sorted(set(patients))
    assert sorted(map(len, folds)) == [2, 3, 3, 3]
    rows = draw_regions(patients, folds[0], 10, 3)
    given = [patients[row] for row in rows]
    assert not set(given) & set(folds[0])
    assert {given.count(name) for name in set(patients) - set(folds[0])} <= {1, 2}
    with pytest.raises(GloVLMError, match="30 regions"):
        draw_regions(patients, folds[0], 30, 3)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ({"counted": 9.0, "corrected": 8.0, "em": 1.0}, "corrected"),  # em is no candidate
        ({"counted": 9.0, "corrected": 8.6, "em": 1.0}, "counted"),  # not by enough
    ],
)
def test_the_rule_of_choice(errors: dict[str, float], chosen: str) -> None:
    rows = [
        {
            "outline": outline,
            "method": "gda",
            "estimates": [
                {"estimate": name, "error": {"value": value - better}}
                for name, value in errors.items()
            ],
        }
        for outline, better in (("ignore", 5), ("blank+pool", 0))
    ]
    about = {"outlines": ["blank+pool"], "methods": ["gda"], "estimates": ["counted", "corrected"]}
    recipe = choose_recipe({"candidates": about, "simpler_within": 0.5}, rows)
    assert recipe == {"outline": "blank+pool", "method": "gda", "estimate": chosen}
    entry = {"value": -2.5, "ci95": [-3, -2]}
    rows[1]["estimates"] = [{"estimate": chosen, "error": {**entry, "value": 5.0}, "bias": entry}]
    rows[1]["intervals"] = [{"interval": "printed", "coverage": {**entry, "value": 0.95}}]
    judged = judge(rows, recipe, {"error": 6, "bias": 2, "coverage": 0.93})
    assert [goal["met"] for goal in judged] == [True, False, True]


# -------------------------------------------------------------------------------------- a small run


def _plan() -> dict[str, Any]:
    return {
        "purpose": "confirmation",
        "backbone": "mini",
        "data": TABLE | {"box": "bbox", "table": "by_picture.csv"},
        "target": "striped",
        "seed": 5,
        "bootstrap_seed": 6,
        "resamples": 20,
        "draws": {"seed": 7, "count": 1, "shots": 2, "least_objects": 2},
        "margin": 1.25,
        "outlines": ["ignore", "blank+pool"],
        "methods": ["gda"],
        "recipe": {"outline": "blank+pool", "method": "gda", "estimate": "counted"},
        "goals": {"error": 100},
        "finder": {
            "data": {
                "pictures": ".", "outlines": "mask", "group": "(P.)", "stain": "(P)",
                "classes": {"red": "striped", "green": "plain"},
            },
            "head": "plain", "folds": 2, "regions": 3, "draws": 1, "seed": 8,
        },
        "gain": {
            "seed": 9, "count": 1, "least_groups": 1, "methods": {"1": "gda"},
            "reference": "ignore", "outline": "blank+pool",
        },
    }  # fmt: skip


def test_a_perfect_finder_reads_what_human_outlines_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The polygons are the outlines; of one picture one is missing, in another is one too many."""
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "features"))

    def detect(regions: Any, *_: Any) -> list[dict[str, Any]]:
        rings = {i.region.name: [p[0][0].tolist() for p in i.region.polygons] for i in regions}
        rings["P0"].pop()
        rings["P1"].append([[0, 60], [30, 60], [30, 89], [0, 89], [0, 60]])
        kept = {
            name: [[], [{"ring": ring, "score": 0.9, "cut": False} for ring in own]]
            for name, own in rings.items()
        }
        shares = {"plain": {"found": 6, "of": 6}, "striped": {"found": 3, "of": 6}}
        left_out = [
            dict(zip(detected_glomeruli.COUNTS, counts, strict=True)) | {"by_class": by_class}
            for counts, by_class in (((2, 9, 10), {}), ((9, 2, 3), shares))
        ]
        slides = [item.region.group for item in regions]
        fold = {"slides": slides, "learned_from": [], "tried": [0.8, 0.5], "detected": kept}
        return [fold | {"left_out": left_out}]

    monkeypatch.setattr(detected_glomeruli, "_find", detect)
    report = run_study(_plan(), root, tmp_path / "out")
    assert report["slides"] == 8
    assert [row["truth"] for row in report["human"][1]["slides"]] == [50] * 8
    about = report["detected"]
    (draw,) = about["draws"]
    assert draw["thresholds"] == [0.5]
    assert (draw["true_positives"], draw["false_positives"], draw["misses"]) == (15, 1, 1)
    assert about["outlines"]["in the table"] == about["outlines"]["all"] == 16
    assert about["finder_alone"]["error"]["value"] == pytest.approx(50 / 8)
    arm = about["percentages"][1]
    by_slide = {row["slide"]: row for row in arm["slides"]}
    for name, row in by_slide.items():
        assert row["truth"] == 50
        assert row["objects"] == {"P0": 1, "P1": 3}.get(name, 2)
        if name not in ("P0", "P1"):
            assert row["found"] == row["found, those that match"] == row["all human outlines"]
    gains = {(row["road"], row["outline"]): row for row in about["gain"]["results"]}
    assert about["gain"]["glomeruli"] == [15]
    assert len(gains) == 6
    assert gains["human", "ignore"]["gain"] is gains["human", "ignore"]["against_human"] is None
    page = (tmp_path / "out" / "report.md").read_text()
    assert "human, tested on found" in page
    assert "| mean absolute error |" in page


def test_a_plan_that_lacks_something_is_refused(root: Path) -> None:
    for name, message in (("goals", "lacks goals;"), ("recipe", "lacks a recipe")):
        plan = _plan()
        del plan[name]
        with pytest.raises(GloVLMError, match=message):
            Labelled(plan, root)
    with pytest.raises(GloVLMError, match="class 'spotted'"):
        Labelled(_plan() | {"target": "spotted"}, root)
