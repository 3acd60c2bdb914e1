"""Files in, DatasetDict out: layouts, the traps of ImageFolder, bad input, and the one decoder."""

import csv
import io
import logging
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_glovlm.data import check_dataset, dataset_fingerprint, load_dataset, open_image
from hf_glovlm.data import folder as folder_module
from hf_glovlm.errors import GloVLMError


def picture(seed: int, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(root: Path, *names: str, first: int = 0) -> Path:
    """Write a different picture under each name."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(first + i).save(path)
    return root


def table(root: Path, *rows: dict[str, Any], name: str = "metadata.csv") -> Path:
    """Write metadata.csv."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def labels(rows: datasets.Dataset) -> dict[str, str]:
    """Class name of every file."""
    names = rows.features["label"].names
    return {f: names[k] for f, k in zip(rows["file_name"], rows["label"], strict=True)}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---------------------------------------------------------------------------------- layouts


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "b/1.png", "a/2.JPG", "a/deeper/3.tiff", "a/.hidden.png", ".cache/c/4.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    ds = load_dataset(tmp_path)
    assert list(ds) == ["all"]
    assert labels(ds["all"]) == {"a/2.JPG": "a", "a/deeper/3.tiff": "a", "b/1.png": "b"}
    assert ds["all"].column_names == ["image", "label", "file_name"]
    assert isinstance(ds["all"].features["image"], datasets.Image)
    assert ds["all"].features["label"].names == ["a", "b"]
    assert ds["all"][2]["image"].size == (16, 16)


def test_metadata_wins_over_folders_and_keeps_the_manifest(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "3.png")
    empty = dict.fromkeys(("patient_id", "mpp", "stain"), "")
    table(
        tmp_path,
        {"file_name": "a/1.png", "label": "z", **empty, "mpp": "0.25", "colour": "red"},
        {"file_name": "./a/2.png", "label": "y", **empty, "patient_id": " p1 ", "colour": "blue"},
        {"file_name": "3.png", "label": "z", **empty, "patient_id": "NA", "colour": ""},
    )
    rows = load_dataset(tmp_path)["all"]
    assert labels(rows) == {"a/1.png": "z", "a/2.png": "y", "3.png": "z"}
    assert rows.column_names == ["image", "label", "file_name", "patient_id", "stain", "mpp"]
    assert rows["patient_id"][:] == [None, "p1", None]
    assert rows["mpp"][:] == [0.25, None, None]
    assert rows["stain"][:] == [None, None, None]


@pytest.mark.parametrize("words", [("train", "test", "val"), ("support", "test", "Validation")])
def test_split_column(tmp_path: Path, words: tuple[str, str, str]) -> None:
    put(tmp_path, "1.png", "2.png", "3.png", "4.png")
    splits = (words[0], words[1], words[2], words[0])
    table(
        tmp_path,
        *(
            {"file_name": f"{i}.png", "label": "ab"[i % 2], "split": split}
            for i, split in enumerate(splits, 1)
        ),
    )
    ds = load_dataset(tmp_path)
    assert {name: rows["file_name"][:] for name, rows in ds.items()} == {
        "train": ["1.png", "4.png"],
        "validation": ["3.png"],
        "test": ["2.png"],
    }
    assert all(rows.features["label"].names == ["a", "b"] for rows in ds.values())


@pytest.mark.parametrize("value", ["", "train", "test"])
def test_a_split_column_of_one_value_is_no_split(tmp_path: Path, value: str) -> None:
    put(tmp_path, "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", "label": "ab"[i - 1], "split": value} for i in (1, 2)]
    assert list(load_dataset(table(tmp_path, *rows))) == ["all"]


