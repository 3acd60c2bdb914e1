"""`classify_slides`, slides to files: labels, counts, cases, failures, resuming, hidden names."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fresh_process import inherited, run_forks
from slide_model import outline, train, write_outlines
from slides_made import write_slide

from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference.engines import open_engine
from hf_glovlm.lab.slide_bench import TISSUE
from hf_glovlm.slides import encoding
from hf_glovlm.slides.classify import classify_slides
from hf_glovlm.slides.config import SlideConfig
from hf_glovlm.slides.counting import NOT_A_SCORE
from hf_glovlm.slides.files.bags import read_bag

SIDE = 64
PLAIN = (640, 448, 64, 64)  # a tile of the colour of tissue on every slide
CONFUSION = [[45, 5], [10, 40]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides, one with lesions, with outlines and cases, and a classifier."""
    folder = tmp_path_factory.mktemp("slides")
    slide_facts = {}
    for name, lesions in (("sick", 6), ("well", 0), ("other", 0)):
        slide_facts[name] = write_slide(
            folder / f"{name}.tiff",
            768,
            576,
            mpp=0.5 if name != "other" else None,
            lesions=lesions,
            lesion_side=SIDE,
            marks=[(PLAIN, TISSUE)],
            seed=len(name),
        )
    (x, y, *_), *_ = slide_facts["sick"]["lesions"]
    write_outlines(
        folder / "outlines" / "sick.geojson",
        [
            outline(x + 8, y + 8, 48, "1", glomerulus_id="g1"),
            outline(PLAIN[0] + 8, PLAIN[1] + 8, 48, "2", glomerulus_id="g2"),
        ],
    )
    write_outlines(
        folder / "outlines" / "well.geojson",
        [outline(PLAIN[0] + 8, PLAIN[1] + 8, 48, "1", glomerulus_id="g1")],
    )
    (folder / "cases.csv").write_text(
        "slide,case,kidney,arteries,reader,read\n"
        "sick.tiff,A,native,2,MK,crescent;necrosis\nwell,A,,,,\nother.tiff,B,,,,\n"
    )
    train(folder, confusion=CONFUSION)
    (folder / "drawn.json").write_text(json.dumps(slide_facts["sick"]["lesions"]))
    return folder


def configured(place: Path, output: Path, *slides: str, **options: Any) -> SlideConfig:
    names = slides or ("sick", "well", "other")
    return SlideConfig.from_mapping(
        {
            "model": str(place / "run"),
            "slides": [str(place / f"{name}.tiff") for name in names],
            "output_dir": str(output),
            "tile_size": SIDE,
            "top": 5,
            "batch_size": 16,
            **options,
        }
    )


