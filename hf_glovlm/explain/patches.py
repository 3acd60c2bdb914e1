"""Patch grid of a model's input: where each patch lies in the image, and blanking of patches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..inference.prediction import move_inputs
from ..model.outlines import choose_inside, cover_patches, split_channels
from ..model.prompts import tower_blocks

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

CELL = 16  # input pixels of a cell where a tower has no patches of its own
GLOMERULUS = 0.8  # of a crop's width and height, where it was cut at 1.25 times the glomerulus


@dataclass(frozen=True)
class View:
    """Patch grid: what a model sees of one image.

    Args:
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        box: Left, top, right and bottom of the grid in pixels of the image. It lies inside where
            the transform crops, and reaches beyond where it pads.
        size: Width and height of the image in pixels.
        patch: Height and width of a patch in pixels of the model's input.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    patch: tuple[int, int]

    def spread(self, values: Floats) -> Floats:
        """Lay values `[rows, columns]` over the image, bilinearly: `[height, width]`.

        What the model did not see is NaN.
        """
        left, top, right, bottom = self.box
        across, down = self.columns / (right - left), self.rows / (bottom - top)
        lie = (across, 0.0, -left * across, 0.0, down, -top * down)
        picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
        laid = picture.transform(
            self.size, Image.Transform.AFFINE, lie, Image.Resampling.BILINEAR, fillcolor=np.nan
        )
        return np.asarray(laid, np.float32)

    def cover(self, mask: Mask) -> Floats:
        """Share of each patch `[rows, columns]` that a mask `[height, width]` covers."""
        # Sums from the corner make the exact area of any rectangle.
        sums = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        left, top, right, bottom = self.box
        y = _between(sums, np.linspace(top, bottom, self.rows + 1), axis=0)
        area = np.diff(np.diff(_between(y, np.linspace(left, right, self.columns + 1), axis=1)).T).T
        cell = (right - left) / self.columns * (bottom - top) / self.rows
        return (area / cell).clip(0, 1).astype(np.float32)


