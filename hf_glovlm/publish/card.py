"""Model cards: the values of a run's results that `templates/model_card.md.j2` shows.

A card is a pure function of `results.json`. It names classes, counts and numbers, and nothing that
leads to a patient or to a disk: no path, no file name, no group id. Every number in it stands in
the results, as it is there or rounded to three decimals (four in the front matter).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from ..backbones import MINI, NOT_VERIFIED, known_rows
from ..data.visibility import hidden_classes
from ..errors import GloVLMError
from ..files import check_kind, check_target, read_json, write_text
from ..metrics import METRICS
from ..rendering import (
    SYNTHETIC,
    Markdown,
    class_rows,
    code,
    group_unit,
    literal,
    measured,
    metric_rows,
    metric_title,
    named,
    number,
    render,
)
from .identifiers import PRIVATE
from .licences import Part

__all__ = ["SUBGROUPS", "Publication", "render_backbone_card", "render_card", "write_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What the Hub takes as a licence; everything else is `other` with a name.
_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "openrail", "cc0-1.0", "cc-by-4.0"),
        *("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    }
)
_FOLDER = "a local folder"
_FRONT = 2**16  # characters of front matter at most
_SHOWN = 3  # classes that it misses, pairs that it confuses
_TAGS = ("few-shot", "vision-language", "not-for-diagnosis")
SUBGROUPS = ("stain", "scanner", "kidney")  # an institution or a reader is somebody's name
# Settings of a run that its card shows in another section, and those that name places or machines.
NOT_IN_SETTINGS = {
    *("data", "output_dir", "backbone", "episodes", "prompts", "stain", "shots", "tracker"),
    *("method", "method_config", "epochs", "lr", "weight_decay", "batch_size", "loss", "max_steps"),
    *("temperature", "conformal", "alpha", "per_class", "max_risk", "prior", "n_resamples"),
    *("device", "overwrite", "resume", "cache", "save_model"),
    *("image_column", "label_column", "group_column", "group_from", "outline", "outline_of"),
}
_SEEN = {  # of an image, by the setting `outline`
    "centre": "a circle in its middle, on grey; the patch tokens in the circle are averaged",
    "blank": "the inside of its outline, on grey",
    "pool": "all of it; the patch tokens inside of its outline are averaged",
    "blank+pool": "the inside of its outline, on grey; the patch tokens inside are averaged",
}
# Results that not every run has.
_OPTIONAL = ("calibration", "prior_correction", "sets", "abstention", "transductive")
# Metric ids of the Hub, where it has one for ours.
_HUB_METRICS = {name: row.hub_name for name, row in METRICS.items() if row.hub_name}
_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, UndefinedError)


@dataclass(frozen=True)
class Publication:
    """Place and terms of a published model.

    Args:
        repo_id: `owner/name` on the Hub.
        what: `full` weights, or the `adapter` or `head` alone.
        base: Name of the base, `+` between two towers.
        revision: Commit of the base.
        terms: Sentences of `licences.describe_licence`.
    """

    repo_id: str
    what: Part
    base: str
    revision: str | None
    terms: list[str]


def render_card(results: Mapping[str, Any], publication: Publication | None = None) -> str:
    """Render the model card of a run.

    Args:
        results: The content of a run's `results.json`.
        publication: Where the model is published; by default the card is that of a local run.

    Returns:
        Markdown with YAML front matter as the Hub reads it. Results on synthetic images are
        marked as such in the title and in every heading above a number.

    Raises:
        GloVLMError: The results lack a value that a card must show.
    """
    try:
        return render("model_card.md.j2", _card_values(results, publication))
    except _MALFORMED as error:
        raise GloVLMError(
            "Expected the results of `glovlm train`, found some that a card cannot be made from "
            f"({type(error).__name__}: {error}): run the training again with this version."
        ) from error


def render_backbone_card(facts: Mapping[str, Any]) -> str:
    """Render the card of a backbone that `glovlm pretrain` made, as `mini` was.

    Args:
        facts: The content of its `pretraining.json`.

    Returns:
        Markdown with YAML front matter; every measured number is marked as one on synthetic
        images.

    Raises:
        GloVLMError: The facts lack a value that the card must show.
    """
    try:
        log = [[row["epoch"], number(row["loss"]), number(row["seconds"])] for row in facts["log"]]
        templates = [[text, number(value)] for text, value in facts["accuracy_by_template"].items()]
        return render("backbone_card.md.j2", {**facts, "log_rows": log, "template_rows": templates})
    except _MALFORMED as error:
        raise GloVLMError(
            "Expected the pretraining.json of `glovlm pretrain`, found one that a card cannot be "
            f"made from ({type(error).__name__}: {error}): pretrain again with this version."
        ) from error


def write_card(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Render the card of a run again, from its `results.json`, or that of a pretrained backbone.

    Args:
        run_folder: The output folder of `glovlm train`, that of `glovlm pretrain`, or `mini`.
        output: The file to write; `README.md` in that folder by default.

    Returns:
        The card.

    Raises:
        GloVLMError: The folder holds no run, or the card of `mini` has nowhere to go.
    """
    folder = Path(run_folder).expanduser()
    shipped = str(run_folder) == "mini" and not folder.exists()
    if shipped:
        if output is None:
            raise GloVLMError("The card of 'mini' needs a file to go to: give --output mini.md.")
        folder = MINI
    check_kind(folder, "adaptation", "pretraining")
    pretrained = not (folder / "results.json").exists() and (folder / "pretraining.json").is_file()
    source = folder / ("pretraining.json" if pretrained else "results.json")
    if not source.exists():
        raise GloVLMError(
            f"Expected the output folder of `glovlm train`, found no results.json in {folder}: "
            "give the folder that was its --output-dir."
        )
    card = Path(output).expanduser() if output is not None else folder / "README.md"
    check_target(card, "a card of ours", _is_card, [source])
    facts = read_json(source)
    try:
        text = render_backbone_card(facts) if pretrained else render_card(facts)
    except GloVLMError as error:
        raise GloVLMError(f"'{source}': {error}") from error
    write_text(card, text)
    return card


