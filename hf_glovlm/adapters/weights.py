"""Methods inside the towers: vanilla fine-tuning of the last blocks, and LoRA."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..data.catalog import ClassInfo
from ..errors import GloVLMError
from .contract import Recipe, TowerMethod, Tuning, register

# How the families of transformers name the same four projections.
ATTENTION_NAMES = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("out_proj", "o_proj", "attention.output.dense"),
}


def tower_layers(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find a transformer tower's list of blocks: its longest module list.

    Returns:
        The name inside the tower, and the list.

    Raises:
        GloVLMError: The tower has no blocks (a convolutional network).
    """
    lists = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise GloVLMError(
            f"{type(tower).__name__} has no list of transformer blocks, so its last blocks cannot "
            "be adapted: use a transformer tower, or a method on features (linear_probe)."
        )
    return max(lists, key=lambda pair: len(pair[1]))


def attention_modules(backbone: Any, tower: str, last: int, kinds: Sequence[str]) -> list[str]:
    """Name the attention projections of a tower's last blocks, relative to the backbone.

    Args:
        backbone: A dual encoder with `vision_model` and `text_model`.
        tower: `vision_model` or `text_model`.
        last: How many blocks, counted from the end; 0 is all of them.
        kinds: Of `q`, `k`, `v`, `o`.

    Raises:
        GloVLMError: A kind is unknown, or the tower names its projections otherwise.
    """
    path, layers = tower_layers(getattr(backbone, tower))
    names = []
    for index in range(len(layers))[-last:] if last else range(len(layers)):
        for kind in kinds:
            if kind not in ATTENTION_NAMES:
                raise GloVLMError(f"Attention projections are q, k, v and o; found '{kind}'.")
            found = [
                f"{tower}.{path}.{index}.{n}"
                for n, module in layers[index].named_modules()
                if isinstance(module, nn.Linear) and _ends(n, ATTENTION_NAMES[kind])
            ]
            if not found:
                raise GloVLMError(
                    f"No '{kind}' projection was found in {tower} ({type(layers[index]).__name__});"
                    f" known names: {', '.join(ATTENTION_NAMES[kind])}."
                )
            names += found
    return names


