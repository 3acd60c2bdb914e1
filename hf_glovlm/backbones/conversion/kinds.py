"""Kinds of published checkpoints: their encoders and projections."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPConfig, CLIPVisionConfig, VisionTextDualEncoderConfig

from ...errors import GloVLMError
from ...model import GloVLMConfig
from .moving import Converted, Move
from .towers import (
    assumed,
    bert_config,
    clip_text_config,
    count_heads,
    mlp_width,
    move_bert,
    move_clip_blocks,
    move_clip_text,
    move_pooler,
    move_vit,
    square,
    vit_config,
)
from .vocabularies import read_json

# What a checkpoint holds beside the two encoders, by kind.
DROPPED: dict[str, tuple[str, ...]] = {
    # numbers that TorchScript archives carry along; CoCa's captioner
    "open_clip": (
        "input_resolution",
        "context_length",
        "vocab_size",
        "attn_mask",
        "text_decoder.*",
    ),
    # 0 ... 511, which older releases of transformers stored
    "biomedclip": ("text.transformer.embeddings.position_ids",),
    "conch": ("text_decoder.*", "visual.attn_pool_caption.*", "visual.ln_caption.*"),
    "keep": ("text.embeddings.position_ids",),
    # the classifier of the data set it was trained on
    "timm": ("head.*",),
}
# A tensor that only this kind has; the first one present decides.
_MARKS = {
    "visual.attn_pool_contrast.query": "conch",
    "visual_head.0.weight": "keep",
    "visual.trunk.patch_embed.proj.weight": "biomedclip",
    "visual.conv1.weight": "open_clip",
    "patch_embed.proj.weight": "timm",
}
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # numbers of PIL
# The fields of open_clip's configurations that are read, or that do not touch the features.
_READ = {
    "model_cfg": """embed_dim embed_dim_caption vision_cfg text_cfg multimodal_cfg quick_gelu
        custom_text init_logit_scale nonscalar_logit_scale pad_id""",
    "vision_cfg": """layers width head_width num_heads mlp_ratio patch_size image_size
        attentional_pool attn_pooler_queries attn_pooler_heads output_tokens
        attentional_pool_contrast attentional_pool_caption n_queries_contrast n_queries_caption
        patch_dropout pos_embed_type final_ln_after_pool timm_model_name timm_model_pretrained
        timm_proj_bias timm_drop timm_drop_path""",
    "text_cfg": """context_length vocab_size width heads layers mlp_ratio embed_cls pad_id eos_id
        pool_type output_tokens final_ln_after_pool hf_tokenizer_name tokenizer_mode
        tokenizer_kwargs hf_model_name hf_model_pretrained hf_proj_type hf_pooler_type""",
}
# Others may only be off, or have the value that is used anyway.
_GIVEN = {
    "pool_type": "tok",
    "block_type": "default",
    "timm_pool": "token",
    "timm_proj": "linear",
    "proj_type": "linear",
}
_BERT_POOLINGS: dict[str, Literal["cls", "pooler", "mean"]] = {
    "cls_last_hidden_state_pooler": "cls",
    "cls_pooler": "pooler",
    "mean_pooler": "mean",
}


def recognise(names: Mapping[str, Any] | Sequence[str]) -> str:
    """Recognise the kind of a checkpoint by its tensors' names.

    Raises:
        GloVLMError: It is none that is known.
    """
    for mark, kind in _MARKS.items():
        if mark in names:
            return kind
    raise GloVLMError(
        f"The kind of this checkpoint was not recognised: expected one of {', '.join(DROPPED)}; "
        f"its tensors are named {', '.join(list(names)[:3])}, ... A folder in the format of "
        "transformers needs no conversion: load it as it is."
    )


def _convert_open_clip(move: Move, published: Mapping[str, Any]) -> Converted:
    """open_clip: CLIP; or CoCa, with attentional pooling and a class token behind texts."""
    stated = _model_cfg(published)
    prefix = "text." if "text.token_embedding.weight" in move else ""
    pools, appends = "visual.attn_pool.query" in move, f"{prefix}cls_emb" in move
    if not stated:
        heads = "heads 64 wide, 8 heads in the pooling" if pools else "heads 64 wide"
        move.notes.append(assumed(f"GELU (not QuickGELU), {heads}"))
    dim = stated.get("embed_dim") or move.shape("visual.proj")[1]
    act = "quick_gelu" if stated.get("quick_gelu") else "gelu"
    vision = stated.get("vision_cfg", {})
    width, _, patch, _ = move.shape("visual.conv1.weight")
    width, patch = vision.get("width", width), square(vision.get("patch_size", patch))
    grid = math.isqrt(move.shape("visual.positional_embedding")[0] - 1)
    size = square(vision.get("image_size", grid * patch))
    blocks = "visual.transformer.resblocks."
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width(move, blocks, width, vision),
        num_hidden_layers=vision.get("layers") or move.depth(blocks),
        num_attention_heads=count_heads(width, vision.get("head_width", 64)),
        image_size=size,
        patch_size=patch,
        hidden_act=act,
        projection_dim=dim,
    )
    text_config = clip_text_config(move, prefix, stated.get("text_cfg", {}), dim, act)
    if pools or appends:
        root = "backbone."
        move.build(
            GloVLMConfig(
                backbone_config=_pair(vision_config, text_config),
                vision_pooling="attentional" if pools else "pooler",
                pooler_dim=dim if pools else None,
                pooler_heads=vision.get("attn_pooler_heads", 8),
                text_pooling="appended_cls" if appends else "pooler",
                **_linear_projections(dim),
            )
        )
    else:
        root = ""
        towers = {"vision": vision_config.to_dict(), "text": text_config.to_dict()}
        move.build(CLIPConfig(**{f"{t}_config": c for t, c in towers.items()}, projection_dim=dim))
    tower = f"{root}vision_model"
    embeddings = f"{tower}.embeddings"
    move.copy("visual.class_embedding", f"{embeddings}.class_embedding")
    move.copy("visual.conv1.weight", f"{embeddings}.patch_embedding.weight")
    move.copy("visual.positional_embedding", f"{embeddings}.position_embedding.weight")
    move.layer("visual.ln_pre", f"{tower}.pre_layrnorm")
    move_clip_blocks(move, "visual.transformer", tower, vision_config)
    if pools:
        move_pooler(move, "visual.attn_pool", "visual.ln_post")
        move.fill(f"{tower}.post_layernorm.weight", 1.0)  # unused: the pooler has its own norm
        move.fill(f"{tower}.post_layernorm.bias")
    else:
        move.layer("visual.ln_post", f"{tower}.post_layernorm")
    move.transpose("visual.proj", f"{root}visual_projection.weight")
    move_clip_text(move, prefix, root, text_config)
    move.scale(f"{root}logit_scale")
    images = _open_clip_images(published, size)
    return move.converted(images, "clip", text_config.max_position_embeddings - appends)


def _convert_conch(move: Move, published: Mapping[str, Any]) -> Converted:
    """CONCH: a timm trunk with attentional pooling, CoCa's text tower."""
    stated = _model_cfg(published)
    vision = stated.get("vision_cfg", {})
    dim = stated.get("embed_dim") or move.shape("visual.proj_contrast")[1]
    # Its trunk resizes position embeddings with antialiasing, and of transformers' only this one.
    vision_config = vit_config(move, "visual.trunk.", vision, "dinov2_with_registers")
    text_config = clip_text_config(move, "text.", stated.get("text_cfg", {}), dim, "gelu")
    move.build(
        GloVLMConfig(
            backbone_config=_pair(vision_config, text_config),
            vision_pooling="attentional",
            pooler_dim=dim,
            pooler_heads=vision.get("attn_pooler_heads", 8),
            text_pooling="appended_cls",
            **_linear_projections(dim),
        )
    )
    move_vit(move, "visual.trunk.", "backbone.vision_model.", vision_config)
    move_pooler(move, "visual.attn_pool_contrast", "visual.ln_contrast")
    move.transpose("visual.proj_contrast", "backbone.visual_projection.weight")
    move_clip_text(move, "text.", "backbone.", text_config)
    move.scale("backbone.logit_scale")
    size = square(vision.get("image_size", vision_config.image_size))
    images = _images(size, _CLIP_MEAN, _CLIP_STD)
    return move.converted(images, "conch", text_config.max_position_embeddings - 1)


