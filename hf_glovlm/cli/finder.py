"""Commands for finding glomeruli: a finder is learned from outlined regions, and run on slides."""

from collections.abc import Mapping
from typing import Any

import typer

from ..environment import quiet_libraries
from ..slides.finder.config import FindConfig, FindTrainConfig
from .console import (
    failed_slides,
    note,
    note_once,
    print_failures,
    print_json,
    print_table,
    show_progress,
)
from .options import JsonFlag, options_of

find_app = typer.Typer(help="Find glomeruli on slides, by a few outlined regions.")


@find_app.command("train")
@options_of(FindTrainConfig)
def find_train(checked: FindTrainConfig, as_json: JsonFlag = False) -> None:
    """Learn a finder from regions in which every glomerulus is outlined.

    Its threshold is chosen, and precision and recall are measured, on patients left out.
    """
    from ..slides.finder.training import train_finder

    quiet_libraries()
    with show_progress() as on_event:
        done = train_finder(checked, on_event=on_event)
    if as_json:
        print_json(done)
    else:
        _print_finder(done)
    for sentence in done["notes"]:
        note(sentence)
    note(f"the finder is in {checked.output_dir}")


def _print_finder(done: Mapping[str, Any]) -> None:
    """Tables of what a finder learned from, and of what it finds in groups left out."""
    mark = " (a backbone or pictures that are synthetic)" if done["synthetic"] else ""
    without = f" ({done['without']} without a glomerulus)" if done["without"] else ""
    facts = [
        ["regions", f"{done['regions']}{without}"],
        ["groups", f"{done['groups']}, each a {done['group']}"],
        ["glomeruli", str(sum(done["glomeruli"].values()))],
        ["head, backbone", f"{done['head']}, {done['backbone']}"],
        ["threshold", f"{done['threshold']:.3g}"],
    ]
    print_table(f"Finder{mark}. Research use only, not for diagnosis", ["", ""], facts)
    measured = done["left_out"]
    if not measured:
        return
    rows = [[name, _share(measured.get(name))] for name in ("precision", "recall", "f1")]
    rows += [
        [f"recall, {name}", f"{_share(_divide(one))} ({one['found']} of {one['of']})"]
        for name, one in measured["by_class"].items()
    ]
    print_table(
        f"In {measured['groups']} groups ({measured['group']}) left out, at an intersection over "
        "union of 0.5",
        ["", ""],
        rows,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _divide(one: Mapping[str, int]) -> float | None:
    return one["found"] / one["of"] if one["of"] else None


@find_app.command("run")
@options_of(FindConfig)
def find_run(checked: FindConfig, as_json: JsonFlag = False) -> None:
    """Outline the glomeruli of slides: NAME.geojson for QuPath and glovlm slide --objects.

    What is found is provisional until a reader has looked. Exit code 1 if a slide failed.
    """
    from ..slides.finder.running import find_on_slides

    quiet_libraries()

    with show_progress() as on_event:
        results = find_on_slides(checked, on_event=on_event)
    if as_json:
        print_json(results)
    else:
        rows = [
            [
                str(entry["slide"]),
                entry["status"],
                str(entry.get("n", "")),
                str(entry.get("cut_by_border", "")),
            ]
            for entry in results["slides"]
        ]
        mark = " (the finder learned from synthetic images)" if results["synthetic"] else ""
        header = ["slide", "status", "glomeruli", "cut by the border"]
        print_table(f"Outlines, provisional{mark}. Research use only", header, rows)
    print_failures("slide", failed_slides(results["slides"]), as_json)
    note_once((entry["slide"], text) for entry in results["slides"] for text in entry["notes"])
    note(
        f"outlines are in {checked.output_dir}: look at them in QuPath, or give that folder to "
        "glovlm slide --objects"
    )
    if results["failed"]:
        raise typer.Exit(1)
