"""Annotations: outlined objects of a slide, as QuPath writes and reads them in GeoJSON.

Files of other programs are read as well (see `outline_formats`); what is written is GeoJSON.
Objects are held in pixels of level 0; a file may count from elsewhere (see `coordinates`). An
object that was read keeps its id, its geometry and all else in its file when it is written again;
only its class, its colour and its measurements change.
"""

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ...data.listing import few
from ...errors import GloVLMError, nearest
from ...files import write_text
from ...tables import spelling
from .coordinates import LEVEL0, Origin, Source
from .geojson import (
    CHILDREN,
    FARTHEST,
    FILE_ID,
    LeftOut,
    Unusable,
    describe_kind,
    make_id,
    move_geometry,
    read_polygons,
)
from .outline_formats import FORMATS, read_features
from .shapes import (
    Bounds,
    Polygon,
    filled_area,
    meeting_pairs,
    overlap_of,
    ring_area,
    share_inside,
)

logger = logging.getLogger("hf_glovlm")

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
SAME = 0.5  # intersection over union above which two outlines are one object
FEWEST_PIXELS = 4  # of an outline's longer side; a click of the mouse is smaller
# QuPath up to 0.3 wrote the type of an object where the id stands; since 0.4 in `objectType`.
_TYPES = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tmaCore",
    "PathRootObject": "root",
}
# A parent is told from what it holds by area. Glomeruli of one slide differ by less than 25 times:
# 80 to 350 micrometres across.
_PARENT = 4.0  # times the area of what it holds, where it holds several
_TWICE = 1.1  # times the area, from which one glomerulus is outlined twice and not alike
_NESTED = 0.9  # part of the inner one's points that lie in the outer one
_GLOMERULUS = 400.0  # micrometres: longer than the longer side of a human one
_HUGE = 25.0  # times the area of a typical outline


@dataclass(frozen=True, eq=False)
class SlideObject:
    """Annotation: one outlined object.

    Attributes:
        id: As the file has it, in text; made from place and geometry where the file has none.
        geometry: The GeoJSON geometry, as it came.
        polygons: The same in pixels of level 0, rings closed.
        label: Its class, or `None`.
        properties: The feature's properties, as they came, but for the objects in it.
        members: All other members of the feature (`id`, a cell's `nucleusGeometry`), as they came.
        origin: Where `geometry` counts from.
    """

    id: str
    geometry: Mapping[str, Any]
    polygons: tuple[Polygon, ...]
    label: str | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = LEVEL0

    @cached_property
    def bounds(self) -> Bounds:
        """`(x0, y0, x1, y1)` in pixels of level 0."""
        points = np.concatenate([polygon[0] for polygon in self.polygons])
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)

    @cached_property
    def area(self) -> float:
        """Square pixels of level 0 that the outline fills, holes taken off."""
        return _total(self.polygons, filled_area)

    @property
    def crosses_itself(self) -> bool:
        """Whether the outline crosses itself, like a bow-tie, so that its area is a convention."""
        return abs(self.area - _total(self.polygons, ring_area)) > 0.01 * self.area

    @property
    def kind(self) -> str:
        """QuPath's type of object: annotation, detection, cell, tile, tmaCore or root."""
        names = {name.casefold(): name for name in _TYPES.values()}
        for key in ("objectType", "object_type", "type"):
            value = self.properties.get(key)
            if isinstance(value, str) and value.casefold() in names:
                return names[value.casefold()]
        return "annotation"


@dataclass(frozen=True)
class Outlines:
    """Outlines of a slide to be cut or counted, and what was left out.

    Attributes:
        objects: In pixels of level 0, in the file's order; one at least.
        left_out: Ids by reason, in words; `feature 7` where it has none.
        notes: Sentences for the results: classes, what was left out, where the file counts from.
        origin: Where the file counts from.
    """

    objects: list[SlideObject]
    left_out: dict[str, list[str]]
    notes: list[str]
    origin: Origin = LEVEL0