def _between(sums: NDArray[np.float64], at: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Sums at edges that lie between pixels."""
    last = sums.shape[axis] - 1
    at = at.clip(0, last)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, last)
    shape = [-1, 1] if axis == 0 else [1, -1]
    part = (at - low).reshape(shape)
    between: NDArray[np.float64] = sums.take(low, axis) * (1 - part)
    return between + sums.take(high, axis) * part


def view_image(model: Any, processor: Any, image: Image.Image) -> tuple[View, dict[str, Tensor]]:
    """Prepare one image for a model, with the place of each patch.

    Args:
        model: A classifier of ours.
        processor: Its processor.
        image: RGB, or RGBA with an outline.

    Returns:
        The view and the model's inputs, on its device.
    """
    inputs = move_inputs(processor(images=[image], return_tensors="pt"), model)
    width, height = image.size
    if "spatial_shapes" in inputs:  # SigLIP 2 resizes to whole patches and crops nothing
        rows, columns = inputs["spatial_shapes"][0].tolist()
        side = int(processor.image_processor.patch_size)
        whole = (0.0, 0.0, float(width), float(height))
        return View(rows, columns, whole, image.size, (side, side)), inputs
    seen_height, seen_width = inputs["pixel_values"].shape[-2:]
    patch = _patch(model)
    rows, columns = seen_height // patch[0], seen_width // patch[1]
    resized = _resized(processor.image_processor, height, width)
    top, left = _corner(processor, resized, (seen_height, seen_width))
    y, x = height / resized[0], width / resized[1]
    box = (left * x, top * y, (left + columns * patch[1]) * x, (top + rows * patch[0]) * y)
    return View(rows, columns, box, image.size, patch), inputs


def has_patches(model: Any) -> bool:
    """Whether the vision tower is a plain transformer, whose tokens stay where its patches lie."""
    tower = model.glovlm.backbone.vision_model
    try:
        tower_blocks(tower)
    except ValueError:
        return False
    # The patches of a hierarchical tower (Swin) merge on the way.
    staged = getattr(tower.config, "depths", None) is not None
    return not staged and getattr(tower.config, "patch_size", None) is not None


def pooled_inside(model: Any, inputs: dict[str, Tensor], view: View) -> Tensor | None:
    """Weight of each patch in a mean over the inside of an outline.

    Args:
        model: A classifier of ours.
        inputs: Of one image.
        view: Of the image.

    Returns:
        `[rows * columns]`, 0 outside, with a sum of 1; `None` where the model does not pool inside.
    """
    if not getattr(model.config, "pools_inside", False):
        return None
    values, inside = split_channels(inputs["pixel_values"])
    if inside is None:
        inside = torch.ones_like(values[:, 0])
    weights = choose_inside(cover_patches(inside, (view.rows, view.columns), view.patch))[0]
    return weights / weights.sum()


def _patch(model: Any) -> tuple[int, int]:
    """Height and width of a patch in input pixels."""
    if not has_patches(model):
        return CELL, CELL
    size = model.glovlm.backbone.vision_model.config.patch_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _resized(transform: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image after the resizing of an image transform."""
    if not transform.do_resize:
        return height, width
    size = transform.size
    if not size["shortest_edge"]:
        return int(size["height"]), int(size["width"])
    shortest, short = int(size["shortest_edge"]), min(height, width)
    # As the transform rounds: the longer side is cut to whole pixels.
    return int(shortest * height / short), int(shortest * width / short)


def _corner(processor: Any, size: tuple[int, int], seen: tuple[int, int]) -> tuple[int, int]:
    """Top and left of what is seen in the resized image; negative where the transform pads."""
    margins = [of - part for of, part in zip(size, seen, strict=True)]
    if processor.torchvision_crop and min(margins) >= 0:
        top, left = (round(margin / 2) for margin in margins)
    else:
        top, left = (m // 2 if m >= 0 else -(-m // 2) for m in margins)
    return top, left


def mean_colour(inputs: dict[str, Tensor]) -> Tensor:
    """Mean colour of an image as the model sees it `[3]`, with which parts of it are blanked."""
    values = inputs["pixel_values"][0]
    if values.dim() == 3:
        return values[:3].mean((1, 2))
    seen = values[: int(inputs["spatial_shapes"][0].prod())]
    return seen.reshape(-1, 3).mean(0)  # flattened patches hold a pixel's channels together


def reveal(
    inputs: dict[str, Tensor], shown: Tensor, colour: Tensor, view: View, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Show some patches of an image, and blank the others; an outline stays where it is.

    Args:
        inputs: Of one image.
        shown: Which patches stay, boolean `[n, rows * columns]`.
        colour: What the others become `[3]`.
        view: Of the image.
        batch_size: Images at a time.

    Yields:
        The model's inputs, `n` images in all.
    """
    values, inside = split_channels(inputs["pixel_values"])
    rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    if values.dim() == 4:
        row = (torch.arange(values.shape[-2]) // view.patch[0]).clamp(max=view.rows - 1)
        column = (torch.arange(values.shape[-1]) // view.patch[1]).clamp(max=view.columns - 1)
    for part in shown.to(values.device).split(batch_size):
        n = len(part)
        if values.dim() == 4:
            grid = part.view(n, 1, view.rows, view.columns)
            blank = torch.where(grid[:, :, row][..., column], values, colour.view(1, 3, 1, 1))
            if inside is not None:
                blank = torch.cat([blank, inside.expand(n, 1, -1, -1)], dim=1)
        else:
            padded = part.new_ones(n, values.shape[1])
            padded[:, : part.shape[1]] = part
            blank = torch.where(
                padded.unsqueeze(-1), values, colour.repeat(values.shape[-1] // len(colour))
            )
        yield {
            "pixel_values": blank,
            **{name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in rest.items()},
        }


def central_ellipse(width: int, height: int) -> Mask:
    """Mask where a glomerulus lies in a crop of 1.25 times its extent, for want of its outline."""
    y, x = np.mgrid[:height, :width]
    across = (x + 0.5 - width / 2) / (GLOMERULUS * width / 2)
    down = (y + 0.5 - height / 2) / (GLOMERULUS * height / 2)
    inside: Mask = across**2 + down**2 <= 1
    return inside


def blank_image(image: Image.Image, mask: Mask) -> Image.Image:
    """Fill the part of an RGB image under a mask `[height, width]` with the image's mean colour."""
    pixels = np.asarray(image)
    mean = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    return Image.fromarray(np.where(mask[..., None], mean, pixels))
