"""Agreement of a finder with outlines: which glomeruli it found, at an intersection over union.

A detection and an outlined glomerulus match where their intersection over union (IoU) reaches a
bound, one to one, the pair with the largest IoU first (as in Hosang et al., arXiv 1502.05082, and
the COCO evaluation, but without its order by score: every detection counts here alike).

A glomerulus cut by the picture's border counts like any other, in precision and in recall, and is
also counted apart: what a border leaves of it is smaller, and a slide cut into windows has none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from ..files.shapes import Polygon
from .regions import Detection, Region

IOU = 0.5
NEAR_BORDER = 2.0  # pixels: an outline that comes this near to the border is cut by it
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Share:
    """Share found: of some outlined glomeruli, how many were found."""

    hits: int = 0
    of: int = 0

    @property
    def recall(self) -> float | None:
        """Share in 0 ... 1; `None` where there are none."""
        return self.hits / self.of if self.of else None

    def __add__(self, other: "Share") -> "Share":
        return Share(self.hits + other.hits, self.of + other.of)


@dataclass(frozen=True)
class Agreement:
    """Agreement of detections with outlines over any number of pictures.

    Attributes:
        true_positives: Detections that match an outlined glomerulus: also the glomeruli found.
        false_positives: Detections that match none.
        misses: Outlined glomeruli that no detection matches.
        by_class: Of each class (`unlabelled` where an outline has none), how many were found.
        cut: The same of those that a picture's border cuts.
        whole: The same of all others.
    """

    true_positives: int = 0
    false_positives: int = 0
    misses: int = 0
    by_class: Mapping[str, Share] = field(default_factory=dict)
    cut: Share = Share()
    whole: Share = Share()

    @property
    def precision(self) -> float | None:
        """Detections that match over all; `None` where nothing was detected."""
        detected = self.true_positives + self.false_positives
        return self.true_positives / detected if detected else None

    @property
    def recall(self) -> float | None:
        """Glomeruli found over all; `None` where none is outlined."""
        outlined = self.true_positives + self.misses
        return self.true_positives / outlined if outlined else None

    @property
    def f1(self) -> float | None:
        """F1, `2 TP / (2 TP + FP + FN)`; `None` where nothing is outlined and nothing detected."""
        total = 2 * self.true_positives + self.false_positives + self.misses
        return 2 * self.true_positives / total if total else None

    def __add__(self, other: "Agreement") -> "Agreement":
        names = dict.fromkeys([*self.by_class, *other.by_class])
        return Agreement(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.misses + other.misses,
            {
                name: self.by_class.get(name, Share()) + other.by_class.get(name, Share())
                for name in sorted(names)
            },
            self.cut + other.cut,
            self.whole + other.whole,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values: counts, precision, recall and F1, and recall by class, cut ones apart."""

        def plain(share: Share) -> dict[str, int]:
            return {"found": share.hits, "of": share.of}

        return {
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "misses": self.misses,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "by_class": {name: plain(share) for name, share in self.by_class.items()},
            "cut": plain(self.cut),
            "whole": plain(self.whole),
        }


def match_detections(
    detections: Sequence[Detection], polygons: Sequence[tuple[Polygon, ...]], *, iou: float = IOU
) -> NDArray[np.int64]:
    """Match detections with outlined glomeruli one to one, the largest IoU first.

    Args:
        detections: Of one picture.
        polygons: Of each outlined glomerulus its polygons, in pixels of the same picture.
        iou: Least intersection over union of a match, above 0 and up to 1.

    Returns:
        `[detections]`: the number of the glomerulus that each matches, -1 for none.
    """
    matched = np.full(len(detections), -1, np.int64)
    if not len(detections) or not len(polygons):
        return matched
    detected = np.array([_valid(shapely.Polygon(one.ring)) for one in detections])
    outlined = np.array([to_shape(one) for one in polygons])
    first, second = shapely.STRtree(outlined).query(detected)
    shared = shapely.area(shapely.intersection(detected[first], outlined[second]))
    union = shapely.area(detected)[first] + shapely.area(outlined)[second] - shared
    ratio = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    taken: set[int] = set()
    # Equal ones in the order of the detections, then of the glomeruli.
    for pair in np.lexsort((second, first, -ratio)):
        if ratio[pair] < iou:
            break
        if matched[first[pair]] < 0 and int(second[pair]) not in taken:
            matched[first[pair]] = second[pair]
            taken.add(int(second[pair]))
    return matched


def measure_region(
    detections: Sequence[Detection], region: Region, *, iou: float = IOU
) -> Agreement:
    """Agreement of what was detected in a region with its outlines.

    Args:
        detections: In its picture.
        region: With every glomerulus outlined.
        iou: Least intersection over union of a match.
    """
    matched = match_detections(detections, region.polygons, iou=iou)
    hits = set(matched[matched >= 0].tolist())
    labels = [*region.labels, *([None] * (len(region.polygons) - len(region.labels)))]
    by_class: dict[str, Share] = {}
    parts = {True: Share(), False: Share()}
    height, width = region.picture.shape[:2]
    for number, (polygons, label) in enumerate(zip(region.polygons, labels, strict=True)):
        one = Share(int(number in hits), 1)
        name = label or UNLABELLED
        by_class[name] = by_class.get(name, Share()) + one
        cut = any(is_cut(polygon[0], (width, height)) for polygon in polygons)
        parts[cut] = parts[cut] + one
    return Agreement(
        len(hits),
        len(detections) - len(hits),
        len(region.polygons) - len(hits),
        dict(sorted(by_class.items())),
        cut=parts[True],
        whole=parts[False],
    )


def add_up(agreements: Iterable[Agreement]) -> Agreement:
    """Agreement over several pictures: counts are added, then divided."""
    return sum(agreements, Agreement())


def is_cut(ring: NDArray[np.float64], size: tuple[int, int], near: float = NEAR_BORDER) -> bool:
    """Whether the border of a picture cuts an outline.

    Args:
        ring: `[points, 2]` in pixels (x, y).
        size: Width and height of the picture.
        near: How near to the border a point counts as on it, in pixels.
    """
    ring = np.asarray(ring, np.float64)
    return bool((ring <= near).any() or (ring >= np.asarray(size, np.float64) - 1 - near).any())


def to_shape(polygons: Sequence[Polygon]) -> Any:
    """Valid shapely geometry of an outlined glomerulus: its polygons with their holes, united."""
    parts = [_valid(shapely.Polygon(outline, holes)) for outline, *holes in polygons]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _valid(shape: Any) -> Any:
    return shape if shape.is_valid else shapely.make_valid(shape)