class NoObject(GloVLMError):
    """No outline of a file is of a class that is taken: the slide shows no such object.

    Attributes:
        left_out: Ids by reason, as in `Outlines`.
    """

    def __init__(self, message: str, left_out: Mapping[str, list[str]]) -> None:
        super().__init__(message)
        self.left_out = dict(left_out)

    @property
    def note(self) -> str:
        """What was left out, for the results."""
        return f"No outline is to be counted. {_left_out_note(self.left_out, 0)}".rstrip()


def read_geojson(
    path: Path, *, label_property: str | None = None, origin: Origin = LEVEL0
) -> list[SlideObject]:
    """Read every outlined object of a GeoJSON file (or of one that `read_outlines` takes).

    A `FeatureCollection`, a list, a single feature or geometry, or a hierarchy as QuPath writes it,
    whose `childObjects` are objects of their own; packed by gzip or not; in UTF-8, UTF-16 or
    UTF-32. What has no area (points, lines, a missing or empty geometry) or cannot be read is left
    out, and the log says how much.

    Args:
        path: The file.
        label_property: The property that holds the class. By default
            `properties.classification.name`, as QuPath writes it, else `properties.label`.
        origin: Where the file counts from, unless it states that itself, as ours do.

    Returns:
        The objects in the file's order; at least one.

    Raises:
        GloVLMError: No such file, no GeoJSON, nothing in it that can be used, or an origin given by
            a person that is not the one which the file states.
    """
    reading = _read(Path(path), label_property, origin)
    if reading.left_out:
        logger.warning("%s: %s", path, _left_out_note(reading.left_out, len(reading.objects)))
    return reading.objects


def read_outlines(
    path: Path,
    *,
    label_property: str | None = None,
    origin: Origin = LEVEL0,
    classes: Sequence[str] = (),
    exclude: Sequence[str] = (),
    slide: Path | str | None = None,
    size: tuple[int, int] | None = None,
    mpp: float | None = None,
) -> Outlines:
    """Read the outlines of a file that are to be cut or counted.

    GeoJSON, COCO JSON (instances or a detector's results), or XML of Aperio ImageScope or ASAP, by
    what the file holds. All but GeoJSON count from the corner of level 0 unless a person says
    otherwise; outlines of COCO that were drawn on a smaller picture of the slide are scaled.

    Left out beside what `read_geojson` leaves out, and named in the notes: classes that QuPath
    reserves (their name ends in `*`: `Region*`, `Ignore*`), detections, cells, tiles and cores of a
    tissue array where annotations are there too, outlines that hold others (a tissue annotation),
    what is far larger than the others and has no class or that of such a one, what is locked
    without a class among outlines that have one, what lies outside the slide or is larger than
    it, and what is smaller than 4 pixels. Outlines without a class stay.

    Args:
        path: The file, packed by gzip or not.
        label_property: See `read_geojson`.
        origin: See `read_geojson`.
        classes: Names of classes that are taken, and no other; of a derived class ("Glomerulus:
            Sclerosed") its own name or that of what it is derived from ("Glomerulus"). Case and the
            kind of separator do not count.
        exclude: Names of classes that are left out.
        slide: The slide's file or name, which chooses the image in a COCO file of several.
        size: Width and height of the slide at level 0.
        mpp: Micrometres per pixel of level 0, where known: outlines of one class that are at most
            400 micrometres long are no tissue annotations, whatever is drawn in them.

    Raises:
        NoObject: All outlines are of classes that are not taken, or the file says that there are
            none: a COCO file that names the image, or a `FeatureCollection` of no features.
        GloVLMError: As `read_geojson`, or nothing is left for other reasons, among them a class
            asked for that nearly has the name of one in the file: says why, with counts.
    """
    path = Path(path)
    reading = _read(path, label_property, origin, slide, size)
    selection = _Selection(reading)
    notes = list(reading.notes)
    if mpp is not None and reading.mpp is not None and not 0.9 < reading.mpp / mpp < 1.1:
        notes.append(
            f"The file of outlines states {reading.mpp:g} micrometres per pixel and the slide has "
            f"{mpp:g}: on another scan of it the outlines would lie elsewhere."
        )
    if size is not None:
        selection.drop_outside(size)
    selection.drop_small()
    notes += selection.choose_classes(classes, exclude)
    selection.drop_types()
    inner = selection.drop_parents(mpp)
    kept, left_out = selection.kept, selection.left_out
    if not kept:
        message = f"{path}: no outline is left. {_left_out_note(left_out, 0)}"
        message += selection.hint(classes, size)
        if selection.is_by_class(classes):
            raise NoObject(message, left_out)
        raise GloVLMError(message)
    crossing = sum(item.crosses_itself for item in kept)
    if crossing:
        notes.append(
            f"{crossing} of {len(kept)} outlines cross themselves; what they fill by the even-odd "
            "rule is taken for their area."
        )
    counts = Counter(item.label for item in kept)
    if set(counts) != {None}:
        named = sorted((name, n) for name, n in counts.items() if name is not None)
        listed = [f"{n} {name}" for name, n in named]
        listed += [f"{counts[None]} without a class"] if counts[None] else []
        notes.append(f"Outlines taken: {', '.join(listed)}.")
    if inner:
        notes.append(
            f"{inner} of {len(kept)} outlines lie in another one and count beside it: if they are "
            "its parts, name the classes that are to be taken (--classes)."
        )
    twice = _nested(kept)
    if twice:
        notes.append(
            f"{len(twice)} outlines lie in a slightly larger one, as a tuft does in its capsule "
            f"({few(twice)}): where the two differ by less than half, the one that stands first in "
            "the file is taken, else both. Name the class that is meant (--classes)."
        )
    if left_out:
        notes.append(_left_out_note(left_out, len(kept)))
    return Outlines(kept, left_out, notes, reading.origin)


