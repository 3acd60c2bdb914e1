"""Methods on the feature side: each is its paper's formula, trained by its paper's recipe."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cases import case_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from tiny import tiny_clip, tiny_pair
from tolerance import assert_same_numbers
from torch import nn

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, Fold, HeadMethod, Support, give_joint_space
from hf_glovlm.methods.closed_form import TIP_ALPHAS, TIP_BETAS
from hf_glovlm.methods.heads import (
    WHOLE_SUPPORT,
    LpPlusPlusConfig,
    ScaledCosines,
    lp_plus_plus_path,
    lp_plus_plus_rates,
)
from hf_glovlm.model.heads import (
    CacheHead,
    MLPHead,
    ProjectedHead,
    ResidualHead,
    build_head,
    describe_head,
)
from hf_glovlm.training import adapt_features
from hf_glovlm.training.loop import TensorSource, fit
from hf_glovlm.training.losses import HeadStep

Array = NDArray[Any]

FEATURE_SIDE = [name for name, method in METHODS.items() if method.family == "feature side"]


def method(name: str) -> Any:
    return METHODS[name]


def unit(values: Array) -> Any:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def problem(
    counts: tuple[int, ...], dim: int, seed: int = 0, noise: float = 0.5
) -> tuple[Array, Array, Array]:
    """Features in a cone around their class, as encoders make them, and texts near the classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    offset, centres = rng.normal(size=dim), rng.normal(size=(len(counts), dim))
    features = 3 * (offset + centres[labels] + noise * rng.normal(size=(len(labels), dim)))
    return features, labels, unit(offset + centres + noise * rng.normal(size=centres.shape))


def support_of(counts: tuple[int, ...], dim: int, scale: float = 20.0, **more: Any) -> Support:
    features, labels, texts = problem(counts, dim)
    return Support(
        torch.from_numpy(features).float(),
        torch.from_numpy(labels),
        len(counts),
        torch.from_numpy(texts).float(),
        scale,
        **more,
    )


# -------------------------------------------------------------------------------- pinned constants

ADAMW = {"optimizer": "adamw", "schedule": "constant", "warmup_epochs": 0, "eps": 1e-8}
COSINE = {"schedule": "cosine", "final_lr": 0.0, "steps": None}
WARM = {**COSINE, "warmup_epochs": 1, "warmup_lr": 1e-5, "by_step": False}
COOP = {"optimizer": "sgd", "lr": 2e-3, "weight_decay": 5e-4, "batch_size": 32, **WARM}
LP = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "batch_size": 256, "epochs": 300, **WARM}
TASKRES = {
    **ADAMW,
    "optimizer": "adam",
    "lr": 2e-3,
    "weight_decay": 5e-4,
    "batch_size": 256,
    **WARM,
}
TIP = {
    **ADAMW,
    **COSINE,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "batch_size": 256,
    "epochs": 20,
    "by_step": True,
    "eps": 1e-4,
}
PROLIP = {
    **ADAMW,
    **COSINE,  # one step an epoch, so that by step is by epoch
    "lr": 1e-5,
    "weight_decay": 0.0,
    "batch_size": WHOLE_SUPPORT,
    "epochs": 300,
    "eps": 1e-4,
}
CLASSIFIER = {**ADAMW, "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 16, "epochs": 20}
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    ("classifier", 8, CLASSIFIER),
    ("zs_lp", 8, LP),
    ("clap", 8, LP),
    *(("taskres", k, {**TASKRES, "epochs": e}) for k, e in ((1, 100), (4, 100), (8, 200))),
    *(("clip_adapter", k, {**COOP, "epochs": e}) for k, e in ((1, 50), (2, 100), (4, 100))),
    *(("clip_adapter", k, {**COOP, "epochs": 200}) for k in (8, 16)),
    ("tip_adapter_f", 8, TIP),
    ("prolip", 8, PROLIP),
]
SETTINGS: dict[str, Mapping[str, Any]] = {
    "linear_probe": {"C": 100.0, "max_iter": 1000},
    "lp_plus_plus": {"epochs": 300, "alpha_start": 250.0, "alpha_every": 10, "momentum": 0.9},
    "zs_lp": {"length": 10.0},
    "clap": {"length": 10.0},
    "taskres": {"alpha": 0.5, "length": 10.0},
    "clip_adapter": {"reduction": 4, "ratio": 0.2},
    "tip_adapter_f": {"alpha": 1.17, "beta": 1.0, "balance": True},
    "prolip": {"strength": None},
    "classifier": {"hidden": 512, "dropout": 0.5},
}
VALIDATION = {
    "linear_probe": "search",
    "tip_adapter_f": "search",
    **dict.fromkeys(
        ("lp_plus_plus", "zs_lp", "clap", "taskres", "clip_adapter", "prolip", "classifier"),
        "early stopping",
    ),
}


