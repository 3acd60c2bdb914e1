"""Methods that put something new between the towers' blocks, or read the text of every image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError
from ..model.prompts import ConditionalPromptHead, LayerTokens, tower_blocks
from .context_tokens import ContextEmbedding, coop_recipe, find_embedding, free_token_ids
from .contract import Recipe, TowerMethod, Tuning, register
from .fine_tuning import trained_projection


@dataclass(frozen=True)
class VisualPromptConfig:
    """Settings of `vpt`.

    Args:
        tokens: Tokens before each block.
        deep: Whether every block has tokens of its own, or the first alone.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    tokens: int = 8
    deep: bool = True
    projection_lr: float = 1e-3


@register
class VisualPrompts(TowerMethod):
    """VPT: learned tokens beside the patches, in front of every block (deep) or of the first.

    Settings and start, normal with standard deviation 0.02, are those of the deep vision prompts
    that MaPLe compares with (arXiv 2210.03117). These pass the tower's first norm, where it has one
    before block 0; ours stand behind it.
    """

    name = "vpt"
    family = "image side"
    trains = "8 tokens before each vision block"
    needs_text = True
    citation = "VPT: Jia et al. 2022, arXiv:2203.12119; settings of MaPLe, arXiv:2210.03117"
    Config = VisualPromptConfig

    def recipe(self, shots: int, config: VisualPromptConfig) -> Recipe:
        return coop_recipe(epochs=5, lr=2.5e-3, batch_size=4)

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: VisualPromptConfig
    ) -> Tuning:
        _at_least_one("tokens", config.tokens)
        depth = len(_blocks(model, "vision_model")) if config.deep else 1
        inserts = _insert(model, {"vision": {"tokens": config.tokens, "depth": depth}})
        return Tuning(
            _groups(model, inserts, config.projection_lr),
            self.prompts(classes, config),
            trains_vision=True,
            trains_text=False,
        )


@dataclass(frozen=True)
class BottleneckConfig:
    """Settings of `adapter`.

    Args:
        reduction: Width of the tower over that of the bottleneck.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    reduction: int = 12
    projection_lr: float = 1e-3


@register
class BottleneckAdapter(TowerMethod):
    """Glo-VLMs' adapter for CLIP and PLIP: a bottleneck with a residual behind every vision block.

    The logit scale stays as pretrained.
    """

    name = "adapter"
    family = "image side"
    trains = "a bottleneck (768-64-768 in a ViT-B) behind each vision block"
    needs_text = True
    citation = "Glo-VLMs, arXiv:2511.11984; Houlsby et al. 2019, arXiv:1902.00751"
    Config = BottleneckConfig

    def recipe(self, shots: int, config: BottleneckConfig) -> Recipe:
        return Recipe(lr=1e-3, epochs=20, batch_size=5, patience=7)

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: BottleneckConfig
    ) -> Tuning:
        _at_least_one("reduction", config.reduction)
        layers = list(range(len(_blocks(model, "vision_model"))))
        width = max(1, model.backbone.vision_model.config.hidden_size // config.reduction)
        inserts = _insert(model, {"bottleneck": {"layers": layers, "width": width}})
        return Tuning(
            _groups(model, inserts, config.projection_lr),
            self.prompts(classes, config),
            trains_vision=True,
            trains_text=False,
        )


@dataclass(frozen=True)
class MapleConfig:
    """Settings of `maple`.

    Args:
        context_tokens: Learned tokens in each block of each tower.
        depth: Blocks of each tower that have them; no more than the shallower tower has.
        init: The words that the context starts from; those not learned stay as text.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    context_tokens: int = 2
    depth: int = 9
    init: str = "a photo of a"
    projection_lr: float = 1e-3


