"""The model card: what a run measured, written so that it can be published as it stands.

A card is a pure function of `results.json`. It names classes, counts and numbers, and nothing that
leads to a patient or to a disk: no path, no file name, no group id.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from .errors import GloVLMError
from .metrics import METRICS

__all__ = [
    "CLASS_HEADER",
    "METRIC_HEADER",
    "class_rows",
    "group_unit",
    "metric_rows",
    "render_card",
    "write_card",
]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What the Hub takes as a licence; everything else is `other` with a name.
_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "openrail", "cc0-1.0", "cc-by-4.0"),
        *("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    }
)
# Metric ids of the Hub, where it has one for ours.
_HUB_METRICS = {"macro_auc": "roc_auc", "macro_f1": "f1", "brier": "brier_score"}


def render_card(results: Mapping[str, Any]) -> str:
    """Write the model card of a run.

    Args:
        results: The content of a run's `results.json`.

    Returns:
        Markdown with YAML front matter as the Hub reads it. Results on synthetic images carry the
        word "drawings" in the title and in every heading above a number.

    Raises:
        GloVLMError: The results lack something that a card must say.
    """
    try:
        return _render(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise GloVLMError(
            "Expected the results of `glovlm train`, found some that a card cannot be made from "
            f"({type(error).__name__}: {error}): run the training again with this version."
        ) from error


def write_card(run_folder: str | Path) -> Path:
    """Render the card of a run again, from its `results.json`.

    Args:
        run_folder: The output folder of `glovlm train`.

    Returns:
        The card, `README.md` in that folder.

    Raises:
        GloVLMError: The folder holds no run.
    """
    folder = Path(run_folder).expanduser()
    source = folder / "results.json"
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise GloVLMError(
            f"Expected the output folder of `glovlm train`, found no results.json in {folder}: "
            "give the folder that was its --output-dir."
        ) from None
    except (OSError, ValueError) as error:
        raise GloVLMError(f"{source} cannot be read ({error}): run the training again.") from None
    card = folder / "README.md"
    temporary = folder / f".README.md.{os.getpid()}"
    temporary.write_text(render_card(results), encoding="utf-8")
    temporary.replace(card)
    return card


METRIC_HEADER = ("metric", "value", "95% interval", "note")
CLASS_HEADER = ("class", "images", "groups", "recall", "specificity", "AUC", "note")


def metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Say each metric as a person reads it: one row for each, under `METRIC_HEADER`.

    Args:
        metrics: `results["metrics"]`.
    """
    return [
        [_metric_title(name), _number(entry["value"]), _interval(entry), _note(entry)]
        for name, entry in metrics.items()
    ]


def class_rows(per_class: Mapping[str, Any]) -> list[list[str]]:
    """Say what was measured of each class: one row for each, under `CLASS_HEADER`.

    Args:
        per_class: `results["per_class"]`.
    """
    rows = []
    for name, row in per_class.items():
        entries = [row[measure] for measure in ("recall", "specificity", "auc")]
        cells = [f"{_number(entry['value'])} {_interval(entry)}".strip() for entry in entries]
        notes = dict.fromkeys(note for entry in entries if (note := _note(entry)))
        rows.append([name, str(row["n"]), str(row["groups"]), *cells, "; ".join(notes)])
    return rows


def group_unit(column: str) -> str:
    """Say what the groups of a column are, in the plural: `slide_id` -> `slides`."""
    if column == "near_duplicate":
        return "near-duplicate clusters"
    return column.removesuffix("_id").replace("_", " ") + "s"


def _render(results: Mapping[str, Any]) -> str:
    config, data = results["config"], results["data"]
    synthetic = bool(results.get("synthetic"))
    drawings = " (drawings)" if synthetic else ""
    title = f"{_backbone(results)} adapted by {config['method']}, {_shots(data)}{drawings}"
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(results, title, drawings),
        title=title,
        drawings=drawings,
        summary=_summary(results, synthetic),
        classes=_classes(data),
        labels=_labels(data),
        label_notes=_label_notes(config, data),
        split=_bullets(_split(results)),
        metric_notes=_metric_notes(results),
        metrics=_table(METRIC_HEADER, metric_rows(results["metrics"])),
        per_class=_table(CLASS_HEADER, class_rows(results["per_class"])),
        confusion=_confusion(results),
        calibration=_reliability(results),
        limits=_bullets(_limits(results, synthetic)),
        settings=_settings(results),
        environment=_environment(results["environment"]),
        citation=_bullets(_citations(results)),
    )


