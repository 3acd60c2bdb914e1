"""Precisions and runtimes of the vision tower: what may be asked for, and its help.

No library is imported here, so that the command line's help is instant; `inference.engines` carries
them out.
"""

from typing import Literal, get_args

Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8", "auto"]
Runtime = Literal["torch", "onnx", "openvino", "auto"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
RUNTIMES: tuple[str, ...] = get_args(Runtime)
PRECISION_HELP = (
    "Numbers that the vision tower computes in: all but fp32 change results a little. int8 needs "
    "the runtime onnx, tf32 a CUDA device; auto measures, and never takes what is slower."
)
RUNTIME_HELP = (
    "What computes the vision tower; onnx (extra export) and openvino (extra openvino) do so on "
    "the CPU. auto measures."
)
