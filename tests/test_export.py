"""An exported graph says what the model says, and its sidecar is all that one needs to ask it."""

import builtins
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_explain import classifier as make_classifier
from tiny import CLASSES, tiny_clip, tiny_images, tiny_siglip

from hf_glovlm import adapt, load_dataset
from hf_glovlm.data.splits import all_rows
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.phantoms import render_cohort, render_dataset
from hf_glovlm.publish import onnx_graph
from hf_glovlm.publish.onnx_graph import (
    ExportReport,
    describe_input,
    export_classifier,
    export_model,
)


def classifier(name: str) -> tuple[Any, Any]:
    """One whose base may be passed on."""
    model, processor = make_classifier(name)
    model.config.backbone_name, model.config.backbone_license = "own", "mit"
    return model, processor


def ask(folder: Path, pixels: Any) -> Any:
    (graph,) = folder.glob("*.onnx")
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": np.asarray(pixels, np.float32)})[0]


def read_export(folder: Path, name: str = "preprocessing") -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@cache
def _exported(name: str) -> tuple[Any, Any, Path, ExportReport]:
    """Once a session, as each takes seconds."""
    model, processor = classifier(name)
    model.config.temperature, model.config.prior_shift = 0.5, [0.1, -0.2, 0.3]
    model.train()
    folder = tiny_clip().parent / f"export-{name}"
    data = render_dataset(list(model.config.label2id), patients=3)
    report = export_classifier(
        model, processor, folder, data=data, data_name="drawings", synthetic=True
    )
    assert model.training
    assert model.head.training
    return model.eval(), processor, folder, report


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("clip", marks=pytest.mark.long),
        "pair",
        pytest.param("siglip", marks=pytest.mark.long),
    ],
)
def test_the_graph_is_the_model(name: str) -> None:
    model, processor, folder, report = _exported(name)
    assert sorted(p.name for p in folder.iterdir()) == [
        *("export.json", "manifest.json", "model.onnx", "preprocessing.json"),
        "preprocessor_config.json",
    ]
    images = [p.image for p in render_cohort(1, 7, seed=9)]
    for pixels in (
        torch.randn(1, 3, 32, 32),
        processor(images=images, return_tensors="pt")["pixel_values"],
    ):
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits  # calibrated
        np.testing.assert_allclose(ask(folder, pixels), logits.numpy(), atol=1e-4)
    assert report.largest_difference <= 1e-4
    assert report.measured.agreement == 1
    assert report.measured.compared_with == "model"
    assert report.size == (folder / "model.onnx").stat().st_size
    assert read_export(folder, "export")["measured"]["source"] == "drawings"
    assert read_export(folder, "export")["measured"]["synthetic"] is True


def by_the_sidecar(about: dict[str, Any], image: Image.Image) -> Any:
    """Prepare an image with Pillow and numpy, from nothing but the sidecar."""
    steps = about["preprocessing"]
    size, resize = (image.width, image.height), steps["resize"]
    if "shortest_edge" in resize:
        short = resize["shortest_edge"]
        size = tuple(int(short * side / min(size)) for side in size)  # type: ignore[assignment]
    else:
        size = (resize["width"], resize["height"])
    image = image.resize(size, Image.Resampling[resize["resample"].upper()])
    if crop := steps["center_crop"]:
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        assert crop["odd_margin"] == "down"
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(image, np.float64) * steps["rescale"]
    pixels = (pixels - steps["mean"]) / steps["std"]
    return pixels.transpose(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["clip", "pair", "siglip"])
def test_the_sidecar_is_enough(name: str) -> None:
    model, processor = classifier(name)
    image = render_cohort(1, 1, seed=5)[0].image.resize((61, 44))
    mine = processor(images=[image], return_tensors="pt")["pixel_values"]
    report = ExportReport(Path(), "model.onnx", "onnx", 20, 1, 1, 0.0, None)
    about = describe_input(model, processor, mine, report)
    pixels = by_the_sidecar(about, image)
    assert list(pixels.shape[1:]) == about["input"]["shape"][1:]
    np.testing.assert_allclose(pixels, mine.numpy(), atol=0.05)  # a grey level or two


