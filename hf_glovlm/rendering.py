"""Cards and reports: Jinja2 templates, and how tables, numbers and intervals are written in them.

A template in `templates/` reads like the document it makes. What it is given is never read as a
template, and every value stays on its line: a class may be called `a|b`, `{{ x }}` or `RUN`. Nor is
it read as Markdown or HTML: in a document a name with marks of these is shown as inline code
(`literal`), in a page everything is escaped.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .metrics import METRICS

__all__ = [
    "CLASS_HEADER",
    "METRIC_HEADER",
    "RESEARCH_USE",
    "SYNTHETIC",
    "THEME",
    "Markdown",
    "class_rows",
    "code",
    "extent",
    "figure_text",
    "group_unit",
    "interval",
    "literal",
    "measured",
    "metric_rows",
    "metric_title",
    "named",
    "number",
    "percentage",
    "render",
    "render_page",
]

RESEARCH_USE = "Research use only, not for diagnosis"
# Colours of pages and charts. s1 to s8 are those of series: apart for people who confuse red and
# green, and at least 3:1 against the paper.
THEME = {
    "light": {
        "paper": "#ffffff", "ink": "#111111", "soft": "#4a4a4a", "line": "#b5b5b5",
        "shade": "#f1f1f1", "s1": "#0072b2", "s2": "#c4500a", "s3": "#00805e", "s4": "#a8497f",
        "s5": "#7d6608", "s6": "#2b83b8", "s7": "#5b4fa3", "s8": "#6b6b6b",
    },
    "dark": {
        "paper": "#16181a", "ink": "#eeeeee", "soft": "#b9bdc1", "line": "#54595e",
        "shade": "#23272a", "s1": "#5ab4f0", "s2": "#f0894e", "s3": "#3cc79f", "s4": "#e09abf",
        "s5": "#d9bf4b", "s6": "#8fd0f5", "s7": "#a99ff0", "s8": "#a6a6a6",
    },
}  # fmt: skip
METRIC_HEADER = ("metric", "value", "95% interval", "note")
SYNTHETIC = " (synthetic images)"  # behind every title above a number measured on such
CLASS_HEADER = ("class", "images", "groups", "recall", "specificity", "AUC", "note")


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a Markdown document.

    Args:
        template: A file of `templates/`, such as `model_card.md.j2`.
        values: What the template names.

    Raises:
        jinja2.UndefinedError: The template names a value that is not there.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render an HTML page; every value is text, whatever stands in it.

    Args:
        template: A file of `templates/`, such as `biopsy_sheet.html.j2`.
        values: What the template names.

    Raises:
        jinja2.UndefinedError: The template names a value that is not there.
    """
    return _PAGES.get_template(template).render(values)


# -------------------------------------------------------------------------------- rows of tables


def metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of metrics, one for each, under `METRIC_HEADER`.

    Args:
        metrics: `results["metrics"]`.
    """
    return [
        [metric_title(name), number(entry["value"]), interval(entry["ci95"]), _note(entry)]
        for name, entry in metrics.items()
    ]


def class_rows(per_class: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of per-class measures, one for each class, under `CLASS_HEADER`.

    Args:
        per_class: `results["per_class"]`.
    """
    measures = ("recall", "specificity", "auc")
    return [
        [name, str(row["n"]), str(row["groups"]), *measured([row[m] for m in measures])]
        for name, row in per_class.items()
    ]


