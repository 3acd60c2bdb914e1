"""A fork of the fork server begins as a fresh interpreter would."""

from pathlib import Path
from typing import Any

import pytest
from fresh_process import FIXED, Completed, run_forks, run_script

# What in memory is still as it was in the server, whose name is part of each value that it kept.
SCAN = """
import gc, json, os, sys, urllib.parse
from pathlib import Path
from huggingface_hub import constants
urllib.parse.clear_cache()
server = f"server-{os.getppid()}"
print(json.dumps({
    "kept": [
        f"{type(holder).__name__} {getattr(holder, 'get', dict().get)('__name__')}: {value}"
        for holder in gc.get_objects()
        for value in gc.get_referents(holder)
        if isinstance(value, str | Path) and value is not server and server in str(value)
    ],
    "online": [
        name
        for name, module in sys.modules.items()
        if not vars(module).get("HF_HUB_OFFLINE", True)
    ],
    "set": [constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE],
    "modules": sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE,
    "unexpected": sorted(set(sys.modules) & {
        "hf_glovlm", "sklearn", "peft", "matplotlib", "gradio", "evaluate", "onnx"
    }),
}))
"""


def test_a_fork_keeps_nothing_of_the_environment_of_the_server(tmp_path: Path) -> None:
    """Where a library keeps it in a new place, `fork_server.set_environment` must set that too."""
    own = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run_script(SCAN, home=tmp_path, **own) == {
        "kept": [],
        "online": [],
        "set": [str(tmp_path / "hub" / "hub"), "http://127.0.0.1:9", True],
        "modules": str(tmp_path / "hub" / "modules"),
        "unexpected": [],
    }
    later = run_script(SCAN, home=tmp_path)
    assert later["kept"] == []
    assert later["set"][1:] == ["https://huggingface.co", False]


@pytest.mark.parametrize(
    ("script", "code", "out", "error"),
    [
        ("import sys; print(sys.argv, __name__, sys.path[0])", 0, "['-c', 'a'] __main__ \n", ""),
        ("import sys; print(sys.stdin.read())", 0, "\n", ""),
        ("print('so far'); raise SystemExit('why')", 1, "so far\n", "why\n"),
        ("import sys; sys.exit(3)", 3, "", ""),
        ("import sys; sys.exit()", 0, "", ""),
        ("import os; os._exit(9)", 9, "", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, "", ""),
        ("import atexit; atexit.register(print, 'last')", 0, "last\n", ""),
    ],
)
def test_a_fork_ends_as_a_process_does(
    script: str, code: int, out: str, error: str, tmp_path: Path
) -> None:
    ends = run_forks(["-c", script, "a"], folder=tmp_path, environments=[{"HF_HOME": "/home"}])
    assert ends == [Completed(code, out, error)]


def test_an_error_is_printed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_script("1 / 0", home=tmp_path)


@pytest.mark.parametrize("change", [{"OMP_NUM_THREADS": "7"}, {"MPLBACKEND": "Agg"}])
def test_what_a_fork_cannot_set_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    assert FIXED.items() != change.items()
    with pytest.raises(AssertionError, match="use run_fresh"):
        run_script("", home=tmp_path, **change)


def test_forks_run_at_the_same_time_and_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = "import os, time\nif os.environ['RANK'] == '0': raise SystemExit(2)\ntime.sleep(600)"
    ranks = [{"HF_HOME": "/home", "RANK": rank} for rank in ("0", "1")]
    ends = run_forks(["-c", script], folder=tmp_path, environments=ranks)
    assert [completed.code for completed in ends] == [2, -15]