@register
class Maple(TowerMethod):
    """MaPLe: context tokens in the first blocks of both towers, the vision ones made of the text's.

    `[start][v1 v2] of a [class name].[end]`; for each of the first blocks a linear map of its own
    turns the text tokens into vision tokens. What remains after training are the tokens alone, the
    first of the text on rows of the vocabulary that no text uses.
    """

    name = "maple"
    family = "both sides"
    trains = "2 tokens in the first 9 blocks of both towers, and what couples them"
    needs_text = True
    citation = "MaPLe: Khattak et al. 2023, arXiv:2210.03117"
    Config = MapleConfig

    def recipe(self, shots: int, config: MapleConfig) -> Recipe:
        return coop_recipe(epochs=5, lr=3.5e-3, batch_size=4)

    def prompts(self, classes: Sequence[ClassInfo], config: MapleConfig) -> list[list[str]]:
        _, rest = _split(config.init, config.context_tokens)
        return [[" ".join([*rest, f"{c.display_name}."])] for c in classes]

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: MapleConfig
    ) -> Tuning:
        _at_least_one("depth", config.depth)
        prompts = self.prompts(classes, config)
        words, _ = _split(config.init, config.context_tokens)
        blocks = [len(_blocks(model, tower)) for tower in ("vision_model", "text_model")]
        depth = min(config.depth, *blocks)
        name, embedding = find_embedding(model.backbone)
        ids = free_token_ids(processor, embedding.num_embeddings, prompts, config.context_tokens)
        spec: dict[str, Any] = {"vision": {"tokens": config.context_tokens, "depth": depth}}
        if depth > 1:
            spec["text"] = {"token_ids": ids, "depth": depth}
        inserts = _insert(model, spec)
        context = ContextEmbedding(embedding, ids, init_std=0.0)
        context.context.data.copy_(_word_vectors(processor, embedding, words))
        model.backbone.set_submodule(name, context)
        processor.context_token_ids = ids
        deeper = inserts.text.table if depth > 1 else None
        coupled = CoupledTokens(context.context, deeper, depth, inserts.vision.table.shape[2])
        inserts.vision = coupled.to(context.context.device, context.context.dtype)

        def finish(folder: Path | None) -> None:
            inserts.vision = coupled.resolve()
            with torch.no_grad():
                embedding.weight[ids] = context.context
            model.backbone.set_submodule(name, embedding)

        # Shared by both, the first text tokens come once: among the coupled ones.
        groups: list[dict[str, Any]] = [{"params": list(coupled.parameters())}]
        groups += _projection_group(model, config.projection_lr)
        return Tuning(groups, prompts, trains_vision=True, trains_text=True, finish=finish)


class CoupledTokens(nn.Module):
    """Vision tokens that are a linear map of the text tokens of the same depth (MaPLe).

    Args:
        first: Text tokens of block 0 `[M, text width]`.
        deeper: Those of the blocks after it `[depth - 1, M, text width]`; `None` for depth 1.
        depth: Number of blocks.
        width: Of the vision tower.
    """

    def __init__(
        self, first: nn.Parameter, deeper: nn.Parameter | None, depth: int, width: int
    ) -> None:
        super().__init__()
        self.first = first
        self.deeper = deeper
        self.couplings = nn.ModuleList(nn.Linear(first.shape[1], width) for _ in range(depth))

    def forward(self, layer: int) -> Tensor:
        """The vision tokens `[M, width]` of one block."""
        text = self.first if layer == 0 or self.deeper is None else self.deeper[layer - 1]
        tokens: Tensor = self.couplings[layer](text)
        return tokens

    @torch.no_grad()
    def resolve(self) -> LayerTokens:
        """The tokens as they stand, without what made them."""
        table = torch.stack([self(layer) for layer in range(len(self.couplings))])
        tokens = LayerTokens(*table.shape).to(table.device, table.dtype)
        tokens.table.copy_(table)
        return tokens