def trained_projection(model: Any) -> list[nn.Parameter]:
    """The projection of a pair of towers, which always trains; a trained dual encoder has none."""
    if not model.config.is_pair:
        return []
    parameters = list(model.backbone.visual_projection.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def adapter_base(model: Any) -> str:
    """Where an adapter's base weights are: what stock `AutoModel.from_pretrained` loads first."""
    if model.name_or_path:  # a model of ours, adapted before: no longer the weights it came from
        return str(model.name_or_path)
    if model.config.is_pair:
        return str(model.config.backbone_name or "")
    local = getattr(model.config.backbone_config, "_name_or_path", "")
    return str(local or model.config.backbone_name)


def wrap_with_peft(model: Any, settings: Any) -> Any:
    """Put a PEFT adapter into a model's backbone, which is changed in place."""
    from peft import get_peft_model

    base = adapter_base(model)
    with _quiet_peft():
        peft_model = get_peft_model(model.backbone, settings)
    peft_model.peft_config["default"].base_model_name_or_path = base
    if not model.name_or_path:
        peft_model.peft_config["default"].revision = model.config.backbone_revision
    return peft_model


def save_and_merge(model: Any, peft_model: Any, folder: Path | None) -> None:
    """Write the adapter alone, then add it to the backbone's weights for good.

    Args:
        model: The `GloVLMModel` whose backbone was wrapped.
        peft_model: What `wrap_with_peft` returned.
        folder: Takes the adapter; `None` writes none.
    """
    with _quiet_peft():
        if folder is not None:
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        model.backbone = peft_model.merge_and_unload()


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Keep from users what peft 0.21 says about transformers' names and about local bases."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


@dataclass(frozen=True)
class VanillaConfig:
    """Settings of `vanilla` (Glo-VLMs, CLIP and PLIP).

    Args:
        vision_layers: Last vision blocks that train.
        text_layers: Last text blocks that train.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    vision_layers: int = 4
    text_layers: int = 2
    projection_lr: float = 1e-3


@register
class Vanilla(TowerMethod):
    """Fine-tune the last blocks of both towers and the logit scale; projections stay."""

    name = "vanilla"
    family = "both sides"
    trains = "the last 4 vision and 2 text blocks, logit scale"
    needs_text = True
    citation = "Glo-VLMs, arXiv:2511.11984"
    Config = VanillaConfig

    def recipe(self, shots: int, config: VanillaConfig) -> Recipe:
        return Recipe(lr=1e-4, epochs=20, batch_size=5, schedule="cosine", final_lr=0.01)

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: VanillaConfig
    ) -> Tuning:
        params: list[nn.Parameter] = []
        for tower, last in (
            (model.backbone.vision_model, config.vision_layers),
            (model.backbone.text_model, config.text_layers),
        ):
            _, layers = tower_layers(tower)
            for layer in list(layers)[len(layers) - min(last, len(layers)) :]:
                params += layer.parameters()
        params.append(model.logit_scale)
        for parameter in params:
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": params}]
        projection = trained_projection(model)
        if projection:
            groups.append({"params": projection, "lr": config.projection_lr})
        return Tuning(
            groups,
            self.prompts(classes, config),
            trains_vision=config.vision_layers > 0,
            trains_text=config.text_layers > 0,
            finish=lambda folder: None,
        )


@dataclass(frozen=True)
class LoraSettings:
    """Settings of `lora` (Glo-VLMs, CLIP and PLIP).

    Args:
        r: Rank.
        alpha: Scaling numerator: updates are multiplied by alpha / r.
        dropout: On the input of the low-rank path.
        last: Blocks of each tower, counted from the end; 0 is all.
        projections: Attention projections, letters of `qkvo`.
        projection_lr: Learning rate of the projection of a pair of towers.
    """

    r: int = 4
    alpha: int = 16
    dropout: float = 0.1
    last: int = 1
    projections: str = "qv"
    projection_lr: float = 1e-3


@register
class Lora(TowerMethod):
    """Low-rank updates of q and v in the last block of both towers, by PEFT.

    The logit scale stays as pretrained (the published code trains it at 2e-5, which moves it by
    less than 0.01 in 20 epochs), so that the adapter alone holds all that changed.
    """

    name = "lora"
    family = "both sides"
    trains = "rank-4 updates of q and v in the last block of both towers"
    needs_text = True
    saves_adapter = True
    citation = "Hu et al. 2021, arXiv:2106.09685; settings of Glo-VLMs, arXiv:2511.11984"
    Config = LoraSettings

    def recipe(self, shots: int, config: LoraSettings) -> Recipe:
        return Recipe(lr=2e-5, epochs=20, batch_size=5)

    def attach(
        self, model: Any, processor: Any, classes: Sequence[ClassInfo], config: LoraSettings
    ) -> Tuning:
        from peft import LoraConfig

        targets = [
            name
            for tower in ("vision_model", "text_model")
            for name in attention_modules(model.backbone, tower, config.last, config.projections)
        ]
        settings = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            modules_to_save=["visual_projection"] if model.config.is_pair else None,
        )
        peft_model = wrap_with_peft(model, settings)
        # PEFT changes the towers in place: the model goes on holding them, adapted.
        low_rank = [p for n, p in peft_model.named_parameters() if "lora_" in n]
        groups: list[dict[str, Any]] = [{"params": low_rank}]
        if model.config.is_pair:
            saved = [p for n, p in peft_model.named_parameters() if "modules_to_save" in n]
            groups.append({"params": saved, "lr": config.projection_lr})

        return Tuning(
            groups,
            self.prompts(classes, config),
            trains_vision=True,
            trains_text=True,
            finish=partial(save_and_merge, model, peft_model),
        )


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
