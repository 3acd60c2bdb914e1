"""Published checkpoints become our modules: the same features, and every wrong tensor is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CORPUS, tiny_bert, tiny_clip
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tolerance import assert_same_numbers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
)

from hf_glovlm.backbones import conversion, load_backbone
from hf_glovlm.backbones.conversion import KINDS, convert_checkpoint, convert_tensors, read_tensors
from hf_glovlm.errors import GloVLMError
from hf_glovlm.model.towers import append_class_token

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TEXTS = (
    "a globally sclerosed glomerulus",
    "Bowman\u2019s capsule, PAS stain (40x): \u201cnormal\u201d!",
    "x",
)
State = dict[str, Tensor]


def scatter(module: nn.Module) -> nn.Module:
    """Random weights of a size that makes features neither vanish nor explode."""
    for name, p in module.named_parameters():
        if p.dim() > 0:
            nn.init.normal_(p, std=0.02 if "token_embedding" in name else p.shape[-1] ** -0.5)
            if p.dim() == 1 and name.endswith("weight"):
                p.data += 1
    return module.eval()


def publish(folder: Path, state: State, config: Any = None, **more: Any) -> Path:
    """Write a checkpoint as open_clip does, or with the configuration of timm."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    if config is not None:
        content = {"model_cfg": config, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
    if more:
        (folder / "config.json").write_text(json.dumps(more))
    return folder


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert 0.05 < theirs.std() < 50
    assert (ours - theirs).abs().max() <= tolerance


SIZES = {
    "embed_dim": 48,
    "vision_cfg": {"layers": 2, "width": 128, "image_size": 64},
    "text_cfg": {"layers": 2, "width": 64, "heads": 4},
}
COCA = {**SIZES, "embed_dim": 96, "multimodal_cfg": {"layers": 1, "width": 64, "heads": 4}}
SQUARE_POOLER = {**COCA, "embed_dim": 128}  # as wide as the tower, so that torch stacks q, k, v


def build(name: str, sizes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One of open_clip's architectures, made smaller, and its configuration."""
    config = open_clip.get_model_config(name)
    for key, value in sizes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    module = (
        open_clip.CoCa
        if "multimodal_cfg" in config
        else open_clip.CustomTextCLIP
        if "hf_model_name" in config["text_cfg"]
        else open_clip.CLIP
    )
    return scatter(module(**arguments)), config


@pytest.mark.parametrize(
    ("name", "sizes", "model_type", "act"),
    [
        ("ViT-B-32", SIZES, "clip", "gelu"),
        ("ViT-B-32-quickgelu", SIZES, "clip", "quick_gelu"),
        pytest.param("ViT-B-16", SIZES, "clip", "gelu", marks=pytest.mark.long),
        ("coca_ViT-B-32", COCA, "glovlm", "gelu"),
        ("coca_ViT-B-32", SQUARE_POOLER, "glovlm", "gelu"),
    ],
)
def test_open_clip(
    name: str, sizes: dict[str, Any], model_type: str, act: str, tmp_path: Path
) -> None:
    theirs, config = build(name, sizes)
    source = publish(tmp_path / "source", theirs.state_dict(), config)
    report = convert_checkpoint(source, tmp_path / "out")
    assert (report.kind, report.model_type) == ("open_clip", model_type)
    assert report.has_tokenizer
    assert report.notes == ()
    assert all("decoder" in n or n == "visual.attn_pool.query[1:]" for n in report.dropped)
    model, processor = load_backbone(str(tmp_path / "out"))
    assert model.config.backbone_config.text_config.hidden_act == act
    assert model.has_joint_space
    images = torch.randn(2, 3, 64, 64)
    ids = open_clip.tokenize(list(TEXTS), context_length=theirs.context_length)
    with torch.no_grad():
        assert_same(
            model.get_image_features(images).pooler_output,
            theirs.encode_image(images, normalize=False),
        )
        expected = theirs.encode_text(ids, normalize=False)
        assert_same(model.get_text_features(ids).pooler_output, expected)
        ours = processor(text=list(TEXTS), return_tensors="pt")
        assert ours["input_ids"].shape[1] < 30  # cut to the longest text
        assert_same(model.get_text_features(**ours).pooler_output, expected)
    assert model.logit_scale.equal(theirs.logit_scale)
    assert processor.max_length == theirs.context_length


def biomedclip(folder: Path) -> tuple[Any, dict[str, Any]]:
    """open_clip's timm trunk and BERT, its text tower configured by a folder."""
    BertConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        layer_norm_eps=1e-6,
    ).save_pretrained(folder)
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
            "hf_model_pretrained": False,
        },
    }
    return scatter(open_clip.CustomTextCLIP(**config)), config


