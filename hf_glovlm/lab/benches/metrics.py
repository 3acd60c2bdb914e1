"""Benchmark of the metrics: the bootstrap over groups against plain loops."""

import time
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import GloVLMError
from ...metrics import compute_metrics
from .timing import Row, as_row, shortest


def bench_metrics(
    *,
    n: int = 5000,
    n_groups: int = 50,
    n_classes: int = 5,
    n_resamples: int = 2000,
    loop_resamples: int = 20,
    seed: int = 0,
) -> list[Row]:
    """Benchmark of the bootstrap over groups, against plain loops over the resamples.

    Args:
        n: Predictions.
        n_groups: Patients they are of.
        n_classes: Classes.
        n_resamples: Resamples of the bootstrap.
        loop_resamples: Resamples of the loop; its time is extrapolated to `n_resamples`.
        seed: Draws predictions and resamples.

    Returns:
        Three rows; the `ratio` of a loop is its time over that of the bootstrap. The second loop
        shows what doing all resamples at once gains by itself.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes)) + np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    groups = rng.integers(n_groups, size=n)
    ids = [f"patient_{g}" for g in groups]

    def fast() -> dict[str, Any]:
        return compute_metrics(
            labels, probabilities, groups=ids, n_resamples=n_resamples, seed=seed
        )

    seconds = shortest(fast, 3)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    resamples = rng.integers(len(rows_of), size=(loop_resamples, len(rows_of)))
    what = f"{n_resamples} resamples of {n} predictions, {n_groups} groups, {n_classes} classes"
    rows = [as_row("metrics.bootstrap", seconds, "s", None, f"{what}: every metric, all intervals")]
    own = partial(compute_metrics, n_resamples=0)
    for name, point, by in (
        ("metrics.loop", plain_metrics, "scikit-learn"),
        ("metrics.loop_own", own, "our own point values"),
    ):
        point(labels, probabilities)  # imports
        start = time.perf_counter()
        for sampled in resamples:
            sample = np.concatenate([rows_of[g] for g in sampled])
            point(labels[sample], probabilities[sample])
        loop = (time.perf_counter() - start) / loop_resamples * n_resamples
        note = f"the same in a loop with {by}, extrapolated from {loop_resamples} resamples"
        rows.append(as_row(name, loop, "s", loop / seconds, f"{note}; ratio: times the bootstrap"))
    return rows


def plain_metrics(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, float]:
    """Compute the point values of one resample with scikit-learn, as a plain loop would.

    Args:
        labels: `[n]`, every class present.
        probabilities: `[n, K]`.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_auc`, `macro_f1`, `brier`, and `recall_k`,
        `specificity_k`, `auc_k` of every class k.
    """
    try:
        from sklearn import metrics
    except ImportError:
        raise GloVLMError(
            "The bench compares with scikit-learn, which is not installed: pip install "
            "'hf-glovlm[dev]'."
        ) from None

    predicted = probabilities.argmax(1)
    classes = range(probabilities.shape[1])
    confusion = metrics.confusion_matrix(labels, predicted, labels=list(classes))
    hit, actual, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    recall, specificity = hit / actual, 1 - (called - hit) / (len(labels) - actual)
    auc = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in classes]
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
        "macro_auc": float(np.mean(auc)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro")),
        "brier": float(((probabilities - np.eye(len(classes))[labels]) ** 2).sum(1).mean()),
        **{f"recall_{k}": float(recall[k]) for k in classes},
        **{f"specificity_{k}": float(specificity[k]) for k in classes},
        **{f"auc_{k}": float(auc[k]) for k in classes},
    }
