"""What a reader corrects in QuPath comes in as a difference: nothing lost, nothing doubled."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Glovlm
from qupath_made import CLASSES, VERSIONS, check_round_trip, ellipse, write_results
from slide_model import outline, write_outlines

from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import write_manifest
from hf_glovlm.slides.corrections import correct_results
from hf_glovlm.slides.differences import read_all
from hf_glovlm.slides.files.annotations import polygon_object, read_geojson
from hf_glovlm.slides.files.matching import is_redrawn, match_objects
from hf_glovlm.slides.objects import ClassifiedObjects


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", range(4))
def test_a_corrected_file_changes_what_was_corrected_and_nothing_else(
    seed: int, version: str, tmp_path: Path
) -> None:
    check_round_trip(tmp_path, seed, version)


def squares(*labels: str | None, ids: str = "g", **own: Any) -> list[dict[str, Any]]:
    """Squares in a row with these classes, of 100 pixels each; ids g0, g1, ..."""
    made = []
    for i, label in enumerate(labels):
        classification = {} if label is None else {"classification": {"name": label}}
        made.append(outline(200 * i, 50, 100, f"{ids}{i}", **classification, **own))
    return made


def features_of(results: Path, name: str = "s1") -> list[dict[str, Any]]:
    """The features that the results hold, to be edited."""
    path = results / "slides" / name / "objects.geojson"
    features: list[dict[str, Any]] = json.loads(path.read_text())["features"]
    return features


def label_of(feature: dict[str, Any]) -> str:
    return str(feature["properties"]["classification"]["name"])


def swap(feature: dict[str, Any]) -> str:
    """Give a feature the class that it does not have."""
    label = CLASSES[label_of(feature) == CLASSES[0]]
    feature["properties"]["classification"] = {"name": label}
    return label


def put(folder: Path, **slides: list[dict[str, Any]]) -> Path:
    """A folder with a reader's files."""
    for name, features in slides.items():
        write_outlines(folder / f"{name}.geojson", features)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four objects on each of two slides of one case."""
    four = squares(*(["Glomerulus"] * 4))
    return write_results(tmp_path / "results", {"s1": four, "s2": four})


def test_numbers_that_were_given_anew_do_not_match(results: Path, tmp_path: Path) -> None:
    features = features_of(results)[1:]  # the first is gone, the others are numbered from 0 again
    for i, feature in enumerate(features):
        feature["id"] = f"g{i}"
    features.append(outline(2000, 2000, 90, "g3", classification={"name": CLASSES[0]}))
    given = put(tmp_path / "in", s1=features)
    slide = correct_results(results, given, "AB", tmp_path / "out")["slides"]["s1"]
    assert [one["id"] for one in slide["removed"]] == ["g0"]
    assert (slide["changes"]["unchanged"], slide["changes"]["added"]) == (3, 1)
    written = json.loads((tmp_path / "out/AB/corrected/s1.geojson").read_text())["features"]
    assert [feature["id"] for feature in written[:3]] == ["g1", "g2", "g3"]
    assert len({feature["id"] for feature in written}) == 4


@pytest.mark.parametrize(
    ("name", "matched"), [("5f0e3c52-0000-4000-8000-000000000001", True), ("7", False)]
)
def test_an_outline_that_was_dragged_away_is_known_by_a_uuid_alone(
    name: str, matched: bool, tmp_path: Path
) -> None:
    one, two = (
        read_geojson(write_outlines(tmp_path / f"{x}.geojson", [outline(x, x, 50, name)]))
        for x in (0, 900)
    )
    assert match_objects(one, two) == ([(0, 0)] if matched else [])
    assert match_objects([], two) == match_objects(one, []) == []


@pytest.mark.parametrize(
    ("points", "redrawn"),
    [
        (ellipse(0, 0, 200, 100)[::-1], False),  # the other way round
        ([[round(x, 2), round(y, 2)] for x, y in ellipse(0, 0, 200, 100)], False),
        ([*ellipse(0, 0, 200, 100)[7:], *ellipse(0, 0, 200, 100)[1:8]], False),  # another start
        ([p for a in ellipse(0, 0, 200, 100) for p in (a, a)], False),  # each corner twice
        (ellipse(0.9, 0, 200, 100), False),
        (ellipse(3, 0, 200, 100), True),
        (ellipse(0, 0, 200, 104), True),
        (ellipse(0, 0, 200, 100)[:-3], True),  # two corners less
    ],
)
def test_an_outline_is_drawn_anew_where_a_corner_moved_by_more_than_a_pixel(
    points: Any, redrawn: bool
) -> None:
    one, two = polygon_object(ellipse(0, 0, 200, 100)), polygon_object(points)
    assert is_redrawn(one, two) is redrawn
    assert is_redrawn(two, one) is redrawn


def test_slides_and_readers_come_one_by_one_and_stay_beside_each_other(
    results: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = features_of(results), features_of(results, "s2")
    called = [label_of(feature) for feature in first]
    swap(first[0])
    correct_results(results, put(tmp_path / "ab", s1=first), "AB", out, date="2024-05-06")
    kept = (out / "AB/corrected/s1.geojson").read_bytes()
    later = put(tmp_path / "later", **{"s2.svs": second[:3]})
    done = correct_results(results, later, "AB", out, all_read=True)
    assert (out / "AB/corrected/s1.geojson").read_bytes() == kept
    assert {name: one["all_read"] for name, one in done["slides"].items()} == {
        "s1": False, "s2": True,
    }  # fmt: skip
    assert done["slides"]["s1"]["date"] == "2024-05-06"
    after = done["cases"][0]["counts"]["after"]
    assert done["cases"][0]["slides"] == ["s1"]  # of more glomeruli than s2, without ids to join
    assert (after["n"], after["read"]) == (4, 1)

    swap(first[0])  # as it was called
    swap(first[1])
    done = correct_results(results, put(tmp_path / "cd", s1=first[:3]), "CD", out)
    assert (out / "AB/corrected/s1.geojson").read_bytes() == kept
    [pair] = done["between_readers"]
    assert (pair["slide"], pair["readers"], pair["alike"]) == ("s1", ["AB", "CD"], 1)
    opposite = dict(zip(CLASSES, CLASSES[::-1], strict=True))
    assert {one["id"]: (one["AB"], one["CD"]) for one in pair["differing"]} == {
        "g0": (opposite[called[0]], called[0]),
        "g1": (called[1], opposite[called[1]]),
        "g3": (called[3], "no object"),
    }
    with (out / "CD/counts.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["level"], row["name"], row["n_before"], row["n"]) for row in rows] == [
        ("slide", "s1", "4", "3"), ("case", "C1", "8", "4"),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["two slides", "two outlines"])
def test_what_was_read_outweighs_what_was_called(where: str, tmp_path: Path) -> None:
    """Of one glomerulus that is shown twice, the class that a reader gave counts."""
    shown = squares("Glomerulus", glomerulus_id="7")
    slides = {"s1": shown, "s2": shown}
    if where == "two outlines":
        slides = {"s1": [*squares("Glomerulus"), *squares("Glomerulus", ids="again")]}
    results = write_results(tmp_path / "results", slides)
    features = features_of(results)
    label = swap(features[-1])  # of two outlines the one that was not counted
    done = correct_results(results, put(tmp_path / "in", s1=features), "AB", tmp_path / "out")
    for counts in (done["slides"]["s1"]["counts"], done["cases"][0]["counts"]):
        after = counts["after"]
        assert (after["n"], after["read"], after["classes"][label]["count"]) == (1, 1, 1)


def test_a_slide_may_lose_all_objects_or_get_its_first(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", {"s1": squares("Glomerulus")})
    done = correct_results(results, put(tmp_path / "in", s1=[]), "AB", tmp_path / "out")
    assert done["slides"]["s1"]["changes"]["removed"] == 1
    assert done["slides"]["s1"]["counts"]["after"]["n"] == 0
    assert read_all(tmp_path / "out/AB/corrected/s1.geojson") == []

    place = results / "slides/s1"  # a section without glomeruli
    nothing = ClassifiedObjects.none(CLASSES)
    nothing.save(place / "objects.parquet")
    nothing.write_geojson(place / "objects.geojson")
    write_manifest(place, "slide", {})
    given = put(tmp_path / "in", s1=squares(CLASSES[0], None))
    done = correct_results(results, given, "CD", tmp_path / "second")
    assert done["slides"]["s1"]["changes"]["added"] == 2
    after = done["slides"]["s1"]["counts"]["after"]
    assert (after["n"], after["read"], after["classes"][CLASSES[0]]["count"]) == (1, 1, 1)
    assert "1 objects have no class" in done["slides"]["s1"]["notes"][0]

    given = put(tmp_path / "in", s1=squares(CLASSES[0], "viables"))  # a slip is no class
    slide = correct_results(results, given, "EF", tmp_path / "second")["slides"]["s1"]
    assert slide["changes"]["added"] == 1
    assert slide["left_out"] == {"class viables, which is not counted": 1}
    assert "Did you mean 'viable'?" in slide["notes"][-1]


def test_a_class_is_known_in_the_spelling_of_qupath_too(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", {"s1": squares("Glomerulus", "Glomerulus")})
    features = features_of(results)
    features[0]["properties"]["classification"] = {"names": ["MEST", "s1"]}
    features[1]["properties"]["classification"] = {"name": label_of(features[1]).upper()}
    given = put(tmp_path / "in", s1=features)
    done = correct_results(results, given, "AB", tmp_path / "out", classes=["mest:s1"])
    slide = done["slides"]["s1"]
    assert [one["to"] for one in slide["reclassified"]] == ["mest:s1"]
    assert slide["counts"]["after"]["classes"]["mest:s1"]["count"] == 1


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"reader": "a/b"}, "reader's name that can name a folder"),
        ({}, {"reader": ".."}, "reader's name that can name a folder"),
        ({}, {"date": "yesterday"}, "date as YYYY-MM-DD"),
        ({}, {"output_dir": "results/new"}, "lies in the results"),
        ({}, {"output_dir": "in"}, "holds files that are no corrections"),
        ({}, {"run": "run"}, "--run and --cases together"),
        ({}, {"classes": [CLASSES[0].upper()]}, "differ in spelling only"),
        ({}, {"results": "in"}, "found no finished results"),
        ({}, {"corrected": "nowhere"}, "found no '.*nowhere'"),
        ({"name": "s3"}, {}, r"no file of any of the 2 slides .* mean 's2'"),
        ({"name": "s1.svs"}, {"twice": True}, "holds two files of the slide s1"),
        ({"label": "Glomerulus"}, {}, "bring objects.geojson into QuPath before"),
        ({"json": "{"}, {}, "is not JSON"),
        ({"overwritten": True}, {}, "objects.geojson' has changed since it was written"),
        ({"tiles": True}, {}, "s1 has no counted objects"),
    ],
)
def test_what_cannot_be_read_as_a_correction_is_refused_in_a_sentence(
    results: Path, tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    features = features_of(results)
    if "label" in change:
        for feature in features:
            feature["properties"]["classification"] = {"name": change["label"]}
    given = put(tmp_path / "in", **{change.get("name", "s1"): features})
    if options.pop("twice", False):
        put(given, s1=features)
    if "json" in change:
        (given / "s1.geojson").write_text(change["json"])
    if "overwritten" in change:
        write_outlines(results / "slides/s1/objects.geojson", features[:2])
    if "tiles" in change:
        (results / "slides/s1/objects.geojson").unlink()
    paths = {"results": "results", "corrected": "in", "output_dir": "out", **options}
    for name in {*paths} & {"results", "corrected", "output_dir"}:
        paths[name] = tmp_path / paths[name]
    if "run" in options:
        paths["run"] = tmp_path / "run"
    with pytest.raises(GloVLMError, match=message):
        correct_results(**{"reader": "AB", **paths})
    assert not (tmp_path / "out").exists()


def test_earlier_corrections_that_are_damaged_or_of_other_results_are_refused(
    results: Path, tmp_path: Path
) -> None:
    out, given = tmp_path / "out", put(tmp_path / "in", s1=features_of(results))
    correct_results(results, given, "AB", out)
    others = write_results(tmp_path / "anew", {"s1": squares("a", "b", "c"), "s2": squares("a")})
    later = put(tmp_path / "later", s2=features_of(others, "s2"))
    with pytest.raises(GloVLMError, match="results of s1 have changed since AB corrected them"):
        correct_results(others, later, "AB", out)
    (out / "AB/corrections.json").write_text(json.dumps({"slides": {"s1": {}}, "classes": []}))
    with pytest.raises(GloVLMError, match=r"corrections\.json' is damaged: expected 'date'"):
        correct_results(results, given, "CD", out)


def test_the_command_says_what_changed_and_which_file_failed(
    results: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    features = features_of(results)
    swap(features[0])
    given = put(tmp_path / "in", s1=features, s2=[], other=features)
    (given / "s2.geojson").write_text("{")
    command = ("correct", results, given, "--reader", "AB", "--output-dir", tmp_path / "out")
    done = glovlm(*command)
    assert done.code == 1
    assert re.search("Failed: 1 slide slide reason s2 .*not JSON", done.printed)
    assert "1 files are of no slide of the results (other.geojson)" in done.err
    assert "so that their patients stay on the side" in done.err
    assert "Corrections of AB" in done.out
    assert "1 of 4" in done.out
    assert not (tmp_path / "out/AB/corrected/s2.geojson").exists()
    (given / "s2.geojson").unlink()
    done = glovlm(*command, "--json")
    assert done.code == 0
    assert json.loads(done.out)["slides"]["s1"]["changes"]["reclassified"] == 1
    assert glovlm(*command[:3], "--reader", "ab", *command[5:]).code == 2  # AB in another spelling
