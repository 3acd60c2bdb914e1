"""Learning a finder of glomeruli from a few outlined regions, and what it finds in other groups.

The threshold is chosen, and precision and recall are measured, on groups (patients, else slides)
that the head which scores them has not seen: each group is left out in turn, in at most five
parts. The finder itself then learns from all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ...errors import GloVLMError
from ...files import read_json, write_json
from ...progress import counted
from ..encoding import encoder_fingerprint
from .agreement import IOU, Agreement, measure_region
from .folder import CONFIG, KIND, WEIGHTS
from .heads import Head, make_head
from .regions import Detection, Region, check_picture, diameters
from .tokens import TokenEncoder

DEFAULT_HEAD = "candidates"
FOLDS = 5  # groups are left out in at most so many parts
NEIGHBOURS = 2  # thresholds on each side that a threshold is chosen with
FORMAT = 1


@dataclass(frozen=True)
class LeftOut:
    """What a head finds in groups that it has not seen, at the threshold chosen on them.

    The threshold is chosen on the same groups (`choose_threshold`), so that F1 at it is a little
    too good.

    Attributes:
        threshold: Chosen, or the head's own where it is fixed.
        agreement: With the outlines, over all regions.
        regions: How many.
        groups: How many were left out, each once.
        group: What a group is: `patient`, `slide` or `region`.
        tried: The agreement at each threshold tried.
    """

    threshold: float
    agreement: Agreement
    regions: int
    groups: int
    group: str = "patient"
    tried: Mapping[float, Agreement] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Plain values, as a finder's folder holds them."""
        counts = {"regions": self.regions, "groups": self.groups, "group": self.group}
        return {"threshold": self.threshold, **self.agreement.describe(), **counts}


