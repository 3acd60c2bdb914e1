"""Outline of a glomerulus in its picture: what a model sees of the picture, and what it pools."""

from typing import Any

import torch
from torch import Tensor, nn

# What a model sees of a picture: all of it; a circle in its middle, on grey, and the mean of the
# patch tokens in the circle; the inside of the outline on grey; the mean of the patch tokens
# inside; the last two together.
OUTLINES = ("ignore", "centre", "blank", "pool", "blank+pool")
KEY = "outline"  # in a picture's `info`, and in a PNG's text: what its alpha channel goes around
FILL = 200  # grey outside of the outline, 0 to 255: near the mean of tissue in common stains
CENTRE = 0.8  # diameter of the circle over the shorter side: a crop has 1.25 times the extent
INSIDE = 0.5  # a patch belongs to the inside if more than this part of it lies there


def blanks(outline: str) -> bool:
    """Whether the outside of an outline is filled with grey."""
    return outline in ("centre", "blank", "blank+pool")


def pools(outline: str) -> bool:
    """Whether the patch tokens inside an outline alone are pooled."""
    return outline in ("centre", "pool", "blank+pool")


def draw_centre(image: Any) -> Any:
    """Picture with a circle in its middle for an outline, in place of any other.

    Args:
        image: A Pillow image; returned as it is if its outline is that circle already.

    Returns:
        Pillow image of mode RGBA, `centre` under `KEY` in its `info`.
    """
    if image.info.get(KEY) == "centre" and image.mode == "RGBA":
        return image
    picture = image.convert("RGB")
    width, height = picture.size
    across = torch.arange(width) + 0.5 - width / 2
    down = torch.arange(height) + 0.5 - height / 2
    inside = across**2 + down.unsqueeze(1) ** 2 <= (CENTRE * min(width, height) / 2) ** 2
    alpha = picture.convert("L")
    alpha.frombytes((inside.to(torch.uint8) * 255).numpy().tobytes())
    picture.putalpha(alpha)
    picture.info[KEY] = "centre"
    return picture


def take_apart(image: Any, outline: str) -> tuple[Any, Any]:
    """What a model sees of a picture, and where the inside lies.

    Args:
        image: A Pillow image; an alpha channel is its outline. Its hidden colours count: of a crop
            they are the tissue around.
        outline: One of OUTLINES.

    Returns:
        Pillow images of mode RGB (the outside filled where `outline` blanks) and L (255 inside);
        the latter `None` without an outline.
    """
    if outline == "centre":
        image = draw_centre(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha, picture = image.getchannel("A"), image.convert("RGB")
    low, high = alpha.getextrema()
    if low == 255 or high == 0:  # all is inside, or nothing: no outline
        return picture, None
    if blanks(outline):
        picture.paste((FILL, FILL, FILL), mask=alpha.point([255 - value for value in range(256)]))
    return picture, alpha


def split_channels(pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Colours of pictures, and how much of each pixel lies inside of the outline.

    Args:
        pixel_values: `[n, 3, height, width]`, or `[n, 4, height, width]` with an outline.

    Returns:
        `[n, 3, height, width]` and `[n, height, width]` or `None`; other tensors as they are.
    """
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 4:
        return pixel_values, None
    return pixel_values[:, :3], pixel_values[:, 3]


def cover_patches(inside: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Part of each patch that lies inside of an outline.

    Args:
        inside: `[n, height, width]`, 0 to 1.
        grid: Rows and columns of patches.
        patch: Height and width of a patch in pixels; what is left over at the right and at the
            bottom is in no patch.

    Returns:
        `[n, rows * columns]`, 0 to 1, row by row.
    """
    seen = inside[:, : grid[0] * patch[0], : grid[1] * patch[1]].unsqueeze(1)
    return nn.functional.avg_pool2d(seen, patch).flatten(1)


def choose_inside(coverage: Tensor) -> Tensor:
    """Weights of patches for a mean over the inside.

    A patch counts if more than half of it lies inside. Of an outline too small or too thin for that
    every patch counts by its part inside; without any all count.

    Args:
        coverage: `[n, patches]`, 0 to 1.

    Returns:
        `[n, patches]`, 0 or more, above 0 somewhere in each row.
    """
    weights = (coverage > INSIDE).to(coverage.dtype)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, coverage.clamp(min=0))
    nothing = weights.sum(1, keepdim=True) <= 0
    return torch.where(nothing, torch.ones_like(weights), weights)


def mean_inside(tokens: Tensor, coverage: Tensor) -> Tensor:
    """Mean of the patch tokens inside of an outline (masked average pooling).

    Args:
        tokens: `[n, patches, width]`.
        coverage: `[n, patches]`, see `cover_patches`.

    Returns:
        `[n, width]`.
    """
    weights = choose_inside(coverage).to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1)
