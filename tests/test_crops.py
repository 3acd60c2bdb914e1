"""Crops of outlined objects: from slides and region images, GeoJSON and colour masks."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Completed, Glovlm
from PIL import Image, ImageDraw
from slides_made import write_slide

from hf_glovlm.data.folder import column, describe_reading, load_dataset, open_image
from hf_glovlm.data.outlines import open_outlined
from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files import crops, wsi
from hf_glovlm.slides.files.annotations import box_object, polygon_object, write_geojson
from hf_glovlm.slides.files.crops import cut_crops

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
    assert progress == [(1, 3), (2, 3), (3, 3)]
    one, two, three = rows(out)
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
    assert (three["file_name"], three["label"]) == ("unlabelled/s1_0003.png", "")
    assert summary.unlabelled == [three["object_id"]] == ids[2:]
    np.testing.assert_array_equal(picture(out / one["file_name"]), pixels[45:95, 95:145])
    loaded = load_dataset(out)["all"]
    assert loaded.features["label"].names == ["open", "scar/red"]
    assert column(loaded, "patient_id") == ["p7", "p7"]
    assert column(loaded, "mpp") == [0.5, 0.5]


def inside(path: Path) -> np.ndarray:
    """What a crop's alpha says lies inside the outline."""
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
    assert set(np.unique(alpha)) <= {0, 255}
    return alpha == 255


def shape(kind: str, *coordinates: Any) -> dict[str, Any]:
    rings = list(coordinates) if kind == "Polygon" else [[ring] for ring in coordinates]
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "id": "o", "geometry": geometry, "properties": {}}


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def in_square(x: np.ndarray, y: np.ndarray, left: float, top: float, side: float) -> np.ndarray:
    return (np.abs(x - left - side / 2) < side / 2) & (np.abs(y - top - side / 2) < side / 2)


TURN = np.linspace(0, 2 * np.pi, 2000)
DISC = np.stack([100.3 + 40 * np.cos(TURN), 80.7 + 40 * np.sin(TURN)], axis=1).tolist()


@pytest.mark.parametrize("max_side", [2048, 40], ids=["level 0", "shrunk"])
@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (
            shape("Polygon", square(60, 40, 80), square(80, 60, 20)),
            lambda x, y: in_square(x, y, 60, 40, 80) & ~in_square(x, y, 80, 60, 20),
        ),
        (
            shape("MultiPolygon", square(60, 40, 20), square(120, 100, 20)),
            lambda x, y: in_square(x, y, 60, 40, 20) | in_square(x, y, 120, 100, 20),
        ),
        (
            shape("Polygon", [[60, 40.3], [140, 120.3], [140, 40.3], [60, 120.3], [60, 40.3]]),
            lambda x, y: (np.abs(y - 80.3) < np.abs(x - 100)) & (np.abs(x - 100) < 40),
        ),
        (shape("Polygon", DISC), lambda x, y: np.hypot(x - 100.3, y - 80.7) < 40),
    ],
    ids=["hole", "two parts", "crosses itself", "disc"],
)
def test_alpha_is_what_lies_inside_the_outline_by_the_middle_of_each_pixel(
    tmp_path: Path, feature: Any, expected: Any, max_side: int
) -> None:
    pixels = region(tmp_path / "s.png")
    (tmp_path / "a.geojson").write_text(json.dumps(feature))
    cut_crops(tmp_path / "s.png", tmp_path / "a.geojson", tmp_path / "out", max_side=max_side)
    (row,) = rows(tmp_path / "out")
    crop = inside(tmp_path / "out" / row["file_name"])
    left, top, side = int(row["x"]), int(row["y"]), int(row["width"])
    y, x = (np.mgrid[: len(crop), : len(crop)] + 0.5) * (side / len(crop))
    x, y = x + left, y + top
    np.testing.assert_array_equal(crop, expected(x, y))
    if side == len(crop):  # the whole square is there under any alpha, for all that read images
        whole = pixels[top : top + side, left : left + side]
        np.testing.assert_array_equal(picture(tmp_path / "out" / row["file_name"]), whole)
        opened = open_image(tmp_path / "out" / row["file_name"])
        np.testing.assert_array_equal(np.asarray(opened), whole)


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
    green, red, _ = picture(mask).transpose(2, 0, 1)[[1, 0, 2]] > 0
    own = {"blob-1": green[35:85, 35:85], "blob-4": np.pad(red, ((0, 0), (20, 0)))}
    y, x = int(result["blob-4"]["y"]) // scale, int(result["blob-4"]["x"]) // scale
    own["blob-4"] = own["blob-4"][y : y + 50, x + 20 : x + 70]  # white beyond the edge is outside
    for name, expected in own.items():
        alpha = inside(tmp_path / "out" / result[name]["file_name"])
        np.testing.assert_array_equal(alpha, np.kron(expected, np.ones((scale, scale), bool)))


