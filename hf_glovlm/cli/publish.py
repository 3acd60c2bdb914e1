"""Commands that publish or explain a model: card, push, export, heat maps."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ..environment import quiet_libraries
from ..errors import GloVLMError
from .console import note, print_json, print_rows, print_table, show_progress
from .options import DeviceFlag, JsonFlag, ModelArgument, Text, Texts

__all__ = ["card", "explain", "explain_check", "export", "push"]

RunArgument = Annotated[Path, Argument(help="A run's folder.")]
ReasonFlag = Annotated[Text, Option(help="Why the base's licence allows it; the card says it.")]
WindowFlag = Annotated[int, Option(min=1, help="Occlusion: side of the blank, patches.")]


def card(
    run: Annotated[str, Argument(help="A run's folder, that of `glovlm pretrain`, or mini.")],
    output: Annotated[Path | None, Option(help="The file. (README.md in the folder)")] = None,
) -> None:
    """Write the model card of a run again, from its results; or that of a pretrained backbone."""
    from ..publish.card import write_card

    note(f"the card is in {write_card(run, output)}")


def push(
    run: RunArgument,
    repo_id: Annotated[str, Argument(help="owner/name.")],
    private: Annotated[bool, Option(help="Make a new repository private.")] = False,
    adapter_only: Annotated[bool, Option(help="Leave the base's weights out.")] = False,
    merge: Annotated[bool, Option(help="Insist on the adapter merged into the model.")] = False,
    dry_run: Annotated[bool, Option(help="Only list what would leave.")] = False,
    reason: ReasonFlag = None,
    branch: Annotated[Text, Option(help="Where to commit. (main)")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Publish a run on the Hub in one commit. No image, path, patient or slide id ever leaves."""
    from ..publish.upload import push as send

    quiet_libraries()
    with show_progress():
        done = send(
            run,
            repo_id,
            private=private,
            adapter_only=adapter_only,
            merge=merge,
            dry_run=dry_run,
            reason=reason,
            branch=branch,
            on_progress=note,
        )
    if as_json:
        print_json(vars(done))
    else:
        word = "Would leave for" if dry_run else "Published in"
        rows = [[name, f"{size:,}"] for name, size in done.files.items()]
        print_table(f"{word} {done.repo_id}", ["file", "bytes"], rows)
    for sentence in [*done.left_out, *done.notes]:
        note(sentence)
    if done.commit_url:
        note(f"the commit is {done.commit_url}")


