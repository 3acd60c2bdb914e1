"""Multiple-instance learning: slide labels from bags of tile features.

`train_mil` does for bags of tiles what `runs.run` does for images; `apply_mil` uses its model.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_names

if TYPE_CHECKING:
    from .classifier import SlideClassifier, SlidePrediction, apply_mil, load_aggregator
    from .config import MilConfig
    from .training import train_mil

__all__ = [
    "MilConfig",
    "SlideClassifier",
    "SlidePrediction",
    "apply_mil",
    "load_aggregator",
    "train_mil",
]

__getattr__ = lazy_names(
    __name__,
    {
        "MilConfig": "config",
        "SlideClassifier": "classifier",
        "SlidePrediction": "classifier",
        "apply_mil": "classifier",
        "load_aggregator": "classifier",
        "train_mil": "training",
    },
)
