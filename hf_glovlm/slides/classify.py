"""Slide classification (`glovlm slide`): labels, counts, tables, heat maps and GeoJSON.

A slide's files are made in a folder of their own and moved into place when they are complete, so a
run that was killed goes on with the slides that are not there yet, and within a slide at the tile
where it stopped. A finished slide is known by its content and by all that its results were made
from: of another one, or damaged, they are made again. A slide that fails is an entry of the results
and does not stop the others.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration.inputs import softmax
from ..data.listing import few
from ..data.stains import name_stain
from ..errors import GloVLMError, describe_error, nearest
from ..files import (
    LOCK,
    UNFINISHED,
    changed_inputs,
    damaged_files,
    digest_file,
    digest_value,
    finish_move,
    is_empty,
    one_writer,
    put_in_place,
    read_json,
    read_manifest,
    remove,
    replacing,
    staging,
    write_json,
    write_manifest,
)
from ..inference import load_classifier
from ..inference.engines import Engine, engine_device
from ..inference.outlines import hidden_notes
from ..inference.prediction import class_names
from ..progress import counting, showing
from .cases import count_cases
from .config import SlideConfig
from .counting import count_classes
from .encoding import (
    Encoded,
    Outcome,
    encode_slide,
    encode_slides,
    encoder_fingerprint,
    engine_attributes,
    load_encoder,
    open_bag_engine,
)
from .files.annotations import NoObject, read_outlines
from .files.bags import find_damage, read_bag
from .files.case_table import agreed, read_case_table
from .files.coordinates import Origin, parse_origin
from .files.listing import list_slides
from .files.names import match_outlines, outline_suffix
from .files.wsi import Slide, is_elsewhere, is_same_slide, name_flags, open_slide, slide_name
from .mil import SlideClassifier, load_aggregator
from .numbering import NUMBERS, Numbers
from .objects import ClassifiedObjects, classify_objects, read_objects
from .pooling import NEIGHBOURS, pool_slide, pool_ways
from .report import (
    HEATMAP_SIDE,
    RESULT_FILES,
    clean_text,
    draw_heatmap,
    write_results,
    write_tile_geojson,
    write_tiles,
)
from .stains import stain_flags

FEATURES = "features"  # in the output folder: the bags
VERSION = 4  # of what is written for a slide; raise it when an old one may not stand in for a new

logger = logging.getLogger("hf_glovlm")
Event = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class _Task:
    """One slide of a run: its file, name, case, scale, scene, stain, outlined objects and bag.

    `stated` and `of_case` are what the table of cases states of the slide and of its case.
    """

    path: Path
    name: str
    case: str | None
    mpp: float | None
    scene: str | None
    stain: str | None
    objects: Path | None
    bag: Path
    stated: Mapping[str, Any]
    of_case: Mapping[str, Any]

    def hide(self, text: str) -> str:
        """Remove the machine's paths from a sentence."""
        for path in (self.objects, self.bag):
            if path is not None:
                text = text.replace(str(path), f"{self.name}{outline_suffix(path) or path.suffix}")
        return clean_text(text, self.path, self.name)


@dataclass(frozen=True)
class _Run:
    """One run: its config, folder and loaded models."""

    config: SlideConfig
    output: Path
    model: Any
    processor: Any
    engine: Engine
    class_names: list[str]  # of tiles and objects; none where the model is a backbone
    confusion: NDArray[np.int64] | None  # that was measured with the classifier
    aggregator: SlideClassifier | None
    made_from: Mapping[str, Any]  # what determines the results of every slide
    notify: Event

    @property
    def slide_class_names(self) -> list[str]:
        """The classes of slides."""
        return self.class_names if self.aggregator is None else self.aggregator.classes


