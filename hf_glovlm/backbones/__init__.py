"""Pretrained backbones: their table, loading and conversion."""

from .loading import DUAL_ENCODERS, MINI, convert_backbone, describe_weights, load_backbone
from .table import (
    BACKBONES,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NOT_VERIFIED,
    Backbone,
    known_rows,
    pretraining_notes,
    unknown_pretraining_notes,
)

__all__ = [
    "BACKBONES",
    "CLIP_MEAN",
    "CLIP_STD",
    "DUAL_ENCODERS",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MINI",
    "NOT_VERIFIED",
    "Backbone",
    "convert_backbone",
    "describe_weights",
    "known_rows",
    "load_backbone",
    "pretraining_notes",
    "unknown_pretraining_notes",
]
