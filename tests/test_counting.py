"""Counts, intervals and corrections, each against a restatement that shares no code."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from numpy.typing import NDArray
from scipy.optimize import brentq
from test_prevalence import of_true_counts

from hf_glovlm.calibration import correct_prior
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.counting import bench_counting, bench_rows, draw_support, leave_slides_out
from hf_glovlm.slides.cases import count_cases
from hf_glovlm.slides.counting import (
    NEIGHBOURS,
    NOT_A_SCORE,
    SAMPLING,
    count_classes,
    wilson_interval,
)

NAMES = ["non_sclerosed", "sclerosed"]


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(("count", "n"), [(0, 7), (1, 20), (5, 20), (19, 20), (12, 12), (300, 900)])
def test_wilson_holds_the_fractions_that_the_score_test_accepts(count: int, n: int) -> None:
    seen = count / n

    def rejected(p: float) -> float:  # > 0 outside the interval
        return float((seen - p) ** 2 - 1.959963984540054**2 * p * (1 - p) / n)

    low, high = wilson_interval(count, n)
    # The score test accepts what was seen; step off the trivial roots at 0 and 1.
    expected_low = 0.0 if count == 0 else brentq(rejected, 1e-9, min(seen, 1 - 1e-9))
    expected_high = 1.0 if count == n else brentq(rejected, max(seen, 1e-9), 1 - 1e-9)
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=1e-9)


def test_wilson_is_the_published_formula_up_to_rounding() -> None:
    z = 1.959963984540054
    for n in (1, 2, 3, 10, 97, 1000, 10**6):
        for count in sorted({0, 1, n // 3, n - 1, n}):
            p = count / n
            half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
            bounds = (p + z**2 / (2 * n) + np.array([-half, half])) / (1 + z**2 / n)
            assert wilson_interval(count, n) == pytest.approx(bounds, abs=1e-12)
            assert (wilson_interval(count, n)[0] == 0) == (count == 0)
            assert (wilson_interval(count, n)[1] == 1) == (count == n)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "n"), [(-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(count: int, n: int) -> None:
    with pytest.raises(GloVLMError, match="Expected a count"):
        wilson_interval(count, n)


def test_counts_of_each_slide() -> None:
    labels = [0, 1, 1, 0, 0, 0]
    result = count_classes(labels, NAMES, groups=["b", "b", "b", "a", "a", "a"])
    assert list(result) == ["b", "a"]
    b, a = result["b"]["classes"]["sclerosed"], result["a"]["classes"]["sclerosed"]
    assert (b["count"], a["count"], result["b"]["n"]) == (2, 0, 3)
    assert b["percent"] == pytest.approx(200 / 3)
    assert b["ci95"] == pytest.approx([100 * x for x in wilson_interval(2, 3)])
    assert result["a"]["notes"][:2] == [NOT_A_SCORE, SAMPLING]
    assert "corrected" not in a


def test_probabilities_count_by_their_largest_and_tiles_say_that_they_are_neighbours() -> None:
    p = np.array([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    result = count_classes(p, NAMES, unit="tiles")["all"]
    assert [result["classes"][name]["count"] for name in NAMES] == [2, 1]
    assert NEIGHBOURS in result["notes"]


@pytest.mark.parametrize(
    ("names", "called", "expected"),
    [
        # a lesion that one level shows is there, however sure the other one is
        (("normal", "crescent"), [0, 1], [0, 1]),
        (("non_sclerosed", "sclerosed"), [0, 0, 1], [0, 1]),
        # global sclerosis where every level shows it
        (("normal", "global_sclerosis"), [0, 1], [1, 0]),
        (("normal", "global_sclerosis"), [1, 1], [0, 1]),
        # two lesions on two levels are both there
        (("normal", "crescent", "segmental_sclerosis", "GS"), [1, 2, 3, 0], [0, 1, 1, 0]),
    ],
    ids=str,
)
def test_a_glomerulus_on_several_sections_is_one(
    names: tuple[str, ...], called: list[int], expected: list[int]
) -> None:
    p = np.full((len(called), len(names)), 0.49 / (len(names) - 1))
    p[range(len(called)), called] = 0.51
    p[0] = np.eye(len(names))[called[0]]  # the surest, whose mean with others it would be
    confusion = 90 * np.eye(len(names), dtype=int) + 5
    result = count_classes(p, names, ids=["g1"] * len(called), confusion=confusion)["all"]
    assert result["n"] == 1
    assert [result["classes"][name]["count"] for name in names] == expected
    assert any("on several sections counts in each lesion" in n for n in result["notes"])
    assert not any("corrected" in entry for entry in result["classes"].values())
    apart = count_classes(p[:2], names, groups=["case", "other"], ids=["g1", "g1"])
    assert [entry["n"] for entry in apart.values()] == [1, 1]


def test_no_object_is_no_percentage() -> None:
    result = count_classes(np.empty((0, 2)), NAMES)["all"]
    assert result["n"] == 0
    assert result["classes"]["sclerosed"] == {"count": 0, "percent": None, "ci95": None}


@pytest.mark.parametrize(
    ("calls", "options", "message"),
    [
        ([0, 2], {}, "Expected classes 0 ... 1, found 2"),
        ([0.5, 0.5], {}, "Expected class numbers"),
        ([[0.5, np.nan]], {}, "Expected class numbers"),
        ([0, 1], {"groups": ["a"]}, "for each of 2 rows, not 1"),
        ([0, 1], {"ids": ["a"]}, "for each of 2 rows, not 1"),
        ([0, 1], {"confusion": [[1.0, 0], [0, 1]]}, "confusion matrix of counts"),
        ([0, 1], {"confusion": [[1, 0, 0]]}, "confusion matrix of counts"),
    ],
)
def test_counting_refuses(calls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        count_classes(calls, NAMES, **options)


def test_counts_are_corrected_where_the_errors_are_known() -> None:
    confusion = [[80, 20], [10, 90]]
    entry = count_classes([1] * 40 + [0] * 60, NAMES, confusion=confusion)["all"]
    corrected = entry["classes"]["sclerosed"]["corrected"]
    assert corrected["percent"] == pytest.approx(100 * (0.4 - 0.2) / 0.7, abs=5)
    low, high = corrected["ci95"]
    plain = entry["classes"]["sclerosed"]["ci95"]
    assert low < corrected["percent"] < high
    assert high - low > plain[1] - plain[0]  # it holds the classifier's errors too
    assert "200 labelled objects" in entry["notes"][-1]
    assert entry == count_classes([1] * 40 + [0] * 60, NAMES, confusion=confusion)["all"]


@pytest.mark.parametrize(
    "confusion", [[[79, 47], [206, 264]], [[5, 5], [5, 5]], [[1, 9], [9, 1]], [[50, 50], [36, 64]]]
)
def test_calls_near_chance_are_not_corrected(confusion: list[list[int]]) -> None:
    """The first: 18 of 19 called so by it read 100% [100, 100] once."""
    entry = count_classes([0] * 18 + [1], NAMES, confusion=confusion)["all"]
    assert not any("corrected" in of for of in entry["classes"].values())
    assert "Not corrected: non_sclerosed, sclerosed" in entry["notes"][-1]
    assert "too near 1" in entry["notes"][-1]


def test_few_calls_of_a_poor_classifier_are_never_certain() -> None:
    counting: Any = import_module("hf_glovlm.slides.counting")
    percent, bounds = counting.corrected_percentages([18, 1], [[79, 47], [206, 264]])
    assert percent[0] + percent[1] == pytest.approx(100)
    for value, (low, high) in zip(percent, bounds, strict=True):
        assert low < value < high
        assert high - low > 30


def test_a_class_that_was_never_called_keeps_an_upper_bound() -> None:
    for confusion in ([[80, 20], [20, 80]], [[180, 20], [60, 140]], [[16, 0], [0, 16]]):
        entry = count_classes([0] * 12, NAMES, confusion=confusion)["all"]["classes"]
        low, high = entry["sclerosed"]["corrected"]["ci95"]
        assert low == 0
        assert high > 5, confusion
        low, high = entry["non_sclerosed"]["corrected"]["ci95"]
        assert (low < 95, high) == (True, 100), confusion


def test_a_class_whose_calls_say_nothing_leaves_the_others_corrected() -> None:
    confusion = [[95, 3, 2], [4, 48, 48], [4, 49, 47]]
    entry = count_classes([0] * 6 + [1] * 8 + [2] * 6, ["a", "b", "c"], confusion=confusion)["all"]
    assert [("corrected" in of) for of in entry["classes"].values()] == [True, False, False]
    low, high = entry["classes"]["a"]["corrected"]["ci95"]
    assert low < 30 < high
    assert "Not corrected: b, c." in entry["notes"][-1]


def test_errors_that_nobody_measured_are_said_to_be_unknown() -> None:
    unknown = count_classes([1, 0], NAMES)["all"]["notes"][-1]
    assert "not corrected" in unknown
    assert "errors are not known" in unknown
    entry = count_classes([1, 0], NAMES, confusion=[[9, 1], [0, 0]])["all"]
    assert "corrected" not in entry["classes"]["sclerosed"]
    assert "no object of sclerosed" in entry["notes"][-1]
    assert "corrected" not in count_classes([], NAMES)["all"]["notes"][-1]


def test_calls_that_no_mixture_explains_are_named() -> None:
    confusion = [[140, 60], [40, 160]]
    notes = count_classes([0] * 30, NAMES, confusion=confusion)["all"]["notes"]
    assert any("how many objects are called non_sclerosed, sclerosed" in note for note in notes)
    notes = count_classes([0] * 20 + [1] * 10, NAMES, confusion=confusion)["all"]["notes"]
    assert not any("mixture" in note for note in notes)


# ---------------------------------------------------------------------------------------- cases


def slide_entry(slide: str, case: str, calls: list[int] | None = None) -> dict[str, Any]:
    """A slide's entry in the results: failed without calls, else of tiles."""
    counts = None if calls is None else count_classes(calls, NAMES, unit="tiles")["all"]
    return {"slide": slide, "case": case, "counts": counts}


