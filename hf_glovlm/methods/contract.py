"""Interface of an adaptation method: a name, a typed config, a recipe, and one of three kinds.

Features are computed in `inference`, the training loop is in `training`.
"""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError, nearest
from ..model.heads import prototype_head
from ..settings import Settings, read_values, setting

if TYPE_CHECKING:
    from datasets import Dataset

Family = Literal["training-free", "feature side", "text side", "image side", "both sides"]

Validation = Literal["none", "search", "early stopping"]


@dataclass(frozen=True)
class Recipe:
    """Training recipe: optimiser, learning-rate schedule, epochs and batches.

    A paper's numbers stand as they are; those that a user gives in their place are checked.

    Args:
        lr: Learning rate of a group that does not set its own.
        epochs: Passes over the support.
        batch_size: Images per step over all processes.
        weight_decay: Of the optimiser.
        optimizer: `adamw`, `adam` (whose weight decay is part of the gradient), or `sgd` (momentum
            0.9).
        schedule: `constant`, `cosine` down to `final_lr` times the rate, or `steps`: halved after
            each quarter.
        final_lr: Fraction of the rate at the end of a cosine.
        warmup_epochs: Epochs at `warmup_lr` before the schedule begins.
        warmup_lr: The rate of these epochs.
        patience: Epochs without a better validation macro-AUC before stopping, if there is
            validation; without it every epoch is run and the last state kept.
        min_delta: The least gain in macro-AUC that counts as better.
        steps: Optimiser steps in all, where a paper counts these; `epochs` is then not used.
        by_step: Whether the schedule moves at every step rather than every epoch.
        eps: Of Adam and AdamW.
        sampling: `shuffled`: every image once an epoch; `class_balanced`: as many draws with
            replacement, each class as often as any other.
    """

    lr: float = setting(help="Learning rate.", above=0)
    epochs: int = setting(help="Passes over the support.", above=0, most=10**6)
    batch_size: int = setting(help="Images per step.", above=0, most=2**31 - 1)
    weight_decay: float = setting(0.01, help="Of the optimiser.", least=0)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    final_lr: float = setting(0.0, help="Fraction at the end of a cosine.", least=0, most=1)
    warmup_epochs: int = setting(0, help="Epochs at `warmup_lr`.", least=0, most=10**6)
    warmup_lr: float = setting(1e-5, help="The rate of these epochs.", least=0)
    patience: int = setting(7, help="Epochs without a gain.", least=0, most=10**6)
    min_delta: float = setting(0.001, help="The least gain that counts.", least=0)
    steps: int | None = setting(None, help="Optimiser steps in all.", above=0, most=10**9)
    by_step: bool = False
    eps: float = setting(1e-8, help="Of Adam and AdamW.", above=0)
    sampling: Literal["shuffled", "class_balanced"] = "shuffled"


WARM_COSINE: dict[str, Any] = {"schedule": "cosine", "warmup_epochs": 1, "warmup_lr": 1e-5}


def coop_recipe(epochs: int, lr: float = 2e-3, batch_size: int = 32) -> Recipe:
    """CoOp's optimiser: SGD, one epoch at 1e-5, then a cosine that moves by epoch."""
    shared: dict[str, Any] = {"weight_decay": 5e-4, "optimizer": "sgd", **WARM_COSINE}
    return Recipe(lr=lr, epochs=epochs, batch_size=batch_size, **shared)


def coop_epochs(shots: int) -> int:
    """CoOp's epochs: 50 for one shot, 100 up to four, then 200."""
    return 50 if shots <= 1 else 100 if shots <= 4 else 200


