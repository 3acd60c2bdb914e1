"""Benchmarks as ratios measured inside one run: what the package's own ways gain or cost.

Seconds depend on the machine and on what else it does; a ratio of two timings taken one after the
other depends on it far less. The images are synthetic, and no quality is measured here.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPModel

from ..backbones import load_backbone
from ..backbones.conversion import join_merges
from ..data import load_classes, load_dataset, open_image
from ..errors import GloVLMError, nearest
from ..inference import FeatureCache, embed_images
from ..methods import METHODS, TowerMethod, get_method
from ..methods.closed_form import TIP_ALPHAS, TIP_BETAS, search_tip_adapter
from ..metrics import compute_metrics
from ..model import GloVLMConfig, GloVLMModel
from ..model.context import keep_count
from ..training import AdaptConfig, adapt, adapt_features
from ..training.losses import TowerStep
from .phantoms import render_glomerulus, write_cohort

Row = dict[str, Any]  # name, value, unit, ratio, what


def bench_metrics(
    *,
    n: int = 5000,
    n_groups: int = 50,
    n_classes: int = 5,
    n_resamples: int = 2000,
    loop_resamples: int = 20,
    seed: int = 0,
) -> list[Row]:
    """Benchmark of the bootstrap over groups, against plain loops over the resamples.

    Args:
        n: Predictions.
        n_groups: Patients they are of.
        n_classes: Classes.
        n_resamples: Resamples of the bootstrap.
        loop_resamples: Resamples of the loop; its time is extrapolated to `n_resamples`.
        seed: Draws predictions and resamples.

    Returns:
        Three rows; the `ratio` of a loop is its time over that of the bootstrap. The second loop
        shows what doing all resamples at once gains by itself.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    logits = rng.normal(size=(n, n_classes)) + np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    groups = rng.integers(n_groups, size=n)
    ids = [f"patient_{g}" for g in groups]

    def fast() -> dict[str, Any]:
        return compute_metrics(
            labels, probabilities, groups=ids, n_resamples=n_resamples, seed=seed
        )

    seconds = _shortest(fast, 3)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    resamples = rng.integers(len(rows_of), size=(loop_resamples, len(rows_of)))
    what = f"{n_resamples} resamples of {n} predictions, {n_groups} groups, {n_classes} classes"
    rows = [as_row("metrics.bootstrap", seconds, "s", None, f"{what}: every metric, all intervals")]
    own = partial(compute_metrics, n_resamples=0)
    for name, point, by in (
        ("metrics.loop", plain_metrics, "scikit-learn"),
        ("metrics.loop_own", own, "our own point values"),
    ):
        point(labels, probabilities)  # imports
        start = time.perf_counter()
        for sampled in resamples:
            sample = np.concatenate([rows_of[g] for g in sampled])
            point(labels[sample], probabilities[sample])
        loop = (time.perf_counter() - start) / loop_resamples * n_resamples
        note = f"the same in a loop with {by}, extrapolated from {loop_resamples} resamples"
        rows.append(as_row(name, loop, "s", loop / seconds, f"{note}; ratio: times the bootstrap"))
    return rows


def plain_metrics(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, float]:
    """Compute the point values of one resample with scikit-learn, as a plain loop would.

    Args:
        labels: `[n]`, every class present.
        probabilities: `[n, K]`.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_auc`, `macro_f1`, `brier`, and `recall_k`,
        `specificity_k`, `auc_k` of every class k.
    """
    try:
        from sklearn import metrics
    except ImportError:
        raise GloVLMError(
            "The bench compares with scikit-learn, which is not installed: pip install "
            "'hf-glovlm[dev]'."
        ) from None

    predicted = probabilities.argmax(1)
    classes = range(probabilities.shape[1])
    confusion = metrics.confusion_matrix(labels, predicted, labels=list(classes))
    hit, actual, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    recall, specificity = hit / actual, 1 - (called - hit) / (len(labels) - actual)
    auc = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in classes]
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(labels, predicted)),
        "macro_auc": float(np.mean(auc)),
        "macro_f1": float(metrics.f1_score(labels, predicted, average="macro")),
        "brier": float(((probabilities - np.eye(len(classes))[labels]) ** 2).sum(1).mean()),
        **{f"recall_{k}": float(recall[k]) for k in classes},
        **{f"specificity_{k}": float(specificity[k]) for k in classes},
        **{f"auc_{k}": float(auc[k]) for k in classes},
    }


