"""Benchmark of the feature cache: encoding with an empty one and from it."""

import tempfile
from pathlib import Path

import numpy as np

from ...backbones import load_backbone
from ...errors import GloVLMError
from ...inference import FeatureCache, embed_images
from .timing import Row, as_row, shortest
from .towers import synthetic_images


def bench_cache(
    *, backbone: str = "mini", n_patients: int = 8, per_patient: int = 10, repeats: int = 3
) -> list[Row]:
    """Benchmark of the feature cache: encoding synthetic images with an empty cache, then from it.

    Args:
        backbone: As `--backbone` takes it.
        n_patients: Synthetic patients.
        per_patient: Images of each.
        repeats: Timings of each kind, of which the shortest counts.

    Returns:
        Two rows; the warm one's `ratio` is the cold time over the warm one.

    Raises:
        GloVLMError: The features of the cache are not those that were computed.
    """
    model, processor = load_backbone(backbone)
    with tempfile.TemporaryDirectory() as folder:
        images = synthetic_images(Path(folder), n_patients, per_patient)
        caches = [FeatureCache(Path(folder) / f"cache-{i}") for i in range(repeats + 1)]
        cold = embed_images(model, processor, images, cache=caches[0])  # and first-call costs
        empty = iter(caches[1:])
        slow = shortest(lambda: embed_images(model, processor, images, cache=next(empty)), repeats)
        fast = shortest(lambda: embed_images(model, processor, images, cache=caches[0]), repeats)
        warm = embed_images(model, processor, images, cache=caches[0])
    if not np.array_equal(cold, warm):
        raise GloVLMError(
            "The cached features differ from the computed ones: report this as a bug."
        )
    what = f"{len(images)} synthetic images, {model.config.backbone_name or backbone}"
    return [
        as_row("cache.cold", slow, "s", None, f"{what}: decoded, encoded and stored"),
        as_row("cache.warm", fast, "s", slow / fast, f"{what}: looked up; ratio: times faster"),
    ]
