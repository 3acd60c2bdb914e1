"""Runs: one adaptation from a folder of images to a measured model, and studies of many."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import TrainConfig
    from .evaluation import measure
    from .results import RunResult
    from .workflow import OWN_FILES, run

__all__ = ["OWN_FILES", "RunResult", "TrainConfig", "measure", "run"]

__getattr__ = lazy_names(
    __name__,
    {
        "OWN_FILES": "workflow",
        "RunResult": "results",
        "TrainConfig": "config",
        "measure": "evaluation",
        "run": "workflow",
    },
)