@pytest.mark.parametrize(("name", "shots", "expected"), RECIPES)
def test_recipes_are_the_published_ones(name: str, shots: int, expected: dict[str, Any]) -> None:
    recipe = asdict(method(name).recipe(shots, method(name).configure({})))
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize("name", FEATURE_SIDE)
def test_settings_recipes_and_the_use_of_validation_are_pinned(name: str) -> None:
    where = "{} in tests/test_feature_side.py".format
    settings = case_of(SETTINGS, name, "METHODS", where("SETTINGS"), "its published settings")
    assert method(name).describe()["settings"] == settings
    use = case_of(VALIDATION, name, "METHODS", where("VALIDATION"), "its use of validation images")
    assert method(name).validation == use
    if isinstance(METHODS[name], HeadMethod):
        recipes = {n: recipe for n, _, recipe in RECIPES}
        case_of(recipes, name, "METHODS", where("RECIPES"), "its published recipe")
    assert re.search(r"arXiv:\d{4}\.\d{5}", METHODS[name].citation)


def test_which_methods_work_on_pooled_vectors_and_which_without_texts() -> None:
    assert [n for n in FEATURE_SIDE if METHODS[n].on_pooled] == ["prolip"]
    without_text = [n for n in FEATURE_SIDE if not METHODS[n].needs_text]
    assert without_text == ["linear_probe", "classifier"]


# ------------------------------------------------------------------------------------ linear probe


@pytest.mark.parametrize("counts", [(4, 4, 4), (7, 1, 3), (6, 6), (9, 1), (2, 2, 2, 2, 2)])
def test_linear_probe_is_scikit_learns_logistic_regression(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features = 3 * torch.randn(len(labels), 12) + labels.unsqueeze(1)
    support = Support(features, labels, len(counts))
    head = method("linear_probe").fit(support, method("linear_probe").configure({})).head

    # With more than two classes its default tolerance stops early.
    tol = 1e-4 if len(counts) == 2 else 1e-10
    oracle = LogisticRegression(C=100, max_iter=10_000, tol=tol)
    oracle.fit(unit(features.double().numpy()), labels.numpy())
    fresh = 5 * torch.randn(40, 12)
    logits = head(fresh).detach().double()
    decision = oracle.decision_function(unit(fresh.double().numpy()))
    if len(counts) == 2:
        assert np.abs((logits[:, 1] - logits[:, 0]).numpy() - decision).max() < 1e-4
    else:
        assert np.abs(logits.numpy() - decision).max() < 1e-4
    probabilities = oracle.predict_proba(unit(fresh.double().numpy()))
    assert np.abs(logits.softmax(-1).numpy() - probabilities).max() < 1e-5


@pytest.mark.parametrize(
    ("classes", "shots", "dim", "offset"),
    [(2, 8, 64, 10), (2, 8, 16, 1e3), (3, 2, 8, 0), (30, 8, 16, 10), (30, 2, 300, 10)],
)
def test_linear_probe_reaches_the_optimum_whatever_the_classes_and_their_common_offset(
    classes: int, shots: int, dim: int, offset: float
) -> None:
    rng = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), shots)
    features = rng.normal(size=(classes, dim))[labels] + rng.normal(size=(len(labels), dim))
    features = unit(features + offset * rng.normal(size=dim))
    support = Support(torch.from_numpy(features), torch.from_numpy(labels), classes)
    probe = method("linear_probe")
    fitted = probe.fit(support, probe.configure({}))
    oracle = LogisticRegression(C=100, max_iter=10_000, tol=1e-10).fit(features, labels)
    with torch.no_grad():
        ours = fitted.head(torch.from_numpy(features).float()).softmax(-1).numpy()
    most = 1e-2 if classes == 2 else 1e-4  # two classes stop as scikit-learn does by default
    assert np.abs(ours - oracle.predict_proba(features)).max() < most
    assert not fitted.notes


@pytest.mark.parametrize("classes", [3, 30, 1000])
def test_linear_probe_reaches_the_optimum_of_classes_on_a_circle(classes: int) -> None:
    """By symmetry the weights are `a` times the classes' places: one number is to be solved for."""
    angle = 2 * np.pi * np.arange(classes) / classes
    circle, height = 0.5 * np.stack([np.cos(angle), np.sin(angle)], 1), np.sqrt(0.75)
    features = np.column_stack([circle, np.full(classes, height)])
    support = Support(torch.from_numpy(features), torch.arange(classes), classes)
    probe = method("linear_probe")
    with torch.no_grad():
        ours = probe.fit(support, probe.configure({})).head(torch.from_numpy(features).float())

    cosines = 0.5 * circle @ (2 * circle[0])

    def loss(a: float) -> float:  # of the first image, with its share of |W|^2 / (2 C n)
        return logsumexp(a * cosines) - a * cosines[0] + 0.25 * a**2 / 200

    best = minimize_scalar(loss, bounds=(0, 1e4), method="bounded", options={"xatol": 1e-9}).x
    expected = best * cosines - logsumexp(best * cosines)
    assert np.abs(ours[0].double().log_softmax(0).numpy() - expected).max() < 1e-3


