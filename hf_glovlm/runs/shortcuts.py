"""Shortcut probe: whether labels can be predicted from file statistics alone.

A plain classifier learns the label from what says nothing of the tissue, never from a group that it
is tested on. Where that succeeds, a model may learn the same, and its accuracy on such images says
less than it seems to.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ..data.file_statistics import SHORTCUTS, STATISTICS, FileStatistics
from ..metrics import compute_metrics

__all__ = ["LIMIT", "describe_probe", "fit_predict", "probe_labels"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LIMIT = 0.60  # a probe is flagged where the lower bound of its AUC is above
LEAST_GROUPS = 8  # of a class that is flagged by itself: of fewer, an interval errs too often
FOLDS = 10
MAX_PAIRS = 10  # pairs of classes that are named
_CLIP = 4.0  # standard deviations
_PENALTY = 1.0
_WORDS = {
    "size": "size in pixels",
    "compression": "compression",
    "blur": "blur",
    "magnification": "magnification (texture scale)",
}


def fit_predict(
    train_values: Floats, train_labels: Ints, test_values: Floats, n_classes: int
) -> Floats:
    """Multinomial logistic regression with a ridge penalty, all classes weighed alike.

    Values are standardised by the training rows and cut at four standard deviations; a missing one
    is their median, beside a column that says so.

    Args:
        train_values: `[n, f]`, NaN where missing.
        train_labels: `[n]`, 0 ... K-1.
        test_values: `[m, f]`.
        n_classes: K.

    Returns:
        Probabilities `[m, K]`; alike for all classes where no value differs.
    """
    train, test = _standardise(train_values, test_values)
    present = np.bincount(train_labels, minlength=n_classes)
    if not train.shape[1] or np.count_nonzero(present) < 2:
        return np.full((len(test_values), n_classes), 1 / n_classes)
    weight = 1 / (present[train_labels] * np.count_nonzero(present))
    own = np.eye(n_classes)[train_labels]
    penalty = _PENALTY / len(train)

    def loss(flat: Floats) -> tuple[float, Floats]:
        of = flat.reshape(-1, n_classes)
        logs = log_softmax(train @ of[1:] + of[0], axis=1)
        errors = (np.exp(logs) - own) * weight[:, None]
        gradient = np.vstack([errors.sum(0), train.T @ errors + penalty * of[1:]])
        value = -(weight * logs[own > 0]).sum() + penalty / 2 * np.square(of[1:]).sum()
        return float(value), gradient.ravel()

    start = np.zeros((train.shape[1] + 1) * n_classes)
    of = minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(-1, n_classes)
    return np.asarray(softmax(test @ of[1:] + of[0], axis=1))


def _standardise(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both tables by the columns of the first one, without those that do not differ there."""
    missing = np.isnan(train)
    kept = ~missing.all(axis=0)
    train, test, missing = train[:, kept], test[:, kept], missing[:, kept]
    median = np.nanmedian(train, axis=0) if kept.any() else np.empty(0)
    both = [
        np.column_stack([np.where(np.isnan(one), median, one), np.isnan(one)])
        for one in (train, test)
    ]
    mean, spread = both[0].mean(0), both[0].std(0)
    differ = spread > 1e-9 * (1 + np.abs(mean))
    scaled = [(one[:, differ] - mean[differ]) / spread[differ] for one in both]
    return np.clip(scaled[0], -_CLIP, _CLIP), np.clip(scaled[1], -_CLIP, _CLIP)


