"""Posterior of class fractions: held against sums over a grid, importance sampling and limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, gammaln
from scipy.stats import beta
from thinned import simulate_recall

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.prevalence_bench import simulate_cell
from hf_glovlm.settings import read_yaml
from hf_glovlm.slides.prevalence import (
    CONTRADICTION,
    LIMIT,
    MARGIN,
    TAIL,
    check_recall,
    confusion_counts,
    corrected_percentages,
    estimate_fractions,
    informative_calls,
    unexplained_calls,
)

Floats = NDArray[np.float64]


def quantile(values: Floats, weights: Floats, level: float) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(weights[order].cumsum(), level * weights.sum())])


def of_true_counts(calls: ArrayLike, table: ArrayLike) -> Floats:
    """Probability that 0, 1, ... n objects are of class 1: every way to label the calls, summed."""
    n, seen = np.asarray(calls), np.asarray(table) + 0.5
    missed, hit = np.meshgrid(np.arange(n[0] + 1), np.arange(n[1] + 1), indexing="ij")
    positive = missed + hit
    log_weight = betaln(positive + 0.5, n.sum() - positive + 0.5)
    for part, whole in ((missed, n[0]), (hit, n[1])):
        log_weight += gammaln(whole + 1) - gammaln(part + 1) - gammaln(whole - part + 1)
    log_weight += betaln(seen[0, 0] + n[0] - missed, seen[0, 1] + n[1] - hit)
    log_weight += betaln(seen[1, 0] + missed, seen[1, 1] + hit)
    weight = np.exp(log_weight - log_weight.max())
    return np.bincount(positive.ravel(), weight.ravel()) / weight.sum()


def by_grid(calls: list[int], table: list[list[int]]) -> tuple[float, float, float]:
    """Share and bounds of class 1: the joint density of prevalence and rates, summed on a grid.

    On the scale of arcsin(sqrt(.)) Jeffreys' prior is uniform, so equal steps hold equal mass.
    """
    p, steps = (np.sin((np.arange(n) + 0.5) / n * np.pi / 2) ** 2 for n in (240, 50))
    p, false_calls, hits = p[:, None, None], steps[None, :, None], steps[None, None, :]
    positive = p * hits + (1 - p) * false_calls  # the probability of a call of class 1
    log_density = calls[0] * np.log1p(-positive) + calls[1] * np.log(positive)
    for rate, (no, yes) in ((false_calls, table[0]), (hits, table[1])):
        log_density = log_density + no * np.log1p(-rate) + yes * np.log(rate)
    of_p = np.exp(log_density - log_density.max()).sum(axis=(1, 2))
    of_count = of_true_counts(calls, table)
    low = 0.0 if of_count[0] > TAIL else quantile(p.ravel(), of_p, TAIL)
    high = 1.0 if of_count[-1] > TAIL else quantile(p.ravel(), of_p, 1 - TAIL)
    return float(np.searchsorted(of_count.cumsum(), 0.5) / sum(calls)), low, high


@pytest.mark.parametrize(
    ("calls", "table"),
    [
        ([30, 10], [[13, 3], [3, 13]]),
        ([3, 7], [[190, 10], [10, 190]]),
        ([10, 0], [[16, 0], [0, 16]]),
        ([0, 40], [[12, 4], [1, 3]]),
        ([18, 1], [[79, 47], [206, 264]]),
        ([5, 15], [[3, 1], [0, 2]]),
        ([1500, 500], [[14, 2], [3, 13]]),  # the rates weigh more than the counts: a ridge
        ([300, 300], [[2, 0], [0, 2]]),
    ],
)
def test_two_classes_are_the_sums_over_a_grid(calls: list[int], table: list[list[int]]) -> None:
    share, low, high = by_grid(calls, table)
    measured = [estimate_fractions(calls, table, seed=seed) for seed in range(3)]
    for value, expected in (
        (np.mean([each.share[1] for each in measured]), share),
        (np.mean([each.low[1] for each in measured]), low),
        (np.mean([each.high[1] for each in measured]), high),
    ):
        assert value == pytest.approx(expected, abs=0.04 * max(high - low, 0.1) + 0.02)
    assert np.isclose(measured[0].low + measured[0].high[::-1], 1, atol=0.02).all()


def test_three_classes_are_what_importance_sampling_finds() -> None:
    calls, table = np.array([7, 3, 2]), np.array([[12, 3, 1], [2, 9, 5], [1, 4, 11]])
    rng = np.random.default_rng(1)
    p = rng.dirichlet([0.5] * 3, size=60_000)
    rates = np.stack([rng.dirichlet(row + 0.5, size=len(p)) for row in table], axis=1)
    expected_calls = np.einsum("nk,nkc->nc", p, rates)
    weights = np.exp((calls * np.log(expected_calls)).sum(axis=1))
    assert weights.sum() ** 2 / (weights**2).sum() > 2000  # the effective number of draws
    true = p[:, :, None] * rates / expected_calls[:, None]
    measured = estimate_fractions(calls, table)
    for k in range(3):
        count = rng.binomial(calls, np.minimum(true[:, k], 1)).sum(axis=1)
        share = quantile(count / calls.sum(), weights, 0.5)
        assert measured.share[k] == pytest.approx(share, abs=0.09)  # one object of 12
        none = np.average(((1 - true[:, k]) ** calls).prod(axis=1), weights=weights)
        low = 0.0 if none > TAIL else quantile(p[:, k], weights, TAIL)
        assert measured.low[k] == pytest.approx(low, abs=0.03)
        assert measured.high[k] == pytest.approx(quantile(p[:, k], weights, 1 - TAIL), abs=0.04)


@pytest.mark.parametrize("counts", [[9, 3], [0, 20, 5], [4, 0, 3, 1, 0, 9, 2, 2, 1, 4]])
def test_without_errors_only_counting_is_left(counts: list[int]) -> None:
    n, k = sum(counts), len(counts)
    measured = estimate_fractions(counts, 10**7 * np.eye(k, dtype=int))
    assert measured.share == pytest.approx(np.array(counts) / n, abs=1e-3)
    for i, count in enumerate(counts):
        a, b = count + 0.5, n - count + 0.5 * (k - 1)
        low = beta.ppf(TAIL, a, b) if count else 0.0
        assert measured.low[i] == pytest.approx(low, abs=0.02)
        assert measured.high[i] == pytest.approx(beta.ppf(1 - TAIL, a, b), abs=0.03)


def test_calls_that_do_not_depend_on_the_class_leave_everything_possible() -> None:
    same = [[10**6, 10**6]] * 2
    measured = estimate_fractions([[8, 2], [5, 5]], [same, same])
    assert measured.share == pytest.approx(np.full((2, 2), 0.5), abs=0.4)
    assert (measured.low == 0).all()
    assert (measured.high == 1).all()
    missing = estimate_fractions([8, 2], [[0, 0], [0, 0]])
    assert missing.low == pytest.approx([0, 0])
    assert missing.high == pytest.approx([1, 1])


def test_slides_together_are_each_alone() -> None:
    calls = np.array([[12, 8], [0, 30], [25, 5]])
    tables = np.array([[[40, 10], [5, 45]], [[9, 3], [2, 10]], [[90, 10], [30, 70]]])
    together = estimate_fractions(calls, tables)
    for i in range(3):
        alone = estimate_fractions(calls[i], tables[i], seed=1)
        for name in ("share", "low", "high"):
            assert getattr(together, name)[i] == pytest.approx(getattr(alone, name), abs=0.05)
    assert together.share.sum(axis=1) == pytest.approx(np.ones(3))  # two classes: complements
    assert (together.low <= together.share).all()
    assert (together.share <= together.high).all()


def test_intervals_shrink_to_the_truth_with_many_labels_and_objects() -> None:
    percent, bounds = corrected_percentages([60_000, 40_000], [[80_000, 20_000], [10_000, 90_000]])
    assert percent[1] == pytest.approx(100 * (0.4 - 0.2) / 0.7, abs=0.5)
    assert np.ptp(bounds, axis=1) == pytest.approx([0, 0], abs=3)
    assert corrected_percentages([7, 5], [[8, 2], [1, 9]]) == corrected_percentages(
        [7, 5], [[8, 2], [1, 9]]
    )


def test_a_call_is_informative_where_it_is_clearly_likelier_from_its_own_class() -> None:
    rng = np.random.default_rng(0)
    table = [[12, 8], [6, 14]]
    youden = rng.beta(12.5, 8.5, 50_000) + rng.beta(14.5, 6.5, 50_000) - 1
    probability = informative_calls(table)
    assert probability == pytest.approx(np.full(2, (youden > MARGIN).mean()), abs=0.03)
    assert (informative_calls([[79, 47], [206, 264]]) < LIMIT).all()
    assert (informative_calls([[160, 40], [40, 160]]) > 0.99).all()
    assert (informative_calls([[40, 160], [160, 40]]) < 0.01).all()
    three = informative_calls([[95, 3, 2], [4, 48, 48], [4, 49, 47]])
    assert (three >= LIMIT).tolist() == [True, False, False]


def test_calls_that_no_mixture_explains_are_improbable() -> None:
    """Against simulated numbers of calls, all objects of the class that is called so most often."""
    rng = np.random.default_rng(3)
    table = np.array([[15, 5, 4], [3, 30, 7], [6, 2, 12]])
    rates = np.stack([rng.dirichlet(row + 0.5, size=100_000) for row in table], axis=1)
    many, least = rates[:, :, 0].max(axis=1), rates[:, :, 1].min(axis=1)
    probability = unexplained_calls([18, 0, 2], table)
    assert probability[0] == pytest.approx((rng.binomial(20, many) >= 18).mean(), abs=0.02)
    assert probability[1] == pytest.approx((rng.binomial(20, least) == 0).mean(), abs=0.03)
    assert (unexplained_calls([8, 7, 5], table) > 0.2).all()
    assert (unexplained_calls([40, 0], [[140, 60], [40, 160]]) < CONTRADICTION).all()


@pytest.mark.parametrize("calls", [[0, 0], [-1, 3], [0.5, 0.5], [[1, 2]]])
def test_what_is_no_count_is_refused(calls: Any) -> None:
    with pytest.raises(GloVLMError, match="number of calls of each class"):
        corrected_percentages(calls, [[5, 1], [1, 5]])


def test_the_confusion_matrix_has_labels_as_rows() -> None:
    assert confusion_counts([0, 0, 1], [0, 1, 1], 2).tolist() == [[1, 1], [0, 1]]


# ---------------------------------------------------------------------------------------- recall


@pytest.mark.parametrize(
    ("counts", "found", "of"),
    [([16, 4], [18, 6], [20, 10]), ([12, 0], [9, 5], [10, 10]), ([0, 7], [0, 14], [0, 16])],
    ids=str,
)
def test_missed_objects_are_those_of_a_forward_simulation(
    counts: list[int], found: list[int], of: list[int]
) -> None:
    """Poisson numbers of found and missed ones, kept where as many are found as were counted."""
    rng = np.random.default_rng(5)
    recall = np.maximum(rng.beta(*(np.array([found, np.subtract(of, found)]) + 0.5)[:, :, None],
                                 size=(2, 400_000)), 1e-6)  # fmt: skip
    mean = 25 * rng.beta(0.5, 1, size=recall.shape)  # of found ones: density ~ 1 / sqrt, below 25
    kept = (rng.poisson(mean) == np.array(counts)[:, None]).nonzero()
    chosen = [kept[1][kept[0] == k][:4000] for k in range(2)]
    n = min(map(len, chosen))
    rates, means = (np.stack([v[k, chosen[k][:n]] for k in range(2)]) for v in (recall, mean))
    whole = means / rates
    everyone = np.array(counts)[:, None] + rng.poisson(whole * (1 - rates))
    fraction, one = whole[1] / whole.sum(axis=0), np.ones(n)
    measured = estimate_fractions(counts, None, recall=(found, of))
    share = np.median(everyone[1] / everyone.sum(axis=0))
    assert measured.share[1] == pytest.approx(share, abs=0.02)
    low = 0.0 if (everyone[1] == 0).mean() > TAIL else quantile(fraction, one, TAIL)
    high = 1.0 if (everyone[0] == 0).mean() > TAIL else quantile(fraction, one, 1 - TAIL)
    assert (measured.low[1], measured.high[1]) == pytest.approx((low, high), abs=0.04)


def test_simulated_biopsies_of_which_the_finder_misses_some_are_covered() -> None:
    with_recall, without = simulate_recall(n=30, share=0.2, recall=(0.95, 0.6), draws=60, seed=0)
    assert with_recall["coverage"] >= 0.9
    assert abs(with_recall["bias"]) < 0.03
    assert without["bias"] < -0.04  # missed sclerotic glomeruli pull the percentage down


def test_a_perfect_and_well_measured_recall_changes_nothing() -> None:
    matrix, sure = [[90, 10], [5, 95]], (np.array([10**7] * 2),) * 2
    plain, known = (estimate_fractions([15, 5], matrix, recall=r) for r in (None, sure))
    for name in ("share", "low", "high"):
        assert getattr(known, name) == pytest.approx(getattr(plain, name), abs=1e-4)


@pytest.mark.parametrize(
    ("found", "of", "told"),
    [([1, 2], [1], "2 classes"), ([0.5, 1], [1, 1], "counts"), ([3, 1], [2, 1], "at most 1")],
)
def test_what_is_no_recall_is_refused(found: Any, of: Any, told: str) -> None:
    with pytest.raises(GloVLMError, match=told):
        check_recall((found, of), 2)


# ------------------------------------------------------------------------------------ simulation


@pytest.mark.parametrize(
    "cell",
    [(2, 10, 0.95, 0.05, 16), (2, 40, 0.8, 0.0, 200), (2, 20, 0.8, 0.5, 16), (3, 20, 0.8, 0.2, 16)],
    ids=str,
)
def test_simulated_biopsies_are_covered(cell: tuple[int, int, float, float, int]) -> None:
    row = simulate_cell(*cell, draws=120)
    assert row["corrected"] > 0.9
    # 0.93 less two standard errors of so few biopsies; the file's own run has 2,000
    assert min(row["coverage"], row["own"], row["others"]) >= 0.88, row
    assert 5 < row["width"] < 95


def test_where_nothing_can_be_corrected_the_simulation_says_so() -> None:
    row = simulate_cell(2, 10, 0.5, 0.2, 200, draws=20)
    assert (row["corrected"], row["coverage"], row["width"]) == (0, None, None)
    with pytest.raises(GloVLMError, match="2 or 3 classes, found 4"):
        simulate_cell(4, 10, 0.5, 0.2, 200)


def test_the_experiment_states_what_the_package_does() -> None:
    path = Path(__file__).resolve().parent.parent / "experiments" / "counting.yaml"
    chosen = read_yaml(path)["chosen"]
    assert chosen["tail"] == TAIL
    assert chosen["informative"] == {"margin": MARGIN, "limit": LIMIT}
