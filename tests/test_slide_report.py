"""What a run over slides writes: each file against what was put in."""

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_glovlm.slides import report
from hf_glovlm.slides.counting import NOT_A_SCORE, count_classes
from hf_glovlm.slides.files.annotations import read_geojson
from hf_glovlm.slides.report import (
    RESEARCH_USE,
    bar_length,
    clean_text,
    draw_heatmap,
    write_results,
    write_tile_geojson,
    write_tiles,
)

NAMES = ["lesion", "tissue"]
COORDS = np.array([[0, 0], [100, 0], [0, 100]])
P = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
CALLED = ["lesion", "tissue", "lesion"]


def test_a_row_for_every_tile(tmp_path: Path) -> None:
    columns = {"p_lesion": P[:, 0], "attention": [0.2, 0.3, 0.5]}
    write_tiles(tmp_path / "t.parquet", COORDS, 100, [1, 0.5, 0.25], columns, CALLED)
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert rows[1] == {
        "x": 100,
        "y": 0,
        "size": 100,
        "tissue_fraction": 0.5,
        "p_lesion": 0.2,
        "attention": 0.3,
        "label": "tissue",
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


@pytest.mark.parametrize(("threshold", "places"), [(0.5, [0, 2]), (0.0, [0, 1, 2]), (0.95, [])])
def test_tiles_above_the_threshold_are_squares(
    tmp_path: Path, threshold: float, places: list[int]
) -> None:
    path = tmp_path / "t.geojson"
    n = write_tile_geojson(
        path,
        COORDS,
        100,
        P[:, 0],
        threshold=threshold,
        columns={"p_lesion": P[:, 0]},
        labels=CALLED,
    )
    assert n == len(places)
    if not places:
        assert json.loads(path.read_text())["features"] == []
        return
    items = read_geojson(path)
    assert [item.bounds[:2] for item in items] == [tuple(COORDS[i]) for i in places]
    assert {item.area for item in items} == {10_000}
    assert [item.label for item in items] == [CALLED[i] for i in places]
    measured = [item.properties["measurements"]["p lesion"] for item in items]
    assert measured == pytest.approx(P[places, 0])


def test_of_too_many_squares_the_likeliest_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_SQUARES", 1)
    path = tmp_path / "t.geojson"
    n = write_tile_geojson(path, COORDS, 100, P[:, 0], threshold=0, columns={}, labels=CALLED)
    assert n == 1
    assert read_geojson(path)[0].bounds == (0, 0, 100, 100)


# ------------------------------------------------------------------------------------- heat map


def test_values_lie_where_their_tiles_are_and_average_where_they_overlap() -> None:
    coords = [[0, 0], [50, 0]]
    field = report._spread_values((20, 10), (200, 100), coords, 100, [1.0, 0.0])
    assert field.shape == (10, 20)
    assert (field[:, :5] == 1).all()
    assert (field[:, 5:10] == 0.5).all()
    assert (field[:, 10:15] == 0).all()
    assert np.isnan(field[:, 15:]).all()


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**16))
def test_every_tile_leaves_a_mark(n: int, extent: int, seed: int) -> None:
    """However small a tile is on the overview."""
    coords = np.random.default_rng(seed).integers(0, [900, 500], size=(n, 2))
    field = report._spread_values((90, 50), (900, 500), coords, extent, np.ones(n))
    marks = np.isfinite(field)
    assert marks[coords[:, 1] // 10, coords[:, 0] // 10].all()
    assert np.nanmax(field) == np.nanmin(field) == 1


@given(st.floats(1e-2, 1e6))
def test_a_scale_bar_is_round_and_as_long_as_fits(width: float) -> None:
    length = bar_length(width)
    assert length <= width / 5 * (1 + 1e-9)
    assert length * 2.5 > width / 5 * (1 - 1e-9)
    assert f"{length:e}"[0] in "125"


@pytest.mark.parametrize("mpp", [None, 0.5])
def test_the_heat_map_shows_the_hot_tile_and_leaves_no_figure(
    tmp_path: Path, mpp: float | None
) -> None:
    overview = Image.new("RGB", (400, 200), "white")
    options: dict[str, Any] = {"title": "s1: lesion", "value_name": "probability of lesion"}
    path = tmp_path / "heatmap.png"
    draw_heatmap(path, overview, (4000, 2000), [[0, 0]], 1000, [0.0], mpp=mpp, **options)
    cold = np.asarray(Image.open(path).convert("RGB")).astype(int)
    first = path.read_bytes()
    draw_heatmap(path, overview, (4000, 2000), [[0, 0]], 1000, [1.0], mpp=mpp, **options)
    hot = np.asarray(Image.open(path).convert("RGB")).astype(int)
    changed = np.argwhere(np.abs(hot - cold).sum(axis=2) > 60)
    height, width = cold.shape[:2]
    assert len(changed) > 0.02 * height * width
    assert changed[:, 1].max() < 0.5 * width  # a tile at the left
    draw_heatmap(path, overview, (4000, 2000), [[0, 0]], 1000, [0.0], mpp=mpp, **options)
    assert path.read_bytes() == first  # the same numbers, the same file
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_what_the_heat_map_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    texts: list[str] = []
    save = Figure.savefig

    def listen(figure: Any, *arguments: Any, **options: Any) -> None:
        from matplotlib.text import Text

        texts.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", listen)
    overview = Image.new("RGB", (400, 300), "white")
    draw_heatmap(
        tmp_path / "h.png", overview, (8000, 6000), COORDS, 100, P[:, 0], title="s1: lesion",
        value_name="probability of lesion", mpp=0.25, opacity=0.4,
    )  # fmt: skip
    assert {RESEARCH_USE, "s1: lesion", "200 µm"} <= set(texts)
    assert "probability of lesion; colours at 40% opacity" in texts


# -------------------------------------------------------------------------------------- results


def results() -> dict[str, Any]:
    counts = count_classes([0, 1, 1, 1], NAMES, confusion=[[90, 10], [20, 80]])["all"]
    done = {
        "slide": "s1",
        "case": "c1",
        "status": "done",
        "label": "lesion",
        "probabilities": {"lesion": 0.75, "tissue": 0.25},
        "pooling": "top_10",
        "n_tiles": 12,
        "counts": counts,
        "flags": ["the file states no scale"],
    }
    failed = {
        "slide": "s2",
        "case": None,
        "status": "failed",
        "error": "s2 is broken.",
        "flags": [],
        "counts": None,
    }
    return {
        "class_names": NAMES,
        "slide_class_names": NAMES,
        "settings": {"tile_size": 224, "tile_mpp": 0.5, "overlap": 0.25},
        "pooling": "the mean of the 10 highest tiles of each class",
        "slides": [done, failed],
        "cases": [{"case": "c1", "slides": ["s1"], "counts": counts, "flags": []}],
        "failed": 1,
    }


def test_tables_and_page_say_the_same(tmp_path: Path) -> None:
    content = results()
    write_results(tmp_path, content)
    assert json.loads((tmp_path / "results.json").read_text()) == content
    rows = pq.read_table(tmp_path / "summary.parquet").to_pylist()
    with (tmp_path / "summary.csv").open(newline="") as stream:
        text = list(csv.DictReader(stream))
    assert [(row["level"], row["name"], row["status"]) for row in rows] == [
        ("slide", "s1", "done"),
        ("slide", "s2", "failed"),
        ("case", "c1", "done"),
    ]
    assert [row["name"] for row in text] == ["s1", "s2", "c1"]
    entry = content["slides"][0]["counts"]["classes"]["lesion"]
    assert (rows[0]["count_lesion"], rows[0]["percent_lesion"]) == (1, 25)
    assert [rows[0]["low_lesion"], rows[0]["high_lesion"]] == entry["ci95"]
    assert float(text[2]["corrected_lesion"]) == entry["corrected"]["percent"]
    assert rows[1]["count_lesion"] is None
    assert (rows[1]["error"], text[1]["error"]) == ("s2 is broken.", "s2 is broken.")
    assert (text[0]["error"], text[1]["notes"]) == ("", "")

    page = (tmp_path / "README.md").read_text()
    assert RESEARCH_USE in page
    assert NOT_A_SCORE in page
    low, high = entry["ci95"]
    assert f"1 (25.0%, {low:.1f} to {high:.1f}); corrected" in page
    assert "| s1 | lesion | 0.750 | 0.250 | top_10 | 12 |" in page
    assert "- s2: s2 is broken." in page
    assert "Tiles of 224 pixels at 0.5 micrometres per pixel, overlap 0.25; " in page
    assert "synthetic" not in page
    for entry in (*content["slides"], *content["cases"]):
        entry["flags"] = ["The scale is not known."]
    assert "- s1, s2, case c1: The scale is not known.\n" in report.render_summary(content)
    assert "synthetic images" in report.render_summary(content | {"synthetic": True})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/secret/S21-1.svs is broken", "slide_001 is broken"),
        ("/data/secret/S21-1.geojson, feature 2: empty", "slide_001.geojson, feature 2: empty"),
        ("S21-1.svs and S21-1", "slide_001 and slide_001"),
        ("XS21-10 is another", "XS21-10 is another"),
    ],
)
def test_a_place_and_a_name_leave_the_text(text: str, expected: str) -> None:
    assert clean_text(text, Path("/data/secret/S21-1.svs"), "slide_001") == expected