def write_geojson(
    path: Path,
    objects: Sequence[SlideObject],
    *,
    labels: Sequence[str | None] | None = None,
    measurements: Sequence[Mapping[str, float]] | None = None,
    colours: Mapping[str, Colour] | None = None,
    origin: Origin = LEVEL0,
) -> None:
    """Write objects as a `FeatureCollection` that QuPath opens, whole or not at all.

    Ids, geometries and all other properties are written as they came; geometries are moved only
    where they count from elsewhere than the file. The collection's member `origin`, which QuPath
    passes over, states where the file counts from. A class that replaces another leaves that one
    behind in `properties.metadata["given class"]`.

    Args:
        path: The file, ending in `.geojson`.
        objects: What to write.
        labels: For each object its new class; `None` leaves it as it is.
        measurements: For each object numbers by name, for example `{"p sclerosed": 0.93}`; added to
            those it has.
        colours: Red, green and blue, 0 to 255, by class; by default PALETTE, classes sorted.
        origin: Where the file counts from.

    Raises:
        GloVLMError: Lists of different lengths, or a number that is not finite.
    """
    collection = make_collection(
        objects, labels=labels, measurements=measurements, colours=colours, origin=origin
    )
    write_collection(path, collection)


def write_collection(path: Path, collection: Mapping[str, Any]) -> None:
    """Write a `FeatureCollection` of `make_collection`, with what was added to it."""
    # Escaped, as QuPath reads a file in the machine's own encoding: Windows-1252, for instance.
    write_text(path, json.dumps(collection))


def make_collection(
    objects: Sequence[SlideObject],
    *,
    labels: Sequence[str | None] | None = None,
    measurements: Sequence[Mapping[str, float]] | None = None,
    colours: Mapping[str, Colour] | None = None,
    origin: Origin = LEVEL0,
) -> dict[str, Any]:
    """The `FeatureCollection` of `write_geojson`, with the same arguments."""
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
        _feature(item, label, palette.get(label) if label else None, values, origin)
        for item, label, values in zip(objects, new_labels, numbers, strict=True)
    ]
    return {"type": "FeatureCollection", "origin": origin.describe(), "features": features}


