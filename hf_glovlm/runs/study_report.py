"""Report of a study: summaries of its finished cells, and their paired comparison."""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import check_groups
from ..errors import GloVLMError
from ..files import (
    Manifest,
    changed_inputs,
    check_results,
    finish_interrupted,
    parse_json,
    read_json,
    read_manifest,
    read_undamaged,
    write_text,
)
from ..inference import Predictions
from ..metrics import METRICS, PairedRun, adjust_holm, compare_methods, summarise_draws
from ..rendering import SYNTHETIC, extent, group_unit, render
from .feature_map import read_maps
from .study_config import (
    COMPARED,
    Cell,
    StudyConfig,
    StudyMethod,
    check_names,
    read_frozen,
    short_name,
)
from .study_controls import read_controls
from .study_tables import write_tables

__all__ = ["Outcome", "no_collection", "render_report", "report_cells", "write_report"]

SUMMARISED = tuple(name for name, row in METRICS.items() if row.summarised)
RECALL_ROWS = 60  # of the table of groups in the report that people read
_DATA = ("images", "labels", "groups", "columns")  # of what a cell is made from
_MODEL = ("code", "backbone")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a finished cell: what a report needs of it, from files that are read once.

    Attributes:
        made_from: What decides whether cells may be compared.
        results: Parts of `results.json`.
        labels: Class number of each test image `[n]`.
        probabilities: `[n, K]`.
        groups: Patient, case or slide of each.
        file_names: Of each.
        class_names: The `K` classes.
    """

    made_from: Mapping[str, Any]
    results: Mapping[str, Any]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    groups: Sequence[str]
    file_names: Sequence[str]
    class_names: Sequence[str]

    @classmethod
    def read(
        cls, folder: Path, manifest: Manifest | None, before: "Outcome | None" = None
    ) -> "Outcome":
        """Read a finished cell, undamaged; it shares names with the one before where equal.

        Raises:
            GloVLMError: A file is damaged, or is of something else.
        """
        finish_interrupted(folder)
        stated = manifest or Manifest("adaptation", {}, {})  # of an earlier version: no checksums
        files = ("results.json", "predictions.parquet")
        content = [read_undamaged(folder, stated, name) for name in files]
        results = check_results(parse_json(content[0], folder / files[0]), folder, "adaptation")
        predictions = Predictions.parse(content[1], folder / files[1], logits=False)
        labels, groups, names = predictions.labels, predictions.groups, predictions.file_names
        assert labels is not None  # a run predicts labelled rows of known groups
        assert groups is not None
        return cls(
            made_from={key: stated.made_from.get(key) for key in (*_DATA, *_MODEL)},
            results=_reported(results),
            labels=labels,
            probabilities=predictions.probabilities,
            groups=_kept_once(groups, before.groups if before else None),
            file_names=_kept_once(names, before.file_names if before else None),
            class_names=predictions.class_names,
        )


def _kept_once(names: Sequence[str], before: Sequence[str] | None = None) -> Sequence[str]:
    return before if before is not None and before == names else [*map(intern, names)]


def _reported(results: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `results.json` that a report is made from."""
    kept = ("name", "fingerprint", "group_column", "split_hash", "support", "notes")
    sizes = {key: results.get(key) for key in ("n", "n_groups")}
    return {
        **{key: results[key] for key in ("synthetic", "threshold", "timing", "environment")},
        **sizes,
        "notes": _kept_once(results["notes"]),
        "data": {key: results["data"][key] for key in kept},
        "metrics": {name: {"value": m.get("value")} for name, m in results["metrics"].items()},
        "training": {key: results["training"][key] for key in ("facts", "trainable_parameters")},
    }


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: reading leaves no cycles, and all that is kept would be searched."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ------------------------------------------------------------------------------------- report

_Runs = dict[int, Outcome]  # by draw


def write_report(config: StudyConfig, output_dir: str | Path) -> dict[str, Any]:
    """Summarise and compare the finished cells; write `report.json` and `report.md`.

    Args:
        config: The grid.
        output_dir: Where `run_study` wrote its cells.

    Returns:
        `data`, `reference`, `synthetic`, `unit`, `sections` (one for each backbone and number of
        shots: `methods` with `metrics`, `versus_reference` and `label_budget`; `recall`;
        `recorded`), `failures`, `missing`, `notes`, `environment`, `goals` (what was stated, and
        what came of it), `comparisons` (how many there are of each metric), `cells` (each with its
        values), `maps` (of the images' features, see `feature_map`). Beside it lie `cells` and
        `summary` as CSV and parquet.

    Raises:
        GloVLMError: No cell is finished, cells were run on different data or weights, or one is
            damaged.
    """
    output, cells = Path(output_dir).expanduser(), config.cells()
    check_names(cells)
    with no_collection():
        return report_cells(config, output, cells, {})


