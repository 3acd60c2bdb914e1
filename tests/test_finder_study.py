"""The comparison of finders: its outlines, draws, counts and intervals, and a small run of it.

The pictures are drawn here; no number of them says anything about tissue.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import stats

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.count_ratios import CountedRun, draw_copies, mean_ratio, paired_ratio
from hf_glovlm.lab.finder_study import FinderStudy, draw_regions, judge, run_study, tally
from hf_glovlm.lab.outlined_regions import StudyRegion, read_mask, read_regions
from hf_glovlm.lab.token_store import TokenFolder
from hf_glovlm.metrics import PairedRun, paired_differences
from hf_glovlm.slides.finder.heads import PlainHead
from hf_glovlm.slides.finder.learning import Finder
from hf_glovlm.slides.finder.regions import Detection, Region

GROUPS = 8
ABOUT = {
    "pictures": "pictures",
    "outlines": "geojson",
    "group": r"(P\d+)_",
    "stain": r"P\d+_([A-Z]+)",
    "level": "patient",
    "unit": "patients",
}


def box(left: float, top: float, width: float, height: float) -> Any:
    """Closed ring of a rectangle."""
    x, y = (left, left + width), (top, top + height)
    return np.array([(x[i], y[j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))], float)


def region(group: str, rings: list[Any], *, merged: tuple[int, ...] = ()) -> StudyRegion:
    """Region of 100 by 80 pixels; classes a and b in turn."""
    picture = np.zeros((80, 100, 3), np.uint8)
    labels = ["ab"[k % 2] for k in range(len(rings))]
    outlined = Region(f"{group}_1", group, picture, [((ring,),) for ring in rings], labels)
    return StudyRegion(outlined, tuple(k in merged for k in range(len(rings))))


# ------------------------------------------------------------------------------------- outlines


def test_blobs_of_a_mask_become_outlines_and_those_of_two_are_marked() -> None:
    mask = Image.new("RGB", (200, 120))
    pen = ImageDraw.Draw(mask)
    pen.ellipse((20, 20, 59, 59), fill=(250, 10, 10))
    pen.rectangle((5, 100, 9, 104), fill=(0, 255, 0))  # a speck
    for left in (80, 128):
        pen.ellipse((left, 30, left + 49, 79), fill=(0, 250, 0))
    found = list(read_mask(np.asarray(mask), {"red": "one", "green": "other"}))
    assert [(label, merged) for label, _, merged in found] == [("one", False), ("other", True)]
    ((ring,),) = found[0][1]
    assert ring.min(0) == pytest.approx((20, 20))
    assert ring.max(0) == pytest.approx((60, 60))
    with pytest.raises(GloVLMError, match="holds green"):
        list(read_mask(np.asarray(mask), {"red": "one"}))


# ---------------------------------------------------------------------------------------- draws


def test_draws_learn_from_one_half_of_the_groups_and_test_the_other() -> None:
    rings = [box(10, 10, 20, 20), box(40, 10, 20, 20)]
    regions = [region(f"P{k}", rings[: 1 + k % 2]) for k in range(8) for _ in range(2)]
    regions += [region("P0", rings, merged=(1,)), region("P1", [])]
    draws, passed_over = draw_regions(regions, seed=4, draws=9, most=6, least=2)
    assert passed_over == draws[-1].number + 1 - 9
    assert passed_over > 0
    for draw in draws:
        groups = [regions[k].region.group for k in draw.support]
        tested = {regions[k].region.group for k in draw.test}
        assert len(set(groups[:4])) == 4
        assert not set(groups) & tested
        assert [k for k, item in enumerate(regions) if item.region.group in tested] == [*draw.test]
        assert not {16, 17} & {*draw.support}
        assert sum(int(group[1:]) % 2 for group in tested) >= 2  # of class b
    assert len({draw.support for draw in draws}) > 1
    with pytest.raises(GloVLMError, match="to learn from"):
        draw_regions(regions, seed=3, draws=1, most=99, least=1)


# --------------------------------------------------------------------------------------- counts


def test_what_is_found_is_counted_by_class_and_cut_ones_apart() -> None:
    item = region("P0", [box(10, 10, 20, 20), box(0, 40, 20, 20), box(60, 10, 30, 60)], merged=(2,))
    found = [
        Detection(box(10, 10, 20, 20), 0.9),
        Detection(box(10, 10, 20, 19), 0.8),  # the same one again
        Detection(box(60, 10, 30, 30), 0.7),  # half of the merged one, neither hit nor false
        Detection(box(50, 10, 15, 30), 0.6),  # for a third in it
    ]
    assert tally(found, item) == {
        "hits": 1, "false": 2, "missed": 1, "found a": 1, "of a": 1, "found b": 0, "of b": 1,
        "found whole": 1, "of whole": 1, "found cut": 0, "of cut": 1,
    }  # fmt: skip
    assert tally([], region("P0", [])) == {"hits": 0, "false": 0, "missed": 0}


# ------------------------------------------------------------------------------------- intervals


def counted(seed: int, draws: int = 4) -> list[CountedRun]:
    """Counts of pictures of some groups, other ones in each draw; one group is in no ratio."""
    runs = []
    for draw in range(draws):
        groups = np.random.default_rng(draw).integers(12, size=30)
        bottom = np.where(groups == 3, 0, np.random.default_rng(50 + draw).integers(1, 5, 30))
        top = np.random.default_rng([seed, draw]).binomial(bottom, 0.4 + 0.04 * groups)
        runs.append(CountedRun(draw, [f"P{g}" for g in groups], np.stack([top, bottom], 1)))
    return runs


def test_ratios_and_gains_are_those_of_plain_loops() -> None:
    before, after, size, seed = counted(1), counted(2), 60, 5
    names = sorted({group for run in before for group in run.groups})
    rng = np.random.default_rng(seed)
    drawn, copies = draw_copies(rng, len(before), size), draw_copies(rng, len(names), size)

    def ratio(run: CountedRun, times: dict[str, float]) -> float:
        top = bottom = 0.0
        for group, (hits, of) in zip(run.groups, run.counts, strict=True):
            top += times[group] * hits
            bottom += times[group] * of
        return top / bottom

    once = dict.fromkeys(names, 1.0)
    points = [ratio(b, once) - ratio(a, once) for a, b in zip(before, after, strict=True)]
    resampled = []
    for r in range(size):
        times = {name: copies[k, r] for k, name in enumerate(names)}
        values = []
        for k, (a, b) in enumerate(zip(before, after, strict=True)):
            values += [ratio(b, times) - ratio(a, times)] * int(drawn[k, r])
        resampled.append(np.mean(values))
    share = dict.fromkeys(names, 0.0)
    for run in before:
        for group, (_, of) in zip(run.groups, run.counts, strict=True):
            share[group] += of / run.counts[:, 1].sum() / len(before)
    n = 1 / sum(value**2 for value in share.values())
    half = stats.t.ppf(0.975, n - 1) * np.std(resampled) * np.sqrt(n / (n - 1))
    found = paired_ratio(before, after, n_resamples=size, seed=seed)
    assert found["value"] == pytest.approx(np.mean(points))
    assert found["ci95"] == pytest.approx([np.mean(points) - half, np.mean(points) + half])
    assert found["sd"] == pytest.approx(np.std(points, ddof=1))
    assert (found["n_groups"], found["n_draws"]) == (len(names) - 1, len(before))
    own = mean_ratio(after, n_resamples=size, seed=seed)
    assert own["value"] == pytest.approx(np.mean([ratio(run, once) for run in after]))
    assert own["ci95"][0] < own["value"] < own["ci95"][1]


def test_a_gain_in_a_share_has_the_interval_of_the_same_gain_in_accuracy() -> None:
    rng = np.random.default_rng(0)
    sides: tuple[list[CountedRun], list[CountedRun]] = ([], [])
    runs = []
    for draw in range(5):
        groups = [f"P{k}" for k in rng.integers(15, size=80)]
        right = rng.random((2, 80)) < [[0.6], [0.8]]
        for side, of in zip(sides, right, strict=True):
            side.append(CountedRun(draw, groups, np.stack([of, np.ones(80)], 1)))
        p = [np.stack([of, ~of], 1).astype(float) for of in right]
        runs.append(PairedRun(draw, np.zeros(80, np.int64), groups, *p))
    known = paired_differences(runs, ("accuracy",), 2000, 1)["accuracy"]
    found = paired_ratio(*sides, seed=1)
    assert found["value"] == pytest.approx(known["value"])
    assert found["ci95"] == pytest.approx(known["ci95"], abs=0.006)


def test_a_ratio_without_a_denominator_is_undefined() -> None:
    empty = [CountedRun(0, ["A", "B"], np.zeros((2, 2)))]
    assert mean_ratio(empty)["value"] is None
    assert paired_ratio(empty, empty)["ci95"] is None
    with pytest.raises(GloVLMError, match="a draw twice"):
        mean_ratio(empty * 2)
    with pytest.raises(GloVLMError, match="same draws and groups"):
        paired_ratio(empty, [CountedRun(0, ["A", "C"], np.zeros((2, 2)))])


# ------------------------------------------------------------------------------------ a small run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with one dark square each of some patients, and pictures without any."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "pictures").mkdir()
    (folder / "empty").mkdir()
    rng = np.random.default_rng(0)
    for k in range(GROUPS):
        pixels = rng.integers(200, 230, (96, 144, 3), dtype=np.uint8)
        name, left = f"P{k}_{'HE' if k % 2 else 'PAS'}", 24 + 4 * k
        pixels[24:72, left : left + 48] = rng.integers(40, 90, (48, 48, 3))
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [box(left, 24, 48, 48).tolist()]},
            "properties": {"classification": {"name": "ab"[k // 2 % 2]}},
        }
        content = {"type": "FeatureCollection", "features": [feature]}
        Image.fromarray(pixels).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.geojson").write_text(json.dumps(content))
        Image.fromarray(pixels[:24]).save(folder / "empty" / f"{k}.png")
    return folder


def _plan() -> dict[str, Any]:
    return {
        "purpose": "development",
        "backbone": "mini",
        "data": ABOUT,
        "seed": 5,
        "bootstrap_seed": 6,
        "resamples": 20,
        "draws": {"seed": 7, "count": {"2": 1, "4": 2}, "least_groups": 1},
        "thresholds": {"plain": [0.3, 0.5, 0.7]},
        "arms": {
            "plain at .7": {"head": "plain", "threshold": 0.7},
            "plain": {"head": "plain", "threshold": "left out"},
        },
        "references": ["plain at .7"],
        "best": "plain",
        "without": {"P1": ["P1"]},
        "empty": {
            "regions": 4, "most": 4, "window": [48, 48], "folders": {"none": "empty"},
            "slides": {},
        },
        "goals": {"f1": {"4": 1.01}, "gain_at": [4]},
    }  # fmt: skip


def test_a_plan_runs_once_and_reports_all_of_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainHead, "cells", 12)  # quicker
    monkeypatch.setattr(PlainHead, "least", 2.0)
    report = run_study(_plan(), root, tmp_path)
    parts = ["all", "HE", "PAS", "without P1"]
    assert [(r["arm"], r["regions"], r["part"]) for r in report["results"]] == [
        (arm, n, part) for n in (4, 2) for arm in ("plain at .7", "plain") for part in parts
    ]
    assert (report["groups"], report["classes"], report["cut"]) == (8, {"a": 4, "b": 4}, 0)
    assert [goal["met"] for goal in report["goals"]] == [False, False]
    assert {(r["arm"], r["ratio"]) for r in report["left_out"]} == {
        (arm, ratio)
        for arm in ("plain at .7", "plain")
        for ratio in ("f1", "precision", "recall", "a", "b")
    }
    (row,) = report["without_kidney"]
    assert (row["pictures"], row["megapixels"]) == (4, pytest.approx(4 * 24 * 144 / 1e6))
    page = (tmp_path / "report.md").read_text()
    assert "**missed**" in page
    assert "| none | 4 | 0.014 |" in page

    # Counts and figures of one draw by a finder of its own, without what the run kept.
    study = FinderStudy(_plan(), root, tmp_path)
    draw = study.draws[0]
    support = [study.regions[k].region for k in draw.support]
    finder = Finder.fit(*study.backbone, support, head="plain", seed=5)
    found = [
        tally(finder.detect(study.regions[k].region.picture, threshold=0.7), study.regions[k])
        for k in draw.test
    ]
    assert study.tallies("plain at .7", 4)[0] == found
    counts = {name: sum(row[name] for row in found) for name in ("hits", "false", "missed")}
    f1 = 2 * counts["hits"] / (2 * counts["hits"] + counts["false"] + counts["missed"])
    run = study.runs("plain at .7", 4, "f1", lambda item: True)[0]
    assert np.divide(*run.counts.sum(0)) == pytest.approx(f1)

    def fit(*_: Any, **__: Any) -> Any:
        raise AssertionError("fitted twice")

    monkeypatch.setattr(FinderStudy, "fit", fit)
    assert run_study(_plan(), root, tmp_path)["results"] == report["results"]
    with pytest.raises(AssertionError, match="fitted twice"):
        run_study(_plan() | {"seed": 9}, root, tmp_path)


def test_a_plan_that_lacks_something_is_refused(root: Path) -> None:
    with pytest.raises(GloVLMError, match="lacks arms;"):
        FinderStudy({k: v for k, v in _plan().items() if k != "arms"}, root, root)
    with pytest.raises(GloVLMError, match=r"no arm 'plane'.*'plain'"):
        FinderStudy(_plan() | {"best": "plane"}, root, root)
    with pytest.raises(GloVLMError, match="found none"):
        read_regions(ABOUT | {"pictures": "elsewhere"}, root)


def test_goals_are_met_where_value_and_interval_say_so() -> None:
    def row(n: int, f1: float, low: float) -> dict[str, Any]:
        gain = {"value": 0.1, "ci95": [low, 0.3]}
        ratios = {"f1": {"value": f1, "ci95": [0.0, 1.0]}}
        return {"arm": "new", "regions": n, "part": "all", "ratios": ratios} | {
            "gains": {"old": {"f1": gain}}
        }

    report = {
        "best": "new",
        "references": ["old"],
        "results": [row(4, 0.7, 0.0), row(8, 0.69, 0.1)],
    }
    judged = judge(report, {"f1": {"4": 0.7, "8": 0.7}, "gain_at": [4, 8]})
    assert [goal["met"] for goal in judged] == [True, False, False, True]


def test_tokens_on_disk_are_those_that_were_kept(tmp_path: Path) -> None:
    store = TokenFolder(tmp_path / "tokens")
    tokens = np.random.default_rng(0).random((3, 4, 5)).astype(np.float16)
    store["key"] = tokens
    np.testing.assert_array_equal(TokenFolder(tmp_path / "tokens")["key"], tokens)
    assert ("key" in store, "other" in store, [*store], len(store)) == (True, False, ["key"], 1)
    with pytest.raises(KeyError):
        store["other"]
