"""Thousands of damaged files of every format: each gives sound outlines, or one sentence."""

from pathlib import Path

import pytest
from hostile_formats import check

pytestmark = pytest.mark.long


@pytest.mark.parametrize("start", range(200, 8200, 1000))
def test_damaged_files_give_sound_outlines_or_one_sentence(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 1000):
        check(tmp_path / "S1.json", seed)
