"""Folders with tiny random checkpoints in each published layout: names and files as published.

Sizes are small; what follows from a width alone stays as it is there (heads of 64). Each function
writes into a folder and returns it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import CORPUS, SPARE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WIDTH, DEPTH, PATCH = 128, 2, 8
DIM, CONTEXT = 64, 48
State = dict[str, Tensor]


def quiltnet(folder: Path, size: int = 32, *, quick: bool = True) -> Path:
    """Write open_clip's CLIP layout, with CLIP's byte-pair vocabulary."""
    vocabulary = _clip_vocabulary(folder)
    tensors = {
        "positional_embedding": [CONTEXT, WIDTH],
        "text_projection": [WIDTH, DIM],
        "visual.class_embedding": [WIDTH],
        "visual.positional_embedding": [1 + (size // PATCH) ** 2, WIDTH],
        "visual.proj": [WIDTH, DIM],
        "visual.conv1.weight": [WIDTH, 3, PATCH, PATCH],
        **_norm("visual.ln_pre"),
        **_norm("visual.ln_post"),
        **_clip_blocks("visual.transformer."),
        **_clip_blocks("transformer."),
        "token_embedding.weight": [vocabulary, WIDTH],
        **_norm("ln_final"),
    }
    config = {
        "embed_dim": DIM,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": size, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": WIDTH,
            "heads": 2,
            "layers": DEPTH,
        },
    }
    _write_json(folder / "open_clip_config.json", {"model_cfg": config})
    torch.save(_fill(tensors), folder / "open_clip_pytorch_model.bin")
    return folder


def pathgen_clip(folder: Path, size: int = 32) -> Path:
    """Write the same as bare weights of its own name, as a training script stores them."""
    quiltnet(folder, size)
    (folder / "open_clip_config.json").unlink()
    weights = folder / "open_clip_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, weights)
    weights.rename(folder / "pathgenclip.pt")
    return folder


def biomedclip(folder: Path, size: int = 32) -> Path:
    """Write open_clip's layout around a timm trunk and a BERT."""
    vocabulary = _wordpiece(folder)
    tensors = {
        **_vit("visual.trunk.", size),
        "visual.head.proj.weight": [DIM, WIDTH],
        **_bert("text.transformer.", vocabulary),
        "text.proj.0.weight": [96, WIDTH],
        "text.proj.2.weight": [DIM, 96],
    }
    config = {
        "embed_dim": DIM,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": size,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": CONTEXT,
        },
    }
    preprocess = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    _write_json(
        folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess}
    )
    torch.save(_fill(tensors), folder / "open_clip_pytorch_model.bin")
    return folder


def conch(folder: Path, size: int = 32) -> Path:
    """Write CoCa as CONCH stores it, its captioner included."""
    vocabulary = _conch_tokenizer(folder)
    pool = "visual.attn_pool_contrast"
    tensors = {
        "text.text_projection": [WIDTH, DIM],
        "text.cls_emb": [WIDTH],
        "text.positional_embedding": [CONTEXT, WIDTH],
        "text.token_embedding.weight": [vocabulary, WIDTH],
        **_clip_blocks("text.transformer."),
        **_norm("text.ln_final"),
        "visual.proj_contrast": [DIM, DIM],
        **_vit("visual.trunk.", size),
        f"{pool}.query": [1, DIM],
        f"{pool}.attn.q_proj_weight": [DIM, DIM],
        f"{pool}.attn.k_proj_weight": [DIM, WIDTH],
        f"{pool}.attn.v_proj_weight": [DIM, WIDTH],
        f"{pool}.attn.in_proj_bias": [3 * DIM],
        **_linear(f"{pool}.attn.out_proj", DIM, DIM),
        **_norm(f"{pool}.ln_q", DIM),
        **_norm(f"{pool}.ln_k"),
        **_norm("visual.ln_contrast", DIM),
        "visual.attn_pool_caption.query": [5, WIDTH],
        **_norm("visual.ln_caption"),
        "text_decoder.text_projection": [WIDTH, vocabulary],
    }
    torch.save(_fill(tensors), folder / "pytorch_model.bin")
    return folder


def keep(folder: Path, size: int = 32) -> Path:
    """Write KEEP: code of its own beside a timm trunk with LayerScale and a BERT."""
    vocabulary = _wordpiece(folder)
    tensors = {
        **_vit("visual.", size, scaled=True),
        **_linear("visual_head.0", 96, WIDTH),
        **_linear("visual_head.2", WIDTH, 96),
        **_bert("text.", vocabulary),
    }
    config = {
        "architectures": ["KEEPModel"],
        "auto_map": {"AutoModel": "modeling_keep.KEEPModel"},
        "model_type": "keep",
        "text_config": {"hidden_size": WIDTH, "num_attention_heads": 2, "vocab_size": vocabulary},
        "vision_config": {"img_size": size, "init_values": 1e-5},
    }
    _write_json(folder / "config.json", config)
    save_file(_fill(tensors), folder / "model.safetensors")
    return folder


