"""Benchmark of starting: help and import in fresh processes."""

import subprocess
import sys
from collections.abc import Mapping
from functools import partial

from ...errors import GloVLMError
from .timing import Row, as_row, shortest_in_turn

_HELP = "import sys; from hf_glovlm.cli import main; sys.exit(main({}))"
STARTS = {  # name: what, and what Python runs; the bare start goes first
    "python": ("a bare start of Python", "pass"),
    "torch": ("`import torch`", "import torch"),
    "import": ("`import hf_glovlm`", "import hf_glovlm"),
    "help": ("`glovlm --help`", _HELP.format(["--help"])),
    "predict_help": ("`glovlm predict --help`", _HELP.format(["predict", "--help"])),
}


def bench_startup(*, starts: Mapping[str, tuple[str, str]] = STARTS, repeats: int = 7) -> list[Row]:
    """Benchmark of fresh processes, from their start to their end; they take turns.

    Args:
        starts: By name, what is started in words, and the code that Python runs; the first is the
            bare start.
        repeats: Starts of each kind, of which the shortest counts; one more goes before.

    Returns:
        A row a kind; the `ratio` is to the bare start, beside which that of `import torch` stands.

    Raises:
        GloVLMError: A process failed.
    """
    works = [partial(_start, code) for _, code in starts.values()]
    shortest_in_turn(works, 1)  # files are read into the system's cache
    seconds = shortest_in_turn(works, repeats)
    return [
        as_row(
            f"startup.{name}",
            taken,
            "s",
            None if taken is seconds[0] else taken / seconds[0],
            f"{what}, a fresh process"
            + ("" if name == "python" else "; ratio: times a bare start"),
        )
        for (name, (what, _)), taken in zip(starts.items(), seconds, strict=True)
    ]


def _start(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise GloVLMError(f"A process that runs `{code}` failed: {reason}")
