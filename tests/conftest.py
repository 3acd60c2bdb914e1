"""What every test stands on: no network, no trace in the home folder, fixed seeds, one thread.

`GLOVLM_TEST_THREADS` and `GLOVLM_TEST_SHIFT` run the same tests under other kernels: see
`docs/reproducibility.md`.
"""

import gc
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from addresses import loaded_weights_moved
from command_line import Completed, Glovlm
from hypothesis import HealthCheck, settings

# The libraries read these once, on import, so they are set before any test file is read. Each
# process of pytest-xdist has folders of its own; a subprocess of a test inherits them.
_HOME = Path(tempfile.mkdtemp(prefix="glovlm-tests-"))
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(_HOME / "huggingface"),
    "GLOVLM_CACHE": str(_HOME / "features"),
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    # The suite runs one process a core; more threads would only wait for each other.
    "OMP_NUM_THREADS": os.environ.get("GLOVLM_TEST_THREADS", "1"),
}

# Machines are shared, so an example may take its time; CI draws the same examples every time.
settings.register_profile(
    "glovlm",
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("glovlm")


# Importing makes millions of objects that all stay: looking for garbage among them takes seconds
# while the tests are collected, and again whenever one of them leaves many objects behind.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    # A test that uses neither pays for neither: importing torch takes seconds.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _configurations_unwritten() -> Iterator[None]:
    """transformers writes each configuration that it loads out in full, for a log that is off."""
    module = sys.modules.get("transformers.configuration_utils")
    with pytest.MonkeyPatch.context() as patch:
        if module is not None:
            patch.setattr(module.PreTrainedConfig, "__repr__", object.__repr__)
        yield


@pytest.fixture(scope="session", autouse=True)
def _weights_elsewhere() -> Iterator[None]:
    """Loaded weights that many bytes behind where memory would begin; unset, where they are."""
    with loaded_weights_moved(int(os.environ.get("GLOVLM_TEST_SHIFT", "0"))):
        yield


@pytest.fixture(scope="session", autouse=True)
def _asked_of_others() -> Iterator[list[str]]:
    """The other machines that anything in this process looked for; it finds none of them."""
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def look_up_here(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name and name not in ("localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
            asked.append(name)
            raise socket.gaierror(socket.EAI_NONAME, f"tests are offline and looked for {name}")
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up_here)
        yield asked


@pytest.fixture(autouse=True)
def nothing_leaves(_asked_of_others: list[str]) -> Iterator[None]:
    """No test, and no fixture that it set up, looks for another machine."""
    yield
    asked = sorted(set(_asked_of_others))
    _asked_of_others.clear()
    assert asked == []


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision and device for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def glovlm(capsys: pytest.CaptureFixture[str]) -> Glovlm:
    """Run the command in this process, as the entry point does."""
    from hf_glovlm.cli import app

    def run(*arguments: object) -> Completed:
        capsys.readouterr()
        code = app.main([str(argument) for argument in arguments])
        return Completed(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and real encoders, where there is one."""
    repository = Path(__file__).resolve().parent.parent
    folder = (repository / os.environ.get("GLOVLM_SHARED", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GLOVLM_SHARED to the folder that holds it")
    return folder
