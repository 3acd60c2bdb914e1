"""Layout of plain text in a width: tables whose numbers are never cut, and wrapped sentences."""

import re
import shutil
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells

from ..progress import shorten

__all__ = ["lay_out", "printable", "text_width", "wrap"]

LEAST_WIDTH = 40  # columns; below that nothing is laid out
_NAME = 14  # columns that a name has at least, where it must be broken
_LINES = 3  # lines of a name without a space; of a longer one the middle is left out
_GAP = "  "
# What stays in one piece: an interval, a number with its unit or sign, a word.
_PIECES = re.compile(r"\[[-+\d.,% e]+\]|\([-+\d.,% e]+\)|\S+")
_NUMBER = re.compile(r"[-+<>~]*\d[\d,._]*(?:[eE][-+]?\d+)?[%x]?[,;]?|\[[-+\d.,% e]+\]|-|")


def text_width() -> int:
    """Columns of the terminal, or `COLUMNS`; 80 where neither is known."""
    return max(shutil.get_terminal_size((80, 24)).columns, LEAST_WIDTH)


def printable(text: str) -> str:
    """Text in one line, what cannot be shown written as its number."""
    line = " ".join(text.split()) if any(c in text for c in "\n\r\t\v\f") else text
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def wrap(text: str, width: int) -> list[str]:
    """Text in lines of a width: broken between words, or within one that is longer.

    Args:
        text: One line; numbers and intervals in it are never broken.
        width: Columns, at least those of its longest number.
    """
    pieces = _PIECES.findall(text)
    if len(pieces) == 1 and cell_len(text) > _LINES * width and not _NUMBER.fullmatch(text):
        pieces = [shorten(text, _LINES * width)]
    lines: list[str] = []
    for piece in pieces:
        if lines and cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
            lines[-1] += f" {piece}"
        elif cell_len(piece) <= width or _NUMBER.fullmatch(piece):
            lines.append(piece)
        else:
            lines += _break(piece, width)
    return lines or [""]


def _break(word: str, width: int) -> list[str]:
    """Break a word, behind a sign that divides it where there is one behind its first third."""
    lines = []
    while cell_len(word) > width:
        head = chop_cells(word, width)[0] or word[0]
        cut = max((at for at, sign in enumerate(head, 1) if sign in "/\\_-.:,;="), default=0)
        cut = cut if cut > len(head) / 3 else len(head)
        lines.append(word[:cut])
        word = word[cut:]
    return [*lines, word] if word else lines


def lay_out(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[tuple[list[str], list[str]]]:
    """Lay a table out in a width.

    Where the columns do not fit beside each other, text is wrapped; where they do not fit then, the
    table goes on below, in blocks that begin with the first column.

    Args:
        header: Names of the columns.
        rows: Cells of each row, as many as there are columns.
        width: Columns of characters.

    Returns:
        Blocks, one below the other: lines of the header and of the rows, none longer than `width`
        unless a single number is.
    """
    cells = [[printable(cell) for cell in line] for line in (header, *rows)]
    # Rows are known by their first cell: it is broken only where all columns fit by that.
    columns = [_Column([line[at] for line in cells], _NAME) for at in range(len(header))]
    if sum(column.least for column in columns) + len(_GAP) * (len(columns) - 1) > width:
        columns[0] = _Column(columns[0].cells, max(_NAME, width // 3))
    blocks: list[list[int]] = []
    for at in range(len(columns)):
        if blocks:
            least = [columns[i].least for i in (*blocks[-1], at)]
            if sum(least) + len(_GAP) * (len(least) - 1) <= width:
                blocks[-1].append(at)
                continue
        blocks.append([0, at] if at else [0])
    return [_lines([columns[at] for at in block], width) for block in blocks]


class _Column:
    """Column of a table: its cells, the header first, and the widths that it can have.

    Attributes:
        most: Where nothing is wrapped.
        least: Of its longest number, and of a word of so many columns.
        is_number: Whether it is set to the right.
    """

    def __init__(self, cells: Sequence[str], word: int) -> None:
        self.cells = cells
        self.most = max(map(cell_len, cells))
        self.is_number = any(cells[1:]) and all(
            all(map(_NUMBER.fullmatch, cell.split())) for cell in cells[1:] if cell
        )
        pieces = [piece for cell in cells for piece in _PIECES.findall(cell)]
        fixed = [cell_len(piece) for piece in pieces if _NUMBER.fullmatch(piece)]
        words = max((min(cell_len(piece), word) for piece in pieces), default=1)
        self.least = max([words, *fixed])


def _lines(columns: Sequence[_Column], width: int) -> tuple[list[str], list[str]]:
    """Lines of columns side by side, as wide as they need to be if that fits."""
    room = width - len(_GAP) * (len(columns) - 1)
    widths = [column.most for column in columns]
    cap = max(widths)
    while sum(widths) > room and cap > 0:  # the widest give way first
        cap -= 1
        widths = [min(column.most, max(column.least, cap)) for column in columns]
    head, body = list[str](), list[str]()
    for at in range(len(columns[0].cells)):
        wrapped = [wrap(column.cells[at], w) for column, w in zip(columns, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            parts = [
                _pad(cell[i] if i < len(cell) else "", w, column.is_number)
                for cell, w, column in zip(wrapped, widths, columns, strict=True)
            ]
            (body if at else head).append(_GAP.join(parts).rstrip())
    return head, body


def _pad(text: str, width: int, right: bool) -> str:
    fill = " " * max(width - cell_len(text), 0)
    return fill + text if right else text + fill
