"""A finder's polygons in place of human outlines: percentages of a class, gain of the outline.

Two measurements on the same slides: the percentage of the class, read from what a finder found on a
slide that it has not seen; and the gain of a rendering with the found outline over the same square
without it, on those glomeruli that were found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import PairedRun, compute_metrics, paired_differences
from ..slides.finder.tokens import TokenEncoder
from .detected_glomeruli import DetectedDraw, as_glomerulus, detect_in_folds, link_outlines
from .outline_cells import draw_supports, fit_cells
from .outlined_crops import list_rows, picture_file
from .outlined_regions import StudyRegion, read_regions
from .sclerosis_arms import Arm, Labelled, read_arm
from .slide_percentages import Percentages, crossed_mean, gather, summarise
from .token_store import TokenFolder

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Features = NDArray[np.float32]

# How a classifier learns and is tested: on polygons found, or on human outlines.
ROADS = {
    "found": ("found", "found"),
    "human, tested on found": ("human", "found"),
    "human": ("human", "human"),
}


@dataclass(frozen=True, eq=False)
class _Outlines:
    """All human outlines of all regions, those cut by the border too.

    Attributes:
        label: 1 for the class in question, `[n]`.
        slide: Of each.
        row: In the table of labelled glomeruli, -1 where it has none.
        start: Number of each region's first outline.
    """

    label: Ints
    slide: NDArray[np.object_]
    row: Ints
    start: Ints


class DetectedStudy:
    """A plan's regions, what finders find on them, and features of both.

    Args:
        study: The labelled glomeruli, and the plan: its `finder` describes regions and finders.
        output: Where what was found is kept.
    """

    def __init__(self, study: Labelled, output: Path) -> None:
        self.study, self.about = study, study.plan["finder"]
        self.regions = read_regions(self.about["data"], study.root)
        encoder = TokenEncoder(*study.backbone, store=TokenFolder(output / "tokens"))
        self.draws = [
            detect_in_folds(self.regions, self.about, number, encoder, output / "detected")
            for number in range(self.about["draws"])
        ]
        self.outlines = self._all_outlines()
        self._features: dict[tuple[str, int], Features] = {}

    def _all_outlines(self) -> _Outlines:
        links = link_outlines(self.study.glomeruli, self.regions)
        sizes = [len(item.region.polygons) for item in self.regions]
        labels = [label for item in self.regions for label in item.region.labels]
        groups = [item.region.group for item in self.regions]
        return _Outlines(
            np.array([label == self.study.plan["target"] for label in labels], np.int64),
            np.repeat(np.array(groups, object), sizes),
            np.concatenate(links),
            np.cumsum([0, *sizes[:-1]]),
        )

    @property
    def truth(self) -> Floats:
        """Per cent of the class among all human outlines of each tested slide."""
        own = self.outlines
        return np.array([100 * own.label[own.slide == s].mean() for s in self.study.tested])

    def _drawn(self, region: StudyRegion, polygons: Any, name: str) -> Any:
        about = region.region
        picture = picture_file(self.study.root / self.about["data"]["pictures"], about.name)
        return as_glomerulus(
            polygons, name=name, label="", group=about.group, stain=about.stain, picture=picture
        )

    def objects(self, outline: str, number: int) -> Features:
        """Features `[objects, dim]` of what was found in one draw."""
        key = outline, number
        if key not in self._features:
            drawn = [
                self._drawn(self.regions[o.region], ((o.detection.ring,),), str(i))
                for i, o in enumerate(self.draws[number].objects)
            ]
            self._features[key] = self.study.embed(drawn, outline)
        return self._features[key]

    def human(self, outline: str) -> Features:
        """Features of all human outlines; those of the table are encoded once."""
        key = outline, -1
        if key not in self._features:
            table = self.study.features(outline)
            rows = self.outlines.row
            every = [(item, one) for item in self.regions for one in item.region.polygons]
            others = np.flatnonzero(rows < 0)
            values = table[rows]
            if len(others):
                drawn = [self._drawn(*every[i], str(i)) for i in others]
                values[others] = self.study.embed(drawn, outline)
            self._features[key] = values
        return self._features[key]

    def slide_of(self, number: int) -> NDArray[np.object_]:
        """Slide of each object of one draw."""
        groups = [item.region.group for item in self.regions]
        return np.array([groups[o.region] for o in self.draws[number].objects], object)

    def outline_of(self, number: int) -> Ints:
        """Number among all outlines that each object of one draw matches, -1 for none."""
        return np.array(
            [
                self.outlines.start[o.region] + o.outline if o.outline >= 0 else -1
                for o in self.draws[number].objects
            ],
            np.int64,
        )

    def recall(self, slide: str, number: int) -> tuple[list[int], list[int]]:
        """Objects of the rest and of the class that the slide's finder found, and of how many."""
        hits, of = [0, 0], [0, 0]
        for name, (n_hits, n_of) in self.draws[number].recall[slide].items():
            k = int(name == self.study.plan["target"])
            hits[k] += n_hits
            of[k] += n_of
        return hits, of


