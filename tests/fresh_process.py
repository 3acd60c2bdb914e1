"""Scripts in a process of their own, which takes over no setting and starts with empty caches."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def run_script(script: str, *arguments: object, home: Path, **environment: str) -> dict[str, Any]:
    """Run a script in the folder `home`, where its caches are.

    Returns:
        The JSON object of the last line that it prints.
    """
    own = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(home / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # A kernel without AVX2 resizes an image to grey levels that may be one off, as another
    # processor would: the other process has this one's.
    if "ATEN_CPU_CAPABILITY" in os.environ:
        own["ATEN_CPU_CAPABILITY"] = os.environ["ATEN_CPU_CAPABILITY"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=home,
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_without_the_package(
    script: str, *arguments: object, home: Path, **environment: str
) -> dict[str, Any]:
    """The same where `hf_glovlm` cannot be imported."""
    hidden = f"{HIDE}{script}\n{HIDDEN}\n"
    return run_script(hidden, *arguments, home=home, **environment)


def load_without_the_package(
    folders: Iterable[Path], home: Path, more: str
) -> dict[str, dict[str, Any]]:
    """Load saved models by the code in their folders and classify the `image.png` beside each.

    Args:
        folders: Folders with a model and its image.
        home: Where the process runs.
        more: Lines that put further values into `found`, given `folder`, `processor`, `model` and
            `inputs`.

    Returns:
        `logits`, `scores` by class from the pipeline, and what `more` adds, for each folder's name.
    """
    return run_without_the_package(LOAD, more, *folders, home=home, HF_HUB_OFFLINE="1")
