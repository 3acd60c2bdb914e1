"""Heads of a finder: what is learned from outlined regions on the tokens of a frozen tower.

`HEADS` names them. Each scores a picture once, which is the costly part, and outlines glomeruli
from the scores at any threshold.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize

from ...errors import GloVLMError, nearest
from ...progress import counted
from .agreement import is_cut
from .candidates import (
    FINER,
    MEASURES,
    Candidate,
    best_overlaps,
    list_candidates,
    measure_candidate,
    suppress,
)
from .instances import cover_cells, outline_components, trace
from .logistic import Logistic, fit_weighted
from .regions import Detection, Region, diameters
from .tokens import LAST, TokenEncoder, TokenMap

HEADS: dict[str, type["Head"]] = {}


def register(head: type["Head"]) -> type["Head"]:
    """Add a head to `HEADS` under its name."""
    HEADS[head.name] = head
    return head


def make_head(name: str) -> "Head":
    """Head of a name, not fitted yet.

    Raises:
        GloVLMError: There is none.
    """
    if name not in HEADS:
        raise GloVLMError(
            f"Expected a head of {', '.join(HEADS)}, found '{name}'.{nearest(name, HEADS)}"
        )
    return HEADS[name]()


class Head(ABC):
    """Head of a finder.

    Attributes:
        name: In `HEADS` and on the command line.
        threshold: That which is used where none could be chosen.
        thresholds: Those that are tried on groups left out; none where it is fixed.
    """

    name: ClassVar[str]
    threshold: ClassVar[float] = 0.5
    thresholds: ClassVar[Sequence[float]] = ()

    @classmethod
    @abstractmethod
    def cell(cls, regions: Sequence[Region]) -> float:
        """Side of a token's cell, in micrometres where the regions state them, else in pixels."""

    @abstractmethod
    def fit(
        self, encoder: TokenEncoder, regions: Sequence[Region], scales: Sequence[float], seed: int
    ) -> None:
        """Learn from outlined regions.

        Args:
            encoder: Of the pictures.
            regions: At least one glomerulus is outlined in them.
            scales: Pixels per working pixel of each region's picture.
            seed: Of whatever is drawn.
        """

    @abstractmethod
    def score(self, encoder: TokenEncoder, picture: NDArray[np.uint8], scale: float) -> Any:
        """Scores of a picture, from which `outline` makes detections.

        Args:
            encoder: Of the picture.
            picture: `[height, width, 3]`.
            scale: Its pixels per working pixel.
        """

    @abstractmethod
    def outline(self, scores: Any, threshold: float) -> list[Detection]:
        """Glomeruli at a threshold, in pixels of the picture."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[np.float64]]:
        """What was learned, as arrays."""

    @abstractmethod
    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take what `state` returned."""


