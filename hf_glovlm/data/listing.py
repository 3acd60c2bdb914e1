"""Names of files: images below a folder, names in a table, splits and patients in names."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from ..errors import GloVLMError
from ..files import LOCK, MANIFEST, UNFINISHED_DATA
from ..tables import TABLE_SUFFIXES, normal_text

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
)
SHEETS = frozenset({".xlsx", ".xls", ".ods", ".json", ".txt", ".xml"})  # perhaps a table
NOT_UTF8 = "with a name that is not UTF-8"
_COMPANIONS = frozenset({"classes.yaml", "DRAWINGS", MANIFEST, LOCK, "captions.json"})
_ABOUT = re.compile(r"(readme|licen[cs]e|citation|changelog)\b", re.IGNORECASE)

# Split names, case, blanks and a word such as `set` aside. Those of one line mean the same; those
# of one split in two lines may not, so one folder or table holds one line of each.
_SPLIT_WORDS = {
    "train": ("train training trn", "support", "learn learning"),
    "validation": ("val valid validation", "dev devel development"),
    "test": ("test testing tst", "eval evaluation", "holdout heldout"),
}
_MEANING = {
    word: (role, words)
    for role, lines in _SPLIT_WORDS.items()
    for words in lines
    for word in words.split()
}
SPLIT_NAMES = ("train", "validation", "val", "test")  # what to propose for a slip
_BESIDE_A_SPLIT = (
    r"set|data|dataset|images?|imgs?|split|part|samples?|folder|subset|crops?|tiles?|labels?"
    r"|annotations?|metadata"
)


@dataclass
class Listing:
    """Files below a folder.

    Attributes:
        images: Relative POSIX paths of the images, sorted.
        tables: Relative paths of files that may be tables, sorted.
        left_out: Number of other files by kind, such as `.heic` or `hidden`.
        examples: The first of each kind, and every name that is not UTF-8, escaped.
    """

    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str) -> None:
        """Count a file that is not read."""
        self.left_out[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < 3 or kind == NOT_UTF8:
            kept.append(escape_name(name))

    def note(self, *, named: bool = True) -> str:
        """Sentence about what was left out, with names or not; empty where nothing was."""
        if not self.left_out:
            return ""
        kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        names = {kind: f" ({few(self.examples[kind])})" if named else "" for kind, _ in kinds}
        parts = [f"{n} {kind}{names[kind]}" for kind, n in kinds]
        number = sum(self.left_out.values())
        return f"{number} {'file was' if number == 1 else 'files were'} left out: " + ", ".join(
            parts
        )


def few(names: Sequence[str]) -> str:
    """The first three names, as an error lists them."""
    return ", ".join(map(short, names[:3])) + (", ..." if len(names) > 3 else "")


def short(text: str, most: int = 200) -> str:
    """Text of a person in an error, cut where it is very long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def escape_name(name: str) -> str:
    r"""File name that can be printed and stored: bytes that are no UTF-8 as `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def walk_folders(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder and those below it, each once: links are followed, hidden ones not entered.

    Yields:
        A folder, its hidden subfolders, and its files.
    """
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        hidden = [name for name in subfolders if name.startswith(".")]
        subfolders[:] = sorted(name for name in subfolders if name not in hidden)
        yield folder, hidden, names


def list_files(root: Path) -> Listing:
    """List the images and tables below a folder, and count what is neither.

    Links are followed; hidden folders are not entered.
    """
    listing = Listing()
    for folder, hidden, names in walk_folders(root):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if prefix == "." else prefix + "/"
        for name in sorted([*names, *(name + "/" for name in hidden)]):
            _sort(listing, root, prefix + name, name)
    listing.images.sort()
    listing.tables.sort()
    return listing


def _sort(listing: Listing, root: Path, path: str, name: str) -> None:
    """File one name among the images, the tables or what is left out."""
    suffix = os.path.splitext(name)[1].lower()
    image = suffix in SUFFIXES
    if name in _COMPANIONS or (name.startswith(".") and not image and _is_ours(name)):
        return
    if name.startswith("."):
        listing.leave_out("hidden", path)
    elif image and not _is_utf8(path):
        listing.leave_out(NOT_UTF8, path)
    elif image and not os.path.isfile(os.path.join(root, path)):
        listing.leave_out("not a regular file", path)
    elif image:
        listing.images.append(path)
    elif (suffix in TABLE_SUFFIXES or suffix in (".parquet", ".pq")) and _is_utf8(path):
        listing.tables.append(path)
    elif not _ABOUT.match(name):
        listing.leave_out(escape_name(suffix) or "without a suffix", path)


