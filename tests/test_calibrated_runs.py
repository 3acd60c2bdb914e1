"""What goes on top of a run: calibration on further groups, prevalence, sets, and choosing."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CLASSES, tiny_clip, tiny_images, tiny_pair
from transformers import AutoModelForImageClassification

from hf_glovlm.cli import app
from hf_glovlm.curves import choose_thresholds
from hf_glovlm.data import all_rows, load_dataset, save_episodes
from hf_glovlm.data.splits import draw_episode, reserve_calibration
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import Predictions, load_classifier, predict
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 48 images, 12 patients."""
    folder = tmp_path_factory.mktemp("data") / "images"
    return tiny_images(folder, per_class=48, groups=12, size=24)


def make(images: Path, output: Path, **settings: Any) -> TrainConfig:
    values: dict[str, Any] = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 20}
    return TrainConfig(data=str(images), output_dir=str(output), **{**values, **settings})


def test_a_calibrated_run_keeps_what_it_fitted_on_groups_of_its_own(
    images: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"calibration_groups": 3, "conformal": "aps", "max_risk": 0.5}
    results = run(make(images, tmp_path / "run", **settings, per_class=True))
    facts = results["calibration"]
    assert facts["n"] == sum(results["data"]["counts"]["calibration"].values()) == 36
    assert facts["groups"] == results["data"]["groups"]["calibration"] == 3
    assert results["data"]["support"]["calibration_labels"] == 36
    assert results["data"]["support"]["label_budget"] == 6 + 36
    assert facts["nll"]["after"] <= facts["nll"]["before"]
    assert {*CLASSES} == set(facts["coverage_range"])
    assert results["sets"]["coverage"] >= 0.7
    assert 0 <= results["abstention"]["coverage"] <= 1
    assert any("Calibrated on 36 images of 3 groups" in note for note in results["notes"])

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.temperature != 1.0
    assert model.config.calibration["conformal"]["method"] == "aps"
    points = results["operating_points"]
    assert points["chosen_on"] == "36 calibration images of 3 groups"
    drawn = results["data"]["drawn"]
    assert sorted(map(sum, drawn["calibration"])) == [12, 12, 12]
    assert [len(groups) for groups in drawn.values()] == list(results["data"]["groups"].values())
    # chosen on probabilities as the model states them: the very ones that it predicts
    episodes = json.loads((tmp_path / "run" / "episodes.json").read_text())
    held = episodes["draws"][0]["calibration"]
    rows = all_rows(load_dataset(images))
    rows = rows.select([i for i, name in enumerate(rows["file_name"]) if name in held])
    answers = predict(*load_classifier(tmp_path / "run")[:2], rows)
    chosen = choose_thresholds(rows["label"], answers.probabilities, CLASSES)
    stated = {name: row["threshold"] for name, row in points["classes"].items()}
    assert stated == pytest.approx(chosen, abs=1e-5)
    plain = run(make(images, tmp_path / "plain"))
    assert "calibration" not in plain
    assert plain["abstention"].keys() == {"aurc"}
    assert plain["operating_points"]["classes"] is None
    assert "--calibration-groups" in plain["operating_points"]["why_not"]


def test_predict_gives_sets_and_says_where_it_abstains(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"calibration_groups": 3, "conformal": "lac", "max_risk": 0.5}
    run(make(images, tmp_path / "run", **settings))
    output = tmp_path / "said.csv"
    arguments = ["predict", str(tmp_path / "run"), str(images / CLASSES[0]), "--output", output]
    assert app.main([str(argument) for argument in arguments]) == 0
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert len(rows) == 48
    for row in rows:
        assert set(row["set"].split(" or ")) <= {*CLASSES, "none"}
        assert row["answers"] in ("yes", "no")
    capsys.readouterr()


def test_the_calibration_of_frozen_episodes_comes_from_groups_that_are_left(
    images: Path, tmp_path: Path
) -> None:
    rows = all_rows(load_dataset(images))
    episode = draw_episode(rows, shots=1, seed=0, shots_from="one_group", test_fraction=0.3)
    save_episodes(tmp_path / "frozen.json", [episode], rows, "tiny")
    reserved = reserve_calibration(rows, episode, 2, seed=0)
    settings: dict[str, Any] = {"episodes": str(tmp_path / "frozen.json"), "shots": 1}
    results = run(make(images, tmp_path / "run", **settings, calibration_groups=2))
    assert results["calibration"]["n"] == len(reserved.calibration)
    assert (
        results["data"]["split_hash"]
        == run(make(images, tmp_path / "b", **settings))["data"]["split_hash"]
    )


