"""Ratios measured inside one run on this machine: what the package's own ways gain or cost.

Seconds depend on the machine and on what else it does; a ratio of two timings taken one after the
other depends on it far less. The images are drawings, and no quality is measured here.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GloVLMError, nearest

__all__ = ["BENCHES", "bench_cache", "bench_encode", "bench_metrics", "run_benches"]

Row = dict[str, Any]  # name, value, unit, ratio, what


def bench_metrics(
    *,
    n: int = 5000,
    n_groups: int = 50,
    n_classes: int = 5,
    n_resamples: int = 2000,
    loop_resamples: int = 20,
    seed: int = 0,
) -> list[Row]:
    """Time the bootstrap over groups, and plain loops over the resamples.

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
    from .metrics import compute_metrics

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

    seconds = _shortest(fast, 3)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    drawn = rng.integers(len(rows_of), size=(loop_resamples, len(rows_of)))
    what = f"{n_resamples} resamples of {n} predictions, {n_groups} groups, {n_classes} classes"
    rows = [_row("metrics.bootstrap", seconds, "s", None, f"{what}: every metric, all intervals")]
    own = partial(compute_metrics, n_resamples=0)
    for name, point, by in (
        ("metrics.loop", plain_metrics, "scikit-learn"),
        ("metrics.loop_own", own, "our own point values"),
    ):
        point(labels, probabilities)  # imports
        start = time.perf_counter()
        for of in drawn:
            sample = np.concatenate([rows_of[g] for g in of])
            point(labels[sample], probabilities[sample])
        loop = (time.perf_counter() - start) / loop_resamples * n_resamples
        said = f"the same in a loop with {by}, extrapolated from {loop_resamples} resamples"
        rows.append(_row(name, loop, "s", loop / seconds, f"{said}; ratio: times the bootstrap"))
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


def bench_cache(
    *, backbone: str = "mini", n_patients: int = 8, per_patient: int = 10, repeats: int = 3
) -> list[Row]:
    """Time encoding drawings with an empty feature cache, and again from the cache.

    Args:
        backbone: As `--backbone` takes it.
        n_patients: Patients drawn.
        per_patient: Drawings of each.
        repeats: Timings of each kind, of which the shortest counts.

    Returns:
        Two rows; the warm one's `ratio` is the cold time over the warm one.

    Raises:
        GloVLMError: The features of the cache are not those that were computed.
    """
    from .backbones import load_backbone
    from .inference import FeatureCache, embed_images

    model, processor = load_backbone(backbone)
    with tempfile.TemporaryDirectory() as folder:
        images = _drawings(Path(folder), n_patients, per_patient)
        caches = [FeatureCache(Path(folder) / f"cache-{i}") for i in range(repeats + 1)]
        cold = embed_images(model, processor, images, cache=caches[0])  # and first-call costs
        empty = iter(caches[1:])
        slow = _shortest(lambda: embed_images(model, processor, images, cache=next(empty)), repeats)
        fast = _shortest(lambda: embed_images(model, processor, images, cache=caches[0]), repeats)
        warm = embed_images(model, processor, images, cache=caches[0])
    if not np.array_equal(cold, warm):
        raise GloVLMError(
            "The cached features differ from the computed ones: report this as a bug."
        )
    what = f"{len(images)} drawings, {model.config.backbone_name or backbone}"
    return [
        _row("cache.cold", slow, "s", None, f"{what}: decoded, encoded and stored"),
        _row("cache.warm", fast, "s", slow / fast, f"{what}: looked up; ratio: times faster"),
    ]


def bench_encode(
    *,
    backbone: str = "mini",
    n_patients: int = 8,
    per_patient: int = 10,
    batch_size: int = 32,
    repeats: int = 3,
) -> list[Row]:
    """Time `embed_images` without a cache, and the bare transformers vision tower.

    The bare tower gets tensors that are preprocessed already: it is the bound that reading,
    decoding and preprocessing in a thread can reach, not an alternative.

    Args:
        backbone: As `--backbone` takes it.
        n_patients: Patients drawn.
        per_patient: Drawings of each.
        batch_size: Images at a time, in both.
        repeats: Timings of each kind, of which the shortest counts.

    Returns:
        Two rows; the `ratio` of `embed_images` is its rate over that of the bare tower.
    """
    import torch

    from .backbones import load_backbone
    from .data import open_image
    from .inference import embed_images

    model, processor = load_backbone(backbone)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        images = _drawings(Path(folder), n_patients, per_patient)
        pictures = [open_image(value) for value in images["image"]]
        inputs = dict(processor(images=pictures, return_tensors="pt"))
        batches = [
            {name: tensor[i : i + batch_size] for name, tensor in inputs.items()}
            for i in range(0, len(pictures), batch_size)
        ]

        def bare() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model.backbone.vision_model(**batch)

        bare()

        def whole() -> None:
            embed_images(model, processor, images, batch_size=batch_size)

        bound, ours = _shortest(bare, repeats), _shortest(whole, repeats)
    what = f"{len(pictures)} drawings, {model.config.backbone_name or backbone}"
    return [
        _row("encode.bare", len(pictures) / bound, "images/s", None, f"{what}: tower on tensors"),
        _row(
            "encode.embed_images",
            len(pictures) / ours,
            "images/s",
            bound / ours,
            f"{what}: from files on disk; ratio: part of the bare tower's rate",
        ),
    ]


BENCHES: dict[str, Callable[..., list[Row]]] = {
    "metrics": bench_metrics,
    "cache": bench_cache,
    "encode": bench_encode,
}


def run_benches(names: Sequence[str] = (), *, backbone: str = "mini") -> list[Row]:
    """Run benches one after the other.

    Args:
        names: Of `BENCHES`; all when empty.
        backbone: For those that encode.

    Returns:
        Rows `name`, `value`, `unit`, `ratio` (or `None`) and `what`.

    Raises:
        GloVLMError: There is no such bench.
    """
    for name in names:
        if name not in BENCHES:
            raise GloVLMError(
                f"Expected a bench of {', '.join(BENCHES)}, found '{name}'.{nearest(name, BENCHES)}"
            )
    options = {"metrics": {}, "cache": {"backbone": backbone}, "encode": {"backbone": backbone}}
    return [row for name in names or BENCHES for row in BENCHES[name](**options[name])]


def _drawings(folder: Path, n_patients: int, per_patient: int) -> Any:
    """Rows of a small drawn cohort on disk."""
    from .data import load_dataset
    from .data.phantoms import write_cohort

    cohort = write_cohort(folder / "cohort", n_patients, per_patient, seed=0)
    return load_dataset(cohort)["all"]


def _shortest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls: what others do on the machine only adds time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _row(name: str, value: float, unit: str, ratio: float | None, what: str) -> Row:
    """A row, with as many digits as a timing is worth."""
    value, ratio = float(f"{value:.3g}"), ratio and float(f"{ratio:.3g}")
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "what": what}
