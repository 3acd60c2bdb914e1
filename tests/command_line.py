"""What the command `glovlm` says when a test runs it in this process: the fixture `glovlm`."""

from collections.abc import Callable
from typing import NamedTuple


class Completed(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def printed(self) -> str:
        """The output in one line, as if nothing in a table were wrapped."""
        return " ".join(self.out.split())

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Glovlm = Callable[..., Completed]
