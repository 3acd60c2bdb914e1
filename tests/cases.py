"""Reference cases of a table: every entry has one, and a new entry is told where to add it."""

from collections.abc import Mapping
from typing import TypeVar

import pytest

Case = TypeVar("Case")


def case_of(cases: Mapping[str, Case], name: str, table: str, where: str, what: str) -> Case:
    """Look up the reference case of an entry; fail with what to add.

    Args:
        cases: Name of the entry -> its case.
        name: The entry.
        table: The table of the package that it stands in.
        where: The file and the variable that hold `cases`.
        what: What a case is.
    """
    if name not in cases:
        pytest.fail(
            f"'{name}' of {table} has no reference case: add {what} to {where}.", pytrace=False
        )
    return cases[name]
