"""Adapter modules and learned tokens between the towers' blocks, and CoCoOp."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError
from ..model.prompts import ConditionalPromptHead, LayerTokens, tower_blocks
from ..settings import Settings, setting
from .context_tokens import ContextEmbedding, find_embedding, unused_token_ids
from .contract import Recipe, TowerMethod, coop_recipe, register


@dataclass(frozen=True)
class VisualPromptConfig(Settings):
    """Settings of `vpt`."""

    tokens: int = setting(8, help="Tokens before each block.", least=1, most=10_000)
    deep: bool = setting(
        True, help="Whether every block has tokens of its own, or the first alone."
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class VisualPrompts(TowerMethod):
    """VPT: learned tokens beside the patches, in front of every block (deep) or of the first.

    Settings and start, normal with standard deviation 0.02, are those of the deep vision prompts
    that MaPLe compares with (arXiv 2210.03117). The first pass the norm that CLIP's tower has
    before block 0, as they do there.
    """

    name = "vpt"
    family = "image side"
    trains = "8 tokens before each vision block"
    citation = "VPT: Jia et al. 2022, arXiv:2203.12119; settings of MaPLe, arXiv:2210.03117"
    Config = VisualPromptConfig
    config: VisualPromptConfig
    trains_vision = True

    def recipe(self, shots: int, config: VisualPromptConfig) -> Recipe:
        return coop_recipe(epochs=5, lr=2.5e-3, batch_size=4)

    def build(self) -> None:
        config = self.config
        depth = len(_blocks(self.model, "vision_model")) if config.deep else 1
        tokens = {"tokens": config.tokens, "depth": depth, "normed": True}
        modules = _insert(self.model, {"vision": tokens})
        self.groups = [{"params": list(modules.parameters())}]
        self.train_projection()


@dataclass(frozen=True)
class BottleneckConfig(Settings):
    """Settings of `adapter`."""

    placement: Literal["mlp", "block"] = setting(
        "mlp",
        help="On what a block's MLP adds, weights N(0, .02), as published for CLIP and PLIP; or "
        "behind the block, N(0, .001), as for CONCH.",
    )
    reduction: int = setting(
        12, help="Width of the tower over that of the bottleneck.", least=1, most=65_536
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class BottleneckAdapter(TowerMethod):
    """Glo-VLMs' adapter for CLIP and PLIP: a bottleneck in every vision block.

    The block adds `m + up(relu(down(m)))` in place of its MLP's output m. That for CONCH stands
    behind the last six blocks, with dropout and a rate of 1e-4; here `placement: block` puts it
    behind all, without dropout. The logit scale stays as pretrained.
    """

    name = "adapter"
    family = "image side"
    trains = "a bottleneck (768-64-768 in a ViT-B) in each vision block"
    citation = "Glo-VLMs, arXiv:2511.11984; Houlsby et al. 2019, arXiv:1902.00751"
    Config = BottleneckConfig
    config: BottleneckConfig
    trains_vision = True

    def recipe(self, shots: int, config: BottleneckConfig) -> Recipe:
        return Recipe(lr=1e-3, epochs=20, batch_size=5, patience=7)

    def build(self) -> None:
        reduction = self.config.reduction
        layers = list(range(len(_blocks(self.model, "vision_model"))))
        width = max(1, self.model.backbone.vision_model.config.hidden_size // reduction)
        spec = {"layers": layers, "width": width, "placement": self.config.placement}
        modules = _insert(self.model, {"bottleneck": spec})
        self.groups = [{"params": list(modules.parameters())}]
        self.train_projection()


@dataclass(frozen=True)
class MapleConfig(Settings):
    """Settings of `maple`."""

    context_tokens: int = setting(
        2, help="Learned tokens in each block of each tower.", least=1, most=10_000
    )
    depth: int = setting(
        9,
        help="Blocks of each tower that have them; no more than the shallower tower has.",
        least=1,
        most=10_000,
    )
    init: str = setting(
        "a photo of a",
        help="The words that the context starts from; those not learned stay as text.",
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class Maple(TowerMethod):
    """MaPLe: context tokens in the first blocks of both towers, the vision ones made of the text's.

    `[start][v1 v2] of a [class name].[end]`; for each of the first blocks a linear map of its own
    turns the text tokens into vision tokens, the first of which pass the norm that CLIP's tower has
    before block 0. What remains after training are the tokens alone, the
    first of the text on rows of the vocabulary that no text uses.
    """

    name = "maple"
    family = "both sides"
    trains = "2 tokens in the first 9 blocks of both towers, and what couples them"
    citation = "MaPLe: Khattak et al. 2023, arXiv:2210.03117"
    Config = MapleConfig
    config: MapleConfig
    trains_vision = True
    trains_text = True

    def recipe(self, shots: int, config: MapleConfig) -> Recipe:
        return coop_recipe(epochs=5, lr=3.5e-3, batch_size=4)

    def prompts(self, classes: Sequence[ClassInfo], config: MapleConfig) -> list[list[str]]:
        _, rest = _split(config.init, config.context_tokens)
        return [[" ".join([*rest, f"{c.display_name}."])] for c in classes]

    def build(self) -> None:
        model, config, tokens = self.model, self.config, self.config.context_tokens
        words, _ = _split(config.init, tokens)
        blocks = [len(_blocks(model, tower)) for tower in ("vision_model", "text_model")]
        depth = min(config.depth, *blocks)
        self.embedding_name, self.embedding = find_embedding(model.backbone)
        self.token_ids = unused_token_ids(
            self.processor, self.embedding.num_embeddings, self.class_texts, tokens
        )
        spec: dict[str, Any] = {"vision": {"tokens": tokens, "depth": depth, "normed": True}}
        if depth > 1:
            spec["text"] = {"token_ids": self.token_ids, "depth": depth}
        self.modules = _insert(model, spec)
        context = ContextEmbedding(self.embedding, self.token_ids, init_std=0.0)
        context.context.data.copy_(_word_vectors(self.processor, self.embedding, words))
        model.backbone.set_submodule(self.embedding_name, context)
        self.processor.context_token_ids = self.token_ids
        self.first = context.context
        deeper = self.modules.text.table if depth > 1 else None
        coupled = CoupledTokens(self.first, deeper, depth, self.modules.vision.table.shape[2])
        self.coupled = coupled.to(self.first.device, self.first.dtype)
        self.modules.vision = self.coupled
        # Shared by both, the first text tokens come once: among the coupled ones.
        self.groups = [{"params": list(self.coupled.parameters())}]
        self.train_projection()

    def finish(self, folder: Path | None) -> None:
        self.modules.vision = self.coupled.resolve()
        with torch.no_grad():
            self.embedding.weight[self.token_ids] = self.first
        self.model.backbone.set_submodule(self.embedding_name, self.embedding)


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
class ConditionalPromptConfig(Settings):
    """Settings of `cocoop`."""

    context_tokens: int = setting(4, help="Number of context tokens M.", least=1, most=10_000)
    init: str = setting(
        "a photo of a", help="The words that they start from; those not learned stay as text."
    )
    reduction: int = setting(
        16,
        help="Width of the image feature over that of the hidden layer of the meta-net.",
        least=1,
        most=65_536,
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class ConditionalPrompts(TowerMethod):
    """CoCoOp: every image shifts the context by a small network of its feature.

    One text pass for each image and class, in training and ever after: the text tower stays part of
    the classifier, whose head holds context, network and class names.
    """

    name = "cocoop"
    family = "text side"
    trains = "4 context token embeddings and a network that shifts them by the image"
    citation = "CoCoOp: Zhou et al. 2022, arXiv:2203.05557"
    Config = ConditionalPromptConfig
    config: ConditionalPromptConfig
    per_image = True

    def recipe(self, shots: int, config: ConditionalPromptConfig) -> Recipe:
        return coop_recipe(epochs=10, lr=2e-3, batch_size=1)

    def prompts(
        self, classes: Sequence[ClassInfo], config: ConditionalPromptConfig
    ) -> list[list[str]]:
        return [[f"{config.init} {c.display_name}."] for c in classes]

    def build(self) -> None:
        model, processor, config = self.model, self.processor, self.config
        words, rest = _split(config.init, config.context_tokens)
        _, embedding = find_embedding(model.backbone)
        texts = [[" ".join([*rest, f"{c.display_name}."])] for c in self.classes]
        # Rows that no text uses hold the places of the learned vectors.
        places = unused_token_ids(processor, embedding.num_embeddings, texts, len(words))
        processor.context_token_ids = places
        encoded = processor.encode_prompts(texts)
        processor.context_token_ids = None
        dim = model.config.image_feature_dim
        self.head = ConditionalPromptHead(
            dim,
            len(self.classes),
            width=embedding.embedding_dim,
            length=encoded["input_ids"].shape[1],
            context=len(words),
            begin=int(encoded["input_ids"][0, : len(places)].tolist() != places),
            hidden=max(1, dim // config.reduction),
        ).to(embedding.weight.device, embedding.weight.dtype)
        self.head.input_ids.copy_(encoded["input_ids"])
        self.head.attention_mask.copy_(encoded["attention_mask"])
        self.head.context.data.copy_(_word_vectors(processor, embedding, words))
        self.head.scale.requires_grad_(False)  # the towers' own, known at the end
        # Below the text tower, so that a checkpoint has it and the key of cached images does not.
        model.backbone.text_model.add_module("conditional_prompts", self.head)
        self.groups = [{"params": [self.head.context, *self.head.shift.parameters()]}]
        self.train_projection()
        self.notes = ["Every image reads every class text anew: prediction costs a text pass each."]

    def image_prototypes(self, features: Tensor) -> Tensor:
        return self.head.prototypes(features, self.model)

    def finish(self, folder: Path | None) -> None:
        del self.model.backbone.text_model.conditional_prompts
        self.head.scale.data.fill_(self.model.logit_scale.exp().item())

    def final_head(self, prototypes: Tensor) -> nn.Module:
        return self.head


def _blocks(model: Any, tower: str) -> list[nn.Module]:
    try:
        return tower_blocks(getattr(model.backbone, tower))
    except ValueError as error:
        raise GloVLMError(str(error)) from None


def _insert(model: Any, spec: dict[str, Any]) -> Any:
    try:
        return model.add_adapter_modules(spec)
    except ValueError as error:
        raise GloVLMError(str(error)) from None


def _split(init: str, count: int) -> tuple[list[str], list[str]]:
    """The first words, which become learned tokens, and the rest."""
    words = init.split()
    if not 1 <= count <= len(words):
        raise GloVLMError(
            f"Each context token starts from one word, and '{init}' has {len(words)} words: lower "
            f"context_tokens (found {count}, counts from 1), or give more words with init."
        )
    return words[:count], words[count:]


def _word_vectors(processor: Any, embedding: nn.Embedding, words: Sequence[str]) -> Tensor:
    """Word embeddings `[words, width]`: the mean of a word's pieces, if it has several."""
    vectors = []
    for word in words:
        ids: list[int] = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise GloVLMError(
                f"The tokenizer has no token for '{word}': give other words with init."
            )
        vectors.append(embedding.weight.detach()[ids].mean(0))
    return torch.stack(vectors)
