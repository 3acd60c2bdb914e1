"""Heads on features trained the plain way: a module, an optimiser, and a loop over batches.

Each is written from its paper, without anything of the package but its class texts' length and its
order of batches, so that a bench can compare seconds and results.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 100.0
LENGTH = 10.0  # of the class texts of `zs_lp`, `clap` and `taskres`
Logits = Callable[[Tensor], Tensor]
Rate = Callable[[int, float], float]  # of an epoch and the part of all steps that is done


def unit(rows: Tensor) -> Tensor:
    """Rows of length one."""
    return nn.functional.normalize(rows, dim=-1)


def batches(n: int, size: int, epoch: int) -> Iterator[Tensor]:
    """Row numbers of an epoch's batches, in an order drawn from its number."""
    yield from torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).split(size)


def warm_cosine(lr: float, epochs: int) -> Rate:
    """Learning rate by epoch: 1e-5 in the first, then a cosine."""

    def rate(epoch: int, done: float) -> float:
        return 1e-5 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2

    return rate


def step_cosine(lr: float) -> Rate:
    """Learning rate by step: a cosine."""
    return lambda epoch, done: lr * (1 + math.cos(math.pi * done)) / 2


def run_epochs(
    logits: Logits,
    features: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    rate: Rate,
    epochs: int,
    size: int,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Plain training loop on cross-entropy."""
    steps, done = epochs * math.ceil(len(features) / size), 0
    for epoch in range(epochs):
        for rows in batches(len(features), size, epoch):
            optimizer.param_groups[0]["lr"] = rate(epoch, done / steps)
            loss = nn.functional.cross_entropy(logits(features[rows]), labels[rows])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1


def shifted_texts(
    features: Tensor, labels: Tensor, texts: Tensor, *, share: float = 1.0, held: bool = False
) -> Logits:
    """Train a shift of each class text: ZS-LP, held at its text CLAP, a share of it TaskRes."""
    start = LENGTH * unit(texts)
    shift = nn.Parameter(torch.zeros_like(start))
    shots = int(labels.bincount().max())

    def logits(rows: Tensor) -> Tensor:
        return SCALE * unit(rows) @ unit(start + share * shift).T

    own = (SCALE * unit(features) @ unit(texts).T).softmax(-1)[torch.arange(len(labels)), labels]
    hold = torch.zeros(len(texts)).index_add(0, labels, own) / labels.bincount()

    def penalty() -> Tensor:
        return (hold * shift.square().sum(-1)).mean()

    if share == 1.0:
        epochs, rate = 300, warm_cosine(0.1, 300)
        optimizer: Any = torch.optim.SGD([shift], lr=0.1, momentum=0.9)
    else:
        epochs = 100 if shots <= 4 else 200
        rate = warm_cosine(2e-3, epochs)
        optimizer = torch.optim.Adam([shift], lr=2e-3, weight_decay=5e-4)
    run_epochs(logits, features, labels, optimizer, rate, epochs, 256, penalty if held else None)
    return logits


def clip_adapter(features: Tensor, labels: Tensor, texts: Tensor) -> Logits:
    """CLIP-Adapter: a bottleneck beside the feature."""
    from ...training.loop import seed_everything

    dim, shots = features.shape[1], int(labels.bincount().max())
    seed_everything(0)  # where the package's own weights start
    adapter = nn.Sequential(
        nn.Linear(dim, dim // 4, bias=False), nn.ReLU(),
        nn.Linear(dim // 4, dim, bias=False), nn.ReLU(),
    )  # fmt: skip

    def logits(rows: Tensor) -> Tensor:
        plain = unit(rows)
        return SCALE * unit(0.2 * adapter(plain) + 0.8 * plain) @ unit(texts).T

    epochs = 50 if shots <= 1 else 100 if shots <= 4 else 200
    optimizer = torch.optim.SGD(adapter.parameters(), lr=2e-3, momentum=0.9, weight_decay=5e-4)
    run_epochs(logits, features, labels, optimizer, warm_cosine(2e-3, epochs), epochs, 32)
    return logits


def tip_adapter_f(features: Tensor, labels: Tensor, texts: Tensor) -> Logits:
    """Tip-Adapter-F: the keys of a cache with one-hot values."""
    keys = nn.Parameter(unit(features))
    values = nn.functional.one_hot(labels).float()
    values = values * (len(labels) / len(texts) / values.sum(0))

    def logits(rows: Tensor) -> Tensor:
        plain = unit(rows)
        cache = torch.exp(-(1 - plain @ keys.T)) @ values
        return SCALE * plain @ unit(texts).T + 1.17 * cache

    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4, weight_decay=0.01)
    run_epochs(logits, features, labels, optimizer, step_cosine(1e-3), 20, 256)
    return logits


def prolip(features: Tensor, labels: Tensor, texts: Tensor) -> Logits:
    """ProLIP: the last projection, held where it starts; all images at every step."""
    start = torch.eye(features.shape[1])
    weight = nn.Parameter(start.clone())

    def logits(rows: Tensor) -> Tensor:
        return SCALE * unit(rows @ weight.T) @ unit(texts).T

    def penalty() -> Tensor:
        return len(texts) / len(labels) * (weight - start).square().sum()

    optimizer = torch.optim.AdamW([weight], lr=1e-5, eps=1e-4, weight_decay=0.0)
    size = len(features)
    run_epochs(logits, features, labels, optimizer, step_cosine(1e-5), 300, size, penalty)
    return logits


def classifier(features: Tensor, labels: Tensor, texts: Tensor) -> Logits:
    """Glo-VLMs' MLP, nothing dropped out."""
    from ...training.loop import seed_everything

    seed_everything(0)
    layers = nn.Sequential(
        nn.Linear(features.shape[1], 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, len(texts)),
    )
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3, weight_decay=1e-4)
    run_epochs(layers, features, labels, optimizer, lambda epoch, done: 1e-3, 20, 16)
    return layers.eval()


def lp_plus_plus(features: Tensor, labels: Tensor, texts: Tensor) -> Logits:
    """LP++: steps of the whole support, whose size comes from bounds on the curvature."""
    known = nn.functional.one_hot(labels).double()
    rows, texts = unit(features.double()), unit(texts.double())
    cosines, n = rows @ texts.T, len(rows)
    rate = 4 * n / float(torch.linalg.eigvalsh(rows.T @ rows)[-1])
    alpha_rate = n / (4 * float(cosines.square().sum(0).max()))
    weight = nn.Parameter(known.T @ rows)
    bias = nn.Parameter(torch.zeros(len(texts)).double())
    start = 250.0 * ((known * cosines).sum(0) / known.sum(0)).mean()
    alpha = nn.Parameter(start.expand(len(texts)).clone())
    optimizer = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9)
    alpha_optimizer = torch.optim.SGD([alpha], lr=alpha_rate)
    for epoch in range(1, 301):
        logits = rows @ weight.T + alpha * cosines + bias
        optimizer.zero_grad()
        alpha_optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        if epoch % 10 == 0:
            alpha_optimizer.step()
    total = weight.detach() + alpha.detach().unsqueeze(1) * texts
    return lambda fresh: (unit(fresh.double()) @ total.T + bias.detach()).float()


PLAIN_HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Logits]] = {
    "lp_plus_plus": lp_plus_plus,
    "zs_lp": shifted_texts,
    "clap": partial(shifted_texts, held=True),
    "taskres": partial(shifted_texts, share=0.5),
    "clip_adapter": clip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "prolip": prolip,
    "classifier": classifier,
}
