"""Five thousand hostile YAML files and command lines, and as many tables, in one process."""

from pathlib import Path

import pytest
from hostile import Hostile, HostileTables

CASES, BLOCK = 5000, 500

pytestmark = pytest.mark.long


@pytest.mark.parametrize("block", range(CASES // BLOCK))
def test_hostile_input_ends_in_a_sentence(block: int, inputs: Path, tmp_path: Path) -> None:
    good = {
        "model": inputs / "model",
        "data": inputs / "cohort" / "viable",
        "slide": inputs / "slides" / "s0.tiff",
        "outlines": inputs / "s0.geojson",
        "table": inputs / "slides.csv",
    }
    hostile = Hostile(tmp_path, good)
    failures = [hostile.run(number) for number in range(BLOCK * block, BLOCK * (block + 1))]
    shown = [f"{f.number}: {f.arguments}\n{f.reason}" for f in failures if f]
    assert not shown, f"{len(shown)} cases:\n" + "\n".join(shown[:20])


@pytest.mark.parametrize("block", range(CASES // BLOCK))
def test_hostile_tables_are_read_or_end_in_a_sentence(block: int, tmp_path: Path) -> None:
    hostile = HostileTables(tmp_path)
    failures = [hostile.run(number) for number in range(BLOCK * block, BLOCK * (block + 1))]
    shown = [f"{f.number}: {f.arguments}\n{f.reason}" for f in failures if f]
    assert not shown, f"{len(shown)} cases:\n" + "\n".join(shown[:20])
