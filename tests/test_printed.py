"""The tables that commands print, of results that are made up, and all exit codes."""

import ast
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from command_line import Glovlm
from rich.cells import cell_len

from hf_glovlm.cli import app, console

REPOSITORY = Path(__file__).resolve().parent.parent

LONG = [
    "a class with a long name, and more of it " * 2,
    "x" * 90,
    *(f"class_{k:02}_of_30" for k in range(28)),
]
SLIDE = "S-2024-" + "0123456789abcdef" * 4 + "-level-1-PAS"
REASON = "SlideError: " + "the file ends before its directory says so, " * 6 + f"{SLIDE}.svs"
SHARE = {"count": 3, "percent": 30.0, "ci95": [11.9, 60.1]}


def of_slides() -> dict[str, Any]:
    p = dict(zip(LONG, np.linspace(0.9, 0.01, 30), strict=True))
    counts = {"unit": "objects", "n": 10, "classes": dict.fromkeys(LONG, SHARE)}
    done = {"slide": SLIDE, "status": "done", "label": LONG[0], "probabilities": p, "case": "c"}
    done |= {"counts": counts, "flags": ["a flag"], "n": 7, "cut_by_border": 2, "notes": []}
    failed = {"slide": f"{SLIDE}-2", "status": "failed", "error": REASON, "case": "c", "notes": []}
    about = {"synthetic": True, "failed": 1, "class_names": LONG}
    return about | {"slides": [done, failed], "cases": [{"case": "c", "counts": counts}]}


def of_corrections() -> dict[str, Any]:
    after = {"count": 12}
    counts = {
        "before": {"classes": {name: {"count": 11} for name in LONG}},
        "after": {"classes": dict.fromkeys(LONG, after), "read": 3, "n": 4},
    }
    changes = dict.fromkeys(("added", "removed", "reclassified", "redrawn", "unchanged"), 1234)
    one = {"changes": changes, "date": "2026-01-01", "counts": counts, "notes": []}
    return {
        "slides": {SLIDE: one}, "class_names": LONG, "classes": [], "between_readers": [],
        "cases": [{"case": SLIDE, "counts": counts}], "failed": {f"{SLIDE}-2": REASON},
    }  # fmt: skip


def of_finder() -> dict[str, Any]:
    by_class = {name: {"found": 9, "of": 10} for name in LONG}
    measured = {"groups": 4, "group": "patient", "precision": 0.9, "by_class": by_class}
    return {
        "synthetic": True, "without": 1, "regions": 12, "groups": 4, "group": "patient",
        "glomeruli": {"a": 3}, "head": "x" * 80, "backbone": "owner/" + "name" * 30,
        "threshold": 0.1234, "left_out": measured, "notes": [],
    }  # fmt: skip


def of_crops() -> list[Any]:
    from hf_glovlm.slides.files.crops import CropOutcome, CropSummary

    summary = CropSummary(slide=SLIDE)
    summary.counts = dict.fromkeys(LONG, 5)
    summary.origin = {"source": "slide", "x": 0, "y": 0}
    reason = CropOutcome(f"{SLIDE}-3", reason=REASON)
    return [CropOutcome(SLIDE, summary), CropOutcome(f"{SLIDE}-2", error=REASON), reason]


def of_sheets() -> dict[str, Any]:
    sheet = {"case": SLIDE, "status": "DRAFT, unreviewed", "n": 20, "confirmed": 4}
    sheet |= {"sclerotic": {"count": 4, "denominator": 20}, "adequacy": None, "notes": [REASON]}
    return {"sheets": [sheet], "failed": [{"case": "B", "why": REASON}], "notes": [], "earlier": []}


def of_metrics() -> dict[str, Any]:
    entry = {"value": 0.1234, "ci95": [0.1, 0.2], "note": REASON, "undefined_resamples": 3}
    row = {"n": 12, "groups": 3} | dict.fromkeys(("recall", "specificity", "auc"), entry)
    support = {
        "labels_per_class": dict.fromkeys(LONG, 8),
        "groups_per_class": dict.fromkeys(LONG, 2),
    }
    data = {"group_column": "patient_id", "support": support}
    about = {"synthetic": True, "data": data, "n": 360, "n_groups": 30, "notes": []}
    return about | {"metrics": {"macro_auc": entry}, "per_class": dict.fromkeys(LONG, row)}