# What is said of slides, without a name.
OWN_WORDS = (
    "the slide holds 25% tissue above a threshold of 0.06",
    "Tiles of 224 pixels at 0.5 micrometres per pixel, overlap 0.25.",
    "the scale of the tiles is unknown: level 0 was cut as it is",
    "A part of 12 tiles was left out as pen; the tissue is 1.5 times as large.",
)
# How a sentence may name a slide: {path}, {file} and {stem} are taken from it.
MENTIONS = (
    "{path} is damaged: copy or export it again.",
    "{file} holds no picture of a slide.",
    "There is no slide {path}: 25% tissue, a scale of 0.5.",
    "'{stem}' was encoded by another model.",
    "{stem}: the features have width 17.",
    "expected {stem}.geojson beside it",
)
NAMES_OF_SLIDES = (
    "25", "a", "0", "tissue", "Tiles", "A", "of", "the", "1.5", "224", "level 0", "slide", "is",
    "Mueller", "mueller", "S21-1", "483905", "PAS_$1_$2", "Anna Mueller", "(x)", "25%", "H.E",
    "\u80be",
)  # fmt: skip


@pytest.mark.parametrize("stem", NAMES_OF_SLIDES)
def test_an_anonymised_text_names_no_slide_and_keeps_its_own_words(stem: str) -> None:
    slide = Path("/data/of the ward/tissue") / f"{stem}.svs"
    for words in OWN_WORDS:
        if stem not in ("level 0", "25%"):  # of letters and digits: hidden rather than kept
            assert clean_text(words, slide, "slide_001") == words
        for mention in MENTIONS:
            given = mention.format(path=slide, file=slide.name, stem=stem)
            cleaned = clean_text(f"{given} {words}", slide, "slide_001")
            nameless = mention.format(path="slide_001", file="slide_001", stem="slide_001")
            assert cleaned.startswith(nameless.split("25")[0])
            assert not [part for part in (slide.name, str(slide.parent)) if part in cleaned]