@dataclass(frozen=True)
class Support:
    """Support set: the labelled images, as a method on features takes them; no test label.

    Args:
        features: Image features `[n, dim]`, not normalised; pooled vectors `[n, width]` for a
            method with `on_pooled`.
        labels: Class numbers `[n]`; classes may be unbalanced, one image is enough.
        num_classes: Number of classes K.
        prototypes: Unit class text features `[K, dim]`. On towers without a joint space the unit
            class means of the support stand in for them (`class_means`), and the results say so.
        logit_scale: Factor between cosines and logits of the backbone.
        seed: Of everything random.
        query: Features of the unlabelled query batch `[m, dim]`, for transductive methods alone.
        prompt_features: Per class, unit features of each of its prompts `[P_k, dim]`, for methods
            with `needs_prompt_features`.
        projection: The backbone's last projection `[dim, width]`, for methods with `on_pooled`;
            `None` where there is none that is linear, and width is dim.
        projection_bias: Its bias `[dim]`, where it has one.
        validation: Features and labels of further labelled images, which count as labels.
        views: Features of augmented views of each image `[n, V, dim]`, to be learned from in place
            of `features`; a label counts once, however many views.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    prototypes: Tensor | None = None
    logit_scale: float = 100.0
    seed: int = 0
    query: Tensor | None = None
    prompt_features: list[Tensor] | None = None
    projection: Tensor | None = None
    projection_bias: Tensor | None = None
    validation: tuple[Tensor, Tensor] | None = None
    views: Tensor | None = None

    @property
    def averages(self) -> Tensor:
        """Mean of each image's views, of length one each `[n, dim]`; else its feature."""
        if self.views is None:
            return self.features
        return nn.functional.normalize(self.views, dim=-1).mean(1)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Features and labels of all views `[n V, dim]`, `[n V]`; else of the images."""
        if self.views is None:
            return self.features, self.labels
        return self.views.flatten(0, 1), self.labels.repeat_interleave(self.views.shape[1])

    @property
    def texts(self) -> Tensor:
        """Class prototypes `[K, dim]`, of a method that needs them (checked before)."""
        assert self.prototypes is not None
        return self.prototypes


@dataclass
class Fitted:
    """Fitted classifier.

    Args:
        head: A `Head` of `model/heads.py`: features in, logits out.
        notes: Sentences for the results.
        facts: Numbers that were measured or chosen, for the results.
        query_logits: `[m, K]` of a transductive method for `Support.query`; its results are
            measured on these, while the head is what remains for other images.
        variants: Further heads whose spread is reported (sampled prompt sets).
    """

    head: nn.Module
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    query_logits: Tensor | None = None
    variants: list[nn.Module] = field(default_factory=list)


@dataclass(frozen=True)
class Fold:
    """Cross-validation fold: fit on the support, score on labelled features of other groups."""

    support: Support
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StepState:
    """Training step, as the further losses of a tower method take it.

    Args:
        features: Unit image features `[n, dim]`; as they are for a method with `raw_logits`.
        prototypes: Unit class prototypes `[K, dim]`, or one set an image `[n, K, dim]`.
        logits: Scaled cosines `[n, K]`, or dot products.
        labels: Class numbers `[n]`.
        weight: `[n]`, 0 for rows that only pad.
    """

    features: Tensor
    prototypes: Tensor
    logits: Tensor
    labels: Tensor
    weight: Tensor


@dataclass(frozen=True)
class NoConfig(Settings):
    """Settings of a method that has none."""


class Method(ABC):
    """Adaptation method; subclass one of the three below and decorate with `register`.

    Attributes:
        name: On the command line.
        family: What it touches.
        trains: What changes, in words.
        needs_text: Whether it uses class texts.
        saves_adapter: Whether it leaves a PEFT adapter beside the merged model.
        transductive: Whether it uses the unlabelled query batch.
        validation: What further labels would be used for, if they are given.
        needs_prompt_features: Whether it takes the features of every single prompt.
        on_pooled: Whether it takes image vectors before the backbone's last projection.
        citation: Where it comes from.
        Config: Its settings, defaults from its paper.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    trains: ClassVar[str]
    needs_text: ClassVar[bool] = True
    saves_adapter: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    validation: ClassVar[Validation] = "none"
    needs_prompt_features: ClassVar[bool] = False
    on_pooled: ClassVar[bool] = False
    citation: ClassVar[str]
    Config: ClassVar[type] = NoConfig

    def configure(self, settings: Mapping[str, Any]) -> Any:
        """Typed config from plain settings.

        Raises:
            GloVLMError: A setting is unknown, of the wrong type, or out of range.
        """
        about = f"of method '{self.name}'"
        owner = f"Method '{self.name}'"
        return self.Config(**read_values(self.Config, settings, about=about, unknown=owner))

    def prompts(self, classes: Sequence[ClassInfo], config: Any) -> list[list[str]]:
        """Prompts: the texts that stand for each class."""
        return [list(c.prompts) for c in classes]

    def describe(self) -> dict[str, Any]:
        """One row of `glovlm methods`."""
        shown = (
            *("name", "family", "trains", "needs_text", "validation", "transductive"),
            "saves_adapter",
        )
        row = {name: getattr(self, name) for name in shown}
        settings = dataclasses.asdict(self.Config())
        return row | {"settings": settings, "citation": self.citation}


