"""Guard against images unlike the support: a distance to it, and its limit."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class SupportGuard(nn.Module):
    """Mahalanobis distance of an image to the nearest class mean of the support (arXiv 1807.03888).

    The covariance within the classes is shrunk towards a multiple of the identity, since the
    support is small. No single image is kept: class means, principal directions and shrinkage.

    Args:
        width: Of the vectors that are compared.
        classes: Number of class means.
        rank: Number of principal directions.
        variance: Variance of every direction that is not kept, after shrinkage.
        threshold: The limit of the distance.
        images: Number of support images that the limit comes from.
        groups: Number of patients (cases, slides) that they are of.
    """

    means: Tensor  # [classes, width]
    directions: Tensor  # [rank, width], orthonormal
    shrinkage: Tensor  # [rank], what whitening takes away along each

    def __init__(
        self,
        width: int,
        classes: int,
        rank: int,
        variance: float,
        threshold: float,
        images: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.variance, self.threshold = variance, threshold
        self.images, self.groups = images, groups
        self.register_buffer("means", torch.full((classes, width), torch.nan))
        self.register_buffer("directions", torch.zeros(rank, width))
        self.register_buffer("shrinkage", torch.zeros(rank))

    def forward(self, vectors: Tensor) -> Tensor:
        """Distances of images, as multiples of the limit: an image above 1 is unlike the support.

        Args:
            vectors: `[n, width]` of `GloVLMModel.pool_images_and_middle`, the second where it has
                numbers.

        Returns:
            `[n]`, 0 or more; not a number where the guard was never fitted.
        """
        classes, width = self.means.shape
        vectors = self._whiten(nn.functional.normalize(vectors.float(), dim=-1))
        means = self._whiten(self.means.float())
        apart = [(vectors - means[k]).norm(dim=-1) for k in range(classes)]
        return torch.stack(apart).amin(0).div((self.variance * width) ** 0.5 * self.threshold)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments, for the config."""
        classes, width = self.means.shape
        return {
            "width": width,
            "classes": classes,
            "rank": len(self.directions),
            "variance": self.variance,
            "threshold": self.threshold,
            "images": self.images,
            "groups": self.groups,
        }

    def reset(self) -> None:
        """No support: every distance is not a number."""
        init.constant_(self.means, torch.nan)
        init.zeros_(self.directions)
        init.zeros_(self.shrinkage)

    def _whiten(self, vectors: Tensor) -> Tensor:
        directions = self.directions.float()
        return vectors - (vectors @ directions.T * self.shrinkage.float()) @ directions