@pytest.mark.parametrize("change", ["", "mean_pooler", "cls_pooler", "linear", "vision bias"])
def test_biomedclip(change: str, tmp_path: Path) -> None:
    theirs, config = biomedclip(tmp_path / "bert")
    if change:
        field = "hf_pooler_type" if "pooler" in change else "hf_proj_type"
        config["text_cfg"][field] = change if change != "vision bias" else "mlp"
        config["vision_cfg"]["timm_proj_bias"] = change == "vision bias"
        theirs = scatter(open_clip.CustomTextCLIP(**config))
    state = theirs.state_dict()
    state["text.transformer.embeddings.position_ids"] = torch.arange(40)[None]
    source = publish(tmp_path / "source", state, config)
    report = convert_checkpoint(source, tmp_path / "out")
    assert (report.kind, report.model_type) == ("biomedclip", "glovlm")
    assert report.dropped == ("text.transformer.embeddings.position_ids",)
    assert not report.has_tokenizer
    assert "tokenizer" in report.notes[0]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 224, 224)
    ids = torch.randint(1, 120, (3, 12))
    ids[1, 7:] = 0
    with torch.no_grad():
        assert_same(model.get_image_features(images).pooler_output, theirs.encode_image(images))
        ours = model.get_text_features(ids, attention_mask=(ids != 0).long()).pooler_output
        assert_same(ours, theirs.encode_text(ids))
        assert_same(ours, theirs.encode_text(F.pad(ids, (0, 20))))


