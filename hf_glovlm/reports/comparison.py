"""A comparison of runs as a page, and as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from ..charts import Chart, Estimate, draw_forest
from ..metrics import METRICS
from ..rendering import interval, metric_title, number, render_page
from .study_charts import LEVEL, p_words
from .study_reading import READING

__all__ = ["HEADER", "comparison_rows", "comparison_sentences", "render_comparison"]

HEADER = ("run", "value", "difference", "p Holm")
_NAME = 22  # characters of a name in a table that fits a terminal of 80


def comparison_rows(line: Mapping[str, Any], metric: str) -> list[list[str]]:
    """Rows under `HEADER` of one line of a comparison, three digits, within 80 columns.

    Args:
        line: One of `lines`.
        metric: Name of the metric.
    """
    rows = []
    for run in line["runs"]:
        value, versus = run["metrics"][metric], run["versus_reference"]
        cells = [_short(run["name"]), f"{number(value['value'])} {interval(value['ci95'])}".strip()]
        if versus is None:
            rows.append([*cells, "reference", ""])
            continue
        one, p = versus["metrics"][metric], versus["p_holm"][metric]
        rows.append([*cells, _signed(one), "" if p is None else _plain_p(p)])
    return rows


def comparison_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """What came out for each run, line and metric, in a sentence.

    Args:
        comparison: Content of a comparison.
    """
    sentences = []
    for line in comparison["lines"]:
        where = f" ({line['line']})" if line["line"] else ""
        reference = line["runs"][0]["name"]
        for run in line["runs"][1:]:
            versus = run["versus_reference"]
            for metric in comparison["metrics"]:
                row, p = versus["metrics"][metric], versus["p_holm"][metric]
                verdict = row["verdict"]
                if verdict in ("better", "worse"):
                    verdict += f" than {reference}"
                    if p is not None and p >= LEVEL:
                        verdict += " by itself, and not among all that is compared"
                elif verdict.startswith("not "):
                    verdict = verdict.replace(
                        "not distinguishable", f"not distinguishable from {reference}"
                    )
                note = f" ({row['note']})" if row["note"] else ""
                title = metric_title(metric)
                sentences.append(f"{title}{where}: {run['name']} is {verdict}{note}.")
    return sentences


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Page of a comparison.

    Args:
        comparison: Content of a comparison.
    """
    tables = [
        {
            "caption": ", ".join(filter(None, (metric_title(metric), line["line"]))),
            "rows": [_row(run, metric) for run in line["runs"]],
        }
        for line in comparison["lines"]
        for metric in comparison["metrics"]
    ]
    right = [
        [
            *([line["line"]] if line["line"] else []),
            run["name"],
            f"{run['right']:,} of {line['n']:,}",
            "" if versus is None else f"{versus['only_own']:,}",
            "" if versus is None else f"{versus['only_reference']:,}",
        ]
        for line in comparison["lines"]
        for run in line["runs"]
        for versus in [run["versus_reference"]]
    ]
    values = {
        "READING": READING,
        "names": comparison["names"],
        "synthetic": comparison["synthetic"],
        "sentences": comparison_sentences(comparison),
        "facts": _facts(comparison),
        "charts": [chart for m in comparison["metrics"] if (chart := _draw(comparison, m))],
        "tables": tables,
        "TABLE": ("run", "value", "95% interval", "difference", "95% interval", "p", "p by Holm"),
        "right": right,
        "several": any(line["line"] for line in comparison["lines"]),
        "readings": [(METRICS[m].title, METRICS[m].reading) for m in comparison["metrics"]],
        "notes": comparison["notes"],
    }
    return render_page("comparison.html.j2", values)


def _facts(comparison: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lines, unit = comparison["lines"], comparison["unit"]
    facts = [("reference", comparison["names"][0], "")]
    if len(lines) == 1:
        n, groups, draws = (lines[0][key] for key in ("n", "n_groups", "n_draws"))
        what = "the same of every run" if draws == 1 else f"in {draws} label draws"
        facts += [("test images", f"{n:,}", what), (unit, f"{groups:,}", "of these images")]
    else:
        facts.append(("lines compared", str(len(lines)), "backbone, method, shots"))
    return facts


def _draw(comparison: Mapping[str, Any], metric: str) -> Chart | None:
    rows = []
    for line in comparison["lines"]:
        for run in line["runs"][1:]:
            versus = run["versus_reference"]
            one, p = versus["metrics"][metric], versus["p_holm"][metric]
            if one["value"] is not None:
                low, high = one["ci95"] or (None, None)
                label = f"{run['name']}, {line['line']}" if line["line"] else run["name"]
                note = "" if p is None else p_words(p)
                filled = p is not None and p < LEVEL
                rows.append(Estimate(label, one["value"], low, high, filled, note))
    if not rows:
        return None
    title, reference = metric_title(metric), comparison["names"][0]
    return draw_forest(
        rows,
        title=f"{title} less that of {reference}",
        alt=f"Paired differences of {title} from {reference}: "
        + "; ".join(f"{row.label} {row.value:+.3f}" for row in rows),
        x_label=f"difference in {title}; p by Holm",
    )


def _row(run: Mapping[str, Any], metric: str) -> list[str]:
    value, versus = run["metrics"][metric], run["versus_reference"]
    cells = [run["name"], number(value["value"]), interval(value["ci95"])]
    if versus is None:
        return [*cells, "reference", "", "", ""]
    one, p = versus["metrics"][metric], versus["p_holm"][metric]
    shown, _, bounds = _signed(one).partition(" ")
    each = ("" if q is None else _plain_p(q) for q in (one["p_value"], p))
    return [*cells, shown, bounds, *each]


def _signed(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "undefined"
    low_high = "" if row["ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*row["ci95"])
    return f"{row['value']:+.3f}{low_high}"


def _plain_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _short(name: str) -> str:
    """A name that fits the column: its end tells most."""
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"
