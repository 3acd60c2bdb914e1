"""A run's report: what it shows stands in the run's results, and names nobody."""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_made
from markupsafe import escape
from page_text import HOSTILE, Page, values
from pages import check_page
from PIL import Image

from hf_glovlm import write_report
from hf_glovlm.charts import Chart
from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import write_json
from hf_glovlm.metrics import METRICS
from hf_glovlm.publish.identifiers import WITHHELD
from hf_glovlm.rendering import percentage
from hf_glovlm.reports import run_charts
from hf_glovlm.reports.reading import READING
from hf_glovlm.reports.run import HOW_TO_SEE, NO_CURVES, render_run

RESEARCH = "Research use only, not for diagnosis"


@pytest.fixture(autouse=True)
def charts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Charts are empty but for their words, since each takes a tenth of a second to draw."""
    if request.node.get_closest_marker("browser") or "drawn" in request.fixturenames:
        return

    def draw(*given: Any, title: str, alt: str, **options: Any) -> Chart:
        return Chart(title, alt, f'<svg role="img" aria-label="{escape(alt)}"></svg>')

    for name in ("draw_lines", "draw_matrix", "draw_points"):
        monkeypatch.setattr(run_charts, name, draw)


@pytest.fixture
def drawn() -> None:
    """Charts are drawn."""


def page(results: Mapping[str, Any], **options: Any) -> Page:
    return Page(render_run(results, **options))


# ------------------------------------------------------------------------------------- the page


def test_the_first_words_say_what_was_measured_and_what_it_is_not_for() -> None:
    results = run_made.results()
    text = page(results).text
    right = sum(results["confusion_matrix"][k][k] for k in range(3))
    accuracy = results["metrics"]["accuracy"]
    low, high = (percentage(100 * bound) for bound in accuracy["ci95"])
    sentence = (
        "On 64 synthetic images of 8 patients that it did not learn from, the model named the "
        f"right class for {right} ({percentage(100 * accuracy['value'])}; 95% interval over "
        f"patients {low} to {high})."
    )
    assert text.index(RESEARCH) < text.index("Synthetic images:") < text.index(sentence)
    worst = results["per_group"][0]
    assert f"the worst has {worst['right']} of {worst['n']} images right." in text
    assert "Few patients, in all or of a class" in text
    assert "labels can be guessed without the tissue (Files alone)" in text
    common = max(results["prior"], key=results["prior"].__getitem__)
    assert (
        f"commonest class, {common}, would be right for {results['per_class'][common]['n']}" in text
    )
    assert HOW_TO_SEE.rpartition(": ")[0] in text
    assert "glovlm report RUN --with-images" in text


def test_every_number_of_the_page_stands_in_the_results() -> None:
    results = run_made.results()
    known = {"95", "1", "0", "0.8", "80", "100"}  # of intervals, and in texts on how to read
    texts = [*READING.values(), *(row.reading + row.definition for row in METRICS.values())]
    for value in [*values(results), *texts]:
        if isinstance(value, str):
            known |= {*re.findall(r"\d+(?:\.\d+)?", value)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            known |= {str(value), f"{value:.3f}", f"{value:.3g}", f"{value:.0f}"}
            known.add(percentage(100 * value).strip("<>%"))
    counts = np.array(results["confusion_matrix"])
    known |= {str(n) for n in (np.trace(counts), *counts.sum(1))}
    rows = results["per_group"]
    known |= {str(1 + k) for k in range(len(rows))}  # the numbers of the patients
    known |= {percentage(100 * row["right"] / row["n"]).strip("<>%") for row in rows}
    known.add(str(sum(row["right"] == row["n"] for row in rows)))
    known |= {str(sum(group)) for side in results["data"]["drawn"].values() for group in side}
    known |= {str(sum(side.values())) for side in results["data"]["counts"].values()}
    known |= {"12", str(len(results["notes"])), str(len(results["per_class"]))}  # labels of support
    shown = page(results)
    assert {*re.findall(r"\d+(?:\.\d+)?", shown.text)} <= known
    alternatives = " ".join(value for name, value in shown.attributes if name == "aria-label")
    assert {*re.findall(r"\d+(?:\.\d+)?", alternatives)} <= known
    assert not {"None", "nan", "undefined"} & {*re.findall(r"\w+", shown.text)}


def test_each_part_shows_what_the_results_hold() -> None:
    results = run_made.results()
    text = page(results).text
    for part in (
        "Support (learned from): 12 images of 5 patients",
        "Calibration (fitted the probabilities): 21 images of 3 patients",
        "Chosen on 21 calibration images of 3 patients, which are not measured here",
        "fitted on 21 images of 3 patients",
        "answers for 41 of 64 images; the share of errors among these is 0.125",
        "were of former runs of the backbone 6",
        "in all 39",
        "trainable parameters 8192",
        "Size of the image alone Macro-AUC 0.523",
        "PAS 64 8",
    ):
        assert part in text, part
    for row in results["operating_points"]["classes"].values():
        assert f"{row['threshold']:.3f} {row['sensitivity']['value']:.3f}" in text
    assert text.count("How to read") >= 8 + len(results["metrics"])


def test_charts_are_drawn_from_the_results(drawn: None) -> None:
    results = run_made.results()
    results["curves"]["classes"] |= {"mesangial": None, "sclerosed": None}
    shown = page(results)
    assert shown.tags.count("svg") == 5
    words = " ".join(shown.drawn)
    for part in ("1 - specificity", "precision", "in the data", "patients, the lowest share first"):
        assert part in words
    for row in results["confusion_matrix"]:
        for count in row:
            assert f" {count} " in re.sub(r"\s+", " ", words)


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_name_holds_is_text(hostile: str) -> None:
    words = {"mesangial", "kidneys", "lora", "mini", "PAS", "Files alone", "cpu"}
    words.add("Split by patient_id; intervals are over these groups.")

    def spoil(part: Any, name: str) -> Any:
        if isinstance(part, dict):
            return {name if k in words else k: spoil(value, name) for k, value in part.items()}
        if isinstance(part, list):
            return [spoil(value, name) for value in part]
        return name if part in words else part

    results = run_made.results()
    plain, spoilt = (page(spoil(results, name)) for name in ("plain", hostile))
    assert spoilt.tags == plain.tags
    assert [name for name, _ in spoilt.attributes] == [name for name, _ in plain.attributes]
    shown = re.sub(r"\s+", " ", re.sub("[\x00-\x1f\ud800]", "\ufffd", hostile))
    assert spoilt.text.count(shown) >= 10


def test_the_page_asks_nothing_of_others() -> None:
    shown = page(run_made.results())
    addresses = [v for name, v in shown.attributes if name in ("src", "href", "srcset", "action")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert {a[1:] for a in addresses} <= {v for name, v in shown.attributes if name == "id"}
    assert not {"link", "iframe", "form", "object", "img"} & {*shown.tags}
    policy = next(v for name, v in shown.attributes if v.startswith("default-src"))
    assert "connect-src" not in policy
    assert policy.startswith("default-src 'none'; img-src data:")


def test_results_of_an_earlier_version_say_what_they_lack() -> None:
    text = page(run_made.earlier()).text
    assert NO_CURVES in text
    assert "hold no thresholds" in text
    assert "hold no counts by patient" in text
    assert "No negative controls were measured" in text
    assert text.count("glovlm evaluate") >= 3
    assert "Support (learned from): 12 images of 5 patients" in text


def test_an_evaluation_says_whether_the_model_learned_from_what_is_measured() -> None:
    results = run_made.results(kind="evaluation")
    for name in ("method", "backbone", "training", "timing", "controls", "abstention", "sets"):
        del results[name]
    for name in ("support", "drawn", "groups", "shots", "sampler"):
        del results["data"][name]
    for seen, words in (
        (0, "8 patients that it did not learn from,"),
        (None, "8 patients (whether it learned from some is not known),"),
        (2, "8 patients (it learned from 2 of these patients),"),
    ):
        results["data"] |= {"groups_seen_in_training": seen, "images_seen_in_training": seen}
        text = page(results).text
        assert words in text
        assert ("the numbers flatter it" in text) == (seen == 2)


def test_without_patients_the_page_does_not_speak_of_them() -> None:
    results = run_made.results()
    del results["per_group"]
    results["bootstrap"] |= {"unit": "images"}
    results["n_groups"] = results["n"]
    text = page(results).text
    assert "Patients are unknown: the intervals are over images, and too narrow." in text
    assert "There are no results by patient" in text
    assert "On 64 synthetic images that it did not learn from" in text


def test_no_threshold_is_a_sentence() -> None:
    results = run_made.results()
    why = "No threshold was chosen: there are no validation groups."
    results["operating_points"] |= {"classes": None, "why_not": why, "chosen_on": None}
    assert why in page(results).text


# -------------------------------------------------------------------------------- who is named


def named_in(text: str) -> list[str]:
    """Names of the made run's patients in a page, whose pictures are not read."""
    lower = re.sub(r"base64,[^\"]+|#[0-9a-f]{6}\b", "", text).lower()
    return [name for name in run_made.NAMED if name in lower]


