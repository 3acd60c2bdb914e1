"""The table of slides and cases, and the outlines that belong to a slide: by exact names."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from slide_model import outline, write_outlines

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.classify import classify_slides
from hf_glovlm.slides.config import SlideConfig


def module(name: str) -> Any:
    """A module of the files of slides."""
    try:
        return importlib.import_module(f"hf_glovlm.slides.files.{name}")
    except ImportError:
        pytest.fail(f"there is no {name}")


def put(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def refusal(folder: Path, *slides: str, **options: Any) -> str:
    """Why a run over slides stops; where all is well before it, the model that is not there."""
    settings = {"slides": [str(folder / name) for name in slides], "output_dir": str(folder / "o")}
    with pytest.raises(GloVLMError) as caught:
        classify_slides(
            SlideConfig.from_mapping({"model": str(folder / "no/model"), **settings, **options})
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_full_table(tmp_path: Path) -> None:
    table = module("case_table").read_case_table(
        put(
            tmp_path / "cases.csv",
            "slide_id,case_id,patient_id,biopsy,stain,mpp,scene,age\n"
            "in/S1.svs,C1,P1,1,PAS,0.25,2,40\n"
            "S1.2,NA,P2,2,,,,\n"
            "\n"
            "x.ome.tiff,,P3,,H&E,na,,\n"
            "in/S1.svs,C1,P1,1,PAS,0.250,2,41\n"
            "y,,,B7,,,,\n",
        )
    )
    row = module("case_table").CaseRow
    assert [*table.rows.values()] == [
        row("S1", "C1", "P1", "1", "PAS", 0.25, "2"),
        row("S1.2", None, "P2", "2"),
        row("x", None, "P3", None, "H&E"),
        row("y", None, None, "B7"),
    ]
    assert table.cases_of(["S1", "S1.2", "x", "y"]) == ["C1", "P2 / 2", "P3", "B7"]
    assert [one.specimen for one in table.rows.values()] == ["C1", "P2 / 2", None, "B7"]
    assert table.notes == ["cases.csv: not read: age."]
    assert table.row_of(Path("in/x.ome.tif")).patient == "P3"


def test_what_a_table_states_is_told_and_nothing_else(tmp_path: Path) -> None:
    table = module("case_table").read_case_table(
        put(
            tmp_path / "cases.csv",
            "slide,case,kidney,system,arteries,block,level,section_um,stain,reader,read\n"
            'S1,A,Native,ISN/RPS,3,A1,2,"2,5",PAS,MK,crescent; segmental_sclerosis;crescent\n'
            "S2,A,,,,,,,,none,n/a\n"
            "S3,B,NA,none,0,,,30,,,\n"
            "S4,C,,,,,,,,,;\n",
        )
    )
    rows = [table.rows[f"S{i}"] for i in range(1, 5)]
    assert [row.stated() for row in rows] == [
        {
            "block": "A1",
            "level": "2",
            "section_um": 2.5,
            "stain": "PAS",
            "reader": "MK",
            "read": ["crescent", "segmental_sclerosis"],
        },
        {},
        {"section_um": 30},
        {},
    ]
    assert rows[0].stated(hide=True).keys() == {"level", "section_um", "stain", "read"}
    of_case = [table.stated_of(case) for case in "ABC"]
    assert of_case[0] == {"kidney": "native", "system": "isn_rps", "arteries": 3}
    assert of_case[1:] == [{"system": "none", "arteries": 0}, {}]
    assert table.stated_for_crops(rows[1]) == {"kidney": "native"}
    assert table.notes == [
        "cases.csv: section_um is in micrometres, and sections are 0.5 to 20 thick; check S3: 30."
    ]


def test_a_slide_without_a_case_states_what_is_of_a_case_itself(tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", "slide,kidney\nS1,transplant\nS2,\n")
    table = module("case_table").read_case_table(path)
    assert [row.stated() for row in table.rows.values()] == [{"kidney": "transplant"}, {}]


def test_biopsies_that_a_case_joins_are_told(tmp_path: Path) -> None:
    path = put(tmp_path / "c.csv", "slide,case,biopsy\nS1,A,1\nS2,A,2\nS3,B,1\n")
    table = module("case_table").read_case_table(path)
    assert table.notes == ["c.csv: the case A holds the biopsies 1, 2, which are counted together."]
    assert [table.stated_of(case) for case in "AB"] == [{"biopsy": "1; 2"}, {"biopsy": "1"}]
    assert table.stated_of("A", hide=True) == {}


@pytest.mark.parametrize("header", ["slide,case,patient", "Slide_ID;Case ID;Patient-ID"])
def test_columns_have_two_names_and_tables_their_dialects(tmp_path: Path, header: str) -> None:
    text = f"{header}\nS1,C1,P1\n".replace(",", ";" if ";" in header else ",")
    table = module("case_table").read_case_table(put(tmp_path / "cases.csv", text, "utf-16"))
    assert (table.rows["S1"].case, table.rows["S1"].patient) == ("C1", "P1")


@pytest.mark.parametrize(
    ("cell", "mpp"), [("0.25", 0.25), ("0,25", 0.25), (".5", 0.5), ("2.5e-1", 0.25), ("", None)]
)
def test_a_scale_is_read_in_every_dialect_of_numbers(
    tmp_path: Path, cell: str, mpp: float | None
) -> None:
    text = f"slide_id;patient_id;mpp\nS1;P1;{cell}\n"
    assert module("case_table").read_case_table(put(tmp_path / "c.csv", text)).rows["S1"].mpp == mpp


@pytest.mark.parametrize(
    ("slide", "text", "sentence"),
    [
        ("S1.tif", "slide,case\nS1.2,B\n", "no row for the slide S1"),
        ("S1.2.tif", "slide,case\nS1,B\n", "no row for the slide S1.2"),
        ("S1.tif", "slide,case\ns1,B\n", "no row for the slide S1: .* Did you mean 's1'"),
        ("S1.tif", "slide,case\nS1,A\nS1.tif,B\n", "S1 in the lines 2 and 3, .*(case_id)"),
        ("S1.tif", "slide,case,mpp\nS1,A,1\nS1,A,2\n", "with different values (mpp)"),
        ("S1.tif", "slide,case\nS1,\n", "names no case of S1"),
        ("S1.tif", "slide,case\nS1,A\n,B\n", "no slide_id in line 3"),
        ("S1.tif", "slide,slide_id,case\nS1,S1,A\n", "the columns slide_id and slide; keep one"),
        ("S1.tif", "slide,patient_ids\nS1,A\n", "'patient_ids'. Did you mean 'patient_id'"),
        ("S1.tif", "slide,subject\nS1,A\n", "unknown column 'subject'. Did you mean"),
        ("S1.tif", "name,case\nS1,A\n", "has no column slide_id (or slide)"),
        ("S1.tif", "slide,scanner\nS1,A\n", "names slides and nothing of them"),
        ("S1.tif", "slide,case\n", "a header and no rows"),
        ("S1.tif", "slide,case,mpp\nS1,A,fine\n", "positive number of micrometres .*'fine'"),
        ("S1.tif", "slide,case,mpp\nS1,A,-1\n", "positive number of micrometres in mpp"),
        ("S1.tif", "slide,case,mpp\nS1,A,252\n", "'252' for S1; .*nanometres would be 0.252"),
        ("S1.tif", "slide,case,mpp\nS1,A,.00025\n", "'.00025' for S1; .*would be 0.25"),
        ("S1.tif", "slide,patient\nS1,P1\nS2,p 01\n", "'P1' and 'p 01' of patient_id differ"),
        ("S1.tif", "slide,case\nS1,C1\nS2,c1\n", "'C1' and 'c1' of case_id differ"),
        ("S1.tif", "slide,case,kidney\nS1,A,nativ\n", "'nativ' for S1; .* mean 'native'"),
        ("S1.tif", "slide,case,system\nS1,A,banf\n", "isn_rps or banff in system.* mean 'banff'"),
        ("S1.tif", "slide,case,arteries\nS1,A,2.5\n", "whole number from 0 on, found '2.5'"),
        ("S1.tif", "slide,case,arteries\nS1,A,-1\n", "whole number from 0 on, found '-1'"),
        ("S1.tif", "slide,case,section_um\nS1,A,thin\n", "micrometres in section_um, found 'thin'"),
        ("S1.tif", "slide,case,section_um\nS1,A,0\n", "micrometres in section_um, found '0'"),
        (
            "S1.tif",
            "slide,case,read\nS1,A,Crescent;crescent\n",
            "'Crescent' and 'crescent' of read",
        ),
        ("S1.tif", 'slide,case,read\nS1,A,"a, b"\n', "by semicolons in read, found 'a, b' for S1"),
        (
            "S1.tif",
            "slide,patient,kidney\nS1,P,native\nS2,P,\nS3,P,transplant\n",
            "kidney of the case P is native for S1 and transplant for S3; a case has one",
        ),
        ("S1.tif", "slide,case,arteries\nS1,A,3\nS2,A,4\n", "arteries of the case A is 3 for S1"),
        ("S1.tif", "slide,kidneys\nS1,native\n", "'kidneys'. Did you mean 'kidney'"),
        (
            "S1.tif",
            "slide,case,patient\nS1,1,P1\nS2,1,P2\n",
            "the case 1 is of the patients P1 and P2",
        ),
    ],
)
def test_a_table_gives_no_slide_what_is_not_its_own(
    tmp_path: Path, slide: str, text: str, sentence: str
) -> None:
    path = put(tmp_path / "cases.csv", text)
    found = refusal(tmp_path, slide, cases=str(path))
    parts = sentence.split(".*")
    assert all(part in found for part in parts), found
    assert str(path) in found


def test_options_and_the_table_do_not_contradict_each_other(tmp_path: Path) -> None:
    cases = put(tmp_path / "c.csv", "slide,case,mpp,scene\nS1,A,0.5,2\nS2,A,,\n")
    for option, value in (("mpp", 0.25), ("scene", "1")):
        found = refusal(tmp_path, "S1.tif", "S2.tif", cases=str(cases), **{option: value})
        assert f"--{option} is {value} and {cases} has" in found
    found = refusal(tmp_path, "S1.tif", "S2.tif", cases=str(cases), mpp=0.5)
    assert "no/model" in found  # all was well until the model


def test_labels_of_slides_keep_to_the_same_rules(tmp_path: Path) -> None:
    from hf_glovlm.slides.files.slide_table import read_slide_table

    path = put(tmp_path / "slides.csv", "slide,label,mpp\nS1.2,a,252\nS1.svslide,b,0.5\n")
    with pytest.raises(GloVLMError, match=r"mpp, found '252' for S1.2; .*nanometres"):
        read_slide_table(path)
    put(path, "slide,label\nS1.2,a\nS1.svslide,b\n")
    assert read_slide_table(path).slides == ["S1.2", "S1"]


# ------------------------------------------------------------------------------------- outlines


def outlined(folder: Path, *names: str) -> Path:
    for name in names:
        write_outlines(folder / name, [outline(1, 1, 8)])
    return folder


@pytest.mark.parametrize(
    "name", ["S1.2.geojson", "S1.2.geojson.gz", "S1.2.json", "S1.2.svs.geojson", "P1/S1.2.geojson"]
)
def test_outlines_of_a_slide_bear_its_exact_name(tmp_path: Path, name: str) -> None:
    folder = outlined(tmp_path / "outlines", name, "S1.geojson", "other.geojson", ".S1.2.json")
    slides = [Path("in/S1.2.svs"), Path("in/S3.svs")]
    found = module("names").match_outlines(folder, slides)
    assert found.files == {slides[0]: folder / name}
    assert (found.without, found.unused) == ([slides[1]], ["S1.geojson", "other.geojson"])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["S1.geojson", "S1.tif.geojson"], "2 files of outlines of the slide S1 (S1.geojson, S1"),
        (["s1.geojson", "x.geojson"], "but s1.geojson, x.geojson (s1: Did you mean 'S1'?)"),
        (["notes.txt"], "of any of the 1 slides (S1): export them there"),
    ],
)
def test_outlines_that_are_of_no_slide_or_two_are_refused(
    tmp_path: Path, files: list[str], sentence: str
) -> None:
    outlined(tmp_path / "outlines", *files)
    assert sentence in refusal(tmp_path, "S1.tif", objects=str(tmp_path / "outlines"))


def test_outlines_of_no_slide_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = outlined(tmp_path / "outlines", "S1.geojson", "S2.geojson")
    refusal(tmp_path, "S1.tif", objects=str(folder))
    assert "1 files of outlines are of no slide here (S2.geojson)" in caplog.text
    caplog.clear()
    (tmp_path / "S1.tif").touch()
    refusal(tmp_path, "S1.tif", objects=str(folder), anonymise=True)
    assert "no slide here." in caplog.text


def test_outlines_in_a_linked_folder_are_found_as_slides_are(tmp_path: Path) -> None:
    from hf_glovlm.slides.files.listing import list_slides
    from hf_glovlm.slides.files.names import files_below

    (tmp_path / "disk" / ".hidden").mkdir(parents=True)
    for name in ("S1.svs", "S1.geojson", ".hidden/S2.geojson"):
        (tmp_path / "disk" / name).write_bytes(b"{}")
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "case")  # a circle
    assert [path.name for path in list_slides([tmp_path / "case"])] == ["S1.svs"]
    assert [path.name for path in files_below(tmp_path / "case", [".geojson"])] == ["S1.geojson"]
    assert files_below(tmp_path / "case", [".geojson"], skip=tmp_path / "disk") == []
