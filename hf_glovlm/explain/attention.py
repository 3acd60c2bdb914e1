"""Attention of a vision transformer, its gradients, and how both add up over the layers.

Attention is read off the eager back end, to which the tower is switched for one pass. A pooler that
attends to all tokens (SigLIP's, CoCa's) is computed anew beside the pass, since it returns none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GloVLMError
from ..model.towers import AttentionalPooler
from .patches import View, has_patches, pooled_inside

_ONE_AT_A_TIME = Lock()  # a switched back end is the model's, not a thread's


@dataclass
class Attention:
    """Attention of one image's forward pass.

    Args:
        layers: Attention of each block `[heads, tokens, tokens]`; patches stand last.
        pooling: Attention of a pooler to the last tokens `[heads, own tokens]`, or to the patches
            alone where the inside of an outline is pooled; where there is one.
        layer_gradients: Of the score, in the shapes of `layers`; empty where not asked for.
        pooling_gradient: The same for `pooling`.
        tokens: The last hidden state `[own tokens, width]`; tokens between the blocks are gone.
        prefix: How many of the own tokens stand before the patches.
        patches: How many patches there are; what stands behind them is padding.
        inside: Weight of each patch in the mean over the inside of an outline `[patches]`; `None`
            where that is not what is pooled.
    """

    layers: list[Tensor]
    pooling: Tensor | None
    layer_gradients: list[Tensor]
    pooling_gradient: Tensor | None
    tokens: Tensor
    prefix: int
    patches: int
    inside: Tensor | None = None


def read_attention(
    model: Any,
    inputs: dict[str, Tensor],
    view: View,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Attention:
    """Pass one image through the vision tower and keep its attention.

    Args:
        model: The classifier, in evaluation mode.
        inputs: Of the image.
        view: Of the image.
        score: From image features `[1, dim]` to the number whose gradients are taken.

    Raises:
        GloVLMError: The tower has no attention over patches that could be followed through.
    """
    backbone = model.glovlm.backbone
    if getattr(model.config, "context", None):
        raise GloVLMError(
            "Attention cannot be followed through context-guided layers, which drop patches "
            "between the blocks: use 'kept' or 'occlusion'."
        )
    if not has_patches(model):
        raise GloVLMError(
            f"{type(backbone.vision_model).__name__} is no plain vision transformer, so its "
            "attention is no map over patches: use 'occlusion'."
        )
    with torch.inference_mode(False), torch.set_grad_enabled(score is not None):
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        if score is not None:  # a path for the gradients, even through a tower that is frozen
            inputs["pixel_values"].requires_grad_()
        inside = pooled_inside(model, inputs, view)
        with _eager(backbone.vision_model), _watched(backbone, inside is None) as poolings:
            outputs = model.glovlm.get_image_features(**inputs, output_attentions=True)
        layers, gradients = list(outputs.attentions), list[Tensor]()
        if score is not None:
            target = score(outputs.pooler_output)
            gradients = list(torch.autograd.grad(target, [*layers, *poolings]))
    tokens = outputs.last_hidden_state[0].detach()
    length = view.rows * view.columns
    room = inputs["pixel_values"].shape[1] if "spatial_shapes" in inputs else length
    return Attention(
        layers=[layer[0].detach() for layer in layers],
        pooling=poolings[0][0, :, 0].detach() if poolings else None,
        layer_gradients=[gradient[0] for gradient in gradients[: len(layers)]],
        pooling_gradient=gradients[-1][0, :, 0] if poolings and gradients else None,
        tokens=tokens,
        prefix=len(tokens) - room,
        patches=length,
        inside=None if inside is None else inside.detach(),
    )


def roll_out(attention: Attention, pooling: str) -> Tensor:
    """Attention rollout: attention multiplied through the layers (arXiv 2005.00928).

    `R = A_L ... A_1` with `A_l = (mean over heads + I) / 2`, the half of it for the residual
    stream; then the row of what is pooled.

    Args:
        attention: Of one image.
        pooling: How the tokens are pooled, see `read_out`.

    Returns:
        Share of each patch `[patches]`; class token and registers keep theirs.
    """
    flow = torch.eye(attention.layers[0].shape[-1], device=attention.tokens.device)
    for layer in attention.layers:
        mixed = (layer.float().mean(0) + torch.eye(len(flow), device=flow.device)) / 2
        flow = mixed @ flow
    weights = None if attention.pooling is None else attention.pooling.float().mean(0)
    return read_out(flow, attention, pooling, weights)


def weigh_by_gradient(attention: Attention, pooling: str) -> Tensor:
    """Gradient-weighted attention (Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6).

    `R <- R + mean over heads(relu(gradient * A_l)) R` from `R = I`; then the row of what is pooled.
    A pooler's own attention is weighed in the same way. Where tokens are averaged, the identity,
    which is the same for all of them, is left out.

    Args:
        attention: Of one image, with gradients.
        pooling: How the tokens are pooled, see `read_out`.

    Returns:
        Relevance of each patch `[patches]`, 0 or more.
    """
    identity = torch.eye(attention.layers[0].shape[-1], device=attention.tokens.device)
    relevance = identity
    for layer, gradient in zip(attention.layers, attention.layer_gradients, strict=True):
        relevance = relevance + (layer * gradient).float().relu().mean(0) @ relevance
    if attention.pooling is None or attention.pooling_gradient is None:
        return read_out(relevance - identity, attention, pooling, None)
    weights = (attention.pooling * attention.pooling_gradient).float().relu().mean(0)
    return read_out(relevance, attention, pooling, weights)


def read_out(flow: Tensor, attention: Attention, pooling: str, weights: Tensor | None) -> Tensor:
    """Share of each patch in the pooled vector.

    Args:
        flow: From the first layer's tokens to the last's `[tokens, tokens]`.
        attention: Of one image.
        pooling: `cls`; `mean` of the patches; `cls_mean`, of which each half counts the same;
            anything else is the class token's, or the patches' mean where there is none.
        weights: Of a pooler that attends `[own tokens]`; used instead.

    Returns:
        `[patches]`.
    """
    prefix, patches = attention.prefix, attention.patches
    own = flow.new_zeros(len(attention.tokens))
    if attention.inside is not None:
        own[prefix : prefix + patches] = attention.inside if weights is None else weights
    elif weights is not None:
        own += weights
    else:
        if pooling != "mean" and prefix:
            own[0] = 1
        if pooling in ("mean", "cls_mean") or not prefix:
            own[prefix : prefix + patches] = 1 / patches
        own /= own.sum()
    begin = min(prefix, 1)  # tokens between the blocks stand behind the class token
    inserted = flow.new_zeros(len(flow) - len(own))
    row = torch.cat([own[:begin], inserted, own[begin:]]) @ flow
    first = len(flow) - len(own) + prefix
    return row[first : first + patches]


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    """The eager back end of a tower's attention, and the one that it had again afterwards."""
    with _ONE_AT_A_TIME:
        before = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        try:
            yield
        finally:
            tower.set_attn_implementation(before)


