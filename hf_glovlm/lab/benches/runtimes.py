"""Benchmark of precisions and runtimes of a vision tower, against bare transformers in fp32."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones import load_backbone
from ...errors import GloVLMError
from .timing import Row, as_row, check_same, shortest_in_turn
from .towers import Shape, caching_in, random_clip

CHOICES = (
    *(("fp32", "torch"), ("bf16", "torch"), ("fp32", "onnx"), ("int8", "onnx")),
    *(("fp32", "openvino"), ("bf16", "openvino")),
)
LEAST_COSINE = 0.98  # with the bare tower's features; below, a tower is computed wrongly
# Instructions without which PyTorch's bf16 takes minutes where fp32 takes seconds.
_FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def bench_runtimes(
    *,
    backbone: str | None = None,
    shape: Shape | None = None,
    choices: Sequence[tuple[str, str]] = CHOICES,
    batch_size: int = 4,
    repeats: int = 3,
    seconds: float = 2.0,
) -> Iterator[Row]:
    """Benchmark of the engines of a vision tower on the CPU, each in turn with the bare tower.

    Args:
        backbone: As `--backbone` takes it, a dual encoder; random weights of `shape` if not given.
        shape: Of the random CLIP.
        choices: Precisions and runtimes.
        batch_size: Images at a time.
        repeats: Timings of each kind, of which the shortest counts.
        seconds: How long `auto` measures.

    Yields:
        The bare tower's rate; of each choice that this machine has its rate, and its agreement:
        the least cosine of a feature with the bare tower's. Then `encode.best`, the fastest of
        these, and `encode.auto`, what `auto` takes. The `ratio` of a rate is to the bare tower's.

    Raises:
        GloVLMError: PyTorch in fp32 gives other features than the bare tower, an engine features
            that do not agree, or the backbone is a pair.
    """
    model, processor = load_backbone(backbone) if backbone else random_clip(shape or Shape())
    if model.config.is_pair:
        raise GloVLMError(
            f"Runtimes are timed against one bare module of transformers; '{backbone}' is a pair "
            "of two: give a dual encoder (clip-vit-b-16, plip, ...)."
        )
    tower = f"{backbone or 'tower of random weights'}, a batch of {batch_size}, "
    arms = _Arms(model, processor, _draw_batch(model, processor, batch_size), tower, repeats)
    with tempfile.TemporaryDirectory() as folder, caching_in(Path(folder)):
        for precision, runtime in choices:
            yield from arms.measure(f"{runtime}_{precision}", precision, runtime)
        yield from arms.best()
        yield from arms.measure("auto", "auto", "auto", seconds=seconds)


def _draw_batch(model: Any, processor: Any, n: int) -> dict[str, Tensor]:
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (n, 64, 64, 3), generator=draw, dtype=torch.uint8).numpy()
    return dict(processor(images=[Image.fromarray(one) for one in noise], return_tensors="pt"))


class _Arms:
    """Engines of one tower, each timed in turn with the bare tower."""

    def __init__(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], what: str, repeats: int
    ) -> None:
        self.model, self.processor, self.batch = model, processor, batch
        self.what = f"{what}{torch.get_num_threads()} threads"
        self.repeats = repeats
        self.n = len(next(iter(batch.values())))
        self.reference = self.pool_bare()
        self.rows: list[Row] = []
        self.stated = False

    def pool_bare(self) -> Tensor:
        """Pooled vectors of the bare tower."""
        with torch.inference_mode():
            pooled: Tensor = self.model.backbone.vision_model(**self.batch).pooler_output
        return pooled

    def measure(self, name: str, precision: str, runtime: str, **options: Any) -> Iterator[Row]:
        """Rows of an engine; one without a value where this machine does not have it."""
        from ...inference.engines import describe_processor, open_engine

        instructions = set(describe_processor(torch.device("cpu"))["instructions"])
        reason, engine = "", None
        if (precision, runtime) == ("bf16", "torch") and not _FAST_BF16 & instructions:
            reason = "this processor has no instructions for bf16, so PyTorch would take minutes"
        else:
            try:
                engine = open_engine(
                    self.model, self.processor, precision=precision, runtime=runtime, **options
                )
            except GloVLMError as error:
                reason = str(error)
        if engine is None:
            yield as_row(f"encode.{name}", None, "images/s", None, f"not measured: {reason}")
            return
        pool = partial(engine.pool, self.batch)
        features = pool()[0]
        cosine = float(nn.functional.cosine_similarity(features, self.reference).min())
        if (engine.precision, engine.runtime) == ("fp32", "torch"):
            gap = float((features - self.reference).abs().max())
            check_same(0, gap, 0, "the largest difference from the bare module's features")
        elif cosine < LEAST_COSINE:
            raise GloVLMError(
                f"{runtime} in {precision} gives features whose cosine with the bare module's is "
                f"{cosine:.3f}: report this as a bug."
            )
        plain, ours = shortest_in_turn([self.pool_bare, pool], self.repeats)
        if not self.stated:
            self.stated = True
            note = f"{self.what}: bare tower of transformers in fp32"
            yield as_row("encode.runtime_bare", self.n / plain, "images/s", None, note)
        took = f"what auto takes ({engine.runtime} in {engine.precision})"
        took = took if precision == "auto" else f"{runtime} in {precision}"
        note = f"{self.what}: {took}; ratio: times the rate of the bare tower in fp32"
        row = as_row(f"encode.{name}", self.n / ours, "images/s", plain / ours, note)
        self.rows.append(row)
        yield row
        note = f"{took}: least cosine of a feature with the bare tower's, {self.n} images"
        agreement = as_row(f"encode.{name}_agreement", cosine, "cosine", None, note)
        yield agreement | {"value": round(cosine, 5)}  # whose last digits are what counts

    def best(self) -> Iterator[Row]:
        """The fastest of what was measured."""
        for row in sorted(self.rows, key=lambda row: -row["ratio"])[:1]:
            yield {**row, "name": "encode.best", "what": f"the fastest: {row['what']}"}
