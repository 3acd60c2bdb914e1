"""What is shown on a terminal, in a log and in a notebook: progress, tables, sentences."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Glovlm
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hf_glovlm import progress
from hf_glovlm.cli import console
from hf_glovlm.cli.layout import lay_out, printable, wrap
from hf_glovlm.progress import Lines, NotebookBars, counted, counting, showing

REPOSITORY = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------- progress


@dataclass
class Clock:
    """A clock that goes when it is told to."""

    now: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def write(self, line: str) -> None:
        self.lines.append((self.now, line))


@pytest.fixture
def log() -> Iterator[Clock]:
    """A log that is shown what is counted, by a clock of its own."""
    clock = Clock()
    with showing(True, Lines(clock.write, clock)):
        yield clock


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (0.09, []),
        (0.5, [10, 20, 30, 40, 50, 50]),
        (4, [*range(12, 400, 12), 400]),
        (25, [*range(25, 2501, 25), 2500]),
    ],
)
def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end(
    log: Clock, seconds: float, times: list[int]
) -> None:
    for _ in counted(range(100), "images"):
        log.now += seconds
    assert [time for time, _ in log.lines] == pytest.approx(times)


def test_a_line_states_how_many_how_fast_and_how_long(log: Clock) -> None:
    with counting("tiles", 5000, name="S1", done=1000) as count:
        for _ in range(40):
            log.now += 1
            count.advance(100)
    lines = [line for _, line in log.lines]
    # The 1,000 of an earlier run do not make it faster.
    assert lines[0] == "S1: 2,000 of 5,000 tiles, 100/s, 30 s left"
    assert lines[-1] == "S1: 5,000 tiles in 40 s"


def test_what_lies_within_something_longer_stands_in_its_line(log: Clock) -> None:
    for slide in counted(["S1", "S2"], "slides"):
        with counting("tiles", 30, name=slide) as count:
            for _ in range(30):
                log.now += 1
                count.advance()
    lines = [line for _, line in log.lines]
    assert lines[0] == "0 of 2 slides; S1: 10 of 30 tiles, 1/s, 20 s left"
    assert lines[3] == "1 of 2 slides, 1.5/min, 40 s left; S2: 10 of 30 tiles, 1/s, 20 s left"
    assert lines[-1] == "2 slides in 1 min"
    assert sum(" in " in line for line in lines) == 1


def test_while_nothing_changes_the_lines_go_on() -> None:
    clock = Clock()
    display = Lines(clock.write, clock)
    with showing(True, display), counting("slides", 3) as count:
        count.advance()
        for _ in range(12):  # what the thread of the display does
            clock.now += 5
            display.print_due()
    assert [time for time, _ in clock.lines] == [*range(10, 61, 10), 60]
    assert clock.lines[5][1] == "1 of 3 slides, 1/min, 2 min left"
    assert clock.lines[-1][1] == "1 of 3 slides in 1 min"


def test_a_stage_within_is_announced(log: Clock) -> None:
    progress.announce("making the report")
    assert [line for _, line in log.lines] == ["making the report ..."]


def test_what_is_broken_off_has_no_last_line(log: Clock) -> None:
    def break_off() -> None:
        with counting("images", 3):
            log.now += 60
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        break_off()
    assert log.lines == []


def test_the_loss_stands_in_the_line(log: Clock) -> None:
    with counting("epochs", 4) as count:
        log.now += 12
        count.reach(2, "loss 0.25")
    assert log.lines[0][1] == "2 of 4 epochs, 10/min, 12 s left, loss 0.25"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3599.7, "1 h"),
     (4800, "1 h 20 min"), (7_200_000, "2,000 h")],
)  # fmt: skip
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("pieces", "seconds", "text"),
    [(12345, 10, "1,234/s"), (250, 20, "12.5/s"), (30, 10, "3/s"), (1, 40, "1.5/min"),
     (1, 600, "6/h")],
)  # fmt: skip
def test_rates_have_three_digits(log: Clock, pieces: int, seconds: float, text: str) -> None:
    with counting("x", None) as count:
        log.now += seconds
        count.advance(pieces)
        assert count.measured() == f"{pieces:,} x, {text}"


def test_nobody_but_the_main_process_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setenv("RANK", "1")
    with showing(True, Lines(clock.write, clock)) as event:
        event("stage", {"name": "adapting"})
        for _ in counted(range(3), "images"):
            clock.now += 60
    assert clock.lines == []
    monkeypatch.delenv("RANK")
    with showing(True, Lines(clock.write, clock)):
        monkeypatch.setattr(os, "getpid", lambda: -1)  # a worker that was forked
        for _ in counted(range(3), "images"):
            clock.now += 60
        monkeypatch.undo()
    assert clock.lines == []


def test_the_inner_work_of_a_command_is_shown_by_it(log: Clock) -> None:
    with showing(True) as event:  # as `predict(progress=True)` does inside a command
        event("stage", {"name": "no stage of its own"})
        list(counted(range(3), "images"))
    with showing(False):
        for _ in counted(range(3), "images"):
            log.now += 60
    assert log.lines == []


class Page:
    """Stands for IPython.display: what was displayed, and drawn again."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def display(self, page: str, *, display_id: bool) -> "Page":
        self.drawn.append(page)
        return self

    def update(self, page: str) -> None:
        self.drawn.append(page)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    """A notebook."""
    made = Page()
    shown = SimpleNamespace(HTML=str, display=made.display)
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1), display=shown)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return made


