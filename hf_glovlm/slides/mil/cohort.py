"""Cohort of labelled slides: read, checked, and split so that no patient is on two sides."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.splits import assert_disjoint, split_groups
from ...errors import GloVLMError
from ..files.bags import Bag, list_bags, read_bag
from ..files.slide_table import read_slide_table
from .classifier import FINGERPRINT, TILES, same_tiles
from .config import MilConfig

KEEP_BYTES = 2**30  # features that are kept in memory; the rest is read again when needed
_SPLIT, _VALIDATION, _FOLDS = range(3)  # streams of random numbers


class Bags:
    """Bags by number, kept in memory while they are few."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.kept: dict[int, Bag] = {}
        self.free = KEEP_BYTES

    def __getitem__(self, i: int) -> Bag:
        bag = self.kept.get(i) or read_bag(self.paths[i])
        if i not in self.kept and bag.features.nbytes <= self.free:
            self.kept[i] = bag
            self.free -= bag.features.nbytes
        return bag


class BagSource:
    """Training bags for the loop, one at a time, so that none is ever padded.

    Args:
        bags: Bags by number.
        rows: Which of them.
        labels: Class of every bag.
        max_tiles: Most tiles of a bag, drawn from torch's generator; `None` for all.
    """

    def __init__(
        self, bags: Bags, rows: Sequence[int], labels: Sequence[int], max_tiles: int | None
    ) -> None:
        self.bags, self.rows, self.max_tiles = bags, rows, max_tiles
        self.labels = torch.tensor([labels[i] for i in rows])

    def fetch(self, index: Sequence[int]) -> Tensor:
        """The tiles of one bag, `[1, n, dim]`."""
        (row,) = index
        features = torch.from_numpy(self.bags[self.rows[row]].features)
        if self.max_tiles is not None and len(features) > self.max_tiles:
            features = features[torch.randperm(len(features))[: self.max_tiles].sort().values]
        return features.unsqueeze(0)


