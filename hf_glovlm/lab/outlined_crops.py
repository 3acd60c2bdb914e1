"""Outlined glomeruli for the comparison of outlines: cut from pictures, and drawn as controls.

All renderings of a glomerulus at one margin are the same square; what differs is its alpha channel
(the outline, a circle in its place, the outline moved) or, of the silhouette, its colours.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from ..data import open_image
from ..data.listing import few
from ..errors import GloVLMError, nearest
from ..model.outlines import FILL, KEY
from ..slides.files.annotations import read_geojson
from ..slides.files.crop_image import crop_square
from ..slides.files.shapes import draw
from ..tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

MAX_SIDE = 448  # pixels of a crop; a tower sees at most about half
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
# What is drawn in a square: the outline as it came; everything inside; a circle of the outline's
# area around its centroid; the outline moved and scaled by that part; what lies outside of it; its
# shape alone, black on grey.
SHAPES = ("outline", "whole", "circle", "moved_5", "moved_15", "outside", "silhouette")
_COLOURED = 100  # levels between the channels of a mask's pixel: more is an object's colour
_BOX = 1.25  # side of the boxes over the extent of their blob
_PARTED = 0.8  # overlap of a box and its blob's square below which the blob holds two
_LARGEST = 1024.0  # pixels; a diameter of so many has the last place on the scale of sizes


@dataclass(frozen=True, eq=False)
class Glomerulus:
    """Outlined glomerulus of a picture.

    Attributes:
        name: Of its row.
        label: Its class.
        group: Patient or slide.
        stain: As written; empty where unknown.
        picture: File that it is cut from.
        corner: Left and upper edge of `inside` in the picture, in pixels.
        inside: Pixels inside of the outline, over the outline's box, `[height, width]`.
    """

    name: str
    label: str
    group: str
    stain: str
    picture: Path
    corner: tuple[int, int]
    inside: Mask

    @property
    def extent(self) -> int:
        """Longer side of the outline's box in pixels."""
        return max(self.inside.shape)


def read_glomeruli(about: Mapping[str, str], root: Path) -> list[Glomerulus]:
    """Read the labelled glomeruli of a table and their outlines.

    Args:
        about: `table` (a row a glomerulus: `file_name`, `label`, `stain`), `pictures` (the folder
            that they are cut from), `picture` and `group` (columns with the picture's name and with
            the patient or slide); and either `object`, the column with the id of the outline in
            `PICTURE.geojson`, or `box`, the column with `x0 y0 x1 y1` of a square in the picture
            around one blob of `PICTURE_mask.png`.
        root: Folder that the paths are relative to.

    Raises:
        GloVLMError: A file or column is missing, or a row has no outline of its own.
    """
    table = read_table(root / about["table"], "a table of glomeruli")
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    for key in ("picture", "group", "object" if "object" in about else "box"):
        if about[key] not in table.header:
            raise GloVLMError(
                f"{table.path} has no column '{about[key]}'.{nearest(about[key], table.header)}"
            )
    folder = root / about["pictures"]
    outlined = (
        _by_object(about, rows, folder) if "object" in about else _by_box(about, rows, folder)
    )
    glomeruli = [
        Glomerulus(
            row["file_name"], row["label"], row[about["group"]], row.get("stain", ""), *place
        )
        for row, place in zip(rows, outlined, strict=True)
    ]
    places = [(item.picture, item.corner) for item in glomeruli]
    if len(set(places)) < len(places):
        twice = [g.name for g, at in zip(glomeruli, places, strict=True) if places.count(at) > 1]
        raise GloVLMError(f"One outline belongs to several rows of {table.path}: {few(twice)}.")
    return glomeruli


_Outlined = Iterator[tuple[Path, tuple[int, int], Mask]]


def _by_object(
    about: Mapping[str, str], rows: Sequence[Mapping[str, str]], folder: Path
) -> _Outlined:
    """Outlines by their ids in the GeoJSON file of a picture."""

    @cache
    def objects(picture: str) -> dict[str, Any]:
        return {item.id: item for item in read_geojson(folder / f"{picture}.geojson")}

    for row in rows:
        picture, name = row[about["picture"]], row[about["object"]]
        if name not in objects(picture):
            raise GloVLMError(f"{folder / picture}.geojson has no outline with the id '{name}'.")
        item = objects(picture)[name]
        x0, y0, x1, y1 = (round(value) for value in item.bounds)
        inside = draw(item.polygons, x0, y0, 1.0, (max(x1 - x0, 1), max(y1 - y0, 1)))
        yield picture_file(folder, picture), (x0, y0), inside


