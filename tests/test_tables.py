"""Tables of a person: one reader, one set of sentences, lines that an editor shows."""

import os
import time
from pathlib import Path

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.tables import column_name, read_table, spelling


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_table_as_people_write_it(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff File Name,Patient-ID,note\r\n a.png ,P1,"x, y"\r\n\r\nb.png\r\n')
    table = read_table(path)
    assert table.header == ["File Name", "Patient-ID", "note"]
    assert table.names == ["file_name", "patient_id", "note"]
    assert table.rows == [["a.png", "P1", "x, y"], ["b.png", "", ""]]
    assert table.lines == [2, 4]
    assert table.column("slide", "file_name") == ["a.png", "b.png"]
    assert [row["patient_id"] for row in table] == ["P1", ""]
    assert read_table(path, strip=False).rows[0][0] == " a.png "


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n1,2,3\n", r"line 3: expected 2 fields, found 3; put quotes"),
        ('a,b\n"1\n2",2\n1,2,3\n', r"line 4: expected 2 fields"),
        ("a, A \n1,2\n", r"the column a twice"),
        (b"a,b\n\x81,1\n", r"is not UTF-8 text \(byte 4\)"),
        ('a\n"open\n' + "x" * 200_000 + "\n", r"not a readable CSV file \(field larger"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence) as caught:
        read_table(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_row_that_is_short_is_an_error_where_every_field_counts(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match=r"line 2: expected 2 fields, found 1"):
        read_table(write(tmp_path, "a,b\n1\n"), fill=False)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "zeros"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "table.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "zeros":
        with path.open("wb") as stream:
            stream.truncate(2**34)  # takes no space on the disk
    expected = {"missing": "No such file", "folder": "a folder", "zeros": "more than 256 MiB"}
    start = time.monotonic()
    with pytest.raises(GloVLMError, match=expected.get(kind, "a device or pipe")):
        read_table(path, "a table of images")
    assert time.monotonic() - start < 5


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "slide,lable\n1,2\n"))
    with pytest.raises(GloVLMError, match=r"no column label; .*Did you mean 'lable'"):
        table.need("label")


def test_column_names_have_one_spelling() -> None:
    assert {column_name(n) for n in ("Patient ID", "patient-id", " PATIENT_id ")} == {"patient_id"}


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("P001", "p1", True),
        ("P-01", "P_1", True),
        ("p 1", "P1", True),
        ("\u00c4del", "A\u0308del", True),
        ("sclerosed", "Scle\u200brosed", True),
        ("\uff11", "1", True),
        ("00", "0", True),
        ("1-1", "11", False),
        ("100", "10", False),
        ("P1", "P11", False),
        ("S-18-162_3", "S-18-1623", False),
    ],
)
def test_spellings_of_one_name_share_a_key(one: str, other: str, near: bool) -> None:
    assert (spelling(one) == spelling(other)) is near
