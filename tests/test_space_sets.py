"""Labelled sets of the Space, a ZIP or a folder with a table, and the folder that is pushed."""

import csv
import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_space import bomb_png, png

import hf_glovlm
from hf_glovlm import GloVLMError

from space_page import SPACE  # isort: skip - puts the Space's modules on the path
import labelled_sets
import markup
from desk import Desk, Session
from labelled_sets import FOLDER_MARK, LabelledSet, read_set
from shelf import Settings

SPACES = SPACE.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sets are unpacked, which is empty again after each test."""
    place = tmp_path / "unpacked"
    place.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place))
    yield place
    assert list(place.iterdir()) == []


def pack(members: dict[str, bytes | str], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def table(rows: Sequence[Sequence[str]], header: str = "file,class,patient") -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([header.split(","), *rows])
    return stream.getvalue()


def drawings(number: int = 4) -> dict[str, bytes]:
    return {f"{k}.png": png(colour=f"#{40 * k + 20:02x}6080") for k in range(number)}


def labelled(read: LabelledSet) -> dict[str, list[tuple[str, str]]]:
    return {
        name: [(image.name, image.patient) for image in part] for name, part in read.support.items()
    }


ROWS = [["0.png", "a", "P1"], ["1.png", "b", "P1"], ["2.png", "a", "P2"], ["3.png", "b", "P2"]]
READ = {
    "a": [("0.png", "P1"), ("2.png", "P2")],
    "b": [("1.png", "P1"), ("3.png", "P2")],
}


@pytest.mark.parametrize("top", ["", "my set/", "my set/inner/"])
def test_a_zip_with_a_table_is_read(top: str) -> None:
    members = {"labels.csv": table(ROWS), "notes.docx": "x", "__MACOSX/._0.png": "x", **drawings()}
    read = read_set([("set.zip", pack({top + name: c for name, c in members.items()}))])
    assert labelled(read) == READ
    assert read.refused == []
    first, how = read.notes
    assert first == f"1 file is neither image nor table and not read: {top}notes.docx."
    assert "label is read from the column 'class'" in how


def test_a_folder_is_read_like_its_zip() -> None:
    sent = {"metadata.csv": table(ROWS).encode(), **drawings()}
    files = [(f"set{FOLDER_MARK}{name}", content) for name, content in sent.items()]
    assert labelled(read_set(files)) == READ


def test_class_folders_without_patients_say_what_is_missing() -> None:
    members = {f"{'ab'[k % 2]}/1{k // 2}.png": c for k, c in enumerate(drawings().values())}
    read = read_set([("set.zip", pack({**members, "a/broken.png": b"x", "c/broken.png": b"x"}))])
    assert labelled(read) == {
        "a": [("a_10.png", ""), ("a_11.png", "")],
        "b": [("b_10.png", ""), ("b_11.png", "")],
    }
    assert [sentence.split(" is not an image")[0] for sentence in read.refused] == [
        "a_broken.png", "c_broken.png",
    ]  # fmt: skip
    assert "The class 'c' has no image that can be read." in read.notes
    assert any("Nothing says whose images these are" in note for note in read.notes)
    shown = markup.show_set(read.support, read.notes, read.refused)
    assert "4 images in 2 classes, patients not known." in shown


def test_what_a_table_lacks_is_said() -> None:
    rows = [
        [*ROWS[0], "train"],
        [*ROWS[1], "train"],
        [*ROWS[2], "test"],
        ["3.png", "b", "", "test"],
    ]
    members = {"metadata.csv": table(rows, "file_name,label,patient_id,split"), **drawings()}
    read = read_set([("set.zip", pack(members))])
    assert labelled(read)["b"] == [("1.png", "P1"), ("3.png", "")]
    assert any("split into train and test has no part" in note for note in read.notes)
    assert any("patient of 1 of 4 images is not stated" in note for note in read.notes)
    slides = table([row[:3] for row in rows], "file_name,label,slide_id")
    read = read_set([("set.zip", pack({"metadata.csv": slides, **drawings()}))])
    assert any("patients are unknown" in note for note in read.notes)


def test_masks_become_outlines() -> None:
    mask = Image.new("L", (40, 40))
    mask.paste(255, (10, 10, 30, 30))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    rows = [[*row[:2], "m.png", "tuft"] for row in ROWS]
    members = {
        "metadata.csv": table(rows, "file_name,label,mask,outline"),
        "m.png": stream.getvalue(),
    }
    read = read_set([("set.zip", pack({**members, **drawings()}))])
    (first, _) = read.support["a"]
    assert first.outline == "tuft"
    outlined = hf_glovlm.open_outlined({"bytes": first.content, "path": first.name})
    assert (np.asarray(outlined.getchannel("A")) == np.asarray(mask)).all()
    assert "4 with an outline" in markup.show_set(read.support, [], [])
    place = Path(os.environ["GRADIO_TEMP_DIR"]) / "set.zip"
    place.write_bytes(pack({**members, **drawings()}))
    sent = [{"path": str(place), "orig_name": "set.zip"}]
    _, chosen, _, shown, *_ = Desk(Settings()).read_support(sent, Session())
    assert chosen["value"] == "blank+pool"  # the inside, where all have one, and it is stated
    assert "All images have an outline: the model will see its inside" in shown


def lying_zip() -> bytes:
    """A ZIP that states a smaller size for its file than it unpacks to."""
    content = bytearray(pack({"a.png": bytes(3_000_000)}))
    for at, offset in ((content.index(b"PK\x03\x04"), 22), (content.index(b"PK\x01\x02"), 24)):
        content[at + offset : at + offset + 4] = struct.pack("<I", 10)
    return bytes(content)


def encrypted_zip() -> bytes:
    content = bytearray(pack({"a.png": png()}))
    for at, offset in ((content.index(b"PK\x03\x04"), 6), (content.index(b"PK\x01\x02"), 8)):
        content[at + offset] |= 1
    return bytes(content)


BAD = {
    "text": (b"no zip", "no ZIP that can be read"),
    "empty": (b"", "no ZIP that can be read"),
    "cut": (pack(drawings(2))[:200], "no ZIP that can be read"),
    "up": (pack({"../a.png": png()}), "no name of a file inside"),
    "root": (pack({"/etc/a.png": png()}), "no name of a file inside"),
    "drive": (pack({"C:/a.png": png()}), "no name of a file inside"),
    "back": (pack({"a\\..\\b.png": png()}), "no name of a file inside"),
    "deep": (pack({"a/" * 9 + "a.png": png()}), "no name of a file inside"),
    "control": (pack({"a\nb.png": png()}), "plain file name"),
    "bomb": (pack({"a.png": bytes(4_000_000)}), "more than 200 times its size"),
    "lying": (lying_zip(), "no ZIP that can be read"),
    "locked": (encrypted_zip(), "without a password"),
    "many": (pack({f"{k}.txt": "" for k in range(1001)}), "at most 1000"),
    "none": (pack({"a.txt": "x", "b.zip": pack(drawings(1))}), "holds no images"),
    "loose": (pack(drawings()), "nothing that labels them"),
    "missing": (pack({"t.csv": table([["x.png", "a", ""]]), **drawings()}), "not there"),
    "outside": (
        pack({"metadata.csv": table([["../../../etc/hostname", "a", ""]]), **drawings()}),
        "inside",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_zip_is_refused_with_a_sentence(kind: str, folder: Path) -> None:
    content, reason = BAD[kind]
    with pytest.raises(GloVLMError, match=re.escape(reason)) as caught:
        read_set([("set.zip", content)])
    assert str(folder) not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_sizes_are_counted_while_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).bytes(3000)
    content = pack({"a.png": noise, "b.png": noise})
    monkeypatch.setattr(labelled_sets, "MAX_BYTES", 4000)
    with pytest.raises(GloVLMError, match="unpacks to too much"):
        read_set([("set.zip", content)])
    monkeypatch.setattr(labelled_sets, "MAX_FILE", 2000)
    with pytest.raises(GloVLMError, match="unpacks to too much"):
        read_set([("set.zip", pack({"a.png": noise}))])


def test_one_zip_or_a_folder_and_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for files in ([], [("a.zip", pack(drawings())), ("b.png", png())]):
        with pytest.raises(GloVLMError, match="Expected one ZIP"):
            read_set(files)
    many = {f"class{k}/a{k}.png": png(colour=f"#{k:02x}8080") for k in range(9)}
    many["class0/huge.png"] = bomb_png(20_000, 10_000)
    read = read_set([("set.zip", pack(many))])
    assert len(read.support) == 9
    assert "huge.png" in read.refused[0]
    place = Path(os.environ["GRADIO_TEMP_DIR"]) / "set.zip"
    place.write_bytes(pack(many))
    session = Session()
    sent = [{"path": str(place), "orig_name": "set.zip"}]
    assert "has 9 classes, at most 8" in Desk(Settings()).read_support(sent, session)[3]
    assert session.support == {}
    monkeypatch.setattr(labelled_sets, "MAX_SET", 3)
    with pytest.raises(GloVLMError, match="4 labelled images, at most 3"):
        read_set([("set.zip", pack({"t.csv": table(ROWS), **drawings()}))])


# --------------------------------------------------------------------------------- its own folder


def test_the_space_builds_from_its_own_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SPACES / "build.py"), str(tmp_path / "built")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout
    built = tmp_path / "built"
    assert {path.name for path in SPACE.iterdir() if path.is_file()} < {
        p.name for p in built.iterdir()
    }
    lines = (built / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not any(re.match(r"hf[-_]glovlm|gradio", line) for line in lines)  # the one is there
    # Each thing the page imports is beside it, is named, or comes with the SDK.
    named = {re.split(r"[<>=!~\[; ]", line)[0] for line in lines}
    assert {"torch", "transformers", "datasets", "starlette", "matplotlib"} <= named
    code = "import hf_glovlm, sys; sys.stdout.write(hf_glovlm.__file__)"
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=built, env=own, check=True, capture_output=True, text=True
    )
    assert Path(ran.stdout).is_relative_to(built)
    assert (built / "hf_glovlm" / "mini" / "model.safetensors").stat().st_size > 100_000
    assert not list(built.rglob("__pycache__"))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "holds something" in again.stderr
