"""Encoders of published checkpoints: their configurations and tensor mappings."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, BertConfig, CLIPTextConfig

from ...errors import GloVLMError
from .moving import Move

_QKV = ("q_proj", "k_proj", "v_proj")
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_DINO_BLOCK = {**_VIT_BLOCK, "norm1": "norm1", "norm2": "norm2"}
# Of timm's vision transformers whose heads are not 64 wide, by width.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


def clip_text_config(move: Move, prefix: str, stated: Mapping[str, Any], dim: int, act: str) -> Any:
    """Configuration of CLIP's or CoCa's text tower; a class token is the last vocabulary row."""
    appends = f"{prefix}cls_emb" in move
    rows, width = move.shape(f"{prefix}token_embedding.weight")
    rows, width = stated.get("vocab_size", rows), stated.get("width", width)
    positions = move.shape(f"{prefix}positional_embedding")[0]
    pooling, eos = stated.get("pool_type", "argmax"), stated.get("eos_id", 2)
    if not appends and (pooling not in ("argmax", "eos") or (pooling, eos) == ("eos", 2)):
        raise GloVLMError(
            f"text_cfg.pool_type is '{pooling}' (eos_id {eos}): expected 'argmax', or 'eos' with "
            "the id of the tokenizer's end-of-text token."
        )
    blocks = f"{prefix}transformer.resblocks."
    return CLIPTextConfig(
        vocab_size=rows + appends,
        hidden_size=width,
        intermediate_size=mlp_width(move, blocks, width, stated),
        num_hidden_layers=stated.get("layers") or move.depth(blocks),
        num_attention_heads=stated.get("heads") or count_heads(width),
        # open_clip counts CoCa's class token or not, by release
        max_position_embeddings=positions if appends else stated.get("context_length", positions),
        hidden_act=act,
        projection_dim=dim,
        pad_token_id=stated.get("pad_id", 0),
        bos_token_id=None,
        # 2 is transformers' sign for "where the highest id stands", which open_clip takes.
        eos_token_id=eos if pooling == "eos" else 2,
    )


def move_clip_text(move: Move, prefix: str, root: str, config: Any) -> None:
    """Map CLIP's or CoCa's text tower and its projection.

    Args:
        move: The tensors.
        prefix: Of their names.
        root: Prefix of the module's names.
        config: Of the tower.
    """
    tower = f"{root}text_model"
    appends, width = f"{prefix}cls_emb" in move, config.hidden_size
    tokens = move.take(f"{prefix}token_embedding.weight", config.vocab_size - appends, width)
    if appends:
        tokens = torch.cat([tokens, move.take(f"{prefix}cls_emb", width).unsqueeze(0)])
    move.put(f"{tower}.embeddings.token_embedding.weight", tokens)
    positions = f"{tower}.embeddings.position_embedding.weight"
    move.copy(f"{prefix}positional_embedding", positions)
    move_clip_blocks(move, f"{prefix}transformer", tower, config)
    move.layer(f"{prefix}ln_final", f"{tower}.final_layer_norm")
    move.transpose(f"{prefix}text_projection", f"{root}text_projection.weight")


def move_clip_blocks(move: Move, source: str, tower: str, config: Any) -> None:
    """Map the blocks of either of CLIP's towers."""
    for i in range(config.num_hidden_layers):
        here, there = f"{source}.resblocks.{i}", f"{tower}.encoder.layers.{i}"
        move.layers(_CLIP_BLOCK, here, there)
        for part in ("weight", "bias"):
            targets = [f"{there}.self_attn.{name}.{part}" for name in _QKV]
            move.split(f"{here}.attn.in_proj_{part}", targets)


def move_pooler(move: Move, source: str, norm: str) -> None:
    """Map attentional pooling; of several queries, the first is the contrastive one."""
    target = "backbone.vision_pooler"
    queries, dim = move.shape(f"{source}.query")
    move.put(f"{target}.query", move.take(f"{source}.query", queries, dim)[:1])
    if queries > 1:
        move.dropped.append(f"{source}.query[1:]")
    names = {"ln_q": "norm_query", "ln_k": "norm_tokens", "attn.out_proj": "out_proj"}
    move.layers(names, source, target)
    move.layer(norm, f"{target}.norm")
    weights = [f"{target}.{name}.weight" for name in _QKV]
    if f"{source}.attn.in_proj_weight" in move:  # torch stacks them where all are equally wide
        move.split(f"{source}.attn.in_proj_weight", weights)
    else:
        for name, weight in zip(_QKV, weights, strict=True):
            move.copy(f"{source}.attn.{name}_weight", weight)
    move.split(f"{source}.attn.in_proj_bias", [f"{target}.{name}.bias" for name in _QKV])


