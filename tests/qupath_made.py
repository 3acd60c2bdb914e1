"""QuPath as its source describes it: what it makes of a file that is brought in and sent out again.

Version 0.3 writes no ids, the type as `object_type`, measurements as a list and colours packed, and
takes no measurements of annotations in. From 0.4 on an id is kept where it is a UUID, else made
anew, and a derived class is written as `names`. Both round coordinates to two decimals and pass
over members of the collection that they do not know, such as our `origin`.

`edit` is a reader: it changes objects at random and says what it did, by the ids of the results.
`check_round_trip` takes one round through both and holds what came in against that.
"""

import json
import random
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_glovlm.files import LOCK, write_json, write_manifest
from hf_glovlm.slides.corrections import correct_results
from hf_glovlm.slides.counting import count_classes
from hf_glovlm.slides.differences import read_all
from hf_glovlm.slides.files.annotations import find_repeats, read_geojson
from hf_glovlm.slides.files.coordinates import LEVEL0, Origin
from hf_glovlm.slides.objects import ClassifiedObjects, glomerulus_of, read_objects

CLASSES = ("sclérosed", "viable")
NAMES = (*CLASSES, "crescent: cellular")  # the last one is the reader's own
SIZE = (6000, 6000)
VERSIONS = ("0.3", "0.6")
Feature = dict[str, Any]