def test_a_crop_of_a_mask_has_its_own_blob_and_no_other(tmp_path: Path) -> None:
    region(tmp_path / "s.png")
    mask = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(mask)
    draw.rectangle((50, 50, 89, 89), fill=(0, 255, 0))
    draw.rectangle((60, 60, 79, 79), fill=(0, 0, 0))
    draw.rectangle((66, 66, 73, 73), fill=(255, 0, 0))
    mask.save(tmp_path / "m.png")
    cut_crops(
        tmp_path / "s.png", tmp_path / "m.png", tmp_path / "out", colours=GREEN_RED, min_extent=4
    )
    areas = {
        row["label"]: inside(tmp_path / "out" / row["file_name"]) for row in rows(tmp_path / "out")
    }
    assert {name: area.sum() for name, area in areas.items()} == {
        "open": 40**2 - 20**2,
        "scarred": 64,
    }
    assert not areas["open"][len(areas["open"]) // 2].all()


def discs(path: Path, pixels: Any, mode: str | None = None, palette: bool = False) -> Path:
    """A mask with a disc of each value that is not background, from left to right."""
    background, *values = pixels
    shape = (HEIGHT, WIDTH) if np.ndim(background) == 0 else (HEIGHT, WIDTH, 3)
    mask = np.full(shape, background, dtype=np.uint16 if mode else np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for i, value in enumerate(values):
        mask[np.hypot(x - 60 - 90 * i, y - 80) < 20] = value
    image = Image.fromarray(mask)
    if palette:
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 200, 0])
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("values", "colours", "options"),
    [
        ([(255,) * 3, (0,) * 3], "black=a", {}),
        ([(0,) * 3, (255,) * 3], "white=a", {}),
        ([(0,) * 3, (128,) * 3, (255,) * 3], "grey=a,white=b", {}),
        ([(0,) * 3, (1,) * 3, (2,) * 3], "#010101=a,#020202=b", {}),
        ([0, 1, 2], "1=a,2=b", {}),
        ([0, 1, 2], "1=a,2=b", {"palette": True}),
        ([0, 1, 300], "1=a,300=b", {"mode": "I;16"}),
        ([255, 0], "0=a", {}),
        ([0, 255], "255=a", {}),
        ([0, 255], "white=a", {}),
        ([0, 1, 2], "red=a,#00c800=b", {"palette": True}),
    ],
)
def test_a_colour_or_number_that_is_named_is_a_class(
    tmp_path: Path, glovlm: Glovlm, values: Any, colours: str, options: Any
) -> None:
    region(tmp_path / "s.png")
    mask = discs(tmp_path / "s_mask.png", values, **options)
    command = ("data", "crops", tmp_path / "s.png", mask, "--colours", colours)
    done = glovlm(*command, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    found = [(row["label"], row["x"], row["y"]) for row in rows(tmp_path / "out")]
    assert found == [("a", "36", "56"), ("b", "126", "56")][: len(values) - 1]


@pytest.mark.parametrize(
    ("values", "colours", "sentence"),
    [
        ([(0,) * 3, (1,) * 3], "green=a", "#000000 (58,755 pixels), #010101 (1,245 pixels); it"),
        ([(0,) * 3, (1,) * 3], "green=a", "small numbers: give --colours 1=CLASS,2=CLASS"),
        ([0, 255], "1=a", "the mask holds 0 (58,755 pixels), 255 (1,245 pixels)"),
        ([(255,) * 3, (0,) * 3], "green=a", "#ffffff (58,755 pixels), #000000 (1,245 pixels)."),
    ],
)
def test_a_mask_that_gives_no_crop_is_an_error_that_names_its_colours(
    tmp_path: Path, glovlm: Glovlm, values: Any, colours: str, sentence: str
) -> None:
    region(tmp_path / "s.png")
    mask = discs(tmp_path / "m.png", values)
    command = ("data", "crops", tmp_path / "s.png", mask, "--colours", colours)
    done = glovlm(*command, "--output-dir", tmp_path / "out")
    assert done.code == 1, done.err
    assert sentence in done.printed
    assert not (tmp_path / "out" / "metadata.csv").exists()


@pytest.mark.parametrize(
    ("colours", "sentence"),
    [
        ("green", "Expected colours as 'green=CLASS"),
        ("green=a,green=b", "each once"),
        ("gren=a", "Unknown colour 'gren'"),
        ("red=a,#ff0000=b", "'red' and '#ff0000' are one colour"),
        ("1=a,red=b", "Expected colours or numbers, found both"),
        ("1=a", "holds colours and no numbers"),
    ],
)
def test_colours_that_are_none_are_refused(
    tmp_path: Path, glovlm: Glovlm, colours: str, sentence: str
) -> None:
    region(tmp_path / "s.png")
    mask = mask_image(tmp_path / "m.png")
    command = ("data", "crops", tmp_path / "s.png", mask, "--colours", colours)
    done = glovlm(*command, "--output-dir", tmp_path / "out")
    assert (done.code, len(done.errors)) == (2, 1)
    assert sentence in done.err


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
        (
            "wide.geojson",
            {"margin": 99},
            None,
            "29,700 x 29,700 pixels.*lower the margin",
        ),
        ("a.geojson", {"colours": GREEN_RED}, None, "is no mask: colours do not go with it"),
        ("mask.png", {}, None, "is a mask: say which colour is which class"),
        ("small.png", {"colours": GREEN_RED}, None, "has 100 x 100 pixels and the slide 300 x 200"),
        ("mask.png", {"colours": GREEN_RED}, _blue_mask, "no class was given for.*#0000ff"),
        ("far.geojson", {}, None, "outside the slide of 300 x 200 pixels.*another slide"),
        ("no.geojson", {}, None, "a file of outlines"),
        ("a.geojson", {"scene": "2"}, None, "one picture and holds no scenes"),
        ("a.geojson", {"classes": ["b"]}, None, "Asked for: b; its classes are a"),
        ("mask.png", {"colours": GREEN_RED, "exclude": ["opn"]}, None, "Did you mean 'open'"),
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
    outlines(tmp_path / "far.geojson", box_object(900, 50, 40, 40, label="a"))
    outlines(tmp_path / "wide.geojson", box_object(0, 50, 300, 40, label="a"))
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


def test_real_masks_give_the_crops_that_were_made_from_them(
    tmp_path: Path, shared: Path, glovlm: Glovlm
) -> None:
    """Eight region images; the published crops left out partial and merged glomeruli too."""
    table = shared / "data" / "glomeruli_sclerosis" / "metadata.csv"
    with table.open(newline="") as stream:
        published = list(csv.DictReader(stream))
    place, out = tmp_path / "regions", tmp_path / "out"
    place.mkdir()
    images = sorted((shared / "data" / "glomeruli_rois").glob("HE_I_1_S_[12]_*.jpg"))
    for image in images:
        (place / image.name).symlink_to(image)
        mask = image.with_name(f"{image.stem}_mask.png")
        (place / mask.name).symlink_to(mask)
    command = ("data", "crops", place, place, "--colours", "green=non_sclerosed,red=sclerosed")
    done = glovlm(*command, "--drop-flagged", "--min-extent", 32, "--output-dir", out)
    assert done.code == 0, done.err
    mine = rows(out)
    agreed = total = 0
    for row in published:
        if row["roi"] not in {image.stem for image in images}:
            continue
        total += 1
        x0, y0, x1, y1 = map(int, row["bbox"].split())
        agreed += any(
            row["label"] == mine_row["label"]
            and row["roi"] == mine_row["slide_id"]
            and abs(max(int(mine_row["x"]), 0) - x0) <= 2
            and abs(max(int(mine_row["y"]), 0) - y0) <= 2
            and abs(int(mine_row["width"]) - max(x1 - x0, y1 - y0)) <= 12
            for mine_row in mine
        )
    assert total > 50
    assert agreed / total > 0.95


@pytest.mark.parametrize(
    ("features", "areas", "note"),
    [
        ([square(50, 50, 40), square(53, 53, 34)], [1600], "1 outlines lie in a slightly larger"),
        ([square(53, 53, 34), square(50, 50, 40)], [34**2], "where the two differ by less than"),
        ([square(50, 50, 40), square(56, 56, 28)], [1600, 784], "Name the class that is meant"),
        ([square(50, 50, 40), square(80, 50, 40)], [1600, 1600], None),
        ([square(-39.7, 50, 40)], [1], "1 outlines reach beyond the picture"),
        ([square(-20, 50, 40)], [800], "1 outlines reach beyond the picture: what lies there is"),
        ([[[50, 50], [90, 50.2], [50, 50.3], [50, 50]]], [1], "no more than a pixel of their crop"),
        ([[[-9, 9], [-9, -9], [9, -9], [-9, 9]]], [1], "no more than a pixel of their crop (o0)"),
    ],
    ids=[
        "tuft second",
        "tuft first",
        "small tuft",
        "neighbours",
        "at the edge",
        "beyond",
        "thin",
        "beside",
    ],
)
def test_outlines_that_cannot_be_right_are_told_and_alpha_is_of_one_object(
    tmp_path: Path, features: Any, areas: list[int], note: str | None
) -> None:
    region(tmp_path / "s.png")
    path = tmp_path / "a.geojson"
    path.write_text(
        json.dumps([shape("Polygon", f) | {"id": f"o{i}"} for i, f in enumerate(features)])
    )
    options = {"margin": 1, "outline_of": "capsule"}
    summary = cut_crops(tmp_path / "s.png", path, tmp_path / "out", **options)
    found = [
        int(inside(tmp_path / "out" / row["file_name"]).sum()) for row in rows(tmp_path / "out")
    ]
    assert found == areas
    told = [sentence for sentence in summary.notes if "outlines" in sentence]
    assert bool(told) == (note is not None)
    assert note is None or any(note in sentence for sentence in told)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_region_has_a_scale_of_a_positive_number(tmp_path: Path, mpp: float) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "region.png")
    with pytest.raises(GloVLMError, match="positive number of micrometres"):
        cut_crops(tmp_path / "region.png", tmp_path / "a.geojson", tmp_path / "out", mpp=mpp)


