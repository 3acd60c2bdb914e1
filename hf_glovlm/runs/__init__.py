"""Runs: one adaptation from a folder of images to a measured model, and studies of many."""

from .config import TrainConfig
from .results import RunResult
from .workflow import OWN_FILES, measure, run

__all__ = ["OWN_FILES", "RunResult", "TrainConfig", "measure", "run"]
