"""Methods on frozen image features: zero-shot, linear probe, and the classifier of Glo-VLMs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.heads import ClassWeights, MLPHead
from .contract import FeatureMethod, HeadMethod, Recipe, Support, register


def prototype_head(prototypes: torch.Tensor, scale: float) -> ClassWeights:
    """Put class prototypes `[K, dim]` into a head: scaled cosines, no bias."""
    head = ClassWeights(prototypes.shape[1], len(prototypes), normalize=True, cosine=True)
    with torch.no_grad():
        head.weight.copy_(nn.functional.normalize(prototypes, dim=-1))
        head.scale.fill_(scale)
    return head


@register
class ZeroShot(FeatureMethod):
    """Cosine between image and class texts, prompts averaged after normalising; no labels."""

    name = "zero_shot"
    family = "training-free"
    trains = "nothing"
    needs_text = True
    citation = "Radford et al. 2021, arXiv:2103.00020"

    def fit(self, support: Support, config: Any) -> nn.Module:
        assert support.prototypes is not None  # needs_text was checked
        return prototype_head(support.prototypes, support.logit_scale)


@dataclass(frozen=True)
class LinearProbeConfig:
    """Settings of `linear_probe`.

    Args:
        C: Inverse strength of the L2 penalty; fixed, since 8 shots cannot choose it.
        max_iter: Limit of the solver.
    """

    C: float = 100.0
    max_iter: int = 1000


@register
class LinearProbe(FeatureMethod):
    """Multinomial logistic regression (L-BFGS) on L2-normalised features."""

    name = "linear_probe"
    family = "feature side"
    trains = "one weight vector and bias a class"
    needs_text = False
    citation = "Radford et al. 2021, arXiv:2103.00020 (protocol)"
    Config = LinearProbeConfig

    def fit(self, support: Support, config: LinearProbeConfig) -> nn.Module:
        features = nn.functional.normalize(support.features.double(), dim=-1)
        weight, bias = fit_logistic(
            features, support.labels, support.num_classes, config.C, config.max_iter
        )
        head = ClassWeights(features.shape[1], support.num_classes, normalize=True)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        return head


def fit_logistic(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, C: float, max_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression as scikit-learn's `LogisticRegression(C, max_iter)` fits it.

    The same objective (mean negative log-likelihood plus `|W|^2 / (2 C n)`, bias unpenalised, one
    weight vector for two classes), solver (scipy's L-BFGS-B) and stopping rule, without importing
    scikit-learn, which would take longer than all else that a linear probe on cached features does.

    Args:
        features: `[n, dim]` float64.
        labels: `[n]`, every class at least once.
        num_classes: Number of classes K.
        C: Inverse strength of the penalty.
        max_iter: Limit of the solver.

    Returns:
        Weight `[K, dim]` and bias `[K]`.
    """
    from scipy.optimize import minimize

    n, dim = features.shape
    rows = 1 if num_classes == 2 else num_classes

    def all_classes(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([-values, values]) / 2 if rows == 1 else values

    def objective(point: Any) -> tuple[float, Any]:
        values = torch.from_numpy(point).reshape(rows, dim + 1).clone().requires_grad_()
        weight, bias = values[:, :dim], values[:, dim]
        logits = features @ all_classes(weight).T + all_classes(bias)
        loss = nn.functional.cross_entropy(logits, labels) + weight.square().sum() / (2 * C * n)
        loss.backward()
        assert values.grad is not None
        return loss.item(), values.grad.reshape(-1).numpy()

    found = minimize(
        objective,
        np.zeros(rows * (dim + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iter, "maxls": 50, "gtol": 1e-4, "ftol": 64 * 2.0**-52},
    )
    values = torch.from_numpy(found.x).reshape(rows, dim + 1)
    return all_classes(values[:, :dim]), all_classes(values[:, dim])


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of `classifier`.

    Args:
        hidden: Width of the hidden layer.
        dropout: Probability of dropping a hidden unit.
    """

    hidden: int = 512
    dropout: float = 0.5


@register
class Classifier(HeadMethod):
    """Linear, batch norm, ReLU, dropout, Linear on frozen features, trained by cross-entropy."""

    name = "classifier"
    family = "feature side"
    trains = "an MLP with one hidden layer"
    needs_text = False
    citation = "Glo-VLMs, arXiv:2511.11984"
    Config = ClassifierConfig

    def recipe(self, shots: int, config: ClassifierConfig) -> Recipe:
        return Recipe(lr=1e-3, weight_decay=1e-4, epochs=20, batch_size=16)

    def build(self, support: Support, config: ClassifierConfig) -> nn.Module:
        return MLPHead(
            support.features.shape[1], support.num_classes, config.hidden, config.dropout
        )