def classify_slides(
    config: SlideConfig, *, on_event: Event | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Slide classification: encode, label and count slides, and write the results into a folder.

    `O/features/NAME.h5`; `O/slides/NAME/` with `tiles.parquet`, `heatmap.png`, `tiles.geojson`, and
    `objects.parquet` and `objects.geojson` where objects were given; over all slides `summary.csv`,
    `summary.parquet`, `README.md` and `results.json`.

    Args:
        config: What to do.
        on_event: Progress: `("stage", {"name"})`, `("tiles", {"slide", "done", "total"})`,
            `("slide", {"slide", "status", "error"})`.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        The content of `results.json`: `slides` (each with `status` `done` or `failed`, `error`,
        `label`, `probabilities`, `pooling`, `pooled`, `counts`, `origin` of its outlines and how
        many were `left_out`, `flags`, and what the table of cases has `stated` of it), `cases`,
        `class_names` (of tiles and objects), `slide_class_names`, `settings`, `pooling`, `model`,
        `failed` (their number). The same for a run that was killed and started again.

    Raises:
        GloVLMError: The model, the aggregator or a table cannot be read, or two slides share a
            name. What is wrong with one slide stands in the results.
    """
    output = Path(config.output_dir).expanduser()
    with one_writer(output), showing(progress) as show:
        finish_move(output / UNFINISHED, output)
        remove(output / UNFINISHED)
        return _classify_all(config, output, on_event or show)


def _classify_all(config: SlideConfig, output: Path, notify: Event) -> dict[str, Any]:
    """All slides, once no other process writes there."""
    _check_output(config, output)
    numbers = Numbers.read(output) if config.anonymise else None
    tasks = _plan(config, output, numbers)
    notify("stage", {"name": "loading the model"})
    run = _prepare(config, output, tasks, notify)
    target, known = config.heatmap_class, run.slide_class_names
    if target is not None and target not in known:
        raise GloVLMError(f"There is no class '{target}' of slides.{nearest(target, known)}")
    if numbers is not None:
        numbers.write(output)  # before any file bears one

    entries = {task.name: _finished(task, run) for task in tasks}
    todo = [task for task in tasks if entries[task.name] is None]
    notify("stage", {"name": f"encoding {len(todo)} of {len(tasks)} slides"})

    def finish(task: _Task, outcome: Outcome) -> None:
        entries[task.name] = entry = _classify(task, outcome, run)
        notify("slide", {name: entry.get(name) for name in ("slide", "status", "error")})
        count.advance()

    try:
        with counting("slides", len(tasks), done=len(tasks) - len(todo)) as count:
            _encode(todo, run, finish)
    except KeyboardInterrupt:
        done = sum(entry is not None for entry in entries.values())
        logger.warning(
            "%d of %d slides are done; the same command goes on with the others, also within one.",
            done,
            len(tasks),
        )
        raise

    slides = [
        (entries[task.name] or {}) | {"case": task.case, "stated": dict(task.stated)}
        for task in tasks
    ]
    stated = {task.case: task.of_case for task in tasks if task.case is not None}
    results = {
        "kind": "slides",
        "research_use_only": True,
        "synthetic": bool(run.model.config.synthetic),
        "model": {
            "backbone": str(run.model.config.backbone_name or ""),
            "mpp": run.model.config.mpp,
            "fingerprint": run.made_from["model"],
            "confusion": None if run.confusion is None else run.confusion.tolist(),
            **engine_attributes(run.engine),
        },
        "class_names": run.class_names,
        "slide_class_names": run.slide_class_names,
        "settings": config.result_settings()
        | {name: _shared(slides, name) for name in ("tile_size", "tile_mpp")},
        "pooling": _pooling_name(run),
        "slides": slides,
        "cases": count_cases(slides, output, run.class_names, run.confusion, stated),
        "failed": sum(entry["status"] != "done" for entry in slides),
    }
    with staging(output) as work:
        write_results(work, results)
        put_in_place(work, output, RESULT_FILES)
    return results


def _check_output(config: SlideConfig, output: Path) -> None:
    """Refuse a folder that holds something else, and inputs where results are written."""
    given = (*config.slides, config.objects, config.cases, config.aggregator, config.model)
    inputs = {Path(path).expanduser().resolve() for path in given if path}
    for name in (*RESULT_FILES, NUMBERS):
        if (output / name).resolve() in inputs:
            raise GloVLMError(
                f"'{output / name}' is an input, and this run would replace it: give another "
                "--output-dir."
            )
    own = {FEATURES, "slides", NUMBERS, LOCK}  # of a run that was killed before it had results
    if own.issuperset(path.name for path in output.iterdir()):
        return
    results = read_json(output / "results.json") if (output / "results.json").is_file() else {}
    if results.get("kind") != "slides" and "slide_class_names" not in results:
        raise GloVLMError(
            f"Output folder '{output}' holds files that are no run over slides: give an empty or a "
            "new folder."
        )


# ---------------------------------------------------------------------------------- what to do


def _plan(config: SlideConfig, output: Path, numbers: Numbers | None) -> list[_Task]:
    """Tasks of the run: slides with their names, cases, scale, scene and outlined objects."""
    paths = list_slides(config.slides)
    twice = [name for name, n in Counter(map(slide_name, paths)).items() if n > 1]
    if twice:
        raise GloVLMError(
            f"Two slides are called {twice[0]}, so their results would share a folder: rename one."
        )
    table = read_case_table(Path(config.cases).expanduser()) if config.cases else None
    cases = [config.case] * len(paths) if table is None else table.cases_of(paths)
    for sentence in [] if table is None else table.notes:
        logger.warning(sentence)
    objects = _objects_of(config, paths)
    tasks = []
    for path, case in zip(paths, cases, strict=True):
        name, mpp, scene = slide_name(path), config.mpp, config.scene
        stated: dict[str, Any] = {}
        of_case: dict[str, Any] = {}
        stain = name_stain(config.stain)
        if table is not None:
            row = table.row_of(path)
            stated = row.stated(hide=config.anonymise)
            of_case = table.stated_of(case, hide=config.anonymise) if case else {}
            mpp = agreed("--mpp", mpp, row.mpp, name, table.path)
            scene = agreed("--scene", scene, row.scene, name, table.path)
            stain = agreed("--stain", stain, name_stain(row.stain), name, table.path)
        if numbers is not None:
            name, case = numbers.of_slide(path), case and numbers.of_case(case)
        folder = output / "slides" / name
        if not is_empty(folder) and not (folder / "slide.json").is_file():
            raise GloVLMError(
                f"'{folder}' holds files that are no results of a slide, and this run would "
                "replace it: give another --output-dir."
            )
        bag = output / FEATURES / f"{name}.h5"
        outlines = objects.get(path)
        tasks.append(_Task(path, name, case, mpp, scene, stain, outlines, bag, stated, of_case))
    return tasks


def _objects_of(config: SlideConfig, slides: Sequence[Path]) -> Mapping[Path, Path]:
    """GeoJSON file of each slide that has one: the one given, or that of its name in a folder."""
    if config.objects is None:
        return {}
    outlined = match_outlines(Path(config.objects).expanduser(), slides)
    if outlined.unused:
        names = "" if config.anonymise else f" ({few(outlined.unused)})"
        logger.warning("%d files of outlines are of no slide here%s.", len(outlined.unused), names)
    return outlined.files


def _prepare(config: SlideConfig, output: Path, tasks: Sequence[_Task], notify: Event) -> _Run:
    results: Mapping[str, Any] | None = None
    aggregator = load_aggregator(config.aggregator) if config.aggregator else None
    try:
        model, processor, results = load_classifier(config.model, exported=True)
    except GloVLMError:
        if aggregator is None:
            raise
        model, processor = load_encoder(config.model)
    model.to(engine_device(config.device, config.runtime, config.precision))
    classified = hasattr(model, "classify_features")
    if config.objects and not classified:
        raise GloVLMError(
            "Objects are classified by what `glovlm train` wrote, and a backbone was given: leave "
            "--objects out, or give a classifier."
        )
    engine = open_bag_engine(
        model,
        processor,
        output / FEATURES,
        config.precision,
        config.runtime,
        slides=[task.path for task in tasks],
        tiling=_tiling(config) | {"slide_mpp": tasks[0].mpp, "scene": tasks[0].scene},
        on_note=logger.warning,
    )
    names = class_names(model.config)
    confusion = np.array((results or {}).get("confusion_matrix") or (), np.int64)
    return _Run(
        config=config,
        output=output,
        model=model,
        processor=processor,
        engine=engine,
        class_names=names if classified else [],
        confusion=confusion if confusion.shape == (len(names), len(names)) else None,
        aggregator=aggregator,
        made_from={
            "version": VERSION,
            "model": encoder_fingerprint(model, processor),
            "class_names": names if classified else [],  # `classes` is the setting of outlines
            "model_mpp": model.config.mpp,
            "image_scale": model.config.image_scale,
            "confusion": digest_value(confusion.tolist()),
            "aggregator": aggregator and aggregator.digest(),
            **config.result_settings(),
            **{k: v for k, v in engine_attributes(engine).items() if k != "measured"},
        },
        notify=notify,
    )


def _made_from(task: _Task, run: _Run) -> dict[str, Any]:
    """All that determines a slide's results, but the slide itself."""
    own = {"mpp": task.mpp, "scene": task.scene, "stain": task.stain}
    return {**run.made_from, **own, "objects": task.objects and digest_file(task.objects)}


def _finished(task: _Task, run: _Run) -> dict[str, Any] | None:
    """Entry of a slide that an earlier run finished, if nothing has changed since."""
    folder = run.output / "slides" / task.name
    if is_empty(folder):
        return None
    try:
        again = _changes(folder, task, _made_from(task, run))
        entry: dict[str, Any] = read_json(folder / "slide.json")
    except _Other:
        raise
    except (GloVLMError, OSError) as error:  # such as outlines that may not be read
        again = [task.hide(describe_error(error))]
    if not again:
        return entry
    logger.warning("%s is done again: %s", task.name, "; ".join(again))
    return None


class _Other(GloVLMError):
    """What lies there is of another slide, and must not be replaced."""


def _changes(folder: Path, task: _Task, now: Mapping[str, Any]) -> list[str]:
    """Why the results of a slide cannot stand, in sentences."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind != "slide":
        return ["its results are of an earlier version"]
    before = dict(manifest.made_from)
    slide = before.pop("slide", None)
    same = is_same_slide(task.path, slide)
    if not same and is_elsewhere(task.path, slide):
        raise _Other(
            f"'{folder}' holds the results of another slide of this name, from another folder: "
            "give another --output-dir, or rename the slide."
        )
    damage = find_damage(task.bag)
    return [
        *([] if same else ["the slide's file has changed"]),
        *changed_inputs(before, now),
        *(f"{name} is damaged or missing" for name in damaged_files(folder, manifest)),
        *([] if damage is None else [f"{task.bag.name} {damage}"]),
    ]


# ------------------------------------------------------------------------------------- a slide


def _tiling(config: SlideConfig) -> dict[str, Any]:
    """Settings of `encode_slide` that decide a slide's tiles."""
    return {
        "tile_size": config.tile_size,
        "mpp": config.tile_mpp,
        "overlap": config.overlap,
        "min_tissue": config.min_tissue,
        "drop_pen": config.drop_pen,
    }


def _encode(tasks: Sequence[_Task], run: _Run, finish: Callable[[_Task, Outcome], None]) -> None:
    """Encode slides here or in several processes; each is finished as soon as it is encoded."""
    config = run.config
    settings = _tiling(config)
    settings |= {"batch_size": config.batch_size, "allow_scale": config.allow_scale}
    if config.workers > 1 and len(tasks) > 1:
        by_path = {task.path: task for task in tasks}
        encode_slides(
            list(by_path),
            run.output / FEATURES,
            config.model,
            workers=config.workers,
            names=[task.name for task in tasks] if config.anonymise else None,
            slide_mpp={slide_name(task.path): task.mpp for task in tasks},
            scene={slide_name(task.path): task.scene for task in tasks},
            stain={slide_name(task.path): task.stain for task in tasks},
            on_done=lambda outcome: finish(by_path[outcome.slide], outcome),
            device=config.device,
            precision=config.precision,
            runtime=config.runtime,
            kept=run.engine.describe(),  # measured here, for all of them
            **settings,
        )
        return
    for task in tasks:

        def advance(done: int, total: int, name: str = task.name) -> None:
            run.notify("tiles", {"slide": name, "done": done, "total": total})

        try:
            encoded = encode_slide(
                run.model,
                run.processor,
                task.path,
                task.bag,
                slide_mpp=task.mpp,
                scene=task.scene,
                stain=task.stain,
                name=task.name if config.anonymise else None,
                engine=run.engine,
                on_progress=advance,
                **settings,
            )
            outcome = Outcome(task.path, encoded)
        except Exception as error:  # whatever is wrong with one slide stays with it
            outcome = Outcome(task.path, error=describe_error(error))
        finish(task, outcome)


def _classify(task: _Task, outcome: Outcome, run: _Run) -> dict[str, Any]:
    """Entry of one slide in the results, its files in place; or the error of one that failed."""
    error, encoded = outcome.error, outcome.encoded
    if encoded is not None:
        if encoded.notes:
            logger.warning("%s is encoded again: %s", task.name, "; ".join(encoded.notes))
        folder = run.output / "slides" / task.name
        try:
            made_from = _made_from(task, run) | {"slide": encoded.source}
            with replacing(folder) as work:
                work.mkdir()
                with _open(task, run.config) as slide:
                    entry = _classify_encoded(task, slide, encoded, run, work)
                write_json(work / "slide.json", entry, allow_nan=False)
                write_manifest(work, "slide", made_from)
                remove(folder)
            return entry
        except Exception as caught:
            error = describe_error(caught)
    return {
        "slide": task.name,
        "status": "failed",
        "error": task.hide(error or ""),
        "flags": [] if run.config.anonymise else name_flags(task.name),
        "counts": None,
    }


def _open(task: _Task, config: SlideConfig) -> Slide:
    return open_slide(task.path, mpp=task.mpp, scene=task.scene, allow_scale=config.allow_scale)


def _classify_encoded(
    task: _Task, slide: Slide, encoded: Encoded, run: _Run, work: Path
) -> dict[str, Any]:
    """Write a slide's files into a folder; returns its entry in the results."""
    config, names = run.config, run.class_names
    origin = parse_origin(config.origin, slide.bounds)
    tiles = _read_tiles(encoded.path, names)
    entry, columns, notes = _predict_slide(tiles, encoded.path, run)
    target = config.heatmap_class or entry["label"]
    if run.aggregator is None:
        heat, meaning, limits = columns[f"p_{target}"], f"probability of {target}", (0.0, 1.0)
        threshold = config.threshold
    else:
        heat, meaning, threshold = columns[f"score_{target}"], f"evidence for {target}", 0.0
        most = float(np.abs(heat).max()) or 1.0
        limits = (-most, most)
    place: tuple[Any, int] = (tiles.coords, tiles.extent)
    called = [names[k] for k in tiles.probabilities.argmax(axis=1)] if names else None
    tissue, fraction = encoded.tissue, encoded.tissue_fraction
    assert tissue is not None  # of a slide that was just encoded
    assert fraction is not None
    write_tiles(work / "tiles.parquet", *place, fraction, columns, called)
    draw_heatmap(
        work / "heatmap.png",
        slide.thumbnail(HEATMAP_SIDE),
        slide.size,
        *place,
        heat,
        title=f"{task.name}: {target}",
        value_name=meaning,
        limits=limits,
        mpp=slide.mpp,
        pen=tissue.pen if tissue.strokes else None,
    )
    squares = write_tile_geojson(
        work / "tiles.geojson",
        *place,
        heat,
        threshold=threshold,
        columns=columns,
        labels=called or [target] * len(heat),
        origin=origin,
    )
    counts, left_out, count_notes = _count(task, slide, origin, tiles.probabilities, run, work)
    # Where the name is hidden, so are the flags about it.
    hidden = set(name_flags(slide_name(task.path))) if config.anonymise else set()
    seen = [
        *stain_flags(run.model, task.stain, slide_name(task.path)),
        *_outline_notes(run.model.config.outline),
        *hidden_notes(run.model.config),
        *run.engine.notes,
    ]
    notes = [*encoded.flags, *seen, *notes, *count_notes]
    flags = [flag for flag in notes if flag not in hidden]
    return {
        "slide": task.name,
        "status": "done",
        **entry,
        "n_tiles": len(tiles.coords),
        "tile_size": tiles.size,
        "tile_mpp": tiles.mpp,
        "input_mpp": encoded.input_mpp,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "size": list(slide.size),
        "stain": task.stain,
        "tissue": tissue.summary(),
        "heatmap_class": target,
        "origin": origin.describe(),
        "squares": squares,
        "left_out": left_out,
        "counts": counts,
        "flags": list(dict.fromkeys(map(task.hide, flags))),
    }


def _outline_notes(outline: str) -> list[str]:
    """Sentence about tiles where a model was adapted to outlined glomeruli."""
    if outline == "ignore":
        return []
    why = "which have no outline, so that it sees the whole of each"
    if outline == "centre":
        why = "in which a glomerulus need not lie in the middle, where it looks"
    return [
        f"The model was adapted to glomeruli (outline '{outline}') and not to tiles, {why}: the "
        "classes of tiles may mean little. Outlined objects (--objects) are what it knows."
    ]


def _predict_slide(
    tiles: "_Tiles", bag: Path, run: _Run
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], Sequence[str]]:
    """Slide-level prediction: pooled tile scores, or an aggregator's where one is given.

    Returns:
        Its part of the slide's entry, columns `[n]` of the tiles, and notes.
    """
    names = run.class_names
    columns: dict[str, NDArray[Any]] = {}
    columns |= {f"p_{name}": tiles.probabilities[:, k] for k, name in enumerate(names)}
    entry = _pool(tiles, run.config, names) if names else {}
    if run.aggregator is None:
        return entry, columns, ()
    prediction = run.aggregator.predict(read_bag(bag), allow_scale=run.config.allow_scale)
    if prediction.attention is not None:
        columns["attention"] = prediction.attention
    for k, name in enumerate(run.slide_class_names):
        columns[f"score_{name}"] = prediction.tile_scores[:, k]
    entry |= {
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "pooling": run.aggregator.aggregator.name,
    }
    return entry, columns, prediction.notes


