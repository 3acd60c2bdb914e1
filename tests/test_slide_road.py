"""From outlines of QuPath to counts: every glomerulus once, and nothing else."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from slides_made import write_slide

SIZE = (1300, 900)
SCALE = 0.5
CLASSES = ("lesion", "plain")
NOT_GLOMERULI = ("Artery", "Region*", "Ignore*", "Tissue")


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


def write_biopsy(folder: Path, name: str, seed: int) -> dict[str, str]:
    """A slide and its outlines, as a pathologist leaves them; the class of each glomerulus by id.

    Glomeruli of one slide are alike in size, those of another up to three times larger.
    """
    rng = np.random.default_rng(seed)
    side = int(rng.choice([70, 110, 200]))
    places = [(x, y) for y in range(60, SIZE[1] - 260, 240) for x in range(60, SIZE[0] - 260, 240)]
    places = [places[i] for i in rng.permutation(len(places))[:9]]
    boxes = [(x, y, side, int(side * rng.uniform(0.8, 1.2))) for x, y in places]
    lesions, plain, arteries = boxes[:4], boxes[4:8], boxes[8:]
    write_slide(
        folder / "slides" / f"{name}.tiff", *SIZE, mpp=SCALE, lesions=lesions, blobs=12, seed=seed
    )
    features = [
        outline((10, 10, 1280, 880), "Tissue", 100),
        *(outline(box, "lesion", i) for i, box in enumerate(lesions)),
        *(outline(box, "plain", i) for i, box in enumerate(plain, start=10)),
        *(outline(box, "Artery", i) for i, box in enumerate(arteries, start=20)),
        outline((30, 30, 90, 90), "Region*", 101),
        outline((1150, 700, 90, 90), "Ignore*", 102),
    ]
    rng.shuffle(features)
    place = folder / "outlines" / f"{name}.geojson"
    place.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    classes = {f["id"]: f["properties"]["classification"]["name"] for f in features}
    return {key: label for key, label in classes.items() if label in CLASSES}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Eight slides of four patients, then two of a fifth, with the table of cases."""
    folder = tmp_path_factory.mktemp("clinic")
    for name in ("slides", "outlines"):
        (folder / name).mkdir()
    names = [f"B{i}.{i % 2}" for i in range(10)]  # a dot in a name is no suffix
    truth = {name: write_biopsy(folder, name, seed) for seed, name in enumerate(names)}
    rows = [f"{name},case{i // 2},patient{i // 2},PAS" for i, name in enumerate(names)]
    table = "\n".join(["slide_id,case_id,patient_id,stain", *rows, ""])
    (folder / "cases.csv").write_text(table)
    new = folder / "new"
    new.mkdir()
    for name in names[8:]:
        (folder / "slides" / f"{name}.tiff").rename(new / f"{name}.tiff")
        (folder / "outlines" / f"{name}.geojson").rename(new / f"{name}.geojson")
    return folder, truth


def test_every_glomerulus_of_a_clinic_is_cut_learned_and_counted_once(
    clinic: tuple[Path, dict[str, dict[str, str]]], tmp_path: Path, glovlm: Callable[..., Any]
) -> None:
    folder, truth = clinic
    crops, run = tmp_path / "crops", tmp_path / "run"
    cases = ("--cases", folder / "cases.csv")
    done = glovlm(
        "data", "crops", folder / "slides", folder / "outlines", *cases, "--exclude", "Artery",
        "--output-dir", crops,
    )  # fmt: skip
    assert done.code == 0, done.err
    with (crops / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    old = [name for name in truth if not (folder / "new" / f"{name}.tiff").exists()]
    cut = {(row["slide_id"], row["object_id"]): row["label"] for row in rows}
    assert cut == {(name, key): label for name in old for key, label in truth[name].items()}
    assert len(rows) == len(cut)
    assert {row["patient_id"] for row in rows} == {f"patient{i}" for i in range(4)}
    for what in ("Region*", "Ignore*", "Artery"):
        assert what in done.out + done.err

    done = glovlm(
        "train", "--data", crops, "--backbone", "mini", "--method", "linear_probe", "--shots", 4,
        "--output-dir", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    for where, outlines, names in (
        (folder / "slides", folder / "outlines", old),
        (folder / "new", folder / "new", [name for name in truth if name not in old]),
    ):
        output = tmp_path / where.name
        done = glovlm(
            "slide", run, where, "--objects", outlines, *cases, "--exclude", "Artery",
            "--output-dir", output, "--batch-size", 64,
        )  # fmt: skip
        assert done.code == 0, done.err + done.out
        results = json.loads((output / "results.json").read_text())
        assert [entry["slide"] for entry in results["slides"]] == sorted(names)
        for entry in results["slides"]:
            table = pq.read_table(output / "slides" / entry["slide"] / "objects.parquet")
            counted = [
                key
                for key, once in zip(
                    table["id"].to_pylist(), table["counted"].to_pylist(), strict=True
                )
                if once
            ]
            assert sorted(counted) == sorted(truth[entry["slide"]])
            assert (entry["counts"]["unit"], entry["counts"]["n"]) == ("objects", 8)
            told = " ".join(entry["flags"])
            assert all(what in told for what in NOT_GLOMERULI)
        assert {entry["case"]: entry["counts"]["n"] for entry in results["cases"]} == {
            f"case{i}": 16 for i in ((0, 1, 2, 3) if where.name == "slides" else (4,))
        }