def _convert_biomedclip(move: Move, published: Mapping[str, Any]) -> Converted:
    """BiomedCLIP: open_clip's timm trunk and BERT, with a linear layer and two behind them."""
    stated = _model_cfg(published)
    text = stated.get("text_cfg", {})
    pooling = text.get("hf_pooler_type", "cls_last_hidden_state_pooler")
    if pooling not in _BERT_POOLINGS:
        raise GloVLMError(
            f"text_cfg.hf_pooler_type is '{pooling}': expected {' or '.join(_BERT_POOLINGS)}."
        )
    bert = {**_cached_config(text.get("hf_model_name")), **published.get("text_config", {})}
    vision_config = vit_config(move, "visual.trunk.", stated.get("vision_cfg", {}))
    text_config = bert_config(move, "text.transformer.", bert)
    bias = "visual.head.proj.bias" in move
    is_mlp = "text.proj.0.weight" in move
    move.build(
        GloVLMConfig(
            backbone_config=_pair(vision_config, text_config),
            vision_pooling="cls",
            text_pooling=_BERT_POOLINGS[pooling],
            vision_projection="linear",
            text_projection="mlp" if is_mlp else "linear" if "text.proj.weight" in move else "none",
            text_projection_hidden=move.shape("text.proj.0.weight")[0] if is_mlp else None,
            projection_bias=bias,
            projection_dim=stated.get("embed_dim") or move.shape("visual.head.proj.weight")[0],
        )
    )
    move_vit(move, "visual.trunk.", "backbone.vision_model.", vision_config)
    move_bert(move, "text.transformer.", "backbone.text_model.")
    move.layer("visual.head.proj", "backbone.visual_projection")
    for part in (".0", ".2", ""):
        target = f"backbone.text_projection{part}"
        if move.has(f"{target}.weight"):
            move.copy(f"text.proj{part}.weight", f"{target}.weight")
            if bias:  # one setting holds for both towers, and this one never has any
                move.fill(f"{target}.bias")
    move.scale("backbone.logit_scale")
    length = min(text.get("context_length", 256), text_config.max_position_embeddings)
    return move.converted(
        _open_clip_images(published, vision_config.image_size), "wordpiece", length
    )


