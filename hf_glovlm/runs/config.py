"""Run configuration: one adaptation, complete, checked before anything is loaded."""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.columns import Columns
from ..errors import GloVLMError
from ..settings import declarations, setting
from ..training.config import AdaptConfig, LearningSettings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..methods import Method

IN_MEMORY = "data in memory"  # stands for a data set that has no place
MINI = "mini"  # the embedded backbone
DRAWING = (  # settings of an episode, as `draw_episode` takes them
    "shots", "seed", "draw", "shots_from", "allow_fewer", "test_fraction", "validation_shots",
    "calibration_groups",
)  # fmt: skip
RECIPE = ("epochs", "lr", "weight_decay", "batch_size")  # override the method's recipe


@dataclass(frozen=True)
class TrainConfig(LearningSettings, Columns):
    """Settings of one run: the options of `glovlm train`, the content of `config.yaml`.

    `image_column`, `label_column`, `group_column` and `group_from` are those of `Columns`; `loss`,
    `cross_validate`, `max_steps`, `seed`, `augment`, `accumulate` and `clip_norm` are those
    of `AdaptConfig`.
    """

    data: "str | Dataset | DatasetDict" = setting(
        help="Folder of images, parquet file, or Hub id; from Python also a `Dataset` with `image` "
        "and `label`, or a `DatasetDict` (then `config.yaml` cannot repeat the run).",
        group="Data",
        form="a folder, a parquet file, a Hub id, a Dataset or a DatasetDict",
        hint=str | object,
    )
    output_dir: str = setting(help="Where the run is written.", group="Output")
    backbone: str | None = setting(
        None,
        help="Name, Hub id, folder, or VISION+TEXT; photographs need one.",
        group="Method",
        unset="mini, for synthetic images alone",
    )
    method: str = setting("linear_probe", help="A name of `glovlm methods`.", group="Method")
    method_config: dict[str, Any] = setting(
        factory=dict, help="Settings of the method.", group="Method"
    )
    shots: int | dict[str, int] = setting(
        8,
        help="Labelled images per class, or a number for each: CLASS=N,CLASS=N.",
        group="Labels",
        least=0,
        most=10**6,
        form="a whole number, or one for each class (viable=8,sclerosed=4)",
    )
    episodes: str | None = setting(
        None,
        help="A frozen episode file to take the split and the support from.",
        group="Labels",
        unset="split and draw here",
    )
    draw: int = setting(
        0,
        help="Which of its draws; without a file, which draw of this seed.",
        group="Labels",
        least=0,
        most=10**6,
    )
    shots_from: Literal["spread", "random", "one_group"] = setting(
        "spread", help="How a class's images are spread over groups.", group="Labels"
    )
    protocol: Literal["strict", "glo_vlms"] = setting(
        "strict",
        help="How splits and supports are drawn: `strict` (a split for each draw), or `glo_vlms` "
        "as published (one split for ten draws, disjoint supports up to 4 shots, pools of 32, and "
        "all images of the validation groups, whose labels count).",
        group="Labels",
    )
    allow_fewer: bool = setting(
        False,
        help="Take what there is where a class has fewer images than shots.",
        group="Labels",
    )
    prompts: str = setting(
        "auto", help="auto, catalog, terminology, or a classes.yaml.", group="Data"
    )
    stain: str | None = setting(
        None,
        help="Stain of images whose stain no column states; also for prompts: terminology.",
        group="Data",
        unset="none named",
    )
    validation_shots: int = setting(
        0,
        help="Images per class from further groups, for early stopping; they count as labels.",
        group="Labels",
        least=0,
        most=10**6,
    )
    test_fraction: float = setting(
        0.5, help="Fraction of the groups on the test side.", group="Labels", above=0, below=1
    )
    epochs: int | None = setting(
        None,
        help="Passes over the support.",
        group="Training",
        above=0,
        most=10**6,
        unset="the recipe's own",
    )
    lr: float | None = setting(
        None, help="Learning rate.", group="Training", above=0, unset="the recipe's own"
    )
    weight_decay: float | None = setting(
        None, help="Weight decay.", group="Training", least=0, unset="the recipe's own"
    )
    batch_size: int | None = setting(
        None,
        help="Images per step over all processes.",
        group="Training",
        above=0,
        most=2**31 - 1,
        unset="the recipe's own",
    )
    calibration_groups: int = setting(
        0,
        help="Groups set aside, with all their images, to calibrate the probabilities after "
        "adaptation; their labels count.",
        group="Calibration",
        least=0,
        most=10**6,
    )
    temperature: bool = setting(True, help="Whether these fit a temperature.", group="Calibration")
    conformal: Literal["lac", "aps", "raps"] | None = setting(
        None, help="Prediction sets calibrated on them.", group="Calibration", unset="none"
    )
    alpha: float = setting(
        0.1,
        help="Share of images whose set may miss the true class.",
        group="Calibration",
        above=0,
        below=1,
    )
    per_class: bool = setting(
        False,
        help="Whether that holds within each class rather than over all images.",
        group="Calibration",
    )
    max_risk: float | None = setting(
        None,
        help="Abstain where the error rate among the answered images would be higher.",
        group="Calibration",
        above=0,
        below=1,
        unset="never",
    )
    prior: dict[str, float] | Literal["em"] | None = setting(
        None,
        help="Prevalence of each class where the model will be used, CLASS=P,CLASS=P; `em` "
        "estimates it from the unlabelled test images, and the results are then transductive.",
        group="Calibration",
        above=0,
        most=1,
        form="'em' or a fraction for every class (viable=0.8,sclerosed=0.2)",
        unset="all equal",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting(
        "no", help="Half precision, by Accelerate.", group="Machine"
    )
    tracker: str | None = setting(
        None, help="An Accelerate tracker (tensorboard, wandb, ...).", group="Machine", unset="none"
    )
    device: str = setting("auto", help="auto, cpu, cuda, cuda:N or mps.", group="Machine")
    overwrite: bool = setting(False, help="Replace a run in the output folder.", group="Output")
    resume: bool = setting(
        False,
        help="Go on from the checkpoint of the run in the output folder; return its results if it "
        "is finished.",
        group="Output",
    )
    cache: bool = setting(
        True, help="Keep features of frozen towers for the next run.", group="Output"
    )
    n_resamples: int = setting(
        2000,
        help="Bootstrap resamples of the intervals.",
        group="Output",
        above=0,
        most=10**5,
    )
    controls: bool = setting(
        False,
        help="Also measure what predicts the labels without showing the lesion: size and file "
        "alone, pictures with the outlined inside hidden, permuted labels.",
        group="Output",
    )
    save_model: bool = setting(
        True,
        help="Whether `model/` and `adapter/` are written; a study keeps results only.",
        group="Output",
    )

    def check(self) -> None:
        """Rules over several settings."""
        from ..methods import get_method

        if not isinstance(self.data, str) and not _is_dataset(self.data):
            expected = declarations(type(self))["data"].expected
            raise GloVLMError(f"data must be {expected}; found {type(self.data).__name__}.")
        method = get_method(self.method)
        own = method.configure(self.method_config)
        self._put("method_config", {name: getattr(own, name) for name in self.method_config})
        shots = self.shots.values() if isinstance(self.shots, dict) else [self.shots]
        if not any(shots) and method.name != "zero_shot":
            raise GloVLMError(
                f"Method '{self.method}' trains, so it needs labelled images; found shots 0. "
                "Give --shots 1 or more, or use --method zero_shot."
            )
        if self.cross_validate and self.validation_shots:
            raise GloVLMError(
                "Settings are chosen on validation groups or by leaving groups out, not both: "
                f"found cross_validate and validation_shots {self.validation_shots}."
            )
        self._check_calibration(method)
        self._check_protocol()
        super().check()
        self.adaptation(self.output_dir).check_method(method)

    def _check_protocol(self) -> None:
        if self.protocol == "strict":
            return
        from ..data.protocols import check_glo_vlms

        shots = self.shots.values() if isinstance(self.shots, dict) else [self.shots]
        check_glo_vlms(max(shots), self.draw)
        table = declarations(type(self))
        reasons = {
            "episodes": "a frozen episode has its own split and support",
            "validation_shots": "it takes all images of the validation groups",
            "cross_validate": "it chooses on the validation groups",
            "calibration_groups": "it sets none aside",
            "shots_from": "it draws a class's images whatever their groups",
        }
        for name, reason in reasons.items():
            if getattr(self, name) != table[name].default:
                raise GloVLMError(
                    f"protocol {self.protocol} and {name} exclude each other: {reason}. Leave one "
                    "of the two out."
                )

    def _check_calibration(self, method: "Method") -> None:
        needing = [n for n in ("conformal", "max_risk") if getattr(self, n) is not None]
        if needing and self.calibration_groups < 1:
            raise GloVLMError(
                f"{needing[0]} is calibrated on groups that the method does not learn from: give "
                "--calibration-groups 1 or more."
            )
        if self.prior == "em" and needing:
            raise GloVLMError(
                f"{needing[0]} is calibrated before the test images are seen, and prior 'em' is "
                "found on them: declare the prevalence, or leave one of the two out."
            )
        if method.transductive and self.calibration_groups:
            raise GloVLMError(
                f"Method '{self.method}' judges the test images together, so what is calibrated on "
                "others would not hold for them: leave --calibration-groups out."
            )
        if isinstance(self.prior, dict) and abs(sum(self.prior.values()) - 1) > 1e-3:
            raise GloVLMError(
                f"prior must sum to 1; found {sum(self.prior.values()):.6g}: give fractions of all "
                "images, one for every class."
            )

    def adaptation(self, output_dir: str | Path) -> AdaptConfig:
        """Configuration of the adaptation itself, for `adapt`.

        Args:
            output_dir: Takes the log, the checkpoint and the adapter.
        """
        shared = {f.name for f in fields(AdaptConfig)} & {f.name for f in fields(self)}
        return AdaptConfig(
            **{name: getattr(self, name) for name in shared - {"output_dir"}},
            recipe={n: getattr(self, n) for n in RECIPE if getattr(self, n) is not None},
            output_dir=output_dir,
        )

    @property
    def columns(self) -> Columns:
        """Columns of the data."""
        return Columns(**{f.name: getattr(self, f.name) for f in fields(Columns)})

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
        return asdict(replace(self, data=self.folder or IN_MEMORY, overwrite=False, resume=False))


def choose_backbone(name: str | None, data: "str | Dataset | DatasetDict") -> str:
    """Backbone of a run: the named one, or `mini` where the images are synthetic as its own were.

    Args:
        name: As `TrainConfig.backbone` has it.
        data: As `TrainConfig.data` has it.

    Raises:
        GloVLMError: None is named, and the images are photographs.
    """
    from ..data.folder import is_synthetic

    if name is None and not is_synthetic(data):
        raise GloVLMError(
            "Photographs need a backbone that has seen some, and none is named: give --backbone "
            "(backbone: in YAML), for example vinid/plip or openai/clip-vit-base-patch16; `glovlm "
            f"backbones` lists more. The embedded {MINI} has seen synthetic images only."
        )
    return name or MINI


def _is_dataset(value: object) -> bool:
    """Whether it is rows in memory; whoever made them has imported `datasets`."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(value, module.Dataset | module.DatasetDict)
