"""Console output of `glovlm`: tables on the standard output, all else on the error stream."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import GloVLMError
from ..files import disk_reason, short_path

if TYPE_CHECKING:
    import threading

logger = logging.getLogger("hf_glovlm")


def synthetic_mark(data: str) -> str:
    """Mark behind a title, if a folder is marked as holding synthetic images."""
    from ..data.folder import is_synthetic

    return " (synthetic images)" if is_synthetic(data) else ""


def check_output(path: Path | None, kind: str, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before any work, a place where a file must not be written.

    Args:
        path: The file, if one is to be written.
        kind: `results`, `predictions` (parquet), `table` (CSV of predictions), `bench` or `page`.
        inputs: What the command reads, and its other outputs.
    """
    from ..files import check_target

    if path is None:
        return
    if path.name in _OF_A_RUN and _holds_run(path.parent):
        raise GloVLMError(f"{path} belongs to a run: give another --output.")
    check_target(path, *_OUTPUTS[kind], inputs)


def _holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    from ..files import UNFINISHED, read_json, results_kind

    if any(os.path.isdir(folder / name) for name in ("model", UNFINISHED)):
        return True
    with suppress(GloVLMError):
        return results_kind(read_json(folder / "results.json")) not in (None, "evaluation")
    return False


def _is_evaluation(path: Path) -> bool:
    from ..files import read_json, results_kind

    content = read_json(path)
    return results_kind(content) == "evaluation" and "config" in content


def _is_predictions(path: Path) -> bool:
    import pyarrow.parquet as pq

    return b"hf_glovlm" in (pq.read_schema(path).metadata or {})


def _is_table(path: Path) -> bool:
    from ..files import first_line

    return first_line(path).startswith("file_name,predicted,p_")


def _is_audit(path: Path) -> bool:
    return "<title>Data audit</title>" in path.read_text(encoding="utf-8")[:100_000]


def _is_audit_facts(path: Path) -> bool:
    from ..files import read_json

    return bool(read_json(path).get("kind") == "data_audit")


def _is_bench(path: Path) -> bool:
    from ..files import read_json

    return bool(read_json(path).get("kind") == "bench")


def _is_page(path: Path) -> bool:
    return b"Made by hf-glovlm from results alone" in path.read_bytes()[-20_000:]


_OF_A_RUN = ("results.json", "predictions.parquet", "episodes.json", "log.jsonl", "config.yaml")
_OUTPUTS = {
    "results": ("results of `glovlm evaluate`", _is_evaluation),
    "predictions": ("predictions of `glovlm evaluate`", _is_predictions),
    "table": ("a table of `glovlm predict`", _is_table),
    "audit": ("a page of `glovlm data check`", _is_audit),
    "audit_facts": ("the numbers of a data audit", _is_audit_facts),
    "bench": ("the JSON of `glovlm bench`", _is_bench),
    "page": ("a page of `glovlm compare`", _is_page),
}


INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells give them for SIGINT and SIGTERM


@contextmanager
def until_terminated(*, last: bool) -> "Iterator[threading.Event]":
    """End a command at SIGTERM as at Ctrl-C, so that all that is open is closed; set then.

    A second signal does not disturb that. Elsewhere than in the main thread, and where a program
    around us has a handler, it does nothing.

    Args:
        last: Whether the process ends with the command, and is not to be disturbed in that either.
    """
    import signal
    import threading

    ended = threading.Event()

    def end(number: int, frame: Any) -> None:
        for each in before:  # what is being closed now is closed in peace
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGTERM:
            ended.set()
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no failure
            stream.reconfigure(errors="replace")
    here = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    plain = (signal.SIG_DFL, signal.default_int_handler)
    before = {each: handler for each, handler in handlers.items() if here and handler in plain}
    for each in before:
        signal.signal(each, end)
    try:
        yield ended
    except KeyboardInterrupt:  # it came between two lines of ours
        ended.set()
    finally:
        for each, handler in before.items():
            if not (last and signal.getsignal(each) == signal.SIG_IGN):
                signal.signal(each, handler)


def explain_failure(error: Exception) -> str | None:
    """Sentence for an error that is the command line's, the disk's or the memory's; else `None`."""
    if hasattr(error, "format_message"):  # all that Typer raises for a wrong command line
        path = getattr(getattr(error, "ctx", None), "command_path", "glovlm")
        return f"{error.format_message()} (see {path} --help)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"The memory does not suffice ({str(error).splitlines()[0] if str(error) else 'full'}):"
            " give a smaller --batch-size, fewer --workers or smaller images."
        )
    reason = disk_reason(error)
    if reason is None:
        return None
    place = getattr(error, "filename", None) or "A file"
    return (
        f"{short_path(place)} cannot be used ({reason}): free space there, or give another place."
    )


def is_main() -> bool:
    """Whether this is the process that prints, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a note on the error stream, in one line."""
    if is_main():
        typer.echo(" ".join(text.splitlines()), err=True)


