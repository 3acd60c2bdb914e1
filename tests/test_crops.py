"""Crops of outlined objects: from slides and region images, GeoJSON and colour masks."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_glovlm.data.folder import column, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.annotations import box_object, polygon_object, write_geojson
from hf_glovlm.slides.files.crops import cut_crops, parse_colours

WIDTH, HEIGHT = 300, 200
GREEN_RED = {"green": "open", "red": "scarred"}


def region(path: Path) -> np.ndarray:
    """A region image in which every pixel tells where it is."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x % 251, y % 241, (x + y) % 239], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def outlines(path: Path, *objects: Any) -> Path:
    write_geojson(path, objects)
    return path


def test_a_crop_is_the_square_around_the_object(tmp_path: Path) -> None:
    pixels = region(tmp_path / "s1.png")
    path = outlines(
        tmp_path / "a.geojson",
        box_object(100, 60, 40, 20, label="open"),
        polygon_object([[200, 100], [240, 120], [200, 140]], label="scar/red"),
        box_object(10, 10, 20, 20),
    )
    progress: list[tuple[int, int]] = []
    out = tmp_path / "out"
    summary = cut_crops(
        tmp_path / "s1.png",
        path,
        out,
        mpp=0.5,
        patient_id="p7",
        on_progress=lambda *seen: progress.append(seen),
    )
    assert (summary.slide, summary.counts, summary.mpp) == ("s1", {"open": 1, "scar/red": 1}, 0.5)
    assert len(summary.unlabelled) == 1
    assert progress == [(1, 2), (2, 2)]
    one, two = rows(out)
    ids = [f["id"] for f in json.loads(path.read_text())["features"]]
    assert one == {
        "file_name": "open/s1_0001.png",
        "label": "open",
        "slide_id": "s1",
        "patient_id": "p7",
        "object_id": ids[0],
        "mpp": "0.5",
        "x": "95",
        "y": "45",
        "width": "50",
        "height": "50",
        "flags": "",
    }
    assert (two["file_name"], two["label"]) == ("scar_red/s1_0002.png", "scar/red")
    np.testing.assert_array_equal(picture(out / one["file_name"]), pixels[45:95, 95:145])
    loaded = load_dataset(out)["all"]
    assert loaded.features["label"].names == ["open", "scar/red"]
    assert column(loaded, "patient_id") == ["p7", "p7"]
    assert column(loaded, "mpp") == [0.5, 0.5]


def test_the_scale_is_never_guessed_and_grows_when_a_crop_is_shrunk(tmp_path: Path) -> None:
    region(tmp_path / "s.png")
    path = outlines(tmp_path / "a.geojson", box_object(100, 50, 80, 80, label="a"))
    for mpp, mpp_of_crop in ((None, ""), (0.25, "0.5")):
        summary = cut_crops(
            tmp_path / "s.png", path, tmp_path / "out", mpp=mpp, margin=1, max_side=40
        )
        (row,) = rows(tmp_path / "out")
        assert (row["mpp"], row["width"]) == (mpp_of_crop, "80")
        assert picture(tmp_path / "out" / row["file_name"]).shape == (40, 40, 3)
        assert any("scale is not known" in note for note in summary.notes) is (mpp is None)


def test_beyond_the_edge_is_white_and_the_object_is_flagged(tmp_path: Path) -> None:
    pixels = region(tmp_path / "s.png")
    inside = box_object(2, 90, 40, 40, label="a")  # its crop reaches beyond, the object does not
    corner = box_object(-5, 170, 40, 30, label="a")
    path = outlines(tmp_path / "a.geojson", inside, corner)
    summary = cut_crops(tmp_path / "s.png", path, tmp_path / "out")
    assert summary.flags == {"partial": 1}
    one, two = rows(tmp_path / "out")
    assert [one["flags"], two["flags"]] == ["", "partial"]
    crop = picture(tmp_path / "out" / one["file_name"])
    assert (one["x"], crop.shape) == ("-3", (50, 50, 3))
    assert (crop[:, :3] == 255).all()
    np.testing.assert_array_equal(crop[:, 3:], pixels[85:135, :47])
    assert (picture(tmp_path / "out" / two["file_name"])[-3:] == 255).all()
    summary = cut_crops(tmp_path / "s.png", path, tmp_path / "out", keep_flagged=False)
    assert summary.skipped == [corner.id]
    assert len(rows(tmp_path / "out")) == 1
    assert [p.name for p in (tmp_path / "out" / "a").iterdir()] == ["s_0001.png"]  # no stale file