def class_colours(objects: Sequence[SlideObject]) -> dict[str, Colour]:
    """Colours of classes, as the objects of a file bear them; the first of each class counts."""
    colours: dict[str, Colour] = {}
    for item in objects:
        classification = item.properties.get("classification")
        if item.label is None or item.label in colours or not isinstance(classification, dict):
            continue
        colour, packed = classification.get("color"), classification.get("colorRGB")
        if type(packed) is int:  # QuPath up to 0.3
            colour = [packed >> 16 & 255, packed >> 8 & 255, packed & 255]
        if not isinstance(colour, list) or len(colour) not in (3, 4):
            continue
        if all(type(value) is int and 0 <= value <= 255 for value in colour):
            colours[item.label] = (colour[0], colour[1], colour[2])
    return colours


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
    feature: dict[str, Any] = {"type": "Feature"}
    feature["geometry"] = {"type": "Polygon", "coordinates": [ring]}
    if label is not None:
        feature["properties"] = {"classification": {"name": label}}
    try:
        item = _object(feature, None, 0, LEVEL0)
    except Unusable as reason:
        raise GloVLMError(f"Expected an outline with an area, found one {reason}.") from None
    assert item is not None  # a geometry is there
    return item


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
    """Intersection over union of two objects' areas, 0 to 1; see `shapes.overlap_of`."""
    return overlap_of(one.polygons, one.bounds, other.polygons, other.bounds)


def find_repeats(objects: Sequence[SlideObject]) -> NDArray[np.int64]:
    """Duplicate outlines: for each object the place of the first that it repeats, else its own.

    One repeats an earlier one where the intersection is more than half of the union.

    Raises:
        GloVLMError: Too many lie on one another to compare them (see `shapes.meeting_pairs`).
    """
    first = np.arange(len(objects))
    if len(objects) < 2:
        return first
    places: dict[tuple[bytes, ...], int] = {}
    for i, item in enumerate(objects):  # the very same outline, at once
        first[i] = places.setdefault(_fingerprint(item), i)
    own = np.flatnonzero(first == np.arange(len(objects)))
    chosen = [objects[i] for i in own.tolist()]
    bounds = np.array([item.bounds for item in chosen])
    pairs = meeting_pairs(bounds)
    # More than half of the union, so more than half of the larger one, lies in what both boxes
    # share; some slack, as the overlap is measured on a raster.
    low = np.maximum(bounds[pairs[:, 0], :2], bounds[pairs[:, 1], :2])
    high = np.minimum(bounds[pairs[:, 0], 2:], bounds[pairs[:, 1], 2:])
    areas = np.array([item.area for item in chosen])
    larger = areas[pairs].max(axis=1) if len(pairs) else np.empty(0)
    pairs = own[pairs[(high - low).prod(axis=1) > 0.8 * SAME * larger]]
    pairs = np.sort(pairs, axis=1)
    for j, i in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if first[i] == i and first[j] == j and overlap(objects[j], objects[i]) > SAME:
            first[i] = j
    return first[first]


def _fingerprint(item: SlideObject) -> tuple[bytes, ...]:
    return tuple(ring.tobytes() for polygon in item.polygons for ring in polygon)


def _total(polygons: Sequence[Polygon], area: Any) -> float:
    return float(sum(area(outline) - sum(map(area, holes)) for outline, *holes in polygons))


# ----------------------------------------------------------------------------------- selection


