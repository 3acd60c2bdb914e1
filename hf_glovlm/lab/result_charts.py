"""Charts of the documented results, drawn from the tables of their pages.

The pages state what was measured, in Markdown tables; the charts hold these numbers and no other.

    python -m hf_glovlm.lab.result_charts docs
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..charts import Chart, Estimate, Line, draw_forest, draw_lines
from ..errors import GloVLMError
from ..files import read_text

__all__ = ["draw_results", "read_tables", "write_charts"]

FOLDER = "_static"
Table = tuple[list[str], list[list[str]]]
_INTERVAL = re.compile(r"([-+]?\d*\.?\d+)(?: \[([-+]?\d*\.?\d+), ([-+]?\d*\.?\d+)\])?")


def read_tables(text: str) -> list[Table]:
    """Tables of a Markdown page: the header and the rows of each.

    Args:
        text: The page.
    """
    tables: list[Table] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        if not inside:
            tables.append((cells, []))
        elif set("".join(cells)) - {"-", ":"}:
            tables[-1][1].append(cells)
        inside = True
    return tables


def draw_results(folder: Path) -> dict[str, Chart]:
    """The charts by the names of their files.

    Args:
        folder: Of the pages.

    Raises:
        GloVLMError: A page has another table than the chart is drawn from.
    """
    return {**_outline(folder), **_finder(folder), **_sclerosis(folder)}


def write_charts(folder: Path) -> list[Path]:
    """Write the charts below the folder of the pages.

    Args:
        folder: Of the pages.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    return [chart.save(place / f"{name}.svg") for name, chart in draw_results(folder).items()]


def _find(folder: Path, page: str, *columns: str) -> Table:
    """The first table of a page that has these columns."""
    for table in read_tables(read_text(folder / page, "a page of the documentation")):
        if {*columns} <= {*table[0]}:
            return table
    raise GloVLMError(f"{page} has no table with the columns {', '.join(columns)}.")


def _numbers(cell: str) -> tuple[float, float | None, float | None]:
    """Value and interval of a cell such as `+0.124 [+0.024, +0.224]`."""
    parts = _INTERVAL.match(cell)
    if parts is None:
        raise GloVLMError(f"Expected a number in a cell of a table, found '{cell}'.")
    value, low, high = (None if part is None else float(part) for part in parts.groups())
    assert value is not None  # the pattern has one
    return value, low, high


def _lines(
    rows: Sequence[Sequence[str]], header: Sequence[str], x: str, names: Mapping[str, str]
) -> list[Line]:
    """A line of each column, over the column x; with a band where the cells have intervals."""
    lines = []
    places = [float(row[header.index(x)]) for row in rows]
    for column, label in names.items():
        values = [_numbers(row[header.index(column)]) for row in rows]
        y, low, high = zip(*values, strict=True)
        band = (low, high) if None not in low else (None, None)
        lines.append(Line(label, places, y, *band))
    return lines


def _outline(folder: Path) -> dict[str, Chart]:
    header, rows = _find(folder, "outline-results.md", "set", "`blank+pool`", "gain", "`centre`")
    sets = {
        "confirmation": "confirmation, over slides",
        "development": "development, over patients",
    }
    names = {"`blank+pool`": "outline", "`centre`": "circle in the middle", "`ignore`": "square"}
    charts = {}
    for short, of in sets.items():
        own = [row for row in rows if row[0] == of]
        lines = _lines(own, header, "labels a class", names)
        charts[f"results-outline-{short}"] = draw_lines(
            lines,
            title=f"What the model is shown of the glomerulus ({of})",
            alt=_describe_lines("Macro-AUC by labelled images of each class", lines),
            x_label="labelled images of each class",
            y_label="macro-AUC",
            x_ticks=lines[0].x,
            log_x=True,
        )
    gains = [
        Estimate(f"{row[0].split(',')[0]}, {row[1]}", *_numbers(row[header.index("gain")]), True)
        for row in rows
    ]
    charts["results-outline-gain"] = draw_forest(
        gains,
        title="Gain of the outline over the square, by labels a class",
        alt=_describe_estimates("Gain in macro-AUC", gains),
        x_label="gain in macro-AUC, 95% interval",
    )
    return charts


def _finder(folder: Path) -> dict[str, Chart]:
    header, rows = _find(folder, "finder-results.md", "set", "regions", "`candidates`")
    names = {
        "`candidates`": "candidates (95% interval)",
        "`plain`": "plain",
        "`plain at .7`": "plain at .7",
    }
    charts = {}
    for short in ("development", "confirmation"):
        own = [row for row in rows if row[0].startswith(short)]
        lines = _lines(own, header, "regions", names)
        charts[f"results-finder-{short}"] = draw_lines(
            lines,
            title=f"Glomeruli found ({own[0][0]})",
            alt=_describe_lines("F1 by regions learned from", lines),
            x_label="outlined regions learned from",
            y_label="F1 at IoU .5",
            y_limits=(0, 1),
            x_ticks=lines[0].x,
            log_x=True,
        )
    return charts


def _sclerosis(folder: Path) -> dict[str, Chart]:
    header, rows = _find(folder, "sclerosis-results.md", "outlines", "rendering", "error", "bias")
    errors = []
    for row in rows:
        outlines = row[0].removeprefix("all ") + (", squares" if row[1] == "`ignore`" else "")
        estimate = row[2].replace("*", "").replace("without the finder's", "no")
        estimate = estimate.replace("the finder's", "its")
        label = f"{outlines}: {estimate}"
        values = _numbers(row[header.index("error")])
        errors.append(Estimate(label, *values, "corrected" in estimate))
    title = "Error of a slide's percentage of sclerosis"
    return {
        "results-sclerosis": draw_forest(
            errors,
            title=title,
            alt=_describe_estimates(title, errors),
            x_label="mean absolute error in points, 95% interval",
            x_limits=(0, 80),
        )
    }


def _describe_lines(what: str, lines: Sequence[Line]) -> str:
    each = (
        f"{line.label} " + ", ".join(f"{y:g} at {x:g}" for x, y in zip(line.x, line.y, strict=True))
        for line in lines
    )
    return f"{what}: {'; '.join(each)}."


def _describe_estimates(what: str, estimates: Sequence[Estimate]) -> str:
    return f"{what}: " + "; ".join(f"{one.label} {one.value:g}" for one in estimates) + "."


if __name__ == "__main__":
    write_charts(Path(sys.argv[1]))
