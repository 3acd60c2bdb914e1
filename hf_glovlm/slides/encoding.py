"""Slide encoding: every tile with tissue to features, and to logits where the model has a head.

Tiles stream: threads read and preprocess the next batch while the model works on this one, and each
batch is on the disk before the next. So memory does not grow with the slide, and a killed run goes
on where it stopped.
"""

import math
import multiprocessing
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..environment import end_with_parent
from ..errors import GloVLMError, describe_error
from ..inference import encoder_key, exact_inference, load_classifier, resolve_device
from ..inference.engines import Engine, engine_device, open_engine
from ..inference.exported import is_export
from ..inference.prediction import class_names, to_array
from ..inference.scale import MAX_RATIO, describe_scale, input_mpp
from ..inference.stains import find_centres
from ..progress import counting
from .files.bags import BagWriter, read_attributes
from .files.tile_attributes import DEFAULT_ENGINE
from .files.tiles import TileGrid, lay_tiles
from .files.tissue import TissueMask, find_tissue
from .files.wsi import Slide, open_slide, slide_name
from .prefetching import read_batches

MIN_TISSUE = 0.25  # of a tile, by default
Progress = Callable[[int, int], object]  # tiles done, tiles in all


@dataclass(frozen=True)
class Encoded:
    """Result of encoding one slide.

    Attributes:
        path: The bag.
        name: Of the slide.
        tiles: Number of tiles.
        resumed_at: Tiles that an earlier run had left; equal to `tiles` if it had finished.
        mpp: Micrometres per pixel of the tiles; `None` is unknown.
        input_mpp: Micrometres per input pixel of the model; `None` is unknown.
        classes: Columns of the scores; empty for a model without a head.
        flags: What a person should know about the slide and its scale.
        source: Identity of the slide, as `describe_slide` gives it.
        notes: What lay there before and could not be used, and why.
        tissue: The slide's mask. It is as large as an overview, so what `encode_slides` returns
            lacks it; `on_done` gets it.
        tissue_fraction: Float32 `[tiles]`: the part of each that is tissue.
    """

    path: Path
    name: str
    tiles: int
    resumed_at: int
    mpp: float | None
    input_mpp: float | None
    classes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    source: Any = None
    notes: list[str] = field(default_factory=list)
    tissue: TissueMask | None = None
    tissue_fraction: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of one slide of several, or its error."""

    slide: Path
    encoded: Encoded | None = None
    error: str | None = None


def encode_slide(
    model: Any,
    processor: Any,
    slide_path: str | Path,
    output_path: str | Path,
    *,
    tile_size: int | None = None,
    mpp: float | None = None,
    overlap: float = 0.0,
    min_tissue: float = MIN_TISSUE,
    drop_pen: bool = True,
    batch_size: int = 32,
    slide_mpp: float | None = None,
    scene: str | None = None,
    stain: str | None = None,
    allow_scale: bool = False,
    device: str | torch.device | None = None,
    classify: bool = True,
    name: str | None = None,
    engine: Engine | None = None,
    reading_threads: int | None = None,
    on_progress: Progress | None = None,
) -> Encoded:
    """Encode the tiles of one slide into a bag.

    A run that was killed and resumed writes the same numbers as one that was not: to the last bit
    with the same batch size, number of threads and machine, else but for rounding. A finished bag
    of the same settings and slide is left as it is; one that is damaged, or of a slide whose bytes
    have changed, is written again. One process at a time writes a bag, which is not checked here.

    Args:
        model: A `GloVLMForImageClassification`, whose logits are stored too, or a `GloVLMModel`.
        processor: Its processor.
        slide_path: The slide.
        output_path: The bag to write, `NAME.h5`.
        tile_size: Side of a tile in pixels; the model's input by default.
        mpp: Micrometres per pixel at which tiles are cut. By default such that the model gets the
            scale that it was adapted at, where that and the slide's are known; else level 0.
        overlap: The part of its side that a tile shares with the next, 0 to 0.9.
        min_tissue: Least part of a tile that is tissue.
        drop_pen: Whether strokes of a pen are left out of the tissue.
        batch_size: Tiles at a time.
        slide_mpp: Micrometres per pixel of level 0, where the file's own is missing or wrong.
        scene: Which picture of a file that holds several: its number, from 1, or its name; by
            default the largest.
        stain: Of the slide, in its canonical name, for a classifier that centres by it.
        allow_scale: Accept a scale far from the model's, finer than the slide was scanned at, or
            a `slide_mpp` that contradicts the file.
        device: Where to compute; by default where the model is.
        classify: Whether a classifier's logits are stored.
        name: What the slide is called in the bag, which then holds neither its own name nor times.
        engine: What computes the tower, of this model on its device, see `open_engine`; by default
            PyTorch in fp32. A bag that was begun with another is refused.
        reading_threads: Threads that read tiles, see `prefetching.read_batches`; by default half of
            this process's share of the cores, 8 at most.
        on_progress: Called with the tiles done and the tiles in all, also before the first batch.

    Returns:
        What was written, and what to know about it.

    Raises:
        GloVLMError: The slide cannot be read or shows no tissue, its scale does not go with the
            model's, what lies at `output_path` has other settings, or features are not finite.
    """
    if batch_size < 1:
        raise GloVLMError(f"Expected a batch size of at least 1, found {batch_size}.")
    if device is not None:
        model.to(resolve_device(device))
    engine = engine or open_engine(model, processor)
    classes = class_names(model.config) if classify and hasattr(model, "classify_features") else []
    with open_slide(Path(slide_path), mpp=slide_mpp, scene=scene, allow_scale=allow_scale) as slide:
        tissue = find_tissue(slide, drop_pen=drop_pen)
        grid = _lay_tiles(
            model,
            processor,
            slide,
            tissue,
            tile_size=tile_size,
            mpp=mpp,
            overlap=overlap,
            min_tissue=min_tissue,
        )
        seen, notes = _check_scale(model, processor, slide, grid, allow_scale)
        writer = BagWriter(
            output_path,
            dim=int(model.config.image_feature_dim),
            n_scores=len(classes),
            attributes={"min_tissue": min_tissue, "drop_pen": drop_pen}
            | _describe(model, processor, slide, grid, classes, seen)
            | engine_attributes(engine)
            | ({"stain": stain} if getattr(model, "centres", None) is not None else {})
            | ({"name": name, "slide_file": name + slide.path.suffix} if name else {}),
            slide=slide.path,
            dated=name is None,
        )
        resumed_at = writer.rows
        if not writer.is_complete:
            resumed_at = _rows_to_keep(writer, grid, batch_size)
            notify = on_progress or (lambda done, total: None)
            notify(resumed_at, len(grid))
            counted = counting("tiles", len(grid), name=name or slide.name, done=resumed_at)
            batches = _batches(slide, grid, processor, resumed_at, batch_size, reading_threads)
            # Closed before the slide is: its threads may still be reading.
            with closing(batches), exact_inference(model), counted as count:
                for rows, inputs in batches:
                    features, scores = _encode(model, engine, inputs, bool(classes), stain)
                    writer.append(features, grid.coords[rows], scores)
                    notify(writer.rows, len(grid))
                    count.reach(writer.rows)
            writer.complete()
        return Encoded(
            path=writer.path,
            name=name or slide.name,
            tiles=len(grid),
            resumed_at=resumed_at,
            mpp=grid.mpp,
            input_mpp=seen,
            classes=classes,
            flags=[*slide.flags, *notes, *tissue.flags],
            source=writer.source,
            notes=writer.notes,
            tissue=tissue,
            tissue_fraction=grid.tissue_fraction,
        )


def encode_slides(
    slides: Iterable[str | Path],
    output_dir: str | Path,
    model: str,
    *,
    workers: int = 1,
    names: Sequence[str] | None = None,
    slide_mpp: Mapping[str, float | None] | float | None = None,
    scene: Mapping[str, str | None] | str | None = None,
    stain: Mapping[str, str | None] | str | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    runtime: str = "torch",
    kept: Mapping[str, Any] | None = None,
    on_done: Callable[[Outcome], object] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """Encode several slides over several processes, each with a model of its own.

    A slide that fails, or whose process is killed, does not keep the others from being encoded.
    What `auto` chooses holds for all slides.

    Args:
        slides: The files; their names without suffix must differ.
        output_dir: Where `NAME.h5` of every slide goes.
        model: What `load_encoder` takes.
        workers: Processes, each with its share of the processor's cores.
        names: What the slides are called, in place of their files' names; see `encode_slide`.
        slide_mpp: Micrometres per pixel of level 0 of every slide, or by the slide's name.
        scene: Which picture of every slide, or by the slide's name.
        stain: Of every slide, or by the slide's name.
        device: Where to compute; by default on the CPU.
        precision: As `open_engine` takes it.
        runtime: As `open_engine` takes it.
        kept: What `auto` stands for, see `open_engine`; by default what the bags in `output_dir`
            were computed by, else it is measured once, in this process.
        on_done: Called with each outcome as it comes.
        **settings: Of `encode_slide`, but for its engine; with several workers they are pickled, so
            `on_progress` must be a function of a module, and is called in the worker.

    Returns:
        One outcome a slide, in the order given.

    Raises:
        GloVLMError: No slide, two of one name, or no worker.
    """
    paths = [Path(path).expanduser() for path in slides]
    shown = [slide_name(path) for path in paths] if names is None else list(names)
    _check_names(shown)
    if workers < 1:
        raise GloVLMError(f"Expected at least one worker, found {workers}.")
    folder = Path(output_dir)
    jobs = [
        (
            path,
            folder / f"{name}.h5",
            {**settings, "slide_mpp": _given(slide_mpp, path), "scene": _given(scene, path)}
            | {"stain": _given(stain, path)}
            | ({"name": name} if names else {}),
        )
        for path, name in zip(paths, shown, strict=True)
    ]
    outcomes: dict[Path, Outcome] = {}

    def record(outcome: Outcome) -> None:
        if on_done is not None:
            on_done(outcome)
        encoded = outcome.encoded and replace(outcome.encoded, tissue=None)
        outcomes[outcome.slide] = replace(outcome, encoded=encoded)

    workers = min(workers, len(paths))
    choice = _Choice(model, device, precision, runtime, kept)
    if workers > 1 and kept is None and "auto" in (precision, runtime):
        choice = replace(choice, kept=choice.load(jobs)[-1].describe())
    if workers > 1:
        for outcome in _in_processes(choice, jobs, workers):
            record(outcome)
    else:
        encoder = choice.load(jobs)  # what is wrong with it is wrong for every slide
        for job in jobs:
            record(_attempt(encoder, *job))
    return [outcomes[path] for path in paths]


def load_encoder(name: str, *, exported: bool = False) -> tuple[Any, Any]:
    """Load a classifier of ours or a backbone.

    Args:
        name: A run's folder or its `model/`, or whatever `load_backbone` takes.
        exported: Whether a folder that `glovlm export` wrote serves, too, see `load_classifier`.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        GloVLMError: There is none of that name.
    """
    folder = Path(name).expanduser()
    if is_export(folder):
        model, processor, _ = load_classifier(name, exported=exported)
        return model, processor
    for config in (folder / "config.json", folder / "model" / "config.json"):
        if config.is_file() and "GloVLMForImageClassification" in config.read_text("utf-8"):
            model, processor, _ = load_classifier(name)
            return model, processor
    return load_backbone(name)


def open_bag_engine(
    model: Any,
    processor: Any,
    bags: Path,
    precision: str,
    runtime: str,
    *,
    kept: Mapping[str, Any] | None = None,
    slides: Sequence[Path] = (),
    tiling: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Engine:
    """Open the engine that fills bags: `auto` is what those that are there were computed by.

    Where there are none it is measured, on tiles of the first slide that can be read.

    Args:
        model: The model, on the device where it is to compute.
        processor: Its processor.
        bags: Folder of bags, finished or not; it need not be there.
        precision: As `open_engine` takes it.
        runtime: As `open_engine` takes it.
        kept: What `auto` stands for, whatever the bags state.
        slides: Those to come.
        tiling: Settings of `encode_slide` that decide their tiles.
        on_note: Called with sentences for a person.

    Raises:
        GloVLMError: See `open_engine`.
    """
    if kept is None and "auto" in (precision, runtime) and bags.is_dir():
        fingerprint = encoder_fingerprint(model, processor)
        for attributes in map(read_attributes, sorted(bags.iterdir())):
            if attributes.get("fingerprint") == fingerprint:
                kept = DEFAULT_ENGINE | {k: attributes[k] for k in _ENGINE if k in attributes}
                break
    tiles, count = list[Any](), None
    if kept is None and "auto" in (precision, runtime):
        for slide in slides:
            with suppress(Exception):  # what is wrong with it is said when it is encoded
                tiles, count = _some_tiles(model, processor, slide, dict(tiling or {}))
                break
    return open_engine(
        model,
        processor,
        precision=precision,
        runtime=runtime,
        kept=kept,
        images=tiles,
        workload=count and count * len(slides),
        on_note=on_note,
    )


def _some_tiles(
    model: Any, processor: Any, path: Path, tiling: dict[str, Any]
) -> tuple[list[Any], int]:
    """Some tiles of a slide, spread over its tissue, and how many it has."""
    mpp, scene = tiling.get("slide_mpp"), tiling.get("scene")
    with open_slide(path, mpp=mpp, scene=scene, allow_scale=True) as slide:
        grid = _lay_tiles(
            model,
            processor,
            slide,
            find_tissue(slide, drop_pen=tiling.get("drop_pen", True)),
            tile_size=tiling.get("tile_size"),
            mpp=tiling.get("mpp"),
            overlap=tiling.get("overlap", 0.0),
            min_tissue=tiling.get("min_tissue", MIN_TISSUE),
        )
        size, scale = grid.extent, grid.downsample
        places = grid.coords[np.linspace(0, len(grid) - 1, SEEN).astype(int)].tolist()
        return [slide.read(x, y, size, size, downsample=scale) for x, y in places], len(grid)


SEEN = 8  # tiles on which `auto` checks that features agree with those in fp32
_ENGINE = (*DEFAULT_ENGINE, "measured")  # attributes that say what computed a bag


def engine_attributes(engine: Engine) -> dict[str, Any]:
    """Attributes by which a bag states its engine: none for the default, PyTorch in fp32.

    So bags from before there was a choice stand beside new ones.
    """
    about = engine.describe()
    is_default = {name: about[name] for name in DEFAULT_ENGINE} == DEFAULT_ENGINE
    return {k: v for k, v in about.items() if v and not (is_default and k in DEFAULT_ENGINE)}


def input_side(image_processor: Any) -> int:
    """Side in pixels of a tile that the image transform need not resize."""
    sizes = [image_processor.size] if image_processor.do_resize else []
    for size in (*sizes, getattr(image_processor, "crop_size", None)):
        for key in ("shortest_edge", "height"):
            if size and size[key]:
                return int(size[key])
    patches = int(image_processor.max_num_patches)  # SigLIP 2 fills up a number of patches
    return math.isqrt(patches) * int(image_processor.patch_size)


# --------------------------------------------------------------------------------------- scale


def _lay_tiles(
    model: Any,
    processor: Any,
    slide: Slide,
    tissue: TissueMask,
    *,
    tile_size: int | None,
    mpp: float | None,
    overlap: float,
    min_tissue: float,
) -> TileGrid:
    """Tiles of the size and scale given, else of the model's own input size and scale."""
    side = tile_size or input_side(processor.image_processor)
    adapted = model.config.mpp
    if mpp is None and adapted is not None and slide.mpp is not None:
        mpp = float(adapted) / input_mpp(processor.image_processor, 1.0, side, side)
    return lay_tiles(slide, tissue, tile_size=side, mpp=mpp, overlap=overlap, min_tissue=min_tissue)


