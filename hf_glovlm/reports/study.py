"""A study's report: from its `report.json` to one page that needs nothing else.

The page computes no number that the study does not hold. Patients, slides and files are not named:
groups are counted, and what looks like a place on a disk is left out of sentences.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..charts import Chart
from ..errors import GloVLMError
from ..files import check_results, read_json, write_text
from ..metrics import METRICS
from ..publish.identifiers import find_shape
from ..rendering import extent, interval, metric_title, number, render_page
from . import study_charts as charts
from .study_reading import READING

__all__ = ["render_study", "without_names", "write_study"]

WITHHELD = "The sentence names a file or a patient and is left out here; the study's folder has it."
ALPHA = charts.LEVEL


def write_study(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a study.

    Args:
        folder: What `glovlm study` wrote.
        output: The page; by default `report.html` in the folder.

    Returns:
        Where it is.

    Raises:
        GloVLMError: There is no report of a study in the folder, or it is damaged.
    """
    place = Path(folder).expanduser() / "report.json"
    report = check_results(read_json(place), place, "study")
    target = Path(output) if output else place.with_name("report.html")
    try:
        page = render_study(report)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise GloVLMError(
            f"'{place}' is damaged, or of another version ({type(error).__name__}: {error}): run "
            "`glovlm study` again; finished cells are kept."
        ) from None
    write_text(target, page)
    return target


def render_study(report: Mapping[str, Any]) -> str:
    """Render the page of a study.

    Args:
        report: Content of `report.json`.
    """
    sections, reference = report["sections"], report["reference"]
    names = _group_names(sections)
    backbones = [*dict.fromkeys(section["backbone"] for section in sections)]
    of = {b: sorted(_of(sections, b), key=lambda s: int(s["shots"])) for b in backbones}
    metrics = [*report.get("comparisons", ("macro_auc", "balanced_accuracy"))]
    goals = [_goal(goal) for goal in report.get("goals", ())]
    cells = report.get("cells", [])
    failures = [[one["cell"], without_names(one["error"], names)] for one in report["failures"]]
    values = {
        "READING": READING,
        "data": report["data"]["name"],
        "synthetic": report["synthetic"],
        "sentences": [
            sentence
            for b, own in of.items()
            for sentence in _sentences(own[-1], b, report, metrics[0])
        ],
        "facts": _facts(report, backbones),
        "goals": goals,
        "missed": [goal for goal in goals if goal["met"] is False],
        "curves": [
            c for m in metrics for b in of for c in charts.draw_curves(of[b], reference, m, b)
        ],
        "several_shots": any(len(own) > 1 for own in of.values()),
        "grids": [*_grids(of, metrics)],
        "forests": [
            c for m in metrics for b in of for c in charts.draw_differences(of[b], reference, m, b)
        ],
        "reference": reference,
        "differences": [
            (metric_title(m), _narrow(DIFFERENCES, rows))
            for m in metrics
            if (rows := _differences(sections, m, reference))
        ],
        "comparisons": {metric_title(k): n for k, n in report.get("comparisons", {}).items()},
        "costs": [
            chart
            for b in of
            for cost in ("median_seconds", "trainable_parameters", "labels")
            if (chart := charts.draw_cost(of[b], metrics[0], cost, b))
        ],
        "maps": [(charts.draw_map(one), _map_note(one, names)) for one in report.get("maps", ())],
        "controls": _controls(report, names),
        "summary": _summary(sections),
        "text_means_nothing": any(m["text_means_nothing"] for s in sections for m in s["methods"]),
        "readings": _readings(sections),
        "cells": _cell_table(cells) if cells else None,
        "failures": failures,
        "missing": report["missing"],
        "notes": [without_names(note, names) for note in report["notes"]],
        "environment": _environment(report["environment"]),
        "fingerprint": report["data"]["fingerprint"],
    }
    return render_page("study_report.html.j2", values)


# ------------------------------------------------------------------------------ what is not named

