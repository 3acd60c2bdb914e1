"""Hundreds of rounds through QuPath's formats: what a reader did comes in, and nothing else."""

from pathlib import Path

import pytest
from qupath_made import VERSIONS, check_round_trip

pytestmark = pytest.mark.long


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("start", range(4, 204, 50))
def test_corrected_files_change_what_was_corrected_and_nothing_else(
    start: int, version: str, tmp_path: Path
) -> None:
    for seed in range(start, start + 50):
        check_round_trip(tmp_path / str(seed), seed, version)
