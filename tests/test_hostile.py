"""Hostile YAML files, command lines and tables: a sentence each, no traceback, no hang."""

from pathlib import Path

import pytest
from hostile import Hostile, HostileTables


@pytest.mark.parametrize("block", range(10))
def test_hostile_input_ends_in_a_sentence(block: int, tmp_path: Path) -> None:
    """Twenty of two hundred cases; `make test-long` runs five thousand."""
    hostile = Hostile(tmp_path, {"backbone": Path("mini"), "data": tmp_path / "odd"})
    failures = [hostile.run(number) for number in range(20 * block, 20 * block + 20)]
    assert [failure for failure in failures if failure] == []


def test_hostile_tables_are_read_or_end_in_a_sentence(tmp_path: Path) -> None:
    """Two hundred cases; `make test-long` runs five thousand."""
    hostile = HostileTables(tmp_path)
    failures = [hostile.run(number) for number in range(200)]
    assert [failure for failure in failures if failure] == []