def _check_scale(
    model: Any, processor: Any, slide: Slide, grid: TileGrid, allow: bool
) -> tuple[float | None, list[str]]:
    """Micrometres per input pixel, refused as by `scale.check_scale`, and notes on it."""
    adapted = model.config.mpp
    if grid.mpp is None or slide.mpp is None:
        adapted_at = "" if adapted is None else f", and the model was adapted at {adapted:.3g}"
        return None, [f"the scale of the tiles is unknown: level 0 was cut as it is{adapted_at}"]
    if grid.downsample * MAX_RATIO < 1 and not allow:
        raise GloVLMError(
            f"Tiles of {grid.mpp:.3g} micrometres per pixel were asked for, and {slide.path} was "
            f"scanned at {slide.mpp:.3g}: what is finer is not in it. Use a finer scan, a coarser "
            "--tile-mpp, or give --allow-scale."
        )
    seen = input_mpp(processor.image_processor, grid.mpp, grid.size_px, grid.size_px)
    if adapted is None:
        note = f"the model's own scale is unknown; tiles reach it at {seen:.3g} micrometres a pixel"
        return seen, [note]
    ratio = max(adapted / seen, seen / adapted)
    if ratio <= MAX_RATIO:
        return seen, []
    if not allow:
        raise GloVLMError(
            f"The model was adapted at {adapted:.3g} micrometres per input pixel, and tiles of "
            f"{slide.path} would reach it at {seen:.3g}: {ratio:.1f} times apart, at most "
            f"{MAX_RATIO:g}. Leave --tile-mpp out, correct --mpp, or give --allow-scale."
        )
    return seen, [f"tiles reach the model {ratio:.1f} times off the scale it was adapted at"]


