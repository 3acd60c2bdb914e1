"""Page of the docs on performance, from the JSON of one or two runs of `glovlm bench`.

`python -m hf_glovlm.lab.benches.page AFTER.json --before BEFORE.json > docs/performance.md`
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...rendering import Markdown, code, table
from . import BENCHES
from .document import MACHINE, Document, Row, compare_documents, read_document


@dataclass(frozen=True)
class Goal:
    """Goal that was set before the measurement.

    Attributes:
        row: Name of the row that measures it.
        of: Whether its value or its ratio counts.
        bound: The limit.
        most: Whether that is the most allowed; else the least.
        what: The goal in words.
        instructions: Instructions of the processor, one of which it presumes; empty for all.
    """

    row: str
    of: Literal["value", "ratio"]
    bound: float
    what: str
    most: bool = False
    instructions: frozenset[str] = frozenset()

    def judge(self, document: Document) -> str:
        """Outcome: `met`, `missed`, `not measured` or `another processor`."""
        if self.instructions and not self.instructions & set(document["machine"]["flags"]):
            return "another processor"
        measured = self.find(document)
        if measured is None:
            return "not measured"
        fits = measured <= self.bound if self.most else measured >= self.bound
        return "met" if fits else "missed"

    def find(self, document: Document) -> float | None:
        """The number that counts, if it was measured."""
        values = (row[self.of] for row in document["rows"] if row["name"] == self.row)
        measured: float | None = next(values, None)
        return measured


_SHORT = frozenset(  # instructions for products of bf16 or int8
    ["avx512_bf16", "amx_bf16", "bf16", "avx512_vnni", "avx_vnni", "amx_int8", "i8mm"]
)
GOALS: tuple[Goal, ...] = (
    Goal("data.reads", "value", 1, "reads of an image in a warm run, no patients given", most=True),
    Goal("data.decodes", "value", 0, "decodes of an image in a warm run", most=True),
    Goal("data.draft_1024", "ratio", 1.5, "draft mode on JPEG files of 1,024 px, times faster"),
    Goal("data.draft_2048", "ratio", 2.2, "the same of 2,048 px"),
    Goal(
        *("encode.best", "ratio", 2.2, "best runtime, times transformers' fp32"),
        instructions=_SHORT,
    ),
    Goal("encode.auto", "ratio", 0.97, "`auto`, times transformers' fp32, within 3% of timing"),
    *(
        Goal(
            *(f"study.overhead_{name}", "value", 0.05),
            f"a study's cell beside fitting and metrics, {backbone}, s",
            most=True,
        )
        for name, backbone in (("mini", "`mini`"), ("clip", "ViT-B/16 CLIP"))
    ),
    Goal(
        *("study.resume_10000", "value", 20),
        "a finished study of 10,000 cells starts and reports, s",
        most=True,
    ),
    Goal("metrics.auc_1000", "ratio", 7, "bootstrap of the AUC, 1,000 predictions, times faster"),
    Goal("metrics.auc_10000", "ratio", 20, "the same with 10,000"),
    *(
        goal
        for kind in ("distinct", "equal", "clustered")
        for goal in (
            Goal(
                *(f"near_duplicates.memory_{kind}", "value", 1024),
                f"near-duplicates of 100,000 {kind} images, MiB above the import",
                most=True,
            ),
            Goal(
                *(f"near_duplicates.{kind}", "ratio", 2.6),
                f"the same, time to that of half as many {kind} ones",
                most=True,
            ),
        )
    ),
    Goal(
        *("methods.slowest_head", "value", 20),
        "slowest method on features, 100 classes x 16 x 768, s of one core",
        most=True,
    ),
    Goal(
        *("methods.transclip_2000", "value", 10),
        "`transclip` with 2,000 queries, s of one core",
        most=True,
    ),
    Goal("slide.tower_share", "value", 0.9, "a ViT-B/16's share of the time on a slide"),
    Goal(
        *("slide.memory_above_import", "value", 400),
        "peak memory above the import, a slide of 40,000 px with `mini`, MiB",
        most=True,
    ),
)

_TOP = """# Performance

Made of documents that `glovlm bench --output FILE` wrote; where several runs were put together,
`commit` says which:

```bash
python -m hf_glovlm.lab.benches.page docs/performance/after.json{before} > docs/performance.md
```

