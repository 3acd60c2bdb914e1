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

from ...data.groups import Groups
from ...data.splits import assert_disjoint, assert_unlearned, split_groups
from ...errors import GloVLMError
from ...runs.provenance import former_provenance
from ..encoding import encoder_fingerprint, load_encoder
from ..files.bags import Bag, list_bags, read_bag
from ..files.slide_table import SlideTable, read_slide_table
from ..files.tile_attributes import (
    TileAttributes,
    find_differences,
    other_encoder,
    shared_attributes,
    unknown_note,
)
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
    """Cohort: all labelled slides, checked.

    `learned` are the groups that the encoder learned from, which are not tested.
    """

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
    learned: set[str]

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
    encoder, notes = _describe_encoder(table.slides, seen, config.allow_scale)
    learned, about = _find_learned(config, table, seen)
    notes += about
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
        learned=learned,
    )


def _find_learned(
    config: MilConfig, table: SlideTable, seen: Sequence[Mapping[str, Any]]
) -> tuple[set[str], list[str]]:
    """Groups that the encoder learned from, and notes on what is known of it."""
    if config.encoder is None:
        if not any(attributes.get("classes") for attributes in seen):
            return set(), []
        return set(), [
            "The encoder is a run's model, and may have learned from these very patients: give "
            "that run as --encoder, and they are not tested."
        ]
    provenance = former_provenance(config.encoder)
    if provenance is None:
        raise GloVLMError(
            f"Expected the run whose model encoded the slides (what `glovlm train` wrote) in "
            f"'{config.encoder}', found none with results: correct --encoder, or leave it out for "
            "a backbone."
        )
    notes = []
    known = next(filter(None, (a.get("fingerprint") for a in seen)), None)
    if known is None:
        notes.append("The features do not say which model made them; --encoder was not checked.")
    elif (actual := encoder_fingerprint(*load_encoder(config.encoder, exported=True))) != known:
        raise GloVLMError(
            f"The slides were encoded by another model ({str(known)[:12]}) than that of "
            f"'{config.encoder}' ({actual[:12]}): correct --encoder."
        )
    from datasets import Dataset

    column = table.patient_column or "slide_id"
    if not {column, "slide_id"}.intersection(provenance.groups):
        held = ", ".join(provenance.groups) or "nothing"
        notes.append(
            f"Whether the encoder learned from these slides cannot be known: its run names {held}, "
            f"the table {column}."
        )
        return set(), notes
    rows = Dataset.from_dict({column: table.groups, "slide_id": table.slides})
    known_by = Groups(column, table.groups, "")
    no_images = [("", "")] * len(seen)  # ids alone are compared: slides are no images
    learned = provenance.seen(rows, known_by, no_images).rows
    pooled = {group for group, one in zip(table.groups, learned, strict=True) if one}
    unit = "patients" if table.patient_column else "slides"
    notes.append(f"The encoder learned from {len(pooled)} of these {unit}, which are not tested.")
    return pooled, notes


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
    names: Sequence[str], seen: Sequence[Mapping[str, Any]], allow_scale: bool
) -> tuple[dict[str, Any], list[str]]:
    """Attributes that all bags agree on; two models are refused, and unless allowed other tiles."""
    tiles = [TileAttributes.of(attributes) for attributes in seen]
    two = other_encoder(tiles)
    if two is not None:
        first, other = two
        by = [tiles[i].encoder for i in two]
        named = f" ({by[0]}, {by[1]})" if None not in by and by[0] != by[1] else ""
        raise GloVLMError(
            f"{names[other]} was encoded by another model than {names[first]}{named}: encode all "
            "slides with one."
        )
    differences = find_differences(names, tiles)
    if differences and not allow_scale:
        raise GloVLMError(
            f"The slides' tiles are not of one kind ({'; '.join(differences)}), and a slide "
            "classifier may learn that rather than disease: encode all slides alike, leave slides "
            "out of the table, or accept it with --allow-scale."
        )
    notes = [f"The slides' tiles differ in {sentence}." for sentence in differences]
    notes += filter(None, [unknown_note(tiles)])
    micrometres = sum(one.in_micrometres for one in tiles)
    if micrometres:
        notes.append(
            f"The coordinates of {micrometres} slides are micrometres, not pixels, and stand so in "
            "attention/."
        )
    return shared_attributes(tiles).to_dict(), notes


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
        assert_unlearned(cohort.groups, cohort.learned, validation=validation, test=test)
        parts = [(train, validation, test)]
    elif config.folds is not None:
        fold = _deal_folds(cohort, config.folds, config.seed)
        unseen = np.array([group not in cohort.learned for group in cohort.groups])
        parts = [
            (everyone[fold != k], everyone[:0], everyone[(fold == k) & unseen])
            for k in range(config.folds)
        ]
        parts.append((everyone, everyone[:0], everyone[:0]))
    else:
        train, test = split_groups(
            cohort.labels,
            cohort.groups,
            seed=(config.seed, _SPLIT),
            test_fraction=config.test_fraction,
            class_names=cohort.classes,
            pooled=cohort.learned,
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
                pooled=cohort.learned,
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
