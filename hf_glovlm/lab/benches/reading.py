"""Benchmarks of reading images: a check of data, cold and warm, and what draft mode gains."""

import tempfile
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from ...backbones import load_backbone
from ...data import check_dataset, load_dataset, open_image
from ...inference import FeatureCache, embed_images
from ..phantoms import render_glomerulus
from .timing import Row, as_row, shortest, shortest_in_turn
from .towers import write_jpegs

_CLASSES = ("viable", "global_sclerosis")
_INPUT = 224  # side of a tower's input, in pixels


def bench_check(*, per_class: int = 50, side: int = 512, repeats: int = 3) -> Iterator[Row]:
    """Benchmark of `check_dataset` where nothing says what a group is: first time, and again.

    Args:
        per_class: JPEG files of each of two classes.
        side: Their height and width in pixels.
        repeats: Timings of each kind, of which the shortest counts.

    Yields:
        Two rows; the warm one's `ratio` is the cold time over the warm one.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "photographs", FeatureCache(Path(folder) / "features")
        for name in _CLASSES:
            (data / name).mkdir(parents=True)
            for seed in range(per_class):
                picture = render_glomerulus(name, seed=seed).image.resize((side, side))
                picture.save(data / name / f"{seed}.jpg", quality=90)
        # An earlier version keeps nothing.
        keeps = "cache" in signature(check_dataset).parameters
        options: dict[str, Any] = {"cache": cache} if keeps else {}

        def check(*, cold: bool) -> None:
            if cold:
                cache.clear()
            check_dataset(load_dataset(data), **options)

        cold = shortest(partial(check, cold=True), repeats)
        warm = shortest(partial(check, cold=False), repeats)
        what = f"`data check` of {2 * per_class} JPEG files of {side} px without groups"
        yield as_row("data.check_cold", cold, "s", None, f"{what}, nothing kept")
        note = f"{what}, what decoding said kept; ratio: times faster than the first"
        yield as_row("data.check", warm, "s", cold / warm, note)


def bench_draft(
    *, sides: tuple[int, ...] = (1024, 2048), files: int = 8, repeats: int = 5
) -> Iterator[Row]:
    """Benchmark of draft mode: decoding and preprocessing JPEG files far larger than the input.

    Args:
        sides: Heights and widths of the files in pixels.
        files: Files of each size.
        repeats: Timings of each kind, of which the shortest counts; the kinds take turns.

    Yields:
        A row a size, whose `ratio` is the time in full over that in draft mode, and a row of how
        far that moves the features of `mini`, the largest cosine distance.
    """
    model, processor = load_backbone("mini")
    own = load_backbone("mini")[1]
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": _INPUT}, {"height": _INPUT, "width": _INPUT}
    processor.draft = True
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            rows = write_jpegs(Path(folder) / str(side), files, side)

            def prepare(draft: int, rows: Any = rows) -> None:
                for value in rows["image"][:]:
                    processor(images=open_image(value, draft), return_tensors="pt")

            works = [partial(prepare, 0), partial(prepare, processor.draft_side)]
            whole, drafted = shortest_in_turn(works, repeats)
            note = f"decoding and preprocessing a JPEG of {side} px for {_INPUT} px in draft mode"
            note += "; ratio: times faster than in full"
            yield as_row(f"data.draft_{side}", 1000 * drafted / files, "ms", whole / drafted, note)
            unit = []
            for own.draft in (False, True):
                features = embed_images(model, own, rows)
                unit.append(features / np.linalg.norm(features, axis=1, keepdims=True))
            apart = 1 - float((unit[0] * unit[1]).sum(1).min())
            note = f"features of {files} such files by mini in draft mode, beside those in full"
            yield as_row(f"data.draft_{side}_change", apart, "cosine distance", None, note)
