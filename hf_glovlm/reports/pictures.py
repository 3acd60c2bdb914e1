"""Pictures of a run's report: mistakes, examples and heat maps of the test images.

They are looked up where the run's configuration says that the data lie, and only shown where these
are still the images that the run was made from.
"""

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GloVLMError
from ..rendering import number
from .run import Pictures

if TYPE_CHECKING:
    from PIL import Image

    from ..inference import Predictions

__all__ = ["collect_pictures"]

MISTAKES = 24  # the surest
EXAMPLES = 24  # in all: two a class, the surest and the least sure
HEAT_MAPS = 6
SIDE = 224  # pixels of a picture at most
_QUALITY = 82
_COLUMNS = ("image_column", "label_column", "group_column", "group_from")
_NOT_THERE = "The pictures are left out: "


def collect_pictures(results: Mapping[str, Any], folder: Path | None) -> Pictures:
    """Pictures of what a run named wrong, surest first, and of what it named right.

    Args:
        results: The content of its `results.json`.
        folder: Its folder.

    Returns:
        The pictures; without any, the sentence that says why.
    """
    try:
        if folder is None:
            raise GloVLMError("an evaluation keeps no predictions by image.")
        return _collect(results, folder)
    except GloVLMError as error:
        return Pictures(sentences=[f"{_NOT_THERE}{error}"], asked=False)


def _collect(results: Mapping[str, Any], folder: Path) -> Pictures:
    from ..inference import Predictions

    predictions = Predictions.load(folder / "predictions.parquet")
    labels = predictions.labels
    if labels is None:
        raise GloVLMError("the predictions have no labels.")
    rows, place = _find_rows(results)
    if missing := sum(name not in place for name in predictions.file_names):
        raise GloVLMError(f"{missing} of the test images are not in the data any more.")
    top = predictions.probabilities.argmax(1)
    sure = predictions.probabilities.max(1)
    wrong = [i for i in np.argsort(-sure, kind="stable").tolist() if top[i] != labels[i]]
    shown = wrong[:MISTAKES]
    images = {i: _open(rows[place[predictions.file_names[i]]]) for i in shown}
    heat, sentences = _heat_maps(folder, rows, place, predictions, shown[:HEAT_MAPS])
    mistakes = [_picture(predictions, i, images[i], heat.get(i)) for i in shown]
    if len(wrong) > len(shown):
        sentences.append(f"{len(wrong) - len(shown)} more mistakes are not shown.")
    examples = [
        _picture(predictions, i, _open(rows[place[predictions.file_names[i]]]))
        for i in _pick_right(top, labels, sure)
    ]
    return Pictures(mistakes, examples, sentences, asked=True)


def _find_rows(results: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The rows of the run's data, and where each file stands among them."""
    from ..data import Columns, all_rows, dataset_fingerprint, load_dataset
    from ..data.folder import column

    config, data = results["config"], results["data"]
    source = config.get("data")
    if not source or not (Path(source).expanduser().exists() or data.get("hub_id")):
        raise GloVLMError("the data are not where the run read them. Put them back there.")
    columns = Columns(**{name: config.get(name) for name in _COLUMNS})
    dataset = load_dataset(source, columns=columns)
    if dataset_fingerprint(dataset) != data["fingerprint"]:
        raise GloVLMError("the data have changed since the run, so they may show other images.")
    rows = all_rows(dataset)
    return rows, {name: i for i, name in enumerate(column(rows, "file_name"))}


def _pick_right(top: Any, labels: Any, sure: Any) -> list[int]:
    """Of each class the surest and the least sure image that were named right."""
    picked: list[int] = []
    for k in sorted({*labels.tolist()}):
        own = np.flatnonzero((labels == k) & (top == k))
        if len(own):
            ranked = own[np.argsort(-sure[own], kind="stable")]
            picked += dict.fromkeys([int(ranked[0]), int(ranked[-1])])
    return picked[:EXAMPLES]


def _picture(
    predictions: "Predictions", i: int, picture: "Image.Image", heat: str | None = None
) -> dict[str, str | None]:
    """A picture and what is known of it, as `Pictures` has it."""
    assert predictions.labels is not None  # asked before
    names, p = predictions.class_names, predictions.probabilities[i]
    named, label = int(p.argmax()), int(predictions.labels[i])
    wrong = named != label
    return {
        "address": _address(picture),
        "heat": heat,
        "label": names[label],
        "named": names[named] if wrong else None,
        "p": number(float(p[named])),
        "p_label": number(float(p[label])) if wrong else None,
        "file": predictions.file_names[i],
    }


def _open(row: Mapping[str, Any]) -> "Image.Image":
    from ..data import open_image

    return open_image(row["image"])


def _address(picture: "Image.Image") -> str:
    """A small JPEG as an address that holds it (RFC 2397), without what the file says of itself."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    out = BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _heat_maps(
    folder: Path, rows: Any, place: Mapping[str, int], predictions: "Predictions", chosen: list[int]
) -> tuple[dict[int, str], list[str]]:
    """Heat maps of a few images, for the class that was named; or why there are none."""
    from ..explain import explain, overlay
    from ..inference import load_classifier

    maps: dict[int, str] = {}
    if not chosen:
        return maps, []
    if not (folder / "model").is_dir():
        return maps, ["There are no heat maps: the run kept no model."]
    try:
        model, processor, _ = load_classifier(folder)
        for i in chosen:
            image = rows[place[predictions.file_names[i]]]["image"]
            named = predictions.predicted[i]
            heat = explain(model, processor, image, target=named)
            maps[i] = _address(overlay(image, heat))
    except GloVLMError as error:
        return {}, [f"There are no heat maps: {error}"]
    return maps, ["The second picture is the heat map of the class that was named (`gradient`)."]
