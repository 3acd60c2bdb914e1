"""Crops of outlined objects: from slides and their annotations to a folder to train on.

Slides come into one folder, at once or one by one: rows of other slides stay, rows of the same
slide are replaced, all files with `metadata.csv` as one step. The result is an ImageFolder, as
`load_dataset` reads it; `manifest.json` states which files the slides were, by their content.
Objects without a class are cut for labelling: a person fills in their labels in `metadata.csv`.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ...data.columns import OUTLINE
from ...data.folder import MAX_PIXELS, open_image
from ...data.listing import few, follow_moves, list_files
from ...data.outlines import UNSTATED, check_structure
from ...errors import GloVLMError, WriteError, describe_error, nearest
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
from ...progress import counted
from ...tables import read_table
from .annotations import NoObject, find_repeats, read_outlines
from .case_table import OF_CROPS, CaseRow, CaseTable, agreed
from .coordinates import LEVEL0, Origin, parse_origin
from .crop_image import (
    MAX_SIDE,
    Fill,
    crop_downsample,
    crop_square,
    describe_specks,
    is_speck,
    read_crop,
    write_crop,
)
from .earlier_crops import EarlierCrops
from .masks import read_mask
from .names import MASKS, match_outlines
from .pixel_size import check_given
from .region_images import is_region_image, list_pictures, refuse_scene
from .shapes import Bounds, fill
from .wsi import Slide, describe_slide, is_same_slide, open_slide, slide_name

_OF_SLIDE = ("patient_id", "case_id", "stain", *OF_CROPS)
_KNOWN = (*_OF_SLIDE, OUTLINE)  # a column of each that is known
_COLUMNS = (
    "file_name", "label", "slide_id", *_OF_SLIDE, "object_id", "mpp", OUTLINE, "x", "y",
    "width", "height", "flags",
)  # fmt: skip
UNLABELLED = "unlabelled"  # the folder of crops without a class
# Of what manifest and crops say; raise it when readers would understand them otherwise. Since 2
# alpha is the outline.
VERSION = 2
WAIT = 600.0  # seconds for another process that cuts crops into the same folder
logger = logging.getLogger("hf_glovlm")


class NothingCut(GloVLMError):
    """Nothing of a slide was cut, as nothing in its outlines or mask is an object."""


@dataclass
class CropSummary:
    """Summary of the crops of one slide, cut and not cut.

    Attributes:
        slide: The slide's name.
        counts: Crops by class.
        mpp: Micrometres per pixel of level 0; `None` where the slide states none.
        origin: Where the outlines count from, see `Origin.describe`.
        unlabelled: Ids of objects without a class, which were cut for labelling.
        left_out: Ids of objects that are none to cut, by the reason.
        duplicates: Pairs (left out, taken) of ids that outline the same object.
        flags: Crops, or objects left out, by flag: `partial` (touches the slide's edge), `merged`
            (a blob of a mask that looks like two), `disputed` (outlined twice, with two classes).
        skipped: Ids of flagged objects that were not cut (`keep_flagged=False`).
        specks: Blobs of a mask that were too small to be an object.
        thin: Ids of objects whose outline holds no more than a pixel of the crop.
        notes: What a person should know about the file.
    """

    slide: str
    counts: dict[str, int] = field(default_factory=dict)
    mpp: float | None = None
    origin: dict[str, Any] = field(default_factory=LEVEL0.describe)
    unlabelled: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    specks: int = 0
    thin: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of crops."""
        return sum(self.counts.values()) + len(self.unlabelled)


@dataclass(frozen=True)
class CropOutcome:
    """Outcome of one slide of several.

    Attributes:
        slide: Its name.
        summary: Of its crops; `None` where none were cut.
        error: Why it failed.
        reason: Why nothing of it was cut, where that is no error.
    """

    slide: str
    summary: CropSummary | None = None
    error: str | None = None
    reason: str | None = None


@dataclass
class _Candidate:
    """Candidate crop: an object before it is cut.

    `label` is what the crop gets, `outlined` the class of its outline.
    """

    id: str
    label: str | None
    bounds: Bounds
    fill: Fill
    flags: list[str] = field(default_factory=list)
    outlined: str | None = None
    before: Mapping[str, Any] | None = None  # its row of an earlier cut


class _Region:
    """Region image, read as if it were a slide of one level."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self.name, self.mpp, self.bounds = slide_name(path), mpp, None
        self.flags: list[str] = []
        if mpp is None:
            self.flags.append(
                "The scale is not known; give the micrometres per pixel (--mpp, or mpp in --cases)."
            )
        self._image = open_image(path)
        self.size = self._image.size

    def read(
        self, x: int, y: int, width: int, height: int, *, downsample: float = 1.0
    ) -> Image.Image:
        """Cut a box, white outside the image, and shrink it."""
        if width * height > 4 * MAX_PIXELS:  # a gigabyte, mostly white
            raise GloVLMError(
                f"A crop of {width:,} x {height:,} pixels around an object of {self.name} is too "
                "large: lower the margin."
            )
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
    scene: str | None = None,
    allow_scale: bool = False,
    margin: float = 1.25,
    label_property: str | None = None,
    classes: Sequence[str] = (),
    exclude: Sequence[str] = (),
    origin: str = "auto",
    colours: Mapping[str, str] | None = None,
    slide_id: str | None = None,
    patient_id: str | None = None,
    case_id: str | None = None,
    stain: str | None = None,
    outline_of: str | None = None,
    stated: Mapping[str, str] | None = None,
    keep_flagged: bool = True,
    min_extent: int = 16,
    max_side: int = MAX_SIDE,
    on_progress: Callable[[int, int], None] | None = None,
) -> CropSummary:
    """Cut every object of a slide or region image into a folder per class.

    A crop is a square of `margin` times the object's longer side around the middle of its box,
    white where it reaches beyond the slide: a PNG whose RGB is the whole square and whose alpha is
    255 inside the outline and 0 outside, see `read_crop`. `metadata.csv` holds `file_name`,
    `label`, `slide_id`, `patient_id`, `case_id`, `stain` (where known), `object_id`, `mpp` (of the
    crop itself; empty where the slide states none, never guessed), `outline` (where stated), `x`,
    `y`, `width`, `height` (the crop in pixels of level 0), `flags`.

    An object without a class lies in the folder `unlabelled`, and its label is empty: a person
    fills it in. When the slide is cut again, labels that a person typed or changed there are kept,
    by the object's place and id; to take the class of the outlines again, the label is emptied.

    Args:
        slide: A slide (see `wsi.open_slide`) or a region image (PNG, JPEG, BMP, WebP).
        annotations: GeoJSON as QuPath exports it, or with `colours` a mask: an image of the
            slide's shape, at any scale, in which a blob of one colour is one object.
        output_dir: The folder; made when missing, added to when it holds other slides.
        mpp: Micrometres per pixel of level 0, in place of the slide's own.
        scene: Which picture of a file that holds several, see `open_slide`.
        allow_scale: Accept an `mpp` far from what the slide states.
        margin: Side of the crop over the longer side of the object; at least 1.
        label_property: See `read_outlines`.
        classes: The classes that are cut, and no other; by default all but those that QuPath
            reserves.
        exclude: Classes that are left out.
        origin: Where the outlines count from, see `parse_origin`.
        colours: For a mask: the class by colour (`red`, `green`, `#00ff00`) or by number, see
            `read_mask`.
        slide_id: By default the file's name.
        patient_id: Whose slide it is, if known.
        case_id: Of which case it is, if known.
        stain: If known.
        outline_of: What the outlines go around, `capsule` or `tuft`, if known. With the tuft
            crescents, adhesions and ischaemia cannot be judged.
        stated: What else a table states of the slide, by the names OF_CROPS, which are columns.
        keep_flagged: Whether objects that are partial, merged or disputed are cut.
        min_extent: For a mask: blobs whose longer side has fewer of its pixels are specks.
        max_side: A larger crop is shrunk to this many pixels; its `mpp` grows with it.
        on_progress: Called with the number of crops done and of all.

    Raises:
        NothingCut: The outlines or the mask hold no object to cut; says what they hold.
        GloVLMError: A file that cannot be read, options that do not fit together, or typed labels
            that would be lost.
    """
    if not 1 <= margin < 100:
        raise GloVLMError(f"Expected a margin of at least 1, found {margin:g}.")
    check_given(mpp)
    outline_of = _structure(outline_of, "--outline-of")
    slide, annotations, output_dir = Path(slide), Path(annotations), Path(output_dir)
    is_mask = annotations.suffix.lower() in MASKS
    if is_mask != (colours is not None):
        raise GloVLMError(
            f"{annotations} is {'a mask' if is_mask else 'no mask'}: "
            + ("say which colour is which class." if is_mask else "colours do not go with it.")
        )
    source = _open(slide, mpp, scene, allow_scale)
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
        chosen = _Choice(classes, exclude)
        if colours is not None:
            candidates = _read_blobs(annotations, opened.size, colours, min_extent, chosen, summary)
        else:
            place = parse_origin(origin, opened.bounds)
            candidates = _read_objects(
                annotations, slide, opened.size, label_property, place, chosen, summary
            )
        summary.flags = dict(Counter(flag for item in candidates for flag in item.flags))
        if not keep_flagged:
            summary.skipped = [item.id for item in candidates if item.flags]
            candidates = [item for item in candidates if not item.flags]
        earlier = _earlier_crops(summary.slide, known, before)
        _keep_labels(candidates, earlier, output_dir / "metadata.csv", summary)
        if not candidates:
            raise NothingCut(
                f"{annotations}: nothing was cut, as all {len(summary.skipped)} objects are "
                f"flagged ({', '.join(summary.flags)}); cut them too, or look at them."
            )
        about = {"patient_id": patient_id, "case_id": case_id, "stain": stain, OUTLINE: outline_of}
        about |= {name: (stated or {}).get(name) for name in OF_CROPS}
        rows = []
        pieces = counted(candidates, "crops", name=summary.slide)
        for number, item in enumerate(pieces, start=1):
            row = _about(item, about, earlier)
            rows.append(
                row | _cut(opened, item, number, work, summary, margin, max_side, row[OUTLINE])
            )
            if on_progress is not None:
                on_progress(number, len(candidates))
        labels = Counter(item.label for item in candidates if item.label is not None)
        summary.counts = dict(sorted(labels.items()))
        summary.unlabelled = [item.id for item in candidates if item.label is None]
        summary.notes += _outline_notes(summary, rows, kept)
        made_from = {
            "slide": described,
            "annotations": digest_file(annotations),
            **about,
            "margin": margin,
            "max_side": max_side,
            "mpp": mpp,
            "scene": scene,
            "origin": summary.origin,
            "classes": [*classes],
            "exclude": [*exclude],
            "labels": {item.id: item.outlined for item in candidates},
        }
        _write_metadata(work, [*kept, *rows])
        _put_in_place(work, output_dir, known, summary.slide, made_from, before, rows)
    return summary


def cut_slides(
    slides: Path,
    annotations: Path,
    output_dir: Path,
    *,
    cases: CaseTable | None = None,
    colours: Mapping[str, str] | None = None,
    mpp: float | None = None,
    scene: str | None = None,
    patient_id: str | None = None,
    **options: Any,
) -> list[CropOutcome]:
    """Cut the objects of every slide in a folder; the error of one slide stays with it.

    Args:
        slides: A folder of slides or region images, or one of them.
        annotations: A folder of outlines, or of masks with `colours`, called as the slides are (see
            `match_outlines`), or the file of a single slide.
        output_dir: As for `cut_crops`.
        cases: What is known of each slide: patient, case, stain, scale, scene and what else goes
            into the table of crops.
        colours: As for `cut_crops`.
        mpp: Of every slide, as for `cut_crops`.
        scene: Of every slide.
        patient_id: Of every slide.
        **options: Of `cut_crops`.

    Returns:
        One outcome a slide, in the order of the names.

    Raises:
        GloVLMError: No slide, no outlines that belong to one, two slides of one name, or a folder
            that takes no crops.
    """
    slides, annotations, output_dir = Path(slides), Path(annotations), Path(output_dir)
    paths = list_pictures(slides, (annotations, output_dir), masks=colours is not None)
    twice = [name for name, n in Counter(map(slide_name, paths)).items() if n > 1]
    if twice:
        raise GloVLMError(f"Two slides of {slides} are called {twice[0]}: rename one.")
    if len(paths) > 1 and options.get("slide_id"):
        raise GloVLMError(
            f"{slides} holds {len(paths)} slides, which cannot all be called "
            f"'{options['slide_id']}': leave --slide-id out."
        )
    outlined = match_outlines(annotations, paths, masks=colours is not None, skip=output_dir)
    if os.path.isdir(slides):
        with _adding_to(output_dir):
            pass  # what is wrong with the folder is wrong for every slide
    outcomes = []
    for path in counted(paths, "slides"):
        name = slide_name(path)
        if path not in outlined.files:
            outcome = CropOutcome(name, reason=f"{annotations} holds no outlines of this name")
        else:
            try:
                row = CaseRow(name) if cases is None else cases.row_of(path)
                table = Path() if cases is None else cases.path
                summary = cut_crops(
                    path,
                    outlined.files[path],
                    output_dir,
                    colours=colours,
                    mpp=agreed("--mpp", mpp, row.mpp, name, table),
                    scene=agreed("--scene", scene, row.scene, name, table),
                    patient_id=agreed("--patient-id", patient_id, row.patient, name, table),
                    case_id=row.specimen,
                    stain=row.stain,
                    stated=None if cases is None else cases.stated_for_crops(row),
                    **options,
                )
                outcome = CropOutcome(name, summary)
            except WriteError:  # no room for the others either
                raise
            except (NothingCut, NoObject) as error:
                outcome = CropOutcome(name, reason=str(error))
            except Exception as error:  # whatever is wrong with one slide of many stays with it
                if not os.path.isdir(slides):
                    raise
                outcome = CropOutcome(name, error=describe_error(error))
        outcomes.append(outcome)
    if outlined.unused and outcomes:
        logger.warning(
            "%d files of outlines are of no slide in %s (%s).",
            len(outlined.unused), slides, few(outlined.unused),
        )  # fmt: skip
    return outcomes


# ---------------------------------------------------------------------------------- objects


@dataclass(frozen=True)
class _Choice:
    """Choice of classes: which are cut, and which are left out."""

    classes: Sequence[str]
    exclude: Sequence[str]


def _open(path: Path, mpp: float | None, scene: str | None, allow: bool) -> "Slide | _Region":
    """Open a slide or a region image."""
    if not is_region_image(path):
        return open_slide(path, mpp=mpp, scene=scene, allow_scale=allow)
    refuse_scene(path, scene)
    return _Region(path, mpp)


def _read_objects(
    path: Path,
    slide: Path,
    size: tuple[int, int],
    label_property: str | None,
    origin: Origin,
    choice: _Choice,
    summary: CropSummary,
) -> list[_Candidate]:
    """The objects that are to be cut, each once."""
    read = read_outlines(
        path,
        label_property=label_property,
        origin=origin,
        classes=choice.classes,
        exclude=choice.exclude,
        slide=slide,
        size=size,
        mpp=summary.mpp,
    )
    summary.origin = read.origin.describe()
    summary.left_out = dict(read.left_out)
    summary.notes += read.notes
    beyond = 0
    taken: dict[int, _Candidate] = {}
    repeats = find_repeats(read.objects).tolist()
    for i, (outline, first) in enumerate(zip(read.objects, repeats, strict=True)):
        label = outline.label
        if i != first:
            twin = taken[first]
            summary.duplicates.append((outline.id, twin.id))
            if twin.label is None:
                twin.label = twin.outlined = label
            elif label not in (None, twin.label) and "disputed" not in twin.flags:
                twin.flags.append("disputed")
            continue
        x0, y0, x1, y1 = outline.bounds
        is_partial = x0 <= 0 or y0 <= 0 or x1 >= size[0] or y1 >= size[1]
        flags = ["partial"] if is_partial else []
        beyond += x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]
        inside = partial(fill, outline.polygons)
        taken[i] = _Candidate(outline.id, label, outline.bounds, inside, flags, label)
    if beyond:
        summary.notes.append(
            f"{beyond} outlines reach beyond the picture: what lies there is white, and outside."
        )
    return [*taken.values()]


def _read_blobs(
    path: Path,
    size: tuple[int, int],
    colours: Mapping[str, str],
    min_extent: int,
    choice: _Choice,
    summary: CropSummary,
) -> list[_Candidate]:
    """The blobs of a mask that are to be cut."""
    for name in (*choice.classes, *choice.exclude):
        if name not in colours.values():
            raise GloVLMError(
                f"No colour has the class '{name}'.{nearest(name, colours.values())} Classes: "
                f"{', '.join(colours.values())}."
            )
    mask = read_mask(path, size, colours, min_extent=min_extent)
    summary.specks = mask.specks
    candidates = []
    for number, blob in enumerate(mask.blobs, start=1):
        name = f"blob-{number}"
        if blob.label in choice.exclude or (choice.classes and blob.label not in choice.classes):
            summary.left_out.setdefault(f"class {blob.label}", []).append(name)
        else:
            flags = [*blob.flags]
            item = _Candidate(name, blob.label, blob.bounds, blob.fill, flags, blob.label)
            candidates.append(item)
    left_out = ", ".join(f"{reason} ({len(ids)})" for reason, ids in summary.left_out.items())
    if left_out:
        summary.notes.append(f"Objects were left out: {left_out}.")
    if not candidates:
        more = "; ".join(filter(None, (mask.hint, left_out and f"left out: {left_out}")))
        raise NothingCut(
            f"{path}: nothing was cut, as no object has a colour that was given "
            f"({', '.join(colours)}); the mask holds {mask.describe_colours()}"
            + (f"; {more}." if more else ".")
        )
    return candidates


def _earlier_crops(name: str, known: Manifest, before: Sequence[dict[str, Any]]) -> EarlierCrops:
    made_from = known.made_from["slides"].get(name) or {}
    labels, margin = made_from.get("labels"), made_from.get("margin")
    return EarlierCrops(
        rows=[row for row in before if row["slide_id"] == name],
        labels=labels if isinstance(labels, dict) else None,
        margin=float(margin) if isinstance(margin, int | float) and margin >= 1 else 1.25,
        folder_of=_folder_of,
    )


def _keep_labels(
    candidates: Sequence[_Candidate], earlier: EarlierCrops, table: Path, summary: CropSummary
) -> None:
    """Give objects the labels that a person typed for their crops before; notes say so."""
    ids = [item.id for item in candidates]
    rows = earlier.match(ids, [crop_square(item.bounds, 1.0) for item in candidates])
    earlier.refuse_loss(rows, table)
    kept, differing = 0, []
    for item, row in zip(candidates, rows, strict=True):
        item.before = row
        typed = None if row is None else earlier.typed_label(row)
        if typed is not None:
            item.label, kept = typed, kept + 1
            if item.outlined not in (None, typed):
                differing.append(f"{item.id}: {typed}, outlined as {item.outlined}")
    if kept:
        summary.notes.append(f"{kept} labels that were typed in {table.name} are kept.")
    if differing:
        summary.notes.append(
            f"{len(differing)} of them are not the class of the outline ({few(differing)}): empty "
            "the label to take that."
        )
    there = {str(row.get("object_id")) for row in earlier.rows}
    again = [name for name in ids if name in (earlier.labels or ()) and name not in there]
    if again:
        summary.notes.append(
            f"{len(again)} crops whose rows were deleted from {table.name} are cut again "
            f"({few(again)})."
        )


def _about(
    item: _Candidate, given: Mapping[str, str | None], earlier: EarlierCrops
) -> dict[str, Any]:
    """What is known of a crop's slide, and what others wrote into its row before."""
    row = item.before or {}
    own = {n: value or row.get(n) or earlier.common(n) for n, value in given.items()}
    own[OUTLINE] = _structure(own[OUTLINE], f"the column {OUTLINE} of metadata.csv")
    return own | {name: value for name, value in row.items() if name not in _COLUMNS}


def _structure(written: str | None, place: str) -> str | None:
    """What outlines go around; `None` where that is not stated."""
    structure = check_structure(written, place) if written else UNSTATED
    return None if structure == UNSTATED else structure


def _outline_notes(
    summary: CropSummary, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a person should know about the outlines of a slide's crops."""
    notes = []
    around = {row[OUTLINE] for row in rows}
    if None in around:
        notes.append(
            "What the outlines go around is not stated (--outline-of capsule or tuft): inside the "
            "tuft no crescent, adhesion or ischaemia can be judged, and a model that sees the "
            "inside has to get the same again."
        )
    if "tuft" in around:
        notes.append(
            "The outlines go around the tuft: a model that sees the inside alone cannot judge "
            "crescents, adhesions or ischaemia."
        )
    differing = [
        *dict.fromkeys(
            str(row["slide_id"]) for row in others if {row.get(OUTLINE) or None} != around
        )
    ]
    if differing:
        notes.append(
            f"Crops in this folder differ in what their outlines go around ({few(differing)}): "
            "state it for all, and the same."
        )
    return [*notes, *describe_specks(summary.thin)]


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
        of_earlier_version = before and {*_COLUMNS} - {*_KNOWN} <= {*before[0]}
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
    if rows and patient is not None and patients != {patient}:
        before_that = ", ".join(sorted(filter(None, patients))) or "none"
        summary.notes.append(f"The patient was {before_that} and is {patient}.")
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
    own = re.compile(rf"{re.escape(_file_part(name))}_\d{{4,}}\.png")
    listed = [str(row["file_name"]) for row in before if row["slide_id"] == name]
    # Of a table that a person may have edited, only what was written here; also of deleted rows.
    old = [
        file
        for file in dict.fromkeys([*listed, *known.files])
        if own.fullmatch(PurePosixPath(file).name)
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
    structure: str | None,
) -> dict[str, Any]:
    """Write one crop; returns its row."""
    x, y, side = square = crop_square(item.bounds, margin)
    crop = read_crop(slide, square, item.fill, structure=structure, max_side=max_side)
    if is_speck(crop):
        summary.thin.append(item.id)
    name = f"{_folder_of(item.label or '')}/{_file_part(summary.slide)}_{number:04d}.png"
    (work / name).parent.mkdir(exist_ok=True)
    write_crop(crop, work / name)
    return {
        "file_name": name,
        "label": item.label or "",
        "slide_id": summary.slide,
        "object_id": item.id,
        "mpp": "" if slide.mpp is None else f"{slide.mpp * crop_downsample(side, max_side):.6g}",
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
    names, labels = ([str(row[key]) for row in rows] for key in ("file_name", "label"))
    names, labels, _ = follow_moves(names, labels, list_files(path.parent).images)
    return [
        row | {"file_name": name, "label": label}
        for row, name, label in zip(rows, names, labels, strict=True)
    ]


def _write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    """`metadata.csv`; what is known of no slide has no column, columns of others stand last."""
    names = {name for row in rows for name in row}
    known = {name for name in _KNOWN if any(row.get(name) for row in rows)}
    header = [name for name in _COLUMNS if name not in _KNOWN or name in known]
    header += sorted(names - {*_COLUMNS})
    cells = [[row.get(name, "") for name in header] for row in rows]
    write_csv(folder / "metadata.csv", header, cells)


def _folder_of(label: str) -> str:
    """Folder of a class's crops."""
    return _file_part(label) if label else UNLABELLED


def is_crop_of(file_name: str, slide: str) -> bool:
    """Whether a file of a folder of crops is called as those of a slide are."""
    pattern = rf"{re.escape(_file_part(slide))}_\d{{4,}}\.png"
    return re.fullmatch(pattern, PurePosixPath(file_name).name) is not None


def _file_part(text: str) -> str:
    """A name that every file system takes."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._") or "unnamed"
    return name if is_plain_name(name) else f"_{name}"
