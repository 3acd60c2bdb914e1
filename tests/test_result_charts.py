"""Charts of the documented results: they are those of the tables that the pages state."""

import html
import re
from pathlib import Path

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.result_charts import draw_results, read_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_tables_of_a_page_are_read_as_they_stand() -> None:
    text = "a\n| x | y |\n| --- | ---: |\n| `a` | +0.1 [0.0, 0.2] |\n| b |  |\n"
    text += "\n| z |\n| --- |\n| 1 |\n"
    assert read_tables(text) == [
        (["x", "y"], [["`a`", "+0.1 [0.0, 0.2]"], ["b", ""]]),
        (["z"], [["1"]]),
    ]


def test_the_charts_of_the_pages_are_those_of_their_tables() -> None:
    charts = draw_results(DOCS)
    assert {f"{name}.svg" for name in charts} == {p.name for p in DOCS.glob("_static/results-*")}
    pages = "".join(
        (DOCS / f"{n}-results.md").read_text() for n in ("outline", "finder", "sclerosis")
    )
    cells = {
        float(number)
        for _, rows in read_tables(pages)
        for row in rows
        for cell in row
        for number in re.findall(r"[-+]?\d*\.?\d+", cell)
    }
    for name, chart in charts.items():
        kept = (DOCS / "_static" / f"{name}.svg").read_text()
        shown = re.search(r'aria-label="([^"]*)"', kept)
        assert shown
        assert html.unescape(shown[1]) == chart.alt, "python -m hf_glovlm.lab.result_charts docs"
        assert f"_static/{name}.svg" in pages
        numbers = [float(n) for n in re.findall(r"(?<![\w.])\d*\.?\d+(?![\w.])", chart.alt)]
        assert len(numbers) >= 6
        assert {*numbers} - {95.0} <= cells  # but for the level of the intervals


def test_a_page_without_the_table_is_refused(tmp_path: Path) -> None:
    for name in ("outline", "finder", "sclerosis"):
        (tmp_path / f"{name}-results.md").write_text("| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    with pytest.raises(GloVLMError, match=r"outline-results\.md has no table with the columns set"):
        draw_results(tmp_path)
