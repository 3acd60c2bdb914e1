"""ASAP: the annotations of an XML file of the Automated Slide Analysis Platform, as features.

`ASAP_Annotations/Annotations/Annotation/Coordinates/Coordinate`, in pixels of level 0.
"""

import math
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from .geojson import LeftOut, make_feature
from .xml_elements import numbers_of

_OUTLINES = ("polygon", "rectangle", "spline")  # a spline by its points


def read_asap(root: Element) -> Iterator[dict[str, Any] | LeftOut]:
    """Features of every annotation; its class is its group."""
    for number, annotation in enumerate(root.iter("Annotation"), start=1):
        title = annotation.get("Name", "").strip()
        name = title or f"annotation {number}"
        kind = annotation.get("Type", "Polygon").strip()
        if kind.casefold() not in _OUTLINES:
            yield LeftOut(name, f"a {kind[:40]} of ASAP, which has no area")
            continue
        placed = [
            (numbers_of(one, ("Order", "Order"))[0], numbers_of(one))
            for one in annotation.iter("Coordinate")
        ]
        if all(math.isfinite(place) for place, _ in placed):
            placed.sort(key=lambda one: one[0])
        ring = [point for _, point in placed]
        group = annotation.get("PartOfGroup", "").strip()
        yield make_feature(
            {"type": "Polygon", "coordinates": [[*ring, *ring[:1]]]},
            name,
            label=None if group.casefold() == "none" else group or None,
            texts={"Name": title},
        )
