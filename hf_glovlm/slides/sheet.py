"""Biopsy sheets (`glovlm sheet`): facts, pictures and pages of every case, written as one folder.

A case has a folder of its own. A sheet is written whole or not at all; those of other cases, and of
earlier runs, stay where they are and are named as such.
"""

import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.listing import few
from ..errors import GloVLMError, describe_error
from ..files import (
    LOCK,
    UNFINISHED,
    check_fields,
    is_plain_name,
    one_writer,
    put_in_place,
    read_json,
    read_manifest,
    read_results,
    staging,
    write_csv,
    write_json,
    write_text,
)
from ..progress import counted
from ..reports.biopsy import Picture, render_index, render_sheet
from .biopsy import describe_biopsies
from .files.annotations import SlideObject
from .files.crop_image import crop_square, read_crop
from .files.region_images import list_pictures, open_picture
from .files.wsi import Slide, is_same_slide, slide_name
from .numbering import NUMBERS, Numbers
from .report import clean_text

KIND, FILE, INDEX = "biopsy_sheets", "sheets.json", "index.html"
PARTS = ("sheet.html", "lesions.csv", "glomeruli.csv", "sheet.json")
PICTURE_SIDE = 320  # pixels at most: 200 a inch where five stand side by side on A4
_QUALITY = 80  # of JPEG
_NONE_GIVEN = "No slides were given (--images), so the outlines are drawn alone."
_LONGEST = 100  # bytes of a folder's name
logger = logging.getLogger("hf_glovlm")


def write_sheets(
    cases: str | Path,
    slides: Sequence[str | Path],
    output_dir: str | Path,
    *,
    corrections: str | Path | None = None,
    finder: str | Path | None = None,
    images: Sequence[str | Path] = (),
    signed_by: str | None = None,
) -> dict[str, Any]:
    """Write the sheets of biopsies into a folder.

    `output_dir/index.html`, `output_dir/sheets.json`, and for each case in `output_dir/CASE/`:
    `sheet.html` (self-contained), `sheet.json`, `lesions.csv`, `glomeruli.csv`. A case whose name
    names no folder has `case_001` or the like.

    Args:
        cases: Table of cases.
        slides: Output folders of `glovlm slide`.
        output_dir: Where sheets are written; those of cases that are not described now stay.
        corrections: Output folder of `glovlm correct`, made from one of these.
        finder: Folder of `glovlm find train`, whose recall enters the intervals.
        images: Files and folders of the slides, for pictures; without one of a slide its outlines
            are drawn alone.
        signed_by: The reader who signs, whose corrections are among those given.

    Returns:
        What `sheets.json` holds: `sheets` (one line a case), `failed` (cases that could not be
        described, and why), `earlier` (sheets of earlier runs that stay), `notes`.

    Raises:
        GloVLMError: Something given cannot be read, two pictures are of one slide, or the folder
            holds something else or lies in what is read.
    """
    table, output = Path(cases).expanduser(), Path(output_dir).expanduser()
    results = [Path(path).expanduser() for path in slides]
    corrected = None if corrections is None else Path(corrections).expanduser()
    learned = None if finder is None else Path(finder).expanduser()
    _check_place(output, [*results, *filter(None, [corrected, learned])])
    with one_writer(output), staging(output) as work:
        former = _read_former(output)
        described = describe_biopsies(
            table, results, corrections=corrected, signed_by=signed_by, finder=learned
        )
        scenes = _Scenes(results, [Path(path).expanduser() for path in images])
        folders = _name_folders([*described.sheets], former, output)
        lines, places = [], []
        for case, facts in counted([*described.sheets.items()], "sheets"):
            pictures, sentences = scenes.draw(facts["glomeruli"], described.objects)
            sheet = {**facts, "pictures": {"sentences": sentences}}
            _write_sheet(work / folders[case], sheet, pictures)
            lines.append(_line(sheet, folders[case]))
            places += [f"{folders[case]}/{name}" for name in PARTS]
        contents = {
            "kind": KIND,
            "version": 1,
            "research_use_only": True,
            "synthetic": any(sheet["synthetic"] for sheet in described.sheets.values()),
            "sheets": lines,
            "failed": [{"case": case, "why": why} for case, why in described.failed.items()],
            "earlier": _earlier(former, folders, described.failed, output),
            "notes": list(described.notes),
        }
        write_text(work / INDEX, render_index(contents))
        write_json(work / FILE, contents, ensure_ascii=False, allow_nan=False)
        put_in_place(work, output, [*places, INDEX, FILE])
    return contents


