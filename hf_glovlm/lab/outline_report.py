"""Tables of a comparison of outlines, from its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..rendering import Markdown, number, table

Row = Mapping[str, Any]


def render_report(report: Row) -> str:
    """Render a report as Markdown tables, goals first."""
    recipe = report["recipe"]
    margin = recipe["margin"]
    shots = sorted({row["shots"] for row in report["results"]})
    parts = [
        f"### Goals ({report['purpose']})",
        _goals(report["goals"]),
        _sentence(report, max(shots)),
        "### Recipe",
        _recipe(recipe),
        f"### macro-AUC, mean over methods and draws ({report['purpose']})",
        _by_shots(report["results"], shots),
        f"### Each method: macro-AUC, and its gain over `{report['reference']}` at the same margin",
        f"Of `{report['reference']}` at another margin: the gain over that at {margin:g}.",
        _by_method(report["results"], shots),
        f"### Balanced accuracy and macro-F1, {max(shots)} labels",
        _other_metrics(report["results"], max(shots), recipe),
        f"### Thresholds from the support, {max(shots)} labels",
        _thresholds(report["at_threshold"]),
        "### Recall by stain (descriptive)",
        table(
            [[r["stain"], r["class"], r["images"], number(r["recall"])] for r in report["stains"]],
            ["stain", "class", "images", "recall"],
        ),
    ]
    if report["transfer"]:
        parts += ["### Learned from one stain, tested on another", _transfer(report["transfer"])]
    if report["frozen"]:
        parts += ["### The frozen episodes", _frozen(report["frozen"])]
    if report["tuned"]:
        parts += ["### Methods that train inside the tower", _tuned(report["tuned"])]
    parts += ["### Draws, seeds, versions", _facts(report)]
    return "\n\n".join(parts) + "\n"


def _labels(shots: int) -> str:
    return f"{shots} label" if shots == 1 else f"{shots} labels"


def _goals(goals: Sequence[Row]) -> Markdown:
    rows = [
        [g["goal"], _value(g["value"], g["ci95"]), g["least"], "met" if g["met"] else "**missed**"]
        for g in goals
    ]
    return table(
        [[Markdown(cell) for cell in row] for row in rows], ["goal", "found", "at least", ""]
    )


def _value(value: float, ci95: Sequence[float] | None) -> str:
    """With four decimals, for what lies next to its goal."""
    return f"{value:.4f}" if ci95 is None else _gain({"value": value, "ci95": ci95})


def _gain(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return ""
    low, high = row["ci95"]
    return f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _sentence(report: Row, shots: int) -> str:
    """Gain of the recipe, and what is left of it without the silhouette."""
    recipe = report["recipe"]
    method = recipe["methods"][shots]
    gain = {
        row["arm"]: _gain(row["gain"] and row["gain"]["macro_auc"])
        for row in report["results"]
        if (row["margin"], row["population"]) == (recipe["margin"], "all")
        and (row["method"], row["shots"]) == (method, shots)
    }
    return (
        f"At {shots} labels a class, `{report['best']}` gains {gain[report['best']]} in macro-AUC "
        f"over `{report['reference']}` (`{method}`, paired over {report['unit']} crossed with "
        f"draws), of which {gain['circle']} is left where circles of the same area stand in place "
        "of the outlines."
    )


def _recipe(recipe: Row) -> Markdown:
    methods = ", ".join(f"{shots}: `{method}`" for shots, method in recipe["methods"].items())
    return Markdown(
        f"Outline `{recipe['outline']}`, margin {recipe['margin']:g}; method by labels a class: "
        f"{methods}; threshold: `{recipe['threshold']}`."
    )


def _arms(results: Sequence[Row]) -> list[tuple[str, float, str]]:
    """Arms in order: name, margin, population."""
    return list(dict.fromkeys((r["arm"], r["margin"], r["population"]) for r in results))


def _titled(key: tuple[str, float, str]) -> list[str]:
    name, margin, population = key
    return [name if population == "all" else f"{name} ({population} left out)", f"{margin:g}"]


def _of(results: Sequence[Row], key: tuple[str, float, str], **fixed: Any) -> list[Row]:
    return [
        row
        for row in results
        if (row["arm"], row["margin"], row["population"]) == key
        and all(row[name] == value for name, value in fixed.items())
    ]


def _by_shots(results: Sequence[Row], shots: Sequence[int]) -> Markdown:
    rows = []
    for key in _arms(results):
        cells = []
        for n in shots:
            means = [row["macro_auc"]["mean"] for row in _of(results, key, shots=n)]
            cells.append(sum(means) / len(means))
        rows.append([*_titled(key), *map(number, cells), number(sum(cells) / len(cells))])
    return table(rows, ["arm", "margin", *map(_labels, shots), "mean"])


def _by_method(results: Sequence[Row], shots: Sequence[int]) -> Markdown:
    rows = []
    for key in _arms(results):
        for method in dict.fromkeys(row["method"] for row in _of(results, key)):
            cells = []
            for n in shots:
                (row,) = _of(results, key, method=method, shots=n)
                gain = _gain(row["gain"] and row["gain"]["macro_auc"])
                cells.append(f"{number(row['macro_auc']['mean'])} {gain}".strip())
            rows.append([*_titled(key), Markdown(f"`{method}`"), *cells])
    return table(rows, ["arm", "margin", "method", *map(_labels, shots)])


def _other_metrics(results: Sequence[Row], shots: int, recipe: Row) -> Markdown:
    rows = []
    for key in _arms(results):
        if key[1] == recipe["margin"]:
            (row,) = _of(results, key, method=recipe["methods"][shots], shots=shots)
            cells = [
                f"{number(row[name]['mean'])} ({number(row[name]['sd'])})"
                for name in ("balanced_accuracy", "macro_f1")
            ]
            gain = _gain(row["gain"] and row["gain"]["balanced_accuracy"])
            rows.append([*_titled(key)[:1], *cells, gain])
    header = ["arm", "balanced accuracy (over draws)", "macro-F1 (over draws)"]
    return table(rows, [*header, "gain in balanced accuracy"])


def _thresholds(at: Row) -> Markdown:
    rows = [
        [arm, Markdown(f"`{rule}`"), _spread(row, "sensitivity"), _spread(row, "specificity")]
        for arm, rules in at.items()
        for rule, row in rules.items()
    ]
    return table(rows, ["arm", "rule", "sensitivity (over draws)", "specificity (over draws)"])


def _spread(row: Row, name: str) -> str:
    return f"{number(row[name])} ({number(row[f'{name}_sd'])})"


def _transfer(results: Sequence[Row]) -> Markdown:
    rows = []
    for r in results:
        at = r.get("at_threshold")
        cells = [
            r["tested"], f"{r['images']} ({r['of_target']})", r["arm"], r["shots"],
            Markdown(f"`{r['method']}`"), number(r["macro_auc"]["mean"]),
            _gain(r["gain"] and r["gain"]["macro_auc"]),
            number(r["balanced_accuracy"]["mean"]),
            f"{number(at['sensitivity'])} / {number(at['specificity'])}" if at else "",
        ]  # fmt: skip
        rows.append(cells)
    header = ["tested", "images (of the target)", "arm", "labels", "method", "macro-AUC", "gain"]
    return table(rows, [*header, "balanced accuracy", "sensitivity / specificity at threshold"])


def _frozen(results: Sequence[Row]) -> Markdown:
    names = ("balanced_accuracy", "macro_auc", "macro_f1")
    rows = [
        [
            r["arm"],
            r["shots"],
            " / ".join(number(r[name]["mean"]) for name in names),
            " / ".join(f"{value:.3f}" if value else "?" for value in r["before"] or ()),
        ]
        for r in results
    ]
    title = "balanced accuracy / macro-AUC / macro-F1"
    return table(rows, ["arm", "labels", title, "found before"])


def _tuned(results: Sequence[Row]) -> Markdown:
    rows = [
        [
            Markdown(f"`{r['method']}`"), r["outline"], r["shots"], r["draws"],
            number(r["macro_auc"]["mean"]), number(r["balanced_accuracy"]["mean"]),
            _gain(r["gain"] and r["gain"]["macro_auc"]),
        ]
        for r in results
    ]  # fmt: skip
    header = ["method", "outline", "labels", "draws", "macro-AUC", "balanced accuracy"]
    return table(rows, [*header, "gain in macro-AUC"])


def _facts(report: Row) -> Markdown:
    lines = [
        "- Images: " + ", ".join(f"{name} {n}" for name, n in report["classes"].items()) + ".",
        *(
            f"- Draws ({name if name == 'all' else name + ' left out'}): {len(d['numbers'])}, "
            f"numbers {min(d['numbers'])} to {max(d['numbers'])} of seed "
            f"{report['seeds']['draws']}; "
            f"{d['passed_over']} had too few {report['unit']} of a class on a side and were drawn "
            "again."
            for name, d in report["draws"].items()
        ),
        f"- Seeds: {report['seeds']['seed']} (methods, moves), {report['seeds']['bootstrap_seed']} "
        "(bootstrap).",
        "- "
        + ", ".join(f"{k} {v}" for k, v in report["environment"].items() if v is not None)
        + ".",
    ]
    return Markdown("\n".join(lines))
