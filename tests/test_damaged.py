"""Damaged files: every reader answers in one sentence that names the file, and never by a crash."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_clip, tiny_images

from hf_glovlm import load_backbone, load_classifier, load_dataset, load_episode, push
from hf_glovlm.cli import app
from hf_glovlm.data.splits import all_rows
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import Predictions
from hf_glovlm.publish.card import write_card
from hf_glovlm.publish.plain_clip import export_clip
from hf_glovlm.slides.mil.classifier import load_aggregator

REASON = "These weights are random and were made by a test."
HUGE, DEEP = 10**30, b"[" * 100_000
CONFORMAL = ("--calibration-groups", 1, "--conformal", "lac", "--alpha", 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and a backbone, without the checksums that would tell at once."""
    root = tmp_path_factory.mktemp("runs")
    given = ("--data", data, "--backbone", tiny_clip(), "--output-dir", root / "run")
    given += ("--shots", 1, "--n-resamples", 20, "--method", "lora", "--epochs", 1, *CONFORMAL)
    assert app.main(["train", *map(str, given)]) == 0
    (root / "run" / "manifest.json").unlink(missing_ok=True)
    shutil.copytree(tiny_clip(), root / "run" / "clip")
    return root / "run"


def use_model(run: Path, data: Path) -> Any:
    return load_classifier(str(run))


def use_predict(run: Path, data: Path) -> Any:
    arguments = ["predict", str(run), str(data / "viable" / "image_00.png")]
    with suppress(AttributeError):  # what one is tells nothing here
        assert app.main(arguments) in (0, 2)


def use_push(run: Path, data: Path) -> Any:
    return push(run, "lab/model", dry_run=True, reason=REASON)


def use_card(run: Path, data: Path) -> Any:
    return write_card(run)


def use_clip(run: Path, data: Path) -> Any:
    shutil.rmtree(run.parent / "exported", ignore_errors=True)
    return export_clip(run, run.parent / "exported", reason=REASON)


def use_backbone(run: Path, data: Path) -> Any:
    return load_backbone(str(run / "clip"))


def use_run_as_backbone(run: Path, data: Path) -> Any:
    return load_backbone(str(run / "model"))


def use_episodes(run: Path, data: Path) -> Any:
    return load_episode(run / "episodes.json", 0, all_rows(load_dataset(data)))


def use_predictions(run: Path, data: Path) -> Any:
    return Predictions.load(run / "predictions.parquet")


def use_aggregator(run: Path, data: Path) -> Any:
    return load_aggregator(run)


