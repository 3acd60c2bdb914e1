"""Atomic file writes."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: whole or not at all."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
