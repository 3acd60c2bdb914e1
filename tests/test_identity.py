"""What a run is made from: nothing that was kept is used again for something else."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Glovlm
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_clip, tiny_images

from hf_glovlm.data import load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import Predictions, load_classifier, predict
from hf_glovlm.model import GloVLMForImageClassification, GloVLMModel
from hf_glovlm.runs import TrainConfig, run
from hf_glovlm.slides.mil.classifier import load_aggregator
from hf_glovlm.training import adapt


class Killed(BaseException):
    """Like `kill -9`: nothing below may catch it."""


def make(folder: Path, **settings: Any) -> TrainConfig:
    """A run on `folder/images` with the backbone `folder/tiny_clip`, into `folder/run`."""
    values: dict[str, Any] = {
        "data": str(folder / "images"),
        "backbone": str(folder / "tiny_clip"),
        "output_dir": str(folder / "run"),
        "shots": 2,
        "n_resamples": 10,
    }
    return TrainConfig(**{**values, **settings})


LORA: dict[str, Any] = {"method": "lora", "epochs": 3, "method_config": {"r": 2}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Images and a backbone that a test may change."""
    tiny_images(tmp_path / "images")
    prompts = "\n".join(
        f"  {c}: {{display_name: {c}, prompts: [a {c} tuft]}}"
        for c in ("mesangial", "sclerosed", "viable")
    )
    (tmp_path / "images" / "classes.yaml").write_text(f"classes:\n{prompts}\n")
    tiny_clip(tmp_path)
    return tmp_path


def stop_after(folder: Path, epoch: int, **settings: Any) -> None:
    """Train, and be killed after an epoch."""

    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch" and what["epoch"] == epoch:
            raise Killed

    with pytest.raises(Killed):
        run(make(folder, **{**LORA, **settings}), on_event=watch)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap_labels(folder: Path) -> None:
    table = folder / "images" / "metadata.csv"
    edit(table, "image_07.png,mesangial", "image_07.png,viable")
    edit(table, "viable/image_07.png,viable", "viable/image_07.png,mesangial")


def rename_groups(folder: Path) -> None:
    edit(folder / "images" / "metadata.csv", "patient_3", "patient_9")


def replace_image(folder: Path) -> None:
    path = folder / "images" / "viable" / "image_03.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def add_stain(folder: Path) -> None:
    table = folder / "images" / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(f"{line},{'PAS' if i else 'stain'}" for i, line in enumerate(lines)))


def change_prompt(folder: Path) -> None:
    edit(folder / "images" / "classes.yaml", "[a viable tuft]", "[a healthy tuft]")


def change_weight(folder: Path) -> None:
    path = folder / "tiny_clip" / "model.safetensors"
    weights = load_file(path)
    weights["visual_projection.weight"][0, 0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})


def change_transform(folder: Path) -> None:
    edit(folder / "tiny_clip" / "preprocessor_config.json", "0.48145466", "0.4")


