"""Four hundred layouts of TIFF slides, read against an independent reading."""

from pathlib import Path

import pytest
from tiff_layouts import check

FIRST, LAYOUTS, BLOCK = 40, 400, 50  # the first forty run with every test

pytestmark = pytest.mark.long


@pytest.mark.parametrize("block", range(LAYOUTS // BLOCK))
def test_many_layouts_are_read_as_an_independent_reading_says(block: int, tmp_path: Path) -> None:
    numbers = range(FIRST + BLOCK * block, FIRST + BLOCK * (block + 1))
    wrong = [text for number in numbers if (text := check(number, tmp_path))]
    assert not wrong, f"{len(wrong)} of {BLOCK} layouts:\n" + "\n".join(wrong)
