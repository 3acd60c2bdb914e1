"""ONNX export: a trained classifier as one graph, images in and calibrated logits out.

The graph is checked against the model before it is kept. Files beside it hold its preprocessing and
what `glovlm predict`, `evaluate` and `slide` need to take the folder in the place of the model (see
`inference.exported`). Research use only, not for diagnosis.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..calibration.inputs import softmax
from ..data.folder import column
from ..errors import GloVLMError, nearest
from ..files import check_fields, replacing, write_manifest
from ..inference import evaluation_mode, load_classifier
from ..inference.exported import CONFIG, EXPORT, OUTPUTS, PREPROCESSING, RUN
from ..inference.graphs import (
    INPUT,
    Session,
    check_packages,
    graph_parts,
    quantise_graph,
    write_graph,
)
from ..inference.prediction import ImageRows
from ..model.outlines import CENTRE, FILL, blanks, draw_centre, pools
from .identifiers import Identifiers, Text, identifiers_of, refuse_named, texts_of
from .licences import check_publishing
from .staging import search_folder

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model import GloVLMForImageClassification, GloVLMProcessor

__all__ = ["ExportReport", "Format", "Measured", "export_classifier", "export_model"]

Format = Literal["onnx", "int8"]

TOLERANCE = 1e-4  # of logits in fp32; of the other outputs over the largest of each
DISCLAIMER = "Research use only, not for diagnosis."
_OUTPUT, _DISTANCE = "logits", "support_distance"
_UNGUARDED = (
    "The guard against images unlike the support is left out: the middle of this vision tower "
    "cannot be written into the graph."
)
_LEARNED = ("group_column", "support_groups_sha256", "learned_from")  # of a run's `data`


@dataclass(frozen=True)
class Measured:
    """Agreement and speed of an exported graph against its source, on the same images.

    Args:
        images: How many.
        source: The name of the data.
        synthetic: Whether these are synthetic images: then the numbers test software only.
        compared_with: What was exported (`model`) or quantised (`onnx`).
        agreement: Share of the images that get the same class.
        largest_probability_difference: Over images and classes.
        unlike_agreement: Share of the images that both call unlike the support, or both do not;
            `None` without a guard.
        accuracy: Of the graph; `None` where no label is known.
        accuracy_before: Of what it was made from.
        speed_ratio: Time of what it was made from over that of the graph: above 1 is faster. Each
            is the least of several, taken by turns.
        milliseconds: Of one image in the graph, on this machine.
        batch: Images at a time when it was timed.
    """

    images: int
    source: str
    synthetic: bool
    compared_with: Literal["model", "onnx"]
    agreement: float
    largest_probability_difference: float
    unlike_agreement: float | None
    accuracy: float | None
    accuracy_before: float | None
    speed_ratio: float
    milliseconds: float
    batch: int


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Args:
        folder: Where.
        file: Name of the graph in it.
        format: `onnx` or `int8`.
        opset: ONNX operators' version.
        size: Bytes of the graph, weights included.
        size_fp32: Bytes of the graph in fp32.
        largest_difference: Of the fp32 graph's logits from the model's, on noise and data.
        measured: On the data's images; `None` without data.
        notes: What the graph lacks of the model, in sentences.
    """

    folder: Path
    file: str
    format: Format
    opset: int
    size: int
    size_fp32: int
    largest_difference: float
    measured: Measured | None
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For a JSON file: without the folder."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def export_model(
    source: str | Path,
    output_dir: str | Path,
    *,
    format: Format = "onnx",
    data: "Dataset | None" = None,
    data_name: str = "",
    synthetic: bool = False,
    tolerance: float = TOLERANCE,
    reason: str | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export what `glovlm train` wrote: a run's folder, its `model/`, or a Hub id.

    The other arguments, what is written and what is raised are those of `export_classifier`.
    """
    model, processor, results = load_classifier(str(source))
    return export_classifier(
        model,
        processor,
        output_dir,
        format=format,
        data=data,
        data_name=data_name,
        synthetic=synthetic,
        tolerance=tolerance,
        reason=reason,
        on_stage=on_stage,
        forbidden=identifiers_of(source),
        results=results,
    )


def export_classifier(
    model: "GloVLMForImageClassification",
    processor: "GloVLMProcessor",
    output_dir: str | Path,
    *,
    format: Format = "onnx",
    data: "Dataset | None" = None,
    data_name: str = "",
    synthetic: bool = False,
    tolerance: float = TOLERANCE,
    reason: str | None = None,
    on_stage: Callable[[str], None] | None = None,
    forbidden: Identifiers | None = None,
    results: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a classifier as an ONNX graph with its preprocessing, or leave nothing.

    The graph maps `pixel_values` `[batch, 3, height, width]`, of any batch, to `logits`
    `[batch, classes]`, with temperature and prior correction; where the inside of an outline is
    pooled there is a fourth channel, the part of each pixel inside. Further outputs are `features`
    `[batch, dim]`, and where the model has such `similarities` `[batch, classes]` (cosines) and
    `support_distance` `[batch, 1]`, as multiples of the guard's limit. `int8` quantises the weights
    of its matrix products, and activations as they come (onnxruntime's dynamic quantisation), but
    for the guard's own.

    Args:
        model: The classifier, in fp32 on a CPU; it is not changed.
        processor: Its processor.
        output_dir: A folder that is new or empty. It takes `model.onnx` or `model_int8.onnx`,
            `preprocessing.json` and `export.json`; for the commands `preprocessor_config.json`,
            `manifest.json` and, of a run, `run.json`.
        format: `onnx` (fp32) or `int8`.
        data: Rows with `image`, and `label` (a ClassLabel) where known, to measure on; without them
            the graph is only checked, on noise.
        data_name: What to call these.
        synthetic: Whether these are synthetic images.
        tolerance: Most that a logit of the fp32 graph may differ from the model's.
        reason: Why, where the licence of the base asks for one: a graph holds its weights in a form
            that is easily passed on.
        on_stage: Called with the name of each stage.
        forbidden: What names a patient, a file or a place of the run, and may not leave.
        results: Of the run: hashes of the groups and images that it learned from go to `run.json`,
            so that the graph is measured on none of these either.

    Raises:
        GloVLMError: A package is missing, the licence of the base forbids it, the model cannot be
            one graph, its logits differ by more than the tolerance, a class names somebody, or the
            folder is in use.
    """
    notify = on_stage or (lambda text: None)
    _check_request(model, format, reason)
    forbidden = forbidden or Identifiers()
    refuse_named("the model", texts_of({"class_names": _names(model)}), forbidden)
    refuse_named("the command", [Text("data", data_name)], forbidden)
    target = _check_folder(Path(output_dir))
    sample = None if data is None else _images(model, processor, data, data_name, synthetic)
    with evaluation_mode(model), replacing(target) as work:
        work.mkdir()
        notify("exporting")
        plain = work / "model.onnx"
        blank = draw_centre(Image.new("RGB", (64, 64)))
        images = [blank] * 2 if sample is None else sample.images
        example = _prepare(processor, images[:2])
        module, names, opset = _write(model, example, plain)
        _annotate(plain, model)
        notify("checking")
        difference = _largest_difference(module, names, plain, processor, example, images[:16])
        if not difference <= tolerance:
            raise GloVLMError(
                f"The exported graph differs from the model by {difference:.2g} in a logit, at "
                f"most {tolerance:g} is allowed: nothing was kept. Please report `glovlm doctor "
                "--json` and the method."
            )
        shown = [name for name in names if name in (_OUTPUT, _DISTANCE)]
        file, compared = plain, _of_module(module, shown)
        if format == "int8":
            notify("quantising")
            file, compared = work / "model_int8.onnx", Session(plain, shown).run
            # 7 bits, as sums of 8-bit products overflow on processors without VNNI.
            keep = [_DISTANCE] if _DISTANCE in names else []
            quantise_graph(plain, file, keep=keep, per_channel=True, reduce_range=True)
        measured = None
        if sample is not None:
            notify("measuring")
            measured = _measure(
                *(Session(file, shown).run, compared, processor, sample),
                compared_with="onnx" if format == "int8" else "model",
            )
        report = ExportReport(
            folder=target,
            file=file.name,
            format=format,
            opset=opset,
            size=_size(file),
            size_fp32=_size(plain),
            largest_difference=difference,
            measured=measured,
            notes=() if model.guard is None or _DISTANCE in names else (_UNGUARDED,),
        )
        if file != plain:
            for part in graph_parts(plain):
                part.unlink()
        _write_json(work / PREPROCESSING, describe_input(model, processor, example, report))
        processor.image_processor.save_pretrained(work)
        _write_json(work / EXPORT, _describe(model, module, names, example, report))
        search_folder(work, forbidden)
        if results is not None:
            _write_json(work / RUN, _describe_run(results))
        write_manifest(work, "export", {"format": format, "opset": opset})
    return report


