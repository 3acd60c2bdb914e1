"""The biopsy's sheet as a page and as a folder: what it shows stands in its facts, and no more."""

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sheet_made
from doc_pages import DOCS, commands
from page_text import HOSTILE, Page, values
from PIL import Image
from qupath_made import CLASSES, outlines, write_results

import hf_glovlm.slides.sheet as sheets
from hf_glovlm.errors import GloVLMError, WriteError
from hf_glovlm.files import write_json
from hf_glovlm.rendering import percentage
from hf_glovlm.reports.biopsy import Picture, render_index, render_sheet
from hf_glovlm.slides.biopsy import Biopsies
from hf_glovlm.slides.files.annotations import SlideObject
from hf_glovlm.slides.files.crop_image import crop_square, read_crop
from hf_glovlm.slides.files.region_images import open_picture
from hf_glovlm.slides.numbering import Numbers

RESEARCH = "Research use only, not for diagnosis"
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 33)), np.sin(np.linspace(0, 2 * np.pi, 33))], 1)


def page(sheet: dict[str, Any], pictures: Any = None) -> Page:
    sheet.setdefault("pictures", {"sentences": []})
    shown = [None] * len(sheet["glomeruli"]) if pictures is None else pictures
    return Page(render_sheet(sheet, shown))


# ----------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_name_holds_is_text(hostile: str) -> None:
    words = ("S1", "B7", "AB", "PAS", "crescent", "global sclerosis", "oxford", "DRAFT, unreviewed")

    def spoil(part: Any, name: str) -> Any:
        if isinstance(part, dict):
            return {name if k in words else k: spoil(value, name) for k, value in part.items()}
        if isinstance(part, list):
            return [spoil(value, name) for value in part]
        return name if part in words else part

    plain, spoilt = (page(spoil(sheet_made.sheet(5), name)) for name in ("plain", hostile))
    assert spoilt.tags == plain.tags
    assert [name for name, _ in spoilt.attributes] == [name for name, _ in plain.attributes]
    shown = re.sub(r"\s+", " ", re.sub("[\x00-\x1f\ud800]", "\ufffd", hostile))
    assert spoilt.text.count(shown) >= 12
    index = {"sheets": [], "failed": [{"case": hostile, "why": hostile}], "earlier": []}
    index |= {"synthetic": False, "notes": [hostile]}
    index["sheets"] = [{
        "case": hostile, "folder": "case 1%", "status": hostile, "n": 1, "confirmed": 0,
        "sclerotic": None, "adequacy": None, "notes": [hostile],
    }]  # fmt: skip
    listed = Page(render_index(index))
    assert set(listed.tags) <= {*plain.tags, "a"}
    assert listed.text.count(shown) == 6
    assert ("href", "case%201%25/sheet.html") in listed.attributes


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    sheet = sheet_made.sheet(6)
    shown = page(sheet, [Picture([0.5 + 0.4 * CIRCLE], b"\xff\xd8")] * 6)
    addresses = [v for name, v in shown.attributes if name in ("src", "href", "srcset", "action")]
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert base64.b64decode(addresses[-1].partition(",")[2]) == b"\xff\xd8"
    assert not {"script", "link", "iframe", "form", "object"} & {*shown.tags}
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    policy = next(v for name, v in shown.attributes if v.startswith("default-src"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    targets = {v for name, v in shown.attributes if name == "id"}
    assert {a[1:] for a in addresses if a.startswith("#")} <= targets


@pytest.mark.parametrize("system", ["oxford", "isn_rps", "banff", "none", None])
def test_every_number_and_name_of_the_page_stands_in_the_facts(system: str | None) -> None:
    sheet = sheet_made.sheet(23)
    sheet["stated"]["system"] = system
    sheet["glomeruli"][3] |= {"finder_score": 0.815, "glomerulus": "g77", "set": ["a1", "b2"]}
    known = {"95", "1"}  # of the interval, and in the definition of doubt
    for value in values(sheet):
        if isinstance(value, str):
            known |= {*re.findall(r"\d+(?:\.\d+)?", value)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            known |= {str(value), f"{value:.2f}", f"{value:g}", percentage(value).strip("<>%")}
    shown = page(sheet)
    references = set(map(str, range(1, 1 + shown.text.count("interval holds") + 20)))
    assert {*re.findall(r"\d+(?:\.\d+)?", shown.text)} <= known | references
    assert "None" not in shown.text
    for text in ("E1", "S1 ", "C1", "diagnosis of"):  # no score, and no section's name is missing
        assert (text in shown.text) == (text == "S1 ")


def test_status_counts_and_rules_stand_before_the_lesions() -> None:
    sheet = sheet_made.sheet(20)
    text = page(sheet).text
    head = text[: text.index("Lesions")]
    assert head.index("DRAFT, unreviewed") < head.index(RESEARCH) < head.index("Kidney")
    for words in (
        "No reader is named (--signed-by).",
        "Adequacy: no verdict.",
        "at least 8 glomeruli",
        "rule not checked against a source",
        sheet["chance_to_miss"]["sentence"],
    ):
        assert words in head
    assert 'class="status"' in render_sheet(sheet, [None] * 20)
    sheet["status"] = {"draft": False, "signed_by": "AB", "words": "Read by AB, 2026-11-30",
                       "reasons": []}  # fmt: skip
    html = render_sheet(sheet, [None] * 20)
    assert "DRAFT" not in html
    assert 'class="status signed"' in html


def test_lesions_keep_their_order_denominators_and_doubts() -> None:
    sheet = sheet_made.sheet(20)
    sheet["lesions"][1]["shares"] = [
        {"of": sheet_made.OTHERS, "count": 0, "denominator": 0, "percent": None, "ci95": None,
         "holds": []},
        {"of": "glomeruli, read or not", "count": 3, "denominator": 18, "percent": 100 * 3 / 18,
         "ci95": None, "holds": [], "least": True},
    ]  # fmt: skip
    text = page(sheet).text
    table = text[text.index("not read") : text.index("Not shown")]
    assert [*re.findall(r"\d+ of \d+", table)] == [
        "4 of 20", "0 of 0", "3 of 18", "2 of 20", "2 of 16",
    ]  # fmt: skip
    assert "at least 17%" in table
    assert table.index("global sclerosis") < table.index("segmental sclerosis")
    assert "unverified" in table
    assert "candidate for Oxford S, to be confirmed" in table
    assert "\N{EN DASH}" in table
    notes = text[text.index(" Notes ") : text.index("Every glomerulus")]
    assert notes.count("The 95% interval holds: counting, and nothing else.") == 1
    assert "Not checked against the source." in notes
    assert notes.count("Arkana 2017") == 2


def test_glomeruli_keep_the_order_of_the_facts_and_say_what_to_doubt() -> None:
    sheet = sheet_made.sheet(20)
    sheet["glomeruli"][0] |= {
        "unlike_support": True, "set": ["crescent", "viable glomerulus"], "class": None,
        "states": {"crescent": "not_assessable", "wire loop": "present"}, "notes": ["Look again."],
    }  # fmt: skip
    shown = page(sheet, [Picture([0.5 + 0.4 * CIRCLE]), *[None] * 19])
    contact = shown.text[shown.text.index("Every glomerulus") :]
    numbers = re.findall(r"(\d+) (?:no class|global|segmental|crescent|viable)", contact)
    assert numbers == [str(n) for n in range(1, 21)]
    first = contact[contact.index("1 no class") : contact.index("2 segmental")]
    for words in ("p 0.42, doubt 0.58", "may be: crescent , viable glomerulus", "unlike what",
                  "also present: wire loop", "Look again."):  # fmt: skip
        assert words in first
    assert contact.count("no outline") == 19
    assert contact.index("Provisional") < contact.index("Confirmed by a reader")
    assert "by AB" in contact[contact.index("Confirmed by a reader") :]


def test_a_biopsy_without_glomeruli_has_a_page() -> None:
    sheet = sheet_made.sheet(0, lesions=[], not_shown=[])
    text = page(sheet).text
    assert "There is no glomerulus to show." in text
    assert "No lesion is shown." in text


def test_an_outline_of_many_points_stays_small_and_where_it_is() -> None:
    turn = np.linspace(0, 2 * np.pi, 200_001)
    ring = 0.5 + 0.4 * np.stack([np.cos(turn), np.sin(turn)], 1)
    picture = Picture([ring, 0.5 + 0.1 * CIRCLE])
    assert len(picture.path) < 30_000
    outer, hole = picture.path.strip("Z").split("ZM")
    points = np.array([p.split() for p in outer[1:].split("L")], float) / 600
    assert np.hypot(*(points - 0.5).T) == pytest.approx(0.4, abs=2e-3)
    assert len(hole.split("L")) == 33


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0%"), (0.2, "<1%"), (12.5, "13%"), (99.4, "99%"), (99.6, ">99%"),
     (100, "100%")],
)  # fmt: skip
def test_a_percentage_is_rounded_half_up_and_never_to_none_or_all(value: Any, shown: str) -> None:
    assert percentage(value) == shown


# --------------------------------------------------------------------------------- the folder


@pytest.fixture
def biopsy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Results of a slide with three outlines, its file, and facts that `describe` is given."""
    down, across = np.mgrid[:300, :400]
    pixels = np.stack([across * 255 / 400, down * 255 / 300, (across + down) % 64], axis=2)
    (tmp_path / "slides").mkdir()
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "slides" / "S1.png")
    entry = {"slide": "S1", "status": "done", "size": [400, 300]}
    results = {"kind": "slides", "slides": [entry], "settings": {"margin": 1.5}}
    write_json(tmp_path / "O" / "results.json", results)

    def describe(**named: dict[str, Any] | str) -> Path:
        rings = [CIRCLE * (60, 40) + middle for middle in ((90, 90), (200, 150), (370, 250))]
        objects = [SlideObject(f"o{i + 1}", {}, ((ring,),)) for i, ring in enumerate(rings)]
        facts: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for case, sheet in named.items():
            if isinstance(sheet, str):
                failed[case] = sheet
            else:
                facts[case] = sheet | {"case": case}
        known = Biopsies(facts, {"S1": objects}, failed, ["The table has a note."])
        monkeypatch.setattr(sheets, "describe_biopsies", lambda *given, **options: known)
        return tmp_path

    return describe


def write(folder: Path, *images: Path, **options: Any) -> dict[str, Any]:
    return sheets.write_sheets(
        folder / "cases.csv", [folder / "O"], folder / "S", images=images, **options
    )


def listed(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def pictures_of(path: Path) -> list[Image.Image]:
    found_in = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', path.read_text("utf-8"))
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found_in]


def test_a_sheet_shows_the_crop_that_was_classified(biopsy: Callable[..., Path]) -> None:
    folder = biopsy(B7=sheet_made.sheet(3))
    done = write(folder, folder / "slides")
    assert listed(folder / "S") == [
        ".lock", "B7/glomeruli.csv", "B7/lesions.csv", "B7/sheet.html", "B7/sheet.json",
        "index.html", "sheets.json",
    ]  # fmt: skip
    sheet = json.loads((folder / "S/B7/sheet.json").read_text("utf-8"))
    shown = pictures_of(folder / "S/B7/sheet.html")
    assert len(shown) == 3
    order = [int(one["object"][1:]) - 1 for one in sheet["glomeruli"]]
    middles = [((90, 90), (200, 150), (370, 250))[i] for i in order]
    with open_picture(folder / "slides/S1.png") as slide:
        for picture, (x, y) in zip(shown, middles, strict=True):
            square = crop_square((x - 60, y - 40, x + 60, y + 40), 1.5)
            expected = read_crop(slide, square, None)
            assert picture.size == expected.size == (180, 180)
            apart = np.abs(np.asarray(picture, float) - np.asarray(expected, float)).mean()
            assert apart < 8  # as JPEG; that of another glomerulus is 35 away or more
    assert done["sheets"][0] | {"notes": []} == {
        "case": "B7", "folder": "B7", "status": "DRAFT, unreviewed", "n": 3, "confirmed": 0,
        "sclerotic": {"count": 0, "denominator": 3}, "adequacy": None, "notes": [],
    }  # fmt: skip
    again = {name: (folder / "S" / name).read_bytes() for name in listed(folder / "S")}
    write(folder, folder / "slides")
    del again[".lock"]
    assert again == {name: (folder / "S" / name).read_bytes() for name in again}


def test_tables_hold_what_the_sheet_holds(biopsy: Callable[..., Path]) -> None:
    sheet = sheet_made.sheet(3)
    folder = biopsy(B7=sheet)
    write(folder)
    with (folder / "S/B7/lesions.csv").open(newline="") as stream:
        lesions = list(csv.DictReader(stream))
    expected = [(row, share) for row in sheet["lesions"] for share in row["shares"]]
    assert len(lesions) == len(expected) == 4
    for line, (row, share) in zip(lesions, expected, strict=True):
        assert line["class"] == row["class"]
        assert (line["count"], line["of"]) == (str(share["count"]), share["of"])
        assert float(line["percent"]) == share["percent"]
        assert [float(line["low"]), float(line["high"])] == share["ci95"]
        assert line["not_assessable"] == str(row["counts"]["not_assessable"])
        assert line["at_least"] == "no"
        assert line["verified"] == ("yes" if row["verified"] else "no")
    with (folder / "S/B7/glomeruli.csv").open(newline="") as stream:
        glomeruli = list(csv.DictReader(stream))
    assert [line["object"] for line in glomeruli] == [one["object"] for one in sheet["glomeruli"]]
    assert {line["state_segmental sclerosis"] for line in glomeruli} == {"absent"}


@pytest.mark.parametrize("what", ["none", "missing", "size", "damaged", "other"])
def test_where_a_slide_cannot_be_shown_the_page_says_so(
    biopsy: Callable[..., Path], what: str
) -> None:
    folder = biopsy(B7=sheet_made.sheet(3))
    path, images = folder / "slides/S1.png", [folder / "slides"]
    if what == "none":
        images = []
    elif what == "missing":
        path.rename(folder / "slides/S2.png")
    elif what == "size":
        Image.new("RGB", (400, 301)).save(path)
    elif what == "damaged":
        path.write_bytes(path.read_bytes()[:500])
    write(folder, *images)
    html = (folder / "S/B7/sheet.html").read_text("utf-8")
    text = Page(html).text
    expected = {
        "none": "No slides were given (--images), so the outlines are drawn alone.",
        "missing": "S1: the slide was not given (--images), so its outlines are drawn alone.",
        "size": "S1: the file given has 400 x 301 pixels and the slide that was classified 400 x 3",
        "damaged": "S1: the slide cannot be read (",
        "other": "S1: the file given is not the one that was classified, only of the same size",
    }
    assert expected[what] in text
    assert len(pictures_of(folder / "S/B7/sheet.html")) == (3 if what == "other" else 0)
    assert html.count('<path class="line"') == 3
    assert str(folder) not in html + (folder / "S/sheets.json").read_text("utf-8")


def test_numbered_slides_are_known_by_their_content_alone(biopsy: Callable[..., Path]) -> None:
    sheet = sheet_made.sheet(3)
    for one in sheet["glomeruli"]:
        one["slide"] = "slide_002"
    folder = biopsy(case_001=sheet)
    known: Any = sheets.describe_biopsies
    known().objects["slide_002"] = known().objects.pop("S1")
    own, other = folder / "slides/S1.png", folder / "slides/slide_002.png"
    Image.new("RGB", (400, 300)).save(other)  # called like the number of another one
    numbers = Numbers(least=2)
    assert numbers.of_slide(own) == "slide_002"
    numbers.write(folder / "O")
    results = json.loads((folder / "O/results.json").read_text())
    results["slides"][0]["slide"] = "slide_002"
    write_json(folder / "O/results.json", results)
    write(folder, folder / "slides")
    assert np.asarray(pictures_of(folder / "S/case_001/sheet.html")[0]).std() > 20
    assert "S1.png" not in "".join(p.read_text("utf-8") for p in (folder / "S").rglob("*.*"))


def test_sheets_of_other_cases_stay_and_are_named(biopsy: Callable[..., Path]) -> None:
    folder = biopsy(A=sheet_made.sheet(3), B=sheet_made.sheet(3))
    write(folder)
    before = (folder / "S/A/sheet.html").read_bytes()
    biopsy(B="Two slides are of one level.", C=sheet_made.sheet(3))
    done = write(folder)
    assert [one["case"] for one in done["sheets"]] == ["C"]
    assert done["failed"] == [{"case": "B", "why": "Two slides are of one level."}]
    assert {one["case"]: one["why"] for one in done["earlier"]} == {
        "A": "not among these cases any more", "B": "this time it could not be described",
    }  # fmt: skip
    assert (folder / "S/A/sheet.html").read_bytes() == before
    index = Page((folder / "S/index.html").read_text("utf-8"))
    assert [v for name, v in index.attributes if name == "href"] == [
        f"{case}/sheet.html" for case in "CAB"
    ]
    biopsy(A=sheet_made.sheet(3))
    done = write(folder)
    assert [one["case"] for one in done["earlier"]] == ["C", "B"]


def test_cases_whose_names_name_no_folder_have_numbers(biopsy: Callable[..., Path]) -> None:
    names = ["P 1 / 2", "case_001", "..", "b7", "B7", "sheets.json", "x" * 150, "unfinished", "con"]
    folder = biopsy(**{name: sheet_made.sheet(3) for name in names})
    done = write(folder)
    folders = {one["case"]: one["folder"] for one in done["sheets"]}
    assert folders["case_001"] == "case_001"
    assert folders["b7"] == "b7"
    assert len({name.casefold() for name in folders.values()}) == len(names)
    others = [name for name in names if name not in ("case_001", "b7")]
    assert [folders[name] for name in others] == [f"case_{i:03d}" for i in range(2, 9)]
    for case, name in folders.items():
        assert json.loads((folder / f"S/{name}/sheet.json").read_text("utf-8"))["case"] == case
    biopsy(**{name: sheet_made.sheet(3) for name in reversed(names)})
    assert {one["case"]: one["folder"] for one in write(folder)["sheets"]} == folders


def test_a_sheet_is_written_whole_or_not_at_all(
    biopsy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = biopsy(A=sheet_made.sheet(3))
    write(folder)
    before = {name: (folder / "S" / name).read_bytes() for name in listed(folder / "S")}
    biopsy(A=sheet_made.sheet(2), C=sheet_made.sheet(3))

    def full(path: Path, *given: Any) -> None:
        raise WriteError(f"'{path}' cannot be written (no space): free space there.")

    with monkeypatch.context() as patch:
        patch.setattr(sheets, "write_csv", full)
        with pytest.raises(WriteError):
            write(folder)
    assert {name: (folder / "S" / name).read_bytes() for name in listed(folder / "S")} == before


def test_a_folder_of_others_is_left_alone(biopsy: Callable[..., Path]) -> None:
    folder = biopsy(A=sheet_made.sheet(3))
    (folder / "S").mkdir()
    (folder / "S/mine.txt").write_text("mine")
    with pytest.raises(GloVLMError, match="that are no sheets"):
        write(folder)
    with pytest.raises(GloVLMError, match="lies in"):
        sheets.write_sheets(folder / "cases.csv", [folder / "O"], folder / "O" / "S")
    assert not (folder / "O/S").exists()
    with pytest.raises(GloVLMError, match="There is no slide"):
        sheets.write_sheets(
            folder / "c.csv", [folder / "O"], folder / "T", images=[folder / "S9.svs"]
        )
    assert not (folder / "T").exists()
    Image.new("RGB", (400, 300)).save(folder / "S1.png")
    with pytest.raises(GloVLMError, match="both pictures of S1"):
        sheets.write_sheets(
            folder / "c.csv", [folder / "O"], folder / "T",
            images=[folder / "slides", folder / "S1.png"],
        )  # fmt: skip


def test_the_command_prints_a_line_a_case_and_fails_where_one_failed(
    biopsy: Callable[..., Path], glovlm: Callable[..., Any]
) -> None:
    folder = biopsy(A=sheet_made.sheet(20), B="It has no slide.")
    given = ("sheet", folder / "cases.csv", "--slides", folder / "O", "--output-dir", folder / "S")
    done = glovlm(*given)
    assert done.code == 1
    assert re.search(r"A +DRAFT, unreviewed +20 \(4\) +4 of 20 +-", done.out)
    assert "Failed: 1 case case reason B It has no slide." in done.printed
    assert RESEARCH in done.out
    assert "The table has a note." in done.err
    assert json.loads(glovlm(*given, "--json").out)["failed"][0]["case"] == "B"


# ---------------------------------------------------------------------------------- the commands


def test_the_page_of_the_documentation_leads_from_results_to_a_signed_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glovlm: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = {"S1": outlines(1, 6)}
    write_results(tmp_path / "results", drawn, case="B1")
    results = json.loads((tmp_path / "results/results.json").read_text("utf-8"))
    for entry in results["slides"]:
        entry["size"] = [3700, 2700]
    write_json(tmp_path / "results/results.json", results)
    for folder in ("new", "corrected"):
        (tmp_path / folder).mkdir()
    for name in drawn:
        Image.new("RGB", (3700, 2700), "pink").save(tmp_path / f"new/{name}.png")
        shutil.copy(f"results/slides/{name}/objects.geojson", f"corrected/{name}.geojson")
    table = "slide_id,case_id,kidney,system\nS1,B1,native,oxford\n"
    (tmp_path / "cases.csv").write_text(table)
    by_class = {name: {"found": 9, "of": 10} for name in CLASSES}
    left_out = {"by_class": by_class, "groups": 4, "group": "patient"}
    write_json(tmp_path / "finder/finder.json", {"kind": "finder", "left_out": left_out})
    pages = []
    for command in commands(DOCS / "sheet.md"):
        done = glovlm(*command)
        assert done.code == 0, (command, done.err)
        if command[0] == "sheet":
            pages.append((tmp_path / "sheets/B1/sheet.html").read_text("utf-8"))
            sheet = json.loads((tmp_path / "sheets/B1/sheet.json").read_text("utf-8"))
            assert len(pictures_of(tmp_path / "sheets/B1/sheet.html")) == (
                sheet["counts"]["n"] if "--images" in command else 0
            )
    draft, signed, found = pages
    assert "DRAFT, unreviewed" in draft
    assert "DRAFT, unreviewed" in found
    assert "DRAFT" not in signed
    assert "Read by AB" in signed
