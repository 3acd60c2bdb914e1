"""Data set checks before any training: labels, groups, duplicates, readable images."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GloVLMError
from ..files import digest_value
from .catalog import load_classes
from .columns import MANIFEST
from .folder import column, describe_reading, fingerprint_of
from .groups import (
    GROUP_COLUMNS,
    Groups,
    differing_spellings,
    group_rows,
    ids_within_institutions,
    in_quotes,
)
from .looks import Looks, Store, look_at
from .splits import all_rows, assert_disjoint, draw_episode
from .stains import contradictions

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class Problem:
    """Problem of a data set.

    Attributes:
        kind: `classes`, `unreadable`, `spelling`, `split`, `label_conflict`, `across_groups` or
            `drawing`.
        sentence: What is wrong and what to do, with names of files or patients.
        plain: The same without such names, for what leaves the house.
        rows: Rows that it is about, in lists of those that belong together.
    """

    kind: str
    sentence: str
    plain: str
    rows: Sequence[Sequence[int]] = ()


@dataclass
class DataReport:
    """Report of `check_dataset`.

    Attributes:
        classes: Class names, sorted.
        counts: Images per split and class.
        group_column: What a group is.
        groups: Groups per split.
        groups_per_class: Groups that hold a class.
        problems: Errors that must be mended before any training, one sentence each.
        details: The problems with their kinds, in the same order.
        notes: Remarks, one sentence each.
        plain_notes: The notes without names of files.
        duplicates: File names of images with the same pixels, one list for each.
        left_out: Number of files and rows that were not read, by kind.
        fingerprint: See `dataset_fingerprint`; None if a file could not be read.
        digests: Of what decides a run, by file name and in the order of the rows: `images`,
            `labels`, `groups` and the other `columns` (split, stain, ...).
        grouping: The group of each row; `None` where the images were not all decoded.
        looks: What was seen of each row's image.
    """

    classes: list[str]
    counts: dict[str, dict[str, int]]
    group_column: str = ""
    groups: dict[str, int] = field(default_factory=dict)
    groups_per_class: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    fingerprint: str | None = None
    digests: dict[str, str] = field(default_factory=dict)
    details: list[Problem] = field(default_factory=list, repr=False)
    plain_notes: list[str] = field(default_factory=list, repr=False)
    grouping: Groups | None = field(default=None, repr=False)
    looks: Looks = field(default_factory=Looks, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable dictionary, without what is known of single rows."""
        own = ("grouping", "looks", "details", "plain_notes")
        names = [entry.name for entry in fields(self) if entry.name not in own]
        return {name: getattr(self, name) for name in names}

    def add_problem(
        self, kind: str, sentence: str, plain: str = "", rows: Sequence[Sequence[int]] = ()
    ) -> None:
        """Add a problem, see `Problem`; without names in it, its sentence is plain already."""
        self.problems.append(sentence)
        self.details.append(Problem(kind, sentence, plain or sentence, rows))

    def add_notes(self, notes: Iterable[str], plain: Iterable[str] | None = None) -> None:
        """Add remarks; `plain` are the same without names of files."""
        kept = [*notes]
        self.notes += kept
        self.plain_notes += kept if plain is None else plain

    def raise_problems(self) -> None:
        """Raise the first problem, if there is one.

        Raises:
            GloVLMError: The first problem, and how many more there are.
        """
        if self.problems:
            more = len(self.problems) - 1
            rest = f" ({more} more: run `glovlm data check`)" if more else ""
            raise GloVLMError(self.problems[0] + rest)


