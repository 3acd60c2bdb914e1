"""Aperio ImageScope: regions of the layers of an XML file, as features.

`Annotations/Annotation/Regions/Region/Vertices/Vertex`, in pixels of level 0. A negative region
(`NegativeROA`) is a hole in the smallest region of its layer that it lies in.
"""

import math
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from .coordinates import LEVEL0
from .geojson import LeftOut, Unusable, make_feature, read_polygons
from .shapes import Polygon, ring_area, share_inside
from .xml_elements import numbers_of

_RECTANGLE, _ELLIPSE = "1", "2"
_OPEN = {"3": "an arrow", "4": "a ruler", "5": "a pen line"}  # and what else is no outline
_ANGLES = 64  # points of an ellipse: its area to two in a thousand


def read_imagescope(root: Element) -> Iterator[dict[str, Any] | LeftOut]:
    """Features of every region.

    A region's class is the name of its layer, else its own text, else the layer's first attribute.
    """
    for layer_number, layer in enumerate(root.iter("Annotation"), start=1):
        outlines: list[tuple[str, Element, list[Any]]] = []
        holes: list[tuple[str, list[list[float]]]] = []
        for number, region in enumerate(layer.iter("Region"), start=1):
            layer_id, own_id = layer.get("Id", layer_number), region.get("Id", number)
            name = f"region {own_id} of layer {layer_id}"
            kind = region.get("Type", "0").strip()
            try:
                if kind not in ("", "0", _RECTANGLE, _ELLIPSE):
                    raise Unusable(f"{_OPEN.get(kind, 'a line or mark')} of ImageScope")
                ring = _ring(region, kind)
                read_polygons({"type": "Polygon", "coordinates": [ring]}, LEVEL0)
            except Unusable as reason:
                yield LeftOut(name, str(reason))
                continue
            if region.get("NegativeROA", "0").strip() == "1":
                holes.append((name, ring))
            else:
                outlines.append((name, region, [ring]))
        yield from _cut_out(outlines, holes)
        for name, region, rings in outlines:
            geometry = {"type": "Polygon", "coordinates": rings}
            text, layer_name = region.get("Text", "").strip(), layer.get("Name", "").strip()
            label = layer_name or text or _attribute_of(layer)
            texts = _texts(region) | {"Name": layer_name, "Text": text}
            yield make_feature(geometry, name, label=label or None, texts=texts)


def _ring(region: Element, kind: str) -> list[list[float]]:
    """Closed ring of a region; of a rectangle or an ellipse two opposite corners may stand."""
    points = [numbers_of(vertex) for vertex in region.iter("Vertex")]
    is_box = kind == _ELLIPSE and len({*map(tuple, points)}) <= 4
    is_box |= kind == _RECTANGLE and len(points) == 2
    if is_box and points and np.isfinite(points).all():
        (x0, y0), (x1, y1) = np.min(points, axis=0).tolist(), np.max(points, axis=0).tolist()
        points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
        if kind == _ELLIPSE:
            x, y, a, b = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
            turns = (2 * math.pi * i / _ANGLES for i in range(_ANGLES))
            points = [[x + a * math.cos(t), y + b * math.sin(t)] for t in turns]
    return points if points and points[0] == points[-1] else [*points, *points[:1]]


def _cut_out(
    outlines: list[tuple[str, Element, list[Any]]], holes: list[tuple[str, list[list[float]]]]
) -> Iterator[LeftOut]:
    """Add holes to the outlines that they lie in; those that lie in none are left out."""
    shapes: list[Polygon] = [(np.array(rings[0], np.float64),) for _, _, rings in outlines]
    order = sorted(range(len(shapes)), key=lambda i: ring_area(shapes[i][0]))
    for name, ring in holes:
        hole = (np.array(ring, np.float64),)
        (x0, y0), (x1, y1) = hole[0].min(axis=0), hole[0].max(axis=0)
        for i in order:
            corner, far = shapes[i][0].min(axis=0), shapes[i][0].max(axis=0)
            apart = x1 < corner[0] or y1 < corner[1] or x0 > far[0] or y0 > far[1]
            bounds = (*corner.tolist(), *far.tolist())
            if not apart and share_inside([[hole]], [shapes[i]], bounds)[0] > 0.5:
                outlines[i][2].append(ring)
                break
        else:
            yield LeftOut(name, "a negative region that lies in no outline of its layer")


def _attribute_of(layer: Element) -> str:
    """Value of a layer's first attribute, else its name, unless that is the empty Description."""
    attribute = layer.find("Attributes/Attribute")
    if attribute is None:
        return ""
    name, value = attribute.get("Name", "").strip(), attribute.get("Value", "").strip()
    return value or ("" if name.casefold() == "description" else name)


def _texts(region: Element) -> dict[str, str]:
    """A region's own attributes, by name."""
    pairs = ((one.get("Name", ""), one.get("Value", "")) for one in region.iter("Attribute"))
    return {name: value for name, value in pairs if name}
