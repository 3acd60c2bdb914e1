"""Adaptation methods, grouped by what they touch: one table, one contract, one result class."""

# Importing lists the methods, in the order of the table.
from . import free, features, text, inserts, weights, context  # noqa: F401, I001
from .contract import (
    METHODS,
    FeatureMethod,
    Fitted,
    Fold,
    HeadMethod,
    Method,
    Recipe,
    StepState,
    Support,
    TowerMethod,
    Tuning,
    class_means,
    get_method,
    give_joint_space,
    prototype_head,
)
from .weights import target_modules, tower_layers

__all__ = [
    "METHODS",
    "FeatureMethod",
    "Fitted",
    "Fold",
    "HeadMethod",
    "Method",
    "Recipe",
    "StepState",
    "Support",
    "TowerMethod",
    "Tuning",
    "class_means",
    "get_method",
    "give_joint_space",
    "prototype_head",
    "target_modules",
    "tower_layers",
]
