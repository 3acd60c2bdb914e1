"""Data set checks before any training: labels, groups, duplicates, readable images."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import GloVLMError
from ..files import digest_value
from .columns import MANIFEST
from .folder import column, content_hash, describe_reading, fingerprint_of, in_threads, open_image
from .splits import GROUP_COLUMNS, Groups, all_rows, assert_disjoint, group_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


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
        notes: Remarks, one sentence each.
        duplicates: File names of identical images, one list for each content.
        left_out: Number of files and rows that were not read, by kind.
        fingerprint: See `dataset_fingerprint`; None if a file could not be read.
        digests: Of what decides a run, by file name and in the order of the rows: `images`,
            `labels`, `groups` and the other `columns` (split, stain, ...).
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable dictionary."""
        return asdict(self)

    def raise_problems(self) -> None:
        """Raise the first problem, if there is one.

        Raises:
            GloVLMError: The first problem, and how many more there are.
        """
        if self.problems:
            more = len(self.problems) - 1
            rest = f" ({more} more: run `glovlm data check`)" if more else ""
            raise GloVLMError(self.problems[0] + rest)


def check_dataset(ds: "DatasetDict", *, decode: bool = True) -> DataReport:
    """Check a data set: count, decode and compare all images; never raises for its content.

    Problems: a single class; an image that cannot be read; identical images with different labels
    or in different groups; a group on two sides of a given split; a class of the test without a
    training image. Notes: what a group is, identical images within a group, classes in one group.

    Args:
        ds: As `load_dataset` makes it.
        decode: Decode every image; without it only the files' content is hashed, and without
            decoding there are no near-duplicate groups.
    """
    rows = all_rows(ds)
    names: list[str] = rows.features["label"].names
    labels: list[int] = column(rows, "label")
    files: list[str] = column(rows, "file_name")
    images: list[Any] = column(rows, "image")
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
    report.notes += [f"{note}." for note in reading.in_full]
    if len(set(labels)) < 2:
        report.problems.append(
            f"expected images of at least two classes, found one ({', '.join(names)}); add another "
            "class, or give the folder one level deeper if the classes lie there."
        )
    findings = in_threads(lambda image: _check_image(image, decode), images)
    broken = [error for _, error in findings if error]
    if len(broken) > 3:
        broken[3:] = [f"{len(broken) - 3} more images cannot be read."]
    report.problems += broken
    contents = [content for content, _ in findings]
    if all(contents):
        pairs = [(c, names[k]) for c, k in zip(contents, labels, strict=True) if c]
        report.fingerprint = fingerprint_of(pairs)
        report.digests = _digest_rows(rows, contents, names, files)
    groups = None
    if broken or not (decode or any(name in rows.column_names for name in GROUP_COLUMNS)):
        report.notes.append("groups were not determined, since the images were not all decoded.")
    else:
        groups = group_rows(rows)
        report.group_column = groups.column
        report.notes.append(groups.note + ".")
        _compare_sides(report, sides, labels, groups)
    _compare_duplicates(report, contents, labels, files, groups)
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


def _check_image(image: Any, decode: bool) -> tuple[str | None, str | None]:
    """Content hash of an image, or the error where it cannot be read."""
    try:
        content = content_hash(image)
        if decode:
            open_image(image)
    except GloVLMError as error:
        return None, str(error)
    return content, None


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
            report.notes.append(
                f"classes that lie in one group only cannot be in both training and test: "
                f"{', '.join(alone)}."
            )
        return
    try:
        assert_disjoint(groups.ids, **members)
    except GloVLMError as error:
        report.problems.append(str(error))
    for name in report.classes:
        if report.counts["test"][name] and not report.counts["train"][name]:
            report.problems.append(
                f"class {name} has {report.counts['test'][name]} test images and none to train "
                "on; add some to train or leave the class out."
            )


def _compare_duplicates(
    report: DataReport,
    contents: list[str | None],
    labels: list[int],
    files: list[str],
    groups: Groups | None,
) -> None:
    same: dict[str, list[int]] = {}
    for row, content in enumerate(contents):
        if content is not None:
            same.setdefault(content, []).append(row)
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
        report.problems.append(
            f"{len(relabelled)} images have different labels (for instance "
            f"{example(relabelled[0])}); keep the right one."
        )
    if apart and groups is not None:
        report.problems.append(
            f"{len(apart)} images are in several groups (for instance {example(apart[0])}), so "
            f"a copy could be in training and test; delete the copies or correct {groups.column}."
        )
    within = len(copies) - len(relabelled) - len(apart)
    if within:
        report.notes.append(f"{within} images are there more than once within a group.")
