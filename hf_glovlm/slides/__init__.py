"""Whole slides: encoded, pooled, counted, written down."""

from .encoding import Encoded, Outcome, encode_slide, encode_slides, load_encoder

__all__ = [
    "Encoded",
    "Outcome",
    "encode_slide",
    "encode_slides",
    "load_encoder",
]