class FeatureMethod(Method):
    """Method on frozen features with a closed form or a solver of its own.

    Attributes:
        grid: Values of settings among which `choose` searches, if it is given labelled folds.
    """

    grid: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @abstractmethod
    def fit(self, support: Support, config: Any) -> Fitted:
        """Fit the head to the support."""

    def choose(self, folds: Sequence[Fold], config: Any) -> Any:
        """Hyperparameter search on labelled images of groups that the method was not fitted on.

        Every combination of `grid` is fitted on each fold's support. The highest balanced accuracy
        over all folds wins, ties by the mean log-likelihood, then the setting that was given.

        Args:
            folds: One (validation) or many (leave one group out).
            config: The settings to depart from.
        """
        best, best_score = config, self._score(folds, config)
        for values in itertools.product(*self.grid.values()):
            candidate = dataclasses.replace(config, **dict(zip(self.grid, values, strict=True)))
            score = self._score(folds, candidate)
            if score > best_score:
                best, best_score = candidate, score
        return best

    def _score(self, folds: Sequence[Fold], config: Any) -> tuple[float, float]:
        logits, labels = [], []
        for fold in folds:
            head = self.fit(fold.support, config).head.eval()
            with torch.no_grad():
                logits.append(head(fold.features.float()).double())
            labels.append(fold.labels)
        return score_logits(torch.cat(logits), torch.cat(labels))


class HeadMethod(Method):
    """Method on frozen features whose head the loop trains with cross-entropy.

    Attributes:
        on_unit: Whether what `build` makes begins by normalising its features, and has `compare`
            for those that are normalised: they are then once, not at every step.
    """

    on_unit: ClassVar[bool] = False
    family: ClassVar[Family] = "feature side"
    validation: ClassVar[Validation] = "early stopping"

    @abstractmethod
    def recipe(self, shots: int, config: Any) -> Recipe:
        """Training recipe, given the largest number of shots of any class."""

    @abstractmethod
    def build(self, support: Support, config: Any) -> nn.Module:
        """Untrained head; its parameters that require a gradient train."""

    def penalty(self, head: nn.Module, support: Support, config: Any) -> Tensor | None:
        """Regulariser that is added to the mean loss of every step, if any."""
        return None

    def finish(self, head: nn.Module, support: Support, config: Any, model: Any | None) -> Fitted:
        """Turn the trained module into a `Head`.

        Args:
            head: What `build` made, trained.
            support: What it was trained on, with `validation` where there is some.
            config: An instance of `Config`.
            model: The `GloVLMModel`, whose projection may be changed; `None` for bare features.
        """
        return Fitted(head)


