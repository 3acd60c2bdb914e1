"""Seeded GeoJSON as programs and people leave it, beside what must be read out of it.

`make(seed)` returns the bytes of a file, its origin and the boxes of the outlines that count, in
pixels of level 0 and in the file's order. Nothing here has seen the reader: the boxes are the
numbers that the outlines were drawn from.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.annotations import read_geojson, read_outlines, write_geojson
from hf_glovlm.slides.files.coordinates import LEVEL0, Origin

SIZE = (4000, 3000)  # of the slide
LEGACY = ("PathAnnotationObject", "PathDetectionObject", "PathCellObject")
Box = tuple[float, float, float, float]
Ring = list[list[float]]


def ring_of(x0: float, y0: float, x1: float, y1: float) -> Ring:
    """A rectangle, closed."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(geometry: Any, name: Any = None, **properties: Any) -> dict[str, Any]:
    """A feature of QuPath."""
    made = {"type": "Feature", "geometry": geometry, "properties": properties}
    return made | ({} if name is None else {"id": name})


def polygon(*rings: Any) -> dict[str, Any]:
    """A polygon of an outline and its holes."""
    return {"type": "Polygon", "coordinates": list(rings)}


def _usable(rng: random.Random, box: Box, n: int) -> dict[str, Any]:
    """An outline that counts, written in one of many ways."""
    x0, y0, x1, y1 = box
    ring = ring_of(*box)
    middle = ring_of(x0 + 10, y0 + 10, x0 + 15, y0 + 15)
    half = (x0 + x1) / 2
    geometry = rng.choice(
        [
            polygon(ring),
            polygon(ring[:-1]),  # open
            polygon(ring[::-1]),
            polygon([[*point, 0] for point in ring]),  # with a height
            polygon([[x0, y0, 1], *ring[1:]]),  # one point with a height
            polygon(ring, middle),
            polygon(ring, []),  # an empty hole
            polygon([[x0, y0], [x1, y1], [x1, y0], [x0, y1], [x0, y0]]),  # a bow-tie
            polygon([p for p in ring for _ in range(3)]),  # each point three times
            {"type": "MultiPolygon", "coordinates": [[ring]]},
            {"type": "MultiPolygon", "coordinates": [[ring], [[[x0, y0], [x1, y1]]]]},
            {
                "type": "MultiPolygon",
                "coordinates": [[ring_of(x0, y0, half - 2, y1)], [ring_of(half + 2, y0, x1, y1)]],
            },
            {
                "type": "GeometryCollection",
                "geometries": [{"type": "Point", "coordinates": [x0, y0]}, polygon(ring)],
            },
            polygon(ring) | {"plane": {"c": -1, "z": 0, "t": 0}, "bbox": list(box)},
        ]
    )
    name = rng.choice([None, f"id-{n}", n, n + 0.5, "", "PathAnnotationObject", True, [n]])
    kind = rng.choice(["Glomerulus", "Sclerosed", "Glomerulus: Sclerosed", "glomérule"])
    label = rng.choice([{"name": kind, "color": [1, 2, 3]}, {"names": kind.split(": ")}, kind])
    made = feature(geometry, name, classification=label)
    extra = rng.choice([{}, {"objectType": "annotation"}, {"isLocked": False}, {"metadata": None}])
    made["properties"] |= extra | {"measurements": rng.choice([[], {}, None, [{"name": [1]}]])}
    return made


def _unusable(rng: random.Random, n: int) -> Any:
    """Something that does not count, for one reason or another."""
    ring = ring_of(100, 2500, 180, 2570)
    many = {"type": "Polygon", "coordinates": [ring]}
    for _ in range(40):
        many = {"type": "GeometryCollection", "geometries": [many]}
    broken: list[Any] = [
        None,
        3,
        "x",
        {},
        {"type": "Topology"},
        {"type": "Feature"},
        feature(None),
        feature(3),
        feature([]),
        feature({"type": "Point", "coordinates": [1, 2]}),
        feature({"type": "LineString", "coordinates": ring}),
        feature({"type": "Circle", "coordinates": ring}),
        feature({"type": ["Polygon"], "coordinates": ring}),
        feature({"type": "Polygon"}),
        feature({"type": "Polygon", "coordinates": None}),
        feature(polygon()),
        feature(polygon([])),
        feature(polygon([[1, 2], [3, 4]])),
        feature(polygon([[1, 2], [3], [5, 6], [1, 2]])),
        feature(polygon([["a", 2], [3, 4], [5, 6]])),
        feature(polygon([[None, 2], [3, 4], [5, 6]])),
        feature(polygon([[float("nan"), 2], [300, 4], [5, 600]])),
        feature(polygon([[float("inf"), 2], [300, 4], [5, 600]])),
        feature(polygon([[1e300, 2], [300, 4], [5, 600]])),
        feature(polygon([[10**400, 2], [300, 4], [5, 600]])),
        feature(polygon(ring_of(1e12, 1e12, 1e12 + 50, 1e12 + 50))),
        feature(polygon(ring_of(-1e7, -1e7, 1e7, 1e7)), f"huge-{n}"),
        feature(polygon(ring_of(90_000, 90_000, 90_100, 90_100)), f"far-{n}"),
        feature(polygon([[0, 0], [100, 100], [200, 200], [0, 0]])),
        feature(polygon([[0, 0], [100, 0], [100, 100], [100, 0]])),  # there and back
        feature(polygon([[7, 7]] * 9)),
        feature(polygon(ring_of(500, 2900, 501, 2901)), f"click-{n}"),
        feature(polygon(ring, ring), f"hole-{n}"),  # a hole as large as the outline
        feature(many, f"deep-{n}"),
        feature(polygon(ring), n, classification={"name": "Region*"}),
        feature(polygon(ring), n, classification={"names": ["Tumour", "Ignore*"]}),
        feature(polygon(ring), n, classification={"name": [1]}, label=[2]),
        feature(polygon(ring), n, classification=True),
        feature(polygon(ring), n) | {"properties": [1]},
        feature(polygon(ring), n) | {"properties": "x"},
        feature(polygon(ring), f"cell-{n}", objectType="cell", classification="Nucleus"),
        feature(polygon(ring), f"tile-{n}", objectType="tile"),
        feature(polygon(ring), rng.choice(LEGACY[1:])),
        feature(polygon(ring_of(-20, -20, 4020, 3020)), f"tissue-{n}", isLocked=True),
        feature(polygon(ring_of(0, 0, 3900, 2990)), f"whole-{n}"),
    ]
    return rng.choice(broken)


