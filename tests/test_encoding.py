"""Slides encoded: the right numbers, resumed bit for bit, scales checked, memory bounded."""

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image
from slides_made import write_slide
from tiny import tiny_clip, tiny_siglip2
from tolerance import assert_same_numbers

from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference.engines import open_engine
from hf_glovlm.lab import slide_bench
from hf_glovlm.lab.benches.towers import Shape
from hf_glovlm.lab.slide_bench import bench_slide
from hf_glovlm.model import GloVLMForImageClassification
from hf_glovlm.model.heads import ClassWeights
from hf_glovlm.slides import encode_slide, encode_slides, encoding, load_encoder
from hf_glovlm.slides.encoding import open_bag_engine
from hf_glovlm.slides.files import tiff_reader
from hf_glovlm.slides.files.bags import read_bag
from hf_glovlm.slides.files.openslide_reader import OpenSlideReader
from hf_glovlm.slides.files.region_images import open_picture
from hf_glovlm.slides.files.wsi import open_slide
from hf_glovlm.slides.prefetching import AHEAD, read_batches

SIDE = 32  # of the tiny model's input


def make_classifier() -> tuple[Any, Any]:
    backbone, processor = load_backbone(str(tiny_clip()))
    torch.manual_seed(1)
    head = ClassWeights(backbone.config.image_feature_dim, 2)
    torch.nn.init.normal_(head.weight)
    backbone.config.id2label = {0: "plain", 1: "lesion"}
    return GloVLMForImageClassification(backbone.config, backbone, head).eval(), processor


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "S1.tif"
    write_slide(path, 900, 700, lesions=3, lesion_side=SIDE, seed=1)
    return path


@pytest.fixture(scope="module")
def classifier() -> tuple[Any, Any]:
    return make_classifier()


def table(path: Path) -> list[np.ndarray]:
    bag = read_bag(path, scores=True)
    assert bag.scores is not None
    return [bag.coords, bag.features, bag.scores]


def test_every_row_is_what_the_model_says_of_that_tile(
    tmp_path: Path, slide: Path, classifier: Any
) -> None:
    model, processor = classifier
    done = encode_slide(model, processor, slide, tmp_path / "S1.h5", batch_size=7)
    coords, features, scores = table(done.path)
    assert done.tiles == len(coords) > 60
    with open_slide(slide) as opened:
        whole = opened.read(0, 0, *opened.size)
    tiles = [whole.crop((x, y, x + SIDE, y + SIDE)) for x, y in coords.tolist()]
    inside = [k for k, (x, y) in enumerate(coords.tolist()) if x + SIDE <= 900 and y + SIDE <= 700]
    with torch.no_grad():
        out = model(**processor(images=[tiles[k] for k in inside], return_tensors="pt"))
    assert np.allclose(features[inside], out.image_embeds.numpy(), atol=1e-5)
    assert np.allclose(scores[inside], out.logits.numpy(), atol=1e-4)
    bag = read_bag(done.path)
    assert bag.attributes["classes"] == done.classes == ["plain", "lesion"]
    assert (bag.attributes["patch_size_level0"], bag.attributes["tiles"]) == (SIDE, len(coords))
    assert bag.attributes["slide_mpp"] == pytest.approx(0.5)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip2])
def test_a_backbone_writes_features_alone(
    tmp_path: Path, slide: Path, make: Callable[[], Path]
) -> None:
    model, processor = load_encoder(str(make()))
    done = encode_slide(model, processor, slide, tmp_path / "a.h5", tile_size=100)
    assert done.classes == []
    bag = read_bag(done.path)
    assert bag.features.shape == (done.tiles, model.config.image_feature_dim)
    with pytest.raises(GloVLMError, match="without scores"):
        read_bag(done.path, scores=True)


class Stop(Exception):
    """Raised by a callback, as ctrl-c would be."""


