"""Synthetic slides for tests: white glass, pink blobs of tissue, planted lesions.

`write_slide(path, width, height, *, mpp=0.5, lesions=0, lesion_side=224, blobs=3, seed=0, ...)`
writes a pyramidal TIFF and returns its facts: `lesions` (boxes x, y, width, height at level 0,
on the grid of `lesion_side`), `blobs`, `levels`, `size`, `mpp`. `slide_of(pixels)` is an open slide
of an array.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hf_glovlm.lab.slide_bench import write_slide
from hf_glovlm.lab.tissue_bench import ArrayReader
from hf_glovlm.slides.files.wsi import Slide

__all__ = ["slide_of", "write_slide"]


def slide_of(pixels: Any, mpp: float | None = None) -> Slide:
    """An open slide of one level that holds these pixels, `[height, width, 3]`."""
    return Slide(Path("drawn.tif"), ArrayReader(np.asarray(pixels, np.uint8)), mpp)
