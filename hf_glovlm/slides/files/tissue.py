"""Tissue mask of a slide: what is not glass, and what of that is pen.

Glass is known first: its colour and its noise are measured on what is calm, bright and neutral, so
how dense the tissue is, or how much of it there is, moves no threshold. Everything denser is
tissue, whatever its stain; pen is known by flatness, shape and place. The mask comes from an
overview of bounded size.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .wsi import Slide

# Densities are optical densities, base 10, relative to glass; levels are grey levels, 0 to 255.
MARGIN = 0.05  # least density of tissue: glass under dust and uneven light stays below
NOISE = 4.0  # standard deviations of glass that tissue is above
MAX_THRESHOLD = 0.1  # whatever the noise: pale eosin lies above
MIN_SPECK = 64  # pixels of the overview; less of connected tissue is dust
GAP_MICRONS = 100.0  # glass nowhere wider, as lumina and urinary space are, belongs to tissue
GAP_PIXELS = 200.0  # the same in pixels of level 0, where the scale is unknown
GAP_SHARE = 0.15  # and at most this part of the slide's longer side
NEUTRAL = 0.15  # glass: the channels differ by at most this part of the brightest
BRIGHT = 0.9  # glass: at least this part of the brightest neutral
INK_DENSITY = 0.5  # of the most absorbed channel under a pen
INK_TEXTURE = 3.0  # levels, standard deviation over 5 x 5 pixels; nuclei and fibres make more
INK_ON_GLASS = 0.5  # least part of a stroke's outline that borders glass
STROKE_LENGTH = 5.0  # lengths over width of a stroke
INK_EVENNESS = 0.25  # mean over greatest distance to the edge: half in a stroke, a third in a dot
MIN_BLOT, MAX_BLOT = 0.001, 0.01  # part of the slide: less is no pen; more, if short, no blot
_EDGE = 6  # pixels of the overview from where a stroke is flat to where it has faded
_PADDING = 8  # levels; a scanner fills what it has not scanned with black


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Tissue mask on the overview of a slide.

    Attributes:
        array: Boolean `[rows, columns]`.
        downsample: Pixels of level 0 per pixel of the mask, `(x, y)`.
        threshold: The optical density relative to glass above which a pixel counts as tissue.
        pen: Boolean, over the same extent as `array`: what was left out as pen.
        strokes: Number of strokes that were.
        noise: Standard deviation of the glass's density.
    """

    array: NDArray[np.bool_]
    downsample: tuple[float, float]
    threshold: float
    pen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((1, 1), bool))
    strokes: int = 0
    noise: float = 0.0

    @property
    def fraction(self) -> float:
        """Tissue fraction of the slide."""
        return float(self.array.mean())

    @property
    def notes(self) -> list[str]:
        """How the mask came about, in sentences: its share, the threshold, and the pen left out."""
        share = (
            f"{self.fraction:.1%} of the slide is tissue: denser than glass by more than "
            f"{self.threshold:.3f} (noise of the glass {self.noise:.3f})"
        )
        return [share, *self.flags]

    @property
    def flags(self) -> list[str]:
        """What a person should look at: the pen that was left out."""
        if not self.strokes:
            return []
        strokes = "stroke" if self.strokes == 1 else "strokes"
        return [
            f"{self.strokes} {strokes} of pen ({self.pen.mean():.1%} of the slide) left out of "
            "the tissue; --no-drop-pen keeps them"
        ]

    def summary(self) -> dict[str, Any]:
        """The mask in numbers, for a slide's results."""
        return {
            "fraction": round(self.fraction, 6),
            "threshold": round(self.threshold, 6),
            "glass_noise": round(self.noise, 6),
            "pen_fraction": round(float(self.pen.mean()), 6),
            "pen_strokes": self.strokes,
        }