def test_train_and_test_folders(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/2.png", "test/b/3.png", "val/a/x/4.png")
    ds = load_dataset(tmp_path)
    assert {name: labels(rows) for name, rows in ds.items()} == {
        "train": {"train/a/1.png": "a", "train/b/2.png": "b"},
        "validation": {"val/a/x/4.png": "a"},
        "test": {"test/b/3.png": "b"},
    }


def test_train_and_test_folders_with_their_own_metadata(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    table(
        tmp_path / "train",
        {"file_name": "1.png", "label": "a"},
        {"file_name": "2.png", "label": "b"},
    )
    table(tmp_path / "test", {"file_name": "1.png", "label": "a"})
    ds = load_dataset(tmp_path)
    assert labels(ds["train"]) == {"train/1.png": "a", "train/2.png": "b"}
    assert labels(ds["test"]) == {"test/1.png": "a"}
    assert Path(folder_module.column(ds["test"], "image")[0]["path"]) == tmp_path / "test/1.png"


def test_validation_serves_as_test_where_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        assert list(load_dataset(tmp_path)) == ["train", "test"]
    assert "the validation part is the test" in caplog.text


# ------------------------------------------------------------ what `datasets` itself does wrong


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a/x_test_1.png", "b/dev-2.png", "b/3.png"], "ab", id="file names"),
        pytest.param(["test/1.png", "normal/2.png"], ["normal", "test"], id="class named test"),
        pytest.param(["train/p1/1.png", "other/p2/2.png"], ["other", "train"], id="patients below"),
        pytest.param(["test/a/1.png", "test/b/2.png"], "ab", id="only a test folder"),
        pytest.param(["a/1.png", "validation/2.png"], ["a", "validation"], id="validation"),
    ],
)
def test_names_make_no_split(tmp_path: Path, names: list[str], expected: str | list[str]) -> None:
    ds = load_dataset(put(tmp_path, *names))
    assert list(ds) == ["all"]
    assert len(ds["all"]) == len(names)
    assert ds["all"].features["label"].names == list(expected)


def test_folders_without_images_are_no_class(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "spread-8.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert load_dataset(tmp_path)["all"].features["label"].names == ["a", "b"]


def test_images_without_a_row_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "1.png", "2.png", "other/3.png")
    table(tmp_path, {"file_name": "1.png", "label": "a"})
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        assert len(load_dataset(tmp_path)["all"]) == 1
    assert "2 images without a row are left out" in caplog.text


def test_images_outside_class_folders_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "overview.png")
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        assert len(load_dataset(tmp_path)["all"]) == 2
    assert "1 images outside any class folder" in caplog.text


