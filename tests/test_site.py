"""The site of the documentation: built once, with its notebooks, and read without any network."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from doc_pages import DOCS, ROOT
from test_architecture import FLOORS

import hf_glovlm

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page of the site loads, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.pictures_without_text: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if address := given.get(LOADED.get(tag, "")):
            self.loaded.append(address)
        if tag == "img" and not given.get("alt"):
            self.pictures_without_text.append(str(given.get("src")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error and every notebook executed."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    pytest.importorskip("openslide")  # the second notebook reads slides
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "trees",
         DOCS, folder / "html"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder / "html"


def test_each_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for source in DOCS.rglob("*.md"):
        built = site / source.relative_to(DOCS).with_suffix(".html")
        page = Page(built)
        assert "Not for diagnosis" in built.read_text("utf-8")
        assert page.pictures_without_text == [], built.name
        for address in page.loaded:
            parts = urlsplit(address)
            assert parts.netloc == "", (built.name, address)
            assert parts.scheme in ("", "data"), (built.name, address)
            if parts.scheme == "":
                assert (built.parent / parts.path).is_file(), (built.name, address)


def test_notebooks_show_what_they_computed(site: Path) -> None:
    texts = {p.stem: p.read_text("utf-8") for p in (site / "notebooks").glob("*.html")}
    assert set(texts) == {"first-run", "outlines-to-sheet", "compare-methods"}
    for name, text in texts.items():
        assert "ynthetic" in text, name
        assert "Traceback" not in text, name
        assert "cell_output" in text, name
    pictures = {name: text.count("<img ") for name, text in texts.items()}
    assert pictures == {"first-run": 1, "outlines-to-sheet": 2, "compare-methods": 0}
    assert "Read by AB" in texts["outlines-to-sheet"]
    assert "not distinguishable" in texts["compare-methods"]


def test_search_needs_no_server(site: Path) -> None:
    index = (site / "searchindex.js").read_text("utf-8")
    assert index.startswith("Search.setIndex(")
    assert "glomerulus" in index or "glomeruli" in index


def test_the_reference_holds_every_public_name() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    written = set(re.findall(r"^\.\. public:: (\w+)$", text, re.MULTILINE))
    tables = set(re.findall(r"`hf_glovlm\.([A-Z]+|explain)`", text))
    assert written | tables == set(hf_glovlm.__all__) - {"__version__"}
    assert not written & tables


def test_the_page_on_architecture_names_each_room_on_its_floor() -> None:
    floors: dict[int, set[str]] = {}
    floor = 0
    for line in (DOCS / "architecture.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and (cells[0].isdigit() or not cells[0]):
            floor = int(cells[0]) if cells[0] else floor
            floors.setdefault(floor, set()).update(re.findall(r"`(\w+)`", cells[1]))
    assert floors == FLOORS


def test_the_citation_is_what_the_package_is() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["title"] == project["name"]
    assert citation["version"] == hf_glovlm.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    for work in citation["references"]:
        assert {"type", "title", "authors"} <= set(work)
        assert "doi" in work or work["identifiers"]


def test_what_builds_the_site_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = extras["optional-dependencies"]["docs"]
    pinned = (ROOT / "constraints.txt").read_text("utf-8").lower()
    for line in needed:
        name = re.split(r"[<>=]", line)[0]
        assert f"\n{name}==" in pinned
    extensions = ast.literal_eval(
        re.search(r"extensions = (\[.*?\])", (DOCS / "conf.py").read_text("utf-8"), re.DOTALL)[1]
    )
    assert {"myst_nb", "sphinx_copybutton"} <= set(extensions)
