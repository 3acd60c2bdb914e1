"""One whole run, from a folder to a measured model: `TrainConfig` says what, `run` does it."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .adapters import FeatureMethod, Method, get_method
from .backbones import load_backbone
from .card import render_card
from .errors import GloVLMError, nearest
from .inference import FeatureCache, Predictions, predict
from .loop import write_text
from .training import Adapted, Loss, adapt

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from .data import ClassInfo, Episode

UNFINISHED = "unfinished"  # the folder in which a run is made; there until it is complete
OWN_FILES = (  # in the order in which they are put in place
    "model", "adapter", "predictions.parquet", "config.yaml", "episodes.json", "log.jsonl",
    "README.md", "results.json",
)  # fmt: skip


@dataclass
class TrainConfig:
    """One adaptation, complete: the flags of `glovlm train` and the content of `config.yaml`.

    Args:
        data: Folder, parquet file, or Hub id.
        output_dir: Where the run is written.
        backbone: Name, Hub id, folder, or `vision+text`.
        method: A name of `glovlm methods`.
        shots: Labelled images per class, or `{class: number}`.
        seed: Of split, draw, initialisation and order.
        episodes: A frozen episode file to take the split and the support from.
        draw: Which of its draws; without a file, which draw of this seed.
        shots_from: How a class's images are spread over groups.
        allow_fewer: Take what there is where a class has fewer images than shots.
        prompts: `auto`, `catalog`, `terminology`, or a `classes.yaml`.
        stain: For `prompts: terminology`.
        validation_shots: Images per class from further groups, for early stopping; they count as
            labels.
        test_fraction: Fraction of the groups on the test side.
        loss: `prototypes` (cross-entropy over class texts), `infonce` (in-batch, same-class pairs
            masked) or `infonce_published` (unmasked).
        method_config: Settings of the method.
        epochs: Overrides the method's recipe, as do the next three.
        lr: Learning rate.
        weight_decay: Weight decay.
        batch_size: Images per step over all processes.
        augment: Random flips, quarter turns and crops of at least half the area while training.
        mixed_precision: `no`, `fp16` or `bf16`, by Accelerate.
        accumulate: Parts that each batch is split into, to save memory; same result.
        clip_norm: Largest gradient norm.
        tracker: An Accelerate tracker (`tensorboard`, `wandb`, ...).
        device: `auto`, `cpu`, `cuda`, ...
        overwrite: Replace a run in `output_dir`.
        resume: Go on from its checkpoint; return its results if it is finished.
        cache: Keep features of frozen towers for the next run.
        n_resamples: Bootstrap resamples of the intervals.
        save_model: Whether `model/` and `adapter/` are written; a study keeps results only.
    """

    data: str
    output_dir: str
    backbone: str = "mini"
    method: str = "linear_probe"
    shots: int | dict[str, int] = 8
    seed: int = 0
    episodes: str | None = None
    draw: int = 0
    shots_from: Literal["spread", "random", "one_group"] = "spread"
    allow_fewer: bool = False
    prompts: str = "auto"
    stain: str | None = None
    validation_shots: int = 0
    test_fraction: float = 0.5
    loss: Loss = "prototypes"
    method_config: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    augment: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: int = 1
    clip_norm: float | None = None
    tracker: str | None = None
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    cache: bool = True
    n_resamples: int = 2000
    save_model: bool = True

    def __post_init__(self) -> None:
        method = get_method(self.method)
        method.configure(self.method_config)
        shots = self.shots.values() if isinstance(self.shots, dict) else [self.shots]
        if any(k < 0 for k in shots):
            raise GloVLMError(f"shots must be 0 or more; found {self.shots}.")
        if not any(shots) and method.name != "zero_shot":
            raise GloVLMError(
                f"Method '{self.method}' trains, so it needs labelled images; found shots 0. "
                "Give --shots 1 or more, or use --method zero_shot."
            )
        if self.seed < 0 or self.draw < 0:
            raise GloVLMError(f"seed and draw must be 0 or more; found {self.seed}, {self.draw}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise GloVLMError(
                    f"{name} must be one of {', '.join(known)}; found '{getattr(self, name)}'."
                    f"{nearest(str(getattr(self, name)), known)}"
                )
        if self.accumulate < 1 or (self.accumulate > 1 and self.loss != "prototypes"):
            raise GloVLMError(
                f"accumulate must be 1 or more, and 1 with loss '{self.loss}', whose negatives are "
                f"the whole batch; found {self.accumulate}."
            )
        for name in ("epochs", "lr", "batch_size", "clip_norm", "n_resamples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise GloVLMError(f"{name} must be above 0; found {value}.")

    def recipe_overrides(self) -> dict[str, Any]:
        """What replaces the method's own recipe."""
        names = ("epochs", "lr", "weight_decay", "batch_size")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that make this run again: `config.yaml`, and `config` in the results."""
        return asdict(self) | {"overwrite": False, "resume": False}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from YAML or flags.

        Raises:
            GloVLMError: A key is unknown (names the nearest) or a required one is missing.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise GloVLMError(
                    f"Unknown setting '{key}' in the configuration.{nearest(key, known)}"
                )
        for key in ("data", "output_dir"):
            if not values.get(key):
                flag = key.replace("_", "-")
                raise GloVLMError(f"A run needs {key}: give --{flag} or '{key}:' in the YAML file.")
        return cls(**values)


_INCIDENTAL = ("output_dir", "device", "cache", "tracker")  # where and how fast, not what
_CHOICES = {
    "shots_from": ("spread", "random", "one_group"),
    "loss": ("prototypes", "infonce", "infonce_published"),
    "mixed_precision": ("no", "fp16", "bf16"),
}


def run(
    config: TrainConfig, *, on_event: Callable[[str, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Do the main job: load, split, draw, adapt, predict, measure, save.

    Args:
        config: What to do.
        on_event: Told of progress: `("stage", {"name"})`, `("episode", summary)`, `("epoch", row)`.

    Returns:
        The content of `results.json`. Under `accelerate launch` every process returns it; only the
        main one writes.

    Raises:
        GloVLMError: The input is bad; nothing has been written then.
    """
    from .data import check_dataset, group_rows, load_classes, load_dataset, save_episodes
    from .data.folder import column

    tell = on_event or (lambda kind, what: None)
    clock = _Clock()
    output = Path(config.output_dir).expanduser()
    finished = _claim(output, config)
    if finished is not None:
        return finished

    tell("stage", {"name": "checking the data"})
    dataset = load_dataset(config.data)
    report = check_dataset(dataset)
    report.raise_problems()
    rows, episode = _choose_episode(dataset, config)
    names: list[str] = rows.features["label"].names
    classes = load_classes(names, source=config.data, prompts=config.prompts, stain=config.stain)
    groups = group_rows(rows, group_column=episode.group_column)
    labels = column(rows, "label")
    summary = episode.summary(labels, groups.ids, names)
    tell("episode", summary)
    clock.lap("data")

    tell("stage", {"name": "loading the backbone"})
    method = get_method(config.method)
    processes = _Processes(config, method)
    model, processor = load_backbone(config.backbone)
    model.to(processes.device)
    clock.lap("load")

    tell("stage", {"name": f"adapting: {config.method}"})
    cache = FeatureCache() if config.cache else None
    with _unfinished(output, config, processes.main) as work:
        adapted = adapt(
            model,
            method.name,
            rows.select(episode.support),
            processor=processor,
            classes=classes,
            settings=config.method_config,
            recipe=config.recipe_overrides(),
            loss=config.loss,
            validation=rows.select(episode.validation) if episode.validation else None,
            seed=config.seed,
            augment=config.augment,
            accumulate=config.accumulate,
            clip_norm=config.clip_norm,
            accelerator=processes.accelerator,
            cache=cache,
            output_dir=work,
            resume=config.resume,
            on_epoch=lambda row: tell("epoch", row),
        )
        clock.lap("adapt")

        tell("stage", {"name": "predicting the test images"})
        test = rows.select(episode.test)
        predictions = processes.predict(
            adapted,
            test,
            [groups.ids[i] for i in episode.test],
            cache if adapted.frozen_tower else None,
        )
        clock.lap("predict")
        tell("stage", {"name": "measuring"})
        measured = measure(predictions, n_resamples=config.n_resamples, seed=config.seed)
        clock.lap("metrics")

        results = {
            "config": config.to_repeat(),
            "data": _describe_data(
                config, report, rows, labels, groups.ids, episode, classes, summary
            ),
            **measured,
            "method": method.describe() | {"settings": asdict(adapted.settings)},
            "backbone": {
                "name": adapted.model.config.backbone_name,
                "revision": adapted.model.config.backbone_revision,
                "license": adapted.model.config.backbone_license,
            },
            "training": {
                "trainable_parameters": adapted.trainable_parameters,
                "recipe": asdict(adapted.recipe) if adapted.recipe else None,
                "epochs_run": len(adapted.log),
                "final_loss": adapted.log[-1]["loss"] if adapted.log else None,
                "loss": config.loss,
            },
            "notes": [*episode_notes(episode), *adapted.notes],
            "synthetic": bool(adapted.model.config.synthetic or _synthetic(config.data)),
            "timing": clock.report(),
            "environment": describe_environment(processes.device, processes.count),
        }
        adapted.model.config.synthetic = results["synthetic"]
        if processes.main:
            if config.save_model:
                adapted.save(work / "model")
            else:
                shutil.rmtree(work / "adapter", ignore_errors=True)
            predictions.save(work / "predictions.parquet")
            save_episodes(work / "episodes.json", [episode], rows, results["data"]["name"])
            write_text(work / "README.md", render_card(results))
            write_text(work / "results.json", json.dumps(results, indent=1) + "\n")
            _finish(work, output)
    processes.wait()
    return results


