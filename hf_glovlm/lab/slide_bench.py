"""Benchmark of tiling and encoding a synthetic slide of any size, in memory and time.

The slide is written tile by tile, level by level, so rendering it needs as little memory as reading
it. It shows that the software works; nothing on it is tissue.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..environment import peak_memory
from ..errors import GloVLMError
from ..inference import embed_prompts
from ..model import GloVLMForImageClassification
from ..model.heads import ClassWeights
from ..slides.encoding import encode_slide, load_encoder
from ..slides.files.bags import read_bag
from ..slides.files.tiles import lay_tiles
from ..slides.files.tissue import find_tissue
from ..slides.files.wsi import open_slide
from .benches.timing import Row, as_row, shortest_in_turn

if TYPE_CHECKING:
    from .benches.towers import Shape

Box = tuple[int, int, int, int]  # x, y, width, height at level 0

GLASS = (244, 244, 242)
TISSUE = (223, 158, 196)
LESION = (116, 74, 148)
MAX_MEMORY = 2 * 2**30
READ = 1000  # tiles that are read by one and several threads
PERIOD = 509  # side of the texture in pixels; a prime, so that no two tiles show the same piece


def write_slide(
    path: str | Path,
    width: int,
    height: int,
    *,
    mpp: float | None = 0.5,
    lesions: int | Sequence[Box] = 0,
    lesion_side: int = 224,
    blobs: int = 3,
    marks: Sequence[tuple[Box, tuple[int, int, int]]] = (),
    description: str | None = None,
    compression: str = "jpeg",
    tile: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a synthetic pyramidal TIFF slide: white glass, pink blobs, squares of another texture.

    Args:
        path: Where to write; openslide and tifffile both read it.
        width: Of level 0, in pixels.
        height: Of level 0, in pixels.
        mpp: Micrometres per pixel, written as the TIFF resolution; `None` leaves it out.
        lesions: Number of squares, drawn from the cells of a grid of `lesion_side` that lie wholly
            in a blob (so that tiles of that side hit them exactly), or the boxes themselves.
        lesion_side: Side of a square in pixels.
        blobs: Ellipses of tissue; 0 gives an empty slide.
        marks: Boxes of one plain colour (x, y, width, height at level 0; RGB): pen, for instance.
        description: The TIFF's ImageDescription.
        compression: `jpeg` or a lossless one of tifffile, such as `deflate`.
        tile: Side of the TIFF's tiles, a multiple of 16.
        seed: Draws blobs, texture and places.

    Returns:
        `path`, `size`, `mpp`, `levels` (their sizes), `lesions` (boxes at level 0), `blobs`
        (`[n, 4]`: centre and half axes of the ellipses at level 0) and `lesion_side`.

    Raises:
        GloVLMError: There is no room for as many lesions.
    """
    import tifffile

    rng = np.random.default_rng(seed)
    ellipses = _draw_blobs(rng, width, height, blobs)
    boxes = (
        _draw_lesions(rng, ellipses, lesions, lesion_side)
        if isinstance(lesions, int)
        else [tuple(box) for box in lesions]
    )
    texture = rng.normal(0, 14, size=(PERIOD, PERIOD, 1)) + rng.normal(0, 4, (PERIOD, PERIOD, 3))
    painter = _Painter(ellipses, boxes, list(marks), texture)
    sizes = [(width, height)]
    while max(sizes[-1]) > 2 * tile and len(sizes) < 12:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    jpeg = compression == "jpeg"
    with tifffile.TiffWriter(path, bigtiff=width * height > 2**30) as file:
        for level, (columns, rows) in enumerate(sizes):
            scale = 1e4 / (mpp * 2**level) if mpp else 1
            file.write(
                painter.tiles(columns, rows, 2**level, tile),
                shape=(rows, columns, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                compressionargs={"level": 90} if jpeg else None,
                subfiletype=1 if level else 0,
                resolution=(scale, scale) if mpp else None,
                resolutionunit="CENTIMETER" if mpp else None,
                description=description if level == 0 else None,
                metadata=None,
                maxworkers=1,
            )
    return {
        "path": Path(path),
        "size": (width, height),
        "mpp": mpp,
        "levels": sizes,
        "lesions": boxes,
        "blobs": ellipses,
        "lesion_side": lesion_side,
    }


def bench_slide(
    *,
    side: int = 40_000,
    tile_size: int = 224,
    batch_size: int = 32,
    backbone: str = "mini",
    large_side: int = 3_600,
    shape: "Shape | None" = None,
    folder: str | Path | None = None,
) -> Iterator[Row]:
    """Benchmark of tiling, encoding and classifying synthetic slides, in processes of their own.

    Of two slides the first has a quarter of the area of the second: what the second adds to the
    peak is what memory grows by with the slide. A third, small one is encoded by a tower of random
    weights of the size of ViT-B/16. The tower's share is the time inside its forward passes over
    that of the loop from the first tile to the last.

    Args:
        side: Width and height of the second slide in pixels.
        tile_size: Side of a tile in pixels of level 0.
        batch_size: Tiles at a time; half of it for the large tower.
        backbone: As `--backbone` takes it; classifies by two class texts.
        large_side: Width and height of the slide of the large tower.
        shape: Of the large tower.
        folder: Where the slides are written and removed again; a temporary one by default.

    Yields:
        Rows `slide.memory` (peak resident memory; its ratio is that to the peak after the quarter
        slide), `slide.memory_above_import`, `slide.rate` (tiles a second, reading and finding the
        tissue included), `slide.memory_quarter`, `slide.rate_quarter`, `slide.tower_share`,
        `slide.tower_share_command` and `slide.tower_share_small`, and both shares without reading
        ahead, whose ratio is how many times faster the loop is with it; `slide.reading` (tiles read
        a second by several threads).

    Raises:
        GloVLMError: A process failed, or needed more than 2 GiB, or reading ahead changes features.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        quarter, whole, small = (
            _write_for_bench(Path(place), edge) for edge in (side // 2, side, large_side)
        )
        one = _Child(backbone, tile_size, batch_size)
        first = one.encode(quarter, whole)
        yield from _memory_rows(first, one, (side // 2, side))
        large = _Child(None, tile_size, max(1, batch_size // 2), shape)
        second = large.encode(small)
        tower = f"tower of random weights ({large.describe()})"
        for name, run, at, who in (
            ("tower_share", second, 0, tower),
            ("tower_share_small", first, 1, backbone),
        ):
            what = f"{who}, {run.slides[at]['tiles']} tiles: time in the tower over the loop's"
            yield as_row(f"slide.{name}", run.share(at), "of 1", None, what)
        command = second.slides[0]["tower"] / second.seconds
        what = f"{tower}: time in the tower over that of the process, imports included"
        yield as_row("slide.tower_share_command", command, "of 1", None, what)
        for name, child, slide, before, who in (
            ("tower_share", large, small, second, tower),
            ("tower_share_small", one, quarter, first, backbone),
        ):
            plain = child.encode(slide, reading_threads=0)
            gain = plain.slides[0]["loop"] / before.slides[0]["loop"]
            what = (
                f"{who}, tiles not read ahead; ratio: times faster the loop is with reading ahead"
            )
            if plain.slides[0]["digest"] != before.slides[0]["digest"]:
                raise GloVLMError(
                    "Reading ahead changes the features of tiles: report this as a bug."
                )
            yield as_row(f"slide.{name}_without", plain.share(0), "of 1", gain, what)
        yield _reading_row(quarter, tile_size)


def _reading_row(path: Path, tile_size: int) -> Row:
    """Row of tiles read by as many threads as there are cores, against one thread."""
    from ..slides.prefetching import MOST_THREADS, read_batches

    threads = max(2, min(MOST_THREADS, torch.get_num_threads()))
    with open_slide(path) as slide:
        places = lay_tiles(slide, find_tissue(slide), tile_size=tile_size).coords[:READ]

    def read(count: int) -> list[bytes]:
        with open_slide(path) as slide:  # a fresh one keeps no decoded pieces
            batches = read_batches(
                places,
                lambda at: slide.read(int(at[0]), int(at[1]), tile_size, tile_size).tobytes(),
                lambda tiles: [hashlib.md5(tile, usedforsecurity=False).digest() for tile in tiles],
                batch_size=32,
                threads=count,
            )
            return [digest for _, digests in batches for digest in digests]

    if read(1) != read(threads):
        raise GloVLMError("Several threads read other tiles than one: report this as a bug.")
    one, several = shortest_in_turn([lambda: read(1), lambda: read(threads)], 3)
    what = f"{len(places)} tiles read by {threads} threads; ratio: times faster than by one"
    return as_row("slide.reading", len(places) / several, "tiles/s", one / several, what)


def _write_for_bench(folder: Path, edge: int) -> Path:
    path = folder / f"{edge}.tif"
    write_slide(path, edge, edge, lesions=4, lesion_side=max(1, min(224, edge // 50)))
    return path


def _memory_rows(run: "_Measured", child: "_Child", sides: tuple[int, int]) -> Iterator[Row]:
    """Rows of memory and rate of a quarter and a whole slide."""
    quarter, whole = run.slides
    if whole["peak"] is None or run.imported is None:
        raise GloVLMError("`bench slide` measures memory, which this system does not state.")
    if whole["peak"] > MAX_MEMORY:
        raise GloVLMError(
            f"Encoding a slide of {sides[1]:,} pixels took {whole['peak'] / 2**30:.2f} GiB of "
            "memory, at most 2 are allowed: report this as a bug."
        )
    for name, edge, one in (("", sides[1], whole), ("_quarter", sides[0], quarter)):
        what = f"synthetic slide of {edge:,} px, {one['tiles']} tiles of {child.tile_size} px, "
        what += str(child.backbone)
        ratio = None if name else whole["peak"] / quarter["peak"]
        note = "" if name else "; ratio: to the peak after a slide of a quarter of the area"
        yield as_row(f"slide.memory{name}", one["peak"] / 2**20, "MiB", ratio, what + note)
        if not name:
            above = (one["peak"] - run.imported) / 2**20
            note = "; the model included, not what importing the package takes"
            yield as_row("slide.memory_above_import", above, "MiB", None, what + note)
        rate = one["tiles"] / one["seconds"]
        yield as_row(f"slide.rate{name}", rate, "tiles/s", None, f"{what}: read and encoded")


@dataclass(frozen=True)
class _Measured:
    """What a process of its own measured: its seconds, memory after imports, and its slides."""

    seconds: float
    imported: int | None
    slides: list[dict[str, Any]]

    def share(self, i: int) -> float:
        """The tower's share of the loop over the tiles of a slide."""
        return float(self.slides[i]["tower"] / self.slides[i]["loop"])


@dataclass(frozen=True)
class _Child:
    """Encodes slides in a process of its own; without a backbone by a tower of random weights."""

    backbone: str | None
    tile_size: int
    batch_size: int
    shape: "Shape | None" = None

    def describe(self) -> str:
        """The tower's size."""
        if self.shape is None:
            return "ViT-B/16"
        return "{} wide, {} blocks".format(*self.shape.vision)

    def encode(self, *slides: Path, **settings: Any) -> _Measured:
        """Encode slides from the first tile to the last."""
        about = {
            "slides": list(map(str, slides)),
            "backbone": self.backbone,
            "shape": self.shape and asdict(self.shape),
            "settings": {"tile_size": self.tile_size, "batch_size": self.batch_size, **settings},
        }
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(about)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if process.returncode:
            reason = (process.stderr.strip() or "no message").splitlines()[-1]
            raise GloVLMError(f"Encoding the synthetic slide {slides[-1].name} failed: {reason}")
        return _Measured(seconds, **json.loads(process.stdout.splitlines()[-1]))


_PROGRAM = """
import json, sys
from hf_glovlm.lab.slide_bench import measure
print(json.dumps(measure(**json.loads(sys.argv[1]))))
"""


def measure(
    slides: Sequence[str],
    backbone: str | None,
    shape: dict[str, Any] | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Encode and classify slides in this process, which has imported the package and no more.

    Returns:
        `imported` (bytes of memory at most, until now) and `slides`: of each, `tiles`, `seconds`,
        `loop` and `tower` (seconds from the first tile to the last, and in the tower), `peak`
        (bytes at most, until its end) and `digest` of its features.
    """
    imported = peak_memory()
    model, processor = _two_class_model(backbone, shape)
    inside = _time_in(model.glovlm.backbone.vision_model)
    rows: list[dict[str, Any]] = []
    for slide in map(Path, slides):
        start, bag, times = time.perf_counter(), slide.with_suffix(".h5"), list[float]()
        inside.clear()
        bag.unlink(missing_ok=True)
        done = encode_slide(
            model,
            processor,
            slide,
            bag,
            on_progress=lambda *_, times=times: times.append(time.perf_counter()),
            **settings,
        )
        seconds = time.perf_counter() - start
        rows.append({
            "tiles": done.tiles,
            "seconds": seconds,
            "loop": times[-1] - times[0],
            "tower": sum(inside),
            "peak": peak_memory(),
        })  # fmt: skip
    for row, path in zip(rows, slides, strict=True):  # when memory is measured no more
        features = read_bag(Path(path).with_suffix(".h5")).features
        row["digest"] = hashlib.sha256(features.tobytes()).hexdigest()
    return {"imported": imported, "slides": rows}


def _two_class_model(backbone: str | None, shape: dict[str, Any] | None) -> tuple[Any, Any]:
    """A zero-shot classifier of two class texts, on a backbone or on random weights."""
    if backbone is None:
        from .benches.towers import Shape, random_clip

        towers, processor = random_clip(Shape(text=(64, 1)) if shape is None else Shape(**shape))
    else:
        towers, processor = load_encoder(backbone)
    texts = embed_prompts(towers, processor, [["normal tissue"], ["a dark lesion"]])
    head = ClassWeights(texts.shape[1], len(texts), cosine=True)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(texts))
        head.scale.copy_(towers.logit_scale.exp())
    towers.config.id2label = {0: "normal", 1: "lesion"}
    return GloVLMForImageClassification(towers.config, towers, head).eval(), processor


def _time_in(module: torch.nn.Module) -> list[float]:
    """A list that takes the seconds of each forward pass of a module."""
    started: list[float] = []
    seconds: list[float] = []
    module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
    module.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop()))
    return seconds


def _draw_blobs(rng: np.random.Generator, width: int, height: int, n: int) -> NDArray[Any]:
    """Centre and half axes of ellipses `[n, 4]` that lie on the slide."""
    half = rng.uniform(0.14, 0.24, size=(n, 2)) * (width, height)
    centre = half + rng.uniform(0.02, 0.98, size=(n, 2)) * ((width, height) - 2 * half)
    return np.concatenate([centre, half], axis=1)


def _draw_lesions(rng: np.random.Generator, ellipses: Any, n: int, side: int) -> list[Box]:
    """Boxes of grid cells whose four corners lie in one ellipse."""
    inside: set[tuple[int, int]] = set()
    for cx, cy, rx, ry in ellipses:
        columns = np.arange((cx - rx) // side, (cx + rx) // side + 1).astype(int)
        rows = np.arange((cy - ry) // side, (cy + ry) // side + 1).astype(int)
        for column in columns:
            for row in rows:
                corners = [((column + i) * side, (row + j) * side) for i in (0, 1) for j in (0, 1)]
                if all(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1 for x, y in corners):
                    inside.add((int(column) * side, int(row) * side))
    if len(inside) < n:
        raise GloVLMError(
            f"Expected room for {n} lesions of {side} pixels in the tissue, found "
            f"{len(inside)}: render a larger slide, or fewer or smaller lesions."
        )
    places = sorted(inside)
    chosen = sorted(rng.choice(len(places), size=n, replace=False).tolist()) if n else []
    return [(*places[k], side, side) for k in chosen]


class _Painter:
    """Renderer of any part of the slide at any level, from its description alone."""

    def __init__(
        self, ellipses: NDArray[Any], lesions: list[Any], marks: list[Any], texture: NDArray[Any]
    ) -> None:
        self.ellipses, self.lesions, self.marks = ellipses, lesions, marks
        self.texture = texture
        self.glass = cache(lambda side: np.full((side, side, 3), GLASS, np.uint8))

    def tiles(self, columns: int, rows: int, scale: int, side: int) -> Iterator[NDArray[np.uint8]]:
        """The TIFF tiles of a level in its order, each `[side, side, 3]`."""
        # A coarser level averages scale * scale pixels of independent texture.
        wrapped = np.pad(self.texture / scale, ((0, side), (0, side), (0, 0)), "wrap")
        tissue = np.rint(TISSUE + wrapped).clip(0, 255).astype(np.uint8)
        for y in range(0, rows, side):
            for x in range(0, columns, side):
                top, left = y % PERIOD, x % PERIOD
                piece = tissue[top : top + side, left : left + side]
                yield self._paint(x, y, side, scale, piece)

    def _paint(
        self, x: int, y: int, side: int, scale: int, piece: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """One tile; `x` and `y` count pixels of the level, `scale` is its downsample."""
        across = ((np.arange(x, x + side) + 0.5) * scale)[None]
        down = ((np.arange(y, y + side) + 0.5) * scale)[:, None]
        image = self.glass(side).copy()
        for cx, cy, rx, ry in self.ellipses:
            if abs(across - cx).min() < rx and abs(down - cy).min() < ry:
                inside = ((across - cx) / rx) ** 2 + ((down - cy) / ry) ** 2 <= 1
                np.copyto(image, piece, where=inside[..., None])
        for box in self.lesions:
            inside = _inside(box, across, down)
            if inside.any():
                rings = 34 * np.sin(np.hypot(across % 28 - 14, down % 28 - 14)) / scale
                image[inside] = (np.array(LESION) + rings[inside][:, None]).astype(np.uint8)
        for box, colour in self.marks:
            image[_inside(box, across, down)] = colour
        return image


def _inside(box: Box, across: NDArray[Any], down: NDArray[Any]) -> NDArray[np.bool_]:
    x, y, width, height = box
    inside: NDArray[np.bool_] = (
        (across >= x) & (across < x + width) & (down >= y) & (down < y + height)
    )
    return inside
