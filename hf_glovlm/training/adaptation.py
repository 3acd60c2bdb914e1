"""`adapt`: a backbone, a method and a few labelled images in, a classifier out."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones import load_backbone
from ..errors import GloVLMError
from ..inference import FeatureCache, embed_images, embed_prompts
from ..methods import (
    FeatureMethod,
    Fitted,
    Fold,
    HeadMethod,
    Method,
    Recipe,
    Support,
    TowerMethod,
    Tuning,
    get_method,
    give_joint_space,
)
from ..model.heads import ClassWeights, class_means, prototype_head
from .loop import BatchSource, ImageSource, TensorSource, fit, plan, seed_everything
from .losses import HeadStep, Loss, TowerStep

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from ..data import ClassInfo

MIN_GROUPS_TO_CHOOSE = 4  # a class; leave-one-out on fewer was measured to tell nothing


@dataclass
class Adapted:
    """What `adapt` returns.

    Args:
        model: A `GloVLMForImageClassification`; save it, put it into a pipeline, predict with it.
        processor: Its `GloVLMProcessor`.
        settings: The method's config, as it was used.
        recipe: How it was trained; `None` for closed forms.
        log: One row an epoch.
        trainable_parameters: How many numbers trained.
        frozen_tower: Whether the vision tower is as it came, so that cached features serve.
        notes: Sentences for the results.
        facts: Numbers that the method found or chose.
        query_logits: What a transductive method says about the query images `[m, classes]`.
        variants: Further heads whose spread is reported.
    """

    model: Any
    processor: Any
    settings: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    trainable_parameters: int
    frozen_tower: bool
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    query_logits: Tensor | None = None
    variants: list[nn.Module] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write weights in fp32, the model's code, processor and prompts."""
        self.model.float().save_pretrained(folder)
        self.processor.save_pretrained(folder)


@dataclass
class AdaptedFeatures:
    """What `adapt_features` returns.

    Args:
        head: Features in, logits out.
        dim: Width of the features.
        settings: The method's config, as it was used.
        recipe: How it was trained; `None` for closed forms.
        log: One row an epoch.
        notes: Sentences that belong beside its numbers.
        facts: Numbers that the method found or chose.
        query_logits: What a transductive method says about the query features `[m, classes]`.
    """

    head: nn.Module
    dim: int
    settings: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    notes: list[str]
    facts: dict[str, Any]
    query_logits: Any = None

    def predict_logits(self, features: Any) -> Any:
        """Logits `[n, classes]` of features `[n, dim]`, as an array of numpy in float32."""
        rows = _matrix(features, "features")
        if rows.shape[1] != self.dim:
            raise GloVLMError(f"Expected features of width {self.dim}, found {rows.shape[1]}.")
        with torch.inference_mode():
            return self.head.eval()(rows).numpy()


@dataclass(frozen=True)
class _Training:
    """How to train, apart from the method's own recipe."""

    overrides: Mapping[str, Any]
    max_steps: int | None
    accelerator: "Accelerator | None"
    device: torch.device
    options: dict[str, Any]
    replay: bool = True

    def recipe(
        self, method: HeadMethod | TowerMethod, labels: Tensor, config: Any
    ) -> tuple[Recipe, list[str]]:
        """The method's recipe with what the user overrides, cut if it is too long."""
        n = len(labels)
        shots = int(labels.bincount().max()) if n else 0
        recipe = Recipe(**{**asdict(method.recipe(shots, config)), **self.overrides})
        recipe = replace(recipe, batch_size=min(recipe.batch_size, max(n, 1)))
        if "epochs" in self.overrides:
            recipe = replace(recipe, steps=None)
        _, steps = plan(recipe, n)
        if self.max_steps is None or steps <= self.max_steps:
            return recipe, []
        note = f"Cut to {self.max_steps} of the recipe's {steps} steps; its schedule is shortened."
        return replace(recipe, steps=self.max_steps), [note]

    def accelerate(self) -> "Accelerator":
        """The accelerator that was given, or a plain one."""
        if self.accelerator is not None:
            return self.accelerator
        from accelerate import Accelerator

        return Accelerator(cpu=self.device.type == "cpu")

    def adapter_folder(self) -> Path | None:
        """Where an adapter alone goes, emptied; `None` where this process writes nothing."""
        folder: Path | None = self.options["output_dir"]
        main = self.accelerator is None or self.accelerator.is_main_process
        if folder is None or not main:
            return None
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        return folder / "adapter"