def measured(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of measures: value and interval of each, then one cell with the notes of all.

    Args:
        entries: Each with `value`, `ci95`, `note` and `undefined_resamples`.
    """
    cells = [f"{number(entry['value'])} {interval(entry['ci95'])}".strip() for entry in entries]
    notes = dict.fromkeys(note for entry in entries if (note := _note(entry)))
    return [*cells, "; ".join(notes)]


def _note(entry: Mapping[str, Any]) -> str:
    undefined = entry["undefined_resamples"]
    lost = f"undefined in {undefined} resamples" if undefined else ""
    return "; ".join(note for note in (entry["note"], lost) if note)


# --------------------------------------------------------------- words and numbers: the filters


class Markdown(str):
    """Text that is Markdown already, of several lines if need be."""

    __slots__ = ()


def group_unit(column: str) -> str:
    """Name of a column's groups, in the plural: `slide_id` -> `slides`."""
    if column == "near_duplicate":
        return "near-duplicate clusters"
    return column.removesuffix("_id").replace("_", " ") + "s"


def metric_title(name: str) -> str:
    """Title of a metric, as tables show it."""
    return METRICS[name].title if name in METRICS else name


def number(value: float | None) -> str:
    """A measured value with three decimals; `undefined` for `None`."""
    return "undefined" if value is None else f"{value:.3f}"


def percentage(value: float | None, sign: str = "%") -> str:
    """A percentage without decimals, half a percent up; 0 and 100 stand for these alone."""
    if value is None:
        return "\N{EN DASH}"
    if 0 < value < 0.5:
        return f"<1{sign}"
    return f">99{sign}" if 99.5 <= value < 100 else f"{math.floor(value + 0.5)}{sign}"


def interval(bounds: Sequence[float] | None) -> str:
    """`[low, high]` with three decimals; nothing for `None`."""
    return "[{:.3f}, {:.3f}]".format(*bounds) if bounds else ""


def extent(bounds: Sequence[int]) -> str:
    """Range of counts: `3`, or `3 to 8`."""
    low, high = bounds
    return str(low) if low == high else f"{low} to {high}"


def figure_text(text: str, most: int = 80) -> str:
    """Text that a figure can show: printable, on one line, its middle left out where it is long.

    Give it to matplotlib with `parse_math=False`, else `$` begins a formula.

    Args:
        text: For instance a title that holds the name of a file.
        most: Characters at most.
    """
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    half = (most - 1) // 2
    return shown if len(shown) <= most else f"{shown[:half]}\N{HORIZONTAL ELLIPSIS}{shown[-half:]}"


def words(value: Any) -> Markdown:
    """One value, or several in a row: `PAS, H&E`."""
    parts = value if isinstance(value, list | tuple | dict) else [value]
    return Markdown(", ".join(map(literal, parts)))


def named(values: Mapping[str, Any]) -> Markdown:
    """Names with their numbers: `viable 0.250, sclerosed 0.750`."""
    shown = ((k, number(v) if isinstance(v, float) else v) for k, v in values.items())
    return Markdown(", ".join(f"{literal(name)} {value}" for name, value in shown))


def code(value: Any) -> Markdown:
    """Inline code, whatever backticks the value holds."""
    text = _one_line(value)
    if "`" not in text:
        return Markdown(f"`{text}`")
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return Markdown(f"{fence} {text} {fence}")


def literal(name: Any) -> Markdown:
    """A name that somebody gave, as it is: inline code, if Markdown would take it for something."""
    text = _one_line(name)
    return code(text) if _MARKS.search(text) else Markdown(text)


_MARKS = re.compile(
    r"[`*\\~]|(?<!\w)_|_(?!\w)|<[A-Za-z/!?]|&#?\w+;|\]\s*[(\[:]|!\[|://|www\."
    r"|^(?:[#>+-]+|\d+[.)])(?:\s|$)|^-{2,}|^=+$|^\s*$"
)
# In a sentence: what would become HTML, a picture or a link.
_ACTIVE = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])(?=[(\[])")


def table(rows: Iterable[Sequence[Any]], header: Sequence[Any]) -> Markdown:
    """A Markdown table; a bar or a line break in a cell does not end it.

    Args:
        rows: Cells of each row, as many as the header has.
        header: Names of the columns.
    """
    lines = [header, ["---"] * len(header), *rows]
    cells = ([_finalize(cell).replace("|", "\\|") for cell in line] for line in lines)
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells))


class _Missing(StrictUndefined):
    """A value that is not there: whatever uses it, the error names it."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)


def _one_line(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value))


def _finalize(value: Any) -> str:
    """What `{{ value }}` writes: one line and no HTML, unless it is Markdown already."""
    return value if isinstance(value, Markdown) else _ACTIVE.sub(r"\\\g<0>", _one_line(value))


_ENVIRONMENT = Environment(
    loader=PackageLoader("hf_glovlm"),
    undefined=_Missing,
    autoescape=False,  # Markdown, no HTML
    finalize=_finalize,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals |= {"CLASS_HEADER": CLASS_HEADER, "METRIC_HEADER": METRIC_HEADER}
_ENVIRONMENT.filters |= {
    function.__name__: function
    for function in (code, extent, interval, literal, metric_title, named, number, table, words)
}


def _finalize_page(value: Any) -> Any:
    """What `{{ value }}` writes into a page: one line of what can be shown, escaped after this."""
    if hasattr(value, "__html__"):  # a macro's or a block's
        return value
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", _one_line(value))


_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_PAGES = Environment(
    loader=PackageLoader("hf_glovlm"),
    undefined=_Missing,
    autoescape=True,
    finalize=_finalize_page,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_SORT = (files("hf_glovlm") / "templates" / "sort_tables.js").read_text(encoding="utf-8")
_PAGES.globals |= {
    "RESEARCH_USE": RESEARCH_USE,
    "THEME": {
        name: Markup("".join(f"--{part}:{colour};" for part, colour in colours.items()))
        for name, colours in THEME.items()
    },
    # The one script that a page may run, by its digest.
    "SORT_SCRIPT": Markup(_SORT),
    "SORT_DIGEST": base64.b64encode(hashlib.sha256(_SORT.encode()).digest()).decode("ascii"),
}
_PAGES.filters |= {function.__name__: function for function in (interval, number, percentage)}