def test_an_object_outlined_twice_is_cut_once(tmp_path: Path) -> None:
    region(tmp_path / "s.png")
    items = [
        box_object(50, 50, 40, 40, label="a"),
        box_object(52, 50, 40, 40, label="a"),  # the same
        box_object(75, 50, 40, 40, label="a"),  # a neighbour that overlaps a little
        box_object(200, 100, 40, 40, label="a"),
        box_object(201, 101, 40, 40, label="b"),  # the same, and another class
    ]
    path = outlines(tmp_path / "a.geojson", *items)
    summary = cut_crops(tmp_path / "s.png", path, tmp_path / "out")
    ids = [item.id for item in items]
    assert summary.duplicates == [(ids[1], ids[0]), (ids[4], ids[3])]
    assert summary.counts == {"a": 3}
    assert [row["flags"] for row in rows(tmp_path / "out")] == ["", "", "disputed"]


def test_slides_share_a_folder_and_a_second_run_replaces_its_own(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        region(tmp_path / f"{name}.png")
    both = outlines(
        tmp_path / "both.geojson",
        box_object(50, 50, 40, 40, label="a"),
        box_object(150, 50, 40, 40, label="b"),
    )
    one = outlines(tmp_path / "one.geojson", box_object(50, 50, 40, 40, label="b"))
    out = tmp_path / "out"
    cut_crops(tmp_path / "s1.png", both, out)
    cut_crops(tmp_path / "s2.png", both, out, patient_id="p")
    cut_crops(tmp_path / "s1.png", one, out)
    result = [(row["slide_id"], row["label"], row["patient_id"]) for row in rows(out)]
    assert sorted(result) == [("s1", "b", ""), ("s2", "a", "p"), ("s2", "b", "p")]
    assert len(load_dataset(out)["all"]) == 3
    assert sorted(str(p.relative_to(out)) for p in out.glob("*/*")) == sorted(
        row["file_name"] for row in rows(out)
    )
    before = (out / "metadata.csv").read_bytes()
    cut_crops(tmp_path / "s1.png", one, out)
    assert (out / "metadata.csv").read_bytes() == before
    cut_crops(tmp_path / "s1.png", one, out, slide_id="a b")
    with pytest.raises(GloVLMError, match="'a b' and 'a_b' would share file names"):
        cut_crops(tmp_path / "s1.png", one, out, slide_id="a_b")


def mask_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    mask = Image.new("RGB", size)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((40, 40, 79, 79), fill=(0, 255, 0))
    draw.ellipse((120, 40, 149, 69), fill=(255, 0, 0))
    draw.ellipse((200, 60, 239, 99), fill=(0, 255, 0))  # two that touch
    draw.ellipse((238, 60, 277, 99), fill=(0, 255, 0))
    draw.ellipse((-20, 120, 19, 159), fill=(255, 0, 0))  # cut by the edge
    draw.point([(100, 150), (102, 150)], fill=(0, 255, 0))  # specks
    mask.save(path)
    return path


@pytest.mark.parametrize("scale", [1, 4])
def test_blobs_of_a_mask_are_objects(tmp_path: Path, scale: int) -> None:
    image = Image.fromarray(region(tmp_path / "s.png"))
    image.resize((WIDTH * scale, HEIGHT * scale)).save(tmp_path / "s.png")
    mask = mask_image(tmp_path / "mask.png")
    summary = cut_crops(tmp_path / "s.png", mask, tmp_path / "out", colours=GREEN_RED)
    assert summary.counts == {"open": 2, "scarred": 2}
    assert (summary.specks, summary.flags) == (2, {"partial": 1, "merged": 1})
    result = {row["object_id"]: row for row in rows(tmp_path / "out")}
    assert [result[f"blob-{i}"]["flags"] for i in range(1, 5)] == ["", "", "merged", "partial"]
    first = result["blob-1"]
    assert (first["label"], first["width"]) == ("open", str(50 * scale))
    assert (first["x"], first["y"]) == (str(35 * scale), str(35 * scale))


def test_a_mask_without_a_blob_is_no_mistake(tmp_path: Path) -> None:
    region(tmp_path / "s.png")
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "m.png")
    summary = cut_crops(tmp_path / "s.png", tmp_path / "m.png", tmp_path / "o", colours=GREEN_RED)
    assert summary.counts == {}
    assert any("no blob" in note for note in summary.notes)


def test_colours_of_a_command_line() -> None:
    text = "green=non_sclerosed, #FF0000 = sclerosed"
    assert parse_colours(text) == {"green": "non_sclerosed", "#FF0000": "sclerosed"}
    for bad in ("", "green", "green=", "=x", "green=a,green=b"):
        with pytest.raises(GloVLMError, match="Expected colours as 'green=CLASS"):
            parse_colours(bad)
    with pytest.raises(GloVLMError, match="Unknown colour 'gren'"):
        parse_colours("gren=a")


