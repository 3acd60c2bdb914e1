"""Two CPU processes give what one gives. As a script, this file is what each of the two runs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from attaching import adapt_with
from datasets import Dataset
from fresh_process import run_two_ranks
from safetensors.torch import load_file, save_file
from tiny import CLASSES, tiny_clip, tiny_images, tiny_pair
from torch import Tensor, nn

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.inference import Predictions
from hf_glovlm.methods import Recipe
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig
from hf_glovlm.training.loop import TensorSource, fit
from hf_glovlm.training.losses import HeadStep

REPOSITORY = Path(__file__).resolve().parent.parent
# Batches of 5, 5 and 3 rows, all odd.
RECIPE = {"epochs": 2, "batch_size": 5, "lr": 1e-3}
TRAIN = str(REPOSITORY / "hf_glovlm" / "train.py")
LAUNCHED = ("--method", "vanilla", "--shots", "2", "--epochs", "2", "--n-resamples", "20")
CASES: dict[str, dict[str, Any]] = {
    "prototypes": {"method": "vanilla"},
    "infonce": {"method": "vanilla", "loss": "infonce"},
    "infonce_published": {"method": "vanilla", "loss": "infonce_published"},
    "accumulated": {"method": "vanilla", "accumulate": 2},
    "clipped": {"method": "vanilla", "clip_norm": 0.05},
    "lora": {"method": "lora", "method_config": {"dropout": 0.0}, "loss": "infonce"},
    "pair": {"method": "lora", "method_config": {"dropout": 0.0}, "backbone": "pair"},
    "context": {"method": "prompt_tuning", "recipe": {"epochs": 2, "batch_size": 5}},
    "penalised": {"method": "kgcoop", "recipe": {"epochs": 2, "batch_size": 5}},
    "guided": {"method": "prograd", "recipe": {"epochs": 2, "batch_size": 5}},
    "filtered": {"method": "biomedcoop", "recipe": {"epochs": 2, "batch_size": 5}},
    "validated": {"method": "vanilla", "validation": True},
    "head": {"method": "classifier"},  # dropout on: it trains on the main process alone
}


def work(folder: Path, clip: str, pair: str, images: Path) -> dict[str, Any]:
    """All cases, in this process or in each of several.

    Args:
        folder: Where this process writes `<case>.safetensors`; runs go beside it.
        clip: The tiny CLIP.
        pair: The tiny pair.
        images: The image folder.

    Returns:
        The losses of every case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    rows = all_rows(load_dataset(images))
    losses: dict[str, Any] = {"processes": accelerator.num_processes}
    for case, options in CASES.items():
        adapted = _adapt(accelerator, rows, {"clip": clip, "pair": pair}, **options)
        losses[case] = [row["loss"] for row in adapted.log]
        state = {n: t.clone() for n, t in adapted.model.state_dict().items()}
        pixels = adapted.processor(images=list(rows[::6]["image"]), return_tensors="pt")
        with torch.no_grad():
            logits = adapted.model(pixels["pixel_values"].to(adapted.model.dtype)).logits
        save_file({**state, "logits": logits}, folder / f"{case}.safetensors")
    resumed = _resumed(accelerator, folder.parent / f"resumed-{accelerator.num_processes}")
    save_file(resumed, folder / "resumed.safetensors")
    results = run(
        TrainConfig(
            data=str(images),
            output_dir=str(folder.parent / f"run-{accelerator.num_processes}"),
            backbone=clip,
            shots=2,
            seed=2,  # nine test images: two processes never hold equal shares
            n_resamples=20,
            device="cpu",
        )
    )
    losses["run"] = results["metrics"]["macro_auc"]["value"]
    return losses


def _adapt(
    accelerator: Accelerator,
    rows: Dataset,
    backbones: dict[str, str],
    *,
    backbone: str = "clip",
    validation: bool = False,
    **options: Any,
) -> Any:
    model, processor = load_backbone(backbones[backbone])
    support = rows.select([*range(6), *range(7, 11), *range(14, 17)])
    return adapt_with(
        model.double(),
        support=support,
        processor=processor,
        accelerator=accelerator,
        validation=rows.select([6, 11, 12, 13, 17, 18]) if validation else None,
        **{"recipe": RECIPE, **options},
    )


