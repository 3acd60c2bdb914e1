"""Benchmark of the adaptation methods, each against the plain way."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...methods import METHODS, TowerMethod, get_method
from ...methods.closed_form import TIP_ALPHAS, TIP_BETAS, search_tip_adapter
from ...training import AdaptConfig, adapt, adapt_features
from ...training.losses import TowerStep
from .timing import Row, as_row, check_same, shortest
from .towers import Shape, class_words, draw_clusters, random_clip, synthetic_images


def bench_methods(
    *,
    shape: Shape | None = None,
    n_classes: int = 9,
    shots: int = 16,
    dim: int = 512,
    rows: int = 7180,
    loop_pairs: int = 40,
    images_per_class: int = 3,
    repeats: int = 3,
) -> list[Row]:
    """Benchmark of what the methods save, each as a ratio to the plain way inside this run.

    Args:
        shape: Of the random CLIP whose towers are timed.
        n_classes: Classes of the features and prompts.
        shots: Labelled features of each.
        dim: Width of the features.
        rows: Validation rows of Tip-Adapter's search.
        loop_pairs: Pairs of alpha and beta that the plain double loop does; extrapolated to all.
        images_per_class: Synthetic images of each class that `vanilla` trains on.
        repeats: Timings of each kind, of which the shortest counts.

    Raises:
        GloVLMError: A shortcut gives another result than the plain way.
    """
    shape = shape or Shape()
    return [
        *_bench_text_cut(shape, n_classes, repeats),
        *_bench_frozen_text(shape, n_classes, repeats),
        *_bench_replay(shape, images_per_class),
        *_bench_search(n_classes, shots, dim, rows, loop_pairs),
        *_bench_training_free(n_classes, shots, dim, repeats),
    ]


def _bench_text_cut(shape: Shape, n_classes: int, repeats: int) -> list[Row]:
    """A step of prompt tuning at the length of the longest prompt, and at the full context."""
    rows = []
    for tokens in (16, 4):
        model, processor = random_clip(shape)
        model.requires_grad_(False)
        method, classes = get_method("prompt_tuning"), class_words(n_classes)
        assert isinstance(method, TowerMethod)
        attached = method.attach(
            model, processor, classes, method.configure({"context_tokens": tokens})
        )
        step = TowerStep(attached, "prototypes")
        labels = torch.arange(n_classes)
        vectors = torch.randn(n_classes, model.config.vision_pooled_dim)
        weight = torch.ones(n_classes)

        def once(step: Any = step, vectors: Any = vectors, weight: Any = weight) -> Any:
            step.zero_grad()
            loss = step(vectors, labels, weight, len(labels))  # noqa: B023 - called at once
            loss.backward()
            return loss.item()

        short, cut = once(), shortest(once, repeats)
        length = step.text["input_ids"].shape[1]
        missing = shape.context - length
        pad = {"input_ids": processor.tokenizer.pad_token_id or 0, "attention_mask": 0}
        for name, value in pad.items():
            step.text[name] = torch.nn.functional.pad(step.text[name], (0, missing), value=value)
        long, full = once(), shortest(once, repeats)
        check_same(short, long, 1e-5, "prompt tuning with cut text")
        what = f"a step of prompt_tuning, {tokens} context tokens, {n_classes} classes"
        note = f"{what}: {length} long; ratio: times faster"
        rows += [
            as_row(f"methods.text_full_{tokens}", full, "s", None, f"{what}: {shape.context} long"),
            as_row(f"methods.text_cut_{tokens}", cut, "s", full / cut, note),
        ]
    return rows


def _bench_frozen_text(shape: Shape, n_classes: int, repeats: int) -> list[Row]:
    """Class texts of a text tower that does not change, encoded once or at every step."""
    model, processor = random_clip(shape)
    model.requires_grad_(False).backbone.visual_projection.requires_grad_(True)
    method = get_method("vanilla")
    assert isinstance(method, TowerMethod)
    frozen = method.configure({"vision_layers": 0, "text_layers": 0})
    attached = method.attach(model, processor, class_words(n_classes), frozen)
    seconds, losses = [], []
    for trains_text in (True, False):
        attached.trains_text = trains_text
        step = TowerStep(attached, "prototypes")
        vectors = torch.linspace(-1, 1, n_classes * model.config.vision_pooled_dim)
        vectors = vectors.reshape(n_classes, -1)

        def once(step: Any = step, vectors: Any = vectors) -> float:
            loss = step(vectors, torch.arange(n_classes), torch.ones(n_classes), n_classes)
            loss.backward()
            return float(loss.detach())

        losses.append(once())
        seconds.append(shortest(once, repeats))
    check_same(losses[0], losses[1], 1e-5, "text that is encoded once")
    what = f"a step on frozen towers, {n_classes} classes"
    note = f"{what}: texts once before; ratio: times faster"
    return [
        as_row("methods.text_each_step", seconds[0], "s", None, f"{what}: texts at every step"),
        as_row("methods.text_once", seconds[1], "s", seconds[0] / seconds[1], note),
    ]


def _bench_replay(shape: Shape, images_per_class: int) -> list[Row]:
    """An epoch of `vanilla` whose frozen blocks run once, and of the plain loop."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        support = synthetic_images(Path(folder), images_per_class, 5)
        for vision, text in ((4, 2), (2, 0)):
            settings = {"vision_layers": vision, "text_layers": text}
            seconds, losses = [], []
            for replay in (False, True):
                model, processor = random_clip(shape)
                adapted = adapt(
                    model,
                    "vanilla",
                    support,
                    processor=processor,
                    config=AdaptConfig(settings, {"epochs": 3, "lr": 1e-5}, replay=replay),
                )
                seconds.append(min(row["seconds"] for row in adapted.log))
                losses.append([row["loss"] for row in adapted.log])
            for plain, played in zip(*losses, strict=True):
                check_same(plain, played, 1e-5, "vanilla with frozen blocks run once")
            what = f"an epoch of vanilla, last {vision} vision and {text} text blocks train"
            what += f", {len(support)} synthetic images"
            name = f"methods.epoch_{vision}_{text}"
            played_as = f"{what}: frozen blocks run once; ratio: times faster"
            rows += [
                as_row(f"{name}_plain", seconds[0], "s", None, f"{what}: plain loop"),
                as_row(f"{name}_once", seconds[1], "s", seconds[0] / seconds[1], played_as),
            ]
    return rows