def _by_box(about: Mapping[str, str], rows: Sequence[Mapping[str, str]], folder: Path) -> _Outlined:
    """Outlines as the blob of a colour mask whose own square is the given box."""

    @cache
    def blobs(picture: str) -> tuple[NDArray[np.int32], list[Any]]:
        pixels = np.asarray(open_image(folder / f"{picture}_mask.png"), np.int16)
        colour = np.where(np.ptp(pixels, axis=-1) > _COLOURED, pixels.argmax(-1) + 1, 0)
        numbered = np.zeros(colour.shape, np.int32)
        for value in (1, 2, 3):
            own, _ = ndimage.label(colour == value)
            numbered += np.where(own > 0, own + numbered.max(), 0)
        return numbered, ndimage.find_objects(numbered)

    for row in rows:
        picture = row[about["picture"]]
        numbered, places = blobs(picture)
        x0, y0, x1, y1 = box = [int(value) for value in row[about["box"]].split()]
        shares = [_overlap(_clipped_square(place, numbered.shape), box) for place in places]
        best = max(range(len(places)), key=shares.__getitem__, default=-1)
        if best < 0 or not shares[best]:
            raise GloVLMError(f"{picture}_mask.png has no object in the box of {row['file_name']}.")
        down, across = places[best]
        inside = numbered[down, across] == best + 1
        if shares[best] < _PARTED:  # two that touch in the mask: the box's own part of them
            rows_at, columns_at = (np.arange(place.start, place.stop) for place in (down, across))
            inside &= _in_middle(rows_at, y0, y1)[:, None] & _in_middle(columns_at, x0, x1)
        yield picture_file(folder, picture), *_trim(inside, across.start, down.start)


def _in_middle(at: NDArray[np.int64], start: int, stop: int) -> Mask:
    """Which places lie where a box's blob does, its margin left out."""
    aside = (1 - 1 / _BOX) / 2 * (stop - start)
    return (at >= round(start + aside)) & (at < round(stop - aside))


def _trim(inside: Mask, left: int, top: int) -> tuple[tuple[int, int], Mask]:
    """The corner of what is inside, and its own box."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    trimmed = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (left + int(columns[0]), top + int(rows[0])), trimmed


def _clipped_square(place: tuple[slice, slice], shape: tuple[int, int]) -> Sequence[float]:
    """Square around a blob, `_BOX` times its extent, as far as it lies in the picture."""
    down, across = place
    x, y, side = crop_square((across.start, down.start, across.stop, down.stop), _BOX)
    return max(x, 0), max(y, 0), min(x + side, shape[1]), min(y + side, shape[0])


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if min(width, height) <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)


def picture_file(folder: Path, name: str) -> Path:
    """File of a picture by its name without suffix.

    Raises:
        GloVLMError: There is none.
    """
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise GloVLMError(f"Expected the picture {name} ({', '.join(SUFFIXES)}) in {folder}.")


# ------------------------------------------------------------------------------------ drawing


def list_rows(glomeruli: Sequence[Glomerulus], group_column: str) -> "Dataset":
    """Rows without images, from which episodes are drawn: `file_name`, `label` and the group."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = sorted({item.label for item in glomeruli})
    columns = {
        "file_name": [item.name for item in glomeruli],
        "label": [names.index(item.label) for item in glomeruli],
        group_column: [item.group for item in glomeruli],
    }
    text = Value("string")
    features = {"file_name": text, "label": ClassLabel(names=names), group_column: text}
    return Dataset.from_dict(columns, Features(features))


def render_crops(
    glomeruli: Sequence[Glomerulus], *, margin: float, shape: str = "outline", seed: int = 0
) -> "Dataset":
    """Render glomeruli as outlined images: RGB the whole square, alpha what is inside.

    Args:
        glomeruli: As `read_glomeruli` gives them.
        margin: Side of the square over the outline's longer side.
        shape: One of SHAPES.
        seed: Of the moves.

    Returns:
        Rows of a column `image` (PNG with the text `outline`), in order.

    Raises:
        GloVLMError: The shape is unknown.
    """
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    if shape not in SHAPES:
        raise GloVLMError(
            f"Unknown shape '{shape}'; expected {', '.join(SHAPES)}.{nearest(shape, SHAPES)}"
        )
    values = [{"bytes": value, "path": None} for value in _render(glomeruli, margin, shape, seed)]
    return Dataset.from_dict({"image": values}, Features({"image": ImageColumn(decode=False)}))


