"""Percentage of globally sclerotic glomeruli per slide, from a few labels of other slides.

`python -m hf_glovlm.lab.sclerosis_study experiments/sclerosis.yaml --root FOLDER --output-dir OUT`
runs what the file describes and writes `report.json` and `report.md`: every slide (or pool of
patients) is left out in turn, a classifier learns from a few outlined glomeruli of the others, and
reads the percentage. Where the plan has a finder, its polygons stand in place of the outlines, see
`found_study`.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..environment import describe_environment
from ..errors import GloVLMError
from ..files import digest_value, write_json, write_text
from ..inference import resolve_device
from ..settings import read_yaml
from .counting import draw_support
from .outline_study import backbone_name, embed_outlined
from .outlined_crops import Glomerulus, read_glomeruli, render_crops
from .sclerosis_report import render_report
from .slide_percentages import ESTIMATES, Learned, Reading, gather, learn, read, summarise

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NEEDED = (
    "purpose", "backbone", "data", "target", "seed", "bootstrap_seed", "resamples", "draws",
    "margin", "outlines", "methods", "goals",
)  # fmt: skip
REST = "other"  # every class but the one in question


# ---------------------------------------------------------------------------------------- study


class Labelled:
    """Labelled outlined glomeruli of a plan, in two classes, and the slides that are left out.

    Args:
        plan: Content of the plan's file.
        root: Folder that its paths are relative to.

    Attributes:
        glomeruli: As they are drawn.
        labels: 1 for the class in question, `[n]`.
        groups: Slide or patient of each; a support is spread over these.
        slides: What is left out in turn: the group, or the pool of patients that it is in.
        tested: Slides with objects enough, sorted.

    Raises:
        GloVLMError: The plan lacks something, or what `read_glomeruli` raises.
    """

    def __init__(self, plan: Mapping[str, Any], root: Path) -> None:
        absent = [name for name in _NEEDED if name not in plan]
        if absent or not {"recipe", "candidates"} & {*plan}:
            needed = ", ".join(absent) or "a recipe, or candidates to choose it from"
            raise GloVLMError(f"The plan lacks {needed}; see experiments/sclerosis.yaml.")
        self.plan, self.root = plan, root
        self.glomeruli = read_glomeruli(plan["data"], root)
        names = {item.label for item in self.glomeruli}
        if plan["target"] not in names:
            raise GloVLMError(f"Expected the class '{plan['target']}', found {sorted(names)}.")
        self.labels = np.array([g.label == plan["target"] for g in self.glomeruli], np.int64)
        self.groups = [item.group for item in self.glomeruli]
        self.slides = np.array(pool_groups(self.groups, plan.get("pools")), object)
        sizes = Counter(self.slides.tolist())
        least = plan["draws"]["least_objects"]
        self.tested = sorted(slide for slide, n in sizes.items() if n >= least)
        self._features: dict[str, NDArray[np.float32]] = {}

    @cached_property
    def backbone(self) -> tuple[Any, Any]:
        """Model and processor."""
        return load_backbone(backbone_name(self.plan["backbone"], self.root))

    def embed(self, glomeruli: Sequence[Glomerulus], outline: str) -> NDArray[np.float32]:
        """Features `[n, dim]` of glomeruli as outlined squares, through the cache."""
        from datasets import ClassLabel

        images = render_crops(glomeruli, margin=self.plan["margin"])
        images = images.add_column("label", [0] * len(images))
        images = images.cast_column("label", ClassLabel(names=[REST, self.plan["target"]]))
        return embed_outlined(self.backbone, images, outline)

    def features(self, outline: str) -> NDArray[np.float32]:
        """Features of the labelled glomeruli."""
        if outline not in self._features:
            self._features[outline] = self.embed(self.glomeruli, outline)
        return self._features[outline]

    def support(self, slide: str, draw: int) -> Ints:
        """Rows of one label draw, from other slides than the one that is tested."""
        about = self.plan["draws"]
        return draw_support(
            self.labels,
            self.groups,
            np.asarray(self.slides == slide, bool),
            [REST, self.plan["target"]],
            shots=about["shots"],
            seed=about["seed"],
            draw=draw,
        )

    def learn(self, outline: str, method: str, slide: str, draw: int) -> Learned:
        """Classifier of one label draw, from human outlines."""
        rows = self.support(slide, draw)
        seed = self.plan["seed"]
        return learn(method, self.features(outline), self.labels, self.groups, rows, 1, seed)

    @property
    def truth(self) -> Floats:
        """Per cent of the class among the labelled glomeruli of each tested slide."""
        return np.array([100 * self.labels[self.slides == slide].mean() for slide in self.tested])


def pool_groups(groups: Sequence[str], about: Mapping[str, int] | None) -> list[str]:
    """Pool of each row: groups shuffled and dealt in turn; the group itself where there is no plan.

    Args:
        groups: Patient or slide of each row.
        about: `count` of the pools and `seed`.
    """
    if about is None:
        return list(groups)
    names = np.array(sorted(set(groups)), object)
    np.random.default_rng(about["seed"]).shuffle(names)
    pool = {name: f"pool {i % about['count'] + 1:02d}" for i, name in enumerate(names.tolist())}
    return [pool[group] for group in groups]


@dataclass(frozen=True)
class Arm:
    """What the model sees of the outline, and the method that learns from it."""

    outline: str
    method: str


Readings = list[list[Reading | None]]


def read_arm(
    study: Labelled, arm: Arm, queries: Mapping[str, Callable[[str, int], NDArray[Any]]]
) -> dict[str, Readings]:
    """Read every tested slide by every draw's classifier.

    Args:
        study: The labelled glomeruli.
        arm: What is learned, from human outlines.
        queries: By name the features `[m, dim]` of a slide's objects, by its name and the draw.

    Returns:
        `[slides][draws]` by name of the query.
    """
    readings: dict[str, Readings] = {name: [] for name in queries}
    for slide in study.tested:
        learned = [
            study.learn(arm.outline, arm.method, slide, draw)
            for draw in range(study.plan["draws"]["count"])
        ]
        for name, features in queries.items():
            readings[name].append(
                [read(each, features(slide, draw), 1) for draw, each in enumerate(learned)]
            )
    return readings


def measure_human(study: Labelled, arm: Arm) -> dict[str, Any]:
    """Errors and coverage of an arm with human outlines, see `summarise`."""
    features = study.features(arm.outline)
    own = {slide: features[study.slides == slide] for slide in study.tested}
    readings = read_arm(study, arm, {"human": lambda slide, _: own[slide]})["human"]
    found = gather(readings, 1, seed=study.plan["seed"])
    result = summarise(found, study.truth, study.plan["resamples"], study.plan["bootstrap_seed"])
    means = {name: values.mean(axis=1).tolist() for name, values in found.percent.items()}
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
        output: Where the report goes.

    Returns:
        The report.

    Raises:
        GloVLMError: Data or plan are not as expected.
    """
    study = Labelled(plan, root)
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
