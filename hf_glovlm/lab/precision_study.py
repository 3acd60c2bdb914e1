"""Cost of precisions and runtimes: what few-shot classifiers lose when the tower is not in fp32.

`python -m hf_glovlm.lab.precision_study experiments/precision.yaml --root FOLDER --output-dir OUT`
runs what the file describes and writes `report.json` and `report.md`. Every arm encodes the images
once, and its features and predictions are kept: a run that was stopped goes on where it was.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..data import load_dataset
from ..data.folder import column
from ..environment import describe_environment
from ..errors import GloVLMError
from ..files import digest_value, write_json, write_text
from ..inference import FeatureCache, embed_images, resolve_device
from ..inference.engines import open_engine
from ..metrics import METRICS, PairedRun, compute_metrics, paired_differences
from ..rendering import Markdown, group_unit, table
from ..settings import read_yaml
from .outline_cells import Cells, Draw, draw_supports, fit_cells
from .outline_study import backbone_name

if TYPE_CHECKING:
    from datasets import Dataset

Features = NDArray[np.float32]

_NEEDED = (
    "backbone", "sets", "shots", "methods", "draw_seed", "seed", "bootstrap_seed", "resamples",
    "reference", "arms", "uses",
)  # fmt: skip
USES = ("throughout", "prediction")
# Those of cosines are left out: images and texts of two encoders have no space in common. The
# others are those of the published study, so that it can be repeated.
_OF_PROBABILITIES = (
    "accuracy", "balanced_accuracy", "macro_auc", "macro_f1", "ece", "brier", "boundary_margin",
)  # fmt: skip
_PAIRED = [
    name
    for name in _OF_PROBABILITIES
    if METRICS[name].higher_is_better is not None and METRICS[name].scale != "none"
]


class LabelledSet:
    """A labelled set of a plan, with its label draws.

    Args:
        about: Its entry in the plan.
        plan: The plan.
        root: Folder that its paths are relative to.

    Attributes:
        rows: Images with labels.
        labels: Class numbers, `[n]`.
        groups: Group of each image.
        draws: Label draws.
    """

    def __init__(self, about: Mapping[str, Any], plan: Mapping[str, Any], root: Path) -> None:
        rows = load_dataset(root / about["folder"])["all"]
        if kept := about.get("classes"):
            rows = select_classes(rows, kept)
        self.group_column = str(about["group"])
        rows = thin_out(rows, self.group_column, about.get("most", {}), plan["draw_seed"])
        self.rows = rows
        self.labels = np.asarray(column(rows, "label"), np.int64)
        self.groups = [str(value) for value in column(rows, self.group_column)]
        self.draws: list[Draw] = draw_supports(
            rows.remove_columns("image"),
            self.groups,
            shots=plan["shots"],
            seed=plan["draw_seed"],
            draws=about["draws"]["count"],
            least=about["draws"]["least_groups"],
        )[0]


def select_classes(rows: "Dataset", names: Sequence[str]) -> "Dataset":
    """Rows of some classes, which are numbered anew."""
    from datasets import ClassLabel

    known: list[str] = rows.features["label"].names
    if unknown := sorted({*names} - {*known}):
        raise GloVLMError(f"Expected classes of {', '.join(known)}, found {', '.join(unknown)}.")
    labels = [known[label] for label in column(rows, "label")]
    chosen = [row for row, label in enumerate(labels) if label in names]
    numbers = [list(names).index(labels[row]) for row in chosen]
    kept = rows.select(chosen).remove_columns("label").add_column("label", numbers)
    return kept.cast_column("label", ClassLabel(names=list(names)))


def thin_out(rows: "Dataset", group_column: str, most: Mapping[str, int], seed: int) -> "Dataset":
    """Rows of which no more are kept, drawn without replacement and in their order.

    Args:
        rows: Images with labels.
        group_column: Of their groups.
        most: `group`: of a class in a group; `class`: of a class.
        seed: Of the drawing.
    """
    labels, groups = column(rows, "label"), column(rows, group_column)
    held: Counter[tuple[str, Any]] = Counter()
    kept = []
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        keys = [("group", (groups[row], labels[row])), ("class", labels[row])]
        if all(held[key] < most.get(key[0], len(rows)) for key in keys):
            held.update(keys)
            kept.append(row)
    return rows.select(sorted(kept))


# ------------------------------------------------------------------------------------- features


def encode_arm(
    backbone: tuple[Any, Any], about: Mapping[str, str], sets: Mapping[str, LabelledSet]
) -> dict[str, Features]:
    """Features `[n, dim]` of each set by one arm, through the cache.

    Raises:
        GloVLMError: The arm cannot be had on this machine.
    """
    model, processor = backbone
    model.to(resolve_device(about.get("device", "cpu")))
    engine = open_engine(model, processor, precision=about["precision"], runtime=about["runtime"])
    cache = FeatureCache()
    return {
        name: embed_images(model, processor, each.rows, cache=cache, engine=engine)
        for name, each in sets.items()
    }


def compare_features(reference: Features, other: Features) -> dict[str, float]:
    """Largest and mean cosine difference (1 - cosine) of paired features, `[n, dim]` each."""
    one, two = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        for x in (reference, other)
    )
    # half the squared distance of unit vectors: exact where the two are nearly one
    apart = np.square(one - two).sum(axis=1) / 2
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


# ---------------------------------------------------------------------------------- differences


def compare_predictions(
    of: LabelledSet, before: Sequence[Any], after: Sequence[Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Differences of two arms on the same draws, in every metric of probabilities.

    Args:
        of: The set.
        before: Probabilities `[test rows, K]` of the reference, a draw each.
        after: Those of the arm.
        plan: Its `resamples` and `bootstrap_seed`.

    Returns:
        `changed` (share of predictions with another class), `most_changed` (in one draw),
        `paired` (of `paired_differences`), `points` (mean difference of the others, which have no
        interval).
    """
    tests = [draw.test for draw in of.draws]
    runs = [
        PairedRun(i, of.labels[test], [of.groups[row] for row in test], a, b)
        for i, (test, a, b) in enumerate(zip(tests, before, after, strict=True))
    ]
    changed = [
        float((a.argmax(1) != b.argmax(1)).mean()) for a, b in zip(before, after, strict=True)
    ]
    values = [
        [
            compute_metrics(of.labels[test], p, n_resamples=0)["metrics"]
            for test, p in zip(tests, side, strict=True)
        ]
        for side in (before, after)
    ]
    points = {
        name: fmean(b[name]["value"] - a[name]["value"] for a, b in zip(*values, strict=True))
        for name in _OF_PROBABILITIES
        if name not in _PAIRED
    }
    return {
        "changed": fmean(changed),
        "most_changed": max(changed),
        "reference": {
            name: fmean(row[name]["value"] for row in values[0]) for name in _OF_PROBABILITIES
        },
        "paired": paired_differences(
            runs,
            _PAIRED,
            plan["resamples"],
            plan["bootstrap_seed"],
            unit=group_unit(of.group_column),
        ),
        "points": points,
    }


