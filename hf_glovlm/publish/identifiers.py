"""Identifiers of patients, slides, files and places, searched for in whatever leaves.

Two searches: for what the run's own data hold, spelled in any way, and for what looks like the
name of a case wherever it comes from (accession numbers, dates, TCGA barcodes, paths).
"""

import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from ..backbones.saved import first_line_of
from ..errors import GloVLMError
from ..files import check_fields, read_json, write_json
from ..settings import read_yaml
from ..tables import normal_text

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "identifiers.json"
# Columns of the data that name somebody or something, whatever stands in them.
COLUMNS = (
    "file_name", "patient_id", "case_id", "slide_id", "glomerulus_id", "group_id", "block",
    "institution", "reader",
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+|\d+")
# A digest is one word; in the letters and digits of one, short ids would occur by chance.
_DIGEST = re.compile(r"(?<![^\W_])(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)(?:[0-9a-f]{16,})(?![^\W_])")
_WINDOW = 24  # words of the longest identifier that is searched for in all its spellings
# Words before a number or letter that make it somebody's.
_SUBJECTS = frozenset(
    {
        *("patient", "pat", "pt", "case", "subject", "donor", "person", "mr", "mrs", "ms", "dr"),
        *("herr", "frau", "slide", "block", "specimen", "biopsy", "glomerulus", "group", "reader"),
        *("annotator", "institution", "hospital", "file", "image", "picture", "mrn", "id", "nr"),
        "no",
    }
)
# Words before a number that make it a grade, and what stands behind one that counts or measures.
_GRADES = frozenset(
    {
        *("grade", "grades", "class", "classes", "stage", "type", "types", "score", "level", "top"),
        *("pattern", "gleason", "isup", "phase", "category", "ckd", "kdigo", "banff", "who"),
        *("figo", "tier", "step", "rank", "version"),
    }
)
_UNIT = re.compile(r"\s?(?:[%×]|(?:x|[µμumn]?m|px|mg|ml|to|of)\b|mic|pix|year|week|day)")
# The second search. All shapes are looked for in what a person wrote, the first ones everywhere.
PATH = r"(?<![\w./:])(?:~?/|[A-Za-z]:[\\/])[\w.-]+[\\/]|(?<!\w)(?:file:/|\\\\\w)"
_SHAPES = {
    "a path": PATH,
    "a TCGA barcode": r"(?i)\btcga[-_ .]?[0-9a-z]{2}[-_ .][0-9a-z]{4}(?![^\W_])",
    "an e-mail address": r"(?i)[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b",
    "a date": (
        r"(?<![\d.])(?:(?:19|20)\d\d([-./_])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])"
        r"|(?:0?[1-9]|[12]\d|3[01])([-./])(?:0?[1-9]|[12]\d|3[01])\2(?:(?:19|20)\d\d|[/]?\d\d))"
        r"(?![\d.])"
    ),
    "an accession number": (
        r"(?i)(?<![^\W_])[a-z]{1,3}[-_ ]?(?:19|20)?\d\d[-_/]\d{3,7}(?!\d)"
        r"|(?<![\d.])(?:19|20)?\d\d[-/](?!(?:19|20)\d\d(?!\d))\d{4,7}(?![\d.])"
    ),
    "a record number": r"(?<![\d.,])\d{7,}(?![\d.,])",
}
# Absolute paths of any system, file names of images: what no sentence of a card or report may hold.
PRIVATE = re.compile(
    r"(?<![\w.:/])(?:~?/|[A-Za-z]:[\\/]|\\\\)\S|\w\.(?:png|jpe?g|tiff?|bmp|svs|ndpi|mrxs|scn)\b",
    re.I,
)
WITHHELD = "[withheld: it names a patient, a file or a place]"
_ANYWHERE = ("a path", "a TCGA barcode")


class Word(NamedTuple):
    """Word of a text in its folded spelling, and where it stands."""

    text: str
    start: int
    end: int


def fold(text: str) -> str:
    """Text without what spellings differ in: case, accents, width, URL and HTML escapes."""
    if "%" in text:
        text = unquote(unquote(text))
    if "&" in text:
        text = html.unescape(text)
    decomposed = unicodedata.normalize("NFKD", normal_text(text))
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()


def _words(folded: str) -> list[Word]:
    """Runs of letters and runs of digits, these without leading zeros."""
    words, digests = [], [match.span() for match in _DIGEST.finditer(folded)]
    for match in _WORD.finditer(folded):
        start, end = match.span()
        while digests and digests[0][1] <= start:
            del digests[0]
        if digests and start >= digests[0][0]:
            if start > digests[0][0]:
                continue
            end = digests[0][1]
        run = folded[start:end]
        if run.isdecimal():
            run = run.lstrip("0") or "0"
            run = "".join(str(unicodedata.decimal(c)) for c in run)
        words.append(Word(run, start, end))
    return words


@lru_cache(maxsize=1)
def _own_words() -> frozenset[tuple[str, ...]]:
    """One to three words in a row of the texts that the package itself writes into cards."""
    from ..backbones import BACKBONES
    from ..data import terminology
    from ..methods import METHODS

    package = Path(__file__).parents[1]
    texts = [path.read_text("utf-8") for path in (package / "templates").glob("*.j2")]
    texts.append(Path(terminology.__file__).with_suffix(".yaml").read_text("utf-8"))
    for row in BACKBONES.values():
        texts.append(f"{row.name} {row.hub_id} {row.citation} {row.license}")
    texts += [f"{method.name} {method.citation}" for method in METHODS.values()]
    windows: set[tuple[str, ...]] = set()
    for text in texts:
        words = [word.text for word in _words(fold(text))]
        windows |= {tuple(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words))}
    return frozenset(windows)


