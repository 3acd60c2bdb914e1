"""Few-shot adaptation: a backbone, a method and a few labelled images in, a classifier out."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones import load_backbone
from ..data.stains import list_stains, read_stains
from ..errors import GloVLMError
from ..inference import FeatureCache, MemoryCache
from ..inference.drafts import set_draft
from ..inference.guard import add_guard
from ..inference.outlines import set_outline
from ..inference.prediction import move_model
from ..inference.texts import check_class_texts
from ..methods import (
    METHODS,
    FeatureMethod,
    Fitted,
    Fold,
    HeadMethod,
    Method,
    Recipe,
    Support,
    TowerMethod,
    get_method,
    give_joint_space,
)
from ..methods.arrays import (
    check_directions,
    check_mapping,
    count_classes,
    read_features,
    read_labels,
    read_logit_scale,
    read_seed,
)
from ..model.heads import ClassWeights, class_means
from .config import AdaptConfig
from .images import TaskImages
from .loop import (
    BatchSource,
    ImageSource,
    TensorSource,
    describe_inputs,
    feature_source,
    fit,
    plan,
    seed_everything,
    validator,
)
from .losses import HeadStep, TowerStep

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from ..data import ClassInfo

MIN_GROUPS_TO_CHOOSE = 4  # a class; leave-one-out on fewer was measured not to help


@dataclass(kw_only=True)
class _Outcome:
    """Outcome of an adaptation beside the classifier.

    Args:
        settings: The method's config, as it was used.
        recipe: How it was trained; `None` for closed forms.
        log: One row an epoch.
        notes: Sentences for the results.
        facts: Numbers that the method measured or chose.
        query_logits: Logits of the query images `[m, classes]`, of a transductive method.
    """

    settings: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    notes: list[str]
    facts: dict[str, Any]
    query_logits: Any = None


@dataclass(kw_only=True)
class Adapted(_Outcome):
    """Adapted model, and how it came about: `settings`, `recipe`, `log`, `notes`, `facts`.

    Args:
        model: A `GloVLMForImageClassification`; save it, put it into a pipeline, predict with it.
        processor: Its `GloVLMProcessor`.
        trainable_parameters: Number of trainable parameters.
        frozen_tower: Whether the vision tower is as it came, so that cached features serve.
        variants: Further heads whose spread is reported.
    """

    model: Any
    processor: Any
    trainable_parameters: int
    frozen_tower: bool
    variants: list[nn.Module]

    def save(self, folder: str | Path) -> None:
        """Write weights in fp32, the model's code, processor and prompts."""
        self.model.float().save_pretrained(folder)
        self.processor.save_pretrained(folder)


@dataclass(kw_only=True)
class AdaptedFeatures(_Outcome):
    """Classifier head on features, and how it came about: `settings`, `recipe`, `log`, `notes`.

    Args:
        head: Features in, logits out.
        dim: Width of the features.
    """

    head: nn.Module
    dim: int

    def predict_logits(self, features: Any) -> Any:
        """Logits `[n, classes]` of features `[n, dim]`, as an array of numpy in float32.

        Raises:
            GloVLMError: They are no matrix of finite numbers of this width, or a row is zero.
        """
        rows = read_features(features, "features", width=self.dim)
        with torch.inference_mode():
            logits = self.head.eval()(rows)
        _check_finite(logits)
        return logits.numpy()


