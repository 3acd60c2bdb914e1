"""The model card: what a run measured, written so that it can be published as it stands.

A card is a pure function of `results.json`. It names classes, counts and numbers, and nothing that
leads to a patient or to a disk: no path, no file name, no group id. Every number in it stands in
the results, as it is there or rounded to three decimals (four in the front matter).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any

from ..backbones import MINI, NOT_VERIFIED, known_rows
from ..errors import GloVLMError
from ..metrics import METRICS

__all__ = [
    "CLASS_HEADER",
    "METRIC_HEADER",
    "class_rows",
    "group_unit",
    "metric_rows",
    "render_backbone_card",
    "render_card",
    "write_card",
]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_BACKBONE_TEMPLATE = Path(__file__).with_name("backbone_card_template.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What the Hub takes as a licence; everything else is `other` with a name.
_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "openrail", "cc0-1.0", "cc-by-4.0"),
        *("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    }
)
_FOLDER = "a local folder"
_SHOWN = 3  # classes that it misses, pairs that it confuses
_TAGS = ("glomerulus", "nephropathology", "few-shot", "vision-language", "not-for-diagnosis")
# What a card may show subgroups of; an institution or a reader is somebody's name.
_SUBGROUPS = ("stain", "scanner")
# Absolute paths of any system, file names of images: what no sentence of a card may hold.
_PRIVATE = re.compile(
    r"(?<![\w.:/])(?:~?/|[A-Za-z]:[\\/]|\\\\)\S|\w\.(?:png|jpe?g|tiff?|bmp|svs|ndpi|mrxs|scn)\b",
    re.I,
)
# Metric ids of the Hub, where it has one for ours.
_HUB_METRICS = {name: row.hub_name for name, row in METRICS.items() if row.hub_name}


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


def render_backbone_card(facts: Mapping[str, Any]) -> str:
    """Write the card of a backbone that `glovlm pretrain` made, as `mini` was.

    Args:
        facts: The content of its `pretraining.json`.

    Returns:
        Markdown with YAML front matter; every number that was measured says that drawings were.

    Raises:
        GloVLMError: The facts lack something that the card must say.
    """
    told = ("patients", "per_patient", "epochs", "batch_size", "lr", "image_size", "patch_size")
    text = Template(_BACKBONE_TEMPLATE.read_text(encoding="utf-8"))
    try:
        flags = [f"--{name.replace('_', '-')} {facts[name]}" for name in (*told, "seed")]
        log = [
            [row["epoch"], _number(row["loss"]), _number(row["seconds"])] for row in facts["log"]
        ]
        return text.substitute(
            {name: str(value) for name, value in facts.items()},
            log=_table(["epoch", "loss", "seconds"], [list(map(str, row)) for row in log]),
            command=" ".join(["glovlm pretrain --output-dir FOLDER", *flags]),
            accuracy=_number(facts["accuracy"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
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
    pretrained = not (folder / "results.json").exists() and (folder / "pretraining.json").is_file()
    source = folder / ("pretraining.json" if pretrained else "results.json")
    try:
        facts = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise GloVLMError(
            f"Expected the output folder of `glovlm train`, found no results.json in {folder}: "
            "give the folder that was its --output-dir."
        ) from None
    except (OSError, ValueError) as error:
        raise GloVLMError(f"{source} cannot be read ({error}): run the training again.") from None
    text = render_backbone_card(facts) if pretrained else render_card(facts)
    card = Path(output).expanduser() if output is not None else folder / "README.md"
    temporary = card.with_name(f".{card.name}.{os.getpid()}")
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(card)
    except OSError as error:
        raise GloVLMError(f"The card cannot be written to {card} ({error.strerror}).") from None
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
        cells = _measured([row[measure] for measure in ("recall", "specificity", "auc")])
        rows.append([name, str(row["n"]), str(row["groups"]), *cells])
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
        licence=_bullets(_licence_notes(results)),
        metric_notes=_metric_notes(results),
        metrics=_table(METRIC_HEADER, metric_rows(results["metrics"])),
        per_class=_table(CLASS_HEADER, class_rows(results["per_class"])),
        confusion=_confusion(results),
        failures=_bullets(_failures(results)),
        subgroups=_subgroups(results, drawings),
        calibration=_bullets(_calibration(results)),
        reliability=_reliability(results),
        limits=_bullets(_limits(results, synthetic)),
        compute=_compute(results),
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
    base = [name for name in _backbone(results).split("+") if _HUB_ID.fullmatch(name)]
    links = [row.page for row in known_rows(_backbone(results)) if row.page]
    card = ModelCardData(
        language="en",
        license=license_id,
        license_name=license_name,
        license_link=links[0] if license_name and len(links) == 1 else None,
        library_name="hf-glovlm",
        pipeline_tag="image-classification",
        tags=[*_TAGS, str(results["config"]["method"]), *(["drawings"] if drawings else [])],
        base_model=base or None,
        base_model_relation="finetune" if base else None,
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
        f"An image classifier for the classes below: `{_backbone(results)}` adapted by `{method}` "
        f"from {_shots(data)} of `{data['name']}`, with hf-glovlm."
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
    support, counts = data["support"], data.get("counts", {})
    names = [row["name"] for row in data["classes"]]
    columns = {
        "labels": support["labels_per_class"],
        f"contributing {group_unit(data['group_column'])}": support["groups_per_class"],
        **{
            f"further labels, for {side}": counts[side]
            for side in ("validation", "calibration")
            if any(counts.get(side, {}).values())
        },
    }
    rows = [[name, *(str(count[name]) for count in columns.values())] for name in names]
    return _table(["class", *columns], rows)


def _label_notes(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    support = data["support"]
    told = f"Drawn by `{data['sampler']}`, seed {config['seed']}, draw {config['draw']}."
    further = {side: support.get(f"{side}_labels", 0) for side in ("validation", "calibration")}
    used = " and ".join(f"{n} served for {side}" for side, n in further.items() if n)
    used = f", of which {used}" if used else "; nothing was chosen on further labels"
    sides = ", ".join(f"{side} {n}" for side, n in data.get("groups", {}).items())
    unit = group_unit(data["group_column"])
    shares = f" {unit.capitalize()} on each side: {sides}." if sides else ""
    return f"{told} Label budget: {support['label_budget']}{used}.{shares}"


def _split(results: Mapping[str, Any]) -> Iterable[str]:
    config, data = results["config"], results["data"]
    stain, mpp = data.get("stain") or config.get("stain"), data.get("mpp") or "unknown"
    yield f"Stain: {_words(stain) if stain else 'not stated'}"
    yield "Scale: " + (
        "unknown" if mpp == "unknown" else f"{mpp} micrometres per pixel, as they reach the model"
    )
    yield f"Groups are {group_unit(data['group_column'])}; none of them is on two sides."
    if config.get("episodes"):
        yield f"The episode was frozen beforehand: draw {config['draw']} of its file."
    yield from filter(_is_public, results["notes"])
    yield f"Split hash: `{data['split_hash']}`"
    yield f"Data fingerprint: `{data['fingerprint']}`"


def _licence_notes(results: Mapping[str, Any]) -> Iterable[str]:
    """What the base's licence says of this model; what is not known is said to be so."""
    base, stated = _backbone(results), results["backbone"]["license"]
    recorded = results["backbone"].get("restrictions")
    known = [row.restrictions for row in known_rows(base)]
    forbids = None if recorded is None and not known else {*(recorded or ()), *chain(*known)}
    if stated is None or stated == NOT_VERIFIED:
        yield f"The licence of `{base}` is not known here: read it before you share this model."
    else:
        yield f"`{base}` is licensed {stated}, and what is made from it inherits that."
    if "non-commercial" in (forbids or ()):
        yield "**Not for commercial use.**"
    if "no-derivatives" in (forbids or ()):
        yield (
            "**No derivatives may be shared.** Its authors may count adapted models, and models "
            "trained on its outputs, among them."
        )
    if forbids is None and stated is not None:
        yield "Whether it forbids commercial use or derivatives was not recorded."


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


