"""Split-conformal prediction sets: as many classes as a promised coverage takes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import GloVLMError, nearest
from ..intervals import count_effective_groups, fraction_interval, mean_interval
from .inputs import Bools, Floats, checked_labels, checked_probabilities

CONFORMAL = ("lac", "aps", "raps")
PENALTY, FREE_RANKS = 0.1, 1  # of RAPS
CLUSTERED = (
    "The promise holds for images that are exchangeable one by one. Images of one patient or slide "
    "resemble each other, so what new patients get varies more than the range, which counts images."
)


@dataclass(frozen=True)
class ConformalThresholds:
    """Conformal thresholds: from probabilities to sets; kept as JSON in the model's config.

    Attributes:
        method: `lac`, `aps` or `raps`.
        alpha: Share of images whose class may be missed: sets cover at least 1 - alpha.
        per_class: Whether every class has its own threshold, and its own coverage.
        thresholds: Largest score that is still in the set: one, or one a class `[K]`.
        n: Calibration images behind each threshold.
        coverage_range: Per threshold the 5% and 95% points of the coverage that it really has. Over
            calibration sets that is Beta(n + 1 - l, l) distributed, l = floor((n + 1) alpha) (Vovk
            2012, arXiv 1209.2673); tied scores only raise it.
        penalty: Of `raps`, for each rank after the free ones.
        free_ranks: Of `raps`, how many ranks go without a penalty.
        note: What the promise presupposes.
    """

    method: str
    alpha: float
    per_class: bool
    thresholds: tuple[float, ...]
    n: tuple[int, ...]
    coverage_range: tuple[tuple[float, float], ...]
    penalty: float = 0.0
    free_ranks: int = 0
    note: str = CLUSTERED

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ConformalThresholds":
        """Read what `to_dict` wrote.

        Raises:
            GloVLMError: A value is missing, unknown or of the wrong kind.
        """
        try:
            given = dict(values)
            for name in ("thresholds", "n"):
                given[name] = tuple(given[name])
            given["coverage_range"] = tuple((low, high) for low, high in given["coverage_range"])
            made = cls(**given)
            if made.method not in CONFORMAL or not all(math.isfinite(t) for t in made.thresholds):
                raise ValueError(f"method {made.method}, thresholds {made.thresholds}")
        except (TypeError, KeyError, ValueError) as error:
            raise GloVLMError(
                f"These are no conformal thresholds ({type(error).__name__}: {error}); expected "
                f"{', '.join(f.name for f in fields(cls))}: fit them anew."
            ) from None
        return made


def check_items(
    labels: ArrayLike, class_names: Sequence[str], *, method: str, alpha: float, per_class: bool
) -> None:
    """Refuse sets for which there are too few calibration images, before anything is trained.

    With n < 1 / alpha - 1 images the threshold would be infinite: every class in every set.

    Args:
        labels: Class indices of the calibration images `[n]`.
        class_names: `[K]`.
        method: A name in `CONFORMAL`.
        alpha: Between 0 and 1.
        per_class: Whether every class must have that many.

    Raises:
        GloVLMError: Names each class with too few, and what to do.
    """
    if method not in CONFORMAL:
        raise GloVLMError(
            f"Expected a conformal method ({', '.join(CONFORMAL)}), found '{method}'."
            f"{nearest(method, CONFORMAL)}"
        )
    if not 0 < alpha < 1:
        raise GloVLMError(f"Expected alpha between 0 and 1, found {alpha}; 0.1 covers 90%.")
    y = checked_labels(labels, len(class_names))
    needed = math.ceil(1 / _exact(alpha)) - 1
    if per_class:
        counts = np.bincount(y, minlength=len(class_names)).tolist()
        few = [f"{n} of {c}" for n, c in zip(counts, class_names, strict=True) if n < needed]
    else:
        few = [str(len(y))] if len(y) < needed else []
    if few:
        raise GloVLMError(
            f"Conformal sets that cover {100 * (1 - alpha):g}% need at least {needed} calibration "
            f"images{' of every class' if per_class else ''} (1/alpha - 1), found "
            f"{', '.join(few)}: set more groups aside for calibration, raise alpha"
            f"{', or take sets that are not per class' if per_class else ''}."
        )


def fit_conformal(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    method: str = "lac",
    alpha: float = 0.1,
    per_class: bool = False,
    class_names: Sequence[str] | None = None,
    penalty: float = PENALTY,
    free_ranks: int = FREE_RANKS,
) -> ConformalThresholds:
    """Fit the thresholds of split-conformal sets on calibration images.

    A threshold is the ceil((n + 1)(1 - alpha))-th smallest score of the calibration images for
    their own class (Vovk, Gammerman and Shafer 2005). The scores of a class y:

    - `lac`: 1 - p_y (Sadinle, Lei and Wasserman 2019, arXiv 1609.00451): the smallest sets on
      average; a set can be empty.
    - `aps`: the total probability of the classes more probable than y (Romano, Sesia and Candes
      2020, arXiv 2006.02544), without their randomisation: the same image always gets the same
      set, and the top class is always in it.
    - `raps`: that, plus `penalty` for each rank of y after `free_ranks` (Angelopoulos et al. 2021,
      arXiv 2009.14193). With a thousand classes 0.01 and 5 are usual; with a handful of classes
      these would never act, so here it is 0.1 from the second rank on.

    Args:
        probabilities: `[n, K]` of the calibration images, rows sum to 1.
        labels: Class indices `[n]`.
        method: A name in `CONFORMAL`.
        alpha: Share of images whose class may be missed, between 0 and 1.
        per_class: One threshold a class (Mondrian): then coverage holds within each class, at any
            prevalence; otherwise over all images, at the prevalence of the calibration images.
        class_names: For messages.
        penalty: Of `raps`, 0 or more.
        free_ranks: Of `raps`, 0 or more.

    Raises:
        GloVLMError: A shape or range is wrong, or n < 1 / alpha - 1 (of a class if `per_class`).
    """
    from scipy.special import betaincinv

    p = checked_probabilities(probabilities)
    n_classes = p.shape[1]
    y = checked_labels(labels, n_classes, len(p))
    names = [str(k) for k in range(n_classes)] if class_names is None else class_names
    check_items(y, names, method=method, alpha=alpha, per_class=per_class)
    if penalty < 0 or free_ranks < 0:
        raise GloVLMError(f"Expected a penalty and free ranks >= 0, found {penalty}, {free_ranks}.")
    settings = (float(penalty), int(free_ranks)) if method == "raps" else (0.0, 0)
    own = _scores(p, method, *settings)[np.arange(len(y)), y]
    thresholds, sizes, ranges = [], [], []
    for scores in [own[y == k] for k in range(n_classes)] if per_class else [own]:
        n = len(scores)
        missed = math.floor((n + 1) * _exact(alpha))  # l; n + 1 - l = ceil((n + 1)(1 - alpha))
        thresholds.append(float(np.sort(scores)[n - missed]))
        sizes.append(n)
        low, high = (float(betaincinv(n + 1 - missed, missed, q)) for q in (0.05, 0.95))
        ranges.append((low, high))
    return ConformalThresholds(
        method, float(alpha), per_class, tuple(thresholds), tuple(sizes), tuple(ranges), *settings
    )


def conformal_sets(probabilities: ArrayLike, thresholds: ConformalThresholds) -> Bools:
    """Prediction sets: which classes the set of each image holds.

    Args:
        probabilities: `[n, K]`, made in the same way as those of the calibration.
        thresholds: From `fit_conformal`.

    Returns:
        `[n, K]`: whether the class's score is at most its threshold.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    p = checked_probabilities(probabilities)
    limits = np.array(thresholds.thresholds)
    if thresholds.per_class and len(limits) != p.shape[1]:
        raise GloVLMError(
            f"Expected probabilities of {len(limits)} classes, one per threshold, found "
            f"{p.shape[1]}: fit the thresholds on the same classes."
        )
    scores = _scores(p, thresholds.method, thresholds.penalty, thresholds.free_ranks)
    inside: Bools = scores <= limits
    return inside


