"""Pages in a real browser: what they ask of others, complain about, and leave unread to some.

`GLOVLM_SCREENS=FOLDER python -m pytest -m browser` leaves pictures of the pages to look at.
"""

import atexit
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


@cache  # one for all tests of a process
def open_browser() -> Any:
    """Chromium, or the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt: chromium)")
    play = playwright.sync_playwright().start()
    browser = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    atexit.register(lambda: (browser.close(), play.stop()))
    return browser


class PageView:
    """One open page.

    Attributes:
        page: Playwright's page.
        errors: Messages of the console that are errors, and scripts that failed.
        requests: Addresses that the page asked for, other than itself.
    """

    def __init__(self, address: str, width: int, height: int, dark: bool) -> None:
        self.context = open_browser().new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.name = f"{width}-{'dark' if dark else 'light'}"
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._look_at(request.url, address))
        self.page.goto(address)

    def _look_at(self, asked: str, address: str) -> None:
        if asked != address and not asked.startswith(("data:", "blob:")):
            self.requests.append(asked)

    @property
    def serious(self) -> list[str]:
        """What axe finds that is serious or critical: rule, and the first element of it."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:120]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        wide, own = self.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        return int(wide - own)

    def screenshot(self, path: str | Path) -> None:
        """The whole page as a picture."""
        self.page.screenshot(path=str(path), full_page=True)

    def pdf(self, path: str | Path) -> None:
        """The page as it prints on A4."""
        self.page.pdf(path=str(path), prefer_css_page_size=True)

    def shoot(self, what: str) -> None:
        """Leave a picture where GLOVLM_SCREENS says."""
        folder = os.environ.get("GLOVLM_SCREENS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.screenshot(Path(folder) / f"{what}-{self.name}.png")

    def close(self) -> None:
        self.context.close()

    def __enter__(self) -> "PageView":
        return self

    def __exit__(self, *what: Any) -> None:
        self.close()


def open_page(
    page: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False
) -> PageView:
    """Open a file or an address, in light or dark, on a desktop or (390 px) a phone."""
    address = page.resolve().as_uri() if isinstance(page, Path) else page
    return PageView(address, width, height, dark)


def check_page(page: str | Path, *, what: str = "", screens: Any = None) -> None:
    """A page asks nothing of others, has no error, fits its window, and axe finds nothing serious.

    Args:
        page: File or address.
        what: Name of its pictures.
        screens: Pairs of a width and whether it is dark.
    """
    for width, dark in screens or ((1280, False), (390, True)):
        with open_page(page, width=width, dark=dark) as view:
            view.shoot(what or "page")
            assert view.requests == []
            assert view.errors == []
            assert view.overflow <= 0, f"{view.overflow} pixels wider than {width}"
            assert view.serious == []