def vit(**settings: Any) -> Any:
    """A small vision transformer of timm."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    return scatter(timm.models.VisionTransformer(**{**sizes, "num_classes": 0, **settings}))


def large(*case: Any) -> Any:
    """A published size that takes long; the code is that of the small one."""
    return pytest.param(*case, marks=pytest.mark.long)


SWIGLU = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.34}
SMALL = {"num_heads": 4}


@pytest.mark.parametrize(
    ("make", "stated", "model_type"),
    [
        (lambda: vit(), SMALL, "vit"),
        (lambda: vit(qkv_bias=False), SMALL, "vit"),
        (lambda: vit(num_classes=7), SMALL, "vit"),
        (lambda: vit(no_embed_class=True), SMALL, "vit"),
        (lambda: vit(init_values=0.1), SMALL, "dinov2"),
        (lambda: vit(init_values=0.1, no_embed_class=True), SMALL, "dinov2"),
        (lambda: vit(**SWIGLU), SMALL, "dinov2"),
        (lambda: vit(reg_tokens=4), SMALL, "dinov2_with_registers"),
        (lambda: vit(reg_tokens=4, init_values=0.1), SMALL, "dinov2_with_registers"),
        (
            lambda: vit(reg_tokens=2, no_embed_class=True),
            {**SMALL, "no_embed_class": True},
            "dinov2_with_registers",
        ),
        (lambda: vit(reg_tokens=4, init_values=0.1, **SWIGLU), SMALL, "dinov2_with_registers"),
        (lambda: named("vit_small_patch16_224"), {}, "vit"),
        large(lambda: named("vit_base_patch16_224"), {}, "vit"),
        large(lambda: named("vit_large_patch16_224"), {}, "vit"),
        (lambda: named("vit_small_patch16_224", init_values=0.1), {}, "dinov2"),
        large(lambda: named("vit_base_patch16_224", reg_tokens=4), {}, "dinov2_with_registers"),
        large(lambda: named("vit_large_patch16_224", init_values=0.1), {}, "dinov2"),
        large(
            lambda: named(
                "vit_huge_patch14_224",
                init_values=0.1,
                reg_tokens=4,
                **SWIGLU | {"mlp_ratio": 5.3375},
            ),
            {},
            "dinov2_with_registers",
        ),
    ],
)
def test_timm(
    make: Callable[[], Any], stated: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    theirs = make()
    transform = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    source = publish(
        tmp_path / "source", theirs.state_dict(), model_args=stated, pretrained_cfg=transform
    )
    report = convert_checkpoint(source, tmp_path / "out")
    assert (report.kind, report.model_type) == ("timm", model_type)
    assert report.notes == ()
    assert report.dropped in ((), ("head.weight", "head.bias"))
    model, loading = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
    size = theirs.patch_embed.img_size[0]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        outputs, expected = model.eval()(images), theirs.forward_features(images)
    assert_same(outputs.last_hidden_state, expected, 2e-5 if size == 224 else 1e-5)
    assert_same(outputs.pooler_output, expected[:, 0])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size["shortest_edge"] == int(size / 0.9)
    assert (processor.crop_size["height"], processor.resample) == (size, 3)
    assert list(processor.image_mean) == transform["mean"]
    assert list(processor.image_std) == transform["std"]


def named(name: str, **settings: Any) -> Any:
    """A vision transformer of timm as it is, but for one block instead of many."""
    return scatter(timm.create_model(name, depth=1, num_classes=0, **settings))


def test_keep(tmp_path: Path) -> None:
    """Linear-GELU-Linear behind the class token; the text is what BERT's pooler says."""
    vision = vit(init_values=0.1)
    text = scatter(AutoModel.from_pretrained(tiny_bert()))
    head = scatter(nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 32)))
    state = {"logit_scale": torch.tensor(3.2)}
    state |= {f"visual.{k}": v for k, v in vision.state_dict().items()}
    state |= {f"visual_head.{k}": v for k, v in head.state_dict().items()}
    state |= {f"text.{k}": v for k, v in text.state_dict().items()}
    source = tmp_path / "source"
    published = {"vision_config": SMALL, "text_config": text.config.to_dict()}
    publish(source, state, **published)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((tiny_bert() / file).read_bytes())
    report = convert_checkpoint(source, tmp_path / "out")
    assert (report.kind, report.has_tokenizer, report.notes) == ("keep", True, ())
    model, processor = load_backbone(str(tmp_path / "out"))
    images = torch.randn(2, 3, 32, 32)
    inputs = processor(text=["a viable glomerulus", CORPUS[0]], return_tensors="pt")
    published_ids = AutoTokenizer.from_pretrained(tiny_bert())(CORPUS[0])["input_ids"]
    assert inputs["input_ids"][1].tolist() == published_ids
    with torch.no_grad():
        expected = head(vision.forward_features(images)[:, 0])
        assert_same(model.get_image_features(images).pooler_output, expected)
        ours = model.get_text_features(**inputs).pooler_output
        assert_same(ours, text(**inputs).pooler_output)
    assert model.logit_scale == torch.tensor(3.2)
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]


CONCH = {
    "embed_dim": 24,
    "embed_dim_caption": 48,
    "vision_cfg": {
        "image_size": 448,
        "patch_size": 16,
        "width": 48,
        "num_heads": 4,
        "attn_pooler_heads": 4,
    },
    "text_cfg": {"context_length": 128, "vocab_size": 300, "width": 40, "heads": 4, "layers": 2},
}


