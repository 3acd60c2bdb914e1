"""Tissue masks: of drawn cores, stains, pens and glass, and of real pictures with outlines."""

import io
import json
import shutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from slide_model import train
from slides_made import slide_of, write_slide

from hf_glovlm.slides.files.annotations import read_geojson

GLASS = (243, 242, 240)
PALE, DENSE = (230, 184, 233), (120, 60, 130)


def find_tissue(*arguments: Any, **options: Any) -> Any:
    """The finder by its name, wherever the package keeps it."""
    room = "hf_glovlm.slides.files."
    own = "tissue" if find_spec(room + "tissue") else "tiles"
    return import_module(room + own).find_tissue(*arguments, **options)


def draw(width: int = 900, height: int = 600, glass: Any = GLASS) -> np.ndarray:
    return np.full((height, width, 3), glass, np.float32)


def core(image: np.ndarray, box: Any, colour: Any, *, texture: float = 12, seed: int = 0) -> Any:
    """A piece of tissue with round ends and texture of some pixels; returns where it is."""
    x, y, width, height = box
    rows, columns = image.shape[:2]
    mask = Image.new("L", (columns, rows))
    ImageDraw.Draw(mask).rounded_rectangle((x, y, x + width, y + height), height // 2, fill=1)
    where = np.asarray(mask) > 0
    fibres = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(rows, columns)), 1.5)
    fibres *= texture / fibres.std()
    image[where] = (np.array(colour) + fibres[..., None])[where]
    return where