def test_the_sidecar_describes_the_graph() -> None:
    model, processor, folder, _ = _exported("pair")
    about = read_export(folder)
    image = render_cohort(1, 1, seed=5)[0].image.resize((61, 44))
    with torch.no_grad():
        logits = model(**processor(images=[image], return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(ask(folder, by_the_sidecar(about, image)), logits, atol=0.05)
    assert about["output"]["classes"] == list(CLASSES)
    assert about["output"]["temperature"] == 0.5
    assert about["output"]["prior_shift"] == [0.1, -0.2, 0.3]
    assert about["output"]["calibration_in_graph"] is True
    assert "not for diagnosis" in about["note"]
    assert about["mpp"] is None
    graph = onnx.load(folder / about["file"])
    props = {prop.key: prop.value for prop in graph.metadata_props}
    assert json.loads(props["classes"]) == list(CLASSES)
    assert "not for diagnosis" in props["note"]
    assert about["opset"] == next(o.version for o in graph.opset_import if not o.domain)


def test_nothing_tells_where_it_lay() -> None:
    _, _, folder, _ = _exported("pair")
    here = str(tiny_clip().parent).encode()
    for path in folder.iterdir():
        assert here not in path.read_bytes(), path.name
        assert b"/work/" not in path.read_bytes(), path.name


def test_int8_is_measured(tmp_path: Path) -> None:
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images", per_class=4)))
    adapted = adapt(str(tiny_siglip()), "linear_probe", rows)
    adapted.save(tmp_path / "run" / "model")
    stages: list[str] = []
    report = export_model(
        tmp_path / "run",
        tmp_path / "out",
        format="int8",
        data=rows,
        data_name="discs",
        on_stage=stages.append,
        reason="These weights are random and were made by a test.",
    )
    assert stages == ["exporting", "checking", "quantising", "measuring"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("export.json", "manifest.json", "model_int8.onnx", "preprocessing.json"),
        "preprocessor_config.json",
    ]
    graph = onnx.load(tmp_path / "out" / "model_int8.onnx")
    assert sum(node.op_type == "MatMulInteger" for node in graph.graph.node) >= 8
    pixels = adapted.processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
    logits = ask(tmp_path / "out", pixels)
    with torch.no_grad():
        before = adapted.model.eval()(pixel_values=pixels).logits.numpy()
    true, measured = np.array(rows["label"][:]), report.measured
    assert (measured.images, measured.source, measured.synthetic) == (12, "discs", False)
    # Activations are quantised a batch at a time, so that another batch may round another way.
    assert measured.accuracy == pytest.approx((logits.argmax(1) == true).mean(), abs=0.1)
    assert measured.accuracy_before == pytest.approx((before.argmax(1) == true).mean())
    assert measured.agreement >= 0.7
    # Sums of 8-bit products overflow where there is no VNNI, and this was .049 then.
    assert 0 < measured.largest_probability_difference < 0.02
    assert measured.speed_ratio > 0
    assert report.size < report.size_fp32
    assert read_export(tmp_path / "out", "export")["measured"]["accuracy"] == measured.accuracy
    assert read_export(tmp_path / "out")["format"] == "int8"


def _graph_of(folder: Path) -> Callable[..., int]:
    """Writes the graph that an earlier export left in this folder."""

    def write(module: Any, example: Any, path: Path, outputs: Any) -> int:
        shutil.copy(folder / "model.onnx", path)
        return 20

    return write


def test_what_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, folder, _ = _exported("pair")
    before = model.head.weight.data.clone()
    monkeypatch.setattr(onnx_graph, "write_graph", _graph_of(folder))
    export_classifier(model, processor, tmp_path / "same")
    for change in (1e-2, float("nan")):
        model.head.weight.data = before * (1 + change)
        with pytest.raises(GloVLMError, match=r"differs from the model by .* at most 0.0001"):
            export_classifier(model, processor, tmp_path / "out")
    model.head.weight.data = before
    assert [p.name for p in tmp_path.iterdir()] == ["same"]


@pytest.mark.long
def test_tokens_between_the_blocks_are_in_the_graph(tmp_path: Path) -> None:
    model, processor = classifier("pair")
    model.glovlm.add_adapter_modules(
        {"vision": {"tokens": 2, "depth": 2}, "bottleneck": {"layers": [1], "width": 4}}
    )
    with torch.no_grad():
        model.glovlm.inserts.vision.table.normal_()
        plain = classifier("pair")[0](pixel_values=torch.ones(1, 3, 32, 32)).logits
    report = export_classifier(model, processor, tmp_path / "out")
    assert report.largest_difference <= 1e-4
    assert np.abs(ask(tmp_path / "out", torch.ones(1, 3, 32, 32)) - plain.numpy()).max() > 1e-2


def _cocoop(model: Any) -> None:
    model.head.needs_model = True


def _context(model: Any) -> None:
    model.glovlm.add_context({"layers": [0], "text_dim": 32, "keep": 0.5})


def _forbid(model: Any) -> None:
    model.config.backbone_restrictions = ["non-commercial", "no-derivatives"]
    model.config.backbone_license = "cc-by-nc-nd-4.0"


def _gate(model: Any) -> None:
    model.config.backbone_name = "conch"


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("pair", _cocoop, {}, "method cocoop"),
    ("pair", _context, {}, "method convlm"),
    ("pair", _forbid, {}, "licensed cc-by-nc-nd-4.0, without derivatives.*no option overrides"),
    (
        "pair",
        _gate,
        {},
        "'conch' cannot be published: it is gated .* no option overrides",
    ),
    ("pair", _forbid, {"format": "int8"}, "no option overrides"),
    ("siglip2", None, {}, "SigLIP 2 takes each image in a shape of its own"),
    ("pair", None, {"format": "int4"}, "Unknown format 'int4'.* Did you mean 'int8'"),
]


@pytest.mark.parametrize(("name", "change", "options", "message"), REFUSED)
def test_what_cannot_be_exported(
    name: str, change: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, processor = classifier(name)
    if change is not None:
        change(model)
    with pytest.raises(GloVLMError, match=message):
        export_classifier(model, processor, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    model, processor = classifier("pair")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(GloVLMError, match="in use"):
        export_classifier(model, processor, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images", per_class=1))).select([])
    with pytest.raises(GloVLMError, match="no images to measure on"):
        export_classifier(model, processor, tmp_path / "out", data=rows)
    with pytest.raises(GloVLMError, match="nothing at"):
        export_model(tmp_path / "no" / "run", tmp_path / "out")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = classifier("pair")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_graph, "write_graph", stop)
    with pytest.raises(KeyboardInterrupt):
        export_classifier(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = classifier("pair")

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("\nno such operator\nmore")

    monkeypatch.setattr(model.glovlm, "get_image_features", forward)
    with pytest.raises(GloVLMError, match=r"as one graph \(.+\): use the model itself"):
        export_classifier(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = classifier("pair")
    find = builtins.__import__

    def hide(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(GloVLMError, match=re.escape("pip install 'hf-glovlm[export]'")):
        export_classifier(model, processor, tmp_path / "out")


@pytest.mark.parametrize("names", [["viable", "ischemic"], ["viable", "crescentic"]])
def test_synthetic_images_have_labels_where_the_classes_can_be_drawn(names: list[str]) -> None:
    rows = render_dataset(names, patients=3)
    drawn = render_cohort(3, 10, seed=4242)
    known = set(names) <= {p.class_name for p in drawn}
    assert known == (names[1] == "ischemic") == ("label" in rows.column_names)
    expected = [p.class_name for p in drawn if not known or p.class_name in names]
    assert len(rows) == len(expected)
    if known:
        assert [names[k] for k in rows["label"]] == expected


def test_without_data_the_graph_is_checked_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, folder, _ = _exported("pair")
    monkeypatch.setattr(onnx_graph, "write_graph", _graph_of(folder))
    report = export_classifier(model, processor, tmp_path / "out")
    assert report.largest_difference <= 1e-4
    assert report.measured is None
    assert read_export(tmp_path / "out", "export")["measured"] is None
