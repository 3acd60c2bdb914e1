"""Settings of a slide classifier, checked before anything is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ...errors import GloVLMError, check_settings
from .aggregators import build_aggregator

_PRECISIONS = ("no", "fp16", "bf16")
_DEVICES = ("auto", "cpu")


@dataclass
class MilConfig:
    """Settings of a slide classifier: the flags of `glovlm mil` and the content of `config.yaml`.

    Args:
        features: Folder of feature files, `NAME.h5` a slide.
        labels: Table of slides: `slide,label[,patient_id][,split]`. A declared split is kept, and
            its validation slides, if any, choose the epoch.
        output_dir: Where the run is written.
        aggregator: A name of `AGGREGATORS`.
        aggregator_config: Its settings.
        epochs: Passes over the training slides; `None`: 20, or as many as 1,000 steps need where
            slides are few.
        lr: Learning rate, falling along a cosine to 0.
        weight_decay: Of AdamW.
        batch_size: Slides per step over all processes.
        seed: Of split, initialisation, order and sampled tiles.
        folds: Test every patient once, by a model that was trained without that patient's fold;
            `None` tests a part. The model that is kept then learned from all slides.
        test_fraction: Fraction of the patients that is tested, where neither folds nor the table
            decide.
        validation_fraction: Fraction of the training patients that chooses the epoch by macro-AUC;
            0 keeps the last epoch.
        max_tiles: Most tiles of a bag that a training step sees, drawn anew each time.
        balance: Draw each class as often as any other, rather than every slide once an epoch.
        clip_norm: Largest gradient norm.
        mixed_precision: `no`, `fp16` or `bf16`, by Accelerate.
        device: `auto` or `cpu`.
        overwrite: Replace a run in `output_dir`.
        resume: Go on from its checkpoints; return its results if it is finished.
        n_resamples: Bootstrap resamples of the intervals.
    """

    features: str
    labels: str
    output_dir: str
    aggregator: str = "abmil"
    aggregator_config: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    lr: float = 2e-4
    weight_decay: float = 1e-5
    batch_size: int = 1
    seed: int = 0
    folds: int | None = None
    test_fraction: float = 0.3
    validation_fraction: float = 0.0
    max_tiles: int | None = None
    balance: bool = True
    clip_norm: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    overwrite: bool = False
    resume: bool = False
    n_resamples: int = 2000

    def __post_init__(self) -> None:
        build_aggregator(self.aggregator, 1, 2, self.aggregator_config)
        for name in ("epochs", "lr", "batch_size", "max_tiles", "clip_norm", "n_resamples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise GloVLMError(f"{name} must be above 0; found {value}.")
        for name, known in (("mixed_precision", _PRECISIONS), ("device", _DEVICES)):
            if getattr(self, name) not in known:
                raise GloVLMError(
                    f"{name} must be one of {', '.join(known)}; found '{getattr(self, name)}'."
                )
        if self.seed < 0 or self.weight_decay < 0:
            raise GloVLMError(
                f"seed and weight_decay must be 0 or more; found {self.seed} and "
                f"{self.weight_decay:g}."
            )
        if self.folds is not None and self.folds < 2:
            raise GloVLMError(f"folds must be 2 or more; found {self.folds}.")
        if not 0 < self.test_fraction < 1 or not 0 <= self.validation_fraction < 1:
            raise GloVLMError(
                "test_fraction lies between 0 and 1, validation_fraction from 0 to below 1; found "
                f"{self.test_fraction:g} and {self.validation_fraction:g}."
            )

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that make this run again: `config.yaml`, and `config` in the results."""
        return asdict(self) | {"overwrite": False, "resume": False}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "MilConfig":
        """Make a config from YAML or flags.

        Raises:
            GloVLMError: A key is unknown (names the nearest) or a required one is missing.
        """
        check_settings(values, {f.name for f in fields(cls)}, ("features", "labels", "output_dir"))
        return cls(**values)
