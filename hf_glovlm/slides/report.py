"""Slide reports: tables of tiles and slides, heat maps, GeoJSON and a summary in Markdown.

Nothing here names a place on the machine: a slide is known by its name alone, and that by a number
where names are to be hidden.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..files import replacing, write_csv, write_json, write_table, write_text
from ..rendering import figure_text, number, render
from .counting import NOT_A_SCORE
from .files.annotations import box_object, write_geojson
from .files.coordinates import LEVEL0, Origin

RESEARCH_USE = "Research use only, not for diagnosis."
HEATMAP_SIDE = 1200  # pixels of the longer side of the overview under a heat map
RESULT_FILES = ("summary.parquet", "summary.csv", "README.md", "results.json")
LEAST_ACCESSION = 6  # digits of a number that may be an accession number or a patient's
MAX_SQUARES = 20_000  # tiles in a GeoJSON file; more than that makes QuPath slow
_PEN_COLOUR = "#d55e00"  # vermilion of Okabe and Ito, which viridis lacks
_NICE = (1, 2, 5)  # a scale bar's length is one of these times a power of ten

Floats = NDArray[np.float64]


def write_tiles(
    path: Path,
    coords: ArrayLike,
    extent: int,
    tissue_fraction: ArrayLike,
    columns: Mapping[str, ArrayLike],
    labels: Sequence[str] | None = None,
) -> None:
    """Write the table of tiles, one row each, as a parquet file.

    Columns `x`, `y` (top left corner at level 0), `size` (side at level 0), `tissue_fraction`,
    those given, and `label` where tiles were classified.

    Args:
        path: The file.
        coords: `[n, 2]`.
        extent: Side of a tile in pixels of level 0.
        tissue_fraction: `[n]`, 0 to 1.
        columns: Numbers `[n]` by name, such as `p_<class>`.
        labels: Class of each tile.
    """
    places = np.asarray(coords, np.int64)
    table: dict[str, Any] = {
        "x": places[:, 0],
        "y": places[:, 1],
        "size": np.full(len(places), extent, np.int64),
        "tissue_fraction": np.asarray(tissue_fraction, np.float32),
        **{name: np.asarray(values) for name, values in columns.items()},
    }
    if labels is not None:
        table["label"] = pa.array(list(labels), pa.string()).dictionary_encode()
    write_table(path, table)


def write_tile_geojson(
    path: Path,
    coords: ArrayLike,
    extent: int,
    values: ArrayLike,
    *,
    threshold: float,
    columns: Mapping[str, ArrayLike],
    labels: Sequence[str],
    origin: Origin = LEVEL0,
) -> int:
    """Write the tiles whose value reaches a threshold as squares that QuPath opens.

    Args:
        path: The file.
        coords: `[n, 2]`, top left corners at level 0.
        extent: Side of a tile at level 0.
        values: `[n]`, what is compared with the threshold.
        threshold: Least value.
        columns: Numbers `[n]` by name, which become the squares' measurements.
        labels: Class of each tile.
        origin: Where the file counts from.

    Returns:
        How many were written: those of the highest value, `MAX_SQUARES` at most.
    """
    value = np.asarray(values, np.float64)
    chosen = np.flatnonzero(value >= threshold)
    if len(chosen) > MAX_SQUARES:
        best = np.argsort(-value[chosen], kind="stable")[:MAX_SQUARES]
        chosen = np.sort(chosen[best])
    places = np.asarray(coords, np.int64)[chosen].tolist()
    squares = [box_object(float(x), float(y), extent, extent) for x, y in places]
    table = {name.replace("_", " ", 1): np.asarray(column) for name, column in columns.items()}
    write_geojson(
        path,
        squares,
        labels=[labels[i] for i in chosen.tolist()],
        measurements=[{name: float(v[i]) for name, v in table.items()} for i in chosen],
        origin=origin,
    )
    return len(squares)


# ------------------------------------------------------------------------------------- heat map


def draw_heatmap(
    path: Path,
    overview: Image.Image,
    size: tuple[int, int],
    coords: ArrayLike,
    extent: int,
    values: ArrayLike,
    *,
    title: str,
    value_name: str,
    limits: tuple[float, float] = (0.0, 1.0),
    mpp: float | None = None,
    pen: NDArray[np.bool_] | None = None,
    opacity: float = 0.5,
) -> None:
    """Write a heat map of the tiles' values over an overview of the slide, as PNG.

    Where tiles overlap their values are averaged. The memory is that of the overview.

    Args:
        path: The file.
        overview: Of the whole slide.
        size: Width and height of the slide at level 0.
        coords: `[n, 2]`, top left corners at level 0.
        extent: Side of a tile at level 0.
        values: `[n]`.
        title: Above the picture.
        value_name: Beside the colour bar.
        limits: Values of the bar's ends.
        mpp: Micrometres per pixel of level 0; draws a scale bar where known.
        pen: `[rows, columns]` over the whole slide: what was left out as pen, outlined and hatched.
        opacity: Of the colours, 0 to 1.
    """
    # The figure draws itself with Agg: no pyplot, so nothing is kept between slides.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    field = _spread_values(overview.size, size, coords, extent, values)
    # Laid out by hand, in inches: matplotlib's own layout draws everything several times.
    width, height = 8.0, min(max(8.0 * overview.height / overview.width, 2.0), 16.0)
    whole = (width + 1.6, height + 0.9)
    figure = Figure(figsize=whole, dpi=125)
    FigureCanvasAgg(figure)

    def place(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / whole[0], y / whole[1], w / whole[0], h / whole[1]))

    axes = place(0.2, 0.4, width, height)
    axes.imshow(np.asarray(overview))
    image = axes.imshow(
        field, cmap="viridis", vmin=limits[0], vmax=limits[1], alpha=opacity, interpolation="none"
    )
    axes.set_title(figure_text(title), parse_math=False)
    axes.set_axis_off()
    bar = figure.colorbar(image, cax=place(width + 0.4, 0.4 + 0.1 * height, 0.2, 0.8 * height))
    shown = figure_text(f"{value_name}; colours at {opacity:.0%} opacity")
    bar.set_label(shown, parse_math=False)
    if pen is not None and pen.any():
        _draw_pen(axes, pen, overview.size)
    if mpp is not None:
        _draw_scale_bar(axes, overview.size, mpp * size[0] / overview.width)
    figure.text(0.5, 0.15 / whole[1], RESEARCH_USE, ha="center", fontsize=9)
    with replacing(path) as fresh, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks
        # Without the versions of libraries, so that the same numbers give the same file.
        figure.savefig(fresh, format="png", metadata={"Software": None})


def _spread_values(
    shape: tuple[int, int], size: tuple[int, int], coords: ArrayLike, extent: int, values: ArrayLike
) -> Floats:
    """Mean value of the tiles over each pixel of the overview, NaN where there is none."""
    width, height = shape
    total, count = np.zeros((2, height, width))
    scale = np.array([width / size[0], height / size[1]])
    places = np.asarray(coords, np.float64)
    low = np.floor(places * scale).astype(int)
    high = np.maximum(np.floor((places + extent) * scale).astype(int), low + 1)
    for (x0, y0), (x1, y1), value in zip(
        low.tolist(), high.tolist(), np.asarray(values, np.float64).tolist(), strict=True
    ):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    field: Floats = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return field


def _draw_pen(axes: Any, pen: NDArray[np.bool_], shape: tuple[int, int]) -> None:
    """Outline and hatch what was left out of the tissue as pen, with its legend."""
    from matplotlib.patches import Patch

    width, height = shape
    # Glass beyond the edge, so that a stroke which runs over it is closed there.
    reduced = np.asarray(Image.fromarray(pen).resize(shape, Image.Resampling.NEAREST))
    field = np.pad(reduced, 1).astype(np.float32)
    x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
    axes.contourf(x, y, field, levels=[0.5, 1.5], colors="none", hatches=["xxx"])
    axes.contour(x, y, field, levels=[0.5], colors=_PEN_COLOUR, linewidths=1.2)
    key = Patch(facecolor="white", edgecolor=_PEN_COLOUR, hatch="xxx", label="pen, left out")
    axes.legend(handles=[key], loc="upper right", fontsize=9)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def bar_length(width: float) -> float:
    """Length of a scale bar: 1, 2 or 5 times a power of ten, at most a fifth of a width.

    Args:
        width: Of the picture, in micrometres.
    """
    power = 10.0 ** math.floor(math.log10(width / 5))
    return max(step * power for step in _NICE if step * power <= width / 5)


def _draw_scale_bar(axes: Any, shape: tuple[int, int], mpp: float) -> None:
    """Scale bar at the lower left, black with a white rim, and its length."""
    width, height = shape
    length = bar_length(width * mpp)
    shown = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    left, top, thick = 0.03 * width, 0.965 * height, max(0.008 * height, 2)
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((left, top), length / mpp, thick, facecolor="black", edgecolor="white", lw=0.8)
    )
    axes.text(
        left + length / mpp / 2,
        top - thick,
        shown,
        ha="center",
        va="bottom",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


# -------------------------------------------------------------------------------------- results


def clean_text(text: str, source: Path, name: str) -> str:
    """Remove a slide's path and own name from a sentence, and leave the sentence's own words.

    Paths, file names, and names in quotes or before a colon go, whatever they are. A name that
    stands bare goes where it is distinctive; that of `25.svs` or `a.tif` is a number or a word of
    the sentence, which tells nothing.

    Args:
        text: For instance an error's message.
        source: The slide's file.
        name: What the slide is called in the results.
    """
    stem = source.stem
    patterns = []
    for path in dict.fromkeys((source.absolute(), source.resolve(), source)):
        before = "" if path.is_absolute() else rf"(?<![\w.{re.escape(os.sep)}-])"
        patterns.append(before + re.escape(str(path)))
        folder = "" if path.parent == Path() else str(path.parent).rstrip(os.sep) + os.sep
        if folder.strip(os.sep):
            text = re.sub("|".join(patterns), lambda match: name, text)
            text = re.sub(before + re.escape(folder), "", text)
    own = re.escape(stem)
    patterns.append(rf"(?<![\w.-]){re.escape(source.name)}(?!\w)")
    patterns.append(rf"(?<=['\"`\u2018\u201c]){own}(?=['\"`\u2019\u201d])")
    patterns.append(rf"(?<![^\s(\[]){own}(?=:|\.(?:h5|part|geojson)\b)")
    if _is_distinctive(stem):
        patterns.append(rf"(?<!\w){own}(?!\w)")
    elif stem.replace(" ", "").isalpha() and not stem.islower() and len(stem) > 1:
        # Within a sentence a capital marks a name; the first word has one anyway.
        patterns.append(rf"(?<=[\w,;] ){own}(?!\w)")
        patterns.append(rf"(?<!\w){own}(?= (?:is|has|was|holds|shows|cannot)\b)")
    return re.sub("|".join(patterns), lambda match: name, text)


def _is_distinctive(name: str) -> bool:
    """Whether a name is no word or number of a sentence: of letters and more, or many digits."""
    if not any(character.isalpha() for character in name):
        return sum(character.isdigit() for character in name) >= LEAST_ACCESSION
    return re.search(r"[\d_]|[^\w\s]", name) is not None


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `summary.parquet`, `summary.csv`, `README.md` and, last, `results.json`.

    Args:
        folder: Where.
        results: As `classify_slides` returns them.
    """
    rows = _summary_rows(results)
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(folder / "summary.parquet", {name: [row[name] for row in rows] for name in names})
    write_csv(folder / "summary.csv", names, [[row[name] for name in names] for row in rows])
    write_text(folder / "README.md", render_summary(results))
    write_json(folder / "results.json", results, ensure_ascii=False, allow_nan=False)


