"""Inference: features, class probabilities, and descriptions of predictions in words."""

from .cache import CacheEntry, FeatureCache, MemoryCache
from .engines import Engine, open_engine
from .frozen import encoder_key
from .prediction import (
    Predictions,
    embed_images,
    evaluation_mode,
    exact_inference,
    load_classifier,
    predict,
    resolve_device,
)
from .texts import embed_prompts

__all__ = [
    "CacheEntry",
    "Engine",
    "FeatureCache",
    "MemoryCache",
    "Predictions",
    "embed_images",
    "embed_prompts",
    "encoder_key",
    "evaluation_mode",
    "exact_inference",
    "load_classifier",
    "open_engine",
    "predict",
    "resolve_device",
]