def find_tissue(slide: Slide, *, drop_pen: bool = True, max_side: int = 2048) -> TissueMask:
    """Segment tissue from glass and pen on an overview of the slide.

    The density of a pixel is how much darker than glass its most absorbed channel is, plus the lead
    over its least absorbed one: colour separates pale eosin from shadow. Tissue is denser than
    glass by `NOISE` standard deviations of the glass and by `MARGIN` at least. Narrow glass inside
    (lumina, urinary space, clefts) belongs to it by a morphological closing. Shadows of a cover
    slip and folds count as tissue, a scanner's black padding does not.

    Pen is dense (`INK_DENSITY`), flat as no tissue is (`INK_TEXTURE`), mostly on glass, and long
    and of even width, or a small filled blot. Its colour says nothing.

    Args:
        slide: The open slide.
        drop_pen: Whether pen is left out of the tissue.
        max_side: Of the overview, in pixels.

    Returns:
        The mask; empty for an empty slide.
    """
    # Of a small slide a quarter of the size is enough: single nuclei are not specks.
    side = min(max_side, max(512, max(slide.size) // 4))
    overview = np.asarray(slide.thumbnail(side))
    rows, columns = overview.shape[:2]
    downsample = (slide.size[0] / columns, slide.size[1] / rows)
    # What takes much memory is made one after the other: here a slide's encoding has its peak.
    texture = _local_deviation(overview)
    padding = _touching_edge(overview.max(-1) <= _PADDING)
    smooth = ndimage.gaussian_filter(overview, (0.7, 0.7, 0), output=np.float32)
    del overview
    glass, colour = _find_glass(smooth, texture, ~padding)
    light = np.maximum(smooth, 1, out=smooth)
    light /= colour
    darkest, lightest = light.min(-1), light.max(-1)
    del smooth, light
    for part in (darkest, lightest):
        np.negative(np.log10(part, out=part), out=part)
    density = 2 * darkest
    density -= lightest
    del lightest, part
    noise = 1.4826 * float(np.median(np.abs(density[glass]))) if glass.any() else 0.0
    threshold = float(np.clip(NOISE * noise, MARGIN, MAX_THRESHOLD))
    tissue = _without_small((density > threshold) & ~padding, MIN_SPECK)
    pen, strokes = np.zeros_like(tissue), 0
    if drop_pen:
        pen, strokes = _find_pen(tissue, (darkest > INK_DENSITY) & ~padding, texture)
        tissue = _without_small(tissue & ~pen, MIN_SPECK)
    gap = GAP_PIXELS if slide.mpp is None else GAP_MICRONS / slide.mpp
    width = int(min(gap, GAP_SHARE * max(slide.size)) / max(downsample))
    if width > 1 and tissue.any():
        tissue = _close(tissue, width)
    return TissueMask(tissue & ~pen & ~padding, downsample, threshold, pen, strokes, noise)


def _find_glass(
    smooth: NDArray[np.float32], texture: NDArray[np.float32], scanned: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Glass, where it is seen, and its colour `[3]`; white where there is none.

    Glass is neutral, nearly as bright as the brightest neutral, and calm: its texture is at most
    twice that of the calmest tenth of these.
    """
    least, most = smooth.min(-1), smooth.max(-1)
    spread = most - least
    neutral = scanned & (spread <= np.multiply(most, NEUTRAL, out=most))
    del spread, most
    white = np.full(3, 255, np.float32)
    if neutral.mean() < 0.01:  # tissue from edge to edge
        return np.zeros_like(neutral), white
    bright = neutral & (least >= BRIGHT * np.percentile(least[neutral], 99))
    calm = bright & (texture <= 0.5 + 2 * np.percentile(texture[bright], 10))
    if calm.mean() < 0.001:
        return np.zeros_like(neutral), white
    colour = np.array([np.median(smooth[..., k][calm]) for k in range(3)], np.float32)
    return calm, colour


def _find_pen(
    dense_or_pale: NDArray[np.bool_], dense: NDArray[np.bool_], texture: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], int]:
    """Strokes and blots of pen, and how many they are.

    Args:
        dense_or_pale: Whatever is not glass.
        dense: As dense as ink.
        texture: Local deviation, in levels.
    """
    least = math.ceil(MIN_BLOT * dense.size)
    labels, n = ndimage.label(_without_small(dense & (texture <= INK_TEXTURE), least))
    if not n:
        return np.zeros_like(dense), 0
    area = np.bincount(labels.ravel())
    depth = ndimage.distance_transform_cdt(labels > 0, "chessboard")
    radius = ndimage.maximum(depth, labels, np.arange(n + 1))
    mean = np.bincount(labels.ravel(), depth.ravel()) / area
    # Each grown to where its edge has faded, and a rim beyond.
    grown = ndimage.maximum_filter(labels, 2 * _EDGE + 1)
    rim = np.where(grown == 0, ndimage.maximum_filter(labels, 2 * _EDGE + 7), 0).ravel()
    length = np.maximum(np.bincount(rim, minlength=n + 1), 1)
    on_glass = np.bincount(rim, ~dense_or_pale.ravel(), minlength=n + 1) / length
    share = area / dense.size
    is_pen = (on_glass >= INK_ON_GLASS) & (mean >= INK_EVENNESS * radius)
    is_pen &= (area >= STROKE_LENGTH * (2 * radius) ** 2) | (share <= MAX_BLOT)
    is_pen[0] = False
    pen: NDArray[np.bool_] = is_pen[grown] & dense_or_pale
    return pen, int(is_pen.sum())


def _local_deviation(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Standard deviation of the grey level over 5 x 5 pixels."""
    grey = image.mean(-1, dtype=np.float32) - 128  # about the middle, where float32 is exact
    mean = ndimage.uniform_filter(grey, 5)
    variance = ndimage.uniform_filter(grey * grey, 5) - mean * mean
    deviation: NDArray[np.float32] = np.sqrt(np.maximum(variance, 0))
    return deviation


def _close(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Morphological closing by a square: gaps in which it does not fit are filled."""
    # What lies at the edge goes on beyond it, so glass along the edge is no gap.
    padded = np.pad(mask.view(np.uint8), width, mode="edge")
    grown = ndimage.maximum_filter(padded, width)
    origin = 0 if width % 2 else -1  # a square of even side lies the other way on its way back
    closed = ndimage.minimum_filter(grown, width, origin=origin)[width:-width, width:-width]
    return closed.view(np.bool_) | mask


def _touching_edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Connected components that touch the edge of the picture."""
    labels, _ = ndimage.label(mask)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    kept: NDArray[np.bool_] = np.isin(labels, edge[edge > 0])
    return kept


def _without_small(mask: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Remove connected components of fewer pixels."""
    labels, n = ndimage.label(mask)
    large = np.bincount(labels.ravel(), minlength=n + 1) >= least
    large[0] = False
    kept: NDArray[np.bool_] = large[labels]
    return kept
