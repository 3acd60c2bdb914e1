"""Each image is read and decoded once: what a look says of it is right, kept, and handed on."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from command_line import Glovlm
from image_counts import Counts
from numpy.typing import NDArray
from PIL import Image
from tiny import tiny_clip

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, check_dataset, load_dataset, open_image
from hf_glovlm.data.columns import LOOK
from hf_glovlm.data.folder import column
from hf_glovlm.data.looks import look_at
from hf_glovlm.data.outlines import outlines_of
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import FeatureCache, MemoryCache, embed_images
from hf_glovlm.lab.benches.reading import bench_check, bench_draft
from hf_glovlm.runs import TrainConfig, run
from hf_glovlm.runs.evaluation import evaluate
from hf_glovlm.runs.study import StudyConfig, run_study


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counts:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    return Counts(monkeypatch)


def blotches(folder: Path, n: int = 8, *, masked: bool = False) -> Path:
    """Two classes of pictures that are near duplicates of nothing, with outlines or without."""
    rng, lines = np.random.default_rng(0), ["file_name,label,mpp,mask"]
    (folder / "masks").mkdir(parents=True)
    inside = np.zeros((48, 40), np.uint8)
    inside[8:40, 8:32] = 255
    for k, label in enumerate(("dark", "pale")):
        (folder / label).mkdir()
        for i in range(n):
            small = rng.integers(0, 128, (8, 8, 3)) + 127 * k
            image = Image.fromarray(small.astype(np.uint8)).resize((40, 48))
            image.save(folder / label / f"{i}.png")
            Image.fromarray(inside).save(folder / "masks" / f"{label}_{i}.png")
            lines.append(f"{label}/{i}.png,{label},0.5,masks/{label}_{i}.png")
    if masked:
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        for mask in (folder / "masks").iterdir():
            mask.unlink()
        (folder / "masks").rmdir()
    return folder


def make(data: Path, output: Path, **settings: Any) -> TrainConfig:
    values: dict[str, Any] = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 20}
    return TrainConfig(data=str(data), output_dir=str(output), **values | settings)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "outlined"])
def test_a_warm_run_reads_each_file_once_and_decodes_none(
    counts: Counts, tmp_path: Path, masked: bool
) -> None:
    folder = blotches(tmp_path / "data", masked=masked)
    files, outline = 32 if masked else 16, "blank" if masked else "ignore"
    cold, decoded = counts.of(lambda: run(make(folder, tmp_path / "cold", outline=outline)))
    results = [tmp_path / name / "results.json" for name in ("cold", "warm")]
    assert max(cold) == 2
    assert cold[1] + cold[2] == files
    assert decoded == cold[1] + 2 * cold[2]  # at the look; and once more what is encoded
    warm = counts.of(lambda: run(make(folder, tmp_path / "warm", outline=outline)))
    assert warm == (Counter({1: files}), 0)
    one, other = (path.read_text().split('"timing"')[0] for path in results)
    assert one.replace("cold", "warm") == other
    warm_run = tmp_path / "warm"
    reads, decoded = counts.of(lambda: evaluate(warm_run, folder, allow_seen=True, n_resamples=20))
    assert reads[2] == decoded == cold[1]  # what the run had not encoded


def test_checks_and_studies_take_the_same_look(
    counts: Counts, tmp_path: Path, glovlm: Glovlm
) -> None:
    folder = blotches(tmp_path / "data")
    once = Counter({1: 16})
    assert counts.of(lambda: glovlm("data", "check", folder, "--shots", 2)) == (once, 16)
    assert counts.of(lambda: glovlm("data", "check", folder, "--shots", 2)) == (once, 0)
    study = StudyConfig.from_mapping(
        {
            "data": str(folder), "backbone": str(tiny_clip()), "shots": 2, "draws": 2,
            "methods": ["linear_probe"], "n_resamples": 20,
        }
    )  # fmt: skip
    reads, decoded = counts.of(lambda: run_study(study, tmp_path / "study"))
    assert max(reads) == 2  # what the first cells encode
    assert decoded == reads[2]
    # The finished cell is compared by hashes, and the files are not read again for the other one.
    shutil.rmtree(next((tmp_path / "study/cells").rglob("draw-01")))
    assert counts.of(lambda: run_study(study, tmp_path / "study")) == (once, 0)


def odd_images(folder: Path) -> Path:
    """Images whose pixels, size and outline are not what their first bytes suggest."""
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    outlined, hiding, empty = picture.copy(), picture.copy(), picture.copy()
    outlined.putalpha(Image.fromarray(np.eye(30, 50, dtype=np.uint8) * 255))
    hiding.putalpha(255)
    empty.putalpha(0)
    deep = Image.fromarray(rng.integers(0, 4096, (20, 20), dtype=np.uint16))
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    picture.save(folder / "a/turned.jpg", exif=exif, quality=95)
    outlined.save(folder / "a/outlined.png")
    hiding.save(folder / "a/hiding.png")
    empty.save(folder / "a/empty.png")
    picture.quantize(8).save(folder / "a/palette.png")
    deep.save(folder / "a/deep.png")
    picture.save(folder / "b/plain.png")
    picture.save(folder / "b/copy.bmp")
    return folder


def paths_of(rows: Any) -> list[Path]:
    return [Path(value["path"]) for value in column(rows, "image")]


def test_a_look_says_what_reading_and_decoding_say(tmp_path: Path) -> None:
    rows, store = load_dataset(odd_images(tmp_path / "odd"))["all"], MemoryCache()
    fresh, kept = look_at(rows, store=store), look_at(rows, store=store)
    for looks in (fresh, kept):
        marked = looks.mark(rows)[LOOK][:]
        for row, path in enumerate(paths_of(rows)):
            picture, content = open_image(path), path.read_bytes()
            pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
            assert looks.contents[row] == hashlib.sha256(content).hexdigest()
            assert looks.hashes[row] == (pixels[:32], looks.contents[row][:32])
            assert marked[row]["image"] == xxhash.xxh3_128_digest(content)
            assert (marked[row]["width"], marked[row]["height"]) == picture.size
    copies = {path.name: row for row, path in enumerate(paths_of(rows))}
    assert any(
        {copies["plain.png"], copies["copy.bmp"]} <= {*rows} for rows in fresh.near_duplicates
    )
    assert kept.near_duplicates == fresh.near_duplicates
    usable = [row for row, path in enumerate(paths_of(rows)) if path.name != "empty.png"]
    marked_rows = kept.mark(rows)
    assert outlines_of(marked_rows.select(usable)) == outlines_of(rows.select(usable))
    for of in (rows, marked_rows):
        with pytest.raises(GloVLMError, match="encloses nothing"):
            outlines_of(of)
    one = load_backbone(str(tiny_clip()))
    np.testing.assert_array_equal(embed_images(*one, marked_rows), embed_images(*one, rows))


class Forgetful(FeatureCache):
    """Another process clears it between a question and the next."""

    def known(self, encoder: str) -> set[bytes]:
        keys = super().known(encoder)
        self.clear()
        return keys


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-9])


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "kind"), [(cut, FeatureCache), (flip, FeatureCache), (Path.touch, Forgetful)]
)
def test_what_a_store_lost_is_looked_at_again(
    tmp_path: Path,
    spoil: Callable[[Path], None],
    kind: type[FeatureCache],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows, place = load_dataset(blotches(tmp_path / "data", 3))["all"], tmp_path / "cache"
    looks = look_at(rows, store=FeatureCache(place))
    (entry,) = FeatureCache(place).entries()
    assert (entry.name, entry.images) == ("what images look like", 6)
    (shard,) = place.glob("*/*.safetensors")
    spoil(shard)
    again = look_at(rows, store=kind(place))
    assert again.hashes == looks.hashes
    assert ("damaged" in caplog.text) == (spoil in (cut, flip))
    assert FeatureCache(place).entries()[0].images == 6


def test_an_image_that_cannot_be_read_is_a_sentence_and_not_stored(tmp_path: Path) -> None:
    folder, store = blotches(tmp_path / "data", 3, masked=True), MemoryCache()
    (folder / "dark/0.png").write_bytes((folder / "dark/0.png").read_bytes()[:300])
    rows = load_dataset(folder)["all"]
    (folder / "masks/dark_1.png").unlink()
    (folder / "dark/2.png").unlink()
    for decode, broken in ((True, 3), (False, 2)):
        report = check_dataset({"all": rows}, decode=decode, cache=store)
        assert len(report.looks.errors) == len(report.problems) == broken
        assert report.fingerprint is None
    assert sum(len(key) == 16 for _, key in store._vectors) == 3
    with pytest.raises(GloVLMError, match=r"0\.png is corrupt"):
        look_at(rows).mark(rows)


class Meddling(MemoryCache):
    """A file is replaced once it is known by its content, before it is encoded."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__()
        self.path, self.content = path, content

    def get(self, encoder: str, images: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        known = super().get(encoder, images)
        self.path.write_bytes(self.content)
        return known


def test_a_file_that_changes_under_way_is_not_encoded_as_what_it_was(tmp_path: Path) -> None:
    rows = all_rows(load_dataset(blotches(tmp_path / "data", 2)))
    first, *_, last = paths_of(rows)
    cache = Meddling(first, last.read_bytes())
    with pytest.raises(GloVLMError, match=rf"{first.name} has changed since"):
        embed_images(*load_backbone(str(tiny_clip())), rows, batch_size=1, cache=cache)
    assert not cache._vectors


def test_rows_of_the_benches_of_reading() -> None:
    rows = [*bench_check(per_class=2, side=48, repeats=1), *bench_draft(sides=(900,), files=1)]
    assert [row["name"] for row in rows] == [
        "data.check_cold", "data.check", "data.draft_900", "data.draft_900_change",
    ]  # fmt: skip
    assert 0 < rows[-1]["value"] < 1e-3
