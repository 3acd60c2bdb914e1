"""Heat maps for any backbone, and how faithful they are to the classifier."""

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
from .figures import COLORMAP, explain_files, load_masks, overlay, save_figure, show_outline
from .maps import (
    HEAT_MAPS,
    HeatMap,
    MapMethod,
    Neighbours,
    explain,
    nearest_support,
    register_map,
)
from .patches import View

__all__ = [
    "COLORMAP",
    "HEAT_MAPS",
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
    "register_map",
    "save_figure",
    "show_outline",
    "shuffle_weights",
    "summarise_maps",
]
