"""Slide names: what a slide is called in tables, and which files of a folder are its outlines."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.listing import SUFFIXES as PICTURES
from ...data.listing import few, walk_folders
from ...errors import GloVLMError, nearest
from .listing import SUFFIXES
from .outline_formats import images_of, index_images, is_foreign_xml, list_images
from .wsi import slide_name

# Of slide and feature files, longest first; a name may hold other dots.
_SUFFIXES = sorted(
    SUFFIXES | {".ome.tif", ".ome.tiff", ".vsi", ".h5", ".hdf5", ".parquet", ".pt"},
    key=lambda suffix: (-len(suffix), suffix),
)
OUTLINES = (".geojson", ".geojson.gz", ".json", ".json.gz", ".xml", ".xml.gz")
SHARED = "coco"  # the file of a folder that may hold the outlines of all slides
OF_A_RUN = ("results.json", "manifest.json")  # of ours, beside the outlines that a finder wrote
MASKS = (".png", ".tif", ".tiff", ".bmp")
_OF_A_MASK = ("", "_mask", "-mask")  # behind the slide's name


def slide_stem(name: str) -> str:
    """Name of a slide as tables share it: `folder/a.b.svs` is `a.b`, and `a.b` stays `a.b`.

    Only the suffix of a slide or feature file is taken off, so that `S1.2` is never `S1`.
    """
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    suffix = next((s for s in _SUFFIXES if base.casefold().endswith(s)), "")
    return base[: len(base) - len(suffix)] or base


def names_of(path: Path) -> list[str]:
    """Names under which a table may list a slide's file; mostly one."""
    return list(dict.fromkeys((slide_stem(path.name), slide_name(path))))


@dataclass(frozen=True)
class Outlined:
    """Outlines of slides, matched by name.

    Attributes:
        files: The file of outlines, or the mask, of each slide that has one.
        without: Slides that have none, in the order given.
        unused: Names of files of outlines that belong to none of the slides.
    """

    files: Mapping[Path, Path]
    without: list[Path] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def match_outlines(
    given: Path, slides: Sequence[Path], *, masks: bool = False, skip: Path | None = None
) -> Outlined:
    """Match slides with files of outlines by their exact names.

    In a folder and its subfolders, the outlines of `S1.svs` are `S1.geojson` or `S1.svs.geojson`,
    also as `.json`, `.xml` and compressed (`.gz`); its mask is `S1.png`, `S1_mask.png` or
    `S1-mask.png` (or TIFF, BMP). A slide without a file of its own has the outlines of the image of
    its name in the folder's `coco.json`.

    Args:
        given: A folder, or the one file of a single slide, or a COCO file of images that are
            called as the slides are.
        slides: Files of slides.
        masks: Whether masks are looked for in place of outlines.
        skip: A folder that is not entered.

    Raises:
        GloVLMError: Nothing is there, one file for several slides, two files for one slide, or a
            folder in which no file belongs to any of the slides: names what is near.
    """
    what = "outlines (NAME.geojson, NAME.json, NAME.xml, or coco.json)"
    what = "masks (NAME.png, NAME_mask.png)" if masks else what
    if os.path.isfile(given):
        if len(slides) == 1:
            return Outlined({slides[0]: given})
        images = None if masks else list_images(given)
        if images is None:
            raise GloVLMError(
                f"One file of outlines, {given}, cannot serve {len(slides)} slides: give a folder "
                f"of {what}, called as the slides are."
            )
        matched = _match_images(given, images, slides)
        if not matched.files:
            raise _no_outlines(given, what, images, map(slide_name, slides), PICTURES)
        return matched
    if not os.path.isdir(given):
        one = "a mask" if masks else "a file of outlines"
        raise GloVLMError(f"Expected {one} or a folder of {what} at {given}, found none.")
    suffixes = MASKS if masks else OUTLINES
    own = {path.resolve() for path in slides}
    ours = {name for name in OF_A_RUN if name[:-5] not in {*map(slide_name, slides)}}
    listed = [
        path
        for path in files_below(given, suffixes, skip=skip)
        if path.resolve() not in own and path.name not in ours
    ]
    by_key: dict[str, list[Path]] = {}
    for path in listed:
        by_key.setdefault(_without(path.name, suffixes), []).append(path)
    files: dict[Path, Path] = {}
    without = []
    for slide in slides:
        endings = _OF_A_MASK if masks else ("",)
        keys = dict.fromkeys(n + end for n in (slide_name(slide), slide.name) for end in endings)
        own_files = [path for key in keys for path in by_key.get(key, ())]
        if len(own_files) > 1:
            own_files = [path for path in own_files if not is_foreign_xml(path)]
        if len(own_files) > 1:
            raise GloVLMError(
                f"{given} holds {len(own_files)} files of outlines of the slide "
                f"{slide_name(slide)} "
                f"({few([_below(path, given) for path in own_files])}): keep one of them."
            )
        if own_files:
            files[slide] = own_files[0]
        else:
            without.append(slide)
    used = {*files.values()}
    unused, shared = [], []
    for path in (path for path in listed if path not in used):
        is_shared = without and not masks and _without(path.name, suffixes).casefold() == SHARED
        images = list_images(path) if is_shared else None
        if images is not None:
            shared.append((path, _match_images(path, images, without)))
        elif not is_foreign_xml(path):
            unused.append(_below(path, given))
    for path, matched in shared:
        if twice := [slide_name(slide) for slide in matched.files if slide in files]:
            raise GloVLMError(
                f"{given} holds several files of outlines of {few(twice)} "
                f"({few([_below(other, given) for other, _ in shared])}): keep one of them."
            )
        files |= matched.files
        without = [slide for slide in without if slide not in files]
        unused += [f"{_below(path, given)}: {name}" for name in matched.unused]
    if not files:
        raise _no_outlines(given, what, unused, map(slide_name, slides), suffixes)
    return Outlined(files, without, unused)


