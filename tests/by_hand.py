"""Towers to insert something into, and their forward passes written out block by block."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from hf_glovlm.backbones import load_backbone
from hf_glovlm.model import GloVLMConfig, GloVLMModel

WORDS = ["a", "photo", "of", "a"]
# Of several shapes, so that SigLIP 2 has images with patches that only pad.
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 36 + 9 * i, 3), dtype=np.uint8))
    for i in range(4)
]
DUAL: dict[str, Callable[..., Path]] = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "siglip2": tiny_siglip2,
}
BACKBONES = (*DUAL, "pair")


@cache
def _backbone(name: str) -> tuple[Any, Any]:
    if name == "deep":  # five vision and four text blocks
        stock = CLIPModel.from_pretrained(tiny_clip()).config.to_dict()
        stock["vision_config"]["num_hidden_layers"] = 5
        stock["text_config"]["num_hidden_layers"] = 4
        torch.manual_seed(0)
        towers = CLIPModel(CLIPConfig(**stock))
        _, processor = load_backbone(str(tiny_clip()))
        return GloVLMModel(GloVLMConfig(backbone_config=towers.config), towers).eval(), processor
    model, processor = load_backbone(tiny_pair() if name == "pair" else str(DUAL[name]()))
    if name == "pair":
        torch.manual_seed(0)
        model.backbone.set_visual_projection(torch.randn(32, 64) / 8, torch.randn(32) / 8)
    return model, processor


def loaded(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A frozen backbone with a joint space, as `adapt` hands it to a method."""
    model, processor = copy.deepcopy(_backbone(name))
    return model.to(dtype).requires_grad_(False), processor