@dataclass(eq=False)
class Finder:
    """Finder of glomeruli: a light head on the patch tokens of a frozen tower.

    Attributes:
        encoder: Of pictures to token maps.
        head: Fitted.
        threshold: Detections from this score on are given.
        scale: Pixels of a picture of unknown scale per working pixel (the support's median).
        mpp: Micrometres per working pixel; `None` where the support states no scale.
        diameters: Least, median and largest diameter of the support's glomeruli, working pixels.
        stains: Of the support.
        classes: Of the support's outlines.
        left_out: `LeftOut.describe()`; empty where nothing could be left out.
        backbone: Name to load the tower by.
        revision: Its commit, if known.
        fingerprint: Of the tower, its weights and its transform.
        seed: Of the fit.
        synthetic: Whether the tower was made from synthetic images.
        notes: What a user should know of the fit.
    """

    encoder: TokenEncoder
    head: Head
    threshold: float
    scale: float
    mpp: float | None
    diameters: tuple[float, float, float]
    stains: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    revision: str | None = None
    fingerprint: str = ""
    seed: int = 0
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def fit(
        cls,
        model: Any,
        processor: Any,
        regions: Sequence[Region],
        *,
        head: str = DEFAULT_HEAD,
        seed: int = 0,
        group: str = "patient",
        encoder: TokenEncoder | None = None,
        leave_out: bool = True,
    ) -> "Finder":
        """Learn a finder from outlined regions.

        Args:
            model: A `GloVLMModel` of `load_backbone`.
            processor: Its `GloVLMProcessor`.
            regions: With every glomerulus outlined; some may be without any.
            head: One of `HEADS`.
            seed: Of what is drawn, and of how groups are parted.
            group: What a region's group is: `patient`, `slide` or `region`.
            encoder: In place of a new one of this model, with what it keeps.
            leave_out: Whether the threshold is chosen on groups left out; else it is the head's.

        Raises:
            GloVLMError: No glomerulus is outlined, an outline lies outside of its picture, or some
                regions alone state a scale.
        """
        check_regions(regions)
        encoder = encoder or TokenEncoder(model, processor, store={})
        fitted, scale, mpp = _fit_head(encoder, regions, head, seed)
        threshold, left_out, notes = fitted.threshold, {}, []
        if leave_out and len({region.group for region in regions}) > 1:
            measured = leave_groups_out(
                model, processor, regions, head=head, seed=seed, group=group, encoder=encoder
            )
            threshold, left_out = measured.threshold, measured.describe()
        elif leave_out:
            notes.append(
                f"All regions are of one {group}, so nothing could be left out: the threshold is "
                f"the head's own ({threshold:g}), and how many glomeruli it misses is not known."
            )
        config = model.config
        return cls(
            encoder=encoder,
            head=fitted,
            threshold=threshold,
            scale=scale,
            mpp=mpp,
            diameters=_working_diameters(regions, scale, mpp),
            stains=sorted({region.stain for region in regions if region.stain}),
            classes=sorted({label for region in regions for label in region.labels if label}),
            left_out=left_out,
            backbone=str(config.backbone_name or ""),
            revision=config.backbone_revision,
            fingerprint=encoder_fingerprint(model, processor),
            seed=seed,
            synthetic=bool(config.synthetic),
            notes=notes,
        )

    def downsample(self, mpp: float | None) -> float:
        """Pixels of a picture per working pixel.

        Args:
            mpp: Micrometres per pixel of the picture; `None`: the scale of the support's pictures.

        Raises:
            GloVLMError: The finder works at a stated scale, and the picture's is not known.
        """
        if self.mpp is None:
            return self.scale
        if mpp is None:
            raise GloVLMError(
                f"This finder works at {self.mpp:.3g} micrometres per pixel, and the picture's "
                "scale is not known: state it (mpp)."
            )
        return self.mpp / mpp

    def detect(
        self,
        picture: NDArray[np.uint8],
        *,
        downsample: float | None = None,
        mpp: float | None = None,
        threshold: float | None = None,
    ) -> list[Detection]:
        """Outline the glomeruli of a picture.

        Args:
            picture: `[height, width, 3]`, uint8.
            downsample: Its pixels per working pixel; 1 where it was read at the working scale. By
                default what `downsample(mpp)` says.
            mpp: Its micrometres per pixel, where `downsample` is not given.
            threshold: Least score, in place of the finder's.

        Returns:
            The surest first, in pixels of the picture.
        """
        return self.outline(self.score(picture, downsample=downsample, mpp=mpp), threshold)

    def score(
        self,
        picture: NDArray[np.uint8],
        *,
        downsample: float | None = None,
        mpp: float | None = None,
    ) -> Any:
        """Scores of a picture, to be outlined at more than one threshold; see `detect`."""
        check_picture(picture, "the picture")
        scale = self.downsample(mpp) if downsample is None else downsample
        if not (math.isfinite(scale) and scale > 0):
            raise GloVLMError(
                f"Expected pixels per working pixel above 0, found {scale}: check the "
                "micrometres per pixel of the picture."
            )
        return self.head.score(self.encoder, picture, scale)

    def outline(self, scores: Any, threshold: float | None = None) -> list[Detection]:
        """Glomeruli of a picture that `score` has scored; the surest first."""
        detections = self.head.outline(scores, self.threshold if threshold is None else threshold)
        return sorted(detections, key=lambda one: -one.score)

    def detect_many(
        self, pictures: Sequence[NDArray[np.uint8]], *, threshold: float | None = None
    ) -> list[list[Detection]]:
        """Outline the glomeruli of pictures that were read at the working scale."""
        return [self.detect(one, downsample=1.0, threshold=threshold) for one in pictures]

    def save(self, folder: str | Path) -> None:
        """Write `finder.json` and `head.safetensors` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: np.ascontiguousarray(v) for k, v in self.head.state().items()}
        save_file(state, folder / WEIGHTS)
        write_json(
            folder / CONFIG,
            {
                "kind": KIND,
                "format": FORMAT,
                "head": self.head.name,
                "threshold": self.threshold,
                "scale": self.scale,
                "mpp": self.mpp,
                "diameters": list(self.diameters),
                "stains": self.stains,
                "classes": self.classes,
                "left_out": self.left_out,
                "backbone": self.backbone,
                "revision": self.revision,
                "fingerprint": self.fingerprint,
                "seed": self.seed,
                "synthetic": self.synthetic,
                "notes": self.notes,
            },
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Any,
        processor: Any,
        *,
        encoder: TokenEncoder | None = None,
    ) -> "Finder":
        """Load a finder that `save` wrote.

        Args:
            folder: The folder.
            model: The model whose tower it was learned on.
            processor: Its processor.
            encoder: In place of a new one of this model.

        Raises:
            GloVLMError: It is no finder, is damaged, or was learned on another tower.
        """
        folder = Path(folder).expanduser()
        config = read_config(folder)
        fingerprint = encoder_fingerprint(model, processor)
        if config["fingerprint"] != fingerprint:
            raise GloVLMError(
                f"The finder in '{folder}' was learned on the tower {config['backbone']!r} with "
                f"fingerprint {config['fingerprint'][:12]}, found {fingerprint[:12]}: load the "
                "backbone that it names."
            )
        head = make_head(config["head"])
        try:
            head.restore(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise GloVLMError(
                f"'{folder / WEIGHTS}' is missing or damaged ({type(error).__name__}): restore a "
                "copy, or learn the finder again."
            ) from error
        names = (
            "threshold", "scale", "mpp", "stains", "classes", "left_out", "backbone", "revision",
            "fingerprint", "seed", "synthetic", "notes",
        )  # fmt: skip
        least, middle, most = config["diameters"]
        return cls(
            encoder=encoder or TokenEncoder(model, processor),
            head=head,
            diameters=(least, middle, most),
            **{name: config[name] for name in names},
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Content of a finder's `finder.json`, without loading a model.

    Raises:
        GloVLMError: There is none, or it is damaged or of a later version.
    """
    path = Path(folder).expanduser() / CONFIG
    if not path.is_file():
        raise GloVLMError(
            f"Expected a finder in '{folder}', the output folder of `glovlm find train`; found no "
            f"{CONFIG} in it."
        )
    config: dict[str, Any] = read_json(path)
    needed = {
        "head", "threshold", "scale", "mpp", "diameters", "stains", "classes", "left_out",
        "backbone", "revision", "fingerprint", "seed", "synthetic", "notes",
    }  # fmt: skip
    if config.get("kind") != KIND or config.get("format") != FORMAT or needed - {*config}:
        raise GloVLMError(
            f"'{path}' is no finder that this version reads (format {FORMAT}): it is damaged, or "
            "was written by another version; learn it again."
        )
    return config


