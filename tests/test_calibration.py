"""Calibration against plain loops, known answers, exact counts and simulations of the promises."""

import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import beta, binom

from hf_glovlm.calibration import (
    Calibration,
    ConformalThresholds,
    abstention_threshold,
    calibrate,
    check_items,
    conformal_sets,
    correct_prior,
    declared_prior,
    describe_sets,
    estimate_prior,
    fit_conformal,
    fit_temperature,
    measure_abstention,
    measure_sets,
    prior_shift,
    risk_coverage,
)
from hf_glovlm.calibration.abstention import images_without_error
from hf_glovlm.errors import GloVLMError

seeds = st.integers(0, 2**32 - 1)
NAMES = ["ischemic", "sclerotic", "viable"]


def softmax(z):
    return np.exp(z - logsumexp(z, axis=1, keepdims=True))


def draw(seed, n=60, n_classes=3, sharpness=2.0):
    """Informative logits, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n)
    z = rng.normal(size=(n, n_classes))
    z[np.arange(n), y] += 1
    return sharpness * z, y


def tied(seed, n=40, n_classes=4):
    """Probabilities in quarters: many ties, inside rows and between them."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(4, np.full(n_classes, 1 / n_classes), n) / 4, rng.integers(
        n_classes, size=n
    )


# -------------------------------------------------------------------------------- temperature


def nll(temperature, z, targets, weight=None):
    """Mean negative log-likelihood of soft targets, [n, K]."""
    log_p = z / temperature - logsumexp(z / temperature, axis=1, keepdims=True)
    return np.average(-(targets * log_p).sum(1), weights=weight)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("balanced", [False, True])
def test_temperature_is_the_minimum_of_the_likelihood(sharpness: float, balanced: bool) -> None:
    for seed in range(3):
        z, y = draw(seed, n=50, sharpness=sharpness)
        keep = (y != 0) | (np.arange(50) < 10)  # unbalanced
        z, y = z[keep], y[keep]
        weight = np.array([1 / (y == label).sum() for label in y]) if balanced else None
        fitted = fit_temperature(z, y, balanced=balanced)
        of = (z, np.eye(3)[y], weight)
        grid = np.geomspace(0.01, 100, 400)
        assert nll(fitted, *of) <= min(nll(t, *of) for t in grid) + 1e-12
        best = minimize_scalar(
            lambda t, of=of: nll(math.exp(t), *of),
            bounds=(math.log(0.01), math.log(100)),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert fitted == pytest.approx(math.exp(best.x), rel=1e-5)


@given(seed=seeds, factor=st.floats(0.2, 5))
def test_temperature_follows_the_scale_and_ignores_the_origin(seed: int, factor: float) -> None:
    z, y = draw(seed)
    fitted = fit_temperature(z, y)
    rows = np.random.default_rng(seed).normal(size=(len(z), 1))
    assert fit_temperature(factor * z, y) == pytest.approx(factor * fitted, rel=1e-6)
    assert fit_temperature(z + 100 * rows, y) == pytest.approx(fitted, rel=1e-6)


def test_temperature_finds_what_the_labels_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 4))
    y = np.array([rng.choice(4, p=p) for p in softmax(z)])
    assert fit_temperature(7 * z, y) == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize("n", [1, 5, 200])
def test_where_all_are_right_the_rule_of_succession_bounds_the_temperature(n: int) -> None:
    z, y = draw(0, n=n)
    z[np.arange(n), y] = z.max(1) + 0.5
    targets = np.where(np.eye(3)[y] == 1, (n + 1) / (n + 2), 1 / (n + 2) / 2)
    best = minimize_scalar(
        lambda t: nll(math.exp(t), z, targets), bounds=(-4.6, 4.6), method="bounded"
    )
    assert fit_temperature(z, y) == pytest.approx(math.exp(best.x), rel=1e-3)
    (note,) = (s for s in calibrate(z, y, ["s"] * n, NAMES).notes if "no temperature" in s)
    assert f"probability {n + 1}/{n + 2}" in note


