"""Synthetic material of benches: random towers, images, class words and features."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from ...backbones import load_backbone
from ...data import load_classes, load_dataset
from ...model import GloVLMConfig, GloVLMModel
from ..phantoms import render_glomerulus, write_cohort


@dataclass(frozen=True)
class Shape:
    """Sizes of a random CLIP; the default is ViT-B/16."""

    image_size: int = 224
    patch: int = 16
    vision: tuple[int, int] = (768, 12)  # width, blocks
    text: tuple[int, int] = (512, 12)
    context: int = 77


def random_clip(shape: Shape) -> tuple[Any, Any]:
    """A CLIP of random weights with the tokenizer of `mini`, and its processor."""
    known, processor = _load_mini()
    processor = deepcopy(processor)  # its sizes are set below
    torch.manual_seed(0)

    def tower(width: int, blocks: int) -> dict[str, int]:
        heads = max(1, width // 64)
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        return {**sizes, "num_hidden_layers": blocks, "num_attention_heads": heads}

    clip = CLIPModel(
        CLIPConfig(
            vision_config={
                **tower(*shape.vision),
                "image_size": shape.image_size,
                "patch_size": shape.patch,
            },
            text_config={
                **tower(*shape.text),
                "max_position_embeddings": shape.context,
                "vocab_size": known.vocab_size,
                "eos_token_id": known.eos_token_id,
                "bos_token_id": known.bos_token_id,
                "pad_token_id": known.pad_token_id,
            },
            projection_dim=shape.text[0],
        )
    ).eval()
    images = processor.image_processor
    images.size = {"shortest_edge": shape.image_size}
    images.crop_size = {"height": shape.image_size, "width": shape.image_size}
    processor.max_length = shape.context
    config = GloVLMConfig(backbone_config=clip.config, backbone_name="random weights")
    return GloVLMModel(config, backbone=clip).eval(), processor


@cache
def _load_mini() -> tuple[Any, Any]:
    """Text configuration and processor of `mini`."""
    model, processor = load_backbone("mini")
    return model.config.backbone_config.text_config, processor


@contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """Context in which features and graphs are kept in a folder, not in the user's cache."""
    before = os.environ.get("GLOVLM_CACHE")
    os.environ["GLOVLM_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["GLOVLM_CACHE"]
        if before is not None:
            os.environ["GLOVLM_CACHE"] = before


def synthetic_images(folder: Path, n_patients: int, per_patient: int) -> Any:
    """Rows of a small synthetic cohort on disk."""
    cohort = write_cohort(folder / "cohort", n_patients, per_patient, seed=0)
    return load_dataset(cohort)["all"]


def write_jpegs(folder: Path, n: int, side: int) -> Any:
    """Rows of JPEG files with as much fine structure as tissue has, each of its own content."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = render_glomerulus("viable", seed=0).image.resize((side, side))
    paths = [str(folder / f"{i:04d}.jpg") for i in range(n)]
    for path in paths:
        noisy = np.asarray(picture) + rng.normal(0, 8, size=(side, side, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    features = Features({"image": ImageColumn(decode=False)})
    return Dataset.from_dict({"image": paths}, features=features)


def class_words(n_classes: int) -> list[Any]:
    """Classes with their prompts, as many as asked for."""
    words = ["viable", "ischemic", "sclerotic", "segmental", "atubular", "crescent", "nodular"]
    return load_classes(
        [words[k % len(words)] + f" {k}" * (k >= len(words)) for k in range(n_classes)]
    )


def draw_clusters(n_classes: int, shots: int, dim: int, rows: int) -> tuple[Any, ...]:
    """Random features around class texts: rows, their labels, support, its labels, texts."""
    draw = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    texts = unit(torch.randn(n_classes, dim, generator=draw), dim=-1)

    def around(labels: Any) -> Any:
        noise = torch.randn(len(labels), dim, generator=draw) * 1.5 / dim**0.5
        return unit(texts[labels] + noise, dim=-1)

    labels = torch.arange(rows) % n_classes
    owners = torch.arange(n_classes).repeat_interleave(shots)
    return around(labels), labels, around(owners), owners, texts