def report_cells(
    config: StudyConfig, output: Path, cells: Sequence[Cell], known: Mapping[str, Outcome]
) -> dict[str, Any]:
    """Write the report; the outcomes of some cells are known."""
    table: dict[tuple[str, int], dict[str, _Runs]] = {}
    outcomes, failures, missing = list[tuple[Cell, Outcome]](), [], []
    for cell in cells:
        folder = output / "cells" / cell.name
        if cell.name in known or (folder / "results.json").is_file():
            before = outcomes[-1][1] if outcomes else None
            outcome = known.get(cell.name) or Outcome.read(folder, read_manifest(folder), before)
            outcomes.append((cell, outcome))
            lines = table.setdefault((cell.backbone, cell.shots), {})
            lines.setdefault(cell.method.name, {})[cell.draw] = outcome
        elif (folder / "failure.json").is_file():
            failure = read_json(folder / "failure.json")
            failures.append({"cell": cell.name, "error": str(failure.get("error"))})
        else:
            missing.append(cell.name)
    if not outcomes:
        reason = f": {failures[0]['error']}" if failures else ", so there is nothing to report."
        raise GloVLMError(f"No cell of the study in '{output}' is finished{reason}")
    _refuse_mixture(output, outcomes)
    every = [outcome.results for _, outcome in outcomes]
    first = every[0]
    unit = group_unit(first["data"]["group_column"])
    sections = [_section(config, *key, lines, unit) for key, lines in table.items()]
    report = {
        "kind": "study",
        "data": {k: first["data"][k] for k in ("name", "fingerprint", "group_column")},
        "reference": config.reference,
        "synthetic": any(r["synthetic"] for r in every),
        "unit": unit,
        "sections": sections,
        "failures": failures,
        "missing": missing,
        "notes": [
            f"Intervals: 95%, Student's t with the standard error of a bootstrap over {unit} (with "
            "all their images) crossed with label draws, not corrected for the number of methods.",
            "Differences are taken draw by draw on identical splits and supports. Means of methods "
            "with different numbers of draws are not comparable.",
            "The spread is the standard deviation over label draws; these redraw the same "
            f"{unit}, so it is no interval.",
            f"Predicted class: {first['threshold']}.",
            *dict.fromkeys(note for r in every for note in r["notes"]),
            *first["data"]["notes"],
        ],
        "environment": first["environment"],
        "goals": _judge(config, sections),
        "comparisons": _adjust(sections),
        "cells": [*_cells(outcomes)],
        "maps": [{k: v for k, v in m.items() if k != "made_from"} for m in read_maps(output)],
        "controls": read_controls(output),
    }
    write_text(output / "report.json", _as_json(report))
    write_tables(output, report)
    write_text(output / "report.md", render_report(report))
    return report


def _as_json(report: Mapping[str, Any]) -> str:
    """JSON as `write_json` writes it, but for what has many rows: one line each, after the rest."""
    many = ("cells", "maps")
    text = json.dumps({k: v for k, v in report.items() if k not in many}, indent=1)
    for key in many:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in report[key])
        text = text.removesuffix("\n}") + f',\n "{key}": [\n{rows}\n ]\n}}'
    return text + "\n"


def _refuse_mixture(output: Path, outcomes: Sequence[tuple[Cell, Outcome]]) -> None:
    """Refuse to compare cells of other data, or of other weights under one backbone's name."""
    first: dict[str, tuple[Cell, Mapping[str, Any]]] = {}
    for cell, outcome in outcomes:
        for name, keys in (("", _DATA), (f"backbone {cell.backbone}", _MODEL)):
            now = {key: outcome.made_from[key] for key in keys}
            known, before = first.setdefault(name, (cell, now))
            if before != now and (changed := changed_inputs(before, now)):
                raise GloVLMError(
                    f"The cells in '{output}' cannot be compared: between {known.name} and "
                    f"{cell.name}, {', '.join(changed)}. Give another output folder."
                )


