"""Benchmark of tiling and encoding a synthetic slide of any size, in memory and time.

The slide is written tile by tile, level by level, so rendering it needs as little memory as reading
it. It shows that the software works; nothing on it is tissue.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..environment import peak_memory
from ..errors import GloVLMError
from ..inference import embed_prompts
from ..model import GloVLMForImageClassification
from ..model.heads import ClassWeights
from ..slides.encoding import encode_slide, load_encoder
from .benches.timing import Row, as_row

Box = tuple[int, int, int, int]  # x, y, width, height at level 0

GLASS = (244, 244, 242)
TISSUE = (223, 158, 196)
LESION = (116, 74, 148)
MAX_MEMORY = 2 * 2**30
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
    folder: str | Path | None = None,
) -> list[Row]:
    """Benchmark of tiling, encoding and classifying two synthetic slides in a process of its own.

    The first slide has a quarter of the area of the second: what the second adds to the peak is
    what memory grows by with the slide.

    Args:
        side: Width and height of the second slide in pixels.
        tile_size: Side of a tile in pixels of level 0.
        batch_size: Tiles at a time.
        backbone: As `--backbone` takes it; classifies by two class texts.
        folder: Where the slides are written and removed again; a temporary one by default.

    Returns:
        Rows `slide.memory` (peak resident memory; its ratio is that to the peak after the quarter
        slide), `slide.memory_quarter`, `slide.rate` (tiles a second, reading and finding the tissue
        included) and `slide.rate_quarter`.

    Raises:
        GloVLMError: The process failed, or needed more than 2 GiB.
    """
    sides = (side // 2, side)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        paths = [str(Path(place) / f"{edge}.tif") for edge in sides]
        for path, edge in zip(paths, sides, strict=True):
            write_slide(path, edge, edge, lesions=4, lesion_side=max(1, min(224, edge // 50)))
        process = subprocess.run(
            [sys.executable, "-c", _CHILD, backbone, str(tile_size), str(batch_size), *paths],
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        reason = (process.stderr.strip() or "no message").splitlines()[-1]
        raise GloVLMError(f"Encoding the synthetic slide of {side:,} pixels failed: {reason}")
    quarter, whole = json.loads(process.stdout.splitlines()[-1])
    if whole["peak"] is None:
        raise GloVLMError("`bench slide` measures memory, which this system does not state.")
    if whole["peak"] > MAX_MEMORY:
        raise GloVLMError(
            f"Encoding a slide of {side:,} pixels took {whole['peak'] / 2**30:.2f} GiB of memory, "
            "at most 2 are allowed: report this as a bug."
        )
    rows = []
    for name, edge, one in (("", side, whole), ("_quarter", side // 2, quarter)):
        what = f"synthetic slide of {edge:,} px, {one['tiles']} tiles of {tile_size} px, {backbone}"
        ratio = None if name else whole["peak"] / quarter["peak"]
        note = "" if name else "; ratio: to the peak after a slide of a quarter of the area"
        rows.append(as_row(f"slide.memory{name}", one["peak"] / 2**20, "MiB", ratio, what + note))
        rate = one["tiles"] / one["seconds"]
        rows.append(as_row(f"slide.rate{name}", rate, "tiles/s", None, f"{what}: read and encoded"))
    return rows


_CHILD = """
import json, sys
from hf_glovlm.lab.slide_bench import measure
backbone, tile_size, batch_size, *slides = sys.argv[1:]
print(json.dumps(measure(slides, backbone, int(tile_size), int(batch_size))))
"""


def measure(
    slides: Sequence[str], backbone: str, tile_size: int, batch_size: int
) -> list[dict[str, Any]]:
    """Encode and classify slides in this process.

    Returns:
        Of each, `tiles`, `seconds` and `peak`: bytes of memory at most, from the start until then.
    """
    towers, processor = load_encoder(backbone)
    texts = embed_prompts(towers, processor, [["normal tissue"], ["a dark lesion"]])
    head = ClassWeights(texts.shape[1], len(texts), cosine=True)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(texts))
        head.scale.copy_(towers.logit_scale.exp())
    towers.config.id2label = {0: "normal", 1: "lesion"}
    model = GloVLMForImageClassification(towers.config, towers, head).eval()
    rows = []
    for slide in map(Path, slides):
        start, bag = time.perf_counter(), slide.with_suffix(".h5")
        done = encode_slide(
            model, processor, slide, bag, tile_size=tile_size, batch_size=batch_size
        )
        seconds = time.perf_counter() - start
        rows.append({"tiles": done.tiles, "seconds": seconds, "peak": peak_memory()})
    return rows


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