def check_dataset(
    ds: "DatasetDict",
    *,
    decode: bool = True,
    drawing: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    cache: Store | None = None,
    before: Looks | None = None,
) -> DataReport:
    """Check a data set: count, decode and compare all images; never raises for its content.

    Problems: a single class; an image that cannot be read; the same pixels with different labels or
    in different groups; classes or ids that differ in spelling only; a group on two sides of a
    given split; a class of the test without a training image; what an episode cannot be drawn for.
    Notes: what a group is, identical images within a group, classes in one group, names of files
    that say another stain than is stated.

    Args:
        ds: As `load_dataset` makes it.
        decode: Decode every image; without it only the files' content is hashed, and without
            decoding there are no near-duplicate groups.
        drawing: Settings of `draw_episode`: draw one as `glovlm train` does, and state as a problem
            why that is refused.
        source: Where the data lie: its `classes.yaml` is read, too, when an episode is drawn.
        cache: Keeps what decoding an image says, such as `FeatureCache`; what is there is read,
            and not decoded again.
        before: Looks at the same rows without decoding, if at hand.
    """
    rows = all_rows(ds)
    names: list[str] = rows.features["label"].names
    labels: list[int] = column(rows, "label")
    files: list[str] = column(rows, "file_name")
    sides = column(rows, "split") if "split" in rows.column_names else ["all"] * len(labels)
    tally = Counter(zip(sides, labels, strict=True))
    report = DataReport(
        classes=names,
        counts={
            side: {name: tally[side, k] for k, name in enumerate(names)}
            for side in dict.fromkeys(sides)
        },
    )
    reading = describe_reading(ds)
    report.left_out = reading.left_out
    report.add_notes((f"{n}." for n in reading.in_full), (f"{n}." for n in reading.notes))
    report.add_notes(contradictions(rows))
    if len(set(labels)) < 2:
        report.add_problem(
            "classes",
            f"expected images of at least two classes, found one ({', '.join(names)}); add another "
            "class, or give the folder one level deeper if the classes lie there.",
        )
    looks = report.looks = look_at(rows, decode=decode, store=cache, before=before)
    broken = looks.errors
    n_broken = len(broken)
    if n_broken > 3:
        broken[3:] = [f"{n_broken - 3} more images cannot be read."]
    for sentence in broken:
        plain = "1 image cannot be read" if n_broken == 1 else f"{n_broken} images cannot be read"
        report.add_problem("unreadable", sentence, f"{plain}; replace or remove what is damaged.")
    contents = looks.contents
    if all(contents):
        pairs = [(c, names[k]) for c, k in zip(contents, labels, strict=True) if c]
        report.fingerprint = fingerprint_of(pairs)
        report.digests = _digest_rows(rows, contents, names, files)
        if any(looks.mask_contents):
            report.digests["masks"] = digest_value([files, looks.mask_contents])
    groups = None
    if broken or not (decode or any(name in rows.column_names for name in GROUP_COLUMNS)):
        report.add_notes(["groups were not determined, since the images were not all decoded."])
    else:
        groups = report.grouping = group_rows(rows, looks=looks)
        report.group_column = groups.column
        report.add_notes([groups.note + "."])
        _compare_spellings(report, rows, groups)
        _compare_sides(report, sides, labels, groups)
    same = [pixels or content for pixels, content in zip(looks.pixels, contents, strict=True)]
    _compare_duplicates(report, same, labels, files, groups)
    if drawing is not None and not report.problems:
        try:
            load_classes(names, source=source)
            draw_episode(rows, groups=groups, **drawing)
        except GloVLMError as error:
            sentence = f"`glovlm train` would refuse these data: {error}"
            named = groups is not None and {*groups.ids} & {*re.split(r"[\s(),;']+", str(error))}
            plain = "`glovlm train` would refuse these data; `glovlm data check` says why."
            report.add_problem("drawing", sentence, plain if named else "")
    return report


def _digest_rows(
    rows: "Dataset", contents: list[str | None], names: list[str], files: list[str]
) -> dict[str, str]:
    """Digests of what decides a run, so that a change can be named."""
    by_group = {*GROUP_COLUMNS, "glomerulus_id"}
    others = sorted({*MANIFEST, "split"} - by_group)

    def columns(among: Iterable[str]) -> dict[str, list[Any]]:
        return {name: column(rows, name) for name in among if name in rows.column_names}

    return {
        "images": digest_value([files, contents]),
        "labels": digest_value([files, names, column(rows, "label")]),
        "groups": digest_value([files, columns(sorted(by_group))]),
        "columns": digest_value([files, columns(others)]),
    }


