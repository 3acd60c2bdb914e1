"""Software versions and hardware."""

from typing import Any


def describe_environment(device: Any, num_processes: int = 1) -> dict[str, Any]:
    """Software versions and hardware, for `results.json` and `glovlm env`."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "numpy")
    return {
        "hf_glovlm": installed("hf-glovlm"),
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(0) if str(device).startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "num_processes": num_processes,
    }


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
