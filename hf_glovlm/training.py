"""`adapt`: a backbone, a method and a few labelled images in, a classifier out."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .adapters import (
    FeatureMethod,
    HeadMethod,
    Method,
    Recipe,
    Support,
    TowerMethod,
    Tuning,
    get_method,
    give_joint_space,
    prototype_head,
)
from .backbones import load_backbone
from .errors import GloVLMError
from .inference import FeatureCache, embed_images, embed_prompts
from .loop import BatchSource, ImageSource, TensorSource, fit, gather, seed_everything, world_size

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from .data import ClassInfo

Loss = Literal["prototypes", "infonce", "infonce_published"]


@dataclass
class Adapted:
    """What `adapt` returns.

    Args:
        model: A `GloVLMForImageClassification`; save it, put it into a pipeline, predict with it.
        processor: Its `GloVLMProcessor`.
        settings: The method's config.
        recipe: How it was trained; `None` for closed forms.
        log: One row an epoch.
        trainable_parameters: How many numbers trained.
        frozen_tower: Whether the vision tower is as it came, so that cached features serve.
        notes: Sentences for the results.
    """

    model: Any
    processor: Any
    settings: Any
    recipe: Recipe | None
    log: list[dict[str, Any]]
    trainable_parameters: int
    frozen_tower: bool
    notes: list[str]

    def save(self, folder: str | Path) -> None:
        """Write weights in fp32, the model's code, processor and prompts."""
        self.model.float().save_pretrained(folder)
        self.processor.save_pretrained(folder)


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
    seed: int = 0,
    augment: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    accelerator: "Accelerator | None" = None,
    cache: FeatureCache | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Adapted:
    """Adapt a backbone to a task from a few labelled images. No test image can be passed in.

    Args:
        model: A `GloVLMModel`, which is changed and taken over, or a backbone's name.
        method: A name of `METHODS`.
        support: Labelled rows with `image` and `label` (a `ClassLabel`).
        processor: The model's processor; loaded with it when `model` is a name.
        classes: Names and prompts in label order; from the labels' names when not given.
        settings: Settings of the method.
        recipe: Overrides of its recipe (`epochs`, `lr`, `weight_decay`, `batch_size`).
        loss: See `TrainConfig`.
        validation: Further labelled rows for early stopping; they count as labels.
        seed: Of initialisation, order, dropout and augmentation.
        augment: See `TrainConfig`.
        accumulate: See `TrainConfig`.
        clip_norm: See `TrainConfig`.
        accelerator: For many processes or mixed precision; made when needed.
        cache: Keeps features of the frozen tower.
        output_dir: Takes the log, the checkpoint and the adapter.
        resume: Go on from the checkpoint there.
        on_epoch: Told of every epoch.

    Returns:
        The adapted model with its head, and how it came about.

    Raises:
        GloVLMError: A class has no image, the method needs a joint space that is not there, or the
            loss became NaN.
    """
    from .data import load_classes
    from .data.folder import column

    if isinstance(model, str):
        model, processor = load_backbone(model)
    chosen = get_method(method)
    config = chosen.configure(settings or {})
    if classes is None:
        classes = load_classes(support.features["label"].names)
    labels = torch.tensor(column(support, "label"), dtype=torch.long)
    _check_support(chosen, model, labels, classes)
    folder = Path(output_dir) if output_dir is not None else None
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    model.to(device).requires_grad_(False)
    seed_everything(seed)

    prompts = [list(c.prompts) for c in classes]
    if isinstance(chosen, TowerMethod):
        prompts = chosen.prompts(classes, config)
    prototypes = None
    if chosen.needs_text:
        prototypes = torch.from_numpy(embed_prompts(model, processor, prompts))

    def embed(images: "Dataset", project: bool) -> Tensor:
        return torch.from_numpy(
            embed_images(model, processor, images, device=device, cache=cache, project=project)
        )

    shots = int(labels.bincount().max()) if len(labels) else 0
    used: Recipe | None = None
    log: list[dict[str, Any]] = []
    notes: list[str] = []
    trained, frozen_tower = 0, True
    options: dict[str, Any] = {
        "seed": seed,
        "clip_norm": clip_norm,
        "accumulate": accumulate,
        "output_dir": folder,
        "resume": resume,
        "on_epoch": on_epoch,
    }

    if isinstance(chosen, TowerMethod):
        vectors = None
        if model.config.is_pair:
            vectors = embed(support, project=False)
            assert prototypes is not None  # tower methods need text
            if not model.has_joint_space:
                give_joint_space(model, vectors, labels, prototypes)
                notes.append(
                    "The towers had no joint space: the projection started from a ridge fit on the "
                    "support and trained."
                )
        tuning = chosen.attach(model, processor, classes, config)
        step = TowerStep(model, processor, tuning, loss)
        if vectors is not None and prototypes is not None:
            start = step.current_prototypes().detach().cpu().float()
            if not torch.allclose(start, prototypes, atol=1e-2):  # new tokens moved the targets
                refit_projection(model, vectors, labels, start)
        if tuning.trains_vision:
            source: BatchSource = ImageSource(support, labels, processor, augment)
            held_out = validation
        else:
            if vectors is None:
                vectors = embed(support, project=False)
            source = TensorSource(vectors, labels)
            held_out = embed(validation, project=False) if validation is not None else None
        used = _with(chosen.recipe(shots, config), recipe)
        trained = sum(p.numel() for group in tuning.groups for p in group["params"])
        log = fit(
            step,
            tuning.groups,
            source,
            used,
            accelerator=accelerator or _new_accelerator(device),
            validate=_validator(step, processor, held_out, validation, device),
            **options,
        )
        main = accelerator is None or accelerator.is_main_process
        adapter = folder / "adapter" if folder and chosen.saves_adapter and main else None
        if adapter is not None:
            shutil.rmtree(adapter, ignore_errors=True)
        tuning.finish(adapter)
        head: nn.Module = prototype_head(
            step.current_prototypes().detach().cpu().float(), model.logit_scale.exp().item()
        )
        prompts, frozen_tower = tuning.prompts, not tuning.trains_vision
        notes += tuning.notes
    else:
        features = torch.zeros(0, model.config.image_feature_dim)
        if len(support):
            features = embed(support, project=True)
        scale = model.logit_scale.exp().item()
        given = Support(features, labels, len(classes), prototypes, scale, seed)
        if isinstance(chosen, HeadMethod):
            head = chosen.build(given, config)
            used = _with(chosen.recipe(shots, config), recipe)
            trained = sum(p.numel() for p in head.parameters())
            held_out = embed(validation, project=True) if validation is not None else None
            log = _fit_head(
                head.to(device), given, used, held_out, validation, accelerator, options
            )
        else:
            assert isinstance(chosen, FeatureMethod)
            head = chosen.fit(given, config)
            fitted = [p for n, p in head.named_parameters() if n != "scale"]
            trained = sum(p.numel() for p in fitted) if chosen.name != "zero_shot" else 0

    from .model import GloVLMForImageClassification

    names = [c.name for c in classes]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    model.config.problem_type = "single_label_classification"
    model.config.prompts = prompts
    model.requires_grad_(True)
    head = head.to(device, model.dtype)
    classifier = GloVLMForImageClassification(model.config, glovlm=model, head=head)
    return Adapted(classifier.eval(), processor, config, used, log, trained, frozen_tower, notes)


