"""The command `glovlm`. Every command imports what it needs inside, so that help is instant.

Exit codes: 0 done, 1 done in part (`predict` with unreadable images, `data check` with problems),
2 bad input, 130 interrupted. Tables go to the standard output, all else to the error stream.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer import Argument, Option

from .errors import GloVLMError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .data import Groups
    from .inference import Predictions

app = typer.Typer(
    help="Few-shot adaptation of image-text models to fine-grained glomerulus classes. "
    "Research use only, not for diagnosis.",
    add_completion=False,
)
data_app = typer.Typer(help="Look at labelled images.")
cache_app = typer.Typer(help="Stored features of images; they come from patients' images.")
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")

Text = str | None
Texts = list[str] | None
Switch = bool | None
Whole = int | None
Real = float | None
JsonFlag = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
DeviceFlag = Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")]
BatchFlag = Annotated[int, Option(min=1, help="Images encoded at a time.")]
ModelArgument = Annotated[str, Argument(help="A run's folder, its model/, or a Hub id.")]

logger = logging.getLogger("hf_glovlm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those after `glovlm`; from the command line when not given.

    Returns:
        The exit code. Bad input is told in one line that begins with `error:`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    try:
        command = typer.main.get_command(app)
        code = command.main(given, prog_name="glovlm", standalone_mode=False)
    except GloVLMError as error:
        return _fail(str(error))
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        return _fail(f"{error.filename} cannot be used ({error.strerror}): give another place.")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # all that Typer raises for a wrong command line
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", "glovlm")
        return _fail(f"{error.format_message()} (see {path} --help)")
    if code == 130:
        _note("interrupted: the last complete result is kept")
    return code if isinstance(code, int) else 0


# ----------------------------------------------------------------------------- adapt and measure


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path | None, Option(help="YAML of these settings; flags win.")] = None,
    data: Annotated[Text, Option(help="Folder of images, parquet file, or Hub id.")] = None,
    output_dir: Annotated[Text, Option(help="Where the run is written.")] = None,
    backbone: Annotated[Text, Option(help="Name, Hub id, folder, VISION+TEXT. (mini)")] = None,
    method: Annotated[Text, Option(help="A name of `glovlm methods`. (linear_probe)")] = None,
    shots: Annotated[Text, Option(help="Labels per class: N, or CLASS=N,CLASS=N. (8)")] = None,
    seed: Annotated[Whole, Option(help="Of everything random. (0)")] = None,
    episodes: Annotated[Text, Option(help="File of frozen splits and supports.")] = None,
    draw: Annotated[Whole, Option(help="Which draw of that file, or of the seed. (0)")] = None,
    shots_from: Annotated[Text, Option(help="spread, random or one_group. (spread)")] = None,
    allow_fewer: Annotated[Switch, Option(help="Take what a rare class has.")] = None,
    prompts: Annotated[Text, Option(help="auto, catalog, terminology, or a YAML. (auto)")] = None,
    stain: Annotated[Text, Option(help="For --prompts terminology.")] = None,
    validation_shots: Annotated[Whole, Option(help="More labels, for early stopping. (0)")] = None,
    test_fraction: Annotated[Real, Option(help="Fraction of groups tested. (0.5)")] = None,
    loss: Annotated[Text, Option(help="prototypes, infonce, infonce_published.")] = None,
    settings: Annotated[Texts, Option("--set", metavar="KEY=VALUE", help="Of the method.")] = None,
    epochs: Annotated[Whole, Option(help="Instead of the method's own.")] = None,
    lr: Annotated[Real, Option(help="Instead of the method's own.")] = None,
    weight_decay: Annotated[Real, Option(help="Instead of the method's own.")] = None,
    batch_size: Annotated[Whole, Option(help="Over all processes, instead of its own.")] = None,
    augment: Annotated[Switch, Option(help="Random flips, quarter turns and crops.")] = None,
    mixed_precision: Annotated[Text, Option(help="no, fp16 or bf16. (no)")] = None,
    accumulate: Annotated[Whole, Option(help="Parts of a batch, to save memory. (1)")] = None,
    clip_norm: Annotated[Real, Option(help="Largest gradient norm.")] = None,
    tracker: Annotated[Text, Option(help="An Accelerate tracker: tensorboard, ...")] = None,
    device: Annotated[Text, Option(help="auto, cpu, cuda, cuda:N or mps. (auto)")] = None,
    overwrite: Annotated[Switch, Option(help="Replace the run in the output folder.")] = None,
    resume: Annotated[Switch, Option(help="Go on with the run in the output folder.")] = None,
    cache: Annotated[Switch, Option(help="Keep features for later runs. (on)")] = None,
    n_resamples: Annotated[Whole, Option(help="Bootstrap resamples. (2000)")] = None,
    save_model: Annotated[Switch, Option(help="Write model/ and adapter/. (on)")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Adapt a backbone from a few labelled images, measure it on other patients, save it."""
    own = ("config", "settings", "as_json")
    given = {k: v for k, v in context.params.items() if k not in own and v is not None}
    values = _read_settings(config, given, settings or [])

    from .runs import TrainConfig, run

    checked = TrainConfig.from_mapping(_typed(values, get_type_hints(TrainConfig)))
    _quiet()
    with _progress() as on_event:
        results = run(checked, on_event=on_event)
    if not _is_main():
        return
    if as_json:
        _print_json(results)
    else:
        _print_metrics(results)
    _note(f"model, results and card are in {checked.output_dir}")


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[str, Option(help="Labelled images: folder, parquet file, or Hub id.")],
    output: Annotated[Path, Option(help="JSON file to write.")] = Path("results.json"),
    predictions: Annotated[Path | None, Option(help="Parquet file to write, too.")] = None,
    split: Annotated[Text, Option(help="Of the data; by default test, or all.")] = None,
    allow_seen: Annotated[bool, Option(help="Accept patients it learned from.")] = False,
    batch_size: BatchFlag = 32,
    device: DeviceFlag = "auto",
    n_resamples: Annotated[int, Option(min=1, help="Bootstrap resamples.")] = 2000,
    as_json: JsonFlag = False,
) -> None:
    """Measure a trained model on labelled images, with intervals over patients."""
    _check_output(output)
    _check_output(predictions)

    from .data import check_dataset, group_rows, load_dataset
    from .inference import resolve_device
    from .runs import describe_environment, measure

    _quiet()
    place = resolve_device(device)
    rows = _choose_split(load_dataset(data), split)
    classifier, processor, run = _load_model(model)
    known = [str(name) for name in classifier.config.id2label.values()]
    unknown = next((name for name in rows.features["label"].names if name not in known), None)
    if unknown:
        raise GloVLMError(
            f"The label '{unknown}' is no class of this model, which knows {', '.join(known)}."
            f"{nearest(unknown, known)}"
        )
    report = check_dataset({"all": rows})
    report.raise_problems()
    groups = group_rows(rows)
    seen = _count_seen(run, rows, groups)
    if seen and not allow_seen:
        raise GloVLMError(
            f"The model learned from {seen} of the {len(set(groups.ids))} groups in these data, so "
            "the numbers would flatter it: leave them out, or give --allow-seen."
        )
    said = _classify((classifier, processor), rows, batch_size, place, groups.ids)
    results = {
        "config": {"model": model, "data": data, "split": split, "allow_seen": allow_seen},
        "data": {
            "name": Path(data).name,
            "fingerprint": report.fingerprint,
            "classes": known,
            "counts": report.counts["all"],
            "group_column": groups.column,
            "groups_seen_in_training": seen,
        },
        **measure(said, n_resamples=n_resamples),
        "notes": [groups.note],
        "synthetic": classifier.config.synthetic or bool(_drawings(data)),
        "environment": describe_environment(place),
    }
    if predictions is not None:
        said.save(predictions)
    _write(output, json.dumps(results, indent=1) + "\n")
    if as_json:
        _print_json(results)
    else:
        _print_metrics(results)
    _note(f"results are in {output}")