@pytest.mark.parametrize(
    ("logits", "expected", "note"),
    [
        (np.zeros((6, 3)), 1, "same for every class"),
        (-np.eye(3)[[0, 1, 2, 0, 1, 2]], 100, "upper bound, 100: the logits mislead"),
        (1e-6 * (np.eye(3)[[0, 1, 2, 0, 1, 0]] * [1, 2, 3]), 0.01, "lower bound, 0.01"),
    ],
)
def test_temperature_stays_in_its_bounds(logits: Any, expected: float, note: str) -> None:
    y = np.array([0, 1, 2, 0, 1, 2])
    assert fit_temperature(logits, y) == expected
    assert note in " ".join(calibrate(logits, y, list("aabbcc"), NAMES).notes)


# --------------------------------------------------------------------------------- prevalence


def test_prior_correction_equals_a_plain_loop() -> None:
    z, _ = draw(1)
    p, new, old = softmax(z), np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    corrected = correct_prior(p, new, old)
    for row, result in zip(p, corrected, strict=True):
        joint = [row[k] * new[k] / old[k] for k in range(3)]
        assert np.allclose(result, np.array(joint) / sum(joint), rtol=0, atol=1e-12)
    assert np.allclose(softmax(np.log(p) + prior_shift(new, old)), corrected, atol=1e-12)
    assert np.allclose(correct_prior(corrected, old, new), p, atol=1e-12)
    uniform = np.full(3, 1 / 3)
    assert np.allclose(correct_prior(p, uniform), p, atol=1e-12)
    assert np.allclose(prior_shift(new), np.log(3 * new), atol=1e-12)


def test_a_declared_prevalence_is_put_in_order() -> None:
    prior = declared_prior({"viable": 0.5004, "ischemic": 0.2, "sclerotic": 0.3}, NAMES)
    assert prior.tolist() == pytest.approx([0.2 / 1.0004, 0.3 / 1.0004, 0.5004 / 1.0004])
    assert prior.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("prevalence", "sentence"),
    [
        ({"vable": 0.5}, r"unknown class 'vable'.*Did you mean 'viable'\?"),
        ({"viable": 0.5, "ischemic": 0.5}, "no fraction for sclerotic"),
        ({"viable": 0.5, "ischemic": 0.5, "sclerotic": 0}, "above 0 and at most 1, found 0 for"),
        ({"viable": 0.5, "ischemic": 0.6, "sclerotic": -0.1}, "found -0.1 for sclerotic"),
        ({"viable": 0.5, "ischemic": 0.6, "sclerotic": math.nan}, "found nan for sclerotic"),
        ({"viable": 50, "ischemic": 30, "sclerotic": 20}, "at most 1, found 50 for viable"),
        ({"viable": "a", "ischemic": 0.6, "sclerotic": 0.1}, "found 'a' for viable"),
        ({"viable": 0.5, "ischemic": 0.3, "sclerotic": 0.198}, "sum to 1, found 0.998"),
    ],
)
def test_a_wrong_prevalence_is_explained(prevalence: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        declared_prior(prevalence, NAMES)


def queries(seed, prior, n=4000):
    """Calibrated probabilities under a uniform prior, of queries that come with another one."""
    rng = np.random.default_rng(seed)
    y = rng.choice(len(prior), p=prior, size=n)
    x = rng.normal(size=(n, len(prior)))
    x[np.arange(n), y] += 1.5
    return softmax(1.5 * x)  # the log-likelihood ratio of unit normals 1.5 apart


def test_em_finds_the_prevalence_without_labels() -> None:
    truth = np.array([0.85, 0.1, 0.05])
    p = queries(0, truth)
    fitted = estimate_prior(p)
    assert fitted.converged
    assert 1 < fitted.iterations < 1000
    assert np.abs(fitted.prior - truth).max() < 0.03
    assert np.abs(p.mean(0) - truth).max() > 0.15  # what averaging alone would have said
    old = np.array([0.3, 0.3, 0.4])
    other = estimate_prior(correct_prior(p, old), old)
    assert np.allclose(other.prior, fitted.prior, atol=1e-5)  # whatever prior the model had


def test_one_step_of_em_equals_its_equation() -> None:
    p, old = queries(1, [0.6, 0.3, 0.1], n=30), np.array([0.5, 0.25, 0.25])
    prior = old
    for steps in range(1, 4):
        total = np.zeros(3)
        for row in p:
            joint = [row[k] * prior[k] / old[k] for k in range(3)]
            total += np.array(joint) / sum(joint)
        prior = total / len(p)
        fitted = estimate_prior(p, old, max_iterations=steps)
        assert np.allclose(fitted.prior, prior, rtol=0, atol=1e-12)
        assert (fitted.iterations, fitted.converged) == (steps, False)


@given(seed=seeds)
def test_em_climbs_to_the_maximum(seed: int) -> None:
    z, _ = draw(seed, n=25)
    p = softmax(z)

    def likelihood(prior):
        return np.log((p * prior * 3).sum(1)).mean()

    path = [likelihood(estimate_prior(p, max_iterations=n).prior) for n in (1, 2, 5, 20)]
    assert path == sorted(path)
    fitted = estimate_prior(p, tolerance=1e-12, max_iterations=100_000).prior
    # Karush-Kuhn-Tucker on the simplex: the gradient is 1 where a class has weight, else below.
    gradient = (p / (p @ fitted)[:, None]).mean(0)
    assert (gradient <= 1 + 1e-3).all()
    assert np.abs(gradient[fitted > 1e-3] - 1).max() < 1e-3


def test_a_class_that_em_finds_nowhere_keeps_a_finite_logit() -> None:
    p = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0]])
    fitted = estimate_prior(p).prior
    assert 0 < fitted[2] < 2e-6
    assert np.isfinite(prior_shift(fitted)).all()


