"""Study: a grid of runs (backbone x method x shots x label draw) and its paired comparison.

Every cell is one `runs.run` in a folder of its own, without the model. A finished cell is never
run again, so a study that was killed goes on where it stopped, and one that grew runs what is new.
"""

import gc
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from statistics import median
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import check_groups
from ..data.splits import EPISODES
from ..environment import end_with_parent, quiet_libraries
from ..errors import GloVLMError, nearest
from ..files import (
    Manifest,
    changed_inputs,
    check_kind,
    check_results,
    finish_interrupted,
    is_empty,
    is_plain_name,
    one_writer,
    parse_json,
    read_json,
    read_manifest,
    read_text,
    read_undamaged,
    refuse_damage,
    remove_below,
    write_json,
    write_text,
)
from ..inference import Predictions, resolve_device
from ..metrics import METRICS, PairedRun, compare_methods, summarise_draws
from ..rendering import SYNTHETIC, extent, group_unit, render
from ..settings import Settings, read_values, setting, shown
from .config import MINI, TrainConfig, choose_backbone
from .loading import Loader
from .workflow import run

__all__ = ["Cell", "StudyConfig", "StudyMethod", "render_report", "run_study", "write_report"]

COMPARED = ("macro_auc", "balanced_accuracy")
SUMMARISED = tuple(name for name, row in METRICS.items() if row.summarised)
MOST_CELLS = 100_000
RECALL_ROWS = 60  # of the table of groups in the report that people read
RECORDED = "reference_logistic_regression"  # what a file of frozen episodes may hold per draw
_DATA = ("images", "labels", "groups", "columns")  # of what a cell is made from
_MODEL = ("code", "backbone")
_OF_CELL = {"data", "output_dir", "backbone", "method", "shots", "draw"}
_OF_CELL |= {"overwrite", "resume", "save_model"}
# Change no number.
_INCIDENTAL = {"output_dir", "overwrite", "resume", "save_model", "cache", "device", "tracker"}
_SETTINGS = {f.name for f in fields(TrainConfig)} - _OF_CELL


