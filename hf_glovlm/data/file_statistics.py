"""File statistics: what an image file shows that is not its tissue, and what may predict its label.

A model that learns from few images may learn how they were made instead of what they show. The
groups in `SHORTCUTS` say as little of the tissue as can be had: size, compression, and blur and
texture scale of the frame alone (the outer tenth of each side), where a crop shows what lies around
its object. The group `content` sees the tissue; it is described by class and predicts nothing.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from .folder import column

if TYPE_CHECKING:
    from datasets import Dataset

    from .looks import Looks

__all__ = [
    "FORMATS",
    "SHORTCUTS",
    "STATISTICS",
    "FileStatistics",
    "Statistic",
    "measure_file",
    "read_file_statistics",
]

Floats = NDArray[np.float64]

SHORTCUTS = ("size", "compression", "blur", "magnification")
CONTENT = "content"
FORMATS = ("JPEG", "PNG", "TIFF", "another format")
_GLASS = 220  # the least channel of a pixel without tissue is above
_FRAME = 0.1  # of each side
_LINES = 16  # along each side, evenly through the frame
_LEAST_FRAME = 17  # pixels: the longest lag, and one
_LARGEST = 256  # pixels of a side that focus is measured on
_SMALL = 32  # pixels, about, of the side that colours are averaged to
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_FLAT = 0.05  # squared grey levels, added to differences: a flat frame has ratio 1


@dataclass(frozen=True)
class Statistic:
    """Statistic of an image file.

    Attributes:
        group: One of `SHORTCUTS`, or `content`.
        title: As tables and charts name it.
        unit: Of the value; empty for a plain number.
        log: Whether a model takes its logarithm.
        recorded: Whether it stands in the rows and not in the file.
    """

    group: str
    title: str
    unit: str = ""
    log: bool = False
    recorded: bool = False


STATISTICS: dict[str, Statistic] = {
    "width": Statistic("size", "Width", "px", log=True),
    "height": Statistic("size", "Height", "px", log=True),
    "aspect": Statistic("size", "Width by height", log=True),
    "format": Statistic("compression", "Format"),
    "channels": Statistic("compression", "Channels"),
    "quantisation": Statistic("compression", "JPEG quantisation, mean of luminance", log=True),
    "quantisation_colour": Statistic("compression", "JPEG quantisation, mean of colour", log=True),
    "subsampling": Statistic("compression", "JPEG colour subsampling"),
    "blockiness": Statistic("compression", "Blockiness of the frame"),
    "embedded": Statistic("compression", "Profiles and EXIF", "bytes", log=True),
    "sharpness_1": Statistic("blur", "Detail at 1 to 2 px, frame"),
    "sharpness_2": Statistic("blur", "Detail at 2 to 4 px, frame"),
    "texture_4": Statistic("magnification", "Texture at 4 to 8 px, frame"),
    "texture_8": Statistic("magnification", "Texture at 8 to 16 px, frame"),
    "mpp": Statistic("magnification", "Recorded scale", "um/px", log=True, recorded=True),
    "bytes": Statistic(CONTENT, "File", "bytes", log=True),
    "bytes_per_pixel": Statistic(CONTENT, "Bytes per pixel", log=True),
    "focus": Statistic(CONTENT, "Focus (variance of the Laplacian)", log=True),
    "brightness": Statistic(CONTENT, "Brightness (mean grey)"),
    "contrast": Statistic(CONTENT, "Contrast (standard deviation of grey)"),
    "red": Statistic(CONTENT, "Red, optical density"),
    "green": Statistic(CONTENT, "Green, optical density"),
    "blue": Statistic(CONTENT, "Blue, optical density"),
    "saturation": Statistic(CONTENT, "Saturation (largest less least channel)"),
    "background": Statistic(CONTENT, "Background (share of pixels without tissue)"),
}
IN_FILES = tuple(name for name, one in STATISTICS.items() if not one.recorded)


@dataclass(frozen=True)
class FileStatistics:
    """File statistics of images, a row each.

    Attributes:
        names: Of the statistics, keys of `STATISTICS`.
        values: `[n, len(names)]`; NaN where a file does not have it or was not read.
    """

    names: tuple[str, ...]
    values: Floats

    def of(self, *groups: str) -> "FileStatistics":
        """Those of some groups.

        Args:
            groups: Among `SHORTCUTS` and `content`.
        """
        kept = [i for i, name in enumerate(self.names) if STATISTICS[name].group in groups]
        return FileStatistics(tuple(self.names[i] for i in kept), self.values[:, kept])

    def select(self, rows: Iterable[int]) -> "FileStatistics":
        """Those of some rows."""
        return FileStatistics(self.names, self.values[np.fromiter(rows, np.intp)])

    def __getitem__(self, name: str) -> Floats:
        """One statistic of every image, `[n]`."""
        return self.values[:, self.names.index(name)]

    def features(self) -> Floats:
        """What a model takes, `[n, f]`: logarithms where a statistic asks for them."""
        logs = np.array([STATISTICS[name].log for name in self.names], bool)
        features = self.values.copy()
        features[:, logs] = np.log(np.maximum(features[:, logs], 1e-3))
        if "format" in self.names:  # a name, and no number: one column a format
            at = self.names.index("format")
            kinds = np.arange(len(FORMATS))
            own = np.where(np.isnan(features[:, [at]]), np.nan, features[:, [at]] == kinds)
            features = np.column_stack([np.delete(features, at, axis=1), own])
        return features


def read_file_statistics(rows: "Dataset", looks: "Looks | None" = None) -> FileStatistics:
    """File statistics of the images of rows.

    Args:
        rows: As `load_dataset` makes them; their column `mpp` is the recorded scale.
        looks: At these rows, if at hand; else each image is decoded.
    """
    if looks is None:
        from .looks import look_at

        looks = look_at(rows)
    values = np.full((len(rows), len(STATISTICS)), np.nan)
    names = tuple(STATISTICS)
    values[:, [names.index(name) for name in IN_FILES]] = looks.statistics
    if "mpp" in rows.column_names:
        values[:, names.index("mpp")] = np.array(column(rows, "mpp"), np.float64)
    return FileStatistics(names, values)


# -------------------------------------------------------------------------------------- measuring


def measure_file(content: bytes, picture: Image.Image) -> Floats:
    """Statistics of one file, in the order of `IN_FILES`.

    Args:
        content: Of the file.
        picture: What `open_image` makes of it, mode RGB.
    """
    grey = picture.convert("L")
    of = {
        "width": picture.width,
        "height": picture.height,
        "aspect": picture.width / picture.height,
        "bytes": len(content),
        "bytes_per_pixel": len(content) / (picture.width * picture.height),
    }
    of |= _header(content) | _frame(np.asarray(grey)) | _content(picture, grey)
    return np.array([of[name] for name in IN_FILES], np.float64)


def _header(content: bytes) -> dict[str, float]:
    """What the head of a file says of its compression."""
    none = math.nan
    of = {"quantisation": none, "quantisation_colour": none, "subsampling": none}
    with Image.open(io.BytesIO(content)) as image:
        kind = str(image.format)
        if isinstance(image, JpegImageFile):
            luminance, *colours = image.quantization.values()
            of["quantisation"] = float(np.mean(luminance))
            of["quantisation_colour"] = float(np.mean(colours[0])) if colours else none
            of["subsampling"] = float(get_sampling(image))
        embedded = sum(len(image.info.get(name) or b"") for name in ("exif", "icc_profile"))
        channels = len(image.getbands())
    at = FORMATS.index(kind) if kind in FORMATS else len(FORMATS) - 1
    return of | {"format": at, "channels": channels, "embedded": embedded}


def _frame(grey: NDArray[np.uint8]) -> dict[str, float]:
    """Blockiness, blur and texture scale of the frame of a grey image.

    Detail at l to 2l pixels is the logarithm of the mean squared difference at lag l, less that at
    lag 2l (structure functions): 0 where noise alone differs, -1.4 on a smooth slope. Contrast
    drops out of it.
    """
    width = max(round(_FRAME * min(grey.shape)), _LEAST_FRAME)
    step = max(width // _LINES, 1)
    pairs = [
        np.concatenate([lines[:width:step], lines[-width::step]]).astype(np.float32)
        for lines in (grey, grey.T)
        if lines.shape[1] > _LEAST_FRAME
    ]
    names = ("sharpness_1", "sharpness_2", "texture_4", "texture_8")
    if not pairs:
        return dict.fromkeys(("blockiness", *names), math.nan)
    if len({pair.shape for pair in pairs}) == 1:  # of a square, at once
        pairs = [np.concatenate(pairs)]
    at = [np.mean([_mean_square(p[:, n:] - p[:, :-n]) for p in pairs]) for n in (1, 2, 4, 8, 16)]
    ratios = -np.diff(np.log(np.array(at) + _FLAT))
    blocks = float(np.mean([_blockiness(pair) for pair in pairs]))
    return {"blockiness": blocks} | dict(zip(names, ratios.tolist(), strict=True))


def _mean_square(steps: NDArray[np.float32]) -> float:
    flat = steps.ravel()
    return float(flat @ flat) / len(flat)


def _blockiness(lines: NDArray[np.float32]) -> float:
    """Steps at every eighth pixel beyond those beside them, as a share of all steps.

    JPEG codes blocks of 8 x 8 pixels, and a file that was saved as JPEG before shows them still.
    """
    step = np.abs(lines[:, 1:] - lines[:, :-1]).mean(axis=0)
    excess = step[1:-1] - (step[:-2] + step[2:]) / 2
    at_edge, edges = excess[6::8].sum(), len(excess[6::8])
    beyond = at_edge / edges - (excess.sum() - at_edge) / (len(excess) - edges)
    return float(beyond / (step.mean() + 1e-3))


def _content(picture: Image.Image, grey: Image.Image) -> dict[str, float]:
    """Focus, brightness and colours of the whole picture."""
    small = picture.reduce(max(min(picture.size) // _SMALL, 1))
    channels = np.array([np.asarray(one, np.float32) for one in small.split()])
    red, green, blue = -np.log10((channels.mean((1, 2)) + 1) / 256)
    levels = np.tensordot(_GREY, channels, 1)
    least = channels.min(0)
    return {
        "focus": _focus(grey),
        "brightness": float(levels.mean()),
        "contrast": float(levels.std()),
        "red": float(red),
        "green": float(green),
        "blue": float(blue),
        "saturation": float((channels.max(0) - least).mean()),
        "background": float((least > _GLASS).mean()),
    }


def _focus(grey: Image.Image) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of at most the middle 256 px."""
    width, height = (min(side, _LARGEST) for side in grey.size)
    left, top = (grey.width - width) // 2, (grey.height - height) // 2
    if min(width, height) < 3:
        return math.nan
    middle = np.asarray(grey.crop((left, top, left + width, top + height)), np.int16)
    inside = middle[1:-1, 1:-1]
    around = middle[1:-1, 2:] + middle[1:-1, :-2] + middle[2:, 1:-1] + middle[:-2, 1:-1]
    return float(np.var(around - 4 * inside, dtype=np.float64))
