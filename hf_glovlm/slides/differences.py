"""Difference of outlines: what a reader added, removed, reclassified and drew anew in a file.

The file came from QuPath, into which the results had been brought. It may hold more than the
results do (a tissue annotation, arteries), name objects anew and list them in another order.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.listing import few
from ..errors import GloVLMError, nearest
from ..tables import spelling
from .files.annotations import (
    NoObject,
    SlideObject,
    by_name,
    find_repeats,
    overlap,
    read_geojson,
    read_outlines,
)
from .files.coordinates import LEVEL0, Origin
from .files.geojson import list_features, parse_json, read_unpacked
from .files.matching import is_redrawn, match_objects

UNUSUAL = "none that is counted by the rules of outlines"
READ = ("read by", "read on", "predicted class")  # metadata of an object that a reader read


@dataclass(frozen=True)
class Correction:
    """Correction of one object.

    Attributes:
        before: As the results hold it; `None` of one that was added.
        after: As the reader left it; `None` of one that was removed.
        redrawn: Whether its outline was changed, see `is_redrawn`.
        reason: Why an object that is in the reader's file counts as removed.
    """

    before: SlideObject | None
    after: SlideObject | None
    redrawn: bool = False
    reason: str | None = None

    @property
    def id(self) -> str:
        """The id in the results; of an added object its own."""
        item = self.after if self.before is None else self.before
        assert item is not None
        return item.id

    @property
    def reclassified(self) -> bool:
        """Whether the reader gave it another class, or took its class away."""
        if self.before is None or self.after is None:
            return False
        return self.before.label != self.after.label

    @property
    def kinds(self) -> list[str]:
        """What was done: `added`, `removed`, `reclassified`, `redrawn`; else `unchanged`."""
        if self.before is None:
            return ["added"]
        if self.after is None:
            return ["removed"]
        kinds = {"reclassified": self.reclassified, "redrawn": self.redrawn}
        return [name for name, done in kinds.items() if done] or ["unchanged"]

    def is_read(self, all_read: bool) -> bool:
        """Whether its class is the reader's: given by the reader, or all objects were read."""
        if self.after is None or self.after.label is None:
            return False
        return all_read or self.before is None or self.reclassified

    def describe(self, kind: str) -> dict[str, Any]:
        """What `corrections.json` says of it under one of its kinds."""
        before, after = self.before, self.after
        if before is not None and after is not None:
            if kind == "redrawn":
                return {"id": self.id, "overlap": round(overlap(before, after), 2)}
            return {"id": self.id, "from": before.label, "to": after.label}
        item = before or after
        entry = {"id": self.id, "class": item and item.label}
        return entry | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True)
