"""Fixtures of slide tests: a classifier of synthetic tiles, and outlines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from hf_glovlm.lab.slide_bench import GLASS, LESION, TISSUE

CLASSES = ("lesion", "tissue")  # in label order, which is sorted


def write_tiles(folder: Path, per_class: int = 6, side: int = 64, seed: int = 0) -> Path:
    """Squares of the colours and textures of `write_slide`, as an image folder."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side]
    rings = 34 * np.sin(np.hypot(across % 28 - 14, down % 28 - 14))
    for name, colour, texture in (("lesion", LESION, rings), ("tissue", TISSUE, 0 * rings)):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.normal(0, 14, size=(side, side, 1))
            pixels = np.array(colour) + texture[..., None] + noise
            if name == "tissue" and i % 2:  # the edge of a blob
                pixels[:, : side * i // (2 * per_class)] = GLASS
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.png")
    return folder


def train(folder: Path, *, mpp: float | None = None, confusion: Any = None) -> Path:
    """A run's folder with a linear probe on tiny CLIP; `results.json` only with a confusion."""
    from hf_glovlm import adapt, load_dataset

    rows = load_dataset(write_tiles(folder / "tiles"))["all"]
    adapted = adapt(str(tiny.tiny_clip()), "linear_probe", rows)
    adapted.model.config.mpp = mpp
    adapted.save(folder / "run" / "model")
    if confusion is not None:
        results = {"kind": "adaptation", "confusion_matrix": confusion}
        (folder / "run" / "results.json").write_text(json.dumps(results))
    return folder / "run"


def outline(x: float, y: float, side: float, name: str = "", **properties: Any) -> dict[str, Any]:
    """A square of QuPath's GeoJSON."""
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }
    return feature | ({"id": name} if name else {})


def write_outlines(path: Path, features: list[dict[str, Any]]) -> Path:
    """A GeoJSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path