@pytest.mark.parametrize("stop", [0, 7, 21])
def test_an_interrupted_run_resumes_to_the_same_table(
    tmp_path: Path, slide: Path, classifier: Any, stop: int
) -> None:
    def halt(done: int, total: int) -> None:
        assert done <= total
        if done >= stop:
            raise Stop

    whole = encode_slide(*classifier, slide, tmp_path / "whole.h5", batch_size=7, reading_threads=0)
    broken = tmp_path / "broken.h5"
    with pytest.raises(Stop):
        encode_slide(*classifier, slide, broken, batch_size=7, reading_threads=3, on_progress=halt)
    assert not broken.exists()
    if stop:  # a row and a half of the next batch reached the disk too
        part = broken.with_name("broken.h5.part")
        with part.open("ab") as file:
            head = len(part.read_bytes().split(b"\n")[0]) + 1
            record = (part.stat().st_size - head) // stop
            coords = read_bag(whole.path).coords[stop].tobytes()
            file.write(coords + bytes(record - 16) + bytes(record // 2))
    counts: list[int] = []
    done = encode_slide(
        *classifier, slide, broken, batch_size=7, on_progress=lambda n, _: counts.append(n)
    )
    assert (done.resumed_at, counts[0], counts[-1]) == (stop, stop, whole.tiles)
    for one, other in zip(table(whole.path), table(broken), strict=True):
        assert np.array_equal(one, other)
    again = encode_slide(*classifier, slide, broken, batch_size=7, on_progress=halt)
    assert again.resumed_at == again.tiles == whole.tiles


def test_a_run_with_other_settings_is_not_resumed(
    tmp_path: Path, slide: Path, classifier: Any
) -> None:
    path = tmp_path / "a.h5"
    encode_slide(*classifier, slide, path)
    other, processor = make_classifier()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    for call, words in [
        (lambda: encode_slide(*classifier, slide, path, overlap=0.5), "overlap: 0, now 16"),
        (lambda: encode_slide(*classifier, slide, path, classify=False), "n_scores: 2, now 0"),
        (lambda: encode_slide(other, processor, slide, path), "fingerprint"),
    ]:
        with pytest.raises(GloVLMError, match=words):
            call()


def stop_behind_the_first_batch(done: int, total: int) -> None:
    if done:
        raise Stop


@pytest.mark.parametrize(
    ("spoiled", "finished"), [("the slide", False), ("the slide", True), ("a number", False)]
)
def test_what_is_of_another_slide_or_damaged_is_encoded_again(
    tmp_path: Path, classifier: Any, finished: bool, spoiled: str
) -> None:
    """Also a slide of the same name, length, time of change and tiles."""
    slide, path, fresh = tmp_path / "S1.tif", tmp_path / "a.h5", tmp_path / "fresh.h5"
    write_slide(slide, 400, 300, compression="none")
    if finished:
        encode_slide(*classifier, slide, path)
    else:
        with pytest.raises(Stop):
            encode_slide(*classifier, slide, path, on_progress=stop_behind_the_first_batch)
    if spoiled == "the slide":
        status, content = slide.stat(), slide.read_bytes()
        k, n = len(content) // 2, len(content) - 4096
        slide.write_bytes(content[:k] + content[k:n].replace(b"\xc8", b"\xc7") + content[n:])
        os.utime(slide, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        place = path if finished else path.with_name("a.h5.part")
        bags = bytearray(place.read_bytes())
        encode_slide(*classifier, slide, fresh)
        row = table(fresh)[1][1].tobytes()  # the features of the second tile
        at = bags.index(row)
        bags[at + 1] ^= 1
        place.write_bytes(bags)
        fresh.unlink()
    again = encode_slide(*classifier, slide, path)
    assert again.resumed_at == 0
    encode_slide(*classifier, slide, fresh)
    for one, other in zip(table(path), table(fresh), strict=True):
        assert np.array_equal(one, other)
    assert len(again.notes) == 1
    assert [place.name for place in tmp_path.iterdir() if "part" in place.name] == []


# ---------------------------------------------------------------------------------- scale

SCALES = [  # of the model, of the slide's file, given for it, of the tiles -> what comes out
    ({}, 0.5, {}, 0.5, "own scale is unknown"),
    ({"mpp": 0.5}, 0.5, {}, 0.5, ""),
    ({"mpp": 1.0}, 0.5, {}, 1.0, ""),
    ({"mpp": 1.0}, 0.5, {"tile_size": 64}, 0.5, ""),  # the transform halves them
    ({"mpp": 1.0}, 0.5, {"slide_mpp": 0.3}, 1.0, "contradict"),
    ({"mpp": 1.0}, 0.5, {"slide_mpp": 0.25}, "contradict the file", ""),
    ({"mpp": 1.0}, 0.5, {"mpp": 0.7}, 0.7, ""),
    ({"mpp": 1.0}, 0.5, {"mpp": 0.5}, "2.0 times apart", ""),
    ({"mpp": 1.0}, 0.5, {"mpp": 0.5, "allow_scale": True}, 0.5, "2.0 times off"),
    ({"mpp": 0.25}, 0.5, {}, "what is finer is not in it", ""),
    ({"mpp": 0.25}, 0.5, {"allow_scale": True}, 0.25, ""),
    ({"mpp": 0.5}, None, {}, None, "scale of the tiles is unknown"),
    ({}, None, {"mpp": 0.5}, "give it with --mpp", ""),
    ({"mpp": 1.0}, None, {"slide_mpp": 0.5}, 1.0, ""),
]


@pytest.mark.parametrize(("adapted", "of_file", "settings", "expected", "words"), SCALES)
def test_tiles_are_cut_at_the_models_scale_or_refused(
    tmp_path: Path,
    adapted: dict[str, float],
    of_file: float | None,
    settings: dict[str, Any],
    expected: float | str | None,
    words: str,
) -> None:
    model, processor = make_classifier()
    model.config.mpp = adapted.get("mpp")
    slide_facts = write_slide(tmp_path / "a.tif", 400, 300, mpp=of_file, seed=2)
    if isinstance(expected, str):
        with pytest.raises(GloVLMError, match=expected):
            encode_slide(model, processor, slide_facts["path"], tmp_path / "a.h5", **settings)
        return
    done = encode_slide(model, processor, slide_facts["path"], tmp_path / "a.h5", **settings)
    assert done.mpp == (expected and pytest.approx(expected, rel=0.02))
    if done.mpp is not None:
        assert done.input_mpp == pytest.approx(done.mpp * settings.get("tile_size", SIDE) / SIDE)
    assert words in " ".join(done.flags)
    if "mpp" in adapted and not words:
        assert not done.flags


def test_the_chosen_scene_is_encoded_and_stated(tmp_path: Path, classifier: Any) -> None:
    sides = [(400, 300), (300, 200)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for i, side in enumerate(sides):
            write_slide(tmp_path / f"{i}.tif", *side, seed=i)
            file.write(tifffile.imread(tmp_path / f"{i}.tif"), photometric="rgb", metadata=None)
    for scene, given in (("1", {}), ("2", {"scene": "2"})):
        path = tmp_path / f"{scene}.h5"
        done = encode_slide(*classifier, tmp_path / "a.tif", path, **given)
        attributes = read_bag(path).attributes
        assert attributes["scene"] == scene
        size = attributes["level0_width"], attributes["level0_height"]
        assert size == sides[int(scene) - 1]
        assert "further picture" in " ".join(done.flags)


def test_bad_settings_and_numbers_are_refused(tmp_path: Path, slide: Path, classifier: Any) -> None:
    with pytest.raises(GloVLMError, match="batch size"):
        encode_slide(*classifier, slide, tmp_path / "a.h5", batch_size=0)
    model, processor = make_classifier()
    with torch.no_grad():
        model.head.weight[:] = torch.nan
    with pytest.raises(GloVLMError, match="not finite"):
        encode_slide(model, processor, slide, tmp_path / "a.h5")
    empty = tmp_path / "empty.tif"
    write_slide(empty, 300, 300, blobs=0)
    with pytest.raises(GloVLMError, match="No tile"):
        encode_slide(*classifier, empty, tmp_path / "b.h5")


def test_never_more_than_two_batches_of_pixels_are_held(
    tmp_path: Path, slide: Path, classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_glovlm.slides.files.wsi import Slide

    read, ahead = Slide.read, [0]

    def count(self: Slide, *args: int, **kwargs: float) -> Image.Image:
        ahead[0] += args[2] == SIDE
        return read(self, *args, **kwargs)

    gaps: list[int] = []
    monkeypatch.setattr(Slide, "read", count)
    encode_slide(
        *classifier,
        slide,
        tmp_path / "a.h5",
        batch_size=5,
        reading_threads=3,
        on_progress=lambda done, _: gaps.append(ahead[0] - done),
    )
    assert max(gaps) <= 2 * 5


@pytest.mark.parametrize("kind", ["jpeg", "deflate", "mapped", "planes", "openslide", "region"])
def test_threads_read_what_one_thread_reads(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("a.png" if kind == "region" else "a.tif")
    coding = kind if kind in ("jpeg", "deflate") else "none"
    write_slide(tmp_path / "a.tif", 260, 200, compression=coding, tile=64)
    if kind not in ("jpeg", "deflate", "openslide"):
        pixels = tifffile.imread(tmp_path / "a.tif")
        if kind == "region":
            Image.fromarray(pixels).save(path)
        elif kind == "planes":
            planes = pixels.transpose(2, 0, 1)
            tifffile.imwrite(path, planes, photometric="rgb", planarconfig=2, tile=(64, 64))
        else:
            monkeypatch.setattr(tiff_reader, "BLOCK", 64)
            tifffile.imwrite(path, pixels, photometric="rgb")
    rng = np.random.default_rng(0)
    corners = rng.integers(-20, (240, 180), size=(60, 2)).tolist()
    with open_picture(path) as slide, ThreadPoolExecutor(8) as threads:
        if kind == "openslide":
            slide.close()
            slide._file = OpenSlideReader(openslide, path, "generic-tiff")
        assert slide._file.name.startswith(
            {"openslide": "openslide", "region": "image"}.get(kind, "tifffile")
        )

        def read(corner: list[int]) -> bytes:
            return slide.read(*corner, 70, 70, downsample=1.3).tobytes()

        expected = list(map(read, corners))
        if isinstance(slide._file, tiff_reader.TiffReader):  # so that they decode at the same time
            slide._file._cache.clear()
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            assert list(threads.map(read, corners)) == expected
        finally:
            sys.setswitchinterval(before)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_keep_their_order_and_an_error_ends_them(threads: int) -> None:
    started: list[int] = []

    def read(place: int) -> int:
        started.append(place)
        if place == 21:
            raise GloVLMError("pixels cannot be read")
        return place * place

    batches = read_batches(range(40), read, list, batch_size=5, start=3, threads=threads)
    seen: list[int] = []

    def take_all() -> None:
        for rows, squares in batches:
            assert squares == [place * place for place in range(40)[rows]]
            seen.extend(range(40)[rows])
            assert len(started) - len(seen) <= 5 * (AHEAD if threads else 0)

    with pytest.raises(GloVLMError, match="cannot be read"):
        take_all()
    assert seen == list(range(3, 18))
    assert max(started) < 28  # of the batch behind at most
    assert set(next(read_batches(range(3), str, list, batch_size=9, threads=5))[1]) == set("012")


# ------------------------------------------------------------------------- other precisions


def test_a_model_whose_weights_are_halves_encodes_too(
    tmp_path: Path, slide: Path, classifier: Any
) -> None:
    model, processor = classifier
    bags = [encode_slide(model, processor, slide, tmp_path / "S1.h5").path]
    bags.append(
        encode_slide(
            copy.deepcopy(model).half(), processor, slide, tmp_path / "half" / "S1.h5"
        ).path
    )
    exact, rough = (read_bag(path).features for path in bags)
    assert exact.shape == rough.shape
    np.testing.assert_allclose(rough, exact, atol=0.02)
    assert (rough != exact).any()


def test_a_bag_is_never_completed_in_another_precision(
    tmp_path: Path, slide: Path, classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = classifier
    exact, rough = (tmp_path / name / "S1.h5" for name in ("fp32", "bf16"))
    done = encode_slide(*classifier, slide, exact)
    bf16 = open_engine(model, processor, precision="bf16")
    with pytest.raises(Stop):
        encode_slide(
            *classifier, slide, rough, engine=bf16, on_progress=stop_behind_the_first_batch
        )
    for engine, path, words in (
        (None, rough, "precision: bf16, now fp32"),
        (bf16, exact, "precision: fp32, now bf16"),
    ):
        with pytest.raises(GloVLMError, match=words):
            encode_slide(*classifier, slide, path, engine=engine)
    # What auto stands for is known from what lies there, so nothing is measured.
    opened: list[Any] = []

    def open_as_kept(*args: Any, kept: Any, **kwargs: Any) -> Any:
        opened.append(kept)
        return open_engine(*args, precision=kept["precision"], runtime=kept["runtime"])

    monkeypatch.setattr(encoding, "open_engine", open_as_kept)
    kept = open_bag_engine(model, processor, rough.parent, "auto", "torch")
    assert opened == [{"precision": "bf16", "runtime": "torch"}]
    open_bag_engine(model, processor, exact.parent, "auto", "auto")
    assert opened[1:] == [{"precision": "fp32", "runtime": "torch"}]
    again = encode_slide(*classifier, slide, rough, engine=kept)
    assert again.resumed_at == 32
    (_, features, _), (_, others, _) = table(done.path), table(rough)
    assert not np.array_equal(features, others)
    cosines = (features * others).sum(1) / np.linalg.norm(features, axis=1)
    assert (cosines / np.linalg.norm(others, axis=1)).min() > 0.99
    names = ("precision", "runtime")
    attributes = [read_bag(path).attributes for path in (exact, rough)]
    assert [[a.get(name) for name in names] for a in attributes] == [
        [None, None],
        ["bf16", "torch"],
    ]


# ------------------------------------------------------------------------------ processes


def die_on_the_large_one(done: int, total: int) -> None:
    """A process that runs out of memory is killed without a word."""
    if total > 80 and done >= 16:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_killed_process_and_a_bad_slide_lose_no_other_and_the_killed_one_resumes(
    tmp_path: Path, slide: Path, classifier: Any
) -> None:
    model, processor = classifier
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    small, bad = tmp_path / "small.tif", tmp_path / "bad.tif"
    write_slide(small, 300, 300)
    bad.write_bytes(b"II*\0")
    paths, out = [slide, bad, small], tmp_path / "bags"
    heard: list[Path] = []
    outcomes = encode_slides(
        paths,
        out,
        str(folder),
        workers=2,
        batch_size=8,
        on_progress=die_on_the_large_one,
        on_done=lambda outcome: heard.append(outcome.slide),
    )
    assert [o.slide for o in outcomes] == paths
    assert set(heard) == set(paths)
    killed, broken, fine = outcomes
    assert "was killed" in str(killed.error)
    assert "damaged" in str(broken.error)
    assert fine.error is None
    assert fine.encoded is not None
    assert sorted(p.name for p in out.iterdir()) == ["S1.h5.part", "small.h5"]
    (again,) = encode_slides([slide], out, str(folder), batch_size=8)
    assert again.encoded is not None
    assert again.encoded.resumed_at == 16
    # The killed worker had half of the threads, and a model in memory lies at other addresses: the
    # same tiles, and numbers that differ by rounding.
    whole = encode_slide(model, processor, slide, tmp_path / "whole.h5", batch_size=8)
    (coords, *numbers), (expected, *others) = table(again.encoded.path), table(whole.path)
    assert np.array_equal(coords, expected)
    for one, other in zip(numbers, others, strict=True):
        assert_same_numbers(one, other)


@pytest.mark.parametrize(
    ("names", "workers", "words"),
    [
        ([], 1, "at least one slide"),
        (["a/x.tif", "b/x.svs"], 1, "Two slides"),
        (["x"], 0, "worker"),
    ],
)
def test_an_impossible_batch_of_slides_is_refused(
    tmp_path: Path, names: list[str], workers: int, words: str
) -> None:
    with pytest.raises(GloVLMError, match=words):
        encode_slides(names, tmp_path, "mini", workers=workers)


# -------------------------------------------------------------------------------- memory


@pytest.mark.long
def test_a_large_slide_takes_little_memory() -> None:
    shape = Shape(vision=(64, 1), text=(64, 1))
    measured = bench_slide(side=6000, tile_size=448, large_side=1500, shape=shape)
    rows = {row["name"]: row for row in measured}
    shares = [f"tower_share{n}" for n in ("", "_small", "_without", "_small_without", "_command")]
    names = [f"{n}{q}" for n in ("memory", "rate") for q in ("", "_quarter")] + ["reading"]
    assert set(rows) == {f"slide.{name}" for name in (*names, *shares, "memory_above_import")}
    assert rows["slide.memory"]["value"] < 2048
    assert rows["slide.memory_above_import"]["value"] <= 400
    assert rows["slide.memory"]["ratio"] < 1.5  # four times the pixels are 81 MB more
    assert rows["slide.rate"]["value"] > 0
    assert all(0 < rows[f"slide.{name}"]["value"] < 1 for name in shares)


def test_a_bench_that_needs_too_much_memory_or_fails_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = {"peak": 2**31 + 1, "tiles": 9, "seconds": 1.0}
    answer = json.dumps({"imported": 2**30, "slides": [fake, fake]})
    monkeypatch.setattr(slide_bench, "_PROGRAM", f"print('{answer}')")
    with pytest.raises(GloVLMError, match="at most 2 are allowed"):
        list(bench_slide(side=600, large_side=300))
    monkeypatch.setattr(slide_bench, "_PROGRAM", "raise SystemExit('no such thing')")
    with pytest.raises(GloVLMError, match="failed: no such thing"):
        list(bench_slide(side=600, large_side=300))
