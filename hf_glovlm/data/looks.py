"""Looks: what one reading of each image's file says of it; what decoding says is kept by content.

Everything that asks the same of an image takes it from here: the hashes of its content (of a data
set's fingerprint, of stored features), whether it can be read, its size and outline, the hash of
its pixels, the perceptual hash and thumbnail by which near duplicates are known, and the statistics
of its file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image, features
from PIL import __version__ as pillow

from ..errors import GloVLMError
from ..files import digest_value
from ..progress import counting
from .columns import LOOK
from .file_statistics import IN_FILES, measure_file
from .folder import (
    ImageValue,
    column,
    decode_image,
    image_name,
    in_threads,
    open_decoded,
    open_image,
    read_content,
)
from .near_duplicates import link_near_duplicates
from .outlines import STRUCTURES, UNSEEN, UNSTATED, masks_of, outline_in

if TYPE_CHECKING:
    from datasets import Dataset

_VERSION = 3  # raise it when the same content gives something else
_ROWS = 2048  # looks are stored at least this often
_SIDE = 16  # of a thumbnail, in pixels
_OUTLINES = (None, UNSTATED, *STRUCTURES, UNSEEN)
_SEEN = np.dtype(  # what decoding says of an image, as it is stored
    [
        ("pixels", "V16"),
        ("code", "<u8"),
        ("thumbnail", "u1", (3 * _SIDE * _SIDE,)),
        ("size", "<u4", (2,)),
        ("outline", "u1"),
        ("statistics", "<f4", (len(IN_FILES),)),
    ]
)


class Store(Protocol):
    """Store of rows by content, such as `inference.FeatureCache`."""

    def known(self, encoder: str) -> set[bytes]:
        """Keys of all that is there."""

    def get(self, encoder: str, images: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """What is there of these."""

    def put(
        self, encoder: str, images: Sequence[bytes], features: NDArray[Any], name: str = ""
    ) -> None:
        """Keep a row of each."""


@dataclass(frozen=True, slots=True)
class _File:
    """Content of a file: its SHA-256 in hexadecimal digits, and its xxh3 of 16 bytes."""

    content: str
    digest: bytes

    @classmethod
    def of(cls, content: bytes) -> "_File":
        return cls(hashlib.sha256(content).hexdigest(), xxhash.xxh3_128_digest(content))


@dataclass(frozen=True, slots=True)
class _Look:
    """Look at one row: its files, and what decoding them says (a row of `_SEEN`)."""

    image: _File | None = None
    mask: _File | None = None
    seen: NDArray[Any] | None = None
    error: str | None = None

    @property
    def key(self) -> bytes:
        """Key in a store."""
        assert self.image is not None  # nothing is stored of a file that cannot be read
        both = self.image.content + (self.mask.content if self.mask is not None else "")
        return hashlib.sha256(both.encode()).digest()[:16]


class Looks:
    """Looks at the images of rows, and at their masks: one entry a row in everything here."""

    def __init__(self, rows: Sequence[_Look] = ()) -> None:
        self._rows = rows

    @property
    def errors(self) -> list[str]:
        """Why images cannot be read, a sentence for each such one."""
        return [row.error for row in self._rows if row.error]

    @property
    def decoded(self) -> bool:
        """Whether every image was decoded, now or before."""
        return all(row.seen is not None for row in self._rows)

    @property
    def readable(self) -> list[int]:
        """Rows whose image was decoded, now or before."""
        return [i for i, row in enumerate(self._rows) if row.seen is not None]

    def select(self, rows: Sequence[int]) -> "Looks":
        """Looks at some rows."""
        return Looks([self._rows[row] for row in rows])

    @property
    def contents(self) -> list[str | None]:
        """SHA-256 of each image's file in hexadecimal digits; `None` where it cannot be read."""
        return [None if row.image is None else row.image.content for row in self._rows]

    @property
    def mask_contents(self) -> list[str | None]:
        """The same of the masks; `None` without one."""
        return [None if row.mask is None else row.mask.content for row in self._rows]

    @cached_property
    def pixels(self) -> list[str | None]:
        """Hash of each image's pixels, see `hashes`; `None` where it was not decoded."""
        seen = (row.seen for row in self._rows)
        return [None if one is None else one["pixels"].tobytes().hex() for one in seen]

    @cached_property
    def statistics(self) -> NDArray[np.float64]:
        """Statistics of each image's file, see `file_statistics`: NaN where it was not decoded."""
        none = np.full(len(IN_FILES), np.nan, np.float32)
        each = [none if row.seen is None else row.seen["statistics"] for row in self._rows]
        return np.array(each, np.float64).reshape(len(each), len(IN_FILES))

    @cached_property
    def hashes(self) -> list[tuple[str, str]]:
        """Hashes by which each image is known again: of its pixels, and of its file.

        The pixels are those of `open_image` (RGB, 8 bits, upright), so a copy under another name or
        in another lossless format (PNG, TIFF, BMP, lossless WebP) is the same image. A JPEG that is
        saved again, resized or cut is not. The file's own hash knows a plain copy where another
        decoder gives other pixels. Of each, the first 32 hexadecimal digits of its SHA-256.

        Raises:
            GloVLMError: An image cannot be read.
        """
        self._check_decoded()
        known = zip(self.pixels, self.contents, strict=True)
        return [(pixels or "", (content or "")[:32]) for pixels, content in known]

    @cached_property
    def near_duplicates(self) -> list[list[int]]:
        """Rows of each cluster of near-duplicate images.

        Raises:
            GloVLMError: An image cannot be read.
        """
        seen = self._check_decoded()
        return link_near_duplicates(seen["code"].astype(np.uint64), seen["thumbnail"])

    def mark(self, rows: "Dataset") -> "Dataset":
        """The rows, with a column `LOOK` for which their files would be read again.

        It holds the digests by which features are stored, sizes and outlines. Whatever decodes a
        file later checks that it is still the one that was seen.

        Args:
            rows: Those that were looked at.

        Raises:
            GloVLMError: An image cannot be read.
        """
        from datasets import Value

        looks = [
            {
                "image": row.image and row.image.digest,
                "mask": row.mask and row.mask.digest,
                "width": int(seen["size"][0]),
                "height": int(seen["size"][1]),
                "outline": _OUTLINES[seen["outline"]],
            }
            for row, seen in zip(self._rows, self._check_decoded(), strict=True)
        ]
        digest, number, text = Value("binary"), Value("int64"), Value("string")
        types = {"image": digest, "mask": digest, "width": number, "height": number}
        if LOOK in rows.column_names:
            rows = rows.remove_columns(LOOK)
        return rows.add_column(LOOK, looks, feature=types | {"outline": text})

    def _check_decoded(self) -> NDArray[Any]:
        """What decoding said, rows of `_SEEN`; the first error where an image cannot be read."""
        if self.errors:
            raise GloVLMError(self.errors[0])
        return np.array([row.seen for row in self._rows], _SEEN)


