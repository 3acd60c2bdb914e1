"""Commands for slides: labels, counts, multiple-instance learning, captions, crops."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ..environment import quiet_libraries
from ..progress import is_main
from ..slides.config import SlideConfig
from ..slides.mil.config import MilConfig
from .console import (
    failed_slides,
    most_probable,
    note,
    note_once,
    print_failures,
    print_json,
    print_metrics,
    print_table,
    show_progress,
)
from .options import (
    BatchFlag,
    DeviceFlag,
    JsonFlag,
    Real,
    Text,
    Texts,
    options_of,
)

if TYPE_CHECKING:
    from ..slides.files.crops import CropSummary

__all__ = ["caption", "correct", "crops", "get", "mil", "slide"]

MppFlag = Annotated[Real, Option(help="Micrometres per pixel, if the file lacks it.")]


@options_of(SlideConfig)
def slide(checked: SlideConfig, as_json: JsonFlag = False) -> None:
    """Classify whole slides: label, counts, heat map, GeoJSON. Exit code 1 if a slide failed."""
    from ..slides.classify import classify_slides

    quiet_libraries()

    with show_progress() as on_event:
        results = classify_slides(checked, on_event=on_event)
    if as_json:
        print_json(results)
    else:
        rows = [
            [
                str(entry["slide"]),
                entry["status"],
                str(entry.get("label") or ""),
                most_probable(entry.get("probabilities") or {}),
            ]
            for entry in results["slides"]
        ]
        mark = " (the model learned from synthetic images)" if results["synthetic"] else ""
        header = ["slide", "status", "label", "probabilities"]
        print_table(f"Slides{mark}. Research use only, not for diagnosis", header, rows)
        _print_object_counts(results, mark)
    print_failures("slide", failed_slides(results["slides"]), as_json)
    note_once(
        (entry["slide"], sentence)
        for entry in results["slides"]
        for sentence in [*entry.get("flags", ()), *entry.get("notes", ())]
    )
    note(f"tables, heat maps and GeoJSON are in {checked.output_dir}")
    if results["failed"]:
        raise typer.Exit(1)


def _print_object_counts(results: Mapping[str, Any], mark: str) -> None:
    """Table of the outlined objects by class: of each slide, and of cases of several slides."""
    from ..slides.report import describe_share

    slides = Counter(entry["case"] for entry in results["slides"])
    entries = [(str(entry["slide"]), entry.get("counts")) for entry in results["slides"]]
    entries += [
        (f"case {one['case']}", one["counts"])
        for one in results["cases"]
        if slides[one["case"]] > 1
    ]
    counted = [(name, of) for name, of in entries if of and of["unit"] == "objects"]
    if not counted:
        return
    names = results["class_names"]
    rows = [
        [name, str(of["n"]), *(describe_share(of["classes"][label]) for label in names)]
        for name, of in counted
    ]
    title = f"Counts of outlined objects (%, 95% interval){mark}"
    print_table(f"{title}. Research use only, not for diagnosis", ["", "objects", *names], rows)


def correct(
    results: Annotated[Path, Argument(help="Output folder of glovlm slide --objects.")],
    corrected: Annotated[
        Path, Argument(help="GeoJSON from QuPath, or a folder of NAME.geojson, one a slide.")
    ],
    reader: Annotated[str, Option(help="Who corrected: initials or a number.")],
    output_dir: Annotated[
        Path, Option(help="Folder of corrections; other slides and readers in it stay.")
    ],
    all_read: Annotated[
        bool,
        Option(
            help="The reader looked at every object of these slides: what was left as it was is "
            "confirmed."
        ),
    ] = False,
    classes: Annotated[
        Texts, Option(help="A class that the reader uses and the model lacks; repeat it.")
    ] = None,
    date: Annotated[
        Text, Option(help="Of the correction, YYYY-MM-DD; by default the file's last change.")
    ] = None,
    run: Annotated[
        Path | None, Option(help="Run of glovlm train whose split the slides' patients keep.")
    ] = None,
    cases: Annotated[
        Path | None, Option(help="With --run: CSV with slide_id and whose the slides are.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a reader's corrections from QuPath: what changed, counts anew, labels to train on.

    The results are not changed. Exit code 1 if the file of a slide cannot be used.
    """
    from ..slides.corrections import correct_results

    with show_progress():
        done = correct_results(
            results,
            corrected,
            reader,
            output_dir,
            all_read=all_read,
            classes=classes or (),
            date=date,
            run=run,
            cases=cases,
        )
    if as_json:
        print_json(done)
    else:
        kinds = ("added", "removed", "reclassified", "redrawn", "unchanged")
        rows = [
            [name, *(str(one["changes"][kind]) for kind in kinds), one["date"]]
            for name, one in done["slides"].items()
        ]
        print_table(f"Corrections of {reader}", ["slide", *kinds, "on"], rows)
        _print_counts(done)
    print_failures("slide", [*done["failed"].items()], as_json)
    for name, one in done["slides"].items():
        for sentence in one["notes"]:
            note(f"{name}: {sentence}")
    for pair in done["between_readers"]:
        if pair["differing"]:
            note(
                f"{pair['slide']}: {' and '.join(pair['readers'])} differ in "
                f"{len(pair['differing'])} of {len(pair['differing']) + pair['alike']} objects"
            )
    if run is None:
        note(
            "to train on these slides: give --run and --cases, so that their patients stay on the "
            "side of the split where they were"
        )
    else:
        note("the split of the run is in {0}: {train} train, {test} test, {new} new to it".format(
            output_dir / reader / "cases.csv", **done["split"]
        ))  # fmt: skip
    note(f"what {reader} corrected is in {output_dir / reader}")
    if done["failed"]:
        raise typer.Exit(1)