def _scores(p: Floats, method: str, penalty: float, free_ranks: int) -> Floats:
    """Nonconformity score of each class, `[n, K]`; equally probable classes score the same."""
    if method == "lac":
        return 1 - p
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    mass = np.zeros_like(p)  # of the classes sorted before
    np.cumsum(ranked[:, :-1], axis=1, out=mass[:, 1:])
    falls = np.diff(ranked, axis=1, prepend=np.inf) < 0
    above = np.maximum.accumulate(np.where(falls, np.arange(p.shape[1]), 0), axis=1)
    scores = np.empty_like(p)
    penalties = penalty * np.maximum(above + 1 - free_ranks, 0)
    np.put_along_axis(scores, order, np.take_along_axis(mass, above, axis=1) + penalties, axis=1)
    return scores


def _exact(alpha: float) -> Fraction:
    """Alpha as written: 0.1 is one tenth, so that no rank is off by a rounding error."""
    return Fraction(str(float(alpha)))


def describe_sets(sets: ArrayLike, class_names: Sequence[str]) -> list[str]:
    """Prediction sets in words: `"ischemic or sclerotic"`, `"none"`.

    Args:
        sets: `[n, K]` from `conformal_sets`.
        class_names: `[K]`.

    Raises:
        GloVLMError: The shapes differ.
    """
    rows = _checked_sets(sets, len(class_names))
    named = ((name for name, held in zip(class_names, row, strict=True) if held) for row in rows)
    return [" or ".join(names) or "none" for names in named]