def conch_shapes(
    blocks: int = 12, dim: int = 512, width: int = 768, text: int = 768, vocabulary: int = 32007
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the contrastive half of the published checkpoint, or of a smaller one."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text.text_projection": (text, dim),
        "text.cls_emb": (text,),
        "text.positional_embedding": (128, text),
        "text.token_embedding.weight": (vocabulary, text),
        "visual.proj_contrast": (dim, dim),
        "visual.trunk.cls_token": (1, 1, width),
        "visual.trunk.pos_embed": (1, 785, width),
        "visual.trunk.patch_embed.proj.weight": (width, 3, 16, 16),
        "visual.trunk.patch_embed.proj.bias": (width,),
        "visual.attn_pool_contrast.query": (1, dim),
        "visual.attn_pool_contrast.attn.q_proj_weight": (dim, dim),
        "visual.attn_pool_contrast.attn.k_proj_weight": (dim, width),
        "visual.attn_pool_contrast.attn.v_proj_weight": (dim, width),
        "visual.attn_pool_contrast.attn.in_proj_bias": (3 * dim,),
        "visual.attn_pool_contrast.attn.out_proj.weight": (dim, dim),
        "visual.attn_pool_contrast.attn.out_proj.bias": (dim,),
    }
    norms = {"text.ln_final": text, "visual.trunk.norm": width, "visual.ln_contrast": dim}
    norms |= {"visual.attn_pool_contrast.ln_q": dim, "visual.attn_pool_contrast.ln_k": width}
    linears: dict[str, tuple[int, int]] = {}
    for i in range(blocks):
        here = f"text.transformer.resblocks.{i}"
        norms |= {f"{here}.ln_1": text, f"{here}.ln_2": text}
        shapes[f"{here}.attn.in_proj_weight"] = (3 * text, text)
        shapes[f"{here}.attn.in_proj_bias"] = (3 * text,)
        linears[f"{here}.attn.out_proj"] = (text, text)
        linears |= {f"{here}.mlp.c_fc": (4 * text, text), f"{here}.mlp.c_proj": (text, 4 * text)}
        here = f"visual.trunk.blocks.{i}"
        norms |= {f"{here}.norm1": width, f"{here}.norm2": width}
        linears |= {f"{here}.attn.qkv": (3 * width, width), f"{here}.attn.proj": (width, width)}
        linears |= {f"{here}.mlp.fc1": (4 * width, width), f"{here}.mlp.fc2": (width, 4 * width)}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for name, sizes in linears.items():
        shapes |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
    return shapes


def conch_state() -> State:
    """A small checkpoint in CONCH's layout."""
    state = {}
    for name, shape in conch_shapes(2, 24, 48, 40, 300).items():
        tensor = torch.randn(shape) * (shape[-1] if shape else 1) ** -0.5
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = tensor + 1 if is_norm else tensor
    return state | {"text_decoder.ln_final.bias": torch.zeros(8)}


