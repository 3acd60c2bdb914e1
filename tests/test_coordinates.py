"""Origin of outlines: level 0, the scanned part's corner, or a given place."""

import numpy as np
import pytest

from hf_glovlm import GloVLMError
from hf_glovlm.slides.files.coordinates import Origin, parse_origin


@pytest.mark.parametrize(
    ("text", "bounds", "expected"),
    [
        ("auto", None, Origin()),
        ("auto", (700, 40), Origin(700, 40, "bounds")),
        ("slide", (700, 40), Origin()),
        ("Bounds", (700, 40), Origin(700, 40, "bounds")),
        ("12.5,-3", (700, 40), Origin(12.5, -3, "given")),
        (" 12 ; 7 ", None, Origin(12, 7, "given")),
    ],
)
def test_an_origin_is_that_of_qupath_or_the_given_one(text, bounds, expected) -> None:
    assert parse_origin(text, bounds) == expected


@pytest.mark.parametrize("text", ["", "corner", "1", "1,2,3", "nan,0", "0,inf"])
def test_an_origin_that_means_nothing_is_refused_with_what_would(text) -> None:
    with pytest.raises(GloVLMError, match="Expected an origin of auto, slide, bounds, X,Y"):
        parse_origin(text, None)


def test_bounds_of_a_slide_that_states_none_are_refused() -> None:
    with pytest.raises(GloVLMError, match="states no bounds"):
        parse_origin("bounds", None)


def test_both_ways_are_inverse() -> None:
    points = np.random.default_rng(0).normal(size=(5, 7, 2)) * 1e5
    origin = Origin(1024, -77.5)
    assert np.allclose(origin.from_level0(origin.to_level0(points)), points, rtol=0, atol=1e-9)
    assert origin.to_level0(np.array([0, 0])).tolist() == [1024, -77.5]
