"""Kills at random moments: what the next command leaves equals an unbroken run, file by file."""

import random
import shutil
from pathlib import Path

import pytest
from command_process import (
    Running,
    assert_no_leftovers,
    assert_same_artefacts,
    assert_spoken,
    run,
)
from commands import WORKS

KILLS = 10

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", WORKS)
def test_ten_kills_leave_what_the_next_command_takes(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    work, rng = WORKS[name], random.Random(f"kill {name}")
    log, cache = tmp_path / "log", {"GLOVLM_CACHE": str(tmp_path / "cache")}
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    done = run(work.begin(inputs, whole), log, **cache)
    assert done.code == 0, done.printed
    stopped = 0
    for _ in range(KILLS):
        shutil.rmtree(killed.parent, ignore_errors=True)
        if name == "cache":
            shutil.rmtree(tmp_path / "cache")
        ended = Running(work.begin(inputs, killed), log, cache).kill_after(
            rng.uniform(0.1, 1.1) * done.seconds
        )
        stopped += ended.code == -9
        again = run([*work.begin(inputs, killed), *work.go_on], log, **cache)
        assert_spoken(again)
        assert again.code == 0, again.printed
        assert_same_artefacts(whole, killed, work.skip)
        assert_no_leftovers(killed)
    assert stopped >= 3  # else nothing was shown


def test_kills_one_after_the_other_still_come_to_an_end(inputs: Path, tmp_path: Path) -> None:
    """A run that is killed again and again goes on each time."""
    rng, log = random.Random("again"), tmp_path / "log"
    for name in ("train", "slide", "mil", "study", "crops"):
        work = WORKS[name]
        whole, killed = tmp_path / name / "whole", tmp_path / name / "killed"
        done = run(work.begin(inputs, whole), log)
        for k in range(5):
            arguments = [*work.begin(inputs, killed), *(work.go_on if k else ())]
            Running(arguments, log).kill_after(rng.uniform(0.2, 0.9) * done.seconds)
        again = run([*work.begin(inputs, killed), *work.go_on], log)
        assert again.code == 0, again.printed
        assert_same_artefacts(whole, killed, work.skip)
        assert_no_leftovers(killed)
