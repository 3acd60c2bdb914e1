"""Dual encoder of any two transformers towers: pooling and projection."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_glovlm import GloVLMConfig


class TowerPair(nn.Module):
    """Dual encoder of any vision and any text tower; attributes as in `CLIPModel`.

    With `vision_projection="none"` the two have no joint space yet: image features are the pooled
    vision vectors. `set_visual_projection` gives them one.

    Args:
        config: A `GloVLMConfig` whose `backbone_config` is a `VisionTextDualEncoderConfig`.
    """

    base_model_prefix = ""  # PEFT reads it from every transformers-like model

    def __init__(self, config: GloVLMConfig) -> None:
        super().__init__()
        towers: Any = config.backbone_config
        self.config = config
        dtype = torch.get_default_dtype()  # that of the whole model, not of a tower's checkpoint
        self.vision_model = AutoModel.from_config(towers.vision_config, dtype=dtype)
        self.text_model = AutoModel.from_config(towers.text_config, dtype=dtype)
        self.vision_pooler = (
            AttentionalPooler(
                int(towers.vision_config.hidden_size), config.pooler_dim, config.pooler_heads
            )
            if config.pooler_dim is not None
            else None
        )
        self.visual_projection = build_projection(
            config.vision_projection,
            config.vision_pooled_dim,
            config.projection_dim,
            hidden=config.vision_projection_hidden,
            bias=config.projection_bias,
        )
        self.text_projection = build_projection(
            config.text_projection,
            int(towers.text_config.hidden_size),
            config.projection_dim,
            hidden=config.text_projection_hidden,
            bias=config.projection_bias,
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `[n, 3, height, width]`, as the processor makes them.
            **kwargs: Passed on to the vision tower where it accepts them.

        Returns:
            The tower's output with `pooler_output` replaced by the features `[n, dim]`.
        """
        outputs, pooled = self.pool_images(pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(pooled)
        return outputs

    def pool_images(
        self, pixel_values: Tensor, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Pooled vectors of images `[n, 3, height, width]`, before the projection.

        Returns:
            The tower's output and the pooled vectors `[n, vision_pooled_dim]`.
        """
        outputs = self.vision_model(pixel_values, **accepted_arguments(self.vision_model, kwargs))
        if self.vision_pooler is not None:
            pooled = self.vision_pooler(outputs.last_hidden_state)
        else:
            patches = count_patches(self.vision_model.config, pixel_values)
            if self.config.context:  # fewer leave the tower: those kept, and the fused one
                patches = outputs.last_hidden_state.shape[1] - count_prefix(
                    self.vision_model.config
                )
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
            attention_mask: `[n, length]`, 1 where a token is text; all ones when not given
            (`appended_cls`: one where a token is not padding).
            **kwargs: Passed on to the text tower where it accepts them.

        Returns:
            The tower's output with `pooler_output` replaced by the features `[n, dim]`.
        """
        if self.config.text_pooling == "appended_cls":
            input_ids, attention_mask, kwargs["position_ids"] = append_class_token(
                input_ids, attention_mask, self.text_model.config, self.text_model.dtype
            )
        outputs: BaseModelOutputWithPooling = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **accepted_arguments(self.text_model, kwargs),
        )
        eos = getattr(self.text_model.config, "eos_token_id", None)
        pooled = pool_text(outputs, self.config.text_pooling, input_ids, attention_mask, eos)
        outputs.pooler_output = self.text_projection(pooled)
        return outputs

    def set_visual_projection(self, weight: Tensor, bias: Tensor) -> None:
        """Set a linear projection from pooled vision to text features: a joint space.

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


class AttentionalPooler(nn.Module):
    """Attentional pooling: a learned query over all tokens of an image (CoCa, arXiv 2205.01917).

    Args:
        width: Of the tokens.
        dim: Of the query and of the output.
        heads: Attention heads.
    """

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.norm_query = nn.LayerNorm(dim)
        self.norm_tokens = nn.LayerNorm(width)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(width, dim)
        self.v_proj = nn.Linear(width, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def reset(self) -> None:
        """Normal query and weights, identity norms."""
        init.normal_(self.query)
        for module in self.children():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
                init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)

    def forward(self, tokens: Tensor, inside: Tensor | None = None) -> Tensor:
        """Map tokens `[n, length, width]` to `[n, dim]`.

        Args:
            tokens: `[n, length, width]`.
            inside: Which tokens the query attends to, boolean `[n, length]`; all when not given.
        """

        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

        tokens = self.norm_tokens(tokens)
        query = split(self.q_proj(self.norm_query(self.query)).unsqueeze(0))
        pooled = nn.functional.scaled_dot_product_attention(
            query.expand(len(tokens), -1, -1, -1),
            split(self.k_proj(tokens)),
            split(self.v_proj(tokens)),
            attn_mask=None if inside is None else inside[:, None, None],
        )
        result: Tensor = self.norm(self.out_proj(pooled.transpose(1, 2).flatten(1)))
        return result


def append_class_token(
    input_ids: Tensor, attention_mask: Tensor | None, config: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Append CoCa's class token to texts, with the attention mask of its pretraining.

    Tokens attend to those before them. The class token attends to the first token, and to the one
    behind every token that is no padding: so the first padding too, and itself only where the text
    fills the whole context (the padding mask is shifted by one; weights depend on it). It stands at
    the last position of the context. No token that counts attends to the padding between, so that
    is left out: as many tokens go in as came, and one of padding.

    Args:
        input_ids: `[n, length]`, padded on the right; at most as long as the context, whose last
            position must then be padding.
        attention_mask: `[n, length]`, 1 where a token is text; where a token is not padding when
            not given.
        config: Of the text tower: its last vocabulary row is the class token.
        dtype: Of the tower.

    Returns:
        Ids `[n, length + 2]` (fewer where the text fills the context), the mask that is added to
        attention scores `[n, 1, length + 2, length + 2]`, and positions `[1, length + 2]`.

    Raises:
        ValueError: A text is too long.
    """
    room = int(config.max_position_embeddings) - 1
    is_text = input_ids != config.pad_token_id if attention_mask is None else attention_mask.bool()
    if input_ids.shape[1] > room and bool(is_text[:, room:].any()):
        raise ValueError(
            f"A text is longer than {room} tokens, which is all that this tower reads beside its "
            "class token: cut it (truncation=True)."
        )
    one_more = min(input_ids.shape[1] + 1, room) - input_ids.shape[1]
    is_text = nn.functional.pad(is_text, (0, one_more))
    input_ids = nn.functional.pad(input_ids, (0, one_more)).masked_fill(
        ~is_text, config.pad_token_id
    )
    n, length = input_ids.shape
    input_ids = nn.functional.pad(input_ids, (0, 1), value=config.vocab_size - 1)
    sees = is_text.new_ones(n, length + 1, length + 1).tril()
    sees[:, -1, 1:] = is_text
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    mask = mask.masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)
    positions = torch.arange(length + 1, device=sees.device).unsqueeze(0)
    positions[:, -1] = room
    return input_ids, mask, positions


