"""Benchmark of the search for near-duplicate images: time by their number, and memory."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...environment import peak_memory
from ...errors import GloVLMError
from .timing import Row, as_row, shortest_in_turn

KINDS = {
    "distinct": "images that have nothing in common",
    "equal": "equal images",
    "clustered": "images in 20 clusters of noisy copies",
}
_WIDTH = 16 * 16 * 3  # of a thumbnail


def bench_near_duplicates(
    *,
    n: int = 100_000,
    kinds: Sequence[str] = tuple(KINDS),
    repeats: int = 2,
    seed: int = 0,
) -> Iterator[Row]:
    """Benchmark of `data.near_duplicates`, on codes and thumbnails that are drawn.

    Args:
        n: Images.
        kinds: Of `KINDS`.
        repeats: Timings of each, of which the shortest counts.
        seed: Draws the images.

    Yields:
        For each kind a row in seconds, whose `ratio` is that to half of the images (2 is
        linear), and a row in MiB of a process of its own: its peak above the import, the codes and
        thumbnails themselves included.
    """
    from ...data.near_duplicates import link_near_duplicates

    for kind in kinds:
        what = KINDS[kind]
        images = draw_images(kind, n, seed)
        half = tuple(values[: n // 2] for values in images)
        works = [lambda given=given: link_near_duplicates(*given) for given in (images, half)]
        seconds, of_half = shortest_in_turn(works, repeats)
        note = f"clusters of {n:,} {what}; ratio: to {n // 2:,}"
        yield as_row(f"near_duplicates.{kind}", seconds, "s", seconds / of_half, note)
        note = f"{n:,} {what}: peak above the import, codes and thumbnails included"
        if (above := _memory_of_child(kind, n, seed)) is not None:
            name = f"near_duplicates.memory_{kind}"
            yield as_row(name, above / 2**20, "MiB", None, note)


def draw_images(kind: str, n: int, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Codes `[n]` and thumbnails `[n, 768]` of one of `KINDS`."""
    rng = np.random.default_rng(seed)
    n_centres = {"distinct": n, "equal": 1, "clustered": 20}[kind]
    codes = rng.integers(2**64, size=n_centres, dtype=np.uint64)
    thumbnails = rng.integers(256, size=(n_centres, _WIDTH), dtype=np.uint8)
    if kind == "distinct":
        return codes, thumbnails
    of = rng.integers(n_centres, size=n)
    codes, thumbnails = codes[of], thumbnails[of]
    if kind == "clustered":
        for start in range(0, n, 10_000):  # a bit of the code flips, and two grey values of noise
            here = slice(start, start + 10_000)
            codes[here] ^= np.uint64(1) << rng.integers(64, size=len(of[here]), dtype=np.uint64)
            thumbnails[here] ^= rng.integers(4, size=thumbnails[here].shape, dtype=np.uint8)
    return codes, thumbnails


_PROGRAM = """
import json, sys
from hf_glovlm.lab.benches.near_duplicates import measure_memory
print(json.dumps(measure_memory(*json.loads(sys.argv[1]))))
"""


def _memory_of_child(kind: str, n: int, seed: int) -> int | None:
    """Peak of a process of its own above the import, in bytes; `None` where none is stated."""
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps([kind, n, seed])],
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        reason = (process.stderr.strip() or "no message").splitlines()[-1]
        raise GloVLMError(
            f"The search for near-duplicates in a process of its own failed: {reason}"
        )
    above: int | None = json.loads(process.stdout.splitlines()[-1])
    return above


def measure_memory(kind: str, n: int, seed: int) -> int | None:
    """Bytes by which the search grows the peak of this process, which has only imported it."""
    from ...data.near_duplicates import link_near_duplicates

    imported = peak_memory()
    link_near_duplicates(*draw_images(kind, n, seed))
    peak = peak_memory()
    return None if imported is None or peak is None else peak - imported
