"""The whole job: from a folder to a measured, saved model, or one sentence and nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fresh_process import inherited, run_script
from tiny import CLASSES, tiny_bert, tiny_clip, tiny_dinov2, tiny_images, tiny_pair
from tolerance import assert_same_numbers
from transformers import AutoModelForImageClassification

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import (
    all_rows,
    draw_episode,
    group_rows,
    load_dataset,
    save_episodes,
    split_hash,
)
from hf_glovlm.data.folder import column
from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import UNFINISHED
from hf_glovlm.inference import Predictions, predict, prediction
from hf_glovlm.methods import METHODS, FeatureMethod
from hf_glovlm.metrics import METRICS
from hf_glovlm.model import GloVLMProcessor
from hf_glovlm.runs import OWN_FILES, run
from hf_glovlm.runs.config import TrainConfig

OF_COSINES = {name for name, row in METRICS.items() if row.of_similarities}
OF_GRADES = {name for name, row in METRICS.items() if row.of_grades}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images")


def make(images: Path, output: Path, **settings: Any) -> TrainConfig:
    values: dict[str, Any] = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 20}
    return TrainConfig(data=str(images), output_dir=str(output), **{**values, **settings})


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Killed(BaseException):
    """Like Ctrl-C: nothing below may catch it."""


def kill_after(epoch: int) -> Callable[[str, dict[str, Any]], None]:
    def stop(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch" and what["epoch"] == epoch:
            raise Killed

    return stop


# ---------------------------------------------------------------------------------- what comes out


def test_a_run_leaves_model_results_predictions_and_how_to_repeat_it(
    images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "run"
    events: list[tuple[str, dict[str, Any]]] = []
    config = make(images, output, method="lora", epochs=2, backbone=tiny_pair())
    results = run(config, on_event=lambda kind, what: events.append((kind, what)))

    assert held(output) == set(OWN_FILES)
    assert not [n for n in content(output) if n.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    assert json.loads((output / "results.json").read_text()) == results
    assert yaml.safe_load((output / "config.yaml").read_text()) == results["config"]
    assert len((output / "log.jsonl").read_text().splitlines()) == 2

    model = AutoModelForImageClassification.from_pretrained(output / "model").eval()
    processor = GloVLMProcessor.from_pretrained(output / "model")
    stored = Predictions.load(output / "predictions.parquet")
    rows = all_rows(load_dataset(images))
    position = {name: i for i, name in enumerate(column(rows, "file_name"))}
    test = rows.select([position[name] for name in stored.file_names])
    again = predict(model, processor, test)
    assert_same_numbers(again.logits, stored.logits)
    assert stored.labels is not None
    assert stored.labels.tolist() == column(test, "label")
    accuracy = float((stored.probabilities.argmax(1) == stored.labels).mean())
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)

    kinds = [kind for kind, _ in events]
    assert kinds.count("episode") == 1
    assert [what["epoch"] for kind, what in events if kind == "epoch"] == [1, 2]
    assert kinds.count("stage") >= 4


# One method of each family; what is written does not depend on the others.
FAMILIES = {method.family: name for name, method in reversed(METHODS.items())}


@pytest.mark.parametrize(
    "method",
    [
        name
        if name in FAMILIES.values() or method.transductive
        else pytest.param(name, marks=pytest.mark.long)
        for name, method in METHODS.items()
    ],
)
def test_results_say_what_the_contract_says(method: str, images: Path, tmp_path: Path) -> None:
    shots = 0 if method == "zero_shot" else 2
    trained = {} if isinstance(METHODS[method], FeatureMethod) else {"epochs": 1}
    results = run(make(images, tmp_path / "run", method=method, shots=shots, **trained))
    head = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["head"]
    absent = OF_GRADES if head.get("cosine") else OF_GRADES | OF_COSINES
    assert set(results["not_computed"]) == absent
    assert set(results["metrics"]) == set(METRICS) - absent
    if METHODS[method].transductive:
        assert results["transductive"]["query_images"] == results["n"]
    for metric in results["metrics"].values():
        assert {"value", "ci95", "note", "undefined_resamples"} <= set(metric)
    assert set(results["per_class"]) == set(CLASSES)
    data = results["data"]
    assert {
        *("name", "fingerprint", "classes", "counts", "groups", "group_column", "split_hash"),
        *("support", "support_groups_sha256", "shots", "sampler", "notes"),
    } <= set(data)
    assert [c["name"] for c in data["classes"]] == list(CLASSES)
    assert data["group_column"] == "patient_id"
    assert data["counts"]["support"] == dict.fromkeys(CLASSES, shots)
    assert data["support"]["labels_per_class"] == dict.fromkeys(CLASSES, shots)
    assert data["support"]["label_budget"] == 3 * shots
    assert sum(data["counts"]["test"].values()) == sum(map(sum, results["confusion_matrix"]))
    assert len(results["reliability"]["bins"]) == 15
    assert results["prior"].keys() == set(CLASSES)
    assert results["threshold"]
    assert results["synthetic"] is False
    assert results["environment"]["num_processes"] == 1
    assert {"torch", "transformers", "peft", "hf_glovlm", "device"} <= set(results["environment"])
    assert {"data", "load", "adapt", "predict", "metrics", "total", "peak_memory_mib"} <= set(
        results["timing"]
    )
    assert results["method"]["name"] == method
    assert results["backbone"]["name"] == "tiny_clip"
    trains = results["training"]
    assert (trains["trainable_parameters"] == 0) == (method == "zero_shot")
    assert trains["epochs_run"] == (0 if isinstance(METHODS[method], FeatureMethod) else 1)
    assert str(tmp_path) not in json.dumps({k: v for k, v in results.items() if k != "config"})
    adapter = (tmp_path / "run" / "adapter").is_dir()
    assert adapter == METHODS[method].saves_adapter


def test_support_groups_are_hashed_and_on_no_other_side(images: Path, tmp_path: Path) -> None:
    results = run(make(images, tmp_path / "run"))
    stored = Predictions.load(tmp_path / "run" / "predictions.parquet")
    assert stored.groups is not None
    tested = {sha256(group.encode()).hexdigest() for group in stored.groups}
    learned = results["data"]["support_groups_sha256"]
    known = {sha256(f"patient_{i}".encode()).hexdigest() for i in range(4)}
    assert learned == sorted(learned)
    assert learned
    assert set(learned) <= known - tested
    assert not any(f"patient_{i}" in json.dumps(results.to_dict()) for i in range(4))


def test_predictions_are_those_of_the_test_rows_in_order(images: Path, tmp_path: Path) -> None:
    results = run(make(images, tmp_path / "run", seed=3))
    rows = all_rows(load_dataset(images))
    episode = draw_episode(rows, shots=2, seed=3)
    stored = Predictions.load(tmp_path / "run" / "predictions.parquet")
    names = column(rows, "file_name")
    assert stored.file_names == [names[i] for i in episode.test]
    assert stored.groups == [group_rows(rows).ids[i] for i in episode.test]
    assert results["data"]["split_hash"] == split_hash(rows, episode)


def test_every_stage_of_a_run_is_the_public_function_of_that_name(
    images: Path, tmp_path: Path
) -> None:
    """A run is draw, load, adapt, predict and measure, with nothing in between."""
    from hf_glovlm.data import load_classes
    from hf_glovlm.metrics import compute_metrics
    from hf_glovlm.training import adapt

    results = run(make(images, tmp_path / "run", method="classifier", epochs=3, seed=1))
    rows = all_rows(load_dataset(images))
    episode = draw_episode(rows, shots=2, seed=1)
    model, processor = load_backbone(str(tiny_clip()))
    adapted = adapt(
        model,
        "classifier",
        rows.select(episode.support),
        processor=processor,
        classes=load_classes(list(CLASSES), source=images),
        config={"recipe": {"epochs": 3}, "seed": 1},
    )
    groups = [group_rows(rows).ids[i] for i in episode.test]
    found = predict(adapted.model, processor, rows.select(episode.test), groups=groups)
    stored = Predictions.load(tmp_path / "run" / "predictions.parquet")
    # Two trainings: AdamW divides by the size of a gradient, so a last bit grows to some 1e-4.
    np.testing.assert_allclose(found.probabilities, stored.probabilities, rtol=0, atol=2e-3)
    assert found.labels is not None
    measured = compute_metrics(
        found.labels,
        stored.probabilities,
        groups=groups,
        class_names=list(CLASSES),
        n_resamples=20,
        seed=1,
    )
    assert measured["metrics"] == results["metrics"]


# --------------------------------------------------------------------------------------- repeating


@pytest.mark.parametrize("method", ["classifier", "lora"])
def test_config_yaml_repeats_the_run_exactly(method: str, tmp_path: Path) -> None:
    settings = {"hidden": 8} if method == "classifier" else {"r": 2}
    many = tiny_images(tmp_path / "many", per_class=12, groups=6)
    config = make(
        many,
        tmp_path / "a",
        method=method,
        shots={"mesangial": 2, "sclerosed": 1, "viable": 3},
        seed=5,
        draw=2,
        lr=3e-3,
        epochs=2,
        batch_size=3,
        method_config=settings,
        shots_from="random",
        validation_shots=1,
        clip_norm=1.0,
        overwrite=True,
    )
    first = run(config)
    values = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert values["overwrite"] is False  # repeating a run must not remove it
    assert set(values) == {f.name for f in fields(TrainConfig)}
    second = run(TrainConfig.from_mapping({**values, "output_dir": str(tmp_path / "b")}))
    for part in ("metrics", "per_class", "data", "confusion_matrix", "training"):
        assert first[part] == second[part], part
    a, b = (content(tmp_path / name) for name in "ab")
    assert a["predictions.parquet"] == b["predictions.parquet"]
    assert a["model/model.safetensors"] == b["model/model.safetensors"]
    assert a["episodes.json"] == b["episodes.json"]


def test_another_seed_or_draw_is_another_run(images: Path, tmp_path: Path) -> None:
    splits = {
        run(make(images, tmp_path / f"{seed}-{draw}", seed=seed, draw=draw))["data"]["split_hash"]
        for seed, draw in ((0, 0), (0, 1), (1, 0))
    }
    assert len(splits) == 3


def test_a_frozen_episode_is_applied_exactly(images: Path, tmp_path: Path) -> None:
    rows = all_rows(load_dataset(images))
    episodes = [draw_episode(rows, shots=2, seed=11, draw=d) for d in range(3)]
    save_episodes(tmp_path / "frozen.json", episodes, rows, "images")
    for draw in (0, 2):
        output = tmp_path / f"run{draw}"
        config = make(images, output, episodes=str(tmp_path / "frozen.json"), draw=draw, seed=99)
        results = run(config)
        assert results["data"]["split_hash"] == split_hash(rows, episodes[draw])
        frozen = json.loads((tmp_path / "frozen.json").read_text())["draws"][draw]
        (written,) = json.loads((output / "episodes.json").read_text())["draws"]
        assert written["support"] == frozen["support"]
        assert written["test_groups"] == frozen["test_groups"]
    # What a run writes can be given to the next.
    again = run(
        make(images, tmp_path / "again", episodes=str(tmp_path / "run2" / "episodes.json"), draw=2)
    )
    assert again["data"]["split_hash"] == split_hash(rows, episodes[2])


def test_a_given_split_is_respected(images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "split"))
    lines = (folder / "metadata.csv").read_text().splitlines()
    split = ["split", *("test" if line.endswith("patient_1") else "train" for line in lines[1:])]
    joined = "\n".join(f"{a},{b}" for a, b in zip(lines, split, strict=True))
    (folder / "metadata.csv").write_text(joined + "\n")
    results = run(make(folder, tmp_path / "run", seed=4))
    stored = Predictions.load(tmp_path / "run" / "predictions.parquet")
    assert stored.groups is not None
    assert set(stored.groups) == {"patient_1"}
    assert len(stored.file_names) == 6
    learned = results["data"]["support_groups_sha256"]
    assert sha256(b"patient_1").hexdigest() not in learned


def test_validation_images_count_as_labels_and_stop_early(images: Path, tmp_path: Path) -> None:
    many = tiny_images(tmp_path / "many", per_class=12, groups=6)
    config = make(many, tmp_path / "run", method="classifier", validation_shots=1, epochs=12)
    results = run(config)
    assert results["data"]["support"]["validation_labels"] == 3
    assert results["data"]["support"]["label_budget"] == 9
    rows = [json.loads(r) for r in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all("validation_macro_auc" in row for row in rows)
    assert results["training"]["epochs_run"] == len(rows) <= 12


# ------------------------------------------------------------------------------ the output folder


def test_an_occupied_folder_is_left_alone(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(make(images, output))
    before = content(output)
    with pytest.raises(GloVLMError, match=r"already holds a run: give --overwrite.*--resume"):
        run(make(images, output))
    assert content(output) == before


def test_overwriting_replaces_all_of_a_run_and_nothing_else(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(make(images, output, method="lora", epochs=1))
    (output / "README.md").write_text("the card of the LoRA run")
    (output / "report.html").write_text("the report of the LoRA run")
    (output / "notes.txt").write_text("a person's own")
    (output / "model" / "left.bin").write_bytes(b"old")
    run(make(images, output, overwrite=True))
    # No adapter, log or card of another method stays beside the new numbers.
    assert held(output) == {*OWN_FILES, "notes.txt"} - {"adapter", "log.jsonl"}
    assert "linear_probe" in (output / "README.md").read_text()
    assert (output / "notes.txt").read_text() == "a person's own"
    assert not (output / "model" / "left.bin").exists()
    assert json.loads((output / "results.json").read_text())["method"]["name"] == "linear_probe"


@pytest.mark.parametrize("name", ["model", "notes.txt", "README.md", "results.json"])
@pytest.mark.parametrize("switch", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_somebody_else_is_never_touched(
    name: str, switch: dict[str, bool], images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "project"
    output.mkdir()
    if name == "model":
        (output / name).mkdir()
        (output / name / "thesis.txt").write_text("years of work")
    else:
        (output / name).write_text("years of work")
    before = content(output)
    with pytest.raises(GloVLMError, match="holds files that are no run of ours"):
        run(make(images, output, **switch))
    assert content(output) == before


def test_the_output_must_be_a_folder(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GloVLMError, match=r"must be a folder; '.*file' is a file"):
        run(make(images, tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    run(make(images, tmp_path / "empty"))
    assert (tmp_path / "empty" / "results.json").is_file()


@pytest.mark.parametrize("method", ["classifier", "lora"])
def test_an_interrupted_run_is_resumed_to_the_same_numbers(
    method: str, images: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": method, "epochs": 4, "seed": 2}
    straight = run(make(images, tmp_path / "straight", **settings))
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(make(images, output, **settings), on_event=kill_after(2))
    assert held(output) == {UNFINISHED}
    with pytest.raises(GloVLMError, match="already holds a run"):
        run(make(images, output, **settings))
    epochs: list[int] = []
    results = run(
        make(images, output, resume=True, **settings),
        on_event=lambda kind, what: epochs.append(what["epoch"]) if kind == "epoch" else None,
    )
    assert epochs == [3, 4]
    assert results["metrics"] == straight["metrics"]
    a, b = (content(folder) for folder in (tmp_path / "straight", output))
    assert a["predictions.parquet"] == b["predictions.parquet"]
    assert a["model/model.safetensors"] == b["model/model.safetensors"]
    assert held(output) == held(tmp_path / "straight")
    assert yaml.safe_load(b["config.yaml"])["resume"] is False


def test_resuming_a_finished_run_returns_its_results(images: Path, tmp_path: Path) -> None:
    results = run(make(images, tmp_path / "run"))
    before = content(tmp_path / "run")
    assert run(make(images, tmp_path / "run", resume=True)) == results
    assert content(tmp_path / "run") == before


def test_resuming_with_other_settings_is_refused(images: Path, tmp_path: Path) -> None:
    run(make(images, tmp_path / "done"))
    with pytest.raises(GloVLMError, match=r"other settings \(method was 'linear_probe' and is"):
        run(make(images, tmp_path / "done", method="zero_shot", resume=True))
    with pytest.raises(Killed):
        run(make(images, tmp_path / "half", method="lora", epochs=3), on_event=kill_after(1))
    before = content(tmp_path / "half")
    other = {"method": "lora", "epochs": 3, "loss": "infonce", "resume": True}
    with pytest.raises(GloVLMError, match=r"loss was 'prototypes' and is 'infonce'.*--overwrite"):
        run(make(images, tmp_path / "half", **other))
    assert content(tmp_path / "half") == before


def test_resuming_nothing_begins(images: Path, tmp_path: Path) -> None:
    results = run(make(images, tmp_path / "run", resume=True))
    assert results["metrics"]["accuracy"]["value"] is not None


def test_an_interruption_leaves_the_last_complete_result(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(make(images, output))
    before = content(output)
    with pytest.raises(Killed):
        run(make(images, output, method="lora", epochs=3, overwrite=True), on_event=kill_after(2))
    after = content(output)
    assert {n: c for n, c in after.items() if not n.startswith(f"{UNFINISHED}/")} == before
    # And the new run can still be finished.
    run(make(images, output, method="lora", epochs=3, resume=True))
    assert json.loads((output / "results.json").read_text())["method"]["name"] == "lora"
    assert not (output / UNFINISHED).exists()


def test_a_study_may_keep_results_only(images: Path, tmp_path: Path) -> None:
    kept = run(make(images, tmp_path / "run", method="lora", epochs=1, save_model=False))
    assert "curves" not in kept
    assert not {"model", "adapter"} & held(tmp_path / "run")
    assert "results.json" in held(tmp_path / "run")


# ------------------------------------------------------------------------------------- bad input


def only_class(folder: Path) -> None:
    keep = [r for r in (folder / "metadata.csv").read_text().splitlines() if ",sclerosed" not in r]
    keep = [r for r in keep if ",viable" not in r]
    (folder / "metadata.csv").write_text("\n".join(keep) + "\n")
    shutil.rmtree(folder / "sclerosed")
    shutil.rmtree(folder / "viable")


def truncated(folder: Path) -> None:
    path = folder / "viable" / "image_03.png"
    path.write_bytes(path.read_bytes()[:200])


def zero_bytes(folder: Path) -> None:
    (folder / "viable" / "image_03.png").write_bytes(b"")


def missing_file(folder: Path) -> None:
    (folder / "viable" / "image_03.png").unlink()


def both_sides(folder: Path) -> None:
    lines = (folder / "metadata.csv").read_text().splitlines()
    sides = ["split", *("test" if i % 2 else "train" for i in range(len(lines) - 1))]
    lines = [f"{a},{b}" for a, b in zip(lines, sides, strict=True)]
    lines = [line.replace("patient_1", "patient_0") for line in lines]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def one_group(folder: Path) -> None:
    lines = (folder / "metadata.csv").read_text().splitlines()
    lines = [lines[0], *(line.rpartition(",")[0] + ",patient_0" for line in lines[1:])]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("spoil", "settings", "sentence"),
    [
        (shutil.rmtree, {}, "images"),
        (only_class, {}, "at least two classes"),
        (truncated, {}, r"image_03\.png"),
        (zero_bytes, {}, r"image_03\.png"),
        (missing_file, {}, r"image_03\.png"),
        (both_sides, {}, "patient_0"),
        (one_group, {}, "group"),
        (None, {"shots": 30}, r"30 were asked for.*allow-fewer"),
        (None, {"shots": {"viable": 2}}, "mesangial"),
        (None, {"shots": {"viable": 2, "sclerosed": 2, "mesangiall": 2}}, "mean 'mesangial'"),
        (None, {"backbone": "clip-vit-b-33"}, r"Unknown backbone.*clip-vit-b-3"),
        (None, {"backbone": "PAIR", "method": "zero_shot"}, "never trained together"),
        (None, {"episodes": "nowhere.json"}, "nowhere.json"),
        (None, {"prompts": "nowhere.yaml"}, "nowhere.yaml"),
        (None, {"method": "vanilla", "lr": 1e30, "epochs": 5}, r"loss became nan.*--lr"),
        (None, {"method": "lora", "mixed_precision": "fp16", "device": "cpu"}, "Accelerate"),
        (None, {"method": "lora", "tracker": "notebook"}, "Accelerate"),
        (None, {"device": "abacus"}, "abacus"),
    ],
)
def test_bad_input_gets_one_sentence_and_nothing_is_written(
    spoil: Callable[[Path], None] | None,
    settings: dict[str, Any],
    sentence: str,
    images: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    if spoil is not None:
        spoil(folder)
    if settings.get("backbone") == "PAIR":
        settings = {**settings, "backbone": tiny_pair()}
    with pytest.raises(GloVLMError, match=sentence) as caught:
        run(make(folder, tmp_path / "run", **settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "linear_prob"}, "Did you mean 'linear_probe'"),
        ({"method": "lora", "method_config": {"rank": 4}}, "no setting 'rank'"),
        ({"shots": 0}, "trains, so it needs labelled images; found shots 0"),
        ({"shots": -1}, "shots must be 0 or more"),
        ({"shots": {"viable": 0, "sclerosed": 0}}, "trains, so it needs"),
        ({"loss": "infonc"}, "loss must be one of .*mean 'infonce'"),
        ({"shots_from": "spred"}, "shots_from must be one of .*mean 'spread'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"accumulate": 0}, "accumulate must be 1 or more"),
        ({"accumulate": 2, "loss": "infonce"}, "whose negatives are the whole batch"),
        *(({n: 0}, f"{n} must be above 0; found 0") for n in ("epochs", "lr", "batch_size")),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_settings_are_checked_before_anything_is_done(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        make(tmp_path / "nowhere", tmp_path / "run", **settings)


def test_a_mapping_with_an_unknown_or_missing_key_is_refused() -> None:
    with pytest.raises(GloVLMError, match=r"Unknown setting 'backbon'.*mean 'backbone'"):
        TrainConfig.from_mapping({"data": "d", "output_dir": "o", "backbon": "mini"})
    with pytest.raises(GloVLMError, match=r"needs output_dir: give --output-dir"):
        TrainConfig.from_mapping({"data": "d"})
    config = TrainConfig.from_mapping({"data": "d", "output_dir": "o", "shots": 4})
    assert TrainConfig.from_mapping(asdict(config)) == config


def test_a_bad_run_does_not_cost_the_good_one_before_it(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(make(images, output))
    before = content(output)
    with pytest.raises(GloVLMError, match="loss became nan"):
        run(make(images, output, method="vanilla", lr=1e30, epochs=5, overwrite=True))
    assert content(output) == before


def test_fewer_images_than_shots_are_taken_and_reported(images: Path, tmp_path: Path) -> None:
    results = run(make(images, tmp_path / "run", shots=30, allow_fewer=True))
    assert results["data"]["support"]["labels_per_class"] == dict.fromkeys(CLASSES, 4)


# ------------------------------------------------------------------------------- drawings, imports


@pytest.mark.parametrize("mark", [True, False])
def test_a_folder_of_drawings_marks_results_and_model(
    mark: bool, images: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    if mark:
        (folder / "DRAWINGS").write_text("")
    results = run(make(folder, tmp_path / "run"))
    assert results["synthetic"] is mark
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["synthetic"] is mark


IMPORTS = """
import builtins, json, sys
plain, ours = builtins.__import__, set()
def noting(name, globals=None, *rest, **named):
    if (globals or {}).get("__name__", "").startswith("hf_glovlm"):
        ours.add(name.partition(".")[0])
    return plain(name, globals, *rest, **named)
