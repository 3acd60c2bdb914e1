"""Slide classification config, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import GloVLMError, nearest


@dataclass
class SlideConfig:
    """Config of one run over slides: the arguments and flags of `glovlm slide`.

    Args:
        model: A run's folder, its `model/`, or a Hub id; with an aggregator also a backbone, if
            that encoded the aggregator's training slides.
        slides: Slide files.
        output_dir: Where the results are written; a run that stopped goes on there.
        mpp: Micrometres per pixel of level 0, where the file's own is missing or wrong.
        tile_mpp: Micrometres per pixel at which tiles are cut; the model's scale by default.
        tile_size: Side of a tile in pixels; the model's input by default.
        overlap: The part of its side that a tile shares with the next.
        min_tissue: Least part of a tile that is tissue.
        objects: GeoJSON of outlined glomeruli; for several slides a folder of `NAME.geojson`.
        margin: Side of an object's crop over its longer side.
        aggregator: Output folder of `glovlm mil`, which then gives the slide's label.
        top: Tiles a class whose scores are averaged for the slide's label; 0 for all.
        smooth: Average scores over neighbouring tiles before.
        heatmap_class: Class whose probability the heat map shows, or with an aggregator each
            tile's evidence for it; by default that of the slide's label.
        threshold: Least probability of that class at which a tile is written as a square; with an
            aggregator those are written with evidence for it.
        cases: CSV with the columns `slide` and `case` (or `case_id`, `patient_id`).
        case: The case of all slides, in place of such a file.
        workers: Processes that encode slides.
        batch_size: Tiles at a time.
        device: Where to compute.
        allow_scale: Accept tiles and objects at a scale far from the model's.
        anonymise: Call slides `slide_001`, ... and cases `case_001`, ... in all that is written.
            The feature file of a slide that is not done bears its name until it is.
    """

    model: str
    slides: list[str]
    output_dir: str
    mpp: float | None = None
    tile_mpp: float | None = None
    tile_size: int | None = None
    overlap: float = 0.0
    min_tissue: float = 0.25
    objects: str | None = None
    margin: float = 1.25
    aggregator: str | None = None
    top: int = 10
    smooth: bool = False
    heatmap_class: str | None = None
    threshold: float = 0.5
    cases: str | None = None
    case: str | None = None
    workers: int = 1
    batch_size: int = 32
    device: str = "auto"
    allow_scale: bool = False
    anonymise: bool = False

    def __post_init__(self) -> None:
        self.slides = [str(slide) for slide in self.slides]
        for name, least in (("top", 0), ("workers", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise GloVLMError(
                    f"--{flag} must be at least {least}; found {getattr(self, name)}."
                )
        if not 0 <= self.threshold <= 1:
            raise GloVLMError(f"--threshold must lie in 0 ... 1; found {self.threshold:g}.")
        if self.cases and self.case:
            raise GloVLMError("Give either --cases (a file) or --case (one for all slides).")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SlideConfig":
        """Make a config from flags or YAML.

        Raises:
            GloVLMError: A key is unknown (names the nearest), or one that is needed is missing.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise GloVLMError(
                    f"Unknown setting '{key}' of a run over slides.{nearest(key, known)}"
                )
        for key in ("model", "slides", "output_dir"):
            if not values.get(key):
                raise GloVLMError(f"A run over slides needs {key.replace('_', ' ')}: give it.")
        return cls(**values)

    def result_settings(self) -> dict[str, Any]:
        """Settings that determine the results of a slide."""
        elsewhere = ("model", "slides", "output_dir", "objects", "aggregator", "cases", "case")
        incidental = ("workers", "batch_size", "device", "anonymise")
        return {k: v for k, v in asdict(self).items() if k not in (*elsewhere, *incidental)}
