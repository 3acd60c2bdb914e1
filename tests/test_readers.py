"""Readers of slides: which picture, where it lies, at what scale, and that it is brightfield."""

import struct
import threading
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from damaged_tiffs import check
from numpy.typing import NDArray
from scn_made import write_scn
from slides_made import write_slide

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.wsi import Slide, describe_slide, is_same_slide, open_slide
from hf_glovlm.slides.numbering import Numbers

Array = NDArray[Any]
RGB = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
TILES = {"tile": (64, 64)}
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def pixels_of(slide: Slide) -> Array:
    return np.asarray(slide.read(0, 0, *slide.size))


def write_ome(
    path: Path, pages: list[Array], images: list[tuple[int, str, str, str]], **options: Any
) -> Path:
    """OME-TIFF of tiled pages; of each image its first page, name, attributes and channels."""
    text = f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{OME}">'
    for i, (page, name, attributes, channels) in enumerate(images):
        height, width = pages[page].shape[:2]
        n = 3 if pages[page].ndim == 3 else len(pages)
        planes = 1 if pages[page].ndim == 3 else n
        data = "".join(
            f'<TiffData FirstC="{k}" IFD="{page + k}" PlaneCount="1"/>' for k in range(planes)
        )
        text += (
            f'<Image ID="Image:{i}" Name="{name}"><Pixels ID="Pixels:{i}" DimensionOrder="XYCZT" '
            f'Type="uint8" SizeX="{width}" SizeY="{height}" SizeC="{n}" SizeZ="1" SizeT="1" '
            f"{attributes}>{channels}{data}</Pixels></Image>"
        )
    with tifffile.TiffWriter(path) as file:
        for i, page in enumerate(pages):
            described = None if i else (text + "</OME>").encode()
            kind = "rgb" if page.ndim == 3 else "minisblack"
            given: dict[str, Any] = {"photometric": kind, **TILES} | options
            file.write(page, description=described, metadata=None, **given)
    return path


def size(value: float, unit: str | None = None) -> str:
    """Attributes of a pixel size."""
    units = "" if unit is None else "".join(f' PhysicalSize{a}Unit="{unit}"' for a in "XY")
    return f'PhysicalSizeX="{value!r}" PhysicalSizeY="{value!r}"{units}'


ONE = '<Channel ID="c" SamplesPerPixel="3"/>'


def channels(*each: str) -> str:
    return "".join(f'<Channel ID="c{i}" SamplesPerPixel="1" {c}/>' for i, c in enumerate(each))


# --------------------------------------------------------------------------- where it lies


@pytest.fixture(scope="module")
def scn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scn") / "a.scn"
    write_scn(path, (1024, 768), [(300, 200, RGB), (600, 500, RGB[:64, :64])])
    return path


def test_the_corner_of_the_scanned_part_is_read_and_pixels_count_from_level_0(scn: Path) -> None:
    with open_slide(scn) as slide:
        assert getattr(slide, "bounds", None) == (300, 200)
        assert (slide.size, slide.mpp, slide.reader) == ((1024, 768), 0.5, "openslide (leica)")
        assert np.array_equal(np.asarray(slide.read(300, 200, 128, 96)), RGB)
        assert (np.asarray(slide.read(0, 0, 90, 90)) == 255).all()
        from hf_glovlm.slides.files.coordinates import parse_origin

        origin = parse_origin("auto", slide.bounds)
        assert origin.to_level0(np.array([0, 0])).tolist() == [300, 200]
        assert "2 scanned regions" in " ".join(slide.flags)


def test_a_slide_that_was_scanned_from_its_corner_states_no_bounds(tmp_path: Path) -> None:
    write_scn(tmp_path / "a.scn", (512, 384), [(0, 0, RGB)])
    write_slide(tmp_path / "a.tif", 128, 96)
    for name in ("a.scn", "a.tif"):
        with open_slide(tmp_path / name) as slide:
            assert getattr(slide, "bounds", "not read") is None