def _summary_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the summary: one a slide, then one a case, every column in each."""
    rows = []
    for level in ("slide", "case"):
        for entry in results[f"{level}s"]:
            done = entry.get("counts") is not None
            counts = entry["counts"] if done else {"unit": None, "n": None, "classes": {}}
            row: dict[str, Any] = {
                "level": level,
                "name": entry[level],
                "case": entry.get("case"),
                "status": entry.get("status", "done"),
                "error": entry.get("error"),
                "label": entry.get("label"),
                "tiles": entry.get("n_tiles"),
                "counted": counts["unit"],
                "n": counts["n"],
            }
            for name in results["slide_class_names"]:
                row[f"p_{name}"] = (entry.get("probabilities") or {}).get(name)
            for name in results["class_names"]:
                measured = counts["classes"].get(name, {})
                low, high = measured.get("ci95") or (None, None)
                row[f"count_{name}"] = measured.get("count")
                row[f"percent_{name}"] = measured.get("percent")
                row[f"low_{name}"], row[f"high_{name}"] = low, high
                corrected = measured.get("corrected", {})
                low, high = corrected.get("ci95") or (None, None)
                row[f"corrected_{name}"] = corrected.get("percent")
                row[f"corrected_low_{name}"], row[f"corrected_high_{name}"] = low, high
            row["notes"] = " ".join(entry.get("flags", []))
            rows.append(row)
    return rows


def render_summary(results: Mapping[str, Any]) -> str:
    """Render the results of a run over slides as Markdown.

    Args:
        results: As `classify_slides` returns them.
    """
    done = [entry for entry in results["slides"] if entry["status"] == "done"]
    names = list(results["slide_class_names"])
    values = {
        "RESEARCH_USE": RESEARCH_USE,
        "NOT_A_SCORE": NOT_A_SCORE,
        "synthetic": results.get("synthetic"),
        "settings": results["settings"],
        "pooling": results["pooling"],
        "label_header": ["slide", "label", *(f"p {name}" for name in names), "pooling", "tiles"],
        "labels": [
            [
                entry["slide"],
                entry["label"],
                *(number(entry["probabilities"][name]) for name in names),
                entry["pooling"],
                entry["n_tiles"],
            ]
            for entry in done
        ],
        "levels": [
            _level_values("slide", done, results["class_names"]),
            _level_values("case", results["cases"], results["class_names"]),
        ],
        "flags": _flags_once(results),
        "failed": [entry for entry in results["slides"] if entry["status"] != "done"],
    }
    return render("slide_report.md.j2", values)


def _flags_once(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flags, and of which slides and cases each is: what several share stands once."""
    places: dict[str, list[str]] = {}
    for kind, before in (("slide", ""), ("case", "case ")):
        for entry in results[f"{kind}s"]:
            for flag in entry["flags"]:
                places.setdefault(flag, []).append(f"{before}{entry[kind]}")
    return [(", ".join(names), flag) for flag, names in places.items()]


def _level_values(
    level: str, entries: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """What `slide_report.md.j2` names of the counts per slide or per case."""
    counted = [(entry[level], entry["counts"]) for entry in entries if entry["counts"]]
    notes = dict.fromkeys(note for _, counts in counted for note in counts["notes"])
    notes.pop(NOT_A_SCORE, None)  # it heads the page
    return {
        "name": level,
        "header": [level, "n", *names],
        "rows": [
            [name, f"{of['n']} {of['unit']}", *(describe_share(of["classes"][k]) for k in names)]
            for name, of in counted
        ],
        "notes": list(notes),
    }


def describe_share(entry: Mapping[str, Any]) -> str:
    """Share in words: `5 (21.7%, 9.7 to 41.9)`, and the corrected percentage where there is one."""
    if entry["percent"] is None:
        return str(entry["count"])
    low, high = entry["ci95"]
    text = f"{entry['count']} ({entry['percent']:.1f}%, {low:.1f} to {high:.1f})"
    if "corrected" in entry:
        low, high = entry["corrected"]["ci95"]
        text += f"; corrected {entry['corrected']['percent']:.1f}%, {low:.1f} to {high:.1f}"
    return text
