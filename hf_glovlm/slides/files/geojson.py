"""GeoJSON: the features of a file and their polygons, as QuPath writes them.

What is nested becomes flat, so that nothing here depends on how deep it stands.
"""

import json
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import GloVLMError
from ...files import read_content
from .coordinates import Origin
from .shapes import Polygon, Ring

MOST_BYTES = 2**30  # of a file of outlines, unpacked: some millions of polygons
CHILDREN = ("childObjects", "children")  # of QuPath's objects within others
FARTHEST = 2.0**30  # pixels from the corner of a slide
FILE_ID = "id in its file"  # of an object of another format, in QuPath's metadata of it
_DEEPEST = 16  # collections of geometries in one another


class Unusable(Exception):
    """Why one feature cannot be used, in a few words."""


@dataclass(frozen=True)
class LeftOut:
    """What stands in a file in place of a feature and is none: its name there, and why."""

    name: str
    reason: str


def make_feature(
    geometry: Mapping[str, Any],
    file_id: str,
    *,
    label: str | None = None,
    score: float | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A feature of an object that another format than GeoJSON holds.

    Args:
        geometry: In the file's own pixels.
        file_id: Its name in the file. The feature's id is made of it and of the geometry, the same
            in every run, since QuPath takes UUIDs alone.
        label: Its class.
        score: A detector's, kept as a measurement.
        texts: Further texts of the file, by name.
    """
    own: dict[str, Any] = {"objectType": "annotation", "metadata": {FILE_ID: file_id}}
    if label is not None:
        own["classification"] = {"name": label}
    if score is not None:
        own["measurements"] = {"score": score}
    return {
        "type": "Feature",
        "id": make_id(file_id, geometry),
        "geometry": geometry,
        "properties": {name: text for name, text in (texts or {}).items() if text} | own,
    }


def make_id(name: object, geometry: Any) -> str:
    """Id of an object that has none: the same in every run."""
    try:
        text = f"{name} {json.dumps(geometry, sort_keys=True)}"
    except RecursionError:
        raise Unusable("geometries nested too deeply") from None
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text.encode("utf-8", "replace").decode()))


def read_unpacked(path: Path) -> bytes:
    """Read a file of outlines, packed by gzip or not.

    Raises:
        GloVLMError: No such file, or one that is too large or damaged.
    """
    content = read_content(path, "a file of outlines", most=MOST_BYTES)
    return _unpack(content, path) if content[:2] == b"\x1f\x8b" else content


def parse_json(content: bytes, path: Path) -> Any:
    """Parse JSON in UTF-8, UTF-16 or UTF-32.

    Raises:
        GloVLMError: No JSON.
    """
    try:
        return json.loads(content)  # in UTF-8, -16 or -32, by its first bytes
    except UnicodeDecodeError as error:
        raise GloVLMError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise GloVLMError(f"{path} is not JSON ({error}); export the annotations again.") from None


def _unpack(content: bytes, path: Path) -> bytes:
    """Content that gzip packed, at most `MOST_BYTES` of it."""
    parts: list[bytes] = []
    size = 0
    try:
        while content:
            stream = zlib.decompressobj(wbits=31)
            parts.append(stream.decompress(content, MOST_BYTES - size + 1))
            size += len(parts[-1])
            if size > MOST_BYTES:
                raise GloVLMError(
                    f"{path} unpacks to more than {MOST_BYTES >> 20} MiB: that is no file of "
                    "outlines."
                )
            if not stream.eof:
                raise zlib.error("it ends too early")
            content = stream.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise GloVLMError(
            f"{path} is a damaged gzip file ({error}); pack the file again."
        ) from None
    return b"".join(parts)


def list_features(raw: Any, path: Path) -> Iterator[Any]:
    """Features of a file, those within collections and within other objects too, in order."""
    known = isinstance(raw, list) or (
        isinstance(raw, dict)
        and (
            raw.get("type") == "Feature"
            or isinstance(raw.get("features"), list)
            or isinstance(raw.get("root"), dict)
            or "coordinates" in raw
            or "geometries" in raw
        )
    )
    if not known:
        raise GloVLMError(
            f"{path} is JSON but neither GeoJSON nor COCO: expected a FeatureCollection, found "
            f"{describe_kind(raw)}."
        )
    rest = [raw]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += reversed(value)
        elif not isinstance(value, dict) or value.get("type") == "Feature":
            yield value
            rest += reversed(_children(value))
        elif isinstance(value.get("features"), list):
            rest.append(value["features"])
        elif isinstance(value.get("root"), dict):  # QuPath's hierarchy
            rest.append(value["root"])
        elif "coordinates" in value or "geometries" in value:
            yield {"type": "Feature", "geometry": value}
        else:
            yield value


def _children(feature: Any) -> list[Any]:
    """Objects within another one, as QuPath nests them in its properties."""
    places = [feature, feature.get("properties")] if isinstance(feature, dict) else []
    lists = [place.get(name) for place in places if isinstance(place, dict) for name in CHILDREN]
    return [child for children in lists if isinstance(children, list) for child in children]


def read_polygons(geometry: Any, origin: Origin) -> tuple[Polygon, ...]:
    """Polygons of a geometry in pixels of level 0; rings without an area are passed over."""
    if geometry is None:
        raise Unusable("without a geometry")
    parts: list[Any] = []
    rest = [(geometry, 0)]
    while rest:
        value, depth = rest.pop()
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "GeometryCollection" and isinstance(value.get("geometries"), list):
            if depth == _DEEPEST:
                raise Unusable("geometries nested too deeply")
            rest += [(inner, depth + 1) for inner in reversed(value["geometries"])]
        elif kind in ("Polygon", "MultiPolygon"):
            coordinates = value.get("coordinates")
            parts += [coordinates] if kind == "Polygon" else _as_list(coordinates)
        elif value is geometry:
            raise Unusable(f"a {kind}, no polygon" if kind else "without a geometry")
    polygons = []
    for part in parts:
        outline, *holes = [_ring(ring, origin) for ring in _as_list(part)] or [None]
        if outline is not None:
            polygons.append((outline, *(hole for hole in holes if hole is not None)))
    if not polygons:
        raise Unusable("without an area")
    return tuple(polygons)


def _ring(raw: Any, origin: Origin) -> Ring | None:
    """Closed ring in pixels of level 0; `None` of fewer than three points."""
    try:
        try:
            ring = np.array(raw, dtype=np.float64)
        except ValueError:  # some points with a height
            ring = np.array([(x, y) for x, y, *_ in raw], dtype=np.float64)
        ring = ring.reshape(-1, 2) if not ring.size else ring[:, :2]
    except (TypeError, ValueError, IndexError, OverflowError):
        raise Unusable("a ring that is no list of points [x, y]") from None
    if ring.ndim != 2 or ring.shape[1] != 2:
        raise Unusable("a ring that is no list of points [x, y]")
    if not np.isfinite(ring).all():
        raise Unusable("a coordinate that is no finite number")
    ring = origin.to_level0(ring)
    if len(ring) and np.abs(ring).max() > FARTHEST:
        raise Unusable("a coordinate beyond any slide")
    if len(ring) and not np.array_equal(ring[0], ring[-1]):
        ring = np.concatenate([ring, ring[:1]])
    return ring if len(ring) > 3 else None


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable("a ring that is no list of points [x, y]")
    return value


def describe_kind(value: object) -> str:
    """What stands in place of a feature, in a few words."""
    if isinstance(value, dict):
        return f"the type {value.get('type')!r}"[:80]
    return "a list" if isinstance(value, list) else repr(value)[:40]


def move_geometry(geometry: Any, by: tuple[float, float]) -> Any:
    """Move a geometry; whole numbers stay whole where they are moved by such."""
    if not isinstance(geometry, dict):
        return geometry
    moved = {name: value for name, value in geometry.items() if name != "bbox"}
    if "geometries" in moved:
        moved["geometries"] = [move_geometry(inner, by) for inner in moved["geometries"]]
    if "coordinates" in moved:
        whole = [int(step) if step.is_integer() else step for step in by]
        moved["coordinates"] = _move_points(moved["coordinates"], whole)
    return moved


def _move_points(points: Any, by: Sequence[float]) -> Any:
    if not isinstance(points, list):
        return points
    if len(points) > 1 and all(isinstance(value, int | float) for value in points[:2]):
        return [points[0] + by[0], points[1] + by[1], *points[2:]]
    return [_move_points(inner, by) for inner in points]
