"""Slide classification config, checked before anything is loaded."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from ..errors import GloVLMError
from ..runtimes import PRECISION_HELP, RUNTIME_HELP, Precision, Runtime
from ..settings import Settings, setting
from .files.coordinates import parse_origin

# Help of settings that other commands have as well.
MPP = "Micrometres per pixel of level 0, where the file's own is missing or wrong."
SCENE = "Which picture of a file that holds several: its number, from 1, or its name."
ORIGIN = (
    "Where the outlines count from: auto (as QuPath: the scanned part's corner where the slide "
    "states one), slide (level 0's corner), bounds, or X,Y in pixels of level 0."
)


@dataclass(frozen=True)
class SlideConfig(Settings):
    """Config of one run over slides: the arguments and options of `glovlm slide`."""

    _what: ClassVar[str] = "A run over slides"

    model: str = setting(
        help="A run's folder, its `model/`, or a Hub id; with an aggregator also a backbone, if "
        "that encoded the aggregator's training slides.",
        group="Data",
        argument=True,
    )
    slides: list[str] = setting(
        help="Slides (SVS, TIFF, OME-TIFF, QPTIFF, NDPI, MRXS, SCN, BIF, DICOM), or folders of "
        "them.",
        group="Data",
        argument=True,
    )
    output_dir: str = setting(
        help="Where the results are written; a run that stopped goes on there.", group="Output"
    )
    mpp: float | None = setting(
        None,
        help=MPP,
        group="Tiles",
        above=0,
        unset="the file's own",
    )
    scene: str | None = setting(
        None,
        help=SCENE,
        group="Data",
        unset="the largest",
    )
    stain: str | None = setting(
        None,
        help="Stain of all slides, where --cases does not state it; see docs/stains.md.",
        group="Data",
        unset="not stated",
    )
    tile_mpp: float | None = setting(
        None,
        help="Micrometres per pixel at which tiles are cut.",
        group="Tiles",
        above=0,
        unset="the model's own",
    )
    tile_size: int | None = setting(
        None,
        help="Side of a tile in pixels.",
        group="Tiles",
        above=0,
        most=8192,
        unset="the model's input",
    )
    overlap: float = setting(
        0.0,
        help="The part of its side that a tile shares with the next.",
        group="Tiles",
        least=0,
        most=0.9,
    )
    min_tissue: float = setting(
        0.25, help="Least part of a tile that is tissue.", group="Tiles", least=0, most=1
    )
    drop_pen: bool = setting(True, help="Leave strokes of a pen out of the tissue.", group="Tiles")
    objects: str | None = setting(
        None,
        help="Outlined glomeruli: GeoJSON, COCO, or XML of ImageScope or ASAP; for several slides "
        "one COCO file, or a folder of NAME.geojson, NAME.json or NAME.xml, also packed (.gz).",
        group="Objects",
        unset="tiles alone",
    )
    origin: str = setting(
        "auto",
        help=ORIGIN,
        group="Objects",
    )
    classes: list[str] = setting(
        factory=list,
        help="Classes of outlines that are counted, and no other; repeat the option. By default "
        "all but those that QuPath reserves.",
        group="Objects",
    )
    exclude: list[str] = setting(
        factory=list,
        help="Classes of outlines that are left out; repeat the option.",
        group="Objects",
    )
    margin: float = setting(
        1.25,
        help="Side of an object's crop over its longer side.",
        group="Objects",
        least=1,
        below=100,
    )
    outline_of: Literal["capsule", "tuft"] | None = setting(
        None,
        help="What the outlines go around, for a model that sees the inside of outlines.",
        group="Objects",
        unset="not stated",
    )
    aggregator: str | None = setting(
        None,
        help="Output folder of `glovlm mil`, which then gives the slide's label.",
        group="Slide label",
        unset="mean of the top tiles",
    )
    top: int = setting(
        10,
        help="Tiles a class whose scores are averaged for the slide's label; 0 for all.",
        group="Slide label",
        least=0,
        most=10**9,
    )
    smooth: bool = setting(
        False, help="Average scores over neighbouring tiles before.", group="Slide label"
    )
    heatmap_class: str | None = setting(
        None,
        help="Class whose probability the heat map shows, or with an aggregator each tile's "
        "evidence for it.",
        group="Output",
        unset="the slide's label",
    )
    threshold: float = setting(
        0.5,
        help="Least probability of that class at which a tile is written as a square; with an "
        "aggregator those are written with evidence for it.",
        group="Output",
        least=0,
        most=1,
    )
    cases: str | None = setting(
        None,
        help="CSV with slide_id and any of case_id, patient_id, mpp, scene and what else is known "
        "of each slide and case (docs/outlines.md).",
        group="Data",
        unset="each slide its own",
    )
    case: str | None = setting(
        None, help="The case of all slides, in place of such a file.", group="Data", unset="none"
    )
    workers: int = setting(
        1, help="Processes that encode slides.", group="Machine", least=1, most=1024
    )
    batch_size: int = setting(32, help="Tiles at a time.", group="Machine", least=1, most=65_536)
    device: str = setting("auto", help="auto, cpu, cuda, cuda:N or mps.", group="Machine")
    precision: Precision = setting("fp32", help=PRECISION_HELP, group="Machine")
    runtime: Runtime = setting("torch", help=RUNTIME_HELP, group="Machine")
    allow_scale: bool = setting(
        False, help="Accept tiles and objects at a scale far from the model's.", group="Tiles"
    )
    anonymise: bool = setting(
        False,
        help="Call slides slide_001, ... and cases case_001, ... in all that is written; one "
        "content keeps its number in the folder.",
        group="Output",
    )

    def check(self) -> None:
        """Rules over several settings."""
        if self.cases and self.case:
            raise GloVLMError("Give either --cases (a file) or --case (one for all slides).")
        parse_origin(self.origin, (0, 0))

    def result_settings(self) -> dict[str, Any]:
        """Settings that determine the results of a slide, but what `auto` may stand for."""
        elsewhere = ("model", "slides", "output_dir", "objects", "aggregator", "cases", "case")
        engine = ("precision", "runtime")
        incidental = ("workers", "batch_size", "device", "anonymise", *engine)
        return {k: v for k, v in asdict(self).items() if k not in (*elsewhere, *incidental)}
