"""Races of real processes over one folder: one writes, the others wait or are refused."""

import csv
from pathlib import Path

import pytest
from command_process import (
    Running,
    assert_no_leftovers,
    assert_same_artefacts,
    assert_spoken,
    run,
)
from commands import WORKS, crops_of

pytestmark = pytest.mark.long
MAY_WAIT = {"crops", "cache"}


@pytest.mark.parametrize("writers", [2, 3])
@pytest.mark.parametrize("name", WORKS)
def test_writers_of_one_folder_leave_what_one_alone_leaves(
    name: str, writers: int, inputs: Path, tmp_path: Path
) -> None:
    work, cache = WORKS[name], {"GLOVLM_CACHE": str(tmp_path / "cache")}
    alone, shared = tmp_path / "alone" / "out", tmp_path / "shared" / "out"
    done = run(work.begin(inputs, alone), tmp_path / "log", GLOVLM_CACHE=str(tmp_path / "own"))
    assert done.code == 0, done.printed
    arguments = work.begin(inputs, shared)
    running = [Running(arguments, tmp_path / f"log{i}", cache) for i in range(writers)]
    ended = [process.wait() for process in running]
    for one in ended:
        assert_spoken(one)
        if one.code == 2:
            assert "Another process writes" in one.printed or "holds a run" in one.printed
    codes = sorted(one.code for one in ended)
    assert codes[0] == 0
    if name in MAY_WAIT:
        assert codes == [0] * writers
    assert set(codes) <= {0, 2}
    assert_same_artefacts(alone, shared, work.skip)
    assert_no_leftovers(shared)


@pytest.mark.parametrize("writers", [2, 3])
def test_crops_of_several_slides_all_arrive(writers: int, inputs: Path, tmp_path: Path) -> None:
    out, slides = tmp_path / "out", [f"s{i}" for i in range(writers)]
    running = [Running(crops_of(inputs, out, slide), tmp_path / f"log-{slide}") for slide in slides]
    for process in running:
        ended = process.wait()
        assert ended.code == 0, ended.printed
    one_after_the_other = tmp_path / "others"
    for slide in slides:
        assert run(crops_of(inputs, one_after_the_other, slide), tmp_path / "log").code == 0
    with (out / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["slide_id"] for row in rows} == set(slides)
    assert all((out / row["file_name"]).is_file() for row in rows)
    for row in rows:
        same = one_after_the_other / row["file_name"]
        assert same.read_bytes() == (out / row["file_name"]).read_bytes()


def test_a_killed_writer_does_not_keep_the_next_one_out(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Long enough to be still there when the second has started; of two values the last one counts.
    command = [*WORKS["train"].begin(inputs, out), "--epochs", "200"]
    first = Running(command, tmp_path / "log1")
    while not (out / "unfinished").is_dir():
        assert first.process.is_alive()
        first.process.join(0.05)
    second = run(command, tmp_path / "log2")
    assert second.code == 2, second.printed
    assert "Another process writes" in second.printed
    assert first.kill_after(0).code == -9
    third = run([*command, "--resume"], tmp_path / "log3")
    assert third.code == 0, third.printed