def _is_card(path: Path) -> bool:
    """Whether a file is a card of ours, by its front matter."""
    front = path.read_text(encoding="utf-8")[:_FRONT].split("\n---", 1)[0]
    return (
        front.startswith("---") and re.search(r"^library_name: hf-glovlm$", front, re.M) is not None
    )


def _card_values(results: Mapping[str, Any], publication: Publication | None) -> dict[str, Any]:
    """What `model_card.md.j2` names."""
    config, data = results["config"], results["data"]
    mark = SYNTHETIC if results.get("synthetic") else ""
    former = _former(results)
    title = f"{_backbone(results)}{former} adapted by {config['method']}, {_shots(data)}{mark}"
    confused = results["confusion_matrix"]
    mpp = data.get("mpp")
    hidden = _hidden(results)
    return {
        **{name: results[name] for name in ("n", "n_groups", "bootstrap", "threshold", "method")},
        "config": config,
        "data": data,
        "publication": publication,
        "front_matter": Markdown(_front_matter(results, title, mark, publication)),
        "title": title,
        "mark": mark,
        "glomeruli": _shows_glomeruli(results),
        "backbone": _backbone(results),
        "former": former,
        "backbones": known_rows(_backbone(results)),
        "shots": _shots(data),
        "unit": group_unit(data["group_column"]),
        "classes": [
            [
                literal(row["name"]),
                literal(row["display_name"]),
                Markdown(" · ".join(map(literal, row["prompts"]))),
            ]
            for row in data["classes"]
        ],
        **_labels(data),
        "stain": data.get("stain") or config.get("stain"),
        "mpp": None if mpp == "unknown" else mpp,
        "frozen": config.get("episodes"),
        "seen": _describe_outline(results["training"]),
        "hidden": hidden,
        "notes": [
            note for note in results["notes"] if note not in hidden and not PRIVATE.search(note)
        ],
        "licence": _licence(results),
        "prior": named(results["prior"]),
        "metrics": metric_rows(results["metrics"]),
        "per_class": [[literal(n), *row] for n, *row in class_rows(results["per_class"])],
        "confusion_header": ["", *map(literal, results["per_class"])],
        "confusion": [
            [literal(n), *row] for n, row in zip(results["per_class"], confused, strict=True)
        ],
        **_failures(results),
        "subgroups": list(_subgroups(results)),
        **{name: results.get(name) or {} for name in _OPTIONAL},
        "reliability": _reliability(results),
        "too_few_groups": any("too few groups" in e["note"] for e in results["metrics"].values()),
        "not_measured": [name for name, row in results["per_class"].items() if not row["n"]],
        "compute": _compute(results),
        "settings": _settings(results),
        "environment": [[k, v] for k, v in results["environment"].items() if _is_plain(v)],
        "citation": data.get("citation"),
    }


