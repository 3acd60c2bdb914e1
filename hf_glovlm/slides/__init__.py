"""Whole-slide images: encoding, pooling, counting, reports."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .encoding import Encoded, Outcome, encode_slide, encode_slides, load_encoder

__all__ = ["Encoded", "Outcome", "encode_slide", "encode_slides", "load_encoder"]

__getattr__ = lazy_names(
    __name__,
    {
        "Encoded": "encoding",
        "Outcome": "encoding",
        "encode_slide": "encoding",
        "encode_slides": "encoding",
        "load_encoder": "encoding",
    },
)