def _compare_spellings(report: DataReport, rows: "Dataset", groups: Groups) -> None:
    """Classes, and ids that make other groups, in more than one spelling."""
    for written in differing_spellings(report.classes):
        report.add_problem(
            "spelling",
            f"the classes {in_quotes(written)} differ in spelling only; give every image of them "
            "one label (the name of the class folder, or the column label).",
        )
    ranks = list(GROUP_COLUMNS)
    lower = ranks[ranks.index(groups.column) + 1 :] if groups.column in ranks else []
    for name in (groups.column, *lower, "glomerulus_id"):
        if name not in rows.column_names:
            continue
        ids = ids_within_institutions(rows, name)
        if name in lower:  # there, an id groups the rows alone that have no better one
            better = column(rows, groups.column)
            ids = [value if one is None else None for value, one in zip(ids, better, strict=True)]
        of: dict[str, set[str]] = {}
        for value, group in zip(ids, groups.ids, strict=True):
            if value is not None:
                of.setdefault(value, set()).add(group)
        apart = [
            written
            for written in differing_spellings(of)
            if len(set.union(*(of[value] for value in written))) > 1
        ]
        if apart:
            more = f" ({len(apart) - 1} more like these)" if len(apart) > 1 else ""
            what = f"differ in spelling only{more}, so one patient could be in training and test"
            report.add_problem(
                "spelling",
                f"the values {in_quotes(apart[0])} of {name} {what}; write each id in one way.",
                f"values of {name} {what}; write each id in one way.",
            )


def _compare_sides(report: DataReport, sides: list[str], labels: list[int], groups: Groups) -> None:
    members: dict[str, list[int]] = {}
    for row, side in enumerate(sides):
        members.setdefault(side, []).append(row)
    report.groups = {side: len({groups.ids[row] for row in rows}) for side, rows in members.items()}
    held: dict[int, set[str]] = {k: set() for k in range(len(report.classes))}
    for label, group in zip(labels, groups.ids, strict=True):
        held[label].add(group)
    report.groups_per_class = {name: len(held[k]) for k, name in enumerate(report.classes)}
    if len(members) == 1:
        alone = [name for name, n in report.groups_per_class.items() if n == 1]
        if alone:
            report.add_notes(
                [
                    "classes that lie in one group only cannot be in both training and test: "
                    f"{', '.join(alone)}."
                ]
            )
        return
    try:
        assert_disjoint(groups.ids, **members)
    except GloVLMError as error:
        of = Counter(group for rows in members.values() for group in {groups.ids[r] for r in rows})
        shared = sum(n > 1 for n in of.values())
        report.add_problem(
            "split",
            str(error),
            f"{shared} {'group stands' if shared == 1 else 'groups stand'} on two sides of the "
            "given split; a patient or slide may stand on one side only: correct the split.",
        )
    for name in report.classes:
        if report.counts["test"][name] and not report.counts["train"][name]:
            report.add_problem(
                "split",
                f"class {name} has {report.counts['test'][name]} test images and none to train "
                "on; add some to train or leave the class out.",
            )


def _compare_duplicates(
    report: DataReport,
    images: list[str | None],
    labels: list[int],
    files: list[str],
    groups: Groups | None,
) -> None:
    same: dict[str, list[int]] = {}
    for row, image in enumerate(images):
        if image is not None:
            same.setdefault(image, []).append(row)
    copies = [rows for rows in same.values() if len(rows) > 1]
    report.duplicates = [[files[row] for row in rows] for rows in copies]
    relabelled = [rows for rows in copies if len({labels[row] for row in rows}) > 1]
    apart = [
        rows
        for rows in copies
        if groups is not None
        and rows not in relabelled
        and len({groups.ids[row] for row in rows}) > 1
    ]

    def example(rows: list[int]) -> str:
        return ", ".join(files[row] for row in rows[:3])

    if relabelled:
        what, do = f"{len(relabelled)} images have different labels", "keep the right one."
        report.add_problem(
            "label_conflict",
            f"{what} (for instance {example(relabelled[0])}, the same pixels); {do}",
            f"{what} in copies with the same pixels; {do}",
            relabelled,
        )
    if apart and groups is not None:
        what = f"{len(apart)} images are in several groups"
        do = (
            "so a copy could be in training and test; delete the copies or correct "
            f"{groups.column}."
        )
        report.add_problem(
            "across_groups",
            f"{what} (for instance {example(apart[0])}, the same pixels), {do}",
            f"{what}, as copies with the same pixels, {do}",
            apart,
        )
    within = len(copies) - len(relabelled) - len(apart)
    if within:
        report.add_notes([f"{within} images are there more than once within a group."])
