"""Engines: in which precision and by which runtime a vision tower computes.

The default, PyTorch in fp32, is the reference: every number that is reported comes from it unless
something else was asked for by name.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import GloVLMError, nearest
from ..runtimes import PRECISIONS, RUNTIMES
from .prediction import exact_inference, model_device, move_inputs

if TYPE_CHECKING:
    from ..model import GloVLMModel, GloVLMProcessor

Pool = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Engine:
    """Engine: computes the pooled vectors of one model's vision tower.

    Made by `open_engine`; it serves the model with the weights and on the device of that moment.

    Args:
        model: The model.
        precision: What it computes in, never `auto`.
        runtime: What computes, never `auto`.
        measured: What `auto` measured: images/s of each candidate, agreement of features and the
            processor; `None` where nothing was.
        pool: Maps the processor's tensors of n images to float32 pooled vectors `[n, width]` and
            middle `[n, hidden]`, see `GloVLMModel.pool_images_and_middle`.
    """

    model: "GloVLMModel" = field(repr=False)
    precision: str
    runtime: str
    measured: dict[str, Any] | None
    pool: Pool = field(repr=False)

    @property
    def key(self) -> str:
        """What its features are stored under beside the encoder's key; empty for the default."""
        default = (self.runtime, self.precision) == ("torch", "fp32")
        return "" if default else f"-{self.runtime}-{self.precision}"

    def describe(self) -> dict[str, Any]:
        """For results and a bag's attributes: plain values; `open_engine` takes them as `kept`."""
        about: dict[str, Any] = {"precision": self.precision, "runtime": self.runtime}
        return about if self.measured is None else about | {"measured": self.measured}


def open_engine(
    model: Any,
    processor: "GloVLMProcessor",
    *,
    precision: str = "fp32",
    runtime: str = "torch",
    kept: Mapping[str, Any] | None = None,
    seconds: float = 2.0,
    on_note: Callable[[str], None] | None = None,
) -> Engine:
    """Open the engine of a model's vision tower.

    Args:
        model: The backbone or the classifier, on the device where it is to compute.
        processor: Its processor.
        precision: One of `PRECISIONS`; `int8` with the runtime `onnx`, `tf32` on CUDA alone.
        runtime: One of `RUNTIMES`.
        kept: `describe()` of an earlier, unfinished run: what `auto` chose then is taken again.
        seconds: How long `auto` measures.
        on_note: Called with sentences for a person, such as what `auto` took.

    Raises:
        GloVLMError: One of the two is unknown, they do not go together or with the device, a
            package is missing, or the tower cannot be computed so.
    """
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("runtime", runtime, RUNTIMES),
    ):
        if value not in known:
            raise GloVLMError(
                f"Unknown {name} '{value}': expected one of {', '.join(known)}."
                f"{nearest(str(value), known)}"
            )
    tower: GloVLMModel = getattr(model, "glovlm", model)
    if "auto" in (precision, runtime):
        raise GloVLMError("auto: not there yet")
    if runtime != "torch":
        raise GloVLMError(f"{runtime}: not there yet")
    return Engine(tower, precision, runtime, None, _torch_pool(tower, precision))


# ------------------------------------------------------------------------------------- torch


def _torch_pool(model: "GloVLMModel", precision: str) -> Pool:
    device = model_device(model).type
    if precision == "int8":
        raise GloVLMError("Precision int8 needs the runtime onnx: give it, or another precision.")
    if precision == "tf32" and device != "cuda":
        raise GloVLMError(
            f"Precision tf32 is one of CUDA devices; the model is on '{device}': use fp32 or bf16."
        )

    def pool(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with exact_inference(model), _computing(device, precision):
            pooled, middle = model.pool_images_and_middle(**move_inputs(inputs, model))
            return pooled.float(), middle.float()

    return pool


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
