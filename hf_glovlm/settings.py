"""Settings: each declared once, with its type, bounds, default and help, and validated in one way.

A config is a frozen dataclass below `Settings` whose fields are made with `setting`. Everything
else comes from these declarations: the check of every value, the YAML file, the options of the
command line (`cli/options.py`), `docs/settings.md` and the `Args:` of the class. To add a setting,
add its field; rules over several settings stand in the class's `check`.
"""

import dataclasses
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from .errors import GloVLMError, nearest
from .files import read_text

T = TypeVar("T")
GROUPS = (  # headings of settings, in the order of help and documentation
    "Data", "Images", "Labels", "Split", "Method", "Tiles", "Objects", "Slide label", "Training",
    "Calibration", "Output", "Machine", "Settings",
)  # fmt: skip
SEEDS = 2**32 - 1  # the largest seed that numpy's generator of the libraries takes
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_MISFIT = object()
_DEEPEST = 32  # levels of nested lists and mappings


# ----------------------------------------------------------------------------------- declarations


@dataclass(frozen=True)
class Declared:
    """Declaration of a setting.

    Attributes:
        name: The field; `_` is `-` on the command line.
        hint: Its type.
        default: `MISSING` where it must be given.
        help: What it does, one or two sentences.
        group: Under which heading help and documentation list it.
        above: Every number in it is larger.
        least: Every number in it is this or larger.
        below: Every number in it is smaller.
        most: Every number in it is this or smaller.
        form: What is expected, in words; by default the type's.
        unset: What holds where the default is `None`.
        argument: Whether a command takes it as an argument rather than as an option.
    """

    name: str
    hint: Any
    default: Any
    help: str = ""
    group: str = "Settings"
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    form: str = ""
    unset: str = ""
    argument: bool = False

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it takes, where it takes certain ones alone."""
        literal = [m for m in _members(self.hint) if get_origin(m) is Literal]
        return tuple(name for member in literal for name in get_args(member))

    @property
    def expected(self) -> str:
        """The type in words, without bounds."""
        return self.form or _words(self.hint)

    @property
    def bounds(self) -> str:
        """The bounds in signs: `> 0`, `0 ... 1`; empty without any."""
        if self.least is not None and self.most is not None:
            return f"{self.least:,} ... {self.most:,}"
        signs = ((">", self.above), ("≥", self.least), ("<", self.below), ("≤", self.most))
        return ", ".join(f"{sign} {bound:,}" for sign, bound in signs if bound is not None)

    @property
    def default_text(self) -> str:
        """The default as a person would write it; empty where there is none."""
        if self.required:
            return ""
        words = {None: self.unset, True: "on", False: "off", "": "nothing"}
        if self.default is None or isinstance(self.default, bool | str):
            return words.get(self.default, str(self.default))
        if isinstance(self.default, dict | list | tuple):
            return ", ".join(map(str, self.default)) or "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def read(self, value: Any, label: str = "") -> Any:
        """Value of the declared type, within its bounds; `1e-3` as text is the number.

        Args:
            value: What was given.
            label: What to call the setting in an error; its name by default.

        Raises:
            GloVLMError: It is of another type, not finite, out of bounds, or no choice.
        """
        label = label or self.name
        read = self._as(self.hint, value, label, 0)
        if read is not _MISFIT:
            return read
        if self.choices and not self.form and isinstance(value, str | bool):
            known = ", ".join(self.choices)
            near = nearest(str(value), self.choices)
            raise GloVLMError(f"{label} must be one of {known}; found {shown(value)}.{near}")
        raise GloVLMError(f"{label} must be {self.expected}; found {shown(value)}.")

    def _as(self, hint: Any, value: Any, label: str, depth: int) -> Any:
        """The value as one of the types of a hint, or `_MISFIT`."""
        if depth > _DEEPEST:
            raise GloVLMError(f"{label} is nested more than {_DEEPEST} deep: make it flat.")
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()  # a number of numpy or torch
        for member in _members(hint):
            read = self._as_member(member, value, label, depth)
            if read is not _MISFIT:
                return read
        return _MISFIT

    def _as_member(self, hint: Any, value: Any, label: str, depth: int) -> Any:
        kind = get_origin(hint) or hint
        if kind is Literal:
            # YAML reads a bare `no` as false.
            value = "no" if value is False and "no" in self.choices else value
            return value if isinstance(value, str) and value in get_args(hint) else _MISFIT
        if kind is bool:
            return value if isinstance(value, bool) else _MISFIT
        if kind is int:
            return self._number(value, label) if type(value) is int else _MISFIT
        if kind is float:
            value = _from_exponent(value)
            return float(self._number(value, label)) if type(value) in (int, float) else _MISFIT
        if kind is str:
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            return self._text(value, label) if isinstance(value, str) else _MISFIT
        if isinstance(kind, type) and issubclass(kind, Mapping):
            return self._mapping(hint, value, label, depth)
        if kind in (list, tuple, Sequence):
            return self._list(hint, value, label, depth)
        if hint is Any:
            return self._anything(value, label, depth)
        # A type that cannot be asked, of a config that others made, is theirs to check.
        return _MISFIT if isinstance(kind, type) and not isinstance(value, kind) else value

    def _mapping(self, hint: Any, value: Any, label: str, depth: int) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return _MISFIT
        inner = get_args(hint)[1] if get_args(hint) else Any
        read = {}
        for key, part in value.items():
            inside = f"{label}: {key}" if inner is Any else label
            read[self._text(key, label)] = self._as(inner, part, inside, depth + 1)
        return _MISFIT if any(part is _MISFIT for part in read.values()) else read

    def _list(self, hint: Any, value: Any, label: str, depth: int) -> Any:
        if not isinstance(value, list | tuple):
            return _MISFIT
        inner = get_args(hint)[0] if get_args(hint) else Any
        read = [self._as(inner, part, label, depth + 1) for part in value]
        if any(part is _MISFIT for part in read):
            return _MISFIT
        return tuple(read) if get_origin(hint) is tuple else read

    def _anything(self, value: Any, label: str, depth: int) -> Any:
        """Settings of somebody else, which checks them: here only that YAML and JSON hold them."""
        if isinstance(value, Mapping):
            return self._mapping(dict[str, Any], value, label, depth)
        if isinstance(value, list | tuple):
            return self._list(list[Any], value, label, depth)
        value = _from_exponent(value)
        if isinstance(value, bool | NoneType):
            return value
        if isinstance(value, int | float):
            return self._number(value, label)
        if isinstance(value, str):
            return self._text(value, label)
        raise GloVLMError(
            f"{label} must be text, numbers, lists or mappings; found {type(value).__name__}."
        )

    def _text(self, value: str, label: str) -> str:
        if "\0" in value:
            raise GloVLMError(
                f"{label} must be text without a null character; found {shown(value)}."
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of another encoding, which no file of a run can hold
            raise GloVLMError(f"{label} must be text in UTF-8; found {shown(value)}.") from None
        if self.required and not value.strip():
            raise GloVLMError(f"{label} must not be empty: give it.")
        return value

    def _number(self, value: int | float, label: str) -> int | float:
        if isinstance(value, float) and not math.isfinite(value):
            raise GloVLMError(f"{label} must be a finite number; found {value}.")
        most = self.most if self.most is not None else sys.float_info.max
        if value > most:
            raise GloVLMError(f"{label} must be at most {most:,}; found {shown(value)}.")
        low = self.above is not None and not value > self.above
        low = low or (self.least is not None and value < self.least)
        low = low or value < -sys.float_info.max
        if low or (self.below is not None and not value < self.below):
            parts = [
                *([f"above {self.above:g}"] if self.above is not None else []),
                *([f"{self.least:g} or more"] if self.least is not None else []),
                *([f"below {self.below:g}"] if self.below is not None else []),
            ]
            limits = " and ".join(parts) or "a number that fits a float"
            raise GloVLMError(f"{label} must be {limits}; found {shown(value)}.")
        return value


def setting(
    default: Any = MISSING,
    *,
    help: str,
    group: str = "Settings",
    factory: Callable[[], Any] | None = None,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    form: str = "",
    unset: str = "",
    argument: bool = False,
    hint: Any = None,
) -> Any:
    """Field of a config: its declaration, from which all else is made.

    Args:
        default: Its value where none is given; without one it must be given.
        help: What it does, one or two sentences.
        group: Under which heading help and documentation list it.
        factory: Makes the default, where that is a list or a mapping.
        above: Every number in it is larger.
        least: Every number in it is this or larger.
        below: Every number in it is smaller.
        most: Every number in it is this or smaller.
        form: What is expected, in words, where the type does not say it.
        unset: What holds where the default is `None`, in words.
        argument: Whether a command takes it as an argument rather than as an option.
        hint: Its type, where the annotation names what is not imported.
    """
    if group not in GROUPS:
        raise TypeError(f"'{group}' is no heading of settings: add it to GROUPS.")
    about = {
        "help": help, "group": group, "above": above, "least": least, "below": below,
        "most": most, "form": form, "unset": unset, "argument": argument,
    }  # fmt: skip
    metadata = {"setting": about, "hint": hint}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def declarations(cls: type) -> dict[str, Declared]:
    """Declarations of a config's settings, by name; also of a plain dataclass, without bounds.

    A subclass that gives a setting another default keeps its declaration.
    """
    return _declarations(cls)


@cache
def _declarations(cls: Any) -> dict[str, Declared]:
    table = {}
    for one in sorted(fields(cls), key=lambda one: one.kw_only is True):  # as they are given
        stated = [vars(k).get("__dataclass_fields__", {}).get(one.name) for k in cls.__mro__]
        about: Mapping[str, Any] = next(
            (f.metadata for f in stated if f and "setting" in f.metadata), {}
        )
        default = one.default
        if one.default_factory is not MISSING:
            default = one.default_factory()
        hint = about.get("hint") or _hint(cls, one)
        table[one.name] = Declared(one.name, hint, default=default, **about.get("setting", {}))
    return table


def _hint(cls: type, one: dataclasses.Field[Any]) -> Any:
    if not isinstance(one.type, str):
        return one.type
    owner = next(k for k in cls.__mro__ if one.name in vars(k).get("__annotations__", {}))
    try:
        return typing.get_type_hints(owner)[one.name]
    except NameError:  # of a name that is imported for type checkers alone
        return object


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the one type."""
    union = isinstance(hint, UnionType) or get_origin(hint) is typing.Union
    return get_args(hint) if union else (NoneType if hint is None else hint,)