@pytest.fixture(scope="module")
def output(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    config = configured(
        place,
        folder,
        objects=str(place / "outlines"),
        cases=str(place / "cases.csv"),
        heatmap_class="lesion",
    )
    classify_slides(config)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the features, whose container holds times, and the lock."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".h5" and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_slides_with_planted_lesions_are_classified(place: Path, output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert results["failed"] == 0
    sick, well, other = results["slides"]
    assert [entry["label"] for entry in (well, other)] == ["tissue"] * 2
    for healthy in (well, other):
        assert sick["probabilities"]["lesion"] > healthy["probabilities"]["lesion"] + 0.2
    assert sick["pooling"] == "top_5"
    assert set(sick["pooled"]) == {"top_1", "top_5", "top_10", "top_50", "top_100", "mean"}
    assert sum(sick["probabilities"].values()) == pytest.approx(1)
    planted = {tuple(box[:2]) for box in json.loads((place / "drawn.json").read_text())}
    tiles = pq.read_table(output / "slides/sick/tiles.parquet").to_pylist()
    called = {(tile["x"], tile["y"]) for tile in tiles if tile["label"] == "lesion"}
    assert planted <= called
    assert len(called) < len(tiles) / 2
    squares = json.loads((output / "slides/sick/tiles.geojson").read_text())["features"]
    assert {tuple(map(int, f["geometry"]["coordinates"][0][0])) for f in squares} == called
    assert all(0.25 <= tile["tissue_fraction"] <= 1 for tile in tiles)


def test_pooled_scores_and_label_are_those_of_the_tiles(output: Path) -> None:
    """From the table alone: a linear head, so a logit difference is that of log probabilities."""
    entry = json.loads((output / "results.json").read_text())["slides"][0]
    tiles = pq.read_table(output / "slides/sick/tiles.parquet")
    log_p = np.log(np.stack([tiles["p_lesion"].to_numpy(), tiles["p_tissue"].to_numpy()], axis=1))
    mean = log_p.mean(axis=0)
    pooled = entry["pooled"]["mean"]
    assert pooled["lesion"] - pooled["tissue"] == pytest.approx(mean[0] - mean[1], abs=1e-4)


def test_objects_are_counted_and_tiles_where_there_are_none(output: Path) -> None:
    sick, well, other = json.loads((output / "results.json").read_text())["slides"]
    assert (sick["counts"]["unit"], sick["counts"]["n"]) == ("objects", 2)
    assert sick["counts"]["classes"]["lesion"]["count"] == 1
    assert (well["counts"]["unit"], well["counts"]["n"]) == ("objects", 1)
    assert (other["counts"]["unit"], other["counts"]["n"]) == ("tiles", other["n_tiles"])
    assert NOT_A_SCORE in sick["counts"]["notes"]
    # 1 of 2 called lesion; sensitivity .9 (45 of 50), specificity .8
    corrected = sick["counts"]["classes"]["lesion"]["corrected"]
    low, high = corrected["ci95"]
    assert low < 5 < corrected["percent"] < 95 < high
    assert any("no file of objects" in flag for flag in other["flags"])
    assert any("scale" in flag for flag in other["flags"])
    written = json.loads((output / "slides/sick/objects.geojson").read_text())["features"]
    assert [f["id"] for f in written] == ["1", "2"]


def test_a_case_counts_a_glomerulus_of_two_sections_once(output: Path) -> None:
    a, b = json.loads((output / "results.json").read_text())["cases"]
    assert (a["case"], a["slides"], a["counts"]["n"]) == ("A", ["sick", "well"], 2)
    assert (b["case"], b["counts"]["unit"]) == ("B", "tiles")


def test_what_the_table_states_is_kept_by_slide_and_by_case(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    by_slide = [entry["stated"] for entry in results["slides"]]
    assert by_slide == [{"reader": "MK", "read": ["crescent", "necrosis"]}, {}, {}]
    by_case = [case["stated"] for case in results["cases"]]
    assert by_case == [{"kidney": "native", "arteries": 2}, {}]


def test_the_summary_has_a_row_for_each(output: Path) -> None:
    with (output / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    result = [(row["level"], row["name"], row["case"]) for row in rows]
    assert result == [
        ("slide", "sick", "A"),
        ("slide", "well", "A"),
        ("slide", "other", "B"),
        ("case", "A", "A"),
        ("case", "B", "B"),
    ]
    page = (output / "README.md").read_text()
    assert NOT_A_SCORE in page
    assert "the mean of the 5 highest tiles of each class" in page


def test_nothing_names_a_place_on_the_machine(place: Path, output: Path) -> None:
    for name, content in contents(output).items():
        assert str(place).encode() not in content, name
        assert b"/tmp" not in content, name


def test_a_finished_run_is_read_and_not_repeated(place: Path, output: Path) -> None:
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("tiles.parquet")}
    events: list[Any] = []
    config = configured(
        place,
        output,
        objects=str(place / "outlines"),
        cases=str(place / "cases.csv"),
        heatmap_class="lesion",
    )
    classify_slides(config, on_event=lambda kind, what: events.append((kind, what)))
    assert contents(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("tiles.parquet")} == times
    assert not [event for event in events if event[0] == "slide"]


def test_a_run_killed_half_way_gives_the_same_table(place: Path, tmp_path: Path) -> None:
    """The process ends itself in the middle of a slide, without a chance to tidy up."""
    program = (
        "import os, sys, json\n"
        "from hf_glovlm.slides.classify import classify_slides\n"
        "from hf_glovlm.slides.config import SlideConfig\n"
        "seen = []\n"
        "def stop(kind, what):\n"
        "    seen.extend([1] * (kind == 'tiles' and what['slide'] == 'well'))\n"
        "    if len(seen) > 1:\n"
        "        os._exit(9)\n"
        "classify_slides(SlideConfig.from_mapping(json.loads(sys.argv[1])), on_event=stop)\n"
    )
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    config = configured(place, broken, "sick", "well")
    command = ["-c", program, json.dumps(vars(config))]
    (ended,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert ended.code == 9, ended.error
    assert (broken / "slides/sick/tiles.parquet").is_file()
    assert not (broken / "slides/well").exists()
    assert (broken / "features/well.h5.part").is_file()
    assert not (broken / "results.json").exists()
    # In a process like the one that died: equal bits are promised under equal kernels.
    finish = (
        "import json, sys\n"
        "from hf_glovlm.slides.classify import classify_slides\n"
        "from hf_glovlm.slides.config import SlideConfig\n"
        "started = []\n"
        "def listen(kind, what):\n"
        "    if kind == 'tiles' and what['slide'] == 'well':\n"
        "        started.append(what['done'])\n"
        "given = map(SlideConfig.from_mapping, json.loads(sys.argv[1]))\n"
        "resumed, whole = [classify_slides(config, on_event=listen) for config in given]\n"
        "print(json.dumps({'started': started[0], 'same': resumed == whole}))\n"
    )
    both = [vars(config), vars(configured(place, whole, "sick", "well"))]
    command = ["-c", finish, json.dumps(both)]
    (done,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert done.result() == {"started": 16, "same": True}
    assert contents(broken) == contents(whole)


def test_one_slide_fails_and_the_others_go_on(place: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.tiff").write_bytes(b"II*\0no slide")
    events: list[Any] = []
    config = configured(place, tmp_path / "out", "well")
    config = replace(config, slides=[str(tmp_path / "in/broken.tiff"), *config.slides])
    results = classify_slides(config, on_event=lambda kind, what: events.append((kind, what)))
    assert [entry["status"] for entry in results["slides"]] == ["failed", "done"]
    assert results["failed"] == 1
    assert "broken" in results["slides"][0]["error"]
    assert str(tmp_path) not in json.dumps(results)
    assert [what["status"] for kind, what in events if kind == "slide"] == ["failed", "done"]
    assert "## Not done" in (tmp_path / "out/README.md").read_text()
    assert not list((tmp_path / "out/slides").glob(".*"))


def test_errors_of_objects_do_not_show_their_folder(place: Path, tmp_path: Path) -> None:
    far = write_outlines(tmp_path / "secret/x.geojson", [{"type": "Feature", "geometry": None}])
    results = classify_slides(configured(place, tmp_path / "out", "well", objects=str(far)))
    assert "well.geojson holds no outlined object" in results["slides"][0]["error"]
    assert "secret" not in json.dumps(results)


def test_an_empty_collection_of_outlines_is_a_slide_without_objects(
    place: Path, tmp_path: Path
) -> None:
    none = write_outlines(tmp_path / "none.geojson", [])
    (entry,) = classify_slides(configured(place, tmp_path / "out", "well", objects=str(none)))[
        "slides"
    ]
    assert (entry["status"], entry.get("error")) == ("done", None)
    assert (entry["counts"]["unit"], entry["counts"]["n"]) == ("objects", 0)


def test_names_are_hidden_everywhere(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "S21-12345.tiff"
    source.parent.mkdir()
    source.write_bytes((place / "well.tiff").read_bytes())
    shown = replace(configured(place, tmp_path / "shown"), slides=[str(source)])
    flags = classify_slides(shown)["slides"][0]["flags"]
    assert any("accession" in flag for flag in flags)

    table = tmp_path / "in" / "cases.csv"
    table.write_text("slide,case,block,level,reader\nS21-12345,Jane Doe,S21-12345 A,2,Jane\n")
    hidden = configured(place, tmp_path / "hidden", anonymise=True, cases=str(table))
    hidden = replace(hidden, slides=[str(source)])
    results = classify_slides(hidden)
    assert [entry["slide"] for entry in results["slides"]] == ["slide_001"]
    assert results["cases"][0]["case"] == "case_001"
    assert results["slides"][0]["stated"] == {"level": "2"}
    assert not any("accession" in flag for flag in results["slides"][0]["flags"])
    for path in (tmp_path / "hidden").rglob("*"):
        assert "S21" not in path.name
        if path.is_file():
            assert b"S21-12345" not in path.read_bytes(), path.name
            assert b"Jane" not in path.read_bytes(), path.name
    assert classify_slides(hidden) == results


def test_other_settings_do_not_pass_for_these(place: Path, tmp_path: Path) -> None:
    first = classify_slides(configured(place, tmp_path, "well"))
    smooth = classify_slides(configured(place, tmp_path, "well", smooth=True))
    assert first["slides"][0]["pooled"]["top_1"] != smooth["slides"][0]["pooled"]["top_1"]
    refused = classify_slides(configured(place, tmp_path, "well", overlap=0.5))
    assert "other settings" in refused["slides"][0]["error"]
    assert str(tmp_path) not in json.dumps(refused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_sise": 3}, "Did you mean 'tile_size'"),
        ({"slides": []}, "needs slides"),
        ({"top": -1}, "top must be 0 or more"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"case": "A", "cases": "x.csv"}, "either --cases"),
        ({"cases": "missing.csv"}, "CSV file of slides and cases"),
        ({"objects": "missing.geojson"}, "Expected a file of outlines or a folder"),
        ({"heatmap_class": "lesions"}, "Did you mean 'lesion'"),
        ({"model": "missing/run/folder"}, "run's folder"),
    ],
)
def test_bad_settings_are_refused_at_once(
    place: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(GloVLMError, match=message):
        classify_slides(configured(place, tmp_path / "out", "well", **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,case\nwell,A\n", r"no column slide_id \(or slide\)"),
        ("slide,case\nsick,A\n", "no row for the slide well"),
        ("slide,case\nwell,\n", "no case of well"),
        ("", r"no column slide_id \(or slide\)"),
    ],
)
def test_cases_must_name_every_slide(place: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cases.csv").write_text(text)
    config = configured(place, tmp_path / "out", "well", cases=str(tmp_path / "cases.csv"))
    with pytest.raises(GloVLMError, match=message):
        classify_slides(config)


def test_the_scale_of_a_slide_comes_from_the_table(place: Path, tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    (tmp_path / "slides").mkdir()
    for name in ("other", "well"):
        (tmp_path / "slides" / f"{name}.tiff").symlink_to(place / f"{name}.tiff")
    config = configured(place, tmp_path / "out", cases=str(table))
    config = replace(config, slides=[str(tmp_path / "slides")])
    done: list[str] = []

    def run(mpp: str) -> list[dict[str, Any]]:
        table.write_text(f"slide_id,patient_id,mpp\nother.tiff,P1,{mpp}\nwell,P1,\n")
        done.clear()
        results = classify_slides(
            config, on_event=lambda kind, what: kind == "slide" and done.append(what["slide"])
        )
        entries: list[dict[str, Any]] = results["slides"]
        return entries

    other, well = run("0.5")
    assert (other["mpp"], other["mpp_source"]) == (0.5, "given")
    assert (well["mpp"], well["mpp_source"]) == (0.5, "file")
    other, well = run("0.4")
    assert (done, well["status"]) == (["other"], "done")  # its results were made from another scale
    assert "0.5, now 0.4" in other["error"]


def test_a_trained_aggregator_gives_the_label(place: Path, output: Path, tmp_path: Path) -> None:
    """Its answer is that of the bag alone; what it says of the tiles stands beside theirs."""
    from hf_glovlm.slides.files.bags import read_bag
    from hf_glovlm.slides.mil import SlideClassifier, apply_mil
    from hf_glovlm.slides.mil.aggregators import build_aggregator

    bag = read_bag(output / "features/sick.h5")
    module = build_aggregator("abmil", bag.features.shape[1], 2, {"width": 8, "hidden": 8})
    encoder = {"fingerprint": bag.attributes["fingerprint"], "tile_mpp": 0.25}
    SlideClassifier(module.eval(), ["healthy", "ill"], encoder).save(tmp_path / "mil")
    config = configured(place, tmp_path / "out", "sick", aggregator=str(tmp_path / "mil"))
    (entry,) = classify_slides(config)["slides"]
    assert entry["status"] == "failed"
    assert "the training has 0.25 micrometres per pixel, sick has 0.5" in entry["error"]
    results = classify_slides(replace(config, allow_scale=True))
    entry = results["slides"][0]
    expected = apply_mil(tmp_path / "mil", bag, allow_scale=True)
    assert any("tiles differ in scale" in flag for flag in entry["flags"])
    assert entry["label"] == expected.label
    assert entry["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert (entry["pooling"], results["slide_class_names"]) == ("abmil", ["healthy", "ill"])
    assert results["class_names"] == ["lesion", "tissue"]
    tiles = pq.read_table(tmp_path / "out/slides/sick/tiles.parquet")
    for k, name in enumerate(("healthy", "ill")):
        scores = tiles[f"score_{name}"].to_numpy()
        assert scores == pytest.approx(expected.tile_scores[:, k], abs=1e-5)
    assert tiles["attention"].to_numpy().sum() == pytest.approx(1, abs=1e-5)
    assert {"p_lesion", "label"} <= set(tiles.column_names)
    page = (tmp_path / "out/README.md").read_text()
    assert "the trained aggregator abmil" in page
    assert "| slide | label | p healthy | p ill |" in page


def test_one_file_of_objects_is_for_one_slide(place: Path, tmp_path: Path) -> None:
    given = str(place / "outlines/sick.geojson")
    with pytest.raises(GloVLMError, match="cannot serve 2 slides"):
        classify_slides(configured(place, tmp_path, "sick", "well", objects=given))
    images = [{"id": n, "file_name": f"{name}.png"} for n, name in enumerate(("well", "sick"))]
    annotations = [
        {"id": n, "image_id": min(n, 1), "bbox": [300 + 60 * n, 300, 48, 48]} for n in range(3)
    ]
    coco = tmp_path / "coco.json"  # but of COCO, each slide its image
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    results = classify_slides(configured(place, tmp_path / "out", "sick", objects=str(coco)))
    assert results["slides"][0]["counts"]["n"] == 2


def test_auto_is_measured_once_and_kept_on_resume(
    place: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiles of the first slide that can be read; another precision is never mixed in."""
    seen: list[Any] = []

    def choose(model: Any, processor: Any, **asked: Any) -> Any:
        seen.append(asked)
        kept = asked["kept"] or {"precision": "bf16", "runtime": "torch"}
        chosen = open_engine(model, processor, precision=kept["precision"])
        return replace(chosen, measured={"candidates": ["bf16"]})

    def classify(precision: str, *slides: str) -> dict[str, Any]:
        config = configured(place, tmp_path, *slides, precision=precision)
        return classify_slides(config)

    (place / "broken.tiff").write_bytes(b"II*\0")
    monkeypatch.setattr(encoding, "open_engine", choose)
    results = classify("auto", "broken", "well")
    assert [len(asked["images"]) for asked in seen] == [8]
    assert {picture.size for picture in seen[0]["images"]} == {(SIDE, SIDE)}
    _, entry = results["slides"]
    assert seen[0]["workload"] == 2 * entry["n_tiles"]
    stated = {"precision": "bf16", "runtime": "torch", "measured": {"candidates": ["bf16"]}}
    assert results["model"] | stated == results["model"]
    assert any("computed by torch in bf16" in flag for flag in entry["flags"])
    exact = json.loads((output / "results.json").read_text())
    assert not stated.keys() & exact["model"].keys()
    same, other = (r["slides"][1]["probabilities"]["lesion"] for r in (results, exact))
    assert same != other
    assert same == pytest.approx(other, abs=0.02)
    attributes = read_bag(tmp_path / "features" / "well.h5").attributes
    assert attributes | stated == attributes

    again = classify("auto", "broken", "well")
    assert again == results
    assert seen[1]["kept"] == stated
    assert not seen[1]["images"]
    monkeypatch.undo()
    _, entry = classify("fp32", "broken", "well")["slides"]
    assert "precision: bf16, now fp32" in entry["error"]
