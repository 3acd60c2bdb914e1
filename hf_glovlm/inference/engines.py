"""Engines: in which precision and by which runtime a vision tower computes.

PyTorch in fp32 is the default and the reference: anything else has to be asked for, and is named in
what it computed. docs/runtimes.md says what each costs.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import GloVLMError, nearest
from ..files import (
    damaged_files,
    explaining_disk,
    one_writer,
    read_manifest,
    remove,
    replacing,
    write_manifest,
)
from ..model.outlines import draw_centre
from ..runtimes import PRECISIONS, RUNTIMES
from .cache import FeatureCache
from .frozen import encoder_key
from .graphs import INPUT, Session, check_packages, quantise_graph, write_graph
from .prediction import (
    ImageRows,
    evaluation_mode,
    exact_inference,
    model_device,
    move_inputs,
    resolve_device,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model import GloVLMModel, GloVLMProcessor

AGREEMENT = 0.998  # least cosine with fp32 of what `auto` takes
MARGIN = 1.1  # least gain in speed for which `auto` leaves the default
GRAPH_WORTH = 60.0  # seconds of work below which `auto` makes no graph
_EXAMPLES = 8  # images on which engines are compared
_BROKEN = 0.9  # a cosine below which a tower is computed wrongly rather than roughly
_FP32_TOLERANCE = 1e-3  # of a graph in fp32, as a part of the largest number
_GRAPHS = 1  # of the kept graphs: raise it when they are made in another way
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INSTRUCTIONS = (  # as Linux names those that matter here
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16",
    "amx_int8", "amx_fp16", "bf16", "i8mm", "asimddp",
)  # fmt: skip
_ON_CPU = ("onnx", "openvino")

Inputs = Mapping[str, Tensor]
Pool = Callable[[Inputs], tuple[Tensor, Tensor]]
Choice = tuple[str, str]  # precision, runtime
_DEFAULT: Choice = ("fp32", "torch")


@dataclass(frozen=True)
class Engine:
    """Engine: computes the pooled vectors of one model's vision tower.

    Made by `open_engine`.

    Args:
        model: The model.
        precision: What it computes in, never `auto`.
        runtime: What computes, never `auto`.
        measured: What `auto` measured, see `docs/runtimes.md`; `None` where both were given.
        pool: Maps the processor's tensors of n images to float32 pooled vectors `[n, width]` and
            middle `[n, hidden]`, see `GloVLMModel.pool_images_and_middle`.
        encoder: The encoder's key that a graph was made for; empty where the model itself computes.
    """

    model: Any = field(repr=False)
    precision: str
    runtime: str
    measured: dict[str, Any] | None
    pool: Pool = field(repr=False)
    encoder: str = field(default="", repr=False)

    def check(self, model: Any, processor: "GloVLMProcessor") -> None:
        """Check that it computes the tower of a model as that is now.

        Raises:
            GloVLMError: It is one of another model, or the weights have changed.
        """
        if self.model is not model:
            raise GloVLMError("The engine is one of another model: open one of this (open_engine).")
        if self.encoder and self.encoder != encoder_key(model, processor):
            raise GloVLMError(
                "The model has changed since its engine was opened, and the engine's graph has "
                "not: open it again (open_engine)."
            )

    @property
    def key(self) -> str:
        """What its features are stored under beside the encoder's key; empty for the default."""
        return "" if self.is_default else f"-{self.runtime}-{self.precision}"

    @property
    def is_default(self) -> bool:
        """Whether it is PyTorch in fp32."""
        return (self.precision, self.runtime) == _DEFAULT

    def versions(self) -> dict[str, str]:
        """Of the package that computes, where it is another than PyTorch."""
        package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(self.runtime)
        return {} if package is None else {package: version(package)}

    def describe(self) -> dict[str, Any]:
        """For results and a bag's attributes: plain values; `open_engine` takes them as `kept`."""
        about: dict[str, Any] = {"precision": self.precision, "runtime": self.runtime}
        return about if self.measured is None else about | {"measured": self.measured}

    @property
    def notes(self) -> list[str]:
        """A sentence for a person; none for the default."""
        about = (
            f"The vision tower is computed by {self.runtime} in {self.precision}: numbers differ a "
            "little from those of torch in fp32, the default."
        )
        return [] if self.is_default else [about]


