"""Leave-one-patient-out cross-validation of a few labelled images.

For methods on frozen features alone: every image is encoded once and kept in memory, so that as
many adaptations as there are patients take seconds.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.catalog import find_grades, list_grades
from ..data.folder import column
from ..data.groups import differing_spellings, in_quotes
from ..data.looks import look_at
from ..errors import GloVLMError, nearest
from ..inference import FeatureCache, MemoryCache, Predictions, predict
from ..inference.sentences import copy_sharing_weights
from ..methods import METHODS, FeatureMethod, HeadMethod
from ..metrics import compute_metrics
from ..training import AdaptConfig, adapt
from ..training.config import Outline
from .evaluation import check_unlearned
from .provenance import hash_groups

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import ClassInfo

NO_ESTIMATE = "Performance cannot be estimated from this upload: "
MIN_PATIENTS = 2  # of a class, so that one is left to learn from


@dataclass(frozen=True)
class LeftOut:
    """Results of leave-one-patient-out cross-validation.

    Args:
        sentence: For a person; where nothing could be measured, why.
        patients: How many were left out; 0 where nothing could be measured.
        results: As `compute_metrics` returns it, over all left-out images; `None` without.
        predictions: Of the left-out images, in the order of the rows; `None` without.
    """

    sentence: str
    patients: int = 0
    results: dict[str, Any] | None = None
    predictions: Predictions | None = None


def frozen_methods() -> dict[str, str]:
    """Methods that learn from labelled images on frozen towers, with what trains in each."""
    return {
        name: method.trains
        for name, method in METHODS.items()
        if isinstance(method, FeatureMethod | HeadMethod)
        and not method.transductive
        and name != "zero_shot"
    }


def leave_patients_out(
    model: Any,
    processor: Any,
    method: str,
    rows: "Dataset",
    patients: Sequence[str] | None,
    *,
    classes: "Sequence[ClassInfo] | None" = None,
    method_config: Mapping[str, Any] | None = None,
    outline: Outline = "ignore",
    seed: int = 0,
    cache: FeatureCache | None = None,
    on_patient: Callable[[int, int], None] | None = None,
) -> LeftOut:
    """Leave-one-patient-out cross-validation: adapt on all others, predict, measure.

    Args:
        model: A `GloVLMModel`; it stays as it is.
        processor: Its processor.
        method: A name of `frozen_methods()`.
        rows: Labelled rows with `image` and `label` (a `ClassLabel`).
        patients: Patient of each row; an empty one is not known.
        classes: Names and prompts in label order.
        method_config: Settings of the method.
        outline: What the model sees of an outlined image, see `AdaptConfig`.
        seed: Of every adaptation.
        cache: Keeps features of the towers; by default in memory, and gone afterwards.
        on_patient: Told how many patients are done, of how many.

    Returns:
        Metrics with intervals over patients; or the sentence that says why there are none: patients
        are not known or spelled in two ways, two share an image, or a class has fewer than two.

    Raises:
        GloVLMError: The method does not work on frozen features; what `adapt` raises.
    """
    if method not in frozen_methods():
        raise GloVLMError(
            f"Leaving patients out is for methods on frozen features, not for '{method}': expected "
            f"{', '.join(frozen_methods())}.{nearest(method, frozen_methods())}"
        )
    names: list[str] = rows.features["label"].names
    labels = np.array(column(rows, "label"), np.int64)
    reason = _why_not(labels, names, patients)
    if reason or patients is None:
        return LeftOut(NO_ESTIMATE + reason)
    hashes = look_at(rows.select_columns(["image"])).hashes
    if reason := _shared_image(hashes, patients):
        return LeftOut(NO_ESTIMATE + reason)
    store = MemoryCache() if cache is None else cache
    processor = copy.copy(processor)  # `adapt` drops the learned context of a former task
    order = sorted(set(patients))
    group = np.array([order.index(patient) for patient in patients])
    probabilities = np.empty((len(rows), len(names)))
    logits = np.empty((len(rows), len(names)), np.float32)
    config = AdaptConfig(method_config or {}, seed=seed, outline=outline)
    for k in range(len(order)):
        kept, left = np.flatnonzero(group != k).tolist(), np.flatnonzero(group == k).tolist()
        adapted = adapt(
            copy_sharing_weights(model), method, rows.select(kept),
            processor=processor, classes=classes, config=config, cache=store,
        )  # fmt: skip
        learned = hash_groups(patients[i] for i in kept).union(*(hashes[i] for i in kept))
        images = {value for i in left for value in hashes[i]}
        check_unlearned(learned, [patients[i] for i in left], images)
        predictions = predict(adapted.model, processor, rows.select(left), cache=store)
        probabilities[left], logits[left] = predictions.probabilities, predictions.logits
        if on_patient is not None:
            on_patient(k + 1, len(order))
    grades = find_grades(names) if classes is None else list_grades(classes)
    results = compute_metrics(
        labels, probabilities, groups=patients, class_names=names, grades=grades, seed=seed
    )
    known = "file_name" in rows.column_names
    predictions = Predictions(
        probabilities=probabilities,
        logits=logits,
        class_names=names,
        file_names=[str(n) for n in (column(rows, "file_name") if known else range(len(rows)))],
        groups=list(patients),
        labels=labels,
    )
    return LeftOut(_sentence(results, len(order)), len(order), results, predictions)


def _why_not(labels: NDArray[np.int64], names: list[str], patients: Sequence[str] | None) -> str:
    """Reason why nothing can be measured; empty where it can."""
    if patients is None or not any(patient.strip() for patient in patients):
        return (
            "no patient ids were given, and images of one patient resemble each other. Give the "
            "patient of every image, and one patient at a time is left out."
        )
    if len(patients) != len(labels) or not all(patient.strip() for patient in patients):
        known = sum(bool(patient.strip()) for patient in patients)
        return f"the patient is known of {known} of {len(labels)} images; give that of every image."
    for written in differing_spellings(patients):
        return f"the patients {in_quotes(written)} differ in spelling only; write each in one way."
    for k, name in enumerate(names):
        held = len({patient for patient, y in zip(patients, labels, strict=True) if y == k})
        if held < MIN_PATIENTS:
            return (
                f"leaving a patient out takes at least {MIN_PATIENTS} patients of every class, and "
                f"'{name}' has {held}."
            )
    return ""


def _shared_image(hashes: Sequence[tuple[str, str]], patients: Sequence[str]) -> str:
    """Why nothing can be measured where two patients share an image; empty where none do."""
    owner: dict[str, str] = {}
    for (pixels, _), patient in zip(hashes, patients, strict=True):
        first = owner.setdefault(pixels, patient)
        if first != patient:
            return (
                f"the patients {in_quotes([first, patient])} have an image with the same pixels, "
                "which would be learned from and measured; remove the copy."
            )
    return ""


def _sentence(results: Mapping[str, Any], patients: int) -> str:
    parts = []
    for key, title in (("balanced_accuracy", "balanced accuracy"), ("macro_auc", "macro-AUC")):
        entry = results["metrics"][key]
        if entry["value"] is None:
            continue
        text = f"{title} {entry['value']:.2f}"
        if entry["ci95"] is not None:
            text += " (95% interval over patients {:.2f} to {:.2f})".format(*entry["ci95"])
        parts.append(text)
    note = results["metrics"]["balanced_accuracy"]["note"]
    return (
        f"Each of {patients} patients was predicted by a model that learned from the others, "
        f"{results['n']} images in all: {', '.join(parts)}." + (f" Note: {note}." if note else "")
    )
