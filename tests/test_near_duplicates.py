"""Near-duplicate clusters: the same as the components of all pairs, at sizes that pairs forbid."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_glovlm.data.near_duplicates import link_near_duplicates

Images = tuple[NDArray[np.uint64], NDArray[np.uint8]]


def draw(
    n: int, centres: int, flipped: float, noise: float, like: bool = False, stray: float = 0
) -> Images:
    """Codes and thumbnails around centres: bits are flipped, pixels get noise.

    Args:
        n: Images.
        centres: What they are noisy copies of.
        flipped: Probability that a bit of the code differs from the centre's.
        noise: Standard deviation of the pixels' noise.
        like: Whether all centres have one code.
        stray: Probability of a code that has nothing to do with the centre's.
    """
    rng = np.random.default_rng(n)
    of = rng.integers(centres, size=n)
    codes = rng.integers(2**64, size=centres, dtype=np.uint64)[of * (not like)]
    codes ^= np.packbits(rng.random((n, 64)) < flipped, axis=1).view(np.uint64)[:, 0]
    codes = np.where(rng.random(n) < stray, rng.integers(2**64, size=n, dtype=np.uint64), codes)
    pixels = rng.integers(256, size=(centres, 1)) + rng.normal(0, 20, (centres, 768))
    pixels = pixels[of] + rng.normal(0, noise, (n, 768))
    return codes, pixels.clip(0, 255).astype(np.uint8)


def link_pairs(codes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]) -> list[list[int]]:
    """Clusters by comparing all pairs, and spreading the least row of each over its neighbours."""
    near = np.bitwise_count(codes[:, None] ^ codes) <= 6
    for row in range(len(codes)):
        gaps = np.abs(thumbnails[near[row]].astype(np.float32) - thumbnails[row])
        near[row, near[row]] = gaps.mean(axis=1) <= 10
    least, before = np.arange(len(codes)), None
    while before is None or (least != before).any():
        before, least = least, np.where(near, least, len(codes)).min(axis=1, initial=len(codes))
    clusters = [np.flatnonzero(least == row).tolist() for row in np.unique(least)]
    return [rows for rows in clusters if len(rows) > 1]


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(draw(0, 1, 0, 0), id="none"),
        pytest.param(draw(1, 1, 0, 0), id="one"),
        pytest.param(draw(300, 4, 0, 0), id="equal ones"),
        pytest.param(draw(400, 600, 0.5, 3), id="nothing in common"),
        pytest.param(draw(400, 250, 0.03, 3), id="copies"),
        pytest.param(draw(400, 3, 0.02, 2), id="dense clusters"),
        pytest.param(draw(400, 3, 0.08, 2), id="loose clusters"),
        pytest.param(draw(400, 1, 0.12, 5), id="a cluster with chains"),
        pytest.param(draw(400, 2, 0.03, 2, stray=0.4), id="dense clusters and strays"),
        pytest.param(draw(400, 12, 0.02, 3, like=True), id="clusters of one code"),
        pytest.param(draw(300, 1, 0.01, 8.7), id="thumbnails on the limit"),
        pytest.param(draw(250, 1, 0.01, 12), id="like codes, no like thumbnails"),
    ],
)
def test_clusters_are_the_components_of_all_pairs(images: Images) -> None:
    assert link_near_duplicates(*images) == link_pairs(*images)


def test_limits_are_included() -> None:
    codes = np.array([0, 0b111111, 0b1111111 << 20, 0], dtype=np.uint64)
    thumbnails = np.full((4, 768), 100, dtype=np.uint8)
    thumbnails[1] += 10
    thumbnails[3] += 10
    thumbnails[3, 0] += 1  # from row 0 by more than 10 on average, from row 1 by less
    assert link_near_duplicates(codes, thumbnails) == [[0, 1, 3]]
    assert link_near_duplicates(codes[[0, 3]], thumbnails[[0, 3]]) == []
    assert link_near_duplicates(codes[:2], thumbnails[:2], distance=5) == []
    assert link_near_duplicates(codes[:2], thumbnails[:2], apart=9.99) == []
    assert link_near_duplicates(codes[:3], thumbnails[[0, 0, 0]], distance=14) == [[0, 1, 2]]


def test_no_pairs_are_listed_of_many_equal_or_noisy_blank_tiles() -> None:
    n = 6000
    codes, thumbnails = np.zeros(n, dtype=np.uint64), np.full((n, 768), 240, dtype=np.uint8)
    thumbnails[n // 2 :, :8] += np.random.default_rng(0).integers(9, size=(n // 2, 8)).astype("u1")
    tracemalloc.start()
    clusters = link_near_duplicates(codes, thumbnails)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(rows) for rows in clusters] == [n]
    assert peak < 4 * thumbnails.nbytes