def scanned(image: np.ndarray, noise: float = 2, quality: int = 85, mpp: float | None = 4) -> Any:
    """A slide of the picture with noise of a camera, out of JPEG."""
    noisy = image + np.random.default_rng(1).normal(0, noise, image.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return slide_of(np.asarray(Image.open(buffer)), mpp)


@cache
def mask_of(slide: Any, drop_pen: bool = True) -> Any:
    return find_tissue(slide) if drop_pen else find_tissue(slide, drop_pen=False)


def share(slide: Any, where: Any, drop_pen: bool = True) -> float:
    """The part of a place that the mask takes for tissue."""
    found = Image.fromarray(mask_of(slide, drop_pen).array)
    spread = found.resize(where.shape[1::-1], Image.Resampling.NEAREST)
    return float(np.asarray(spread)[where].mean())


# ---------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize("neighbours", [0, 1, 3])
def test_dense_neighbours_take_nothing_from_a_pale_core(neighbours: int) -> None:
    image = draw()
    pale = core(image, (60, 40, 700, 90), PALE, texture=3)
    for k in range(neighbours):
        core(image, (60, 180 + 130 * k, 780, 100), DENSE, texture=20)
    assert share(scanned(image), pale) > 0.97


SCANS = [
    ((255, 255, 255), 0.0),
    ((238, 238, 238), 6.0),
    ((236, 226, 200), 2.0),
    ((206, 212, 220), 2.0),
    ((206, 212, 220), 6.0),
]


@pytest.mark.parametrize(("glass", "noise"), SCANS)
def test_glass_of_any_colour_and_noise_is_no_tissue(glass: Any, noise: float) -> None:
    image = draw(glass=glass)
    pale = core(image, (60, 60, 700, 90), np.array(PALE) * np.array(glass) / 255, texture=3)
    dense = core(image, (60, 300, 780, 100), DENSE)
    slide = scanned(image, noise)
    assert share(slide, pale) > 0.97
    rim = ndimage.binary_dilation(pale | dense, iterations=6)
    assert share(slide, ~rim) < 0.005


def test_uneven_light_and_black_padding_are_no_tissue() -> None:
    image = draw(1000)
    pale = core(image, (180, 240, 600, 90), PALE, texture=3)
    image *= np.linspace(1.02, 0.96, 1000)[:, None]
    image[:, :90] = 0
    slide = scanned(image)
    rim = ndimage.binary_dilation(pale, iterations=6)
    rim[:, 80:100] = True
    assert share(slide, pale) > 0.97
    assert share(slide, ~rim) < 0.005


def test_white_padding_beside_real_glass_is_no_tissue() -> None:
    image = draw(1000, glass=(232, 232, 230))
    pale = core(image, (380, 240, 500, 90), PALE, texture=3)
    image[:, :300] = 255
    slide = scanned(image)
    assert share(slide, pale) > 0.97
    assert share(slide, ~ndimage.binary_dilation(pale, iterations=6)) < 0.005


STAINS = {
    "H&E": (214, 140, 180),
    "pale H&E": (240, 208, 224),
    "PAS": (190, 120, 170),
    "silver": (120, 108, 104),
    "dense silver": (48, 38, 34),
    "trichrome": (132, 168, 216),
    "dense collagen": (81, 106, 210),
    "alcian blue": (70, 150, 190),
    "toluidine blue": (70, 70, 160),
    "light green": (70, 150, 120),
}


@pytest.mark.parametrize("stain", STAINS)
def test_no_stain_is_ink_by_its_colour(stain: str) -> None:
    image = draw()
    one = core(image, (60, 60, 780, 110), STAINS[stain], texture=6)
    other = core(image, (300, 330, 300, 200), STAINS[stain], texture=14, seed=2)
    slide = scanned(image)
    mask = mask_of(slide)
    assert share(slide, one) > 0.97
    assert share(slide, other) > 0.97
    assert mask.fraction < 1.1 * (one | other).mean() + 0.01


GLASSES = {"white": (255, 255, 255), "grey": (238, 238, 238), "warm": (240, 234, 226)}


@pytest.mark.parametrize("glass", GLASSES)
def test_an_empty_slide_has_no_tissue(glass: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((400, 500, 3), GLASSES[glass], float)
    slide = slide_of((pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255))
    assert not find_tissue(slide).array.any()


@pytest.mark.parametrize("colour", [(205, 120, 170), (81, 106, 210), (60, 50, 46)])
def test_a_slide_that_is_all_tissue_is_all_tissue(colour: Any) -> None:
    rng = np.random.default_rng(0)
    pixels = (np.array(colour) + rng.normal(0, 25, (400, 500, 1))).clip(0, 255)
    assert find_tissue(slide_of(np.broadcast_to(pixels, (400, 500, 3)))).fraction > 0.99


def test_specks_go_narrow_gaps_close_and_vessels_stay() -> None:
    pixels = np.full((500, 500, 3), 245)
    pixels[100:400, 100:400] = (214, 140, 180)
    pixels[20:25, 20:25] = (214, 140, 180)  # dust
    pixels[150:160, 150:160] = 245  # a capillary
    pixels[350:400, 200:210] = 245  # a cleft
    pixels[250:300, 250:300] = 245  # a vessel
    mask = find_tissue(slide_of(pixels, mpp=5)).array
    assert not mask[:60, :60].any()
    assert mask[145:165, 145:165].all()
    assert mask[350:390, 195:215].all()
    assert not mask[260:290, 260:290].any()


def test_the_overview_stays_small_however_large_the_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = slide_of(draw(400, 300))
    slide.size = (10**6, 10**6)
    asked: list[int] = []
    picture = Image.new("RGB", (64, 64), "white")
    monkeypatch.setattr(slide, "thumbnail", lambda side: asked.append(side) or picture)
    find_tissue(slide)
    assert asked == [2048]


# ---------------------------------------------------------------------------------------- pen

INKS = {"black": (30, 28, 34), "blue": (38, 58, 165), "green": (22, 120, 72), "red": (200, 30, 45)}


def stroke(image: np.ndarray, y: int, ink: Any, *, amplitude: float = 12) -> Any:
    """A wavy stroke about 28 pixels wide with soft edges; returns where it is."""
    rows, columns = image.shape[:2]
    x = np.arange(columns)
    middle = y + amplitude * np.sin(x / 60)
    half = 14 + 3 * np.sin(x / 90)
    inside = (np.abs(np.arange(rows)[:, None] - middle) < half) & (x > 50) & (x < columns - 80)
    cover = ndimage.gaussian_filter(inside.astype(np.float32), 1.5)[..., None]
    image[:] = image * (1 - cover) + np.array(ink) * cover
    return inside


@pytest.mark.parametrize("ink", INKS)
def test_strokes_of_pen_are_counted_left_out_and_can_be_kept(ink: str) -> None:
    image = draw()
    tissue = core(image, (100, 100, 700, 110), STAINS["dense collagen"])
    pens = stroke(image, 320, INKS[ink]) | stroke(image, 450, INKS[ink])
    slide = scanned(image)
    mask = mask_of(slide)
    assert share(slide, pens) < 0.05
    assert share(slide, tissue) > 0.97
    assert getattr(mask, "strokes", None) == 2
    assert mask.pen.mean() == pytest.approx(pens.mean(), rel=0.5)
    assert "2 strokes of pen" in " ".join(mask.notes)
    kept = mask_of(slide, False)
    assert share(slide, pens, drop_pen=False) > 0.97
    assert (kept.strokes, len(kept.notes)) == (0, 1)
    assert f"more than {kept.threshold:.3f}" in kept.notes[0]


@pytest.mark.parametrize("ink", ["black", "red"])
def test_a_dot_beside_tissue_is_pen_and_the_tissue_stays(ink: str) -> None:
    image = draw()
    tissue = core(image, (100, 200, 700, 110), STAINS["PAS"])
    down, across = np.mgrid[:600, :900]
    dot = np.hypot(down - 180, across - 450) < 24  # over the edge of the tissue
    cover = ndimage.gaussian_filter(dot.astype(np.float32), 1.2)[..., None]
    image[:] = image * (1 - cover) + np.array(INKS[ink]) * cover
    slide = scanned(image)
    assert share(slide, dot & ~tissue) < 0.2
    assert share(slide, tissue & ~ndimage.binary_dilation(dot, iterations=12)) > 0.99


def test_a_circle_of_pen_takes_nothing_of_the_tissue_inside() -> None:
    image = draw()
    tissue = core(image, (250, 240, 400, 110), STAINS["dense silver"], texture=10)
    down, across = np.mgrid[:600, :900]
    ring = np.abs(np.hypot((down - 295) / 0.7, across - 450) - 330) < 14
    cover = ndimage.gaussian_filter(ring.astype(np.float32), 1.5)[..., None]
    image[:] = image * (1 - cover) + np.array(INKS["blue"]) * cover
    slide = scanned(image)
    assert share(slide, ring) < 0.1
    assert share(slide, tissue) > 0.97


def test_a_fold_and_a_strand_of_collagen_are_no_pen() -> None:
    image = draw()
    tissue = core(image, (80, 60, 740, 150), STAINS["H&E"])
    fold = core(image, (200, 120, 500, 26), (70, 30, 90), texture=2)
    strand = core(image, (80, 400, 740, 24), STAINS["dense collagen"], texture=8)
    slide = scanned(image)
    for part in (tissue, fold, strand):
        assert share(slide, part) > 0.95


# ---------------------------------------------------------------------------------- in a run


def test_tissue_is_found_once_a_slide_and_the_pen_is_stated_and_drawn(
    tmp_path: Path, glovlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a first run, and in one that finds a finished bag."""
    from hf_glovlm.slides import classify, encoding

    calls: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return find_tissue(*arguments, **options)

    for room in (classify, encoding):
        if hasattr(room, "find_tissue"):
            monkeypatch.setattr(room, "find_tissue", counted)
    ink = ((40, 20, 700, 60), INKS["green"])
    path = tmp_path / "one.tiff"
    write_slide(path, 1024, 768, lesions=2, lesion_side=64, marks=[ink], seed=3)
    out = tmp_path / "out"
    command = ("slide", train(tmp_path / "model"), path, "--tile-size", 64, "--output-dir", out)
    assert glovlm(*command).code == 0
    assert len(calls) == 1
    entry = read_entry(out)
    assert entry["tissue"]["pen_strokes"] == 1
    assert 0.04 < entry["tissue"]["pen_fraction"] < 0.09
    assert 0.05 < entry["tissue"]["threshold"] + 1e-9 <= 0.1
    assert any("1 stroke of pen" in flag for flag in entry["flags"])
    drawn = np.asarray(Image.open(out / "slides/one/heatmap.png").convert("RGB")).astype(int)
    vermilion = np.abs(drawn - (213, 94, 0)).max(-1) < 30
    assert vermilion.sum() > 200
    shutil.rmtree(out / "slides")  # the bag stays
    assert glovlm(*command).code == 0
    assert len(calls) == 2
    assert read_entry(out) == entry
    done = glovlm(*command, "--no-drop-pen")
    assert done.code == 1
    assert "other settings (drop_pen: True, now False)" in done.printed


def read_entry(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())["slides"][0]


# ------------------------------------------------------------------------------ real pictures


def test_the_bench_takes_a_folder_of_pictures_with_outlines(tmp_path: Path, glovlm: Any) -> None:
    image = draw(300, 200)
    where = core(image, (40, 50, 220, 90), STAINS["PAS"])
    for name in ("a", "b"):
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.where(where[..., None], (0, 255, 0), 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    square = [[60, 60], [200, 60], [200, 120], [60, 120], [60, 60]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square]}}
    (tmp_path / "b.geojson").write_text(json.dumps(feature | {"properties": {}}))
    done = glovlm("bench", "tissue", "--data", tmp_path, "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["rows"]}
    assert rows["tissue.alone"]["ratio"] > 0.95
    assert rows["tissue.pasted"]["ratio"] > 0.95
    assert "2 pictures" in rows["tissue.alone"]["what"]
    assert rows["tissue.canvas"]["value"] < 0.02
    assert rows["tissue.pen"]["value"] < 0.1
    refused = glovlm("bench", "tissue", "--data", tmp_path / "none")
    assert (refused.code, "NAME_mask.png" in refused.err) == (2, True)


REAL = ["HE_I_1_S_3_ROI_1", "PAS_I_4_S_2_ROI_1", "p09_PASM_1", "p13_PAS_1", "p21_Masson_1"]


@pytest.mark.parametrize("name", REAL)
def test_outlined_glomeruli_of_real_pictures_lie_in_tissue(shared: Path, name: str) -> None:
    folder = "glomeruli_rois" if "ROI" in name else "glomeruli_multistain/regions"
    path = shared / "data" / folder / f"{name}.jpg"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    inside = Image.new("1", pixels.shape[1::-1])
    if "ROI" in name:
        mask = np.asarray(Image.open(path.with_name(f"{name}_mask.png")).convert("RGB"), int)
        inside = Image.fromarray(np.ptp(mask, axis=-1) > 100)
    else:
        for outline in read_geojson(path.with_suffix(".geojson")):
            ring = [tuple(point) for point in outline.polygons[0][0].tolist()]
            ImageDraw.Draw(inside).polygon(ring, fill=1)
    assert share(slide_of(pixels, None), np.array(inside)) > 0.95
