"""Finding of glomeruli on slides (`glovlm find run`): a file of outlines for each slide.

A slide is read in windows, and of each only outlines stay, so memory does not grow with it. What
the windows showed is kept as they come, so a run that was killed goes on within a slide. A finished
file states what it was made from and a digest of its features: it stays where nothing has changed,
and one that a reader has changed is never replaced.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data.stains import find_stain_in_name, is_same_stain, name_stain
from ...errors import GloVLMError, WriteError, describe_error
from ...files import (
    LOCK,
    UNFINISHED,
    changed_inputs,
    check_kind,
    digest_value,
    explaining_disk,
    finish_move,
    one_writer,
    put_in_place,
    read_json,
    read_manifest,
    refuse_damage,
    remove,
    staging,
    write_csv,
    write_json,
)
from ...inference import resolve_device
from ...inference.scale import MAX_RATIO
from ...progress import counted, counting, showing
from ...tables import spelling
from ..encoding import load_encoder
from ..files.annotations import SlideObject, make_collection, polygon_object, write_collection
from ..files.case_table import agreed, read_case_table
from ..files.coordinates import Origin, parse_origin
from ..files.geojson import make_id
from ..files.region_images import is_region_image, list_pictures, open_picture
from ..files.shapes import Ring, draw, ring_area
from ..files.tissue import TissueMask, find_tissue
from ..files.wsi import Slide, describe_slide, slide_name
from ..prefetching import read_batches
from ..report import clean_text
from .config import FindConfig
from .folder import KIND as FINDER
from .folder import SHORT, fingerprint_finder
from .learning import Finder, read_config
from .windows import Part, WindowGrid, join_parts, lay_windows, place_detections, read_part

KIND = "findings"
RESULT_FILES = ("summary.csv", "results.json")
KEPT = ".windows"  # in the output folder: what the windows of unfinished slides showed
MEMBER = "findings"  # of a file of outlines: what it was made from, and the slide's entry
SCORE, CUT = "finder score", "cut by border"  # names of these measurements in GeoJSON
FRAGMENT = 0.5  # of the least diameter of the support: what is smaller is no glomerulus
LEAST_TISSUE = 0.5  # part of an outline that is tissue
NOTED = 1.1  # times coarser than the regions, from which a note says so
VERSION = 1  # of what is written for a slide; raise it when an old one may not stand in for a new

logger = logging.getLogger("hf_glovlm")
Event = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class _Task:
    """One slide of a run: its file, name, scale, scene and stain."""

    path: Path
    name: str
    mpp: float | None
    scene: str | None
    stain: str | None

    def hide(self, text: str) -> str:
        """Remove the machine's paths from a sentence."""
        return clean_text(text, self.path, self.name)


@dataclass(frozen=True)
class _Run:
    """One run: its config, folder and finder."""

    config: FindConfig
    output: Path
    finder: Finder
    fingerprint: str  # of the finder's files
    notify: Event

    @property
    def threshold(self) -> float:
        """Least score of what is reported."""
        given = self.config.threshold
        return self.finder.threshold if given is None else given

    @property
    def made_from(self) -> dict[str, Any]:
        """What determines the outlines of every slide."""
        settings = self.config.result_settings() | {"threshold": self.threshold}
        return {"version": VERSION, "finder": self.fingerprint, **settings}


