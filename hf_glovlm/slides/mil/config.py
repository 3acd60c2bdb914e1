"""Settings of a slide classifier, checked before anything is read."""

from dataclasses import dataclass
from typing import Any, Literal

from ...settings import SEEDS, Settings, setting


@dataclass(frozen=True)
class MilConfig(Settings):
    """Settings of a slide classifier: the options of `glovlm mil`, the content of `config.yaml`."""

    features: str = setting(help="Folder of feature files, NAME.h5 a slide.", group="Data")
    labels: str = setting(
        help="Table of slides: slide, label and, if known, patient_id and split. A declared split "
        "is kept, and its validation slides, if any, choose the epoch.",
        group="Data",
    )
    output_dir: str = setting(help="Where the run is written.", group="Output")
    aggregator: str = setting(
        "abmil", help="A name of `AGGREGATORS`; an unknown one lists all.", group="Method"
    )
    aggregator_config: dict[str, Any] = setting(
        factory=dict, help="Settings of the aggregator.", group="Method"
    )
    epochs: int | None = setting(
        None,
        help="Passes over the training slides.",
        group="Training",
        above=0,
        most=10**6,
        unset="20, or as many as 1,000 steps need where slides are few",
    )
    lr: float = setting(
        2e-4, help="Learning rate, falling along a cosine to 0.", group="Training", above=0
    )
    weight_decay: float = setting(1e-5, help="Of AdamW.", group="Training", least=0)
    batch_size: int = setting(
        1, help="Slides per step over all processes.", group="Training", above=0, most=2**31 - 1
    )
    seed: int = setting(
        0,
        help="Of split, initialisation, order and sampled tiles.",
        group="Split",
        least=0,
        most=SEEDS,
    )
    folds: int | None = setting(
        None,
        help="Test every patient once, by a model that was trained without that patient's fold. "
        "The model that is kept then learned from all slides.",
        group="Split",
        least=2,
        most=10**6,
        unset="a part is tested",
    )
    test_fraction: float = setting(
        0.3,
        help="Fraction of the patients that is tested, where neither folds nor the table decide.",
        group="Split",
        above=0,
        below=1,
    )
    validation_fraction: float = setting(
        0.0,
        help="Fraction of the training patients that chooses the epoch by macro-AUC; 0 keeps the "
        "last epoch.",
        group="Split",
        least=0,
        below=1,
    )
    max_tiles: int | None = setting(
        None,
        help="Most tiles of a bag that a training step sees, drawn anew each time.",
        group="Training",
        above=0,
        most=10**9,
        unset="all",
    )
    balance: bool = setting(
        True,
        help="Draw each class as often as any other, rather than every slide once an epoch.",
        group="Training",
    )
    clip_norm: float | None = setting(
        None, help="Largest gradient norm.", group="Training", above=0, unset="no limit"
    )
    encoder: str | None = setting(
        None,
        help="Run whose model encoded the slides, if one did: patients that it learned from are "
        "not tested.",
        group="Data",
        unset="patients are not compared",
    )
    allow_scale: bool = setting(
        False,
        help="Accept slides whose tiles differ in scale, size or overlap; the results say so.",
        group="Data",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting(
        "no", help="Half precision, by Accelerate.", group="Machine"
    )
    device: Literal["auto", "cpu"] = setting("auto", help="Where to compute.", group="Machine")
    overwrite: bool = setting(False, help="Replace a run in the output folder.", group="Output")
    resume: bool = setting(
        False,
        help="Go on from the checkpoints there; return its results if it is finished.",
        group="Output",
    )
    n_resamples: int = setting(
        2000, help="Bootstrap resamples of the intervals.", group="Output", above=0, most=10**5
    )

    def check(self) -> None:
        """Rules over several settings."""
        from .aggregators import configure_aggregator

        own = configure_aggregator(self.aggregator, self.aggregator_config)
        given = {name: getattr(own, name) for name in self.aggregator_config}
        self._put("aggregator_config", given)

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that make this run again: `config.yaml`, and `config` in the results."""
        return super().to_repeat() | {"overwrite": False, "resume": False}
