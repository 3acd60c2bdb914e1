"""Adaptation runs: from a folder of images to a measured, saved model."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..backbones import known_rows, pretraining_notes
from ..calibration import (
    Calibration,
    ConformalThresholds,
    calibrate,
    check_items,
    conformal_sets,
    declared_prior,
    estimate_prior,
    measure_abstention,
    measure_sets,
    prior_shift,
)
from ..calibration.inputs import softmax
from ..curves import choose_thresholds
from ..data.catalog import list_grades
from ..data.columns import LOOK, MASK
from ..data.protocols import GLO_VLMS, draw_glo_vlms, protocol_notes
from ..data.stains import STAIN, contradictions, list_stains, read_stains, state_stains
from ..environment import check_tracker, describe_environment, peak_memory
from ..files import digest_value, write_json, write_text
from ..inference import FeatureCache, Predictions, embed_images, predict, resolve_device
from ..inference.outlines import outline_notes
from ..inference.prediction import move_model
from ..inference.scale import describe_scale, known_scale, support_scale
from ..inference.stains import check_stains, unseen_stains
from ..methods import FeatureMethod, Method, get_method
from ..progress import showing
from ..publish.card import SUBGROUPS, render_card
from ..publish.identifiers import write_identifiers
from ..training import Adapted, adapt
from .config import DRAWING, MINI, TrainConfig, choose_backbone
from .controls import Draw, measure_controls, read_tables
from .evaluation import check_unlearned, measure, measure_thresholds
from .folder import RunFolder, make_accelerator
from .loading import Loader, describe_inputs, task_classes
from .provenance import (
    ADAPTED,
    Provenance,
    contamination_notes,
    describe_chain,
    former_notes,
    former_provenance,
    hash_groups,
    is_adapted,
)
from .results import RunResult

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from ..data import ClassInfo, Episode, Groups
    from ..data.check import DataReport
    from ..data.folder import Reading

OWN_FILES = (  # in the order in which they are put in place
    "model", "adapter", "predictions.parquet", "config.yaml", "episodes.json", "identifiers.json",
    "log.jsonl", "README.md", "manifest.json", "results.json",
)  # fmt: skip
REPORT = "report.html"  # written afterwards, from the files of the run alone
SYNTHETIC_BACKBONE = (
    "The backbone, mini, has seen synthetic images only, and these are photographs: the numbers "
    "test the software and say nothing about tissue. Name another backbone to learn something."
)
_INCIDENTAL = ("output_dir", "device", "cache", "tracker")  # where and how fast, not what


def run(
    config: TrainConfig,
    *,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    loader: Loader | None = None,
    progress: bool | None = None,
) -> RunResult:
    """Run one adaptation: load, split, draw, adapt, predict, measure, save.

    Args:
        config: What to do.
        on_event: Called with `("stage", {"name"})`, `("episode", summary)`, `("epoch", row)`.
        loader: Where data and backbone come from; a study passes one that keeps them.
        progress: Whether to show how far it is; by default in a notebook.

    Returns:
        The results. Under `accelerate launch` every process returns them; only the main one writes.

    Raises:
        GloVLMError: The input is bad; nothing has been written then.
    """
    from ..data.folder import is_synthetic

    check_tracker(config.tracker)
    if config.backbone is None and is_synthetic(config.data):
        config = replace(config, backbone=MINI)
    loader = loader or Loader()
    processes = _Processes(config, get_method(config.method), loader)
    output = Path(config.output_dir).expanduser()
    accelerator = processes.accelerator
    names = (REPORT, *OWN_FILES)  # that of a former run goes with it
    folder = RunFolder(output, config, "adaptation", names, _INCIDENTAL, accelerator)
    folder.check()
    with showing(progress) as show:
        results = _run(config, loader, folder, processes, on_event or show)
    processes.wait()
    return RunResult(results, output)


def _run(
    config: TrainConfig,
    loader: Loader,
    folder: RunFolder,
    processes: "_Processes",
    report: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    """Run one adaptation into a folder, and return its results."""
    clock = _Clock()
    report("stage", {"name": "checking the data"})
    task = read_task(config, loader)
    backbone = choose_backbone(config.backbone, config.data)
    report("episode", task.summary)
    clock.lap("data")

    report("stage", {"name": f"loading the backbone: {backbone}"})
    model, processor = loader.backbone(backbone, task.method)
    if task.former is None and is_adapted(model.config):
        task = replace(task, former=ADAPTED)
    inputs = describe_inputs(config, task.report.digests, task.classes, loader)
    made_from = {**inputs, "split": _digest_split(task), "settings": folder.settings()}
    finished = folder.finished(made_from)
    if finished is not None:
        return finished
    move_model(model, processes.device)
    clock.lap("load")

    with folder.unfinished(made_from) as work:
        controls = {}
        if config.controls:  # by the backbone as it came
            report("stage", {"name": "measuring the negative controls"})
            controls = {"controls": _measure_controls(model, processor, task, processes)}
            clock.lap("controls")
        report("stage", {"name": f"adapting: {config.method}"})
        processes.start_trackers()
        on_epoch = partial(report, "epoch")
        adapted = _adapt(model, processor, task, processes, work, made_from, on_epoch)
        clock.lap("adapt")

        report("stage", {"name": "predicting the test images"})
        calibrated, held = _calibrate(adapted, task, processes)
        thresholds = _choose_thresholds(adapted, task, processes, held)
        test, groups = task.side("test")
        predictions = processes.predict(adapted, test, groups)
        further = _further_results(adapted, predictions, test, processes.cache_for(adapted), config)
        clock.lap("predict")

        report("stage", {"name": "measuring"})
        measured = measure(
            predictions,
            learned=task.learned(),
            images=task.images("test"),
            curves=config.save_model,  # thousands of a study's cells are read again at once
            grades=list_grades(task.classes),
            n_resamples=config.n_resamples,
            seed=config.seed,
        )
        clock.lap("metrics")

        facts = calibrated and {"temperature": calibrated.temperature, **calibrated.facts}
        results = {
            "kind": folder.kind,
            "config": config.to_repeat(),
            "data": _describe_data(task)
            | {"mpp": describe_scale(adapted.model.config.mpp)}
            | {"trained_stains": adapted.model.config.stains},
            **measured,
            **_describe_adapted(adapted, task),
            **further,
            **_subgroups(predictions, test, task),
            "operating_points": measure_thresholds(
                predictions, **thresholds, n_resamples=config.n_resamples, seed=config.seed
            ),
            **({"calibration": facts} if facts else {}),
            **controls,
            "notes": _notes(adapted, task, calibrated),
            "synthetic": adapted.model.config.synthetic,
            "timing": clock.report(),
            "environment": describe_environment(processes.device, processes.count),
        }
        processes.log(results)
        if processes.main:
            _write_run(work, adapted, predictions, results, task)
            folder.put_in_place(made_from)
    return results


@dataclass(frozen=True)
class Task:
    """Task of a run: its data, read, checked and split.

    Attributes:
        config: What to do.
        method: How to adapt.
        report: What is known of the data.
        reading: How they were read.
        rows: All of them.
        episode: On which side each row stands.
        labels: Class number of each row.
        grouping: Patient, case or slide of each row, and what a group is.
        classes: Names and prompts, in label order.
        summary: Labels and groups per class, as events and results state them.
        shift: What a declared prevalence adds to the logits, if one is declared.
        former: Provenance of a backbone that was adapted before.
        stated: Sentences on how the stains were stated.
    """

    config: TrainConfig
    method: Method
    report: "DataReport"
    reading: "Reading"
    rows: "Dataset"
    episode: "Episode"
    labels: Sequence[int]
    grouping: "Groups"
    classes: Sequence["ClassInfo"]
    summary: dict[str, Any]
    shift: list[float] | None
    former: Provenance | None
    stated: Sequence[str] = ()
    _sides: dict[str, tuple["Dataset", list[str]]] = field(default_factory=dict, repr=False)

    @property
    def groups(self) -> list[str]:
        """Group of each row."""
        return self.grouping.ids

    def side(self, name: str) -> tuple["Dataset", list[str]]:
        """The rows on one side of the split, and the group of each."""
        if name not in self._sides:
            index = getattr(self.episode, name)
            self._sides[name] = self.rows.select(index), [self.groups[i] for i in index]
        return self._sides[name]

    def images(self, name: str) -> set[str]:
        """Hashes of the images on one side of the split."""
        hashes = self.report.looks.hashes
        return {value for i in getattr(self.episode, name) for value in hashes[i]}

    def learned(self, *, calibrated: bool = True) -> set[str]:
        """Hashes of the groups and images that the model learned from, in former runs too.

        Args:
            calibrated: Also those of its calibration.
        """
        sides = ["support", "validation", *(["calibration"] if calibrated else [])]
        rows = [i for side in sides for i in getattr(self.episode, side)]
        before = (self.former and self.former.images) or ()
        return hash_groups(self.groups[i] for i in rows).union(before, *map(self.images, sides))

    def provenance(self) -> Provenance:
        """What the model learned from, in this run and in former ones."""
        sides = (self.episode.support, self.episode.validation, self.episode.calibration)
        rows = [row for side in sides for row in side]
        hashes = self.report.looks.hashes
        own = Provenance.of_rows(self.rows, self.grouping, hashes, rows, len(rows))
        return own if self.former is None else own.after(self.former)


def read_task(config: TrainConfig, loader: Loader) -> Task:
    """Read and split the data, and refuse what cannot be done before a backbone is loaded."""
    from ..data.folder import column

    rows, reading, report = loader.data(config)
    rows, stated = state_stains(rows, config.stain)
    if config.centre == "stain":
        check_stains(read_stains(rows), contradictions(rows))
    former = former_provenance(config.backbone or MINI)
    episode, groups = _choose_episode(config, rows, former, report)
    names: list[str] = rows.features["label"].names
    classes = task_classes(config, names)
    labels = column(rows, "label")
    summary = episode.summary(labels, groups.ids, names)
    if former is not None:
        summary["former_labels"] = former.labels
        summary["label_budget"] += former.labels
    shift = None
    if config.prior is not None and not isinstance(config.prior, str):
        shift = prior_shift(declared_prior(config.prior, names)).tolist()
    task = Task(
        config=config,
        method=get_method(config.method),
        report=report,
        reading=reading,
        rows=rows,
        episode=episode,
        labels=labels,
        grouping=groups,
        classes=classes,
        summary=summary,
        shift=shift,
        former=former,
        stated=stated,
    )
    if episode.calibration and config.conformal:
        held = [labels[i] for i in episode.calibration]
        options: dict[str, Any] = {"alpha": config.alpha, "per_class": config.per_class}
        check_items(held, names, method=config.conformal, **options)
    return task


def _adapt(
    model: Any,
    processor: Any,
    task: Task,
    processes: "_Processes",
    work: Path,
    made_from: Mapping[str, Any],
    on_epoch: Callable[[dict[str, Any]], None],
) -> Adapted:
    """Adapt to the task and keep the scale of its images and whether they are synthetic."""
    from ..data.folder import is_synthetic

    config = task.config
    support, groups = task.side("support")
    adapted = adapt(
        model,
        task.method.name,
        support,
        processor=processor,
        classes=task.classes,
        config=config.adaptation(work),
        validation=task.side("validation")[0] if task.episode.validation else None,
        query=_unlabelled(task.side("test")[0]) if task.method.transductive else None,
        unlabelled=_unlabelled(task.rows) if config.centre == "stain" else None,
        groups=groups,
        accelerator=processes.accelerator,
        cache=processes.cache,
        on_epoch=on_epoch,
        made_from=made_from,
    )
    about = adapted.model.config
    about.mpp = known_scale(adapted.processor.image_processor, support)
    about.image_scale = support_scale(support)
    about.synthetic = bool(about.synthetic or is_synthetic(config.data))
    return adapted


def _measure_controls(
    model: Any, processor: Any, task: Task, processes: "_Processes"
) -> dict[str, dict[str, Any]]:
    """Negative controls on the split and the labels of the task."""
    embed = partial(embed_images, model, processor, device=processes.device, cache=processes.cache)
    draw = Draw(task.episode.support, task.episode.test, task.config.seed)
    looks = task.report.looks
    tables = read_tables(task.rows, [*draw.support, *draw.test], embed, looks)
    return measure_controls(
        tables,
        [draw],
        task.labels,
        task.groups,
        len(task.classes),
        n_resamples=task.config.n_resamples,
        seed=task.config.seed,
    )


def _unlabelled(rows: "Dataset") -> "Dataset":
    """Images, their outlines and stains alone, and what was seen of their files."""
    kept = ("image", MASK, LOOK, STAIN)
    return rows.select_columns([name for name in kept if name in rows.column_names])


def _describe_adapted(adapted: Adapted, task: Task) -> dict[str, Any]:
    """Method, backbone and training, as the results state them."""
    model = adapted.model.config
    chain = task.former.chain if task.former is not None else ()
    return {
        "method": task.method.describe() | {"settings": asdict(adapted.settings)},
        "backbone": {
            "name": describe_chain(model.backbone_name, chain),
            "base": model.backbone_name,
            "adapted": [dict(link) for link in chain],
            "revision": model.backbone_revision,
            "license": model.backbone_license,
            "restrictions": model.backbone_restrictions,
        },
        "training": {
            "trainable_parameters": adapted.trainable_parameters,
            "recipe": asdict(adapted.recipe) if adapted.recipe else None,
            "epochs_run": len(adapted.log),
            "final_loss": adapted.log[-1]["loss"] if adapted.log else None,
            "loss": task.config.loss,
            "outline": model.outline,
            "outline_of": model.outline_of,
            "facts": adapted.facts,
        },
    }


def _write_run(
    work: Path, adapted: Adapted, predictions: Predictions, results: dict[str, Any], task: Task
) -> None:
    """Write model, if it is to be kept, predictions, card, results and the split."""
    from ..data import save_episodes

    if task.config.save_model:
        adapted.save(work / "model")
    else:
        shutil.rmtree(work / "adapter", ignore_errors=True)
    predictions.save(work / "predictions.parquet")
    write_identifiers(work, task.rows)
    write_text(work / "README.md", render_card(results))
    write_json(work / "results.json", results)
    named = results["data"]["name"]
    save_episodes(work / "episodes.json", [task.episode], task.rows, named, groups=task.grouping)


def _subgroups(predictions: Predictions, test: "Dataset", task: Task) -> dict[str, dict[str, Any]]:
    """The metrics within each stain and each scanner, where the data name more than one."""
    from ..data.folder import column
    from ..metrics import compute_subgroups

    assert predictions.labels is not None  # rows of a labelled set
    columns = {name: column(test, name) for name in SUBGROUPS if name in test.column_names}
    subgroups = compute_subgroups(
        predictions.labels,
        predictions.probabilities,
        columns,
        groups=predictions.groups,
        class_names=predictions.class_names,
        grades=list_grades(task.classes),
        n_resamples=task.config.n_resamples,
        seed=task.config.seed,
    )
    return {"subgroups": subgroups} if subgroups else {}


def _calibrate(
    adapted: Adapted, task: Task, processes: "_Processes"
) -> tuple[Calibration | None, Predictions | None]:
    """Fit temperature, sets and abstention on groups that the method never saw, if there are any.

    The model keeps these, and what a declared prevalence adds.

    Returns:
        The calibration, and the predictions that it was fitted on, as it then corrects them.
    """
    config, model, calibration, predictions = task.config, adapted.model.config, None, None
    if task.episode.calibration:
        rows, groups = task.side("calibration")
        check_unlearned(task.learned(calibrated=False), groups, task.images("calibration"))
        predictions = processes.predict(adapted, rows, groups)
        assert predictions.labels is not None  # rows of a labelled set
        calibration = calibrate(
            predictions.logits,
            predictions.labels,
            groups,
            predictions.class_names,
            temperature=config.temperature,
            conformal=config.conformal,
            alpha=config.alpha,
            per_class=config.per_class,
            max_risk=config.max_risk,
            shift=task.shift,
        )
        model.temperature = calibration.temperature
        model.calibration = calibration.to_dict()
        shift = 0.0 if task.shift is None else np.asarray(task.shift)
        corrected = predictions.logits / calibration.temperature + shift
        _replace_logits(predictions, corrected.astype(np.float32))
    if task.shift is not None:
        model.prior_shift = task.shift
    return calibration, predictions


def _choose_thresholds(
    adapted: Adapted, task: Task, processes: "_Processes", held: Predictions | None
) -> dict[str, Any]:
    """Choose a threshold a class on the calibration or the validation groups, never on the test.

    Args:
        adapted: The model as it predicts the test images.
        task: What to do.
        processes: They predict.
        held: Predictions of the calibration images.
    """
    none: dict[str, Any] = {"thresholds": None, "chosen_on": None}
    if adapted.query_logits is not None or task.config.prior == "em":
        why = "No threshold was chosen: the predictions depend on all test images together."
        return none | {"why_not": why}
    side = "calibration"
    if held is None and task.episode.validation:
        side = "validation"
        held = processes.predict(adapted, *task.side(side))
    if held is None:
        why = (
            "No threshold was chosen: there are no calibration or validation groups, and the test "
            "images must not choose it. Give --calibration-groups or --validation-shots."
        )
        return none | {"why_not": why}
    assert held.labels is not None  # rows of a labelled set
    assert held.groups is not None  # `predict` was given them
    thresholds = choose_thresholds(held.labels, held.probabilities, held.class_names)
    where = f"{len(held.labels)} {side} images of {len({*held.groups})} groups"
    return {"thresholds": thresholds, "chosen_on": where, "why_not": ""}


def _further_results(
    adapted: Adapted,
    predictions: Predictions,
    test: "Dataset",
    cache: FeatureCache | None,
    config: TrainConfig,
) -> dict[str, Any]:
    """Results beside the metrics: spread over prompts, prediction sets, the saved model alone.

    Where a method or a prior looked at the unlabelled test images, the predictions are replaced by
    what it says about these.
    """
    further: dict[str, Any] = {}
    if adapted.query_logits is not None:
        further["transductive"] = _take_query_answers(adapted, predictions, adapted.query_logits)
    if adapted.variants:
        further["prompt_sets"] = _spread_over_prompts(adapted, predictions, test, cache)
    if config.prior is not None:
        further["prior_correction"] = _correct_prior(adapted, predictions, config.prior)
    return further | _measure_answers(predictions, adapted.model.config.calibration or {})


def _take_query_answers(
    adapted: Adapted, predictions: Predictions, answers: torch.Tensor
) -> dict[str, Any]:
    """Replace the predictions by a transductive method's own assignments of the test images."""
    facts = {
        "query_images": len(predictions.logits),
        "saved_model_alone": _point_values(predictions, predictions.logits),
    }
    logits = answers.float().numpy()
    shift = adapted.model.config.prior_shift  # a declared one; the saved model has it already
    _replace_logits(predictions, logits if shift is None else logits + np.float32(shift))
    predictions.similarities = None
    return facts


