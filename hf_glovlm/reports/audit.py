"""Data audits as pages: from `audit.json`, and pictures where they are asked for, to one HTML file.

The page computes no number: it shows what the facts hold.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..charts import Chart, Estimate, Line, draw_bars, draw_forest, draw_lines, draw_matrix
from ..rendering import render_page

__all__ = ["AuditPicture", "render_audit"]

TITLE = "Data audit"
MOST_LINES = 5  # classes that histograms are drawn of; of more, the quartiles
MOST_FLAGS = 12  # that are listed, the others are framed
MOST_CLASSES = 24  # that a chart names
CHARTS = {  # of each part of the page
    "files": ("width", "height", "aspect", "bytes_per_pixel", "blockiness", "mpp"),
    "pixels": (
        "sharpness_1", "texture_4", "focus", "brightness", "saturation", "background"
    ),
}  # fmt: skip
STATED = {"stain": "Stain", "institution": "Institution", "scanner": "Scanner"}
_COPIES = {
    "label_conflict": "Different labels",
    "across_groups": "The same or nearly the same image in several groups",
}
HOW = {
    "probe": (
        "A plain classifier (logistic regression) learns the class from statistics of the files "
        "alone, and is tested on groups that it has not learned from. An AUC of .50 is chance, "
        "1.00 a class known from its files alone. The line is an interval over groups. Filled and "
        "flagged is what lies above the dotted line at .60 with its whole interval: a model may "
        "learn that in place of the tissue. No flag does not mean that there is no shortcut."
    ),
    "matrix": (
        "AUC of each class against all others, by one group of statistics alone. Framed cells "
        "are flagged: of all together, with a lower bound above .60, for a class of 8 groups or "
        "more. Size and compression can hardly be tissue. Blur and texture scale are measured in "
        "the outer tenth of each side: around a centred object that is surroundings, but in a tile "
        "it is the tissue itself, and then a flag may be biology."
    ),
    "pairs": (
        "The pairs of classes that file statistics part best. Where a pair comes from two sources "
        "(two scanners, two organs, two web sites), the sources are parted, and not the classes."
    ),
    "classes": (
        "Groups count for more than images: what is learned and what is tested must be other "
        "patients. The largest group shows how much of a class is one patient."
    ),
    "origins": (
        "Look for empty cells and for cells that hold a whole class: there, a model cannot part "
        "the class from where it comes from."
    ),
    "files": (
        "Each line is a way of storing images. A class that is stored in its own way can be "
        "known by it. The quantisation is the mean of JPEG's luminance table: higher is stronger "
        "compression."
    ),
    "histograms": (
        "One line a class, each of the share of its own images. Lines that lie apart show what "
        "parts the classes without any tissue being read. The lowest and highest half percent "
        "are counted in the outer bars."
    ),
    "pixels": (
        "Detail and texture are of the outer tenth; 0 is noise alone, lower is smoother. Focus is "
        "the variance of the Laplacian. Focus, brightness and colour see the tissue: classes "
        "may differ in them for good reasons, so the probe does not use them."
    ),
    "copies": (
        "Near copies have the same low frequencies and thumbnails (an image saved again, resized "
        "or a little brighter). A copy in another group can be in training and test at once; a "
        "copy with another label makes one of the two wrong."
    ),
    "pictures": "Up to eight images of each class, from as many groups as there are.",
}


@dataclass(frozen=True)
class AuditPicture:
    """Small picture of an image.

    Attributes:
        jpeg: Content of a JPEG file.
        name: What it is called: its file's name.
        label: Its class.
    """

    jpeg: bytes
    name: str
    label: str

    @property
    def address(self) -> str:
        """The picture as an address that holds it (RFC 2397)."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode('ascii')}"


