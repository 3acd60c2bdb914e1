"""Thousands of hostile GeoJSON files: each gives what counts, where it lies, and nothing else."""

from pathlib import Path

import pytest
from hostile_outlines import check

pytestmark = pytest.mark.long


@pytest.mark.parametrize("start", range(200, 6200, 500))
def test_hostile_files_give_what_counts_and_nothing_else(tmp_path: Path, start: int) -> None:
    for seed in range(start, start + 500):
        check(tmp_path / "a.geojson", seed)
