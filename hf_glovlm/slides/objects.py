"""Object classification: outlined glomeruli of a slide, cropped as for training, classified."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ..calibration import ConformalThresholds, conformal_sets
from ..errors import GloVLMError
from ..files import write_table
from ..inference import predict
from ..inference.scale import ImageScale, compare_scale
from ..inference.sentences import calibration_columns
from ..progress import counting
from .files.annotations import Colour, SlideObject, class_colours, find_repeats, write_geojson
from .files.coordinates import LEVEL0, Origin
from .files.crop_image import (
    crop_downsample,
    crop_square,
    describe_specks,
    is_speck,
    read_crop,
    write_crop,
)
from .files.shapes import fill

if TYPE_CHECKING:
    from datasets import Dataset

    from ..inference import Predictions
    from ..inference.engines import Engine
    from ..model import GloVLMForImageClassification, GloVLMProcessor
    from .files.wsi import Slide

_LARGEST = 1.05  # an object's longer side over the slide's
GLOMERULUS = "glomerulus\t"  # before an id that sections share, as no slide is called so
COUNTED, DOUBT = "counted", "doubt"  # names of these measurements in GeoJSON


@dataclass(frozen=True)
class ClassifiedObjects:
    """Predictions for the outlined objects of a slide, each counted once.

    Attributes:
        objects: The outlines `n`, in the file's order.
        boxes: Int64 `[n, 3]`: x, y and side of each crop in pixels of level 0.
        probabilities: Float64 `[n, K]`; a duplicate has those of the object it repeats.
        class_names: `[K]`.
        counted: Bool `[n]`: false for an object that repeats an earlier one.
        repeats: For each object the id of the one it repeats, else `None`.
        glomeruli: For each object the `glomerulus_id` that its file gives it, else `None`; what is
            the same glomerulus on several sections shares it.
        limits: What `glovlm predict` states of a model's limits, a column of `n` by name: `set`,
            `set_size`, `answers`, `unlike_support`, `support_distance`, where the model has them.
        mpp: Median micrometres per input pixel, or `unknown`.
        notes: Sentences for the results.
    """

    objects: Sequence[SlideObject]
    boxes: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: Sequence[str]
    counted: NDArray[np.bool_]
    repeats: Sequence[str | None]
    glomeruli: Sequence[str | None]
    limits: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    mpp: float | Literal["unknown"] = "unknown"
    notes: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def none(cls, class_names: Sequence[str]) -> "ClassifiedObjects":
        """Those of a slide on which no object is to be counted."""
        empty = np.empty((0, len(class_names)))
        return cls([], np.empty((0, 3), np.int64), empty, class_names, np.empty(0, bool), [], [])

    @property
    def labels(self) -> list[str]:
        """The most probable class of each object."""
        return [self.class_names[k] for k in self.probabilities.argmax(axis=1)]

    @property
    def doubts(self) -> NDArray[np.float64]:
        """Doubt `[n]`: what is left for all other classes, 1 minus the largest probability."""
        largest = self.probabilities.max(axis=1, initial=0.0)
        return np.asarray(np.where(largest > 0, 1 - largest, 1.0), np.float64)

    def save(self, path: Path) -> None:
        """Write a parquet file, one row an object.

        `id`, `glomerulus`, `x`, `y`, `side` (the crop, at level 0), `counted`, `repeats`, `doubt`,
        the columns of `limits`, `label` and `p_<class>` for every class.
        """
        columns: dict[str, Any] = {
            "id": pa.array([item.id for item in self.objects], pa.string()),
            "glomerulus": pa.array(list(self.glomeruli), pa.string()),
            **{name: self.boxes[:, i] for i, name in enumerate(("x", "y", "side"))},
            "counted": self.counted,
            "repeats": pa.array(list(self.repeats), pa.string()),
            "doubt": self.doubts,
            **{name: pa.array(list(values)) for name, values in self.limits.items()},
            "label": pa.array(self.labels, pa.string()),
        }
        for k, name in enumerate(self.class_names):
            columns[f"p_{name}"] = self.probabilities[:, k]
        write_table(path, columns)

    def write_geojson(self, path: Path, origin: Origin = LEVEL0) -> None:
        """Write the objects with class, probabilities and doubt, id and geometry as they came.

        Measurements of each: `doubt`, by which QuPath sorts a table of annotations; `p <class>`;
        `counted`; and, where the model has such limits, `abstains` (1 where it gives no answer),
        `set size` (classes in the prediction set), `unlike support` (1 where the class may mean
        nothing) and `support distance`. A class that was among those of the outlines keeps its
        colour.

        Args:
            path: The file.
            origin: Where it counts from.
        """
        numbers: list[dict[str, float]] = [
            {DOUBT: doubt, COUNTED: float(once)}
            | {f"p {name}": p for name, p in zip(self.class_names, row, strict=True)}
            for row, doubt, once in zip(
                self.probabilities.tolist(), self.doubts.tolist(), self.counted, strict=True
            )
        ]
        for name, values in self._limit_numbers().items():
            for own, value in zip(numbers, values, strict=True):
                own[name] = value
        colours: dict[str, Colour] = class_colours(self.objects)
        write_geojson(
            path, self.objects, labels=self.labels, measurements=numbers, colours=colours,
            origin=origin,
        )  # fmt: skip

    def _limit_numbers(self) -> dict[str, list[float]]:
        """The columns of `limits` as measurements."""
        numbers: dict[str, list[float]] = {}
        if "answers" in self.limits:
            numbers["abstains"] = [float(value == "no") for value in self.limits["answers"]]
        if "set_size" in self.limits:
            numbers["set size"] = [float(value) for value in self.limits["set_size"]]
        if "unlike_support" in self.limits:
            numbers["unlike support"] = [float(v == "yes") for v in self.limits["unlike_support"]]
        if "support_distance" in self.limits:
            numbers["support distance"] = [float(v) for v in self.limits["support_distance"]]
        return numbers


def read_objects(path: Path, slide: str) -> tuple[NDArray[np.float64], list[str]]:
    """Read the probabilities and ids that counting needs from a saved table.

    Args:
        path: The parquet file.
        slide: Whose objects these are.

    Returns:
        Probabilities `[n, K]` of the objects that count, and which glomerulus each one is: the
        same on several slides only where the file of the objects names it.
    """
    table = pq.read_table(path)
    counted = np.flatnonzero(table["counted"].to_numpy())
    columns = [name for name in table.column_names if name.startswith("p_")]
    probabilities = np.stack([table[name].to_numpy() for name in columns], axis=1)[counted]
    ids, glomeruli = table["id"].to_pylist(), table["glomerulus"].to_pylist()
    names = [
        f"{slide} {ids[i]}" if glomeruli[i] is None else f"{GLOMERULUS}{glomeruli[i]}"
        for i in counted
    ]
    return probabilities, names


def classify_objects(
    model: "GloVLMForImageClassification",
    processor: "GloVLMProcessor",
    slide: "Slide",
    objects: Sequence[SlideObject],
    *,
    mpp: float | None = None,
    margin: float = 1.25,
    outline_of: str | None = None,
    stain: str | None = None,
    batch_size: int = 32,
    allow_scale: bool = False,
    engine: "Engine | None" = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ClassifiedObjects:
    """Cut outlined objects out of a slide and classify them; overlapping ones are one object.

    A crop is a square of `margin` times the longer side around the middle of the outline's box,
    white where it reaches beyond the slide, as `glovlm data crops` cuts the images of a training
    set; a model that sees outlines gets it with its own. Of two outlines whose intersection is more
    than half of their union the earlier one is classified and counted. A batch of crops is in
    memory at a time.

    Args:
        model: The classifier.
        processor: Its processor.
        slide: An open slide.
        objects: Outlines in pixels of level 0.
        mpp: Micrometres per pixel of level 0, in place of the slide's own.
        margin: Side of the crop over the longer side of the outline; at least 1.
        outline_of: What the outlines go around, `capsule` or `tuft`; `None` where not stated.
        stain: Of the slide, for a classifier that centres by it.
        batch_size: Crops at a time.
        allow_scale: Accept crops at a scale that is known to differ from the model's.
        engine: What computes the tower, see `open_engine`; by default PyTorch in fp32.
        on_progress: Called with the number of crops done and of all.

    Raises:
        GloVLMError: An object lies outside the slide, or the scale is wrong (see `scale`).
    """
    if not 1 <= margin < 100:
        raise GloVLMError(f"Expected a margin of at least 1, found {margin:g}.")
    if not objects:
        raise GloVLMError("Expected one outlined object at least, found none.")
    boxes = np.array([_crop_box(item, slide.size, margin) for item in objects], np.int64)
    first = find_repeats(objects)
    once = first == np.arange(len(objects))
    level0 = mpp if mpp is not None else slide.mpp
    scale = _compare_scale(model, processor, boxes[once, 2], level0, allow_scale)

    parts, unlike, specks = [], 0, list[str]()
    limits: dict[str, list[Any]] = {}
    calibration = model.config.calibration or {}
    chosen = np.flatnonzero(once)
    outlined = processor.outline not in ("ignore", "centre")
    with counting("objects", len(chosen)) as count:
        for start in range(0, len(chosen), batch_size):
            crops = [
                read_crop(
                    slide,
                    boxes[i].tolist(),
                    partial(fill, objects[i].polygons) if outlined else None,
                    structure=outline_of,
                )
                for i in chosen[start : start + batch_size].tolist()
            ]
            both = zip(chosen[start:].tolist(), crops, strict=False)
            specks += [objects[i].id for i, crop in both if is_speck(crop)]
            rows = _image_rows(crops, stain)
            predictions = predict(model, processor, rows, batch_size=batch_size, engine=engine)
            parts.append(predictions.probabilities)
            for name, values in _limits_of(predictions, calibration).items():
                limits.setdefault(name, []).extend(values)
            if predictions.unlike_support is not None:
                unlike += int(predictions.unlike_support.sum())
            count.advance(len(crops))
            if on_progress is not None:
                on_progress(count.done, len(chosen))
    probabilities = np.empty((len(objects), parts[0].shape[1]))
    probabilities[chosen] = np.concatenate(parts)
    probabilities = probabilities[first]
    shown = np.searchsorted(chosen, first)  # place among those that were classified

    notes = []
    if not once.all():
        notes.append(
            f"{int((~once).sum())} of {len(objects)} outlines repeat another one and are not "
            "counted."
        )
    if unlike:
        notes.append(
            f"{unlike} of {len(chosen)} objects are unlike the images that the model learned from, "
            "so their classes may mean nothing."
        )
    notes += describe_specks(specks)
    if outlined:
        notes += _outline_notes(model.config.outline_of, outline_of)
    notes += scale.notes
    if scale.mpp == "unknown":
        notes.append(
            "The scale of the crops is not known, so it was not compared with the model's."
        )
    return ClassifiedObjects(
        objects=list(objects),
        boxes=boxes,
        probabilities=probabilities,
        class_names=predictions.class_names,
        counted=once,
        repeats=[None if first[i] == i else objects[int(first[i])].id for i in range(len(objects))],
        glomeruli=[glomerulus_of(item) for item in objects],
        limits={name: [values[i] for i in shown] for name, values in limits.items()},
        mpp=scale.input_mpp,
        notes=notes,
    )


def _crop_box(item: SlideObject, size: tuple[int, int], margin: float) -> tuple[int, int, int]:
    """Crop of an object at level 0: x, y and side."""
    x0, y0, x1, y1 = item.bounds
    if x1 <= 0 or y1 <= 0 or x0 >= size[0] or y0 >= size[1]:
        raise GloVLMError(
            f"The object {item.id} lies outside the slide ({size[0]} x {size[1]} pixels): are "
            "these the annotations of another slide?"
        )
    if max(x1 - x0, y1 - y0) > _LARGEST * max(size):
        raise GloVLMError(
            f"The object {item.id} is {max(x1 - x0, y1 - y0):.0f} pixels long, and the slide has "
            f"{size[0]} x {size[1]}: correct or delete it."
        )
    return crop_square(item.bounds, margin)


def _compare_scale(
    model: Any, processor: Any, sides: NDArray[np.int64], mpp: float | None, allow: bool
) -> ImageScale:
    """Scale of crops of so many pixels of level 0 a side, beside the model's."""
    shrunk = [crop_downsample(side) for side in sides.tolist()] if mpp is not None else []
    sizes = [round(side / by) for side, by in zip(sides.tolist(), shrunk, strict=False)]
    mpps = [(mpp or 0.0) * by for by in shrunk]
    return compare_scale(model, processor, mpps, [(side, side) for side in sizes], allow=allow)


