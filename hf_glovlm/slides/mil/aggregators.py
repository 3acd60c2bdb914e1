"""Aggregators of multiple-instance learning: tile features of a slide in, its class logits out.

One table, `AGGREGATORS`; an entry is a class decorated with `@register_aggregator`. It takes a bag
`[n, dim]` of one tile or more and gives class logits, the attention to each tile, and the evidence
of each tile for each class.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import GloVLMError, nearest
from ...settings import Settings, read_values, setting


class BagOutput(NamedTuple):
    """Output of an aggregator for a bag of n tiles and K classes.

    Args:
        logits: `[K]`, float32.
        attention: Weight of each tile `[n]`, 0 or more, summing to 1; `None` where the aggregator
            has none (`max`).
        tile_scores: Evidence of each tile for each class `[n, K]`: the attention times the tile's
            own class logits less their mean over the classes (softmax does not see a constant).
            For `mean` and `abmil` they sum over the tiles to the slide's logits less their mean:
            an exact decomposition. `max` has no attention: the centred logits alone. For
            `transmil` they are no decomposition (its class token is normalised after the tiles
            are added up).
    """

    logits: Tensor
    attention: Tensor | None
    tile_scores: Tensor


@dataclass(frozen=True)
class InstanceConfig(Settings):
    """Settings of `mean` and `max`."""

    width: int = setting(256, help="Size of a tile's embedding.", least=1, most=65_536)
    dropout: float = setting(0.25, help="Of the embedding, while training.", least=0, below=1)
    layer_norm: bool = setting(
        False,
        help="Normalise each tile's feature over its dimensions too, behind `standardise` (in no "
        "paper).",
    )


@dataclass(frozen=True)
class AbmilConfig(InstanceConfig):
    """Settings of `abmil`; nothing is normalised behind the embedding."""

    hidden: int = setting(
        256, help="Size of the attention's two hidden layers.", least=1, most=65_536
    )


@dataclass(frozen=True)
class TransmilConfig(InstanceConfig):
    """Settings of `transmil`; `width` is that of a token, a multiple of `heads`."""

    width: int = 512
    dropout: float = setting(
        0.1, help="Of each attention layer's output, while training.", least=0, below=1
    )
    heads: int = setting(8, help="Attention heads.", least=1, most=4096)
    landmarks: int = setting(
        256,
        help="Landmarks of the Nystrom approximation. A bag with fewer tokens is attended exactly.",
        least=1,
        most=65_536,
    )

    def check(self) -> None:
        """Rules over several settings."""
        if self.width % self.heads:
            raise GloVLMError(
                f"width must be a multiple of heads; found {self.width} and {self.heads}."
            )


class Aggregator(nn.Module, ABC):
    """Aggregator: an entry of `AGGREGATORS`; make one with `build_aggregator`.

    Attributes:
        name: On the command line.
        citation: Where it comes from.
        permutation_invariant: Whether the order of the tiles does not matter.
        has_attention: Whether it weighs tiles.
        Config: Its settings.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    permutation_invariant: ClassVar[bool]
    has_attention: ClassVar[bool]
    Config: ClassVar[type[InstanceConfig]]

    mean: Tensor
    spread: Tensor

    def __init__(self, dim: int, num_classes: int, config: Any) -> None:
        super().__init__()
        if dim < 1 or num_classes < 2:
            raise GloVLMError(
                "An aggregator needs features of width 1 or more and at least two classes; found "
                f"width {dim} and {num_classes} classes."
            )
        self.dim, self.num_classes, self.config = dim, num_classes, config
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.embed = nn.Sequential(
            nn.LayerNorm(dim) if config.layer_norm else nn.Identity(),
            nn.Linear(dim, config.width),
            nn.ReLU(),
        )
        self.classify = nn.Linear(config.width, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Aggregate one bag.

        Args:
            features: `[n, dim]` float32, at least one tile.

        Raises:
            GloVLMError: The bag is empty, or its tiles have another width.
        """
        if features.dim() != 2 or features.shape[1] != self.dim or not len(features):
            raise GloVLMError(
                f"Expected a bag of at least one tile with features of width {self.dim}, found "
                f"{list(features.shape)}."
            )
        return self.aggregate((features - self.mean) / self.spread)

    @abstractmethod
    def aggregate(self, features: Tensor) -> BagOutput:
        """Aggregate a standardised bag `[n, dim]`."""

    def standardise(self, mean: Tensor, spread: Tensor) -> None:
        """Standardise every dimension, since encoders differ in scale by the hundred.

        Args:
            mean: `[dim]`, over the tiles of the training slides.
            spread: `[dim]`, their standard deviation; a dimension without any is left as it is.
        """
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1))

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Row of the table, as plain values."""
        return {
            "name": cls.name,
            "permutation_invariant": cls.permutation_invariant,
            "attention": cls.has_attention,
            "settings": asdict(cls.Config()),
            "citation": cls.citation,
        }


AGGREGATORS: dict[str, type[Aggregator]] = {}


def register_aggregator(kind: type[Aggregator]) -> type[Aggregator]:
    """List an aggregator in the table; refuse one that does not describe itself."""
    for attribute in ("name", "citation", "permutation_invariant", "has_attention", "Config"):
        if not hasattr(kind, attribute):
            raise TypeError(f"{kind.__name__} must state '{attribute}'.")
    if kind.name in AGGREGATORS:
        raise TypeError(f"There is already an aggregator '{kind.name}'.")
    AGGREGATORS[kind.name] = kind
    return kind


def _evidence(tile_logits: Tensor) -> Tensor:
    """Class logits `[n, K]` less their mean over the classes."""
    return tile_logits - tile_logits.mean(-1, keepdim=True)


@register_aggregator
class MeanPooling(Aggregator):
    """Mean pooling of the tiles' class logits."""

    name = "mean"
    citation = "Mean pooling, the plain baseline of Ilse et al. 2018, arXiv:1802.04712"
    permutation_invariant = True
    has_attention = True
    Config = InstanceConfig

    def __init__(self, dim: int, num_classes: int, config: InstanceConfig) -> None:
        super().__init__(dim, num_classes, config)
        self.dropout = nn.Dropout(config.dropout)

    def aggregate(self, features: Tensor) -> BagOutput:
        tile_logits = self.classify(self.dropout(self.embed(features))).float()
        attention = tile_logits.new_full((len(features),), 1 / len(features))
        return BagOutput(tile_logits.mean(0), attention, _evidence(tile_logits) / len(features))


@register_aggregator
class MaxPooling(MeanPooling):
    """Max pooling of the tiles' class logits: of every class its largest."""

    name = "max"
    citation = "Instance-level max pooling, as in Ilse et al. 2018, arXiv:1802.04712"
    has_attention = False

    def aggregate(self, features: Tensor) -> BagOutput:
        tile_logits = self.classify(self.dropout(self.embed(features))).float()
        return BagOutput(tile_logits.amax(0), None, _evidence(tile_logits))


@register_aggregator
class GatedAttention(Aggregator):
    """Gated attention pooling.

    `a = softmax_i(w^T (tanh(V h_i) * sigmoid(U h_i)))`, slide logits `W sum_i a_i h_i + b` (Ilse et
    al. 2018, equation 9). `h_i` is the tile's embedding: linear, ReLU, dropout.
    """

    name = "abmil"
    citation = "Ilse, Tomczak, Welling 2018, Attention-based Deep MIL, arXiv:1802.04712"
    permutation_invariant = True
    has_attention = True
    Config = AbmilConfig

    def __init__(self, dim: int, num_classes: int, config: AbmilConfig) -> None:
        super().__init__(dim, num_classes, config)
        self.dropout = nn.Dropout(config.dropout)
        self.feature = nn.Linear(config.width, config.hidden)
        self.gate = nn.Linear(config.width, config.hidden)
        self.weigh = nn.Linear(config.hidden, 1, bias=False)  # softmax does not see a bias

    def aggregate(self, features: Tensor) -> BagOutput:
        tiles = self.dropout(self.embed(features))
        gated = torch.tanh(self.feature(tiles)) * torch.sigmoid(self.gate(tiles))
        attention = self.weigh(gated).float().squeeze(-1).softmax(0)
        # W sum a_i h_i + b = sum a_i (W h_i + b): the tiles' shares add up to the slide's logits.
        shares = attention.unsqueeze(1) * self.classify(tiles).float()
        return BagOutput(shares.sum(0), attention, _evidence(shares))


@register_aggregator
class TransformerPooling(Aggregator):
    """Transformer over the tiles, after TransMIL.

    The tiles' tokens and a class token pass a layer of self-attention; a positional encoding is
    convolved over the tiles laid out as a square in the order given (`_Pyramid`); then the class
    token attends to all, and is classified.

    What differs from the paper (arXiv:2106.00908): the class token's last attention is exact, since
    it is one row, which also makes the attention over tiles that is returned the one that was used;
    landmarks are means of runs of nearly equal length, without padding; a bag with no more tokens
    than landmarks is attended exactly; no convolution of the values beside the attention.
    Memory and time grow with the number of tiles, not with its square.
    """

    name = "transmil"
    citation = (
        "Shao et al. 2021, TransMIL, arXiv:2106.00908; attention by Xiong et al. 2021, "
        "Nystromformer, arXiv:2102.03902"
    )
    permutation_invariant = False
    has_attention = True
    Config = TransmilConfig

    def __init__(self, dim: int, num_classes: int, config: TransmilConfig) -> None:
        super().__init__(dim, num_classes, config)
        self.class_token = nn.Parameter(torch.randn(1, config.width) * 0.02)
        self.first = _Attention(config)
        self.pyramid = _Pyramid(config.width)
        self.last = _Attention(config)
        self.norm = nn.LayerNorm(config.width)

    def aggregate(self, features: Tensor) -> BagOutput:
        n = len(features)
        side = math.ceil(math.sqrt(n))
        tile = torch.arange(side * side, device=features.device) % n  # the first fill the square
        tokens = torch.cat([self.class_token, self.embed(features)[tile]])
        tokens = tokens + self.first.between_all(tokens)
        tokens = torch.cat([tokens[:1], self.pyramid(tokens[1:], side)])
        update, weights = self.last.of_first(tokens)
        logits = self.classify(self.norm(tokens[0] + update)).float()
        weights = weights.new_zeros(n).index_add(0, tile, weights[1:])
        attention = weights / weights.sum()
        tile_logits = self.classify(self.norm(tokens[1 : n + 1])).float()
        return BagOutput(logits, attention, attention.unsqueeze(1) * _evidence(tile_logits))


class _Attention(nn.Module):
    """Multi-head attention behind a layer norm, among all tokens or of the first alone."""

    def __init__(self, config: TransmilConfig) -> None:
        super().__init__()
        self.heads, self.landmarks = config.heads, config.landmarks
        self.norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Sequential(nn.Linear(config.width, config.width), nn.Dropout(config.dropout))

    def between_all(self, tokens: Tensor) -> Tensor:
        """Self-attention: tokens `[t, width]` in, what it adds to each `[t, width]` out."""
        query, key, value = self._split(tokens)
        # The approximate inverse needs single precision.
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = nystrom_attention(query.float(), key.float(), value.float(), self.landmarks)
        return self.out(mixed.transpose(0, 1).flatten(1).to(tokens.dtype))

    def of_first(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the first token: what it adds `[width]`, and its weights `[t]` over all."""
        query, key, value = self._split(tokens)
        scores = (query[:, :1] @ key.transpose(1, 2)).float() / math.sqrt(query.shape[-1])
        weights = scores.softmax(-1)
        mixed = (weights.to(value.dtype) @ value).squeeze(1)
        return self.out(mixed.flatten()), weights.squeeze(1).mean(0)

    def _split(self, tokens: Tensor) -> list[Tensor]:
        """Query, key and value, each `[heads, t, width / heads]`."""
        parts = self.query_key_value(self.norm(tokens)).chunk(3, dim=-1)
        return [part.unflatten(1, (self.heads, -1)).transpose(0, 1) for part in parts]


class _Pyramid(nn.Module):
    """TransMIL's pyramid positional encoding (PPEG): depthwise convolutions of three sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens `[side * side, width]` of a square, row by row, in and out."""
        square = tokens.T.unflatten(1, (side, side)).unsqueeze(0)
        for layer in self.layers:
            tokens = tokens + layer(square).squeeze(0).flatten(1).T
        return tokens


def nystrom_attention(query: Tensor, key: Tensor, value: Tensor, landmarks: int) -> Tensor:
    """Nystrom attention, linear in the number of tokens (arXiv:2102.03902).

    `softmax(Q K'^T) pinv(softmax(Q' K'^T)) softmax(Q' K^T) V`, where Q' and K' are means over runs
    of tokens, and the pseudo-inverse is six steps of its iteration (equation 14 there).

    Args:
        query: `[heads, t, d]`.
        key: `[heads, t, d]`.
        value: `[heads, t, d]`.
        landmarks: Number of runs; with as many tokens or fewer, attention is exact.

    Returns:
        `[heads, t, d]`.
    """
    query = query / math.sqrt(query.shape[-1])
    if query.shape[1] <= landmarks:
        return (query @ key.transpose(1, 2)).softmax(-1) @ value
    few_queries, few_keys = (
        nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), landmarks).transpose(1, 2)
        for x in (query, key)
    )
    between = (few_queries @ few_keys.transpose(1, 2)).softmax(-1)
    onto = (few_queries @ key.transpose(1, 2)).softmax(-1) @ value
    return (query @ few_keys.transpose(1, 2)).softmax(-1) @ (_pseudo_inverse(between) @ onto)