# ------------------------------------------------------------------------------ front matter


def _front_matter(results: Mapping[str, Any], title: str, drawings: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name, dataset = results["data"]["name"], results["data"].get("hub_id")
    measured = {k: e["value"] for k, e in results["metrics"].items() if e["value"] is not None}
    evaluation = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset or re.sub(r"[^\w.-]+", "-", name).lower(),
            dataset_name=name + drawings,
            dataset_split="test",
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_name=_metric_title(metric) + drawings,
            metric_value=round(value, 4),
        )
        for metric, value in measured.items()
    ]
    license_id, license_name = _license(results)
    tags = ["glomerulus", "nephropathology", "few-shot", "vision-language"]
    card = ModelCardData(
        language="en",
        license=license_id,
        license_name=license_name,
        library_name="hf-glovlm",
        pipeline_tag="image-classification",
        tags=[*tags, str(results["config"]["method"]), *(["drawings"] if drawings else [])],
        base_model=[x for x in _backbone(results).split("+") if _HUB_ID.fullmatch(x)] or None,
        datasets=[dataset] if dataset else None,
        metrics=[_HUB_METRICS.get(metric, metric) for metric in measured] or None,
        model_name=title if evaluation else None,
        eval_results=evaluation or None,
    )
    return str(card.to_yaml())


def _license(results: Mapping[str, Any]) -> tuple[str, str | None]:
    """The base model's licence passes on: an id that the Hub knows, or `other` and a name."""
    stated = str(results["backbone"]["license"] or "").lower()
    parts = sorted({part.strip() for part in stated.split("+") if part.strip()})
    if len(parts) == 1 and parts[0] in _LICENSES:
        return parts[0], None
    name = re.sub(r"[^a-z0-9.]+", "-", " and ".join(parts)).strip("-")
    return "other", name or "not-stated"


# ---------------------------------------------------------------------------------- sections


def _summary(results: Mapping[str, Any], synthetic: bool) -> str:
    data, method = results["data"], results["config"]["method"]
    what = (
        f"An image classifier of {len(data['classes'])} classes: `{_backbone(results)}` adapted by "
        f"`{method}` from {_shots(data)} of `{data['name']}`, with hf-glovlm."
    )
    if not synthetic:
        return what
    return what + (
        "\n\n**Learned from drawings, measured on drawings.** The images are synthetic; the "
        "numbers below test the software and say nothing about kidneys."
    )


def _classes(data: Mapping[str, Any]) -> str:
    rows = [
        [row["name"], row["display_name"], " · ".join(row["prompts"])] for row in data["classes"]
    ]
    return _table(["class", "display name", "prompts"], rows)


def _labels(data: Mapping[str, Any]) -> str:
    support = data["support"]
    labels, groups = support["labels_per_class"], support["groups_per_class"]
    names = [row["name"] for row in data["classes"]]
    return _table(
        ["class", "labels", f"contributing {group_unit(data['group_column'])}"],
        [[name, str(labels[name]), str(groups[name])] for name in names],
    )


def _label_notes(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    support = data["support"]
    text = (
        f"Drawn by `{data['sampler']}`, seed {config['seed']}, draw {config['draw']}. "
        f"Label budget: {support['label_budget']}"
    )
    if support["validation_labels"]:
        return f"{text}, of which {support['validation_labels']} served for validation."
    return f"{text}; nothing was chosen on further labels."


def _split(results: Mapping[str, Any]) -> Iterable[str]:
    data = results["data"]
    yield f"Groups are {group_unit(data['group_column'])}; none of them is on two sides."
    if results["config"]["episodes"]:
        yield f"The episode was frozen beforehand: draw {results['config']['draw']} of its file."
    yield from results["notes"]
    yield f"Split hash: `{data['split_hash']}`"
    yield f"Data fingerprint: `{data['fingerprint']}`"


def _metric_notes(results: Mapping[str, Any]) -> str:
    unit, bootstrap = group_unit(results["data"]["group_column"]), results["bootstrap"]
    prior = ", ".join(f"{name} {_number(x)}" for name, x in results["prior"].items())
    return (
        f"{results['n']} test images of {results['n_groups']} {unit}; {bootstrap['interval']} "
        f"intervals of a bootstrap over {unit} with all their images, {bootstrap['n_resamples']} "
        f"resamples. Decision: {results['threshold']}. Fractions of the test images: {prior}."
    )


def _confusion(results: Mapping[str, Any]) -> str:
    names = list(results["per_class"])
    counts = results["confusion_matrix"]
    rows = [[name, *map(str, row)] for name, row in zip(names, counts, strict=True)]
    return _table(["", *names], rows)


def _reliability(results: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{_number(b['lower'])} to {_number(b['upper'])}",
            str(b["count"]),
            _number(b["confidence"]),
            _number(b["accuracy"]),
        ]
        for b in results["reliability"]["bins"]
        if b["count"]
    ]
    return _table(["top probability", "images", "mean probability", "right"], rows)