@dataclass(frozen=True)
class Cohort:
    """Cohort: all labelled slides, checked."""

    names: list[str]
    labels: list[int]
    groups: list[str]
    classes: list[str]
    group_column: str
    splits: list[str] | None
    tiles: list[int]
    dim: int
    encoder: dict[str, Any]
    fingerprint: str
    synthetic: bool
    notes: list[str]
    bags: Bags

    def describe_tiles(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[dim]` of some slides' tiles, each slide weighing 1."""
        means, squares = np.zeros((2, self.dim))
        for i in index:
            features = self.bags[i].features.astype(np.float64)
            means += features.mean(0) / len(index)
            squares += (features**2).mean(0) / len(index)
        spread = np.sqrt(np.maximum(squares - means**2, 0))
        return torch.from_numpy(means), torch.from_numpy(spread)

    def hash_split(self, parts: Sequence["Sides"]) -> str:
        """SHA-256 of the slides' names on each side of each training."""
        named = [
            {side: sorted(self.names[i] for i in index) for side, index in asdict(part).items()}
            for part in parts
        ]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sides:
    """Train, validation and test slides, by number."""

    train: list[int]
    validation: list[int]
    test: list[int]


def read_cohort(config: MilConfig) -> Cohort:
    """Read the table and every bag once; refuse what would spoil the run."""
    folder = Path(config.features).expanduser()
    table = read_slide_table(Path(config.labels).expanduser())
    files = list_bags(folder)
    paths = table.match(files)
    labels, groups = table.labels, table.groups
    if len(table.classes) < 2:
        raise GloVLMError("Expected slides of at least two classes, found one: add another class.")
    for k, name in enumerate(table.classes):
        holders = {g for g, label in zip(groups, labels, strict=True) if label == k}
        if len(holders) < 2:
            unit = "patient" if table.patient_column else "slide"
            raise GloVLMError(
                f"The class {name} has {len(holders)} {unit}, so it cannot be both learned and "
                f"tested: add slides of another {unit}, or leave the class out of the table."
            )
    bags = Bags(list(paths.values()))
    contents, tiles, seen = [], [], []
    dim = -1
    for i, name in enumerate(table.slides):
        bag = bags[i]
        if not bag.features.size:
            raise GloVLMError(f"{name} has no tile (an empty bag): leave its row out of the table.")
        if not np.isfinite(bag.features).all():
            raise GloVLMError(f"{name} holds features that are not finite: encode it again.")
        if dim not in (-1, bag.features.shape[1]):
            raise GloVLMError(
                f"{name} has features of width {bag.features.shape[1]}, the slides before it of "
                f"width {dim}: encode all slides with one model."
            )
        dim = bag.features.shape[1]
        tiles.append(len(bag.features))
        contents.append(hashlib.sha256(np.ascontiguousarray(bag.features).data).hexdigest())
        seen.append(bag.attributes)
    _refuse_copies(table.slides, contents, groups, labels)
    encoder, notes = _describe_encoder(table.slides, seen)
    if len(files) > len(paths):
        notes.append(f"{len(files) - len(paths)} feature files have no row and were left out.")
    if table.patient_column != "patient_id":
        notes.append("Patients are unknown: the same patient may stand on both sides.")
    rows = sorted(zip(table.slides, contents, labels, groups, strict=True))
    return Cohort(
        names=table.slides,
        labels=labels,
        groups=groups,
        classes=list(table.classes),
        group_column=table.patient_column or "slide_id",
        splits=table.splits,
        tiles=tiles,
        dim=dim,
        encoder=encoder,
        fingerprint=hashlib.sha256(json.dumps([rows, table.classes]).encode()).hexdigest(),
        synthetic=(folder / "DRAWINGS").is_file() or all(a.get("synthetic") for a in seen),
        notes=notes,
        bags=bags,
    )


def _refuse_copies(
    names: Sequence[str], contents: Sequence[str], groups: Sequence[str], labels: Sequence[int]
) -> None:
    """One content under two names may be on two sides, learned and tested."""
    first: dict[str, int] = {}
    for i, content in enumerate(contents):
        j = first.setdefault(content, i)
        if groups[i] != groups[j] or labels[i] != labels[j]:
            raise GloVLMError(
                f"{names[j]} and {names[i]} hold the very same features but differ in patient or "
                "label, so one could be learned and the other tested: leave one of them out."
            )


def _describe_encoder(
    names: Sequence[str], seen: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Attributes that all bags agree on; two models are refused, other differences noted."""
    encoder: dict[str, Any] = {}
    notes: list[str] = []
    for key in (FINGERPRINT, *TILES):
        kind = str if key == FINGERPRINT else int | float  # what else other tools write is unknown
        known = {i: a[key] for i, a in enumerate(seen) if isinstance(a.get(key), kind)}
        if not known:
            continue
        if len(known) < len(seen):
            notes.append(f"{len(seen) - len(known)} slides do not say their {key}.")
        first = min(known)
        if key == FINGERPRINT:
            other = [i for i in known if known[i] != known[first]]
            if other:
                raise GloVLMError(
                    f"{names[other[0]]} was encoded by another model than {names[first]}: encode "
                    "all slides with one."
                )
        elif not same_tiles(min(known.values()), max(known.values())):
            low, high = min(known.values()), max(known.values())
            notes.append(f"The slides differ in {key}: {low:g} to {high:g}.")
            continue
        encoder[key] = known[first]
    return encoder, notes


def split_cohort(cohort: Cohort, config: MilConfig) -> list[Sides]:
    """Sides of every training; with folds one for each, and one of all slides last."""
    everyone = np.arange(len(cohort.names))
    if cohort.splits is not None and config.folds is not None:
        raise GloVLMError("The table declares a split, so leave folds out, or drop the column.")
    if cohort.splits is not None:
        given = np.array(cohort.splits)
        train, validation, test = (
            np.flatnonzero(given == s) for s in ("train", "validation", "test")
        )
        if not len(test):
            raise GloVLMError("The table's split leaves no slide for the test: mark some as test.")
        parts = [(train, validation, test)]
    elif config.folds is not None:
        fold = _deal_folds(cohort, config.folds, config.seed)
        parts = [
            (everyone[fold != k], everyone[:0], everyone[fold == k]) for k in range(config.folds)
        ]
        parts.append((everyone, everyone[:0], everyone[:0]))
    else:
        train, test = split_groups(
            cohort.labels,
            cohort.groups,
            seed=(config.seed, _SPLIT),
            test_fraction=config.test_fraction,
            class_names=cohort.classes,
        )
        parts = [(train, everyone[:0], test)]
    return [_set_aside(cohort, config, k, *part) for k, part in enumerate(parts)]


def _set_aside(
    cohort: Cohort,
    config: MilConfig,
    k: int,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    test: NDArray[np.int64],
) -> Sides:
    """Take validation patients off the training side where asked for, and prove the sides apart."""
    if config.validation_fraction and not len(validation):
        try:
            learn, choose = split_groups(
                [cohort.labels[i] for i in train],
                [cohort.groups[i] for i in train],
                seed=(config.seed, _VALIDATION, k),
                test_fraction=config.validation_fraction,
                class_names=cohort.classes,
            )
        except GloVLMError as error:
            raise GloVLMError(f"No patients can be set aside for validation: {error}") from None
        train, validation = train[learn], train[choose]
    sides = Sides(train.tolist(), validation.tolist(), test.tolist())
    assert_disjoint(cohort.groups, **asdict(sides))
    learned = {cohort.labels[i] for i in sides.train}
    missing = [c for i, c in enumerate(cohort.classes) if i not in learned]
    if missing:
        raise GloVLMError(
            f"No slide of {', '.join(missing)} is on the training side: change the split, the seed "
            "or the number of folds."
        )
    if len({cohort.labels[i] for i in sides.validation}) == 1:
        raise GloVLMError("The validation slides are of one class, so they cannot choose an epoch.")
    return sides


def _deal_folds(cohort: Cohort, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of every slide `[n]`: patients of the same classes are dealt out in turn."""
    held: dict[str, set[int]] = {}
    for group, label in zip(cohort.groups, cohort.labels, strict=True):
        held.setdefault(group, set()).add(label)
    if len(held) < folds:
        raise GloVLMError(f"{folds} folds need as many patients or slides, found {len(held)}.")
    rng = np.random.default_rng((seed, _FOLDS))
    drawn = [sorted(held)[i] for i in rng.permutation(len(held))]
    drawn.sort(key=lambda group: sorted(held[group]))  # stable: drawn within the same classes
    place = {group: k % folds for k, group in enumerate(drawn)}
    return np.array([place[group] for group in cohort.groups])
