"""Feature-side methods: a head on frozen image features, solved or trained by gradients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import GloVLMError
from ..model.heads import (
    ClassWeights,
    MLPHead,
    ProjectedHead,
    ResidualHead,
    linear_head,
    prototype_head,
)
from ..settings import Settings, setting
from .closed_form import TipAdapterConfig, cache_head, search_tip_adapter
from .contract import (
    WARM_COSINE,
    FeatureMethod,
    Fitted,
    HeadMethod,
    Recipe,
    Support,
    coop_epochs,
    coop_recipe,
    register,
    score_logits,
)

COSINE_BY_STEP: dict[str, Any] = {"schedule": "cosine", "by_step": True, "eps": 1e-4}
WHOLE_SUPPORT = 2**31 - 1  # a batch size: one step an epoch, however many images there are


def place_texts(text: ClassWeights, support: Support) -> None:
    """Freeze the class texts in a head while the rest trains."""
    with torch.no_grad():
        text.weight.copy_(support.texts)
        text.scale.fill_(support.logit_scale)
    text.requires_grad_(False)


@dataclass(frozen=True)
class LinearProbeConfig(Settings):
    """Settings of `linear_probe`."""

    C: float = setting(
        100.0,
        help="Inverse strength of the L2 penalty; fixed, since 8 shots cannot choose it.",
        above=0,
    )
    max_iter: int = setting(1000, help="Limit of the solver.", least=1, most=10**6)


@register
class LinearProbe(FeatureMethod):
    """Linear probe: multinomial logistic regression (L-BFGS) on L2-normalised features."""

    name = "linear_probe"
    family = "feature side"
    trains = "one weight vector and bias a class"
    needs_text = False
    citation = "Radford et al. 2021, arXiv:2103.00020 (protocol)"
    validation = "search"
    Config = LinearProbeConfig
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"C": (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)}

    def fit(self, support: Support, config: LinearProbeConfig) -> Fitted:
        features, labels = support.rows
        features = nn.functional.normalize(features.double(), dim=-1)
        # Views share the weight of their image beside the penalty.
        strength = config.C * len(support.labels) / len(labels)
        weight, bias, done = fit_logistic(
            features, labels, support.num_classes, strength, config.max_iter
        )
        notes = [] if done else [f"The solver stopped at max_iter = {config.max_iter} steps."]
        return Fitted(linear_head(weight, bias), notes)


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, C: float, max_iter: int
) -> tuple[Tensor, Tensor, bool]:
    """Logistic regression as scikit-learn's `LogisticRegression(C)` fits it, at its optimum.

    The same objective (mean negative log-likelihood plus `|W|^2 / (2 C n)`, bias unpenalised, one
    weight vector for two classes) and solver (scipy's L-BFGS-B), without importing scikit-learn,
    which would take longer than all else that a linear probe on cached features does.

    Two classes also have its stopping rule, a gradient of 1e-4, so that results are the same. But
    the gradient of a mean loss shrinks with the number of classes and with a common offset of the
    features. More classes, and features so alike that this rule would stop at the start, are
    therefore solved in coordinates in which the curvature at the start is one in every direction:
    centred, which the bias makes up for, turned to their principal axes, and scaled. There a
    tolerance bounds the distance to the optimum.

    Args:
        features: `[n, dim]` float64.
        labels: `[n]`, every class at least once.
        num_classes: Number of classes K.
        C: Inverse strength of the penalty.
        max_iter: Limit of the solver.

    Returns:
        Weight `[K, dim]`, bias `[K]`, and whether the optimum was reached.
    """
    from scipy.optimize import minimize

    n, binary = len(features), num_classes == 2
    rows = 1 if binary else num_classes
    # In numpy like the solver: torch's threads and those of its BLAS would wait for each other.
    known = np.eye(num_classes)[labels.numpy()]
    images = features.numpy()
    centre = images.mean(0)
    between = (known - known.mean(0)).T @ (images - centre) / n  # what a fitted bias leaves
    if binary and np.abs(between).max() > 1e-3:
        centre, spread, axes, scale = 0 * centre, images, np.eye(images.shape[1]), np.ones(1)
        penalty = np.append(np.full(len(axes), 1 / (C * n)), 0.0)
        options = {"gtol": 1e-4, "ftol": 64 * 2.0**-52}
    else:
        spread, axes = _principal_axes(images - centre)
        curvature = max(num_classes - 1, 1) / num_classes**2  # of a logit, where all are equal
        penalty = np.append(np.full(len(axes), 1 / (C * n)), 0.0)
        scale = (np.append(curvature / n * np.square(spread).sum(0), curvature) + penalty) ** -0.5
        options = {"gtol": 1e-7, "ftol": 0.0}
    images, penalty = np.column_stack([spread, np.ones(n)]) * scale, penalty * scale**2

    def all_classes(values: Any) -> Any:
        return np.concatenate([-values, values]) / 2 if binary else values

    def objective(point: Any) -> tuple[float, Any]:
        values = point.reshape(rows, -1)
        logits = images @ all_classes(values).T
        logits -= logits.max(1, keepdims=True)
        powers = np.exp(logits)
        total = powers.sum(1, keepdims=True)
        loss = (np.log(total) - (known * logits).sum(1, keepdims=True)).mean()
        slope = (powers / total - known) / n
        if binary:
            slope = (slope[:, 1:] - slope[:, :1]) / 2
        pull = penalty * values
        return float(loss + (pull * values).sum() / 2), (slope.T @ images + pull).reshape(-1)

    solution = minimize(
        objective,
        np.zeros(rows * len(penalty)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iter, "maxfun": 50 * max_iter, "maxls": 50, **options},
    )
    values = solution.x.reshape(rows, -1) * scale
    weight = values[:, :-1] @ axes
    bias = all_classes((values[:, -1] - weight @ centre)[:, None])[:, 0]
    done = solution.nit < max_iter
    return torch.from_numpy(all_classes(weight)), torch.from_numpy(bias), done


def _principal_axes(rows: Any) -> tuple[Any, Any]:
    """Coordinates `[n, r]` of rows `[n, dim]` along orthonormal axes `[r, dim]`, uncorrelated."""
    n, dim = rows.shape
    if n >= dim:
        axes = np.linalg.eigh(rows.T @ rows)[1].T
        return rows @ axes.T, axes
    square, left = np.linalg.eigh(rows @ rows.T)
    kept = square > 1e-14 * max(float(square[-1]), 1e-300)  # the rest is rounding
    length = np.sqrt(square[kept])
    return left[:, kept] * length, (left[:, kept] / length).T @ rows


# ------------------------------------------------------------------------------------------- LP++


@dataclass(frozen=True)
class LpPlusPlusConfig(Settings):
    """Settings of `lp_plus_plus`."""

    epochs: int = setting(
        300,
        help="Full-batch steps; 0 is the start alone, which needs no training.",
        least=0,
        most=10**6,
    )
    alpha_start: float = setting(
        250.0,
        help="Every alpha starts at this times the mean cosine of a class's images and text.",
        least=0,
    )
    alpha_every: int = setting(
        10, help="Epochs from one step of alpha to the next.", least=1, most=10**6
    )
    momentum: float = setting(0.9, help="Of the steps of weight and bias.", least=0, below=1)


@register
class LpPlusPlus(FeatureMethod):
    """LP++: `logits = f . (w_k + alpha_k t_k) + b_k`, no temperature, step sizes from the data.

    Sums and means are of each class's own images, so that classes may be unbalanced. The published
    code never clears the gradient of alpha, so each of its steps sums all earlier ones; here a step
    takes the gradient where it stands, as in the paper.
    """

    name = "lp_plus_plus"
    family = "feature side"
    trains = "one weight vector and bias a class, and the share of its text"
    validation = "early stopping"
    citation = "LP++: Huang et al. 2024, arXiv:2404.02285"
    Config = LpPlusPlusConfig

    def fit(self, support: Support, config: LpPlusPlusConfig) -> Fitted:
        images = support.features.unsqueeze(1) if support.views is None else support.views
        features = nn.functional.normalize(images.double(), dim=-1)
        texts = support.texts.double()
        path = lp_plus_plus_path(features, support.labels, texts, config)
        best, best_score, kept = None, -1.0, config.epochs
        for epoch, (weight, alpha, bias) in enumerate(path):
            if epoch < config.epochs and (support.validation is None or epoch == 0):
                continue
            head, score = linear_head(weight + alpha.unsqueeze(1) * texts, bias), 0.0
            if support.validation is not None:
                with torch.no_grad():
                    logits = head(support.validation[0].float())
                score, _ = score_logits(logits, support.validation[1])
            if score >= best_score:
                best, best_score, kept = head, score, epoch
        assert best is not None  # the last epoch at least was looked at
        weight_rate, alpha_rate = lp_plus_plus_rates(features, features @ texts.T)
        facts = {"epoch": kept, "weight_rate": weight_rate, "alpha_rate": alpha_rate}
        return Fitted(best, facts=facts)


def lp_plus_plus_path(
    features: Tensor, labels: Tensor, texts: Tensor, config: LpPlusPlusConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterates of LP++ at the start and after each epoch, in the precision of its features.

    Args:
        features: Unit features of each image's views `[n, V, dim]`; each epoch takes the next.
        labels: `[n]`, every class at least once.
        texts: Unit class prototypes `[K, dim]`.
        config: See `LpPlusPlusConfig`.

    Yields:
        Weight `[K, dim]`, alpha `[K]` and bias `[K]`.
    """
    truth = nn.functional.one_hot(labels, len(texts)).to(features.dtype)
    cosines = features @ texts.T
    weight_rate, alpha_rate = lp_plus_plus_rates(features, cosines)
    own = (truth * cosines.mean(1)).sum(0) / truth.sum(0)
    weight = truth.T @ features.mean(1)
    alpha = (config.alpha_start * own.mean()).expand(len(texts))
    bias, bias_speed, weight_speed = alpha * 0, alpha * 0, weight * 0
    yield weight, alpha, bias
    for epoch in range(1, config.epochs + 1):
        shown = (epoch - 1) % features.shape[1]
        view, cosine = features[:, shown], cosines[:, shown]
        logits = view @ weight.T + alpha * cosine + bias
        slope = (logits.softmax(-1) - truth) / len(features)
        weight_speed = config.momentum * weight_speed + slope.T @ view
        bias_speed = config.momentum * bias_speed + slope.sum(0)
        weight, bias = weight - weight_rate * weight_speed, bias - weight_rate * bias_speed
        if epoch % config.alpha_every == 0:
            alpha = alpha - alpha_rate * (slope * cosine).sum(0)
        yield weight, alpha, bias


def lp_plus_plus_rates(features: Tensor, cosines: Tensor) -> tuple[float, float]:
    """Step sizes of LP++, from bounds on the curvature of the mean cross-entropy.

    `4 n / lambda_max(F^T F)` for weight and bias, `n / (4 max_k sum_i (f_i . t_k)^2)` for alpha.

    Args:
        features: Unit features F of n images' views `[images, V, dim]`, each a row.
        cosines: Between these and class texts `[images, V, K]`.
    """
    features, cosines = features.flatten(0, 1), cosines.flatten(0, 1)
    n, dim = features.shape
    gram = features @ features.T if n < dim else features.T @ features  # the same largest value
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    most = float(cosines.square().sum(0).max())
    return 4 * n / max(largest, 1e-12), n / (4 * max(most, 1e-12))


# -------------------------------------------------------------------- class prototypes that train


class ShiftedPrototypes(nn.Module):
    """Scaled cosines between features and shifted class texts: `s cos(f, t_k + share x_k)`.

    Args:
        texts: Class prototypes t `[K, dim]`, of the length that the steps are made for.
        scale: Factor s between cosines and logits.
        share: What a shift is multiplied by.
        hold: How strongly each class is held at its text `[K]`.
    """

    texts: Tensor
    hold: Tensor

    def __init__(
        self, texts: Tensor, scale: float, share: float = 1.0, hold: Tensor | None = None
    ) -> None:
        super().__init__()
        self.scale, self.share = scale, share
        self.register_buffer("texts", texts.clone())
        self.register_buffer("hold", torch.zeros(len(texts)) if hold is None else hold)
        self.shift = nn.Parameter(torch.zeros_like(texts))

    def prototypes(self) -> Tensor:
        """The class prototypes as they stand `[K, dim]`, not normalised."""
        return self.texts + self.share * self.shift

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[n, dim]` to logits `[n, classes]`."""
        return self.compare(nn.functional.normalize(features, dim=-1))

    def compare(self, unit: Tensor) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, classes]`."""
        return self.scale * unit @ nn.functional.normalize(self.prototypes(), dim=-1).T


@dataclass(frozen=True)
class ZsLpConfig(Settings):
    """Settings of `zs_lp` and `clap`.

    A cosine does not see the length of a text, but the published rates are for what CLIP's text
    tower gives, about ten long; from unit vectors the same rate makes steps a hundred times larger,
    and a class forgets its text in the first.
    """

    length: float = setting(10.0, help="Of each class text while it trains.", above=0)


class PrototypeMethod(HeadMethod):
    """Method whose fitted head is one class prototype a class."""

    on_unit = True

    def finish(self, head: Any, support: Support, config: Any, model: Any | None) -> Fitted:
        return Fitted(prototype_head(head.prototypes(), support.logit_scale))


@register
class ZsLp(PrototypeMethod):
    """ZS-LP: a linear probe on cosines that starts from the class texts."""

    name = "zs_lp"
    trains = "one class prototype a class, from its text"
    citation = "ZS-LP: Silva-Rodríguez et al. 2024, arXiv:2312.12730"
    Config = ZsLpConfig

    def recipe(self, shots: int, config: ZsLpConfig) -> Recipe:
        return Recipe(
            lr=0.1, weight_decay=0.0, epochs=300, batch_size=256, optimizer="sgd", **WARM_COSINE
        )

    def build(self, support: Support, config: ZsLpConfig) -> nn.Module:
        return ShiftedPrototypes(config.length * support.texts, support.logit_scale)


@register
class Clap(ZsLp):
    """CLAP: ZS-LP, each class held at its text as strongly as zero-shot was right about it.

    Adds `mean_k lambda_k |w_k - t_k|^2` with lambda_k the mean zero-shot probability of class k on
    its own images.
    """

    name = "clap"
    trains = "one class prototype a class, held at its text"
    citation = "CLAP: Silva-Rodríguez et al. 2024, arXiv:2312.12730"

    def build(self, support: Support, config: ZsLpConfig) -> nn.Module:
        texts = support.texts
        hold = zero_shot_confidence(*support.rows, texts, support.logit_scale)
        return ShiftedPrototypes(config.length * texts, support.logit_scale, hold=hold)

    def penalty(self, head: Any, support: Support, config: ZsLpConfig) -> Tensor:
        held: Tensor = (head.hold * head.shift.square().sum(-1)).mean()
        return held


def zero_shot_confidence(features: Tensor, labels: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Mean zero-shot probability of each class on its own images.

    Args:
        features: `[n, dim]`.
        labels: `[n]`, every class at least once.
        texts: Unit class prototypes `[K, dim]`.
        scale: Factor between cosines and logits.

    Returns:
        `[K]`, from 0 to 1.
    """
    logits = scale * nn.functional.normalize(features, dim=-1) @ texts.T
    own = logits.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    count = torch.bincount(labels, minlength=len(texts))
    return own.new_zeros(len(texts)).index_add(0, labels, own) / count


@dataclass(frozen=True)
class TaskResConfig(ZsLpConfig):
    """Settings of `taskres`."""

    alpha: float = setting(0.5, help="What the learned residual is multiplied by.", least=0)


@register
class TaskRes(PrototypeMethod):
    """TaskRes: a residual beside each class text, `t_k + alpha x_k`, x from zero."""

    name = "taskres"
    trains = "a residual to each class text"
    citation = "TaskRes: Yu et al. 2023, arXiv:2211.10277"
    Config = TaskResConfig

    def recipe(self, shots: int, config: TaskResConfig) -> Recipe:
        epochs = 100 if shots <= 4 else 200
        # Dassl's Adam has the weight decay in its gradient.
        return Recipe(
            lr=2e-3, weight_decay=5e-4, epochs=epochs, batch_size=256, optimizer="adam",
            **WARM_COSINE,
        )  # fmt: skip

    def build(self, support: Support, config: TaskResConfig) -> nn.Module:
        texts = config.length * support.texts
        return ShiftedPrototypes(texts, support.logit_scale, config.alpha)


# ----------------------------------------------------------------------- gradients in closed form


class ScaledCosines(torch.autograd.Function):
    """Scaled cosines between rows and fixed unit texts, with their gradient in closed form.

    The same numbers as `scale * normalize(rows) @ texts.T` and its gradient, to the last bit, from
    two thirds of the passes over the rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, texts: Tensor, scale: float) -> Tensor:
        """Map rows `[n, dim]` and unit texts `[K, dim]` to logits `[n, K]`."""
        logits, kept = _compare(rows, texts, scale)
        ctx.save_for_backward(texts, *kept)
        ctx.scale = scale
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Gradient `[n, dim]` by the rows."""
        texts, *kept = ctx.saved_tensors
        return _gradient_by_rows(slope, texts, ctx.scale, *kept), None, None


class AdaptedCosines(torch.autograd.Function):
    """Logits of CLIP-Adapter with fixed class texts, with their gradient in closed form.

    The same numbers as `ResidualHead.compare` and its gradient, to the last bit, in fewer passes:
    beside batches of 32 what surrounds the matrix products counts.
    """

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, down: Tensor, up: Tensor, texts: Tensor, scale: Tensor, ratio: float
    ) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, K]`.

        Args:
            ctx: Keeps what the gradient needs.
            unit: Unit features, without a gradient.
            down: First layer of the bottleneck `[hidden, dim]`.
            up: Its second layer `[dim, hidden]`.
            texts: Unit class prototypes `[K, dim]`, which stay.
            scale: Factor between cosines and logits.
            ratio: Share of the bottleneck's output.
        """
        inner = (unit @ down.T).relu_()
        outer = (inner @ up.T).relu_()
        logits, kept = _compare((ratio * outer).add_((1 - ratio) * unit), texts, scale)
        ctx.save_for_backward(unit, inner, outer, up, texts, *kept)
        ctx.scale, ctx.ratio = scale, ratio
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        """Gradients by the two layers."""
        behind_relu = torch.ops.aten.threshold_backward  # a mask of booleans takes several times it
        unit, inner, outer, up, texts, *kept = ctx.saved_tensors
        by_rows = _gradient_by_rows(slope, texts, ctx.scale, *kept).mul_(ctx.ratio)
        by_outer = behind_relu(by_rows, outer, 0)
        by_inner = behind_relu(by_outer @ up, inner, 0)
        return None, by_inner.T @ unit, by_outer.T @ inner, None, None, None


def _compare(
    rows: Tensor, texts: Tensor, scale: Tensor | float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Scaled cosines `[n, K]`, and what their gradient needs: lengths, divisors, unit rows."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    divisor = length.clamp_min(1e-12)
    unit = rows / divisor
    return (scale * unit) @ texts.T, (length, divisor, unit)


def _gradient_by_rows(
    slope: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    length: Tensor,
    divisor: Tensor,
    unit: Tensor,
) -> Tensor:
    """Gradient `[n, dim]` of scaled cosines by their rows: what is along a row does not turn it."""
    by_unit = (slope @ texts).mul_(scale)
    along = (unit / divisor).mul_(by_unit).sum(-1, keepdim=True)
    along.masked_fill_(length < 1e-12, 0.0)  # where `normalize` divides by its own epsilon
    return by_unit.div_(divisor).sub_(unit * along)


# -------------------------------------------------------------- adapters of the feature itself


@dataclass(frozen=True)
class ClipAdapterConfig(Settings):
    """Settings of `clip_adapter`."""

    reduction: int = setting(
        4,
        help="The bottleneck is this many times narrower than the feature.",
        least=1,
        most=65_536,
    )
    ratio: float = setting(0.2, help="Share of the adapted feature.", least=0, most=1)


class AdapterAtTexts(ResidualHead):
    """CLIP-Adapter beside class texts that stay while it trains: its gradient in closed form."""

    def compare(self, unit: Tensor) -> Tensor:
        """Map unit features `[n, dim]` to logits `[n, classes]`."""
        text, layers = self.text, (self.adapter[0].weight, self.adapter[2].weight)
        # Autocast rounds some steps of the plain way and others not.
        rounds = torch.is_autocast_enabled(unit.device.type)
        if not self.training or rounds or text.weight.requires_grad:
            return super().compare(unit)
        logits: Tensor = AdaptedCosines.apply(unit, *layers, text.weight, text.scale, self.ratio)
        return logits


@register
class ClipAdapter(HeadMethod):
    """CLIP-Adapter: a bottleneck beside the image feature; class texts stay as they are."""

    name = "clip_adapter"
    trains = "a bottleneck on the image feature"
    on_unit = True
    citation = "CLIP-Adapter: Gao et al. 2021, arXiv:2110.04544"
    Config = ClipAdapterConfig

    def recipe(self, shots: int, config: ClipAdapterConfig) -> Recipe:
        return coop_recipe(coop_epochs(shots))

    def build(self, support: Support, config: ClipAdapterConfig) -> nn.Module:
        dim = support.features.shape[1]
        hidden = max(1, dim // config.reduction)
        head = AdapterAtTexts(dim, support.num_classes, hidden, config.ratio)
        place_texts(head.text, support)
        return head


@register
class TipAdapterF(HeadMethod):
    """Tip-Adapter-F: the keys train; alpha and beta stay, or are searched on validation.

    The published code keeps the epoch that is best on the test set; here it is the last.
    """

    name = "tip_adapter_f"
    trains = "the keys of a cache of the support"
    on_unit = True
    validation = "search"
    citation = "Tip-Adapter: Zhang et al. 2022, arXiv:2207.09519"
    Config = TipAdapterConfig

    def recipe(self, shots: int, config: TipAdapterConfig) -> Recipe:
        return Recipe(lr=1e-3, epochs=20, batch_size=256, schedule="cosine", by_step=True, eps=1e-4)

    def build(self, support: Support, config: TipAdapterConfig) -> nn.Module:
        head = cache_head(support, config.alpha, config.beta, config.balance)
        head.requires_grad_(False).keys.requires_grad_(True)
        return head

    def finish(
        self, head: Any, support: Support, config: TipAdapterConfig, model: Any | None
    ) -> Fitted:
        if support.validation is None:
            return Fitted(head)
        features, labels = support.validation
        with torch.no_grad():
            unit = nn.functional.normalize(features.float(), dim=-1)
            beta, alpha, _ = search_tip_adapter(
                head.text(unit), unit @ head.keys.T, head.value_matrix(), labels
            )
            head.alpha.fill_(alpha)
            head.beta.fill_(beta)
        notes = ["Alpha and beta were chosen on the validation labels, which count as labels."]
        return Fitted(head, notes, {"alpha": alpha, "beta": beta})


# ----------------------------------------------------------------------------- the last projection


@dataclass(frozen=True)
class ProLipConfig(Settings):
    """Settings of `prolip`."""

    strength: float | None = setting(
        None,
        help="Of the pull towards the pretrained projection.",
        least=0,
        unset="one over the mean number of shots, which needs no validation",
    )


class Projection(nn.Module):
    """Scaled cosines between projected image vectors and class texts: `s cos(W x + b, t_k)`.

    Args:
        weight: Where W starts `[dim, width]`.
        bias: b `[dim]`, which stays; `None` where there is none.
        texts: Unit class prototypes `[K, dim]`.
        scale: Factor s between cosines and logits.
    """

    start: Tensor
    bias: Tensor | None
    texts: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, texts: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("start", weight.clone())
        self.register_buffer("bias", bias)
        self.register_buffer("texts", texts.clone())
        self.weight = nn.Parameter(weight.clone())

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled vectors `[n, width]` to logits `[n, classes]`."""
        features = nn.functional.linear(pooled, self.weight, self.bias)
        logits: Tensor = ScaledCosines.apply(features, self.texts, self.scale)
        return logits


@register
class ProLip(HeadMethod):
    """ProLIP: fine-tunes the last visual projection, held at its pretrained values.

    Adds `lambda |W - W0|^2` (squared Frobenius norm) with lambda = 1 / shots. The published
    runs see 300 random views of every image, one an epoch (`views: 300`).
    """

    name = "prolip"
    trains = "the last visual projection"
    on_pooled = True
    citation = "ProLIP: Fahes et al. 2024, arXiv:2410.05270"
    Config = ProLipConfig

    def recipe(self, shots: int, config: ProLipConfig) -> Recipe:
        return Recipe(
            lr=1e-5, weight_decay=0.0, epochs=300, batch_size=WHOLE_SUPPORT, **COSINE_BY_STEP
        )

    def build(self, support: Support, config: ProLipConfig) -> nn.Module:
        texts, weight = support.texts, support.projection
        if weight is None:
            weight = torch.eye(support.features.shape[1])
        if weight.shape != (texts.shape[1], support.features.shape[1]):
            raise GloVLMError(
                "prolip trains a linear map from image vectors to class texts: expected one of "
                f"shape {(texts.shape[1], support.features.shape[1])}, found {tuple(weight.shape)}."
                " Use a backbone that ends in a linear projection, or another method (taskres)."
            )
        bias = support.projection_bias
        return Projection(weight, bias, texts, support.logit_scale)

    def penalty(self, head: Any, support: Support, config: ProLipConfig) -> Tensor:
        strength = config.strength
        if strength is None:
            strength = support.num_classes / len(support.labels)
        moved: Tensor = strength * (head.weight - head.start).square().sum()
        return moved

    def finish(
        self, head: Any, support: Support, config: ProLipConfig, model: Any | None
    ) -> Fitted:
        projection = getattr(getattr(model, "backbone", None), "visual_projection", None)
        if isinstance(projection, nn.Linear) and projection.weight.shape == head.weight.shape:
            with torch.no_grad():
                projection.weight.copy_(head.weight)
            return Fitted(prototype_head(support.texts, support.logit_scale))
        final = ProjectedHead(head.weight.shape[1], support.num_classes)
        with torch.no_grad():
            final.projection.weight.copy_(head.weight)
        place_texts(final.text, support)
        return Fitted(final.requires_grad_(True))


@dataclass(frozen=True)
class ClassifierConfig(Settings):
    """Settings of `classifier`."""

    hidden: int = setting(512, help="Width of the hidden layer.", least=1, most=65_536)
    dropout: float = setting(0.5, help="Probability of dropping a hidden unit.", least=0, below=1)


@register
class Classifier(HeadMethod):
    """MLP with one hidden layer (batch norm, ReLU, dropout) on frozen features."""

    name = "classifier"
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