def of_maps() -> list[dict[str, Any]]:
    row = {"file_name": f"{SLIDE}.png", "target": LONG[0], "score": 0.123456789}
    return [row | {"glomerulus_blanked": 0.1, "context_blanked": 0.2}]


def show_predictions() -> None:
    from hf_glovlm.inference import Predictions

    p = np.full((2, 30), 1 / 30)
    predictions = Predictions(p, np.log(p).astype(np.float32), LONG, [f"{SLIDE}.png", "a.png"])
    console.print_predictions("Predictions", predictions, {"support_distance": [0.1234567, 2.0]})


SLIDES, FINDER = "hf_glovlm.slides.", "hf_glovlm.slides.finder."
TABLES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "slide": ("slide M S", SLIDES + "classify.classify_slides", of_slides),
    "find run": ("find run F S", FINDER + "running.find_on_slides", of_slides),
    "find train": (
        "find train --regions R --outlines A",
        FINDER + "training.train_finder",
        of_finder,
    ),
    "correct": ("correct R C --reader A", SLIDES + "corrections.correct_results", of_corrections),
    "crops": ("data crops S A", SLIDES + "files.crops.cut_slides", of_crops),
    "sheet": ("sheet C --slides S", SLIDES + "sheet.write_sheets", of_sheets),
}  # fmt: skip
NUMBERS = {
    "slide": ("0.900", "3 (30.0%, 11.9 to 60.1)"),
    "find train": ("0.900 (9 of 10)", "12"),
    "correct": ("1234", "11 -> 12"),
}
PRINTED: dict[str, Callable[[], None]] = {
    "metrics": lambda: console.print_metrics(of_metrics(), False),
    "predictions": show_predictions,
    "heat maps": lambda: console.print_rows("Heat maps", of_maps(), [*of_maps()[0]], False),
}
LISTS = ("methods", "backbones", "datasets", "cache", "doctor")


def check_width(out: str, width: int) -> None:
    for line in out.splitlines():
        assert cell_len(line) <= width, line


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", [*TABLES])
def test_tables_of_commands_stay_within_the_width(
    name: str, width: int, glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command, function, make = TABLES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(function, lambda *given, **named: make())
    done = glovlm(*command.split(), "--output-dir", "o")
    assert done.code == (name != "find train"), done.err
    check_width(done.out, width)
    words = " ".join(done.out.split())
    for number in NUMBERS.get(name, ()):
        assert number in words
    if name != "find train":  # the last table names what failed, with the whole reason
        last = done.out.split("Failed: 1")[-1].splitlines()
        start = last[1].index("reason")
        reason = "".join(line[start:].strip() for line in last[2:])
        assert reason.replace(" ", "") == REASON.replace(" ", "")


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", [*PRINTED, *LISTS])
def test_printed_tables_stay_within_the_width(
    name: str, width: int, glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    if name in PRINTED:
        PRINTED[name]()
        out = capsys.readouterr().out
    else:
        out = glovlm(name).out
    check_width(out, width)
    assert name in LISTS or not re.search(r"\d\.\d{4}", out)  # three digits


# ------------------------------------------------------------------------------------ exit codes


def commands() -> dict[str, Callable[..., Any]]:
    """All commands by name, with the function that each runs."""
    found = {}

    def walk(group: Any, before: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{before}{name} ")
            else:
                found[f"{before}{name}"] = command.callback

    walk(typer.main.get_command(app.app), "")
    return found


def documented() -> dict[str, str]:
    """The table of exit codes in the documentation: when each command exits with 1."""
    page = (REPOSITORY / "docs" / "terminal.md").read_text(encoding="utf-8")
    part = page.split("## Exit codes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \|$", part, re.M)
    return {name: when for names, when in rows for name in names.split("`, `")}


def exits_with_one(function: Callable[..., Any]) -> bool:
    """Whether a command's own code raises `typer.Exit(1)`."""
    module = sys.modules[inspect.unwrap(function).__module__]
    named = function.__name__
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    (own,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == named)
    return any(isinstance(n, ast.Raise) and "Exit(1)" in ast.unparse(n) for n in ast.walk(own))


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    told = documented()
    assert set(told) == set(commands())
    for name, function in commands().items():
        assert exits_with_one(function) is (told[name] != "never"), name
