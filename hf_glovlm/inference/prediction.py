"""Feature extraction and prediction: images and prompts to features and probabilities."""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from ..backbones.saved import (
    check_config,
    check_processor,
    loading_reason,
    read_config,
    split_revision,
)
from ..calibration.inputs import softmax
from ..data.columns import LOOK, MASK
from ..data.folder import column, open_image
from ..data.looks import content_digest, join_digests, read_again
from ..data.outlines import open_outlined
from ..data.stains import contradictions, read_stains
from ..errors import GloVLMError, nearest
from ..files import model_folder, read_json, results_kind, write_table
from ..model.outlines import draw_centre
from ..progress import counting, showing
from .cache import FeatureCache
from .exported import Answers, ExportedClassifier, is_export, load_export
from .frozen import encoder_key
from .stains import compare_stains, find_centres
from .views import draw_view, view_key

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model import GloVLMForImageClassification, GloVLMModel, GloVLMProcessor
    from .engines import Engine

# New features are stored at least this often, so that an interruption loses little.
STORE_SECONDS = 10.0
SHARD_ROWS = 2048

logger = logging.getLogger("hf_glovlm")


# ------------------------------------------------------------------------------------ features


def resolve_device(device: "str | torch.device | None" = "auto") -> torch.device:
    """Device by name; checks that it is available.

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
    except (RuntimeError, TypeError, ValueError):
        chosen = torch.device("meta")  # none to compute on
    if chosen.type not in ("cpu", "cuda", "mps"):
        known = ("auto", "cpu", "cuda", "mps")
        raise GloVLMError(
            f"Unknown device '{device}': expected auto, cpu, cuda, cuda:N or mps."
            f"{nearest(str(device), known)}"
        )
    if chosen.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
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
    views: int = 0,
    seed: int = 0,
    engine: "Engine | None" = None,
) -> NDArray[np.float32]:
    """Image features: each distinct content is encoded once, cached ones are not even decoded.

    Decoding and preprocessing run in a thread, one batch ahead of the tower. A batch that does not
    fit into the accelerator's memory is halved, and so are those after it.

    Args:
        model: The model; evaluated without dropout and left in the mode it was in.
        processor: Its processor.
        images: Rows with an `image` column; other columns are ignored.
        batch_size: Images at a time.
        device: Where to compute (the model is moved there); by default where the model is.
        cache: Where pooled vectors are looked up and stored.
        progress: Whether to show how far it is.
        project: Whether the projection is applied; it is cheap and never cached.
        views: How many augmented views of each image to encode in its place; cached too.
        seed: Of the views.
        engine: What computes the tower, see `open_engine`; by default PyTorch in fp32.

    Returns:
        `[n, dim]` equal to `model.get_image_features(...).pooler_output`, not normalised; without
        `project` the pooled vectors `[n, width]` of `model.pool_images`. With `views`, n times as
        many rows, those of an image together.

    Raises:
        GloVLMError: An image cannot be decoded, its features are not finite, one image alone does
            not fit into memory, or `auto` chose the engine.
    """
    if engine is not None and engine.measured is not None:
        raise GloVLMError(
            "Features are computed by an engine that was asked for by name, found one that auto "
            "chose: a number that is reported must not depend on how fast a machine was."
        )
    pooled, _ = embed_twice(
        model, processor, images,
        batch_size=batch_size, device=device, cache=cache, progress=progress, views=views,
        seed=seed, engine=engine,
    )  # fmt: skip
    if not project:
        return pooled
    with exact_inference(model):
        return _project(model, pooled)


def embed_twice(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    images: "Dataset",
    *,
    batch_size: int = 32,
    device: "str | torch.device | None" = None,
    cache: FeatureCache | None = None,
    progress: bool = False,
    views: int = 0,
    seed: int = 0,
    engine: "Engine | None" = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pooled vectors, and what a guard compares: see `GloVLMModel.pool_images_and_middle`.

    Args:
        model: As `embed_images` takes it, and the others.
        processor: Its processor.
        images: Rows with an `image` column.
        batch_size: Images at a time.
        device: Where to compute; by default where the model is.
        cache: Where these vectors are looked up and stored.
        progress: Whether to show how far it is.
        views: How many augmented views of each image to encode in its place.
        seed: Of the views.
        engine: What computes the tower.

    Returns:
        Pooled vectors `[n, width]`; mean patches of the middle `[n, hidden]`, or the pooled vectors
        again where the tower has no such middle.

    Raises:
        GloVLMError: See `embed_images`.
    """
    _move(model, device)
    if engine is not None:
        engine.check(model, processor)
    outline, draft = processor.outline, processor.draft_side
    rows = _Views(images, outline, views, seed) if views else ImageRows(images, outline, draft)
    digests = rows.digests()
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    key = f"{encoder_key(model, processor)}m" if cache is not None else ""  # m: with the middle
    key += "" if engine is None else engine.key
    vectors = cache.get(key, list(first)) if cache is not None else {}
    missing = [(digest, row) for digest, row in first.items() if digest not in vectors]
    unstored, stored_at = list[bytes](), time.monotonic()

    def store() -> None:
        nonlocal stored_at
        if cache is not None and unstored:
            config: Any = model.config
            name = config.backbone_name or config.backbone_config.model_type
            cache.put(key, unstored, np.stack([vectors[digest] for digest in unstored]), name)
        unstored.clear()
        stored_at = time.monotonic()

    shown = showing(True) if progress else nullcontext()
    with shown, exact_inference(model), counting("images", len(missing)) as count:
        selected = [row for _, row in missing]
        try:
            for batch, pooled in _encode(model, processor, rows, selected, batch_size, engine):
                encoded = [digests[row] for row in batch]
                vectors.update(zip(encoded, pooled, strict=True))
                unstored += encoded
                count.advance(len(batch))
                late = time.monotonic() - stored_at >= STORE_SECONDS
                if late or len(unstored) >= SHARD_ROWS:
                    store()
        finally:
            store()
    width = model.config.vision_pooled_dim
    if not digests:
        empty = np.empty((0, width), np.float32)
        return empty, empty
    both = np.stack([vectors[digest] for digest in digests])
    pooled, middle = np.split(both, [width], axis=1)
    return pooled, middle if middle.shape[1] else pooled