def vit_config(
    move: Move, source: str, stated: Mapping[str, Any], model_type: str | None = None
) -> Any:
    """Configuration of timm's vision transformer.

    Args:
        move: The tensors.
        source: Prefix of their names.
        stated: timm's `model_args` (or a `vision_cfg`): `num_heads`, `no_embed_class`.
        model_type: `vit`, `dinov2` or `dinov2_with_registers`; the plainest that fits when not
            given.
    """
    width, _, patch, _ = move.shape(f"{source}patch_embed.proj.weight")
    registers = move.shape(f"{source}reg_token")[1] if f"{source}reg_token" in move else 0
    hidden = move.shape(f"{source}blocks.0.mlp.fc2.weight")[1]
    swiglu = move.shape(f"{source}blocks.0.mlp.fc1.weight")[0] == 2 * hidden
    act = stated.get("act_layer") or "gelu"
    if not swiglu and str(act).lower() != "gelu":
        raise GloVLMError(f"model_args.act_layer is '{act}': expected GELU.")
    if model_type is None:
        scaled = f"{source}blocks.0.ls1.gamma" in move
        plain = "dinov2" if scaled or swiglu else "vit"
        model_type = "dinov2_with_registers" if registers else plain
    rows = move.shape(f"{source}pos_embed")[1]
    patches = rows - 1 - registers
    if stated.get("no_embed_class", math.isqrt(max(patches, 0)) ** 2 != patches):
        patches = rows  # timm's no_embed_class: positions are for patches alone
    if math.isqrt(max(patches, 0)) ** 2 != patches:
        raise GloVLMError(
            f"'{source}pos_embed' has {rows} rows: expected a square of patches, and "
            f"{1 + registers} more or none."
        )
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": stated.get("layers") or move.depth(f"{source}blocks."),
        "num_attention_heads": stated.get("num_heads") or _HEADS.get(width) or count_heads(width),
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "qkv_bias": f"{source}blocks.0.attn.qkv.bias" in move,
        "layer_norm_eps": 1e-6,
    }
    if model_type == "vit":
        # With weights that change nothing, its pooler then hands on the class token.
        sizes |= {"intermediate_size": hidden, "pooler_act": "linear"}
    else:
        sizes |= {"mlp_ratio": _mlp_ratio(width, hidden, swiglu), "use_swiglu_ffn": swiglu}
        more = {"dinov2": {"use_mask_token": False}}
        sizes |= more.get(model_type, {"num_register_tokens": registers})
    return AutoConfig.for_model(model_type, **sizes)