@dataclass(frozen=True)
class _Training:
    """Training settings and hardware of one adaptation."""

    config: AdaptConfig
    device: torch.device
    accelerator: "Accelerator | None" = None
    on_epoch: Callable[[dict[str, Any]], None] | None = None
    made_from: Mapping[str, Any] | None = None

    @property
    def output_dir(self) -> Path | None:
        """Where log, checkpoint and adapter go."""
        folder = self.config.output_dir
        return None if folder is None else Path(folder)

    @property
    def loop_options(self) -> dict[str, Any]:
        """Arguments of `fit` that every method has in common."""
        config = self.config
        return {
            "seed": config.seed,
            "clip_norm": config.clip_norm,
            "accumulate": config.accumulate,
            "output_dir": self.output_dir,
            "resume": config.resume,
            "made_from": self.made_from,
            "on_epoch": self.on_epoch,
        }

    def recipe(
        self, method: HeadMethod | TowerMethod, labels: Tensor, settings: Any
    ) -> tuple[Recipe, list[str]]:
        """The method's recipe with what the user overrides, cut if it is too long."""
        overrides, max_steps = self.config.recipe, self.config.max_steps
        n = len(labels)
        shots = int(labels.bincount().max()) if n else 0
        recipe = Recipe(**{**asdict(method.recipe(shots, settings)), **overrides})
        recipe = replace(recipe, batch_size=min(recipe.batch_size, max(n, 1)))
        if "epochs" in overrides:
            recipe = replace(recipe, steps=None)
        _, steps = plan(recipe, n)
        if max_steps is None or steps <= max_steps:
            return recipe, []
        note = f"Cut to {max_steps} of the recipe's {steps} steps; its schedule is shortened."
        return replace(recipe, steps=max_steps), [note]

    def accelerate(self) -> "Accelerator":
        """The given accelerator, or a plain one."""
        if self.accelerator is not None:
            return self.accelerator
        from accelerate import Accelerator

        return Accelerator(cpu=self.device.type == "cpu")

    def adapter_folder(self) -> Path | None:
        """Folder of an adapter alone, emptied; `None` where this process writes nothing."""
        folder = self.output_dir
        main = self.accelerator is None or self.accelerator.is_main_process
        if folder is None or not main:
            return None
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        return folder / "adapter"


@dataclass
class _FeatureResult:
    """A method on features, fitted."""

    fitted: Fitted
    settings: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    trainable_parameters: int


@dataclass
class _Result(_FeatureResult):
    """Any method, fitted, before the model is put together."""

    prompts: list[list[str]]
    frozen_tower: bool


