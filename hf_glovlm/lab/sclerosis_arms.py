"""Labelled glomeruli of a plan, and classifiers that read every slide without having seen it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..errors import GloVLMError
from .counting import draw_support
from .outline_study import backbone_name, embed_outlined
from .outlined_crops import Glomerulus, read_glomeruli, render_crops
from .slide_percentages import Learned, Reading, learn, read

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NEEDED = (
    "purpose", "backbone", "data", "target", "seed", "bootstrap_seed", "resamples", "draws",
    "margin", "outlines", "methods", "goals",
)  # fmt: skip
REST = "other"  # every class but the one in question


class Labelled:
    """Labelled outlined glomeruli of a plan, in two classes, and the slides that are left out.

    Args:
        plan: Content of the plan's file.
        root: Folder that its paths are relative to.

    Attributes:
        glomeruli: As they are drawn.
        labels: 1 for the class in question, `[n]`.
        groups: Slide or patient of each; a support is spread over these.
        slides: What is left out in turn: the group, or the pool of patients that it is in.
        tested: Slides with objects enough, sorted.

    Raises:
        GloVLMError: The plan lacks something, or what `read_glomeruli` raises.
    """

    def __init__(self, plan: Mapping[str, Any], root: Path) -> None:
        absent = [name for name in _NEEDED if name not in plan]
        if absent or not {"recipe", "candidates"} & {*plan}:
            needed = ", ".join(absent) or "a recipe, or candidates to choose it from"
            raise GloVLMError(f"The plan lacks {needed}; see experiments/sclerosis.yaml.")
        self.plan, self.root = plan, root
        self.glomeruli = read_glomeruli(plan["data"], root)
        names = {item.label for item in self.glomeruli}
        if plan["target"] not in names:
            raise GloVLMError(f"Expected the class '{plan['target']}', found {sorted(names)}.")
        self.labels = np.array([g.label == plan["target"] for g in self.glomeruli], np.int64)
        self.groups = [item.group for item in self.glomeruli]
        self.slides = np.array(pool_groups(self.groups, plan.get("pools")), object)
        sizes = Counter(self.slides.tolist())
        least = plan["draws"]["least_objects"]
        self.tested = sorted(slide for slide, n in sizes.items() if n >= least)
        self._features: dict[str, NDArray[np.float32]] = {}
        self._learned: dict[tuple[str, str, str, int], Learned] = {}

    @cached_property
    def backbone(self) -> tuple[Any, Any]:
        """Model and processor."""
        return load_backbone(backbone_name(self.plan["backbone"], self.root))

    def embed(self, glomeruli: Sequence[Glomerulus], outline: str) -> NDArray[np.float32]:
        """Features `[n, dim]` of glomeruli as outlined squares, through the cache."""
        from datasets import ClassLabel

        images = render_crops(glomeruli, margin=self.plan["margin"])
        images = images.add_column("label", [0] * len(images))
        images = images.cast_column("label", ClassLabel(names=[REST, self.plan["target"]]))
        return embed_outlined(self.backbone, images, outline)

    def features(self, outline: str) -> NDArray[np.float32]:
        """Features of the labelled glomeruli."""
        if outline not in self._features:
            self._features[outline] = self.embed(self.glomeruli, outline)
        return self._features[outline]

    def support(self, slide: str, draw: int) -> Ints:
        """Rows of one label draw, from other slides than the one that is tested."""
        about = self.plan["draws"]
        return draw_support(
            self.labels,
            self.groups,
            np.asarray(self.slides == slide, bool),
            [REST, self.plan["target"]],
            shots=about["shots"],
            seed=about["seed"],
            draw=draw,
        )

    def learn(self, outline: str, method: str, slide: str, draw: int) -> Learned:
        """Classifier of one label draw, from human outlines; fitted once."""
        key = outline, method, slide, draw
        if key not in self._learned:
            rows, features = self.support(slide, draw), self.features(outline)
            seed = self.plan["seed"]
            self._learned[key] = learn(method, features, self.labels, self.groups, rows, 1, seed)
        return self._learned[key]

    @property
    def truth(self) -> Floats:
        """Per cent of the class among the labelled glomeruli of each tested slide."""
        return np.array([100 * self.labels[self.slides == slide].mean() for slide in self.tested])


def pool_groups(groups: Sequence[str], about: Mapping[str, int] | None) -> list[str]:
    """Pool of each row: groups shuffled and dealt in turn; the group itself where there is no plan.

    Args:
        groups: Patient or slide of each row.
        about: `count` of the pools and `seed`.
    """
    if about is None:
        return list(groups)
    names = np.array(sorted(set(groups)), object)
    np.random.default_rng(about["seed"]).shuffle(names)
    pool = {name: f"pool {i % about['count'] + 1:02d}" for i, name in enumerate(names.tolist())}
    return [pool[group] for group in groups]


@dataclass(frozen=True)
class Arm:
    """What the model sees of the outline, and the method that learns from it."""

    outline: str
    method: str


Readings = list[list[Reading | None]]


def read_arm(
    study: Labelled, arm: Arm, queries: Mapping[str, Callable[[str, int], NDArray[Any]]]
) -> dict[str, Readings]:
    """Read every tested slide by every draw's classifier.

    Args:
        study: The labelled glomeruli.
        arm: What is learned, from human outlines.
        queries: By name the features `[m, dim]` of a slide's objects, by its name and the draw.

    Returns:
        `[slides][draws]` by name of the query.
    """
    readings: dict[str, Readings] = {name: [] for name in queries}
    for slide in study.tested:
        learned = [
            study.learn(arm.outline, arm.method, slide, draw)
            for draw in range(study.plan["draws"]["count"])
        ]
        for name, features in queries.items():
            readings[name].append(
                [read(each, features(slide, draw), 1) for draw, each in enumerate(learned)]
            )
    return readings
