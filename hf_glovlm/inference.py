"""Images and prompts in, features and predictions out; and the cache that encodes an image once.

Nothing here trains. The cache holds features of patients' images: `FeatureCache` says where.
"""

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from .calibration.inputs import softmax
from .data.folder import open_image
from .errors import GloVLMError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from .model import GloVLMForImageClassification, GloVLMModel, GloVLMProcessor

__all__ = [
    "CacheEntry",
    "FeatureCache",
    "Predictions",
    "embed_images",
    "embed_prompts",
    "encoder_key",
    "predict",
    "resolve_device",
]

# Part of every key: raise it when decoding or pooling changes what comes out for the same input.
CACHE_VERSION = 1
SHARD_ROWS = 2048  # new features are stored at least this often, so an interruption loses little

logger = logging.getLogger("hf_glovlm")


# --------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class CacheEntry:
    """One encoder's features in the cache.

    Args:
        key: Folder name; see `encoder_key`.
        name: What the encoder is called, for people.
        images: Number of stored vectors.
        size: Bytes on disk.
        created: Seconds since the epoch.
        last_used: Seconds since the epoch.
    """

    key: str
    name: str
    images: int
    size: int
    created: float
    last_used: float


class FeatureCache:
    """Pooled vision features on disk: one folder per encoder, safetensors shards that only grow.

    Each shard holds `features` float32 `[n, width]`, `keys` (16 bytes an image) and a checksum. It
    is written to a temporary file and renamed, so any number of processes may share the cache; a
    damaged shard is reported, removed and computed again. The features come from patients' images:
    treat the folder as you treat those (it is made readable for its owner only).

    Args:
        folder: Where; by default the environment variable `GLOVLM_CACHE`, else
            `~/.cache/glovlm/features`.
        max_bytes: Above this size the encoders that were not used for longest are removed.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 2 * 2**30) -> None:
        place = folder or os.environ.get("GLOVLM_CACHE") or "~/.cache/glovlm/features"
        self.folder = Path(place).expanduser()
        self.max_bytes = max_bytes

    def get(self, encoder: str, images: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Look up features.

        Args:
            encoder: Key of the encoder.
            images: Keys of images, 16 bytes each.

        Returns:
            Vector `[width]` of each image that is there.
        """
        wanted, found = set(images), dict[bytes, NDArray[np.float32]]()
        for shard in self._shards(encoder):
            if not wanted:
                break
            for key, vector in _read_shard(shard, wanted):
                found[key] = vector
                wanted.discard(key)
        if found:
            self._touch(encoder)
        return found

    def put(
        self, encoder: str, images: Sequence[bytes], features: NDArray[np.float32], name: str = ""
    ) -> None:
        """Store features `[n, width]` of images; a full or read-only disk is only a warning.

        Args:
            encoder: Key of the encoder.
            images: Keys of the `n` images, 16 bytes each.
            features: Finite float32 `[n, width]`.
            name: What the encoder is called, for people.
        """
        from safetensors.numpy import save_file

        keys = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), 16)
        features = np.ascontiguousarray(features, np.float32)
        folder = self.folder / encoder
        shard = folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder / "about.json"
            if not about.is_file():
                text = json.dumps({"name": name, "created": time.time()})
                _write(about, lambda path: path.write_text(text, encoding="utf-8"))
            tensors: dict[str, NDArray[Any]] = {"features": features, "keys": keys}
            metadata = {"checksum": _checksum(keys, features)}
            _write(shard, lambda path: save_file(tensors, path, metadata))
            self._touch(encoder)
            self._evict(shard)
        except OSError as error:
            logger.warning(
                "Features cannot be cached in %s (%s); going on without. Set GLOVLM_CACHE to a "
                "folder that can be written.",
                self.folder,
                error,
            )

    def entries(self) -> list[CacheEntry]:
        """List the encoders in the cache, the one used last first."""
        entries = []
        for used, folder in self._encoders():
            try:
                about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
                entries.append(
                    CacheEntry(
                        key=folder.name,
                        name=str(about["name"]),
                        images=sum(map(_count_rows, self._shards(folder.name))),
                        size=_size(folder),
                        created=float(about["created"]),
                        last_used=used,
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed by another process, or not ours
        return entries[::-1]

    def clear(self, encoder: str | None = None) -> int:
        """Remove one encoder's features, or all.

        Args:
            encoder: Its key (or an unambiguous beginning); all encoders when not given.

        Returns:
            Bytes freed.

        Raises:
            GloVLMError: No encoder or more than one has a key that begins so.
        """
        folders = [folder for _, folder in self._encoders()]
        if encoder is not None:
            folders = [f for f in folders if f.name.startswith(encoder)]
            if len(folders) != 1:
                raise GloVLMError(
                    f"Expected the key of one encoder in {self.folder}, found {len(folders)} that "
                    f"begin with '{encoder}'; `glovlm cache` lists them."
                )
        freed = sum(map(_size, folders))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _shards(self, encoder: str) -> list[Path]:
        return sorted((self.folder / encoder).glob("*.safetensors"))

    def _encoders(self) -> list[tuple[float, Path]]:
        """The encoders' folders with when they were used last, the longest ago first."""
        found = []
        for about in self.folder.glob("*/about.json"):
            with suppress(OSError):  # removed meanwhile
                found.append((about.stat().st_mtime, about.parent))
        return sorted(found)

    def _touch(self, encoder: str) -> None:
        """Say that an encoder was used now; its `about.json` carries the time."""
        with suppress(OSError):
            os.utime(self.folder / encoder / "about.json")

    def _evict(self, newest: Path) -> None:
        """Remove whole encoders, then older shards of the current one, until the rest fits."""
        sizes = {folder: _size(folder) for _, folder in self._encoders()}
        excess = sum(sizes.values()) - self.max_bytes
        for folder, size in sizes.items():
            if excess > 0 and folder != newest.parent:
                shutil.rmtree(folder, ignore_errors=True)
                excess -= size
        for shard in sorted(newest.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime):
            if excess > 0 and shard != newest:
                excess -= shard.stat().st_size
                shard.unlink(missing_ok=True)


def _read_shard(shard: Path, wanted: set[bytes]) -> list[tuple[bytes, NDArray[np.float32]]]:
    """Read the wanted vectors of a shard; a damaged one is reported and removed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            keys = np.ascontiguousarray(file.get_tensor("keys"))
            rows = {bytes(key): row for row, key in enumerate(keys)}
            hits = sorted((row, key) for key, row in rows.items() if key in wanted)
            if not hits:
                return []
            features = np.ascontiguousarray(file.get_tensor("features"))
            if (file.metadata() or {}).get("checksum") != _checksum(keys, features):
                raise ValueError("its checksum does not match")
        # Copies, so that one wanted row does not keep a whole shard in memory.
        return [(key, features[row].copy()) for row, key in hits]
    except FileNotFoundError:
        return []  # removed by another process since it was listed
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning(
            "A shard of the feature cache is damaged (%s: %s); its images are encoded again.",
            shard,
            error,
        )
        with suppress(OSError):
            shard.unlink()
        return []


def _count_rows(shard: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            return int(file.get_slice("keys").get_shape()[0])
    except (SafetensorError, OSError):
        return 0


def _checksum(keys: NDArray[np.uint8], features: NDArray[np.float32]) -> str:
    digest = xxhash.xxh3_64(repr((keys.shape, features.shape, features.dtype)).encode())
    digest.update(keys.data)
    digest.update(features.data)
    return str(digest.hexdigest())


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(OSError):  # removed meanwhile
            total += path.stat().st_size
    return total


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encoder_key(model: "GloVLMModel", processor: "GloVLMProcessor") -> str:
    """Name everything that decides the pooled vector of an image, as one hash.

    That is every weight but those of the text tower and the projections, the vision tower's
    configuration, pooling, dtype, and the image transform with the versions of the libraries that
    carry it out. Two models that differ in projection,
    head or prompts alone share their features.

    Args:
        model: The model.
        processor: Its processor.

    Returns:
        32 hexadecimal digits.
    """
    config: Any = model.config
    vision = config.backbone_config.vision_config.to_dict()
    images = processor.image_processor
    about = {
        "version": CACHE_VERSION,
        "libraries": [version(name) for name in ("pillow", "torchvision", "transformers")],
        "vision": {k: v for k, v in vision.items() if k not in _NOT_IN_KEY},
        "pooling": [config.vision_pooling, config.normalize_pooled] if config.is_pair else None,
        "transform": [
            type(images).__name__,
            {k: v for k, v in images.to_dict().items() if k not in _NOT_IN_KEY},
        ],
    }
    if processor.torchvision_crop:
        about["crop"] = "torchvision"
    if config.context:  # which patches are dropped is no weight
        about["context"] = config.context
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if _decides_pooling(name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, layer in model.named_modules():
        # The switch and the scale of a PEFT layer are no weights. A transformers model has a method
        # of that name, hence the property.
        tuned = isinstance(getattr(type(layer), "disable_adapters", None), property)
        if tuned and _decides_pooling(name):
            state = (layer.disable_adapters, layer.active_adapters, vars(layer).get("scaling"))
            digest.update(f"{name} {state}".encode())
    return str(digest.hexdigest())


def _decides_pooling(name: str) -> bool:
    """Whether a part of the model comes before the projection; unknown parts are taken to."""
    after = ("backbone.text_model.", "visual_projection", "text_projection", "logit_")
    return not any(part in name for part in after)


# Where a configuration came from, not what it computes. sdpa and eager agree to float noise.
_NOT_IN_KEY = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "_processor_class",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "processor_class",
        "torch_dtype",
        "transformers_version",
    }
)


# ------------------------------------------------------------------------------------ features


def resolve_device(device: "str | torch.device | None" = "auto") -> torch.device:
    """Turn what a user wrote into a device that is there.

    Args:
        device: `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        GloVLMError: There is no such device on this machine.
    """
    mps = torch.backends.mps.is_available()
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        known = ("auto", "cpu", "cuda", "mps")
        raise GloVLMError(
            f"Unknown device '{device}': expected auto, cpu, cuda, cuda:N or mps."
            f"{nearest(str(device), known)}"
        ) from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise GloVLMError(
            f"Device '{device}' was asked for, but PyTorch {torch.__version__} sees {gpus} CUDA "
            "GPUs here: use auto or cpu, or install a CUDA build and its driver."
        )
    if chosen.type == "mps" and not mps:
        raise GloVLMError(
            "Device 'mps' was asked for, but it needs a Mac with Apple silicon and a PyTorch built "
            "for it: use auto or cpu."
        )
    return chosen


def embed_images(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    images: "Dataset",
    *,
    batch_size: int = 32,
    device: "str | torch.device | None" = None,
    cache: FeatureCache | None = None,
    progress: bool = False,
    project: bool = True,
) -> NDArray[np.float32]:
    """Encode images, each distinct content once; what the cache holds is not even decoded.

    Decoding and preprocessing run in a thread, one batch ahead of the tower. A batch that does not
    fit into the accelerator's memory is halved, and so are those after it.

    Args:
        model: The model; evaluated without dropout and left in the mode it was in.
        processor: Its processor.
        images: Rows with an `image` column; other columns are ignored.
        batch_size: Images at a time.
        device: Where to compute (the model is moved there); by default where the model is.
        cache: Where pooled vectors are looked up and stored.
        progress: Whether to show a progress bar on the terminal.
        project: Whether the projection is applied; it is cheap and never cached.

    Returns:
        `[n, dim]` equal to `model.get_image_features(...).pooler_output`, not normalised; without
        `project` the pooled vectors `[n, width]` of `model.pool_images`.

    Raises:
        GloVLMError: An image cannot be decoded, its features are not finite, or one image alone
            does not fit into memory.
    """
    _move(model, device)
    rows = _Rows(images)
    digests = rows.digests()
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    key = encoder_key(model, processor) if cache is not None else ""
    vectors = cache.get(key, list(first)) if cache is not None else {}
    missing = [(digest, row) for digest, row in first.items() if digest not in vectors]
    with evaluating(model), _bar("Encoding images", len(missing), progress) as advance:
        for start in range(0, len(missing), SHARD_ROWS):
            part = missing[start : start + SHARD_ROWS]
            wanted = [row for _, row in part]
            pooled = _encode(model, processor, rows, wanted, batch_size, advance)
            vectors.update(zip((digest for digest, _ in part), pooled, strict=True))
            if cache is not None:
                config: Any = model.config
                name = config.backbone_name or config.backbone_config.model_type
                cache.put(key, [digest for digest, _ in part], pooled, name)
        if not digests:
            pooled = np.empty((0, model.config.vision_pooled_dim), np.float32)
        else:
            pooled = np.stack([vectors[digest] for digest in digests])
        return _project(model, pooled) if project else pooled


def embed_prompts(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    prompts: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Encode the prompts of each class into one prototype a class.

    Args:
        model: The model.
        processor: Its processor, with the learned context if there is one.
        prompts: Per class, its texts; at least one.
        batch_size: Texts at a time; the texts of one class stay together.

    Returns:
        `[classes, dim]`: each text's features normalised, averaged, normalised again.

    Raises:
        GloVLMError: A class has no prompt.
    """
    empty = [k for k, texts in enumerate(prompts) if not texts]
    if empty or not prompts:
        raise GloVLMError(
            f"Every class needs at least one prompt; class number {empty[0] if empty else 0} has "
            "none: add one to classes.yaml."
        )
    encoded = processor.encode_prompts([list(texts) for texts in prompts])
    encoded = {name: tensor.to(_device(model)) for name, tensor in encoded.items()}
    ends = np.cumsum([len(texts) for texts in prompts])
    prototypes, begin = [], 0
    with evaluating(model):
        while begin < len(prompts):
            done = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + batch_size, side="right")))
            rows = slice(done, ends[end - 1])
            prototypes.append(
                model.class_prototypes(
                    encoded["input_ids"][rows],
                    encoded["attention_mask"][rows],
                    encoded["class_index"][rows] - begin,
                )
            )
            begin = end
        return _array(torch.cat(prototypes))


class _Rows:
    """The image column of a data set, undecoded."""

    def __init__(self, images: "Dataset") -> None:
        self._table = images.select_columns(["image"]).with_format("arrow")

    def values(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`{"bytes", "path"}` of some rows."""
        values: list[dict[str, Any]] = self._table[list(rows)]["image"].to_pylist()
        return values

    def digests(self) -> list[bytes]:
        """The hash of each row's file content, 16 bytes."""
        return [
            _digest(value)
            for part in self._table.iter(batch_size=256)
            for value in part["image"].to_pylist()
        ]


def _digest(value: dict[str, Any]) -> bytes:
    content = value["bytes"]
    if content is None:
        try:
            content = Path(value["path"]).read_bytes()
        except OSError:
            open_image(value)  # says what is wrong with it
            raise
    return bytes(xxhash.xxh3_128_digest(content))


def _encode(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    rows: _Rows,
    wanted: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None],
) -> NDArray[np.float32]:
    """Decode, preprocess and pool the wanted rows: `[n, width]`."""
    device, dtype = _device(model), model.dtype
    batches = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    fits = batch_size

    def prepare(batch: Sequence[int]) -> dict[str, torch.Tensor]:
        pictures = [open_image(value) for value in rows.values(batch)]
        inputs = dict(processor(images=pictures, return_tensors="pt"))
        if device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        return inputs

    def pool(inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        nonlocal fits
        n = len(inputs["pixel_values"])
        if n <= fits:
            try:
                return _array(model.pool_images(**_moved(inputs, device, dtype)))
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
            if n == 1:
                raise GloVLMError(
                    f"One image does not fit into the memory of device '{device}': free some of "
                    "it, or use device cpu."
                )
            fits = n // 2
            torch.cuda.empty_cache()
            logger.warning("Out of memory on %s: going on with batches of %d.", device, fits)
        parts = [{k: v[i : i + fits] for k, v in inputs.items()} for i in range(0, n, fits)]
        return np.concatenate([pool(part) for part in parts])

    pooled = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(prepare, batches[0])
        for i, batch in enumerate(batches):
            inputs = ahead.result()
            if i + 1 < len(batches):
                ahead = thread.submit(prepare, batches[i + 1])
            pooled.append(pool(inputs))
            advance(len(batch))
    result = np.concatenate(pooled)
    broken = np.flatnonzero(~np.isfinite(result).all(1))
    if len(broken):
        value = rows.values([wanted[broken[0]]])[0]
        raise GloVLMError(
            f"The vision tower returned numbers that are not finite for {len(broken)} images "
            f"(first: {value['path'] or f'row {wanted[broken[0]]}'}): check the weights, or load "
            "them in float32."
        )
    return result


def _project(model: "GloVLMModel", pooled: NDArray[np.float32]) -> NDArray[np.float32]:
    device, dtype = _device(model), model.dtype
    parts = [torch.from_numpy(pooled[i : i + 4096]) for i in range(0, max(len(pooled), 1), 4096)]
    return np.concatenate([_array(model.project_images(part.to(device, dtype))) for part in parts])


def _moved(
    inputs: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        for name, tensor in inputs.items()
    }


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _move(model: torch.nn.Module, device: "str | torch.device | None") -> None:
    """Put a model where it is to compute; by default it stays where it is."""
    if device is not None:
        model.to(resolve_device(device))


@contextmanager
def still(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards for each part the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`still`, without gradients and in full precision."""
    # The cache's key knows the dtype of the weights, not that of a loop that is going on.
    plain = torch.autocast(_device(model).type, enabled=False)
    with still(model), torch.inference_mode(), plain:
        yield


@contextmanager
def _bar(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream, or nothing."""
    if not shown or total == 0:
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda step: bar.advance(task, step)


# --------------------------------------------------------------------------------- predictions


@dataclass
class Predictions:
    """What a model says about images, with what is known about them.

    Args:
        probabilities: `[n, K]` float64, rows sum to 1.
        logits: `[n, K]` float32, calibrated as the model's config says.
        class_names: The `K` classes, in the order of the columns.
        file_names: The `n` images.
        similarities: `[n, K]` cosines between image and class text, for heads that compare these.
        groups: Patient (or case, or slide) of each image, where known.
        labels: True class numbers `[n]`, -1 for an image without; `None` when none is known.
    """

    probabilities: NDArray[np.float64]
    logits: NDArray[np.float32]
    class_names: list[str]
    file_names: list[str]
    similarities: NDArray[np.float32] | None = None
    groups: list[str] | None = None
    labels: NDArray[np.int64] | None = None

    @property
    def predicted(self) -> list[str]:
        """The most probable class of each image."""
        return [self.class_names[k] for k in self.probabilities.argmax(1)]

    def save(self, path: str | Path) -> None:
        """Write a parquet file: one row an image, columns as `glovlm predict` names them.

        `file_name`, `label` (null if unknown), `predicted`, `p_<class>` and `logit_<class>` for
        every class; `similarity_<class>` and `group` where known.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        labels = [None] * len(self.file_names) if self.labels is None else self.labels.tolist()
        names = [None if k is None or k < 0 else self.class_names[k] for k in labels]
        columns: dict[str, Any] = {
            "file_name": pa.array(self.file_names, pa.string()),
            "label": pa.array(names, pa.string()),
            "predicted": pa.array(self.predicted, pa.string()),
        }
        for prefix, values in self._matrices():
            for k, name in enumerate(self.class_names):
                columns[f"{prefix}_{name}"] = pa.array(values[:, k])
        if self.groups is not None:
            columns["group"] = pa.array(self.groups, pa.string())
        metadata = {_METADATA: json.dumps({"class_names": self.class_names})}
        table = pa.table(columns).replace_schema_metadata(metadata)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write(Path(path), lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read what `save` wrote.

        Raises:
            GloVLMError: The file is missing, or no predictions of this package.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[_METADATA])
        except (OSError, pa.ArrowException, KeyError, ValueError):
            raise GloVLMError(
                f"{path} is no predictions file: expected the predictions.parquet that "
                "`glovlm train` or `glovlm evaluate` wrote."
            ) from None
        names = [str(name) for name in about["class_names"]]
        index = {name: k for k, name in enumerate(names)}
        true = [index.get(name, -1) for name in table["label"].to_pylist()]

        def matrix(prefix: str) -> NDArray[Any]:
            return np.stack([table[f"{prefix}_{name}"].to_numpy() for name in names], axis=1)

        return cls(
            probabilities=matrix("p"),
            logits=matrix("logit"),
            class_names=names,
            file_names=table["file_name"].to_pylist(),
            similarities=(
                matrix("similarity") if f"similarity_{names[0]}" in table.column_names else None
            ),
            groups=table["group"].to_pylist() if "group" in table.column_names else None,
            labels=None if max(true, default=-1) < 0 else np.array(true, np.int64),
        )

    def _matrices(self) -> list[tuple[str, NDArray[Any]]]:
        found: list[tuple[str, NDArray[Any]]] = [("p", self.probabilities), ("logit", self.logits)]
        return found if self.similarities is None else [*found, ("similarity", self.similarities)]


_METADATA = b"hf_glovlm"


def load_classifier(name: str) -> tuple[Any, Any, dict[str, Any] | None]:
    """Load what `glovlm train` wrote.

    Args:
        name: A run's folder, its `model/`, or a Hub id.

    Returns:
        The classifier in fp32 and evaluation mode, its processor, and the results of its run where
        they lie beside it.

    Raises:
        GloVLMError: There is nothing, or something else.
    """
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig

    from .model import GloVLMForImageClassification, GloVLMProcessor

    folder, run = Path(name).expanduser(), None
    if folder.is_dir():
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        if not (folder / "config.json").is_file():
            raise GloVLMError(
                f"{name} holds no model: expected the --output-dir of `glovlm train`."
            )
        results = (folder.parent if folder.name == "model" else folder) / "results.json"
        if results.is_file():
            run = json.loads(results.read_text(encoding="utf-8"))
    elif folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        found = "a file" if folder.exists() else "nothing"
        raise GloVLMError(
            f"Expected a run's folder, its model folder or a Hub id (owner/name), found {found} at "
            f"{name}."
        )
    source = str(folder) if folder.is_dir() else name
    try:
        about, _ = PreTrainedConfig.get_config_dict(source)
        if about.get("architectures") != ["GloVLMForImageClassification"]:
            kind = ", ".join(about.get("architectures") or []) or "no known kind"
            raise GloVLMError(
                f"{name} is no classifier of ours, but of {kind}: give what `glovlm train` wrote. "
                "A backbone goes into `glovlm train --backbone`."
            )
        classifier = GloVLMForImageClassification.from_pretrained(source).float().eval()
        return classifier, GloVLMProcessor.from_pretrained(source), run
    except GloVLMError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise GloVLMError(f"The model {name} cannot be loaded: {first}") from error


def predict(
    model: "GloVLMForImageClassification",
    processor: "GloVLMProcessor",
    images: "Dataset",
    *,
    batch_size: int = 32,
    device: "str | torch.device | None" = None,
    cache: FeatureCache | None = None,
    progress: bool = False,
    groups: Sequence[str] | None = None,
) -> Predictions:
    """Classify images; the same as the model's forward pass, with each image encoded once.

    Args:
        model: The classifier.
        processor: Its processor.
        images: Rows with `image`, and `label` (ClassLabel) and `file_name` where known. Labels are
            matched by class name, whatever their order.
        batch_size: Images at a time.
        device: Where to compute; by default where the model is.
        cache: Where pooled vectors are looked up and stored.
        progress: Whether to show a progress bar.
        groups: Patient, case or slide of each row.

    Raises:
        GloVLMError: A label is no class of the model; and what `embed_images` raises.
    """
    _move(model, device)
    id2label: Any = model.config.id2label
    names = [str(id2label[k]) for k in range(len(id2label))]
    labels = _labels(images, names)
    features = embed_images(
        model.glovlm, processor, images, batch_size=batch_size, cache=cache, progress=progress
    )
    with evaluating(model):
        tensor = torch.from_numpy(features).to(_device(model), model.dtype)
        head: Any = model.head
        logits = _array(model.classify_features(tensor))
        similarities = None
        if getattr(head, "cosine", False):
            unit = torch.nn.functional.normalize(tensor, dim=-1)
            similarities = _array(unit @ head.weight.T)
    if not np.isfinite(logits).all():
        raise GloVLMError(
            "The head returned logits that are not finite: the model's training diverged; train it "
            "again with a lower learning rate."
        )
    known = "file_name" in images.column_names
    return Predictions(
        probabilities=softmax(logits.astype(np.float64)),
        logits=logits,
        class_names=names,
        file_names=[str(n) for n in (images["file_name"] if known else range(len(images)))],
        similarities=similarities,
        groups=None if groups is None else list(groups),
        labels=labels,
    )


def _labels(images: "Dataset", names: list[str]) -> NDArray[np.int64] | None:
    """Class numbers of the model for the rows' labels; `None` when there are none."""
    if "label" not in images.column_names:
        return None
    given: list[str] | None = getattr(images.features["label"], "names", None)
    if given is None:
        raise GloVLMError(
            "The column 'label' must hold classes (datasets.ClassLabel), found "
            f"{images.features['label']}: use class_encode_column('label'), or drop the column."
        )
    index = [names.index(name) if name in names else -1 for name in given]
    values = np.array(images["label"][:], np.int64).reshape(-1)
    unknown = [given[k] for k in sorted({int(v) for v in values if v >= 0}) if index[k] < 0]
    if unknown:
        raise GloVLMError(
            f"The label '{unknown[0]}' is no class of this model, which knows {', '.join(names)}."
            f"{nearest(unknown[0], names)} To predict without labels, drop the column 'label'."
        )
    if len(values) and not (values >= 0).any():
        return None
    return np.array([index[v] if v >= 0 else -1 for v in values], np.int64)
