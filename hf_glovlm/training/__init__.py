"""Training: `adapt` joins backbone, method and support; the Accelerate loop and its losses."""

from .adaptation import Adapted, AdaptedFeatures, adapt, adapt_features
from .config import AdaptConfig

__all__ = ["AdaptConfig", "Adapted", "AdaptedFeatures", "adapt", "adapt_features"]