builtins.__import__ = noting
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig
run(TrainConfig(data=sys.argv[1], output_dir=sys.argv[2], backbone=sys.argv[3], shots=2))
imported = sorted({"peft", "gradio", "evaluate", "matplotlib", "sklearn"} & set(sys.modules))
# transformers itself imports accelerate where it is installed; we do not.
ours = sorted({"peft", "accelerate", "gradio", "evaluate", "matplotlib"} & ours)
print(json.dumps({"imported": imported, "ours": ours}))
"""


def test_linear_probe_imports_nothing_that_it_does_not_need(images: Path, tmp_path: Path) -> None:
    arguments = (images, tmp_path / "run", tiny_pair())
    result = run_script(IMPORTS, *arguments, home=tmp_path, **inherited())
    assert result == {"imported": [], "ours": []}


def test_a_second_run_encodes_nothing_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    encoded: list[int] = []
    plain = prediction._encode

    def noting(model: Any, processor: Any, rows: Any, wanted: Any, *rest: Any) -> Any:
        encoded.append(len(wanted))
        return plain(model, processor, rows, wanted, *rest)

    monkeypatch.setattr(prediction, "_encode", noting)
    pair = tiny_pair()
    run(make(images, tmp_path / "a", backbone=pair))
    assert sum(encoded) == 6 + 12
    run(make(images, tmp_path / "b", backbone=pair, method="classifier", epochs=1))
    run(make(images, tmp_path / "c", backbone=pair, method="prompt_tuning", epochs=1))
    assert sum(encoded) == 6 + 12
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    run(make(images, tmp_path / "d", backbone=pair, cache=False))
    assert sum(encoded) == 2 * (6 + 12)
    # Neither read, which would show as its last use, nor written.
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == kept


def test_a_trained_tower_is_not_taken_from_the_cache(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "cache"))
    settings: dict[str, Any] = {"method": "vanilla", "epochs": 2, "lr": 1e-2}
    run(make(images, tmp_path / "warm"))
    a = run(make(images, tmp_path / "a", **settings))
    b = run(make(images, tmp_path / "b", cache=False, **settings))
    assert a["metrics"] == b["metrics"]


def test_a_pair_is_named_without_the_place_on_this_disk(images: Path, tmp_path: Path) -> None:
    backbone = f"{tiny_dinov2(tmp_path / 'x')}+{tiny_bert(tmp_path / 'x')}"
    results = run(make(images, tmp_path / "run", backbone=backbone))
    assert results["backbone"]["name"] == "tiny_dinov2+tiny_bert"
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "config.json").read_text()


def test_the_model_is_saved_in_fp32(images: Path, tmp_path: Path) -> None:
    run(make(images, tmp_path / "run"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {
        torch.float32
    }
