"""Prefetching: several threads read the parts of a slide, one batch ahead of the model."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

Part = TypeVar("Part")
Batch = TypeVar("Batch")

AHEAD = 1  # batches that are read, or being read, while the model works on the one before
MOST_THREADS = 8


def reading_threads() -> int:
    """Number of reading threads: half of this process's share of the cores, 1 to 8.

    The tower keeps the others; on two cores one thread reads.
    """
    return min(max(1, torch.get_num_threads() // 2), MOST_THREADS)


def read_batches(
    places: Sequence[Any] | NDArray[Any],
    read: Callable[[Any], Part],
    join: Callable[[list[Part]], Batch],
    *,
    batch_size: int,
    start: int = 0,
    threads: int | None = None,
) -> Generator[tuple[slice, Batch]]:
    """Read the parts of a slide in batches, in their order, one batch ahead.

    At most `AHEAD + 1` batches are held at a time, whatever the number of threads. The parts of a
    batch are shared out in runs of neighbours, as these lie in the same tiles of the file. Close
    the generator before the slide: its threads may still be reading.

    Args:
        places: Where the parts lie.
        read: Reads one part; called by several threads at a time.
        join: Makes a batch of the parts read; called by one thread at a time.
        batch_size: Parts at a time.
        start: The first that is read.
        threads: How many read; 0 reads only when a batch is asked for, in the caller's thread. By
            default `reading_threads()`.

    Yields:
        The rows of a batch, and what `join` made of it.

    Raises:
        Exception: Whatever `read` or `join` raised first, in the order of the places.
    """
    threads = reading_threads() if threads is None else threads
    firsts = range(start, len(places), batch_size)
    batches = [slice(i, min(i + batch_size, len(places))) for i in firsts]
    if threads == 0:
        for rows in batches:
            yield rows, join([read(place) for place in places[rows]])
        return

    def read_run(run: Sequence[Any] | NDArray[Any]) -> list[Part]:
        return [read(place) for place in run]

    waiting: deque[tuple[slice, Future[Batch]]] = deque()
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(1) as joiner:

        def prepare(rows: slice) -> Batch:
            size = -(-(rows.stop - rows.start) // threads)
            runs = [
                places[i : min(i + size, rows.stop)] for i in range(rows.start, rows.stop, size)
            ]
            read_by = map if len(runs) == 1 else readers.map
            return join([part for parts in read_by(read_run, runs) for part in parts])

        try:
            for rows in batches:
                waiting.append((rows, joiner.submit(prepare, rows)))
                if len(waiting) > AHEAD:
                    done, batch = waiting.popleft()
                    yield done, batch.result()
            while waiting:
                done, batch = waiting.popleft()
                yield done, batch.result()
        finally:
            for _, batch in waiting:  # after an error, or once closed, nobody wants them
                batch.cancel()
