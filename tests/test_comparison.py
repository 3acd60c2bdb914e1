"""Runs and studies beside each other, against plain loops and tables made by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import check_page
from scipy.stats import binomtest, t
from study_made import made_outcome, numbers_of_page, numbers_of_results

from hf_glovlm import compare_runs
from hf_glovlm.cli.app import main
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import Predictions
from hf_glovlm.metrics import PairedRun, adjust_holm, compute_metrics, paired_differences
from hf_glovlm.reports.comparison import render_comparison
from hf_glovlm.runs.comparison import Comparison


def predictions(skill: float, *, draw: int = 0, **options: Any) -> Predictions:
    one = made_outcome(draw, skill, **options)
    return Predictions(
        one.probabilities,
        np.log(one.probabilities).astype(np.float32),
        list(one.class_names),
        list(one.file_names),
        groups=list(one.groups),
        labels=one.labels,
    )


def saved(folder: Path, **runs: Predictions) -> list[Path]:
    paths = [folder / f"{name}.parquet" for name in runs]
    for path, run in zip(paths, runs.values(), strict=True):
        run.save(path)
    return paths


def part(run: Predictions, rows: list[int]) -> Predictions:
    assert run.labels is not None
    assert run.groups is not None
    return Predictions(
        run.probabilities[rows], run.logits[rows], run.class_names,
        [run.file_names[i] for i in rows], groups=[run.groups[i] for i in rows],
        labels=run.labels[rows],
    )  # fmt: skip


def one_line(comparison: Comparison) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reference, and the other run."""
    (line,) = comparison["lines"]
    reference, other = line["runs"]
    return reference, other


def balanced_accuracy(labels: Any, p: Any) -> float:
    right = p.argmax(1) == labels
    return float(np.mean([right[labels == k].mean() for k in np.unique(labels)]))


def test_a_difference_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    a, b = predictions(0.5, patients=20), predictions(0.9, patients=20)
    assert a.groups is not None
    reference, other = one_line(compare_runs(*saved(tmp_path, a=a, b=b)))
    row = other["versus_reference"]["metrics"]["balanced_accuracy"]
    both = [balanced_accuracy(a.labels, one.probabilities) for one in (a, b)]
    assert reference["metrics"]["balanced_accuracy"]["value"] == pytest.approx(both[0])
    assert other["metrics"]["balanced_accuracy"]["value"] == pytest.approx(both[1])
    assert row["value"] == pytest.approx(both[1] - both[0])

    names, rng, drawn = sorted(set(a.groups)), np.random.default_rng(8), []
    for _ in range(600):
        rows = np.concatenate(
            [np.flatnonzero(np.array(a.groups) == name) for name in rng.choice(names, len(names))]
        )
        values = [balanced_accuracy(a.labels[rows], one.probabilities[rows]) for one in (a, b)]  # type: ignore[index]
        drawn.append(values[1] - values[0])
    error = np.std(drawn) * np.sqrt(20 / 19)  # patients of one size
    half = t.ppf(0.975, 19) * error
    assert row["ci95"] == pytest.approx([row["value"] - half, row["value"] + half], abs=0.15 * half)
    assert row["p_value"] == pytest.approx(2 * t.sf(row["value"] / error, 19), rel=0.5, abs=0.01)


def test_images_of_their_own_are_as_mcnemar_says(tmp_path: Path) -> None:
    a, b = (predictions(s, patients=240, per_patient=1) for s in (0.6, 0.75))
    comparison = compare_runs(*saved(tmp_path, a=a, b=b), metrics=["accuracy"])
    _, other = one_line(comparison)
    versus, counts = other["versus_reference"], [0, 0]
    assert a.labels is not None
    for label, p, q in zip(a.labels, a.probabilities, b.probabilities, strict=True):
        if (p.argmax() == label) != (q.argmax() == label):
            counts[int(q.argmax() == label)] += 1
    assert [versus["only_reference"], versus["only_own"]] == counts
    exact = binomtest(counts[1], sum(counts)).pvalue
    assert 0.01 < exact < 0.9  # else nothing would be shown
    assert versus["metrics"]["accuracy"]["p_value"] == pytest.approx(exact, abs=0.08)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_p_value_is_small_where_the_interval_excludes_0(seed: int) -> None:
    one, other = made_outcome(0, 0.4, seed=seed), made_outcome(0, 0.8, seed=seed)
    run = PairedRun(0, one.labels, one.groups, one.probabilities, other.probabilities)
    for row in paired_differences([run], n_resamples=200).values():
        low, high = row["ci95"]
        assert (row["p_value"] < 0.05) == (low > 0 or high < 0)


