"""Class fractions behind the calls of a classifier that errs: a posterior by Gibbs sampling.

Where few glomeruli are sclerosed, false calls outnumber true ones, so the fraction of calls is
biased. A confusion matrix measured on labelled objects says how. With K classes:

* the true class of each object is drawn from fractions p, p from a Dirichlet distribution;
* an object of class k is called c with probability `rates[k, c]`, and so are the labelled ones;
  each row of the rates is from a Dirichlet distribution too.

Given the calls and the confusion matrix, the draws of `estimate_fractions` are from the joint
posterior of p, the rates and the true classes (Joseph, Gyorkos and Coupal 1995, American Journal
of Epidemiology 141:263, for two classes). A point estimate divided by sensitivity + specificity - 1
(Rogan and Gladen 1978) leaves 0 ... 1 and has to be cut there, where it then looks certain; a
posterior has no such edge. All of it trusts that the classifier errs here as it did there.

What a finder missed is in no call. The objects that it found are a thinned sample: of found
fractions f and recall r by class, the true fractions are f_k / r_k over their sum. The found
objects of class k are taken as Poisson with Jeffreys' prior, so that the missed ones are negative
binomial given the found ones and r_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from ..errors import GloVLMError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PRIOR_COUNT = 0.5  # Jeffreys: what every class and every cell of the matrix is given beforehand
# In each tail of an interval. 0.025 covers below 0.93 where ten objects give eleven percentages.
TAIL = 0.02
# Calls this unlikely in every mixture of the classes contradict the confusion matrix.
CONTRADICTION = 0.005
# A call is informative where it is likelier from its own class than from any other by MARGIN, with
# a posterior probability of LIMIT. For two classes: sensitivity + specificity above 1.2.
MARGIN, LIMIT = 0.2, 0.5

_CHAINS, _BURN, _KEEP = 50, 30, 80
_LEAST_RECALL = 1e-6  # a draw below it, of a recall that was measured on nothing, would overflow
_FLOOR = 1e-15  # of a gamma variate: one in ten million is below, and would divide by zero


@dataclass(frozen=True)
class Fractions:
    """Class fractions behind some calls, each array `[..., K]`, in 0 ... 1.

    Attributes:
        share: Share of these objects (with a recall, of the found and the missed ones) that truly
            is of the class, the posterior median; of more than two classes they need not sum to 1.
        low: Lower bound of the fraction that the objects were drawn from.
        high: Upper bound.
    """

    share: Floats
    low: Floats
    high: Floats


def confusion_counts(labels: ArrayLike, calls: ArrayLike, n_classes: int) -> Ints:
    """Confusion matrix of counts `[K, K]`, rows are labels.

    Args:
        labels: True class numbers `[n]`.
        calls: Called class numbers `[n]`.
        n_classes: K.
    """
    table = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(table, (np.asarray(labels, np.int64), np.asarray(calls, np.int64)), 1)
    return table


def check_confusion(confusion: ArrayLike, n_classes: int) -> Ints:
    """Confusion matrix of counts, checked.

    Args:
        confusion: Counts `[K, K]`, rows are labels.
        n_classes: K.

    Raises:
        GloVLMError: It has another shape, or what it holds is no count.
    """
    table = np.asarray(confusion)
    if table.shape != (n_classes, n_classes) or table.dtype.kind not in "iu" or (table < 0).any():
        raise GloVLMError(
            f"Expected a confusion matrix of counts [{n_classes}, {n_classes}], found "
            f"{table.dtype} of shape {table.shape}."
        )
    return table.astype(np.int64)


def check_recall(recall: tuple[ArrayLike, ArrayLike], n_classes: int) -> tuple[Ints, Ints]:
    """Recall by class as counts, checked: found ones and all, both `[K]`.

    Args:
        recall: How many objects of each class a finder found, and of how many.
        n_classes: K.

    Raises:
        GloVLMError: A shape is wrong, what it holds is no count, or more were found than there are.
    """
    hits, of = (np.asarray(part) for part in recall)
    for part in (hits, of):
        if part.shape != (n_classes,) or part.dtype.kind not in "iu" or (part < 0).any():
            raise GloVLMError(
                f"Expected the recall of {n_classes} classes as counts [{n_classes}], found "
                f"{part.dtype} of shape {part.shape}."
            )
    if (hits > of).any():
        raise GloVLMError(
            f"Expected a recall of at most 1, found {hits.tolist()} found of {of.tolist()}."
        )
    return hits.astype(np.int64), of.astype(np.int64)


def informative_calls(confusion: ArrayLike, *, n_draws: int = 2000, seed: int = 0) -> Floats:
    """Posterior probability `[K]` that each call says something about the class.

    That a call is likelier from its own class than from any other, by `MARGIN`; for two classes,
    that sensitivity + specificity - 1 (Youden's index) is above it. Below `LIMIT` a count of such
    calls says next to nothing about the class, or the opposite.

    Args:
        confusion: Counts `[K, K]`, rows are labels.
        n_draws: Draws of the rates.
        seed: Of the draws.
    """
    rates = _draw_rates(confusion, n_draws, seed)
    own = np.diagonal(rates, axis1=-2, axis2=-1)
    others = np.where(np.eye(rates.shape[-1], dtype=bool), -np.inf, rates).max(axis=-2)
    probability: Floats = (own - others > MARGIN).mean(axis=0)
    return probability


def unexplained_calls(
    counts: ArrayLike, confusion: ArrayLike, *, n_draws: int = 500, seed: int = 0
) -> Floats:
    """Posterior predictive probability `[K]` of a number of calls as extreme, in any mixture.

    Whatever the objects are, a call is no likelier than from the class that is called so most
    often, and no rarer than from the one that is called so least; so the number of such calls lies
    between two binomial ones. Where it is `CONTRADICTION` or less for some call, the classifier
    errs otherwise here than where its confusion matrix was measured.

    Args:
        counts: Calls of each class `[K]`.
        confusion: Counts `[K, K]`, rows are labels.
        n_draws: Draws of the rates.
        seed: Of the draws.
    """
    calls = np.asarray(counts, np.int64)
    rates = _draw_rates(confusion, n_draws, seed)
    as_many = binom.sf(calls - 1, calls.sum(), rates.max(axis=-2)).mean(axis=0)
    as_few = binom.cdf(calls, calls.sum(), rates.min(axis=-2)).mean(axis=0)
    return np.asarray(np.minimum(as_many, as_few), np.float64)


def estimate_fractions(
    counts: ArrayLike,
    confusion: ArrayLike | None,
    *,
    recall: tuple[ArrayLike, ArrayLike] | None = None,
    groups: Sequence[int] | None = None,
    seed: int = 0,
) -> Fractions:
    """Posterior of class fractions, given calls and the confusion matrix of the classifier.

    `share` is of the objects that were counted, as Banff and Oxford report the share of the
    glomeruli in the biopsy: with a classifier without errors it is the counted one. It is the
    median, since next to 0 a mean is drawn up by a tail that is all on one side. The interval is
    wider: like Wilson's it holds the fraction that the objects are a sample of, and so the error of
    counting, and the errors of the classifier and of their measurement. Its bounds leave `TAIL` of
    the draws on either side; the lower is 0 where more of them than that hold no object of the
    class, the upper 1 where they hold no other, since a density has no mass at a bound. It is
    widened to the share where that lies outside.

    With a recall the objects are what a finder found: the share is of those and of the missed ones,
    and the interval holds also that the finder misses some classes more often, and how well that
    was measured. A class whose recall was measured on nothing gets nearly 0 ... 1. An object that
    was found and is none is not held.

    Gibbs sampling over fractions, rates and the true classes of each call (data augmentation).
    Every other step also draws a row of rates anew and moves the fractions so that the expected
    calls stay: with many objects the posterior is a narrow ridge, along which Gibbs steps alone
    would creep. Chains begin at rates from the labelled objects and fractions that solve for the
    calls.

    Args:
        counts: Calls of each class `[..., K]`, of one object or more.
        confusion: Counts `[..., K, K]` with the same leading axes; rows are labels. `None` where
            the calls are the true classes, as a reader's.
        recall: How many objects of each class the finder found where they are known, and of how
            many, each `[..., K]`; `None` where no object can be missing.
        groups: For each class the number of the group whose fraction is asked for, from 0 on; -1
            leaves a class out of the whole, as globally sclerotic glomeruli are out of the
            denominator of other lesions. The results are then `[..., groups]`.
        seed: Of the draws.
    """
    calls = np.asarray(counts, np.int64)
    *batch, k = calls.shape
    rng = np.random.default_rng(seed)
    n = np.broadcast_to(calls.reshape(-1, 1, k), (calls.size // k, _CHAINS, k))
    if confusion is None:
        objects = np.broadcast_to(n, (_KEEP, *n.shape))
        drawn = _dirichlet(rng, objects + PRIOR_COUNT)
    else:
        objects, drawn = _gibbs(rng, n, np.asarray(confusion, np.float64))
    if recall is not None:
        objects, drawn = _with_missed(rng, objects, drawn, *(np.asarray(part) for part in recall))
    if groups is not None:
        k = max(groups) + 1
        member = (np.array(groups)[:, None] == np.arange(k)).astype(np.int64)
        objects, drawn = objects @ member, drawn @ member
        drawn = drawn / drawn.sum(axis=-1, keepdims=True)
    total = objects.sum(axis=-1, keepdims=True)
    share = np.median(objects / np.maximum(total, 1), axis=(0, 2))
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL], axis=(0, 2))
    none, every = ((objects == m).mean(axis=(0, 2)) for m in (0, total))
    low = np.minimum(np.where(none > TAIL, 0, low), share)
    high = np.maximum(np.where(every > TAIL, 1, high), share)
    return Fractions(*(values.reshape(*batch, k) for values in (share, low, high)))


def _gibbs(rng: np.random.Generator, n: Ints, confusion: Floats) -> tuple[Ints, Floats]:
    """Draws of the true classes of calls `[S, chains, K]`, and of the fractions behind them.

    Returns:
        Objects of each class and fractions, both `[draws, S, chains, K]`.
    """
    k = n.shape[-1]
    alpha = np.broadcast_to((confusion + PRIOR_COUNT).reshape(-1, 1, k, k), (*n.shape, k))
    rates = _dirichlet(rng, alpha)
    fractions = _solve(rates, _dirichlet(rng, n + PRIOR_COUNT))
    fractions = np.clip(fractions, PRIOR_COUNT / (n.sum(axis=-1, keepdims=True) + 1), 1)
    fractions /= fractions.sum(axis=-1, keepdims=True)
    drawn, objects = np.empty((_KEEP, *n.shape)), np.empty((_KEEP, *n.shape), np.int64)
    for step in range(_BURN + _KEEP):
        if step % 2 == 0:
            _move_along_ridge(rng, fractions, rates, alpha, row=step // 2 % k)
        true = fractions[..., None, :] * rates.swapaxes(-1, -2)  # [call, class]
        true /= true.sum(axis=-1, keepdims=True)
        cells = rng.multinomial(n, true)
        kept = max(step - _BURN, 0)  # what is burned is overwritten
        objects[kept] = cells.sum(axis=-2)
        fractions = drawn[kept] = _dirichlet(rng, objects[kept] + PRIOR_COUNT)
        rates = _dirichlet(rng, cells.swapaxes(-1, -2) + alpha)
    return objects, drawn


def _with_missed(
    rng: np.random.Generator, objects: Ints, drawn: Floats, hits: Ints, of: Ints
) -> tuple[Ints, Floats]:
    """The same draws with the objects that the finder missed, and of the fractions of all."""
    k = objects.shape[-1]
    hit, lost = ((part + PRIOR_COUNT).reshape(-1, 1, k) for part in (hits, of - hits))
    recall = np.maximum(rng.beta(hit, lost, size=objects.shape), _LEAST_RECALL)
    missed = rng.negative_binomial(objects + PRIOR_COUNT, recall)
    fractions = drawn / recall
    return objects + missed, fractions / fractions.sum(axis=-1, keepdims=True)


def corrected_percentages(
    counts: ArrayLike,
    confusion: ArrayLike | None,
    *,
    recall: tuple[ArrayLike, ArrayLike] | None = None,
    groups: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[list[float], list[list[float]]]:
    """Corrected percentages, with intervals that hold the error of counting and of the classifier.

    As `estimate_fractions`, in per cent. Whether the calls say enough to be corrected at all is for
    `informative_calls`; without labelled objects of a class its row is the prior alone, and the
    interval next to 0 ... 100.

    Args:
        counts: Calls of each class `[K]` on one slide, of one object or more.
        confusion: Counts `[K, K]`, rows are labels; `None` where the calls are the true classes.
        recall: Found ones and all `[K]`, see `estimate_fractions`.
        groups: See there.
        seed: Of the draws.

    Returns:
        Per cent of each class or group, and its bounds.

    Raises:
        GloVLMError: A shape is wrong, a number is no count or nothing is counted.
    """
    calls = np.asarray(counts)
    if calls.ndim != 1 or calls.dtype.kind not in "iu" or (calls < 0).any() or not calls.sum():
        raise GloVLMError(
            "Expected the number of calls of each class [K], not all of them 0; found "
            f"{calls.dtype} of shape {calls.shape}."
        )
    k = len(calls)
    matrix = None if confusion is None else check_confusion(confusion, k)
    thinned = None if recall is None else check_recall(recall, k)
    measured = estimate_fractions(calls, matrix, recall=thinned, groups=groups, seed=seed)
    bounds = np.stack([measured.low, measured.high], axis=1)
    return (100 * measured.share).tolist(), (100 * bounds).tolist()


def _draw_rates(confusion: ArrayLike, n_draws: int, seed: int) -> Floats:
    """Rates `[n_draws, K, K]` from the posterior of the labelled objects alone."""
    table = np.asarray(confusion, np.float64) + PRIOR_COUNT
    return _dirichlet(np.random.default_rng(seed), np.broadcast_to(table, (n_draws, *table.shape)))


def _move_along_ridge(
    rng: np.random.Generator, fractions: Floats, rates: Floats, alpha: Floats, row: int
) -> None:
    """Metropolis step along the ridge: one row of the rates anew, the same expected calls.

    The row is drawn from the posterior of the labelled objects, and the fractions p become those of
    `rates.T @ p` unchanged; so neither the likelihood nor the rows enter the acceptance, only the
    prior of p and the Jacobian, the ratio of the rates' determinants. Changes its arrays in place.
    """
    drawn = _dirichlet(rng, alpha[..., row, :])
    shift = _solve(rates, drawn - rates[..., row, :])
    scale = 1 + shift[..., row]  # det of the rates with the row anew, over that before
    moved = fractions - shift * (fractions[..., row] / scale)[..., None]
    inside = moved.min(axis=-1) > 0
    ratio = np.where(inside[..., None], moved / fractions, 1).prod(axis=-1)
    accepted = inside & (rng.random(inside.shape) * np.abs(scale) < ratio ** (PRIOR_COUNT - 1))
    fractions[accepted] = moved[accepted]
    rates[accepted, row] = drawn[accepted]


def _solve(rates: Floats, calls: Floats) -> Floats:
    """Solve `rates.T @ x = calls`, and equal rows too."""
    kept = rates.swapaxes(-1, -2) + 1e-12 * np.eye(rates.shape[-1])
    return np.asarray(np.linalg.solve(kept, calls[..., None])[..., 0], np.float64)


def _dirichlet(rng: np.random.Generator, alpha: NDArray[np.floating]) -> Floats:
    """Draw from Dirichlet distributions, over the last axis."""
    drawn = np.maximum(rng.standard_gamma(alpha), _FLOOR)
    drawn /= drawn.sum(axis=-1, keepdims=True)
    return drawn
