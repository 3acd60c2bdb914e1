"""Patient-grouped splits and few-shot episodes.

Images of one patient (or case, slide, near-duplicate cluster) are never on two sides. Every draw is
a pure function of `(seed, draw)` and the rows, and the support of k shots is contained in that of
any larger k.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import GloVLMError, nearest
from ..files import read_text, write_text
from .folder import SPLIT_ORDER, column, logger
from .groups import Groups, group_rows
from .looks import Looks

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ShotsFrom = Literal["spread", "random", "one_group"]
Indices = NDArray[np.int64]

EPISODES = "a file of frozen episodes"
# Streams of random numbers, so that no draw depends on how many numbers another one used. Further
# ones are in `protocols`.
SPLIT, _SUPPORT, _RESERVE, _VALIDATION, _CALIBRATION = range(5)
_TRIES = 256


# ------------------------------------------------------------------------------------ rows


def all_rows(ds: "DatasetDict") -> "Dataset":
    """All rows as one data set; a given split becomes the column `split`.

    The row indices of episodes refer to this.
    """
    from datasets import concatenate_datasets

    if "all" in ds:
        return ds["all"]
    parts = [
        ds[name].add_column("split", [name] * len(ds[name])) for name in SPLIT_ORDER if name in ds
    ]
    return concatenate_datasets(parts)


def assert_disjoint(groups: Sequence[str], **sides: Sequence[int] | Indices) -> None:
    """Assert that no group is on two sides.

    Args:
        groups: Group id of every row.
        sides: Row indices of each side, by the side's name.

    Raises:
        GloVLMError: Names up to three groups and the two sides.
    """
    held = {name: {groups[int(row)] for row in rows} for name, rows in sides.items()}
    names = list(held)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = sorted(held[one] & held[other])
            if shared:
                raise GloVLMError(
                    f"{_few(len(shared), 'group')} ({', '.join(shared[:3])}) on both the {one} and "
                    f"the {other} side; a patient or slide may stand on one side only: correct the "
                    "split."
                )


def assert_unlearned(
    groups: Sequence[str], learned: Collection[str], **sides: Sequence[int] | Indices
) -> None:
    """Assert that nothing is chosen, calibrated or measured on groups learned from before.

    Args:
        groups: Group id of every row.
        learned: Groups that the backbone learned from.
        sides: Row indices of each side, by the side's name; that of the support may hold them.

    Raises:
        GloVLMError: Names the side, and how many of its groups were learned from.
    """
    for name, rows in sides.items():
        held = {groups[int(row)] for row in rows}
        if name != "support" and (seen := len(held & set(learned))):
            raise GloVLMError(
                f"The backbone learned from {seen} of the {len(held)} groups on the {name} side "
                "when it was adapted before, so the numbers would flatter it: move them to the "
                "support side of the split, leave them out, or start from the base backbone."
            )


def _few(n: int, noun: str) -> str:
    return f"{n} {noun} stands" if n == 1 else f"{n} {noun}s stand"


# ---------------------------------------------------------------------------------- splits


def split_groups(
    labels: Sequence[int] | Indices,
    groups: Sequence[str],
    *,
    seed: int | Sequence[int],
    test_fraction: float = 0.5,
    class_names: Sequence[str] | None = None,
    allow_fewer: bool = False,
    pooled: Collection[str] = (),
) -> tuple[Indices, Indices]:
    """Group split into support pool and test.

    Among seeded random halves of the groups the first is taken that puts at least half of its fair
    share of every class on both sides; where none of 256 does, the first that puts every class on
    both sides; where chance finds none, a search builds one.

    Args:
        labels: Class of every row [n].
        groups: Group id of every row [n].
        seed: Non-negative number(s) that draw the split.
        test_fraction: Share of the groups that goes to the test, between 0 and 1.
        class_names: For messages.
        allow_fewer: Classes that lie in one group only, which cannot be on both sides, go to the
            support pool instead of being an error: they are in training, and not measured.
        pooled: Groups that may not be tested. They change nothing where the split would put none
            of them there.

    Returns:
        Sorted row indices of the pool and of the test.

    Raises:
        GloVLMError: Fewer than two groups or classes, a class in one group only, or no split that
            puts every class on both sides.
    """
    labels = np.asarray(labels, dtype=np.int64)
    rng = random_stream(seed)
    if not 0 < test_fraction < 1:
        raise GloVLMError(f"expected a test fraction between 0 and 1, found {test_fraction}.")
    present = np.unique(labels)
    if len(present) < 2:
        raise GloVLMError(
            f"expected images of at least two classes, found {len(present)}; add another class, or "
            "give the folder one level deeper if the classes lie there."
        )
    ids, group_of = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(ids) < 2:
        raise GloVLMError(
            f"all {len(labels)} images belong to one group ({ids[0]}), so none is left for an "
            "independent test; add patients or slides, and check that the ids (glomerulus_id too) "
            "are unique."
        )
    counts = np.zeros((len(ids), len(present)), dtype=np.int64)
    np.add.at(counts, (group_of, np.searchsorted(present, labels)), 1)
    spread = (counts > 0).sum(axis=0)
    kept = np.zeros(len(ids), dtype=bool)  # groups that must stay in the pool
    for position in np.flatnonzero(spread == 1):
        only = int(np.flatnonzero(counts[:, position])[0])
        name = class_names[present[position]] if class_names else str(present[position])
        if not allow_fewer:
            raise GloVLMError(
                f"all {counts[only, position]} images of the class {name} belong to one group "
                f"({ids[only]}), so it cannot be in both training and test; add images of "
                "another group, leave the class out, or allow fewer (it is then trained on, not "
                "measured)."
            )
        kept[only] = True
    n_test = min(max(round(len(ids) * test_fraction), 1), len(ids) - 1)
    movable = np.flatnonzero(~kept)
    shared_counts = counts[:, spread > 1]
    in_test = _halves(shared_counts, movable, n_test, test_fraction, rng)
    barred = np.isin(ids, sorted(pooled))
    if in_test is not None and (in_test & barred).any():
        movable = np.flatnonzero(~kept & ~barred)
        in_test = _halves(shared_counts, movable, n_test, test_fraction, rng)
    if in_test is None:
        besides = f" without testing the {barred.sum()} that were learned from before"
        raise GloVLMError(
            f"no split of the {len(ids)} groups puts every class on both sides"
            f"{besides if barred.any() else ''}; add patients or slides that hold the rare "
            "classes, or leave those out."
        )
    tested = in_test[group_of]
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def _halves(
    counts: Indices, movable: Indices, n_test: int, fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_] | None:
    """Which groups are tested, at most `n_test` of those that may be; `None` without a split."""
    n_test = min(n_test, len(movable))
    in_test = _random_halves(counts, movable, n_test, fraction, rng)
    return _search(counts, movable, n_test, rng) if in_test is None else in_test


def _random_halves(
    counts: Indices, movable: Indices, n_test: int, fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_] | None:
    total = counts.sum(axis=0)
    fallback = None
    for _ in range(_TRIES):
        in_test = np.zeros(len(counts), dtype=bool)
        in_test[rng.permutation(movable)[:n_test]] = True
        test = counts[in_test].sum(axis=0)
        pool = total - test
        if not (n_test and (test > 0).all() and (pool > 0).all()):
            continue
        if (test >= total * fraction / 2).all() and (pool >= total * (1 - fraction) / 2).all():
            return in_test
        fallback = in_test if fallback is None else fallback
    return fallback


def _search(
    counts: Indices, movable: Indices, n_test: int, rng: np.random.Generator
) -> NDArray[np.bool_] | None:
    """Backtracking search for a split: every class, the rarest first, gets a group on each side.

    The rest is filled up at random. It stops after 10,000 steps; the test may come out larger or
    smaller than requested where the classes leave no choice.
    """
    side = np.full(len(counts), 0)  # -1 pool, +1 test, 0 open
    side[np.setdiff1d(np.arange(len(counts)), movable)] = -1
    order = rng.permutation(len(counts))
    classes = np.argsort((counts > 0).sum(axis=0), kind="stable")
    holders = [[g for g in order if counts[g, c]] for c in classes]
    steps = 0

    def place(position: int, target: int) -> bool:
        nonlocal steps
        steps += 1
        if position == len(classes):
            return True
        following = (position, 1) if target == -1 else (position + 1, -1)
        if any(side[g] == target for g in holders[position]):
            return place(*following)
        for group in holders[position]:
            if side[group] == 0 and steps < 10_000:
                side[group] = target
                if place(*following):
                    return True
                side[group] = 0
        return False

    if not place(0, -1):
        return None
    missing = max(n_test - int((side == 1).sum()), 0)
    side[[g for g in order if side[g] == 0][:missing]] = 1
    in_test = side == 1
    return in_test if in_test.any() and not in_test.all() else None


def random_stream(seed: int | Sequence[int]) -> np.random.Generator:
    """Random numbers of a seed, or of several that name one use of it."""
    numbers = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if any(number < 0 for number in numbers):
        raise GloVLMError(f"expected seeds and draws of 0 or more, found {min(numbers)}.")
    return np.random.default_rng(numbers)


# --------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Episode:
    """Few-shot episode: the rows of support, validation, calibration and test.

    Attributes:
        name: For instance `spread-8`.
        draw: Number of the draw.
        shots: Images per class requested (the largest where classes differ).
        seed: Seed it was drawn with.
        sampler: How the support was drawn.
        group_column: What a group is.
        support: Row indices into `all_rows`, class by class, in the order drawn.
        validation: Row indices, whose labels count in the label budget.
        test: Row indices, sorted.
        calibration: Row indices, sorted: all images of groups on no other side, at the prevalence
            that these groups have. Their labels count in the label budget.
    """

    name: str
    draw: int
    shots: int
    seed: int
    sampler: str
    group_column: str
    support: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    calibration: tuple[int, ...] = ()

    def summary(
        self, labels: Sequence[int], groups: Sequence[str], class_names: Sequence[str]
    ) -> dict[str, Any]:
        """Label budget: labels and contributing groups per class.

        Args:
            labels: Class of every row [n].
            groups: Group id of every row [n].
            class_names: Names of the classes [K].
        """
        held: dict[str, set[str]] = {name: set() for name in class_names}
        counts = Counter(class_names[labels[row]] for row in self.support)
        for row in self.support:
            held[class_names[labels[row]]].add(groups[row])
        return {
            "labels_per_class": {name: counts[name] for name in class_names},
            "groups_per_class": {name: len(held[name]) for name in class_names},
            "validation_labels": len(self.validation),
            "calibration_labels": len(self.calibration),
            "label_budget": len(self.support) + len(self.validation) + len(self.calibration),
        }


def draw_episode(
    rows: "Dataset",
    *,
    shots: int | Mapping[str, int],
    seed: int,
    draw: int = 0,
    shots_from: ShotsFrom = "spread",
    allow_fewer: bool = False,
    test_fraction: float = 0.5,
    validation_shots: int = 0,
    calibration_groups: int = 0,
    groups: Groups | None = None,
    pooled: Collection[str] = (),
) -> Episode:
    """Draw a few-shot episode: support, validation, calibration and test.

    No group stands on two of these sides. The split depends on `(seed, draw)` only; the support of
    k shots is a part of that of more. A given split (column `split`) is respected: support from
    train, validation from validation or, where there is none, from groups of train that are set
    aside.

    Args:
        rows: `all_rows(ds)`.
        shots: Labelled images per class, or `{class: number}` with every class.
        seed: Seed, 0 or more.
        draw: Number of the draw under that seed.
        shots_from: `spread` takes one image of each group in turn, in a drawn order of the groups;
            `random` draws images; `one_group` draws all from the group of the pool that has most
            images of the class (what a single slide would give).
        allow_fewer: Take what there is of a class that has fewer images than shots.
        test_fraction: Share of the groups that is tested, where no split is given.
        validation_shots: Labelled images per class for methods that choose something on a
            validation set. A third of the pool's groups is set aside for them.
        calibration_groups: Whole groups of the support pool to set aside, with all their images,
            for what is fitted after the adaptation (see `calibration`). Of 256 random choices
            the first is taken that leaves enough images for the support and puts at least half of
            its fair share of every class on both sides. So it depends on the shots only where
            there are hardly enough images, and only there can the support of fewer shots fail to
            be a part of that of more.
        groups: `group_rows(rows)`, if at hand.
        pooled: Groups that the backbone learned from before: they may give support, and nothing
            is chosen, calibrated or measured on them. A split that tests none of them is what it
            is without.

    Raises:
        GloVLMError: Too few images, groups or classes; a group on two sides of a given split, or
            one of `pooled` that it tests; an unknown class or sampler.
    """
    if shots_from not in get_args(ShotsFrom):
        raise GloVLMError(
            f"unknown shots_from '{shots_from}'; expected {', '.join(get_args(ShotsFrom))}."
            f"{nearest(shots_from, get_args(ShotsFrom))}"
        )
    names: list[str] = rows.features["label"].names
    labels = np.asarray(column(rows, "label"), dtype=np.int64)
    groups = groups or group_rows(rows)
    present = set(np.unique(labels).tolist())
    requested = shots_per_class(shots, names, present)
    ids = np.asarray(groups.ids, dtype=object)
    sampler = Sampler(labels, ids, names, seed, draw, allow_fewer, pooled)
    if "split" in rows.column_names:
        given = np.asarray(column(rows, "split"))
        pool, reserve, test = (np.flatnonzero(given == side) for side in SPLIT_ORDER)
        assert_disjoint(groups.ids, train=pool, validation=reserve, test=test)
        if len(present) < 2:
            raise GloVLMError("expected images of at least two classes, found 1; add another.")
    else:
        pool, test = sampler.split(np.arange(len(labels)), SPLIT, test_fraction)
        reserve = np.empty(0, dtype=np.int64)
    pool, reserve = sampler.for_validation(pool, reserve, validation_shots)
    pool, calibration = sampler.for_calibration(pool, calibration_groups, requested, shots_from)
    where = "the support pool"
    if calibration_groups:
        where += f" without its {calibration_groups} calibration groups"
    if shots_from == "one_group":
        where = f"the largest group of {where}"
    support: list[int] = []
    validation: list[int] = []
    for k, name in enumerate(names):
        support += sampler.take(pool, k, requested[name], shots_from, _SUPPORT, where)
        if validation_shots and k in present:
            validation += sampler.take(
                reserve, k, validation_shots, "spread", _VALIDATION, "the validation pool"
            )
    sides = {"support": tuple(support), "validation": tuple(validation)}
    sides |= {"calibration": tuple(calibration.tolist()), "test": tuple(test.tolist())}
    assert_disjoint(groups.ids, **sides)
    assert_unlearned(groups.ids, pooled, **sides)
    most = max(requested.values())
    name = f"{shots_from}-{most}"
    return Episode(name, draw, most, seed, shots_from, groups.column, **sides)


def reserve_calibration(
    rows: "Dataset",
    episode: Episode,
    n_groups: int,
    seed: int,
    groups: Groups | None = None,
    pooled: Collection[str] = (),
) -> Episode:
    """Add calibration groups to an episode, from the groups that it does not use.

    Args:
        rows: `all_rows(ds)`.
        episode: An episode, for instance a frozen one.
        n_groups: How many groups, with all their images; of 256 random choices the first with at
            least half of its fair share of every class, where there is one.
        seed: Seed, 0 or more; the choice depends on it and on the number of the draw.
        groups: `group_rows(rows, group_column=episode.group_column)`, if at hand.
        pooled: Groups that the backbone learned from before; none of them is taken.

    Returns:
        The episode with `calibration` filled; support, validation and test are as they were.

    Raises:
        GloVLMError: It has calibration groups already, or uses all groups but too few.
    """
    if episode.calibration or n_groups < 1:
        raise GloVLMError(
            "expected an episode without calibration groups and 1 or more groups to reserve, found "
            f"{len(episode.calibration)} calibration images and {n_groups} groups."
        )
    groups = groups or group_rows(rows, group_column=episode.group_column)
    ids = np.asarray(groups.ids, dtype=object)
    sides = {"support": episode.support, "validation": episode.validation, "test": episode.test}
    used = {*pooled, *(groups.ids[row] for side in sides.values() for row in side)}
    unused_rows = np.array(
        [i for i, group in enumerate(groups.ids) if group not in used], dtype=int
    )
    unused = len(set(ids[unused_rows]))
    if unused < n_groups:
        raise GloVLMError(
            f"draw {episode.draw} of {episode.name} leaves {unused} of {len(set(ids))} groups "
            f"outside its support, validation and test, {n_groups} were asked for; ask for fewer, "
            "or draw an episode that sets calibration groups aside."
        )
    labels = np.asarray(column(rows, "label"), dtype=np.int64)[unused_rows]
    rng = random_stream((seed, episode.draw, _CALIBRATION))
    none_needed = np.zeros(len(rows.features["label"].names), dtype=np.int64)
    aside = _set_aside(labels, ids[unused_rows], n_groups, none_needed, False, rng)
    calibration = tuple(unused_rows[aside].tolist())
    assert_disjoint(groups.ids, calibration=calibration, **sides)
    return replace(episode, calibration=calibration)


def _set_aside(
    labels: Indices,
    ids: NDArray[np.object_],
    n: int,
    needed: Indices,
    one_group: bool,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Mask of the pool's rows in the n groups set aside: the first best of 256 tries.

    Best leaves an image of every class, then `needed` images of each class `[K]` (in one group
    where all must come from one), then puts half its fair share of each class on both sides. A
    class that lies in one group cannot be on both, and is not counted there.
    """
    drawn, group_of = np.unique(ids.astype(str), return_inverse=True)
    counts = np.zeros((len(drawn), len(needed)), dtype=np.int64)
    np.add.at(counts, (group_of, labels), 1)
    total = counts.sum(axis=0)
    shared = (counts > 0).sum(axis=0) > 1
    fraction = n / len(drawn)
    ideal = (int((total > 0).sum()), int((total > 0).sum()), True)
    best, best_score = np.zeros(len(drawn), dtype=bool), (-1, -1, False)
    for _ in range(_TRIES):
        taken = np.zeros(len(drawn), dtype=bool)
        taken[rng.permutation(len(drawn))[:n]] = True
        aside, left = counts[taken].sum(axis=0), counts[~taken].sum(axis=0)
        most = counts[~taken].max(axis=0, initial=0) if one_group else left
        fair = (aside >= total * fraction / 2) & (left >= total * (1 - fraction) / 2)
        score = (
            int((left >= needed.clip(max=1))[total > 0].sum()),
            int((most >= needed)[total > 0].sum()),
            bool(fair[shared].all()),
        )
        if score > best_score:
            best, best_score = taken, score
        if score == ideal:
            break
    return best[group_of]


