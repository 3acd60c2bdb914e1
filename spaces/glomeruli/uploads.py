"""Uploads: files of strangers, read once, checked, and deleted from the disk."""

import base64
import csv
import io
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from hf_glovlm import GloVLMError, explain, open_outlined, render_cohort

MAX_FILE = 20 * 2**20  # bytes
MAX_PIXELS = 16_000_000
MAX_IMAGES = 24  # on the page at a time
MAX_BATCH = 500
MAX_BYTES = 96 * 2**20  # of one person's images together
THUMBNAIL = 192  # pixels
CLASSES = ("viable", "ischemic", "segmental_sclerosis", "global_sclerosis", "atubular")


@dataclass(frozen=True, eq=False)
class Upload:
    """Uploaded image that can be decoded.

    Args:
        name: Its file name, without any folder.
        content: The file.
        thumbnail: A small JPEG as a `data:` address.
        patient: Where known.
        label: Its class, where known.
        synthetic: Whether it is one of the examples.
        outline: What its outline goes around (`capsule`, `tuft`, `unstated`); empty without one.
    """

    name: str
    content: bytes
    thumbnail: str
    patient: str = ""
    label: str = ""
    synthetic: bool = False
    outline: str = ""


def take_files(
    files: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None,
) -> list[tuple[str, bytes]]:
    """Read uploaded files and delete them.

    Args:
        files: As Gradio hands them on where it does not preprocess: `path` and `orig_name`.

    Returns:
        Name and content of each.

    Raises:
        GloVLMError: They are too large together (all are deleted nevertheless), or no uploads.
    """
    contents, size = [], 0
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    for file in [files] if isinstance(files, Mapping) else files or []:
        path = Path(str(file.get("path") if isinstance(file, Mapping) else file)).resolve()
        # Gradio checks this for what is marked as a file; an endpoint can be sent anything.
        if not path.is_relative_to(folder) or not isinstance(file, Mapping):
            raise GloVLMError("Expected uploaded files (from Python: handle_file), found others.")
        content = _recent.take(path)
        if content is None:
            raise GloVLMError(f"{path.name} is no longer here: upload it again.")
        size += len(content)
        if size <= MAX_BYTES:
            contents.append((str(file.get("orig_name") or path.name), content))
    if size > MAX_BYTES:
        raise GloVLMError(
            f"Expected at most {MAX_BYTES / 2**20:.0f} MB at a time, found {size / 2**20:.0f}: "
            "send fewer images, or use `glovlm predict` on your own machine."
        )
    return contents


class _Recent:
    """Cache of uploads that were just read.

    Gradio keeps two people's equal files under one path, which has their hash in it, so the first
    who is served deletes the file of both.
    """

    def __init__(self, seconds: float = 120, size: int = 64 * 2**20) -> None:
        self._seconds, self._size = seconds, size
        self._files: OrderedDict[Path, tuple[float, bytes]] = OrderedDict()
        self._lock = Lock()

    def take(self, path: Path) -> bytes | None:
        """Content of a file, which is deleted."""
        try:
            content = path.read_bytes()
            path.unlink()
        except OSError:
            content = None
        now = time.monotonic()
        with self._lock:
            if content is None:
                content = self._files.get(path, (now, None))[1]
            if content is not None:
                self._files[path] = (now, content)
                self._files.move_to_end(path)
            held = sum(len(data) for _, data in self._files.values())
            for other, (since, data) in list(self._files.items()):
                if now - since > self._seconds or held > self._size:
                    held -= len(data)
                    del self._files[other]
        return content


_recent = _Recent()


def sweep(folder: Path, age: float) -> None:
    """Delete files older than some seconds from a folder, and empty folders."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside comes first
        with suppress(OSError):  # gone meanwhile, or not empty
            if time.time() - path.stat().st_mtime > age:
                path.rmdir() if path.is_dir() else path.unlink()


def read_upload(name: str, content: bytes) -> Upload:
    """Decode an uploaded image.

    Raises:
        GloVLMError: The name leads elsewhere, the file is no image, or it is too large.
    """
    check_name(name)
    if len(content) > MAX_FILE:
        raise GloVLMError(
            f"{name} has {len(content) / 2**20:.0f} MB, at most {MAX_FILE / 2**20:.0f} are taken: "
            "cut the glomeruli out first."
        )
    image = open_outlined({"path": name, "bytes": content})
    if image.width * image.height > MAX_PIXELS:
        raise GloVLMError(
            f"{name} has {image.width} x {image.height} pixels, and at most {MAX_PIXELS:,} are "
            "taken here: cut the glomeruli out first."
        )
    shown = explain.show_outline(image)  # the whole picture: its outline hides nothing of it
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    return Upload(name, content, to_address(shown), outline=image.info.get("outline", ""))


def check_name(name: str) -> None:
    """Refuse a file name with folders or control characters.

    Raises:
        GloVLMError: It names a folder, is empty, or holds control characters.
    """
    if not re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,255}", name) or name.strip(". ") == "":
        raise GloVLMError(
            f"Expected a plain file name, found {name[:80]!r}: rename the file, without folders."
        )


def read_uploads(
    files: Iterable[tuple[str, bytes]], kept: Sequence[Upload] = (), limit: int = MAX_IMAGES
) -> tuple[list[Upload], list[str]]:
    """Decode files, with a reason for each that is refused.

    Args:
        files: Name and content.
        kept: Images that are there already.
        limit: How many there may be.

    Returns:
        All images, with those kept first, and sentences about the others.
    """
    images, refused = list(kept), []
    names = {image.name for image in images}
    size = sum(len(image.content) for image in images)
    for name, content in files:
        try:
            if len(images) >= limit or size + len(content) > MAX_BYTES:
                raise GloVLMError(
                    f"{name} was left out: at most {limit} images and {MAX_BYTES / 2**20:.0f} MB "
                    "are taken here."
                )
            image = read_upload(name, content)
            if name in names:
                raise GloVLMError(f"{name} is there already: a name stands for one image.")
        except GloVLMError as error:
            refused.append(str(error))
            continue
        images.append(image)
        names.add(name)
        size += len(content)
    return images, refused


def read_patients(content: bytes) -> dict[str, str]:
    """Read a table `file_name,patient_id`.

    Raises:
        GloVLMError: It is no such table, or names one file twice.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        raise GloVLMError("The table of patients is no CSV in UTF-8; save it as that.") from None
    if not rows or not {"file_name", "patient_id"} <= set(rows[0]):
        raise GloVLMError(
            "Expected a table with the columns file_name and patient_id, found "
            f"{', '.join(map(str, rows[0])) if rows else 'none'}."
        )
    patients: dict[str, str] = {}
    for row in rows:
        name, patient = str(row["file_name"]).strip(), str(row["patient_id"] or "").strip()
        check_name(name)
        if patients.setdefault(name, patient) != patient:
            raise GloVLMError(f"The table names two patients for {name}; an image has one.")
    return patients


def to_address(image: Image.Image) -> str:
    """A picture as a `data:` address, so that none is written to be shown."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


@lru_cache(maxsize=1)
def make_examples() -> list[Upload]:
    """Synthetic images of glomeruli, no photographs: four patients, each with every class."""
    examples = []
    for item in render_cohort(4, len(CLASSES), seed=31, size=160, classes=CLASSES):
        stream = io.BytesIO()
        item.image.save(stream, "PNG")
        name = f"drawing_{item.patient_id}_{item.class_name}.png"
        examples.append(
            Upload(
                name,
                stream.getvalue(),
                to_address(item.image),
                item.patient_id,
                item.class_name,
                synthetic=True,
            )
        )
    return examples
