"""Tokenizers of published checkpoints, from the files beside them."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, PreTrainedTokenizerFast

from ...errors import GloVLMError
from .moving import Converted

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# What open_clip's cleaning (ftfy, html.unescape) changes in captions: quotes, ligatures, entities.
_CLEANING = (
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("\ufb00", "ff"),
    ("\ufb01", "fi"),
    ("\ufb02", "fl"),
    ("\ufb03", "ffi"),
    ("\ufb04", "ffl"),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&#39;", "'"),
    ("&nbsp;", " "),
)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        GloVLMError: It is damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GloVLMError(f"'{path.name}' cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise GloVLMError(f"'{path.name}': expected an object, found {type(content).__name__}.")
    return content


def join_merges(folder: Path) -> None:
    """Write the merges of a folder's byte-pair tokenizer.json as `a b` in place of `["a", "b"]`.

    tokenizers takes both for the same and reads the former in two thirds of the time. A tokenizer
    with a space in a token is left as it is, as is a folder without one.
    """
    file = folder / "tokenizer.json"
    content = read_json(file) if file.is_file() else {}
    pairs = content.get("model", {}).get("merges") or []
    joined = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    if joined and all(x.count(" ") == 1 and not x.startswith("#version") for x in joined):
        content["model"]["merges"] = joined
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def find_tokenizer(converted: Converted, folder: Path) -> Any:
    """Tokenizer of a converted checkpoint; `None` and a note without its files.

    Args:
        converted: The checkpoint.
        folder: Where its published files lie.
    """
    if not converted.tokenizer:
        return None
    config = converted.model.config
    text_config = config.text_config if config.model_type == "clip" else config.backbone_config
    text_config = getattr(text_config, "text_config", text_config)
    appended = getattr(config, "text_pooling", None) == "appended_cls"
    entries = text_config.vocab_size - appended
    make = {"clip": _clip, "conch": _conch, "wordpiece": _wordpiece}[converted.tokenizer]
    tokenizer = make(folder, converted.max_length)
    if tokenizer is None or len(tokenizer) > entries:
        state = "was found" if tokenizer is None else f"of {entries} entries was found"
        converted.notes.append(
            f"No tokenizer {state} beside the weights: this model reads texts once its tokenizer "
            "is saved into the folder."
        )
        return None
    if appended:
        # A token of the tokenizer, so that its row of the vocabulary does not look unused.
        fill = [f"<unused{i}>" for i in range(entries - len(tokenizer))]
        tokenizer.add_tokens(fill, special_tokens=True)
        tokenizer.add_special_tokens({"cls_token": "<cls>"})
    return tokenizer


def _clip(folder: Path, max_length: int) -> Any:
    """CLIP's byte-pair tokenizer with open_clip's ids and text cleaning."""
    tables = _clip_vocabulary(folder)
    if tables is None:
        return None
    vocabulary, merges = tables
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=_END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(Regex(old), new) for old, new in _CLEANING),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{_START} $A {_END}",
        special_tokens=[(token, vocabulary[token]) for token in (_START, _END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
        model_max_length=max_length,
    )


def _clip_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """CLIP's entries and merges: from the folder, an installed open_clip, or the Hub's cache."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), [(a, b) for a, b in pairs]
    package = find_spec("open_clip")
    listed = Path(str(package.origin)).parent / "bpe_simple_vocab_16e6.txt.gz" if package else None
    cached = try_to_load_from_cache("openai/clip-vit-base-patch32", "tokenizer.json")
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_file(folder / "tokenizer.json")
    if listed is not None and listed.is_file():
        return _from_open_clip(listed)
    return _from_tokenizer_file(Path(cached)) if isinstance(cached, str) else None


def _from_tokenizer_file(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    model = read_json(path).get("model", {})
    if not {_START, _END} <= model.get("vocab", {}).keys():
        return None
    pairs = [merge.split() if isinstance(merge, str) else merge for merge in model["merges"]]
    return model["vocab"], [(a, b) for a, b in pairs]


def _from_open_clip(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    # A headline, then more merges than CLIP has: 49,408 entries less bytes (twice) and two marks.
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49_408 - 2 * 256 - 2 + 1])]
    # Bytes stand for themselves where they print, for the characters from 256 on where not.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in prints] + [chr(256 + i) for i in range(256 - len(prints))]
    entries = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in merges), _START, _END]
    return {entry: i for i, entry in enumerate(entries)}, merges


def _conch(folder: Path, max_length: int) -> Any:
    files = [folder / "tokenizer.json", folder / "conch_byte_level_bpe_uncased.json"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return None
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token="<start_of_text>",
        eos_token="<end_of_text>",
        pad_token="<pad>",
        model_max_length=max_length,
    )


def _wordpiece(folder: Path, max_length: int) -> Any:
    names = ("unk", "sep", "pad", "cls", "mask")
    special: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in names}
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        known = {k: v for k, v in special.items() if tokenizer.token_to_id(v) is not None}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=max_length, **known
        )
    if not (folder / "vocab.txt").is_file():
        return None
    entries = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    settings = folder / "tokenizer_config.json"
    lower = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
    return BertTokenizer(
        vocab={entry: i for i, entry in enumerate(entries)},
        do_lower_case=lower,
        model_max_length=max_length,
        **special,
    )
