"""Benchmark on a CUDA GPU: precisions of the vision tower and epochs of training.

Every function takes the device, so that all but the timings can be tested on a CPU.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import GloVLMError
from .timing import Row, UnavailableError, as_row, shortest_in_turn, synchronise
from .towers import Shape, random_clip, synthetic_images
from .train import METHODS, plain_losses, time_training, training_rows

Pool = Callable[[Tensor], Tensor]

# Largest distance of a feature vector from the CPU's in fp32, relative to its length. On a ViT-B/16
# of random weights fp16 gives .0003 on a CPU (TF32 has as many digits) and bf16 .0026.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}
ARMS = {  # each with the precision it computes in
    "fp32": "fp32",
    "tf32": "tf32",
    "bf16": "bf16",
    "fp16": "fp16",
    "compiled": "fp32",
    "compiled_bf16": "bf16",
}
CHECKED = 8  # images whose features are compared with the CPU's
LOSS_TOLERANCE = 0.01  # of the mean loss of an epoch, between the GPU and the CPU
# Without dropout, whose draws are others on a GPU.
TRAINED: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.0}, "convlm": METHODS["convlm"][0]}


def bench_gpu(
    *,
    device: str | None = None,
    shape: Shape | None = None,
    batch_sizes: Sequence[int] = (32, 256),
    arms: Sequence[str] = tuple(ARMS),
    methods: Sequence[str] = tuple(TRAINED),
    patients: int = 8,
    epochs: int = 4,
    repeats: int = 10,
    compiler: str = "inductor",
) -> Iterator[Row]:
    """Benchmark of a vision tower's precisions, and of epochs of training, on a GPU.

    Args:
        device: Where to compute; the CUDA GPU if not given.
        shape: Of the random CLIP.
        batch_sizes: Images at a time; a batch that does not fit leaves its rows without a value.
        arms: Of `ARMS`.
        methods: Of `TRAINED`.
        patients: Synthetic patients that the methods learn from, five images each.
        epochs: Of each training, at least 2.
        repeats: Timings of each kind, of which the shortest counts.
        compiler: Backend of `torch.compile`.

    Yields:
        Of each batch size `gpu.bare` (the bare tower of transformers in fp32) and each arm: images
        a second, whose ratio is to the bare tower in turn with it, and peak memory. Of each arm
        its distance from the CPU's features, of each method an epoch beside a plain loop on the
        same GPU and the distance of its losses from the CPU's; the ratio of a distance is its part
        of the tolerance.

    Raises:
        UnavailableError: There is no CUDA GPU.
        GloVLMError: Features or losses are further from the CPU's than the tolerance; only once
            all else is measured.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise UnavailableError(
                f"`bench gpu` measures a CUDA GPU, and PyTorch {torch.__version__} sees none here: "
                "run it where there is one."
            )
        device = "cuda"
    shape, far = shape or Shape(), list[str]()
    for row in _bench_tower(device, shape, batch_sizes, arms, repeats, compiler):
        yield _noted(row, far)
    with tempfile.TemporaryDirectory() as folder:
        images = synthetic_images(Path(folder), patients, 5)
        for name in methods:
            for row in _bench_training(name, images, device, shape, epochs):
                yield _noted(row, far)
            _free_memory()
    if far:
        raise GloVLMError(
            f"On {device} {', '.join(far)} beyond the tolerance: what it computes there differs "
            "from what the CPU computes. Report this as a bug."
        )


def _noted(row: Row, far: list[str]) -> Row:
    """The row; where it is a distance beyond its tolerance, that is noted."""
    if row["name"].endswith("_distance") and (row["ratio"] or 0) > 1:
        far.append(f"{row['name']} is {row['value']:g},")
    return row


# ------------------------------------------------------------------------------- the vision tower


def _bench_tower(
    device: str,
    shape: Shape,
    batch_sizes: Sequence[int],
    arms: Sequence[str],
    repeats: int,
    compiler: str,
) -> Iterator[Row]:
    """Each arm in turn with the bare tower, on tensors that lie on the device."""
    model, processor = random_clip(shape)
    draw, side = torch.Generator().manual_seed(0), shape.image_size
    images = torch.randn(max(*batch_sizes, CHECKED), 3, side, side, generator=draw)
    with torch.inference_mode():
        reference = model.pool_images(images[:CHECKED])
    model.to(device)
    bare = partial(_pool_bare, model.backbone.vision_model)
    size = f"{shape.vision[0]} wide, {shape.vision[1]} blocks"
    stated: set[int] = set()  # batch sizes whose bare tower has its row
    for arm in arms:
        name, tolerance = f"gpu.{arm}_distance", TOLERANCE[ARMS[arm]]
        what = f"largest distance of a feature from the CPU's, tower {size}, {CHECKED} images"
        what += f"; ratio: part of the tolerance, {tolerance:g}"
        gap, pool = None, None
        try:
            pool = _open_arm(arm, model, processor, compiler)
            gap = _distance(pool(images[:CHECKED].to(device)).float().cpu(), reference)
        except Exception as error:  # a compiler that is not there raises whatever it likes
            what = f"not measured: {_short(error)}"
        yield as_row(name, gap, "relative", gap and gap / tolerance, what)
        if pool is not None and gap is not None and gap <= tolerance:  # else no shortcut
            for batch_size in batch_sizes:
                batch = images[:batch_size]
                yield from _time_arm(arm, pool, bare, batch, device, size, repeats, stated)
                _free_memory()
        del pool
        torch.compiler.reset()
        _free_memory()


