"""The Space in a real browser: every path clicked through, on a desktop and on a phone.

`GLOVLM_SCREENS=FOLDER python -m pytest tests/test_space_browser.py` leaves screenshots to look at.
"""

import csv
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import PageView, open_page
from space_page import Served, serve

import hf_glovlm
from hf_glovlm.lab.phantoms import write_cohort

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from test_space import BAD, png  # noqa: E402
from uploads import make_examples  # noqa: E402

pytestmark = pytest.mark.browser
TABS = ("Classify", "Adapt", "Batch", "About")
WARNING = "Research use only, not for diagnosis."
WAIT = 45_000  # milliseconds, on a machine that has other work


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("space") / "uploads", GLOVLM_ALLOW_FOLDERS="1") as page:
        yield page


class Visit:
    """One open page of the Space."""

    def __init__(self, url: str, width: int, dark: bool) -> None:
        self.view: PageView = open_page(url, width=width, dark=dark)
        self.url, self.width = url, width
        self.page = self.view.page
        self.page.set_default_timeout(WAIT)
        self.page.wait_for_selector("#about-model .facts")

    @property
    def elsewhere(self) -> list[str]:
        """What was asked of other hosts."""
        return [asked for asked in self.view.requests if not asked.startswith(self.url)]

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def unfold(self, fold: str) -> None:
        self.page.locator(f"{fold} button.label-wrap").click()

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

    def drop(self, box: str, *files: Path) -> None:
        self.page.locator(f"{box} input[type=file]").set_input_files([str(f) for f in files])

    def place(self, selector: str) -> dict[str, float]:
        """Where an element stands in the window, once scrolling has come to rest."""
        box = self.page.locator(selector).first
        before = None
        while (now := box.bounding_box()) != before:
            before = now
            self.page.wait_for_timeout(150)
        assert before is not None
        return dict(before)

    def check(self) -> None:
        """The page fits, axe finds nothing serious, and the warning stands there once."""
        assert self.view.overflow <= 0
        found = self.view.serious
        for _ in range(10):  # what has just been answered is pale until it has faded in
            if found:
                self.page.wait_for_timeout(300)
                found = self.view.serious
        assert found == []
        assert self.page.inner_text("body").count(WARNING) == 1

    def shoot(self, what: str) -> None:
        self.view.shoot(f"space-{what}")

    def close(self) -> None:
        errors, elsewhere = list(self.view.errors), self.elsewhere
        self.view.close()
        assert errors == []
        assert elsewhere == []


@pytest.fixture
def visit(served: Served, request: pytest.FixtureRequest) -> Iterator[Visit]:
    opened = Visit(served.url, *getattr(request, "param", (1280, False)))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drawings")
    for image in make_examples():
        (folder / f"{image.patient}_{image.label}.png").write_bytes(image.content)
    return sorted(folder.iterdir())


def test_classify_explain_compare_and_own_words(visit: Visit, examples: list[Path]) -> None:
    page = visit.page
    page.get_by_role("button", name="Classify the synthetic drawing: ischemic").click()
    visit.wait("#answers article", 1)
    answer, images = visit.place("#answers article"), visit.place("#images")
    assert answer["x"] > images["x"] + images["width"]  # on the right, in the first window
    assert answer["y"] + answer["height"] < 900
    visit.drop("#images", *examples[:2])
    visit.wait("#tray img", 3)
    page.click("button#classify")
    visit.wait("#answers article", 3)
    limits = hf_glovlm.describe_limits(hf_glovlm.load_backbone("mini")[0].config)
    assert limits[0] in page.inner_text("#answers")
    for card in page.locator("#answers article").all():
        numbers = [float(text) for text in card.locator("dd.n").all_inner_texts()]
        assert numbers == sorted(numbers, reverse=True)
        assert card.locator("dt >> nth=0").inner_text().endswith("most probable")
    visit.unfold("#words-open")
    assert "Capillary loops open" in visit.wait("#words dl").inner_text()
    visit.unfold("#heat-open")
    visit.choose("#heat-method", "Occlusion")
    visit.choose("#heat-class", "atubular")
    page.click("#heat-draw")
    original, drawn = visit.wait("#heat figure", 2).all()
    assert original.bounding_box()["x"] < drawn.bounding_box()["x"]
    visit.wait("#heat .scale i[role=img]")
    assert "Probability of atubular" in page.inner_text("#heat")
    over = page.locator("#heat .heat img").nth(1)
    playwright.expect(over).to_have_css("opacity", "0.5")
    page.locator("#opacity input[type=range]").focus()
    page.keyboard.press("End")
    playwright.expect(over).to_have_css("opacity", "1")
    visit.shoot("classify")

    visit.unfold("#options")
    page.fill("#mpp input, #mpp textarea", "a quarter")
    page.click("button#classify")
    visit.wait("text=Expected a number such as 0.25")
    page.fill("#mpp input, #mpp textarea", "")
    visit.choose("#other", "mini")
    page.click("button#classify")
    visit.wait("#answers .pair", 3)
    assert "The two name the same class for 3 of 3 images" in page.inner_text("#answers")
    visit.choose("#other", "none")
    page.get_by_label("mine").check()
    box = page.locator("#own-lines textarea")
    box.wait_for(state="visible")
    assert "global_sclerosis: " in box.input_value()
    box.fill("scarred: a globally sclerotic glomerulus\nopen: a viable glomerulus | open loops")
    page.click("button#classify")
    visit.wait("#answers >> text=scarred")
    assert page.locator("#answers .pair").count() == 0
    box.fill("one")
    page.click("button#classify")
    visit.wait("text=Expected a class, a colon")
    page.click("#remove")
    visit.wait("#tray img", 0)


