"""Benchmark of training: an epoch of a method against a plain PyTorch loop of the same model."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import load_classes, open_image
from ...methods import Recipe, TowerMethod, get_method
from ...training import AdaptConfig, adapt
from ...training.loop import draw_order, seed_everything
from .timing import Row, as_row, check_same, synchronise
from .towers import Shape, random_clip, synthetic_images

# Settings of each method here, and what its plain loop computes at every step.
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({}, "both towers whole"),
    "vanilla": ({}, "both towers whole"),
    "convlm": ({"autoencoder_steps": 0}, "the guided tower, class texts encoded once"),
    "prompt_tuning": ({}, "both towers whole"),
}
FIXED = {"schedule": "constant", "warmup_epochs": 0}  # of every recipe: both loops at one rate
TOLERANCE = 1e-4  # of the mean loss of an epoch


def bench_train(
    *,
    shape: Shape | None = None,
    methods: Sequence[str] = tuple(METHODS),
    patients: int = 1,
    epochs: int = 4,
) -> Iterator[Row]:
    """Benchmark of epochs of methods inside the towers, against plain PyTorch loops.

    The two take turns, epoch by epoch, from the same weights, in the same order, with the same
    dropout; their losses are compared. The first epoch of each is not counted.

    Args:
        shape: Of the random CLIP.
        methods: Of `METHODS`.
        patients: Synthetic patients, five images each, one of a class.
        epochs: In all, at least 2.

    Yields:
        Three rows a method: an epoch of the plain loop, one of ours, and what goes before our
        first, such as running the frozen blocks once.

    Raises:
        GloVLMError: A loss differs from that of the plain loop.
    """
    shape = shape or Shape()
    with tempfile.TemporaryDirectory() as folder:
        images = synthetic_images(Path(folder), patients, 5)
        for name in methods:
            settings, plain = METHODS[name]
            timed = time_training(name, images, shape, settings, epochs=epochs)
            timed.check(TOLERANCE)
            yield from training_rows(f"train.{name}", timed, plain)


@dataclass
class TimedTraining:
    """Training of ours beside a plain loop, epoch by epoch.

    Attributes:
        what: It is of, in words.
        ours: Seconds of each epoch but the first.
        plain: The same of the plain loop.
        losses: Mean loss of each epoch, ours and the plain loop's.
        before: Seconds until our first epoch.
    """

    what: str
    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    before: float = 0.0

    def check(self, tolerance: float) -> None:
        """Check that both computed the same.

        Raises:
            GloVLMError: A loss differs by more than the tolerance.
        """
        for number, (ours, plain) in enumerate(self.losses, start=1):
            check_same(plain, ours, tolerance, f"the loss of epoch {number}, {self.what},")


def time_training(
    name: str,
    images: Any,
    shape: Shape,
    settings: Mapping[str, Any],
    *,
    epochs: int,
    device: Any = "cpu",
) -> TimedTraining:
    """Train by a method and by a plain loop in turn.

    Args:
        name: A method inside the towers.
        images: Labelled rows.
        shape: Of the random CLIP.
        settings: Of the method.
        epochs: In all, at least 2.
        device: Where both compute.
    """
    overrides = {**FIXED, "epochs": epochs}
    plain = _PlainLoop(name, images, shape, settings, overrides, device)
    count = f"{len(images)} synthetic images, batches of {plain.recipe.batch_size}"
    timed = TimedTraining(f"an epoch of {name}, {count}")
    marks: list[float] = []

    def take_turns(row: Mapping[str, Any]) -> None:
        synchronise(device)
        begun, first = time.perf_counter(), not marks
        timed.losses.append((row["loss"], plain.run_epoch(row["epoch"] - 1)))
        synchronise(device)
        ended = time.perf_counter()
        if first:
            timed.before = begun - start
        else:
            timed.ours.append(begun - marks[-1])
            timed.plain.append(ended - begun)
        marks.append(time.perf_counter())

    model, processor = random_clip(shape)
    model.to(device)
    synchronise(device)
    start = time.perf_counter()
    config = AdaptConfig(method_config=settings, recipe=overrides)
    adapt(model, name, images, processor=processor, config=config, on_epoch=take_turns)
    timed.before -= min(timed.ours)
    return timed


def plain_losses(
    name: str, images: Any, shape: Shape, settings: Mapping[str, Any], *, epochs: int
) -> list[float]:
    """Mean loss of each epoch of the plain loop on the CPU; see `time_training`."""
    plain = _PlainLoop(name, images, shape, settings, {**FIXED, "epochs": epochs}, "cpu")
    return [plain.run_epoch(number) for number in range(epochs)]


def training_rows(name: str, timed: TimedTraining, plain: str) -> list[Row]:
    """Rows of a training that was timed.

    Args:
        name: What they begin with.
        timed: Of `time_training`.
        plain: What the plain loop computes at every step.
    """
    theirs, ours, before = min(timed.plain), min(timed.ours), max(timed.before, 0.0)
    first = f"{timed.what}: what goes before the first; ratio: epochs of the plain loop"
    return [
        as_row(f"{name}_plain", theirs, "s", None, f"{timed.what}: plain loop, {plain}"),
        as_row(name, ours, "s", theirs / ours, f"{timed.what}; ratio: times faster"),
        as_row(f"{name}_before", before, "s", before / theirs, first),
    ]


class _PlainLoop:
    """Training loop as one would write it for one model: everything is computed at every step."""

    def __init__(
        self,
        name: str,
        images: Any,
        shape: Shape,
        settings: Mapping[str, Any],
        overrides: Mapping[str, Any],
        device: Any,
    ) -> None:
        self.model, processor = random_clip(shape)
        self.model.to(device).requires_grad_(False)
        classes = load_classes(images.features["label"].names)
        method = get_method(name)
        assert isinstance(method, TowerMethod)
        config = method.configure(settings)
        seed_everything(0)  # what is attached begins as in `adapt`
        self.method: Any = method.attach(self.model, processor, classes, config)
        self.labels = torch.tensor(images["label"])
        recipe = method.recipe(int(self.labels.bincount().max()), config)
        recipe = Recipe(**{**asdict(recipe), **overrides})
        self.recipe = replace(recipe, batch_size=min(recipe.batch_size, len(self.labels)))
        pictures = [open_image(value) for value in images["image"]]
        self.pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(device)
        encoded = processor.encode_prompts(self.method.class_texts)
        self.text = {key: value.to(device) for key, value in encoded.items()}
        self.fixed = None if self.method.trains_text else self._class_texts().detach()
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> Any:
        lr, decay = self.recipe.lr, self.recipe.weight_decay
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(self.method.groups, lr=lr, momentum=0.9, weight_decay=decay)
        kind = torch.optim.Adam if self.recipe.optimizer == "adam" else torch.optim.AdamW
        return kind(self.method.groups, lr=lr, weight_decay=decay)

    def run_epoch(self, number: int) -> float:
        """Train for an epoch, counted from 0; its mean loss."""
        order = draw_order(self.recipe, self.labels, 0, number)
        seed_everything(0, number, 0)
        self.model.train()
        compute, total = self._guided_loss if self.method.guides_images else self._loss, 0.0
        for rows in order.split(self.recipe.batch_size):
            labels = self.labels[rows].to(self.pixels.device)
            loss = compute(self.pixels[rows.to(self.pixels.device)], labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += float(loss.detach()) * len(rows)
        return total / len(order)

    def _class_texts(self) -> Tensor:
        """Unit class texts `[K, dim]`: normalised texts, averaged and normalised again."""
        ids, mask, owner = (self.text[k] for k in ("input_ids", "attention_mask", "class_index"))
        features = self.model.backbone.get_text_features(input_ids=ids, attention_mask=mask)
        unit = nn.functional.normalize(features.pooler_output, dim=-1)
        means = torch.stack([unit[owner == k].sum(0) for k in range(int(owner.max()) + 1)])
        return nn.functional.normalize(means, dim=-1)

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of scaled cosines."""
        features = self.model.backbone.get_image_features(pixel_values=pixels).pooler_output
        texts = self._class_texts() if self.fixed is None else self.fixed
        logits = self.model.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ texts.T
        return nn.functional.cross_entropy(logits, labels)

    def _guided_loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """ConVLM: cross-entropy of dot products, and both autoencoders' distances."""
        assert self.fixed is not None
        text, guide = self.fixed[labels], self.method.context
        with guide.read(text) as seen:
            features = self.model.backbone.get_image_features(pixel_values=pixels).pooler_output
        loss = nn.functional.cross_entropy(features @ self.fixed.T, labels)
        for layer, read_query in enumerate(guide.to_text):
            loss = loss + (seen.guesses[layer] - seen.final).abs().mean()
            loss = loss + (read_query(seen.queries[layer]) - text).abs().mean()
        return loss