def shots_per_class(
    shots: int | Mapping[str, int], names: Sequence[str], present: set[int]
) -> dict[str, int]:
    """Images asked for of each class; of one without images none, where one number is for all."""
    if isinstance(shots, Mapping):
        requested = dict(shots)
        for name in requested:
            if name not in names:
                raise GloVLMError(
                    f"shots name the unknown class '{name}'; the classes are {', '.join(names)}."
                    f"{nearest(name, names)}"
                )
        missing = [name for name in names if name not in requested]
        if missing:
            raise GloVLMError(
                f"shots name no number for {', '.join(missing[:3])}; give one for every class (0 is"
                " possible)."
            )
    else:
        requested = {name: shots if k in present else 0 for k, name in enumerate(names)}
    for name, number in requested.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise GloVLMError(f"expected 0 or more shots, found {number!r} for {name}.")
    return requested


def _ordering(
    here: Indices, ids: NDArray[np.object_], shots_from: ShotsFrom, rng: np.random.Generator
) -> list[int]:
    """Sampling order of one class's images; k shots are its first k."""
    if shots_from == "random":
        return [int(row) for row in rng.permutation(here)]
    names = sorted(set(ids))
    drawn = [names[i] for i in rng.permutation(len(names))]
    images = {name: rng.permutation(here[ids == name]).tolist() for name in drawn}
    if shots_from == "one_group":
        return list(max(images.values(), key=len, default=[]))
    longest = max((len(rows) for rows in images.values()), default=0)
    return [rows[turn] for turn in range(longest) for rows in images.values() if turn < len(rows)]


