"""Console output of `glovlm`: tables on the standard output, all else on the error stream."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import GloVLMError
from ..files import disk_reason, short_path
from ..progress import Lines, is_main, showing
from .layout import lay_out, printable, text_width, wrap

if TYPE_CHECKING:
    import threading

    from ..inference import Predictions

logger = logging.getLogger("hf_glovlm")

_FEW = 4  # classes whose probabilities have a column each


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


def note(text: str) -> None:
    """Print a note on the error stream: in one line, or wrapped on a terminal."""
    if is_main():
        typer.echo("\n".join(_wrapped(" ".join(text.splitlines()))), err=True)


def fail(sentence: str) -> int:
    """Print an error, in one line or wrapped on a terminal, and return the exit code 2."""
    if is_main():
        first, *more = _wrapped(f"error: {' '.join(sentence.split())}")
        if sys.stderr.isatty():
            first = first.replace("error:", _styled("error:", fg="red", bold=True), 1)
        typer.echo("\n".join([first, *more]), err=True)
    return 2


def _wrapped(line: str) -> list[str]:
    """Lines of a sentence: wrapped on a terminal; in a log, where lines are searched, one."""
    return wrap(line, text_width()) if sys.stderr.isatty() else [line]


def _styled(text: str, **style: Any) -> str:
    """Text in a style, unless `NO_COLOR` is set (https://no-color.org)."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


class Notes(logging.Handler):
    """Log handler: warnings of the package as notes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        note(f"note: {record.getMessage()}")


@contextmanager
def show_progress() -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """Progress display of a command: bars on a terminal, else a line every ten seconds.

    Yields:
        A function that takes the events of `run`.
    """
    display = None if sys.stderr.isatty() else Lines(note)
    with showing(True, display) as event:
        yield event


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
    if isinstance(value, float):
        return three_digits(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in the width of the terminal, or in 80 columns; see `layout.lay_out`.

    A column without anything in it, such as notes of which there are none, is left out.

    Args:
        title: Stands above it.
        header: Names of the columns; a table of facts has none but empty ones.
        rows: Cells of each row.
    """
    width, drawn = text_width(), sys.stdout.isatty()
    lines = wrap(printable(title), width)
    if drawn:
        lines = [_styled(line, bold=True) for line in lines]
    kept = [i for i in range(len(header)) if not (i and rows) or any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    blocks = lay_out(header, rows, width)
    for head, body in blocks if any(header) else [([], body) for _, body in blocks]:
        long = max(map(len, [*head, *body]), default=0)
        rule = [_styled("\N{BOX DRAWINGS LIGHT HORIZONTAL}" * min(long, width), dim=True)]
        lines += [*head, *(rule if drawn else []), *body, ""]
    typer.echo("\n".join(lines))


def print_predictions(
    title: str, predictions: "Predictions", answers: Mapping[str, Sequence[Any]]
) -> None:
    """Table of predictions: all probabilities of up to four classes, else the largest.

    Args:
        title: Stands above it.
        predictions: From `predict`.
        answers: Further columns, see `calibration_columns`.
    """
    from ..rendering import number

    names = predictions.class_names
    few = len(names) <= _FEW
    rows = []
    each = (predictions.file_names, predictions.predicted, predictions.probabilities.tolist())
    for file, label, p, *more in zip(*each, *answers.values(), strict=True):
        of = dict(zip(names, p, strict=True))
        shares = [*map(number, p)] if few else [most_probable(of)]
        further = (number(v) if isinstance(v, float) else str(v) for v in more)
        rows.append([file, label, *shares, *further])
    shown = [f"p_{name}" for name in names] if few else ["most probable"]
    print_table(title, ["file_name", "predicted", *shown, *answers], rows)


def three_digits(value: float) -> str:
    """A measured value as tables have it: three decimals up to 1, three digits above."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if size < 0.0005:
        return f"{value:.2e}"
    return f"{value:.3f}" if size <= 1 else f"{value:.3g}" if size < 99.95 else f"{value:,.0f}"


def print_failures(what: str, reasons: Sequence[tuple[str, str]], as_json: bool = False) -> None:
    """The last table of a command: what failed, and why; nothing where nothing did.

    Args:
        what: A piece of the work, such as `slide`.
        reasons: Of each that failed its name, and the reason.
        as_json: Notes in place of a table, beside JSON.
    """
    if as_json:
        for name, reason in reasons:
            note(f"{name}: failed ({reason})")
    elif reasons:
        n = len(reasons)
        title = f"Failed: {n} {what}" + ("s" if n > 1 else "")
        print_table(title, [what, "reason"], reasons)


def failed_slides(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names of the slides in `results.json` that failed, and why."""
    return [(str(one["slide"]), str(one["error"])) for one in entries if one.get("error")]


def most_probable(probabilities: Mapping[str, float], most: int = 3) -> str:
    """The most probable classes in words: `viable 0.912, sclerosed 0.061, 28 more`."""
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    shown = [f"{name} {value:.3f}" for name, value in ranked[:most]]
    more = len(ranked) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])])


def print_json(value: Any) -> None:
    """Indented JSON; a run's results as their file holds them."""

    def plain(part: Any) -> Any:
        return part.to_dict() if hasattr(part, "to_dict") else str(part)

    typer.echo(json.dumps(value, indent=1, default=plain))