@dataclass(frozen=True)
class _Images:
    """The images of a task, and the model that encodes them."""

    model: Any
    processor: Any
    classes: Sequence["ClassInfo"]
    support: "Dataset"
    labels: Tensor
    validation: "Dataset | None"
    query: "Dataset | None"
    augment: bool
    device: torch.device
    cache: FeatureCache | None

    def embed(self, images: "Dataset", project: bool) -> Tensor:
        """Features of some of them, each encoded once."""
        found = embed_images(
            self.model, self.processor, images,
            device=self.device, cache=self.cache, project=project,
        )  # fmt: skip
        return torch.from_numpy(found)

    def embed_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """One prototype a class."""
        return torch.from_numpy(embed_prompts(self.model, self.processor, prompts))


@dataclass
class _Found:
    """What a method on features came to."""

    fitted: Fitted
    config: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    trained: int


@dataclass
class _Outcome(_Found):
    """What any method came to, before the model is put together."""

    prompts: list[list[str]]
    frozen_tower: bool


def adapt(
    model: Any,
    method: str,
    support: "Dataset",
    *,
    processor: Any = None,
    classes: Sequence["ClassInfo"] | None = None,
    settings: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    loss: Loss = "prototypes",
    validation: "Dataset | None" = None,
    query: "Dataset | None" = None,
    groups: Sequence[str] | None = None,
    cross_validate: bool = False,
    max_steps: int | None = None,
    seed: int = 0,
    augment: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    accelerator: "Accelerator | None" = None,
    cache: FeatureCache | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    replay: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Adapted:
    """Adapt a backbone to a task from a few labelled images. No test label can be passed in.

    Args:
        model: A `GloVLMModel`, which is changed and taken over, or a backbone's name.
        method: A name of `METHODS`.
        support: Labelled rows with `image` and `label` (a `ClassLabel`).
        processor: The model's processor; loaded with it when `model` is a name.
        classes: Names and prompts in label order; from the labels' names when not given.
        settings: Settings of the method.
        recipe: Overrides of its recipe (`epochs`, `lr`, `weight_decay`, `batch_size`).
        loss: See `TrainConfig`.
        validation: Further labelled rows, to stop early or to choose settings; they count as
            labels.
        query: The images that a transductive method may look at; a label column is not read.
        groups: Patient, case or slide of each support row, for `cross_validate`.
        cross_validate: Choose settings by leaving out one group at a time.
        max_steps: Most optimiser steps; a longer recipe is cut, and the results say so.
        seed: Of initialisation, order, dropout and augmentation.
        augment: See `TrainConfig`.
        accumulate: See `TrainConfig`.
        clip_norm: See `TrainConfig`.
        accelerator: For many processes or mixed precision; made when needed.
        cache: Keeps features of the frozen tower.
        output_dir: Takes the log, the checkpoint and the adapter.
        resume: Go on from the checkpoint there.
        replay: Run blocks that no step changes once rather than at every step; the same result.
        on_epoch: Told of every epoch.

    Returns:
        The adapted model with its head, and how it came about.

    Raises:
        GloVLMError: A class has no image, the method needs what is not there, or the loss became
            NaN.
    """
    from ..data import load_classes

    if isinstance(model, str):
        model, processor = load_backbone(model)
    chosen = get_method(method)
    config = chosen.configure(settings or {})
    if classes is None:
        classes = load_classes(support.features["label"].names)
    labels = _labels(support)
    _check_support(chosen, labels, [c.name for c in classes])
    _check_settings(chosen, model, recipe, augment, cross_validate)

    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    model.to(device).requires_grad_(False)
    seed_everything(seed)
    images = _Images(
        model, processor, classes, support, labels, validation, query, augment, device, cache
    )
    options: dict[str, Any] = {
        "seed": seed,
        "clip_norm": clip_norm,
        "accumulate": accumulate,
        "output_dir": Path(output_dir) if output_dir is not None else None,
        "resume": resume,
        "on_epoch": on_epoch,
    }
    training = _Training(recipe or {}, max_steps, accelerator, device, options, replay)
    if isinstance(chosen, TowerMethod):
        outcome = _adapt_towers(images, chosen, config, loss, training)
    else:
        left_out = groups if cross_validate else None
        outcome = _adapt_on_features(images, chosen, config, training, left_out)
    return _put_together(images, outcome)


def _check_settings(
    method: Method,
    model: Any,
    recipe: Mapping[str, Any] | None,
    augment: bool,
    cross_validate: bool,
) -> None:
    """Refuse zero-shot where it would be chance, and settings that would change nothing."""
    if method.name == "zero_shot" and not model.has_joint_space:
        raise GloVLMError(
            f"'{model.config.backbone_name}' joins two encoders that were never trained together: "
            "zero-shot would be chance. Use a method that learns from the labelled images "
            "(linear_probe, lora), or a backbone with a joint space (mini, plip)."
        )
    inside = isinstance(method, TowerMethod)
    if cross_validate and inside:
        raise GloVLMError(
            f"Method '{method.name}' has no setting to choose by leaving groups out: use "
            "--validation-shots to stop early, or leave --cross-validate out."
        )
    if recipe and isinstance(method, FeatureMethod):
        raise GloVLMError(
            f"Method '{method.name}' is solved, not trained in epochs: it has no "
            f"{', '.join(recipe)} to set. Leave that out, or see `glovlm methods --json` for its "
            "settings."
        )
    if augment and not inside:
        raise GloVLMError(
            f"Method '{method.name}' works on features that are computed once, so --augment would "
            "change nothing: leave it out, or use a method inside the towers (lora)."
        )


def _put_together(images: _Images, outcome: _Outcome) -> Adapted:
    """The backbone with its head, classes and prompts, and how it came about."""
    from ..model import GloVLMForImageClassification

    model, fitted = images.model, outcome.fitted
    names = [c.name for c in images.classes]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    model.config.prompts = outcome.prompts
    model.requires_grad_(True)
    head = fitted.head.requires_grad_(True).to(images.device, model.dtype)
    classifier = GloVLMForImageClassification(model.config, glovlm=model, head=head)
    return Adapted(
        model=classifier.eval(),
        processor=images.processor,
        settings=outcome.config,
        recipe=outcome.recipe,
        log=outcome.log,
        trainable_parameters=outcome.trained,
        frozen_tower=outcome.frozen_tower,
        notes=fitted.notes,
        facts=fitted.facts,
        query_logits=fitted.query_logits,
        variants=fitted.variants,
    )


def adapt_features(
    method: str,
    support_features: Any,
    support_labels: Any,
    text_features: Any = None,
    *,
    logit_scale: float = 100.0,
    query_features: Any = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> AdaptedFeatures:
    """Run a method on bare features, so that embeddings from any tool serve without a backbone.

    Args:
        method: A name of `METHODS` that works on features.
        support_features: `[n, dim]`.
        support_labels: Class numbers `[n]`, 0 ... K-1, each at least once.
        text_features: `[K, dim]`, one a class; where there are none, the class means of the support
            stand in for them in methods that need them.
        logit_scale: Factor between cosines and logits (CLIP: 100).
        query_features: `[m, dim]`, for transductive methods.
        seed: Of everything random.
        config: Settings of the method.

    Returns:
        An object with `predict_logits(features) -> [n, classes]`.

    Raises:
        GloVLMError: The method works inside a tower; shapes do not fit; a class has no row.
    """
    chosen = get_method(method)
    settings = chosen.configure(config or {})
    if not isinstance(chosen, FeatureMethod | HeadMethod):
        fitting = ", ".join(n for n, m in _methods() if isinstance(m, FeatureMethod | HeadMethod))
        raise GloVLMError(
            f"Method '{method}' trains inside a tower, so features alone do not do: use `adapt`, "
            f"or a method on features ({fitting})."
        )
    features = _matrix(support_features, "support_features")
    labels = _whole_numbers(support_labels, len(features))
    prototypes = None if text_features is None else _matrix(text_features, "text_features")
    if prototypes is not None and prototypes.shape[1] != features.shape[1]:
        raise GloVLMError(
            f"Image and text features must have one width; found {features.shape[1]} and "
            f"{prototypes.shape[1]}."
        )
    num_classes = _count_classes(labels, prototypes)
    _check_support(chosen, labels, [f"class {k}" for k in range(num_classes)])
    if chosen.name == "zero_shot" and prototypes is None:
        raise GloVLMError("Method 'zero_shot' compares with class texts: give text_features.")
    stands_in = prototypes is None and chosen.needs_text
    if stands_in:
        prototypes = class_means(features, labels, num_classes)
    elif prototypes is not None:
        prototypes = nn.functional.normalize(prototypes, dim=-1)
    query = None if query_features is None else _matrix(query_features, "query_features")
    single = None if prototypes is None else list(prototypes.unsqueeze(1))
    given = Support(features, labels, num_classes, prototypes, logit_scale, seed, query, single)
    seed_everything(seed)
    training = _Training({}, None, None, torch.device("cpu"), {"seed": seed})
    found = _fit_features(chosen, settings, given, training, None, None, stands_in=stands_in)
    logits = found.fitted.query_logits
    return AdaptedFeatures(
        head=found.fitted.head.eval(),
        dim=features.shape[1],
        settings=found.config,
        recipe=found.recipe,
        log=found.log,
        notes=found.fitted.notes,
        facts=found.fitted.facts,
        query_logits=None if logits is None else logits.numpy(),
    )


def _whole_numbers(labels: Any, n: int) -> Tensor:
    """Class numbers `[n]`, whatever they came as."""
    numbers = torch.as_tensor(labels)
    if numbers.is_floating_point() or numbers.shape != (n,):
        raise GloVLMError(
            f"Expected {n} whole class numbers as support_labels, found {tuple(numbers.shape)} of "
            f"{numbers.dtype}."
        )
    return numbers.long()


def _count_classes(labels: Tensor, prototypes: Tensor | None) -> int:
    """How many classes there are: the rows of the texts if there are any, else by the labels."""
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    num_classes = highest + 1 if prototypes is None else len(prototypes)
    if lowest < 0 or highest >= num_classes:
        raise GloVLMError(
            f"Class numbers go from 0 to {num_classes - 1} (one row of text_features a class); "
            f"found {lowest} to {highest}."
        )
    return num_classes


# ------------------------------------------------------------------------- methods on features


def _adapt_on_features(
    images: _Images,
    method: Method,
    config: Any,
    training: _Training,
    groups: Sequence[str] | None,
) -> _Outcome:
    """Encode every image once and fit a head; the vision tower stays as it is."""
    given = _describe_support(images, method, config, training.options["seed"])
    stands_in = method.needs_text and not images.model.has_joint_space
    found = _fit_features(
        method, config, given, training, images.model, groups, stands_in=stands_in
    )
    prompts = method.prompts(images.classes, config)
    return _Outcome(**vars(found), prompts=prompts, frozen_tower=True)


def _describe_support(images: _Images, method: Method, config: Any, seed: int) -> Support:
    """The support as a method on features sees it."""
    model, support, labels = images.model, images.support, images.labels
    projection = _linear_projection(model) if method.on_pooled else None
    project = projection is None
    validation = None
    if images.validation is not None:
        validation = images.embed(images.validation, project), _labels(images.validation)
    features = torch.zeros(0, model.config.image_feature_dim)
    if len(support):
        features = images.embed(support, project)
    prototypes, single, scale = None, None, model.logit_scale.exp().item()
    if method.needs_text and model.has_joint_space:
        prompts = method.prompts(images.classes, config)
        prototypes = images.embed_texts(prompts)
        if method.needs_prompt_features:
            each = images.embed_texts([[text] for texts in prompts for text in texts])
            single = list(each.split([len(texts) for texts in prompts]))
    elif method.needs_text:
        projected = features if project else images.embed(support, True)
        prototypes, scale = class_means(projected, labels, len(images.classes)), 100.0
        single = list(prototypes.unsqueeze(1))
    return Support(
        features=features,
        labels=labels,
        num_classes=len(images.classes),
        prototypes=prototypes,
        logit_scale=scale,
        seed=seed,
        query=images.embed(images.query, project) if images.query is not None else None,
        prompt_features=single,
        projection=None if projection is None else _float(projection.weight),
        projection_bias=None if projection is None else _float(projection.bias),
        validation=validation,
    )


def _fit_features(
    method: Method,
    config: Any,
    given: Support,
    training: _Training,
    model: Any | None,
    groups: Sequence[str] | None,
    *,
    stands_in: bool,
) -> _Found:
    """Run a method on features: choose settings where there is something to choose on, then fit."""
    notes: list[str] = []
    facts: dict[str, Any] = {}
    if stands_in:
        facts["joint_space"] = False
        notes.append(
            "No joint space of images and texts: the class means of the support stood in for the "
            "class texts, so no text had a part in this."
        )
    recipe, log = None, []
    if isinstance(method, HeadMethod):
        if groups is not None:
            raise _nothing_to_choose(method)
        head = method.build(given, config).to(training.device)
        recipe, cut = training.recipe(method, given.labels, config)
        notes += cut
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        log = _fit_head(method, head, given, config, recipe, training)
        fitted = method.finish(head.cpu().eval(), given, config, model)
    else:
        assert isinstance(method, FeatureMethod)
        folds: list[Fold] = []
        if groups is not None:
            if method.validation != "search":
                raise _nothing_to_choose(method)
            folds, said = _leave_groups_out(given, groups, stands_in)
            notes.append(said)
        elif given.validation is not None and method.validation == "search":
            folds = [Fold(replace(given, validation=None), *given.validation)]
            notes.append("Settings were chosen on the validation labels, which count as labels.")
        elif given.validation is not None and method.validation == "none":
            notes.append(
                "This method has nothing to choose: the validation labels were not used, but count."
            )
        if folds:
            config = method.choose(folds, config)
            facts["chosen_settings"] = asdict(config)
        fitted = method.fit(given, config)
        weights = fitted.head.named_parameters()
        fixed = ("scale", "text.scale", "alpha", "beta")
        trained = 0
        if method.name != "zero_shot":
            trained = sum(p.numel() for n, p in weights if n not in fixed)
    if stands_in and isinstance(fitted.head, ClassWeights):
        fitted.head.cosine = False  # its rows are no texts
    fitted.notes = [*notes, *fitted.notes]
    fitted.facts = {**facts, **fitted.facts}
    return _Found(fitted, config, recipe, log, trained)


def _leave_groups_out(
    given: Support, groups: Sequence[str], stands_in: bool
) -> tuple[list[Fold], str]:
    """One fold for each group, if every class has enough of them; a sentence for the results."""
    held = [
        len({g for g, k in zip(groups, given.labels.tolist(), strict=True) if k == c})
        for c in range(given.num_classes)
    ]
    if min(held) < MIN_GROUPS_TO_CHOOSE:
        return [], (
            f"Settings were kept at their defaults: choosing by leaving groups out needs "
            f"{MIN_GROUPS_TO_CHOOSE} groups of every class, and one has {min(held)}."
        )
    folds = []
    for name in sorted(set(groups)):
        out = torch.tensor([g == name for g in groups])
        features, labels = given.features[~out], given.labels[~out]
        prototypes = given.prototypes
        if stands_in:
            prototypes = class_means(features, labels, given.num_classes)
        inner = replace(
            given, features=features, labels=labels, prototypes=prototypes, validation=None
        )
        folds.append(Fold(inner, given.features[out], given.labels[out]))
    return folds, f"Settings were chosen by leaving out each of {len(folds)} groups in turn."


def _nothing_to_choose(method: Method) -> GloVLMError:
    able = ", ".join(name for name, m in _methods() if m.validation == "search")
    return GloVLMError(
        f"Method '{method.name}' has no setting to choose by leaving groups out (these have: "
        f"{able}): leave --cross-validate out."
    )


def _fit_head(
    method: HeadMethod,
    head: nn.Module,
    given: Support,
    config: Any,
    recipe: Recipe,
    training: _Training,
) -> list[dict[str, Any]]:
    """Train a head on the main process and hand its weights to the others."""
    log: list[dict[str, Any]] = []
    accelerator = training.accelerator
    if accelerator is None or accelerator.is_main_process:
        step = HeadStep(head, lambda: method.penalty(head, given, config))
        held_out = None
        if given.validation is not None and method.validation == "early stopping":
            held_out = TensorSource(*given.validation)
        log = fit(
            step,
            [{"params": [p for p in head.parameters() if p.requires_grad]}],
            TensorSource(given.features, given.labels),
            recipe,
            accelerator=training.accelerate(),
            distributed=False,
            validate=_validator(step, held_out, training.device),
            # Features are small, and batch norm sees the whole batch or gives another result.
            **{**training.options, "accumulate": 1},
        )
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        payload: list[Any] = [head.state_dict(), log]
        broadcast_object_list(payload)
        head.load_state_dict(payload[0])
        log = payload[1]
    return log


# ------------------------------------------------------------------- methods inside the towers


def _adapt_towers(
    images: _Images, method: TowerMethod, config: Any, loss: Loss, training: _Training
) -> _Outcome:
    """Attach a method to the towers, train it, and take the class prototypes it ends with."""
    model, processor, classes = images.model, images.processor, images.classes
    pair = None
    if model.config.is_pair:
        pair = _start_pair(images, method.prompts(classes, config))
    tuning = method.attach(model, processor, classes, config)
    if tuning.look_at is not None:
        tuning.look_at(images.support)
    _check_loss(method, tuning, loss, training.options["accumulate"])
    step = TowerStep(model, processor, tuning, loss)
    if pair is not None and tuning.image_prototypes is None:
        pair.follow(images, step.current_prototypes().detach().cpu().float())

    pooled = None if pair is None else pair.pooled
    source, held_out = _sources(images, tuning.trains_vision, pooled)
    accelerator = training.accelerate()
    if training.replay:
        with accelerator.autocast():  # as the blocks would run at every step
            if isinstance(source, ImageSource) and not images.augment:
                source, held_out = _replayed(step, source, held_out)
            if tuning.image_prototypes is None:
                step.replay_texts()
    recipe, cut = training.recipe(method, images.labels, config)
    log = fit(
        step,
        tuning.groups,
        source,
        recipe,
        accelerator=accelerator,
        validate=_validator(step, held_out, training.device),
        begin=tuning.begin,
        after_step=tuning.after_step,
        **training.options,
    )
    trained = sum(p.numel() for group in tuning.groups for p in group["params"])

    step.stop_replay()
    if tuning.finish is not None:
        tuning.finish(training.adapter_folder() if method.saves_adapter else None)
    head = tuning.head() if tuning.head is not None else _head_of_prototypes(step)
    fitted = Fitted(head, [*cut, *tuning.notes])
    if pair is not None and pair.bridged:
        fitted.facts["joint_space"] = False
        fitted.notes.insert(
            0,
            "The towers had no joint space: the projection started from a ridge fit on the "
            "support and trained.",
        )
    return _Outcome(fitted, config, recipe, log, trained, tuning.prompts, not tuning.trains_vision)


@dataclass(frozen=True)
class _Pair:
    """Two encoders side by side as they are before a method is attached.

    Args:
        pooled: Vectors of the support `[n, width]`.
        prototypes: Unit class texts `[K, dim]`.
        bridged: Whether there was no joint space, so that the projection is a ridge fit from the
            one to the other.
    """

    pooled: Tensor
    prototypes: Tensor
    bridged: bool

    def follow(self, images: _Images, prototypes: Tensor) -> None:
        """Start the projection anew where what is attached moved the texts, or what is pooled."""
        model = images.model
        if not torch.allclose(prototypes, self.prototypes, atol=1e-2):  # new tokens moved them
            refit_projection(model, self.pooled, images.labels, prototypes)
        elif self.bridged and model.context is not None and model.context.blocks:
            # What is pooled now comes out of blocks that the fit did not see.
            pooled = replace(images, cache=None).embed(images.support, False)
            refit_projection(model, pooled, images.labels, self.prototypes)


def _start_pair(images: _Images, prompts: Sequence[Sequence[str]]) -> _Pair:
    """Encode support and texts, and give the pair a joint space if it has none."""
    model = images.model
    pooled = images.embed(images.support, False)
    prototypes = images.embed_texts(prompts)
    bridged = not model.has_joint_space
    if bridged:
        give_joint_space(model, pooled, images.labels, prototypes)
    return _Pair(pooled, prototypes, bridged)


def _check_loss(method: TowerMethod, tuning: Tuning, loss: Loss, accumulate: int) -> None:
    """Refuse a loss, or a batch in parts, that what a method adds to the loss does not go with."""
    if tuning.whole_batch and (accumulate > 1 or loss != "prototypes"):
        raise GloVLMError(
            f"Method '{method.name}' needs whole batches and loss 'prototypes': found accumulate "
            f"{accumulate}, loss '{loss}'. Leave both as they are by default."
        )
    alone = tuning.image_prototypes is not None or tuning.around_images is not None
    if (alone or tuning.raw_logits) and loss != "prototypes":
        raise GloVLMError(f"Method '{method.name}' knows loss 'prototypes' only; found '{loss}'.")


def _head_of_prototypes(step: TowerStep) -> nn.Module:
    """The class prototypes as the towers stand now, as a head."""
    with torch.no_grad():
        prototypes = step.current_prototypes().cpu().float()
    raw = step.tuning.raw_logits
    scale = 1.0 if raw else step.model.logit_scale.exp().item()
    return prototype_head(prototypes, scale, raw=raw)


def _replayed(
    step: TowerStep, source: ImageSource, held_out: BatchSource | None
) -> tuple[BatchSource, BatchSource | None]:
    """The same batches as states behind the frozen blocks, where there are some and they fit."""
    wanted = [source] if held_out is None else [source, held_out]
    found: list[BatchSource] = []
    for images in wanted:
        states = step.replay_images(images.fetch, len(images.labels))
        if states is None:
            step.stop_replay()
            return source, held_out
        found.append(TensorSource(states, images.labels))
    return found[0], found[1] if held_out is not None else None


def _sources(
    images: _Images, trains_vision: bool, pooled: Tensor | None
) -> tuple[BatchSource, BatchSource | None]:
    """Where training and validation batches come from: pixels, or vectors of a frozen tower."""
    processor, validation = images.processor, images.validation
    held_out: BatchSource | None = None
    if trains_vision:
        if validation is not None:
            held_out = ImageSource(validation, _labels(validation), processor)
        return ImageSource(images.support, images.labels, processor, images.augment), held_out
    if images.augment:
        raise GloVLMError(
            "This method leaves the vision tower as it is, so each image is encoded once and "
            "--augment would change nothing: leave it out."
        )
    if pooled is None:
        pooled = images.embed(images.support, False)
    if validation is not None:
        held_out = TensorSource(images.embed(validation, False), _labels(validation))
    return TensorSource(pooled, images.labels), held_out


def refit_projection(model: Any, pooled: Tensor, labels: Tensor, prototypes: Tensor) -> None:
    """Start a pair's projection anew for other class texts, keeping its parameters in place."""
    projection = model.backbone.visual_projection
    give_joint_space(model, pooled, labels, prototypes)
    with torch.no_grad():
        for old, new in zip(
            projection.parameters(), model.backbone.visual_projection.parameters(), strict=True
        ):
            old.copy_(new)
    model.backbone.visual_projection = projection


# ------------------------------------------------------------------------------------- shared


def _labels(rows: "Dataset") -> Tensor:
    from ..data.folder import column

    return torch.tensor(column(rows, "label"), dtype=torch.long)


def _linear_projection(model: Any) -> nn.Linear | None:
    """What stands between pooled vectors and image features, if it is one matrix."""
    projection = getattr(model.backbone, "visual_projection", None)
    return projection if isinstance(projection, nn.Linear) else None


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().float()


def _check_support(method: Method, labels: Tensor, names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    empty = [name for name, n in zip(names, counts, strict=True) if n == 0]
    if method.name != "zero_shot" and empty:
        raise GloVLMError(
            f"Method '{method.name}' needs at least one labelled image of every class; none of: "
            f"{', '.join(empty)}. Label some, or leave the class out."
        )


def _methods() -> list[tuple[str, Method]]:
    from ..methods import METHODS

    return list(METHODS.items())


def _matrix(values: Any, name: str) -> Tensor:
    """A finite matrix of fp32, whatever it came as."""
    import numpy as np

    try:
        tensor = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values))
        tensor = tensor.detach().cpu().float()
    except (TypeError, ValueError, RuntimeError):
        raise GloVLMError(f"Expected {name} to be a matrix of numbers.") from None
    if tensor.dim() != 2 or not torch.isfinite(tensor).all():
        raise GloVLMError(
            f"Expected {name} to be a matrix of finite numbers, found shape {tuple(tensor.shape)}"
            f"{'' if torch.isfinite(tensor).all() else ' with NaN or infinity'}."
        )
    return tensor


def _validator(
    step: nn.Module, source: BatchSource | None, device: torch.device
) -> Callable[[], float] | None:
    """Macro-AUC on the validation images, for early stopping; `None` without validation."""
    if source is None:
        return None
    from ..metrics import compute_metrics

    labels = source.labels.numpy()

    def validate() -> float:
        logits = []
        with torch.inference_mode():
            for start in range(0, len(labels), 32):
                index = list(range(start, min(start + 32, len(labels))))
                logits.append(step.classify(source.fetch(index).to(device)).cpu())  # type: ignore[operator]
        probabilities = torch.cat(logits).double().softmax(-1).numpy()
        measured = compute_metrics(labels, probabilities, n_resamples=0)
        return float(measured["metrics"]["macro_auc"]["value"] or 0.0)

    return validate