def leave_groups_out(
    model: Any,
    processor: Any,
    regions: Sequence[Region],
    *,
    head: str = DEFAULT_HEAD,
    seed: int = 0,
    group: str = "patient",
    encoder: TokenEncoder | None = None,
    thresholds: Sequence[float] | None = None,
) -> LeftOut:
    """Threshold, precision and recall on groups that the head has not seen.

    Args:
        model: A `GloVLMModel` of `load_backbone`.
        processor: Its `GloVLMProcessor`.
        regions: Of at least two groups.
        head: One of `HEADS`.
        seed: Of the fits, and of how groups are parted.
        group: What a region's group is.
        encoder: In place of a new one of this model, with what it keeps.
        thresholds: To choose from, in place of the head's own.

    Raises:
        GloVLMError: All regions are of one group, or all outlines are.
    """
    check_regions(regions)
    encoder = encoder or TokenEncoder(model, processor, store={})
    folds = part_groups(regions, seed)
    made = make_head(head)
    tried = list(thresholds or made.thresholds) or [made.threshold]
    total = {threshold: Agreement() for threshold in tried}
    for fold in counted(folds, "parts left out"):
        rest = [region for region in regions if region.group not in fold]
        fitted, scale, mpp = _fit_head(encoder, rest, head, seed)
        for region in regions:
            if region.group not in fold:
                continue
            scores = fitted.score(encoder, region.picture, _scale_of(region, scale, mpp))
            for threshold in tried:
                detections = fitted.outline(scores, threshold)
                total[threshold] += measure_region(detections, region, iou=IOU)
    best = choose_threshold(total)
    return LeftOut(
        threshold=best,
        agreement=total[best],
        regions=len(regions),
        groups=len({region.group for region in regions}),
        group=group,
        tried=total,
    )


