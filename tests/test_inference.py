"""Features are encoded once, exactly, and never from a cache that does not fit the question."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from fresh_process import inherited, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Pillow
from tiny import CLASSES, tiny_clip, tiny_images, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import (
    FeatureCache,
    Predictions,
    embed_images,
    embed_prompts,
    encoder_key,
    predict,
    prediction,
    resolve_device,
)
from hf_glovlm.model import ClassWeights, GloVLMForImageClassification, GloVLMModel, MLPHead

BACKBONES: dict[str, Callable[[], Any]] = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "siglip2": tiny_siglip2,
    "pair": tiny_pair,
}
PROMPTS = [["a viable glomerulus"], ["sclerosed", "a globally sclerosed tuft"], ["crescent; PAS"]]


@pytest.fixture(params=list(BACKBONES))
def any_pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load_backbone(str(BACKBONES[request.param]()))


@pytest.fixture
def clip() -> tuple[Any, Any]:
    return load_backbone(str(tiny_clip()))


@pytest.fixture
def towers() -> tuple[Any, Any]:
    return load_backbone(tiny_pair())


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    return dataset(tiny_images(tmp_path / "images", per_class=3))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def dataset(folder: Path, names: tuple[str, ...] = CLASSES) -> Dataset:
    paths = sorted(folder.glob("*/*.png"))
    return Dataset.from_dict(
        {
            "image": [str(path) for path in paths],
            "label": [names.index(path.parent.name) for path in paths],
            "file_name": [f"{path.parent.name}/{path.name}" for path in paths],
        },
        features=Features(
            {"image": Image(), "label": ClassLabel(names=list(names)), "file_name": Value("string")}
        ),
    )


def plain(model: Any, processor: Any, rows: Dataset) -> NDArray[np.float32]:
    """The features of each row as its own batch of one, by the public interface alone."""
    with torch.no_grad():
        each = [
            model.get_image_features(**processor(images=row["image"], return_tensors="pt"))
            for row in rows
        ]
    return np.concatenate([output.pooler_output.numpy() for output in each])


def counted(model: Any) -> list[int]:
    """The sizes of the batches that reach the vision tower from now on."""
    sizes: list[int] = []
    model.backbone.vision_model.register_forward_hook(
        lambda module, args, output: sizes.append(len(output.last_hidden_state))
    )
    return sizes


def classifier(
    model: Any, head: torch.nn.Module | None = None, names: tuple[str, ...] = CLASSES
) -> GloVLMForImageClassification:
    config = model.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: k for k, name in enumerate(names)}
    if head is None:
        head = ClassWeights(config.image_feature_dim, len(names))
        torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(head.bias)
    return GloVLMForImageClassification(config, glovlm=model, head=head).eval()


# ------------------------------------------------------------------------------------ features


def test_features_equal_one_by_one(any_pair: tuple[Any, Any], rows: Dataset) -> None:
    model, processor = any_pair
    expected = plain(model, processor, rows)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the tiny towers do tell images apart
    for batch_size in (1, 4, 32):
        actual = embed_images(model, processor, rows, batch_size=batch_size)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)


def test_project_is_the_last_step(clip: tuple[Any, Any], rows: Dataset) -> None:
    model, processor = clip
    pooled = embed_images(model, processor, rows, project=False)
    assert pooled.shape == (len(rows), model.config.vision_pooled_dim)
    weight = model.backbone.visual_projection.weight.detach().numpy()
    np.testing.assert_allclose(
        embed_images(model, processor, rows), pooled @ weight.T, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("project", [True, False])
def test_no_rows(towers: tuple[Any, Any], rows: Dataset, project: bool) -> None:
    assert embed_images(*towers, rows.select([]), project=project).shape == (0, 64)


def test_mixed_sizes_and_modes(clip: tuple[Any, Any], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    (tmp_path / "all").mkdir()
    for i, (mode, size) in enumerate([("RGB", (90, 60)), ("L", (33, 50)), ("RGBA", (40, 40))]):
        Pillow.fromarray(noise).convert(mode).resize(size).save(tmp_path / f"all/{i}.png")
    rows = dataset(tmp_path, ("all",))
    together = embed_images(*clip, rows)
    alone = np.concatenate([embed_images(*clip, rows.select([i])) for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=2e-5, rtol=1e-4)


def test_equal_content_is_encoded_once(clip: tuple[Any, Any], rows: Dataset) -> None:
    sizes = counted(clip[0])
    actual = embed_images(*clip, rows.select([0, 1, 0, 2, 1, 0]))
    assert sum(sizes) == 3
    np.testing.assert_array_equal(actual[[0, 1]], actual[[2, 4]])
    np.testing.assert_array_equal(actual[0], actual[5])


def test_decoding_runs_beside_the_tower(
    clip: tuple[Any, Any], rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, decode = set(), prediction.open_image

    def spy(value: Any, draft: int) -> Any:
        threads.add(threading.get_ident())
        return decode(value, draft)

    monkeypatch.setattr(prediction, "open_image", spy)
    embed_images(*clip, rows, batch_size=2)
    assert threads
    assert threading.get_ident() not in threads


def test_the_mode_of_every_part_is_kept(rows: Dataset, clip: tuple[Any, Any]) -> None:
    model, processor = clip
    expected = embed_images(model, processor, rows)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.9
    model.train()
    model.backbone.text_model.eval()
    np.testing.assert_array_equal(embed_images(model, processor, rows), expected)
    assert model.training
    assert model.backbone.vision_model.encoder.training
    assert not model.backbone.text_model.training


def test_mixed_precision_around_the_call_changes_nothing(
    towers: tuple[Any, Any], rows: Dataset, cache: FeatureCache
) -> None:
    expected = embed_images(*towers, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(embed_images(*towers, rows, cache=cache), expected)


def test_a_broken_image_is_named(clip: tuple[Any, Any], rows: Dataset, cache: FeatureCache) -> None:
    path = Path(rows.cast_column("image", Image(decode=False))[4]["image"]["path"])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(GloVLMError, match=path.name):
        embed_images(*clip, rows, batch_size=2, cache=cache)
    path.unlink()
    with pytest.raises(GloVLMError, match=path.name):
        embed_images(*clip, rows, batch_size=2, cache=cache)


def test_numbers_that_are_not_finite(
    clip: tuple[Any, Any], rows: Dataset, cache: FeatureCache
) -> None:
    with torch.no_grad():
        clip[0].backbone.vision_model.post_layernorm.bias.fill_(torch.inf)
    with pytest.raises(GloVLMError, match=r"not finite for 9 images \(first: .*image_00.png"):
        embed_images(*clip, rows, cache=cache)
    assert cache.entries() == []


@pytest.mark.parametrize("room", [1, 3])
def test_out_of_memory_halves_the_batch(
    clip: tuple[Any, Any], rows: Dataset, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    expected, pool = embed_images(*clip, rows), GloVLMModel.pool_images
    tried: list[int] = []

    def small(self: Any, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tried.append(len(pixel_values))
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return pool(self, pixel_values, **kwargs)

    monkeypatch.setattr(GloVLMModel, "pool_images", small)
    actual = embed_images(*clip, rows, batch_size=7)
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)
    failed = [n for n in tried if n > room]
    assert failed == ([7, 3] if room == 1 else [7])  # what did not fit is never tried again


def test_one_image_that_does_not_fit(
    clip: tuple[Any, Any], rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GloVLMModel, "pool_images", never)
    with pytest.raises(GloVLMError, match="One image does not fit"):
        embed_images(*clip, rows)


def test_other_errors_of_the_tower_are_not_swallowed(
    clip: tuple[Any, Any], rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(GloVLMModel, "pool_images", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        embed_images(*clip, rows)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "Unknown device 'gpu'"),
        ("cdua", "Did you mean 'cuda'"),
        ("cuda:99", "sees [0-9]+ CUDA GPUs here"),
    ],
)
def test_devices_that_are_not_there(device: str, sentence: str) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        resolve_device(device)


def test_devices_that_are_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device() == resolve_device(None) == resolve_device("auto")


# --------------------------------------------------------------------------------------- cache


def test_a_warm_cache_decodes_and_encodes_nothing(
    any_pair: tuple[Any, Any], rows: Dataset, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(any_pair[0])
    cold = embed_images(*any_pair, rows.select(range(6)), cache=cache)
    assert sum(sizes) == 6
    assert_same_numbers(embed_images(*any_pair, rows.select(range(6)), cache=cache), cold)
    assert sum(sizes) == 6
    full = embed_images(*any_pair, rows, cache=cache)
    assert sum(sizes) == 9
    assert_same_numbers(full[:6], cold)  # projected anew, in another batch

    def never(value: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(prediction, "open_image", never)
    backwards = embed_images(*any_pair, rows.select(range(8, -1, -1)), cache=cache)
    assert_same_numbers(backwards, full[::-1])


def test_content_counts_not_the_place(
    clip: tuple[Any, Any], rows: Dataset, cache: FeatureCache
) -> None:
    cold = embed_images(*clip, rows, cache=cache)
    undecoded = rows.cast_column("image", Image(decode=False))["image"]
    embedded = [{"path": None, "bytes": Path(value["path"]).read_bytes()} for value in undecoded]
    same = Dataset.from_dict({"image": embedded}, features=Features({"image": Image()}))
    sizes = counted(clip[0])
    np.testing.assert_array_equal(cold, embed_images(*clip, same, cache=cache))
    assert sizes == []


def _change(part: str) -> Callable[[Any, Any], None]:
    def weights(model: Any, processor: Any) -> None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            parameters[part].view(-1)[0] += 1e-3

    return weights


def _half(model: Any, processor: Any) -> None:
    model.half()


def _mean(model: Any, processor: Any) -> None:
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]


def _crop(model: Any, processor: Any) -> None:
    processor.image_processor.do_center_crop = False


def _pooling(model: Any, processor: Any) -> None:
    model.config.vision_pooling = "mean"


def _normalize(model: Any, processor: Any) -> None:
    model.config.normalize_pooled = False


def _epsilon(model: Any, processor: Any) -> None:
    model.config.backbone_config.vision_config.layer_norm_eps = 1e-3


def _joint(model: Any, processor: Any) -> None:
    model.backbone.set_visual_projection(torch.randn(32, 64), torch.zeros(32))


def _names(model: Any, processor: Any) -> None:
    model.config.id2label = {0: "viable", 1: "sclerosed", 2: "crescent"}
    model.config.prompts, model.config.temperature = PROMPTS, 2.0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (_change("backbone.vision_model.layernorm.weight"), False),
        (_change("backbone.vision_model.embeddings.cls_token"), False),
        (_half, False),
        (_mean, False),
        (_crop, False),
        (_pooling, False),
        (_normalize, False),
        (_epsilon, False),
        (_change("backbone.text_model.embeddings.word_embeddings.weight"), True),
        (_change("backbone.logit_scale"), True),
        (_joint, True),
        (_names, True),
    ],
)
def test_what_the_key_of_an_encoder_depends_on(
    towers: tuple[Any, Any], change: Callable[[Any, Any], None], same: bool
) -> None:
    before = encoder_key(*towers)
    change(*towers)
    assert (encoder_key(*towers) == before) == same


def test_an_adapter_on_the_tower_changes_the_key(towers: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    model, processor = towers
    keys = [encoder_key(model, processor)]
    text = peft.LoraConfig(target_modules=r".*text_model.*query", init_lora_weights=False)
    other = peft.inject_adapter_in_model(text, load_backbone(tiny_pair())[0])
    assert any("lora" in name for name in other.state_dict())
    assert [encoder_key(other, processor)] == keys
    config = peft.LoraConfig(target_modules=r".*vision_model.*q_proj", init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    keys.append(encoder_key(model, processor))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers
    layers[0].scaling["default"] *= 2
    keys.append(encoder_key(model, processor))
    for layer in layers:
        layer.enable_adapters(False)
    keys.append(encoder_key(model, processor))
    assert len(set(keys)) == 4


def test_the_key_survives_saving(any_pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = any_pair
    classifier(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert encoder_key(*load_backbone(str(tmp_path / "model"))) == encoder_key(model, processor)


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, lambda content: b"", lambda content: b"\xff" * 99]
)
def test_a_damaged_shard_is_computed_again(
    clip: tuple[Any, Any],
    rows: Dataset,
    cache: FeatureCache,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = embed_images(*clip, rows, cache=cache)
    (shard,) = cache.folder.glob("*/*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    sizes = counted(clip[0])
    np.testing.assert_array_equal(expected, embed_images(*clip, rows, cache=cache))
    assert sum(sizes) == 9
    assert [record.levelname for record in caplog.records if "damaged" in record.message] == [
        "WARNING"
    ]
    caplog.clear()
    embed_images(*clip, rows, cache=cache)
    assert sum(sizes) == 9
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    clip: tuple[Any, Any], rows: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    actual = embed_images(*clip, rows, cache=FeatureCache(tmp_path / "file"))
    np.testing.assert_array_equal(actual, embed_images(*clip, rows))
    assert "cannot be cached" in caplog.text


def test_the_place_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "here"))
    assert FeatureCache().folder == tmp_path / "here"
    monkeypatch.delenv("GLOVLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeatureCache().folder == tmp_path / ".cache/glovlm/features"
    assert FeatureCache().entries() == []
    assert FeatureCache(tmp_path).folder == tmp_path


def some(n: int, first: int = 0, width: int = 8) -> tuple[list[bytes], NDArray[np.float32]]:
    keys = [(first + i).to_bytes(16, "big") for i in range(n)]
    values = np.random.default_rng(first).normal(size=(n, width)).astype(np.float32)
    return keys, values


def test_entries_and_clear(cache: FeatureCache) -> None:
    start = time.time()
    for name, n in (("aa11", 3), ("ab22", 5)):
        cache.put(name, *some(n), name=f"encoder {name}")
    os.utime(cache.folder / "aa11" / "about.json", (start + 99, start + 99))
    first, second = cache.entries()
    assert (first.key, first.name, first.images) == ("aa11", "encoder aa11", 3)
    assert (second.key, second.name, second.images) == ("ab22", "encoder ab22", 5)
    assert first.last_used == pytest.approx(start + 99)
    assert start - 1 <= second.created <= second.last_used + 1
    on_disk = sum(path.stat().st_size for path in cache.folder.glob("ab22/*"))
    assert second.size == on_disk > 5 * (16 + 8 * 4)
    with pytest.raises(GloVLMError, match="found 2 that begin with 'a'"):
        cache.clear("a")
    with pytest.raises(GloVLMError, match="found 0"):
        cache.clear("zz")
    assert cache.clear("ab") == on_disk
    assert [entry.key for entry in cache.entries()] == ["aa11"]
    assert cache.clear() > 0
    assert cache.entries() == []
    assert cache.clear() == 0


def test_the_encoder_unused_for_longest_goes_first(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=3 * 5500)
    for age, name in ((30, "old"), (20, "older use"), (10, "new")):
        cache.put(name, *some(100))
        then = time.time() - age
        os.utime(tmp_path / name / "about.json", (then, then))
    assert cache.get("old", some(1)[0])  # a hit counts as use
    cache.put("newest", *some(100))
    assert {entry.key for entry in cache.entries()} == {"old", "new", "newest"}


def test_one_encoder_alone_stays_below_the_limit(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=3 * 5500)
    for i in range(6):
        keys, values = some(100, first=1000 * i)
        cache.put("only", keys, values)
        os.utime(max((tmp_path / "only").glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns))
        assert len(cache.get("only", keys)) == 100  # what was just stored is there
    assert 5000 < sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= 3 * 5500


def test_many_writers_and_readers(cache: FeatureCache) -> None:
    def work(i: int) -> None:
        for step in range(5):
            keys, values = some(20, first=100 * ((i + step) % 4))
            cache.put("shared", keys, values)
            actual = cache.get("shared", keys)
            np.testing.assert_array_equal(np.stack([actual[key] for key in keys]), values)

    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not list(cache.folder.rglob("*.tmp"))


def test_a_thousand_features_load_fast(cache: FeatureCache) -> None:
    keys, values = some(1100, width=768)
    for i in range(0, 1100, 50):
        cache.put("encoder", keys[i : i + 50], values[i : i + 50])
    start = time.perf_counter()
    actual = cache.get("encoder", keys)
    assert time.perf_counter() - start < 0.5
    np.testing.assert_array_equal(np.stack([actual[key] for key in keys]), values)


@pytest.mark.parametrize(
    ("seconds", "most", "kept"), [(3.0, 2048, 0), (6.0, 2048, 4), (11.0, 2048, 6), (0.1, 4, 4)]
)
def test_features_are_stored_every_ten_seconds_and_when_interrupted(
    clip: tuple[Any, Any],
    rows: Dataset,
    cache: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    most: int,
    kept: int,
) -> None:
    pool, calls, stored = GloVLMModel.pool_images, list[int](), list[int]()

    def interrupted(self: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            stored.extend(entry.images for entry in cache.entries())  # what a kill would leave
            raise KeyboardInterrupt
        return pool(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: seconds * len(calls))
        patch.setattr(prediction, "SHARD_ROWS", most)
        patch.setattr(GloVLMModel, "pool_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed_images(*clip, rows, batch_size=2, cache=cache)
    assert sum(stored) == kept
    sizes = counted(clip[0])
    embed_images(*clip, rows, cache=cache)
    assert sum(sizes) == 3


def test_small_shards_are_joined(cache: FeatureCache) -> None:
    keys, values = some(100)
    for i in range(100):
        cache.put("slow", keys[i : i + 1], values[i : i + 1])
    assert len([*cache.folder.glob("slow/*.safetensors")]) <= 17
    assert cache.entries()[0].images == 100
    assert cache.known("slow") == {*keys}
    actual = cache.get("slow", keys)
    np.testing.assert_array_equal(np.stack([actual[key] for key in keys]), values)


# ------------------------------------------------------------------------------------- prompts


def test_prompts(any_pair: tuple[Any, Any]) -> None:
    model, processor = any_pair
    actual = embed_prompts(model, processor, PROMPTS)
    expected = []
    for texts in PROMPTS:
        units = []
        for text in texts:
            inputs = processor(text=[text], return_tensors="pt")
            with torch.no_grad():
                vector = model.get_text_features(**inputs).pooler_output[0].double().numpy()
            units.append(vector / np.linalg.norm(vector))
        mean = np.mean(units, axis=0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)
    for batch_size in (1, 2, 3):
        np.testing.assert_allclose(
            actual, embed_prompts(model, processor, PROMPTS, batch_size=batch_size), atol=1e-5
        )


@pytest.mark.parametrize("prompts", [[], [["viable"], []]])
def test_a_class_without_a_prompt(clip: tuple[Any, Any], prompts: list[list[str]]) -> None:
    with pytest.raises(GloVLMError, match=r"at least one prompt; class number [01] has none"):
        embed_prompts(*clip, prompts)


# --------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_predict_equals_the_forward_pass(
    any_pair: tuple[Any, Any], rows: Dataset, cache: FeatureCache, head: str
) -> None:
    model, processor = any_pair
    made = MLPHead(model.config.image_feature_dim, 3, hidden=8) if head == "mlp" else None
    model = classifier(model, made)
    model.config.temperature = 2.5
    inputs = processor(images=[row["image"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    model.train()
    for batch_size in (1, 9):
        actual = predict(model, processor, rows, batch_size=batch_size, cache=cache)
        np.testing.assert_allclose(actual.logits, logits, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(actual.probabilities, logits.softmax(-1), atol=1e-5)
    assert model.head.training
    assert actual.probabilities.dtype == np.float64
    np.testing.assert_allclose(actual.probabilities.sum(1), 1, atol=1e-12)
    assert actual.class_names == list(CLASSES)
    assert actual.file_names == rows["file_name"][:]
    assert actual.labels is not None
    assert actual.labels.tolist() == rows["label"][:]
    assert actual.predicted == [CLASSES[k] for k in logits.argmax(-1)]
    assert actual.groups is None
    assert actual.similarities is None


def test_similarities_of_a_cosine_head(clip: tuple[Any, Any], rows: Dataset) -> None:
    model, processor = clip
    head = ClassWeights(24, 3, cosine=True)
    prototypes = embed_prompts(model, processor, PROMPTS)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(prototypes))
        head.scale.fill_(30.0)
    groups = [f"p{i % 2}" for i in range(len(rows))]
    actual = predict(classifier(model, head), processor, rows, groups=groups)
    features = embed_images(model, processor, rows)
    cosines = features / np.linalg.norm(features, axis=1, keepdims=True) @ prototypes.T
    assert actual.similarities is not None
    np.testing.assert_allclose(actual.similarities, cosines, atol=1e-5)
    np.testing.assert_allclose(actual.logits, 30 * cosines, atol=1e-4)
    assert actual.groups == groups


def test_labels_are_matched_by_name(clip: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tiny_images(tmp_path, per_class=1)
    model = classifier(clip[0], names=("viable", "sclerosed", "mesangial", "crescent"))
    actual = predict(model, clip[1], dataset(folder))
    assert actual.labels is not None
    assert [actual.class_names[k] for k in actual.labels] == list(CLASSES)
    assert actual.probabilities.shape == (3, 4)
    bare = predict(model, clip[1], dataset(folder).remove_columns(["label", "file_name"]))
    assert bare.labels is None
    assert bare.file_names == ["0", "1", "2"]


def test_some_rows_without_a_label(clip: tuple[Any, Any], rows: Dataset) -> None:
    model = classifier(clip[0])
    values = [-1, *rows["label"][1:]]
    labels = Features(rows.features)["label"]
    part = rows.remove_columns("label").add_column("label", values, feature=labels)
    assert predict(model, clip[1], part).labels.tolist() == values  # type: ignore[union-attr]
    assert predict(model, clip[1], part.select([0])).labels is None


def test_a_label_that_the_model_does_not_know(clip: tuple[Any, Any], rows: Dataset) -> None:
    model = classifier(clip[0], names=("mesangiall", "sclerosed", "viable"))
    with pytest.raises(GloVLMError, match=r"label 'mesangial'.*Did you mean 'mesangiall'"):
        predict(model, clip[1], rows)


def test_labels_must_be_classes(clip: tuple[Any, Any], rows: Dataset) -> None:
    text = rows.remove_columns("label").add_column("label", ["viable"] * 9)
    with pytest.raises(GloVLMError, match="must hold classes"):
        predict(classifier(clip[0]), clip[1], text)


def test_a_head_that_diverged(clip: tuple[Any, Any], rows: Dataset) -> None:
    model = classifier(clip[0])
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(GloVLMError, match="training diverged"):
        predict(model, clip[1], rows)


names_ = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1, max_size=12
)


@settings(max_examples=15)
@given(
    data=st.data(), n=st.integers(0, 5), names=st.lists(names_, min_size=1, max_size=4, unique=True)
)
def test_predictions_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int, names: list[str]
) -> None:
    rng = np.random.default_rng(n)
    some_labels = data.draw(st.lists(st.integers(-1, len(names) - 1), min_size=n, max_size=n))
    written = Predictions(
        probabilities=rng.dirichlet(np.ones(len(names)), size=n),
        logits=rng.normal(size=(n, len(names))).astype(np.float32),
        class_names=names,
        file_names=data.draw(st.lists(names_, min_size=n, max_size=n)),
        similarities=data.draw(
            st.sampled_from([None, rng.normal(size=(n, len(names))).astype(np.float32)])
        ),
        groups=data.draw(st.sampled_from([None, [f"patient {i}" for i in range(n)]])),
        labels=np.array(some_labels, np.int64) if max(some_labels, default=-1) >= 0 else None,
    )
    path = tmp_path_factory.mktemp("predictions") / "new" / "predictions.parquet"
    written.save(path)
    read = Predictions.load(path)
    for field in vars(written):
        before, after = getattr(written, field), getattr(read, field)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        else:
            assert before == after
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_columns_of_the_file(clip: tuple[Any, Any], rows: Dataset, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    groups = [f"patient_{i % 2}" for i in range(9)]
    predict(classifier(clip[0]), clip[1], rows, groups=groups).save(tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    expected = ["file_name", "label", "predicted", *(f"p_{c}" for c in CLASSES)]
    assert table.column_names == [*expected, *(f"logit_{c}" for c in CLASSES), "group"]
    assert table["label"].to_pylist() == [c for c in CLASSES for _ in range(3)]


@pytest.mark.parametrize("content", [None, b"nonsense", "foreign"])
def test_a_file_that_holds_no_predictions(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "p.parquet"
    if content == "foreign":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"a": [1]}), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(GloVLMError, match="is no predictions file"):
        Predictions.load(path)


def test_progress_goes_to_the_error_stream(
    clip: tuple[Any, Any], rows: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    embed_images(*clip, rows, progress=True)
    assert capsys.readouterr().out == ""


def test_what_features_alone_need_is_not_more(tmp_path: Path) -> None:
    """They cost seconds, and features need none of them. (transformers itself needs accelerate.)"""
    code = (
        "import json, sys; from hf_glovlm import inference; "
        "imported = sorted({'gradio', 'matplotlib', 'peft', 'sklearn'} & set(sys.modules)); "
        "print(json.dumps({'imported': imported}))"
    )
    assert run_script(code, home=tmp_path, **inherited()) == {"imported": []}