# ---------------------------------------------------------------------------- where it is written


def _check_place(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output folder in what is read."""
    for given in inputs:
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(given)):
            raise GloVLMError(
                f"'{output}' lies in '{given}', which is read and never changed: give another "
                "--output-dir."
            )


def _read_former(output: Path) -> dict[str, str]:
    """Folders of the cases that have a sheet there from an earlier run.

    Raises:
        GloVLMError: The folder holds something else.
    """
    path = output / FILE
    if not path.is_file():
        there = [place.name for place in output.iterdir() if not place.name.startswith(".")]
        if any(name not in (LOCK, UNFINISHED) for name in there):
            raise GloVLMError(
                f"Output folder '{output}' holds files that are no sheets: give an empty or a new "
                "folder."
            )
        return {}
    content = read_json(path)
    if content.get("kind") != KIND:
        raise GloVLMError(f"'{path}' holds something else: give another --output-dir.")
    check_fields(path, content, {"sheets": (list,), "earlier": (list,)})
    former = {}
    for line in (*content["sheets"], *content["earlier"]):
        check_fields(path, line, {"case": (str,), "folder": (str,)})
        if is_plain_name(line["folder"]) and (output / line["folder"] / PARTS[0]).is_file():
            former[line["case"]] = line["folder"]
    return former


def _name_folders(cases: Sequence[str], former: Mapping[str, str], output: Path) -> dict[str, str]:
    """Folder of each case: its name where it can name one that no other case has, else a number."""
    folders = {case: former[case] for case in cases if case in former}
    taken = {name.casefold() for name in (*former.values(), FILE, INDEX, UNFINISHED)}
    for case in cases:  # those that can have their own names come before those with numbers
        fits = is_plain_name(case) and len(case.encode()) <= _LONGEST
        if case not in folders and fits and case.casefold() not in taken:
            folders[case] = case
            taken.add(case.casefold())
    number = 0
    for case in (case for case in cases if case not in folders):
        while case not in folders or folders[case] in taken:
            number += 1
            folders[case] = f"case_{number:03d}"
        taken.add(folders[case])
    for case, name in folders.items():
        place = output / name
        if case not in former and place.exists() and not place.is_dir():
            raise GloVLMError(f"'{place}' is no folder: remove it, or give another --output-dir.")
    return folders


def _earlier(
    former: Mapping[str, str],
    folders: Mapping[str, str],
    failed: Mapping[str, str],
    output: Path,
) -> list[dict[str, str]]:
    """Sheets that stay from earlier runs, since their cases were not described now."""
    why = dict.fromkeys(failed, "this time it could not be described")
    return [
        {"case": case, "folder": name, "why": why.get(case, "not among these cases any more")}
        for case, name in former.items()
        if case not in folders
    ]


# -------------------------------------------------------------------------------------- pictures


@dataclass
class _Scenes:
    """Pictures of glomeruli, cut out of those files of slides that are given and fit."""

    results: Sequence[Path]
    images: Sequence[Path]

    def __post_init__(self) -> None:
        self._entries: dict[str, tuple[Path, Mapping[str, Any], float]] = {}
        for folder in self.results:
            content = read_results(folder, "slides")
            margin = float(content.get("settings", {}).get("margin") or 1.25)
            for entry in content["slides"]:
                self._entries.setdefault(str(entry["slide"]), (folder, entry, margin))
        self._files = self._match()

    def _match(self) -> dict[str, Path]:
        """The file of each slide that is given: by its name, or of numbered results by content."""
        numbers = {at: Numbers.read(at) for at in self.results if (at / NUMBERS).is_file()}
        files: dict[str, Path] = {}
        used = dict.fromkeys(self.images, False)
        listed = [(given, path) for given in self.images for path in list_pictures(given)]
        for given, path in listed:
            if not path.is_file():
                raise GloVLMError(f"There is no slide {path} (--images): correct the path.")
            # A file that is called slide_001 need not be the slide of that number.
            names = {at: table.find_slide(path) for at, table in numbers.items()}
            names |= {at: slide_name(path) for at in self.results if at not in numbers}
            own = [n for n, (at, *_) in self._entries.items() if names[at] == n]
            used[given] = used[given] or bool(own)
            for name in own:
                if files.setdefault(name, path).resolve() != path.resolve():
                    raise GloVLMError(
                        f"{files[name]} and {path} are both pictures of {name}: give one of them."
                    )
        for given, holds in used.items():
            if not holds:  # said here and kept nowhere: a place, and perhaps a person's name
                logger.warning(
                    "%s (--images) holds no slide of these results: its name must be the same.",
                    given,
                )
        return files

    def draw(
        self,
        glomeruli: Sequence[Mapping[str, Any]],
        objects: Mapping[str, Sequence[SlideObject]],
    ) -> tuple[list[Picture | None], list[str]]:
        """Pictures of a case's glomeruli in their order, and sentences on how they were made."""
        outlines = {(slide, item.id): item for slide, own in objects.items() for item in own}
        pictures: list[Picture | None] = [None] * len(glomeruli)
        reasons: dict[str, list[str]] = {}
        margins = set()
        for slide in dict.fromkeys(str(one["slide"]) for one in glomeruli):
            items = {
                place: outlines[slide, one["object"]]
                for place, one in enumerate(glomeruli)
                if one["slide"] == slide and (slide, one["object"]) in outlines
            }
            margin = self._entries[slide][2] if slide in self._entries else 1.25
            margins.add(margin)
            drawn, why = self._draw_slide(slide, [*items.values()], margin)
            for place, picture in zip(items, drawn, strict=True):
                pictures[place] = picture
            if why is not None:
                reasons.setdefault(why, []).append(slide)
        if not self.images:
            reasons = {_NONE_GIVEN: []} if pictures else {}
        sentences = [f"{few(own)}: {why}" if own else why for why, own in reasons.items()]
        sentences += [
            f"Each picture is {margin:g} times as wide as its outline is long: the pictures are "
            "not of one scale."
            for margin in sorted(margins)
        ]
        return pictures, sentences

    def _draw_slide(
        self, slide: str, items: Sequence[SlideObject], margin: float
    ) -> tuple[list[Picture], str | None]:
        """Pictures of a slide's objects; outlines alone where it cannot be read; what to say."""
        alone = [_draw(None, item, margin) for item in items]
        path = self._files.get(slide)
        if path is None:
            return alone, "the slide was not given (--images), so its outlines are drawn alone."
        folder, entry, _ = self._entries[slide]
        try:
            with open_picture(path, scene=_scene(folder, slide)) as picture:
                size = entry.get("size")
                if size is not None and [*picture.size] != [*size]:
                    return alone, (
                        f"the file given has {picture.size[0]} x {picture.size[1]} pixels and the "
                        f"slide that was classified {size[0]} x {size[1]}, so the outlines are "
                        "drawn alone."
                    )
                drawn = [_draw(picture, item, margin) for item in items]
        except Exception as error:  # what is wrong with one slide stays with it
            why = clean_text(describe_error(error), path, slide)
            return alone, (
                f"the slide cannot be read ({why.rstrip('.')}), so its outlines are drawn alone."
            )
        if not _is_same(path, folder, slide):
            return drawn, (
                "the file given is not the one that was classified, only of the same size: look "
                "whether the outlines fit."
            )
        return drawn, None


def _made_from(folder: Path, slide: str) -> Mapping[str, Any]:
    """What the results of a slide were made from; nothing where that is not known."""
    with suppress(GloVLMError):
        manifest = read_manifest(folder / "slides" / slide)
        return {} if manifest is None else manifest.made_from
    return {}


def _scene(folder: Path, slide: str) -> str | None:
    """Which picture of the slide's file was classified."""
    scene = _made_from(folder, slide).get("scene")
    return None if scene is None else str(scene)


def _is_same(path: Path, folder: Path, slide: str) -> bool:
    """Whether a file is the one that was classified."""
    return is_same_slide(path, _made_from(folder, slide).get("slide"))


def _draw(slide: Slide | None, item: SlideObject, margin: float) -> Picture:
    """Picture of an object: the square that was classified, and the outline in it."""
    x, y, side = crop_square(item.bounds, margin)
    rings = [(ring - (x, y)) / side for polygon in item.polygons for ring in polygon]
    if slide is None:
        return Picture(rings)
    stream = io.BytesIO()
    crop = read_crop(slide, (x, y, side), None, max_side=PICTURE_SIDE)
    crop.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return Picture(rings, stream.getvalue())


# --------------------------------------------------------------------------------------- writing


def _write_sheet(
    folder: Path, sheet: Mapping[str, Any], pictures: Sequence[Picture | None]
) -> None:
    """Write the four files of a case."""
    write_text(folder / "sheet.html", render_sheet(sheet, pictures))
    header, rows = _lesion_rows(sheet)
    write_csv(folder / "lesions.csv", header, rows)
    header, rows = _glomerulus_rows(sheet)
    write_csv(folder / "glomeruli.csv", header, rows)
    write_json(folder / "sheet.json", sheet, ensure_ascii=False, allow_nan=False)


def _lesion_rows(sheet: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Table of lesions: a row for each share, of a crescent two."""
    header = [
        "case", "status", "class", "lesion", "system", "role", "heading", "count", "denominator",
        "of", "at_least", "percent", "low", "high", "holds", "corrected", "corrected_low",
        "corrected_high", "corrected_holds", "present", "absent", "not_assessable", "not_read",
        "definition", "source", "verified",
    ]  # fmt: skip
    rows: list[list[Any]] = []
    for row in sheet["lesions"]:
        corrected = row["corrected"] or {"percent": None, "ci95": None, "holds": []}
        for share in row["shares"]:
            rows.append([
                sheet["case"], sheet["status"]["words"],
                *(row[name] for name in ("class", "words", "system", "role", "heading")),
                share["count"], share["denominator"], share["of"], _yes(share.get("least", False)),
                *_measured(share), *_measured(corrected),
                *(row["counts"][n] for n in ("present", "absent", "not_assessable", "not_read")),
                row["definition"], row["source"], _yes(row["verified"]),
            ])  # fmt: skip
    return header, rows


def _measured(share: Mapping[str, Any]) -> list[Any]:
    """Percentage, its bounds, and what these hold."""
    return [share["percent"], *(share["ci95"] or [None, None]), "; ".join(share["holds"])]


def _glomerulus_rows(sheet: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Table of glomeruli, as they stand on the sheet; a column of states for each lesion."""
    names = list(dict.fromkeys(name for one in sheet["glomeruli"] for name in one["states"]))
    plain = ["number", "slide", "object", "glomerulus", "class", "by", "probability", "doubt"]
    header = [
        "case", *plain, "confirmed", "finder_score", "quality", "unlike_support", "set", "notes",
        *(f"state_{name}" for name in names),
    ]  # fmt: skip
    rows = [
        [
            sheet["case"], *(one[name] for name in plain), _yes(one["confirmed"]),
            one["finder_score"], "; ".join(one["quality"]), _yes(one["unlike_support"]),
            "; ".join(one["set"] or ()), " ".join(one["notes"]),
            *(one["states"].get(name) for name in names),
        ]
        for one in sheet["glomeruli"]
    ]  # fmt: skip
    return header, rows


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _line(sheet: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A case's line in the index."""
    sclerotic = next((row for row in sheet["lesions"] if row["role"] == "global sclerosis"), None)
    shares = sclerotic["shares"] if sclerotic else []
    whole = bool(shares) and shares[0]["percent"] is not None
    return {
        "case": sheet["case"],
        "folder": folder,
        "status": sheet["status"]["words"],
        "n": sheet["counts"]["n"],
        "confirmed": sheet["counts"]["confirmed"],
        "sclerotic": {k: shares[0][k] for k in ("count", "denominator")} if whole else None,
        "adequacy": sheet["adequacy"]["verdict"],
        "notes": list(sheet["notes"]),
    }