def _section(
    config: StudyConfig, backbone: str, shots: int, lines: Mapping[str, _Runs], unit: str
) -> dict[str, Any]:
    """Summary of all methods at one backbone and number of shots."""
    reference = lines.get(config.reference, {})
    compared = _compare(config, reference, lines, unit)
    intervals = _intervals(config, lines, compared)
    methods = []
    for method in config.methods:
        runs = lines.get(method.name, {})
        results = [one.results for one in runs.values()]
        if not results:
            continue
        values = {k: [r["metrics"].get(k, {}).get("value") for r in results] for k in SUMMARISED}
        methods.append(
            {
                **asdict(method),
                "draws": sorted(runs),
                "metrics": {
                    k: summarise_draws(v) | intervals[method.name].get(k, {})
                    for k, v in values.items()
                },
                "versus_reference": compared.get(method.name),
                "label_budget": _label_budget(method, results),
                # Towers that were never trained together: class texts carry no information.
                "text_means_nothing": results[0]["training"]["facts"].get("joint_space") is False,
                "trainable_parameters": results[0]["training"]["trainable_parameters"],
                "median_seconds": median(r["timing"]["total"] for r in results),
                "peak_memory_mib": max(
                    (mib for r in results if (mib := r["timing"]["peak_memory_mib"]) is not None),
                    default=None,  # on Windows
                ),
            }
        )
    return {
        "backbone": short_name(backbone),
        "shots": shots,
        "methods": methods,
        "recall": _recall(lines),
        "recorded": _against_recorded(config, reference),
    }


def _bootstrap(config: StudyConfig) -> tuple[int, int]:
    """Resamples and seed."""
    return config.settings.get("n_resamples", 2000), config.settings.get("seed", 0)


