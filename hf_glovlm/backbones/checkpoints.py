"""Published checkpoints: downloaded, converted once, and kept.

Converted weights lie below `GLOVLM_CACHE` (else `~/.cache/glovlm`), in a folder per checkpoint and
commit, so that a second load neither downloads nor converts anything, also without a connection.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import GloVLMError
from ..files import (
    LOCK,
    MANIFEST,
    UNFINISHED,
    check_fields,
    damaged_files,
    digest_value,
    disk_reason,
    finish_move,
    one_writer,
    put_in_place,
    read_json,
    read_manifest,
    staging,
    write_json,
)
from .saved import loading_reason

WAIT = 3600.0  # seconds for another process that converts the same weights
ORIGIN = "backbone.json"  # beside converted weights: which checkpoint and commit they come from
_CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
SMALL_FILES = (
    "open_clip_config.json", "config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)

logger = logging.getLogger("hf_glovlm")


@dataclass(frozen=True)
class Checkpoint:
    """Published checkpoint on the Hub.

    Args:
        hub_id: `owner/name`.
        name: The name that the user gave, for messages.
        revision: Commit or branch; `None` is the newest.
        kind: Layout, for `conversion.convert_checkpoint`; `None` is recognised there.
        weights: The weights' file, where it has a name of its own.
        gated: Whether access has to be requested, as far as known.
    """

    hub_id: str
    name: str
    revision: str | None = None
    kind: str | None = None
    weights: str | None = None
    gated: bool = False

    def fetch(self, file: str, revision: str | None = None) -> Path | None:
        """Download one file, or take it from the Hub cache; `None` where neither has it.

        Raises:
            GloVLMError: Access is denied, or there is no such checkpoint or revision.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.hub_id, file, revision=revision or self.revision))
        except EntryNotFoundError:  # also when there is no connection
            return None
        except (OSError, ValueError) as error:
            raise cannot_load(self.name, self.hub_id, error, gated=self.gated) from error

    def download(self) -> Path:
        """Download the published files into the Hub cache.

        Returns:
            The weights there, in a folder that bears the name of the commit.

        Raises:
            GloVLMError: There are no weights, or `fetch` fails.
        """
        small = [path for file in SMALL_FILES if (path := self.fetch(file))]
        commit = small[0].parent.name if small else None
        files = list(dict.fromkeys([*filter(None, [self.weights]), *WEIGHTS_FILES]))
        weights = self._first(files, commit)
        if weights is None:
            raise GloVLMError(
                f"Backbone '{self.name}' cannot be loaded: neither {self.hub_id} on the Hub nor "
                f"the Hub cache here has any of {', '.join(files)}. {_WHAT_TO_DO}"
            )
        if not {"tokenizer.json", "vocab.json", "vocab.txt"} & {path.name for path in small}:
            with suppress(GloVLMError):  # CLIP's is often left out; the conversion looks for it
                Checkpoint(_CLIP_TOKENIZER, self.name).fetch("tokenizer.json")
        return weights

    def convert(self) -> Path:
        """Download and convert, unless that was done before.

        Returns:
            The folder with the converted weights, which bears the name of the commit.

        Raises:
            GloVLMError: Nothing can be fetched, or it cannot be converted.
        """
        kept = _conversions() / self.hub_id.replace("/", "--")
        small_file = self._first(SMALL_FILES)
        # Without a connection and with an empty Hub cache, what was converted before still serves.
        commit = small_file.parent.name if small_file else self.revision or _newest(kept)
        if commit is not None and _is_kept(kept / commit):
            return kept / commit
        weights = self.download()
        commit = weights.parent.name
        origin = {"hub_id": self.hub_id, "revision": commit}
        return _convert_once(weights, kept / commit, self.kind, origin)

    def _first(self, files: Sequence[str], revision: str | None = None) -> Path | None:
        paths = (self.fetch(file, revision) for file in files)
        return next((path for path in paths if path), None)


def convert_folder(folder: Path) -> Path | None:
    """Convert the published files of a local folder, unless that was done before.

    Returns:
        The folder with the converted weights; `None` if the given one holds no weights at all.

    Raises:
        GloVLMError: They cannot be converted.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(path.suffix in (".bin", ".pt", ".safetensors") for path in files):
        return None
    target = _conversions() / "local" / digest_value(str(folder.resolve()))
    if _is_kept(target, folder):
        return target
    return _convert_once(folder, target, None, {"hub_id": None})


def refuse_damaged(folder: Path) -> None:
    """Refuse converted weights that are not as the conversion wrote them.

    Raises:
        GloVLMError: Names what has changed.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind == "backbone":
        damaged = damaged_files(folder, manifest)
        if damaged:
            raise GloVLMError(
                f"'{folder / damaged[0]}' is damaged or missing since the weights were converted: "
                "convert them again (`glovlm backbones convert`), or restore a copy."
            )