def _print_counts(done: Mapping[str, Any]) -> None:
    """Table of the counts before and after a reader's corrections."""
    names = [*done["class_names"], *done["classes"]]
    entries = [(name, one["counts"]) for name, one in done["slides"].items()]
    entries += [(f"case {one['case']}", one["counts"]) for one in done["cases"]]
    rows = []
    for name, counts in entries:
        before = (counts["before"] or {}).get("classes", {})
        after = counts["after"]["classes"]
        cells = [
            f"{before.get(label, {}).get('count', 0)} -> {after[label]['count']}"
            if label in after
            else "-"
            for label in names
        ]
        read = f"{counts['after']['read']} of {counts['after']['n']}"
        rows.append([name, *cells, read])
    print_table("Counts. Research use only, not for diagnosis", ["", *names, "read"], rows)


@options_of(MilConfig, own="aggregator_config")
def mil(checked: MilConfig, as_json: JsonFlag = False) -> None:
    """Learn slide labels from bags of tile features (`glovlm slide` writes them), by patient."""
    from ..slides.mil import train_mil

    with show_progress() as on_event:
        results = train_mil(checked, on_event=on_event)
    if not is_main():
        return
    print_metrics(results, as_json)
    note(f"model, results and attention are in {checked.output_dir}")


def caption(
    data: Annotated[Path, Argument(help="Folder of images, with or without metadata.csv.")],
    model: Annotated[str, Option(help="An image-to-text model: Hub id or folder.")],
    question: Annotated[Text, Option(help="What a chat model is asked; never the class.")] = None,
    output: Annotated[Path | None, Option(help="CSV or parquet; else metadata.csv.")] = None,
    batch_size: BatchFlag = 8,
    max_new_tokens: Annotated[
        int, Option(min=1, max=65_536, help="Longest caption, in tokens.")
    ] = 256,
    device: DeviceFlag = "auto",
    overwrite: Annotated[bool, Option(help="Write captions anew.")] = False,
) -> None:
    """Write a caption for every image with an image-to-text model; goes on where it stopped."""
    from ..inference import resolve_device
    from ..inference.captioning import QUESTION, write_captions

    quiet_libraries()
    with show_progress():
        done = write_captions(
            data,
            model=model,
            question=question or QUESTION,
            output=output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=resolve_device(device),
            overwrite=overwrite,
        )
    note(f"{done.written} captions written, {done.kept} kept, by {done.model} ({done.kind})")
    if done.empty:
        note(f"about {done.empty} images the model wrote nothing")
    note(f"the captions are in {done.path}")


