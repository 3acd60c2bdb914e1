"""Tables of a person: CSV or JSON lines in the dialects that programs write, and their spelling."""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import GloVLMError, nearest
from .files import read_content

MOST_BYTES = 2**28  # a row an image or slide: millions of these fit
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".jsonl", ".ndjson"})
_JSON_LINES = frozenset({".jsonl", ".ndjson"})
_BETWEEN = re.compile(r"[\s_./\\\u002d\u2010-\u2015\u2212]+")
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# A sign of text in another encoding than Windows-1252, which takes almost any bytes: letters that
# no Western word has in a row, a capital inside a word, a sign that no table holds.
_NOT_WESTERN = re.compile(
    r"[À-ÖØ-öø-ÿŒœŠšŽžŸ]{4}|[a-zß-öø-ÿœšž][À-ÖØ-ÞŒŠŽŸ]"
    r"|[^\x00-\x7fÀ-ÖØ-öø-ÿŒœŠšŽžŸ\xa0°²³¹±µ×÷·–—‘’‚“”„…€£§®©™½¼¾«»ªº¿¡%\xad]"
)
_DECIMAL_COMMA = re.compile(r"([-+]?\d*),(\d+)", re.ASCII)


@dataclass(frozen=True)
class Table:
    """Table: its header and its rows.

    Attributes:
        path: The file.
        header: Column names as written.
        names: Column names in one spelling, see `column_name`.
        rows: Cells of each row that is not blank, as many as the header has names.
        lines: Number in the file of each row's last line, counted from 1.
        separator: What stands between two cells; empty for JSON lines.
        encoding: Of the text, as Python calls it.
    """

    path: Path
    header: list[str]
    names: list[str]
    rows: list[list[str]]
    lines: list[int]
    separator: str = ","
    encoding: str = "utf-8"

    @property
    def dialect(self) -> str:
        """Dialect: `with semicolons, in cp1252`; empty for commas or JSON lines in UTF-8."""
        parts = [f"with {SEPARATORS[self.separator]}"] if self.separator not in ("", ",") else []
        return ", ".join(
            [*parts, *([f"in {self.encoding}"] if "utf-8" not in self.encoding else [])]
        )

    def index(self, *names: str) -> int | None:
        """Place of the first of these columns that is there, `None` without any."""
        return next((self.names.index(name) for name in names if name in self.names), None)

    def need(self, *names: str) -> int:
        """Place of the first of these columns that is there.

        Raises:
            GloVLMError: None is; names what there is.
        """
        place = self.index(*names)
        if place is None:
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise GloVLMError(
                f"{self.path} has no column {names[0]}{others}; its header is: "
                f"{', '.join(self.header) or 'empty'}.{nearest(names[0], self.names)}"
            )
        return place

    def column(self, *names: str) -> list[str]:
        """Cells of the first of these columns that is there; raises as `need`."""
        place = self.need(*names)
        return [row[place] for row in self.rows]

    def number(self, cell: str) -> str:
        """Number with a decimal point: `0,25` is `0.25`; any other text as it is.

        Three digits behind the comma (`1,250`) may be thousands: only in a table with semicolons,
        whose writer needs the comma for decimals, are they not.
        """
        match = _DECIMAL_COMMA.fullmatch(cell.strip())
        if match is None:
            return cell
        before, behind = match.groups()
        thousands = len(behind) == 3 and before.strip("+-0") != ""
        return cell if thousands and self.separator != ";" else f"{before}.{behind}"

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Rows as mappings by the columns' names in one spelling."""
        return (dict(zip(self.names, row, strict=True)) for row in self.rows)