def _wrap(rng: random.Random, features: list[Any], origin: tuple[int, int] | None) -> Any:
    """One of the shapes in which features stand in a file."""
    collection: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if origin is not None:
        return collection | {"origin": {"x": origin[0], "y": origin[1], "source": "bounds"}}
    root = feature(None, "PathRootObject", childObjects=features)
    return rng.choice(
        [
            collection,
            features,
            [collection],
            [features[:2], {"features": features[2:]}],
            {
                "root": root
                | {"id": "0", "properties": {"objectType": "root", "children": features}}
            },
            [root],
        ]
    )


def make(seed: int) -> tuple[bytes, tuple[int, int], bool, list[Box]]:
    """A file, where it counts from, whether it says so itself, and the boxes that count."""
    rng = random.Random(seed)
    origin = rng.choice([(0, 0), (0, 0), (700, -40), (12345, 678)])
    states = rng.random() < 0.4
    features: list[Any] = []
    boxes: list[Box] = []
    places = [(300 * i + 50, 300 * j + 50) for j in range(7) for i in range(12)]
    for n in range(rng.randint(0, 10) if rng.random() < 0.1 else rng.randint(3, 10)):
        x, y = places[n * 7 % len(places)]
        width, height = rng.randint(90, 160), rng.randint(90, 160)
        boxes.append((x, y, x + width, y + height))
        features.append(_usable(rng, boxes[-1], n))
        features += [_unusable(rng, 100 * n + k) for k in range(rng.randint(0, 2))]
    features = features or [None]
    moved = [move(item, -origin[0], -origin[1]) for item in features]
    text = json.dumps(
        _wrap(rng, moved, origin if states else None), ensure_ascii=rng.random() < 0.5
    )
    if rng.random() < 0.3:
        text = text.replace(", ", ",\r\n")
    content = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le"]))
    if rng.random() < 0.3:
        content = gzip.compress(content, 1)
    return content, origin, states, boxes


def check(path: Path, seed: int) -> None:
    """Read a hostile file, and write again what was read of it."""
    content, (x, y), states, boxes = make(seed)
    path.write_bytes(content)
    origin = Origin(x, y, "bounds") if not states else LEVEL0
    if not boxes:
        with pytest.raises(GloVLMError, match=r"^[^\n]*$"):
            read_outlines(path, origin=origin, size=SIZE)
        return
    outlines = read_outlines(path, origin=origin, size=SIZE)
    found = [item.bounds for item in outlines.objects]
    assert found == [tuple(map(float, box)) for box in boxes]
    assert len({item.id for item in outlines.objects}) == len(boxes)
    assert (outlines.origin.x, outlines.origin.y) == (x, y)
    assert all(item.area > 0 for item in outlines.objects)
    again = path.with_name("again.geojson")
    write_geojson(again, outlines.objects, origin=outlines.origin)
    assert [item.geometry for item in read_geojson(again)] == [
        item.geometry for item in outlines.objects
    ]


def move(value: Any, dx: float, dy: float) -> Any:
    """Everything in a feature, its points moved."""
    if isinstance(value, dict):
        return {
            name: _points(inner, dx, dy) if name == "coordinates" else move(inner, dx, dy)
            for name, inner in value.items()
            if name != "bbox"
        }
    if isinstance(value, list):
        return [move(inner, dx, dy) for inner in value]
    return value


def _points(value: Any, dx: float, dy: float) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) > 1 and all(isinstance(number, int | float) for number in value[:2]):
        return [value[0] + dx, value[1] + dy, *value[2:]]
    return [_points(inner, dx, dy) for inner in value]