def _foreign_table(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "metadata.csv").write_text("file_name,label\na.png,x\n")


def _blue_mask(folder: Path) -> None:
    mask = Image.fromarray(picture(folder / "mask.png"))
    ImageDraw.Draw(mask).rectangle((0, 0, 30, 30), fill=(0, 0, 255))
    mask.save(folder / "mask.png")


@pytest.mark.parametrize(
    ("annotations", "options", "spoil", "sentence"),
    [
        ("a.geojson", {"margin": 0.5}, None, "a margin of at least 1, found 0.5"),
        ("a.geojson", {"colours": GREEN_RED}, None, "is no mask: colours do not go with it"),
        ("mask.png", {}, None, "is a mask: say which colour is which class"),
        ("small.png", {"colours": GREEN_RED}, None, "has 100 x 100 pixels and the slide 300 x 200"),
        ("mask.png", {"colours": GREEN_RED}, _blue_mask, "no class was given for.*#0000ff"),
        ("bare.geojson", {}, None, "none of 1 objects has a class"),
        ("far.geojson", {}, None, "lies outside the slide .300 x 200 pixels.*another slide"),
        ("no.geojson", {}, None, "Expected a GeoJSON file"),
        ("a.geojson", {}, _foreign_table, "does not hold file_name, label, slide_id"),
    ],
)
def test_impossible_requests_are_refused(
    tmp_path: Path, annotations: str, options: Any, spoil: Any, sentence: str
) -> None:
    region(tmp_path / "s.png")
    mask_image(tmp_path / "mask.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "small.png")
    outlines(tmp_path / "a.geojson", box_object(50, 50, 40, 40, label="a"))
    outlines(tmp_path / "bare.geojson", box_object(50, 50, 40, 40))
    outlines(tmp_path / "far.geojson", box_object(900, 50, 40, 40, label="a"))
    if spoil:
        spoil(tmp_path)
    with pytest.raises(GloVLMError, match=sentence) as caught:
        cut_crops(tmp_path / "s.png", tmp_path / annotations, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_real_slide(tmp_path: Path, shared: Path) -> None:
    openslide = pytest.importorskip("openslide")
    slide = shared / "data" / "slides" / "cmu-1-small-region.svs"
    path = outlines(tmp_path / "a.geojson", box_object(500, 600, 100, 80, label="tissue"))
    summary = cut_crops(slide, path, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert (row["slide_id"], row["width"]) == ("cmu-1-small-region", "125")
    assert float(row["mpp"]) == pytest.approx(summary.mpp)
    with openslide.OpenSlide(slide) as opened:
        expected = opened.read_region((int(row["x"]), int(row["y"])), 0, (125, 125))
        assert summary.mpp == pytest.approx(float(opened.properties["openslide.mpp-x"]), rel=1e-3)
    result = picture(tmp_path / "out" / row["file_name"])
    np.testing.assert_array_equal(result, np.asarray(expected.convert("RGB")))


def test_real_masks_give_the_crops_that_were_made_from_them(tmp_path: Path, shared: Path) -> None:
    """Eight region images; the published crops left out partial and merged glomeruli too."""
    table = shared / "data" / "glomeruli_sclerosis" / "metadata.csv"
    with table.open(newline="") as stream:
        published = list(csv.DictReader(stream))
    agreed = total = 0
    for image in sorted((shared / "data" / "glomeruli_rois").glob("HE_I_1_S_[12]_*.jpg")):
        mask = image.with_name(f"{image.stem}_mask.png")
        colours = {"green": "non_sclerosed", "red": "sclerosed"}
        out = tmp_path / image.stem
        cut_crops(image, mask, out, colours=colours, keep_flagged=False, min_extent=32)
        mine = rows(out)
        for row in published:
            if row["roi"] != image.stem:
                continue
            total += 1
            x0, y0, x1, y1 = map(int, row["bbox"].split())
            agreed += any(
                row["label"] == mine_row["label"]
                and abs(max(int(mine_row["x"]), 0) - x0) <= 2
                and abs(max(int(mine_row["y"]), 0) - y0) <= 2
                and abs(int(mine_row["width"]) - max(x1 - x0, y1 - y0)) <= 12
                for mine_row in mine
            )
    assert total > 50
    assert agreed / total > 0.95


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_region_has_a_scale_of_a_positive_number(tmp_path: Path, mpp: float) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "region.png")
    with pytest.raises(GloVLMError, match="positive number of micrometres"):
        cut_crops(tmp_path / "region.png", tmp_path / "a.geojson", tmp_path / "out", mpp=mpp)
