"""Contrastive pretraining of `mini`: a small CLIP on synthetic images and captions.

It is the embedded default: it makes the package testable and its demo run without network or data.
It has never seen a patient, and no number made with it says anything about one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..data import catalog_entries, catalog_entry
from ..environment import end_with_parent
from ..errors import GloVLMError
from ..files import (
    UNFINISHED,
    digest_tensors,
    digest_value,
    finish_move,
    is_empty,
    one_writer,
    put_in_place,
    remove,
    write_json,
    write_manifest,
    write_text,
)
from ..methods import Recipe
from ..publish.card import render_backbone_card
from ..runs.folder import CODE_VERSION, make_accelerator, on_main
from ..training.loop import fit, gather, seed_everything
from ..training.losses import infonce
from .drawn_captions import vary_caption
from .phantoms import CLASSES, render_cohort
from .pretraining_config import PretrainConfig

# Wordings that are tried on what was trained; the last four stand in no caption.
TEMPLATES = (
    "{}", "a photo of a {}", "a photo of a {}.", "This is an image of {}.", "{} in a kidney biopsy",
    "an H&E image of {}", "PAS stain: {}", "a pathologist would call this {} at once",
    "itap of my {}", "a rendition of {}", "{}, courtesy of the department",
)  # fmt: skip
NAMES = {
    "viable": "viable glomerulus",
    "ischemic": "ischemic glomerulus",
    "segmental_sclerosis": "segmentally sclerotic glomerulus",
    "global_sclerosis": "globally sclerotic glomerulus",
    "atubular": "atubular glomerulus",
}
OWN_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "README.md", "manifest.json",
    "pretraining.json",
)  # fmt: skip


def pretrain(
    config: PretrainConfig,
    *,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a small CLIP contrastively on synthetic images.

    Captions that occur twice in a batch are not each other's negatives.

    Args:
        config: What to do.
        on_epoch: Called after every epoch with its row of the log.
        on_stage: Called with the name of every stage.

    Returns:
        The facts of the card, and the log.

    Raises:
        GloVLMError: The folder holds something else or is written to, or the checkpoint is
            damaged or of other settings.
    """
    accelerator = make_accelerator(None, cpu=False)
    folder = Path(config.output_dir).expanduser()
    with ExitStack() as stack:

        def begin() -> None:
            _check_place(folder)
            stack.enter_context(one_writer(folder))
            finish_move(folder / UNFINISHED, folder)
            _check_place(folder)
            if not config.resume:
                remove(folder / UNFINISHED)

        on_main(accelerator, begin)
        facts = _pretrain(config, folder, accelerator, on_epoch, on_stage or (lambda name: None))
    accelerator.wait_for_everyone()
    return facts


def _check_place(folder: Path) -> None:
    ours = any((folder / name).exists() for name in (UNFINISHED, "pretraining.json"))
    if folder.exists() and not (folder.is_dir() and (ours or is_empty(folder))):
        raise GloVLMError(f"'{folder}' holds something else: give an empty or a new folder.")