def write_calls(
    output: Path,
    entry: dict[str, Any],
    calls: list[int],
    confusion: Any,
    ids: Sequence[str | None] | None = None,
) -> None:
    """Give a slide objects with these calls, and the ids of their glomeruli."""
    folder = output / "slides" / entry["slide"]
    folder.mkdir(parents=True)
    p = np.eye(2)[calls]
    columns = {"id": [str(i) for i in range(len(calls))], "counted": [True] * len(calls)}
    shown = pa.array(ids if ids is not None else [None] * len(calls), pa.string())
    table = pa.table({**columns, "glomerulus": shown})
    for k, name in enumerate(NAMES):
        table = table.append_column(f"p_{name}", pa.array(p[:, k]))
    pq.write_table(table, folder / "objects.parquet")
    entry["counts"] = count_classes(calls, NAMES, confusion=confusion)["all"]


def test_a_case_says_which_of_its_slides_failed(tmp_path: Path) -> None:
    slides = [
        slide_entry("s1", "A", [0, 1, 1]),
        slide_entry("s2", "A"),
        slide_entry("s3", "B"),
        slide_entry("s4", "C", [1]),
    ]
    a, *others = count_cases(slides, tmp_path, NAMES, None)
    assert (a["case"], a["slides"], a["counts"]["n"]) == ("A", ["s1"], 3)
    assert a["flags"] == ["not counted, as failed: s2"]
    assert NEIGHBOURS in a["counts"]["notes"]
    assert [(of["case"], of.get("status"), of["slides"], of["flags"]) for of in others] == [
        ("B", "failed", [], ["not counted, as failed: s3"]),
        ("C", "done", ["s4"], []),
    ]
    assert others[0]["counts"] is None
    assert count_cases(slides, tmp_path, [], None) == []