def look_at(
    rows: "Dataset",
    *,
    decode: bool = True,
    store: Store | None = None,
    before: Looks | None = None,
) -> Looks:
    """Look at every image of rows, and at its mask: each file is read once.

    Args:
        rows: Rows as `load_dataset` makes them.
        decode: Whether images are decoded; else only their content is known.
        store: Keeps what decoding says by content: what is there is not decoded again.
        before: Looks at the same rows without decoding: what the store knows of them is not even
            read again.

    Returns:
        The looks. What cannot be read is stated in `errors`; nothing is raised for it.
    """
    images, masks = column(rows, "image"), masks_of(rows)
    looks = list(before._rows if before is not None else [_Look()] * len(images))
    key = f"looks-{digest_value([_VERSION, pillow, features.version('jpg')])}"
    known = store.known(key) if store is not None and decode else set()

    def see(among: Sequence[int], skipped: set[bytes], step: int) -> list[int]:
        """Look at some rows, without decoding those whose key is skipped; the decoded ones."""

        def look_at_row(row: int) -> _Look:
            look = _look_at(images[row], masks[row], looks[row], decode, skipped)
            count.advance(step)
            return look

        for row, look in zip(among, in_threads(look_at_row, among), strict=True):
            looks[row] = look
        return [row for row in among if looks[row].seen is not None]

    with counting("images read", len(looks)) as count:
        for start in range(0, len(looks), _ROWS):
            part = range(start, min(start + _ROWS, len(looks)))
            fresh = see(part, known, 1)
            if store is None or not decode:
                continue
            rest = [row for row in part if looks[row].seen is None and not looks[row].error]
            stored = store.get(key, [looks[row].key for row in rest]) if rest else {}
            for row in rest:
                one = stored.get(looks[row].key)
                if one is not None and one.dtype == np.uint8 and len(one) == _SEEN.itemsize:
                    looks[row] = replace(looks[row], seen=one.view(_SEEN)[0])
            # Damaged, or removed by another process since.
            fresh += see([row for row in rest if looks[row].seen is None], set(), 0)
            new = {looks[row].key: looks[row].seen for row in fresh}
            if new:
                arrays = np.array([*new.values()], _SEEN).view(np.uint8).reshape(len(new), -1)
                store.put(key, [*new], arrays, "what images look like")
    return Looks(looks)


