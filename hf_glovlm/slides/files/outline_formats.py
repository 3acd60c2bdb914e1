"""Features of a file of outlines, whichever format it is in: chosen by its content, here alone.

GeoJSON (QuPath), COCO (detectors), XML of Aperio ImageScope and of ASAP. Another format is a
module that makes GeoJSON features, and a line in `read_features`.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ...data.folder import positive
from ...data.listing import SUFFIXES as PICTURES
from ...data.listing import few
from ...errors import GloVLMError
from .asap import read_asap
from .coco import Coco, is_coco, parse_coco
from .geojson import list_features, parse_json, read_unpacked
from .imagescope import read_imagescope
from .listing import SUFFIXES
from .wsi import slide_name
from .xml_elements import first_element, is_xml, parse_xml

FORMATS = "GeoJSON, COCO JSON, or XML of ImageScope or ASAP"
_ROOTS = {"Annotations": read_imagescope, "ASAP_Annotations": read_asap}
_OTHERS = {"annotations": "NDP.view of Hamamatsu"}  # roots of other programs' files
_ENOUGH = 2**16  # bytes in which the first element of a file of outlines stands


@dataclass
class Features:
    """Features of a file of outlines.

    Attributes:
        listed: GeoJSON features in the file's order; in place of what is none, `LeftOut` or other
            JSON.
        origin: Where the file itself says that it counts from; `None` where it does not.
        from_corner: Whether it counts from the corner of level 0, as all but QuPath do.
        mpp: Micrometres per pixel that the file states.
        may_be_empty: Whether nothing outlined is nothing there: the file names the image, or is a
            collection of no features, which QuPath and our finder write of a slide without any.
        notes: Sentences for the results, complete once `listed` was gone through.
    """

    listed: Iterable[Any]
    origin: Any = None
    from_corner: bool = True
    mpp: float | None = None
    may_be_empty: bool = False
    notes: list[str] = field(default_factory=list)


def read_features(
    path: Path, *, slide: Path | str | None = None, size: tuple[int, int] | None = None
) -> Features:
    """Read a file of outlines; see `annotations.read_outlines`.

    Args:
        path: The file, packed by gzip or not.
        slide: The slide's file or name, which chooses the image in a file of many.
        size: Width and height of the slide at level 0, where known.

    Raises:
        GloVLMError: No such file, of another program, damaged, or of other images.
    """
    many = _kept.get(_stamp(path))
    if many is None:
        content = read_unpacked(path)
        if is_xml(content):
            return _read_xml(content, path)
        raw = parse_json(content, path)
        if not is_coco(raw):
            own = raw if isinstance(raw, dict) else {}
            listed = list_features(raw, path)
            empty = own.get("type") == "FeatureCollection" and own.get("features") == []
            return Features(listed, own.get("origin"), from_corner=False, may_be_empty=empty)
        many = _keep(parse_coco(raw, path))
    features = Features((), may_be_empty=True)
    place = _choose_image(many, slide, features.notes)
    features.listed = many.features(place, size, features.notes)
    return features


def _read_xml(content: bytes, path: Path) -> Features:
    root = parse_xml(content, path)
    read = _ROOTS.get(root.tag)
    if read is None or root.find(".//V") is not None:
        program = "HALO" if read else _OTHERS.get(root.tag, "another program")
        raise GloVLMError(
            f"{path} is XML of {program} (its first element is {root.tag[:80]}); expected "
            f"{FORMATS}: export the outlines in one of these."
        )
    return Features(read(root), mpp=positive(root.get("MicronsPerPixel")))


def list_images(path: Path) -> list[str] | None:
    """Names of the images in a COCO file; `None` of any other file.

    Raises:
        GloVLMError: It cannot be read.
    """
    many = _kept.get(_stamp(path))
    if many is None:
        content = read_unpacked(path)
        raw = None if is_xml(content) else parse_json(content, path)
        if not is_coco(raw):
            return None
        many = _keep(parse_coco(raw, path))
    return many.names


def is_foreign_xml(path: Path) -> bool:
    """Whether a file called `.xml` holds no outlines, as what scanners write beside a slide."""
    if not path.name.lower().endswith((".xml", ".xml.gz")):
        return False
    try:
        with open(path, "rb") as file:
            content = file.read(_ENOUGH)
        if content[:2] == b"\x1f\x8b":
            content = zlib.decompressobj(wbits=31).decompress(content, _ENOUGH)
    except (OSError, zlib.error):
        return False  # to be refused where it is read
    return first_element(content) not in _ROOTS


# -------------------------------------------------------------------------------------- COCO

# Of slides and of pictures of them, longest first.
_SUFFIXES = sorted({*SUFFIXES, *PICTURES, ".ome.tif", ".ome.tiff"}, key=len, reverse=True)

_Stamp: TypeAlias = tuple[str, int, int]  # path, time and size
_kept: dict[_Stamp, Coco] = {}  # the last file that holds several images, of which each slide asks


def _stamp(path: Path) -> _Stamp:
    """What tells a file from others, and from itself before a change."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return str(path), 0, -1
    return str(path), status.st_mtime_ns, status.st_size


def _keep(many: Coco) -> Coco:
    _kept.clear()
    if len(many.names) > 1:
        _kept[_stamp(many.path)] = many
    return many


def index_images(names: Sequence[str]) -> Mapping[str, list[int]]:
    """Places of images by what they are called, with and without folder and suffix."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        base = name.replace("\\", "/").rpartition("/")[2]
        suffix = next((s for s in _SUFFIXES if base.casefold().endswith(s)), "")
        for key in {base, base[: len(base) - len(suffix)]} - {""}:
            places.setdefault(key, []).append(place)
    return places


def images_of(slide: Path | str, places: Mapping[str, list[int]]) -> list[int]:
    """Places of the images that bear a slide's exact name, with or without its suffix."""
    keys = [slide] if isinstance(slide, str) else [slide.name, slide_name(slide)]
    return sorted({place for key in keys for place in places.get(key, ())})


def _choose_image(many: Coco, slide: Path | str | None, notes: list[str]) -> int:
    """Place of a slide's image.

    Raises:
        GloVLMError: There is none, or there are several.
    """
    path, names = many.path, many.names
    if slide is None:
        if len(names) == 1:
            return 0
        raise GloVLMError(
            f"{path} holds the outlines of {len(names)} images ({few(names)}), and none was named: "
            "give the slide."
        )
    name = slide if isinstance(slide, str) else slide_name(slide)
    own = images_of(slide, index_images(names))
    if len(own) == 1:
        return own[0]
    if own:
        raise GloVLMError(
            f"{path} holds {len(own)} images of the slide {name} ({few([names[i] for i in own])}): "
            "keep one of them."
        )
    if len(names) == 1 and path.name.startswith((f"{name}.", f"{Path(slide).name}.")):
        notes.append("The file's one image is called otherwise than the slide, as the file is.")
        return 0
    more = " It lists results without their images: join them with the file that has these."
    raise GloVLMError(  # without the images' names, which may stand for patients
        f"{path} holds the outlines of {len(names)} images and none of the slide {name}: names "
        "must be the same but for folder and suffix. Tiles of a slide are no image of it."
        + (more if many.is_results else "")
    )
