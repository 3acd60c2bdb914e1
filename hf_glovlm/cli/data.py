"""Commands on labelled images: `glovlm data check`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ..errors import GloVLMError
from ..runs.config import DRAWING, TrainConfig
from ..settings import SEEDS, declarations
from .console import check_output, note, print_json, print_table, show_progress, synthetic_mark
from .options import (
    GroupColumn,
    GroupFrom,
    ImageColumn,
    JsonFlag,
    LabelColumn,
    Text,
    Whole,
    read_shots,
)

if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..data import DataReport

data_app = typer.Typer(help="Look at labelled images.")
PAGE = Path("audit.html")


@data_app.command("check")
def check(
    data: Annotated[str, Argument(help="Folder of images, table, or Hub id.")],
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    group_from: GroupFrom = None,
    shots: Annotated[Text, Option(help="As for train. (8)")] = None,
    seed: Annotated[Whole, Option(min=0, max=SEEDS, help="As for train. (0)")] = None,
    draw: Annotated[Whole, Option(min=0, help="As for train. (0)")] = None,
    allow_fewer: Annotated[bool, Option(help="As for train.")] = False,
    validation_shots: Annotated[Whole, Option(min=0, help="As for train. (0)")] = None,
    calibration_groups: Annotated[Whole, Option(min=0, help="As for train. (0)")] = None,
    html: Annotated[bool, Option("--html", help="Write an audit as a page, too.")] = False,
    output: Annotated[
        Path | None, Option(help="The page; .json beside it has its numbers. (audit.html)")
    ] = None,
    with_images: Annotated[
        bool, Option("--with-images", help="Show images and names of files on it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read every image, look for leaks, draw as train would. Exit code 1 where that is refused."""
    page = _place_page(data, output, html=html, with_images=with_images)

    from ..data import Columns, check_dataset, describe_reading, load_dataset
    from ..inference import FeatureCache

    columns = Columns(
        image_column=image_column,
        label_column=label_column,
        group_column=group_column,
        group_from=group_from,
    )
    given = {"seed": seed, "draw": draw, "allow_fewer": allow_fewer, "shots": read_shots(shots)}
    given |= {"validation_shots": validation_shots, "calibration_groups": calibration_groups}
    table = declarations(TrainConfig)
    drawing = {name: table[name].default for name in DRAWING}
    drawing |= {name: table[name].read(v) for name, v in given.items() if v is not None}
    loaded = load_dataset(data, columns=columns)
    with show_progress() as on_event:
        report = check_dataset(loaded, drawing=drawing, source=data, cache=FeatureCache())
        facts = None
        if page is not None:
            on_event("stage", {"name": "writing the audit"})
            facts = _write_audit(loaded, report, page, with_images=with_images)
    if as_json:
        print_json(report.to_dict() | ({} if facts is None else {"audit": facts}))
    else:
        groups = {split: str(report.groups.get(split, "")) for split in report.counts}
        rows = [[x, *map(str, of.values()), groups[x]] for x, of in report.counts.items()]
        header = ["split", *report.classes, "groups"]
        print_table(f"Images{synthetic_mark(data)}", header, rows)
        logged = {f"{sentence}." for sentence in describe_reading(loaded).in_full}
        notes = [sentence for sentence in report.notes if sentence not in logged]
        for sentence in [*notes, *(f"problem: {problem}" for problem in report.problems)]:
            note(sentence)
        if facts is not None and facts["classes"]:
            note(facts["probe"]["sentence"])
    if facts is not None:
        note(f"the audit is in {page}")
    if report.problems:
        raise typer.Exit(1)
    note("no problem was found")


def _place_page(data: str, output: Path | None, *, html: bool, with_images: bool) -> Path | None:
    """Where the page goes, before any work; `None` without one."""
    if not (html or output):
        if with_images:
            raise GloVLMError("--with-images shows images on a page: give --html, too.")
        return None
    page = PAGE if output is None else output
    folder = Path(data).expanduser()
    if output is None and folder.is_dir() and Path.cwd().is_relative_to(folder.resolve()):
        raise GloVLMError(
            f"{PAGE} would be written among the images: go to another folder, or say where with "
            "--output."
        )
    if page.suffix.lower() not in (".html", ".htm"):
        raise GloVLMError(
            f"--output is an HTML page; expected a name such as {PAGE}, found {page}."
        )
    check_output(page, "audit", [data])
    check_output(page.with_suffix(".json"), "audit_facts", [data, page])
    if not os.path.isdir(page.parent):
        raise GloVLMError(f"The folder {page.parent} does not exist: make it, or name another.")
    return page


def _write_audit(
    loaded: "DatasetDict", report: "DataReport", page: Path, *, with_images: bool
) -> dict[str, Any]:
    """Write the page and its numbers; the numbers."""
    from ..data.contact_sheet import draw_thumbnails
    from ..data.folder import column
    from ..data.splits import all_rows
    from ..files import write_json, write_text
    from ..reports.audit import AuditPicture, render_audit
    from ..runs.audit import audit_dataset

    audit = audit_dataset(loaded, report)
    examples, copies = None, []
    if with_images:
        rows = all_rows(loaded)
        chosen = [*audit.examples.values(), *(cluster for _, cluster in audit.copies)]
        drawn = draw_thumbnails(rows, (row for some in chosen for row in some))
        names, labels = column(rows, "file_name"), column(rows, "label")
        pictures = {
            row: AuditPicture(jpeg, names[row], report.classes[labels[row]])
            for row, jpeg in drawn.items()
        }
        examples = {name: [pictures[row] for row in some] for name, some in audit.examples.items()}
        copies = [(kind, [pictures[row] for row in some]) for kind, some in audit.copies]
        audit.facts["problems"] = [
            {"kind": one.kind, "sentence": one.sentence} for one in report.details
        ]
        audit.facts["notes"] = report.notes
    write_text(page, render_audit(audit.facts, examples=examples, copies=copies))
    write_json(page.with_suffix(".json"), audit.facts)
    return audit.facts
