"""Comparison of outlines: what few-shot classifiers gain from knowing where the glomerulus is.

`python -m hf_glovlm.lab.outline_study experiments/outline.yaml --root FOLDER --output-dir OUT` runs
what the file describes and writes `report.json` and `report.md`. Every rendering of the glomeruli
is encoded once, each method is fitted on it in every draw, and all predictions are kept: a run that
was stopped goes on where it was.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..data import draw_episode, load_episode
from ..data.folder import column
from ..environment import describe_environment
from ..errors import GloVLMError
from ..files import digest_value, write_json, write_text
from ..inference import FeatureCache, embed_images, predict, resolve_device
from ..inference.outlines import set_outline
from ..metrics import PairedRun, compute_metrics, paired_differences, recall_by_group
from ..rendering import group_unit
from ..settings import read_yaml
from ..training import AdaptConfig, adapt
from .outline_cells import (
    Cells,
    Draw,
    Floats,
    as_draw,
    choose_rule,
    choose_threshold,
    draw_supports,
    fit_cells,
    left_out_scores,
)
from .outline_report import render_report
from .outlined_crops import list_rows, place_sizes, read_glomeruli, render_crops

if TYPE_CHECKING:
    from datasets import Dataset

_NEEDED = (
    "purpose", "backbone", "data", "target", "seed", "bootstrap_seed", "resamples", "draws",
    "methods", "margins", "arms", "reference", "thresholds", "controls", "goals",
)  # fmt: skip
METRICS = ("macro_auc", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Arm:
    """Arm of the comparison: a rendering, and what the model sees of it.

    Attributes:
        name: In the report.
        outline: One of `model.outlines.OUTLINES`; `size` for the size in pixels alone.
        margin: Side of the square over the outline's longer side.
        shape: What stands in place of the outline, one of `outlined_crops.SHAPES`.
        support: Shape in the images that are learned from, where it is another.
    """

    name: str
    outline: str
    margin: float
    shape: str = "outline"
    support: str = ""

    @property
    def file(self) -> str:
        """Name of its file, without a suffix."""
        return f"{self.name} {self.margin:g}".replace(" ", "_").replace("%", "")


def embed_outlined(
    backbone: tuple[Any, Any], images: "Dataset", outline: str
) -> NDArray[np.float32]:
    """Features `[n, dim]` of outlined images, through the cache.

    Args:
        backbone: Model and processor; both are set to the outline.
        images: Rows of `render_crops`, with a column of labels.
        outline: One of `model.outlines.OUTLINES`.
    """
    model, processor = backbone
    set_outline(model, processor, AdaptConfig(outline=outline), images)  # type: ignore[arg-type]
    return embed_images(model, processor, images, cache=FeatureCache())


# ---------------------------------------------------------------------------------------- study


class Study:
    """A plan, its glomeruli, and what was computed of it.

    Args:
        plan: Content of the plan's file.
        root: Folder that its paths are relative to.
        output: Where predictions and report go.

    Raises:
        GloVLMError: The plan lacks something, or what `read_glomeruli` raises.
    """

    def __init__(self, plan: Mapping[str, Any], root: Path, output: Path) -> None:
        absent = [name for name in _NEEDED if name not in plan]
        if absent or not {"recipe", "candidates"} & {*plan}:
            needed = ", ".join(absent) or "a recipe, or candidates to choose it from"
            raise GloVLMError(f"The plan lacks {needed}; see experiments/outline.yaml.")
        self.plan, self.root, self.output = plan, root, output
        self.glomeruli = read_glomeruli(plan["data"], root)
        self.group_column = str(plan["data"]["group"])
        self.rows = list_rows(self.glomeruli, self.group_column)
        self.class_names: list[str] = self.rows.features["label"].names
        self.labels = np.asarray(column(self.rows, "label"), np.int64)
        self.groups = [item.group for item in self.glomeruli]
        self.stains = [item.stain for item in self.glomeruli]
        self.shots: list[int] = list(plan["draws"]["shots"])
        self.methods: list[str] = list(plan["methods"])
        self.seed: int = plan["seed"]
        self.digest = digest_value({k: plan[k] for k in ("data", "draws", "methods", "seed")})
        self._cells: dict[tuple[str, str], Cells] = {}
        self._features: dict[tuple[str, float, str], NDArray[np.float32]] = {}

    @cached_property
    def backbone(self) -> tuple[Any, Any]:
        """Model and processor."""
        return load_backbone(backbone_name(self.plan["backbone"], self.root))

    def arm(self, name: str, about: Mapping[str, Any], margin: float, chosen: str = "") -> Arm:
        """An arm as the plan describes it; `chosen` stands for the recipe's outline."""
        outline = str(about["outline"]).replace("chosen", chosen)
        return Arm(name, outline, margin, about.get("shape", "outline"), about.get("support", ""))

    def images(self, margin: float, shape: str = "outline") -> "Dataset":
        """Labelled images of all glomeruli, see `render_crops`."""
        images = render_crops(self.glomeruli, margin=margin, shape=shape, seed=self.seed)
        images = images.add_column("label", self.labels.tolist())
        return images.cast_column("label", self.rows.features["label"])

    def embed(self, outline: str, margin: float, shape: str) -> NDArray[np.float32]:
        """Features of all glomeruli, each rendering encoded once."""
        key = outline, margin, shape
        if key not in self._features:
            if outline == "size":
                self._features[key] = place_sizes(self.glomeruli).astype(np.float32)
                return self._features[key]
            self._features[key] = embed_outlined(self.backbone, self.images(margin, shape), outline)
        return self._features[key]

    def features(self, arm: Arm) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features `[n, dim]` as an arm learns from them and as it tests them."""
        query = self.embed(arm.outline, arm.margin, arm.shape)
        return (self.embed(arm.outline, arm.margin, arm.support) if arm.support else query), query

    @cached_property
    def populations(self) -> dict[str, tuple[list[Draw], int]]:
        """Draws by population: all groups, and all but those that the plan leaves out."""
        about = self.plan["draws"]
        drawn = {}
        for name, left_out in {"all": [], **about.get("without", {})}.items():
            kept = [i for i, group in enumerate(self.groups) if group not in set(left_out)]
            part, redrawn = draw_supports(
                self.rows.select(kept),
                [self.groups[i] for i in kept],
                shots=max(self.shots),
                seed=about["seed"],
                draws=about["count"],
                least=about["least_groups"],
            )
            place = np.array(kept, np.int64)
            draws = [
                Draw(d.number, tuple(place[rows] for rows in d.support), place[d.test])
                for d in part
            ]
            drawn[name] = draws, redrawn
        return drawn

    def cells(self, arm: Arm, population: str = "all") -> Cells:
        """Predictions of an arm, from its file where they are there."""
        key = arm.file, population
        if key not in self._cells:
            draws, _ = self.populations[population]
            self._cells[key] = self.fitted(arm, population, draws, self.methods, self.shots)
        return self._cells[key]

    def fitted(
        self,
        arm: Arm,
        folder: str,
        draws: Sequence[Draw],
        methods: Sequence[str],
        shots: Sequence[int],
    ) -> Cells:
        """Predictions of an arm on given draws, read or computed."""
        path = self.output / "cells" / folder.replace(" ", "_") / f"{arm.file}.parquet"
        cells = Cells.load(path, self.digest, draws)
        if cells is None:
            support, query = self.features(arm)
            cells = fit_cells(support, query, self.labels, draws, methods, shots, self.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            cells.save(path, self.digest)
            sys.stderr.write(f"{path.relative_to(self.output)}\n")
        return cells

    # ------------------------------------------------------------------------------ summaries

    def summarise(
        self, arm: Arm, reference: Arm | None, population: str = "all"
    ) -> list[dict[str, Any]]:
        """Rows of one arm: means over draws, and gains over a reference on the same draws."""
        cells = self.cells(arm, population)
        others = None if reference is None else self.cells(reference, population)
        return [
            {
                "arm": arm.name,
                "outline": arm.outline,
                "margin": arm.margin,
                "population": population,
                "method": method,
                "shots": shots,
                **self.means(cells.draws, values),
                "gain": others
                and self.gains(cells.draws, others.probabilities[method, shots], values),
            }
            for (method, shots), values in cells.probabilities.items()
        ]

    def means(self, draws: Sequence[Draw], values: Sequence[Floats]) -> dict[str, Any]:
        """Mean of each metric over draws, and its spread."""
        each = [
            compute_metrics(self.labels[draw.test], p, n_resamples=0)["metrics"]
            for draw, p in zip(draws, values, strict=True)
        ]
        points = {name: [row[name]["value"] for row in each] for name in METRICS}
        return {
            name: {"mean": fmean(of), "sd": float(np.std(of, ddof=1)) if len(of) > 1 else None}
            for name, of in points.items()
        }

    def gains(
        self, draws: Sequence[Draw], before: Sequence[Floats], after: Sequence[Floats]
    ) -> dict[str, Any]:
        """Paired differences, a bootstrap over groups crossed with draws."""
        runs = [
            PairedRun(i, self.labels[d.test], [self.groups[row] for row in d.test], a, b)
            for i, (d, a, b) in enumerate(zip(draws, before, after, strict=True))
        ]
        unit = group_unit(self.group_column)
        return paired_differences(
            runs, METRICS, self.plan["resamples"], self.plan["bootstrap_seed"], unit=unit
        )

    # --------------------------------------------------------------------------------- recipe

    def choose_recipe(self, arms: Sequence[Sequence[Arm]]) -> dict[str, Any]:
        """Recipe by the plan's rules.

        Args:
            arms: Candidates at each margin, the default margin first; in one order.

        Returns:
            `outline`: the highest macro-AUC over all methods, shots and draws at the first margin.
            `margin`: the first, unless another is better by `margin_gain` with that outline.
            `methods`: of each number of shots the highest. `threshold`, see `choose_rule`.
        """
        mean = {
            arm: {
                key: self.means(self.cells(arm).draws, values)["macro_auc"]["mean"]
                for key, values in self.cells(arm).probabilities.items()
            }
            for at_margin in arms
            for arm in at_margin
        }
        best, *others = max(zip(*arms, strict=True), key=lambda each: fmean(mean[each[0]].values()))
        for arm in others:
            least = fmean(mean[best].values()) + self.plan["margin_gain"]
            if fmean(mean[arm].values()) >= least:
                best = arm
        methods = {
            shots: max(self.methods, key=lambda method: mean[best][method, shots])
            for shots in self.shots
        }
        recipe = {"outline": best.outline, "margin": best.margin, "methods": methods}
        measured = self.thresholds(best, methods[max(self.shots)])
        return recipe | {"threshold": choose_rule(measured), "thresholds": measured}

    def thresholds(self, arm: Arm, method: str) -> dict[str, dict[str, Any]]:
        """What each rule of the plan gives at most shots, see `at_threshold`."""
        draws, _ = self.populations["all"]
        values = self.cells(arm).probabilities[method, max(self.shots)]
        return {
            rule: self.at_threshold(arm, method, rule, draws, values)
            for rule in self.plan["thresholds"]
        }

    def at_threshold(
        self, arm: Arm, method: str, rule: str, draws: Sequence[Draw], values: Sequence[Floats]
    ) -> dict[str, Any]:
        """Sensitivity and specificity for the target class at a threshold from the support.

        Each draw's threshold comes from its own support, every group of it left out in turn.

        Args:
            arm: The rendering.
            method: As it was fitted.
            rule: See `choose_threshold`.
            draws: The draws, at most shots.
            values: Probabilities `[test rows, K]` in each.
        """
        target = self.class_names.index(self.plan["target"])
        support, _ = self.features(arm)
        rows = []
        for draw, p in zip(draws, values, strict=True):
            scores, truth = left_out_scores(
                method, support, self.labels, self.groups, draw.first(max(self.shots)), target,
                self.seed,
            )  # fmt: skip
            limit = choose_threshold(scores, truth, rule)
            called = p.argmax(1) == target if limit is None else p[:, target] >= limit
            own = self.labels[draw.test] == target
            rows.append((float(called[own].mean()), float(1 - called[~own].mean())))
        sensitivity, specificity = np.array(rows).T
        return {
            "sensitivity": float(sensitivity.mean()),
            "sensitivity_sd": float(sensitivity.std(ddof=1)),
            "specificity": float(specificity.mean()),
            "specificity_sd": float(specificity.std(ddof=1)),
        }


# ------------------------------------------------------------------------------------------ run


def run_study(plan: Mapping[str, Any], root: Path, output: Path) -> dict[str, Any]:
    """Run a plan and write `report.json` and `report.md`.

    Args:
        plan: Content of experiments/outline.yaml or outline-confirmation.yaml.
        root: Folder that its paths are relative to.
        output: Where predictions and report go; finished parts of the same plan are kept.

    Returns:
        The report.

    Raises:
        GloVLMError: Data or plan are not as expected.
    """
    study = Study(plan, root, output)
    margins: list[float] = list(plan["margins"])
    only = {float(margin): names for margin, names in plan.get("only", {}).items()}
    arms = {
        (name, margin): study.arm(name, about, margin)
        for margin in margins
        for name, about in plan["arms"].items()
        if name in only.get(margin, plan["arms"])
    }
    if "recipe" in plan:
        methods = _by_number(plan["recipe"]["methods"])
        recipe: dict[str, Any] = {**plan["recipe"], "methods": methods}
    else:
        recipe = study.choose_recipe(
            [[arms[name, margin] for name in plan["candidates"]] for margin in margins]
        )
    outline, margin = recipe["outline"], recipe["margin"]
    reference = {m: arms[plan["reference"], m] for m in margins}
    best = next(
        arm
        for (_, m), arm in arms.items()
        if (arm.outline, m, arm.shape) == (outline, margin, "outline")
    )
    controls = {
        name: study.arm(name, about, margin, outline) for name, about in plan["controls"].items()
    }

    def compared_with(arm: Arm) -> Arm | None:
        """The reference at the same margin; of itself at another margin that at the recipe's."""
        other = reference[margin] if arm in reference.values() else reference[arm.margin]
        return None if arm == other else other

    results = [
        row
        for arm in [*arms.values(), *controls.values()]
        for row in study.summarise(arm, compared_with(arm))
    ]
    for population in list(study.populations)[1:]:
        for arm in (a for a in arms.values() if a.margin == margin):
            results += study.summarise(arm, compared_with(arm), population)
    last = max(study.shots)
    method = recipe["methods"][last]
    report = {
        "kind": "outlines",
        "purpose": plan["purpose"],
        "plan": digest_value(plan),
        "classes": {
            name: int((study.labels == k).sum()) for k, name in enumerate(study.class_names)
        },
        "unit": group_unit(study.group_column),
        "draws": {
            name: {"numbers": [d.number for d in draws], "passed_over": redrawn}
            for name, (draws, redrawn) in study.populations.items()
        },
        "seeds": {k: plan[k] for k in ("seed", "bootstrap_seed")}
        | {"draws": plan["draws"]["seed"]},
        "reference": plan["reference"],
        "best": best.name,
        "recipe": recipe,
        "results": results,
        "at_threshold": {
            arm.name: study.thresholds(arm, method) for arm in (reference[margin], best)
        },
        "stains": by_stain(study, best, method),
        "transfer": transfer(study, plan["transfer"], reference[margin], best, recipe)
        if "transfer" in plan
        else [],
        "frozen": against_frozen(study, plan["frozen"]) if "frozen" in plan else [],
        "tuned": tuned_rows(study, plan["tuned"], plan["tuned"]["margin"])
        if "tuned" in plan
        else [],
        "environment": describe_environment(resolve_device("cpu")),
    }
    report["goals"] = judge(report, plan["goals"])
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_report(report))
    return report


