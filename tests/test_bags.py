"""Feature files: read back, resumed after any cut, and those of other tools."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.bags import BagWriter, list_bags, read_bag

SETTINGS = {
    "name": "S1",
    "patch_size": 448,
    "patch_size_level0": 448,
    "patch_level": 0,
    "level0_magnification": None,
    "tile_mpp": 0.4989,
    "classes": ["a", "b"],
}


def rows(n: int, start: int = 0, dim: int = 5, classes: int = 2) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(7)
    features = rng.normal(size=(start + n, dim)).astype(np.float32)
    coords = np.arange(2 * (start + n)).reshape(-1, 2) * 10**9  # beyond 32 bits
    scores = features[:, :classes] * 3
    return features[start:], coords[start:], scores[start:]


def writer(folder: Path, **changes: Any) -> BagWriter:
    given: dict[str, Any] = {"dim": 5, "n_scores": 2, "attributes": SETTINGS, **changes}
    return BagWriter(folder / "S1.h5", **given)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    bag = writer(tmp_path)
    for start, n in [(0, 3), (3, 1), (4, 6)]:
        bag.append(*rows(n, start))
    assert bag.complete() == tmp_path / "S1.h5"
    result, expected = read_bag(tmp_path / "S1.h5", scores=True), rows(10)
    assert np.array_equal(result.features, expected[0])
    assert np.array_equal(result.coords, expected[1])
    assert result.scores is not None
    assert np.array_equal(result.scores, expected[2])
    assert result.name == "S1"
    assert SETTINGS.items() <= result.attributes.items()
    assert read_bag(tmp_path / "S1.h5").scores is None
    assert [p.name for p in tmp_path.iterdir()] == ["S1.h5"]


def test_the_file_is_what_clam_and_trident_read(tmp_path: Path) -> None:
    bag = writer(tmp_path)
    bag.append(*rows(4))
    bag.complete()
    with h5py.File(tmp_path / "S1.h5") as file:
        assert (file["features"].dtype, file["features"].shape) == (np.float32, (4, 5))
        assert (file["coords"].dtype, file["coords"].shape) == (np.int64, (4, 2))
        about = dict(file["coords"].attrs)
        assert (about["patch_size"], about["patch_size_level0"]) == (448, 448)
        assert (about["patch_level"], about["name"]) == (0, "S1")
        assert "level0_magnification" not in about  # unknown is left out, never guessed
        assert file.attrs["complete"]


@given(keep=st.floats(0, 1), first=st.integers(1, 9))
def test_a_run_cut_at_any_byte_resumes_to_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, keep: float, first: int
) -> None:
    folder = tmp_path_factory.mktemp("bag")
    bag = writer(folder)
    head = bag.part.stat().st_size
    bag.append(*rows(first))
    size = head + round(keep * (bag.part.stat().st_size - head))
    with bag.part.open("r+b") as file:
        file.truncate(size)
    again = writer(folder)
    record = 2 * 8 + 5 * 4 + 2 * 4 + 8
    assert again.rows == (size - head) // record
    assert np.array_equal(again.read_coords(), rows(first)[1][: again.rows])
    again.append(*rows(10 - again.rows, again.rows))
    again.complete()
    result = read_bag(folder / "S1.h5", scores=True)
    for one, other in zip((result.features, result.coords, result.scores), rows(10), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_header_that_was_cut_is_written_again(tmp_path: Path, cut: int) -> None:
    bag = writer(tmp_path)
    bag.part.write_bytes(bag.part.read_bytes()[:cut])
    assert writer(tmp_path).rows == 0
    assert json.loads(bag.part.read_bytes())["dim"] == 5


def test_rows_can_be_taken_back(tmp_path: Path) -> None:
    bag = writer(tmp_path)
    bag.append(*rows(7))
    bag.keep(4)
    bag.append(*rows(3, 4))
    bag.complete()
    assert np.array_equal(read_bag(bag.path).features, rows(7)[0])


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attributes": {**SETTINGS, "tile_mpp": 0.25}}, "tile_mpp: 0.4989, now 0.25"),
        ({"attributes": {**SETTINGS, "overlap": 0.5}}, "overlap: None, now 0.5"),
        ({"dim": 6}, "dim: 5, now 6"),
        ({"n_scores": 0}, "n_scores: 2, now 0"),
    ],
)
def test_other_settings_are_not_mixed_in(
    tmp_path: Path, finished: bool, changes: dict[str, Any], words: str
) -> None:
    bag = writer(tmp_path)
    bag.append(*rows(2))
    if finished:
        bag.complete()
    with pytest.raises(GloVLMError, match=words):
        writer(tmp_path, **changes)
    same = writer(tmp_path)
    assert (same.rows, same.is_complete) == (2, finished)


def test_a_finished_bag_stays_as_it_is(tmp_path: Path) -> None:
    bag = writer(tmp_path)
    bag.append(*rows(2))
    bag.complete()
    content = bag.path.read_bytes()
    again = writer(tmp_path)
    with pytest.raises(GloVLMError, match="is finished"):
        again.append(*rows(1))
    assert again.complete().read_bytes() == content


def test_invalid_rows_are_refused_before_they_are_written(tmp_path: Path) -> None:
    bag = writer(tmp_path)
    features, coords, scores = rows(2)
    broken = features.copy()
    broken[1, 2] = np.nan
    for wrong, words in [
        ((features[:, :4], coords, scores), r"features of shape \[2, 5\], found \[2, 4\]"),
        ((features, coords[:1], scores), "coords of shape"),
        ((features, coords, None), "scores of shape"),
        ((features, coords, scores[:, :1]), "scores of shape"),
        ((broken, coords, scores), "not finite"),
    ]:
        with pytest.raises(GloVLMError, match=words):
            bag.append(*wrong)
    assert bag.rows == 0
    with pytest.raises(GloVLMError, match="at least one"):
        bag.complete()
    plain = BagWriter(tmp_path / "plain.h5", dim=5, attributes={})
    with pytest.raises(GloVLMError, match="scores of shape"):
        plain.append(features, coords, scores)
    plain.append(features, coords)
    plain.complete()
    with pytest.raises(GloVLMError, match="features without scores"):
        read_bag(plain.path, scores=True)
    assert read_bag(plain.path).name == "plain"


# ------------------------------------------------------------------------------ of others


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("batched", [False, True])
def test_bags_of_other_tools_are_read(tmp_path: Path, dtype: Any, batched: bool) -> None:
    features, coords, _ = rows(3)
    shaped = features[None] if batched else features
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = shaped.astype(dtype)
        file["coords"] = coords.astype(np.int32 if not batched else np.int64)
        file["features"].attrs["encoder"] = np.bytes_("uni_v1")
        file["coords"].attrs["patch_size_level0"] = np.int64(512)
    result = read_bag(tmp_path / "other.h5")
    assert (result.features.dtype, result.coords.dtype) == (np.float32, np.int64)
    assert np.array_equal(result.features, features.astype(dtype).astype(np.float32))
    assert result.name == "other"
    assert result.attributes == {"encoder": "uni_v1", "patch_size_level0": 512}


FOREIGN = [
    ({"x": np.zeros(3)}, "expected the datasets features and coords, found x"),
    ({"features": np.zeros((3, 2))}, "expected the datasets"),
    ({"features": np.zeros((3, 2)), "coords": np.zeros((2, 2))}, r"coords of shape \[3, 2\]"),
    ({"features": np.zeros(3), "coords": np.zeros((3, 2))}, "as a matrix of numbers"),
    ({"features": np.zeros((2, 3, 4)), "coords": np.zeros((3, 2))}, "as a matrix of numbers"),
]


@pytest.mark.parametrize(("content", "words"), FOREIGN)
def test_another_layout_is_refused(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in content.items():
            file[name] = values
    with pytest.raises(GloVLMError, match=words):
        read_bag(tmp_path / "a.h5")


def test_files_that_are_no_bags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not H5")
    with pytest.raises(GloVLMError, match="no readable H5 file"):
        read_bag(tmp_path / "text.h5")
    writer(tmp_path)
    with pytest.raises(GloVLMError, match="was not finished"):
        read_bag(tmp_path / "S1.h5")
    with pytest.raises(GloVLMError, match="There is no feature file"):
        read_bag(tmp_path / "S2.h5")


def test_a_folder_lists_its_finished_bags(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="found nothing"):
        list_bags(tmp_path / "nowhere")
    for name in ("b", "a"):
        bag = BagWriter(tmp_path / f"{name}.h5", dim=5, attributes={})
        if name == "b":
            with pytest.raises(GloVLMError, match="1 unfinished"):
                list_bags(tmp_path)
        bag.append(*rows(1)[:2])
        bag.complete()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".c.h5.tmp").touch()
    assert [p.name for p in list_bags(tmp_path)] == ["a.h5", "b.h5"]
