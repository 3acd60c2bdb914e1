"""Benchmark of methods on features: each beside a plain loop, and all at a large size."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ...methods import METHODS, FeatureMethod, HeadMethod
from ...training import adapt_features
from .plain_heads import PLAIN_HEADS
from .timing import Row, as_row, check_same, one_thread, shortest_in_turn
from .towers import draw_clusters

ON_FEATURES = tuple(n for n, m in METHODS.items() if isinstance(m, FeatureMethod | HeadMethod))


def bench_heads(
    *,
    n_classes: int = 9,
    shots: int = 16,
    dim: int = 512,
    repeats: int = 2,
    trained: Sequence[str] = tuple(PLAIN_HEADS),
    large: tuple[int, int, int] = (100, 16, 768),
    queries: int = 2000,
) -> Iterator[Row]:
    """Benchmark of methods on features, on one thread.

    Args:
        n_classes: Classes of the features on which methods are compared with a plain loop.
        shots: Labelled features of each.
        dim: Width of the features.
        repeats: Timings of each kind in turn, of which the shortest counts.
        trained: The methods that are compared, of `PLAIN_HEADS`.
        large: Classes, shots and width at which every method is timed.
        queries: Rows that a transductive method labels together there.

    Raises:
        GloVLMError: A method gives other logits than its plain loop.
    """
    fresh, _, features, labels, texts = draw_clusters(n_classes, shots, dim, 200)
    size = f"{n_classes} classes x {shots} shots x {dim} dimensions"
    for name in trained:
        plain = partial(PLAIN_HEADS[name], features, labels, texts)
        settings = {"dropout": 0.0} if name == "classifier" else {}  # nothing else is random
        ours = partial(adapt_features, name, features, labels, texts, method_config=settings)
        with one_thread():
            apart = torch.as_tensor(ours().predict_logits(fresh)) - plain()(fresh)
            check_same(0.0, float(apart.detach().abs().max()), 1e-2, f"the training of {name}")
            by_loop, taken = shortest_in_turn([plain, ours], repeats)
        note = f"{name}, {size}; ratio: times faster than the loop"
        yield as_row(
            f"methods.heads_{name}_loop", by_loop, "s", None, f"{name}, {size}: plain loop"
        )
        yield as_row(f"methods.heads_{name}", taken, "s", by_loop / taken, note)

    query, _, features, labels, texts = draw_clusters(*large, queries)
    size = "{} classes x {} shots x {} dimensions".format(*large)
    seconds: dict[str, float] = {}
    for name in ON_FEATURES:
        transductive = METHODS[name].transductive
        given = {"query_features": query} if transductive else {}
        with one_thread():
            start = time.process_time()
            adapt_features(name, features, labels, texts, **given)
            seconds[name] = time.process_time() - start
        what = f"{name}, {size}{f', {queries} queries' * transductive}: seconds of one core"
        short = f"{name}_{queries}" if transductive else f"large_{name}"
        yield as_row(f"methods.{short}", seconds[name], "s", None, what)
    slowest = max(seconds, key=lambda name: seconds[name])
    what = f"{slowest}, the slowest of {len(seconds)} methods on features, {size}"
    yield as_row("methods.slowest_head", seconds[slowest], "s", None, what)
