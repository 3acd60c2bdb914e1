"""Software versions, hardware, memory, and the experiment trackers that are installed."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

from .errors import GloVLMError, nearest


def describe_environment(device: Any, num_processes: int = 1) -> dict[str, Any]:
    """Software versions and hardware, for `results.json`."""
    import platform

    import torch

    packages = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "hf_glovlm": package_version("hf-glovlm"),
        "python": platform.python_version(),
        **{name: package_version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(0) if str(device).startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "num_processes": num_processes,
    }


@cache  # what is installed is read from disk, and stays as it is
def package_version(name: str) -> str | None:
    """Version of an installed package; `None` for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; `None` where no system states it.

    Windows does not, and no result is worth losing for it.
    """
    try:
        import resource
    except ImportError:
        return None
    try:  # Linux hands ru_maxrss of the parent down to a child: the process's own record is better
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, ValueError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def check_tracker(name: str | None) -> None:
    """Check that an experiment tracker is known to Accelerate and installed.

    Accelerate drops one that is not installed without a word.

    Args:
        name: As `--tracker` takes it; `None` is none.

    Raises:
        GloVLMError: It is unknown, or its package is not installed.
    """
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    # What was registered by someone's own code is there.
    installed += [
        k for k, v in LOGGER_TYPE_TO_CLASS.items() if v.__module__ != "accelerate.tracking"
    ]
    known = ["all", *LOGGER_TYPE_TO_CLASS]
    if name not in known:
        raise GloVLMError(
            f"Accelerate has no tracker '{name}': expected one of {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    if name not in installed and not (name == "all" and installed):
        package = "tensorboard" if name == "all" else name.replace("_", "-")
        raise GloVLMError(
            f"The tracker '{name}' is not installed, so nothing would be logged: `pip install "
            f"{package}`, or leave --tracker out."
        )


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars from covering ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def end_with_parent() -> None:
    """End this worker process as soon as its parent has ended, even by `kill -9`.

    What a pool's processes begin with: none goes on to write for a command that is no more.
    """
    import multiprocessing
    import os
    import threading

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
