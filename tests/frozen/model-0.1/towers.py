"""A dual encoder out of any two transformers towers: pooling and projection."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_glovlm import GloVLMConfig


class TowerPair(nn.Module):
    """Any vision tower beside any text tower, named as `CLIPModel` names its parts.

    With `vision_projection="none"` the two have no joint space yet: image features are the pooled
    vision vectors. `set_visual_projection` gives them one.

    Args:
        config: A `GloVLMConfig` whose `backbone_config` is a `VisionTextDualEncoderConfig`.
    """

    base_model_prefix = ""  # PEFT asks every transformers-like model for it

    def __init__(self, config: GloVLMConfig) -> None:
        super().__init__()
        towers: Any = config.backbone_config
        self.config = config
        self.vision_model = AutoModel.from_config(towers.vision_config)
        self.text_model = AutoModel.from_config(towers.text_config)
        self.visual_projection = build_projection(
            config.vision_projection, config.vision_pooled_dim, config.projection_dim
        )
        self.text_projection = build_projection(
            config.text_projection, int(towers.text_config.hidden_size), config.projection_dim
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `[n, 3, height, width]`, as the processor makes them.
            **kwargs: Passed on to the vision tower where it knows them.

        Returns:
            The tower's output with `pooler_output` replaced by the features `[n, dim]`.
        """
        outputs, pooled = self.pool_images(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(pooled)
        return outputs

    def pool_images(
        self, pixel_values: Tensor, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Encode images `[n, 3, height, width]` without the projection.

        Returns:
            The tower's output and the pooled vectors `[n, vision_pooled_dim]`.
        """
        outputs = self.vision_model(pixel_values, **_known(self.vision_model, kwargs))
        patches = count_patches(self.vision_model.config, pixel_values)
        pooled = pool_vision(outputs, self.config.vision_pooling, patches)
        if self.config.normalize_pooled:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return outputs, pooled

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: `[n, length]`.
            attention_mask: `[n, length]`, 1 where a token is text; all ones when not given.
            **kwargs: Passed on to the text tower where it knows them.

        Returns:
            The tower's output with `pooler_output` replaced by the features `[n, dim]`.
        """
        outputs: BaseModelOutputWithPooling = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **_known(self.text_model, kwargs),
        )
        eos = getattr(self.text_model.config, "eos_token_id", None)
        pooled = pool_text(outputs, self.config.text_pooling, input_ids, attention_mask, eos)
        outputs.pooler_output = self.text_projection(pooled)
        return outputs

    def set_visual_projection(self, weight: Tensor, bias: Tensor) -> None:
        """Give the pair a joint space by a linear map from pooled vision to text features.

        Args:
            weight: `[text feature dim, pooled vision dim]`.
            bias: `[text feature dim]`.
        """
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        self.visual_projection = linear.to(self.logit_scale.device, self.logit_scale.dtype)
        self.config.vision_projection = "linear"
        self.config.projection_dim = weight.shape[0]
        self.config.joint_space = True


def build_projection(kind: str, dim_in: int, dim_out: int | None) -> nn.Module:
    """Build what stands between a pooled vector and the joint space.

    Args:
        kind: `none`, `linear` (with bias), or `mlp` (one hidden layer as wide as its input, GELU).
        dim_in: Width of the pooled vector.
        dim_out: Width of the joint space; not needed for `none`.
    """
    if kind == "none":
        return nn.Identity()
    if dim_out is None:
        raise ValueError(f"A {kind} projection needs projection_dim in the config; found None.")
    if kind == "linear":
        return nn.Linear(dim_in, dim_out)
    return nn.Sequential(nn.Linear(dim_in, dim_in), nn.GELU(), nn.Linear(dim_in, dim_out))


def count_patches(vision_config: Any, pixel_values: Tensor) -> int:
    """Count the patch tokens that images `[n, 3, height, width]` become in a vision transformer."""
    size = getattr(vision_config, "patch_size", None)
    if size is None:
        return 0
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    return int(pixel_values.shape[-2] // rows * (pixel_values.shape[-1] // columns))


def pool_vision(outputs: Any, pooling: str, patches: int) -> Tensor:
    """Turn the vision tower's tokens into one vector an image.

    Args:
        outputs: What the tower returned; tokens `[n, prefix + patches, width]`, where the prefix is
            the class token and any registers.
        pooling: `pooler`, `cls`, `mean` (of the patch tokens) or `cls_mean` (both joined).
        patches: Number of patch tokens, which stand last.

    Returns:
        `[n, width]`, or `[n, 2 * width]` for `cls_mean`.
    """
    if pooling == "pooler":
        return _pooler(outputs, "vision")
    tokens: Tensor = outputs.last_hidden_state
    if tokens.dim() != 3:
        raise ValueError(
            f"Pooling '{pooling}' needs a vision transformer's tokens; this tower returns a map of "
            f"shape {tuple(tokens.shape)}: set vision_pooling to 'pooler'."
        )
    mean = tokens[:, tokens.shape[1] - patches :].mean(1)
    if pooling == "mean":
        return mean
    if tokens.shape[1] <= patches:
        raise ValueError(
            f"Pooling '{pooling}' needs a class token and this vision tower has none: set "
            "vision_pooling to 'mean' or 'pooler'."
        )
    return tokens[:, 0] if pooling == "cls" else torch.cat([tokens[:, 0], mean], dim=-1)


def pool_text(
    outputs: Any,
    pooling: str,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    eos_token_id: int | None,
) -> Tensor:
    """Turn text tokens `[n, length, width]` into one vector per text `[n, width]`."""
    if pooling == "pooler":
        return _pooler(outputs, "text")
    tokens: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "eos":
        if eos_token_id is None:
            raise ValueError(
                "text_pooling 'eos' needs an eos_token_id in the text tower's config; "
                "use 'mean' or 'cls'."
            )
        position = (input_ids == eos_token_id).int().argmax(-1)
        return tokens[torch.arange(len(tokens), device=tokens.device), position]
    if attention_mask is None:
        return tokens.mean(1)
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def _pooler(outputs: Any, tower: str) -> Tensor:
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ValueError(
            f"The {tower} tower returns no pooler_output; set {tower}_pooling to 'cls' or 'mean'."
        )
    return torch.flatten(pooled, 1)


def _known(tower: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a tower never heard of: DINOv2 always interpolates and takes no such flag."""
    optional = {"interpolate_pos_encoding", "token_type_ids", "position_ids"}
    names = inspect.signature(tower.forward).parameters
    return {k: v for k, v in kwargs.items() if k in names or k not in optional}