def test_no_identifier_is_in_a_report_without_pictures(tmp_path: Path) -> None:
    results = run_made.results()
    results["notes"] += [
        "The slide of Zimmermann, Anneliese was stained twice.",
        "Case b17_04821 has two labels.",
        "mesangial/P019_06.png cannot be read.",
        "A note that names nobody.",
    ]
    results["data"]["name"] = "483905"
    results["environment"]["device"] = str(tmp_path)
    folder = run_made.write_run(tmp_path / "run", results)
    text = write_report(folder).read_text("utf-8")
    assert not named_in(text)
    assert "A note that names nobody." in text
    assert text.count(WITHHELD) >= 6  # four notes, the data, the place
    assert "/home/x" not in text
    assert str(tmp_path) not in text
    results["per_class"]["Zimmermann Anneliese"] = results["per_class"].pop("viable")
    write_json(folder / "results.json", results)
    with pytest.raises(GloVLMError, match="rename the class and train again"):
        write_report(folder)


def test_pictures_are_the_images_that_were_named_wrong_surest_first(tmp_path: Path) -> None:
    folder = run_made.write_run(tmp_path / "run", images=True)
    first = write_report(folder).read_bytes()
    assert b"<img" not in first
    assert write_report(folder).read_bytes() == first
    shown = write_report(folder, with_images=True, output=tmp_path / "with.html").read_text("utf-8")
    made = run_made.predictions()
    sure, top = made.probabilities.max(1), made.probabilities.argmax(1)
    wrong = [i for i in np.argsort(-sure) if top[i] != made.labels[i]]
    mistakes = shown[shown.index('id="mistakes"') : shown.index("Examples named right")]
    named = re.findall(r"<small><bdi>([^<]+)</bdi>", mistakes)
    assert named == [made.file_names[i] for i in wrong]
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', mistakes)
    for i, text in zip(wrong, pictures, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert picture.size == (48, 40)
        expected = np.array([3 * i, 255 - 3 * i, 90])
        assert np.abs(np.asarray(picture, float).mean((0, 1)) - expected).max() < 4
    assert "no heat maps: the run kept no model" in shown
    assert "keep it where the images may be kept" in shown
    assert len(re.findall("<img", shown)) == len(wrong) + 6  # the surest and the least sure of each
    Image.new("RGB", (48, 40)).save(tmp_path / "images" / made.file_names[0])
    changed = write_report(folder, with_images=True).read_text("utf-8")
    assert "The pictures are left out: the data have changed" in changed
    assert "<img" not in changed
    assert not named_in(changed)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    gone = write_report(folder, with_images=True).read_text("utf-8")
    assert "The pictures are left out: the data are not where the run read them" in gone


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("kind", "words"),
    [("mil", "README.md"), ("slides", "glovlm sheet"), ("pretraining", "glovlm card"),
     ("export", "exported from"), ("bench", "something else")],
)  # fmt: skip
def test_what_has_no_report_says_what_to_use(
    tmp_path: Path, kind: str, words: str, glovlm: Callable[..., Any]
) -> None:
    write_json(tmp_path / "results.json", {"kind": kind})
    done = glovlm("report", tmp_path)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "report.html").exists()


