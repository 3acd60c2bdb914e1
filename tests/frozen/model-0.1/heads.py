"""What adaptation leaves behind: image features in, class logits out."""

from typing import Any

import torch
from torch import Tensor, nn


class ClassWeights(nn.Module):
    """One weight vector a class: text prototypes, a linear probe, a prototype classifier.

    `logits = scale * f @ weight.T + bias`, with `f` L2-normalised first when `normalize` is set.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        normalize: Whether features are L2-normalised.
        cosine: Whether the rows of `weight` are unit class prototypes in the joint space, so that
            `f @ weight.T` are cosines between image and class text.
    """

    def __init__(
        self, dim: int, num_classes: int, normalize: bool = True, cosine: bool = False
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.cosine = cosine
        self.weight = nn.Parameter(torch.zeros(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        if self.normalize:
            features = nn.functional.normalize(features, dim=-1)
        return self.scale * features @ self.weight.T + self.bias


class MLPHead(nn.Module):
    """The classifier of Glo-VLMs: Linear, batch norm, ReLU, dropout, Linear (arXiv 2511.11984).

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        hidden: Width of the hidden layer (512 as published).
        dropout: Probability of dropping a hidden unit while training (0.5 as published).
    """

    def __init__(self, dim: int, num_classes: int, hidden: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        logits: Tensor = self.layers(features)
        return logits


HEADS: dict[str, type[nn.Module]] = {"class_weights": ClassWeights, "mlp": MLPHead}


def build_head(spec: dict[str, Any] | None, dim: int, num_classes: int) -> nn.Module:
    """Build an untrained head from its description in the config.

    Args:
        spec: `{"kind": "class_weights" | "mlp", ...keyword arguments of that class}`; `None` is a
            linear head on normalised features.
        dim: Width of the image features.
        num_classes: Number of classes.
    """
    arguments = dict(spec or {"kind": "class_weights"})
    kind = arguments.pop("kind")
    if kind not in HEADS:
        raise ValueError(f"Unknown head '{kind}': this version knows {', '.join(sorted(HEADS))}.")
    return HEADS[kind](dim, num_classes, **arguments)


def describe_head(head: nn.Module) -> dict[str, Any]:
    """Say how to build a head again: the inverse of `build_head`."""
    if isinstance(head, ClassWeights):
        return {"kind": "class_weights", "normalize": head.normalize, "cosine": head.cosine}
    if isinstance(head, MLPHead):
        hidden, dropout = head.layers[0], head.layers[3]
        return {"kind": "mlp", "hidden": hidden.out_features, "dropout": dropout.p}
    raise ValueError(f"A head is one of {', '.join(sorted(HEADS))}; found {type(head).__name__}.")
