"""Provenance of a model: the labels, groups and images that it learned from, through every run.

Groups and images are known by hashes alone. A group is known by the spelling key of its id
(`P001` and `p1` are one) within its institution, an image by `Looks.hashes`. The images are all of
the learned groups, so that a copy of any of them under another patient's name is known, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones import BACKBONES, known_rows, pretraining_notes, unknown_pretraining_notes
from ..data.catalog import find_cohorts
from ..data.columns import MANIFEST
from ..data.folder import column
from ..data.groups import GROUP_COLUMNS, NEAR_DUPLICATE
from ..data.looks import look_at
from ..files import check_fields, read_json, results_kind
from ..tables import spelling

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import Groups

Hashes = Sequence[tuple[str, str]]
# Hash of an id to the hashes of its institutions, `None` for one that is not known.
Ids = Mapping[str, frozenset[str | None]]

_NULL = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {  # of a run's results.json
    "data": (dict,),
    "data.name": (str, _NULL),
    "data.group_column": (str, _NULL),
    "data.support_groups_sha256": (list, _NULL),
    "data.support": (dict, _NULL),
    "data.support.label_budget": (int, _NULL),
    "data.learned_from": (dict, _NULL),
    "backbone": (dict, _NULL),
    "backbone.adapted": (list, _NULL),
}
_LEARNED: dict[str, tuple[type, ...]] = {
    "labels": (int,), "complete": (bool,), "groups": (dict,), "images": (list,),
}  # fmt: skip
_FORMER: dict[str, tuple[type, ...]] = {
    "method": (str, _NULL), "data": (str, _NULL), "labels": (int, _NULL),
}  # fmt: skip
UNKNOWN = "Whether the model learned from some of these groups cannot be known."
_EARLIER = (
    "The model's run is of an earlier version, which kept no hashes of images: groups were "
    "compared by their ids alone."
)
_UNPLACED = (
    "The institution of some ids is known on one side only: an id that both sides use counted as "
    "the same group."
)


def hash_groups(groups: Iterable[str]) -> set[str]:
    """Hashes by which results know the groups that a model learned from (SHA-256)."""
    return {_hash(group) for group in groups}


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """Rows that a model learned from.

    Attributes:
        rows: Whether it learned from each, or from another image of its group.
        known: Whether anything could be compared.
        notes: What could not be compared, one sentence each.
    """

    rows: list[bool]
    known: bool
    notes: list[str]


@dataclass(frozen=True)
class Provenance:
    """What a model learned from, in its own run and in those that its backbone came from.

    Attributes:
        groups: The ids of the groups, by the column that holds them.
        images: Hashes of all images of these groups; `None` where an earlier version kept none.
        labels: Label budget of all runs.
        chain: `method`, `data` and `labels` of each run before this one, from the first on.
        complete: Whether all is known of every run.
    """

    groups: Mapping[str, Ids] = field(default_factory=dict)
    images: frozenset[str] | None = frozenset()
    labels: int = 0
    chain: tuple[Mapping[str, Any], ...] = ()
    complete: bool = True

    @classmethod
    def of_rows(
        cls, rows: "Dataset", groups: "Groups", hashes: Hashes, learned: Iterable[int], labels: int
    ) -> "Provenance":
        """Provenance of a run.

        Args:
            rows: All rows, of every side.
            groups: Their groups.
            hashes: Of their images.
            learned: Rows that were learned from, or that something was chosen or calibrated on.
            labels: Label budget.
        """
        held = {groups.ids[row] for row in learned}
        among = [row for row, group in enumerate(groups.ids) if group in held]
        names = {groups.column, *GROUP_COLUMNS}.intersection(rows.column_names)
        places = _institutions(rows)
        triples = [
            (name, _hash(spelling(value)), places[row])
            for name in names
            for row, value in enumerate(column(rows, name))
            if value is not None and groups.ids[row] in held
        ]
        images = frozenset(value for row in among for value in hashes[row])
        return cls(_by_column(triples), images, labels)

    @classmethod
    def of_results(cls, results: Mapping[str, Any]) -> "Provenance":
        """Provenance that the results of a run state, also those of an earlier version.

        Raises:
            GloVLMError: They are damaged.
        """
        path = Path("results.json")
        check_fields(path, results, _FIELDS)
        data = results["data"]
        stated = data.get("learned_from")
        if stated is None:  # an earlier version: plain hashes of the groups' ids
            name = data.get("group_column") or ""
            plain = [(name, str(one), None) for one in data.get("support_groups_sha256") or ()]
            budget = (data.get("support") or {}).get("label_budget") or 0
            return cls(_by_column(plain), None, budget)
        check_fields(path, stated, _LEARNED)
        triples = []
        for name, pairs in stated["groups"].items():
            check_fields(path, {"groups": pairs}, {"groups": (list,)})
            for pair in pairs:
                check_fields(path, {"groups": pair}, {"groups": (list,)})
                key, place = (*pair, None, None)[:2]
                triples.append((name, str(key), None if place is None else str(place)))
        chain = tuple((results.get("backbone") or {}).get("adapted") or ())
        for former in chain:
            check_fields(path, {"adapted": former}, {"adapted": (dict,)})
            check_fields(path, former, _FORMER)
        images = frozenset(map(str, stated["images"]))
        return cls(_by_column(triples), images, stated["labels"], chain, stated["complete"])

    def to_dict(self) -> dict[str, Any]:
        """As results hold it under `data.learned_from`."""
        pairs = {
            name: [[key, place] for key, of in by.items() for place in of]
            for name, by in self.groups.items()
        }
        return {
            "labels": self.labels,
            "complete": self.complete and self.images is not None,
            "groups": {
                name: sorted(of, key=lambda pair: (pair[0], pair[1] or ""))
                for name, of in sorted(pairs.items())
            },
            "images": sorted(self.images or ()),
        }

    def after(self, former: "Provenance") -> "Provenance":
        """Provenance of a model of this run whose backbone came from former ones."""
        parts = (former.groups, self.groups)
        triples = [
            (name, key, place)
            for groups in parts
            for name, by in groups.items()
            for key, of in by.items()
            for place in of
        ]
        return Provenance(
            _by_column(triples),
            (former.images or frozenset()) | (self.images or frozenset()),
            former.labels + self.labels,
            former.chain,
            former.complete and former.images is not None,
        )

    def seen(self, rows: "Dataset", groups: "Groups", hashes: Hashes | None = None) -> Seen:
        """Which rows the model learned from, or from another image of their group.

        Ids are compared in the first column that both sides have (slides may be numbered anew in
        each patient) and within an institution, where both sides name one; images everywhere.

        Args:
            rows: Images as `load_dataset` makes them.
            groups: Their groups.
            hashes: Of their images, if at hand.
        """
        places, compared, by_name = _institutions(rows), False, False
        learned = [False] * len(groups.ids)
        for row, (ids, keys) in enumerate(self._shared_ids(rows, groups)):
            compared |= ids is not None
            of = next((ids[key] for key in keys if key in ids), None) if ids else None
            if of is not None and (places[row] is None or not {None, places[row]}.isdisjoint(of)):
                learned[row] = True
                by_name |= (places[row] is None) != (of == {None})
        if self.images:
            hashes = hashes or look_at(rows.select_columns(["image"])).hashes
            for row, pair in enumerate(hashes):
                learned[row] = learned[row] or not self.images.isdisjoint(pair)
        held = {group for group, one in zip(groups.ids, learned, strict=True) if one}
        notes = []
        if not compared and self.images:
            wanting = f"these data have no {' or '.join(self.groups)}" if self.groups else ""
            wanting = wanting or "its groups have no ids"
            notes.append(f"What the model learned from is known by the images alone: {wanting}.")
        elif compared and self.images is None:
            notes.append(_EARLIER)
        if by_name:
            notes.append(_UNPLACED)
        known = compared or self.images is not None
        if not (known and self.complete):
            notes.append(UNKNOWN)
        return Seen([group in held for group in groups.ids], known, notes)

    def _shared_ids(
        self, rows: "Dataset", groups: "Groups"
    ) -> list[tuple[Ids | None, tuple[str, ...]]]:
        """For each row the ids to compare with, and the hashes by which its own id is known."""
        names = [groups.column, *GROUP_COLUMNS, *self.groups]
        if self.images is not None:  # what is like another image is known by content alone
            names = [name for name in names if name != NEAR_DUPLICATE]
        shared: list[tuple[Ids | None, tuple[str, ...]]] = [(None, ())] * len(groups.ids)
        for name in dict.fromkeys(names):
            given = name in rows.column_names
            if name not in self.groups or not (given or name == groups.column):
                continue
            values = column(rows, name) if given else groups.ids
            for row, value in enumerate(values):
                if value is not None and shared[row][0] is None:
                    keys = (spelling(value), value, groups.ids[row])
                    shared[row] = self.groups[name], tuple(map(_hash, keys))
        return shared


# What is known of a model that was adapted by a run whose results do not lie beside it.
ADAPTED = Provenance(chain=({"method": None, "data": None, "labels": None},), complete=False)


def former_provenance(backbone: str) -> Provenance | None:
    """Provenance of a backbone that is a run's model: its chain ends with that run.

    Args:
        backbone: As `load_backbone` takes it, or a folder that `glovlm export` wrote.

    Returns:
        `None` where it is none, or where no results lie beside it.

    Raises:
        GloVLMError: Its results are damaged.
    """
    from ..inference.exported import RUN, is_export

    folder = Path(backbone).expanduser()
    run = folder.parent if folder.name == "model" else folder
    models = (folder / "config.json", folder / "model" / "config.json")
    exported = is_export(folder)
    if backbone in BACKBONES or not (exported or any(file.is_file() for file in models)):
        return None
    kept = folder / RUN if exported else run / "results.json"
    if not kept.is_file():
        return None
    results = read_json(kept)
    if results_kind(results) != "adaptation":
        return None
    own = Provenance.of_results(results)
    before = sum(of["labels"] or 0 for of in own.chain)
    method = results.get("method")
    link = {
        "method": method.get("name") if isinstance(method, dict) else None,
        "data": results["data"].get("name"),
        "labels": own.labels - before,
    }
    return replace(own, chain=(*own.chain, link))


def describe_chain(base: str, chain: Sequence[Mapping[str, Any]]) -> str:
    """Name of a backbone with what was made of its base: `plip, adapted by lora on glomeruli`."""
    steps = [
        f"by {of['method'] or 'a run that is not known'}"
        + (f" on {of['data']}" if of["data"] else "")
        for of in chain
    ]
    return f"{base}, adapted {', then '.join(steps)}" if steps else base


def former_notes(base: str, former: Provenance | None) -> list[str]:
    """Notes on a backbone that was adapted before; none on one that was not."""
    if former is None:
        return []
    name = describe_chain(base, former.chain)
    if former is ADAPTED:
        return [f"The backbone is {name}, whose results do not lie beside it. {UNKNOWN}"]
    notes = [
        f"The backbone is {name}: the {former.labels} labels of that count in the label budget, "
        "and its groups and images are neither tested nor calibrated on."
    ]
    if not former.complete or former.images is None:
        notes.append(f"Not all is known of what it learned from. {UNKNOWN}")
    return notes


def is_adapted(config: Any) -> bool:
    """Whether a loaded backbone was part of a classifier of ours."""
    return "GloVLMForImageClassification" in (config.architectures or ())


def _by_column(triples: Iterable[tuple[str, str, str | None]]) -> dict[str, Ids]:
    """Institutions by id by column."""
    table: dict[str, dict[str, set[str | None]]] = {}
    for name, key, place in triples:
        table.setdefault(name, {}).setdefault(key, set()).add(place)
    return {
        name: {key: frozenset(of) for key, of in by.items()} for name, by in table.items() if name
    }


def _institutions(rows: "Dataset") -> list[str | None]:
    """Hash of each row's institution, in one spelling; `None` where it is not known."""
    if "institution" not in rows.column_names:
        return [None] * len(rows)
    return [value and _hash(spelling(value)) for value in column(rows, "institution")]


# ------------------------------------------------------------------------------------ pretraining


def contamination_notes(
    backbone: str | None, data: str, rows: "Dataset", *, synthetic: bool = False
) -> list[str]:
    """Notes on images that a backbone saw in pretraining, or may have seen.

    Args:
        backbone: `config.backbone_name`.
        data: Name of the data.
        rows: Their ids, institutions and file names name cohorts, too.
        synthetic: Whether the images were drawn, which no backbone saw.
    """
    names = {"file_name", *(c for c in MANIFEST if c.endswith("_id")), "institution"}
    texts = {v for name in names.intersection(rows.column_names) for v in column(rows, name) if v}
    cohorts = find_cohorts(data, texts)
    saw = [
        note
        for row in known_rows(backbone)
        for note in pretraining_notes(row, data=data, cohorts=cohorts)
    ]
    return saw if synthetic else [*saw, *unknown_pretraining_notes(backbone, cohorts)]
