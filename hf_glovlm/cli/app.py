"""Command line `glovlm`. Every command imports what it needs inside, so that help is instant.

Exit codes: 0 done, 1 done in part (`predict` with unreadable images, `data check` with problems),
2 bad input or no space, 130 interrupted, 143 terminated. Tables go to the standard output, all else
to the error stream.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from .. import __version__
from ..environment import quiet_libraries
from ..errors import GloVLMError
from ..lab.pretraining_config import PretrainConfig
from ..progress import is_main
from ..runs.config import TrainConfig
from ..settings import SEEDS, read_yaml
from .benches import LISTED, bench
from .biopsy import sheet
from .comparisons import compare
from .console import (
    INTERRUPTED,
    TERMINATED,
    Notes,
    check_output,
    explain_failure,
    fail,
    note,
    print_json,
    print_metrics,
    print_predictions,
    print_rows,
    print_table,
    show_progress,
    until_terminated,
)
from .data import data_app
from .finder import find_app
from .installation import doctor
from .options import (
    BatchFlag,
    DeviceFlag,
    GroupColumn,
    GroupFrom,
    ImageColumn,
    JsonFlag,
    LabelColumn,
    ModelArgument,
    PrecisionFlag,
    Real,
    RuntimeFlag,
    ScaleFlag,
    StainFlag,
    Text,
    options_of,
)
from .publish import card, explain, explain_check, export, push
from .reports import REPORTS, write_beside
from .slides import caption, correct, crops, get, mil, slide

app = typer.Typer()
cache_app = typer.Typer(help="Stored features of images; they come from patients' images.")
backbones_app = typer.Typer(help="The known backbones; any CLIP, SigLIP or pair serves as well.")
app.add_typer(data_app, name="data")
app.add_typer(backbones_app, name="backbones")
app.add_typer(cache_app, name="cache")
app.add_typer(find_app, name="find")

logger = logging.getLogger("hf_glovlm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those after `glovlm`; from the command line when not given.

    Returns:
        The exit code. Bad input is one line that begins with `error:`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if not any(isinstance(handler, Notes) for handler in logger.handlers):
        logger.addHandler(Notes())
    with until_terminated(last=arguments is None) as ended:
        code = _run(given)
    code = TERMINATED if ended.is_set() else code
    if code in (INTERRUPTED, TERMINATED):
        word = "interrupted" if code == INTERRUPTED else "terminated"
        note(f"{word}: the last complete result is kept")
    return code


def _run(given: list[str]) -> int:
    """Run one command; its exit code, after a sentence where it failed."""
    try:
        command = typer.main.get_command(app)
        code = command.main(given, prog_name="glovlm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except GloVLMError as error:
        return fail(str(error))
    except (KeyboardInterrupt, typer.Abort):  # Typer turns the first into the second
        return INTERRUPTED
    except BrokenPipeError:  # `glovlm datasets | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = explain_failure(error)
        if sentence is None:
            raise
        return fail(sentence)


# ----------------------------------------------------------------------------- adapt and measure


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"glovlm {__version__}")
        raise typer.Exit


@app.callback()
def glovlm(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Few-shot adaptation of vision-language models to fine-grained glomerulus classes.

    Research use only, not for diagnosis.
    """


