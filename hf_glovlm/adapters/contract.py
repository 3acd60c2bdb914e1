"""What an adaptation method is: a name, a typed config, a recipe, and one of three ways to run.

A method only declares. Features are computed in `inference.py`, the loop is in `training.py`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError, nearest

Family = Literal["training-free", "feature side", "text side", "image side", "both sides"]


@dataclass(frozen=True)
class Recipe:
    """How the loop trains.

    Args:
        lr: Learning rate of a group that does not set its own.
        epochs: Passes over the support.
        batch_size: Images per step over all processes.
        weight_decay: Of the optimiser.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        schedule: `constant`, or `cosine` down to `final_lr` times the rate.
        final_lr: Fraction of the rate at the end of a cosine.
        warmup_epochs: Epochs at `warmup_lr` before the schedule begins.
        warmup_lr: The rate of these epochs.
        patience: Epochs without a better validation macro-AUC before stopping, if there is
            validation; without it every epoch is run and the last state kept.
        min_delta: The least gain in macro-AUC that counts as better.
    """

    lr: float
    epochs: int
    batch_size: int
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    patience: int = 7
    min_delta: float = 0.001


@dataclass(frozen=True)
class Support:
    """The labelled images, as a method on features sees them. No test image is ever in it.

    Args:
        features: Image features `[n, dim]`, not normalised.
        labels: Class numbers `[n]`; classes may be unbalanced, one image is enough.
        num_classes: Number of classes K.
        prototypes: Unit class text features `[K, dim]`, where the backbone has a joint space.
        logit_scale: Factor between cosines and logits of the backbone.
        seed: Of everything random.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    prototypes: Tensor | None = None
    logit_scale: float = 100.0
    seed: int = 0


@dataclass
class Tuning:
    """What a method that trains inside the towers hands to the loop.

    Args:
        groups: Optimiser groups: `{"params": [...], "lr": ...}`.
        prompts: Per class, the texts of its prototype.
        trains_vision: Whether the vision tower changes; if not, images are encoded once.
        trains_text: Whether class prototypes change from step to step.
        finish: Called once after the last step: writes the adapter alone into a folder (`None`: do
            not write), then merges it into the towers.
        notes: Sentences for the results.
    """

    groups: list[dict[str, Any]]
    prompts: list[list[str]]
    trains_vision: bool
    trains_text: bool
    finish: Callable[[Path | None], None]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NoConfig:
    """A method without settings."""


class Method(ABC):
    """One adaptation method; subclass one of the three below and decorate with `register`.

    Attributes:
        name: On the command line.
        family: What it touches.
        trains: What changes, in words.
        needs_text: Whether it uses class texts (and so a joint space).
        saves_adapter: Whether it leaves a PEFT adapter beside the merged model.
        transductive: Whether it looks at the unlabelled query batch.
        citation: Where it comes from.
        Config: Its settings, defaults from its paper.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    trains: ClassVar[str]
    needs_text: ClassVar[bool]
    saves_adapter: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    citation: ClassVar[str]
    Config: ClassVar[type] = NoConfig

    def configure(self, settings: Mapping[str, Any]) -> Any:
        """Make the typed config, and refuse what it does not know.

        Raises:
            GloVLMError: A setting is unknown or of the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(self.Config)}
        for key, value in settings.items():
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise GloVLMError(
                    f"Method '{self.name}' has no setting '{key}' (it has: {known})."
                    f"{nearest(key, fields)}"
                )
            default = fields[key].default
            if isinstance(default, float) and type(value) is int:
                continue
            known_type = default is not dataclasses.MISSING and default is not None
            if known_type and type(value) is not type(default):
                raise GloVLMError(
                    f"Setting '{key}' of method '{self.name}' is a {type(default).__name__} "
                    f"(default {default!r}); found {value!r}."
                )
        return self.Config(**settings)

    def describe(self) -> dict[str, Any]:
        """One row of `glovlm methods`."""
        return {
            "name": self.name,
            "family": self.family,
            "trains": self.trains,
            "needs_text": self.needs_text,
            "saves_adapter": self.saves_adapter,
            "transductive": self.transductive,
            "settings": dataclasses.asdict(self.Config()),
            "citation": self.citation,
        }