def grid_of(size: tuple[int, int], scale: float, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture brought to its working scale.

    Args:
        size: Width and height of the picture.
        scale: Its pixels per working pixel.
        patch: Side of a patch, in working pixels.
    """
    return max(round(size[1] / scale / patch), 1), max(round(size[0] / scale / patch), 1)


def fit_tokens(
    rows: Sequence[NDArray[np.float32]],
    inside: Sequence[NDArray[np.float32]],
    penalty: float,
    start: Logistic | None = None,
) -> Logistic:
    """Logistic regression of tokens, inside against outside of the outlines.

    Each region weighs the same, and so do inside and outside; tokens of which an outline covers
    between four and six tenths are left out.

    Args:
        rows: Of each region its tokens along principal axes `[n, dim]`.
        inside: Of each token the share that outlines cover `[n]`.
        penalty: As in `fit_weighted`.
        start: A fit to begin with.
    """
    clear = [np.abs(share - 0.5) > 0.1 for share in inside]
    targets = np.concatenate([part[at] > 0.5 for part, at in zip(inside, clear, strict=True)])
    counts = [int(np.count_nonzero(at)) for at in clear]
    weights = np.concatenate([np.full(count, 1.0 / max(count, 1)) for count in counts])
    for side in (True, False):
        total = float(weights[targets == side].sum())
        if total > 0:
            weights[targets == side] /= total
    chosen = np.concatenate([row[at] for row, at in zip(rows, clear, strict=True)])
    return fit_weighted(chosen, targets, weights, penalty, start=start)


def check_sides(inside: Sequence[NDArray[np.float32]]) -> None:
    """Refuse regions whose tokens all lie on one side of the outlines.

    Raises:
        GloVLMError: No token lies inside, or none outside.
    """
    within, without = _sides(inside)
    if not within:
        raise GloVLMError(
            "No token of the regions lies inside of an outline: the outlined glomeruli are smaller "
            "than a token at the scale of the largest. Check that the outlines are in pixels of "
            "the pictures."
        )
    if not without:
        raise GloVLMError(
            "No token of the regions lies outside of the outlines, so that nothing tells a "
            "glomerulus from its surroundings: give regions with tissue around the glomeruli."
        )


def _sides(inside: Sequence[NDArray[np.float32]]) -> tuple[bool, bool]:
    """Whether any token lies clearly inside, and any clearly outside."""
    return any((one > 0.6).any() for one in inside), any((one < 0.4).any() for one in inside)


@dataclass(frozen=True, eq=False)
class Axes:
    """Principal axes of standardised tokens.

    Attributes:
        mean: Of each column `[dim]`.
        axes: `[dim, kept]`, orthogonal, divided by the standard deviation of each column.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]

    @classmethod
    def of(cls, tokens: Sequence[NDArray[np.float32]], most: int) -> "Axes":
        """Axes of tokens `[n, dim]` of several regions, at most so many."""
        rows = np.concatenate(list(tokens))
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        rows -= mean
        products = (rows.T @ rows / len(rows)).astype(np.float64)
        deviation = np.sqrt(products.diagonal()) + 1e-6
        _, vectors = np.linalg.eigh(products / deviation / deviation[:, None])
        return cls(mean, (vectors[:, -most:] / deviation[:, None]).astype(np.float32))

    def turn(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tokens `[n, dim]` along the axes `[n, kept]`."""
        return np.asarray((tokens - self.mean) @ self.axes, np.float32)

    def back(self, fitted: Logistic) -> Logistic:
        """What was fitted along the axes, for tokens as they are."""
        weight = self.axes.astype(np.float64) @ fitted.weight
        return Logistic(weight, fitted.bias - float(self.mean.astype(np.float64) @ weight))


@register
class PlainHead(Head):
    """Plain head: logistic regression on patch tokens at one scale, and connected components.

    The whole picture in one map whose longer side has 48 tokens (672 px of a tower with patches of
    14); a token is inside where more than half of it is; the components of the probability at .7
    that span 16 tokens. It is what better heads are compared with.
    """

    name = "plain"
    threshold = 0.7
    cells: ClassVar[int] = 48
    least: ClassVar[float] = 16.0  # tokens
    penalty: ClassVar[float] = 0.01

    def __init__(self) -> None:
        self.tokens = Logistic(np.zeros(0), 0.0)

    @classmethod
    def cell(cls, regions: Sequence[Region]) -> float:
        sides = [max(region.picture.shape[:2]) * (region.mpp or 1.0) for region in regions]
        return float(np.median(sides)) / cls.cells

    def fit(
        self, encoder: TokenEncoder, regions: Sequence[Region], scales: Sequence[float], seed: int
    ) -> None:
        maps = [
            _encode(encoder, region.picture, scale)
            for region, scale in counted([*zip(regions, scales, strict=True)], "regions")
        ]
        rows = [one.rows for one in maps]
        inside = [
            cover_cells(region.polygons, one.size, one.grid).reshape(-1)
            for region, one in zip(regions, maps, strict=True)
        ]
        axes = Axes.of(rows, rows[0].shape[1])
        check_sides(inside)
        self.tokens = axes.back(fit_tokens(list(map(axes.turn, rows)), inside, self.penalty))

    def score(self, encoder: TokenEncoder, picture: NDArray[np.uint8], scale: float) -> Any:
        encoded = _encode(encoder, picture, scale)
        return self.tokens.probabilities(encoded.tokens).astype(np.float32), encoded.size

    def outline(self, scores: Any, threshold: float) -> list[Detection]:
        probability, size = scores
        return outline_components(probability, threshold, size, least=self.least)

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {"weight": self.tokens.weight, "bias": np.array([self.tokens.bias])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.tokens = Logistic(state["weight"], float(state["bias"][0]))


@dataclass(frozen=True, eq=False)
class Scored:
    """Candidates of a picture with their scores.

    Attributes:
        candidates: Of its score map.
        scores: Of each, 0 ... 1.
        shape: Rows and columns of the score map.
        size: Width and height of the picture.
    """

    candidates: Sequence[Candidate]
    scores: NDArray[np.float64]
    shape: tuple[int, int]
    size: tuple[int, int]


@register
class CandidateHead(Head):
    """Candidate head: two logistic regressions, one of tokens and one of whole candidates.

    The first scores tokens of three depths of the tower: near its start a tower knows texture and
    stain, at its end what a thing is. Parts of its score map at many levels are candidates. The
    second says how likely a candidate is a glomerulus at an intersection over union of one half;
    it learns from candidates that the first, fitted without their group, finds in the support, so
    that it knows how a map looks on patients that were not learned from. Candidates that lie on a
    surer one are dropped.

    The median outlined glomerulus spans 7 to 14 cells, fewer where a region would have more than
    128: the working scale goes in octaves, so that similar supports share their token maps.
    """

    name = "candidates"
    threshold = 0.4
    thresholds = tuple(round(0.2 + 0.05 * step, 2) for step in range(13))
    depths: ClassVar[Sequence[float]] = (0.3, 0.7, LAST)
    span: ClassVar[float] = 10.0  # cells along a median glomerulus
    octave: ClassVar[float] = 2.5  # times a power of two: cells' sides
    most: ClassVar[int] = 128  # cells along a median region: time and memory go with their square
    smooth: ClassVar[float] = 0.7  # cells: standard deviation of the Gaussian over the map
    kept: ClassVar[int] = 256  # principal axes of the tokens
    penalty: ClassVar[float] = 0.01
    second_penalty: ClassVar[float] = 0.1
    parts: ClassVar[int] = 5  # that groups are left out in for the second regression
    overlap: ClassVar[float] = 0.3  # of two detections, as a share of the smaller

    def __init__(self) -> None:
        self.tokens = Logistic(np.zeros(0), 0.0)
        self.second = Logistic(np.zeros(MEASURES), 0.0)
        self.diameter = 1.0  # of the support's median glomerulus, in cells

    @classmethod
    def cell(cls, regions: Sequence[Region]) -> float:
        sizes = [d * (region.mpp or 1.0) for region in regions for d in diameters(region)]
        steps = math.log2(float(np.median(sizes)) / cls.span / cls.octave)
        cell = float(cls.octave * 2.0 ** round(steps))
        sides = [max(region.picture.shape[:2]) * (region.mpp or 1.0) for region in regions]
        while np.median(sides) / cell > cls.most:
            cell *= 2
        return cell

    def fit(
        self, encoder: TokenEncoder, regions: Sequence[Region], scales: Sequence[float], seed: int
    ) -> None:
        maps = [
            _encode(encoder, region.picture, scale, self.depths)
            for region, scale in counted([*zip(regions, scales, strict=True)], "regions")
        ]
        rows = [one.rows for one in maps]
        inside = [
            cover_cells(region.polygons, one.size, one.grid).reshape(-1)
            for region, one in zip(regions, maps, strict=True)
        ]
        self.diameter = float(
            np.median(
                [
                    d / math.sqrt(one.cell[0] * one.cell[1])
                    for region, one in zip(regions, maps, strict=True)
                    for d in diameters(region)
                ]
            )
        )
        axes = Axes.of(rows, self.kept)
        check_sides(inside)
        rows = list(map(axes.turn, rows))
        whole = fit_tokens(rows, inside, self.penalty)
        self.tokens = axes.back(whole)
        measured: list[list[float]] = []
        overlaps: list[float] = []
        for part in _leave_out(regions, self.parts, seed):
            rest = [number for number in range(len(regions)) if number not in part]
            fitted = self.tokens  # where nothing else can be learned from
            if all(_sides([inside[n] for n in rest])):
                chosen = [rows[n] for n in rest], [inside[n] for n in rest]
                fitted = axes.back(fit_tokens(*chosen, self.penalty, whole))
            for number in sorted(part):
                logits = self._map(fitted, maps[number])
                candidates = list_candidates(logits)
                outlined = [
                    cover_cells([one], maps[number].size, logits.shape) > 0.5
                    for one in regions[number].polygons
                ]
                measured += [self._measure(logits, one) for one in candidates]
                overlaps += best_overlaps(candidates, outlined).tolist()
        if measured:
            self.second = self._fit_second(np.array(measured), np.array(overlaps))

    def _fit_second(self, measured: NDArray[np.float64], overlaps: NDArray[np.float64]) -> Logistic:
        """Probability that a candidate is a glomerulus; an overlap near one half is partly one."""
        mean, deviation = measured.mean(0), measured.std(0) + 1e-6
        targets = np.clip((overlaps - 0.3) / 0.4, 0, 1)
        rows = (measured - mean) / deviation
        fitted = fit_weighted(rows, targets, np.ones(len(rows)), self.second_penalty)
        weight = fitted.weight / deviation
        return Logistic(weight, fitted.bias - float(weight @ mean))

    def _map(self, fitted: Logistic, tokens: TokenMap) -> NDArray[np.float64]:
        """Smooth map of logits, `FINER` samples along a cell's side."""
        rows, columns = tokens.grid
        logits = fitted.logits(tokens.tokens)
        fine = resize(logits, (rows * FINER, columns * FINER), order=1, mode="edge")
        smooth: NDArray[np.float64] = ndimage.gaussian_filter(
            fine, self.smooth * FINER, mode="nearest"
        )
        return smooth

    def _measure(self, logits: NDArray[np.float64], candidate: Candidate) -> list[float]:
        return measure_candidate(logits, candidate, self.diameter * FINER)

    def score(self, encoder: TokenEncoder, picture: NDArray[np.uint8], scale: float) -> Any:
        tokens = _encode(encoder, picture, scale, self.depths)
        logits = self._map(self.tokens, tokens)
        candidates = list_candidates(logits)
        measured = np.array([self._measure(logits, one) for one in candidates])
        scores = self.second.probabilities(measured.reshape(len(candidates), MEASURES))
        return Scored(candidates, scores, (logits.shape[0], logits.shape[1]), tokens.size)

    def outline(self, scores: Any, threshold: float) -> list[Detection]:
        cell = scores.size[0] / scores.shape[1], scores.size[1] / scores.shape[0]
        detections = []
        for number in suppress(scores.candidates, scores.scores, threshold, self.overlap):
            one = scores.candidates[number]
            ring = trace(one.mask, (one.column, one.row), cell)
            score = float(scores.scores[number])
            detections.append(Detection(ring, score, is_cut(ring, scores.size)))
        return detections

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {
            "weight": self.tokens.weight,
            "bias": np.array([self.tokens.bias]),
            "second_weight": self.second.weight,
            "second_bias": np.array([self.second.bias]),
            "diameter": np.array([self.diameter]),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.tokens = Logistic(state["weight"], float(state["bias"][0]))
        self.second = Logistic(state["second_weight"], float(state["second_bias"][0]))
        self.diameter = float(state["diameter"][0])


def _encode(
    encoder: TokenEncoder,
    picture: NDArray[np.uint8],
    scale: float,
    depths: Sequence[float] = (LAST,),
) -> TokenMap:
    size = (picture.shape[1], picture.shape[0])
    return encoder.encode(picture, grid_of(size, scale, encoder.patch), depths=depths)


def _leave_out(regions: Sequence[Region], most: int, seed: int) -> Iterable[set[int]]:
    """Regions that are left out together: of whole groups, or single ones where all are of one."""
    names = [region.group for region in regions]
    if len(set(names)) < 2:
        names = [str(number) for number in range(len(regions))]
    order = np.random.default_rng(seed).permutation(sorted(set(names)))
    for start in range(min(most, len(order))):
        chosen = set(order[start::most].tolist())
        yield {number for number, name in enumerate(names) if name in chosen}