class ImageRows:
    """Undecoded image column of a data set, with what a model sees of its outlines.

    Args:
        images: Rows with `image` and, where there are any, `mask`.
        outline: One of `model.outlines.OUTLINES`.
        draft: Least side that a JPEG is decoded at, see `open_image`; not with outlines.
    """

    def __init__(self, images: "Dataset", outline: str, draft: int = 0) -> None:
        self._outlined = outline not in ("ignore", "centre")
        names = ["image", LOOK, *([MASK] if self._outlined else [])]
        self._names = [name for name in names if name in images.column_names]
        self._images = images
        self._known: list[tuple[bytes, bytes | None]] | None = None
        self._centred, self._draft = outline == "centre", draft if outline == "ignore" else 0

    @cached_property
    def _table(self) -> "Dataset":
        """The columns that are read; not needed where every feature is known already."""
        return self._images.select_columns(self._names).with_format("arrow")

    def values(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`{"bytes", "path"}` of the given rows."""
        values: list[dict[str, Any]] = self._table[list(rows)]["image"].to_pylist()
        return values

    def pictures(self, rows: Sequence[int]) -> list[Image.Image]:
        """Decoded images of the given rows, with their outlines where these count.

        Raises:
            GloVLMError: An image cannot be decoded; or its digest is known and its file is another
                now, whose features would be kept under that digest.
        """
        files = _pairs(self._table[list(rows)])
        if self._known is not None or LOOK in self._names:
            digests = [self._file_digests()[row] for row in rows]
            files = [
                (
                    read_again(image, of_image),
                    None if mask is None or of_mask is None else read_again(mask, of_mask),
                )
                for (image, mask), (of_image, of_mask) in zip(files, digests, strict=True)
            ]
        if self._outlined:
            return [open_outlined(image, mask) for image, mask in files]
        opened = [open_image(image, self._draft) for image, _ in files]
        # Of the whole picture, before a view is cut out of it.
        return [draw_centre(picture) for picture in opened] if self._centred else opened

    def digests(self) -> list[bytes]:
        """Hash of each row's file content, and of its mask's, 16 bytes."""
        return [join_digests(*pair) for pair in self._file_digests()]

    def _file_digests(self) -> list[tuple[bytes, bytes | None]]:
        """Hashes of each row's image and mask: of the look where there was one, else read now."""
        if self._known is None and LOOK in self._names:
            masked = MASK in self._names
            looks = column(self._images, LOOK)
            self._known = [(look["image"], look["mask"] if masked else None) for look in looks]
        if self._known is None:
            self._known = [
                (content_digest(image), None if mask is None else content_digest(mask))
                for part in self._table.iter(batch_size=256)
                for image, mask in _pairs(part)
            ]
        return self._known


class _Views(ImageRows):
    """Augmented views of an image column: a row a view, those of an image together."""

    def __init__(self, images: "Dataset", outline: str, count: int, seed: int) -> None:
        super().__init__(images, outline)
        self._count = count
        self._keys = [view_key(d, seed, v) for d in super().digests() for v in range(count)]

    def values(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`{"bytes", "path"}` of the images that the rows are views of."""
        return super().values([row // self._count for row in rows])

    def pictures(self, rows: Sequence[int]) -> list[Image.Image]:
        """The views."""
        images = super().pictures([row // self._count for row in rows])
        return [draw_view(im, self._keys[row]) for im, row in zip(images, rows, strict=True)]

    def digests(self) -> list[bytes]:
        """Key of each view, 16 bytes."""
        return self._keys


def _pairs(table: Any) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Image and mask of each row of an arrow table."""
    images = table["image"].to_pylist()
    masks = table[MASK].to_pylist() if MASK in table.column_names else [None] * len(images)
    return [(image, _present(mask)) for image, mask in zip(images, masks, strict=True)]


def _present(mask: dict[str, Any] | None) -> dict[str, Any] | None:
    """A mask that is there; the Hub may write an empty one for none."""
    return mask if mask and (mask["bytes"] is not None or mask["path"]) else None


def _encode(
    model: "GloVLMModel",
    processor: "GloVLMProcessor",
    rows: ImageRows,
    selected: Sequence[int],
    batch_size: int,
    engine: "Engine | None",
) -> Iterator[tuple[Sequence[int], NDArray[np.float32]]]:
    """Decode, preprocess and pool the selected rows, batch by batch.

    Yields:
        The rows of a batch, and their pooled vectors and middle tokens joined.
    """
    device = model_device(model)
    batches = [selected[i : i + batch_size] for i in range(0, len(selected), batch_size)]
    fits = batch_size

    def prepare(batch: Sequence[int]) -> dict[str, torch.Tensor]:
        pictures = rows.pictures(batch)
        inputs = dict(processor(images=pictures, return_tensors="pt"))
        if device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        return inputs

    def pool(inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        nonlocal fits
        n = len(inputs["pixel_values"])
        if n <= fits:
            try:
                if engine is not None:
                    both = engine.pool(inputs)
                else:
                    both = model.pool_images_and_middle(**move_inputs(inputs, model))
                return to_array(torch.cat(both, dim=1))
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

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(prepare, batches[0]) if batches else None
        for i, batch in enumerate(batches):
            assert ahead is not None  # there is a first batch
            inputs = ahead.result()
            if i + 1 < len(batches):
                ahead = thread.submit(prepare, batches[i + 1])
            pooled = pool(inputs)
            _check_finite(pooled, rows, batch, others=engine is not None)
            yield batch, pooled


def _check_finite(
    pooled: NDArray[np.float32], rows: ImageRows, batch: Sequence[int], *, others: bool
) -> None:
    """Refuse vectors that are not finite, naming the first image.

    Args:
        pooled: `[n, width]`.
        rows: All images.
        batch: Rows of the vectors.
        others: Whether something else than PyTorch in fp32 computed them.
    """
    broken = np.flatnonzero(~np.isfinite(pooled).all(1))
    if len(broken):
        row = batch[broken[0]]
        raise GloVLMError(
            f"The vision tower returned numbers that are not finite for {len(broken)} images "
            f"(first: {rows.values([row])[0]['path'] or f'row {row}'}): check the weights, or "
            f"{'compute in fp32' if others else 'load them in float32'}."
        )


def _project(model: "GloVLMModel", pooled: NDArray[np.float32]) -> NDArray[np.float32]:
    device, dtype = model_device(model), model.dtype
    parts = [torch.from_numpy(pooled[i : i + 4096]) for i in range(0, max(len(pooled), 1), 4096)]
    return np.concatenate(
        [to_array(model.project_images(part.to(device, dtype))) for part in parts]
    )


def class_names(config: Any) -> list[str]:
    """Names of a classifier's classes, in the order of its logits."""
    return [str(config.id2label[k]) for k in range(len(config.id2label))]


def move_inputs(inputs: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Move a model's inputs to its device and dtype; whole numbers keep theirs."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        for name, tensor in inputs.items()
    }


def to_array(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Copy a tensor to a float32 array."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def model_device(model: torch.nn.Module) -> torch.device:
    """Device of a model's parameters."""
    return next(model.parameters()).device


def _move(model: torch.nn.Module, device: "str | torch.device | None") -> None:
    """Move a model to a device, if one is given."""
    if device is not None:
        move_model(model, resolve_device(device))


def move_model(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device, if not all of it is there; the walk of `to` takes milliseconds."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device != device:
                model.to(device)
                return


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule returns to its own mode."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def exact_inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without autocast (mixed precision)."""
    # The cache's key has the dtype of the weights, not that of a surrounding training loop.
    plain = torch.autocast(model_device(model).type, enabled=False)
    with evaluation_mode(model), torch.inference_mode(), plain:
        yield


# --------------------------------------------------------------------------------- predictions


@dataclass
class Predictions:
    """Predictions of a classifier: probabilities, logits and the images' known labels and groups.

    Args:
        probabilities: `[n, K]` float64, rows sum to 1.
        logits: `[n, K]` float32, calibrated by the model's config.
        class_names: The `K` classes, in the order of the columns.
        file_names: The `n` images.
        similarities: `[n, K]` cosines between image and class text, for heads that compare these.
        groups: Patient (or case, or slide) of each image, where known.
        labels: True class numbers `[n]`, -1 for an image without; `None` when none is known.
        support_distances: `[n]` distances to the support as multiples of their limit; `None` where
            the model has no guard.
        notes: What the images' stains are beside the model's, and what computed the tower if not
            the default, in sentences; not saved.
        engine: What computed the tower (`Engine.describe`); `None` for the default.
    """

    probabilities: NDArray[np.float64]
    logits: NDArray[np.float32]
    class_names: list[str]
    file_names: list[str]
    similarities: NDArray[np.float32] | None = None
    groups: list[str] | None = None
    labels: NDArray[np.int64] | None = None
    support_distances: NDArray[np.float64] | None = None
    notes: list[str] = field(default_factory=list)
    engine: dict[str, Any] | None = None

    @property
    def unlike_support(self) -> NDArray[np.bool_] | None:
        """Which images are unlike the support, `[n]`; their class may mean nothing."""
        distances = self.support_distances
        return None if distances is None else distances > 1

    @property
    def predicted(self) -> list[str]:
        """Most probable class of each image."""
        return [self.class_names[k] for k in self.probabilities.argmax(1)]

    def save(self, path: str | Path) -> None:
        """Write a parquet file: one row an image, columns as `glovlm predict` names them.

        `file_name`, `label` (null if unknown), `predicted`, `p_<class>` and `logit_<class>` for
        every class; `similarity_<class>`, `group`, `unlike_support` and `support_distance` where
        known.
        """
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
        if self.support_distances is not None:
            columns["unlike_support"] = pa.array(self.unlike_support)
            columns["support_distance"] = pa.array(self.support_distances)
        about: dict[str, Any] = {"class_names": self.class_names}
        about |= {} if self.engine is None else {"engine": self.engine}
        metadata = {_METADATA: json.dumps(about)}
        write_table(Path(path), columns, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`.

        Raises:
            GloVLMError: The file is missing, or no predictions of this package.
        """
        try:
            return cls.parse(Path(path).read_bytes(), path)
        except OSError as error:
            raise _no_predictions(path, error) from None

    @classmethod
    def parse(cls, content: bytes, path: str | Path, *, logits: bool = True) -> Self:
        """Parse the content of a file written by `save`, which lies at this path.

        Args:
            content: Its bytes.
            path: Where it lies, for the sentence.
            logits: Whether logits, similarities and distances are read, too.

        Raises:
            GloVLMError: It is none.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)  # it is in memory
            names = file.schema.names
            if not logits:
                known = ("file_name", "label", "group")
                names = [name for name in names if name.startswith("p_") or name in known]
            return cls._read(file.read(columns=names, use_threads=False), logits)
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise _no_predictions(path, error) from None

    @classmethod
    def _read(cls, table: pa.Table, logits: bool) -> Self:
        about = json.loads((table.schema.metadata or {})[_METADATA])
        names, held = [str(name) for name in about["class_names"]], set(table.column_names)
        index = {name: k for k, name in enumerate(names)}
        true = [index.get(name, -1) for name in table["label"].to_pylist()]

        def matrix(prefix: str) -> NDArray[Any]:
            return np.stack([table[f"{prefix}_{name}"].to_numpy() for name in names], axis=1)

        return cls(
            probabilities=matrix("p"),
            logits=matrix("logit") if logits else np.empty((len(table), 0), np.float32),
            class_names=names,
            file_names=table["file_name"].to_pylist(),
            similarities=(matrix("similarity") if f"similarity_{names[0]}" in held else None),
            groups=table["group"].to_pylist() if "group" in held else None,
            labels=None if max(true, default=-1) < 0 else np.array(true, np.int64),
            support_distances=(
                table["support_distance"].to_numpy() if "support_distance" in held else None
            ),
            engine=about.get("engine"),
        )

    def _matrices(self) -> list[tuple[str, NDArray[Any]]]:
        matrices: dict[str, NDArray[Any] | None] = {
            "p": self.probabilities,
            "logit": self.logits,
            "similarity": self.similarities,
        }
        return [(name, values) for name, values in matrices.items() if values is not None]


_METADATA = b"hf_glovlm"


def _no_predictions(path: str | Path, error: Exception) -> GloVLMError:
    return GloVLMError(
        f"{path} is no predictions file: expected the predictions.parquet that `glovlm train` or "
        f"`glovlm evaluate` wrote, found none that can be read ({type(error).__name__})."
    )


def load_classifier(
    name: str | Path, *, revision: str | None = None, exported: bool = False
) -> tuple[Any, Any, dict[str, Any] | None]:
    """Load a classifier that `glovlm train` wrote.

    Args:
        name: A run's folder, its `model/`, or a Hub id, as `owner/name` or `owner/name@revision`.
        revision: Commit, tag or branch of a Hub id.
        exported: Whether a folder that `glovlm export` wrote serves, too: an `ExportedClassifier`
            predicts and encodes, and no more.

    Returns:
        The classifier in fp32 and evaluation mode, its processor, and the results of its run where
        they lie beside it.

    Raises:
        GloVLMError: There is nothing, or something else.
    """
    from transformers import PreTrainedConfig

    from ..model import GloVLMForImageClassification, GloVLMProcessor

    name, revision = split_revision(str(name), revision)
    folder, run = Path(name).expanduser(), None
    if folder.is_dir():
        if exported and is_export(folder):
            return load_export(folder)
        folder = model_folder(name, "adaptation")
        if not (folder / "config.json").is_file():
            raise GloVLMError(
                f"{name} holds no model: expected the --output-dir of `glovlm train`."
            )
        results = (folder.parent if folder.name == "model" else folder) / "results.json"
        if results.is_file():
            beside = read_json(results)
            run = beside if results_kind(beside) == "adaptation" else None
    elif folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        actual = "a file" if folder.exists() else "nothing"
        raise GloVLMError(
            f"Expected a run's folder, its model folder or a Hub id (owner/name), found {actual} "
            f"at {name}."
        )
    source = str(folder) if folder.is_dir() else name
    try:
        if folder.is_dir():
            about = read_config(folder / "config.json", f"The model {name}")
        else:
            about, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
            check_config(about, f"{name}/config.json")
        if about.get("architectures") != ["GloVLMForImageClassification"]:
            kind = ", ".join(about.get("architectures") or []) or "no known kind"
            raise GloVLMError(
                f"{name} is no classifier of ours, but of {kind}: give what `glovlm train` wrote. "
                "A backbone goes into `glovlm train --backbone`."
            )
        options: dict[str, Any] = {"revision": revision}
        classifier = GloVLMForImageClassification.from_pretrained(source, **options)
        processor = GloVLMProcessor.from_pretrained(source, **options)
        check_processor(processor, classifier.config, source)
        return classifier.float().eval(), processor, run
    except GloVLMError:
        raise
    except Exception as error:  # of whatever library reads it
        reason = loading_reason(error, folder)
        raise GloVLMError(f"The model {name} cannot be loaded: {reason}") from error


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
    engine: "Engine | None" = None,
) -> Predictions:
    """Classify images: the model's forward pass, with each distinct image encoded once.

    Args:
        model: The classifier.
        processor: Its processor.
        images: Rows with `image`, and `label` (ClassLabel), `file_name` and `stain` where known.
            Labels are matched by class name, whatever their order.
        batch_size: Images at a time.
        device: Where to compute; by default where the model is.
        cache: Where pooled vectors are looked up and stored.
        progress: Whether to show how far it is.
        groups: Patient, case or slide of each row.
        engine: What computes the tower, see `open_engine`; by default PyTorch in fp32.

    Raises:
        GloVLMError: A label is no class of the model; and what `embed_images` raises.
    """
    _move(model, device)
    names = class_names(model.config)
    labels, stains = _labels(images, names), read_stains(images)
    pooled, compared = embed_twice(
        model.glovlm, processor, images,
        batch_size=batch_size, cache=cache, progress=progress, engine=engine,
    )  # fmt: skip
    with exact_inference(model):
        features = _project(model.glovlm, pooled)
        tensor = torch.from_numpy(features).to(model_device(model), model.dtype)
        answers = _answer(model, tensor, compared, stains)
        logits = to_array(answers.logits)
        similarities = None if answers.similarities is None else to_array(answers.similarities)
        distances = None if answers.distances is None else to_array(answers.distances)
        if distances is not None and np.isnan(distances).any():
            distances = None  # described by the config, but its numbers are not there
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
        file_names=[str(n) for n in (column(images, "file_name") if known else range(len(images)))],
        similarities=similarities,
        groups=None if groups is None else list(groups),
        labels=labels,
        support_distances=None if distances is None else distances.astype(np.float64),
        notes=[
            *contradictions(images),
            *compare_stains(model, stains),
            *([] if engine is None else engine.notes),
            *getattr(model, "notes", []),  # of an exported graph
        ],
        engine=None if engine is None or engine.is_default else engine.describe(),
    )


def _answer(
    model: Any, features: torch.Tensor, compared: NDArray[np.float32], stains: Sequence[str | None]
) -> Answers:
    """Logits, cosines and distances to the support of image features."""
    if isinstance(model, ExportedClassifier):
        return model.answer(features)
    centres = model.centres
    ids = None if centres is None else find_centres(centres, stains).to(features.device)
    logits = model.classify_features(features, ids)
    similarities = distances = None
    if getattr(model.head, "cosine", False):
        similarities = torch.nn.functional.normalize(features, dim=-1) @ model.head.weight.T
    if model.guard is not None:
        distances = model.guard(torch.from_numpy(compared).to(features.device))
    return Answers(logits, similarities, distances)


def _labels(images: "Dataset", names: list[str]) -> NDArray[np.int64] | None:
    """Class numbers of the rows' labels; `None` when there are none."""
    if "label" not in images.column_names:
        return None
    given: list[str] | None = getattr(images.features["label"], "names", None)
    if given is None:
        raise GloVLMError(
            "The column 'label' must hold classes (datasets.ClassLabel), found "
            f"{images.features['label']}: use class_encode_column('label'), or drop the column."
        )
    index = [names.index(name) if name in names else -1 for name in given]
    values = np.array(column(images, "label"), np.int64).reshape(-1)
    unknown = [given[k] for k in sorted({int(v) for v in values if v >= 0}) if index[k] < 0]
    if unknown:
        raise GloVLMError(
            f"The label '{unknown[0]}' is no class of this model, which has {', '.join(names)}."
            f"{nearest(unknown[0], names)} To predict without labels, drop the column 'label'."
        )
    if len(values) and not (values >= 0).any():
        return None
    return np.array([index[v] if v >= 0 else -1 for v in values], np.int64)