def test_each_side_has_the_interval_that_it_has_alone() -> None:
    one, other = made_outcome(0, 0.4), made_outcome(0, 0.9)
    run = PairedRun(0, one.labels, one.groups, one.probabilities, other.probabilities)
    row = paired_differences([run], n_resamples=2000)["macro_auc"]
    for side, p in (("a", one.probabilities), ("b", other.probabilities)):
        alone = compute_metrics(one.labels, p, groups=one.groups)["metrics"]["macro_auc"]
        assert row[side]["value"] == pytest.approx(alone["value"])
        assert row[side]["ci95"] == pytest.approx(alone["ci95"], abs=0.02)


def test_holm_adjusts_as_its_table_says() -> None:
    # R: p.adjust(c(.04, .01, .03, .005), "holm"); one that is not there does not count
    assert adjust_holm([0.04, 0.01, None, 0.03, 0.005]) == pytest.approx(
        [0.06, 0.03, None, 0.06, 0.02]
    )
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_several_runs_are_adjusted_together(tmp_path: Path) -> None:
    runs = {name: predictions(s) for name, s in (("a", 0.3), ("b", 1.2), ("c", 0.5), ("d", 0.9))}
    (line,) = compare_runs(*saved(tmp_path, **runs), n_resamples=100)["lines"]
    for metric in ("macro_auc", "balanced_accuracy"):
        of = [run["versus_reference"] for run in line["runs"][1:]]
        raw = [one["metrics"][metric]["p_value"] for one in of]
        largest = 0.0
        for rank, at in enumerate(np.argsort(raw)):
            largest = max(largest, min(1, (3 - rank) * raw[at]))
            assert of[at]["p_holm"][metric] == pytest.approx(largest)


# ------------------------------------------------------------------------- what may be compared


def test_other_test_images_are_refused_and_their_shared_ones_compared(tmp_path: Path) -> None:
    a, b = predictions(0.5), predictions(0.9)
    n = len(a.file_names)
    paths = saved(tmp_path, a=part(a, [*range(n - 6)]), b=part(b, [*range(n - 1, 5, -1)]))
    with pytest.raises(GloVLMError, match=rf"'a' on {n - 6}, 'b' on {n - 6}; {n - 12} are shared"):
        compare_runs(*paths)
    comparison = compare_runs(*paths, shared=True)
    assert any(f"on the {n - 12} shared" in note for note in comparison["notes"])
    same = [*range(6, n - 6)]
    whole = compare_runs(*saved(tmp_path, c=part(a, same), d=part(b, same)))
    for ours, theirs in zip(one_line(comparison), one_line(whole), strict=True):
        assert ours["metrics"] == theirs["metrics"]
        assert ours["versus_reference"] == theirs["versus_reference"]
    elsewhere = part(b, same)
    elsewhere.file_names = [f"other {name}" for name in elsewhere.file_names]
    with pytest.raises(GloVLMError, match=r"0 are shared by all\.$"):
        compare_runs(*saved(tmp_path, e=a, f=elsewhere), shared=True)


def test_the_order_of_classes_and_images_does_not_matter(tmp_path: Path) -> None:
    a, b = predictions(0.5), predictions(0.9)
    assert b.labels is not None
    turned = part(b, [*range(len(b.file_names))][::-1])
    turned = replace(
        turned, probabilities=turned.probabilities[:, ::-1], logits=turned.logits[:, ::-1],
        class_names=b.class_names[::-1], labels=2 - np.asarray(turned.labels),
    )  # fmt: skip
    plain, other = (
        compare_runs(*saved(tmp_path, a=a, b=one), n_resamples=50)["lines"] for one in (b, turned)
    )
    assert plain == other


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": np.zeros(72, np.int64)}, "48 of 72 test images have other labels in 'b'"),
        ({"groups": ["one"] * 72}, "72 of 72 test images have other patients or groups"),
        ({"class_names": ["x", "y", "z"]}, "only runs of the same classes"),
        ({"labels": None}, "must have been measured"),
        ({"file_names": ["a.png"] * 72}, "of one name"),
    ],
    ids=["labels", "groups", "classes", "unlabelled", "names"],
)
def test_what_is_no_pair_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, a=predictions(0.5), b=replace(predictions(0.9), **change))
    with pytest.raises(GloVLMError, match=sentence):
        compare_runs(*paths)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, a=predictions(0.5))
    evaluation = tmp_path / "results.json"
    evaluation.write_text(json.dumps({"kind": "evaluation", "metrics": {}}))
    for sources, sentence in (
        ([path], "two runs or more"),
        ([path, path], "comes twice"),
        ([path, tmp_path / "nothing"], "found nothing at"),
        ([path, evaluation], "--predictions FILE.parquet"),
    ):
        with pytest.raises(GloVLMError, match=sentence):
            compare_runs(*sources)
    with pytest.raises(GloVLMError, match="2 different names"):
        compare_runs(path, tmp_path / "b", names=["x", "x"])


