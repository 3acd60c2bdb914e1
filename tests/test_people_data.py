"""Data as people have them: tables of any dialect, other column names, layouts, stray files."""

import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Glovlm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_clip

from hf_glovlm.data import check_dataset, load_dataset
from hf_glovlm.errors import GloVLMError

SIX = [f"{i}.png" for i in range(6)]


def put(root: Path, *names: str, first: int = 0) -> Path:
    """Write a different picture under each name."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(first + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        kind = None if path.suffix.lower() in (".png", ".jpg", ".gif", ".tif") else "JPEG"
        Image.fromarray(pixels).save(path, kind)
    return root


def text(root: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content.encode(encoding))
    return root


def loaded(root: Any) -> Any:
    """A data set that must be one."""
    try:
        return load_dataset(root)
    except GloVLMError as error:
        raise AssertionError(f"refused: {error}") from error


def labels(root: Any) -> dict[str, str]:
    """Class of every file, over all splits."""
    return {
        name: rows.features["label"].names[label]
        for rows in loaded(root).values()
        for name, label in zip(rows["file_name"], rows["label"], strict=True)
    }


def problems(done: Any) -> list[str]:
    """Problems of the data themselves, beside the draw that so few images do not allow."""
    as_json = done.out.startswith("{")
    listed = json.loads(done.out)["problems"] if as_json else done.err.splitlines()
    of_data = [line for line in listed if as_json or line.startswith("problem:")]
    return [line for line in of_data if "would refuse these data" not in line]


def notes_of(root: Any) -> str:
    """All that the check notes."""
    return "\n".join(check_dataset(loaded(root), decode=False).notes)


# ---------------------------------------------------------------------------------------- dialects

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252")
cells = st.text(
    st.sampled_from([*"abcXYZ0189 ,;|\t\"'-_.()%/", "é", "ü", "ß", "µ", "\n"]), max_size=12
).map(str.strip)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    separator=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(ENCODINGS),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    notes=st.lists(cells, min_size=6, max_size=6),
    quote_all=st.booleans(),
)
def test_a_table_reads_equal_in_every_dialect_and_encoding(
    tmp_path_factory: pytest.TempPathFactory,
    separator: str,
    encoding: str,
    newline: str,
    notes: list[str],
    quote_all: bool,
) -> None:
    # In cp1252 such letters side by side may be UTF-8 as well: refused.
    assume(encoding != "cp1252" or not re.search("[éüßµ]{2}", " ".join(notes)))
    root = tmp_path_factory.getbasetemp() / "dialects"
    if not (root / SIX[0]).exists():
        put(root, *SIX)
    rows = [["file_name", "label", "patient_id", "mpp", "caption"]]
    mpp = "0,25" if separator == ";" else "0.25"
    rows += [[SIX[i], "Größe" if i % 2 else "été", f"P{i}", mpp, notes[i]] for i in range(6)]

    def cell(value: str) -> str:
        if quote_all or any(c in value for c in f'{separator}"\n\r'):
            return '"' + value.replace('"', '""') + '"'
        return value

    content = newline.join(separator.join(map(cell, row)) for row in rows) + newline
    text(root, "metadata.csv", content, encoding)
    read = loaded(root)["all"]
    assert read["file_name"][:] == SIX
    assert [read.features["label"].names[k] for k in read["label"]] == ["été", "Größe"] * 3
    assert read["patient_id"][:] == [f"P{i}" for i in range(6)]
    assert read["mpp"][:] == [0.25] * 6
    assert read["caption"][:] == notes


@pytest.mark.parametrize(
    ("content", "encoding", "stated"),
    [
        ("file_name;label\n1.png;é\n2.png;b\n", "cp1252", "with semicolons, in cp1252"),
        ("file_name\tlabel\n1.png\té\n2.png\tb\n", "utf-16", "with tabs, in utf-16"),
        ("sep=|\nfile_name|label\n1.png|é\n2.png|b\n", "utf-8", "with bars"),
    ],
)
def test_an_unusual_dialect_is_stated(
    tmp_path: Path, glovlm: Glovlm, content: str, encoding: str, stated: str
) -> None:
    text(put(tmp_path, "1.png", "2.png"), "metadata.csv", content, encoding)
    done = glovlm("data", "check", tmp_path)
    assert not problems(done), done.err
    assert f"the table is read {stated}" in done.err
    assert done.err.count("the table is read") == 1
    assert "the table is read" not in notes_of(
        text(tmp_path, "metadata.csv", "file_name,label\n1.png,é\n2.png,b\n")
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"file_name,label;note\n1.png,a;x\n2.png,b;y\n", "commas or semicolons"),
        ("file_name,label\n1.png,é\n".encode() + b"2.png,\xe9\n", "cannot be determined"),
        ("file_name,label\n1.png,норма\n".encode("cp1251"), "cannot be determined"),
        ("file_name,label\n1.png,diabétique\n".encode("mac-roman"), "cannot be determined"),
        (b'file_name,label\n1.png,"a\n2.png,b\n', "not a readable CSV file"),
        (b"file_name,label\n1.png,a\x00b\n", r"NUL character \(line 2\)"),
        (b"PK\x03\x04 a workbook", "spreadsheet"),
        (b"\xff\xfefile_name", "although it begins as such"),
        (b"file_name;label;mpp\n1.png;a;1,2,3\n", "number of micrometres"),
        (b'file_name,label,mpp\n1.png,a,"1,250"\n', "number of micrometres"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    (put(tmp_path, "1.png", "2.png") / "metadata.csv").write_bytes(content)
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(tmp_path)


def test_predict_reads_the_scale_from_a_table_of_any_dialect(tmp_path: Path) -> None:
    from hf_glovlm.inference.scale import listed_mpp

    put(tmp_path, "é.png", "2.png")
    decomposed = unicodedata.normalize("NFD", "é.png")
    text(tmp_path, "metadata.csv", f"filename;mpp\n{decomposed};0,25\n.\\2.png;0,5\n")
    try:
        scales = listed_mpp([tmp_path / "é.png", tmp_path / "2.png"])
    except GloVLMError as error:
        raise AssertionError(f"refused: {error}") from error
    assert scales == [0.25, 0.5]


# ----------------------------------------------------------------------------------------- columns


def test_columns_that_people_call_otherwise(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png", "3.png")
    text(
        tmp_path,
        "metadata.csv",
        "filename;class;Patient ID\n1.png;a;p\n2.png;b;q\n3.png;b;p\n",
    )
    assert labels(tmp_path) == {"1.png": "a", "2.png": "b", "3.png": "b"}
    assert loaded(tmp_path)["all"]["patient_id"][:] == ["p", "q", "p"]
    assert "label is read from the column 'class'" in notes_of(tmp_path)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("file_name,class,diagnosis", "rename one of class, diagnosis to label or give --label"),
        ("file_name,lable,x", "rename lable to label or give --label-column lable"),
        ("picture,label,x", "rename .* to file_name or give --image-column"),
        ("file,label,image", "rename one of file, image to file_name or give --image-column file"),
    ],
)
def test_a_column_that_is_not_clear_is_a_hint_what_to_give(
    tmp_path: Path, header: str, sentence: str
) -> None:
    text(put(tmp_path, "1.png"), "metadata.csv", f"{header}\n1.png,a,b\n")
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(tmp_path)


def test_two_columns_of_patients_are_refused_until_one_is_named(
    tmp_path: Path, glovlm: Glovlm
) -> None:
    put(tmp_path, "1.png", "2.png", "3.png")
    rows = "file_name,label,patient,subject\n1.png,a,p,1\n2.png,b,q,2\n3.png,a,q,3\n"
    text(tmp_path, "metadata.csv", rows)
    refused = glovlm("data", "check", tmp_path)
    assert refused.code == 2
    assert "give --group-column patient" in refused.err
    done = glovlm("data", "check", tmp_path, "--group-column", "patient", "--json")
    assert not problems(done), done.err
    report = json.loads(done.out)
    assert report["group_column"] == "patient_id"
    assert report["groups"] == {"all": 2}


def test_column_flags_of_check_train_and_evaluate(tmp_path: Path, glovlm: Glovlm) -> None:
    data = put(tmp_path / "data", *(f"{i}.png" for i in range(16)))
    rows = [f"{i}.png;{'ab'[i % 2]};x;{i // 2};{i}" for i in range(16)]
    text(data, "metadata.csv", "\n".join(["pic;grade;label;donor;slide_id", *rows]) + "\n")
    flags = ["--image-column", "pic", "--label-column", "grade", "--group-column", "donor"]
    checked = glovlm("data", "check", data, *flags, "--json")
    assert not problems(checked), checked.err
    assert json.loads(checked.out)["groups"] == {"all": 8}
    out = tmp_path / "run"
    train = ["train", "--data", data, "--backbone", tiny_clip(), "--method", "prototype"]
    done = glovlm(*train, *flags, "--shots", 1, "--n-resamples", 20, "--output-dir", out)
    assert done.code == 0, done.err
    results = json.loads((out / "results.json").read_text())
    assert [one["name"] for one in results["data"]["classes"]] == ["a", "b"]
    assert results["data"]["group_column"] == "patient_id"
    assert any("groups are read from the column 'donor'" in n.lower() for n in results["notes"])
    assert any("semicolons" in note for note in results["notes"])
    again = glovlm("train", "--config", out / "config.yaml", "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    repeated = json.loads((tmp_path / "again" / "results.json").read_text())
    assert repeated["metrics"] == results["metrics"]
    evaluate = ["evaluate", out, "--data", data, "--output", tmp_path / "e.json"]
    refused = glovlm(*evaluate, *flags)
    assert refused.code == 2
    assert "learned from" in refused.err
    measured = glovlm(*evaluate, *flags, "--allow-seen", "--n-resamples", 20)
    assert measured.code == 0, measured.err


# ------------------------------------------------------------------------------------ other tables

TABLES: dict[str, Callable[[Path], object]] = {
    "labels.csv": lambda root: text(root, "labels.csv", "file,class\n1.png,a\n2.png,b\n"),
    "labels.tsv": lambda root: text(root, "labels.tsv", "file\tclass\n1.png\ta\n2.png\tb\n"),
    "images/annotations.csv": lambda root: text(
        root, "images/annotations.csv", "image,diagnosis\n1.png,a\n2.png,b\n"
    ),
    "without suffixes": lambda root: text(root, "x.csv", "image_id,label\n1,a\n2,b\n"),
    "paths above": lambda root: text(
        root, "x.csv", "image_path,label\nimages\\1.png,a\n./images/2.PNG,b\n"
    ),
    "jsonl": lambda root: text(
        root,
        "metadata.jsonl",
        '{"file_name": "images/1.png", "label": "a"}\n{"label": "b", "file_name": "images/2.png"}',
    ),
    "parquet": lambda root: pq.write_table(
        pa.table({"image": ["images/1.png", "images/2.png"], "label": ["a", "b"]}),
        root / "all.parquet",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_beside_or_among_images_is_read(tmp_path: Path, case: str) -> None:
    put(tmp_path, "images/1.png", "images/2.png")
    TABLES[case](tmp_path)
    assert labels(tmp_path) == {"images/1.png": "a", "images/2.png": "b"}


def test_a_table_given_in_place_of_its_folder(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "images/2.png")
    text(tmp_path, "labels.csv", "file,class\n1.png,a\n2.png,b\n")
    assert labels(tmp_path / "labels.csv") == {"images/1.png": "a", "images/2.png": "b"}


def test_tables_of_the_parts_are_a_given_split(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    text(tmp_path, "train.csv", "file,class\n1.png,a\n2.png,b\n")
    text(tmp_path, "test.csv", "file,class\n3.png,b\n")
    read = loaded(tmp_path)
    assert {name: rows["file_name"][:] for name, rows in read.items()} == {
        "train": ["images/1.png", "images/2.png"],
        "test": ["images/3.png"],
    }


UNLABELLED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: None, "nothing that labels them"),
    "a workbook": (lambda root: (root / "labels.xlsx").write_bytes(b"PK"), "labels.xlsx"),
    "two tables": (
        lambda root: [text(root, f"{n}.csv", "file,class\n1.png,a\n2.png,b\n") for n in "xy"],
        r"several tables that may label its images \(x.csv, y.csv\); give the one you mean",
    ),
    "a table without classes": (
        lambda root: text(root, "labels.csv", "file,stage\n1.png,a\n2.png,b\n"),
        r"Beside them lies labels.csv \(file, stage\): rename .* to label or give --label-column",
    ),
    "another folder name": (
        lambda root: [
            (root / "images").rename(root / "glomeruli"),
            text(root, "labels.csv", "file,stage\n1.png,a\n2.png,b\n"),
        ],
        r"rename .* to label or give --label-column",
    ),
    "images above": (lambda root: put(root, "3.png"), "nothing that labels them"),
    "masks": (lambda root: put(root, "masks/1.png", "masks/2.png"), "nothing that labels them"),
}


@pytest.mark.parametrize("case", UNLABELLED)
def test_a_folder_called_images_is_never_a_class(tmp_path: Path, case: str) -> None:
    put(tmp_path, "images/1.png", "images/2.png")
    spoil, sentence = UNLABELLED[case]
    spoil(tmp_path)
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(tmp_path)


def test_a_table_above_the_images_that_were_given_is_named(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "images/2.png")
    text(tmp_path, "labels.csv", "file,class\n1.png,a\n2.png,b\n")
    with pytest.raises(GloVLMError, match=r"\.\./labels\.csv"):
        load_dataset(tmp_path / "images")


def test_a_table_beside_class_folders_that_agrees_brings_the_patients(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    rows = "file,class,patient\na/1.png,a,p\nb/2.png,b,p\nb/3.png,{},q\n"
    text(tmp_path, "labels.csv", rows.format("b"))
    rows_read = loaded(tmp_path)["all"]
    assert "patient_id" in rows_read.column_names
    assert rows_read["patient_id"][:] == ["p", "p", "q"]
    text(tmp_path, "labels.csv", rows.format("a"))
    with pytest.raises(GloVLMError, match=r"gives b/3\.png the class 'a', its folder 'b'"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "patients.csv"])
def test_a_table_of_patients_beside_class_folders(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    text(tmp_path, name, "file_name,patient_id\na/1.png,p\nb/2.png,p\nb/3.png,q\n")
    rows = loaded(tmp_path)["all"]
    assert labels(tmp_path) == {"a/1.png": "a", "b/2.png": "b", "b/3.png": "b"}
    assert "patient_id" in rows.column_names
    assert rows["patient_id"][:] == ["p", "p", "q"]


@pytest.mark.parametrize("tables", ["one", "each"])
def test_folders_of_a_split_and_tables_of_their_images(tmp_path: Path, tables: str) -> None:
    put(tmp_path, "Train/1.png", "Train/2.png", "Test/1.png")
    if tables == "one":
        rows = "file;class\nTrain/1.png;a\nTrain/2.png;b\nTest/1.png;a\n"
        text(tmp_path, "labels.csv", rows)
    else:
        text(tmp_path, "Train/labels.csv", "file;class\n1.png;a\n2.png;b\n")
        text(tmp_path, "Test/labels.csv", "file;class\n1.png;a\n")
    read = loaded(tmp_path)
    assert {part: rows["file_name"][:] for part, rows in read.items()} == {
        "train": ["Train/1.png", "Train/2.png"],
        "test": ["Test/1.png"],
    }


@pytest.mark.parametrize("pattern", ["Patient {0}/{1}.png", "P{0}/a{1}/{1}.png"])
def test_patients_where_classes_should_lie_are_noted(tmp_path: Path, pattern: str) -> None:
    put(tmp_path, *(pattern.format(p, i) for p in (1, 2, 3) for i in (1, 2)))
    assert "classes look like patients" in notes_of(tmp_path)


def test_what_folders_of_one_class_hold_is_read_below_their_wrapper(tmp_path: Path) -> None:
    put(tmp_path, "data/a/1.png", "data/b/2.png")
    assert labels(tmp_path) == {"data/a/1.png": "a", "data/b/2.png": "b"}


# ----------------------------------------------------------------------------------- names of files


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_names_are_compared_in_one_normal_form(tmp_path: Path, suffix: str) -> None:
    decomposed = unicodedata.normalize("NFD", "Läsion/é.png")
    put(tmp_path, decomposed, "b/x.png", "b/Y.PNG")
    names = ["Läsion/é.png", ".\\b\\x.png", "./B/y.png"]
    if suffix == "csv":
        rows = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
        text(tmp_path, "metadata.csv", f"file_name,label\n{rows}")
    else:
        rows = "\n".join(
            json.dumps({"file_name": name, "label": "ab"[i % 2], "n": i})
            for i, name in enumerate(names)
        )
        text(tmp_path, "metadata.jsonl", rows)
    assert labels(tmp_path) == {decomposed: "a", "b/x.png": "b", "b/Y.PNG": "a"}


def test_a_name_that_may_mean_two_files_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "y/1.png", "x/2.png")
    text(tmp_path, "metadata.csv", "file_name,label\n1.png,a\n2.png,b\n")
    with pytest.raises(GloVLMError, match=r"'1\.png' may mean 2 files"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('["1.png", "a"]', "line 2: expected one JSON object"),
        ('{"file_name": "1.png", "label": "a"', "line 2: expected one JSON object"),
        ('{"file_name": "1.png", "label": "a", "label": "b"}', "the key 'label' twice"),
        ('{"file_name": "\\ud800.png", "label": "a"}', "line 2"),
        ("[" * 100_000, "line 2"),
        ('{"file_name": "2.png", "label": ' + "9" * 5000 + "}", "line 2"),
    ],
)
def test_json_lines_that_are_none_name_their_line(tmp_path: Path, line: str, sentence: str) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    text(tmp_path, "metadata.jsonl", '{"file_name": "b/2.png", "label": "b"}\n' + line)
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_a_name_that_is_not_utf8_does_not_stop_the_others(tmp_path: Path, glovlm: Glovlm) -> None:
    data = put(tmp_path / "data", *(f"{c}/{i}.png" for c in "ab" for i in range(6)))
    odd = os.fsencode(data / "a") + b"/\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((data / "a/0.png").read_bytes())
    try:
        checked = glovlm("data", "check", data)
    except UnicodeEncodeError as error:
        raise AssertionError("a traceback") from error
    assert not problems(checked), checked.err
    assert r"a/\xe9.png" in checked.err
    train = ["train", "--data", data, "--backbone", tiny_clip(), "--method", "prototype"]
    run = tmp_path / "run"
    trained = glovlm(*train, "--shots", 1, "--n-resamples", 20, "--output-dir", run)
    assert trained.code == 0, trained.err
    assert r"a/\xe9.png" in trained.err
    table = tmp_path / "p.csv"
    predicted = glovlm("predict", run, data, "--output", table)
    assert predicted.code == 1, predicted.err
    assert r"\xe9.png" in predicted.err
    assert len(table.read_text().splitlines()) == 13


# ----------------------------------------------------------------------------------- files left out


def test_files_that_are_left_out_are_counted_by_kind(tmp_path: Path, glovlm: Glovlm) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "a/3.jfif", "b/4.gif")
    for i in range(3):
        text(tmp_path, f"a/{i}.heic", "x")
    for name in ("b/1.svs", "b/notes.txt", "a/.DS_Store", "b/slide"):
        text(tmp_path, name, "x")
    done = glovlm("data", "check", tmp_path, "--json")
    assert not problems(done), done.err
    report = json.loads(done.out)
    assert report["counts"] == {"all": {"a": 2, "b": 2}}
    (note,) = [note for note in report["notes"] if "left out" in note]
    for part in ("7 files were left out", "3 .heic (a/0.heic", "1 .svs", "1 .txt", "1 hidden"):
        assert part in note
    assert report["left_out"] == {
        ".heic": 3, ".svs": 1, ".txt": 1, "hidden": 1, "without a suffix": 1
    }  # fmt: skip


def test_train_states_what_was_left_out(tmp_path: Path, glovlm: Glovlm) -> None:
    data = put(tmp_path / "data", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    text(data, "a/5.heic", "x")
    train = ["train", "--data", data, "--backbone", tiny_clip(), "--method", "prototype"]
    run = tmp_path / "run"
    done = glovlm(*train, "--shots", 1, "--n-resamples", 20, "--output-dir", run)
    assert done.code == 0, done.err
    notes = json.loads((run / "results.json").read_text())["notes"]
    assert "1 file was left out: 1 .heic." in notes  # names of files may be those of patients
    assert "1 .heic (a/5.heic)" in done.err


def test_a_class_of_other_files_alone_is_named(tmp_path: Path) -> None:
    for i in range(3):
        text(tmp_path, f"a/{i}.heic", "x")
    with pytest.raises(GloVLMError, match=r"3 files were left out: 3 \.heic"):
        load_dataset(tmp_path)


def test_files_that_belong_to_a_data_set_are_not_counted(tmp_path: Path) -> None:
    from hf_glovlm import write_cohort

    write_cohort(tmp_path / "cohort", 4, 3, seed=0)
    for name in ("classes.yaml", "README.md", "LICENSE"):
        text(tmp_path / "cohort", name, "classes: {}")
    assert "left out" not in notes_of(tmp_path / "cohort")


# ------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing", None),
        ("TRAIN", "holdout", "dev"),
        ("trn", "eval", "Valid"),
        ("Train Set", "test_images", "val-set"),
        ("train", "evaluation", "development"),
    ],
)
@pytest.mark.parametrize("layout", ["folders", "below classes", "below one", "column"])
def test_usual_split_names_are_splits(
    tmp_path: Path, names: tuple[str, str, str | None], layout: str
) -> None:
    given = [name for name in names if name]
    pattern = {"below classes": "{1}/{0}/{2}.png", "below one": "set/{0}/{1}/{2}.png"}
    pattern |= {"folders": "{0}/{1}/{2}.png", "column": "{1}/{0}{2}.png"}
    files = {
        pattern[layout].format(part, c, i): part for part in given for c in "ab" for i in range(2)
    }
    put(tmp_path, *files)
    if layout == "column":
        rows = "".join(f"{name},{name[0]},{part}\n" for name, part in files.items())
        text(tmp_path, "metadata.csv", f"file_name,label,split\n{rows}")
    read = loaded(tmp_path)
    assert {*read} == {"train", "test", *(["validation"] if names[2] else [])}
    assert read["train"].features["label"].names == ["a", "b"]
    parts = dict(zip(names, ("train", "test", "validation"), strict=True))
    for part in given:
        assert {*read[parts[part]]["file_name"]} == {f for f, p in files.items() if p == part}
        if part.lower() != parts[part]:
            assert f"'{part}' is the {parts[part]} part" in notes_of(tmp_path)


@pytest.mark.parametrize("names", [("train", "test", "eval"), ("train", "val", "dev")])
@pytest.mark.parametrize("layout", ["folders", "column"])
def test_two_names_that_may_be_one_part_are_refused(
    tmp_path: Path, names: tuple[str, ...], layout: str
) -> None:
    files = [f"{part}/{c}/1.png" for part in names for c in "ab"]
    put(tmp_path, *files)
    if layout == "column":
        rows = "".join(f"{f},{f.split('/')[1]},{f.split('/')[0]}\n" for f in files)
        text(tmp_path, "metadata.csv", f"file_name,label,split\n{rows}")
    with pytest.raises(GloVLMError, match=r"may both be the (test|validation) part"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["Training/1.png", "Testing/2.png"], "lie in no class folder"),
        (["test/a/1.png", "val/b/2.png"], "no train part"),
        (["dev/1.png", "holdout/1.png", "c/2.png"], "beside other folders"),
    ],
)
def test_split_names_never_become_classes_in_silence(
    tmp_path: Path, files: list[str], sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        load_dataset(put(tmp_path, *files))


def test_a_class_that_bears_the_name_of_a_split_is_noted(tmp_path: Path) -> None:
    put(tmp_path, "test/1.png", "normal/2.png")
    assert labels(tmp_path) == {"test/1.png": "test", "normal/2.png": "normal"}
    assert "'test' is read as a class" in notes_of(tmp_path)


# ----------------------------------------------------------------------------------------- patients

FOLDERS = [
    f"{c}/Patient {p}/Slide {s}/{i}.png"
    for p, c in ((1, "a"), (2, "a"), (2, "b"), (3, "b"))
    for s in (1, 2)
    for i in range(2)
]
NAMED = {
    "TCGA": ("TCGA-A{0}-{0}B2C-01Z-00-DX1_{1}.png", "TCGA-A{0}-{0}B2C"),
    "BreaKHis": ("SOB_B_A-14-2254{0}AB-40-00{1}.png", "14-2254{0}AB"),
    "accession": ("S-18-16{0}_{1}.png", "S-18-16{0}"),
    "word": ("patient_{0}_img{1}.png", "patient_{0}"),
}


def proposal(note: str) -> str:
    return re.search(r"--group-from '(.*?)' \(", note)[1]  # type: ignore[index]


def test_subfolders_that_look_like_patients_are_proposed(tmp_path: Path, glovlm: Glovlm) -> None:
    put(tmp_path, *FOLDERS)
    done = glovlm("data", "check", tmp_path)
    assert not problems(done), done.err
    assert "subfolders look like patients" in done.err
    assert "give --group-from parent" in done.err
    report = json.loads(
        glovlm("data", "check", tmp_path, "--group-from", "parent", "--json").out or "{}"
    )
    assert report["groups"] == {"all": 3}
    assert not any("look like patients" in note for note in report["notes"])
    assert any("patients are read from folders" in note for note in report["notes"])


@pytest.mark.parametrize("shape", NAMED)
def test_ids_in_file_names_are_proposed_and_the_proposal_works(
    tmp_path: Path, glovlm: Glovlm, shape: str
) -> None:
    pattern, _ = NAMED[shape]
    put(tmp_path, *(f"{c}/{pattern.format(p, i)}" for p in range(4) for i, c in enumerate("aab")))
    noted = notes_of(tmp_path)
    assert "file names look like patients" in noted
    done = glovlm("data", "check", tmp_path, "--group-from", proposal(noted), "--json")
    assert not problems(done), done.err
    assert json.loads(done.out)["groups"] == {"all": 4}


def test_patients_from_names_decide_the_split_and_are_kept(tmp_path: Path, glovlm: Glovlm) -> None:
    data = put(
        tmp_path / "data",
        *(f"{c}/S-18-{p}_{i}.png" for p in range(10, 18) for i, c in enumerate("aabb")),
    )
    train = ["train", "--data", data, "--backbone", tiny_clip(), "--method", "prototype"]
    train += ["--shots", 1, "--n-resamples", 20]
    plain = glovlm(*train, "--output-dir", tmp_path / "plain")
    assert plain.code == 0, plain.err
    notes = json.loads((tmp_path / "plain" / "results.json").read_text())["notes"]
    assert any("--group-from" in note for note in notes)
    assert "S-18-10" not in (tmp_path / "plain" / "results.json").read_text()
    rule = r"(?P<patient>S-\d+-\d+)_"
    done = glovlm(*train, "--group-from", rule, "--output-dir", tmp_path / "run")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["group_column"] == "patient_id"
    assert results["config"]["group_from"] == rule
    study = text(
        tmp_path,
        "study.yaml",
        f"data: {data}\nmethods: [prototype]\nreference: prototype\nbackbones: [{tiny_clip()}]\n"
        f"shots: 1\ndraws: 1\nn_resamples: 20\ngroup_from: '{rule}'\n",
    )
    studied = glovlm("study", "--config", study / "study.yaml", "--output-dir", tmp_path / "study")
    assert studied.code == 0, studied.err
    (cell,) = (tmp_path / "study" / "cells").rglob("results.json")
    assert json.loads(cell.read_text())["data"]["group_column"] == "patient_id"


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("(", "neither 'parent' nor a regular expression"),
        ("S-18", "has 0 groups; expected one"),
        ("(a)(b)", "has 2 groups; expected one"),
        ("(zzz)", "4 of 4 file names hold nothing that it matches"),
        ("(1)", "2 of 4 file names hold nothing that it matches"),
        ("()", "nothing that it matches"),
        ("x" * 1000, "longer than 500"),
        ("parent", "no folder below their class"),
        ("((((((a?){999}){999}){999}){999}){999})", "simpler expression"),
    ],
)
def test_a_rule_for_patients_that_does_not_fit_is_one_sentence(
    tmp_path: Path, glovlm: Glovlm, rule: str, sentence: str
) -> None:
    put(tmp_path, "a/1.png", "a/2.png", "b/12.png", "b/3.png")
    done = glovlm("data", "check", tmp_path, "--group-from", rule)
    assert done.code == 2
    assert len(done.errors) == 1
    assert re.search(sentence, done.err), done.err


def test_an_expression_that_would_never_end_is_stopped(tmp_path: Path, glovlm: Glovlm) -> None:
    name = "a" * 60
    put(tmp_path, f"a/{name}1.png", f"b/{name}2.png")
    start = time.process_time()
    done = glovlm("data", "check", tmp_path, "--group-from", "((?:a|a|aa)+)+$")
    assert done.code == 2
    assert "write it without repeats" in done.err
    assert time.process_time() - start < 20