# --------------------------------------------------------------------------------- percentages


def measure_percentages(detected: DetectedStudy, arm: Arm, estimate: str) -> dict[str, Any]:
    """Percentages of an arm, learned from human outlines, on human outlines and on found ones.

    The truth is over all human outlines, those cut by the border too.

    Args:
        detected: The study.
        arm: What the model sees, and the method.
        estimate: Of the recipe, for what finding adds to its error.

    Returns:
        `outline`, `method`; `read`: of each set of objects what `summarise` says; `cost`: mean
        absolute error on found objects with the finder's recall, minus that on all human outlines.
    """
    study, n = detected.study, len(detected.draws)
    own = detected.outlines
    slides = [detected.slide_of(number) for number in range(n)]
    matched = [detected.outline_of(number) >= 0 for number in range(n)]
    readings = read_arm(
        study,
        arm,
        {
            "all human outlines": lambda s, _: detected.human(arm.outline)[own.slide == s],
            "found": lambda s, d: detected.objects(arm.outline, d % n)[slides[d % n] == s],
            "found, those that match": lambda s, d: detected.objects(arm.outline, d % n)[
                (slides[d % n] == s) & matched[d % n]
            ],
        },
    )
    count = study.plan["draws"]["count"]
    shares = [[detected.recall(s, d % n) for d in range(count)] for s in study.tested]
    recall = tuple(np.array([[pair[i] for pair in row] for row in shares]) for i in (0, 1))
    seed = study.plan["seed"]
    sets: dict[str, Percentages] = {
        name: gather(values, 1, seed=seed) for name, values in readings.items()
    }
    sets["found, with the finder's recall"] = gather(
        readings["found"], 1, recall=(recall[0], recall[1]), seed=seed
    )
    resamples, bootstrap_seed = study.plan["resamples"], study.plan["bootstrap_seed"]
    true = detected.truth[:, None]
    error = {name: np.abs(values.percent[estimate] - true) for name, values in sets.items()}
    return {
        "outline": arm.outline,
        "method": arm.method,
        "read": {
            name: summarise(values, detected.truth, resamples, bootstrap_seed)
            for name, values in sets.items()
        },
        "cost": crossed_mean(
            error["found, with the finder's recall"] - error["all human outlines"],
            resamples,
            bootstrap_seed,
        ),
        "slides": [
            {
                "slide": slide,
                "truth": float(detected.truth[i]),
                "outlines": int((own.slide == slide).sum()),
                "objects": fmean(int((of == slide).sum()) for of in slides),
                **{name: _mean_of(values.percent[estimate][i]) for name, values in sets.items()},
            }
            for i, slide in enumerate(study.tested)
        ],
    }


