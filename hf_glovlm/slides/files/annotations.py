"""GeoJSON annotations: outlined objects in pixels of level 0, as QuPath writes and reads them.

An object that was read keeps its id, its geometry and all else in its file when it is
written again; only its class, its colour and its measurements change.
"""

import json
import logging
import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...errors import GloVLMError
from ...files import read_text, write_text

logger = logging.getLogger("hf_glovlm")

Ring: TypeAlias = NDArray[np.float64]  # [points, 2]: x, y; the first point stands again at the end
Polygon: TypeAlias = tuple[Ring, ...]  # the outline, then its holes
Colour: TypeAlias = tuple[int, int, int]

# Okabe and Ito's colours, which most colour-blind people distinguish too.
PALETTE: tuple[Colour, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (230, 159, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
)
_WITHOUT_AREA = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})
MOST_BYTES = 2**30  # of a file of outlines: some millions of polygons
_RASTER = 256  # pixels along the longer side, when the overlap of two outlines is measured


@dataclass(frozen=True, eq=False)
class SlideObject:
    """Annotation: one outlined object.

    Attributes:
        id: As the file has it, in text; made from place and geometry where the file has none.
        geometry: The GeoJSON geometry, as it came.
        polygons: The same in numbers, rings closed.
        label: Its class, or `None`.
        properties: The feature's properties, as they came.
        members: All other members of the feature (`id`, a cell's `nucleusGeometry`), as they came.
    """

    id: str
    geometry: Mapping[str, Any]
    polygons: tuple[Polygon, ...]
    label: str | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """`(x0, y0, x1, y1)` in pixels of level 0."""
        points = np.concatenate([polygon[0] for polygon in self.polygons])
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)

    @property
    def area(self) -> float:
        """Square pixels of level 0, holes taken off."""
        return sum(
            ring_area(polygon[0]) - sum(map(ring_area, polygon[1:])) for polygon in self.polygons
        )


def ring_area(ring: Ring) -> float:
    """Area inside a closed ring `[points, 2]`, by the shoelace formula; at least 0."""
    x, y = (ring - ring[0]).T  # far from the slide's corner the products would lose digits
    return 0.5 * abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1]))


def read_geojson(path: Path, *, label_property: str | None = None) -> list[SlideObject]:
    """Read the outlined objects of a GeoJSON file.

    A `FeatureCollection`, a list of features or a single feature, with geometries `Polygon` or
    `MultiPolygon`. Points and lines have no area: they are left out, and the log says how many.

    Args:
        path: The file.
        label_property: The property that holds the class. By default
            `properties.classification.name`, as QuPath writes it, else `properties.label`.

    Returns:
        The objects in the file's order; at least one.

    Raises:
        GloVLMError: No such file, no GeoJSON, an id that stands there twice, a geometry that is
            empty, not finite or without area: names the object.
    """
    features = _features(_parse(path), path)
    objects: list[SlideObject] = []
    skipped: Counter[str] = Counter()
    for number, feature in enumerate(features, start=1):
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise GloVLMError(f"{where}: expected a GeoJSON feature, found {_kind(feature)}.")
        geometry = feature.get("geometry")
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        if kind in _WITHOUT_AREA:
            skipped[str(kind)] += 1
            continue
        objects.append(_object(feature, where, label_property, number))
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
        logger.warning("%s: objects without an area are left out (%s).", path, kinds)
    if not objects:
        raise GloVLMError(
            f"{path} holds no outlined object; expected features with a Polygon or MultiPolygon."
        )
    twice = [name for name, n in Counter(o.id for o in objects).items() if n > 1]
    if twice:
        raise GloVLMError(
            f"{path}: the id '{twice[0]}' stands there more than once; give each object its own."
        )
    return objects


