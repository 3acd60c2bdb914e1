"""Fork server: a process that has imported the libraries and forks for each script.

A fork has the libraries but not `hf_glovlm`, and sets anew what they read from the environment
when they were imported: it begins as a fresh interpreter would after some seconds.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

# Tests say that the package imports none of scikit-learn, peft, matplotlib, gradio and evaluate
# by itself, so none of these may.
LIBRARIES = [
    "accelerate", "datasets", "PIL.Image", "safetensors.torch", "scipy.optimize", "torch",
    "torchvision", "transformers.dynamic_module_utils", "transformers.models.auto",
    "transformers.models.clip.modeling_clip", "transformers.pipelines",
]  # fmt: skip
# The libraries keep these values of the environment when they are imported.
KEPT = {"HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
# What else a fork may set: all of it is read when it is used.
OTHER = {
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "GLOVLM_CACHE", "HF_TOKEN",
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "RANK",
    "WORLD_SIZE",
}  # fmt: skip


def set_environment(environment: Mapping[str, str], fixed: Mapping[str, str]) -> None:
    """Set the environment, and what the libraries keep of it since they were imported.

    `test_fork_server.py` finds any other place where a library keeps it.

    Args:
        environment: Its own variables.
        fixed: Those of the server, which each fork has too.
    """
    changed = {name for name, value in environment.items() if fixed.get(name) != value}
    if changed - KEPT - OTHER:
        raise ValueError(f"a fork cannot set {sorted(changed - KEPT - OTHER)}: use run_fresh")
    os.environ.clear()
    os.environ.update({**fixed, **environment})
    constants: Any = sys.modules["huggingface_hub.constants"]
    before = constants.HF_HOME
    for name in ("huggingface_hub.constants", "datasets.config"):
        importlib.reload(sys.modules[name])
    for module in list(sys.modules.values()):  # transformers, accelerate
        for name, value in list(vars(module).items()):
            if type(value) is str and value.startswith(before):
                setattr(module, name, constants.HF_HOME + value.removeprefix(before))
    files: Any = sys.modules["huggingface_hub.hf_file_system"]
    for client in (sys.modules["huggingface_hub.hf_api"].api, files.hffs, files.hffs._api):
        client.endpoint = constants.ENDPOINT


def run(request: Mapping[str, Any]) -> None:
    """Run a script (`-c`, its code) or a file with arguments, as `python` does."""
    os.chdir(request["folder"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    file, *arguments = request["arguments"]
    if file == "-c":
        script, *arguments = arguments
    sys.argv = [file, *arguments]
    sys.path[:0] = ["" if file == "-c" else os.path.dirname(file), *filter(None, paths)]
    if file != "-c":
        runpy.run_path(file, run_name="__main__")
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(script, "<string>", "exec"), vars(main))


def fork(request: Mapping[str, Any], fixed: Mapping[str, str]) -> int:
    """Start a request in a fork.

    Returns:
        Its process id.
    """
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        signal.alarm(request["limit"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            file = os.open(request["streams"][stream - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
        set_environment(request["environment"], fixed)
        run(request)
        code = 0
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:  # as Python does at the end of a program
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else bool(code))


def serve() -> None:
    """Run each line of requests, all at the same time, and answer with their exit codes."""
    fixed = dict(os.environ)
    name = f"server-{os.getpid()}"  # in what the libraries keep, until a fork sets its own
    os.environ.update(HF_HOME=f"/{name}", HF_ENDPOINT=f"http://{name}.invalid", HF_HUB_OFFLINE="0")
    for library in LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        children = [fork(request, fixed) for request in json.loads(line)]
        codes = dict.fromkeys(children, 0)
        running = set(children)
        while running:
            child, status = os.wait()
            running.remove(child)
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:  # the others may wait for it
                for other in running:
                    os.kill(other, signal.SIGTERM)
        print(json.dumps(list(codes.values())), file=answers, flush=True)


if __name__ == "__main__":
    serve()