def _is_ours(name: str) -> bool:
    """Whether a hidden file or folder is one that a command of ours works with."""
    return name == f"{UNFINISHED_DATA}/" or name.endswith((".captions/", ".tmp"))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------- names in tables


class FileNames:
    r"""Index of file names, to look up a name as a table has it.

    The first of these that fits a file counts: the name itself; in one normal form (`é` in one
    character or two, `\` for `/`, a leading `./`); with other case; the end of a longer path;
    that without its suffix.

    Args:
        names: Relative POSIX paths.
        place: What holds them, for the sentence.
    """

    def __init__(self, names: Iterable[str], place: str | Path) -> None:
        self._place = place
        self._names = {*names}
        self._levels: list[dict[str, list[str]]] | None = None

    def find(self, written: str) -> str | None:
        """The file that a name means, or `None`.

        Raises:
            GloVLMError: It may mean several.
        """
        if written in self._names:
            return written
        name = plain_path(written)
        if name in self._names:
            return name
        if self._levels is None:
            self._levels = [*self._index()]
        key = name_key(written)
        for level, key_here in zip(self._levels, (key, *[key.casefold()] * 3), strict=True):
            meant = level.get(key_here, [])
            if len(meant) > 1:
                raise GloVLMError(
                    f"'{short(written)}' may mean {len(meant)} files of {self._place} "
                    f"({few(meant)}); write the whole path in its table."
                )
            if meant:
                return meant[0]
        return None

    def _index(self) -> Iterable[dict[str, list[str]]]:
        levels: list[dict[str, list[str]]] = [{}, {}, {}, {}]
        for name in sorted(self._names):
            key = name_key(name)
            levels[0].setdefault(key, []).append(name)
            folded = key.casefold()
            levels[1].setdefault(folded, []).append(name)
            parts = folded.split("/")
            for i in range(len(parts)):
                tail = "/".join(parts[i:])
                if i:
                    levels[2].setdefault(tail, []).append(name)
                levels[3].setdefault(os.path.splitext(tail)[0], []).append(name)
        return levels


def name_key(written: str) -> str:
    """File name in one normal form, see `normal_text`."""
    return "/".join(map(normal_text, plain_path(written).split("/")))


def plain_path(written: str) -> str:
    r"""Relative POSIX path as listed: `.\a\1.png` is `a/1.png`."""
    parts = written.strip().replace("\\", "/").split("/")
    return "/".join(part for i, part in enumerate(parts) if part != "." and (part or not i))


def follow_moves(
    names: Sequence[str], labels: Sequence[str], listed: Iterable[str]
) -> tuple[list[str], list[str], int]:
    """Crops that a person moved to another class's folder without a word in their table.

    A file that is not where the table says, and is the only other one of its own name, is there
    now. It takes the class of that folder (that of the rows which lie there, else the folder's
    name) where it has none, or still that of the folder which it came from.

    Args:
        names: File names in the table.
        labels: Their classes; empty where there is none.
        listed: The files that are there, as relative POSIX paths.

    Returns:
        Names and classes as they are now, and how many were moved.
    """
    there = [*listed]
    free: dict[str, list[str]] = {}
    for name in {*there} - {*names}:
        free.setdefault(name.rpartition("/")[2], []).append(name)
    missing = {*names} - {*there}
    class_of = {
        name.rpartition("/")[0]: label
        for name, label in zip(names, labels, strict=True)
        if label and name not in missing
    }
    now_names, now_labels, moved = [*names], [*labels], 0
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        places = free.get(name.rpartition("/")[2], []) if name in missing else []
        if len(places) != 1:
            continue
        before, folder = name.rpartition("/")[0], places[0].rpartition("/")[0]
        if folder != before and label in ("", class_of.get(before, before)):
            now_labels[i] = class_of.get(folder, folder.rpartition("/")[2])
        now_names[i], moved = places[0], moved + 1
    return now_names, now_labels, moved