Reader = Callable[[Path, Path], Any]
READERS: dict[str, list[Reader]] = {
    "results.json": [use_model, use_card, use_push, use_clip],
    "model/config.json": [use_model, use_run_as_backbone],
    "model/processor_config.json": [use_model],
    "model/tokenizer.json": [use_model, use_run_as_backbone],
    "model/tokenizer_config.json": [use_model],
    "model/model.safetensors": [use_model, use_push],
    "clip/config.json": [use_backbone],
    "clip/preprocessor_config.json": [use_backbone],
    "clip/tokenizer.json": [use_backbone],
    "clip/tokenizer_config.json": [use_backbone],
    "clip/model.safetensors": [use_backbone],
    "episodes.json": [use_episodes, use_push],
    "predictions.parquet": [use_predictions, use_push],
    "config.yaml": [use_push],
}
WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: b"\xff\xfe" + content[:99],
    "another list": lambda content: b"[]",
    "nothing": lambda content: b"null",
    "deep": lambda content: DEEP,
}
FIELDS: dict[str, list[tuple[str, Any]]] = {
    "model/config.json": [
        ("id2label", ["a", "b"]), ("id2label", -1), ("id2label.0", None), ("prompts", -1),
        ("prompts", "x"), ("temperature", "2"), ("temperature", None), ("temperature", HUGE),
        ("prior_shift", []), ("prior_shift", "x"), ("mpp", "x"), ("mpp", []),
        ("head", -1), ("head", {"a": {"b": None}}), ("head.kind", [1]), ("inserts", -1),
        ("context", "x"), ("calibration", -1), ("calibration.conformal", "x"), ("dtype", []),
        ("dtype", -1), ("model_type", []), ("backbone_config", -1), ("backbone_config", []),
        ("backbone_config", {"a": {"b": None}}), ("backbone_config.text_config", -1),
        ("backbone_config.text_config.vocab_size", HUGE), ("backbone_restrictions", "x"),
        ("backbone_config.vision_config.num_hidden_layers", HUGE), ("auto_map", -1),
        ("backbone_config.vision_config.hidden_size", "32"), ("backbone_license", 3),
    ],
    "model/processor_config.json": [
        ("image_processor", -1), ("image_processor.image_mean", "x"),
        ("image_processor.image_std", []), ("image_processor.size", True),
        ("image_processor.crop_size", [1, 2]), ("image_processor.resample", 2**33),
        ("image_processor.rescale_factor", {}), ("image_processor.size.shortest_edge", HUGE),
    ],
    "clip/config.json": [
        ("text_config", []), ("vision_config", "x"), ("model_type", {}), ("id2label", -1),
        ("vision_config.patch_size", {}), ("vision_config.image_size", -1),
        ("text_config.num_hidden_layers", HUGE), ("projection_dim", "x"),
    ],
    "clip/preprocessor_config.json": [
        ("size", "x"), ("image_mean", None), ("crop_size.height", "x"),
    ],
    "clip/tokenizer_config.json": [("model_max_length", "x"), ("model_max_length", float("nan"))],
    "results.json": [
        ("config", -1), ("config", {}), ("data", None), ("backbone", "x"), ("per_class", {}),
        ("confusion_matrix", []), ("data.classes", [3]), ("data.classes", {}), ("metrics", []),
        ("data.support", None), ("training", "x"),
    ],
    "episodes.json": [
        ("draws", "x"), ("draws", [None]), ("group_column", "image"), ("group_column", "label"),
        ("draws.0.seed", "x"), ("draws.0.support", 3), ("shots", float("inf")),
    ],
}  # fmt: skip
HARMLESS = {  # what no reader here looks at, or reads as if it were not there
    ("results.json", "use_model"), ("results.json", "use_clip"), ("episodes.json", "use_push"),
}  # fmt: skip


def changed(content: bytes, name: str, value: Any) -> bytes:
    """A JSON file with one field set."""
    whole = part = json.loads(content)
    *path, last = name.split(".")
    for key in path:
        part = part[int(key)] if isinstance(part, list) else part[key]
    part[last] = value
    return json.dumps(whole).encode()


CASES = [
    pytest.param(file, reader, id=f"{file}-{reader.__name__}")
    for file, readers in READERS.items()
    for reader in readers
]


@pytest.mark.parametrize(("file", "reader"), CASES)
def test_a_damaged_file_is_named_in_one_sentence(
    file: str, reader: Reader, data: Path, run_folder: Path
) -> None:
    path = run_folder / file
    content = path.read_bytes()
    first = reader is READERS[file][0]  # the others see less, as each of them takes longer
    ways = list(WHOLE.items())[:: 1 if first else 3]
    spoilt = {what: spoil(content) for what, spoil in ways}
    fields = FIELDS.get(file, [])[:: 1 if first else 3]
    spoilt |= {f"{n} = {v!r:.20}": changed(content, n, v) for n, v in fields}
    outcomes = {}
    try:
        for what, other in spoilt.items():
            path.write_bytes(other)
            try:
                reader(run_folder, data)
                outcomes[what] = "accepted"
            except GloVLMError as error:
                outcomes[what] = ("\n" in str(error) and "several lines") or str(error)
            except Exception as error:
                outcomes[what] = f"crashed: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(content)
    reader(run_folder, data)  # the file was at fault, nothing else
    crashed = {k: v for k, v in outcomes.items() if v.startswith(("crashed", "several"))}
    assert crashed == {}
    whole = {what: outcomes[what] for what in WHOLE if what in outcomes}
    unnamed = {k: v for k, v in whole.items() if path.name not in v and v != "accepted"}
    assert unnamed == {}
    accepted = [k for k, v in outcomes.items() if v == "accepted"]
    assert accepted == [] or (file, reader.__name__) in HARMLESS
