"""What `make docs` makes from the code: `docs/settings.md`, and the tables of pages beside it.

The tables of backbones and methods stand between two comments of a page that a person writes.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import write_text
from ..lab.pretraining_config import PretrainConfig
from ..runs.config import TrainConfig
from ..settings import Declared, declarations
from ..slides.config import SlideConfig
from ..slides.finder.config import FindConfig, FindTrainConfig
from ..slides.mil.config import MilConfig

_HEADER = ("setting", "type", "default", "bounds", "meaning")
_TOP = """# Settings

Made from the declarations in the code by `make docs`; a test holds the two equal. Each command
takes its settings as options (`--test-fraction 0.3`) and from a YAML file (`--config run.yaml` with
`test_fraction: 0.3`); options win. From Python they are arguments of the class that the heading
names. Every number is finite.
"""


def render_reference() -> str:
    """Render the page: a table for each command, method and aggregator, in Markdown."""
    from ..methods import METHODS
    from ..rendering import table
    from ..runs.study import StudyConfig
    from ..slides.mil.aggregators import AGGREGATORS
    from ..training.config import AdaptConfig

    parts = [_TOP]

    def add(title: str, config: type, sentence: str = "") -> None:
        rows = list(_rows(declarations(config)))
        body = str(table(rows, _HEADER)) if rows else "None."
        parts.extend([title, *([sentence] if sentence else []), body])

    add("## `glovlm train`: `TrainConfig`", TrainConfig)
    add("## `adapt`: `AdaptConfig`", AdaptConfig)
    add("## `glovlm study --config`: `StudyConfig`", StudyConfig)
    add("## `glovlm slide`: `SlideConfig`", SlideConfig)
    add("## `glovlm find train`: `FindTrainConfig`", FindTrainConfig)
    add("## `glovlm find run`: `FindConfig`", FindConfig)
    add("## `glovlm mil`: `MilConfig`", MilConfig)
    add("## `glovlm pretrain`: `PretrainConfig`", PretrainConfig)
    parts.append("## Methods: `--set KEY=VALUE`, or `method_config:`")
    for method in METHODS.values():
        add(f"### `{method.name}`", method.Config)
    parts.append("## Aggregators of `glovlm mil`: `--set KEY=VALUE`, or `aggregator_config:`")
    for kind in AGGREGATORS.values():
        add(f"### `{kind.name}`", kind.Config)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _rows(table: dict[str, Declared]) -> Iterator[list[str]]:
    """Rows of a config's table: required settings first, then as declared."""
    for declared in sorted(table.values(), key=lambda declared: not declared.required):
        name, default = declared.name, declared.default_text
        if declared.required:
            default = "required"
        yield [f"`{name}`", declared.expected, default, declared.bounds, declared.help]


def render_backbones() -> str:
    """Render the known backbones as a Markdown table, with a link to the page of each."""
    from ..backbones import BACKBONES
    from ..rendering import Markdown, table

    header = ("name", "what", "licence", "access", "input", "scale", "stains", "pretrained on")
    whats = {"dual": "image and text", "vision": "image; pair it with a text", "text": "text"}
    rows = []
    for row in BACKBONES.values():
        stains = row.stains if isinstance(row.stains, str) else ", ".join(row.stains)
        restrictions = ", ".join(row.restrictions)
        at = f", {row.mpp:g} micrometres a pixel" if row.mpp is not None else ""
        rows.append([
            Markdown(f"[`{row.name}`]({row.page})" if row.page else f"`{row.name}`"),
            whats[row.kind],
            row.license + (f" ({restrictions})" if restrictions else ""),
            "ask on its page" if row.gated else "in the package" if row.page is None else "open",
            f"{row.image_size} px" if row.image_size else "",
            "" if row.kind == "text" else f"{row.magnification}{at}",
            "" if row.kind == "text" else stains or "none",
            row.pretrained_on,
        ])  # fmt: skip
    return str(table(rows, header))


def render_methods() -> str:
    """Render the methods as a Markdown table: what each learns, needs and may choose by labels."""
    from ..methods import METHODS
    from ..rendering import table

    header = ("method", "family", "learns", "class texts", "validation can", "source")
    chooses = {"none": "", "search": "search a setting", "early stopping": "stop early"}
    rows = [
        [
            f"`{method.name}`",
            method.family + (", transductive" if method.transductive else ""),
            method.trains,
            "needed" if method.needs_text else "",
            chooses[method.validation],
            method.citation,
        ]
        for method in METHODS.values()
    ]
    return str(table(rows, header))


TABLES: dict[str, Callable[[], str]] = {
    "backbones.md": render_backbones,
    "choosing-a-method.md": render_methods,
}
_BEGIN, _END = "<!-- made by make docs -->", "<!-- end of what is made -->"


def fill_page(text: str, made: str) -> str:
    """Put a table in the place of the one between a page's two comments."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{made}\n\n{_END}{after}"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), render_reference())
    for name, render in TABLES.items():
        page = Path(sys.argv[1]).parent / name
        write_text(page, fill_page(page.read_text(encoding="utf-8"), render()))