def write_origin(folder: Path, origin: Mapping[str, str | None]) -> None:
    """Write the origin (Hub id, commit) of converted weights beside them."""
    write_json(folder / ORIGIN, origin)


def read_origin(folder: Path) -> tuple[str | None, str | None]:
    """Origin (Hub id, commit) of the converted weights in a folder, where it is written."""
    if not (folder / ORIGIN).is_file():
        return None, None
    origin = read_json(folder / ORIGIN)
    kinds = (str, type(None))
    check_fields(folder / ORIGIN, origin, {"hub_id": kinds, "revision": kinds})
    return origin.get("hub_id"), origin.get("revision")


def cannot_load(name: str, place: str, error: Exception, *, gated: bool = False) -> GloVLMError:
    """Error for a backbone that cannot be loaded.

    Args:
        name: The name that the user gave.
        place: Hub id or folder.
        error: What was raised.
        gated: Whether access has to be requested, as far as known.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if _is_denied(error, gated):
        return GloVLMError(
            f"Backbone '{name}' is gated, and you have no access to it: ask for access at "
            f"https://huggingface.co/{place} and run `hf auth login`."
        )
    what = loading_reason(error, Path(place))
    for cause in _causes(error):
        if isinstance(cause, RevisionNotFoundError):
            what = f"{place} has no such revision."
        elif isinstance(cause, RepositoryNotFoundError):
            what = f"there is no {place} on the Hub, or it is private."
    return GloVLMError(f"Backbone '{name}' cannot be loaded: {what} {_WHAT_TO_DO}")


_WHAT_TO_DO = (
    "What to do: check the name, the connection (or HF_HUB_OFFLINE), or give a local folder."
)


def _is_denied(error: Exception, gated: bool) -> bool:
    """Whether the Hub refused access; to anonymous users it reports a missing repository."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return True
        if isinstance(cause, RepositoryNotFoundError):
            return gated
        if isinstance(cause, HfHubHTTPError):
            return getattr(cause.response, "status_code", None) in (401, 403)
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _conversions() -> Path:
    return Path(os.environ.get("GLOVLM_CACHE") or "~/.cache/glovlm").expanduser() / "backbones"


def _newest(folder: Path) -> str | None:
    made = [path.parent for path in folder.glob(f"[!.]*/{ORIGIN}")]
    return max(made, key=lambda path: path.stat().st_mtime).name if made else None


def _is_kept(target: Path, source: Path | None = None, *, quiet: bool = False) -> bool:
    """Whether a conversion is there, undamaged and of this version; a folder's, if it is of that.

    Args:
        target: The converted weights.
        source: The published ones; those on the Hub are known by their commit.
        quiet: Whether damage is no news.
    """
    from .conversion import VERSION, is_made_from

    try:
        manifest = read_manifest(target)
        damaged = damaged_files(target, manifest) if manifest else []
    except GloVLMError:
        manifest, damaged = None, [MANIFEST]
    if damaged and not quiet:
        logger.warning(
            "Converted weights are damaged (%s): they are converted again.", target / damaged[0]
        )
    if manifest is None or damaged or not (target / ORIGIN).is_file():
        return False
    if source is not None:
        return is_made_from(manifest.made_from, source)
    return manifest.made_from.get("version") == VERSION


def _convert_once(
    source: Path, target: Path, kind: str | None, origin: Mapping[str, str | None]
) -> Path:
    """Convert into a folder that appears as one step, also beside other processes."""
    from .conversion import convert_checkpoint

    folder = source if source.is_dir() else None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with one_writer(target, wait=WAIT):
            finish_move(target / UNFINISHED, target)
            if _is_kept(target, folder, quiet=True):
                return target  # another process was faster
            name = origin["hub_id"] or source.name
            logger.warning("Converting %s once; the result is kept.", name)
            with staging(target) as work:
                report = convert_checkpoint(source, work, kind)
                write_origin(work, origin)
                names = {path.name for place in (work, target) for path in place.iterdir()}
                names -= {UNFINISHED, LOCK, MANIFEST}
                put_in_place(work, target, [*sorted(names), MANIFEST])
            for sentence in report.notes:
                logger.warning("%s: %s", name, sentence)
    except OSError as error:
        raise GloVLMError(
            f"Converted weights cannot be written to {target.parent} "
            f"({disk_reason(error.__cause__ or error)}): set GLOVLM_CACHE to a folder with room."
        ) from error
    return target
