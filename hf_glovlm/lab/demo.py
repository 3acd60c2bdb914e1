"""Demo (`glovlm demo`): the main job on synthetic images, to a reloaded model, offline."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification, AutoProcessor

from ..data import open_image
from ..errors import GloVLMError
from ..inference import Predictions
from ..model import GloVLMForImageClassification
from ..runs import RunResult, TrainConfig, run
from .phantoms import write_cohort

DEMO_METHODS = ("zero_shot", "linear_probe", "lora")


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    patients: int = 24,
    per_patient: int = 15,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Render a cohort, adapt `mini` with 8 shots, test on unseen synthetic patients, save, reload.

    Args:
        output_dir: New or empty folder; gets `drawings/`, a run per method, and `demo.png`.
        seed: Of the images, the split and the training.
        patients: Synthetic patients, half of them for the support.
        per_patient: Images of each.
        on_event: As for `run`, plus `("method", {"name"})`.

    Returns:
        `{"runs": {method: results}, "reload_difference", "figure"}`; all of it on synthetic images.

    Raises:
        GloVLMError: The folder is in use, or the reloaded model differs from the saved one.
    """
    notify = on_event or (lambda kind, what: None)
    folder = Path(output_dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GloVLMError(
            f"The demo needs a new or empty folder; '{folder}' is in use. Give another "
            "--output-dir or empty it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    notify("stage", {"name": f"rendering {patients} synthetic patients"})
    # Pretraining used even cohort seeds: an odd one shares no image with it.
    cohort = write_cohort(folder / "drawings", patients, per_patient, seed=2 * seed + 1)
    runs: dict[str, RunResult] = {}
    for method in DEMO_METHODS:
        notify("method", {"name": method})
        runs[method] = run(
            TrainConfig(
                data=str(cohort),
                output_dir=str(folder / method),
                method=method,
                shots=8 if method != "zero_shot" else 0,
                seed=seed,
                lr=2e-3 if method == "lora" else None,  # mini is a hundredth of CLIP's size
            ),
            on_event=on_event,
        )
    notify("stage", {"name": "reloading through the Auto classes"})
    difference = check_reload(folder / DEMO_METHODS[-1], cohort)
    if difference > 1e-4:
        raise GloVLMError(
            f"The reloaded model's logits differ from the saved predictions by {difference:.2g} "
            "(expected at most 1e-4): the installation is broken; please report `glovlm doctor "
            "--json`."
        )
    figure = draw_figure(folder, cohort, runs)
    return {"runs": runs, "reload_difference": difference, "figure": str(figure)}


def check_reload(run_folder: Path, data: Path) -> float:
    """Compare a saved run, loaded with the Auto classes alone, with its stored predictions.

    Returns:
        Largest absolute difference of the logits of up to 32 test images.
    """
    stored = Predictions.load(run_folder / "predictions.parquet")
    model = AutoModelForImageClassification.from_pretrained(run_folder / "model").eval()
    assert isinstance(model, GloVLMForImageClassification)  # our class, not remote code
    processor = AutoProcessor.from_pretrained(run_folder / "model")
    images = [open_image(data / name) for name in stored.file_names[:32]]
    with torch.inference_mode():
        logits = model(**processor(images=images, return_tensors="pt")).logits.numpy()
    return float(np.abs(logits - stored.logits[: len(images)]).max())


def draw_figure(folder: Path, data: Path, runs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Draw examples with their predicted class, and the confusion matrix of the last method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    method, results = list(runs.items())[-1]
    stored = Predictions.load(folder / method / "predictions.parquet")
    names = [c["display_name"] for c in results["data"]["classes"]]
    figure = pyplot.figure(figsize=(12, 6.2), layout="constrained")
    figure.suptitle(f"Synthetic images, not patients: mini + {method}, 8 shots a class")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1)).tolist()  # type: ignore[union-attr]
    grid = left.subplots(3, 5)
    for k in range(len(names)):
        assert stored.labels is not None  # a run's test rows are labelled
        of_class = np.flatnonzero(stored.labels == k)[:3]
        for axis, i in zip(grid[:, k], of_class, strict=False):
            guess = int(stored.probabilities[i].argmax())
            axis.imshow(open_image(data / stored.file_names[i]))
            axis.set_title(
                f"{names[guess]}\n{stored.probabilities[i].max():.2f}",
                fontsize=8,
                color="black" if guess == k else "crimson",
            )
    for axis in grid.flat:
        axis.set_axis_off()
    axis = right.subplots()
    matrix = np.array(results["confusion_matrix"])
    axis.imshow(matrix, cmap="Purples")
    for (row, column), count in np.ndenumerate(matrix):
        dark = count > matrix.max() / 2
        axis.text(
            column, row, str(count), ha="center", va="center", color="white" if dark else "black"
        )
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    path = folder / "demo.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def remove_demo(folder: str | Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
    for name in ("drawings", "demo.png", *DEMO_METHODS):
        path = Path(folder).expanduser() / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