def test_em_cannot_see_labels() -> None:
    assert list(inspect.signature(estimate_prior).parameters) == [
        "probabilities",
        "old_prior",
        "tolerance",
        "max_iterations",
    ]


# ----------------------------------------------------------------------------- conformal sets


def plain_score(row, k, method, penalty, free_ranks):
    if method == "lac":
        return 1 - row[k]
    above = [q for q in sorted(row, reverse=True) if q > row[k]]
    score = sum(above)
    if method == "raps":
        score += penalty * max(len(above) + 1 - free_ranks, 0)
    return score


def plain_threshold(scores, alpha):
    """The smallest score that at least (n + 1)(1 - alpha) of the n scores do not exceed."""
    return min(
        s for s in scores if sum(t <= s for t in scores) >= (len(scores) + 1) * (1 - alpha) - 1e-9
    )


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lac", {}),
        ("aps", {}),
        ("raps", {}),
        ("raps", {"penalty": 0.3, "free_ranks": 2}),
        ("raps", {"penalty": 0.05, "free_ranks": 0}),
    ],
)
@pytest.mark.parametrize("make", [tied, lambda s: (softmax(draw(s)[0]), draw(s)[1])])
def test_sets_equal_a_plain_loop(
    make: Any, method: str, options: dict[str, float], per_class: bool
) -> None:
    settings = {"penalty": 0.1, "free_ranks": 1} | options
    for seed in range(4):
        p, y = make(seed)
        n_classes = p.shape[1]
        y[: 6 * n_classes] = np.repeat(np.arange(n_classes), 6)
        alpha = 0.2
        own = [plain_score(row, k, method, **settings) for row, k in zip(p, y, strict=True)]
        limits = [
            plain_threshold(
                [s for s, k in zip(own, y, strict=True) if k == c or not per_class], alpha
            )
            for c in range(n_classes)
        ]
        fitted = fit_conformal(p, y, method=method, alpha=alpha, per_class=per_class, **options)
        expected = limits if per_class else limits[:1]
        assert np.allclose(fitted.thresholds, expected, rtol=0, atol=1e-12)
        sets = conformal_sets(p, fitted)
        for row, inside in zip(p, sets, strict=True):
            scores = [plain_score(row, k, method, **settings) for k in range(n_classes)]
            for k in range(n_classes):
                if abs(scores[k] - limits[k]) > 1e-9:
                    assert inside[k] == (scores[k] <= limits[k])
        # the scores at the threshold itself belong to the set
        covered = sets[np.arange(len(y)), y]
        for c in range(n_classes) if per_class else [None]:
            here = covered if c is None else covered[y == c]
            assert here.sum() >= (len(here) + 1) * (1 - alpha) - 1e-9


