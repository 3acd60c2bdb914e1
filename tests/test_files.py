"""Atomic writes: an old file stays until the new one is complete."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hf_glovlm.files import move_over, replacing, write_csv, write_json, write_table, write_text

WRITERS: list[tuple[Callable[[Path, Any], None], Any, str]] = [
    (write_text, "Grüße\r\n", "Grüße\r\n"),
    (write_json, {"a": [1]}, '{\n "a": [\n  1\n ]\n}\n'),
    (lambda path, rows: write_csv(path, ["a", "b"], rows), [[1, None]], "a,b\n1,\n"),
]
UNWRITABLE = ["\ud800", {"a": object()}, [["\ud800", 1]]]  # the error comes while writing
KILLED = """
import os, signal, sys
from pathlib import Path
from hf_glovlm.files import replacing

with replacing(Path(sys.argv[1])) as fresh:
    fresh.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("write", "value", "content"), WRITERS)
def test_a_file_is_replaced_and_its_folder_made(
    tmp_path: Path, write: Callable[[Path, Any], None], value: Any, content: str
) -> None:
    path = tmp_path / "new" / "a.txt"
    for _ in range(2):
        write(path, value)
        assert path.read_bytes() == content.encode()
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize(
    ("write", "value"), [(row[0], bad) for row, bad in zip(WRITERS, UNWRITABLE, strict=True)]
)
def test_a_failing_writer_leaves_the_old_file(
    tmp_path: Path, write: Callable[[Path, Any], None], value: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises((UnicodeEncodeError, TypeError)):
        write(path, value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, {"x": [1, 2], "y": ["a", None]}, {b"key": b"value"})
    with pytest.raises(ValueError, match="length"):
        write_table(path, {"x": [1, 2], "y": ["a"]})
    table = pq.read_table(path)
    assert table.to_pydict() == {"x": [1, 2], "y": ["a", None]}
    assert table.schema.metadata[b"key"] == b"value"
    assert names(tmp_path) == ["t.parquet"]


def _half(path: Path, error: type[BaseException], folder: bool) -> None:
    with replacing(path) as fresh:
        if folder:
            fresh.mkdir()
        (fresh / "part" if folder else fresh).write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_half_written_file_or_folder_goes(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")
    for name in "ab":
        with pytest.raises(error):
            _half(tmp_path / name, error, folder=name == "b")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what the killed one left is in nobody's way
    assert path.read_text() == "new"


def test_two_writers_do_not_share_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_no_full_one_but_is_moved_over_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    with pytest.raises(OSError, match="not empty"), replacing(old) as fresh:
        fresh.mkdir()
    assert names(old) == ["old"]
    assert names(tmp_path) == ["new", "old"]
    move_over(new, old)
    assert names(old) == ["new"]
    assert names(tmp_path) == ["old"]


def test_the_fresh_file_lies_beside_the_target_and_is_hidden(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.h5") as fresh:
        assert fresh.parent == tmp_path
        assert fresh.name.startswith(".")
        assert not fresh.exists()
        fresh.touch()
