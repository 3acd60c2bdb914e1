"""Heads of a finder: what is learned from outlined regions on the tokens of a frozen tower.

`HEADS` names them. Each scores a picture once, which is the costly part, and outlines glomeruli
from the scores at any threshold.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import GloVLMError, nearest
from ...methods.heads import fit_logistic
from .instances import cover_cells, outline_components
from .regions import Detection, Region
from .tokens import TokenEncoder

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


@register
class PlainHead(Head):
    """Plain head: logistic regression on patch tokens at one scale, and connected components.

    The whole picture in one map, a token inside where more than half of it is; components of the
    probability at .7. It is what better heads are compared with.
    """

    name = "plain"
    threshold = 0.7
    C: ClassVar[float] = 1.0

    def __init__(self) -> None:
        self.weight, self.bias = np.zeros(0), 0.0

    def fit(
        self, encoder: TokenEncoder, regions: Sequence[Region], scales: Sequence[float], seed: int
    ) -> None:
        rows, inside = [], []
        for region, scale in zip(regions, scales, strict=True):
            size = (region.picture.shape[1], region.picture.shape[0])
            grid = grid_of(size, scale, encoder.patch)
            rows.append(encoder.encode(region.picture, grid).tokens.reshape(-1, encoder.width))
            inside.append(cover_cells(region.polygons, size, grid).reshape(-1) > 0.5)
        tokens, known = np.concatenate(rows).astype(np.float64), np.concatenate(inside)
        mean, deviation = tokens.mean(0), tokens.std(0) + 1e-6
        weight, bias, _ = fit_logistic(
            torch.from_numpy((tokens - mean) / deviation),
            torch.from_numpy(known.astype(np.int64)),
            2,
            self.C,
            1000,
        )
        difference = (weight[1] - weight[0]).numpy() / deviation
        self.weight = difference
        self.bias = float(bias[1] - bias[0]) - float(difference @ mean)

    def score(self, encoder: TokenEncoder, picture: NDArray[np.uint8], scale: float) -> Any:
        size = (picture.shape[1], picture.shape[0])
        found = encoder.encode(picture, grid_of(size, scale, encoder.patch))
        logit = found.tokens.astype(np.float64) @ self.weight + self.bias
        return (1 / (1 + np.exp(-logit))).astype(np.float32), size

    def outline(self, scores: Any, threshold: float) -> list[Detection]:
        probability, size = scores
        return outline_components(probability, threshold, size)

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {"weight": self.weight, "bias": np.array([self.bias])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.weight, self.bias = np.asarray(state["weight"]), float(state["bias"][0])
