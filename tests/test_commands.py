"""The commands for slides, publishing and heat maps, as a user types them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Glovlm
from PIL import Image
from slide_model import outline, train, write_outlines
from slides_made import write_slide
from tiny import tiny_bert, tiny_clip, tiny_images

from hf_glovlm.cli import app
from hf_glovlm.slides.files.bags import BagWriter

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run on images; read only."""
    place = tmp_path_factory.mktemp("images")
    data = tiny_images(place / "data", per_class=8, groups=4)
    arguments = ["train", "--data", data, "--backbone", tiny_clip(), "--output-dir", place / "run"]
    assert app.main([*map(str, arguments), "--shots", "2", "--n-resamples", "50"]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def slide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of drawn tiles."""
    return train(tmp_path_factory.mktemp("tiles"))


def test_slide_writes_label_table_heat_map_and_geojson(
    slide_run: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    for name in ("one", "two"):
        write_slide(tmp_path / f"{name}.tiff", 700, 600, lesions=2, lesion_side=64, blobs=2)
    objects = [outline(100, 100, 120, "a"), outline(105, 102, 118, "b"), outline(300, 250, 90, "c")]
    write_outlines(tmp_path / "objects" / "one.geojson", objects)
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0 no slide")
    slides = [tmp_path / "one.tiff", tmp_path / "two.tiff", broken]
    output = tmp_path / "out"
    done = glovlm(
        "slide", slide_run, *slides, "--output-dir", output, "--tile-size", 64,
        "--objects", tmp_path / "objects", "--case", "patient", "--smooth", "--top", 3, "--json",
    )  # fmt: skip
    assert done.code == 1, done.err  # one slide cannot be read, and that is told
    results = json.loads(done.out)
    assert [entry["status"] for entry in results["slides"]] == ["done", "done", "failed"]
    assert "broken" in done.err
    assert results["slides"][0]["label"] in ("lesion", "tissue")
    for name in ("tiles.parquet", "heatmap.png", "tiles.geojson", "objects.geojson"):
        assert (output / "slides" / "one" / name).is_file()
    written = json.loads((output / "slides" / "one" / "objects.geojson").read_text())
    assert [feature["id"] for feature in written["features"]] == ["a", "b", "c"]
    assert "not for diagnosis" in (output / "README.md").read_text()

    again = glovlm("slide", slide_run, *slides, "--output-dir", output, "--tile-size", 64,
                   "--objects", tmp_path / "objects", "--case", "patient", "--smooth", "--top", 3,
                   "--json")  # fmt: skip
    assert json.loads(again.out) == results  # a finished slide is not encoded again


def test_mil_learns_from_bags_and_refuses_a_missing_one(tmp_path: Path, glovlm: Glovlm) -> None:
    rng = np.random.default_rng(0)
    rows = [["slide", "label", "patient_id"]]
    for i in range(12):
        features = rng.normal(size=(20, 8)).astype(np.float32)
        features[:6] += 4 * (i % 2)
        coords = np.stack([np.arange(20) * 64, np.zeros(20)], 1).astype(np.int64)
        path = tmp_path / "bags" / f"s{i}.h5"
        path.parent.mkdir(exist_ok=True)
        writer = BagWriter(path, dim=8, attributes={"name": f"s{i}"})
        writer.append(features, coords)
        writer.complete()
        rows.append([f"s{i}", "tumour" if i % 2 else "normal", f"p{i}"])
    labels = tmp_path / "slides.csv"
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    common = ["mil", "--features", tmp_path / "bags", "--labels", labels, "--n-resamples", 50]
    done = glovlm(
        *common, "--aggregator", "mean", "--epochs", 30, "--lr", 0.01,
        "--output-dir", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["macro_auc"]["value"] > 0.9
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

    (tmp_path / "bags" / "s3.h5").unlink()
    done = glovlm(*common, "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert "s3" in done.err
    assert not (tmp_path / "other").exists()


def test_crops_cuts_outlines_into_a_folder_that_train_takes(tmp_path: Path, glovlm: Glovlm) -> None:
    write_slide(tmp_path / "one.tiff", 600, 500, blobs=2)
    objects = [
        outline(100, 100, 80, "a", classification={"name": "viable"}),
        outline(300, 200, 60, "b", classification={"name": "sclerosed"}),
        outline(200, 400, 50, "c"),
    ]
    outlines = write_outlines(tmp_path / "one.geojson", objects)
    crops = tmp_path / "crops"
    done = glovlm("data", "crops", tmp_path / "one.tiff", outlines, "--output-dir", crops)
    assert done.code == 0, done.err
    assert "1 objects have no class and lie in unlabelled/: fill in" in done.err
    with (crops / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["viable", "sclerosed", ""]
    assert all((crops / row["file_name"]).is_file() for row in rows)
    assert glovlm("data", "check", crops).code in (0, 1)


def test_caption_writes_a_column(tmp_path: Path, glovlm: Glovlm) -> None:
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertLMHeadModel,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert())
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = ViTConfig(**size, num_attention_heads=2, image_size=32, patch_size=16)
    text = BertConfig(
        **size, num_attention_heads=2, vocab_size=len(tokenizer), is_decoder=True,
        add_cross_attention=True,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=ViTModel(vision), decoder=BertLMHeadModel(text))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path / "captioner"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    data = tiny_images(tmp_path / "data", per_class=2, groups=2)
    done = glovlm("data", "caption", data, "--model", folder, "--max-new-tokens", 3)
    assert done.code == 0, done.err
    with (data / "metadata.csv").open() as file:
        assert all("caption" in row for row in csv.DictReader(file))
    done = glovlm("data", "caption", data, "--model", folder, "--question", "Is this viable?")
    assert done.code == 2
    assert "viable" in done.err


def test_get_says_where_a_set_is(glovlm: Glovlm) -> None:
    done = glovlm("data", "get", "camelyon16")
    assert done.code == 0
    assert "slides.csv" in done.out
    assert glovlm("data", "get", "camelyon61").code == 2


def test_push_dry_run_lists_what_would_leave(run_folder: Path, glovlm: Glovlm) -> None:
    done = glovlm("push", run_folder, "lab/model", "--dry-run")
    assert done.code == 2  # a base of unknown licence needs a reason
    assert "--reason" in done.err
    reason = "These weights are random and were made by a test."
    done = glovlm("push", run_folder, "lab/model", "--dry-run", "--json", "--reason", reason)
    assert done.code == 0, done.err
    files = json.loads(done.out)["files"]
    assert {"README.md", "model.safetensors", "modeling_glovlm.py", "results.json"} <= set(files)
    assert not {"predictions.parquet", "episodes.json"} & set(files)


@pytest.mark.parametrize(
    ("form", "file"),
    [pytest.param("onnx", "model.onnx", marks=pytest.mark.long), ("clip", "config.json")],
)
def test_export_writes_what_others_read(
    form: str, file: str, run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    reason = "These weights are random and were made by a test."
    done = glovlm(
        "export", run_folder, "--format", form, "--output-dir", tmp_path / "out", "--reason", reason
    )
    if form == "clip":  # a linear probe is no set of texts
        assert done.code == 2
        assert "text" in done.err
        return
    assert done.code == 0, done.err
    assert (tmp_path / "out" / file).is_file()
    assert "synthetic images" in done.out


def test_explain_draws_a_figure_an_image(run_folder: Path, tmp_path: Path, glovlm: Glovlm) -> None:
    Image.new("RGB", (48, 40), "pink").save(tmp_path / "one.png")
    done = glovlm("explain", run_folder, tmp_path / "one.png", "--output-dir", tmp_path / "maps")
    assert done.code == 0, done.err
    assert (tmp_path / "maps" / "one.gradient.png").is_file()
    done = glovlm(
        "explain", run_folder, tmp_path / "one.png", "--output-dir", tmp_path / "maps",
        "--method", "gradiant",
    )  # fmt: skip
    assert done.code == 2
    assert "gradient" in done.err


def test_explain_check_measures_groups_that_were_not_learned_from(
    run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    data = tiny_images(tmp_path / "data", per_class=8, groups=4)  # the run's own
    for path in data.rglob("*.png"):
        mask = tmp_path / "masks" / path.relative_to(data)
        mask.parent.mkdir(parents=True, exist_ok=True)
        down, across = np.mgrid[:40, :40]
        inside = np.hypot(down - 20, across - 20) < 12
        Image.fromarray((255 * inside).astype(np.uint8)).save(mask)
    done = glovlm(
        "explain-check", run_folder, "--data", data, "--masks", tmp_path / "masks",
        "--method", "gradient", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "learned from" in done.err
    found = json.loads(done.out)["methods"]["gradient"]
    assert 0 < found["images"] < 24
    assert found["excess"]["value"] == pytest.approx(
        found["heat"]["value"] - found["area"]["value"]
    )


def test_explain_check_of_one_group_prints_no_interval(
    run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    data = tiny_images(tmp_path / "one_group", per_class=1, groups=1, seed=5)
    for path in data.rglob("*.png"):
        mask = tmp_path / "masks" / path.relative_to(data)
        mask.parent.mkdir(parents=True, exist_ok=True)
        inside = np.indices((40, 40)).sum(0) < 40
        Image.fromarray((255 * inside).astype(np.uint8)).save(mask)
    rows = data / "metadata.csv"
    rows.write_text(rows.read_text().replace("patient_0", "patient_of_elsewhere"))
    done = glovlm(
        "explain-check", run_folder, "--data", data, "--masks", tmp_path / "masks",
        "--method", "gradient",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.splitlines()[2].split()[:3] == ["gradient", "3", "1"]
    assert "[" not in done.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["slide", "nowhere", "x.svs", "--output-dir", "o"], "nowhere"),
        (["mil", "--features", "f"], "--labels"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[Any], expected: str, glovlm: Glovlm, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = glovlm(*arguments)
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "o").exists()