def _shows_glomeruli(results: Mapping[str, Any]) -> bool:
    """Whether the images are glomeruli, as far as the names of data set, classes and prompts go."""
    data = results["data"]
    texts = [data["name"]]
    for row in data["classes"]:
        texts += [row["name"], row["display_name"], *row["prompts"]]
    return any("glomerul" in text.lower() for text in texts)


# ------------------------------------------------------------------------------ front matter


def _front_matter(
    results: Mapping[str, Any], title: str, mark: str, publication: Publication | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name, dataset = results["data"]["name"], results["data"].get("hub_id")
    measured = {k: e["value"] for k, e in results["metrics"].items() if e["value"] is not None}
    evaluation = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset or re.sub(r"[^\w.-]+", "-", name).lower(),
            dataset_name=name + mark,
            dataset_split="test",
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_name=metric_title(metric) + mark,
            metric_value=round(value, 4),
        )
        for metric, value in measured.items()
    ]
    license_id, license_name = _license(results)
    base = [name for name in _backbone(results).split("+") if _HUB_ID.fullmatch(name)]
    relation = "finetune"
    if publication is not None and publication.what != "full":
        base, relation = publication.base.split("+"), "adapter"
    glomeruli = _shows_glomeruli(results)
    subject = ["glomerulus", "nephropathology"] if glomeruli else ["histopathology"]
    links = [row.page for row in known_rows(_backbone(results)) if row.page]
    card = ModelCardData(
        language="en",
        license=license_id,
        license_name=license_name,
        license_link=links[0] if license_name and len(links) == 1 else None,
        library_name="hf-glovlm",
        pipeline_tag="image-classification",
        tags=[*subject, *_TAGS, str(results["config"]["method"]), *(["synthetic"] if mark else [])],
        base_model=base or None,
        base_model_relation=relation if base else None,
        datasets=[dataset] if dataset else None,
        metrics=[_HUB_METRICS.get(metric, metric) for metric in measured] or None,
        model_name=title if evaluation else None,
        eval_results=evaluation or None,
    )
    return str(card.to_yaml())


def _license(results: Mapping[str, Any]) -> tuple[str, str | None]:
    """Licence of the base, which passes on: an id that the Hub knows, or `other` and a name."""
    stated = str(results["backbone"]["license"] or "").lower()
    parts = sorted({part.strip() for part in stated.split("+") if part.strip()})
    if len(parts) == 1 and parts[0] in _LICENSES:
        return parts[0], None
    name = re.sub(r"[^a-z0-9.]+", "-", " and ".join(parts)).strip("-")
    return "other", name or "not-stated"


# ---------------------------------------------------------------------------------- sections


