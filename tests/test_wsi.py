"""Slides: every format opened or refused, scales distinguished, pixels right, labels never read."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slides_made import write_slide

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files import tiff_reader, wsi
from hf_glovlm.slides.files.openslide_reader import OpenSlideReader
from hf_glovlm.slides.files.tiff_pictures import TiffPictures
from hf_glovlm.slides.files.tiff_reader import TiffReader
from hf_glovlm.slides.files.wsi import Slide, name_flags, open_slide


def by_tifffile(path: Path) -> Slide:
    """A TIFF by the package's own reader, whatever OpenSlide sees."""
    tiff = TiffPictures(path)
    return Slide(path, TiffReader(tiff, tiff.choose(None)))


def by_openslide(path: Path) -> Slide:
    """A slide by OpenSlide, whether the own reader sees the same or not."""
    vendor = openslide.OpenSlide.detect_format(path)
    assert vendor is not None
    return Slide(path, OpenSlideReader(openslide, path, vendor))


# What becomes of every file in the shared folder: size, scale, where that is from, reader; or why
# it is refused.
REAL = {
    "boxes.tiff": ((300, 250), None, "unknown", "tifffile (TIFF)"),
    "boxes_0.dcm": ((16, 16), 0.499, "file", "openslide (dicom)"),
    "boxes_1.dcm": ((16, 16), 0.499, "file", "openslide (dicom)"),
    "cmu-1-small-region.svs": ((2220, 2967), 0.499, "file", "tifffile (SVS)"),
    "kidney-48-5.tif": ((1493, 901), None, "unknown", "tifffile (TIFF)"),
    "small_vectra.qptiff": "3 separate channels (DAPI, FITC, Cy3), as fluorescence does",
    "tcga-cr-7395-01a-01-ts1.svs": ((4443, 3567), None, "unknown", "openslide (aperio)"),
    "unreadable.svs": "is damaged",
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_opens_or_is_refused_in_one_sentence(shared: Path, name: str) -> None:
    path, expected = shared / "data" / "slides" / name, REAL[name]
    if isinstance(expected, str):
        with pytest.raises(GloVLMError) as caught:
            open_slide(path)
        message = str(caught.value)
        assert expected in message
        assert "\n" not in message
        assert message.count(". ") == 0
        return
    with open_slide(path) as slide:
        assert (slide.size, slide.mpp, slide.mpp_source, slide.reader) == expected
        assert max(slide.thumbnail(64).size) == min(64, max(slide.size))
        assert not any("file name" in flag for flag in slide.flags)
        assert (slide.mpp is None) == any("give --mpp" in flag for flag in slide.flags)


def test_the_table_names_every_real_file(shared: Path) -> None:
    files = {p.name for p in (shared / "data" / "slides").iterdir()}
    assert files - {"README.md", "metadata.csv"} == set(REAL)


@pytest.mark.parametrize("name", [n for n in REAL if n.endswith("svs") and "un" not in n])
def test_both_readers_see_the_same_real_pixels(shared: Path, name: str) -> None:
    path = shared / "data" / "slides" / name
    with by_openslide(path) as one, by_tifffile(path) as other:
        assert (one.levels, one.mpp) == (other.levels, other.mpp)
        for box, scale in [((900, 1500, 120, 90), 1.0), ((-30, 700, 600, 400), 2.5)]:
            result = [np.asarray(s.read(*box, downsample=scale), int) for s in (one, other)]
            # OpenSlide shifts a coarser level by parts of a pixel.
            assert abs(result[0] - result[1]).mean() <= (0 if scale == 1 else 0.5)


# ---------------------------------------------------------------------------------- pixels


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "synthetic.tif"
    write_slide(path, 1100, 700, lesions=2, lesion_side=64, compression="deflate", tile=128)
    return path


READERS: dict[str, Callable[[Path], Slide]] = {
    "openslide": by_openslide,
    "tifffile": by_tifffile,
}


@pytest.mark.parametrize("reader", READERS)
@given(
    x=st.integers(-300, 1300),
    y=st.integers(-300, 900),
    width=st.integers(1, 500),
    height=st.integers(1, 500),
)
def test_any_part_has_the_pixels_of_the_file(
    synthetic: Path, reader: str, x: int, y: int, width: int, height: int
) -> None:
    whole = np.pad(
        tifffile.imread(synthetic), ((900, 900), (900, 900), (0, 0)), constant_values=255
    )
    with READERS[reader](synthetic) as slide:
        result = np.asarray(slide.read(x, y, width, height))
    assert np.array_equal(result, whole[900 + y :, 900 + x :][:height, :width])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("downsample", [0.5, 1.3, 2.0, 3.7, 8.0])
def test_a_coarser_part_is_the_average_of_the_fine_one(
    synthetic: Path, reader: str, downsample: float
) -> None:
    whole = Image.fromarray(tifffile.imread(synthetic))
    side = round(480 / downsample)
    expected = whole.resize((side, side), Image.Resampling.BOX, box=(300, 90, 780, 570))
    with READERS[reader](synthetic) as slide:
        result = slide.read(300, 90, 480, 480, downsample=downsample)
    assert result.size == (side, side)
    # Coarser levels have noise of their own; edges of blobs may differ by a filter.
    gap = np.abs(np.asarray(result, float) - np.asarray(expected, float))
    assert gap.mean() < (6 if downsample < 2 else 9)
    assert np.asarray(result, float).mean() == pytest.approx(np.asarray(expected).mean(), abs=1)


@pytest.mark.parametrize("downsample", [1.0, 1.7, 5.0])
def test_blocks_meet_without_a_seam(
    synthetic: Path, monkeypatch: pytest.MonkeyPatch, downsample: float
) -> None:
    with open_slide(synthetic) as slide:
        one = np.asarray(slide.read(-40, -20, 1200, 800, downsample=downsample), int)
        monkeypatch.setattr(wsi, "BLOCK", 200)
        many = np.asarray(slide.read(-40, -20, 1200, 800, downsample=downsample), int)
    assert abs(one - many).max() <= 1


@pytest.mark.parametrize(
    ("downsample", "level"), [(1.0, 0), (1.9, 0), (2.0, 1), (3.0, 1), (4.2, 2), (50.0, 3)]
)
def test_the_nearest_finer_level_is_read_and_no_more_than_needed(
    synthetic: Path, downsample: float, level: int
) -> None:
    with open_slide(synthetic) as slide:
        asked: list[tuple[int, ...]] = []
        read = slide._file.read

        def spy(*args: int) -> Image.Image:
            asked.append(args)
            return read(*args)

        slide._file.read = spy  # type: ignore[method-assign]
        slide.read(200, 200, 320, 240, downsample=downsample)
        unit = slide._file.downsamples[level]
    assert {args[0] for args in asked} == {level}
    reach = 2 * (downsample / unit + 3)  # of the filter, on both sides
    assert max(args[3] for args in asked) <= 320 / unit + reach
    assert max(args[4] for args in asked) <= 240 / unit + reach


def test_what_lies_beyond_the_slide_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part a hundred times as wide, as of a wide margin: as many blocks as the slide has."""
    path, pieces = tmp_path / "a.tif", []
    tifffile.imwrite(path, np.zeros((900, 1000, 3), np.uint8), photometric="rgb", tile=(256, 256))
    read = Slide._canvas
    monkeypatch.setattr(Slide, "_canvas", lambda *a: pieces.append(a) or read(*a))
    with open_slide(path) as slide:
        pieces.clear()
        part = np.asarray(slide.read(-49_500, -49_500, 100_000, 100_000, downsample=1000))
    assert len(pieces) <= 9
    dark = np.argwhere(part[..., 0] < 250).tolist()
    assert dark == [[49, 49], [49, 50], [50, 49], [50, 50]]


def test_what_was_never_written_is_white_and_transparency_is_over_white(tmp_path: Path) -> None:
    tiles = iter([np.full((64, 64, 3), 9, np.uint8), None, None, np.full((64, 64, 3), 9, np.uint8)])
    sparse = tmp_path / "sparse.tif"
    tifffile.imwrite(
        sparse, tiles, shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb"
    )
    with READERS["tifffile"](sparse) as slide:
        result = np.asarray(slide.read(0, 0, 128, 128))
    assert (result[:64, :64] == 9).all()
    assert (result[:64, 64:] == 255).all()
    clear = np.zeros((40, 50, 4), np.uint8)
    clear[:20, :, 3] = 255
    tifffile.imwrite(tmp_path / "clear.tif", clear, photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(tmp_path / "clear.tif") as slide:
        result = np.asarray(slide.read(0, 0, 50, 40))
    assert (result[:20] == 0).all()
    assert (result[20:] == 255).all()


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_plain_tiff_is_read_in_strips_or_through_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
    path = tmp_path / "plain.tif"
    rows = 300 if compression is None else 16
    tifffile.imwrite(path, pixels, compression=compression, rowsperstrip=rows, photometric="rgb")
    monkeypatch.setattr(tiff_reader, "BLOCK", 100)
    with open_slide(path) as slide:
        assert slide._file._mapped == [compression is None]  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(slide.read(20, 30, 90, 100)), pixels[30:130, 20:110])


def test_decoded_pieces_are_kept_up_to_a_bound(
    synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiff_reader, "CACHE_BYTES", 4 * 128 * 128 * 3)
    with by_tifffile(synthetic) as slide:
        reader: Any = slide._file
        slide.read(0, 0, *slide.size)
        assert 0 < reader._cached <= tiff_reader.CACHE_BYTES
        assert reader._cached == sum(0 if s is None else s.nbytes for s in reader._cache.values())


# ------------------------------------------------------------------------------- no label


def test_label_and_macro_are_never_read_by_openslide(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openslide
    from openslide import lowlevel

    def refuse(*_: Any) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    monkeypatch.setattr(lowlevel, "read_associated_image", refuse)
    with open_slide(shared / "data" / "slides" / "cmu-1-small-region.svs") as slide:
        assert max(slide.thumbnail(100).size) == 100
        assert slide.read(0, 0, 300, 300).size == (300, 300)


def test_label_and_macro_are_never_read_by_tifffile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rng = tmp_path / "labelled.svs", np.random.default_rng(0)
    with tifffile.TiffWriter(path) as file:
        for kind, side, tile in [("", 256, 64), ("thumb", 64, None), ("label", 320, None)]:
            file.write(
                rng.integers(0, 255, (side, side, 3), np.uint8),
                photometric="rgb",
                tile=(tile, tile) if tile else None,
                description=f"Aperio Image Library v1\n{kind} {side}x{side}|MPP = 0.25",
                subfiletype=1 if kind == "label" else 0,
                metadata=None,
            )
    with tifffile.TiffFile(path) as file:
        private = [p.dataoffsets[0] for p in file.pages[1:]]  # type: ignore[union-attr]
    offsets: list[int] = []
    read = tifffile.FileHandle.read

    def spy(handle: Any, *args: Any) -> bytes:
        offsets.append(handle.tell())
        return bytes(read(handle, *args))

    monkeypatch.setattr(tifffile.FileHandle, "read", spy)
    with by_tifffile(path) as slide:
        assert slide.size == (256, 256)
        slide.thumbnail(100)
        slide.read(0, 0, 256, 256)
    assert offsets
    assert not set(private) & set(offsets)


# ---------------------------------------------------------------------------------- scale


def _tiff(path: Path, **options: Any) -> Path:
    pixels = np.full((64, 96, 3), 200, np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", **({"metadata": None} | options))
    return path


APERIO = "Aperio Image Library v12\r\n96x64"
QPI = "<PerkinElmer-QPI-ImageDescription><Objective>20x</Objective>"
DPI = {"resolutionunit": "INCH"}
SCALES = [  # how the file is written, its scale, the source, the magnification, words in a flag
    ({}, None, "unknown", None, "give --mpp"),
    ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5, "file", None, ""),
    ({"resolution": (72, 72), **DPI}, None, "unknown", None, "72 dpi"),
    ({"resolution": (96, 96), **DPI}, None, "unknown", None, "96 dpi"),
    ({"resolution": (600, 600), **DPI}, None, "unknown", None, "600 dpi"),
    ({"resolution": (25400, 25400), **DPI}, 1.0, "file", None, ""),
    ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None, "unknown", None, "--mpp"),
    ({"resolution": (20000, 10000), "resolutionunit": 3}, 0.5**0.5, "file", None, "not square"),
    ({"description": f"{APERIO}|AppMag = 40|MPP = 0.2525"}, 0.2525, "file", 40, ""),
    ({"description": f"{APERIO}|AppMag = 40"}, 0.25, "magnification", 40, "magnification (40x)"),
    ({"description": f"{APERIO}|AppMag = 40|MPP = 0.5"}, 0.5, "file", 40, "do not go together"),
    ({"description": f"{QPI}<PixelSizeMicrons>0.4982</PixelSizeMicrons>"}, 0.4982, "file", 20, ""),
]


@pytest.mark.parametrize(("options", "mpp", "source", "magnification", "words"), SCALES)
def test_the_scale_and_where_it_comes_from(
    tmp_path: Path,
    options: dict[str, Any],
    mpp: float | None,
    source: str,
    magnification: float | None,
    words: str,
) -> None:
    with READERS["tifffile"](_tiff(tmp_path / "a.tif", **options)) as slide:
        assert slide.mpp == (mpp and pytest.approx(mpp, rel=1e-6))
        assert slide.mpp_source == source
        assert slide.magnification == magnification
        assert words in " ".join(slide.flags)
        assert bool(slide.flags) == bool(words)


@pytest.mark.parametrize(
    ("size", "unit", "mpp"), [(0.46, "µm", 0.46), (460, "nm", 0.46), (3.0, "pixel", None)]
)
def test_ome_tiff_keeps_its_pyramid_and_its_scale(
    tmp_path: Path, size: float, unit: str, mpp: float | None
) -> None:
    path = tmp_path / "slide.ome.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (256, 320, 3), np.uint8)
    about = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    about |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, photometric="rgb", tile=(64, 64), subifds=1, metadata=about)
        file.write(pixels[::2, ::2], photometric="rgb", tile=(64, 64), subfiletype=1)
    with open_slide(path) as slide:
        assert (slide.reader, slide.name) == ("tifffile (OME-TIFF)", "slide")
        assert slide.levels == [(320, 256), (160, 128)]
        assert slide.mpp == (mpp and pytest.approx(mpp))
        assert np.array_equal(np.asarray(slide.read(50, 60, 100, 90)), pixels[60:150, 50:150])


@pytest.mark.parametrize(
    ("mpp", "words"), [(0.5, ""), (0.54, ""), (0.3, "contradict"), (0.25, "2.0 times apart")]
)
def test_a_given_scale_wins_and_one_that_is_twice_the_files_is_refused(
    tmp_path: Path, mpp: float, words: str
) -> None:
    path = tmp_path / "a.tif"
    write_slide(path, 300, 200, mpp=0.5)
    if "apart" in words:
        with pytest.raises(GloVLMError, match=f"contradict.*{words}.*--allow-scale"):
            open_slide(path, mpp=mpp)
        words = "contradict"
    with open_slide(path, mpp=mpp, allow_scale=True) as slide:
        assert (slide.mpp, slide.mpp_source) == (mpp, "given")
        assert ("contradict" in " ".join(slide.flags)) == bool(words)


# ------------------------------------------------------------------------------- refusals


def _cut(path: Path) -> None:
    write_slide(path, 600, 400, compression="deflate", tile=128)
    path.write_bytes(path.read_bytes()[:300])


def _save_png(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path)


def _write_pixels(shape: tuple[int, ...], dtype: Any = np.uint8, **options: Any) -> Any:
    def write(path: Path) -> None:
        tifffile.imwrite(path, np.zeros(shape, dtype), **options)

    return write


REFUSED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing.svs", lambda path: None, "There is no slide"),
    ("folder", Path.mkdir, "is a folder"),
    ("empty.svs", Path.touch, "is empty"),
    ("notes.svs", lambda path: path.write_text("notes"), "is no slide that can be read"),
    ("picture.png", _save_png, "is no slide that can be read"),
    ("cut.tif", _cut, "damaged"),
    ("head.tif", lambda path: path.write_bytes(b"II*\0\xff\xff"), "TIFF"),
    ("grey.tif", _write_pixels((40, 40), photometric="minisblack"), "one grey channel"),
    (
        "cells.ome.tif",
        _write_pixels((3, 64, 64), photometric="minisblack", metadata={"axes": "CYX"}),
        "3 separate channels",
    ),
    ("deep.tif", _write_pixels((40, 40, 3), np.uint16, photometric="rgb"), "8 bits"),
    (
        "stack.tif",
        _write_pixels((5, 40, 40, 3), photometric="rgb", metadata={"axes": "ZYXS"}),
        "stack of pictures",
    ),
]


@pytest.mark.parametrize(("name", "make", "words"), REFUSED)
def test_what_is_no_slide_is_refused_in_one_sentence(
    tmp_path: Path, name: str, make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(GloVLMError, match=words) as caught:
        open_slide(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_one_large_compressed_piece_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "piece.tif"
    _write_pixels((300, 300, 3), photometric="rgb", compression="deflate", rowsperstrip=300)(path)
    monkeypatch.setattr(tiff_reader, "BLOCK", 100)
    monkeypatch.setattr(tiff_reader, "MAX_PIXELS", 50_000)
    with pytest.raises(GloVLMError, match="in one piece of 90,000 pixels"):
        open_slide(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    write_slide(path, 300, 200)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with open_slide(path) as slide:
        assert slide.reader.startswith("tifffile")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(GloVLMError, match=r"hf-glovlm\[slides\]"):
        open_slide(path)


@pytest.mark.parametrize(
    ("part", "words"),
    [((0, 0, 0, 5, 1.0), "at least one pixel"), ((0, 0, 10**5, 10**5, 1.0), "too large")],
)
def test_an_impossible_part_is_refused(
    synthetic: Path, part: tuple[int, int, int, int, float], words: str
) -> None:
    with open_slide(synthetic) as slide, pytest.raises(GloVLMError, match=words):
        slide.read(*part[:4], downsample=part[4])
    with pytest.raises(GloVLMError, match="positive number"):
        open_slide(synthetic, mpp=-1)


# ---------------------------------------------------------------------------------- names

NAMES = [
    ("S19-12345", "accession"),
    ("21-S-04567", "accession"),
    ("SP-21-1234 A1", "accession"),
    ("S1912345", "accession"),
    ("123456789", "accession"),
    ("kidney_0012345678", "accession"),
    ("biopsy_2019-03-15", "date"),
    ("15.03.2019", "date"),
    ("03-15-2019_PAS", "date"),
    ("20190315", "date"),
    ("Smith, John", "person"),
    ("Mueller^Hans", "person"),
    ("Smith_John", "person"),
    ("Mr Miller", "person"),
    ("TCGA-CR-7395-01A-01-TS1.8b9d0f6e-3a64-4f5c-9b7a-123456789012", ""),
    ("tcga-cr-7395-01a-01-ts1", ""),
    ("a1b2c3d4-0000-1111-2222-123456789012", ""),
    ("CMU-1-Small-Region", ""),
    ("kidney-48-5", ""),
    ("small_vectra", ""),
    ("Kidney_Biopsy", ""),
    ("slide_1_of_20", ""),
    ("tumor_001", ""),
    ("HuBMAP_042", ""),
]


@pytest.mark.parametrize(("name", "word"), NAMES)
def test_names_that_may_identify_a_patient_are_flagged(name: str, word: str) -> None:
    flags = name_flags(name)
    assert bool(flags) == bool(word)
    assert word in " ".join(flags)