# ----------------------------------------------------------------------------------------- splits


def split_role(name: str) -> str | None:
    """Split that a usual name means (`train`, `validation`, `test`), whatever its case."""
    return _meaning(name)[0]


def split_roles(names: Iterable[str], where: str) -> dict[str, str | None]:
    """Split of each name, `None` for other names.

    Raises:
        GloVLMError: Two of them may be one split or two, such as `test` and `holdout`.
    """
    roles: dict[str, str | None] = {}
    words: dict[str, tuple[str, str]] = {}
    for name in names:
        role, meaning = _meaning(name)
        roles[name] = role
        if role is None:
            continue
        other, before = words.setdefault(role, (name, meaning))
        if before != meaning:
            raise GloVLMError(
                f"{where}: '{other}' and '{name}' may both be the {role} part; name the parts "
                "train, validation and test, and what is none of them otherwise."
            )
    return roles


def split_notes(roles: Mapping[str, str | None]) -> list[str]:
    """What unusual split names were taken for, in one sentence."""
    unusual = [f"'{n}' is the {r} part" for n, r in roles.items() if r and n.lower() != r]
    return [f"the split is read from its names: {', '.join(unusual)}"] if unusual else []


def _meaning(name: str) -> tuple[str | None, str]:
    word = re.sub(r"[\s_.-]+", " ", normal_text(name).casefold()).strip()
    word = re.sub(rf"^({_BESIDE_A_SPLIT}) | ({_BESIDE_A_SPLIT})$", "", word).replace(" ", "")
    role, meaning = _MEANING.get(word, (None, ""))
    if role is None:
        word = re.sub(r"(set|data)$", "", word)
        role, meaning = _MEANING.get(word, (None, ""))
    return role, meaning


# --------------------------------------------------------------------------------------- patients

PARENT = "parent"
_LONGEST_NAME, _SECONDS = 4096, 2.0
_KNOWN_SHAPES = (  # of names, with what to give
    r"(TCGA-\w\w-\w{4})",
    r"SOB_[BM]_[A-Z]+[-_](\d\d-\w+?)-\d+-\d+",  # BreaKHis
    r"(C3[LN]-\d{5})",  # CPTAC
    r"(GTEX-\w+)",
    r"(?:^|/)([A-Za-z]{1,3}-?\d\d-\d{2,6})[_. -]",  # accession numbers, S-18-162
)
_LIKELY_SHAPES = (
    r"(?i)(?:^|/|_)((?:patient|pat|case|subject|subj|donor|pid|pt|slide)[_ -]?\d+)[_. -]",
    r"(?:^|/)([Pp]\d+)[_. -]",
)
_PATIENT_FOLDER = re.compile(
    r"(patient|pat|case|subject|subj|donor|pid|pt|p|slide|s|wsi)[ _-]*\d+|TCGA-\w\w-\w{4}.*",
    re.IGNORECASE,
)
_MAGNIFICATION = re.compile(r"x?\d+(\.\d+)?x?", re.IGNORECASE).fullmatch


def look_like_patients(folders: Iterable[str]) -> bool:
    """Whether folders that would be classes are called as patients or slides are."""
    return all(map(_PATIENT_FOLDER.fullmatch, folders))


def groups_from(rule: str, names: Sequence[str], labels: Sequence[str | None]) -> list[str]:
    """Patient of each image, from its folder or its name.

    Args:
        rule: `parent`, the first folder below the class's that tells images apart, or a regular
            expression that is looked for in each name, with one group or one called `patient`.
        names: Relative POSIX paths.
        labels: Class of each.

    Raises:
        GloVLMError: No regular expression, or one without such a group; names where there is no
            patient; an expression that takes too long.
    """
    ids = _parent_folders(names, labels) if rule == PARENT else _matches(rule, names)
    without = [name for name, patient in zip(names, ids, strict=True) if not patient]
    if without:
        what = "no folder below their class" if rule == PARENT else "nothing that it matches"
        raise GloVLMError(
            f"--group-from {_quoted(rule)}: {len(without)} of {len(names)} file names hold {what} "
            f"({few(without)}); correct it, or write a metadata.csv with patient_id."
        )
    return [str(patient) for patient in ids]