@dataclass(frozen=True)
class Identifiers:
    """Identifiers of a run: names of patients, slides, files and places.

    A name counts in any spelling: case, accents, leading zeros and what stands between its letters
    and digits do not matter, so `Zimmermann_Anneliese` is found in `zimmermann%20anneliese`, and
    `483905` in `pat483905x`, but `P1` not in `P12`. How far a name is searched for depends on how
    much it says:

    * Anything that is longer than three letters and digits (numbers: four digits), and no word of
      the package's own texts: everywhere, in values, keys and file names.
    * A shorter one (`7`, `P1`): in what a person wrote (prompts, class and display names, stain,
      scanner, name of the data, reason), as a whole word that is no grade, count of a unit or part
      of a decimal number (`grade 3`, `20x`, `0.7`); elsewhere behind a word such as `patient`.
    * A word of everyday (`a`, a folder `images`, a file `12.png`): behind such a word only.

    Args:
        names: What columns of the data hold.
        hashes: SHA-256 of further groups, where nothing but these is known.
        files: Paths of images below the data's folder.
        places: Absolute paths of folders.
        labels: Class names, which folders may bear.
    """

    names: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    places: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()

    @cached_property
    def _known(self) -> dict[tuple[str, ...] | str, tuple[str, str]]:
        """Name and reach (see `_reach`) by folded words, and by all of them joined."""
        known: dict[tuple[str, ...] | str, tuple[str, str]] = {}
        labels = {fold(label) for label in self.labels}

        def add(name: str, reach: str = "all") -> None:
            words = tuple(word.text for word in _words(fold(name)))
            if not words or len(words) > _WINDOW:
                return
            own = _reach(words, name)
            if own in ("literal", "short") and fold(name) in labels:
                own = "rare"
            reach = max(own, reach, key=_REACHES.index)
            joined = "".join(words)
            keys: list[tuple[str, ...] | str] = [words]
            for key in [*keys, joined] if len(joined) >= _LONG else keys:
                if key not in known or _REACHES.index(reach) < _REACHES.index(known[key][1]):
                    known[key] = (name, reach)

        for name in self.names:
            add(name)
        for file in self.files:
            path = PurePosixPath(file)
            add(file)
            add(path.name)
            add(path.stem, "rare" if _is_everyday(path.stem) or path.stem.isdecimal() else "all")
            for part in path.parts[:-1]:
                if fold(part) not in labels:
                    add(part, "rare" if _is_everyday(part) else "all")
        return known

    @cached_property
    def _most(self) -> int:
        """Most words of a name; one word may be spelled as two or three."""
        return max((len(key) for key in self._known if isinstance(key, tuple)), default=0) + 2

    def find(self, text: str, *, by_hand: bool = False) -> str | None:
        """First identifier in a text.

        Args:
            text: The text.
            by_hand: Whether a person wrote it, so that short names count in it.
        """
        for place in self.places:
            if place in text:
                return place
        if self.hashes and (named := self._find_hashed(text, by_hand)):
            return named
        known, most = self._known, self._most
        folded = fold(text) if known else ""
        words = _words(folded)
        for i in range(len(words)):
            joined = ""
            for j in range(i, min(len(words), i + most)):
                joined += words[j].text
                keys: list[tuple[str, ...] | str] = [tuple(word.text for word in words[i : j + 1])]
                for key in [*keys, joined] if len(joined) >= _LONG else keys:
                    name, reach = known.get(key, ("", ""))
                    if name and _counts(folded, words, i, j, name, reach, by_hand):
                        return name
        return None

    def find_entry(self, entry: str) -> str | None:
        """Identifier that is an entry of a vocabulary: one with a digit, or of several words.

        The words of a vocabulary are nobody's, so single names without a digit do not count.
        """
        joined = "".join(word.text for word in _words(fold(entry.replace("</w>", ""))))
        name = self._known.get(joined, ("",))[0] if len(joined) >= _LONG else ""
        several = len(joined) > 9 and len(_words(fold(name))) > 1
        return name if several or (name and re.search(r"\d", joined)) else None

    def _find_hashed(self, text: str, by_hand: bool) -> str | None:
        """First group of which only the hash is known, as one to three whole words."""
        words = [word.rstrip(".") for word in re.findall(r"[\w.-]+", text)]
        for count in (1, 2, 3):
            for i in range(len(words) - count + 1):
                named = " ".join(words[i : i + count])
                folded = tuple(word.text for word in _words(fold(named)))
                reach = _reach(folded, named) if folded else "rare"
                counts = reach in ("all", "literal") or (by_hand and reach == "short")
                if counts and sha256(named.encode()).hexdigest() in self.hashes:
                    return named
        return None


