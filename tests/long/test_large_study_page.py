"""The page of a study of 2,000 cells: all of them are in it, and it opens in a browser."""

import time
from pathlib import Path

import pytest
from pages import open_page
from study_made import made_study

from hf_glovlm.reports.study import write_study

pytestmark = pytest.mark.long


@pytest.mark.browser
def test_a_page_of_2000_cells(tmp_path: Path) -> None:
    methods = ("linear_probe", "gda", "tip_adapter", *(f"line-{k}" for k in range(7)))
    report = made_study(
        tmp_path,
        backbones=("one", "two"),
        methods=methods,
        shots=(1, 2, 4, 8, 16),
        draws=20,
        n_resamples=200,
    )
    assert len(report["cells"]) == 2_000
    start = time.process_time()
    page = write_study(tmp_path)
    print(f"{time.process_time() - start:.1f} s of one core, {page.stat().st_size / 1e6:.2f} MB")
    assert page.stat().st_size < 20e6
    with open_page(page) as view:
        assert view.page.locator("#cells tbody tr").count() == 2_000
        head = view.page.locator("#cells th button", has_text="Macro-AUC")
        head.click()
        column = view.page.locator("#cells thead th").all_inner_texts()
        place = next(i for i, text in enumerate(column) if text.startswith("Macro-AUC"))
        shown = view.page.locator(f"#cells tbody tr > :nth-child({place + 1})").all_inner_texts()
        assert [*map(float, shown)] == sorted(map(float, shown))
        assert (view.errors, view.requests, view.overflow) == ([], [], 0)