# --------------------------------------------------------------------------------------- studies


def write_cells(folder: Path, skills: dict[str, float], draws: int = 2) -> Path:
    """A finished study: its cells alone, and that it is one."""
    folder.mkdir()
    (folder / "report.json").write_text('{"kind": "study"}')
    for method, skill in skills.items():
        for draw in range(draws):
            one = made_outcome(draw, skill)
            cell = folder / "cells" / "mini" / method / "8" / f"draw-{draw:02d}"
            cell.mkdir(parents=True)
            (cell / "results.json").write_text(json.dumps({"kind": "adaptation", **one.results}))
            predictions(skill, draw=draw).save(cell / "predictions.parquet")
    return folder


def test_studies_are_compared_line_by_line(tmp_path: Path) -> None:
    ours = write_cells(tmp_path / "ours", {"gda": 0.5, "lora": 0.8, "prompt": 0.2})
    theirs = write_cells(tmp_path / "theirs", {"gda": 0.9, "lora": 0.85})
    comparison = compare_runs(ours, theirs, n_resamples=60)
    assert [line["line"] for line in comparison["lines"]] == [
        "gda, mini, 8 shots",
        "lora, mini, 8 shots",
    ]
    runs = [(made_outcome(draw, 0.5), made_outcome(draw, 0.9)) for draw in range(2)]
    pairs = [
        PairedRun(draw, a.labels, a.groups, a.probabilities, b.probabilities)
        for draw, (a, b) in enumerate(runs)
    ]
    expected = paired_differences(pairs, n_resamples=60, unit="patients")
    of = comparison["lines"][0]["runs"][1]["versus_reference"]["metrics"]
    for name, row in expected.items():
        assert of[name] == {k: v for k, v in row.items() if k not in ("a", "b")}

    alone = write_cells(tmp_path / "alone", {"bitfit": 0.6})
    with pytest.raises(GloVLMError, match="share no backbone, method and shots"):
        compare_runs(ours, alone)
    single = write_cells(tmp_path / "single", {"gda": 0.5})
    assert any("bitfit" in note for note in compare_runs(single, alone, n_resamples=20)["notes"])
    (run,) = saved(tmp_path, run=predictions(0.5))
    with pytest.raises(GloVLMError, match="'ours' is a study and 'run' is none"):
        compare_runs(ours, run)


# -------------------------------------------------------------------------- what people read of it


def test_the_table_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = saved(tmp_path, a=predictions(0.5), **{"b" * 60: predictions(0.9)})
    page = tmp_path / "page.html"
    command = ["compare", *map(str, paths), "--n-resamples", "50", "--html", str(page)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if not line.endswith(".")]
    assert max(map(len, tables)) <= 80
    comparison = compare_runs(*paths, n_resamples=50)
    _, other = one_line(comparison)
    row = other["versus_reference"]["metrics"]["macro_auc"]
    low, high = row["ci95"]
    assert f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}]" in printed
    assert page.read_text() == render_comparison(comparison)
    numbers = numbers_of_page(page.read_text())
    assert len(numbers) > 15
    assert numbers <= numbers_of_results(comparison.to_dict())
    assert main([*command[:-2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(comparison.to_dict()))
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    assert main([*command[:-1], str(notes)]) == 2
    assert notes.read_text() == "mine"


HOSTILE = "<img src=x onerror=alert(1)> $x_{1}$ & \"'"


@pytest.mark.browser
def test_a_page_of_hostile_names_shows_them_as_they_are(tmp_path: Path) -> None:
    paths = saved(tmp_path, a=predictions(0.5), b=predictions(0.9))
    comparison = compare_runs(*paths, names=[HOSTILE, "b"], n_resamples=20)
    page = tmp_path / "page.html"
    page.write_text(render_comparison(comparison))
    assert "<img" not in page.read_text()
    check_page(page, what="comparison", screens=[(390, True)])
