"""Stains of images beside a model's: centres fitted on unlabelled images, and what is unseen."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import GloVLMError
from ..model.stains import StainCentres
from ..tables import spelling

# Of a stain with fewer, one image is more than an eighth of the centre that is taken from it.
MIN_IMAGES = 8


def fit_centres(
    features: NDArray[np.float32], stains: Sequence[str | None]
) -> tuple[StainCentres, list[str]]:
    """Fit a centre for each stain on unlabelled images.

    Args:
        features: `[n, dim]`, not normalised.
        stains: Canonical stain of each image, `None` where unknown.

    Returns:
        The centres, and sentences for the results.

    Raises:
        GloVLMError: No stain has 8 images.
    """
    counts = Counter(stain for stain in stains if stain is not None)
    kept = check_stains(stains)
    centres = StainCentres(features.shape[1], kept, [counts[stain] for stain in kept])
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    own = np.array([stain or "" for stain in stains])
    means = np.stack([unit[own == stain].mean(0) for stain in kept])
    centres.centres.copy_(torch.from_numpy(means))
    notes = [
        "Features were centred within each stain by the mean of its images, labelled or not, of "
        f"training, test and all others ({_counted(counts, kept)}): these results are transductive "
        "over the images that are there."
    ]
    few = [stain for stain in sorted(counts) if stain not in kept]
    if few:
        notes.append(
            f"Too few for a centre of their own, for which {MIN_IMAGES} are needed: "
            f"{_counted(counts, few)}. The mean of the other centres stands in."
        )
    if unknown := sum(stain is None for stain in stains):
        notes.append(
            f"{unknown} of {len(stains)} images have no stain: the mean of the centres stands in."
        )
    return centres, notes


def check_stains(stains: Sequence[str | None], hints: Sequence[str] = ()) -> list[str]:
    """Check that a stain has images enough for a centre.

    Args:
        stains: Canonical stain of each image, `None` where unknown.
        hints: Sentences behind the error.

    Returns:
        The stains that have, sorted.

    Raises:
        GloVLMError: None has 8 images.
    """
    counts = Counter(stain for stain in stains if stain is not None)
    kept = sorted(stain for stain, n in counts.items() if n >= MIN_IMAGES)
    if not kept:
        actual = _counted(counts) if counts else f"no stain of any of {len(stains)} images"
        raise GloVLMError(
            " ".join(
                [
                    f"centre 'stain' needs at least {MIN_IMAGES} images of a stain, labelled or "
                    f"not, and found {actual}: fill in a column stain, give --stain, add images, "
                    "or leave --centre out.",
                    *hints,
                ]
            )
        )
    return kept


def find_centres(centres: StainCentres, stains: Sequence[str | None]) -> Tensor:
    """Places of stains among the centres `[n]`; -1 where one has none."""
    place = {spelling(stain): i for i, stain in enumerate(centres.stains)}
    ids = [-1 if stain is None else place.get(spelling(stain), -1) for stain in stains]
    return torch.tensor(ids, dtype=torch.long)


def compare_stains(model: Any, stains: Sequence[str | None]) -> list[str]:
    """Sentences where images are of stains that a model has not seen, or has no centre of.

    Args:
        model: The classifier.
        stains: Canonical stain of each image, `None` where unknown.
    """
    return [*unseen_stains(model.config, stains), *_uncentred(model, stains)]


def unseen_stains(config: Any, stains: Sequence[str | None]) -> list[str]:
    """A sentence where images are of stains that a model did not learn from.

    Args:
        config: Of the classifier; its `stains` are those that it learned from.
        stains: Canonical stain of each image, `None` where unknown.
    """
    trained: list[str] = config.stains or []
    known = {*map(spelling, trained)}
    unseen = Counter(s for s in stains if s is not None and spelling(s) not in known)
    if not trained or not unseen:
        return []
    return [
        f"{sum(unseen.values())} of {len(stains)} images are of a stain that the model did not "
        f"learn from: {_counted(unseen)}. It learned from {' and '.join(trained)}."
    ]


def _uncentred(model: Any, stains: Sequence[str | None]) -> list[str]:
    """A sentence where images have no centre of their stain in a model that centres."""
    centres: StainCentres | None = getattr(model, "centres", None)
    without = 0 if centres is None else int((find_centres(centres, stains) < 0).sum())
    if centres is None or not without:
        return []
    unstated = sum(stain is None for stain in stains)
    return [
        f"{without} of {len(stains)} images have no centre of their own stain, which is stated for "
        f"{len(stains) - unstated} of all (centres: {', '.join(centres.stains)}): the mean of "
        "the centres stands in. A column stain states it, or --stain."
    ]


def _counted(counts: Counter[str], names: Sequence[str] | None = None) -> str:
    """`silver 66, trichrome 71`."""
    return ", ".join(f"{name} {counts[name]}" for name in (names or sorted(counts)))