def _words(hint: Any) -> str:
    """A type in the words of an error or a table."""
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        Any: "anything",
        NoneType: "nothing",
    }
    parts = []
    for member in _members(hint):
        kind, inner = get_origin(member) or member, get_args(member)
        if kind is Literal:
            parts.append("one of " + ", ".join(inner))
        elif isinstance(kind, type) and issubclass(kind, Mapping):
            numbers = {int: "whole numbers", float: "numbers"}.get(inner[1] if inner else Any)
            parts.append(f"a mapping of names to {numbers or 'values'}")
        elif kind in (list, tuple, Sequence):
            of = {int: "whole numbers", float: "numbers", str: "texts"}
            parts.append(f"a list of {of.get(inner[0] if inner else Any, 'values')}")
        else:
            parts.append(words.get(kind) or str(getattr(kind, "__name__", kind)))
    return " or ".join(parts)


def _from_exponent(value: Any) -> Any:
    """The number that text in exponential form stands for; anything else as it is."""
    # YAML 1.1 reads `1e-3` as text; a person means the number.
    exponent = isinstance(value, str) and _EXPONENT.fullmatch(value.strip())
    return float(value) if exponent else value


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a loop
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------------------- configs


def read_values(
    cls: type, values: Mapping[str, Any], *, about: str = "", unknown: str = ""
) -> dict[str, Any]:
    """Values for a config, each of its declared type and within its bounds.

    Args:
        cls: A dataclass.
        values: By name; settings that are missing keep their defaults.
        about: Whose setting it is, in an error: `of method 'lora'`.
        unknown: Who has no such setting, in an error: `Method 'lora'`.

    Raises:
        GloVLMError: A name is unknown (names the nearest), or a value is wrong.
    """
    table = declarations(cls)
    _check_names(values, table, unknown)
    return {
        key: table[key].read(value, f"Setting '{key}' {about}" if about else "")
        for key, value in values.items()
    }


