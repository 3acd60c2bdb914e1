"""Progress of long work: how much is done, how fast, and how long the rest takes.

What works through many pieces counts them (`counting`, `counted`), and knows nothing of who looks
on. A command, or `run` in a notebook, shows the counts (`showing`): as bars on a terminal, as a
line every ten seconds in a log, as bars in a notebook; on the error stream, so that what a command
prints stays as it is. Where nobody looks on, counting costs nothing. In worker processes, and in
all but the main one under `accelerate launch`, nothing is shown.
"""

import html
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol, TypeVar

__all__ = [
    "EVERY",
    "Count",
    "Lines",
    "NotebookBars",
    "TerminalBars",
    "announce",
    "counted",
    "counting",
    "event_text",
    "in_notebook",
    "is_main",
    "shorten",
    "showing",
]

EVERY = 10.0  # seconds between two lines in a log
_BRIEF = 0.2  # seconds between two drawings in a notebook
_FEW = 2  # pieces below which a count says nothing
_NAME = 28  # characters of a slide's name beside a bar

Event = Callable[[str, Mapping[str, Any]], None]
T = TypeVar("T")


def is_main() -> bool:
    """Whether this is the process that prints, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------------- counting


class Count:
    """Count of pieces of work that are done.

    Args:
        what: The pieces, in the plural: `images`.
        total: How many there are; `None` where that is not known.
        name: Of what they are the pieces, such as a slide.
        done: Those that an earlier run did; they do not enter the rate.
        follow: Called with the count whenever it has changed.
        clock: Seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        name: str = "",
        done: int = 0,
        follow: "Callable[[Count], None] | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.name, self.done = what, total, name, done
        self.detail = ""
        self._first, self._follow, self._clock = done, follow, clock
        self._lock = threading.Lock()  # pieces are done in several threads
        self.started = clock() if follow else 0.0

    def advance(self, step: int = 1) -> None:
        """Count some more pieces."""
        with self._lock:
            self._change(self.done + step)

    def reach(self, done: int, detail: str | None = None) -> None:
        """State how many pieces are done.

        Args:
            done: In all.
            detail: What else is known now, such as the loss.
        """
        with self._lock:
            if detail is not None:
                self.detail = detail
            self._change(done)

    def _change(self, done: int) -> None:
        self.done = done
        if self._follow is not None:
            self._follow(self)

    @property
    def seconds(self) -> float:
        """How long it has been counting."""
        return self._clock() - self.started

    def measured(self) -> str:
        """How many are done, how fast, and how long the rest takes."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.what}"]
        seconds, fresh = self.seconds, self.done - self._first
        if fresh > 0 and seconds > 0:
            parts.append(_rate(fresh / seconds))
            if self.total is not None and self.done < self.total:
                left = (self.total - self.done) * seconds / fresh
                parts.append(f"{duration(left)} left")
        return ", ".join([*parts, *filter(None, [self.detail])])

    def finished(self) -> str:
        """How many were done, in which time."""
        of = "" if self.total in (None, self.done) else f" of {self.total:,}"
        return f"{self._titled()}{self.done:,}{of} {self.what} in {duration(self.seconds)}"

    def line(self) -> str:
        """The measured, behind the name."""
        return f"{self._titled()}{self.measured()}"

    def _titled(self) -> str:
        return f"{shorten(self.name, _NAME)}: " if self.name else ""


@contextmanager
def counting(what: str, total: int | None, *, name: str = "", done: int = 0) -> Iterator[Count]:
    """Count pieces of work, for whoever looks on.

    Args:
        what: The pieces, in the plural.
        total: How many there are; `None` where that is not known.
        name: Of what they are the pieces, such as a slide.
        done: Those that an earlier run did.
    """
    display = _current()
    if display is None or (total is not None and total < _FEW):
        yield Count(what, total, name, done)
        return
    count = Count(what, total, name, done, display.change, display.clock)
    display.begin(count)
    whole = False
    try:
        yield count
        whole = True
    finally:
        display.end(count, whole)


def counted(
    pieces: Iterable[T], what: str, *, total: int | None = None, name: str = ""
) -> Iterator[T]:
    """Iterate over pieces of work, and count each when the next one is asked for.

    Args:
        pieces: The pieces.
        what: What they are, in the plural.
        total: How many there are; by default their number, where they have one.
        name: Of what they are the pieces.
    """
    if total is None and isinstance(pieces, Sequence):
        total = len(pieces)
    with counting(what, total, name=name) as count:
        for piece in pieces:
            yield piece
            count.advance()


def announce(stage: str) -> None:
    """State what is done now, of which the length is not known, for whoever looks on."""
    display = _current()
    if display is not None:
        display.stage(stage)


# -------------------------------------------------------------------------------------- showing


class Display(Protocol):
    """Display of counts and stages."""

    clock: Callable[[], float]

    def __enter__(self) -> Any:
        """Begin to show."""

    def __exit__(self, *error: Any) -> None:
        """Show nothing more."""

    def begin(self, count: Count) -> None:
        """Show a count, within those that have begun."""

    def change(self, count: Count) -> None:
        """Show how far it is."""

    def end(self, count: Count, whole: bool) -> None:
        """Show it no longer; `whole` unless it was broken off."""

    def stage(self, text: str) -> None:
        """Show what is done now, of which the length is not known."""

    def note(self, text: str) -> None:
        """Print a line that stays."""


_displays: list[tuple[int, Display | None]] = []  # with the process that each belongs to


def _current() -> Display | None:
    """The display of this process: that of a parent is not for its forked workers."""
    pid, display = _displays[-1] if _displays else (0, None)
    return display if pid == os.getpid() else None


@contextmanager
def showing(progress: bool | None = None, display: Display | None = None) -> Iterator[Event]:
    """Show what is counted inside, where somebody looks on.

    Args:
        progress: `True` shows it (on the error stream, or in a notebook), `False` does not, `None`
            does in a notebook only. Inside another `showing`, that one's display goes on.
        display: By default that of the place where this runs.

    Yields:
        A function for the events of `run`: `("stage", {"name"})`, `("episode", summary)`.
    """
    around = _current()
    if around is not None and progress is not False:
        yield lambda kind, what: None
        return
    shown = progress is not False and is_main() and (progress or in_notebook())
    if display is None and shown:
        display = _display_here()
    if not shown or display is None:
        _displays.append((os.getpid(), None))
        try:
            yield lambda kind, what: None
        finally:
            _displays.pop()
        return

    chosen = display

    def event(kind: str, what: Mapping[str, Any]) -> None:
        if kind == "stage":
            chosen.stage(str(what["name"]))
        elif kind in ("episode", "method"):
            chosen.note(event_text(kind, what))

    _displays.append((os.getpid(), chosen))
    try:
        with chosen:
            yield event
    finally:
        _displays.pop()


def _display_here() -> Display:
    if in_notebook():
        return NotebookBars()
    return TerminalBars() if sys.stderr.isatty() else Lines()


def in_notebook() -> bool:
    """Whether this runs in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def event_text(kind: str, what: Mapping[str, Any]) -> str:
    """One line for an event of `runs.run`."""
    if kind == "episode":
        groups, counts = what["groups_per_class"], what["labels_per_class"].items()
        return "labels: " + ", ".join(
            f"{n} {name} (of {groups[name]} groups)" for name, n in counts
        )
    return f"{what['name']} ..." if kind == "stage" else f"method {what['name']}"


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Lines:
    """Display in a log: a line when ten seconds have gone since the last one, and one at the end.

    What takes less than ten seconds leaves no line. While nothing changes, as where several
    processes work on a slide each, a thread sees to the lines.

    Args:
        write: Takes a line.
        clock: Seconds.
        every: Seconds between two lines.
    """

    def __init__(
        self,
        write: Callable[[str], None] = _write,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self.clock, self._print, self._every = clock, write, every
        self._running: list[Count] = []
        self._latest = clock()
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Lines":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self.print_due()

    def print_due(self) -> None:
        """Print how far all is that runs, if it is time for that."""
        with self._lock:
            now = self.clock()
            if self._running and now - self._latest >= self._every:
                self._latest = now
                self._print("; ".join(one.line() for one in self._running))

    def begin(self, count: Count) -> None:
        with self._lock:
            if not self._running:
                self._latest = self.clock()
            self._running.append(count)

    def change(self, count: Count) -> None:
        self.print_due()

    def end(self, count: Count, whole: bool) -> None:
        with self._lock:
            self._running.remove(count)
        # Of what lies within something longer, the line of that is enough.
        if whole and not self._running and count.seconds >= self._every:
            self._print(count.finished())

    def stage(self, text: str) -> None:
        self._print(f"{text} ...")

    def note(self, text: str) -> None:
        self._print(text)


class TerminalBars:
    """Display on a terminal: the stage, and a bar for each count; they go when the work is done."""

    clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.text import Text

        class Measured(TextColumn):
            """How far a count is, worked out when it is drawn."""

            def render(self, task: Any) -> Text:
                count = task.fields.get("count")
                text = count.measured() if count else duration(task.elapsed or 0.0)
                return Text(text, overflow="ellipsis", no_wrap=True)

        # What is written to the output stream meanwhile is not ours to move.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            Measured(""),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._tasks: dict[int, Any] = {}
        self._stage: Any = None

    def __enter__(self) -> "TerminalBars":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def begin(self, count: Count) -> None:
        name = shorten(count.name, _NAME)
        task = self._progress.add_task(name, total=count.total, count=count, completed=count.done)
        self._tasks[id(count)] = task

    def change(self, count: Count) -> None:
        if id(count) in self._tasks:
            self._progress.update(self._tasks[id(count)], completed=count.done)

    def end(self, count: Count, whole: bool) -> None:
        self._progress.remove_task(self._tasks.pop(id(count)))

    def stage(self, text: str) -> None:
        if self._stage is not None:
            self._progress.remove_task(self._stage)
        self._stage = self._progress.add_task(shorten(text, 40), total=None)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


class NotebookBars:
    """Display in a notebook: one field that is drawn again; at the end it holds what was done.

    Nothing in it needs a widget or the network, so that a notebook that is saved keeps it.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self._running: list[Count] = []
        self._kept: list[str] = []
        self._stage = ""
        self._drawn = 0.0
        self._handle: Any = None

    def __enter__(self) -> "NotebookBars":
        return self

    def __exit__(self, *error: Any) -> None:
        self._running, self._stage = [], ""
        if self._handle is not None or self._kept:
            self._draw()

    def begin(self, count: Count) -> None:
        self._running.append(count)
        self._draw_later()

    def change(self, count: Count) -> None:
        self._draw_later()

    def end(self, count: Count, whole: bool) -> None:
        self._running.remove(count)
        if whole and not self._running and count.seconds >= 1:
            self._kept.append(count.finished())
        self._draw_later()

    def stage(self, text: str) -> None:
        self._stage = text
        self._draw()

    def note(self, text: str) -> None:
        self._kept.append(text)
        self._draw_later()

    def _draw_later(self) -> None:
        if self.clock() - self._drawn >= _BRIEF:
            self._draw()

    def _draw(self) -> None:
        shown = import_module("IPython.display")  # which is there, in a notebook
        self._drawn = self.clock()
        page = shown.HTML(self.render())
        if self._handle is None:
            self._handle = shown.display(page, display_id=True)
        else:
            self._handle.update(page)

    def render(self) -> str:
        """HTML of the field: what is kept, the stage, and the bars."""
        lines = [html.escape(text) for text in self._kept]
        lines += [f"{html.escape(self._stage)} ..."] if self._stage else []
        for count in self._running:
            of = "" if count.total is None else f' value="{count.done}" max="{count.total}"'
            lines.append(f"<progress{of}></progress> {html.escape(count.line())}")
        return "<div>" + "<br>".join(lines) + "</div>"


# ------------------------------------------------------------------------------------- its words


def shorten(text: str, most: int) -> str:
    """Text of at most so many characters, its middle left out where it is longer."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - tail :]}"


def duration(seconds: float) -> str:
    """Length of time: `8 s`, `2 min 5 s`, `1 h 20 min`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def _rate(a_second: float) -> str:
    """Pieces a second, a minute or an hour: the first that is 1 or more."""
    for value, unit in ((a_second, "s"), (60 * a_second, "min")):
        if value >= 0.995:
            return f"{_three_digits(value)}/{unit}"
    return f"{_three_digits(3600 * a_second)}/h"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