def _render(
    glomeruli: Iterable[Glomerulus], margin: float, shape: str, seed: int
) -> Iterator[bytes]:
    opened: tuple[Path, Image.Image] | None = None  # rows of a picture stand together
    text = PngInfo()
    text.add_text(KEY, "unstated")
    for number, item in enumerate(glomeruli):
        if opened is None or opened[0] != item.picture:
            opened = item.picture, open_image(item.picture)
        square, inside = cut_square(opened[1], item, margin)
        rng = np.random.default_rng([seed, number])
        alpha = draw_shape(inside, shape, rng)
        if shape == "silhouette":
            square = Image.composite(
                Image.new("RGB", square.size, "black"),
                Image.new("RGB", square.size, (FILL, FILL, FILL)),
                Image.fromarray(inside),
            )
        square.putalpha(Image.fromarray(alpha).convert("L"))
        if square.width > MAX_SIDE:
            size = MAX_SIDE, MAX_SIDE
            # each on its own: colours outside are tissue, and must not be weighed by the alpha
            rgb = square.convert("RGB").resize(size, Image.Resampling.BOX)
            rgb.putalpha(square.getchannel("A").resize(size, Image.Resampling.BOX))
            square = rgb
        stream = io.BytesIO()
        square.save(stream, "PNG", pnginfo=text, compress_level=1)
        yield stream.getvalue()


def cut_square(picture: Image.Image, item: Glomerulus, margin: float) -> tuple[Image.Image, Mask]:
    """Cut the square around a glomerulus, white beyond the picture, and the inside of its outline.

    Returns:
        RGB image; inside `[side, side]`.
    """
    left, top = item.corner
    height, width = item.inside.shape
    x, y, side = crop_square((left, top, left + width, top + height), margin)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, (-x, -y))
    canvas = Image.new("1", (side, side))
    canvas.paste(Image.fromarray(item.inside), (left - x, top - y))
    return square, np.array(canvas)


def draw_shape(inside: Mask, shape: str, rng: np.random.Generator) -> Mask:
    """Draw a shape in a square in place of an outline.

    Args:
        inside: Inside of the outline, `[side, side]`.
        shape: One of SHAPES; of a silhouette everything is inside.
        rng: Draws where `moved` moves and whether it grows or shrinks.
    """
    if shape in ("whole", "silhouette"):
        return np.ones_like(inside)
    if shape == "outside":
        return ~inside
    if shape == "outline":
        return inside
    rows, columns = np.nonzero(inside)
    centre = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    if shape == "circle":
        down, across = (np.arange(side) + 0.5 for side in inside.shape)
        apart = (across - centre[0]) ** 2 + (down[:, None] - centre[1]) ** 2
        circle: Mask = np.pi * apart <= len(rows)
        return circle
    part = float(shape.removeprefix("moved_")) / 100
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    angle, scale = rng.uniform(0, 2 * np.pi), 1 + part * rng.choice([-1, 1])
    by = part * extent * np.cos(angle), part * extent * np.sin(angle)
    # where each pixel of the result comes from
    x, y = (c - (c + b) / scale for c, b in zip(centre, by, strict=True))
    moved = Image.fromarray(inside).transform(
        inside.shape[::-1], Image.Transform.AFFINE, (1 / scale, 0, x, 0, 1 / scale, y)
    )
    return np.array(moved)


def place_sizes(glomeruli: Sequence[Glomerulus]) -> Floats:
    """Sizes alone as features: the logarithm of the diameter in pixels as an angle, `[n, 2]`.

    The diameter is that of a circle of the outline's area. Methods on features look at directions,
    so a number is placed on the quarter of a circle.
    """
    area = np.array([item.inside.sum() for item in glomeruli], np.float64)
    angle = np.pi / 2 * np.log2(np.sqrt(4 * area / np.pi).clip(1)) / np.log2(_LARGEST)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
