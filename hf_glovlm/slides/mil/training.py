"""Training of slide classifiers by multiple-instance learning: one whole run on bags."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from ...data.catalog import find_grades
from ...environment import describe_environment
from ...files import digest_value, write_json, write_table, write_text
from ...methods import Recipe
from ...metrics import compute_metrics
from ...progress import counted, showing
from ...rendering import (
    CLASS_HEADER,
    METRIC_HEADER,
    SYNTHETIC,
    class_rows,
    code,
    group_unit,
    metric_rows,
    render,
)
from ...runs.folder import CODE_VERSION, RunFolder, make_accelerator
from ...training.loop import fit, seed_everything, world_size
from .aggregators import Aggregator, build_aggregator
from .classifier import SlideClassifier, SlidePrediction
from .cohort import BagSource, Cohort, Sides, read_cohort, split_cohort
from .config import MilConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

OWN_FILES = (  # in the order in which they are put in place
    "model", "attention", "predictions.parquet", "config.yaml", "log.jsonl", "README.md",
    "manifest.json", "results.json",
)  # fmt: skip
_INCIDENTAL = ("output_dir", "device")  # where and how fast, not what
LEAST_EPOCHS, LEAST_STEPS = 20, 1000  # unless the number of epochs is given
# What the card leaves out: places, which it never names, and what shaped nothing.
_UNTOLD = (
    "features",
    "labels",
    "encoder",
    "output_dir",
    "overwrite",
    "resume",
    "aggregator_config",
)


class BagStep(nn.Module):
    """Cross-entropy of an aggregator on one bag; all processes train together."""

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__()
        self.aggregator = aggregator

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        """This bag's part `[]` of the batch's mean, times the processes that average it."""
        logits = self.aggregator(inputs[0]).logits.unsqueeze(0)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return world_size() * (weight * losses).sum() / total


def train_mil(
    config: MilConfig,
    *,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a slide classifier on bags of tile features, test it on other patients, save the run.

    Under `accelerate launch` the processes train together, each on its share of a batch. Nothing is
    ever chosen on the test side.

    Args:
        config: What to do.
        on_event: Called with the progress: `("stage", {"name"})`, `("epoch", row)`.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        The content of `results.json`; every process returns it, only the main one writes.

    Raises:
        GloVLMError: The input is bad; nothing has been written then.
    """
    accelerator = make_accelerator(config.mixed_precision, cpu=config.device == "cpu")
    output = Path(config.output_dir).expanduser()
    folder = RunFolder(output, config, "mil", OWN_FILES, _INCIDENTAL, accelerator)
    folder.check()
    with showing(progress) as show:
        results = _train_mil(config, folder, accelerator, on_event or show)
    accelerator.wait_for_everyone()
    return results