def _check_names(values: object, known: Iterable[str], owner: str) -> None:
    if not isinstance(values, Mapping):
        raise GloVLMError(f"Expected settings by their names, found {shown(values)}.")
    names = list(known)
    for key in values:
        if key not in names:
            name, near = str(key)[:60], nearest(str(key)[:60], names)
            if owner:
                listed = ", ".join(names) or "none"
                raise GloVLMError(f"{owner} has no setting '{name}' (it has: {listed}).{near}")
            raise GloVLMError(f"Unknown setting '{name}' in the configuration.{near}")


@dataclass(frozen=True)
class Settings:
    """Base of every config: a frozen dataclass whose values are checked as soon as it is made.

    A value of another type, out of bounds or not finite is refused with a `GloVLMError`. Changed
    copies are made with `dataclasses.replace`.
    """

    _what: ClassVar[str] = "A run"  # what needs the settings, in an error

    def __init_subclass__(cls, **options: Any) -> None:
        """Append the settings that a class declares to its docstring."""
        super().__init_subclass__(**options)
        inherited = (vars(base).get("__dataclass_fields__", {}) for base in reversed(cls.__mro__))
        declared = {
            name: one.metadata["setting"]["help"]
            for of_class in (*inherited, vars(cls))
            for name, one in of_class.items()
            if isinstance(one, dataclasses.Field) and "setting" in one.metadata
        }
        if declared:
            lines = [f"    {name}: {text}" for name, text in declared.items()]
            doc = (cls.__doc__ or cls.__name__).rstrip()
            cls.__doc__ = "\n".join(
                [doc, "", "    Args:", *(f"    {line}" for line in lines), "    "]
            )

    def __post_init__(self) -> None:
        for declared in declarations(type(self)).values():
            self._put(declared.name, declared.read(getattr(self, declared.name)))
        self.check()

    def _put(self, name: str, value: Any) -> None:
        """Keep a value in the form that its check gave it."""
        object.__setattr__(self, name, value)

    def check(self) -> None:
        """Rules over several settings; each value alone has been checked.

        Raises:
            GloVLMError: They do not go together.
        """

    def to_repeat(self) -> dict[str, Any]:
        """Plain values that make this config again."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from YAML or options.

        Raises:
            GloVLMError: A key is unknown (names the nearest), one that is required is missing, or
                a value is wrong.
        """
        table = declarations(cls)
        _check_names(values, table, "")
        for name, declared in table.items():
            given = values.get(name)
            if declared.required and (given is None or (not given and hasattr(given, "__len__"))):
                flag = name.upper() if declared.argument else f"--{name.replace('_', '-')}"
                raise GloVLMError(
                    f"{cls._what} needs {name}: give {flag} or '{name}:' in the YAML file."
                )
        # `method_config:` with nothing below it has none.
        empty = {k for k, v in values.items() if v is None and isinstance(table[k].default, dict)}
        return cls(**{key: value for key, value in values.items() if key not in empty})