@dataclass(frozen=True)
class StudyMethod:
    """Method of a study, with its settings and its label draws: one line of the report.

    Attributes:
        name: What the report and the folders call it.
        method: A name of `glovlm methods`.
        draws: Numbers of the label draws.
        settings: Fields of `TrainConfig`, over those of the study.
    """

    name: str
    method: str
    draws: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """Cell of the grid: one run; `name` is its folder below `cells/`."""

    backbone: str
    method: StudyMethod
    shots: int
    draw: int

    @cached_property
    def name(self) -> str:
        """Path below `cells/`."""
        return f"{_short(self.backbone)}/{self.method.name}/{self.shots}/draw-{self.draw:02d}"


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Configuration of a study: the grid."""

    data: str = setting(help="Folder, parquet file, or Hub id.", group="Data")
    methods: tuple[StudyMethod, ...] = setting(
        help="The lines of the report: names of methods, or mappings of a `name`, a `label` for "
        "the report, `draws` and settings of `train`.",
        group="Method",
        form="a list of methods",
    )
    backbones: tuple[str, ...] = setting(help="As `train` takes one.", group="Method")
    shots: tuple[int, ...] = setting(
        (8,), help="Labelled images per class; one or a list.", group="Labels", least=0, most=10**6
    )
    reference: str = setting(
        "linear_probe", help="The line that the others are compared with.", group="Method"
    )
    settings: dict[str, Any] = setting(
        factory=dict,
        help="In the YAML file beside these: settings of `train` for every cell (`episodes`, "
        "`seed`, `prompts`, ...), and `draws`, the number of label draws or a list of them.",
        group="Labels",
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """Configuration from the values of a YAML file.

        Args:
            values: `data`, `methods` (names, or mappings of `name`, a `label` for the report,
                `draws` and fields of `TrainConfig`), `backbones`, `shots` (one or a list), `draws`
                (a number or a list; by default all of the episodes file, else 10), `reference`,
                and fields of `TrainConfig` for every cell.

        Raises:
            GloVLMError: A key is unknown or missing, a value is wrong, a name comes twice.
        """
        own = dict(values)
        for key in ("data", "methods"):
            if not own.get(key):
                raise GloVLMError(f"A study needs '{key}:'; its configuration has none.")
        data, methods, reference = own.pop("data"), own.pop("methods"), own.pop("reference", None)
        named = _listed(own.pop("backbones", own.pop("backbone", None)) or [])
        backbones = named or [MINI]
        frozen_shots, frozen = _read_frozen(own.get("episodes"))
        shots = _listed(own.pop("shots", frozen_shots or 8))
        draws = own.pop("draws", sorted(frozen) or 10)
        if frozen and shots != [frozen_shots]:
            raise GloVLMError(
                f"The frozen episodes have {frozen_shots} shots, the study asks for {shots}: leave "
                "'shots:' or 'episodes:' out."
            )
        lines = tuple(_read_method(given, draws, frozen) for given in _listed(methods))
        reference = str(reference or "linear_probe")
        names = [line.name for line in lines]
        for listed in (names, [_short(str(b)) for b in backbones]):
            if len(set(listed)) < len(listed):
                raise GloVLMError(f"A name comes twice in {', '.join(listed)}: give a 'label:'.")
        if reference not in names:
            raise GloVLMError(
                f"The reference '{reference}' is none of the methods {', '.join(names)}."
                f"{nearest(reference, names)}"
            )
        settings = _settings(own, {"data", "methods", "backbones", "shots", "draws", "reference"})
        study = cls(data, lines, tuple(backbones), tuple(shots), reference, settings)
        for device in {study.train_config(cell, "").device for cell in study.extremes()}:
            resolve_device(device)
        if not named:
            choose_backbone(None, data)
        return study

    def check(self) -> None:
        """Rules over several settings."""
        runs = sum(len(line.draws) for line in self.methods) * len(self.backbones) * len(self.shots)
        if runs > MOST_CELLS:
            raise GloVLMError(
                f"A study has at most {MOST_CELLS:,} cells, and these would be {runs:,}: leave "
                "draws, shots, backbones or methods out."
            )

    def cells(self) -> list[Cell]:
        """Every cell; all methods of a draw before the next draw, so that a part compares too."""
        return [
            Cell(backbone, method, shots, draw)
            for backbone in self.backbones
            for shots in self.shots
            for draw in sorted({d for m in self.methods for d in m.draws})
            for method in self.methods
            if draw in method.draws
        ]

    def extremes(self) -> list[Cell]:
        """The cells of the first and last draw of each line: the others differ in it alone."""
        return [
            Cell(backbone, method, shots, draw)
            for backbone in self.backbones
            for shots in self.shots
            for method in self.methods
            for draw in {min(method.draws), max(method.draws)}
        ]

    def train_config(self, cell: Cell, output_dir: str | Path) -> TrainConfig:
        """Training configuration of a cell."""
        values = {
            **self.settings,
            **cell.method.settings,
            "data": self.data,
            "output_dir": str(Path(output_dir) / "cells" / cell.name),
            "backbone": cell.backbone,
            "method": cell.method.method,
            "shots": cell.shots,
            "draw": cell.draw,
            "save_model": False,
        }
        try:
            return TrainConfig(**values)
        except GloVLMError as error:
            raise GloVLMError(f"'{cell.method.name}' of the study: {error}") from None


# ------------------------------------------------------------------------------------ running


def run_study(
    config: StudyConfig,
    output_dir: str | Path,
    *,
    workers: int = 1,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the unfinished cells of a study, then write `report.json` and `report.md`.

    A cell that fails leaves `failure.json` and is tried again the next time; the others go on.

    Args:
        config: The grid.
        output_dir: Holds `study.json`, `cells/` and the report.
        workers: Processes; each runs cells with its share of the CPU cores.
        on_event: Called with `("cell", {"name", "status", "done", "total", "seconds", "error"})`
            for every cell; the status is `done`, `skipped` or `failed`.

    Returns:
        The report; `failures` is empty if every cell is there.

    Raises:
        GloVLMError: The data are bad, a finished cell has other settings, or a worker was killed.
    """
    output = Path(output_dir).expanduser()
    if workers < 1:
        raise GloVLMError(f"Expected 1 or more workers, found {workers}.")
    cells = config.cells()
    _check_names(cells)
    _check_place(output)
    with one_writer(output):
        _check_place(output)
        return _run_study(config, output, cells, workers, on_event)