def ellipse(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """A closed ring of 24 points in a box."""
    turn = np.linspace(0, 2 * np.pi, 25)
    points = np.stack([x + width * (1 + np.cos(turn)) / 2, y + height * (1 + np.sin(turn)) / 2], 1)
    points[-1] = points[0]
    return [[float(a), float(b)] for a, b in points]


def outlines(seed: int, n: int = 9) -> list[Feature]:
    """Outlined glomeruli far from each other: with holes, in two parts, with ids of all kinds."""
    rng = random.Random(seed)
    places = [(x, y) for y in range(100, 2600, 400) for x in range(100, 3600, 400)]
    features = []
    for i, (x, y) in enumerate(rng.sample(places, n)):
        width, height = rng.uniform(90, 180), rng.uniform(90, 180)
        outer, hole = ellipse(x, y, width, height), ellipse(x + width / 3, y + height / 3, 20, 20)
        part = ellipse(x + width + 10, y, 30, 30)
        geometry = rng.choice(
            [
                {"type": "Polygon", "coordinates": [outer]},
                {"type": "Polygon", "coordinates": [outer, hole[::-1]]},
                {"type": "MultiPolygon", "coordinates": [[outer, hole], [part]]},
            ]
        )
        name = rng.choice([str(uuid.UUID(int=rng.getrandbits(128), version=4)), f"g{i}", i, None])
        properties = {
            "objectType": "annotation",
            "name": f"no. {i}",
            "classification": {"name": "Glomerulus", "color": [10, 20, 30]},
            "measurements": rng.choice([{"area": 1.5}, [{"name": "area", "value": 1.5}]]),
        }
        feature = {"type": "Feature", "geometry": geometry, "properties": properties}
        features.append(feature | ({} if name is None else {"id": name}))
    return features


def write_results(
    folder: Path, slides: dict[str, list[Feature]], origin: Origin = LEVEL0, *, case: str = "C1"
) -> Path:
    """A folder of results as `glovlm slide --objects` writes it, the classes drawn at random."""
    entries, every = [], []
    for number, (name, features) in enumerate(slides.items()):
        place = folder / "slides" / name
        place.mkdir(parents=True)
        given = folder.parent / f"{folder.name}-{name}-given.geojson"
        given.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        objects = read_geojson(given, origin=origin)
        drawn = np.random.default_rng(number).dirichlet(np.full(len(CLASSES), 0.5), len(objects))
        first = find_repeats(objects)
        once = first == np.arange(len(objects))
        repeats = [None if first[i] == i else objects[int(first[i])].id for i in range(len(first))]
        classified = ClassifiedObjects(
            objects, np.ones((len(objects), 3), np.int64), drawn[first], CLASSES, once, repeats,
            [glomerulus_of(item) for item in objects],
        )  # fmt: skip
        classified.save(place / "objects.parquet")
        classified.write_geojson(place / "objects.geojson", origin)
        every.append(read_objects(place / "objects.parquet", name))
        counts = count_classes(every[-1][0], CLASSES, ids=every[-1][1])["all"]
        entry = {"slide": name, "status": "done", "case": case, "counts": counts}
        entry |= {"size": list(SIZE), "mpp": None, "origin": origin.describe(), "flags": []}
        write_json(place / "slide.json", entry)
        write_manifest(place, "slide", {})
        entries.append(entry)
    together = {"case": case, "status": "done", "slides": list(slides), "flags": []}
    values, ids = np.concatenate([v for v, _ in every]), [i for _, own in every for i in own]
    together["counts"] = count_classes(values, CLASSES, ids=ids)["all"]
    content = {"kind": "slides", "class_names": list(CLASSES), "slides": entries}
    write_json(folder / "results.json", content | {"cases": [together], "settings": {}})
    return folder


def through_qupath(path: Path, version: str, rng: random.Random) -> list[Feature]:
    """Features of a file, brought into QuPath and sent out again; in the file's order."""
    features = []
    for feature in json.loads(path.read_text())["features"]:
        own = feature["properties"]
        kept: dict[str, Any] = {"objectType": own["objectType"]}
        name = own.get("classification", {}).get("name")
        colour = own.get("classification", {}).get("color", [1, 2, 3])
        kept |= {key: own[key] for key in ("name", "metadata") if key in own}
        made: Feature = {"type": "Feature", "geometry": _rounded(feature["geometry"], rng)}
        if version == "0.3":
            kept = {"object_type": kept.pop("objectType"), **kept, "isLocked": False}
            packed = -(1 << 24) + (colour[0] << 16) + (colour[1] << 8) + colour[2]
            if name is not None:
                kept["classification"] = {"name": name, "colorRGB": packed}
        else:
            made["id"] = feature["id"] if _is_uuid(feature["id"]) else _fresh(rng)
            if name is not None:
                key = {"names": name.split(": ")} if ": " in name else {"name": name}
                kept["classification"] = key | {"color": colour}
            if own.get("measurements"):
                kept["measurements"] = own["measurements"]
        features.append(made | {"properties": kept})
    return features


def _fresh(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _is_uuid(text: Any) -> bool:
    try:
        return bool(uuid.UUID(str(text)))
    except ValueError:
        return False


def _rounded(geometry: Feature, rng: random.Random) -> Feature:
    """Two decimals; a ring may begin at another point and turn the other way."""

    def ring(points: list[list[float]]) -> list[list[float]]:
        open_ring = [[round(x, 2), round(y, 2)] for x, y, *_ in points[:-1]]
        start = rng.randrange(len(open_ring))
        open_ring = open_ring[start:] + open_ring[:start]
        open_ring = open_ring[::-1] if rng.random() < 0.5 else open_ring
        return [*open_ring, open_ring[0]]

    if geometry["type"] == "Polygon":
        return {"type": "Polygon", "coordinates": [ring(part) for part in geometry["coordinates"]]}
    parts = [[ring(part) for part in polygon] for polygon in geometry["coordinates"]]
    return {"type": "MultiPolygon", "coordinates": parts}


class Edited(NamedTuple):
    """What a reader left, and what that changes: ids of the results, or numbers of added ones."""

    features: list[Feature]
    removed: set[str]
    reclassified: dict[str, str | None]
    redrawn: set[str]
    added: list[str | None]


def edit(features: list[Feature], ids: list[str], seed: int) -> Edited:
    """Change objects at random, and leave others and what was never counted among them."""
    rng = random.Random(f"edit {seed}")  # not the numbers that ids of `outlines` were drawn from
    kept: list[Feature] = []
    removed, redrawn, reclassified = set(), set(), {}
    for name, feature in zip(ids, features, strict=True):
        change = rng.choice(["nothing"] * 4 + ["remove", "ignore", "class", "none", "draw", "both"])
        own = feature["properties"]
        if change in ("remove", "ignore"):
            removed.add(name)
            if change == "ignore":
                own["classification"] = {"name": "Ignore*"}
                kept.append(feature)
            continue
        if change in ("class", "both"):
            now = own["classification"]["name"]
            other = rng.choice([c for c in NAMES if c != now])
            own["classification"] = {"names": other.split(": "), "color": [9, 9, 9]}
            reclassified[name] = other
        if change == "none":
            own.pop("classification")
            reclassified[name] = None
        if change in ("draw", "both"):
            feature["geometry"] = _scaled(feature["geometry"], rng.uniform(1.08, 1.2))
            redrawn.add(name)
        kept.append(feature)
    added: list[str | None] = []
    for i in range(rng.randrange(3)):
        label = rng.choice([*CLASSES, None])
        added.append(label)
        kept.append(_drawn(rng, ellipse(300 + 400 * i, 2780, 120, 110), label))
    kept.append(_drawn(rng, ellipse(5, 5, 3990, 2990), None))  # the tissue
    kept.append(_drawn(rng, ellipse(1500, 2780, 150, 90), "Artery"))
    twice = [f for f in kept[: len(ids)] if "Ignore*" not in json.dumps(f)][:1]
    kept += [json.loads(json.dumps(f)) | {"id": _fresh(rng)} for f in twice]
    rng.shuffle(kept)
    return Edited(kept, removed, reclassified, redrawn, added)


def _drawn(rng: random.Random, ring: list[list[float]], label: str | None) -> Feature:
    own: Feature = {"objectType": "annotation"}
    own |= {} if label is None else {"classification": {"name": label}}
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "id": _fresh(rng), "geometry": geometry, "properties": own}


def _scaled(geometry: Feature, by: float) -> Feature:
    single = geometry["type"] == "Polygon"
    parts = [geometry["coordinates"]] if single else geometry["coordinates"]
    middle = np.mean(parts[0][0][:-1], axis=0)
    moved = [[((np.array(r) - middle) * by + middle).tolist() for r in part] for part in parts]
    return {"type": geometry["type"], "coordinates": moved[0] if single else moved}


def check_round_trip(folder: Path, seed: int, version: str) -> None:
    """What comes back from QuPath differs from the results in what the reader did, and only in it.

    The reference is what the reader says to have done.
    """
    rng = random.Random(f"QuPath {seed}")
    origin = rng.choice([Origin(), Origin(1000.0, 2000.0, "bounds"), Origin(17.5, 3.25, "given")])
    folder.mkdir(exist_ok=True)
    results = write_results(folder / "results", {"s1": outlines(seed)}, origin)
    path = results / "slides/s1/objects.geojson"
    before = {item.id: item for item in read_geojson(path)}
    done = edit(through_qupath(path, version, rng), [*before], seed)
    content = {"type": "FeatureCollection", "features": done.features}
    (folder / "s1.geojson").write_text(json.dumps(content))
    frozen = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    all_read = bool(seed % 2)

    out = correct_results(
        results, folder / "s1.geojson", "AB", folder / "out", all_read=all_read, classes=NAMES[2:]
    )
    slide = out["slides"]["s1"]
    assert {one["id"] for one in slide["removed"]} == done.removed
    assert {one["id"]: one["to"] for one in slide["reclassified"]} == done.reclassified
    assert {one["id"] for one in slide["redrawn"]} == done.redrawn
    assert Counter(one["class"] for one in slide["added"]) == Counter(done.added)
    unchanged = {*before} - done.removed - {*done.reclassified} - done.redrawn
    assert slide["changes"]["unchanged"] == len(unchanged)
    assert {p: p.read_bytes() for p in frozen} == frozen

    # all objects are there once, under the ids of the results, and where they were
    place = folder / "out/AB/corrected/s1.geojson"
    after = {item.id: item for item in read_all(place)}
    assert len(after) == len(before) - len(done.removed) + len(done.added)
    for name, item in before.items():
        assert (name in after) == (name not in done.removed)
        if name not in after:
            continue
        label = done.reclassified.get(name, item.label)
        assert after[name].label == label
        if name not in done.redrawn:
            assert after[name].geometry == item.geometry
        own, now = item.properties, after[name].properties
        assert now["measurements"] == own["measurements"]  # QuPath 0.3 had dropped them
        assert now["name"] == own["name"]
        is_read = label is not None and (all_read or name in done.reclassified)
        assert (now["metadata"].get("read by") == "AB") == is_read
    labelled = folder / "out/AB/labelled/s1.geojson"
    expected = [label for label in done.reclassified.values() if label] + list(
        filter(None, done.added)
    )
    if all_read:
        rest = {*before} - done.removed - {*done.reclassified}
        expected += [str(before[name].label) for name in rest]
    written = read_all(labelled) if labelled.exists() else []
    assert sorted(str(item.label) for item in written) == sorted(expected)

    # counts are those of a person with a pencil
    counts = slide["counts"]["after"]
    by_hand = Counter(item.label for item in after.values() if item.label)
    assert {name: one["count"] for name, one in counts["classes"].items()} == {
        name: by_hand[name] for name in NAMES
    }
    assert counts["read"] == len(expected)
    assert "corrected" not in counts["classes"][CLASSES[0]]

    # once more, and what came out in place of what came in: nothing changes
    places = [p for p in (folder / "out").rglob("*") if p.is_file() and p.name != LOCK]
    bytes_before = {p: p.read_bytes() for p in places}
    again = correct_results(
        results, folder / "s1.geojson", "AB", folder / "out", all_read=all_read, classes=NAMES[2:]
    )
    assert again == out
    assert {p: p.read_bytes() for p in bytes_before} == bytes_before
    second = correct_results(
        results, place, "CD", folder / "out", all_read=all_read, classes=NAMES[2:]
    )
    kinds = ("added", "removed", "reclassified", "changes")
    own = {kind: slide[kind] for kind in kinds}
    ignored = [one for one in own["removed"] if "reason" in one]
    assert len(second["slides"]["s1"]["removed"]) == len(own["removed"])
    if not ignored:
        assert {kind: second["slides"]["s1"][kind] for kind in kinds} == own
    assert second["between_readers"][0]["differing"] == []
