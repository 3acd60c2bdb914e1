"""Five thousand hostile model and run folders in one process."""

from pathlib import Path

import pytest
from command_process import run
from hostile_folders import HostileFolders
from tiny import tiny_clip

CASES, BLOCK = 5000, 500

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def good(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    train = ["train", "--data", inputs / "cohort", "--backbone", tiny_clip(), "--shots", "1"]
    train += ["--method", "lora", "--epochs", "1", "--n-resamples", "2"]
    done = run([*train, "--output-dir", folder / "run"], folder / "log")
    assert done.code == 0, done.printed
    return folder / "run"


@pytest.mark.parametrize("block", range(CASES // BLOCK))
def test_a_hostile_folder_ends_in_a_sentence(
    block: int, inputs: Path, good: Path, tmp_path: Path
) -> None:
    folders = HostileFolders(good, inputs / "cohort", tmp_path / "cases")
    failures = [folders.run(number) for number in range(BLOCK * block, BLOCK * (block + 1))]
    shown = [f"{f.number}: {f.arguments}\n{f.reason}" for f in failures if f]
    assert not shown, f"{len(shown)} cases:\n" + "\n".join(shown[:20])
