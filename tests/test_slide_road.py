"""From outlines of QuPath to counts and back: every glomerulus once, and nothing else."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from clinic_made import outline, read_rows, write_clinic
from doc_pages import DOCS, commands
from qupath_made import CLASSES as QUPATH_CLASSES
from qupath_made import through_qupath, write_results
from slide_model import write_outlines

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.corrections import correct_results
from hf_glovlm.slides.files.wsi import slide_name

CLASSES = ("lesion", "plain")
NOT_GLOMERULI = ("Artery", "Region*", "Ignore*", "Tissue")


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Eight slides of four patients, then two of a fifth, with the table of cases."""
    folder = tmp_path_factory.mktemp("clinic")
    names = {f"B{i}.{i % 2}": str(i // 2) for i in range(10)}  # a dot in a name is no suffix
    return folder, write_clinic(folder, names, [*names][8:], CLASSES)


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
    for command in commands(DOCS / "qupath.md", backbone="mini"):
        if command[0] == "correct":
            read = {name: correct_in_qupath(folder, name, truth[name]) for name in new}
        done = glovlm(*command)
        assert done.code == 0, (command, done.err)
        walked.append(" ".join(command[: 2 if command[0] == "data" else 1]))
        if walked == ["data crops"]:
            for what in ("Region*", "Ignore*", "Artery"):
                assert what in done.out + done.err
    assert walked == [
        *("data crops", "data check", "train", "report", "slide", "correct"),
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
