"""Training-free methods: a closed form or a few fixed steps on frozen image features."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import GloVLMError
from ..model.heads import CacheHead, linear_head, prototype_head
from ..settings import Settings, setting
from .contract import FeatureMethod, Fitted, Fold, Support, register

# Tip-Adapter's search on ImageNet: 200 values of beta up to 7, 20 of alpha up to 3.
TIP_BETAS = tuple(0.1 + i * (7 - 0.1) / 200 for i in range(200))
TIP_ALPHAS = tuple(0.1 + j * (3 - 0.1) / 20 for j in range(20))
# TransCLIP's fixed numbers: weights of a likelihood and of a neighbour, and the two loops.
LIKELIHOOD_WEIGHT = 1 / 50
NEIGHBOUR_WEIGHT = 50 / 6
OUTER_STEPS = 10
INNER_STEPS = 5
CHUNK = 512  # query images at a time against all others
CELLS = 2**20  # numbers at a time in Tip-Adapter's search


@dataclass(frozen=True)
class ZeroShotConfig(Settings):
    """Settings of `zero_shot`."""

    prompt_sets: int = setting(
        0,
        help="Also draw this many sets of one prompt a class, whose spread is reported.",
        least=0,
        most=10_000,
    )


@register
class ZeroShot(FeatureMethod):
    """Zero-shot: cosine between image and class texts, prompts averaged after normalising.

    A sampled prompt set holds one of each class's prompts, drawn with replacement and
    independently of the other classes; a class with one prompt keeps it (as MI-Zero,
    arXiv:2306.07831, draws a synonym and a template).
    """

    name = "zero_shot"
    family = "training-free"
    trains = "nothing"
    needs_prompt_features = True
    citation = "Radford et al. 2021, arXiv:2103.00020"
    Config = ZeroShotConfig

    def fit(self, support: Support, config: ZeroShotConfig) -> Fitted:
        fitted = Fitted(prototype_head(support.texts, support.logit_scale))
        if config.prompt_sets:
            fitted.variants = self._sample(support, config.prompt_sets)
            fitted.facts = {"prompt_sets": config.prompt_sets}
        return fitted

    def _sample(self, support: Support, count: int) -> list[nn.Module]:
        features = support.prompt_features
        if features is None:
            raise GloVLMError(
                "prompt_sets draws from the single prompts of each class, and only their averages "
                "were given: run on images (adapt, `glovlm train`), or leave prompt_sets at 0."
            )
        if max(map(len, features)) < 2:
            raise GloVLMError(
                "prompt_sets draws among a class's prompts, and every class has only one: give "
                "`--prompts terminology`, or several prompts a class in classes.yaml."
            )
        generator = torch.Generator().manual_seed(support.seed)
        draws = torch.rand(count, len(features), generator=generator, dtype=torch.float64)
        return [
            prototype_head(
                torch.stack([f[int(u * len(f))] for f, u in zip(features, draw, strict=True)]),
                support.logit_scale,
            )
            for draw in draws.tolist()
        ]


@register
class Prototype(FeatureMethod):
    """SimpleShot (L2N): the nearest class mean of L2-normalised features.

    `logits = -s/2 |f - c_k|^2` up to a term that all classes share, so that for means of length
    one they are the cosines times the logit scale s. The paper's centring (CL2N) needs features
    of base classes, which there are none of here.
    """

    name = "prototype"
    family = "training-free"
    trains = "one mean feature a class"
    needs_text = False
    citation = "SimpleShot: Wang et al. 2019, arXiv:1911.04623"

    def fit(self, support: Support, config: Any) -> Fitted:
        means, _ = _means(support)
        scale = support.logit_scale
        return Fitted(linear_head(scale * means, -scale / 2 * means.square().sum(1)))


@register
class SSText(FeatureMethod):
    """SS-Text: a closed form between image features and class texts, for supports of any balance.

    `w_k = s / (N lambda) sum_(i in k) f_i + t_k` with `lambda = 1 / N`, at least 0.001; logits are
    the cosines to `w_k` times the logit scale s.
    """

    name = "ss_text"
    family = "training-free"
    trains = "one prototype a class"
    citation = "SS-Text: Silva-Rodríguez et al., IPMI 2025"

    def fit(self, support: Support, config: Any) -> Fitted:
        count = len(support.labels)
        sums, _ = _sums(support)
        weights = support.logit_scale / (count * max(1 / count, 1e-3)) * sums
        return Fitted(prototype_head(weights + support.texts, support.logit_scale))


@register
class SSTextPlus(FeatureMethod):
    """SS-Text+: SS-Text with a strength of its own for each class, and classes pushed apart.

    `w_k = s / (N lambda_k) sum_(i in k) f_i + t_k` with `lambda_k = 1 / n_k`, then
    `w_k - unit(2 w_k - mean_j w_j)`.
    """

    name = "ss_text_plus"
    family = "training-free"
    trains = "one prototype a class"
    citation = "SS-Text+: Silva-Rodríguez et al., MICCAI 2025"

    def fit(self, support: Support, config: Any) -> Fitted:
        sums, counts = _sums(support)
        strength = support.logit_scale * counts / len(support.labels)
        weights = strength.unsqueeze(1) * sums + support.texts
        weights = weights - nn.functional.normalize(2 * weights - weights.mean(0), dim=-1)
        return Fitted(prototype_head(weights, support.logit_scale))


@dataclass(frozen=True)
class GdaConfig(Settings):
    """Settings of `gda`.

    A Gaussian log-likelihood has no unit, so that alpha 1 would be Bayes' rule were the precision
    the true one; its factor D counts every dimension as evidence of its own, while the features of
    an encoder move in a few tens: (N - 1 + those) / D of it is due, 0.01 at 1 shot to 0.3 at 16.
    """

    alpha: float = setting(
        0.1,
        help="Weight of the Gaussian log-likelihoods beside the text logits; the paper searches "
        "it.",
        least=0,
    )
    support_prior: bool = setting(
        False,
        help="Whether class shares of the support are the prior. By default all classes are equal: "
        "how many were labelled is no measure of how common a class is.",
    )


@register
class Gda(FeatureMethod):
    """Gaussian discriminant analysis with one covariance for all classes, beside the class texts.

    `logits = s f.t_k + alpha (mu_k' P f + log prior_k - mu_k' P mu_k / 2)` with the precision P of
    `apply_precision`. It is linear in f, so the head is one weight vector and bias a class.
    Published with ten augmented views of each image in means and covariance (`views: 10`), each of
    which counts as an image in P; its search of alpha makes up for that. Here alpha is fixed, and a
    view weighs 1/V.
    """

    name = "gda"
    family = "training-free"
    trains = "one mean a class and one covariance"
    validation = "search"
    citation = "GDA-CLIP: Wang et al. 2024, arXiv:2402.04087"
    Config = GdaConfig
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {
        "alpha": (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
    }

    def fit(self, support: Support, config: GdaConfig) -> Fitted:
        means, counts = _means(support)
        features, labels = support.rows
        features, n, notes = _unit(features), len(support.labels), list[str]()
        weight = (n / len(features)) ** 0.5
        residuals = weight * (features - means[labels])
        total = weight * (features - features.mean(0))
        spread = residuals.square().sum() / max(1, n - 1)
        if residuals.square().sum() <= 1e-9 * total.square().sum():
            # Every class is one image (or copies of it): how a class varies is unknown.
            residuals = torch.zeros_like(residuals)
            spread = total.square().sum() / max(1, n - 1)
            notes.append(
                "No class has two different images: the spread of all images, the same in every "
                "direction, stood in for that within a class."
            )
        weights = apply_precision(means, residuals, spread)
        bias = -(weights * means).sum(1) / 2
        if config.support_prior:
            bias = bias + (counts / counts.sum()).log()
        texts = support.logit_scale * support.texts.double()
        return Fitted(linear_head(texts + config.alpha * weights, config.alpha * bias), notes)


def apply_precision(vectors: Tensor, residuals: Tensor, spread: Tensor) -> Tensor:
    """Product with the ridge precision `P = D ((N - 1) S + tr(S) I)^-1`, without forming it.

    Args:
        vectors: `[K, D]`.
        residuals: Features minus their class means `[N, D]`, so that `(N - 1) S = R' R`.
        spread: tr(S); where it is 0, so is the result.

    Returns:
        `vectors @ P` `[K, D]`.
    """
    n, dim = residuals.shape
    if spread <= 1e-12:
        return torch.zeros_like(vectors)
    if n >= dim:
        ridge = residuals.T @ residuals + spread * torch.eye(dim).to(residuals)
        return dim * torch.linalg.solve(ridge, vectors.T).T
    # Woodbury: (R'R + c I)^-1 = (I - R' (R R' + c I)^-1 R) / c, of the size of a small support.
    ridge = residuals @ residuals.T + spread * torch.eye(n).to(residuals)
    inner = torch.linalg.solve(ridge, residuals @ vectors.T)
    return dim / spread * (vectors - inner.T @ residuals)


# -------------------------------------------------------------------------------------- Tip-Adapter


@dataclass(frozen=True)
class TipAdapterConfig(Settings):
    """Settings of `tip_adapter` and `tip_adapter_f`."""

    alpha: float = setting(
        1.17, help="Weight of the cache beside the class texts, as published for ImageNet.", least=0
    )
    beta: float = setting(1.0, help="Sharpness of the affinity to a key, the same.", least=0)
    balance: bool = setting(
        True,
        help="Whether the values of a class with few images are raised, and of one with many "
        "lowered, until every class has the same sum; on a balanced support nothing changes.",
    )


@register
class TipAdapter(FeatureMethod):
    """Tip-Adapter: a key-value cache of the support's features beside the class texts.

    `logits = s f.t + alpha exp(-beta (1 - f.key)) values`. A key is the mean of an image's views,
    of which the paper takes ten (`views: 10`).
    """

    name = "tip_adapter"
    family = "training-free"
    trains = "a cache of the support"
    validation = "search"
    citation = "Tip-Adapter: Zhang et al. 2022, arXiv:2207.09519"
    Config = TipAdapterConfig
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"beta": TIP_BETAS, "alpha": TIP_ALPHAS}

    def fit(self, support: Support, config: TipAdapterConfig) -> Fitted:
        return Fitted(cache_head(support, config.alpha, config.beta, config.balance))

    def choose(self, folds: Sequence[Fold], config: TipAdapterConfig) -> TipAdapterConfig:
        """Search the published 200 x 20 grid on all folds at once.

        The highest balanced accuracy wins, ties in the order of the published double loop.
        """
        betas, alphas = self.grid["beta"], self.grid["alpha"]
        hits = torch.zeros((), dtype=torch.long)
        for fold in folds:
            head = cache_head(fold.support, config.alpha, config.beta, config.balance)
            unit = nn.functional.normalize(fold.features.float(), dim=-1)
            with torch.no_grad():
                hits = hits + count_hits(
                    head.text(unit),
                    unit @ head.keys.T,
                    head.value_matrix(),
                    fold.labels,
                    betas,
                    alphas,
                )
        beta, alpha, _ = _best(hits, torch.cat([fold.labels for fold in folds]), betas, alphas)
        return dataclasses.replace(config, alpha=alpha, beta=beta)


def cache_head(support: Support, alpha: float, beta: float, balance: bool) -> CacheHead:
    """Key-value cache of the support: unit features as keys, classes as values.

    Args:
        support: The labelled images, with class texts.
        alpha: Weight of the cache.
        beta: Sharpness of the affinity.
        balance: Whether each class's values sum to the mean number of shots.
    """
    labels, classes = support.labels, support.num_classes
    shares = torch.ones(classes)
    if balance:
        shares = len(labels) / classes / labels.bincount(minlength=classes).clamp(min=1).float()
    head = CacheHead(support.features.shape[1], classes, len(labels))
    text = prototype_head(support.texts, support.logit_scale)
    with torch.no_grad():
        head.text.load_state_dict(text.state_dict())
        head.keys.copy_(_unit(support.averages))
        head.owners.copy_(labels)
        head.shares.copy_(shares)
        head.alpha.fill_(alpha)
        head.beta.fill_(beta)
    return head


def search_tip_adapter(
    zero_shot_logits: Tensor,
    affinity: Tensor,
    values: Tensor,
    labels: Tensor,
    betas: Sequence[float] = TIP_BETAS,
    alphas: Sequence[float] = TIP_ALPHAS,
) -> tuple[float, float, float]:
    """Grid search of Tip-Adapter: the result of `for beta: for alpha: if better: keep`.

    Better is a higher balanced accuracy over the classes present, which is plain accuracy where
    these have equally many images. Takes what `count_hits` takes; returns the first best beta, its
    alpha, and their balanced accuracy.
    """
    hits = count_hits(zero_shot_logits, affinity, values, labels, betas, alphas)
    return _best(hits, labels, betas, alphas)


def count_hits(
    zero_shot_logits: Tensor,
    affinity: Tensor,
    values: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    alphas: Sequence[float],
) -> Tensor:
    """Correct predictions of Tip-Adapter, counted for every beta, alpha and class.

    The cache's logits are a sum of exponentials in beta, so their values at a few Chebyshev points
    give them at every beta to rounding. And an image is right for the alphas of one interval:
    those where `zero_y + alpha cache_y` exceeds the same of every other class. Only where two
    classes are equal but for rounding can a count differ from that of a plain loop.

    Args:
        zero_shot_logits: `[n, K]`.
        affinity: `f @ keys.T` `[n, N]`.
        values: `[N, K]`.
        labels: `[n]`.
        betas: B candidates.
        alphas: A candidates, ascending, not negative.

    Returns:
        Whole numbers `[B, A, K]`.
    """
    classes, steps = values.shape[1], len(alphas) + 1
    limit = torch.finfo(affinity.dtype).max  # stands for 1/alpha where alpha is 0
    inverse = (1 / torch.as_tensor(alphas).to(affinity)).clamp(max=limit).flip(0)
    hits = torch.zeros(classes * len(betas) * steps, dtype=torch.long, device=affinity.device)
    column = torch.arange(len(betas), device=affinity.device)
    size = max(1, CELLS // (classes * len(betas)))
    for start in range(0, len(labels), size):
        y, distance = labels[start:][:size], 1 - affinity[start:][:size]
        rows, others = torch.arange(len(y)).to(y), torch.arange(classes).to(y).unsqueeze(1)
        zero = zero_shot_logits[start:][:size].T
        lead = zero[y, rows] - zero  # [K, rows]
        # argmax takes the first of equal classes: y wins a tie against later ones, and itself.
        lead = torch.where(lead == 0, torch.where(y <= others, 1e-30, -1e-30).to(lead), lead)
        # lead + alpha (cache_y - cache_k) > 0 puts 1/alpha above or below (cache_k - cache_y)/lead
        points, interpolate = _chebyshev(betas, distance)
        cache = torch.stack([(torch.exp(-point * distance) @ values).T for point in points], dim=2)
        bound = (cache - cache[y, rows]) / lead.unsqueeze(2)
        bound = bound @ interpolate  # [K, rows, B], at every beta
        positive = (lead > 0).unsqueeze(2)
        low = (bound - torch.where(positive, 0, torch.inf).to(lead)).amax(0)
        high = (bound + torch.where(positive, torch.inf, 0).to(lead)).amin(0)
        first = torch.searchsorted(inverse, low, right=True)
        last = torch.searchsorted(inverse, high).maximum(first)
        cell = ((y * len(betas)).unsqueeze(1) + column) * steps
        hits += torch.bincount((cell + first).flatten(), minlength=len(hits))
        hits -= torch.bincount((cell + last).flatten(), minlength=len(hits))
    hits = hits.view(classes, len(betas), steps).cumsum(2)[:, :, :-1]
    return hits.flip(2).permute(1, 2, 0)


def _chebyshev(betas: Sequence[float], distance: Tensor) -> tuple[list[float], Tensor]:
    """Points in the range of beta, and the matrix `[M, B]` from values there to every beta."""
    low, high = min(betas), max(betas)
    reach = (high - low) / 2 * float(distance.abs().max())
    # Interpolating exp(reach x), |x| <= 1, at M points is off by at most 2 (reach/2)^M / M!.
    count, error = 1, reach
    while error > torch.finfo(distance.dtype).eps / 8:
        count += 1
        error *= reach / 2 / count
    angle = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
    middle, half = (high + low) / 2, max((high - low) / 2, 1e-12)
    where = (torch.tensor(betas, dtype=torch.float64) - middle) / half
    degree = torch.arange(count, dtype=torch.float64)
    at_points = torch.cos(angle.unsqueeze(1) * degree)
    at_betas = torch.cos(where.clamp(-1, 1).acos().unsqueeze(1) * degree)
    at_betas[:, 0] /= 2
    return (middle + half * angle.cos()).tolist(), (2 / count * at_points @ at_betas.T).to(distance)


def _best(
    hits: Tensor, labels: Tensor, betas: Sequence[float], alphas: Sequence[float]
) -> tuple[float, float, float]:
    totals = torch.bincount(labels, minlength=hits.shape[2]).double()
    present = totals > 0
    shares = hits[..., present] / totals[present]
    # Rounded, so that equal scores stay equal whichever classes they come from.
    scores = shares.mean(2).round(decimals=12)
    beta, alpha = divmod(int(scores.argmax()), len(alphas))
    return betas[beta], alphas[alpha], float(scores[beta, alpha])


# ---------------------------------------------------------------------------------------- TransCLIP


@dataclass(frozen=True)
class TransClipConfig(Settings):
    """Settings of `transclip`.

    The paper searches gamma in {0.002, 0.01, 0.02, 0.2} on validation. All labelled images together
    weigh `gamma / LIKELIHOOD_WEIGHT` times as much as all query images: ten times at the largest of
    these values, which is the default, a tenth at the smallest.
    """

    text: float = setting(
        0.5,
        help="Weight lambda of the zero-shot probabilities, as published with labelled images.",
        least=0,
    )
    gamma: float = setting(
        0.2,
        help="Weight of the labelled images; with one a class .02 is milder.",
        least=0,
    )
    neighbours: int = setting(
        3, help="Of each image in the graph, as published.", least=0, most=10_000
    )
    support_edges: bool = setting(
        False,
        help="Whether each labelled image too pulls the query images nearest to it to its class. "
        "The release has such edges with their rows in the wrong order, so that nothing published "
        "was measured with right ones.",
    )


@register
class TransClip(FeatureMethod):
    """TransCLIP: labels a whole query batch at once by Gaussians, class texts and neighbours.

    From unit support means and zero-shot probabilities it alternates assignments z, means and one
    diagonal covariance; in these a query image weighs 1/m, of m, and a labelled one `50 gamma / n`,
    of n. One more step of assignments follows the last means. What is saved are these, covariance
    and class texts: for an image without neighbours they give an assignment that is linear in its
    feature.
    """

    name = "transclip"
    family = "training-free"
    trains = "one mean a class and one diagonal covariance, on the query images"
    transductive = True
    validation = "search"
    citation = "TransCLIP: Zanella et al. 2024, arXiv:2406.01837"
    Config = TransClipConfig
    grid: ClassVar[Mapping[str, Sequence[Any]]] = {"gamma": (0.002, 0.01, 0.02, 0.2)}

    def fit(self, support: Support, config: TransClipConfig) -> Fitted:
        if support.query is None or not len(support.query):
            raise GloVLMError(
                "TransCLIP labels a batch of query images together and was given none: pass the "
                "unlabelled images (query=...; query_features=... for bare features), or use a "
                "method that scores each image by itself (gda, ss_text)."
            )
        query, shots = _unit(support.query), _unit(support.averages)
        known = nn.functional.one_hot(support.labels, support.num_classes).double()
        text_weight = config.text * support.logit_scale * support.texts.double()
        graph = neighbour_graph(query, config.neighbours)
        pull: Tensor | float = 0.0  # of the labelled images' edges
        if config.support_edges:
            pull = labelled_edges(query, shots, config.neighbours).T @ known

        def assign(logits: Tensor, likelihood: Tensor, bias: Tensor) -> Tensor:
            alone = query @ (text_weight + likelihood).T + bias
            for _ in range(INNER_STEPS):
                around = graph @ logits.exp() + pull
                logits = (alone + LIKELIHOOD_WEIGHT * NEIGHBOUR_WEIGHT * around).log_softmax(1)
            return logits

        logits = (support.logit_scale * query @ support.texts.double().T).log_softmax(1)
        # Each image's weight in the means and the covariance, the same in both.
        query_weight, shot_weight = 1 / len(query), config.gamma / LIKELIHOOD_WEIGHT / len(shots)
        squares = query_weight * query.square().sum(0) + shot_weight * shots.square().sum(0)
        means = nn.functional.normalize(known.T @ shots, dim=-1)
        variance = torch.full_like(means[0], 1 / len(means[0]))
        for _ in range(OUTER_STEPS):
            logits = assign(logits, *_gaussian(means, variance))
            assigned = query_weight * logits.exp()
            sums = assigned.T @ query + shot_weight * known.T @ shots
            weights = assigned.sum(0) + shot_weight * known.sum(0)
            means = nn.functional.normalize(sums, dim=-1)
            # sum_ik z_ik (f_i - mu_k)^2, multiplied out so that nothing is [images, K, dim]
            scatter = squares - 2 * (means * sums).sum(0) + weights @ means.square()
            variance = scatter / weights.sum()
            # A feature that never moves would decide everything.
            variance = variance.clamp(min=max(1e-3 * float(variance.mean()), 1e-12))

        likelihood, bias = _gaussian(means, variance)
        logits = assign(logits, likelihood, bias)
        note = (
            f"TransCLIP is transductive: it labelled {len(query)} query images together, without "
            "their labels. The saved model is no longer transductive: it scores each image by "
            "itself, with the final class means, covariance and texts."
        )
        return Fitted(
            linear_head(text_weight + likelihood, bias),
            notes=[note],
            facts={"query_images": len(query)},
            query_logits=logits.float(),
        )


def neighbour_graph(features: Tensor, neighbours: int) -> Tensor:
    """Nearest-neighbour graph of images by their cosines, symmetric.

    Args:
        features: Unit features `[m, dim]`.
        neighbours: How many; fewer where there are fewer images. Negative cosines count as 0.

    Returns:
        `W + W'` `[m, m]`, sparse, of the features' dtype.
    """
    edges = _edges(features, features, neighbours, own=True)
    return (edges + edges.T).coalesce()


def labelled_edges(query: Tensor, shots: Tensor, neighbours: int) -> Tensor:
    """Edges from each labelled image to the query images nearest to it by their cosines.

    Args:
        query: Unit features `[m, dim]`.
        shots: Unit features of the labelled images `[n, dim]`.
        neighbours: As in `neighbour_graph`.

    Returns:
        `[n, m]`, sparse, of the features' dtype.
    """
    return _edges(shots, query, neighbours, own=False)


def _edges(images: Tensor, others: Tensor, neighbours: int, *, own: bool) -> Tensor:
    """Cosines `[n, m]` of each image and its nearest others, sparse; `own`: the same images."""
    neighbours = min(neighbours, len(others) - own)
    single = others.float()
    columns, weights = [], []
    for start in range(0, len(images), CHUNK):
        part = images[start:][:CHUNK]
        cosine = part.float() @ single.T
        if own:  # no image is its own neighbour
            rows = torch.arange(len(part), device=cosine.device)
            cosine[rows, start + rows] = -torch.inf
        nearest = cosine.topk(neighbours, dim=1).indices
        columns.append(nearest.flatten())
        weights.append((part.unsqueeze(1) * others[nearest]).sum(2).clamp(min=0).flatten())
    column = torch.cat(columns)
    row = torch.arange(len(images), device=column.device).repeat_interleave(neighbours)
    shape = (len(images), len(others))
    return torch.sparse_coo_tensor(
        torch.stack([row, column]), torch.cat(weights), shape, check_invariants=True
    ).coalesce()


def _gaussian(means: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `-|f - mu_k|^2 / (2 sigma)` times its weight, less what classes share."""
    scaled = LIKELIHOOD_WEIGHT * means / variance
    return scaled, -(scaled * means).sum(1) / 2


# ------------------------------------------------------------------------------------------ shared


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.double(), dim=-1)


def _sums(support: Support) -> tuple[Tensor, Tensor]:
    """Sum of unit features of each class `[K, dim]` and number of images `[K]`, float64."""
    averages = _unit(support.features) if support.views is None else support.averages.double()
    one_hot = nn.functional.one_hot(support.labels, support.num_classes).double()
    return one_hot.T @ averages, one_hot.sum(0)


def _means(support: Support) -> tuple[Tensor, Tensor]:
    sums, counts = _sums(support)
    return sums / counts.unsqueeze(1), counts