def test_a_report_lies_where_it_is_asked_for_and_replaces_nothing_of_others(
    tmp_path: Path, glovlm: Callable[..., Any]
) -> None:
    folder = run_made.write_run(tmp_path / "run")
    done = glovlm("report", folder)
    assert done.code == 0
    assert str(folder / "report.html") in done.err
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    done = glovlm("report", folder, "--output", mine)
    assert done.code == 2
    assert mine.read_text() == "<html>mine</html>"
    measured = tmp_path / "new.json"
    write_json(measured, run_made.results(kind="evaluation"))
    assert glovlm("report", measured).code == 0
    assert RESEARCH in (tmp_path / "new.html").read_text("utf-8")
    write_json(tmp_path / "study" / "report.json", {"kind": "study"})
    assert "run `glovlm study` again" in glovlm("report", tmp_path / "study").err
    with pytest.raises(GloVLMError, match="nothing at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(GloVLMError, match=r"no results\.json"):
        write_report(tmp_path)
    broken = run_made.results()
    del broken["metrics"]["accuracy"]
    with pytest.raises(GloVLMError, match=r"KeyError.*glovlm evaluate"):
        render_run(broken)
    assert json.loads((folder / "results.json").read_text())["kind"] == "adaptation"


def test_many_classes_and_patients_stay_small(tmp_path: Path) -> None:
    results = run_made.results()
    many = [f"class {k} of a long name, as people give it" for k in range(40)]
    row, curve = results["per_class"]["viable"], results["curves"]["classes"]["viable"]
    results |= {
        "per_class": dict.fromkeys(many, row),
        "prior": dict.fromkeys(many, 1 / 40),
        "confusion_matrix": np.full((40, 40), 2).tolist(),
        "per_group": [{"n": 12, "right": 7}] * 2000,
        "curves": results["curves"] | {"classes": dict.fromkeys(many, curve)},
        "operating_points": None,
    }
    del results["operating_points"]
    results["data"]["drawn"]["test"] = [[1, 1, 1]] * 2000
    results["data"]["groups"]["test"] = 2000
    text = render_run(results)
    assert len(text.encode()) < 5_000_000
    shown = Page(text)
    assert shown.tags.count("svg") <= 2 + 2 * 12
    assert "28 are not" in shown.text
    assert "1700 more patients are not drawn" in shown.text


def test_the_documentation_explains_each_measure_in_the_same_words() -> None:
    folder = Path(__file__).resolve().parent.parent / "docs"
    page = (folder / "reading-results.md").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", page)
    for text in [*READING.values(), *(f"{m.definition} {m.reading}" for m in METRICS.values())]:
        assert re.sub(r"\s+", " ", text) in words
    for name in re.findall(r"\]\((_static/[^)]+)\)", page):
        assert (folder / name).is_file()
        assert "simulated" in page[: page.index(name)].splitlines()[-1]


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    folder = run_made.write_run(tmp_path / "run", images=True)
    check_page(write_report(folder, with_images=True), what="run-report")
