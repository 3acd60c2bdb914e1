"""Results of a run, made by hand: what `glovlm train` leaves, without training."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from hf_glovlm.curves import choose_thresholds
from hf_glovlm.files import write_json
from hf_glovlm.inference import Predictions
from hf_glovlm.runs.evaluation import measure, measure_thresholds

CLASSES = ["mesangial", "sclerosed", "viable"]
PATIENTS = ["Zimmermann_Anneliese", "B17-04821", "483905", "P001", "P002", "P007", "P019", "MRN-77"]
NAMED = ("zimmermann", "anneliese", "04821", "483905", "p019", "mrn")


def predictions(n: int = 64) -> Predictions:
    """Of 64 images of 8 patients, drawn so that some are surely wrong."""
    rng = np.random.default_rng(5)
    labels = rng.integers(3, size=n)
    logits = rng.normal(0, 1.4, (n, 3))
    logits[np.arange(n), labels] += 1.5
    shares = np.exp(logits)
    groups = [PATIENTS[i % len(PATIENTS)] for i in range(n)]
    names = [
        f"{CLASSES[k]}/{group}_{i:02d}.png"
        for i, (k, group) in enumerate(zip(labels, groups, strict=True))
    ]
    return Predictions(
        probabilities=shares / shares.sum(1, keepdims=True),
        logits=logits.astype(np.float32),
        class_names=list(CLASSES),
        file_names=names,
        groups=groups,
        labels=labels,
    )


@cache
def _text() -> str:
    made = predictions()
    assert made.labels is not None
    chosen = choose_thresholds(made.labels[::2], made.probabilities[::2], CLASSES)
    metric = {"title": "Size of the image alone", "metric": "macro_auc", "ci95": [0.44, 0.61]}
    results: dict[str, Any] = {
        "kind": "adaptation",
        "config": {"method": "lora", "shots": 4, "seed": 3, "draw": 1, "data": "/home/x/kidneys",
                   "output_dir": "/home/x/run"},
        "data": {
            "name": "kidneys",
            "hub_id": None,
            "stain": ["PAS", "H&E"],
            "fingerprint": "77c68b4ada09c63d25f6d7a1d6225d6d",
            "classes": [{"name": c, "display_name": c, "prompts": [c]} for c in CLASSES],
            "counts": {
                "support": dict.fromkeys(CLASSES, 4),
                "validation": dict.fromkeys(CLASSES, 0),
                "calibration": dict.fromkeys(CLASSES, 7),
                "test": dict.fromkeys(CLASSES, 20),
            },
            "groups": {"support": 5, "validation": 0, "calibration": 3, "test": 8},
            "drawn": {
                "support": [[2, 1, 0], [1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]],
                "validation": [],
                "calibration": [[3, 2, 2], [2, 3, 2], [2, 2, 3]],
                "test": [[3, 3, 2]] * 8,
            },
            "group_column": "patient_id",
            "split_hash": "3f6f3fa3622c86c2d5099e573aab229f",
            "shots": 4,
            "sampler": "spread",
            "support": {
                "labels_per_class": dict.fromkeys(CLASSES, 4),
                "groups_per_class": dict.fromkeys(CLASSES, 3),
                "validation_labels": 0,
                "calibration_labels": 21,
                "former_labels": 6,
                "label_budget": 39,
            },
            "support_groups_sha256": [],
        },
        **measure(made, n_resamples=200),
        "operating_points": measure_thresholds(
            made, chosen, "21 calibration images of 3 groups", n_resamples=200
        ),
        "method": {"name": "lora", "settings": {"rank": 8}},
        "backbone": {"name": "mini", "base": "mini", "license": "apache-2.0"},
        "training": {"trainable_parameters": 8192},
        "abstention": {"n": 64, "answered": 41, "coverage": 0.640625, "risk": 0.125, "aurc": 0.1},
        "sets": {"n": 64, "coverage": 0.903, "mean_size": 1.4, "worst_class_coverage": 0.87},
        "calibration": {"temperature": 1.31, "n": 21, "groups": 3},
        "controls": {
            "size": {**metric, "value": 0.523, "chance": 0.5, "flagged": False, "note": "8 sizes"},
            "files": {**metric, "title": "Files alone", "value": 0.874, "ci95": [0.8, 0.93],
                      "chance": 0.5, "flagged": True, "note": ""},
        },
        "notes": ["Split by patient_id; intervals are over these groups.", "Read /data/a/b first."],
        "synthetic": True,
        "timing": {"data": 1.064, "adapt": 12.857, "predict": 1.073, "total": 15.408,
                   "peak_memory_mib": 952.7},
        "environment": {"hf_glovlm": "0.1.0", "torch": "2.14.1", "device": "cpu", "threads": 1},
    }  # fmt: skip
    stain = {
        name: {key: results[key] for key in ("n", "n_groups", "metrics")} for name in ("PAS", "H&E")
    }
    return json.dumps(results | {"subgroups": {"stain": stain}})


def results(**changed: Any) -> dict[str, Any]:
    """A copy of the results, some of it changed."""
    return copy.deepcopy(json.loads(_text())) | changed


def earlier() -> dict[str, Any]:
    """The same results as an earlier version wrote them."""
    old = results()
    for name in ("curves", "per_group", "operating_points", "controls", "subgroups"):
        del old[name]
    del old["data"]["drawn"]
    return old


def write_run(folder: Path, found: dict[str, Any] | None = None, images: bool = False) -> Path:
    """A run's folder with its results, predictions and identifiers; with its images, if asked."""
    made = predictions()
    own = results() if found is None else found
    if images:
        from hf_glovlm.data import dataset_fingerprint, load_dataset

        data = folder.with_name("images")
        assert made.groups is not None
        lines = ["file_name,label,patient_id"]
        for i, (name, group) in enumerate(zip(made.file_names, made.groups, strict=True)):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 40), (3 * i, 255 - 3 * i, 90)).save(data / name)
            lines.append(f"{name},{name.split('/')[0]},{group}")
        (data / "metadata.csv").write_text("\n".join(lines) + "\n")
        own["config"]["data"] = str(data)
        own["data"]["fingerprint"] = dataset_fingerprint(load_dataset(data))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", own)
    (folder / "config.yaml").write_text(yaml.safe_dump(own["config"]))
    named = {"patient_id": PATIENTS, "file_name": made.file_names}
    write_json(folder / "identifiers.json", named)
    write_json(folder / "episodes.json", {"draws": []})
    made.save(folder / "predictions.parquet")
    return folder