def write_geojson(
    path: Path,
    objects: Sequence[SlideObject],
    *,
    labels: Sequence[str | None] | None = None,
    measurements: Sequence[Mapping[str, float]] | None = None,
    colours: Mapping[str, Colour] | None = None,
) -> None:
    """Write objects as a `FeatureCollection` that QuPath opens, whole or not at all.

    Ids, geometries and all other properties are written as they came. A class that replaces
    another leaves that one behind in `properties.metadata["given class"]`.

    Args:
        path: The file, ending in `.geojson`.
        objects: What to write.
        labels: For each object its new class; `None` leaves it as it is.
        measurements: For each object numbers by name, for example `{"p sclerosed": 0.93}`; added to
            those it has.
        colours: Red, green and blue, 0 to 255, by class; by default PALETTE, classes sorted.

    Raises:
        GloVLMError: Lists of different lengths, or a number that is not finite.
    """
    new_labels = [None] * len(objects) if labels is None else list(labels)
    numbers = [{}] * len(objects) if measurements is None else list(measurements)
    if not len(objects) == len(new_labels) == len(numbers):
        raise GloVLMError(
            f"Expected a class and measurements for each of {len(objects)} objects, found "
            f"{len(new_labels)} classes and {len(numbers)} measurements."
        )
    known = sorted({label for label in new_labels if label is not None})
    palette = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(known)} | dict(
        colours or {}
    )
    features = [
        _feature(item, label, palette.get(label) if label else None, values)
        for item, label, values in zip(objects, new_labels, numbers, strict=True)
    ]
    content = {"type": "FeatureCollection", "features": features}
    write_text(path, json.dumps(content, ensure_ascii=False))


def polygon_object(
    points: NDArray[Any] | Sequence[Sequence[float]], *, label: str | None = None
) -> SlideObject:
    """An object of our own from its outline.

    Args:
        points: `[points, 2]`, x and y in pixels of level 0; closed here if it is open.
        label: Its class.

    Raises:
        GloVLMError: Fewer than three points, or no area.
    """
    ring = [[float(x), float(y)] for x, y in np.asarray(points, dtype=np.float64).tolist()]
    if ring and ring[0] != ring[-1]:
        ring.append(ring[0])
    feature: dict[str, Any] = {"geometry": {"type": "Polygon", "coordinates": [ring]}}
    if label is not None:
        feature["properties"] = {"classification": {"name": label}}
    return _object(feature, "An outline", None, 0)


def box_object(
    x: float, y: float, width: float, height: float, *, label: str | None = None
) -> SlideObject:
    """A rectangle, for example a tile; in pixels of level 0.

    Raises:
        GloVLMError: No width or no height.
    """
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    return polygon_object(corners, label=label)


def overlap(one: SlideObject, other: SlideObject) -> float:
    """Intersection over union of two objects' areas, 0 to 1.

    Measured on a raster of about 256 pixels along the longer side of what both cover: good to a few
    hundredths, less for slivers.
    """
    a, b = one.bounds, other.bounds
    if min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]):
        return 0.0
    x0, y0, x1, y1 = min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
    scale = _RASTER / max(x1 - x0, y1 - y0)
    size = math.ceil((x1 - x0) * scale) + 1, math.ceil((y1 - y0) * scale) + 1
    masks = [_raster(item, x0, y0, scale, size) for item in (one, other)]
    union = np.count_nonzero(masks[0] | masks[1])
    return np.count_nonzero(masks[0] & masks[1]) / union if union else 0.0


# ----------------------------------------------------------------------------------- reading


