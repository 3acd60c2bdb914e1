"""Glomeruli that a finder finds on slides it has not seen, in place of those outlined by hand.

Slides are dealt into folds; in each of a few draws a finder learns from a few regions of the other
folds and is run on every region of this one. What it finds is kept, as it takes minutes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..files import digest_value, read_json, write_json
from ..slides.files.shapes import Polygon, draw
from ..slides.finder.agreement import (
    Agreement,
    add_up,
    match_detections,
    measure_region,
    to_shape,
)
from ..slides.finder.learning import Finder, choose_threshold, leave_groups_out
from ..slides.finder.regions import Detection
from ..slides.finder.tokens import TokenEncoder
from .outlined_crops import Glomerulus
from .outlined_regions import StudyRegion

Ints = NDArray[np.int64]

COUNTS = ("true_positives", "false_positives", "misses")  # of an `Agreement`


@dataclass(frozen=True, eq=False)
class DetectedObject:
    """What a finder found, and the outline that it matches.

    Attributes:
        region: Number of the region.
        detection: In pixels of its picture.
        outline: Number of the region's outline, -1 where it matches none.
        iou: Intersection over union with it, 0 without.
    """

    region: int
    detection: Detection
    outline: int
    iou: float


@dataclass(frozen=True)
class DetectedDraw:
    """What the finders of one draw found, each on the slides of its fold.

    Attributes:
        objects: On all regions.
        agreement: With all outlines.
        recall: By slide, of each class how many were found and of how many, among the regions that
            its finder learned from, measured with their slides left out.
        learned_from: Names of the regions, by fold.
        thresholds: By fold.
    """

    objects: list[DetectedObject]
    agreement: Agreement
    recall: dict[str, dict[str, tuple[int, int]]]
    learned_from: list[list[str]]
    thresholds: list[float]


def deal_groups(groups: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """Groups in folds: shuffled, then dealt in turn.

    Args:
        groups: Group of each region.
        folds: How many.
        seed: Of the order.
    """
    names = np.array(sorted(set(groups)), object)
    np.random.default_rng(seed).shuffle(names)
    return [names[fold::folds].tolist() for fold in range(folds)]


def draw_regions(groups: Sequence[str], left_out: Sequence[str], count: int, seed: Any) -> Ints:
    """Regions to learn from: one of each group in turn, groups and their regions shuffled.

    Args:
        groups: Group of each region.
        left_out: Groups that give none.
        count: How many.
        seed: Of the order.

    Raises:
        GloVLMError: There are not so many.
    """
    rng = np.random.default_rng(seed)
    names = np.array(sorted(set(groups) - set(left_out)), object)
    rng.shuffle(names)
    ids = np.array(groups, object)
    queues = [rng.permutation(np.flatnonzero(ids == name)) for name in names]
    most = max((len(queue) for queue in queues), default=0)
    order = [int(queue[turn]) for turn in range(most) for queue in queues if turn < len(queue)]
    if len(order) < count:
        raise GloVLMError(f"Expected {count} regions to learn from, found {len(order)}.")
    return np.array(sorted(order[:count]), np.int64)


def detect_in_folds(
    regions: Sequence[StudyRegion],
    about: Mapping[str, Any],
    number: int,
    encoder: TokenEncoder,
    folder: Path,
) -> DetectedDraw:
    """Find the glomeruli of every region with a finder that has not seen its slide.

    Args:
        regions: All regions, outlined.
        about: `head`, `folds`, `regions` (to learn from), `seed`.
        number: Of the draw.
        encoder: Of the tower.
        folder: Where what was found is kept, and read again under the same plan.
    """
    digest = digest_value([dict(about), number, [item.region.name for item in regions]])
    path = folder / f"draw-{number}.json"
    if not path.is_file() or read_json(path)["plan"] != digest:
        write_json(path, {"plan": digest, "folds": _find(regions, about, number, encoder)})
    folds = read_json(path)["folds"]
    detected: dict[str, list[Detection]] = {}
    recall: dict[str, dict[str, tuple[int, int]]] = {}
    thresholds = []
    for fold in folds:
        tried = {
            threshold: Agreement(*(row[name] for name in COUNTS))
            for threshold, row in zip(fold["tried"], fold["left_out"], strict=True)
        }
        thresholds.append(choose_threshold(tried))
        at = fold["tried"].index(thresholds[-1])
        shares = fold["left_out"][at]["by_class"]
        own = {name: (share["found"], share["of"]) for name, share in shares.items()}
        recall |= dict.fromkeys(fold["slides"], own)
        for name, by_threshold in fold["detected"].items():
            detected[name] = [
                Detection(np.array(one["ring"], np.float64), one["score"], one["cut"])
                for one in by_threshold[at]
            ]
    objects: list[DetectedObject] = []
    agreements = []
    for place, item in enumerate(regions):
        detections = detected[item.region.name]
        agreements.append(measure_region(detections, item.region))
        matched = match_detections(detections, item.region.polygons).tolist()
        objects += [
            DetectedObject(place, one, own, _iou(one, item, own))
            for one, own in zip(detections, matched, strict=True)
        ]
    learned_from = [fold["learned_from"] for fold in folds]
    return DetectedDraw(objects, add_up(agreements), recall, learned_from, thresholds)


def _find(
    regions: Sequence[StudyRegion], about: Mapping[str, Any], number: int, encoder: TokenEncoder
) -> list[dict[str, Any]]:
    """Fit the finder of each fold and run it, at every threshold that its head tries."""
    groups = [item.region.group for item in regions]
    tower = encoder.model, encoder.processor
    seed = about["seed"] + number
    folds = []
    for fold, slides in enumerate(deal_groups(groups, about["folds"], about["seed"])):
        rows = draw_regions(groups, slides, about["regions"], [about["seed"], number, fold])
        learned = [regions[row].region for row in rows]
        given: dict[str, Any] = {"head": about["head"], "seed": seed, "group": "slide"}
        left = leave_groups_out(*tower, learned, encoder=encoder, **given)
        finder = Finder.fit(*tower, learned, encoder=encoder, leave_out=False, **given)
        tried = sorted(left.tried)
        detected = {}
        for region in (item.region for item in regions if item.region.group in slides):
            scores = finder.score(region.picture)
            detected[region.name] = [
                [
                    {"ring": one.ring.round(2).tolist(), "score": one.score, "cut": one.cut}
                    for one in finder.outline(scores, threshold)
                ]
                for threshold in tried
            ]
        folds.append(
            {
                "slides": slides,
                "learned_from": [region.name for region in learned],
                "tried": tried,
                "left_out": [left.tried[threshold].describe() for threshold in tried],
                "detected": detected,
            }
        )
    return folds


def _iou(detection: Detection, item: StudyRegion, outline: int) -> float:
    if outline < 0:
        return 0.0
    one, other = shapely.make_valid(shapely.Polygon(detection.ring)), _outline(item, outline)
    return float(one.intersection(other).area / one.union(other).area)


def _outline(item: StudyRegion, number: int) -> Any:
    return to_shape(item.region.polygons[number])


# --------------------------------------------------------------------------------------- as drawn


def as_glomerulus(
    polygons: Sequence[Polygon], *, name: str, label: str, group: str, stain: str, picture: Path
) -> Glomerulus:
    """Outlined glomerulus of polygons in a picture, to be drawn like those of a table."""
    points = np.concatenate([outline for outline, *_ in polygons])
    (x0, y0), (x1, y1) = np.floor(points.min(0)), np.ceil(points.max(0))
    size = max(int(x1 - x0), 1), max(int(y1 - y0), 1)
    inside = draw(polygons, float(x0), float(y0), 1.0, size)
    return Glomerulus(name, label, group, stain, picture, (int(x0), int(y0)), inside)


def link_outlines(glomeruli: Sequence[Glomerulus], regions: Sequence[StudyRegion]) -> list[Ints]:
    """Row of the table that each outline of each region is, -1 where it has none.

    Args:
        glomeruli: Rows of the table, cut from the same pictures.
        regions: The outlined regions.

    Returns:
        Of each region `[outlines]`. The boxes of a row and of its outline overlap by half or more.
    """
    by_picture: dict[str, list[int]] = {}
    for row, item in enumerate(glomeruli):
        by_picture.setdefault(item.picture.stem, []).append(row)
    links = []
    for region in (item.region for item in regions):
        rows = by_picture.get(region.name, [])
        boxes = [_box(glomeruli[row]) for row in rows]
        own = np.full(len(region.polygons), -1, np.int64)
        for number, polygons in enumerate(region.polygons):
            box = shapely.box(*to_shape(polygons).bounds)
            shares = [box.intersection(b).area / box.union(b).area for b in boxes]
            best = int(np.argmax(shares)) if shares else -1
            if best >= 0 and shares[best] >= 0.5:
                own[number] = rows[best]
        links.append(own)
    return links


def _box(item: Glomerulus) -> Any:
    (left, top), (height, width) = item.corner, item.inside.shape
    return shapely.box(left, top, left + width, top + height)