def _train_mil(
    config: MilConfig,
    folder: RunFolder,
    accelerator: "Accelerator",
    notify: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    """Make one run in its folder, and return its results."""
    clock = [time.perf_counter()]
    notify("stage", {"name": "reading the bags"})
    cohort = read_cohort(config)
    parts = split_cohort(cohort, config)
    made_from = _describe_inputs(cohort, parts) | {"settings": folder.settings()}
    finished = folder.finished(made_from)
    if finished is not None:
        return finished
    clock.append(time.perf_counter())
    with folder.unfinished(made_from) as work:
        predictions: dict[int, tuple[int, SlidePrediction]] = {}
        logs: list[list[dict[str, Any]]] = []
        for k, sides in counted([*enumerate(parts)], "trainings"):
            part = f" ({k + 1} of {len(parts)})" if len(parts) > 1 else ""
            notify("stage", {"name": f"training {config.aggregator}{part}"})
            place = work / "training" / str(k)
            made = made_from | {"training": k}
            classifier, log = _train(cohort, sides, config, accelerator, k, place, made, notify)
            logs.append(log)
            predictions |= {i: (k, classifier.predict(cohort.bags[i])) for i in sides.test}
        clock.append(time.perf_counter())
        notify("stage", {"name": "measuring"})
        tested = sorted(predictions)
        measured = compute_metrics(
            [cohort.labels[i] for i in tested],
            np.array([list(predictions[i][1].probabilities.values()) for i in tested]),
            groups=[cohort.groups[i] for i in tested],
            class_names=cohort.classes,
            grades=find_grades(cohort.classes),
            n_resamples=config.n_resamples,
            seed=config.seed,
        )
        clock.append(time.perf_counter())
        laps = zip(("data", "train", "metrics"), np.diff(clock).round(3).tolist(), strict=True)
        results = {
            "kind": folder.kind,
            "config": config.to_repeat(),
            "data": _describe_data(cohort, parts, config),
            **measured,
            "aggregator": classifier.aggregator.describe()
            | {"settings": asdict(classifier.aggregator.config)},
            "training": _describe_training(classifier, logs),
            "notes": _notes(cohort, config, measured),
            "synthetic": cohort.synthetic,
            "timing": {**dict(laps), "total": round(clock[-1] - clock[0], 3)},
            "environment": describe_environment(accelerator.device, accelerator.num_processes),
        }
        if accelerator.is_main_process:
            classifier.save(work / "model")
            _write_slides(work, cohort, predictions, results)
            rows = [{"training": k} | row for k, log in enumerate(logs) for row in log]
            write_text(work / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(work / "README.md", render_card(results))
            write_json(work / "results.json", results)
            folder.put_in_place(made_from)
    return results


def _describe_inputs(cohort: Cohort, parts: list[Sides]) -> dict[str, Any]:
    """What a run is made from beside its settings."""
    labels = [cohort.classes[k] for k in cohort.labels]
    return {
        "code": CODE_VERSION,
        "features": cohort.fingerprint,  # with labels and groups
        "labels": digest_value(sorted(zip(cohort.names, labels, strict=True))),
        "groups": digest_value(sorted(zip(cohort.names, cohort.groups, strict=True))),
        "classes": digest_value(cohort.classes),
        "split": cohort.hash_split(parts),
    }


def _train(
    cohort: Cohort,
    sides: Sides,
    config: MilConfig,
    accelerator: "Accelerator",
    k: int,
    place: Path,
    made_from: dict[str, Any],
    notify: Callable[[str, dict[str, Any]], None],
) -> tuple[SlideClassifier, list[dict[str, Any]]]:
    """Train on one side; returns the classifier of the last epoch, or of the best, and the log."""
    seed_everything(config.seed, k)
    aggregator = build_aggregator(
        config.aggregator, cohort.dim, len(cohort.classes), config.aggregator_config
    )
    aggregator.standardise(*cohort.describe_tiles(sides.train))
    classifier = SlideClassifier(aggregator, cohort.classes, cohort.encoder)
    step = BagStep(aggregator).to(accelerator.device)

    def validate() -> float:
        step.eval()
        predictions = [classifier.predict(cohort.bags[i]) for i in sides.validation]
        measured = compute_metrics(
            [cohort.labels[i] for i in sides.validation],
            np.array([list(s.probabilities.values()) for s in predictions]),
            n_resamples=0,
        )
        return float(measured["metrics"]["macro_auc"]["value"])

    log = fit(
        step,
        [{"params": list(step.parameters())}],
        BagSource(cohort.bags, sides.train, cohort.labels, config.max_tiles),
        _recipe(config, len(sides.train)),
        accelerator=accelerator,
        seed=config.seed,
        # A part of a batch is then one bag a process, so that none is padded.
        accumulate=math.ceil(config.batch_size / accelerator.num_processes),
        clip_norm=config.clip_norm,
        validate=validate if sides.validation else None,
        output_dir=place,
        resume=config.resume,
        made_from=made_from,
        on_epoch=lambda row: notify("epoch", row | {"training": k}),
    )
    return classifier, log


def _recipe(config: MilConfig, slides: int) -> Recipe:
    """Training recipe for a number of slides."""
    epochs = config.epochs
    if epochs is None:
        epochs = max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(slides / config.batch_size)))
    return Recipe(
        lr=config.lr,
        epochs=epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        schedule="cosine",
        by_step=True,
        patience=epochs,
        min_delta=0.0,
        sampling="class_balanced" if config.balance else "shuffled",
    )


# ------------------------------------------------------------------------------- what is written


