"""Model code that goes to the Hub: it loads on its own with `trust_remote_code=True`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_glovlm import GloVLMConfig
from .context import ContextGuide, GuidedPass
from .heads import ClassWeights, MLPHead, build_head
from .modeling_glovlm import (
    GloVLMForImageClassification,
    GloVLMImageClassifierOutput,
    GloVLMModel,
    GloVLMOutput,
)
from .processing_glovlm import GloVLMProcessor
from .prompts import AdapterModules, ConditionalPromptHead
from .towers import TowerPair

__all__ = [
    "AdapterModules",
    "ClassWeights",
    "ConditionalPromptHead",
    "ContextGuide",
    "GloVLMConfig",
    "GloVLMForImageClassification",
    "GloVLMImageClassifierOutput",
    "GloVLMModel",
    "GloVLMOutput",
    "GloVLMProcessor",
    "GuidedPass",
    "MLPHead",
    "TowerPair",
    "build_head",
]

AutoConfig.register("glovlm", GloVLMConfig)
AutoModel.register(GloVLMConfig, GloVLMModel)
AutoModelForZeroShotImageClassification.register(GloVLMConfig, GloVLMModel)
AutoModelForImageClassification.register(GloVLMConfig, GloVLMForImageClassification)
AutoProcessor.register(GloVLMConfig, GloVLMProcessor)

# A saved folder takes these files along.
GloVLMConfig.register_for_auto_class("AutoConfig")
GloVLMModel.register_for_auto_class("AutoModel")
GloVLMForImageClassification.register_for_auto_class("AutoModelForImageClassification")
GloVLMProcessor.register_for_auto_class("AutoProcessor")