class FeatureMethod(Method):
    """Frozen towers, closed form or a solver: features in, head out."""

    @abstractmethod
    def fit(self, support: Support, config: Any) -> nn.Module:
        """Make the head from the support."""


class HeadMethod(Method):
    """Frozen towers, a head trained by the loop on features."""

    @abstractmethod
    def recipe(self, shots: int, config: Any) -> Recipe:
        """How the loop trains it, given the largest number of shots of any class."""

    @abstractmethod
    def build(self, support: Support, config: Any) -> nn.Module:
        """Make the untrained head."""


class TowerMethod(Method):
    """Something inside the towers trains."""

    @abstractmethod
    def recipe(self, shots: int, config: Any) -> Recipe:
        """How the loop trains it, given the largest number of shots of any class."""

    def prompts(self, classes: Sequence[ClassInfo], config: Any) -> list[list[str]]:
        """The texts that stand for each class."""
        return [list(c.prompts) for c in classes]

    @abstractmethod
    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: Any
    ) -> Tuning:
        """Mark or insert what trains; the model is changed in place.

        Args:
            model: A `GloVLMModel` with a joint space, everything frozen.
            processor: Its processor.
            classes: The classes in label order.
            config: An instance of `Config`.
        """


METHODS: dict[str, Method] = {}


def register(method: type[Method]) -> type[Method]:
    """List a method in the table; refuse one that does not say what it is."""
    for attribute in ("name", "family", "trains", "needs_text", "citation"):
        if not hasattr(method, attribute):
            raise TypeError(f"{method.__name__} must state '{attribute}'.")
    if method.name in METHODS:
        raise TypeError(f"There is already a method '{method.name}'.")
    METHODS[method.name] = method()
    return method


def get_method(name: str) -> Method:
    """Find a method by its name.

    Raises:
        GloVLMError: There is none; names the nearest.
    """
    if name not in METHODS:
        raise GloVLMError(
            f"Unknown method '{name}': `glovlm methods` lists {', '.join(METHODS)}."
            f"{nearest(name, METHODS)}"
        )
    return METHODS[name]


def give_joint_space(
    model: Any, pooled: Tensor, labels: Tensor, prototypes: Tensor, penalty: float = 1.0
) -> None:
    """Start a pair's projection from a ridge fit of image vectors onto their class texts.

    Minimises `sum_i |W (x_i - mean x) - (t_i - mean t)|^2 + lambda |W|^2` in closed form, classes
    weighted equally, with `lambda = penalty * trace(X^T X) / n`: the penalty is relative to the
    spread of the data, so no setting depends on the scale of a tower's features.

    Args:
        model: A `GloVLMModel` of two towers without a joint space; changed in place.
        pooled: Pooled image vectors of the support `[n, width]`.
        labels: Class numbers `[n]`.
        prototypes: Unit class text features `[K, dim]`.
        penalty: Relative strength of the ridge.
    """
    weight = 1.0 / torch.bincount(labels, minlength=len(prototypes)).clamp(min=1)[labels].double()
    weight = (weight / weight.sum()).unsqueeze(1)
    x, t = pooled.double(), prototypes.double()[labels]
    x_mean, t_mean = (weight * x).sum(0), (weight * t).sum(0)
    x, t = (x - x_mean) * weight.sqrt(), (t - t_mean) * weight.sqrt()
    gram = x @ x.T  # n x n: the support is far smaller than the feature
    ridge = penalty * gram.trace().clamp(min=1e-12) / len(x)
    inverse = torch.linalg.solve(gram + ridge * torch.eye(len(x), dtype=gram.dtype), t)
    matrix = (x.T @ inverse).T
    model.backbone.set_visual_projection(matrix, t_mean - matrix @ x_mean)