@given(seed=seeds, n=st.integers(9, 30), alpha=st.sampled_from([0.1, 0.15, 0.3]))
@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_promise_holds_exactly_over_exchanges(
    method: str, ties: bool, seed: int, n: int, alpha: float
) -> None:
    """Of n + 1 images, each tested once with the others as calibration, enough are covered.

    That is what exchangeability turns into the promise: not a matter of chance.
    """
    if ties:
        p, y = tied(seed, n + 1)
    else:
        z, y = draw(seed, n + 1)
        p = softmax(z)
    covered = 0
    for left in range(n + 1):
        rest = np.arange(n + 1) != left
        fitted = fit_conformal(p[rest], y[rest], method=method, alpha=alpha)
        covered += conformal_sets(p[[left]], fitted)[0, y[left]]
    assert covered >= (n + 1) * (1 - alpha) - 1e-9
    if method == "lac" and not ties:
        assert covered == math.ceil((n + 1) * (1 - alpha) - 1e-9)  # and no more


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_coverage_over_many_calibrations(method: str, per_class: bool) -> None:
    """New calibration images each time; coverage measured on images of the same world."""
    z, y = draw(0, n=20_000, n_classes=3)
    p = softmax(z)
    of_class = [np.flatnonzero(y == k) for k in range(3)]
    n, alpha, n_draws = 60, 0.1, 300
    rng = np.random.default_rng(1)
    reached = []
    for _ in range(n_draws):
        rows = rng.integers(len(p), size=n)
        if per_class:
            rows = np.concatenate([rng.choice(here, size=n // 3) for here in of_class])
        fitted = fit_conformal(p[rows], y[rows], method=method, alpha=alpha, per_class=per_class)
        test = rng.integers(len(p), size=2000)
        covered = conformal_sets(p[test], fitted)[np.arange(2000), y[test]]
        reached.append(
            [covered[y[test] == k].mean() for k in range(3)] if per_class else [covered.mean()]
        )
    mean, error = np.mean(reached, axis=0), np.std(reached, axis=0) / math.sqrt(n_draws)
    assert (mean >= 1 - alpha - 4 * error).all()
    if method == "lac" and not per_class:  # scores that are never tied: no more than that
        assert (mean <= 1 - alpha + 1 / (n + 1) + 4 * error).all()


@pytest.mark.parametrize(
    ("n", "alpha", "low", "high"),
    [(9, 0.1, 0.72, 0.99), (32, 0.1, 0.82, 0.97), (100, 0.1, 0.85, 0.94), (19, 0.05, 0.85, 1.0)],
)
def test_the_range_of_realised_coverage(n: int, alpha: float, low: float, high: float) -> None:
    """Against scipy's distribution, published figures, and coverage that is known exactly."""
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(1000):
        p = rng.uniform(size=n)  # LAC of class 1 is then uniform: the coverage is the threshold
        fitted = fit_conformal(np.stack([1 - p, p], 1), np.ones(n, int), method="lac", alpha=alpha)
        reached.append(fitted.thresholds[0])
    ((lower, upper),) = fitted.coverage_range
    missed = math.floor((n + 1) * alpha + 1e-9)
    law = beta(n + 1 - missed, missed)
    assert (lower, upper) == pytest.approx((law.ppf(0.05), law.ppf(0.95)), abs=1e-9)
    assert (lower, upper) == pytest.approx((low, high), abs=0.0051)
    for q, bound in ((0.05, lower), (0.95, upper)):
        assert np.mean(np.array(reached) < bound) == pytest.approx(q, abs=0.03)


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.3, 3), (0.01, 99), (0.15, 6), (0.5, 1)]
)
def test_too_few_images_are_refused(alpha: float, needed: int) -> None:
    p, y = softmax(draw(0, n=300)[0]), np.arange(300) % 3
    assert fit_conformal(p[:needed], y[:needed], alpha=alpha).n == (needed,)
    both = f"at least {needed} calibration images"
    if needed > 1:
        with pytest.raises(GloVLMError, match=rf"{both} \(1/alpha - 1\), found {needed - 1}: "):
            fit_conformal(p[: needed - 1], y[: needed - 1], alpha=alpha)
    three = 3 * needed
    fitted = fit_conformal(p[:three], y[:three], alpha=alpha, per_class=True)
    assert fitted.n == (needed,) * 3
    with pytest.raises(
        GloVLMError, match=rf"{both} of every class .* found {needed - 1} of viable"
    ):
        fit_conformal(
            p[: three - 1], y[: three - 1], alpha=alpha, per_class=True, class_names=NAMES
        )
    with pytest.raises(GloVLMError, match="found 0 of ischemic, 0 of sclerotic"):
        check_items([2] * needed, NAMES, method="lac", alpha=alpha, per_class=True)