def _bench_search(n_classes: int, shots: int, dim: int, rows: int, loop_pairs: int) -> list[Row]:
    """Tip-Adapter's search over 200 betas and 20 alphas, and the double loop that it replaces."""
    features, labels, keys, owners, texts = draw_clusters(n_classes, shots, dim, rows)
    values = torch.nn.functional.one_hot(owners, n_classes).float()
    zero_shot, affinity = 100 * features @ texts.T, features @ keys.T

    def score(beta: float, alpha: float) -> float:
        cache = torch.exp(-beta * (1 - affinity)) @ values
        right = (zero_shot + alpha * cache).argmax(1) == labels
        return float(
            torch.stack([right[labels == k].float().mean() for k in range(n_classes)]).mean()
        )

    start = time.perf_counter()
    beta, alpha, best = search_tip_adapter(zero_shot, affinity, values, labels)
    ours = time.perf_counter() - start
    check_same(score(beta, alpha), best, 2.0 / rows * n_classes, "the search of tip_adapter")
    pairs = [(b, a) for b in TIP_BETAS for a in TIP_ALPHAS]
    start = time.perf_counter()
    for pair in pairs[:: max(1, len(pairs) // loop_pairs)][:loop_pairs]:
        score(*pair)
    loop = (time.perf_counter() - start) / loop_pairs * len(pairs)
    what = f"{len(pairs)} pairs of beta and alpha, {rows} rows, {len(keys)} keys"
    return [
        as_row("methods.search_loop", loop, "s", None, f"{what}: double loop, extrapolated"),
        as_row("methods.search", ours, "s", loop / ours, f"{what}: at once; ratio: times faster"),
    ]


def _bench_training_free(n_classes: int, shots: int, dim: int, repeats: int) -> list[Row]:
    """Every training-free method on bare features."""
    query, _, features, labels, texts = draw_clusters(n_classes, shots, dim, 500)
    rows = []
    for name, method in METHODS.items():
        if method.family != "training-free":
            continue
        given = {"query_features": query} if method.transductive else {}
        fit = partial(adapt_features, name, features, labels, texts, **given)
        what = f"{n_classes} classes x {shots} shots x {dim} dimensions"
        what += ", 500 queries" if method.transductive else ""
        rows.append(as_row(f"methods.{name}", shortest(fit, repeats), "s", None, what))
    return rows
