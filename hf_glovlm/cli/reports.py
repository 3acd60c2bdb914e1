"""Command line: reports, written again from the files of finished work."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..environment import quiet_libraries
from ..errors import GloVLMError
from .console import note, show_progress


def report(
    run: Annotated[Path, Argument(help="Folder of a run or a study, or results of evaluate.")],
    with_images: Annotated[
        bool, Option("--with-images", help="Show mistakes and heat maps, with file names.")
    ] = False,
    output: Annotated[Path | None, Option(help="Page to write; else report.html there.")] = None,
) -> None:
    """Write the report of a run, an evaluation or a study: one page without network."""
    from ..reports import write_report

    quiet_libraries()
    with show_progress() as on_event:
        on_event("stage", {"name": "writing the report"})
        page = write_report(run, with_images=with_images, output=output)
    note(f"the report is {page}")


def write_beside(folder: str | Path) -> None:
    """Write the report of a run that has just finished; its results stay, whatever happens."""
    from ..reports import write_report

    try:
        note(f"the report is {write_report(folder)}")
    except GloVLMError as error:
        note(f"no report was written: {error}")


REPORTS: list[Callable[..., None]] = [report]