class _Selection:
    """Outlines of a file that remain, rule by rule, and ids of the others by reason."""

    def __init__(self, reading: "_Reading") -> None:
        self.kept = list(reading.objects)
        self.left_out = {reason: list(ids) for reason, ids in reading.left_out.items()}
        self._labels = sorted({item.label for item in self.kept if item.label is not None})

    def drop(self, reasons: Mapping[int, str]) -> None:
        """Leave out objects by their place among those kept."""
        for i, reason in reasons.items():
            self.left_out.setdefault(reason, []).append(self.kept[i].id)
        self.kept = [item for i, item in enumerate(self.kept) if i not in reasons]

    def drop_outside(self, size: tuple[int, int]) -> None:
        """Leave out what lies beside the slide or is larger than it."""
        reasons = {}
        for i, item in enumerate(self.kept):
            x0, y0, x1, y1 = item.bounds
            if x1 <= 0 or y1 <= 0 or x0 >= size[0] or y0 >= size[1]:
                reasons[i] = f"outside the slide of {size[0]} x {size[1]} pixels"
            elif max(x1 - x0, y1 - y0) > 1.05 * max(size):
                reasons[i] = "larger than the slide"
        self.drop(reasons)

    def drop_small(self) -> None:
        """Leave out what no person can have outlined."""
        sides = [max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (item.bounds for item in self.kept)]
        reason = f"smaller than {FEWEST_PIXELS} pixels"
        self.drop({i: reason for i, side in enumerate(sides) if side < FEWEST_PIXELS})

    def choose_classes(self, classes: Sequence[str], exclude: Sequence[str]) -> list[str]:
        """Leave out reserved classes and those not asked for; returns notes on unknown names."""
        why = {label: _why_not(label, classes, exclude) for label in {i.label for i in self.kept}}
        reasons = {i: why[item.label] for i, item in enumerate(self.kept) if why[item.label]}
        self.drop(reasons)
        unknown = [
            name
            for name in (*classes, *exclude)
            if not any(_covers(name, label) for label in self._labels)
        ]
        return [
            f"No outline has the class '{name}'.{nearest(name, self._labels)}" for name in unknown
        ]

    def drop_types(self) -> None:
        """Leave out all but annotations where there are any."""
        kinds = [item.kind for item in self.kept]
        if "annotation" in kinds:
            reasons = {i: kind for i, kind in enumerate(kinds) if kind != "annotation"}
        else:
            cores = set(kinds) > {"tmaCore"}
            reasons = {i: kind for i, kind in enumerate(kinds) if kind == "tmaCore" and cores}
        self.drop({i: f"QuPath's type {kind}" for i, kind in reasons.items()})

    def drop_parents(self, mpp: float | None) -> int:
        """Leave out what holds other outlines, and what only such a one can be.

        Returns:
            How many of those kept lie in another one that is kept.
        """
        if len(self.kept) < 2:
            return 0
        items = self.kept
        labels = [item.label for item in items]
        areas = np.array([item.area for item in items])
        held = _contents(items, areas)
        single = [i for i in range(len(items)) if i not in held]
        typical = float(np.median(areas[single]))  # the smallest holds none
        plain: dict[str | None, list[float]] = defaultdict(list)
        for i in single:
            plain[labels[i]].append(areas[i])
        median = {label: float(np.median(values)) for label, values in plain.items()}
        holders = Counter(labels[i] for i in held)
        several: Counter[str | None] = Counter(filter(None, labels))
        named = any(label is not None for label in labels)
        reasons = {}
        for i, inside in held.items():
            x0, y0, x1, y1 = items[i].bounds
            is_small = mpp is not None and max(x1 - x0, y1 - y0) * mpp <= _GLOMERULUS
            if is_small and several[labels[i]] > 1 and not _is_locked(items[i]):
                continue
            label = labels[i]
            # A class that most bear without holding others is that of a glomerulus with parts.
            is_common = label is not None and len(plain[label]) >= holders[label]
            usual = typical if label is None else median.get(label, typical)
            apart = _is_locked(items[i]) or len(inside) > 1
            if areas[i] >= _HUGE * usual or (apart and not is_common) or (named and label is None):
                named_so = "" if label is None else f" (class {label})"
                reasons[i] = f"holds other outlines, as a tissue annotation does{named_so}"
        parents = {labels[i] for i in reasons}
        for i in single:
            if named and labels[i] is None and _is_locked(items[i]):
                reasons[i] = "locked and without a class"
            elif len(single) > 2 and areas[i] >= _HUGE * typical and labels[i] in (None, *parents):
                reasons[i] = f"{_HUGE:g} times as large as the others"
        self.drop(reasons)
        return len({j for i, inside in held.items() if i not in reasons for j in inside})

    def is_by_class(self, classes: Sequence[str]) -> bool:
        """Whether all were left out for their class, and no name that was asked for is a slip."""
        by_class = all(reason.startswith(_BY_CLASS) for reason in self.left_out)
        return by_class and not any(nearest(name, self._labels) for name in classes)

    def hint(self, classes: Sequence[str], size: tuple[int, int] | None) -> str:
        """What to do where nothing is left."""
        if size is not None and any(reason.startswith("outside") for reason in self.left_out):
            return " Are these the annotations of another slide, or do they count from elsewhere?"
        if not classes:
            return " Name the classes that are to be taken."
        listed = f"its classes are {few(self._labels)}" if self._labels else "it has no classes"
        close = "".join(dict.fromkeys(nearest(name, self._labels) for name in classes))
        return f" Asked for: {few(list(classes))}; {listed}.{close}"


