"""Benchmark of loading and encoding, against the bare transformers module."""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from ...backbones import load_backbone
from ...backbones.conversion import join_merges
from ...data import open_image
from ...errors import GloVLMError
from ...inference import embed_images
from .timing import Row, as_row, check_same, shortest_in_turn
from .towers import Shape, random_clip, write_jpegs


def bench_encode(
    *,
    backbone: str | None = None,
    shape: Shape | None = None,
    n_files: int = 64,
    side: int = 1024,
    vocabulary: int = 49408,
    batch_size: int = 16,
    repeats: int = 3,
) -> list[Row]:
    """Benchmark of loading and encoding, against the bare transformers module.

    Of each pair the two take turns, so that what else the machine does slows both.

    Args:
        backbone: As `--backbone` takes it, a dual encoder; random weights of `shape` if not given.
        shape: Of the random CLIP.
        n_files: JPEG files that are encoded from disk.
        side: Their height and width in pixels.
        vocabulary: Tokens of the random CLIP's tokenizer, whose loading is timed along; CLIP's own
            has as many as the default.
        batch_size: Images at a time, everywhere.
        repeats: Timings of each kind, of which the shortest counts.

    Returns:
        Six rows, three pairs. A `ratio` is the part of the bare module's rate (`encode.tensors`),
        the part of our rate from tensors (`encode.files`), or the time over that of the bare
        `from_pretrained` (`encode.load`).

    Raises:
        GloVLMError: Weights or features differ from those of the bare module, or the backbone is a
            pair, of which transformers has no bare module.
    """
    model, processor = load_backbone(backbone) if backbone else random_clip(shape or Shape())
    if model.config.is_pair:
        raise GloVLMError(
            f"Encoding is timed against one bare module of transformers; '{backbone}' is a pair of "
            "two: give a dual encoder (clip-vit-b-16, plip, ...)."
        )
    what = backbone or f"{model.config.backbone_config.model_type} of random weights"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "saved"
        _save_as_converted(model, processor, folder, None if backbone else vocabulary)
        bare, model = _load_bare(folder), _load_ours(folder)
        rows = _bench_load(bare, model, folder, what, repeats)
        images = write_jpegs(Path(place) / "jpegs", n_files, side)
        batches = [
            dict(processor(images=[open_image(v) for v in part["image"]], return_tensors="pt"))
            for part in images.iter(batch_size=batch_size)
        ]
        rows += _bench_tower(bare, model, batches, what, repeats)
        what += f", {n_files} JPEG files of {side} px"
        rows += _bench_files(model, processor, images, batches, what, repeats)
    return rows


def _save_as_converted(model: Any, processor: Any, folder: Path, vocabulary: int | None) -> None:
    """Save a backbone as a converted checkpoint lies on disk, its tokenizer grown where asked."""
    model.backbone.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if vocabulary is not None:
        _grow_tokenizer(folder / "tokenizer.json", vocabulary)
    join_merges(folder)


def _load_bare(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def _load_ours(folder: Path) -> Any:
    return load_backbone(str(folder))[0]


def _bench_load(bare: Any, model: Any, folder: Path, what: str, repeats: int) -> list[Row]:
    """Loading the folder that both were loaded from, which must have given the same weights."""
    pairs = zip(bare.state_dict().values(), model.backbone.state_dict().values(), strict=True)
    different = sum(not torch.equal(one, other) for one, other in pairs)
    check_same(0, different, 0, "the number of loaded tensors that differ")
    ways = [partial(load, folder) for load in (_load_bare, _load_ours)]
    plain, ours = shortest_in_turn(ways, 3 * repeats)  # short, so more often
    note = f"{what}: load_backbone of it, with tokenizer, as converted; ratio: times the time"
    return [
        as_row("encode.load_bare", plain, "s", None, f"{what}: from_pretrained of a folder"),
        as_row("encode.load", ours, "s", ours / plain, note),
    ]


def _bench_tower(
    bare: Any, model: Any, batches: Sequence[dict[str, Any]], what: str, repeats: int
) -> list[Row]:
    """Features of prepared images, from the bare module and through `GloVLMModel`."""

    def pool_bare() -> Any:
        with torch.inference_mode():
            return bare.vision_model(**batches[0]).pooler_output

    def pool_ours() -> Any:
        with torch.inference_mode():
            return model.pool_images(**batches[0])

    gap = float((pool_bare() - pool_ours()).abs().max())
    check_same(0, gap, 0, "the largest difference from the bare module's features")
    # One batch, often: short timings in turn meet the same machine.
    plain, ours = shortest_in_turn([pool_bare, pool_ours], repeats * len(batches))
    n = len(batches[0]["pixel_values"])
    note = f"{what}: through GloVLMModel; ratio: part of the bare tower's rate"
    return [
        as_row("encode.bare", n / plain, "images/s", None, f"{what}: bare tower, a batch of {n}"),
        as_row("encode.tensors", n / ours, "images/s", plain / ours, note),
    ]


def _bench_files(
    model: Any,
    processor: Any,
    images: Any,
    batches: Sequence[dict[str, Any]],
    what: str,
    repeats: int,
) -> list[Row]:
    """Features of images on disk, and of the batches that they become."""
    batch_size = len(batches[0]["pixel_values"])

    def encode_tensors() -> Any:
        with torch.inference_mode():
            return torch.cat([model.pool_images(**batch) for batch in batches]).numpy()

    def encode_files() -> Any:
        return embed_images(model, processor, images, batch_size=batch_size, project=False)

    gap = float(np.abs(encode_tensors() - encode_files()).max())
    check_same(0, gap, 1e-5, "the largest difference of features from files and tensors")
    plain, ours = shortest_in_turn([encode_tensors, encode_files], repeats)
    n, what = len(images), f"{what}, {torch.get_num_threads()} threads"
    note = f"{what}: from disk; ratio: part of the rate from tensors"
    return [
        as_row("encode.preprocessed", n / plain, "images/s", None, f"{what}: from tensors"),
        as_row("encode.files", n / ours, "images/s", plain / ours, note),
    ]


def _grow_tokenizer(path: Path, vocabulary: int) -> None:
    """Add merges of single characters to a byte-pair tokenizer.json: its size is what is timed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    pieces, merges = content["model"]["vocab"], content["model"]["merges"]
    following = 1 + max(*pieces.values(), *(t["id"] for t in content["added_tokens"]))
    letters = [piece for piece in pieces if len(piece) == 1]
    for one, other in product(letters, letters):
        if following >= vocabulary:
            break
        if one + other not in pieces:
            pieces[one + other] = following
            merges.append([one, other])
            following += 1
    path.write_text(json.dumps(content), encoding="utf-8")
