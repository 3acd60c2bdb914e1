"""Slides among files: what a folder holds, and the files that make one slide."""

from collections.abc import Iterable
from pathlib import Path

from ...data.listing import walk_folders
from ...errors import GloVLMError
from .dicom import read_series

SUFFIXES = frozenset((
    ".bif", ".czi", ".dcm", ".dicom", ".mrxs", ".ndpi", ".qptiff", ".scn", ".svs", ".svslide",
    ".tif", ".tiff", ".vms", ".vmu",
))  # fmt: skip


def list_slides(given: Iterable[Path | str]) -> list[Path]:
    """List slides: files as they are given, and those in folders.

    A folder is searched with its subfolders, hidden ones left alone; its slides are sorted by path.
    The files of one DICOM series in one folder are one slide, known by the first of them by name.

    Args:
        given: Files and folders.

    Returns:
        The slides, in the order given. A file that is not there stays, for its reader to refuse.

    Raises:
        GloVLMError: A folder holds no slide.
    """
    slides: list[Path] = []
    series_of: dict[tuple[Path, str], int] = {}
    for path in (Path(item).expanduser() for item in given):
        inside = _list_folder(path) if path.is_dir() else [path]
        if not inside:
            raise GloVLMError(
                f"The folder {path} holds no slide ({', '.join(sorted(SUFFIXES))}): correct the "
                "path. Pictures such as PNG and JPEG are cut by `glovlm data crops` and "
                "classified by `glovlm predict`."
            )
        for slide in inside:
            series = read_series(slide) if _may_be_dicom(slide) else None
            key = slide.parent.resolve(), series or ""
            if series is None:
                slides.append(slide)
            elif key not in series_of:
                series_of[key] = len(slides)
                slides.append(slide)
            elif slide.name < slides[series_of[key]].name:
                slides[series_of[key]] = slide
    return slides


def files_of(path: Path) -> list[Path]:
    """Files of a slide, sorted: those of its DICOM series, or the folder beside a MIRAX slide."""
    series = read_series(path) if _may_be_dicom(path) else None
    if series is not None:
        beside = sorted(other for other in path.parent.iterdir() if other.is_file())
        return [file for file in beside if _may_be_dicom(file) and read_series(file) == series]
    folder = path.with_suffix("")
    if path.suffix.lower() != ".mrxs" or not folder.is_dir():
        return [path]
    return [path, *sorted(part for part in folder.rglob("*") if part.is_file())]


def _list_folder(root: Path) -> list[Path]:
    slides: list[Path] = []
    for folder, _, names in walk_folders(root):
        files = [Path(folder, name) for name in names if not name.startswith(".")]
        slides += [file for file in files if file.is_file() and _is_slide(file)]
    return sorted(slides)


def _is_slide(path: Path) -> bool:
    """By the suffix; files of DICOM often have none."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (_may_be_dicom(path) and read_series(path) is not None)


def _may_be_dicom(path: Path) -> bool:
    """A DICOM file's suffix may be missing, or the last part of a UID."""
    suffix = path.suffix.lower()
    return suffix in ("", ".dcm", ".dicom") or suffix[1:].isdecimal()
