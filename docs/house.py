"""Picture of the house: the floors and rooms of `tests/test_architecture.py`."""

import ast
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RULES = Path(__file__).resolve().parent.parent / "tests" / "test_architecture.py"


def read_floors() -> dict[int, list[str]]:
    """The rooms of each floor, from the ground up."""
    for node in ast.parse(RULES.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return {floor: sorted(rooms) for floor, rooms in ast.literal_eval(node.value).items()}
    raise LookupError(f"{RULES} has no table FLOORS")


def draw_house(floors: dict[int, list[str]]) -> str:
    """Draw the floors as rows of boxes, which wrap where the page is narrow."""
    rows = [
        f"<li value={floor}>{''.join(f'<code>{escape(room)}</code>' for room in rooms)}</li>"
        for floor, rooms in sorted(floors.items(), reverse=True)
    ]
    return f'<ol class="house">{"".join(rows)}</ol>'


class House(SphinxDirective):
    """The picture, where a page asks for it."""

    def run(self) -> list[Any]:
        self.env.note_dependency(RULES)
        return [nodes.raw("", draw_house(read_floors()), format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("house", House)
    return {"parallel_read_safe": True}