def _spread_over_prompts(
    adapted: Adapted, predictions: Predictions, test: "Dataset", cache: FeatureCache | None
) -> dict[str, Any]:
    """Spread of the metrics over heads from other prompts."""
    features = torch.from_numpy(
        embed_images(adapted.model.glovlm, adapted.processor, test, cache=cache)
    )
    with torch.inference_mode():
        values = [_point_values(predictions, head(features).numpy()) for head in adapted.variants]
    return {"sets": len(values)} | {
        name: {
            "median": float(np.median([v[name] for v in values])),
            "quartiles": np.quantile([v[name] for v in values], (0.25, 0.75)).tolist(),
            "range": [min(v[name] for v in values), max(v[name] for v in values)],
        }
        for name in ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1")
    }


def _correct_prior(
    adapted: Adapted, predictions: Predictions, prior: Mapping[str, float] | str
) -> dict[str, Any]:
    """Correct the predictions for a prevalence, declared or estimated, and describe it."""
    assumes = {"assumes": "a uniform prior of the model, as k shots imply"}
    if not isinstance(prior, str):  # declared: the model had it when it predicted
        return assumes | {"how": "declared", "prevalence": prior}
    n = len(predictions.logits)
    estimated = estimate_prior(predictions.probabilities)
    shift = prior_shift(estimated.prior)
    adapted.model.config.prior_shift = [float(value) for value in shift]
    _replace_logits(predictions, predictions.logits + shift.astype(np.float32))
    adapted.notes.append(
        f"The prevalence was estimated from the {n} unlabelled test images together: these "
        "results are transductive."
    )
    return assumes | {
        "how": "em",
        "transductive": True,
        "query_images": n,
        "iterations": estimated.iterations,
        "converged": estimated.converged,
        "prevalence": dict(zip(predictions.class_names, map(float, estimated.prior), strict=True)),
    }


