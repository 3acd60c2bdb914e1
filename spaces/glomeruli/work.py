"""Inference and adaptation behind the page and its API: plain values in and out."""

import copy
import csv
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from shelf import Loaded, Settings
from uploads import Upload, to_address

from hf_glovlm import (
    AdaptConfig,
    GloVLMError,
    MemoryCache,
    __version__,
    adapt,
    build_zero_shot,
    check_identifiers,
    check_publishing,
    copy_sharing_weights,
    describe_image_scale,
    describe_limits,
    describe_predictions,
    embed_images,
    explain,
    frozen_methods,
    leave_patients_out,
    load_classes,
    open_outlined,
    outline_notes,
    predict,
)

BATCH = 8  # images decoded at a time
SHOWN = 512  # pixels of a heat map on the page
EXPLAINED = 1024  # pixels of the longer side of an image before a heat map
MAX_CLASSES = 8
OUTLINES = {  # what a model may learn to see, for the page
    "ignore": "the whole image",
    "centre": "a circle in the middle of the image",
    "blank+pool": "the inside of the outline (an image's alpha channel)",
}
GLOMERULUS = {  # where the glomerulus was taken to be, by `HeatMap.mask`
    "given": "the outline is taken for the glomerulus",
    "centre": "the circle that the model sees is taken for the glomerulus",
    "central ellipse": "an ellipse in the middle stands in for the glomerulus",
}
Progress = Callable[[float, str], object]


@dataclass(frozen=True)
class Classification:
    """Classification of several images: an answer each, scale and limits.

    Args:
        answers: One an image.
        scale: A sentence about micrometres per pixel.
        limits: Sentences that belong beside every number.
        neighbours: Per image the nearest support images, as `(row, class, cosine)`; empty where
            the model keeps none.
    """

    answers: list[Any]
    scale: str
    limits: list[str]
    neighbours: list[list[tuple[int, str, float]]]


def make_rows(images: Sequence[Upload], mpp: float | None = None) -> Dataset:
    """Images as a data set in memory."""
    if not images:
        raise GloVLMError("There are no images yet: drop some, or click a drawing.")
    if mpp is not None and not 0 < mpp < 100:
        raise GloVLMError(f"Expected micrometres per pixel between 0 and 100, found {mpp:g}.")
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": image.content, "path": image.name} for image in images],
        "file_name": [image.name for image in images],
        "mpp": [mpp] * len(images),
    }
    types = {"image": Image(), "file_name": Value("string"), "mpp": Value("float64")}
    return Dataset.from_dict(columns, Features(types))


def classify(loaded: Loaded, images: Sequence[Upload], mpp: float | None = None) -> Classification:
    """Classify images."""
    model, processor, rows = loaded.ask(), loaded.processor, make_rows(images, mpp)
    scale = describe_image_scale(model, processor, rows)
    cache = MemoryCache()
    predictions = predict(
        model, processor, rows, batch_size=BATCH, cache=cache, engine=loaded.engine
    )
    neighbours: list[list[tuple[int, str, float]]] = []
    if (model.config.head or {}).get("kind", "").startswith("cache"):
        features = embed_images(model.glovlm, processor, rows, cache=cache, engine=loaded.engine)
        near = explain.nearest_support(model, features)
        for row, labels, cosines in zip(
            near.indices.tolist(), near.labels, near.cosines.tolist(), strict=True
        ):
            neighbours.append(list(zip(row, labels, cosines, strict=True)))
    return Classification(
        describe_predictions(predictions, model.config),
        scale,
        [
            *_unused_outlines(model.config, images),
            *outline_notes(model.config, rows),
            *describe_limits(model.config),
        ],
        neighbours,
    )


def _unused_outlines(config: Any, images: Sequence[Upload]) -> list[str]:
    """A sentence where images carry an outline that the model does not ask for."""
    number = sum(bool(image.outline) for image in images)
    if not number or config.outline not in ("ignore", "centre"):
        return []
    sees = "the whole image" if config.outline == "ignore" else "a circle in its middle"
    return [
        f"{number} of {len(images)} images have an outline, which has no part here: this model "
        f"sees {sees}."
    ]