@contextmanager
def _watched(backbone: Any, own_head: bool = True) -> Iterator[list[Tensor]]:
    """Note the attention `[n, heads, 1, tokens]` of a pooler while images pass.

    Args:
        backbone: The towers.
        own_head: Whether what the vision tower's own head pools is used.
    """
    seen: list[Tensor] = []

    def multihead(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        query, key, value = args
        packed = zip(
            (query, key, value),
            module.in_proj_weight.chunk(3),
            module.in_proj_bias.chunk(3),
            strict=True,
        )
        q, k, v = (nn.functional.linear(x, weight, bias) for x, weight, bias in packed)
        weights, mixed = _attend(q, k, v, module.num_heads, kwargs.get("attn_mask"))
        seen.append(weights)
        return module.out_proj(mixed), None

    def pooler(module: AttentionalPooler, args: Any, output: Tensor) -> Tensor:
        tokens = module.norm_tokens(args[0])
        query = module.q_proj(module.norm_query(module.query)).expand(len(tokens), 1, -1)
        keys, values = module.k_proj(tokens), module.v_proj(tokens)
        mask = None
        if len(args) > 1:  # which tokens lie inside of an outline
            bias = torch.zeros_like(tokens[..., 0]).masked_fill(~args[1], -torch.inf)
            mask = bias[:, None, None].expand(-1, module.heads, -1, -1)
        weights, mixed = _attend(query, keys, values, module.heads, mask)
        seen.append(weights)
        pooled: Tensor = module.norm(module.out_proj(mixed[:, 0]))
        return pooled

    handles = []
    for module in backbone.vision_model.modules():
        if own_head and isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_hook(multihead, with_kwargs=True))
    if isinstance(own := getattr(backbone, "vision_pooler", None), AttentionalPooler):
        handles.append(own.register_forward_hook(pooler))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention weights `[n, heads, queries, keys]` and what they mix `[n, queries, dim]`."""
    q, k, v = (
        x.view(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)
        for x in (query, key, value)
    )
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask.reshape(scores.shape)
    weights = scores.softmax(-1)
    return weights, (weights @ v).transpose(1, 2).flatten(2)
