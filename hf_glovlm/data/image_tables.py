"""Tables beside image files: what the `metadata.csv` of a folder says of single images."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..tables import read_table
from .columns import MASK
from .listing import name_key, plain_path
from .readers import images_column, metadata_of


def listed_cells(images: Iterable[Path], name: str) -> list[str | None]:
    """Cells of image files in a `metadata.csv` in their folder or in the one above.

    Args:
        images: The files.
        name: The column.

    Returns:
        The cell of each, numbers with a decimal point; `None` where that file has none.
    """
    return [None if cell is None else cell[1] for cell in _find_cells(images, name)]


def listed_masks(images: Iterable[Path]) -> list[Path | None]:
    """Masks of image files, from the column `mask` of such a table; `None` where there is none."""
    masks: list[Path | None] = []
    for cell in _find_cells(images, MASK):
        name = "" if cell is None else plain_path(cell[1])
        inside = bool(name) and not name.startswith("/") and ".." not in name.split("/")
        place = cell[0] / name if cell is not None and inside else None
        masks.append(place if place is not None and place.is_file() else None)
    return masks


def _find_cells(images: Iterable[Path], name: str) -> list[tuple[Path, str] | None]:
    """Folder of the table and cell of each image."""
    read = cache(_read_metadata)
    cells: list[tuple[Path, str] | None] = []
    for image in images:
        folders = (image.parent, image.parent.parent)
        keys = [
            (folder, read(folder, name), name_key(image.relative_to(folder).as_posix()))
            for folder in folders
        ]
        listed = ((folder, table[key]) for folder, table, key in keys if key in table)
        cells.append(next(listed, None))
    return cells


def _read_metadata(folder: Path, name: str) -> dict[str, str]:
    """Cells of a column by file name in one normal form, from a folder's table of images."""
    path = metadata_of(folder)
    if path is None:
        return {}
    table = read_table(path, "a table of images")
    images, place = images_column(table), table.index(name)
    if images is None or place is None:
        return {}
    return {name_key(row[images]): table.number(row[place]) for row in table.rows}