@dataclass(frozen=True)
class Sampler:
    """Sampler of one draw over labelled, grouped rows."""

    labels: Indices
    ids: NDArray[np.object_]
    names: Sequence[str]
    seed: int
    draw: int
    allow_fewer: bool
    pooled: Collection[str] = ()

    def split(self, rows: Indices, stream: int, test_fraction: float) -> tuple[Indices, Indices]:
        """Group split of rows into those that stay and those that go, all classes in both."""
        stay, go = split_groups(
            self.labels[rows],
            self.ids[rows].tolist(),
            seed=(self.seed, self.draw, stream),
            test_fraction=test_fraction,
            class_names=self.names,
            allow_fewer=self.allow_fewer,
            pooled=self.pooled,
        )
        return rows[stay], rows[go]

    def for_validation(self, pool: Indices, reserve: Indices, n: int) -> tuple[Indices, Indices]:
        """Pool and validation reserve (a third of the pool's groups if none is given, n > 0)."""
        if n < 0:
            raise GloVLMError(f"expected 0 or more validation shots, found {n}.")
        if n == 0 or len(reserve):
            return pool, reserve
        try:
            return self.split(pool, _RESERVE, 1 / 3)
        except GloVLMError as error:
            raise GloVLMError(
                f"no groups of the support pool can be set aside for validation: {error}"
            ) from None

    def for_calibration(
        self, pool: Indices, n: int, shots: Mapping[str, int], shots_from: ShotsFrom
    ) -> tuple[Indices, Indices]:
        """Pool without its n calibration groups, and these; enough for the shots where possible."""
        if n < 0:
            raise GloVLMError(f"expected 0 or more calibration groups, found {n}.")
        if n == 0:
            return pool, np.empty(0, dtype=np.int64)
        barred = np.isin(self.ids[pool].astype(str), sorted(self.pooled))
        pool, learned = pool[~barred], pool[barred]
        ids = self.ids[pool]
        available = len(set(ids))
        if n >= available + bool(len(learned)):
            before = " that were not learned from before" if len(learned) else ""
            most = max(available - (not len(learned)), 0)
            raise GloVLMError(
                f"the support pool has {available} groups{before}, so {n} cannot be set aside for "
                f"calibration; ask for {most} at most, or add patients or slides."
            )
        # A class that the support does not take must not leave the pool altogether either.
        needed = np.array([max(shots[name], 1) for name in self.names])
        needed = (needed - np.bincount(self.labels[learned], minlength=len(needed))).clip(min=0)
        one_group = shots_from == "one_group"
        rng = random_stream((self.seed, self.draw, _CALIBRATION))
        aside = _set_aside(self.labels[pool], ids, n, needed, one_group, rng)
        return np.sort(np.concatenate([pool[~aside], learned])), pool[aside]

    def take(
        self, side: Indices, k: int, n: int, shots_from: ShotsFrom, stream: int, where: str
    ) -> list[int]:
        """First n rows of class k on a side, in the order drawn."""
        here = side[self.labels[side] == k]
        rng = random_stream((self.seed, self.draw, stream, k))
        order = _ordering(here, self.ids[here], shots_from, rng)
        if len(order) < n:
            short = f"class {self.names[k]}: {where} holds {len(order)} images, {n} were asked for"
            if not self.allow_fewer:
                raise GloVLMError(f"{short}; {self.ask_for(side, shots_from, stream)}.")
            logger.warning("%s: all of them are taken.", short)
        return order[:n]

    def ask_for(self, side: Indices, shots_from: ShotsFrom, stream: int) -> str:
        """What to do where a side has too few images of a class: how many each class has."""
        option = "--validation-shots" if stream == _VALIDATION else "--shots"
        held = {k: side[self.labels[side] == k] for k in sorted(set(self.labels.tolist()))}
        rng = np.random.default_rng(0)  # how many there are depends on no draw
        most = min(len(_ordering(rows, self.ids[rows], shots_from, rng)) for rows in held.values())
        fewer = f"ask for {most} at most ({option} {most})" if most else "add images of this class"
        return f"{fewer}, or allow fewer of the classes that have no more (--allow-fewer)"