def _describe(
    model: Any,
    processor: Any,
    slide: Slide,
    grid: TileGrid,
    classes: list[str],
    seen: float | None,
) -> dict[str, Any]:
    """Attributes of a bag: all that determines its rows; CLAM and TRIDENT read the first names."""
    zoom = slide.magnification
    return {
        "name": slide.name,
        "patch_size": grid.extent,
        "patch_size_level0": grid.extent,
        "patch_level": 0,
        "level0_magnification": zoom,
        "target_magnification": None if zoom is None else zoom / grid.downsample,
        "level0_width": slide.size[0],
        "level0_height": slide.size[1],
        "overlap": grid.extent - grid.step,
        "overlap_fraction": grid.overlap,
        "tiles": len(grid),
        "tile_size": grid.size_px,
        "tile_mpp": grid.mpp,
        "input_mpp": describe_scale(seen),
        "slide_mpp": slide.mpp,
        "slide_mpp_source": slide.mpp_source,
        "slide_file": slide.path.name,
        **({} if slide.scene is None else {"scene": slide.scene}),
        "encoder": str(model.config.backbone_name or ""),
        "fingerprint": encoder_fingerprint(model, processor),
        "classes": classes,
        "synthetic": bool(model.config.synthetic),
    }


def encoder_fingerprint(model: Any, processor: Any) -> str:
    """Hash of the encoder: transform, towers, projection and head."""
    backbone = getattr(model, "glovlm", model)
    config = model.config
    digest = xxhash.xxh3_128(encoder_key(backbone, processor).encode())
    about = (config.head, config.temperature, config.prior_shift)
    about += (config.stain_centres,) if config.stain_centres else ()
    digest.update(repr(about).encode())
    # The vision tower is in the key already; texts count where the head encodes them anew.
    reads_texts = getattr(getattr(model, "head", None), "needs_model", False)
    inside = (".vision_model.",) if reads_texts else (".vision_model.", ".text_model.")
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in inside):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


