"""Benchmark of the tissue mask: outlined glomeruli, bare canvas and pen, alone and pasted together.

What is measured is pictures with outlines; what is drawn around them (glass, pen) is made here.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ..errors import GloVLMError
from ..slides.files.annotations import read_geojson
from ..slides.files.tissue import find_tissue
from ..slides.files.wsi import Slide
from .benches.timing import Row, as_row

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Finder = Callable[[Slide], Any]  # has `array` and `downsample`, as a `TissueMask` does

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
GLASS = (243, 242, 240)
INKS = {"black": (40, 38, 44), "blue": (38, 58, 165), "green": (22, 120, 72)}
GAP = 280  # pixels of canvas between pictures: wider than a stroke
COLUMNS, ROWS = 3, 2  # pictures on one canvas
_COLOURED = 100  # levels between the channels of a mask's pixel: more is an object's colour


@dataclass(frozen=True, eq=False)
class OutlinedPicture:
    """Picture with outlined objects.

    Attributes:
        name: Of the file.
        pixels: RGB `[height, width, 3]`.
        outlined: Inside of all outlines, `[height, width]`.
    """

    name: str
    pixels: Pixels
    outlined: Mask


@dataclass(frozen=True, eq=False)
class Canvas:
    """Pictures pasted on one glass, with strokes of pen between them.

    Attributes:
        pixels: RGB `[height, width, 3]`.
        boxes: Left, upper edge of each picture.
        bare: Glass that neither picture nor pen covers, `[height, width]`.
        pen: Pixels under ink, `[height, width]`.
    """

    pixels: Pixels
    boxes: list[tuple[int, int]]
    bare: Mask
    pen: Mask


def bench_tissue(data: str | Path | Sequence[str | Path], *, seed: int = 0) -> list[Row]:
    """Benchmark of `find_tissue` on pictures with outlines, alone and pasted on canvases.

    Args:
        data: Folder of pictures, each with `NAME.geojson` or a colour mask `NAME_mask.png`; or
            several folders.
        seed: Draws which pictures share a canvas, the glass and the strokes.

    Returns:
        Rows `alone`, `pasted` (mean share of the outlined area that is tissue; its ratio is the
        worst picture's), `canvas`, `pen` (share of bare glass and of ink that is tissue).

    Raises:
        GloVLMError: A folder holds no picture with outlines.
    """
    folders = [data] if isinstance(data, str | Path) else data
    pictures = [picture for folder in folders for picture in read_pictures(Path(folder))]
    shares = measure_tissue(pictures, find_tissue, seed=seed)
    n = len(pictures)
    rows = []
    for name, whose, worst in (
        ("alone", f"outlined area that is tissue, mean of {n} pictures", min),
        ("pasted", f"the same on canvases with other pictures and pen, {n} pictures", min),
        ("canvas", "bare glass taken for tissue, mean over canvases", max),
        ("pen", "ink of three colours taken for tissue, mean over canvases", max),
    ):
        values = shares[name]
        mean, most = float(np.mean(values)), worst(values)
        rows.append(as_row(f"tissue.{name}", mean, "share", most, f"{whose}; ratio: the worst"))
    return rows


def measure_tissue(
    pictures: Sequence[OutlinedPicture], find: Finder, *, seed: int = 0
) -> dict[str, list[float]]:
    """Shares that a finder of tissue gives, as `bench_tissue` describes them.

    Returns:
        `alone` and `pasted` by picture, in order; `canvas` and `pen` by canvas.
    """
    shares: dict[str, list[float]] = {"alone": [], "canvas": [], "pen": []}
    for picture in pictures:
        tissue = spread_mask(find(slide_of(picture.pixels)), picture.outlined.shape)
        shares["alone"].append(float(tissue[picture.outlined].mean()))
    pasted: dict[int, float] = {}
    for chosen, canvas in draw_canvases(pictures, seed=seed):
        tissue = spread_mask(find(slide_of(canvas.pixels)), canvas.bare.shape)
        for k, (x, y) in zip(chosen, canvas.boxes, strict=True):
            height, width = pictures[k].outlined.shape
            part = tissue[y : y + height, x : x + width]
            pasted[k] = float(part[pictures[k].outlined].mean())
        shares["canvas"].append(float(tissue[canvas.bare].mean()))
        shares["pen"].append(float(tissue[canvas.pen].mean()))
    return shares | {"pasted": [pasted[k] for k in range(len(pictures))]}


def read_pictures(folder: Path) -> list[OutlinedPicture]:
    """Read the pictures of a folder that have outlines.

    Raises:
        GloVLMError: There is none.
    """
    pictures = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        outlines, mask = path.with_suffix(".geojson"), path.with_name(f"{path.stem}_mask.png")
        if path.suffix.lower() not in SUFFIXES or not (outlines.is_file() or mask.is_file()):
            continue
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        outlined = (
            _fill(outlines, (pixels.shape[1], pixels.shape[0]))
            if outlines.is_file()
            else _coloured(mask, (pixels.shape[1], pixels.shape[0]))
        )
        if outlined.any():
            pictures.append(OutlinedPicture(path.name, pixels, outlined))
    if not pictures:
        raise GloVLMError(
            f"Expected pictures with NAME.geojson or NAME_mask.png beside them in '{folder}', "
            "found none."
        )
    return pictures


def draw_canvases(
    pictures: Sequence[OutlinedPicture], *, seed: int
) -> Iterator[tuple[list[int], Canvas]]:
    """Draw canvases that hold each picture once: their numbers, and the canvas."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pictures)).tolist()
    for start in range(0, len(order), COLUMNS * ROWS):
        chosen = order[start : start + COLUMNS * ROWS]
        yield chosen, draw_canvas([pictures[k].pixels for k in chosen], rng)


def draw_canvas(pictures: Sequence[Pixels], rng: np.random.Generator) -> Canvas:
    """Paste pictures on glass, draw a stroke of each ink between them, compress as JPEG."""
    width = GAP + COLUMNS * (GAP + max(p.shape[1] for p in pictures))
    height = GAP + ROWS * (GAP + max(p.shape[0] for p in pictures))
    image = draw_glass(width, height, rng)
    bare = np.ones((height, width), bool)
    boxes = []
    for k, pixels in enumerate(pictures):
        x = GAP + (k % COLUMNS) * (width - GAP) // COLUMNS
        y = GAP + (k // COLUMNS) * (height - GAP) // ROWS
        image[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        bare[y : y + pixels.shape[0], x : x + pixels.shape[1]] = False
        boxes.append((x, y))
    lines = (
        ((0.1 * width, GAP / 2), (rng.uniform(0.5, 0.9) * width, GAP / 2)),
        ((GAP / 2, 0.2 * height), (GAP / 2, rng.uniform(0.6, 0.9) * height)),
        ((0.2 * width, height - GAP / 2), (rng.uniform(0.5, 0.9) * width, height - GAP / 2)),
    )
    pen = np.zeros_like(bare)
    for ink, (start, end) in zip(rng.permutation(list(INKS)), lines, strict=True):
        pen |= draw_stroke(image, start, end, INKS[str(ink)], rng)
    image += _grain(rng, 2, image.shape)
    soft = Image.fromarray(pen.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(8))
    around = np.asarray(soft) > 0  # the soft edge is neither
    return Canvas(compress(image), boxes, bare & ~around, pen & bare)


def draw_glass(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw glass: its colour, a slope of light of 2%, faint blotches; `[height, width, 3]`."""
    across, down = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in (width, height))
    light = 1 + 0.01 * rng.choice([-1, 1]) * (down[:, None] + across)
    light += _blotches(rng, 64, 0.006, (height, width))
    return light.astype(np.float32)[..., None] * np.array(GLASS, np.float32)


def draw_stroke(
    image: NDArray[np.float32],
    start: tuple[float, float],
    end: tuple[float, float],
    ink: tuple[int, int, int],
    rng: np.random.Generator,
) -> Mask:
    """Draw a wavy stroke of felt pen, 50 to 110 pixels wide; returns where its ink lies."""
    at = np.linspace(0, 1, 200)[:, None]
    line = np.array(start) + at * (np.array(end) - np.array(start))
    across = np.array([end[1] - start[1], start[0] - end[0]]) / np.hypot(*np.subtract(end, start))
    line = line + across * 20 * np.sin(2 * np.pi * (rng.uniform(1, 4) * at + rng.uniform()))
    radii = rng.uniform(27, 45) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 3) * at[:, 0]))
    reach = int(radii.max()) + 16
    left, top = np.maximum(line.min(0).astype(int) - reach, 0)
    right, bottom = line.max(0).astype(int) + reach
    part = image[top:bottom, left:right]
    drawn = Image.new("L", (part.shape[1], part.shape[0]))
    pencil = ImageDraw.Draw(drawn)
    line = line - (left, top)
    for (x, y), r in zip(line.tolist(), radii.tolist(), strict=True):
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=255)
    for (x0, y0), (x1, y1), r in zip(line[:-1], line[1:], radii[:-1], strict=False):
        pencil.line((x0, y0, x1, y1), fill=255, width=round(2 * r))
    soft = np.asarray(drawn.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
    amount = soft * (1 + _blotches(rng, 90, 0.08, soft.shape))  # density varies along a stroke
    density = -np.log10(np.array(ink, np.float32) / 250)
    part *= 10 ** -(amount[..., None] * density)
    inked = np.zeros(image.shape[:2], bool)
    inked[top:bottom, left:right] = np.asarray(drawn) > 0
    return inked


def _blotches(
    rng: np.random.Generator, size: int, sd: float, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Smooth noise of a size in pixels and a standard deviation."""
    coarse = rng.normal(0, sd, [n // size + 2 for n in shape]).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def _grain(rng: np.random.Generator, sd: float, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Noise of single pixels; one piece of it, repeated."""
    piece = rng.normal(0, sd, (509, 509, 3)).astype(np.float32)
    return np.tile(piece, (shape[0] // 509 + 1, shape[1] // 509 + 1, 1))[: shape[0], : shape[1]]


def compress(image: NDArray[Any], quality: int = 85) -> Pixels:
    """The picture as it comes out of JPEG."""
    buffer = io.BytesIO()
    pixels = np.rint(image).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def slide_of(pixels: Pixels) -> Slide:
    """A slide of one level and unknown scale that holds these pixels."""
    return Slide(Path("drawn.tif"), ArrayReader(pixels))


def spread_mask(mask: Any, shape: tuple[int, ...]) -> Mask:
    """A tissue mask over the pixels of level 0, `shape`."""
    places = [
        np.minimum(((np.arange(n) + 0.5) / unit).astype(int), side - 1)
        for n, unit, side in zip(shape, mask.downsample[::-1], mask.array.shape, strict=True)
    ]
    spread: Mask = mask.array[np.ix_(*places)]
    return spread


class ArrayReader:
    """Slide reader of an array `[height, width, 3]`: one level, no scale."""

    name = "array"

    def __init__(self, pixels: Pixels) -> None:
        self.mpp: tuple[float, float] | None = None
        self.magnification: float | None = None
        self.bounds: tuple[int, int] | None = None
        self.pixels = pixels
        self.levels = [(pixels.shape[1], pixels.shape[0])]
        self.downsamples = [1.0]
        self.notes: list[str] = []

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[y : y + height, x : x + width]))

    def close(self) -> None: ...


def _fill(path: Path, size: tuple[int, int]) -> Mask:
    """Inside of the outlines of a GeoJSON file."""
    image = Image.new("1", size)
    for outline in read_geojson(path):
        for polygon in outline.polygons:
            ImageDraw.Draw(image).polygon([tuple(point) for point in polygon[0].tolist()], fill=1)
    return np.array(image)


def _coloured(path: Path, size: tuple[int, int]) -> Mask:
    """Coloured pixels of a mask."""
    with Image.open(path) as opened:
        mask = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.NEAREST), int)
    coloured: Mask = np.ptp(mask, axis=-1) > _COLOURED
    return coloured