def test_ranks_are_exact_for_alphas_that_floats_cannot_hold() -> None:
    for alpha, n in [(0.1, 9), (0.1, 29), (0.7, 9), (0.3, 9), (0.07, 99), (0.29, 99), (0.58, 49)]:
        p = np.linspace(0, 1, n)
        fitted = fit_conformal(np.stack([1 - p, p], 1), np.ones(n, int), alpha=alpha)
        per_cent = round(100 * alpha)
        rank = -(-(n + 1) * (100 - per_cent) // 100)  # integers only
        assert fitted.thresholds[0] == pytest.approx((rank - 1) / (n - 1), abs=1e-12)


@given(seed=seeds)
def test_properties_of_the_sets(seed: int) -> None:
    p, y = tied(seed)
    order = np.random.default_rng(seed).permutation(4)
    back = np.argsort(order)
    for method in ("lac", "aps", "raps"):
        wide, narrow = (
            conformal_sets(p, fit_conformal(p, y, method=method, alpha=a)) for a in (0.1, 0.4)
        )
        assert (narrow <= wide).all()
        moved = fit_conformal(p[:, order], back[y], method=method, alpha=0.1)
        assert (conformal_sets(p[:, order], moved) == wide[:, order]).all()
        if method != "lac":
            assert wide[np.arange(len(p)), p.argmax(1)].all()  # never empty
        # a set never holds a class without every class that is more probable
        for row, inside in zip(p, wide, strict=True):
            assert (
                not inside.any()
                or (~inside).all()
                or row[inside].min() >= row[~inside].max(initial=0)
            )
    aps = fit_conformal(p, y, method="aps")
    plain = fit_conformal(p, y, method="raps", penalty=0)
    assert plain.thresholds == aps.thresholds


def test_thresholds_survive_json() -> None:
    p, y = softmax(draw(0, n=90)[0]), np.arange(90) % 3
    for method in ("lac", "raps"):
        fitted = fit_conformal(p, y, method=method, per_class=True)
        stored = json.loads(json.dumps(fitted.to_dict()))
        assert stored == fitted.to_dict()
        assert ConformalThresholds.from_dict(stored) == fitted
    for bad in ({}, {**stored, "x": 1}, {**stored, "method": "x"}, {**stored, "thresholds": 3}):
        with pytest.raises(GloVLMError, match="no conformal thresholds"):
            ConformalThresholds.from_dict(bad)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "apss"}, r"lac, aps, raps\), found 'apss'.*Did you mean 'aps'\?"),
        ({"alpha": 0}, "alpha between 0 and 1, found 0"),
        ({"alpha": 10}, "alpha between 0 and 1, found 10"),
        ({"method": "raps", "penalty": -1}, "penalty and free ranks >= 0, found -1"),
        ({"labels": [0] * 59 + [3]}, r"class indices \[n\] in 0 \.\.\. 2, found .* from 0 to 3"),
        ({"labels": [0.5] * 60}, "class indices.*found float64"),
        ({"labels": [0] * 59}, "59 labels and 60 rows"),
        ({"probabilities": np.ones((60, 3))}, r"sum to 1, found \[1.0, 1.0, 1.0\]: apply softmax"),
        ({"probabilities": np.full((60, 3), np.nan)}, "finite numbers, found another in row 0"),
        ({"probabilities": np.ones((60, 1))}, r"K >= 2, found the shape \(60, 1\)"),
        ({"probabilities": [["a", "b"]]}, "found something else"),
        ({"probabilities": [[1.2, -0.2, 0]] * 60}, "0 or more whose rows sum to 1"),
    ],
)
def test_bad_input_to_conformal(options: dict[str, Any], sentence: str) -> None:
    z, y = draw(0)
    given_ = {"probabilities": softmax(z), "labels": y} | options
    with pytest.raises(GloVLMError, match=sentence):
        fit_conformal(given_.pop("probabilities"), given_.pop("labels"), **given_)


