"""Tiny real architectures with random weights, and tiny images: what every test runs on.

Each function takes no argument and returns a folder that the whole session shares (never write
into it), or takes a folder and returns a copy of its own below that. `from tiny import tiny_clip`.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

SIZE = 32  # input size of every vision tower
WIDTH = 32  # of every tower
CONTEXT = 48  # longest text, in tokens
SPARE = 16  # rows of each text tower's embedding that no text uses
CLASSES = ("mesangial", "sclerosed", "viable")

CORPUS = (
    "a pathology image of a globally sclerosed glomerulus",
    "a histology picture of a viable glomerulus with open capillary loops",
    "segmental sclerosis, PAS stain: part of the tuft is obliterated by collagen",
    "an ischemic tuft, wrinkled and shrunken away from the capsule of Bowman",
    "mesangial expansion; crescent; atubular; normal glomeruli in H&E, silver, trichrome",
    "this photo shows a kidney biopsy of the class mesangial",
)

_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@cache
def _session() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="glovlm-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _shared(make: Callable[[Path], None]) -> Callable[..., Path]:
    """Make a folder once per session; hand out that one, or a copy below the folder given."""

    @cache
    def once() -> Path:
        folder = _session() / make.__name__
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make(folder)
        return folder

    @wraps(make)
    def get(tmp: Path | None = None) -> Path:
        if tmp is None:
            return once()
        return Path(shutil.copytree(once(), Path(tmp) / make.__name__))

    return get


@_shared
def tiny_clip(folder: Path) -> None:
    """Save a CLIPModel with a byte-pair tokenizer (spare rows at the end) and its transform."""
    tokenizer = _clip_tokenizer("<|endoftext|>", bos=True)
    config = CLIPConfig(
        vision_config={**_TOWER, "image_size": SIZE, "patch_size": 8},
        text_config={**_TOWER, **_text(tokenizer)},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)


@_shared
def tiny_siglip(folder: Path) -> None:
    """Save a SiglipModel: no start token, texts padded to the full context."""
    tokenizer = _clip_tokenizer("<pad>", bos=False)
    config = SiglipConfig(
        vision_config={**_TOWER, "image_size": SIZE, "patch_size": 8},
        text_config={**_TOWER, **_text(tokenizer)},
    )
    SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, **_HALF).save_pretrained(folder)


@_shared
def tiny_siglip2(folder: Path) -> None:
    """Save a Siglip2Model, whose images are flattened patches with a mask and a grid shape."""
    tokenizer = _sentence_tokenizer()
    config = Siglip2Config(
        vision_config={**_TOWER, "patch_size": 8, "num_patches": 16},
        text_config={**_TOWER, **_text(tokenizer)},
    )
    Siglip2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16, **_HALF).save_pretrained(folder)


@_shared
def tiny_dinov2(folder: Path) -> None:
    """Save a Dinov2Model, a vision tower alone."""
    config = Dinov2Config(
        hidden_size=WIDTH,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        initializer_range=0.1,
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    ).save_pretrained(folder)


@_shared
def tiny_bert(folder: Path) -> None:
    """Save a BertModel with a word-piece tokenizer, a text tower alone."""
    tokenizer = _bert_tokenizer()
    config = BertConfig(
        **_TOWER,
        vocab_size=len(tokenizer) + SPARE,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_pair(tmp: Path | None = None) -> str:
    """Name the pair DINOv2 + BERT, as `--backbone` takes it."""
    return f"{tiny_dinov2(tmp)}+{tiny_bert(tmp)}"


def tiny_images(
    folder: Path,
    classes: Sequence[str] = CLASSES,
    per_class: int = 8,
    groups: int = 4,
    *,
    seed: int = 0,
    size: int = 40,
) -> Path:
    """Write an image folder with `metadata.csv` (file_name, label, patient_id).

    A class is a colour and the size of a disc, a patient a tint, and pixels are noisy: learnable
    from few images, though not by everything at once. Patients go round-robin through every class.

    Args:
        folder: Where to write; made when missing.
        classes: Class names; each gets a subfolder.
        per_class: Images of each class.
        groups: Patients.
        seed: Draws the noise.
        size: Height and width in pixels.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(seed)
    tints = rng.normal(0, 8, size=(groups, 3))
    rows, columns = np.mgrid[:size, :size] / (size - 1) - 0.5
    radius = np.hypot(rows, columns)
    lines = ["file_name,label,patient_id"]
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        angle = 2 * np.pi * (k / len(classes) + np.arange(3) / 3)
        colour = 130 + 90 * np.cos(angle)
        disc = (radius < 0.2 + 0.25 * k / len(classes))[..., None]
        for i in range(per_class):
            patient = i % groups
            pixels = np.where(disc, colour, 225.0) + tints[patient]
            pixels = pixels + rng.normal(0, 12, size=pixels.shape)
            file_name = f"{name}/image_{i:02d}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file_name)
            lines.append(f"{file_name},{name},patient_{patient}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + SPARE,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _clip_tokenizer(pad_token: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer on a few sentences; it can spell every text."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _lower()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(dict.fromkeys([pad_token, start, end])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _wrap(tokenizer, start if bos else "", end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=pad_token,
    )


def _bert_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-piece tokenizer: the words of a few sentences, and letters to spell the rest."""
    words = sorted(set(re.findall(r"[a-z]+|[^a-z ]", " ".join(CORPUS).lower())))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [*special, *letters, *(f"##{c}" for c in letters), *words]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = _lower()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _wrap(tokenizer, "[CLS]", "[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def _lower() -> Any:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def _wrap(tokenizer: Tokenizer, start: str, end: str) -> None:
    """Put the start (unless empty) and end token around every text."""
    tokens = [token for token in (start, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )


def _sentence_tokenizer() -> Siglip2Tokenizer:
    """Train what Gemma uses: byte-pair over whole sentences, with a mark in place of a space."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", behavior="merged_with_next")
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    parts = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    result = Siglip2Tokenizer(
        vocab=parts["vocab"], merges=merges, model_max_length=CONTEXT, padding_side="right"
    )
    result.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", result.eos_token_id)]
    )
    return result