def test_a_notebook_shows_a_bar_and_keeps_a_line(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(NotebookBars, "clock", clock)
    with showing() as event:
        event("stage", {"name": "encoding <b>"})
        for _ in counted(range(4), "images", name="<script>"):
            clock.now += 1
    assert any(
        '<progress value="2" max="4"></progress> &lt;script&gt;: 2 of 4' in p for p in page.drawn
    )
    assert page.drawn[-1] == "<div>&lt;script&gt;: 4 images in 4 s</div>"
    assert not any("<script>" in p or "<b>" in p for p in page.drawn)


@pytest.mark.parametrize("quiet", [None, False])
@pytest.mark.parametrize(
    ("module", "function", "inner"),
    [
        ("hf_glovlm.runs.workflow", "run", "_run"),
        ("hf_glovlm.runs.study", "run_study", "_run_study"),
        ("hf_glovlm.slides.classify", "classify_slides", "_classify_all"),
        ("hf_glovlm.slides.finder.running", "find_on_slides", "_plan"),
        ("hf_glovlm.slides.finder.training", "train_finder", "_check_output"),
        ("hf_glovlm.slides.mil.training", "train_mil", "_train_mil"),
    ],
)
def test_long_functions_show_bars_in_a_notebook_and_are_quiet_if_asked(
    page: Page,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    function: str,
    inner: str,
    quiet: bool | None,
) -> None:
    made_by = __import__(module, fromlist=[function])

    class Done(Exception):
        """The work was reached."""

    def work(*given: Any, **options: Any) -> None:
        with counting("pieces", 3):
            raise Done

    monkeypatch.setattr(made_by, inner, work)
    monkeypatch.setattr(NotebookBars, "clock", lambda self: 1e9)  # long after the last drawing
    settings = SimpleNamespace(
        **dict.fromkeys(("tracker", "loader", "backbone"), None), output_dir=tmp_path / "o",
        data=tmp_path, method="zero_shot", device="cpu", mixed_precision="no", cells=list,
        finder=tmp_path, resume=False, overwrite=False, to_repeat=dict, precision="fp32",
    )  # fmt: skip
    if function == "run":
        monkeypatch.setattr(made_by, "_Processes", lambda *given: SimpleNamespace(accelerator=None))
    for name in ("RunFolder", "make_accelerator"):
        if hasattr(made_by, name):
            monkeypatch.setattr(made_by, name, lambda *given, **named: SimpleNamespace(check=id))
    if function in ("run", "train_mil"):
        folder = SimpleNamespace(check=lambda: None)
        monkeypatch.setattr(made_by, "RunFolder", lambda *given: folder)
    arguments = (settings, tmp_path / "study") if function == "run_study" else (settings,)
    with pytest.raises(Done):
        getattr(made_by, function)(*arguments, progress=quiet)
    assert bool(page.drawn) is (quiet is None)


def test_bars_leave_the_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with console.show_progress() as event:
        event("stage", {"name": "a stage [b]"})
        for piece in counted(range(3), "images", name="[slide]"):
            sys.stdout.write(f"{piece}\n")
        console.note("a note of a [kind]")
    printed = capsys.readouterr()
    assert printed.out == "0\n1\n2\n"
    assert "a note of a [kind]" in printed.err


def test_json_stays_pure_beside_bars(
    glovlm: Glovlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for i in range(4):
        place = tmp_path / "ab"[i % 2] / f"P{i}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (50 * i, 90, 7)).save(place)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    done = glovlm("data", "check", tmp_path, "--json")
    assert json.loads(done.out)["classes"] == ["a", "b"]


# --------------------------------------------------------------------------------------- tables

HOSTILE = (
    "sclerosed", "a/very/long/path/of/folders/" * 8 + "slide_0001.svs", "x" * 300,
    "Klasse mit vielen Wörtern und noch einigen mehr", "肾小球" * 20, "\x1b[31mred\x07", "a\nb\tc",
    "", "[bold]x[/bold]", "-", "e\u0301" * 30, "😀" * 40, "0.123", "{}", "`|`",
)  # fmt: skip
NUMBERS = (
    "0.123",
    "1,234",
    "0.912 [0.850, 0.970]",
    "12",
    "-",
    "<1%",
    "3 (30.0%, 11.9 to 60.1)",
    "1e-05",
)


def printed_lines(header: list[str], rows: list[list[str]], width: int) -> list[str]:
    return [line for head, body in lay_out(header, rows, width) for line in (*head, *body)]


@given(st.data(), st.integers(40, 120))
def test_tables_fit_and_no_number_is_cut(data: st.DataObject, width: int) -> None:
    text = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60))
    kinds = data.draw(st.lists(st.sampled_from(["text", "number"]), min_size=1, max_size=32))
    header = [data.draw(text) for _ in kinds]
    rows = [
        [data.draw(text if kind == "text" else st.sampled_from(NUMBERS)) for kind in kinds]
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    lines = printed_lines(header, rows, width)
    # A text of digits alone is a number too, and is not cut.
    longest = max(
        (cell_len(w) for line in rows for c in line for w in c.split() if w[:1].isdigit()),
        default=0,
    )
    assert all(cell_len(line) <= max(width, 2 * longest + 16) for line in lines)
    assert all(line == "" or line.isprintable() for line in lines)
    joined = "\n".join(lines)
    for row in rows:
        for kind, value in zip(kinds, row, strict=True):
            if kind == "number":
                for number in re.findall(r"\[[^\]]*\]|\d\S*", value):
                    assert number in joined


@pytest.mark.parametrize("width", [40, 60, 80])
def test_wide_tables_go_on_below(width: int) -> None:
    header = ["file", *(f"p_{'class' * 5}_{k:02}" for k in range(30))]
    rows = [
        [f"folder/{'sub' * 9}/image_{i:03}.png", *(f"0.{k:03}" for k in range(30))]
        for i in range(3)
    ]
    blocks = lay_out(header, rows, width)
    assert all(cell_len(line) <= width for block in blocks for part in block for line in part)
    values = re.findall(r"\b0\.\d{3}\b", "\n".join(line for _, body in blocks for line in body))
    assert sorted(values) == sorted(value for row in rows for value in row[1:])


def test_a_column_without_anything_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("T", ["", "n", "note"], [["", "3", ""], ["", "4", ""]])
    assert capsys.readouterr().out == "T\n  n\n  3\n  4\n\n"
    console.print_table("T", ["class", "note"], [])
    assert "note" in capsys.readouterr().out


def test_what_fits_is_not_wrapped() -> None:
    header, rows = ["class", "images"], [["a b", "8"], ["sclerosed", "1,024"]]
    assert printed_lines(header, rows, 80) == [
        "class      images", "a b             8", "sclerosed   1,024",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("a/folder/of/slides/one.svs", 14, ["a/folder/of/", "slides/one.svs"]),
        ("x" * 20, 10, ["x" * 10] * 2),
        ("abcdefghij" * 5, 10, ["abcdefghij", "abcd\u2026ghijab"[:10], "cdefghij"]),
        ("recall [0.123, 0.456] of", 16, ["recall", "[0.123, 0.456]", "of"]),
        ("", 10, [""]),
    ],
)
def test_sentences_are_wrapped(text: str, width: int, lines: list[str]) -> None:
    wrapped = wrap(text, width)
    assert all(cell_len(line) <= width for line in wrapped)
    if "\u2026" not in "".join(lines):
        assert wrapped == lines
    else:  # of a long name the middle is left out
        assert "".join(wrapped).startswith(text[:14])
        assert "".join(wrapped).endswith(text[-14:])


@given(st.text(max_size=80))
def test_what_is_printed_can_be_shown(text: str) -> None:
    assert printable(text) == "" or printable(text).isprintable()


def test_errors_are_one_line_in_a_log_and_wrapped_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "There is no folder: " + "give another one, " * 9
    assert console.fail(sentence) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {sentence.strip()}"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    console.fail(sentence)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 60
    assert " ".join(lines) == f"error: {sentence.strip()}"