def bench_cache(
    *, backbone: str = "mini", n_patients: int = 8, per_patient: int = 10, repeats: int = 3
) -> list[Row]:
    """Benchmark of the feature cache: encoding synthetic images with an empty cache, then from it.

    Args:
        backbone: As `--backbone` takes it.
        n_patients: Synthetic patients.
        per_patient: Images of each.
        repeats: Timings of each kind, of which the shortest counts.

    Returns:
        Two rows; the warm one's `ratio` is the cold time over the warm one.

    Raises:
        GloVLMError: The features of the cache are not those that were computed.
    """
    model, processor = load_backbone(backbone)
    with tempfile.TemporaryDirectory() as folder:
        images = _synthetic_images(Path(folder), n_patients, per_patient)
        caches = [FeatureCache(Path(folder) / f"cache-{i}") for i in range(repeats + 1)]
        cold = embed_images(model, processor, images, cache=caches[0])  # and first-call costs
        empty = iter(caches[1:])
        slow = _shortest(lambda: embed_images(model, processor, images, cache=next(empty)), repeats)
        fast = _shortest(lambda: embed_images(model, processor, images, cache=caches[0]), repeats)
        warm = embed_images(model, processor, images, cache=caches[0])
    if not np.array_equal(cold, warm):
        raise GloVLMError(
            "The cached features differ from the computed ones: report this as a bug."
        )
    what = f"{len(images)} synthetic images, {model.config.backbone_name or backbone}"
    return [
        as_row("cache.cold", slow, "s", None, f"{what}: decoded, encoded and stored"),
        as_row("cache.warm", fast, "s", slow / fast, f"{what}: looked up; ratio: times faster"),
    ]


@dataclass(frozen=True)
class Shape:
    """Sizes of a random CLIP; the default is ViT-B/16."""

    image_size: int = 224
    patch: int = 16
    vision: tuple[int, int] = (768, 12)  # width, blocks
    text: tuple[int, int] = (512, 12)
    context: int = 77


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
    model, processor = load_backbone(backbone) if backbone else _random_clip(shape or Shape())
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
        images = _jpegs(Path(place) / "jpegs", n_files, side)
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
    _same(0, different, 0, "the number of loaded tensors that differ")
    ways = [partial(load, folder) for load in (_load_bare, _load_ours)]
    plain, ours = _shortest_in_turn(ways, 3 * repeats)  # short, so more often
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
    _same(0, gap, 0, "the largest difference from the bare module's features")
    # One batch, often: short timings in turn meet the same machine.
    plain, ours = _shortest_in_turn([pool_bare, pool_ours], repeats * len(batches))
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
    _same(0, gap, 1e-5, "the largest difference of features from files and tensors")
    plain, ours = _shortest_in_turn([encode_tensors, encode_files], repeats)
    n, what = len(images), f"{what}, {torch.get_num_threads()} threads"
    note = f"{what}: from disk; ratio: part of the rate from tensors"
    return [
        as_row("encode.preprocessed", n / plain, "images/s", None, f"{what}: from tensors"),
        as_row("encode.files", n / ours, "images/s", plain / ours, note),
    ]


