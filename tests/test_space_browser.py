"""The Space in a real browser: every path clicked through, on a desktop and on a phone.

`GLOVLM_SCREENS=FOLDER python -m pytest tests/test_space_browser.py` leaves screenshots to look at.
"""

import csv
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from space_page import Served, serve

import hf_glovlm
from hf_glovlm.lab.phantoms import write_cohort

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from test_space import BAD, png  # noqa: E402
from uploads import make_examples  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt: chromium)"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
TABS = ("Classify", "Your own words", "Adapt", "Compare", "Batch", "About")
WAIT = 45_000  # milliseconds, on a machine that has other work


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("space") / "uploads", GLOVLM_ALLOW_FOLDERS="1") as page:
        yield page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


class Visit:
    """One open page, which keeps what it asked of other machines and what it complained about."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str) -> None:
        self.name = f"{'phone' if width < 500 else 'desktop'}-{scheme}"
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._look_at)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#about-model .facts")

    def _look_at(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def wait(self, selector: str, count: int | None = None) -> Any:
        elements = self.page.locator(selector)
        if count is None:
            elements.first.wait_for(state="visible")
        else:
            playwright.expect(elements).to_have_count(count, timeout=WAIT)
        return elements

    def choose(self, box: str, option: str) -> None:
        self.page.locator(f"{box} input").click()
        self.page.get_by_role("option", name=re.compile(f"^{re.escape(option)}")).click()

    def drop(self, box: str, files: list[Path]) -> None:
        self.page.locator(f"{box} input[type=file]").set_input_files([str(f) for f in files])

    def label(self, by_class: dict[str, list[Path]]) -> None:
        """Give each class of the tab Adapt its name and its four images."""
        for k, (name, files) in enumerate(by_class.items()):
            self.page.fill(f"#class-name-{k} input, #class-name-{k} textarea", name)
            self.drop(f"#class-images-{k}", files)
            self.wait(f"#class-tray-{k} img", 4)

    def width(self) -> int:
        """How wide the page's content is."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def shoot(self, what: str) -> None:
        folder = os.environ.get("GLOVLM_SCREENS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(400)
            path = Path(folder) / f"{self.name}-{what}.png"
            self.page.screenshot(path=path, full_page=True)


@pytest.fixture
def visit(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = getattr(request, "param", (1280, "light"))
    opened = Visit(browser, served.url, width, scheme)
    yield opened
    opened.context.close()
    assert opened.elsewhere == []
    assert opened.errors == []


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drawings")
    for image in make_examples():
        patient, name = image.patient, image.label
        (folder / f"{patient}_{name}.png").write_bytes(image.content)
    return sorted(folder.iterdir())


def test_classify_explain_and_own_words(visit: Visit, examples: list[Path]) -> None:
    page = visit.page
    assert "not for diagnosis" in page.content()
    visit.drop("#images", examples[:2])
    visit.wait("#tray img", 2)
    page.click("#examples")
    visit.wait("#tray img", 7)
    page.click("#remove")
    visit.wait("#tray img", 0)
    page.click("#examples")
    visit.wait("#tray img", 5)
    page.click("button#classify")
    visit.wait("#answers article", 5)
    limits = hf_glovlm.describe_limits(hf_glovlm.load_backbone("mini")[0].config)
    assert limits[0] in page.inner_text("#answers")
    visit.shoot("classify")
    page.get_by_role("button", name="Prompts and definitions").click()
    assert "Capillary loops open" in visit.wait("#words table").inner_text()
    page.locator("#heat-open button.label-wrap").click()
    visit.choose("#heat-method", "Occlusion")
    visit.choose("#heat-class", "atubular")
    page.click("#heat-draw")
    visit.wait("#heat .heat img", 2)
    assert "Probability of atubular" in page.inner_text("#heat")
    over = page.locator("#heat .heat img").nth(1)
    playwright.expect(over).to_have_css("opacity", "0.5")
    page.locator("#opacity input[type=range]").focus()
    page.keyboard.press("End")
    playwright.expect(over).to_have_css("opacity", "1")
    page.keyboard.press("Home")
    playwright.expect(over).to_have_css("opacity", "0")
    page.keyboard.press("End")
    visit.shoot("heat")
    page.fill("#mpp input, #mpp textarea", "a quarter")
    page.click("button#classify")
    visit.wait("text=Expected a number such as 0.25")

    visit.open("Your own words")
    box = page.locator("#own-lines textarea")
    assert "global_sclerosis: " in box.input_value()
    box.fill("scarred: a globally sclerotic glomerulus\nopen: a viable glomerulus | open loops")
    page.click("#own-ask")
    visit.wait("#own-answers article", 5)
    assert "scarred" in page.inner_text("#own-answers")
    visit.shoot("words")
    box.fill("one")
    page.click("#own-ask")
    visit.wait("text=Expected a class, a colon")


def test_bad_uploads_are_refused_on_the_page(visit: Visit, tmp_path: Path) -> None:
    files = []
    for name in ("text.png", "huge.png", "empty.png"):
        (tmp_path / name).write_bytes(BAD[name][0])
        files.append(tmp_path / name)
    (tmp_path / "script.png").write_bytes(BAD["script.svg"][0])
    (tmp_path / "bomb.png").write_bytes(BAD["bomb.zip"][0])
    (tmp_path / "<b>good.png").write_bytes(png())
    visit.drop("#images", [*files, tmp_path / "script.png", tmp_path / "bomb.png"])
    refused = visit.wait("#tray .refused p", 5).all_inner_texts()
    for name, sentence in zip(["text", "huge", "empty", "script", "bomb"], refused, strict=True):
        assert sentence.startswith(f"{name}.png")
    visit.shoot("refused")
    visit.page.click("button#classify")
    visit.wait("text=There are no images yet")
    visit.drop("#images", [tmp_path / "<b>good.png"])
    visit.wait("#tray img", 1)
    assert "<b>good" in visit.page.inner_text("#tray").replace("\n", "")


def test_adapt_use_compare_and_batch(visit: Visit, examples: list[Path], tmp_path: Path) -> None:
    page = visit.page
    visit.open("Adapt")
    by_class = {x: [f for f in examples if x in f.name] for x in ("viable", "global_sclerosis")}
    visit.label(by_class)
    visit.choose("#adapt-method", "tip_adapter:")
    page.click("#adapt-start")
    visit.wait("text=Performance cannot be estimated from this upload")
    page.get_by_role("button", name="Patients").click()
    page.get_by_label("File names begin with the patient").check()
    page.click("#adapt-start")
    visit.wait("#adapt-result table")
    assert "Each of 4 patients" in page.inner_text("#adapt-result")
    with page.expect_download() as waiting:
        page.click("#adapt-zip")
    archive = zipfile.ZipFile(waiting.value.path())
    assert "model/config.json" in archive.namelist()
    visit.shoot("adapt")

    page.click("#adapt-use")
    playwright.expect(page.locator("#about-model")).to_contain_text("cache", timeout=WAIT)
    page.click("#examples")
    visit.wait("#tray img", 5)
    visit.open("Classify")
    page.click("button#classify")
    visit.wait("#answers article", 5)
    assert "Nearest support images" in page.inner_text("#answers")
    visit.shoot("nearest")

    visit.open("Compare")
    page.click("button#compare")
    visit.wait("#pairs table")
    assert "The two name the same class for" in page.inner_text("#pairs")
    visit.shoot("compare")

    visit.open("Batch")
    (tmp_path / "broken.png").write_bytes(b"broken")
    visit.drop("#batch-images", [*examples, tmp_path / "broken.png"])
    visit.wait("#batch-images .file-preview, #batch-images table")
    page.click("#batch-run")
    visit.wait("text=20 images classified, 1 refused.")
    with page.expect_download() as waiting:
        page.click("#batch-csv")
    rows = list(csv.DictReader(Path(waiting.value.path()).read_text().splitlines()))
    assert len(rows) == 21
    assert rows[0]["predicted"] in by_class
    assert "broken.png" in rows[-1]["note"]
    visit.shoot("batch")

    visit.open("Adapt")
    page.click("#support-clear")
    visit.wait("#class-tray-0 img", 0)
    table = tmp_path / "patients.csv"
    table.write_text(
        "file_name,patient_id\n" + "".join(f"{f.name},{f.name[:4]}\n" for f in examples)
    )
    visit.label(by_class)
    page.get_by_label("File names begin with the patient").uncheck()
    visit.drop("#patients-table", [table])
    visit.wait("#patients-table .file-preview, #patients-table table")
    visit.choose("#adapt-method", "prototype:")
    page.click("#adapt-start")
    playwright.expect(page.locator("#adapt-result")).to_contain_text("Each of 4", timeout=WAIT)


@pytest.mark.long
def test_a_calibrated_model_shows_sets_and_abstains(
    browser: Any, served: Served, tmp_path: Path
) -> None:
    data = write_cohort(tmp_path / "drawings", 40, 10, seed=123)
    sets = {"calibration_groups": 10, "conformal": "aps", "max_risk": 0.13}
    hf_glovlm.run(
        hf_glovlm.TrainConfig(
            data=str(data), method="linear_probe", shots=8, n_resamples=20,
            output_dir=str(tmp_path / "run"), **sets,
        )
    )  # fmt: skip
    for width, scheme in ((1280, "light"), (390, "dark")):
        visit = Visit(browser, served.url, width, scheme)
        page = visit.page
        model = page.locator("#model input")
        model.fill(str(tmp_path / "run"))
        model.press("Enter")
        visit.wait("#about-model >> text=Calibrated on 100 images of 10 groups")
        page.click("#examples")
        visit.wait("#tray img", 5)
        page.click("button#classify")
        cards = visit.wait("#answers article", 5).all_inner_texts()
        assert all("Prediction set at 90%: " in card or "No class fits" in card for card in cards)
        silent = ["No answer: " in card for card in cards]
        assert 0 < sum(silent) < 5, cards
        promise = page.locator("#answers >> text=/Conformal sets .aps. promise 90%/")
        playwright.expect(promise).to_be_hidden()
        page.locator("#answers summary").click()
        playwright.expect(promise).to_be_visible()
        visit.shoot("calibrated")
        visit.open("Batch")
        page.locator("#batch-images input[type=file]").set_input_files(
            [str(f) for f in sorted((data / "viable").iterdir())[:10]]
        )
        visit.wait("#batch-images .file-preview, #batch-images table")
        page.click("#batch-run")
        visit.wait("text=10 images classified, 0 refused.")
        with page.expect_download() as waiting:
            page.click("#batch-csv")
        rows = list(csv.DictReader(Path(waiting.value.path()).read_text().splitlines()))
        assert {"yes", "no"} >= {row["answers"] for row in rows}
        assert all("set" in row for row in rows)
        assert visit.width() <= width
        visit.context.close()
        assert visit.errors == visit.elsewhere == []


def test_models_by_name(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    model = page.locator("#model input")
    model.fill(str(tmp_path))
    model.press("Enter")
    assert "--output-dir" in visit.wait("text=holds no model").inner_text()
    model.fill("hf_glovlm/nothing like this")
    model.press("Enter")
    assert "Hub id" in visit.wait("text=Expected a run's folder").inner_text()


@pytest.mark.parametrize(
    "visit",
    [pytest.param((390, "dark"), marks=pytest.mark.long), (390, "light"), (1280, "dark")],
    indirect=True,
    ids=str,
)
def test_it_fits_a_phone_and_the_dark(visit: Visit) -> None:
    page = visit.page
    dark = visit.name.endswith("dark")
    assert page.evaluate("document.body.classList.contains('dark')") is dark
    page.click("#examples")
    visit.wait("#tray img", 5)
    page.click("button#classify")
    visit.wait("#answers article", 5)
    page.get_by_role("button", name="Prompts and definitions").click()
    page.locator("#heat-open button.label-wrap").click()
    page.click("#heat-draw")
    visit.wait("#heat .heat img", 2)
    visit.shoot("classify")
    visit.open("Compare")
    page.click("button#compare")
    visit.wait("#pairs table")
    visit.shoot("compare")
    for tab in TABS:
        visit.open(tab)
        assert visit.width() <= page.viewport_size["width"], tab
        visit.shoot(tab.split()[-1].lower())
    ink, paper = (
        page.evaluate(
            "what => getComputedStyle(document.querySelector('#tray .glo')"
            ".closest(what))[what === 'body' ? 'backgroundColor' : 'color']",
            what,
        )
        for what in (".glo", "body")
    )
    assert contrast(ink, paper) >= 4.5  # WCAG AA


def contrast(one: str, other: str) -> float:
    """Ratio of two CSS colours' luminance (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(float(v)) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    order: list[str] = []
    for _ in range(14):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "(document.activeElement.closest('[id]:not([id^=range])') || {}).id"
                " + '|' + document.activeElement.tagName"
            )
        )
        if order[-1].startswith("examples|"):
            page.keyboard.press("Enter")
            visit.wait("#tray img", 5)
            break
    assert order[-1] == "examples|BUTTON", order
    page.get_by_role("tab", name="Classify", exact=True).focus()
    page.locator("button#classify").focus()
    page.keyboard.press("Enter")
    visit.wait("#answers article", 5)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')]
        .filter(e => e.offsetParent && e.type !== 'hidden' && e.type !== 'file')
        .filter(e => !(e.innerText || '').trim() && !e.ariaLabel && !e.title)
        .filter(e => !(e.labels || []).length && !e.getAttribute('aria-labelledby'))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