def measure(predictions: Predictions, *, n_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compute every metric of labelled predictions, with intervals over their groups."""
    from .metrics import compute_metrics

    assert predictions.labels is not None  # callers predict labelled rows
    return compute_metrics(
        predictions.labels,
        predictions.probabilities,
        groups=predictions.groups,
        class_names=predictions.class_names,
        similarities=predictions.similarities,
        n_resamples=n_resamples,
        seed=seed,
    )


def _choose_episode(dataset: Any, config: TrainConfig) -> tuple["Dataset", "Episode"]:
    from .data import all_rows, draw_episode, load_episode

    rows = all_rows(dataset)
    if config.episodes is not None:
        return rows, load_episode(config.episodes, config.draw, rows)
    return rows, draw_episode(
        rows,
        shots=config.shots,
        seed=config.seed,
        draw=config.draw,
        shots_from=config.shots_from,
        allow_fewer=config.allow_fewer,
        test_fraction=config.test_fraction,
        validation_shots=config.validation_shots,
    )


def episode_notes(episode: "Episode") -> list[str]:
    """Sentences about the split that belong beside every number."""
    notes = [f"Split by {episode.group_column}; intervals are over these groups."]
    if episode.group_column != "patient_id":
        notes.append("Patients are unknown: the same patient may stand on both sides.")
    return notes


def _describe_data(
    config: TrainConfig,
    report: Any,
    rows: "Dataset",
    labels: Sequence[int],
    groups: Sequence[str],
    episode: "Episode",
    classes: Sequence["ClassInfo"],
    summary: dict[str, Any],
) -> dict[str, Any]:
    from hashlib import sha256

    from .data import split_hash

    sides = {"support": episode.support, "validation": episode.validation, "test": episode.test}
    return {
        "name": Path(config.data).name,
        "fingerprint": report.fingerprint,
        "classes": [asdict(c) | {"prompts": list(c.prompts)} for c in classes],
        "counts": {
            side: {c.name: sum(1 for i in index if labels[i] == k) for k, c in enumerate(classes)}
            for side, index in sides.items()
        },
        "groups": {side: len({groups[i] for i in index}) for side, index in sides.items()},
        "group_column": episode.group_column,
        "split_hash": split_hash(rows, episode),
        "shots": episode.shots,
        "sampler": episode.sampler,
        "support": summary,
        "support_groups_sha256": sorted(
            {
                sha256(groups[i].encode()).hexdigest()
                for i in (*episode.support, *episode.validation)
            }
        ),
        "notes": list(report.notes),
    }


def _synthetic(data: str) -> bool:
    """Whether a folder says of itself that it holds drawings (`write_cohort` leaves that mark)."""
    return (Path(data).expanduser() / "DRAWINGS").is_file()


def _claim(output: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Make sure that the output folder may be written; return the results of a finished run."""
    if output.exists() and not output.is_dir():
        raise GloVLMError(f"--output-dir must be a folder; '{output}' is a file.")
    begun = (output / UNFINISHED / "config.yaml").is_file()
    finished = (output / "results.json").is_file() and (output / "config.yaml").is_file()
    if not begun and not finished:
        if output.is_dir() and any(output.iterdir()):
            raise GloVLMError(
                f"Output folder '{output}' holds files that are no run of ours: give an empty or a "
                "new folder."
            )
        return None
    if config.resume:
        _check_same_run(output / UNFINISHED if begun else output, config)
        return None if begun else json.loads((output / "results.json").read_text())
    if not config.overwrite:
        raise GloVLMError(
            f"Output folder '{output}' already holds a run: give --overwrite to replace it, "
            "--resume to go on with it, or another folder."
        )
    return None


def _check_same_run(folder: Path, config: TrainConfig) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    import yaml

    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    other = [
        f"{key} was {stored.get(key)!r} and is {value!r}"
        for key, value in config.to_repeat().items()
        if key not in _INCIDENTAL and stored.get(key) != value
    ]
    if other:
        raise GloVLMError(
            f"The run in '{folder}' was begun with other settings ({'; '.join(other)}): repeat its "
            "config.yaml to go on with it, give --overwrite, or another folder."
        )


@contextmanager
def _unfinished(output: Path, config: TrainConfig, main: bool) -> Iterator[Path]:
    """The folder in which a run is made, so that a former one stays until the new one is complete.

    It stays when the run is interrupted, for `--resume`, and goes when the input was at fault.
    """
    import yaml

    work = output / UNFINISHED
    fresh, new = not (config.resume and work.is_dir()), not output.exists()
    if main:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / "config.yaml", yaml.safe_dump(config.to_repeat(), sort_keys=True))
    try:
        yield work
    except GloVLMError:
        if main and fresh:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds something else
                if new:
                    output.rmdir()
        raise