def _limits(results: Mapping[str, Any], synthetic: bool) -> Iterable[str]:
    unit = group_unit(results["data"]["group_column"])
    if synthetic:
        yield "All images are drawings; on real tissue nothing is known."
    if any("too few groups" in entry["note"] for entry in results["metrics"].values()):
        yield f"Too few {unit} for a trustworthy interval: read each as too narrow."
    rare = [name for name, row in results["per_class"].items() if not row["n"]]
    if rare:
        yield f"Not measured at all, for lack of test images: {', '.join(rare)}."
    yield (
        "One draw of labels. Another draw gives other numbers; compare methods on the same draws "
        "and the same split only."
    )
    yield (
        "It learned as if classes were as frequent as their labels; where they are not, its "
        "probabilities are off, and a fixed threshold may fail where the AUC is high."
    )
    yield "Stain, scanner, magnification and laboratory other than those of the data are untested."


def _settings(results: Mapping[str, Any]) -> str:
    """What shaped the model, in numbers and words; what names a place stays out."""
    config, training = results["config"], results["training"]
    told = ("seed", "draw", "test_fraction", "validation_shots", "augment", "accumulate")
    recipe = training["recipe"] or {}
    given = {
        "method": config["method"],
        **results["method"]["settings"],
        **recipe,
        **({"loss": training["loss"], "epochs_run": training["epochs_run"]} if recipe else {}),
        **{name: config[name] for name in (*told, "mixed_precision", "clip_norm")},
        "trainable_parameters": training["trainable_parameters"],
    }
    rows = [[name, f"`{value}`"] for name, value in given.items() if _is_plain(value)]
    return _table(["setting", "value"], rows)


def _environment(environment: Mapping[str, Any]) -> str:
    rows = [[name, str(value)] for name, value in environment.items() if _is_plain(value)]
    return _table(["", "version or value"], rows)


def _is_plain(value: object) -> bool:
    """Whether it is a number or a word, and no path."""
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and not re.search(r"[/\\]", value)
    )


def _citations(results: Mapping[str, Any]) -> Iterable[str]:
    from .backbones import BACKBONES

    yield f"Method: {results['method']['citation']}"
    parts = _backbone(results).split("+")
    for row in BACKBONES.values():
        if row.name in parts or row.hub_id in parts:
            yield f"Backbone `{row.hub_id or row.name}`: {row.citation}"
    yield "Protocol: Glo-VLMs, Guo et al., arXiv:2508.15960 and arXiv:2511.11984"
    yield "Software: hf-glovlm, in the version that stands under Environment"


# ------------------------------------------------------------------------------------- words


def _backbone(results: Mapping[str, Any]) -> str:
    return str(results["backbone"]["name"])


def _shots(data: Mapping[str, Any]) -> str:
    counts = data["support"]["labels_per_class"].values()
    if len(set(counts)) > 1:
        return f"{min(counts)} to {max(counts)} labels per class"
    return f"{max(counts)} labels per class" if any(counts) else "no labels"


def _metric_title(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, Any]) -> str:
    return "[{:.3f}, {:.3f}]".format(*entry["ci95"]) if entry["ci95"] else ""


def _note(entry: Mapping[str, Any]) -> str:
    undefined = entry["undefined_resamples"]
    lost = f"undefined in {undefined} resamples" if undefined else ""
    return "; ".join(note for note in (entry["note"], lost) if note)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break inside a cell would end it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
