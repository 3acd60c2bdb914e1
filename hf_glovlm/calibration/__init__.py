"""Calibration of an adapted model: temperature, prevalence, conformal sets, abstention.

All of it is fitted on labelled images of groups (patients, slides) that no method learned from and
that are not tested, at the prevalence that these groups have: arrays in, plain values out. The one
exception, `estimate_prior`, sees unlabelled queries, so what uses it is transductive.

The final probabilities are `softmax(logits / temperature + shift)`; sets and abstention are fitted
on these and belong to them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import GloVLMError
from .abstention import (
    Abstention,
    abstention_threshold,
    images_without_error,
    measure_abstention,
    risk_coverage,
)
from .conformal import (
    CLUSTERED,
    CONFORMAL,
    ConformalThresholds,
    check_items,
    conformal_sets,
    describe_sets,
    fit_conformal,
    measure_sets,
)
from .inputs import Floats, Ints, checked_labels, checked_logits, softmax
from .scaling import (
    PriorEstimate,
    correct_prior,
    declared_prior,
    estimate_prior,
    find_temperature,
    fit_temperature,
    prior_shift,
)

__all__ = [
    "CONFORMAL",
    "Abstention",
    "Calibration",
    "ConformalThresholds",
    "PriorEstimate",
    "abstention_threshold",
    "calibrate",
    "check_items",
    "conformal_sets",
    "correct_prior",
    "declared_prior",
    "describe_sets",
    "estimate_prior",
    "fit_conformal",
    "fit_temperature",
    "measure_abstention",
    "measure_sets",
    "prior_shift",
    "risk_coverage",
]


@dataclass(frozen=True)
class Calibration:
    """Calibration of one adapted model, fitted on its calibration images.

    Attributes:
        temperature: Divides the head's logits; 1 where none was fitted.
        conformal: `ConformalThresholds.to_dict()`, or None.
        abstention: `Abstention.to_dict()`, or None.
        notes: Sentences that belong beside the numbers.
        facts: `n`, `groups`, `per_class` (images of each class), `nll` (`before` and `after` the
            temperature and the shift), and of the sets `coverage_range`, by class if per class.
    """

    temperature: float
    conformal: dict[str, Any] | None
    abstention: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        return asdict(self)


def calibrate(
    logits: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[str],
    class_names: Sequence[str],
    *,
    temperature: bool = True,
    conformal: str | None = None,
    alpha: float = 0.1,
    per_class: bool = False,
    max_risk: float | None = None,
    shift: ArrayLike | None = None,
) -> Calibration:
    """Calibrate: fit temperature, sets and abstention in the order in which they act.

    Args:
        logits: `[n, K]` of the head, before temperature and shift.
        labels: Class indices `[n]`.
        groups: Patient, case or slide of each image `[n]`.
        class_names: `[K]`.
        temperature: Whether to fit one.
        conformal: A name in `CONFORMAL`, or None for no sets.
        alpha: Share of images whose class the sets may miss.
        per_class: Whether the sets cover 1 - alpha of each class.
        max_risk: Largest share of errors among the answers, or None for no abstention.
        shift: `prior_shift(...)` `[K]` where the prevalence is corrected. The temperature is then
            fitted with equal weights of the classes, before it; sets and abstention after it.

    Raises:
        GloVLMError: A shape or range is wrong, or there are too few images for the sets.
    """
    z = checked_logits(logits)
    y = checked_labels(labels, z.shape[1], len(z))
    if len(class_names) != z.shape[1] or len(groups) != len(z):
        raise GloVLMError(
            f"Expected {z.shape[1]} class names and {len(z)} groups, found {len(class_names)} and "
            f"{len(groups)}: give one per column and one per row."
        )
    added = np.zeros(z.shape[1]) if shift is None else np.asarray(shift, dtype=np.float64)
    if added.shape != (z.shape[1],) or not np.isfinite(added).all():
        raise GloVLMError(f"Expected a finite shift of {z.shape[1]} classes, found {added}.")
    counts = np.bincount(y, minlength=z.shape[1]).tolist()
    n_groups = len({str(group) for group in groups})
    notes = [f"Calibrated on {len(z)} images of {n_groups} groups that it did not learn from."]
    missing = [name for name, n in zip(class_names, counts, strict=True) if not n]
    if missing:
        notes.append(f"No calibration image shows {', '.join(missing)}.")

    scale, note = 1.0, ""
    if temperature:
        scale, note = find_temperature(z, y, balanced=shift is not None)
    p = softmax(z / scale + added)
    facts: dict[str, Any] = {
        "n": len(z),
        "groups": n_groups,
        "per_class": dict(zip(class_names, counts, strict=True)),
        "nll": {"before": _nll(softmax(z), y), "after": _nll(p, y)},
    }
    notes.append(note)
    sets = abstention = None
    if conformal is not None:
        options: dict[str, Any] = {"method": conformal, "alpha": alpha, "per_class": per_class}
        sets = fit_conformal(p, y, class_names=class_names, **options)
        ranges = [list(bounds) for bounds in sets.coverage_range]
        facts["coverage_range"] = (
            dict(zip(class_names, ranges, strict=True)) if per_class else ranges[0]
        )
        notes += _set_notes(sets, class_names, temperature)
    if max_risk is not None:
        abstention = abstention_threshold(p, y, max_risk)
        if abstention.threshold is None:
            notes.append(
                f"No confidence keeps the risk below {max_risk:g} for certain: that takes at least "
                f"{images_without_error(max_risk, abstention.delta)} confident calibration images "
                f"without an error, of {abstention.n}."
            )
    if (sets or abstention) and n_groups < len(z):
        notes.append(CLUSTERED)
    return Calibration(
        scale,
        sets.to_dict() if sets else None,
        abstention.to_dict() if abstention else None,
        [sentence for sentence in notes if sentence],
        facts,
    )


def _nll(p: Floats, y: Ints) -> float:
    own = p[np.arange(len(y)), y]
    return float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean())


def _set_notes(
    sets: ConformalThresholds, class_names: Sequence[str], temperature: bool
) -> list[str]:
    of = [f" of {name}" for name in class_names] if sets.per_class else [""]
    ranges = [
        f"{low:.2f} to {high:.2f}{name} (n = {n})"
        for (low, high), name, n in zip(sets.coverage_range, of, sets.n, strict=True)
    ]
    notes = [
        f"Conformal sets ({sets.method}) promise {100 * (1 - sets.alpha):g}% coverage on average; "
        f"nine in ten calibrations of this size really cover {', '.join(ranges)}."
    ]
    if temperature:
        notes.append(
            "Temperature and sets were fitted on the same images: with few of them the promise is "
            "approximate."
        )
    return notes
