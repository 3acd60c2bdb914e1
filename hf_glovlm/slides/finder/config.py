"""Finder configs, checked before anything is loaded."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...settings import SEEDS, Settings, setting
from ..config import MPP, ORIGIN, SCENE
from ..files.coordinates import parse_origin

_STAIN = "Stain of all pictures, where --cases does not state it; see docs/stains.md."
_CASES = (
    "CSV with slide_id and any of patient_id, case_id, stain, mpp, scene and what else is known of "
    "each picture (docs/outlines.md)."
)
_SCALE = "Accept an --mpp far from what the file states."
_DEVICE = "auto, cpu, cuda, cuda:N or mps."


@dataclass(frozen=True)
class FindTrainConfig(Settings):
    """Config of a finder's training: the options of `glovlm find train`."""

    _what: ClassVar[str] = "Training a finder"

    regions: str = setting(
        help="Region images (PNG, JPEG, BMP, WebP) in which every glomerulus is outlined: a folder "
        "of them, or of small slides.",
        group="Data",
    )
    outlines: str = setting(
        help="Their outlines, called as they are: GeoJSON of QuPath, COCO, XML of ImageScope or "
        "ASAP, or masks with --colours. A file without any outline says that there is no "
        "glomerulus.",
        group="Data",
    )
    output_dir: str = setting(help="Folder of the finder.", group="Output")
    backbone: str | None = setting(
        None,
        help="Whose patch tokens are read: name, Hub id, folder, or VISION+TEXT; photographs need "
        "one.",
        group="Method",
        unset="mini, for synthetic images alone",
    )
    head: str = setting(
        "candidates", help="What is learned on the tokens; see docs/finder.md.", group="Method"
    )
    cases: str | None = setting(
        None, help=_CASES, group="Data", unset="each picture a group of its own"
    )
    mpp: float | None = setting(None, help=MPP, group="Data", above=0, unset="the file's own")
    scene: str | None = setting(None, help=SCENE, group="Data", unset="the largest")
    stain: str | None = setting(None, help=_STAIN, group="Data", unset="not stated")
    label_property: str | None = setting(
        None, help="Property of an outline that holds its class.", group="Objects", unset="QuPath's"
    )
    classes: list[str] = setting(
        factory=list,
        help="Classes of outlines that are glomeruli, and no other; repeat the option. By default "
        "all but those that QuPath reserves.",
        group="Objects",
    )
    exclude: list[str] = setting(
        factory=list,
        help="Classes of outlines that are no glomeruli; repeat the option.",
        group="Objects",
    )
    origin: str = setting("auto", help=ORIGIN, group="Objects")
    colours: str | None = setting(
        None,
        help="Of masks: green=viable,red=sclerosed, or by value 1=viable.",
        group="Objects",
        unset="no masks",
    )
    min_extent: int = setting(
        16, help="Smaller blobs of a mask are specks.", group="Objects", least=1, most=10**6
    )
    seed: int = setting(0, help="Of what the head draws.", group="Method", least=0, most=SEEDS)
    allow_scale: bool = setting(False, help=_SCALE, group="Data")
    device: str = setting("auto", help=_DEVICE, group="Machine")
    overwrite: bool = setting(False, help="Replace a finder in the output folder.", group="Output")

    def check(self) -> None:
        """Rules over several settings."""
        parse_origin(self.origin, (0, 0))

    def result_settings(self) -> dict[str, Any]:
        """Settings that determine what is learned, beside the pictures and their outlines."""
        elsewhere = ("regions", "outlines", "output_dir", "backbone", "cases")
        incidental = ("device", "overwrite")
        return {k: v for k, v in asdict(self).items() if k not in (*elsewhere, *incidental)}


@dataclass(frozen=True)
class FindConfig(Settings):
    """Config of a finder's run over slides: the arguments and options of `glovlm find run`."""

    _what: ClassVar[str] = "Finding glomeruli"

    finder: str = setting(
        help="Folder of a finder, which `glovlm find train` wrote.", group="Data", argument=True
    )
    slides: list[str] = setting(
        help="Slides (SVS, TIFF, OME-TIFF, QPTIFF, NDPI, MRXS, SCN, BIF, DICOM) or region images "
        "(PNG, JPEG, BMP, WebP), or folders of them.",
        group="Data",
        argument=True,
    )
    output_dir: str = setting(
        help="Folder of NAME.geojson, as `glovlm slide --objects` takes it; a run that stopped "
        "goes on there.",
        group="Output",
    )
    threshold: float | None = setting(
        None,
        help="Least score of a glomerulus.",
        group="Method",
        least=0,
        most=1,
        unset="the finder's own",
    )
    mpp: float | None = setting(None, help=MPP, group="Tiles", above=0, unset="the file's own")
    scene: str | None = setting(None, help=SCENE, group="Data", unset="the largest")
    stain: str | None = setting(None, help=_STAIN, group="Data", unset="not stated")
    cases: str | None = setting(None, help=_CASES, group="Data", unset="nothing further is known")
    drop_pen: bool = setting(True, help="Leave strokes of a pen out of the tissue.", group="Tiles")
    origin: str = setting("auto", help=ORIGIN, group="Objects")
    backbone: str | None = setting(
        None,
        help="Where the finder's backbone lies, if no longer where it was.",
        group="Method",
        unset="as the finder names it",
    )
    batch_size: int = setting(4, help="Windows at a time.", group="Machine", least=1, most=1024)
    device: str = setting("auto", help=_DEVICE, group="Machine")
    allow_scale: bool = setting(False, help=_SCALE, group="Tiles")

    def check(self) -> None:
        """Rules over several settings."""
        parse_origin(self.origin, (0, 0))

    def result_settings(self) -> dict[str, Any]:
        """Settings that determine the outlines of a slide."""
        elsewhere = ("finder", "slides", "output_dir", "cases", "backbone")
        incidental = ("batch_size", "device")
        return {k: v for k, v in asdict(self).items() if k not in (*elsewhere, *incidental)}
