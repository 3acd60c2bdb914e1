"""Outlined objects of a slide: cut as training crops are, classified once, written as they came."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from scn_made import write_scn
from slide_model import outline, train, write_outlines
from slides_made import write_slide
from tiny import tiny_clip

from hf_glovlm import load_dataset
from hf_glovlm.calibration import ConformalThresholds
from hf_glovlm.cli import main
from hf_glovlm.data.folder import column
from hf_glovlm.data.outlines import open_outlined
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import load_classifier, predict
from hf_glovlm.slides import objects
from hf_glovlm.slides.files.annotations import read_geojson
from hf_glovlm.slides.files.crops import cut_crops
from hf_glovlm.slides.files.wsi import open_slide
from hf_glovlm.slides.objects import GLOMERULUS, classify_objects, read_objects

# Each crop lies within its box, which is of one texture.
BOXES = [(100, 100, 160, 160), (480, 290, 200, 200)]
PLAIN = (660, 520, 200, 170)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    write_slide(
        folder / "s1.tiff", 900, 700, mpp=0.5, lesions=BOXES, blobs=2, compression="deflate"
    )
    train(folder)
    write_outlines(
        folder / "s1.geojson",
        [
            outline(128, 128, 96, "a", classification={"name": "Glomerulus"}, lock=True),
            outline(132, 130, 96, "b", classification={"name": "Glomerulus"}),
            outline(512, 320, 128, "c", classification={"name": "Glomerulus"}, glomerulus_id="g7"),
            outline(700, 540, 96, "d", classification={"name": "Glomerulus"}),
        ],
    )
    return folder


@pytest.fixture(scope="module")
def tools(place: Path) -> Any:
    return load_classifier(str(place / "run"))[:2]


def classify(place: Path, tools: Any, **options: Any) -> Any:
    with open_slide(place / "s1.tiff") as slide:
        return classify_objects(*tools, slide, read_geojson(place / "s1.geojson"), **options)


@pytest.mark.parametrize("outline", ["ignore", "blank"])
def test_objects_are_what_predict_says_of_their_crops(
    place: Path, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outline: str
) -> None:
    for about in (tools[0].config, tools[1]):
        monkeypatch.setattr(about, "outline", outline)
    cut_crops(place / "s1.tiff", place / "s1.geojson", tmp_path / "crops")
    rows = load_dataset(tmp_path / "crops")["all"]
    predictions = predict(*tools, rows.remove_columns("label"))
    result = classify(place, tools, batch_size=2)
    with (tmp_path / "crops/metadata.csv").open(newline="") as stream:
        object_of = {row["file_name"]: row["object_id"] for row in csv.DictReader(stream)}
    names = [object_of[name] for name in rows["file_name"]]
    crops = dict(zip(names, predictions.probabilities, strict=True))
    assert set(crops) == {"a", "c", "d"}
    for item, row in zip(result.objects, result.probabilities, strict=True):
        if item.id in crops:
            assert row == pytest.approx(crops[item.id], abs=1e-5)
    if outline == "ignore":
        assert result.labels == ["lesion", "lesion", "lesion", "tissue"]


def test_the_model_gets_the_very_crops_that_a_training_set_has(
    place: Path, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holed = outline(200.3, 200.4, 90.2, "holed")
    holed["geometry"]["coordinates"] += outline(230, 240, 20)["geometry"]["coordinates"]
    turned = outline(0, 0, 1, "turned")
    turned["geometry"]["coordinates"] = [[[500, 400], [560, 470], [490, 520], [500, 400]]]
    thin = outline(0, 0, 1, "thin")
    thin["geometry"]["coordinates"] = [[[600.1, 100], [600.2, 160], [600.3, 100], [600.1, 100]]]
    features = [holed, turned, thin, outline(850, 650, 90, "partial")]
    path = write_outlines(tmp_path / "o.geojson", features)
    summary = cut_crops(place / "s1.tiff", path, tmp_path / "crops", outline_of="tuft")
    assert summary.thin == ["thin"]
    seen: list[Any] = []

    def watch(model: Any, processor: Any, rows: Any, **options: Any) -> Any:
        seen.extend(column(rows, "image"))
        return predict(model, processor, rows, **options)

    monkeypatch.setattr(objects, "predict", watch)
    for about in (tools[0].config, tools[1]):
        monkeypatch.setattr(about, "outline", "blank")
    with open_slide(place / "s1.tiff") as slide:
        result = classify_objects(*tools, slide, read_geojson(path), outline_of="tuft")
    assert sum("no more than a pixel of their crop (thin)" in note for note in result.notes) == 1
    crops = [open_outlined(file) for file in sorted((tmp_path / "crops").glob("*/*.png"))]
    for crop, given in zip(crops, map(open_outlined, seen), strict=True):
        assert (crop.mode, crop.info["outline"]) == ("RGBA", "tuft")
        assert crop.info == given.info
        assert np.array_equal(np.asarray(crop), np.asarray(given))
    inside = [np.count_nonzero(np.asarray(crop)[..., 3]) for crop in crops]
    assert inside == pytest.approx([90.2**2 - 400, 3950, 1, 50 * 50], rel=0.02)


@pytest.mark.parametrize(
    ("learned", "given", "sentence"),
    [
        (None, "tuft", "the model learned from go around is not stated"),
        ("tuft", None, "learned from outlines around the tuft, and what these go around is not"),
        ("tuft", "capsule", "go around the capsule, and those that the model learned from around"),
        ("tuft", "tuft", None),
    ],
)
def test_outlines_have_to_go_around_what_those_did_that_the_model_learned_from(
    place: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    learned: Any,
    given: Any,
    sentence: Any,
) -> None:
    monkeypatch.setattr(tools[0].config, "outline_of", learned)
    for about in (tools[0].config, tools[1]):
        monkeypatch.setattr(about, "outline", "blank")
    notes = [note for note in classify(place, tools, outline_of=given).notes if "around" in note]
    assert len(notes) == (sentence is not None)
    assert all(sentence in note for note in notes)


def test_a_repeated_outline_is_counted_once(place: Path, tools: Any, tmp_path: Path) -> None:
    result = classify(place, tools)
    assert result.counted.tolist() == [True, False, True, True]
    assert result.repeats == [None, "a", None, None]
    assert result.probabilities[1].tolist() == result.probabilities[0].tolist()
    assert "1 of 4 outlines repeat" in result.notes[0]
    result.save(tmp_path / "objects.parquet")
    probabilities, ids = read_objects(tmp_path / "objects.parquet", "s1")
    assert ids == ["s1 a", f"{GLOMERULUS}g7", "s1 d"]
    assert np.array_equal(probabilities, result.probabilities[[0, 2, 3]])


def test_objects_keep_id_and_geometry_and_get_class_and_probability(
    place: Path, tools: Any, tmp_path: Path
) -> None:
    result = classify(place, tools)
    result.write_geojson(tmp_path / "objects.geojson")
    given = json.loads((place / "s1.geojson").read_text())["features"]
    written = json.loads((tmp_path / "objects.geojson").read_text())["features"]
    for before, after, row in zip(given, written, result.probabilities, strict=True):
        assert (after["id"], after["geometry"]) == (before["id"], before["geometry"])
        assert after["properties"]["measurements"]["p lesion"] == pytest.approx(row[0])
        assert after["properties"]["classification"]["name"] in ("lesion", "tissue")
        assert after["properties"]["metadata"]["given class"] == "Glomerulus"
    assert written[0]["properties"]["lock"] is True
    assert [f["properties"]["measurements"]["counted"] for f in written] == [1, 0, 1, 1]


def test_doubt_and_the_limits_of_a_model_are_measurements(
    place: Path, tools: Any, tmp_path: Path
) -> None:
    plain = classify(place, tools).probabilities
    best = plain.max(axis=1)
    second = 1 - plain.min(axis=1)  # from this limit on both classes are in the set
    least, limit = ((values.min() + values.max()) / 2 for values in (best, second))
    sets = ConformalThresholds("lac", 0.1, False, (float(limit),), (20,), ((0.8, 1.0),))
    model = tools[0]
    model.config.calibration = {
        "abstention": {"threshold": float(least), "max_risk": 0.1},
        "conformal": sets.to_dict(),
    }
    try:
        result = classify(place, tools, batch_size=1)
    finally:
        model.config.calibration = None
    distances = np.array(result.limits["support_distance"])
    unlike, answered = distances > 1, (best >= least) & (distances <= 1)
    result.write_geojson(tmp_path / "objects.geojson")
    result.save(tmp_path / "objects.parquet")
    features = json.loads((tmp_path / "objects.geojson").read_text())["features"]
    numbers = [feature["properties"]["measurements"] for feature in features]
    assert [own["doubt"] for own in numbers] == pytest.approx(1 - best)
    assert [own["abstains"] for own in numbers] == (~answered).tolist()
    assert [own["set size"] for own in numbers] == (1 - plain <= limit).sum(axis=1).tolist()
    assert [own["unlike support"] for own in numbers] == unlike.tolist()
    assert [own["support distance"] for own in numbers] == distances.tolist()
    rows = pq.read_table(tmp_path / "objects.parquet").to_pylist()
    assert [row["doubt"] for row in rows] == pytest.approx(1 - best)
    assert [row["answers"] == "yes" for row in rows] == answered.tolist()
    assert {row["set"] for row in rows} <= {"lesion", "tissue", "lesion or tissue"}


def test_a_class_of_the_outlines_keeps_its_colour_and_text_is_plain_ascii(
    place: Path, tools: Any, tmp_path: Path
) -> None:
    """QuPath up to 0.4.0 reads a file in the machine's own encoding."""
    rose, packed = [200, 30, 60], -(1 << 24) + (1 << 16) + (2 << 8) + 3
    given = [
        outline(128, 128, 96, "a", classification={"name": "lesion", "color": rose}, title="é"),
        outline(700, 540, 96, "d", classification={"name": "tissue", "colorRGB": packed}),
        outline(512, 320, 128, "c", classification={"name": "lesion"}),
    ]
    items = read_geojson(write_outlines(tmp_path / "s1.geojson", given))
    with open_slide(place / "s1.tiff") as slide:
        classify_objects(*tools, slide, items).write_geojson(tmp_path / "objects.geojson")
    text = (tmp_path / "objects.geojson").read_bytes()
    assert text.isascii()
    features = json.loads(text)["features"]
    assert features[0]["properties"]["title"] == "é"
    classes = [feature["properties"]["classification"] for feature in features]
    colours = {"lesion": rose, "tissue": [1, 2, 3]}
    assert all(one["color"] == colours[one["name"]] for one in classes)
    assert {one["name"] for one in classes} == {*colours}