def _time_arm(
    arm: str,
    pool: Pool,
    bare: Pool,
    images: Tensor,
    device: str,
    size: str,
    repeats: int,
    stated: set[int],
) -> Iterator[Row]:
    """Rate and memory of an arm at one batch size."""
    n = len(images)
    name, what = f"gpu.{arm}_{n}", f"tower {size}, a batch of {n} on the device"

    def work(function: Pool) -> None:
        function(batch)
        synchronise(device)

    reason, peaks = "", list[int | None]()
    try:
        batch = images.to(device)
        works = [partial(work, bare), partial(work, pool)]
        for once in works:  # first calls choose kernels and compile
            once()
            _reset_peak(device)
            once()
            peaks.append(_peak(device))
        plain, ours = shortest_in_turn(works, repeats)
    except torch.OutOfMemoryError as error:
        reason = f"not measured: a batch of {n} does not fit ({_short(error)})"
    if reason:  # outside, where the error holds no tensors any more
        yield as_row(name, None, "images/s", None, reason)
        return
    if n not in stated:
        stated.add(n)
        base = "bare tower of transformers in fp32"
        yield as_row(f"gpu.bare_{n}", n / plain, "images/s", None, f"{what}: {base}")
    note = f"{what}: {arm}; ratio: times the rate of the bare tower in fp32"
    yield as_row(name, n / ours, "images/s", plain / ours, note)
    if peaks[1] is not None and peaks[0] is not None:
        note = f"{what}: {arm}, most memory that was allocated; ratio: part of the bare tower's"
        yield as_row(f"{name}_memory", peaks[1] / 2**20, "MiB", peaks[1] / peaks[0], note)


def _pool_bare(tower: Any, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        pooled: Tensor = tower(pixel_values=pixels).pooler_output
    return pooled


def _open_arm(arm: str, model: Any, processor: Any, compiler: str) -> Pool:
    """Function that computes pooled vectors as the arm does."""
    if arm.startswith("compiled"):
        kind = model.device.type
        pool_bare = torch.compile(
            partial(_pool_bare, model.backbone.vision_model), backend=compiler
        )

        def pool_compiled(pixels: Tensor) -> Tensor:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=ARMS[arm] == "bf16"):
                pooled: Tensor = pool_bare(pixels)
            return pooled

        return pool_compiled
    from ...inference.engines import open_engine

    engine = open_engine(model, processor, precision=ARMS[arm])
    return lambda pixels: engine.pool({"pixel_values": pixels})[0]


def _distance(features: Tensor, reference: Tensor) -> float:
    """Largest distance of a row from the reference's, relative to its length."""
    return float(((features - reference).norm(dim=1) / reference.norm(dim=1)).max())


# --------------------------------------------------------------------------------------- training


def _bench_training(
    name: str, images: Any, device: str, shape: Shape, epochs: int
) -> Iterator[Row]:
    """An epoch of a method beside the plain loop on the device, and its losses beside the CPU's."""
    settings, reason = TRAINED[name], ""
    _reset_peak(device)
    try:
        with _fresh_accelerate():
            timed = time_training(name, images, shape, settings, epochs=epochs, device=device)
    except torch.OutOfMemoryError as error:
        reason = f"not measured: {len(images)} images do not fit ({_short(error)})"
    if reason:
        yield as_row(f"gpu.{name}", None, "s", None, reason)
        return
    timed.check(LOSS_TOLERANCE)
    yield from training_rows(f"gpu.{name}", timed, METHODS[name][1])
    if (peak := _peak(device)) is not None:
        note = f"{timed.what}: most memory that was allocated, with the plain loop's model"
        yield as_row(f"gpu.{name}_memory", peak / 2**20, "MiB", None, note)
    _free_memory()
    reference = plain_losses(name, images, shape, settings, epochs=2)
    gap = max(abs(ours - cpu) for (ours, _), cpu in zip(timed.losses, reference, strict=False))
    note = f"{timed.what}: largest distance of the loss of the first 2 epochs from the CPU's; "
    note += f"ratio: part of the tolerance, {LOSS_TOLERANCE}"
    yield as_row(f"gpu.{name}_distance", gap, "loss", gap / LOSS_TOLERANCE, note)


@contextmanager
def _fresh_accelerate() -> Iterator[None]:
    """Forget the device of earlier trainings: Accelerate keeps the first of a process for all."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    try:
        yield
    finally:
        forget()


# ----------------------------------------------------------------------------------------- memory


def _free_memory() -> None:
    """Hand back what the last arm held of a GPU's memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int | None:
    """Bytes that were allocated at most; `None` where nobody counts."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device)


def _short(error: BaseException) -> str:
    """First line of an error, with its kind."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
