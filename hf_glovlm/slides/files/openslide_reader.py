"""OpenSlide reader: the formats of scanners, with the corner of the part that was scanned."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import GloVLMError
from .pixel_size import PixelSize, believed

_FORMATS = {  # as their makers call them, by OpenSlide's name
    "aperio": "Aperio SVS",
    "dicom": "DICOM",
    "generic-tiff": "TIFF",
    "hamamatsu": "Hamamatsu NDPI",
    "leica": "Leica SCN",
    "mirax": "3DHISTECH MRXS",
    "philips-tiff": "Philips TIFF",
    "sakura": "Sakura",
    "trestle": "Trestle",
    "ventana": "Ventana BIF",
    "zeiss": "Zeiss CZI",
}


class OpenSlideReader:
    """A slide by OpenSlide; its associated images are never read. See `readers.Reader`."""

    def __init__(self, openslide: Any, path: Path, vendor: str) -> None:
        """Open the file.

        Raises:
            GloVLMError: Its own metadata say that it is fluorescence.
            openslide.OpenSlideError: It cannot be opened.
        """
        self._reading = 0
        self._quiet = threading.Condition()
        self._slide = openslide.OpenSlide(path)
        about = self._slide.properties
        if "FLUORESCENCE" in about.get("mirax.GENERAL.SLIDE_TYPE", "").upper():
            self._slide.close()
            raise GloVLMError(
                f"{path} holds fluorescence; brightfield slides in RGB are read: export it as RGB."
            )
        self.name = f"openslide ({vendor})"
        self.levels = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
        self.downsamples = [float(d) for d in self._slide.level_downsamples]
        self.bounds = _read_bounds(about)
        size = self._read_pixel_size(about)
        self.mpp, self.magnification = size.mpp, size.magnification
        self.notes = list(size.notes)
        regions = sum(
            name.startswith("openslide.region[") and name.endswith("].x") for name in about
        )
        if regions > 1:
            self.notes.append(
                f"holds {regions} scanned regions, which lie side by side on one picture "
                f"({describe_format(vendor)}): all are read, and --scene chooses none"
            )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Part of a level, wholly inside of it, as RGB."""
        at = round(x * self.downsamples[level]), round(y * self.downsamples[level])
        with self._in_use():
            part = self._slide.read_region(at, level, (width, height))
        image = Image.new("RGB", part.size, "white")
        image.paste(part, mask=part.getchannel("A"))  # what was not scanned is transparent
        return image

    def close(self) -> None:
        """Close the file, when no thread reads: OpenSlide aborts the process otherwise.

        A batch is read ahead in other threads, and Ctrl-C closes the slide wherever they are.
        """
        with self._quiet:
            self._quiet.wait_for(lambda: self._reading == 0)
            self._slide.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the file open; OpenSlide itself lets several threads read at a time."""
        with self._quiet:
            self._reading += 1
        try:
            yield
        finally:
            with self._quiet:
                self._reading -= 1
                self._quiet.notify_all()

    def _read_pixel_size(self, about: Any) -> PixelSize:
        x, y = (about.get(f"openslide.mpp-{axis}") for axis in "xy")
        return believed(x, y, about.get("openslide.objective-power"))


def describe_format(vendor: str) -> str:
    """Name of a format as its scanner's maker has it."""
    return _FORMATS.get(vendor, vendor)


def import_openslide() -> Any:
    """OpenSlide, or `None`: tifffile alone reads much already."""
    try:
        import openslide
    except ImportError:
        return None
    return openslide


def _read_bounds(about: Any) -> tuple[int, int] | None:
    """Corner of the scanned part; `None` where none is stated, or it is level 0's own."""
    corner = [about.get(f"openslide.bounds-{axis}", "") for axis in "xy"]
    if not all(text.isdecimal() for text in corner):
        return None
    x, y = map(int, corner)
    return (x, y) if x or y else None
