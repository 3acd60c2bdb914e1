"""From outlines of QuPath to counts and back: every glomerulus once, and nothing else."""

import csv
import json
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from qupath_made import CLASSES as QUPATH_CLASSES
from qupath_made import through_qupath, write_results
from slide_model import write_outlines
from slides_made import write_slide

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.corrections import correct_results
from hf_glovlm.slides.files.wsi import slide_name

DOCS = Path(__file__).resolve().parent.parent / "docs"

SIZE = (1300, 900)
SCALE = 0.5
CLASSES = ("lesion", "plain")
NOT_GLOMERULI = ("Artery", "Region*", "Ignore*", "Tissue")


def outline(box: tuple[int, int, int, int], label: str, number: int) -> dict[str, Any]:
    """An ellipse of QuPath in a box."""
    x, y, width, height = box
    turn = np.linspace(0, 2 * np.pi, 24)
    points = np.stack([x + width * (1 + np.cos(turn)) / 2, y + height * (1 + np.sin(turn)) / 2], 1)
    points[-1] = points[0]
    return {
        "type": "Feature",
        "id": f"{number:08d}-0000-4000-8000-000000000000",
        "geometry": {"type": "Polygon", "coordinates": [points.round(1).tolist()]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


def write_biopsy(folder: Path, name: str, seed: int) -> dict[str, str]:
    """A slide and its outlines, as a pathologist leaves them; the class of each glomerulus by id.

    Glomeruli of one slide are alike in size, those of another up to three times larger.
    """
    rng = np.random.default_rng(seed)
    side = int(rng.choice([70, 110, 200]))
    places = [(x, y) for y in range(60, SIZE[1] - 260, 240) for x in range(60, SIZE[0] - 260, 240)]
    places = [places[i] for i in rng.permutation(len(places))[:9]]
    boxes = [(x, y, side, int(side * rng.uniform(0.8, 1.2))) for x, y in places]
    lesions, plain, arteries = boxes[:4], boxes[4:8], boxes[8:]
    write_slide(
        folder / "slides" / f"{name}.tiff", *SIZE, mpp=SCALE, lesions=lesions, blobs=12, seed=seed
    )
    features = [
        outline((10, 10, 1280, 880), "Tissue", 100),
        *(outline(box, "lesion", i) for i, box in enumerate(lesions)),
        *(outline(box, "plain", i) for i, box in enumerate(plain, start=10)),
        *(outline(box, "Artery", i) for i, box in enumerate(arteries, start=20)),
        outline((30, 30, 90, 90), "Region*", 101),
        outline((1150, 700, 90, 90), "Ignore*", 102),
    ]
    rng.shuffle(features)
    place = folder / "outlines" / f"{name}.geojson"
    place.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    classes = {f["id"]: f["properties"]["classification"]["name"] for f in features}
    return {key: label for key, label in classes.items() if label in CLASSES}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Eight slides of four patients, then two of a fifth, with the table of cases."""
    folder = tmp_path_factory.mktemp("clinic")
    for name in ("slides", "outlines", "new", "new_outlines"):
        (folder / name).mkdir()
    names = [f"B{i}.{i % 2}" for i in range(10)]  # a dot in a name is no suffix
    truth = {name: write_biopsy(folder, name, seed) for seed, name in enumerate(names)}
    rows = [f"{name},case{i // 2},patient{i // 2},PAS" for i, name in enumerate(names)]
    table = "\n".join(["slide_id,case_id,patient_id,stain", *rows, ""])
    (folder / "cases.csv").write_text(table)
    for name in names[8:]:
        (folder / "slides" / f"{name}.tiff").rename(folder / "new" / f"{name}.tiff")
        file = folder / "outlines" / f"{name}.geojson"
        file.rename(folder / "new_outlines" / file.name)
    return folder, truth


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def commands(page: Path) -> list[list[str]]:
    """The commands of a page of the documentation, in order, with the stand-in for a backbone."""
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines()]
    return [
        ["mini" if word == "vinid/plip" else word for word in shlex.split(line)[1:]]
        for line in lines
        if line.startswith("glovlm ")
    ]


def correct_in_qupath(folder: Path, name: str, truth: dict[str, str]) -> dict[str, str]:
    """A reader changes two classes, deletes an object and adds one; classes given, by id."""
    features = through_qupath(
        folder / "results" / "slides" / name / "objects.geojson", "0.6", random.Random(0)
    )
    read = {}
    for feature in features[:2]:
        was = feature["properties"]["classification"]["name"]
        label = CLASSES[was == CLASSES[0]]
        feature["properties"]["classification"] = {"name": label, "color": [1, 2, 3]}
        read[feature["id"]] = label
    features[2:3] = [outline((1180, 20, 90, 100), "lesion", 7)]
    read[features[2]["id"]] = "lesion"
    # What the project holds beside: everything that was outlined and not counted.
    given = json.loads((folder / "new_outlines" / f"{name}.geojson").read_text())["features"]
    features += [feature for feature in given if feature["id"] not in truth]
    write_outlines(folder / "corrected" / f"{name}.geojson", features)
    return read


def test_the_page_leads_from_qupath_and_back_and_every_glomerulus_counts_once(
    clinic: tuple[Path, dict[str, dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    glovlm: Callable[..., Any],
) -> None:
    folder, truth = clinic
    monkeypatch.chdir(folder)
    old, new = list(truth)[:8], list(truth)[8:]
    read: dict[str, dict[str, str]] = {}
    walked = []
    for command in commands(DOCS / "qupath.md"):
        if command[0] == "correct":
            read = {name: correct_in_qupath(folder, name, truth[name]) for name in new}
        done = glovlm(*command)
        assert done.code == 0, (command, done.err)
        walked.append(" ".join(command[: 2 if command[0] == "data" else 1]))
        if walked == ["data crops"]:
            for what in ("Region*", "Ignore*", "Artery"):
                assert what in done.out + done.err
    assert walked == [
        *("data crops", "data check", "train", "slide", "correct"),
        *("data crops", "data crops", "data check", "train"),
    ]

    rows = read_rows(folder / "biopsies" / "metadata.csv")
    cut = {(row["slide_id"], row["object_id"]): row["label"] for row in rows}
    assert cut == {(name, key): label for name in old for key, label in truth[name].items()}
    assert len(rows) == len(cut)
    assert {row["patient_id"] for row in rows} == {f"patient{i}" for i in range(4)}

    results = json.loads((folder / "results" / "results.json").read_text())
    assert [entry["slide"] for entry in results["slides"]] == sorted(new)
    for entry in results["slides"]:
        table = pq.read_table(folder / "results" / "slides" / entry["slide"] / "objects.parquet")
        counted = [row["id"] for row in table.to_pylist() if row["counted"]]
        assert sorted(counted) == sorted(truth[entry["slide"]])
        assert (entry["counts"]["unit"], entry["counts"]["n"]) == ("objects", 8)
        assert all(what in " ".join(entry["flags"]) for what in NOT_GLOMERULI)
    # Without ids its two slides are not summed.
    assert {one["case"]: one["counts"]["n"] for one in results["cases"]} == {"case4": 8}

    corrections = json.loads((folder / "corrections/AB/corrections.json").read_text())
    for name in new:
        slide = corrections["slides"][name]
        changed = slide["reclassified"] + slide["added"]
        assert {one["id"]: one.get("to", one.get("class")) for one in changed} == read[name]
        assert slide["changes"] == {
            "added": 1, "removed": 1, "reclassified": 2, "redrawn": 0, "unchanged": 5,
        }  # fmt: skip
        assert (slide["counts"]["after"]["n"], slide["counts"]["after"]["read"]) == (8, 3)
        assert sum(slide["left_out"].values()) == 4

    # the second run: labels of the reader, and patients on the side where they were
    tested = json.loads((folder / "run/episodes.json").read_text())["draws"][0]["test_groups"]
    assert 0 < len(tested) < 4
    rows = read_rows(folder / "biopsies2" / "metadata.csv")
    cut = {(row["slide_id"], row["object_id"]): row["label"] for row in rows}
    assert {key: cut[key] for key in cut if key[0] in new} == {
        (name, key): label for name in new for key, label in read[name].items()
    }
    assert {row["patient_id"] for row in rows if row["split"] == "test"} == {*tested}
    assert {row["split"] for row in rows} == {"train", "test"}
    assert json.loads((folder / "run2/episodes.json").read_text())["draws"][0][
        "test_groups"
    ] == sorted(tested)

    check_split_is_kept(folder, tested)


def check_split_is_kept(folder: Path, tested: list[str]) -> None:
    """A slide that was tested gives no labels unless all of it was read; the table must agree."""
    table = {row["patient_id"]: row["slide_id"] for row in read_rows(folder / "cases.csv")}
    names = {"test": table[tested[0]], "new": "B8.0"}
    square = outline((50, 50, 90, 90), "Glomerulus", 1)
    results = write_results(folder / "other", {name: [square] for name in names.values()})
    for name in names.values():
        path = results / "slides" / name / "objects.geojson"
        (feature,) = json.loads(path.read_text())["features"]
        other = feature["properties"]["classification"]["name"] == QUPATH_CLASSES[0]
        feature["properties"]["classification"]["name"] = QUPATH_CLASSES[other]
        write_outlines(folder / "again" / f"{name}.geojson", [feature])
    options: dict[str, Any] = {"run": "run", "cases": "cases.csv"}
    for all_read, labelled in ((False, {names["new"]}), (True, {*names.values()})):
        correct_results(results, "again", "AB", "third", all_read=all_read, **options)
        written = {path.stem for path in Path("third/AB/labelled").iterdir()}
        assert written == labelled
    assert {row["slide_id"]: row["split"] for row in read_rows(Path("third/AB/cases.csv"))} == {
        row["slide_id"]: "test" if row["patient_id"] in tested else "train"
        for row in read_rows(folder / "cases.csv")
    }
    lines = (folder / "third/AB/cases.csv").read_text().replace("test", "train")
    for content, message in (
        (lines, "has the split 'train' .* stands in test"),
        ("slide_id,stain\nB0.0,PAS\n", "no row for the slide"),
        (lines.replace(",patient", ",").replace("patient_id", "biopsy"), "was split by patient_id"),
    ):
        (folder / "bad.csv").write_text(content)
        with pytest.raises(GloVLMError, match=message):
            correct_results(results, "again", "AB", "bad", run="run", cases="bad.csv")


SCRIPTS = ("export_outlines.groovy", "import_results.groovy")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_for_qupath_is_balanced_and_names_slides_as_we_do(script: str) -> None:
    """No Groovy is at hand: brackets are counted, and Python carries out the rule of names."""
    text = (DOCS / "qupath" / script).read_text(encoding="utf-8")
    assert script in (DOCS / "qupath.md").read_text(encoding="utf-8")
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    plain = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"|/(\(\?i\))?\\\.[^/\n]*/", "", code)
    assert not {"'", '"'} & {*plain}
    stack = []
    for character in plain:
        if character in "([{":
            stack.append(character)
        elif character in ")]}":
            assert stack.pop() + character in ("()", "[]", "{}")
    assert stack == []
    patterns = re.findall(r"replaceFirst\(/(.+?)/, ''\)", code)
    assert len(patterns) == 2
    for name in ("S1.svs", "S1.2.svs", "a b.ome.tif", "S.OME.TIFF", "x.scn", "B0.1.tiff"):
        stem = name
        for pattern in patterns:
            stem = re.sub(pattern, "", stem, count=1)
        assert stem == slide_name(Path(name))
