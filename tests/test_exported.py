"""An exported folder in the place of the model: the same answers, or a sentence."""

import csv
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Glovlm
from PIL import Image
from slides_made import write_slide
from test_explain import classifier as make_classifier
from test_identity import make
from tiny import tiny_clip, tiny_images

from hf_glovlm import load_classifier
from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import write_manifest
from hf_glovlm.inference import exported
from hf_glovlm.inference.engines import open_engine
from hf_glovlm.inference.graphs import Session, quantise_graph
from hf_glovlm.inference.guard import NO_GUARD
from hf_glovlm.publish import onnx_graph
from hf_glovlm.publish.onnx_graph import ExportReport, describe_input, export_model
from hf_glovlm.runs import run
from hf_glovlm.runs.evaluation import evaluate
from hf_glovlm.runs.provenance import former_provenance
from hf_glovlm.slides import load_encoder
from hf_glovlm.slides.classify import classify_slides
from hf_glovlm.slides.config import SlideConfig
from hf_glovlm.slides.files.bags import read_bag

REASON = "These weights are random and were made by a test."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a temperature, prediction sets, abstention, a prior and a guard; its export."""
    folder = tmp_path_factory.mktemp("exported")
    tiny_images(folder / "images", per_class=24, groups=12)
    tiny_images(folder / "others", per_class=4, seed=1)
    table = folder / "others" / "metadata.csv"
    table.write_text(
        table.read_text().replace(",patient_", ",other_").replace(",other_id", ",patient_id")
    )
    tiny_clip(folder)
    prior = {"mesangial": 0.7, "sclerosed": 0.2, "viable": 0.1}
    settings = {"method": "ss_text", "shots": 4, "calibration_groups": 3, "max_risk": 0.5}
    run(make(folder, **settings, conformal="lac", prior=prior))
    export_model(folder / "run", folder / "graph", reason=REASON)
    return folder


def copy(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "graph", tmp_path / "graph"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_predict_answers_as_the_model(place: Path, tmp_path: Path, glovlm: Glovlm) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), np.uint8)).save(
        tmp_path / "noise.png"
    )
    tables, notes = [], []
    for name in ("run", "graph"):
        done = glovlm(
            *("predict", place / name, place / "others", tmp_path / "noise.png"),
            *("--output", tmp_path / f"{name}.csv"),
        )
        assert done.code == 0
        notes.append([line for line in done.err.splitlines() if ".csv" not in line])
        text = (tmp_path / f"{name}.csv").read_text()
        tables.append([*csv.DictReader(text.splitlines())])
    model, graph = tables
    assert model[0].keys() == graph[0].keys() >= {"set", "answers", "unlike_support"}
    assert len(model) == len(graph) == 13
    for row, other in zip(model, graph, strict=True):
        for name, value in row.items():
            if name.startswith("p_") or name == "support_distance":
                within = 1e-4 if name.startswith("p_") else 1.5e-3  # it is rounded
                assert float(other[name]) == pytest.approx(float(value), abs=within), name
            else:
                assert other[name] == value, name
    assert [line for line in notes[1] if "computed by onnx in fp32" not in line] == notes[0]


def test_evaluate_measures_as_the_model_and_refuses_what_it_learned_from(
    place: Path, tmp_path: Path
) -> None:
    model, graph = (evaluate(place / n, place / "others", n_resamples=20) for n in ("run", "graph"))
    assert graph["config"].pop("runtime") == "onnx"
    assert [note for note in graph["notes"] if "by onnx in fp32" not in note] == model["notes"]
    assert graph["data"] == model["data"]
    assert graph.predictions.similarities is not None
    for name in ("logits", "similarities", "support_distances"):
        actual, expected = (getattr(r.predictions, name) for r in (graph, model))
        np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=name)
    for name, of in model["metrics"].items():
        assert graph["metrics"][name]["value"] == pytest.approx(of["value"], abs=1e-4), name

    sentences = []
    for name in ("run", "graph"):
        with pytest.raises(GloVLMError, match="learned from") as refusal:
            evaluate(place / name, place / "images")
        sentences.append(str(refusal.value))
    assert sentences[0] == sentences[1]
    mine = tmp_path / "mine"  # an image of the support under the name of another patient
    tiny_images(mine, per_class=4, seed=1)
    support = json.loads((place / "run" / "episodes.json").read_text())["draws"][0]["support"]
    first = next(iter(support.values()))[0] if isinstance(support, dict) else support[0]
    shutil.copy(place / "images" / first, mine / "viable" / "image_00.png")
    table = mine / "metadata.csv"
    table.write_text(
        table.read_text().replace(",patient_", ",other_").replace(",other_id", ",patient_id")
    )
    with pytest.raises(GloVLMError, match="learned from 1 of the 4 groups"):
        evaluate(place / "graph", mine)

    alone = copy(place, tmp_path)  # as it is passed on
    (alone / exported.RUN).unlink()
    results = evaluate(alone, place / "others", n_resamples=20)
    assert results["data"]["groups_seen_in_training"] is None
    assert any("cannot be known" in note for note in results["notes"])


def test_slides_are_classified_as_by_the_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slide(tmp_path / "S1.tif", 300, 200, lesions=2, lesion_side=32, seed=1)

    def classify(name: str) -> Any:
        given = {"slides": [str(tmp_path / "S1.tif")], "model": str(place / name)}
        return classify_slides(SlideConfig(**given, output_dir=str(tmp_path / name)))

    model, graph = (classify(name)["slides"][0] for name in ("run", "graph"))
    bags = [read_bag(tmp_path / n / "features" / "S1.h5", scores=True) for n in ("run", "graph")]
    assert bags[0].features.shape == bags[1].features.shape == (model["n_tiles"], 24)
    np.testing.assert_allclose(bags[1].features, bags[0].features, atol=1e-4)
    np.testing.assert_allclose(bags[1].scores, bags[0].scores, atol=1e-4)
    assert bags[1].attributes["runtime"] == "onnx"
    assert bags[1].attributes["fingerprint"] != bags[0].attributes["fingerprint"]
    assert graph["label"] == model["label"]
    assert graph["probabilities"] == pytest.approx(model["probabilities"], abs=1e-4)
    assert graph["counts"] == model["counts"]

    known = former_provenance(str(place / "graph"))  # as a slide classifier asks on these features
    expected = former_provenance(str(place / "run"))
    assert known is not None
    assert expected is not None
    assert (known.groups, known.images) == (expected.groups, expected.images)
    monkeypatch.setattr(Session, "run", None)  # nothing is computed again
    assert classify("graph")["slides"][0] == graph


OUTLINES = ("ignore", "centre", "blank", "pool", "blank+pool")


@pytest.mark.parametrize("kind", ["clip", "siglip", "pair", "torchvision"])
def test_images_are_prepared_as_for_the_model(kind: str, tmp_path: Path) -> None:
    model, processor = make_classifier("clip" if kind == "torchvision" else kind)
    transform = processor.image_processor
    if kind == "torchvision":  # margins of 3 and 7 pixels, halved to even
        transform.size = {"shortest_edge": 35}
        processor.torchvision_crop = True
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((40, 48), (90, 61))
    ]
    outlined = pictures[1].copy()
    alpha = Image.new("L", outlined.size)
    alpha.paste(255, (10, 20, 50, 70))
    outlined.putalpha(alpha)
    transform.save_pretrained(tmp_path)
    config = exported.ExportedConfig(
        24,
        24,
        {},
        None,
        None,
        1.0,
        *[None] * 6,
        outline="ignore",
        outline_of=None,
        draft=False,
        synthetic=False,
    )
    report = ExportReport(tmp_path, "model.onnx", "onnx", 20, 1, 1, 0.0, None)
    for outline in OUTLINES:
        model.config.outline = processor.outline = outline
        images = [*pictures, outlined]
        tensors = processor(images=images, return_tensors="pt")["pixel_values"]
        about = describe_input(model, processor, tensors, report)
        (tmp_path / exported.PREPROCESSING).write_text(json.dumps(about))
        again = exported._read_processor(tmp_path, replace(config, outline=outline))
        made = again(images=images, return_tensors="pt")["pixel_values"]
        assert tensors.shape[1] == (4 if outline in ("centre", "pool", "blank+pool") else 3)
        assert made.equal(tensors), outline
    processor.draft = True  # JPEG files are decoded as for the model
    again = exported._read_processor(tmp_path, replace(config, outline=outline, draft=True))
    assert again.draft_side == processor.draft_side > 0
    if kind == "torchvision":
        processor.torchvision_crop = False
        assert not processor(images=images, return_tensors="pt")["pixel_values"].equal(tensors)


def test_what_contradicts_the_folder_is_refused(place: Path, tmp_path: Path) -> None:
    model, processor, _ = load_classifier(place / "graph", exported=True)
    assert open_engine(model, processor).describe() == {"precision": "fp32", "runtime": "onnx"}
    for options in ({"precision": "int8"}, {"precision": "bf16"}, {"precision": "tf32"}):
        with pytest.raises(GloVLMError, match=f"in fp32 .* {options['precision']} was asked for"):
            open_engine(model, processor, **options)
    if find_spec("openvino"):
        pixels = torch.rand(3, 3, 32, 32)
        other = open_engine(model, processor, runtime="openvino")
        assert other.runtime == "openvino"
        expected = model.pool_images_and_middle(pixels)[0]
        assert other.pool({"pixel_values": pixels})[0].allclose(expected, atol=1e-4)

    folder = copy(place, tmp_path)
    quantise_graph(folder / "model.onnx", folder / "model_int8.onnx", keep=["support_distance"])
    edit_json(folder / "export.json", file="model_int8.onnx", format="int8")
    write_manifest(folder, "export", {})
    small, processor, _ = load_classifier(folder, exported=True)
    assert open_engine(small, processor).precision == "int8"
    assert small.encoder_key(processor) != model.encoder_key(processor)


def test_a_guard_that_cannot_be_traced_is_left_out_aloud(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(module: Any, example: Any, path: Path, outputs: list[str]) -> int:
        if "support_distance" in outputs:
            raise GloVLMError("no such operator")
        shutil.copy(place / "graph" / "model.onnx", path)
        return 20

    monkeypatch.setattr(onnx_graph, "write_graph", write)
    report = export_model(place / "run", tmp_path / "graph", reason=REASON)
    assert "is left out" in report.notes[0]
    results = evaluate(tmp_path / "graph", place / "others", n_resamples=2)
    assert NO_GUARD in results["notes"]
    assert report.notes[0] in results["notes"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"graph"), "has changed or is missing"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has changed or is missi"),
        (lambda folder: (folder / "run.json").write_text("{}"), "has changed or is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "by an earlier version.*run again"),
    ],
)
def test_a_damaged_folder_is_named(place: Path, tmp_path: Path, damage: Any, sentence: str) -> None:
    folder = copy(place, tmp_path)
    damage(folder)
    with pytest.raises(GloVLMError, match=sentence):
        load_classifier(folder, exported=True)


def test_other_commands_name_what_they_got(place: Path, tmp_path: Path, glovlm: Glovlm) -> None:
    graph, images = place / "graph", place / "others"
    image = images / "viable" / "image_00.png"
    few = ["--shots", "1", "--test-fraction", "0.5"]
    for command in (
        ["card", graph],
        ["push", graph, "a/b", "--dry-run"],
        ["explain", graph, image, "--output-dir", tmp_path / "o"],
        ["export", graph, "--output-dir", tmp_path / "o"],
        ["train", "--data", images, "--output-dir", tmp_path / "o", "--backbone", graph, *few],
    ):
        done = glovlm(*command)
        assert done.code == 2, command
        assert "found a graph of `glovlm export`" in done.err, (command, done.err)
    with pytest.raises(GloVLMError, match="found a graph of `glovlm export`"):
        load_encoder(str(graph))  # as a finder does