def find_on_slides(
    config: FindConfig, *, on_event: Event | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Find glomeruli on slides and write their outlines into a folder.

    `O/NAME.geojson` for each slide, as `glovlm slide --objects O` and QuPath take it; over all
    slides `results.json` and `summary.csv`.

    Args:
        config: What to do.
        on_event: Progress: `("stage", {"name"})`, `("windows", {"slide", "done", "total"})`,
            `("slide", {"slide", "status", "error", "n"})`.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        The content of `results.json`: `kind`, `research_use_only`, `synthetic`, `finder`
        (`fingerprint`, `head`, `backbone`, `mpp`, `stains`, `left_out`), `threshold`, `settings`,
        `slides` (each with `status` `done` or `failed`, `error`, `n`, `cut_by_border`, `left_out`
        by reason, `mpp`, `downsample`, `windows`, `stain`, `tissue`, `origin`, `notes`), `n`,
        `failed` (their number). The same for a run that was killed and started again.

    Raises:
        GloVLMError: The finder or a table cannot be read, two slides share a name, or the folder
            holds something else. What is wrong with one slide stands in the results.
    """
    output = Path(config.output_dir).expanduser()
    with one_writer(output), showing(progress) as show:
        finish_move(output / UNFINISHED, output)
        remove(output / UNFINISHED)
        _check_output(config, output)
        tasks = _plan(config)
        run = _prepare(config, output, on_event or show)
        entries: dict[str, dict[str, Any]] = {}
        try:
            for task in counted(tasks, "slides"):
                entries[task.name] = entry = _find(task, run)
                shown = ("slide", "status", "error", "n")
                run.notify("slide", {name: entry.get(name) for name in shown})
        except KeyboardInterrupt:
            logger.warning(
                "%d of %d slides are done; the same command goes on with the others, also within "
                "one.", len(entries), len(tasks),
            )  # fmt: skip
            raise
        with suppress(OSError):  # of a slide that failed
            (output / KEPT).rmdir()
        results = _results(run, [entries[task.name] for task in tasks])
        with staging(output) as work:
            _write_summary(work / "summary.csv", results)
            write_json(work / "results.json", results, allow_nan=False)
            put_in_place(work, output, RESULT_FILES)
    return results


# ---------------------------------------------------------------------------------- what to do


def _check_output(config: FindConfig, output: Path) -> None:
    """Refuse a folder that holds something else."""
    if output.resolve() == Path(config.finder).expanduser().resolve():
        raise GloVLMError(f"'{output}' is the finder's folder: give another --output-dir.")
    names = {path.name for path in output.iterdir()} - {LOCK, KEPT}
    with suppress(GloVLMError):
        if "results.json" in names and read_json(output / "results.json").get("kind") == KIND:
            return
    foreign = [
        name
        for name in sorted(names)
        if not name.endswith(".geojson") or _read_member(output / name) is None
    ]
    if foreign:
        raise GloVLMError(
            f"Output folder '{output}' holds files that are no outlines of a finder "
            f"({foreign[0]}): give an empty or a new folder."
        )


def _plan(config: FindConfig) -> list[_Task]:
    """Tasks of the run: slides with their names, scale, scene and stain."""
    barred = (Path(config.output_dir).expanduser(), Path(config.finder).expanduser())
    paths = [
        path for given in config.slides for path in list_pictures(Path(given).expanduser(), barred)
    ]
    paths = list(dict.fromkeys(paths))
    twice = [name for name, n in Counter(map(slide_name, paths)).items() if n > 1]
    if twice:
        raise GloVLMError(
            f"Two slides are called {twice[0]}, so their outlines would share a file: rename one."
        )
    table = read_case_table(Path(config.cases).expanduser()) if config.cases else None
    for sentence in [] if table is None else table.notes:
        logger.warning(sentence)
    tasks = []
    for path in paths:
        name, mpp, scene = slide_name(path), config.mpp, config.scene
        stain = name_stain(config.stain)
        if table is not None:
            row = table.row_of(path)
            mpp = agreed("--mpp", mpp, row.mpp, name, table.path)
            scene = agreed("--scene", scene, row.scene, name, table.path)
            stain = agreed("--stain", stain, name_stain(row.stain), name, table.path)
        tasks.append(_Task(path, name, mpp, scene, stain))
    return tasks


def _prepare(config: FindConfig, output: Path, notify: Event) -> _Run:
    """Load the finder and the backbone that it was learned on."""
    folder = Path(config.finder).expanduser()
    if not folder.is_dir():
        raise GloVLMError(f"There is no folder '{folder}': give what `glovlm find train` wrote.")
    check_kind(folder, FINDER)
    manifest = read_manifest(folder)
    if manifest is not None:
        refuse_damage(folder, manifest)
    about = read_config(folder)
    name = config.backbone or about["backbone"]
    notify("stage", {"name": f"loading the finder and its backbone {name}"})
    try:
        model, processor = load_encoder(name)
    except GloVLMError as error:
        if config.backbone:
            raise
        raise GloVLMError(
            f"The finder was learned on the backbone '{name}', which is not at hand by this name: "
            f"say where it lies (--backbone). {error}"
        ) from error
    model.to(resolve_device(config.device))
    finder = Finder.load(folder, getattr(model, "glovlm", model), processor)
    return _Run(config, output, finder, fingerprint_finder(folder), notify)


# ------------------------------------------------------------------------------------- a slide


def _find(task: _Task, run: _Run) -> dict[str, Any]:
    """Entry of one slide in the results, its file in place; or the error of one that failed."""
    try:
        own = {"mpp": task.mpp, "scene": task.scene, "stain": task.stain}
        if not task.path.is_file():
            raise GloVLMError(f"There is no slide {task.path}: correct the path.")
        made_from = {**run.made_from, **own, "slide": describe_slide(task.path, dated=False)}
        path = run.output / f"{task.name}.geojson"
        finished = _finished(path, made_from, task)
        if finished is not None:
            return finished
        with open_picture(
            task.path, mpp=task.mpp, scene=task.scene, allow_scale=run.config.allow_scale
        ) as slide:
            return _find_on(slide, task, run, made_from, path)
    except WriteError:  # no room for the others either
        raise
    except Exception as error:  # whatever is wrong with one slide stays with it
        return {
            "slide": task.name,
            "status": "failed",
            "error": task.hide(describe_error(error)),
            "notes": [],
        }


def _read_member(path: Path) -> dict[str, Any] | None:
    """What a file of ours states of itself; `None` of any other file, or one that was changed."""
    with suppress(GloVLMError, OSError, RecursionError):
        content = read_json(path, most=2**30)
        member = content.get(MEMBER)
        parts = (member.get("entry"), member.get("made_from")) if isinstance(member, dict) else ()
        same = parts and member.get("features") == digest_value(content.get("features"))
        if same and all(isinstance(part, dict) for part in parts):
            return dict(member)
    return None


def _finished(path: Path, made_from: Mapping[str, Any], task: _Task) -> dict[str, Any] | None:
    """Entry of a slide that an earlier run finished, if nothing has changed since.

    Raises:
        GloVLMError: What lies there is not what a finder wrote.
    """
    if not os.path.lexists(path):
        return None
    member = _read_member(path)
    if member is None:
        raise GloVLMError(
            f"{path.name} in the output folder is not as a finder wrote it (a reader may have "
            "corrected it), and is not replaced: move it, or give another --output-dir."
        )
    again = changed_inputs(member["made_from"], made_from)
    if not again:
        entry: dict[str, Any] = member["entry"]
        return entry
    logger.warning("%s is done again: %s", task.name, "; ".join(again))
    return None


def _find_on(
    slide: Slide, task: _Task, run: _Run, made_from: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Find the glomeruli of an open slide and write their outlines; its entry."""
    finder, config = run.finder, run.config
    origin = parse_origin(config.origin, slide.bounds)
    downsample = finder.downsample(slide.mpp)
    notes = [*slide.flags, *_scale_notes(run, slide), *_stain_notes(finder, task)]
    # A region image was taken of tissue, and may show it from edge to edge.
    tissue = None
    if not is_region_image(task.path):
        tissue = find_tissue(slide, drop_pen=config.drop_pen)
        notes += tissue.flags
        if not tissue.array.any():
            notes.append("No tissue was seen on the slide, so nothing was searched.")
    grid = lay_windows(slide.size, downsample, finder.diameters[2], tissue)
    kept = run.output / KEPT / f"{task.name}.jsonl"
    parts = _read_windows(slide, grid, task, run, made_from, kept)
    joined = join_parts(parts)
    objects, left_out = _plausible(joined.objects, grid, finder, tissue)
    notes += _joining_notes(joined.joined, joined.unconfirmed, left_out)
    if finder.synthetic:
        notes.append("The finder learned from synthetic images: it finds nothing of a kidney.")
    entry: dict[str, Any] = {
        "slide": task.name,
        "status": "done",
        "n": len(objects),
        "cut_by_border": sum(part.cut for part in objects),
        "left_out": left_out,
        "size": list(slide.size),
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "downsample": downsample,
        "windows": len(grid.boxes),
        "stain": task.stain,
        "tissue": None if tissue is None else tissue.summary(),
        "origin": origin.describe(),
        "notes": list(dict.fromkeys(map(task.hide, notes))),
    }
    _write_outlines(path, task, run, objects, origin, made_from, entry)
    remove(kept)
    return entry


def _read_windows(
    slide: Slide,
    grid: WindowGrid,
    task: _Task,
    run: _Run,
    made_from: Mapping[str, Any],
    kept: Path,
) -> list[Part]:
    """What all windows show; those that an earlier run has seen are read from what it kept."""
    begun = digest_value([dict(made_from), list(map(list, grid.boxes)), grid.downsample])
    seen = _read_kept(kept, begun, len(grid.boxes))
    total = len(grid.boxes)
    run.notify("windows", {"slide": task.name, "done": len(seen), "total": total})
    with explaining_disk(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        lines = [begun, *([part.describe() for part in parts] for parts in seen)]
        # Written anew: a line that a kill cut short is no longer there.
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        batches = read_batches(
            grid.boxes,
            lambda box: np.asarray(slide.read(*box, downsample=grid.downsample)),
            list,
            batch_size=run.config.batch_size,
            start=len(seen),
        )
        count = counting("windows", total, name=task.name, done=len(seen))
        with kept.open("a", encoding="utf-8") as file, closing(batches), count as windows:
            for rows, pictures in batches:
                for box, picture, detections in zip(
                    grid.boxes[rows],
                    pictures,
                    run.finder.detect_many(pictures, threshold=run.threshold),
                    strict=True,
                ):
                    size = picture.shape[1], picture.shape[0]
                    parts = place_detections(detections, box, size, slide.size)
                    seen.append(parts)
                    file.write(json.dumps([part.describe() for part in parts]) + "\n")
                file.flush()
                run.notify("windows", {"slide": task.name, "done": len(seen), "total": total})
                windows.reach(len(seen))
    return [part for parts in seen for part in parts]


def _read_kept(path: Path, begun: str, most: int) -> list[list[Part]]:
    """What an earlier run's windows showed, window by window, up to where it stopped."""
    if not path.is_file():
        return []
    first, *lines = path.read_text("utf-8", errors="replace").split("\n")
    windows: list[list[Part]] = []
    with suppress(ValueError, KeyError, TypeError):
        if json.loads(first) != begun:
            return []
        for line in lines[:most]:
            windows.append([read_part(values) for values in json.loads(line)])
    return windows


def _plausible(
    objects: Sequence[Part], grid: WindowGrid, finder: Finder, tissue: TissueMask | None
) -> tuple[list[Part], dict[str, int]]:
    """Objects as large as glomeruli are, on tissue; and how many were left out, by reason."""
    least = FRAGMENT * finder.diameters[0] * grid.downsample
    kept: list[Part] = []
    left_out: Counter[str] = Counter()
    for part in objects:
        ring = np.array(part.ring)
        if 2 * math.sqrt(ring_area(ring) / math.pi) < least:
            left_out["smaller than a glomerulus"] += 1
        elif tissue is not None and _on_tissue(ring, tissue) < LEAST_TISSUE:
            left_out["not on tissue"] += 1
        else:
            kept.append(part)
    return kept, dict(sorted(left_out.items()))


def _on_tissue(ring: Ring, tissue: TissueMask) -> float:
    """Part of what a ring holds that is tissue."""
    scaled = ring / tissue.downsample
    low = np.floor(scaled.min(axis=0)).astype(int)
    high = np.minimum(np.ceil(scaled.max(axis=0)).astype(int) + 1, tissue.array.shape[::-1])
    width, height = np.maximum(high - low, 1).tolist()
    inside = draw([(scaled,)], float(low[0]), float(low[1]), 1.0, (width, height))
    mask = tissue.array[low[1] : low[1] + height, low[0] : low[0] + width]
    inside = inside[: mask.shape[0], : mask.shape[1]]
    return float(mask[inside].mean()) if inside.any() else 0.0


def _write_outlines(
    path: Path,
    task: _Task,
    run: _Run,
    objects: Sequence[Part],
    origin: Origin,
    made_from: Mapping[str, Any],
    entry: Mapping[str, Any],
) -> None:
    """Write the outlines of a slide, with what they were made from."""
    short = run.fingerprint[:SHORT]
    collection = make_collection(
        [_object(part, task.name, short) for part in objects],
        measurements=[{SCORE: part.score, CUT: float(part.cut)} for part in objects],
        origin=origin,
    )
    features = json.loads(json.dumps(collection.pop("features")))
    about = {"made_from": dict(made_from), "entry": entry, "features": digest_value(features)}
    write_collection(path, collection | {MEMBER: about, "features": features})


def _object(part: Part, slide: str, finder: str) -> SlideObject:
    """Annotation of a glomerulus: without a class, as nobody has looked at it."""
    item = polygon_object(part.ring)
    properties = {"objectType": "annotation", "metadata": {"finder": finder}}
    return replace(item, id=make_id(slide, item.geometry), properties=properties)


# ------------------------------------------------------------------------------------- notes


def _scale_notes(run: _Run, slide: Slide) -> list[str]:
    """Sentences about the scale beside that of the finder's regions.

    Raises:
        GloVLMError: The slide is far coarser than they are.
    """
    finder = run.finder
    if finder.mpp is None:
        return [
            "The regions that the finder learned from state no scale, so the pixels of this slide "
            "are taken to be as large as theirs: on another magnification it finds little."
        ]
    learned = finder.mpp / finder.scale  # micrometres per pixel of its regions
    coarser = (slide.mpp or learned) / learned
    if coarser > MAX_RATIO and not run.config.allow_scale:
        raise GloVLMError(
            f"The finder learned from regions of {learned:.3g} micrometres per pixel, and "
            f"{slide.path} was scanned at {slide.mpp:.3g}: what is finer is not in it. Use a finer "
            "scan, or give --allow-scale."
        )
    if coarser > NOTED:
        return [
            f"The slide was scanned at {slide.mpp:.3g} micrometres per pixel, coarser than the "
            f"{learned:.3g} of the regions that the finder learned from."
        ]
    return []


def _stain_notes(finder: Finder, task: _Task) -> list[str]:
    """Sentences about the stain beside those of the finder's regions."""
    by_name = find_stain_in_name(slide_name(task.path))
    known = {*map(spelling, finder.stains)}
    stains = " and ".join(finder.stains)
    notes = []
    if task.stain is not None and by_name is not None and not is_same_stain(task.stain, by_name):
        notes.append(
            f"The stain is stated as {task.stain}, and the slide's name says {by_name}: check "
            "which is right; what is stated counts."
        )
    if task.stain is not None and known and spelling(task.stain) not in known:
        notes.append(f"The slide is stained {task.stain}, and the finder learned from {stains}.")
    if task.stain is None and known:
        seems = "" if by_name is None else f"; its name seems to say {by_name}"
        notes.append(
            f"The slide's stain is not stated (--stain, or a column stain of --cases){seems}; the "
            f"finder learned from {stains}."
        )
    return notes


def _joining_notes(joined: int, unconfirmed: int, left_out: Mapping[str, int]) -> list[str]:
    """Sentences about what was joined of windows, and what was not reported."""
    notes = []
    if joined:
        notes.append(
            f"{joined} outlines are larger than any glomerulus that the finder learned from and "
            "were joined of parts: look at them."
        )
    if unconfirmed:
        notes.append(
            f"{unconfirmed} outlines that the border of a window cut are left out, as the window "
            "that shows the whole place outlines nothing there."
        )
    if left_out:
        listed = ", ".join(f"{reason} ({n})" for reason, n in left_out.items())
        notes.append(f"{sum(left_out.values())} outlines are not reported: {listed}.")
    return notes


# ------------------------------------------------------------------------------------- results


def _results(run: _Run, slides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Content of `results.json`."""
    finder = run.finder
    return {
        "kind": KIND,
        "research_use_only": True,
        "synthetic": finder.synthetic,
        "finder": {
            "fingerprint": run.fingerprint,
            "head": finder.head.name,
            "backbone": finder.backbone,
            "mpp": finder.mpp,
            "stains": finder.stains,
            "left_out": finder.left_out,
            "notes": finder.notes,
        },
        "threshold": run.threshold,
        "settings": run.config.result_settings(),
        "slides": list(slides),
        "n": sum(int(entry.get("n") or 0) for entry in slides),
        "failed": sum(entry["status"] != "done" for entry in slides),
    }


def _write_summary(path: Path, results: Mapping[str, Any]) -> None:
    """`summary.csv`: a row a slide."""
    header = ["slide", "status", "n", "cut_by_border", "threshold", "mpp", "stain", "notes"]
    rows = [
        [
            entry["slide"],
            entry["status"],
            entry.get("n"),
            entry.get("cut_by_border"),
            results["threshold"],
            entry.get("mpp"),
            entry.get("stain"),
            entry.get("error") or " ".join(entry["notes"]),
        ]
        for entry in results["slides"]
    ]
    write_csv(path, header, rows)
