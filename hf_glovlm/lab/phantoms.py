"""Synthetic images of glomeruli with a known answer: a test of the software, never a result.

An image is a schematic section of one glomerulus: tubules in interstitium, Bowman's capsule and
space, a tuft of capillary loops in mesangium, nuclei. What a lesion changes is set by its class and
a continuous severity; everything else (stain, its strength and hue, blur, noise, scale, lighting,
the tissue around) is independent of the class. With the same seed, every class at severity 0 is
therefore the very same image.

Lengths are in units of the radius of a normal Bowman's capsule; colours are optical densities.
The class list is that of Glo-VLMs (arXiv 2508.15960). Research use only, not for diagnosis.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..errors import GloVLMError, nearest
from ..files import replacing
from .drawn_captions import write_caption

if TYPE_CHECKING:
    from datasets import Dataset

CLASSES = ("viable", "ischemic", "segmental_sclerosis", "global_sclerosis", "atubular")
STAINS = ("PAS", "H&E", "silver", "trichrome")

Floats = NDArray[np.floating[Any]]  # float32 throughout
Point = tuple[float, float]

# The colour of each material as seen on a white slide, per stain: RGB, hexadecimal, in order.
_MATERIALS = "collagen epithelium cell matrix membrane hyaline red_cell nucleus"
_COLOURS = {
    "PAS": "deb2d0 ce80b2 d09ec8 b0448e 961c68 be2470 e0a8b2 4e3880",
    "H&E": "e6aabe d47694 d696ba de7aa0 c65c8a da4e76 d04a54 48307a",
    "silver": "ac9c92 deb0a4 debeb8 625658 1c181e e28a8c e29678 7c5c80",
    "trichrome": "84a8d8 cc687a cc8aa4 6284ce 425cb6 ce3652 e64234 4a2242",
}


@dataclass(frozen=True)
class Patient:
    """Stain and optics that the images of one patient share, independent of class.

    Attributes:
        patient_id: Name of the patient.
        seed: The seed that drew the patient.
        intensity: Factor on all optical densities (section thickness, staining time), about 1.
        hue: Factors on the optical density of red, green and blue, each about 1.
        counterstain: Factor on the density of nuclei, about 1.
        background: Colour of empty glass, RGB in 0-255.
        scale: Magnification; 1 shows a field 2.94 capsule radii wide.
        blur: Standard deviation of the optical blur in pixels of a 96 px image.
        noise: Standard deviation of the sensor noise in grey levels.
        fibrosis: How wide and dense the interstitium is, 0 to 1.
        cellularity: Factor on the number of nuclei, about 1.
    """

    patient_id: str
    seed: int
    intensity: float
    hue: tuple[float, ...]
    counterstain: float
    background: tuple[float, ...]
    scale: float
    blur: float
    noise: float
    fibrosis: float
    cellularity: float


@dataclass(frozen=True)
class SyntheticImage:
    """Synthetic image of one glomerulus with all that is known about it.

    Attributes:
        image: RGB picture, size x size pixels.
        class_name: One of `CLASSES`.
        severity: 0 (looks viable) to 1 (fully developed).
        stain: One of `STAINS`.
        patient_id: Patient whose stain and optics the image has.
        caption: An English description for contrastive pretraining.
    """

    image: Image.Image
    class_name: str
    severity: float
    stain: str
    patient_id: str
    caption: str


@dataclass(frozen=True)
class _Lesion:
    """Lesion parameters: all that a class may change; the defaults are a viable glomerulus."""

    tuft: float = 1.0  # factor on the tuft's radius
    capsule: float = 1.0  # factor on the capsule's radius
    capsule_wall: float = 1.0  # factor on the capsule's thickness
    openness: float = 1.0  # of the capillary lumens
    wrinkle: float = 0.0  # amplitude of the corrugation of the tuft's edge and walls
    mesangium: float = 0.0  # extra matrix between the loops
    segment: float = 0.0  # radius of the sclerosed segment over the tuft's radius
    sclerosis: float = 0.0  # part of the whole tuft replaced by matrix; above 1 all of it
    fill: float = 0.0  # Bowman's space filled with fibrous matrix
    periglomerular: float = 0.0  # width of the fibrous rim round the capsule
    detached: float = 0.0  # 1 has lost the tubule at the urinary pole
    polar: float = 0.0  # retraction of the tuft towards the vascular pole
    parietal: float = 0.0  # extra cells that line the capsule


def _lesion(class_name: str, severity: float) -> _Lesion:
    s = severity
    if class_name == "viable":  # minor non-specific change, far below any lesion
        return _Lesion(tuft=1 - 0.05 * s, openness=1 - 0.15 * s, mesangium=0.15 * s)
    if class_name == "ischemic":
        return _Lesion(
            tuft=1 - 0.36 * s,
            capsule_wall=1 + 1.6 * s,
            openness=1 - 0.62 * s,
            wrinkle=s,
            mesangium=0.15 * s,
            periglomerular=0.17 * s,
            polar=0.1 * s,
        )
    if class_name == "segmental_sclerosis":
        return _Lesion(
            segment=1.18 * s**0.75, tuft=1 - 0.04 * s, capsule_wall=1 + 0.3 * s, mesangium=0.15 * s
        )
    if class_name == "global_sclerosis":
        return _Lesion(
            tuft=1 - 0.16 * s,
            capsule=1 - 0.14 * s,
            openness=1 - 0.9 * s,
            sclerosis=1.9 * s,
            fill=min(1.0, 1.15 * s),
            capsule_wall=1 + 0.5 * s,
            mesangium=0.3 * s,
        )
    return _Lesion(  # atubular
        tuft=1 - 0.5 * s,
        capsule=1 + 0.15 * s,
        openness=1 - 0.45 * s,
        detached=min(1.0, 1.6 * s),
        polar=0.9 * s,
        parietal=s,
        mesangium=0.1 * s,
    )


# --------------------------------------------------------------------------- random and smooth


def _f32(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


@lru_cache(maxsize=64)
def _spline(n: int, nodes: int) -> Floats:
    """Cubic B-spline basis [n, nodes + 3], scaled so that white nodes give unit variance."""
    position = (np.arange(n) + 0.5) / n * nodes
    cell = np.floor(position).astype(int)
    t = position - cell
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((n, nodes + 3), dtype=np.float32)
    for k, weight in enumerate(weights):
        basis[np.arange(n), cell + k] = weight / 6
    basis /= np.sqrt((basis**2).sum(axis=1).mean())
    return basis


def _field(rng: np.random.Generator, n: int, nodes: int) -> Floats:
    """Smooth noise [n, n] of about unit variance with `nodes` bumps across the image."""
    basis = _spline(n, nodes)
    noise: Floats = basis @ rng.standard_normal((nodes + 3, nodes + 3), dtype=np.float32) @ basis.T
    return noise


@lru_cache(maxsize=4)
def _doubler(n: int) -> Floats:
    """Bilinear enlargement [2 n, n] of samples at cell centres."""
    basis = np.zeros((2 * n, n), dtype=np.float32)
    position = np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1)
    cell = np.minimum(position.astype(int), n - 2)
    basis[np.arange(2 * n), cell] = cell + 1 - position
    basis[np.arange(2 * n), cell + 1] = position - cell
    return basis


@lru_cache(maxsize=8)
def _hexagonal(reach: float, spacing: float) -> Floats:
    rows = np.arange(-reach, reach, spacing * 0.866)
    columns = np.arange(-reach, reach, spacing)
    x = columns[None, :] + np.where(np.arange(len(rows)) % 2, spacing / 2, 0.0)[:, None]
    xy = np.stack([x, np.broadcast_to(rows[:, None], x.shape)], axis=-1).reshape(-1, 2)
    return xy.astype(np.float32)


def _lattice(rng: np.random.Generator, reach: float, spacing: float, jitter: float) -> Floats:
    """Jittered hexagonal lattice [k, 2] over the square of half width `reach`."""
    xy = _hexagonal(reach, spacing)
    return xy + (2 * rng.random(xy.shape, dtype=np.float32) - 1) * np.float32(jitter * spacing)


def _ellipses(
    rng: np.random.Generator, k: int, low: tuple[float, float], high: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Uniform half axes [k, 2] and directions [k]."""
    span = _f32(high) - _f32(low)
    radii = _f32(low) + rng.random((k, 2), dtype=np.float32) * span
    return radii, rng.random(k, dtype=np.float32) * np.float32(math.pi)


