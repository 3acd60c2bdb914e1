"""The README and the pages of the documentation, as what can be checked: code blocks, commands.

A command is a line of a ```bash block, a `%run -m hf_glovlm` of a notebook, or, where it need not
be whole, code within a sentence that begins with `glovlm`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# What a fence may be besides code: parts of the site.
DIRECTIVES = ("{toctree}", "{eval-rst}", "{include}", "{house}")
NOTEBOOK = "%run -m hf_glovlm "


class Block(NamedTuple):
    """A fenced block: its page, the line on which it begins, its language and its text."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[Path]:
    """Every page that a person reads first: the README, how to contribute, and all of docs."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "spaces/glomeruli/README.md")]
    return [*filter(Path.is_file, top), *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page as the repository names it."""
    return page.relative_to(ROOT).as_posix()


def _tokens(page: Path) -> list[Token]:
    text = re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"),
                  flags=re.DOTALL)  # fmt: skip
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order; cells of a notebook are Python."""
    found = []
    for token in _tokens(page):
        if token.type not in ("fence", "code_block") or token.info.startswith(DIRECTIVES):
            continue
        info, text = token.info.split(), token.content
        language = info[0] if info else ""
        if language == "{code-cell}":
            language = "python"
            text = re.sub(r"\A(:\w+:.*\n)+", "", text)
        found.append(Block(name_of(page), (token.map or [0])[0] + 1, language, text))
    return found


def spans(page: Path) -> list[str]:
    """The code within the sentences of a page."""
    return [
        child.content
        for token in _tokens(page)
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def shell_lines(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block, as words without comments and assignments."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        for word in [*lexer, "\n"]:
            if word not in ("&&", "||", "|", ";", "&", "\n"):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def commands_of(block: Block, backbone: str = "") -> list[list[str]]:
    """The arguments of each `glovlm` of a block, in order.

    Args:
        block: A block.
        backbone: What stands in for `vinid/plip`, which is on the Hub.
    """
    found = []
    if block.language == "bash":
        found = [words[1:] for words in shell_lines(block.text) if words[0] == "glovlm"]
    elif block.language == "python":
        lines = [line for line in block.text.splitlines() if line.startswith(NOTEBOOK)]
        found = [shlex.split(line.removeprefix(NOTEBOOK)) for line in lines]
    return [[backbone if backbone and w == "vinid/plip" else w for w in words] for words in found]


def commands(page: Path, backbone: str = "") -> list[list[str]]:
    """The same of a whole page."""
    return [words for block in blocks(page) for words in commands_of(block, backbone)]
