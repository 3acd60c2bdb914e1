"""Charts of a run's report: from the curves, counts and bins that its results hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..charts import Chart, Line, Points, draw_lines, draw_matrix, draw_points
from ..rendering import number

__all__ = [
    "MOST_CLASSES",
    "draw_confusion",
    "draw_curves",
    "draw_groups",
    "draw_reliability",
]

MOST_CLASSES = 12  # with curves of their own; of more, those that are told apart worst
MOST_CELLS = 24  # classes of a confusion matrix that can be read


def draw_groups(rows: Sequence[Mapping[str, int]], unit: str) -> Chart:
    """Dot plot: the share of right images of every group, the lowest first.

    Args:
        rows: `per_group` of results.
        unit: What a group is, in the plural.
    """
    shares = [row["right"] / row["n"] for row in rows]
    spotless = sum(row["right"] == row["n"] for row in rows)
    return draw_points(
        [Points(unit, range(1, len(rows) + 1), shares)],
        title=f"Right images of each of the {len(rows)} {unit}",
        alt=f"Share of right images, {unit} in ascending order. {spotless} have no error.",
        x_label=f"{unit}, the lowest share first",
        y_label="share of images named right",
        y_limits=(-0.03, 1.03),
    )


def draw_confusion(results: Mapping[str, Any]) -> Chart | None:
    """Confusion matrix, shaded by the share of the row; `None` for too many classes to read."""
    names = list(results["per_class"])
    counts = np.array(results["confusion_matrix"], dtype=float)
    if len(names) > MOST_CELLS:
        return None
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    return draw_matrix(
        shares,
        names,
        names,
        title="Confusion matrix: images by class in the data and class named",
        alt=f"{int(np.trace(counts))} of {int(counts.sum())} images lie on the diagonal. The table "
        "of classes has the recall of each.",
        row_label="in the data",
        column_label="named",
        texts=[[f"{int(n)}" for n in row] for row in counts],
        limits=(0, 1),
        marked=[(k, k) for k in range(len(names))],
    )


def draw_reliability(bins: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Reliability diagram: accuracy against confidence of each bin with images."""
    held = [b for b in bins if b["count"]]
    if not held:
        return None
    return draw_lines(
        [Line("", [b["confidence"] for b in held], [b["accuracy"] for b in held])],
        title="Reliability: how often right, by how sure",
        alt="Accuracy against mean confidence of each bin: "
        + ", ".join(f"{number(b['accuracy'])} at {number(b['confidence'])}" for b in held)
        + ".",
        x_label="probability of the class named",
        y_label="share of images named right",
        x_limits=(0, 1),
        y_limits=(-0.02, 1.02),
        diagonal=True,
    )


def draw_curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ROC and precision-recall curves, a pair a class: `name`, `roc`, `precision_recall`.

    Of more than `MOST_CLASSES` those with the lowest areas are drawn.
    """
    classes = {name: of for name, of in results["curves"]["classes"].items() if of is not None}
    areas = {name: results["per_class"][name]["auc"]["value"] for name in classes}
    lowest = sorted(classes, key=lambda name: (areas[name] is None, areas[name]))[:MOST_CLASSES]
    pairs = []
    for name in (name for name in classes if name in lowest):
        curve = classes[name]["roc"]
        roc = draw_lines(
            [_line("", curve["fpr"], curve, "sensitivity", post=True)],
            title=f"{name}: ROC",
            alt=f"ROC curve of {name} against the others; area {number(areas[name])}.",
            x_label="1 - specificity (other images named so)",
            y_label="sensitivity (images found)",
            x_limits=(-0.02, 1.02),
            y_limits=(-0.03, 1.03),  # as wide as high charts would not stand beside the others
            diagonal=True,
        )
        curve, common = classes[name]["precision_recall"], results["prior"][name]
        lines = [_line(name, curve["recall"], curve, "precision", post=False)]
        lines.append(Line("how common it is", [0, 1], [common, common]))
        pairs.append(
            {
                "name": name,
                "roc": roc,
                "precision_recall": draw_lines(
                    lines,
                    title=f"{name}: precision and recall",
                    alt=f"Precision against recall of {name}; guessing gives {number(common)}.",
                    x_label="recall (images found)",
                    y_label="precision (named ones right)",
                    x_limits=(-0.02, 1.02),
                    y_limits=(-0.03, 1.03),
                ),
            }
        )
    return pairs


def _line(
    label: str, where: Sequence[float], curve: Mapping[str, Any], key: str, *, post: bool
) -> Line:
    """A curve of stairs: each value holds up to the next place (`post`), or from the last one."""
    if post:
        x, at = np.repeat(where, 2)[1:], np.repeat(np.arange(len(where)), 2)[:-1]
    else:
        x = np.repeat([0.0, *where], 2)[1:-1]
        at = np.repeat(np.arange(len(where)), 2)
    low, high = (None if curve[k] is None else [curve[k][i] for i in at] for k in ("low", "high"))
    return Line(label, x.tolist(), [curve[key][i] for i in at], low, high)
