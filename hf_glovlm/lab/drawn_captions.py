"""Captions of synthetic images, as varied as a pathologist's, for contrastive pretraining."""

import numpy as np

_NOUNS: dict[str, tuple[str, ...]] = {
    "viable": ("viable glomerulus", "normal glomerulus", "healthy glomerulus"),
    "ischemic": ("ischemic glomerulus", "glomerulus with ischemic change", "ischaemic glomerulus"),
    "segmental_sclerosis": ("segmentally sclerotic glomerulus", "segmental glomerulosclerosis"),
    "global_sclerosis": ("globally sclerotic glomerulus", "global glomerulosclerosis"),
    "atubular": ("atubular glomerulus", "glomerulus that has lost its tubule"),
}
# Features by the severity from which they show.
_FEATURES: dict[str, dict[float, tuple[str, ...]]] = {
    "viable": {
        0.0: ("open capillary loops", "a tuft that fills its capsule", "thin capillary walls"),
    },
    "ischemic": {
        0.0: ("a shrunken wrinkled tuft", "a wide Bowman's space"),
        0.4: ("a thickened Bowman's capsule", "collapsing capillary loops"),
        0.5: ("periglomerular fibrosis",),
    },
    "segmental_sclerosis": {
        0.0: ("part of the tuft replaced by matrix", "open capillary loops beside a scar"),
        0.4: ("an adhesion to Bowman's capsule", "obliterated lumens in one segment"),
    },
    "global_sclerosis": {
        0.0: ("matrix throughout the tuft", "obliterated capillary lumens"),
        0.6: ("the whole tuft replaced by matrix", "no open capillary loops"),
        0.5: ("Bowman's space filled with fibrous matrix",),
    },
    "atubular": {
        0.0: ("a contracted tuft in a wide capsule", "no tubule attached"),
        0.3: ("a tuft retracted to the vascular pole",),
        0.5: ("a cystic Bowman's space", "a capsule lined by plump cells"),
    },
}
# A caption names only what its stain can show: basement membranes need PAS or silver.
_MEMBRANE_FEATURES = {
    "viable": "thin smooth basement membranes",
    "ischemic": "wrinkled corrugated basement membranes",
}
_STAIN_WORDS = {
    "PAS": ("PAS", "periodic acid-Schiff"),
    "H&E": ("H&E", "hematoxylin and eosin"),
    "silver": ("silver", "Jones methenamine silver"),
    "trichrome": ("trichrome", "Masson trichrome"),
}
# Further ways to name a class: as a label, as a display name, as an adjective.
_NAMES: dict[str, tuple[str, ...]] = {
    "viable": ("viable", "normal"),
    "ischemic": ("ischemic", "ischemia", "ischaemic"),
    "segmental_sclerosis": (
        "segmental sclerosis", "segmental_sclerosis", "segmentally sclerosed glomerulus",
    ),
    "global_sclerosis": (
        "global sclerosis", "global_sclerosis", "globally sclerosed glomerulus", "sclerosis",
        "sclerotic glomerulus", "sclerosed glomerulus",
    ),
    "atubular": ("atubular", "glomerulus without a tubule"),
}  # fmt: skip
_OPENINGS = (
    "", "", "a photo of", "a picture of", "an image of", "a pathology image of", "a drawing of",
    "a histology image of", "a micrograph of", "a microscopy image showing", "a close-up photo of",
    "a blurry image of", "a cropped photo of", "a bright photo of", "a low resolution image of",
    "this is", "here is", "there is", "an example of", "a slide of", "kidney:", "class:",
    "a renal biopsy with", "diagnosis:", "findings consistent with", "a tile that contains",
)  # fmt: skip
_ENDINGS = (
    "", "", "", ".", ".", " in a kidney biopsy", " in the image", ", histology", " of the kidney",
    " seen under the microscope", " is present", " can be seen here", ", 400x", " tissue",
)  # fmt: skip
_FILLERS = (
    "the", "of", "and", "in", "to", "with", "for", "on", "from", "at", "by", "this", "that", "one",
    "some", "any", "small", "large", "good", "clean", "region", "field", "view", "crop", "section",
    "specimen", "patient", "sample", "renal", "cortex", "tissue", "case", "shown", "stain",
    "medical", "scan", "type", "kind", "category", "label", "picture", "photograph", "human",
    "body", "adult", "high", "quality", "light",
)  # fmt: skip


def _with_article(noun: str) -> str:
    if noun.endswith(("sclerosis", "ischemia")):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def write_caption(rng: np.random.Generator, class_name: str, severity: float, stain: str) -> str:
    """Caption a synthetic image in one of ten ways, most often by the published prompt itself.

    Args:
        rng: Draws the wording.
        class_name: One of `phantoms.CLASSES`.
        severity: 0 to 1; a feature is named from the severity at which it shows.
        stain: One of `phantoms.STAINS`; nothing is named that it cannot show.
    """
    nouns = _NOUNS[class_name]
    noun = nouns[max(0, int(rng.integers(-2, len(nouns))))]
    known = _FEATURES[class_name].items()
    features = [feature for onset, some in known if severity >= onset for feature in some]
    if stain in ("PAS", "silver") and class_name in _MEMBRANE_FEATURES:
        features.append(_MEMBRANE_FEATURES[class_name])
    first = int(rng.integers(len(features)))
    one, two = features[first], features[first - int(rng.integers(1, len(features)))]
    dye = _STAIN_WORDS[stain][int(rng.integers(2))]
    step = sum(severity >= onset for onset in (0.15, 0.4, 0.7))
    grade = ("minimal", "mild", "moderate", "severe")[step]
    degree = "no lesion" if class_name == "viable" else f"{grade} change"
    a_noun = _with_article(noun)
    templates = (
        f"A pathology image of {nouns[0]}",
        f"A pathology image of {noun}",
        f"A histopathology image of {a_noun}",
        f"A section stained with {dye} showing {a_noun}",
        f"{dye} stain: {a_noun} with {one}",
        f"A pathology image of {noun}, {one} and {two}",
        f"A kidney biopsy, {dye}: {noun}, {degree}",
        f"{noun}, {degree}, {dye} stain, {one}",
        f"A glomerulus with {one} and {two}, {dye} stain",
        f"A photomicrograph of {a_noun}, showing {one}",
    )
    return templates[max(0, int(rng.integers(-2, len(templates))))]


def vary_caption(rng: np.random.Generator, class_name: str, severity: float, stain: str) -> str:
    """Caption a synthetic image as a user's template may: a model must read the class in any.

    Half are those of `write_caption`; the others put a name of the class into an opening and an
    ending, or between words that carry nothing.

    Args:
        rng: Draws the wording.
        class_name: One of `phantoms.CLASSES`.
        severity: 0 to 1.
        stain: One of `phantoms.STAINS`.
    """
    way = rng.random()
    if way < 0.5:
        return write_caption(rng, class_name, severity, stain)
    names = _NOUNS[class_name] + _NAMES[class_name]
    name = names[int(rng.integers(len(names)))]
    if rng.random() < 0.5:
        name = _with_article(name)
    if way < 0.8:
        opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
        text = f"{opening} {name}{_ENDINGS[int(rng.integers(len(_ENDINGS)))]}".strip()
    else:
        words = rng.choice(_FILLERS, size=int(rng.integers(1, 9))).tolist()
        at = int(rng.integers(len(words) + 1))
        text = " ".join([*words[:at], name, *words[at:]])
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