def _pseudo_inverse(matrix: Tensor, steps: int = 6) -> Tensor:
    """Moore-Penrose inverse of `[heads, m, m]` with rows that sum to 1, by matrix products."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    largest = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
    inverse = matrix.transpose(-1, -2) / largest[:, None, None]
    for _ in range(steps):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse


def build_aggregator(
    name: str, dim: int, num_classes: int, settings: Mapping[str, Any] | None = None
) -> Aggregator:
    """Build an untrained aggregator; its weights come from torch's generator.

    Args:
        name: A name of `AGGREGATORS`.
        dim: Width of a tile's feature.
        num_classes: Classes K, at least two.
        settings: What departs from the defaults of its `Config`.

    Raises:
        GloVLMError: There is no such aggregator or setting, or a setting is out of range.
    """
    return find_aggregator(name)(dim, num_classes, configure_aggregator(name, settings or {}))


def find_aggregator(name: str) -> type[Aggregator]:
    """Find an aggregator by its name.

    Raises:
        GloVLMError: There is none; names the nearest.
    """
    if name not in AGGREGATORS:
        raise GloVLMError(
            f"Unknown aggregator '{name}': expected {', '.join(AGGREGATORS)}."
            f"{nearest(name, AGGREGATORS)}"
        )
    return AGGREGATORS[name]


def configure_aggregator(name: str, settings: Mapping[str, Any]) -> Any:
    """Typed config of an aggregator from plain settings.

    Raises:
        GloVLMError: There is no such aggregator or setting, or a setting is out of range.
    """
    kind, about = find_aggregator(name).Config, f"of aggregator '{name}'"
    return kind(**read_values(kind, settings, about=about, unknown=f"Aggregator '{name}'"))
