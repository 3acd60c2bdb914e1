"""hf-glovlm: few-shot adaptation of image-text models to fine-grained glomerulus classes.

Importing it registers the model with transformers' Auto classes. Research use only, not for
diagnosis.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command `glovlm` brings in what a command needs when it needs it: its help is instant.
if Path(sys.argv[0] if sys.argv else "").name != "glovlm":
    from . import explain
    from .backbones import BACKBONES, load_backbone
    from .data import (
        check_dataset,
        draw_episode,
        load_classes,
        load_dataset,
        load_episode,
        open_image,
    )
    from .errors import GloVLMError
    from .inference import (
        FeatureCache,
        Predictions,
        embed_images,
        embed_prompts,
        load_classifier,
        predict,
    )
    from .inference.cache import MemoryCache
    from .inference.sentences import (
        borrow,
        describe_classes,
        describe_image_scale,
        describe_limits,
        give_answers,
        reword,
    )
    from .lab.phantoms import render_cohort
    from .methods import METHODS, target_modules
    from .metrics import compute_metrics, paired_differences
    from .model import (
        GloVLMConfig,
        GloVLMForImageClassification,
        GloVLMModel,
        GloVLMProcessor,
    )
    from .runs import run
    from .runs.config import TrainConfig
    from .runs.cross_validation import frozen_methods, leave_patients_out
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
    "MemoryCache",
    "Predictions",
    "TrainConfig",
    "__version__",
    "adapt",
    "adapt_features",
    "borrow",
    "check_dataset",
    "compute_metrics",
    "describe_classes",
    "describe_image_scale",
    "describe_limits",
    "draw_episode",
    "embed_images",
    "embed_prompts",
    "explain",
    "frozen_methods",
    "give_answers",
    "leave_patients_out",
    "load_backbone",
    "load_classes",
    "load_classifier",
    "load_dataset",
    "load_episode",
    "open_image",
    "paired_differences",
    "predict",
    "render_cohort",
    "reword",
    "run",
    "target_modules",
]
