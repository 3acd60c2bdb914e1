"""Timing of benches: ratios measured inside one run.

Seconds depend on the machine and on what else it does; a ratio of two timings taken one after the
other depends on it far less.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import GloVLMError

Row = dict[str, Any]  # name, value, unit, ratio, what


class UnavailableError(GloVLMError):
    """A bench, or one row of it, that this machine cannot run; the sentence says why."""


def as_row(name: str, value: float | None, unit: str, ratio: float | None, what: str) -> Row:
    """A row, with as many digits as a timing is worth; without a value, `what` says why."""
    value, ratio = _rounded(value), _rounded(ratio)
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "what": what}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def shortest(work: Callable[[], object], repeats: int) -> float:
    """Shortest time of several calls in seconds: other work on the machine only adds time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def shortest_in_turn(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest time of each of several works that take turns, in seconds."""
    rounds = [[shortest(work, 1) for work in works] for _ in range(repeats)]
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def check_same(one: float, other: float, tolerance: float, what: str) -> None:
    """Check that a shortcut computes the same as the plain way."""
    if abs(one - other) > tolerance:
        raise GloVLMError(f"{what} gives {other}, the plain way {one}: report this as a bug.")


def synchronise(device: Any) -> None:
    """Wait for what a GPU still has to do: a call to it returns before the work is done."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, whose time depends less on what else the machine does."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
