"""Abstention: no prediction below a confidence, so that the others keep to a risk."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import GloVLMError
from .inputs import Bools, Floats, checked_labels, checked_probabilities

STEPS = 10  # coverages that are tried: 10%, 20% ... 100%
DELTA = 0.05


def risk_coverage(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """Risk-coverage curve: error among the answered images against their share.

    Images are answered in the order of their confidence, the largest probability; equally
    confident ones together (Geifman and El-Yaniv 2017, arXiv 1705.08500).

    Args:
        probabilities: `[n, K]`, rows sum to 1.
        labels: Class indices `[n]`.

    Returns:
        `coverage` and `risk`, a point per distinct confidence, from the highest down, and `aurc`:
        the area under their steps, which is the mean over images of the risk at their confidence.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    confidence, wrong = _ordered(probabilities, labels)
    last = np.flatnonzero(np.diff(confidence, append=-np.inf) < 0)  # of each tie
    coverage = (last + 1) / len(wrong)
    risk = wrong.cumsum()[last] / (last + 1)
    area = float(risk @ np.diff(coverage, prepend=0))
    return {"coverage": coverage.tolist(), "risk": risk.tolist(), "aurc": area}


@dataclass(frozen=True)
class Abstention:
    """Selective classifier: a confidence below which no answer is given.

    Attributes:
        threshold: Smallest largest-probability that is answered; None where no threshold keeps to
            the risk, so that no image may be answered.
        coverage: Share of the calibration images that it answers.
        risk: Their share of errors; None without an answer.
        bound: What the risk lies below, with a confidence of 1 - delta.
        max_risk: The largest risk allowed.
        delta: How often, over calibration sets, the bound may be wrong.
        n: Calibration images.
    """

    threshold: float | None
    coverage: float
    risk: float | None
    bound: float | None
    max_risk: float
    delta: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def abstention_threshold(
    probabilities: ArrayLike, labels: ArrayLike, max_risk: float, *, delta: float = DELTA
) -> Abstention:
    """Confidence threshold from which on answers are wrong at most `max_risk` of the time.

    Of the ten coverages 10%, 20% ... 100% of the calibration images the largest is taken whose
    upper bound on the risk is at most `max_risk`. Bounds are those of Clopper and Pearson (1934) at
    delta / 10, so that they hold together with a confidence of 1 - delta, as in the selection with
    guaranteed risk of Geifman and El-Yaniv 2017, whose binary search needs the bounds to rise with
    the coverage, which small numbers do not give. The images must be independent.

    Args:
        probabilities: `[n, K]` of the calibration images, rows sum to 1.
        labels: Class indices `[n]`.
        max_risk: Largest share of errors among the answers, between 0 and 1.
        delta: How often, over calibration sets, the risk may be larger, between 0 and 1.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    from scipy.special import betaincinv

    for name, value in (("max_risk", max_risk), ("delta", delta)):
        if not 0 < value < 1:
            raise GloVLMError(f"Expected {name} between 0 and 1, found {value}; 0.05 is usual.")
    confidence, wrong = _ordered(probabilities, labels)
    n = len(wrong)
    for step in range(STEPS, 0, -1):
        threshold = confidence[math.ceil(n * step / STEPS) - 1]
        kept = int((confidence >= threshold).sum())
        errors = int(wrong[:kept].sum())
        bound = 1.0 if errors == kept else betaincinv(errors + 1, kept - errors, 1 - delta / STEPS)
        if bound <= max_risk:
            settings = (max_risk, delta, n)
            return Abstention(float(threshold), kept / n, errors / kept, float(bound), *settings)
    return Abstention(None, 0.0, None, None, max_risk, delta, n)


def images_without_error(max_risk: float, delta: float = DELTA) -> int:
    """Fewest calibration images that a threshold takes, if not one answer is wrong."""
    return math.ceil(math.log(delta / STEPS) / math.log1p(-max_risk))


def measure_abstention(
    probabilities: ArrayLike, labels: ArrayLike, threshold: float | None
) -> dict[str, Any]:
    """Risk and coverage of a threshold on test images.

    Args:
        probabilities: `[n, K]`, made in the same way as those of the calibration.
        labels: Class indices `[n]`.
        threshold: From `abstention_threshold`.

    Returns:
        `n`, `answered` (number of images), `coverage` (their share), `risk` (their share of errors;
        None without an answer), `aurc` and the `curve` (`coverage`, `risk`) over all thresholds.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    curve = risk_coverage(probabilities, labels)
    confidence, wrong = _ordered(probabilities, labels)
    answered = int((confidence >= (np.inf if threshold is None else threshold)).sum())
    return {
        "n": len(wrong),
        "answered": answered,
        "coverage": answered / len(wrong),
        "risk": float(wrong[:answered].mean()) if answered else None,
        "aurc": curve.pop("aurc"),
        "curve": curve,
    }


def _ordered(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Bools]:
    """Confidence and error of each image, the most confident first."""
    p = checked_probabilities(probabilities)
    y = checked_labels(labels, p.shape[1], len(p))
    confidence: Floats = p.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    return confidence[order], (p.argmax(axis=1) != y)[order]
