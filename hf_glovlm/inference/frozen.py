"""Frozen encoders: the key of what decides an encoder's vectors, and towers that models share.

Methods on features never change a tower. Models that are made one after the other for such methods
share the towers of one backbone, and have a configuration, projections and a logit scale of their
own. What is asked of shared towers (their key, the features of class texts) is computed once.
"""

import copy
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from ..environment import package_version
from ..model.outlines import CENTRE, FILL

if TYPE_CHECKING:
    from ..model import GloVLMModel, GloVLMProcessor

# Part of every key: raise it when decoding or pooling changes what comes out for the same input.
CACHE_VERSION = 1
_TOWERS = ("vision_model", "vision_pooler", "text_model")
T = TypeVar("T")


def encoder_key(model: "GloVLMModel", processor: "GloVLMProcessor") -> str:
    """Cache key of an encoder: a hash of everything that decides the pooled vector of an image.

    That is every weight but those of the text tower and the projections, the vision tower's
    configuration, pooling, dtype, and the image transform with the versions of the libraries that
    carry it out. Two models that differ in projection, head or prompts alone share their features.

    Args:
        model: The model; one that is no tower of torch states a key of its own.
        processor: Its processor.

    Returns:
        32 hexadecimal digits.
    """
    own = getattr(model, "encoder_key", None)
    if own is not None:
        return str(own(processor))
    config: Any = model.config
    vision = config.backbone_config.vision_config.to_dict()
    images = processor.image_processor
    about = {
        "version": CACHE_VERSION,
        "libraries": [package_version(name) for name in ("pillow", "torchvision", "transformers")],
        "vision": {k: v for k, v in vision.items() if k not in _NOT_IN_KEY},
        "pooling": [config.vision_pooling, config.normalize_pooled] if config.is_pair else None,
        "transform": [
            type(images).__name__,
            {k: v for k, v in images.to_dict().items() if k not in _NOT_IN_KEY},
        ],
    }
    if processor.torchvision_crop:
        about["crop"] = "torchvision"
    if processor.outline != "ignore":
        about["outline"] = [processor.outline, FILL, CENTRE]
    if processor.draft_side:
        about["draft"] = processor.draft_side
    if config.context:  # which patches are dropped is no weight
        about["context"] = config.context
    described = json.dumps(about, sort_keys=True, default=str)
    return ask_once(model, described, lambda: _hash_encoder(model, described))


def _hash_encoder(model: nn.Module, described: str) -> str:
    """Hash of a description and of every weight in front of the projection."""
    digest = xxhash.xxh3_128(described.encode())
    for name, tensor in model.state_dict().items():
        if _decides_pooling(name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, layer in model.named_modules():
        # The switch and the scale of a PEFT layer are no weights. A transformers model has a method
        # of that name, hence the property.
        tuned = isinstance(getattr(type(layer), "disable_adapters", None), property)
        if tuned and _decides_pooling(name):
            state = (layer.disable_adapters, layer.active_adapters, vars(layer).get("scaling"))
            digest.update(f"{name} {state}".encode())
    return str(digest.hexdigest())


def _decides_pooling(name: str) -> bool:
    """Whether a part of the model comes before the projection (an unknown part: yes)."""
    after = ("backbone.text_model.", "visual_projection", "text_projection", "logit_")
    return not any(part in name for part in after)


# Where a configuration came from, not what it computes. sdpa and eager agree to float noise.
_NOT_IN_KEY = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "_processor_class",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "processor_class",
        "torch_dtype",
        "transformers_version",
    }
)


# ---------------------------------------------------------------------------------- shared towers


@dataclass
class _Shared:
    """Towers that are shared: their tensors, the state of each, and what was asked of them."""

    tensors: list[Tensor]
    state: list[tuple[int, int]] = field(default_factory=list)
    answers: dict[Hashable, Any] = field(default_factory=dict)

    def forget_changed(self) -> None:
        """Forget every answer if a tensor was written to, or moved to another place or device."""
        state = [(tensor._version, tensor.data_ptr()) for tensor in self.tensors]
        if state != self.state:
            self.state = state
            self.answers.clear()


_shared: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()  # by the vision tower


def share_towers(
    model: "GloVLMModel", processor: "GloVLMProcessor"
) -> tuple["GloVLMModel", "GloVLMProcessor"]:
    """Copy of a model that has the towers in common with it; all else is its own.

    For whoever does not change towers: what is written to them shows in every model that shares
    them. Writes that PyTorch counts are noticed by `ask_once`, those behind its back (`.data`) are
    not. A model whose towers are hooked together with other parts (adapter modules, a context) is
    copied whole.

    Args:
        model: The model.
        processor: Its processor; tokenizer and image transform are shared, too.

    Returns:
        The copies.
    """
    backbone: Any = model.backbone
    parts = [part for name in _TOWERS if (part := getattr(backbone, name, None)) is not None]
    if backbone.vision_model not in _shared:
        tensors = model.state_dict(keep_vars=True)
        of_parts = {id(t): t for part in parts for t in part.state_dict(keep_vars=True).values()}
        apart = model.inserts is None and model.context is None
        apart &= all(id(t) in of_parts for name, t in tensors.items() if _decides_pooling(name))
        if not apart or any(t.is_inference() for t in of_parts.values()):  # which have no versions
            return copy.deepcopy((model, processor))
        _shared[backbone.vision_model] = _Shared(list(of_parts.values()))
    # What a deep copy finds in its memo, it takes as it is.
    own = copy.deepcopy(model, {id(part): part for part in parts})
    return own, copy.copy(processor)


def ask_once(model: Any, question: Hashable, compute: Callable[[], T]) -> T:
    """Answer that depends on a model's towers: computed once where they are shared.

    Args:
        model: A `GloVLMModel`.
        question: All else that the answer depends on.
        compute: Finds the answer.
    """
    shared = _shared.get(getattr(getattr(model, "backbone", None), "vision_model", None))  # type: ignore[arg-type]
    if shared is None:
        return compute()
    shared.forget_changed()
    if question not in shared.answers:
        shared.answers[question] = compute()
    answer: T = shared.answers[question]
    return answer