def _point_values(predictions: Predictions, logits: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """The metrics of other logits for the images of labelled predictions, without intervals."""
    from ..metrics import compute_metrics

    assert predictions.labels is not None  # callers predict labelled rows
    probabilities = softmax(logits.astype(np.float64))
    measured = compute_metrics(predictions.labels, probabilities, n_resamples=0)
    return {name: m["value"] for name, m in measured["metrics"].items()}


def _replace_logits(predictions: Predictions, logits: NDArray[np.float32]) -> None:
    predictions.logits = logits
    predictions.probabilities = softmax(logits.astype(np.float64))


def _measure_answers(predictions: Predictions, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Coverage of prediction sets, risk of abstention, and area under the risk-coverage curve."""
    assert predictions.labels is not None  # callers predict labelled rows
    results: dict[str, Any] = {}
    abstention = calibration.get("abstention")
    threshold = abstention["threshold"] if abstention else None
    measured = measure_abstention(predictions.probabilities, predictions.labels, threshold)
    results["abstention"] = measured if abstention else {"aurc": measured["aurc"]}
    if calibration.get("conformal"):
        thresholds = ConformalThresholds.from_dict(calibration["conformal"])
        sets = conformal_sets(predictions.probabilities, thresholds)
        results["sets"] = measure_sets(
            sets, predictions.labels, predictions.class_names, predictions.groups
        )
    return results


def _choose_episode(
    config: TrainConfig,
    rows: "Dataset",
    former: Provenance | None,
    report: "DataReport",
) -> tuple["Episode", "Groups"]:
    """Draw or load the episode, with nothing measured that a former run learned from."""
    from ..data import draw_episode, group_rows, load_episode, reserve_calibration
    from ..data.splits import assert_unlearned

    def learned(groups: "Groups") -> set[str]:
        if former is None:
            return set()
        seen = former.seen(rows, groups, report.looks.hashes)
        return {group for group, one in zip(groups.ids, seen.rows, strict=True) if one}

    groups = report.grouping
    assert groups is not None  # the data have no problem, so every image was decoded
    if config.episodes is None:
        drawing = {name: getattr(config, name) for name in DRAWING}
        if config.protocol == GLO_VLMS:
            kept = ("shots", "seed", "draw", "allow_fewer", "test_fraction")
            drawing = {name: drawing[name] for name in kept}
            return draw_glo_vlms(rows, groups=groups, pooled=learned(groups), **drawing), groups
        return draw_episode(rows, groups=groups, pooled=learned(groups), **drawing), groups
    episode = load_episode(config.episodes, config.draw, rows, looks=report.looks)
    if groups.column != episode.group_column:
        groups = group_rows(rows, group_column=episode.group_column, looks=report.looks)
    pooled = learned(groups)
    if config.calibration_groups and not episode.calibration:
        episode = reserve_calibration(
            rows, episode, config.calibration_groups, config.seed, groups, pooled
        )
    sides = {name: getattr(episode, name) for name in ("validation", "calibration", "test")}
    assert_unlearned(groups.ids, pooled, **sides)
    return episode, groups


def episode_notes(episode: "Episode") -> list[str]:
    """Sentences about the split that belong beside every number."""
    notes = [f"Split by {episode.group_column}; intervals are over these groups."]
    if episode.group_column != "patient_id":
        notes.append("Patients are unknown: the same patient may stand on both sides.")
    return notes


def _notes(adapted: Adapted, task: Task, calibrated: Calibration | None) -> list[str]:
    """Every sentence that belongs beside the numbers."""
    return [
        *episode_notes(task.episode),
        *protocol_notes(task.episode),
        *(f"{note[0].upper()}{note[1:]}." for note in task.reading.notes),
        *task.stated,
        *contradictions(task.rows),
        *unseen_stains(adapted.model.config, read_stains(task.side("test")[0])),
        *adapted.notes,
        *outline_notes(adapted.model.config, task.side("test")[0]),
        *(calibrated.notes if calibrated is not None else ()),
        *former_notes(adapted.model.config.backbone_name, task.former),
        *_pretraining_notes(adapted, task.config, task.rows),
    ]


def _pretraining_notes(adapted: Adapted, config: TrainConfig, rows: "Dataset") -> list[str]:
    """Notes on the task inside or outside of the backbone's pretraining data."""
    from ..data.terminology import stain_names

    known = {*stain_names().values()}  # of another, nobody has said who was trained on it
    stains: set[str | None] = {None, *known.intersection(list_stains(read_stains(rows)))}
    model = adapted.model.config
    notes = [SYNTHETIC_BACKBONE] if model.backbone_name == MINI and not model.synthetic else []
    notes += contamination_notes(
        model.backbone_name, config.data_name, rows, synthetic=model.synthetic
    )
    notes += [
        note
        for row in known_rows(model.backbone_name)
        for stain in sorted(stains, key=str)
        for note in pretraining_notes(row, stain, mpp=model.mpp)
    ]
    return list(dict.fromkeys(notes))


def _describe_data(task: Task) -> dict[str, Any]:
    """Where the rows come from and how they are split, as the results state it."""
    from ..data import split_hash

    config, episode, classes = task.config, task.episode, task.classes
    labels, groups = task.labels, task.groups
    read = {f"{note}." for note in task.reading.in_full}  # may name files; the run's notes do not
    sides = {
        "support": episode.support,
        "validation": episode.validation,
        "calibration": episode.calibration,
        "test": episode.test,
    }
    learned = [*episode.support, *episode.validation, *episode.calibration]
    return {
        "name": config.data_name,
        "hub_id": config.hub_id,
        "stain": list_stains(read_stains(task.rows)) or None,
        "fingerprint": task.report.fingerprint,
        "classes": [c.to_dict() | {"prompts": list(c.prompts)} for c in classes],
        "counts": {
            side: {c.name: sum(1 for i in index if labels[i] == k) for k, c in enumerate(classes)}
            for side, index in sides.items()
        },
        "groups": {side: len({groups[i] for i in index}) for side, index in sides.items()},
        "drawn": {side: _images_by_group(task, index) for side, index in sides.items()},
        "group_column": episode.group_column,
        "split_hash": split_hash(task.rows, episode),
        "shots": episode.shots,
        "sampler": episode.sampler,
        "support": task.summary,
        "support_groups_sha256": sorted(hash_groups(groups[i] for i in learned)),
        "learned_from": task.provenance().to_dict(),
        "notes": [note for note in task.report.notes if note not in read],
    }


def _images_by_group(task: Task, rows: Sequence[int]) -> list[list[int]]:
    """Images of each class in every group of some rows, the largest first, without its name."""
    held: dict[str, list[int]] = {}
    for row in rows:
        held.setdefault(task.groups[row], [0] * len(task.classes))[task.labels[row]] += 1
    return sorted(held.values(), key=lambda counts: (-sum(counts), counts))


def _digest_split(task: Task) -> str:
    """Digest of the side on which each row stands."""
    from ..data.folder import column

    names, episode = column(task.rows, "file_name"), task.episode
    sides = ("support", "validation", "calibration", "test")
    return digest_value([sorted(names[i] for i in getattr(episode, side)) for side in sides])


def _in_order(parts: list[tuple[list[int], Predictions]]) -> Predictions:
    """Join the predictions of all processes in the order of the test rows."""
    order = np.argsort(np.concatenate([index for index, _ in parts]))

    def joined(name: str) -> Any:
        values = [getattr(p, name) for _, p in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], list):
            flat = [v for part in values for v in part]
            return [flat[i] for i in order]
        return np.concatenate(values)[order]

    apart = ("class_names", "notes")
    joint = {f.name: joined(f.name) for f in fields(Predictions) if f.name not in apart}
    return Predictions(class_names=parts[0][1].class_names, **joint)


class _Clock:
    """Seconds per stage and peak memory."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self.last, 3)
        self.last = now

    def report(self) -> dict[str, float | None]:
        peak = peak_memory()
        mib = None if peak is None else round(peak / 2**20, 1)
        total = round(time.perf_counter() - self.start, 3)
        return {**self.laps, "total": total, "peak_memory_mib": mib}


class _Processes:
    """Processes of a run: one or many, their device, their feature cache, their trackers.

    Accelerate is only brought in for methods that train, and for trackers.
    """

    def __init__(self, config: TrainConfig, method: Method, loader: Loader) -> None:
        self.cache = loader.features() if config.cache else None
        self.accelerator: Accelerator | None = None
        self.device = resolve_device(config.device)
        alone = isinstance(method, FeatureMethod) and "LOCAL_RANK" not in os.environ
        if not alone or config.tracker is not None:
            if self.device.type == "cuda" and self.device.index and "LOCAL_RANK" not in os.environ:
                torch.cuda.set_device(self.device)  # which Accelerate then takes
            self.accelerator = make_accelerator(
                config.mixed_precision,
                cpu=config.device != "auto" and self.device.type == "cpu",
                log_with=config.tracker,
                project_dir=config.output_dir if config.tracker else None,
            )
            self.device = self.accelerator.device
        self.count = self.accelerator.num_processes if self.accelerator else 1
        self.rank = self.accelerator.process_index if self.accelerator else 0
        self.main = self.rank == 0
        self.config = config

    def start_trackers(self) -> None:
        """Begin to log to the tracker, if there is one."""
        if self.accelerator is not None and self.config.tracker:
            self.accelerator.init_trackers("glovlm", config={"method": self.config.method})

    def log(self, results: Mapping[str, Any]) -> None:
        """Log the test metrics, the training's facts and times to the trackers, for any method."""
        if self.accelerator is None or not self.accelerator.trackers:
            return
        values = {f"test/{name}": entry["value"] for name, entry in results["metrics"].items()}
        values |= {f"training/{name}": value for name, value in results["training"].items()}
        values |= {f"training/{k}": v for k, v in results["training"]["facts"].items()}
        values |= {f"timing/{name}": value for name, value in results["timing"].items()}
        numbers = {k: v for k, v in values.items() if type(v) in (int, float)}
        # Behind the epochs: a tracker may ignore a step that is not above the last.
        self.accelerator.log(numbers, step=results["training"]["epochs_run"] + 1)

    def wait(self) -> None:
        """Meet the other processes, and close the trackers."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            if self.accelerator.trackers:
                self.accelerator.end_training()

    def cache_for(self, adapted: Adapted) -> FeatureCache | None:
        """Stored features, where the vision tower is as it came."""
        return self.cache if adapted.frozen_tower else None

    def predict(self, adapted: Adapted, test: "Dataset", groups: list[str]) -> Predictions:
        """Predict every row exactly once, each process its share, and put them back in order."""
        mine = list(range(self.rank, len(test), self.count))
        part = predict(
            adapted.model,
            adapted.processor,
            test if self.count == 1 else test.select(mine),
            device=self.device,
            cache=self.cache_for(adapted),
            groups=[groups[i] for i in mine],
        )
        if self.count == 1:
            return part
        from accelerate.utils import gather_object

        parts = gather_object([(mine, part)])
        return _in_order(parts)