def test_the_table_says_where_each_crop_lies(place: Path, tools: Any, tmp_path: Path) -> None:
    classify(place, tools).save(tmp_path / "objects.parquet")
    rows = pq.read_table(tmp_path / "objects.parquet").to_pylist()
    # 96 * 1.25 = 120 around the middle of 128 ... 224
    assert (rows[0]["x"], rows[0]["y"], rows[0]["side"]) == (116, 116, 120)
    assert rows[2]["glomerulus"] == "g7"
    assert rows[0]["p_lesion"] + rows[0]["p_tissue"] == pytest.approx(1)
    assert list(rows[0])[-3:] == ["label", "p_lesion", "p_tissue"]


@pytest.mark.parametrize(
    ("learned", "allow", "fits"), [(0.6, False, True), (0.2, False, False), (0.2, True, True)]
)
def test_the_scale_must_be_that_of_the_model(
    place: Path, tools: Any, learned: float, allow: bool, fits: bool
) -> None:
    model = tools[0]
    spread = dict.fromkeys(("low", "p5", "median", "p95", "high"), 60.0)
    model.config.image_scale = {"mpp": learned} | spread
    try:
        if fits:
            result = classify(place, tools, allow_scale=allow)
            # crops of 120, 160 and 120 px at 0.5 reach 32 input pixels
            assert result.mpp == pytest.approx(0.5 * 120 / 32)
            assert any("1 of 3 images are smaller or larger" in note for note in result.notes)
        else:
            with pytest.raises(GloVLMError, match=r"images of 0\.2 .* have 0\.5"):
                classify(place, tools, allow_scale=allow)
    finally:
        model.config.image_scale = None


