"""TIFF slides of forty layouts are read as an independent reading says, or refused in words."""

from pathlib import Path

import pytest
from tiff_layouts import check

LAYOUTS, BLOCK = 40, 10


@pytest.mark.parametrize("block", range(LAYOUTS // BLOCK))
def test_pixels_size_and_scale_are_those_of_an_independent_reading(
    block: int, tmp_path: Path
) -> None:
    numbers = range(BLOCK * block, BLOCK * (block + 1))
    wrong = [text for number in numbers if (text := check(number, tmp_path))]
    assert not wrong, f"{len(wrong)} of {BLOCK} layouts:\n" + "\n".join(wrong)