def _finish(work: Path, output: Path) -> None:
    """Put a complete run in its place; `results.json` goes last, so its presence means complete."""
    (work / "checkpoint.safetensors").unlink(missing_ok=True)
    (output / "results.json").unlink(missing_ok=True)
    for name in OWN_FILES:
        place = output / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        if (work / name).exists():
            os.replace(work / name, place)
    shutil.rmtree(work)


def describe_environment(device: Any, num_processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, for `results.json` and `glovlm env`."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "hf_glovlm": installed("hf-glovlm"),
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(0) if str(device).startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "num_processes": num_processes,
    }


def _in_order(parts: list[tuple[list[int], Predictions]]) -> Predictions:
    """Put the shares of all processes back into the order of the test rows."""
    import numpy as np

    order = np.argsort(np.concatenate([index for index, _ in parts]))

    def joined(name: str) -> Any:
        values = [getattr(p, name) for _, p in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], list):
            flat = [v for part in values for v in part]
            return [flat[i] for i in order]
        return np.concatenate(values)[order]

    joint = {f.name: joined(f.name) for f in fields(Predictions) if f.name != "class_names"}
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

    def report(self) -> dict[str, float]:
        import resource
        import sys

        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
        total = round(time.perf_counter() - self.start, 3)
        return {**self.laps, "total": total, "peak_memory_mib": round(mib, 1)}


