"""Heat maps for any backbone: what a classifier looks at, and how far a map can be trusted."""

from .faithfulness import (
    Curves,
    compare_with_shuffled,
    evaluate_maps,
    heat_inside,
    measure_faithfulness,
    measure_maps,
    shuffle_weights,
    summarise_maps,
)
from .figures import COLORMAP, explain_files, load_masks, overlay, save_figure
from .maps import METHODS, HeatMap, MapMethod, Neighbours, explain, nearest_support
from .view import View

__all__ = [
    "COLORMAP",
    "METHODS",
    "Curves",
    "HeatMap",
    "MapMethod",
    "Neighbours",
    "View",
    "compare_with_shuffled",
    "evaluate_maps",
    "explain",
    "explain_files",
    "heat_inside",
    "load_masks",
    "measure_faithfulness",
    "measure_maps",
    "nearest_support",
    "overlay",
    "save_figure",
    "shuffle_weights",
    "summarise_maps",
]
