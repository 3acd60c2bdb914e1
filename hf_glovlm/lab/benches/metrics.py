"""Benchmark of the metrics: the bootstrap over groups against plain loops."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import GloVLMError
from ...metrics import compute_metrics
from ...roc import Ranks, count_wins, rank_class, weigh_ranks
from .timing import Row, as_row, check_same, shortest, shortest_in_turn

Floats = NDArray[np.float64]


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
    labels, probabilities, groups = _draw(rng, n, n_groups, n_classes)
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


def bench_auc(
    *,
    sizes: tuple[int, ...] = (1000, 10_000),
    n_groups: int = 50,
    n_classes: int = 5,
    n_resamples: int = 2000,
    repeats: int = 3,
    seed: int = 0,
) -> Iterator[Row]:
    """Benchmark of areas under ROC curves in all resamples: wins counted once against ranks.

    Args:
        sizes: Predictions.
        n_groups: Patients they are of.
        n_classes: Classes.
        n_resamples: Resamples of the bootstrap.
        repeats: Timings of each way, of which the shortest counts.
        seed: Draws predictions and resamples.

    Yields:
        A row for each size; its `ratio` is the time of the ranks, cumulated anew in every
        resample, over that of the counts.
    """
    rng = np.random.default_rng(seed)
    for n in sizes:
        labels, probabilities, groups = _draw(rng, n, n_groups, n_classes)
        even = [1 / n_groups] * n_groups
        weights = rng.multinomial(n_groups, even, size=n_resamples).T.astype(np.float64)
        step = max(1, 1_000_000 // n)
        parts = [weights[:, i : i + step] for i in range(0, n_resamples, step)]
        ranks = [
            rank_class(scores, labels == c, groups) for c, scores in enumerate(probabilities.T)
        ]
        count, cumulate = partial(_count, ranks, parts), partial(_cumulate, ranks, parts)
        check_same(0, float(np.abs(count() - cumulate()).max()), 0, "Counting wins")
        fast, plain = shortest_in_turn([count, cumulate], repeats)
        note = f"{n_resamples} resamples of {n} predictions, {n_groups} groups, {n_classes} classes"
        note += ": every area by wins counted once; ratio: ranks cumulated in every resample"
        yield as_row(f"metrics.auc_{n}", fast, "s", plain / fast, note)


def _count(ranks: Sequence[Ranks], parts: Sequence[Floats]) -> Floats:
    """Wins `[K, R]` by tables `[G, G]` of each class, from weights `[G, ...]` of R in all."""
    tables = [count_wins(one, len(parts[0])) for one in ranks]
    return np.array([np.hstack([(w * (table @ w)).sum(0) for w in parts]) for table in tables])


def _cumulate(ranks: Sequence[Ranks], parts: Sequence[Floats]) -> Floats:
    """The same along the ranks."""
    return np.array([np.hstack([weigh_ranks(one, w) for w in parts]) for one in ranks])


def _draw(
    rng: np.random.Generator, n: int, n_groups: int, n_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Labels `[n]`, probabilities `[n, K]` and groups `[n]`."""
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes)) + np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probabilities, rng.integers(n_groups, size=n)


def plain_metrics(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, float]:
    """Compute the point values of one resample with scikit-learn, as a plain loop would.

    Args:
        labels: `[n]`, every class present.
        probabilities: `[n, K]`.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_auc`, `auprc`, `macro_f1`, `brier`, `nll`, and
        `recall_k`, `specificity_k`, `auc_k`, `auprc_k` of every class k.
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
    precision = [metrics.average_precision_score(labels == k, probabilities[:, k]) for k in classes]
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
        "macro_auc": float(np.mean(auc)),
        "auprc": float(np.mean(precision)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro")),
        "brier": float(((probabilities - np.eye(len(classes))[labels]) ** 2).sum(1).mean()),
        "nll": float(metrics.log_loss(labels, probabilities, labels=list(classes))),
        **{f"recall_{k}": float(recall[k]) for k in classes},
        **{f"specificity_{k}": float(specificity[k]) for k in classes},
        **{f"auc_{k}": float(auc[k]) for k in classes},
        **{f"auprc_{k}": float(precision[k]) for k in classes},
    }
