"""Outlines in every format that is read, and seeded damage to them.

`write(kind, shapes)` makes a file from numbers alone; nothing here has seen the readers.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.annotations import read_outlines, write_geojson

SIZE = (400, 300)  # of the slide
Shape = tuple[str | None, list[tuple[float, float]]]  # class and corners
SHAPES: list[Shape] = [
    ("normal", [(20, 20), (80, 30), (60, 90)]),
    ("global sclerosis", [(120, 40), (180, 40), (180, 100), (120, 100)]),
    (None, [(200, 200), (260, 210), (250, 280), (190, 260)]),
]
KINDS = ("geojson", "coco", "coco_rle", "coco_text", "results", "imagescope", "asap")


def coco(shapes: Sequence[Shape] = SHAPES, name: str = "S1.png", **image: Any) -> dict[str, Any]:
    """Instances of one image, polygons."""
    names = sorted({label for label, _ in shapes if label})
    annotations = []
    for n, (label, corners) in enumerate(shapes, start=1):
        one: dict[str, Any] = {"id": n, "image_id": 7, "segmentation": [[*sum(corners, ())]]}
        if label:
            one["category_id"] = names.index(label) + 1
        annotations.append(one)
    whole = {"id": 7, "file_name": name, "width": SIZE[0], "height": SIZE[1]} | image
    categories = [{"id": i + 1, "name": label} for i, label in enumerate(names)]
    return {"images": [whole], "annotations": annotations, "categories": categories}


def fill(corners: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Pixels `[height, width]` whose middle lies inside, by the even-odd rule."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]] + 0.5
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """Run lengths of a mask, column by column, from outside on."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    at = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff([0, *at.tolist(), mask.size])
    return [int(n) for n in (lengths[:-1] if lengths[-1] == 0 else lengths)]


def text_of(lengths: Sequence[int]) -> str:
    """Run lengths as COCO compresses them."""
    text = ""
    for i, n in enumerate(lengths):
        value = n - lengths[i - 2] if i > 2 else n
        while True:
            low, value = value & 31, value >> 5
            done = value == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def imagescope(shapes: Sequence[Shape] = SHAPES, more: str = "") -> str:
    """Layers by class, one region each."""
    layers = ""
    for n, (label, corners) in enumerate(shapes, start=1):
        points = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
        layers += (
            f'<Annotation Id="{n}" Name="{label or ""}" Type="4"><Attributes><Attribute '
            'Name="Description" Id="0" Value=""/></Attributes><Regions><Region Id="1" Type="0" '
            f'Text="" NegativeROA="0"><Attributes/><Vertices>{points}</Vertices></Region>{more}'
            "</Regions><Plots/></Annotation>"
        )
    return f'<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.25">{layers}</Annotations>'


def asap(shapes: Sequence[Shape] = SHAPES) -> str:
    """Annotations in groups; the points of each in another order than they are numbered."""
    rows = ""
    for n, (label, corners) in enumerate(shapes):
        points = [f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(corners)]
        rows += (
            f'<Annotation Name="Annotation {n}" Type="Polygon" PartOfGroup="{label}" '
            f'Color="#F4FA58"><Coordinates>{"".join(points[1:] + points[:1])}</Coordinates>'
            "</Annotation>"
        )
    groups = '<AnnotationGroups><Group Name="normal" PartOfGroup="None"/></AnnotationGroups>'
    return f"<ASAP_Annotations><Annotations>{rows}</Annotations>{groups}</ASAP_Annotations>"


def content_of(kind: str, shapes: Sequence[Shape] = SHAPES) -> str:
    """A file of one of the KINDS."""
    if kind in ("imagescope", "asap"):
        return {"imagescope": imagescope, "asap": asap}[kind](shapes)
    made: Any = coco(shapes)
    if kind == "geojson":
        made = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*corners, corners[0]]]},
                "properties": {"classification": {"name": label}} if label else {},
            }
            for label, corners in shapes
        ]
    if kind in ("coco_rle", "coco_text"):
        for one, (_, corners) in zip(made["annotations"], shapes, strict=True):
            lengths: Any = runs(fill(corners))
            counts = lengths if kind == "coco_rle" else text_of(lengths)
            one["segmentation"] = {"size": [SIZE[1], SIZE[0]], "counts": counts}
    if kind == "results":
        made = [one | {"image_id": "S1", "score": 0.9} for one in made["annotations"]]
    return json.dumps(made)


_ODD = ["NaN", "1e999", "-1e308", "1" * 400, "null", "[]", "{}", '"x"', "true", "-0.0", '""', "7"]


def damage(content: str, rng: random.Random) -> bytes:
    """A file as programs and people break it."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["cut", "flip", "value", "value", "value", "twice", "drop"])
        numbers = [*re.finditer(r"-?\d+(\.\d+)?|null|\[\]", content)]
        words = [*re.finditer(r'"[A-Za-z_]+"', content)]
        if kind == "cut":
            content = content[: rng.randrange(len(content) + 1)]
        elif kind == "flip" and content:
            at = rng.randrange(len(content))
            content = content[:at] + chr(rng.choice([0, 9, 34, 60, 91, 233, 0x4E00])) + content[at:]
        elif kind == "value" and numbers:
            at, end = rng.choice(numbers).span()
            content = content[:at] + rng.choice(_ODD) + content[end:]
        elif kind == "drop" and words:
            at, end = rng.choice(words).span()
            content = content[:at] + rng.choice(['"x"', "3", '"id"', '"size"']) + content[end:]
        elif kind == "twice" and content:
            at = rng.randrange(len(content))
            content += content[at : at + rng.randrange(200)]
    encoding = rng.choice(["utf-8", "utf-8", "utf-16", "latin-1"])
    return content.encode(encoding, "replace")


def check(path: Path, seed: int) -> None:
    """A damaged file gives sound outlines, or one sentence."""
    rng = random.Random(seed)
    path.write_bytes(damage(content_of(rng.choice(KINDS)), rng))
    try:
        outlines = read_outlines(path, slide="S1", size=SIZE)
    except GloVLMError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
    assert len(sentence) < 2000
    if sentence:
        return
    ids = [item.id for item in outlines.objects]
    assert len({*ids}) == len(ids) > 0
    for item in outlines.objects:
        x0, y0, x1, y1 = item.bounds
        assert 0 < x1 - x0 <= 1.05 * max(SIZE) or 0 < y1 - y0 <= 1.05 * max(SIZE)
        assert np.isfinite(item.area)
        assert item.area > 0
    write_geojson(path.with_name("again.geojson"), outlines.objects)