def export(
    run: RunArgument,
    output_dir: Annotated[Path, Option(help="A folder that is new or empty.")],
    form: Annotated[
        Literal["onnx", "int8", "clip"], Option("--format", help="onnx, int8 or clip.")
    ] = "onnx",
    data: Annotated[
        Text, Option(help="Labelled images to measure on; else synthetic images.")
    ] = None,
    reason: ReasonFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a run as an ONNX graph, fp32 or int8, or as a plain CLIP checkpoint."""
    from ..inference import load_classifier
    from ..inference.exported import RUN
    from ..publish.licences import check_publishing
    from ..publish.onnx_graph import export_model
    from ..publish.plain_clip import export_clip

    quiet_libraries()
    if form == "clip":
        if data is not None:
            raise GloVLMError("--data is measured on by --format onnx or int8; leave it out here.")
        note(f"the CLIP checkpoint is in {export_clip(run, output_dir, reason=reason)}")
        return
    config = load_classifier(str(run))[0].config
    check_publishing(config, "export", reason)
    if data is not None:
        from ..data import all_rows, load_dataset

        rows = all_rows(load_dataset(data))
    else:
        from ..lab.phantoms import render_dataset

        rows = render_dataset(list(config.label2id))
    with show_progress() as on_event:
        done = export_model(
            run,
            output_dir,
            format=form,
            data=rows,
            data_name=Path(data).name if data else "synthetic images",
            synthetic=data is None,
            reason=reason,
            on_stage=lambda name: on_event("stage", {"name": name}),
        )
    if as_json:
        print_json(done.describe())
        return
    shown = (item for item in done.describe().items() if item[0] not in ("measured", "notes"))
    facts = [[key, str(value)] for key, value in shown]
    print_table("Export", ["", ""], facts)
    if done.measured is not None:
        facts = [[key, str(value)] for key, value in vars(done.measured).items()]
        what = " (synthetic images: a test of software, no result)"
        print_table(f"Measured{what if done.measured.synthetic else ''}", ["", ""], facts)
    for sentence in done.notes:
        note(sentence)
    if (done.folder / RUN).is_file():
        note(f"{RUN} holds hashes of what the model learned from: leave it out of what you pass on")
    note(f"graph and preprocessing are in {output_dir}")


def explain(
    model: ModelArgument,
    images: Annotated[list[Path], Argument(help="Image files.")],
    output_dir: Annotated[Path, Option(help="Takes a figure an image, and the scores.")],
    method: Annotated[str, Option(help="Heat map; an unknown name lists all.")] = "gradient",
    target: Annotated[Text, Option("--class", help="Explained class. (the predicted)")] = None,
    text: Annotated[Text, Option(help="A text to explain, in place of a class.")] = None,
    masks: Annotated[Path | None, Option(help="Folder of masks, white is glomerulus.")] = None,
    window: WindowFlag = 1,
    opacity: Annotated[float, Option(min=0, max=1, help="Of the heat.")] = 0.5,
    device: DeviceFlag = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Draw a heat map of each image, beside its scores with the glomerulus and the rest blanked."""
    from ..explain import explain_files, load_masks
    from ..inference import resolve_device
    from ..publish.adapter_only import load_model

    quiet_libraries()
    classifier, processor, _ = load_model(model)
    classifier.to(resolve_device(device))
    with show_progress():
        rows = explain_files(
            classifier,
            processor,
            images,
            output_dir,
            method=method,
            target=target,
            text=text,
            masks=load_masks(masks, images) if masks else None,
            window=window,
            opacity=opacity,
        )
    columns = ("file_name", "target", "score", "glomerulus_blanked", "context_blanked")
    shown = [name for name in columns if name in rows[0]]
    print_rows("Heat maps. Research use only, not for diagnosis", rows, shown, as_json)
    note(f"figures and scores are in {output_dir}")


def explain_check(
    model: ModelArgument,
    data: Annotated[str, Option(help="Images with their groups.")],
    masks: Annotated[Path, Option(help="Folder of their masks, white is glomerulus.")],
    methods: Annotated[Texts, Option("--method", help="Of `explain`; all by default.")] = None,
    curves: Annotated[bool, Option(help="Deletion and insertion, too.")] = False,
    window: WindowFlag = 1,
    device: DeviceFlag = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Measure heat maps: heat inside the glomerulus against its area, over unseen groups."""
    from ..data import all_rows, group_rows, load_dataset
    from ..data.folder import column
    from ..explain import evaluate_maps, load_masks
    from ..inference import resolve_device
    from ..publish.adapter_only import load_model
    from ..rendering import interval, number
    from ..runs.evaluation import unlearned_rows

    quiet_libraries()
    place = resolve_device(device)
    classifier, processor, run = load_model(model)
    classifier.to(place)
    rows = all_rows(load_dataset(data))
    groups = group_rows(rows)
    kept, sentences = unlearned_rows(run, rows, groups)
    for sentence in sentences:
        note(sentence)
    rows = rows.select(kept)
    with show_progress():
        measured = evaluate_maps(
            classifier,
            processor,
            column(rows, "image"),
            load_masks(masks, column(rows, "file_name")),
            [groups.ids[i] for i in kept],
            methods=methods,
            curves=curves,
            window=window,
        )
    if as_json:
        print_json(measured)
        return
    of = measured["methods"]
    measures = ("heat", "area", "excess", "ratio", "deletion_gain", "insertion_gain")
    shown = [name for name in measures if all(name in entry for entry in of.values())]
    table = []
    for name, entry in of.items():
        cells = (f"{number(entry[m]['value'])} {interval(entry[m]['ci95'])}" for m in shown)
        table.append([name, str(entry["images"]), str(entry["groups"]), *cells])
    print_table("Heat maps", ["method", "images", "groups", *shown], table)
    for name, why in measured["not_applicable"].items():
        note(f"{name}: {why}")
