"""What a classifier says about images, in words: classes, sets, abstention and what they rest on.

Also other words in, another classifier out: `reword` makes a zero-shot classifier of a model's
towers, and `borrow` a model that shares the weights of one that others are using.
"""

import copy
from collections.abc import Mapping, Sequence
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
from .prediction import Predictions, embed_prompts
from .scale import check_scale, describe_scale

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model import GloVLMForImageClassification

RESEARCH_ONLY = "Research use only, not for diagnosis."
MAX_PROMPT = 1000  # characters; towers read far less


@dataclass(frozen=True)
class Answer:
    """What a classifier says about one image.

    Args:
        file_name: The image.
        label: The most probable class.
        probabilities: Of each class, in the model's order; they sum to 1.
        classes: The conformal set, most probable first; `None` where the model carries none.
        answered: Whether the model answers rather than abstains; `None` where it never abstains.
        sentence: All of this for a person.
    """

    file_name: str
    label: str
    probabilities: dict[str, float]
    classes: tuple[str, ...] | None
    answered: bool | None
    sentence: str


@dataclass(frozen=True)
class ClassWords:
    """What stands for a class.

    Args:
        name: As the model calls it.
        prompts: The texts that it compares with images; empty where no text has a part in it.
        definition: From the terminology, with class system and source; `None` if not known there.
    """

    name: str
    prompts: tuple[str, ...]
    definition: str | None


def give_answers(said: Predictions, config: Any) -> list[Answer]:
    """Put predictions into words.

    Args:
        said: By `predict`.
        config: Of the classifier; its `calibration` holds sets and abstention, where fitted.
    """
    calibration = config.calibration or {}
    inside = _sets(said, calibration)
    abstention = calibration.get("abstention")
    answers = []
    for i, p in enumerate(said.probabilities):
        order = np.argsort(-p, kind="stable")
        label = said.class_names[order[0]]
        chosen = None
        if inside is not None:
            chosen = tuple(said.class_names[k] for k in order if inside[i, k])
        answered = None if not abstention else _answers(p, abstention)
        sentences = [_say_label(label, float(p.max()), answered, abstention)]
        if chosen is not None:
            sentences.append(_say_set(chosen, calibration["conformal"]))
        answers.append(
            Answer(
                file_name=said.file_names[i],
                label=label,
                probabilities=dict(zip(said.class_names, p.tolist(), strict=True)),
                classes=chosen,
                answered=answered,
                sentence=" ".join(sentences),
            )
        )
    return answers


def answer_columns(said: Predictions, calibration: Mapping[str, Any]) -> dict[str, list[str]]:
    """Columns of a table for a model that was calibrated.

    Args:
        said: By `predict`.
        calibration: The config's; empty for a model without.

    Returns:
        `set`, its prediction sets (`"ischemic or viable"`), and `answers`, `yes` or `no`; each
        where the model carries it.
    """
    columns: dict[str, list[str]] = {}
    inside = _sets(said, calibration)
    if inside is not None:
        columns["set"] = describe_sets(inside, said.class_names)
    if calibration.get("abstention"):
        given = [_answers(p, calibration["abstention"]) for p in said.probabilities]
        columns["answers"] = ["yes" if answered else "no" for answered in given]
    return columns


def describe_classes(config: Any) -> list[ClassWords]:
    """The prompts of a classifier's classes, and what the terminology says about each.

    Args:
        config: Of the classifier.
    """
    names = [str(config.id2label[k]) for k in range(len(config.id2label))]
    prompts = config.prompts or [()] * len(names)
    return [
        ClassWords(name, tuple(texts), _define(name))
        for name, texts in zip(names, prompts, strict=True)
    ]


def describe_limits(config: Any) -> list[str]:
    """Sentences that belong beside everything a classifier says.

    Args:
        config: Of the classifier.
    """
    limits = []
    if config.synthetic or config.backbone_name == "mini":
        limits.append(
            "Scores from drawings: this model has learned from computer drawings, so its scores "
            "test the software and say nothing about kidneys."
        )
    calibration = config.calibration or {}
    if calibration:
        limits += calibration.get("notes", [])
    elif config.temperature == 1:
        limits.append(
            "Not calibrated: no held-out images have shown how often such probabilities are right."
        )
    return [*limits, RESEARCH_ONLY]