def _mean_of(values: Floats) -> float | None:
    """Mean of what is there, `None` without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def finder_alone(detected: DetectedStudy) -> dict[str, Any]:
    """Error of the percentage where every found object is called as the outline it matches.

    What is found without matching has no class and is left out: what remains is what is missed.
    """
    values = np.full((len(detected.study.tested), len(detected.draws)), np.nan)
    for number in range(len(detected.draws)):
        slide, outline = detected.slide_of(number), detected.outline_of(number)
        for i, name in enumerate(detected.study.tested):
            rows = outline[(slide == name) & (outline >= 0)]
            if len(rows):
                values[i, number] = 100 * detected.outlines.label[rows].mean()
    deviation = values - detected.truth[:, None]
    seeds = detected.study.plan["resamples"], detected.study.plan["bootstrap_seed"]
    return {
        "error": crossed_mean(np.abs(deviation), *seeds),
        "bias": crossed_mean(deviation, *seeds),
    }


def describe_draw(draw: DetectedDraw) -> dict[str, Any]:
    """What the finders of a draw found, in numbers."""
    matched = [one.iou for one in draw.objects if one.outline >= 0]
    return {
        **draw.agreement.describe(),
        "iou": fmean(matched) if matched else None,
        "thresholds": draw.thresholds,
        "learned_from": draw.learned_from,
    }


# ---------------------------------------------------------------------------------------- gain


def measure_gain(detected: DetectedStudy, about: Mapping[str, Any]) -> dict[str, Any]:
    """Gain of the outline on the labelled glomeruli that were found, paired on the same draws.

    Args:
        detected: The study.
        about: `seed`, `count` (draws over all finder draws), `least_groups`, `methods` (by shots),
            `reference` and `outline` (renderings).

    Returns:
        `glomeruli` of each finder draw; `least`: slides that hold the rarer class, where they are
        too few for any draw; `results`: rows of `road` (see ROADS), `outline`, `shots`,
        `method`, `macro_auc`, `balanced_accuracy`, and `gain` over the reference on the same road;
        `against_human`: the gain of each road over human outlines with the same rendering.
    """
    study = detected.study
    methods = {int(shots): method for shots, method in about["methods"].items()}
    outlines = [about["reference"], about["outline"]]
    values: dict[tuple[str, str, int], list[Floats]] = {}
    tested: list[tuple[Ints, list[str]]] = []
    glomeruli = []
    for number in range(len(detected.draws)):
        rows, objects = _labelled_objects(detected, number)
        glomeruli.append(len(rows))
        groups = [study.groups[row] for row in rows]
        labels = study.labels[rows]
        held = min(len({g for g, y in zip(groups, labels, strict=True) if y == k}) for k in (0, 1))
        if held < 2 * about["least_groups"]:
            return {"glomeruli": glomeruli, "least": held, "results": []}
        draws, _ = draw_supports(
            list_rows(
                [replace(study.glomeruli[row], label=str(study.labels[row])) for row in rows],
                study.plan["data"]["group"],
            ),
            groups,
            shots=max(methods),
            seed=about["seed"] + number,
            draws=about["count"] // len(detected.draws),
            least=about["least_groups"],
        )
        tested += [(labels[draw.test], [groups[i] for i in draw.test]) for draw in draws]
        for outline in outlines:
            seen = {
                "human": study.features(outline)[rows],
                "found": detected.objects(outline, number)[objects],
            }
            for road, (support, query) in ROADS.items():
                for shots, method in methods.items():
                    cells = fit_cells(
                        seen[support], seen[query], labels, draws, [method], [shots],
                        study.plan["seed"],
                    )  # fmt: skip
                    values.setdefault((road, outline, shots), []).extend(
                        cells.probabilities[method, shots]
                    )

    def gain(before: Sequence[Floats], after: Sequence[Floats]) -> dict[str, Any]:
        runs = [
            PairedRun(i, labels, groups, a, b)
            for i, ((labels, groups), a, b) in enumerate(zip(tested, before, after, strict=True))
        ]
        seeds = study.plan["resamples"], study.plan["bootstrap_seed"]
        return paired_differences(runs, ("macro_auc", "balanced_accuracy"), *seeds, unit="slides")

    return {
        "glomeruli": glomeruli,
        "results": [
            {
                "road": road,
                "outline": outline,
                "shots": shots,
                "method": methods[shots],
                **_means(tested, of),
                "gain": gain(values[road, outlines[0], shots], of)
                if outline != outlines[0]
                else None,
                "against_human": gain(values["human", outline, shots], of)
                if road != "human"
                else None,
            }
            for (road, outline, shots), of in values.items()
        ],
    }


def _labelled_objects(detected: DetectedStudy, number: int) -> tuple[Ints, Ints]:
    """Rows of the table that were found in one draw, and the objects that they are."""
    outline = detected.outline_of(number)
    row = np.where(outline >= 0, detected.outlines.row[outline], -1)
    objects = np.flatnonzero(row >= 0)
    order = np.argsort(row[objects])
    return row[objects][order], objects[order]


def _means(tested: Sequence[tuple[Ints, list[str]]], values: Sequence[Floats]) -> dict[str, float]:
    """Mean of each metric over draws."""
    each = [
        compute_metrics(labels, p, n_resamples=0)["metrics"]
        for (labels, _), p in zip(tested, values, strict=True)
    ]
    names = ("macro_auc", "balanced_accuracy")
    return {name: fmean(row[name]["value"] for row in each) for name in names}


def measure_detected(detected: DetectedStudy, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All measurements on what finders found.

    Args:
        detected: Of a plan with `finder` and `gain`.
        recipe: `method`, `estimate`.
    """
    study = detected.study
    whole = not study.plan.get("pools")  # a pool has no regions and no finder of its own
    own = detected.outlines
    return {
        "head": detected.about["head"],
        "regions": len(detected.regions),
        "learned_from": detected.about["regions"],
        "folds": detected.about["folds"],
        "outlines": {
            "all": len(own.label),
            "of the class": int(own.label.sum()),
            "cut": detected.draws[0].agreement.cut.of,
            "two that touch": int(sum(sum(item.merged) for item in detected.regions)),
            "in the table": int((own.row >= 0).sum()),
        },
        "draws": [describe_draw(draw) for draw in detected.draws],
        "finder_alone": finder_alone(detected) if whole else None,
        "percentages": [
            measure_percentages(detected, Arm(outline, recipe["method"]), recipe["estimate"])
            for outline in (study.plan["outlines"] if whole else [])
        ],
        "gain": measure_gain(detected, study.plan["gain"]),
    }