def _pool(tiles: "_Tiles", config: SlideConfig, names: Sequence[str]) -> dict[str, Any]:
    """Slide-level scores: the tiles' logits pooled as configured, and in all other ways."""
    options: dict[str, Any] = {
        "kind": "logit",
        "coords": tiles.coords,
        "neighbours": NEIGHBOURS if config.smooth else 0,
    }
    chosen = pool_slide(tiles.logits, names, j=config.top or None, **options)
    ways = pool_ways(tiles.logits, names, **options)
    return {
        "label": chosen.label,
        "probabilities": chosen.probabilities,
        "pooling": chosen.pooling,
        "pooled": {way: pooled.scores for way, pooled in ways.items()},
    }


def _count(
    task: _Task,
    slide: Slide,
    origin: Origin,
    probabilities: NDArray[np.float64],
    run: _Run,
    work: Path,
) -> tuple[dict[str, Any] | None, dict[str, int], list[str]]:
    """Lesion counts of a slide's objects, else of its tiles; outlines left out by reason; notes."""
    config, names = run.config, run.class_names
    if not names:
        return None, {}, []
    if task.objects is None:
        missing = "no file of objects has this slide's name, so tiles are counted"
        notes = [] if config.objects is None else [missing]
        return count_classes(probabilities, names, unit="tiles")["all"], {}, notes
    try:
        outlines = read_outlines(
            task.objects,
            origin=origin,
            classes=config.classes,
            exclude=config.exclude,
            slide=task.path,
            size=slide.size,
            mpp=slide.mpp,
        )
    except NoObject as error:  # a section without glomeruli
        classified, notes, why = ClassifiedObjects.none(names), [error.note], error.left_out
    else:
        classified = classify_objects(
            run.model,
            run.processor,
            slide,
            outlines.objects,
            margin=config.margin,
            outline_of=config.outline_of,
            stain=task.stain,
            batch_size=config.batch_size,
            allow_scale=config.allow_scale,
            engine=run.engine,
        )
        notes, why = [*outlines.notes, *classified.notes], outlines.left_out
    classified.save(work / "objects.parquet")
    classified.write_geojson(work / "objects.geojson", origin)
    shown, ids = read_objects(work / "objects.parquet", task.name)
    counts = count_classes(shown, names, ids=ids, confusion=run.confusion)["all"]
    return counts, {reason: len(ids) for reason, ids in why.items()}, notes