Images are synthetic and weights random: nothing here says how right a model is. **Seconds and rates
are of one machine. A ratio is of two ways that took turns inside one run**, so that what else the
machine did slowed both, and the two ways gave the same result before they were timed; what a ratio
is to stands behind each row."""
_BEFORE = """ \\
    --before docs/performance/before.json"""
_TWO = "`before` is an earlier commit on the same benches; `after/before` divides the two values."


def render_performance(after: Document, before: Document | None = None) -> str:
    """Render the page.

    Args:
        after: Document of `glovlm bench`.
        before: Document of an earlier run, whose numbers stand beside.

    Returns:
        Markdown: goals, machine and versions, and a table a bench.
    """
    notes = compare_documents(after, before) if before is not None else []
    parts = [_TOP.format(before="")] if before is None else [_TOP.format(before=_BEFORE), _TWO]
    goals = table(list(_goal_rows(after, before)), _GOALS_HEADER[before is None])
    parts += ["## Goals", goals, "## Machine and versions", _about(after, before)]
    parts += ["\n".join(f"* {note}" for note in notes)] if notes else []
    gone = [] if before is None else after["before"]["rows"]
    for name, bench in BENCHES.items():
        of = [row for row in [*after["rows"], *gone] if row["name"].split(".")[0] == name]
        if of:
            cells = table(list(map(_cells, of)), _HEADER)
            if before is not None:
                cells = table([_compared_cells(row) for row in of], _COMPARED_HEADER)
            parts += [f"## `{name}`: {bench.help}", cells]
        if reason := after["unfinished"].get(name):
            parts.append(f"`{name}` is not complete here: {reason}")
    return "\n\n".join(map(str, parts)) + "\n"


_HEADER = ("row", "value", "unit", "ratio", "what")
_COMPARED_HEADER = (
    *("row", "before", "after", "unit", "after/before"),
    *("ratio before", "ratio after", "what"),
)
_GOALS_HEADER = {
    True: ["goal", "row", "limit", "measured", ""],
    False: ["goal", "row", "limit", "before", "measured", ""],
}


def _goal_rows(after: Document, before: Document | None) -> Iterator[list[Any]]:
    for goal in GOALS:
        outcome = goal.judge(after)
        limit = f"{'at most' if goal.most else 'at least'} {goal.bound:g}"
        earlier = [] if before is None else [_number(goal.find(before))]
        shown = Markdown(f"**{outcome}**" if outcome == "missed" else outcome)
        measured = _number(goal.find(after))
        yield [Markdown(goal.what), code(goal.row), limit, *earlier, measured, shown]


def _about(after: Document, before: Document | None) -> Markdown:
    """Table of machine, versions and commit, side by side."""
    documents = [after] if before is None else [before, after]
    rows = [["commit", *(_text(one.get("commit")) for one in documents)]]
    for part, words in (("machine", MACHINE), ("versions", {})):
        names = dict.fromkeys(name for one in documents for name in one[part])
        rows += [
            [words.get(name, name), *(_text(one[part].get(name)) for one in documents)]
            for name in names
        ]
    return table(rows, ["", "before", "after"] if before is not None else ["", "here"])


def _cells(row: Row) -> list[Any]:
    what = Markdown(row["what"])
    return [_short(row), _number(row["value"]), row["unit"], _number(row["ratio"]), what]


def _compared_cells(row: Row) -> list[Any]:
    """Cells of a row beside its earlier self; of one that is gone, or new, half are empty."""
    now, then = (row, row["before"] or {}) if "before" in row else ({}, row)
    quotient = row["quotient"]["value"] if "before" in row else None
    values = (_number(one.get("value")) for one in (then, now))
    ratios = (_number(one.get("ratio")) for one in (then, now))
    return [_short(row), *values, row["unit"], _number(quotient), *ratios, Markdown(row["what"])]


def _short(row: Row) -> Markdown:
    """Name of a row without that of its bench."""
    return code(row["name"].partition(".")[2])


def _number(value: float | None) -> str:
    """A measured number as the rows hold it: three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none of note"
    return "none" if value is None else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page of one or two documents."""
    parser = argparse.ArgumentParser(description="Print the page of one or two documents.")
    parser.add_argument("after", type=Path, help="JSON of `glovlm bench`.")
    parser.add_argument("--before", type=Path, help="JSON of an earlier run.")
    given = parser.parse_args(arguments)
    before = read_document(given.before) if given.before else None
    sys.stdout.write(render_performance(read_document(given.after), before))


if __name__ == "__main__":
    main()
