"""Training losses: of a head on features, and of images against class texts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import StepState, TowerMethod
from ..model.context import ContextGuide
from ..model.outlines import cover_patches
from ..model.prompts import TEXT_CHUNK
from ..model.towers import patch_grid
from .config import Loss
from .frozen_cache import Replay, record_tower
from .loop import gather, world_size


class HeadStep(nn.Module):
    """Cross-entropy of a module on features.

    Args:
        head: Features `[n, dim]` in, logits `[n, classes]` out.
        penalty: Added to the mean loss of every step.
        on_unit: Whether steps are given unit features, for `head.compare`.
    """

    def __init__(
        self,
        head: nn.Module,
        penalty: Callable[[], Tensor | None] | None = None,
        *,
        on_unit: bool = False,
    ) -> None:
        super().__init__()
        self.head = head
        self.penalty = penalty
        self.on_unit = on_unit

    def classify(self, features: Tensor) -> Tensor:
        """Logits `[n, classes]` in evaluation mode."""
        self.head.eval()
        logits: Tensor = self.head(features)
        return logits

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        """Sum of the weighted losses over `total`, so that parts of a batch add up to its mean."""
        losses = nn.functional.cross_entropy(self._logits(inputs), labels, reduction="none")
        loss = (weight * losses).sum() / total
        penalty = self.penalty() if self.penalty is not None else None
        return loss if penalty is None else loss + penalty * weight.sum() / total

    def mean_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of a whole batch: what `forward` gives with every weight 1."""
        loss = nn.functional.cross_entropy(self._logits(inputs), labels)
        penalty = self.penalty() if self.penalty is not None else None
        return loss if penalty is None else loss + penalty

    def _logits(self, inputs: Tensor) -> Tensor:
        several = len(inputs) > 1
        if self.head.training != several:
            self.head.train(several)  # one row has no variance for batch norm to take
        logits: Tensor = self.head.compare(inputs) if self.on_unit else self.head(inputs)  # type: ignore[operator]
        return logits


