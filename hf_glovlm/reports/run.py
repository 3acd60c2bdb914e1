"""A run's report: from its `results.json` to one page that needs nothing else.

The page computes no number that its results do not hold, but sums and percentages of their counts.
It names classes and groups' counts, and nothing that leads to a patient or to a disk. Pictures, and
the names of their files, are in it only where they are asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup, escape

from ..errors import GloVLMError
from ..metrics import METRICS
from ..publish.card import SUBGROUPS
from ..publish.identifiers import Identifiers, identifiers_of, without_names
from ..rendering import (
    group_unit,
    interval,
    measured,
    metric_title,
    number,
    percentage,
    render_page,
)
from .reading import READING
from .run_charts import MOST_CLASSES, draw_confusion, draw_curves, draw_groups, draw_reliability

__all__ = ["Pictures", "render_run", "write_run"]

SIDES = {
    "support": "learned from",
    "validation": "chose settings",
    "calibration": "fitted the probabilities",
    "test": "measured here",
}
AGAIN = "Train again, or measure anew with `glovlm evaluate`, then `glovlm report`."
NO_CURVES = (
    "These results hold no curves: an earlier version, a cell of a study and a run that kept no "
    "model have none."
)
HOW_TO_SEE = "Pictures are left out, since reports travel: `glovlm report RUN --with-images`."
# What of results a page may show; the rest (hashes, curves of abstention, places) is not read.
_KEYS = (
    "kind", "metrics", "not_computed", "per_class", "confusion_matrix", "reliability", "prior",
    "threshold", "n", "n_groups", "bootstrap", "curves", "per_group", "operating_points",
    "method", "backbone", "training", "abstention", "sets", "subgroups", "calibration", "controls",
    "prior_correction", "transductive", "notes", "synthetic", "timing", "environment",
)  # fmt: skip
_DATA = (
    "name", "classes", "counts", "groups", "drawn", "group_column", "shots", "sampler", "support",
    "groups_seen_in_training", "images_seen_in_training", "stain", "fingerprint", "split_hash",
)  # fmt: skip
_CONFIG = ("method", "shots", "seed", "draw", "loss", "split", "alpha", "conformal", "max_risk")
_MEASURES = {"recall": "recall", "specificity": "specificity", "auc": "AUC", "auprc": "AUPRC"}
_TIMES = ("data", "load", "adapt", "predict", "metrics", "total")
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, UndefinedError)
_MOST_MARKS = 300  # groups of a side that are drawn one by one


@dataclass(frozen=True)
class Pictures:
    """Pictures of a report, as addresses that hold them, each with its caption.

    Attributes:
        mistakes: Images named wrong, the surest first: `address`, `heat` (that of its heat map, or
            `None`), `label` (in the data), `named`, `p` of the class named, `p_label`, `file`.
        examples: Images named right, by class; `named` and `p_label` are `None`.
        sentences: What could not be shown, and why.
        asked: Whether pictures were asked for.
    """

    mistakes: Sequence[Mapping[str, str | None]] = ()
    examples: Sequence[Mapping[str, str | None]] = ()
    sentences: Sequence[str] = (HOW_TO_SEE,)
    asked: bool = field(default=False)


def write_run(
    results: Mapping[str, Any], folder: Path | None, target: Path, *, with_images: bool = False
) -> None:
    """Write the report of a run or of an evaluation.

    Args:
        results: The content of its `results.json`.
        folder: The run's folder, whose identifiers stay out; `None` where there is none.
        target: The page to write.
        with_images: Whether it shows pictures, and the names of their files.

    Raises:
        GloVLMError: The results lack what a report shows, or a class is named like a patient.
    """
    from ..files import write_text

    forbidden = Identifiers() if folder is None else identifiers_of(folder)
    pictures = Pictures() if folder is not None else Pictures(sentences=())
    if with_images:
        from .pictures import collect_pictures

        pictures = collect_pictures(results, folder)
    write_text(target, render_run(results, pictures, forbidden))


def render_run(
    results: Mapping[str, Any],
    pictures: Pictures | None = None,
    forbidden: Identifiers | None = None,
) -> str:
    """Page of a run or of an evaluation.

    Args:
        results: The content of its `results.json`; also that of an earlier version.
        pictures: What it shows of the images.
        forbidden: Names of patients, slides and files, which are withheld.

    Raises:
        GloVLMError: The results lack what a report shows, or a class is named like a patient.
    """
    try:
        shown = {key: results[key] for key in _KEYS if key in results}
        for part, keys in (("data", _DATA), ("config", _CONFIG)):
            shown[part] = {key: results[part][key] for key in keys if key in results[part]}
        shown = without_names(shown, forbidden or Identifiers())
        return render_page("run_report.html.j2", _describe(shown, pictures or Pictures()))
    except _MALFORMED as error:
        raise GloVLMError(
            "Expected results of `glovlm train` or `glovlm evaluate`, found some that a report "
            f"cannot be made from ({type(error).__name__}: {error}). {AGAIN}"
        ) from error


def _describe(results: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What `run_report.html.j2` names."""
    data = results["data"]
    over_images = results["bootstrap"]["unit"] == "images"
    unit = "images" if over_images else group_unit(data["group_column"])
    curves, why_no_curves = _curves(results)
    return {
        "READING": {name: _prose(text) for name, text in READING.items()},
        "title": _title(results),
        "synthetic": bool(results.get("synthetic")),
        "unit": unit,
        "one": unit.removesuffix("s"),
        "n": results["n"],
        "n_groups": results["n_groups"],
        "lead": _lead(results, unit),
        "warnings": _warnings(results, unit),
        "facts": _facts(results, unit),
        "notes": results.get("notes", []),
        "limits": _limits(results),
        "pictures": pictures,
        "remarks": [_prose(sentence) for sentence in pictures.sentences],
        "groups": _groups(results, unit),
        "sides": _sides(results),
        "metrics": _metrics(results),
        "not_computed": {
            metric_title(name): why for name, why in (results.get("not_computed") or {}).items()
        },
        "bootstrap": results["bootstrap"],
        "class_table": _class_table(results, unit),
        "confusion": draw_confusion(results),
        "confused": _confused(results),
        "curves": curves,
        "why_no_curves": _prose(why_no_curves),
        "threshold": results["threshold"],
        "operating": _operating(results, unit),
        "reliability": draw_reliability(results["reliability"]["bins"]),
        "bins": [
            [f"{number(b['lower'])} to {number(b['upper'])}", b["count"], number(b["confidence"]),
             number(b["accuracy"])]
            for b in results["reliability"]["bins"] if b["count"]
        ],
        "calibration": results.get("calibration") or {},
        "sets": results.get("sets") or {},
        "abstention": results.get("abstention") or {},
        "config": results["config"],
        "controls": _controls(results),
        "subgroups": _subgroups(results, unit),
        "budget": _budget(results, unit),
        "cost": _cost(results),
        "made": _made(results),
        "AGAIN": _prose(AGAIN),
    }  # fmt: skip