# A place on a disk, or the name of a file of images or tables.
_PLACE = re.compile(
    r"(?<![\w<])(?:file:|~|[A-Za-z]:)?(?:[/\\][^\s'\",;:()]+)+/?"
    r"|[^\s'\"/\\()]+(?:[/\\][^\s'\",;:()]+)*\.(?i:png|jpe?g|tiff?|bmp|webp|gif|svs|ndpi|mrxs|scn|csv"
    r"|tsv|parquet|ya?ml|jsonl?|geojson|txt|safetensors)\b"
)


def without_names(sentence: str, groups: Iterable[str] = ()) -> str:
    """A sentence without places on a disk and without names of patients, cases or slides.

    Args:
        sentence: For instance why a cell failed.
        groups: The names.
    """
    text = _PLACE.sub("(file)", sentence)
    for name in sorted(groups, key=len, reverse=True):
        if len(name) > 2:  # shorter ones are numbers, and cannot be told from others
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", text)
    return WITHHELD if find_shape(text) else text


def _group_names(sections: Sequence[Mapping[str, Any]]) -> set[str]:
    return {row["group"] for section in sections for row in section["recall"]}


def _map_note(one: Mapping[str, Any], names: Iterable[str]) -> str:
    note = without_names(one.get("note", ""), names)
    if one["classes"] and one["n_shown"] < one["n_images"]:
        note = f"{one['n_shown']:,} of {one['n_images']:,} images, of each class its share. {note}"
    return note.strip()


# --------------------------------------------------------------------------------- the first page


def _of(sections: Iterable[Mapping[str, Any]], backbone: str) -> list[Mapping[str, Any]]:
    return [section for section in sections if section["backbone"] == backbone]


