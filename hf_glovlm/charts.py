"""Charts: measured numbers as SVG, for reports and for the documentation.

matplotlib draws them. Text stays text, and colours are the variables of the page
(`rendering.THEME`), so that one chart is read in light, in dark and on paper. A series is known by
its mark or dash, too, and not by its colour alone. Names are shown as they are: none is read as a
formula or as HTML.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from .errors import GloVLMError
from .files import write_text
from .rendering import THEME, figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Chart",
    "Estimate",
    "Line",
    "Points",
    "draw_bars",
    "draw_forest",
    "draw_histogram",
    "draw_lines",
    "draw_matrix",
    "draw_points",
]

WIDTH = 5.2  # inches, of 72 units each: its text is read on a phone, too
FONT = 9.0
NAME = 30  # characters of a name beside an axis
SERIES = 8  # colours; after these the marks and dashes go on and the colours begin anew
# Stand-ins while matplotlib draws: each becomes a variable of the page.
_PARTS = ("ink", "soft", "line", "paper", *(f"s{k + 1}" for k in range(SERIES)))
_STAND_IN = {part: f"#0a0b{0x10 + place:02x}" for place, part in enumerate(_PARTS)}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
_STRONGEST = 0.55  # a full cell of a matrix: ink is still read on it, in light and in dark
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf-glovlm",
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_IN["line"],
    "axes.labelcolor": _STAND_IN["ink"],
    "text.color": _STAND_IN["ink"],
    "xtick.color": _STAND_IN["line"],
    "ytick.color": _STAND_IN["line"],
    "xtick.labelcolor": _STAND_IN["ink"],
    "ytick.labelcolor": _STAND_IN["ink"],
    "grid.color": _STAND_IN["line"],
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": FONT - 0.5,
}


@dataclass(frozen=True)
class Chart:
    """Chart: SVG with a title and its content in words.

    Attributes:
        title: What stands above it.
        alt: What it shows, for who cannot see it.
        svg: An `<svg>` element whose colours are variables of the page.
    """

    title: str
    alt: str
    svg: str

    def __html__(self) -> str:
        """The chart as a figure of a page."""
        title = escape(_shown(self.title, 200))
        return Markup(f'<figure class="chart"><figcaption>{title}</figcaption>{self.svg}</figure>')

    def save(self, path: str | Path) -> Path:
        """Write a file that stands alone, in the light colours on white, for the documentation.

        Args:
            path: Where to write; the file appears whole or not at all.
        """
        values = "".join(f"--{name}:{colour};" for name, colour in THEME["light"].items())
        style = f"<style>svg{{{values}background:{THEME['light']['paper']}}}</style>"
        head, end, rest = self.svg.partition(">")
        write_text(Path(path), f"{head} {_NAMESPACES}{end}{style}{rest}\n")
        return Path(path)


@dataclass(frozen=True)
class Line:
    """Curve with its band.

    Attributes:
        label: Its name in the legend.
        x: Places, `[n]`.
        y: Values, `[n]`; NaN is a gap.
        low: Lower bounds of the band, `[n]`.
        high: Upper bounds.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Estimate:
    """Value with its interval, a line of a forest plot.

    Attributes:
        label: What was estimated.
        value: The estimate; NaN shows the line without a mark.
        low: Lower bound of the interval.
        high: Upper bound.
        emphasis: Drawn filled; the others are hollow.
        note: Words behind the line.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    emphasis: bool = False
    note: str = ""


@dataclass(frozen=True)
class Points:
    """Points of one kind in a scatter plot.

    Attributes:
        label: Their name in the legend.
        x: Places, `[n]`.
        y: Values, `[n]`.
        texts: A word beside each, `[n]`.
        low: Lower bounds of the values, `[n]`.
        high: Upper bounds.
        marker: matplotlib's sign; `None`: the next one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str] | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marker: str | None = None


