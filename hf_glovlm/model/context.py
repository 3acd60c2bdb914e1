"""Context-guided token learning and enhancement (ConVLM) in a vision transformer.

Information Fusion 2025, doi 10.1016/j.inffus.2025.103737. A text moves the class token's query, and
patches that it ignores are dropped, inside any vision transformer with a class token or in blocks
of our own on top of one. Everything is built from the config; the tower keeps its own submodules,
so that names of weights and adapters do not change.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .prompts import _has_class_token, tower_blocks
from .towers import count_prefix

DEFAULTS: dict[str, Any] = {
    "theta": 0.9,
    "keep": 0.9,
    "fuse": True,
    "renormalize": False,
    "blocks": 0,
}


@dataclass(frozen=True)
class _Parts:
    """Attribute names of the parts of a family's block; the last part is `mlp` in all."""

    norm1: str
    attention: str
    output: str  # projection of the attention
    dropout: str  # rate of the attention's dropout
    norm2: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


_DINOV2 = _Parts(
    *("norm1", "attention", "o_proj", "attention_dropout", "norm2"),
    after_attention=("layer_scale1", "drop_path"),
    after_mlp=("layer_scale2", "drop_path"),
)
FAMILIES = {
    "CLIPEncoderLayer": _Parts("layer_norm1", "self_attn", "out_proj", "dropout", "layer_norm2"),
    "Dinov2Layer": _DINOV2,
    "Dinov2WithRegistersLayer": _DINOV2,
    "ViTLayer": _Parts(
        *("layernorm_before", "attention", "o_proj", "attention_dropout", "layernorm_after"),
        after_attention=("dropout",),
        after_mlp=("dropout",),
    ),
}


@dataclass
class GuidedPass:
    """Record of the last pass through a guided tower, one entry per guided layer.

    Args:
        text: Context vectors that were given `[n, text_dim]`, or none.
        mix: Whether they enter the class token's query; if not, they are noted only.
        guesses: The class token predicted from each text, AE_c(t) `[n, width]`; like the next
            two only while training and with a text.
        queries: The class token's query, with the text in it if it enters `[n, width]`.
        tokens: The class token as that layer's attention reads it, after its norm `[n, width]`.
        patches: Which patches go on `[n, kept]`, by their number in the image, the fused token -1.
        final: The class token after the final norm `[n, width]`.
    """

    text: Tensor | None = None
    mix: bool = True
    guesses: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None