@dataclass(frozen=True)
class _Tiles:
    """Tile coordinates, logits and probabilities of a bag, without its features."""

    coords: NDArray[np.int64]
    logits: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    extent: int
    size: int
    mpp: float | None


def _read_tiles(path: Path, names: Sequence[str]) -> _Tiles:
    """Read all of a bag but its features, which stay on the disk."""
    import h5py

    with h5py.File(path, "r") as file:
        about = json.loads(file.attrs["settings"])
        coords = file["coords"][()]
        logits = np.empty((len(coords), 0)) if not names else file["scores"][()].astype(np.float64)
    return _Tiles(
        coords=coords,
        logits=logits,
        probabilities=softmax(logits) if names else logits,
        extent=int(about["patch_size_level0"]),
        size=int(about["tile_size"]),
        mpp=about["tile_mpp"],
    )


def _pooling_name(run: _Run) -> str:
    if run.aggregator is not None:
        return f"the trained aggregator {run.aggregator.aggregator.name}"
    top, how = run.config.top, "the mean of all tiles"
    if top:
        how = f"the mean of the {top} highest tiles of each class"
    return f"{how}, smoothed over neighbours" if run.config.smooth else how


def _shared(slides: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Value that all finished slides share, `None` where they differ."""
    values = {entry[name] for entry in slides if name in entry}
    return values.pop() if len(values) == 1 else None
