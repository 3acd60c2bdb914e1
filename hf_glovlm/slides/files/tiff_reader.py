"""TIFF reader: only the tiles or strips under the requested part are decoded."""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...data.folder import MAX_PIXELS
from ...errors import GloVLMError
from .pixel_size import read_tiff_pixel_size
from .tiff_pictures import TiffPicture, TiffPictures

BLOCK = 2048  # side of the largest piece that is decoded at once where smaller ones are possible
CACHE_BYTES = 32 * 2**20  # decoded tiles or strips that are kept, as much as OpenSlide keeps
_JPEG_TABLES = (6, 7, 34892, 33007)  # compressions whose tables stand in the page


class TiffReader:
    """One picture of a TIFF, by tifffile; see `readers.Reader` for what is public."""

    bounds: tuple[int, int] | None = None

    def __init__(self, tiff: TiffPictures, picture: TiffPicture) -> None:
        """Take over the open file.

        Raises:
            GloVLMError: It is damaged, or its pieces are too large.
        """
        self._path = tiff.path
        self._tiff = tiff
        self._levels = picture.levels
        self._keys = [pages[0].keyframe for pages in picture.levels]
        self.levels = [(int(k.imagewidth), int(k.imagelength)) for k in self._keys]
        self._mapped = list(map(self._must_be_mapped, self._levels, self._keys))
        self.downsamples = [_find_downsample(self.levels[0], size) for size in self.levels]
        self.name = f"tifffile ({tiff.kind})"
        size = read_tiff_pixel_size(picture.levels[0][0].aspage(), picture.image)
        self.mpp, self.magnification = size.mpp, size.magnification
        self.notes = list(size.notes)
        self._cache: OrderedDict[tuple[int, int, int], NDArray[np.uint8] | None] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Part of a level, wholly inside of it, as RGB."""
        pages, key = self._levels[level], self._keys[level]
        if len(pages) == 1 and key.planarconfig == 1:
            return _rgb(self._read_plane(level, 0, 0, key.samplesperpixel, x, y, width, height))
        # One plane a colour, in pages of their own or one behind the other in the same page.
        places = [(i, 0) for i in range(3)]
        if len(pages) == 1:
            places = [(0, i * count_pieces(key)) for i in range(key.samplesperpixel)]
        planes = [self._read_plane(level, *at, 1, x, y, width, height) for at in places]
        return _rgb(np.concatenate(planes, axis=2))

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()

    def _must_be_mapped(self, pages: list[Any], key: Any) -> bool:
        """Whether a level is one piece so large that it is read through the file system."""
        columns, rows = segment_size(key)
        if min(columns, rows, key.imagewidth, key.imagelength) < 1:
            raise GloVLMError(f"{self._path} is a damaged TIFF: copy or export it again.")
        planes = key.samplesperpixel if key.planarconfig == 2 else 1
        pieces = count_pieces(key) * planes
        if any(min(len(p.dataoffsets), len(p.databytecounts)) < pieces for p in pages):
            raise GloVLMError(
                f"{self._path} is a damaged TIFF, which lists fewer tiles or strips than the "
                f"{pieces:,} of its size: copy or export it again."
            )
        mapped = not key.is_tiled and columns * rows > BLOCK**2 and bool(key.is_memmappable)
        if not mapped and columns * rows > MAX_PIXELS:
            raise GloVLMError(
                f"{self._path} is compressed in one piece of {columns * rows:,} pixels (at most "
                f"{MAX_PIXELS:,} are decoded at once): convert it to a tiled, pyramidal TIFF."
            )
        return mapped

    def _read_plane(
        self, level: int, plane: int, first: int, samples: int, x: int, y: int, w: int, h: int
    ) -> NDArray[np.uint8]:
        """Part `[h, w, samples]` of a plane whose pieces are numbered from `first` in its page."""
        key = self._keys[level]
        if self._mapped[level]:
            shape = (key.imagelength, key.imagewidth, samples)
            offset = self._levels[level][plane].dataoffsets[first]
            rows = np.memmap(self._path, np.uint8, "r", offset, shape)[y : y + h]
            return np.array(rows[:, x : x + w])
        part = np.full((h, w, samples), 255, np.uint8)
        columns, rows_ = segment_size(key)
        across = -(-key.imagewidth // columns)
        for row in range(y // rows_, (y + h - 1) // rows_ + 1):
            for column in range(x // columns, (x + w - 1) // columns + 1):
                segment = self._segment(level, plane, first + row * across + column)
                if segment is None:  # never written
                    continue
                left, top = column * columns - x, row * rows_ - y
                height, width = segment.shape[:2]
                height, width = min(height, h - top), min(width, w - left)
                part[max(0, top) : top + height, max(0, left) : left + width] = segment[
                    max(0, -top) : height, max(0, -left) : width
                ]
        return part

    def _segment(self, level: int, plane: int, index: int) -> NDArray[np.uint8] | None:
        """One decoded tile or strip `[h, w, samples]`, from the cache if it was used lately."""
        place = level, plane, index
        page, key = self._levels[level][plane], self._keys[level]
        with self._lock:  # of the place in the file and of the cache; pieces are decoded beside it
            if place in self._cache:
                self._cache.move_to_end(place)
                return self._cache[place]
            count = page.databytecounts[index]
            content = b""
            if count:
                file = self._tiff.file.filehandle
                file.seek(page.dataoffsets[index])
                content = file.read(count)
        segment = None
        if count:
            tables = (
                {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
                if key.compression in _JPEG_TABLES
                else {}
            )
            decoded = key.decode(content, index, **tables)[0]
            segment = None if decoded is None else decoded[0]
        with self._lock:
            if place in self._cache:  # by another thread meanwhile
                return self._cache[place]
            self._cache[place] = segment
            self._cached += 0 if segment is None else segment.nbytes
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._cached -= 0 if old is None else old.nbytes
        return segment


def segment_size(key: Any) -> tuple[int, int]:
    """Width and height of a level's tiles or strips."""
    if key.is_tiled:
        return int(key.tilewidth), int(key.tilelength)
    return int(key.imagewidth), int(min(key.rowsperstrip, key.imagelength))


def count_pieces(key: Any) -> int:
    """Number of tiles or strips of a level, or of each of its planes."""
    columns, rows = segment_size(key)
    return -(-int(key.imagewidth) // columns) * -(-int(key.imagelength) // rows)


def _find_downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Pixels of level 0 per pixel of a level: a whole number where its size is that, rounded.

    A level of half the size of 221 pixels has 110 or 111, each the mean of two: the ratio of the
    sizes would put its last pixels where there are none.
    """
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = max(1, round(ratio))
    rounded = all(a // whole <= b <= -(-a // whole) for a, b in zip(full, size, strict=True))
    return float(whole) if rounded else ratio


def _rgb(pixels: NDArray[np.uint8]) -> Image.Image:
    """RGB, or RGBA over white."""
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    part = Image.fromarray(pixels)
    image = Image.new("RGB", part.size, "white")
    image.paste(part, mask=part.getchannel("A"))
    return image
