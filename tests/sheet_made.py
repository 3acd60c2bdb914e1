"""Sheets of biopsies made by hand, as `slides.biopsy` describes them, for tests of their page."""

import math
from typing import Any

SOURCE = "Arkana 2017"
COUNTING = ["counting"]
ALL = "glomeruli"
OTHERS = "assessable glomeruli that are not globally sclerotic"


def glomerulus(number: int, label: str | None, **changed: Any) -> dict[str, Any]:
    """One glomerulus, as the model left it."""
    p = 0.4 + 0.59 * (number % 37) / 37
    return {
        "slide": "S1", "object": f"o{number}", "glomerulus": None, "number": number,
        "class": label, "by": "model", "probability": p, "doubt": 1 - p, "confirmed": False,
        "finder_score": None, "quality": [], "unlike_support": None, "set": None,
        "states": {}, "notes": [],
    } | changed  # fmt: skip


def lesion(name: str, count: int, denominator: int, **changed: Any) -> dict[str, Any]:
    """One row of the table of lesions."""
    share = count / denominator if denominator else 0.0
    low, high = 100 * max(share - 0.2, 0), 100 * min(share + 0.2, 1)
    return {
        "class": name, "words": name, "definition": "The whole tuft is obliterated.",
        "system": "general", "source": SOURCE, "verified": True, "note": None, "role": "lesion",
        "heading": None,
        "counts": {"present": count, "absent": denominator - count, "not_assessable": 2,
                   "not_read": 1},
        "shares": [{
            "of": OTHERS, "count": count, "denominator": denominator,
            "percent": 100 * share if denominator else None,
            "ci95": [low, high] if denominator else None, "holds": COUNTING,
        }],
        "corrected": None, "why_not_corrected": "No confusion matrix is known.", "notes": [],
    } | changed  # fmt: skip


def sheet(n: int = 20, **changed: Any) -> dict[str, Any]:
    """A draft of a native biopsy read by Oxford, with `n` glomeruli on one section."""
    sclerosis = lesion(
        "global sclerosis", n // 5, n, role="global sclerosis",
        corrected={"percent": 21.6, "ci95": [8.2, 44.9],
                   "holds": ["counting", "the classifier's errors"]},
        why_not_corrected=None,
    )  # fmt: skip
    sclerosis["shares"][0]["of"] = ALL
    left = n - n // 5
    crescents = lesion("crescent", left // 6, left, role="candidate",
                       heading="candidate for Oxford C, to be confirmed")  # fmt: skip
    crescents["shares"].insert(0, crescents["shares"][0] | {"of": ALL, "denominator": n})
    segmental = lesion(
        "segmental sclerosis", left // 4, left, role="candidate", verified=False,
        definition="A part of the tuft, never all of it, turned to matrix with closed lumens.",
        source="domain knowledge, unverified", heading="candidate for Oxford S, to be confirmed",
    )  # fmt: skip
    labels = ["global sclerosis", "segmental sclerosis", "crescent", "viable glomerulus"]
    glomeruli = [
        glomerulus(i + 1, labels[i % 4], states={"segmental sclerosis": "absent"}) for i in range(n)
    ]
    for i, one in enumerate(glomeruli):
        if i % 7 == 3:
            one["quality"] = ["cut by the border", *(["blurred"] if i % 2 else [])]
        if i % 5 == 4:
            one |= {"by": "AB", "confirmed": True, "probability": None, "doubt": None}
    glomeruli.sort(key=lambda one: -(one["doubt"] or 0.0))
    for i, one in enumerate(glomeruli):
        one["number"] = i + 1
    return {
        "kind": "biopsy_sheet", "version": 1, "research_use_only": True, "synthetic": False,
        "case": "B7",
        "status": {"draft": True, "signed_by": None, "words": "DRAFT, unreviewed",
                   "reasons": ["No reader is named (--signed-by)."]},
        "stated": {"system": "oxford", "kidney": "native", "arteries": 3, "biopsy": "1"},
        "sections": [
            {"slide": "S1", "stain": "PAS", "block": "A", "level": "2", "section_um": 3.0,
             "reader": None, "read": None, "model": "dinov2-small", "n": n, "used": True,
             "why_not": None},
            {"slide": "S2", "stain": "H&E", "block": "A", "level": "3", "section_um": None,
             "reader": "AB", "read": ["global sclerosis"], "model": "dinov2-small", "n": n // 2,
             "used": False,
             "why_not": "without glomerulus ids the section with most glomeruli is reported"},
        ],
        "join": {"by": "one section", "sentence": "Sections are not summed: no glomerulus has an "
                 "id, so the section with most glomeruli is reported."},
        "counts": {"n": n, "confirmed": n // 5, "provisional": n - n // 5, "cut": n // 7,
                   "not_assessable": 2},
        "adequacy": {"system": "oxford", "verdict": "adequate" if n >= 40 else None,
                     "rule": "at least 8 glomeruli", "n": n // 5, "arteries": 3,
                     "why": f"{n // 5} glomeruli are confirmed by a reader; provisional ones do "
                     "not count.", "source": "Oxford classification 2009", "verified": False},
        "chance_to_miss": {"percent": 10, "n": n, "chance": 0.9**n,
                           "sentence": f"A lesion that 10% of glomeruli have is missed by {n} "
                           f"glomeruli with a chance of {100 * math.pow(0.9, n):.0f}%."},
        "lesions": [sclerosis, segmental, crescents],
        "not_shown": [{"class": "T", "why": "tubules and interstitium are no glomeruli"},
                      {"class": "M", "why": "the section's thickness is not stated"}],
        "limits": ["Without H&E, immunofluorescence and electron microscopy there is no diagnosis.",
                   "A count is not a score."],
        "glomeruli": glomeruli, "notes": [],
    } | changed  # fmt: skip
