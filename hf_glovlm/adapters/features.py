"""Methods on frozen image features: zero-shot, linear probe, and the classifier of Glo-VLMs."""

from dataclasses import dataclass
from typing import Any

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
    citation = "Radford et al. 2021, arXiv:2103.00020 (protocol); scikit-learn (solver)"
    Config = LinearProbeConfig

    def fit(self, support: Support, config: LinearProbeConfig) -> nn.Module:
        from sklearn.linear_model import LogisticRegression

        features = nn.functional.normalize(support.features.double(), dim=-1).numpy()
        solver = LogisticRegression(C=config.C, max_iter=config.max_iter)
        solver.fit(features, support.labels.numpy())
        head = ClassWeights(features.shape[1], support.num_classes, normalize=True)
        weight, bias = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        with torch.no_grad():
            if support.num_classes == 2:  # scikit-learn keeps one row: the log-odds of class 1
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        return head


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