@app.command()
@options_of(TrainConfig, own="method_config")
def train(checked: TrainConfig, as_json: JsonFlag = False) -> None:
    """Adapt a backbone from a few labelled images, measure it on other patients, save it."""
    from ..runs import run

    quiet_libraries()
    with show_progress() as on_event:
        results = run(checked, on_event=on_event)
    if not is_main():
        return
    print_metrics(results, as_json)
    note(f"model, results and card are in {checked.output_dir}")
    write_beside(checked.output_dir)


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[str, Option(help="Labelled images: folder, table, or Hub id.")],
    output: Annotated[Path, Option(help="JSON file to write.")] = Path("results.json"),
    predictions: Annotated[Path | None, Option(help="Parquet file to write, too.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    group_from: GroupFrom = None,
    split: Annotated[Text, Option(help="Of the data; by default test, or all.")] = None,
    stain: StainFlag = None,
    allow_seen: Annotated[bool, Option(help="Accept patients it learned from.")] = False,
    allow_scale: ScaleFlag = False,
    batch_size: BatchFlag = 32,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = "fp32",
    runtime: RuntimeFlag = "torch",
    n_resamples: Annotated[int, Option(min=1, help="Bootstrap resamples.")] = 2000,
    as_json: JsonFlag = False,
) -> None:
    """Measure a trained model on labelled images, with intervals over patients."""
    check_output(output, "results", [data, model])
    check_output(predictions, "predictions", [data, model, output])

    from ..data import Columns
    from ..files import write_json
    from ..runs.evaluation import evaluate as measure
    from ..runs.provenance import UNKNOWN

    quiet_libraries()
    with show_progress():
        results = measure(
            model,
            data,
            columns=Columns(
                image_column=image_column,
                label_column=label_column,
                group_column=group_column,
                group_from=group_from,
            ),
            split=split,
            stain=stain,
            allow_seen=allow_seen,
            allow_scale=allow_scale,
            batch_size=batch_size,
            device=device,
            precision=precision,
            runtime=runtime,
            n_resamples=n_resamples,
        )
    if predictions is not None:
        results.predictions.save(predictions)
    write_json(output, results.to_dict())
    print_metrics(results, as_json)
    if as_json and UNKNOWN in results["notes"]:
        note(UNKNOWN)
    note(f"results are in {output}; for a page of them: glovlm report {output}")


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], Argument(help="Images, or folders of images.")],
    output: Annotated[Path | None, Option(help="CSV: file_name, predicted, p_CLASS.")] = None,
    mpp: Annotated[Real, Option(help="Micrometres per pixel, else from metadata.csv.")] = None,
    stain: StainFlag = None,
    allow_scale: ScaleFlag = False,
    batch_size: BatchFlag = 32,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = "fp32",
    runtime: RuntimeFlag = "torch",
    as_json: JsonFlag = False,
) -> None:
    """Classify images. Unreadable ones are named and left out; the exit code is then 1."""
    check_output(output, "table", [*images, model])
    if mpp is not None and not 0 < mpp < float("inf"):
        raise GloVLMError(f"--mpp must be a number above 0; found {mpp:g}.")

    from ..data.stains import state_stains
    from ..files import write_csv
    from ..inference import FeatureCache, open_engine
    from ..inference import predict as classify
    from ..inference.engines import engine_device, example_images
    from ..inference.guard import NO_GUARD
    from ..inference.outlines import hidden_notes, outline_notes
    from ..inference.scale import check_scale, describe_scale
    from ..inference.sentences import calibration_columns
    from ..publish.adapter_only import load_model
    from ..runs.evaluation import image_rows, list_images, readable_images

    places, notes, unnamed = list_images(images)
    for sentence in notes:
        note(sentence)
    quiet_libraries()
    place = engine_device(device, runtime, precision)
    options: dict[str, Any] = {"batch_size": batch_size, "cache": FeatureCache()}
    loaded = load_model(model, exported=True)[:2]
    rows_of_images, stated = state_stains(image_rows(places, mpp), stain)
    readable = places
    scale, adapted = check_scale(*loaded, rows_of_images, allow=allow_scale), loaded[0].config.mpp
    if (scale.mpp == "unknown") != (adapted is None):
        adapted_at = describe_scale(adapted)
        shown = scale.input_mpp
        note(f"micrometres per input pixel: {shown}; the model was adapted at {adapted_at}")
    for sentence in [*scale.notes, *stated]:
        note(sentence)
    seen = example_images(rows_of_images, loaded[1]) if "auto" in (precision, runtime) else []
    options["engine"] = open_engine(
        *loaded, precision=precision, runtime=runtime, device=place, images=seen,
        workload=len(rows_of_images), on_note=note,
    )  # fmt: skip
    with show_progress():
        try:
            predictions = classify(*loaded, rows_of_images, **options)
        except GloVLMError:  # perhaps an image: only then is it worth decoding each one alone
            readable, unreadable = readable_images(places, loaded[0].config.outline)
            for sentence in unreadable:
                note(sentence)
            if not unreadable:
                raise
            if not readable:
                raise GloVLMError(f"None of the {len(places)} images can be read.") from None
            rows_of_images, _ = state_stains(image_rows(readable, mpp), stain)
            predictions = classify(*loaded, rows_of_images, **options)
    about = loaded[0].config
    hidden = [*hidden_notes(about), *outline_notes(about, rows_of_images)]
    for sentence in [*hidden, *predictions.notes]:
        note(sentence)
    if predictions.support_distances is None:
        note(NO_GUARD)
    answers = calibration_columns(predictions, loaded[0].config.calibration or {})
    shares = [f"p_{name}" for name in predictions.class_names]
    header = ["file_name", "predicted", *shares, *answers]
    each = (predictions.file_names, predictions.predicted, predictions.probabilities.round(6))
    rows = [
        [name, label, *map(float, p), *more]
        for name, label, p, *more in zip(*each, *answers.values(), strict=True)
    ]
    if output is not None:
        write_csv(output, header, rows)
    synthetic = " (learned from synthetic images)" if loaded[0].config.synthetic else ""
    title = f"Predictions{synthetic}"
    if as_json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
    elif output is None:
        print_predictions(title, predictions, answers)
    else:
        counts = [[k, str(predictions.predicted.count(k))] for k in predictions.class_names]
        print_table(title, ["predicted", "images"], counts)
        note(f"the predictions are in {output}")
    if unnamed:
        listed = ", ".join(unnamed)
        note(f"{len(unnamed)} images are left out, whose names are not UTF-8: {listed}")
    if len(readable) < len(places):
        note(f"{len(places) - len(readable)} of {len(places)} images are left out: unreadable")
    if unnamed or len(readable) < len(places):
        raise typer.Exit(1)