def test_an_unknown_scale_is_noted(tools: Any, tmp_path: Path) -> None:
    write_slide(tmp_path / "s.tiff", 600, 500, mpp=None, blobs=1)
    items = read_geojson(write_outlines(tmp_path / "s.geojson", [outline(50, 50, 80, "a")]))
    with open_slide(tmp_path / "s.tiff") as slide:
        result = classify_objects(*tools, slide, items)
        given = classify_objects(*tools, slide, items, mpp=0.25)
    assert result.mpp == "unknown"
    assert "scale of the crops is not known" in result.notes[0]
    assert given.mpp == pytest.approx(0.25 * 100 / 32, rel=1e-3)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([outline(5000, 10, 50, "far")], {}, "object far lies outside the slide"),
        ([outline(10, 10, 1e7, "huge")], {}, "object huge is 10000000 pixels long"),
        ([outline(10, 10, 50, "a")], {"margin": 0.5}, "margin of at least 1"),
        ([], {}, "one outlined object at least"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    place: Path, tools: Any, tmp_path: Path, features: Any, options: Any, message: str
) -> None:
    path = write_outlines(tmp_path / "o.geojson", features)
    items = read_geojson(path) if features else []
    with open_slide(place / "s1.tiff") as slide, pytest.raises(GloVLMError, match=message):
        classify_objects(*tools, slide, items, **options)


