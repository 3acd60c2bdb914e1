"""`glovlm find`: from outlined regions to a finder, and over slides to outlines of glomeruli."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from command_line import Glovlm
from PIL import Image
from scipy import ndimage
from slide_model import outline, train, write_outlines
from slides_made import write_slide
from tiny import tiny_clip

from hf_glovlm.errors import GloVLMError
from hf_glovlm.settings import declarations
from hf_glovlm.slides.files.annotations import read_geojson
from hf_glovlm.slides.files.wsi import open_slide
from hf_glovlm.slides.finder import learning, running, windows
from hf_glovlm.slides.finder.config import FindConfig, FindTrainConfig
from hf_glovlm.slides.finder.outlined import read_regions
from hf_glovlm.slides.finder.regions import Detection
from hf_glovlm.slides.finder.training import train_finder
from hf_glovlm.slides.finder.windows import join_parts, lay_windows, place_detections

LESION = 60  # pixels along a side of what is outlined
BOXES = {
    "A_1": [(40, 40), (200, 150)],
    "A_2": [(150, 60)],
    "B_1": [(60, 170), (220, 40)],
    "C_1": [],
}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Windows of a size that a test has time for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "SIDE", 192)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four regions of three patients with their outlines, one without a glomerulus, two slides."""
    folder = tmp_path_factory.mktemp("find")
    (folder / "regions").mkdir()
    (folder / "slides").mkdir()
    for i, (name, corners) in enumerate(BOXES.items()):
        boxes = [(x, y, LESION, LESION) for x, y in corners]
        source = folder / f"{name}.tiff"
        write_slide(source, 320, 260, lesions=boxes, blobs=9, seed=i, compression="deflate")
        with open_slide(source) as slide:
            slide.read(0, 0, *slide.size).save(folder / "regions" / f"{name}.png")
        features = [outline(x, y, LESION, classification={"name": "gs"}) for x, y in corners]
        write_outlines(folder / "outlines" / f"{name}.geojson", features)
    rows = [f"{name},{name[0]},0.5,PAS" for name in BOXES]
    (folder / "cases.csv").write_text("\n".join(["slide_id,patient_id,mpp,stain", *rows, ""]))
    write_slide(
        folder / "slides/S1.tiff", 640, 480, lesions=4, lesion_side=LESION, blobs=4, seed=5,
        compression="deflate",
    )  # fmt: skip
    write_slide(folder / "slides/S2.tiff", 500, 400, blobs=3, seed=6, compression="deflate")
    return folder


def trained(place: Path, output: Path, **given: Any) -> dict[str, Any]:
    settings = {"regions": str(place / "regions"), "outlines": str(place / "outlines")}
    settings |= {"cases": str(place / "cases.csv"), "backbone": str(tiny_clip()), "head": "plain"}
    return train_finder(FindTrainConfig(**settings | {"output_dir": str(output), **given}))


@pytest.fixture(scope="module")
def finder(place: Path) -> Path:
    trained(place, place / "finder")
    return place / "finder"