class _Processes:
    """One process or many: Accelerate is only brought in for methods that train."""

    def __init__(self, config: TrainConfig, method: Method) -> None:
        from .inference import resolve_device

        self.accelerator: Accelerator | None = None
        if isinstance(method, FeatureMethod) and "LOCAL_RANK" not in os.environ:
            self.device = resolve_device(config.device)
        else:
            import accelerate

            try:
                self.accelerator = accelerate.Accelerator(
                    mixed_precision=config.mixed_precision,
                    cpu=config.device == "cpu",
                    log_with=config.tracker,
                    project_dir=config.output_dir if config.tracker else None,
                )
            except ValueError as error:  # fp16 on a CPU, a tracker that is none, ...
                raise GloVLMError(f"Accelerate cannot run with these settings: {error}") from error
            self.device = self.accelerator.device
        self.count = self.accelerator.num_processes if self.accelerator else 1
        self.rank = self.accelerator.process_index if self.accelerator else 0
        self.main = self.rank == 0
        if self.accelerator is not None and config.tracker:
            self.accelerator.init_trackers("glovlm", config={"method": config.method})

    def wait(self) -> None:
        """Meet the other processes, and close the trackers."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            if self.accelerator.trackers:
                self.accelerator.end_training()

    def predict(
        self, adapted: "Adapted", test: "Dataset", groups: list[str], cache: FeatureCache | None
    ) -> Predictions:
        """Predict every row exactly once, each process its share, and put them back in order."""
        mine = list(range(self.rank, len(test), self.count))
        part = predict(
            adapted.model,
            adapted.processor,
            test.select(mine),
            device=self.device,
            cache=cache,
            groups=[groups[i] for i in mine],
        )
        if self.count == 1:
            return part
        from accelerate.utils import gather_object

        parts = gather_object([(mine, part)])
        return _in_order(parts)
