"""Tissue masks of synthetic slides, and tile grids held against counting pixel by pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slides_made import write_slide

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.tiles import TissueMask, find_tissue, lay_tiles
from hf_glovlm.slides.files.wsi import Slide, open_slide


class _Pixels:
    """A reader of an array: one level, no scale."""

    name, magnification, mpp = "array", None, None

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.levels = [pixels.shape[1::-1]]
        self.downsamples = [1.0]
        self.notes: list[str] = []

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[y : y + height, x : x + width]))

    def close(self) -> None: ...


def slide_of(pixels: Any, mpp: float | None = None) -> Slide:
    return Slide(Path("drawn.tif"), _Pixels(np.asarray(pixels, np.uint8)), mpp)  # type: ignore[arg-type]


def blank(width: int, height: int, mpp: float | None = None) -> Slide:
    return slide_of(np.full((height, width, 3), 245), mpp)


# ---------------------------------------------------------------------------------- grids


@st.composite
def slides_and_masks(draw: st.DrawFn) -> tuple[Slide, TissueMask, np.ndarray]:
    """A slide, a coarse random mask, and the mask spread over the slide's pixels."""
    unit = draw(st.integers(1, 5))
    rows, columns = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    array = rng.random((rows, columns)) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    array[rng.integers(rows), rng.integers(columns)] = True
    slide = blank(columns * unit, rows * unit, mpp=0.5)
    fine = array.repeat(unit, 0).repeat(unit, 1)
    return slide, TissueMask(array, (unit, unit), 0.1), fine


def _covered(slide: Slide, grid: Any) -> np.ndarray:
    """How many tiles lie over each pixel of the slide."""
    count = np.zeros((slide.size[1] + grid.extent, slide.size[0] + grid.extent), int)
    for x, y in grid.coords:
        count[y : y + grid.extent, x : x + grid.extent] += 1
    return count[: slide.size[1], : slide.size[0]]


@given(slides_and_masks(), st.integers(3, 60), st.sampled_from([None, 0.4, 0.5, 1.3]))
def test_tiles_without_overlap_are_disjoint_cover_all_tissue_and_lie_on_the_slide(
    drawn: Any, tile: int, mpp: float | None
) -> None:
    slide, mask, fine = drawn
    grid = lay_tiles(slide, mask, tile_size=tile, mpp=mpp, min_tissue=1e-6)
    covered = _covered(slide, grid)
    assert covered.max() == 1
    assert covered[fine].all()
    assert (grid.coords >= 0).all()
    assert (grid.coords < slide.size).all()
    assert grid.step == grid.extent == max(1, round(tile * (mpp or 0.5) / 0.5))
    assert grid.downsample == grid.extent / tile


@given(slides_and_masks(), st.integers(3, 60), st.sampled_from([0.0, 0.2, 0.7]))
def test_tiles_are_those_with_enough_tissue_counted_pixel_by_pixel(
    drawn: Any, tile: int, least: float
) -> None:
    slide, mask, fine = drawn
    expected = {}
    for y in range(0, slide.size[1], tile):
        for x in range(0, slide.size[0], tile):
            fraction = fine[y : y + tile, x : x + tile].sum() / tile**2
            if fraction >= least:
                expected[x, y] = fraction
    if not expected:
        with pytest.raises(GloVLMError, match="No tile of"):
            lay_tiles(slide, mask, tile_size=tile, min_tissue=least)
        return
    grid = lay_tiles(slide, mask, tile_size=tile, min_tissue=least)
    assert [tuple(c) for c in grid.coords.tolist()] == list(expected)
    assert grid.tissue_fraction == pytest.approx(list(expected.values()), abs=1e-6)


@given(
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
    tile=st.sampled_from([10, 64, 224]),
    width=st.integers(1, 900),
    height=st.integers(1, 900),
)
def test_overlapping_tiles_are_one_step_apart_and_reach_the_edge(
    overlap: float, tile: int, width: int, height: int
) -> None:
    slide = blank(width, height)
    mask = TissueMask(np.ones((1, 1), bool), (width, height), 0.1)
    grid = lay_tiles(slide, mask, tile_size=tile, overlap=overlap, min_tissue=0)
    assert grid.step == max(1, round(tile * (1 - overlap)))
    for axis, side in enumerate((width, height)):
        starts = np.unique(grid.coords[:, axis])
        assert (np.diff(starts) == grid.step).all()
        assert starts[0] == 0
        assert starts[-1] + tile >= side
        assert len(starts) == 1 or starts[-1] - grid.step + tile < side


@pytest.mark.parametrize(
    ("mpp", "extent", "tile_mpp"),
    [(None, 100, 0.25), (0.25, 100, 0.25), (0.5, 200, 0.5), (1, 400, 1)],
)
def test_the_target_scale_decides_how_much_of_the_slide_a_tile_spans(
    mpp: float | None, extent: int, tile_mpp: float
) -> None:
    slide = blank(1000, 1000, mpp=0.25)
    mask = TissueMask(np.ones((10, 10), bool), (100, 100), 0.1)
    grid = lay_tiles(slide, mask, tile_size=100, mpp=mpp)
    assert (grid.extent, grid.mpp, len(grid)) == (extent, tile_mpp, len(grid.coords))