def uni(folder: Path, size: int = 32) -> Path:
    """Write a vision transformer of timm with LayerScale."""
    arguments = {"img_size": size, "init_values": 1e-5, "dynamic_img_size": True}
    _timm(folder, size, arguments, scaled=True)
    return folder


def virchow2(folder: Path, size: int = 32) -> Path:
    """Write one with registers and SwiGLU."""
    arguments = {"img_size": size, "init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375}
    _timm(folder, size, arguments, scaled=True, registers=4, gated=344)
    return folder


LAYOUTS: dict[str, Callable[..., Path]] = {
    "open_clip": quiltnet,
    "biomedclip": biomedclip,
    "conch": conch,
    "keep": keep,
    "timm": uni,
}


def _timm(folder: Path, size: int, arguments: dict[str, Any], **kind: Any) -> None:
    config = {
        "architecture": "vit_large_patch16_224",
        "num_classes": 0,
        "num_features": WIDTH,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    state = _fill(_vit("", size, **kind))
    torch.save({k: v for k, v in state.items() if k != "logit_scale"}, folder / "pytorch_model.bin")


# ------------------------------------------------------------------------------ names and shapes


def _fill(shapes: dict[str, list[int]]) -> State:
    """Random tensors: norms near one, so that features vary, and a usual logit scale."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    for name, tensor in state.items():
        if tensor.dim() == 1 and not name.endswith(("bias", "emb", "embedding")):
            tensor += 1
    return {**state, "logit_scale": torch.tensor(3.0)}


def _norm(name: str, width: int = WIDTH) -> dict[str, list[int]]:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def _linear(name: str, rows: int, columns: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def _clip_blocks(prefix: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i in range(DEPTH):
        block = f"{prefix}resblocks.{i}"
        found |= {
            **_norm(f"{block}.ln_1"),
            f"{block}.attn.in_proj_weight": [3 * WIDTH, WIDTH],
            f"{block}.attn.in_proj_bias": [3 * WIDTH],
            **_linear(f"{block}.attn.out_proj", WIDTH, WIDTH),
            **_norm(f"{block}.ln_2"),
            **_linear(f"{block}.mlp.c_fc", 4 * WIDTH, WIDTH),
            **_linear(f"{block}.mlp.c_proj", WIDTH, 4 * WIDTH),
        }
    return found


def _vit(
    prefix: str, size: int, *, scaled: bool = False, registers: int = 0, gated: int = 0
) -> dict[str, list[int]]:
    """timm's names; `gated` is the hidden width of a SwiGLU, whose `fc1` stacks two."""
    found = {
        "cls_token": [1, 1, WIDTH],
        "pos_embed": [1, 1 + registers + (size // PATCH) ** 2, WIDTH],
        "patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [WIDTH],
        **_norm("norm"),
    }
    if registers:
        found["reg_token"] = [1, registers, WIDTH]
    for i in range(DEPTH):
        found |= {
            **_norm(f"blocks.{i}.norm1"),
            **_linear(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH),
            **_linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH),
            **_norm(f"blocks.{i}.norm2"),
            **_linear(f"blocks.{i}.mlp.fc1", 2 * gated or 4 * WIDTH, WIDTH),
            **_linear(f"blocks.{i}.mlp.fc2", WIDTH, gated or 4 * WIDTH),
        }
        if scaled:
            found |= {f"blocks.{i}.ls1.gamma": [WIDTH], f"blocks.{i}.ls2.gamma": [WIDTH]}
    return {f"{prefix}{name}": shape for name, shape in found.items()}


def _bert(prefix: str, vocabulary: int) -> dict[str, list[int]]:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=CONTEXT,
    )
    with torch.device("meta"):
        state = BertModel(config).state_dict()
    return {f"{prefix}{name}": list(tensor.shape) for name, tensor in state.items()}


# ------------------------------------------------------------------------------------- tokenizers


def _clip_vocabulary(folder: Path) -> int:
    """Write `vocab.json` and `merges.txt` as CLIP has them: bytes first, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *model["vocab"]])
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return len(vocabulary)


def _conch_tokenizer(folder: Path) -> int:
    start, end, pad = "<start_of_text>", "<end_of_text>", "<pad>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[pad, start, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=special
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def _wordpiece(folder: Path) -> int:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size() + SPARE


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
