"""Study: a grid of runs (backbone x method x shots x label draw) and its paired comparison.

Every cell is one `runs.run` in a folder of its own, without the model. A finished cell is never
run again, so a study that was killed goes on where it stopped, and one that grew runs what is new.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..environment import end_with_parent, quiet_libraries
from ..errors import GloVLMError
from ..files import (
    changed_inputs,
    check_kind,
    is_empty,
    one_writer,
    read_manifest,
    refuse_damage,
    remove_below,
    write_json,
)
from ..progress import announce, counted, showing
from .config import TrainConfig
from .feature_map import write_maps
from .loading import Loader
from .study_config import (
    Cell,
    StudyConfig,
    StudyGoal,
    StudyMethod,
    check_names,
    short_name,
)
from .study_controls import write_controls
from .study_report import Outcome, no_collection, render_report, report_cells, write_report
from .workflow import run

__all__ = [
    "Cell",
    "StudyConfig",
    "StudyGoal",
    "StudyMethod",
    "render_report",
    "run_study",
    "write_report",
]

# Change no number.
_INCIDENTAL = {"output_dir", "overwrite", "resume", "save_model", "cache", "device", "tracker"}


# ------------------------------------------------------------------------------------ running


def run_study(
    config: StudyConfig,
    output_dir: str | Path,
    *,
    workers: int = 1,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run the unfinished cells of a study, then write `report.json` and `report.md`.

    A cell that fails leaves `failure.json` and is tried again the next time; the others go on.

    Args:
        config: The grid.
        output_dir: Holds `study.json`, `cells/` and the report.
        workers: Processes; each runs cells with its share of the CPU cores.
        on_event: Called with `("cell", {"name", "status", "done", "total", "seconds", "error"})`
            for every cell; the status is `done`, `skipped` or `failed`.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        The report; `failures` is empty if every cell is there.

    Raises:
        GloVLMError: The data are bad, a finished cell has other settings, or a worker was killed.
    """
    output = Path(output_dir).expanduser()
    if workers < 1:
        raise GloVLMError(f"Expected 1 or more workers, found {workers}.")
    cells = config.cells()
    check_names(cells)
    _check_place(output)
    with one_writer(output), showing(progress):
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
    todo, finished = [], dict[str, Outcome]()
    lines = _Lines(config, output, loader)
    with no_collection():
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
    failed = set[str]()
    outcomes = _run_cells(todo, workers, loader, output / "cells")
    for cell, error, seconds in counted(outcomes, "cells", total=len(todo)):
        failed |= {cell.name} if error else set()
        notify(cell, "failed" if error else "done", error, seconds)
    announce("making the report")
    shown = {c.backbone: c for c in reversed(cells) if c.name not in failed}
    of = {short_name(name): config.train_config(c, output) for name, c in shown.items()}
    write_maps(output, of, loader)
    write_controls(config, output, loader)
    with no_collection():
        return report_cells(config, output, cells, finished)


def _check_place(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise GloVLMError(f"--output-dir must be a folder; '{output}' is a file.")
    if not is_empty(output) and not (output / "study.json").is_file():
        check_kind(output, "study")
        raise GloVLMError(f"'{output}' is no study of ours: give an empty or a new folder.")


@dataclass
class _Lines:
    """Lines of a study: what the cells of each would be made from, worked out once."""

    config: StudyConfig
    output: Path
    loader: Loader
    expected: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    before: Outcome | None = None  # that was read last

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

    def read_finished(self, cell: Cell) -> Outcome | None:
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
        self.before = Outcome.read(folder, manifest, self.before)
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