def _nested(items: Sequence[SlideObject]) -> list[str]:
    """Ids of outlines that lie in another one, less than `_PARENT` times as large."""
    areas = np.array([item.area for item in items])
    held = _contents(items, areas, times=_TWICE, least=_NESTED)
    small = {j for i, places in held.items() for j in places if areas[i] < _PARENT * areas[j]}
    return [items[j].id for j in sorted(small)]


def _contents(
    items: Sequence[SlideObject],
    areas: NDArray[np.float64],
    *,
    times: float = _PARENT,
    least: float = 0.5,
) -> dict[int, list[int]]:
    """Places of the outlines that lie in each which holds any.

    Args:
        items: The outlines.
        areas: Their areas.
        times: Least area of the one that holds, over that of what it holds.
        least: Part of its points above which an outline lies in another one.
    """
    bounds = np.array([item.bounds for item in items])
    pairs = meeting_pairs(bounds)
    pairs = np.take_along_axis(pairs, np.argsort(areas[pairs], axis=1), axis=1)
    one, other = pairs.T  # the smaller, the larger
    middle = (bounds[one, :2] + bounds[one, 2:]) / 2
    within = (bounds[other, :2] < middle).all(axis=1) & (middle < bounds[other, 2:]).all(axis=1)
    inside: dict[int, list[int]] = defaultdict(list)
    for small, large in pairs[within & (areas[other] >= times * areas[one])].tolist():
        inside[large].append(small)
    held = {}
    for i, places in inside.items():
        shares = share_inside(
            [items[j].polygons for j in places], items[i].polygons, items[i].bounds
        )
        lying = [j for j, share in zip(places, shares, strict=True) if share > least]
        if lying:
            held[i] = lying
    return held


_BY_CLASS = ("class ", "without a class, where classes")  # as the reasons below begin


def _why_not(label: str | None, classes: Sequence[str], exclude: Sequence[str]) -> str:
    """Why outlines of a class are left out; empty where they are taken."""
    if label is None:
        return "without a class, where classes were asked for" if classes else ""
    if any(_covers(name, label) for name in exclude):
        return f"class {label}, which is excluded"
    if classes and not any(_covers(name, label) for name in classes):
        return f"class {label}, which was not asked for"
    return f"class {label}, which QuPath reserves" if not classes and label[-1] == "*" else ""


def _covers(name: str, label: str) -> bool:
    """Whether a class is the one named, or derived from it ("Glomerulus: Sclerosed")."""
    asked, parts = ([spelling(part) for part in text.split(":")] for text in (name, label))
    return parts[: len(asked)] == asked


