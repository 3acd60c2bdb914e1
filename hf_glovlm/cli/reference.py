"""Reference of all settings, `docs/settings.md`: made of their declarations by `make docs`."""

import sys
from collections.abc import Iterator
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


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), render_reference())