def _intervals(
    config: StudyConfig, lines: Mapping[str, _Runs], compared: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Interval over groups crossed with draws of each method's mean, `{metric: {"ci95"}}`.

    The comparison has computed it of all draws that it pairs; what is left is computed here.
    """
    sides: dict[str, Mapping[str, Any]] = {}
    for name, of in compared.items():
        for line, side in ((name, "b"), (config.reference, "a")):
            if of["draws"] == sorted(lines[line]):
                sides[line] = {k: row[side] for k, row in of["metrics"].items()}
    alone = {
        name: [
            PairedRun(draw, one.labels, one.groups, one.probabilities, one.probabilities)
            for draw, one in sorted(runs.items())
        ]
        for name, runs in lines.items()
        if name not in sides
    }
    for name, runs in alone.items():
        rows = compare_methods({name: runs}, COMPARED, *_bootstrap(config))[name]
        sides[name] = {k: row["a"] for k, row in rows.items()}
    return {
        name: {k: {"ci95": row["ci95"]} for k, row in rows.items()} for name, rows in sides.items()
    }


def _adjust(sections: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Give every comparison its p-value by Holm; how many there are of each metric."""
    versus = [
        of for section in sections for m in section["methods"] if (of := m["versus_reference"])
    ]
    counts = {}
    for of in versus:
        of["p_holm"] = {}
    for name in COMPARED:
        values = [of["metrics"][name]["p_value"] for of in versus]
        for of, p in zip(versus, adjust_holm(values), strict=True):
            of["p_holm"][name] = p
        counts[name] = len(values) - values.count(None)
    return counts


def _judge(config: StudyConfig, sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Goals with what came of them; not measured, as long as a cell of it is missing."""
    rows = []
    for goal in config.goals:
        for section in sections:
            place = (section["backbone"], section["shots"])
            if goal.backbone not in (None, place[0]) or goal.shots not in (None, place[1]):
                continue
            line = next((m for m in section["methods"] if m["name"] == goal.method), None)
            value, ci95, met = None, None, None
            if line is not None and goal.gain is not None and line["versus_reference"]:
                row = line["versus_reference"]["metrics"][goal.metric]
                value, ci95 = row["value"], row["ci95"]
                met = value is not None and value >= goal.gain and row["verdict"] == "better"
            elif line is not None and goal.gain is None:
                row = line["metrics"][goal.metric]
                value, ci95 = row["mean"], row.get("ci95")
                if value is not None:
                    met = goal.least is None or value >= goal.least
                    met = met and (goal.most is None or value <= goal.most)
            names = {"backbone": place[0], "shots": place[1]}
            rows.append({**asdict(goal), **names, "value": value, "ci95": ci95, "met": met})
    return rows


def _cells(outcomes: Sequence[tuple[Cell, Outcome]]) -> Iterator[dict[str, Any]]:
    """Every finished cell with its values."""
    names = {backbone: short_name(backbone) for backbone in {c.backbone for c, _ in outcomes}}
    for cell, outcome in outcomes:
        results = outcome.results
        timing, support = results["timing"], results["data"]["support"]
        yield {
            "backbone": names[cell.backbone],
            "method": cell.method.name,
            "shots": cell.shots,
            "draw": cell.draw,
            "images": results["n"],
            "groups": results["n_groups"],
            "labels": 0 if cell.method.method == "zero_shot" else support["label_budget"],
            "trainable_parameters": results["training"]["trainable_parameters"],
            "seconds": timing["total"],
            "peak_memory_mib": timing["peak_memory_mib"],
            "metrics": {name: of["value"] for name, of in results["metrics"].items()},
        }


def _compare(
    config: StudyConfig, reference: _Runs, lines: Mapping[str, _Runs], unit: str
) -> dict[str, dict[str, Any]]:
    """Paired differences of each method over its draws on identical splits and supports."""
    pairs: dict[str, list[PairedRun]] = {}
    for name, runs in lines.items():
        for draw in sorted(reference.keys() & runs.keys()) if name != config.reference else ():
            a, b = reference[draw], runs[draw]
            same = a.results["data"]["split_hash"] == b.results["data"]["split_hash"]
            if same and a.file_names == b.file_names and a.class_names == b.class_names:
                run = PairedRun(draw, a.labels, a.groups, a.probabilities, b.probabilities)
                pairs.setdefault(name, []).append(run)
    differences = compare_methods(pairs, COMPARED, *_bootstrap(config), unit=unit)
    return {
        name: {"draws": [run.draw for run in runs], "metrics": differences[name]}
        for name, runs in pairs.items()
    }


def _label_budget(method: StudyMethod, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Labels spent per draw and the groups they came from, each as `[least, most]`."""
    if method.method == "zero_shot":  # a support is drawn so that its splits are the others'
        return {"labels": [0, 0], "per_class": {}}
    supports = [r["data"]["support"] for r in results]
    labels, groups = ([s[f"{k}_per_class"] for s in supports] for k in ("labels", "groups"))

    def least_and_most(rows: Sequence[Mapping[str, int]], key: str) -> list[int]:
        counts = [row[key] for row in rows]
        return [min(counts), max(counts)]

    return {
        "labels": least_and_most(supports, "label_budget"),  # those of the validation too
        "per_class": {
            name: {"labels": least_and_most(labels, name), "groups": least_and_most(groups, name)}
            for name in labels[0]
        },
    }


def _recall(lines: Mapping[str, _Runs]) -> list[dict[str, Any]]:
    """Recall of every class in every group, over the draws that test the group."""
    every = [one for runs in lines.values() for one in runs.values()]
    shared = {id(one.groups): one.groups for one in every}
    ids = {key: check_groups(names, len(names)) for key, names in shared.items()}
    groups = np.unique(np.concatenate(list(ids.values())))
    number = {key: np.searchsorted(groups, names) for key, names in ids.items()}
    classes = sorted({name for one in every for name in one.class_names})
    images = np.zeros((len(groups), len(classes)), np.int64)  # of the first cell that tests them
    summaries: dict[tuple[int, int], dict[str, Any]] = {}
    for name, runs in lines.items():
        recalls = np.full((len(runs), *images.shape), np.nan)
        for recall, one in zip(recalls, runs.values(), strict=True):
            column = np.array([classes.index(label) for label in one.class_names])
            cells = number[id(one.groups)] * len(classes) + column[one.labels]
            right = one.probabilities.argmax(1) == one.labels
            counts = (np.bincount(at, minlength=images.size) for at in (cells, cells[right]))
            n, hits = (count.reshape(images.shape) for count in counts)
            np.divide(hits, n, out=recall, where=n > 0)
            np.copyto(images, n, where=images == 0)
        for g, c in np.argwhere(~np.isnan(recalls).all(0)).tolist():
            defined = [value for value in recalls[:, g, c].tolist() if value == value]
            summaries.setdefault((g, c), {})[name] = summarise_draws(defined)
    return [
        {"group": str(groups[g]), "class": classes[c], "n": int(images[g, c]), "methods": of}
        for (g, c), of in sorted(summaries.items())
    ]


def _against_recorded(config: StudyConfig, reference: _Runs) -> dict[str, Any] | None:
    """Largest differences of the reference from the values that the episodes file records."""
    _, recorded = read_frozen(config.settings.get("episodes"))
    both = [draw for draw in reference if recorded.get(draw)]
    gaps: dict[str, list[float]] = {}
    for draw in both:
        for name, value in recorded[draw].items():
            ours = reference[draw].results["metrics"].get(name, {}).get("value")
            if ours is not None:
                gaps.setdefault(name, []).append(abs(ours - value))
    if not gaps:
        return None
    largest = {name: max(values) for name, values in gaps.items()}
    return {"n_draws": len(both), "largest_difference": largest}


def render_report(report: Mapping[str, Any]) -> str:
    """Render a report as Markdown; on synthetic images every heading is marked."""
    titles = [METRICS[name].title for name in COMPARED]
    summarised = [METRICS[name].title for name in SUMMARISED]
    values = {
        **{name: report[name] for name in ("data", "reference", "unit", "notes")},
        "mark": SYNTHETIC if report["synthetic"] else "",
        "paired_header": ["method", "draws", *(h for title in titles for h in (title, "verdict"))],
        "summary_header": [
            *("method", "draws", *summarised, "labels", "trainable parameters", "seconds a draw")
        ],
        "sections": [
            _section_values(section, report["reference"], report["unit"])
            for section in report["sections"]
        ],
        "failures": [[failure["cell"], failure["error"]] for failure in report["failures"]],
        "n_missing": len(report["missing"]),
    }
    return render("study_report.md.j2", values)


def _section_values(section: Mapping[str, Any], reference: str, unit: str) -> dict[str, Any]:
    """What `study_report.md.j2` names of one backbone and number of shots."""
    methods, names = section["methods"], [m["name"] for m in section["methods"]]
    shown_as = {m["name"]: m["name"] + "*" * m["text_means_nothing"] for m in methods}
    budgets = [m["label_budget"]["per_class"] for m in methods]
    # A recall in each of hundreds of groups of an image or two is noise: the largest are shown.
    recall = section["recall"]
    largest = sorted(range(len(recall)), key=lambda i: -recall[i]["n"])[:RECALL_ROWS]
    recorded = section["recorded"]
    return {
        "backbone": section["backbone"],
        "shots": section["shots"],
        "labels": ", ".join(
            f"{extent(of['labels'])} {name} (of {extent(of['groups'])} {unit})"
            for name, of in max(budgets, key=len).items()
        ),
        "paired": [
            [shown_as[m["name"]], *_paired(m["versus_reference"])]
            for m in methods
            if m["name"] != reference
        ],
        "summary": [
            [
                shown_as[m["name"]],
                len(m["draws"]),
                *(_spread(m["metrics"][k]) for k in SUMMARISED),
                extent(m["label_budget"]["labels"]),
                f"{m['trainable_parameters']:,}",
                f"{m['median_seconds']:.1f}",
            ]
            for m in methods
        ],
        "text_means_nothing": any(m["text_means_nothing"] for m in methods),
        "recorded": recorded
        and {
            "n_draws": recorded["n_draws"],
            "differences": ", ".join(
                f"{METRICS[k].title} {v:.4f}" for k, v in recorded["largest_difference"].items()
            ),
        },
        "recall_header": ["group", "class", "images", *(f"{name} (draws)" for name in names)],
        "recall": [
            [row["group"], row["class"], row["n"], *(_mean_recall(row, name) for name in names)]
            for row in (recall[i] for i in sorted(largest))
        ],
        "n_recall": len(recall),
    }


def _mean_recall(row: Mapping[str, Any], method: str) -> str:
    """`0.83 (3)`: mean and number of draws; nothing where no draw tests the group."""
    summary = row["methods"].get(method)
    return f"{summary['mean']:.2f} ({summary['n_draws']})" if summary else ""


def _paired(versus: Mapping[str, Any] | None) -> list[str]:
    if versus is None:
        return ["0", *["", "no draw in common"] * len(COMPARED)]
    cells = [str(len(versus["draws"]))]
    for name in COMPARED:
        row = versus["metrics"][name]
        shown = "undefined"
        if row["ci95"] is not None:
            low, high = row["ci95"]
            shown = f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells += [shown, "; ".join(text for text in (row["verdict"], row["note"]) if text)]
    return cells


def _spread(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "undefined"
    return f"{row['mean']:.3f}" + ("" if row["sd"] is None else f" (spread {row['sd']:.3f})")