def _describe_data(cohort: Cohort, parts: list[Sides], config: MilConfig) -> dict[str, Any]:
    def count(index: list[int]) -> dict[str, Any]:
        held = Counter(cohort.labels[i] for i in index)
        return {
            "slides": {name: held[k] for k, name in enumerate(cohort.classes)},
            "groups": len({cohort.groups[i] for i in index}),
            "tiles": sum(cohort.tiles[i] for i in index),
        }

    everyone = list(range(len(cohort.names)))
    return {
        "name": Path(config.features).name,
        "fingerprint": cohort.fingerprint,
        "classes": cohort.classes,
        "counts": count(everyone),
        "sides": [{side: count(index) for side, index in asdict(p).items()} for p in parts],
        "group_column": cohort.group_column,
        "patients": len(set(cohort.groups)) if cohort.group_column != "slide_id" else None,
        "split_hash": cohort.hash_split(parts),
        "features": {"dim": cohort.dim, **cohort.encoder},
        "median_tiles": float(np.median(cohort.tiles)),
    }


def _describe_training(
    classifier: SlideClassifier, logs: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    def chosen(log: list[dict[str, Any]]) -> dict[str, Any]:
        if "validation_macro_auc" not in log[-1]:
            return log[-1]
        return max(log, key=lambda row: row["validation_macro_auc"])  # the first of the best

    return {
        "trainable_parameters": sum(p.numel() for p in classifier.aggregator.parameters()),
        "trainings": [
            {"epochs_run": len(log), "chosen_epoch": chosen(log)["epoch"]}
            | {key: chosen(log)[key] for key in ("loss", "validation_macro_auc") if key in log[-1]}
            for log in logs
        ],
    }


def _notes(cohort: Cohort, config: MilConfig, measured: dict[str, Any]) -> list[str]:
    unit = group_unit(cohort.group_column)
    notes = [f"Split by {unit[:-1]}; intervals are over {unit}.", *cohort.notes]
    if config.folds is not None:
        notes.append(
            f"Measured over {config.folds} folds together: every slide by a model trained without "
            "its fold; the model that is kept was trained on all slides and is itself not measured."
        )
    if not config.validation_fraction and not (cohort.splits and "validation" in cohort.splits):
        notes.append("The last epoch was kept; nothing was chosen on further labels.")
    absent = [name for name, row in measured["per_class"].items() if not row["n"]]
    if absent:
        notes.append(f"No slide of {', '.join(absent)} was tested.")
    return notes


def _write_slides(
    work: Path,
    cohort: Cohort,
    predictions: dict[int, tuple[int, SlidePrediction]],
    results: dict[str, Any],
) -> None:
    """`predictions.parquet`, a row a tested slide, and each one's tiles in `attention/`."""
    split = results["data"]["split_hash"]
    rows: list[dict[str, Any]] = []
    for i in sorted(predictions):
        k, prediction = predictions[i]
        rows.append(
            {
                "slide": cohort.names[i],
                "patient": cohort.groups[i] if cohort.group_column != "slide_id" else None,
                "label": cohort.classes[cohort.labels[i]],
                "predicted": prediction.label,
                **{f"p_{name}": p for name, p in prediction.probabilities.items()},
                **{
                    f"logit_{c}": float(x)
                    for c, x in zip(cohort.classes, prediction.logits, strict=True)
                },
                "tiles": cohort.tiles[i],
                "training": k,
                "split_hash": split,
            }
        )
        bag = cohort.bags[i]
        columns: dict[str, Any] = {"x": bag.coords[:, 0], "y": bag.coords[:, 1]}
        if prediction.attention is not None:
            columns["attention"] = prediction.attention
        columns |= {
            f"score_{c}": prediction.tile_scores[:, j] for j, c in enumerate(cohort.classes)
        }
        write_table(work / "attention" / f"{cohort.names[i]}.parquet", columns)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["patient"] = pa.array(columns["patient"], pa.string())  # maybe nothing but None
    write_table(work / "predictions.parquet", columns)


def render_card(results: dict[str, Any]) -> str:
    """Card of a run, from its results: no slide, patient or path is named.

    Args:
        results: The content of `results.json`.
    """
    settings = {**results["config"], **results["aggregator"]["settings"]}
    values = {
        **results,
        "mark": SYNTHETIC if results["synthetic"] else "",
        "unit": group_unit(results["data"]["group_column"]),
        "METRIC_HEADER": METRIC_HEADER,
        "metrics": metric_rows(results["metrics"]),
        "class_header": ["slides" if cell == "images" else cell for cell in CLASS_HEADER],
        "per_class": class_rows(results["per_class"]),
        "settings": [
            [name, code(value)]
            for name, value in settings.items()
            if name not in _UNTOLD and value is not None
        ],
    }
    return render("slide_classifier_card.md.j2", values)
