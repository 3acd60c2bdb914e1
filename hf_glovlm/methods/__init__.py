"""Few-shot adaptation methods: one table, one contract, one result class."""

# Importing lists the methods, in the order of the table.
from . import closed_form, heads, context_tokens, layers, fine_tuning, convlm  # noqa: F401, I001
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
    get_method,
    give_joint_space,
)
from .fine_tuning import target_modules, tower_layers

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
    "get_method",
    "give_joint_space",
    "target_modules",
    "tower_layers",
]
