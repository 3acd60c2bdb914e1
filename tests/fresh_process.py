"""Scripts in a process of their own, which takes over no setting and starts with empty caches."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from space_page import free_port

TESTS = Path(__file__).resolve().parent
LIMIT = 600  # seconds
FIXED = {
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "77",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# The kernels of this process: one without AVX2 resizes an image to grey levels that may be one
# off, as another processor would.
FIXED |= {k: v for k, v in os.environ.items() if k in ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")}
# What a process of the package has from this one.
INHERITED = ("GLOVLM_CACHE", "HF_HOME", "HF_HUB_OFFLINE")

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_glovlm":
            raise ImportError("hf_glovlm is hidden")

sys.meta_path.insert(0, Hidden())
"""
HIDDEN = 'assert "hf_glovlm" not in sys.modules'
LOAD = """
import json, sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoProcessor, pipeline

more, *folders = sys.argv[1:]
result = {}
for folder in map(Path, folders):
    image = Image.open(folder / "image.png")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        found = {"logits": model(**inputs).logits[0].tolist()}
        exec(more)
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True)
    found["scores"] = {row["label"]: row["score"] for row in classify(image)}
    result[folder.name] = found
print(json.dumps(result))
"""


class Completed(NamedTuple):
    """A process that ended.

    Args:
        code: Its exit code; negative, the signal that ended it.
        out: What it printed.
        error: What it printed to the error stream.
    """

    code: int
    out: str
    error: str

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line of a process that went well."""
        assert self.code == 0, self.error[-3000:]
        last: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return last


def run_script(script: str, *arguments: object, home: Path, **environment: str) -> dict[str, Any]:
    """Run a script in the folder `home`, where its caches are, in a fork of the fork server.

    It starts without `hf_glovlm`, but with the libraries: see `fork_server.py`.

    Returns:
        The JSON object of the last line that it prints.
    """
    own = _environment(home, environment)
    (completed,) = run_forks(["-c", script, *arguments], folder=home, environments=[own])
    return completed.result()


def run_fresh(script: str, *arguments: object, home: Path, **environment: str) -> dict[str, Any]:
    """The same in a fresh interpreter, for what the libraries would hide."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=home,
        env=_environment(home, environment),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return Completed(done.returncode, done.stdout, done.stderr).result()


def _environment(home: Path, environment: dict[str, str]) -> dict[str, str]:
    return FIXED | {"HF_HOME": str(home / "hub")} | environment


def inherited() -> dict[str, str]:
    """The environment of a process that has the package, and the caches of this one."""
    own = {name: os.environ[name] for name in INHERITED}
    return own | {"PYTHONPATH": str(TESTS.parent)}


def run_two_ranks(file: Path, *arguments: object) -> None:
    """Run a file in two forks that train together on the CPU, as `accelerate launch` does."""
    own = inherited() | {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    ranks = [own | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    for completed in run_forks([file, *arguments], folder=TESTS, environments=ranks):
        assert completed.code == 0, completed.error[-4000:]


def run_forks(
    arguments: Sequence[object], *, folder: Path, environments: Iterable[dict[str, str]]
) -> list[Completed]:
    """Run `python ARGUMENTS` at the same time in one fork of the fork server for each environment.

    Args:
        arguments: `-c` and a script, or a file; then what is in its `sys.argv`.
        folder: Where they run.
        environments: The environment variables of each, besides `FIXED`.
    """
    with TemporaryDirectory() as place:
        requests = [
            {
                "arguments": [str(argument) for argument in arguments],
                "environment": environment,
                "folder": str(folder),
                "limit": LIMIT,
                "streams": [f"{place}/{i}.{name}" for name in ("stdout", "stderr")],
            }
            for i, environment in enumerate(environments)
        ]
        server = _fork_server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(requests), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        return [
            Completed(code, *(Path(stream).read_text() for stream in request["streams"]))
            for code, request in zip(codes, requests, strict=True)
        ]


@cache
def _fork_server() -> subprocess.Popen[str]:
    """The one of this process; it ends when its input is closed."""
    server = subprocess.Popen(
        [sys.executable, "-P", str(TESTS / "fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=FIXED,
        text=True,
    )

    def end() -> None:
        server.communicate()

    atexit.register(end)
    return server


def run_without_the_package(
    script: str, *arguments: object, home: Path, fresh: bool = False, **environment: str
) -> dict[str, Any]:
    """The same where `hf_glovlm` cannot be imported."""
    hidden = f"{HIDE}{script}\n{HIDDEN}\n"
    return (run_fresh if fresh else run_script)(hidden, *arguments, home=home, **environment)


def load_without_the_package(
    folders: Iterable[Path], home: Path, more: str, *, fresh: bool = False
) -> dict[str, dict[str, Any]]:
    """Load saved models by the code in their folders and classify the `image.png` beside each.

    Args:
        folders: Folders with a model and its image.
        home: Where the process runs.
        more: Lines that put further values into `found`, given `folder`, `processor`, `model` and
            `inputs`.
        fresh: In a fresh interpreter.

    Returns:
        `logits`, `scores` by class from the pipeline, and what `more` adds, for each folder's name.
    """
    offline = {"HF_HUB_OFFLINE": "1"}
    return run_without_the_package(LOAD, more, *folders, home=home, fresh=fresh, **offline)