def test_a_case_is_corrected_by_all_its_calls_at_once(tmp_path: Path) -> None:
    confusion = np.array([[80, 20], [10, 90]])
    slides = [slide_entry("s1", "A"), slide_entry("s2", "A"), slide_entry("s3", "A", [1] * 50)]
    write_calls(tmp_path, slides[0], [0, 0, 1, 0, 0, 1], confusion, list("abcdef"))
    write_calls(tmp_path, slides[1], [1, 0, 0, 0], confusion, list("ghij"))
    (case,) = count_cases(slides, tmp_path, NAMES, confusion)
    together = count_classes([1] * 3 + [0] * 7, NAMES, confusion=confusion)["all"]
    assert case["counts"] == together
    assert "corrected" in together["classes"]["sclerosed"]
    assert case["flags"] == ["not counted, as without objects: s3"]


@pytest.mark.parametrize(
    ("ids", "n", "used"),
    [(["a", "b"], 3, ["s1", "s2"]), (["a", None], 3, ["s2"]), (None, 3, ["s2"])],
    ids=["all", "some", "none"],
)
def test_sections_are_joined_by_ids_and_never_summed_without(
    ids: list[str | None] | None, n: int, used: list[str], tmp_path: Path
) -> None:
    slides = [slide_entry("s1", "A"), slide_entry("s2", "A")]
    write_calls(tmp_path, slides[0], [0, 1], None, ids)
    write_calls(tmp_path, slides[1], [0, 0, 1], None, ["a", "b", "c"])
    (case,) = count_cases(slides, tmp_path, NAMES, None)
    assert (case["slides"], case["counts"]["n"]) == (used, n)
    assert any("sections are not summed: s1" in flag for flag in case["flags"]) == (used == ["s2"])