def move_vit(move: Move, source: str, target: str, config: Any) -> None:
    """Map timm's vision transformer.

    Args:
        move: The tensors.
        source: Prefix of their names.
        target: Prefix of the module's names.
        config: As `vit_config` made it.
    """
    width, registers = config.hidden_size, getattr(config, "num_register_tokens", 0)
    embeddings = f"{target}embeddings"
    rows = move.shape(f"{source}pos_embed")[1]
    prefix = rows - (config.image_size // config.patch_size) ** 2
    table = move.take(f"{source}pos_embed", 1, rows, width)
    ahead = table[:, :prefix] if prefix else table.new_zeros(1, 1 + registers, width)
    positions = torch.cat([ahead[:, :1], table[:, prefix:]], dim=1)
    move.put(f"{embeddings}.position_embeddings", positions)
    move.copy(f"{source}cls_token", f"{embeddings}.cls_token")
    if move.has(f"{embeddings}.register_tokens"):
        # timm gives the registers positions too, transformers does not: they are added once here.
        tokens = table.new_zeros(1, 0, width)
        if registers:
            tokens = move.take(f"{source}reg_token", 1, registers, width) + ahead[:, 1:]
        move.put(f"{embeddings}.register_tokens", tokens)
        move.fill(f"{embeddings}.mask_token")
    move.layer(f"{source}patch_embed.proj", f"{embeddings}.patch_embeddings.projection")
    is_vit = config.model_type == "vit"
    swiglu = getattr(config, "use_swiglu_ffn", False)
    names = dict(_VIT_BLOCK if is_vit else _DINO_BLOCK)
    if swiglu:
        names["mlp.fc2"] = "mlp.down_proj"
        del names["mlp.fc1"]
    for i in range(config.num_hidden_layers):
        here = f"{source}blocks.{i}"
        there = f"{target}layers.{i}" if is_vit else f"{target}encoder.layer.{i}"
        move.layers(names, here, there)
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [f"{there}.attention.{name}.{part}" for name in _QKV]
            move.split(f"{here}.attn.qkv.{part}", parts)
        for part in ("weight", "bias") if swiglu else ():
            parts = [f"{there}.mlp.{name}.{part}" for name in ("gate_proj", "up_proj")]
            move.split(f"{here}.mlp.fc1.{part}", parts)
        for n in (1, 2) if not is_vit else ():
            if f"{here}.ls{n}.gamma" in move:
                move.copy(f"{here}.ls{n}.gamma", f"{there}.layer_scale{n}.lambda1")
            else:
                move.fill(f"{there}.layer_scale{n}.lambda1", 1.0)
    move.layer(f"{source}norm", f"{target}layernorm")
    if is_vit:
        move.identity(f"{target}pooler.dense")


def bert_config(move: Move, source: str, stated: Mapping[str, Any]) -> Any:
    """Configuration of a BERT; its own configuration wins over the tensors' shapes."""
    if stated.get("model_type", "bert") != "bert":
        raise GloVLMError(f"The text tower is a '{stated['model_type']}': expected a BERT.")
    rows, width = move.shape(f"{source}embeddings.word_embeddings.weight")
    sizes = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": move.depth(f"{source}encoder.layer."),
        "num_attention_heads": stated.get("num_attention_heads") or count_heads(width),
        "intermediate_size": move.shape(f"{source}encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": move.shape(f"{source}embeddings.position_embeddings.weight")[0],
        "type_vocab_size": move.shape(f"{source}embeddings.token_type_embeddings.weight")[0],
    }
    read = (*sizes, "hidden_act", "layer_norm_eps", "pad_token_id")
    return BertConfig(**{**sizes, **{key: stated[key] for key in read if key in stated}})


def move_bert(move: Move, source: str, target: str) -> None:
    """Map a BERT, whose names stay; a pooler that was never trained is the identity."""
    for place in [name for name in move.model.state_dict() if name.startswith(target)]:
        name = source + place.removeprefix(target)
        if not place.startswith(f"{target}pooler.") or name in move:
            move.copy(name, place)
    if f"{target}pooler.dense.weight" not in move.state:
        move.identity(f"{target}pooler.dense")


def mlp_width(move: Move, blocks: str, width: int, stated: Mapping[str, Any]) -> int:
    """Hidden width of CLIP's blocks."""
    if "mlp_ratio" in stated:
        return int(width * stated["mlp_ratio"])
    return move.shape(f"{blocks}0.mlp.c_fc.weight")[0]


def count_heads(width: int, head_width: int = 64) -> int:
    """Number of attention heads, which no tensor shows: as many as fit.

    Raises:
        GloVLMError: They do not fit evenly.
    """
    if width % head_width:
        raise GloVLMError(
            f"A tower {width} wide has no heads {head_width} wide: put the configuration that "
            "states their number beside the weights (open_clip_config.json; for timm, config.json "
            'with {"model_args": {"num_heads": ...}}).'
        )
    return width // head_width


def _mlp_ratio(width: int, hidden: int, swiglu: bool) -> int:
    """Whole MLP ratio from which transformers computes the hidden width of Dinov2's blocks."""
    for ratio in range(1, 33):
        made = (int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio
        if made == hidden:
            return ratio
    raise GloVLMError(
        f"A hidden width of {hidden} in blocks {width} wide cannot be had in transformers' Dinov2: "
        "this checkpoint cannot be converted."
    )


def square(size: Any) -> int:
    """Size of a square, given as a number or as height and width."""
    sides = {int(side) for side in size} if isinstance(size, list | tuple) else {int(size)}
    if len(sides) != 1:
        raise GloVLMError(f"Images and patches must be square, found {size}.")
    return sides.pop()


def assumed(what: str) -> str:
    """Note on an assumption made without a configuration."""
    return f"No configuration beside the weights states otherwise, so this was assumed: {what}."
