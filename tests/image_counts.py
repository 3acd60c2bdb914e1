"""Counts of how often image files are opened and decoded while something runs."""

import builtins
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import ImageFile


class Counts:
    """How often each image file was opened, and how many were decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads, self.decodes = Counter[str](), 0
        plain, load = builtins.open, ImageFile.ImageFile.load

        def opened(file: Any, *arguments: Any, **options: Any) -> Any:
            name = str(file)
            self.reads[name] += name.endswith((".png", ".jpg"))
            return plain(file, *arguments, **options)

        def loaded(image: Any) -> Any:
            self.decodes += bool(image.tile)
            return load(image)

        for module in (builtins, io):
            monkeypatch.setattr(module, "open", opened)
        monkeypatch.setattr(ImageFile.ImageFile, "load", loaded)

    def of(self, work: Callable[[], object]) -> tuple[Counter[int], int]:
        """How many files were opened how often, and how many images were decoded."""
        self.reads.clear()
        self.decodes = 0
        work()
        return Counter(n for n in self.reads.values() if n), self.decodes
