"""Biopsy sheets as pages: from `sheet.json` and pictures to one HTML file that needs nothing else.

The page computes no number: it shows what the facts hold. It loads nothing and runs nothing, also
where a browser would (a content security policy says so), and prints on A4 with the marks that
must not be missed on every page.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rendering import render_page

_SYSTEMS = {
    "oxford": "Oxford (IgA nephropathy)",
    "isn_rps": "ISN/RPS (lupus nephritis)",
    "banff": "Banff (transplant)",
}
_NOT = "not: "  # before what an interval does not hold
_GRID = 600  # places along a picture's side at which an outline may turn: finer than it is shown


@dataclass(frozen=True)
class Picture:
    """Picture of a glomerulus: its outline, over what the slide shows there.

    Attributes:
        rings: Closed rings `[points, 2]` of the outline and of its holes: x, y in 0 ... 1 of the
            picture's side.
        jpeg: The square around it, without the line of the outline; `None`: the outline alone.
    """

    rings: Sequence[NDArray[np.float64]]
    jpeg: bytes | None = None

    @property
    def address(self) -> str | None:
        """The square as an address that holds it (RFC 2397)."""
        if self.jpeg is None:
            return None
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode('ascii')}"

    @property
    def path(self) -> str:
        """The outline as SVG draws it, in `_GRID` places a side."""
        parts = []
        for ring in self.rings:
            points = np.rint(np.nan_to_num(ring) * _GRID).clip(0, _GRID).astype(int)
            turns = np.any(np.diff(points, axis=0, prepend=-1), axis=1)
            parts.append("M" + "L".join(f"{x} {y}" for x, y in points[turns].tolist()) + "Z")
        return "".join(parts)


def render_sheet(sheet: Mapping[str, Any], pictures: Sequence[Picture | None]) -> str:
    """Page of a biopsy's sheet: a summary that prints, then every glomerulus.

    Args:
        sheet: Content of `sheet.json`.
        pictures: Of each of its `glomeruli`; `None` where nothing is known of the outline.

    Raises:
        jinja2.UndefinedError: The sheet lacks something.
    """
    notes = _Notes()
    lesions = [_lesion(row, notes) for row in sheet["lesions"]]
    shown = list(zip(sheet["glomeruli"], pictures, strict=True))
    groups = [
        ("Provisional: confirmed by no reader", [p for p in shown if not p[0]["confirmed"]]),
        ("Confirmed by a reader", [p for p in shown if p[0]["confirmed"]]),
    ]
    values = {
        "GRID": _GRID,
        "sheet": sheet,
        "system": _SYSTEMS.get(sheet["stated"]["system"], sheet["stated"]["system"]),
        "lesions": lesions,
        "notes": notes.texts,
        "groups": [group for group in groups if group[1]],
    }
    return render_page("biopsy_sheet.html.j2", values)


def render_index(contents: Mapping[str, Any]) -> str:
    """Page that leads to the sheets of a folder, one line a case.

    Args:
        contents: Content of `sheets.json`.
    """
    return render_page("biopsy_index.html.j2", dict(contents))


class _Notes:
    """Numbered notes: one sentence has one number, however often it is referred to."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, sentences: Iterable[str | None]) -> list[int]:
        """Numbers, from 1, of those sentences that are there."""
        numbers = []
        for text in filter(None, sentences):
            if text not in self.texts:
                self.texts.append(text)
            numbers.append(1 + self.texts.index(text))
        return numbers


def _lesion(row: Mapping[str, Any], notes: _Notes) -> dict[str, Any]:
    """A row of the table of lesions, its sentences as numbers of notes."""
    facts = "; ".join(part for part in (row["system"], row["source"]) if part)
    about = f"{row['words']}: {row['definition']} [{facts}]" if row["definition"] else None
    if about and not row["verified"]:
        about += " Not checked against the source."
    own = notes.number([about, row["note"], *row["notes"]])
    shares = [
        {"least": False, **share, "notes": notes.number([_holds(share)])} for share in row["shares"]
    ]
    corrected, why = row["corrected"], row["why_not_corrected"]
    if corrected is not None:
        of = f"The corrected percentage is of {corrected['of']}." if corrected.get("of") else None
        corrected = {"least": False, **corrected} | {"notes": notes.number([of, _holds(corrected)])}
    why_not = notes.number([f"Not corrected: {why.rstrip('.')}." if why else None])
    return {
        **row, "notes": own, "shares": shares, "corrected": corrected, "why_not_corrected": why_not
    }  # fmt: skip


def _holds(share: Mapping[str, Any]) -> str | None:
    """What an interval holds, where there is one."""
    if share["ci95"] is None:
        return None
    inside = [part for part in share["holds"] if not part.startswith(_NOT)]
    outside = [part.removeprefix(_NOT) for part in share["holds"] if part.startswith(_NOT)]
    but = f", and does not hold: {'; '.join(outside)}" if outside else ", and nothing else"
    return f"The 95% interval holds: {'; '.join(inside)}{but}."
