"""Training: `adapt` joins backbone, method and support; the Accelerate loop and its losses."""

from .adaptation import Adapted, AdaptedFeatures, adapt, adapt_features

__all__ = ["Adapted", "AdaptedFeatures", "adapt", "adapt_features"]