# ----------------------------------------------------------------------------- the guard

RED_GREEN_BLUE = ('Color="-16776961"', 'Color="16711935"', 'Color="65535"')
PLANES = [RGB[..., k] for k in range(3)]


def _planes(*each: str) -> Callable[[Path], Any]:
    return lambda path: write_ome(path, PLANES, [(0, "", size(0.5), channels(*each))])


def _tiff(array: Array, **options: Any) -> Callable[[Path], Any]:
    options = {"metadata": None, **TILES} | options
    return lambda path: tifffile.imwrite(path, array, **options)


def _grey_scn(path: Path) -> None:
    write_scn(path, (256, 192), [(64, 32, RGB[..., 0])])


GREY = RGB[..., 0]
TABLE = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256)
NO_SLIDE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("grey.tif", _tiff(GREY), "one grey channel, as fluorescence does"),
    ("pages.tif", _tiff(np.stack(PLANES), photometric="minisblack"), r"grey.*\(3 pages\)"),
    ("palette.tif", _tiff(GREY, photometric="palette", colormap=TABLE), "masks of classes"),
    ("deep.tif", _tiff(RGB.astype(np.uint16), photometric="rgb"), "3 x uint16"),
    ("cmyk.tif", _tiff(np.dstack([RGB, GREY]), photometric="separated"), "SEPARATED"),
    ("grey.scn", _grey_scn, "grey"),
    ("unnamed.ome.tif", _planes("", "", ""), "3 separate channels"),
    ("shown in colours.ome.tif", _planes(*RED_GREEN_BLUE), "3 separate channels"),
    ("dyes.ome.tif", _planes('Name="DAPI"', 'Name="FITC"', 'Name="Cy3"'), "DAPI, FITC, Cy3"),
    (
        "dyes by colour.ome.tif",
        _planes(*(f'Name="{n}" EmissionWavelength="500"' for n in ("Red", "Green", "Blue"))),
        "as fluorescence does",
    ),
]


