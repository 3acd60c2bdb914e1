"""Protocols of few-shot episodes: the published one of Glo-VLMs beside the strict one of `splits`.

Written from what the article states and its authors' code does (Guo et al., arXiv 2511.11984): one
split for all runs; of every class ten disjoint slices of the training images, one for each run,
each filled up to a pool of 32; supports of up to 4 shots from the slice alone, larger ones drawn
anew from the pool; and the choice of the epoch on all images of the validation groups. Here these
labels count in the label budget, and no patient, case or slide stands on two sides.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GloVLMError
from .folder import SPLIT_ORDER, column, logger
from .groups import Groups, group_rows
from .splits import (
    SPLIT,
    Episode,
    Indices,
    Sampler,
    assert_disjoint,
    assert_unlearned,
    random_stream,
    shots_per_class,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "DISJOINT",
    "GLO_VLMS",
    "POOL",
    "RUNS",
    "check_glo_vlms",
    "draw_glo_vlms",
    "protocol_notes",
]

GLO_VLMS = "glo_vlms"
RUNS = 10  # of the protocol; each is a draw
POOL = 32  # images of a class that a run draws from
DISJOINT = 4  # shots up to which runs share no image
_SLICES, _POOLS, _SUBSETS = range(5, 8)  # streams of random numbers, behind those of `splits`


def draw_glo_vlms(
    rows: "Dataset",
    *,
    shots: int | Mapping[str, int],
    seed: int,
    draw: int = 0,
    allow_fewer: bool = False,
    test_fraction: float = 0.5,
    groups: Groups | None = None,
    pooled: Collection[str] = (),
) -> Episode:
    """Few-shot episode by the protocol of Glo-VLMs: one of its ten runs.

    The split depends on the seed alone; it is that of the strict protocol's draw 0 with validation
    groups, or the given one (column `split`). Up to 4 shots the supports of the runs are disjoint,
    as far as a class has images, and those of k shots are a part of those of more; from 5 on they
    are neither.

    Args:
        rows: `all_rows(ds)`.
        shots: Labelled images per class, at most 32, or `{class: number}` with every class.
        seed: Seed, 0 or more.
        draw: Number of the run, 0 to 9.
        allow_fewer: Take what there is of a class that has fewer than 32 training images.
        test_fraction: Share of the groups that is tested, where no split is given.
        groups: `group_rows(rows)`, if at hand.
        pooled: Groups that the backbone learned from before; see `draw_episode`.

    Returns:
        An episode whose validation holds all images of the validation groups.

    Raises:
        GloVLMError: Too few images, groups or classes, more than ten runs or 32 shots, or a group
            on two sides of a given split.
    """
    names: list[str] = rows.features["label"].names
    labels = np.asarray(column(rows, "label"), dtype=np.int64)
    groups = groups or group_rows(rows)
    present = set(np.unique(labels).tolist())
    requested = shots_per_class(shots, names, present)
    most = max(requested.values())
    check_glo_vlms(most, draw)
    sampler = Sampler(
        labels, np.asarray(groups.ids, dtype=object), names, seed, 0, allow_fewer, pooled
    )
    if "split" in rows.column_names:
        given = np.asarray(column(rows, "split"))
        pool, reserve, test = (np.flatnonzero(given == side) for side in SPLIT_ORDER)
        assert_disjoint(groups.ids, train=pool, validation=reserve, test=test)
    else:
        pool, test = sampler.split(np.arange(len(labels)), SPLIT, test_fraction)
        reserve = np.empty(0, dtype=np.int64)
    pool, reserve = sampler.for_validation(pool, reserve, 1)
    support: list[int] = []
    for k, name in enumerate(names):
        if requested[name]:
            here = pool[labels[pool] == k]
            _check_pool(name, len(here), requested[name], allow_fewer)
            support += _draw_class(here, requested[name], seed, draw, k)
    sides = {
        "support": tuple(support),
        "validation": tuple(np.sort(reserve).tolist()),
        "test": tuple(test.tolist()),
    }
    assert_disjoint(groups.ids, **sides)
    assert_unlearned(groups.ids, pooled, **sides)
    return Episode(f"{GLO_VLMS}-{most}", draw, most, seed, GLO_VLMS, groups.column, **sides)


def check_glo_vlms(shots: int, draw: int) -> None:
    """Check that the protocol has such a run.

    Raises:
        GloVLMError: It has ten runs, and pools of 32 images a class.
    """
    if shots > POOL:
        raise GloVLMError(
            f"protocol {GLO_VLMS} draws from pools of {POOL} images a class; found shots {shots}: "
            "give fewer, or use protocol strict."
        )
    if draw >= RUNS:
        raise GloVLMError(
            f"protocol {GLO_VLMS} has {RUNS} runs, draws 0 to {RUNS - 1}; found draw {draw}: use "
            "another seed, or protocol strict."
        )


def _check_pool(name: str, images: int, shots: int, allow_fewer: bool) -> None:
    """Refuse a class with fewer images than a pool, as the authors' splitter does."""
    if images >= POOL:
        return
    short = f"class {name}: the training groups hold {images} images"
    if not allow_fewer:
        raise GloVLMError(
            f"{short}, and protocol {GLO_VLMS} asks for {POOL} of each class: add images, allow "
            "fewer (--allow-fewer), or use protocol strict."
        )
    if images < shots:
        logger.warning("%s, %d were asked for: all of them are taken.", short, shots)


def _draw_class(here: Indices, shots: int, seed: int, draw: int, k: int) -> list[int]:
    """Support of class k: from the run's own slice, or anew from its pool.

    Args:
        here: Training images of the class.
        shots: How many.
        seed: Draws the slices.
        draw: Number of the run.
        k: Number of the class.
    """
    order = random_stream((seed, _SLICES, k)).permutation(here)
    own = order[draw::RUNS][:POOL]  # dealt out in turn
    others = np.setdiff1d(order, own)
    further = random_stream((seed, draw, _POOLS, k)).permutation(others)[: POOL - len(own)]
    pool = np.concatenate([own, further])
    if shots > DISJOINT:
        pool = random_stream((seed, draw, _SUBSETS, k, shots)).permutation(pool)
    return [int(row) for row in pool[:shots]]


def protocol_notes(episode: Episode) -> list[str]:
    """Sentences on a protocol that is not the strict one, for beside the numbers.

    Args:
        episode: Any.
    """
    if episode.sampler != GLO_VLMS:
        return []
    chosen, all_labels = len(episode.validation), len(episode.validation) + len(episode.support)
    return [
        f"Protocol {GLO_VLMS}, as published (arXiv 2511.11984): {chosen} validation labels, all of "
        "their groups, choose what is kept. They count in the label budget of "
        f"{all_labels}, which the publication does not count.",
        f"All {RUNS} runs of this protocol share one split, so their spread is over supports "
        f"alone; above {DISJOINT} shots these overlap and are not nested. Unlike in the published "
        "system, no group stands on two sides.",
    ]