def read_table(
    path: str | Path, what: str = "a CSV file", *, fill: bool = True, strip: bool = True
) -> Table:
    """Read a table with a header: CSV in any usual dialect, or JSON lines (`.jsonl`).

    Cells stand between commas, semicolons, tabs or bars, by what fits the header and the rows; the
    text is UTF-8, UTF-16 or, where it is neither, Windows-1252 (cp1252).

    Args:
        path: The file.
        what: What it should be, with its article, for the sentence.
        fill: Whether a row may have fewer fields than the header; the others are empty then.
        strip: Whether blanks around a cell are taken off.

    Raises:
        GloVLMError: No such file, no table of text, an encoding or dialect that may be one or
            another, a row of another width (names its line), or a column that stands there twice.
    """
    path = Path(path)
    text, encoding = _decode(read_content(path, what, most=MOST_BYTES), path)
    if path.suffix.lower() in _JSON_LINES:
        header, rows, lines = _read_json_lines(text, path)
        separator = ""
    else:
        separator, parsed = _parse(text, path)
        header = [cell.strip() for cell in parsed[0][1]] if parsed else []
        rows, lines = _rectangular(parsed[1:], len(header), separator, path, fill)
    if strip:
        rows = [[*map(str.strip, cells)] for cells in rows]
    names = [column_name(name) for name in header]
    twice = [name for name, n in Counter(names).items() if n > 1 and name]
    if twice:
        raise GloVLMError(f"{path} has the column {twice[0]} twice; keep one of them.")
    return Table(path, header, names, rows, lines, separator, encoding)


def _decode(content: bytes, path: Path) -> tuple[str, str]:
    """Text of a table, and its encoding."""
    if content[:4] == b"PK\x03\x04" or content[:4] == b"\xd0\xcf\x11\xe0":
        raise GloVLMError(f"{path} is a spreadsheet, not text: save it as CSV in UTF-8.")
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    start = content[:4096]
    if marked is None and b"\0" in start:  # UTF-16 without its mark: every other byte is 0
        even, odd = start[::2].count(0), start[1::2].count(0)
        few = len(start) // 8  # of Western text nearly half are
        marked = "utf-16-le" if odd > 4 * even + few else None
        marked = "utf-16-be" if even > 4 * odd + few else marked
    try:
        encoding = marked or "utf-8"
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if marked is not None:
            raise GloVLMError(
                f"{path} is not {marked} text (byte {error.start}) although it begins as such: "
                "save it as UTF-8."
            ) from None
        encoding, text = "cp1252", _decode_western(content, path, error.start)
    if "\0" in text:
        raise GloVLMError(
            f"{path} holds a NUL character (line {text[: text.index(chr(0))].count(chr(10)) + 1}), "
            "so it is no table of text: save it as CSV in UTF-8."
        )
    return text.removeprefix("\ufeff"), encoding


