"""Classifier heads: image features to class logits."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init


class Head(nn.Module):
    """Classifier head: image features `[n, dim]`, not normalised, to logits `[n, classes]`.

    A subclass is built as `Head(dim, num_classes, **describe())` and names itself by `kind`.
    """

    kind: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """Constructor arguments beside `dim` and `num_classes`, without weights."""
        return {}

    def reset(self) -> None:
        """Initialise the head's own parameters; its submodules initialise themselves."""


class ClassWeights(Head):
    """Linear head, one weight vector per class: text prototypes, linear probe, class means.

    `logits = scale * f @ weight.T + bias`, with `f` L2-normalised first when `normalize` is set.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        normalize: Whether features are L2-normalised.
        cosine: Whether the rows of `weight` are unit class prototypes in the joint space, so that
            `f @ weight.T` are cosines between image and class text.
    """

    kind = "class_weights"

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

    def describe(self) -> dict[str, Any]:
        """`normalize` and `cosine`."""
        return {"normalize": self.normalize, "cosine": self.cosine}

    def reset(self) -> None:
        """Small normal weights, no bias."""
        init.normal_(self.weight, std=0.02)
        init.zeros_(self.bias)
        init.ones_(self.scale)


class MLPHead(Head):
    """Glo-VLMs' classifier: Linear, batch norm, ReLU, dropout, Linear (arXiv 2511.11984).

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        hidden: Width of the hidden layer (512 as published).
        dropout: Probability of dropping a hidden unit while training (0.5 as published).
    """

    kind = "mlp"

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

    def describe(self) -> dict[str, Any]:
        """`hidden` and `dropout`."""
        return {"hidden": self.layers[0].out_features, "dropout": self.layers[3].p}


class CacheHead(Head):
    """Tip-Adapter: a key-value cache beside the class texts (arXiv 2207.09519, eq. 5 and 6).

    `logits_c = scale * f @ text_c + share_c * sum_(i of c) alpha * exp(-beta * (1 - f @ key_i))`,
    `f` unit: the published values are one-hot, so each class sums over its own keys.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        entries: Number of keys.
    """

    kind = "cache_by_class"
    owners: Tensor
    shares: nn.Parameter

    def __init__(self, dim: int, num_classes: int, entries: int) -> None:
        super().__init__()
        self.text = ClassWeights(dim, num_classes, cosine=True)
        self.keys = nn.Parameter(torch.zeros(entries, dim))
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))
        self._add_values(num_classes)

    def _add_values(self, num_classes: int) -> None:
        """Class of each key `[entries]`, and what each key of a class counts `[classes]`."""
        self.register_buffer("owners", torch.zeros(len(self.keys), dtype=torch.long))
        self.shares = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        return self.compare(nn.functional.normalize(features, dim=-1))

    def compare(self, unit: Tensor) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, classes]`."""
        affinity = self.alpha * torch.exp(-self.beta * (1 - self.keys @ unit.T))
        # In fp32 at least: where keys are added one by one, half precision would round at each.
        exact = affinity.to(torch.promote_types(affinity.dtype, torch.float32))
        sums = exact.new_zeros(len(self.shares), unit.shape[0]).index_add(0, self.owners, exact)
        logits: Tensor = self.text(unit) + self.shares * sums.to(affinity.dtype).T
        return logits

    def value_matrix(self) -> Tensor:
        """Value of each key `[entries, classes]`."""
        return nn.functional.one_hot(self.owners, len(self.shares)) * self.shares

    def describe(self) -> dict[str, Any]:
        """`entries`."""
        return {"entries": len(self.keys)}

    def reset(self) -> None:
        """Normal keys of standard deviation 0.02; no key counts yet."""
        init.normal_(self.keys, std=0.02)
        init.zeros_(self.shares)
        init.ones_(self.alpha)
        init.ones_(self.beta)


class DenseCacheHead(CacheHead):
    """Tip-Adapter as it was saved before, with a matrix of values `[entries, classes]`."""

    kind = "cache"
    values: nn.Parameter

    def _add_values(self, num_classes: int) -> None:
        self.values = nn.Parameter(torch.zeros(len(self.keys), num_classes))

    def compare(self, unit: Tensor) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, classes]`."""
        affinity = torch.exp(-self.beta * (1 - unit @ self.keys.T))
        logits: Tensor = self.text(unit) + self.alpha * affinity @ self.values
        return logits

    def value_matrix(self) -> Tensor:
        """Value of each key `[entries, classes]`."""
        return self.values

    def reset(self) -> None:
        """Normal keys of standard deviation 0.02; no entry belongs to a class yet."""
        init.normal_(self.keys, std=0.02)
        init.zeros_(self.values)
        init.ones_(self.alpha)
        init.ones_(self.beta)


class ResidualHead(Head):
    """CLIP-Adapter: a bottleneck beside the feature, then the class texts (arXiv 2110.04544).

    `f' = ratio * relu(W2 relu(W1 f)) + (1 - ratio) * f`, `f` unit, then scaled cosines of `f'`.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
        hidden: Width of the bottleneck.
        ratio: Share of the bottleneck's output.
    """

    kind = "residual"

    def __init__(self, dim: int, num_classes: int, hidden: int, ratio: float = 0.2) -> None:
        super().__init__()
        self.ratio = ratio
        self.adapter = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, dim, bias=False),
            nn.ReLU(),
        )
        self.text = ClassWeights(dim, num_classes, cosine=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        return self.compare(nn.functional.normalize(features, dim=-1))

    def compare(self, unit: Tensor) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, classes]`."""
        logits: Tensor = self.text(self.ratio * self.adapter(unit) + (1 - self.ratio) * unit)
        return logits

    def describe(self) -> dict[str, Any]:
        """`hidden` and `ratio`."""
        return {"hidden": self.adapter[0].out_features, "ratio": self.ratio}