def propose_groups(
    names: Sequence[str], labels: Sequence[str | None]
) -> tuple[str, list[str]] | None:
    """What file names or folders seem to say of patients.

    Returns:
        A sentence, and the patients that they seem to name; `None` without any.
    """
    proposals = [
        *(_propose_shape(shape, names) for shape in _KNOWN_SHAPES),
        _propose_folders(names, labels),
        *(_propose_shape(shape, names) for shape in _LIKELY_SHAPES),
    ]
    return next(filter(None, proposals), None)


def _propose_shape(shape: str, names: Sequence[str]) -> tuple[str, list[str]] | None:
    pattern = re.compile(shape)
    ids = [match[1] if (match := pattern.search(name)) else "" for name in names]
    known = sorted({*ids} - {""})
    likely = shape in _LIKELY_SHAPES and len(known) == len(names)  # a number for each image
    if len(known) < 2 or likely or 2 * ids.count("") > len(ids):
        return None
    what = "no patient is given, and file names look like patients"
    without = ids.count("")
    if without:
        what += f", but {without} of {len(ids)} do not: write a metadata.csv with patient_id"
        return what, known
    return f"{what}: give --group-from '{shape}'", known


def _propose_folders(
    names: Sequence[str], labels: Sequence[str | None]
) -> tuple[str, list[str]] | None:
    folders = _parent_folders(names, labels)
    known = sorted({folder for folder in folders if folder})
    numbered = [name for name in known if any(c.isdigit() for c in name)]
    if len(known) < 2 or 2 * len(numbered) < len(known) or all(map(_MAGNIFICATION, known)):
        return None
    what = "no patient is given, and subfolders look like patients"
    without = folders.count(None)
    if without:
        what += f", but {without} of {len(folders)} images lie in none: put each into one"
        return what, known
    return f"{what}: give --group-from {PARENT}", known


def _parent_folders(names: Sequence[str], labels: Sequence[str | None]) -> list[str | None]:
    """First folder of each name that is neither its class, a split nor common to all."""
    folders = [name.split("/")[:-1] for name in names]
    common = 0
    for level in zip(*folders, strict=False):
        if len({*level}) > 1 or level[0] == labels[0]:
            break
        common += 1
    parents: list[str | None] = []
    for parts, label in zip(folders, labels, strict=True):
        below = [part for part in parts[common:] if part != label and not split_role(part)]
        parents.append(normal_text(below[0]) if below else None)
    return parents


def _matches(rule: str, names: Sequence[str]) -> list[str | None]:
    """What the group of a regular expression holds in each name; bounded in time."""
    import regex  # unlike `re`, it can be stopped

    counts = re.findall(r"\{(\d*)(?:,(\d*))?\}", rule)
    repeats = math.prod(max(int(n or 1) for n in pair) for pair in counts)
    if len(rule) > 500 or repeats > 1000:
        raise GloVLMError(
            "--group-from is longer than 500 characters or repeats a part more than 1,000 times: "
            "write a simpler expression."
        )
    try:
        pattern = regex.compile(rule)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise GloVLMError(
            f"--group-from {_quoted(rule)} is neither '{PARENT}' nor a regular expression "
            f"({str(error)[:200]}); give for instance '(S-\\d+-\\d+)'."
        ) from None
    if pattern.groups != 1 and "patient" not in pattern.groupindex:
        raise GloVLMError(
            f"--group-from {_quoted(rule)} has {pattern.groups} groups; expected one, around what "
            "names the patient, or one called patient: '(?P<patient>S-\\d+)'."
        )
    group = "patient" if "patient" in pattern.groupindex else 1
    end = monotonic() + _SECONDS
    ids: list[str | None] = []
    try:
        for name in names:
            match = pattern.search(name[-_LONGEST_NAME:], timeout=max(end - monotonic(), 1e-3))
            ids.append(normal_text(match[group] or "") if match else None)
    except (TimeoutError, MemoryError, RecursionError):
        raise GloVLMError(
            f"--group-from {_quoted(rule)} takes more than {_SECONDS:g} seconds over "
            f"{len(names)} names: write it without repeats inside of repeats."
        ) from None
    return ids


def _quoted(rule: str) -> str:
    return f"'{rule if len(rule) <= 80 else rule[:77] + '...'}'"