# ------------------------------------------------------------------------- slides left out in turn


def make_slides(
    n_slides: int = 6, per_slide: int = 30, gap: float = 1.2, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]]:
    """Overlapping classes in the plane at prevalences 0 ... 1/2 over the slides."""
    rng = np.random.default_rng(seed)
    labels, slides = [], []
    for i in range(n_slides):
        positive = round(per_slide * 0.5 * i / (n_slides - 1))
        labels += [1] * positive + [0] * (per_slide - positive)
        slides += [f"s{i}"] * per_slide
    y = np.array(labels)
    features = rng.normal(size=(len(y), 4)) + [5, 0, 0, 0] + gap * y[:, None] * [0, 1, 1, 0]
    return features, y, slides


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    features, labels, slides = make_slides()
    return leave_slides_out(features, labels, slides, class_names=NAMES, shots=6, draws=3)


def test_left_out_slides_match_a_plain_loop(study: dict[str, Any]) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels, slides = make_slides()
    ids = np.array(slides, dtype=object)
    errors = []
    for i in range(6):
        test = ids == f"s{i}"
        for draw in range(3):
            support = draw_support(labels, ids, test, NAMES, shots=6, seed=0, draw=draw)
            assert not test[support].any()
            assert np.bincount(labels[support]).tolist() == [6, 6]
            # spread: slides take turns, so no slide gives two before each has given one
            given = np.unique(ids[support][labels[support] == 0], return_counts=True)[1]
            assert given.max() - given.min() <= 1
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            model = LogisticRegression(C=100, max_iter=1000).fit(unit[support], labels[support])
            read = 100 * model.predict(unit[test]).mean()
            errors.append(read - 100 * labels[test].mean())
    plain = study["estimates"][0]
    assert plain["name"] == "counted"
    assert plain["error"]["value"] == pytest.approx(np.abs(errors).mean())
    assert plain["bias"]["value"] == pytest.approx(np.mean(errors))
    absent = np.array(errors[:3])  # slide s0 holds none
    assert plain["reads_high"] == pytest.approx((absent >= 10).mean())
    low, high = plain["error"]["ci95"]
    assert low <= plain["error"]["value"] <= high


def test_each_estimate_reports_its_labels(study: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in study["estimates"]}
    assert list(rows) == ["counted", "expected", "adjusted", "adjusted_all", "em"]
    assert [row["labels_used"] for row in rows.values()] == [12, 12, 12, 150, 12]
    assert [name for name, row in rows.items() if row["transductive"]] == ["em"]
    assert rows["counted"]["against_counted"]["value"] == 0
    assert study["n_slides"] == 6


def test_no_label_of_the_test_slide_is_used() -> None:
    """Change them all: only the truth that estimates are compared with may change."""
    features, labels, slides = make_slides()
    other = labels.copy()
    other[-30:] = 1 - other[-30:]
    one, two = (
        leave_slides_out(features, y, slides, shots=4, draws=1)["slides"] for y in (labels, other)
    )
    last_one, last_two = one[-1], two[-1]
    assert last_one.pop("truth") + last_two.pop("truth") == pytest.approx(100)
    assert last_one == last_two


