"""Source of a publication: a finished run, and the files of it that may leave.

Only regular files inside the run leave, as the run wrote them: no link, pipe or device, nothing
that changed since, and no code but the package's own.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..backbones.saved import first_line_of, read_config
from ..errors import GloVLMError
from ..files import (
    Manifest,
    check_fields,
    check_kind,
    digest_file,
    read_json,
    read_manifest,
    refuse_damage,
)
from .identifiers import FILE, Identifiers, read_identifiers, refuse_named, texts_of

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
_CODE = Path(__file__).parents[1] / "model"
_STAYS = ("predictions.parquet", "episodes.json", FILE, "config.yaml", "log.jsonl")


_FIELDS: dict[str, tuple[type, ...]] = {  # of results.json: what publishing reads of it
    **dict.fromkeys(("config", "data", "backbone", "per_class", "metrics", "training"), (dict,)),
    **dict.fromkeys(("config.method", "data.name", "data.group_column", "data.sampler"), (str,)),
    "data.classes": (list,),
    "data.support_groups_sha256": (list, type(None)),
    "backbone.name": (str, type(None)),
    "backbone.license": (str, type(None)),
    "notes": (list,),
    "subgroups": (dict, type(None)),
}
_CLASS_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "display_name": (str,), "prompts": (list,),
}  # fmt: skip


@dataclass
class Run:
    """Finished run: what publishing needs of it.

    Args:
        folder: Where it lies.
        results: The content of its `results.json`.
        config: The `GloVLMConfig` of its model.
        identifiers: What may not leave.
        manifest: Checksums of its files; `None` of a run from before these were kept.
        left_out: What stays here, in sentences.
    """

    folder: Path
    results: dict[str, Any]
    config: Any
    identifiers: Identifiers
    manifest: Manifest | None = None
    left_out: list[str] = field(default_factory=list)

    def copy(self, name: str, target: Path) -> None:
        """Copy a file of the run, once it is sure to be regular, inside, and as it was written.

        Args:
            name: Its path in the run's folder.
            target: The new file.

        Raises:
            GloVLMError: It is not.
        """
        with open_inside(self.folder, name) as stream, target.open("wb") as copy:
            shutil.copyfileobj(stream, copy)
        if self.manifest is None:
            return
        known = self.manifest.files.get(name)
        if known is None and PurePosixPath(name).suffix == ".safetensors":
            raise GloVLMError(
                f"'{self.folder / name}' is not among the files that the run wrote: remove it."
            )
        if known is not None and digest_file(target) != known:  # of the copy: it cannot change
            raise GloVLMError(
                f"'{self.folder / name}' has changed since it was written: restore a copy, or "
                "make it again (--overwrite)."
            )


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
        GloVLMError: It holds no finished run, or no model, or something that no run writes.
    """
    from ..model import GloVLMConfig

    check_kind(folder, "adaptation")
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
    refuse_links(folder, ("results.json", "model", "adapter", "figures", *_STAYS))
    results = read_json(folder / "results.json")
    check_fields(folder / "results.json", results, _FIELDS)
    for row in results["data"]["classes"]:
        check_fields(folder / "results.json", {"a class": row}, {"a class": (dict,)})
        check_fields(folder / "results.json", row, _CLASS_FIELDS)
    fields = read_config(folder / "model" / "config.json", f"The model of the run in {folder}")
    try:
        config = GloVLMConfig.from_pretrained(folder / "model")
        identifiers, unknown = read_identifiers(folder, results)
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        raise GloVLMError(f"The run in {folder} cannot be read: {first_line_of(error)}") from error
    names = {"prompts": fields.get("prompts"), "id2label": fields.get("id2label")}
    refuse_named("model/config.json", texts_of(names), identifiers)
    classes = {"data": {"classes": results["data"]["classes"]}}
    refuse_named("results.json", texts_of(classes), identifiers)
    manifest = read_manifest(folder)
    if manifest is not None:
        _refuse_changes(folder, manifest)
    left = [f"{name} stays here." for name in _STAYS if (folder / name).exists()]
    return Run(folder, results, config, identifiers, manifest, [*left, *filter(None, [unknown])])


def _refuse_changes(folder: Path, manifest: Manifest) -> None:
    """Refuse a model, an adapter or a list of identifiers that is not the one that was saved."""
    kept = [name for name in manifest.files if name.startswith(("model/", "adapter/", FILE))]
    refuse_damage(folder, manifest, [n for n in kept if not n.endswith(".md")])


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links, pipes and devices in a folder.

    Args:
        folder: The folder, which may be a link itself.
        names: Files and folders in it that are looked at, with all that they hold.

    Raises:
        GloVLMError: Names the first that is neither a regular file nor a folder.
    """
    for name in names:
        place = folder / name
        if not os.path.lexists(place):
            continue
        inside = []
        if place.is_dir() and not place.is_symlink():
            inside = [Path(base) / n for base, ds, files in os.walk(place) for n in (*ds, *files)]
        for path in (place, *sorted(inside)):
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _no_file(path)


@contextmanager
def open_inside(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a regular file that lies inside a folder, and behind no link.

    Args:
        folder: The folder, which may be a link itself.
        name: Path of the file in it.

    Raises:
        GloVLMError: It is a link, a pipe, a device, or lies elsewhere.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise _no_file(folder / name)
    opened: list[int] = []
    try:
        if os.open in os.supports_dir_fd:
            flags = os.O_RDONLY | os.O_NONBLOCK
            opened.append(os.open(folder, flags | os.O_DIRECTORY))
            for part in parts[:-1]:
                more = os.O_DIRECTORY | os.O_NOFOLLOW
                opened.append(os.open(part, flags | more, dir_fd=opened[-1]))
            handle = os.open(parts[-1], flags | os.O_NOFOLLOW, dir_fd=opened[-1])
        else:  # Windows has no such handles; links are rare there
            refuse_links(folder, ["/".join(parts[:n]) for n in range(1, len(parts) + 1)])
            handle = os.open(folder / name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _no_file(folder / name)
            yield stream
    except OSError as error:
        if error.filename is None:
            raise  # of what is done with the stream
        raise _no_file(folder / name) from error
    finally:
        for number in opened:
            os.close(number)


def _no_file(path: Path) -> GloVLMError:
    return GloVLMError(
        f"Expected a regular file inside the run, found a link, a pipe or nothing at '{path}', and "
        "nothing from elsewhere is published: put the file itself there, or remove it."
    )


def write_code(target: Path, run: Run) -> None:
    """Write the code of a published model: the package's own, whatever the run holds.

    Args:
        target: Takes the modules.
        run: Is told which of its modules differ.
    """
    names = sorted(path.name for path in _CODE.glob("*.py") if path.name != "__init__.py")
    other = []
    for name in names:
        shutil.copyfile(_CODE / name, target / name)
        own = run.folder / "model" / name
        if own.is_file() and digest_file(own) != digest_file(target / name):
            other.append(name)
    if other:
        run.left_out.append(
            f"model/{', '.join(other)} stays here: the code that leaves is that of this version of "
            "the package."
        )


def without_places(value: Any, more: Iterable[str] = ()) -> Any:
    """Drop the keys under which transformers notes where files lay, and those in `more`."""
    drop = _PLACES | set(more)
    if isinstance(value, dict):
        return {k: without_places(v, more) for k, v in value.items() if k not in drop}
    return [without_places(v, more) for v in value] if isinstance(value, list) else value