def _outline_notes(learned: str | None, given: str | None) -> list[str]:
    """Sentences where outlines may go around another structure than those learned from."""
    if learned is None:
        return [
            "What the outlines that the model learned from go around is not stated: these have to "
            "go around the same, the capsule or the tuft."
        ]
    if given is None:
        return [
            f"The model learned from outlines around the {learned}, and what these go around is "
            "not stated (--outline-of): it has to be the same."
        ]
    if given == learned:
        return []
    return [
        f"These outlines go around the {given}, and those that the model learned from around the "
        f"{learned}: the classes may mean little."
    ]


def _image_rows(crops: Sequence[Image.Image], stain: str | None) -> "Dataset":
    """Crops in memory as rows that `predict` takes."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    def content(crop: Image.Image) -> bytes:
        stream = io.BytesIO()
        if crop.mode == "RGB":
            crop.save(stream, "BMP")  # without loss and at once
        else:
            write_crop(crop, stream, packed=False)
        return stream.getvalue()

    values = [{"bytes": content(crop), "path": None} for crop in crops]
    columns = {"image": values, "stain": [stain] * len(values)}
    types = {"image": ImageColumn(decode=False), "stain": Value("string")}
    return Dataset.from_dict(columns, Features(types))


def _limits_of(
    predictions: "Predictions", calibration: Mapping[str, Any]
) -> dict[str, Sequence[Any]]:
    """A model's limits as columns, and the size of each prediction set."""
    columns: dict[str, Sequence[Any]] = dict(calibration_columns(predictions, calibration))
    if "set" in columns:
        thresholds = ConformalThresholds.from_dict(calibration["conformal"])
        inside = conformal_sets(predictions.probabilities, thresholds)
        columns["set_size"] = inside.sum(axis=1).tolist()
    return columns


def glomerulus_of(item: SlideObject) -> str | None:
    """Which glomerulus an object shows, where its file says so (`glomerulus_id`)."""
    metadata = item.properties.get("metadata")
    for source in (item.properties, metadata if isinstance(metadata, dict) else {}):
        if source.get("glomerulus_id"):
            return str(source["glomerulus_id"])
    return None
