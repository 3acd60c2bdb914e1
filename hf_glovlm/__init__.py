"""hf-glovlm: few-shot adaptation of image-text models to fine-grained glomerulus classes.

Importing it registers the model with transformers' Auto classes. Research use only, not for
diagnosis.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command `glovlm` brings in what a command needs when it needs it: its help is instant.
if Path(sys.argv[0] if sys.argv else "").name != "glovlm":
    from .adapters import METHODS, target_modules
    from .backbones import BACKBONES, load_backbone
    from .data import check_dataset, draw_episode, load_classes, load_dataset, load_episode
    from .errors import GloVLMError
    from .inference import FeatureCache, Predictions, embed_images, embed_prompts, predict
    from .metrics import compute_metrics, paired_differences
    from .model import (
        GloVLMConfig,
        GloVLMForImageClassification,
        GloVLMModel,
        GloVLMProcessor,
    )
    from .runs import run
    from .train_config import TrainConfig
    from .training import adapt, adapt_features

__all__ = [
    "BACKBONES",
    "METHODS",
    "FeatureCache",
    "GloVLMConfig",
    "GloVLMError",
    "GloVLMForImageClassification",
    "GloVLMModel",
    "GloVLMProcessor",
    "Predictions",
    "TrainConfig",
    "__version__",
    "adapt",
    "adapt_features",
    "check_dataset",
    "compute_metrics",
    "draw_episode",
    "embed_images",
    "embed_prompts",
    "load_backbone",
    "load_classes",
    "load_dataset",
    "load_episode",
    "paired_differences",
    "predict",
    "run",
    "target_modules",
]