def _is_locked(item: SlideObject) -> bool:
    return item.properties.get("isLocked") is True


def _left_out_note(left_out: Mapping[str, Sequence[str]], kept: int) -> str:
    """How many outlines were left out, and why."""
    n = sum(map(len, left_out.values()))
    reasons = ", ".join(f"{reason} ({len(ids)})" for reason, ids in left_out.items())
    return f"{n} of {kept + n} outlines were left out: {reasons}." if n else ""


# ----------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Reading:
    """Objects of a file, and what was skipped."""

    objects: list[SlideObject]
    left_out: dict[str, list[str]]
    notes: list[str]
    origin: Origin
    mpp: float | None = None  # as the file states it


def _read(
    path: Path,
    label_property: str | None,
    origin: Origin,
    slide: Path | str | None = None,
    size: tuple[int, int] | None = None,
) -> _Reading:
    features = read_features(path, slide=slide, size=size)
    if features.from_corner and origin.source != "given":
        origin = LEVEL0
    notes: list[str] = []
    origin = _choose_origin(features.origin, origin, path, notes)
    left_out: dict[str, list[str]] = {}
    objects: list[SlideObject] = []
    by_id: dict[str, SlideObject] = {}
    renamed = 0
    for number, feature in enumerate(features.listed, start=1):
        if isinstance(feature, LeftOut):
            left_out.setdefault(feature.reason, []).append(_clean(feature.name))
            continue
        try:
            item = _object(feature, label_property, number, origin)
        except Unusable as reason:
            left_out.setdefault(str(reason), []).append(_name_of(feature, number))
            continue
        if item is None:
            continue
        twin = by_id.get(item.id)
        if twin is not None and _fingerprint(twin) == _fingerprint(item):
            left_out.setdefault("the same id and outline again", []).append(item.id)
            continue
        if twin is not None:
            renamed += 1
            item = replace(item, id=make_id(number, item.geometry), members=_other(item.members))
        by_id[item.id] = item
        objects.append(item)
    if not objects and not left_out and features.may_be_empty:
        raise NoObject(f"{path} holds no outlined object, and says so.", {})
    if not objects:
        raise GloVLMError(
            f"{path} holds no outlined object that can be used; expected polygons ({FORMATS}). "
            f"{_left_out_note(left_out, 0)}".rstrip()
        )
    if renamed:
        notes.append(f"{renamed} outlines bear the id of another one and were given ids of ours.")
    return _Reading(objects, left_out, [*notes, *features.notes], origin, features.mpp)


def _choose_origin(stated: Any, given: Origin, path: Path, notes: list[str]) -> Origin:
    """Origin of a file: the one that it states, else the given one; notes say where it differs."""
    origin = given
    if isinstance(stated, dict) and stated.get("source") in get_args(Source):
        x, y = (_coordinate(stated.get(name)) for name in ("x", "y"))
        if not (abs(x) <= FARTHEST and abs(y) <= FARTHEST):
            raise GloVLMError(
                f"{path} states an origin that is no place (x {stated.get('x')!r}, y "
                f"{stated.get('y')!r}); correct it, or remove its member 'origin'."
            )
        origin = Origin(x, y, "file")
    differs = (origin.x, origin.y) != (given.x, given.y)
    if differs and given.source == "given":
        raise GloVLMError(
            f"{path} states that it counts from ({origin.x:g}, {origin.y:g}) of level 0, and the "
            f"origin ({given.x:g}, {given.y:g}) was given: leave that out, or correct the file."
        )
    if (origin.x, origin.y) != (0, 0) or differs:
        who = {
            "file": "as the file states",
            "bounds": "the corner of the scanned part, as QuPath counts",
            "given": "as given",
        }
        notes.append(
            f"The outlines count from ({origin.x:g}, {origin.y:g}) of level 0, "
            f"{who.get(origin.source, 'its corner')}."
        )
    return origin