def _sentences(
    section: Mapping[str, Any], backbone: str, report: Mapping[str, Any], metric: str
) -> list[str]:
    """What came out at the most labels: the best line, and how sure its lead is."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    known = [m for m in section["methods"] if m["metrics"][metric]["mean"] is not None]
    if not known:
        return [f"With {backbone} no line has a defined {metric_title(metric)}."]
    best = max(known, key=lambda m: sign * m["metrics"][metric]["mean"])
    value, n = best["metrics"][metric], len(known)
    shots, reference = section["shots"], report["reference"]
    count = f" of {n} methods" if n > 1 else ""
    which = "highest" if sign > 0 else "lowest"
    labels = "image" if shots == 1 else "images"
    first = (
        f"From {shots} labelled {labels} of each class, {best['name']} has the {which} "
        f"{metric_title(metric)}{count} on the backbone {backbone}: {_measured(value)}, the mean "
        f"of {len(best['draws'])} label draws."
    )
    if best["name"] == reference:
        gains = [m for m in known if _is_better(m, metric)]
        if not gains and n > 1:
            return [first, "It is the reference, and no other is shown to be better."]
        return [first]
    versus = best["versus_reference"]
    row = versus and versus["metrics"].get(metric)
    if not row or row["ci95"] is None:
        return [first, f"It has no draw in common with {reference}, so no difference is known."]
    p = versus.get("p_holm", {}).get(metric)
    adjusted = "" if p is None else f", {charts.p_words(p)} by Holm"
    return [
        first,
        f"Its paired difference from {reference} is {_signed(row)}{adjusted}: {_verdict(row, p)}.",
    ]


def _is_better(method: Mapping[str, Any], metric: str) -> bool:
    versus = method["versus_reference"]
    return bool(versus and versus["metrics"].get(metric, {}).get("verdict") == "better")


def _verdict(row: Mapping[str, Any], p: float | None) -> str:
    """The verdict of the interval, and whether it stands after the adjustment."""
    verdict = str(row["verdict"])
    if verdict in ("better", "worse") and p is not None and p >= ALPHA:
        return f"{verdict} alone, not among all comparisons"
    return verdict


def _facts(report: Mapping[str, Any], backbones: Sequence[str]) -> list[tuple[str, str, str]]:
    sections, cells = report["sections"], report.get("cells", [])
    lines = {m["name"] for section in sections for m in section["methods"]}
    shots = sorted({section["shots"] for section in sections})
    draws = [len(m["draws"]) for section in sections for m in section["methods"]]
    facts = [
        ("methods", str(len(lines)), f"reference: {report['reference']}"),
        ("backbones", str(len(backbones)), ", ".join(backbones)),
        ("labels a class", ", ".join(map(str, shots)), ""),
        ("label draws", extent([min(draws), max(draws)]), "of each line"),
    ]
    if cells:
        sizes = [[c[key] for c in cells if c[key] is not None] for key in ("images", "groups")]
        if all(sizes):
            images, groups = (extent([min(size), max(size)]) for size in sizes)
            facts.append(("test images of a draw", images, f"of {groups} {report['unit']}"))
        other = len(report["failures"]), len(report["missing"])
        facts.append(
            ("cells", f"{len(cells):,} finished", f"{other[0]:,} failed, {other[1]:,} not run")
        )
    return facts


def _goal(goal: Mapping[str, Any]) -> dict[str, Any]:
    kind = next(key for key in ("least", "most", "gain") if goal[key] is not None)
    limit = {
        "least": f"at least {goal['least']}",
        "most": f"at most {goal['most']}",
        "gain": f"a gain of {goal['gain']} or more, its interval without 0",
    }[kind]
    measured = "not measured"
    if goal["value"] is not None:
        sign = "+" if kind == "gain" else ""
        measured = f"{goal['value']:{sign}.3f} {_bounds(goal['ci95'], sign)}".strip()
    what = f"{metric_title(goal['metric'])}, {goal['method']}, {goal['backbone']}"
    return {
        "row": [
            f"{what}, {goal['shots']} labels a class",
            measured,
            limit,
            {True: "met", False: "missed", None: "not measured"}[goal["met"]],
        ],
        "met": goal["met"],
    }


# ----------------------------------------------------------------------------------------- tables


def _measured(value: Mapping[str, Any]) -> str:
    return f"{number(value['mean'])} {interval(value.get('ci95'))}".strip()


def _bounds(ci95: Sequence[float] | None, sign: str = "+") -> str:
    return "" if ci95 is None else f"[{ci95[0]:{sign}.3f}, {ci95[1]:{sign}.3f}]"


def _signed(row: Mapping[str, Any]) -> str:
    return "undefined" if row["value"] is None else f"{row['value']:+.3f} {_bounds(row['ci95'])}"


def _grids(
    of: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]
) -> Iterable[Chart]:
    """Heat maps: of each backbone by shots, or of all backbones at the one number of shots."""
    for metric in metrics:
        title = metric_title(metric)
        if all(len(own) == 1 for own in of.values()) and len(of) > 1:
            sections = [own[0] for own in of.values()]
            yield charts.draw_grid(sections, metric, [*of], f"{title} by backbone", "backbone")
        for backbone, own in of.items():
            if len(own) > 1:
                shots = [str(section["shots"]) for section in own]
                named, label = f"{title} by labels, {backbone}", "labelled images of each class"
                yield charts.draw_grid(own, metric, shots, named, label)


def _differences(
    sections: Sequence[Mapping[str, Any]], metric: str, reference: str
) -> list[list[Any]]:
    """Rows under `DIFFERENCES`."""
    rows = []
    for section in sections:
        for m in section["methods"]:
            if m["name"] == reference:
                continue
            names = [m["name"], section["backbone"], section["shots"]]
            versus = m["versus_reference"]
            row = versus and versus["metrics"].get(metric)
            if not row:
                rows.append([*names, "", "", "", "no draw in common"])
                continue
            holm = versus.get("p_holm", {}).get(metric)
            verdict = "; ".join(text for text in (_verdict(row, holm), row["note"]) if text)
            rows.append([*names, _signed(row), _p(row.get("p_value")), _p(holm), verdict])
    return rows


DIFFERENCES = ("method", "backbone", "shots", "difference", "p", "p by Holm", "verdict")


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _summary(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = [*dict.fromkeys(k for s in sections for m in s["methods"] for k in m["metrics"])]
    rows = []
    for section in sections:
        for m in section["methods"]:
            rows.append(
                [
                    m["name"] + "*" * bool(m["text_means_nothing"]),
                    section["backbone"],
                    section["shots"],
                    len(m["draws"]),
                    *(_spread(m["metrics"].get(k)) for k in metrics),
                    extent(m["label_budget"]["labels"]),
                    f"{m['trainable_parameters']:,}",
                    f"{m['median_seconds']:.1f}",
                    "" if m["peak_memory_mib"] is None else f"{m['peak_memory_mib']:,.0f}",
                ]
            )
    titles = map(metric_title, metrics)
    header = ["method", "backbone", "shots", "draws", *titles, "labels", "trainable parameters"]
    return _narrow([*header, "seconds a cell", "MiB at most"], rows)


def _spread(row: Mapping[str, Any] | None) -> str:
    """A mean with its interval, the spread over draws below it."""
    if row is None:
        return ""
    if row["mean"] is None or row["sd"] is None:
        return _measured(row)
    return Markup("{}<br><small>spread {}</small>").format(_measured(row), number(row["sd"]))


def _readings(sections: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How each metric of the table is read."""
    names = dict.fromkeys(k for s in sections for m in s["methods"] for k in m["metrics"])
    return [(METRICS[k].title, METRICS[k].reading) for k in names if k in METRICS]


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metrics = [*dict.fromkeys(k for cell in cells for k in cell["metrics"])]
    header = ["method", "backbone", "shots", "draw", "images", "groups", "labels", "seconds"]
    rows = [
        [
            *(cell[k] for k in ("method", "backbone", "shots", "draw")),
            *("" if cell[k] is None else cell[k] for k in ("images", "groups", "labels")),
            f"{cell['seconds']:.1f}",
            *(number(v) if (v := cell["metrics"].get(k)) is not None else "" for k in metrics),
        ]
        for cell in cells
    ]
    return _narrow([*header, *map(metric_title, metrics)], rows)