class TowerStep(nn.Module):
    """Loss of images against class texts, with whatever trains inside the towers.

    Args:
        method: A method that is attached to a model.
        loss: `prototypes`, `infonce` or `infonce_published`.
    """

    def __init__(self, method: TowerMethod, loss: Loss) -> None:
        super().__init__()
        self.model = method.model
        self.method = method
        self.loss = loss
        encoded = method.processor.encode_prompts(method.class_texts)
        self.text = {k: v.to(self.model.logit_scale.device) for k, v in encoded.items()}
        self.images_replay: Replay | None = None
        self.blank: Tensor | None = None
        self.outlined = self.model.config.pools_inside
        self.texts_replay: tuple[Replay, Tensor] | None = None
        self.fixed: Tensor | None = None
        self.takes_rows = method.guides_images
        if not method.trains_text:  # text of an unchanged tower is encoded once
            with torch.no_grad():
                self.fixed = self.current_prototypes()

    def train(self, mode: bool = True) -> "TowerStep":
        """Training mode of what a method added alone: few images do not outweigh a noisy tower."""
        super().train(False)
        for name, module in self.named_modules():
            # PEFT's: its layers, some of which read their own flag, and what they hold.
            peft = type(module).__module__.startswith("peft.")
            # Its own flag alone: it reads texts in training mode, and nothing in it drops out.
            guide = isinstance(module, ContextGuide)
            if peft or guide or "dropout" in name.rpartition(".")[0]:
                module.training = mode
        return self

    def current_prototypes(self) -> Tensor:
        """Unit class prototypes `[K, dim]` as the towers stand now."""
        if self.fixed is not None:
            return self.fixed
        if self.texts_replay is not None:
            replay, states = self.texts_replay
            with replay.play(states):
                return self.model.class_prototypes(**self.text)
        prototypes: Tensor = self.model.class_prototypes(**self.text)
        return prototypes

    def replay_images(self, fetch: Callable[[Sequence[int]], Tensor], rows: int) -> Tensor | None:
        """Run the vision blocks that no step changes once, and start behind them from now on.

        Args:
            fetch: Preprocessed images by index.
            rows: Number of images.

        Returns:
            States `[rows, tokens, width]`, which `image_features` takes from now on in place of
            images; `None` if the first block changes or the states would not fit into memory. With
            outlines that are pooled the outline of each follows its tokens.
        """
        if self.outlined and self.model.context is not None:
            return None  # which patches are left is noted where they are dropped
        tower, device, dtype = self.model.backbone.vision_model, self._device, self.model.dtype

        def run(part: slice) -> Tensor:
            images = fetch(range(part.start, part.stop)).to(device, dtype)
            pooled: Tensor = self.model.get_image_features(images).pooler_output
            return pooled

        if self.images_replay is not None:  # the same tower, for the validation images
            states = self.images_replay.record(run, rows)
            return states if states is None else self._with_outlines(states, fetch)
        self.train()
        blank = torch.zeros_like(fetch([0]).to(device, dtype))

        def empty(part: slice) -> Tensor:
            """Features from an empty picture, with the outlines of those that it stands for."""
            image = blank
            if self.outlined:
                image = blank.repeat(part.stop - part.start, 1, 1, 1)
                image[:, 3] = fetch(range(part.start, part.stop)).to(device, dtype)[:, 3]
            pooled: Tensor = self.model.get_image_features(image).pooler_output
            return pooled

        recorded = record_tower(tower, run, rows, blank=empty)
        if recorded is None:
            return None
        self.blank = blank
        self.images_replay, states = recorded
        return self._with_outlines(states, fetch)

    def _with_outlines(self, states: Tensor, fetch: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """States with the outline of each image behind its tokens, where these are pooled.

        It takes the place of further tokens: the part of each patch inside, filled up to a row.
        """
        if not self.outlined:
            return states
        rows, _, width = states.shape
        parts = [cover_patches(fetch([i])[:, 3], *self._patches) for i in range(rows)]
        coverage = torch.cat(parts).to(states.dtype)
        coverage = nn.functional.pad(coverage, (0, -coverage.shape[1] % width))
        return torch.cat([states, coverage.view(rows, -1, width)], dim=1)

    def _replay(self, inputs: Tensor) -> Tensor:
        """Features from states behind the frozen blocks, see `replay_images`."""
        assert self.images_replay is not None
        assert self.blank is not None
        states, image = inputs, self.blank
        if self.outlined:
            (rows, columns), patch = self._patches
            length = -(-rows * columns // inputs.shape[-1])
            states, coverage = inputs[:, :-length], inputs[:, -length:].flatten(1)
            grid = coverage[:, : rows * columns].view(-1, rows, columns)
            inside = grid.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
            image = image.repeat(len(inputs), 1, 1, 1)
            image[:, 3, : inside.shape[1], : inside.shape[2]] = inside
        with self.images_replay.play(states):
            features: Tensor = self.model.get_image_features(image).pooler_output
        return features

    @property
    def _patches(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of patches of the images that are replayed, and a patch in pixels."""
        assert self.blank is not None
        config = self.model.backbone.vision_model.config
        grid = patch_grid(config, self.blank)
        size = config.patch_size
        patch = size if isinstance(size, list | tuple) else (size, size)
        return grid, (int(patch[0]), int(patch[1]))

    def replay_texts(self) -> None:
        """Run the text blocks that no step changes once; the class prompts are always the same."""
        ids, mask = self.text["input_ids"], self.text["attention_mask"]
        if self.fixed is not None or len(ids) > TEXT_CHUNK:  # chunks are recomputed, out of order
            return
        self.train()

        def encode(rows: slice) -> Tensor:
            pooled: Tensor = self.model.get_text_features(ids[rows], mask[rows]).pooler_output
            return pooled

        recorded = record_tower(self.model.backbone.text_model, encode, len(ids))
        if recorded is not None:
            self.texts_replay = recorded[0], recorded[1].to(self._device)

    def stop_replay(self) -> None:
        """Run whole towers again."""
        self.images_replay = self.texts_replay = None

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    def image_features(self, inputs: Tensor) -> Tensor:
        """Unit features `[n, dim]` of images, or of pooled vectors where the tower is frozen.

        With `raw_logits` they are not normalised.
        """
        inputs = inputs.to(self.model.dtype)
        if self.images_replay is not None:
            features = self._replay(inputs)
        elif self.method.trains_vision:
            features = self.model.get_image_features(inputs).pooler_output
        else:
            features = self.model.project_images(inputs)
        return features if self.method.raw_logits else nn.functional.normalize(features, dim=-1)

    def compare(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes `[K, dim]`, or `[n, K, dim]` one set an image, and logits `[n, K]`."""
        scale = self.model.logit_scale.exp()
        if self.method.per_image:
            prototypes = self.method.image_prototypes(features)
            return prototypes, scale * torch.einsum("nd,nkd->nk", features, prototypes)
        prototypes = self.current_prototypes()
        if self.method.raw_logits:
            return prototypes, features @ prototypes.T
        return prototypes, scale * features @ prototypes.T

    def classify(self, inputs: Tensor) -> Tensor:
        """Logits `[n, classes]` in evaluation mode."""
        self.eval()
        return self.compare(self.image_features(inputs))[1]

    def _guide_images(self, labels: Tensor, rows: Tensor | None) -> AbstractContextManager[Any]:
        if not self.takes_rows:
            return nullcontext()
        assert rows is not None  # the loop gives them to a step with `takes_rows`
        return self.method.guide_images(labels, rows, self.current_prototypes())

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        weight: Tensor,
        total: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Loss of this process's part of a batch; the mean over processes is the batch's loss.

        Args:
            inputs: What `image_features` takes `[n, ...]`.
            labels: Class numbers `[n]`.
            weight: `[n]`, 0 for rows that only pad.
            total: Images of the batch in all processes and parts.
            rows: Row numbers of the images `[n]`, for a step with `takes_rows`.
        """
        with self._guide_images(labels, rows):
            features = self.image_features(inputs)
        if self.loss != "prototypes" or self.method.whole_batch:
            # These need the whole batch in one place: every process computes all of it.
            features, labels, weight = gather(features), gather(labels), gather(weight)
            count = float(weight.sum())
        else:
            count = total / world_size()
        prototypes, logits = self.compare(features)
        state = StepState(features, prototypes, logits, labels, weight)
        if self.loss == "prototypes":
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = (weight * losses).sum() / count
        else:
            scale = self.model.logit_scale.exp()
            masked = self.loss == "infonce"
            loss = infonce(features, prototypes[labels], labels, weight, scale, masked)
        reference = self.method.reference_loss(state)
        if reference is not None:
            loss = project_gradient(loss, reference, self.method.trained)
        penalty = self.method.penalty(state)
        if penalty is not None:
            loss = loss + float(weight.sum()) / count * penalty
        return loss


def project_gradient(loss: Tensor, reference: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Gradient projection: a loss whose gradient does not oppose that of a reference (ProGrad).

    Where the gradient `g` of the loss and `h` of the reference point apart (`g.h < 0`), `g` is
    replaced by `g - (g.h / h.h) h`, for each parameter by itself (Zhu et al. 2023,
    arXiv:2205.14865, eq. 4).

    Args:
        loss: Scalar.
        reference: Scalar; a parameter that it does not depend on keeps its gradient.
        parameters: All that train.
    """
    own: Any = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    others: Any = torch.autograd.grad(reference, parameters, retain_graph=True, allow_unused=True)
    surrogate = loss.new_zeros(())
    for parameter, g, h in zip(parameters, own, others, strict=True):
        if g is None:
            continue
        if h is not None and (dot := (g * h).sum()) < 0:
            g = g - dot / h.square().sum().clamp(min=1e-30) * h
        surrogate = surrogate + (parameter * g.detach()).sum()
    return loss.detach() + surrogate - surrogate.detach()


def infonce(
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    weight: Tensor,
    scale: Tensor,
    mask_same_class: bool,
) -> Tensor:
    """InfoNCE: symmetric in-batch contrastive loss, each image against the others' class texts.

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
    by_image, by_text = (
        nn.functional.cross_entropy(x.masked_fill(out, -torch.inf), target, reduction="none")
        for x in (logits, logits.T)
    )
    return (weight * (by_image + by_text) / 2).sum() / weight.sum()