_REACHES = ("all", "literal", "short", "rare")
_LONG = 6  # letters and digits from which what stands between them does not matter


def _reach(words: tuple[str, ...], name: str) -> str:
    """How far a name is searched for: `all`, `short` or `rare` as `Identifiers` states it.

    `literal` is `all` as the name is written, `short` in other spellings: `P001` and `p 1`.
    """
    joined, own = "".join(words), words in _own_words()
    if not re.search(r"\d", joined):
        return "rare" if own or len(joined) < 3 else "short" if len(joined) == 3 else "all"
    least = 4 if joined.isdecimal() else 3
    if own or len(joined) > least:
        return "short" if own else "all"
    return "literal" if len(re.sub(r"[\W_]", "", fold(name))) > least else "short"


def _is_everyday(name: str) -> bool:
    """Whether a file's or folder's name is a word in small letters, such as `images`."""
    return name.isalpha() and name.islower()


def _counts(
    folded: str, words: list[Word], i: int, j: int, name: str, reach: str, by_hand: bool
) -> bool:
    """Whether a name that stands in a text counts there, see `Identifiers`."""
    if reach == "all" or (i and words[i - 1].text in _SUBJECTS):
        return True
    start, end = words[i].start, words[j].end
    if reach == "literal" and folded[start:end] == fold(name):
        return True
    if not by_hand or reach == "rare":
        return False
    number = i == j and words[i].text.isdecimal()
    decimal = re.search(r"\d(?:[.,]|\s?[+/]\s?)$", folded[:start])  # also a sum of grades: 3+4
    decimal = decimal or re.match(r"[.,]\d", folded[end:])
    graded = i > 0 and words[i - 1].text in _GRADES
    return not (number and (decimal or graded or _UNIT.match(folded, end)))


