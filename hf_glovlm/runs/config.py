"""Run configuration: one adaptation, complete, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict

from ..errors import GloVLMError, check_settings, nearest
from ..methods import get_method
from ..training.config import AdaptConfig, Loss

IN_MEMORY = "data in memory"  # stands for a data set that has no place
_CHOICES = {
    "shots_from": ("spread", "random", "one_group"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "conformal": (None, "lac", "aps", "raps"),
}


@dataclass
class TrainConfig:
    """Settings of one run: the options of `glovlm train`, the content of `config.yaml`.

    Those that are not listed here (`loss`, `cross_validate`, `max_steps`, `augment`, `accumulate`,
    `clip_norm`) are settings of `AdaptConfig`, which explains them.

    Args:
        data: Folder, parquet file, or Hub id; from Python also a `Dataset` with `image` and
            `label`, or a `DatasetDict` (then `config.yaml` cannot repeat the run).
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
        method_config: Settings of the method.
        epochs: Overrides the method's recipe, as do the next three.
        lr: Learning rate.
        weight_decay: Weight decay.
        batch_size: Images per step over all processes.
        calibration_groups: Groups set aside, with all their images, to calibrate the probabilities
            after adaptation; their labels count.
        temperature: Whether these fit a temperature.
        conformal: Prediction sets calibrated on them: `lac`, `aps` or `raps`.
        alpha: Share of images whose set may miss the true class.
        per_class: Whether that holds within each class rather than over all images.
        max_risk: Abstain where the error rate among the answered images would be higher.
        prior: Prevalence of each class where the model will be used, `{class: fraction}`; `em`
            estimates it from the unlabelled test images, and the results are then transductive.
        mixed_precision: `no`, `fp16` or `bf16`, by Accelerate.
        tracker: An Accelerate tracker (`tensorboard`, `wandb`, ...).
        device: `auto`, `cpu`, `cuda`, ...
        overwrite: Replace a run in `output_dir`.
        resume: Go on from its checkpoint; return its results if it is finished.
        cache: Keep features of frozen towers for the next run.
        n_resamples: Bootstrap resamples of the intervals.
        save_model: Whether `model/` and `adapter/` are written; a study keeps results only.
    """

    data: str | Dataset | DatasetDict
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
    max_steps: int | None = None
    cross_validate: bool = False
    calibration_groups: int = 0
    temperature: bool = True
    conformal: Literal["lac", "aps", "raps"] | None = None
    alpha: float = 0.1
    per_class: bool = False
    max_risk: float | None = None
    prior: dict[str, float] | str | None = None
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
        if not isinstance(self.data, str | Dataset | DatasetDict):
            if not isinstance(self.data, Path):
                raise GloVLMError(
                    "data must be a folder, a parquet file, a Hub id, a Dataset or a DatasetDict; "
                    f"found {type(self.data).__name__}."
                )
            self.data = str(self.data)
        self.output_dir = str(self.output_dir)
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
            given = getattr(self, name)
            if given not in known:
                names = [n for n in known if n is not None]
                raise GloVLMError(
                    f"{name} must be one of {', '.join(names)}; found '{given}'."
                    f"{nearest(str(given), names)}"
                )
        if self.cross_validate and self.validation_shots:
            raise GloVLMError(
                "Settings are chosen on validation groups or by leaving groups out, not both: "
                f"found cross_validate and validation_shots {self.validation_shots}."
            )
        wants = [n for n in ("conformal", "max_risk") if getattr(self, n) is not None]
        if wants and self.calibration_groups < 1:
            raise GloVLMError(
                f"{wants[0]} is calibrated on groups that the method does not learn from: give "
                "--calibration-groups 1 or more."
            )
        if self.calibration_groups < 0 or not 0 < self.alpha < 1:
            raise GloVLMError(
                "calibration_groups must be 0 or more and alpha between 0 and 1; found "
                f"{self.calibration_groups} and {self.alpha:g}."
            )
        if self.prior == "em" and wants:
            raise GloVLMError(
                f"{wants[0]} is calibrated before the test images are seen, and prior 'em' is "
                "found on them: declare the prevalence, or leave one of the two out."
            )
        if method.transductive and self.calibration_groups:
            raise GloVLMError(
                f"Method '{self.method}' judges the test images together, so what is calibrated on "
                "others would not hold for them: leave --calibration-groups out."
            )
        if isinstance(self.prior, str) and self.prior != "em":
            raise GloVLMError(
                "prior must be 'em' or a fraction for every class (viable=0.8,sclerosed=0.2); "
                f"found '{self.prior}'."
            )
        if not self.n_resamples > 0:
            raise GloVLMError(f"n_resamples must be above 0; found {self.n_resamples}.")
        self.adaptation(self.output_dir).check_recipe(method)

    def adaptation(self, output_dir: str | Path) -> AdaptConfig:
        """Configuration of the adaptation itself, for `adapt`.

        Args:
            output_dir: Takes the log, the checkpoint and the adapter.
        """
        overrides = ("epochs", "lr", "weight_decay", "batch_size")
        shared = {f.name for f in fields(AdaptConfig)} & {f.name for f in fields(self)}
        return AdaptConfig(
            **{name: getattr(self, name) for name in shared - {"output_dir"}},
            recipe={n: getattr(self, n) for n in overrides if getattr(self, n) is not None},
            output_dir=output_dir,
        )

    @property
    def folder(self) -> str | None:
        """Folder, file or Hub id of the data, as given; `None` for data in memory."""
        return self.data if isinstance(self.data, str) else None

    @property
    def data_name(self) -> str:
        """Name of the data in the results."""
        return IN_MEMORY if self.folder is None else Path(self.folder).name

    @property
    def hub_id(self) -> str | None:
        """Hub id of the data; `None` for local ones."""
        local = self.folder is None or Path(self.folder).expanduser().exists()
        return None if local else self.folder

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that repeat this run: `config.yaml`, and `config` in the results."""
        plain = replace(self, data=self.folder or IN_MEMORY, overwrite=False, resume=False)
        return asdict(plain)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from YAML or flags.

        Raises:
            GloVLMError: A key is unknown (names the nearest) or a required one is missing.
        """
        check_settings(values, {f.name for f in fields(cls)}, ("data", "output_dir"))
        return cls(**values)
