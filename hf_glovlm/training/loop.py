"""Training loop over Accelerate: batches in, a log out, a checkpoint after every epoch."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import GloVLMError
from ..files import changed_inputs, digest_tensors, digest_value, replacing, write_text
from ..inference.views import reframe
from ..methods import Recipe
from ..progress import counting

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset


_INCIDENTAL = ("output_dir", "resume", "replay")  # where and how fast, not what


class BatchSource(Protocol):
    """Batch source: inputs by index, and their labels."""

    labels: Tensor

    def fetch(self, index: Sequence[int]) -> Tensor:
        """Inputs of some rows, stacked."""


@dataclass
class TensorSource:
    """Batch source of features in memory `[n, dim]`."""

    inputs: Tensor
    labels: Tensor

    def fetch(self, index: Sequence[int]) -> Tensor:
        """Rows of the tensor."""
        return self.inputs[list(index)]


class FeatureSource(TensorSource):
    """Batch source of few features, laid out once an epoch so that its batches are slices."""

    def arrange(self, order: Tensor) -> Tensor:
        """All rows in the order of an epoch `[n, dim]`."""
        return self.inputs.index_select(0, order)


class ViewSource(FeatureSource):
    """Batch source of features of augmented views `[n, V, dim]`: in each epoch the next view."""

    epoch = 0

    def fetch(self, index: Sequence[int]) -> Tensor:
        """One view of each row."""
        return self.inputs[list(index), self.epoch % self.inputs.shape[1]]

    def arrange(self, order: Tensor) -> Tensor:
        """One view of each row in the order of an epoch `[n, dim]`."""
        return self.inputs[:, self.epoch % self.inputs.shape[1]].index_select(0, order)


def feature_source(features: Tensor, views: Tensor | None, labels: Tensor) -> FeatureSource:
    """Batch source of features `[n, dim]`, or of those of views `[n, V, dim]` in their place."""
    return FeatureSource(features, labels) if views is None else ViewSource(views, labels)


class ImageSource:
    """Batch source of images, preprocessed at first use and kept while they are few.

    Args:
        images: Rows with `image`.
        labels: Class numbers `[n]`.
        processor: A `GloVLMProcessor`.
        augment: Random flips, quarter turns and crops; glomeruli have no upright side.
        keep_bytes: Most memory that preprocessed images may take.
    """

    def __init__(
        self,
        images: "Dataset",
        labels: Tensor,
        processor: Any,
        augment: bool = False,
        keep_bytes: int = 2**30,
    ) -> None:
        from ..inference.prediction import ImageRows

        self.rows = ImageRows(images, processor.outline, processor.draft_side)
        self.labels = labels
        self.processor = processor
        self.augment = augment
        self.keep_bytes = keep_bytes
        self.kept: dict[int, Tensor] = {}

    def fetch(self, index: Sequence[int]) -> Tensor:
        """Preprocessed images `[n, 3, height, width]`; 4 channels with outlines that are pooled."""
        rows = []
        for i in index:
            row = self.kept[i] if i in self.kept else self._transform(i)
            if not self.augment and (len(self.kept) + 1) * row.nbytes <= self.keep_bytes:
                self.kept[i] = row
            rows.append(row)
        return torch.stack(rows)

    def _transform(self, i: int) -> Tensor:
        (image,) = self.rows.pictures([i])
        if self.augment:
            image = reframe(image, torch.rand(5).tolist())
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def world_size() -> int:
    """Number of processes that train together."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Join the rows of all processes; gradients flow back to each. Equal sizes everywhere."""
    if world_size() == 1:
        return tensor
    if not tensor.is_floating_point():
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor))


def plan(recipe: Recipe, n: int) -> tuple[int, int]:
    """Numbers of epochs and optimiser steps of a recipe on `n` images."""
    batches = math.ceil(n / recipe.batch_size)
    if recipe.steps is None:
        return recipe.epochs, recipe.epochs * batches
    return math.ceil(recipe.steps / batches), recipe.steps