def _prose(text: str) -> Markup:
    """A sentence of ours, its commands in backticks as code; whatever it quotes stays text."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _without_empty(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table without the columns in which no row says anything."""
    kept = [k for k in range(len(header)) if any(str(row[k]) for row in rows)]
    return {"header": [header[k] for k in kept], "rows": [[row[k] for k in kept] for row in rows]}


# ----------------------------------------------------------------------------- the first screen


def _title(results: Mapping[str, Any]) -> str:
    name = results["data"]["name"]
    if results.get("kind") == "evaluation" or "method" not in results:
        return f"Evaluation on {name}"
    return f"{results['method']['name']} on {name}"


def _share(value: float | None) -> str:
    return percentage(None if value is None else 100 * value)


def _range(bounds: Sequence[float] | None, unit: str) -> str:
    if not bounds:
        return "no interval"
    low, high = (percentage(100 * bound) for bound in bounds)
    return f"95% interval over {unit} {low} to {high}"


def _right(results: Mapping[str, Any]) -> int:
    return sum(row[k] for k, row in enumerate(results["confusion_matrix"]))


def _lead(results: Mapping[str, Any], unit: str) -> list[str]:
    """The results in plain sentences, the first of them alone if need be."""
    n, accuracy = results["n"], results["metrics"]["accuracy"]
    of = "" if unit == "images" else f" of {results['n_groups']} {unit}"
    kind = "synthetic images" if results.get("synthetic") else "images"
    sentences = [
        f"On {n} {kind}{of}{_learned(results, unit)}, the model named the right class for "
        f"{_right(results)} ({_share(accuracy['value'])}; {_range(accuracy['ci95'], unit)})."
    ]
    common = max(results["prior"], key=lambda name: results["prior"][name])
    sentences.append(
        f"Always naming the commonest class, {common}, would be right for "
        f"{results['per_class'][common]['n']} ({_share(results['prior'][common])})."
    )
    known = {k: v for k, v in results["per_class"].items() if v["recall"]["value"] is not None}
    if known:
        worst = min(known, key=lambda name: known[name]["recall"]["value"])
        row, place = known[worst], list(results["per_class"]).index(worst)
        hits = results["confusion_matrix"][place][place]
        if hits < row["n"]:
            sentences.append(
                f"It recognised {worst} least often: {hits} of {row['n']} images "
                f"({_share(row['recall']['value'])}; {_range(row['recall']['ci95'], unit)})."
            )
        else:
            sentences.append(
                "Every test image got its own class: where it fails, so few do not show."
            )
    rows = results.get("per_group")
    if rows and unit != "images":
        spotless = sum(row["right"] == row["n"] for row in rows)
        sentences.append(
            f"{spotless} of {len(rows)} {unit} have no error; the worst has {rows[0]['right']} of "
            f"{rows[0]['n']} images right."
        )
    return sentences