def test_linear_probe_says_that_it_was_stopped_before_the_optimum() -> None:
    support = Support(torch.randn(9, 8), torch.arange(9) % 3, 3)
    probe = method("linear_probe")
    fitted = probe.fit(support, probe.configure({"max_iter": 2}))
    assert fitted.notes == ["The solver stopped at max_iter = 2 steps."]


def test_linear_probe_of_one_class_has_one_column() -> None:
    probe = method("linear_probe")
    head = probe.fit(Support(torch.randn(3, 8), torch.zeros(3).long(), 1), probe.Config()).head
    assert head(torch.randn(5, 8)).tolist() == [[0.0]] * 5


def test_linear_probe_takes_its_strength() -> None:
    support = Support(torch.randn(9, 8), torch.arange(9) % 3, 3)
    probe = method("linear_probe")
    weak, strong = (probe.fit(support, probe.configure({"C": c})).head for c in (1e-3, 100.0))
    assert weak.weight.norm() < 0.05 * strong.weight.norm()


def test_linear_probe_chooses_the_strength_that_is_best_on_other_groups() -> None:
    """Labels of a few support images are wrong, so that a weak penalty fits the errors."""
    probe = method("linear_probe")
    features, labels, _ = problem((12, 12), 16)
    fresh, truth, _ = problem((40, 40), 16)
    fresh = fresh + 6 * np.random.default_rng(1).normal(size=fresh.shape)
    wrong = labels.copy()
    wrong[[0, 1, 12, 13]] = 1 - wrong[[0, 1, 12, 13]]
    fold = Fold(
        Support(torch.tensor(features).float(), torch.tensor(wrong), 2),
        torch.tensor(fresh),
        torch.tensor(truth),
    )
    scores = {}
    for strength in (100.0, 0.01, 0.1, 1.0, 10.0, 1e3, 1e4):
        oracle = LogisticRegression(C=strength, max_iter=1000).fit(unit(features), wrong)
        right = oracle.predict(unit(fresh)) == truth
        log = np.log(oracle.predict_proba(unit(fresh))[np.arange(len(truth)), truth])
        scores[strength] = (right.mean(), log.mean())
    best = max(scores, key=lambda c: scores[c])
    assert best != 100.0
    assert set(scores) == {*probe.grid["C"]}
    chosen = probe.choose([fold], probe.configure({}))
    assert best == chosen.C


# ------------------------------------------------------------------------------------------- LP++


def numpy_lp_plus_plus(
    features: Array, labels: Array, texts: Array, epochs: int = 300
) -> tuple[list[tuple[Array, Array, Array]], float, float]:
    """LP++ from its formulae, image by image; the path from the start, and both step sizes."""
    f, n, classes = unit(features), len(features), range(len(texts))
    weight = np.stack([f[labels == k].sum(0) for k in classes])
    means = [np.mean([f[i] @ texts[k] for i in np.flatnonzero(labels == k)]) for k in classes]
    alpha, bias = np.full(len(texts), 250 * np.mean(means)), np.zeros(len(texts))
    weight_rate = 4 * n / np.linalg.svd(f, compute_uv=False)[0] ** 2
    alpha_rate = n / (4 * max(sum((f[i] @ texts[k]) ** 2 for i in range(n)) for k in classes))
    path, moves = [(weight.copy(), alpha.copy(), bias.copy())], (0 * weight, 0 * bias)
    for epoch in range(epochs):
        gradient = [0 * weight, 0 * alpha, 0 * bias]
        for i in range(n):
            z = np.array([f[i] @ (weight[k] + alpha[k] * texts[k]) + bias[k] for k in classes])
            p = np.exp(z - z.max())
            p /= p.sum()
            p[labels[i]] -= 1
            gradient[0] += np.outer(p, f[i]) / n
            gradient[1] += p * (texts @ f[i]) / n
            gradient[2] += p / n
        moves = (0.9 * moves[0] + gradient[0], 0.9 * moves[1] + gradient[2])
        weight, bias = weight - weight_rate * moves[0], bias - weight_rate * moves[1]
        if epoch % 10 == 9:
            alpha = alpha - alpha_rate * gradient[1]
        path.append((weight.copy(), alpha.copy(), bias.copy()))
    return path, weight_rate, alpha_rate


