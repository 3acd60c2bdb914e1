"""Slide labels by multiple-instance learning: feature files and a table in, a measured run out.

`train_mil` does for bags of tiles what `runs.run` does for images; `apply_mil` uses what it leaves.
"""

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
