"""ONNX graphs: traced from a module, quantised, and run by onnxruntime or OpenVINO.

A graph has one input, `pixel_values`, of any batch size, and float32 outputs known by name. The
packages are imported where they are needed.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import GloVLMError

INPUT = "pixel_values"
_PROTOBUF_LIMIT = 1_900_000_000  # bytes of one file; larger weights lie beside it
_OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def check_packages(*names: str, need: str, extra: str = "export") -> None:
    """Refuse where a package is missing.

    Args:
        *names: Of packages, as they are imported.
        need: What needs them: the beginning of the sentence.
        extra: Of this package, which installs them.

    Raises:
        GloVLMError: Names the first that is missing.
    """
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise GloVLMError(
                f"{need} needs the package {error.name or name}: pip install 'hf-glovlm[{extra}]'."
            ) from None


def write_graph(module: nn.Module, example: Tensor, path: Path, outputs: Sequence[str]) -> int:
    """Trace a module into an ONNX graph for batches of any size.

    Args:
        module: Takes `pixel_values` and returns a tensor or a tuple of these, batch first; in
            evaluation mode, in fp32 on a CPU.
        example: Such an input; of two images or more, so that nothing is taken for a constant.
        path: The file to write; weights beyond 1.9 GB lie beside it.
        outputs: Names of what the module returns.

    Returns:
        Version of the ONNX operators (opset).

    Raises:
        GloVLMError: The module cannot be one graph.
    """
    try:
        with quiet_export(), torch.no_grad():
            program = torch.onnx.export(
                _trace(module, example),
                input_names=[INPUT],
                output_names=list(outputs),
                verbose=False,
            )
            assert program is not None  # it is returned where no file is named
            weights = sum(w.numel() * w.element_size() for w in module.state_dict().values())
            program.save(path, external_data=weights > _PROTOBUF_LIMIT)
    except (RuntimeError, ValueError, TypeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise GloVLMError(
            f"This model cannot be written as one graph ({first.strip()}): use the model itself."
        ) from error
    return int(program.model.opset_imports[""])


def _trace(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    shapes = {INPUT: {0: torch.export.Dim("batch", min=1)}}
    try:
        return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except RuntimeError:  # `len(tensor)` is a number to it; the slower way reads the code itself
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=True)


def quantise_graph(
    source: Path,
    target: Path,
    *,
    keep: Sequence[str] = (),
    per_channel: bool = False,
    reduce_range: bool = False,
) -> None:
    """Quantise weights of matrix products to int8, and activations as they come.

    That is onnxruntime's dynamic quantisation: of a batch, activations share one range.

    Args:
        source: A graph in fp32.
        target: The graph to write.
        keep: Outputs for which alone nothing is quantised: what others need, too, is.
        per_channel: Whether each column of a weight has a scale of its own.
        reduce_range: Whether weights have 7 bits, so that sums do not overflow the 16 bits of
            processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source)
    # Shapes that the exporter noted are those from before it optimised; they are inferred anew.
    del graph.graph.value_info[:]
    left_out = _nodes_of_alone(graph.graph, keep)
    with quiet_export():
        quantize_dynamic(
            graph,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=left_out,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            use_external_data_format=source.with_name(f"{source.name}.data").is_file(),
        )


def _nodes_of_alone(graph: Any, outputs: Sequence[str]) -> list[str]:
    """Names of the nodes that some outputs need and no other does."""
    makers = {name: node for node in graph.node for name in node.output}

    def behind(names: list[str]) -> set[str]:
        needed: set[str] = set()
        while names:
            node = makers.get(names.pop())
            if node is not None and node.name not in needed:
                needed.add(node.name)
                names += node.input
        return needed

    others = [output.name for output in graph.output if output.name not in outputs]
    return sorted(behind([*outputs]) - behind(others))


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without the log messages and warnings of the exporter and the quantiser."""
    names = ("onnxscript", "torch.onnx", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in (*names, None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=kind, module=r"(torch|onnx|copyreg)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def graph_parts(graph: Path) -> list[Path]:
    """The graph's file, and that of its weights where they lie beside it."""
    return sorted(graph.parent.glob(f"{graph.name}*"))


class Session:
    """A graph, ready to run on the processor.

    Args:
        path: The graph.
        outputs: Names of the outputs to compute; by default all, in their order.
        runtime: `onnx` (onnxruntime) or `openvino`.
        precision: In which a graph in fp32 is computed; other than `fp32` with OpenVINO alone.
        threads: How many; by default as many as PyTorch has.

    Attributes:
        outputs: Names of the outputs.

    Raises:
        GloVLMError: A package is missing, or the runtime cannot read the graph.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str] | None = None,
        *,
        runtime: Literal["onnx", "openvino"] = "onnx",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        threads = threads or torch.get_num_threads()
        self._graph: Any
        try:
            if runtime == "onnx":
                self._graph, known = _open_onnx(path, threads)
            else:
                self._graph, known = _open_openvino(path, precision, threads)
        except GloVLMError:
            raise
        except Exception as error:  # of whatever library reads it
            first = next((line for line in str(error).splitlines() if line.strip()), "no reason")
            raise GloVLMError(
                f"The graph {path} cannot be run by {runtime}: {first.strip()}"
            ) from error
        self.outputs = list(outputs or known)
        self._places = [known.index(name) for name in self.outputs]
        self._runtime = runtime

    def run(self, pixels: Tensor) -> list[NDArray[np.float32]]:
        """Run the graph.

        Args:
            pixels: `[n, channels, height, width]`.

        Returns:
            The outputs by `outputs`, each float32 `[n, ...]`.
        """
        fed = {INPUT: np.ascontiguousarray(pixels.detach().cpu().float().numpy())}
        if self._runtime == "onnx":
            return [values.astype(np.float32) for values in self._graph.run(self.outputs, fed)]
        values = self._graph.create_infer_request().infer(fed)  # one of its own for each thread
        return [np.array(values[place], np.float32) for place in self._places]


def _open_onnx(path: Path, threads: int) -> tuple[Any, list[str]]:
    check_packages("onnxruntime", need="The runtime onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, [output.name for output in session.get_outputs()]


def _open_openvino(path: Path, precision: str, threads: int) -> tuple[Any, list[str]]:
    openvino = import_openvino()
    hint = _OPENVINO_TYPES[precision]
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time
    }
    graph = openvino.Core().compile_model(str(path), "CPU", settings)
    actual = graph.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if actual != hint:
        raise GloVLMError(
            f"OpenVINO computes in {actual} on this processor, which has no {precision}: use "
            "precision fp32, or another runtime."
        )
    return graph, [output.get_any_name() for output in graph.outputs]


def import_openvino() -> Any:
    """The package openvino, without its telemetry: plainly imported, it reports its use.

    Raises:
        GloVLMError: It is missing.
    """
    name, absent = "openvino_telemetry", object()
    before = sys.modules.get(name, absent)
    sys.modules[name] = None  # type: ignore[assignment]  # its import fails; a stub stands in
    try:
        check_packages("openvino", need="The runtime openvino", extra="openvino")
        import openvino  # type: ignore[import-untyped]

        return openvino
    finally:
        del sys.modules[name]
        if before is not absent:
            sys.modules[name] = before  # type: ignore[assignment]
