"""Four hundred damaged TIFF slides, read or refused in a sentence."""

from pathlib import Path

import pytest
from damaged_tiffs import check

FIRST, SLIDES, BLOCK = 24, 400, 50  # the first run with every test

pytestmark = pytest.mark.long


@pytest.mark.parametrize("block", range(SLIDES // BLOCK))
def test_many_damaged_tiffs_are_read_or_refused_in_one_sentence(tmp_path: Path, block: int) -> None:
    seeds = range(FIRST + BLOCK * block, FIRST + BLOCK * (block + 1))
    wrong = [said for seed in seeds if (said := check(seed, tmp_path))]
    assert not wrong, "\n".join(wrong)