def _parse(path: Path) -> Any:
    text = read_text(path, "a GeoJSON file", most=MOST_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GloVLMError(
            f"{path} is not JSON ({error}); export the annotations as GeoJSON again."
        ) from None


def _features(raw: Any, path: Path) -> list[Any]:
    if isinstance(raw, list):  # QuPath before 0.4
        return raw
    if isinstance(raw, dict) and raw.get("type") == "Feature":
        return [raw]
    if isinstance(raw, dict) and isinstance(raw.get("features"), list):
        return list(raw["features"])
    raise GloVLMError(
        f"{path} is JSON but not GeoJSON: expected a FeatureCollection, found {_kind(raw)}."
    )


def _object(
    feature: Mapping[str, Any], where: str, label_property: str | None, number: int
) -> SlideObject:
    geometry = feature.get("geometry")
    properties = feature.get("properties") or {}
    if not isinstance(properties, dict):
        raise GloVLMError(f"{where}: 'properties' must be keys and values.")
    given = feature.get("id")
    if given is not None:
        where = f"{where} (id {given})"
    polygons = _polygons(geometry, where)
    if given is None:
        text = f"{number} {json.dumps(geometry, sort_keys=True)}"
        given = uuid.uuid5(uuid.NAMESPACE_OID, text)  # the same in every run
    item = SlideObject(
        id=str(given),
        geometry=dict(geometry or {}),
        polygons=polygons,
        label=_label(properties, label_property, where),
        properties=properties,
        members={k: v for k, v in feature.items() if k not in ("type", "geometry", "properties")},
    )
    if not item.area > 0:
        raise GloVLMError(f"{where}: the outline has no area; redraw or delete the object.")
    return item


def _polygons(geometry: Any, where: str) -> tuple[Polygon, ...]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Polygon", "MultiPolygon"):
        raise GloVLMError(
            f"{where}: expected a Polygon or MultiPolygon, found {kind or 'no geometry'}."
        )
    coordinates = geometry.get("coordinates")
    parts = [coordinates] if kind == "Polygon" else coordinates
    if (
        not isinstance(parts, list)
        or not parts
        or not all(isinstance(p, list) and p for p in parts)
    ):
        raise GloVLMError(f"{where}: the {kind} is empty; redraw or delete the object.")
    return tuple(tuple(_ring(ring, where) for ring in part) for part in parts)


def _ring(raw: Any, where: str) -> Ring:
    try:
        ring = np.array([(x, y) for x, y, *_ in raw], dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        raise GloVLMError(f"{where}: a ring must be a list of points [x, y].") from None
    if not np.isfinite(ring).all():
        raise GloVLMError(f"{where}: a coordinate is not a finite number.")
    if len(ring) and not np.array_equal(ring[0], ring[-1]):
        ring = np.concatenate([ring, ring[:1]])
    if len(ring) < 4:
        raise GloVLMError(
            f"{where}: a ring has {max(len(ring) - 1, 0)} points, at least three are needed."
        )
    return ring


def _label(properties: Mapping[str, Any], label_property: str | None, where: str) -> str | None:
    """The class of an object; text that is empty is none."""
    if label_property is not None:
        value = properties.get(label_property)
    else:
        value = properties.get("classification", properties.get("label"))
    if isinstance(value, dict):  # QuPath: {"name", "color"}, or {"names"} for "Tumour: Positive"
        names = value.get("names")
        value = value.get("name", ": ".join(names) if isinstance(names, list) else None)
    if value is None and label_property is None:
        value = properties.get("label")
    if isinstance(value, bool | list | float):
        raise GloVLMError(f"{where}: expected a class name, found {value!r}.")
    text = "" if value is None else str(value).strip()
    return text or None


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"the type {value.get('type')!r}"
    return "a list" if isinstance(value, list) else repr(value)[:40]


# ----------------------------------------------------------------------------------- writing


def _feature(
    item: SlideObject, label: str | None, colour: Colour | None, numbers: Mapping[str, float]
) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": "annotation", **item.properties}
    if label is not None:
        properties["classification"] = {"name": label, "color": list(colour or PALETTE[0])}
        if item.label not in (None, label):
            before = properties.get("metadata")
            metadata = before if isinstance(before, dict) else {}
            properties["metadata"] = {"given class": item.label, **metadata}
    if numbers:
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise GloVLMError(f"Object {item.id}: the measurement '{wrong[0]}' is not finite.")
        new = {name: float(value) for name, value in numbers.items()}
        properties["measurements"] = _measured(properties.get("measurements")) | new
    members = {"id": item.id, **item.members}
    return {
        "type": "Feature",
        **members,
        "geometry": dict(item.geometry),
        "properties": properties,
    }


def _measured(raw: Any) -> dict[str, Any]:
    """Measurements by name; QuPath before 0.4 wrote a list of `{"name", "value"}`."""
    if isinstance(raw, list):
        return {
            m["name"]: m["value"] for m in raw if isinstance(m, dict) and {"name", "value"} <= {*m}
        }
    return dict(raw) if isinstance(raw, dict) else {}


def _raster(
    item: SlideObject, x0: float, y0: float, scale: float, size: tuple[int, int]
) -> NDArray[np.bool_]:
    total = np.zeros((size[1], size[0]), dtype=bool)
    for polygon in item.polygons:
        part = Image.new("1", size)
        draw = ImageDraw.Draw(part)
        for i, ring in enumerate(polygon):
            points = [((x - x0) * scale, (y - y0) * scale) for x, y in ring.tolist()]
            draw.polygon(points, fill=int(i == 0))
        total |= np.asarray(part)
    return total
