"""What stands in a document is what was given: on its line, in its cell, and never a template."""

import re
from pathlib import Path

import pytest
from jinja2 import Environment, UndefinedError

import hf_glovlm
from hf_glovlm.rendering import code, extent, metric_rows, named, render, table

TEMPLATES = Path(hf_glovlm.__file__).parent / "templates"


def test_metric_rows_show_interval_and_note() -> None:
    entry = {"value": 0.5, "ci95": [0.25, 0.75], "note": "too few groups", "undefined_resamples": 7}
    nothing = {"value": None, "ci95": None, "note": "undefined on these labels"}
    rows = metric_rows({"macro_auc": entry, "ece": nothing | {"undefined_resamples": 0}})
    assert rows == [
        ["Macro-AUC", "0.500", "[0.250, 0.750]", "too few groups; undefined in 7 resamples"],
        ["ECE", "undefined", "", "undefined on these labels"],
    ]


def test_a_missing_value_is_an_error() -> None:
    assert "- Mine." in render("plain_clip_card.md.j2", {"classes": [], "terms": ["Mine."]})
    with pytest.raises(UndefinedError, match="'terms' is undefined"):
        render("plain_clip_card.md.j2", {"classes": []})
    with pytest.raises(UndefinedError, match="'accuracy' is undefined"):  # used by a filter
        render("backbone_card.md.j2", {})


def test_a_value_is_no_template_and_stays_on_its_line() -> None:
    odd = ["{{ terms }}", "{% raw %}", "one\n\n# two", "&<>"]
    text = render("plain_clip_card.md.j2", {"classes": [["a|b\nc", "{# d #}"]], "terms": odd})
    assert text.endswith("- {{ terms }}\n- {% raw %}\n- one # two\n- &<>\n")
    assert r"| a\|b c | {# d #} |" in text


def test_a_table_holds_whatever_is_in_a_cell() -> None:
    text = table([["x|y", 1], ["two\nlines", None]], ["a|b", ""])
    assert text.splitlines() == [
        r"| a\|b |  |",
        "| --- | --- |",
        r"| x\|y | 1 |",
        "| two lines | None |",
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [(3, "`3`"), ("a", "`a`"), ("a`b``c", "``` a`b``c ```")]
)
def test_code_holds_backticks(value: object, expected: str) -> None:
    assert code(value) == expected


def test_numbers_in_words() -> None:
    assert [extent([3, 3]), extent([3, 8])] == ["3", "3 to 8"]
    assert named({"viable": 0.25, "slides": 7}) == "viable 0.250, slides 7"


def test_every_template_is_one_that_a_module_renders() -> None:
    """And each is read by the compiler: an unknown filter or a missing end is an error."""
    texts = [*TEMPLATES.parent.rglob("*.py"), *TEMPLATES.iterdir()]
    sources = "".join(path.read_text() for path in texts)
    before = r'(?:render\(|render_page\(|extends |import |"templates" / )'
    used = {*re.findall(before + r'"([\w.]+)"', sources)}
    assert used == {path.name for path in TEMPLATES.iterdir()}
    for path in TEMPLATES.iterdir():
        assert Environment(autoescape=False).parse(path.read_text()).body