class TowerMethod(Method):
    """Method that trains inside the towers.

    The table holds an instance without a model; `attach` returns another that works on one model.
    A method overrides `build`, and of the other steps those in which it does something.

    Attributes:
        trains_vision: Whether the vision tower changes; if not, images are encoded once.
        trains_text: Whether class prototypes change from step to step.
        whole_batch: Whether `penalty` or `reference_loss` must see the batch whole; it is then
            neither split among processes nor accumulated.
        per_image: Whether `image_prototypes` makes prototypes for each image (CoCoOp). This and
            the next two go with the loss `prototypes` only.
        guides_images: Whether `guide_images` surrounds the image pass of a training step (ConVLM).
        raw_logits: Whether logits are dot products of unnormalised image features with the unit
            prototypes, without a factor.
        model: The `GloVLMModel` that is adapted in place; set by `attach`, as are those below.
        processor: Its processor.
        classes: The classes in label order.
        config: An instance of `Config`.
        class_texts: Per class, the texts of its prototype.
        groups: Optimiser groups: `{"params": [...], "lr": ..., "weight_decay": ...}`, the last two
            where they are not the recipe's.
        notes: Sentences for the results.
        facts: Numbers that were measured or chosen, for the results.
    """

    validation: ClassVar[Validation] = "early stopping"
    trains_vision: bool = False
    trains_text: bool = False
    whole_batch: bool = False
    per_image: bool = False
    guides_images: bool = False
    raw_logits: bool = False
    model: Any
    processor: Any
    classes: Sequence[ClassInfo]
    config: Any
    class_texts: list[list[str]]
    groups: list[dict[str, Any]]
    notes: list[str]
    facts: dict[str, Any]

    @abstractmethod
    def recipe(self, shots: int, config: Any) -> Recipe:
        """Training recipe, given the largest number of shots of any class."""

    def attach(self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: Any) -> Self:
        """Attach the method to a model.

        Args:
            model: A `GloVLMModel` with a joint space, everything frozen; changed in place.
            processor: Its processor.
            classes: The classes in label order.
            config: An instance of `Config`.
        """
        attached = type(self)()
        attached.model, attached.processor = model, processor
        attached.classes, attached.config = classes, config
        attached.class_texts = self.prompts(classes, config)
        attached.groups, attached.notes, attached.facts = [], [], {}
        attached.build()
        return attached

    @abstractmethod
    def build(self) -> None:
        """Mark or insert what trains, and list it in `groups`."""

    def train_projection(self) -> None:
        """Train the projection of a pair of towers too; a trained dual encoder keeps its own."""
        if self.model.config.is_pair:
            projection = self.model.backbone.visual_projection.requires_grad_(True)
            parameters = list(projection.parameters())
            self.groups.append({"params": parameters, "lr": self.config.projection_lr})

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters, group by group."""
        return [p for group in self.groups for p in group["params"]]

    def read_support(self, support: "Dataset") -> None:
        """Take what is needed of the labelled rows, before anything is encoded for training."""

    def pretrain(self, fetch: Callable[[Sequence[int]], Tensor], labels: Tensor, seed: int) -> None:
        """Pretraining of what the method adds, on the towers as they come.

        Every process does the same.

        Args:
            fetch: Preprocessed images of the support by index; pooled vectors without
                `trains_vision`.
            labels: Class numbers `[n]`.
            seed: Of everything random.
        """

    def begin(self, steps: int) -> None:
        """Start of training, of so many optimiser steps in all."""

    def after_step(self, step: int) -> None:
        """End of an optimiser step, counted from 1; the gradients are still there."""

    def guide_images(
        self, labels: Tensor, rows: Tensor, prototypes: Tensor
    ) -> AbstractContextManager[Any]:
        """Surround the image pass of a training step, where `guides_images`.

        Args:
            labels: Class numbers `[n]` of this process's images.
            rows: Their row numbers in the support `[n]`.
            prototypes: Unit class prototypes `[K, dim]`.
        """
        return nullcontext()

    def image_prototypes(self, features: Tensor) -> Tensor:
        """Unit class prototypes of each image `[n, K, dim]` from unit features, if `per_image`."""
        raise NotImplementedError

    def penalty(self, state: StepState) -> Tensor | None:
        """Regulariser that is added to the loss of a step, a mean over its images, if any."""
        return None

    def reference_loss(self, state: StepState) -> Tensor | None:
        """A loss whose gradient that of the cross-entropy is kept from opposing (ProGrad)."""
        return None

    def finish(self, folder: Path | None) -> None:
        """Put what trained into the towers' own weights, after the last step.

        Args:
            folder: Takes the adapter alone, before it is merged; `None` writes none.
        """

    def final_head(self, prototypes: Tensor) -> nn.Module:
        """The `Head` that remains, from the final class prototypes `[K, dim]`."""
        scale = 1.0 if self.raw_logits else self.model.logit_scale.exp().item()
        return prototype_head(prototypes, scale, raw=self.raw_logits)


METHODS: dict[str, Method] = {}


def register(method: type[Method]) -> type[Method]:
    """Add a method to the table; every attribute that describes it must be there."""
    for attribute in ("name", "family", "trains", "citation"):
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
    if not isinstance(name, str):
        raise GloVLMError(
            f"Expected the name of a method, found {type(name).__name__}: `glovlm methods` lists "
            f"{', '.join(METHODS)}."
        )
    if name not in METHODS:
        raise GloVLMError(
            f"Unknown method '{name}': `glovlm methods` lists {', '.join(METHODS)}."
            f"{nearest(name, METHODS)}"
        )
    return METHODS[name]


def score_logits(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Balanced accuracy over the classes present, and the mean log-likelihood.

    Args:
        logits: `[n, K]`.
        labels: `[n]`.
    """
    weight = 1.0 / torch.bincount(labels, minlength=logits.shape[1]).double()[labels]
    right = (logits.argmax(1) == labels).double()
    likelihood = -nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return tuple(float((weight * value).sum() / weight.sum()) for value in (right, likelihood))  # type: ignore[return-value]


def give_joint_space(
    model: Any, pooled: Tensor, labels: Tensor, prototypes: Tensor, penalty: float = 1.0
) -> None:
    """Ridge regression from image vectors to class texts, where a pair's projection starts.

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
