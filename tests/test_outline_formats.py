"""Outlines of other programs: COCO, ImageScope and ASAP give what GeoJSON gives, or say why not."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import hostile_formats
import numpy as np
import pytest
from hostile_formats import KINDS, SHAPES, SIZE, asap, coco, content_of, imagescope, runs, text_of
from PIL import Image

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.annotations import (
    NoObject,
    Outlines,
    read_geojson,
    read_outlines,
    write_geojson,
)
from hf_glovlm.slides.files.coordinates import Origin
from hf_glovlm.slides.files.crops import cut_slides
from hf_glovlm.slides.files.geojson import Unusable
from hf_glovlm.slides.files.names import match_outlines
from hf_glovlm.slides.files.run_lengths import trace_mask
from hf_glovlm.slides.files.shapes import ring_area

SQUARE = [[10, 10, 60, 10, 60, 60, 10, 60]]


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, content: Any, **options: Any) -> Outlines:
    return read_outlines(put(path, content), **({"slide": "S1", "size": SIZE} | options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "S1.json"


# ------------------------------------------------------------------------------- all formats


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_objects(path: Path, kind: str) -> None:
    content = content_of(kind).encode("utf-16" if kind == "imagescope" else "utf-8")
    outlines = read(path, gzip.compress(content) if kind == "asap" else content)
    own = {"results": ["category 2", "category 1", None]}
    assert [item.label for item in outlines.objects] == own.get(
        kind, [label for label, _ in SHAPES]
    )
    slack = 1.0 if kind in ("coco_rle", "coco_text") else 0.0  # whole pixels
    for item, (_, corners) in zip(outlines.objects, SHAPES, strict=True):
        low, high = np.min(corners, axis=0), np.max(corners, axis=0)
        assert item.bounds == pytest.approx([*low, *high], abs=slack)
        area = ring_area(np.array([*corners, corners[0]], np.float64))
        assert item.area == pytest.approx(area, rel=0.02 * slack)
    assert outlines.left_out == {}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_stay_through_other_runs_and_through_geojson(path: Path, kind: str) -> None:
    items = read(path, content_of(kind)).objects
    assert [item.id for item in read(path, content_of(kind)).objects] == [i.id for i in items]
    assert len({item.id for item in items}) == len(SHAPES)
    write_geojson(path, items)
    again = read_geojson(path)
    assert [(i.id, i.label, i.bounds) for i in again] == [(i.id, i.label, i.bounds) for i in items]
    if kind == "results":
        assert [item.properties["measurements"] for item in again] == [{"score": 0.9}] * 3


def test_only_geojson_counts_from_the_corner_of_the_scanned_part(path: Path) -> None:
    place, given = Origin(100, 10, "bounds"), Origin(100, 10, "given")
    for kind in KINDS:
        x0 = [read(path, content_of(kind), origin=o).objects[0].bounds[0] for o in (place, given)]
        assert x0 == ([120, 120] if kind == "geojson" else [20, 120]), kind


def test_a_damaged_file_gives_sound_outlines_or_one_sentence(path: Path) -> None:
    for seed in range(120):
        hostile_formats.check(path, seed)


def test_the_real_outlines_of_a_coco_file_are_those_of_the_geojson(shared: Path) -> None:
    folder = shared / "data" / "glomeruli_multistain"
    pictures = sorted((folder / "regions").glob("*.jpg"))
    files = match_outlines(folder / "coco.json", pictures).files
    assert len(files) == len(pictures) == 105
    total = 0
    for picture in pictures:
        one = read_outlines(files[picture], slide=picture, size=(1360, 1024)).objects
        other = read_outlines(picture.with_suffix(".geojson"), size=(1360, 1024)).objects
        kept = [
            sorted(
                (i.label, [ring.tolist() for polygon in i.polygons for ring in polygon])
                for i in own
            )
            for own in (one, other)
        ]
        assert kept[0] == kept[1]
        total += len(one)
    assert total == 167


# -------------------------------------------------------------------------------------- COCO


def instances(*annotations: Any, **image: Any) -> dict[str, Any]:
    """COCO of one image; annotations lack what is the same in all."""
    made = coco([], **image)
    made["annotations"] = [
        {"id": n, "image_id": 7, "category_id": 1} | one if isinstance(one, dict) else one
        for n, one in enumerate(annotations, start=1)
    ]
    return made | {"categories": [{"id": 1, "name": "glomerulus"}]}


def test_boxes_and_parts_and_scores_are_read_and_crowds_are_not(path: Path) -> None:
    outlines = read(
        path,
        instances(
            {"bbox": [100, 50, 40, 30], "score": 0.75},
            {"segmentation": SQUARE, "score": float("nan")},
            {"segmentation": [[200, 10, 250, 10, 250, 60], [200, 90, 250, 90, 250, 140]]},
            {"segmentation": SQUARE, "iscrowd": 1},
            {"segmentation": [[1, 2, 3]], "id": "short"},
            {"segmentation": {"size": [9, 9], "counts": [81]}},
            3,
            {"segmentation": SQUARE, "image_id": 99},
        ),
    )
    box, square, parts = outlines.objects
    assert box.bounds == (100, 50, 140, 80)
    assert box.properties["measurements"] == {"score": 0.75}
    assert "measurements" not in square.properties
    assert (parts.bounds, len(parts.polygons)) == ((200, 10, 250, 140), 2)
    assert outlines.left_out == {
        "a crowd of objects (iscrowd)": ["annotation 4"],
        "a polygon that is no list x, y, x, y, ... of three points or more": ["annotation short"],
        "a mask of another size than its image": ["annotation 6"],
    }
    assert "1 objects are boxes alone, without an outline." in outlines.notes
    assert "2 annotations are of no image of the file." in outlines.notes  # 3, and that of 99


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(400, 300, 1), (100, 75, 4), (133, 100, 3), (800, 600, 0.5)]
)
def test_outlines_of_a_smaller_picture_are_scaled_and_told(
    path: Path, width: int, height: int, scale: float
) -> None:
    box = [50, 20, 30, 40]
    outlines = read(path, instances({"bbox": box}, width=width, height=height))
    x, y, w, h = (side * scale for side in box)
    assert outlines.objects[0].bounds == pytest.approx((x, y, x + w, y + h), abs=1.5)
    told = [note for note in outlines.notes if "are scaled by" in note]
    assert len(told) == (scale != 1)
    assert all(f"{width} x {height}" in note for note in told)


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (instances({}, width=300, height=400), {}, "300 x 400 .* 400 x 300: that is another shape"),
        (instances({}, width="x"), {}, "width and height of the image in pixels"),
        (instances({}, width=float("nan")), {}, "width and height of the image in pixels"),
        (coco(name="S1.2.png"), {"slide": Path("in/S1.svs")}, "none of the slide S1: .* Tiles"),
        (
            [{"image_id": "a\\ud800", "bbox": [1, 1, 9, 9]}],
            {},
            "lists results without their images",
        ),
        (coco(name="s1.png"), {"slide": "S1.2"}, "none of the slide S1.2"),
        (coco() | {"images": 2 * coco()["images"]}, {}, "several images of one id"),
        (coco() | {"images": [{"id": 7}]}, {}, "'id' and 'file_name' of every image"),
        (coco() | {"images": {}, "annotations": []}, {}, "outlines of 0 images"),
        (coco() | {"categories": [{"id": 1}]}, {}, "'id' and 'name' of every category"),
        (coco() | {"categories": [{"id": 1, "name": n} for n in "ab"]}, {}, "category 1 twice"),
    ],
)
def test_coco_of_other_images_is_refused(
    tmp_path: Path, content: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        read(tmp_path / "x.json", content, **options)


def test_an_image_without_an_object_is_no_failure(path: Path) -> None:
    with pytest.raises(NoObject, match="holds no outlined object, and says so"):
        read(path, instances())


def test_the_image_is_chosen_by_the_slides_exact_name(tmp_path: Path) -> None:
    names = ["in/S1.svs", "S1.2.png", "deep\\S3.ome.tif", "S4.JPG", "S1.2/0_0.png", "S5.svs"]
    made = coco([])
    made["images"] = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    made["annotations"] = [
        {"id": i, "image_id": i, "bbox": [10 * i, 0, 20, 20]} for i in range(len(names))
    ]
    path = put(tmp_path / "all.json", made)
    slides = [Path("x") / f"{name}.svs" for name in ("S1", "S1.2", "S3", "S4", "S9")]
    outlined = match_outlines(path, slides)
    assert (outlined.without, outlined.unused) == (slides[4:], ["S1.2/0_0.png", "S5.svs"])
    assert {*outlined.files.values()} == {path}
    for place, slide in enumerate(slides[:4]):
        (item,) = read_outlines(path, slide=slide, size=SIZE).objects
        assert item.bounds[0] == 10 * place
    with pytest.raises(GloVLMError, match=r"outlines of 6 images .* none was named"):
        read_geojson(path)
    with pytest.raises(GloVLMError, match=r"of any of the 2 slides .*\(S4: Did you mean 'S4x'"):
        match_outlines(path, [Path("S4x.svs"), Path("no.svs")])
    made["images"][0]["file_name"] = "S5.png"
    put(path, made | {"annotations": []})
    with pytest.raises(GloVLMError, match="2 images of the slide S5"):
        read_outlines(path, slide="S5")


# ------------------------------------------------------------------------------- run lengths


def test_a_traced_mask_fills_the_pixels_that_it_holds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = rng.random(rng.integers(1, 12, 2)) < rng.choice([0.3, 0.5, 0.8])
        counts = runs(mask)
        drawn = np.zeros(mask.shape, int)
        y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
        pieces: Any = [] if not mask.any() else None
        for given in (counts, text_of(counts)):
            if mask.any():
                pieces = trace_mask({"size": [*map(int, mask.shape)], "counts": given})
        for rings in pieces:
            for ring in rings:  # a hole takes away what its outline fills
                sides = [(a, b) for a, b in pairwise(ring) if a[1] != b[1]]
                for (x0, y0), (_, y1) in sides:
                    drawn += ((y0 > y) != (y1 > y)) & (x < x0)
            areas = [ring_area(np.array(ring, np.float64)) for ring in rings]
            assert areas[0] == max(areas)
        assert np.array_equal(drawn % 2 == 1, mask)


@pytest.mark.parametrize(("text", "first"), [("05d00000000d?", 0), ("R45d00000000b;", 5)])
def test_text_of_cocos_own_tools_is_read(text: str, first: int) -> None:
    ((ring,),) = trace_mask({"size": [25, 25], "counts": text})
    points = np.array(ring)
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == (
        [first] * 2,
        [first + 5] * 2,
    )


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"counts": [4]}, "without a size"),
        ({"size": [2, True], "counts": [4]}, "without a size"),
        ({"size": [2, 10**12], "counts": [4]}, "without a size"),
        ({"size": [2, 2], "counts": [1, -1, 4]}, "cannot be read"),
        ({"size": [2, 2], "counts": [1, 1.0, 2]}, "cannot be read"),
        ({"size": [2, 2], "counts": "~"}, "cannot be read"),
        ({"size": [2, 2], "counts": "oooooooooooooo"}, "cannot be read"),
        ({"size": [2, 2], "counts": "1o"}, "cannot be read"),
        ({"size": [2, 2], "counts": [1, 2]}, "do not fill its size"),
        ({"size": [2, 2], "counts": [4]}, "holds nothing"),
        ({"size": [2**20, 2**20], "counts": [0, 2**40]}, "of more than 32 million pixels"),
        ({"size": [1, 4000], "counts": [1] * 4000}, "of more than 1000 pieces"),
    ],
)
def test_masks_that_cannot_be_used_say_why(segmentation: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        trace_mask(segmentation)


# --------------------------------------------------------------------------------------- XML


def region(*points: tuple[float, float], **attributes: Any) -> str:
    own = {"Id": 9, "Type": 0, "Text": "", "NegativeROA": 0} | attributes
    texts = " ".join(f'{name}="{value}"' for name, value in own.items())
    inside = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    return f"<Region {texts}><Vertices>{inside}</Vertices></Region>"


def layer(*regions: str, name: str = "glomerulus", attribute: str = "") -> str:
    about = f"<Attributes>{attribute}</Attributes><Regions>{''.join(regions)}</Regions>"
    return f'<Annotations><Annotation Id="3" Name="{name}">{about}</Annotation></Annotations>'


def box(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[float, float], ...]:
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)


def test_negative_regions_are_holes_and_lines_are_left_out(path: Path) -> None:
    outlines = read(
        path,
        layer(
            region(*box(10, 10, 210, 210), Id=1),
            region(*box(20, 20, 120, 120), Id=2),
            region(*box(30, 30, 40, 40), Id=3, NegativeROA=1),  # in both: of the smaller
            region(*box(300, 30, 340, 40), Id=4, NegativeROA=1),
            region((5, 5), (50, 90), Id=5, Type=4),
            region((5, 5), (50, 90), (7, 7), Id=6, Type=5),
            region((5, 5), (50, 90), Id=7),
            region((5, "x"), (50, 90), (9, 9), Id=8),
        ),
    )
    assert [(item.area, len(item.polygons[0])) for item in outlines.objects] == [
        (40_000, 1),
        (9900, 2),
    ]
    assert outlines.left_out == {
        "a ruler of ImageScope": ["region 5 of layer 3"],
        "a pen line of ImageScope": ["region 6 of layer 3"],
        "without an area": ["region 7 of layer 3"],
        "a coordinate that is no finite number": ["region 8 of layer 3"],
        "a negative region that lies in no outline of its layer": ["region 4 of layer 3"],
    }


@pytest.mark.parametrize(("mpp", "told"), [(0.25, 0), (0.24, 0), (0.5, 1), (None, 0)])
def test_outlines_of_a_scan_of_another_scale_are_told(
    path: Path, mpp: float | None, told: int
) -> None:
    notes = read(path, imagescope(), mpp=mpp).notes  # which states 0.25
    assert sum("states 0.25 micrometres per pixel" in note for note in notes) == told


@pytest.mark.parametrize("corners", [((40, 20), (100, 60)), box(40, 20, 100, 60)])
def test_rectangles_and_ellipses_are_read_by_their_corners(
    path: Path, corners: tuple[tuple[float, float], ...]
) -> None:
    outlines = read(path, layer(region(*corners, Type=1, Id=1), region(*corners, Type=2, Id=2)))
    rectangle, ellipse = outlines.objects
    assert rectangle.bounds == ellipse.bounds == (40, 20, 100, 60)
    assert rectangle.area == 2400
    assert ellipse.area == pytest.approx(np.pi * 30 * 20, rel=0.002)


@pytest.mark.parametrize(
    ("name", "text", "attribute", "label"),
    [
        ("gs", "one of them", "", "gs"),
        ("", "gs", '<Attribute Name="Description" Value="x"/>', "gs"),
        ("", "", '<Attribute Name="Description" Value="gs"/>', "gs"),
        ("", "", '<Attribute Name="gs" Value=""/>', "gs"),
        ("", "", '<Attribute Name="Description" Value=""/>', None),
    ],
)
def test_the_class_of_a_region_is_its_layers_name_or_else_its_text(
    path: Path, name: str, text: str, attribute: str, label: str | None
) -> None:
    made = layer(region(*box(40, 20, 100, 60), Text=text), name=name, attribute=attribute)
    assert read(path, made).objects[0].label == label
    if text:
        assert read(path, made, label_property="Text").objects[0].label == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><Annotations/>', "declares a document type"),
        (
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><Annotations>&c;</Annotations>',
            "declares a document type",
        ),
        ("<Annotations>" * 100, "nested too deeply"),
        (imagescope()[:-20], "is not XML"),
        ('<?xml version="1.0" encoding="no-such"?><Annotations/>', "is not XML"),
        ("<Annotations/>", "holds no outlined object"),
        (imagescope().replace("Vertex", "V"), "XML of HALO"),
        ("<annotations><ndpviewstate/></annotations>", "XML of NDP.view of Hamamatsu"),
        ("<Slide/>", r"another program \(its first element is Slide\); expected GeoJSON, COCO"),
        (asap().replace('"Polygon"', '"PointSet"'), "a PointSet of ASAP, which has no area"),
    ],
)
def test_xml_that_is_unsafe_or_of_other_programs_is_refused(
    path: Path, content: str, sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence) as caught:
        read(path, content)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- folders


def test_slides_find_their_xml_and_one_coco_file_serves_the_others(tmp_path: Path) -> None:
    slides = [Path(f"{name}.svs") for name in ("A", "B", "C", "D")]
    made = coco(name="C.png")
    made["images"].append({"id": 8, "file_name": "Z.png"})
    put(tmp_path / "A.xml", imagescope())
    put(tmp_path / "A.svs.xml", "<ScanLog/>")  # of the scanner
    put(tmp_path / "other.xml", "<ScanLog/>")
    put(tmp_path / "B.svs.json", coco(name="thumbnail.png"))
    put(tmp_path / "coco.json", made)
    outlined = match_outlines(tmp_path, slides)
    names = [outlined.files[slide].name for slide in slides[:3]]
    assert names == ["A.xml", "B.svs.json", "coco.json"]
    assert (outlined.without, outlined.unused) == (slides[3:], ["coco.json: Z.png"])
    told = read_outlines(outlined.files[slides[1]], slide=slides[1], size=SIZE).notes
    assert "The file's one image is called otherwise than the slide, as the file is." in told
    put(tmp_path / "more" / "coco.json", made)
    with pytest.raises(GloVLMError, match=r"several files of outlines of C \(coco.json, more/coco"):
        match_outlines(tmp_path, slides)
    put(tmp_path / "A.svs.xml", asap())
    with pytest.raises(GloVLMError, match="2 files of outlines of the slide A"):
        match_outlines(tmp_path, slides)


def test_crops_are_cut_by_one_coco_file_of_all_pictures(tmp_path: Path) -> None:
    made = coco(name="b.jpg", width=SIZE[0] // 2, height=SIZE[1] // 2)
    made["images"].append({"id": 8, "file_name": "a.jpg"})
    made["annotations"][0]["image_id"] = 8
    for name in ("a", "b", "c"):
        put(tmp_path / "in" / f"{name}.png", b"")
        Image.new("RGB", SIZE).save(tmp_path / "in" / f"{name}.png")
    given = put(tmp_path / "all.json", made)
    outcomes = cut_slides(tmp_path / "in", given, tmp_path / "out")
    assert [one.summary and one.summary.total for one in outcomes] == [1, 1, None]
    assert outcomes[1].summary is not None
    assert outcomes[1].summary.left_out["outside the slide of 400 x 300 pixels"]
    assert "holds no outlines of this name" in (outcomes[2].reason or "")