class ProjectedHead(Head):
    """Linear projection of the feature before the class texts: `scale * cos(W f, text)`.

    Args:
        dim: Width of the image features.
        num_classes: Number of classes.
    """

    kind = "projected"

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, dim, bias=False)
        self.text = ClassWeights(dim, num_classes, cosine=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        logits: Tensor = self.text(self.projection(features))
        return logits


HEADS: dict[str, type[Head]] = {
    head.kind: head
    for head in (ClassWeights, MLPHead, CacheHead, DenseCacheHead, ResidualHead, ProjectedHead)
}


def build_head(spec: dict[str, Any] | None, dim: int, num_classes: int) -> Head:
    """Build an untrained head from its specification in the config.

    Args:
        spec: `{"kind": a name of HEADS, ...keyword arguments of that class}`; `None` is a linear
            head on normalised features.
        dim: Width of the image features.
        num_classes: Number of classes.
    """
    arguments = dict(spec or {"kind": "class_weights"})
    kind = arguments.pop("kind")
    if kind not in HEADS:
        raise ValueError(f"Unknown head '{kind}': this version has {', '.join(sorted(HEADS))}.")
    return HEADS[kind](dim, num_classes, **arguments)


def describe_head(head: nn.Module) -> dict[str, Any]:
    """Specification of a head for the config: the inverse of `build_head`."""
    if not isinstance(head, Head):
        known = ", ".join(sorted(HEADS))
        raise ValueError(f"A head is one of {known}; found {type(head).__name__}.")
    return {"kind": head.kind, **head.describe()}


def prototype_head(prototypes: Tensor, scale: float, *, raw: bool = False) -> ClassWeights:
    """Cosine head from class prototypes `[K, dim]`: scaled cosines, no bias.

    With `raw`, dot products with the unit prototypes: the image side is not normalised.
    """
    dim, classes = prototypes.shape[1], len(prototypes)
    head = ClassWeights(dim, classes, normalize=not raw, cosine=not raw)
    with torch.no_grad():
        head.weight.copy_(nn.functional.normalize(prototypes, dim=-1))
        head.scale.fill_(scale)
    return head


def linear_head(weight: Tensor, bias: Tensor) -> ClassWeights:
    """Linear head on L2-normalised features, from weights `[K, dim]` and bias `[K]`."""
    head = ClassWeights(weight.shape[1], len(weight), normalize=True)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class prototypes: unit means of the L2-normalised features of each class.

    Args:
        features: `[n, dim]`.
        labels: `[n]`, every class at least once.
        num_classes: Number of classes K.

    Returns:
        `[K, dim]`.
    """
    unit = nn.functional.normalize(features, dim=-1)
    total = unit.new_zeros(num_classes, unit.shape[1]).index_add(0, labels, unit)
    return nn.functional.normalize(total, dim=-1)
