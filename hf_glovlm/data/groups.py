"""Groups: which rows show one patient, case, slide or image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GloVLMError
from ..tables import normal_text, spelling
from .folder import column
from .looks import Looks, look_at

if TYPE_CHECKING:
    from datasets import Dataset

NEAR_DUPLICATE = "near_duplicate"
GROUP_COLUMNS = {
    "patient_id": "groups are patients",
    "case_id": "groups are cases; patients are unknown",
    "slide_id": "groups are slides; patients are unknown",
    "group_id": "groups are as given in group_id; patients are unknown",
}


@dataclass(frozen=True)
class Groups:
    """Groups: the patient (or case, slide, near-duplicate cluster) of each row.

    Attributes:
        column: The column the ids come from, or `near_duplicate`.
        ids: One id per row.
        note: What a group is, and what was merged or missing.
    """

    column: str
    ids: list[str]
    note: str


def group_rows(
    ds: "Dataset", *, group_column: str | None = None, looks: Looks | None = None
) -> Groups:
    """Group rows by patient, case, slide or near-duplicate cluster.

    Groups are patients where `patient_id` is known, else cases, else slides, else `group_id`, else
    clusters of near-duplicate images. A row without a value in that column joins the rows with
    which it shares a value in the next column (such as its slide), else it is a group of its own.
    Rows that share a `glomerulus_id` (one glomerulus on several levels or stains) merge their
    groups. A merged group bears the first of its ids. Ids are those of an institution, where the
    column `institution` names it: `P1` of two hospitals are two patients, `P1 (north)` and
    `P1 (south)`.

    Near duplicates: the 64 signs of the low frequencies of a cosine transform of the 32 x 32 grey
    image differ in at most 6 places, and the 16 x 16 colour thumbnails by at most 10 of 255 on
    average. Copies that were compressed anew, resized or made 5% brighter are found; of 2,325 real
    glomeruli and tiles from different places no two were taken for copies.

    Args:
        ds: Rows as `load_dataset` makes them.
        group_column: Use this column (or `near_duplicate`) instead of the first one known.
        looks: At these rows, if at hand; else the images are looked at where they decide.

    Raises:
        GloVLMError: `group_column` is not there, or an image cannot be decoded.
    """
    known = [name for name in GROUP_COLUMNS if name in ds.column_names]
    if group_column is None:
        named = (name for name in known if any(v is not None for v in column(ds, name)))
        group_column = next(named, NEAR_DUPLICATE)
    if group_column == NEAR_DUPLICATE:
        ids: list[str | None] = [None] * len(ds)
        note = "no patient, case or slide is given: groups are near-duplicate clusters of images"
        note += "; patients are unknown"
        if looks is None or not looks.decoded:
            looks = look_at(ds.select_columns(["image"]))
        links = [*looks.near_duplicates]
        lower: list[str] = []
    elif getattr(ds.features.get(group_column), "dtype", "") == "string":
        ids = ids_within_institutions(ds, group_column)
        note = GROUP_COLUMNS.get(group_column, f"groups are values of {group_column}")
        if shared := len({*ids} - {*column(ds, group_column)}):
            note += f"; {shared} of them bear their institution, since another one uses their id"
        links = []
        lower = known[known.index(group_column) + 1 :] if group_column in known else []
    else:
        have = ", ".join(known) or "none"
        raise GloVLMError(
            f"expected the group column '{group_column}', found {have}; add it to metadata.csv."
        )
    names = column(ds, "file_name")
    raw = [name if value is None else value for name, value in zip(names, ids, strict=True)]
    links += _same(raw)
    alone = [row for row, value in enumerate(ids) if value is None]
    if alone and group_column != NEAR_DUPLICATE:
        note += f"; {len(alone)} of {len(ids)} rows have no {group_column}"
        note += " and are grouped by " + ", ".join([*lower, "themselves"])
        links += _fallback_links(ds, alone, lower)
    before = len(set(_components(raw, links)))
    if "glomerulus_id" in ds.column_names:
        links += _same(ids_within_institutions(ds, "glomerulus_id"))
    merged = _components(raw, links)
    joined = before - len(set(merged))
    if joined:
        note += f"; {joined} groups were merged into others that share a glomerulus_id with them"
    return Groups(group_column, merged, note)


def ids_within_institutions(ds: "Dataset", name: str) -> list[str | None]:
    """Ids of a column; one that several institutions use bears the institution's name.

    An id that some row gives without an institution stays as it is: whose it is, is unknown.
    """
    ids: list[str | None] = column(ds, name)
    if name == "institution" or "institution" not in ds.column_names:
        return ids
    places = column(ds, "institution")
    used: dict[str | None, dict[str | None, str]] = {}  # by the spelling key of an institution
    for value, place in zip(ids, places, strict=True):
        used.setdefault(value, {}).setdefault(place and spelling(place), place)
    several = {v for v, by in used.items() if v is not None and len(by) > 1 and None not in by}
    return [
        f"{value} ({used[value][spelling(place)]})" if value in several else value
        for value, place in zip(ids, places, strict=True)
    ]


def differing_spellings(values: Iterable[str]) -> list[list[str]]:
    """Values that differ in spelling only, see `tables.spelling`: a list for each key, sorted."""
    keys: dict[str, set[str]] = {}
    for value in values:
        keys.setdefault(spelling(value), set()).add(value)
    return [sorted(written) for _, written in sorted(keys.items()) if len(written) > 1]


def in_quotes(values: Sequence[str]) -> str:
    """Up to three values as a sentence lists them; escaped where two of them look the same."""
    alike = len({normal_text(value) for value in values}) < len(values)
    shown = [ascii(value) if alike else f"'{value}'" for value in values[:3]]
    more = [f"{len(values) - 3} more"] if len(values) > 3 else []
    *first, last = [*shown, *more]
    return f"{', '.join(first)} and {last}" if first else last


def _same(values: Sequence[str | None]) -> list[list[int]]:
    """The rows of each value that is not missing."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None:
            rows.setdefault(value, []).append(row)
    return list(rows.values())


def _fallback_links(ds: "Dataset", alone: Sequence[int], lower: Sequence[str]) -> list[list[int]]:
    links: list[list[int]] = []
    open_rows = set(alone)
    for name in lower:
        for rows in _same(ids_within_institutions(ds, name)):
            here = open_rows.intersection(rows)
            if here:
                links.append(rows)
                open_rows -= here
    return links


def _components(raw: Sequence[str], links: Iterable[Sequence[int]]) -> list[str]:
    """Connected components of rows; each row gets the smallest id of its component."""
    from scipy.cluster.hierarchy import DisjointSet

    rows = DisjointSet(range(len(raw)))
    for first, *rest in links:
        for other in rest:
            rows.merge(first, other)
    ids = list(raw)
    for component in rows.subsets():
        smallest = min(raw[row] for row in component)
        for row in component:
            ids[row] = smallest
    return ids