def _jpegs(folder: Path, n: int, side: int) -> Any:
    """Rows of JPEG files with as much fine structure as tissue has, each of its own content."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = render_glomerulus("viable", seed=0).image.resize((side, side))
    paths = [str(folder / f"{i:04d}.jpg") for i in range(n)]
    for path in paths:
        noisy = np.asarray(picture) + rng.normal(0, 8, size=(side, side, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    features = Features({"image": ImageColumn(decode=False)})
    return Dataset.from_dict({"image": paths}, features=features)


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


def bench_methods(
    *,
    shape: Shape | None = None,
    n_classes: int = 9,
    shots: int = 16,
    dim: int = 512,
    rows: int = 7180,
    loop_pairs: int = 40,
    images_per_class: int = 3,
    repeats: int = 3,
) -> list[Row]:
    """Benchmark of what the methods save, each as a ratio to the plain way inside this run.

    Args:
        shape: Of the random CLIP whose towers are timed.
        n_classes: Classes of the features and prompts.
        shots: Labelled features of each.
        dim: Width of the features.
        rows: Validation rows of Tip-Adapter's search.
        loop_pairs: Pairs of alpha and beta that the plain double loop does; extrapolated to all.
        images_per_class: Synthetic images of each class that `vanilla` trains on.
        repeats: Timings of each kind, of which the shortest counts.

    Raises:
        GloVLMError: A shortcut gives another result than the plain way.
    """
    shape = shape or Shape()
    return [
        *_bench_text_cut(shape, n_classes, repeats),
        *_bench_frozen_text(shape, n_classes, repeats),
        *_bench_replay(shape, images_per_class),
        *_bench_search(n_classes, shots, dim, rows, loop_pairs),
        *_bench_training_free(n_classes, shots, dim, repeats),
    ]


def _random_clip(shape: Shape) -> tuple[Any, Any]:
    """A CLIP of random weights with the tokenizer of `mini`, and its processor."""
    mini, processor = load_backbone("mini")
    known = mini.config.backbone_config.text_config
    torch.manual_seed(0)

    def tower(width: int, blocks: int) -> dict[str, int]:
        heads = max(1, width // 64)
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        return {**sizes, "num_hidden_layers": blocks, "num_attention_heads": heads}

    clip = CLIPModel(
        CLIPConfig(
            vision_config={
                **tower(*shape.vision),
                "image_size": shape.image_size,
                "patch_size": shape.patch,
            },
            text_config={
                **tower(*shape.text),
                "max_position_embeddings": shape.context,
                "vocab_size": known.vocab_size,
                "eos_token_id": known.eos_token_id,
                "bos_token_id": known.bos_token_id,
                "pad_token_id": known.pad_token_id,
            },
            projection_dim=shape.text[0],
        )
    ).eval()
    images = processor.image_processor
    images.size = {"shortest_edge": shape.image_size}
    images.crop_size = {"height": shape.image_size, "width": shape.image_size}
    processor.max_length = shape.context
    config = GloVLMConfig(backbone_config=clip.config, backbone_name="random weights")
    return GloVLMModel(config, backbone=clip).eval(), processor


def _class_words(n_classes: int) -> list[Any]:
    words = ["viable", "ischemic", "sclerotic", "segmental", "atubular", "crescent", "nodular"]
    return load_classes(
        [words[k % len(words)] + f" {k}" * (k >= len(words)) for k in range(n_classes)]
    )


def _bench_text_cut(shape: Shape, n_classes: int, repeats: int) -> list[Row]:
    """A step of prompt tuning at the length of the longest prompt, and at the full context."""
    rows = []
    for tokens in (16, 4):
        model, processor = _random_clip(shape)
        model.requires_grad_(False)
        method, classes = get_method("prompt_tuning"), _class_words(n_classes)
        assert isinstance(method, TowerMethod)
        attached = method.attach(
            model, processor, classes, method.configure({"context_tokens": tokens})
        )
        step = TowerStep(attached, "prototypes")
        labels = torch.arange(n_classes)
        vectors = torch.randn(n_classes, model.config.vision_pooled_dim)
        weight = torch.ones(n_classes)

        def once(step: Any = step, vectors: Any = vectors, weight: Any = weight) -> Any:
            step.zero_grad()
            loss = step(vectors, labels, weight, len(labels))  # noqa: B023 - called at once
            loss.backward()
            return loss.item()

        short, cut = once(), _shortest(once, repeats)
        length = step.text["input_ids"].shape[1]
        missing = shape.context - length
        pad = {"input_ids": processor.tokenizer.pad_token_id or 0, "attention_mask": 0}
        for name, value in pad.items():
            step.text[name] = torch.nn.functional.pad(step.text[name], (0, missing), value=value)
        long, full = once(), _shortest(once, repeats)
        _same(short, long, 1e-5, "prompt tuning with cut text")
        what = f"a step of prompt_tuning, {tokens} context tokens, {n_classes} classes"
        note = f"{what}: {length} long; ratio: times faster"
        rows += [
            as_row(f"methods.text_full_{tokens}", full, "s", None, f"{what}: {shape.context} long"),
            as_row(f"methods.text_cut_{tokens}", cut, "s", full / cut, note),
        ]
    return rows


def _bench_frozen_text(shape: Shape, n_classes: int, repeats: int) -> list[Row]:
    """Class texts of a text tower that does not change, encoded once or at every step."""
    model, processor = _random_clip(shape)
    model.requires_grad_(False).backbone.visual_projection.requires_grad_(True)
    method = get_method("vanilla")
    assert isinstance(method, TowerMethod)
    frozen = method.configure({"vision_layers": 0, "text_layers": 0})
    attached = method.attach(model, processor, _class_words(n_classes), frozen)
    seconds, losses = [], []
    for trains_text in (True, False):
        attached.trains_text = trains_text
        step = TowerStep(attached, "prototypes")
        vectors = torch.linspace(-1, 1, n_classes * model.config.vision_pooled_dim)
        vectors = vectors.reshape(n_classes, -1)

        def once(step: Any = step, vectors: Any = vectors) -> float:
            loss = step(vectors, torch.arange(n_classes), torch.ones(n_classes), n_classes)
            loss.backward()
            return float(loss.detach())

        losses.append(once())
        seconds.append(_shortest(once, repeats))
    _same(losses[0], losses[1], 1e-5, "text that is encoded once")
    what = f"a step on frozen towers, {n_classes} classes"
    note = f"{what}: texts once before; ratio: times faster"
    return [
        as_row("methods.text_each_step", seconds[0], "s", None, f"{what}: texts at every step"),
        as_row("methods.text_once", seconds[1], "s", seconds[0] / seconds[1], note),
    ]


def _bench_replay(shape: Shape, images_per_class: int) -> list[Row]:
    """An epoch of `vanilla` whose frozen blocks run once, and of the plain loop."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        support = _synthetic_images(Path(folder), images_per_class, 5)
        for vision, text in ((4, 2), (2, 0)):
            settings = {"vision_layers": vision, "text_layers": text}
            seconds, losses = [], []
            for replay in (False, True):
                model, processor = _random_clip(shape)
                adapted = adapt(
                    model,
                    "vanilla",
                    support,
                    processor=processor,
                    config=AdaptConfig(settings, {"epochs": 3, "lr": 1e-5}, replay=replay),
                )
                seconds.append(min(row["seconds"] for row in adapted.log))
                losses.append([row["loss"] for row in adapted.log])
            for plain, played in zip(*losses, strict=True):
                _same(plain, played, 1e-5, "vanilla with frozen blocks run once")
            what = f"an epoch of vanilla, last {vision} vision and {text} text blocks train"
            what += f", {len(support)} synthetic images"
            name = f"methods.epoch_{vision}_{text}"
            played_as = f"{what}: frozen blocks run once; ratio: times faster"
            rows += [
                as_row(f"{name}_plain", seconds[0], "s", None, f"{what}: plain loop"),
                as_row(f"{name}_once", seconds[1], "s", seconds[0] / seconds[1], played_as),
            ]
    return rows


