"""Metrics against scikit-learn, plain loops and invariants; the bootstrap against a slow one."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

import hf_glovlm
from hf_glovlm import metrics as m
from hf_glovlm.errors import GloVLMError
from hf_glovlm.metrics import differences, resamples
from hf_glovlm.roc import is_counting_cheaper

few_examples = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def draw_table(seed, n=None, n_classes=None, present=None, levels=4):
    """Random labels, probabilities with many exact ties, cosines and groups."""
    rng = np.random.default_rng(seed)
    n_classes = n_classes or int(rng.integers(2, 6))
    n = n or int(rng.integers(2, 50))
    y = rng.choice(n_classes if present is None else present, size=n)
    scores = rng.integers(levels, size=(n, n_classes)).astype(float)
    scores[np.arange(n), y] += rng.integers(3, size=n)
    scores[scores.sum(1) == 0] = 1
    # the same row of integers gives the same floats: ties stay ties
    p = scores / scores.sum(1, keepdims=True)
    cosines = rng.uniform(-1, 1, size=(n, n_classes))
    groups = [f"slide-{g}" for g in rng.integers(6, size=n)]
    return y, p, cosines, groups


def plain_auc(positives, negatives):
    return np.mean([(a > b) + 0.5 * (a == b) for a in positives for b in negatives])


def plain_ece(y, p):
    total = 0.0
    for b in range(15):
        rows = [i for i in range(len(y)) if b / 15 < max(p[i]) <= (b + 1) / 15]
        if rows:
            right = np.mean([np.argmax(p[i]) == y[i] for i in rows])
            total += len(rows) / len(y) * abs(right - np.mean([max(p[i]) for i in rows]))
    return total


def plain_aucs(y, p):
    present = np.unique(y)
    return [reference.roc_auc_score(y == c, p[:, c]) for c in present if len(present) > 1]


def plain_precisions(y, p):
    present = np.unique(y)
    return [reference.average_precision_score(y == c, p[:, c]) for c in present if len(present) > 1]


def grades_of(p):
    """Grades whose order is not that of the classes."""
    return np.roll(np.arange(p.shape[1]), 1)


def plain_kappa(y, p):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 where all is of one grade
        rows = (grades_of(p)[of] for of in (y, p.argmax(1)))
        return reference.cohen_kappa_score(*rows, labels=range(p.shape[1]), weights="quadratic")


def plain_balanced_accuracy(y, p):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predicted classes without labels
        return reference.balanced_accuracy_score(y, p.argmax(1))


def plain_brier(y, p):
    columns = range(p.shape[1])
    return np.mean([sum((p[i, c] - (y[i] == c)) ** 2 for c in columns) for i in range(len(y))])


def plain_alignment(y, cosines):
    return np.mean([cosines[i, y[i]] for i in range(len(y))])


def plain_gap(y, cosines):
    columns = range(cosines.shape[1])
    other = [np.mean([cosines[i, c] for c in columns if c != y[i]]) for i in range(len(y))]
    return plain_alignment(y, cosines) - np.mean(other)


# Every metric of METRICS from scikit-learn or a plain loop: labels, probabilities and cosines to a
# number, or to None where the metric is undefined.
REFERENCES = {
    "accuracy": lambda y, p, cosines: reference.accuracy_score(y, p.argmax(1)),
    "balanced_accuracy": lambda y, p, cosines: plain_balanced_accuracy(y, p),
    "macro_auc": lambda y, p, cosines: float(np.mean(plain_aucs(y, p) or [np.nan])),
    "macro_f1": lambda y, p, cosines: reference.f1_score(
        y, p.argmax(1), average="macro", labels=range(p.shape[1]), zero_division=0
    ),
    "auprc": lambda y, p, cosines: float(np.mean(plain_precisions(y, p) or [np.nan])),
    "ece": lambda y, p, cosines: plain_ece(y, p),
    "nll": lambda y, p, cosines: reference.log_loss(y, p, labels=range(p.shape[1])),
    "quadratic_kappa": lambda y, p, cosines: plain_kappa(y, p),
    "brier": lambda y, p, cosines: plain_brier(y, p),
    "boundary_margin": lambda y, p, cosines: np.mean(np.diff(np.sort(p, axis=1))[:, -1]),
    "alignment": lambda y, p, cosines: plain_alignment(y, cosines),
    "similarity_gap": lambda y, p, cosines: plain_gap(y, cosines),
}
OF_PROBABILITIES = [
    name for name, row in m.METRICS.items() if not (row.of_similarities or row.of_grades)
]
OVER_CLASSES = [name for name, row in m.METRICS.items() if row.over_classes]


def reference_of(name):
    where = "REFERENCES in tests/test_metrics.py"
    return case_of(REFERENCES, name, "METRICS", where, "a plain restatement of the metric")


def restated(y, p, cosines, names=tuple(m.METRICS)):
    """Scalar metrics as their references state them; None where one is undefined."""
    observed = {name: reference_of(name)(y, p, cosines) for name in names}
    return {name: None if np.isnan(value) else value for name, value in observed.items()}


def values(result):
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def test_every_metric_says_how_to_read_it():
    for name, row in m.METRICS.items():
        sentences = [part for part in row.reading.split(". ") if part]
        assert 2 <= len(sentences) <= 5, name
        assert row.reading.endswith("."), name


# Values -----------------------------------------------------------------------------------------


@few_examples
@given(seed=seeds)
def test_every_metric_equals_its_restatement(seed):
    y, p, cosines, _ = draw_table(seed)
    result = m.compute_metrics(y, p, similarities=cosines, grades=grades_of(p), n_resamples=0)
    assert values(result) == pytest.approx(restated(y, p, cosines), abs=1e-12)
    assert set(result["metrics"]) == set(m.METRICS)
    assert result["not_computed"] == {}
    confusion = reference.confusion_matrix(y, p.argmax(1), labels=range(p.shape[1]))
    assert result["confusion_matrix"] == confusion.tolist()


@few_examples
@given(seed=seeds)
def test_per_class_values(seed):
    y, p, _, groups = draw_table(seed)
    result = m.compute_metrics(y, p, groups=groups, n_resamples=0)
    for c, row in enumerate(result["per_class"].values()):
        is_c, said_c = y == c, p.argmax(1) == c
        assert row["n"] == is_c.sum()
        assert row["groups"] == len({g for g, inside in zip(groups, is_c, strict=True) if inside})
        expected = (
            said_c[is_c].mean() if is_c.any() else None,
            (~said_c)[~is_c].mean() if not is_c.all() else None,
            plain_auc(p[is_c, c], p[~is_c, c]) if 0 < is_c.sum() < len(y) else None,
        )
        for name, value in zip(("recall", "specificity", "auc"), expected, strict=True):
            assert row[name]["value"] == (None if value is None else pytest.approx(value))


def test_macro_auc_is_scikit_learns_multiclass_one():
    y, p, *_ = draw_table(3, n=200, n_classes=5)
    expected = reference.roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert m.compute_metrics(y, p, n_resamples=0)["metrics"]["macro_auc"]["value"] == (
        pytest.approx(expected, abs=1e-12)
    )


def test_absent_class_is_left_out_of_means_and_counts_zero_in_f1():
    y, p, *_ = draw_table(5, n=60, n_classes=4, present=[0, 1, 3])
    p = np.where(np.arange(4) == 2, 0, p + 0.1)  # class 2 is not predicted either
    p /= p.sum(1, keepdims=True)
    result = m.compute_metrics(y, p, class_names=list("abcd"), n_resamples=0)
    observed = result["metrics"]
    top = p.argmax(1)
    default = reference.f1_score(y, top, average="macro")  # over the three classes it finds
    assert observed["macro_f1"]["value"] == pytest.approx(default * 3 / 4)
    auc = np.mean([reference.roc_auc_score(y == c, p[:, c]) for c in (0, 1, 3)])
    assert observed["macro_auc"]["value"] == pytest.approx(auc)
    for name in ("macro_auc", "macro_f1", "balanced_accuracy"):
        assert observed[name]["note"] == "no image of c"
    assert observed["accuracy"]["note"] == ""
    assert result["per_class"]["c"]["recall"] == {
        "value": None,
        "ci95": None,
        "note": "undefined on these labels",
        "undefined_resamples": 0,
    }


def test_single_class_has_no_auc():
    result = m.compute_metrics([1, 1, 1], [[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], n_resamples=50)
    entry = result["metrics"]["macro_auc"]
    assert entry["value"] is None
    assert entry["ci95"] is None
    assert entry["undefined_resamples"] == 50
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_reliability_bins_give_the_ece_and_keep_the_edges_in_the_lower_bin():
    y, p, *_ = draw_table(8, n=300)
    result = m.compute_metrics(y, p, n_resamples=0)
    bins = result["reliability"]["bins"]
    filled = [b for b in bins if b["count"]]
    assert sum(b["count"] for b in bins) == len(y)
    ece = sum(b["count"] / len(y) * abs(b["accuracy"] - b["confidence"]) for b in filled)
    assert ece == pytest.approx(result["metrics"]["ece"]["value"])
    assert all(b["lower"] < b["confidence"] <= b["upper"] + 1e-12 for b in filled)
    edge = m.compute_metrics([0, 1], [[0.6, 0.4], [0.0, 1.0]], n_resamples=0)["reliability"]
    assert [i for i, b in enumerate(edge["bins"]) if b["count"]] == [8, 14]
    assert edge["bins"][0]["confidence"] is None


def test_prior_threshold_and_json():
    result = m.compute_metrics(
        [0, 0, 0, 1], [[0.5, 0.5]] * 4, class_names=["viable", "sclerosed"], n_resamples=20
    )
    assert result["prior"] == {"viable": 0.75, "sclerosed": 0.25}
    assert result["threshold"] == "argmax, uniform prior"
    assert result["confusion_matrix"] == [[3, 0], [1, 0]]  # the first class wins a tie
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# Bootstrap --------------------------------------------------------------------------------------


def slow_resamples(y, p, cosines, groups, n_resamples, seed):
    """One resample after another, its rows really repeated; None where a class vanished."""
    ids, group = np.unique(groups, return_inverse=True)
    weights = resamples.multiplicities(np.random.default_rng(seed), len(ids), n_resamples)
    rows = []
    for times in weights.T.astype(int):
        take = np.repeat(np.arange(len(y)), times[group])
        row = restated(y[take], p[take], cosines[take])
        if set(y[take]) != set(y):
            row |= dict.fromkeys(OVER_CLASSES)
        for c in range(p.shape[1]):
            own, top = y[take] == c, p[take].argmax(1)
            row["recall", c] = (top[own] == c).mean() if own.any() else None
            row["specificity", c] = (top[~own] != c).mean() if not own.all() else None
        rows.append(row)
    return rows


def plain_interval(value, resampled, shares, low, high, scale):
    """Student's t on log-odds, on those of the likelihood, or on the scale itself."""
    if scale == "likelihood":
        likelihoods = np.exp(-np.array(resampled))
        few, many = plain_interval(np.exp(-value), likelihoods, shares, 0.0, 1.0, "log-odds")
        return [-np.log(many), -np.log(few)]
    groups = 1 / sum(share**2 for share in shares)
    t = stats.t.ppf(0.975, groups - 1)
    if scale == "plain":
        error = np.std(resampled) * (groups / (groups - 1)) ** 0.5
        return [max(value - t * error, low), min(value + t * error, high)]
    v = (value - low) / (high - low)
    unbiased = np.var(resampled) / (high - low) ** 2 * groups / (groups - 1)
    if unbiased < 1e-20:
        few = stats.beta.ppf(0.025, groups * v, groups * (1 - v) + 1) if v > 0 else 0
        many = stats.beta.ppf(0.975, groups * v + 1, groups * (1 - v)) if v < 1 else 1
        return [low + (high - low) * few, low + (high - low) * many]
    most = v * (1 - v) / groups
    variance = np.average([unbiased, most], weights=[groups - 1, 0.05])
    half = t * variance**0.5 / (v * (1 - v))
    odds = np.exp(np.log(v / (1 - v)) + np.array([-half, half]))
    return (low + (high - low) * odds / (1 + odds)).tolist()


