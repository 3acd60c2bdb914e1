"""The page and the tables of a study: what stands in them is what the study holds."""

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pages import check_page
from study_made import CLASSES, made_study, numbers_of_page, numbers_of_results

from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import write_json
from hf_glovlm.metrics import METRICS
from hf_glovlm.reports.study import render_study, without_names, write_study
from hf_glovlm.runs.feature_map import project
from hf_glovlm.runs.study import StudyConfig
from hf_glovlm.runs.study_tables import CELL_COLUMNS, SUMMARY_COLUMNS
from hf_glovlm.tables import as_text

FAILURE = "FileNotFoundError: no image at /data/mine/patient-1003/a b.png, of patient-1003"
GOALS = [
    {"method": "gda", "shots": 4, "least": 0.99},
    {"method": "tip_adapter", "metric": "balanced_accuracy", "gain": -1},
    {"method": "linear_probe", "metric": "ece", "shots": 1, "most": 1},
]
CONTROLS = {
    "size": {
        "title": "image size", "metric": "macro_auc", "value": 0.71, "ci95": [0.62, 0.8],
        "chance": 0.5, "flagged": True, "note": "patient-1003 has the largest",
    },
    "permuted_labels": {
        "title": "permuted labels", "metric": "macro_auc", "value": None, "ci95": None,
        "chance": 0.5, "flagged": False, "note": "not computed",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study with a failed cell and one that was not run; read it only."""
    folder = tmp_path_factory.mktemp("made")
    report = made_study(
        folder,
        failed={"made/gda/4/draw-01": FAILURE},
        missing=("made/tip_adapter/1/draw-01",),
        goals=GOALS,
    )
    return folder, json.loads((folder / "report.json").read_text()) if report else {}


@pytest.fixture(scope="module")
def page(made: tuple[Path, dict[str, Any]]) -> str:
    controls = [{"backbone": "made", "shots": 4, "n_draws": 2, "controls": CONTROLS}]
    return render_study({**made[1], "controls": controls})


def test_every_number_of_the_page_stands_in_the_report(
    made: tuple[Path, dict[str, Any]], page: str
) -> None:
    report = {**made[1], "controls": CONTROLS}
    sections, goals = report["sections"], report["goals"]
    counts = [len(sections), len(goals), len(sections[0]["methods"]), len(report["cells"])]
    counts += [len(report["failures"]), len(report["missing"])]
    counts += [sum(goal["met"] is False for goal in goals)]
    numbers = numbers_of_page(page)
    assert len(numbers) > 150
    assert numbers - numbers_of_results(report) <= {str(n) for n in counts}


def test_the_page_names_all_candidates_and_no_patient(
    made: tuple[Path, dict[str, Any]], page: str
) -> None:
    _, report = made
    groups = {row["group"] for section in report["sections"] for row in section["recall"]}
    assert "patient-1003" in groups
    assert not [name for name in groups if name in page]
    assert "/data/mine" not in page
    assert ".png" not in page
    assert "FileNotFoundError: no image at (file)" in page
    assert "made/tip_adapter/1/draw-01" in page
    table = page[page.index('id="all"') : page.index('id="cells"')]
    for section in report["sections"]:
        for line in section["methods"]:
            low, high = line["metrics"]["macro_auc"]["ci95"]
            assert f"{line['metrics']['macro_auc']['mean']:.3f} [{low:.3f}, {high:.3f}]" in table
    assert page.count("<th scope=\"row\"") >= len(report["cells"])  # fmt: skip


def test_goals_that_are_missed_are_named_first(
    made: tuple[Path, dict[str, Any]], page: str
) -> None:
    _, report = made
    met = {(g["method"], g["shots"]): g["met"] for g in report["goals"]}
    assert (met[("gda", 4)], met[("linear_probe", 1)]) == (False, True)
    versus = report["sections"][1]["methods"][2]["versus_reference"]["metrics"]
    row = versus["balanced_accuracy"]
    assert met[("tip_adapter", 4)] is (row["verdict"] == "better" and row["value"] >= -1)
    n = sum(one is False for one in met.values())
    assert f"Goals missed: {n} of {len(report['goals'])}." in page
    assert page.index("Goals missed") < page.index('id="curves"')


def test_bands_hold_their_means_and_holm_counts_all_comparisons(
    made: tuple[Path, dict[str, Any]],
) -> None:
    _, report = made
    raw, adjusted = [], []
    for section in report["sections"]:
        for line in section["methods"]:
            for name in ("macro_auc", "balanced_accuracy"):
                row = line["metrics"][name]
                assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
            if versus := line["versus_reference"]:
                raw.append(versus["metrics"]["macro_auc"]["p_value"])
                adjusted.append(versus["p_holm"]["macro_auc"])
    assert report["comparisons"]["macro_auc"] == len(raw) == 4
    assert min(adjusted) == pytest.approx(min(1, 4 * min(raw)))
    assert all(p <= q for p, q in zip(raw, adjusted, strict=True))


def test_tables_hold_every_cell_and_every_line(made: tuple[Path, dict[str, Any]]) -> None:
    folder, report = made
    cells = pq.read_table(folder / "cells.parquet")
    assert cells.column_names == [*CELL_COLUMNS]
    meanings = {k.decode(): v.decode() for k, v in cells.schema.metadata.items()}
    assert meanings["column macro_auc"] == METRICS["macro_auc"].definition
    rows = {(r["method"], r["shots"], r["draw"]): r for r in cells.to_pylist()}
    assert len(rows) == 12
    assert rows[("gda", 4, 1)]["status"] == "failed"
    assert rows[("gda", 4, 1)]["error"] == FAILURE
    assert rows[("tip_adapter", 1, 1)]["status"] == "missing"
    for cell in report["cells"]:
        row = rows[(cell["method"], cell["shots"], cell["draw"])]
        assert row["status"] == "done"
        assert {k: row[k] for k in cell["metrics"]} == cell["metrics"]
    summary = pq.read_table(folder / "summary.parquet")
    assert summary.column_names == [*SUMMARY_COLUMNS]
    lines = {(r["method"], r["shots"], r["metric"]): r for r in summary.to_pylist()}
    for section in report["sections"]:
        for line in section["methods"]:
            row = lines[(line["name"], section["shots"], "macro_auc")]
            assert row["mean"] == line["metrics"]["macro_auc"]["mean"]
            assert [row["low"], row["high"]] == line["metrics"]["macro_auc"]["ci95"]
            if versus := line["versus_reference"]:
                assert row["difference"] == versus["metrics"]["macro_auc"]["value"]
                assert row["p_holm"] == versus["p_holm"]["macro_auc"]
    for name, table in (("cells", cells), ("summary", summary)):
        with (folder / f"{name}.csv").open(newline="") as stream:
            header, *written = csv.reader(stream)
        assert header == table.column_names
        assert len(written) == len(table)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_text_is_a_formula_of_a_spreadsheet(text: str) -> None:
    assert as_text(text) == "'" + text
    assert as_text(-1.5) == -1.5
    assert as_text("a=1") == "a=1"


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("C:\\data\\p 1.png is damaged", "(file)"),
        ("no classes in ~/mine/classes.yaml", "no classes in (file)"),
        ("patient-1003 has one image, PAT", "(name) has one image, PAT"),
        ("Precision/recall at 0.5 of 3/4 cells", "Precision/recall at 0.5 of 3/4 cells"),
        ("CUDA out of memory: 2.5 GiB", "CUDA out of memory: 2.5 GiB"),
    ],
)
def test_sentences_name_no_place_and_no_patient(sentence: str, shown: str) -> None:
    assert without_names(sentence, ["patient-1003", "p 1"]).startswith(shown)


def hostile(value: Any) -> Any:
    """The same, with every name and sentence hostile."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    kept = ("study", *METRICS, "better", "worse")
    return f"{value}{MARKS}" if isinstance(value, str) and value not in kept else value


MARKS = "<img src=x onerror=alert(1)></svg></script> $x_{1}$ & \"'"


@pytest.mark.browser
def test_a_page_of_hostile_names_is_clean_in_a_browser(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report = hostile(copy.deepcopy(made[1]))
    del report["sections"][1:]  # the number of charts is not what is tested
    text = render_study(report)
    assert "<img" not in text
    assert text.count("</script>") == 1
    path = tmp_path / "report.html"
    path.write_text(text)
    check_page(path, what="study")


def test_a_report_of_an_earlier_version_has_a_page(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    old = copy.deepcopy(made[1])
    del old["sections"][1:]
    for key in ("goals", "comparisons", "cells", "maps"):
        del old[key]
    for section in old["sections"]:
        for line in section["methods"]:
            for row in line["metrics"].values():
                row.pop("ci95", None)
            if line["versus_reference"]:
                del line["versus_reference"]["p_holm"]
                for row in line["versus_reference"]["metrics"].values():
                    row.pop("p_value")
    write_json(tmp_path / "report.json", old)
    assert "linear_probe" in write_study(tmp_path).read_text()
    write_json(tmp_path / "report.json", {**old, "sections": [{"backbone": "x"}]})
    with pytest.raises(GloVLMError, match="is damaged, or of another version"):
        write_study(tmp_path)
    write_json(tmp_path / "report.json", {"kind": "bench"})
    with pytest.raises(GloVLMError, match="study"):
        write_study(tmp_path)


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        ("gda", "Expected a goal as a mapping"),
        ({"least": 1}, "Expected a goal as a mapping"),
        ({"method": "gda"}, "one of 'least', 'most' and 'gain'"),
        ({"method": "gda", "least": 1, "most": 2}, "one of 'least', 'most' and 'gain'"),
        ({"method": "gda", "least": "high"}, "one of 'least', 'most' and 'gain'"),
        ({"method": "gdb", "least": 1}, "Did you mean 'gda'"),
        ({"method": "gda", "metric": "macro_f1", "gain": 0}, "goal's metric is one of macro_auc"),
        ({"method": "gda", "shots": 3, "least": 1}, "goal's shots is one of 8"),
        ({"method": "linear_probe", "gain": 0}, "over itself"),
    ],
)
def test_a_goal_that_cannot_be_judged_is_refused(goal: Any, sentence: str) -> None:
    values = {"data": "x", "methods": ["linear_probe", "gda"], "backbones": ["b"], "goals": [goal]}
    with pytest.raises(GloVLMError, match=sentence):
        StudyConfig.from_mapping(values)


def test_a_map_shows_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(3)
    images = rng.normal(size=(60, 9)) * np.arange(9, 0, -1)
    texts = rng.normal(size=(3, 9))
    places, of_texts, explained = project(images * 7, texts)
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T))  # another route than that of `project`
    assert explained == pytest.approx(values[::-1][:2] / values.sum())
    axes = vectors[:, ::-1][:, :2]
    expected = (unit - unit.mean(0)) @ axes
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=1e-9)
    assert of_texts is not None
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    assert np.abs(of_texts) == pytest.approx(np.abs((unit - unit.mean(0)) @ axes), abs=1e-9)
    alone, _, none = project(np.ones((1, 4)), None)
    assert alone.tolist() == [[0.0, 0.0]]
    assert none.tolist() == [0.0, 0.0]
    assert len(CLASSES) == 3


def test_backbones_stand_beside_each_other_at_one_number_of_labels(tmp_path: Path) -> None:
    report = made_study(tmp_path, backbones=("one", "two"), shots=(8,), draws=1, n_resamples=10)
    page = render_study(report)
    assert "Macro-AUC by backbone" in page
    assert "Macro-AUC at 8 labels a class, two" in page
    alt = re.search(r'aria-label="(Macro-AUC of methods[^"]*)"', page)
    assert alt
    for section in report["sections"]:
        best = max(section["methods"], key=lambda m: m["metrics"]["macro_auc"]["mean"])
        value = best["metrics"]["macro_auc"]["mean"]
        assert f"{section['backbone']}: {best['name']} {value:.3f}" in alt[1]