def _controls(report: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any] | None:
    """Charts of the controls, one table of all, and what each is, once."""
    every = report.get("controls", ())
    if not every:
        return None
    of = {(s["backbone"], s["shots"]): s for s in report["sections"]}
    places = [(one, (one["backbone"], one["shots"])) for one in every]
    drawn = (charts.draw_controls(one, of.get(p), report["reference"]) for one, p in places)
    rows = [
        [
            c["title"],
            *place,
            metric_title(c["metric"]),
            "not computed" if c["value"] is None else number(c["value"]),
            interval(c["ci95"]),
            f"{c['chance']:g}",
            "above chance" if c["flagged"] else "",
        ]
        for one, place in places
        for c in one["controls"].values()
    ]
    notes = [
        *(f"{c['title']}: {c['note']}" for one in every for c in one["controls"].values()),
        *(one["note"] for one in every if one.get("note")),
    ]
    header = ["control", "backbone", "shots", "metric", "value", "95% interval", "chance", "flag"]
    return {
        "charts": [chart for chart in drawn if chart],
        "table": _narrow(header, rows),
        "notes": [*dict.fromkeys(without_names(note, names) for note in notes)],
    }


def _narrow(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table without the column of backbones, if there is one alone."""
    place = header.index("backbone")
    if len({row[place] for row in rows}) > 1:
        return {"header": header, "rows": rows}
    kept = [[*row[:place], *row[place + 1 :]] for row in (header, *rows)]
    return {"header": kept[0], "rows": kept[1:]}


_VERSIONS = ("hf_glovlm", "python", "torch", "transformers", "numpy", "platform", "device")


def _environment(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {facts[key]}" for key in _VERSIONS if facts.get(key))
