"""Files that are kept: written whole or not at all, by one writer, known by what they are made of.

Whatever is used again (a run, a checkpoint, a bag, crops, the cells of a study) states what it was
made from and a checksum of its content. Nothing else calls `os.replace`.
"""

import csv
import errno
import io
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import GloVLMError, WriteError

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
LOCK = ".lock"
UNFINISHED = "unfinished"  # in a run's folder until the run is complete
UNFINISHED_DATA = ".unfinished"  # in a folder of images, whose readers skip hidden ones
KINDS = {  # of folders, by the `kind` that results.json or the manifest states
    "adaptation": "a run of `glovlm train`",
    "evaluation": "an evaluation of `glovlm evaluate`",
    "mil": "a slide classifier of `glovlm mil`",
    "slides": "slides of `glovlm slide`",
    "study": "a study of `glovlm study`",
    "pretraining": "a backbone of `glovlm pretrain`",
    "crops": "crops of `glovlm data crops`",
    "corrections": "corrections of `glovlm correct`",
    "finder": "a finder of `glovlm find train`",
    "findings": "outlines of `glovlm find run`",
    "export": "a graph of `glovlm export`",
}
_NO_NAME = r"/\\:*?\"<>|\x00-\x1f"
_FRESH = re.compile(r"^\..+\.[0-9a-f]{12}\.tmp$")
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
_WHOLE = 2**28  # bytes up to which a file is always known by all of them
_BLOCK, _BLOCKS = 2**16, 256  # of a larger one, read where size and time have not changed


# --------------------------------------------------------------------------- whole or not at all


@contextmanager
def replacing(path: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Atomic replacement: write to the fresh path, which takes the target's place in the end.

    The fresh path lies beside the target and is used by no other writer. It may become a file, or
    a folder where the target is none or empty. After an error it is removed and the target stays.

    Args:
        path: The target; the folder around it is made if need be.
        mode: Permissions of that folder, if it is made.

    Raises:
        WriteError: The disk is full, read-only or failing, or does not take the path.
    """
    fresh = _fresh_path(path)
    try:
        with explaining_disk(path):
            path.parent.mkdir(mode=mode, parents=True, exist_ok=True)
            yield fresh
            os.replace(fresh, path)
    except WriteError as error:  # of something in a fresh folder: its place is what a person knows
        raise WriteError(str(error).replace(str(fresh), str(path))) from error.__cause__
    finally:
        with suppress(OSError):
            remove(fresh)


def _fresh_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def explaining_disk(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into a sentence that names the place and what to do.

    Raises:
        WriteError: In place of an `OSError` about this place, and of what libraries make of one.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        at = getattr(error, "filename", None)
        elsewhere = isinstance(at, str | Path) and not _lies_near(Path(at), path)
        # A copy that finds no space names what it reads.
        if reason is None or (elsewhere and getattr(error, "errno", None) not in _NO_SPACE):
            raise  # something else went wrong, or with what is read rather than written
        raise WriteError(
            f"'{short_path(path)}' cannot be written ({reason}): free space there, or name another "
            "place."
        ) from error


def _lies_near(path: Path, target: Path) -> bool:
    near, here = os.path.abspath(target), os.path.abspath(path)
    return here.startswith(os.path.dirname(near)) or near.startswith(here)


def short_path(path: Path | str) -> str:
    """Path in a sentence: the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:80]}...{text[-80:]}"


def disk_reason(error: BaseException) -> str | None:
    """Reason that a disk gave, also where a library wraps it; `None` for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        about = {errno.EFBIG: "no space for a file of this size"}
        return about.get(error.errno, error.strerror or str(error))
    # safetensors and h5py say it in words: "I/O error: ... (os error 28)", "errno = 28".
    match = re.search(r"\(os error (\d+)\)|errno = (\d+)", str(error))
    if match is not None:
        return os.strerror(int(match[1] or match[2]))
    return None


def move_over(source: Path, target: Path) -> None:
    """Move a finished file or folder to where an earlier one may stand, which goes."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with the line ends that the text has."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a JSON file atomically; options are those of `json.dumps`, by default `indent=1`."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n")