def test_sets_of_other_classes_are_refused() -> None:
    fitted = fit_conformal(softmax(draw(0, n=90)[0]), np.arange(90) % 3, per_class=True)
    with pytest.raises(GloVLMError, match="probabilities of 3 classes, one per threshold, found 4"):
        conformal_sets(tied(0)[0], fitted)


def test_sets_in_words() -> None:
    sets = np.array([[True, False, True], [False, False, False], [False, True, False]])
    assert describe_sets(sets, NAMES) == ["ischemic or viable", "none", "sclerotic"]
    with pytest.raises(GloVLMError, match=r"\[n, 2\] with n >= 1, found bool of shape \(3, 3\)"):
        describe_sets(sets, NAMES[:2])


def test_sets_are_measured() -> None:
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    measured = measure_sets(sets, [0, 1, 1, 0, 0], NAMES)
    assert measured == {
        "n": 5,
        "coverage": 0.6,
        "mean_size": 1.4,
        "single": 0.4,
        "empty": 0.2,
        "sizes": [1, 2, 1, 1],
        "per_class": {
            "ischemic": {
                "n": 3,
                "coverage": pytest.approx(2 / 3),
                "mean_size": pytest.approx(5 / 3),
            },
            "sclerotic": {"n": 2, "coverage": 0.5, "mean_size": 1.0},
            "viable": {"n": 0, "coverage": None, "mean_size": None},
        },
        "worst_class_coverage": 0.5,
    }
    with pytest.raises(GloVLMError, match="one group per image, found 2 and 5 images"):
        measure_sets(sets, [0] * 5, NAMES, ["a", "b"])


def test_the_intervals_of_sets_are_over_groups() -> None:
    rng = np.random.default_rng(0)
    sets = np.repeat(rng.random((20, 3)) < 0.7, 30, axis=0)  # 20 slides of 30 equal images
    y = np.repeat(rng.integers(3, size=20), 30)
    groups = [f"s{i // 30}" for i in range(600)]
    by_group = measure_sets(sets, y, NAMES, groups)
    by_image = measure_sets(sets, y, NAMES, [str(i) for i in range(600)])
    widths = [np.ptp(m["coverage_ci95"]) for m in (by_group, by_image)]
    # images that are copies of each other tell as much as one: the square root of 30
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(30), rel=0.15)
    for name in ("coverage", "mean_size"):
        low, high = by_group[f"{name}_ci95"]
        assert low < by_group[name] < high
    assert by_group["n_groups"] == 20
    assert by_group == measure_sets(sets, y, NAMES, groups)


# --------------------------------------------------------------------------------- abstention


@given(seed=seeds)
def test_risk_and_coverage_equal_a_plain_loop(seed: int) -> None:
    p, y = tied(seed)
    confidence, wrong = p.max(1), p.argmax(1) != y
    fitted = risk_coverage(p, y)
    levels = sorted(set(confidence), reverse=True)
    assert fitted["coverage"] == pytest.approx([np.mean(confidence >= c) for c in levels])
    assert fitted["risk"] == pytest.approx([wrong[confidence >= c].mean() for c in levels])
    own = [wrong[confidence >= c].mean() for c in confidence]
    assert fitted["aurc"] == pytest.approx(np.mean(own))
    assert fitted["coverage"][-1] == 1
    assert fitted["risk"][-1] == pytest.approx(wrong.mean())


