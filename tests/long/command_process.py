"""Commands in real processes that can be killed, and what they leave, compared file by file."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record_commands import Recording, differences, read_file

# Imported once by the server that forks for each command; none of them computes when imported.
PRELOADED = ["hf_glovlm.cli", "hf_glovlm.runs.workflow", "hf_glovlm.runs.study"]
PRELOADED += ["hf_glovlm.slides.classify", "hf_glovlm.slides.mil.training", "peft", "torchvision"]
PRELOADED += ["hf_glovlm.slides.files.crops", "accelerate", "matplotlib.pyplot", "transformers"]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PRELOADED)
LIMIT = 300  # seconds of one command


@dataclass(frozen=True)
class Ended:
    """A command that ended: its exit code (negative, the signal), what it printed, seconds."""

    code: int
    printed: str
    seconds: float


class Running:
    """A command in a process of its own, which begins at once."""

    def __init__(
        self, arguments: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log, self.start = log, time.monotonic()
        given = ([str(part) for part in arguments], str(log), dict(environment or {}))
        self.process = _processes.Process(target=_run, args=given)
        self.process.start()

    def kill_after(self, seconds: float) -> Ended:
        """Kill it, and nothing that it started, unless it has ended before."""
        self.process.join(max(seconds - (time.monotonic() - self.start), 0))
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for its end; one that takes too long fails."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"no end after {LIMIT} seconds: {self.log.read_text()[-2000:]}")
        code = self.process.exitcode
        assert code is not None
        printed = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(code, printed, time.monotonic() - self.start)


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(stream, number)
    os.environ.update(environment)
    from hf_glovlm.cli import main

    sys.exit(main(arguments))


def run(arguments: Sequence[object], log: Path, **environment: str) -> Ended:
    """Run a command to its end."""
    return Running(arguments, log, environment).wait()


# Where and when, not what; the time of a slide's file, which a copy changes.
INCIDENTAL = {"timing", "environment", "seconds", "output_dir", "modified", "created"}


def artefacts(folder: Path, skip: Sequence[str] = ()) -> dict[str, Any]:
    """All that a command left, comparable: paths, times and machines taken out."""
    recording = Recording(folder, str(folder), "/nowhere", {})

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in INCIDENTAL}
        if isinstance(value, list) and type(value) is list:
            return [plain(part) for part in value]
        return value

    return {
        path.relative_to(folder).as_posix(): plain(recording.normalise(read_file(path)))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "manifest.json", *skip)
    }


def assert_same_artefacts(one: Path, other: Path, skip: Sequence[str] = ()) -> None:
    """Fail with every difference of two folders in one line; floats within a rounding."""
    lines = [*differences("", artefacts(one, skip), artefacts(other, skip))]
    assert lines == []


def assert_no_leftovers(folder: Path) -> None:
    """Neither fresh files nor folders in the making."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    assert [n for n in names if n.endswith((".tmp", ".part")) or "unfinished" in n] == []


def assert_spoken(ended: Ended) -> None:
    """A command that did not do its work says why in one line, without a traceback."""
    assert "Traceback" not in ended.printed, ended.printed[-3000:]
    if ended.code == 2:
        assert ended.printed.splitlines()[-1].startswith("error: "), ended.printed[-500:]
