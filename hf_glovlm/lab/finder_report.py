"""Tables of a comparison of finders, from its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..rendering import Markdown, number, table

Row = Mapping[str, Any]


def render_report(report: Row) -> str:
    """Render a report as Markdown tables, goals first."""
    purpose = report["purpose"]
    parts = [f"### Goals ({purpose})", _goals(report["goals"])]
    parts += [f"### Precision, recall and F1 at IoU .5 ({purpose})", _main(report)]
    for other in report["references"]:
        parts += [f"### Gains over {other}, paired ({purpose})", _gains(report, other)]
    parts += [f"### Recall by class, and of those the border cuts ({purpose})", _classes(report)]
    parts += [f"### Parts ({purpose})", _parts(report)]
    parts += [f"### Thresholds ({purpose})", _thresholds(report)]
    parts += [f"### Groups left out of the support, and {report['unit']} tested ({purpose})"]
    parts += [_left_out(report)]
    if report["without_kidney"]:
        parts += [f"### Pictures without kidney ({purpose})", _empty(report)]
    parts += [f"### Draws, seeds, versions ({purpose})", _facts(report)]
    return "\n\n".join(parts) + "\n"


def with_interval(row: Row | None) -> str:
    """Value of a ratio with its interval."""
    if not row or row["value"] is None:
        return ""
    low, high = row["ci95"]
    return f"{row['value']:.3f} [{low:.3f}, {high:.3f}]"


def signed(row: Row | None) -> str:
    """Gain with its interval."""
    if not row or row["value"] is None:
        return ""
    low, high = row["ci95"]
    return f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _goals(goals: Sequence[Row]) -> Markdown:
    rows = [
        [
            g["goal"],
            signed(g) if g["gain"] else with_interval(g),
            g["least"],
            Markdown("met" if g["met"] else "**missed**"),
        ]
        for g in goals
    ]
    return table(rows, ["goal", "found", "at least", ""])


def _rows(report: Row, part: str) -> list[Row]:
    """Results of one part of the pictures, fewest regions first."""
    rows = [row for row in report["results"] if row["part"] == part]
    order = list(report["arms"])
    return sorted(rows, key=lambda row: (row["regions"], order.index(row["arm"])))


def _main(report: Row) -> Markdown:
    rows = [
        [
            r["regions"], r["arm"], *(with_interval(r["ratios"][n]) for n in _SCORES),
            number(r["ratios"]["f1"]["sd"]),
        ]
        for r in _rows(report, "all")
    ]  # fmt: skip
    return table(rows, ["regions", "arm", "F1", "precision", "recall", "F1's SD over draws"])


_SCORES = ("f1", "precision", "recall")


def _gains(report: Row, other: str) -> Markdown:
    rows = [
        [r["regions"], r["arm"], *(signed(r["gains"][other][n]) for n in _SCORES)]
        for r in _rows(report, "all")
        if other in r["gains"]
    ]
    return table(rows, ["regions", "arm", "F1", "precision", "recall"])


def _classes(report: Row) -> Markdown:
    names = [*report["classes"], "whole", "cut"]
    rows = [
        [r["regions"], r["arm"], *(with_interval(r["ratios"][name]) for name in names)]
        for r in _rows(report, "all")
    ]
    titles = [f"{name} ({n})" for name, n in report["classes"].items()]
    return table(rows, ["regions", "arm", *titles, "not cut", f"cut ({report['cut']})"])


def _parts(report: Row) -> Markdown:
    parts = dict.fromkeys(row["part"] for row in report["results"] if row["part"] != "all")
    rows = []
    for part in parts:
        for r in _rows(report, part):
            first = [f"{part} ({r['pictures']} pictures, {r['ratios']['f1']['n_groups']} groups)"]
            gains = [signed(r["gains"].get(other, {}).get("f1")) for other in report["references"]]
            scores = [with_interval(r["ratios"][n]) for n in _SCORES]
            rows.append([*first, r["regions"], r["arm"], *scores, *gains])
    titles = [f"gain in F1 over {other}" for other in report["references"]]
    return table(rows, ["part", "regions", "arm", "F1", "precision", "recall", *titles])


def _thresholds(report: Row) -> Markdown:
    rows = [
        [name, *(number(of[key]) for key in ("least", "median", "largest"))]
        for name, of in report["thresholds"].items()
    ]
    return table(rows, ["arm, regions", "least", "median", "largest"])


def _left_out(report: Row) -> Markdown:
    rows = []
    for r in report["left_out"]:
        spread = "" if r["sd"] is None else f" ({number(r['sd'])})"
        rows.append(
            [
                r["regions"], r["arm"], r["ratio"], number(r["left_out"]), number(r["tested"]),
                "" if r["difference"] is None else f"{r['difference']:+.3f}{spread}",
                "" if r["held"] is None else f"{r['held']} of {r['draws']}",
            ]
        )  # fmt: skip
    title = "left out minus tested (SD over draws)"
    return table(
        rows,
        ["regions", "arm", "figure", "left out", "tested", title, "tested inside its interval"],
    )


def _empty(report: Row) -> Markdown:
    rows = []
    for r in report["without_kidney"]:
        cells = [
            f"{n} ({n / r['pictures']:.2f}, {n / r['megapixels']:.2f}; {r['pictures_with'][arm]})"
            for arm, n in r["finds"].items()
        ]
        rows.append([r["name"], r["pictures"], number(r["megapixels"]), *cells])
    titles = [f"{arm}: finds (a picture, a megapixel; pictures with any)" for arm in report["arms"]]
    return table(rows, ["pictures", "n", "megapixels", *titles])


def _facts(report: Row) -> Markdown:
    numbers = report["draws"]["numbers"]
    seeds = ", ".join(f"{value} ({name})" for name, value in report["seeds"].items())
    lines = [
        f"- {report['pictures']} pictures of {report['groups']} {report['unit']}; glomeruli: "
        + ", ".join(f"{name} {n}" for name, n in report["classes"].items())
        + f"; {report['cut']} are cut by the border."
        + (f" {report['merged']} outlines go around two." if report["merged"] else ""),
        "- Draws: "
        + ", ".join(f"{count} with {n} regions" for n, count in report["draws"]["count"].items())
        + f"; numbers {min(numbers)} to {max(numbers)}, {report['draws']['passed_over']} of them "
        "passed over.",
        f"- Seeds: {seeds}; {report['resamples']} resamples.",
        "- "
        + ", ".join(f"{k} {v}" for k, v in report["environment"].items() if v is not None)
        + ".",
    ]
    return Markdown("\n".join(lines))