def test_a_misnamed_column_of_ids_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "1.png")
    table(tmp_path, {"File Name": "1.png", "Label": "a", "glomerulusid": "p", "Slide ID": "s"})
    with caplog.at_level(logging.WARNING, "hf_glovlm"):
        rows = load_dataset(tmp_path)["all"]
    assert "column glomerulusid is ignored; rename it to glomerulus_id" in caplog.text
    assert rows["slide_id"][:] == ["s"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png")
    root = put(tmp_path / "data", "b/2.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "loop").symlink_to(root)
    assert labels(load_dataset(root)["all"]) == {"a/1.png": "a", "b/2.png": "b"}


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "set", "a/1.png", "b/2.png")
    assert len(load_dataset("~/set")["all"]) == 2


# -------------------------------------------------------------------------------- bad input


def _rows(**columns: list[str]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        put(root, "1.png", "2.png")
        pairs = zip(*columns.values(), strict=True)
        return table(root, *(dict(zip(columns, values, strict=True)) for values in pairs))

    return make


def _text(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        put(root, "1.png", "2.png")
        (root / name).write_bytes(content)
        return root

    return make


TWO = ["1.png", "2.png"]
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda root: root / "nowhere", r"nowhere does not exist; expected a folder"),
    "near miss": (
        lambda root: put(root, "glomeruli/a/1.png") / "glomerulli",
        r"Did you mean 'glomeruli'\?",
    ),
    "empty": (lambda root: root, r"holds no images .*expected one folder per class"),
    "a file": (
        lambda root: put(root, "a/1.png") / "a" / "1.png",
        r"is neither a folder nor a \.parquet file",
    ),
    "no classes": (lambda root: put(root, "1.png", "2.png"), r"2 images but nothing that labels"),
    "split without classes": (
        lambda root: put(root, "train/1.png", "test/2.png"),
        r"whose images lie in no class folder",
    ),
    "split beside classes": (
        lambda root: put(root, "train/a/1.png", "test/a/2.png", "more/a/3.png"),
        r"beside other folders with images \(more\)",
    ),
    "rows without files": (
        _rows(file_name=["1.png", "8.png", "9.png"], label=["a", "a", "b"]),
        r"2 of 3 rows name a file that is not there \(8\.png, 9\.png\)",
    ),
    "many rows without files": (
        _rows(file_name=[f"x{i}.png" for i in range(9)], label=["a"] * 9),
        r"9 of 9 rows .*\(x0\.png, x1\.png, x2\.png, \.\.\.\)",
    ),
    "twice": (
        _rows(file_name=["1.png", "1.png", "2.png"], label=["a", "b", "b"]),
        r"names 1 files more than once \(1\.png\)",
    ),
    "twice, spelt differently": (
        _rows(file_name=["1.png", "./1.png"], label=["a", "b"]),
        r"more than once",
    ),
    "no label": (
        _rows(file_name=TWO, label=["a", " "]),
        r"1 of 2 rows have no label \(2\.png\)",
    ),
    "no label column": (
        _rows(file_name=TWO, lable=["a", "b"]),
        r"has no column label; .*found file_name, lable.* Did you mean 'lable'\?",
    ),
    "no file_name column": (_rows(picture=TWO, label=["a", "b"]), r"has no column file_name"),
    "unknown split": (
        _rows(file_name=TWO, label=["a", "b"], split=["train", "tset"]),
        r"expected train, test or validation .*'tset' for 2\.png.*Did you mean 'test'\?",
    ),
    "half a split": (
        _rows(file_name=TWO, label=["a", "b"], split=["train", ""]),
        r"found '' for 2\.png; fill every row or drop the column",
    ),
    "no train": (
        _rows(file_name=TWO, label=["a", "b"], split=["val", "test"]),
        r"no train part",
    ),
    "mpp": (
        _rows(file_name=TWO, label=["a", "b"], mpp=["0.5", "20x"]),
        r"positive number of micrometres in mpp, found '20x' for 2\.png",
    ),
    "negative mpp": (_rows(file_name=TWO, label=["a", "b"], mpp=["0.5", "-1"]), r"found '-1'"),
    "outside": (
        _rows(file_name=["1.png", "../2.png"], label=["a", "b"]),
        r"inside .*'\.\./2\.png'",
    ),
    "absolute": (_rows(file_name=["1.png", "/2.png"], label=["a", "b"]), r"found '/2\.png'"),
    "no image": (
        lambda root: _text("3.svs", b"x")(_rows(file_name=["3.svs"], label=["a"])(root)),
        r"names 3\.svs, which is no image of a known kind",
    ),
    "no rows": (_text("metadata.csv", b"file_name,label\n"), r"a header and no rows"),
    "empty csv": (_text("metadata.csv", b""), r"has no column file_name"),
    "blanks": (_text("metadata.csv", b"file_name label\n1.png a\n"), r"found file_name label"),
    "too many fields": (
        _text("metadata.csv", b"file_name,label\n1.png,a,b\n"),
        r"line 2: expected 2 fields, found 3; put quotes",
    ),
    "short row": (_text("metadata.csv", b"file_name,label\n1.png\n"), r"have no label"),
    "cyrillic": (
        _text("metadata.csv", "file_name,label\n1.png,норма\n".encode("cp1251")),
        r"is not UTF-8 text \(byte 22\)",
    ),
    "column twice": (
        _text("metadata.csv", b"file_name,label,Label\n1.png,a,b\n"),
        r"has the column label twice",
    ),
    "catalogue name": (lambda root: Path("glo_vlms_cornell"), r"entry of the catalogue"),
    "split folder without metadata": (
        lambda root: table(
            put(root, "train/1.png", "test/2.png"),
            {"file_name": "1.png", "label": "a"},
            name="train/metadata.csv",
        ),
        r"folders train have a metadata\.csv but test not",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_input_gives_one_sentence(tmp_path: Path, case: str) -> None:
    make, sentence = BAD_FOLDERS[case]
    with pytest.raises(GloVLMError, match=sentence) as caught:
        load_dataset(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_blank_lines_are_harmless(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "2.png")
    text = "\ufefffile_name,label\r\nx\\1.png,a\r\n\r\n2.png,b\r\n,\r\n"
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert labels(load_dataset(tmp_path)["all"]) == {"x/1.png": "a", "2.png": "b"}


# --------------------------------------------------------------------------- parquet and Hub


def test_parquet_of_bytes_written_by_datasets(tmp_path: Path) -> None:
    source = load_dataset(put(tmp_path / "set", "b/1.png", "a/2.png", "a/3.png"))["all"]
    source = source.remove_columns("file_name").rename_columns({"image": "picture", "label": "y"})
    source = source.add_column("patient_id", [7, 7, 8]).add_column("colour", ["r", "g", "b"])
    source.to_parquet(str(tmp_path / "set.parquet"))
    rows = load_dataset(tmp_path / "set.parquet")["all"]
    assert rows.column_names == ["image", "label", "file_name", "patient_id"]
    assert [rows.features["label"].names[k] for k in rows["label"]] == ["a", "a", "b"]
    assert rows["patient_id"][:] == ["7", "7", "8"]
    assert len(set(rows["file_name"])) == 3
    before = [np.asarray(image) for image in source["picture"]]
    after = [np.asarray(open_image(value)) for value in folder_module.column(rows, "image")]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_of_paths_relative_to_the_file(tmp_path: Path, as_struct: bool) -> None:
    put(tmp_path, "x/1.png", "x/2.png")
    names = ["x/1.png", "x/2.png"]
    images = [{"bytes": None, "path": n} for n in names] if as_struct else names
    columns = {"image": images, "label": [3, 1], "split": ["train", "test"]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    ds = load_dataset(tmp_path / "set.parquet")
    assert labels(ds["train"]) == {"x/1.png": "3"}
    assert labels(ds["test"]) == {"x/2.png": "1"}
    assert open_image(folder_module.column(ds["test"], "image")[0]).size == (16, 16)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": ["no.png"], "label": ["a"]}, r"1 of 1 rows name a file that is not there"),
        ({"image": [{"bytes": None, "path": None}], "label": ["a"]}, r"not there \(row 0\)"),
        ({"image": [b"x"], "label": [None]}, r"have no label \(000000\)"),
        ({"image": [b"x"], "label": [[1]]}, r"expected one class per image"),
        ({"image": [1.5], "label": ["a"]}, r"expected images as \{bytes, path\} .*found double"),
        ({"picture": [b"x"], "label": ["a"]}, r"no column 'image' .*found picture \(Value\)"),
        ({"image": [b"x"], "grade": ["a"]}, r"no column 'label'"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(tmp_path / "bad.parquet")


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("hello")
    with pytest.raises(GloVLMError, match="not a readable parquet file"):
        load_dataset(tmp_path / "bad.parquet")


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str | None]]:
    requests = []

    def fake(name: str, revision: str | None = None) -> Any:
        requests.append((name, revision))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return requests


def _hub_rows(tmp_path: Path, classes: list[str], values: list[int]) -> datasets.Dataset:
    content = [{"bytes": encoded(picture(i)), "path": None} for i in range(len(values))]
    features = datasets.Features(
        {"pixels": datasets.Image(), "lesion": datasets.ClassLabel(names=classes)}
    )
    return datasets.Dataset.from_dict({"pixels": content, "lesion": values}, features=features)


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = _hub_rows(tmp_path, ["z", "a"], [0, 1, 0])
    test = _hub_rows(tmp_path, ["z", "a"], [1])
    requests = _hub(monkeypatch, datasets.DatasetDict({"train": train, "test": test}))
    ds = load_dataset("owner/glomeruli", revision="abc")
    assert requests == [("owner/glomeruli", "abc")]
    assert labels(ds["train"]) == {"train/000000": "z", "train/000001": "a", "train/000002": "z"}
    assert labels(ds["test"]) == {"test/000000": "a"}
    assert ds["train"].features["label"].names == ["a", "z"]


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ({"fold1": [0], "fold2": [1]}, r"has the splits fold1, fold2; expected train"),
        ({"train": [0, 1], "test": [-1]}, r"1 of 1 rows have no label \(test/000000\)"),
    ],
)
def test_bad_hub_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[int]], sentence: str
) -> None:
    parts = {name: _hub_rows(tmp_path, ["a", "b"], values) for name, values in splits.items()}
    _hub(monkeypatch, datasets.DatasetDict(parts))
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset("owner/glomeruli")


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, ConnectionError("Couldn't reach the Hub\nlong story"))
    with pytest.raises(GloVLMError, match=r"is no folder here and could not be loaded") as caught:
        load_dataset("owner/glomeruli")
    assert "long story" not in str(caught.value)