class Difference:
    """Difference between the objects of a slide and a reader's file.

    Attributes:
        corrections: One an object: those of the results in their order, then the added ones.
        repeated: Ids in the file that outline an object again; they are passed over.
        left_out: Ids in the file that are no objects of the results and none to count, by reason.
        notes: Sentences for the results.
    """

    corrections: Sequence[Correction]
    repeated: Sequence[str] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many objects were added, removed, reclassified, redrawn and left unchanged."""
        kinds = [kind for one in self.corrections for kind in one.kinds]
        names = ("added", "removed", "reclassified", "redrawn", "unchanged")
        return {name: kinds.count(name) for name in names}


def read_all(path: Path, origin: Origin = LEVEL0) -> list[SlideObject]:
    """Every outlined object of a GeoJSON file; none of a collection that holds no feature."""
    features = list_features(parse_json(read_unpacked(path), path), path)
    if next(features, None) is None:
        return []
    return read_geojson(path, origin=origin)


def compare_objects(
    before: Sequence[SlideObject],
    path: Path,
    classes: Sequence[str],
    *,
    origin: Origin = LEVEL0,
    exclude: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    mpp: float | None = None,
) -> Difference:
    """Compare the objects of a slide's results with a reader's file.

    Objects are matched by id and place (`match_objects`). One whose class QuPath reserves
    (`Ignore*`) counts as removed. What the file holds beside them is added where it is of one of
    the classes or of none, and where the rules of `read_outlines` would count it.

    Args:
        before: The objects of the results.
        path: The reader's file.
        classes: Classes that are counted: the model's, and others that the reader uses.
        origin: Where the file counts from, unless it states that itself.
        exclude: Classes that were left out when the objects were counted.
        size: Width and height of the slide at level 0.
        mpp: Micrometres per pixel of level 0.

    Raises:
        GloVLMError: The file cannot be read, or no object in it has a class that is counted though
            it holds objects of the results: they were exported without their results.
    """
    known = {_key(name): name for name in classes}
    every = [_named(item, known) for item in read_all(path, origin)]
    pairs = dict(match_objects(before, every))
    if pairs and not any(item.label in classes for item in every):
        raise GloVLMError(
            f"{path} holds {len(pairs)} objects of the results, and no class of theirs "
            f"({few(list(classes))}): bring objects.geojson into QuPath before it is corrected "
            "there, or name the classes that the reader gave (--classes NAME)."
        )
    corrections = []
    for i, item in enumerate(before):
        after = every[pairs[i]] if i in pairs else None
        if after is not None and (after.label or "").endswith("*"):
            corrections.append(Correction(item, None, reason=f"class {after.label}"))
        else:
            redrawn = after is not None and is_redrawn(item, after)
            corrections.append(Correction(item, after, redrawn))

    taken = [every[j] for j in pairs.values()]
    rest = [every[j] for j in sorted(set(range(len(every))) - {*pairs.values()})]
    first = find_repeats([*taken, *rest]).tolist()
    repeats = {item.id for i, item in enumerate(rest, start=len(taken)) if first[i] != i}
    reasons = _reasons(path, origin, exclude, size, mpp) if len(repeats) < len(rest) else {}
    left_out: dict[str, list[str]] = {}
    for item in rest:
        reason = reasons.get(item.id)
        if reason is None and item.label not in (None, *classes):
            reason = f"class {item.label}, which is not counted"
        if item.id in repeats:
            continue
        if reason is None:
            corrections.append(Correction(None, _renamed(item, before)))
        else:
            left_out.setdefault(reason, []).append(item.id)
    return Difference(
        corrections,
        [item.id for item in rest if item.id in repeats],
        left_out,
        _notes(corrections, classes, len(repeats), left_out, [item.label for item in rest]),
    )


def _key(label: str) -> tuple[str, ...]:
    """Key of a class in any spelling; QuPath makes `a: b` of `a:b`."""
    return tuple(spelling(part) for part in label.split(":"))


def _named(item: SlideObject, known: Mapping[tuple[str, ...], str]) -> SlideObject:
    """An object with its class spelled as the model does."""
    label = item.label and known.get(_key(item.label), item.label)
    return item if label == item.label else replace(item, label=label)


def _renamed(item: SlideObject, others: Sequence[SlideObject]) -> SlideObject:
    """An added object, with an id of its own where the file gave it one of the results."""
    if item.id not in {other.id for other in others}:
        return item
    text = f"added {json.dumps(item.geometry, sort_keys=True)}"
    members = {name: value for name, value in item.members.items() if name != "id"}
    return replace(item, id=str(uuid.uuid5(uuid.NAMESPACE_OID, text)), members=members)


def _reasons(
    path: Path,
    origin: Origin,
    exclude: Sequence[str],
    size: tuple[int, int] | None,
    mpp: float | None,
) -> dict[str, str]:
    """Why objects of a file are none to count, by id."""
    try:
        left_out: Mapping[str, Sequence[str]] = read_outlines(
            path, origin=origin, exclude=exclude, size=size, mpp=mpp
        ).left_out
    except NoObject as error:
        left_out = error.left_out
    except GloVLMError:  # nothing is left for reasons of several kinds
        left_out = {UNUSUAL: [item.id for item in read_geojson(path, origin=origin)]}
    return {name: reason for reason, ids in left_out.items() for name in ids}


def _notes(
    corrections: Sequence[Correction],
    classes: Sequence[str],
    repeated: int,
    left_out: Mapping[str, Sequence[str]],
    beside: Sequence[str | None],
) -> list[str]:
    """Sentences on what is not counted, or not as a person may think."""
    notes = []
    after = [one.after for one in corrections if one.after is not None]
    without = sum(item.label is None for item in after)
    if without:
        notes.append(f"{without} objects have no class and are not counted.")
    others = [item.label for item in after if item.label and item.label not in classes]

    def hints(labels: Iterable[str | None]) -> str:
        unknown = sorted({label for label in labels if label and label not in classes})
        return "".join(dict.fromkeys(nearest(name, classes) for name in unknown))

    if others:
        notes.append(
            f"{len(others)} objects have classes that the model does not have "
            f"({few(sorted({*others}))}) and are not counted: name those that are lesions of "
            f"glomeruli (--classes NAME).{hints(others)}"
        )
    redrawn = sum(one.redrawn and not one.reclassified for one in corrections)
    if redrawn:
        notes.append(
            f"{redrawn} objects were drawn anew; unless they were read, their class is the one of "
            "the outline before: `glovlm slide --objects` classifies them anew."
        )
    if repeated:
        notes.append(f"{repeated} outlines repeat an object and are passed over.")
    if left_out:
        listed = ", ".join(f"{reason} ({len(ids)})" for reason, ids in left_out.items())
        notes.append(
            f"Passed over, as they are no objects of the results: {listed}.{hints(beside)}"
        )
    return notes


def corrected_object(
    correction: Correction, reader: str, date: str, *, is_read: bool
) -> SlideObject:
    """The object as the reader left it, in the results' own terms.

    It keeps its id, and its outline to the last digit unless that was changed; what the results
    said of it (probabilities, doubt) stays beside what the reader wrote. One that was read says by
    whom, when and what the model had called it, in `properties.metadata`.
    """
    before, after = correction.before, correction.after
    assert after is not None
    own = dict(after.properties)
    stated = {} if before is None else before.properties
    properties: dict[str, Any] = {**stated, **own}
    for name in ("classification", "label"):  # a class that was taken away stays away
        if name not in own:
            properties.pop(name, None)
    for name in ("measurements", "metadata"):
        parts = [by_name(part.get(name)) for part in (stated, own)]
        if any(parts):
            properties[name] = parts[0] | parts[1]
    classification = properties.get("classification")
    if after.label is not None:
        colour = classification if isinstance(classification, dict) else {}
        kept = {k: v for k, v in colour.items() if k in ("color", "colorRGB")}
        properties["classification"] = {"name": after.label, **kept}
    metadata = by_name(properties.pop("metadata", None))
    metadata = {name: value for name, value in metadata.items() if name not in READ}
    if is_read:
        called = None if before is None else before.label
        values = (reader, date, called)
        metadata |= {n: v for n, v in zip(READ, values, strict=True) if v is not None}
    if metadata:
        properties["metadata"] = metadata
    if before is None:
        return replace(after, properties=properties)
    shape = after if correction.redrawn else before
    return replace(
        before,
        label=after.label,
        properties=properties,
        geometry=shape.geometry,
        polygons=shape.polygons,
        origin=shape.origin,
    )
