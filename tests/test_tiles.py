"""Tile grids held against counting pixel by pixel."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slides_made import slide_of

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.tiles import lay_tiles
from hf_glovlm.slides.files.tissue import TissueMask
from hf_glovlm.slides.files.wsi import Slide


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
