"""Benchmark of reading: how often a run opens and decodes each image."""

import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ImageFile

from .timing import Row, as_row
from .towers import caching_in

GROUPS = {"": "without a column of patients", "_groups": "with a column of patients"}
_COLUMNS = ("file_name", "label")


def bench_data(
    *, backbone: str = "mini", patients: int = 10, per_patient: int = 20, shots: int = 8
) -> Iterator[Row]:
    """Benchmark of reading in a run of `linear_probe`: first with an empty cache, then a warm one.

    Args:
        backbone: As `--backbone` takes it.
        patients: Synthetic patients.
        per_patient: Images of each.
        shots: Labelled images of a class.

    Yields:
        Without and with a column of patients: `data.reads` and `data.decodes`, how often an image's
        file is opened and its pixels are decoded in the warm run, as a mean over the images;
        the same of the cold run (`_cold`); and the seconds of both, the ratio how many times
        faster the warm one is.
    """
    from ...runs import TrainConfig, run
    from ..phantoms import write_cohort

    with tempfile.TemporaryDirectory() as place:
        data = write_cohort(Path(place) / "images", patients, per_patient, seed=0)
        grouped = (data / "metadata.csv").read_text(encoding="utf-8")
        n = patients * per_patient
        for suffix, groups in GROUPS.items():
            (data / "metadata.csv").write_text(grouped, encoding="utf-8")
            if not suffix:
                _drop_columns(data / "metadata.csv")
            taken, what = {}, f"a run of linear_probe on {n} synthetic images {groups}, {backbone}"
            for state, cache in (("_cold", "an empty cache"), ("", "a warm cache")):
                config = TrainConfig(
                    data=str(data),
                    output_dir=str(Path(place) / f"run{suffix}{state}"),
                    backbone=backbone,
                    shots=shots,
                )
                with caching_in(Path(place) / f"cache{suffix}"), count_reads(data) as counted:
                    start = time.perf_counter()
                    run(config)
                    taken[state] = time.perf_counter() - start
                for kind, count in counted.items():
                    note = f"{what}, {cache}: {kind} of an image, a mean over all"
                    yield as_row(f"data.{kind}{suffix}{state}", count / n, "a file", None, note)
            note = f"{what}, an empty cache"
            yield as_row(f"data.run{suffix}_cold", taken["_cold"], "s", None, note)
            note = f"{what}, a warm cache; ratio: times faster than with an empty one"
            faster = taken["_cold"] / taken[""]
            yield as_row(f"data.run{suffix}", taken[""], "s", faster, note)


def _drop_columns(table: Path) -> None:
    """Keep names and labels alone, so that nothing says which images belong together."""
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


_COUNTING: list[tuple[str, dict[str, int]]] = []  # folders, and what is counted in them
_HOOKED: list[bool] = []


def _count_open(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: count an image's file that is opened, by whatever way."""
    if not _COUNTING or event != "open":
        return
    path = str(arguments[0])
    for folder, counted in _COUNTING:
        if path.startswith(folder) and path.endswith((".png", ".jpg")):
            counted["reads"] += 1


@contextmanager
def count_reads(folder: Path) -> Iterator[dict[str, int]]:
    """Count how often image files below a folder are opened, and how often any is decoded.

    Yields:
        `reads` and `decodes`; complete once the context has ended.
    """
    if not _HOOKED:  # Python keeps a hook for good; without a folder it does nothing
        sys.addaudithook(_count_open)
        _HOOKED.append(True)
    counted, plain = {"reads": 0, "decodes": 0}, ImageFile.ImageFile.load

    def load(image: Any) -> Any:
        counted["decodes"] += bool(image.tile)  # a second load of one image decodes nothing
        return plain(image)

    _COUNTING.append((str(folder), counted))
    ImageFile.ImageFile.load = load  # type: ignore[assignment, method-assign]
    try:
        yield counted
    finally:
        ImageFile.ImageFile.load = plain  # type: ignore[method-assign]
        _COUNTING.pop()
