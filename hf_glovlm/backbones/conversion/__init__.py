"""Checkpoint conversion: published weights to transformers modules with separate q, k and v.

`kinds.py` has the kinds of checkpoints, `towers.py` their encoders, `vocabularies.py` their
tokenizers, `moving.py` the mapping of tensors; this module reads files and writes the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from ...errors import GloVLMError, nearest
from ...files import describe_file, is_same_file, replacing, write_manifest
from ...model import GloVLMProcessor
from .kinds import CONVERTERS, DROPPED, recognise
from .moving import Converted, Move
from .vocabularies import find_tokenizer, join_merges, read_json

__all__ = [
    "DROPPED",
    "KINDS",
    "ConversionReport",
    "Converted",
    "convert_checkpoint",
    "convert_tensors",
    "join_merges",
    "read_tensors",
    "recognise",
]

KINDS = tuple(CONVERTERS)
VERSION = 1  # raise it when the same published files are converted to something else
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class ConversionReport:
    """Report of a conversion.

    Args:
        kind: One of `KINDS`.
        output_dir: The folder that was written.
        model_type: transformers' name of the module in it: `clip`, `glovlm`, `vit`, `dinov2`,
            `dinov2_with_registers`.
        has_tokenizer: Whether the folder holds a tokenizer; never for a vision tower alone.
        dropped: Published tensors left out on purpose.
        notes: Remarks for the user, one sentence each.
    """

    kind: str
    output_dir: Path
    model_type: str
    has_tokenizer: bool
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | Path, output_dir: str | Path, kind: str | None = None
) -> ConversionReport:
    """Convert a published checkpoint into a folder that `load_backbone` loads.

    Args:
        source: The folder with the published files (weights, their configuration, tokenizer), or
            the file with the weights, whose neighbours are then read too. Nothing is downloaded.
        output_dir: Folder to write: configuration, weights in fp32, image processor, and the
            tokenizer where there is one. It appears complete or not at all, with a manifest of
            what it was made from.
        kind: One of `KINDS`; recognised from the tensors' names when not given.

    Raises:
        GloVLMError: There are no weights, a file holds more than tensors, the kind is not known, a
            tensor is missing, misshapen or unknown, a setting is not supported, or `output_dir` is
            not empty.
    """
    file = _find_weights(Path(source).expanduser())
    output = Path(output_dir).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GloVLMError(f"'{output_dir}' is there already and not empty: name another folder.")
    published = _read_published(file.parent)
    converted = convert_tensors(read_tensors(file), kind, published)
    tokenizer = find_tokenizer(converted, file.parent)
    with replacing(output) as fresh:
        fresh.mkdir()
        _write(converted, tokenizer, output.name, fresh)
        published_files = {path.name: describe_file(path) for path in _read_files(file)}
        made_from = {"version": VERSION, "kind": converted.kind, "published": published_files}
        write_manifest(fresh, "backbone", made_from)
    return ConversionReport(
        kind=converted.kind,
        output_dir=output,
        model_type=converted.model.config.model_type,
        has_tokenizer=tokenizer is not None,
        dropped=tuple(converted.dropped),
        notes=tuple(converted.notes),
    )


def is_made_from(made_from: Mapping[str, Any], source: Path) -> bool:
    """Whether a conversion was made, by this version, from what a folder holds now."""
    known, files = made_from.get("published"), _read_files(_find_weights(source))
    if made_from.get("version") != VERSION or not isinstance(known, dict):
        return False
    return {path.name for path in files} == {*known} and all(
        is_same_file(path, known[path.name]) for path in files
    )


def convert_tensors(
    tensors: Mapping[str, Any], kind: str | None = None, published: Mapping[str, Any] | None = None
) -> Converted:
    """Convert published tensors into a transformers module.

    Args:
        tensors: By their published names.
        kind: One of `KINDS`; recognised from the names when not given.
        published: The configuration beside them: `model_cfg` and `preprocess_cfg` of
            open_clip, `model_args` and `pretrained_cfg` of timm, `text_config` of a BERT.

    Raises:
        GloVLMError: As `convert_checkpoint`.
    """
    kind = kind or recognise(tensors)
    if kind not in KINDS:
        raise GloVLMError(
            f"Unknown kind '{kind}': expected one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )
    move = Move(tensors, kind, DROPPED[kind])
    converted = CONVERTERS[kind](move, published or {})
    move.finish()
    return converted


def read_tensors(file: Path) -> dict[str, Any]:
    """Read a state dict from safetensors or a torch file; code in it is refused.

    The dictionary may lie under `state_dict` or `model`, and its names may begin with `module.`, as
    training scripts write them.

    Raises:
        GloVLMError: It holds something else, or is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GloVLMError(
            f"'{file.name}' cannot be read as plain tensors, and nothing else is read: {first} "
            "Take the file as its authors published it, best as safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise GloVLMError(f"'{file.name}': expected tensors by name, found {type(content)}.")
    if strange := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise GloVLMError(f"'{file.name}': expected tensors alone, found '{strange[0]}'.")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def _find_weights(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise GloVLMError(f"'{source}' is neither a folder nor a file: name what was downloaded.")
    if known := [source / name for name in _WEIGHTS if (source / name).is_file()]:
        return known[0]
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    files = sorted(path for path in source.iterdir() if path.suffix in suffixes)
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise GloVLMError(
            f"Expected one file of weights in '{source}' ({', '.join(_WEIGHTS)}), found {names}: "
            "name the file itself."
        )
    return files[0]


def _read_files(weights: Path) -> list[Path]:
    """Files that a conversion reads: the weights and the small ones beside them."""
    beside = sorted(weights.parent.iterdir())
    small = [path for path in beside if path.suffix in (".json", ".txt") and path.is_file()]
    return [weights, *small]


def _read_published(folder: Path) -> dict[str, Any]:
    """Published configurations in a folder, merged; open_clip's own file comes last."""
    published: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        # CONCH's lies under the name of its architecture.
        small = path.stat().st_size < 100_000
        if small and (path.name == "config.json" or '"vision_cfg"' in path.read_text("utf-8")):
            content = read_json(path)
            if "vision_cfg" in content:
                content = {"model_cfg": content}
            published |= {key: value for key, value in content.items() if isinstance(value, dict)}
    return published


def _write(converted: Converted, tokenizer: Any, name: str, folder: Path) -> None:
    """Write a converted checkpoint as `from_pretrained` reads it."""
    model = converted.model
    is_pair = model.config.model_type == "glovlm"
    if is_pair:
        model.config.backbone_name = name
    model.load_state_dict(converted.state, assign=True)
    model.save_pretrained(folder)
    images: Any = CLIPImageProcessor(**converted.images)
    images.torchvision_crop = True  # for GloVLMProcessor; transformers rounds another way
    if is_pair and tokenizer is not None:
        processor = GloVLMProcessor(images, tokenizer, max_length=converted.max_length)
        processor.save_pretrained(folder)
    else:
        images.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    join_merges(folder)
