"""The table of slides that slide-level tasks learn from."""

from pathlib import Path

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.slide_table import SlideRow, read_slide_table


def put(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


FULL = """Slide,label,patient_id,split,mpp
a.svs,tumour,p1,train,0.25
sub/b.ome.tif,normal,p2,val,
c,none,p3,test,0.5

"""


def test_a_full_table(tmp_path: Path) -> None:
    table = read_slide_table(put(tmp_path / "slides.csv", FULL))
    assert table.rows == (
        SlideRow("a", "tumour", "p1", "train", 0.25),
        SlideRow("b", "normal", "p2", "validation", None),
        SlideRow("c", "none", "p3", "test", 0.5),
    )
    assert table.classes == ("none", "normal", "tumour")
    assert table.labels == [2, 1, 0]
    assert table.groups == ["p1", "p2", "p3"]
    assert table.splits == ["train", "validation", "test"]
    assert table.patient_column == "patient_id"


def test_a_bare_table_groups_by_slide_and_takes_the_classes_order(tmp_path: Path) -> None:
    path = put(tmp_path / "slides.csv", "\ufeffslide_id,label\nTCGA-05.x.1.svs,b\nk.h5,a\n")
    table = read_slide_table(path, classes=["b", "a", "c"])
    assert (table.groups, table.labels) == (["TCGA-05.x.1", "k"], [0, 1])
    assert (table.splits, table.patient_column, table.classes) == (None, None, ("b", "a", "c"))


def test_files_are_matched_by_name(tmp_path: Path) -> None:
    table = read_slide_table(put(tmp_path / "slides.csv", "slide,label\na.svs,x\nb.svs,y\n"))
    files = [Path("h/b.h5"), Path("h/a.h5"), Path("h/other.h5")]
    assert table.match(files) == {"a": files[1], "b": files[0]}
    with pytest.raises(GloVLMError, match=r"1 of 2 slides have no file \(b\)"):
        table.match(files[1:])
    with pytest.raises(GloVLMError, match=r"the slide a has several files \(a.h5, a.svs\)"):
        table.match([*files, Path("a.svs")])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"no column 'slide'; found none"),
        ("slide,label\n", "a header and no rows"),
        ("slide,labels\na,x\n", "unknown column 'labels'. Did you mean 'label'"),
        ("slide,slide_id,label\na,b,x\n", "has the column slide twice"),
        ("slide,patient_id\na,x\n", "no column 'label'"),
        ("slide,label\na,x\n,y\n", "no slide in line 3"),
        ("slide,label\na,\n", "no label in line 2"),
        ("slide,label\na,x,y\n", "line 2: expected 2 fields, found 3"),
        ("slide,label\na.svs,x\na.tif,y\n", r"names 1 slides more than once \(a\)"),
        ("slide,label\na,tumor\n", "unknown label 'tumor' for a. Did you mean 'tumour'"),
        ("slide,label,split\na,tumour,fold\n", "found 'fold' for a"),
        ("slide,label,split\na,tumour,train\nb,tumour,\n", r"1 of 2 rows have no split \(b\)"),
        ("slide,label,case_id\na,tumour,NA\nb,tumour,p\n", "1 of 2 rows have no case_id"),
        ("slide,label,mpp\na,tumour,-1\n", "positive number of micrometres in mpp, found '-1'"),
        (
            "slide,label,patient_id,split\na,tumour,p,train\nb,tumour,p,test\n",
            "patient_id p stands in train and in test",
        ),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = put(tmp_path / "slides.csv", text)
    with pytest.raises(GloVLMError, match=sentence) as caught:
        read_slide_table(path, classes=["normal", "tumour"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match=r"Expected a table of slides at .*No such file"):
        read_slide_table(tmp_path / "slides.csv")
    with pytest.raises(GloVLMError, match="found: a folder"):
        read_slide_table(tmp_path)
    (tmp_path / "slides.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GloVLMError, match="is not utf-16 text"):
        read_slide_table(tmp_path / "slides.csv")
