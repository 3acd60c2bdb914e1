"""Model code that goes to the Hub: it loads on its own with `trust_remote_code=True`."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    ImageClassificationPipeline,
    ZeroShotImageClassificationPipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_glovlm import GloVLMConfig
from .context import ContextGuide, GuidedPass
from .heads import ClassWeights, MLPHead, build_head
from .modeling_glovlm import (
    GloVLMForImageClassification,
    GloVLMImageClassifierOutput,
    GloVLMModel,
    GloVLMOutput,
)
from .pipeline_glovlm import (
    GloVLMImageClassificationPipeline,
    GloVLMZeroShotImageClassificationPipeline,
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
    "GloVLMImageClassificationPipeline",
    "GloVLMImageClassifierOutput",
    "GloVLMModel",
    "GloVLMOutput",
    "GloVLMProcessor",
    "GloVLMZeroShotImageClassificationPipeline",
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


class _PipelineOf:
    """Pipeline class of a task: ours for models that see outlines, else transformers' own.

    `pipeline` looks a task's class up before it knows the model, and calls it with the model.
    """

    def __init__(self, others: Any, own: Any) -> None:
        self.others, self.own = others, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.others, name)  # what is loaded, beside the model

    def __call__(self, model: Any, **kwargs: Any) -> Any:
        if getattr(model.config, "outline", "ignore") == "ignore":
            return self.others(model=model, **kwargs)
        if kwargs.get("processor") is None:
            kwargs["processor"] = _find_processor(model, kwargs)
        return self.own(model=model, **kwargs)


def _find_processor(model: Any, parts: dict[str, Any]) -> GloVLMProcessor:
    """The processor beside the weights of a model, with the parts that `pipeline` has loaded."""
    outline = model.config.outline
    try:
        processor = AutoProcessor.from_pretrained(model.name_or_path)
    except (OSError, ValueError):  # a model in memory
        processor = None
    if not isinstance(processor, GloVLMProcessor) or processor.outline != outline:
        raise ValueError(
            f"This model was adapted to outlined pictures (outline '{outline}'), which only its "
            "whole processor prepares: give pipeline(..., processor=processor)."
        )
    for name in ("image_processor", "tokenizer"):  # at the revision that was asked for
        if parts.get(name) is not None:
            setattr(processor, name, parts[name])
    return processor


PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = _PipelineOf(
    ImageClassificationPipeline, GloVLMImageClassificationPipeline
)
PIPELINE_REGISTRY.supported_tasks["zero-shot-image-classification"]["impl"] = _PipelineOf(
    ZeroShotImageClassificationPipeline, GloVLMZeroShotImageClassificationPipeline
)
