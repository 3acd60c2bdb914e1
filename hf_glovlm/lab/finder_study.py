"""Comparison of finders: glomeruli found from a few outlined regions, in other patients.

`python -m hf_glovlm.lab.finder_study experiments/finder.yaml --root FOLDER --output-dir OUT` runs
what the file describes and writes `report.json` and `report.md`. Each picture is encoded once, each
arm is fitted in every draw, and all that it finds is kept: a run that was stopped goes on where it
was.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
import shapely
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..data import open_image
from ..environment import describe_environment
from ..errors import GloVLMError, nearest
from ..files import digest_value, read_json, write_json, write_text
from ..inference import resolve_device
from ..intervals import fraction_interval
from ..settings import read_yaml
from ..slides.files.wsi import open_slide
from ..slides.finder.agreement import Agreement, is_cut, match_detections, to_shape
from ..slides.finder.learning import Finder, LeftOut, choose_threshold, leave_groups_out
from ..slides.finder.regions import Detection
from ..slides.finder.tokens import TokenEncoder
from .count_ratios import CountedRun, mean_ratio, paired_ratio
from .finder_report import render_report
from .outlined_crops import SUFFIXES
from .outlined_regions import StudyRegion, read_regions
from .token_store import TokenFolder

_NEEDED = (
    "purpose", "backbone", "data", "seed", "bootstrap_seed", "resamples", "draws", "thresholds",
    "arms", "references", "best", "goals",
)  # fmt: skip
LEFT_OUT = "left out"  # a threshold chosen on groups left out
MOST_DRAWS = 10_000  # numbers of draws that are tried
_IGNORED = 0.5  # part of a detection inside a merged outline, from which it counts nowhere
# Numerator and denominator of each ratio, in columns of a tally.
RATIOS = {
    "f1": (("hits", "hits"), ("hits", "hits", "false", "missed")),
    "precision": (("hits",), ("hits", "false")),
    "recall": (("hits",), ("hits", "missed")),
}
Tally: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Draw:
    """Draw of regions: which are learned from, the first ones where fewer are asked for.

    Attributes:
        number: Of the draw under the plan's seed.
        support: Numbers of regions, as many groups as there are before one comes again.
        test: Numbers of all regions of other groups.
    """

    number: int
    support: tuple[int, ...]
    test: tuple[int, ...]


def draw_regions(
    regions: Sequence[StudyRegion], *, seed: int, draws: int, most: int, least: int
) -> tuple[list[Draw], int]:
    """Draw outlined regions of half of the groups; the regions of the others are tested.

    A region to learn from has an outline, and none around two glomeruli. Draws are numbered from 0;
    those with fewer than `least` groups of a class on the test side, or with fewer regions to learn
    from, are passed over.

    Args:
        regions: All of them.
        seed: Of the draws.
        draws: How many to keep.
        most: Regions to learn from.
        least: Groups of each class on the test side.

    Returns:
        The draws, and how many were passed over.

    Raises:
        GloVLMError: There are not so many among the first 10,000.
    """
    groups = sorted({item.region.group for item in regions})
    of_group: dict[str, list[int]] = {group: [] for group in groups}
    holders: dict[str, set[str]] = {}
    for number, item in enumerate(regions):
        of_group[item.region.group].append(number)
        for label in item.region.labels:
            holders.setdefault(str(label), set()).add(item.region.group)
    kept: list[Draw] = []
    for number in range(MOST_DRAWS):
        rng = np.random.default_rng([seed, number])
        order = [groups[k] for k in rng.permutation(len(groups))]
        pool, tested = order[: len(groups) // 2], set(order[len(groups) // 2 :])
        queues = [
            [k for k in rng.permutation(of_group[group]).tolist() if _teaches(regions[k])]
            for group in pool
        ]
        rounds = range(max(map(len, queues)))
        support = [queue[turn] for turn in rounds for queue in queues if turn < len(queue)]
        if len(support) >= most and all(len(of & tested) >= least for of in holders.values()):
            test = tuple(k for k, item in enumerate(regions) if item.region.group in tested)
            kept.append(Draw(number, tuple(support[:most]), test))
        if len(kept) == draws:
            return kept, number + 1 - draws
    raise GloVLMError(
        f"Only {len(kept)} of {MOST_DRAWS:,} draws have {most} regions to learn from and {least} "
        f"groups of each class to test; {draws} were asked for."
    )


def _teaches(item: StudyRegion) -> bool:
    return len(item.region.polygons) > 0 and not any(item.merged)


def tally(detections: Sequence[Detection], item: StudyRegion) -> dict[str, int]:
    """Count what was found in a region.

    An outline around two glomeruli is ignored, and so is a detection that matches it or lies for
    half of its area or more in it (as crowds are in the COCO evaluation).

    Returns:
        `hits`, `false` (detections), `missed`; `found X` and `of X` of each class, of those that
        the border cuts (`cut`) and of the others (`whole`).
    """
    region = item.region
    matched = match_detections(detections, region.polygons)
    merged = [to_shape(p) for p, of_two in zip(region.polygons, item.merged, strict=True) if of_two]
    counts = {"hits": 0, "false": 0, "missed": 0}
    for one, number in zip(detections, matched.tolist(), strict=True):
        if number < 0 and not _lies_in(one, merged):
            counts["false"] += 1
    size = region.picture.shape[1], region.picture.shape[0]
    for number, (polygons, label) in enumerate(zip(region.polygons, region.labels, strict=True)):
        if item.merged[number]:
            continue
        hit = int(number in matched)
        cut = any(is_cut(outline, size) for outline, *_ in polygons)
        counts["hits"] += hit
        counts["missed"] += 1 - hit
        for name in (str(label), "cut" if cut else "whole"):
            counts[f"found {name}"] = counts.get(f"found {name}", 0) + hit
            counts[f"of {name}"] = counts.get(f"of {name}", 0) + 1
    return counts


def _lies_in(one: Detection, shapes: Sequence[Any]) -> bool:
    own = to_shape([(one.ring,)])
    return any(shapely.area(own & shape) >= _IGNORED * own.area for shape in shapes)


# ---------------------------------------------------------------------------------------- study


class FinderStudy:
    """A plan, its regions, and what was found in them.

    Args:
        plan: Content of the plan's file.
        root: Folder that its paths are relative to.
        output: Where detections and report go.
        tokens: Where token maps are kept; by default in `output`. It belongs to one backbone.

    Raises:
        GloVLMError: The plan lacks something, names an unknown arm, or what `read_regions` raises.
    """

    def __init__(
        self, plan: Mapping[str, Any], root: Path, output: Path, tokens: Path | None = None
    ) -> None:
        absent = [name for name in _NEEDED if name not in plan]
        if absent:
            raise GloVLMError(f"The plan lacks {', '.join(absent)}; see experiments/finder.yaml.")
        for name in (plan["best"], *plan["references"]):
            if name not in plan["arms"]:
                raise GloVLMError(
                    f"The plan has no arm '{name}'.{nearest(name, list(plan['arms']))}"
                )
        self.plan, self.root, self.output = plan, root, output
        self.tokens = tokens or output / "tokens"
        self.regions = read_regions(plan["data"], root)
        self.classes = sorted({str(label) for r in self.regions for label in r.region.labels})
        self.unit = str(plan["data"]["unit"])
        about = plan["draws"]
        # Keys of a YAML file are text.
        self.counts = {int(number): int(count) for number, count in about["count"].items()}
        most = max(self.counts)
        self.draws, self.passed_over = draw_regions(
            self.regions,
            seed=about["seed"],
            draws=max(self.counts.values()),
            most=most,
            least=about["least_groups"],
        )
        kept = {name: plan[name] for name in ("backbone", "data", "thresholds", "seed")}
        kept |= {"draws": {k: v for k, v in about.items() if k != "count"} | {"most": most}}
        self.digest = digest_value(kept)
        self._cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._tallies: dict[tuple[str, int], list[list[Tally]]] = {}

    @cached_property
    def backbone(self) -> tuple[Any, Any]:
        """Model and processor."""
        parts = [(self.root / part, part) for part in self.plan["backbone"].split("+")]
        return load_backbone("+".join(str(f) if f.is_dir() else part for f, part in parts))

    @cached_property
    def encoder(self) -> TokenEncoder:
        """Encoder of pictures, which keeps its maps on disk."""
        return TokenEncoder(*self.backbone, store=TokenFolder(self.tokens))

    # -------------------------------------------------------------------------------- detections

    def fit(self, head: str, number: int, draw: Draw) -> tuple[Finder, LeftOut]:
        """Finder of a head on so many regions of a draw, and what it finds in groups left out."""
        support = [self.regions[k].region for k in draw.support[:number]]
        seed, group = self.plan["seed"], self.plan["data"]["level"]
        finder = Finder.fit(
            *self.backbone, support, head=head, seed=seed, encoder=self.encoder, leave_out=False
        )
        left = leave_groups_out(
            *self.backbone, support, head=head, seed=seed, group=group, encoder=self.encoder,
            thresholds=self.plan["thresholds"].get(head),
        )  # fmt: skip
        return finder, left

    def cell(self, head: str, number: int, draw: Draw) -> dict[str, Any]:
        """What a head finds on the test side of a draw at each threshold, read or computed.

        Returns:
            `tried` (thresholds), `left_out` (at each of them, in groups left out), `pictures` (of
            each its detections: score, ring, numbers of thresholds).
        """
        path = self.output / "cells" / head / f"{number}" / f"draw-{draw.number}.json"
        if path.is_file():
            kept: dict[str, Any] = read_json(path)
            if kept["plan"] == self.digest:
                return kept
        start = time.perf_counter()
        finder, left = self.fit(head, number, draw)
        tried = sorted(left.tried)
        content: dict[str, Any] = {
            "plan": self.digest,
            "tried": tried,
            "left_out": [left.tried[threshold].describe() for threshold in tried],
            "pictures": {},
        }
        for k in draw.test:
            region = self.regions[k].region
            scores = finder.score(region.picture)
            content["pictures"][region.name] = _pack(
                finder.outline(scores, threshold) for threshold in tried
            )
        content["seconds"] = round(time.perf_counter() - start, 1)
        write_json(path, content, indent=None)
        sys.stderr.write(f"{path.relative_to(self.output)}: {content['seconds']} s\n")
        return content

    def of(self, number: int) -> list[Draw]:
        """Draws in which so many regions are learned from."""
        return self.draws[: self.counts[number]]

    def arm_cells(self, arm: str, number: int) -> list[dict[str, Any]]:
        """Of each draw `threshold`, `left_out` and `pictures` at an arm's threshold."""
        if (arm, number) in self._cells:
            return self._cells[arm, number]
        about = self.plan["arms"][arm]
        cells = []
        for draw in self.of(number):
            cell = self.cell(about["head"], number, draw)
            rule = about["threshold"]
            threshold = _choose(cell) if rule == LEFT_OUT else float(rule)
            if threshold not in cell["tried"]:
                raise GloVLMError(
                    f"The threshold {threshold:g} of arm '{arm}' is none of those that are tried: "
                    f"{', '.join(map(str, cell['tried']))}."
                )
            at = cell["tried"].index(threshold)
            pictures = {name: _unpack(kept, at) for name, kept in cell["pictures"].items()}
            cells.append(
                {"threshold": threshold, "left_out": cell["left_out"][at], "pictures": pictures}
            )
        self._cells[arm, number] = cells
        return cells

    def tallies(self, arm: str, number: int) -> list[list[Tally]]:
        """Counts of each picture on the test side, by draw."""
        if (arm, number) not in self._tallies:
            self._tallies[arm, number] = [
                [
                    tally(cell["pictures"][self.regions[k].region.name], self.regions[k])
                    for k in draw.test
                ]
                for draw, cell in zip(self.of(number), self.arm_cells(arm, number), strict=True)
            ]
        return self._tallies[arm, number]

    # ---------------------------------------------------------------------------------- summaries

    def runs(
        self, arm: str, number: int, ratio: str, keep: Callable[[StudyRegion], bool]
    ) -> list[CountedRun]:
        """Counts of a ratio on the pictures that are kept, by draw."""
        top, bottom = RATIOS.get(ratio) or ((f"found {ratio}",), (f"of {ratio}",))
        runs = []
        for draw, counted in zip(self.of(number), self.tallies(arm, number), strict=True):
            kept = [
                (self.regions[k].region.group, row)
                for k, row in zip(draw.test, counted, strict=True)
                if keep(self.regions[k])
            ]
            counts = [
                [sum(row.get(name, 0) for name in names) for names in (top, bottom)]
                for _, row in kept
            ]
            values = np.array(counts, np.float64).reshape(-1, 2)
            runs.append(CountedRun(draw.number, [group for group, _ in kept], values))
        return runs

    def summarise(
        self, arm: str, number: int, part: str, keep: Callable[[StudyRegion], bool]
    ) -> dict[str, Any]:
        """Ratios of an arm on some pictures, and its gains over the references."""
        options = {"n_resamples": self.plan["resamples"], "seed": self.plan["bootstrap_seed"]}
        ratios = [*RATIOS, *self.classes, "cut", "whole"]
        own = {ratio: self.runs(arm, number, ratio, keep) for ratio in ratios}
        gains = {}
        for other in self.plan["references"]:
            if other != arm:
                gains[other] = {
                    ratio: paired_ratio(
                        self.runs(other, number, ratio, keep), own[ratio], **options
                    )
                    for ratio in ratios
                }
        return {
            "arm": arm,
            "regions": number,
            "part": part,
            "pictures": sum(map(keep, self.regions)),
            "ratios": {ratio: mean_ratio(runs, **options) for ratio, runs in own.items()},
            "gains": gains,
        }

    def parts(self) -> Iterator[tuple[str, Callable[[StudyRegion], bool]]]:
        """Pictures that are looked at apart: all, each stain, and without some groups."""
        yield "all", lambda item: True
        for stain in sorted({item.region.stain for item in self.regions}):
            yield stain, lambda item, stain=stain: item.region.stain == stain  # type: ignore[misc]
        for name, groups in self.plan.get("without", {}).items():
            left = set(groups)
            yield (
                f"without {name}",
                lambda item, left=left: item.region.group not in left,  # type: ignore[misc]
            )

    def left_out(self, arm: str, number: int) -> list[dict[str, Any]]:
        """Figures from groups left out of the support, against those on the test side.

        Returns:
            A row for F1, precision, recall and each class: means over the draws in which both are
            defined, mean and spread of the difference, and of shares in how many draws the exact
            95% interval of the left-out counts holds the test side's.
        """
        rows = []
        cells = self.arm_cells(arm, number)
        for ratio in [*RATIOS, *self.classes]:
            pairs, held = [], []
            runs = self.runs(arm, number, ratio, lambda item: True)
            for cell, run in zip(cells, runs, strict=True):
                part, of = _left_counts(cell["left_out"], ratio)
                top, bottom = run.counts.sum(0)
                if not of or not bottom:
                    continue
                pairs.append((part / of, float(top / bottom)))
                if ratio != "f1":
                    low, high = fraction_interval(part / of, [part / of], of)
                    held.append(low <= top / bottom <= high)
            differences = [a - b for a, b in pairs]
            rows.append(
                {
                    "arm": arm,
                    "regions": number,
                    "ratio": ratio,
                    "draws": len(pairs),
                    "left_out": fmean(a for a, _ in pairs) if pairs else None,
                    "tested": fmean(b for _, b in pairs) if pairs else None,
                    "difference": fmean(differences) if pairs else None,
                    "sd": stdev(differences) if len(pairs) > 1 else None,
                    "held": int(sum(held)) if ratio != "f1" else None,
                }
            )
        return rows

    def thresholds(self, arm: str, number: int) -> dict[str, float]:
        """Least, median and largest threshold over draws."""
        values = [cell["threshold"] for cell in self.arm_cells(arm, number)]
        names = ("least", "median", "largest")
        return dict(zip(names, np.quantile(values, (0, 0.5, 1)).tolist(), strict=True))

    # ------------------------------------------------------------------- pictures without kidney

    def false_finds(self, about: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What one finder of each arm outlines on pictures that show no kidney.

        Args:
            about: `regions` that it learned from in the first draw; `folders` and `slides` by
                name; `window`, the size in which slides are cut; `most` pictures of a folder.

        Returns:
            A row a set: pictures, their megapixels, and by arm the number of finds.
        """
        path = self.output / "cells" / "without-kidney.json"
        digest = digest_value({"plan": self.digest, "about": about, "arms": self.plan["arms"]})
        if path.is_file():
            kept: dict[str, Any] = read_json(path)
            if kept["plan"] == digest:
                rows: list[dict[str, Any]] = kept["rows"]
                return rows
        finders = {}
        for head in dict.fromkeys(arm["head"] for arm in self.plan["arms"].values()):
            finders[head] = self.fit(head, about["regions"], self.draws[0])
        rows = []
        for name, pictures in self._empty_pictures(about):
            row: dict[str, Any] = {"name": name, "pictures": 0, "megapixels": 0.0}
            row["finds"] = dict.fromkeys(self.plan["arms"], 0)
            row["pictures_with"] = dict.fromkeys(self.plan["arms"], 0)
            for picture in pictures:
                row["pictures"] += 1
                row["megapixels"] += picture.shape[0] * picture.shape[1] / 1e6
                scores = {head: finder.score(picture) for head, (finder, _) in finders.items()}
                for arm, of in self.plan["arms"].items():
                    finder, left = finders[of["head"]]
                    fixed = of["threshold"] != LEFT_OUT
                    threshold = float(of["threshold"]) if fixed else left.threshold
                    finds = len(finder.outline(scores[of["head"]], threshold))
                    row["finds"][arm] += finds
                    row["pictures_with"][arm] += finds > 0
            rows.append(row)
            sys.stderr.write(f"without kidney: {name}\n")
        write_json(path, {"plan": digest, "rows": rows})
        return rows

    def _empty_pictures(
        self, about: Mapping[str, Any]
    ) -> Iterator[tuple[str, Iterator[NDArray[np.uint8]]]]:
        for name, folder in about["folders"].items():
            paths = sorted(
                path for path in (self.root / folder).rglob("*") if path.suffix.lower() in SUFFIXES
            )
            if not paths:
                raise GloVLMError(f"Expected pictures in {self.root / folder}, found none.")
            step = -(-len(paths) // about["most"])
            yield name, (np.asarray(open_image(path).convert("RGB")) for path in paths[::step])
        for name, path in about["slides"].items():
            yield name, _windows(self.root / path, about["window"])


def _windows(path: Path, size: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Windows (width, height) of a slide's level 0 that lie in it, side by side."""
    width, height = size
    with open_slide(path) as slide:
        across, down = slide.size
        for y in range(0, down - height + 1, height):
            for x in range(0, across - width + 1, width):
                yield np.asarray(slide.read(x, y, width, height))


def _choose(cell: Mapping[str, Any]) -> float:
    """Threshold that `choose_threshold` takes from what was detected in groups left out."""
    names = ("true_positives", "false_positives", "misses")
    return choose_threshold(
        {
            threshold: Agreement(*(left[name] for name in names))
            for threshold, left in zip(cell["tried"], cell["left_out"], strict=True)
        }
    )


def _pack(by_threshold: Iterable[Sequence[Detection]]) -> list[list[Any]]:
    """Detections of a picture at several thresholds, each once, with the numbers of these."""
    kept: dict[str, list[Any]] = {}
    for number, detections in enumerate(by_threshold):
        for one in detections:
            plain = [round(one.score, 4), np.round(one.ring, 1).tolist()]
            kept.setdefault(repr(plain), [*plain, []])[2].append(number)
    return list(kept.values())


def _unpack(kept: Iterable[Sequence[Any]], number: int) -> list[Detection]:
    """Detections of a picture at one of the thresholds."""
    return [
        Detection(np.array(ring, np.float64), score)
        for score, ring, numbers in kept
        if number in numbers
    ]


def _left_counts(left: Mapping[str, Any], ratio: str) -> tuple[float, float]:
    """Numerator and denominator of a ratio in groups left out."""
    if ratio not in RATIOS:
        of = left["by_class"].get(ratio, {"found": 0, "of": 0})
        return of["found"], of["of"]
    columns = {
        "hits": left["true_positives"],
        "false": left["false_positives"],
        "missed": left["misses"],
    }
    top, bottom = (sum(columns[name] for name in names) for names in RATIOS[ratio])
    return top, bottom


# ------------------------------------------------------------------------------------------ run


def run_study(
    plan: Mapping[str, Any], root: Path, output: Path, tokens: Path | None = None
) -> dict[str, Any]:
    """Run a plan and write `report.json` and `report.md`.

    Args:
        plan: Content of experiments/finder.yaml or finder-confirmation.yaml.
        root: Folder that its paths are relative to.
        output: Where detections and report go; what there is of the same plan is kept.
        tokens: Where token maps are kept; by default in `output`.

    Returns:
        The report.

    Raises:
        GloVLMError: Data or plan are not as expected.
    """
    study = FinderStudy(plan, root, output, tokens)
    numbers = sorted(study.counts, reverse=True)
    heads = dict.fromkeys(arm["head"] for arm in plan["arms"].values())
    for number, draw in ((n, draw) for n in numbers for draw in study.of(n)):
        for head in heads:  # both of a draw, then the next
            study.cell(head, number, draw)
    results, left_out, thresholds = [], [], {}
    for number in numbers:
        for arm in plan["arms"]:
            for part, keep in study.parts():
                results.append(study.summarise(arm, number, part, keep))
            left_out += study.left_out(arm, number)
            thresholds[f"{arm}, {number}"] = study.thresholds(arm, number)
    counts: Counter[str] = Counter()
    for item in study.regions:
        counts.update(tally([], item))
    report = {
        "kind": "finders",
        "purpose": plan["purpose"],
        "plan": digest_value(plan),
        "unit": study.unit,
        "pictures": len(study.regions),
        "groups": len({item.region.group for item in study.regions}),
        "classes": {name: counts[f"of {name}"] for name in study.classes},
        "cut": counts["of cut"],
        "merged": sum(map(bool, chain.from_iterable(item.merged for item in study.regions))),
        "draws": {"numbers": [d.number for d in study.draws], "passed_over": study.passed_over}
        | {"count": {str(number): count for number, count in study.counts.items()}},
        "seeds": {"draws": plan["draws"]["seed"], "fits": plan["seed"]}
        | {"bootstrap": plan["bootstrap_seed"]},
        "resamples": plan["resamples"],
        "arms": plan["arms"],
        "references": plan["references"],
        "best": plan["best"],
        "results": results,
        "left_out": left_out,
        "thresholds": thresholds,
        "without_kidney": study.false_finds(plan["empty"]) if "empty" in plan else [],
        "environment": describe_environment(resolve_device("cpu")),
    }
    report["goals"] = judge(report, plan["goals"])
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_report(report))
    return report