def _labels(data: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of each class, their groups, and what further labels served for."""
    support, counts = data["support"], data.get("counts", {})
    columns = {
        "labels": support["labels_per_class"],
        f"contributing {group_unit(data['group_column'])}": support["groups_per_class"],
        **{
            f"further labels, for {side}": counts[side]
            for side in ("validation", "calibration")
            if any(counts.get(side, {}).values())
        },
    }
    names = [row["name"] for row in data["classes"]]
    further = {side: support.get(f"{side}_labels", 0) for side in ("validation", "calibration")}
    return {
        "label_header": ["class", *columns],
        "labels": [[literal(name), *(count[name] for count in columns.values())] for name in names],
        "further": " and ".join(f"{n} served for {side}" for side, n in further.items() if n),
        "groups": named(data.get("groups", {})),
    }


def _describe_outline(training: Mapping[str, Any]) -> str:
    """What the model sees of an image; empty where that is all of it."""
    outline = training.get("outline", "ignore")  # runs before outlines have none
    if outline == "ignore":
        return ""
    around = training.get("outline_of")
    stated = f"The outlines go around the {around}." if around else "Around what is not stated."
    return f"{_SEEN[outline]}.{'' if outline == 'centre' else f' {stated}'}"


def _hidden(results: Mapping[str, Any]) -> list[str]:
    """What the model cannot judge, since its outline hides where that is seen."""
    training, names = results["training"], [row["name"] for row in results["data"]["classes"]]
    seen = training.get("outline", "ignore"), training.get("outline_of")
    return [sentence for sentence in hidden_classes(names, *seen) if not PRIVATE.search(sentence)]


def _licence(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the base's licence: `known`, `stated`, `restrictions`, `recorded`."""
    stated = results["backbone"]["license"]
    recorded = results["backbone"].get("restrictions")
    rows = [row.restrictions for row in known_rows(_backbone(results))]
    return {
        "known": stated is not None and stated != NOT_VERIFIED,
        "stated": stated,
        "restrictions": {*(recorded or ()), *chain(*rows)},
        "recorded": stated is None or recorded is not None or bool(rows),
    }


def _failures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of the lowest recall, and the pairs that are confused most often."""
    classes = results["per_class"]
    missed = [
        {"name": name, "n": row["n"], "groups": row["groups"], "recall": row["recall"]}
        for name, row in classes.items()
        if row["n"] and row["recall"]["value"] < 1
    ]
    missed = sorted(missed, key=lambda row: row["recall"]["value"])[:_SHOWN]
    pairs = [
        {"count": count, "n": classes[label]["n"], "label": label, "prediction": prediction}
        for label, row in zip(classes, results["confusion_matrix"], strict=True)
        for prediction, count in zip(classes, row, strict=True)
        if count and prediction != label
    ]
    return {
        "missed": [row | {"recall": measured([row["recall"]])[0]} for row in missed],
        "confused": sorted(pairs, key=lambda pair: -pair["count"])[:_SHOWN],
    }


def _subgroups(results: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The metrics within each stain and each scanner, where the results have them."""
    names = [m for m in ("balanced_accuracy", "macro_auc") if m in results["metrics"]]
    unit = group_unit(results["data"]["group_column"])
    for column in SUBGROUPS:
        if values := results.get("subgroups", {}).get(column):
            yield {
                "column": column,
                "header": [column, "images", unit, *map(metric_title, names), "note"],
                "rows": [
                    [
                        literal(value),
                        x["n"],
                        x["n_groups"],
                        *measured([x["metrics"][m] for m in names]),
                    ]
                    for value, x in values.items()
                ],
            }


def _reliability(results: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for b in filter(lambda b: b["count"], results["reliability"]["bins"]):
        low, high, *means = (number(b[k]) for k in ("lower", "upper", "confidence", "accuracy"))
        rows.append([f"{low} to {high}", b["count"], *means])
    return rows


def _compute(results: Mapping[str, Any]) -> list[list[Any]]:
    rows = [
        [f"{name}, s" if name != "peak_memory_mib" else "peak memory, MiB", n]
        for name, n in results["timing"].items()
        if n is not None
    ]
    return [*rows, ["trainable parameters", results["training"]["trainable_parameters"]]]


def _settings(results: Mapping[str, Any]) -> list[list[str]]:
    """The settings that shaped the model, in numbers and words; what names a place stays out."""
    config, training = results["config"], results["training"]
    recipe = training["recipe"] or {}
    given = {
        "method": config["method"],
        **results["method"]["settings"],
        **recipe,
        **({"loss": training["loss"], "epochs_run": training["epochs_run"]} if recipe else {}),
    }
    rest = {
        f"{name} of the run" if name in given else name: value
        for name, value in config.items()
        if name not in NOT_IN_SETTINGS
    }
    return [[name, code(value)] for name, value in {**given, **rest}.items() if _is_plain(value)]


def _is_plain(value: object) -> bool:
    """Whether it is a number or a word, and no path."""
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and not re.search(r"[/\\]", value)
    )


# ------------------------------------------------------------------------------------- names


def _backbone(results: Mapping[str, Any]) -> str:
    """Public name of the base: a Hub id, a name of the table, or "a local folder"."""
    backbone = results["backbone"]
    parts = str(backbone.get("base", backbone["name"])).split("+")
    public = [name if _HUB_ID.fullmatch(name) or _is_plain(name) else _FOLDER for name in parts]
    return "+".join(public)


def _former(results: Mapping[str, Any]) -> str:
    """What was made of the base in former runs, between its name and what was made in this one."""
    backbone = results["backbone"]
    if not backbone.get("adapted"):
        return ""
    return f"{str(backbone['name']).removeprefix(str(backbone['base']))}, then"


def _shots(data: Mapping[str, Any]) -> str:
    counts = data["support"]["labels_per_class"].values()
    if len(set(counts)) > 1:
        return f"{min(counts)} to {max(counts)} labels per class"
    return f"{max(counts)} labels per class" if any(counts) else "no labels"