def draw_lines(
    lines: Sequence[Line],
    *,
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
    diagonal: bool = False,
    steps: bool = False,
) -> Chart:
    """Line chart, each line with its band: learning curves, ROC, reliability.

    Args:
        lines: At least one.
        title: What stands above.
        alt: What it shows, in words.
        x_label: Name of the horizontal axis, with its unit.
        y_label: Name of the vertical axis.
        x_limits: Ends of the horizontal axis.
        y_limits: Ends of the vertical axis.
        x_ticks: Places that are marked, as they are written.
        log_x: A logarithmic horizontal axis; places at 0 stand at its left end (`symlog`).
        diagonal: Draw the line y = x.
        steps: Values hold until the next place.

    Raises:
        GloVLMError: There is nothing to draw, or a line's values are not as many as its places.
    """
    _check(lines, title)
    square = diagonal and x_limits == y_limits
    with _figure(4.4 if square else 3.1, width=4.6 if square else WIDTH) as (figure, axes):
        if diagonal:
            axes.axline((0, 0), slope=1, color=_STAND_IN["soft"], linewidth=0.8, linestyle=":")
        for k, line in enumerate(lines):
            few = len(line.x) <= 12 and not steps
            mark = _MARKS[k % len(_MARKS)] if few else None
            axes.plot(
                line.x, line.y, label=_shown(line.label), linewidth=1.6, marker=mark,
                markersize=4.5, color=_colour(k), linestyle=_DASHES[k % len(_DASHES)],
                drawstyle="steps-post" if steps else "default",
            )  # fmt: skip
            if line.low is not None and line.high is not None:
                axes.fill_between(
                    line.x, line.low, line.high, color=_colour(k), alpha=0.15, linewidth=0,
                    step="post" if steps else None,
                )  # fmt: skip
        if log_x:
            axes.set_xscale("symlog" if min(min(one.x) for one in lines) <= 0 else "log", base=2)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks], minor=False)
            axes.set_xticks([], minor=True)
        if x_limits:
            axes.set_xlim(*x_limits)
        if y_limits:
            axes.set_ylim(*y_limits)
        axes.grid(visible=True)
        _name_axes(axes, x_label, y_label)
        if len(lines) > 1 or lines[0].label:
            _add_legend(figure, axes, len(lines))
        return _finish(figure, title, alt)