def _learned(results: Mapping[str, Any], unit: str) -> str:
    """Whether the model learned from what is measured, as a clause."""
    data = results["data"]
    if "groups_seen_in_training" not in data:
        return " that it did not learn from"
    seen = data["groups_seen_in_training"]
    if seen is None:
        return " (whether it learned from some is not known)"
    if seen or data.get("images_seen_in_training"):
        return f" (it learned from {seen} of these {unit})"
    return " that it did not learn from"


def _warnings(results: Mapping[str, Any], unit: str) -> list[str]:
    """What must be read before any number."""
    data, sentences = results["data"], []
    if results.get("synthetic"):
        sentences.append(
            "Synthetic images: the numbers test the software and say nothing about tissue."
        )
    if data.get("groups_seen_in_training"):
        sentences.append(f"The model learned from some of these {unit}: the numbers flatter it.")
    if unit == "images":
        sentences.append("Patients are unknown: the intervals are over images, and too narrow.")
    elif any("too few groups" in entry["note"] for entry in results["metrics"].values()):
        sentences.append(f"Few {unit}, in all or of a class: the intervals are wide.")
    flagged = [one["title"] for one in (results.get("controls") or {}).values() if one["flagged"]]
    if flagged:
        sentences.append(
            f"The labels can be guessed without the tissue ({', '.join(flagged)}): see Controls."
        )
    return sentences


def _limits(results: Mapping[str, Any]) -> list[str]:
    """What no number of the page says, whatever it is."""
    once = "One draw of one data set" if "drawn" in results["data"] else "One data set"
    return [
        f"{once}: another laboratory, stain or scanner may give other numbers.",
        f"It knows its {len(results['per_class'])} classes and nothing else: whatever is shown is "
        "given one of these names.",
        "The labels are taken as true; how readers differ is not in these intervals.",
    ]


def _facts(results: Mapping[str, Any], unit: str) -> list[tuple[str, str, str]]:
    """Name, value and what stands below it."""
    data, facts = results["data"], []
    facts.append(("Test images", str(results["n"]), f"of {results['n_groups']} {unit}"))
    facts.append(("Classes", str(len(results["per_class"])), ""))
    for name in ("balanced_accuracy", "macro_auc"):
        entry = results["metrics"][name]
        facts.append((metric_title(name), number(entry["value"]), interval(entry["ci95"])))
    if budget := (data.get("support") or {}).get("label_budget"):
        facts.append(("Labels used", str(budget), "to learn, choose and calibrate"))
    if "backbone" in results:
        facts.append(("Backbone", _backbone(results), ""))
    return facts


