"""OME-XML: what the metadata of an OME-TIFF say about each of its pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ...data.folder import positive

_RGB = ("red", "green", "blue")


@dataclass(frozen=True)
class OmeImage:
    """Image element of OME-XML.

    Attributes:
        name: Its name; may be empty.
        page: Number of its first page in its file.
        file: Name of that file when it was written; may be empty.
        sizes: Pixel size along x and y in `units`; `None` is not stated.
        units: Spelled as in the file.
        magnification: Of the objective, where one alone is described.
        channels: Names of the channels; empty names where they have none.
        colours: Whether the channels are the three colours of one brightfield picture, and in what
            order red, green and blue stand among them; `None` for anything else.
    """

    name: str
    page: int
    file: str
    sizes: tuple[float | None, float | None]
    units: tuple[str, str]
    magnification: float | None
    channels: tuple[str, ...]
    colours: tuple[int, int, int] | None


def read_ome(text: str) -> list[OmeImage]:
    """Images of OME-XML; none where it is damaged."""
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return []
    lenses = {
        lens.get("ID", ""): lens.get("NominalMagnification")
        for lens in root.iter()
        if _tag(lens) == "Objective"
    }
    return [
        _read_image(image, pixels, lenses)
        for image in root
        if _tag(image) == "Image"
        for pixels in list(_children(image, "Pixels"))[:1]
    ]


def _read_image(image: Any, pixels: Any, lenses: dict[str, str | None]) -> OmeImage:
    first = next(_children(pixels, "TiffData"), None)
    page = (first.get("IFD") if first is not None else None) or "0"
    uuid = next(_children(first, "UUID"), None) if first is not None else None
    used = (e for e in image if _tag(e) in ("ObjectiveSettings", "ObjectiveRef"))
    lens = next((lenses.get(element.get("ID", "")) for element in used), None)
    if lens is None and len(lenses) == 1:
        lens = next(iter(lenses.values()))
    channels = list(_children(pixels, "Channel"))
    sizes = [positive(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    units = [pixels.get(f"PhysicalSize{axis}Unit") or "um" for axis in "XY"]
    return OmeImage(
        name=(image.get("Name") or "").strip(),
        page=int(page) if page.isdecimal() else 0,
        file=(uuid.get("FileName") or "") if uuid is not None else "",
        sizes=(sizes[0], sizes[1]),
        units=(units[0], units[1]),
        magnification=positive(lens),
        channels=tuple((channel.get("Name") or "").strip() for channel in channels),
        colours=_find_colours(channels),
    )


def _find_colours(channels: list[Any]) -> tuple[int, int, int] | None:
    """Order of red, green and blue among the channels, where they are those of one picture.

    Three planes of one sample are what fluorescence looks like, too. Its dyes are shown in red,
    green and blue as well, and some programs write these colours for channels that state nothing.
    So colours alone say nothing. What does: one channel of three samples, as the format has it for
    RGB; the names of the three colours; or colours of channels that are all said to be lit through
    the slide. A dye or a wavelength makes it fluorescence, whatever the names are.
    """
    if any(channel.get(key) for channel in channels for key in _OF_DYES):
        return None
    samples = [channel.get("SamplesPerPixel") or "1" for channel in channels]
    if samples == ["3"]:
        return 0, 1, 2
    if samples != ["1"] * 3:
        return None
    names = [(channel.get("Name") or "").strip().casefold() for channel in channels]
    if all(_is_brightfield(channel) for channel in channels) and not any(names):
        names = [_COLOURS.get(channel.get("Color") or "", "") for channel in channels]
    for known in (_RGB, tuple(name[0] for name in _RGB)):
        if sorted(names) == sorted(known):
            return names.index(known[0]), names.index(known[1]), names.index(known[2])
    return None


def _is_brightfield(channel: Any) -> bool:
    lit = channel.get("ContrastMethod"), channel.get("IlluminationType")
    return lit[0] == "Brightfield" or lit[1] == "Transmitted"


_OF_DYES = ("Fluor", "EmissionWavelength", "ExcitationWavelength")
_COLOURS = {  # RGBA as one signed number of 32 bits
    str(int.from_bytes(bytes(rgba), "big", signed=True)): name
    for name, rgba in zip(_RGB, ((255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)), strict=True)
}


def _children(element: Any, tag: str) -> Iterator[Any]:
    return (child for child in element if _tag(child) == tag)


def _tag(element: Any) -> str:
    """Name of an element without its namespace."""
    return str(element.tag).rpartition("}")[2]
