"""Timing of benches: ratios measured inside one run.

Seconds depend on the machine and on what else it does; a ratio of two timings taken one after the
other depends on it far less.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import GloVLMError

Row = dict[str, Any]  # name, value, unit, ratio, what


def as_row(name: str, value: float, unit: str, ratio: float | None, what: str) -> Row:
    """A row, with as many digits as a timing is worth."""
    value, ratio = float(f"{value:.3g}"), ratio and float(f"{ratio:.3g}")
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "what": what}


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
