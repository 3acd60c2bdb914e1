"""The biopsy's sheet in a browser: nothing asked of others, no error, one page of summary on A4.

`GLOVLM_SCREENS=FOLDER` leaves pictures and the printed sheets to look at.
"""

import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sheet_made

from hf_glovlm.reports.biopsy import Picture, render_sheet

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.long,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt: chromium)"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
TURN = np.linspace(0, 2 * np.pi, 40)
RING = 0.5 + 0.4 * np.stack([np.cos(TURN), np.sin(TURN)], 1)
EVERY_PAGE = "Research use only, not for diagnosis"
# Words and backgrounds of the page, with the luminance of WCAG 2.
CONTRASTS = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const ground = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c } };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), all = [];
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (walk.currentNode.data.trim() && e.offsetParent) {
      const pair = [getComputedStyle(e).color, ground(e)].map(light).sort((a, b) => b - a);
      all.push((pair[0] + .05) / (pair[1] + .05)) } }
  return Math.min(...all) }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


def printed_pages(content: bytes) -> list[str]:
    """Text of each page of a PDF that Chromium wrote, without blanks."""
    objects = {
        int(number): body
        for number, body in re.findall(rb"(\d+) 0 obj\s(.*?)\sendobj", content, re.DOTALL)
    }

    def stream(body: bytes) -> bytes:
        data = body.partition(b"stream")[2].lstrip(b"\r\n")
        return zlib.decompressobj().decompress(data) if b"FlateDecode" in body else data

    def letters(font: bytes) -> dict[str, str]:
        """Characters of a font by their codes."""
        match = re.search(rb"/ToUnicode (\d+)", font)
        table = stream(objects[int(match[1])]).decode() if match else ""
        named: dict[str, str] = {}
        for block in re.findall(r"beginbfchar(.*?)endbfchar", table, re.DOTALL):
            for code, text in re.findall(r"<(\w+)> <(\w+)>", block):
                named[code.upper()] = bytes.fromhex(text).decode("utf-16-be")
        for block in re.findall(r"beginbfrange(.*?)endbfrange", table, re.DOTALL):
            for low, high, text in re.findall(r"<(\w+)> <(\w+)> <(\w+)>", block):
                for i in range(int(high, 16) - int(low, 16) + 1):
                    named[f"{int(low, 16) + i:04X}"] = chr(int(text, 16) + i)
        return named

    pages = []
    for body in objects.values():
        if not re.search(rb"/Type\s*/Page\b", body):
            continue
        named = {
            name.decode(): letters(objects[int(number)])
            for block in re.findall(rb"/Font\s*<<(.*?)>>", body, re.DOTALL)
            for name, number in re.findall(rb"/(\w+) (\d+) 0 R", block)
        }
        where = re.search(rb"/Contents (\d+)", body)
        assert where is not None
        text, font = "", ""
        for name, codes in re.findall(
            r"/(\w+) [\d.]+ Tf|<(\w+)>", stream(objects[int(where[1])]).decode("latin-1")
        ):
            font = name or font
            codes = codes.upper()
            text += "".join(named[font].get(codes[i : i + 4], "") for i in range(0, len(codes), 4))
        pages.append(re.sub(r"\s", "", text))
    return pages


def sheet_of(kind: str) -> tuple[dict[str, Any], int]:
    """A sheet, and how many pages its summary may have."""
    n = {"none": 0, "many": 120}.get(kind, 20)
    sheet = sheet_made.sheet(n, pictures={"sentences": ["Outlines are drawn alone."]})
    if kind == "signed":
        sheet["status"] = {"draft": False, "signed_by": "AB", "words": "Read by AB, 2026-11-30",
                           "reasons": []}  # fmt: skip
    if kind == "banff":
        sheet["stated"] |= {"system": "banff", "kidney": "transplant"}
    if kind == "lupus":
        sheet["stated"] |= {"system": "isn_rps", "arteries": None}
    if kind == "plain":
        sheet["stated"] = dict.fromkeys(sheet["stated"])
    return sheet, int(n > 0)


@pytest.mark.parametrize("kind", ["oxford", "signed", "banff", "lupus", "plain", "none", "many"])
def test_a_sheet_fits_screens_and_paper_and_asks_nothing_of_others(
    browser: Any, tmp_path: Path, kind: str
) -> None:
    sheet, summary = sheet_of(kind)
    path = tmp_path / "sheet.html"
    path.write_text(render_sheet(sheet, [Picture([RING])] * len(sheet["glomeruli"])), "utf-8")
    screens = os.environ.get("GLOVLM_SCREENS")
    asked: list[str] = []
    complaints: list[str] = []
    for width, scheme in ((1280, "light"), (390, "light"), (1280, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown = context.new_page()
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.goto(path.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.evaluate(CONTRASTS) >= 4.5
        if screens:
            Path(screens).mkdir(parents=True, exist_ok=True)
            shown.screenshot(path=f"{screens}/{kind}-{width}-{scheme}.png", full_page=True)
        if width == 1280 and scheme == "light":
            shown.emulate_media(media="print")
            shown.set_viewport_size({"width": 695, "height": 900})  # else print is made smaller
            assert shown.evaluate("document.documentElement.scrollWidth") == 695
            content = shown.pdf(prefer_css_page_size=True)
        context.close()
    assert set(asked) == {path.as_uri()}
    assert complaints == []
    if screens:
        Path(screens, f"{kind}.pdf").write_bytes(content)
    pages = printed_pages(content)
    heading = re.sub(r"\s", "", "Every glomerulus, B7")
    assert [heading in text for text in pages].index(True) == summary
    for text in pages:
        assert re.sub(r"\s", "", EVERY_PAGE) in text
        assert re.sub(r"\s", "", f"Biopsy B7: {sheet['status']['words']}") in text
    contact = "".join(pages).partition(heading)[2]
    assert contact.count("S1") == len(sheet["glomeruli"])
