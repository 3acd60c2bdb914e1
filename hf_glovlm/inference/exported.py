"""Exported classifiers: the folder of `glovlm export` in the place of the model it was made from.

The graph computes what `predict` and `glovlm slide` take of a model: features, calibrated logits,
cosines and the distance to the support. Preprocessing is that of the model's own image transform,
saved beside the graph, so that both get the same tensors.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.saved import check_config, first_line_of
from ..environment import package_version
from ..errors import GloVLMError
from ..files import (
    check_fields,
    check_kind,
    damaged_files,
    digest_file,
    digest_value,
    is_plain_name,
    read_json,
    read_manifest,
)
from .graphs import Session, graph_parts

if TYPE_CHECKING:
    from ..model import GloVLMProcessor
    from .engines import Engine

EXPORT = "export.json"  # what the graph is, and what the commands read of the model's config
PREPROCESSING = "preprocessing.json"  # for a person: input, steps, output
TRANSFORM = "preprocessor_config.json"  # for transformers: the model's image transform
RUN = "run.json"  # what the commands read of the run's results; may be left out of a copy
CONFIG = (  # fields of a `GloVLMConfig` that the commands read
    "id2label", "backbone_name", "backbone_license", "temperature", "prior_shift", "calibration",
    "guard", "stains", "mpp", "image_scale", "outline", "outline_of", "draft", "synthetic",
)  # fmt: skip
# Outputs of a graph, in this order; the last two where the model has such.
OUTPUTS = ("features", "logits", "similarities", "support_distance")
_FIELDS: dict[str, tuple[type, ...]] = {
    "file": (str,), "format": (str,), "outputs": (dict,), "model": (dict,),
    "outputs.features": (int,), "outputs.logits": (int,), "notes": (list,),
    **{f"outputs.{name}": (int, type(None)) for name in OUTPUTS[2:]},
}  # fmt: skip
_INPUT: dict[str, tuple[type, ...]] = {
    "input": (dict,), "input.shape": (list,), "preprocessing": (dict,),
    "preprocessing.center_crop": (dict, type(None)),
}  # fmt: skip
_PRECISION = {"onnx": "fp32", "int8": "int8"}  # by the format of the export

logger = logging.getLogger("hf_glovlm")


@dataclass(frozen=True)
class ExportedConfig:
    """Configuration of an exported classifier: the fields of `GloVLMConfig` that commands read.

    Args:
        image_feature_dim: Width of the features.
        vision_pooled_dim: Width of all outputs of the graph, joined.
    """

    image_feature_dim: int
    vision_pooled_dim: int
    id2label: Mapping[int, str]
    backbone_name: str | None
    backbone_license: str | None
    temperature: float
    prior_shift: list[float] | None
    calibration: dict[str, Any] | None
    guard: dict[str, Any] | None
    stains: list[str] | None
    mpp: float | None
    image_scale: dict[str, float] | None
    outline: str
    outline_of: str | None
    draft: bool
    synthetic: bool
    head: None = None
    stain_centres: None = None


class Answers(NamedTuple):
    """What a classifier computes of `n` images.

    Attributes:
        logits: `[n, classes]`, calibrated.
        similarities: `[n, classes]`, cosines between image and class text; `None` for a head that
            compares none.
        distances: `[n]`, to the support, as multiples of the limit; `None` without a guard.
    """

    logits: Tensor
    similarities: Tensor | None
    distances: Tensor | None


class ExportedClassifier(nn.Module):
    """Classifier whose forward pass is an ONNX graph, computed on the processor.

    To the commands it is both the classifier and its backbone: its pooled vectors are the outputs
    of the graph, joined in the order of `OUTPUTS`, the features first.

    Args:
        graph: The graph's file.
        config: See `ExportedConfig`.
        widths: Columns of each output.
        precision: Of the graph's numbers: `fp32` or `int8`.
        digest: Of the graph's bytes.
        notes: What a person should know beside its predictions, in sentences.
    """

    centres = None  # a graph has no input for the stain
    guard = None  # it is in the graph

    def __init__(
        self,
        graph: Path,
        config: ExportedConfig,
        widths: Mapping[str, int],
        precision: str,
        digest: str,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.precision = precision
        self.notes = list(notes)
        self._graph, self._widths, self._digest = graph, dict(widths), digest
        self._session: Session | None = None
        # None of its own, but what computes with it asks for a device and type.
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def glovlm(self) -> "ExportedClassifier":
        """Its backbone: the graph is both."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Type of the outputs."""
        return torch.float32

    def to(self, *args: Any, **kwargs: Any) -> "ExportedClassifier":
        """Stay on the processor, where graphs are computed.

        Args:
            *args: As `torch.nn.Module.to` takes them.
            **kwargs: As `torch.nn.Module.to` takes them.
        """
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | torch.device) and torch.device(device).type != "cpu":
            logger.warning("An exported graph is computed on the CPU, not on %s.", device)
        return self

    def pool_images_and_middle(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Run the graph.

        Args:
            pixel_values: `[n, channels, height, width]`, from the processor.

        Returns:
            All outputs joined, `[n, width]`; and `[n, 0]`.
        """
        if self._session is None:
            self._session = self._open()
        return self._run(self._session, pixel_values)

    def project_images(self, pooled: Tensor) -> Tensor:
        """Outputs `[n, width]`, as they are: their first columns are the features."""
        return pooled

    def classify_features(self, joined: Tensor, stain_ids: None = None) -> Tensor:
        """Calibrated logits `[n, classes]` among the outputs `[n, width]`."""
        return self.answer(joined).logits

    def answer(self, joined: Tensor) -> Answers:
        """Take the outputs `[n, width]` apart."""
        names = [name for name in OUTPUTS if name in self._widths]
        parts = torch.split(joined, [self._widths[name] for name in names], dim=1)
        by_name = dict(zip(names, parts, strict=True))
        distances = by_name.get("support_distance")
        return Answers(
            by_name["logits"],
            by_name.get("similarities"),
            None if distances is None else distances.squeeze(1),
        )

    def encoder_key(self, processor: "GloVLMProcessor") -> str:
        """Hash of all that decides the outputs: the graph's bytes and the image transform."""
        images = processor.image_processor
        about = {
            "graph": self._digest,
            "libraries": list(map(package_version, ("pillow", "torchvision", "transformers"))),
            "transform": [type(images).__name__, json.loads(images.to_json_string())],
            "crop": processor.torchvision_crop,
            "outline": processor.outline,
            "draft": processor.draft_side,
        }
        return digest_value(about)

    def open_engine(self, precision: str = "fp32", runtime: str = "torch") -> "Engine":
        """Engine of the graph.

        Args:
            precision: What was asked for: the default `fp32`, or `auto`, is that of the graph.
            runtime: What was asked for: the default `torch`, or `auto`, is onnxruntime.

        Raises:
            GloVLMError: The graph is of another precision, or a package is missing.
        """
        from .engines import Engine

        runtime = "openvino" if runtime == "openvino" else "onnx"
        actual = self.precision if precision in ("fp32", "auto") else precision
        if actual != self.precision and not (
            (self.precision, runtime) == ("fp32", "openvino") and actual in ("bf16", "fp16")
        ):
            again = "--format int8" if actual == "int8" else "--format onnx"
            raise GloVLMError(
                f"The exported graph {self._graph} is computed in {self.precision} by {runtime}, "
                f"and precision {precision} was asked for: leave it out, or export the run with "
                f"{again}."
            )
        session = self._open(runtime, actual)
        return Engine(
            model=self,
            precision=actual,
            runtime=runtime,
            measured=None,
            pool=lambda inputs: self._run(session, inputs["pixel_values"]),
        )

    def _open(self, runtime: Any = "onnx", precision: str = "fp32") -> Session:
        names = [name for name in OUTPUTS if name in self._widths]
        hint = "fp32" if precision == "int8" else precision  # of what is not quantised
        return Session(self._graph, names, runtime=runtime, precision=hint)

    def _run(self, session: Session, pixels: Tensor) -> tuple[Tensor, Tensor]:
        columns = [values.reshape(len(values), -1) for values in session.run(pixels)]
        joined = torch.from_numpy(np.concatenate(columns, axis=1))
        if joined.shape[1] != self.config.vision_pooled_dim:
            raise GloVLMError(
                f"The graph {self._graph} has outputs of {joined.shape[1]} columns, and {EXPORT} "
                f"states {self.config.vision_pooled_dim}: export the run again."
            )
        return joined, joined[:, :0]


def is_export(folder: Path) -> bool:
    """Whether a folder is one that `glovlm export` wrote."""
    return (folder / EXPORT).is_file()


def load_export(
    folder: Path,
) -> tuple[ExportedClassifier, "GloVLMProcessor", dict[str, Any] | None]:
    """Load an exported classifier.

    Args:
        folder: What `glovlm export` wrote.

    Returns:
        What `load_classifier` returns; of the run's results, what the commands read of them.

    Raises:
        GloVLMError: It is of an earlier version, or a file is damaged or missing.
    """
    check_kind(folder, "export")
    manifest = read_manifest(folder)
    if manifest is None:
        raise GloVLMError(
            f"'{folder}' was exported by an earlier version, without the features, the image "
            "transform and the hashes of what the model learned from: export the run again "
            "(`glovlm export`)."
        )
    damaged = [name for name in damaged_files(folder, manifest) if name != RUN]
    if (folder / RUN).exists():  # may be left out of a copy
        damaged += damaged_files(folder, manifest, [RUN])
    if damaged:
        raise GloVLMError(
            f"'{folder / damaged[0]}' has changed or is missing since the export: restore a copy, "
            "or export the run again."
        )
    about = read_json(folder / EXPORT)
    check_fields(folder / EXPORT, about, _FIELDS)
    widths = {name: n for name in OUTPUTS if (n := about["outputs"].get(name)) is not None}
    known = about["file"] in manifest.files and is_plain_name(about["file"])
    if not known or about["format"] not in _PRECISION or min(widths.values()) < 1:
        raise GloVLMError(f"'{folder / EXPORT}' is damaged: export the run again.")
    config = _read_config(folder / EXPORT, about["model"], widths)
    graph = folder / about["file"]
    model = ExportedClassifier(
        graph,
        config,
        widths,
        _PRECISION[about["format"]],
        digest_value([digest_file(part) for part in graph_parts(graph)]),
        _notes(about, config),
    )
    run = read_json(folder / RUN) if RUN in manifest.files and (folder / RUN).is_file() else None
    return model.eval(), _read_processor(folder, config), run


def _notes(about: Mapping[str, Any], config: ExportedConfig) -> list[str]:
    notes = [str(note) for note in about["notes"]]
    if config.guard is None or about["format"] != "int8":
        return notes
    measured = about.get("measured")
    agreement = measured.get("unlike_agreement") if isinstance(measured, dict) else None
    how = (
        f"for {agreement:.0%} of the {measured['images']} images measured at the export both agree "
        "on that"
        if measured and isinstance(agreement, float)
        else "how far both agree was not measured"
    )
    return [
        *notes,
        "Which images are unlike those that the model learned from is computed in int8, and the "
        f"limit comes from the model in fp32: {how}.",
    ]


def _read_config(file: Path, fields: dict[str, Any], widths: Mapping[str, int]) -> ExportedConfig:
    check_config({"model_type": "glovlm", **fields}, file)
    labels = fields.get("id2label") or {}
    known = {int(key): str(name) for key, name in labels.items() if str(key).isdecimal()}
    if fields.keys() != {*CONFIG} or sorted(known) != [*range(widths["logits"])]:
        raise GloVLMError(f"'{file}' is damaged: export the run again.")
    return ExportedConfig(
        image_feature_dim=widths["features"],
        vision_pooled_dim=sum(widths.values()),
        **{**fields, "id2label": known},
    )


def _read_processor(folder: Path, config: ExportedConfig) -> "GloVLMProcessor":
    """The model's processor, but for its tokenizer, which reads no text here."""
    from tokenizers import Tokenizer, models
    from transformers import AutoImageProcessor, PreTrainedTokenizerFast

    from ..model import GloVLMProcessor
    from ..model.outlines import draw_centre

    about = read_json(folder / PREPROCESSING)
    check_fields(folder / PREPROCESSING, about, _INPUT)
    crop = about["preprocessing"]["center_crop"] or {}
    try:
        processor = GloVLMProcessor(
            AutoImageProcessor.from_pretrained(folder),
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())),
            torchvision_crop=crop.get("odd_margin") == "to_even",
            outline=config.outline,
            draft=config.draft,
        )
        from PIL import Image

        picture = draw_centre(Image.new("RGB", (64, 48)))  # one with an outline
        made = processor(images=picture, return_tensors="pt")["pixel_values"]
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(
            f"The image transform in '{folder}' cannot be used ({first_line_of(error)}): export "
            "the run again."
        ) from error
    if list(made.shape[1:]) != about["input"]["shape"][1:]:
        raise GloVLMError(
            f"The image transform in '{folder}' makes images of shape {list(made.shape[1:])}, and "
            f"the graph takes {about['input']['shape'][1:]}: export the run again."
        )
    return processor