def _describe(
    model: Any, module: "_Outputs", names: Sequence[str], example: Tensor, report: ExportReport
) -> dict[str, Any]:
    """What `export.json` holds: the report, and what the commands read of the model."""
    fields = {name: getattr(model.config, name) for name in CONFIG}
    fields["guard"] = fields["guard"] if _DISTANCE in names else None
    with torch.no_grad():
        widths = [int(output.shape[1]) for output in module(example)]
    return {
        "kind": "export",
        **report.describe(),
        "outputs": dict(zip(names, widths, strict=True)),
        "model": fields,
        "note": DISCLAIMER,
    }


def _describe_run(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` holds: of the run's results, what the commands read.

    That is hashes alone, but under the names of columns, so that it is not searched.
    """
    check_fields(Path("results.json"), results, {"data": (dict,)})
    data = results["data"]
    return {
        "note": (
            "Hashes of the groups and images that the model learned from, so that it is not "
            "measured on them, and its confusion matrix. A short id can be guessed from its hash: "
            "leave this file out where the folder is passed on."
        ),
        "kind": "adaptation",
        "data": {name: data[name] for name in _LEARNED if name in data},
        "confusion_matrix": results.get("confusion_matrix"),
    }


def describe_input(
    model: Any, processor: Any, example: Tensor, report: ExportReport
) -> dict[str, Any]:
    """Preprocessing of the graph's input and meaning of its output, as plain values."""
    transform, config = processor.image_processor, model.config
    size = transform.size
    resize: dict[str, Any] | None = None
    if transform.do_resize:
        keys = ("shortest_edge",) if size["shortest_edge"] else ("height", "width")
        resize = {key: int(size[key]) for key in keys}
        resize |= {"resample": Image.Resampling(int(transform.resample)).name.lower()}
        resize |= {"antialias": True}
    crop: dict[str, Any] | None = None
    if getattr(transform, "do_center_crop", False):
        crop = {key: int(transform.crop_size[key]) for key in ("height", "width")}
        # An odd margin is halved to the even number, or down; a smaller image is padded with black.
        crop |= {"odd_margin": "to_even" if processor.torchvision_crop else "down"}
    normalised = bool(transform.do_normalize)
    return {
        "note": DISCLAIMER,
        "file": report.file,
        "format": report.format,
        "opset": report.opset,
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "shape": ["batch", *example.shape[1:]],
            "layout": "NCHW",
            "channel_order": "RGB, inside" if pools(config.outline) else "RGB",
        },
        "outline": _describe_outline(config),
        "preprocessing": {
            "resize": resize,
            "center_crop": crop,
            "jpeg_draft_side": processor.draft_side or None,
            "rescale": float(transform.rescale_factor) if transform.do_rescale else None,
            "mean": list(map(float, transform.image_mean)) if normalised else None,
            "std": list(map(float, transform.image_std)) if normalised else None,
        },
        "mpp": config.mpp,
        "output": {  # `features` and others beside it are described in export.json
            "name": _OUTPUT,
            "classes": _names(model),
            "probabilities": "softmax",
            "temperature": config.temperature,
            "prior_shift": config.prior_shift,
            "calibration_in_graph": True,
        },
        "backbone": config.backbone_name,
        "license": config.backbone_license,
        "synthetic": config.synthetic,
    }


def _describe_outline(config: Any) -> dict[str, Any] | None:
    """What to do with the outline of an image; `None` where it is not used."""
    if config.outline == "ignore":
        return None
    inside = "of the part of each pixel inside of the outline, 0 to 1, resized and cropped as RGB"
    return {
        "mode": config.outline,
        "around": config.outline_of,
        "circle": CENTRE if config.outline == "centre" else None,
        "fill_outside": [FILL] * 3 if blanks(config.outline) else None,
        "fourth_channel": inside if pools(config.outline) else None,
        "without_an_outline": "everything is inside",
    }


# ------------------------------------------------------------------------------ what can be done


def _check_request(model: Any, format: str, reason: str | None) -> None:
    if format not in get_args(Format):
        raise GloVLMError(
            f"Unknown format '{format}': expected {' or '.join(get_args(Format))}."
            f"{nearest(format, get_args(Format))}"
        )
    config = model.config
    check_publishing(config, "export", reason)
    if getattr(model.head, "needs_model", False):
        raise GloVLMError(
            "This head reads every class text anew for each image (method cocoop), so the text "
            "tower would run inside the graph once an image and class: use the model itself, or "
            "export one of another method."
        )
    if getattr(config, "stain_centres", None):
        raise GloVLMError(
            "This model centres features by the stain (--centre stain), and a graph has no input "
            "that states it: use the model itself, or export one that was trained without."
        )
    if getattr(config, "context", None):
        raise GloVLMError(
            "Context-guided layers (method convlm) cannot be traced into one graph: use the model "
            "itself, or export one of another method."
        )
    if "siglip2" in config.backbone_config.model_type:
        raise GloVLMError(
            "SigLIP 2 takes each image in a shape of its own, and a graph has one input shape: use "
            "the model itself, or a backbone of one image size."
        )
    check_packages("onnx", "onnxruntime", "onnxscript", need="Exporting")


def _check_folder(target: Path) -> Path:
    target = target.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GloVLMError(
            f"Expected a new or empty folder for the graph, found {target} in use: choose another."
        )
    return target


def _names(model: Any) -> list[str]:
    return [str(model.config.id2label[k]) for k in range(len(model.config.id2label))]


class _Sample(NamedTuple):
    """Images to measure on."""

    images: list[Image.Image]
    labels: NDArray[np.int64] | None  # class numbers, -1 unknown
    source: str
    synthetic: bool


def _images(model: Any, processor: Any, data: "Dataset", name: str, synthetic: bool) -> _Sample:
    """The images of the data, with the model's number of each one's class."""
    if not len(data):
        raise GloVLMError("There are no images to measure on: give a folder with images in it.")
    images = ImageRows(data, processor.outline).pictures(range(len(data)))
    labels = None
    if "label" in data.column_names:
        names, known = _names(model), data.features["label"].names
        index = [names.index(label) if label in names else -1 for label in known]
        labels = np.array([index[k] for k in column(data, "label")], np.int64)
    return _Sample(images, labels, name or "data", synthetic or bool(model.config.synthetic))


# -------------------------------------------------------------------------------------- the graph


class _Outputs(nn.Module):
    """The forward pass with one input and the outputs of a graph.

    Args:
        model: The classifier.
        guarded: Whether the distance to the support is among them.

    Attributes:
        names: Of the outputs.
    """

    def __init__(self, model: Any, *, guarded: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.guarded = guarded
        self.compares = bool(getattr(model.head, "cosine", False))
        has = (True, True, self.compares, guarded)
        self.names = [name for name, there in zip(OUTPUTS, has, strict=True) if there]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        distances: tuple[Tensor, ...] = ()
        if self.guarded:
            pooled, middle = model.glovlm.pool_images_and_middle(pixel_values)
            features = model.glovlm.project_images(pooled)
            distances = (model.guard(middle if middle.shape[1] else pooled).unsqueeze(1),)
        else:
            features = model.glovlm.get_image_features(pixel_values, return_dict=True).pooler_output
        outputs = [features, model.classify_features(features)]
        if self.compares:
            outputs.append(nn.functional.normalize(features, dim=-1) @ model.head.weight.T)
        return (*outputs, *distances)


def _write(model: Any, example: Tensor, path: Path) -> tuple[_Outputs, list[str], int]:
    """Write the graph; without the guard where the tower's middle cannot be traced."""
    fitted = model.guard is not None and bool(model.guard.means.isfinite().all())
    module = _Outputs(model, guarded=fitted).eval()
    try:
        return module, module.names, write_graph(module, example, path, module.names)
    except GloVLMError:
        if not fitted:
            raise
    module = _Outputs(model, guarded=False).eval()
    return module, module.names, write_graph(module, example, path, module.names)


def _annotate(path: Path, model: Any) -> None:
    """Write classes and disclaimer into the graph's metadata, and remove all other metadata.

    The exporter notes at each node which line of which file it comes from, with the folders of this
    machine.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
    onnx.helper.set_model_props(
        proto, {"note": DISCLAIMER, "classes": json.dumps(_names(model), ensure_ascii=False)}
    )
    proto.doc_string = DISCLAIMER
    onnx.save(proto, path)


def _size(graph: Path) -> int:
    return sum(part.stat().st_size for part in graph_parts(graph))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- checked and measured


# Logits, and where there is a guard distances to the support, of a batch.
Classifier = Callable[[Tensor], list[NDArray[np.float32]]]


def _of_module(module: _Outputs, names: Sequence[str]) -> Classifier:
    places = [module.names.index(name) for name in names]

    def classify(pixels: Tensor) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            outputs = module(pixels)
        return [outputs[place].numpy() for place in places]

    return classify


def _prepare(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    pixels: Tensor = processor(images=list(images), return_tensors="pt")[INPUT].float()
    return pixels


def _largest_difference(
    module: _Outputs,
    names: Sequence[str],
    path: Path,
    processor: Any,
    example: Tensor,
    images: Sequence[Image.Image],
) -> float:
    """Over noise and images, in batches of several sizes; not a number counts as infinite.

    Logits are compared as they are, other outputs over the largest of each where that is above 1.
    """
    noise = torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    noise[:, 3:] = (noise[:, 3:] > 0).float()  # pixels inside of an outline
    session, difference = Session(path, names), 0.0
    for batch in (noise[:1], noise, _prepare(processor, images)):
        with torch.no_grad():
            expected = [output.numpy() for output in module(batch)]
            expected[names.index(_OUTPUT)] = module.model(pixel_values=batch).logits.numpy()
        for name, actual, plain in zip(names, session.run(batch), expected, strict=True):
            scale = 1.0 if name == _OUTPUT else max(1.0, float(np.abs(plain).max()))
            apart = float(np.abs(actual - plain).max()) / scale
            difference = max(difference, apart if np.isfinite(apart) else float("inf"))
    return difference


def _measure(
    graph: Classifier,
    before: Classifier,
    processor: Any,
    sample: _Sample,
    *,
    compared_with: Literal["model", "onnx"],
    batch: int = 8,
    repeats: int = 15,
) -> Measured:
    """Compare both on the same images; timed by turns, so that both meet the same machine."""
    images, labels, source, synthetic = sample
    batches: list[list[list[NDArray[np.float32]]]] = [[], []]
    for start in range(0, len(images), batch):
        pixels = _prepare(processor, images[start : start + batch])
        for outputs, classify in zip(batches, (graph, before), strict=True):
            outputs.append(classify(pixels))
    joined = [[np.concatenate(parts) for parts in zip(*of, strict=True)] for of in batches]
    new, old = (softmax(logits.astype(np.float64)) for logits, *_ in joined)
    unlike = [distances > 1 for _, *rest in joined for distances in rest]
    pixels = _prepare(processor, images[:batch])
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for times, classify in zip(seconds, (graph, before), strict=True):
            started = time.perf_counter()
            classify(pixels)
            times.append(time.perf_counter() - started)
    taken = min(seconds[0])  # what else the machine does only adds to it
    right: list[float | None] = [None, None]
    if labels is not None and (labels >= 0).any():
        known = labels >= 0
        right = [float((p.argmax(1) == labels)[known].mean()) for p in (new, old)]
    return Measured(
        images=len(images),
        source=source,
        synthetic=synthetic,
        compared_with=compared_with,
        agreement=float((new.argmax(1) == old.argmax(1)).mean()),
        largest_probability_difference=float(np.abs(new - old).max()),
        unlike_agreement=float((unlike[0] == unlike[1]).mean()) if unlike else None,
        accuracy=right[0],
        accuracy_before=right[1],
        speed_ratio=min(seconds[1]) / taken,
        milliseconds=1000 * taken / len(pixels),
        batch=len(pixels),
    )