def probe_labels(
    statistics: FileStatistics,
    labels: Sequence[int],
    classes: Sequence[str],
    groups: Sequence[str],
    *,
    n_resamples: int = 1000,
) -> dict[str, Any]:
    """Shortcut probe: AUC of file statistics for the label, cross-validated over groups.

    One classifier for each group of statistics, and their geometric mean for all together. Ten
    folds; nobody is on both sides of one. Flagged is a probe whose AUC has its lower bound above
    `LIMIT`: over all classes (macro, one against the rest); and of all statistics together also
    for one class that lies in `LEAST_GROUPS` groups or more.

    Args:
        statistics: Of the images.
        labels: Class of each, `[n]`.
        classes: Names of the classes.
        groups: Patient of each, `[n]`.
        n_resamples: Bootstrap resamples over groups.

    Returns:
        `value`, `ci95`, `classes` (of each the same), `groups` (of each group of statistics the
        same, with `title` and `statistics`), `pairs` (of classes, most separated first), `flags`,
        `flagged`, `carriers` (groups of statistics that alone predict what is flagged most, the
        strongest first), `limit`, `n`, `n_groups`, `folds`, `left_out` (classes in a single
        group), `too_few` (in fewer than `LEAST_GROUPS`) and `note`.
    """
    given, ids = np.asarray(labels), np.asarray(groups)
    held = [len({*ids[given == k]}) for k in range(len(classes))]
    kept = [k for k, n in enumerate(held) if n > 1]
    result: dict[str, Any] = {
        "value": None, "ci95": None, "classes": {}, "groups": {}, "pairs": [], "flags": [],
        "flagged": False, "carriers": [], "limit": LIMIT, "n": 0, "n_groups": 0, "folds": 0,
        "left_out": [classes[k] for k, n in enumerate(held) if n == 1],
        "too_few": [classes[k] for k in kept if held[k] < LEAST_GROUPS], "note": "",
    }  # fmt: skip
    if len(kept) < 2:
        result["note"] = (
            "Not computed: fewer than two classes lie in two groups, so none could be learned from "
            "some and tested on others."
        )
        return result
    rows = np.flatnonzero(np.isin(given, kept))
    y = np.searchsorted(kept, given[rows])
    names, ids = [classes[k] for k in kept], ids[rows]
    folds = _fold_groups(y, ids, len(names))
    chosen, logs = statistics.select(rows), {}
    for group in SHORTCUTS:
        of = chosen.of(group)
        logs[group] = _cross_validate(of.features(), y, folds, len(names))
        entry = _measure(y, logs[group], ids, names, n_resamples)
        if np.ptp(logs[group], axis=1).max() < 1e-9:
            entry["note"] = "all images are alike in these"
        entry |= {"title": _WORDS[group], "statistics": [STATISTICS[s].title for s in of.names]}
        result["groups"][group] = entry
    together = log_softmax(np.mean(list(logs.values()), axis=0), axis=1)
    result |= _measure(y, together, ids, names, n_resamples)
    result |= {"n": len(rows), "n_groups": len({*ids}), "folds": int(folds.max()) + 1}
    result["pairs"] = _pairs(y, together, logs, ids, names, n_resamples)
    result["flags"] = _flags(result)
    result["flagged"] = bool(result["flags"])
    result["carriers"] = _carriers(result)
    return result


def _fold_groups(labels: Ints, groups: NDArray[Any], n_classes: int) -> Ints:
    """Fold of each row: a group is in one, and each class is spread over them all."""
    ids, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(ids), n_classes))
    np.add.at(counts, (group, labels), 1)
    shares = counts / counts.sum(0)
    order = np.random.default_rng(0).permutation(len(ids))
    order = order[np.argsort(-shares[order].max(1), kind="stable")]
    filled, fold = np.zeros((min(FOLDS, len(ids)), n_classes)), np.zeros(len(ids), np.int64)
    for one in order:
        load = filled @ shares[one] + 1e-6 * filled.sum(1)
        fold[one] = np.argmin(load)
        filled[fold[one]] += shares[one]
    return fold[group]


def _cross_validate(values: Floats, labels: Ints, folds: Ints, n_classes: int) -> Floats:
    """Logarithms of the probabilities of each row by a classifier without its fold, `[n, K]`."""
    logs = np.empty((len(labels), n_classes))
    for fold in range(folds.max() + 1):
        test = folds == fold
        predicted = fit_predict(values[~test], labels[~test], values[test], n_classes)
        logs[test] = np.log(np.maximum(predicted, 1e-12))
    return logs


def _measure(
    labels: Ints, logs: Floats, groups: NDArray[Any], names: Sequence[str], n_resamples: int
) -> dict[str, Any]:
    """AUC of all classes and of each, with intervals over groups."""
    measured = compute_metrics(
        labels,
        softmax(logs, axis=1),
        groups=groups.tolist(),
        class_names=names,
        n_resamples=n_resamples,
    )
    macro, each = measured["metrics"]["macro_auc"], measured["per_class"]
    return {
        "value": macro["value"],
        "ci95": macro["ci95"],
        "classes": {
            name: {"value": of["auc"]["value"], "ci95": of["auc"]["ci95"]}
            for name, of in each.items()
        },
        "note": macro["note"],
    }


