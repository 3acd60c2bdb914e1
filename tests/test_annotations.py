"""Outlined objects: what QuPath writes is read, and written again unharmed."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.annotations import (
    PALETTE,
    box_object,
    overlap,
    polygon_object,
    read_geojson,
    write_geojson,
)

SQUARE = [[10, 10], [30, 10], [30, 20], [10, 20], [10, 10]]
HOLE = [[12, 12], [14, 12], [14, 14], [12, 14], [12, 12]]


def feature(coordinates: Any = None, kind: str = "Polygon", **members: Any) -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": [SQUARE] if coordinates is None else coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {}} | members


def put(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


@pytest.mark.parametrize("wrap", [collection, lambda *f: list(f), lambda *f: f[0]])
def test_every_shape_of_file_is_read(tmp_path: Path, wrap: Any) -> None:
    path = put(tmp_path / "a.geojson", wrap(feature(id="one")))
    (item,) = read_geojson(path)
    assert (item.id, item.label, item.bounds, item.area) == ("one", None, (10, 10, 30, 20), 200)


@pytest.mark.parametrize(
    ("properties", "label_property", "label"),
    [
        ({"classification": {"name": "Sclerosed", "color": [1, 2, 3]}}, None, "Sclerosed"),
        ({"classification": {"names": ["Tumour", "Positive"]}}, None, "Tumour: Positive"),
        ({"classification": "plain"}, None, "plain"),
        ({"label": " x "}, None, "x"),
        ({"classification": None, "label": "x"}, None, "x"),
        ({"classification": {"name": "a"}, "label": "b"}, None, "a"),
        ({"classification": {"name": "a"}, "grade": 3}, "grade", "3"),
        ({"classification": {"name": "a"}}, "grade", None),
        ({"label": ""}, None, None),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_where_a_class_is_looked_for(
    tmp_path: Path, properties: Any, label_property: str | None, label: str | None
) -> None:
    path = put(tmp_path / "a.geojson", feature() | {"properties": properties})
    assert read_geojson(path, label_property=label_property)[0].label == label


def test_areas_holes_and_parts(tmp_path: Path) -> None:
    far = [[x + 1e6, y + 1e6] for x, y in SQUARE]
    path = put(
        tmp_path / "a.geojson",
        collection(
            feature([SQUARE, HOLE]),
            feature([[SQUARE, HOLE], [far]], "MultiPolygon"),
            feature([SQUARE[:-1]]),  # open
            feature([[[*point, 7] for point in SQUARE]]),  # with a height
        ),
    )
    areas = [item.area for item in read_geojson(path)]
    assert areas == [196, 396, 200, 200]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("3", "is JSON but neither GeoJSON"),
        ({"type": "Topology"}, "expected a FeatureCollection, found the type 'Topology'"),
        (collection(), "holds no outlined object"),
        (collection(3), r"1 of 1 outlines were left out: no GeoJSON feature but 3 \(1\)"),
        (feature(kind="Point", coordinates=[1, 2]), r"a Point, no polygon \(1\)"),
        (feature([], id="x"), r"without an area \(1\)"),
        (feature([[]]), r"without an area \(1\)"),
        (feature([SQUARE[:2]]), r"without an area \(1\)"),
        (feature([[[0, 0], [1, 1], [2, 2], [0, 0]]]), r"without an area \(1\)"),
        (feature([[[0, 0], [1], [2, 2]]]), r"a ring that is no list of points \[x, y\]"),
        (feature([[[0, 0], ["a", 1], [2, 2]]]), r"a ring that is no list of points \[x, y\]"),
        ('{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": '
         "[[[0, 0], [NaN, 1], [2, 2]]]}}", "a coordinate that is no finite number"),
        (feature(kind="Circle"), "a Circle, no polygon"),
        (feature() | {"geometry": None}, "without a geometry"),
        (feature() | {"properties": [1]}, "properties that are no keys and values"),
        (feature(properties={"label": [1]}), "a class that is no name"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    path = put(tmp_path / "a.geojson", content)
    with pytest.raises(GloVLMError, match=sentence) as caught:
        read_geojson(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def square(x: float, y: float, side: float, name: Any, **properties: Any) -> dict[str, Any]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return feature([ring], id=name, properties=properties)


def polygon(points: Any, name: str) -> dict[str, Any]:
    return feature([points], id=name)


def read(path: Path) -> list[str] | str:
    """Ids that a file holds, or the sentence that refuses it."""
    try:
        return [item.id for item in read_geojson(path)]
    except GloVLMError as error:
        return str(error)


BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
ONE = square(0, 0, 50, "a")


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ([ONE, feature(id="b") | {"geometry": None}], ["a"]),
        ([ONE, polygon([[1, 1], [2, 2]], "tiny")], ["a"]),
        ([ONE, polygon([[float("nan"), 1], [2, 2], [3, 1]], "b")], ["a"]),
        ([ONE, 3, None], ["a"]),
        ([polygon(BOW_TIE, "bow-tie")], ["bow-tie"]),
        (
            [ONE | {"geometry": {"type": "GeometryCollection", "geometries": [ONE["geometry"]]}}],
            ["a"],
        ),
        ([square(0, 0, 9, "c", childObjects=[square(1, 1, 3, "b")]), ONE], ["c", "b", "a"]),
        ([{"type": "FeatureCollection", "features": [ONE]}], ["a"]),
        (ONE["geometry"], 1),
        ([ONE, square(90, 0, 50, "a")], 2),  # one id, two outlines
        ([ONE, ONE], ["a"]),
        ([square(90 * i, 0, 50, "PathAnnotationObject") for i in range(3)], 3),
        ([square(90 * i, 0, 50, "PathCellObject") for i in range(2)], 2),
        (gzip.compress(json.dumps([ONE]).encode(), mtime=0), ["a"]),
        (json.dumps([ONE]).encode("utf-16"), ["a"]),
    ],
)
def test_what_can_be_read_is_read(tmp_path: Path, content: Any, ids: Any) -> None:
    path = tmp_path / "a.geojson"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    found = read(path)
    assert isinstance(found, list), found
    assert (found if isinstance(ids, list) else len(set(found))) == ids


def test_a_legacy_type_is_no_id_and_stays_the_type(tmp_path: Path) -> None:
    names = [
        "PathAnnotationObject",
        "PathDetectionObject",
        "PathCellObject",
        "PathAnnotationObject",
    ]
    path = put(tmp_path / "a.geojson", [square(90 * i, 0, 50, n) for i, n in enumerate(names)])
    items = read_geojson(path)
    write_geojson(tmp_path / "b.geojson", items)
    written = json.loads((tmp_path / "b.geojson").read_text())["features"]
    kinds = ["annotation", "detection", "cell", "annotation"]
    assert [item["properties"]["objectType"] for item in written] == kinds
    assert [item["id"] for item in written] == [item.id for item in items]
    assert len({item.id for item in items}) == 4


def test_a_missing_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.geojson", "No such file"), (tmp_path, "a folder")):
        with pytest.raises(GloVLMError, match=f"Expected a file of outlines at .*{reason}"):
            read_geojson(path)


def test_points_and_lines_are_skipped_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    line = feature([[0, 0], [1, 1]], "LineString")
    path = put(tmp_path / "a.geojson", collection(line, feature(), line))
    assert len(read_geojson(path)) == 1
    assert "a LineString, no polygon (2)" in caplog.text


def test_an_object_that_came_in_goes_out_unharmed(tmp_path: Path) -> None:
    cell = feature(
        [[[0.1, 0.2], [3.30000001, 0.5], [2, 7]]],  # open, and it stays open
        id="3b1f",
        nucleusGeometry={"type": "Polygon", "coordinates": [HOLE]},
        properties={
            "objectType": "cell",
            "isLocked": True,
            "name": "Nr. 1",
            "classification": {"name": "given", "color": [9, 9, 9]},
            "measurements": [{"name": "Area", "value": 3.5}],
        },
    )
    path = put(tmp_path / "a.geojson", collection(cell, feature(), feature()))
    items = read_geojson(path)
    out = tmp_path / "new" / "b.geojson"
    write_geojson(
        out, items, labels=["new", None, "given"], measurements=[{"p": 0.25}, {}, {"p": 1}]
    )
    one, two, three = json.loads(out.read_text())["features"]
    assert {k: one[k] for k in ("id", "geometry", "nucleusGeometry")} == {
        k: cell[k] for k in ("id", "geometry", "nucleusGeometry")
    }
    assert one["properties"] == cell["properties"] | {
        "classification": {"name": "new", "color": list(PALETTE[1])},  # given, new: sorted
        "measurements": {"Area": 3.5, "p": 0.25},
        "metadata": {"given class": "given"},
    }
    assert two["geometry"] == feature()["geometry"]
    assert two["properties"] == {"objectType": "annotation"}
    assert three["properties"]["classification"] == {"name": "given", "color": list(PALETTE[0])}
    again = read_geojson(out)
    assert [item.id for item in again] == [item.id for item in items]
    assert len({item.id for item in items}) == 3  # made where there was none, alike or not
    assert [item.id for item in read_geojson(path)] == [item.id for item in items]
    assert [item.label for item in again] == ["new", None, "given"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labels": ["a"]}, "each of 2 objects, found 1 classes"),
        ({"measurements": [{"p": 1.0}, {"p": math.nan}]}, "measurement 'p' is not finite"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, options: Any, sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        write_geojson(tmp_path / "a.geojson", [box_object(0, 0, 1, 1)] * 2, **options)
    assert not (tmp_path / "a.geojson").exists()


boxes = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(4, 40), st.integers(4, 40))


@given(boxes, boxes)
def test_overlap_of_boxes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    width = max(min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]), 0)
    exact = width * height / (a[2] * a[3] + b[2] * b[3] - width * height)
    one, other = box_object(*a), box_object(*b)
    assert overlap(one, other) == pytest.approx(exact, abs=0.04)
    assert overlap(one, other) == overlap(other, one)
    assert overlap(one, one) == 1


def test_overlap_sees_the_outline_and_not_the_box() -> None:
    lower = polygon_object([[0, 0], [100, 100], [0, 100]])
    upper = polygon_object([[0, 0], [100, 0], [100, 100]], label="x")
    assert lower.bounds == upper.bounds
    assert overlap(lower, upper) < 0.02
    assert upper.label == "x"
    with pytest.raises(GloVLMError, match="without an area"):
        box_object(0, 0, 0, 5)