@app.command()
def study(
    config: Annotated[Path, Option(help="YAML: data, methods, backbones, shots, draws, ...")],
    output_dir: Annotated[Path, Option(help="Takes the cells and the report; resumed if there.")],
    workers: Annotated[int, Option(min=1, max=1024, help="Cells at a time.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods, paired, over label draws. Exit code 1 if a cell failed."""
    from ..runs.study import StudyConfig, render_report, run_study

    ended = Counter[str]()

    def follow(kind: str, what: Mapping[str, Any]) -> None:
        ended[what["status"]] += 1
        if what["status"] == "failed":
            note(f"{what['name']}: failed ({what['error']})")

    grid = StudyConfig.from_mapping(read_yaml(config))
    quiet_libraries()
    with show_progress():
        report = run_study(grid, output_dir, workers=workers, on_event=follow)
    if as_json:
        print_json(report)
    else:
        typer.echo(render_report(report))
    note("cells: " + ", ".join(f"{n} {status}" for status, n in ended.items()))
    note(f"the report and its cells are in {output_dir}")
    write_beside(output_dir)
    if report["failures"]:
        raise typer.Exit(1)


ELSEWHERE: list[Callable[..., None]] = [
    *REPORTS,
    compare,
    slide,
    correct,
    sheet,
    mil,
    explain,
    explain_check,
    card,
    push,
    export,
]
for _command in ELSEWHERE:
    app.command()(_command)
ABOUT_DATA: list[Callable[..., None]] = [caption, crops, get]
for _command in ABOUT_DATA:
    data_app.command()(_command)


# ---------------------------------------------------------------------------- the embedded default


@app.command()
def demo(
    output_dir: Annotated[Path | None, Option(help="Empty; else glovlm-demo, replaced.")] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Of images, split and training.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Do the main job on synthetic images: no network, no data, under two minutes."""
    from ..lab.demo import remove_demo, run_demo
    from ..rendering import METRIC_HEADER, metric_rows

    folder = output_dir or Path("glovlm-demo")
    if output_dir is None:
        remove_demo(folder)
    quiet_libraries()
    with show_progress() as on_event:
        outcome = run_demo(folder, seed=seed, on_event=on_event)
    if as_json:
        print_json(outcome)
        return
    for method, results in outcome["runs"].items():
        title = f"{method} on {results['n']} synthetic images of {results['n_groups']} patients"
        print_table(title, METRIC_HEADER, metric_rows(results["metrics"]))
    difference = f"{outcome['reload_difference']:.1e}"
    note(f"saved, reloaded: logits of synthetic images differ by {difference} at most")
    note(f"models, results, cards and {Path(outcome['figure']).name} are in {folder}")
    write_beside(list(outcome["runs"].values())[-1].folder)


@app.command()
@options_of(PretrainConfig)
def pretrain(checked: PretrainConfig, as_json: JsonFlag = False) -> None:
    """Train the embedded default `mini` again: a small CLIP, on synthetic images only."""
    from ..lab.pretraining import pretrain as train_mini

    quiet_libraries()
    with show_progress() as on_event:
        facts = train_mini(
            checked,
            on_stage=lambda name: on_event("stage", {"name": name}),
        )
    if as_json and is_main():
        print_json(facts)
    note(f"the model, trained on synthetic images only, is in {checked.output_dir}")


# ------------------------------------------------------------------------------------- the tables


@app.command()
def methods(as_json: JsonFlag = False) -> None:
    """List the adaptation methods."""
    from ..methods import METHODS

    rows = [method.describe() for method in METHODS.values()]
    print_rows(
        "Methods",
        rows,
        ("name", "family", "trains", "needs_text", "validation", "transductive", "citation"),
        as_json,
    )


@backbones_app.callback(invoke_without_command=True)
def backbones(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the known backbones; any other CLIP, SigLIP or pair of towers serves as well."""
    if context.invoked_subcommand is not None:
        return
    from ..backbones import BACKBONES

    rows = [
        asdict(row) | {"page": row.page, "restrictions": row.restrictions}
        for row in BACKBONES.values()
    ]
    shown = ("name", "hub_id", "kind", "image_size", "license", "gated")
    print_rows("Backbones", rows, shown, as_json)


@backbones_app.command("convert")
def backbones_convert(
    checkpoint: Annotated[str, Argument(help="Name, Hub id, or folder with published files.")],
    output_dir: Annotated[Path, Option(help="Where the transformers folder is written.")],
    kind: Annotated[Text, Option(help="open_clip, biomedclip, conch, keep or timm.")] = None,
    revision: Annotated[Text, Option(help="Commit or branch on the Hub.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write published weights (open_clip, CoCa, timm) as a folder that loads in seconds."""
    from ..backbones import convert_backbone

    quiet_libraries()
    with show_progress() as on_event:
        on_event("stage", {"name": f"converting {checkpoint}"})
        report = convert_backbone(checkpoint, output_dir, kind=kind, revision=revision)
    for sentence in report.notes:
        note(sentence)
    if as_json:
        print_json(asdict(report))
    note(f"the converted weights are in {output_dir}: use it as --backbone")


@backbones_app.command("modules")
def backbones_modules(
    name: Annotated[str, Argument(help="Name, Hub id, folder, or VISION+TEXT.")],
    towers: Annotated[str, Option(help="both, vision or text.")] = "both",
    projections: Annotated[str, Option(help="Of the attention, letters of qkvo.")] = "qkvo",
    mlp: Annotated[bool, Option("--mlp", help="Also the maps outside the attention.")] = False,
    last: Annotated[int, Option(min=0, help="Blocks from the end; 0 is all.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Name the linear maps of a backbone's blocks, as PEFT's target_modules takes them."""
    from ..backbones import load_backbone
    from ..methods import target_modules

    quiet_libraries()
    model, _ = load_backbone(name)
    names = target_modules(model.backbone, towers, last=last, projections=projections, mlp=mlp)
    if as_json:
        print_json(names)
    else:
        typer.echo("\n".join(names))


@app.command()
def datasets(as_json: JsonFlag = False) -> None:
    """List the public data sets whose classes, prompts and rules are known."""
    from ..data import catalog_entries

    rows = [asdict(entry) for entry in catalog_entries()]
    for row in rows:
        row["labels"] = len(row["classes"])
    print_rows("Data sets", rows, ("name", "title", "kind", "labels", "licence"), as_json)


@cache_app.callback(invoke_without_command=True)
def cache_main(context: typer.Context) -> None:
    """Stored features of images; they come from patients' images."""
    if context.invoked_subcommand is None:
        cache_list()


@cache_app.command("list")
def cache_list(as_json: JsonFlag = False) -> None:
    """List the encoders whose features are stored."""
    from ..inference import FeatureCache

    cache = FeatureCache()
    rows = [asdict(entry) for entry in cache.entries()]
    for row in rows:
        row["megabytes"] = f"{row['size'] / 1e6:.1f}"
    print_rows(f"Features in {cache.folder}", rows, ("key", "name", "images", "megabytes"), as_json)


@cache_app.command("clear")
def cache_clear(
    key: Annotated[Text, Argument(help="Of one encoder, or its beginning; else all.")] = None,
) -> None:
    """Remove stored features."""
    from ..inference import FeatureCache

    cache = FeatureCache()
    note(f"{cache.clear(key) / 1e6:.1f} MB were freed in {cache.folder}")


app.command(epilog=LISTED)(bench)
app.command()(doctor)


if __name__ == "__main__":
    sys.exit(main())