def _convert_keep(move: Move, published: Mapping[str, Any]) -> Converted:
    """KEEP: a timm ViT with LayerScale and two linear layers, a BERT with its pooler."""
    vision_config = vit_config(move, "visual.", published.get("vision_config", {}))
    text_config = bert_config(move, "text.", published.get("text_config", {}))
    move.build(
        GloVLMConfig(
            backbone_config=_pair(vision_config, text_config),
            vision_pooling="cls",
            text_pooling="pooler",
            vision_projection="mlp",
            vision_projection_hidden=move.shape("visual_head.0.weight")[0],
            projection_dim=text_config.hidden_size,
        )
    )
    move_vit(move, "visual.", "backbone.vision_model.", vision_config)
    move_bert(move, "text.", "backbone.text_model.")
    for part in ("0", "2"):
        move.layer(f"visual_head.{part}", f"backbone.visual_projection.{part}")
    move.scale("backbone.logit_scale")
    images = _images(vision_config.image_size, _IMAGENET_MEAN, _IMAGENET_STD)
    return move.converted(images, "wordpiece", min(256, text_config.max_position_embeddings))


def _convert_timm(move: Move, published: Mapping[str, Any]) -> Converted:
    """timm: a vision transformer without text tower."""
    config = vit_config(move, "", published.get("model_args", {}))
    move.build(config)
    move_vit(move, "", "", config)
    transform = published.get("pretrained_cfg", {})
    if not transform:
        move.notes.append(assumed("ImageNet's mean and standard deviation, crops to the edge"))
    images = _images(
        config.image_size,
        transform.get("mean", _IMAGENET_MEAN),
        transform.get("std", _IMAGENET_STD),
        resize=math.floor(config.image_size / transform.get("crop_pct", 1.0)),
        interpolation=transform.get("interpolation", "bicubic"),
        mode="squash" if transform.get("crop_mode") == "squash" else "shortest",
    )
    return move.converted(images)


CONVERTERS: dict[str, Callable[[Move, Mapping[str, Any]], Converted]] = {
    "open_clip": _convert_open_clip,
    "biomedclip": _convert_biomedclip,
    "conch": _convert_conch,
    "keep": _convert_keep,
    "timm": _convert_timm,
}


def _pair(vision_config: Any, text_config: Any) -> Any:
    return VisionTextDualEncoderConfig(
        vision_config=vision_config.to_dict(), text_config=text_config.to_dict()
    )


def _linear_projections(dim: int) -> dict[str, Any]:
    return {
        "vision_projection": "linear",
        "text_projection": "linear",
        "projection_bias": False,
        "projection_dim": dim,
    }


def _model_cfg(published: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's configuration, every field checked.

    Raises:
        GloVLMError: A field changes the features in a way that is not supported.
    """
    stated = dict(published.get("model_cfg", {}))
    for name, read in _READ.items():
        section = stated if name == "model_cfg" else stated.get(name, {})
        for key in section.keys() - set(read.split()):
            value = section[key]
            if value not in (None, False, "", _GIVEN.get(key)):
                expected = f"expected '{_GIVEN[key]}'" if key in _GIVEN else "it is not supported"
                raise GloVLMError(f"{name}.{key} is {value!r}: {expected}.")
    return stated


def _cached_config(name: str | None) -> dict[str, Any]:
    """Configuration of the text tower that a checkpoint names: a folder, or in the Hub's cache."""
    if not name:
        return {}
    if Path(name).is_dir():
        return read_json(Path(name) / "config.json")
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") < 2 else None
    return read_json(Path(cached)) if isinstance(cached, str) else {}


def _open_clip_images(published: Mapping[str, Any], size: int) -> dict[str, Any]:
    transform = published.get("preprocess_cfg", {})
    return _images(
        size,
        transform.get("mean", _CLIP_MEAN),
        transform.get("std", _CLIP_STD),
        interpolation=transform.get("interpolation", "bicubic"),
        mode=transform.get("resize_mode", "shortest"),
    )


def _images(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mode: str = "shortest",
) -> dict[str, Any]:
    """Arguments of a `CLIPImageProcessor`: resize the shorter side, crop the centre; or squash."""
    if interpolation not in _RESAMPLE or mode not in ("shortest", "squash"):
        raise GloVLMError(
            f"Images are resized in a way that is not supported ('{interpolation}', '{mode}'): "
            f"expected {' or '.join(_RESAMPLE)}, and 'shortest' or 'squash'."
        )
    square = {"height": size, "width": size}
    return {
        "size": square if mode == "squash" else {"shortest_edge": resize or size},
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "resample": _RESAMPLE[interpolation],
        "image_mean": list(mean),
        "image_std": list(std),
    }