def test_bad_uploads_are_refused_on_the_page(visit: Visit, tmp_path: Path) -> None:
    files = []
    for name in ("text.png", "huge.png", "empty.png"):
        (tmp_path / name).write_bytes(BAD[name][0])
        files.append(tmp_path / name)
    (tmp_path / "script.png").write_bytes(BAD["script.svg"][0])
    (tmp_path / "bomb.png").write_bytes(BAD["bomb.zip"][0])
    good = tmp_path / f"<b>good_{'long' * 40}.png"
    good.write_bytes(png())
    visit.drop("#images", *files, tmp_path / "script.png", tmp_path / "bomb.png")
    refused = visit.wait("#tray .refused p", 5).all_text_contents()
    for name, sentence in zip(["text", "huge", "empty", "script", "bomb"], refused, strict=True):
        assert sentence.startswith(f"{name}.png")
    visit.page.click("button#classify")
    visit.wait("text=There are no images yet")
    visit.drop("#images", good)
    visit.wait("#tray img", 1)
    assert "<b>good" in visit.page.inner_text("#tray").replace("\n", "")
    visit.shoot("refused")
    visit.check()


def test_adapt_from_a_zip_and_a_folder_then_batch(
    visit: Visit, examples: list[Path], tmp_path: Path
) -> None:
    page = visit.page
    chosen = [path for path in examples if "viable" in path.name or "global" in path.name]
    folder = tmp_path / "my set"
    for path in chosen:
        label = path.stem.split("_", 1)[1]
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{path.name[:4]}.png").write_bytes(path.read_bytes())
    visit.open("Adapt")
    page.set_input_files(
        "input[webkitdirectory]", str(folder)
    )  # the same names in both folders: told apart by these
    visit.wait("#set-read >> text=8 images in 2 classes, patients not known.")
    assert "Nothing says whose images these are" in page.inner_text("#set-read")
    page.click("#adapt-start")
    visit.wait("#adapt-result >> text=Performance cannot be estimated from this upload")
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    visit.drop("#set-zip", tmp_path / "broken.zip")
    visit.wait("#set-read .refused >> text=broken.zip is no ZIP that can be read.")
    page.click("#support-clear")
    visit.wait("#set-read table", 0)
    rows = [f"{path.name},{path.stem.split('_', 1)[1]},{path.name[:4]}" for path in chosen]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("table.csv", "\n".join(["file,class,patient", *rows]))
        for path in chosen:
            archive.write(path, path.name)
    visit.drop("#set-zip", tmp_path / "set.zip")
    visit.wait("#set-read >> text=8 images in 2 classes of 4 patients.")
    visit.unfold("#class-1")
    assert page.locator("#class-name-1 input, #class-name-1 textarea").input_value() == "viable"
    visit.wait("#class-tray-1 img", 4)
    visit.choose("#adapt-method", "tip_adapter:")
    page.click("#adapt-start")
    visit.wait("#adapt-result table")
    assert "Each of 4 patients" in page.inner_text("#adapt-result")
    assert visit.place("#adapt-result table")["y"] < 800
    with page.expect_download() as waiting:
        page.click("#adapt-zip")
    assert "model/config.json" in zipfile.ZipFile(waiting.value.path()).namelist()
    visit.shoot("adapt")
    visit.check()

    page.click("#adapt-use")
    playwright.expect(page.locator("#about-model")).to_contain_text("cache", timeout=WAIT)
    visit.open("Classify")
    page.locator("#examples button").first.click()
    visit.wait("#answers article", 1)
    page.click("#answers summary >> text=Nearest support images")
    visit.wait("#answers >> text=cosine")

    visit.open("Batch")
    (tmp_path / "broken.png").write_bytes(b"broken")
    visit.drop("#batch-images", *examples, tmp_path / "broken.png")
    visit.wait("#batch-images .file-preview, #batch-images table")
    page.click("#batch-run")
    visit.wait("#batch-counts >> text=20 images classified, 1 not read.")
    assert page.inner_text("#batch-counts .refused").startswith("broken.png")
    page.click("#batch-counts th >> text=Probability")
    column = "#batch-counts tbody td:nth-of-type(2)"
    numbers = [float(text) for text in page.locator(column).all_inner_texts()]
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[-1]
    with page.expect_download() as waiting:
        page.click("#batch-csv")
    written = list(csv.DictReader(Path(waiting.value.path()).read_text().splitlines()))
    assert len(written) == 21
    assert written[0]["predicted"] in ("viable", "global_sclerosis")
    assert "broken.png" in written[-1]["note"]
    visit.shoot("batch")
    visit.check()


