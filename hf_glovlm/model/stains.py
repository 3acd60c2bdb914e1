"""Stain centres: the mean feature of each stain, which is taken away from the image's own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class StainCentres(nn.Module):
    """Centring within stains: unit features less the mean of their stain, of length one again.

    `f' = unit(unit(f) - mean of unit(g) over images g of the stain)`: what all images of a stain
    share does not reach the head. After SimpleShot's CL2N (arXiv 1911.04623), with a mean for each
    stain, and of unit features, so that no image counts more than another.

    Args:
        width: Of the image features.
        stains: Names of the stains, in the order of the centres.
        images: Number of images behind each centre.
    """

    centres: Tensor  # [stains, width]

    def __init__(self, width: int, stains: list[str], images: list[int]) -> None:
        super().__init__()
        if not stains or len(stains) != len(images):
            raise ValueError(
                f"Each stain needs a centre: found {len(stains)} stains, {len(images)} counts."
            )
        self.stains, self.images = list(stains), list(images)
        self.register_buffer("centres", torch.full((len(stains), width), torch.nan))

    def forward(self, features: Tensor, stain_ids: Tensor | None = None) -> Tensor:
        """Centre image features.

        Args:
            features: `[n, width]`, not normalised.
            stain_ids: `[n]`, places in `stains`; -1 is another stain, or an unknown one: the mean
                of the centres stands in for its own. By default of all images.

        Returns:
            `[n, width]` of length one.
        """
        unit = nn.functional.normalize(features, dim=-1)
        centres = self.centres.to(unit.dtype)
        centres = torch.cat([centres, centres.mean(0, keepdim=True)])  # which -1 takes
        away = centres[-1:] if stain_ids is None else centres[stain_ids]
        return nn.functional.normalize(unit - away, dim=-1)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments, for the config."""
        width = self.centres.shape[1]
        return {"width": width, "stains": list(self.stains), "images": list(self.images)}

    def reset(self) -> None:
        """No centre: every feature is not a number."""
        init.constant_(self.centres, torch.nan)