@pytest.mark.parametrize(
    ("counts", "dim"), [((4, 4, 4), 24), ((7, 1, 3), 16), ((6, 5), 8), ((1, 1, 1), 12)]
)
def test_lp_plus_plus_takes_the_published_path(counts: tuple[int, ...], dim: int) -> None:
    features, labels, texts = problem(counts, dim, noise=2.0)
    expected, weight_rate, alpha_rate = numpy_lp_plus_plus(features, labels, texts)
    f, t = torch.from_numpy(unit(features)), torch.from_numpy(texts)
    rates = lp_plus_plus_rates(f[:, None], f[:, None] @ t.T)
    assert rates == pytest.approx((weight_rate, alpha_rate), rel=1e-9)
    path = list(lp_plus_plus_path(f[:, None], torch.from_numpy(labels), t, LpPlusPlusConfig()))
    assert len(path) == 301
    for mine, theirs in zip(path, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert np.abs(a.numpy() - b).max() < 1e-6 * max(1, np.abs(b).max())
    moved = np.abs(expected[-1][1] - expected[0][1]).max()
    assert moved > 1e-6  # alpha took steps too

    weight, alpha, bias = expected[-1]
    support = Support(torch.tensor(features), torch.tensor(labels), len(counts), t)
    fitted = method("lp_plus_plus").fit(support, LpPlusPlusConfig())
    logits = unit(features) @ (weight + alpha[:, None] * texts).T + bias
    actual = fitted.head(torch.tensor(features).float()).detach().numpy()
    assert fitted.head.normalize
    assert fitted.head.scale.item() == 1  # no temperature
    assert np.abs(actual - logits).max() < 1e-5 * max(1, np.abs(logits).max())
    assert fitted.facts["epoch"] == 300
    assert fitted.facts["weight_rate"] == pytest.approx(weight_rate)


def test_lp_plus_plus_keeps_the_latest_of_the_best_epochs_on_validation() -> None:
    features, labels, texts = problem((5, 2, 3), 16, noise=2.0)
    fresh, truth, _ = problem((9, 20, 4), 16, noise=2.0)
    path, _, _ = numpy_lp_plus_plus(features, labels, texts)
    scores = [-1.0]  # the start is no epoch
    for weight, alpha, bias in path[1:]:
        right = (unit(fresh) @ (weight + alpha[:, None] * texts).T + bias).argmax(1) == truth
        scores.append(round(float(np.mean([right[truth == k].mean() for k in range(3)])), 9))
    best = max(e for e, score in enumerate(scores) if score == max(scores))
    assert best < 300
    validation = (torch.tensor(fresh), torch.tensor(truth))
    support = Support(
        torch.tensor(features), torch.tensor(labels), 3, torch.tensor(texts), validation=validation
    )
    fitted = method("lp_plus_plus").fit(support, LpPlusPlusConfig())
    assert fitted.facts["epoch"] == best
    weight, alpha, _ = path[best]
    kept = fitted.head.weight.detach().numpy()
    assert np.abs(kept - (weight + alpha[:, None] * texts)).max() < 1e-4


def test_lp_plus_plus_without_an_epoch_is_its_start() -> None:
    features, labels, texts = problem((3, 2), 8)
    support = Support(torch.tensor(features), torch.tensor(labels), 2, torch.tensor(texts))
    head = method("lp_plus_plus").fit(support, LpPlusPlusConfig(epochs=0)).head
    weight, alpha, _ = numpy_lp_plus_plus(features, labels, texts, epochs=0)[0][0]
    assert np.abs(head.weight.detach().numpy() - (weight + alpha[:, None] * texts)).max() < 1e-4
    assert head.bias.abs().max() == 0


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=6),
    st.integers(2, 40),
    st.integers(0, 2**16),
    st.integers(2, 4),
)
@settings(max_examples=20)
def test_lp_plus_plus_starts_and_steps_alike_when_every_image_is_there_many_times(
    counts: list[int], dim: int, seed: int, times: int
) -> None:
    """Rates and alpha are of means, the weight is a sum: no number of shots is inferred."""
    features, labels, texts = problem(tuple(counts), dim, seed)
    t, config = torch.from_numpy(texts), LpPlusPlusConfig(epochs=0)
    starts = []
    for repeat in (1, times):
        f = torch.from_numpy(np.tile(unit(features), (repeat, 1)))
        y = torch.from_numpy(np.tile(labels, repeat))
        ((weight, alpha, _),) = lp_plus_plus_path(f[:, None], y, t, config)
        starts.append((weight / repeat, alpha, lp_plus_plus_rates(f[:, None], f[:, None] @ t.T)))
    assert torch.allclose(starts[0][0], starts[1][0])
    assert torch.allclose(starts[0][1], starts[1][1])
    assert starts[0][2] == pytest.approx(starts[1][2], rel=1e-6)


# ------------------------------------------------------------------- what trains, against numpy
#
# Each method's loss is written down once more, in numpy and complex-safe: a derivative is then
# Im loss(x + ih) / h, exact to the last digit, and the optimisers are written out below.

Parameters = dict[str, Array]


def length(values: Array) -> Any:
    return np.sqrt((values * values).sum(-1, keepdims=True))


def cosine(a: Array, b: Array) -> Any:
    return (a / length(a)) @ (b / length(b)).T


def cross_entropy(logits: Array, labels: Array) -> Any:
    shifted = logits - logits.real.max(-1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(-1))
    return (log_total - shifted[np.arange(len(labels)), labels]).mean()


def relu(values: Array) -> Array:
    return values * (values.real > 0)


SCALE = 20.0


def balanced_values(y: Array) -> Any:
    """One-hot rows, scaled so that every class sums to the mean number of images."""
    counts = np.bincount(y)
    return np.eye(len(counts))[y] * counts.mean() / counts


def confidence(x: Array, y: Array, t: Array) -> Array:
    z = np.exp(SCALE * cosine(x, t))
    right = (z / z.sum(1, keepdims=True))[np.arange(len(y)), y]
    return np.array([right[y == k].mean() for k in range(len(t))])


