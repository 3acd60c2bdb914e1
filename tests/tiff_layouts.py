"""Seeded layouts of TIFF slides, each with its truth, which is not read by the reader under test.

Pixels come from the arrays that were written or, where the codec loses something, from tifffile's
own decoding of that page; sizes and scales from what the file was made to say. The dimensions are
`COMPRESSIONS`, `TILINGS`, `CHANNELS`, `PYRAMIDS`, `EXTRAS`, `UNITS`, `SCENES`, byte order and
BigTIFF: in any run of as many layouts as a dimension has values, each value stands once.
"""

import inspect
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import tifffile
from hostile import _alarm
from numpy.typing import NDArray
from PIL import Image

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.wsi import open_slide

Array = NDArray[Any]
LIMIT = 20  # seconds of one layout
TISSUE = (222, 170, 200)
MARKS = ((200, 20, 30), (20, 30, 200), (10, 130, 30))  # red, blue, green
MARK = 24  # side of a mark in pixels of level 0
SCALES = (0.1214, 0.2527, 0.4990, 0.5, 1.0, 2.004)  # micrometres per pixel of scanners

# What tifffile is told, and whether the codec gives back what it was given.
COMPRESSIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "none": ({}, True),
    "LZW": ({"compression": "lzw"}, True),
    "LZW, predictor": ({"compression": "lzw", "predictor": True}, True),
    "deflate": ({"compression": "zlib"}, True),
    # tifffile's `photometric` is that of what it is given; `outcolorspace` that of the file.
    "JPEG, RGB": (
        {
            "compression": "jpeg",
            "compressionargs": {"level": 92, "outcolorspace": "rgb"},
            "subsampling": (1, 1),
        },
        False,
    ),
    "JPEG, YCbCr": (
        {"compression": "jpeg", "compressionargs": {"level": 90}, "subsampling": (2, 2)},
        False,
    ),
    "JPEG 2000": ({"compression": "jpeg2000", "compressionargs": {"level": 40}}, False),
    "WebP": ({"compression": "webp", "compressionargs": {"level": 90}}, False),
    "ZSTD": ({"compression": "zstd"}, True),
    "PackBits": ({"compression": "packbits"}, True),
    "LZMA": ({"compression": "lzma"}, True),
}
JPEG = ("JPEG, RGB", "JPEG, YCbCr")  # twice as often: what most slides are
COLOUR_ONLY = (*JPEG, "WebP")  # three interleaved channels of 8 bit
TILINGS: dict[str, dict[str, Any]] = {
    "tiles of 64": {"tile": (64, 64)},
    "tiles of 80 x 48": {"tile": (48, 80)},
    "tiles of 128": {"tile": (128, 128)},
    "one large tile": {"tile": (608, 608)},
    "strips of 16": {"rowsperstrip": 16},
    "strips of 48": {"rowsperstrip": 48},
    "one strip": {"rowsperstrip": 2**16},
}
CHANNELS = (
    "RGB", "RGB", "RGB", "RGB", "RGB", "RGB", "planar RGB", "planar RGB", "RGBA", "palette",
    "grey", "2 channels", "3 channels", "5 channels", "16 bit",
)  # fmt: skip
REFUSED = ("grey", "2 channels", "3 channels", "5 channels", "16 bit")
PYRAMIDS = ("none", "none", "SubIFDs", "pages", "pages")
EXTRAS: tuple[tuple[str, ...], ...] = (
    (), (), ("label first",), ("macro first",), ("macro last",), ("thumbnail last",),
    ("label first", "macro first"), ("label last", "macro last"),
)  # fmt: skip
# Names of pictures that hold "label", "macro", "map" or "thumbnail" inside of a word, or no such.
NAMES = ("HuBMAP_12.svs", "unlabelled 3", "macrophages CD68", "kidney", "", "Remapped-7")
MICROMETRES = {
    "um": 1.0, "\N{MICRO SIGN}m": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0, "micron": 1.0,
    "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0,
}  # fmt: skip
# Who states the scale, and how; what follows "absurd" is micrometres per pixel.
UNITS = (
    *(f"OME {unit}" for unit in MICROMETRES),
    "OME without unit", "OME pixel", "OME absurd 0.00025", "OME absurd 252", "OME absurd 0",
    "OME absurd -0.25", "OME absurd nan", "OME nothing", "Aperio MPP", "Aperio AppMag",
    "Aperio absurd 252", "Aperio absurd 0.00025", "inch", "cm", "inch", "cm", "72 dpi",
    "cm absurd 0.00025", "nothing",
)  # fmt: skip
SCENES = ("one", "one", "one", "two")


