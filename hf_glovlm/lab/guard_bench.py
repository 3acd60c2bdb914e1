"""Benchmark of the guard: share of images flagged as unlike the support, own and foreign.

`python -m hf_glovlm.lab.guard_bench experiments/guard.yaml --root FOLDER` runs what the file
describes and prints a row for each set of images.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backbones import load_backbone
from ..data import load_dataset
from ..data.folder import column
from ..data.splits import all_rows
from ..files import read_json
from ..inference import FeatureCache, predict
from ..inference.sentences import copy_sharing_weights
from ..settings import read_yaml
from ..training import adapt

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]  # set, images, flagged (mean over the draws), least, most


def bench_guard(settings: dict[str, Any], root: Path) -> list[Row]:
    """Measure how many images a guard flags, over frozen label draws.

    Args:
        settings: `run` of experiments/guard.yaml.
        root: Folder that its paths are relative to.

    Returns:
        The own set's held-out images first, then each other set.
    """
    names = [str(root / part) for part in settings["backbone"].split("+")]
    model, processor = load_backbone("+".join(names))
    own = all_rows(load_dataset(root / settings["own"]))
    files, groups = column(own, "file_name"), column(own, "slide_id")
    rng = np.random.default_rng(settings["seed"])
    drawn = {int(i) for i in rng.permutation(len(files))[: settings["own_images"]]}
    others = {
        name: _draw(root / about["data"], about.get("labels"), about["per_class"], settings["seed"])
        for name, about in settings["others"].items()
    }
    cache = FeatureCache()
    shares: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for draw in read_json(root / settings["episodes"])["draws"][: settings["draws"]]:
        chosen = [files.index(name) for name in draw["support"]]
        held_out = [i for i in drawn if groups[i] in set(draw["test_groups"])]
        adapted = adapt(
            copy_sharing_weights(model),
            settings["method"],
            own.select(chosen),
            processor=processor,
            groups=[groups[i] for i in chosen],
            cache=cache,
        )
        measured = {"own, held out": own.select(sorted(held_out)).select_columns(["image"])}
        for name, rows in (measured | others).items():
            predicted = predict(adapted.model, processor, rows, cache=cache)
            assert predicted.unlike_support is not None  # 8 images a class are enough for a guard
            shares.setdefault(name, []).append(float(predicted.unlike_support.mean()))
            counts[name] = counts.get(name, 0) + len(rows)
    return [
        {
            "set": name,
            "images": counts[name] / len(values),
            "flagged": float(np.mean(values)),
            "least": min(values),
            "most": max(values),
        }
        for name, values in shares.items()
    ]


def _draw(data: Path, labels: list[str] | None, per_class: int, seed: int) -> "Dataset":
    """Some images of each class, without their labels."""
    rows = all_rows(load_dataset(data))
    names: list[str] = rows.features["label"].names
    values = np.array(column(rows, "label"))
    rng = np.random.default_rng(seed)
    kept: list[int] = []
    for k, name in enumerate(names):
        order = rng.permutation(np.flatnonzero(values == k))[:per_class]
        kept += [int(i) for i in order] if labels is None or name in labels else []
    return rows.select(sorted(kept)).select_columns(["image"])


def main() -> None:
    """Run the benchmark of a file and print its rows as JSON lines."""
    parser = argparse.ArgumentParser(description=bench_guard.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="Folder with data and models.")
    given = parser.parse_args()
    for row in bench_guard(read_yaml(given.file)["run"], given.root):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