def ask_in_words(loaded: Loaded, prompts: Mapping[str, Sequence[str]]) -> Loaded:
    """Zero-shot classifier of a model's towers for someone's own classes and prompts."""
    with loaded.lock:
        classifier = build_zero_shot(loaded.towers, loaded.processor, prompts)
    return Loaded(
        f"{loaded.name}, own words",
        classifier.glovlm,
        loaded.processor,
        classifier,
        engine=loaded.engine and replace(loaded.engine, model=classifier.glovlm),  # same weights
    )


def read_words(text: str) -> dict[str, list[str]]:
    """Read classes and prompts: a line a class, `name: prompt | another prompt`."""
    prompts: dict[str, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        name, colon, rest = line.partition(":")
        if not colon:
            raise GloVLMError(
                f"Expected a class, a colon and its prompts in the line '{line.strip()[:80]}'."
            )
        if name.strip() in prompts:
            raise GloVLMError(f"The class '{name.strip()}' stands there twice.")
        prompts[name.strip()] = rest.split("|")
    return prompts


@dataclass(frozen=True)
class Heat:
    """Heat map for the page.

    Args:
        image: The picture as a `data:` address.
        colours: The map's colours, as large.
        title: The method.
        legend: What a colour stands for.
        low: Value of the first colour.
        high: Value of the last.
        sentences: What belongs below it.
        about: Scores and settings, and the values `[rows][columns]`.
    """

    image: str
    colours: str
    title: str
    legend: str
    low: float
    high: float
    sentences: list[str]
    about: dict[str, Any]


def draw_heat(loaded: Loaded, image: Upload, method: str, target: str | None = None) -> Heat:
    """Draw one heat map."""
    outlined = open_outlined({"path": image.name, "bytes": image.content})
    picture, inside = outlined.convert("RGB"), None
    if outlined.mode == "RGBA":  # apart, as resizing both together loses the colours outside
        alpha = outlined.getchannel("A")
        alpha.thumbnail((EXPLAINED, EXPLAINED))
        inside = np.asarray(alpha) > 127
    picture.thumbnail((EXPLAINED, EXPLAINED))
    # Attention is read by switching the towers' back end: on modules of one's own.
    model = copy_sharing_weights(loaded.ask())
    heat = explain.explain(
        model, loaded.processor, picture, method=method, target=target or None, mask=inside
    )
    colours = explain.overlay(picture, heat, opacity=1.0)
    about = heat.describe()
    name = heat.target.replace("_", " ")
    sentences = [
        f"A value is: {explain.HEAT_MAPS[method].unit}.",
        f"Probability of {name}: {heat.score:.2f}; with the glomerulus blanked "
        f"{about['glomerulus_blanked']:.2f}; with its surroundings blanked "
        f"{about['context_blanked']:.2f} ({GLOMERULUS[heat.mask]}).",
        "A map shows what the model uses, not what is the matter with a glomerulus.",
    ]
    shown = []
    for part in (picture, colours):
        part.thumbnail((SHOWN, SHOWN))
        shown.append(to_address(part))
    values = heat.values.astype(float)
    return Heat(
        shown[0], shown[1], explain.HEAT_MAPS[method].title, heat.legend.replace("_", " "),
        float(values.min()), float(values.max()), sentences,
        {**about, "values": values.round(6).tolist()},
    )  # fmt: skip


# ---------------------------------------------------------------------------------- adapting


@dataclass(frozen=True)
class AdaptedModel:
    """Model adapted to a few labelled images, with its estimate and card.

    Args:
        loaded: The adapted model.
        support: The images in the order in which it learned them.
        estimate: Leave-one-patient-out in a sentence, or why there is none.
        results: Its metrics, where measured.
        notes: Sentences of the method.
        card: A short card in Markdown.
        patients: Whose images they are.
    """

    loaded: Loaded
    support: list[Upload]
    estimate: str
    results: dict[str, Any] | None
    notes: list[str]
    card: str
    patients: frozenset[str] = frozenset()


def adapt_classifier(
    loaded: Loaded,
    support: Mapping[str, Sequence[Upload]],
    method: str,
    patients: Mapping[str, str] | None = None,
    outline: str = "ignore",
    on_progress: Progress = lambda share, what: None,
) -> AdaptedModel:
    """Adapt a model to labelled images, and leave out one patient at a time if they are known.

    Args:
        loaded: The model to start from; it stays as it is.
        support: Images of each class.
        method: A name of `frozen_methods()`.
        patients: Of file names; of images that are not among them, their own.
        outline: What the model sees of an image, as `AdaptConfig` takes it.
        on_progress: Called with the share that is done, 0 to 1, and the current step.
    """
    support = {name.strip(): list(images) for name, images in support.items() if images}
    _check_support(support, method)
    images = [image for part in support.values() for image in part]
    known = [(patients or {}).get(image.name, image.patient).strip() for image in images]
    labels = [name for name, part in support.items() for _ in part]
    types = {
        "image": Image(),
        "label": ClassLabel(names=list(support)),
        "file_name": Value("string"),
    }
    columns = {
        "image": [{"bytes": image.content, "path": image.name} for image in images],
        "label": labels,
        "file_name": [image.name for image in images],
    }
    rows = Dataset.from_dict(columns, Features(types))
    config = AdaptConfig.from_mapping({"outline": outline})
    around = {image.outline for image in images} - {"", "unstated"}
    classes = load_classes(
        list(support), outline=outline, outline_of=around.pop() if len(around) == 1 else None
    )
    cache = MemoryCache()
    # What an earlier head was calibrated to is no longer true.
    base = copy_sharing_weights(loaded.towers)
    base.config.temperature, base.config.prior_shift, base.config.calibration = 1.0, None, None
    base.config.mpp = base.config.image_scale = None
    processor = copy.deepcopy(loaded.processor)  # a tokenizer serves one at a time
    on_progress(0.05, "encoding images")
    if outline == processor.outline:  # else `adapt` encodes them, once it has set what is seen
        embed_images(base, processor, rows, batch_size=BATCH, cache=cache, project=False)
    on_progress(0.2, f"adapting by {method}")

    def show(row: Mapping[str, Any]) -> None:
        on_progress(
            0.2 + 0.2 * row["epoch"] / row["epochs"], f"epoch {row['epoch']} of {row['epochs']}"
        )

    adapted = adapt(
        copy_sharing_weights(base), method, rows,
        processor=processor, classes=classes, config=config, cache=cache, on_epoch=show,
        groups=known if all(known) else None,  # what its guard leaves out, one at a time
    )  # fmt: skip
    adapted.model.config.synthetic = all(image.synthetic for image in images)
    validation = leave_patients_out(
        base, processor, method, rows, known, classes=classes, outline=config.outline, cache=cache,
        on_patient=lambda k, n: on_progress(0.4 + 0.6 * k / n, f"left out {k} of {n} patients"),
    )  # fmt: skip
    model = Loaded("adapted here", adapted.model.glovlm, processor, adapted.model)
    card = _write_card(loaded.name, model, support, known, method, validation.sentence)
    notes = [*_unused_outlines(adapted.model.config, images), *adapted.notes]
    return AdaptedModel(
        model, images, validation.sentence, validation.results, notes, card,
        frozenset(filter(None, known)),
    )  # fmt: skip


def zip_model(adapted: AdaptedModel, folder: Path, settings: Settings) -> Path:
    """Write the adapted model as a zip, with its card.

    Args:
        adapted: The adapted model.
        folder: Takes a new folder for it, whose files the page removes after some minutes.
        settings: On a page of one's own, nothing leaves the machine.

    Raises:
        GloVLMError: The licence of the base forbids to pass on what is made of it, or is not known;
            or a class or prompt names a patient or a file.
    """
    if not settings.folders:
        try:
            check_publishing(adapted.loaded.ask().config, "full")
        except GloVLMError as error:
            raise GloVLMError(
                "There is no download here, as the licence of the base forbids to pass its weights "
                f"on, or is not known: run the page on your own machine. ({error})"
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        model = place / "model"
        adapted.loaded.ask().save_pretrained(model)
        adapted.loaded.processor.save_pretrained(model)
        (model / "README.md").write_text(adapted.card, encoding="utf-8")
        _search(model, adapted)
        fresh = place / ".glovlm-model.zip.tmp"
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as archive:  # weights do not shrink
            for path in sorted(model.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(place).as_posix())
        os.replace(fresh, place / "glovlm-model.zip")
        shutil.rmtree(model)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return place / "glovlm-model.zip"


def _search(folder: Path, adapted: AdaptedModel) -> None:
    """Refuse a download that names a patient or a file of the images."""
    try:
        check_identifiers(
            folder,
            names=adapted.patients,
            files=[image.name for image in adapted.support],
            labels=map(str, adapted.loaded.ask().config.id2label.values()),
        )
    except GloVLMError as error:
        raise GloVLMError(f"There is no download here. {error}") from error


def _check_support(support: Mapping[str, Sequence[Upload]], method: str) -> None:
    if method not in frozen_methods():
        raise GloVLMError(
            f"Unknown method '{method[:80]}': expected one of {', '.join(frozen_methods())}."
        )
    if not 2 <= len(support) <= MAX_CLASSES or "" in support:
        raise GloVLMError(
            f"Expected 2 to {MAX_CLASSES} classes, each with a name and at least one image, found "
            f"{len(support)}."
        )
    owner: dict[bytes, str] = {}
    for name, images in support.items():
        for image in images:
            digest = hashlib.sha256(image.content).digest()
            if owner.setdefault(digest, name) != name:
                raise GloVLMError(
                    f"{image.name} is labelled '{owner[digest]}' and '{name}': an image has one "
                    "class."
                )


def _write_card(
    base: str,
    model: Loaded,
    support: Mapping[str, Sequence[Upload]],
    patients: Sequence[str],
    method: str,
    estimate: str,
) -> str:
    config = model.ask().config
    licence = config.backbone_license or "not known"
    mark = " (synthetic images)" if config.synthetic else ""
    counts = "\n".join(
        f"- `{name.replace('`', chr(39))}`: {len(images)} images"
        for name, images in support.items()
    )
    known = len(set(filter(None, patients)))
    limits = "\n".join(f"- {sentence}" for sentence in describe_limits(config))
    shown = f"{list(support)} {config.prompts}".lower()
    tags = ["glomerulus" if "glomerul" in shown else "histopathology", "few-shot"]
    tags += ["not-for-diagnosis", *(["synthetic"] if config.synthetic else [])]
    # Names of files and patients stay out of it.
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [{", ".join(tags)}]
---
# {base.rsplit("/", 1)[-1]} adapted by {method}{mark}

Made in the hf-glovlm Space with hf-glovlm {__version__}. Licence of the base: {licence}.

## What it learned from{mark}

{counts}
- patients: {known or "not known"}

## How well it does{mark}

{estimate}

{limits}

## How to use it

```python
import hf_glovlm
model, processor, _ = hf_glovlm.load_classifier("model")
```
"""


# ----------------------------------------------------------------------------------- tables


def to_table(result: Classification) -> list[dict[str, Any]]:
    """Rows of plain values, one an image."""
    rows = []
    for answer in result.answers:
        row: dict[str, Any] = {"file_name": answer.file_name, "predicted": answer.label}
        row |= {f"p_{name}": round(p, 6) for name, p in answer.probabilities.items()}
        if answer.classes is not None:
            row["set"] = " or ".join(answer.classes) or "none"
        if answer.answered is not None:
            row["answers"] = "yes" if answer.answered else "no"
        if answer.support_distance is not None:
            row["unlike_support"] = "yes" if answer.support_distance > 1 else "no"
            row["support_distance"] = round(answer.support_distance, 3)
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]], refused: Sequence[str], limits: Sequence[str]) -> str:
    """Rows as CSV; what was refused, and what belongs beside the numbers, stands in a last column.

    A spreadsheet would run a name that begins like a formula, so such names get an apostrophe.
    """
    # A model without a limit of confidence answers or not only where an image is unlike.
    header = list(dict.fromkeys(name for row in rows for name in row)) or ["file_name"]
    note = " ".join(limits)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*header, "note"])
    for row in rows:
        writer.writerow([*(_plain(row.get(key, "")) for key in header), note])
    for sentence in refused:
        writer.writerow([*[""] * len(header), _plain(f"refused: {sentence}")])
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