@dataclass
class Picture:
    """One picture of a file, its truth and where it lies.

    Attributes:
        name: As the file calls it; empty is nameless.
        pixels: RGB `[height, width, 3]` as it should be read; `None` before it is decoded.
        mpp: Micrometres per pixel; `None` is not stated, or not to be believed.
        marks: Colour and centre (x, y) of each mark, in pixels of level 0.
    """

    name: str
    pixels: Array
    mpp: float | None
    marks: list[tuple[tuple[int, int, int], tuple[float, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A file of one layout.

    Attributes:
        path: The file.
        number: Seed of the layout.
        values: Of each dimension.
        pictures: Of the slide, without label, macro and thumbnail, in the file's order.
        refused: Whether a colour slide is not what this is.
    """

    path: Path
    number: int
    values: dict[str, str]
    pictures: list[Picture]
    refused: bool

    @property
    def largest(self) -> Picture:
        """The picture that is read when none is asked for."""
        return max(self.pictures, key=lambda picture: picture.pixels.shape[0])

    def __str__(self) -> str:
        return f"{self.number}: " + ", ".join(f"{k} {v!r}" for k, v in self.values.items())


def make_layout(number: int, folder: Path) -> Layout:
    """Write layout `number` as `folder/layout-<number>.<suffix>`."""
    return _Maker(number, folder).layout()


def check(number: int, folder: Path) -> str:
    """What is wrong with the reading of layout `number`; empty is nothing."""
    layout = make_layout(number, folder)
    try:
        with _alarm(LIMIT):
            wrong = _compare(layout)
    except Exception:
        wrong = traceback.format_exc()[-700:]
    layout.path.unlink()
    return f"{layout}\n    {wrong}" if wrong else ""


class _Maker:
    """Writer of one layout."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.rng = number, random.Random(f"layout {number}")
        self.array_rng = np.random.default_rng(number)
        pick = {
            "unit": UNITS, "channels": CHANNELS, "compression": (*COMPRESSIONS, *JPEG),
            "tiling": tuple(TILINGS), "pyramid": PYRAMIDS, "extras": EXTRAS, "scenes": SCENES,
            "order": ("<", "<", ">"), "big": ("classic", "BigTIFF"),
        }  # fmt: skip
        self.value = {name: _turn(name, values, number) for name, values in pick.items()}
        value = self.value
        self.kind = value["unit"].split()[0] if value["unit"][:3] in ("OME", "Ape") else "plain"
        if self.kind == "Aperio":  # OpenSlide and all others know one order of its pages
            value["scenes"] = "one"
            value["extras"] = tuple(part for part in value["extras"] if "first" not in part)
            value["pyramid"] = "none" if value["pyramid"] == "none" else "pages"
            value["tiling"] = value["tiling"] if "tile" in value["tiling"] else "tiles of 64"
        if value["channels"] in ("2 channels", "3 channels", "5 channels"):
            value["scenes"], value["pyramid"], value["extras"] = "one", "none", ()
        if value["channels"] not in ("RGB", "RGBA") and value["compression"] in COLOUR_ONLY:
            value["compression"] = self.rng.choice(("none", "LZW", "deflate", "ZSTD", "JPEG 2000"))
        if value["channels"] == "RGBA" and value["compression"].startswith("JPEG"):
            value["compression"] = "WebP"
        if value["channels"] == "palette" and not COMPRESSIONS[value["compression"]][1]:
            value["compression"] = "LZW"
        if value["channels"] == "palette":
            value["pyramid"], value["scenes"] = "none", "one"
        self.path = folder / f"layout-{number}{'.svs' if self.kind == 'Aperio' else '.tif'}"
        if self.kind == "OME":
            self.path = self.path.with_suffix(".ome.tif")

    def layout(self) -> Layout:
        value, rng = self.value, self.rng
        sides = [(rng.randrange(330, 600), rng.randrange(330, 600))]
        if value["scenes"] == "two":  # the larger one is the second
            sides.insert(0, (rng.randrange(200, 300), rng.randrange(200, 300)))
        names = rng.sample(NAMES[:4] if len(sides) > 1 else NAMES, len(sides))
        self.pictures = [
            self._picture(name, *side) for name, side in zip(names, sides, strict=True)
        ]
        self.pages: list[int] = []
        self.written = 0
        with tifffile.TiffWriter(
            self.path, bigtiff=value["big"] == "BigTIFF", byteorder=value["order"]
        ) as self.file:
            self._write()
        compression = COMPRESSIONS[value["compression"]]
        if not compression[1]:
            with tifffile.TiffFile(self.path) as read:
                for picture, page in zip(self.pictures, self.pages, strict=True):
                    decoded = read.pages[page].asarray()
                    planar = decoded.ndim == 3 and decoded.shape[0] in (3, 4)
                    decoded = np.moveaxis(decoded, 0, -1) if planar else decoded
                    if value["channels"] not in REFUSED:
                        picture.pixels = decoded[..., :3]
        told = {name: str(given) for name, given in value.items()}
        told["name"] = self.pictures[-1].name
        refused = value["channels"] in REFUSED
        return Layout(self.path, self.number, told, self.pictures, refused)

    def _picture(self, name: str, width: int, height: int) -> Picture:
        """Tissue-coloured noise with one square mark of each colour, anywhere."""
        noise = self.array_rng.integers(-12, 13, (height, width, 3))
        pixels = (np.asarray(TISSUE) + noise).astype(np.uint8)
        marks = []
        for k, colour in enumerate(MARKS):  # each in a band of its own, so that none overlap
            top = k * height // 3
            x = self.rng.randrange(2, width - MARK - 2)
            y = self.rng.randrange(top + 2, top + height // 3 - MARK - 2)
            pixels[y : y + MARK, x : x + MARK] = colour
            marks.append((colour, (x + MARK / 2, y + MARK / 2)))
        if self.value["channels"] == "palette":
            palette = np.array([*MARKS, *((230 - 4 * k, 180 - k, 205) for k in range(8))])
            index = self.array_rng.integers(3, len(palette), (height, width))
            for k, (_, (x, y)) in enumerate(marks):
                left, top = int(x - MARK / 2), int(y - MARK / 2)
                index[top : top + MARK, left : left + MARK] = k
            pixels = palette[index].astype(np.uint8)
            self.palette, self.indices = palette, index.astype(np.uint8)
        return Picture(name, pixels, self._stated()[1], marks)

    # What the file says of the scale ---------------------------------------------------------

    def _stated(self) -> tuple[float, float | None]:
        """Micrometres per pixel as stated, and as they should be understood."""
        unit = self.value["unit"]
        if "absurd" in unit:
            return float(unit.split()[-1]), None
        if unit == "72 dpi":
            return 25400 / 72, None
        mpp = self.rng.choice(SCALES)
        if unit == "Aperio AppMag":
            return 0.5, 0.5  # of an objective of 20
        silent = unit in ("OME pixel", "OME nothing", "nothing")
        return mpp, None if silent else mpp

    def _ome(self, counts: Sequence[int]) -> bytes:
        """OME-XML; `counts` is how many top-level pages of extras stand before the pictures."""
        unit = self.value["unit"].removeprefix("OME ")
        channels = self.value["channels"]
        planes = int(channels[0]) if channels.endswith(" channels") else 1
        samples = {"grey": 1, "palette": 1, "RGBA": 4}.get(channels, 1 if planes > 1 else 3)
        images = []
        for page, name, picture in self._order(counts):
            if picture is None:  # a macro or label, whose scale is another
                scale = 'PhysicalSizeX="17.5" PhysicalSizeY="17.5"'
                size, many, each = (self._size_of_extra(name.split()[0]), 1, 3)
            else:
                height, width = picture.pixels.shape[:2]
                size, many, each = (width, height), planes, samples
                scale = _physical_size(self._scales[id(picture)], unit)
            kind = "uint16" if channels == "16 bit" and picture is not None else "uint8"
            named = f" Name={quoteattr(name)}" if name else ""
            parts = "".join(
                f'<Channel ID="Channel:{len(images)}:{c}" SamplesPerPixel="{each}"/>'
                for c in range(many)
            ) + "".join(f'<TiffData FirstC="{c}" IFD="{page + c}"/>' for c in range(many))
            images.append(
                f'<Image ID="Image:{len(images)}"{named}><Pixels ID="Pixels:{len(images)}" '
                f'DimensionOrder="XYCZT" Type="{kind}" SizeX="{size[0]}" SizeY="{size[1]}" '
                f'SizeZ="1" SizeT="1" SizeC="{many * each}" {scale}>{parts}</Pixels></Image>'
            )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><OME '
            'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            + "".join(images)
            + "</OME>"
        ).encode()

    def _order(self, counts: Sequence[int]) -> list[tuple[int, str, Picture | None]]:
        """Page, name and picture of each image, in the order of the file's pages."""
        first = [part.split()[0] for part in self.value["extras"] if part.endswith("first")]
        last = [part.split()[0] for part in self.value["extras"] if part.endswith("last")]
        listed: list[tuple[int, str, Picture | None]] = []
        page = 0
        for name in first:
            listed.append((page, f"{name} image", None))
            page += 1
        for picture, count in zip(self.pictures, counts, strict=True):
            listed.append((page, picture.name, picture))
            page += count
        for name in last:
            listed.append((page, f"{name} image", None))
            page += 1
        return listed

    # The pages ---------------------------------------------------------------------------------

    def _write(self) -> None:
        value = self.value
        self.extra_size = (self.rng.randrange(90, 140), self.rng.randrange(40, 80))
        self._scales = {id(picture): _scale_of(picture, value["unit"]) for picture in self.pictures}
        channels = value["channels"]
        planes = int(channels[0]) if channels.endswith(" channels") else 1
        self.levels = 0 if value["pyramid"] == "none" else self.rng.randrange(1, 3)
        counts = [
            planes + (self.levels if value["pyramid"] == "pages" else 0) for _ in self.pictures
        ]
        self.description: bytes | None = self._ome(counts) if self.kind == "OME" else None
        for part in value["extras"]:
            if part.endswith("first"):
                self._extra(part.split()[0])
        for picture in self.pictures:
            self._slide(picture)
        for part in value["extras"]:
            if part.endswith("last"):
                self._extra(part.split()[0])

    def _slide(self, picture: Picture) -> None:
        value = self.value
        options = self._resolution(picture)
        if self.kind == "Aperio":
            self.description = self._aperio(picture)
        self.pages.append(self.written)
        sub = self.levels if value["pyramid"] == "SubIFDs" else 0
        for plane in self._planes(picture):
            self._page(plane, **options, subifds=sub or None)
        if self.kind == "Aperio" and len(self._planes(picture)) == 1:  # the second page, in strips
            self.description = b"Aperio Image Library v11.2.1\r\n-> thumbnail"
            thumbnail = picture.pixels[: len(picture.pixels) // 3 * 3 : 3, ::3]
            self._put(thumbnail, {"photometric": "rgb", "rowsperstrip": 16}, False)
        for k in range(1, self.levels + 1):
            for plane in self._planes(picture, 2**k):
                self._page(plane, subfiletype=1, below=bool(sub))

    def _planes(self, picture: Picture, factor: int = 1) -> list[Array]:
        """The arrays of one level as they are written, one a page."""
        channels, pixels = self.value["channels"], picture.pixels
        if channels == "palette":
            return [self.indices[: pixels.shape[0], : pixels.shape[1]]]
        if factor > 1:
            height, width = (side // factor for side in pixels.shape[:2])
            cut = pixels[: height * factor, : width * factor]
            blocks = cut.reshape(height, factor, width, factor, 3)
            pixels = blocks.mean((1, 3)).round().astype(np.uint8)
        if channels == "planar RGB":
            return [np.moveaxis(pixels, -1, 0)]
        if channels == "RGBA":
            return [np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])]
        if channels == "grey":
            return [pixels[..., 1]]
        if channels == "16 bit":
            return [pixels.astype(np.uint16) * 257]
        if channels.endswith(" channels"):
            planes = [255 - pixels[..., c % 3] for c in range(int(channels[0]))]
            return planes if self.kind == "OME" or self.number % 2 else [np.stack(planes)]
        return [pixels]

    def _page(self, array: Array, *, below: bool = False, **options: Any) -> None:
        channels = self.value["channels"]
        given = dict(COMPRESSIONS[self.value["compression"]][0]) | TILINGS[self.value["tiling"]]
        if channels in ("RGB", "16 bit"):
            given.setdefault("photometric", "rgb")
        elif channels == "planar RGB":
            given |= {"photometric": "rgb", "planarconfig": "separate"}
        elif channels == "RGBA":
            given |= {"photometric": "rgb", "extrasamples": ["unassalpha"]}
        elif channels == "palette":
            table = np.zeros((3, 256), np.uint16)
            table[:, : len(self.palette)] = self.palette.T * 257
            given |= {"photometric": "palette", "colormap": table}
            given.pop("predictor", None)
        else:
            given |= {"photometric": "minisblack"}
            given |= {"planarconfig": "separate"} if array.ndim == 3 else {}
        self._put(array, given | {k: v for k, v in options.items() if v is not None}, below)

    def _extra(self, name: str) -> None:
        """A small picture of another content."""
        width, height = self._size_of_extra(name)
        array = np.full((height, width, 3), (40, 90, 40), np.uint8)
        marked = {"label": 1, "macro": 9}.get(name, 0)
        if self.kind == "Aperio":
            self.description = f"Aperio Image Library v11\r\n{name} {width}x{height}".encode()
        options: dict[str, Any] = {"photometric": "rgb", "rowsperstrip": 16}
        if self.kind != "OME":
            options["subfiletype"] = marked
        self._put(array, options, False)

    def _size_of_extra(self, name: str) -> tuple[int, int]:
        """Sometimes a macro is half as wide and high as the slide, and still none of its levels."""
        if name == "macro" and self.number % 3 == 0:
            height, width = self.pictures[-1].pixels.shape[:2]
            return width // 2, height // 2
        return self.extra_size

    def _put(self, array: Array, options: dict[str, Any], below: bool) -> None:
        """A page; the description stands in the first one that comes."""
        self.file.write(
            array, description=self.description, metadata=None, software=False, **options
        )
        self.description = None
        self.written += not below

    def _resolution(self, picture: Picture) -> dict[str, Any]:
        unit = self.value["unit"]
        if self.kind != "plain" or unit == "nothing":
            return {}
        mpp = self._scales[id(picture)]
        length, name = (1e4, "CENTIMETER") if unit.startswith("cm") else (25400, "INCH")
        return {"resolution": (length / mpp, length / mpp), "resolutionunit": name}

    def _aperio(self, picture: Picture) -> bytes:
        height, width = picture.pixels.shape[:2]
        stated = f"MPP = {self._scales[id(picture)]}"
        stated = "AppMag = 20" if "AppMag" in self.value["unit"] else stated
        size = f"{width}x{height} [0,0 {width}x{height}]"
        return f"Aperio Image Library v11.2.1\r\n{size} |{stated}|Filename = 12".encode()


def _turn(name: str, values: Sequence[Any], number: int) -> Any:
    """Value of a dimension: a shuffled round of all, then the next round."""
    turn, place = divmod(number, len(values))
    order = list(values)
    random.Random(f"{name} {turn}").shuffle(order)
    return order[place]


def _scale_of(picture: Picture, unit: str) -> float:
    """Micrometres per pixel that the file states of a picture, whether to be believed or not."""
    if picture.mpp is not None:
        return picture.mpp
    if "absurd" in unit:
        return float(unit.split()[-1])
    return 25400 / 72 if unit == "72 dpi" else 0.31


def _physical_size(mpp: float, unit: str) -> str:
    if unit == "nothing":
        return ""
    if unit == "without unit" or unit.startswith("absurd"):
        return f'PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}"'
    size = mpp / MICROMETRES.get(unit, 1)
    return "".join(
        f' PhysicalSize{axis}="{size!r}" PhysicalSize{axis}Unit="{unit}"' for axis in "XY"
    )


# The comparison ------------------------------------------------------------------------------


def _compare(layout: Layout) -> str:
    try:
        slide = open_slide(layout.path)
    except GloVLMError as error:
        said = str(error)
        if len(said) > 600 or not said.rstrip().endswith("."):
            return f"no sentence: {said}"
        if layout.refused or layout.values["channels"] == "palette":
            return ""
        return f"refused: {said}"
    with slide:
        if layout.refused:
            return f"read as colour by {slide.reader}"
        wrong = _compare_picture(slide, layout.largest, layout)
        if wrong or len(layout.pictures) == 1:
            return wrong
        if not any("scene" in flag.lower() or "picture" in flag.lower() for flag in slide.flags):
            return f"the second picture is not told: {slide.flags}"
    if "scene" not in inspect.signature(open_slide).parameters:
        return "no picture can be chosen"
    choose: Any = open_slide
    chosen = [(str(k), picture) for k, picture in enumerate(layout.pictures, 1)]
    if "first" in layout.values["extras"]:
        chosen = []  # whether a label has a number is the reader's affair
    if layout.values["unit"].startswith("OME"):
        chosen += [(picture.name, picture) for picture in layout.pictures]
    for scene, picture in chosen:
        with choose(layout.path, scene=scene) as slide:
            wrong = _compare_picture(slide, picture, layout)
        if wrong:
            return f"scene {scene!r}: {wrong}"
    return ""


def _compare_picture(slide: Any, picture: Picture, layout: Layout) -> str:
    height, width = picture.pixels.shape[:2]
    if tuple(slide.size) != (width, height) or tuple(slide.levels[0]) != (width, height):
        return f"size {slide.size}, level 0 {slide.levels[0]}; expected {width, height}"
    if picture.mpp is None:
        if slide.mpp is not None:
            return f"scale {slide.mpp} by {slide.mpp_source}; expected none"
        if not slide.flags:
            return "nothing is said of the unknown scale"
    elif slide.mpp is None or abs(slide.mpp / picture.mpp - 1) > 1e-4:
        return f"scale {slide.mpp} by {slide.mpp_source}; expected {picture.mpp}, {slide.flags}"
    rng = random.Random(f"boxes {layout.number}")
    boxes = [(0, 0, width, height), (-7, -5, 40, 30), (width - 20, height - 30, 50, 47)]
    boxes += [(width + 5, 3, 8, 8), (60, 60, 9, 9), (width - 1, 0, 1, height)]
    for _ in range(3):
        x, y = rng.randrange(width - 70), rng.randrange(height - 70)
        boxes.append((x, y, rng.randrange(1, 200), rng.randrange(1, 200)))
    for box in boxes:
        read = np.asarray(slide.read(*box))
        expected = _cut(picture.pixels, *box)
        if read.shape != expected.shape:
            return f"{box}: shape {read.shape}, expected {expected.shape}"
        off = np.abs(read.astype(int) - expected)
        if off.any():
            share = (off.max(2) > 0).mean()
            return f"{box}: off by up to {off.max()} in {share:.2%} by {slide.reader}"
    for downsample in (2, 2.5, 4):
        small = slide.read(0, 0, width, height, downsample=downsample)
        expected_size = (round(width / downsample), round(height / downsample))
        if small.size != expected_size:
            return f"downsample {downsample}: {small.size}, expected {expected_size}"
        wrong = _marks(small, picture)
        if wrong:
            return f"downsample {downsample}: {wrong}, levels {slide.levels}, {slide.reader}"
    return ""


def _marks(small: Image.Image, picture: Picture) -> str:
    """Where a mark does not lie within a pixel of its place."""
    pixels = np.asarray(small).astype(float)
    for colour, (x, y) in picture.marks:
        # The part of a pixel that the mark covers, from none at the tissue's colour to all.
        toward = np.subtract(colour, TISSUE)
        share = ((pixels - TISSUE) @ toward / (toward @ toward)).clip(0, 1)
        share[np.abs(pixels - TISSUE - share[..., None] * toward).max(2) > 40] = 0  # of another
        share[share < 0.4] = 0
        if not share.any():
            return f"no mark of {colour}"
        rows, columns = np.indices(share.shape)
        at = tuple(float((share * axis).sum() / share.sum()) + 0.5 for axis in (columns, rows))
        height, width = picture.pixels.shape[:2]  # of the whole picture, which is what was read
        expected = (x * small.width / width, y * small.height / height)
        if max(abs(at[0] - expected[0]), abs(at[1] - expected[1])) > 1:
            return f"mark of {colour} at {at}, expected {expected}"
    return ""


def _cut(pixels: Array, x: int, y: int, width: int, height: int) -> Array:
    """Part of a picture on white."""
    part = np.full((height, width, 3), 255, np.uint8)
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, pixels.shape[1]), min(y + height, pixels.shape[0])
    if right > left and bottom > top:
        part[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
    return part