# --------------------------------------------------------------------------- rendering


def _grid(size: int) -> int:
    """Side of the rendering grid, even: 1.5 cells a pixel, but enough for the finest structure."""
    return max(144, 2 * math.ceil(0.75 * size))


class _Section:
    """Tissue section: a square on a fine grid, painted from back to front in optical density.

    Attributes:
        rng: Random generator of the rest of the image.
        n: Side of the grid in cells.
        half_width: Half the side in capsule radii; the centre is the origin.
        edge: Side of one cell, the width of an anti-aliased edge.
        x, y: Coordinates, [1, n] and [n, 1].
        density: Optical density so far, [3, n, n].
        population: Chance of a nucleus at a lattice site there, [n, n].
        wobble, coarse, fine, ripple: Smooth noise [n, n] of unit variance, 5 to 40 bumps wide.
        lamella: Swirling bands [n, n], -1 to 1: the grain of fibrous matrix.
    """

    def __init__(
        self, rng: np.random.Generator, n: int, half_width: float, colours: dict[str, Floats]
    ) -> None:
        self.rng = rng
        self.n, self.half_width, self.edge = n, half_width, 2 * half_width / n
        axis = ((np.arange(n, dtype=np.float32) + 0.5) * 2 / n - 1) * np.float32(half_width)
        self.x, self.y = axis[None, :], axis[:, None]
        self.wobble, self.coarse, self.fine, self.ripple = (
            _field(rng, n, bumps) for bumps in (5, 11, 26, 40)
        )
        self.lamella = np.sin(2.2 * self.coarse + 3.0 * self.wobble + 0.8 * self.fine)
        self._colours = colours
        self.density = np.empty((3, n, n), dtype=np.float32)
        self.density[:] = colours["collagen"]
        self.population = np.full((n, n), 0.2, dtype=np.float32)
        self._scratch = np.empty_like(self.density)
        self._margin = n // 8  # stamps may reach this far over the border

    def soft(self, distance: Floats, cells: float = 1.5) -> Floats:
        """1 where a signed distance is negative, 0 beyond, over an edge of so many cells."""
        coverage: Floats = np.clip(0.5 - distance * np.float32(1 / (cells * self.edge)), 0, 1)
        return coverage

    def paint(self, alpha: Floats, material: str, strength: float = 1.0) -> None:
        np.subtract(self._colours[material] * np.float32(strength), self.density, out=self._scratch)
        self._scratch *= alpha
        self.density += self._scratch

    def clear(self, alpha: Floats) -> None:
        self.density *= 1 - alpha

    def populate(self, alpha: Floats, chance: Floats | float) -> None:
        self.population += alpha * (chance - self.population)

    def frame(self, origin: Point, angle: float = 0.0) -> tuple[Floats, Floats]:
        """Coordinates [n, n] along and across a direction, from an origin."""
        dx, dy = self.x - np.float32(origin[0]), self.y - np.float32(origin[1])
        cos, sin = math.cos(angle), math.sin(angle)
        return dx * cos + dy * sin, dy * cos - dx * sin

    def distance(self, point: Point) -> Floats:
        """Distance [n, n] to a point."""
        x, y = self.x - np.float32(point[0]), self.y - np.float32(point[1])
        distance: Floats = np.sqrt(x * x + y * y)
        return distance

    def holds(self, xy: Floats) -> NDArray[np.bool_]:
        """Which of the points [k, 2] lie in the picture."""
        inside: NDArray[np.bool_] = np.abs(xy).max(axis=1) < self.half_width
        return inside

    def at(self, values: Floats, xy: Floats) -> Floats:
        """Values of a map [n, n] at points [k, 2]; points outside take the border's value."""
        cell = np.clip((xy + self.half_width) / self.edge, 0, self.n - 1).astype(np.intp)
        sampled: Floats = values[cell[:, 1], cell[:, 0]]
        return sampled

    def stamp(self, xy: Floats, radii: Floats, angle: Floats) -> tuple[NDArray[np.intp], Floats]:
        """Grid cells under k ellipses and each cell's elliptic radius (1 on the outline).

        Args:
            xy: Centres [k, 2], all inside the picture.
            radii: Half axes [k, 2].
            angle: Directions [k] of the first axis, radians.

        Returns:
            Flat cell indices [k, w * w] for `union`, and elliptic radii of the same shape.
        """
        reach = math.ceil(float(radii.max(initial=self.edge)) * 1.2 / self.edge)
        window = np.arange(-reach, reach + 1)
        corner = np.floor((xy + self.half_width) / self.edge).astype(np.intp)
        offset = (corner + 0.5) * self.edge - self.half_width - xy
        dx = (offset[:, :1] + window * self.edge).astype(np.float32)[:, None, :]
        dy = (offset[:, 1:] + window * self.edge).astype(np.float32)[:, :, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        a, b = radii[:, 0, None, None], radii[:, 1, None, None]
        u = dx * (cos / a) + dy * (sin / a)
        v = dy * (cos / b) - dx * (sin / b)
        width = self.n + 2 * self._margin
        row, column = (corner[:, 1:] + window) * width, corner[:, :1] + window
        cells = row[:, :, None] + column[:, None, :] + self._margin * (width + 1)
        return cells.reshape(len(xy), -1), np.sqrt(u * u + v * v).reshape(len(xy), -1)

    def union(self, cells: NDArray[np.intp], values: Floats) -> Floats:
        """Largest stamped value per grid cell [n, n], 0 where nothing was stamped."""
        width = self.n + 2 * self._margin
        flat = np.zeros(width * width, dtype=np.float32)
        np.maximum.at(flat, cells.ravel(), values.ravel())
        inner = slice(self._margin, -self._margin)
        return flat.reshape(width, width)[inner, inner]


@dataclass(frozen=True)
class _Glomerulus:
    """Geometry of a glomerulus; angles in radians, 0 to the right."""

    centre: Point
    stretch: float  # of the capsule, along tilt
    tilt: float
    capsule: float  # radius
    tuft: float  # radius
    tuft_centre: Point
    shrink: float  # the tuft's radius over what it would be without the lesion
    pole_point: Point  # vascular pole
    stalk: float  # radius of the tuft's root, 0 when the section misses it
    urinary: float  # direction of the urinary pole
    neck: float  # opening of the tubule there, 0 (none, or missed by the section) to 1
    neck_length: float
    segment_point: Point  # on the tuft's edge: where a segmental scar is centred
    hyaline_point: Point | None  # middle of a hyaline deposit in that scar
    distension: float  # of the capillaries
    protein: float  # in Bowman's space


def _lay_out(rng: np.random.Generator, lesion: _Lesion) -> _Glomerulus:
    x, y = (float(v) for v in np.clip(rng.normal(0, 0.05, 2), -0.1, 0.1))
    stretch, tilt = rng.uniform(-0.08, 0.08), rng.uniform(0, math.pi)
    pole, segment = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
    capsule = rng.uniform(0.88, 1.0)
    tuft = capsule * rng.uniform(0.87, 0.94) * lesion.tuft
    capsule *= lesion.capsule
    away = (capsule - tuft) * min(1.0, 0.3 + lesion.polar)
    tuft_x, tuft_y = x + away * math.cos(pole), y + away * math.sin(pole)
    root = capsule + 0.04
    out_x, out_y = tuft * math.cos(segment), tuft * math.sin(segment)
    hyaline = (tuft_x + 0.75 * out_x, tuft_y + 0.75 * out_y)
    return _Glomerulus(
        centre=(x, y),
        stretch=stretch,
        tilt=tilt,
        capsule=capsule,
        tuft=tuft,
        tuft_centre=(tuft_x, tuft_y),
        shrink=lesion.tuft,
        pole_point=(x + root * math.cos(pole), y + root * math.sin(pole)),
        stalk=0.26 if rng.random() < 0.7 else 0.0,
        urinary=pole + math.pi + rng.uniform(-0.8, 0.8),
        neck=(1.0 if rng.random() < 0.6 else 0.0) * (1 - lesion.detached),
        neck_length=rng.uniform(0.3, 0.6),
        segment_point=(tuft_x + out_x, tuft_y + out_y),
        hyaline_point=hyaline if rng.random() < 0.6 else None,
        distension=rng.uniform(0.7, 1.1),
        protein=rng.beta(1, 3),
    )


def _capsule_distance(section: _Section, glomerulus: _Glomerulus) -> Floats:
    u, v = section.frame(glomerulus.centre, glomerulus.tilt)
    u, v = u * (1 + glomerulus.stretch), v * (1 - glomerulus.stretch)
    return np.sqrt(u * u + v * v) - np.float32(glomerulus.capsule) + 0.03 * section.wobble


def _paint_tubules(
    section: _Section, glomerulus: _Glomerulus, to_capsule: Floats, fibrosis: float
) -> None:
    """Interstitium and tubules: rounded Voronoi cells, each with a lumen."""
    rng = section.rng
    seeds = _lattice(rng, 2.2, 0.5, 0.22)
    bore, paleness = rng.random((2, len(seeds)), dtype=np.float32)
    offset = seeds - _f32(glomerulus.centre)
    radius = np.hypot(offset[:, 0], offset[:, 1])
    # A fixed wall, so that the tissue around stays what it is when a lesion moves the capsule.
    wall = np.float32(1.15)
    near = (radius > wall - 0.15) & (np.abs(seeds).max(axis=1) < section.half_width + 0.35)
    push = np.maximum(radius, wall + 0.12) / np.maximum(radius, 0.1)
    seeds = (_f32(glomerulus.centre) + offset * push[:, None])[near]

    # Distances are smooth: half the resolution is enough, in a quarter of the time.
    half = section.n // 2
    x = section.x[:, ::2] + 0.03 * section.coarse[::2, ::2]
    y = section.y[::2] + 0.03 * section.wobble[::2, ::2]
    plane = np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    # |p - s|^2 without |p|^2, which is the same for all seeds s.
    squared = np.concatenate([-2 * seeds, (seeds**2).sum(axis=1, keepdims=True)], axis=1) @ plane
    closest = squared.min(axis=0)
    own = squared == closest
    np.copyto(squared, np.inf, where=own)
    to_seeds = np.stack([closest, squared.min(axis=0)]) + (x * x + y * y).ravel()
    first, second = np.sqrt(np.maximum(to_seeds, 0)).reshape(2, half, half)
    traits = np.stack([0.05 + 0.17 * bore[near], 0.35 * paleness[near]]) @ own.astype(np.float32)
    hole, pale = traits.reshape(2, half, half)
    # Inside a tubule: away from its neighbours and within a largest radius.
    border = np.minimum((second - first) / 2, 0.29 - first)
    twice = _doubler(half)
    border, to_lumen, pale = twice @ np.stack([border, first - hole, pale]) @ twice.T

    to_tubule = np.maximum(0.012 + 0.05 * fibrosis - border, 0.04 - to_capsule)
    tubule = section.soft(to_tubule)
    section.density *= 1 + (0.22 * (0.4 + fibrosis)) * section.lamella
    section.paint(tubule, "epithelium")
    section.clear(tubule * pale)
    section.paint(section.soft(np.abs(to_tubule) - 0.012), "membrane", 0.8)
    lumen = section.soft(to_lumen + 0.02 * section.fine, 2.5) * section.soft(to_tubule + 0.07, 2)
    section.clear(lumen * 0.96)
    section.populate(tubule, 0.36 * section.soft(to_tubule + 0.04) * (1 - lumen))


def _paint_capsule(
    section: _Section, glomerulus: _Glomerulus, lesion: _Lesion, to_capsule: Floats
) -> None:
    """The fibrous rim, the tubule at the urinary pole, Bowman's space and the capsule's wall."""
    coarse, fine = section.coarse, section.fine
    if lesion.periglomerular:
        rim = section.soft(to_capsule - lesion.periglomerular, 4)
        rim *= min(1.0, 12 * lesion.periglomerular)
        bands = np.sin(55 * to_capsule + 1.5 * coarse)
        section.paint(rim * (0.75 + 0.25 * bands), "collagen", 1.7)
    space = section.soft(to_capsule)
    wall = section.soft(np.abs(to_capsule) - 0.017 * lesion.capsule_wall)
    if glomerulus.neck:
        along, across = section.frame(glomerulus.centre, glomerulus.urinary)
        far = along - (1 + glomerulus.neck_length)
        beyond = np.maximum(np.maximum(far, 0.8 - along), 0)
        to_neck = np.sqrt(across**2 + beyond**2) - 0.27 * glomerulus.neck + 0.04 * coarse
        neck = section.soft(to_neck) * min(1.0, 5 * glomerulus.neck)
        mouth = neck * section.soft(to_neck + 0.15, 2)
        section.paint(neck * (1 - space), "epithelium")
        section.clear(mouth * (1 - space))
        wall *= 1 - mouth
    section.clear(space * 0.98)
    protein = np.maximum(glomerulus.protein * (0.25 + 0.3 * coarse + 0.25 * fine), 0)
    section.paint(space * protein, "cell")
    if lesion.fill:
        section.paint(space * (lesion.fill * (0.85 + 0.15 * section.lamella)), "collagen", 1.35)
    section.paint(wall * (1 - 0.35 * lesion.fill), "membrane", 0.95)
    section.populate(space, 0.1 * lesion.fill)


def _paint_tuft(
    section: _Section, glomerulus: _Glomerulus, lesion: _Lesion, to_capsule: Floats
) -> None:
    """Mesangium, capillary loops and scars."""
    rng, shrink = section.rng, glomerulus.shrink
    coarse, fine, ripple = section.coarse, section.fine, section.ripple
    # The outline: lobes, corrugation, the root at the vascular pole, an adhesion.
    to_tuft = section.distance(glomerulus.tuft_centre) - glomerulus.tuft
    to_tuft += shrink * (0.04 * coarse + 0.02 * fine) + (0.03 * lesion.wrinkle) * (ripple + fine)
    to_tuft = np.minimum(to_tuft, section.distance(glomerulus.pole_point) - glomerulus.stalk)
    scar = np.zeros_like(to_tuft)
    if lesion.segment:
        to_segment = section.distance(glomerulus.segment_point) - lesion.segment * glomerulus.tuft
        to_segment += 0.05 * coarse + 0.02 * fine
        to_tuft = np.minimum(to_tuft, to_segment + 0.2 * glomerulus.tuft)
        scar = np.clip(0.5 - 10 * to_segment, 0, 1) * min(1.0, 6 * lesion.segment)
    if lesion.sclerosis:
        spread = 0.5 + 0.5 * np.tanh(0.9 * coarse)
        scar = np.clip((lesion.sclerosis - spread) * 4, 0, 1) * min(1.0, 5 * lesion.sclerosis)
    # No further than the inner face of the capsule's wall.
    to_tuft = np.maximum(to_tuft, to_capsule + 0.017 * lesion.capsule_wall)
    tuft = section.soft(to_tuft)
    scar *= tuft

    # Loops lie in the tuft's own frame, so that they shrink with it.
    loops = _lattice(rng, 1.0, 0.152, 0.3)
    radii, angle = _ellipses(rng, len(loops), (0.055, 0.05), (0.1, 0.07))
    blood, patent = rng.random((2, len(loops)), dtype=np.float32)
    loops = _f32(glomerulus.tuft_centre) + loops * np.float32(shrink)
    kept = (section.at(to_tuft, loops) < -0.03) & section.holds(loops)
    loops, radii, angle, blood, patent = (v[kept] for v in (loops, radii, angle, blood, patent))
    scarred = section.at(scar, loops)
    openness = lesion.openness * glomerulus.distension * (0.75 + 0.5 * patent)
    openness = np.clip(openness, 0, 1.1) * (1 - 0.97 * scarred)
    radii *= np.float32(0.35 + 0.65 * shrink)
    radii[:, 1] *= 0.55 + 0.45 * np.minimum(openness, 1)
    cells, q = section.stamp(loops, radii, angle)
    lumens = np.clip(0.5 - (q - 0.8 * openness[:, None]) * np.float32(0.07 / section.edge), 0, 1)
    capillary = section.union(cells, lumens * (openness > 0.12)[:, None])
    cores = (q < 0.55) & (blood < 0.25)[:, None]
    red = section.union(cells, cores.astype(np.float32))
    ridges = np.maximum(1 - np.abs(q - 0.88) / 0.27, 0) * (1 - 0.45 * scarred[:, None])
    walls = section.union(cells, ridges)

    section.paint(tuft, "cell")
    section.paint(tuft * np.clip(0.4 + lesion.mesangium + 0.25 * fine, 0, 1), "matrix", 0.8)
    capillary *= tuft
    section.clear(capillary * 0.84)
    section.paint(capillary * red * 0.8, "red_cell")
    section.paint(tuft * walls * (0.7 + 0.25 * lesion.wrinkle), "membrane", 0.85)
    outline = tuft * section.soft(np.abs(to_tuft) - 0.014)
    section.paint(outline * (1 - scar), "membrane", 0.7)
    if lesion.segment or lesion.sclerosis:
        section.paint(scar * (0.86 - 0.4 * walls), "matrix", 1.1)
        folds = np.sin(26 * to_tuft + 2.5 * coarse + 1.2 * fine)
        section.density *= 1 + scar * (0.18 * section.lamella + 0.24 * ripple + 0.24 * folds)
    if lesion.segment and glomerulus.hyaline_point:
        hyaline = np.clip(0.5 - (section.distance(glomerulus.hyaline_point) - 0.13) / 0.08, 0, 1)
        section.paint(hyaline * scar * 0.8, "hyaline")
    crowding = 0.42 / max(shrink, 0.5)
    section.populate(tuft, crowding * (1 - 0.45 * scar) * (1 - 0.85 * capillary))


def _paint_nuclei(
    section: _Section, glomerulus: _Glomerulus, lesion: _Lesion, cellularity: float
) -> None:
    rng = section.rng
    sites = _lattice(rng, 1.95, 0.115, 0.4)
    radii, angle = _ellipses(rng, len(sites), (0.042, 0.032), (0.058, 0.045))
    luck = rng.random(len(sites), dtype=np.float32)
    kept = luck < section.at(section.population, sites) * cellularity

    # Flat cells along the capsule; one that has lost its tubule has many, and plump ones.
    k = 44
    around = (np.arange(k) + rng.uniform(-0.4, 0.4, k)) * (2 * math.pi / k)
    lined = rng.random(k) < 0.32 + 0.5 * lesion.parietal
    u = np.cos(around) / (1 + glomerulus.stretch)
    v = np.sin(around) / (1 - glomerulus.stretch)
    cos, sin = math.cos(glomerulus.tilt), math.sin(glomerulus.tilt)
    ring = np.stack([u * cos - v * sin, u * sin + v * cos], axis=1).astype(np.float32)
    on_wall = _f32(glomerulus.centre) + ring * np.float32(glomerulus.capsule - 0.035)
    on_wall -= 0.03 * section.at(section.wobble, on_wall)[:, None] * ring
    flat = np.tile(_f32([0.062, 0.024 + 0.014 * lesion.parietal]), (k, 1))
    tangent = (around + glomerulus.tilt + math.pi / 2).astype(np.float32)

    sites = np.concatenate([sites[kept], on_wall[lined]])
    radii = np.concatenate([radii[kept], flat[lined]])
    angle = np.concatenate([angle[kept], tangent[lined]])
    shown = section.holds(sites)
    cells, q = section.stamp(sites[shown], radii[shown], angle[shown])
    sharpness = np.float32(0.045 / section.edge)
    nuclei = section.union(cells, np.clip(0.5 - (q - 0.95) * sharpness, 0, 1))
    section.paint(nuclei * 0.92, "nucleus")


def _draw(
    rng: np.random.Generator, lesion: _Lesion, patient: Patient, stain: str, size: int
) -> Floats:
    """Optical density [3, n, n], n = `_grid(size)`.

    Every random draw is made whatever the lesion and the size, in the same order: a lesion moves
    edges and thresholds, never the random stream.
    """
    hue = _f32(patient.hue)[:, None, None]
    colours = {
        name: -np.log(_f32(list(bytes.fromhex(rgb))) / 255)[:, None, None] * hue
        for name, rgb in zip(_MATERIALS.split(), _COLOURS[stain].split(), strict=True)
    }
    colours["nucleus"] = colours["nucleus"] * np.float32(patient.counterstain)
    zoom = patient.scale * math.exp(rng.uniform(-0.06, 0.06))
    roughness = min(0.5, math.exp(rng.normal(-1.9, 0.8)))
    thickness = patient.intensity * math.exp(rng.normal(0, 0.06))
    section = _Section(rng, _grid(size), 1.47 / zoom, colours)
    grain = _field(rng, section.n, 84)
    glomerulus = _lay_out(rng, lesion)
    to_capsule = _capsule_distance(section, glomerulus)
    _paint_tubules(section, glomerulus, to_capsule, patient.fibrosis)
    _paint_capsule(section, glomerulus, lesion, to_capsule)
    _paint_tuft(section, glomerulus, lesion, to_capsule)
    _paint_nuclei(section, glomerulus, lesion, patient.cellularity)
    texture = np.maximum(1 + roughness * grain + 0.06 * section.coarse, 0)
    return section.density * (texture * np.float32(thickness))


@lru_cache(maxsize=4)
def _pixel_distance(size: int) -> Floats:
    """Distance [size, n] between pixel centres and grid cells, in pixels."""
    n = _grid(size)
    pixels, cells = np.arange(size) + 0.5, (np.arange(n) + 0.5) * size / n
    return (pixels[:, None] - cells[None, :]).astype(np.float32)


def _photograph(
    rng: np.random.Generator, density: Floats, patient: Patient, size: int
) -> Image.Image:
    """Image formation: light through the section, lens blur and pixel area, sensor noise."""
    sigma = patient.blur * float(np.exp(rng.normal(0, 0.35))) * size / 96
    noise = patient.noise * float(np.exp(rng.normal(0, 0.4)))
    glass = _f32(patient.background) + np.float32(rng.normal(0, 1.5))
    # The pixel's area adds 1/12 px^2 of variance to the lens's blur.
    kernel = np.exp(-(_pixel_distance(size) ** 2) / (2 * (sigma**2 + 1 / 12)))
    kernel[kernel < 1e-6] = 0  # numbers near underflow would slow the product down tenfold
    kernel /= kernel.sum(axis=1, keepdims=True)
    light = kernel @ np.exp(-density) @ kernel.T
    light *= glass[:, None, None]
    light += np.float32(noise) * rng.standard_normal(light.shape, dtype=np.float32)
    pixels = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


# --------------------------------------------------------------------------- public


def _check_name(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise GloVLMError(
            f"Expected a {kind} among {', '.join(known)}, found {name!r}.{nearest(name, known)}"
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise GloVLMError(f"Expected a seed of 0 or more, found {seed}; pass a whole number >= 0.")


def draw_patient(seed: int, patient_id: str | None = None) -> Patient:
    """Sample the stain, optics and tissue background of one patient.

    Args:
        seed: 0 or more; the same seed gives the same patient.
        patient_id: Name; by default made from the seed.

    Returns:
        The patient; no class is involved.

    Raises:
        GloVLMError: The seed is negative.
    """
    _check_seed(seed)
    rng = _generator(seed, 0)
    hue = np.exp(rng.normal(0, 0.07, 3))
    background = np.minimum(rng.uniform(228, 252) + rng.normal(0, 2.5, 3), 254)
    return Patient(
        patient_id=patient_id if patient_id is not None else f"patient_{seed}",
        seed=seed,
        intensity=float(np.exp(rng.normal(0, 0.17))),
        hue=tuple(hue.tolist()),
        counterstain=float(np.exp(rng.normal(0, 0.15))),
        background=tuple(background.tolist()),
        scale=float(np.exp(rng.uniform(-0.15, 0.14))),
        blur=float(np.clip(np.exp(rng.normal(-0.9, 0.5)), 0.12, 1.1)),
        noise=float(np.clip(np.exp(rng.normal(0.8, 0.9)), 0.3, 9.0)),
        fibrosis=float(rng.beta(1.5, 2.5)),
        cellularity=float(np.exp(rng.normal(0, 0.15))),
    )


def render_glomerulus(
    class_name: str,
    *,
    seed: int,
    severity: float | None = None,
    stain: str | None = None,
    size: int = 96,
    patient: Patient | None = None,
) -> SyntheticImage:
    """Render a synthetic image of one glomerulus.

    Args:
        class_name: One of `CLASSES`.
        seed: 0 or more; the same arguments give the same pixels in every process.
        severity: 0 (indistinguishable from viable) to 1; drawn when None. For the class viable it
            is the amount of minor non-specific change.
        stain: One of `STAINS`; drawn when None.
        size: Side of the image in pixels, 16 to 1024. It shows the same at every size.
        patient: Stain and optics to use; a patient of its own, drawn from `seed`, when None.

    Returns:
        The image with its class, severity, stain, patient and a caption.

    Raises:
        GloVLMError: An unknown class or stain, or a severity, size or seed out of range.
    """
    _check_name("class", class_name, CLASSES)
    _check_seed(seed)
    if not 16 <= size <= 1024:
        raise GloVLMError(f"Expected a size of 16 to 1024 pixels, found {size}; 96 is usual.")
    rng = _generator(seed, 1)
    drawn_stain, drawn_severity = STAINS[int(rng.integers(len(STAINS)))], rng.uniform(0.3, 1.0)
    stain = drawn_stain if stain is None else stain
    _check_name("stain", stain, STAINS)
    severity = float(drawn_severity if severity is None else severity)
    if not 0.0 <= severity <= 1.0:
        raise GloVLMError(f"Expected a severity of 0 to 1, found {severity}; 0 looks viable.")
    patient = draw_patient(seed) if patient is None else patient
    density = _draw(_generator(seed, 2), _lesion(class_name, severity), patient, stain, size)
    image = _photograph(_generator(seed, 3), density, patient, size)
    caption = write_caption(_generator(seed, 4), class_name, severity, stain)
    return SyntheticImage(image, class_name, severity, stain, patient.patient_id, caption)


def render_cohort(
    n_patients: int,
    per_patient: int,
    *,
    seed: int,
    size: int = 96,
    classes: Sequence[str] = CLASSES,
) -> list[SyntheticImage]:
    """Render synthetic images of several glomeruli of each of several patients.

    Classes take turns through the cohort, so their counts differ by at most one, and every patient
    with at least `len(classes)` pictures has every class. Stains are drawn per picture.

    Args:
        n_patients: 1 or more.
        per_patient: Pictures per patient, 1 or more.
        seed: 0 or more.
        size: Side of the pictures in pixels.
        classes: The classes to draw, in the order in which they take turns.

    Returns:
        `n_patients * per_patient` synthetic images, patient by patient.

    Raises:
        GloVLMError: A count below 1, an unknown or repeated class, no class at all.
    """
    if n_patients < 1 or per_patient < 1:
        raise GloVLMError(
            f"Expected at least 1 patient and 1 picture each, found {n_patients} and {per_patient}."
        )
    if not classes or len(set(classes)) != len(classes):
        raise GloVLMError(f"Expected one or more different classes, found {list(classes)}.")
    _check_seed(seed)
    images = []
    for i in range(n_patients):
        state = np.random.SeedSequence(seed, spawn_key=(5, i)).generate_state(per_patient + 1)
        patient = draw_patient(int(state[0]), f"P{i + 1:03d}")
        for j, image_seed in enumerate(state[1:].tolist()):
            name = classes[(i * per_patient + j) % len(classes)]
            images.append(render_glomerulus(name, seed=image_seed, size=size, patient=patient))
    return images


def render_dataset(class_names: Sequence[str], patients: int = 20, each: int = 10) -> "Dataset":
    """Data set of synthetic images, to try a model of these classes on.

    Args:
        class_names: Classes of the model. If all of them can be rendered, only they are, with
            labels; otherwise every class is, without.
        patients: Synthetic patients.
        each: Images of each.

    Returns:
        Rows with `image`, and with `label` where the classes are known.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    images = render_cohort(patients, each, seed=4242)
    columns: dict[str, list[Any]] = {}
    features: dict[str, Any] = {"image": Image()}
    if set(class_names) <= set(CLASSES):
        images = [item for item in images if item.class_name in class_names]
        columns["label"] = [item.class_name for item in images]
        features["label"] = ClassLabel(names=list(class_names))
    columns["image"] = [item.image for item in images]
    return Dataset.from_dict(columns, features=Features(features))


def write_cohort(
    folder: str | Path, n_patients: int, per_patient: int, *, seed: int, size: int = 96
) -> Path:
    """Write a synthetic cohort as a folder: `<class>/<patient>_<number>.png` and `metadata.csv`.

    The table has the columns file_name, label, patient_id, stain, severity and caption. The folder
    appears whole or not at all.

    Args:
        folder: Where to write; it must not exist, or be empty.
        n_patients: 1 or more.
        per_patient: Pictures per patient, 1 or more.
        seed: 0 or more.
        size: Side of the pictures in pixels.

    Returns:
        The folder.

    Raises:
        GloVLMError: The folder already holds something, or an argument is out of range.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GloVLMError(
            f"Expected a new or empty folder for the synthetic images, found {target} in use; "
            "choose another folder or empty this one."
        )
    images = render_cohort(n_patients, per_patient, seed=seed, size=size)
    with replacing(target) as partial:
        rows = []
        for i, it in enumerate(images):
            name = f"{it.class_name}/{it.patient_id}_{i % per_patient + 1:03d}.png"
            (partial / it.class_name).mkdir(parents=True, exist_ok=True)
            it.image.save(partial / name)
            severity = f"{it.severity:.4f}"
            rows.append((name, it.class_name, it.patient_id, it.stain, severity, it.caption))
        with (partial / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("file_name", "label", "patient_id", "stain", "severity", "caption"))
            writer.writerows(rows)
        (partial / "DRAWINGS").write_text(
            "Synthetic images, not photographs of any patient. Results on them test software.\n"
        )
    return target
