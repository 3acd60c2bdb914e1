"""Reading of outlined regions: pictures, their outlines, and whose they are.

Outlines belong to pictures by their names, as for `glovlm data crops`. What a file of outlines does
not outline is taken for background, so every glomerulus of a region has to be outlined.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...data.listing import few
from ...data.stains import name_stain
from ...errors import GloVLMError
from ...files import digest_file, digest_value
from ...progress import counted
from ..files.annotations import NoObject, find_repeats, read_outlines
from ..files.case_table import CaseRow, CaseTable, agreed, read_case_table
from ..files.coordinates import parse_origin
from ..files.masks import parse_colours, read_mask
from ..files.names import match_outlines
from ..files.region_images import is_region_image, list_pictures, open_picture
from ..files.shapes import Polygon
from ..files.wsi import Slide, describe_slide, slide_name
from .config import FindTrainConfig
from .instances import trace
from .regions import Region

MAX_REGION = 25_000_000  # pixels of a region: 5,000 x 5,000
MAX_REGIONS = 500_000_000  # pixels of all regions together, 1.5 GB in memory


@dataclass
class OutlinedRegions:
    """Outlined regions of a folder, and what was not taken.

    Attributes:
        regions: In the order of their names.
        group: What a group is: the `patient` or `case` of the table, else each `slide` or `region`.
        digests: Of each region a digest of its picture, outlines, scale, stain and group.
        left_out: Why a picture was left out, by its name.
        notes: Sentences for a person.
    """

    regions: list[Region]
    group: Literal["patient", "case", "slide", "region"]
    digests: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Outlined glomeruli by class; those without one are `unlabelled`."""
        labels = Counter(label or "unlabelled" for one in self.regions for label in one.labels)
        return dict(sorted(labels.items()))


def read_regions(config: FindTrainConfig) -> OutlinedRegions:
    """Read outlined regions.

    A picture whose file of outlines holds none of glomeruli is a region without any; one that has
    no file of outlines is left out, as nobody said what it shows.

    Args:
        config: Which regions, outlines and cases, and how they are read.

    Raises:
        GloVLMError: A picture, a file of outlines or the table cannot be read, two pictures share a
            name, a picture is too large, or no glomerulus is outlined.
    """
    pictures, outlines = (Path(p).expanduser() for p in (config.regions, config.outlines))
    colours = parse_colours(config.colours) if config.colours else None
    output = Path(config.output_dir).expanduser()
    paths = list_pictures(pictures, (outlines, output), masks=colours is not None)
    twice = [name for name, n in Counter(map(slide_name, paths)).items() if n > 1]
    if twice:
        raise GloVLMError(f"Two pictures of {pictures} are called {twice[0]}: rename one.")
    table = read_case_table(Path(config.cases).expanduser()) if config.cases else None
    outlined = match_outlines(outlines, paths, masks=colours is not None, skip=output)
    read = OutlinedRegions([], "region", notes=[] if table is None else list(table.notes))
    sentences: dict[str, list[str]] = {}  # a sentence, and the pictures that it is about
    groups = []
    total = 0
    for path in counted(paths, "regions read"):
        name = slide_name(path)
        if path not in outlined.files:
            read.left_out[name] = "it has no file of outlines"
            continue
        row = CaseRow(name) if table is None else table.row_of(path)
        region = _read_region(path, outlined.files[path], row, config, table, colours, sentences)
        total += region.picture.size // 3
        if total > MAX_REGIONS:
            raise GloVLMError(
                f"The regions of {pictures} hold more than {MAX_REGIONS:,} pixels together, which "
                "do not fit into memory: give fewer or smaller ones."
            )
        read.regions.append(region)
        groups.append("patient" if row.patient else "case" if row.counted_as else "")
        about = [region.mpp, region.stain, region.group]
        outlines_of = digest_file(outlined.files[path])
        read.digests[name] = digest_value([describe_slide(path, dated=False), outlines_of, about])
    if "case" in groups:
        read.group = "case"
    elif "patient" in groups:
        read.group = "patient"
    elif not all(map(is_region_image, paths)):
        read.group = "slide"
    if "" in groups:
        read.notes.append(
            f"Whose {groups.count('')} of {len(groups)} pictures are is not stated, and each is a "
            "group of its own: two of one patient may then stand on both sides when groups are "
            "left out, which flatters the figures. --cases states patient_id."
        )
    if read.left_out:
        read.notes.append(
            f"{len(read.left_out)} pictures have no file of outlines and are left out "
            f"({few([*read.left_out])}): one without glomeruli needs a file that says so, an empty "
            "FeatureCollection."
        )
    if outlined.unused:
        read.notes.append(
            f"{len(outlined.unused)} files of outlines are of no picture here "
            f"({few(outlined.unused)})."
        )
    read.notes += [
        f"{names[0] if len(names) == 1 else f'{len(names)} pictures'}: {sentence}"
        for sentence, names in sentences.items()
    ]
    if not any(len(region.polygons) for region in read.regions):
        raise GloVLMError(
            f"No glomerulus is outlined in the {len(read.regions)} regions of {pictures}: outline "
            "every glomerulus of some of them, and name their classes if others are outlined too "
            "(--classes)."
        )
    return read


