"""Negative controls: what predicts the labels although it does not show the lesion.

Each is a logistic regression on the split, the labelled images and the groups of the run itself, so
that its number stands beside the run's own. Where one is well above chance, a model may have
learned the same thing.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

from ..data.file_statistics import SHORTCUTS, read_file_statistics
from ..data.folder import column
from ..data.outlines import masks_of, open_outlined, outlines_of
from ..metrics import PairedRun, compare_methods
from ..model.outlines import FILL
from ..training import adapt_features
from .shortcuts import LIMIT, fit_predict

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.looks import Looks

__all__ = ["CONTROLS", "Control", "ControlTables", "Draw", "measure_controls", "read_tables"]

Floats = NDArray[np.float64]
Embed = Callable[["Dataset"], NDArray[Any]]

METRIC = "macro_auc"
CHANCE = 0.5
PERMUTATIONS = 20  # at least, over all draws
STAYING = 0.1  # share of labels that may stay in place beyond those that stay among all
_CHUNK = 256  # pictures that are held at once


@dataclass(frozen=True)
class Control:
    """Negative control: a row of `CONTROLS`.

    Attributes:
        title: In tables.
        what: What the classifier is given.
        if_high: What it would mean if it predicted the labels.
        of_images: Whether it is given image features; else statistics of the file.
        permuted: Whether it learns from permuted labels.
    """

    title: str
    what: str
    if_high: str
    of_images: bool = False
    permuted: bool = False


CONTROLS: dict[str, Control] = {
    "size": Control(
        "Size alone",
        "Width and height of the picture, and the area of the outline where there is one.",
        "how large a picture was cut gives its class away",
    ),
    "file_statistics": Control(
        "File alone",
        "Size, compression, blur and texture scale of the picture's frame.",
        "how a picture was made gives its class away",
    ),
    "outside_of_the_outline": Control(
        "Inside hidden",
        "Image features of the picture with the inside of its outline filled with grey.",
        "what lies around, or the outline itself, gives the class away",
        of_images=True,
    ),
    "permuted_labels": Control(
        "Permuted labels",
        "Image features of the whole picture, learned with permuted labels.",
        "test images resemble labelled ones for another reason than their class",
        of_images=True,
        permuted=True,
    ),
}


@dataclass(frozen=True)
class Draw:
    """One label draw: who is learned from, and who is tested.

    Attributes:
        support: Rows.
        test: Rows.
        seed: Of the permutations.
    """

    support: Sequence[int]
    test: Sequence[int]
    seed: int


@dataclass(frozen=True)
class ControlTables:
    """What the controls are given.

    Attributes:
        features: `{control: [n, f]}` of all rows; NaN where a value is missing.
        why_not: `{control: reason}` of those that cannot be computed.
    """

    features: Mapping[str, Floats]
    why_not: Mapping[str, str]


def read_tables(
    rows: "Dataset", used: Iterable[int], embed: Embed, looks: "Looks | None" = None
) -> ControlTables:
    """Read what the controls are given of labelled images.

    Args:
        rows: As `load_dataset` makes them.
        used: Rows that are learned from or tested, in any draw; the features of others stay NaN.
        embed: Image features `[n, d]` of rows, by the backbone before any adaptation.
        looks: At these rows, if at hand.
    """
    chosen = np.unique(np.fromiter(used, np.int64))
    statistics = read_file_statistics(rows, looks)
    features = {
        "size": np.column_stack([statistics.of("size").features(), _outlined_areas(rows, chosen)]),
        "file_statistics": statistics.of(*SHORTCUTS).features(),
        "permuted_labels": _spread(embed(rows.select(chosen)), chosen, len(rows)),
    }
    why_not = {}
    outlines = outlines_of(rows.select(chosen))
    if (without := outlines.count(None)) == 0:
        hidden = _embed_hidden(rows, chosen, embed)
        features["outside_of_the_outline"] = _spread(hidden, chosen, len(rows))
    else:
        why_not["outside_of_the_outline"] = f"{without} of {len(chosen)} images have no outline"
    return ControlTables(features, why_not)


def measure_controls(
    tables: ControlTables,
    draws: Sequence[Draw],
    labels: Sequence[int],
    groups: Sequence[str],
    n_classes: int,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure every control, with an interval over groups (and draws, where there are several).

    Args:
        tables: See `read_tables`.
        draws: Label draws; their values are averaged.
        labels: Class of every row, `[n]`.
        groups: Group of every row, `[n]`.
        n_classes: K.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        Per control `title`, `metric`, `value`, `ci95`, `chance`, `flagged` and `note`. Flagged is
        one whose interval lies above .60. What cannot be computed has no value, and its note says
        why.
    """
    given, ids = np.asarray(labels, np.int64), np.asarray(groups, dtype=object)
    results = {}
    for name, control in CONTROLS.items():
        entry: dict[str, Any] = {
            "title": control.title,
            "metric": METRIC,
            "value": None,
            "ci95": None,
            "chance": CHANCE,
            "flagged": False,
        }
        why_not = tables.why_not.get(name) or _why_not(draws, given)
        if why_not:
            results[name] = entry | {"note": f"Not computed: {why_not}."}
            continue
        runs, words = _predict(tables.features[name], control, draws, given, ids, n_classes)
        row = compare_methods({name: runs}, (METRIC,), n_resamples, seed)[name][METRIC]
        entry |= {"value": row["a"]["value"], "ci95": row["a"]["ci95"]}
        entry["flagged"] = entry["ci95"] is not None and entry["ci95"][0] > LIMIT
        verdict = f"If well above {CHANCE}, {control.if_high}."
        if entry["flagged"]:
            verdict = f"Flagged, its interval lies above {LIMIT:.2f}: {control.if_high}."
        results[name] = entry | {
            "note": " ".join(
                part for part in (control.what, words, verdict, _sentence(row)) if part
            )
        }
    return results