# ------------------------------------------------------------------------------------- batches


def _rows_to_keep(writer: BagWriter, grid: TileGrid, batch_size: int) -> int:
    """Rows to resume after: whole batches, so that each batch is that of an unbroken run."""
    rows = min(writer.rows, len(grid))
    if not np.array_equal(writer.read_coords()[:rows], grid.coords[:rows]):
        writer.notes.append(f"{writer.part.name} holds other tiles")
        rows = 0
    if rows < len(grid):
        rows -= rows % batch_size
    writer.keep(rows)
    return rows


def _batches(
    slide: Slide, grid: TileGrid, processor: Any, start: int, size: int, threads: int | None
) -> Generator[tuple[slice, dict[str, Any]]]:
    """Batches of preprocessed tiles, read ahead."""

    def read(corner: Any) -> Any:
        x, y = map(int, corner)
        return slide.read(x, y, grid.extent, grid.extent, downsample=grid.downsample)

    def preprocess(tiles: list[Any]) -> dict[str, Any]:
        return dict(processor(images=tiles, return_tensors="pt"))

    return read_batches(
        grid.coords, read, preprocess, batch_size=size, start=start, threads=threads
    )


def _encode(
    model: Any, engine: Engine, inputs: dict[str, Any], classify: bool, stain: str | None
) -> tuple[Any, Any]:
    """Features `[n, dim]` and logits `[n, classes]` (or `None`) of one batch, as arrays."""
    try:
        pooled, _ = engine.pool(inputs)
        features = getattr(model, "glovlm", model).project_images(pooled.to(model.dtype))
        centres = model.centres if classify else None
        ids = None
        if centres is not None:
            ids = find_centres(centres, [stain] * len(features)).to(features.device)
        logits = model.classify_features(features, ids) if classify else None
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        device = next(model.parameters()).device
        raise GloVLMError(
            f"{len(inputs['pixel_values'])} tiles at a time do not fit into the memory of device "
            f"'{device}': lower --batch-size; the run goes on where it stopped."
        ) from None
    features = features[:, : model.config.image_feature_dim]  # an exported graph has more
    return to_array(features), None if logits is None else to_array(logits)


