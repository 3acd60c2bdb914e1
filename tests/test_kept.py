"""What is kept: one writer a folder, a move that a kill cannot spoil, manifests, disk errors."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_glovlm import files
from hf_glovlm.errors import GloVLMError, WriteError

HOLD = """
import sys, time
from pathlib import Path
from hf_glovlm.files import one_writer

with one_writer(Path(sys.argv[1])):
    (Path(sys.argv[1]) / ".half.txt.0123456789ab.tmp").write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""
FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import replacing, write_json, write_table

folder = Path(sys.argv[1])
sys.dont_write_bytecode = True  # half a file of it would stay
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def tensors():
    with replacing(folder / "t.safetensors") as fresh:
        save_file({"a": np.zeros(5000)}, fresh)


for write in (
    lambda: write_json(folder / "a.json", ["x" * 5000]),
    lambda: write_table(folder / "a.parquet", {"x": np.random.default_rng(0).random(5000)}),
    tensors,
):
    try:
        write()
    except GloVLMError as error:
        print(error)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            yield child
        finally:
            child.kill()


def test_a_folder_has_one_writer_and_a_killed_one_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with holding(folder) as child:
        sentence = rf"Another process writes to .*out' \(process {child.pid}"
        with pytest.raises(GloVLMError, match=sentence), files.one_writer(folder):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    with files.one_writer(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]  # its half file is gone


def test_a_writer_that_may_wait_gets_its_turn(tmp_path: Path) -> None:
    with holding(tmp_path) as child:
        start = time.monotonic()
        with pytest.raises(GloVLMError, match="Another"), files.one_writer(tmp_path, wait=0.3):
            pass
        assert time.monotonic() - start >= 0.3
        killer = threading.Timer(0.5, child.kill)
        killer.start()
        with files.one_writer(tmp_path, wait=20):
            assert child.wait(5) == -signal.SIGKILL


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with files.one_writer(tmp_path / "a" / "b"):
        assert files.is_empty(tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists()
    with files.one_writer(tmp_path / "c"):
        (tmp_path / "c" / "kept").touch()
    assert not files.is_empty(tmp_path / "c")


@pytest.mark.parametrize(
    "place",
    ["/proc/nothing/a.txt", "/dev/null/a.txt", "x" * 300, "a" + "/b" * 3000],
    ids=["no-disk", "below-a-device", "long-name", "long-path"],
)
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, place: str) -> None:
    with pytest.raises(WriteError, match=r"cannot be written \(.+\): free space there, or name"):
        files.write_text(tmp_path / place, "text")
    with pytest.raises(WriteError, match="cannot be written"), files.one_writer(tmp_path / place):
        pass


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert [line.split("cannot")[0][-15:].strip(" '").rsplit("/")[-1] for line in lines] == [
        "a.json",
        "a.parquet",
        "t.safetensors",
    ]
    assert all("cannot be written" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_inside_a_writer_is_not_called_unwritable(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        files.replacing(tmp_path / "out" / "a.txt") as fresh,
    ):
        fresh.write_text(Path("/nowhere/input.txt").read_text())


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("stopped", ["before", "after"])
def test_a_move_is_finished_wherever_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, stopped: str
) -> None:
    """Stopping at each removal and each rename; rmtree of a folder is stopped half-way, too."""
    output = tmp_path / "run"
    work = output / "unfinished"
    for folder, text in ((output, "old"), (work, "new")):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "a").write_text(text)
        (folder / "model" / "b").write_text(text)
        (folder / "results.json").write_text(text)
    (output / "adapter").mkdir()
    (output / "adapter" / "a").write_text("old")
    names = ("model", "adapter", "log", "results.json")
    calls = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1 and stopped == "before":
                raise KeyboardInterrupt
            value = real(*args, **kwargs)
            if calls == step + 1:
                raise KeyboardInterrupt
            return value

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            files.put_in_place(work, output, names)
            finished = True
        except KeyboardInterrupt:
            finished = False
    begun = (work / files.JOURNAL).is_file()
    files.finish_move(work, output)
    expected = "new" if begun or finished or not (work / "results.json").exists() else "old"
    assert (output / "results.json").read_text() == expected
    assert {p.name: p.read_text() for p in (output / "model").iterdir()} == dict.fromkeys(
        "ab", expected
    )
    assert (output / "adapter").exists() == (expected == "old")


def test_a_manifest_names_what_is_damaged_and_what_has_changed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_bytes(b"0123")
    (tmp_path / "log.txt").write_text("x")
    files.write_manifest(tmp_path, "adaptation", {"labels": "a1", "settings": {"lr": 0.1}})
    manifest = files.read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.kind == "adaptation"
    assert files.damaged_files(tmp_path, manifest) == []
    (tmp_path / "model" / "a.bin").write_bytes(b"0124")
    (tmp_path / "log.txt").unlink()
    assert files.damaged_files(tmp_path, manifest) == ["log.txt", "model/a.bin"]
    assert files.damaged_files(tmp_path, manifest, ["model/"]) == ["model/a.bin"]
    now = {"labels": "b2", "settings": {"lr": 0.1}, "seed": 1}
    assert files.changed_inputs(manifest.made_from, now) == [
        "labels was 'a1' and is 'b2'",
        "seed was None and is 1",
    ]
    assert files.changed_inputs({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert files.read_manifest(tmp_path / "model") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": 1}', '{"kind": "a", "files": {}}', "\0"])
def test_a_damaged_manifest_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(GloVLMError, match=r"manifest\.json"):
        files.read_manifest(tmp_path)


def test_other_bytes_of_the_same_size_and_time_are_another_file(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(bytes(5000))
    known = files.describe_file(path)
    assert files.is_same_file(path, known)
    os.utime(path, ns=(1, 1))
    assert files.is_same_file(path, known)  # the time alone is no reason
    content = bytearray(5000)
    content[2345] = 1
    path.write_bytes(content)
    os.utime(path, ns=(known["modified"], known["modified"]))
    assert not files.is_same_file(path, known)


def test_a_very_large_file_is_known_by_size_time_and_samples_or_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WHOLE", 1000)
    monkeypatch.setattr(files, "_BLOCK", 16)
    monkeypatch.setattr(files, "_BLOCKS", 4)
    path = tmp_path / "slide.tif"
    path.write_bytes(bytes(5000))
    known = files.describe_file(path)

    def change(place: int, touch: bool) -> bool:
        content = bytearray(5000)
        content[place] = 1
        path.write_bytes(content)
        stamp = known["modified"] + touch
        os.utime(path, ns=(stamp, stamp))
        return files.is_same_file(path, known)

    assert [change(place, touch=False) for place in (0, 4999)] == [False, False]
    assert not change(500, touch=True)
    path.write_bytes(bytes(5000))
    os.utime(path, ns=(1, 1))
    assert files.is_same_file(path, known)


def test_digests_are_of_content_alone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"same")
    assert files.digest_file(tmp_path / "a") == files.digest_file(tmp_path / "b")
    assert files.digest_value({"a": 1, "b": 2}) == files.digest_value({"b": 2, "a": 1})
    assert files.digest_value({"a": 1}) != files.digest_value({"a": 2})
