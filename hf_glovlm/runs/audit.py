"""Data audit: what labelled images hold, and what would mislead whoever learns from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..data.check import DataReport
from ..data.file_statistics import FORMATS, STATISTICS, FileStatistics, read_file_statistics
from ..data.folder import column, is_synthetic
from ..data.groups import NEAR_DUPLICATE, group_rows
from ..data.looks import Looks
from ..data.splits import all_rows
from ..data.stains import read_stains
from ..rendering import group_unit
from .shortcuts import describe_probe, probe_labels

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["DataAudit", "audit_dataset"]

KIND = "data_audit"
BINS = (6, 20)  # of a histogram
KINDS = 12  # ways in which files are stored that are listed
EXAMPLES = 8  # pictures a class
CLUSTERS = 12  # of copies that are shown
COPIES = 4  # pictures of each
FEW = 5  # groups of a class, up to which that is pointed out
MOST = 0.5  # share of a class in one group, from which that is pointed out
ADVICE = 20  # sentences at most
UNEVEN = 5  # ratio of the largest class to the smallest, likewise


@dataclass
class DataAudit:
    """Result of `audit_dataset`.

    Attributes:
        facts: All numbers and sentences, JSON-serialisable, without names of files or patients.
        examples: Rows of each class that show it, from as many groups as can be.
        copies: Kinds of copies (`label_conflict`, `across_groups`), and rows of each cluster.
    """

    facts: dict[str, Any]
    examples: dict[str, list[int]]
    copies: list[tuple[str, list[int]]]


def audit_dataset(ds: "DatasetDict", report: DataReport, *, n_resamples: int = 1000) -> DataAudit:
    """Audit labelled images, after `check_dataset`: counts, files, copies, shortcuts.

    Images that cannot be read are counted and left out of all else.

    Args:
        ds: As `load_dataset` makes it.
        report: Of these data, with every image decoded.
        n_resamples: Bootstrap resamples of the shortcut probe.
    """
    every = all_rows(ds)
    sides = column(every, "split") if "split" in every.column_names else ["all"] * len(every)
    good = report.looks.readable
    rows, looks = (every, report.looks) if len(good) == len(every) else (
        every.select(good), report.looks.select(good)
    )  # fmt: skip
    facts: dict[str, Any] = {
        "kind": KIND,
        "version": 1,
        "hf_glovlm": __version__,
        "synthetic": is_synthetic(ds),
        "fingerprint": report.fingerprint,
        "images": len(every),
        "unreadable": len(every) - len(good),
        "left_out": report.left_out,
        "problems": _problems(report),
        "notes": [*dict.fromkeys(report.plain_notes)],
    }
    names = report.classes
    if not good:
        return DataAudit(facts | {"classes": []}, {}, [])
    labels = np.array(column(rows, "label"))
    groups = report.grouping or group_rows(rows, looks=looks)
    ids = np.array(groups.ids)
    statistics = read_file_statistics(rows, looks)
    unit = group_unit(groups.column)
    origins = {name: _origins(rows, name) for name in ("stain", "institution", "scanner")}
    origins = {name: of for name, of in origins.items() if any(of)}
    clusters = _find_copies(looks, labels, ids)
    facts |= {
        "group_column": groups.column,
        "unit": unit,
        "groups": len({*ids.tolist()}),
        "patients_known": groups.column == "patient_id",
        "images_per_group": _quartiles(np.unique(ids, return_counts=True)[1].astype(float)),
        "classes": _classes(names, labels, ids),
        "sides": {side: report.counts[side] for side in dict.fromkeys(sides)},
        "origins": {name: _cross(names, labels, of, ids) for name, of in origins.items()},
        "files": _files(names, labels, statistics),
        "statistics": _describe(names, labels, statistics),
        "copies": {kind: len(of) for kind, of in clusters.items()},
        "probe": probe_labels(statistics, labels.tolist(), names, ids.tolist(),
                              n_resamples=n_resamples),
    }  # fmt: skip
    facts["probe"]["sentence"] = describe_probe(facts["probe"])
    facts["advice"] = _advise(facts, origins)
    examples = {
        name: [good[row] for row in _spread(np.flatnonzero(labels == k), ids)]
        for k, name in enumerate(names)
    }
    shown = [(kind, c) for kind in ("label_conflict", "across_groups") for c in clusters[kind]]
    copies = [(kind, [good[row] for row in rows_of[:COPIES]]) for kind, rows_of in shown]
    return DataAudit(facts, examples, copies[:CLUSTERS])


def _problems(report: DataReport) -> list[dict[str, str]]:
    """Kinds and sentences of the problems, each once, without names."""
    once = {problem.plain: problem.kind for problem in report.details}
    return [{"kind": kind, "sentence": plain} for plain, kind in once.items()]


# ------------------------------------------------------------------------------------- counting


def _classes(names: Sequence[str], labels: NDArray[Any], ids: NDArray[Any]) -> list[dict[str, Any]]:
    """Images and groups of each class, and what its largest group holds."""
    classes = []
    for k, name in enumerate(names):
        sizes = Counter(ids[labels == k].tolist()).values()
        n, largest = sum(sizes), max(sizes, default=0)
        classes.append(
            {
                "name": name,
                "images": n,
                "share": _rounded(n / len(labels)),
                "groups": len(sizes),
                "largest_group": largest,
                "largest_share": _rounded(largest / n) if n else None,
            }
        )
    return classes


def _origins(rows: "Dataset", name: str) -> list[str | None]:
    """Stain, institution or scanner of each row, `None` where it is not stated."""
    if name == "stain":
        return read_stains(rows)
    return column(rows, name) if name in rows.column_names else [None] * len(rows)


def _cross(
    names: Sequence[str], labels: NDArray[Any], values: Sequence[str | None], ids: NDArray[Any]
) -> dict[str, Any]:
    """Images of each class by what is stated of their origin, and groups of each origin."""
    shown = sorted({value for value in values if value is not None})
    of = np.array([len(shown) if v is None else shown.index(v) for v in values])
    counts = np.zeros((len(names), len(shown) + 1), int)
    np.add.at(counts, (labels, of), 1)
    stated = [*shown, "not stated"] if counts[:, -1].any() else shown

    def largest(k: int, j: int) -> int:
        return max(Counter(ids[(labels == k) & (of == j)].tolist()).values(), default=0)

    return {
        "names": stated,
        "images": counts[:, : len(stated)].tolist(),
        "largest_group": [[largest(k, j) for j in range(len(stated))] for k in range(len(names))],
        "groups": [len({*ids[of == j].tolist()}) for j in range(len(stated))],
    }


def _files(
    names: Sequence[str], labels: NDArray[Any], statistics: FileStatistics
) -> list[dict[str, Any]]:
    """Ways in which files are stored, the commonest first, with images of each class."""
    parts = ("format", "channels", "quantisation", "subsampling")
    keys = np.column_stack([np.nan_to_num(statistics[name], nan=-1).round(2) for name in parts])
    kinds, of = np.unique(keys, axis=0, return_inverse=True)
    counts = np.zeros((len(kinds), len(names)), int)
    np.add.at(counts, (of.ravel(), labels), 1)
    order = np.argsort(-counts.sum(1), kind="stable")
    described = [
        {
            "format": FORMATS[int(kinds[i][0])],
            "channels": int(kinds[i][1]),
            "quantisation": None if kinds[i][2] < 0 else float(kinds[i][2]),
            "subsampling": _SUBSAMPLING.get(int(kinds[i][3])),
            "images": counts[i].tolist(),
        }
        for i in order
    ]
    rest = counts[order[KINDS:]].sum(0)
    other = {"format": "others", "channels": None, "quantisation": None, "subsampling": None}
    return described[:KINDS] + ([other | {"images": rest.tolist()}] if rest.any() else [])


_SUBSAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}


def _describe(
    names: Sequence[str], labels: NDArray[Any], statistics: FileStatistics
) -> dict[str, dict[str, Any]]:
    """Quartiles and histogram of each number among the statistics, by class."""
    described = {}
    n_bins = int(np.clip(np.sqrt(len(labels) / max(len(names), 1)), *BINS))
    for name in statistics.names:
        values, row = statistics[name], STATISTICS[name]
        seen = values[np.isfinite(values)]
        if not len(seen) or name in ("format", "channels", "subsampling"):
            continue
        own = [values[(labels == k) & np.isfinite(values)] for k in range(len(names))]
        low, high = np.quantile(seen, (0.005, 0.995))
        alike = bool(np.ptp(seen) <= 1e-9 * (1 + abs(seen[0])))
        edges = np.linspace(low, high if high > low else low + 1, n_bins + 1)
        described[name] = {
            "title": row.title,
            "unit": row.unit,
            "group": row.group,
            "alike": alike,
            "value": _rounded(seen[0]) if alike else None,
            "images": len(seen),
            "classes": {n: _quartiles(of) for n, of in zip(names, own, strict=True)},
            "edges": [] if alike else [_rounded(edge) for edge in edges],
            "shares": {} if alike else {
                n: [_rounded(x) for x in np.histogram(of.clip(low, high), edges)[0] / len(of)]
                for n, of in zip(names, own, strict=True)
                if len(of)
            },
        }  # fmt: skip
    return described


def _quartiles(values: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("least", "lower", "median", "upper", "most")
    of = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    return {name: _rounded(value) for name, value in zip(names, of, strict=True)}


def _rounded(value: float) -> float:
    """Four digits: as exact as a page shows it."""
    return float(f"{value:.4g}")


# --------------------------------------------------------------------------------------- copies


def _find_copies(
    looks: Looks, labels: NDArray[Any], ids: NDArray[Any]
) -> dict[str, list[list[int]]]:
    """Clusters of images with the same or nearly the same pixels, by what they do.

    `label_conflict` have more than one class, `across_groups` one class and more than one group,
    `within_groups` one of either.
    """
    clusters: dict[str, list[list[int]]] = {
        "label_conflict": [], "across_groups": [], "within_groups": []
    }  # fmt: skip
    for rows in looks.near_duplicates:
        if len({*labels[rows].tolist()}) > 1:
            by_label = {int(labels[row]): row for row in reversed(rows)}
            first = [by_label[label] for label in sorted(by_label)]  # one of each class is shown
            clusters["label_conflict"].append(first + [row for row in rows if row not in first])
        elif len({*ids[rows].tolist()}) > 1:
            by_group = {ids[row]: row for row in reversed(rows)}
            first = sorted(by_group.values())
            clusters["across_groups"].append(first + [row for row in rows if row not in first])
        else:
            clusters["within_groups"].append(rows)
    return clusters


def _spread(rows: NDArray[Any], ids: NDArray[Any]) -> list[int]:
    """Up to `EXAMPLES` rows, from one group after the other, evenly through each."""
    by_group: dict[str, list[int]] = {}
    for row in rows.tolist():
        by_group.setdefault(ids[row], []).append(row)
    turns = [of[:: max(len(of) // EXAMPLES, 1)] for _, of in sorted(by_group.items())]
    step = max(len(turns) // EXAMPLES, 1)
    turns = [*turns[::step], *(t for i, t in enumerate(turns) if i % step)]
    chosen = [of[turn] for turn in range(EXAMPLES) for of in turns if turn < len(of)]
    return chosen[:EXAMPLES]


# --------------------------------------------------------------------------------------- advice


def _advise(facts: Mapping[str, Any], origins: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Sentences on what the counts allow."""
    near = facts["group_column"] == NEAR_DUPLICATE
    unit, classes = "images" if near else facts["unit"], facts["classes"]
    one = unit.removesuffix("s")
    advice = []
    if near:
        advice.append(
            "Patients are unknown: images of one patient may be in training and test, and every "
            "result looks better than it is. Add a column patient_id, or --group-from."
        )
    elif not facts["patients_known"]:
        own = "as given in group_id" if facts["group_column"] == "group_id" else unit
        advice.append(
            f"Patients are unknown: groups are {own}, and one patient may have several. Intervals "
            f"over {unit} may be too narrow."
        )
    for row in classes:
        n = row["groups"]
        if n == 1:
            advice.append(
                f"Class {row['name']} lies in 1 {one}: it cannot be both learned and tested."
            )
        elif 1 < n <= FEW and facts["groups"] > n:
            advice.append(
                f"Class {row['name']} lies in {n} {unit}: at most {n - 1} can teach and 1 test."
            )
        share = row["largest_share"] or 0
        if n > 1 and share >= MOST and row["images"] >= FEW:
            advice.append(
                f"One {one} holds {row['largest_group']} of the {row['images']} images of class "
                f"{row['name']} ({share:.0%}): a result on it is mostly a result on that {one}."
            )
    images = [row["images"] for row in classes if row["images"]]
    if images and max(images) >= UNEVEN * min(images):
        advice.append(
            f"The largest class has {max(images) / min(images):.3g} times the images of the "
            "smallest: read balanced accuracy and the classes' own rows, not accuracy."
        )
    for name, of in facts["origins"].items():
        advice += _advise_origin(name, of, classes, one)
    if {"stain", "institution"} <= {*origins}:
        advice += _advise_aliased(origins["stain"], origins["institution"])
    more = len(advice) - ADVICE
    return advice if more < 1 else [*advice[:ADVICE], f"{more} more like these: see the tables."]