def adapt(
    model: Any,
    method: str,
    support: "Dataset",
    *,
    processor: Any = None,
    classes: Sequence["ClassInfo"] | None = None,
    config: AdaptConfig | Mapping[str, Any] | None = None,
    validation: "Dataset | None" = None,
    query: "Dataset | None" = None,
    unlabelled: "Dataset | None" = None,
    groups: Sequence[str] | None = None,
    accelerator: "Accelerator | None" = None,
    cache: FeatureCache | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> Adapted:
    """Few-shot adaptation of a backbone to a task. No test label can be passed in.

    Args:
        model: A `GloVLMModel`, which is changed and taken over, or a backbone's name. If it was
            adapted before, its weights stay; head, prompts and calibration of that task go.
        method: A name of `METHODS`.
        support: Labelled rows with `image` and `label` (a `ClassLabel`), and `stain` where known.
        processor: The model's processor; loaded with it when `model` is a name.
        classes: Names and prompts in label order; from the labels' names when not given.
        config: How to train, or the fields of it that are not the defaults.
        validation: Further labelled rows, to stop early or to choose settings; they count as
            labels.
        query: The images that a transductive method takes; a label column is not read.
        unlabelled: The images whose means are the centres of stains; a label column is not read.
            By default all that are given here.
        groups: Patient, case or slide of each support row, for `cross_validate`.
        accelerator: For many processes or mixed precision; made when needed.
        cache: Keeps features of the frozen tower.
        on_epoch: Called with the log row of every epoch.
        made_from: Digests by name of what this starts from, for a checkpoint in `output_dir`; by
            default of the images given, their labels, and the model's weights.

    Returns:
        The adapted model with its head, and how it came about.

    Raises:
        GloVLMError: A class has no image, the method needs what is not there, or the loss became
            NaN.
    """
    from ..data import load_classes

    if not isinstance(config, AdaptConfig):
        config = AdaptConfig.from_mapping(config or {})
    chosen = get_method(method)
    settings = chosen.configure(config.method_config)
    if isinstance(model, str):
        model, processor = load_backbone(model)
    if classes is None:
        names = support.features["label"].names
        classes = load_classes(names, outline=config.outline, outline_of=config.outline_of)
    labels = _labels(support)
    _check_support(chosen, labels, [c.name for c in classes])
    _check_config(chosen, model, config)
    if made_from is None and config.output_dir is not None:
        made_from = describe_inputs(
            model, processor, (support, validation), classes, method, asdict(config)
        )
    _forget_task(model.config, processor)
    notes = set_outline(model, processor, config, support, needs_text=chosen.needs_text)
    notes += set_draft(model, processor, config.draft)
    cache = cache if cache is not None else MemoryCache()  # nothing is encoded twice

    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    move_model(model, device)
    model.requires_grad_(False)
    seed_everything(config.seed)
    images = TaskImages(
        model, processor, classes, support, labels, validation, query, config, device, cache
    )
    training = _Training(config, device, accelerator, on_epoch, made_from)
    if config.centre == "stain":
        given = [unlabelled] if unlabelled is not None else [support, validation, query]
        images, centred = images.centred([rows for rows in given if rows is not None])
        notes += centred
    if isinstance(chosen, TowerMethod) or (chosen.needs_text and model.has_joint_space):
        prompts = chosen.prompts(classes, settings)
        notes += check_class_texts(model, processor, prompts, [c.name for c in classes])
    if isinstance(chosen, TowerMethod):
        result = _adapt_towers(images, chosen, settings, training)
    else:
        left_out = groups if config.cross_validate else None
        result = _adapt_on_features(images, chosen, settings, training, left_out)
    if config.views > 1:
        result.fitted.facts["views"] = config.views
        notes.append(
            f"Learned from {config.views} augmented views of each labelled image in its place "
            "(crops, flips, quarter turns, stain jitter); a label counts once."
        )
    result.fitted.notes += notes
    adapted = _put_together(images, result)
    if chosen.name != "zero_shot":  # which learned from no image, whatever it was given
        adapted.model.config.stains = list_stains(read_stains(support)) or None
        add_guard(adapted.model, processor, support, labels.tolist(), groups, cache)
    return adapted


def _forget_task(config: Any, processor: Any) -> None:
    """Drop what a model has of a task that it was adapted to before; its weights stay."""
    task = ("head", "prompts", "prior_shift", "calibration", "guard", "stains", "stain_centres")
    for name in (*task, "mpp", "problem_type"):
        setattr(config, name, None)
    config.temperature = 1.0
    processor.context_token_ids = None


def _has_image_shapes(model: Any) -> bool:
    return "siglip2" in model.config.backbone_config.model_type


def _check_config(method: Method, model: Any, config: AdaptConfig) -> None:
    """Refuse zero-shot where it would be chance, and settings that would change nothing."""
    if method.family in ("image side", "both sides") and _has_image_shapes(model):
        raise GloVLMError(
            f"Method '{method.name}' trains inside the vision tower, and SigLIP 2 takes each image "
            "in a shape of its own, which the training loop does not carry: use a method on "
            "features or texts (linear_probe, classifier, prompt_tuning), or SigLIP."
        )
    if method.name == "zero_shot" and not model.has_joint_space:
        raise GloVLMError(
            f"'{model.config.backbone_name}' joins two encoders that were never trained together: "
            "zero-shot would be chance. Use a method that learns from the labelled images "
            "(linear_probe, lora), or a backbone with a joint space (mini, plip)."
        )
    inside = isinstance(method, TowerMethod)
    if config.cross_validate and inside:
        raise GloVLMError(
            f"Method '{method.name}' has no setting to choose by leaving groups out: use "
            "--validation-shots to stop early, or leave --cross-validate out."
        )
    config.check_method(method)
    if config.augment and not inside:
        raise GloVLMError(
            f"Method '{method.name}' works on features that are computed once, so --augment would "
            "change nothing: use --views, or a method inside the towers (lora)."
        )
    if config.views > 1 and method.name == "zero_shot":
        raise GloVLMError("Method 'zero_shot' learns from no image: leave --views out.")


def _put_together(images: TaskImages, result: _Result) -> Adapted:
    """Adapted model: the backbone with its head, classes and prompts."""
    from ..model import GloVLMForImageClassification

    model, fitted = images.model, result.fitted
    names = [c.name for c in images.classes]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    model.config.prompts = result.prompts
    model.requires_grad_(True)
    head = fitted.head.requires_grad_(True).to(images.device, model.dtype)
    if images.centres is not None and isinstance(head, ClassWeights):
        head.cosine = False  # of centred features: no cosines of an image with a text
    classifier = GloVLMForImageClassification(model.config, glovlm=model, head=head)
    classifier.set_centres(images.centres)
    return Adapted(
        model=classifier.eval(),
        processor=images.processor,
        settings=result.settings,
        recipe=result.recipe,
        log=result.log,
        trainable_parameters=result.trainable_parameters,
        frozen_tower=result.frozen_tower,
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
    method_config: Mapping[str, Any] | None = None,
) -> AdaptedFeatures:
    """Few-shot classifier on precomputed features, such as embeddings from any other tool.

    Args:
        method: A name of `METHODS` that works on features.
        support_features: `[n, dim]`, real numbers of any type that numpy or torch reads; no row of
            zeros. `zero_shot` takes none, `[0, dim]`.
        support_labels: Class numbers `[n]`, 0 ... K-1, each at least once, K at least 2; names are
            refused, since only their owner knows the order of `text_features`.
        text_features: `[K, dim]`, one a class, all different; where there are none, the class
            means of the support stand in for them in methods that need them.
        logit_scale: Factor between cosines and logits (CLIP: 100), above 0, at most 1e6.
        query_features: `[m, dim]`, for transductive methods.
        seed: Of everything random, 0 to 2**32 - 1.
        method_config: Settings of the method.

    Returns:
        An object with `predict_logits(features) -> [n, classes]`.

    Raises:
        GloVLMError: The method works inside a tower; an input cannot be read, or shapes do not
            fit; a class has no row; what was fitted is not finite.
    """
    chosen = get_method(method)
    settings = chosen.configure(check_mapping(method_config, "method_config"))
    logit_scale, seed = read_logit_scale(logit_scale), read_seed(seed)
    on_features = FeatureMethod | HeadMethod
    if not isinstance(chosen, on_features):
        fitting = ", ".join(name for name, m in METHODS.items() if isinstance(m, on_features))
        raise GloVLMError(
            f"Method '{method}' trains inside a tower, so features alone do not do: use `adapt`, "
            f"or a method on features ({fitting})."
        )
    features = read_features(support_features, "support_features")
    labels = read_labels(support_labels, len(features))
    prototypes = None if text_features is None else read_features(text_features, "text_features")
    if prototypes is not None and prototypes.shape[1] != features.shape[1]:
        raise GloVLMError(
            f"Image and text features must have one width; found {features.shape[1]} and "
            f"{prototypes.shape[1]}."
        )
    if chosen.name == "zero_shot" and prototypes is None:
        raise GloVLMError("Method 'zero_shot' compares with class texts: give text_features.")
    num_classes = count_classes(labels, prototypes)
    _check_support(chosen, labels, [f"class {k}" for k in range(num_classes)])
    stands_in = prototypes is None and chosen.needs_text
    if stands_in:
        prototypes = class_means(features, labels, num_classes)
    elif prototypes is not None:
        prototypes = nn.functional.normalize(prototypes, dim=-1)
    if prototypes is not None:
        check_directions(prototypes)
    query = None
    if query_features is not None:
        query = read_features(query_features, "query_features", width=features.shape[1])
    single = None if prototypes is None else list(prototypes.unsqueeze(1))
    rows = Support(features, labels, num_classes, prototypes, logit_scale, seed, query, single)
    seed_everything(seed)
    training = _Training(AdaptConfig(seed=seed), torch.device("cpu"))
    result = _fit_features(chosen, settings, rows, training, None, None, stands_in=stands_in)
    logits = result.fitted.query_logits
    _check_finite(*result.fitted.head.state_dict().values(), *([] if logits is None else [logits]))
    return AdaptedFeatures(
        head=result.fitted.head.eval(),
        dim=features.shape[1],
        settings=result.settings,
        recipe=result.recipe,
        log=result.log,
        notes=result.fitted.notes,
        facts=result.fitted.facts,
        query_logits=None if logits is None else logits.numpy(),
    )


def _check_finite(*tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
        raise GloVLMError(
            "The classifier on these features came out with NaN or infinity: they, or a setting, "
            "are too large. Scale the features to a length near 1, or keep the method's defaults."
        )


# ------------------------------------------------------------------------- methods on features


def _adapt_on_features(
    images: TaskImages,
    method: Method,
    settings: Any,
    training: _Training,
    groups: Sequence[str] | None,
) -> _Result:
    """Encode every image once and fit a head; the vision tower stays as it is."""
    rows = _describe_support(images, method, settings, training.config.seed)
    stands_in = method.needs_text and not images.model.has_joint_space
    result = _fit_features(
        method, settings, rows, training, images.model, groups, stands_in=stands_in
    )
    prompts = method.prompts(images.classes, settings)
    return _Result(**vars(result), prompts=prompts, frozen_tower=True)


def _describe_support(images: TaskImages, method: Method, settings: Any, seed: int) -> Support:
    """Support set of a method on features."""
    model, support, labels = images.model, images.support, images.labels
    projection: Any = getattr(model.backbone, "visual_projection", None)
    project = not (method.on_pooled and isinstance(projection, nn.Linear))  # if it is one matrix
    fixed = {} if project else {k: v.cpu().float() for k, v in projection.state_dict().items()}
    validation = None
    if images.validation is not None:
        validation = images.embed(images.validation, project), _labels(images.validation)
    features = torch.zeros(0, model.config.image_feature_dim)
    if len(support):
        features = images.embed(support, project)
    views = images.embed_views(project)
    prototypes, single, scale = None, None, model.logit_scale.exp().item()
    if method.needs_text and model.has_joint_space:
        prompts = method.prompts(images.classes, settings)
        prototypes = images.embed_texts(prompts)
        if method.needs_prompt_features:
            each = images.embed_texts([[text] for texts in prompts for text in texts])
            single = list(each.split([len(texts) for texts in prompts]))
    elif method.needs_text:
        shown = Support(features, labels, len(images.classes), views=views)
        if not project:
            projected = images.embed(support, True), images.embed_views(True)
            shown = replace(shown, features=projected[0], views=projected[1])
        prototypes, scale = class_means(shown.averages, labels, len(images.classes)), 100.0
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
        projection=fixed.get("weight"),
        projection_bias=fixed.get("bias"),
        validation=validation,
        views=views,
    )


def _fit_features(
    method: Method,
    settings: Any,
    support: Support,
    training: _Training,
    model: Any | None,
    groups: Sequence[str] | None,
    *,
    stands_in: bool,
) -> _FeatureResult:
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
        head = method.build(support, settings).to(training.device)
        recipe, cut = training.recipe(method, support.labels, settings)
        notes += cut
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        log = _fit_head(method, head, support, settings, recipe, training)
        fitted = method.finish(head.cpu().eval(), support, settings, model)
    else:
        assert isinstance(method, FeatureMethod)
        folds: list[Fold] = []
        if groups is not None:
            if method.validation != "search":
                raise _nothing_to_choose(method)
            folds, note = _leave_groups_out(support, groups, stands_in)
            notes.append(note)
        elif support.validation is not None and method.validation == "search":
            folds = [Fold(replace(support, validation=None), *support.validation)]
            notes.append("Settings were chosen on the validation labels, which count as labels.")
        elif support.validation is not None and method.validation == "none":
            notes.append(
                "This method has nothing to choose: the validation labels were not used, but count."
            )
        if folds:
            settings = method.choose(folds, settings)
            facts["chosen_settings"] = asdict(settings)
        fitted = method.fit(support, settings)
        weights = fitted.head.named_parameters() if method.name != "zero_shot" else ()
        fixed = ("scale", "text.scale", "alpha", "beta")
        trained = sum(p.numel() for n, p in weights if n not in fixed)
    if stands_in and isinstance(fitted.head, ClassWeights):
        fitted.head.cosine = False  # its rows are no texts
    fitted.notes = [*notes, *fitted.notes]
    fitted.facts = {**facts, **fitted.facts}
    return _FeatureResult(fitted, settings, recipe, log, trained)


def _leave_groups_out(
    support: Support, groups: Sequence[str], stands_in: bool
) -> tuple[list[Fold], str]:
    """Leave-one-group-out folds, if every class has enough groups; a note for the results."""
    held = [
        len({g for g, k in zip(groups, support.labels.tolist(), strict=True) if k == c})
        for c in range(support.num_classes)
    ]
    if min(held) < MIN_GROUPS_TO_CHOOSE:
        return [], (
            f"Settings were kept at their defaults: choosing by leaving groups out needs "
            f"{MIN_GROUPS_TO_CHOOSE} groups of every class, and one has {min(held)}."
        )
    folds = []
    for name in sorted(set(groups)):
        out = torch.tensor([g == name for g in groups])
        inner = replace(
            support,
            features=support.features[~out],
            labels=support.labels[~out],
            views=None if support.views is None else support.views[~out],
            validation=None,
        )
        if stands_in:
            prototypes = class_means(inner.averages, inner.labels, support.num_classes)
            inner = replace(inner, prototypes=prototypes)
        folds.append(Fold(inner, support.features[out], support.labels[out]))
    return folds, f"Settings were chosen by leaving out each of {len(folds)} groups in turn."


def _nothing_to_choose(method: Method) -> GloVLMError:
    able = ", ".join(name for name, m in METHODS.items() if m.validation == "search")
    return GloVLMError(
        f"Method '{method.name}' has no setting to choose by leaving groups out (these have: "
        f"{able}): leave --cross-validate out."
    )


def _fit_head(
    method: HeadMethod,
    head: nn.Module,
    support: Support,
    settings: Any,
    recipe: Recipe,
    training: _Training,
) -> list[dict[str, Any]]:
    """Train a head on the main process and hand its weights to the others."""
    log: list[dict[str, Any]] = []
    accelerator = training.accelerator
    if accelerator is None or accelerator.is_main_process:
        step = HeadStep(
            head, lambda: method.penalty(head, support, settings), on_unit=method.on_unit
        )
        inputs = support.features if support.views is None else support.views
        if method.on_unit:
            inputs = nn.functional.normalize(inputs, dim=-1)
        held_out = None
        if support.validation is not None and method.validation == "early stopping":
            held_out = TensorSource(*support.validation)
        log = fit(
            step,
            [{"params": [p for p in head.parameters() if p.requires_grad]}],
            feature_source(inputs, None if support.views is None else inputs, support.labels),
            recipe,
            accelerator=training.accelerate(),
            distributed=False,
            validate=validator(step, held_out, training.device),
            # Features are small, and batch norm sees the whole batch or gives another result.
            **{**training.loop_options, "accumulate": 1},
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
    images: TaskImages, method: TowerMethod, settings: Any, training: _Training
) -> _Result:
    """Attach a method to the towers, train it, and take the class prototypes it ends with."""
    model, classes = images.model, images.classes
    pair = None
    if model.config.is_pair:
        pair = _start_pair(images, method.prompts(classes, settings))
    method = method.attach(model, images.processor, classes, settings)
    method.read_support(images.support)
    _check_loss(method, training.config)
    step = TowerStep(method, training.config.loss)
    if pair is not None and not method.per_image:
        pair.follow(images, step.current_prototypes().detach().cpu().float())

    pooled = None if pair is None else pair.pooled
    source, held_out = _sources(images, method.trains_vision, pooled)
    method.pretrain(source.fetch, images.labels, training.config.seed)
    accelerator = training.accelerate()
    if training.config.replay:
        with accelerator.autocast():  # as the blocks would run at every step
            if isinstance(source, ImageSource) and not images.config.augment:
                source, held_out = _replayed(step, source, held_out)
            if not method.per_image:
                step.replay_texts()
    recipe, cut = training.recipe(method, images.labels, settings)
    log = fit(
        step,
        method.groups,
        source,
        recipe,
        accelerator=accelerator,
        validate=validator(step, held_out, training.device),
        begin=method.begin,
        after_step=method.after_step,
        **training.loop_options,
    )
    trainable = sum(p.numel() for p in method.trained)

    step.stop_replay()
    method.finish(training.adapter_folder() if method.saves_adapter else None)
    with torch.no_grad():
        prototypes = step.current_prototypes().cpu().float()
    fitted = Fitted(method.final_head(prototypes), [*cut, *method.notes], dict(method.facts))
    if pair is not None and pair.bridged:
        fitted.facts["joint_space"] = False
        fitted.notes.insert(
            0,
            "The towers had no joint space: the projection started from a ridge fit on the "
            "support and trained.",
        )
    return _Result(
        fitted, settings, recipe, log, trainable, method.class_texts, not method.trains_vision
    )


@dataclass(frozen=True)
class _Pair:
    """Pair of encoders before a method is attached.

    Args:
        pooled: Vectors of the support `[n, width]`.
        prototypes: Unit class texts `[K, dim]`.
        bridged: Whether there was no joint space, so that the projection is a ridge fit from the
            one to the other.
    """

    pooled: Tensor
    prototypes: Tensor
    bridged: bool

    def follow(self, images: TaskImages, prototypes: Tensor) -> None:
        """Start the projection anew where what is attached moved the texts, or what is pooled."""
        model = images.model
        if not torch.allclose(prototypes, self.prototypes, atol=1e-2):  # new tokens moved them
            refit_projection(model, self.pooled, images.labels, prototypes)
        elif self.bridged and model.context is not None and model.context.blocks:
            # What is pooled now comes out of blocks that the fit did not see.
            pooled = replace(images, cache=None).embed(images.support, False)
            refit_projection(model, pooled, images.labels, self.prototypes)


def _start_pair(images: TaskImages, prompts: Sequence[Sequence[str]]) -> _Pair:
    """Encode support and texts, and give the pair a joint space if it has none."""
    model = images.model
    pooled = images.embed(images.support, False)
    prototypes = images.embed_texts(prompts)
    bridged = not model.has_joint_space
    if bridged:
        give_joint_space(model, pooled, images.labels, prototypes)
    return _Pair(pooled, prototypes, bridged)


def _check_loss(method: TowerMethod, config: AdaptConfig) -> None:
    """Refuse a loss, or a batch in parts, that what a method adds to the loss does not go with."""
    loss, accumulate = config.loss, config.accumulate
    if method.whole_batch and (accumulate > 1 or loss != "prototypes"):
        raise GloVLMError(
            f"Method '{method.name}' needs whole batches and loss 'prototypes': found accumulate "
            f"{accumulate}, loss '{loss}'. Leave both as they are by default."
        )
    alone = method.per_image or method.guides_images or method.raw_logits
    if alone and loss != "prototypes":
        raise GloVLMError(f"Method '{method.name}' knows loss 'prototypes' only; found '{loss}'.")


def _replayed(
    step: TowerStep, source: ImageSource, held_out: BatchSource | None
) -> tuple[BatchSource, BatchSource | None]:
    """Batches as states behind the frozen blocks, where there are some and they fit."""
    recorded: list[BatchSource] = []
    for images in [source] if held_out is None else [source, held_out]:
        states = step.replay_images(images.fetch, len(images.labels))
        if states is None:
            step.stop_replay()
            return source, held_out
        recorded.append(TensorSource(states, images.labels))
    return recorded[0], recorded[1] if held_out is not None else None


def _sources(
    images: TaskImages, trains_vision: bool, pooled: Tensor | None
) -> tuple[BatchSource, BatchSource | None]:
    """Sources of training and validation batches: pixels, or vectors of a frozen tower."""
    processor, validation, config = images.processor, images.validation, images.config
    held_out: BatchSource | None = None
    if trains_vision:
        if validation is not None:
            held_out = ImageSource(validation, _labels(validation), processor)
        if config.views > 1:
            raise GloVLMError(
                "This method trains inside the vision tower, where --views of a frozen one would "
                "change nothing: leave it out, or use --augment, which draws views at every step."
            )
        return ImageSource(images.support, images.labels, processor, config.augment), held_out
    if config.augment:
        raise GloVLMError(
            "This method leaves the vision tower as it is, so each image is encoded once and "
            "--augment would change nothing: use --views."
        )
    if pooled is None:
        pooled = images.embed(images.support, False)
    if validation is not None:
        held_out = TensorSource(images.embed(validation, False), _labels(validation))
    return feature_source(pooled, images.embed_views(False), images.labels), held_out


def refit_projection(model: Any, pooled: Tensor, labels: Tensor, prototypes: Tensor) -> None:
    """Refit a pair's projection to other class texts, keeping its parameters in place."""
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


def _check_support(method: Method, labels: Tensor, names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    empty = [name for name, n in zip(names, counts, strict=True) if n == 0]
    if method.name != "zero_shot" and empty:
        raise GloVLMError(
            f"Method '{method.name}' needs at least one labelled image of every class; none of: "
            f"{', '.join(empty)}. Label some, or leave the class out."
        )