def _by_number(values: Mapping[Any, Any]) -> dict[int, Any]:
    """Values by number of shots; the keys of a YAML file are text."""
    return {int(key): value for key, value in values.items()}


def by_stain(study: Study, arm: Arm, method: str) -> list[dict[str, Any]]:
    """Recall of each class in each stain at most shots, mean over the draws that test it."""
    draws, _ = study.populations["all"]
    recalls: dict[tuple[str, str], list[float]] = {}
    for draw, p in zip(
        draws, study.cells(arm).probabilities[method, max(study.shots)], strict=True
    ):
        stains = [study.stains[row] for row in draw.test]
        for row in recall_by_group(study.labels[draw.test], p.argmax(1), stains, study.class_names):
            recalls.setdefault((row["group"], row["class"]), []).append(row["recall"])
    counts = {
        (stain, name): sum(
            s == stain and study.class_names[y] == name
            for s, y in zip(study.stains, study.labels, strict=True)
        )
        for stain, name in recalls
    }
    return [
        {"stain": stain, "class": name, "images": counts[stain, name], "recall": fmean(values)}
        for (stain, name), values in sorted(recalls.items())
    ]


def transfer(
    study: Study, about: Mapping[str, Any], reference: Arm, best: Arm, recipe: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Learned from one stain, tested on another: with all of its groups, and without some."""
    sides = ["train" if stain == about["train"] else "test" for stain in study.stains]
    rows = study.rows.add_column("split", sides)
    draws = [
        as_draw(
            number,
            (
                e := draw_episode(rows, shots=max(study.shots), seed=about["seed"], draw=number)
            ).support,
            np.array(e.test, np.int64),
            study.labels,
        )
        for number in range(study.plan["draws"]["count"])
    ]
    cells = {
        arm: study.fitted(arm, "transfer", draws, study.methods, study.shots)
        for arm in (reference, best)
    }
    tested = [study.groups[row] not in about["without"] for row in draws[0].test]
    parts = {
        "all": np.flatnonzero(np.ones(len(tested), bool)),
        f"without {', '.join(about['without'])}": np.flatnonzero(tested),
    }
    results = []
    for name, part in parts.items():
        sub = [Draw(d.number, d.support, d.test[part]) for d in draws]
        for shots in study.shots:
            method = recipe["methods"][shots]
            before, after = (
                [p[part] for p in cells[arm].probabilities[method, shots]]
                for arm in (reference, best)
            )
            for arm, values in ((reference, before), (best, after)):
                row = {
                    "tested": name,
                    "images": len(part),
                    "of_target": int(
                        (
                            study.labels[sub[0].test]
                            == study.class_names.index(study.plan["target"])
                        ).sum()
                    ),
                    "arm": arm.name,
                    "shots": shots,
                    "method": method,
                    **study.means(sub, values),
                    "gain": study.gains(sub, before, values) if arm is best else None,
                }
                if shots == max(study.shots):
                    row["at_threshold"] = study.at_threshold(
                        arm, method, recipe["threshold"], sub, values
                    )
                results.append(row)
    return results


def against_frozen(study: Study, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The frozen episodes beside figures that were found on them before."""
    path = study.root / about["episodes"]
    draws = []
    for number in range(about["draws"]):
        episode = load_episode(path, number, study.rows)
        test = np.array(episode.test, np.int64)
        draws.append(as_draw(number, episode.support, test, study.labels))
    results = []
    for name, arm_about in about["arms"].items():
        arm = study.arm(name, arm_about, about["margin"])
        cells = study.fitted(arm, "frozen", draws, [about["method"]], about["shots"])
        for (method, shots), values in cells.probabilities.items():
            before = _by_number(arm_about.get("before", {})).get(shots)
            row = {"arm": name, "method": method, "shots": shots, "before": before}
            results.append(row | study.means(draws, values))
    return results


# ------------------------------------------------------------------------ methods in the towers


def tune(study: Study, about: Mapping[str, Any], margin: float) -> Iterator[tuple[str, str, int]]:
    """Run what is missing of the methods that train inside the tower; they take minutes each.

    Yields:
        Method, outline and draw of each run that was done.
    """
    draws = study.populations["all"][0][: about["draws"]]
    images = study.images(margin)
    name = backbone_name(study.plan["backbone"], study.root)
    for draw in draws:
        for method in about["methods"]:
            for outline in about["outlines"]:
                path = _tuned_file(study, method, outline, margin, draw)
                if Cells.load(path, study.digest, [draw]) is not None:
                    continue
                model, processor = load_backbone(name)
                adapted = adapt(
                    model,
                    method,
                    images.select(draw.first(about["shots"]).tolist()),
                    processor=processor,
                    config={"outline": outline, "seed": study.seed},
                )
                tested = images.select(draw.test.tolist()).select_columns(["image"])
                p = predict(adapted.model, processor, tested).probabilities.astype(np.float64)
                path.parent.mkdir(parents=True, exist_ok=True)
                Cells([draw], {(method, about["shots"]): [p]}).save(path, study.digest)
                yield method, outline, draw.number


def backbone_name(given: str, root: Path) -> str:
    """A backbone's name; parts that are folders below the root are given by their path."""
    folders = [(root / part, part) for part in given.split("+")]
    return "+".join(str(folder) if folder.is_dir() else part for folder, part in folders)


def tuned_rows(study: Study, about: Mapping[str, Any], margin: float) -> list[dict[str, Any]]:
    """Summary of those runs that are there, and the gains of pooling."""
    draws = study.populations["all"][0][: about["draws"]]
    first = about["outlines"][0]
    results = []
    for method in about["methods"]:
        runs: dict[str, dict[int, Floats]] = {outline: {} for outline in about["outlines"]}
        for i, draw in enumerate(draws):
            for outline in about["outlines"]:
                path = _tuned_file(study, method, outline, margin, draw)
                cells = Cells.load(path, study.digest, [draw])
                if cells is not None:
                    runs[outline][i] = cells.probabilities[method, about["shots"]][0]
        for outline, values in runs.items():
            if not values:
                continue
            both = [i for i in values if i in runs[first]]
            row = {"method": method, "outline": outline, "shots": about["shots"]}
            row |= {"draws": len(values)}
            row |= study.means([draws[i] for i in values], list(values.values()))
            row["gain"] = None
            if outline != first and both:
                sides = ([runs[o][i] for i in both] for o in (first, outline))
                row["gain"] = study.gains([draws[i] for i in both], *sides)
            results.append(row)
    return results


def _tuned_file(study: Study, method: str, outline: str, margin: float, draw: Draw) -> Path:
    name = f"{method}_{outline}_{margin:g}_draw-{draw.number}.parquet"
    return study.output / "cells" / "tuned" / name


# ---------------------------------------------------------------------------------------- goals


def judge(report: Mapping[str, Any], goals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Goals with what was found, met or missed.

    Args:
        report: With `results`, `recipe`, `at_threshold`.
        goals: `macro_auc` (least by shots, of the recipe's methods), `sensitivity` (least, at the
            recipe's threshold), `gain_at` (shots at which the recipe's interval must exclude 0),
            `gains` (found before: `arm`, `method`, `shots`, `value`, `ci95`; found again if the
            gain is at least the interval's lower end and its own interval excludes 0).
    """
    recipe, judged = report["recipe"], []

    def row(arm: str, method: str, shots: int) -> Mapping[str, Any]:
        return next(
            row
            for row in report["results"]
            if (row["arm"], row["margin"], row["population"]) == (arm, recipe["margin"], "all")
            and (row["method"], row["shots"]) == (method, shots)
        )

    def add(goal: str, value: float, least: str, met: bool, ci95: Any = None) -> None:
        row_of = {"goal": goal, "value": value, "ci95": ci95, "least": least, "met": bool(met)}
        judged.append(row_of)

    for shots, least in _by_number(goals.get("macro_auc", {})).items():
        method = recipe["methods"][shots]
        value = row(report["best"], method, shots)["macro_auc"]["mean"]
        add(f"macro-AUC, {method}, {_labels(shots)}", value, f"{least}", value >= least)
    if "sensitivity" in goals:
        value = report["at_threshold"][report["best"]][recipe["threshold"]]["sensitivity"]
        name = f"sensitivity at the threshold from the support ({recipe['threshold']})"
        add(name, value, f"{goals['sensitivity']}", value >= goals["sensitivity"])
    if "gain_at" in goals:
        shots = goals["gain_at"]
        method = recipe["methods"][shots]
        gain = row(report["best"], method, shots)["gain"]["macro_auc"]
        name = f"gain in macro-AUC, {report['best']}, {method}, {_labels(shots)}"
        add(name, gain["value"], "interval above 0", gain["ci95"][0] > 0, gain["ci95"])
    for before in goals.get("gains", []):
        arm, method, shots = before["arm"], before["method"], before["shots"]
        gain = row(arm, method, shots)["gain"]["macro_auc"]
        low, high = before["ci95"]
        name = f"gain found again: {arm}, {method}, {_labels(shots)}"
        known = f"{before['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        least = f"{low:+.3f}, interval above 0 (before: {known})"
        met = gain["value"] >= low and gain["ci95"][0] > 0
        add(name, gain["value"], least, met, gain["ci95"])
    return judged


def _labels(shots: int) -> str:
    return "1 label a class" if shots == 1 else f"{shots} labels a class"


def main() -> None:
    """Run a plan, or the methods inside the tower that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="Folder with data and models.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--tune", action="store_true", help="Run the methods inside the tower, minutes each."
    )
    given = parser.parse_args()
    plan = read_yaml(given.file)
    if not given.tune:
        run_study(plan, given.root, given.output_dir)
        return
    study = Study(plan, given.root, given.output_dir)
    for method, outline, draw in tune(study, plan["tuned"], plan["tuned"]["margin"]):
        sys.stderr.write(f"{method}, {outline}, draw {draw}\n")


if __name__ == "__main__":
    main()