def _object(
    feature: Any, label_property: str | None, number: int, origin: Origin
) -> SlideObject | None:
    """One object; `None` for the root of a hierarchy, which is no object of the slide.

    Raises:
        Unusable: It cannot be read, or has no area.
    """
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        raise Unusable(f"no GeoJSON feature but {describe_kind(feature)}")
    given = feature.get("id")
    kind = _TYPES.get(given) if isinstance(given, str) else None
    geometry, properties = feature.get("geometry"), feature.get("properties")
    if properties is None:
        properties = {}
    if not isinstance(properties, dict):
        raise Unusable("properties that are no keys and values")
    if geometry is None and "root" in (kind, properties.get("objectType")):
        return None
    polygons = read_polygons(geometry, origin)
    properties = {name: value for name, value in properties.items() if name not in CHILDREN}
    own = ("type", "geometry", "properties", *CHILDREN)
    members = {name: value for name, value in feature.items() if name not in own}
    if kind is not None:
        properties = {"objectType": kind, **properties}
    if kind is not None or not _is_id(given):
        given, members = make_id(number, geometry), _other(members)
    item = SlideObject(
        id=_clean(str(given)),
        geometry=dict(geometry or {}),
        polygons=polygons,
        label=_label(properties, label_property),
        properties=properties,
        members=members,
        origin=origin,
    )
    x0, y0, x1, y1 = item.bounds
    if not item.area > 1e-12 * (x1 - x0) * (y1 - y0):
        raise Unusable("without an area")
    return item


def _label(properties: Mapping[str, Any], label_property: str | None) -> str | None:
    """The class of an object; text that is empty is none."""
    if label_property is not None:
        value = properties.get(label_property)
    else:
        value = properties.get("classification", properties.get("label"))
    if isinstance(value, dict):  # QuPath: {"name", "color"}, or {"names"} for "Tumour: Positive"
        names = value.get("names")
        value = value.get("name", ": ".join(map(str, names)) if isinstance(names, list) else None)
    if value is None and label_property is None:
        value = properties.get("label")
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise Unusable("a class that is no name")
    text = "" if value is None else _clean(str(value)).strip()
    return text or None


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _coordinate(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= FARTHEST else math.nan


def _other(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name != "id"}


def _name_of(feature: Any, number: int) -> str:
    given = feature.get("id") if isinstance(feature, dict) else None
    legacy = isinstance(given, str) and given in _TYPES
    properties = feature.get("properties") if isinstance(feature, dict) else None
    metadata = properties.get("metadata") if isinstance(properties, dict) else None
    if isinstance(metadata, dict) and isinstance(metadata.get(FILE_ID), str):
        return _clean(metadata[FILE_ID])
    return _clean(str(given)) if _is_id(given) and not legacy else f"feature {number}"


def _clean(text: str) -> str:
    """Text that can be written: half a pair of surrogates becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ----------------------------------------------------------------------------------- writing


def _feature(
    item: SlideObject,
    label: str | None,
    colour: Colour | None,
    numbers: Mapping[str, float],
    origin: Origin,
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
        properties["measurements"] = by_name(properties.get("measurements")) | new
    members: dict[str, Any] = {"id": item.id, **item.members}
    geometry = item.geometry
    by = item.origin.x - origin.x, item.origin.y - origin.y
    if by != (0, 0):
        geometry = move_geometry(geometry, by)
        members |= {k: move_geometry(v, by) for k, v in members.items() if k.endswith("Geometry")}
    return {"type": "Feature", **members, "geometry": geometry, "properties": properties}


def by_name(raw: Any) -> dict[str, Any]:
    """Measurements or metadata by name; QuPath before 0.4 wrote lists of `{"name", "value"}`."""
    if isinstance(raw, list):
        named = [m for m in raw if isinstance(m, dict) and {"name", "value"} <= {*m}]
        return {m["name"]: m["value"] for m in named if isinstance(m["name"], str)}
    return dict(raw) if isinstance(raw, dict) else {}