@pytest.mark.long
def test_a_calibrated_model_shows_sets_and_abstains(served: Served, tmp_path: Path) -> None:
    data = write_cohort(tmp_path / "drawings", 40, 10, seed=123)
    sets = {"calibration_groups": 10, "conformal": "aps", "max_risk": 0.13}
    hf_glovlm.run(
        hf_glovlm.TrainConfig(
            data=str(data), method="linear_probe", shots=8, n_resamples=20,
            output_dir=str(tmp_path / "run"), **sets,
        )
    )  # fmt: skip
    for width, dark in ((1280, False), (390, True)):
        visit = Visit(served.url, width, dark)
        page = visit.page
        model = page.locator("#model input")
        model.fill(str(tmp_path / "run"))
        model.press("Enter")
        fitted = page.locator("#about-model >> text=Calibrated on 100 images of 10 groups")
        fitted.first.wait_for(state="attached")
        page.click("#about-model summary")
        playwright.expect(fitted.first).to_be_visible()
        for k in range(5):
            page.locator("#examples button").nth(k).click()
            visit.wait("#tray img", k + 1)
        cards = visit.wait("#answers article", 5).all_inner_texts()
        assert all("Prediction set at 90%: " in card or "No class fits" in card for card in cards)
        silent = ["No answer: " in card for card in cards]
        assert 0 < sum(silent) < 5, cards
        promise = page.locator("#answers >> text=/Conformal sets .aps. promise 90%/")
        playwright.expect(promise).to_be_hidden()
        page.locator("#answers .mark summary").click()
        playwright.expect(promise).to_be_visible()
        visit.shoot("calibrated")
        visit.open("Batch")
        page.locator("#batch-images input[type=file]").set_input_files(
            [str(f) for f in sorted((data / "viable").iterdir())[:10]]
        )
        visit.wait("#batch-images .file-preview, #batch-images table")
        page.click("#batch-run")
        visit.wait("#batch-counts >> text=10 images classified, 0 not read.")
        with page.expect_download() as waiting:
            page.click("#batch-csv")
        rows = list(csv.DictReader(Path(waiting.value.path()).read_text().splitlines()))
        assert {"yes", "no"} >= {row["answers"] for row in rows}
        assert all("set" in row for row in rows)
        visit.check()
        visit.close()


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
    [pytest.param((390, True), marks=pytest.mark.long), (390, False), (1280, True)],
    indirect=True,
    ids=str,
)
def test_it_fits_a_phone_and_the_dark(visit: Visit) -> None:
    page = visit.page
    dark = visit.view.name.endswith("dark")
    assert page.evaluate("document.body.classList.contains('dark')") is dark
    for tab in TABS[1:]:
        visit.open(tab)
        visit.check()
        visit.shoot(tab.lower())
    visit.open("Classify")
    page.locator("#examples button").first.click()
    visit.wait("#answers article", 1)
    answer, button = visit.place("#answers article"), visit.place("#remove")
    assert 0 <= answer["y"] < 600  # scrolled to, where it lies below
    below = answer["y"] - button["y"] - button["height"]
    assert (0 < below < 150) is (visit.width < 500)
    page.locator("#heat-open button.label-wrap").click()
    page.click("#heat-draw")
    visit.wait("#heat .heat img", 2)
    visit.check()
    visit.shoot("classify")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    order: list[str] = []
    for _ in range(16):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "(document.activeElement.closest('[id]:not([id^=range]):not([id^=html])') || {}).id"
                " + '|' + document.activeElement.tagName"
            )
        )
        if order[-1] == "examples|BUTTON":
            break
    assert order[-1] == "examples|BUTTON", order
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Space")
    visit.wait("#answers article", 1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    visit.wait("#answers article", 2)
    page.locator("#heat-open button.label-wrap").focus()
    page.keyboard.press("Enter")
    visit.wait("#heat-open button[aria-expanded=true]")
    for tab in TABS[:-1]:
        visit.open(tab)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('button, input, textarea, select')]
            .filter(e => e.offsetParent && e.type !== 'hidden' && e.type !== 'file')
            .filter(e => !(e.innerText || '').trim() && !e.ariaLabel && !e.title)
            .filter(e => !(e.labels || []).length && !e.getAttribute('aria-labelledby'))
            .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert nameless == []
    boxes = page.evaluate(
        "[...document.querySelectorAll('button.upload-container')].map(e => e.ariaLabel)"
    )
    assert len(set(boxes)) == len(boxes) >= 5