def build_projection(
    kind: str, dim_in: int, dim_out: int | None, hidden: int | None = None, bias: bool = True
) -> nn.Module:
    """Projection from a pooled vector to the joint space.

    Args:
        kind: `none`, `linear`, or `mlp` (one hidden layer, GELU).
        dim_in: Width of the pooled vector.
        dim_out: Width of the joint space; not needed for `none`.
        hidden: Width of the hidden layer; that of its input when not given.
        bias: Whether the layers have biases.
    """
    if kind == "none":
        return nn.Identity()
    if dim_out is None:
        raise ValueError(f"A {kind} projection needs projection_dim in the config; found None.")
    if kind == "linear":
        return nn.Linear(dim_in, dim_out, bias=bias)
    hidden = hidden or dim_in
    return nn.Sequential(
        nn.Linear(dim_in, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, dim_out, bias=bias)
    )


def count_patches(vision_config: Any, pixel_values: Tensor) -> int:
    """Number of patch tokens of images `[n, channels, height, width]` in a vision transformer."""
    if getattr(vision_config, "patch_size", None) is None:
        return 0
    rows, columns = patch_grid(vision_config, pixel_values)
    return rows * columns


def patch_grid(vision_config: Any, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of images `[n, channels, height, width]`.

    Raises:
        ValueError: The tower has no patches.
    """
    size = getattr(vision_config, "patch_size", None)
    if size is None:
        raise ValueError(
            "This vision tower has no patches, so nothing can be pooled inside of an outline: use "
            "outline 'blank'."
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(pixel_values.shape[-2] // height), int(pixel_values.shape[-1] // width)


def count_prefix(vision_config: Any) -> int:
    """Number of tokens in front of the patches: the class token and registers."""
    return 1 + int(getattr(vision_config, "num_register_tokens", 0) or 0)


def pool_vision(outputs: Any, pooling: str, patches: int) -> Tensor:
    """Vision pooling: the tower's tokens to one vector per image.

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
    """Text pooling: tokens `[n, length, width]` to one vector per text `[n, width]`."""
    if pooling == "pooler":
        return _pooler(outputs, "text")
    tokens: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "appended_cls":
        return tokens[:, -1]
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


def accepted_arguments(tower: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a tower accepts: DINOv2, for one, always interpolates and takes no flag."""
    optional = {"interpolate_pos_encoding", "token_type_ids", "position_ids"}
    names = inspect.signature(tower.forward).parameters
    return {k: v for k, v in kwargs.items() if k in names or k not in optional}
