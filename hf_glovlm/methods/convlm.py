"""ConVLM: context-guided token learning and patch dropping in the vision tower."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..data.folder import column
from ..errors import GloVLMError
from ..model.context import ContextGuide, GuidedPass
from ..model.prompts import tower_blocks
from ..settings import Settings, setting
from .contract import Recipe, StepState, TowerMethod, register
from .fine_tuning import unused_parameters

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 32  # images that go through the tower together
BATCH = 256  # images in a step of pretraining, as in the published recipe
LEAST_SPREAD = 0.01  # of the guidance; below, no text enters to speak of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConVLMConfig(Settings):
    """Settings of `convlm`."""

    layers: list[int] = setting(
        factory=list,
        help="Blocks that are guided and drop patches, counted from 0. Empty: those a quarter, "
        "half and three quarters down the tower, which of 12 blocks are the published 3, 6 and 9; "
        "with `blocks` all of these.",
    )
    theta: float = setting(
        0.9, help="Share of the class token's own query; 1 lets no text in.", least=0, most=1
    )
    keep: float = setting(
        0.9,
        help="Share of the patches that go on at each of these layers; 1 drops none.",
        above=0,
        most=1,
    )
    keep_schedule: Literal["constant", "cosine"] = setting(
        "constant",
        help="`constant` as published; `cosine` (EViT, arXiv 2202.07800) keeps all patches at "
        "first and falls to `keep` by the last step of training.",
    )
    keep_start: float = setting(
        0.25,
        help="Where the cosine begins, as a share of the steps (EViT: after 10 epochs).",
        least=0,
        below=1,
    )
    fuse: bool = setting(True, help="Whether the dropped patches go on as one token.")
    renormalize: bool = setting(
        False, help="Whether its weights sum to one; as published they do not."
    )
    context: Literal["classes", "captions", "none"] = setting(
        "classes",
        help="What guides: the text of the image's class, a `caption` column with one text an "
        "image, or nothing (plain token pruning, and no further loss).",
    )
    target: Literal["final", "layer"] = setting(
        "final",
        help="What is predicted from a text: the class token behind the `final` norm (published "
        "code), or that which the `layer` itself reads (published figure).",
    )
    weight_v: float = setting(
        1.0, help="Of the loss between that token and the one made of the text.", least=0
    )
    weight_c: float = setting(
        1.0,
        help="Of the loss between the text and the one made of the class token's query.",
        least=0,
    )
    logits: Literal["raw", "cosine"] = setting(
        "raw",
        help="`raw`: dot product of the projected class token with the unit class texts, as "
        "published; or `cosine`, times the backbone's own scale.",
    )
    blocks: int = setting(
        0,
        help="0: the whole tower trains. Else the tower stays frozen and this many trainable "
        "blocks stand on its tokens.",
        least=0,
        most=1000,
    )
    autoencoder_steps: int = setting(
        400,
        help="Steps for which the autoencoders train alone at first, on the class tokens of the "
        "tower as it comes; 0 as published, where the thousands of steps that follow do it. After "
        "the few of a small support the text would still be the same for every class.",
        least=0,
        most=10**6,
    )
    autoencoder_lr: float = setting(1e-3, help="Learning rate of these steps.", above=0)
    projection_lr: float = setting(5e-3, help="Learning rate of the projection.", least=0)


@register
class ConVLM(TowerMethod):
    """ConVLM: context-guided token learning and token enhancement, end to end or on a frozen tower.

    `L = CE(logits, y) + weight_v sum_l mean|AE_c(t) - x| + weight_c sum_l mean|AE_v(q_l) - t|` over
    the guided layers l, with t the text, x the class token (`target`) and q_l its query with the
    text already in it; nothing is cut from the gradient. Texts enter in training alone.

    The published code trains two groups: the transformer, which contains the autoencoders, and the
    projection. So they train here, but for the autoencoders' first steps: from their random start
    AE_c gives 1/2 whatever the text, and the published rate moves it within thousands of steps
    only. So both are pretrained by their own terms of L, at weight 1, while the tower rests. How
    much AE_c's output differs between the texts is in the results (`guidance_spread`, 0 to 1).

    A backbone's own projection is where that begins; of a pair that
    has none it is the ridge fit on the support rather than random numbers. The published code
    flips images and drops paths at a rate of 0.1: `augment` turns on what we have for the first,
    and towers train as they come, without the second. It chose its epoch on the test set; here
    that is done on validation, and without any the last epoch stays.
    """

    name = "convlm"
    family = "image side"
    trains = "the vision tower, two autoencoders at 3 of its blocks, the projection"
    citation = (
        "ConVLM: Sohail et al. 2025, doi:10.1016/j.inffus.2025.103737; after ZSLViT, "
        "arXiv:2404.07713, and EViT, arXiv:2202.07800"
    )
    Config = ConVLMConfig
    config: ConVLMConfig
    trains_vision = True

    def recipe(self, shots: int, config: ConVLMConfig) -> Recipe:
        return Recipe(
            lr=1e-5,
            epochs=40,
            batch_size=256,
            weight_decay=1e-4,
            optimizer="adam",
            schedule="steps",
            sampling="class_balanced",
            patience=1000,  # all epochs are run; validation says which is kept
        )

    def build(self) -> None:
        model, config = self.model, self.config
        self.context = _add_context(model, config)
        self.raw_logits = config.logits == "raw"
        tower, pooler = model.backbone.vision_model, getattr(model.backbone, "vision_pooler", None)
        projection = list(model.backbone.visual_projection.parameters())
        inside = [self.context]
        if not config.blocks:
            inside += [tower, *filter(None, [pooler])]
        for parameter in [*projection, *(p for part in inside for p in part.parameters())]:
            parameter.requires_grad_(True)
        # What no feature depends on stays (a mask token, a pooler that is not read), and so do the
        # autoencoders that no loss reaches.
        for parameter in unused_parameters(model, self.processor, self.class_texts[0][:1]):
            parameter.requires_grad_(False)
        guided = self.guides_images = config.context != "none"
        self.context.to_vision.requires_grad_(guided and (config.theta < 1 or config.weight_v > 0))
        self.context.to_text.requires_grad_(guided and config.weight_c > 0)
        self.groups = [{"params": [p for m in inside for p in m.parameters() if p.requires_grad]}]
        if projection:
            self.groups.append(
                {"params": projection, "lr": config.projection_lr, "weight_decay": 1e-5}
            )
        self.notes = [
            f"Context-guided blocks: {', '.join(map(str, self.context.layers))} of "
            f"{len(_stack(model, config))}{' of our own' if config.blocks else ''}."
        ]
        self.captions: Tensor | None = None
        self.image_pass: GuidedPass | None = None
        if config.keep_schedule == "cosine":
            device = next(self.context.parameters()).device
            self.context.keep_now = torch.ones(len(self.context.keep), device=device)

    @torch.no_grad()
    def read_support(self, support: "Dataset") -> None:
        """Encode the caption of every image once: the text tower is frozen."""
        if self.config.context != "captions":
            return
        if "caption" not in support.column_names:
            raise GloVLMError(
                "context 'captions' needs a column 'caption' with a text for each image, and these "
                "have none: write them with `glovlm data caption`, or set context to 'classes'."
            )
        texts = [(text or "").strip() for text in column(support, "caption")]
        if empty := texts.count(""):
            raise GloVLMError(
                f"{empty} of {len(texts)} images have no caption: write them with `glovlm data "
                "caption`, or set context to 'classes'."
            )
        self.captions = self._encode([[text] for text in texts])

    def pretrain(self, fetch: Callable[[Sequence[int]], Tensor], labels: Tensor, seed: int) -> None:
        """Pretraining of the autoencoders: `sum_l mean|AE_c(t) - x| + mean|AE_v(q_l) - t|`.

        The class tokens x and their queries are those of the tower as it comes, without a text;
        each step adds its text to the queries. Adam on all images, or on as many as fit into a
        batch, each class weighted equally.
        """
        config, guide = self.config, self.context
        trained = [
            parameter
            for part in (guide.to_vision, guide.to_text)
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        if config.autoencoder_steps == 0 or not trained:
            return
        texts = self.captions
        if texts is None:
            texts = self._encode(self.class_texts)[labels.to(self.model.logit_scale.device)]
        tokens, queries = self._class_tokens(fetch, texts)
        optimizer = torch.optim.Adam(trained, lr=config.autoencoder_lr, fused=True)
        counts = labels.bincount()
        share = len(labels) / (len(counts) * counts.double())
        weight = share[labels].to(texts)  # 1 in the mean
        generator = torch.Generator().manual_seed(seed)
        for step in range(config.autoencoder_steps):
            rows = torch.randperm(len(labels), generator=generator)[:BATCH].to(texts.device)
            text, loss = texts[rows], texts.new_zeros(())
            for number, read_text in enumerate(guide.to_vision):
                guess = read_text(text)
                loss = loss + _mean_distance(guess, tokens[number][rows], weight[rows])
                if config.weight_c > 0:
                    query = queries[number][rows]
                    if config.theta < 1:
                        query = config.theta * query + (1 - config.theta) * guess.detach()
                    read_query = guide.to_text[number]
                    loss = loss + _mean_distance(read_query(query), text, weight[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 100 == 0:
                steps = config.autoencoder_steps
                logger.info("autoencoders: step %d of %d, loss %.4f", step + 1, steps, loss.item())
        if not torch.isfinite(loss):
            raise GloVLMError(
                f"The autoencoders' loss became {loss.item()}: autoencoder_lr "
                f"({config.autoencoder_lr:g}) is too high for these images, or an input is broken. "
                "Lower it."
            )

    @torch.no_grad()
    def _class_tokens(
        self, fetch: Callable[[Sequence[int]], Tensor], texts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class tokens and their queries at every guided layer, each `[layers, n, width]`."""
        self.model.eval()
        self.context.train()  # notes them; the tower is as it is when training begins
        tokens, queries = list[Tensor](), list[Tensor]()
        for start in range(0, len(texts), CHUNK):
            text = texts[start : start + CHUNK]
            images = fetch(range(start, start + len(text))).to(text.device, self.model.dtype)
            with self.context.read(text, mix=False) as seen:
                self.model.get_image_features(images)
            assert seen.final is not None
            layer = torch.stack(seen.tokens)
            tokens.append(layer if self.config.target == "layer" else seen.final.expand_as(layer))
            queries.append(torch.stack(seen.queries))
        return torch.cat(tokens, dim=1), torch.cat(queries, dim=1)

    @torch.no_grad()
    def _encode(self, texts: list[list[str]]) -> Tensor:
        """Unit text vectors `[n, text_dim]`, one for each list of texts."""
        device = self.model.logit_scale.device
        encoded = {k: v.to(device) for k, v in self.processor.encode_prompts(texts).items()}
        vectors: Tensor = self.model.class_prototypes(**encoded)
        return vectors

    @contextmanager
    def guide_images(self, labels: Tensor, rows: Tensor, prototypes: Tensor) -> Iterator[None]:
        """Give each image its text: its caption's, or its class's."""
        text = prototypes[labels]
        if self.captions is not None:
            text = self.captions[rows.to(self.captions.device)]
        with self.context.read(text) as self.image_pass:
            yield

    def penalty(self, state: StepState) -> Tensor | None:
        """L_CTL of the image pass of this step, a mean over the images of this process's part."""
        config = self.config
        if not self.guides_images or not (config.weight_v > 0 or config.weight_c > 0):
            return None
        seen, self.image_pass = self.image_pass, None
        assert seen is not None
        assert seen.text is not None
        assert seen.final is not None
        text = seen.text.to(seen.final.dtype)
        total = state.logits.new_zeros(())
        for number, read_text in enumerate(self.context.to_text):
            if config.weight_v > 0:
                token = seen.final if config.target == "final" else seen.tokens[number]
                loss = _mean_distance(seen.guesses[number], token, state.weight)
                total = total + config.weight_v * loss
            if config.weight_c > 0:
                loss = _mean_distance(read_text(seen.queries[number]), text, state.weight)
                total = total + config.weight_c * loss
        return total

    def begin(self, steps: int) -> None:
        self.steps = steps

    def after_step(self, step: int) -> None:
        """Set the next step's share of kept patches: all at first, then down along a cosine (EViT).

        Training alone follows it; validation and use see the share that it ends with.
        """
        if self.context.keep_now is None:
            return
        start = self.config.keep_start
        done = (step / self.steps - start) / max(1 - start, 1e-9)
        rest = (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        shares = [keep + (1 - keep) * rest for keep in self.context.keep]
        self.context.keep_now.copy_(torch.tensor(shares))  # in place: the checkpoint holds it

    def finish(self, folder: Path | None) -> None:
        self.context.keep_now = None  # the share is that which the schedule ends with
        if self.config.context == "none" or self.config.theta == 1:
            return
        texts = self._encode(self.class_texts) if self.captions is None else self.captions
        spread = guidance_spread(self.context, texts)
        self.facts["guidance_spread"] = spread
        if spread < LEAST_SPREAD:
            self.notes.append(
                f"The text did not enter: what the autoencoders make of it is the same for every "
                f"text (spread {spread:.2g}; {LEAST_SPREAD} at least where it differs). Raise "
                f"autoencoder_steps (now {self.config.autoencoder_steps}) or autoencoder_lr (now "
                f"{self.config.autoencoder_lr:g})."
            )


@torch.no_grad()
def guidance_spread(guide: ContextGuide, texts: Tensor) -> float:
    """Spread of the guidance: mean absolute difference of AE_c's output between two texts, 0 to 1.

    Over all pairs, dimensions and layers (Gini's mean difference; of two texts their distance).

    Args:
        guide: The context of a tower.
        texts: Unit text vectors `[n, text_dim]`.
    """
    n = len(texts)
    guidance = torch.stack([read_text(texts).float() for read_text in guide.to_vision])
    ranks = 2 * torch.arange(n, device=texts.device) - (n - 1)
    total = (ranks[:, None] * guidance.sort(1).values).sum(1) / max(n * (n - 1) / 2, 1)
    return float(total.mean())


def _mean_distance(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of rows `[n, dim]`, over the rows of weight 1."""
    distance = (output - target).abs().mean(1)
    return (weight * distance).sum() / weight.sum().clamp(min=1)


def _stack(model: Any, config: ConVLMConfig) -> Sequence[Any]:
    """The blocks among which `layers` counts."""
    if config.blocks:
        return range(config.blocks)
    return tower_blocks(model.backbone.vision_model)


def _add_context(model: Any, config: ConVLMConfig) -> ContextGuide:
    try:
        depth = len(_stack(model, config))
        quarters = sorted({depth * k // 4 for k in (1, 2, 3)})
        guide: ContextGuide = model.add_context(
            {
                "layers": config.layers or (list(range(depth)) if config.blocks else quarters),
                "text_dim": model.config.text_feature_dim,
                "theta": config.theta,
                "keep": config.keep,
                "fuse": config.fuse,
                "renormalize": config.renormalize,
                "blocks": config.blocks,
            }
        )
    except ValueError as error:
        raise GloVLMError(str(error)) from None
    return guide