def test_risk_of_known_rankings() -> None:
    p = np.stack([np.linspace(0.6, 0.9, 10), np.linspace(0.4, 0.1, 10)], 1)
    assert risk_coverage(p, [0] * 10)["aurc"] == 0
    assert risk_coverage(p, [1] * 10)["aurc"] == 1
    wrong_last = risk_coverage(p, [1] * 5 + [0] * 5)["aurc"]
    assert wrong_last == pytest.approx(np.mean([0] * 5 + [i / (5 + i) for i in range(1, 6)]))
    assert risk_coverage(np.full((10, 2), 0.5), [1] * 4 + [0] * 6)["aurc"] == pytest.approx(0.4)


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    z, y = draw(0, n=2000, sharpness=4)
    fitted = abstention_threshold(softmax(z), y, 0.2)
    assert fitted.threshold is not None
    kept = round(fitted.coverage * 2000)
    errors = round(fitted.risk * kept)
    # risk at the bound: so few errors have probability delta / 10
    assert binom.cdf(errors, kept, fitted.bound) == pytest.approx(0.05 / 10, rel=1e-6)
    assert fitted.risk < fitted.bound <= 0.2
    p = softmax(z)
    assert fitted.coverage == pytest.approx(np.mean(p.max(1) >= fitted.threshold))
    measured = measure_abstention(p, y, fitted.threshold)
    assert (measured["coverage"], measured["risk"]) == pytest.approx((fitted.coverage, fitted.risk))
    assert measured["answered"] == kept
    # the next larger coverage does not keep to it
    wider = np.sort(p.max(1))[::-1][math.ceil(2000 * (round(fitted.coverage, 1) + 0.1)) - 1]
    more = p.max(1) >= wider
    n_wrong = int((p.argmax(1) != y)[more].sum())
    assert binom.cdf(n_wrong, more.sum(), 0.2) > 0.05 / 10


def test_the_risk_is_kept_over_many_calibrations() -> None:
    z, y = draw(1, n=100_000, n_classes=2, sharpness=2)
    p = softmax(z)
    confidence, wrong = p.max(1), p.argmax(1) != y
    rng = np.random.default_rng(0)
    broken, answered = 0, 0
    for _ in range(400):
        rows = rng.integers(len(p), size=150)
        threshold = abstention_threshold(p[rows], y[rows], 0.2).threshold
        if threshold is not None:
            answered += 1
            broken += wrong[confidence >= threshold].mean() > 0.2
    assert answered > 200  # it is no promise of silence
    assert broken <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)


@pytest.mark.parametrize("max_risk", [0.05, 0.1, 0.3])
def test_so_many_images_without_an_error_are_needed(max_risk: float) -> None:
    needed = images_without_error(max_risk)
    z, _ = draw(0, n=needed)
    p = softmax(z)
    fitted = abstention_threshold(p, p.argmax(1), max_risk)
    assert (fitted.coverage, fitted.risk) == (1, 0)
    fewer = abstention_threshold(p[1:], p[1:].argmax(1), max_risk)
    assert (fewer.threshold, fewer.coverage, fewer.risk) == (None, 0, None)
    silent = measure_abstention(p, p.argmax(1), None)
    assert (silent["answered"], silent["coverage"], silent["risk"]) == (0, 0, None)
    fitted = calibrate(z[1:], p[1:].argmax(1), ["s"] * (needed - 1), NAMES, max_risk=max_risk)
    assert any(f"at least {needed} confident" in note for note in fitted.notes)


@pytest.mark.parametrize(
    "options", [{"max_risk": 0}, {"max_risk": 5}, {"max_risk": 0.1, "delta": 1}]
)
def test_impossible_risks(options: dict[str, float]) -> None:
    z, y = draw(0)
    with pytest.raises(GloVLMError, match="between 0 and 1, found"):
        abstention_threshold(softmax(z), y, **options)


# ---------------------------------------------------------------------------------- calibrate


