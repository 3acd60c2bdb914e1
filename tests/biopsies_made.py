"""Results of `glovlm slide`, corrections and tables of cases, written by hand for sheets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_glovlm.files import write_json
from hf_glovlm.slides.biopsy import Biopsies, describe_biopsies
from hf_glovlm.slides.corrections import correct_results
from hf_glovlm.slides.files.annotations import box_object
from hf_glovlm.slides.objects import ClassifiedObjects, glomerulus_of

SIDE, STEP = 100.0, 200.0


@dataclass
class Made:
    """Glomerulus to be written: what a model calls it, and what its outline's file says."""

    label: str
    glomerulus: str | None = None
    doubt: float = 0.1
    lesions: str | None = None
    quality: str | None = None
    given: str | None = None
    score: float | None = None
    cut: bool = False
    x: float | None = None
    id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def feature(one: Made, number: int) -> dict[str, Any]:
    """The outline as a GeoJSON feature, beside others in a row."""
    x = STEP * (number + 1) if one.x is None else one.x
    metadata = dict(one.metadata)
    texts = {"lesions": one.lesions, "quality": one.quality, "given class": one.given}
    metadata |= {name: value for name, value in texts.items() if value is not None}
    metadata |= {} if one.glomerulus is None else {"glomerulus_id": one.glomerulus}
    measured = {} if one.score is None else {"finder score": one.score, "cut by border": one.cut}
    properties = {
        "classification": {"name": one.label},
        "metadata": metadata,
        "measurements": {name: float(value) for name, value in measured.items()},
    }
    name = one.id or f"g{number}"
    item = box_object(x, 100.0, SIDE, SIDE)
    return {"type": "Feature", "id": name, "geometry": item.geometry, "properties": properties}


def write_slides(
    folder: Path,
    slides: Mapping[str, Sequence[Made] | str],
    classes: Sequence[str],
    *,
    confusion: Any = None,
    stains: Mapping[str, str] | None = None,
    stated: Mapping[str, Any] | None = None,
    case: str | None = None,
) -> Path:
    """Write an output folder of `glovlm slide`.

    Args:
        folder: Where.
        slides: Glomeruli by slide; `tiles` or `failed` in their place.
        classes: Of the model.
        confusion: Of the model.
        stains: By slide.
        stated: What the table of cases said of the case.
        case: That all slides were of.
    """
    entries = []
    for name, shown in slides.items():
        entry = {"slide": name, "status": "done", "size": [100_000, 1000], "flags": []}
        entry |= {"origin": {"x": 0, "y": 0}, "stain": (stains or {}).get(name)}
        entry |= {"case": case, "stated": {}, "mpp": 0.5}
        if shown == "failed":
            entry |= {"status": "failed", "error": "no tissue", "counts": None}
        elif shown == "tiles":
            entry["counts"] = {"unit": "tiles", "n": 9, "classes": {}, "notes": []}
        else:
            entry["counts"] = _write_objects(folder / "slides" / name, shown, classes)
        entries.append(entry)
    model = {"backbone": "tiny", "mpp": None, "fingerprint": "ab" * 16, "confusion": confusion}
    of_case = [] if case is None else [{"case": case, "slides": list(slides), "counts": None}]
    write_json(
        folder / "results.json",
        {"kind": "slides", "research_use_only": True, "synthetic": True, "model": model,
         "class_names": list(classes), "slide_class_names": list(classes), "settings": {},
         "slides": entries, "cases": [c | {"stated": dict(stated or {})} for c in of_case],
         "failed": 0},
    )  # fmt: skip
    return folder


def _write_objects(folder: Path, shown: Sequence[Any], classes: Sequence[str]) -> dict[str, Any]:
    from hf_glovlm.slides.differences import read_all

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "given.geojson"
    features = [feature(one, i) for i, one in enumerate(shown)]
    source.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    items = read_all(source)
    source.unlink()
    values = np.full((len(shown), len(classes)), 0.0)
    for row, one in zip(values, shown, strict=True):
        row[:] = one.doubt / max(len(classes) - 1, 1)
        row[list(classes).index(one.label)] = 1 - one.doubt
    classified = ClassifiedObjects(
        objects=items,
        boxes=np.zeros((len(items), 3), np.int64),
        probabilities=values,
        class_names=list(classes),
        counted=np.ones(len(items), bool),
        repeats=[None] * len(items),
        glomeruli=[glomerulus_of(item) for item in items],
    )
    if not items:
        classified = ClassifiedObjects.none(list(classes))
    classified.save(folder / "objects.parquet")
    classified.write_geojson(folder / "objects.geojson")
    return {"unit": "objects", "n": len(items), "classes": {}, "notes": []}


def write_cases(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a table of cases; columns are those that some row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)]
    lines += [",".join(str(row.get(name, "")) for name in names) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def correct(
    results: Path,
    output: Path,
    reader: str,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    all_read: bool = True,
    classes: Sequence[str] = (),
    date: str = "2026-11-30",
) -> Path:
    """Correct results as a reader does in QuPath.

    Args:
        results: Output folder of `glovlm slide`.
        output: Of `glovlm correct`.
        reader: Who.
        changes: By slide and object what changes: `label`, `lesions`, `quality`; `None` removes it.
            A `Made` is added.
        all_read: Whether all of the slides were read.
        classes: The reader's own.
        date: Of the correction.
    """
    given = output.parent / f"given-{output.name}-{reader}"
    given.mkdir()
    for slide, of_slide in changes.items():
        path = results / "slides" / slide / "objects.geojson"
        content = json.loads(path.read_text())
        kept = []
        for one in content["features"]:
            change = of_slide.get(one["id"], {})
            if change is None:
                continue
            metadata = one["properties"].setdefault("metadata", {})
            metadata |= {k: change[k] for k in ("lesions", "quality") if k in change}
            if "label" in change:
                one["properties"]["classification"] = {"name": change["label"]}
            kept.append(one)
        added = [one for one in of_slide.values() if isinstance(one, Made)]
        content["features"] = kept + [feature(one, 50 + i) for i, one in enumerate(added)]
        (given / f"{slide}.geojson").write_text(json.dumps(content))
    correct_results(results, given, reader, output, all_read=all_read, classes=classes, date=date)
    return output


def describe(
    root: Path,
    slides: Mapping[str, Sequence[Made] | str],
    classes: Sequence[str],
    rows: Sequence[Mapping[str, Any]] | None = None,
    *,
    finder: Path | None = None,
    **options: Any,
) -> Biopsies:
    """Describe biopsies from one folder of results; without rows all are of the case `B1`."""
    results = write_slides(root / "O", slides, classes, **options)
    rows = rows if rows is not None else [{"slide_id": s, "case_id": "B1"} for s in slides]
    return describe_biopsies(write_cases(root / "cases.csv", rows), [results], finder=finder)


def sheet_of(biopsies: Biopsies, case: str = "B1") -> dict[str, Any]:
    """The sheet of one case; fails with the reason where there is none."""
    assert case in biopsies.sheets, biopsies.failed
    return biopsies.sheets[case]


def lesion_of_sheet(sheet: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A lesion of a sheet by its class."""
    return next(dict(one) for one in sheet["lesions"] if one["class"] == name)
