"""Synthetic slides for tests: white glass, pink blobs of tissue, planted lesions.

`write_slide(path, width, height, *, mpp=0.5, lesions=0, lesion_side=224, blobs=3, seed=0, ...)`
writes a pyramidal TIFF and returns its facts: `lesions` (boxes x, y, width, height at level 0,
on the grid of `lesion_side`), `blobs`, `levels`, `size`, `mpp`.
"""

from hf_glovlm.lab.slide_bench import write_slide

__all__ = ["write_slide"]
