"""Token maps on disk, so that a comparison encodes each picture once."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import replacing


class TokenFolder(MutableMapping[str, NDArray[np.float16]]):
    """Store of token maps: a file each, in a folder that belongs to one tower.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __getitem__(self, key: str) -> NDArray[np.float16]:
        try:
            tokens: NDArray[np.float16] = np.load(self._path(key), allow_pickle=False)
        except FileNotFoundError:
            raise KeyError(key) from None
        return tokens

    def __setitem__(self, key: str, tokens: NDArray[np.float16]) -> None:
        with replacing(self._path(key)) as path, path.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)).is_file()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.npy"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