def run_study(plan: Mapping[str, Any], root: Path, output: Path) -> dict[str, Any]:
    """Run a plan and write `report.json` and `report.md`.

    Args:
        plan: Content of experiments/precision.yaml.
        root: Folder that its paths are relative to.
        output: Where the report goes; predictions are kept there.

    Returns:
        The report.

    Raises:
        GloVLMError: Data or plan are not as expected, or the reference cannot be had.
    """
    if absent := [name for name in _NEEDED if name not in plan]:
        raise GloVLMError(f"The plan lacks {', '.join(absent)}; see experiments/precision.yaml.")
    sets = {name: LabelledSet(about, plan, root) for name, about in plan["sets"].items()}
    backbone = load_backbone(backbone_name(plan["backbone"], root))
    reference = encode_arm(backbone, plan["arms"][plan["reference"]], sets)
    arms: dict[str, dict[str, Any]] = {}
    results: list[dict[str, Any]] = []
    for arm, about in plan["arms"].items():
        arms[arm] = dict(about)
        if arm == plan["reference"]:
            continue
        try:
            features = encode_arm(backbone, about, sets)
        except GloVLMError as error:
            arms[arm]["left_out"] = str(error)
            continue
        sys.stderr.write(f"{arm}: encoded\n")
        arms[arm]["cosine"] = {
            name: compare_features(reference[name], features[name]) for name in sets
        }
        for name, of in sets.items():
            plain = fitted(plan, name, of, reference[name], reference[name], output, "reference")
            for use in plan["uses"]:
                support = features[name] if use == "throughout" else reference[name]
                file = f"{arm} {use}".replace(" ", "_")
                cells = fitted(plan, name, of, support, features[name], output, file)
                for (method, shots), after in cells.probabilities.items():
                    before = plain.probabilities[method, shots]
                    row = {"set": name, "arm": arm, "use": use, "method": method}
                    results.append(row | compare_predictions(of, before, after, plan))
    report: dict[str, Any] = {
        "kind": "precision",
        "plan": digest_value(plan),
        "sets": {
            name: {
                "images": len(of.labels),
                "groups": len(set(of.groups)),
                "unit": group_unit(of.group_column),
                "draws": len(of.draws),
                "tested": fmean(len(draw.test) for draw in of.draws),
            }
            for name, of in sets.items()
        },
        "shots": plan["shots"],
        "seeds": {key: plan[key] for key in ("draw_seed", "seed", "bootstrap_seed")},
        "reference": plan["reference"],
        "uses": dict(plan["uses"]),
        "arms": arms,
        "results": results,
        "environment": describe_environment(resolve_device("cpu")),
    }
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_report(report))
    return report