def _resumed(accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """Interrupt after an epoch, in every process, and go on."""

    class Killed(Exception):
        pass

    generator = torch.Generator().manual_seed(3)
    source = TensorSource(
        torch.randn(7, 4, dtype=torch.float64, generator=generator), torch.arange(7) % 2
    )
    recipe = Recipe(lr=0.05, epochs=3, batch_size=5)

    def step() -> HeadStep:
        torch.manual_seed(0)
        return Whole(nn.Linear(4, 2).double())

    def second_call_raises() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return 0.5 + 0.1 * len(calls)

    calls: list[int] = []
    options: dict[str, Any] = {"accelerator": accelerator, "output_dir": folder}
    first, second = step(), step()
    try:
        groups = [{"params": list(first.parameters())}]
        fit(first, groups, source, recipe, validate=second_call_raises, **options)
    except Killed:
        groups = [{"params": list(second.parameters())}]
        fit(second, groups, source, recipe, validate=lambda: 0.9, resume=True, **options)
    return {n: t.clone() for n, t in second.state_dict().items()}


class Whole(HeadStep):
    """A head that all processes train together."""

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        from hf_glovlm.training.loop import world_size

        return world_size() * super().forward(inputs, labels, weight, total)


# -------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images", per_class=7)


@pytest.fixture(scope="module")
def both(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all results, and the losses of one process and of each of two."""
    folder = tmp_path_factory.mktemp("both")
    arguments = (str(tiny_clip()), tiny_pair(), str(images))
    run_two_ranks(Path(__file__).resolve(), folder, *arguments)
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    try:
        alone = work(folder / "alone", *arguments[:2], images)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    losses = {n: json.loads((folder / n / "losses.json").read_text()) for n in ("0", "1")}
    return folder, {**losses, "alone": alone}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def test_there_were_two_processes(both: tuple[Path, dict[str, Any]]) -> None:
    counts = {name: losses["processes"] for name, losses in both[1].items()}
    assert counts == {"alone": 1, "0": 2, "1": 2}


@pytest.mark.parametrize("case", [*CASES, "resumed"])
def test_two_processes_train_to_the_weights_and_logits_of_one(
    case: str, both: tuple[Path, dict[str, Any]]
) -> None:
    folder, losses = both
    alone, first, second = (
        load_file(folder / name / f"{case}.safetensors") for name in ("alone", "0", "1")
    )
    assert furthest(first, second) == 0
    assert furthest(first, alone) < 1e-8
    if case in CASES:
        assert losses["0"][case] == pytest.approx(losses["alone"][case], abs=1e-6)
        assert losses["0"][case] == losses["1"][case]
        assert len(losses["0"][case]) == 2


def test_the_cases_differ_from_each_other(both: tuple[Path, dict[str, Any]]) -> None:
    """Or a setting that is lost on the way would pass unseen."""
    losses = both[1]["alone"]
    towers = [c for c in CASES if c != "accumulated"]  # which is `prototypes`, in parts
    assert len({tuple(losses[case]) for case in towers}) >= len(towers) - 2
    assert losses["infonce"] != losses["infonce_published"]
    assert losses["clipped"][1] != losses["prototypes"][1]


def test_predictions_of_two_processes_are_complete_and_in_order(
    both: tuple[Path, dict[str, Any]],
) -> None:
    folder, losses = both
    one, two = (Predictions.load(folder / f"run-{n}" / "predictions.parquet") for n in (1, 2))
    assert len(one.file_names) == len(set(one.file_names))
    assert len(one.file_names) % 2 == 1  # the two shares differ
    assert two.file_names == one.file_names
    assert two.groups == one.groups
    assert one.labels is not None
    assert two.labels is not None
    assert two.labels.tolist() == one.labels.tolist()
    assert two.class_names == one.class_names == list(CLASSES)
    assert np.abs(two.logits - one.logits).max() < 1e-5
    assert losses["0"]["run"] == losses["1"]["run"] == losses["alone"]["run"]


def test_train_py_is_launched_as_glovlm_train_is(
    both: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    folder = both[0] / "launched"
    two = json.loads((folder / "results.json").read_text())
    assert two["environment"]["num_processes"] == 2
    assert (folder / "README.md").is_file()
    flags = zip(LAUNCHED[::2], LAUNCHED[1::2], strict=True)
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in flags}
    numbers = {name: int(values.pop(name)) for name in ("shots", "epochs", "n_resamples")}
    one = run(
        TrainConfig(
            data=str(images),
            output_dir=str(tmp_path / "one"),
            backbone=str(tiny_clip()),
            device="cpu",
            **values,
            **numbers,
        )
    )
    assert one["environment"]["num_processes"] == 1
    assert two["data"] == one["data"]
    assert two["training"]["final_loss"] == pytest.approx(one["training"]["final_loss"], abs=1e-4)
    a, b = (Predictions.load(at / "predictions.parquet") for at in (tmp_path / "one", folder))
    assert a.file_names == b.file_names
    assert np.abs(a.probabilities - b.probabilities).max() < 1e-2  # fp32, and Adam's first steps
    places = (at / "model" / "model.safetensors" for at in (tmp_path / "one", folder))
    assert furthest(*map(load_file, places)) < 1e-3


@pytest.mark.long
def test_accelerate_launch_starts_these_two_processes(
    both: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    """The README's command, in two fresh interpreters; the other tests fork the same two."""
    folder = tmp_path / "launched"
    given = {"data": images, "backbone": tiny_clip(), "output-dir": folder}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
            *(TRAIN, *LAUNCHED, *(str(part) for k, v in given.items() for part in (f"--{k}", v))),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "results.json").read_text())["environment"]["num_processes"] == 2
    places = (at / "model" / "model.safetensors" for at in (both[0] / "launched", folder))
    assert furthest(*map(load_file, places)) == 0


if __name__ == "__main__":
    place, clip_folder, pair_folders, image_folder = sys.argv[1:]
    # In the same two processes: the script, as `accelerate launch` runs it.
    given = {"data": image_folder, "backbone": clip_folder, "output-dir": f"{place}/launched"}
    sys.argv = [TRAIN, *LAUNCHED, *(part for k, v in given.items() for part in (f"--{k}", v))]
    try:
        runpy.run_path(TRAIN, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code  # noqa: PT017 - a script, no test
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    mine = Path(place) / os.environ["RANK"]
    actual = work(mine, clip_folder, pair_folders, Path(image_folder))
    (mine / "losses.json").write_text(json.dumps(actual))
