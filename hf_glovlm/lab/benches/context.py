"""Benchmark of a tower that drops patches (ConVLM)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...model.context import keep_count
from .timing import Row, as_row, check_same, shortest_in_turn
from .towers import Shape, random_clip


def bench_context(
    *,
    shape: Shape | None = None,
    keeps: Sequence[float] = (1.0, 0.9, 0.7, 0.5),
    batch_size: int = 8,
    repeats: int = 5,
) -> list[Row]:
    """Benchmark of a vision tower that drops patches, against the same tower that keeps them all.

    A quarter, half and three quarters down, a share of the patches goes on, and one token for the
    rest (ConVLM). The towers take turns.

    Args:
        shape: Of the random CLIP.
        keeps: Shares of the patches that go on at each of the three layers; the first is 1.
        batch_size: Images at a time.
        repeats: Timings of each share, of which the shortest counts.

    Returns:
        A row a share; the `ratio` is its rate over that with all patches, and `what` says which
        ratio the number of operations promises.

    Raises:
        GloVLMError: With all patches, features differ from those of the plain tower.
    """
    shape = shape or Shape(text=(64, 1))
    width, depth = shape.vision
    layers = sorted({depth * k // 4 for k in (1, 2, 3)})
    model, _ = random_clip(shape)
    side = shape.image_size
    images = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))

    def encode(keep: float) -> Any:
        if model.context is not None:
            model.context.keep = [keep] * len(layers)
        with torch.inference_mode():
            return model.pool_images(images)

    plain = encode(1.0)
    model.add_context({"layers": layers, "text_dim": shape.text[0]})
    gap = float((encode(1.0) - plain).abs().max())
    check_same(0, gap, 1e-6, "the largest difference from the plain tower's features")
    seconds = shortest_in_turn([partial(encode, keep) for keep in keeps], repeats)
    work = [_block_operations(shape, layers, keep) for keep in keeps]
    what = f"vision tower {width} wide, {depth} blocks, a batch of {batch_size}"
    what += f", {torch.get_num_threads()} threads"
    rows = []
    for keep, taken, each in zip(keeps, seconds, work, strict=True):
        note = f"{what}: a share of {keep} of the patches goes on behind blocks "
        note += f"{', '.join(map(str, layers))}; ratio: times the rate with all patches, and the "
        note += f"operations promise {work[0] / each:.3g}"
        rate, ratio = batch_size / taken, seconds[0] / taken
        rows.append(as_row(f"context.keep_{keep}", rate, "images/s", ratio, note))
    return rows


def _block_operations(shape: Shape, layers: Sequence[int], keep: float) -> float:
    """Multiplications of the patch embedding and all blocks, for one image."""
    width, depth = shape.vision
    patches = (shape.image_size // shape.patch) ** 2
    total = float(patches * 3 * shape.patch**2 * width)
    for layer in range(depth):
        tokens = 1 + patches
        total += 4 * tokens * width**2 + 2 * tokens**2 * width  # maps, scores and their sums
        if layer in layers and (kept := keep_count(keep, patches)) < patches:
            patches = kept + 1
        total += 8 * (1 + patches) * width**2
    return total