def test_calibrate_does_each_step_on_the_one_before() -> None:
    z, y = draw(3, n=300, sharpness=6)
    groups = [f"s{i % 12}" for i in range(300)]
    options: dict[str, Any] = {"conformal": "lac", "alpha": 0.2, "per_class": True, "max_risk": 0.3}
    fitted = calibrate(z, y, groups, NAMES, **options)
    assert fitted.temperature == fit_temperature(z, y)
    p = softmax(z / fitted.temperature)
    expected = fit_conformal(p, y, method="lac", alpha=0.2, per_class=True)
    assert fitted.conformal is not None
    stored = ConformalThresholds.from_dict(fitted.conformal)
    assert np.allclose(stored.thresholds, expected.thresholds, atol=1e-12)
    assert fitted.abstention is not None
    assert fitted.abstention["threshold"] == pytest.approx(
        abstention_threshold(p, y, 0.3).threshold
    )
    facts = fitted.facts
    assert (facts["n"], facts["groups"]) == (300, 12)
    assert facts["per_class"] == {name: int((y == k).sum()) for k, name in enumerate(NAMES)}
    assert list(facts["coverage_range"]) == NAMES
    one_hot = np.eye(3)[y]
    assert facts["nll"]["before"] == pytest.approx(nll(1, z, one_hot))
    assert facts["nll"]["after"] == pytest.approx(nll(fitted.temperature, z, one_hot))
    assert facts["nll"]["after"] < facts["nll"]["before"]
    text = " ".join(fitted.notes)
    assert "300 images of 12 groups" in text
    assert "promise 80% coverage on average" in text
    assert "resemble each other" in text
    assert json.loads(json.dumps(fitted.to_dict())) == fitted.to_dict()


def test_calibrate_does_only_what_was_asked_for() -> None:
    z, y = draw(0)
    groups = [str(i) for i in range(60)]
    none = calibrate(z, y, groups, NAMES, temperature=False)
    assert (none.temperature, none.conformal, none.abstention) == (1, None, None)
    assert none.facts["nll"]["before"] == none.facts["nll"]["after"]
    sets = calibrate(z, y, groups, NAMES, temperature=False, conformal="aps")
    assert sets.conformal is not None
    expected = fit_conformal(softmax(z), y, method="aps").to_dict()
    assert sets.conformal == expected | {"thresholds": pytest.approx(expected["thresholds"])}
    assert len(sets.facts["coverage_range"]) == 2
    assert not any("resemble" in note or "same images" in note for note in sets.notes)
    assert none == Calibration(1.0, None, None, none.notes, none.facts)


def test_calibrate_with_a_prevalence() -> None:
    z, y = draw(0, n=400)
    keep = (y != 2) | (np.arange(400) < 40)
    z, y = z[keep], y[keep]
    shift = prior_shift(declared_prior({"ischemic": 0.6, "sclerotic": 0.3, "viable": 0.1}, NAMES))
    fitted = calibrate(z, y, ["s"] * len(y), NAMES, conformal="lac", shift=shift)
    assert fitted.temperature == fit_temperature(z, y, balanced=True)
    p = softmax(z / fitted.temperature + shift)
    assert fitted.conformal is not None
    assert fitted.conformal["thresholds"] == pytest.approx(
        fit_conformal(p, y).thresholds, abs=1e-12
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"groups": ["a"]}, "3 class names and 60 groups, found 3 and 1"),
        ({"class_names": NAMES[:2]}, "found 2 and 60"),
        ({"shift": [0.0, 1.0]}, "finite shift of 3 classes"),
        ({"shift": [0.0, 1.0, -np.inf]}, "finite shift of 3 classes"),
        ({"logits": np.full((60, 3), np.inf)}, "finite numbers"),
        ({"conformal": "lac", "alpha": 0.001}, "at least 999 calibration images"),
        ({"conformal": "lac", "alpha": 0.01, "per_class": True}, "of ischemic, .* of viable"),
    ],
)
def test_bad_calibrations(changes: dict[str, Any], sentence: str) -> None:
    z, y = draw(0)
    arguments = {"logits": z, "labels": y, "groups": ["s"] * 60, "class_names": NAMES} | changes
    with pytest.raises(GloVLMError, match=sentence):
        calibrate(**arguments)


def test_a_class_without_calibration_images_is_named() -> None:
    z, y = draw(0)
    fitted = calibrate(z[y != 1], y[y != 1], ["s"] * int((y != 1).sum()), NAMES, conformal="lac")
    assert "No calibration image shows sclerotic." in fitted.notes
