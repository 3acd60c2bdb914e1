"""Atomic writes: a file or folder appears whole or not at all; nothing else calls `os.replace`."""

import csv
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic replacement: write to the fresh path, which takes the target's place in the end.

    The fresh path lies beside the target and is used by no other writer. It may become a file, or
    a folder where the target is none or empty. After an error it is removed and the target stays.

    Args:
        path: The target; the folder around it is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)


def move_over(source: Path, target: Path) -> None:
    """Move a finished file or folder to where an earlier one may stand, which goes."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with the line ends that the text has."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a JSON file atomically; options are those of `json.dumps`, by default `indent=1`."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n")


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
