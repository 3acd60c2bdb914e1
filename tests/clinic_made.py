"""A small clinic for tests: slides of several patients, and what a reader outlined in QuPath.

`write_clinic` lays it out as the pages of the documentation say: `slides` and `outlines` of the
patients to learn from, `new` and `new_outlines` of those to come, and `cases.csv`.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from slides_made import write_slide

SCALE = 0.5  # micrometres per pixel


class Layout(NamedTuple):
    """How large the slides of a clinic are, and the glomeruli on them, in pixels.

    Args:
        size: Width and height of a slide.
        step: From one glomerulus to the next.
        sides: Of glomeruli; those of one slide are alike.
        margin: Around all of them.
    """

    size: tuple[int, int] = (1300, 900)
    step: int = 240
    sides: tuple[int, ...] = (70, 110, 200)
    margin: int = 60


LARGE = Layout()


def outline(box: tuple[int, int, int, int], label: str, number: int) -> dict[str, Any]:
    """An ellipse of QuPath in a box."""
    x, y, width, height = box
    turn = np.linspace(0, 2 * np.pi, 24)
    points = np.stack([x + width * (1 + np.cos(turn)) / 2, y + height * (1 + np.sin(turn)) / 2], 1)
    points[-1] = points[0]
    return {
        "type": "Feature",
        "id": f"{number:08d}-0000-4000-8000-000000000000",
        "geometry": {"type": "Polygon", "coordinates": [points.round(1).tolist()]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


def write_biopsy(
    folder: Path, name: str, seed: int, classes: tuple[str, str], layout: Layout
) -> dict[str, str]:
    """A slide and its outlines as a pathologist leaves them; the class of each glomerulus by id."""
    rng = np.random.default_rng(seed)
    (width, height), step, sides, margin = layout
    side = int(rng.choice(sides))
    ends = width - step - margin // 3, height - step - margin // 3
    places = [(x, y) for y in range(margin, ends[1], step) for x in range(margin, ends[0], step)]
    places = [places[i] for i in rng.permutation(len(places))[:9]]
    boxes = [(x, y, side, int(side * rng.uniform(0.8, 1.2))) for x, y in places]
    lesions, plain, arteries = boxes[:4], boxes[4:8], boxes[8:]
    path = folder / "slides" / f"{name}.tiff"
    write_slide(path, width, height, mpp=SCALE, lesions=lesions, blobs=12, seed=seed)
    corner = margin // 2
    features = [
        outline((10, 10, width - 20, height - 20), "Tissue", 100),
        *(outline(box, classes[0], i) for i, box in enumerate(lesions)),
        *(outline(box, classes[1], i) for i, box in enumerate(plain, start=10)),
        *(outline(box, "Artery", i) for i, box in enumerate(arteries, start=20)),
        outline((corner, corner, 90, 90), "Region*", 101),
        outline((width - 150, height - 200, 90, 90), "Ignore*", 102),
    ]
    rng.shuffle(features)
    place = folder / "outlines" / f"{name}.geojson"
    place.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    given = {f["id"]: f["properties"]["classification"]["name"] for f in features}
    return {key: label for key, label in given.items() if label in classes}


def write_clinic(
    folder: Path,
    cases: Mapping[str, str],
    new: Sequence[str],
    classes: tuple[str, str],
    layout: Layout = LARGE,
) -> dict[str, dict[str, str]]:
    """Write slides, outlines and the table of cases.

    Args:
        folder: Where.
        cases: Case of each slide; a patient is a case.
        new: Slides of patients to come.
        classes: Of the planted lesions, and of glomeruli without one.
        layout: Sizes.

    Returns:
        The class of each glomerulus by id, of each slide.
    """
    for name in ("slides", "outlines", "new", "new_outlines"):
        (folder / name).mkdir()
    truth = {name: write_biopsy(folder, name, i, classes, layout) for i, name in enumerate(cases)}
    rows = [f"{name},case{case},patient{case},PAS" for name, case in cases.items()]
    table = "\n".join(["slide_id,case_id,patient_id,stain", *rows, ""])
    (folder / "cases.csv").write_text(table)
    for name in new:
        (folder / "slides" / f"{name}.tiff").rename(folder / "new" / f"{name}.tiff")
        file = folder / "outlines" / f"{name}.geojson"
        file.rename(folder / "new_outlines" / file.name)
    return truth


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