def draw_matrix(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    alt: str,
    row_label: str,
    column_label: str,
    texts: Sequence[Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    marked: Sequence[tuple[int, int]] = (),
) -> Chart:
    """Matrix of shaded cells with their numbers: confusion, methods by shots.

    Args:
        values: `[n, m]`; NaN is an empty cell.
        rows: Names of the rows, `[n]`.
        columns: Names of the columns, `[m]`.
        title: What stands above.
        alt: What it shows, in words.
        row_label: What the rows are.
        column_label: What the columns are.
        texts: What stands in each cell, `[n, m]`; by default its value.
        limits: Values of an empty and of a full shade; by default the lowest and the highest.
        marked: Cells with a frame.

    Raises:
        GloVLMError: The values are not as many as rows and columns.
    """
    shades = np.asarray(values, dtype=float)
    if shades.shape != (len(rows), len(columns)) or not shades.size:
        raise GloVLMError(
            f"Expected {len(rows)} x {len(columns)} values for '{title}', found {shades.shape}."
        )
    seen = shades[np.isfinite(shades)]
    low, high = limits or ((float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0))
    share = ((shades - low) / (high - low if high > low else 1.0)).clip(0, 1)
    n, m = shades.shape
    size = FONT if max(n, m) <= 12 else FONT - 1.5 if max(n, m) <= 20 else FONT - 3
    with _figure(0.9 + max(n * 0.3 * size / FONT, 0.9)) as (figure, axes):
        from matplotlib.patches import Rectangle

        for i in range(n):
            for j in range(m):
                place = (j - 0.5, i - 0.5)
                if not math.isfinite(shades[i, j]):
                    continue
                fill = _STRONGEST * float(share[i, j])
                axes.add_patch(Rectangle(
                    place, 1, 1, facecolor=_colour(0), alpha=fill, linewidth=0
                ))  # fmt: skip
                text = texts[i][j] if texts is not None else _written(shades[i, j])
                axes.text(
                    j, i, _shown(text, 14), ha="center", va="center", fontsize=size,
                    parse_math=False,
                )  # fmt: skip
        for i, j in marked:
            axes.add_patch(Rectangle(
                (j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=_STAND_IN["ink"], linewidth=1.4,
                zorder=5,
            ))  # fmt: skip
        axes.set_xlim(-0.5, m - 0.5)
        axes.set_ylim(n - 0.5, -0.5)
        _name_ticks(axes, "y", rows, size)
        _name_ticks(axes, "x", columns, size, turned=_wide(columns, m))
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(m + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
        axes.grid(which="minor")
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        _name_axes(axes, column_label, row_label)
        return _finish(figure, title, alt)


def draw_forest(
    estimates: Sequence[Estimate],
    *,
    title: str,
    alt: str,
    x_label: str,
    reference: float | None = 0.0,
    x_limits: tuple[float, float] | None = None,
) -> Chart:
    """Forest plot: an estimate a line, with its interval.

    Args:
        estimates: At least one, from above.
        title: What stands above.
        alt: What it shows, in words.
        x_label: Name of the axis, with its unit.
        reference: Where a line stands: no difference, or chance.
        x_limits: Ends of the axis.

    Raises:
        GloVLMError: There is nothing to draw.
    """
    _check(estimates, title)
    n = len(estimates)
    with _figure(0.65 + 0.235 * n) as (figure, axes):
        if reference is not None:
            axes.axvline(reference, color=_STAND_IN["soft"], linewidth=0.9, linestyle=":")
        for i, one in enumerate(estimates):
            if one.low is not None and one.high is not None:
                axes.plot(
                    [one.low, one.high], [i, i], color=_colour(0), linewidth=1.6,
                    solid_capstyle="butt",
                )  # fmt: skip
            axes.plot(
                [one.value], [i], marker="o", markersize=5.2, color=_colour(0),
                markerfacecolor=_colour(0) if one.emphasis else _STAND_IN["paper"],
            )  # fmt: skip
            if one.note:
                axes.annotate(
                    _shown(one.note, 40), (1, i), xycoords=("axes fraction", "data"),
                    xytext=(4, 0), textcoords="offset points", va="center", fontsize=FONT - 1.5,
                    color=_STAND_IN["soft"], parse_math=False,
                )  # fmt: skip
        axes.spines["left"].set_visible(False)
        _lay_rows(axes, [one.label for one in estimates], x_label, x_limits)
        return _finish(figure, title, alt)


def draw_bars(
    labels: Sequence[str],
    values: ArrayLike,
    *,
    title: str,
    alt: str,
    x_label: str,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    series: Sequence[str] | None = None,
    x_limits: tuple[float, float] | None = None,
    emphasis: Sequence[int] = (),
) -> Chart:
    """Horizontal bars, one a name, or one a name and series.

    Args:
        labels: Names, from above, `[n]`.
        values: `[n]`, or `[series, n]`; NaN is no bar.
        title: What stands above.
        alt: What it shows, in words.
        x_label: Name of the axis, with its unit.
        low: Lower bounds, in the shape of `values`.
        high: Upper bounds.
        series: Names of the series.
        x_limits: Ends of the axis.
        emphasis: Places of names that are drawn in full colour, the others paler.

    Raises:
        GloVLMError: The values are not as many as the names.
    """
    _check(labels, title)
    heights = np.atleast_2d(np.asarray(values, dtype=float))
    names = list(series or [""])
    if heights.shape != (len(names), len(labels)):
        raise GloVLMError(
            f"Expected values [{len(names)}, {len(labels)}] for '{title}', found {heights.shape}."
        )
    n, k = len(labels), len(names)
    bounds = [None if b is None else np.atleast_2d(np.asarray(b, float)) for b in (low, high)]
    thick = 0.78 / k
    with _figure(0.65 + n * max(0.235, 0.13 * k)) as (figure, axes):
        for s, name in enumerate(names):
            places = np.arange(n) + (s - (k - 1) / 2) * thick
            bars = axes.barh(
                places, np.nan_to_num(heights[s]), height=thick * 0.9, color=_colour(s), linewidth=0
            )
            for i, bar in enumerate(bars):
                bar.set_alpha(0.85 if not emphasis or i in emphasis else 0.4)
            if bounds[0] is not None and bounds[1] is not None:
                axes.hlines(places, bounds[0][s], bounds[1][s], color=_STAND_IN["ink"], linewidth=1)
            axes.plot([], [], "s", color=_colour(s), label=_shown(name))
        axes.set_axisbelow(True)
        _lay_rows(axes, labels, x_label, x_limits)
        if series:
            _add_legend(figure, axes, k)
        return _finish(figure, title, alt)


def draw_points(
    groups: Sequence[Points],
    *,
    title: str,
    alt: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
) -> Chart:
    """Scatter plot: cost against accuracy, a map of features.

    Args:
        groups: Points of each kind.
        title: What stands above.
        alt: What it shows, in words.
        x_label: Name of the horizontal axis, with its unit.
        y_label: Name of the vertical axis.
        log_x: A logarithmic horizontal axis.
        log_y: A logarithmic vertical axis.
        x_limits: Ends of the horizontal axis.
        y_limits: Ends of the vertical axis.

    Raises:
        GloVLMError: There is nothing to draw, or values are not as many as places.
    """
    _check(groups, title)
    with _figure(3.6) as (figure, axes):
        for k, group in enumerate(groups):
            mark = group.marker or _MARKS[k % len(_MARKS)]
            many = len(group.x) > 60
            axes.plot(
                group.x, group.y, linestyle="none", marker=mark, color=_colour(k),
                markersize=3.2 if many else 5.5, alpha=0.6 if many else 0.9, markeredgewidth=0,
                label=_shown(group.label),
            )  # fmt: skip
            if group.low is not None and group.high is not None:
                axes.vlines(group.x, group.low, group.high, color=_colour(k), linewidth=0.9)
            for x, y, text in zip(group.x, group.y, group.texts or (), strict=False):
                axes.annotate(
                    _shown(text, 24), (x, y), xytext=(4, 3), textcoords="offset points",
                    fontsize=FONT - 1.5, parse_math=False,
                )  # fmt: skip
        if log_x:
            axes.set_xscale("log")
        elif all(float(x).is_integer() for group in groups for x in group.x):
            from matplotlib.ticker import MaxNLocator

            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_y:
            axes.set_yscale("log")
        if x_limits:
            axes.set_xlim(*x_limits)
        if y_limits:
            axes.set_ylim(*y_limits)
        axes.grid(visible=True)
        _name_axes(axes, x_label, y_label)
        if len(groups) > 1:
            _add_legend(figure, axes, len(groups))
        return _finish(figure, title, alt)


def draw_histogram(
    values_by_label: Mapping[str, ArrayLike], *, title: str, alt: str, x_label: str, bins: int = 20
) -> Chart:
    """Histograms over one another, each of the share of its own values.

    Args:
        values_by_label: Values `[n]` by name; those that are not finite are left out.
        title: What stands above.
        alt: What it shows, in words.
        x_label: Name of the axis, with its unit.
        bins: Equal steps between the lowest and the highest value.

    Raises:
        GloVLMError: There is no value.
    """
    values = {name: _finite(own) for name, own in values_by_label.items()}
    values = {name: own for name, own in values.items() if len(own)}
    _check(values, title)
    every = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(every, bins)
    with _figure(2.8) as (figure, axes):
        for k, (name, own) in enumerate(values.items()):
            share = np.histogram(own, edges)[0] / len(own)
            axes.stairs(
                share, edges, color=_colour(k), linewidth=1.5, label=_shown(name),
                linestyle=_DASHES[k % len(_DASHES)],
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        _name_axes(axes, x_label, "share of images")
        if len(values) > 1:
            _add_legend(figure, axes, len(values))
        return _finish(figure, title, alt)


# ------------------------------------------------------------------------------------ drawing


class _figure:
    """A figure with one pair of axes, in the house's style while the block runs."""

    def __init__(self, height: float, *, width: float = WIDTH) -> None:
        self.size = (width, height)

    def __enter__(self) -> "tuple[Figure, Axes]":
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self.context = rc_context(_SETTINGS)
        self.context.__enter__()
        figure = Figure(figsize=self.size, layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *what: Any) -> None:
        self.context.__exit__(*what)


def _finish(figure: "Figure", title: str, alt: str) -> Chart:
    """The figure as SVG: stand-ins become variables, and what would clash in a page goes."""
    from io import StringIO

    out = StringIO()
    figure.savefig(
        out, format="svg", transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )  # fmt: skip
    text = out.getvalue()
    svg = text[text.index("<svg") :].strip()
    for part, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{part})")
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+; ?", "", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px )[^;\"]+", r"\1system-ui, sans-serif", svg)
    used = {*re.findall(r"url\(#([\w.-]+)\)", svg), *re.findall(r'href="#([\w.-]+)"', svg)}
    svg = re.sub(r' id="([\w.:-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    width = math.ceil(float(view[1]) * 4 / 3) if view else 600  # units of 1/72 to 1/96 of an inch
    shown = escape(_shown(alt, 2000))
    head = (
        f'<svg role="img" aria-label="{shown}" viewBox="{view[0][9:-1] if view else ""}" '
        f'style="width:100%;max-width:{width}px;height:auto;font-family:system-ui,sans-serif;'
        'stroke-linejoin:round;stroke-linecap:butt"'
    )
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r' d="[^"]*"', _round_path, svg)
    svg = svg.replace("xlink:href=", "href=")
    return Chart(title, alt, f"{head}{svg[svg.index('>') :]}")


def _round_path(path: re.Match[str]) -> str:
    """Coordinates of a path in hundredths of a unit: finer than any screen, and a third as long."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[0])


_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg"'


def _colour(k: int) -> str:
    return _STAND_IN[f"s{1 + k % SERIES}"]


def _shown(text: str, most: int = NAME) -> str:
    return figure_text(str(text), most)


def _written(value: float) -> str:
    """A number of a cell: counts as they are, three decimals else."""
    return f"{value:g}" if float(value).is_integer() else f"{value:.3f}"


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64).ravel()
    finite: NDArray[np.float64] = array[np.isfinite(array)]
    return finite


def _check(parts: Any, title: str) -> None:
    if not len(parts):
        raise GloVLMError(f"There is nothing to draw for '{title}'.")
    for part in parts:
        if isinstance(part, Line | Points):
            sizes = {len(v) for v in (part.x, part.y, part.low, part.high) if v is not None}
            if len(sizes) != 1:
                raise GloVLMError(
                    f"Expected as many values as places for '{part.label}' in '{title}', "
                    f"found {sorted(sizes)}."
                )


def _lay_rows(
    axes: "Axes", names: Sequence[str], x_label: str, x_limits: tuple[float, float] | None
) -> None:
    """Axes of a chart with a name a row, from above."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    if x_limits:
        axes.set_xlim(*x_limits)
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)
    _name_ticks(axes, "y", names, FONT)
    _name_axes(axes, x_label, "")


def _name_axes(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(_shown(x_label, 80), parse_math=False)
    axes.set_ylabel(_shown(y_label, 60), parse_math=False)


def _wide(names: Sequence[str], n: int) -> bool:
    """Whether names below the columns would run into each other."""
    return max(len(str(name)) for name in names) * n > 60


def _name_ticks(
    axes: "Axes", side: str, names: Sequence[str], size: float, *, turned: bool = False
) -> None:
    shown = [_shown(name, 24 if turned else NAME) for name in names]
    place = axes.set_xticks if side == "x" else axes.set_yticks
    place(range(len(shown)), shown)
    for label in axes.get_xticklabels() if side == "x" else axes.get_yticklabels():
        label.set(parse_math=False, fontsize=size)
        if turned:
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def _add_legend(figure: "Figure", axes: "Axes", n: int) -> None:
    """The legend: inside for a few names, below for many."""
    few = n <= 4
    legend = axes.legend(loc="best") if few else figure.legend(loc="outside lower center", ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)
