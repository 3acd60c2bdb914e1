"""From outlines of eight patients to the signed sheets of two others, as `docs/road.md` says.

Slides are drawn, so that their counts are known. This shows the road, never the finder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from clinic_made import Layout, write_clinic
from command_line import Glovlm
from doc_pages import DOCS, commands
from slide_model import write_outlines

pytest.importorskip("skimage")
pytest.importorskip("shapely")

SMALL = Layout(size=(420, 340), step=72, sides=(52, 60), margin=24)
CLASSES = ("globally sclerosed", "viable")


def read_in_qupath(folder: Path, name: str, truth: dict[str, str]) -> None:
    """A reader who leaves on a slide what is a glomerulus, and outlines what was missed."""
    given = json.loads((folder / "new_outlines" / f"{name}.geojson").read_text())["features"]
    write_outlines(
        folder / "corrected" / f"{name}.geojson", [one for one in given if one["id"] in truth]
    )


def sheets(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of each sheet, by case."""
    pages = sorted(folder.glob("*/sheet.html"))
    assert all("not for diagnosis" in page.read_text() for page in pages)
    return {p.parent.name: json.loads((p.parent / "sheet.json").read_text()) for p in pages}


def split_table(folder: Path, new: list[str]) -> None:
    """Give the slides of new patients a table of their own."""
    header, *rows = (folder / "cases.csv").read_text().splitlines()
    later = [row for row in rows if row.split(",")[0] in new]
    earlier = [row for row in rows if row not in later]
    for name, lines in (("cases.csv", earlier), ("new.csv", later)):
        (folder / name).write_text("\n".join([header, *lines, ""]))


def test_the_page_leads_from_eight_patients_to_signed_sheets_whose_counts_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glovlm: Glovlm
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"B{i}" for i in range(10)]
    new = names[8:]
    truth = write_clinic(tmp_path, {name: name[1:] for name in names}, new, CLASSES, SMALL)
    split_table(tmp_path, new)
    for folder, suffix in (("slides", "tiff"), ("outlines", "geojson")):
        given = Path({"slides": "regions", "outlines": "region_outlines"}[folder])
        given.mkdir()
        for name in names[:3]:  # slides that are small enough to be regions, too
            shutil.copy(f"{folder}/{name}.{suffix}", given)
    walked = []
    for command in commands(DOCS / "road.md", backbone="mini"):
        if command[0] == "correct":
            for name in new:
                read_in_qupath(tmp_path, name, truth[name])
        done = glovlm(*command)
        assert done.code == 0, (command, done.err)
        walked.append(" ".join(command[: 2 if command[0] in ("data", "find") else 1]))
    assert walked == [
        *("data crops", "data check", "train", "find train", "find run", "slide", "correct"),
        *("sheet", "slide", "sheet"),
    ]
    for name in new:  # what was found has no class until the model gives one
        features = json.loads((tmp_path / "found" / f"{name}.geojson").read_text())["features"]
        assert not any("classification" in one["properties"] for one in features)

    cases = [f"case{name[1:]}" for name in new]
    signed, drafts = sheets(tmp_path / "sheets"), sheets(tmp_path / "drafts")
    assert list(signed) == list(drafts) == cases
    for case, name in zip(cases, new, strict=True):
        labels = list(truth[name].values())
        sheet = signed[case]
        assert (sheet["status"]["draft"], sheet["status"]["signed_by"]) == (False, "AB")
        assert sheet["counts"]["n"] == sheet["counts"]["confirmed"] == len(labels)
        assert sorted(one["class"] for one in sheet["glomeruli"]) == sorted(labels)
        first = sheet["lesions"][0]
        assert (first["class"], first["role"]) == (CLASSES[0], "global sclerosis")
        assert first["counts"]["present"] == labels.count(CLASSES[0])
        share = first["shares"][0]
        assert (share["count"], share["denominator"]) == (labels.count(CLASSES[0]), len(labels))
        # outlines that a person gave: their number is exact, their classes are the model's
        draft = drafts[case]
        assert draft["status"]["draft"] is True
        assert draft["counts"]["n"] == draft["counts"]["provisional"] == len(labels)
        assert {one["object"] for one in draft["glomeruli"]} == {*truth[name]}
