"""Folder of a finder: its files, and what tells one finder from another."""

from pathlib import Path

from ...files import MANIFEST, digest_file, digest_value

KIND = "finder"
CONFIG, WEIGHTS = "finder.json", "head.safetensors"
FINDER_FILES = (WEIGHTS, CONFIG, MANIFEST)  # the last one means that all are there
SHORT = 12  # digits of a fingerprint in the metadata of each outline


def fingerprint_finder(folder: Path) -> str:
    """Fingerprint of a finder: 32 hexadecimal digits of all that it was saved as.

    An outline that it made states the first SHORT of them (`properties.metadata.finder`).
    """
    return digest_value([digest_file(folder / name) for name in (CONFIG, WEIGHTS)])