def plain_shares(group, rows):
    """Share of each group in the images that a truth value marks."""
    return np.array([(rows & (group == g)).sum() for g in np.unique(group)]) / rows.sum()


@pytest.mark.parametrize("unit_groups", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_equal_those_of_a_slow_loop(seed, unit_groups):
    y, p, cosines, groups = draw_table(seed, n=30, n_classes=3)
    y[y == 2] = 0
    y[:3] = 2  # a rare class, so that some resamples lose it
    groups = [f"{i:03}" for i in range(30)] if unit_groups else groups
    result = m.compute_metrics(
        y, p, groups=groups, similarities=cosines, grades=grades_of(p), n_resamples=60, seed=seed
    )
    slow = slow_resamples(y, p, cosines, groups, 60, seed)
    entries = dict(result["metrics"])
    for c, row in result["per_class"].items():
        entries |= {(name, int(c)): row[name] for name in ("recall", "specificity")}
    assert len(entries) == len(m.METRICS) + 2 * p.shape[1]
    _, group = np.unique(groups, return_inverse=True)
    of_class = np.array([plain_shares(group, y == c) for c in range(3)])
    for key, entry in entries.items():
        defined = [row[key] for row in slow if row[key] is not None]
        assert entry["undefined_resamples"] == (60 - len(defined)) * (key != "ece"), key
        bounds = m.METRICS[key].bounds if key in m.METRICS else (0.0, 1.0)
        shares = plain_shares(group, y >= 0)
        if key in OVER_CLASSES:
            shares = of_class.mean(0)
        elif key not in m.METRICS:
            name, c = key
            shares = of_class[c] if name == "recall" else plain_shares(group, y != c)
        scale = m.METRICS[key].scale if key in m.METRICS else "log-odds"
        expected = plain_interval(entry["value"], defined, shares, *bounds, scale)
        if key == "ece":
            expected = None
        assert entry["ci95"] == pytest.approx(expected), key
    assert result["metrics"]["macro_auc"]["undefined_resamples"] > 0 or not unit_groups


def test_images_as_groups_are_the_default_and_noted():
    y, p, *_ = draw_table(2, n=40)
    ids = [f"{i:02}" for i in range(40)]
    known = m.compute_metrics(y, p, groups=ids, n_resamples=100)
    unknown = m.compute_metrics(y, p, n_resamples=100)
    for name, entry in unknown["metrics"].items():
        assert entry["ci95"] == known["metrics"][name]["ci95"]
        if name == "ece":
            continue
        assert entry["note"].startswith("intervals over images: groups unknown")
        assert "unknown" not in known["metrics"][name]["note"]
    assert unknown["bootstrap"]["unit"] == "images"
    assert known["bootstrap"]["unit"] == "groups"


@few_examples
@given(seed=seeds)
def test_order_of_images_does_not_matter(seed):
    y, p, cosines, groups = draw_table(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    before = m.compute_metrics(y, p, groups=groups, similarities=cosines, n_resamples=40)
    after = m.compute_metrics(
        y[order],
        p[order],
        groups=[groups[i] for i in order],
        similarities=cosines[order],
        n_resamples=40,
    )
    for name, entry in before["metrics"].items():
        other = after["metrics"][name]
        assert entry["value"] == pytest.approx(other["value"])
        assert (entry["ci95"] is None) == (other["ci95"] is None)
        assert entry["ci95"] is None or entry["ci95"] == pytest.approx(other["ci95"])
        assert entry["undefined_resamples"] == other["undefined_resamples"]


@few_examples
@given(seed=seeds)
def test_the_average_precision_of_equal_scores_is_the_prevalence(seed):
    y, p, _, groups = draw_table(seed, n_classes=3)
    result = m.compute_metrics(y, np.full_like(p, 1 / 3), groups=groups, n_resamples=0)
    for name, row in result["per_class"].items():
        defined = 0 < row["n"] < len(y)
        expected = pytest.approx(result["prior"][name]) if defined else None
        assert row["auprc"]["value"] == expected


def test_of_grades_the_order_counts_and_two_steps_count_four_times():
    p = np.eye(4)
    near, far = [1, 1, 2, 3], [2, 1, 2, 3]  # label of the first image, which is named 0

    def kappa(labels, grades):
        result = m.compute_metrics(labels, p, grades=grades, n_resamples=0)
        return result["metrics"]["quadratic_kappa"]["value"]

    for labels in (near, far):
        assert kappa(labels, [0, 1, 2, 3]) == kappa(labels, [1, 30, 31, 900])
        expected = reference.cohen_kappa_score(labels, range(4), weights="quadratic")
        assert kappa(labels, [3, 2, 1, 0]) == pytest.approx(expected)
    assert kappa([0, 1, 2, 3], [0, 1, 2, 3]) == 1
    one = m.compute_metrics([1, 1], [[0, 1], [0, 1]], grades=[0, 1], n_resamples=9)
    assert one["metrics"]["quadratic_kappa"]["value"] is None


def test_without_grades_and_cosines_the_results_state_what_is_not_computed():
    y, p, *_ = draw_table(1)
    result = m.compute_metrics(y, p, n_resamples=0)
    assert set(result["metrics"]) | set(result["not_computed"]) == set(m.METRICS)
    assert "order of the classes" in result["not_computed"]["quadratic_kappa"]
    for grades in ([0], [0] * p.shape[1]):
        with pytest.raises(GloVLMError, match="different grades, one for each class"):
            m.compute_metrics(y, p, grades=grades)
    runs = [m.PairedRun(0, y, ["a"] * len(y), p, p)]
    with pytest.raises(GloVLMError, match="one of grades"):
        m.paired_differences(runs, ["quadratic_kappa"])


def test_a_label_of_probability_zero_is_finite_and_noted():
    result = m.compute_metrics([0, 1, 1], [[1, 0], [1, 0], [0.5, 0.5]], n_resamples=20)
    entry = result["metrics"]["nll"]
    assert entry["value"] == pytest.approx((-np.log(2.0**-52) + np.log(2)) / 3)
    assert "1 of the labels had a probability below 2.2e-16" in entry["note"]
    assert entry["ci95"][1] <= m.METRICS["nll"].bounds[1]


@few_examples
@given(seed=seeds)
def test_a_weight_is_a_number_of_copies(seed):
    y, p, cosines, groups = draw_table(seed)
    ids, group = np.unique(groups, return_inverse=True)
    times = np.random.default_rng(seed).integers(1, 4, size=len(ids))
    functions = {name: row.function for name, row in m.METRICS.items()}
    sample = m.Sample(y, p, group, len(ids), cosines, grades=grades_of(p))
    weighted = resamples.statistics(functions, sample, times[:, None].astype(float))
    copies = np.repeat(np.arange(len(y)), times[group])
    copied = y[copies], p[copies], group[copies], len(ids), cosines[copies]
    repeated = m.Sample(*copied, grades=grades_of(p))
    for name, value in resamples.statistics(functions, repeated, np.ones((len(ids), 1))).items():
        np.testing.assert_allclose(weighted[name], value, atol=1e-12, err_msg=name)


@few_examples
@given(seed=seeds)
def test_intervals_are_ordered_and_in_range(seed):
    y, p, cosines, groups = draw_table(seed)
    result = m.compute_metrics(
        y, p, groups=groups, similarities=cosines, grades=grades_of(p), n_resamples=60
    )
    for name, entry in result["metrics"].items():
        if entry["ci95"] is None:
            assert entry["value"] is None or entry["undefined_resamples"] == 60 or name == "ece"
            continue
        low, high = entry["ci95"]
        floor, ceiling = m.METRICS[name].bounds
        assert floor - 1e-9 <= low <= high <= ceiling + 1e-9
        assert low - 1e-9 <= entry["value"] <= high + 1e-9


def test_interval_of_a_mean_covers_as_often_as_it_says():
    """40 slides of 1 to 9 images that agree within a slide: only groups cover the truth."""
    rng = np.random.default_rng(0)
    covered = {"groups": 0, "images": 0}
    for _ in range(200):
        sizes = rng.integers(1, 10, size=40)
        group = np.repeat(np.arange(40), sizes)
        right = (rng.random(40) < 0.7)[group]
        p = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        for unit, ids in (("groups", [str(g) for g in group]), ("images", None)):
            result = m.compute_metrics(np.zeros(len(p), int), p, groups=ids, n_resamples=200)
            low, high = result["metrics"]["accuracy"]["ci95"]
            covered[unit] += low <= 0.7 <= high
    assert 0.88 <= covered["groups"] / 200 <= 0.98
    assert covered["images"] / 200 < 0.75


def test_seed_decides_and_chunks_do_not(monkeypatch):
    y, p, _, groups = draw_table(4, n=45)
    first = m.compute_metrics(y, p, groups=groups, n_resamples=90, seed=1)
    assert first == m.compute_metrics(y, p, groups=groups, n_resamples=90, seed=1)
    assert first != m.compute_metrics(y, p, groups=groups, n_resamples=90, seed=2)
    monkeypatch.setattr(resamples, "_CHUNK", 45 * 7)
    chunked = m.compute_metrics(y, p, groups=groups, n_resamples=90, seed=1)
    for name, entry in first["metrics"].items():
        assert entry["ci95"] == pytest.approx(chunked["metrics"][name]["ci95"])


@pytest.mark.parametrize(
    ("n_groups", "holding", "note"),
    [(10, 5, ""), (9, 5, "too few groups"), (10, 4, "too few groups")],
)
def test_too_few_groups_are_noted_and_the_interval_kept(n_groups, holding, note):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(n_groups), 6)
    y = ((group < holding) & (np.arange(len(group)) % 2 == 0)).astype(int)
    p = rng.dirichlet([1, 1], size=len(y))
    result = m.compute_metrics(y, p, groups=[str(g) for g in group], n_resamples=200)
    for name in ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1", "brier"):
        assert result["metrics"][name]["note"] == note
        assert result["metrics"][name]["ci95"] is not None
    assert result["per_class"]["1"]["recall"]["note"] == note
    assert {row["auc"]["note"] for row in result["per_class"].values()} == {note}
    assert result["per_class"]["0"]["recall"]["note"] == ("" if n_groups == 10 else note)


def test_resamples_that_lose_a_class_are_counted():
    """One of 12 groups holds class 1: it is missing from (11/12)^12 of the resamples."""
    group = np.repeat(np.arange(12), 4)
    y = (group == 0).astype(int)
    p = np.random.default_rng(0).dirichlet([1, 1], size=len(y))
    result = m.compute_metrics(y, p, groups=[str(g) for g in group], n_resamples=2000)
    weights = resamples.multiplicities(np.random.default_rng(0), 12, 2000)
    lost = int((weights[0] == 0).sum())  # "0" sorts first
    assert lost / 2000 == pytest.approx((11 / 12) ** 12, abs=0.04)
    observed = result["metrics"]
    for name in ("balanced_accuracy", "macro_auc", "macro_f1"):
        assert observed[name]["undefined_resamples"] == lost
    assert observed["accuracy"]["undefined_resamples"] == 0
    assert result["per_class"]["1"]["recall"]["undefined_resamples"] == lost
    assert result["per_class"]["0"]["recall"]["undefined_resamples"] == 0
    assert result["per_class"]["1"]["specificity"]["undefined_resamples"] == 0


# Paired differences -----------------------------------------------------------------------------


def draw_runs(seed, n_runs=4, n_groups=12, gain=0.0):
    """Draws whose test sides are halves of the groups; b knows the class `gain` better than a."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), 5)
    y = rng.integers(3, size=len(group))
    y[group == 0] = 2
    y[(group > 2) & (y == 2)] = 0  # class 2 lies in three groups: some cells are undefined
    runs = []
    for draw in range(n_runs):
        side = rng.choice(n_groups, size=n_groups // 2, replace=False)
        rows = np.flatnonzero(np.isin(group, side))
        scores = rng.normal(size=(2, len(rows), 3))
        scores[:, np.arange(len(rows)), y[rows]] += 1
        scores[1, np.arange(len(rows)), y[rows]] += gain
        a, b = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        runs.append(m.PairedRun(draw, y[rows], [f"s{g:02}" for g in group[rows]], a, b))
    return runs


def test_methods_compared_at_once_are_as_each_by_itself(monkeypatch):
    runs = draw_runs(0, 5)
    other = [
        m.PairedRun(r.draw, r.labels, r.groups, r.probabilities_a, np.roll(r.probabilities_b, 1, 1))
        for r in runs
    ]
    methods = {"c": other, "b": runs, "fewer draws": other[1:], "other a": draw_runs(1, 5)}
    names = ("macro_auc", "balanced_accuracy", "brier")
    expected = {name: m.paired_differences(own, names, 60, 3) for name, own in methods.items()}
    samples = []
    real = differences.Sample
    monkeypatch.setattr(differences, "Sample", lambda *parts: samples.append(parts) or real(*parts))
    together = m.compare_methods(methods, names, 60, 3)
    assert together == expected
    assert list(together) == list(methods)
    assert len(samples) == 3 * 5 + 2 * 4 + 2 * 5  # "c" and "b" share the five of a


@pytest.mark.parametrize("seed", [0, 1])
def test_paired_differences_equal_a_double_loop(seed):
    runs = draw_runs(seed)
    names = ("macro_auc", "balanced_accuracy", "brier")
    result = m.paired_differences(runs, names, n_resamples=25, seed=seed)
    union = sorted({g for run in runs for g in run.groups})
    rng = np.random.default_rng(seed)
    drawn = resamples.multiplicities(rng, len(runs), 25).astype(int)
    weights = resamples.multiplicities(rng, len(union), 25).astype(int)
    means = {name: [] for name in names}
    left_out = dict.fromkeys(names, 0)
    for r in range(25):
        differences = {name: [] for name in names}
        for run in np.repeat(np.array(runs, dtype=object), drawn[:, r]):
            times = [weights[union.index(g), r] for g in run.groups]
            take = np.repeat(np.arange(len(times)), times)
            pair = (run.probabilities_a[take], run.probabilities_b[take])
            y = run.labels[take]
            of_a, of_b = (restated(y, p, p, names) if len(y) else {} for p in pair)
            for name in names:
                lost = not of_a or (name != "brier" and set(y) != set(run.labels))
                left_out[name] += lost
                differences[name] += [] if lost else [of_b[name] - of_a[name]]
        for name in names:
            means[name].append(np.mean(differences[name]) if differences[name] else np.nan)
    for name in names:
        row = result[name]
        assert row["undefined_runs"] == left_out[name]
        assert row["undefined_resamples"] == np.isnan(means[name]).sum()
        shares = np.zeros(len(union))
        for run in runs:
            group = np.array([union.index(g) for g in run.groups])
            classes = [run.labels >= 0] if name == "brier" else [run.labels == c for c in range(3)]
            held = [np.bincount(group[rows], minlength=len(union)) for rows in classes]
            shares += np.mean([h / h.sum() for h in held if h.sum()], axis=0) / len(runs)
        most = 2 if name == "brier" else 1
        defined = [mean for mean in means[name] if not np.isnan(mean)]
        expected = plain_interval(row["value"], defined, shares, -most, most, "plain")
        assert row["ci95"] == pytest.approx(expected)
        assert (row["n_groups"], row["n_draws"]) == (len(union), 4)
    assert left_out["macro_auc"] > left_out["brier"]


def test_identical_methods_do_not_differ():
    runs = [
        m.PairedRun(r.draw, r.labels, r.groups, r.probabilities_a, r.probabilities_a)
        for r in draw_runs(0)
    ]
    for row in m.paired_differences(runs, n_resamples=50, unit="slides").values():
        assert row["value"] == 0
        assert row["ci95"] == [0, 0]
        assert row["verdict"] == "not distinguishable with 12 slides"


def test_verdicts_follow_the_interval_and_the_direction_of_the_metric():
    runs = draw_runs(0, n_runs=6, gain=4.0)
    swapped = [
        m.PairedRun(r.draw, r.labels, r.groups, r.probabilities_b, r.probabilities_a) for r in runs
    ]
    names = ("macro_auc", "balanced_accuracy", "brier")
    forward = m.paired_differences(runs, names, n_resamples=200)
    backward = m.paired_differences(swapped, names, n_resamples=200)
    assert forward["macro_auc"]["value"] > 0 > forward["brier"]["value"]
    for name in names:
        assert forward[name]["verdict"] == "better"
        assert backward[name]["verdict"] == "worse"
        assert backward[name]["value"] == pytest.approx(-forward[name]["value"])
        assert backward[name]["ci95"] == pytest.approx([-x for x in forward[name]["ci95"][::-1]])
        assert forward[name]["note"] == "too few groups"  # three groups hold class 2


def test_draws_without_a_defined_difference_are_named():
    y, p = [0, 0], [[0.5, 0.5], [0.9, 0.1]]
    one_class = m.PairedRun(0, y, ["a", "b"], p, p)
    both = m.PairedRun(1, [0, 1], ["a", "b"], [[0.4, 0.6], [0.6, 0.4]], [[0.6, 0.4], [0.4, 0.6]])
    row = m.paired_differences([one_class, both], n_resamples=300)["macro_auc"]
    assert row["value"] == 1
    assert row["note"] == "undefined in 1 of 2 draws; too few groups"
    assert row["undefined_runs"] > 300
    only = m.paired_differences([one_class], n_resamples=30)["macro_auc"]
    assert (only["value"], only["ci95"], only["undefined_resamples"]) == (None, None, 30)
    assert only["verdict"] == "not distinguishable with 2 groups"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["macro_acu"]}, "Did you mean 'macro_auc'"),
        ({"metrics": ["alignment"]}, "only describes"),
        ({"metrics": ["ece"]}, "has none: its bootstrap is biased"),
        ({"runs": []}, "found 0 runs"),
        ({"n_resamples": 0}, "0 resamples"),
        ({"runs": draw_runs(0, 1) * 2}, "a draw twice"),
        (
            {"runs": [m.PairedRun(0, [0, 1], ["a", "b"], np.eye(2), np.eye(3)[:2])]},
            "the same classes",
        ),
        ({"runs": [m.PairedRun(0, [0, 1], ["a"], np.eye(2), np.eye(2))]}, "2 groups"),
    ],
)
def test_paired_differences_refuse(change, message):
    with pytest.raises(GloVLMError, match=message):
        m.paired_differences(**({"runs": draw_runs(0, 2)} | change))


# Tables and input -------------------------------------------------------------------------------


def test_recall_by_group_lists_only_what_a_group_holds():
    rows = m.recall_by_group([0, 0, 1, 1], [0, 1, 1, 1], ["b", "b", "b", "a"], ["viable", "scl"])
    assert rows == [
        {"group": "a", "class": "scl", "n": 1, "correct": 1, "recall": 1.0},
        {"group": "b", "class": "viable", "n": 2, "correct": 1, "recall": 0.5},
        {"group": "b", "class": "scl", "n": 1, "correct": 1, "recall": 1.0},
    ]


@few_examples
@given(seed=seeds)
def test_recall_by_group_adds_up_to_the_confusion_matrix(seed):
    y, p, _, groups = draw_table(seed)
    names = [str(c) for c in range(p.shape[1])]
    rows = m.recall_by_group(y, p.argmax(1), groups, names)
    confusion = m.compute_metrics(y, p, n_resamples=0)["confusion_matrix"]
    for c, name in enumerate(names):
        assert sum(r["n"] for r in rows if r["class"] == name) == sum(confusion[c])
        assert sum(r["correct"] for r in rows if r["class"] == name) == confusion[c][c]


def test_spread_over_draws():
    spread = m.summarise_draws([0.7, 0.8, None, 0.9])
    assert spread["mean"] == pytest.approx(0.8)
    assert spread["sd"] == pytest.approx(0.1)
    assert spread["n_draws"] == 3
    assert spread["note"].endswith("not an interval over groups; undefined in 1 of 4 draws")
    assert m.summarise_draws([0.5])["sd"] is None
    assert m.summarise_draws([None])["mean"] is None
    with pytest.raises(GloVLMError, match="found none"):
        m.summarise_draws([])


GOOD = {"labels": [0, 1], "probabilities": [[0.7, 0.3], [0.2, 0.8]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": [[0.7, np.nan], [0.2, 0.8]]}, "found nan in row 0"),
        ({"probabilities": [[0.7, 0.3], [np.inf, 0.8]]}, "found inf in row 1"),
        ({"probabilities": [[1.2, -0.2], [0.2, 0.8]]}, "found 1.2 in row 0: apply softmax"),
        ({"probabilities": [[0.7, 0.3], [0.2, 0.799]]}, "found 0.999 in row 1"),
        ({"probabilities": [0.7, 0.3]}, r"shape \[n, K\]"),
        ({"probabilities": [[1.0], [1.0]]}, "K >= 2"),
        ({"probabilities": np.empty((0, 2)), "labels": []}, "n >= 1"),
        ({"probabilities": [["a", "b"], ["c", "d"]]}, "something else"),
        ({"probabilities": [[0.7, 0.3], [1.0]]}, "something else"),
        ({"labels": [0, 2]}, "0 ... 1, found 0 ... 2"),
        ({"labels": [0, -1]}, "found -1 ... 0"),
        ({"labels": [0]}, "found 1 labels, 2 rows"),
        ({"labels": [0.0, 1.0]}, "float64"),
        ({"labels": ["viable", "sclerosed"]}, "map class names"),
        ({"labels": [[0], [0, 1]]}, "ragged"),
        ({"groups": ["a"]}, "Expected 2 groups, one per image, found 1"),
        ({"groups": ["a", None]}, "none in row 1"),
        ({"groups": ["", "a"]}, "none in row 0"),
        ({"groups": [float("nan"), "a"]}, "none in row 0"),
        ({"class_names": ["a"]}, "2 different class names"),
        ({"class_names": ["a", "a"]}, "2 different class names"),
        ({"similarities": [[0.1, 0.2]]}, "one per probability"),
        ({"similarities": [[12.0, 3.0], [0.0, 0.0]]}, "found 12 in row 0: give cosines"),
        ({"n_resamples": -1}, "found -1"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    with pytest.raises(GloVLMError, match=message) as error:
        m.compute_metrics(**(GOOD | change))
    assert "\n" not in str(error.value)


def test_probabilities_of_a_float32_softmax_pass():
    logits = np.random.default_rng(0).normal(scale=8, size=(50, 7)).astype(np.float32)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert p.dtype == np.float32
    result = m.compute_metrics(np.arange(50) % 7, p, n_resamples=0)
    assert 0 <= result["metrics"]["macro_auc"]["value"] <= 1


@pytest.mark.parametrize("bad", [{"labels": [0, 5]}, {"predictions": [0]}, {"groups": ["a"]}])
def test_recall_by_group_refuses(bad):
    good = {
        "labels": [0, 1],
        "predictions": [0, 1],
        "groups": ["a", "b"],
        "class_names": ["x", "y"],
    }
    with pytest.raises(GloVLMError, match="Expected"):
        m.recall_by_group(**(good | bad))


# evaluate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    # evaluate reads its cache folder once, at import, and creates it when a metric is made
    module = pytest.importorskip("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setattr(module.config, "HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
    yield module
    patch.undo()


@pytest.mark.parametrize("name", m.METRICS)
def test_evaluate_metric_gives_the_same_number(evaluate, name):
    y, p, cosines, groups = draw_table(1, n=40, n_classes=3)
    metric = m.evaluate_metric(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    result = m.compute_metrics(
        y, p, groups=groups, similarities=cosines, grades=range(3), n_resamples=50
    )
    expected = result["metrics"][name]
    predictions = cosines if m.METRICS[name].of_similarities else p
    observed = metric.compute(predictions=predictions, references=y)
    assert observed == {name: pytest.approx(expected["value"])}
    for rows in np.array_split(np.arange(40), 3):
        metric.add_batch(predictions=predictions[rows], references=y[rows])
    observed = metric.compute(groups=groups, n_resamples=50)
    assert observed[name] == pytest.approx(expected["value"])
    assert observed[f"{name}_ci95"] == pytest.approx(expected["ci95"])
    assert observed[f"{name}_note"] == expected["note"]
    assert observed[f"{name}_undefined_resamples"] == expected["undefined_resamples"]


def test_evaluate_metrics_combine(evaluate):
    y, p, *_ = draw_table(1, n=40, n_classes=3)
    both = evaluate.combine([m.evaluate_metric("accuracy"), m.evaluate_metric("macro_auc")])
    observed = both.compute(predictions=p, references=y)
    single = m.compute_metrics(y, p, n_resamples=0)["metrics"]
    assert observed == {k: pytest.approx(single[k]["value"]) for k in ("accuracy", "macro_auc")}


def test_unknown_evaluate_metric_names_the_nearest():
    with pytest.raises(GloVLMError, match="Did you mean 'macro_auc'"):
        m.evaluate_metric("macroauc")


def test_evaluate_metrics_need_no_network_and_write_no_predictions(evaluate, monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric went to the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    metric = m.evaluate_metric("accuracy")
    metric.add_batch(predictions=[[0.2, 0.8], [0.6, 0.4]], references=[1, 1])
    written = Path(evaluate.config.HF_METRICS_CACHE).rglob("*.arrow")
    assert list(written) == []
    assert metric.compute() == {"accuracy": 0.5}


def test_importing_metrics_is_light():
    """The warm `linear_probe` path imports this module: it may not pay for what it does not use."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('hf_glovlm')\n"  # in place of the package's own imports
        f"package.__path__ = [{str(Path(hf_glovlm.__file__).parent)!r}]\n"
        "sys.modules['hf_glovlm'] = package\n"
        "import hf_glovlm.metrics\n"
        "print(sorted({'torch', 'datasets', 'evaluate', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------- ways to the same numbers


def test_counted_wins_ranks_and_weights_drawn_anew_give_the_very_intervals(monkeypatch):
    y, p, cosines, groups = draw_table(3, n=60, n_classes=3)
    runs = [
        m.PairedRun(i, y[i::2], groups[i::2], p[i::2], np.roll(p[i::2], 1, axis=1))
        for i in range(2)
    ]
    names = [name for name in OF_PROBABILITIES if m.METRICS[name].higher_is_better is not None]
    names.remove("ece")
    ways = []
    for counted, kept, few in ((True, 8_000_000, 300), (True, 8_000_000, 0), (False, 0, 0)):
        monkeypatch.setattr(resamples, "is_counting_cheaper", lambda *sizes, way=counted: way)
        monkeypatch.setattr(differences, "_KEPT", kept)
        monkeypatch.setattr(resamples, "FEW_IMAGES", few)
        whole = m.compute_metrics(y, p, groups=groups, similarities=cosines, n_resamples=200)
        ways.append((whole, m.paired_differences(runs, names, n_resamples=200)))
    assert ways[0] == ways[1] == ways[2]


@pytest.mark.parametrize(
    ("sizes", "cheaper"),
    [
        ((1000, 50, 5, 2000), True),
        ((10_000, 50, 5, 2000), True),
        ((1000, 1000, 5, 2000), False),  # every image is a group
        ((1000, 50, 5, 1), False),  # nothing to weigh again
        ((10_000, 400, 20, 2000), False),  # tables of 26 MB
    ],
)
def test_wins_are_counted_where_operations_and_memory_allow(sizes, cheaper):
    assert is_counting_cheaper(*sizes) == cheaper
