"""Intervals over groups hold the truth as often as they state, near the bounds as well."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_glovlm
from hf_glovlm import intervals
from hf_glovlm.intervals import fraction_interval, loss_interval
from hf_glovlm.metrics import PairedRun, compute_metrics, paired_differences

COHORTS = 300


def cohort(rng, n_groups, signal, shift=0.6):
    """Two classes in groups of unequal size, whose images share shifts; scores with a signal."""
    group = np.repeat(
        np.arange(n_groups), np.maximum(1, rng.lognormal(2.3, 0.6, n_groups)).astype(int)
    )
    y = rng.integers(2, size=len(group))
    easier, darker = shift * rng.normal(size=(2, n_groups))[:, group]
    z = rng.normal(size=len(group)) + darker + (2 * y - 1) * (signal + easier)
    return y, z, [f"patient {g}" for g in group]


def probabilities(z):
    p = 1 / (1 + np.exp(-2 * z))
    return np.stack([1 - p, p], axis=1)


def truth(name, signal):
    y, z, _ = cohort(np.random.default_rng(99), 4000, signal)
    return compute_metrics(y, probabilities(z), n_resamples=0)["metrics"][name]["value"]


@pytest.mark.parametrize("n_groups", [8, 20])
@pytest.mark.parametrize("signal", [0.6, 1.8])
def test_intervals_of_few_groups_hold_the_truth(n_groups, signal):
    rng = np.random.default_rng(n_groups)
    names = ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1")
    true = {name: truth(name, signal) for name in names}
    held, width = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for _ in range(COHORTS):
        y, z, groups = cohort(rng, n_groups, signal)
        measured = compute_metrics(y, probabilities(z), groups=groups, n_resamples=200)["metrics"]
        for name in names:
            low, high = measured[name]["ci95"]
            held[name] += (low <= true[name] <= high) / COHORTS
            width[name] += (high - low) / COHORTS
    # 0.93 asked for; 300 cohorts know a coverage to 0.015
    assert min(held.values()) >= 0.92, (held, true)
    assert max(width.values()) < {8: 0.5, 20: 0.28}[n_groups], width


@pytest.mark.parametrize("n_groups", [8, 20, 50])
def test_without_an_error_a_group_counts_as_one_trial(n_groups):
    y = np.tile([0, 1], 5 * n_groups)
    groups = np.repeat(np.arange(n_groups), 10).astype(str)
    result = compute_metrics(y, np.eye(2)[y], groups=groups, n_resamples=100)
    rule_of_three = 0.025 ** (1 / n_groups)
    for name in ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1"):
        assert result["metrics"][name]["ci95"] == pytest.approx([rule_of_three, 1]), name
    assert result["per_class"]["1"]["recall"]["ci95"] == pytest.approx([rule_of_three, 1])
    wrong = compute_metrics(y, np.eye(2)[1 - y], groups=groups, n_resamples=100)
    assert wrong["metrics"]["accuracy"]["ci95"] == pytest.approx([0, 1 - rule_of_three])


def test_groups_of_one_accuracy_have_an_interval_too():
    y = np.zeros(80, int)
    p = np.tile(np.repeat([[0.9, 0.1], [0.1, 0.9]], [9, 1], axis=0), (8, 1))
    groups = np.repeat(np.arange(8), 10).astype(str)
    low, high = compute_metrics(y, p, groups=groups)["metrics"]["accuracy"]["ci95"]
    assert low < 0.7
    assert 0.95 < high < 1


def test_one_group_knows_nothing_of_others():
    y = np.tile([0, 1], 20)
    p = np.random.default_rng(0).dirichlet([1, 1], size=40)
    entry = compute_metrics(y, p, groups=["a"] * 40)["metrics"]["accuracy"]
    assert entry["ci95"] == [0, 1]
    assert entry["note"] == "too few groups"


def test_a_group_that_holds_nearly_all_images_is_nearly_the_only_one():
    rng = np.random.default_rng(0)
    y, right = rng.integers(2, size=120), rng.random(120) < 0.8
    p = np.eye(2)[np.where(right, y, 1 - y)]

    def width(groups):
        low, high = compute_metrics(y, p, groups=groups)["metrics"]["accuracy"]["ci95"]
        return high - low

    equal = [str(i % 12) for i in range(120)]
    unequal = [str(max(0, i - 108)) for i in range(120)]
    assert width(unequal) > 2 * width(equal)


def test_the_calibration_error_has_no_interval():
    rng = np.random.default_rng(0)
    y, p = rng.integers(2, size=200), rng.dirichlet([1, 1], size=200)
    result = compute_metrics(y, p, groups=[str(i % 20) for i in range(200)])
    entry = result["metrics"]["ece"]
    assert entry["ci95"] is None
    assert entry["value"] > 0
    assert "overstates" in entry["note"]
    assert "t" in result["bootstrap"]["interval"].split()


def test_the_metric_of_evaluate_has_the_same_interval(tmp_path, monkeypatch):
    module = pytest.importorskip("evaluate")
    monkeypatch.setattr(module.config, "HF_METRICS_CACHE", str(tmp_path))
    y = np.tile([0, 1], 40)
    groups = [str(i // 10) for i in range(80)]
    metric = hf_glovlm.evaluate_metric("accuracy")
    made = metric.compute(predictions=np.eye(2)[y], references=y, groups=groups, n_resamples=100)
    assert made["accuracy_ci95"] == pytest.approx([0.025 ** (1 / 8), 1])


def test_differences_between_methods_hold_the_truth_with_ten_groups():
    rng, held, cohorts = np.random.default_rng(0), 0, 100
    for _ in range(cohorts):
        y, z, groups = cohort(rng, 10, 1.0)
        of_group = 0.8 * rng.normal(size=10)[np.unique(groups, return_inverse=True)[1]]
        other = z + (2 * y - 1) * of_group
        runs = []
        for draw in range(3):
            noise = 0.3 * rng.normal(size=len(y))
            runs.append(PairedRun(draw, y, groups, probabilities(z), probabilities(other + noise)))
        row = paired_differences(runs, ["macro_auc"], n_resamples=200)["macro_auc"]
        low, high = row["ci95"]
        held += low <= DIFFERENCE <= high
    assert held / cohorts >= 0.93


def true_difference():
    rng = np.random.default_rng(1)
    y, z, groups = cohort(rng, 4000, 1.0)
    of_group = 0.8 * rng.normal(size=4000)[np.unique(groups, return_inverse=True)[1]]
    other = z + (2 * y - 1) * of_group + 0.3 * rng.normal(size=len(y))
    of = [compute_metrics(y, probabilities(s), n_resamples=0)["metrics"] for s in (z, other)]
    return of[1]["macro_auc"]["value"] - of[0]["macro_auc"]["value"]


DIFFERENCE = true_difference()


def test_the_interval_of_a_loss_is_that_of_its_likelihood_and_stays_in_range():
    values = np.random.default_rng(0).normal(0.5, 0.05, size=400)
    low, high = loss_interval(0.5, values, 9)
    ends = fraction_interval(np.exp(-0.5), np.exp(-values), 9)
    assert (np.exp(-high), np.exp(-low)) == pytest.approx(ends)
    assert high - 0.5 > 0.5 - low > 0  # skew as the loss is
    assert loss_interval(0, np.zeros(50), 8) == (0, pytest.approx(-np.log(0.025 ** (1 / 8))))
    assert loss_interval(0.5, values, 1, (0.0, 36.0)) == (0, 36)


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_wins_in_pairs_of_groups_give_the_very_areas_of_the_ranks(seed):
    from hf_glovlm.roc import compare_pairs, count_wins, rank_class, weigh_ranks

    rng = np.random.default_rng(seed)
    n, n_groups = int(rng.integers(4, 60)), int(rng.integers(2, 12))
    scores, own = rng.integers(6, size=n) / 8, rng.random(n) < 0.4
    group = rng.integers(n_groups, size=n)
    ranks = rank_class(scores, own, group)
    weights = rng.integers(4, size=(n_groups, 20)).astype(float)
    table = count_wins(ranks, n_groups)
    by_pairs = (weights * (table @ weights)).sum(0)
    assert np.array_equal(by_pairs, weigh_ranks(ranks, weights))
    labels = np.where(own, 1, 2 * rng.integers(2, size=n))  # three classes
    tables = compare_pairs(
        np.stack([1 - scores, scores, scores**2], axis=1), labels, group, n_groups
    )
    assert np.array_equal(tables[1], table)
    for c, column in ((0, 1 - scores), (2, scores**2)):
        ranks = rank_class(column, labels == c, group)
        assert np.array_equal(tables[c], count_wins(ranks, n_groups))


def test_the_bench_of_intervals_counts_what_they_hold(monkeypatch):
    from hf_glovlm.errors import GloVLMError
    from hf_glovlm.lab import interval_bench

    monkeypatch.setattr(interval_bench, "POPULATION", 300)
    seen = []
    rows = interval_bench.bench_intervals(
        cohorts=6, groups=(8,), values=(0.7, 0.9), n_resamples=40, on_row=seen.append
    )
    assert seen == rows
    for row in rows:
        assert row["coverage"] + row["too_low"] + row["too_high"] == pytest.approx(1)
        assert row["cohorts"] == 6
    by = {(row["metric"], row["value"]): row for row in rows}
    for name in ("accuracy", "balanced_accuracy", "macro_auc"):
        assert by[name, 0.9]["true"] == pytest.approx(0.9, abs=0.05)
        assert by[name, 0.7]["width"] > 0
    table = interval_bench.summarise_coverage(rows)
    of_auc = next(row for row in table if row["metric"] == "macro_auc")
    assert list(of_auc) == ["metric", "groups", "0.7", "0.8", "0.9", "least", "width"]
    assert of_auc["least"] == min(of_auc["0.7"], of_auc["0.9"])
    with pytest.raises(GloVLMError, match="two groups or more; found 6 and"):
        interval_bench.bench_intervals(cohorts=6, groups=(1,))


@pytest.mark.parametrize("groups", [1.0, 1.4, 8.0, 60.0])
def test_intervals_of_many_values_at_once_are_those_of_each(groups):
    rng = np.random.default_rng(2)
    values = np.array([0.0, 1.0, 0.5, 0.93, 0.31, 0.02])
    resampled = (values + rng.normal(0, 0.1, (50, 6))).clip(0, 1)
    resampled[:, 4] = values[4]
    low, high = intervals.fraction_band(values, resampled, groups)
    for i, value in enumerate(values):
        expected = intervals.fraction_interval(value, resampled[:, i], groups)
        assert (low[i], high[i]) == pytest.approx(expected, abs=1e-12)