def _failures(results: Mapping[str, Any]) -> Iterable[str]:
    """The classes that it misses most often, and what it takes them for."""
    classes, unit = results["per_class"], group_unit(results["data"]["group_column"])
    missed = [
        (name, row) for name, row in classes.items() if row["n"] and row["recall"]["value"] < 1
    ]
    if not missed:
        yield "Every test image got its own class: where it fails, so few images do not show."
    for name, row in sorted(missed, key=lambda pair: pair[1]["recall"]["value"])[:_SHOWN]:
        found = _measured([row["recall"]])[0]
        yield f"Recall of `{name}`: {found}, on {row['n']} images of {row['groups']} {unit}."
    pairs = [
        (count, classes[label]["n"], label, guess)
        for label, row in zip(classes, results["confusion_matrix"], strict=True)
        for guess, count in zip(classes, row, strict=True)
        if count and guess != label
    ]
    for count, n, label, guess in sorted(pairs, key=lambda pair: -pair[0])[:_SHOWN]:
        yield f"{count} of {n} images of `{label}` were called `{guess}`."


def _subgroups(results: Mapping[str, Any], drawings: str) -> str:
    """The metrics within each stain and each scanner, where the results have them."""
    sections = []
    for column in _SUBGROUPS:
        found = results.get("subgroups", {}).get(column)
        if not found:
            continue
        names = [m for m in ("balanced_accuracy", "macro_auc") if m in results["metrics"]]
        rows = [
            [value, str(x["n"]), str(x["n_groups"]), *_measured([x["metrics"][m] for m in names])]
            for value, x in found.items()
        ]
        unit = group_unit(results["data"]["group_column"])
        table = _table([column, "images", unit, *map(_metric_title, names), "note"], rows)
        sections.append(f"### By {column}{drawings}\n\n{table}\n")
    return "\n" + "\n".join([*sections, ""]) if sections else ""