def read_text(path: Path, what: str = "a file", *, most: int = 2**26) -> str:
    """Read a text file of a person or of ours, in UTF-8, without a byte order mark.

    Args:
        path: The file.
        what: What it should be, with its article, for the sentence: `"a YAML file"`.
        most: Most bytes; such a file is small.

    Raises:
        GloVLMError: As `read_content`, or it is not UTF-8.
    """
    content = read_content(path, what, most=most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GloVLMError(
            f"{path} is not UTF-8 text (byte {error.start}), so not a readable "
            f"{path.suffix[1:].upper() or 'text'} file; save it as UTF-8."
        ) from error


def read_content(path: Path, what: str = "a file", *, most: int = 2**26) -> bytes:
    """Read the bytes of a regular file, arguments as for `read_text`.

    Raises:
        GloVLMError: It is missing, a folder, a device or pipe (which would never end), or too
            large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise GloVLMError(f"Expected {what} at {path}, found: {kind}.")
        if status.st_size > most:
            raise GloVLMError(
                f"Expected {what} at {path}, found more than {most >> 20} MiB: that is no such "
                "file."
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, GloVLMError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise GloVLMError(f"Expected {what} at {path}, found: {reason}.") from error


def read_json(path: Path, kind: type = dict, *, most: int = 2**28) -> Any:
    """Read a JSON file that one of our commands wrote.

    Args:
        path: The file.
        kind: What stands at its top: `dict` or `list`.
        most: Most bytes.

    Raises:
        GloVLMError: It is missing, damaged, or holds something else.
    """
    return parse_json(read_text(path, "a JSON file", most=most), path, kind)


def parse_json(text: str | bytes, path: Path, kind: type = dict) -> Any:
    """Parse the JSON that a file holds; see `read_json`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GloVLMError(
            f"'{path}' is damaged or no JSON ({error}): write it again, or restore a copy."
        ) from error
    if not isinstance(content, kind):
        expected = "keys and values" if kind is dict else "a list"
        raise GloVLMError(f"'{path}': expected {expected}, found {type(content).__name__}.")
    return content


_WORDS = {dict: "names and values", list: "a list", str: "text", bool: "true or false"}
_WORDS |= {int: "a whole number", float: "a number", type(None): "nothing"}


def check_fields(path: Path, content: Any, fields: Mapping[str, Sequence[type]]) -> None:
    """Check the fields of what a file of ours holds.

    Args:
        path: The file, for the sentence.
        content: What it holds.
        fields: Kinds of value by name; `data.name` is the field `name` of `data`. A whole number
            serves as a number. A field that may be absent may be `NoneType`.

    Raises:
        GloVLMError: One is missing or of another kind.
    """
    for name, kinds in fields.items():
        value = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            expected = " or ".join(_WORDS[kind] for kind in kinds)
            raise GloVLMError(
                f"'{path}' is damaged: expected '{name}' to be {expected}, found {_short(value)}; "
                "restore a copy, or make it again."
            )


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically; `None` becomes an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_table(path: Path, columns: Mapping[str, Any], metadata: Any = None) -> None:
    """Write a parquet file atomically.

    Args:
        path: The file.
        columns: Arrays `[n]` by name, as `pyarrow.table` takes them.
        metadata: Of the table's schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as fresh:
        pq.write_table(pa.table(dict(columns), metadata=metadata), fresh)


# --------------------------------------------------------------------------- where output may go

# What readers of a folder of images take for part of the data.
_TABLES = frozenset(
    ["metadata.csv", "metadata.jsonl", "metadata.parquet", "labels.csv", "classes.yaml", "DRAWINGS"]
)


def check_target(
    path: str | Path,
    what: str,
    is_ours: Callable[[Path], bool],
    inputs: Iterable[str | Path] = (),
) -> None:
    """Check, before any work, that a file may be written where a person asks for it.

    An earlier output of the same kind is replaced; no input of the command, and no file, link or
    device of others, ever is.

    Args:
        path: The file to write.
        what: What it is, in words, such as `a table of predictions`.
        is_ours: Whether an existing file is an earlier output of this kind; may raise anything.
        inputs: Files and folders that the command reads, and its other outputs.

    Raises:
        GloVLMError: It may not; the sentence says why, and what to do.
    """
    path = Path(path)
    instead, shown = "name another file", short_path(path)
    given = [Path(place).expanduser() for place in inputs]
    if any(_is_same_place(path, place) for place in given if not os.path.isdir(place)):
        raise GloVLMError(f"'{shown}' is read or written by this same command: {instead}.")
    try:
        # The fresh file beside it has a longer name, which must fit, too.
        with suppress(FileNotFoundError):
            os.lstat(_fresh_path(path))
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        folder = path.parent
        if path.name in _TABLES and any(_lies_in(folder, place) for place in given):
            raise GloVLMError(
                f"'{shown}' would be read as part of the data in that folder: {instead}."
            ) from None
        _check_folder(path)
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GloVLMError(f"'{shown}' cannot be written ({reason}): {instead}.") from None
    if stat.S_ISDIR(mode):
        raise GloVLMError(
            f"Expected a file to write, found the folder '{shown}': name a file in it."
        )
    if stat.S_ISLNK(mode) and (os.path.isfile(path) or not os.path.exists(path)):
        raise GloVLMError(
            f"'{shown}' is a link to '{os.path.realpath(path)}', and links are not replaced: name "
            "the file itself, or another one."
        )
    if not stat.S_ISREG(mode):
        raise GloVLMError(
            f"'{shown}' is a device, a pipe, a socket or a link, and output is a file: {instead}."
        )
    ours = False
    with suppress(Exception):  # a reader's, of what may be anything
        ours = is_ours(path)
    if not ours:
        raise GloVLMError(
            f"'{shown}' is there already and is not {what} that was written here before, so it is "
            f"not replaced: {instead}, or remove it."
        )


def first_line(path: Path, size: int = 4096) -> str:
    """First line of a text file, without a mark of byte order; cut at so many bytes."""
    with path.open("rb") as stream:
        return stream.read(size).decode("utf-8-sig", "replace").partition("\n")[0]


def _check_folder(path: Path) -> None:
    """Check the folder around a file that is not there yet: the nearest that exists."""
    folder = next(filter(os.path.exists, path.absolute().parents), None)
    if folder is not None and not folder.is_dir():
        raise GloVLMError(f"'{path}' cannot be written: '{folder}' is a file, not a folder.")
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise GloVLMError(
            f"'{path}' cannot be written: the folder '{folder}' is read-only; name another file."
        )


def _is_same_place(path: Path, other: Path) -> bool:
    """Whether two paths are one file: by links of either kind, or by names that differ in case."""
    with suppress(OSError, ValueError):
        if os.path.samefile(path, other):
            return True
    names = [os.path.realpath(place).casefold() for place in (path, other)]
    return names[0] == names[1]


def _lies_in(folder: Path, other: Path) -> bool:
    base = os.path.realpath(other)
    return os.path.isdir(other) and Path(os.path.realpath(folder)).is_relative_to(base)


# ------------------------------------------------------------------------------------ one writer


@contextmanager
def one_writer(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Lock of a folder: as long as it is held, no other command writes there.

    The folder is made if need be, and what killed writers left in it goes: no other writes there
    now. It goes again if it was made here and nothing came into it. On a network disk a lock may
    hold on one machine only: let each machine write a folder of its own.

    Args:
        folder: The folder.
        wait: Seconds to wait for another writer.

    Raises:
        GloVLMError: Another process writes there, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    new = not os.path.exists(folder)  # Path.exists raises where a name is too long
    place = folder / LOCK
    with explaining_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, timeout=wait, poll_interval=0.1)
        try:
            lock.acquire()
        except Timeout:
            raise _other_writer(folder) from None
    try:
        with suppress(OSError):
            place.write_text(f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M')}")
        sweep(folder)
        yield
    finally:
        lock.release()
        if new and is_empty(folder):
            with suppress(OSError):
                place.unlink(missing_ok=True)
                folder.rmdir()


def refuse_other_writer(folder: Path) -> None:
    """Refuse a folder that another process writes to; nothing is made or changed there.

    Raises:
        GloVLMError: It does.
    """
    from filelock import FileLock, Timeout

    place = folder / LOCK
    if place.is_file():
        try:
            with FileLock(place, timeout=0), suppress(OSError):
                return
        except Timeout:
            raise _other_writer(folder) from None


def _other_writer(folder: Path) -> GloVLMError:
    return GloVLMError(
        f"Another process writes to '{folder}'{_holder(folder / LOCK)}: wait until it has "
        "finished, or name another folder."
    )


def is_empty(folder: Path) -> bool:
    """Whether there is no folder, or nothing but a lock and what killed writers left in it."""
    if not folder.exists():
        return True
    return all(path.name == LOCK or _FRESH.match(path.name) for path in folder.iterdir())


def _holder(place: Path) -> str:
    with suppress(OSError, ValueError):
        text = place.read_text("utf-8").strip()
        return f" ({text})" if text else ""
    return ""


def sweep(folder: Path, *, age: float = 0.0) -> None:
    """Remove the fresh paths of writers that were killed.

    Args:
        folder: Where, and below.
        age: Seconds since they were last written, where others may be writing.
    """
    latest = time.time() - age
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if _FRESH.match(name):
                with suppress(OSError):
                    if os.lstat(os.path.join(base, name)).st_mtime <= latest or not age:
                        remove(Path(base) / name)
        folders[:] = [name for name in folders if not _FRESH.match(name)]


# --------------------------------------------------------------------- a folder, moved into place


def put_in_place(work: Path, output: Path, names: Sequence[str]) -> None:
    """Move a finished folder's content where it belongs, as one step.

    A journal is written first. From then on a kill loses nothing: `finish_move`, with which every
    reader and writer of such a folder begins, does what is left.

    Args:
        work: The folder in which everything is complete; it lies in `output` and goes.
        output: Where it belongs.
        names: All that may lie in `output`; of these, what `work` lacks is removed there.
    """
    here = [name for name in names if (work / name).exists()]
    write_json(work / JOURNAL, {"move": here, "remove": [n for n in names if n not in here]})
    finish_move(work, output)


def finish_move(work: Path, output: Path) -> bool:
    """Finish a move that a kill interrupted; whether there was one.

    Raises:
        GloVLMError: The journal is damaged, or names something outside of the folder.
    """
    journal = work / JOURNAL
    if not journal.is_file():
        return False
    planned = read_json(journal)
    moved, removed = planned.get("move"), planned.get("remove")
    plain = isinstance(moved, list) and isinstance(removed, list)
    if not plain or not all(map(_is_inside, (*moved, *removed))):
        raise GloVLMError(f"'{journal}' is damaged: remove '{work}' and run the command again.")
    with explaining_disk(output):
        if moved and (work / moved[-1]).exists():
            remove(output / moved[-1])  # the last one means that all is there
        for name in removed:
            remove(output / name)
        for name in moved:
            if (work / name).exists():
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                move_over(work / name, output / name)
        gone = work.with_name(f".{work.name}.{uuid.uuid4().hex[:12]}.tmp")  # as `replacing` names
        os.replace(work, gone)  # at once, with its journal
        shutil.rmtree(gone, ignore_errors=True)
    return True


def finish_interrupted(output: Path) -> None:
    """Finish a move into a folder that a kill interrupted: readers of one begin with this.

    A live writer is not disturbed; while it moves, this waits.

    Raises:
        GloVLMError: The folder cannot be written, or its writer takes too long.
    """
    for name in (UNFINISHED, UNFINISHED_DATA):
        if os.path.isfile(f"{output}/{name}/{JOURNAL}"):
            with one_writer(output, wait=60):
                finish_move(output / name, output)


@contextmanager
def staging(output: Path, name: str = UNFINISHED) -> Iterator[Path]:
    """Folder inside another one in which is made what `put_in_place` moves there.

    Of an earlier command's, a move that was begun is finished and the rest goes. After an error
    this one goes too, unless its move has begun.

    Args:
        output: The folder; the caller is its one writer.
        name: Of the folder inside.
    """
    work = output / name
    finish_move(work, output)
    with explaining_disk(output):
        remove(work)
        work.mkdir(parents=True)
        try:
            yield work
        except BaseException as error:
            if not (work / JOURNAL).exists():
                remove(work)
            if isinstance(error, WriteError):
                text = str(error).replace(str(work), str(output))
                raise WriteError(text) from error.__cause__
            raise


def is_plain_name(name: Any) -> bool:
    """Whether a text names a file or folder directly in another one, on every system."""
    if not isinstance(name, str) or not re.fullmatch(rf"[^.{_NO_NAME}][^{_NO_NAME}]*", name):
        return False
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    return reserved is None and not name.endswith((".", " "))


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and all(map(is_plain_name, name.split("/")))


def remove_below(root: Path, path: Path) -> None:
    """Remove a file or folder that lies below a root, and nothing that lies elsewhere.

    Raises:
        GloVLMError: It lies elsewhere, also behind a link.
    """
    if root.resolve() not in path.resolve().parents:
        raise GloVLMError(f"'{path}' does not lie below '{root}', so it is not removed.")
    remove(path)


# -------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Manifest:
    """Manifest: what something kept was made from, and checksums of its content.

    Attributes:
        kind: What it is: `adaptation`, `mil`, `slide`, `crops`, `backbone`, ...
        made_from: Digests and settings by name, plain values.
        files: Checksum of each file by its path in the folder.
    """

    kind: str
    made_from: Mapping[str, Any]
    files: Mapping[str, str]


def write_manifest(
    folder: Path, kind: str, made_from: Mapping[str, Any], names: Sequence[str] | None = None
) -> None:
    """Write the manifest of a folder that is complete: `manifest.json`.

    Args:
        folder: The folder.
        kind: What it is.
        made_from: Digests and settings by name, plain values.
        names: Files and folders in it that belong to it; all by default.
    """
    places = list(folder.iterdir()) if names is None else [folder / name for name in names]
    files = {
        path.relative_to(folder).as_posix(): digest_file(path)
        for place in sorted(places)
        for path in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if path.is_file() and path.name not in (MANIFEST, JOURNAL, LOCK)
    }
    value = {"kind": kind, "made_from": dict(made_from), "files": files}
    write_json(folder / MANIFEST, value)


def read_manifest(folder: Path) -> Manifest | None:
    """Manifest of a folder; `None` where it has none.

    Raises:
        GloVLMError: It is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = read_json(path)
    parts = (content.get("kind"), content.get("made_from"), content.get("files"))
    if not isinstance(parts[0], str) or not all(isinstance(part, dict) for part in parts[1:]):
        raise GloVLMError(f"'{path}' is damaged: expected kind, made_from and files.")
    return Manifest(*parts)


def damaged_files(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None
) -> list[str]:
    """Files of a manifest that are missing or whose content has changed.

    Args:
        folder: The folder.
        manifest: Its manifest.
        names: Files, or beginnings of their paths, that matter; all by default.
    """
    chosen = tuple(names) if names is not None else ("",)
    return [
        name
        for name, checksum in manifest.files.items()
        if name.startswith(chosen)
        and (not (path := folder / name).is_file() or digest_file(path) != checksum)
    ]


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `made_from`: "the labels have changed", "lr was 0.1 and is 0.2".

    Values go through JSON first, as what was read from a file did; of nested ones each part is
    compared by itself.
    """
    old, new = (json.loads(json.dumps(dict(part), default=str)) for part in (before, now))
    changed = []
    for name in dict.fromkeys([*new, *old]):
        was, is_now = old.get(name), new.get(name)
        if was == is_now:
            continue
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = changed_inputs(was, is_now)
            changed += [text.replace("the ", f"the {name} ", 1) for text in inner]
        elif _is_digest(was) or _is_digest(is_now):
            changed.append(f"the {name} {'have' if name.endswith('s') else 'has'} changed")
        else:
            changed.append(f"{name} was {_short(was)} and is {_short(is_now)}")
    return changed


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest_file(path: Path) -> str:
    """Digest of a file's bytes: 32 hexadecimal digits (xxh3, 128 bits)."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return str(digest.hexdigest())


def digest_value(value: Any) -> str:
    """Digest of plain values: 32 hexadecimal digits of their JSON with sorted keys."""
    import xxhash

    return str(xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest())


def digest_tensors(tensors: Iterable[tuple[str, Any]]) -> str:
    """Digest of named tensors of torch: names, types, shapes and every byte, in this order."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return str(digest.hexdigest())


def describe_file(path: Path) -> dict[str, Any]:
    """Identity of a large input: size, time, digest of sampled blocks and of all bytes."""
    status = path.stat()
    whole = digest_file(path)
    sample = whole if status.st_size <= _WHOLE else _digest_blocks(path, status.st_size)
    return {
        "bytes": status.st_size,
        "modified": status.st_mtime_ns,
        "sample": sample,
        "digest": whole,
    }


def is_same_file(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether a file holds the bytes that `describe_file` saw.

    All bytes are read, but of a file above 256 MiB whose size and time are as they were: of such a
    one 256 blocks over its whole length.
    """
    status = path.stat()
    if status.st_size != known.get("bytes"):
        return False
    if status.st_size > _WHOLE and status.st_mtime_ns == known.get("modified"):
        return _digest_blocks(path, status.st_size) == known.get("sample")
    return digest_file(path) == known.get("digest")


def _digest_blocks(path: Path, size: int) -> str:
    """Digest of blocks spread evenly over a file, the first and the last among them."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        for i in range(_BLOCKS):
            stream.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return str(digest.hexdigest())


# ---------------------------------------------------------------------------------------- results


def read_results(path: str | Path, *kinds: str) -> dict[str, Any]:
    """Read the results that a command wrote, and check what they are of.

    Args:
        path: The file, or the folder that holds it.
        kinds: The kinds of `KINDS` that will do.

    Raises:
        GloVLMError: There are none, they are damaged, or of another kind, which is named.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        finish_interrupted(place)
        place = _results_file(place) or place / "results.json"
    if not place.is_file():
        raise GloVLMError(
            f"Expected {_titles(kinds)}, found no finished results in '{path}': give the folder "
            "that was its --output-dir."
        )
    return check_results(read_json(place), path, *kinds)


def check_results(content: dict[str, Any], path: str | Path, *kinds: str) -> dict[str, Any]:
    """Check what results are of; see `read_results`."""
    _check_kind(results_kind(content), kinds, path)
    return content


def results_kind(results: Mapping[str, Any]) -> str | None:
    """Kind of results; of those without one, from before it was stated, by what they hold."""
    kind = results.get("kind")
    if isinstance(kind, str):
        return kind
    marks = {
        "mil": "aggregator",
        "study": "sections",
        "slides": "slides",
        "adaptation": "method",
        "pretraining": "test_patients",
        "evaluation": "metrics",
        "export": "opset",
    }
    return next((name for name, mark in marks.items() if mark in results), None)


def model_folder(path: str | Path, *kinds: str) -> Path:
    """Folder of a run's model, once no file in it is damaged.

    Args:
        path: The run's folder, its `model/`, or any other folder, which is returned as it is.
        kinds: Kinds of `KINDS` whose model will do.

    Raises:
        GloVLMError: It is of another kind, or a file is not the one that the run wrote.
    """
    folder = Path(path).expanduser()
    run = folder.parent if folder.name == "model" else folder
    check_kind(run, *kinds)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    manifest = read_manifest(run)
    if manifest is not None and (folder != run or manifest.kind == "pretraining"):
        among = "" if folder == run else "model/"
        read = [name for name in manifest.files if name.startswith(among)]
        refuse_damage(run, manifest, [n for n in read if not n.endswith((".py", ".md"))])
    return folder


def check_kind(folder: Path, *kinds: str) -> None:
    """Refuse a folder of another command, where it can be known.

    Raises:
        GloVLMError: It is of another kind, which is named.
    """
    finish_interrupted(folder)
    file, kind = _results_file(folder), None
    with suppress(GloVLMError):  # no results of ours
        if file is not None:
            kind = results_kind(read_json(file))
        elif (manifest := read_manifest(folder)) is not None:
            kind = manifest.kind
    if kind in KINDS and kind != "evaluation":  # which may lie beside any model
        _check_kind(kind, kinds, folder)


def read_undamaged(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Read a file of a manifest once, for its checksum and content; see `refuse_damage`."""
    import xxhash

    content = path.read_bytes() if (path := folder / name).is_file() else b""
    if manifest.files.get(name) not in (None, xxhash.xxh3_128_hexdigest(content)):
        refuse_damage(folder, manifest, [name])
    return content


def refuse_damage(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Refuse a folder of which a file is not as it was when it was finished.

    Raises:
        GloVLMError: Names the first such file.
    """
    damaged = damaged_files(folder, manifest, names)
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        what = "has changed" if (folder / damaged[0]).exists() else "is missing"
        raise GloVLMError(
            f"'{folder / damaged[0]}'{more} {what} since it was written: restore a copy, or make "
            "it again (--overwrite)."
        )


def _results_file(folder: Path) -> Path | None:
    known = (folder / f"{name}.json" for name in ("results", "report", "pretraining", "export"))
    return next((file for file in known if file.is_file()), None)


def _titles(kinds: Iterable[str]) -> str:
    return " or ".join(KINDS[kind] for kind in kinds)


def _check_kind(kind: str | None, kinds: Sequence[str], path: str | Path) -> None:
    if kind not in kinds:
        actual = KINDS.get(kind or "", "something else")
        raise GloVLMError(
            f"Expected {_titles(kinds)}, found {actual}: '{path}'. Give the --output-dir of the "
            "former."
        )
