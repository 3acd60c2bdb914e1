"""Crops of outlined objects: from a slide and its annotations to a folder to train on.

Run once per slide into the same folder: rows of other slides stay, rows of the same slide are
replaced, all files with `metadata.csv` as one step. The result is an ImageFolder, as `load_dataset`
reads it; `manifest.json` states which files the slides were, by their content.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from scipy import ndimage
from scipy.spatial import ConvexHull

from ...data.folder import open_image
from ...errors import GloVLMError
from ...files import (
    LOCK,
    MANIFEST,
    UNFINISHED_DATA,
    Manifest,
    digest_file,
    is_plain_name,
    one_writer,
    put_in_place,
    read_manifest,
    staging,
    write_csv,
    write_json,
)
from ...tables import read_table
from .annotations import SlideObject, overlap, read_geojson
from .wsi import Slide, describe_slide, is_same_slide, open_slide

Bounds = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of level 0

_PLAIN = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})  # region images; the rest are slides
_MASKS = frozenset({".png", ".bmp", ".tif", ".tiff"})
_COLOURS = {"red": "#f00", "green": "#0f0", "blue": "#00f", "yellow": "#ff0", "cyan": "#0ff"}
_COLUMNS = (
    "file_name", "label", "slide_id", "patient_id", "object_id", "mpp", "x", "y", "width",
    "height", "flags",
)  # fmt: skip
VERSION = 1  # of what the manifest says; raise it when its readers would understand it otherwise
WAIT = 600.0  # seconds for another process that cuts crops into the same folder
_SAME = 0.5  # intersection over union above which two outlines are one object
_SOLID = 0.9  # area over convex hull below which a blob of a mask looks like two that touch
_STRANGE = 0.001  # share of pixels whose colour is neither a class nor black or white


@dataclass
class CropSummary:
    """Summary of the crops of one slide, cut and not cut.

    Attributes:
        slide: The slide's name.
        counts: Crops by class.
        mpp: Micrometres per pixel of level 0; `None` where the slide states none.
        unlabelled: Ids of objects without a class: not cut.
        duplicates: Pairs (left out, taken) of ids that outline the same object.
        flags: Crops, or objects left out, by flag: `partial` (touches the slide's edge), `merged`
            (a blob of a mask that looks like two), `disputed` (outlined twice, with two classes).
        skipped: Ids of flagged objects that were not cut (`keep_flagged=False`).
        specks: Blobs of a mask that were too small to be an object.
        notes: What a person should know about the file.
    """

    slide: str
    counts: dict[str, int] = field(default_factory=dict)
    mpp: float | None = None
    unlabelled: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    specks: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Candidate:
    """Candidate crop: an object before it is cut."""

    id: str
    label: str | None
    bounds: Bounds
    outline: SlideObject | None = None
    flags: list[str] = field(default_factory=list)


class _Region:
    """Region image, read as if it were a slide of one level."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.name, self.mpp = path.stem, mpp
        self.flags: list[str] = []
        if mpp is None:
            self.flags.append("The scale is not known; give the micrometres per pixel.")
        self._image = open_image(path)
        self.size = self._image.size

    def read(
        self, x: int, y: int, width: int, height: int, *, downsample: float = 1.0
    ) -> Image.Image:
        """Cut a box, white outside the image, and shrink it."""
        box = Image.new("RGB", (width, height), "white")
        box.paste(self._image, (-x, -y))
        if downsample == 1:
            return box
        small = max(round(width / downsample), 1), max(round(height / downsample), 1)
        return box.resize(small, Image.Resampling.BOX)

    def __enter__(self) -> "_Region":
        return self

    def __exit__(self, *error: Any) -> None:
        self._image.close()


def cut_crops(
    slide: Path,
    annotations: Path,
    output_dir: Path,
    *,
    mpp: float | None = None,
    margin: float = 1.25,
    label_property: str | None = None,
    colours: Mapping[str, str] | None = None,
    slide_id: str | None = None,
    patient_id: str | None = None,
    keep_flagged: bool = True,
    min_extent: int = 16,
    max_side: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> CropSummary:
    """Cut every labelled object of a slide or region image into a folder per class.

    A crop is a square of `margin` times the object's longer side around the middle of its box,
    white where it reaches beyond the slide. `metadata.csv` holds `file_name`, `label`, `slide_id`,
    `patient_id` (where given), `object_id`, `mpp` (of the crop itself; empty where the slide states
    none, never guessed), `x`, `y`, `width`, `height` (the crop in pixels of level 0), `flags`.

    Args:
        slide: A slide (see `wsi.open_slide`) or a region image (PNG, JPEG, BMP, WebP).
        annotations: GeoJSON as QuPath exports it, or with `colours` a mask: an image of the
            slide's shape, at any scale, in which a blob of one colour is one object.
        output_dir: The folder; made when missing, added to when it holds other slides.
        mpp: Micrometres per pixel of level 0, in place of the slide's own.
        margin: Side of the crop over the longer side of the object; at least 1.
        label_property: See `read_geojson`.
        colours: For a mask: the class by colour (`red`, `green`, `#00ff00`); black and white are
            background.
        slide_id: By default the file's name.
        patient_id: Whose slide it is, if known.
        keep_flagged: Whether objects that are partial, merged or disputed are cut.
        min_extent: For a mask: blobs whose longer side has fewer of its pixels are specks.
        max_side: A larger crop is shrunk to this many pixels; its `mpp` grows with it.
        on_progress: Called with the number of crops done and of all.

    Raises:
        GloVLMError: A file that cannot be read, options that do not fit together, or nothing
            labelled in the annotations.
    """
    if not 1 <= margin < 100:
        raise GloVLMError(f"Expected a margin of at least 1, found {margin:g}.")
    if mpp is not None and not 0 < mpp < math.inf:
        raise GloVLMError(f"Expected a positive number of micrometres per pixel, found {mpp}.")
    slide, annotations, output_dir = Path(slide), Path(annotations), Path(output_dir)
    is_mask = annotations.suffix.lower() in _MASKS
    if is_mask != (colours is not None):
        raise GloVLMError(
            f"{annotations} is {'a mask' if is_mask else 'no mask'}: "
            + ("say which colour is which class." if is_mask else "colours do not go with it.")
        )
    is_region = slide.suffix.lower() in _PLAIN
    source: Slide | _Region = _Region(slide, mpp) if is_region else open_slide(slide, mpp=mpp)
    with source as opened, _adding_to(output_dir) as (work, known, before):
        summary = CropSummary(slide_id or opened.name, mpp=opened.mpp, notes=list(opened.flags))
        kept = [row for row in before if row["slide_id"] != summary.slide]
        described = _check_slide(slide, patient_id, summary, known, before, output_dir)
        for other in {row["slide_id"] for row in kept}:
            if _file_part(other).casefold() == _file_part(summary.slide).casefold():
                raise GloVLMError(
                    f"The slides '{other}' and '{summary.slide}' would share file names in "
                    f"{output_dir}; give this one another slide_id."
                )
        if colours is not None:
            candidates = _read_mask(annotations, opened.size, colours, min_extent, summary)
        else:
            candidates = _read_outlines(annotations, opened.size, label_property, summary)
        summary.flags = dict(Counter(flag for item in candidates for flag in item.flags))
        if not keep_flagged:
            summary.skipped = [item.id for item in candidates if item.flags]
            candidates = [item for item in candidates if not item.flags]
        rows = []
        for number, item in enumerate(candidates, start=1):
            row = _cut(opened, item, number, work, summary, margin, max_side)
            rows.append(row | {"patient_id": patient_id or ""})
            if on_progress is not None:
                on_progress(number, len(candidates))
        summary.counts = dict(sorted(Counter(str(item.label) for item in candidates).items()))
        made_from = {
            "slide": described,
            "annotations": digest_file(annotations),
            "patient_id": patient_id,
            "margin": margin,
            "max_side": max_side,
            "mpp": mpp,
        }
        _write_metadata(work, [*kept, *rows])
        _put_in_place(work, output_dir, known, summary.slide, made_from, before, rows)
    return summary


def crop_square(bounds: Bounds, margin: float) -> tuple[int, int, int]:
    """Square crop around an object: x, y and side, `margin` times the longer side of its bounds."""
    x0, y0, x1, y1 = bounds
    side = max(round(margin * max(x1 - x0, y1 - y0)), 1)
    return round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side


def parse_colours(text: str) -> dict[str, str]:
    """`green=non_sclerosed,red=sclerosed` -> the class by colour, as a command line has it.

    Raises:
        GloVLMError: Not of that form, or a colour that does not exist.
    """
    colours = {}
    for part in text.split(","):
        colour, equals, label = (piece.strip() for piece in part.partition("="))
        if not (colour and equals and label) or colour in colours:
            raise GloVLMError(
                f"Expected colours as 'green=CLASS,red=CLASS', each once, found '{text}'."
            )
        _rgb(colour)
        colours[colour] = label
    return colours


# ---------------------------------------------------------------------------------- objects


def _read_outlines(
    path: Path, size: tuple[int, int], label_property: str | None, summary: CropSummary
) -> list[_Candidate]:
    """The labelled objects, each once."""
    taken: list[_Candidate] = []
    for outline in read_geojson(path, label_property=label_property):
        if outline.label is None:
            summary.unlabelled.append(outline.id)
            continue
        x0, y0, x1, y1 = outline.bounds
        if x1 <= 0 or y1 <= 0 or x0 >= size[0] or y0 >= size[1]:
            raise GloVLMError(
                f"{path}: the object {outline.id} lies outside the slide ({size[0]} x {size[1]} "
                "pixels); are these the annotations of another slide?"
            )
        twin = next((t for t in taken if t.outline and overlap(outline, t.outline) > _SAME), None)
        if twin is not None:
            summary.duplicates.append((outline.id, twin.id))
            if outline.label != twin.label and "disputed" not in twin.flags:
                twin.flags.append("disputed")
            continue
        partial = x0 <= 0 or y0 <= 0 or x1 >= size[0] or y1 >= size[1]
        flags = ["partial"] if partial else []
        taken.append(_Candidate(outline.id, outline.label, outline.bounds, outline, flags))
    if not taken:
        raise GloVLMError(
            f"{path}: none of {len(summary.unlabelled)} objects has a class; set it in QuPath, or "
            "name the property that holds it."
        )
    return taken


def _read_mask(
    path: Path,
    size: tuple[int, int],
    colours: Mapping[str, str],
    min_extent: int,
    summary: CropSummary,
) -> list[_Candidate]:
    """Connected components of a colour mask, from top to bottom; touching pixels share a side."""
    pixels = np.asarray(open_image(path))
    height, width = pixels.shape[:2]
    scale = size[0] / width
    if abs(scale * height - size[1]) > max(scale, 1):
        raise GloVLMError(
            f"{path} has {width} x {height} pixels and the slide {size[0]} x {size[1]}; expected "
            "the same shape."
        )
    labels = list(dict.fromkeys(colours.values()))
    classes = _classify(pixels, colours, labels, path)
    blob_objects: list[_Candidate] = []
    for k, label in enumerate(labels, start=1):
        blobs, _ = ndimage.label(classes == k)
        for i, (rows, columns) in enumerate(ndimage.find_objects(blobs), start=1):
            blob = blobs[rows, columns] == i
            if max(blob.shape) < min_extent:
                summary.specks += 1
                continue
            y, x = (rows.start, rows.stop), (columns.start, columns.stop)
            partial = min(x[0], y[0]) == 0 or x[1] == width or y[1] == height
            flags = ["partial"] if partial else []
            if _solidity(blob) < _SOLID:
                flags.append("merged")
            bounds = (x[0] * scale, y[0] * scale, x[1] * scale, y[1] * scale)
            blob_objects.append(_Candidate("", label, bounds, flags=flags))
    if not blob_objects:  # a region without an object is no mistake
        summary.notes.append(f"{path.name} holds no blob of at least {min_extent} pixels.")
    blob_objects.sort(key=lambda item: (item.bounds[1], item.bounds[0]))
    for number, item in enumerate(blob_objects, start=1):
        item.id = f"blob-{number}"
    return blob_objects


def _classify(
    pixels: NDArray[np.uint8], colours: Mapping[str, str], labels: list[str], path: Path
) -> NDArray[np.uint8]:
    """Class mask `[height, width]` of a colour mask; 0 is background."""
    names = ["black", "white", *colours]
    anchors = np.array([_rgb(name) for name in names], dtype=np.float32)
    ids = np.array([0, 0, *(labels.index(colours[name]) + 1 for name in colours)], dtype=np.uint8)
    packed = (pixels.astype(np.uint32) << np.array([16, 8, 0], dtype=np.uint32)).sum(
        axis=-1, dtype=np.uint32
    )
    counts = np.bincount(packed.ravel(), minlength=1 << 24)
    seen = np.flatnonzero(counts)
    rgb = np.stack([seen >> 16 & 255, seen >> 8 & 255, seen & 255], axis=1).astype(np.float32)
    distance = np.stack([np.linalg.norm(rgb - anchor, axis=1) for anchor in anchors])
    strange = distance.min(axis=0) > 128  # further than half-way from black to a full colour
    share = counts[seen[strange]].sum() / packed.size
    if share > _STRANGE:
        common = seen[strange][counts[seen[strange]].argmax()]
        raise GloVLMError(
            f"{path}: {share:.1%} of the pixels have a colour that no class was given for, most "
            f"often #{common:06x}; colours given: {', '.join(colours)}."
        )
    table = np.zeros(1 << 24, dtype=np.uint8)
    table[seen] = np.where(strange, 0, ids[distance.argmin(axis=0)])
    classes: NDArray[np.uint8] = table[packed]
    return classes


def _rgb(name: str) -> tuple[int, int, int]:
    try:
        rgb = ImageColor.getrgb(_COLOURS.get(name.lower(), name))
    except ValueError:
        raise GloVLMError(
            f"Unknown colour '{name}'; expected {', '.join(_COLOURS)} or a code such as #00ff00."
        ) from None
    return rgb[0], rgb[1], rgb[2]


def _solidity(blob: NDArray[np.bool_]) -> float:
    """Solidity: area over that of the convex hull, 0 to 1; a bay between two discs lowers it."""
    rows = np.flatnonzero(blob.any(axis=1))
    first, last = blob[rows].argmax(axis=1), blob.shape[1] - blob[rows, ::-1].argmax(axis=1)
    corners = np.concatenate(
        [np.stack([x, y], axis=1) for x in (first, last) for y in (rows, rows + 1)]
    )
    return float(np.count_nonzero(blob) / ConvexHull(corners).volume)


# ---------------------------------------------------------------------------------- writing


@contextmanager
def _adding_to(folder: Path) -> Iterator[tuple[Path, Manifest, list[dict[str, Any]]]]:
    """The one writer of a folder of crops: where to work, and the manifest and rows so far.

    Raises:
        GloVLMError: The folder holds something else, which `metadata.csv` would hide.
    """
    with one_writer(folder, wait=WAIT), staging(folder, UNFINISHED_DATA) as work:
        known = read_manifest(folder)
        empty = {path.name for path in folder.iterdir()} <= {LOCK, UNFINISHED_DATA}
        before = _read_metadata(folder / "metadata.csv")
        of_earlier_version = before and {*_COLUMNS} - {"patient_id"} <= {*before[0]}
        if not empty and (known.kind != "crops" if known else not of_earlier_version):
            raise GloVLMError(
                f"{folder} holds files that are no crops of ours, and metadata.csv would hide "
                "them from training: choose another folder."
            )
        slides = known.made_from.get("slides") if known else {}
        if not isinstance(slides, dict) or not all(
            isinstance(row, dict) for row in slides.values()
        ):
            raise GloVLMError(f"'{folder / MANIFEST}' is damaged: choose another folder.")
        yield work, known or Manifest("crops", {"version": VERSION, "slides": {}}, {}), before


def _check_slide(
    slide: Path,
    patient: str | None,
    summary: CropSummary,
    known: Manifest,
    before: list[dict[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    """Identity of a slide; refuses another file of a name that has crops, and notes a copy."""
    name, slides = summary.slide, dict(known.made_from["slides"])
    rows = [row for row in before if row["slide_id"] == name]
    patients = {row.get("patient_id") or None for row in rows}
    there = slides.pop(name, None)
    if there is not None:
        same = is_same_slide(slide, there.get("slide"))
    else:  # crops of an earlier version, which did not keep what they were cut from
        same = not rows or patients == {patient}
    if rows and not same:
        whose = ", ".join(sorted(filter(None, patients))) or "none given"
        raise GloVLMError(
            f"{folder} holds crops of another file of the name '{name}' (patient: {whose}) than "
            f"{slide} (patient: {patient or 'none given'}): give this one a name of its own "
            "(--slide-id NAME), or cut it into another folder."
        )
    if rows and patients != {patient}:
        before_that = ", ".join(sorted(filter(None, patients))) or "none"
        summary.notes.append(f"The patient was {before_that} and is {patient or 'none'}.")
    copies = [other for other, row in slides.items() if is_same_slide(slide, row.get("slide"))]
    if copies:
        summary.notes.append(
            f"The same file was cut as '{copies[0]}' before, so its objects are there twice."
        )
    return describe_slide(slide)


def _put_in_place(
    work: Path,
    folder: Path,
    known: Manifest,
    name: str,
    made_from: Mapping[str, Any],
    before: list[dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """Move a slide's new crops to those of others and remove its old ones, as one step."""
    old = [str(row["file_name"]) for row in before if row["slide_id"] == name]
    # Of a table that a person may have edited, only what was written here.
    old = [
        file
        for file in old
        if (file in known.files or not known.files)
        and not {"..", "/"} & {*PurePosixPath(file).parts}
    ]
    new = [str(row["file_name"]) for row in rows]
    foreign = [file for file in new if file not in old and (folder / file).exists()]
    if foreign:
        raise GloVLMError(
            f"{folder / foreign[0]} is there and no crop of '{name}': move it, or choose another "
            "folder."
        )
    slides = {**known.made_from["slides"], name: made_from}
    files = {file: value for file, value in known.files.items() if file not in old}
    files |= {file: digest_file(work / file) for file in new}
    manifest = Manifest("crops", {"version": VERSION, "slides": slides}, files)
    write_json(work / MANIFEST, asdict(manifest))
    put_in_place(work, folder, [*dict.fromkeys([*old, *new]), MANIFEST, "metadata.csv"])
    for file in old:
        with suppress(OSError):  # of a class that has crops
            (folder / file).parent.rmdir()


def _cut(
    slide: Slide | _Region,
    item: _Candidate,
    number: int,
    work: Path,
    summary: CropSummary,
    margin: float,
    max_side: int,
) -> dict[str, Any]:
    """Write one crop; returns its row."""
    x, y, side = crop_square(item.bounds, margin)
    downsample = max(side / max_side, 1.0)
    image = slide.read(x, y, side, side, downsample=downsample)
    name = f"{_file_part(str(item.label))}/{_file_part(summary.slide)}_{number:04d}.png"
    (work / name).parent.mkdir(exist_ok=True)
    image.save(work / name, "PNG")
    return {
        "file_name": name,
        "label": item.label,
        "slide_id": summary.slide,
        "object_id": item.id,
        "mpp": "" if slide.mpp is None else f"{slide.mpp * downsample:.6g}",
        "x": x,
        "y": y,
        "width": side,
        "height": side,
        "flags": " ".join(item.flags),
    }


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    """The crops that are there already."""
    if not path.is_file():
        return []
    table = read_table(path, "a table of crops", strip=False)
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    if rows and not {*_COLUMNS[:3]} <= {*rows[0]}:
        raise GloVLMError(
            f"{path} does not hold {', '.join(_COLUMNS[:3])}, so crops cannot be added to it; "
            "choose another folder."
        )
    return rows


def _write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    """`metadata.csv`; `patient_id` only if any is known, columns of others after ours."""
    names = {name for row in rows for name in row}
    header = [name for name in _COLUMNS if name != "patient_id"]
    if any(row.get("patient_id") for row in rows):
        header.insert(3, "patient_id")
    header += sorted(names - {*_COLUMNS})
    cells = [[row.get(name, "") for name in header] for row in rows]
    write_csv(folder / "metadata.csv", header, cells)


def _file_part(text: str) -> str:
    """A name that every file system takes."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._") or "unnamed"
    return name if is_plain_name(name) else f"_{name}"