def fitted(
    plan: Mapping[str, Any],
    name: str,
    of: LabelledSet,
    support: Features,
    query: Features,
    output: Path,
    file: str,
) -> Cells:
    """Predictions of an arm on a set, read or computed."""
    path = output / "cells" / name / f"{file}.parquet"
    digest = digest_value(
        [dict(plan), *(float(np.abs(x).sum(dtype=float)) for x in (support, query))]
    )
    cells = Cells.load(path, digest, of.draws)
    if cells is None:
        cells = fit_cells(
            support, query, of.labels, of.draws, plan["methods"], [plan["shots"]], plan["seed"]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        cells.save(path, digest)
    return cells


# --------------------------------------------------------------------------------------- report


def render_report(report: Mapping[str, Any]) -> str:
    """Render a report as Markdown tables."""
    sets = list(report["sets"])
    arms = report["arms"]
    cosines = [
        [arm, *(f"{about['cosine'][name]['largest']:.1e}" for name in sets)]
        for arm, about in arms.items()
        if "cosine" in about
    ]
    left_out = [[arm, about["left_out"]] for arm, about in arms.items() if "left_out" in about]
    parts = [
        f"### Features: largest 1 - cosine with {report['reference']}",
        table(cosines, ["arm", *sets]),
    ]
    if left_out:
        parts += ["### Left out on this machine", table(left_out, ["arm", "why"])]
    for name, about in report["sets"].items():
        rows = [row for row in report["results"] if row["set"] == name]
        for use, words in report["uses"].items():
            parts += [
                f"### {name}, {words}",
                f"{about['images']} images of {about['groups']} {about['unit']}, "
                f"{about['draws']} draws of {report['shots']} labels a class. Differences to "
                f"{report['reference']}, x 1,000, with their 95% intervals over {about['unit']} "
                "crossed with draws.",
                _differences([row for row in rows if row["use"] == use]),
            ]
    return "\n\n".join(parts) + "\n"


def _differences(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """A line for each arm and method: predictions that change, then every metric."""
    described = [name for name in _OF_PROBABILITIES if name not in _PAIRED]
    lines = []
    for row in rows:
        paired = [_in_thousandths(row["paired"][name]) for name in _PAIRED]
        points = [f"{1000 * row['points'][name]:+.2f}" for name in described]
        changed = f"{row['changed']:.2%}"
        lines.append([row["arm"], row["method"], changed, *map(Markdown, [*paired, *points])])
    titles = [METRICS[name].title for name in [*_PAIRED, *described]]
    return table(lines, ["arm", "method", "changed", *titles])


def _in_thousandths(entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    bold = "**" if low > 0 or high < 0 else ""
    return f"{bold}{1000 * entry['value']:+.2f} [{1000 * low:+.2f}, {1000 * high:+.2f}]{bold}"


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
