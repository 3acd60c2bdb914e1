"""Rules of a biopsy as a whole: whether it is adequate, what it may miss, and its limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from .biopsy_lesions import Biopsy
from .counting import NOT_A_SCORE

PERCENT = 10  # of the glomeruli, those that have the lesion whose chance to be missed is shown
SPECIFICITY, BIOPSY = 0.98, 20  # of the example why a candidate is no score


def judge_adequacy(biopsy: Biopsy, confirmed: int, *, complete: bool) -> dict[str, Any]:
    """Adequacy of a biopsy by the rules of the declared class system.

    Glomeruli that no reader confirmed may be none; sections that are not counted, and what a finder
    outlined where nobody read all, may lack some. A verdict is given where neither can change it.

    Args:
        biopsy: The biopsy.
        confirmed: How many of its glomeruli a reader confirmed.
        complete: Whether all of its sections are counted.

    Returns:
        `system`, `verdict` (`None` without one), `rule`, `n` (confirmed glomeruli), `arteries`,
        `why`, `source` and `verified`.
    """
    system, arteries = biopsy.system, biopsy.stated.get("arteries")
    n = len(biopsy.units)
    base: dict[str, Any] = {
        "system": system.name if system is not None else biopsy.stated.get("system"),
        "verdict": None,
        "rule": None,
        "n": confirmed,
        "arteries": arteries,
        "source": system.source if system is not None else None,
        "verified": bool(system is not None and system.verified),
    }
    if system is None:
        return base | {"why": "No class system is declared (system), so no rule applies."}
    rules = system.adequacy
    graded = [f"{rule.verdict}: {rule.words}" for rule in rules]
    base["rule"] = "; ".join(graded) if len(rules) > 1 else rules[0].words
    if any(rule.arteries for rule in rules) and arteries is None:
        return base | {
            "why": "The number of arteries is not stated: count them and write it into the table "
            "of cases (arteries)."
        }
    counted = arteries or 0
    met = next((r for r in rules if confirmed >= r.glomeruli and counted >= r.arteries), None)
    hoped = next((r for r in rules if n >= r.glomeruli and counted >= r.arteries), None)
    shown = f"{confirmed} confirmed glomeruli" + (
        f" and {counted} arter{'y' if counted == 1 else 'ies'}"
        if any(rule.arteries for rule in rules)
        else ""
    )
    if met is not None and met is rules[0]:
        return base | {"verdict": met.verdict, "why": f"{shown}."}
    if hoped is not met:
        return base | {
            "why": f"{shown}, and {n - confirmed} more that no reader confirmed: with them it may "
            f"be {hoped.verdict if hoped is not None else 'adequate'}; read them first."
        }
    more = next(
        (r for r in rules if r is not met and counted >= r.arteries and confirmed < r.glomeruli),
        None,
    )
    if more is not None and not complete:
        return base | {"why": f"{shown}; the sections that are not counted may show others."}
    if more is not None and biopsy.by_finder and not biopsy.all_read:
        return base | {
            "why": f"{shown}; the finder may have missed others: read all of it (--all-read)."
        }
    verdict = "unsatisfactory" if met is None else met.verdict
    least = rules[-1] if met is None else met
    why = f"{shown}, and not {least.words}." if met is None else f"{shown}."
    return base | {"verdict": verdict, "why": why}


def chance_to_miss(n: int) -> dict[str, Any]:
    """Chance that no one of `n` glomeruli shows a lesion that a tenth of all have: .9 ** n.

    Args:
        n: Glomeruli of the biopsy.
    """
    if n == 0:
        sentence = "Without a glomerulus no lesion can be seen."
        return {"percent": PERCENT, "n": 0, "chance": None, "sentence": sentence}
    chance = (1 - PERCENT / 100) ** n
    shown = "less than 1%" if chance < 0.01 else f"{100 * chance:.0f}%"
    return {
        "percent": PERCENT,
        "n": n,
        "chance": chance,
        "sentence": (
            f"A lesion that {PERCENT}% of all glomeruli have is missed by {n} of them with a "
            f"chance of {shown} (.9 to the power of {n})."
        ),
    }


def limits_of(biopsy: Biopsy, counts: Mapping[str, int], stains: Sequence[str | None]) -> list[str]:
    """What a sheet does not say, in sentences.

    Args:
        biopsy: The biopsy.
        counts: Of its glomeruli.
        stains: Of the sections that are counted.
    """
    limits = [NOT_A_SCORE]
    without = ["immunofluorescence", "electron microscopy"]
    without = without if "H&E" in stains else ["an H&E section", *without]
    limits.append(
        f"This sheet is made without {', '.join(without[:-1])} and {without[-1]}: no diagnosis "
        "follows from it."
    )
    if counts["n"] == 0:
        limits.append("No glomerulus was counted, so there is no percentage of any lesion.")
    if counts["provisional"]:
        limits.append(
            f"{counts['provisional']} of {counts['n']} glomeruli are provisional: no reader "
            "confirmed that they are glomeruli."
        )
    ones = [one for unit in biopsy.units for one in unit]
    if biopsy.by_finder and not biopsy.all_read:
        limits.append(
            "A finder outlined these glomeruli: those that it missed are in no count, and what it "
            "outlined wrongly is, until a reader read all of the section."
        )
    if biopsy.all_read and ones:
        limits.append("Intervals hold the error of counting, and no reader's error.")
    elif any(one.by == "model" for one in ones):
        limits.append(
            "Intervals of counted percentages hold the error of counting alone; corrected ones say "
            "what else they hold."
        )
    differing = [text for s in biopsy.sections if s.reading for text in s.reading.differing]
    if differing:
        limits.append(
            f"Readers contradict each other ({len(differing)} in the notes): the counts are of the "
            "reader who signs."
        )
    if biopsy.system is not None and biopsy.system.name == "oxford":
        false = 1 - SPECIFICITY**BIOPSY
        limits.append(
            "E, S and C are candidates to be confirmed, never E1, S1 or C1: with a specificity of "
            f"{SPECIFICITY:g} {100 * false:.0f}% of biopsies of {BIOPSY} glomeruli without the "
            "lesion show at least one that is called so."
        )
    if biopsy.system is not None and not biopsy.system.verified:
        limits.append(
            f"The adequacy rule of the {biopsy.system.title} is recalled and was not checked "
            "against a source."
        )
    return limits
