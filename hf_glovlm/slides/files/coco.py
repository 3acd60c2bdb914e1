"""COCO: the objects of an image in a file of instances, or of a detector's results, as features.

Lin et al. 2014 (arXiv:1405.0312). Polygons, run-length masks and boxes are read; a class is the
name of a category, a `score` stays a measurement.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.listing import few, short
from ...errors import GloVLMError
from .geojson import LeftOut, Unusable, describe_kind, make_feature
from .run_lengths import trace_mask

_NEAR = 1.0  # pixels that a side of a downsampled picture may be off by, as it is rounded


@dataclass(frozen=True)
class Coco:
    """Annotations of images.

    Attributes:
        path: The file.
        images: By their place in `names`.
        names: `file_name` of every image; of results without images, the ids.
        annotations: By the id of their image.
        categories: Names by id.
        without_image: How many annotations are of no image of the file.
        is_results: Whether it lists a detector's results, without images.
    """

    path: Path
    images: list[Mapping[str, Any]]
    names: list[str]
    annotations: Mapping[Any, list[Any]]
    categories: Mapping[Any, str] = field(default_factory=dict)
    without_image: int = 0
    is_results: bool = False

    def features(
        self, place: int, size: tuple[int, int] | None, notes: list[str]
    ) -> Iterator[dict[str, Any] | LeftOut]:
        """Features of one image, in pixels of the slide.

        Args:
            place: Of the image in `names`.
            size: Width and height of the slide at level 0, where known.
            notes: Sentences for the results are added here, once all features are read.

        Raises:
            GloVLMError: The image has another shape than the slide, or no size that can be read.
        """
        image = self.images[place]
        scale = _scale_of(image, size, self.path, notes)
        boxes = 0
        for number, one in enumerate(self.annotations.get(_id_of(image), ()), start=1):
            name = f"annotation {_id_of(one) if _id_of(one) is not None else number}"
            try:
                geometry, is_box = _geometry_of(one, image)
                feature = make_feature(
                    geometry, name, label=self._label_of(one), score=_score_of(one)
                )
            except Unusable as reason:
                yield LeftOut(name, str(reason))
                continue
            boxes += is_box
            yield feature | {"geometry": _scaled(geometry, scale)}
        if boxes:
            notes.append(f"{boxes} objects are boxes alone, without an outline.")
        if self.without_image:
            notes.append(f"{self.without_image} annotations are of no image of the file.")

    def _label_of(self, annotation: Mapping[str, Any]) -> str | None:
        """Class of an object; that of a number without a name is `category 3`."""
        number = _key(annotation.get("category_id"))
        if number is None:
            return None
        return self.categories.get(number, f"category {number}")


def is_coco(raw: Any) -> bool:
    """Whether JSON is that of COCO: instances, or a list of results."""
    if isinstance(raw, dict):
        return isinstance(raw.get("annotations"), list) and "features" not in raw
    first = raw[0] if isinstance(raw, list) and raw else None
    return isinstance(first, dict) and "image_id" in first and "type" not in first


def parse_coco(raw: Any, path: Path) -> Coco:
    """Sort what `is_coco` by image.

    Raises:
        GloVLMError: Images without a name or an id, or two of one id.
    """
    annotations = raw if isinstance(raw, list) else raw["annotations"]
    given = [] if isinstance(raw, list) else raw.get("images") or []
    if not isinstance(given, list):
        raise GloVLMError(f"{path}: expected a list in 'images', found {describe_kind(given)}.")
    by_image: dict[Any, list[Any]] = defaultdict(list)
    for one in annotations:
        by_image[_key(one.get("image_id")) if isinstance(one, dict) else None].append(one)
    unnamed = len(by_image.pop(None, ()))
    is_results = not given  # which go beside the file of the images
    if is_results:
        given = [{"id": number, "file_name": str(number)} for number in by_image]
    for number, image in enumerate(given, start=1):
        named = isinstance(image, dict) and isinstance(image.get("file_name"), str)
        if not named or _id_of(image) is None:
            raise GloVLMError(
                f"{path}: expected 'id' and 'file_name' of every image; the image in place "
                f"{number} lacks them: add them."
            )
    twice = [str(number) for number, n in Counter(map(_id_of, given)).items() if n > 1]
    if twice:
        raise GloVLMError(f"{path} holds several images of one id ({few(twice)}): number them.")
    own = {_id_of(image) for image in given}
    lost = sum(len(some) for number, some in by_image.items() if number not in own)
    categories = _categories(raw.get("categories") if isinstance(raw, dict) else None, path)
    names = [_printable(image["file_name"]) for image in given]
    return Coco(path, given, names, by_image, categories, lost + unnamed, is_results)


def _categories(given: Any, path: Path) -> dict[Any, str]:
    """Names of categories by id."""
    categories: dict[Any, str] = {}
    for one in given if isinstance(given, list) else ():
        name = one.get("name") if isinstance(one, dict) else None
        if _id_of(one) is None or not isinstance(name, str) or not name.strip():
            raise GloVLMError(
                f"{path}: expected 'id' and 'name' of every category, found {short(repr(one))}."
            )
        if categories.setdefault(_id_of(one), name.strip()) != name.strip():
            raise GloVLMError(f"{path} names the category {_id_of(one)} twice: number them.")
    return categories


def _key(value: Any) -> int | str | None:
    """An id as it is compared; `None` for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return _printable(value) or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _printable(text: str) -> str:
    """Text that can be written: half a pair of surrogates becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _id_of(value: Any) -> int | str | None:
    return _key(value.get("id")) if isinstance(value, dict) else None


# --------------------------------------------------------------------------------- geometries


def _geometry_of(annotation: Any, image: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """GeoJSON geometry of an object in pixels of its image, and whether it is a box alone."""
    if not isinstance(annotation, dict):
        raise Unusable(f"no annotation but {describe_kind(annotation)}")
    if annotation.get("iscrowd") not in (None, 0):
        raise Unusable("a crowd of objects (iscrowd)")
    segmentation = annotation.get("segmentation")
    if not segmentation:
        box = annotation.get("bbox")
        if box is None:
            raise Unusable("without a geometry")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise Unusable("a box that is no [x, y, width, height]")
        x, y, width, height = box
        corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        return {"type": "Polygon", "coordinates": [corners]}, True
    if isinstance(segmentation, dict):
        stated = [image.get("height"), image.get("width")]
        if None not in stated and segmentation.get("size") != stated:
            raise Unusable("a mask of another size than its image")
        polygons: list[Any] = list(trace_mask(segmentation))
    else:
        polygons = [[_ring(part)] for part in _parts(segmentation)]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}, False
    return {"type": "MultiPolygon", "coordinates": polygons}, False


def _parts(segmentation: Any) -> Sequence[Any]:
    if not isinstance(segmentation, list):
        raise Unusable("a segmentation that is neither polygons nor a mask")
    return segmentation


def _ring(flat: Any) -> list[list[float]]:
    """Closed ring of `[x, y, x, y, ...]`."""
    good = isinstance(flat, list) and len(flat) >= 6 and len(flat) % 2 == 0
    if not good or not all(map(_is_finite, flat)):
        raise Unusable("a polygon that is no list x, y, x, y, ... of three points or more")
    ring = [[flat[i], flat[i + 1]] for i in range(0, len(flat), 2)]
    return ring if ring[0] == ring[-1] else [*ring, ring[0]]


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 2**53 and math.isfinite(value)


def _score_of(annotation: Mapping[str, Any]) -> float | None:
    score: Any = annotation.get("score")
    return float(score) if _is_finite(score) else None


# -------------------------------------------------------------------------------------- scale


def _scale_of(
    image: Mapping[str, Any], size: tuple[int, int] | None, path: Path, notes: list[str]
) -> tuple[float, float]:
    """Pixels of the slide per pixel of the image, across and down.

    A picture of the slide at a lower magnification has its shape but for the rounding of its sides.
    """
    sides: list[Any] = [image.get("width"), image.get("height")]
    if None in sides:
        if size is not None:
            notes.append(
                "The file states no size of its image, so its coordinates are taken for pixels of "
                "level 0."
            )
        return 1.0, 1.0
    if not all(_is_finite(side) and side > 0 for side in sides):
        raise GloVLMError(
            f"{path}: expected a width and height of the image in pixels, found "
            f"{short(repr(sides))}; correct or remove them."
        )
    width, height = sides
    if size is None or (width, height) == tuple(size):
        return 1.0, 1.0
    across, down = size[0] / width, size[1] / height
    slack = _NEAR / width + _NEAR / height
    if abs(across / down - 1) > slack:
        raise GloVLMError(
            f"{path} was made on an image of {width} x {height} pixels and the slide has {size[0]} "
            f"x {size[1]}: that is another shape, so the outlines are not of this picture. Give "
            "outlines that count in pixels of the whole slide."
        )
    notes.append(
        f"The outlines were drawn on a picture of {width} x {height} pixels and are scaled "
        f"by {across:.4g} to the slide of {size[0]} x {size[1]}."
    )
    return across, down


def _scaled(geometry: Mapping[str, Any], scale: tuple[float, float]) -> dict[str, Any]:
    if scale == (1.0, 1.0):
        return dict(geometry)

    def move(ring: Any) -> Any:
        return [[x * scale[0], y * scale[1]] for x, y in ring]

    inside = geometry["coordinates"]
    if geometry["type"] == "Polygon":
        return {"type": "Polygon", "coordinates": [*map(move, inside)]}
    parts = [[*map(move, rings)] for rings in inside]
    return {"type": "MultiPolygon", "coordinates": parts}