def open_engine(
    model: Any,
    processor: "GloVLMProcessor",
    *,
    precision: str = "fp32",
    runtime: str = "torch",
    device: "str | torch.device | None" = None,
    kept: Mapping[str, Any] | None = None,
    seconds: float = 2.0,
    images: Sequence[Image.Image] = (),
    workload: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Engine:
    """Open the engine of a model's vision tower.

    Args:
        model: The backbone or the classifier; in fp32, but for the default.
        processor: Its processor.
        precision: One of `PRECISIONS`; `int8` with the runtime `onnx`, `tf32` on CUDA alone.
        runtime: One of `RUNTIMES`; `onnx` and `openvino` on the CPU alone.
        device: Where to compute (the model is moved there); by default where it is.
        kept: `describe()` of an earlier, unfinished run: what `auto` took then is taken again.
        seconds: How long `auto` measures.
        images: Some of those to come, on which agreement with fp32 is checked; drawn ones if none.
        workload: How many are to come, if known: `auto` leaves out what would not pay for that.
        on_note: Called with sentences for a person, such as what `auto` took.

    Returns:
        The engine. Of `auto` it is the fastest that agrees with fp32 (every cosine of pooled
        vectors and middle `AGREEMENT` or more) and is faster by `MARGIN`, else fp32.

    Raises:
        GloVLMError: One of the two is unknown, they do not go together or with the device, a
            package is missing, or the tower cannot be computed so.
    """
    _check_names(precision, runtime)
    if hasattr(model, "open_engine"):  # an exported graph computes what it holds
        engine: Engine = model.open_engine(precision, runtime)
        return engine
    tower: GloVLMModel = getattr(model, "glovlm", model)
    if device is not None:
        model.to(resolve_device(device))
    if (precision, runtime) == _DEFAULT:  # in whatever the weights are
        return Engine(tower, *_DEFAULT, None, partial(_pool_torch, tower, "fp32"))
    if tower.dtype != torch.float32:
        raise GloVLMError(
            f"Expected a model in float32, found {str(tower.dtype).removeprefix('torch.')}: call "
            "model.float() first; the precision says what is computed."
        )
    candidates = _candidates(precision, runtime, model_device(tower).type)
    example = _Example(tower, processor, images)
    if "auto" not in (precision, runtime):
        return _as_engine(example, candidates[0], None)
    earlier = (kept or {}).get("precision"), (kept or {}).get("runtime")
    if kept and earlier in candidates:
        return _as_engine(example, earlier, dict(kept.get("measured") or {}))
    return _choose(example, candidates, seconds, workload, on_note or (lambda text: None))


def refuse_auto(precision: str, runtime: str, what: str) -> None:
    """Refuse `auto` where numbers are reported.

    Args:
        precision: What was asked for.
        runtime: What was asked for.
        what: What reports them, as the sentence's subject.

    Raises:
        GloVLMError: One of the two is `auto`, or unknown.
    """
    _check_names(precision, runtime)
    if "auto" in (precision, runtime):
        raise GloVLMError(
            f"{what} takes no auto: a number that is reported must not depend on how fast a "
            "machine was. Name the precision and the runtime."
        )


def engine_device(device: str, runtime: str, precision: str = "fp32") -> torch.device:
    """Device of a model whose tower a runtime computes: the CPU where the runtime has no other.

    Args:
        device: As `resolve_device` takes it.
        runtime: One of `RUNTIMES`.
        precision: One of `PRECISIONS`; checked along, before a model is loaded.

    Raises:
        GloVLMError: One of the three is unknown, or there is no such device.
    """
    _check_names(precision, runtime)
    return resolve_device("cpu" if device == "auto" and runtime in _ON_CPU else device)


def example_images(images: "Dataset", processor: "GloVLMProcessor") -> list[Image.Image]:
    """Some images of a data set that can be decoded, for `open_engine`.

    Args:
        images: Rows with `image`.
        processor: The model's.
    """
    rows, pictures = ImageRows(images, processor.outline), list[Image.Image]()
    for row in range(min(len(images), 2 * _EXAMPLES)):
        with suppress(GloVLMError):
            pictures += rows.pictures([row])
    return pictures[:_EXAMPLES]


def _check_names(precision: str, runtime: str) -> None:
    asked = (("precision", precision, PRECISIONS), ("runtime", runtime, RUNTIMES))
    for name, value, known in asked:
        if value not in known:
            raise GloVLMError(
                f"Unknown {name} '{value}': expected one of {', '.join(known)}."
                f"{nearest(str(value), known)}"
            )


# ------------------------------------------------------------------------- what can be computed


def _candidates(precision: str, runtime: str, device: str) -> list[Choice]:
    """What a request allows on a device, the plainest first; what was named is there or refused."""
    known: dict[str, tuple[str, ...]] = {
        "torch": ("fp32", *(("tf32",) if device == "cuda" else ()), "bf16", "fp16"),
        "onnx": ("fp32", "int8"),
        "openvino": ("fp32", "bf16", "fp16"),
    }
    if runtime in _ON_CPU and device != "cpu":
        raise GloVLMError(
            f"The runtime {runtime} computes on the CPU, and the model is on '{device}': use "
            "device cpu, or the runtime torch."
        )
    runtimes = [name for name in known if runtime in (name, "auto")]
    runtimes = [name for name in runtimes if device == "cpu" or name not in _ON_CPU]
    allowed = [(p, r) for r in runtimes for p in known[r] if precision in (p, "auto")]
    if not allowed:
        if precision == "tf32":
            raise GloVLMError(
                f"Precision tf32 is one of CUDA devices with torch; this is {runtime} on "
                f"'{device}': use fp32 or bf16."
            )
        others = [r for r in known if precision in known[r]]
        raise GloVLMError(
            f"The runtime {runtime} has no precision {precision} on '{device}': use one of "
            f"{', '.join(known.get(runtime, PRECISIONS[:1]))}, or the runtime "
            f"{' or '.join(others)}."
        )
    return allowed


class _Example:
    """A model with some of its input, on which other engines are compared with fp32."""

    def __init__(
        self, model: "GloVLMModel", processor: "GloVLMProcessor", images: Sequence[Image.Image]
    ) -> None:
        self.model = model
        self.processor = processor
        self._images = list(images[:_EXAMPLES]) or [_draw(seed) for seed in range(_EXAMPLES)]
        self.plain = partial(_pool_torch, model, "fp32")

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The processor's tensors."""
        return dict(self.processor(images=self._images, return_tensors="pt"))

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """What PyTorch in fp32 makes of them."""
        return self.plain(self.inputs)

    @cached_property
    def key(self) -> str:
        """The encoder's key."""
        return encoder_key(self.model, self.processor)

    @property
    def folder(self) -> Path:
        """Where the tower's graphs are kept: in the feature cache."""
        return FeatureCache().folder / f"{self.key}-graph{_GRAPHS}"

    def agreement(self, pool: Pool) -> tuple[float, float]:
        """Least cosine with PyTorch in fp32, and the largest difference as a part of the largest.

        A number that is not finite is no agreement at all.
        """
        if pool is self.plain:
            return 1.0, 0.0
        pairs = [
            (one.double().cpu(), other.double().cpu())
            for one, other in zip(self.reference, pool(self.inputs), strict=True)
        ]
        cosine, difference = 1.0, 0.0
        for one, other in pairs:
            if not one.numel():
                continue
            if one.shape != other.shape or not other.isfinite().all():
                return 0.0, float("inf")
            cosine = min(cosine, float(nn.functional.cosine_similarity(one, other).min()))
            difference = max(difference, float((one - other).abs().max() / one.abs().max()))
        return cosine, difference


def _draw(seed: int) -> Image.Image:
    """A picture of soft colours and fine grain, outlined, for a model to look at."""
    draw = np.random.default_rng(seed)
    soft = Image.fromarray(draw.integers(60, 256, (6, 6, 3), np.uint8)).resize((256, 256), 3)
    grain = draw.normal(0, 12, (256, 256, 1))
    return draw_centre(Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)))


