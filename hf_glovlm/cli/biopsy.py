"""Command for the sheets of biopsies."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .console import note, print_failures, print_json, print_table, show_progress
from .options import JsonFlag, Text

__all__ = ["sheet"]


def sheet(
    cases: Annotated[
        Path, Argument(help="CSV with slide_id, case_id and what is known of each biopsy.")
    ],
    slides: Annotated[
        list[Path],
        Option(help="Output folder of glovlm slide --objects; repeat it, one a model or stain."),
    ],
    output_dir: Annotated[Path, Option(help="Folder of sheets; those of other cases in it stay.")],
    corrections: Annotated[
        Path | None, Option(help="Output folder of glovlm correct, made from --slides.")
    ] = None,
    finder: Annotated[
        Path | None,
        Option(help="Folder of glovlm find train: what it misses enters the intervals."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        Option(help="The slides, or folders of them, for pictures; else outlines alone; repeat."),
    ] = None,
    signed_by: Annotated[
        Text, Option(help="Reader who signs, whose corrections are in --corrections.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a sheet for each biopsy: a summary that prints, then every glomerulus.

    DRAFT until --signed-by names a reader whose corrections were read. Exit code 1 if a case could
    not be described.
    """
    from ..slides.sheet import write_sheets

    with show_progress():
        done = write_sheets(
            cases,
            slides,
            output_dir,
            corrections=corrections,
            finder=finder,
            images=images or (),
            signed_by=signed_by,
        )
    if as_json:
        print_json(done)
    else:
        rows = [
            [
                one["case"],
                one["status"],
                f"{one['n']} ({one['confirmed']})",
                "{count} of {denominator}".format(**one["sclerotic"]) if one["sclerotic"] else "-",
                one["adequacy"] or "-",
                " ".join(one["notes"]),
            ]
            for one in done["sheets"]
        ]
        header = ["case", "status", "glomeruli (confirmed)", "globally sclerotic", "adequacy"]
        print_table("Biopsies. Research use only, not for diagnosis", [*header, "notes"], rows)
    print_failures("case", [(one["case"], one["why"]) for one in done["failed"]], as_json)
    for sentence in done["notes"]:
        note(sentence)
    for one in done["earlier"]:
        note(f"{one['folder']}: a sheet of an earlier run stays there; {one['why']}")
    note(f"the sheets are in {output_dir}: open {output_dir / 'index.html'}")
    if done["failed"]:
        raise typer.Exit(1)
