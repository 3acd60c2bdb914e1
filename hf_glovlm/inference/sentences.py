"""Predictions, classes and limits of a classifier in words; zero-shot classifiers from words.

`build_zero_shot` makes a zero-shot classifier of a model's towers and any class prompts;
`copy_sharing_weights` copies a model that others are using, without its weights.
"""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration import ConformalThresholds, conformal_sets, describe_sets
from ..data.terminology import find_term
from ..errors import GloVLMError
from ..model.heads import prototype_head
from .guard import NO_GUARD
from .outlines import hidden_notes
from .prediction import Predictions, class_names
from .scale import check_scale, describe_scale
from .texts import check_class_texts, embed_prompts

logger = logging.getLogger("hf_glovlm")

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model import GloVLMForImageClassification

RESEARCH_ONLY = "Research use only, not for diagnosis."
MAX_PROMPT = 1000  # characters; towers read far less


@dataclass(frozen=True)
class ImagePrediction:
    """Prediction for one image, with a sentence for a reader.

    Args:
        file_name: The image.
        label: The most probable class.
        probabilities: Of each class, in the model's order; they sum to 1.
        classes: The conformal set, most probable first; `None` where the model has none.
        answered: Whether the model answers rather than abstains, as it does where the image is
            unlike the support; `None` where it has no limit of confidence and the image is none.
        sentence: All of this in words.
        support_distance: Distance to the support as a multiple of its limit: above 1, the image is
            unlike the support. `None` where the model has no guard.
    """

    file_name: str
    label: str
    probabilities: dict[str, float]
    classes: tuple[str, ...] | None
    answered: bool | None
    sentence: str
    support_distance: float | None = None


@dataclass(frozen=True)
class ClassDescription:
    """Name, prompts and definition of a class.

    Args:
        name: The model's name for it.
        prompts: The texts that it compares with images; empty where it uses no text.
        definition: From the terminology, with class system and source; `None` if not there.
    """

    name: str
    prompts: tuple[str, ...]
    definition: str | None


def describe_predictions(predictions: Predictions, config: Any) -> list[ImagePrediction]:
    """Predictions in words, one per image.

    Args:
        predictions: From `predict`.
        config: Of the classifier; its `calibration` holds sets and abstention, where fitted.
    """
    calibration = config.calibration or {}
    inside = _prediction_sets(predictions, calibration)
    abstention = calibration.get("abstention")
    distances = predictions.support_distances
    answers = []
    for i, p in enumerate(predictions.probabilities):
        order = np.argsort(-p, kind="stable")
        label = predictions.class_names[order[0]]
        chosen = None
        if inside is not None:
            chosen = tuple(predictions.class_names[k] for k in order if inside[i, k])
        answered = None if not abstention else _is_answered(p, abstention)
        sentences = [_label_sentence(label, float(p.max()), answered, abstention)]
        distance = None if distances is None else float(distances[i])
        if distance is not None and distance > 1:
            answered = False
            sentences = [_unlike_sentence(label, float(p.max()), distance)]
        if chosen is not None:
            sentences.append(_set_sentence(chosen, calibration["conformal"]))
        answers.append(
            ImagePrediction(
                file_name=predictions.file_names[i],
                label=label,
                probabilities=dict(zip(predictions.class_names, p.tolist(), strict=True)),
                classes=chosen,
                answered=answered,
                sentence=" ".join(sentences),
                support_distance=distance,
            )
        )
    return answers


