"""Command line: finished runs and studies beside each other."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..environment import quiet_libraries
from ..settings import SEEDS
from .console import check_output, note, print_json, print_table, show_progress
from .options import JsonFlag


def compare(
    sources: Annotated[
        list[Path], Argument(help="Two or more runs, or studies: folders; or parquet predictions.")
    ],
    metric: Annotated[
        list[str] | None, Option(help="One or more; by default macro_auc and balanced_accuracy.")
    ] = None,
    name: Annotated[list[str] | None, Option(help="What to call each, in their order.")] = None,
    shared: Annotated[
        bool, Option("--shared", help="Use the test images that all share, where they differ.")
    ] = False,
    html: Annotated[Path | None, Option(help="Page to write, too.")] = None,
    n_resamples: Annotated[int, Option(min=1, help="Bootstrap resamples.")] = 2000,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Of the bootstrap.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compare runs, or studies, image by image on the same test images: all against the first."""
    check_output(html, "page", sources)

    from ..files import write_text
    from ..rendering import metric_title
    from ..reports.comparison import (
        HEADER,
        comparison_rows,
        comparison_sentences,
        render_comparison,
    )
    from ..runs.comparison import compare_runs
    from ..runs.study_config import COMPARED

    quiet_libraries()
    with show_progress() as on_event:
        on_event("stage", {"name": "comparing"})
        compared = compare_runs(
            *sources, names=name, metrics=metric or COMPARED, shared=shared,
            n_resamples=n_resamples, seed=seed,
        )  # fmt: skip
    if as_json:
        print_json(compared.to_dict())
    else:
        synthetic = ", synthetic images" if compared["synthetic"] else ""
        for line in compared["lines"]:
            for key in compared["metrics"]:
                what = (
                    line["line"] or f"{line['n']} images of {line['n_groups']} {compared['unit']}"
                )
                rows = comparison_rows(line, key)
                print_table(f"{metric_title(key)} ({what}{synthetic})", HEADER, rows)
        for sentence in comparison_sentences(compared):
            typer.echo(sentence)
        for sentence in compared["notes"]:
            note(sentence)
    if html is not None:
        write_text(html, render_comparison(compared))
        note(f"the page is {html}")
