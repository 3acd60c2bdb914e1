"""Training: `adapt` joins backbone, method and support; the Accelerate loop and its losses."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .adaptation import Adapted, AdaptedFeatures, adapt, adapt_features
    from .config import AdaptConfig

__all__ = ["AdaptConfig", "Adapted", "AdaptedFeatures", "adapt", "adapt_features"]

__getattr__ = lazy_names(
    __name__,
    {
        "AdaptConfig": "config",
        "Adapted": "adaptation",
        "AdaptedFeatures": "adaptation",
        "adapt": "adaptation",
        "adapt_features": "adaptation",
    },
)
