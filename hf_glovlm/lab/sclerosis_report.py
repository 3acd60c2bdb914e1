"""Tables of the study of percentages of sclerosis, from its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..rendering import Markdown, number, table

Row = Mapping[str, Any]


def render_report(report: Row) -> str:
    """Render a report as Markdown tables, goals first."""
    recipe = report["recipe"]
    draws = report["draws"]
    parts = [
        f"### Goals ({report['purpose']})",
        _goals(report["goals"]),
        f"Recipe: outline `{recipe['outline']}`, `{recipe['method']}`, `{recipe['estimate']}`.",
        f"### Human outlines ({report['purpose']})",
        f"{report['slides']} slides left out in turn, {draws['count']} draws of "
        f"{draws['shots']} labels a class; points.",
        _estimates(report["human"]),
        "#### Intervals",
        _intervals(report["human"]),
        "#### Each slide",
        _slides(report["human"], recipe),
    ]
    if report["detected"]:
        parts += _detected(report["detected"], recipe)
    parts += ["### Draws, seeds, versions", _facts(report)]
    return "\n\n".join(parts) + "\n"


def _goals(goals: Sequence[Row]) -> Markdown:
    rows = [
        [
            {"error": "mean absolute error", "coverage": "coverage of the printed interval"}.get(
                goal["goal"], goal["goal"]
            ),
            _share(goal) if goal["goal"] == "coverage" else points(goal),
            f"at least {goal['limit']:g}"
            if goal["goal"] == "coverage"
            else f"at most {goal['limit']:g}",
            Markdown("met" if goal["met"] else "**missed**"),
        ]
        for goal in goals
    ]
    return table(rows, ["goal", "found", "limit", ""])


def points(entry: Row, *, signed: bool = False) -> str:
    """A number of points with its interval."""
    low, high = entry["ci95"]
    sign = "+" if signed else ""
    return f"{entry['value']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _share(entry: Row) -> str:
    low, high = entry["ci95"]
    return f"{number(entry['value'])} [{number(low)}, {number(high)}]"


def _estimates(results: Sequence[Row]) -> Markdown:
    rows = [
        [
            Markdown(f"`{arm['outline']}`"), Markdown(f"`{arm['method']}`"), row["estimate"],
            points(row["error"]), points(row["bias"], signed=True),
            points(row["against_counted"], signed=True) if row["estimate"] != "counted" else "",
            *("" if row[side] is None else f"{row[side]:.2f}" for side in ("absent", "present")),
        ]
        for arm in results
        for row in arm["estimates"]
    ]  # fmt: skip
    header = ["outline", "method", "estimate", "mean absolute error", "bias", "against counted"]
    return table(rows, [*header, "error without sclerosis", "error with"])


def _intervals(results: Sequence[Row]) -> Markdown:
    rows = [
        [
            Markdown(f"`{arm['outline']}`"), Markdown(f"`{arm['method']}`"), row["interval"],
            _share(row["coverage"]), f"{row['width']:.1f}",
            number(row["corrected"]) if row["interval"] == "printed" else "",
        ]
        for arm in results
        for row in arm["intervals"]
    ]  # fmt: skip
    header = ["outline", "method", "interval", "coverage", "width", "corrected"]
    return table(rows, header)


def _slides(results: Sequence[Row], recipe: Row) -> Markdown:
    arm = next(
        row for row in results if all(row[key] == recipe[key] for key in ("outline", "method"))
    )
    names = [row["estimate"] for row in arm["estimates"]]
    rows = [
        [row["slide"], row["n"], f"{row['truth']:.1f}", *(f"{row[name]:.1f}" for name in names)]
        for row in arm["slides"]
    ]
    return table(rows, ["slide", "glomeruli", "true", *names])


def _detected(about: Row, recipe: Row) -> list[str]:
    """Parts of what finders found."""
    n = len(about["draws"])
    parts = [
        "### Found outlines",
        f"Head `{about['head']}`, {about['learned_from']} regions of others, "
        f"{about['folds']} folds, {n} {'draw' if n == 1 else 'draws'} of regions.",
        _finders(about["draws"]),
    ]
    if about["percentages"]:
        parts += [
            "#### Percentages",
            _read(about["percentages"]),
            "#### Intervals",
            _read_intervals(about["percentages"]),
            _costs(about),
            "#### Each slide",
            _detected_slides(about["percentages"], recipe),
        ]
    return [*parts, "### Gain of the outline on glomeruli that were found", _gains(about["gain"])]


def _finders(draws: Sequence[Row]) -> Markdown:
    def share(of: Row) -> str:
        return f"{of['found']} of {of['of']}"

    rows = [
        [
            i, number(draw["precision"]), number(draw["recall"]), number(draw["f1"]),
            "; ".join(f"{name} {share(of)}" for name, of in draw["by_class"].items()),
            share(draw["cut"]), number(draw["iou"]),
        ]
        for i, draw in enumerate(draws)
    ]  # fmt: skip
    header = ["draw", "precision", "recall", "F1", "found by class", "cut by the border"]
    return table(rows, [*header, "mean IoU of matches"])


def _read(percentages: Sequence[Row]) -> Markdown:
    rows = [
        [
            Markdown(f"`{arm['outline']}`"), name, row["estimate"], points(row["error"]),
            points(row["bias"], signed=True),
            points(row["against_counted"], signed=True) if row["estimate"] != "counted" else "",
        ]
        for arm in percentages
        for name, of in arm["read"].items()
        for row in of["estimates"]
        if "recall" not in name or row["estimate"] == "corrected"  # alone changes with it
    ]  # fmt: skip
    header = ["outline", "objects", "estimate", "mean absolute error", "bias", "against counted"]
    return table(rows, header)


def _read_intervals(percentages: Sequence[Row]) -> Markdown:
    rows = [
        [
            Markdown(f"`{arm['outline']}`"), name, row["interval"], _share(row["coverage"]),
            f"{row['width']:.1f}",
        ]
        for arm in percentages
        for name, of in arm["read"].items()
        for row in of["intervals"]
        if "recall" not in name or row["interval"] == "printed"
    ]  # fmt: skip
    return table(rows, ["outline", "objects", "interval", "coverage", "width"])


def _costs(about: Row) -> Markdown:
    alone = about["finder_alone"]
    lines = [
        f"- Every found object called as the outline that it matches: error "
        f"{points(alone['error'])}, bias {points(alone['bias'], signed=True)}."
    ]
    lines += [
        f"- Error on found objects, with the finder's recall, minus that on all human outlines, "
        f"`{arm['outline']}`: {points(arm['cost'], signed=True)}."
        for arm in about["percentages"]
    ]
    return Markdown("\n".join(lines))


def _detected_slides(percentages: Sequence[Row], recipe: Row) -> Markdown:
    arm = next(row for row in percentages if row["outline"] == recipe["outline"])
    rows = [
        [
            row["slide"], row["outlines"], f"{row['objects']:.1f}", f"{row['truth']:.1f}",
            *("" if row[name] is None else f"{row[name]:.1f}" for name in arm["read"]),
        ]
        for row in arm["slides"]
    ]  # fmt: skip
    return table(rows, ["slide", "outlines", "objects found", "true", *arm["read"]])


def _gains(about: Row) -> Markdown:
    if not about["results"]:
        return Markdown(
            f"Not to be measured: of the rarer class glomeruli were found on {about['least']} "
            "slides alone."
        )

    def gain(row: Row | None) -> str:
        if row is None:
            return ""
        low, high = row["macro_auc"]["ci95"]
        return f"{row['macro_auc']['value']:+.3f} [{low:+.3f}, {high:+.3f}]"

    rows = [
        [
            row["road"], Markdown(f"`{row['outline']}`"), row["shots"],
            Markdown(f"`{row['method']}`"), number(row["macro_auc"]),
            number(row["balanced_accuracy"]), gain(row["gain"]), gain(row["against_human"]),
        ]
        for row in about["results"]
    ]  # fmt: skip
    header = ["outlines", "rendering", "labels", "method", "macro-AUC", "balanced accuracy"]
    return table(rows, [*header, "gain of the outline", "against human outlines"])


def _facts(report: Row) -> Markdown:
    objects = ", ".join(f"{name} {n}" for name, n in report["objects"].items())
    seeds = report["seeds"]
    lines = [
        f"- Glomeruli: {objects}.",
        f"- Draws: {report['draws']['count']} of seed {report['draws']['seed']}; seeds "
        f"{seeds['seed']} (methods, posterior), {seeds['bootstrap_seed']} (bootstrap).",
        "- "
        + ", ".join(f"{k} {v}" for k, v in report["environment"].items() if v is not None)
        + ".",
    ]
    return Markdown("\n".join(lines))