WRONG = [
    ({"tile_size": 0}, "at least 1 pixel"),
    ({"overlap": 0.95}, "overlap from 0 to 0.9"),
    ({"overlap": -0.1}, "overlap from 0 to 0.9"),
    ({"min_tissue": 1.1}, "least tissue from 0 to 1"),
    ({"mpp": -1.0}, "positive number"),
    ({"mpp": 0.5}, "scale of drawn.tif is unknown"),
    ({"tile_size": 1, "min_tissue": 0}, "at most 20,000,000"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_an_impossible_grid_is_refused(settings: dict[str, Any], words: str) -> None:
    slide = blank(10, 10)
    slide.size = (10**5, 10**5)
    with pytest.raises(GloVLMError, match=words):
        lay_tiles(slide, TissueMask(np.ones((1, 1), bool), (10**5, 10**5), 0.1), **settings)


# --------------------------------------------------------------------------------- tissue


def test_synthetic_tissue_is_segmented_and_pen_is_not(tmp_path: Path) -> None:
    pens = [(40, 60, 190), (20, 125, 70), (25, 25, 30)]
    marks = [((30, 30 + 90 * k, 500, 45), ink) for k, ink in enumerate(pens)]
    slide_facts = write_slide(tmp_path / "a.tif", 3000, 2000, lesions=3, marks=marks, seed=3)
    with open_slide(slide_facts["path"]) as slide:
        mask = find_tissue(slide)
        grid = lay_tiles(slide, mask, min_tissue=0.25)
    rows, columns = mask.array.shape
    x = (np.arange(columns) + 0.5) * mask.downsample[0]
    y = ((np.arange(rows) + 0.5) * mask.downsample[1])[:, None]
    truth = np.zeros((rows, columns), bool)
    for cx, cy, rx, ry in slide_facts["blobs"]:
        truth |= ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    for left, top, width, height in (box for box, _ in marks):
        inked = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
        assert not (mask.array & inked & ~truth).any()
        truth &= ~inked
    assert (mask.array & truth).sum() / (mask.array | truth).sum() > 0.95
    result = {tuple(c) for c in grid.coords.tolist()}
    assert {box[:2] for box in slide_facts["lesions"]} <= result


def test_the_overview_stays_small_however_large_the_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = blank(400, 300)
    slide.size = (10**6, 10**6)
    asked: list[int] = []
    picture = Image.new("RGB", (64, 64), "white")
    monkeypatch.setattr(slide, "thumbnail", lambda side: asked.append(side) or picture)
    find_tissue(slide)
    assert asked == [2048]


GLASSES = {"white": (255, 255, 255), "grey": (238, 238, 238), "warm": (240, 234, 226)}
STAINS = {
    "H&E": (214, 140, 180),
    "pale H&E": (240, 208, 224),
    "PAS": (190, 120, 170),
    "silver": (120, 108, 104),
    "trichrome": (132, 168, 216),
}


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("glass", GLASSES)
def test_every_stain_is_segmented_from_every_glass(glass: str, stain: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((400, 500, 3), GLASSES[glass], float)
    pixels[100:300, 150:400] = STAINS[stain]
    pixels = (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255)
    mask = find_tissue(slide_of(pixels)).array
    truth = np.zeros((400, 500), bool)
    truth[100:300, 150:400] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95


@pytest.mark.parametrize("glass", GLASSES)
def test_an_empty_slide_has_no_tissue_and_tiling_says_so(glass: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((400, 500, 3), GLASSES[glass], float)
    slide = slide_of((pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255))
    mask = find_tissue(slide)
    assert not mask.array.any()
    with pytest.raises(GloVLMError, match="empty or out of focus"):
        lay_tiles(slide, mask)


def test_a_slide_that_is_all_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(0)
    pixels = (np.array([205, 120, 170]) + rng.normal(0, 25, (400, 500, 1))).clip(0, 255)
    assert find_tissue(slide_of(np.broadcast_to(pixels, (400, 500, 3)))).fraction > 0.99


def test_specks_go_holes_close_and_lumina_stay() -> None:
    pixels = np.full((500, 500, 3), 245)
    pixels[100:400, 100:400] = (214, 140, 180)
    pixels[20:25, 20:25] = (214, 140, 180)  # dust
    pixels[150:160, 150:160] = 245  # a capillary
    pixels[250:300, 250:300] = 245  # a vessel
    mask = find_tissue(slide_of(pixels)).array
    assert not mask[:60, :60].any()
    assert mask[145:165, 145:165].all()
    assert not mask[260:290, 260:290].any()