# -------------------------------------------------------------------------- from end to end

SIDES = (60, 170)  # of the glomeruli of one slide and of the other, in pixels of one scale


def glomeruli(number: int, dx: int = 0, dy: int = 0) -> list[dict[str, Any]]:
    side = SIDES[number % 2]
    names = ("sick", "sick", "well", "well")
    return [
        outline(x + dx, y + dy, side, f"g{i}", classification={"name": names[i]})
        for i, (x, y) in enumerate([(100, 100), (320, 100), (100, 300), (320, 300)])
    ]


@pytest.fixture(scope="module")
def biopsy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides at one scale, with small or large glomeruli, and a run on their crops."""
    folder = tmp_path_factory.mktemp("biopsy")
    for number in range(4):
        slide, side = folder / f"s{number}.tiff", SIDES[number % 2]
        corners = [item["geometry"]["coordinates"][0][0] for item in glomeruli(number)]
        marks = [
            ((x, y, side, side), (150 + 20 * i, 90, 140 + 20 * number))
            for i, (x, y) in enumerate(corners)
        ]
        write_slide(slide, 640, 520, mpp=0.5, marks=marks, seed=number)
        path = write_outlines(folder / "objects" / f"s{number}.geojson", glomeruli(number))
        cut_crops(slide, path, folder / "crops", patient_id=f"p{number}")
    command = ["train", "--data", folder / "crops", "--backbone", tiny_clip(), "--shots", 2]
    command += ["--output-dir", folder / "run", "--n-resamples", 1]
    assert main([str(part) for part in command]) == 0
    return folder


def count(biopsy: Path, output: Path, objects: Path, *options: Any) -> list[dict[str, Any]]:
    """Entries of the slides whose objects lie in a folder, by the command."""
    names = sorted(path.stem for path in objects.iterdir())
    command = ["slide", biopsy / "run", *(biopsy / f"{name}.tiff" for name in names)]
    command += ["--objects", objects, "--output-dir", output, "--threshold", 0, *options]
    main([str(part) for part in command])
    results = output / "results.json"
    return json.loads(results.read_text())["slides"] if results.exists() else []


def test_the_slides_that_a_model_was_made_from_are_classified(biopsy: Path, tmp_path: Path) -> None:
    entries = count(biopsy, tmp_path / "out", biopsy / "objects")  # 2.8 times apart in size
    assert [entry["status"] for entry in entries] == ["done"] * 4
    assert [entry["counts"]["n"] for entry in entries] == [4] * 4


def test_a_run_says_that_tiles_have_no_outline_and_what_objects_have(
    biopsy: Path, tmp_path: Path
) -> None:
    shutil.copytree(biopsy / "run", tmp_path / "run")
    (tmp_path / "s1.tiff").symlink_to(biopsy / "s1.tiff")
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        manifest.unlink()
    for name in ("config.json", "processor_config.json"):
        path = tmp_path / "run" / "model" / name
        content = json.loads(path.read_text()) | {"outline": "blank"}
        if name == "config.json":
            content["outline_of"] = "capsule"
        path.write_text(json.dumps(content))
    write_outlines(tmp_path / "objects" / "s1.geojson", glomeruli(1))
    options = ("--allow-scale", "--outline-of", "tuft")
    (entry,) = count(tmp_path, tmp_path / "out", tmp_path / "objects", *options)
    assert entry["status"] == "done", entry["error"]
    for sentence in ("(outline 'blank') and not to tiles", "These outlines go around the tuft"):
        assert sum(sentence in flag for flag in entry["flags"]) == 1


def test_tissue_and_reserved_classes_are_left_out_and_counted(biopsy: Path, tmp_path: Path) -> None:
    others = [
        outline(20, 20, 480, "tissue", isLocked=True),
        outline(400, 440, 50, "region", classification={"name": "Region*"}),
        outline(460, 440, 50, "ignore", classification={"name": "Ignore*"}),
    ]
    write_outlines(tmp_path / "objects" / "s1.geojson", [*others, *glomeruli(1)])
    (entry,) = count(biopsy, tmp_path / "out", tmp_path / "objects", "--allow-scale")
    assert (entry["status"], entry["counts"]["n"]) == ("done", 4)
    assert sum(entry["left_out"].values()) == 3
    assert "Outlines taken: 2 sick, 2 well." in entry["flags"]
    assert any(flag.startswith("3 of 7 outlines were left out") for flag in entry["flags"])


@pytest.mark.parametrize(
    ("features", "options", "error"),
    [
        ([("region", "Region*")], (), None),
        ([("a", "Artery"), ("b", "Vein")], ("--classes", "glomerulus"), None),
        ([("a", "Glomeruli")], ("--classes", "glomerulus"), "Did you mean"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_section_without_glomeruli_counts_none_and_is_no_failure(
    biopsy: Path, tmp_path: Path, features: Any, options: Any, error: str | None
) -> None:
    others = [
        outline(400, 60 * i, 50, name, classification={"name": label})
        for i, (name, label) in enumerate(features, start=1)
    ]
    write_outlines(tmp_path / "objects" / "s1.geojson", others)
    output = tmp_path / "out"
    (entry,) = count(biopsy, output, tmp_path / "objects", "--case", "c1", *options)
    (case,) = json.loads((output / "results.json").read_text())["cases"]
    if error:
        assert entry["status"] == case["status"] == "failed"
        assert error in entry["error"]
        return
    assert entry["status"] == case["status"] == "done"
    for counts in (entry["counts"], case["counts"]):
        assert (counts["unit"], counts["n"]) == ("objects", 0)
        assert {value["count"] for value in counts["classes"].values()} == {0}
    assert sum(entry["left_out"].values()) == len(features)
    assert any("No outline is to be counted" in flag for flag in entry["flags"])
    assert "0 objects" in (output / "README.md").read_text()


def test_what_lies_outside_the_slide_or_is_larger_does_not_stop_the_rest(
    biopsy: Path, tmp_path: Path
) -> None:
    others = [outline(9000, 10, 80, "far"), outline(-50, -50, 1e7, "huge")]
    write_outlines(tmp_path / "objects" / "s1.geojson", [*others, *glomeruli(1)])
    (entry,) = count(biopsy, tmp_path / "out", tmp_path / "objects", "--allow-scale")
    assert entry["status"] == "done", entry["error"]
    assert entry["counts"]["n"] == 4
    assert entry["left_out"] == {
        "outside the slide of 640 x 520 pixels": 1,
        "larger than the slide": 1,
    }


def test_outlines_that_count_from_elsewhere_are_moved_both_ways(
    biopsy: Path, tmp_path: Path
) -> None:
    artery = outline(400, 440, 50, "artery", classification={"name": "Artery"})
    path = tmp_path / "objects" / "s1.geojson"
    write_outlines(path, [*glomeruli(1, -7, 11), artery])
    options = ("--origin", "7,-11", "--exclude", "artery", "--allow-scale")
    entries = count(biopsy, tmp_path / "out", path.parent, *options)
    assert [entry["status"] for entry in entries] == ["done"]
    assert entries[0]["origin"] == {"x": 7, "y": -11, "source": "given"}
    assert entries[0]["left_out"] == {"class Artery, which is excluded": 1}
    folder = tmp_path / "out" / "slides" / "s1"
    boxes = pq.read_table(folder / "objects.parquet").to_pylist()
    middles = [(row["x"] + row["side"] / 2, row["y"] + row["side"] / 2) for row in boxes]
    assert np.allclose(middles, [(185, 185), (405, 185), (185, 385), (405, 385)], atol=1)
    for name in ("objects.geojson", "tiles.geojson"):
        assert json.loads((folder / name).read_text())["origin"] == entries[0]["origin"]
    written = json.loads((folder / "objects.geojson").read_text())["features"]
    given = json.loads(path.read_text())["features"][:4]
    assert [(f["id"], f["geometry"]) for f in written] == [(f["id"], f["geometry"]) for f in given]
    assert read_geojson(folder / "objects.geojson")[0].bounds == (100, 100, 270, 270)
    tile = read_geojson(folder / "tiles.geojson")[0].bounds
    rows = pq.read_table(folder / "tiles.parquet").to_pylist()
    assert tile[:2] in [(row["x"], row["y"]) for row in rows]


def test_outlines_of_a_slide_with_bounds_count_from_there_as_qupath_does(
    biopsy: Path, tmp_path: Path
) -> None:
    pixels = np.asarray(tifffile.imread(biopsy / "s1.tiff", key=0))
    write_scn(tmp_path / "scn.scn", (1200, 900), [(400, 200, pixels)])
    write_outlines(tmp_path / "objects" / "scn.geojson", glomeruli(1))
    command = ["slide", biopsy / "run", tmp_path / "scn.scn", "--objects", tmp_path / "objects"]
    command += ["--output-dir", tmp_path / "out"]
    main([str(part) for part in command])
    (entry,) = json.loads((tmp_path / "out" / "results.json").read_text())["slides"]
    assert entry["status"] == "done", entry["error"]
    rows = pq.read_table(tmp_path / "out/slides/scn/objects.parquet").to_pylist()
    middles = [(row["x"] + row["side"] / 2, row["y"] + row["side"] / 2) for row in rows]
    assert np.allclose(middles[0], (400 + 185, 200 + 185), atol=1)
    assert entry["origin"] == {"x": 400, "y": 200, "source": "bounds"}
    written = json.loads((tmp_path / "out/slides/scn/objects.geojson").read_text())
    assert written["origin"] == entry["origin"]
    assert [item["geometry"] for item in written["features"]] == [
        item["geometry"] for item in glomeruli(1)
    ]