def describe_image_scale(model: Any, processor: Any, rows: "Dataset") -> str:
    """Say at which scale images reach a classifier, beside the scale that it learned at.

    Args:
        model: The classifier.
        processor: Its processor.
        rows: Images; the column `mpp` holds micrometres per pixel, where known.

    Raises:
        GloVLMError: Both scales are known and too far apart.
    """
    found, taught = check_scale(model, processor, rows), describe_scale(model.config.mpp)
    if found == taught == "unknown":
        return "The scale is unknown, of these images as of those that the model learned from."
    unit = "micrometres per input pixel"
    if "unknown" in (found, taught):
        return (
            f"Images: {found} {unit}; the model learned at {taught}. Whether the scales go "
            "together cannot be checked."
        )
    return f"Images: {found} {unit}; the model learned at {taught}."


def borrow(model: Any) -> Any:
    """Make a model that shares a model's weights, and nothing else.

    Its modules, modes, `requires_grad` and config are its own, so that it can be adapted, put into
    another mode or explained while others use the first. A last projection is copied, since a
    method may train it.

    Args:
        model: A `GloVLMModel` or a classifier; methods that train inside its towers must not be
            run on what is borrowed.
    """
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        for name, weight in model.named_parameters()
        if "projection" not in name
    }
    return copy.deepcopy(model, shared)


def reword(
    model: Any, processor: Any, prompts: Mapping[str, Sequence[str]]
) -> "GloVLMForImageClassification":
    """Make a zero-shot classifier of a model's towers and of other words.

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
            "so words cannot be compared with images: adapt it with labelled images, or take a "
            "model with a joint space (mini, plip)."
        )
    texts = _check_words(prompts)
    own = borrow(model)
    prototypes = torch.from_numpy(embed_prompts(own, processor, list(texts.values())))
    config = own.config
    config.id2label = dict(enumerate(texts))
    config.label2id = {name: k for k, name in enumerate(texts)}
    config.problem_type = "single_label_classification"
    config.prompts = list(texts.values())
    config.temperature, config.prior_shift, config.calibration = 1.0, None, None
    head = prototype_head(prototypes, own.logit_scale.exp().item())
    return GloVLMForImageClassification(config, glovlm=own, head=head).eval()


# ------------------------------------------------------------------------------------- the words


def _check_words(prompts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names and texts without blanks at their ends."""
    texts: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for given, words in prompts.items():
        name = given.strip()
        found = [word.strip() for word in words if word.strip()]
        if not name or not found or name in texts:
            raise GloVLMError(
                f"Every class needs a name of its own and at least one prompt; class '{name}' "
                f"{'is there twice' if name in texts else 'has none'}."
            )
        for text in found:
            if len(text) > MAX_PROMPT:
                raise GloVLMError(
                    f"A prompt has at most {MAX_PROMPT} characters; one of '{name}' has "
                    f"{len(text)}: shorten it."
                )
            other = owner.setdefault(text.casefold(), name)
            if other != name:
                raise GloVLMError(
                    f"The classes '{other}' and '{name}' share the prompt '{text}', so no text "
                    "tells them apart; give each its own."
                )
        texts[name] = list(dict.fromkeys(found))
    if len(texts) < 2:
        raise GloVLMError(f"Expected at least two classes, found {len(texts)}.")
    return texts


def _define(name: str) -> str | None:
    try:
        return find_term(name).describe()
    except GloVLMError:  # no such term, or a word that several class systems define
        return None


def _sets(said: Predictions, calibration: Mapping[str, Any]) -> NDArray[np.bool_] | None:
    """Which classes each image's set holds `[n, K]`; `None` where the model carries no sets."""
    if not calibration.get("conformal") or not len(said.probabilities):
        return None
    thresholds = ConformalThresholds.from_dict(calibration["conformal"])
    return conformal_sets(said.probabilities, thresholds)


def _answers(p: NDArray[np.float64], abstention: Mapping[str, Any]) -> bool:
    least = abstention["threshold"]
    return least is not None and bool(p.max() >= least)


def _say_label(
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


def _say_set(classes: Sequence[str], conformal: Mapping[str, Any]) -> str:
    promise = f"{100 * (1 - conformal['alpha']):g}%"
    if not classes:
        return (
            f"No class fits well enough for a promise of {promise}: the image is unlike those "
            "that the sets were fitted on."
        )
    named = " or ".join(classes).replace("_", " ")
    return f"Prediction set at {promise}: {named}."
