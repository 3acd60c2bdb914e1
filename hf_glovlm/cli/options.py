"""Command-line options: those of a command's own, and those made of a config's declarations.

A command whose settings are a config class is decorated with `options_of(ItsConfig)`. It then has
`--config FILE.yaml`, one option for each setting, and is called with the finished config.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer import Argument, Option

from ..data.columns import Columns
from ..errors import GloVLMError
from ..runtimes import PRECISION_HELP, RUNTIME_HELP
from ..settings import GROUPS, Declared, Settings, declarations, read_yaml, read_yaml_value, shown

Text = str | None
Texts = list[str] | None
Switch = bool | None
Whole = int | None
Real = float | None
JsonFlag = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
DeviceFlag = Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")]
BatchFlag = Annotated[int, Option(min=1, max=65_536, help="Images encoded at a time.")]
PrecisionFlag = Annotated[str, Option(help=PRECISION_HELP)]
RuntimeFlag = Annotated[str, Option(help=RUNTIME_HELP)]
ScaleFlag = Annotated[bool, Option(help="Accept images at a very different scale.")]
StainFlag = Annotated[Text, Option(help="Stain of images whose stain no column states.")]
ModelArgument = Annotated[str, Argument(help="A run's folder, its model/, or a Hub id.")]
_OF_DATA = declarations(Columns)
ImageColumn = Annotated[Text, Option(help=_OF_DATA["image_column"].help)]
LabelColumn = Annotated[Text, Option(help=_OF_DATA["label_column"].help)]
GroupColumn = Annotated[Text, Option(help=_OF_DATA["group_column"].help)]
GroupFrom = Annotated[Text, Option(help=_OF_DATA["group_from"].help.replace("`", ""))]
ConfigFlag = Annotated[Path | None, Option(help="YAML of these settings; options win over it.")]


def options_of(
    config: type[Settings], *, own: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: give a command the options of a config.

    Below `@options_of(TrainConfig)`, `def train(checked: TrainConfig, as_json: JsonFlag = False)`
    becomes a command with an option for each setting of `TrainConfig`; the parameters behind the
    first stay options of their own. No option has a default of its own, so that one in the YAML
    file counts; the true default stands in the help.

    Args:
        config: The config class.
        own: The setting that holds settings of a method: `--set KEY=VALUE`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        others = list(inspect.signature(command).parameters.values())[1:]
        parameters = [*_parameters(config, own), *(_keyword(o.name, o) for o in others)]

        def run(**given: Any) -> None:
            beside = {other.name: given.pop(other.name) for other in others}
            command(read_config(config, given, own), **beside)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__module__ = command.__module__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _parameters(config: type[Settings], own: str) -> Iterator[inspect.Parameter]:
    """Parameters of a command, as Typer reads them: required ones first, then by group."""
    table = declarations(config)
    for declared in table.values():
        if declared.argument:
            yield _keyword(declared.name, _option(declared))
    rest = [declared for declared in table.values() if not declared.argument]
    for declared in sorted(rest, key=lambda d: (not d.required, GROUPS.index(d.group))):
        name = "settings" if declared.name == own else declared.name
        yield _keyword(name, _option(declared, own))
    yield _keyword("config", ConfigFlag)


def _option(declared: Declared, own: str = "") -> Any:
    """Annotation of a command's parameter for a setting."""
    text = declared.help
    if declared.choices and not declared.form:
        text += f" One of {', '.join(declared.choices)}."
    if declared.required and not declared.argument:
        text += " (required, here or in the YAML)"
    elif not declared.required and declared.name != own:
        text += f" (default: {declared.default_text})"
    text = text.replace("`", "")
    hints = {get_origin(hint) or hint for hint in (declared.hint, *get_args(declared.hint))}
    kind = next((k for k in (bool, int, float) if k in hints and not declared.form), str)
    many = declared.name == own or list in hints
    hint: Any = list[str] | None if many else kind | None
    if declared.argument:
        return Annotated[hint, Argument(help=text, show_default=False)]
    options: dict[str, Any] = {"help": text, "show_default": False}
    if not declared.required:
        options["rich_help_panel"] = declared.group
    if declared.name == own:
        return Annotated[hint, Option("--set", metavar="KEY=VALUE", **options)]
    return Annotated[hint, Option(**options)]


def _keyword(name: str, like: Any) -> inspect.Parameter:
    """Parameter by keyword, from another one or from an annotation; without a value it is None."""
    if isinstance(like, inspect.Parameter):
        return like.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=like)


# --------------------------------------------------------------------------- from options to values


def read_config(kind: type[Settings], given: Mapping[str, Any], own: str = "") -> Any:
    """Config of a command: its YAML file, and the options over it.

    Args:
        kind: The config class.
        given: The command's parameters: `config` (the file), `settings` (`KEY=VALUE`, which go
            under `own`), and settings where they are not `None`.
        own: The setting that holds settings of a method.
    """
    values = read_yaml(given["config"]) if given.get("config") else {}
    beside = ("config", "settings")
    values |= {k: v for k, v in given.items() if k not in beside and v is not None}
    table = declarations(kind)
    if "shots" in table and isinstance(values.get("shots"), str):
        values["shots"] = read_shots(values["shots"])
    if "prior" in table and isinstance(values.get("prior"), str) and "=" in values["prior"]:
        values["prior"] = _fractions(values["prior"])
    if given.get("settings"):
        kept = values.get(own) or {}
        if isinstance(kept, Mapping):  # if not, the config refuses it
            values[own] = {**kept, **dict(map(_setting, given["settings"]))}
    return kind.from_mapping(values)


def _setting(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`, the value as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise GloVLMError(f"Expected --set KEY=VALUE, found {shown(text)}.")
    return key.strip(), read_yaml_value(value, f"--set {shown(text)}")


def read_shots(text: str | None) -> int | dict[str, int] | None:
    """Shots of an option: `8`, or `viable=8,sclerosed=4`.

    Raises:
        GloVLMError: It is neither.
    """
    if text is None:
        return None
    if re.fullmatch(r"-?\d{1,18}", text.strip(), re.ASCII):
        return int(text)
    return _by_class(
        text, int, r"\d{1,18}", "Expected --shots N or --shots CLASS=N,CLASS=N with each class once"
    )


def _fractions(text: str) -> dict[str, float]:
    """Read `viable=0.8,sclerosed=0.2`."""
    number = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)"
    expected = "Expected --prior CLASS=FRACTION,CLASS=FRACTION with each class once, or em"
    return _by_class(text, float, number, expected)


def _by_class(text: str, kind: Callable[[str], Any], number: str, expected: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, given = (piece.strip() for piece in part.rpartition("="))
        if not name or name in values or not re.fullmatch(number, given, re.ASCII):
            raise GloVLMError(f"{expected}, found {shown(text)}.")
        values[name] = kind(given)
    return values