def measure_sets(
    sets: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Coverage and size of prediction sets on test images.

    Args:
        sets: `[n, K]` from `conformal_sets`.
        labels: Class indices `[n]`.
        class_names: `[K]`.
        groups: Patient, case or slide of each image `[n]`; adds 95% intervals over
            groups (`intervals`).
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        `n`, `coverage`, `mean_size`, `single` and `empty` (shares of sets with one class and with
        none), `sizes` (how many sets have 0 ... K classes), `per_class` (class -> `n`, `coverage`,
        `mean_size`, None without an image), `worst_class_coverage`; with groups `n_groups`,
        `coverage_ci95` and `mean_size_ci95`.

    Raises:
        GloVLMError: A shape or range is wrong.
    """
    inside = _checked_sets(sets, len(class_names))
    y = checked_labels(labels, len(class_names), len(inside))
    covered, size = inside[np.arange(len(y)), y], inside.sum(axis=1)

    def means(here: Bools) -> dict[str, Any]:
        n = int(here.sum())
        coverage, mean_size = (float(v[here].mean()) if n else None for v in (covered, size))
        return {"n": n, "coverage": coverage, "mean_size": mean_size}

    per_class = {name: means(y == k) for k, name in enumerate(class_names)}
    result = means(np.ones(len(y), dtype=bool)) | {
        "single": float((size == 1).mean()),
        "empty": float((size == 0).mean()),
        "sizes": np.bincount(size, minlength=len(class_names) + 1).tolist(),
        "per_class": per_class,
        "worst_class_coverage": min(c["coverage"] for c in per_class.values() if c["n"]),
    }
    if groups is None:
        return result
    if len(groups) != len(y):
        raise GloVLMError(f"Expected one group per image, found {len(groups)} and {len(y)} images.")
    ids, group = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    held = np.stack([np.bincount(group, weights=v) for v in (np.ones(len(y)), covered, size)])
    share = np.full(len(ids), 1 / len(ids))
    times = np.random.default_rng(seed).multinomial(len(ids), share, size=n_resamples)
    n, covers, classes = held @ times.T
    effective = count_effective_groups(held[0] / len(y))
    for name, value, values, of in (
        ("coverage", result["coverage"], covers / n, fraction_interval),
        ("mean_size", result["mean_size"], classes / n, mean_interval),
    ):
        most = 1 if name == "coverage" else len(class_names)
        result[f"{name}_ci95"] = list(of(value, values, effective, (0, most)))
    return result | {"n_groups": len(ids)}


def _checked_sets(sets: ArrayLike, n_classes: int) -> Bools:
    inside = np.asarray(sets)
    fits = inside.ndim == 2 and inside.shape[1] == n_classes and len(inside)
    if inside.dtype != np.bool_ or not fits:
        raise GloVLMError(
            f"Expected sets as truth values [n, {n_classes}] with n >= 1, found {inside.dtype} of "
            f"shape {inside.shape}: make them with conformal_sets."
        )
    return inside