def choose_threshold(tried: Mapping[float, Agreement]) -> float:
    """Threshold whose F1, averaged with those of its two neighbours on each side, is largest.

    The few dozen glomeruli of a support make F1 jump from one threshold to the next, where it is
    smooth on many. Of equals the lowest is taken, as a glomerulus that is missed costs a reader
    more than one to delete. Thresholds with fewer neighbours are not chosen.

    Args:
        tried: What was detected at each threshold, evenly spaced.
    """
    thresholds = sorted(tried)
    beside = min(NEIGHBOURS, (len(thresholds) - 1) // 2)
    f1 = np.array([tried[threshold].f1 or 0.0 for threshold in thresholds])
    means = np.lib.stride_tricks.sliding_window_view(f1, 2 * beside + 1).mean(axis=1)
    return thresholds[beside + int(np.argmax(means.round(12)))]


def part_groups(regions: Sequence[Region], seed: int, folds: int = FOLDS) -> list[set[str]]:
    """Part the groups of regions into those that are left out together.

    Args:
        regions: Of at least two groups.
        seed: Of the order of the groups.
        folds: Most parts.

    Returns:
        Sets of groups; outside of each a glomerulus is outlined.

    Raises:
        GloVLMError: There are no two groups with an outline.
    """
    outlined = {region.group for region in regions if len(region.polygons)}
    if len(outlined) < 2:
        raise GloVLMError(
            f"Expected outlined glomeruli of at least two groups, found {len(outlined)}: with one, "
            "nothing can be left out. Outline a region of another patient."
        )
    order = np.random.default_rng(seed)
    names = [*sorted(outlined), *sorted({region.group for region in regions} - outlined)]
    places = [*order.permutation(len(outlined)), *range(len(outlined), len(names))]
    parts: list[set[str]] = [set() for _ in range(min(folds, len(outlined)))]
    for number, place in enumerate(places):
        parts[number % len(parts)].add(names[place])
    return parts


def check_regions(regions: Sequence[Region]) -> None:
    """Refuse regions that nothing can be learned from.

    Raises:
        GloVLMError: No glomerulus is outlined, a picture is none of RGB, an outline lies outside of
            its picture or has no area, or some regions alone state a scale.
    """
    if not any(len(region.polygons) for region in regions):
        raise GloVLMError(
            f"Expected at least one outlined glomerulus, found none in {len(regions)} regions: "
            "outline every glomerulus of each; regions without any may be among them."
        )
    for region in regions:
        check_picture(region.picture, f"region '{region.name}'")
        if region.mpp is not None and not (math.isfinite(region.mpp) and region.mpp > 0):
            raise GloVLMError(
                f"Expected micrometres per pixel above 0, found {region.mpp} of region "
                f"'{region.name}': correct it, or state none."
            )
        for number, diameter in enumerate(diameters(region)):
            if not diameter > 0:
                raise GloVLMError(
                    f"Outline {number + 1} of region '{region.name}' has no area: draw it again, "
                    "or take it out."
                )
        size = np.array([region.picture.shape[1], region.picture.shape[0]], np.float64)
        for number, one in enumerate(region.polygons):
            points = np.concatenate([polygon[0] for polygon in one])
            if (points.max(0) <= 0).any() or (points.min(0) >= size).any():
                low, high = points.min(0), points.max(0)
                raise GloVLMError(
                    f"Outline {number + 1} of region '{region.name}' spans x {low[0]:g} to "
                    f"{high[0]:g} and y {low[1]:g} to {high[1]:g}, outside of its picture of "
                    f"{size[0]:g} x {size[1]:g} pixels: give outlines in pixels of the picture."
                )
    stated = [region.mpp is not None for region in regions]
    if any(stated) and not all(stated):
        name = next(region.name for region in regions if region.mpp is None)
        raise GloVLMError(
            f"{sum(stated)} of {len(stated)} regions state micrometres per pixel, and region "
            f"'{name}' does not: state it for all of them, or for none."
        )


def _fit_head(
    encoder: TokenEncoder, regions: Sequence[Region], name: str, seed: int
) -> tuple[Head, float, float | None]:
    """Fitted head, pixels per working pixel, and micrometres per working pixel if stated."""
    head = make_head(name)
    pixel = head.cell(regions) / encoder.patch
    mpp = None if regions[0].mpp is None else pixel
    scale = pixel
    if mpp is not None:
        scale = pixel / float(np.median([region.mpp or 0.0 for region in regions]))
    head.fit(encoder, regions, [_scale_of(region, scale, mpp) for region in regions], seed)
    return head, scale, mpp


def _scale_of(region: Region, scale: float, mpp: float | None) -> float:
    return scale if mpp is None or region.mpp is None else mpp / region.mpp


def _working_diameters(
    regions: Sequence[Region], scale: float, mpp: float | None
) -> tuple[float, float, float]:
    """Least, median and largest diameter of outlined glomeruli, in working pixels."""
    lengths = [d / _scale_of(region, scale, mpp) for region in regions for d in diameters(region)]
    return min(lengths), float(np.median(lengths)), max(lengths)
