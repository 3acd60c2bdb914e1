"""Evaluation: a trained model measured on labelled images that it did not learn from.

What a model learned from is never measured: the groups (patients, cases, slides) of its support,
validation and calibration images and these groups' images are known by their hashes, see
`provenance`, and every command that measures refuses them or leaves them out.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import describe_environment
from ..errors import GloVLMError, nearest
from ..inference import FeatureCache, Predictions, open_engine, predict
from ..inference.engines import engine_device, refuse_auto
from ..inference.guard import count_unlike
from ..inference.outlines import hidden_notes, outline_notes
from ..inference.prediction import class_names, model_device
from ..inference.scale import check_scale, listed_mpp
from ..settings import declarations
from ..tables import spelling
from .config import IN_MEMORY, TrainConfig
from .provenance import UNKNOWN, Provenance, Seen, contamination_notes, hash_groups
from .results import RunResult

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..data import Columns, Groups

NO_THRESHOLDS = "The model's run chose no threshold, or its results do not lie beside it."


class Evaluation(RunResult):
    """Results of an evaluation: what `glovlm evaluate` writes, and the predictions.

    Attributes:
        predictions: Of the measured images, in the order of the rows.
    """

    def __init__(self, content: Mapping[str, Any], folder: Path, predictions: Predictions) -> None:
        super().__init__(content, folder)
        self.predictions = predictions

    def load_predictions(self) -> Predictions:
        """Probabilities, labels and groups of the measured images."""
        return self.predictions

    def __repr__(self) -> str:
        kind = " (synthetic images)" if self["synthetic"] else ""
        title = f"{self['n']} images of {self['n_groups']} groups{kind}"
        table = self.to_frame().to_string(float_format="{:.3f}".format)
        return "\n".join([title, table, *self["notes"]])


def evaluate(
    model: str | Path | RunResult,
    data: "str | Path | Dataset | DatasetDict",
    *,
    columns: "Columns | None" = None,
    split: str | None = None,
    stain: str | None = None,
    allow_seen: bool = False,
    allow_scale: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "fp32",
    runtime: str = "torch",
    n_resamples: int = 2000,
    cache: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Measure a trained model on labelled images, with intervals over their groups.

    Args:
        model: A run's folder, its `model/`, a Hub id, or what `run` returned.
        data: Folder, table, Hub id, or a data set in memory.
        columns: Which columns hold images, classes and patients; see `load_dataset`.
        split: Of the data; by default `test` where they are split, else all.
        stain: Of images whose stain no column states.
        allow_seen: Accept groups and images that the model learned from.
        allow_scale: Accept images at a very different scale.
        batch_size: Images encoded at a time, 1 or more.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: What the vision tower computes in, see `open_engine`; not `auto`.
        runtime: What computes it; not `auto`.
        n_resamples: Bootstrap resamples, 1 or more.
        cache: Whether features are looked up and stored.
        progress: Whether to show how far it is.

    Returns:
        A mapping like a run's results (`kind` is `evaluation`; `metrics`, `per_class`, `data`,
        `notes`, ...). `data["groups_seen_in_training"]` and `data["images_seen_in_training"]` are
        `None` where that cannot be known.

    Raises:
        GloVLMError: The data have problems or labels that are no class of the model, the model
            learned from some of their groups or images, their scale is another, or the tower
            cannot be computed as asked.
    """
    from ..data import Columns, check_dataset, describe_reading, load_dataset
    from ..data.folder import is_synthetic
    from ..data.stains import list_stains, read_stains, state_stains
    from ..publish.adapter_only import load_model

    table = declarations(TrainConfig)
    for name, value in (("batch_size", batch_size), ("n_resamples", n_resamples)):
        if value is None or table[name].read(value) < 1:
            raise GloVLMError(f"{name} must be a whole number of 1 or more; found {value!r}.")
    refuse_auto(precision, runtime, "An evaluation")
    place = engine_device(device, runtime)
    source = str(model.folder if isinstance(model, RunResult) else model)
    rows, stated = state_stains(choose_split(load_dataset(data, columns=columns), split), stain)
    classifier, processor, run = load_model(source, exported=True)
    known = _check_labels(classifier, rows)
    kept = FeatureCache() if cache else None
    report = check_dataset({"all": rows}, cache=kept)
    report.raise_problems()
    rows, groups = report.looks.mark(rows), report.grouping
    assert groups is not None  # the data have no problem, so every image was decoded
    seen = seen_rows(run, rows, groups, report.looks.hashes)
    learned = {group for group, one in zip(groups.ids, seen.rows, strict=True) if one}
    if learned and not allow_seen:
        raise _flattering(len(learned), len(set(groups.ids)), seen.notes)
    scale = check_scale(classifier, processor, rows, allow=allow_scale)
    engine = open_engine(classifier, processor, device=place, precision=precision, runtime=runtime)
    predictions = predict(
        classifier, processor, rows,
        batch_size=batch_size, engine=engine, groups=groups.ids, progress=progress,
        cache=kept,
    )  # fmt: skip
    named = str(data) if isinstance(data, str | Path) else None
    name = IN_MEMORY if named is None else Path(named).name
    synthetic = classifier.config.synthetic or is_synthetic(data)
    base = classifier.config.backbone_name
    pretrained = contamination_notes(base, name, rows, synthetic=synthetic)
    thresholds, chosen_on, why_not = _thresholds_of_run(run, known)
    results = {
        "kind": "evaluation",
        "config": {
            "model": source,
            "data": named,
            "split": split,
            "stain": stain,
            **asdict(columns or Columns()),
            "allow_seen": allow_seen,
            "allow_scale": allow_scale,
            **({} if engine.is_default else engine.describe()),
        },
        "data": {
            "name": name,
            "fingerprint": report.fingerprint,
            "classes": known,
            "counts": report.counts["all"],
            "group_column": groups.column,
            "groups_seen_in_training": len(learned) if seen.known else None,
            "images_seen_in_training": sum(seen.rows) if seen.known else None,
            "mpp": scale.input_mpp,
            "stain": list_stains(read_stains(rows)) or None,
        },
        **measure(predictions, grades=grades_of_run(run, known), n_resamples=n_resamples),
        "operating_points": measure_thresholds(
            predictions, thresholds, chosen_on, why_not=why_not, n_resamples=n_resamples
        ),
        "notes": [
            groups.note,
            count_unlike(predictions),
            *hidden_notes(classifier.config),
            *outline_notes(classifier.config, rows),
            *stated,
            *predictions.notes,
            *describe_reading({"all": rows}).notes,
            *seen.notes,
            *scale.notes,
            *pretrained,
        ],
        "synthetic": synthetic,
        "environment": describe_environment(model_device(classifier)) | engine.versions(),
    }
    return Evaluation(results, Path(source), predictions)