def test_a_missing_folder_below_an_existing_one_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _hub(monkeypatch, ConnectionError("no"))
    monkeypatch.chdir(put(tmp_path, "data/glomeruli/a/1.png"))
    with pytest.raises(GloVLMError, match="Did you mean 'glomeruli'"):
        load_dataset("data/glomerulli")
    assert requests == []


# ---------------------------------------------------------------------------------- images

GREY = np.array([[0, 51], [102, 255]])


def _grey16(factor: float) -> Image.Image:
    return Image.fromarray(np.rint(GREY * factor).astype(np.uint16))


def _with_alpha(mode: str) -> Image.Image:
    rgba = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    rgba.putpixel((1, 1), (10, 20, 30, 255))
    rgba.putpixel((0, 1), (0, 0, 0, 51))
    return rgba.convert(mode)


def _palette(transparent: bool) -> bytes:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putpixel((1, 1), 1)
    return encoded(image, "PNG", **({"transparency": 0} if transparent else {}))


CONVERTED: dict[str, tuple[bytes, list[Any]]] = {
    "grey": (encoded(Image.fromarray(GREY.astype(np.uint8))), [0, 51, 102, 255]),
    "16-bit": (encoded(_grey16(257)), [0, 51, 102, 255]),
    "12 bits in 16": (encoded(_grey16(4095 / 255)), [0, 51, 102, 255]),
    "8 bits in 16": (encoded(_grey16(1)), [0, 51, 102, 255]),
    "16-bit tiff": (encoded(_grey16(257), "TIFF"), [0, 51, 102, 255]),
    "32-bit tiff": (
        encoded(Image.fromarray((GREY * 257).astype(np.int32)), "TIFF"),
        [0, 51, 102, 255],
    ),
    "float tiff": (
        encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        [0, 51, 102, 255],
    ),
    "negative float": (
        encoded(Image.fromarray(np.array([[-3, 0], [0.4, 1]], np.float32)), "TIFF"),
        [0, 0, 102, 255],
    ),
    "rgba": (encoded(_with_alpha("RGBA")), [255, 255, 204, (10, 20, 30)]),
    "grey and alpha": (encoded(_with_alpha("LA")), [255, 255, 204, 18]),
    "palette": (_palette(False), [(250, 0, 0), (250, 0, 0), (250, 0, 0), (0, 0, 250)]),
    "transparent palette": (_palette(True), [255, 255, 255, (0, 0, 250)]),
    "1-bit": (encoded(Image.new("1", (2, 2), 1)), [255] * 4),
    "cmyk": (encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)] * 4),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, case: str) -> None:
    content, expected = CONVERTED[case]
    path = tmp_path / "image"
    path.write_bytes(content)
    pixels = [v if isinstance(v, tuple) else (v, v, v) for v in expected]
    decoded = Image.open(io.BytesIO(content))
    for value in ({"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, decoded):
        image = open_image(value)
        assert image.mode == "RGB"
        assert [image.getpixel(xy) for xy in ((0, 0), (1, 0), (0, 1), (1, 1))] == pixels


def test_cmyk_jpeg_and_orientation(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(open_image(tmp_path / "cmyk.jpg"))[0, 0] - (254, 0, 0)).max() < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).crop((0, 0, 4, 8)).save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(open_image(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(picture(1))[:8, :4], -1))


def _huge_png() -> bytes:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
    body = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return header + body + b"\0\0\0\0"


UNREADABLE = {
    "zero bytes": (b"", r"is empty \(0 bytes\)"),
    "text": (b"hello, I am a picture", r"is not an image that can be read"),
    "truncated png": (encoded(picture(0, 64))[:2000], r"is corrupt or truncated"),
    "truncated jpeg": (encoded(picture(0, 64), "JPEG")[:900], r"is corrupt or truncated"),
    "bomb": (_huge_png(), r"(more than 80,000,000 pixels|corrupt|not an image)"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"is not an image"),
    "not finite": (
        encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF"),
        r"not finite",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_images_are_named(tmp_path: Path, case: str) -> None:
    content, sentence = UNREADABLE[case]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(GloVLMError, match=rf"broken\.png.*{sentence}"):
        open_image({"bytes": None, "path": str(path)})


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_PIXELS", 255)
    with pytest.raises(GloVLMError, match="more than 255 pixels, the limit; cut the glomeruli"):
        open_image({"bytes": encoded(picture(0)), "path": "big.png"})


@pytest.mark.parametrize("value", ["gone.png", {"bytes": None, "path": "gone.png"}])
def test_missing_image(value: Any) -> None:
    with pytest.raises(GloVLMError, match=r"gone\.png does not exist"):
        open_image(value)


def test_an_image_value_with_nothing_in_it() -> None:
    with pytest.raises(GloVLMError, match="neither bytes nor a path"):
        open_image({"bytes": None, "path": None})


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_give_an_image_or_the_sentence(
    kind: str, cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(encoded(picture(3), kind))
    for place, value in flips:
        content[place % len(content)] = value
    damaged = bytes(content[: len(content) - cut % len(content)])
    try:
        mode = open_image({"bytes": damaged, "path": "x"}).mode
    except GloVLMError:  # anything else that is raised fails the test
        return
    assert mode == "RGB"


# ----------------------------------------------------------------------------- check_dataset


def test_a_clean_set_has_no_problem(tmp_path: Path) -> None:
    report = check_dataset(load_dataset(put(tmp_path, "a/1.png", "a/2.png", "b/3.png")))
    assert report.problems == []
    assert report.counts == {"all": {"a": 2, "b": 1}}
    assert report.group_column == "near_duplicate"
    assert report.groups == {"all": 3}
    assert report.to_dict()["fingerprint"] == dataset_fingerprint(load_dataset(tmp_path))
    assert any("patients are unknown" in note for note in report.notes)
    assert any("cannot be in both training and test: b" in note for note in report.notes)
    report.raise_problems()


def _copy(root: Path, source: str, target: str) -> None:
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    (root / target).write_bytes((root / source).read_bytes())


def _relabelled(root: Path) -> None:
    _copy(root, "a/1.png", "b/9.png")


def _relabelled_at_another_patient(root: Path) -> None:
    _copy(root, "a/1.png", "b/9.png")
    table(
        root,
        {"file_name": "a/1.png", "label": "a", "patient_id": "p"},
        {"file_name": "b/9.png", "label": "b", "patient_id": "q"},
    )


def _copied_to_another_patient(root: Path) -> None:
    _copy(root, "a/1.png", "a/9.png")
    table(
        root,
        {"file_name": "a/1.png", "label": "a", "patient_id": "p"},
        {"file_name": "a/9.png", "label": "a", "patient_id": "q"},
        {"file_name": "b/3.png", "label": "b", "patient_id": "r"},
    )


def _patient_on_two_sides(root: Path) -> None:
    table(
        root,
        {"file_name": "a/1.png", "label": "a", "patient_id": "p", "split": "train"},
        {"file_name": "a/2.png", "label": "a", "patient_id": "p", "split": "test"},
        {"file_name": "b/3.png", "label": "b", "patient_id": "q", "split": "train"},
    )


def _nothing_to_train_on(root: Path) -> None:
    table(
        root,
        {"file_name": "a/1.png", "label": "a", "patient_id": "p", "split": "train"},
        {"file_name": "b/3.png", "label": "b", "patient_id": "q", "split": "test"},
    )


def _one_class(root: Path) -> None:
    (root / "b" / "3.png").unlink()


def _corrupt(root: Path) -> None:
    (root / "a" / "2.png").write_bytes(b"")


def _all_corrupt(root: Path) -> None:
    for i in range(6):
        (root / "a" / f"{i}.png").write_bytes(b"no")


def _near_copy_on_two_sides(root: Path) -> None:
    image = picture(5, 4).resize((64, 64))
    for name in ("train/a/1.png", "train/b/2.png", "test/b/3.png"):
        put(root, name, first=ord(name[6]))
    image.save(root / "train/a/1.png")
    (root / "test/a").mkdir()
    image.resize((50, 50)).save(root / "test/a/1.jpg", quality=80)
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (root / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_relabelled, r"1 images have different labels .*a/1\.png, b/9\.png"),
        (_relabelled_at_another_patient, r"1 images have different labels"),
        (_copied_to_another_patient, r"are in several groups .*a/1\.png, a/9\.png"),
        (_patient_on_two_sides, r"1 group stands \(p\) on both the train and the test side"),
        (_nothing_to_train_on, r"class b has 1 test images and none to train on"),
        (_one_class, r"at least two classes, found one \(a\)"),
        (_corrupt, r"a/2\.png is empty"),
        (_near_copy_on_two_sides, r"on both the train and the test side"),
    ],
)
def test_problems(tmp_path: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    spoil(tmp_path)
    report = check_dataset(load_dataset(tmp_path))
    assert len(report.problems) == 1
    with pytest.raises(GloVLMError, match=sentence):
        report.raise_problems()


def test_many_corrupt_images_make_a_short_report(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/3.png")
    _all_corrupt(tmp_path)
    report = check_dataset(load_dataset(tmp_path))
    assert len(report.problems) == 4
    assert report.problems[-1] == "3 more images cannot be read."
    assert check_dataset(load_dataset(tmp_path), decode=False).fingerprint is not None


def test_copies_within_a_group_are_a_note(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    _copy(tmp_path, "a/1.png", "a/9.png")
    report = check_dataset(load_dataset(tmp_path))
    assert report.problems == []
    assert report.duplicates == [["a/1.png", "a/9.png"]]
    assert report.groups == {"all": 3}
    assert any("more than once within a group" in note for note in report.notes)


def test_fingerprint_depends_on_content_and_label_only(tmp_path: Path) -> None:
    one = load_dataset(put(tmp_path / "one", "a/1.png", "b/2.png"))
    moved = put(tmp_path / "two", "x/9.png", "z/1.png")
    table(
        moved,
        {"file_name": "z/1.png", "label": "b", "split": "train"},
        {"file_name": "x/9.png", "label": "a", "split": "test"},
    )
    relabelled = load_dataset(put(tmp_path / "three", "a/1.png", "c/2.png"))
    repainted = load_dataset(put(tmp_path / "four", "a/1.png", "b/2.png", first=1))
    same = {dataset_fingerprint(one), dataset_fingerprint(load_dataset(moved))}
    assert len(same) == 1
    assert len(same | {dataset_fingerprint(relabelled), dataset_fingerprint(repainted)}) == 3


# --------------------------------------------------------------------------------- real data


def test_real_glomeruli_load_fast(shared: Path) -> None:
    start = time.perf_counter()
    ds = load_dataset(shared / "data" / "glomeruli_sclerosis")
    assert time.perf_counter() - start < 1
    assert list(ds) == ["all"]
    counts = np.bincount(ds["all"]["label"][:])
    assert dict(zip(ds["all"].features["label"].names, counts, strict=True)) == {
        "non_sclerosed": 854,
        "sclerosed": 240,
    }
    assert len(set(ds["all"]["slide_id"])) == 20