def norm(x: Tensor, state: State, name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen.unsqueeze(-3), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def conch_image(state: State, images: Tensor) -> Tensor:
    """CONCH's image feature, from its published formula, step by step."""
    s = {k.removeprefix("visual."): v for k, v in state.items()}
    weight, bias = (s[f"trunk.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    patches = F.conv2d(images, weight, bias, stride=16)
    rows = patches.shape[-1]
    table = s["trunk.pos_embed"]
    grid = table[:, 1:].unflatten(1, (28, 28)).permute(0, 3, 1, 2)
    if rows != 28:
        grid = F.interpolate(grid, size=(rows, rows), mode="bicubic", antialias=True)
    patches = (patches + grid).flatten(2).transpose(1, 2)
    first = (s["trunk.cls_token"] + table[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([first, patches], dim=1)
    for i in range(2):
        here = f"trunk.blocks.{i}"
        qkv = linear(norm(x, s, f"{here}.norm1", 1e-6), s, f"{here}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(*qkv, heads=4), s, f"{here}.attn.proj")
        hidden = F.gelu(linear(norm(x, s, f"{here}.norm2", 1e-6), s, f"{here}.mlp.fc1"))
        x = x + linear(hidden, s, f"{here}.mlp.fc2")
    keys = norm(norm(x, s, "trunk.norm", 1e-6), s, "attn_pool_contrast.ln_k")
    query = norm(s["attn_pool_contrast.query"], s, "attn_pool_contrast.ln_q")
    parts = s["attn_pool_contrast.attn.in_proj_bias"].chunk(3)
    q, k, v = (
        inputs @ s[f"attn_pool_contrast.attn.{name}_proj_weight"].T + part
        for name, inputs, part in zip("qkv", (query, keys, keys), parts, strict=True)
    )
    pooled = linear(attend(q, k, v, heads=4), s, "attn_pool_contrast.attn.out_proj")
    return norm(pooled[:, 0], s, "ln_contrast") @ s["proj_contrast"]


def conch_text(state: State, ids: Tensor) -> Tensor:
    """CONCH's text feature of ids padded with 0 to 127 tokens, mask quirk included."""
    s = {k.removeprefix("text."): v for k, v in state.items()}
    assert ids.shape[1] == 127
    x = torch.cat([s["token_embedding.weight"][ids], s["cls_emb"].expand(len(ids), 1, -1)], dim=1)
    x = x + s["positional_embedding"]
    seen = torch.ones(128, 128).tril().bool().repeat(len(ids), 1, 1)
    for row, text in enumerate(ids.tolist()):
        for j, token in enumerate(text):
            seen[row, 127, j + 1] = token != 0
    for i in range(2):
        here = f"transformer.resblocks.{i}"
        weight, bias = (s[f"{here}.attn.in_proj_{part}"] for part in ("weight", "bias"))
        qkv = (norm(x, s, f"{here}.ln_1") @ weight.T + bias).chunk(3, dim=-1)
        x = x + linear(attend(*qkv, heads=4, seen=seen), s, f"{here}.attn.out_proj")
        hidden = F.gelu(linear(norm(x, s, f"{here}.ln_2"), s, f"{here}.mlp.c_fc"))
        x = x + linear(hidden, s, f"{here}.mlp.c_proj")
    return norm(x[:, -1], s, "ln_final") @ s["text_projection"]


def conch_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with CONCH's special tokens and ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<pad>", "<start_of_text>", "<end_of_text>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", 1), ("<end_of_text>", 2)],
    )
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def conch(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Any, Any]:
    """A small CONCH in double precision, our model and processor."""
    torch.manual_seed(0)
    state = conch_state()
    source = publish(tmp_path_factory.mktemp("conch"), state)
    (source / "conch_ViT-B-16.json").write_text(json.dumps(CONCH))
    conch_tokenizer(source / "tokenizer.json")
    report = convert_checkpoint(source, source / "out")
    assert (report.kind, report.has_tokenizer) == ("conch", True)
    assert report.dropped == ("text_decoder.ln_final.bias",)
    model, processor = load_backbone(str(source / "out"))
    return {name: tensor.double() for name, tensor in state.items()}, model, processor


@pytest.mark.parametrize("size", [448, 224])
def test_images_of_conch(conch: tuple[State, Any, Any], size: int) -> None:
    state, model, _ = conch
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours = model.get_image_features(images, interpolate_pos_encoding=size != 448).pooler_output
    assert_same(ours, conch_image(state, images.double()).float())


@pytest.mark.parametrize("length", [3, 40, 126, 127])
def test_texts_of_conch(conch: tuple[State, Any, Any], length: int) -> None:
    """However a text is padded, its feature is that of one padded to 127."""
    state, model, _ = conch
    ids = torch.randint(3, 300, (3, length))
    ids[1, length // 2 :] = 0
    expected = conch_text(state, F.pad(ids, (0, 127 - length))).float()
    for padding in sorted({length, min(length + 1, 127), 127, 128}):
        padded = F.pad(ids, (0, padding - length))
        with torch.no_grad():
            assert_same(model.get_text_features(padded).pooler_output, expected)
            # What stands in the padding is nobody's business where the mask says that it is some.
            mask = (padded != 0).long()
            ours = model.get_text_features(padded + 7 * (1 - mask), attention_mask=mask)
        assert_same(ours.pooler_output, expected)


def test_the_processor_of_conch(conch: tuple[State, Any, Any]) -> None:
    state, model, processor = conch
    texts = ["A viable glomerulus", "x" * 400]
    inputs = processor(text=texts, return_tensors="pt")
    assert processor.max_length == 127
    assert inputs["input_ids"].shape == (2, 127)
    assert inputs["input_ids"][1, [0, -1]].tolist() == [1, 2]
    with torch.no_grad():
        ours = model.get_text_features(**inputs).pooler_output
    assert_same(ours, conch_text(state, inputs["input_ids"]).float())
    tokenizer, images = processor.tokenizer, processor.image_processor
    assert tokenizer.cls_token_id == model.config.backbone_config.text_config.vocab_size - 1
    assert (images.size["shortest_edge"], images.crop_size["height"]) == (448, 448)
    assert images.image_mean[0] == pytest.approx(0.48145466)


def test_every_published_tensor_of_conch_has_its_place() -> None:
    shapes = conch_shapes()
    captioner = [f"text_decoder.{i}" for i in range(315)]
    captioner += [f"visual.attn_pool_caption.{i}" for i in range(9)]
    captioner += [f"visual.ln_caption.{part}" for part in ("weight", "bias")]
    assert len(shapes) + len(captioner) == 641
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    unread = {name: torch.empty(1, device="meta") for name in captioner}
    converted = convert_tensors(tensors | unread)
    assert (converted.kind, converted.max_length) == ("conch", 127)
    assert set(converted.dropped) == set(captioner)
    expected = {name: tensor.shape for name, tensor in converted.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.state.items()} == expected
    config = converted.model.config
    towers = config.backbone_config
    assert towers.vision_config.num_attention_heads == 12
    assert (towers.vision_config.image_size, config.image_feature_dim) == (448, 512)
    assert (towers.text_config.num_attention_heads, towers.text_config.vocab_size) == (12, 32008)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), spare=st.integers(0, 3))
@settings(max_examples=15)
def test_padding_changes_no_text_with_a_class_token_behind(lengths: list[int], spare: int) -> None:
    """As many tokens as the longest text, or up to all that the tower reads: the same feature."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        pad_token_id=0,
    )
    tower = scatter(CLIPTextModel(config))
    texts = [torch.randint(1, 19, (length,)) for length in lengths]

    def encode(width: int) -> Tensor:
        ids = torch.stack([F.pad(text, (0, width - len(text))) for text in texts])
        ids, mask, positions = append_class_token(ids, None, config, torch.float32)
        assert positions[0, -1] == 9
        with torch.no_grad():
            outputs = tower(ids, attention_mask=mask, position_ids=positions)
        last: Tensor = outputs.last_hidden_state[:, -1]
        return last

    assert_same_numbers(encode(min(max(lengths) + spare, 9)), encode(9))


def test_a_text_too_long_for_its_class_token() -> None:
    config = CLIPTextConfig(max_position_embeddings=10, pad_token_id=0)
    ids, _, _ = append_class_token(F.pad(torch.ones(1, 9).long(), (0, 3)), None, config, torch.half)
    assert ids.shape == (1, 10)
    with pytest.raises(ValueError, match="longer than 9 tokens"):
        append_class_token(torch.ones(1, 10).long(), None, config, torch.float32)


def test_a_tower_of_several_attention_back_ends(conch: tuple[State, Any, Any]) -> None:
    """The added mask is what eager attention takes too, so that attention maps can be had."""
    _, model, processor = conch
    inputs = processor(text=list(TEXTS), return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**inputs).pooler_output
        model.set_attn_implementation("eager")
        try:
            outputs = model.get_text_features(**inputs, output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")
    assert_same(outputs.pooler_output, expected)
    length = inputs["input_ids"].shape[1] + 2
    assert outputs.attentions[0].shape == (3, 4, length, length)


# --- what is wrong is named


def clip_state() -> tuple[State, dict[str, Any]]:
    sizes = {**SIZES, "text_cfg": {**SIZES["text_cfg"], "vocab_size": 50}}
    theirs, config = build("ViT-B-32", sizes)
    return theirs.state_dict(), config


def without(name: str) -> Callable[[State, dict[str, Any]], None]:
    return lambda state, config: state.__delitem__(name)


def with_tensor(name: str, *shape: int) -> Callable[[State, dict[str, Any]], None]:
    return lambda state, config: state.update({name: torch.zeros(shape)})


def with_setting(section: str, key: str, value: Any) -> Callable[[State, dict[str, Any]], None]:
    return lambda state, config: (config[section] if section else config).update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("visual.proj"), ["'visual.proj' [128, 48] is missing"]),
        (without("visual.conv1.weight"), ["not recognised"]),
        (without("visual.positional_embedding"), ["'visual.positional_embedding'", "missing"]),
        (
            without("transformer.resblocks.1.attn.in_proj_bias"),
            ["'transformer.resblocks.1.attn.in_proj_bias' [192] is missing"],
        ),
        (
            with_tensor("visual.ln_post.weight", 7),
            ["'visual.ln_post.weight' is [7], expected [128]"],
        ),
        (with_tensor("visual.extra", 2, 3), ["'visual.extra' [2, 3] is unknown"]),
        (with_tensor("visual.transformer.resblocks.0.ls_1.gamma", 128), ["ls_1.gamma", "unknown"]),
        (with_tensor("logit_bias"), ["'logit_bias' [] is unknown"]),
        (with_tensor("logit_scale", 3), ["'logit_scale' is [3], expected []"]),
        (with_setting("vision_cfg", "width", 192), ["visual.conv1.weight", "[192, 3, 32, 32]"]),
        (with_setting("vision_cfg", "layers", 3), ["resblocks.2.", "missing", "and 7 more"]),
        (with_setting("vision_cfg", "image_size", 96), ["positional_embedding", "[10, 128]"]),
        (with_setting("vision_cfg", "image_size", [64, 96]), ["square", "[64, 96]"]),
        (with_setting("vision_cfg", "pool_type", "avg"), ["vision_cfg.pool_type", "'tok'"]),
        (with_setting("vision_cfg", "qk_norm", True), ["vision_cfg.qk_norm is True"]),
        (with_setting("text_cfg", "no_causal_mask", True), ["text_cfg.no_causal_mask is True"]),
        (with_setting("text_cfg", "pool_type", "last"), ["pool_type is 'last'"]),
        (with_setting("text_cfg", "context_length", 76), ["positional_embedding", "[76, 64]"]),
        (with_setting("text_cfg", "vocab_size", 51), ["token_embedding", "[51, 64]"]),
        (with_setting("", "init_logit_bias", -10), ["model_cfg.init_logit_bias is -10"]),
    ],
)
def test_errors_of_wrong_checkpoints(
    change: Callable[[State, dict[str, Any]], None], words: list[str], tmp_path: Path
) -> None:
    state, config = clip_state()
    change(state, config)
    source = publish(tmp_path / "source", state, config)
    with pytest.raises(GloVLMError) as error:
        convert_checkpoint(source, tmp_path / "out")
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "open_clip"])
def test_the_wrong_kind_is_an_error(kind: str) -> None:
    state, _ = clip_state()
    with pytest.raises(GloVLMError, match=f"of a {kind} checkpoint is missing"):
        convert_tensors(state, kind)


@pytest.mark.parametrize(
    ("settings", "stated", "words"),
    [
        ({"qk_norm": True}, SMALL, "q_norm.weight' [12] is unknown"),
        ({"global_pool": "avg"}, SMALL, "'norm.weight' [48] is missing"),
        ({"pre_norm": True}, SMALL, "'norm_pre.weight' [48] is unknown"),
        ({}, {}, "48 wide has no heads 64 wide"),
        ({}, {**SMALL, "act_layer": "relu"}, "act_layer is 'relu'"),
        ({"init_values": 0.1, "mlp_ratio": 2.5}, SMALL, "hidden width of 120"),
        ({"reg_tokens": 4}, {**SMALL, "no_embed_class": True}, "'pos_embed' has 21 rows"),
    ],
)
def test_a_vision_transformer_that_does_not_fit(
    settings: dict[str, Any], stated: dict[str, Any], words: str
) -> None:
    with pytest.raises(GloVLMError) as error:
        convert_tensors(vit(**settings).state_dict(), published={"model_args": stated})
    assert words in str(error.value)


class Payload:
    """What a file of weights must never bring along."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_file_that_holds_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"visual.conv1.weight": torch.zeros(1), "x": Payload()}, file)
    with pytest.raises(GloVLMError, match="cannot be read as plain tensors"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert "run" not in capsys.readouterr().out


def test_files_that_hold_no_tensors(tmp_path: Path) -> None:
    for content, words in (
        ([1], "found <class 'list'>"),
        ({}, "expected tensors by name"),
        ({"a": torch.zeros(1), "epoch": 3}, "found 'epoch'"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(GloVLMError, match=words):
            read_tensors(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(GloVLMError, match="cannot be read"):
        read_tensors(tmp_path / "a.safetensors")


def test_what_training_scripts_wrap_around_a_state_dict(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": {"module.a": tensors["a"]}}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt").keys() == {"a"}
    torch.save({"model": tensors}, tmp_path / "b.pth")
    assert read_tensors(tmp_path / "b.pth")["a"].equal(tensors["a"])


def test_which_file_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(GloVLMError, match="neither a folder nor a file"):
        convert_checkpoint(source, tmp_path / "out")
    source.mkdir()
    with pytest.raises(GloVLMError, match=r"found none"):
        convert_checkpoint(source, tmp_path / "out")
    for name in ("b.pt", "a.pt"):
        torch.save(vit().state_dict(), source / name)
    with pytest.raises(GloVLMError, match=r"found a\.pt, b\.pt"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(GloVLMError, match="Did you mean 'timm'"):
        convert_checkpoint(source / "a.pt", tmp_path / "out", "tim")
    (source / "config.json").write_text("{")
    with pytest.raises(GloVLMError, match=r"config\.json' cannot be read as JSON"):
        convert_checkpoint(source / "a.pt", tmp_path / "out")
    (source / "config.json").write_text(json.dumps({"model_args": SMALL}))
    (tmp_path / "out").mkdir()
    report = convert_checkpoint(source / "a.pt", tmp_path / "out")
    assert "ImageNet" in report.notes[0]
    with pytest.raises(GloVLMError, match="not empty"):
        convert_checkpoint(source / "a.pt", tmp_path / "out")


def test_a_folder_in_transformers_format_needs_no_conversion(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="needs no conversion"):
        convert_checkpoint(tiny_clip(), tmp_path / "out")


def test_a_broken_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(converted: Any, tokenizer: Any, name: str, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    source = publish(tmp_path / "source", vit().state_dict(), model_args=SMALL)
    monkeypatch.setattr(conversion, "_write", write)
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in vit().state_dict().items()}
    source = publish(tmp_path / "source", state, model_args=SMALL)
    convert_checkpoint(source, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert model.embeddings.cls_token.equal(state["cls_token"].float())


def test_a_state_dict_alone_is_taken_with_what_open_clip_does_by_default(tmp_path: Path) -> None:
    text = {**SIZES["text_cfg"], "heads": 1, "vocab_size": 50}
    theirs, _ = build("ViT-B-32", {**SIZES, "text_cfg": text})
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "pathgenclip.pt")
    report = convert_checkpoint(tmp_path / "pathgenclip.pt", tmp_path / "out")
    assert "GELU" in report.notes[0]
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(50, (4, 77))
    with torch.no_grad():
        ours = model.get_image_features(images).pooler_output
        assert_same(ours, theirs.encode_image(images))
        # open_clip takes the feature where the highest id stands, whichever it is.
        assert_same(model.get_text_features(ids).pooler_output, theirs.encode_text(ids))


@pytest.mark.parametrize(
    ("transform", "size", "crops", "resample"),
    [
        ({}, {"shortest_edge": 64}, True, 3),
        ({"resize_mode": "squash"}, {"height": 64, "width": 64}, False, 3),
        ({"interpolation": "bilinear"}, {"shortest_edge": 64}, True, 2),
        ({"resize_mode": "longest"}, None, None, None),
        ({"interpolation": "random"}, None, None, None),
    ],
)
def test_how_images_are_resized(
    transform: dict[str, Any], size: dict[str, int] | None, crops: bool, resample: int
) -> None:
    state, config = clip_state()
    published = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, **transform}}
    if size is None:
        with pytest.raises(GloVLMError, match="not supported"):
            convert_tensors(state, published=published)
        return
    images = convert_tensors(state, published=published).images
    assert (images["size"], images["do_center_crop"], images["resample"]) == (size, crops, resample)
    assert images["crop_size"] == {"height": 64, "width": 64}
    assert images["image_mean"] == [0.5] * 3
    assert images["image_std"][0] == pytest.approx(0.26862954)


def test_without_a_tokenizer_the_folder_is_written_with_a_note(tmp_path: Path) -> None:
    state, config = clip_state()  # with a vocabulary of its own
    source = publish(tmp_path / "source", state, config)
    report = convert_checkpoint(source, tmp_path / "out")
    assert not report.has_tokenizer
    assert "No tokenizer" in report.notes[0]
    AutoModel.from_pretrained(tmp_path / "out")
    AutoImageProcessor.from_pretrained(tmp_path / "out")
    with pytest.raises(GloVLMError):
        load_backbone(str(tmp_path / "out"))


def test_the_bert_of_a_checkpoint_must_be_one(tmp_path: Path) -> None:
    theirs, config = biomedclip(tmp_path / "bert")
    published = {"model_cfg": config, "text_config": {"model_type": "roberta"}}
    with pytest.raises(GloVLMError, match="'roberta': expected a BERT"):
        convert_tensors(theirs.state_dict(), published=published)
    config["text_cfg"]["hf_pooler_type"] = "max_pooler"
    with pytest.raises(GloVLMError, match="hf_pooler_type is 'max_pooler'"):
        convert_tensors(theirs.state_dict(), published={"model_cfg": config})
