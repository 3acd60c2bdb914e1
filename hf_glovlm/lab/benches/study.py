"""Benchmark of studies: what a cell costs beside its fitting, and a finished study's start."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import GloVLMError
from ...files import read_manifest, write_json, write_manifest
from ...inference import guard
from ...runs import study as studies
from ...runs import workflow
from ...runs.study import StudyConfig, run_study
from ...training import adaptation
from ..phantoms import write_cohort
from .timing import Row, as_row, one_thread
from .towers import Shape, caching_in, random_clip

METHODS = ("linear_probe", "zero_shot", "tip_adapter", "gda")


def bench_study(
    *,
    shape: Shape | None = None,
    n_patients: int = 20,
    per_patient: int = 10,
    shots: int = 8,
    draws: int = 20,
    n_cells: int = 2_000,
) -> list[Row]:
    """Benchmark of studies on a synthetic cohort, with a warm cache, on one thread.

    Args:
        shape: Of the random CLIP beside `mini`, ViT-B/16 if not given.
        n_patients: Synthetic patients.
        per_patient: Images of each.
        shots: Labelled images of each class.
        draws: Cells of `linear_probe` that are timed for each backbone.
        n_cells: Finished cells of the study that is started and reported.

    Returns:
        For `mini` and for the random CLIP the seconds that the first cell takes longer
        (`study.first`), those of a cell (`study.cell`), of its fitting with the guard's
        (`study.fitting`), of its metrics with their intervals (`study.metrics`), and the rest
        (`study.overhead`; ratio: part of the cell); then the seconds in which a study of
        finished cells starts and reports, also for 10,000 of them (`study.resume`).

    Raises:
        GloVLMError: A cell failed, or a finished one was run again.
    """
    rows = []
    with (
        tempfile.TemporaryDirectory() as place,
        caching_in(Path(place) / "features"),
        one_thread(),
    ):
        folder = Path(place)
        data = write_cohort(folder / "cohort", n_patients, per_patient, seed=0)
        model, processor = random_clip(shape or Shape())
        model.save_pretrained(folder / "clip")
        processor.save_pretrained(folder / "clip")
        for name, backbone in (("mini", "mini"), ("clip", str(folder / "clip"))):
            rows += _bench_cell(name, data, backbone, folder / f"study-{name}", shots, draws)
        rows += _bench_resume(data, folder / "finished", shots, n_cells)
    return rows


def _grid(data: Path, backbone: str, methods: Sequence[str], shots: int, draws: int) -> StudyConfig:
    return StudyConfig.from_mapping(
        {
            "data": str(data),
            "backbone": backbone,
            "methods": list(methods),
            "reference": methods[0],
            "shots": shots,
            "draws": draws,
        }
    )


def _run(config: StudyConfig, output: Path, status: str, count: int) -> None:
    """Run a study and check that so many cells ended with this status."""
    ends: list[str] = []
    run_study(config, output, on_event=lambda kind, what: ends.append(what["status"]))
    if ends.count(status) != count:
        raise GloVLMError(f"Expected {count} cells to be {status}, found {ends.count(status)}.")


def _bench_cell(
    name: str, data: Path, backbone: str, output: Path, shots: int, draws: int
) -> list[Row]:
    """Seconds of a cell, of its fitting and of its metrics: medians, so without what is loaded."""
    config = _grid(data, backbone, METHODS[:1], shots, draws)
    _run(config, output, "done", draws)  # fills the cache
    shutil.rmtree(output)
    with _timed() as cells:
        _run(config, output, "done", draws)
    parts = [(c["cell"], c["fitting"], c["metrics"]) for c in cells]
    whole, fitting, metrics = map(median, zip(*parts, strict=True))
    rest = median(cell - fit - measured for cell, fit, measured in parts)
    first = cells[0]["cell"] - whole
    what = f"a cell of linear_probe, {name}, one thread, median of {draws}"
    return [
        as_row(
            f"study.first_{name}",
            first,
            "s",
            None,
            f"what the first cell of linear_probe, {name}, takes longer: data and backbone",
        ),
        as_row(f"study.cell_{name}", whole, "s", None, f"{what}, warm cache"),
        as_row(f"study.fitting_{name}", fitting, "s", None, f"{what}: head and guard are fitted"),
        as_row(f"study.metrics_{name}", metrics, "s", None, f"{what}: metrics and intervals"),
        as_row(
            f"study.overhead_{name}", rest, "s", rest / whole, f"{what}: the rest; ratio: its part"
        ),
    ]


@contextmanager
def _timed() -> Iterator[list[dict[str, float]]]:
    """Seconds of each cell within the block, and of its fitting and its metrics."""
    places: list[tuple[str, Any, str]] = [
        ("cell", studies, "run"),
        ("fitting", adaptation, "_fit_features"),
        ("fitting", guard, "fit_guard"),
        ("metrics", workflow, "measure"),
        ("metrics", workflow, "_subgroups"),
    ]
    cells: list[dict[str, float]] = []
    kept = []
    for key, owner, name in places:
        scope = vars(owner)
        kept.append((scope, name, scope[name]))
        scope[name] = _clocked(scope[name], cells, key)
    try:
        yield cells
    finally:
        for scope, name, real in kept:
            scope[name] = real


def _clocked(real: Any, cells: list[dict[str, float]], key: str) -> Any:
    def clocked(*values: Any, **options: Any) -> Any:
        if key == "cell":
            cells.append(dict.fromkeys(("cell", "fitting", "metrics"), 0.0))
        start = time.perf_counter()
        try:
            return real(*values, **options)
        finally:
            cells[-1][key] += time.perf_counter() - start

    return clocked


def _bench_resume(data: Path, output: Path, shots: int, n_cells: int) -> list[Row]:
    """Start and report of a finished study, whose cells are copies but for their draw."""
    draws = max(1, n_cells // len(METHODS))
    count = draws * len(METHODS)
    _run(_grid(data, "mini", METHODS, shots, 1), output, "done", len(METHODS))
    few = _time_resume(data, output, shots, 1)
    for first in sorted(output.glob("cells/*/*/*/draw-00")):
        for draw in range(1, draws):
            copy_cell(first, draw)
    many = _time_resume(data, output, shots, draws)
    each = max(0.0, many - few) / max(1, count - len(METHODS))
    all_of_them = few + each * (10_000 - len(METHODS))
    what = "finished cells of 4 methods, mini: found finished, compared, report written"
    return [
        as_row("study.resume", many, "s", None, f"{count:,} {what}"),
        as_row(
            "study.resume_10000", all_of_them, "s", None,
            f"10,000 {what}; by the line through {len(METHODS)} and {count:,} cells",
        ),
    ]  # fmt: skip


def _time_resume(data: Path, output: Path, shots: int, draws: int) -> float:
    """Seconds in which a finished study starts and writes its report."""
    config = _grid(data, "mini", METHODS, shots, draws)
    start = time.perf_counter()
    _run(config, output, "skipped", draws * len(METHODS))
    return time.perf_counter() - start


def copy_cell(first: Path, draw: int) -> Path:
    """Copy a finished cell as that of another draw, with a manifest that is right.

    Args:
        first: The folder of the cell.
        draw: The other draw.

    Returns:
        The folder of the copy, beside the first.
    """
    copy = first.with_name(f"draw-{draw:02d}")
    copy.mkdir()
    manifest = read_manifest(first)
    assert manifest is not None  # of a finished cell
    for name in manifest.files:
        shutil.copyfile(first / name, copy / name)
    results = json.loads((copy / "results.json").read_text("utf-8"))
    results["config"]["draw"] = draw
    write_json(copy / "results.json", results)
    settings = {**manifest.made_from["settings"], "draw": draw}
    made_from = {**manifest.made_from, "settings": settings}
    write_manifest(copy, manifest.kind, made_from, list(manifest.files))
    return copy
