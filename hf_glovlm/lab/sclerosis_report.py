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
    parts += ["### Draws, seeds, versions", _facts(report)]
    return "\n\n".join(parts) + "\n"


def _goals(goals: Sequence[Row]) -> Markdown:
    rows = [
        [
            {"error": "mean absolute error", "coverage": "coverage of the printed interval"}.get(
                goal["goal"], goal["goal"]
            ),
            _share(goal) if goal["goal"] == "coverage" else points(goal),
            f"at least {goal['limit']:g}" if goal["goal"] == "coverage" else f"{goal['limit']:g}",
            Markdown("met" if goal["met"] else "**missed**"),
        ]
        for goal in goals
    ]
    return table(rows, ["goal", "found", "at most", ""])


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