def calibration_columns(
    predictions: Predictions, calibration: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Table columns of a model's limits: prediction sets, abstention, distance to the support.

    Args:
        predictions: From `predict`.
        calibration: From the config; empty for a model without.

    Returns:
        `set`, its prediction sets (`"ischemic or viable"`), `answers` and `unlike_support`, `yes`
        or `no`, and `support_distance`, above 1 where the image is unlike; each where the model has
        it.
    """
    columns: dict[str, list[Any]] = {}
    distances, unlike = predictions.support_distances, predictions.unlike_support
    inside = _prediction_sets(predictions, calibration)
    if inside is not None:
        columns["set"] = describe_sets(inside, predictions.class_names)
    if calibration.get("abstention"):
        given = [_is_answered(p, calibration["abstention"]) for p in predictions.probabilities]
        if unlike is not None:
            given = [answered and not far for answered, far in zip(given, unlike, strict=True)]
        columns["answers"] = _yes_or_no(given)
    if distances is not None and unlike is not None:
        columns["unlike_support"] = _yes_or_no(unlike)
        columns["support_distance"] = [round(float(d), 3) for d in distances]
    return columns


def describe_classes(config: Any) -> list[ClassDescription]:
    """Prompts of a classifier's classes, and their definitions in the terminology.

    Args:
        config: Of the classifier.
    """
    names = class_names(config)
    prompts = config.prompts or [()] * len(names)
    return [
        ClassDescription(name, tuple(texts), _define(name))
        for name, texts in zip(names, prompts, strict=True)
    ]


def describe_limits(config: Any) -> list[str]:
    """Limits of a classifier: sentences that belong beside all its predictions.

    Args:
        config: Of the classifier.
    """
    limits = []
    if config.synthetic or config.backbone_name == "mini":
        limits.append(
            "Scores from synthetic images: this model was trained on synthetic images, so its "
            "scores test the software and are no evidence about kidneys."
        )
    limits += hidden_notes(config)
    calibration = config.calibration or {}
    if calibration:
        limits += calibration.get("notes", [])
    elif config.temperature == 1:
        limits.append(
            "Not calibrated: no held-out images have shown how often such probabilities are right."
        )
    if not config.guard:
        limits.append(NO_GUARD)
    if config.stains:
        limits.append(f"It learned from images stained {' and '.join(config.stains)} alone.")
    if config.stain_centres:
        limits.append(
            "Features are centred by the stain: where none is stated, the mean of the centres of "
            f"{' and '.join(config.stain_centres['stains'])} stands in."
        )
    return [*limits, RESEARCH_ONLY]


def describe_image_scale(model: Any, processor: Any, rows: "Dataset") -> str:
    """Scale of images at a classifier's input, beside its training scale, in a sentence.

    Args:
        model: The classifier.
        processor: Its processor.
        rows: Images; the column `mpp` holds micrometres per pixel, where known.

    Raises:
        GloVLMError: Both scales are known and too far apart.
    """
    scale, trained = check_scale(model, processor, rows), describe_scale(model.config.mpp)
    actual, unit = scale.input_mpp, "micrometres per input pixel"
    if actual == trained == "unknown":
        return "The scale is unknown, of these images as of the training images."
    sentences = [f"Images: {actual} {unit}; the model was trained at {trained}."]
    if "unknown" in (actual, trained):
        sentences.append("Whether the scales fit cannot be checked.")
    return " ".join([*sentences, *scale.notes])


def copy_sharing_weights(model: Any) -> Any:
    """Copy a model; the copy shares its weights and nothing else.

    Modules, modes, `requires_grad` and config are the copy's own, so that it can be adapted, put
    into another mode or explained while others use the first. A last projection is copied, since a
    method may train it.

    Args:
        model: A `GloVLMModel` or a classifier; methods that train inside its towers must not be
            run on the copy.
    """
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        for name, weight in model.named_parameters()
        if "projection" not in name
    }
    return copy.deepcopy(model, shared)


def build_zero_shot(
    model: Any, processor: Any, prompts: Mapping[str, Sequence[str]]
) -> "GloVLMForImageClassification":
    """Build a zero-shot classifier from a model's towers and class prompts.

    Args:
        model: A `GloVLMModel`; it stays as it is.
        processor: Its processor.
        prompts: Per class, one or more texts; their features are averaged.

    Returns:
        A classifier in evaluation mode, without calibration, that shares the towers' weights.

    Raises:
        GloVLMError: The towers share no space of images and texts; fewer than two classes; a class
            without a text; a text of two classes.
    """
    from ..model import GloVLMForImageClassification

    if not model.has_joint_space:
        raise GloVLMError(
            f"'{model.config.backbone_name}' joins two encoders that were never trained together, "
            "so texts cannot be compared with images: adapt it with labelled images, or take a "
            "model with a joint space (mini, plip)."
        )
    texts = _check_prompts(prompts)
    own = copy_sharing_weights(model)
    prompts_of = list(texts.values())
    for note in check_class_texts(own, processor, prompts_of, list(texts)):
        logger.warning(note)
    prototypes = torch.from_numpy(embed_prompts(own, processor, prompts_of))
    config = own.config
    config.id2label = dict(enumerate(texts))
    config.label2id = {name: k for k, name in enumerate(texts)}
    config.problem_type = "single_label_classification"
    config.prompts = list(texts.values())
    config.temperature = 1.0
    config.prior_shift = config.calibration = config.guard = None
    config.stains = config.stain_centres = None
    head = prototype_head(prototypes, own.logit_scale.exp().item())
    return GloVLMForImageClassification(config, glovlm=own, head=head).eval()


# ----------------------------------------------------------------------------------- sentences


def _check_prompts(prompts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Check class names and prompts; blanks at their ends are removed."""
    texts: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for given, words in prompts.items():
        name = given.strip()
        cleaned = [word.strip() for word in words if word.strip()]
        if not name or not cleaned or name in texts:
            raise GloVLMError(
                f"Every class needs a name of its own and at least one prompt; class '{name}' "
                f"{'is there twice' if name in texts else 'has none'}."
            )
        for text in cleaned:
            if len(text) > MAX_PROMPT:
                raise GloVLMError(
                    f"A prompt has at most {MAX_PROMPT} characters; one of '{name}' has "
                    f"{len(text)}: shorten it."
                )
            other = owner.setdefault(text.casefold(), name)
            if other != name:
                raise GloVLMError(
                    f"The classes '{other}' and '{name}' share the prompt '{text}', so no text "
                    "distinguishes them; give each its own."
                )
        texts[name] = list(dict.fromkeys(cleaned))
    if len(texts) < 2:
        raise GloVLMError(f"Expected at least two classes, found {len(texts)}.")
    return texts


def _define(name: str) -> str | None:
    try:
        return find_term(name).describe()
    except GloVLMError:  # no such term, or a word that several class systems define
        return None


def _prediction_sets(
    predictions: Predictions, calibration: Mapping[str, Any]
) -> NDArray[np.bool_] | None:
    """Prediction sets `[n, K]`, True where a class is in; `None` where the model has none."""
    if not calibration.get("conformal") or not len(predictions.probabilities):
        return None
    thresholds = ConformalThresholds.from_dict(calibration["conformal"])
    return conformal_sets(predictions.probabilities, thresholds)


def _is_answered(p: NDArray[np.float64], abstention: Mapping[str, Any]) -> bool:
    least = abstention["threshold"]
    return least is not None and bool(p.max() >= least)


def _label_sentence(
    label: str, p: float, answered: bool | None, abstention: Mapping[str, Any] | None
) -> str:
    label = label.replace("_", " ")
    if answered is not False or abstention is None:
        return f"{label}, with a probability of {p:.2f}."
    least, risk = abstention["threshold"], abstention["max_risk"]
    if least is None:
        return (
            "No answer: on the calibration images no confidence kept the share of errors below "
            f"{risk:.0%}."
        )
    return (
        f"No answer: the most probable class, {label}, has {p:.2f}, and below {least:.2f} more "
        f"than {risk:.0%} of the answers may be wrong."
    )


def _unlike_sentence(label: str, p: float, distance: float) -> str:
    return (
        "No answer: the image is unlike those that the model learned from "
        f"({distance:.1f} times the limit of their distance), so its most probable class, "
        f"{label.replace('_', ' ')} with {p:.2f}, may mean nothing."
    )


def _yes_or_no(values: Iterable[bool]) -> list[str]:
    return ["yes" if value else "no" for value in values]


def _set_sentence(classes: Sequence[str], conformal: Mapping[str, Any]) -> str:
    promise = f"{100 * (1 - conformal['alpha']):g}%"
    if not classes:
        return (
            f"No class fits well enough for a promise of {promise}: the image is unlike those "
            "that the sets were fitted on."
        )
    named = " or ".join(classes).replace("_", " ")
    return f"Prediction set at {promise}: {named}."
