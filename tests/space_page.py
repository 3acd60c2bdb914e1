"""The Space in a process of its own on a free port, for the tests that talk to it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

SPACE = Path(__file__).resolve().parent.parent / "spaces" / "glomeruli"
OWNERS = ("GLOVLM_M", "GLOVLM_A", "GLOVLM_P", "GLOVLM_R")  # settings of a page begin so
if str(SPACE) not in sys.path:
    sys.path.insert(0, str(SPACE))


@dataclass(frozen=True)
class Served:
    """A page that is being served.

    Args:
        url: Its address.
        folder: Where it puts what is uploaded.
        pid: Its process.
    """

    url: str
    folder: Path
    pid: int


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(folder: Path, **environment: str) -> Iterator[Served]:
    """Run `app.py` while the block runs; it then has the time to clean up."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    own = {k: v for k, v in os.environ.items() if not k.startswith(OWNERS)}
    paths = [str(SPACE.parent.parent), *filter(None, [own.get("PYTHONPATH")])]
    own |= {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        **environment,
    }
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py")], env=own, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield Served(_wait(process, port, log.name), folder, process.pid)
        finally:
            process.terminate()  # as a container is stopped
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def _wait(process: subprocess.Popen[bytes], port: int, log: str) -> str:
    url = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(url, timeout=10).raise_for_status()
            return url
        except httpx.HTTPError:
            time.sleep(0.2)  # until it listens
    raise RuntimeError(f"The page did not start: {Path(log).read_text()[-2000:]}")
