"""Temperature scaling and prior correction: from the logits of a head to probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import GloVLMError, nearest
from .inputs import (
    Floats,
    checked_labels,
    checked_logits,
    checked_prior,
    checked_probabilities,
    softmax,
)

TEMPERATURES = (0.01, 100.0)  # the range that is searched
PRIOR_FLOOR = 1e-6  # of a class without any image in EM, so that its logit stays finite


def fit_temperature(logits: ArrayLike, labels: ArrayLike, *, balanced: bool = False) -> float:
    """Temperature scaling: minimise the negative log-likelihood of held-out labels.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2. The likelihood is concave in 1 / temperature,
    so the root of its derivative is exact. Where every image is right it has no maximum at all;
    then each counts as right with probability (n + 1) / (n + 2), the rule of succession that Platt
    scaling uses too.

    Args:
        logits: `[n, K]`, finite, before any temperature.
        labels: Class indices `[n]`.
        balanced: Give every class that is present the same total weight: for logits whose prior is
            corrected afterwards.

    Returns:
        The temperature, in 0.01 ... 100; probabilities are `softmax(logits / temperature)`.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    return find_temperature(logits, labels, balanced=balanced)[0]


def find_temperature(logits: ArrayLike, labels: ArrayLike, *, balanced: bool) -> tuple[float, str]:
    """`fit_temperature`, with a note where the labels did not determine it."""
    from scipy.optimize import brentq

    z = checked_logits(logits)
    n, n_classes = z.shape
    y = checked_labels(labels, n_classes, n)
    z = z - z.max(axis=1, keepdims=True)
    weight = 1 / np.bincount(y)[y] if balanced else np.ones(n)
    weight /= weight.sum()
    target = own = z[np.arange(n), y]
    note = ""
    if not z.any():
        return 1.0, "The temperature stays 1: the logits are the same for every class."
    if not own.any():  # every label has the largest logit
        wrong = 1 / (n + 2)
        target = (1 - wrong) * own + wrong * (z.sum(axis=1) - own) / (n_classes - 1)
        note = (
            f"All {n} calibration images are right, so no temperature is the most likely: it was "
            f"found as if each were right with probability {n + 1}/{n + 2}."
        )

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood by 1 / temperature; it never falls."""
        return float(weight @ ((softmax(z * inverse) * z).sum(axis=1) - target))

    coldest, hottest = TEMPERATURES
    low, high = 1 / hottest, 1 / coldest
    if slope(low) >= 0:
        return hottest, f"The temperature is at the upper bound, {hottest:g}: the logits mislead."
    if slope(high) <= 0:
        return coldest, f"The temperature is at the lower bound, {coldest:g}."
    return 1 / float(brentq(slope, low, high, xtol=1e-12, rtol=1e-12)), note


def declared_prior(prevalence: Mapping[str, float], class_names: Sequence[str]) -> Floats:
    """Prior of a prevalence that a user declares, checked.

    Args:
        prevalence: Class -> fraction above 0, every class, sum 1 within 1e-3.
        class_names: `[K]`.

    Returns:
        The fractions `[K]` in the order of the classes, divided by their sum.

    Raises:
        GloVLMError: A class is unknown (names the nearest) or missing, or a fraction is wrong.
    """
    for name, value in prevalence.items():
        if name not in class_names:
            raise GloVLMError(
                f"The prevalence names the unknown class '{name}'; the classes are "
                f"{', '.join(class_names)}.{nearest(str(name), class_names)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise GloVLMError(
                f"Expected prevalences above 0 and at most 1, found {value!r} for {name}; give a "
                "rare class a small fraction."
            )
    missing = [name for name in class_names if name not in prevalence]
    if missing:
        raise GloVLMError(
            f"The prevalence has no fraction for {', '.join(missing)}; give one for every class."
        )
    total = sum(prevalence.values())
    if abs(total - 1) > 1e-3:
        raise GloVLMError(
            f"Expected prevalences that sum to 1, found {total:.6g}; give fractions of all images."
        )
    return np.array([prevalence[name] / total for name in class_names])


def prior_shift(new_prior: ArrayLike, old_prior: ArrayLike | None = None) -> Floats:
    """Prior shift: what is added to calibrated logits so that they fit another prevalence.

    Args:
        new_prior: Class fractions `[K]` above 0 where the model is used.
        old_prior: Those of the labels it learned from; uniform by default, as k shots of each
            class imply.

    Returns:
        `log new - log old`, `[K]`.

    Raises:
        GloVLMError: A prior is not a distribution above 0, or they differ in length.
    """
    n_classes = np.size(new_prior)
    new, old = checked_prior(new_prior, n_classes), checked_prior(old_prior, n_classes)
    shift: Floats = np.log(new) - np.log(old)
    return shift


def correct_prior(
    probabilities: ArrayLike, new_prior: ArrayLike, old_prior: ArrayLike | None = None
) -> Floats:
    """Prior correction: probabilities under another prevalence, by Bayes' rule.

    Saerens, Latinne and Decaestecker 2002 (Neural Computation 14:21), equation 2.4.

    Args:
        probabilities: `[n, K]`, rows sum to 1.
        new_prior: As for `prior_shift`.
        old_prior: As for `prior_shift`.

    Returns:
        `[n, K]`: p new / old, rows normalised to 1.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    p = checked_probabilities(probabilities)
    new, old = (checked_prior(prior, p.shape[1]) for prior in (new_prior, old_prior))
    return _normalised(p * (new / old))


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """Prior estimated by EM over unlabelled queries; a method that uses it is transductive.

    Attributes:
        prior: Class fractions `[K]`, above 0, sum 1.
        iterations: EM steps made.
        converged: Whether the last step moved no fraction by more than the tolerance.
    """

    prior: Floats
    iterations: int
    converged: bool


def estimate_prior(
    probabilities: ArrayLike,
    old_prior: ArrayLike | None = None,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 10_000,
) -> PriorEstimate:
    """Prior of unlabelled queries by expectation maximisation.

    Saerens, Latinne and Decaestecker 2002, equation 2.9: correct the probabilities to the present
    estimate, average them, repeat. The likelihood is concave in the prior, so the limit is its
    maximum. It presupposes calibrated probabilities: set the temperature first.

    Args:
        probabilities: `[n, K]` of the queries under `old_prior`, rows sum to 1.
        old_prior: As for `prior_shift`.
        tolerance: Largest change of a fraction in the last step.
        max_iterations: Where EM stops at the latest.

    Returns:
        The estimate; a class without any image keeps 1e-6.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    p = checked_probabilities(probabilities)
    prior = old = checked_prior(old_prior, p.shape[1])
    iterations, converged = 0, False
    while iterations < max_iterations and not converged:
        former = prior
        prior = np.maximum(_normalised(p * (former / old)).mean(axis=0), PRIOR_FLOOR)
        prior /= prior.sum()
        converged = bool(np.abs(prior - former).max() <= tolerance)
        iterations += 1
    return PriorEstimate(prior, iterations, converged)


def _normalised(table: Floats) -> Floats:
    rows: Floats = table / table.sum(axis=1, keepdims=True)
    return rows
