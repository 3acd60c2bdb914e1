"""Whole slides: encoded, pooled, counted, written down."""

from .benchmark import bench_slide, write_slide
from .encoding import Encoded, Outcome, encode_slide, encode_slides, load_encoder

__all__ = [
    "Encoded",
    "Outcome",
    "bench_slide",
    "encode_slide",
    "encode_slides",
    "load_encoder",
    "write_slide",
]
