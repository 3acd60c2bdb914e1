"""Outlines of a slide: which of them count, where they lie, and what is told of the others."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import hostile_outlines
import numpy as np
import pytest
from hostile_outlines import feature, polygon, ring_of
from hypothesis import given
from hypothesis import strategies as st

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files import annotations, geojson, shapes
from hf_glovlm.slides.files.annotations import box_object, polygon_object, read_geojson
from hf_glovlm.slides.files.coordinates import LEVEL0, Origin
from hf_glovlm.slides.files.shapes import draw, filled_area, meeting_pairs, ring_area

SCANNED = Origin(700, 40, "bounds")


def put(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def square(x: float, y: float, side: float, name: Any = None, **properties: Any) -> dict[str, Any]:
    return feature(polygon(ring_of(x, y, x + side, y + side)), name, **properties)


def of_class(label: str, n: int, *, y: float = 0, side: float = 100) -> list[dict[str, Any]]:
    """So many squares of a class in a row; ids are the first letter and a number."""
    named = {"classification": {"name": label}} if label else {}
    return [square(200 * i, y, side, f"{label[:1]}{i}", **named) for i in range(n)]


# ------------------------------------------------------------------------------- what is read

ONE = square(0, 0, 50, "a")


@pytest.mark.parametrize("seed", range(80))
def test_a_hostile_file_gives_what_counts_and_nothing_else(tmp_path: Path, seed: int) -> None:
    hostile_outlines.check(tmp_path / "a.geojson", seed)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(json.dumps([ONE]).encode(), mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(b" " * 10_000, mtime=0), "unpacks to more than"),
        (json.dumps([ONE]).encode("cp037"), "is not UTF-8 text"),
        (b"[" * 100_000, "is not JSON"),
        ([feature(None)] * 3 + [3], r"without a geometry \(3\), no GeoJSON feature but 3 \(1\)"),
    ],
)
def test_a_file_without_anything_usable_is_refused_with_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, sentence: str
) -> None:
    monkeypatch.setattr(geojson, "MOST_BYTES", 9000 if sentence.startswith("unpacks") else 2**30)
    with pytest.raises(GloVLMError, match=sentence):
        annotations.read_outlines(put(tmp_path / "a.geojson", content))


# ------------------------------------------------------------------------------ what counts

GLOMERULI = of_class("Glomerulus", 5)
TISSUE = square(-50, -50, 1500)
LOCKED = square(5000, 5000, 120, "locked", isLocked=True)
PARTS = [
    part
    for i in range(5)  # each glomerulus with a tuft and a crescent drawn in it
    for part in (
        square(200 * i + 10, 10, 40, f"tuft{i}", classification="Tuft"),
        square(200 * i + 60, 60, 20, f"crescent{i}", classification="Crescent"),
    )
]


@pytest.mark.parametrize(
    ("features", "options", "kept", "reason"),
    [
        (GLOMERULI, {}, "GGGGG", ""),
        ([*GLOMERULI, *of_class("Region*", 2, y=500)], {}, "GGGGG", "class Region*, which QuPath"),
        ([*GLOMERULI, *of_class("Ignore*", 1, y=500)], {}, "GGGGG", "class Ignore*, which QuPath"),
        ([*of_class("Region*", 1), *GLOMERULI], {"classes": ["region*"]}, "R", "not asked for"),
        ([TISSUE | {"id": "T"}, *GLOMERULI], {}, "GGGGG", "holds other outlines"),
        ([TISSUE | {"id": "T"}, *of_class("", 5)], {}, "01234", "holds other outlines"),
        ([square(-50, -50, 900, "T", isLocked=True), GLOMERULI[0]], {}, "G", "holds other"),
        ([square(-50, 900, 1500, "T"), *of_class("", 5)], {}, "01234", "25 times as large"),
        ([*GLOMERULI, LOCKED], {}, "GGGGG", "locked and without a class"),
        ([*of_class("", 3), LOCKED], {}, "012l", ""),
        ([*GLOMERULI, *PARTS], {"classes": ["Glomerulus"]}, "GGGGG", "class Tuft, which was not"),
        ([*GLOMERULI, *PARTS], {"mpp": 0.5}, "GGGGG" + "tc" * 5, ""),
        ([*GLOMERULI, *PARTS], {"mpp": 9.0}, "tc" * 5, "holds other outlines"),
        ([*of_class("Glomerulus", 12), *PARTS], {}, "G" * 12 + "tc" * 5, ""),
        ([*GLOMERULI, *of_class("Artery", 3, y=500)], {}, "GGGGGAAA", ""),
        ([*GLOMERULI, *of_class("Artery", 3, y=500)], {"exclude": ["artery"]}, "GGGGG", "excluded"),
        ([*of_class("A: B", 2), *of_class("C", 1, y=500)], {"classes": ["A"]}, "AA", "class C"),
        ([*of_class("A", 2), *of_class("C: D", 1, y=500)], {"classes": ["C: D"]}, "C", "class A"),
        ([*GLOMERULI, square(0, 500, 30, "n", objectType="detection")], {}, "GGGGG", "detection"),
        ([square(0, 500 * i, 30, f"n{i}", objectType="cell") for i in (1, 2)], {}, "nn", ""),
        ([*GLOMERULI, square(9999, 0, 50, "far")], {"size": (3000, 800)}, "GGGGG", "outside"),
        ([*GLOMERULI, square(-9, -9, 1e7, "h")], {"size": (3000, 800)}, "GGGGG", "larger than"),
        ([*GLOMERULI, square(0, 700, 2, "click")], {}, "GGGGG", "smaller than 4 pixels"),
    ],
)
def test_what_counts_and_why_the_rest_does_not(
    tmp_path: Path, features: Any, options: Any, kept: str, reason: str
) -> None:
    outlines = annotations.read_outlines(put(tmp_path / "a.geojson", features), **options)
    assert "".join(item.id[0] for item in outlines.objects) == kept
    assert len(outlines.objects) + sum(map(len, outlines.left_out.values())) == len(features)
    assert bool(outlines.left_out) == bool(reason)
    assert reason in " ".join(outlines.notes)
    assert ("lie in another one" in " ".join(outlines.notes)) == ("Gtc" in kept)


def test_the_classes_that_are_taken_are_named(tmp_path: Path) -> None:
    features = [*GLOMERULI, *of_class("Artery", 40, y=500), *of_class("", 2, y=900)]
    notes = annotations.read_outlines(put(tmp_path / "a.geojson", features)).notes
    assert notes == ["Outlines taken: 40 Artery, 5 Glomerulus, 2 without a class."]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"classes": ["Glomeruls"]}, "Asked for: Glomeruls; its classes are Glomerulus.*Did you"),
        ({"exclude": ["glomerulus"]}, r"class Glomerulus, which is excluded \(5\)"),
        (
            {"size": (10, 10), "origin": Origin(-9e5, 0)},
            "outside the slide.*annotations of another",
        ),
    ],
)
def test_where_nothing_is_left_the_reasons_are_told(
    tmp_path: Path, options: Any, sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        annotations.read_outlines(put(tmp_path / "a.geojson", GLOMERULI), **options)


def test_a_name_that_no_outline_bears_is_told_with_what_is_near(tmp_path: Path) -> None:
    path = put(tmp_path / "a.geojson", [*GLOMERULI, *of_class("Artery", 3, y=500)])
    notes = annotations.read_outlines(path, exclude=["artry"]).notes
    assert notes[0] == "No outline has the class 'artry'. Did you mean 'Artery'?"


# ------------------------------------------------------------------------------ where it lies


def test_a_file_counts_from_its_origin_and_is_written_so(tmp_path: Path) -> None:
    given = [square(10.125, 20, 50, "a") | {"nucleusGeometry": polygon(ring_of(12, 22, 15, 25))}]
    outlines = annotations.read_outlines(put(tmp_path / "a.geojson", given), origin=SCANNED)
    (item,) = outlines.objects
    assert item.bounds == (710.125, 60, 760.125, 110)
    assert "count from (700, 40) of level 0, the corner of the scanned part" in outlines.notes[0]

    same, moved = tmp_path / "same.geojson", tmp_path / "moved.geojson"
    annotations.write_geojson(same, outlines.objects, origin=SCANNED)
    annotations.write_geojson(moved, outlines.objects)
    written = [json.loads(path.read_text()) for path in (same, moved)]
    assert [content["origin"] for content in written] == [
        {"x": 700, "y": 40, "source": "bounds"},
        {"x": 0, "y": 0, "source": "slide"},
    ]
    (one,), (other,) = (content["features"] for content in written)
    assert (one["geometry"], one["nucleusGeometry"]) == (
        given[0]["geometry"],
        given[0]["nucleusGeometry"],
    )
    assert other["geometry"]["coordinates"] == [ring_of(710.125, 60, 760.125, 110)]
    assert other["nucleusGeometry"]["coordinates"] == [ring_of(712, 62, 715, 65)]
    for path in (same, moved):  # each is read back right without being told
        assert read_geojson(path)[0].bounds == item.bounds


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LEVEL0, "counts"),
        (Origin(1, 2, "bounds"), "counts"),
        (Origin(700, 40, "given"), "counts"),
        (Origin(1, 2, "given"), "the origin (1, 2) was given"),
    ],
)
def test_what_a_file_states_holds_unless_a_person_says_otherwise(
    tmp_path: Path, given: Origin, expected: str
) -> None:
    annotations.write_geojson(tmp_path / "a.geojson", [box_object(800, 90, 9, 9)], origin=SCANNED)
    try:
        outlines = annotations.read_outlines(tmp_path / "a.geojson", origin=given)
        assert outlines.objects[0].bounds[:2] == (800, 90)
        found = "counts " + outlines.notes[0]
    except GloVLMError as error:
        found = str(error)
    assert expected in found


# ---------------------------------------------------------------------------- bounded work


@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=3, max_size=12),
    st.integers(0, 2**20),
)
def test_the_area_is_that_of_a_fan_of_triangles(points: list[tuple[int, int]], shift: int) -> None:
    ring = np.array([*points, points[0]], dtype=np.float64) + shift
    (x0, y0), total = points[0], 0  # exact, in whole numbers
    for (x1, y1), (x2, y2) in pairwise(points[1:]):
        total += (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    assert ring_area(ring) == pytest.approx(abs(total) / 2, rel=1e-9, abs=1e-3)


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([[0, 0], [10, 10], [10, 0], [0, 10]], 50),  # a bow-tie: the shoelace formula says 0
        ([[0, 0], [10, 0], [10, 10], [0, 10]], 100),
        ([[0, 0], [10, 0], [10, 10], [10, 0]], 0),  # there and back
        ([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [2, 2], [8, 2], [8, 8], [2, 8], [2, 2]], 44),
    ],
)
def test_an_outline_that_crosses_itself_has_the_area_that_it_fills(
    points: Any, area: float
) -> None:
    assert filled_area(np.array([*points, points[0]], float)) == pytest.approx(area, rel=0.02)


def test_boxes_that_meet_are_found_by_place() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(-50, 50, (200, 2))
    sides = rng.exponential(8, (200, 2)) * rng.choice([0.1, 1, 9], (200, 1))
    boxes = np.concatenate([low, low + sides], axis=1)
    meet = (boxes[:, None, :2] < boxes[None, :, 2:]).all(-1)
    expected = {(i, j) for i, j in zip(*np.nonzero(meet & meet.T), strict=True) if i < j}
    assert {tuple(sorted(pair)) for pair in meeting_pairs(boxes).tolist()} == expected


def test_thousands_of_outlines_and_one_of_many_points_are_compared_by_place(
    tmp_path: Path,
) -> None:
    angle = np.linspace(0, 2 * np.pi, 100_000)
    around = 20_000 + 19_000 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    places = [(300 * i, 300 * j) for i in range(40) for j in range(50)]
    features = [square(x, y, 200, f"{x} {y}") for x, y in places]
    features += [square(*places[0], 201, "again"), feature(polygon(around.round(1).tolist()), "T")]
    outlines = annotations.read_outlines(put(tmp_path / "a.geojson", features))
    assert len(outlines.objects) == 2001
    assert list(outlines.left_out.values()) == [["T"]]
    first = annotations.find_repeats(outlines.objects)
    assert np.flatnonzero(first != np.arange(2001)).tolist() == [2000]


def test_outlines_that_all_lie_on_one_another_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "MOST_PAIRS", 100)
    items = [box_object(i / 7, 0, 100, 100) for i in range(20)]
    with pytest.raises(GloVLMError, match="lie on one another"):
        annotations.find_repeats(items)


def test_a_shape_with_holes_is_drawn_with_them() -> None:
    shape = ((np.array(ring_of(0, 0, 9, 9)), np.array(ring_of(3, 3, 5, 5))),)
    mask = draw(shape, 0, 0, 1, (20, 12))
    assert mask.shape == (12, 20)
    assert mask.sum() == 100 - 9
    assert polygon_object(ring_of(0, 0, 9, 9)).area == 81
