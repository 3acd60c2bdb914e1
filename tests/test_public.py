"""The public face: lazy names, the Auto classes, the command's other doors, a run's results."""

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import Glovlm
from fresh_process import run_fresh, run_script
from tiny import CLASSES, tiny_clip, tiny_images

import hf_glovlm
from hf_glovlm import GloVLMError, RunResult, TrainConfig, run

ROOT = Path(hf_glovlm.__file__)


@pytest.mark.parametrize("name", hf_glovlm.__all__)
def test_a_name_is_the_same_thing_each_time(name: str) -> None:
    first, second = getattr(hf_glovlm, name), getattr(hf_glovlm, name)
    assert first is second
    assert isinstance(first, ModuleType) == (name == "explain")
    if inspect.isfunction(first):
        holder = sys.modules[first.__module__.rpartition(".")[0]]
        assert not isinstance(getattr(holder, name, None), ModuleType)
    assert name in dir(hf_glovlm)


def test_type_checkers_see_the_names_of_the_table() -> None:
    stub = ast.parse(ROOT.with_suffix(".pyi").read_text(encoding="utf-8"))
    seen = {
        (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # else a checker takes the name for private
    }
    table = {(room, name) for room, names in hf_glovlm._MODULES.items() for name in names}
    assert seen == table | {(None, "explain")}
    listed = next(node.value for node in stub.body if isinstance(node, ast.Assign))
    assert set(ast.literal_eval(listed)) == set(hf_glovlm.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'adaptt'"):
        _ = hf_glovlm.adaptt  # type: ignore[attr-defined]


FIRST = """
import json, sys
sys.argv[0] = "glovlm"
import hf_glovlm
light = not {"torch", "transformers", "numpy", "datasets"} & set(sys.modules)
"""
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoProcessor
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
import hf_glovlm
print(json.dumps({
    "light": light,
    "known": type(model) is hf_glovlm.GloVLMForImageClassification,
    "processor": type(processor) is hf_glovlm.GloVLMProcessor,
    "config": type(AutoConfig.from_pretrained(sys.argv[1])) is hf_glovlm.GloVLMConfig,
    "hooks": sum(type(finder).__name__ == "_AutoClasses" for finder in sys.meta_path),
}))
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(FIRST + "from transformers import AutoProcessor", marks=pytest.mark.long),
        pytest.param(FIRST + "from transformers import pipeline", marks=pytest.mark.long),
        "import json, sys\nfrom transformers import AutoModel\nimport hf_glovlm\nlight = True",
    ],
    ids=["processor", "pipeline", "transformers first"],
)
def test_the_auto_classes_know_the_model(order: str, tmp_path: Path) -> None:
    adapted = hf_glovlm.adapt(
        str(tiny_clip()),
        "prototype",
        hf_glovlm.load_dataset(tiny_images(tmp_path / "images", per_class=1))["all"],
    )
    adapted.save(tmp_path / "model")
    answer = (run_fresh if order.startswith(FIRST) else run_script)(
        f"{order}\n{KNOWN}",
        tmp_path / "model",
        home=tmp_path,
        HF_HUB_OFFLINE="1",
        PYTHONPATH=str(ROOT.parents[1]),
    )
    known = {"light", "known", "processor", "config"}
    assert answer == dict.fromkeys(known, True) | {"hooks": 0}


def test_the_module_is_the_command(glovlm: Glovlm) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_glovlm", "--version"],
        cwd=ROOT.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"glovlm {hf_glovlm.__version__}\n"
    assert glovlm("--version").out == done.stdout


def test_the_shell_is_told_what_may_follow() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "hf_glovlm"],
        cwd=ROOT.parents[1],
        env={
            "PATH": "/usr/bin:/bin",
            "_GLOVLM_COMPLETE": "complete_bash",
            "COMP_WORDS": "glovlm tr",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
    )
    assert completed.stdout.split() == ["train"]


# ------------------------------------------------------------------------------- data and results


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "discs", groups=6)


def settings(data: Any, folder: Path) -> TrainConfig:
    return TrainConfig(
        data=data,
        output_dir=str(folder),
        backbone=str(tiny_clip()),
        method="prototype",
        shots=2,
        cache=False,
        n_resamples=50,
    )


def test_data_in_memory_are_the_data_of_the_folder(images: Path, tmp_path: Path) -> None:
    plain = run(settings(str(images), tmp_path / "folder"))
    loaded = hf_glovlm.load_dataset(images)["all"]
    mixed = loaded.shuffle(seed=3)  # an index over the table, which must be followed
    for name, data in (("dataset", mixed), ("dict", hf_glovlm.load_dataset(images))):
        result = run(settings(data, tmp_path / name))
        assert result.data["fingerprint"] == plain.data["fingerprint"]
        assert result.data["name"] == result.config["data"] == "data in memory"
        assert result.data["hub_id"] is None
        assert result.data["counts"] == plain.data["counts"]
    assert result.metrics == plain.metrics


def test_synthetic_images_stay_marked_in_memory(tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "drawn", groups=6)
    (folder / "DRAWINGS").write_text("")
    rows = hf_glovlm.load_dataset(folder)["all"].shuffle(seed=1)
    result = run(settings(rows, tmp_path / "run"))
    assert result.synthetic
    assert "(synthetic images)" in repr(result)


def test_a_split_in_memory_is_respected(images: Path, tmp_path: Path) -> None:
    rows = hf_glovlm.load_dataset(images)["all"]
    groups = rows["group_id"] if "group_id" in rows.column_names else rows["patient_id"]
    held_out = set(sorted(set(groups))[:3])
    side = [group in held_out for group in groups]
    from datasets import DatasetDict

    parts = DatasetDict(
        train=rows.select([i for i, out in enumerate(side) if not out]),
        test=rows.select([i for i, out in enumerate(side) if out]),
    )
    result = run(settings(parts, tmp_path / "split"))
    assert sum(result.data["counts"]["test"].values()) == sum(side)


@pytest.mark.parametrize("data", [7, ["a.png"], None])
def test_other_data_are_refused_in_a_sentence(data: Any, tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="Dataset or a DatasetDict"):
        run(settings(data, tmp_path))
    with pytest.raises(GloVLMError, match="Dataset or a DatasetDict"):
        hf_glovlm.load_dataset(data)


def test_results_are_attributes_a_table_and_a_file(images: Path, tmp_path: Path) -> None:
    result = run(settings(str(images), tmp_path / "run"))
    assert isinstance(result, RunResult)
    assert result.metrics["macro_auc"] == result["metrics"]["macro_auc"]
    frame = result.to_frame()
    low, high = result.metrics["macro_auc"]["ci95"]
    assert frame.loc["macro_auc"].tolist() == [result.metrics["macro_auc"]["value"], low, high]
    assert set(frame.index) == set(result.metrics)
    assert f"{frame.loc['macro_auc', 'value']:.3f}" in repr(result)
    assert all(note in repr(result) for note in result.notes)
    copied = result.to_dict()
    copied["metrics"].clear()
    assert result.metrics
    model, _ = result.load_model()
    assert list(model.config.label2id) == list(CLASSES)
    assert len(result.load_predictions().labels) == result.n
    with pytest.raises(AttributeError, match=r"no 'macro_auc'; they hold .*metrics"):
        _ = result.macro_auc
    again = replace(settings(str(images), tmp_path / "run"), resume=True)
    assert run(again) == result
