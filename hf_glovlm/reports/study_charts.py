"""Charts of a study's report, from the content of `report.json`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..charts import (
    Chart,
    Estimate,
    Line,
    Points,
    draw_forest,
    draw_lines,
    draw_matrix,
    draw_points,
)
from ..metrics import METRICS
from ..rendering import number

__all__ = [
    "draw_controls",
    "draw_cost",
    "draw_curves",
    "draw_differences",
    "draw_grid",
    "draw_map",
]

Section = Mapping[str, Any]
MOST_LINES = 4  # beside the reference, of one chart; more stand in several, each with the reference
MOST_ESTIMATES = 22  # of one forest plot
LEVEL = 0.05


def draw_curves(
    sections: Sequence[Section], reference: str, metric: str, place: str
) -> Iterator[Chart]:
    """Learning curves of one backbone, or the methods beside each other at one number of shots.

    Args:
        sections: Of the backbone, by shots.
        reference: Name of the reference.
        metric: Name of the metric.
        place: Name of the backbone, for the titles.
    """
    title = METRICS[metric].title
    names = _names(sections)
    if len(sections) == 1:
        lines = [m for m in sections[0]["methods"] if _value(m, metric) is not None]
        shots = sections[0]["shots"]
        for part, of in _parts(lines, MOST_ESTIMATES):
            yield draw_forest(
                [_estimate(m["name"], m, metric, m["name"] == reference) for m in of],
                title=f"{title} at {_labels(shots)}, {place}{part}",
                alt=f"{title} at {_labels(shots)}: " + "; ".join(_words(m, metric) for m in of),
                x_label=f"{title}, mean over draws (95% interval)",
                reference=None,
            )
        return
    others = [name for name in names if name != reference]
    shots = [section["shots"] for section in sections]
    last = {m["name"]: m for m in sections[-1]["methods"]}
    for part, of in _parts(others, MOST_LINES):
        drawn = [name for name in names if name in of or name == reference]
        words = "; ".join(_words(last[name], metric) for name in drawn if name in last)
        yield draw_lines(
            [_line(name, sections, metric) for name in drawn],
            title=f"{title} by labels, {place}{part}",
            alt=f"Learning curves of {title}. At {_labels(shots[-1])}: {words}.",
            x_label="labelled images of each class",
            y_label=title,
            x_ticks=shots,
            log_x=max(shots) > 4 * max(1, min(shots)),
        )


def draw_grid(
    sections: Sequence[Section], metric: str, columns: Sequence[str], title: str, column_label: str
) -> Chart:
    """Methods by shots (or by backbones), shaded; the best of each column has a frame.

    Args:
        sections: One a column.
        metric: Name of the metric.
        columns: Their names.
        title: What stands above.
        column_label: What the columns are.
    """
    names = _names(sections)
    of = [{m["name"]: _value(m, metric) for m in section["methods"]} for section in sections]
    values = [[_or_nan(column.get(name)) for column in of] for name in names]
    sign = 1 if METRICS[metric].higher_is_better else -1
    marked, best = [], []
    for j, column in enumerate(of):
        known = {name: sign * v for name, v in column.items() if v is not None}
        if known:
            name = max(known, key=known.__getitem__)
            marked.append((names.index(name), j))
            best.append(f"{columns[j]}: {name} {number(column[name])}")
    return draw_matrix(
        values, names, columns, title=title,
        alt=f"{METRICS[metric].title} of methods. Best of each column: " + "; ".join(best),
        row_label="method", column_label=column_label, marked=marked,
        texts=[["" if math.isnan(v) else f"{v:.3f}" for v in row] for row in values],
    )  # fmt: skip


def draw_differences(
    sections: Sequence[Section], reference: str, metric: str, place: str
) -> Iterator[Chart]:
    """Forest plots of the paired differences from the reference; filled where Holm's is below .05.

    Args:
        sections: Of one backbone, by shots.
        reference: Name of the reference.
        metric: Name of the metric.
        place: Name of the backbone, for the titles.
    """
    title = METRICS[metric].title
    packs: list[tuple[list[int], list[Estimate]]] = []  # whole numbers of shots together
    for section in sections:
        rows = [*_differences(section, metric, len(sections) > 1)]
        if packs and len(packs[-1][1]) + len(rows) <= MOST_ESTIMATES:
            packs[-1][0].append(section["shots"])
            packs[-1][1].extend(rows)
        elif rows:
            packs.append(([section["shots"]], rows))
    for shots, rows in packs:
        for part, of in _parts(rows, MOST_ESTIMATES):
            listed = ", ".join(map(str, shots)) if len(shots) > 1 else _labels(shots[0])
            at = f"{listed} labels a class" if len(shots) > 1 else listed
            words = "; ".join(f"{one.label} {one.value:+.3f}" for one in of)
            yield draw_forest(
                of,
                title=f"{title} less that of {reference}, {at}, {place}{part}",
                alt=f"Paired differences of {title} from {reference}, {at}: {words}.",
                x_label=f"difference in {title}; p by Holm",
            )


def _differences(section: Section, metric: str, several: bool) -> Iterator[Estimate]:
    for m in section["methods"]:
        versus = m["versus_reference"]
        row = versus and versus["metrics"].get(metric)
        if row and row["value"] is not None:
            low, high = row["ci95"] or (None, None)
            p = versus.get("p_holm", {}).get(metric)
            label = f"{m['name']}, {section['shots']}" if several else m["name"]
            note = "" if p is None else p_words(p)
            yield Estimate(label, row["value"], low, high, p is not None and p < LEVEL, note)


def draw_cost(sections: Sequence[Section], metric: str, cost: str, place: str) -> Chart | None:
    """What methods cost against what they reach, at the most labels.

    Args:
        sections: Of one backbone, by shots.
        metric: Name of the metric.
        cost: `median_seconds`, `trainable_parameters` or `labels`; of labels, at every number of
            shots.
        place: Name of the backbone, for the title.
    """
    short, label = {
        "median_seconds": ("seconds", "seconds of a cell (median)"),
        "trainable_parameters": ("trainable parameters", "trainable parameters (1: none)"),
        "labels": ("labels", "labels of a draw, of all classes (1: none)"),
    }[cost]
    groups, words = [], []
    for name in _names(sections):
        points = []
        for section in sections if cost == "labels" else sections[-1:]:
            for m in section["methods"]:
                value = _value(m, metric)
                if m["name"] == name and value is not None:
                    spent = m["label_budget"]["labels"][1] if cost == "labels" else m[cost]
                    least = 1e-3 if cost == "median_seconds" else 1  # the axis may be logarithmic
                    bounds = m["metrics"][metric].get("ci95") or (value, value)
                    points.append((max(spent, least), value, *bounds))
        if points:
            x, y, low, high = zip(*points, strict=True)
            plain = cost == "labels"
            groups.append(Points(name, x, y, None, *((None, None) if plain else (low, high))))
            words.append(f"{name} {_plain(x[-1])}, {number(y[-1])}")
    if not groups:
        return None
    title = METRICS[metric].title
    every = [value for one in groups for value in one.x]
    at = "" if cost == "labels" else f" at {_labels(sections[-1]['shots'])}"
    return draw_points(
        groups,
        title=f"{title}{at} against {short}, {place}",
        alt=f"{label} and {title}: " + "; ".join(words),
        x_label=label,
        y_label=title,
        log_x=max(every) > 20 * min(every),
    )


def draw_map(one: Mapping[str, Any]) -> Chart | None:
    """Map of image features with the class texts.

    Args:
        one: An entry of `maps`.
    """
    shown = [c for c in one["classes"] if c["images"]]
    if not shown:
        return None
    groups = []
    for c in shown:
        x, y = zip(*c["images"], strict=True)
        groups.append(Points(c["name"], x, y))
    texts = [c for c in one["classes"] if c["text"]]
    if texts:
        x, y = zip(*(c["text"] for c in texts), strict=True)
        groups.append(Points("class texts", x, y, texts=[c["name"] for c in texts], marker="*"))
    first, second = (f"{part:.0%}" for part in one["explained"])
    listed = ", ".join(f"{c['name']} ({c['n_shown']})" for c in shown)
    return draw_points(
        groups,
        title=f"Image features by class, {one['backbone']}",
        alt=f"Two principal components of the image features of {listed}"
        + ("; with the texts of the classes." if texts else "."),
        x_label=f"component 1 ({first} of the variance)",
        y_label=f"component 2 ({second})",
    )


def draw_controls(one: Mapping[str, Any], section: Section | None, reference: str) -> Chart | None:
    """Negative controls beside the reference, with a line at chance; filled where one is flagged.

    Args:
        one: An entry of `controls`.
        section: The methods at the same backbone and shots.
        reference: Name of the reference.
    """
    rows, chance = [], []
    for control in one["controls"].values():
        if control["value"] is not None:
            low, high = control["ci95"] or (None, None)
            flagged = bool(control["flagged"])
            rows.append(Estimate(control["title"], control["value"], low, high, flagged))
            chance.append(control["chance"])
    if not rows:
        return None
    metric = next(iter(one["controls"].values()))["metric"]
    lines = [m for m in (section or {}).get("methods", ()) if m["name"] == reference]
    own = [_estimate(f"{reference} (images)", m, metric, False) for m in lines]
    title = METRICS[metric].title
    return draw_forest(
        [*own, *rows],
        title=f"Controls, {one['backbone']}, {_labels(one['shots'])}",
        alt=f"{title} of controls: " + "; ".join(f"{r.label} {number(r.value)}" for r in rows),
        x_label=f"{title} (95% interval); the line is chance",
        reference=chance[0],
    )


# ------------------------------------------------------------------------------------ parts


def p_words(p: float) -> str:
    """A p-value in words: `p .012`, `p < .001`."""
    return "p < .001" if p < 0.001 else f"p {p:.3f}"


def _names(sections: Sequence[Section]) -> list[str]:
    return [*dict.fromkeys(m["name"] for section in sections for m in section["methods"])]


def _parts(items: Sequence[Any], most: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Parts of nearly one size, at most so large, each with what its title adds."""
    count = max(1, math.ceil(len(items) / most))
    for k in range(count):
        part = items[k * len(items) // count : (k + 1) * len(items) // count]
        if part:
            yield (f" ({k + 1} of {count})" if count > 1 else ""), part


def _labels(shots: int) -> str:
    return f"{shots} {'label' if shots == 1 else 'labels'} a class"


def _value(method: Mapping[str, Any], metric: str) -> float | None:
    value: float | None = method["metrics"].get(metric, {}).get("mean")
    return value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _words(method: Mapping[str, Any], metric: str) -> str:
    return f"{method['name']} {number(_value(method, metric))}"


def _estimate(label: str, method: Mapping[str, Any], metric: str, emphasis: bool) -> Estimate:
    low, high = method["metrics"][metric].get("ci95") or (None, None)
    return Estimate(label, _or_nan(_value(method, metric)), low, high, emphasis)


def _line(name: str, sections: Sequence[Section], metric: str) -> Line:
    rows = []
    for section in sections:
        line = next((m for m in section["methods"] if m["name"] == name), None)
        of = {} if line is None else line["metrics"].get(metric, {})
        low, high = of.get("ci95") or (math.nan, math.nan)
        rows.append((section["shots"], _or_nan(of.get("mean")), low, high))
    x, y, low, high = ([*column] for column in zip(*rows, strict=True))
    if all(map(math.isnan, low)):
        return Line(name, x, y)
    return Line(name, x, y, low, high)