def crops(
    slide: Annotated[Path, Argument(help="A slide or a region image, or a folder of them.")],
    annotations: Annotated[
        Path,
        Argument(
            help="GeoJSON of QuPath, COCO, XML of ImageScope or ASAP, or a mask with --colours; of "
            "a folder of slides one COCO file, or a folder of NAME.geojson, NAME.json, NAME.xml, "
            "or of NAME.png, NAME_mask.png."
        ),
    ],
    output_dir: Annotated[Path, Option(help="Folder of crops; other slides in it stay.")],
    cases: Annotated[
        Path | None,
        Option(
            help="CSV with slide_id and any of patient_id, case_id, stain, mpp, scene and what "
            "else is known of each slide and case (docs/outlines.md)."
        ),
    ] = None,
    mpp: MppFlag = None,
    scene: Annotated[Text, Option(help="Of a file that holds several: its number or name.")] = None,
    margin: Annotated[float, Option(help="Side of a crop over the object's longer side.")] = 1.25,
    label_property: Annotated[Text, Option(help="The property that holds the class.")] = None,
    classes: Annotated[Texts, Option(help="Classes that are cut, and no other; repeat it.")] = None,
    exclude: Annotated[Texts, Option(help="Classes that are left out; repeat it.")] = None,
    origin: Annotated[
        str, Option(help="Where the outlines count from: auto, slide, bounds, or X,Y in pixels.")
    ] = "auto",
    colours: Annotated[
        Text, Option(help="Of a mask: green=viable,red=sclerosed, or by value 1=viable.")
    ] = None,
    outline_of: Annotated[
        Text, Option(help="What the outlines go around: capsule or tuft, kept with each crop.")
    ] = None,
    slide_id: Annotated[Text, Option(help="Else the file's name.")] = None,
    patient_id: Annotated[Text, Option(help="Whose slide it is.")] = None,
    drop_flagged: Annotated[bool, Option(help="Leave out partial and merged ones.")] = False,
    min_extent: Annotated[int, Option(help="Smaller blobs of a mask are specks.")] = 16,
    allow_scale: Annotated[bool, Option(help="Accept an --mpp far from the file's.")] = False,
) -> None:
    """Cut outlined glomeruli out of slides into a folder that `glovlm train` takes.

    Those without a class lie in unlabelled/, to be labelled in metadata.csv. Exit code 1 if a slide
    failed or nothing was cut.
    """
    from ..slides.files.case_table import read_case_table
    from ..slides.files.crops import cut_slides
    from ..slides.files.masks import parse_colours

    table = None if cases is None else read_case_table(cases)
    for sentence in [] if table is None else table.notes:
        note(sentence)
    with show_progress():
        outcomes = cut_slides(
            slide,
            annotations,
            output_dir,
            cases=table,
            mpp=mpp,
            scene=scene,
            margin=margin,
            label_property=label_property,
            classes=classes or (),
            exclude=exclude or (),
            origin=origin,
            colours=parse_colours(colours) if colours else None,
            outline_of=outline_of,
            slide_id=slide_id,
            patient_id=patient_id,
            keep_flagged=not drop_flagged,
            min_extent=min_extent,
            allow_scale=allow_scale,
        )
    done = [one.summary for one in outcomes if one.summary is not None]
    names = sorted({name for summary in done for name in summary.counts})
    rows = []
    for one in outcomes:
        counts = one.summary.counts if one.summary else {}
        numbers = [*(counts.get(name, 0) for name in names)]
        numbers.append(len(one.summary.unlabelled) if one.summary else 0)
        rows.append([one.slide, *map(str, numbers)])
    print_table("Crops", ["slide", *names, "without a class"], rows)
    without = [(one.slide, one.reason) for one in outcomes if one.reason is not None]
    if without:
        print_table("Not cut", ["slide", "reason"], without)
    failed = [(one.slide, one.error) for one in outcomes if one.error is not None]
    print_failures("slide", failed)
    _summarise_crops(done)
    unlabelled = sum(len(summary.unlabelled) for summary in done)
    if unlabelled:
        note(
            f"{unlabelled} objects have no class and lie in unlabelled/: fill in the column "
            f"label of {output_dir / 'metadata.csv'}; rows without a label are left out of training"
        )
    note(f"the crops are in {output_dir}")
    if failed or not done:
        raise typer.Exit(1)


def _summarise_crops(done: Sequence["CropSummary"]) -> None:
    """Notes on what was cut and what was not, over all slides."""
    totals: Counter[str] = Counter()
    sentences: list[tuple[str, str]] = []
    for summary in done:
        totals["outlined twice, cut once"] += len(summary.duplicates)
        totals["flagged and left out"] += len(summary.skipped)
        totals["too small to be an object"] += summary.specks
        totals.update(summary.flags)
        lines = [*summary.notes]
        if summary.mpp is not None:
            lines.append(f"micrometres per pixel: {summary.mpp:g}")
        if summary.origin["source"] != "slide":
            lines.append("outlines count from {x:g},{y:g} ({source})".format(**summary.origin))
        sentences += [(summary.slide, line) for line in lines]
    for what, n in totals.items():
        if n:
            note(f"{n} {what}")
    note_once(sentences)


def get(name: Annotated[str, Argument(help="A name of `glovlm datasets`.")]) -> None:
    """Print where a public data set is, under what licence, and how to lay it out."""
    from ..data.catalog import describe_source

    typer.echo(describe_source(name))
