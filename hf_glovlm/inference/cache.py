"""Feature cache: pooled vectors of frozen towers, kept between runs or in memory.

Beside them lies what decoding said of the images (see `data/looks.py`), under a key of its own.
They come from patients' images; their folder is in `FeatureCache`.
"""

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import GloVLMError
from ..files import replacing, sweep

SMALL, MOST_SMALL = 2**22, 16  # bytes of a small shard; above so many, an encoder's are joined
DAY = 86_400.0  # seconds after which a fresh file is one of a process that was killed

logger = logging.getLogger("hf_glovlm")


@dataclass(frozen=True)
class CacheEntry:
    """Cache entry: one encoder's features.

    Args:
        key: Folder name; see `frozen.encoder_key`.
        name: Name of the encoder, for display.
        images: Number of stored vectors.
        size: Bytes on disk.
        created: Seconds since the epoch.
        last_used: Seconds since the epoch.
    """

    key: str
    name: str
    images: int
    size: int
    created: float
    last_used: float


class FeatureCache:
    """Feature cache on disk: one folder per encoder, safetensors shards that only grow.

    Each shard holds `features` float32 `[n, width]`, `keys` (16 bytes an image) and a checksum. It
    is written to a temporary file and renamed, so any number of processes may share the cache; a
    damaged shard is reported, removed and computed again. The features come from patients' images:
    treat the folder as you treat those (it is made readable for its owner only).

    Args:
        folder: Location; by default the environment variable `GLOVLM_CACHE`, else
            `~/.cache/glovlm/features`.
        max_bytes: Above this size the encoders that were not used for longest are removed.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 2 * 2**30) -> None:
        place = folder or os.environ.get("GLOVLM_CACHE") or "~/.cache/glovlm/features"
        self.folder = Path(place).expanduser()
        self.max_bytes = max_bytes

    def known(self, encoder: str) -> set[bytes]:
        """Keys of the images whose features are there.

        Args:
            encoder: Key of the encoder.
        """
        return {key for shard in self._shards(encoder) for key in _read_keys(shard)}

    def get(self, encoder: str, images: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Look up cached features.

        Args:
            encoder: Key of the encoder.
            images: Keys of images, 16 bytes each.

        Returns:
            Vector `[width]` of each image that is there.
        """
        missing, vectors = set(images), dict[bytes, NDArray[Any]]()
        read = set[Path]()
        # Until nothing new is there: another process may have joined shards meanwhile.
        while missing and (shards := [s for s in self._shards(encoder) if s not in read]):
            for shard in shards:
                read.add(shard)
                vectors.update(_read_shard(shard, missing) if missing else ())
                missing.difference_update(vectors)
        if vectors:
            self._touch(encoder)
        return vectors

    def put(
        self, encoder: str, images: Sequence[bytes], features: NDArray[Any], name: str = ""
    ) -> None:
        """Store features `[n, width]` of images; a full or read-only disk is only a warning.

        Args:
            encoder: Key of the encoder.
            images: Keys of the `n` images, 16 bytes each.
            features: Finite float32 `[n, width]`, or bytes (uint8) of any meaning.
            name: Name of the encoder, for display.
        """
        keys = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), 16)
        if features.dtype != np.uint8:
            features = np.asarray(features, np.float32)
        features = np.ascontiguousarray(features)
        folder = self.folder / encoder
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder / "about.json"
            if not about.is_file():
                with replacing(about, mode=0o700) as fresh:
                    fresh.write_text(json.dumps({"name": name, "created": time.time()}), "utf-8")
            shard = _write_shard(folder, keys, features)
            self._touch(encoder)
            self._evict(self._join(encoder) or shard)
            sweep(self.folder, age=DAY)
        except OSError as error:
            logger.warning(
                "Features cannot be cached in %s (%s); going on without. Set GLOVLM_CACHE to a "
                "folder that can be written.",
                self.folder,
                error,
            )

    def entries(self) -> list[CacheEntry]:
        """Entries of the encoders in the cache, the last used first."""
        entries = []
        for used, folder in self._encoders():
            try:
                about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
                entries.append(
                    CacheEntry(
                        key=folder.name,
                        name=str(about["name"]),
                        images=sum(map(_count_rows, self._shards(folder.name))),
                        size=_size(folder),
                        created=float(about["created"]),
                        last_used=used,
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed by another process, or not ours
        return entries[::-1]

    def clear(self, encoder: str | None = None) -> int:
        """Remove one encoder's features, or all.

        Args:
            encoder: Its key (or an unambiguous beginning); all encoders when not given.

        Returns:
            Bytes freed.

        Raises:
            GloVLMError: No encoder or more than one has a key that begins so.
        """
        folders = [folder for _, folder in self._encoders()]
        if encoder is not None:
            exact = [f for f in folders if f.name == encoder]
            folders = exact or [f for f in folders if f.name.startswith(encoder)]
            if len(folders) != 1:
                raise GloVLMError(
                    f"Expected the key of one encoder in {self.folder}, found {len(folders)} that "
                    f"begin with '{encoder}'; `glovlm cache` lists them."
                )
        freed = sum(map(_size, folders))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _shards(self, encoder: str) -> list[Path]:
        return sorted((self.folder / encoder).glob("*.safetensors"))

    def _encoders(self) -> list[tuple[float, Path]]:
        """Folders of the encoders with their time of last use, oldest first."""
        folders = []
        for about in self.folder.glob("*/about.json"):
            with suppress(OSError):  # removed meanwhile
                folders.append((about.stat().st_mtime, about.parent))
        return sorted(folders)

    def _join(self, encoder: str) -> Path | None:
        """Join an encoder's small shards into one, if there are many; that one.

        Another process that joins the same ones only writes the same rows again.
        """
        sizes = {shard: _bytes(shard) for shard in self._shards(encoder)}
        small = [shard for shard, size in sizes.items() if size < SMALL]
        if len(small) <= MOST_SMALL:
            return None
        rows = {key: vector for shard in small for key, vector in _read_shard(shard)}
        if len({(vector.shape, vector.dtype) for vector in rows.values()}) != 1:
            return None
        keys = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 16)
        joined = _write_shard(self.folder / encoder, keys, np.stack([*rows.values()]))
        for shard in small:
            with suppress(OSError):
                shard.unlink()
        return joined

    def _touch(self, encoder: str) -> None:
        """Set an encoder's time of last use (that of its `about.json`) to now."""
        with suppress(OSError):
            os.utime(self.folder / encoder / "about.json")

    def _evict(self, newest: Path) -> None:
        """Evict whole encoders, then older shards of the current one, until the rest fits."""
        sizes = {folder: _size(folder) for _, folder in self._encoders()}
        excess = sum(sizes.values()) - self.max_bytes
        for folder, size in sizes.items():
            if excess > 0 and folder != newest.parent:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size
        for shard in sorted(newest.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime):
            if excess > 0 and shard != newest:
                excess -= shard.stat().st_size
                shard.unlink(missing_ok=True)


def _write_shard(folder: Path, keys: NDArray[np.uint8], features: NDArray[Any]) -> Path:
    """Write a shard of its own name."""
    shard = folder / f"{uuid.uuid4().hex}.safetensors"
    metadata = {"checksum": _checksum(keys, features)}
    # Another process may have evicted the folder meanwhile; it is made again as private.
    with replacing(shard, mode=0o700) as fresh:
        save_file({"features": features, "keys": keys}, fresh, metadata)
    return shard


def _read_shard(
    shard: Path, requested: set[bytes] | None = None
) -> list[tuple[bytes, NDArray[Any]]]:
    """Read the requested vectors of a shard, or all; none of a damaged one."""
    vectors = list[tuple[bytes, NDArray[Any]]]()
    with _removing_damage(shard), safe_open(shard, framework="numpy") as file:
        keys = np.ascontiguousarray(file.get_tensor("keys"))
        rows = {bytes(key): row for row, key in enumerate(keys)}
        chosen = rows if requested is None else requested.intersection(rows)
        hits = sorted((rows[key], key) for key in chosen)
        if not hits:
            return vectors
        features = np.ascontiguousarray(file.get_tensor("features"))
        if (file.metadata() or {}).get("checksum") != _checksum(keys, features):
            raise ValueError("its checksum does not match")
        # Copies, so that one row does not keep a whole shard in memory.
        vectors += [(key, features[row].copy()) for row, key in hits]
    return vectors


def _read_keys(shard: Path) -> list[bytes]:
    """Keys of a shard, unchecked; none of one that cannot be read."""
    keys = list[bytes]()
    with _removing_damage(shard), safe_open(shard, framework="numpy") as file:
        keys += [bytes(key) for key in np.ascontiguousarray(file.get_tensor("keys"))]
    return keys


@contextmanager
def _removing_damage(shard: Path) -> Iterator[None]:
    """Report and remove a shard that cannot be read; one that is gone is nothing to report."""
    try:
        yield
    except FileNotFoundError:
        pass  # removed by another process since it was listed
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning(
            "A shard of the feature cache is damaged (%s: %s); its images are computed again.",
            shard,
            error,
        )
        with suppress(OSError):
            shard.unlink()


def _count_rows(shard: Path) -> int:
    try:
        with safe_open(shard, framework="numpy") as file:
            return int(file.get_slice("keys").get_shape()[0])
    except (SafetensorError, OSError):
        return 0


def _checksum(keys: NDArray[np.uint8], features: NDArray[Any]) -> str:
    digest = xxhash.xxh3_64(repr((keys.shape, features.shape, features.dtype)).encode())
    digest.update(keys.data)
    digest.update(features.data)
    return str(digest.hexdigest())


def _size(folder: Path) -> int:
    return sum(map(_bytes, folder.rglob("*")))


def _bytes(path: Path) -> int:
    with suppress(OSError):  # removed meanwhile
        return path.stat().st_size
    return 0


class MemoryCache(FeatureCache):
    """Feature cache in memory, for one task or for tasks on the same images.

    Args:
        behind: Where it looks up what it lacks and stores what is new; nowhere if not given.
        max_bytes: Above this size what lies behind it, too, is let go.
    """

    def __init__(self, behind: FeatureCache | None = None, max_bytes: int = 2**29) -> None:
        self._vectors: dict[tuple[str, bytes], NDArray[Any]] = {}
        self._behind = behind
        self.max_bytes = max_bytes

    def known(self, encoder: str) -> set[bytes]:
        """Keys of the images that are there; see `FeatureCache.known`."""
        here = {image for of, image in self._vectors if of == encoder}
        return here if self._behind is None else here | self._behind.known(encoder)

    def get(self, encoder: str, images: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Look up features; see `FeatureCache.get`."""
        vectors = {image: self._vectors.get((encoder, image)) for image in images}
        known = {image: vector for image, vector in vectors.items() if vector is not None}
        if self._behind is not None and len(known) < len(vectors):
            read = self._behind.get(encoder, [image for image in vectors if image not in known])
            self._keep(encoder, read)
            known |= read
        return known

    def put(
        self, encoder: str, images: Sequence[bytes], features: NDArray[Any], name: str = ""
    ) -> None:
        """Keep features; see `FeatureCache.put`."""
        if self._behind is not None:
            self._behind.put(encoder, images, features, name)
        self._keep(encoder, dict(zip(images, features, strict=True)))

    def _keep(self, encoder: str, vectors: Mapping[bytes, NDArray[Any]]) -> None:
        if self._behind is not None:
            kept = (*self._vectors.values(), *vectors.values())
            if sum(vector.nbytes for vector in kept) > self.max_bytes:
                self._vectors.clear()
        self._vectors.update({(encoder, image): vector for image, vector in vectors.items()})