def _advise_origin(
    name: str, of: Mapping[str, Any], classes: Sequence[Mapping[str, Any]], one: str
) -> list[str]:
    """Where a class lies in one stain (institution, scanner) only, or an origin in few groups."""
    counts = np.array(of["images"])
    if counts.shape[1] < 2:
        return []
    advice = []
    for k, row in enumerate(classes):
        held = np.flatnonzero(counts[k])
        if len(held) == 1 and row["images"] >= FEW:
            advice.append(
                f"Every image of class {row['name']} is of {name} {of['names'][held[0]]}: a model "
                f"may learn the {name} in place of the class."
            )
        for j in held if len(held) > 1 else ():
            n, largest = of["images"][k][j], of["largest_group"][k][j]
            if n >= EXAMPLES and largest >= MOST * n and row["largest_share"] < MOST:
                advice.append(
                    f"One {one} holds {largest} of the {n} images of class {row['name']} whose "
                    f"{name} is {of['names'][j]}: what holds for that {name} is that {one}'s."
                )
    return advice


def _advise_aliased(stains: Sequence[str | None], places: Sequence[str | None]) -> list[str]:
    """Where a stain comes from one institution only, which has no other."""
    pairs = {*zip(stains, places, strict=True)}
    advice = []
    for stain in sorted({s for s, _ in pairs if s is not None}):
        homes = {place for s, place in pairs if s == stain}
        others = {s for s, place in pairs if place in homes}
        if len(homes) == 1 and others == {stain} and len({s for s, _ in pairs}) > 1:
            advice.append(
                f"Stain {stain} comes from one institution, which has no other stain: their "
                "effects cannot be parted."
            )
    return advice