class ContextGuide(nn.Module):
    """Context-guided token learning and token enhancement at some layers of one vision tower.

    At a guided layer, with t a text that is given while training and q the class token's query:

    - `q <- theta q + (1 - theta) AE_c(t)`; keys, values and the patches' queries stay.
    - Score of patch i: the mean over heads of the class token's attention to it.
    - The `ceil(keep * N)` patches of the highest score go on, sorted by it; the others become one
      token, their sum weighted by score, which stands last and is a patch to the next such layer.
      That is between the attention and the MLP of the block. Where none is dropped, all stay as
      they stand.

    Class token and registers always stay. In evaluation mode texts are ignored.

    Args:
        spec: `layers` (block numbers from 0) and `text_dim`; `theta` (0 to 1), `keep` (above 0 to
            1, one or one a layer), `fuse` (else patches are dropped), `renormalize` (the weights of
            the fused token to a sum of one; as published they are not), `blocks`: how many blocks
            of our own stand on top of the tower (then `layers` counts in these, the tower stays as
            it is, and a final norm of our own follows).
        backbone: A dual encoder with `vision_model`, whose blocks run through here from now on.

    Raises:
        ValueError: A field is unknown or out of range, or the tower cannot be guided, and why.
    """

    def __init__(self, spec: dict[str, Any], backbone: Any) -> None:
        super().__init__()
        tower = backbone.vision_model
        values = _check(spec, tower)
        width, text_dim = int(tower.config.hidden_size), int(spec["text_dim"])
        self.layers: list[int] = values["layers"]
        self.theta = float(values["theta"])
        self.keep: list[float] = values["keep"]
        self.fuse, self.renormalize = bool(values["fuse"]), bool(values["renormalize"])
        self.prefix = count_prefix(tower.config)
        self.to_vision = nn.ModuleList(_text_to_vision(text_dim, width) for _ in self.layers)
        self.to_text = nn.ModuleList(_vision_to_text(width, text_dim) for _ in self.layers)
        self.blocks, self.norm = _own_blocks(tower.config, int(values["blocks"]))
        # Set by a schedule while training, a share a layer; a buffer, so that checkpoints have it.
        self.keep_now: Tensor | None
        self.register_buffer("keep_now", None, persistent=False)
        self.reset()
        stack = list(self.blocks) if self.blocks else tower_blocks(tower)
        for number, layer in enumerate(self.layers):
            block = stack[layer]
            parts = _parts_of(block)
            attention = getattr(block, parts.attention)
            block.forward = partial(self._run_block, number, block, parts)
            attention.forward = partial(self._attend, number, attention, parts)
        self._hook = tower.register_forward_hook(self._after_tower, prepend=True)

    def reset(self) -> None:
        """Normal weights of standard deviation 0.02, no bias, plain norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)

    def release(self, tower: Any) -> None:
        """Restore the plain tower."""
        self._hook.remove()
        for block in [] if self.blocks else [tower_blocks(tower)[i] for i in self.layers]:
            for part in (block, getattr(block, _parts_of(block).attention)):
                del part.forward

    @contextmanager
    def read(self, text: Tensor | None = None, mix: bool = True) -> Iterator[GuidedPass]:
        """Context manager: texts of this thread's images, and a record of the layers.

        Args:
            text: Context vectors `[n, text_dim]` of the next `n` images; used in training mode
                alone.
            mix: Whether they enter the class token's query.
        """
        seen = GuidedPass(text, mix)
        before = _PASS.set((self, seen))
        try:
            yield seen
        finally:
            _PASS.reset(before)

    @contextmanager
    def follow(self) -> Iterator[GuidedPass]:
        """Context manager: the record of the running pass, or one of its own."""
        seen = self._seen()
        if seen is not None:
            yield seen
        else:
            with self.read() as seen:
                yield seen

    def _seen(self) -> GuidedPass | None:
        owner, seen = _PASS.get() or (None, None)
        return seen if owner is self else None

    def _run_block(
        self,
        number: int,
        block: Any,
        parts: _Parts,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Forward pass of a guided block, from the block's own parts."""
        normed = getattr(block, parts.norm1)(hidden_states)
        attention = getattr(block, parts.attention)
        mixed, _, scores = attention(normed, attention_mask, **kwargs)
        for name in parts.after_attention:
            mixed = getattr(block, name)(mixed)
        tokens = self._choose(number, hidden_states + mixed, scores)
        changed = block.mlp(getattr(block, parts.norm2)(tokens))
        for name in parts.after_mlp:
            changed = getattr(block, name)(changed)
        result: Tensor = tokens + changed
        return result

    def _attend(
        self,
        number: int,
        attention: Any,
        parts: _Parts,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Self-attention `[n, length, width]`, its weights if eager, and the class token's scores.

        Scores are `[n, length]`, means over heads. Any back end may carry out the attention: only
        the class token's row is computed beside it.
        """
        if attention_mask is not None:
            raise ValueError(
                "Context-guided towers read whole images: leave the attention mask out, and use "
                "attn_implementation 'sdpa' or 'eager'."
            )
        shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (m(hidden_states).view(shape).transpose(1, 2) for m in maps)
        query = self._mix_in(number, query, hidden_states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, _attend_eagerly
        )
        scaling = attention.head_dim**-0.5
        mixed, weights = attend(
            *(attention, query, key, value, None),
            scaling=scaling,
            dropout=getattr(attention, parts.dropout) if attention.training else 0.0,
            **kwargs,
        )
        row = (
            weights[:, :, :1]
            if weights is not None
            else _softmax(query[:, :, :1] @ key.transpose(-1, -2) * scaling)
        )
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)
        return getattr(attention, parts.output)(mixed), weights, row.mean(1)[:, 0]

    def _mix_in(self, number: int, query: Tensor, tokens: Tensor) -> Tensor:
        """Mix the text, if any, into the class token's query `[n, heads, length, dim]`."""
        seen = self._seen()
        if seen is not None and number == 0:  # a new pass; what is noted is that of the last
            for noted in (seen.guesses, seen.queries, seen.tokens, seen.patches):
                noted.clear()
        if not self.training or seen is None or seen.text is None:
            return query
        if len(seen.text) != len(query):
            raise ValueError(
                f"Each image has one text: expected {len(query)}, found {len(seen.text)}."
            )
        guess: Tensor = self.to_vision[number](seen.text.to(query.dtype))
        first = query[:, :, 0]
        if self.theta < 1 and seen.mix:
            first = self.theta * first + (1 - self.theta) * guess.view_as(first)
            query = torch.cat([first.unsqueeze(2), query[:, :, 1:]], dim=2)
        seen.guesses.append(guess)
        seen.queries.append(first.flatten(1))
        seen.tokens.append(tokens[:, 0])
        return query

    def _choose(self, number: int, tokens: Tensor, scores: Tensor) -> Tensor:
        """Token selection: keep the patches of the highest scores, and one token for the rest."""
        patches, scores = tokens[:, self.prefix :], scores[:, self.prefix :]
        count = patches.shape[1]
        scheduled = self.training and self.keep_now is not None
        share = float(self.keep_now[number]) if scheduled else self.keep[number]  # type: ignore[index]
        kept = keep_count(share, count)
        order = None
        if kept < count:
            order = scores.topk(count).indices
            ranked = patches.gather(1, order.unsqueeze(-1).expand_as(patches))
            rows = [tokens[:, : self.prefix], ranked[:, :kept]]
            if self.fuse:
                weight = scores.gather(1, order[:, kept:])
                if self.renormalize:
                    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
                weight = weight.to(tokens.dtype).unsqueeze(1)
                rows.append(weight @ ranked[:, kept:])
            tokens = torch.cat(rows, dim=1)
        seen = self._seen()
        if seen is not None:
            seen.patches.append(self._number(seen, scores, order, kept))
        return tokens

    def _number(self, seen: GuidedPass, scores: Tensor, order: Tensor | None, kept: int) -> Tensor:
        """Numbers, in the image, of the patches kept."""
        n, count = scores.shape
        numbers = (
            seen.patches[-1]
            if seen.patches
            else torch.arange(count, device=scores.device).expand(n, -1)
        )
        if order is None:
            return numbers
        numbers = numbers.gather(1, order[:, :kept])
        fused = numbers.new_full((n, int(self.fuse)), -1)
        return torch.cat([numbers, fused], dim=1)

    def _after_tower(self, tower: Any, args: Any, output: Any) -> Any:
        """Forward hook of the tower: our own blocks, and a record of the final class token."""
        if self.blocks:
            tokens = output.last_hidden_state
            for block in self.blocks:
                tokens = block(tokens)
            tokens = self.norm(tokens)
            output.last_hidden_state, output.pooler_output = tokens, tokens[:, 0]
        seen = self._seen()
        if seen is not None:
            # CLIP's final norm is behind its tokens; a pooler of ViT is no norm.
            normed = hasattr(tower, "post_layernorm")
            seen.final = output.pooler_output if normed else output.last_hidden_state[:, 0]
        return output


# The running pass of each thread, and whose it is.
_PASS: ContextVar[tuple[ContextGuide, GuidedPass] | None] = ContextVar("guided", default=None)


def keep_count(keep: float, patches: int) -> int:
    """Number of patches kept: `ceil(keep * patches)`, safe from rounding in the product."""
    return math.ceil(round(keep * patches, 6))


def _text_to_vision(text_dim: int, width: int) -> nn.Sequential:
    """AE_c: text vector to predicted class token, in (0, 1)."""
    return nn.Sequential(
        *(nn.Linear(text_dim, width), nn.ReLU()),
        *(nn.Linear(width, 2 * width), nn.ReLU()),
        *(nn.Linear(2 * width, width), nn.Sigmoid()),
    )


def _vision_to_text(width: int, text_dim: int) -> nn.Sequential:
    """AE_v: class token's query to text vector."""
    return nn.Sequential(
        *(nn.Linear(width, text_dim), nn.ReLU()), *(nn.Linear(text_dim, text_dim), nn.ReLU())
    )


def _own_blocks(config: Any, count: int) -> tuple[nn.ModuleList, nn.Module]:
    """Additional pre-norm blocks of the tower's width and heads, and their final norm."""
    if count == 0:
        return nn.ModuleList(), nn.Identity()
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTLayer

    width = int(config.hidden_size)
    shape = ViTConfig(
        hidden_size=width,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    blocks = nn.ModuleList(ViTLayer(shape) for _ in range(count))
    block: Any
    for block in blocks:
        block.attention.config = config  # the attention back end is the tower's
    return blocks, nn.LayerNorm(width, eps=1e-6)


def _check(spec: dict[str, Any], tower: Any) -> dict[str, Any]:
    """Check a spec against the tower; with its defaults and one share per layer."""
    values = {**DEFAULTS, **spec}
    if unknown := set(values) - set(DEFAULTS) - {"layers", "text_dim"}:
        raise ValueError(
            f"A context has layers, text_dim, {', '.join(DEFAULTS)}; found "
            f"{', '.join(sorted(unknown))}: this folder needs a newer version, or its config is "
            "wrong."
        )
    name = type(tower).__name__
    if not hasattr(tower.config, "hidden_size") or not _has_class_token(tower):
        raise ValueError(
            f"Patches are chosen by the class token's attention, and {name} has no class token: "
            "use a CLIP, DINOv2 or ViT tower."
        )
    own = int(values["blocks"])
    depth = own or len(tower_blocks(tower))
    layers = sorted(set(values["layers"]))
    if own < 0 or not layers or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(
            f"Context-guided layers are among the {depth} blocks 0 to {depth - 1} of "
            f"{'our own' if own else name}; found {list(values['layers'])}."
        )
    if not own:
        for layer in layers:
            _parts_of(tower_blocks(tower)[layer])
    keep = values["keep"]
    keep = list(keep) if isinstance(keep, list | tuple) else [keep] * len(layers)
    if len(keep) != len(layers) or not all(0 < share <= 1 for share in keep):
        raise ValueError(
            f"keep is above 0 and at most 1, one or one for each of {len(layers)} layers; found "
            f"{values['keep']}."
        )
    if not 0 <= values["theta"] <= 1:
        raise ValueError(f"theta is 0 to 1; found {values['theta']}.")
    return {**values, "layers": layers, "keep": keep}


def _parts_of(block: nn.Module) -> _Parts:
    # By name along the classes: sharding tools put a class of their own in front.
    for kind in type(block).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise ValueError(
        f"Blocks of kind {type(block).__name__} cannot be guided (these can: "
        f"{', '.join(FAMILIES)}): use a CLIP, DINOv2 or ViT tower, or blocks of our own on top."
    )


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 at least."""
    half = scores.dtype in (torch.float16, torch.bfloat16)
    return scores.softmax(-1, dtype=torch.float32 if half else None)


def _attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention and its weights `[n, heads, length, length]` before dropout."""
    weights = _softmax(query @ key.transpose(-1, -2) * scaling)
    dropped = nn.functional.dropout(weights, dropout, module.training).to(value.dtype)
    return (dropped @ value).transpose(1, 2), weights