def _look_at(
    image: Mapping[str, Any],
    mask: Mapping[str, Any] | None,
    before: _Look,
    decode: bool,
    skipped: set[bytes],
) -> _Look:
    """Look at one row: read its files unless that was done, decode them where it is asked for."""
    if before.error or before.seen is not None:
        return before
    try:
        look = before
        if before.image is None:
            image, of_image = _read(image)
            mask, of_mask = (None, None) if mask is None else _read(mask)
            look = _Look(of_image, of_mask)
        if not decode or look.key in skipped:
            return look
        if before.image is not None:
            image = read_again(image, before.image.digest)
        if before.mask is not None and mask is not None:
            mask = read_again(mask, before.mask.digest)
        return replace(look, seen=_decode(image, mask))
    except GloVLMError as error:
        return _Look(error=str(error))


def _decode(value: Mapping[str, Any], mask: ImageValue | None) -> NDArray[Any]:
    """What decoding an image and its mask says: a row of `_SEEN`."""
    image, name = decode_image(value), image_name(value)
    picture = open_decoded(image, name)
    outline = outline_in(image, name, mask)
    pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()[:16]
    thumbnail = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)).ravel()
    seen: NDArray[Any] = np.zeros((), _SEEN)
    seen["pixels"], seen["code"], seen["thumbnail"] = pixels, _perceptual_hash(picture), thumbnail
    seen["size"], seen["outline"] = picture.size, _OUTLINES.index(outline)
    seen["statistics"] = measure_file(read_content(value), picture)
    return seen


def _perceptual_hash(picture: Image.Image) -> np.uint64:
    """Signs of the low frequencies of a picture's cosine transform, 64 bits."""
    small = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    low = (_COSINES @ np.asarray(small, dtype=np.float64) @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])  # without the mean grey
    code: np.uint64 = np.packbits(bits).view(np.uint64)[0]
    return code


# The 8 lowest frequencies of the discrete cosine transform (DCT-II) of 32 samples.
_COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))


# ------------------------------------------------------------------------------ one file at a time


def content_digest(value: Mapping[str, Any]) -> bytes:
    """Digest of a file's content by which its features are stored, xxh3 of 16 bytes.

    Raises:
        GloVLMError: The file cannot be read.
    """
    return xxhash.xxh3_128_digest(_content(value))


def join_digests(image: bytes, mask: bytes | None) -> bytes:
    """Digest of an image with its mask, or of the image alone."""
    return image if mask is None else xxhash.xxh3_128_digest(image + mask)


def read_again(value: Mapping[str, Any], digest: bytes) -> dict[str, Any]:
    """An image's file with its content, which must be what was seen before.

    Args:
        value: `{"bytes", "path"}`.
        digest: Of its content then, see `content_digest`.

    Raises:
        GloVLMError: The file has changed, or cannot be read any more.
    """
    content = _content(value)
    if xxhash.xxh3_128_digest(content) != digest:
        raise GloVLMError(
            f"{image_name(value)} has changed since this command first read it, so nothing is "
            "computed of it: leave the images alone while a command runs, and run it again."
        )
    return {"bytes": content, "path": value["path"]}


def _content(value: Mapping[str, Any]) -> bytes:
    try:
        return read_content(value)
    except OSError:
        open_image(value)  # raises the error that describes it
        raise


def _read(value: Mapping[str, Any]) -> tuple[dict[str, Any], _File]:
    """A file with its content, and what is known by that."""
    try:
        content = read_content(value)
    except OSError as error:
        raise GloVLMError(f"{image_name(value)} cannot be read ({error.strerror}).") from None
    return {"bytes": content, "path": value["path"]}, _File.of(content)
