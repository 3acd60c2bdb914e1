"""The README and the pages for users: tables, messages and numbers that the code has, too."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hf_glovlm
from hf_glovlm.cli.reference import TABLES, fill_page
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab import picture
from hf_glovlm.metrics import compute_metrics
from hf_glovlm.rendering import THEME

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"
# Of the shell, and of Typer, whose words we only add to.
NOT_OURS = {"command not found: glovlm"}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_a_page_is_that_of_the_code(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    made = TABLES[name]()
    assert fill_page(text, made) == text, "write it again: make docs"
    assert made in text
    listed = {"backbones.md": hf_glovlm.BACKBONES, "choosing-a-method.md": hf_glovlm.METHODS}[name]
    assert made.count("\n") == len(listed) + 1


def test_the_pages_repeat_measured_numbers_as_the_results_have_them() -> None:
    """A row of a shorter table is part of the row of the same name of the results."""
    full = [re.sub(r"[*`]", "", line) for line in text_of("docs/results.md").splitlines()]
    shown = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for page in ("docs/choosing-a-method.md", "README.md")
        for line in text_of(page).splitlines()
        if line.startswith("|") and re.search(r"\| \.\d|\| \d[\d,]+ \|", line)
    ]
    assert len(shown) > 10
    for first, *cells in shown:
        for name in first.split("`, `") if "`, `" in first else [first]:
            starts = (f"| {name} |", f"| {name} (") if name else ("| |",)
            rows = [row for row in full if row.startswith(starts)]
            assert any(all(f"| {cell} |" in row for cell in cells) for row in rows), (name, cells)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- messages


@cache
def literals() -> str:
    """Every text in the package's code, one a line; what a program puts into it is a gap."""

    def texts() -> Iterator[str]:
        for path in sorted((ROOT / "hf_glovlm").rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value

    return "\n".join(" ".join(text.split()) for text in texts() if len(text) < 900)


def messages() -> list[str]:
    blocks = re.findall(r"```text\n(.*?)\n```", text_of("docs/troubleshooting.md"), re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("message", messages())
def test_the_code_writes_each_message_that_is_explained(message: str) -> None:
    if message in NOT_OURS:
        return
    parts = [re.escape(part) for part in re.split(r"'?\.\.\.'?", message) if part]
    assert re.search("[^\n]*?".join(parts), literals()), "no text in the code has these words"


# --------------------------------------------------------------------------------------- README


def test_the_readme_is_short_and_names_a_backbone() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 220
    assert "--backbone vinid/plip" in text
    assert "badge" not in text.lower()


def drawn() -> str:
    """The picture of a biopsy whose calls are made by hand, drawn without a model."""
    biopsy = [picture.render_glomerulus("viable", seed=i, size=16) for i in range(4)]
    counts = {
        "a&b": {"count": 3, "percent": 75.0, "ci95": [30.1, 95.4]},
        "other": {"count": 1, "percent": 25.0, "ci95": [4.6, 69.9]},
    }
    probabilities = [[0.9, 0.1], [0.55, 0.45], [0.8, 0.2], [0.1, 0.9]]
    calls = ["a&b", "a&b", "a&b", "other"]
    values = picture.values_of(biopsy, calls, probabilities, list(counts), counts)
    return picture.render_page("road.svg.j2", values)


@pytest.mark.parametrize("made", [False, True])
def test_the_picture_is_synthetic_in_words_light_and_dark(made: bool) -> None:
    text = drawn() if made else text_of("docs/pictures/road.svg")
    assert len(text) < 200_000
    root = ElementTree.fromstring(text)
    assert "synthetic" in str(root.findtext(f"{SVG}title"))
    words = " ".join(node.text or "" for node in root.iter(f"{SVG}text"))
    assert "no result" in words
    assert "Not for diagnosis" in words
    assert f"--paper:{THEME['dark']['paper']}" in text.partition("prefers-color-scheme: dark")[2]
    assert not re.search(r"(href|src)=\"http", text)
    if made:
        assert "a&b" in words
        assert "3 of 4" in words
        assert len(root.findall(f"{SVG}circle[@stroke-dasharray]")) == 1


# --------------------------------------------------------------------------------------- adding


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text_of("docs/adding.md"), re.DOTALL)


def test_the_examples_of_what_can_be_added_work(tmp_path: Path) -> None:
    """Each is executed where the page says that it would stand."""
    from hf_glovlm.backbones import table
    from hf_glovlm.data.catalog import read_entry
    from hf_glovlm.methods import METHODS
    from hf_glovlm.metrics import METRICS
    from hf_glovlm.metrics import table as metrics_table

    backbone, method, metric, setting = examples()
    row = eval(backbone, dict(vars(table)))
    assert (row.page, row.restrictions) == (
        "https://huggingface.co/my-group/my-clip",
        ["non-commercial"],
    )
    try:
        exec(method, {"__name__": "hf_glovlm.methods.added", "__package__": "hf_glovlm.methods"})
        exec(metric, dict(vars(metrics_table)))
        rng = np.random.default_rng(0)
        labels = np.arange(12) % 3
        features = np.eye(3)[labels] + rng.normal(0, 0.1, (12, 3))
        fitted = hf_glovlm.adapt_features("median_prototype", features, labels)
        assert fitted.predict_logits(np.eye(3)).argmax(1).tolist() == [0, 1, 2]
        with pytest.raises(
            GloVLMError, match="'text_weight' of method 'median_prototype' must be 0 or more"
        ):
            METHODS["median_prototype"].configure({"text_weight": -1})
        probabilities = np.array([[0.9, 0.1], [0.4, 0.6]])
        measured = compute_metrics(np.array([0, 0]), probabilities, groups=["a", "b"])
        assert measured["metrics"]["mean_confidence"]["value"] == pytest.approx(0.75)
    finally:
        METHODS.pop("median_prototype", None)
        METRICS.pop("mean_confidence", None)
    scope: dict[str, Any] = {"__name__": "hf_glovlm.runs.added", "__package__": "hf_glovlm.runs"}
    exec(setting, scope)
    assert scope["__annotations__"] == {"jitter": float}

    text = re.findall(r"```yaml\n(.*?)\n```", text_of("docs/adding.md"), re.DOTALL)[0]
    (tmp_path / "my_glomeruli.yaml").write_text(text)
    assert [one.name for one in read_entry(tmp_path / "my_glomeruli.yaml").classes] == [
        "sclerosed",
        "viable",
    ]