# ----------------------------------------------------------------------------------- processes

_Encoder = tuple[Any, Any, Engine]  # model, processor and what computes its tower


@dataclass(frozen=True)
class _Choice:
    """What encodes slides, before it is loaded: handed to every worker."""

    model: str
    device: str | torch.device | None
    precision: str
    runtime: str
    kept: Mapping[str, Any] | None

    def load(self, jobs: Sequence["_Job"]) -> _Encoder:
        """The encoder of some slides."""
        model, processor = load_encoder(self.model, exported=True)
        if self.device is not None:
            model.to(engine_device(str(self.device), self.runtime, self.precision))
        slides, bags, tiling = [job[0] for job in jobs], jobs[0][1].parent, jobs[0][2]
        about = (self.precision, self.runtime)
        engine = open_bag_engine(
            model, processor, bags, *about, kept=self.kept, slides=slides, tiling=tiling
        )
        return model, processor, engine


GRACE = 10.0  # seconds in which a worker closes its slide
_Job = tuple[Path, Path, dict[str, Any]]  # slide, bag, settings of encode_slide
_KILLED = (
    "The process that encoded {path} was killed, as happens when memory runs out: use fewer "
    "workers or a smaller batch; the run goes on where it stopped."
)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise GloVLMError("Expected at least one slide, found none: correct the path or pattern.")
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise GloVLMError(
            f"Two slides are called {twice[0]}, and each writes {twice[0]}.h5: rename one, or "
            "write them to different folders."
        )