def _check_support(
    method: Method, model: Any, labels: Tensor, classes: Sequence["ClassInfo"]
) -> None:
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    empty = [c.name for c, n in zip(classes, counts, strict=True) if n == 0]
    if method.name != "zero_shot" and empty:
        raise GloVLMError(
            f"Method '{method.name}' needs at least one labelled image of every class; none of: "
            f"{', '.join(empty)}. Label some, or leave the class out."
        )
    if method.name == "zero_shot" and not model.has_joint_space:
        raise GloVLMError(
            f"'{model.config.backbone_name}' joins two encoders that were never trained together: "
            "zero-shot would be chance. Use a method that learns from the labelled images "
            "(linear_probe, lora), or a backbone with a joint space (mini, plip)."
        )


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


def _with(recipe: Recipe, overrides: Mapping[str, Any] | None) -> Recipe:
    return Recipe(**{**asdict(recipe), **(overrides or {})})


def _new_accelerator(device: torch.device) -> "Accelerator":
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu")


def _fit_head(
    head: nn.Module,
    given: Support,
    recipe: Recipe,
    held_out: Tensor | None,
    validation: "Dataset | None",
    accelerator: "Accelerator | None",
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Train a head on the main process and hand its weights to the others."""
    log: list[dict[str, Any]] = []
    device = next(head.parameters()).device
    if accelerator is None or accelerator.is_main_process:
        step = HeadStep(head)
        log = fit(
            step,
            [{"params": list(head.parameters())}],
            TensorSource(given.features, given.labels),
            recipe,
            accelerator=accelerator or _new_accelerator(device),
            distributed=False,
            validate=_validator(step, None, held_out, validation, device),
            # Features are small, and batch norm sees the whole batch or gives another result.
            **{**options, "accumulate": 1},
        )
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        payload: list[Any] = [head.state_dict(), log]
        broadcast_object_list(payload)
        head.load_state_dict(payload[0])
        log = payload[1]
    return log


def _validator(
    step: nn.Module,
    processor: Any,
    inputs: "Dataset | Tensor | None",
    validation: "Dataset | None",
    device: torch.device,
) -> Callable[[], float] | None:
    """Macro-AUC on the validation images, for early stopping; `None` without validation."""
    if validation is None or inputs is None:
        return None
    import numpy as np

    from .data.folder import column
    from .metrics import compute_metrics

    labels = np.asarray(column(validation, "label"))
    source: BatchSource
    if isinstance(inputs, Tensor):
        source = TensorSource(inputs, torch.from_numpy(labels))
    else:
        source = ImageSource(inputs, torch.from_numpy(labels), processor, augment=False)

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


class HeadStep(nn.Module):
    """Cross-entropy of a head on features."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def classify(self, features: Tensor) -> Tensor:
        """Logits `[n, classes]` in evaluation mode."""
        self.head.eval()
        logits: Tensor = self.head(features)
        return logits

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        """Sum of the weighted losses over `total`, so that parts of a batch add up to its mean."""
        self.head.train(len(inputs) > 1)  # one row has no variance for batch norm to take
        losses = nn.functional.cross_entropy(self.head(inputs), labels, reduction="none")
        return (weight * losses).sum() / total


class TowerStep(nn.Module):
    """Loss of images against class texts, with whatever trains inside the towers.

    Args:
        model: A `GloVLMModel` to which a method has attached itself.
        processor: Its processor.
        tuning: What the method attached.
        loss: `prototypes`, `infonce` or `infonce_published`.
    """

    def __init__(self, model: Any, processor: Any, tuning: Tuning, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.trains_vision = tuning.trains_vision
        encoded = processor.encode_prompts(tuning.prompts)
        self.text = {k: v.to(model.logit_scale.device) for k, v in encoded.items()}
        self.fixed: Tensor | None = None
        if not tuning.trains_text:  # text of an unchanged tower is encoded once
            with torch.no_grad():
                self.fixed = self.current_prototypes()

    def train(self, mode: bool = True) -> "TowerStep":
        """Only what a method added drops out: a few images against a noisy tower teach nothing."""
        super().train(False)
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def current_prototypes(self) -> Tensor:
        """Unit class prototypes `[K, dim]` as the towers stand now."""
        if self.fixed is not None:
            return self.fixed
        prototypes: Tensor = self.model.class_prototypes(**self.text)
        return prototypes

    def image_features(self, inputs: Tensor) -> Tensor:
        """Unit features `[n, dim]` of images, or of pooled vectors where the tower is frozen."""
        inputs = inputs.to(self.model.dtype)
        if self.trains_vision:
            features = self.model.get_image_features(inputs).pooler_output
        else:
            features = self.model.project_images(inputs)
        return nn.functional.normalize(features, dim=-1)

    def classify(self, inputs: Tensor) -> Tensor:
        """Logits `[n, classes]` in evaluation mode."""
        self.eval()
        scale = self.model.logit_scale.exp()
        logits: Tensor = scale * self.image_features(inputs) @ self.current_prototypes().T
        return logits

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        """Loss of this process's part of a batch; the mean over processes is the batch's loss."""
        features, prototypes = self.image_features(inputs), self.current_prototypes()
        scale = self.model.logit_scale.exp()
        if self.loss != "prototypes":
            features, labels, weight = gather(features), gather(labels), gather(weight)
            masked = self.loss == "infonce"
            return infonce(features, prototypes[labels], labels, weight, scale, masked)
        losses = nn.functional.cross_entropy(
            scale * features @ prototypes.T, labels, reduction="none"
        )
        return (weight * losses).sum() * world_size() / total


def infonce(
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask_same_class: bool,
) -> Tensor:
    """Symmetric in-batch contrastive loss, each image against the class text of every other.

    Two images of one class share their text; taken as negatives of each other they are false.

    Args:
        images: Unit features `[n, dim]`.
        texts: Unit features of each image's own class text `[n, dim]`.
        labels: Class numbers `[n]`.
        weight: `[n]`, 0 for rows that only pad.
        scale: Factor between cosines and logits.
        mask_same_class: Whether pairs of the same class are left out of the denominator.
    """
    logits = scale * images @ texts.T
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    out = (weight == 0).unsqueeze(0) & other
    if mask_same_class:
        out = out | ((labels.unsqueeze(0) == labels.unsqueeze(1)) & other)
    target = torch.arange(len(labels), device=labels.device)
    # Both masks hold for rows and columns alike, so the transpose takes the same one.
    by_image = nn.functional.cross_entropy(
        logits.masked_fill(out, -torch.inf), target, reduction="none"
    )
    by_text = nn.functional.cross_entropy(
        logits.T.masked_fill(out, -torch.inf), target, reduction="none"
    )
    return (weight * (by_image + by_text) / 2).sum() / weight.sum()
