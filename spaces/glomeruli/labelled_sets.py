"""Labelled sets: a ZIP or a folder of images with their table, as `load_dataset` reads it.

Nothing of a ZIP is trusted: its names stay inside, its sizes are counted while it is read, and only
images and tables leave it.
"""

import io
import lzma
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Image, concatenate_datasets
from PIL.PngImagePlugin import PngInfo
from uploads import MAX_BYTES, MAX_FILE, Upload, check_name, read_uploads

from hf_glovlm import GloVLMError, describe_reading, group_rows, load_dataset, open_outlined

MAX_SET = 192  # images
MAX_ENTRIES = 1000  # files of a ZIP, of whatever kind
MAX_RATIO = 200  # of a file's size to what it takes in the ZIP: far more than any picture has
MAX_DEPTH = 8  # folders in one another
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
TABLES = (".csv", ".tsv", ".jsonl")
PATIENTS = ("patient_id", "case_id", "slide_id", "group_id")  # columns that `group_rows` knows
FOLDER_MARK = "\u29f8"  # stands for / in the names that the page's script sends of a folder


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images of a set.

    Args:
        support: Images by class, each with its patient where known.
        notes: How it was read and what is missing, in sentences.
        refused: A sentence about each image that cannot be used.
    """

    support: dict[str, list[Upload]]
    notes: list[str]
    refused: list[str]


def read_set(files: Sequence[tuple[str, bytes]]) -> LabelledSet:
    """Read a ZIP, or the files of a folder, in the layouts of `load_dataset`.

    Args:
        files: Name and content; of a folder, names with their folders.

    Raises:
        GloVLMError: There are none, the ZIP is not what it may be, or nothing says which class the
            images have.
    """
    zips = [name for name, _ in files if name.lower().endswith(".zip")]
    if not files or (zips and len(files) > 1):
        raise GloVLMError(
            "Expected one ZIP, or a folder's images with their table, found "
            f"{'nothing' if not files else f'{len(files)} files with a ZIP among them'}."
        )
    origin = zips[0] if zips else "The folder"
    if zips:
        members, notes = unpack(*files[0])
    else:
        members, notes = _choose({_inside(name.replace(FOLDER_MARK, "/")): c for name, c in files})
    images = sum(name.lower().endswith(IMAGES) for name in members)
    if not images:
        raise GloVLMError(
            f"{origin} holds no images ({', '.join(IMAGES)}). Expected images with a table of "
            "file_name, label and patient_id, or one folder per class."
        )
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    try:
        for name, content in _without_top(members).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return _read_folder(folder, notes)
    except GloVLMError as error:
        sentence = str(error).replace(f"{folder}/", "").replace(str(folder), origin)
        raise GloVLMError(sentence) from None
    except (
        OSError,
        UnicodeError,
    ) as error:  # two names that this disk takes for one, or one too long for it
        reason = getattr(error, "strerror", None) or "a name that this disk does not take"
        raise GloVLMError(f"{origin} cannot be unpacked here ({reason}).") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(name: str, content: bytes) -> tuple[dict[str, bytes], list[str]]:
    """Images and tables of a ZIP, and sentences about the rest.

    Raises:
        GloVLMError: A name leads out of it; it is broken, encrypted, or unpacks to too much.
    """
    check_name(name)
    members: dict[str, bytes] = {}
    size = 0
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > MAX_ENTRIES:
                raise GloVLMError(
                    f"{name} holds {len(entries)} files, at most {MAX_ENTRIES} are taken: a few "
                    "labelled images are enough here."
                )
            for entry in entries:
                place = _inside(entry.filename)
                if place in members:
                    raise GloVLMError(f"{name} holds {_short(place)} twice; keep one.")
                if not _is_taken(place):
                    members[place] = b""
                    continue
                if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
                    raise GloVLMError(
                        f"{_short(place)} in {name} would unpack to more than {MAX_RATIO} times "
                        "its size, as no picture does."
                    )
                with archive.open(entry) as stream:
                    members[place] = stream.read(MAX_FILE + 1)
                size += len(members[place])
                if len(members[place]) > MAX_FILE or size > MAX_BYTES:
                    raise GloVLMError(
                        f"{name} unpacks to too much: at most {MAX_FILE / 2**20:.0f} MB a file and "
                        f"{MAX_BYTES / 2**20:.0f} MB in all are taken."
                    )
    except GloVLMError:
        raise
    except (
        zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError,
        zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        encrypted = "encrypted" in str(error)
        raise GloVLMError(
            f"{name} is "
            + (
                "encrypted: pack it without a password."
                if encrypted
                else "no ZIP that can be read."
            )
        ) from None
    return _choose(members)


def _choose(members: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The images and tables, and a sentence about what is neither."""
    taken = {place: content for place, content in members.items() if _is_taken(place)}
    rest = [place for place in members if place not in taken and not _is_hidden(place)]
    notes = []
    if rest:
        shown = ", ".join(map(_short, rest[:3])) + (", ..." if len(rest) > 3 else "")
        number = "1 file is" if len(rest) == 1 else f"{len(rest)} files are"
        notes.append(f"{number} neither image nor table and not read: {shown}.")
    return taken, notes