@pytest.mark.parametrize(("name", "make", "words"), NO_SLIDE)
def test_what_is_no_brightfield_rgb_is_refused_before_any_reader(
    tmp_path: Path, name: str, make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(GloVLMError, match=words) as caught:
        open_slide(tmp_path / name)
    assert "\n" not in str(caught.value)


SEPARATE = {"photometric": "rgb", "planarconfig": "separate"}
IN_PLANES: list[tuple[str, Callable[[Path], Any]]] = [
    ("one page.ome.tif", _tiff(np.moveaxis(RGB, -1, 0), **SEPARATE, metadata={"axes": "CYX"})),
    ("one page.tif", _tiff(np.moveaxis(RGB, -1, 0), **SEPARATE)),
    ("strips.tif", _tiff(np.moveaxis(RGB, -1, 0), **SEPARATE, tile=None, rowsperstrip=10)),
    ("zip.tif", _tiff(np.moveaxis(RGB, -1, 0), **SEPARATE, compression="deflate")),
    ("one channel.ome.tif", lambda path: write_ome(path, PLANES, [(0, "", size(0.5), ONE)])),
    ("named.ome.tif", _planes('Name="Red"', 'Name="Green"', 'Name="Blue"')),
    ("letters.ome.tif", _planes('Name="r"', 'Name="g"', 'Name="b"')),
    (
        "lit through.ome.tif",
        _planes(*(f'{c} ContrastMethod="Brightfield"' for c in RED_GREEN_BLUE)),
    ),
]


@pytest.mark.parametrize(("name", "make"), IN_PLANES)
def test_rgb_in_three_planes_is_read_right(
    tmp_path: Path, name: str, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / name)
    try:
        with open_slide(tmp_path / name) as slide:
            pixels, part = pixels_of(slide), np.asarray(slide.read(20, 31, 70, 40))
    except GloVLMError as error:
        pytest.fail(str(error))
    assert np.array_equal(pixels, RGB)
    assert np.array_equal(part, RGB[31:71, 20:90])


def test_planes_are_put_together_in_the_order_of_their_names(tmp_path: Path) -> None:
    _planes('Name="Blue"', 'Name="Green"', 'Name="Red"')(tmp_path / "a.ome.tif")
    try:
        with open_slide(tmp_path / "a.ome.tif") as slide:
            pixels = pixels_of(slide)
    except GloVLMError as error:
        pytest.fail(str(error))
    assert np.array_equal(pixels, RGB[..., ::-1])


# ------------------------------------------------------------------------ several pictures


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A macro image, two slides, the larger of which is the third, and a label."""
    path = tmp_path_factory.mktemp("scenes") / "a.ome.tif"
    pages = [RGB[:32, :48], RGB[:64, :64], RGB, RGB[:16, :16]]
    names = ["macro image", "Kidney PAS", "HuBMAP_12.svs", "label"]
    images = [(i, name, size(i + 0.25), ONE) for i, name in enumerate(names)]
    return write_ome(path, pages, images)


def choose(path: Path, scene: str) -> Slide:
    assert "scene" in signature(open_slide).parameters
    return open_slide(path, scene=scene)


def opened(path: Path, scene: str | None = None, **options: Any) -> Slide:
    """A slide, whose refusal is a failure of the test."""
    try:
        return choose(path, scene) if scene else open_slide(path, **options)
    except GloVLMError as error:
        raise AssertionError(str(error)) from error


def test_the_largest_picture_is_read_at_its_own_scale_and_the_others_are_told(scenes: Path) -> None:
    with opened(scenes) as slide:
        assert (slide.size, slide.mpp, getattr(slide, "scene", None)) == ((128, 96), 2.25, "2")
        assert np.array_equal(pixels_of(slide), RGB)
        (flag,) = slide.flags
    assert "1 further picture (1: 64 x 64 pixels)" in flag
    assert "--scene" in flag
    assert "Kidney" not in flag  # a name may identify a patient


@pytest.mark.parametrize("scene", ["1", "Kidney PAS", "kidney pas", " 1 "])
def test_a_scene_is_chosen_by_number_or_name(scenes: Path, scene: str) -> None:
    with opened(scenes, scene=scene) as slide:
        assert (slide.size, slide.mpp, getattr(slide, "scene", None)) == ((64, 64), 1.25, "1")
        assert np.array_equal(pixels_of(slide), RGB[:64, :64])


@pytest.mark.parametrize(
    ("scene", "words"),
    [("3", "from 1 to 2"), ("0", "from 1 to 2"), ("Kidny PAS", "Did you mean 'Kidney PAS'?")],
)
def test_a_scene_that_is_not_there_is_refused_in_words(
    scenes: Path, scene: str, words: str
) -> None:
    with pytest.raises(GloVLMError, match=r"holds 2 pictures \(1: 64 x 64.*" + words):
        choose(scenes, scene)


def test_of_a_file_with_one_picture_scene_1_is_that(tmp_path: Path, scn: Path) -> None:
    write_slide(tmp_path / "a.tif", 128, 96)
    for path in (tmp_path / "a.tif", scn):
        with opened(path, scene="1") as slide:
            assert slide.scene is None
    with pytest.raises(GloVLMError, match="holds one picture"):
        choose(tmp_path / "a.tif", "2")
    with pytest.raises(GloVLMError, match=r"Leica SCN.*leave --scene out"):
        choose(scn, "2")


@pytest.mark.parametrize("name", ["macro", "Slide label", "map"])
def test_the_largest_picture_is_never_dropped_by_its_name(tmp_path: Path, name: str) -> None:
    images = [(0, name, size(0.5), ONE), (1, "b", size(0.25), ONE)]
    with opened(write_ome(tmp_path / "a.ome.tif", [RGB, RGB[:32, :32]], images)) as slide:
        assert (slide.size, slide.mpp) == ((128, 96), 0.5)


def test_pages_that_openslide_leaves_out_are_told_and_chosen(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as file:
        for page in (RGB, 255 - RGB, RGB[::2, ::2]):
            file.write(page, photometric="rgb", **TILES, metadata=None)
    with opened(path) as slide:
        assert np.array_equal(pixels_of(slide), RGB)
        assert any("further picture" in flag for flag in slide.flags)
    with opened(path, scene="2") as slide:
        assert np.array_equal(pixels_of(slide), 255 - RGB)


# ---------------------------------------------------------------------------------- scale

MU = ("\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "&#181;m", "um", "micron", "microns")
SPELLED = [(unit, 0.25) for unit in (*MU, "Micrometer", "micrometres", None)]
SPELLED += [("nm", 250.0), ("mm", 0.00025), ("cm", 0.000025), ("m", 2.5e-7)]
SPELLED += [("in", 0.25 / 25400), ("inch", 0.25 / 25400)]


@pytest.mark.parametrize(("unit", "value"), SPELLED)
def test_a_scale_is_read_in_every_spelling_of_its_unit(
    tmp_path: Path, unit: str | None, value: float
) -> None:
    image = (0, "", size(value, unit), ONE)
    with opened(write_ome(tmp_path / "a.ome.tif", [RGB], [image])) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert not slide.flags


IMAGEJ = "ImageJ=1.54\nimages=1\nunit={}\n"
VIPS = (
    "<image><properties><property><name>openslide.mpp-{a}</name>"
    '<value type="VipsRefString">{v}</value></property>'
)
RESOLUTION: dict[str, Any] = {"resolution": (4, 4), "resolutionunit": "NONE"}
STATED: list[tuple[str, dict[str, Any], float | None, str]] = [
    ("ImageJ", {"description": IMAGEJ.format("micron"), **RESOLUTION}, 0.25, ""),
    ("ImageJ, mu", {"description": IMAGEJ.format(r"\u00B5m"), **RESOLUTION}, 0.25, ""),
    ("ImageJ, pixels", {"description": IMAGEJ.format("pixel"), **RESOLUTION}, None, "--mpp"),
    (
        "libvips",
        {"description": VIPS.format(a="x", v=0.26) + VIPS.format(a="y", v=0.26)},
        0.26,
        "",
    ),
    ("MPP with a comma", {"description": "Aperio Image\r\n|MPP = 0,2525|"}, 0.2525, ""),
    ("MPP of millimetres", {"description": "Aperio\r\n|MPP = 0.00025|"}, None, "no slide has"),
    ("MPP of nanometres", {"description": "Aperio\r\n|MPP = 252|"}, None, "no slide has"),
    (
        "a tag of millimetres",
        {"resolution": (4e7, 4e7), "resolutionunit": "CENTIMETER"},
        None,
        "no slide has",
    ),
]


@pytest.mark.parametrize(("options", "mpp", "words"), [row[1:] for row in STATED])
@pytest.mark.parametrize("tiles", [TILES, {}], ids=["tiles", "strips"])
def test_a_scale_of_a_plain_tiff_is_read_and_no_other_believed(
    tmp_path: Path, options: dict[str, Any], mpp: float | None, words: str, tiles: dict[str, Any]
) -> None:
    given = {"metadata": None, "software": False} | tiles | options
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", **given)
    with opened(tmp_path / "a.tif") as slide:
        assert slide.mpp == (mpp and pytest.approx(mpp))
        assert words in " ".join(slide.flags)
        assert bool(slide.flags) == bool(words)


@pytest.mark.parametrize("value", [0.00025, 252.0])
def test_a_scale_that_no_slide_has_is_not_believed_and_said(tmp_path: Path, value: float) -> None:
    path = write_ome(tmp_path / "a.ome.tif", [RGB], [(0, "", size(value), ONE)])
    with opened(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (None, "unknown")
        assert f"{value:.4g} micrometres per pixel, which no slide has" in " ".join(slide.flags)
    with pytest.raises(GloVLMError, match=r"0\.02 to 20"):
        open_slide(path, mpp=value)


def test_a_magnification_is_only_about_a_scale(tmp_path: Path) -> None:
    about = "Aperio Image Library v12\r\n96x64|AppMag = 20"
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", description=about, metadata=None)
    with opened(tmp_path / "a.tif", mpp=0.23) as slide:  # some scanners have 20x at this scale
        assert (slide.mpp, slide.mpp_source) == (0.23, "given")
        assert "magnification in the file" in " ".join(slide.flags)


# ------------------------------------------------------------------------- one slide's files


def write_dicom(path: Path, series: str, *, implicit: bool = False, body: bytes = b"") -> Path:
    """Header of a DICOM file with sequences before the series, and another series in them."""
    syntax = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"

    def element(
        tag: int, kind: bytes, value: bytes, *, meta: bool = False, open_: bool = False
    ) -> bytes:
        head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        length = 0xFFFFFFFF if open_ else len(value)
        if implicit and not meta:
            return head + struct.pack("<I", length) + value
        if kind == b"SQ":
            return head + kind + b"\0\0" + struct.pack("<I", length) + value
        return head + kind + struct.pack("<H", length) + value

    def uid(text: str) -> bytes:
        return text.encode() + b"\0" * (len(text) % 2)

    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    item += element(0x0020000E, b"UI", uid("9.9.9"))
    item += struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    closed = struct.pack("<HHI", 0xFFFE, 0xE000, 14) + element(0x0020000E, b"UI", uid("9.9.99"))
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.write_bytes(
        b"\0" * 128
        + b"DICM"
        + element(0x00020010, b"UI", uid(syntax), meta=True)
        + element(0x00081115, b"SQ", item + end, open_=True)
        + element(0x00082218, b"SQ", closed)
        + element(0x0020000D, b"UI", uid("1.2"))
        + element(0x0020000E, b"UI", uid(series))
        + element(0x00280010, b"US", struct.pack("<H", 16))
        + body
    )
    return path


def test_the_files_of_one_dicom_series_are_one_slide(tmp_path: Path) -> None:
    from hf_glovlm.slides.files.listing import list_slides

    write_dicom(tmp_path / "b1.dcm", "1.2.3")
    write_dicom(tmp_path / "b0.dcm", "1.2.3", implicit=True)
    write_dicom(tmp_path / "IM1", "1.2.3")  # files of DICOM often have no suffix
    write_dicom(tmp_path / "c.dcm", "1.2.4")
    (tmp_path / "notes").write_text("x")
    (tmp_path / ".hidden.svs").write_bytes(b"x")
    (tmp_path / "deeper").mkdir()
    write_dicom(tmp_path / "deeper" / "b0.dcm", "1.2.3")  # OpenSlide looks in one folder
    write_slide(tmp_path / "a.tif", 64, 64)
    expected = ["IM1", "a.tif", "c.dcm", "deeper/b0.dcm"]
    assert [p.relative_to(tmp_path).as_posix() for p in list_slides([tmp_path])] == expected
    files = [tmp_path / name for name in ("c.dcm", "b1.dcm", "b0.dcm", "missing.svs")]
    assert [p.name for p in list_slides(files)] == ["c.dcm", "b0.dcm", "missing.svs"]
    (tmp_path / "none").mkdir()
    with pytest.raises(GloVLMError, match="holds no slide"):
        list_slides([tmp_path / "none"])


def test_a_slide_is_known_by_all_files_of_its_series(tmp_path: Path) -> None:
    first = write_dicom(tmp_path / "b0.dcm", "1.2.3", body=b"levels")
    second = write_dicom(tmp_path / "b1.dcm", "1.2.3", body=b"pixels")
    write_dicom(tmp_path / "c.dcm", "1.2.4")
    known = describe_slide(second)
    assert len(known) == 2
    assert known == describe_slide(first)
    assert is_same_slide(first, known)
    numbers = Numbers()
    assert numbers.of_slide(first) == "slide_001"
    with pytest.raises(GloVLMError, match="same slide"):
        numbers.of_slide(second)
    second.write_bytes(second.read_bytes() + b"!")
    assert not is_same_slide(first, known)


def test_a_real_series_is_one_slide(shared: Path) -> None:
    from hf_glovlm.slides.files.listing import list_slides

    files = [shared / "data" / "slides" / f"boxes_{i}.dcm" for i in (1, 0)]
    assert list_slides(files) == [files[1]]
    assert len(describe_slide(files[0])) == 2


# ------------------------------------------------------------------------------- own reader


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "deflate", None])
def test_what_openslide_reads_to_the_same_bit_is_read_by_the_faster_reader(
    tmp_path: Path, compression: str | None
) -> None:
    path = tmp_path / "a.tif"
    write_slide(path, 700, 500, compression=compression or "none", tile=128)
    with open_slide(path) as slide:
        assert slide.reader == "tifffile (TIFF)"
        assert np.array_equal(pixels_of(slide), tifffile.imread(path))


def test_where_the_readers_differ_openslide_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_glovlm.slides.files import readers

    path = tmp_path / "a.tif"
    write_slide(path, 300, 200)
    read = readers.TiffReader.read
    monkeypatch.setattr(
        readers.TiffReader, "read", lambda *args: read(*args).point(lambda value: value ^ 1)
    )
    with open_slide(path) as slide:
        assert slide.reader == "openslide (generic-tiff)"
        assert slide.mpp == 0.5
        assert np.array_equal(pixels_of(slide), tifffile.imread(path))


@pytest.mark.parametrize(("side", "level"), [((221, 239), (110, 119)), ((221, 239), (111, 120))])
def test_a_level_of_half_the_size_lies_where_its_pixels_are(
    tmp_path: Path, side: tuple[int, int], level: tuple[int, int]
) -> None:
    """A mark near the far edge stays in its place at half the size, whichever way it is rounded."""
    fine, coarse = (np.full((h, w, 3), 255, np.uint8) for w, h in (side, level))
    fine[200:210, 180:190], coarse[100:105, 90:95] = 0, 0
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for k, page in enumerate((fine, coarse)):
            file.write(page, photometric="rgb", **TILES, subfiletype=k, metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels == [side, level]
        half = np.asarray(slide.read(160, 180, 40, 40, downsample=2))
    assert np.argwhere(half[..., 0] < 128).tolist() == [
        [y, x] for y in range(10, 15) for x in range(10, 15)
    ]


# ---------------------------------------------------------------------------------- damage


def test_a_damaged_tiff_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    wrong = [said for seed in range(12) if (said := check(seed, tmp_path))]
    assert not wrong, "\n".join(wrong)


def test_a_slide_is_closed_when_no_thread_reads_it(scn: Path) -> None:
    """OpenSlide aborts the process otherwise, as at Ctrl-C while a batch is read ahead."""

    class Handle:
        """OpenSlide's, which takes its time."""

        def __init__(self, handle: Any) -> None:
            self.handle, self.steps, self.started = handle, list[str](), threading.Event()

        def read_region(self, *args: Any) -> Any:
            self.started.set()
            time.sleep(0.1)
            part = self.handle.read_region(*args)
            self.steps.append("read")
            return part

        def close(self) -> None:
            self.steps.append("closed")
            self.handle.close()

    slide = open_slide(scn)
    reader: Any = slide._file
    reader._slide = handle = Handle(reader._slide)
    thread = threading.Thread(target=slide.read, args=(0, 0, 9, 9))
    thread.start()
    handle.started.wait()
    slide.close()
    thread.join()
    assert handle.steps == ["read", "closed"]