def find_shape(text: str, *, by_hand: bool = False) -> str | None:
    """What in a text looks like a path, a TCGA barcode, or, by hand, a date or a case number.

    Returns:
        The kind and the passage, such as `a date ('1940-05-03')`.
    """
    for kind, shape in _SHAPES.items():
        if (by_hand or kind in _ANYWHERE) and (match := re.search(shape, text)):
            return f"{kind} ('{match.group().strip()}')"
    return None


# ----------------------------------------------------------------------------------- what is read

_BY_HAND = frozenset(
    {
        *("prompts", "id2label", "label2id", "classes", "class_names", "stain", "scanner"),
        "stains",
        "trained_stains",
    }
)
_BY_HAND_FIELDS = frozenset({"data.name", "data.hub_id"})


class Text(NamedTuple):
    """Text in a file: the field that holds it, and whether a person wrote it."""

    field: str
    text: str
    by_hand: bool = False


def texts_of(value: Any, name: str = "", by_hand: bool = False) -> Iterator[Text]:
    """Texts of plain values, the keys among them.

    Args:
        value: Plain values.
        name: Of the field that holds them.
        by_hand: Whether a person wrote them; known of some fields by their names.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            field_name = f"{name}.{key}" if name else str(key)
            written = by_hand or key in _BY_HAND or field_name in _BY_HAND_FIELDS
            yield Text(field_name, str(key), by_hand and not name.endswith("id2label"))
            yield from texts_of(part, field_name, written)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from texts_of(part, f"{name}.{i}", by_hand)
    elif isinstance(value, str):
        yield Text(name, value, by_hand)


def refuse_named(file: str, texts: Iterable[Text], forbidden: Identifiers) -> None:
    """Refuse texts that name somebody.

    Args:
        file: What holds them.
        texts: The texts.
        forbidden: The identifiers.

    Raises:
        GloVLMError: Names the file, the field, and the identifier.
    """
    for name, text, by_hand in texts:
        place = f" in '{name}'" if name else ""
        if identifier := forbidden.find(text, by_hand=by_hand):
            raise GloVLMError(
                f"Nothing was published: {file} names '{identifier}'{place}, which is a patient, a "
                "file or a folder of the run. Rename the class, the prompt or the text that holds "
                "it, and train again."
            )
        if shape := find_shape(text, by_hand=by_hand):
            raise GloVLMError(
                f"Nothing was published: {file} holds what looks like {shape}{place}. "
                "Rename the class, the prompt or the text that holds it, and train again."
            )


def without_names(value: Any, forbidden: Identifiers, name: str = "", by_hand: bool = False) -> Any:
    """Plain values in which `WITHHELD` stands in place of each text that names somebody.

    Args:
        value: Plain values, as `texts_of` takes them.
        forbidden: The identifiers.
        name: Of the field that holds them.
        by_hand: Whether a person wrote them.

    Raises:
        GloVLMError: A key, such as the name of a class, names somebody.
    """
    if isinstance(value, dict):
        kept = {}
        for key, part in value.items():
            field_name = f"{name}.{key}" if name else str(key)
            if isinstance(key, str) and forbidden.find(key, by_hand=by_hand):
                raise GloVLMError(
                    f"The name '{key}' in '{name}' is one of a patient, a file or a folder of the "
                    "run, which no report may hold: rename the class and train again."
                )
            written = by_hand or key in _BY_HAND or field_name in _BY_HAND_FIELDS
            kept[key] = without_names(part, forbidden, field_name, written)
        return kept
    if isinstance(value, list | tuple):
        return [
            without_names(part, forbidden, f"{name}.{i}", by_hand) for i, part in enumerate(value)
        ]
    if not isinstance(value, str):
        return value
    named = PRIVATE.search(value) or find_shape(value) or forbidden.find(value, by_hand=by_hand)
    return WITHHELD if named else value


def write_identifiers(folder: Path, rows: "Dataset") -> None:
    """Write down what a run's data hold that names somebody; the file never leaves.

    Args:
        folder: The run's folder.
        rows: All rows of its data.
    """
    from ..data.folder import column

    held = {
        name: sorted({str(value) for value in column(rows, name) if value is not None})
        for name in COLUMNS
        if name in rows.column_names
    }
    write_json(folder / FILE, held, ensure_ascii=False)


def read_identifiers(folder: Path, results: Mapping[str, Any]) -> tuple[Identifiers, str | None]:
    """Read what the data of a finished run hold that names somebody.

    Args:
        folder: The run's folder.
        results: Its results.

    Returns:
        The identifiers, and what of them is not known, in a sentence.

    Raises:
        GloVLMError: The files that hold them are gone or damaged.
    """
    from ..inference import Predictions

    names: set[str] = set()
    files: set[str] = set()
    listed = (folder / FILE).is_file()
    if listed:
        content = read_json(folder / FILE)
        check_fields(folder / FILE, content, dict.fromkeys(content, (list,)))
        files |= {*map(str, content.pop("file_name", ()))}
        names |= {str(value) for values in content.values() for value in values}
    if (folder / "predictions.parquet").is_file():
        predictions = Predictions.load(folder / "predictions.parquet")
        files |= {*predictions.file_names}
        names |= {*(predictions.groups or ())}
    if (folder / "episodes.json").is_file():
        content = read_json(folder / "episodes.json")
        check_fields(folder / "episodes.json", content, {"draws": (list,)})
        for draw in content["draws"]:
            check_fields(folder / "episodes.json", {"draws": draw}, {"draws": (dict,)})
            files |= {*_strings([draw.get(side) for side in _SIDES])}
            names |= {*_strings([draw.get("test_groups"), draw.get("calibration_groups")])}
    gone = [n for n in ("predictions.parquet", "episodes.json") if not (folder / n).is_file()]
    if not listed and gone:
        raise GloVLMError(
            f"The run in {folder} no longer holds {' and '.join(gone)}, which name its patients "
            "and files, so that what leaves cannot be searched for them: restore a copy, or train "
            "it again."
        )
    settings = read_yaml(folder / "config.yaml")
    check_fields(folder / "config.yaml", settings, {"data": (str,), "output_dir": (str,)})
    places = [str(Path.home()), str(folder), *_strings(settings)]
    hashes = set(_strings(results["data"].get("support_groups_sha256")))
    hashes -= {sha256(name.encode()).hexdigest() for name in names | files}
    identifiers = Identifiers(
        names=frozenset(names - files),
        hashes=frozenset(hashes),
        files=frozenset(files),
        places=frozenset(p for p in places if Path(p).is_absolute() and len(p) > 1),
        labels=frozenset(results["per_class"]),
    )
    if listed or not hashes:
        return identifiers, None
    return identifiers, (
        f"The run has no {FILE}, as an earlier version wrote it: of {len(hashes)} groups that it "
        "learned from the exact name alone was searched for, and of its data no further column."
    )


def identifiers_of(source: str | Path) -> Identifiers:
    """Identifiers of the run that a model is of, where its results lie beside it.

    Args:
        source: A run's folder, its `model/`, or anything else, of which nothing is known.

    Raises:
        GloVLMError: The files that hold them are gone or damaged.
    """
    folder = Path(source).expanduser()
    folder = folder.parent if folder.name == "model" else folder
    if not (folder / "results.json").is_file() or not (folder / "config.yaml").is_file():
        return Identifiers()
    results = read_json(folder / "results.json")
    check_fields(folder / "results.json", results, {"data": (dict,), "per_class": (dict,)})
    try:
        return read_identifiers(folder, results)[0]
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(f"The run in {folder} cannot be read: {first_line_of(error)}") from error


_SIDES = ("support", "validation", "calibration")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