def _backbone(results: Mapping[str, Any]) -> str:
    backbone = results["backbone"]
    return str(backbone.get("base", backbone["name"]))


# ------------------------------------------------------------------------------------- sections


def _groups(results: Mapping[str, Any], unit: str) -> dict[str, Any] | None:
    rows = results.get("per_group")
    if not rows or unit == "images":
        return None
    table = [
        [k + 1, row["n"], row["right"], _share(row["right"] / row["n"])]
        for k, row in enumerate(rows)
    ]
    return {"chart": draw_groups(rows, unit), "rows": table}


def _sides(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sides of the split, with a mark for every group on each."""
    data = results["data"]
    held, counts = data.get("groups") or {}, data.get("counts") or {}
    sides = []
    for side, what in SIDES.items():
        if not held.get(side):
            continue
        drawn = (data.get("drawn") or {}).get(side)
        marks = [""] * held[side] if drawn is None else [sum(group) for group in drawn]
        sides.append(
            {
                "name": side,
                "what": what,
                "groups": held[side],
                "images": sum(counts[side].values()),
                "marks": marks[:_MOST_MARKS],
                "left": max(len(marks) - _MOST_MARKS, 0),
            }
        )
    return sides


def _metrics(results: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, entry in results["metrics"].items():
        row = METRICS.get(name)
        _, note = measured([entry])
        rows.append(
            {
                "title": metric_title(name),
                "value": number(entry["value"]),
                "interval": _kept_together(interval(entry["ci95"])),
                "note": note,
                "reading": "" if row is None else f"{row.definition} {row.reading}".strip(),
            }
        )
    return rows


def _class_table(results: Mapping[str, Any], unit: str) -> dict[str, Any]:
    first = next(iter(results["per_class"].values()))
    kept = [name for name in _MEASURES if name in first]
    rows = [
        [name, row["n"], row["groups"], *_cells([row[m] for m in kept])]
        for name, row in results["per_class"].items()
    ]
    header = ["class", "images", *([] if unit == "images" else [unit])]
    if unit == "images":
        rows = [[*row[:2], *row[3:]] for row in rows]
    return _without_empty([*header, *(_MEASURES[m] for m in kept), "note"], rows)


def _confused(results: Mapping[str, Any]) -> list[list[Any]]:
    """Pairs that were confused, the most often first: label, named, images, of."""
    names = list(results["per_class"])
    pairs = [
        [label, prediction, count, results["per_class"][label]["n"]]
        for label, row in zip(names, results["confusion_matrix"], strict=True)
        for prediction, count in zip(names, row, strict=True)
        if count and prediction != label
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:10]


def _curves(results: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    if "curves" not in results:
        return [], f"{NO_CURVES} {AGAIN}"
    drawn = draw_curves(results)
    left = sum(of is not None for of in results["curves"]["classes"].values()) - len(drawn)
    return drawn, (
        f"Of more than {MOST_CLASSES} classes those with the lowest AUC are drawn; {left} are not."
        if left
        else ""
    )


def _operating(results: Mapping[str, Any], unit: str) -> dict[str, Any]:
    """Sensitivity and specificity at thresholds that were chosen beforehand."""
    stated = results.get("operating_points")
    if stated is None:
        why = f"These results, of an earlier version, hold no thresholds. {AGAIN}"
        return {"why_not": _prose(why)}
    if stated["classes"] is None:
        return {"why_not": _prose(stated["why_not"])}
    rows = [
        [name, number(row["threshold"]), *_cells([row["sensitivity"], row["specificity"]])]
        for name, row in stated["classes"].items()
    ]
    chosen = str(stated["chosen_on"]).replace(" groups", f" {unit}")
    table = _without_empty(["class", "threshold", "sensitivity", "specificity", "note"], rows)
    return {"why_not": "", "chosen_on": chosen, "rule": stated["rule"], **table}


def _controls(results: Mapping[str, Any]) -> list[list[Any]]:
    """What is told from other things than the tissue, beside the model's own number."""
    return [
        [
            one["title"],
            metric_title(one["metric"]),
            *(["not computed", ""] if one["value"] is None else _bounds(one)),
            number(one["chance"]),
            number(results["metrics"].get(one["metric"], {}).get("value")),
            "yes" if one["flagged"] else "no",
            one["note"],
        ]
        for one in (results.get("controls") or {}).values()
    ]


def _bounds(entry: Mapping[str, Any]) -> list[str]:
    return [number(entry["value"]), _kept_together(interval(entry["ci95"]))]


def _cells(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of measures as `measured` makes them; a value and its interval stay on one line."""
    *values, note = measured(entries)
    return [*map(_kept_together, values), note]


def _kept_together(text: str) -> str:
    """A cell whose text stays on one line."""
    return Markup('<span class="whole">{}</span>').format(text) if text else ""


def _subgroups(results: Mapping[str, Any], unit: str) -> list[dict[str, Any]]:
    names = [m for m in ("balanced_accuracy", "macro_auc") if m in results["metrics"]]
    tables = []
    for column in SUBGROUPS:
        if values := (results.get("subgroups") or {}).get(column):
            rows = [
                [value, x["n"], x["n_groups"], *_cells([x["metrics"][m] for m in names])]
                for value, x in values.items()
            ]
            header = [column, "images", unit, *map(metric_title, names), "note"]
            tables.append({"name": f"By {column}", **_without_empty(header, rows)})
    return tables


def _budget(results: Mapping[str, Any], unit: str) -> list[list[Any]]:
    """Labels by what they served for, with the groups that they are of."""
    support = results["data"].get("support")
    if not support:
        return []
    groups = results["data"].get("groups") or {}
    rows = [("learned from (support)", sum(support["labels_per_class"].values()), "support")]
    for side, what in (("validation", SIDES["validation"]), ("calibration", SIDES["calibration"])):
        rows.append((f"{what} ({side})", support.get(f"{side}_labels", 0), side))
    rows.append(("were of former runs of the backbone", support.get("former_labels", 0), ""))
    rows.append(("in all", support["label_budget"], ""))
    return [[name, labels, groups.get(side, "")] for name, labels, side in rows]


def _cost(results: Mapping[str, Any]) -> list[list[str]]:
    timing, rows = results.get("timing") or {}, []
    for name in _TIMES:
        if timing.get(name) is not None:
            rows.append([f"{name}, s", f"{timing[name]:.3g}"])
    if timing.get("peak_memory_mib") is not None:
        rows.append(["peak memory, MiB", f"{timing['peak_memory_mib']:.0f}"])
    if "training" in results:
        rows.append(["trainable parameters", f"{results['training']['trainable_parameters']}"])
    environment = results.get("environment") or {}
    rows += [
        [name, str(environment[name])]
        for name in ("device", "gpu", "threads", "num_processes")
        if environment.get(name) is not None
    ]
    return rows


def _made(results: Mapping[str, Any]) -> list[list[str]]:
    """What this run was made from, for who repeats it."""
    data, config = results["data"], results["config"]
    values = {
        "data": data["name"],
        "stain": ", ".join(data.get("stain") or ()) or "not stated",
        "backbone": _backbone(results) if "backbone" in results else None,
        "method": (results.get("method") or {}).get("name"),
        "shots": data.get("shots"),
        "sampler": data.get("sampler"),
        "seed": config.get("seed"),
        "draw": config.get("draw"),
        "split hash": data.get("split_hash"),
        "data fingerprint": data.get("fingerprint"),
        "hf-glovlm": (results.get("environment") or {}).get("hf_glovlm"),
        "torch": (results.get("environment") or {}).get("torch"),
    }
    return [[name, str(value)] for name, value in values.items() if value is not None]
