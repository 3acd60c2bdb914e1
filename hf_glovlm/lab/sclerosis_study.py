"""Percentage of globally sclerotic glomeruli per slide, from a few labels of other slides.

`python -m hf_glovlm.lab.sclerosis_study experiments/sclerosis.yaml --root FOLDER --output-dir OUT`
runs what the file describes and writes `report.json` and `report.md`: every slide (or pool of
patients) is left out in turn, a classifier learns from a few outlined glomeruli of the others, and
reads the percentage. Where the plan has a finder, its polygons stand in place of the outlines, see
`detected_study`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..environment import describe_environment
from ..files import digest_value, write_json, write_text
from ..inference import resolve_device
from ..settings import read_yaml
from .detected_study import DetectedStudy, measure_detected
from .sclerosis_arms import Arm, Labelled, read_arm
from .sclerosis_report import render_report
from .slide_percentages import ESTIMATES, gather, summarise

# ------------------------------------------------------------------------------- human outlines


def measure_human(study: Labelled, arm: Arm) -> dict[str, Any]:
    """Errors and coverage of an arm with human outlines, see `summarise`."""
    features = study.features(arm.outline)
    own = {slide: features[study.slides == slide] for slide in study.tested}
    readings = read_arm(study, arm, {"human": lambda slide, _: own[slide]})["human"]
    estimated = gather(readings, 1, seed=study.plan["seed"])
    result = summarise(
        estimated, study.truth, study.plan["resamples"], study.plan["bootstrap_seed"]
    )
    means = {name: values.mean(axis=1).tolist() for name, values in estimated.percent.items()}
    return {
        "outline": arm.outline,
        "method": arm.method,
        **result,
        "slides": [
            {
                "slide": slide,
                "n": int((study.slides == slide).sum()),
                "truth": float(study.truth[i]),
                **{name: values[i] for name, values in means.items()},
            }
            for i, slide in enumerate(study.tested)
        ],
    }


# ------------------------------------------------------------------------------------------ run


def choose_recipe(plan: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recipe by the plan's rules: the least mean absolute error, else the simpler estimate.

    Args:
        plan: With `candidates` (`outlines`, `methods`, `estimates`) and `simpler_within` in points:
            the counted percentage stands unless another is better by more, with its method.
        results: Of `measure_human`.
    """
    about = plan["candidates"]
    errors = {
        (row["outline"], row["method"], each["estimate"]): each["error"]["value"]
        for row in results
        for each in row["estimates"]
        if row["outline"] in about["outlines"]
        and row["method"] in about["methods"]
        and each["estimate"] in about["estimates"]
    }
    best = min(errors, key=errors.__getitem__)
    counted = min((key for key in errors if key[2] == "counted"), key=errors.__getitem__)
    if errors[counted] <= errors[best] + plan["simpler_within"]:
        best = counted
    return dict(zip(("outline", "method", "estimate"), best, strict=True))


def judge(
    results: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], goals: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Goals with what was found, met or missed.

    Args:
        results: Of `measure_human`.
        recipe: `outline`, `method`, `estimate`.
        goals: `error` and `bias` at most in points; `coverage` of the printed interval at least.
    """
    row = next(r for r in results if all(r[key] == recipe[key] for key in ("outline", "method")))
    own = next(each for each in row["estimates"] if each["estimate"] == recipe["estimate"])
    printed = next(each for each in row["intervals"] if each["interval"] == "printed")
    judged = []
    for name, entry in (
        ("error", own["error"]), ("bias", own["bias"]), ("coverage", printed["coverage"])
    ):  # fmt: skip
        if name in goals:
            value, goal = entry["value"], goals[name]
            met = value >= goal if name == "coverage" else abs(value) <= goal
            judged.append({"goal": name, **entry, "limit": goal, "met": bool(met)})
    return judged


def run_study(plan: Mapping[str, Any], root: Path, output: Path) -> dict[str, Any]:
    """Run a plan and write `report.json` and `report.md`.

    Args:
        plan: Content of experiments/sclerosis.yaml or sclerosis-confirmation.yaml.
        root: Folder that its paths are relative to.
        output: Where the report goes; what finders found is kept there.

    Returns:
        The report.

    Raises:
        GloVLMError: Data or plan are not as expected.
    """
    study = Labelled(plan, root)
    detected = DetectedStudy(study, output) if "finder" in plan else None
    arms = [Arm(outline, method) for outline in plan["outlines"] for method in plan["methods"]]
    human = [measure_human(study, arm) for arm in arms]
    recipe = dict(plan["recipe"]) if "recipe" in plan else choose_recipe(plan, human)
    report: dict[str, Any] = {
        "kind": "sclerosis",
        "purpose": plan["purpose"],
        "plan": digest_value(plan),
        "target": plan["target"],
        "slides": len(study.tested),
        "objects": {
            "of the class": int(study.labels.sum()),
            "all": len(study.labels),
            "on the tested slides": int(np.isin(study.slides, study.tested).sum()),
        },
        "pooled": plan.get("pools"),
        "draws": dict(plan["draws"]),
        "seeds": {key: plan[key] for key in ("seed", "bootstrap_seed")},
        "estimates": ESTIMATES,
        "recipe": recipe,
        "human": human,
        "goals": judge(human, recipe, plan["goals"]),
        "detected": None if detected is None else measure_detected(detected, recipe),
        "environment": describe_environment(resolve_device("cpu")),
    }
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_report(report))
    return report


def main() -> None:
    """Run a plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="Folder with data and models.")
    parser.add_argument("--output-dir", type=Path, required=True)
    given = parser.parse_args()
    run_study(read_yaml(given.file), given.root, given.output_dir)


if __name__ == "__main__":
    main()