def fail(sentence: str) -> int:
    """Print an error in one line and return the exit code 2."""
    if is_main():
        word = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
        typer.echo(f"{word} {' '.join(sentence.split())}", err=True)
    return 2


class Notes(logging.Handler):
    """Log handler: warnings of the package as notes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        note(f"note: {record.getMessage()}")


@contextmanager
def show_progress() -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Progress display: a bar on a terminal, else lines, about ten for a training."""
    if not sys.stderr.isatty() or not is_main():

        def show_line(kind: str, what: dict[str, Any]) -> None:
            due = kind != "epoch" or what["epoch"] == what["epochs"]
            if due or what["epoch"] % max(what["epochs"] // 10, 1) == 0:
                note(event_text(kind, what))

        yield show_line
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def show(kind: str, what: dict[str, Any]) -> None:
            text = event_text(kind, what)
            if kind == "epoch":
                count = {"completed": what["epoch"], "total": what["epochs"]}
                bar.update(bar.task_ids[-1], description=text, **count)
            elif kind == "stage":
                for task in bar.task_ids:
                    bar.remove_task(task)
                bar.add_task(text, total=None)
            else:
                bar.console.print(text, highlight=False, markup=False)

        yield show


def follow_slides(batch_size: int) -> Callable[[str, Mapping[str, Any]], None]:
    """Progress over slides: a note a stage and a slide, and about ten within a slide.

    Args:
        batch_size: Pieces of a slide that are done at a time.
    """

    def show(kind: str, what: Mapping[str, Any]) -> None:
        if kind == "slide":
            error = f" ({what['error']})" if what.get("error") else ""
            note(f"{what['slide']}: {what['status']}{error}")
        elif kind == "stage":
            note(f"{what['name']} ...")
        else:  # what a slide is cut into: tiles, windows
            ten = max(what["total"] // 10, 1)
            if what["done"] == what["total"] or what["done"] % ten < batch_size:
                note(f"{what['slide']}: {what['done']} of {what['total']} {kind}")

    return show


def note_once(sentences: Iterable[tuple[str, str]]) -> None:
    """Print notes on slides, what several of them share once.

    Args:
        sentences: Of each its slide and the sentence.
    """
    places: dict[str, list[str]] = {}
    for slide, sentence in sentences:
        places.setdefault(sentence, []).append(slide)
    for sentence, slides in places.items():
        note(f"{slides[0] if len(slides) == 1 else f'{len(slides)} slides'}: {sentence}")


def event_text(kind: str, what: Mapping[str, Any]) -> str:
    """One line for an event of `runs.run`."""
    if kind == "epoch":
        return f"epoch {what['epoch']}/{what['epochs']}, loss {what['loss']:.4f}"
    if kind == "episode":
        groups, counts = what["groups_per_class"], what["labels_per_class"].items()
        return "labels: " + ", ".join(
            f"{n} {name} (of {groups[name]} groups)" for name, n in counts
        )
    return f"{what['name']} ..." if kind == "stage" else f"method {what['name']}"


def print_metrics(results: Mapping[str, Any], as_json: bool) -> None:
    """Print results: labels and groups of the support, metrics, metrics per class; or as JSON."""
    if as_json:
        print_json(results)
        return
    from ..rendering import CLASS_HEADER, METRIC_HEADER, class_rows, group_unit, metric_rows

    synthetic, data = "synthetic images, " if results["synthetic"] else "", results["data"]
    unit = group_unit(data["group_column"])
    if "support" in data:
        labels, groups = data["support"]["labels_per_class"], data["support"]["groups_per_class"]
        rows = [[name, str(n), str(groups[name])] for name, n in labels.items()]
        title = "Learned from synthetic images" if synthetic else "Learned from"
        print_table(title, ["class", "labels", f"contributing {unit}"], rows)
    title = f"{synthetic}{results['n']} test images of {results['n_groups']} {unit}"
    print_table(f"Metrics ({title})", METRIC_HEADER, metric_rows(results["metrics"]))
    print_table(f"Per class ({title})", CLASS_HEADER, class_rows(results["per_class"]))
    for sentence in results["notes"]:
        note(sentence)


def print_rows(
    title: str, rows: Sequence[Mapping[str, Any]], shown: Sequence[str], as_json: bool
) -> None:
    """Some columns of rows as a table, or all of them as JSON."""
    if as_json:
        print_json(rows)
    else:
        cells = [[cell(row[name]) for name in shown] for row in rows]
        print_table(title, [name.replace("_", " ") for name in shown], cells)


def cell(value: Any) -> str:
    """Text of a value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a terminal, or aligned text that other programs can read."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*map(escape, header), title=escape(title), title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    ]
    typer.echo("\n".join([title, *lines, ""]))


def print_json(value: Any) -> None:
    """Indented JSON; a run's results as their file holds them."""

    def plain(part: Any) -> Any:
        return part.to_dict() if hasattr(part, "to_dict") else str(part)

    typer.echo(json.dumps(value, indent=1, default=plain))
