"""Reference of the public names, made of the source text, so that nothing heavy is imported.

`.. public:: run` writes signature and docstring of `hf_glovlm.run`; with `:members:` also those of
a class's own public methods.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

PACKAGE = Path(__file__).resolve().parent.parent / "hf_glovlm"
Definition = ast.FunctionDef | ast.ClassDef


@cache
def rooms() -> dict[str, str]:
    """The room of each public name, as the package's root lists them."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES":
            table = ast.literal_eval(node.value)
            return {name: room for room, names in table.items() for name in names}
    raise LookupError("hf_glovlm/__init__.py has no table _MODULES")


def find_definition(name: str) -> Definition:
    """The definition of a public name, `run` or `explain.HeatMap`."""
    *given, last = name.split(".")
    room = PACKAGE.joinpath(*(given or rooms()[last].split(".")))
    for place in (room, room.parent):  # a room may bring in what a file beside it defines
        files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        found = [
            node
            for text in (file.read_text("utf-8") for file in files)
            if f"def {last}(" in text or f"class {last}" in text
            for node in ast.parse(text).body
            if isinstance(node, Definition) and node.name == last
        ]
        if len(found) == 1:
            return found[0]
    raise LookupError(f"{name} is defined {len(found)} times in {room}")


def signature(node: Definition) -> str:
    """What stands behind the name: arguments and result; of a class those of `__init__`."""
    if isinstance(node, ast.ClassDef):
        starts = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        return signature(starts[0]).partition(" -> ")[0] if starts else ""
    arguments = node.args
    for kind in (arguments.posonlyargs, arguments.args):
        kind[:] = [one for one in kind if one.arg not in ("self", "cls")]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returned}".replace("'", "")


def describe(node: Definition, name: str, config: Any, members: bool) -> Iterator[str]:
    """The lines of reStructuredText of a definition."""
    decorators = {ast.unparse(one) for one in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        error = any("Error" in ast.unparse(base) for base in node.bases)
        kind = "exception" if error else "class"
    else:
        kind = "function" if "." in name else "method"
    if "property" in decorators:
        kind = "property"
    yield f".. py:{kind}:: {name}{'' if kind == 'property' else signature(node)}"
    if "classmethod" in decorators:
        yield "   :classmethod:"
    yield ""
    docstring = GoogleDocstring(ast.get_docstring(node) or "", config, what=kind, name=name)
    yield from (f"   {line}" for line in docstring.lines())
    yield ""
    for one in node.body if members else ():
        if isinstance(one, ast.FunctionDef) and one.name[0] != "_" and ast.get_docstring(one):
            yield from (f"   {line}" for line in describe(one, one.name, config, False))


class Public(SphinxDirective):
    """`.. public:: NAME`."""

    required_arguments = 1
    option_spec = {"members": directives.flag}  # noqa: RUF012

    def run(self) -> list[Any]:
        name = self.arguments[0]
        node = find_definition(name)
        lines = describe(node, f"hf_glovlm.{name}", self.config, "members" in self.options)
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("public", Public)
    return {"parallel_read_safe": True}