def _pretrain(
    config: PretrainConfig,
    folder: Path,
    accelerator: Any,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Train in `unfinished/`, then put weights, tokenizer and card in place."""
    notify("rendering")
    pixels, captions = render_pairs(
        config.patients,
        config.per_patient,
        config.seed,
        config.image_size,
        config.captions,
        config.workers,
    )
    distinct = sorted({caption for of_image in captions for caption in of_image})
    tokenizer = train_tokenizer(distinct)
    seed_everything(config.seed)
    model = build_clip(tokenizer, config.image_size, config.patch_size)
    encoded = tokenizer(distinct, padding=True, return_tensors="pt")
    number_of = {caption: i for i, caption in enumerate(distinct)}
    numbers = torch.tensor([[number_of[c] for c in of_image] for of_image in captions])
    step = ContrastiveStep(model, encoded["input_ids"], encoded["attention_mask"], numbers)
    step.to(accelerator.device)
    source = SyntheticImageSource(pixels, torch.arange(len(pixels)))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    recipe = Recipe(
        lr=config.lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        weight_decay=0.1,
        schedule="cosine",
        final_lr=0.01,
        warmup_epochs=1,
        warmup_lr=config.lr / 5,
    )
    incidental = ("output_dir", "workers", "resume")
    made_from = {
        "code": CODE_VERSION,
        "images": digest_tensors([("pixels", pixels)]),
        "captions": digest_value(captions),
        "settings": {k: v for k, v in asdict(config).items() if k not in incidental},
    }
    work = folder / UNFINISHED
    notify("training")
    log = fit(
        step,
        [{"params": decay}, {"params": rest, "weight_decay": 0.0}],
        source,
        recipe,
        accelerator=accelerator,
        seed=config.seed,
        clip_norm=1.0,
        output_dir=work,
        resume=config.resume,
        made_from=made_from,
        on_epoch=on_epoch,
    )
    facts: dict[str, Any] = {}
    if accelerator.is_main_process:
        notify("testing on unseen synthetic patients")
        facts = _save(work, model.eval(), tokenizer, config, log, len(pixels))
        write_manifest(work, "pretraining", made_from, OWN_FILES)
        put_in_place(work, folder, OWN_FILES)
    return facts


def _save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    config: PretrainConfig,
    log: list[dict[str, Any]],
    images: int,
) -> dict[str, Any]:
    patients, per_patient = 40, 10
    published = {c.name: c.prompts[0] for c in catalog_entry("synthetic_glomeruli").classes}
    wordings = [published, *({c: t.format(NAMES[c]) for c in CLASSES} for t in TEMPLATES)]
    of_wording = zero_shot_accuracy(model, tokenizer, config, wordings, patients, per_patient)
    facts = {
        "kind": "pretraining",
        **asdict(config),
        "output_dir": None,
        "images": images,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_patients": patients,
        "test_images": patients * per_patient,
        "accuracy": of_wording[0],
        "accuracy_by_template": dict(zip(TEMPLATES, of_wording[1:], strict=True)),
        "log": log,
    }
    model.half().save_pretrained(folder)  # fp16 on disk; load_backbone brings it back to fp32
    tokenizer.save_pretrained(folder)
    image_processor(config.image_size).save_pretrained(folder)
    write_text(folder / "README.md", render_backbone_card(facts))
    write_json(folder / "pretraining.json", facts)  # with the log
    return facts


def render_pairs(
    patients: int, per_patient: int, seed: int, size: int, wordings: int, workers: int = 1
) -> tuple[Tensor, list[list[str]]]:
    """Render images with captions in several processes; the result does not depend on how many.

    Returns:
        Pixels `[n, 3, size, size]` uint8 and `wordings` captions of each image.
    """
    chunk = 50
    jobs = [
        (min(chunk, patients - first), per_patient, _cohort_seed(seed, first), size, wordings)
        for first in range(0, patients, chunk)
    ]
    if workers > 1 and len(jobs) > 1:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, end_with_parent) as pool:
            parts = list(pool.map(_render_part, jobs))
    else:
        parts = [_render_part(job) for job in jobs]
    pixels = torch.from_numpy(np.concatenate([p for p, _ in parts])).permute(0, 3, 1, 2)
    return pixels.contiguous(), [caption for _, captions in parts for caption in captions]


def _cohort_seed(seed: int, first: int) -> int:
    """Training cohorts take even seeds; tests and the demo take odd ones: no patient is shared."""
    return 2 * int(np.random.SeedSequence([seed, first]).generate_state(1)[0] // 4)


def _render_part(
    job: tuple[int, int, int, int, int],
) -> tuple[np.ndarray[Any, Any], list[list[str]]]:
    patients, per_patient, seed, size, wordings = job
    with threadpool_limits(1):  # small products: more threads would only wait for each other
        images = render_cohort(patients, per_patient, seed=seed, size=size)
    rng = np.random.default_rng([seed, 1])
    captions = [
        [vary_caption(rng, p.class_name, p.severity, p.stain) for _ in range(wordings)]
        for p in images
    ]
    return np.stack([np.asarray(p.image) for p in images]), captions


def train_tokenizer(captions: Sequence[str], vocab_size: int = 1536) -> Any:
    """Train a lower-case byte-level BPE on captions and on every prompt that the package knows.

    Any text can be tokenised. The end token has the highest id, as in OpenAI's vocabulary: a CLIP
    pools a text there whether it looks for that id or for the highest one.
    """
    texts = [*captions, *(t for e in catalog_entries() for c in e.classes for t in c.prompts)]
    start, end, pad = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[pad, start],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([end])
    ids = [(token, bpe.token_to_id(token)) for token in (start, end)]
    bpe.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=start, eos_token=end, pad_token=pad, model_max_length=64
    )


def build_clip(tokenizer: Any, image_size: int, patch_size: int) -> Any:
    """Build an untrained CLIP small enough to ship: about 2 million parameters."""
    tower = {"hidden_act": "gelu", "attention_dropout": 0.0}
    vision = {
        **tower,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    text = {
        **tower,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 1664,  # beyond the tokenizer's entries: rows for learned context tokens
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=128))


def image_processor(size: int) -> Any:
    """CLIP's image transform at another size."""
    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


class ContrastiveStep(nn.Module):
    """Contrastive training step: image against caption, over the batch of all processes.

    Args:
        model: A `CLIPModel`.
        input_ids: Distinct captions `[captions, length]`.
        attention_mask: The same shape.
        numbers: Of each image, the numbers of its captions, `[images, wordings]`; every step
            draws one.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, numbers: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("attention_mask", attention_mask, persistent=False)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        """Symmetric InfoNCE of pixels `[n, 3, size, size]` and image numbers `[n]`."""
        numbers: Tensor = self.numbers[labels]  # type: ignore[index]
        drawn = torch.randint(numbers.shape[1], (len(numbers), 1)).to(numbers.device)
        captions = numbers.gather(1, drawn).squeeze(1)
        ids: Tensor = self.input_ids[captions]  # type: ignore[index]
        mask: Tensor = self.attention_mask[captions]  # type: ignore[index]
        length = int(mask.sum(1).max())  # what is padding in all of them need not be run
        ids, mask = ids[:, :length], mask[:, :length]
        images = self.model.get_image_features(inputs).pooler_output
        texts = self.model.get_text_features(ids, mask).pooler_output
        images = gather(nn.functional.normalize(images, dim=-1))
        texts = gather(nn.functional.normalize(texts, dim=-1))
        scale = self.model.logit_scale.clamp(max=math.log(100.0)).exp()
        return infonce(images, texts, gather(captions), gather(weight), scale, True)


class SyntheticImageSource:
    """Synthetic images in memory, turned and mirrored at random: a glomerulus has no upright side.

    Args:
        pixels: `[n, 3, size, size]` uint8.
        labels: Image numbers `[n]`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def fetch(self, index: Sequence[int]) -> Tensor:
        """Normalised images `[n, 3, size, size]`."""
        batch = self.pixels[list(index)]
        turns, flips = torch.randint(4, (len(batch),)), torch.rand(len(batch)) < 0.5
        turned = [
            torch.rot90(image.flip(-1) if flip else image, int(turn), (1, 2))
            for image, turn, flip in zip(batch, turns, flips, strict=True)
        ]
        return normalize(torch.stack(turned))


def normalize(pixels: Tensor) -> Tensor:
    """Map uint8 pixels `[n, 3, h, w]` to CLIP's mean 0 and deviation 1."""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def zero_shot_accuracy(
    model: Any,
    tokenizer: Any,
    config: PretrainConfig,
    wordings: Sequence[Mapping[str, str]],
    patients: int,
    per_patient: int,
) -> list[float]:
    """Zero-shot accuracy on unseen synthetic patients with each wording, one prompt a class."""
    cohort = render_cohort(
        patients,
        per_patient,
        seed=_cohort_seed(config.seed, -1 % 2**31) + 1,
        size=config.image_size,
    )
    pixels = torch.from_numpy(np.stack([np.asarray(p.image) for p in cohort])).permute(0, 3, 1, 2)
    truth = torch.tensor([CLASSES.index(p.class_name) for p in cohort])
    device = model.logit_scale.device
    with torch.inference_mode():
        features = torch.cat(
            [
                model.get_image_features(normalize(part).to(device)).pooler_output.cpu()
                for part in pixels.split(100)
            ]
        )
        accuracies = []
        for prompts in wordings:
            encoded = tokenizer([prompts[c] for c in CLASSES], padding=True, return_tensors="pt")
            texts = model.get_text_features(
                encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
            ).pooler_output.cpu()
            texts = nn.functional.normalize(texts, dim=-1)
            accuracies.append(float(((features @ texts.T).argmax(1) == truth).double().mean()))
    return accuracies
