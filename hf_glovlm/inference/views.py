"""Augmented views: random crops, flips, quarter turns and stain jitter of an image.

A view is decided by the image's content, the seed and its number alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from PIL import Image

# Part of every key of a cached view: raise it when a view of the same number changes.
VIEWS_VERSION = 1
JITTER = 0.05  # of the amount of each stain, as a fraction
# Optical densities of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston
# 2001), each of length one. Other stains are mixtures of the three.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])


def view_key(content: bytes, seed: int, number: int) -> bytes:
    """Key of one view of an image, 16 bytes.

    Args:
        content: Hash of the image's file.
        seed: Of the views.
        number: Of the view, from 0.
    """
    about = f"view {VIEWS_VERSION} {JITTER} {seed} {number} ".encode()
    return xxhash.xxh3_128_digest(about + content)


def draw_view(image: Image.Image, key: bytes) -> Image.Image:
    """View of an image: a crop of at least half its area, flipped, turned, its stains jittered.

    Args:
        image: Mode RGB, or RGBA with an outline, which is cut and turned along.
        key: Decides everything random; see `view_key`.
    """
    generator = np.random.default_rng(int.from_bytes(key, "big"))
    view = reframe(image, generator.random(5).tolist())
    jittered = jitter_stains(view.convert("RGB"), 1 + JITTER * generator.uniform(-1, 1, 3))
    if view.mode == "RGBA":
        jittered.putalpha(view.getchannel("A"))
        jittered.info = {**view.info}
    return jittered


def reframe(image: Image.Image, numbers: Sequence[float]) -> Image.Image:
    """Crop of at least half the area at the image's aspect, flipped or not, and turned.

    Args:
        image: Of any size.
        numbers: Area, left, top, flip and quarter turns, each from 0 to 1.
    """
    area, left, top, flip, turn = numbers
    side = math.sqrt(0.5 + 0.5 * area)
    width, height = round(image.width * side), round(image.height * side)
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    image = image.crop((x, y, x + width, y + height))
    if flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(90 * int(turn * 4), expand=True)  # quarter turns are not resampled


def jitter_stains(image: Image.Image, amounts: Any) -> Image.Image:
    """Multiply the amounts of haematoxylin, eosin and DAB in each pixel; glass stays white.

    Args:
        image: Mode RGB.
        amounts: `[3]`, 1: unchanged.
    """
    density = -np.log((np.asarray(image, dtype=np.float32) + 1) / 256)
    # Unmixed, multiplied, mixed again: one matrix.
    change = np.linalg.inv(STAINS) @ np.diag(amounts) @ STAINS
    pixels = 256 * np.exp(-density @ change.astype(np.float32)) - 1
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
