"""Curves and thresholds against scikit-learn, by hand, and by their own rules."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from hf_glovlm.curves import (
    POINTS,
    choose_thresholds,
    compute_curves,
    count_by_group,
    measure_thresholds,
)
from hf_glovlm.errors import GloVLMError

NAMES = ["a", "b", "c"]


def sample(
    n: int, seed: int = 0, decimals: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, probabilities and groups; rounded, scores are tied."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    logits = rng.normal(size=(n, 3))
    logits[np.arange(n), labels] += 1
    shares = np.exp(logits)
    shares /= shares.sum(1, keepdims=True)
    if decimals is not None:
        shares = shares.round(decimals)
        shares[:, 2] = 1 - shares[:, 0] - shares[:, 1]
    return labels, shares.clip(0, 1), [f"g{i}" for i in rng.integers(12, size=n)]


@pytest.mark.parametrize("decimals", [None, 1])
def test_curves_are_those_of_scikit_learn(decimals: int | None) -> None:
    labels, shares, groups = sample(80, decimals=decimals)
    curves = compute_curves(labels, shares, groups=groups, class_names=NAMES)
    for k, name in enumerate(NAMES):
        own = labels == k
        curve = curves["classes"][name]["precision_recall"]
        assert len(curve["recall"]) == own.sum()
        average = average_precision_score(own, shares[:, k])
        assert np.mean(curve["precision"]) == pytest.approx(average, abs=1e-4)
        fpr, tpr, _ = roc_curve(own, shares[:, k], drop_intermediate=False)
        roc = curves["classes"][name]["roc"]
        assert len(roc["fpr"]) == (~own).sum() + 1 <= POINTS
        for x, y in zip(roc["fpr"], roc["sensitivity"], strict=True):
            at = np.isclose(fpr, x, atol=1e-4)
            expected = tpr[at].max() if at.any() else np.interp(x, fpr, tpr)
            assert y == pytest.approx(expected, abs=1e-3)
        if decimals is None:
            area = roc_auc_score(own, shares[:, k])
            assert np.mean(roc["sensitivity"][:-1]) == pytest.approx(area, abs=1e-4)


def test_bands_hold_their_curve_and_that_of_sensitivity_never_falls() -> None:
    labels, shares, groups = sample(90, seed=3)
    curves = compute_curves(labels, shares, groups=groups, class_names=NAMES)
    for of in curves["classes"].values():
        for curve, value in ((of["roc"], "sensitivity"), (of["precision_recall"], "precision")):
            low, middle, high = (np.array(curve[key]) for key in ("low", value, "high"))
            assert (low <= middle + 1e-4).all()
            assert (middle <= high + 1e-4).all()
            assert (high - low).min() > 0
        for key in ("low", "sensitivity", "high"):
            assert (np.diff(of["roc"][key]) >= 0).all()
    alone = compute_curves(labels, shares, class_names=NAMES, n_resamples=0)
    assert alone["classes"]["a"]["roc"]["low"] is None
    assert alone["unit"] == "images"


def test_a_band_over_few_groups_is_wider() -> None:
    labels, shares, _ = sample(240, seed=1)
    widths = []
    for n_groups in (6, 60):
        groups = [f"g{i % n_groups}" for i in range(240)]
        curve = compute_curves(labels, shares, groups=groups)["classes"]["0"]["roc"]
        widths.append(np.mean(np.array(curve["high"]) - np.array(curve["low"])))
    assert len(curve["fpr"]) == POINTS
    assert widths[0] > widths[1]


def test_a_class_without_images_or_without_others_has_no_curve() -> None:
    shares = np.full((6, 3), 1 / 3)
    curves = compute_curves([0, 0, 0, 1, 1, 1], shares, class_names=NAMES)
    assert curves["classes"]["c"] is None
    assert curves["classes"]["a"]["roc"]["fpr"][-1] == 1
    chosen = choose_thresholds([0, 0, 0], shares[:3], NAMES)
    assert chosen == dict.fromkeys(NAMES)


def test_a_threshold_has_the_largest_sum_of_sensitivity_and_specificity() -> None:
    labels, shares, _ = sample(70, seed=2)
    chosen = choose_thresholds(labels, shares, NAMES)
    for k, name in enumerate(NAMES):
        own = labels == k
        sums = [
            (shares[own, k] >= t).mean() + (shares[~own, k] < t).mean()
            for t in np.linspace(0, 1, 5001)
        ]
        threshold = chosen[name]
        assert threshold is not None
        reached = (shares[own, k] >= threshold).mean() + (shares[~own, k] < threshold).mean()
        assert reached == pytest.approx(max(sums))


def test_sensitivity_and_specificity_at_a_threshold_are_counts() -> None:
    labels, shares, groups = sample(120, seed=4)
    thresholds = {"a": 0.3, "b": None, "c": 0.9}
    rows = measure_thresholds(labels, shares, thresholds, groups=groups, class_names=NAMES)
    for k, name in ((0, "a"), (2, "c")):
        own, above = labels == k, shares[:, k] >= thresholds[name]
        for key, value in (
            ("sensitivity", above[own].mean()),
            ("specificity", (~above[~own]).mean()),
        ):
            entry = rows[name][key]
            assert entry["value"] == pytest.approx(value)
            assert entry["ci95"][0] <= value <= entry["ci95"][1]
    assert rows["b"]["sensitivity"]["value"] is None
    assert "no image to choose it on" in rows["b"]["sensitivity"]["note"]
    with pytest.raises(GloVLMError, match="a threshold"):
        measure_thresholds(labels, shares, {"a": 0.3}, class_names=NAMES)


def test_groups_are_counted_without_their_names_worst_first() -> None:
    labels = [0, 0, 1, 1, 1, 0]
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.8, 0.2], [0.1, 0.9]])
    rows = count_by_group(labels, shares, ["x", "x", "y", "y", "z", "z"])
    assert rows == [{"n": 2, "right": 0}, {"n": 2, "right": 1}, {"n": 2, "right": 2}]
