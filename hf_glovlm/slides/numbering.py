"""Numbers in place of names: which slide and case of an output folder has which.

The table knows slides by the digest of their bytes and cases by a slow, salted one of their names,
as record numbers are short enough to be tried out. It holds no name.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import GloVLMError
from ..files import digest_value, read_json, write_json
from .files.wsi import describe_slide

NUMBERS = "numbers.json"


@dataclass
class Numbers:
    """Numbers of slides and cases, kept in the output folder: one content keeps its number.

    Attributes:
        salt: Of the digests of cases.
        slides: Number of each slide by its digest.
        cases: Number of each case by its digest.
        least: What further slides are numbered from.
    """

    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    slides: dict[str, int] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    least: int = 1
    _paths: dict[int, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Numbers":
        """Read the numbers of an output folder; without a table, none that is in use is given.

        Raises:
            GloVLMError: The table is damaged.
        """
        used = [place.stem.removeprefix("slide_") for place in folder.glob("*/slide_*")]
        least = 1 + max((int(number) for number in used if number.isdecimal()), default=0)
        path = folder / NUMBERS
        if not path.is_file():
            return cls(least=least)
        content = read_json(path)
        slides, cases, salt = (content.get(name) for name in ("slides", "cases", "salt"))
        whole = isinstance(slides, dict) and isinstance(cases, dict) and isinstance(salt, str)
        if not whole or any(
            type(n) is not int or n < 1 for n in (*slides.values(), *cases.values())
        ):
            raise GloVLMError(
                f"'{path}' is damaged: restore a copy, or write to another folder, where slides "
                "are numbered anew."
            )
        return cls(salt, slides, cases, least)

    def write(self, folder: Path) -> None:
        """Write them into an output folder."""
        content = {"salt": self.salt, "slides": self.slides, "cases": self.cases}
        write_json(folder / NUMBERS, content)

    def of_slide(self, path: Path) -> str:
        """`slide_001` of a slide; one that cannot be read gets a number for this time only.

        Raises:
            GloVLMError: Another path of this run is the same slide.
        """
        key = _digest_slide(path)
        number = self.slides.get(key) or self._next()
        if number in self._paths:
            raise GloVLMError(
                f"{self._paths[number]} and {path} are the same slide, byte by byte: give it once."
            )
        self._paths[number] = path
        if key:
            self.slides[key] = number
        return f"slide_{number:03d}"

    def find_slide(self, path: Path) -> str | None:
        """`slide_001` of a slide that has a number; `None` of any other file."""
        number = self.slides.get(_digest_slide(path))
        return None if number is None else f"slide_{number:03d}"

    def of_case(self, name: str) -> str:
        """`case_001` of a case."""
        salt = self.salt.encode()
        key = hashlib.scrypt(name.encode(), salt=salt, n=2**14, r=8, p=1, dklen=16).hex()
        return f"case_{self.cases.setdefault(key, 1 + max(self.cases.values(), default=0)):03d}"

    def _next(self) -> int:
        return max([self.least - 1, *self.slides.values(), *self._paths]) + 1


def _digest_slide(path: Path) -> str:
    """Digest of a slide's bytes, whatever it is called; nothing of one that cannot be read."""
    try:
        return digest_value([part["digest"] for part in describe_slide(path, dated=False)])
    except OSError:
        return ""