def _run_study(
    config: StudyConfig,
    output: Path,
    cells: Sequence[Cell],
    workers: int,
    on_event: Callable[[str, dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Run what is not finished, and report."""
    done = 0

    def notify(cell: Cell, status: str, error: str | None = None, seconds: float = 0.0) -> None:
        nonlocal done
        done += 1
        event = {"name": cell.name, "status": status, "error": error, "seconds": seconds}
        if on_event is not None:
            on_event("cell", {**event, "done": done, "total": len(cells)})

    loader = Loader(keep=workers == 1)
    for cell in config.extremes():
        config.train_config(cell, output)
    todo, finished = [], dict[str, _Outcome]()
    lines = _Lines(config, output, loader)
    with _no_collection():
        for cell in cells:
            outcome = lines.read_finished(cell)
            if outcome is not None:
                finished[cell.name] = outcome
                notify(cell, "skipped")
            else:
                todo.append((cell, config.train_config(cell, output)))
    if todo:
        loader.data(todo[0][1])  # what is wrong with it is wrong for every cell
        write_json(output / "study.json", asdict(config))
    for cell, error, seconds in _run_cells(todo, workers, loader, output / "cells"):
        notify(cell, "failed" if error else "done", error, seconds)
    with _no_collection():
        return _write_report(config, output, cells, finished)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: reading leaves no cycles, and all that is kept would be searched."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_names(cells: Sequence[Cell]) -> None:
    """Refuse names that are no folder below `cells/`, or one folder for two lines."""
    lines = {(cell.backbone, cell.method.name) for cell in cells}
    for backbone, method in sorted(lines):
        for name in (_short(backbone), method):
            if not is_plain_name(name):
                raise GloVLMError(
                    f"The study keeps its cells in folders of these names, and '{name}' cannot be "
                    "one: give a 'label:' of letters, digits, '-' and '_', or a backbone's folder "
                    "by another path."
                )
    if len({cell.name.casefold() for cell in cells}) < len(cells):
        raise GloVLMError("Two lines of the study would share a folder: give them a 'label:' each.")


def _check_place(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise GloVLMError(f"--output-dir must be a folder; '{output}' is a file.")
    if not is_empty(output) and not (output / "study.json").is_file():
        check_kind(output, "study")
        raise GloVLMError(f"'{output}' is no study of ours: give an empty or a new folder.")


@dataclass(frozen=True)
class _Outcome:
    """Outcome of a finished cell: what a report needs of it, from files that are read once.

    Attributes:
        made_from: What decides whether cells may be compared.
        results: Parts of `results.json`.
        labels: Class number of each test image `[n]`.
        probabilities: `[n, K]`.
        groups: Patient, case or slide of each.
        file_names: Of each.
        class_names: The `K` classes.
    """

    made_from: Mapping[str, Any]
    results: Mapping[str, Any]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    groups: Sequence[str]
    file_names: Sequence[str]
    class_names: Sequence[str]

    @classmethod
    def read(
        cls, folder: Path, manifest: Manifest | None, before: "_Outcome | None" = None
    ) -> "_Outcome":
        """Read a finished cell, undamaged; it shares names with the one before where equal.

        Raises:
            GloVLMError: A file is damaged, or is of something else.
        """
        finish_interrupted(folder)
        stated = manifest or Manifest("adaptation", {}, {})  # of an earlier version: no checksums
        files = ("results.json", "predictions.parquet")
        content = [read_undamaged(folder, stated, name) for name in files]
        results = check_results(parse_json(content[0], folder / files[0]), folder, "adaptation")
        predictions = Predictions.parse(content[1], folder / files[1], logits=False)
        labels, groups, names = predictions.labels, predictions.groups, predictions.file_names
        assert labels is not None  # a run predicts labelled rows of known groups
        assert groups is not None
        return cls(
            made_from={key: stated.made_from.get(key) for key in (*_DATA, *_MODEL)},
            results=_reported(results),
            labels=labels,
            probabilities=predictions.probabilities,
            groups=_kept_once(groups, before.groups if before else None),
            file_names=_kept_once(names, before.file_names if before else None),
            class_names=predictions.class_names,
        )


def _kept_once(names: Sequence[str], before: Sequence[str] | None = None) -> Sequence[str]:
    return before if before is not None and before == names else [*map(intern, names)]


def _reported(results: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `results.json` that a report is made from."""
    kept = ("name", "fingerprint", "group_column", "split_hash", "support", "notes")
    return {
        **{key: results[key] for key in ("synthetic", "threshold", "timing", "environment")},
        "notes": _kept_once(results["notes"]),
        "data": {key: results["data"][key] for key in kept},
        "metrics": {name: {"value": m.get("value")} for name, m in results["metrics"].items()},
        "training": {key: results["training"][key] for key in ("facts", "trainable_parameters")},
    }


@dataclass
class _Lines:
    """Lines of a study: what the cells of each would be made from, worked out once."""

    config: StudyConfig
    output: Path
    loader: Loader
    expected: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    before: _Outcome | None = None  # that was read last

    def expect(self, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and inputs that a finished cell must state, as JSON holds them."""
        line = (cell.backbone, cell.method.name, cell.shots)
        if line not in self.expected:
            config = self.config.train_config(cell, self.output)
            stated = (config.to_repeat(), self.loader.inputs(config))
            settings, inputs = json.loads(json.dumps(stated, default=str))
            self.expected[line] = settings, inputs
        settings, inputs = self.expected[line]
        return settings | {"draw": cell.draw}, inputs

    def read_finished(self, cell: Cell) -> _Outcome | None:
        """Outcome of a cell that is finished: with these very settings, data and weights.

        Raises:
            GloVLMError: It was made from something else, or a file of it is damaged.
        """
        folder = self.output / "cells" / cell.name
        if not (folder / "results.json").is_file():
            return None
        manifest = read_manifest(folder)
        if manifest is None:
            raise GloVLMError(
                f"The finished cell {folder} does not state what it was made from: give another "
                "output folder, or remove that cell."
            )
        settings, inputs = self.expect(cell)
        before = dict(manifest.made_from)
        kept: dict[str, Any] = before.pop("settings", {})
        for key, value in settings.items():
            if key not in _INCIDENTAL and kept.get(key, value) != value:
                raise GloVLMError(
                    f"The finished cell {folder} was run with {key} = {kept[key]!r}, and the study "
                    f"now says {value!r}: give another output folder, or remove that cell."
                )
        before.pop("split", None)  # what decides it is compared
        changed = before != inputs and changed_inputs(before, inputs)
        if changed:
            raise GloVLMError(
                f"Since the cell {folder} was finished, {', '.join(changed)}: give another output "
                "folder, or remove that cell."
            )
        read = ("README.md", "results.json", "predictions.parquet")  # a person may edit the first
        refuse_damage(folder, manifest, [name for name in manifest.files if name not in read])
        self.before = _Outcome.read(folder, manifest, self.before)
        return self.before


def _run_cells(
    todo: Sequence[tuple[Cell, TrainConfig]], workers: int, loader: Loader, cells: Path
) -> Iterator[tuple[Cell, str | None, float]]:
    """Run cells here, or in processes that each import anew and share nothing."""
    if workers == 1 or len(todo) < 2:
        for cell, config in todo:
            yield (cell, *_run_cell(config, cells, loader))
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn"), _start_worker)
    try:
        with _threads(threads):
            futures = {pool.submit(_run_cell, config, cells): cell for cell, config in todo}
            for future in as_completed(futures):
                yield (futures[future], *future.result())
    except BrokenProcessPool:
        raise GloVLMError(
            "A worker was killed, most often for want of memory: run the study again with fewer "
            "workers; its finished cells are kept."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_WORKERS_LOADER = Loader(keep=True)  # each worker process has its own


def _start_worker() -> None:
    quiet_libraries()
    end_with_parent()


def _run_cell(
    config: TrainConfig, cells: Path, loader: Loader | None = None
) -> tuple[str | None, float]:
    """Run one cell; return why it failed, if it did, and its seconds."""
    loader = loader or _WORKERS_LOADER
    start, folder, error = time.perf_counter(), Path(config.output_dir), None
    remove_below(cells, folder)  # what a killed run left
    try:
        run(config, loader=loader)
    except Exception as reason:  # whatever it is, it must not take the other cells with it
        known = isinstance(reason, GloVLMError)
        error = str(reason) if known else f"{type(reason).__name__}: {reason}"
        failure = {"error": error, "traceback": None if known else traceback.format_exc()}
        remove_below(cells, folder)
        write_json(folder / "failure.json", failure)
    return error, round(time.perf_counter() - start, 2)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Have new processes compute with so many threads: libraries read this once, on import."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


# ------------------------------------------------------------------------------------- report

_Runs = dict[int, _Outcome]  # by draw


def write_report(config: StudyConfig, output_dir: str | Path) -> dict[str, Any]:
    """Summarise and compare the finished cells; write `report.json` and `report.md`.

    Args:
        config: The grid.
        output_dir: Where `run_study` wrote its cells.

    Returns:
        `data`, `reference`, `synthetic`, `unit`, `sections` (one for each backbone and number of
        shots: `methods` with `metrics`, `versus_reference` and `label_budget`; `recall`;
        `recorded`), `failures`, `missing`, `notes`, `environment`.

    Raises:
        GloVLMError: No cell is finished, cells were run on different data or weights, or one is
            damaged.
    """
    output, cells = Path(output_dir).expanduser(), config.cells()
    _check_names(cells)
    with _no_collection():
        return _write_report(config, output, cells, {})


def _write_report(
    config: StudyConfig, output: Path, cells: Sequence[Cell], known: Mapping[str, _Outcome]
) -> dict[str, Any]:
    """Write the report; the outcomes of some cells are known."""
    table: dict[tuple[str, int], dict[str, _Runs]] = {}
    outcomes, failures, missing = list[tuple[Cell, _Outcome]](), [], []
    for cell in cells:
        folder = output / "cells" / cell.name
        if cell.name in known or (folder / "results.json").is_file():
            before = outcomes[-1][1] if outcomes else None
            outcome = known.get(cell.name) or _Outcome.read(folder, read_manifest(folder), before)
            outcomes.append((cell, outcome))
            lines = table.setdefault((cell.backbone, cell.shots), {})
            lines.setdefault(cell.method.name, {})[cell.draw] = outcome
        elif (folder / "failure.json").is_file():
            failure = read_json(folder / "failure.json")
            failures.append({"cell": cell.name, "error": str(failure.get("error"))})
        else:
            missing.append(cell.name)
    if not outcomes:
        reason = f": {failures[0]['error']}" if failures else ", so there is nothing to report."
        raise GloVLMError(f"No cell of the study in '{output}' is finished{reason}")
    _refuse_mixture(output, outcomes)
    every = [outcome.results for _, outcome in outcomes]
    first = every[0]
    unit = group_unit(first["data"]["group_column"])
    report = {
        "kind": "study",
        "data": {k: first["data"][k] for k in ("name", "fingerprint", "group_column")},
        "reference": config.reference,
        "synthetic": any(r["synthetic"] for r in every),
        "unit": unit,
        "sections": [_section(config, *key, lines, unit) for key, lines in table.items()],
        "failures": failures,
        "missing": missing,
        "notes": [
            f"Intervals: 95%, Student's t with the standard error of a bootstrap over {unit} (with "
            "all their images) crossed with label draws, not corrected for the number of methods.",
            "Differences are taken draw by draw on identical splits and supports. Means of methods "
            "with different numbers of draws are not comparable.",
            "The spread is the standard deviation over label draws; these redraw the same "
            f"{unit}, so it is no interval.",
            f"Predicted class: {first['threshold']}.",
            *dict.fromkeys(note for r in every for note in r["notes"]),
            *first["data"]["notes"],
        ],
        "environment": first["environment"],
    }
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_report(report))
    return report


def _refuse_mixture(output: Path, outcomes: Sequence[tuple[Cell, _Outcome]]) -> None:
    """Refuse to compare cells of other data, or of other weights under one backbone's name."""
    first: dict[str, tuple[Cell, Mapping[str, Any]]] = {}
    for cell, outcome in outcomes:
        for name, keys in (("", _DATA), (f"backbone {cell.backbone}", _MODEL)):
            now = {key: outcome.made_from[key] for key in keys}
            known, before = first.setdefault(name, (cell, now))
            if before != now and (changed := changed_inputs(before, now)):
                raise GloVLMError(
                    f"The cells in '{output}' cannot be compared: between {known.name} and "
                    f"{cell.name}, {', '.join(changed)}. Give another output folder."
                )


def _section(
    config: StudyConfig, backbone: str, shots: int, lines: Mapping[str, _Runs], unit: str
) -> dict[str, Any]:
    """Summary of all methods at one backbone and number of shots."""
    reference = lines.get(config.reference, {})
    compared = _compare(config, reference, lines, unit)
    methods = []
    for method in config.methods:
        runs = lines.get(method.name, {})
        results = [one.results for one in runs.values()]
        if not results:
            continue
        values = {k: [r["metrics"].get(k, {}).get("value") for r in results] for k in SUMMARISED}
        methods.append(
            {
                **asdict(method),
                "draws": sorted(runs),
                "metrics": {k: summarise_draws(v) for k, v in values.items()},
                "versus_reference": compared.get(method.name),
                "label_budget": _label_budget(method, results),
                # Towers that were never trained together: class texts carry no information.
                "text_means_nothing": results[0]["training"]["facts"].get("joint_space") is False,
                "trainable_parameters": results[0]["training"]["trainable_parameters"],
                "median_seconds": median(r["timing"]["total"] for r in results),
                "peak_memory_mib": max(
                    (mib for r in results if (mib := r["timing"]["peak_memory_mib"]) is not None),
                    default=None,  # on Windows
                ),
            }
        )
    return {
        "backbone": _short(backbone),
        "shots": shots,
        "methods": methods,
        "recall": _recall(lines),
        "recorded": _against_recorded(config, reference),
    }


def _compare(
    config: StudyConfig, reference: _Runs, lines: Mapping[str, _Runs], unit: str
) -> dict[str, dict[str, Any]]:
    """Paired differences of each method over its draws on identical splits and supports."""
    pairs: dict[str, list[PairedRun]] = {}
    for name, runs in lines.items():
        for draw in sorted(reference.keys() & runs.keys()) if name != config.reference else ():
            a, b = reference[draw], runs[draw]
            same = a.results["data"]["split_hash"] == b.results["data"]["split_hash"]
            if same and a.file_names == b.file_names and a.class_names == b.class_names:
                run = PairedRun(draw, a.labels, a.groups, a.probabilities, b.probabilities)
                pairs.setdefault(name, []).append(run)
    n, seed = (config.settings.get(k, d) for k, d in (("n_resamples", 2000), ("seed", 0)))
    differences = compare_methods(pairs, COMPARED, n, seed, unit=unit)
    return {
        name: {"draws": [run.draw for run in runs], "metrics": differences[name]}
        for name, runs in pairs.items()
    }


def _label_budget(method: StudyMethod, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Labels spent per draw and the groups they came from, each as `[least, most]`."""
    if method.method == "zero_shot":  # a support is drawn so that its splits are the others'
        return {"labels": [0, 0], "per_class": {}}
    supports = [r["data"]["support"] for r in results]
    labels, groups = ([s[f"{k}_per_class"] for s in supports] for k in ("labels", "groups"))

    def least_and_most(rows: Sequence[Mapping[str, int]], key: str) -> list[int]:
        counts = [row[key] for row in rows]
        return [min(counts), max(counts)]

    return {
        "labels": least_and_most(supports, "label_budget"),  # those of the validation too
        "per_class": {
            name: {"labels": least_and_most(labels, name), "groups": least_and_most(groups, name)}
            for name in labels[0]
        },
    }


def _recall(lines: Mapping[str, _Runs]) -> list[dict[str, Any]]:
    """Recall of every class in every group, over the draws that test the group."""
    every = [one for runs in lines.values() for one in runs.values()]
    shared = {id(one.groups): one.groups for one in every}
    ids = {key: check_groups(names, len(names)) for key, names in shared.items()}
    groups = np.unique(np.concatenate(list(ids.values())))
    number = {key: np.searchsorted(groups, names) for key, names in ids.items()}
    classes = sorted({name for one in every for name in one.class_names})
    images = np.zeros((len(groups), len(classes)), np.int64)  # of the first cell that tests them
    summaries: dict[tuple[int, int], dict[str, Any]] = {}
    for name, runs in lines.items():
        recalls = np.full((len(runs), *images.shape), np.nan)
        for recall, one in zip(recalls, runs.values(), strict=True):
            column = np.array([classes.index(label) for label in one.class_names])
            cells = number[id(one.groups)] * len(classes) + column[one.labels]
            right = one.probabilities.argmax(1) == one.labels
            counts = (np.bincount(at, minlength=images.size) for at in (cells, cells[right]))
            n, hits = (count.reshape(images.shape) for count in counts)
            np.divide(hits, n, out=recall, where=n > 0)
            np.copyto(images, n, where=images == 0)
        for g, c in np.argwhere(~np.isnan(recalls).all(0)).tolist():
            defined = [value for value in recalls[:, g, c].tolist() if value == value]
            summaries.setdefault((g, c), {})[name] = summarise_draws(defined)
    return [
        {"group": str(groups[g]), "class": classes[c], "n": int(images[g, c]), "methods": of}
        for (g, c), of in sorted(summaries.items())
    ]


def _against_recorded(config: StudyConfig, reference: _Runs) -> dict[str, Any] | None:
    """Largest differences of the reference from the values that the episodes file records."""
    _, recorded = _read_frozen(config.settings.get("episodes"))
    both = [draw for draw in reference if recorded.get(draw)]
    gaps: dict[str, list[float]] = {}
    for draw in both:
        for name, value in recorded[draw].items():
            ours = reference[draw].results["metrics"].get(name, {}).get("value")
            if ours is not None:
                gaps.setdefault(name, []).append(abs(ours - value))
    if not gaps:
        return None
    largest = {name: max(values) for name, values in gaps.items()}
    return {"n_draws": len(both), "largest_difference": largest}


def render_report(report: Mapping[str, Any]) -> str:
    """Render a report as Markdown; on synthetic images every heading is marked."""
    titles = [METRICS[name].title for name in COMPARED]
    summarised = [METRICS[name].title for name in SUMMARISED]
    values = {
        **{name: report[name] for name in ("data", "reference", "unit", "notes")},
        "mark": SYNTHETIC if report["synthetic"] else "",
        "paired_header": ["method", "draws", *(h for title in titles for h in (title, "verdict"))],
        "summary_header": [
            *("method", "draws", *summarised, "labels", "trainable parameters", "seconds a draw")
        ],
        "sections": [
            _section_values(section, report["reference"], report["unit"])
            for section in report["sections"]
        ],
        "failures": [[failure["cell"], failure["error"]] for failure in report["failures"]],
        "n_missing": len(report["missing"]),
    }
    return render("study_report.md.j2", values)


def _section_values(section: Mapping[str, Any], reference: str, unit: str) -> dict[str, Any]:
    """What `study_report.md.j2` names of one backbone and number of shots."""
    methods, names = section["methods"], [m["name"] for m in section["methods"]]
    shown_as = {m["name"]: m["name"] + "*" * m["text_means_nothing"] for m in methods}
    budgets = [m["label_budget"]["per_class"] for m in methods]
    # A recall in each of hundreds of groups of an image or two is noise: the largest are shown.
    recall = section["recall"]
    largest = sorted(range(len(recall)), key=lambda i: -recall[i]["n"])[:RECALL_ROWS]
    recorded = section["recorded"]
    return {
        "backbone": section["backbone"],
        "shots": section["shots"],
        "labels": ", ".join(
            f"{extent(of['labels'])} {name} (of {extent(of['groups'])} {unit})"
            for name, of in max(budgets, key=len).items()
        ),
        "paired": [
            [shown_as[m["name"]], *_paired(m["versus_reference"])]
            for m in methods
            if m["name"] != reference
        ],
        "summary": [
            [
                shown_as[m["name"]],
                len(m["draws"]),
                *(_spread(m["metrics"][k]) for k in SUMMARISED),
                extent(m["label_budget"]["labels"]),
                f"{m['trainable_parameters']:,}",
                f"{m['median_seconds']:.1f}",
            ]
            for m in methods
        ],
        "text_means_nothing": any(m["text_means_nothing"] for m in methods),
        "recorded": recorded
        and {
            "n_draws": recorded["n_draws"],
            "differences": ", ".join(
                f"{METRICS[k].title} {v:.4f}" for k, v in recorded["largest_difference"].items()
            ),
        },
        "recall_header": ["group", "class", "images", *(f"{name} (draws)" for name in names)],
        "recall": [
            [row["group"], row["class"], row["n"], *(_mean_recall(row, name) for name in names)]
            for row in (recall[i] for i in sorted(largest))
        ],
        "n_recall": len(recall),
    }


def _mean_recall(row: Mapping[str, Any], method: str) -> str:
    """`0.83 (3)`: mean and number of draws; nothing where no draw tests the group."""
    summary = row["methods"].get(method)
    return f"{summary['mean']:.2f} ({summary['n_draws']})" if summary else ""


def _paired(versus: Mapping[str, Any] | None) -> list[str]:
    if versus is None:
        return ["0", *["", "no draw in common"] * len(COMPARED)]
    cells = [str(len(versus["draws"]))]
    for name in COMPARED:
        row = versus["metrics"][name]
        shown = "undefined"
        if row["ci95"] is not None:
            low, high = row["ci95"]
            shown = f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells += [shown, "; ".join(text for text in (row["verdict"], row["note"]) if text)]
    return cells


def _spread(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "undefined"
    return f"{row['mean']:.3f}" + ("" if row["sd"] is None else f" (spread {row['sd']:.3f})")


def _short(backbone: str) -> str:
    """Name a backbone for folders and headings: the last part of each path or Hub id."""
    places = [os.path.abspath(Path(part).expanduser()) for part in backbone.split("+")]
    return "+".join(Path(place).name for place in places)


# ------------------------------------------------------------------------- reading the settings


def _read_method(given: Any, draws: Any, frozen: Mapping[int, Any]) -> StudyMethod:
    line = dict(given) if isinstance(given, dict) else {"name": given}
    method, numbers = line.pop("name", None), line.pop("draws", draws)
    name = line.pop("label", method)
    plain = is_plain_name(str(name)) and re.fullmatch(r"[\w.-]+", str(name))
    if not isinstance(method, str) or not plain:
        raise GloVLMError(
            f"Expected the name of a method, or 'name:' with a 'label:' of letters, digits, '-' "
            f"and '_'; found {given!r}."
        )
    if type(numbers) is int and numbers > MOST_CELLS:
        raise GloVLMError(f"A study has at most {MOST_CELLS:,} draws; found {shown(numbers)}.")
    chosen = list(range(numbers)) if type(numbers) is int else numbers
    good = isinstance(chosen, list) and all(type(n) is int and n >= 0 for n in chosen)
    if not good or not chosen or len(set(chosen)) < len(chosen):
        raise GloVLMError(f"Expected draws as a number or a list of different ones: {numbers!r}.")
    absent = sorted(set(chosen) - set(frozen))
    if frozen and absent:
        raise GloVLMError(
            f"Method '{name}' asks for draw {absent[0]}, and the episodes file holds "
            f"{len(frozen)} draws, {min(frozen)} to {max(frozen)}."
        )
    return StudyMethod(str(name), method, tuple(chosen), _settings(line, {"label", "draws"}))


def _settings(values: Mapping[str, Any], also: set[str]) -> dict[str, Any]:
    for key in values:
        if key not in _SETTINGS:
            near = nearest(str(key), _SETTINGS | also)
            raise GloVLMError(f"A study has no setting '{key}'.{near}")
    return read_values(TrainConfig, values)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_frozen(path: str | None) -> tuple[int | None, dict[int, dict[str, float]]]:
    """Shots of an episodes file, and what it records of each draw; nothing without a file."""
    if path is None:
        return None, {}
    try:
        content = json.loads(read_text(Path(path).expanduser(), EPISODES))
        draws = {int(d["draw"]): d.get(RECORDED) or {} for d in content["draws"]}
        return int(content["shots"]), draws
    except GloVLMError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GloVLMError(f"{path} is not a file of frozen episodes as a run writes it.") from None
