"""Feature cache beside other processes and on full disks: private, swept, never fatal."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_process import inherited, run_forks

from hf_glovlm.inference import FeatureCache, cache

FULL = """
import logging, resource, sys
sys.dont_write_bytecode = True  # Python would keep what it could not write whole
import numpy as np
from hf_glovlm.inference import FeatureCache

logging.basicConfig()
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
FeatureCache(sys.argv[1]).put("e", [bytes(16)], np.zeros((1, 4096), np.float32), "name")
"""


def put(place: FeatureCache, number: int = 0) -> bytes:
    key = number.to_bytes(16, "big")
    place.put("encoder", [key], np.full((1, 8), number, np.float32))
    return key


def test_a_folder_that_is_evicted_while_a_shard_is_written_stays_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, checksum = FeatureCache(tmp_path / "cache"), cache._checksum

    def evicted(*arrays: Any) -> str:
        shutil.rmtree(place.folder / "encoder")
        return checksum(*arrays)

    monkeypatch.setattr(cache, "_checksum", evicted)
    before = os.umask(0o022)
    try:
        key = put(place, 3)
    finally:
        os.umask(before)
    monkeypatch.undo()
    assert (place.folder / "encoder").stat().st_mode & 0o777 == 0o700
    assert place.get("encoder", [key])[key].tolist() == [3.0] * 8


def test_fresh_files_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    place = FeatureCache(tmp_path)
    put(place)
    old, young = (tmp_path / "encoder" / f".a.safetensors.{n:012x}.tmp" for n in (1, 2))
    for path, days in ((old, 1.1), (young, 0.9)):
        path.write_bytes(b"half")
        at = time.time() - days * 86_400
        os.utime(path, (at, at))
    put(place, 1)
    assert not old.exists()
    assert young.exists()


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    command = ["-c", FULL, tmp_path / "cache"]
    (done,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert done.code == 0, done.error
    assert "Features cannot be cached" in done.error
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