def test_estimates_against_restatements() -> None:
    features, labels, slides = make_slides(4, 24)
    ids = np.array(slides, dtype=object)
    result = leave_slides_out(features, labels, slides, shots=4, draws=1)["slides"][0]
    from sklearn.linear_model import LogisticRegression

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    support = draw_support(labels, ids, ids == "s0", ["0", "1"], shots=4, seed=0, draw=0)

    def classify(rows: Any, test: Any) -> NDArray[np.float64]:
        model = LogisticRegression(C=100, max_iter=1000).fit(unit[rows], labels[rows])
        return np.asarray(model.predict_proba(unit[test]))

    p = classify(support, ids == "s0")
    assert result["expected"] == pytest.approx(100 * p[:, 1].mean(), abs=1e-3)
    prior = np.array([0.5, 0.5])
    for _ in range(3000):
        prior = correct_prior(p, prior).mean(axis=0)
    assert result["em"] == pytest.approx(100 * prior[1], abs=0.01)
    for name, of in (("adjusted", support), ("adjusted_all", np.flatnonzero(ids != "s0"))):
        table = np.zeros((2, 2))
        for slide in ("s1", "s2", "s3"):
            kept = support[ids[support] != slide]
            if set(labels[kept]) == {0, 1}:
                rows = np.array([row for row in of if ids[row] == slide])
                calls = classify(kept, rows).argmax(axis=1) if len(rows) else []
                np.add.at(table, (labels[rows.astype(int)], calls), 1)
        called = p.argmax(axis=1)
        probability = of_true_counts(np.bincount(called, minlength=2), table)
        median = np.searchsorted(probability.cumsum(), 0.5) / len(called)
        assert result[name] == pytest.approx(100 * median, abs=101 / len(called))


def test_correction_pays_where_the_errors_are_the_same_everywhere() -> None:
    features, labels, slides = make_slides(6, 150, gap=1.5)
    result = leave_slides_out(
        features, labels, slides, shots=8, draws=3, corrections=["adjusted_all"]
    )
    plain, adjusted = result["estimates"]
    assert adjusted["error"]["value"] < 0.7 * plain["error"]["value"]
    assert adjusted["against_counted"]["ci95"][1] < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "sclerosis"}, "Did you mean 'sclerosed'"),
        ({"corrections": ["magic"]}, "Expected one of counted"),
        ({"min_objects": 31}, "found 6 slides, 0 so large"),
        ({"draws": 0}, "0 draws"),
        ({"slides": ["a"]}, "a class number and a slide each"),
        ({"shots": 500}, "ask for 45 at most"),
    ],
)
def test_leave_slides_out_refuses(change: dict[str, Any], message: str) -> None:
    features, labels, slides = make_slides()
    given_slides = change.pop("slides", slides)
    with pytest.raises(GloVLMError, match=message):
        leave_slides_out(features, labels, given_slides, class_names=NAMES, **{"draws": 1} | change)


def test_bench_rows_say_the_parts(study: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in bench_rows(study)}
    plain = study["estimates"][0]["error"]
    row = rows["counting.counted.error"]
    assert row["value"] == pytest.approx(plain["value"], abs=1e-3)
    assert (row["unit"], row["ratio"]) == ("points", 1)
    assert "12 labels" in row["what"]
    assert "6 slides left out in turn, 3 draws of 6 shots" in row["what"]
    assert rows["counting.em.reads_high"]["unit"] == "%"


def test_the_bench_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    data = tiny.tiny_images(tmp_path / "images", tiny.CLASSES[:2], 8, 4)
    rows = bench_counting(
        str(data),
        str(tiny.tiny_clip()),
        shots=2,
        draws=1,
        min_objects=4,
        group_column="patient_id",
    )
    assert [row["name"] for row in rows[:2]] == ["counting.counted.error", "counting.counted.bias"]
    assert all(0 <= row["value"] <= 100 for row in rows if row["name"].endswith("error"))
