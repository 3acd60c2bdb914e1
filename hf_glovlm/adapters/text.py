"""Methods on the text side: learned context tokens in front of the class name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError
from .contract import Recipe, TowerMethod, Tuning, register
from .weights import save_and_merge, trained_projection, wrap_with_peft


@dataclass(frozen=True)
class PromptTuningConfig:
    """Settings of `prompt_tuning` (CoOp's).

    Args:
        context_tokens: Number of learned tokens M.
        class_specific: Whether every class has its own context.
        init_std: Standard deviation of the normal draw they start from.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    context_tokens: int = 16
    class_specific: bool = False
    init_std: float = 0.02
    projection_lr: float = 1e-3


@register
class PromptTuning(TowerMethod):
    """CoOp: `[start][v1 ... vM][class name].[end]`, only the context vectors train.

    Saved as PEFT trainable tokens, on rows of the vocabulary that no prompt uses.
    """

    name = "prompt_tuning"
    family = "text side"
    trains = "M context token embeddings"
    needs_text = True
    saves_adapter = True
    citation = "CoOp: Zhou et al. 2022, arXiv:2109.01134"
    Config = PromptTuningConfig

    def recipe(self, shots: int, config: PromptTuningConfig) -> Recipe:
        epochs = 50 if shots <= 1 else 100 if shots <= 4 else 200
        return Recipe(
            lr=2e-3,
            weight_decay=5e-4,
            epochs=epochs,
            batch_size=32,
            optimizer="sgd",
            schedule="cosine",
            warmup_epochs=1,
            warmup_lr=1e-5,
        )

    def prompts(self, classes: Sequence[ClassInfo], config: Any) -> list[list[str]]:
        return [[f"{c.display_name}."] for c in classes]

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: PromptTuningConfig
    ) -> Tuning:
        prompts = self.prompts(classes, config)
        name, embedding = find_embedding(model.backbone)
        sets = len(classes) if config.class_specific else 1
        ids = free_token_ids(
            processor, embedding.num_embeddings, prompts, sets * config.context_tokens
        )
        rows = [ids[i * config.context_tokens :][: config.context_tokens] for i in range(sets)]
        processor.context_token_ids = rows if config.class_specific else rows[0]
        context = ContextEmbedding(embedding, ids, config.init_std)
        _swap(model.backbone, name, context)

        def finish(folder: Path | None) -> None:
            from peft import TrainableTokensConfig

            _swap(model.backbone, name, embedding)
            settings = TrainableTokensConfig(
                token_indices=ids, target_modules=[name], init_weights=True
            )
            peft_model = wrap_with_peft(model, settings)
            for key, parameter in peft_model.named_parameters():
                if "trainable_tokens_delta" in key:
                    parameter.data.copy_(context.context.data)
            save_and_merge(model, peft_model, folder)

        groups: list[dict[str, Any]] = [{"params": [context.context]}]
        projection = trained_projection(model)
        if projection:
            groups.append({"params": projection, "lr": config.projection_lr})
        return Tuning(groups, prompts, trains_vision=False, trains_text=True, finish=finish)


class ContextEmbedding(nn.Module):
    """A token embedding of which a few rows train and the table itself is neither copied nor moved.

    Gives what PEFT's trainable tokens give, without their copy of the vocabulary at every step.

    Args:
        base: The pretrained embedding, frozen.
        token_ids: The rows that train.
        init_std: Standard deviation of their normal start.
    """

    def __init__(self, base: nn.Embedding, token_ids: list[int], init_std: float) -> None:
        super().__init__()
        self.base = base
        like = base.weight
        start = torch.randn(len(token_ids), base.embedding_dim) * init_std
        self.context = nn.Parameter(start.to(like.device, like.dtype))
        position = torch.full((base.num_embeddings,), -1, device=like.device)
        position[token_ids] = torch.arange(len(token_ids), device=like.device)
        self.register_buffer("position", position, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The pretrained table, for code that asks for its type or device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up `[n, length]` tokens: `[n, length, width]`."""
        where = self.position[input_ids]  # type: ignore[index]
        learned = self.context[where.clamp(min=0)]
        return torch.where((where >= 0).unsqueeze(-1), learned, self.base(input_ids))


def find_embedding(backbone: nn.Module) -> tuple[str, nn.Embedding]:
    """Find the text tower's token embedding and its name inside the backbone."""
    embedding = backbone.text_model.get_input_embeddings()  # type: ignore[union-attr, operator]
    name = next(n for n, m in backbone.named_modules() if m is embedding)
    return name, embedding


def free_token_ids(
    processor: Any, num_embeddings: int, prompts: list[list[str]], count: int
) -> list[int]:
    """Choose rows of the token embedding that no prompt uses, from the rare end of the vocabulary.

    Args:
        processor: A `GloVLMProcessor`.
        num_embeddings: Rows of the embedding.
        prompts: The texts in use.
        count: How many rows are needed.

    Raises:
        GloVLMError: The vocabulary has too few free rows.
    """
    tokenizer = processor.tokenizer
    texts = [text for of_class in prompts for text in of_class]
    taken = {i for row in tokenizer(texts)["input_ids"] for i in row}
    taken |= set(tokenizer.all_special_ids)
    # CLIP's first releases find the end of a text as its highest token id: stay below it.
    top = min(num_embeddings, (tokenizer.eos_token_id or num_embeddings - 1) + 1)
    if top < count + len(taken):
        top = num_embeddings
    free = [i for i in range(top - 1, -1, -1) if i not in taken][:count]
    if len(free) < count:
        raise GloVLMError(
            f"Prompt tuning needs {count} vocabulary rows that no prompt uses; this tokenizer has "
            f"{len(free)}. Lower context_tokens or do not use class_specific."
        )
    return free


def _swap(backbone: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, module)