def _is_hidden(place: str) -> bool:
    parts = PurePosixPath(place).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _is_taken(place: str) -> bool:
    return place.lower().endswith((*IMAGES, *TABLES)) and not _is_hidden(place)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _inside(name: str) -> str:
    """A name that leads nowhere but into the set.

    Raises:
        GloVLMError: It leads out of it.
    """
    parts = name.split("/")
    outside = name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name)
    if outside or len(parts) > MAX_DEPTH or any(part in ("", ".", "..") for part in parts):
        raise GloVLMError(
            f"{_short(name)!r} is no name of a file inside of a set: pack the folder anew, with "
            f"names below it and at most {MAX_DEPTH} folders in one another."
        )
    for part in parts:
        check_name(part)
    return name


def _without_top(members: dict[str, bytes]) -> dict[str, bytes]:
    """A set without the one folder around everything, as most programs pack it."""
    split = {name: name.split("/") for name in members}
    tops = {parts[0] for parts in split.values()}
    below = [parts[1:] for parts in split.values()]
    deeper = any(len(parts) > 1 for parts in below)
    table = any(parts and parts[-1].lower().endswith(TABLES) for parts in below)
    if len(tops) > 1 or not all(below) or not (deeper or table):
        return members
    return _without_top({"/".join(split[name][1:]): content for name, content in members.items()})


def _read_folder(folder: Path, notes: Sequence[str]) -> LabelledSet:
    """What the package reads of an unpacked set."""
    data = load_dataset(folder)
    read = describe_reading(data).in_full
    sentences = [*notes, *([f"How it was read: {'; '.join(read)}."] if read else [])]
    if len(data) > 1:
        sentences.append(
            f"Its split into {' and '.join(map(str, data))} has no part here: every image is "
            "learned from, and each patient left out in turn."
        )
    rows = concatenate_datasets(list(data.values()))
    if len(rows) > MAX_SET:
        raise GloVLMError(
            f"{folder} holds {len(rows)} labelled images, at most {MAX_SET} are taken here: send "
            "fewer, or use `glovlm train` on your own machine."
        )
    patients, missing = _patients(rows)
    for name in {"image", "mask"} & set(rows.column_names):
        rows = rows.cast_column(name, Image(decode=False))
    names: list[str] = rows.features["label"].names
    unique = _plain_names(rows["file_name"])
    labels = {name: names[k] for name, k in zip(unique, rows["label"], strict=True)}
    known = dict(zip(unique, patients, strict=True))
    refused: list[str] = []
    contents: list[tuple[str, bytes]] = []
    for name, row in zip(unique, rows, strict=True):
        try:
            contents.append((name, _content(folder, name, row)))
        except GloVLMError as error:
            refused.append(str(error))
    images, unread = read_uploads(contents, limit=MAX_SET)
    support: dict[str, list[Upload]] = {name: [] for name in names}
    for image in images:
        label = labels[image.name]
        support[label].append(replace(image, patient=known[image.name], label=label))
    for name in [name for name, part in support.items() if not part]:
        sentences.append(f"The class '{_short(name)}' has no image that can be read.")
        del support[name]
    return LabelledSet(support, [*sentences, *missing], [*refused, *unread])


def _patients(rows: Any) -> tuple[list[str], list[str]]:
    """Patient (or case, slide) of each row, "" where not known, and what is missing."""
    columns = [name for name in PATIENTS if name in rows.column_names]
    known = [any(values) for values in zip(*(rows[name] for name in columns), strict=True)]
    if not any(known):
        return [""] * len(rows), [
            "Nothing says whose images these are, so no performance is estimated: name the patient "
            "of each in a column patient_id."
        ]
    groups = group_rows(rows)
    notes = (
        [f"{groups.note[:1].upper()}{groups.note[1:]}."] if groups.column != "patient_id" else []
    )
    if unknown := known.count(False):
        notes.append(
            f"The patient of {unknown} of {len(rows)} images is not stated, so no performance is "
            "estimated: fill in every row."
        )
    return [name if there else "" for name, there in zip(groups.ids, known, strict=True)], notes


def _plain_names(paths: Sequence[str]) -> list[str]:
    """File names without folders; with them where two would be called alike."""
    plain = [path.rsplit("/", 1)[-1] for path in paths]
    counts = Counter(plain)
    named = [
        name if counts[name] == 1 else path.replace("/", "_")
        for name, path in zip(plain, paths, strict=True)
    ]
    if len(set(named)) == len(named):
        return named
    return [f"{k + 1}_{name}" for k, name in enumerate(plain)]


def _content(folder: Path, name: str, row: Mapping[str, Any]) -> bytes:
    """Content of a row's image; with its outline in the alpha channel, where a mask holds it."""
    path = Path(row["image"]["path"] or "").resolve()
    if not path.is_relative_to(folder.resolve()):  # a table may name what it likes
        raise GloVLMError(f"{name} does not lie in the set.")
    mask = row.get("mask")
    if not mask or not mask["path"]:
        return path.read_bytes()
    if not Path(mask["path"]).resolve().is_relative_to(folder.resolve()):
        raise GloVLMError(f"The mask of {name} does not lie in the set.")
    outlined = open_outlined({"path": name, "bytes": path.read_bytes()}, mask["path"])
    about = PngInfo()
    about.add_text("outline", row.get("outline") or outlined.info.get("outline", "unstated"))
    stream = io.BytesIO()
    outlined.save(stream, "PNG", pnginfo=about)
    return stream.getvalue()