def configured(finder: Path, output: Path, *slides: Path, **given: Any) -> FindConfig:
    return FindConfig(
        finder=str(finder),
        slides=[str(path) for path in slides],
        output_dir=str(output),
        **{"backbone": str(tiny_clip()), **given},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


# ------------------------------------------------------------------------------------- the road


def test_from_a_few_outlines_to_counts_and_a_reader(
    place: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    done = glovlm(
        "find", "train", "--regions", place / "regions", "--outlines", place / "outlines",
        "--cases", place / "cases.csv", "--backbone", tiny_clip(), "--output-dir", tmp_path / "F",
        "--head", "plain",
    )  # fmt: skip
    assert done.code == 0, done.err
    for fact in ("4 (1 without a glomerulus)", "3, each a patient", "recall, gs"):
        assert fact in done.out, done.out
    done = glovlm(
        "find", "run", tmp_path / "F", place / "slides", "--backbone", tiny_clip(),
        "--output-dir", tmp_path / "O", "--stain", "PAS", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads(done.out)
    assert (results["kind"], results["synthetic"]) == ("findings", False)
    assert [entry["n"] for entry in results["slides"]] == [4, 0]
    outlined = read_geojson(tmp_path / "O/S1.geojson")
    with open_slide(place / "slides/S1.tiff") as slide:
        dark = np.asarray(slide.read(0, 0, *slide.size)).mean(-1)
    planted, n = ndimage.label(ndimage.gaussian_filter(dark, 4) < 150)
    assert n == 4
    for item in outlined:  # each on one of what was planted, most of it and little else
        inside = np.asarray(windows_mask(item.polygons[0][0], dark.shape))
        numbers = np.bincount(planted[inside], minlength=5)
        assert numbers[1:].max() / inside.sum() > 0.6
        assert item.label is None
        assert item.properties["metadata"] == {"finder": results["finder"]["fingerprint"][:12]}
        assert {*item.properties["measurements"]} == {"finder score", "cut by border"}
    run = train(tmp_path / "model", mpp=None)
    done = glovlm(
        "slide", run, place / "slides", "--objects", tmp_path / "O", "--output-dir",
        tmp_path / "counts", "--allow-scale", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "are of no slide here" not in done.err
    counts = [entry["counts"] for entry in json.loads(done.out)["slides"]]
    assert [(one["unit"], one["n"]) for one in counts] == [("objects", 4), ("objects", 0)]
    objects = tmp_path / "counts/slides/S1/objects.geojson"
    (tmp_path / "S1.geojson").write_bytes(objects.read_bytes())
    done = glovlm(
        "correct", tmp_path / "counts", tmp_path / "S1.geojson",
        "--reader", "AB", "--output-dir", tmp_path / "read", "--all-read", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["slides"]["S1"]["changes"]["unchanged"] == 4


def windows_mask(ring: Any, shape: tuple[int, ...]) -> Any:
    from hf_glovlm.slides.files.shapes import fill

    return fill([(ring,)], 0, 0, 1.0, (shape[1], shape[0]))


def test_the_command_learns_what_the_package_learns() -> None:
    assert declarations(FindTrainConfig)["head"].default == learning.DEFAULT_HEAD


def test_the_same_regions_give_the_same_bytes(place: Path, finder: Path, tmp_path: Path) -> None:
    trained(place, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finder)


# ------------------------------------------------------------------------------------- windows


def discs(seed: int) -> Any:
    """A picture of discs, some on the border, one far larger than the others."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:400, :500]
    picture = (down - 190) ** 2 + (across - 250) ** 2 < 70**2
    for _ in range(100):
        x, y, r = rng.uniform(0, 500), rng.uniform(0, 400), rng.uniform(12, 20)
        near = (down - y) ** 2 + (across - x) ** 2
        if not picture[near < (r + 5) ** 2].any():
            picture |= near < r**2
    return picture


@pytest.mark.parametrize("seed", [1, 2])
def test_windows_show_what_the_whole_picture_shows(seed: int) -> None:
    picture = discs(seed)

    def detect(part: Any) -> list[Detection]:
        from hf_glovlm.slides.finder.instances import trace

        labels, n = ndimage.label(part)
        size = part.shape[1], part.shape[0]
        found = []
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            ring = trace(labels[rows, columns] == k, (columns.start, rows.start), (1, 1))
            found.append(Detection(np.clip(ring, 0, size), 0.9))
        assert len(found) == n
        return found

    size = picture.shape[1], picture.shape[0]
    grid = lay_windows(size, 1.0, 40)
    assert len(grid.boxes) == 12
    parts = []
    for box in grid.boxes:
        x, y, width, height = box
        part = picture[y : y + height, x : x + width]
        parts += place_detections(detect(part), box, (width, height), size)
    joined = join_parts(parts)
    whole = [shapely.Polygon(one.ring) for one in detect(picture)]
    shapes = [shapely.Polygon(part.ring) for part in joined.objects]
    assert len(shapes) == len(whole)
    assert joined.joined == 1  # the large one
    tree = shapely.STRtree(whole)
    for part, shape in zip(joined.objects, shapes, strict=True):
        twin = whole[int(tree.nearest(shape.centroid))]
        assert shape.symmetric_difference(twin).area < 0.01 * twin.area
        x0, y0, x1, y1 = twin.bounds
        near = windows.NEAR_BORDER
        assert part.cut == (
            min(x0, y0) <= near or x1 >= size[0] - 1 - near or y1 >= size[1] - 1 - near
        )


# ---------------------------------------------------------------------- killed, finished, changed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of windows that were searched."""
    numbers: list[int] = []
    detect = learning.Finder.detect_many

    def count(self: Any, pictures: Any, **options: Any) -> Any:
        numbers.append(len(pictures))
        return detect(self, pictures, **options)

    monkeypatch.setattr(learning.Finder, "detect_many", count)
    return numbers


def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    place: Path, finder: Path, tmp_path: Path, seen: list[int]
) -> None:
    slide = place / "slides/S1.tiff"
    unbroken = running.find_on_slides(configured(finder, tmp_path / "whole", slide, batch_size=1))
    (entry,) = unbroken["slides"]
    assert len(seen) == entry["windows"] > 3
    seen.clear()

    def kill(kind: str, what: dict[str, Any]) -> None:
        if kind == "windows" and what["done"] == 2:
            raise KeyboardInterrupt

    broken = configured(finder, tmp_path / "broken", slide, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        running.find_on_slides(broken, on_event=kill)
    assert not (tmp_path / "broken/S1.geojson").exists()
    kept = tmp_path / "broken/.windows/S1.jsonl"
    kept.write_text(kept.read_text()[:-2])  # a line that was cut short is read again
    assert running.find_on_slides(broken) == unbroken
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert len(seen) == entry["windows"] + 1
    assert not (tmp_path / "broken/.windows").exists()


def test_what_is_finished_stays_and_what_a_reader_has_changed_is_not_replaced(
    place: Path, finder: Path, tmp_path: Path, seen: list[int]
) -> None:
    config = configured(finder, tmp_path, place / "regions/A_1.png", mpp=0.5)
    first = running.find_on_slides(config)
    (entry,) = first["slides"]
    assert (entry["n"], entry["tissue"], entry["mpp_source"]) == (2, None, "given")  # no glass
    searched = sum(seen)
    assert running.find_on_slides(config) == first
    assert sum(seen) == searched
    running.find_on_slides(replace(config, threshold=0.9))
    assert sum(seen) == 2 * searched

    file = tmp_path / "A_1.geojson"
    content = json.loads(file.read_text())
    content["features"].pop()
    file.write_text(json.dumps(content))
    results = running.find_on_slides(config)
    assert results["failed"] == 1
    assert "may have corrected it" in results["slides"][0]["error"]
    assert json.loads(file.read_text()) == content


# ------------------------------------------------------------------------------- what is learned


def test_masks_and_outlines_are_the_same_regions(place: Path, tmp_path: Path) -> None:
    for name, corners in BOXES.items():
        mask = np.zeros((260, 320, 3), np.uint8)
        for x, y in corners:
            mask[y : y + LESION, x : x + LESION] = (255, 0, 0)
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    settings = {"regions": str(place / "regions"), "cases": str(place / "cases.csv")}
    settings |= {"output_dir": str(tmp_path / "F")}
    drawn = read_regions(
        FindTrainConfig(outlines=str(tmp_path), colours="red=gs", **settings)  # type: ignore[arg-type]
    )
    given = read_regions(
        FindTrainConfig(outlines=str(place / "outlines"), **settings)  # type: ignore[arg-type]
    )
    assert drawn.counts == given.counts == {"gs": 5}
    for one, other in zip(drawn.regions, given.regions, strict=True):
        assert (one.name, one.group, one.mpp, one.stain) == (one.name, one.name[0], 0.5, "PAS")
        areas = [
            sorted(shapely.Polygon(polygons[0][0]).area for polygons in region.polygons)
            for region in (one, other)
        ]
        assert areas[0] == pytest.approx(areas[1], rel=0.01)


def test_pictures_of_nobody_are_groups_of_their_own_and_unsaid_ones_are_left_out(
    place: Path, tmp_path: Path
) -> None:
    for name in ("A_1", "B_1", "C_1"):
        (tmp_path / f"{name}.geojson").write_bytes(
            (place / "outlines" / f"{name}.geojson").read_bytes()
        )
    done = trained(place, tmp_path / "F", outlines=str(tmp_path), cases=None, mpp=0.5)
    assert (done["regions"], done["groups"], done["group"]) == (3, 3, "region")
    assert [*done["left_out_pictures"]] == ["A_2"]
    notes = " ".join(done["notes"])
    assert "two of one patient may then stand on both sides" in notes
    assert "1 pictures have no file of outlines and are left out (A_2)" in notes


NO_TRAINING: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "no outline": (
        lambda place, folder: {
            "outlines": str(write_outlines(folder / "in/A_1.geojson", []).parent)
        },
        "No glomerulus is outlined in the 1 regions",
    ),
    "outlines of other pictures": (
        lambda place, folder: {
            "outlines": str(write_outlines(folder / "in/A-1.geojson", []).parent)
        },
        "names must be the same",
    ),
    "outlines beside the picture": (
        lambda place, folder: {
            "regions": str(place / "regions/A_1.png"),
            "outlines": str(write_outlines(folder / "A_1.geojson", [outline(900, 0, 60)])),
        },
        "outside the slide of 320 x 260 pixels",
    ),
    "all of another class": (
        lambda place, folder: {"exclude": ["gs"]},
        "No glomerulus is outlined in the 4 regions",
    ),
    "another head": (lambda place, folder: {"head": "plane"}, "Did you mean 'plain'"),
    "no backbone": (lambda place, folder: {"backbone": "minni"}, "Did you mean 'mini'"),
    "something else there": (
        lambda place, folder: {"output_dir": str(place / "outlines")},
        "holds the regions or outlines",
    ),
    "a run there": (
        lambda place, folder: {"output_dir": str(train_output(folder))},
        "holds files that are no finder",
    ),
    "a finder there": (
        lambda place, folder: {"output_dir": str(place / "finder")},
        "give --overwrite",
    ),
}


def train_output(folder: Path) -> Path:
    (folder / "run").mkdir(parents=True)
    (folder / "run/results.json").write_text('{"kind": "adaptation"}')
    return folder / "run"


@pytest.mark.parametrize("case", NO_TRAINING)
def test_no_finder_is_learned_from(case: str, place: Path, finder: Path, tmp_path: Path) -> None:
    given, sentence = NO_TRAINING[case]
    before = contents(finder)
    with pytest.raises(GloVLMError, match=sentence):
        trained(place, tmp_path / "F", **given(place, tmp_path))
    assert not (tmp_path / "F").exists()
    assert contents(finder) == before


def test_one_region_learns_and_says_that_nothing_was_measured(place: Path, tmp_path: Path) -> None:
    done = trained(place, tmp_path / "F", regions=str(place / "regions/A_1.png"))
    assert (done["regions"], done["groups"], done["left_out"]) == (1, 1, {})
    assert any("is not known" in sentence for sentence in done["notes"])


# ------------------------------------------------------------------------------------ what is run


def copied(finder: Path, folder: Path) -> Path:
    (folder / "F").mkdir()
    for path in finder.iterdir():
        if path.name != ".lock":
            (folder / "F" / path.name).write_bytes(path.read_bytes())
    return folder / "F"


def broken(finder: Path, folder: Path, name: str, content: str, *, stated: bool = True) -> Path:
    made = copied(finder, folder)
    (made / name).write_text(content)
    if not stated:
        (made / "manifest.json").unlink()
    return made


NO_FINDING: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "nothing": (lambda finder, folder: {"finder": str(folder / "none")}, "There is no folder"),
    "a run": (
        lambda finder, folder: {"finder": str(train_output(folder))},
        "Expected a finder .*, found a run of `glovlm train`",
    ),
    "a changed finder": (
        lambda finder, folder: {"finder": str(broken(finder, folder, "finder.json", "{}"))},
        "has changed since it was written",
    ),
    "a damaged finder": (
        lambda finder, folder: {
            "finder": str(broken(finder, folder, "finder.json", "{", stated=False))
        },
        "damaged or no JSON",
    ),
    "a damaged head": (
        lambda finder, folder: {
            "finder": str(broken(finder, folder, "head.safetensors", "{", stated=False))
        },
        "missing or damaged",
    ),
    "another backbone": (lambda finder, folder: {"backbone": "mini"}, "was learned on"),
    "a backbone that is elsewhere": (lambda finder, folder: {"backbone": None}, "--backbone"),
    "something else there": (
        lambda finder, folder: {"output_dir": str(train_output(folder))},
        "no outlines of a finder",
    ),
    "outlines of a person there": (
        lambda finder, folder: {
            "output_dir": str(write_outlines(folder / "in/S1.geojson", []).parent)
        },
        "no outlines of a finder",
    ),
    "the finder's own folder": (
        lambda finder, folder: {"output_dir": str(finder)},
        "is the finder's folder",
    ),
}


@pytest.mark.parametrize("case", NO_FINDING)
def test_nothing_is_run_with(case: str, place: Path, finder: Path, tmp_path: Path) -> None:
    given, sentence = NO_FINDING[case]
    changed = {"finder": str(finder), "output_dir": str(tmp_path / "O")} | given(finder, tmp_path)
    output = Path(changed.pop("output_dir"))
    config = configured(Path(changed.pop("finder")), output, place / "slides", **changed)
    with pytest.raises(GloVLMError, match=sentence):
        running.find_on_slides(config)
    assert not (tmp_path / "O").exists()


def test_what_is_wrong_with_a_slide_stays_with_it(
    place: Path, finder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.tiff").write_bytes(b"II*\0no slide")
    picture = place / "regions/A_1.png"
    done = glovlm(
        "find", "run", finder, tmp_path / "in", picture, place / "slides/S2.tiff",
        tmp_path / "gone.svs", "--stain", "H&E", "--backbone", tiny_clip(),
        "--output-dir", tmp_path / "O",
    )  # fmt: skip
    assert done.code == 1
    results = json.loads((tmp_path / "O/results.json").read_text())
    states = {entry["slide"]: entry["status"] for entry in results["slides"]}
    assert states == {"broken": "failed", "A_1": "failed", "S2": "done", "gone": "failed"}
    errors = {entry["slide"]: entry.get("error", "") for entry in results["slides"]}
    assert "scale is not known" in errors["A_1"]  # a picture states none
    assert "There is no slide" in errors["gone"]
    assert str(tmp_path) not in json.dumps(results)
    (s2,) = (entry for entry in results["slides"] if entry["slide"] == "S2")
    assert any("stained H&E, and the finder learned from PAS" in text for text in s2["notes"])
    assert json.loads((tmp_path / "O/S2.geojson").read_text())["features"] == []
    rows = (tmp_path / "O/summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["slide", "broken", "A_1", "S2", "gone"]
    assert rows[3].startswith("S2,done,0,0,")