def _given(given: Any, path: Path) -> Any:
    """What was given for all slides, or for this one by its name."""
    return given.get(slide_name(path)) if isinstance(given, dict) else given


def _attempt(encoder: _Encoder, slide: Path, bag: Path, settings: dict[str, Any]) -> Outcome:
    """Encode one slide; an error becomes its outcome."""
    model, processor, engine = encoder
    try:
        encoded = encode_slide(model, processor, slide, bag, engine=engine, **settings)
        return Outcome(slide, encoded)
    except Exception as error:  # whatever is wrong with one slide stays with it
        return Outcome(slide, error=describe_error(error))


def _work(connection: Connection, choice: _Choice, threads: int) -> None:
    """Worker process: encode the slides that it is given; the model is loaded with the first."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by closing what is open
    encoder: _Encoder | None = None
    with suppress(EOFError, OSError):  # the parent has no further slide
        while True:
            job: _Job = connection.recv()
            try:
                if encoder is None:
                    torch.set_num_threads(threads)
                    encoder = choice.load([job])
                outcome = _attempt(encoder, *job)
            except GloVLMError as error:
                outcome = Outcome(job[0], error=str(error))
            connection.send(outcome)


def _in_processes(choice: _Choice, jobs: Sequence[_Job], workers: int) -> Iterator[Outcome]:
    """Outcomes in the order in which slides are done.

    Each thread owns one process, so that a process which is killed takes along the one slide that
    it was at; a pool of many would lose them all.
    """
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    mine = threading.local()
    started: list[tuple[BaseProcess, Connection]] = []
    lock, ended = threading.Lock(), threading.Event()

    def start() -> Connection:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, choice, threads), daemon=True)
        if hasattr(
            signal, "pthread_sigmask"
        ):  # a process has the mask of the thread that starts it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with lock:
            if ended.is_set():
                raise EOFError
            process.start()
            started.append((process, ours))
        theirs.close()  # so that its end is noticed here
        return ours

    def encode_alone(job: _Job) -> Outcome:
        try:
            if getattr(mine, "connection", None) is None:
                mine.connection = start()
            mine.connection.send(job)
            outcome: Outcome = mine.connection.recv()
        except (EOFError, OSError):
            mine.connection = None
            return Outcome(job[0], error=_KILLED.format(path=job[0]))
        return outcome

    executor = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([executor.submit(encode_alone, job) for job in jobs]):
            yield future.result()
        for _, connection in started:  # idle; they end when nothing more can come
            connection.close()
    finally:
        with lock:
            ended.set()
        executor.shutdown(wait=False, cancel_futures=True)
        for process, connection in started:
            if not connection.closed:  # the command was interrupted
                process.terminate()
        for process, connection in started:
            process.join(GRACE)
            process.kill()
            process.join()
            connection.close()
        executor.shutdown()