def measure(
    predictions: Predictions,
    *,
    learned: Collection[str] = (),
    images: Collection[str] = (),
    grades: Sequence[int] | None = None,
    curves: bool = True,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute every metric of labelled predictions, with intervals over their groups.

    Args:
        predictions: Of labelled images.
        learned: Hashes of the groups that the model learned from, see `hash_groups`, and of their
            images.
        images: Hashes of the measured images, see `Looks.hashes`.
        grades: Of the classes, where they are grades.
        curves: Whether ROC and precision-recall curves are among the results.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        GloVLMError: The model learned from one of the groups or images.
    """
    from ..curves import compute_curves, count_by_group
    from ..metrics import compute_metrics

    assert predictions.labels is not None  # callers predict labelled rows
    check_unlearned(learned, predictions.groups or (), images)
    answers = (predictions.labels, predictions.probabilities)
    options: dict[str, Any] = {"groups": predictions.groups, "n_resamples": n_resamples}
    options |= {"class_names": predictions.class_names, "seed": seed}
    measured = compute_metrics(
        *answers, similarities=predictions.similarities, grades=grades, **options
    )
    if curves:
        measured["curves"] = compute_curves(*answers, **options)
    if predictions.groups is not None:
        measured["per_group"] = count_by_group(*answers, predictions.groups)
    return measured


def measure_thresholds(
    predictions: Predictions,
    thresholds: Mapping[str, float | None] | None,
    chosen_on: str | None,
    *,
    why_not: str = "",
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Sensitivity and specificity of labelled predictions at thresholds chosen without them.

    Args:
        predictions: Of labelled images.
        thresholds: Of each class, see `curves.choose_thresholds`; `None` where none were chosen.
        chosen_on: On which images, in words.
        why_not: Why none were chosen, in a sentence.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        `operating_points` of results: `rule`, `chosen_on`, `why_not`, `classes`.
    """
    from .. import curves

    classes = None
    if thresholds is not None:
        assert predictions.labels is not None  # callers predict labelled rows
        classes = curves.measure_thresholds(
            predictions.labels,
            predictions.probabilities,
            thresholds,
            groups=predictions.groups,
            class_names=predictions.class_names,
            n_resamples=n_resamples,
            seed=seed,
        )
    return {"rule": curves.RULE, "chosen_on": chosen_on, "why_not": why_not, "classes": classes}


def _thresholds_of_run(
    run: Mapping[str, Any] | None, names: Sequence[str]
) -> tuple[dict[str, float | None] | None, str | None, str]:
    """Thresholds that a model's run chose, on which images, and why there are none."""
    stated: Mapping[str, Any] = (run or {}).get("operating_points") or {}
    classes: Mapping[str, Any] = stated.get("classes") or {}
    if {*names} - {*classes}:
        return None, None, NO_THRESHOLDS
    chosen = {name: classes[name]["threshold"] for name in names}
    return chosen, f"{stated['chosen_on']}, in the model's run", ""


# --------------------------------------------------------------------------- what was learned from


def check_unlearned(
    learned: Collection[str], groups: Iterable[str], images: Collection[str] = ()
) -> None:
    """Check that a model learned from no group and no image that is to be measured.

    Args:
        learned: Hashes of the groups that it learned from, and of their images.
        groups: Group of each measured image.
        images: Hashes of the measured images, see `Looks.hashes`.

    Raises:
        GloVLMError: It learned from some.
    """
    measured = hash_groups(groups)
    if seen := len(measured & set(learned)):
        raise _flattering(seen, len(measured))
    if seen := len(set(images) & set(learned)):
        raise GloVLMError(
            f"{seen} of the images are the same as some that the model learned from, so the "
            "numbers would flatter it: leave them out."
        )


def seen_rows(
    run: Mapping[str, Any] | None,
    rows: "Dataset",
    groups: "Groups",
    hashes: Sequence[tuple[str, str]] | None = None,
) -> Seen:
    """Which rows a model learned from, by the results of its run.

    Args:
        run: The results, as `load_model` returns them; `None` where none lie beside the model.
        rows: Images as `load_dataset` makes them.
        groups: Their groups.
        hashes: Of their images (`Looks.hashes`), if at hand.
    """
    if run is None:
        return Seen([False] * len(groups.ids), False, [UNKNOWN])
    return Provenance.of_results(run).seen(rows, groups, hashes)


def unlearned_rows(
    run: Mapping[str, Any] | None, rows: "Dataset", groups: "Groups"
) -> tuple[list[int], list[str]]:
    """Rows that may be measured: without those of groups that a model learned from.

    Args:
        run: See `seen_rows`.
        rows: See `seen_rows`.
        groups: See `seen_rows`.

    Returns:
        Their numbers, and sentences where rows are left out or not all is known.

    Raises:
        GloVLMError: Nothing is left.
    """
    seen = seen_rows(run, rows, groups)
    kept = [row for row, one in enumerate(seen.rows) if not one]
    if not kept:
        raise GloVLMError("The model learned from every group in these data: give others.")
    left = len(rows) - len(kept)
    what = f"{left} images of groups that the model learned from are left out."
    return kept, [*([what] if left else []), *seen.notes]


def _flattering(seen: int, total: int, notes: Iterable[str] = ()) -> GloVLMError:
    sentence = (
        f"The model learned from {seen} of the {total} groups in these data, so the numbers would "
        "flatter it: leave them out, or give --allow-seen."
    )
    return GloVLMError(" ".join([sentence, *notes]))


# ------------------------------------------------------------------------------- what is measured


def choose_split(dataset: "DatasetDict", split: str | None) -> "Dataset":
    """Rows of one split; `test` by default, and all where nothing is split.

    Raises:
        GloVLMError: There is no such split.
    """
    if "all" in dataset:
        if split not in (None, "all"):
            raise GloVLMError(f"These data are not split, so there is no split '{split}'.")
        return dataset["all"]
    from ..data import all_rows

    if split == "all":
        return all_rows(dataset).remove_columns("split")
    if (split or "test") not in dataset:
        known = [*dataset, "all"]
        raise GloVLMError(
            f"These data have no split '{split or 'test'}': give --split {', '.join(known)}."
            f"{nearest(split or 'test', known)}"
        )
    return dataset[split or "test"]


def _check_labels(classifier: Any, rows: "Dataset") -> list[str]:
    """The classes of a model; refuses rows with a label that is none of them."""
    from ..data.groups import in_quotes

    known = class_names(classifier.config)
    unknown = next((name for name in rows.features["label"].names if name not in known), None)
    if unknown:
        meant = next((name for name in known if spelling(name) == spelling(unknown)), None)
        if meant is not None:
            raise GloVLMError(
                f"The labels {in_quotes([unknown, meant])} differ in spelling only, and the "
                "second is the model's class: rename the first in the data."
            )
        raise GloVLMError(
            f"The label '{unknown}' is no class of this model, which knows {', '.join(known)}."
            f"{nearest(unknown, known)}"
        )
    return known


def grades_of_run(run: Mapping[str, Any] | None, names: Sequence[str]) -> list[int] | None:
    """Grades of a model's classes: as its run states them, else by the catalogue."""
    from ..data.catalog import find_grades

    stated = {
        one["name"]: one.get("grade")
        for one in (run or {}).get("data", {}).get("classes", ())
        if isinstance(one, Mapping)
    }
    grades = [stated.get(name) for name in names]
    known = [grade for grade in grades if grade is not None]
    return known if len(known) == len(names) else find_grades(names)


def list_images(places: Sequence[Path]) -> tuple[dict[str, Path], list[str], list[str]]:
    """List image files by name: relative to the folder if one is given, else as given.

    Args:
        places: Images, and folders of images.

    Returns:
        The files; a sentence about what was left out of each folder; images whose names are not
        UTF-8, escaped, which no table could hold and which are left out, too.

    Raises:
        GloVLMError: There is nothing, something else than a file or folder, or no image.
    """
    from ..data.image_tables import listed_masks
    from ..data.listing import NOT_UTF8, SUFFIXES, escape_name, few, list_files

    paths: dict[str, Path] = {}
    notes: list[str] = []
    unnamed: list[str] = []
    for place in places:
        if place.is_file():
            paths[place.as_posix()] = place
            continue
        if not place.is_dir():
            actual = "a device or pipe" if place.exists() else "nothing"
            raise GloVLMError(
                f"Expected an image or a folder of images, found {actual} at {place}."
            )
        listing = list_files(place)
        unnamed += listing.examples.pop(NOT_UTF8, ())
        listing.left_out.pop(NOT_UTF8, None)
        if listing.left_out:
            notes.append(f"{place}: {listing.note()}.")
        if not listing.images and not unnamed:
            kinds = ", ".join(sorted(SUFFIXES))
            raise GloVLMError(
                f"Expected images ({kinds}) in {place}, found none. {listing.note()}".strip()
            )
        base = place if len(places) == 1 else Path()
        paths |= {_relative(place / name, base): place / name for name in listing.images}
    for name in [*paths]:
        if escape_name(name) != name:
            unnamed.append(escape_name(name))
            del paths[name]
    drawn = {mask.resolve() for mask in listed_masks(paths.values()) if mask is not None}
    masks = [name for name, path in paths.items() if drawn and path.resolve() in drawn]
    if masks:
        paths = {name: path for name, path in paths.items() if name not in {*masks}}
        notes.append(f"{len(masks)} images are masks of others and are not classified.")
    if not paths:
        raise GloVLMError(f"No image has a name in UTF-8 ({few(unnamed)}): rename them.")
    return paths, notes, unnamed


def _relative(path: Path, base: Path) -> str:
    try:
        return os.path.relpath(path, base).replace(os.sep, "/")
    except ValueError:  # on another drive of Windows
        return path.as_posix()


def image_rows(paths: Mapping[str, Path], mpp: float | None = None) -> "Dataset":
    """Rows of image files without labels: `image`, `file_name`, `mpp`, `stain`, `mask`, `outline`.

    Stain, mask and outline are those of a metadata.csv beside each, the last two where there are
    any; see `data.stains.state_stains` for a stain by hand.

    Args:
        paths: Files by name.
        mpp: Micrometres per pixel of all; by default from a metadata.csv beside each.
    """
    from datasets import Dataset, Features, Image, Value

    from ..data.columns import MASK, OUTLINE
    from ..data.image_tables import listed_cells, listed_masks

    types = {"image": Image(), "file_name": Value("string"), "mpp": Value("float64")}
    types["stain"] = Value("string")
    scales = listed_mpp(paths.values()) if mpp is None else [mpp] * len(paths)
    columns: dict[str, list[Any]] = {
        "image": [*map(str, paths.values())],
        "file_name": [*paths],
        "mpp": scales,
    }
    columns["stain"] = listed_cells(paths.values(), "stain")
    masks = listed_masks(paths.values())
    if any(masks):
        types[MASK], columns[MASK] = Image(), [mask and str(mask) for mask in masks]
    structures = [cell or None for cell in listed_cells(paths.values(), OUTLINE)]
    if any(structures):
        types[OUTLINE], columns[OUTLINE] = Value("string"), structures
    return Dataset.from_dict(columns, Features(types))


def readable_images(
    paths: Mapping[str, Path], outline: str = "ignore"
) -> tuple[dict[str, Path], list[str]]:
    """The images that can be decoded, and a sentence about each of the others.

    Args:
        paths: Files by name.
        outline: What the model does with their outlines.
    """
    from ..data import open_image
    from ..data.image_tables import listed_masks
    from ..data.outlines import open_outlined

    outlined = outline not in ("ignore", "centre")
    masks = listed_masks(paths.values()) if outlined else [None] * len(paths)
    readable: dict[str, Path] = {}
    unreadable: list[str] = []
    for (name, path), mask in zip(paths.items(), masks, strict=True):
        try:
            open_outlined(path, mask) if outlined else open_image(path)
            readable[name] = path
        except GloVLMError as error:
            unreadable.append(str(error))
    return readable, unreadable