def _decode_western(content: bytes, path: Path, place: int) -> str:
    """Windows-1252 text; refuses what is more likely another encoding."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        text = "\x81"
    # Beside a byte that is no UTF-8 stand letters that are: two encodings in one file.
    mixed = any(ord(c) > 127 for c in content.decode("utf-8", "ignore"))
    if mixed or _NOT_WESTERN.search(text):
        raise GloVLMError(
            f"{path} is not UTF-8 text (byte {place}), and it cannot be determined in which other "
            "encoding it was written: save it as UTF-8."
        )
    return text


Record = tuple[int, list[str]]  # its last line, counted from 1, and its cells


def _parse(text: str, path: Path) -> tuple[str, list[Record]]:
    """Separator and records of a CSV text: the header first, blank rows left out."""
    given = re.match(r"sep=([,;|\t])\r?\n", text)  # what Excel writes to say so
    if given:
        return given[1], _records(text[given.end() :], given[1], path, first=2)
    headers: dict[str, list[str]] = {}
    for separator in SEPARATORS:
        try:
            records = _reader(text, separator)
            headers[separator] = next((cells for cells in records if _holds_text(cells)), [])
        except csv.Error:
            headers[separator] = []
    wide = {s: len(cells) for s, cells in headers.items() if len(cells) > 1}
    if len(wide) < 2:
        separator = next(iter(wide), ",")
        return separator, _records(text, separator, path)
    fitting = {}
    for separator, width in wide.items():
        try:
            records = _records(text, separator, path)
        except GloVLMError:
            continue
        if all(len(cells) == width for _, cells in records):
            fitting[separator] = records
    among = fitting or wide
    most = max(wide[separator] for separator in among)
    best = [separator for separator in among if wide[separator] == most]
    if len(best) > 1:
        listed = " or ".join(SEPARATORS[separator] for separator in best)
        raise GloVLMError(
            f"{path}: it cannot be determined whether {listed} separate the cells of its header "
            f"'{text.strip().splitlines()[0][:80]}': put quotes around cells that hold the other."
        )
    return best[0], fitting.get(best[0]) or _records(text, best[0], path)


def _holds_text(cells: Sequence[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _reader(text: str, separator: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _records(text: str, separator: str, path: Path, first: int = 1) -> list[Record]:
    reader = _reader(text, separator)
    records: list[Record] = []
    try:
        for cells in reader:
            if _holds_text(cells):
                records.append((reader.line_num + first - 1, cells))
    except csv.Error as error:
        line = reader.line_num + first - 1
        raise GloVLMError(
            f"{path} is not a readable CSV file ({error}, line {line}); save it again."
        ) from None
    return records


def _rectangular(
    records: Sequence[Record], width: int, separator: str, path: Path, fill: bool
) -> tuple[list[list[str]], list[int]]:
    """Rows as wide as the header, and their lines; empty cells behind its last one are dropped."""
    rows = []
    for line, cells in records:
        kept = cells
        while len(kept) > width and not kept[-1].strip():
            kept = kept[:-1]
        short = width - len(kept)
        if short < 0 or (short and not fill):
            raise GloVLMError(
                f"{path}, line {line}: expected {width} fields, found {len(kept)}; put quotes "
                f"around values that hold {_one(separator)}."
            )
        rows.append([*kept, *[""] * short])
    return rows, [line for line, _ in records]


def _one(separator: str) -> str:
    return f"a {SEPARATORS[separator].removesuffix('s')}"


def _read_json_lines(text: str, path: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows and lines of JSON lines: one object a line, its keys the columns."""
    objects, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_once)
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a pair of surrogates
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error) or type(error).__name__
            raise GloVLMError(
                f"{path}, line {number}: expected one JSON object, found: {reason[:200]}; write "
                "one object a line."
            ) from None
        if not isinstance(value, dict):
            raise GloVLMError(
                f"{path}, line {number}: expected one JSON object, such as "
                f'{{"file_name": "1.png", "label": "a"}}; found a {type(value).__name__}.'
            )
        objects.append({key: _json_cell(cell) for key, cell in value.items()})
        lines.append(number)
    header = list(dict.fromkeys(key for row in objects for key in row))
    return header, [[row.get(key, "") for key in header] for row in objects], lines


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} twice")
    return dict(pairs)


def _json_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> Any:
    """A value as a cell of a CSV file that a spreadsheet may open.

    A text that would be a formula there (it begins with `=`, `+`, `-`, `@`, a tab or a carriage
    return, OWASP: CSV injection) is written behind an apostrophe; numbers stay numbers.
    """
    begins = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if begins else value


def column_name(name: str) -> str:
    """Column name in one spelling: `Patient ID` and `patient-id` are `patient_id`."""
    return re.sub(r"[\s-]+", "_", normal_text(name)).casefold()


@lru_cache(2**16)  # of the same rows they are asked again and again
def normal_text(text: str) -> str:
    """Text in one normal form: NFC, without invisible characters and blanks around.

    Names that look the same are the same afterwards: `é` typed as one character or as two, a
    zero-width space, a byte-order mark, a no-break space.
    """
    composed = unicodedata.normalize("NFC", text)
    seen = "".join(c for c in composed if unicodedata.category(c) != "Cf")
    return " ".join(seen.split())


@lru_cache(2**16)
def spelling(text: str) -> str:
    """Spelling key: two ids or labels of one key are most likely one, spelled twice.

    Case, width of letters, invisible characters, the kind of separator and leading zeros do not
    count: `P001`, `p1`, `P-01` and `p 1` share a key; `1-1` and `11` do not. A number that a table
    wrote as `1.0` is `1`.
    """
    folded = unicodedata.normalize("NFKC", normal_text(text)).casefold()
    folded = re.sub(r"^(\d+)\.0+$", r"\1", folded)
    joined = _BETWEEN.sub("-", folded).strip("-")
    joined = re.sub(r"(?<=[^\W\d])-(?=\d)|(?<=\d)-(?=[^\W\d])", "", joined)
    return re.sub(r"\d+", lambda run: run[0].lstrip("0") or "0", joined)