@dataclass(frozen=True)
class ConditionalPromptConfig:
    """Settings of `cocoop`.

    Args:
        context_tokens: Number of context tokens M.
        init: The words that they start from; those not learned stay as text.
        reduction: Width of the image feature over that of the hidden layer of the meta-net.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    context_tokens: int = 4
    init: str = "a photo of a"
    reduction: int = 16
    projection_lr: float = 1e-3


@register
class ConditionalPrompts(TowerMethod):
    """CoCoOp: every image shifts the context by a small network of its feature.

    One text pass for each image and class, in training and ever after: the text tower stays part of
    the classifier, whose head holds context, network and class names.
    """

    name = "cocoop"
    family = "text side"
    trains = "4 context token embeddings and a network that shifts them by the image"
    needs_text = True
    citation = "CoCoOp: Zhou et al. 2022, arXiv:2203.05557"
    Config = ConditionalPromptConfig

    def recipe(self, shots: int, config: ConditionalPromptConfig) -> Recipe:
        return coop_recipe(epochs=10, lr=2e-3, batch_size=1)

    def prompts(
        self, classes: Sequence[ClassInfo], config: ConditionalPromptConfig
    ) -> list[list[str]]:
        return [[f"{config.init} {c.display_name}."] for c in classes]

    def attach(
        self,
        model: Any,
        processor: Any,
        classes: Sequence[ClassInfo],
        config: ConditionalPromptConfig,
    ) -> Tuning:
        _at_least_one("reduction", config.reduction)
        words, rest = _split(config.init, config.context_tokens)
        _, embedding = find_embedding(model.backbone)
        texts = [[" ".join([*rest, f"{c.display_name}."])] for c in classes]
        # Rows that no text uses hold the places of the learned vectors.
        places = free_token_ids(processor, embedding.num_embeddings, texts, len(words))
        processor.context_token_ids = places
        encoded = processor.encode_prompts(texts)
        processor.context_token_ids = None
        dim = model.config.image_feature_dim
        head = ConditionalPromptHead(
            dim,
            len(classes),
            width=embedding.embedding_dim,
            length=encoded["input_ids"].shape[1],
            context=len(words),
            begin=int(encoded["input_ids"][0, : len(places)].tolist() != places),
            hidden=max(1, dim // config.reduction),
        ).to(embedding.weight.device, embedding.weight.dtype)
        head.input_ids.copy_(encoded["input_ids"])
        head.attention_mask.copy_(encoded["attention_mask"])
        head.context.data.copy_(_word_vectors(processor, embedding, words))
        head.scale.requires_grad_(False)  # the towers' own, known at the end
        # Below the text tower, so that a checkpoint has it and the key of cached images does not.
        text_model = model.backbone.text_model
        text_model.add_module("conditional_prompts", head)

        def finish(folder: Path | None) -> None:
            del text_model.conditional_prompts
            head.scale.data.fill_(model.logit_scale.exp().item())

        groups: list[dict[str, Any]] = [
            {"params": [head.context, *head.shift.parameters()]},
            *_projection_group(model, config.projection_lr),
        ]
        return Tuning(
            groups,
            self.prompts(classes, config),
            trains_vision=False,
            trains_text=False,
            finish=finish,
            notes=["Every image reads every class text anew: prediction costs a text pass each."],
            image_prototypes=lambda features: head.prototypes(features, model),
            head=lambda: head,
        )


def _blocks(model: Any, tower: str) -> list[nn.Module]:
    try:
        return tower_blocks(getattr(model.backbone, tower))
    except ValueError as error:
        raise GloVLMError(str(error)) from None


def _insert(model: Any, spec: dict[str, Any]) -> Any:
    try:
        return model.insert(spec)
    except ValueError as error:
        raise GloVLMError(str(error)) from None


def _groups(model: Any, inserts: nn.Module, projection_lr: float) -> list[dict[str, Any]]:
    """What was inserted, and the projection of a pair."""
    return [{"params": list(inserts.parameters())}, *_projection_group(model, projection_lr)]


def _projection_group(model: Any, lr: float) -> list[dict[str, Any]]:
    projection = trained_projection(model)
    return [{"params": projection, "lr": lr}] if projection else []


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise GloVLMError(f"Setting '{name}' counts from 1; found {value}.")


def _split(init: str, count: int) -> tuple[list[str], list[str]]:
    """Part the first words, which become learned tokens, from the rest."""
    words = init.split()
    if not 1 <= count <= len(words):
        raise GloVLMError(
            f"Each context token starts from one word, and '{init}' has {len(words)} words: lower "
            f"context_tokens (found {count}, counts from 1), or give more words with init."
        )
    return words[:count], words[count:]


def _word_ids(processor: Any, word: str) -> list[int]:
    ids: list[int] = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise GloVLMError(f"The tokenizer knows nothing of '{word}': give other words with init.")
    return ids


def _word_vectors(processor: Any, embedding: nn.Embedding, words: Sequence[str]) -> Tensor:
    """Embed each word as one token `[words, width]`: the mean of its pieces, if it has several."""
    return torch.stack(
        [embedding.weight.detach()[_word_ids(processor, word)].mean(0) for word in words]
    )
