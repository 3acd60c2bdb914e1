"""Second route to the methods on features: their published formulas, with loops, in float64.

Written from papers and their released recipes alone, without a look at `hf_glovlm/methods` or
`hf_glovlm/model`, and meant to be read beside them: an image, a class, an epoch at a time. Nothing
here is fast or reused, and nothing here may import the package.

Notation: f image feature and t_k class text, both of length one; s logit scale; K classes; N
support images, n_k of class k; D width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unit(x: Array) -> Array:
    """Rows of length one."""
    rows = np.array(x, dtype=np.float64, copy=True)
    for row in rows.reshape(-1, rows.shape[-1]):
        row /= math.sqrt(float(row @ row))
    return rows


def softmax(logits: Array) -> Array:
    """Softmax of every row."""
    out = np.empty_like(logits)
    for i, row in enumerate(logits):
        shifted = np.exp(row - row.max())
        out[i] = shifted / shifted.sum()
    return out


def cosines(f: Array, w: Array, scale: float) -> Array:
    """Scaled cosines of every image and class."""
    f, w = unit(f), unit(w)
    return np.array([[scale * float(a @ b) for b in w] for a in f])


# --- no training ------------------------------------------------------------------------------


def zero_shot(f: Array, y: Array, t: Array, query: Array, *, scale: float) -> Array:
    """Zero-shot: s f.t_k."""
    return cosines(query, t, scale)


def prototype(f: Array, y: Array, t: Array, query: Array, *, scale: float) -> Array:
    """SimpleShot with L2N: minus half the squared distance of unit features to class means."""
    f, query = unit(f), unit(query)
    logits = np.empty((len(query), y.max() + 1))
    for k in range(logits.shape[1]):
        members = [f[i] for i in range(len(f)) if y[i] == k]
        centre = sum(members) / len(members)
        for i, q in enumerate(query):
            logits[i, k] = -scale / 2 * float((q - centre) @ (q - centre))
    return logits


def ss_text(f: Array, y: Array, t: Array, query: Array, *, scale: float) -> Array:
    """SS-Text: w_k = 1 / (N lambda) 1 / tau sum_(i in k) f_i + t_k, lambda = max(1 / N, 1e-3)."""
    f, t, tau, n = unit(f), unit(t), 1 / scale, len(f)
    strength = max(1 / n, 1e-3)
    w = t.copy()
    for i in range(n):
        w[y[i]] += f[i] / (n * strength * tau)
    return cosines(query, w, scale)


def ss_text_plus(f: Array, y: Array, t: Array, query: Array, *, scale: float) -> Array:
    """SS-Text+: lambda_k = 1 / n_k, then w_k - unit(2 w_k - mean(w))."""
    f, t, tau, n = unit(f), unit(t), 1 / scale, len(f)
    w = t.copy()
    for i in range(n):
        n_k = sum(1 for label in y if label == y[i])
        w[y[i]] += f[i] / (n * (1 / n_k) * tau)
    mean = sum(w) / len(w)
    pushed = np.array([w_k - unit((2 * w_k - mean)[None])[0] for w_k in w])
    return cosines(query, pushed, scale)


def gda(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    alpha: float = 0.1,
    support_prior: bool = False,
) -> Array:
    """GDA-CLIP: s f.t_k + alpha (mu_k' P f + log prior_k - mu_k' P mu_k / 2).

    P = D ((N - 1) S + tr(S) I)^-1 with S the covariance of the features around their class means,
    over N - 1. With one image a class S is 0, of which papers say nothing: here the covariance is
    then the same in every direction, with the trace of the support's around its one mean.
    """
    f, q = unit(f), unit(query)
    n, d, classes = len(f), f.shape[1], len(t)
    mu = np.zeros((classes, d))
    counts = [sum(1 for label in y if label == k) for k in range(classes)]
    for i in range(n):
        mu[y[i]] += f[i] / counts[y[i]]
    s = np.zeros((d, d))
    for i in range(n):
        s += np.outer(f[i] - mu[y[i]], f[i] - mu[y[i]]) / (n - 1)
    trace = float(np.trace(s))
    if n == classes:
        mean = sum(f) / n
        trace = sum(float((f_i - mean) @ (f_i - mean)) for f_i in f) / (n - 1)
    precision = d * np.linalg.inv((n - 1) * s + trace * np.eye(d))
    logits = cosines(query, t, scale)
    for k in range(classes):
        prior = counts[k] / n if support_prior else 1 / classes
        pull = precision @ mu[k]
        for i in range(len(q)):
            logits[i, k] += alpha * (float(pull @ q[i]) + math.log(prior) - float(pull @ mu[k]) / 2)
    return logits


def cache_values(y: Array, classes: int, balance: bool) -> Array:
    """One-hot values of a cache; balanced, every class has the same sum, N / K."""
    values = np.zeros((len(y), classes))
    for i, label in enumerate(y):
        n_k = sum(1 for other in y if other == label)
        values[i, label] = len(y) / (classes * n_k) if balance else 1.0
    return values


def tip_adapter(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    alpha: float = 1.17,
    beta: float = 1.0,
    balance: bool = True,
) -> Array:
    """Tip-Adapter: s f.t + alpha exp(-beta (1 - f.key)) V."""
    keys, q = unit(f), unit(query)
    values = cache_values(y, len(t), balance)
    logits = cosines(query, t, scale)
    for i in range(len(q)):
        for j in range(len(keys)):
            logits[i] += alpha * math.exp(-beta * (1 - float(q[i] @ keys[j]))) * values[j]
    return logits


def transclip(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    text: float = 0.5,
    gamma: float = 0.2,
    neighbours: int = 3,
) -> Array:
    """TransCLIP with labelled images: log of the assignments z of the query images.

    Start: mu_k the unit support mean, sigma = 1 / D, z = yhat = softmax(s f.t). Ten times: five
    steps z <- yhat^lambda exp(1/50 (-|f - mu_k|^2_(1/sigma) / 2 + 50/6 (W' z + W z))), normalised,
    with W the cosines of each query image and its nearest others; then means, of length one, then
    sigma, in both of which a query image weighs z / |Q| and a labelled one 50 gamma / |S|. One
    more z step at the end.
    """
    f, q = unit(f), unit(query)
    n, m, d, classes = len(f), len(q), f.shape[1], len(t)
    yhat = softmax(cosines(query, t, scale))
    mu = np.zeros((classes, d))
    for i in range(n):
        mu[y[i]] += f[i]
    mu = unit(mu)
    sigma = np.full(d, 1 / d)
    affinity = np.zeros((m, m))
    for i in range(m):
        others = sorted((j for j in range(m) if j != i), key=lambda j: -float(q[i] @ q[j]))
        for j in others[:neighbours]:
            affinity[i, j] = float(q[i] @ q[j])

    def assign(z: Array) -> Array:
        gauss = np.empty((m, classes))
        for i in range(m):
            for k in range(classes):
                gauss[i, k] = -0.5 * float(((q[i] - mu[k]) ** 2 / sigma).sum())
        for _ in range(5):
            pull = 50 / 6 * (affinity.T @ z + affinity @ z)
            z = softmax(text * np.log(yhat) + (gauss + pull) / 50)
        return z

    z, labelled = yhat, 50 * gamma / n
    for _ in range(10):
        z = assign(z)
        mu = np.zeros((classes, d))
        for i in range(m):
            for k in range(classes):
                mu[k] += z[i, k] / m * q[i]
        for i in range(n):
            mu[y[i]] += labelled * f[i]
        mu = unit(mu)  # of length one, so what the weights sum to cancels
        sigma, total = np.zeros(d), 0.0
        for i in range(m):
            for k in range(classes):
                sigma += z[i, k] / m * (q[i] - mu[k]) ** 2
                total += z[i, k] / m
        for i in range(n):
            sigma += labelled * (f[i] - mu[y[i]]) ** 2
            total += labelled
        sigma /= total
    return np.log(assign(z))


# --- heads that train -------------------------------------------------------------------------


def linear_probe(
    f: Array, y: Array, t: Array, query: Array, *, scale: float, C: float = 100.0
) -> Array:
    """Multinomial logistic regression: the minimum of C sum CE + |W|^2 / 2, by Newton's method.

    Convex, so the optimum is what any solver must reach. The bias has no penalty; the flat
    direction (the same added to every bias) is taken out by least squares. Of two classes
    scikit-learn fits one w = w_1 - w_0 under |w|^2 / 2, which is |W|^2 where w_1 = -w_0.
    """
    f = unit(f)
    n, d, classes = len(f), f.shape[1], y.max() + 1
    x = np.hstack([f, np.ones((n, 1))])
    w = np.zeros((classes, d + 1))
    penalised = np.full((classes, d + 1), 2.0 if classes == 2 else 1.0)
    penalised[:, d] = 0

    def objective(w: Array) -> float:
        logits = x @ w.T
        top = logits.max(axis=1)
        norm = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        loss = sum(norm[i] - logits[i, y[i]] for i in range(n))
        return C * loss + 0.5 * float((penalised * w**2).sum())

    for _ in range(200):
        p = softmax(x @ w.T)
        residual = p.copy()
        for i in range(n):
            residual[i, y[i]] -= 1
        gradient = (C * residual.T @ x + penalised * w).ravel()
        if np.abs(gradient).max() < 1e-9:
            break
        hessian = np.diag(penalised.ravel())
        for i in range(n):
            curvature = np.diag(p[i]) - np.outer(p[i], p[i])
            hessian += C * np.kron(curvature, np.outer(x[i], x[i]))
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-14)[0].reshape(w.shape)
        size, here = 1.0, objective(w)
        while objective(w - size * step) > here and size > 1e-8:
            size /= 2
        w = w - size * step
    return np.hstack([unit(query), np.ones((len(query), 1))]) @ w.T


def cross_entropy_gradient(logits: Array, y: Array) -> Array:
    """Gradient of the mean cross-entropy with respect to the logits."""
    out = softmax(logits)
    for i, label in enumerate(y):
        out[i, label] -= 1
    return out / len(y)


def lp_plus_plus(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    epochs: int = 300,
    alpha_start: float = 250.0,
    alpha_every: int = 10,
    momentum: float = 0.9,
) -> Array:
    """LP++: f.(w_k + alpha_k t_k) + b_k, no temperature.

    w_k starts at the sum of its images, b at 0, each alpha at 250 times the mean over classes of
    the mean f.t_k over its images. Full batches: w and b by SGD with momentum at
    4 N / lambda_max(F'F), alpha by plain gradient descent every tenth epoch at
    N / (4 max_k sum_i (f_i.t_k)^2), whose gradient is cleared at every step.
    """
    f, t, q = unit(f), unit(t), unit(query)
    n, classes = len(f), len(t)
    w, b = np.zeros_like(t), np.zeros(classes)
    for i in range(n):
        w[y[i]] += f[i]
    own = []
    for k in range(classes):
        members = [float(f[i] @ t[k]) for i in range(n) if y[i] == k]
        own.append(sum(members) / len(members))
    alpha = np.full(classes, alpha_start * sum(own) / classes)
    lr_w = 4 * n / float(np.linalg.eigvalsh(f.T @ f).max())
    lr_alpha = n / (4 * max(sum(float(a @ t_k) ** 2 for a in f) for t_k in t))
    speed_w, speed_b = np.zeros_like(w), np.zeros_like(b)
    for epoch in range(1, epochs + 1):
        gradient = cross_entropy_gradient(f @ w.T + (f @ t.T) * alpha + b, y)
        speed_w = momentum * speed_w + gradient.T @ f
        speed_b = momentum * speed_b + gradient.sum(axis=0)
        w, b = w - lr_w * speed_w, b - lr_w * speed_b
        if epoch % alpha_every == 0:
            alpha = alpha - lr_alpha * (gradient * (f @ t.T)).sum(axis=0)
    return q @ w.T + (q @ t.T) * alpha + b


def warm_cosine(epoch: int, epochs: int, lr: float) -> float:
    """One epoch at 1e-5, then a cosine to 0 that the warm-up delays: CoOp's schedule."""
    if epoch == 0:
        return 1e-5
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def tensor(x: Any) -> torch.Tensor:
    """A float64 tensor, or class numbers."""
    array = np.asarray(x)
    return torch.tensor(array, dtype=torch.float64 if array.dtype.kind == "f" else torch.int64)


def direction(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def mean_cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax at the label."""
    return (torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]).mean()


def sgd(
    parameters: list[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    rates: list[float],
    weight_decay: float = 0.0,
) -> None:
    """SGD with momentum 0.9 whose weight decay is part of the gradient, a step a rate."""
    speeds = [torch.zeros_like(p) for p in parameters]
    for rate in rates:
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, g, speed in zip(parameters, gradients, speeds, strict=True):
                speed.mul_(0.9).add_(g + weight_decay * p)
                p.sub_(rate * speed)


def adam(
    parameters: list[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    rates: list[float],
    weight_decay: float | Sequence[float] = 0.0,
    *,
    eps: float = 1e-8,
    decoupled: bool = False,
    factors: Sequence[float] | None = None,
) -> None:
    """Adam (weight decay part of the gradient) or, decoupled, AdamW; betas .9 and .999.

    `factors`: of the rate, where parameters do not share one.
    """
    decays = (
        weight_decay if isinstance(weight_decay, Sequence) else [weight_decay] * len(parameters)
    )
    factors = factors or [1.0] * len(parameters)
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for step, rate in enumerate(rates, 1):
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, g, m, v, decay, factor in zip(
                parameters, gradients, first, second, decays, factors, strict=True
            ):
                if decoupled:
                    p.mul_(1 - rate * factor * decay)
                else:
                    g = g + decay * p
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                root = (v / (1 - 0.999**step)).sqrt() + eps
                p.sub_(rate * factor * (m / (1 - 0.9**step)) / root)


def leaf(x: Any) -> torch.Tensor:
    """A parameter in float64 that starts at x."""
    value = x.detach().to(torch.float64) if isinstance(x, torch.Tensor) else tensor(x)
    return value.clone().requires_grad_()


def zs_lp(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    length: float = 10.0,
    epochs: int = 300,
    held: bool = False,
) -> Array:
    """ZS-LP: s cos(f, w_k) from w_k = t_k; held, CLAP adds mean_k lambda_k |w_k - t_k|^2.

    t_k of a length (the released code takes texts that are not normalised, about 10 in CLIP).
    """
    features, labels = direction(tensor(f)), tensor(y)
    texts = length * direction(tensor(t))
    w = leaf(texts)
    zero_shot_probabilities = torch.softmax(scale * features @ direction(texts).T, dim=1)
    strengths = []
    for k in range(len(t)):
        own = [zero_shot_probabilities[i, k] for i in range(len(y)) if y[i] == k]
        strengths.append(sum(own) / len(own))

    def loss() -> torch.Tensor:
        value = mean_cross_entropy(scale * features @ direction(w).T, labels)
        if held:
            for k, strength in enumerate(strengths):
                value = value + strength * (w[k] - texts[k]).pow(2).sum() / len(strengths)
        return value

    sgd([w], loss, [warm_cosine(epoch, epochs, 0.1) for epoch in range(epochs)])
    return cosines(query, w.detach().numpy(), scale)


def clap(f: Array, y: Array, t: Array, query: Array, *, scale: float, **settings: Any) -> Array:
    """CLAP: ZS-LP held at its texts."""
    return zs_lp(f, y, t, query, scale=scale, held=True, **settings)


def taskres(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    length: float = 10.0,
    alpha: float = 0.5,
) -> Array:
    """TaskRes: t_k + alpha x_k, x from 0, by Adam at 2e-3 with L2 of 5e-4 in its gradient."""
    features, labels = direction(tensor(f)), tensor(y)
    texts = length * direction(tensor(t))
    x = leaf(torch.zeros_like(texts))
    shots = max(sum(1 for label in y if label == k) for k in range(len(t)))
    epochs = 100 if shots <= 4 else 200

    def loss() -> torch.Tensor:
        return mean_cross_entropy(scale * features @ direction(texts + alpha * x).T, labels)

    adam([x], loss, [warm_cosine(epoch, epochs, 2e-3) for epoch in range(epochs)], 5e-4)
    return cosines(query, (texts + alpha * x).detach().numpy(), scale)


def coop_epochs(shots: int) -> int:
    """CoOp's epochs: 50 at one shot, 100 up to four, 200 beyond."""
    return 50 if shots <= 1 else 100 if shots <= 4 else 200


def most_shots(y: Array) -> int:
    """Images of the largest class."""
    return max(sum(1 for label in y if label == k) for k in range(y.max() + 1))


def clip_adapter(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    start: dict[str, torch.Tensor],
    ratio: float = 0.2,
) -> Array:
    """CLIP-Adapter: r ReLU(W2 ReLU(W1 f)) + (1 - r) f, no bias, of length one, against t_k."""
    features, labels, texts = direction(tensor(f)), tensor(y), direction(tensor(t))
    down, up = (leaf(start[name]) for name in ("adapter.0.weight", "adapter.2.weight"))

    def adapted(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(torch.relu(x @ down.T) @ up.T)
        return direction(ratio * hidden + (1 - ratio) * x)

    def loss() -> torch.Tensor:
        return mean_cross_entropy(scale * adapted(features) @ texts.T, labels)

    epochs = coop_epochs(most_shots(y))
    rates = [warm_cosine(epoch, epochs, 2e-3) for epoch in range(epochs)]
    sgd([down, up], loss, rates, weight_decay=5e-4)
    return (scale * adapted(direction(tensor(query))) @ texts.T).detach().numpy()


def tip_adapter_f(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    alpha: float = 1.17,
    beta: float = 1.0,
    balance: bool = True,
) -> Array:
    """Tip-Adapter-F: the keys are the weights of a linear map, 20 epochs of AdamW at 1e-3."""
    features, labels, texts = direction(tensor(f)), tensor(y), direction(tensor(t))
    keys, values = leaf(features), tensor(cache_values(y, len(t), balance))

    def logits(x: torch.Tensor) -> torch.Tensor:
        return scale * x @ texts.T + alpha * torch.exp(-beta * (1 - x @ keys.T)) @ values

    rates = [1e-3 / 2 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    adam(
        [keys],
        lambda: mean_cross_entropy(logits(features), labels),
        rates,
        weight_decay=1e-2,
        eps=1e-4,
        decoupled=True,
    )
    return logits(direction(tensor(query))).detach().numpy()


def prolip(
    f: Array,
    y: Array,
    t: Array,
    query: Array,
    *,
    scale: float,
    strength: float | None = None,
    projection: torch.Tensor | None = None,
    epochs: int = 300,
) -> Array:
    """ProLIP: the last projection W trains under lambda |W - W0|^2, lambda = 1 / shots.

    f are the vectors before it; W0 = I where there is none.
    """
    x, labels, texts = tensor(f), tensor(y), direction(tensor(t))
    start = torch.eye(x.shape[1], dtype=torch.float64) if projection is None else projection
    w = leaf(start)
    pull = len(t) / len(y) if strength is None else strength

    def logits(x: torch.Tensor) -> torch.Tensor:
        return scale * direction(x @ w.T) @ texts.T

    def loss() -> torch.Tensor:
        return mean_cross_entropy(logits(x), labels) + pull * (w - start).pow(2).sum()

    rates = [1e-5 / 2 * (1 + math.cos(math.pi * step / epochs)) for step in range(epochs)]
    adam([w], loss, rates, eps=1e-4, decoupled=True)
    return logits(tensor(query)).detach().numpy()


def classifier(
    f: Array, y: Array, t: Array, query: Array, *, scale: float, start: dict[str, torch.Tensor]
) -> Array:
    """Glo-VLMs' classifier: Linear - BN - ReLU - (Dropout) - Linear, 20 epochs of AdamW at 1e-3.

    Without dropout, whose draws no formula gives; batches of all images. The running statistics
    of the batch norm (momentum .1, variance over n - 1) serve new images.
    """
    x, labels = tensor(f), tensor(y)
    w1, b1, gain, shift, w2, b2 = (leaf(p) for p in start.values())
    mean, variance = torch.zeros_like(b1), torch.ones_like(b1)

    def head(hidden: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        normal = (hidden - mean) / (variance + 1e-5).sqrt() * gain + shift
        return torch.relu(normal) @ w2.T + b2

    def loss() -> torch.Tensor:
        nonlocal mean, variance
        hidden = x @ w1.T + b1
        centre = hidden.mean(0)
        spread = (hidden - centre).pow(2).mean(0)
        mean = 0.9 * mean + 0.1 * centre.detach()
        variance = 0.9 * variance + 0.1 * spread.detach() * len(x) / (len(x) - 1)
        return mean_cross_entropy(head(hidden, centre, spread), labels)

    adam([w1, b1, gain, shift, w2, b2], loss, [1e-3] * 20, weight_decay=1e-4, decoupled=True)
    return head(tensor(query) @ w1.T + b1, mean, variance).detach().numpy()


ON_FEATURES: dict[str, Callable[..., Array]] = {
    "zero_shot": zero_shot,
    "prototype": prototype,
    "ss_text": ss_text,
    "ss_text_plus": ss_text_plus,
    "gda": gda,
    "tip_adapter": tip_adapter,
    "transclip": transclip,
    "linear_probe": linear_probe,
    "lp_plus_plus": lp_plus_plus,
    "zs_lp": zs_lp,
    "clap": clap,
    "taskres": taskres,
    "clip_adapter": clip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "prolip": prolip,
    "classifier": classifier,
}