def _predict(
    features: Floats,
    control: Control,
    draws: Sequence[Draw],
    labels: NDArray[np.int64],
    groups: NDArray[np.object_],
    n_classes: int,
) -> tuple[list[PairedRun], str]:
    """Predictions of one control in every draw, and how labels were permuted."""
    times = -(-PERMUTATIONS // len(draws)) if control.permuted else 1
    runs, within = list[PairedRun](), list[bool]()
    for draw in draws:
        support, test = np.asarray(draw.support), np.asarray(draw.test)
        rng = np.random.default_rng(draw.seed)
        tested = groups[test].tolist()
        for _ in range(times):
            own = labels[support]
            if control.permuted:
                own, inside = permute_labels(own, groups[support].tolist(), rng)
                within.append(inside)
            fit = _linear_probe if control.of_images else fit_predict
            p = fit(features[support], own, features[test], n_classes)
            runs.append(PairedRun(len(runs), labels[test], tested, p, p))
    if not control.permuted:
        return runs, ""
    how = "within groups"
    if not all(within):
        rest = "" if not any(within) else f" in {within.count(False)} of them"
        how = f"among all labelled images{rest}, since groups hardly mix classes"
    return runs, f"The mean of {len(runs)} permutations, {how}."


def _linear_probe(train: Floats, labels: NDArray[np.int64], test: Floats, n_classes: int) -> Floats:
    """Probabilities `[m, K]` of the method `linear_probe`; 0 for a class without a label."""
    present, own = np.unique(labels, return_inverse=True)
    logits = adapt_features("linear_probe", train, own).predict_logits(test)
    probabilities = np.zeros((len(test), n_classes))
    probabilities[:, present] = softmax(logits.astype(np.float64), axis=1)
    return probabilities


def permute_labels(
    labels: NDArray[np.int64], groups: Sequence[str], rng: np.random.Generator
) -> tuple[NDArray[np.int64], bool]:
    """Labels permuted within groups, or among all where groups hardly mix classes.

    Within a group of one class every label stays, and a classifier would still learn the truth. So
    labels stay within groups only where hardly more of them keep their place, on average, than
    among all (`STAYING`).

    Args:
        labels: Class of each image, `[n]`.
        groups: Group of each.
        rng: Random numbers.

    Returns:
        Labels, and whether they stayed within groups.
    """
    ids = np.asarray(groups, dtype=object)
    members = [np.flatnonzero(ids == group) for group in sorted({*groups})]

    def staying(parts: Sequence[NDArray[np.int64]]) -> float:
        counts = [np.unique(labels[rows], return_counts=True)[1] for rows in parts]
        return float(sum((n**2).sum() / n.sum() for n in counts)) / len(labels)

    if staying(members) > staying([np.arange(len(labels))]) + STAYING:
        return rng.permutation(labels), False
    permuted = labels.copy()
    for rows in members:
        permuted[rows] = labels[rng.permutation(rows)]
    return permuted, True


def _why_not(draws: Sequence[Draw], labels: NDArray[np.int64]) -> str:
    """Why nothing can be learned; empty where something can."""
    if not draws or any(len({*labels[list(draw.support)].tolist()}) < 2 for draw in draws):
        return "there are no labelled images of two classes to learn from"
    return ""


def _sentence(row: Mapping[str, Any]) -> str:
    note = str(row["note"])
    return f"{note[0].upper()}{note[1:]}." if note else ""


def _spread(values: NDArray[Any], at: NDArray[np.int64], n: int) -> Floats:
    """Rows of a table of n, the others NaN."""
    table = np.full((n, values.shape[1]), np.nan)
    table[at] = values
    return table


def _outlined_areas(rows: "Dataset", chosen: NDArray[np.int64]) -> Floats:
    """Logarithm of the pixels inside of each outline, `[n]`; NaN without one."""
    areas = np.full(len(rows), np.nan)
    of = outlines_of(rows.select(chosen))
    outlined = chosen[[i for i, one in enumerate(of) if one is not None]]
    for at, picture in _outlined(rows, outlined):
        if picture.mode == "RGBA":  # one that is all inside has no outline
            areas[at] = np.log(picture.getchannel("A").histogram()[255])
    return areas


def _outlined(rows: "Dataset", chosen: NDArray[np.int64]) -> Iterable[tuple[int, Image.Image]]:
    """Pictures of rows with their outlines, one at a time."""
    for start in range(0, len(chosen), _CHUNK):
        part = chosen[start : start + _CHUNK]
        of = rows.select(part)
        for at, image, mask in zip(part, column(of, "image"), masks_of(of), strict=True):
            yield int(at), open_outlined(image, mask)


def _embed_hidden(rows: "Dataset", chosen: NDArray[np.int64], embed: Embed) -> NDArray[Any]:
    """Features of pictures with the inside of their outlines filled with grey, `[n, d]`."""
    parts, held = [], list[Image.Image]()
    for _, picture in _outlined(rows, chosen):
        held.append(hide_inside(picture))
        if len(held) == _CHUNK:
            parts.append(embed(_as_rows(held)))
            held = []
    if held:
        parts.append(embed(_as_rows(held)))
    return np.concatenate(parts)


def hide_inside(picture: Image.Image) -> Image.Image:
    """Picture with the inside of its outline filled with grey; what lies around stays.

    Args:
        picture: As `open_outlined` returns it; all of one of mode RGB is inside.
    """
    grey = (FILL, FILL, FILL)
    if picture.mode != "RGBA":
        return Image.new("RGB", picture.size, grey)
    hidden = picture.convert("RGB")
    hidden.paste(grey, mask=picture.getchannel("A"))
    return hidden


def _as_rows(pictures: Sequence[Image.Image]) -> "Dataset":
    """Pictures as rows of a data set, undecoded."""
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    def encode(picture: Image.Image) -> dict[str, Any]:
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        return {"bytes": stream.getvalue(), "path": None}

    values = [encode(picture) for picture in pictures]
    return Dataset.from_dict({"image": values}, Features({"image": ImageColumn(decode=False)}))