CHANGES: dict[str, Callable[[Path], None]] = {
    "labels": swap_labels,
    "groups": rename_groups,
    "images": replace_image,
    "columns": add_stain,
    "classes": change_prompt,
    "backbone weights": change_weight,
    "backbone transform": change_transform,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_run_is_not_taken_up_when_what_it_was_made_from_has_changed(
    place: Path, what: str
) -> None:
    results = run(make(place))
    assert run(make(place, resume=True)) == results
    CHANGES[what](place)
    with pytest.raises(GloVLMError, match=rf"the {what} ha(s|ve) changed.*--overwrite"):
        run(make(place, resume=True))
    run(make(place, overwrite=True))
    run(make(place, resume=True))


@pytest.mark.parametrize("what", ["labels", "images", "backbone weights"])
def test_a_stopped_run_does_not_go_on_with_something_else(place: Path, what: str) -> None:
    stop_after(place, 2)
    CHANGES[what](place)
    with pytest.raises(GloVLMError, match=rf"the {what} ha(s|ve) changed.*--overwrite"):
        run(make(place, **LORA, resume=True))
    assert (place / "run" / "unfinished" / "checkpoint.safetensors").is_file()


def test_adapt_does_not_go_on_with_a_checkpoint_of_other_images(place: Path) -> None:
    rows = load_dataset(place / "images")["all"]
    config = {"output_dir": place / "out", "recipe": {"epochs": 2}}

    def attempt(which: list[int], **more: Any) -> None:
        adapt(str(place / "tiny_clip"), "classifier", rows.select(which), config=config | more)

    attempt([0, 1, 8, 9, 16, 17])
    attempt([0, 1, 8, 9, 16, 17], resume=True)
    with pytest.raises(GloVLMError, match=r"labelled images have changed.*--overwrite"):
        attempt([0, 2, 8, 9, 16, 17], resume=True)


# ------------------------------------------------------------------------------------------ damage


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Expect a sentence, not a traceback of a library."""
    message = "accepted"
    try:
        yield
    except GloVLMError as error:
        message = str(error)
    except Exception as error:
        message = f"no sentence: {type(error).__name__}: {error}"
    assert re.search(sentence, message)


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def replace_by_foreign(path: Path, at: float) -> None:
    save_file({"now.x": torch.zeros(2)}, path, metadata={"facts": "{}"})


@pytest.mark.parametrize("harm", [flip, cut, replace_by_foreign])
def test_a_damaged_checkpoint_is_refused(place: Path, harm: Callable[[Path, float], None]) -> None:
    stop_after(place, 1)
    checkpoint = place / "run" / "unfinished" / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    for at in (0.001, 0.02, 0.3, 0.7, 1.0) if harm is not replace_by_foreign else (1.0,):
        checkpoint.write_bytes(whole)
        harm(checkpoint, at if harm is flip else at * 0.99)
        with refusing(r"^'.*checkpoint\.safetensors' is damaged.*--overwrite"):
            run(make(place, **LORA, resume=True))
    checkpoint.write_bytes(whole)
    run(make(place, **LORA, resume=True))


def test_a_damaged_file_of_a_finished_run_is_refused(place: Path) -> None:
    run(make(place))
    for name in ("model/model.safetensors", "model/config.json", "predictions.parquet"):
        path = place / "run" / name
        whole = path.read_bytes()
        flip(path, 0.9)
        with pytest.raises(GloVLMError, match=f"{path.name}.*--overwrite"):
            run(make(place, resume=True))
        if name.startswith("model"):
            with pytest.raises(GloVLMError, match=f"{path.name}.*has changed"):
                load_classifier(str(place / "run"))
        path.write_bytes(whole)
    (place / "run" / "README.md").write_text("edited by hand")
    run(make(place, resume=True))
    load_classifier(str(place / "run"))


# -------------------------------------------------------------------------------------- one writer


def test_a_second_run_into_the_same_folder_is_refused(place: Path) -> None:
    refused: list[str] = []

    def second(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch" and what["epoch"] == 2:
            for switch in ({"overwrite": True}, {"resume": True}, {}):
                try:
                    run(make(place, **{**LORA, "seed": 1, **switch}))
                except GloVLMError as error:
                    refused.append(str(error))

    alone = run(make(place, **LORA, output_dir=str(place / "alone")))
    results = run(make(place, **LORA), on_event=second)
    assert len(refused) == 3
    assert all("Another process writes to" in sentence for sentence in refused)
    assert results["metrics"] == alone["metrics"]
    assert json.loads((place / "run" / "results.json").read_text())["config"]["seed"] == 0


@contextmanager
def killed_at_move(folder: Path, number: int) -> Iterator[None]:
    """Be killed before something is moved into a folder for the n-th time."""
    moved, replace = 0, os.replace

    def watch(source: Any, target: Any) -> None:
        nonlocal moved
        if Path(target).parent == folder:
            moved += 1
            if moved == number:
                raise Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watch)
        yield


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_move_leaves_a_folder_that_every_command_takes(
    place: Path, step: int
) -> None:
    expected = run(make(place))["metrics"]
    for number in range(1, 40, step):
        folder = place / f"killed-{number}"
        try:
            with killed_at_move(folder, number):
                run(make(place, output_dir=str(folder)))
        except Killed:
            how: dict[str, Any] = {"overwrite": True} if number % 4 == 0 else {"resume": True}
            try:
                results = run(make(place, output_dir=str(folder), **how))
            except GloVLMError as error:
                pytest.fail(f"killed at move {number}: {error}")
            assert results["metrics"] == expected, number
            assert (folder / "model" / "model.safetensors").is_file()
            assert not (folder / "unfinished").exists()
        else:
            break
    assert number > 7


@pytest.mark.parametrize("number", [3, 6])
def test_a_reader_finishes_what_a_kill_interrupted(place: Path, number: int) -> None:
    run(make(place))
    with pytest.raises(Killed), killed_at_move(place / "run", number):
        run(make(place, overwrite=True, method="zero_shot"))
    _, _, results = load_classifier(str(place / "run"))
    assert results is not None
    assert results["method"]["name"] == "zero_shot"
    stored = Predictions.load(place / "run" / "predictions.parquet")
    assert results["n"] == len(stored.file_names)
    assert not (place / "run" / "unfinished").exists()


def test_a_damaged_journal_removes_nothing_elsewhere(place: Path) -> None:
    run(make(place))
    work = place / "run" / "unfinished"
    work.mkdir()
    (work / "journal.json").write_text('{"move": [], "remove": ["../images"]}')
    with pytest.raises(GloVLMError, match=r"journal\.json' is damaged"):
        load_classifier(str(place / "run"))
    assert (place / "images" / "metadata.csv").is_file()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("name", "method"), [("WORLD_SIZE", "linear_probe"), ("LOCAL_WORLD_SIZE", "classifier")]
)
def test_processes_that_do_not_train_together_are_refused(
    place: Path, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(GloVLMError, match="2 processes were launched, and 1 would train"):
        run(make(place, method=method))
    assert not (place / "run").exists()


# ---------------------------------------------------------------------------------- a former model


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with temperature, prediction sets, a declared prevalence and class prompts."""
    folder = tmp_path_factory.mktemp("former")
    tiny_images(folder / "images", per_class=16, groups=8)
    tiny_clip(folder)
    prior = {"mesangial": 0.7, "sclerosed": 0.2, "viable": 0.1}
    run(make(folder, calibration_groups=2, conformal="lac", prior=prior))
    return folder


def test_a_former_model_starts_a_new_task_clean(former: Path, tmp_path: Path) -> None:
    images = tiny_images(tmp_path / "images", classes=("a", "b", "c"), seed=1)
    table = images / "metadata.csv"  # other patients: those that it learned from are not measured
    table.write_text(table.read_text().replace("patient_", "other_"))
    plain = run(make(former, data=str(images), output_dir=str(tmp_path / "plain")))
    for name, backbone in (("model", former / "run" / "model"), ("run", former / "run")):
        given = {"data": str(images), "backbone": str(backbone), "output_dir": str(tmp_path / name)}
        results = run(make(former, **given))
        config = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert not config.get("calibration")
        assert not config.get("prior_shift")
        assert config.get("temperature", 1.0) == 1.0
        assert results["metrics"] == plain["metrics"]  # the weights are the same


def test_a_former_model_takes_another_number_of_classes(former: Path, tmp_path: Path) -> None:
    images = tiny_images(tmp_path / "images", classes=("a", "b"))
    rows = load_dataset(images)["all"]
    model = GloVLMModel.from_pretrained(former / "run" / "model").eval()
    _, processor, _ = load_classifier(str(former / "run"))
    adapted = adapt(model, "linear_probe", rows.select([0, 1, 8, 9]), processor=processor)
    assert adapted.model.config.prior_shift is None
    assert adapted.model.config.calibration is None
    assert predict(adapted.model, processor, rows).probabilities.shape == (16, 2)


LABELS: dict[str, dict[str, Any]] = {
    "fewer": {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
    "more": {"num_labels": 5},
    "renamed": {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
}


@pytest.mark.parametrize("how", [*LABELS, "attribute", "in place"])
def test_other_labels_reset_what_belongs_to_the_former_ones(
    former: Path, tmp_path: Path, how: str
) -> None:
    place, options = former / "run" / "model", {"ignore_mismatched_sizes": True}
    try:
        model = GloVLMForImageClassification.from_pretrained(
            place, **options, **LABELS.get(how, {})
        )
        if how == "attribute":
            model.config.id2label = {0: "a", 1: "b", 2: "c"}
        if how == "in place":
            model.config.id2label[1] = "b"
        model.save_pretrained(tmp_path)
        read = GloVLMForImageClassification.from_pretrained(tmp_path)
    except ValueError as error:
        pytest.fail(f"it cannot be loaded: {error}")
    config, classes = read.config, {"fewer": 2, "more": 5}.get(how, 3)
    assert (config.prompts, config.calibration, config.prior_shift) == (None, None, None)
    assert config.temperature == 1.0
    assert len(config.id2label) == classes
    assert read(torch.zeros(1, 3, 32, 32)).logits.shape == (1, classes)
    same = GloVLMForImageClassification.from_pretrained(place).config
    assert same.prompts
    assert same.calibration
    assert same.temperature != 1.0


# ------------------------------------------------------------------------------------------- kinds

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "mil": ({"kind": "mil"}, "a slide classifier of `glovlm mil`"),
    "mil, unstated": ({"aggregator": {}}, "a slide classifier of `glovlm mil`"),
    "slides": ({"kind": "slides"}, "slides of `glovlm slide`"),
    "study": ({"kind": "study"}, "a study of `glovlm study`"),
    "crops": ({"kind": "crops", "made_from": {}, "files": {}}, "crops of `glovlm data crops`"),
}
KEPT_IN = {"study": "report.json", "crops": "manifest.json"}  # else results.json


@pytest.mark.parametrize("kind", KINDS)
def test_readers_name_the_kind_that_they_got(kind: str, tmp_path: Path, glovlm: Glovlm) -> None:
    content, name = KINDS[kind]
    folder, image = tmp_path / "run", tmp_path / "x.png"
    Image.new("RGB", (32, 32)).save(image)
    (folder / "model").mkdir(parents=True)
    (folder / KEPT_IN.get(kind, "results.json")).write_text(json.dumps(content))
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "model" / "config.json").write_text('{"aggregator": "abmil", "settings": {}}')
    images = tiny_images(tmp_path / "images")
    few = ["--shots", "2"]
    commands = [
        ["card", folder],
        ["push", folder, "a/b", "--dry-run"],
        ["predict", folder, image],
        ["evaluate", folder, "--data", images, "--output", tmp_path / "e.json"],
        ["train", "--data", images, "--output-dir", tmp_path / "o", "--backbone", folder, *few],
    ]
    for command in commands:
        done = glovlm(*command)
        assert done.code == 2, command
        assert f"found {name}" in done.err, (command, done.err)


def test_a_run_is_no_slide_classifier(former: Path) -> None:
    with pytest.raises(GloVLMError, match=r"found a run of `glovlm train`"):
        load_aggregator(former / "run")


def test_results_state_their_kind(former: Path) -> None:
    results = json.loads((former / "run" / "results.json").read_text())
    assert results.get("kind") == "adaptation"