def _calibration(results: Mapping[str, Any]) -> Iterable[str]:
    config, unit = results["config"], group_unit(results["data"]["group_column"])
    fitted, prior = results.get("calibration"), results.get("prior_correction")
    if fitted is None:
        yield "The probabilities are as trained, not calibrated."
    else:
        classes = ", ".join(f"{name} {n}" for name, n in fitted["per_class"].items())
        yield (
            f"Calibrated on {fitted['n']} images of {fitted['groups']} {unit} that the method did "
            f"not learn from ({classes}); their mean log loss went from "
            f"{_number(fitted['nll']['before'])} to {_number(fitted['nll']['after'])}."
        )
        if "temperature" in fitted:
            yield f"Temperature: {_number(fitted['temperature'])}"
    if prior is not None:
        how = {"em": "estimated from the unlabelled test images", "declared": "declared"}
        shares = ", ".join(f"{name} {_number(x)}" for name, x in prior["prevalence"].items())
        yield f"Corrected for a prevalence that was {how[prior['how']]}: {shares}."
    if sets := results.get("sets"):
        covered = [_number(sets["coverage"]), _range(sets.get("coverage_ci95"))]
        size = [_number(sets["mean_size"]), _range(sets.get("mean_size_ci95"))]
        yield (
            f"Prediction sets (`{config['conformal']}`, alpha {config['alpha']}) hold the true "
            f"class of {' '.join(covered).strip()} of the test images "
            f"({_number(sets['worst_class_coverage'])} of the worst class), with "
            f"{' '.join(size).strip()} classes each on average."
        )
    abstention = results.get("abstention") or {}
    if "answered" in abstention:
        yield (
            f"It answers for {abstention['answered']} of {abstention['n']} test images; the share "
            f"of errors among these is {_number(abstention['risk'])}, asked for was at most "
            f"{config['max_risk']}."
        )
    if "aurc" in abstention:
        yield f"Area under the risk-coverage curve: {_number(abstention['aurc'])}"
    if alone := results.get("transductive"):
        said = alone["saved_model_alone"]["balanced_accuracy"]
        yield (
            f"The {alone['query_images']} unlabelled test images were judged together; the saved "
            f"model, which judges each alone, has a balanced accuracy of {_number(said)}."
        )


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


def _compute(results: Mapping[str, Any]) -> str:
    rows = [
        [f"{name}, s" if name != "peak_memory_mib" else "peak memory, MiB", str(n)]
        for name, n in results["timing"].items()
    ]
    rows.append(["numbers trained", str(results["training"]["trainable_parameters"])])
    return _table(["", "value"], rows)


def _settings(results: Mapping[str, Any]) -> str:
    """What shaped the model, in numbers and words; what names a place stays out."""
    config, training = results["config"], results["training"]
    told = (
        "seed", "draw", "shots_from", "test_fraction", "validation_shots", "calibration_groups",
        "augment", "accumulate", "mixed_precision", "clip_norm",
    )  # fmt: skip
    recipe = training["recipe"] or {}
    given = {
        "method": config["method"],
        **results["method"]["settings"],
        **recipe,
        **({"loss": training["loss"], "epochs_run": training["epochs_run"]} if recipe else {}),
        **{name: config.get(name) for name in told},
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


def _is_public(sentence: str) -> bool:
    """Whether it names no place on a disk and no file of an image."""
    return not _PRIVATE.search(sentence)


def _citations(results: Mapping[str, Any]) -> Iterable[str]:
    yield f"Method: {results['method']['citation']}"
    for row in known_rows(_backbone(results)):
        yield f"Backbone `{row.hub_id or row.name}`: {row.citation}"
    if given := results["data"].get("citation"):
        yield f"Data: {_words(given)}"
    yield "Protocol: Glo-VLMs, Guo et al., arXiv:2508.15960 and arXiv:2511.11984"
    yield "Software: hf-glovlm, in the version that stands under Environment"


# ------------------------------------------------------------------------------------- words


def _backbone(results: Mapping[str, Any]) -> str:
    """The public name: a Hub id, a name of the table, or what a folder is called; no path."""
    parts = str(results["backbone"]["name"]).split("+")
    public = [name if _HUB_ID.fullmatch(name) or _is_plain(name) else _FOLDER for name in parts]
    return "+".join(public)


def _shots(data: Mapping[str, Any]) -> str:
    counts = data["support"]["labels_per_class"].values()
    if len(set(counts)) > 1:
        return f"{min(counts)} to {max(counts)} labels per class"
    return f"{max(counts)} labels per class" if any(counts) else "no labels"


def _metric_title(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _measured(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Value and interval of each, then what is to be noted of any of them."""
    cells = [f"{_number(entry['value'])} {_interval(entry)}".strip() for entry in entries]
    notes = dict.fromkeys(note for entry in entries if (note := _note(entry)))
    return [*cells, "; ".join(notes)]


def _interval(entry: Mapping[str, Any]) -> str:
    return _range(entry["ci95"])


def _range(bounds: Sequence[float] | None) -> str:
    return "[{:.3f}, {:.3f}]".format(*bounds) if bounds else ""


def _words(value: Any) -> str:
    """What is said once or several times."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)


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
