"""Inference: images and prompts in; features, probabilities and sentences about them out."""

from .cache import CacheEntry, FeatureCache, MemoryCache, encoder_key
from .prediction import (
    Predictions,
    embed_images,
    embed_prompts,
    evaluating,
    load_classifier,
    predict,
    resolve_device,
    still,
)

__all__ = [
    "CacheEntry",
    "FeatureCache",
    "MemoryCache",
    "Predictions",
    "embed_images",
    "embed_prompts",
    "encoder_key",
    "evaluating",
    "load_classifier",
    "predict",
    "resolve_device",
    "still",
]