def _match_images(path: Path, images: Sequence[str], slides: Sequence[Path]) -> Outlined:
    """Match slides with the images of a COCO file; `unused` names images."""
    index = index_images(images)
    places = {slide: images_of(slide, index) for slide in slides}
    used = {place for some in places.values() for place in some}
    return Outlined(
        {slide: path for slide in slides if places[slide]},
        [slide for slide in slides if not places[slide]],
        [name for place, name in enumerate(images) if place not in used],
    )


def files_below(root: Path, suffixes: Iterable[str], *, skip: Path | None = None) -> list[Path]:
    """Files of these suffixes in a folder and its subfolders, sorted.

    Links are followed, as for slides; hidden ones, and the folder `skip`, are left alone.
    """
    endings, barred = tuple(suffixes), None if skip is None else os.path.realpath(skip)
    listed = []
    for folder, _, names in walk_folders(root):
        if barred is not None and Path(os.path.realpath(folder)).is_relative_to(barred):
            continue
        own = [n for n in names if n.lower().endswith(endings) and not n.startswith(".")]
        listed += [path for name in own if (path := Path(folder, name)).is_file()]
    return sorted(listed)


def outlined_slide(path: Path) -> str:
    """Slide whose outlines a file holds, by its name: `S1` of `S1.geojson` and `S1.svs.geojson`."""
    return slide_stem(_without(path.name, OUTLINES))


def outline_suffix(path: Path) -> str:
    """Suffix of a file of outlines, that of a packed file as well."""
    return path.name[len(_without(path.name, OUTLINES)) :]


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def is_mask_name(name: str) -> bool:
    """Whether a file is called as the mask of another one: `S1_mask.png`."""
    endings = tuple(end + suffix for end in _OF_A_MASK if end for suffix in MASKS)
    return name.lower().endswith(endings)


def _without(name: str, suffixes: Iterable[str]) -> str:
    """Name without the longest of the suffixes that it bears."""
    best = max((s for s in suffixes if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(best)]


def _no_outlines(
    folder: Path, what: str, unused: Sequence[str], slides: Iterable[str], suffixes: Iterable[str]
) -> GloVLMError:
    names = list(slides)
    head = f"{folder} holds no {what} of any of the {len(names)} slides ({few(names)})"
    if not unused:
        return GloVLMError(f"{head}: export them there, called as the slides are.")
    stems = [_without(name.rpartition("/")[2], suffixes) for name in unused]
    hints = (nearest(stem, names) for stem in stems)
    hint = next((f" ({stem}:{text})" for stem, text in zip(stems, hints, strict=True) if text), "")
    return GloVLMError(
        f"{head}, but {few(unused)}{hint}: names must be the same but for the suffix; rename them."
    )