def learning_rate(
    recipe: Recipe, base: float, epoch: int, epochs: int, step: int = 0, steps: int = 1
) -> float:
    """Learning rate of a step: warm-up, then constant, cosine, or halved after each quarter.

    Args:
        recipe: How to train.
        base: Rate of the optimiser group.
        epoch: Counted from 0.
        epochs: In all.
        step: Counted from 0 over all epochs; matters if the recipe moves by step.
        steps: In all.
    """
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr
    if recipe.schedule == "constant":
        return base
    done = step / steps if recipe.by_step else (epoch - recipe.warmup_epochs) / epochs
    if recipe.schedule == "steps":
        return base * 0.5 ** int(4 * done)
    return base * (recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def draw_order(recipe: Recipe, labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Order of the rows in one epoch `[n]`, drawn the same in every process.

    Args:
        recipe: Its `sampling`: every row once, or with replacement by one over its class's size.
        labels: Class numbers `[n]`.
        seed: Of the run.
        epoch: Counted from 0.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    n = len(labels)
    if recipe.sampling == "class_balanced":
        weight = 1.0 / labels.bincount()[labels].double()
        return torch.multinomial(weight, n, replacement=True, generator=generator)
    return torch.randperm(n, generator=generator)


def validator(
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


def describe_inputs(
    model: Any,
    processor: Any,
    rows: Sequence["Dataset | None"],
    classes: Sequence[Any],
    method: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint is made from beside its recipe.

    Args:
        model: A `GloVLMModel`.
        processor: Its processor.
        rows: Labelled images, and those of validation, if any.
        classes: Names and prompts in label order.
        method: Its name.
        settings: Those of the adaptation.
    """
    from ..backbones import describe_weights
    from ..data.folder import column, content_hash, in_threads
    from ..data.outlines import masks_of

    def digest(rows: "Dataset | None") -> str | None:
        if rows is None:
            return None
        images, labels = column(rows, "image"), column(rows, "label")
        masks = [mask and content_hash(mask) for mask in masks_of(rows)]
        content = [in_threads(content_hash, images), labels]
        return digest_value([*content, masks] if any(masks) else content)

    support, validation = map(digest, rows)
    return {
        "labelled images": support,
        "validation images": validation,
        "classes": digest_value([c.to_dict() for c in classes]),
        "backbone": describe_weights(model, processor),
        "method": method,
        "settings": {k: v for k, v in settings.items() if k not in _INCIDENTAL},
    }


def fit(
    step: nn.Module,
    groups: list[dict[str, Any]],
    source: BatchSource,
    recipe: Recipe,
    *,
    accelerator: "Accelerator",
    seed: int = 0,
    accumulate: int = 1,
    clip_norm: float | None = None,
    distributed: bool = True,
    validate: Callable[[], float] | None = None,
    output_dir: Path | None = None,
    resume: bool = False,
    made_from: Mapping[str, Any] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    begin: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Training loop, for every method that trains and for pretraining.

    One process or many give the same: the order is drawn from `(seed, epoch)` for the whole batch,
    each process takes every n-th row of it, and the parts' losses add up to the batch's mean.

    Args:
        step: `forward(inputs, labels, weight, total)` gives this process's part of the loss; with
            an attribute `takes_rows` that is true it is given the row numbers too, as `rows`. With
            `mean_loss(inputs, labels)`, the same for a whole batch, one process goes through the
            slices of a `FeatureSource`.
        groups: Optimiser groups, `{"params", "lr"?, "weight_decay"?}`.
        source: Where batches come from.
        recipe: How to train.
        accelerator: Device, precision, processes, trackers.
        seed: Of the order and of everything random inside an epoch.
        accumulate: Parts that each batch is split into.
        clip_norm: Largest gradient norm.
        distributed: Whether the processes train together.
        validate: Gives macro-AUC on validation; then the best epoch is kept, not the last.
        output_dir: Takes `log.jsonl` and, after every epoch (of more than 100, about a hundred
            times), `checkpoint.safetensors`.
        resume: Go on from that checkpoint.
        made_from: Digests and settings by name, which the checkpoint states: it is refused where
            they have changed.
        on_epoch: Called with every epoch's log row.
        begin: Called with the number of steps in all before the first.
        after_step: Called with the number of every optimiser step, counted from 1.

    Returns:
        The log, one row an epoch.

    Raises:
        GloVLMError: The loss became NaN or infinite; the checkpoint is damaged, or of a training
            from other data, weights or settings.
    """
    processes = accelerator.num_processes if distributed else 1
    rank = accelerator.process_index if distributed else 0
    optimizer = _optimizer(groups, recipe)
    about = {"recipe": asdict(recipe), "seed": seed, "made_from": dict(made_from or {})}
    state = _State(step, optimizer, about, output_dir if rank == 0 else None, output_dir)
    log = state.load() if resume else []
    takes_rows = bool(getattr(step, "takes_rows", False))
    in_slices = isinstance(source, FeatureSource) and hasattr(step, "mean_loss")
    in_slices = in_slices and processes == accumulate == 1
    wrapped = accelerator.prepare(step) if processes > 1 else step
    if accelerator.scaler is not None:  # fp16: the scaled gradient is taken back by its step
        optimizer = accelerator.prepare(optimizer)
    n = len(source.labels)
    epochs, steps = plan(recipe, n)
    done = len(log) * math.ceil(n / recipe.batch_size)
    if begin is not None:
        begin(steps)
    with counting("epochs", epochs, done=len(log)) as count:
        for epoch in range(len(log), epochs):
            if state.stale >= recipe.patience:
                break
            started, seen = time.perf_counter(), 0
            order = draw_order(recipe, source.labels, seed, epoch)
            seed_everything(seed, epoch, rank)
            if isinstance(source, ViewSource):
                source.epoch = epoch
            if in_slices:
                rows = source.arrange(order).to(accelerator.device)  # type: ignore[attr-defined]
                labels = source.labels[order].to(accelerator.device)
            step.train()
            total_loss = 0.0
            for first in range(0, n, recipe.batch_size):
                if done == steps:
                    break
                for group in optimizer.param_groups:
                    base = group["base_lr"]
                    group["lr"] = learning_rate(recipe, base, epoch, epochs, done, steps)
                part = slice(first, min(first + recipe.batch_size, n))
                if in_slices:
                    batch_loss = _backward_slice(step, rows[part], labels[part], accelerator)
                else:
                    batch = order[part].tolist()
                    batch_loss = _backward(
                        wrapped, source, batch, accelerator, accumulate, rank, processes, takes_rows
                    )
                if not math.isfinite(batch_loss):
                    raise GloVLMError(
                        f"The loss became {batch_loss} in epoch {epoch + 1}: the learning rate "
                        f"({recipe.lr:g}) is too high for these images, or an input is broken. "
                        "Lower --lr or give --clip-norm 1.0."
                    )
                if clip_norm is not None:
                    accelerator.clip_grad_norm_([p for g in groups for p in g["params"]], clip_norm)
                optimizer.step()
                done, size = done + 1, part.stop - first
                if after_step is not None:  # before the gradients go: AdaLoRA reads them
                    after_step(done)
                optimizer.zero_grad(set_to_none=True)
                seen += size
                total_loss += batch_loss * size
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "epochs": epochs,
                "loss": total_loss / seen,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 3),
            }
            if validate is not None:
                row["validation_macro_auc"] = validate()
            log.append(row)
            # Short epochs by the hundred need not all go to disk.
            due = epoch + 1 == epochs or (epoch + 1) % max(1, epochs // 100) == 0
            state.after_epoch(row, log, recipe, write=due)
            if accelerator.trackers:
                accelerator.log({k: v for k, v in row.items() if k != "epochs"}, step=epoch + 1)
            if on_epoch is not None and rank == 0:
                on_epoch(row)
            count.reach(epoch + 1, f"loss {row['loss']:.3g}")
    if state.write_to is not None and log:
        write_text(state.write_to / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
    state.restore_best()
    step.eval()
    return log


def _backward_slice(step: Any, inputs: Tensor, labels: Tensor, accelerator: "Accelerator") -> float:
    """Gradient of a batch that is whole and in place; its loss."""
    if accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 1:
        loss = step.mean_loss(inputs, labels)
        loss.backward()
    else:
        with accelerator.autocast():
            loss = step.mean_loss(inputs, labels)
            accelerator.backward(loss)
    return float(loss.detach())


def _backward(
    step: nn.Module,
    source: BatchSource,
    batch: list[int],
    accelerator: "Accelerator",
    accumulate: int,
    rank: int,
    processes: int,
    takes_rows: bool,
) -> float:
    """Gradient accumulation over a batch, part by part; its loss, the same in all processes."""
    parts = [batch[i::accumulate] for i in range(accumulate) if batch[i::accumulate]]
    total = 0.0
    for i, part in enumerate(parts):
        index, weight = _share(part, rank, processes)
        waiting = processes > 1 and i < len(parts) - 1
        more = {"rows": torch.tensor(index)} if takes_rows else {}
        with accelerator.no_sync(step) if waiting else nullcontext(), accelerator.autocast():
            loss = step(
                source.fetch(index).to(accelerator.device),
                source.labels[index].to(accelerator.device),
                weight.to(accelerator.device),
                len(batch),
                **more,
            )
            accelerator.backward(loss)
        total += float(loss.detach())
    if processes == 1:
        return total
    return float(accelerator.reduce(torch.tensor(total, device=accelerator.device), "mean"))


def _share(batch: list[int], rank: int, processes: int) -> tuple[list[int], Tensor]:
    """One process's rows of a batch, padded with rows of weight 0 to the same number everywhere."""
    size = math.ceil(len(batch) / processes)
    mine = batch[rank::processes]
    weight = torch.ones(size)
    weight[len(mine) :] = 0
    return mine + batch[:1] * (size - len(mine)), weight


def _optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    listed = [
        {**g, "lr": g.get("lr", recipe.lr), "base_lr": g.get("lr", recipe.lr)} for g in groups
    ]
    if recipe.optimizer == "sgd":
        decay = recipe.weight_decay
        return torch.optim.SGD(listed, lr=recipe.lr, momentum=0.9, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(listed, lr=recipe.lr, weight_decay=recipe.weight_decay, eps=recipe.eps, fused=True)


class _State:
    """Checkpoint: trained tensors, optimiser moments, the log, the best epoch.

    One safetensors file, replaced as a whole, so that it is never half-written. It states what the
    training is made from, and a checksum of all that it holds.
    """

    def __init__(
        self,
        step: nn.Module,
        optimizer: torch.optim.Optimizer,
        about: dict[str, Any],
        write_to: Path | None,
        read_from: Path | None,
    ) -> None:
        self.optimizer = optimizer
        self.about = about
        self.write_to, self.read_from = write_to, read_from
        trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
        named = dict(step.named_parameters())
        self.tensors: dict[str, Tensor] = {n: p for n, p in named.items() if id(p) in trained}
        self.tensors |= {n: b for n, b in step.named_buffers() if b.numel() > 0}
        self.best: dict[str, Tensor] = {}
        self.best_value = -math.inf
        self.stale = 0

    def after_epoch(
        self, row: dict[str, Any], log: list[dict[str, Any]], recipe: Recipe, write: bool = True
    ) -> None:
        value = row.get("validation_macro_auc")
        if value is not None:
            if value > self.best_value + recipe.min_delta:
                self.best = {n: t.detach().clone() for n, t in self.tensors.items()}
                self.best_value, self.stale = value, 0
            else:
                self.stale += 1
        if self.write_to is not None and write:
            self._save(log)

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.tensors[name].copy_(tensor)

    def _save(self, log: list[dict[str, Any]]) -> None:
        from safetensors.torch import save_file

        assert self.write_to is not None
        tensors = {f"now.{n}": t.detach().cpu().clone() for n, t in self.tensors.items()}
        tensors |= {f"best.{n}": t.cpu().clone() for n, t in self.best.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    tensors[f"moment.{i}.{key}"] = value.detach().cpu().clone()
        facts = {"log": log, "best_value": self.best_value, "stale": self.stale, **self.about}
        text = json.dumps(facts, default=str)
        metadata = {"facts": text, "checksum": _checksum(tensors, text)}
        with replacing(self.write_to / "checkpoint.safetensors") as fresh:
            save_file(tensors, fresh, metadata=metadata)
        write_text(self.write_to / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))

    def load(self) -> list[dict[str, Any]]:
        path = self.read_from / "checkpoint.safetensors" if self.read_from else None
        if path is None or not path.is_file():
            return []
        facts, tensors = _read_checkpoint(path)
        self._check_same(facts, path)
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "moment": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            parts[kind][name] = tensor
        now, ours = parts["now"], self.tensors
        if {n: t.shape for n, t in now.items()} != {n: t.shape for n, t in ours.items()}:
            raise GloVLMError(
                f"The checkpoint in '{self.read_from}' belongs to another method or backbone: use "
                "--overwrite, or another folder."
            )
        with torch.no_grad():
            for name, tensor in now.items():
                ours[name].copy_(tensor)
        self.best |= {name: tensor.to(ours[name].device) for name, tensor in parts["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["moment"].items():
            i, _, key = name.partition(".")
            moments.setdefault(int(i), {})[key] = tensor
        state = self.optimizer.state_dict()
        state["state"] = moments
        self.optimizer.load_state_dict(state)
        self.best_value, self.stale = facts["best_value"], facts["stale"]
        log: list[dict[str, Any]] = facts["log"]
        return log

    def _check_same(self, facts: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of other settings, data or weights."""
        # A field that is younger than the checkpoint has its default, which changes nothing.
        written = asdict(Recipe(lr=0.0, epochs=0, batch_size=1)) | facts["recipe"]
        recipe, seed = self.about["recipe"], self.about["seed"]
        if written != recipe or facts["seed"] != seed:
            raise GloVLMError(
                f"The checkpoint in '{path.parent}' was written with other settings: expected "
                f"{recipe}, seed {seed}; found {facts['recipe']}, seed {facts['seed']}. "
                "Repeat the run's own settings (its config.yaml), or use --overwrite."
            )
        changed = changed_inputs(facts.get("made_from", {}), self.about["made_from"])
        if changed:
            raise GloVLMError(
                f"The checkpoint in '{path.parent}' is of a training from something else "
                f"({'; '.join(changed)}): begin again (--overwrite, or without resume), or name "
                "another folder."
            )


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint that is whole and undamaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
        # One that was written before checkpoints had a checksum states no origin either.
        from_before = "checksum" not in metadata and "recipe" in facts
        from_before = from_before and not facts.get("made_from")
        if from_before or metadata["checksum"] == _checksum(tensors, metadata["facts"]):
            return facts, tensors
        reason = "its checksum does not match"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()}"
    raise GloVLMError(
        f"'{path}' is damaged, or no checkpoint of this version ({reason}): begin again "
        "(--overwrite, or without resume), or restore a copy."
    )


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Checksum of everything in a checkpoint."""
    return digest_value([digest_tensors(sorted(tensors.items())), facts])


def seed_everything(seed: int, *more: int) -> None:
    """Seed Python, numpy and torch from a seed and further numbers, the same on every machine."""
    import random

    import numpy as np

    # The count stands first, since numpy takes [1], [1, 0] and [1, 0, 0] for the same.
    mixed = int(np.random.SeedSequence([len(more), seed, *more]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - libraries draw from it
    if torch.accelerator.is_available():
        torch.manual_seed(mixed)
    else:  # less than a tenth of the time: nothing is noted for devices that are not there
        torch.default_generator.manual_seed(mixed)
