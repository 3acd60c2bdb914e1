"""Command-line options: their kinds, the YAML file under them, their values checked."""

import re
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typer import Argument, Option

from ..errors import GloVLMError

Text = str | None
Texts = list[str] | None
Switch = bool | None
Whole = int | None
Real = float | None
JsonFlag = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
DeviceFlag = Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")]
BatchFlag = Annotated[int, Option(min=1, help="Images encoded at a time.")]
ScaleFlag = Annotated[bool, Option(help="Accept images at a very different scale.")]
ModelArgument = Annotated[str, Argument(help="A run's folder, its model/, or a Hub id.")]


def read_config(kind: Any, given: Mapping[str, Any], own_key: str = "method_config") -> Any:
    """Configuration of a command: its YAML file, the options over it, each value of its type.

    Args:
        kind: A dataclass with `from_mapping`.
        given: The command's parameters: `config` (the file), `settings` (`KEY=VALUE`, which go
            under `own_key`), and fields of the configuration where they are not `None`.
        own_key: The field of the method's own settings.
    """
    from ..data.terminology import read_yaml

    values = read_yaml(given["config"]) if given["config"] else {}
    beside = ("config", "settings", "as_json")
    values |= {k: v for k, v in given.items() if k not in beside and v is not None}
    if isinstance(values.get("shots"), str):
        values["shots"] = _shots(values["shots"])
    if isinstance(values.get("prior"), str) and "=" in values["prior"]:
        values["prior"] = _fractions(values["prior"])
    own = values.get(own_key) or {}
    if isinstance(own, Mapping):  # if not, its type is refused below
        own = {**own, **dict(map(_setting, given["settings"] or []))}
        values[own_key] = {key: _number(value) for key, value in own.items()}
    return kind.from_mapping(_typed(values, get_type_hints(kind)))


def _setting(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`, the value as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise GloVLMError(f"Expected --set KEY=VALUE, found '{text}'.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise GloVLMError(f"The value of --set {text} is no YAML: put quotes around it.") from None


def _shots(text: str) -> int | dict[str, int]:
    """Read `8`, or `viable=8,sclerosed=4`."""
    if re.fullmatch(r"-?\d+", text.strip()):
        return int(text)
    shots: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not name.strip() or not re.fullmatch(r"\d+", number.strip()) or name.strip() in shots:
            raise GloVLMError(
                f"Expected --shots N or --shots CLASS=N,CLASS=N with each class once, found "
                f"'{text}'."
            )
        shots[name.strip()] = int(number)
    return shots


def _fractions(text: str) -> dict[str, float]:
    """Read `viable=0.8,sclerosed=0.2`."""
    try:
        parts = [part.rpartition("=") for part in text.split(",")]
        return {name.strip(): float(number) for name, _, number in parts}
    except ValueError:
        raise GloVLMError(
            f"Expected --prior CLASS=FRACTION,CLASS=FRACTION or em, found '{text}'."
        ) from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; a person means the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip()):
        return float(value)
    return value


def _typed(values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Check each value against the type of its field; unknown names are left to the config."""
    return {k: _as(k, v, hints[k]) if k in hints else v for k, v in values.items()}


def _as(name: str, value: Any, hint: Any) -> Any:
    members = (hint,) if get_origin(hint) in (None, Literal, dict) else get_args(hint)
    kinds = {get_origin(member) or member for member in members}
    value = _number(value) if float in kinds else value
    if Literal in kinds and value is False:  # YAML reads a bare `no` so
        value = "no"
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds or (Literal in kinds and isinstance(value, str)):
        numbers = value.values() if name == "shots" and isinstance(value, dict) else ()
        if all(type(number) is int for number in numbers):
            return value
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    words |= {Literal: "text", dict: "a mapping of names to numbers", NoneType: "nothing"}
    expected = " or ".join(words[kind] for kind in words if kind in kinds)
    raise GloVLMError(f"Setting '{name}' must be {expected}; found {value!r}.")