# --------------------------------------------------------------------------- folders of slides


def boxes(path: Path, *named: tuple[int, str | None]) -> Path:
    """Outlines of 40 x 40 pixels at x, each of a class or none, with ids that come from x."""
    features = []
    for x, label in named:
        ring = [[x, 60], [x + 40, 60], [x + 40, 100], [x, 100], [x, 60]]
        classified = {} if label is None else {"classification": {"name": label}}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append(
            {"type": "Feature", "id": f"g{x}", "geometry": geometry, "properties": classified}
        )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_a_folder_is_cut_with_its_cases_and_an_error_stays_with_its_slide(
    tmp_path: Path, glovlm: Glovlm
) -> None:
    slides, outlined = tmp_path / "slides", tmp_path / "outlines"
    slides.mkdir()
    for name in ("S1", "S1.2", "S2", "S3", "S4"):
        region(slides / f"{name}.png")
    boxes(outlined / "S1.geojson", (50, "a"), (150, None))
    boxes(outlined / "S1.2.png.geojson", (50, "b"))
    boxes(outlined / "S3.geojson", (50, "a"))
    (outlined / "S2.geojson").write_text("{")
    boxes(outlined / "other.geojson", (50, "a"))
    (tmp_path / "cases.csv").write_text(
        "slide_id,case_id,patient_id,biopsy,stain,mpp,kidney,section_um,reader,read\n"
        "S1.png,,P1,2,PAS,0.5,,2.50,MK,a\nS1.2,C2,P2,,H&E,,,,,\nS2,C2,P2,,,,native,,,\n"
        "S4,C2,P2,,,,,,,\n"
    )
    command = ("data", "crops", slides, outlined, "--cases", tmp_path / "cases.csv")
    done = glovlm(*command, "--output-dir", tmp_path / "out")
    assert done.code == 1, done.err
    keys = ("slide_id", "label", "patient_id", "case_id", "stain", "mpp", "kidney", "section_um")
    assert [tuple(row.get(key) for key in keys) for row in rows(tmp_path / "out")] == [
        ("S1.2", "b", "P2", "C2", "H&E", "", "native", ""),
        ("S1", "a", "P1", "P1 / 2", "PAS", "0.5", "", "2.5"),
        ("S1", "", "P1", "P1 / 2", "PAS", "0.5", "", "2.5"),
    ]
    assert [row["reader"] for row in rows(tmp_path / "out")] == ["", "MK", "MK"]
    assert not {"block", "level", "read"} & {*rows(tmp_path / "out")[0]}  # nothing, or of no image
    crops, not_cut, failed = re.split("Not cut|Failed: 2 slides", done.printed)
    assert "S1 1 0 1" in crops
    assert re.fullmatch(" slide reason S4 .* no outlines of this name ", not_cut)
    assert re.fullmatch(" slide reason S2 .*not JSON.* S3 .*no row for the slide S3.*", failed)
    assert "(other.geojson)" in done.err
    for name in ("S2", "S3"):
        boxes(outlined / f"{name}.geojson", (50, "a"))
    with (tmp_path / "cases.csv").open("a") as stream:
        stream.write("S3,C3,P3,,,\n")
    done = glovlm(*command, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert len(rows(tmp_path / "out")) == 5


def test_masks_of_a_folder_lie_beside_the_regions(tmp_path: Path, glovlm: Glovlm) -> None:
    place = tmp_path / "regions"
    place.mkdir()
    for name, suffix in (("R1", "png"), ("R2", "jpg"), ("R3", "png")):
        region(place / f"{name}.{suffix}")
    mask_image(place / "R1_mask.png")
    mask_image(place / "R2.png")
    discs(place / "R3-mask.png", [(0,) * 3])
    command = ("data", "crops", place, place, "--colours", "green=open,red=scarred")
    command += ("--exclude", "scarred", "--output-dir", place / "out")
    for _ in range(2):  # the crops are no regions
        done = glovlm(*command)
        assert done.code == 0, done.err  # R3 shows no object, which is no error among others
    found = [(row["slide_id"], row["label"]) for row in rows(place / "out")]
    assert found == [("R1", "open")] * 2 + [("R2", "open")] * 2
    assert "the mask holds #000000 (60,000 pixels)" in done.out
    assert "2 slides: Objects were left out: class scarred (2)." in done.err
    (place / "masks").mkdir()
    for mask in ("R1_mask.png", "R3-mask.png"):
        (place / mask).rename(place / "masks" / f"{mask[:2]}.png")
    (place / "R2.png").unlink()
    command = (*command[:3], place / "masks", *command[4:])
    done = glovlm(*command)
    assert (done.code, len(rows(place / "out"))) == (0, 4), done.err
    assert "leave --slide-id out" in glovlm(*command, "--slide-id", "R").err


def test_what_is_no_glomerulus_is_left_out_and_named(tmp_path: Path, glovlm: Glovlm) -> None:
    region(tmp_path / "s.png")
    path = tmp_path / "s.geojson"
    named = [(30, "viable"), (80, "scarred"), (130, "artery"), (180, "Ignore*"), (230, "Region*")]
    boxes(path, *named)
    content = json.loads(path.read_text())
    tissue = {"type": "Polygon", "coordinates": [[[1, 1], [290, 1], [290, 190], [1, 190], [1, 1]]]}
    content["features"].insert(0, {"type": "Feature", "geometry": tissue, "properties": {}})
    path.write_text(json.dumps(content))

    def cut(*options: object) -> list[str]:
        done = glovlm("data", "crops", tmp_path / "s.png", path, "--output-dir", out, *options)
        assert done.code == 0, done.err
        told.append(done.err)
        return [row["label"] for row in rows(out)]

    out, told = tmp_path / "out", []
    assert cut() == ["viable", "scarred", "artery"]
    for reason in ("Ignore*", "Region*", "holds other outlines"):
        assert reason in told[0]
    assert cut("--exclude", "artery") == ["viable", "scarred"]
    assert cut("--classes", "viable", "--classes", "scarred") == ["viable", "scarred"]
    assert not (out / "artery").exists()


def test_outlines_count_from_the_origin_that_is_given(tmp_path: Path, glovlm: Glovlm) -> None:
    region(tmp_path / "s.png")
    path = boxes(tmp_path / "s.geojson", (50, "a"))
    command = ("data", "crops", tmp_path / "s.png", path, "--output-dir", tmp_path / "out")
    done = glovlm(*command, "--origin", "100,20")
    assert done.code == 0, done.err
    assert [(row["x"], row["y"]) for row in rows(tmp_path / "out")] == [("145", "75")]
    assert "outlines count from 100,20 (given)" in done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    origin = manifest["made_from"]["slides"]["s"]["origin"]
    assert origin == {"x": 100.0, "y": 20.0, "source": "given"}


@pytest.mark.parametrize(("origin", "left"), [("auto", "145"), ("bounds", "145"), ("slide", "45")])
def test_outlines_of_a_slide_with_bounds_count_from_there(
    tmp_path: Path, glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch, origin: str, left: str
) -> None:
    write_slide(tmp_path / "s.tiff", WIDTH, HEIGHT, blobs=1)
    path = boxes(tmp_path / "s.geojson", (50, "a"))

    def open_scanned(*arguments: Any, **options: Any) -> wsi.Slide:
        slide = wsi.open_slide(*arguments, **options)
        slide.bounds = (100, 20)
        return slide

    monkeypatch.setattr(crops, "open_slide", open_scanned)
    command = ("data", "crops", tmp_path / "s.tiff", path, "--output-dir", tmp_path / "out")
    done = glovlm(*command, *([] if origin == "auto" else ["--origin", origin]))
    assert done.code == 0, done.err
    assert [row["x"] for row in rows(tmp_path / "out")] == [left]


# ------------------------------------------------------------------------------ work of a person


class Labelling:
    """Outlines without a class, cut, and labelled in the table by a person."""

    def __init__(self, folder: Path, glovlm: Glovlm) -> None:
        self.out, self.path, self._slide = folder / "out", folder / "s.geojson", folder / "s.png"
        self._glovlm = glovlm
        region(self._slide)
        boxes(self.path, (20, None), (80, None), (140, None), (200, "open"))
        assert self.cut().code == 0

    def cut(self, *options: object) -> Completed:
        command = ("data", "crops", self._slide, self.path, "--output-dir", self.out, *options)
        return self._glovlm(*command)

    def type(self, **labels: str) -> None:
        """Give crops a label by the object's id, as a spreadsheet saves it."""
        with (self.out / "metadata.csv").open(newline="") as stream:
            separator = ";" if ";" in stream.readline() else ","
            stream.seek(0)
            table = list(csv.DictReader(stream, delimiter=separator))
        for row in table:
            row["label"] = labels.get(row["object_id"], row["label"])
            row["remark"] = f"seen {row['object_id']}"
        lines = [";".join(table[0])] + [";".join(map(str, row.values())) for row in table]
        (self.out / "metadata.csv").write_text("\n".join(lines) + "\n")

    @property
    def labels(self) -> dict[str, str]:
        """Label by the place of the object's middle; every image is there."""
        table = rows(self.out)
        assert all((self.out / row["file_name"]).is_file() for row in table)
        middle = (int(row["x"]) + int(row["width"]) // 2 - 20 for row in table)
        return {f"g{x}": row["label"] for x, row in zip(middle, table, strict=True)}


@pytest.fixture
def labelling(tmp_path: Path, glovlm: Glovlm) -> Labelling:
    return Labelling(tmp_path, glovlm)


def test_crops_without_a_label_are_left_out_of_a_data_set_and_counted(
    labelling: Labelling, glovlm: Glovlm
) -> None:
    assert labelling.labels == {"g20": "", "g80": "", "g140": "", "g200": "open"}
    labelling.type(g20="scarred")
    loaded = load_dataset(labelling.out)
    assert sorted(loaded["all"]["file_name"]) == ["open/s_0004.png", "unlabelled/s_0001.png"]
    assert loaded["all"].features["label"].names == ["open", "scarred"]
    assert "2 of 4 rows have no label yet and are left out" in describe_reading(loaded).notes
    done = glovlm("data", "check", labelling.out)
    assert "2 of 4 rows have no label yet" in done.err
    labelling.type(g20="", g200="")
    done = glovlm("data", "check", labelling.out)
    assert done.code == 2
    assert "none of 4 rows has a label yet; fill in the column label" in done.errors[0]
    (labelling.out / "manifest.json").unlink()  # of other tables, a row without label is a slip
    with pytest.raises(GloVLMError, match="4 of 4 rows have no label"):
        load_dataset(labelling.out)


@pytest.mark.parametrize("change", ["nothing", "margin", "ids", "order", "moved"])
def test_labels_that_a_person_typed_outlast_a_new_cut(labelling: Labelling, change: str) -> None:
    labelling.type(g20="scarred", g140="open", g200="scarred")
    content = json.loads(labelling.path.read_text())
    features = content["features"]
    options = ["--margin", "2"] if change == "margin" else []
    if change == "ids":
        for feature in features:
            feature["id"] = "new " + feature["id"]
    elif change == "order":  # and ids that count
        features.reverse()
        for i, feature in enumerate(features):
            feature["id"] = str(i)
    elif change == "moved":
        for point in features[2]["geometry"]["coordinates"][0]:
            point[0] += 30
    labelling.path.write_text(json.dumps(content))
    third = "g170" if change == "moved" else "g140"
    for _ in range(2):
        done = labelling.cut(*options)
        assert done.code == 0, done.err
        assert "3 labels that were typed in metadata.csv are kept" in done.err
        assert "1 of them are not the class of the outline" in done.err
        expected = {"g20": "scarred", "g80": "", third: "open", "g200": "scarred"}
        assert labelling.labels == expected
        remarks = {row["x"]: row["remark"] for row in rows(labelling.out)}
        assert sorted(remarks.values()) == ["seen g140", "seen g20", "seen g200", "seen g80"]


def test_crops_that_a_person_moves_to_a_class_folder_have_that_class(
    labelling: Labelling, glovlm: Glovlm
) -> None:
    (labelling.out / "scarred").mkdir()
    for old, new in (
        ("unlabelled/s_0001.png", "scarred"),
        ("unlabelled/s_0003.png", "open"),
        ("open/s_0004.png", "scarred"),
    ):
        (labelling.out / old).rename(labelling.out / new / Path(old).name)
    loaded = load_dataset(labelling.out)["all"]
    names = loaded.features["label"].names
    classes = [names[k] for k in column(loaded, "label")]
    assert dict(zip(column(loaded, "file_name"), classes, strict=True)) == {
        "scarred/s_0001.png": "scarred",
        "open/s_0003.png": "open",
        "scarred/s_0004.png": "scarred",
    }
    done = glovlm("data", "check", labelling.out)
    assert "3 crops lie in another folder now" in done.err
    assert labelling.cut("--margin", "2").code == 0
    assert labelling.labels == {"g20": "scarred", "g80": "", "g140": "open", "g200": "scarred"}
    files = sorted(str(path.relative_to(labelling.out)) for path in labelling.out.glob("*/*"))
    assert files == sorted(row["file_name"] for row in rows(labelling.out))


def test_an_emptied_label_takes_the_class_of_the_outlines(labelling: Labelling) -> None:
    labelling.type(g20="scarred", g200="")
    boxes(labelling.path, (20, "open"), (80, "scarred"), (140, None), (200, "open"))
    assert labelling.cut().code == 0
    assert labelling.labels == {"g20": "scarred", "g80": "scarred", "g140": "", "g200": "open"}
    labelling.type(g20="")
    assert labelling.cut().code == 0
    assert labelling.labels["g20"] == "open"


@pytest.mark.parametrize("way", ["deleted", "left out"])
def test_typed_labels_are_not_thrown_away(labelling: Labelling, way: str) -> None:
    labelling.type(g20="scarred")
    before = (labelling.out / "metadata.csv").read_bytes()
    if way == "deleted":
        boxes(labelling.path, (80, None), (140, None), (200, "open"))
    done = labelling.cut(*(["--classes", "open"] if way == "left out" else []))
    assert done.code == 2
    assert "1 crops whose label was typed" in done.errors[0]
    assert "g20: scarred" in done.errors[0]
    assert (labelling.out / "metadata.csv").read_bytes() == before


def test_rows_that_a_person_deleted_are_told_when_they_come_back(labelling: Labelling) -> None:
    path = labelling.out / "metadata.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    done = labelling.cut()
    assert done.code == 0, done.err
    assert "1 crops whose rows were deleted from metadata.csv are cut again (g80)" in done.err
    assert len(labelling.labels) == len(list(labelling.out.glob("*/*"))) == 4


def test_what_outlines_go_around_is_kept_with_each_crop(labelling: Labelling) -> None:
    def stated() -> tuple[set[str | None], set[str]]:
        table = rows(labelling.out)
        files = [open_outlined(labelling.out / row["file_name"]) for row in table]
        return {row.get("outline") for row in table}, {file.info["outline"] for file in files}

    assert stated() == ({None}, {"unstated"})
    told = labelling.cut().err
    assert "What the outlines go around is not stated (--outline-of capsule or tuft)" in told
    told = labelling.cut("--outline-of", "tuft").err
    assert "cannot judge crescents, adhesions or ischaemia" in told
    assert stated() == ({"tuft"}, {"tuft"})
    assert "not stated" not in labelling.cut().err  # what is known is not forgotten
    assert stated() == ({"tuft"}, {"tuft"})
    told = labelling.cut("--outline-of", "capsule", "--slide-id", "other").err
    assert "Crops in this folder differ in what their outlines go around (s)" in told
    assert column(load_dataset(labelling.out)["all"], "outline") == ["tuft", "capsule"]


@pytest.mark.parametrize("way", ["option", "table"])
def test_what_outlines_go_around_is_the_capsule_or_the_tuft(labelling: Labelling, way: str) -> None:
    path = labelling.out / "metadata.csv"
    if way == "table":
        lines = path.read_text().splitlines()
        path.write_text(
            "\n".join([lines[0] + ",outline", *(f"{line},tufft" for line in lines[1:])])
        )
    done = labelling.cut(*(["--outline-of", "tufft"] if way == "option" else []))
    place = "--outline-of" if way == "option" else "the column outline of metadata.csv"
    assert done.code == 2
    assert f"the capsule or the tuft; found 'tufft' in {place}" in done.errors[0]
    assert "Did you mean 'tuft'" in done.errors[0]


def test_crops_of_an_earlier_version_are_read_and_added_to(labelling: Labelling) -> None:
    labelling.type(g20="scarred")
    manifest = json.loads((labelling.out / "manifest.json").read_text())
    manifest["made_from"]["version"] = 1
    for about in manifest["made_from"]["slides"].values():
        del about["outline"]
    (labelling.out / "manifest.json").write_text(json.dumps(manifest))
    for path in labelling.out.glob("*/*.png"):
        Image.fromarray(picture(path)).save(path)
    assert len(load_dataset(labelling.out)["all"]) == 2
    assert labelling.cut("--outline-of", "capsule").code == 0
    assert labelling.labels == {"g20": "scarred", "g80": "", "g140": "", "g200": "open"}
    assert {row["outline"] for row in rows(labelling.out)} == {"capsule"}
    assert all(inside(path).any() for path in labelling.out.glob("*/*.png"))


def test_a_patient_that_is_known_is_not_forgotten(labelling: Labelling) -> None:
    assert labelling.cut("--patient-id", "P1").code == 0
    assert labelling.cut().code == 0
    assert {row.get("patient_id") for row in rows(labelling.out)} == {"P1"}
    assert "The patient was P1 and is P2" in labelling.cut("--patient-id", "P2").err
    assert {row["patient_id"] for row in rows(labelling.out)} == {"P2"}