@app.command()
def predict(
    model: ModelArgument,
    images: Annotated[list[Path], Argument(help="Images, or folders of images.")],
    output: Annotated[Path | None, Option(help="CSV: file_name, predicted, p_CLASS.")] = None,
    batch_size: BatchFlag = 32,
    device: DeviceFlag = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Classify images. Unreadable ones are named and left out; the exit code is then 1."""
    _check_output(output)
    places = _list_images(images)

    from .inference import resolve_device

    _quiet()
    place = resolve_device(device)
    loaded = _load_model(model)[:2]
    readable = places
    try:
        said = _classify(loaded, _image_rows(places), batch_size, place)
    except GloVLMError:  # perhaps an image: only then is it worth decoding each one alone
        readable = _readable(places)
        if len(readable) == len(places):
            raise
        if not readable:
            raise GloVLMError(f"None of the {len(places)} images can be read.") from None
        said = _classify(loaded, _image_rows(readable), batch_size, place)
    header = ["file_name", "predicted", *(f"p_{name}" for name in said.class_names)]
    found = zip(said.file_names, said.predicted, said.probabilities.round(6), strict=True)
    rows = [[name, label, *map(float, p)] for name, label, p in found]
    if output is not None:
        _write(output, _csv([header, *rows]))
    title = "Predictions" + (" (learned from drawings)" if loaded[0].config.synthetic else "")
    if as_json:
        _print_json([dict(zip(header, row, strict=True)) for row in rows])
    elif output is None:
        _print_table(title, header, [[*map(str, row)] for row in rows])
    else:
        counts = [[name, str(said.predicted.count(name))] for name in said.class_names]
        _print_table(title, ["predicted", "images"], counts)
        _note(f"the predictions are in {output}")
    if len(readable) < len(places):
        _note(f"{len(places) - len(readable)} of {len(places)} images are left out: unreadable")
        raise typer.Exit(1)


@app.command()
def study(
    config: Annotated[Path, Option(help="YAML: data, methods, backbones, shots, draws, ...")],
    output_dir: Annotated[Path, Option(help="Takes the cells and the report; resumed if there.")],
    workers: Annotated[int, Option(min=1, help="Cells at a time.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods, paired, over label draws. Exit code 1 if a cell failed."""
    from .data.terminology import read_yaml
    from .study import StudyConfig, render_report, run_study

    def tell(kind: str, what: Mapping[str, Any]) -> None:
        error = f" ({what['error']})" if what.get("error") else ""
        _note(f"{what['name']}: {what['status']}{error}")

    grid = StudyConfig.from_mapping(read_yaml(config))
    _quiet()
    report = run_study(grid, output_dir, workers=workers, on_event=tell)
    if as_json:
        _print_json(report)
    else:
        typer.echo(render_report(report))
    _note(f"the report and its cells are in {output_dir}")
    if report["failures"]:
        raise typer.Exit(1)


@app.command()
def card(run: Annotated[Path, Argument(help="A run's folder.")]) -> None:
    """Write the model card of a run again, from its results."""
    from .card import write_card

    _note(f"the card is in {write_card(run)}")


# ---------------------------------------------------------------------------- the embedded default


@app.command()
def demo(
    output_dir: Annotated[Path | None, Option(help="Empty; else glovlm-demo, replaced.")] = None,
    seed: Annotated[int, Option(min=0, help="Of drawings, split and training.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Do the whole job on drawings of glomeruli: no network, no data, under two minutes."""
    from .card import METRIC_HEADER, metric_rows
    from .demo import remove_demo, run_demo

    folder = output_dir or Path("glovlm-demo")
    if output_dir is None:
        remove_demo(folder)
    _quiet()
    with _progress() as on_event:
        found = run_demo(folder, seed=seed, on_event=on_event)
    if as_json:
        _print_json(found)
        return
    for method, results in found["runs"].items():
        title = f"{method} on {results['n']} drawings of {results['n_groups']} synthetic patients"
        _print_table(title, METRIC_HEADER, metric_rows(results["metrics"]))
    _note(f"saved, reloaded: logits of drawings differ by {found['reload_difference']:.1e} at most")
    _note(f"models, results, cards and {Path(found['figure']).name} are in {folder}")


@app.command()
def pretrain(
    output_dir: Annotated[str, Option(help="Takes weights, tokenizer and card.")],
    seed: Annotated[int, Option(help="Of drawings, initialisation and order.")] = 0,
    patients: Annotated[int, Option(min=1, help="Synthetic patients.")] = 800,
    per_patient: Annotated[int, Option(min=1, help="Drawings of each.")] = 10,
    epochs: Annotated[int, Option(min=1, help="Passes over the drawings.")] = 8,
    batch_size: Annotated[int, Option(min=2, help="Drawings a step.")] = 64,
    workers: Annotated[int, Option(min=1, help="Processes that draw.")] = 2,
    resume: Annotated[bool, Option(help="Go on from the checkpoint there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train the embedded default `mini` again: a small CLIP, on drawings only."""
    from .pretraining import PretrainConfig
    from .pretraining import pretrain as train_mini

    _quiet()
    config = PretrainConfig(
        output_dir, seed, patients, per_patient, epochs, batch_size, workers=workers, resume=resume
    )
    with _progress() as on_event:
        facts = train_mini(
            config,
            on_epoch=partial(on_event, "epoch"),
            on_stage=lambda name: on_event("stage", {"name": name}),
        )
    if as_json and _is_main():
        _print_json(facts)
    _note(f"the model, trained on drawings only, is in {output_dir}")


# ------------------------------------------------------------------------------------- the tables


@app.command()
def methods(as_json: JsonFlag = False) -> None:
    """List the adaptation methods."""
    from .adapters import METHODS

    rows = [method.describe() for method in METHODS.values()]
    _print_rows("Methods", rows, ("name", "family", "trains", "citation"), as_json)


@app.command()
def backbones(as_json: JsonFlag = False) -> None:
    """List the known backbones; any other CLIP, SigLIP or pair of towers serves as well."""
    from .backbones import BACKBONES

    rows = [asdict(row) for row in BACKBONES.values()]
    shown = ("name", "hub_id", "kind", "image_size", "pretrained_on", "license", "gated")
    _print_rows("Backbones", rows, shown, as_json)


@app.command()
def datasets(as_json: JsonFlag = False) -> None:
    """List the public data sets whose classes, prompts and rules are known."""
    from .data import catalog_entries

    rows = [asdict(entry) for entry in catalog_entries()]
    for row in rows:
        row["labels"] = len(row["classes"])
    _print_rows("Data sets", rows, ("name", "title", "kind", "labels", "licence"), as_json)


@data_app.command("check")
def check(
    data: Annotated[str, Argument(help="Folder of images, parquet file, or Hub id.")],
    as_json: JsonFlag = False,
) -> None:
    """Read every image, count classes and groups, look for leaks. Exit code 1 if there are any."""
    from .data import check_dataset, load_dataset

    report = check_dataset(load_dataset(data))
    if as_json:
        _print_json(report.to_dict())
    else:
        groups = {split: str(report.groups.get(split, "")) for split in report.counts}
        rows = [[x, *map(str, of.values()), groups[x]] for x, of in report.counts.items()]
        header = ["split", *report.classes, "groups"]
        _print_table(f"Images{_drawings(data)}", header, rows)
        for sentence in [*report.notes, *(f"problem: {problem}" for problem in report.problems)]:
            _note(sentence)
    if report.problems:
        raise typer.Exit(1)
    _note("no problem was found")


@cache_app.callback(invoke_without_command=True)
def cache_main(context: typer.Context) -> None:
    """Stored features of images; they come from patients' images."""
    if context.invoked_subcommand is None:
        cache_list()


@cache_app.command("list")
def cache_list(as_json: JsonFlag = False) -> None:
    """List the encoders whose features are stored."""
    from .inference import FeatureCache

    cache = FeatureCache()
    rows = [asdict(entry) for entry in cache.entries()]
    for row in rows:
        row["megabytes"] = f"{row['size'] / 1e6:.1f}"
    _print_rows(
        f"Features in {cache.folder}", rows, ("key", "name", "images", "megabytes"), as_json
    )


@cache_app.command("clear")
def cache_clear(
    key: Annotated[Text, Argument(help="Of one encoder, or its beginning; else all.")] = None,
) -> None:
    """Remove stored features."""
    from .inference import FeatureCache

    cache = FeatureCache()
    _note(f"{cache.clear(key) / 1e6:.1f} MB were freed in {cache.folder}")


@app.command()
def bench(
    names: Annotated[Texts, Argument(help="metrics, cache, encode; else all.")] = None,
    backbone: Annotated[str, Option(help="Encodes the drawings.")] = "mini",
    as_json: JsonFlag = False,
) -> None:
    """Time the bootstrap, the feature cache and the encoding, as ratios on this machine."""
    from .bench import run_benches

    _quiet()
    rows = run_benches(names or (), backbone=backbone)
    _print_rows("Benches", rows, ("name", "value", "unit", "ratio", "what"), as_json)


@app.command()
def env(as_json: JsonFlag = False) -> None:
    """Say what a bug report needs: versions, devices, the cache."""
    from importlib.metadata import distributions

    import torch

    from . import __version__
    from .inference import FeatureCache, resolve_device
    from .runs import describe_environment

    facts = describe_environment(resolve_device("auto"))
    installed = {package.name: package.version for package in distributions()}
    cache = FeatureCache()
    facts |= {name: installed.get(name) for name in ("evaluate", "gradio", "open_clip_torch")}
    facts |= {
        "hf_glovlm": __version__,
        "commit": _commit(),
        "devices": ["cpu", *map(torch.cuda.get_device_name, range(torch.cuda.device_count()))],
        "cpus": os.cpu_count(),
        "cache": str(cache.folder),
        "cache_megabytes": round(sum(entry.size for entry in cache.entries()) / 1e6, 1),
    }
    del facts["num_processes"]
    if as_json:
        _print_json(facts)
    else:
        _print_table("Environment", ["", ""], [[name, _cell(v)] for name, v in facts.items()])


def _commit() -> str | None:
    """The commit of a clone; an installed package has none."""
    import subprocess

    clone = Path(__file__).resolve().parent.parent
    if not (clone / ".git").exists():
        return None
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


# --------------------------------------------------------------------------------- what comes in


def _read_settings(
    config: Path | None, given: Mapping[str, Any], settings: Sequence[str]
) -> dict[str, Any]:
    """The YAML file, the flags over it, and the method's settings."""
    from .data.terminology import read_yaml

    values = {**(read_yaml(config) if config else {}), **given}
    if isinstance(values.get("shots"), str):
        values["shots"] = _shots(values["shots"])
    own = values.get("method_config") or {}
    if isinstance(own, Mapping):  # if not, its type is refused below
        own = {**own, **dict(map(_setting, settings))}
        values["method_config"] = {key: _number(value) for key, value in own.items()}
    return values


def _setting(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`, the value as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise GloVLMError(f"Expected --set KEY=VALUE, found '{text}'.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise GloVLMError(f"The value of --set {text} is no YAML: put quotes around it.") from None


def _shots(text: str) -> int | dict[str, int]:
    """Read `8`, or `viable=8,sclerosed=4`."""
    if re.fullmatch(r"-?\d+", text.strip()):
        return int(text)
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not name.strip() or not re.fullmatch(r"\d+", number.strip()) or name.strip() in found:
            raise GloVLMError(
                f"Expected --shots N or --shots CLASS=N,CLASS=N with each class once, found "
                f"'{text}'."
            )
        found[name.strip()] = int(number)
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; a person means the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip()):
        return float(value)
    return value


def _typed(values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Check each value against the type of its field; unknown names are left to the config."""
    return {k: _as(k, v, hints[k]) if k in hints else v for k, v in values.items()}


def _as(name: str, value: Any, hint: Any) -> Any:
    members = (hint,) if get_origin(hint) in (None, Literal, dict) else get_args(hint)
    kinds = {get_origin(member) or member for member in members}
    value = _number(value) if float in kinds else value
    if Literal in kinds and value is False:  # YAML reads a bare `no` so
        value = "no"
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds or (Literal in kinds and isinstance(value, str)):
        numbers = value.values() if name == "shots" and isinstance(value, dict) else ()
        if all(type(number) is int for number in numbers):
            return value
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    words |= {Literal: "text", dict: "a mapping of names to numbers", NoneType: "nothing"}
    expected = " or ".join(words[kind] for kind in words if kind in kinds)
    raise GloVLMError(f"Setting '{name}' must be {expected}; found {value!r}.")


def _choose_split(dataset: "DatasetDict", split: str | None) -> "Dataset":
    if "all" in dataset:
        if split not in (None, "all"):
            raise GloVLMError(f"These data are not split, so there is no split '{split}'.")
        return dataset["all"]
    from .data import all_rows

    if split == "all":
        return all_rows(dataset).remove_columns("split")
    if (split or "test") not in dataset:
        known = ", ".join([*dataset, "all"])
        raise GloVLMError(f"These data have no split '{split or 'test'}': give --split {known}.")
    return dataset[split or "test"]


def _load_model(name: str) -> tuple[Any, Any, dict[str, Any] | None]:
    """A saved classifier, its processor, and the results of its run where they lie beside it."""
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig

    from .model import GloVLMForImageClassification, GloVLMProcessor

    folder, run = Path(name).expanduser(), None
    if folder.is_dir():
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        if not (folder / "config.json").is_file():
            raise GloVLMError(
                f"{name} holds no model: expected the --output-dir of `glovlm train`."
            )
        results = (folder.parent if folder.name == "model" else folder) / "results.json"
        if results.is_file():
            run = json.loads(results.read_text(encoding="utf-8"))
    elif folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        found = "a file" if folder.exists() else "nothing"
        raise GloVLMError(
            f"Expected a run's folder, its model folder or a Hub id (owner/name), found {found} at "
            f"{name}."
        )
    source = str(folder) if folder.is_dir() else name
    try:
        about, _ = PreTrainedConfig.get_config_dict(source)
        if about.get("architectures") != ["GloVLMForImageClassification"]:
            kind = ", ".join(about.get("architectures") or []) or "no known kind"
            raise GloVLMError(
                f"{name} is no classifier of ours, but of {kind}: give what `glovlm train` wrote. "
                "A backbone goes into `glovlm train --backbone`."
            )
        classifier = GloVLMForImageClassification.from_pretrained(source).float().eval()
        return classifier, GloVLMProcessor.from_pretrained(source), run
    except GloVLMError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise GloVLMError(f"The model {name} cannot be loaded: {first}") from error


def _classify(
    loaded: tuple[Any, Any], rows: "Dataset", batch_size: int, device: Any, groups: Any = None
) -> "Predictions":
    from .inference import FeatureCache, predict

    bar, cache = sys.stderr.isatty(), FeatureCache()
    options = {"batch_size": batch_size, "device": device, "groups": groups}
    return predict(*loaded, rows, cache=cache, progress=bar, **options)


def _count_seen(run: Mapping[str, Any] | None, rows: "Dataset", groups: "Groups") -> int:
    """How many groups of the rows a model has learned from, as far as its run's results tell."""
    from .data import group_rows

    learned = (run or {}).get("data", {})
    column, hashes = learned.get("group_column"), set(learned.get("support_groups_sha256", ()))
    if not hashes or column not in (groups.column, "near_duplicate", *rows.column_names):
        _note("whether the model learned from some of these groups cannot be known")
        return 0
    ids = groups.ids if column == groups.column else group_rows(rows, group_column=column).ids
    return sum(sha256(name.encode()).hexdigest() in hashes for name in set(ids))


def _list_images(places: Sequence[Path]) -> dict[str, Path]:
    """Images by name: relative to the folder if one is given, else as given."""
    from .data.folder import SUFFIXES

    found: dict[str, Path] = {}
    for place in places:
        if not place.exists():
            raise GloVLMError(f"Expected an image or a folder of images, found nothing at {place}.")
        if place.is_file():
            found[place.as_posix()] = place
            continue
        inside = [
            path
            for path in sorted(place.rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(place).parts)
        ]
        if not inside:
            kinds = ", ".join(sorted(SUFFIXES))
            raise GloVLMError(f"Expected images ({kinds}) in {place}, found none.")
        base = place if len(places) == 1 else Path()
        found |= {os.path.relpath(path, base).replace(os.sep, "/"): path for path in inside}
    return found


def _image_rows(found: Mapping[str, Path]) -> "Dataset":
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "file_name": Value("string")})
    columns = {"image": list(map(str, found.values())), "file_name": list(found)}
    return Dataset.from_dict(columns, features)


def _readable(found: Mapping[str, Path]) -> dict[str, Path]:
    """The images that can be decoded; the others are named."""
    from .data import open_image

    readable: dict[str, Path] = {}
    for name, path in found.items():
        try:
            open_image(path)
            readable[name] = path
        except GloVLMError as error:
            _note(str(error))
    return readable


# --------------------------------------------------------------------------------- what goes out


def _drawings(data: str) -> str:
    """What a title needs behind it, if a folder says of itself that it holds drawings."""
    return " (drawings)" if (Path(data).expanduser() / "DRAWINGS").is_file() else ""


def _check_output(path: Path | None) -> None:
    """Refuse, before any work, what is no file or a file of a run."""
    if path is None:
        return
    if path.is_dir():
        raise GloVLMError(f"Expected a file to write, found the folder {path}: name a file in it.")
    if path.name in ("results.json", "predictions.parquet") and (path.parent / "model").is_dir():
        raise GloVLMError(f"{path} belongs to a run: give another --output.")


def _write(path: Path, text: str) -> None:
    from .loop import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    import csv
    import io

    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _quiet() -> None:
    """Keep the libraries' own progress bars from covering ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def _is_main() -> bool:
    """Whether this is the process that speaks, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def _note(text: str) -> None:
    """Say something on the error stream, in one line."""
    if _is_main():
        typer.echo(" ".join(text.splitlines()), err=True)


def _fail(sentence: str) -> int:
    if _is_main():
        word = typer.style("error:", fg="red", bold=True) if sys.stderr.isatty() else "error:"
        typer.echo(f"{word} {' '.join(sentence.split())}", err=True)
    return 2


class _Notes(logging.Handler):
    """Warnings of the package, as a person reads them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        _note(f"note: {record.getMessage()}")


@contextmanager
def _progress() -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Tell what is being done: a bar on a terminal, else lines, about ten for a training."""
    if not sys.stderr.isatty() or not _is_main():

        def tell(kind: str, what: dict[str, Any]) -> None:
            due = kind != "epoch" or what["epoch"] == what["epochs"]
            if due or what["epoch"] % max(what["epochs"] // 10, 1) == 0:
                _note(_event_text(kind, what))

        yield tell
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def show(kind: str, what: dict[str, Any]) -> None:
            text = _event_text(kind, what)
            if kind == "epoch":
                count = {"completed": what["epoch"], "total": what["epochs"]}
                bar.update(bar.task_ids[-1], description=text, **count)
            elif kind == "stage":
                for task in bar.task_ids:
                    bar.remove_task(task)
                bar.add_task(text, total=None)
            else:
                bar.console.print(text, highlight=False, markup=False)

        yield show


def _event_text(kind: str, what: Mapping[str, Any]) -> str:
    if kind == "epoch":
        return f"epoch {what['epoch']}/{what['epochs']}, loss {what['loss']:.4f}"
    if kind == "episode":
        groups, counts = what["groups_per_class"], what["labels_per_class"].items()
        return "labels: " + ", ".join(
            f"{n} {name} (of {groups[name]} groups)" for name, n in counts
        )
    return f"{what['name']} ..." if kind == "stage" else f"method {what['name']}"


def _print_metrics(results: Mapping[str, Any]) -> None:
    """What a training learned from, where there was one, and how well the model did."""
    from .card import CLASS_HEADER, METRIC_HEADER, class_rows, group_unit, metric_rows

    drawings, data = "drawings, " if results["synthetic"] else "", results["data"]
    unit = group_unit(data["group_column"])
    if "support" in data:
        labels, groups = data["support"]["labels_per_class"], data["support"]["groups_per_class"]
        rows = [[name, str(n), str(groups[name])] for name, n in labels.items()]
        title = "Learned from drawings" if drawings else "Learned from"
        _print_table(title, ["class", "labels", f"contributing {unit}"], rows)
    title = f"{drawings}{results['n']} test images of {results['n_groups']} {unit}"
    _print_table(f"Metrics ({title})", METRIC_HEADER, metric_rows(results["metrics"]))
    _print_table(f"Per class ({title})", CLASS_HEADER, class_rows(results["per_class"]))
    for sentence in results["notes"]:
        _note(sentence)


def _print_rows(
    title: str, rows: Sequence[Mapping[str, Any]], shown: Sequence[str], as_json: bool
) -> None:
    if as_json:
        _print_json(rows)
    else:
        cells = [[_cell(row[name]) for name in shown] for row in rows]
        _print_table(title, [name.replace("_", " ") for name in shown], cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a terminal, or aligned text that other programs can read."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*map(escape, header), title=escape(title), title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    ]
    typer.echo("\n".join([title, *lines, ""]))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
