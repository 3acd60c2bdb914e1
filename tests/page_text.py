"""Text of an HTML page, and what stands in it, without a browser."""

import re
from html.parser import HTMLParser
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=http://x.example/a onerror='b()'>",
    "{{ 7 * 7 }} {% raw %} {# c #}",
    "</style></title><!-- & &lt; &#60;",
    "شكل \u202eabc\u202c \x00\x1b \ud800",
)


class Page(HTMLParser):
    """Elements, addresses and text of a page, that of its charts apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.drawn: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in ("style", "script", "svg", "details"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside[-1:] == [tag]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1:]
        if inside == ["svg"]:
            self.drawn.append(data)
        elif inside not in (["style"], ["script"]):
            self.texts.append(data)


def values(part: Any) -> list[Any]:
    """All plain values in JSON, keys of states among them."""
    if isinstance(part, dict):
        return [*part, *(value for own in part.values() for value in values(own))]
    if isinstance(part, list | tuple):
        return [value for own in part for value in values(own)]
    return [part]
