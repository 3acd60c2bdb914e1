"""Whole-slide images: encoding, pooling, counting, reports."""

from .encoding import Encoded, Outcome, encode_slide, encode_slides, load_encoder

__all__ = [
    "Encoded",
    "Outcome",
    "encode_slide",
    "encode_slides",
    "load_encoder",
]
