"""XML of other people: elements of a file without entities, of bounded size."""

import re
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ...errors import GloVLMError

MOST_ELEMENTS = 2_000_000  # 1.3 GB once read; a hundred glomeruli have some 50,000 points
_DEEPEST = 64
_FIRST = re.compile(rb"<([A-Za-z_][\w.:-]*)")


def is_xml(content: bytes) -> bool:
    """Whether a file's first mark is that of XML, in UTF-8 or UTF-16."""
    start = (
        content[:64].removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").lstrip(b"\xff\xfe \t\r\n")
    )
    return start.startswith(b"<")


def first_element(content: bytes) -> str:
    """Name of the outermost element, read off the beginning of a file; empty where none shows."""
    text = re.sub(rb"<!--.*?-->|<\?.*?\?>", b"", content.replace(b"\0", b""), flags=re.DOTALL)
    match = _FIRST.search(text)
    return match[1].decode() if match else ""


def parse_xml(content: bytes, path: Path) -> Element:
    """Parse XML that declares no document type, and so no entities, which could grow or fetch.

    Raises:
        GloVLMError: No XML, a document type, or too many or too deeply nested elements.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    depth = number = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, number
        depth, number = depth + 1, number + 1
        if depth > _DEEPEST or number > MOST_ELEMENTS:
            what = "nested too deeply" if depth > _DEEPEST else f"more than {MOST_ELEMENTS:,}"
            raise GloVLMError(f"{path}: its elements are {what}: that is no file of glomeruli.")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise GloVLMError(
            f"{path} declares a document type (DOCTYPE), which may stand for other files or for "
            "endless text: remove that line."
        )

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        if isinstance(error, GloVLMError):
            raise
        raise GloVLMError(f"{path} is not XML ({error}); export the annotations again.") from None
    root: Element = builder.close()
    return root


def numbers_of(element: Element, names: tuple[str, str] = ("X", "Y")) -> list[float]:
    """Attributes of a point as numbers; what is none is NaN, which no outline takes."""
    values = []
    for name in names:
        try:
            values.append(float(element.get(name, "nan").replace(",", ".")))
        except ValueError:
            values.append(float("nan"))
    return values
