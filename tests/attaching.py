"""Three classes, methods attached to a model, and adaptation with everything in one call."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from tiny import CLASSES as NAMES
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_glovlm.data import ClassInfo
from hf_glovlm.methods import METHODS, TowerMethod
from hf_glovlm.model import GloVLMConfig, GloVLMModel
from hf_glovlm.training import AdaptConfig, Adapted, adapt

CLASSES = [ClassInfo(n, n, (f"a {n} glomerulus", f"this photo shows {n}")) for n in NAMES]
PROMPTS = [list(c.prompts) for c in CLASSES]
SGD = {  # CoOp's, which its successors kept
    "weight_decay": 5e-4,
    "optimizer": "sgd",
    "schedule": "cosine",
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
    "steps": None,
    "by_step": False,
}


def default_recipe(name: str, shots: int) -> dict[str, Any]:
    """How a method trains where nothing else is chosen."""
    method = METHODS[name]
    assert isinstance(method, TowerMethod)
    return asdict(method.recipe(shots, method.configure({})))


def attach(
    name: str, model: Any, processor: Any, classes: Sequence[ClassInfo] = CLASSES, **settings: Any
) -> TowerMethod:
    """Attach a method to a model."""
    method = METHODS[name]
    assert isinstance(method, TowerMethod)
    return method.attach(model, processor, classes, method.configure(settings))


def adapt_with(model: Any, method: str, support: Any, **options: Any) -> Adapted:
    """`adapt` with the fields of its config beside its other arguments."""
    names = {f.name for f in fields(AdaptConfig)} & set(options)
    config = AdaptConfig(**{name: options.pop(name) for name in names})
    return adapt(model, method, support, config=config, **options)


def trained_names(model: nn.Module, tuning: TowerMethod) -> list[set[str]]:
    """Names of what trains, one set for each optimiser group."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in tuning.groups]


def vit_b_16() -> GloVLMModel:
    """A frozen ViT-B/16 CLIP that has shapes only, for counting parameters."""
    with torch.device("meta"):
        stock = CLIPModel(
            CLIPConfig(
                vision_config={
                    "hidden_size": 768,
                    "intermediate_size": 3072,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 12,
                    "patch_size": 16,
                },
                text_config={
                    "hidden_size": 512,
                    "intermediate_size": 2048,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 8,
                },
                projection_dim=512,
            )
        )
        model = GloVLMModel(GloVLMConfig(backbone_config=stock.config), backbone=stock)
    return model.requires_grad_(False)