def _read_region(
    path: Path,
    outlines: Path,
    row: CaseRow,
    config: FindTrainConfig,
    table: CaseTable | None,
    colours: Mapping[str, str] | None,
    sentences: dict[str, list[str]],
) -> Region:
    """One region with its outlines; what is to be said of it is added to `sentences`."""
    name, place = slide_name(path), Path() if table is None else table.path
    mpp = agreed("--mpp", config.mpp, row.mpp, name, place)
    scene = agreed("--scene", config.scene, row.scene, name, place)
    stain = agreed("--stain", name_stain(config.stain), name_stain(row.stain), name, place)
    with open_picture(path, mpp=mpp, scene=scene, allow_scale=config.allow_scale) as picture:
        width, height = picture.size
        if width * height > MAX_REGION:
            raise GloVLMError(
                f"{name} has {width:,} x {height:,} pixels, and a region at most {MAX_REGION:,}: "
                "export parts of it as pictures, with every glomerulus in them outlined."
            )
        if colours is not None:
            shapes, labels, notes = _read_blobs(outlines, picture.size, colours, config)
        else:
            shapes, labels, notes = _read_objects(outlines, path, picture, config)
        pixels = np.asarray(picture.read(0, 0, width, height))
        for note in notes:
            sentences.setdefault(note, []).append(name)
        return Region(
            name=name,
            group=row.patient or row.counted_as or name,
            picture=pixels,
            polygons=shapes,
            labels=labels,
            mpp=picture.mpp,
            stain=stain or "",
        )


Shapes = list[tuple[Polygon, ...]]
Labels = list[str | None]


def _read_objects(
    path: Path, picture_path: Path, picture: Slide, config: FindTrainConfig
) -> tuple[Shapes, Labels, Sequence[str]]:
    """Outlines of a file, each glomerulus once; none where it says that there is none."""
    try:
        read = read_outlines(
            path,
            label_property=config.label_property,
            origin=parse_origin(config.origin, picture.bounds),
            classes=config.classes,
            exclude=config.exclude,
            slide=picture_path,
            size=picture.size,
            mpp=picture.mpp,
        )
    except NoObject:
        return [], [], ["No glomerulus is outlined: all of the picture is background."]
    first = find_repeats(read.objects).tolist()
    labels: dict[int, str | None] = {}
    for i, item in enumerate(read.objects):
        labels[first[i]] = labels.get(first[i]) or item.label
    notes = [sentence for sentence in read.notes if not sentence.startswith("Outlines taken")]
    return [read.objects[i].polygons for i in labels], list(labels.values()), notes


def _read_blobs(
    path: Path, size: tuple[int, int], colours: Mapping[str, str], config: FindTrainConfig
) -> tuple[Shapes, Labels, Sequence[str]]:
    """Outlines of the blobs of a mask."""
    mask: Any = read_mask(path, size, colours, min_extent=config.min_extent)
    shapes: Shapes = []
    labels: Labels = []
    for blob in mask.blobs:
        if blob.label in config.exclude or (config.classes and blob.label not in config.classes):
            continue
        shapes.append(((trace(blob.pixels, blob.corner, (blob.scale, blob.scale)),),))
        labels.append(blob.label)
    merged = sum("merged" in blob.flags for blob in mask.blobs)
    notes = [] if shapes else ["No glomerulus is outlined: all of the picture is background."]
    if merged:
        notes.append(f"{merged} blobs look like two glomeruli that touch, and are taken for one.")
    return shapes, labels, notes