def _bench_search(n_classes: int, shots: int, dim: int, rows: int, loop_pairs: int) -> list[Row]:
    """Tip-Adapter's search over 200 betas and 20 alphas, and the double loop that it replaces."""
    features, labels, keys, owners, texts = _clusters(n_classes, shots, dim, rows)
    values = torch.nn.functional.one_hot(owners, n_classes).float()
    zero_shot, affinity = 100 * features @ texts.T, features @ keys.T

    def score(beta: float, alpha: float) -> float:
        cache = torch.exp(-beta * (1 - affinity)) @ values
        right = (zero_shot + alpha * cache).argmax(1) == labels
        return float(
            torch.stack([right[labels == k].float().mean() for k in range(n_classes)]).mean()
        )

    start = time.perf_counter()
    beta, alpha, best = search_tip_adapter(zero_shot, affinity, values, labels)
    ours = time.perf_counter() - start
    _same(score(beta, alpha), best, 2.0 / rows * n_classes, "the search of tip_adapter")
    pairs = [(b, a) for b in TIP_BETAS for a in TIP_ALPHAS]
    start = time.perf_counter()
    for pair in pairs[:: max(1, len(pairs) // loop_pairs)][:loop_pairs]:
        score(*pair)
    loop = (time.perf_counter() - start) / loop_pairs * len(pairs)
    what = f"{len(pairs)} pairs of beta and alpha, {rows} rows, {len(keys)} keys"
    return [
        as_row("methods.search_loop", loop, "s", None, f"{what}: double loop, extrapolated"),
        as_row("methods.search", ours, "s", loop / ours, f"{what}: at once; ratio: times faster"),
    ]


def _bench_training_free(n_classes: int, shots: int, dim: int, repeats: int) -> list[Row]:
    """Every training-free method on bare features."""
    query, _, features, labels, texts = _clusters(n_classes, shots, dim, 500)
    rows = []
    for name, method in METHODS.items():
        if method.family != "training-free":
            continue
        given = {"query_features": query} if method.transductive else {}
        fit = partial(adapt_features, name, features, labels, texts, **given)
        what = f"{n_classes} classes x {shots} shots x {dim} dimensions"
        what += ", 500 queries" if method.transductive else ""
        rows.append(as_row(f"methods.{name}", _shortest(fit, repeats), "s", None, what))
    return rows


def _clusters(n_classes: int, shots: int, dim: int, rows: int) -> tuple[Any, ...]:
    """Random features around class texts: rows, their labels, support, its labels, texts."""
    draw = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    texts = unit(torch.randn(n_classes, dim, generator=draw), dim=-1)

    def around(labels: Any) -> Any:
        noise = torch.randn(len(labels), dim, generator=draw) * 1.5 / dim**0.5
        return unit(texts[labels] + noise, dim=-1)

    labels = torch.arange(rows) % n_classes
    owners = torch.arange(n_classes).repeat_interleave(shots)
    return around(labels), labels, around(owners), owners, texts


def bench_context(
    *,
    shape: Shape | None = None,
    keeps: Sequence[float] = (1.0, 0.9, 0.7, 0.5),
    batch_size: int = 8,
    repeats: int = 5,
) -> list[Row]:
    """Benchmark of a vision tower that drops patches, against the same tower that keeps them all.

    A quarter, half and three quarters down, a share of the patches goes on, and one token for the
    rest (ConVLM). The towers take turns.

    Args:
        shape: Of the random CLIP.
        keeps: Shares of the patches that go on at each of the three layers; the first is 1.
        batch_size: Images at a time.
        repeats: Timings of each share, of which the shortest counts.

    Returns:
        A row a share; the `ratio` is its rate over that with all patches, and `what` says which
        ratio the number of operations promises.

    Raises:
        GloVLMError: With all patches, features differ from those of the plain tower.
    """
    shape = shape or Shape(text=(64, 1))
    width, depth = shape.vision
    layers = sorted({depth * k // 4 for k in (1, 2, 3)})
    model, _ = _random_clip(shape)
    side = shape.image_size
    images = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))

    def encode(keep: float) -> Any:
        if model.context is not None:
            model.context.keep = [keep] * len(layers)
        with torch.inference_mode():
            return model.pool_images(images)

    plain = encode(1.0)
    model.add_context({"layers": layers, "text_dim": shape.text[0]})
    gap = float((encode(1.0) - plain).abs().max())
    _same(0, gap, 1e-6, "the largest difference from the plain tower's features")
    seconds = _shortest_in_turn([partial(encode, keep) for keep in keeps], repeats)
    work = [_block_operations(shape, layers, keep) for keep in keeps]
    what = f"vision tower {width} wide, {depth} blocks, a batch of {batch_size}"
    what += f", {torch.get_num_threads()} threads"
    rows = []
    for keep, taken, each in zip(keeps, seconds, work, strict=True):
        note = f"{what}: a share of {keep} of the patches goes on behind blocks "
        note += f"{', '.join(map(str, layers))}; ratio: times the rate with all patches, and the "
        note += f"operations promise {work[0] / each:.3g}"
        rate, ratio = batch_size / taken, seconds[0] / taken
        rows.append(as_row(f"context.keep_{keep}", rate, "images/s", ratio, note))
    return rows


def _block_operations(shape: Shape, layers: Sequence[int], keep: float) -> float:
    """Multiplications of the patch embedding and all blocks, for one image."""
    width, depth = shape.vision
    patches = (shape.image_size // shape.patch) ** 2
    total = float(patches * 3 * shape.patch**2 * width)
    for layer in range(depth):
        tokens = 1 + patches
        total += 4 * tokens * width**2 + 2 * tokens**2 * width  # maps, scores and their sums
        if layer in layers and (kept := keep_count(keep, patches)) < patches:
            patches = kept + 1
        total += 8 * (1 + patches) * width**2
    return total


def _same(one: float, other: float, tolerance: float, what: str) -> None:
    """Check that a shortcut computes the same as the plain way."""
    if abs(one - other) > tolerance:
        raise GloVLMError(f"{what} gives {other}, the plain way {one}: report this as a bug.")


BENCHES: dict[str, Callable[..., list[Row]]] = {
    "metrics": bench_metrics,
    "cache": bench_cache,
    "encode": bench_encode,
    "methods": bench_methods,
    "context": bench_context,
}


def run_benches(names: Sequence[str] = (), *, backbone: str | None = None) -> list[Row]:
    """Run benchmarks one after the other.

    Args:
        names: Of `BENCHES`; all when empty.
        backbone: For those that encode; if not given, `mini` fills the cache, and loading and
            encoding are timed with random weights of the size of ViT-B/16.

    Returns:
        Rows `name`, `value`, `unit`, `ratio` (or `None`) and `what`.

    Raises:
        GloVLMError: There is no such bench.
    """
    for name in names:
        if name not in BENCHES:
            raise GloVLMError(
                f"Expected a bench of {', '.join(BENCHES)}, found '{name}'.{nearest(name, BENCHES)}"
            )
    given = {"backbone": backbone} if backbone else {}
    options = {"cache": given, "encode": given}
    return [row for name in names or BENCHES for row in BENCHES[name](**options.get(name, {}))]


def _synthetic_images(folder: Path, n_patients: int, per_patient: int) -> Any:
    """Rows of a small synthetic cohort on disk."""
    cohort = write_cohort(folder / "cohort", n_patients, per_patient, seed=0)
    return load_dataset(cohort)["all"]


def _shortest(work: Callable[[], object], repeats: int) -> float:
    """Shortest time of several calls in seconds: other work on the machine only adds time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _shortest_in_turn(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest time of each of several works that take turns, in seconds."""
    rounds = [[_shortest(work, 1) for work in works] for _ in range(repeats)]
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def as_row(name: str, value: float, unit: str, ratio: float | None, what: str) -> Row:
    """A row, with as many digits as a timing is worth."""
    value, ratio = float(f"{value:.3g}"), ratio and float(f"{ratio:.3g}")
    return {"name": name, "value": value, "unit": unit, "ratio": ratio, "what": what}
