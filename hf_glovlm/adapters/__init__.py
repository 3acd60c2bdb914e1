"""Adaptation methods, grouped by what they touch: one table, one contract, one result class."""

from . import features, text, weights  # noqa: F401 - importing lists the methods
from .contract import (
    METHODS,
    FeatureMethod,
    HeadMethod,
    Method,
    Recipe,
    Support,
    TowerMethod,
    Tuning,
    get_method,
    give_joint_space,
)
from .features import prototype_head

__all__ = [
    "METHODS",
    "FeatureMethod",
    "HeadMethod",
    "Method",
    "Recipe",
    "Support",
    "TowerMethod",
    "Tuning",
    "get_method",
    "give_joint_space",
    "prototype_head",
]
