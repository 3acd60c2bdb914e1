"""Stains of images beside a model's: centres fitted on unlabelled images, and what is unseen."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.stains import list_stains
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
    kept = sorted(stain for stain, n in counts.items() if n >= MIN_IMAGES)
    if not kept:
        found = _counted(counts) if counts else f"no stain of any of {len(stains)} images"
        raise GloVLMError(
            f"centre 'stain' needs at least {MIN_IMAGES} images of a stain, labelled or not, and "
            f"found {found}: fill in a column stain, give --stain, add images, or leave --centre "
            "out."
        )
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


def find_centres(centres: StainCentres, stains: Sequence[str | None]) -> Tensor:
    """Places of stains among the centres `[n]`; -1 where one has none."""
    place = {spelling(stain): i for i, stain in enumerate(centres.stains)}
    ids = [-1 if stain is None else place.get(spelling(stain), -1) for stain in stains]
    return torch.tensor(ids, dtype=torch.long)


def compare_stains(model: Any, stains: Sequence[str | None]) -> list[str]:
    """Sentences where images are of stains that a model has not seen, or has no centre of.

    Args:
        model: The classifier; its config's `stains` are those that it learned from.
        stains: Canonical stain of each image, `None` where unknown.
    """
    trained: list[str] | None = getattr(model.config, "stains", None)
    centres: StainCentres | None = getattr(model, "centres", None)
    notes = []
    if trained:
        known = {*map(spelling, trained)}
        unseen = Counter(s for s in stains if s is not None and spelling(s) not in known)
        if unseen:
            notes.append(
                f"{sum(unseen.values())} of {len(stains)} images are of a stain that the model did "
                f"not learn from ({_counted(unseen)}; it learned from {' and '.join(trained)})."
            )
    if centres is not None:
        without = int((find_centres(centres, stains) < 0).sum())
        if without:
            told = list_stains(stains)
            notes.append(
                f"{without} of {len(stains)} images have no centre of their stain "
                f"({'stated: ' + ', '.join(told) if told else 'no stain is stated'}; centres: "
                f"{', '.join(centres.stains)}): the mean of the centres stands in. A column stain "
                "states it, or --stain."
            )
    return notes


def _counted(counts: Counter[str], names: Sequence[str] | None = None) -> str:
    """`silver 66, trichrome 71`."""
    return ", ".join(f"{name} {counts[name]}" for name in (names or sorted(counts)))