def _as_engine(
    example: _Example, choice: Choice, measured: dict[str, Any] | None, pool: Pool | None = None
) -> Engine:
    """Engine of a choice; opened and, where it is a graph, checked if it is not yet."""
    encoder = example.key if choice[1] in _ON_CPU else ""
    if pool is None:
        pool = _open(example, choice)
        if encoder:
            _check(example, choice, pool)
    return Engine(example.model, *choice, measured, pool, encoder)


def _open(example: _Example, choice: Choice) -> Pool:
    """Open what computes.

    Raises:
        GloVLMError: It cannot be had here.
    """
    precision, runtime = choice
    if choice == _DEFAULT:
        return example.plain
    if runtime == "torch":
        _check_products(model_device(example.model), precision)
        return partial(_pool_torch, example.model, precision)
    return _open_graph(example, precision, runtime)


def _check(example: _Example, choice: Choice, pool: Pool) -> float:
    """Least cosine with PyTorch in fp32.

    Raises:
        GloVLMError: It is so low that something else is computed.
    """
    precision, runtime = choice
    cosine, difference = example.agreement(pool)
    wrong = difference > _FP32_TOLERANCE if precision == "fp32" else cosine < _BROKEN
    if wrong:
        raise GloVLMError(
            f"{runtime} in {precision} does not compute this vision tower (least cosine with "
            f"PyTorch {cosine:.3f}, largest relative difference {difference:.2g}): use the runtime "
            "torch, and please report `glovlm doctor --json` and the backbone."
        )
    return cosine