def pixels(processor: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The four images as a tower takes them."""
    inputs = dict(processor(images=IMAGES, return_tensors="pt"))
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def one(inputs: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """One of them, still a batch."""
    return {k: v[i : i + 1] for k, v in inputs.items()}


def shake(*modules: nn.Module) -> None:
    """Give everything that trains a value that shows."""
    torch.manual_seed(1)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)


def features(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Image features `[n, dim]`, without a gradient."""
    with torch.no_grad():
        result: Tensor = model.get_image_features(**inputs).pooler_output
    return result


def unit(x: Tensor) -> Tensor:
    """Rows of length one."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


# --------------------------------------------------------------------- forward passes, written out

Change = Callable[[int, Tensor], Tensor]


def same_tokens(layer: int, x: Tensor) -> Tensor:
    """No change."""
    return x


@torch.no_grad()
def image_by_hand(
    plain: Any,
    inputs: Mapping[str, Tensor],
    before: Change = same_tokens,
    after: Change = same_tokens,
    first: Tensor | None = None,
    added: Change | None = None,
) -> Tensor:
    """Features of one image: `before` and `after` see its tokens `[length, width]` at each block.

    `first` are tokens that stand before the first norm; `added` sees what the MLP of a block adds.

    Further tokens stand at the end, patches that only pad are left out: so no mask is needed.
    """
    backbone, tower = plain.backbone, plain.backbone.vision_model
    kind = type(tower).__name__
    x: Tensor
    if kind == "Siglip2VisionModel":
        x = tower.embeddings(inputs["pixel_values"], inputs["spatial_shapes"])
        x = x[:, inputs["pixel_attention_mask"][0].bool()]
    else:
        x = tower.embeddings(inputs["pixel_values"])
    length = x.shape[1]
    if first is not None:
        x = torch.cat([x, first[None]], 1)
    if kind == "CLIPVisionModel":
        x = tower.pre_layrnorm(x)
    blocks = tower.encoder.layer if kind == "Dinov2Model" else tower.encoder.layers
    for layer, block in enumerate(blocks):
        x = before(layer, x[0])[None]
        x = block(x, None) if added is None else block_by_hand(block, layer, x, added)
        x = after(layer, x[0])[None]
    x = x[:, :length]
    if kind == "CLIPVisionModel":
        feature = backbone.visual_projection(tower.post_layernorm(x[:, 0]))
    elif kind == "Dinov2Model":
        x = tower.layernorm(x)
        pooled = torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)
        feature = backbone.visual_projection(unit(pooled))
    else:
        feature = tower.head(tower.post_layernorm(x))
    result: Tensor = feature[0]
    return result


def block_by_hand(block: Any, layer: int, x: Tensor, added: Change) -> Tensor:
    """A block in its two halves, with a change of what the second adds."""
    if type(block).__name__ == "Dinov2Layer":
        x = x + block.layer_scale1(block.attention(block.norm1(x))[0])
        more = block.layer_scale2(block.mlp(block.norm2(x)))
    else:
        x = x + block.self_attn(block.layer_norm1(x), attention_mask=None)[0]
        more = block.mlp(block.layer_norm2(x))
    return x + added(layer, more[0])[None]


@torch.no_grad()
def text_by_hand(plain: Any, vectors: Tensor, before: Change = same_tokens) -> Tensor:
    """Feature of one text, given its token embeddings `[length, width]`; it ends with its end."""
    tower, length = plain.backbone.text_model, len(vectors)
    kind = type(tower).__name__
    mask = None
    if kind == "BertModel":
        x = vectors + tower.embeddings.position_embeddings.weight[:length]
        x = tower.embeddings.LayerNorm(x + tower.embeddings.token_type_embeddings.weight[0])
        blocks = tower.encoder.layer
    else:
        x = vectors + tower.embeddings.position_embedding.weight[:length]
        blocks = tower.encoder.layers
    if kind == "CLIPTextModel":  # a token sees those before it
        mask = torch.full((1, 1, length, length), -torch.inf, dtype=x.dtype).triu(1)
    for layer, block in enumerate(blocks):
        x = block(before(layer, x)[None], mask)[0]
    feature: Tensor = x.mean(0) if kind == "BertModel" else tower.final_layer_norm(x)[-1]
    if kind == "CLIPTextModel":
        feature = plain.backbone.text_projection(feature)
    elif kind != "BertModel":
        feature = tower.head(feature)
    return feature


def replacing(table: Tensor) -> Change:
    """VPT: tokens at the end of block 0's input, replaced before each of the next blocks."""
    tokens = table.shape[1]

    def before(layer: int, x: Tensor) -> Tensor:
        if layer >= len(table):
            return x
        return torch.cat([x if layer == 0 else x[:-tokens], table[layer]])

    return before


def deeper_tokens(table: Tensor) -> Change:
    """Deep tokens whose first stand at the end already: replaced before each of the next blocks."""
    replace = replacing(table)
    return lambda layer, x: x if layer == 0 else replace(layer, x)


def word_vectors(plain: Any, processor: Any, words: list[str]) -> Tensor:
    """One vector a word `[words, width]`: the mean of its pieces."""
    table: Tensor = plain.get_input_embeddings().weight
    pieces = [processor.tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]
    return torch.stack([table[ids].mean(0) for ids in pieces])


def start_tokens(processor: Any) -> int:
    """How many tokens stand in front of every text: SigLIP has none."""
    first = processor.tokenizer("viable")["input_ids"][0]
    return int(first in (processor.tokenizer.bos_token_id, processor.tokenizer.cls_token_id))


def spliced(plain: Any, processor: Any, text: str, context: Tensor) -> Tensor:
    """Token embeddings of a text with the context behind its start token."""
    ids, begin = processor.tokenizer(text)["input_ids"], start_tokens(processor)
    if "siglip" in plain.config.backbone_config.model_type:  # reads every text at its full length
        longest = plain.config.backbone_config.text_config.max_position_embeddings
        ids += [processor.tokenizer.pad_token_id] * (longest - len(ids) - len(context))
    vectors = plain.get_input_embeddings().weight[ids]
    return torch.cat([vectors[:begin], context, vectors[begin:]])