@pytest.mark.parametrize("prior", ["em", {"crescentic": 0.8, "sclerotic": 0.1, "viable": 0.1}])
def test_a_prevalence_moves_the_probabilities_and_stays_with_the_model(
    images: Path, tmp_path: Path, prior: Any
) -> None:
    if isinstance(prior, dict):
        prior = dict(zip(CLASSES, (0.8, 0.1, 0.1), strict=True))
    plain = run(make(images, tmp_path / "plain"))
    moved = run(make(images, tmp_path / "moved", prior=prior))
    about = moved["prior_correction"]
    assert sum(about["prevalence"].values()) == pytest.approx(1)
    assert about.get("transductive", False) == (prior == "em")
    assert any("results are transductive" in note for note in moved["notes"]) == (prior == "em")
    before, after = (
        Predictions.load(tmp_path / name / "predictions.parquet") for name in ("plain", "moved")
    )
    share = np.array([about["prevalence"][name] for name in after.class_names])
    expected = before.probabilities * share
    expected /= expected.sum(1, keepdims=True)
    assert np.abs(after.probabilities - expected).max() < 1e-5
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "moved" / "model")
    assert model.config.prior_shift == pytest.approx(np.log(share * len(share)).tolist(), abs=1e-5)
    assert plain["metrics"]["macro_auc"]["value"] is not None


def test_a_transductive_run_is_measured_on_its_queries_and_says_so(
    images: Path, tmp_path: Path
) -> None:
    results = run(make(images, tmp_path / "run", method="transclip"))
    assert results["transductive"]["query_images"] == results["n"]
    assert "all test images together" in results["operating_points"]["why_not"]
    assert "macro_auc" in results["transductive"]["saved_model_alone"]
    assert any("no longer transductive" in note for note in results["notes"])
    stored = Predictions.load(tmp_path / "run" / "predictions.parquet")
    assert stored.labels is not None
    accuracy = float((stored.probabilities.argmax(1) == stored.labels).mean())
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)


def test_a_declared_prevalence_reaches_what_a_transductive_method_says(
    images: Path, tmp_path: Path
) -> None:
    share = dict(zip(CLASSES, (0.8, 0.1, 0.1), strict=True))
    run(make(images, tmp_path / "plain", method="transclip"))
    run(make(images, tmp_path / "moved", method="transclip", prior=share))
    plain, moved = (
        Predictions.load(tmp_path / name / "predictions.parquet") for name in ("plain", "moved")
    )
    expected = plain.probabilities * np.array([share[name] for name in plain.class_names])
    expected /= expected.sum(1, keepdims=True)
    assert np.abs(moved.probabilities - expected).max() < 1e-4


def test_sampled_prompt_sets_give_a_spread(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(
        json.dumps(
            {"classes": {name: {"prompts": [name, f"a {name} glomerulus"]} for name in CLASSES}}
        )
    )
    settings: dict[str, Any] = {"prompts": str(tmp_path / "classes.yaml"), "method": "zero_shot"}
    config = make(images, tmp_path / "run", **settings, method_config={"prompt_sets": 5}, shots=0)
    observed = run(config)["prompt_sets"]
    assert observed["sets"] == 5
    low, high = observed["macro_auc"]["range"]
    assert low <= observed["macro_auc"]["median"] <= high


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cross_validate": True, "shots": 4}, "leaving out each of"),
        ({"cross_validate": True, "shots": 2}, "kept at their defaults"),
        ({"validation_shots": 2}, "chosen on the validation labels"),
        ({"validation_shots": 2, "method": "prototype"}, "were not used, but count"),
        ({"max_steps": 3, "method": "classifier"}, "Cut to 3 of the recipe's 20 steps"),
        ({"max_steps": 3, "method": "lora"}, "Cut to 3 of the recipe's"),
        ({"backbone": "pair", "method": "gda"}, "stood in for the class texts"),
    ],
)
def test_how_settings_came_about_is_said(
    images: Path, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    if settings.get("backbone") == "pair":
        settings = {**settings, "backbone": tiny_pair()}
    results = run(make(images, tmp_path / "run", **settings))
    assert any(sentence in note for note in results["notes"])
    if "validation_shots" in settings:
        assert results["operating_points"]["chosen_on"].startswith("6 validation images")
    if "max_steps" in settings:
        assert results["training"]["recipe"]["steps"] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"conformal": "lac"}, "--calibration-groups 1 or more"),
        ({"conformal": "lap", "calibration_groups": 1}, "Did you mean 'lac'"),
        ({"max_risk": 0.1}, "max_risk is calibrated on groups"),
        ({"alpha": 1.0}, "alpha must be above 0 and below 1"),
        ({"prior": "most"}, "prior must be 'em' or a fraction"),
        ({"prior": "em", "conformal": "lac", "calibration_groups": 2}, "prior 'em' is found on"),
        ({"prior": {CLASSES[0]: 1.0}}, "no fraction for"),
        ({"cross_validate": True, "validation_shots": 1}, "not both"),
        ({"cross_validate": True, "method": "zs_lp"}, "no setting to choose.*linear_probe"),
        ({"cross_validate": True, "method": "lora"}, "no setting to choose"),
        ({"method": "transclip", "calibration_groups": 2}, "judges the test images together"),
        ({"augment": True, "method": "linear_probe"}, "--augment would change nothing"),
        ({"augment": True, "method": "prompt_tuning"}, "--augment would change nothing"),
        ({"method": "gda", "lr": 0.1, "epochs": 3}, "has no epochs, lr to set"),
        ({"method": "prograd", "accumulate": 2}, "needs whole batches"),
        ({"method": "biomedcoop", "loss": "infonce"}, "needs whole batches"),
        ({"conformal": "lac", "alpha": 0.02, "calibration_groups": 1}, "49 calibration"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(GloVLMError, match=words):
        run(make(images, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
