"""Platforms: a system without POSIX, and the same files and logs whatever the process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import tracking
from command_line import Glovlm
from fresh_process import TESTS, inherited, run_forks
from remembers import Remembers
from tiny import tiny_clip, tiny_images

ELSEWHERE = """
import os, signal, sys

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in "fork getuid geteuid mkfifo getpgid killpg".split():
    delattr(os, name)
for name in "SIGKILL SIGHUP SIGALRM alarm".split():
    delattr(signal, name)
from hf_glovlm.cli import app
code = app.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data"), per_class=4)


def arguments(data: Path, folder: Path, *more: object) -> list[str]:
    given = ("--data", data, "--backbone", tiny_clip(), "--output-dir", folder, "--shots", 1)
    return ["train", *map(str, [*given, "--n-resamples", 20, *more])]


@pytest.mark.long
def test_a_run_ends_well_on_a_system_without_posix(data: Path, tmp_path: Path) -> None:
    script = ["-c", ELSEWHERE, *arguments(data, tmp_path / "run")]
    (done,) = run_forks(script, folder=TESTS, environments=[inherited()])
    assert (tmp_path / "run" / "results.json").is_file(), done.error[-2000:]
    assert done.code == 0, done.error[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["timing"]["peak_memory_mib"] is None
    assert "peak memory" not in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_names_in_an_adapter_are_sorted(data: Path, tmp_path: Path, glovlm: Glovlm) -> None:
    more = ("--method", "lora", "--epochs", 1, "--set", "tuner=IA3", "--set", "mlp=true")
    done = glovlm(*arguments(data, tmp_path / "run", *more))
    assert done.code == 0, done.err
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert len(stored["target_modules"]) >= 8  # that a set of them is sorted is no chance
    for name in ("target_modules", "feedforward_modules"):
        assert stored[name] == sorted(stored[name])


# --------------------------------------------------------------------------------------- trackers


@pytest.fixture
def remembers(fresh_accelerate: None) -> Iterator[type[Remembers]]:
    Remembers.rows.clear()
    tracking.register_tracker_class(Remembers)
    yield Remembers
    tracking.LOGGER_TYPE_TO_CLASS.pop("remembers")


@pytest.mark.parametrize("method", ["linear_probe", "zero_shot", "lora"])
def test_every_method_is_logged(
    method: str, data: Path, tmp_path: Path, glovlm: Glovlm, remembers: type[Remembers]
) -> None:
    more = () if method != "lora" else ("--epochs", 2)
    done = glovlm(
        *arguments(data, tmp_path / "o", "--method", method, *more, "--tracker", "remembers")
    )
    assert done.code == 0, done.err
    assert len(remembers.rows) == (3 if method == "lora" else 1)
    step, values = remembers.rows[-1]
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert step == results["training"]["epochs_run"] + 1
    for name, entry in results["metrics"].items():
        assert values.get(f"test/{name}") == entry["value"]
    assert values["training/trainable_parameters"] == results["training"]["trainable_parameters"]


@pytest.mark.parametrize("method", ["linear_probe", "lora"])
@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("tensorboard", "pip install tensorboard"),
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("notebook", "Accelerate has no tracker 'notebook'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(
    tracker: str, words: str, method: str, tmp_path: Path, glovlm: Glovlm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    done = glovlm(
        *arguments(tmp_path / "nowhere", tmp_path / "o", "--method", method, "--tracker", tracker)
    )
    assert done.code == 2
    assert words in done.err  # before the data, which are not there either
    assert not (tmp_path / "o").exists()
