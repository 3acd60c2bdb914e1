"""Pixel size: micrometres per pixel out of a file's metadata, in whatever unit they are spelled.

What no slide can have is not believed and said: a size of 0.00025 was meant in millimetres, one of
252 in nanometres, and 72 dpi describes paper.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...data.folder import positive
from ...data.listing import short
from ...errors import GloVLMError
from .ome import OmeImage

LIMITS = (0.02, 20.0)  # micrometres per pixel of level 0; 500x is finer than any scanner
_LENGTHS = {  # micrometres, by the singular in small letters; both letters mu are one
    "\N{GREEK SMALL LETTER MU}m": 1.0, "um": 1.0, "micron": 1.0, "micrometer": 1.0,
    "micrometre": 1.0, "pm": 1e-6, "picometer": 1e-6, "picometre": 1e-6,
    "\N{LATIN SMALL LETTER A WITH RING ABOVE}": 1e-4, "angstrom": 1e-4, "nm": 1e-3,
    "nanometer": 1e-3, "nanometre": 1e-3, "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3,
    "cm": 1e4, "centimeter": 1e4, "centimetre": 1e4, "dm": 1e5, "m": 1e6, "meter": 1e6,
    "metre": 1e6, "in": 25400.0, "inch": 25400.0, "inches": 25400.0, '"': 25400.0,
}  # fmt: skip
_TAG_UNITS = {2: "in", 3: "cm", 4: "mm", 5: "um"}  # of the tag ResolutionUnit; 4 and 5 as in EXIF
_NUMBER = r"[\"'>\s:=]*([\d.,]+(?:[eE][+-]?\d+)?)"
_VALUE = r"</name>\s*<value[^>]*>([^<]+)<"  # of a property, as libvips keeps those of OpenSlide
_SIZES = (  # of both axes, or the axis in braces
    r"\bmpp\b" + _NUMBER,
    r"<PixelSizeMicrons>([^<]+)<",
    r"openslide\.mpp-{axis}" + _VALUE,
    r"openslide\.mpp-{axis}" + _NUMBER,
)
_LENSES = (
    r"\bAppMag" + _NUMBER,
    r"<Objective>\s*([\d.]+)\s*x?\s*</Objective>",
    r"openslide\.objective-power" + _VALUE,
)


@dataclass(frozen=True)
class PixelSize:
    """Pixel size as a file states it.

    Attributes:
        mpp: Micrometres per pixel along x and y; `None` where none is stated or can be believed.
        magnification: Of the objective; `None` is unknown.
        notes: Sentences on what was not believed.
    """

    mpp: tuple[float, float] | None = None
    magnification: float | None = None
    notes: tuple[str, ...] = ()


def micrometres(unit: str) -> float | None:
    """Micrometres of a unit of length in any spelling; `None` for pixels and what is no length."""
    name = unicodedata.normalize("NFKC", unit).strip().rstrip(".").casefold()
    return _LENGTHS.get(name) or _LENGTHS.get(name.removesuffix("s"))


def check_given(mpp: float | None) -> None:
    """Refuse a size that a person gave and no slide has.

    Raises:
        GloVLMError: It lies outside of `LIMITS`.
    """
    if mpp is not None and not LIMITS[0] <= mpp <= LIMITS[1]:
        raise GloVLMError(
            f"Expected a positive number of micrometres per pixel, {_RANGE}, found {mpp:g}; "
            "250 nanometres are 0.25."
        )


def believed(
    x: Any, y: Any, magnification: Any = None, *, source: str = "the file states"
) -> PixelSize:
    """Pixel size within what slides can have.

    Args:
        x: Micrometres per pixel along x, a number or its text; `None` where none is stated.
        y: Along y.
        magnification: Of the objective.
        source: Who states it, with its verb, as notes name it.
    """
    notes = []
    size, lens = (positive(x), positive(y)), positive(magnification)
    mpp = (size[0], size[1]) if size[0] and size[1] else None
    if mpp and not all(LIMITS[0] <= value <= LIMITS[1] for value in mpp):
        notes.append(f"{source} {mpp[0]:.4g} micrometres per pixel, which no slide has ({_RANGE})")
        mpp = None
    if lens and not LIMITS[0] <= 10 / lens <= LIMITS[1]:
        notes.append(f"the file states a magnification of {lens:g}x, which no objective has")
        lens = None
    return PixelSize(mpp, lens, tuple(notes))


def read_tiff_pixel_size(page: Any, image: OmeImage | None) -> PixelSize:
    """Pixel size by the first of a TIFF's metadata that can be believed.

    Args:
        page: The page of the chosen picture's level 0, with its tags, as tifffile has it.
        image: What the OME-XML says of the same picture.
    """
    text = str(page.description or "")
    lens = _first(_LENSES, text) or (image and image.magnification)
    notes: list[str] = []
    mpp = None
    for size in _stated(page, text, image):
        notes += size.notes
        if mpp := size.mpp:
            break
    rest = believed(None, None, lens)
    return PixelSize(mpp, rest.magnification, (*notes, *rest.notes))


def _stated(page: Any, text: str, image: OmeImage | None) -> Iterator[PixelSize]:
    """Every pixel size of a TIFF: OME-XML, Aperio's and QPTIFF's descriptions, ImageJ, the tags."""
    if image is not None and any(image.sizes):
        factors = [micrometres(unit) for unit in image.units]
        named = [unit for unit, factor in zip(image.units, factors, strict=True) if factor is None]
        if named and named[0].casefold() not in ("pixel", "pixels", "px", "reference frame"):
            yield PixelSize(
                notes=(f"the unit '{short(named[0], 40)}' of the pixel size is no length",)
            )
        elif not named:
            x, y = (s and s * (f or 0) for s, f in zip(image.sizes, factors, strict=True))
            yield believed(x or y, y or x)
    yield believed(*(_first([p.replace("{axis}", axis) for p in _SIZES], text) for axis in "xy"))
    per_unit = [_ratio(page.tags.valueof(f"{axis}Resolution")) for axis in "XY"]
    code = page.tags.valueof("ResolutionUnit", 2)
    imagej = re.search(r"^unit=(.+)$", text, re.MULTILINE) if text.startswith("ImageJ=") else None
    if imagej:
        unit = imagej.group(1).replace("\\u00B5", "\N{MICRO SIGN}")
        source = "the file states"
    else:
        unit = _TAG_UNITS.get(int(code)) if isinstance(code, int) else None
        source = "the TIFF resolution means"
    factor = micrometres(unit) if unit else None
    x, y = (factor / ratio if factor and ratio else None for ratio in per_unit)
    if x and y and not imagej and max(x, y) > LIMITS[1]:
        dpi = f"{25400 / x:.4g} dpi"
        yield PixelSize(
            notes=(f"the TIFF resolution of {dpi} is a default for printing, not a scale",)
        )
        return
    yield believed(x, y, source=source)


_RANGE = f"{LIMITS[0]:g} to {LIMITS[1]:g}"


def _first(patterns: Any, text: str) -> str | None:
    """What the first of several patterns finds, with a decimal point."""
    for pattern in patterns:
        if match := re.search(pattern, text, re.IGNORECASE):
            number: str = match.group(1).strip()
            return number.replace(",", ".") if number.count(",") == 1 else number
    return None


def _ratio(value: Any) -> float | None:
    """Rational of a TIFF tag."""
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return positive(value[0] / value[1])
    return positive(value)
