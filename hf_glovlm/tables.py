"""Tables of a person: CSV files with a header, and the spelling of what stands in them."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import GloVLMError, nearest
from .files import read_text

MOST_BYTES = 2**28  # a row an image or slide: millions of these fit
_SEPARATORS = re.compile(r"[\s_./\\\u002d\u2010-\u2015\u2212]+")


@dataclass(frozen=True)
class Table:
    """Table: its header and its rows.

    Attributes:
        path: The file.
        header: Column names as written.
        names: Column names in one spelling, see `column_name`.
        rows: Cells of each row that is not blank, as many as the header has names.
        lines: Number in the file of each row's last line, counted from 1.
    """

    path: Path
    header: list[str]
    names: list[str]
    rows: list[list[str]]
    lines: list[int]

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

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Rows as mappings by the columns' names in one spelling."""
        return (dict(zip(self.names, row, strict=True)) for row in self.rows)


def read_table(
    path: str | Path, what: str = "a CSV file", *, fill: bool = True, strip: bool = True
) -> Table:
    """Read a CSV file with a header.

    Args:
        path: The file, UTF-8.
        what: What it should be, with its article, for the sentence.
        fill: Whether a row may have fewer fields than the header; the others are empty then.
        strip: Whether blanks around a cell are taken off.

    Raises:
        GloVLMError: No such file, not CSV in UTF-8, a row of another width (names its line), or a
            column that stands there twice.
    """
    path = Path(path)
    stream = io.StringIO(read_text(path, what, most=MOST_BYTES), newline="")
    reader = csv.reader(stream)
    rows, lines = [], []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            short = len(header) - len(cells)
            if short < 0 or (short and not fill):
                raise GloVLMError(
                    f"{path}, line {reader.line_num}: expected {len(header)} fields, found "
                    f"{len(cells)}; put quotes around values that hold a comma."
                )
            rows.append([*(map(str.strip, cells) if strip else cells), *[""] * short])
            lines.append(reader.line_num)
    except csv.Error as error:
        raise GloVLMError(f"{path} is not a readable CSV file ({error}); save it again.") from None
    names = [column_name(name) for name in header]
    twice = [name for name, n in Counter(names).items() if n > 1 and name]
    if twice:
        raise GloVLMError(f"{path} has the column {twice[0]} twice; keep one of them.")
    return Table(path, header, names, rows, lines)


def column_name(name: str) -> str:
    """Column name in one spelling: `Patient ID` and `patient-id` are `patient_id`."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def normal_text(text: str) -> str:
    """Text in one normal form: NFC, without invisible characters and blanks around.

    Names that look the same are the same afterwards: `é` typed as one character or as two, a
    zero-width space, a byte-order mark, a no-break space.
    """
    composed = unicodedata.normalize("NFC", text)
    seen = "".join(c for c in composed if unicodedata.category(c) != "Cf")
    return " ".join(seen.split())


def spelling(text: str) -> str:
    """Spelling key: two ids or labels of one key are most likely one, spelled twice.

    Case, width of letters, invisible characters, the kind of separator and leading zeros do not
    count: `P001`, `p1`, `P-01` and `p 1` share a key; `1-1` and `11` do not.
    """
    folded = unicodedata.normalize("NFKC", normal_text(text)).casefold()
    joined = _SEPARATORS.sub("-", folded).strip("-")
    joined = re.sub(r"(?<=[^\W\d])-(?=\d)|(?<=\d)-(?=[^\W\d])", "", joined)
    return re.sub(r"\d+", lambda run: run[0].lstrip("0") or "0", joined)