def split_hash(rows: "Dataset", episode: Episode) -> str:
    """Identity of a split: SHA-256 of the sorted file names of support and test."""
    names = column(rows, "file_name")
    sides = {
        side: sorted(names[row] for row in getattr(episode, side)) for side in ("support", "test")
    }
    return hashlib.sha256(json.dumps(sides, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------- frozen episodes


def save_episodes(
    path: str | Path,
    episodes: Sequence[Episode],
    rows: "Dataset",
    set_name: str,
    *,
    groups: Groups | None = None,
) -> None:
    """Save frozen episodes as JSON: support by file name, test by group.

    `{"set", "shots", "sampler", "group_column", "draws": [{"draw", "support", "test_groups",
    "validation", "name", "seed"}]}`, and "calibration" where there is one; the file is written
    whole or not at all.

    Args:
        path: File to write.
        episodes: Of one sampler and number of shots, with different draw numbers.
        rows: The rows they were drawn from.
        set_name: Name of the data set.
        groups: `group_rows(rows)`, if at hand.

    Raises:
        GloVLMError: The episodes do not belong together, or one's test is not all of its groups.
    """
    kinds = {(e.shots, e.sampler, e.group_column) for e in episodes}
    if len(kinds) != 1 or len({e.draw for e in episodes}) != len(episodes):
        raise GloVLMError(
            "expected episodes of one sampler, one number of shots and different draws, found "
            f"{len(episodes)} episodes of {len(kinds)} kinds; write one file for each kind."
        )
    shots, sampler, group_column = next(iter(kinds))
    if groups is None or groups.column != group_column:
        groups = group_rows(rows, group_column=group_column)
    names = column(rows, "file_name")
    draws = []
    for episode in episodes:
        tested = {groups.ids[row] for row in episode.test}
        if sum(group in tested for group in groups.ids) != len(episode.test):
            raise GloVLMError(
                f"draw {episode.draw} tests only a part of its groups, which the file format cannot"
                " express; test all images of each group."
            )
        entry = {
            "draw": episode.draw,
            "support": [names[row] for row in episode.support],
            "test_groups": sorted(tested),
            "validation": [names[row] for row in episode.validation],
            "name": episode.name,
            "seed": episode.seed,
        }
        if episode.calibration:
            entry["calibration"] = [names[row] for row in episode.calibration]
        draws.append(entry)
    content = {"set": set_name, "shots": shots, "sampler": sampler, "group_column": group_column}
    write_text(Path(path), json.dumps({**content, "draws": draws}, indent=1))


def load_episode(
    path: str | Path, draw: int, rows: "Dataset", *, looks: Looks | None = None
) -> Episode:
    """Load a frozen episode.

    Args:
        path: JSON file as `save_episodes` writes it.
        draw: Number of the draw in the file.
        rows: `all_rows(ds)`; support files are looked up by `file_name`, and the test is every row
            whose group is among the draw's `test_groups`.
        looks: At these rows, if at hand.

    Raises:
        GloVLMError: No such file, draw, support file or group, or a group on two sides.
    """
    path = Path(path).expanduser()
    try:
        frozen = json.loads(read_text(path, EPISODES))
        draws = {int(entry["draw"]): entry for entry in frozen["draws"]}
        group_column, shots = str(frozen["group_column"]), int(frozen["shots"])
        sampler = str(frozen["sampler"])
        if draw not in draws:
            raise GloVLMError(
                f"{path} has no draw {draw}; it holds {len(draws)} draws, {min(draws)} to "
                f"{max(draws)}."
            )
        entry = draws[draw]
        listed = {
            side: [str(name) for name in entry.get(side, [])]
            for side in ("support", "validation", "calibration")
        }
        test_groups = {str(group) for group in entry["test_groups"]}
        name, seed = str(entry.get("name", path.stem)), int(entry.get("seed", 0))
    except GloVLMError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise GloVLMError(
            f"{path} is not a file of frozen episodes ({type(error).__name__}: {error}); expected "
            "JSON with shots, sampler, group_column and draws of draw, support and test_groups."
        ) from None
    groups = group_rows(rows, group_column=group_column, looks=looks)
    position = {name: row for row, name in enumerate(column(rows, "file_name"))}
    absent = [name for names in listed.values() for name in names if name not in position]
    if absent:
        raise GloVLMError(
            f"draw {draw} of {path} names {len(absent)} support files that are not in the data "
            f"({', '.join(absent[:3])}); use the data set it was drawn from."
        )
    sides = {side: tuple(position[name] for name in names) for side, names in listed.items()}
    sides["test"] = _rows_of(test_groups, rows, groups, f"draw {draw} of {path}")
    assert_disjoint(groups.ids, **sides)
    return Episode(
        name=name,
        draw=draw,
        shots=shots,
        seed=seed,
        sampler=sampler,
        group_column=group_column,
        **sides,
    )


def _rows_of(
    test_groups: set[str], rows: "Dataset", groups: Groups, origin: str
) -> tuple[int, ...]:
    """Rows of the test groups, named by their own id or that of the group they merged into."""
    own: list[str | None] = list(groups.ids)
    if groups.column in rows.column_names:
        own = column(rows, groups.column)
    pairs = list(zip(own, groups.ids, strict=True))
    unknown = test_groups.difference(name for pair in pairs for name in pair if name is not None)
    if unknown:
        raise GloVLMError(
            f"{origin} tests {len(unknown)} groups that are not in the data "
            f"({', '.join(sorted(unknown)[:3])}); use the data set it was drawn from."
        )
    merged = {group for name, group in pairs if name in test_groups or group in test_groups}
    return tuple(row for row, group in enumerate(groups.ids) if group in merged)
