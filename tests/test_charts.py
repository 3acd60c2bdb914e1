"""Charts and the base of report pages: what is drawn, how it is named, and that it is safe."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import check_page

from hf_glovlm import charts
from hf_glovlm.charts import Chart, Estimate, Line, Points
from hf_glovlm.errors import GloVLMError
from hf_glovlm.rendering import THEME, render_page

HOSTILE = "<script>alert(1)</script> $\\frac{1}{2}$ & \"'{{ 7 * 7 }}\x00"
SHOTS = [1, 2, 4, 8]
MAKERS: dict[str, Callable[[str], Chart]] = {
    "lines": lambda name: charts.draw_lines(
        [Line(name, SHOTS, [0.5] * 4, [0.4] * 4, [0.9] * 4), Line("b", SHOTS, [0.5] * 4)],
        title=name, alt=name, x_label=name, y_label=name, log_x=True, x_ticks=SHOTS,
    ),
    "matrix": lambda name: charts.draw_matrix(
        [[3, 1], [np.nan, 4]], [name, "b"], [name, "b"], title=name, alt=name, row_label=name,
        column_label=name, texts=[[name, "1"], ["", "4"]], marked=[(0, 0)],
    ),
    "forest": lambda name: charts.draw_forest(
        [Estimate(name, 0.1, 0.0, 0.2, note=name), Estimate("b", 0.1)], title=name, alt=name,
        x_label=name,
    ),
    "bars": lambda name: charts.draw_bars(
        [name, "b"], [[0.1, 0.2], [0.3, 0.4]], series=[name, "y"], title=name, alt=name,
        x_label=name, low=[[0, 0], [0, 0]], high=[[1, 1], [1, 1]], emphasis=[0],
    ),
    "points": lambda name: charts.draw_points(
        [Points(name, [1.0], [2.0], [name], [1.0], [3.0]), Points("b", [3.0], [1.0])], title=name,
        alt=name, x_label=name, y_label=name, log_x=True, log_y=True,
    ),
    "histogram": lambda name: charts.draw_histogram(
        {name: [1.0, 2.0, np.nan], "b": [2.0, 3.0]}, title=name, alt=name, x_label=name
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_names_are_text_and_colours_are_the_pages(kind: str) -> None:
    chart = MAKERS[kind](HOSTILE)
    tree = ElementTree.fromstring(str(chart.__html__()).replace("<svg", '<svg xmlns="x"', 1))
    assert not [e for e in tree.iter() if e.tag.rpartition("}")[2] in ("script", "metadata")]
    shown = " ".join(tree.itertext())
    assert "<script>al" in shown
    assert "$" in shown or "\N{HORIZONTAL ELLIPSIS}" in shown  # no formula, but shortened names
    svg = tree.find("{x}svg")
    assert svg is not None
    assert svg.get("role") == "img"
    assert "alert(1)" in svg.get("aria-label", "")
    used = {*re.findall(r"var\(--(\w+)\)", chart.svg)}
    assert {"ink", "s1"} <= used <= {*THEME["light"]}
    assert "#0a0b" not in chart.svg
    ids = re.findall(r' id="([^"]+)"', chart.svg)
    assert len(ids) == len({*ids})
    assert MAKERS[kind](HOSTILE) == chart  # the same numbers, the same bytes


def test_a_chart_stands_alone_as_a_file(tmp_path: Path) -> None:
    path = MAKERS["forest"]("a").save(tmp_path / "chart.svg")
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    values = path.read_text(encoding="utf-8")
    for part in {*re.findall(r"var\(--(\w+)\)", values)}:
        assert f"--{part}:{THEME['light'][part]}" in values


def test_shades_of_a_matrix_follow_its_values() -> None:
    chart = charts.draw_matrix(
        [[0.0, 0.5, 1.0]], ["r"], ["a", "b", "c"], title="t", alt="t", row_label="", column_label=""
    )
    fills = [float(v) for v in re.findall(r"fill: var\(--s1\); opacity: ([\d.]+)", chart.svg)]
    assert fills == pytest.approx([0.275, 0.55], abs=0.006)  # none at 0
    assert all(f">{text}<" in chart.svg for text in ("0", "0.500", "1"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: charts.draw_lines([], title="t", alt="", x_label="", y_label=""),
        lambda: charts.draw_forest([], title="t", alt="", x_label=""),
        lambda: charts.draw_bars(["a"], [1, 2], title="t", alt="", x_label=""),
        lambda: charts.draw_histogram({"a": [np.nan]}, title="t", alt="", x_label=""),
        lambda: charts.draw_matrix(
            [[1]], ["a"], ["b", "c"], title="t", alt="", row_label="", column_label=""
        ),
    ],
    ids=range(5),
)  # fmt: skip
def test_nothing_to_draw_and_odd_shapes_are_refused(wrong: Callable[[], Chart]) -> None:
    with pytest.raises(GloVLMError, match="'t'"):
        wrong()


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours."""

    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", THEME)
def test_colours_are_read_on_their_paper(scheme: str) -> None:
    colours = THEME[scheme]
    mixed = "#" + "".join(
        f"{round(0.45 * int(p, 16) + 0.55 * int(s, 16)):02x}"
        for p, s in zip(
            re.findall("..", colours["paper"][1:]), re.findall("..", colours["s1"][1:]), strict=True
        )
    )
    for text, ground in itertools.product(("ink", "soft"), ("paper", "shade")):
        assert contrast(colours[text], colours[ground]) >= 4.5
    assert contrast(colours["ink"], mixed) >= 4.5  # the fullest cell of a matrix
    for k in range(8):
        assert contrast(colours[f"s{k + 1}"], colours["paper"]) >= 3


@pytest.mark.browser
def test_tables_sort_and_the_page_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2
    from pages import open_page

    from hf_glovlm import rendering

    source = """{% extends "report_page.html.j2" %}{% import "report_parts.html.j2" as parts %}
    {% block title %}t{% endblock %}{% block lead %}<h1>t</h1>{% endblock %}{% block main %}
    {{ parts.figure(chart, "Read it so.") }}
    {{ parts.grid(["name", "value"], [["b", "10"], ["a", "9"], ["c", ""]], "Values") }}
    {% endblock %}"""
    loader = jinja2.ChoiceLoader(
        [jinja2.DictLoader({"one.html.j2": source}), rendering._PAGES.loader]
    )
    monkeypatch.setattr(rendering._PAGES, "loader", loader)
    path = tmp_path / "page.html"
    path.write_text(render_page("one.html.j2", {"chart": MAKERS["forest"]("a")}), encoding="utf-8")
    check_page(path, what="base")
    with open_page(path) as view:
        order = view.page.locator("tbody th")
        view.page.get_by_role("button", name="value").focus()
        view.page.keyboard.press("Enter")
        assert order.all_inner_texts() == ["a", "b", "c"]
        view.page.keyboard.press("Enter")
        assert order.all_inner_texts() == ["b", "a", "c"]