# ------------------------------------------------------------------------------------------- YAML

_LARGEST = 2**20  # bytes of a YAML file
_MOST_VALUES = 100_000  # in it, those that its aliases repeat counted each time
_NULL = {"", "~", "null", "Null", "NULL"}
_YES = {form for word in ("yes", "true", "on") for form in (word, word.title(), word.upper())}
_NO = {form for word in ("no", "false", "off") for form in (word, word.title(), word.upper())}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_FRACTION = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_CORE = "tag:yaml.org,2002:"


class _Wrong(Exception):
    """What is wrong with a YAML text, and in which line."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Keys are text as written (`no:`, `01:`), dates are text, a key given twice is an error.

    Args:
        path: The file, at most 1 MiB.

    Returns:
        Its content.

    Raises:
        GloVLMError: The file is missing, no regular file, too large, not UTF-8, not YAML, no
            mapping, names a key twice, or repeats too much by aliases.
    """
    text = read_text(path, "a YAML file", most=_LARGEST)
    try:
        content = _parse(text)
    except _Wrong as error:
        place = f", line {error.line}" if error.line else ""
        raise GloVLMError(f"{path}{place}: not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise GloVLMError(f"{path}: expected keys and values at the top, found {_kind(content)}.")
    return content


def read_yaml_value(text: str, where: str) -> Any:
    """Read one value that is written as YAML, as after `--set KEY=`.

    Args:
        text: The value.
        where: What to call it in an error.

    Raises:
        GloVLMError: It is no YAML.
    """
    try:
        return _parse(text)
    except _Wrong as error:
        raise GloVLMError(
            f"The value of {where} is no YAML: put quotes around it ({error})."
        ) from error


def _parse(text: str) -> Any:
    """Plain values of a YAML text: from its events, so that neither depth nor aliases explode."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _build(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line = mark.line + 1 if mark else None
        raise _Wrong(" ".join(str(problem).split()).rstrip("."), line) from error
    except UnicodeEncodeError as error:  # bytes of another encoding on the command line
        raise _Wrong("it is not UTF-8 text") from error


@dataclass
class _Open:
    """A list or mapping that is being read."""

    value: Any
    anchor: str | None = None
    key: str | None = None
    size: int = 1


def _build(events: Any) -> Any:
    import yaml

    kept: dict[str, tuple[Any, int]] = {}  # by anchor: the value, and how many values it holds
    stack: list[_Open] = [_Open([])]  # the document, as a list of one
    documents = 0

    def put(value: Any, size: int, line: int, scalar: Any = None) -> None:
        parent = stack[-1]
        parent.size += size
        if sum(part.size for part in stack) > _MOST_VALUES:
            raise _Wrong(f"it holds more than {_MOST_VALUES:,} values, aliases included", line)
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is not None:
            parent.value[parent.key], parent.key = value, None
        elif scalar is None:
            raise _Wrong("a key must be plain text", line)
        elif scalar in parent.value:
            raise _Wrong(f"the key {shown(scalar)} stands there twice", line)
        else:
            parent.key = scalar

    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Wrong("it holds several documents: expected one", line)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in kept:
                raise _Wrong(f"the alias '*{event.anchor}' stands for nothing before it", line)
            put(*kept[event.anchor], line)
        elif isinstance(event, yaml.ScalarEvent):
            as_key = isinstance(stack[-1].value, dict) and stack[-1].key is None
            value = event.value if as_key else _scalar(event, line)
            if event.anchor:
                kept[event.anchor] = (value, 1)
            put(value, 1, line, event.value)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            _check_tag(event, line)
            if isinstance(stack[-1].value, dict) and stack[-1].key is None:
                raise _Wrong("a key must be plain text", line)
            if len(stack) > _DEEPEST:
                raise _Wrong(f"it is nested more than {_DEEPEST} deep", line)
            empty: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            stack.append(_Open(empty, event.anchor))
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            done = stack.pop()
            if done.anchor:
                kept[done.anchor] = (done.value, done.size)
            put(done.value, done.size, line)
    return stack[0].value[0] if stack[0].value else None


def _check_tag(event: Any, line: int) -> None:
    known = ("str", "int", "float", "bool", "null", "seq", "map")
    if event.tag not in (None, "!", *(_CORE + name for name in known)):
        raise _Wrong(f"the tag {shown(event.tag)} is not read: write plain values", line)


def _scalar(event: Any, line: int) -> Any:
    """Value of a bare word, or the text in quotes."""
    _check_tag(event, line)
    word: str = event.value
    if event.style or event.tag in ("!", _CORE + "str"):
        return word
    if word in _NULL:
        return None
    if word in _YES or word in _NO:
        return word in _YES
    if _OCTAL.fullmatch(word):
        raise _Wrong(
            f"{word[:40]} is one number to some readers and another to others: write it without "
            "the leading 0, or in quotes if it is text",
            line,
        )
    try:
        if _WHOLE.fullmatch(word):
            return int(word, 0)
    except ValueError as error:  # thousands of digits
        raise _Wrong(f"a number of {len(word)} digits is too long", line) from error
    if _FRACTION.fullmatch(word):
        return float(word.replace("_", ""))
    special = word.lower().lstrip("+-")
    if special in (".inf", ".nan"):
        return -math.inf if word.startswith("-") and special == ".inf" else float(special[1:])
    return word


# ---------------------------------------------------------------------- entries of data files


def from_mapping(cls: type[T], raw: object, where: str) -> T:
    """Build a dataclass of text, booleans, whole numbers, choices and lists of text from YAML.

    Args:
        cls: The dataclass; its fields are the allowed keys, those without a default are required.
        raw: Content of the file.
        where: The file, and the place in it, for the error's sentence.

    Raises:
        GloVLMError: Names the place and the key that is unknown, missing or of the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise GloVLMError(f"{where}: expected keys and values, found {_kind(raw)}.")
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            raise GloVLMError(
                f"{where}: unknown key '{key}'.{nearest(str(key), known)} Keys: {', '.join(known)}."
            )
    for name, one in known.items():
        optional = one.default is not MISSING or one.default_factory is not MISSING
        if name not in raw and not optional:
            raise GloVLMError(f"{where}: the key '{name}' is missing.")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _typed(hints[key], raw[key], f"{where}: '{key}'") for key in raw})


def _typed(hint: Any, value: object, where: str) -> object:
    if get_origin(hint) is UnionType:  # of a key that may be left out
        hint = get_args(hint)[0]
    if hint in (bool, int) and type(value) is hint:
        return value
    if get_origin(hint) in (dict, list) and isinstance(value, get_origin(hint)) and value:
        return value
    if hint is str and isinstance(value, str) and value.strip():
        return value.strip()
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if item is not str and isinstance(value, tuple):  # parts that the caller has built
            return value
        if isinstance(value, list):
            return tuple(_typed(item, v, f"{where}, item {i + 1}") for i, v in enumerate(value))
    raise GloVLMError(f"{where}: expected {_expected(hint)}, found {_kind(value)}.")


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if hint in (bool, int):
        return "true or false" if hint is bool else "a whole number"
    if hint is str:
        return "text (in quotes if YAML reads it as something else)"
    return "keys and values" if get_origin(hint) is dict else "a list of texts"


def _kind(value: object) -> str:
    if value is None or value == "":
        return "nothing"
    if isinstance(value, dict):
        return "keys and values"
    return "a list" if isinstance(value, list) else shown(value)
