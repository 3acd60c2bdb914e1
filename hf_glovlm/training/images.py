"""Images of a task, encoded: what a method on features learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..data.stains import read_stains
from ..inference import FeatureCache, embed_images, embed_prompts
from ..inference.stains import find_centres, fit_centres
from ..model.stains import StainCentres
from .config import AdaptConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import ClassInfo


@dataclass(frozen=True)
class TaskImages:
    """Images of a task, and the model that encodes them.

    Attributes:
        model: A `GloVLMModel`.
        processor: Its processor.
        classes: Names and prompts in label order.
        support: Labelled rows.
        labels: Class number of each.
        validation: Further labelled rows.
        query: Images that a transductive method takes.
        config: How to train.
        device: Where to compute.
        cache: Keeps pooled vectors.
        centres: What is taken away from the features of each stain; `None` takes nothing away.
    """

    model: Any
    processor: Any
    classes: Sequence["ClassInfo"]
    support: "Dataset"
    labels: Tensor
    validation: "Dataset | None"
    query: "Dataset | None"
    config: AdaptConfig
    device: torch.device
    cache: FeatureCache | None
    centres: StainCentres | None = None

    def embed(self, images: "Dataset", project: bool, views: int = 0) -> Tensor:
        """Image features, each image, or each of its views, encoded once."""
        features = embed_images(
            self.model, self.processor, images, device=self.device, cache=self.cache,
            project=project, views=views, seed=self.config.seed,
        )  # fmt: skip
        if self.centres is None:
            return torch.from_numpy(features)
        ids = find_centres(self.centres, read_stains(images)).repeat_interleave(max(views, 1))
        return cast(Tensor, self.centres(torch.from_numpy(features), ids))

    def centred(self, among: Sequence["Dataset"]) -> tuple["TaskImages", list[str]]:
        """These images with features centred by the stains' means of unlabelled ones."""
        parts = [self.embed(rows, True).numpy() for rows in among]
        stains = [stain for rows in among for stain in read_stains(rows)]
        centres, notes = fit_centres(np.concatenate(parts), stains)
        return replace(self, centres=centres), notes

    def embed_views(self, project: bool) -> Tensor | None:
        """Features of the support's augmented views `[n, V, dim]`, if there are to be any."""
        count = self.config.views
        if count < 2 or not len(self.support):
            return None
        return self.embed(self.support, project, count).unflatten(0, (-1, count))

    def embed_texts(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Class prototypes `[K, dim]`."""
        return torch.from_numpy(embed_prompts(self.model, self.processor, prompts))