@pytest.mark.parametrize("stem", ["S21-1", "483905", "TCGA-A1-B2", "PAS_2", "9x"])
def test_a_distinctive_name_is_hidden_wherever_it_stands(stem: str) -> None:
    for text in (f"see {stem} and ({stem}), {stem}.", f"{stem} is broken", f"of {stem}_2 {stem}"):
        cleaned = clean_text(text, Path(f"slides/{stem}.ndpi"), "slide_001")
        assert re.search(rf"(?<!\w){re.escape(stem)}(?!\w)", cleaned) is None


@pytest.mark.parametrize("source", ["25.svs", "a/25.svs", "/25.svs", "./a.tif"])
def test_a_relative_path_is_not_found_inside_words(source: str) -> None:
    text = "S25.svs, x-a.tif and data/area/2 are other files: 25% of a tissue"
    assert clean_text(text, Path(source), "slide_001") == text


@pytest.mark.parametrize(
    "name",
    [
        "PAS_$1_$2", "$", "$$", "a^b_{c", "\\frac{", "%s {x}", "x" * 300,
        "\u80be\u81d3 \u0643\u0644\u064a\u0629", "two\nlines\t", "\udcff", "$\\alpha$",
    ],
    ids=lambda name: ascii(name)[:20],
)  # fmt: skip
def test_a_figure_takes_any_name(tmp_path: Path, name: str) -> None:
    overview = Image.new("RGB", (60, 40), "white")
    path = tmp_path / "heatmap.png"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_heatmap(
                path, overview, (600, 400), COORDS, 100, P[:, 0], title=f"{name}: {name}",
                value_name=f"probability of {name}", mpp=0.25,
            )  # fmt: skip
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    with Image.open(path) as image:
        assert image.width > 500
