"""Identifiers of patients, slides, files and places; the files of a published model."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..backbones.saved import first_line_of, read_config
from ..errors import GloVLMError
from ..files import check_fields, check_kind, read_json, read_manifest, refuse_damage
from ..settings import read_yaml

PARTS = "glovlm.json"  # config of a repository without the base's weights
BESIDE = "head.safetensors"  # its weights: all that neither base nor adapter holds
MODEL_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "processor_config.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PLACES = {  # keys under which transformers notes where files lay
    "_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file",
    "merges_file", "is_local", "local_files_only",
}  # fmt: skip


_FIELDS: dict[str, Sequence[type]] = {  # of results.json: what publishing reads of it
    **dict.fromkeys(("config", "data", "backbone", "per_class", "metrics", "training"), (dict,)),
    **dict.fromkeys(("config.method", "data.name", "data.group_column", "data.sampler"), (str,)),
    "data.classes": (list,),
    "data.support_groups_sha256": (list, type(None)),
    "backbone.name": (str, type(None)),
    "backbone.license": (str, type(None)),
    "subgroups": (dict, type(None)),
}


_CLASS_FIELDS: dict[str, Sequence[type]] = {
    "name": (str,), "display_name": (str,), "prompts": (list,),
}  # fmt: skip


@dataclass(frozen=True)
class Identifiers:
    """Identifiers of a run: names of patients, slides, files and places.

    Args:
        names: Those that the run's files spell out.
        hashes: SHA-256 of further groups, which `results.json` knows by that alone.
    """

    names: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        return re.compile(rf"(?<![\w.-])(?:{parts})(?![\w-])") if parts else re.compile(r"(?!)")

    def find(self, text: str) -> str | None:
        """First identifier in a text, as one to three whole words."""
        if match := self._pattern.search(text):
            return match.group()
        words = [word.rstrip(".") for word in re.findall(r"[\w.-]+", text)]
        for count in (1, 2, 3) if self.hashes else ():
            for i in range(len(words) - count + 1):
                named = " ".join(words[i : i + count])
                if is_identifying(named) and sha256(named.encode()).hexdigest() in self.hashes:
                    return named
        return None


def is_identifying(name: str) -> bool:
    """Whether a name is long enough to identify anybody; shorter ones occur in any text."""
    return len(name) >= (7 if re.fullmatch(r"[\d.]+", name) else 4)


@dataclass
class Run:
    """Finished run: what publishing needs of it.

    Args:
        folder: Where it lies.
        results: The content of its `results.json`.
        config: The `GloVLMConfig` of its model.
        identifiers: What may not leave.
        left_out: What stays here, in sentences.
    """

    folder: Path
    results: dict[str, Any]
    config: Any
    identifiers: Identifiers
    left_out: list[str] = field(default_factory=list)


def check_repo_id(repo_id: str) -> None:
    """Check the id of a repository.

    Raises:
        GloVLMError: It is not `owner/name`.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(ValueError):
        validate_repo_id(repo_id)
        if repo_id.count("/") == 1:
            return
    raise GloVLMError(
        f"Expected the id of a repository, owner/name in letters, digits, '-', '_' and '.', found "
        f"'{repo_id}'."
    )


def read_run(folder: Path) -> Run:
    """Read a finished run for publishing.

    Args:
        folder: The output folder of `glovlm train`.

    Raises:
        GloVLMError: It holds no finished run, or no model.
    """
    from ..model import GloVLMConfig

    check_kind(folder, "adaptation")
    if (manifest := read_manifest(folder)) is not None:
        weights = [name for name in manifest.files if name.endswith(".safetensors")]
        refuse_damage(folder, manifest, weights)
    if not (folder / "results.json").is_file() or not (folder / "config.yaml").is_file():
        raise GloVLMError(
            f"Expected the --output-dir of a finished `glovlm train`, found none at {folder}."
        )
    if not (folder / "model" / "config.json").is_file():
        raise GloVLMError(f"The run in {folder} kept no model: train it again with its model.")
    if (folder / "model" / "adapter_config.json").exists():
        raise GloVLMError(
            f"{folder / 'model'} holds merged weights and an adapter, which would be applied "
            "twice: remove adapter_config.json from it."
        )
    results = read_json(folder / "results.json")
    check_fields(folder / "results.json", results, _FIELDS)
    for row in results["data"]["classes"]:
        check_fields(folder / "results.json", {"a class": row}, {"a class": (dict,)})
        check_fields(folder / "results.json", row, _CLASS_FIELDS)
    read_config(folder / "model" / "config.json", f"The model of the run in {folder}")
    try:
        config = GloVLMConfig.from_pretrained(folder / "model")
        identifiers = _identifiers(folder, results)
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(f"The run in {folder} cannot be read: {first_line_of(error)}") from error
    stays = ("predictions.parquet", "episodes.json", "config.yaml", "log.jsonl")
    left = [f"{name} stays here." for name in stays if (folder / name).exists()]
    return Run(folder, results, config, identifiers, left)


def _identifiers(folder: Path, results: Mapping[str, Any]) -> Identifiers:
    from ..inference import Predictions

    named: set[str] = set()
    if (folder / "predictions.parquet").is_file():
        predictions = Predictions.load(folder / "predictions.parquet")
        named |= {*predictions.file_names, *(predictions.groups or ())}
    if (folder / "episodes.json").is_file():
        sides = ("support", "validation", "calibration", "test_groups", "calibration_groups")
        content = read_json(folder / "episodes.json")
        check_fields(folder / "episodes.json", content, {"draws": (list,)})
        for draw in content["draws"]:
            check_fields(folder / "episodes.json", {"draws": draw}, {"draws": (dict,)})
            named |= set(_strings([draw.get(side) for side in sides]))
    named |= {Path(name).name for name in named} | {Path(name).stem for name in named}
    known = {*results["per_class"], results["data"]["group_column"], results["data"]["sampler"]}
    settings = read_yaml(folder / "config.yaml")
    check_fields(folder / "config.yaml", settings, {"data": (str,), "output_dir": (str,)})
    places = [str(Path.home()), str(folder), *_strings(settings)]
    places = [place for place in places if Path(place).is_absolute() and len(place) > 1]
    return Identifiers(
        frozenset([*filter(is_identifying, named - known), *places]),
        frozenset(results["data"].get("support_groups_sha256") or ()),
    )


def without_places(value: Any, more: Iterable[str] = ()) -> Any:
    """Drop the keys under which transformers notes where files lay, and those in `more`."""
    drop = _PLACES | set(more)
    if isinstance(value, dict):
        return {k: without_places(v, more) for k, v in value.items() if k not in drop}
    return [without_places(v, more) for v in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