def render_audit(
    facts: Mapping[str, Any],
    *,
    examples: Mapping[str, Sequence[AuditPicture]] | None = None,
    copies: Sequence[tuple[str, Sequence[AuditPicture]]] = (),
) -> str:
    """Page of a data audit.

    Args:
        facts: Content of `audit.json`.
        examples: Pictures of each class; `None` for a page without pictures and names of files.
        copies: Pictures of each cluster of copies, with its kind.

    Raises:
        jinja2.UndefinedError: The facts lack something.
    """
    measured = bool(facts["classes"])
    values = {
        "TITLE": TITLE,
        "HOW": HOW,
        "COPIES": _COPIES,
        "STATED": STATED,
        "facts": facts,
        "measured": measured,
        "per_group": {k: shown(v) for k, v in facts["images_per_group"].items()}
        if measured
        else {},
        "lead": _lead(facts),
        "copied": _copied(facts) if measured else "",
        "charts": _charts(facts) if measured else {},
        "probe": _probe(facts["probe"]) if measured else {},
        "tables": _tables(facts) if measured else {},
        "examples": examples,
        "copies": copies,
    }
    return render_page("audit.html.j2", values)


def _lead(facts: Mapping[str, Any]) -> str:
    """What the audit comes to, in a sentence or two."""
    n = len(facts["problems"])
    if not facts["classes"]:
        return "No image can be read, so nothing else was measured."
    of = f"{facts['images']} images of {len(facts['classes'])} classes from {facts['groups']} "
    of += facts["unit"]
    if n:
        word = "problem" if n == 1 else "problems"
        return f"{of}: {n} {word} to mend before anything is trained on them."
    shortcut = "a shortcut" if facts["probe"]["flagged"] else "no shortcut"
    return f"{of}: no problem that stops training, and {shortcut} is flagged."


def _copied(facts: Mapping[str, Any]) -> str:
    """What the copies do, where they do harm."""
    unit, counts = facts["unit"], facts["copies"]
    words = {"label_conflict": "with different labels", "across_groups": f"in several {unit}"}
    harm = [f"{counts[kind]} {word}" for kind, word in words.items() if counts[kind]]
    one = len(harm) == 1 and harm[0].startswith("1 ")
    there = (
        f"There {'is a cluster' if one else 'are clusters'} of the same or nearly the same image"
    )
    return f"{there}: {' and '.join(harm)}." if harm else ""


# -------------------------------------------------------------------------------------- charts


def _charts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Charts of each part of the page."""
    classes = facts["classes"][:MOST_CLASSES]
    names, unit = [c["name"] for c in classes], facts["unit"]
    first = f", the first {MOST_CLASSES}" if len(facts["classes"]) > MOST_CLASSES else ""
    charts: dict[str, Any] = {
        kind: draw_bars(
            names,
            [c[kind] for c in classes],
            title=f"{title} of each class{first}",
            alt=", ".join(f"{c['name']} {c[kind]}" for c in classes) + ".",
            x_label=title.lower(),
        )
        for kind, title in (("images", "Images"), ("groups", unit.capitalize()))
    }
    for part, statistics in CHARTS.items():
        drawn = (facts["statistics"].get(name) for name in statistics)
        charts[part] = [_draw_statistic(one) for one in drawn if one and not one["alike"]]
    return charts


def _draw_statistic(one: Mapping[str, Any]) -> Chart:
    """Histograms of a statistic by class; of many classes, the quartiles."""
    label = f"{one['title']}, {one['unit']}" if one["unit"] else one["title"]
    medians = {k: q["median"] for k, q in one["classes"].items() if q}
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    alt = f"The median is lowest in {low} ({shown(medians[low])}) and highest in {high} "
    alt += f"({shown(medians[high])})."
    if len(one["shares"]) <= MOST_LINES:
        lines = [Line(k, one["edges"], [*s, s[-1]]) for k, s in one["shares"].items()]
        return draw_lines(
            lines, title=one["title"], alt=alt, x_label=label, y_label="share of images", steps=True
        )
    kept = list(medians)[:MOST_CLASSES]
    quartiles = [
        Estimate(k, medians[k], one["classes"][k]["lower"], one["classes"][k]["upper"])
        for k in kept
    ]
    return draw_forest(
        quartiles,
        title=f"{one['title']}: median and middle half",
        alt=alt,
        x_label=label,
        reference=None,
    )


# -------------------------------------------------------------------------------- shortcut probe


def _probe(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Charts and tables of the shortcut probe."""
    if probe["value"] is None:
        return {}
    flags = {(flag["statistics"], flag["class"]) for flag in probe["flags"]}
    rows = {"all": {**probe, "title": "all together"}, **probe["groups"]}
    estimates = [
        Estimate(of["title"], of["value"], low, high, emphasis=(key, None) in flags)
        for key, of in rows.items()
        for low, high in [of["ci95"] or (None, None)]
    ]
    parts = [f"{of['title']} {of['value']:.2f}" for of in rows.values()]
    over = "the classes, each against the rest" if len(probe["classes"]) > 2 else "the class"
    shown_as: dict[str, Any] = {
        "matrix": None,
        "forest": draw_forest(
            estimates,
            title="How well file statistics predict the class",
            alt=f"AUC for {over}: {', '.join(parts)}.",
            x_label="AUC on groups that were not learned from",
            reference=probe["limit"],
            x_limits=(0, 1),
        ),
        "rows": [
            [of["title"], f"{of['value']:.2f}", _interval(of["ci95"]),
             "flagged" if (key, None) in flags else "no",
             _measured(of)]
            for key, of in rows.items()
        ],
        "flags": [_flag(flag, rows) for flag in probe["flags"][:MOST_FLAGS]],
        "alone": [of["title"] for of in probe["groups"].values()],
        "pairs": [
            [" against ".join(of["classes"]), f"{of['value']:.2f}", _interval(of["ci95"]),
             *(f"{of['groups'][key]:.2f}" for key in probe["groups"])]
            for of in probe["pairs"]
        ],
    }  # fmt: skip
    names = list(probe["classes"])
    if 2 < len(names) <= MOST_CLASSES:
        values = [[of["classes"][name]["value"] for name in names] for of in rows.values()]
        marked = [
            (i, j)
            for i, key in enumerate(rows)
            for j, name in enumerate(names)
            if (key, name) in flags
        ]
        shown_as["matrix"] = draw_matrix(
            values,
            [of["title"] for of in rows.values()],
            names,
            title="The same, of each class against the rest",
            alt=f"AUC of {len(names)} classes by {len(rows)} probes; {len(marked)} are flagged.",
            row_label="statistics",
            column_label="class",
            texts=[[f"{value:.2f}" for value in line] for line in values],
            limits=(0.5, 1),
            marked=marked,
        )
    return shown_as