def _pairs(
    labels: Ints,
    together: Floats,
    logs: Mapping[str, Floats],
    groups: NDArray[Any],
    names: Sequence[str],
    n_resamples: int,
) -> list[dict[str, Any]]:
    """Pairs of classes that are most separated, where there are more than two classes."""
    if len(names) < 3:
        return []

    def measure(a: int, b: int, of: Floats, n: int) -> dict[str, Any]:
        rows = np.isin(labels, (a, b))
        pair = [names[a], names[b]]
        entry = _measure(
            (labels[rows] == b).astype(int), of[rows][:, [a, b]], groups[rows], pair, n
        )
        return {"value": entry["value"], "ci95": entry["ci95"]}

    pairs = [(a, b) for a, b in combinations(range(len(names)), 2)]
    values = [_pair_auc(labels, together, a, b) for a, b in pairs]
    strongest = sorted(zip(values, pairs, strict=True), key=lambda one: (-one[0], one[1]))
    return [
        {
            "classes": [names[a], names[b]],
            **measure(a, b, together, n_resamples),
            "groups": {group: _pair_auc(labels, of, a, b) for group, of in logs.items()},
        }
        for _, (a, b) in strongest[:MAX_PAIRS]
    ]


def _pair_auc(labels: Ints, logs: Floats, a: int, b: int) -> float:
    """AUC of one class against another (Mann-Whitney; a tie is half a win)."""
    margin = logs[:, b] - logs[:, a]
    one, other = np.sort(margin[labels == a]), margin[labels == b]
    below = np.searchsorted(one, other, "left") + np.searchsorted(one, other, "right")
    return float(below.mean() / (2 * len(one)))


def _flags(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Probes whose lower bound is above the limit."""
    single = result["classes"] if len(result["classes"]) > 2 else {}  # of two, the same number
    tested = [
        *(("all", name, of) for name, of in single.items() if name not in result["too_few"]),
        *((group, None, of) for group, of in {"all": result, **result["groups"]}.items()),
    ]
    return [
        {"statistics": group, "class": name, "value": of["value"], "ci95": of["ci95"]}
        for group, name, of in tested
        if of["ci95"] is not None and of["ci95"][0] > LIMIT
    ]


def _carriers(result: Mapping[str, Any]) -> list[str]:
    """Groups of statistics that alone predict what is flagged most, strongest first."""
    if not result["flags"]:
        return []
    name = _strongest(result["flags"])["class"]
    values = {
        group: (probe if name is None else probe["classes"][name])["value"]
        for group, probe in result["groups"].items()
    }
    return sorted((g for g, value in values.items() if value > LIMIT), key=lambda g: -values[g])


def _strongest(flags: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The flag whose lower bound is highest."""
    return max(flags, key=lambda flag: float(flag["ci95"][0]))


def describe_probe(probe: Mapping[str, Any]) -> str:
    """The probe in a sentence."""
    if probe["value"] is None:
        return str(probe["note"])
    if not probe["flagged"]:
        return (
            f"No shortcut is flagged: file statistics alone predict the class with an AUC of "
            f"{probe['value']:.2f} (.50 is chance), and no lower bound is above {LIMIT:.2f}."
        )
    best = _strongest(probe["flags"])
    what = "the class" if best["class"] is None else f"the class {best['class']}"
    words = [probe["groups"][group]["title"] for group in probe["carriers"]]
    carried = f"; carried by {', '.join(words)}" if words else ""
    if probe["pairs"] and (pair := probe["pairs"][0])["value"] > LIMIT:
        carried += f"; best parted are {' and '.join(pair['classes'])} ({pair['value']:.2f})"
    return (
        f"A shortcut is flagged: file statistics alone predict {what} with an AUC of "
        f"{best['value']:.2f} [{best['ci95'][0]:.2f}, {best['ci95'][1]:.2f}] on groups that were "
        f"not learned from{carried}."
    )
