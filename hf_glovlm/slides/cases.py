"""Case-level counts: the sections of one case, joined by the ids of their glomeruli."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .counting import count_classes
from .objects import GLOMERULUS, read_objects


def join_sections(ids: Mapping[str, Sequence[str]]) -> list[str]:
    """Sections that are counted together: all, or the one with the most glomeruli.

    Args:
        ids: Which glomeruli each section shows, as `read_objects` names them.
    """
    every = [name for own in ids.values() for name in own]
    if len(ids) == 1 or (every and all(name.startswith(GLOMERULUS) for name in every)):
        return [*ids]
    return [max(ids, key=lambda name: len(ids[name]))]


def count_cases(
    slides: Sequence[Mapping[str, Any]],
    output: Path,
    class_names: Sequence[str],
    confusion: Any,
    stated: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Case-level counts over the slides of each case; a glomerulus on several of them counts once.

    Where some slides of a case have outlined objects, these are counted and the others left out.
    Of several, all are counted where every glomerulus bears an id that tells which are the same;
    else the one with the most glomeruli, as levels that are summed would count one several times.
    Percentages are corrected as those of a slide are, where no glomerulus is on several.

    Args:
        slides: Entries of the results.
        output: The folder of the run.
        class_names: `[K]`; without classes nothing is counted.
        confusion: As for `count_classes`.
        stated: What the table of cases states of each.

    Returns:
        `case`, `status`, `slides` (those that are counted), `counts`, `flags` and `stated` of each
        case. The
        flags name the slides that are not counted and why; a case without any that is has the
        status `failed`, and `None` for counts.
    """
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for entry in slides:
        if entry["case"] is not None and class_names:
            cases.setdefault(entry["case"], []).append(entry)
    counted: list[dict[str, Any]] = []
    for case, every in cases.items():
        entries = [e for e in every if e["counts"] is not None]
        failed = ", ".join(e["slide"] for e in every if e["counts"] is None)
        notes = [f"not counted, as failed: {failed}"] if failed else []
        if not entries:
            counted.append(
                {"case": case, "status": "failed", "slides": [], "counts": None, "flags": notes}
            )
            continue
        with_objects = [e for e in entries if e["counts"]["unit"] == "objects"]
        used = with_objects or entries
        if with_objects:
            tables = {
                e["slide"]: read_objects(
                    output / "slides" / e["slide"] / "objects.parquet", e["slide"]
                )
                for e in used
            }
            joined = join_sections({name: ids for name, (_, ids) in tables.items()})
            counts = count_classes(
                np.concatenate([tables[name][0] for name in joined]),
                class_names,
                ids=[one for name in joined for one in tables[name][1]],
                confusion=confusion,
            )["all"]
            if apart := [name for name in tables if name not in joined]:
                notes.append(
                    f"not counted, as glomeruli bear no ids in all sections, and sections are not "
                    f"summed: {', '.join(apart)}"
                )
            used = [e for e in used if e["slide"] in joined]
        else:
            totals = [
                sum(e["counts"]["classes"][name]["count"] for e in used) for name in class_names
            ]
            calls = np.repeat(np.arange(len(totals)), totals)
            counts = count_classes(calls, class_names, unit="tiles")["all"]
        names = [e["slide"] for e in used]
        if uncounted := ", ".join(e["slide"] for e in entries if e not in (with_objects or used)):
            notes.append(f"not counted, as without objects: {uncounted}")
        counted.append(
            {"case": case, "status": "done", "slides": names, "counts": counts, "flags": notes}
        )
    known = stated or {}
    return [row | {"stated": dict(known.get(row["case"], {}))} for row in counted]