def judge(report: Mapping[str, Any], goals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Goals with what was found, met or missed.

    Args:
        report: With `results`, `best`, `references`.
        goals: `f1`: least F1 of the best arm, by number of regions; `gain_at`: numbers of regions
            at which the interval of its gain in F1 over each reference must lie above 0.
    """
    rows = {(r["arm"], r["regions"]): r for r in report["results"] if r["part"] == "all"}
    judged = []
    for number, least in goals.get("f1", {}).items():
        f1 = rows[report["best"], int(number)]["ratios"]["f1"]
        goal = f"F1 from {number} regions, {report['best']}"
        judged.append(
            {"goal": goal, "least": f"{least:.2f}", "met": bool(f1["value"] >= least)}
            | {"value": f1["value"], "ci95": f1["ci95"], "gain": False}
        )
    for number in goals.get("gain_at", []):
        for other in report["references"]:
            gain = rows[report["best"], number]["gains"][other]["f1"]
            goal = f"gain in F1 from {number} regions over {other}"
            judged.append(
                {"goal": goal, "least": "interval above 0", "met": bool(gain["ci95"][0] > 0)}
                | {"value": gain["value"], "ci95": gain["ci95"], "gain": True}
            )
    return judged


def main() -> None:
    """Run a plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="Folder with data and models.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="Where token maps are kept, of one backbone.")
    given = parser.parse_args()
    run_study(read_yaml(given.file), given.root, given.output_dir, given.tokens)


if __name__ == "__main__":
    main()