# -------------------------------------------------------------------------------------- tables


def _tables(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the tables."""
    names = [c["name"] for c in facts["classes"]]
    several = len(facts["sides"]) > 1
    return {
        "classes": [
            [
                c["name"], c["images"], f"{c['share']:.1%}", c["groups"], c["largest_group"],
                f"{c['largest_share']:.1%}" if c["largest_share"] is not None else "",
                *(facts["sides"][side][c["name"]] for side in facts["sides"] if several),
            ]
            for c in facts["classes"]
        ],
        "sides": [*facts["sides"]] if several else [],
        "origins": {
            STATED[kind]: [
                [of["names"][j], *(row[j] for row in of["images"]), of["groups"][j]]
                for j in range(len(of["names"]))
            ]
            for kind, of in facts["origins"].items()
        },
        "files": [
            [
                kind["format"], kind["channels"] or "", shown(kind["quantisation"]),
                kind["subsampling"] or "", *kind["images"],
            ]
            for kind in facts["files"]
        ],
        "names": names,
        "statistics": [
            [
                f"{one['title']}, {one['unit']}" if one["unit"] else one["title"],
                *(_middle(one["classes"][name]) for name in names),
            ]
            for one in facts["statistics"].values()
        ],
    }  # fmt: skip


def _measured(probe: Mapping[str, Any]) -> str:
    """What a probe takes, and its note."""
    taken = ", ".join(probe.get("statistics", [])) or "all of these"
    return f"{taken}; {probe['note']}" if probe["note"] else taken


def _flag(flag: Mapping[str, Any], probes: Mapping[str, Any]) -> str:
    """What was flagged: `blur, class sclerosed: 0.86 (0.67 to 0.95)`."""
    what = f", class {flag['class']} against the rest" if flag["class"] is not None else ""
    value = f"{flag['value']:.2f} ({_interval(flag['ci95'])})"
    return f"{probes[flag['statistics']]['title']}{what}: {value}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else ""


def _middle(quartiles: Mapping[str, float] | None) -> str:
    """Median and middle half."""
    if quartiles is None:
        return "\N{EN DASH}"
    lower, median, upper = (shown(quartiles[name]) for name in ("lower", "median", "upper"))
    return median if lower == upper else f"{median} ({lower} to {upper})"


def shown(value: float | None) -> str:
    """Three digits, or the whole part of a large number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
