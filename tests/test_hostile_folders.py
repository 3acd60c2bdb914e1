"""Hostile model and run folders: a sentence or success, and nothing outside is touched."""

import pytest
from hostile_folders import REASON, HostileFolders
from tiny import tiny_clip, tiny_images

from hf_glovlm.cli import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> HostileFolders:
    root = tmp_path_factory.mktemp("hostile")
    data = tiny_images(root / "data", per_class=4)
    given = ["train", "--data", data, "--backbone", tiny_clip(), "--output-dir", root / "run"]
    given += ["--shots", 1, "--n-resamples", 2, "--method", "lora", "--epochs", 1]
    assert app.main([str(part) for part in given]) == 0
    return HostileFolders(root / "run", data, root / "cases")


@pytest.mark.parametrize("block", range(4))
def test_a_hostile_folder_ends_in_a_sentence(block: int, folders: HostileFolders) -> None:
    """Ten of forty cases; `make test-long` runs five thousand."""
    assert REASON
    failures = [folders.run(number) for number in range(10 * block, 10 * block + 10)]
    assert [failure for failure in failures if failure] == []
