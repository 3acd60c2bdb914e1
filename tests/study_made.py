"""A study as `run_study` leaves it, of predictions made by hand: no run, no image, no backbone."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_glovlm.files import write_json
from hf_glovlm.metrics import compute_metrics
from hf_glovlm.runs.study import StudyConfig
from hf_glovlm.runs.study_report import Outcome, report_cells

CLASSES = ("normal", "sclerosed", "other")


def made_outcome(
    draw: int,
    skill: float,
    *,
    patients: int = 12,
    per_patient: int = 6,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    shots: int = 8,
    labels: int = 24,
) -> Outcome:
    """A finished cell whose probabilities know the class by so much."""
    n, k = patients * per_patient, len(classes)
    rng = np.random.default_rng([seed, draw])
    own = np.arange(n) % k
    group = np.arange(n) // per_patient
    hard = rng.normal(size=patients)[group]
    scores = np.random.default_rng([seed, draw, int(skill * 1000), shots]).normal(size=(n, k))
    scores += np.eye(k)[own] * np.maximum(skill + hard, 0)[:, None]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    names = [f"patient-{1000 + g}" for g in group]
    measured = compute_metrics(own, p, groups=names, class_names=classes, n_resamples=0)
    results: dict[str, Any] = {
        "synthetic": True,
        "threshold": measured["threshold"],
        "timing": {"total": round(0.4 + skill, 2), "peak_memory_mib": 512.0 + draw},
        "environment": {"hf_glovlm": "0.1.0", "python": "3.11", "torch": "2", "device": "cpu"},
        "n": n,
        "n_groups": patients,
        "notes": [],
        "data": {
            "name": "made cohort",
            "fingerprint": "0123456789abcdef",
            "group_column": "patient_id",
            "split_hash": f"split {draw}",
            "support": {
                "label_budget": labels,
                "labels_per_class": dict.fromkeys(classes, shots),
                "groups_per_class": dict.fromkeys(classes, min(shots, 5)),
            },
            "notes": [],
        },
        "metrics": {name: {"value": of["value"]} for name, of in measured["metrics"].items()},
        "training": {"facts": {}, "trainable_parameters": int(skill * 1000)},
    }
    files = [f"image {i}.png" for i in range(n)]
    made_from = dict.fromkeys(("images", "labels", "groups", "columns", "code", "backbone"), "")
    return Outcome(made_from, results, own, p, names, files, list(classes))


def made_study(
    folder: Path,
    *,
    backbones: tuple[str, ...] = ("made",),
    methods: tuple[str, ...] = ("linear_probe", "gda", "tip_adapter"),
    shots: tuple[int, ...] = (1, 4),
    draws: int = 2,
    n_resamples: int = 40,
    failed: dict[str, str] | None = None,
    missing: tuple[str, ...] = (),
    classes: tuple[str, ...] = CLASSES,
    **settings: Any,
) -> dict[str, Any]:
    """Write the report and the tables of a study; what is better has more shots or comes later."""
    config = StudyConfig.from_mapping(
        {
            "data": "made cohort",
            "backbones": list(backbones),
            "methods": [
                {"name": "linear_probe", "label": name} if name not in KNOWN else name
                for name in methods
            ],
            "shots": list(shots),
            "draws": draws,
            "reference": methods[0],
            "n_resamples": n_resamples,
            **settings,
        }
    )
    known, failed = {}, failed or {}
    for cell in config.cells():
        if cell.name in failed:
            error = {"error": failed[cell.name], "traceback": None}
            write_json(folder / "cells" / cell.name / "failure.json", error)
        elif cell.name not in missing:
            place = methods.index(cell.method.name)
            skill = 0.3 + 0.25 * place + 0.2 * np.log2(cell.shots)
            known[cell.name] = made_outcome(
                cell.draw, skill, shots=cell.shots, classes=classes,
                seed=backbones.index(cell.backbone), labels=cell.shots * len(classes),
            )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    maps = [made_map(name, classes) for name in backbones]
    write_json(folder / "maps.json", {"kind": "maps", "maps": maps})
    return report_cells(config, folder, config.cells(), known)


KNOWN = ("linear_probe", "gda", "tip_adapter", "zero_shot", "lp_plus_plus", "tip_adapter_f")


def made_map(backbone: str, classes: tuple[str, ...] = CLASSES, n: int = 40) -> dict[str, Any]:
    """A map of features of so many images a class."""
    rng = np.random.default_rng(5)
    return {
        "backbone": backbone,
        "made_from": {},
        "explained": [0.31, 0.12],
        "n_images": 3 * n * len(classes),
        "n_shown": n * len(classes),
        "classes": [
            {
                "name": name,
                "n_shown": n,
                "images": (rng.normal(size=(n, 2)) / 4 + [np.cos(2 * k), np.sin(2 * k)])
                .round(4)
                .tolist(),
                "text": [round(0.5 * np.cos(2 * k), 4), round(0.5 * np.sin(2 * k), 4)],
            }
            for k, name in enumerate(classes)
        ],
        "note": "",
    }


# ------------------------------------------------------------------------- what a page states


def numbers_of_page(page: str) -> set[str]:
    """Numbers that a page states of its results: not its style, its axes and how it is read."""
    text = page[page.index("<main>") : page.index("<script>")]
    text = re.sub(r"<details.*?</details>|<dl>.*?</dl>|<footer>.*?</footer>", " ", text, flags=re.S)
    words = re.findall(r'aria-label="([^"]*)"', text)  # of charts, too
    text = re.sub(r"<svg.*?</svg>", " ", text, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", text) + " ".join(words))
    return set(re.findall(r"(?<![\w.])[-+]?\d[\d,.]*\d|(?<![\w.])\d", text))


def numbers_of_results(results: Any) -> set[str]:
    """Numbers of results in every form in which a page may state them."""
    forms = ("{:.3f}", "{:+.3f}", "{:.1f}", "{:g}", "{:,.0f}", "{:.3g}", "{:.2f}", "{}")
    known = {"95", "001", "0.001", "1"}  # the level; "p < .001"; the place of what costs nothing
    for value in leaves(results):
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int | float):
            known |= {form.format(value) for form in forms} | {f"{value:.0%}"[:-1]}
        else:
            known |= set(re.findall(r"\d[\d,.]*\d|\d", str(value)))
    return known | {sign + n for n in known for sign in "+-"}


def leaves(value: Any) -> Iterator[Any]:
    """Names and values of JSON."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    else:
        yield value