def zs_lp(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    return SCALE * cosine(x, 10 * t + p["shift"]), 0.0


def clap(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    w = 10 * t + p["shift"]
    distance = ((w - 10 * t) ** 2).sum(1)
    return SCALE * cosine(x, w), (confidence(x, y, t) * distance).sum() / len(t)


def taskres(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    return SCALE * cosine(x, 10 * t + 0.5 * p["shift"]), 0.0


def clip_adapter(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    f = x / length(x)
    narrow, wide = p["adapter.0.weight"], p["adapter.2.weight"]
    adapted = relu(relu(f @ narrow.T) @ wide.T)
    return SCALE * cosine(0.2 * adapted + 0.8 * f, t), 0.0


def tip_adapter_f(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    f = x / length(x)
    affinity = np.exp(-1.0 * (1 - f @ p["keys"].T))
    return SCALE * f @ t.T + 1.17 * affinity @ balanced_values(y), 0.0


def prolip(p: Parameters, x: Array, y: Array, t: Array) -> tuple[Array, Any]:
    start = np.eye(x.shape[1])[: t.shape[1]]
    return SCALE * cosine(x @ p["weight"].T, t), ((p["weight"] - start) ** 2).sum() * len(t) / len(
        y
    )


def gradient(loss: Callable[[Parameters], Any], at: Parameters) -> Parameters:
    result = {name: np.zeros_like(values) for name, values in at.items()}
    for name, values in at.items():
        for index in np.ndindex(values.shape):
            moved = {**at, name: values.astype(complex)}
            moved[name][index] += 1e-30j
            result[name][index] = loss(moved).imag / 1e-30
    return result


def numpy_train(
    loss: Callable[[Parameters], Any], start: Parameters, recipe: Mapping[str, Any], epochs: int
) -> tuple[Parameters, list[float]]:
    """SGD with momentum 0.9, Adam or AdamW: one step an epoch, warm-up and cosine by the epoch."""
    now = {name: values.astype(np.float64) for name, values in start.items()}
    first = {name: 0 * values for name, values in now.items()}
    second = {name: 0 * values for name, values in now.items()}
    losses = []
    for epoch in range(epochs):
        warm = recipe.get("warmup_epochs", 0)
        rate = recipe["lr"] * (1 + np.cos(np.pi * (epoch - warm) / epochs)) / 2
        if epoch < warm:
            rate = recipe["warmup_lr"]
        losses.append(float(loss(now).real))
        slope = gradient(loss, now)
        for name in now:
            if recipe["optimizer"] == "sgd":
                first[name] = 0.9 * first[name] + slope[name] + recipe["weight_decay"] * now[name]
                now[name] = now[name] - rate * first[name]
            else:
                if recipe["optimizer"] == "adam":
                    slope[name] = slope[name] + recipe["weight_decay"] * now[name]
                else:
                    now[name] = now[name] * (1 - rate * recipe["weight_decay"])
                first[name] = 0.9 * first[name] + 0.1 * slope[name]
                second[name] = 0.999 * second[name] + 0.001 * slope[name] ** 2
                mean = first[name] / (1 - 0.9 ** (epoch + 1))
                spread = np.sqrt(second[name] / (1 - 0.999 ** (epoch + 1)))
                now[name] = now[name] - rate * mean / (spread + recipe["eps"])
    return now, losses


FORMULAE: dict[str, tuple[Any, dict[str, Any]]] = {
    "zs_lp": (zs_lp, LP),
    "clap": (clap, LP),
    "taskres": (taskres, TASKRES),
    "clip_adapter": (clip_adapter, COOP),
    "tip_adapter_f": (tip_adapter_f, TIP),
    "prolip": (prolip, {**PROLIP, "lr": 1e-2}),  # else no number would move enough to tell
}


@pytest.mark.parametrize("name", FORMULAE)
def test_training_is_the_formula_under_the_published_optimiser(name: str) -> None:
    formula, constants = FORMULAE[name]
    x, y, t = problem((4, 1, 2), 8)
    given = Support(torch.tensor(x), torch.tensor(y), 3, torch.tensor(t), SCALE)
    chosen, config = method(name), method(name).configure({})
    module = chosen.build(given, config).double()
    exact = {"text.weight": t, "keys": unit(x), "values": balanced_values(y)}
    for key, values in exact.items():
        if key in module.state_dict():  # a head is made in fp32, this comparison is not
            module.state_dict()[key].copy_(torch.tensor(values))
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    start = {n: p.detach().numpy().copy() for n, p in trained.items()}

    def loss(parameters: Parameters) -> Any:
        logits, penalty = formula(parameters, x, y, t)
        return cross_entropy(logits, y) + penalty

    expected, losses = numpy_train(loss, start, constants, epochs=8)
    recipe = replace(chosen.recipe(4, config), epochs=8, lr=constants["lr"])
    log = fit(
        HeadStep(module, lambda: chosen.penalty(module, given, config)),
        [{"params": list(trained.values())}],
        TensorSource(given.features, given.labels),
        recipe,
        accelerator=Accelerator(cpu=True),
    )
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=1e-6)
    for key, values in expected.items():
        moved = np.abs(values - start[key]).max()
        assert moved > 0
        assert np.abs(trained[key].detach().numpy() - values).max() < 1e-6 * max(1, moved)

    head = chosen.finish(module.float(), given, config, None).head
    fresh = 2 * np.random.default_rng(5).normal(size=(20, 8))
    logits, _ = formula(expected, fresh, y, t)
    actual = head(torch.tensor(fresh).float()).detach().numpy()
    assert np.abs(actual - logits).max() < 1e-5 * SCALE


@pytest.mark.parametrize("name", ["zs_lp", "clap", "taskres", "prolip"])
def test_before_training_it_is_zero_shot(name: str) -> None:
    given = support_of((4, 1, 2), 16)
    module = method(name).build(given, method(name).configure({}))
    fresh = torch.randn(12, 16)
    cosines = nn.functional.normalize(fresh, dim=-1) @ given.prototypes.T  # type: ignore[union-attr]
    assert torch.allclose(module(fresh), 20 * cosines, atol=1e-4)
    head = method(name).finish(module, given, method(name).configure({}), None).head
    assert torch.allclose(head(fresh), 20 * cosines, atol=1e-4)


@given(st.integers(0, 2**16), st.sampled_from([(2, 2), (7, 1, 3), (1, 1, 1, 1)]))
@settings(max_examples=10)
def test_clap_holds_each_class_by_its_zero_shot_confidence(
    seed: int, counts: tuple[int, ...]
) -> None:
    x, y, t = problem(counts, 6, seed)
    held = Support(torch.tensor(x), torch.tensor(y), len(t), torch.tensor(t), SCALE)
    config = method("clap").configure({})
    module = method("clap").build(held, config)
    strength = confidence(x, y, t)
    assert np.abs(module.hold.numpy() - strength).max() < 1e-6
    shift = np.random.default_rng(seed).normal(size=t.shape)
    with torch.no_grad():
        module.shift.copy_(torch.tensor(shift))
    penalty = method("clap").penalty(module, held, config)
    assert penalty.item() == pytest.approx((strength * (shift**2).sum(1)).mean(), rel=1e-6)
    penalty.backward()
    slope = 2 * strength[:, None] * shift / len(t)
    assert np.abs(module.shift.grad.numpy() - slope).max() < 1e-6


def test_a_length_is_another_rate() -> None:
    """Ten times as long is a hundred times slower, which is how much the length matters."""
    given = support_of((4, 1, 2), 8)
    actual: list[Any] = []
    for length_, rate in ((10.0, 0.1), (1.0, 0.001)):
        config = method("zs_lp").configure({"length": length_})
        module = method("zs_lp").build(given, config)
        fit(
            HeadStep(module),
            [{"params": list(module.parameters()), "lr": rate}],
            TensorSource(given.features, given.labels),
            replace(method("zs_lp").recipe(4, config), epochs=10, warmup_epochs=0),
            accelerator=Accelerator(cpu=True),
        )
        actual.append(method("zs_lp").finish(module, given, config, None).head.weight)
    slow, same = actual
    assert torch.allclose(slow, same, atol=1e-5)
    assert (slow - given.prototypes).abs().max() > 1e-2


def test_clap_stays_nearer_to_the_texts_than_zs_lp() -> None:
    arguments = problem((8, 8, 8), 16, noise=2.0)
    heads: list[Any] = [adapt_features(name, *arguments).head for name in ("zs_lp", "clap")]
    near = [(h.weight.detach().numpy() * arguments[2]).sum(-1).mean() for h in heads]
    assert near[0] < near[1] - 0.01 < 0.99


# --------------------------------------------------------------------------- heads, one by one


@pytest.mark.parametrize("n", [1, 40])
def test_the_gradient_of_scaled_cosines_is_that_of_autograd(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    rows = 10 * torch.randn(n, 33, generator=generator)
    rows[0] = 0.0  # which has no direction
    texts = nn.functional.normalize(torch.randn(5, 33, generator=generator), dim=-1)
    labels = torch.arange(n) % 5
    plain, closed = (rows.clone().requires_grad_() for _ in range(2))
    for given_, logits in (
        (plain, 100.0 * nn.functional.normalize(plain, dim=-1) @ texts.T),
        (closed, ScaledCosines.apply(closed, texts, 100.0)),
    ):
        nn.functional.cross_entropy(logits, labels).backward()
        assert given_.grad is not None
    assert torch.equal(plain.grad, closed.grad)  # type: ignore[arg-type]
    assert (closed.grad[1:] != 0).all()  # type: ignore[index]


@pytest.mark.parametrize("n", [2, 40])
def test_clip_adapter_trains_by_the_gradient_of_autograd(n: int) -> None:
    drawn = torch.randn(n + 2, 33, generator=torch.Generator().manual_seed(n))
    texts, rows = nn.functional.normalize(drawn, dim=-1).split([2, n])
    labels = torch.arange(n) % 2
    given = Support(rows, labels, 2, texts, 20.0)
    closed = method("clip_adapter").build(given, method("clip_adapter").configure({"ratio": 0.9}))
    plain: Any = build_head(describe_head(closed), 33, 2)
    plain.load_state_dict(closed.state_dict())
    plain.text.requires_grad_(False)
    logits: list[torch.Tensor] = []
    rows[-1] = 0.0  # whose adapted feature has no direction
    for head in (plain, closed):
        logits.append(head.train().compare(rows))
        nn.functional.cross_entropy(logits[-1], labels).backward()
    nodes = [type(each.grad_fn).__name__ for each in logits]
    assert nodes == ["AddBackward0", "AdaptedCosinesBackward"]
    assert torch.equal(*logits)
    for name, weight in plain.adapter.named_parameters():
        slope = closed.get_parameter(f"adapter.{name}").grad
        assert slope is not None
        assert slope.count_nonzero() > 0
        assert torch.equal(slope, weight.grad)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):  # rounds as the plain head does
        assert torch.equal(closed.compare(rows), plain.compare(rows))
    closed.text.requires_grad_(True)
    closed.compare(rows).sum().backward()
    assert closed.text.weight.grad is not None


def test_classifier_has_the_published_layers() -> None:
    head = method("classifier").build(
        Support(torch.randn(6, 20), torch.arange(6) % 3, 3), method("classifier").configure({})
    )
    assert isinstance(head, MLPHead)
    layers: list[Any] = list(head.layers)
    linear, norm, _, dropout, last = layers
    assert [type(layer) for layer in head.layers] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
    ]
    assert (linear.in_features, linear.out_features) == (20, 512)
    assert norm.num_features == 512
    assert dropout.p == 0.5
    assert (last.in_features, last.out_features) == (512, 3)


@pytest.mark.parametrize(("dim", "hidden"), [(64, 16), (8, 2), (3, 1)])
def test_clip_adapter_trains_the_image_adapter_alone(dim: int, hidden: int) -> None:
    given = support_of((2, 1), dim)
    head = method("clip_adapter").build(given, method("clip_adapter").configure({}))
    assert isinstance(head, ResidualHead)
    trained = {n: tuple(p.shape) for n, p in head.named_parameters() if p.requires_grad}
    assert trained == {"adapter.0.weight": (hidden, dim), "adapter.2.weight": (dim, hidden)}
    assert head.text.scale == 20
    assert torch.equal(head.text.weight, given.prototypes)  # type: ignore[arg-type]


def test_tip_adapter_f_trains_the_keys_alone_from_the_support() -> None:
    given = support_of((3, 1), 8)
    head = method("tip_adapter_f").build(given, method("tip_adapter_f").configure({}))
    assert isinstance(head, CacheHead)
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["keys"]
    assert_same_numbers(head.keys, unit(given.features.numpy()))
    expected = torch.tensor([[2 / 3, 0]] * 3 + [[0, 2.0]])  # both classes sum to two images
    assert torch.allclose(head.value_matrix(), expected)
    assert (head.alpha.item(), head.beta.item()) == pytest.approx((1.17, 1.0))


def test_tip_adapter_f_searches_after_training_where_there_are_validation_labels() -> None:
    fresh, truth, _ = problem((9, 9, 9), 8, noise=3.0)
    validation = (torch.tensor(fresh).float(), torch.tensor(truth))
    given = support_of((4, 1, 2), 8, scale=2.0, validation=validation)
    tip = method("tip_adapter_f")
    config = tip.configure({})
    module = tip.build(given, config)
    with torch.no_grad():
        module.keys.add_(0.1 * torch.randn_like(module.keys))
    trained = module.keys.detach().numpy().astype(np.float64)
    fitted = tip.finish(module, given, config, None)
    alpha, beta = fitted.head.alpha.item(), fitted.head.beta.item()
    assert fitted.facts == {"alpha": pytest.approx(alpha), "beta": pytest.approx(beta)}
    assert (alpha, beta) != (pytest.approx(1.17), pytest.approx(1.0))
    assert_same_numbers(fitted.head.keys, trained)

    f, t = unit(fresh), given.prototypes.numpy().astype(np.float64)  # type: ignore[union-attr]

    def score(a: float, b: float) -> float:
        cached = np.exp(-b * (1 - f @ trained.T)) @ balanced_values(given.labels.numpy())
        right = (2 * f @ t.T + a * cached).argmax(1) == truth
        return float(np.mean([right[truth == k].mean() for k in range(3)]))

    assert score(alpha, beta) == max(score(a, b) for b in TIP_BETAS for a in TIP_ALPHAS)
    assert score(alpha, beta) > score(1.17, 1.0)
    without = tip.finish(tip.build(given, config), replace(given, validation=None), config, None)
    assert (without.head.alpha.item(), without.head.beta.item()) == pytest.approx((1.17, 1.0))


# ------------------------------------------------------------------------------------------ ProLIP


def trained_projection(given: Support) -> Any:
    module = method("prolip").build(given, method("prolip").configure({}))
    with torch.no_grad():
        module.weight.add_(0.2 * torch.randn_like(module.weight))
    return module


@pytest.mark.parametrize("joined", [False, True])
def test_prolip_leaves_its_projection_in_the_backbone(joined: bool) -> None:
    pooled, labels = torch.randn(6, 64 if joined else 32), torch.tensor([0, 0, 1, 1, 2, 2])
    texts = nn.functional.normalize(torch.randn(3, 32 if joined else 24), dim=-1)
    model, _ = load_backbone(tiny_pair() if joined else str(tiny_clip()))
    if joined:
        give_joint_space(model, pooled, labels, texts)
    projection = model.backbone.visual_projection
    before = copy.deepcopy(projection)
    parts: dict[str, Any] = {"projection": projection.weight.detach()}
    if joined:
        parts["projection_bias"] = projection.bias.detach()
    given = Support(pooled, labels, 3, texts, 30.0, **parts)
    module = trained_projection(given)
    expected = module(pooled)
    head = method("prolip").finish(module, given, method("prolip").configure({}), model).head
    assert model.backbone.visual_projection is projection
    assert torch.equal(projection.weight, module.weight)
    assert not torch.equal(projection.weight, before.weight)
    assert torch.allclose(head(model.project_images(pooled)), expected, atol=1e-4)
    assert head.cosine
    if joined:
        assert torch.equal(projection.bias, before.bias)


def test_prolip_on_bare_features_keeps_its_projection_in_the_head() -> None:
    given = support_of((3, 1), 8)
    module = trained_projection(given)
    head = method("prolip").finish(module, given, method("prolip").configure({}), None).head
    assert isinstance(head, ProjectedHead)
    assert torch.allclose(head(given.features), module(given.features), atol=1e-5)


@pytest.mark.parametrize(("setting", "strength"), [(None, 3 / 7), (0.25, 0.25)])
def test_prolip_pulls_by_one_over_the_shots_of_a_class(
    setting: float | None, strength: float
) -> None:
    given, prolip = support_of((4, 1, 2), 8), method("prolip")
    config = prolip.configure({} if setting is None else {"strength": setting})
    module = prolip.build(given, config)
    with torch.no_grad():
        module.weight += 0.5
    assert prolip.penalty(module, given, config).item() == pytest.approx(strength * 64 * 0.25)


def test_prolip_says_which_map_it_needs() -> None:
    given = replace(support_of((2, 2), 8), projection=torch.randn(8, 6))
    with pytest.raises(GloVLMError, match=r"expected one of shape \(8, 8\), found \(8, 6\)"):
        method("prolip").build(given, method("prolip").configure({}))


# ---------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(
    ("counts", "dim"), [((7, 1, 3), 24), ((1, 1), 8), ((1,) * 20, 16)], ids=str
)
@pytest.mark.parametrize("name", FEATURE_SIDE)
def test_any_support_gives_a_head_that_is_saved_whole(
    name: str, counts: tuple[int, ...], dim: int
) -> None:
    features, labels, texts = problem(counts, dim)
    fresh, truth, _ = problem((12,) * len(counts), dim)
    fitted = adapt_features(name, features, labels, texts)
    logits = fitted.predict_logits(fresh)
    assert logits.shape == (len(fresh), len(counts))
    assert np.isfinite(logits).all()
    if name != "classifier":  # 20 epochs from nothing on a few images
        assert (logits.argmax(1) == truth).mean() > 0.85

    again = build_head(describe_head(fitted.head), dim, len(counts))
    again.load_state_dict(fitted.head.state_dict())
    actual = again.eval()(torch.tensor(fresh).float()).detach().numpy()
    assert_same_numbers(actual, logits)
    assert all(isinstance(p, nn.Parameter) for p in fitted.head.parameters())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five epochs, where what is asked does not depend on their number."""
    for name in FEATURE_SIDE:
        chosen = METHODS[name]
        if isinstance(chosen, HeadMethod):
            recipe = replace(chosen.recipe(3, chosen.configure({})), epochs=5)
            monkeypatch.setattr(chosen, "recipe", lambda *_, recipe=recipe: recipe)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", FEATURE_SIDE)
def test_a_seed_decides_everything(name: str) -> None:
    features, labels, texts = problem((40, 2), 8)  # more than a batch of most
    first, second = (
        adapt_features(name, features, labels, texts, seed=5).predict_logits(features)
        for _ in range(2)
    )
    assert np.array_equal(first, second)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", FEATURE_SIDE)
def test_class_means_stand_in_where_there_is_no_text(name: str) -> None:
    features, labels, _ = problem((3, 2), 8)
    fitted = adapt_features(name, features, labels)
    assert np.isfinite(fitted.predict_logits(features)).all()
    assert bool(fitted.notes) == method(name).needs_text


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", FEATURE_SIDE)
def test_wide_features_are_as_good(name: str) -> None:
    features, labels, texts = problem((3, 1), 1024)
    logits = adapt_features(name, features, labels, texts).predict_logits(features)
    assert np.isfinite(logits).all()
    assert logits.shape == (4, 2)