# ------------------------------------------------------------------------------------- torch


def _pool_torch(model: "GloVLMModel", precision: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with exact_inference(model), _computing(model_device(model).type, precision):
        pooled, middle = model.pool_images_and_middle(**move_inputs(inputs, model))
        return pooled.float(), middle.float()


@contextmanager
def _computing(device: str, precision: str) -> Iterator[None]:
    """Autocast, or TF32 in matrix products; nothing for fp32."""
    if precision in _HALF:
        with torch.autocast(device, dtype=_HALF[precision]):
            yield
    elif precision == "tf32":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield


def _check_products(device: torch.device, precision: str) -> None:
    """Refuse a precision in which a device multiplies no matrices."""
    try:
        with torch.inference_mode(), _computing(device.type, precision):
            one = torch.ones(16, 16, device=device)
            answer = float((one @ one).float().sum())
    except RuntimeError as error:  # also of autocast itself
        first = str(error).splitlines()[0]
        raise GloVLMError(
            f"Device '{device}' does not compute in {precision} ({first}): use fp32."
        ) from error
    if answer != 16**3:
        raise GloVLMError(f"Device '{device}' does not compute in {precision}: use fp32.")


def _has_fast_products(device: torch.device, precision: str) -> bool:
    """Whether a device multiplies matrices in a precision at least as fast as in fp32.

    A processor without such instructions takes several times as long, for a tower seconds.
    """
    one, other = torch.randn(128, 768, device=device), torch.randn(768, 768, device=device)

    def multiply(kind: str) -> float:
        with torch.inference_mode(), _computing(device.type, kind):
            return _seconds(lambda: (one @ other).sum().item())

    for kind in ("fp32", precision):
        multiply(kind)
    rounds = [(multiply("fp32"), multiply(precision)) for _ in range(5)]
    plain, asked = (min(times) for times in zip(*rounds, strict=True))
    return asked <= 1.2 * plain


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------ graphs


class _Tower(nn.Module):
    """A vision tower with one input, as a graph has it."""

    def __init__(self, model: "GloVLMModel", middle: bool) -> None:
        super().__init__()
        self.model = model
        self.middle = middle

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.model.pool_images_and_middle(pixel_values)[: 1 + self.middle]


def _open_graph(example: _Example, precision: str, runtime: Any) -> Pool:
    """Open the kept graph of a tower; it is made where there is none."""
    _check_graph(example.model, precision, runtime)
    path = _kept_graph(example, "int8" if precision == "int8" else "fp32")
    session = Session(path, runtime=runtime, precision="fp32" if precision == "int8" else precision)

    def pool(inputs: Inputs) -> tuple[Tensor, Tensor]:
        pooled, *middle = map(torch.from_numpy, session.run(inputs[INPUT]))
        return pooled, middle[0] if middle else pooled[:, :0]

    return pool


def _check_graph(model: "GloVLMModel", precision: str, runtime: str) -> None:
    """Refuse a tower that cannot be one graph, and missing packages."""
    config: Any = model.config
    reason = None
    if config.context:
        reason = "Context-guided layers (method convlm) cannot be traced into one graph"
    elif "siglip2" in config.backbone_config.model_type:
        reason = "SigLIP 2 takes each image in a shape of its own, and a graph has one input shape"
    if reason is not None:
        raise GloVLMError(f"{reason}: use the runtime torch.")
    extra = "export" if runtime == "onnx" else "openvino"
    names = ["onnx", "onnxscript", *(["onnxruntime"] if runtime == "onnx" else [])]
    check_packages(*names, need=f"The runtime {runtime}", extra=extra)


def _kept_graph(example: _Example, kind: str) -> Path:
    """The tower's graph in the feature cache, `fp32` or `int8`; made by one process at a time."""
    folder = example.folder
    with explaining_disk(folder):
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with one_writer(folder, wait=600):
        about = folder / "about.json"
        if not about.is_file():  # by which the cache lists, evicts and clears it
            config: Any = example.model.config
            name = config.backbone_name or config.backbone_config.model_type
            content = {"name": f"{name}, as a graph", "created": time.time()}
            with replacing(about) as fresh:
                fresh.write_text(json.dumps(content), encoding="utf-8")
        about.touch()
        plain = _make_graph(folder / "fp32", partial(_write_tower, example))
        if kind == "fp32":
            return plain
        # 7 bits: no processor's 16-bit sums overflow, so that all compute the same.
        quantise = partial(quantise_graph, plain, per_channel=True, reduce_range=True)
        return _make_graph(folder / kind, quantise)


def _make_graph(target: Path, write: Callable[[Path], object]) -> Path:
    """A graph in a folder of its own, with a checksum, whole or not at all."""
    name = "tower.onnx"
    manifest = None
    with suppress(GloVLMError):  # a damaged one
        manifest = read_manifest(target)
    if manifest is None or name not in manifest.files or damaged_files(target, manifest):
        remove(target)
        with replacing(target) as work:
            work.mkdir()
            write(work / name)
            write_manifest(work, "graph", {"version": _GRAPHS})
    return target / name


def _write_tower(example: _Example, path: Path) -> None:
    pixels = example.inputs[INPUT][:2].float()
    with evaluation_mode(example.model):
        middle = bool(example.reference[1].shape[1])
        tower = _Tower(example.model, middle)
        write_graph(tower.eval(), pixels, path, ["pooled", "middle"][: 1 + middle])


# -------------------------------------------------------------------------------------- auto


def _choose(
    example: _Example,
    candidates: Sequence[Choice],
    seconds: float,
    workload: int | None,
    notify: Callable[[str], None],
) -> Engine:
    """Measure candidates in turn with the first that can be had, and take the fastest."""
    device = model_device(example.model)
    rows: list[dict[str, Any]] = []
    measured: dict[str, Any] = {"processor": describe_processor(device), "candidates": rows}
    baseline: tuple[Choice, Pool] | None = None
    best, gain, batch, total = baseline, MARGIN, example.inputs, 0.0
    for choice in candidates:
        row: dict[str, Any] = {"precision": choice[0], "runtime": choice[1]}
        rows.append(row)
        try:
            _refuse_needless(example, choice, total)
            pool = _open(example, choice)
            row["agreement"] = agreement = _check(example, choice, pool)
            if baseline is None:
                baseline = best = choice, pool
                batch, rate = _batch(example, pool, seconds / len(candidates))
                total = float("inf") if workload is None else workload / rate
                row["images_per_second"], row["ratio"] = rate, 1.0
                if total < 10 * seconds:
                    notify(f"auto: {_words(choice)}; there is too little work to measure for")
                    break
                continue
            speeds = _measure(baseline[1], pool, batch, seconds / len(candidates))
            row["images_per_second"], row["ratio"] = speeds
            if agreement < AGREEMENT and choice[0] != candidates[0][0]:
                row["left_out"] = f"its features agree with fp32 by less than {AGREEMENT}"
            elif speeds[1] > gain:
                best, gain = (choice, pool), speeds[1]
        except (GloVLMError, RuntimeError) as error:
            row["left_out"] = str(error)
    if best is None or baseline is None:
        raise GloVLMError(str(rows[0]["left_out"]))
    chosen, pool = best
    if len(rows) > 1:
        faster = f"{gain:.2f} times as fast as {_words(baseline[0])}"
        none = "nothing that agrees with it was faster"
        notify(f"auto: {_words(chosen)}, {none if chosen == baseline[0] else faster}")
    return _as_engine(example, chosen, measured, pool)


def _words(choice: Choice) -> str:
    return f"{choice[1]} in {choice[0]}"


def _refuse_needless(example: _Example, choice: Choice, total: float) -> None:
    """Refuse what cannot pay: slow products, and a graph for little work."""
    precision, runtime = choice
    device = model_device(example.model)
    if runtime == "torch" and precision in _HALF:
        _check_products(device, precision)
        if not _has_fast_products(device, precision):
            raise GloVLMError(f"this processor multiplies matrices in {precision} more slowly")
    if runtime in _ON_CPU and 0 < total < GRAPH_WORTH:
        kind = "int8" if precision == "int8" else "fp32"
        if not (example.folder / kind).is_dir():
            raise GloVLMError("making a graph would take longer than it saves")


def _batch(example: _Example, pool: Pool, seconds: float) -> tuple[dict[str, Tensor], float]:
    """A batch that is computed a few times within the given time, and images/s of it."""
    inputs = example.inputs
    if model_device(example.model).type == "cpu":
        one = {name: tensor[:1] for name, tensor in inputs.items()}
        n = int(seconds / (4 * _seconds(partial(_finish, pool, one))))
        batch = {name: tensor[: max(n, 1)] for name, tensor in inputs.items()}
    else:  # which needs many at a time to be busy
        batch = {name: torch.cat([tensor] * 4) for name, tensor in inputs.items()}
    shortest = min(_seconds(partial(_finish, pool, batch)) for _ in range(2))
    return batch, len(batch[INPUT]) / shortest


def _measure(plain: Pool, other: Pool, batch: Inputs, seconds: float) -> tuple[float, float]:
    """Images/s of the second, and its rate over that of the first: shortest of several, in turn."""
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < seconds:
        times.append(
            (_seconds(partial(_finish, plain, batch)), _seconds(partial(_finish, other, batch)))
        )
    first, second = (min(column) for column in zip(*times, strict=True))
    return len(batch[INPUT]) / second, first / second


def _finish(pool: Pool, inputs: Inputs) -> None:
    """Compute, and wait for an accelerator."""
    pool(inputs)[0].sum().item()


def describe_processor(device: torch.device) -> dict[str, Any]:
    """What computes: its name, the threads, and its instructions for products of short numbers."""
    if device.type == "cuda":
        return {"name": torch.cuda.get_device_name(device)}
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # of Linux alone
        lines = []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        name = value if key == "model name" else name
        flags |= set(value.split()) if key in ("flags", "Features") else set()
    return {
        "name": name if device.type == "cpu" else f"{name}, {device.type}",
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
    }
