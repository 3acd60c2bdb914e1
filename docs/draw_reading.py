"""Draw the pictures of reading-results.md: `python docs/draw_reading.py` in the repository.

The predictions are simulated, without any image: 240 of 20 patients, who differ, and a model that
is too sure of itself. The charts are those of a run's report.
"""

from pathlib import Path

import numpy as np

from hf_glovlm.calibration.inputs import softmax
from hf_glovlm.curves import compute_curves, count_by_group
from hf_glovlm.metrics import compute_metrics
from hf_glovlm.reports.run_charts import (
    draw_confusion,
    draw_curves,
    draw_groups,
    draw_reliability,
)

FOLDER = Path(__file__).parent / "_static"
CLASSES = ["viable", "segmental sclerosis", "global sclerosis", "crescent"]
SHARES = [0.45, 0.25, 0.2, 0.1]


def main() -> None:
    """Write one SVG for each figure that the page explains."""
    rng = np.random.default_rng(7)
    labels = rng.choice(4, size=240, p=SHARES)
    patient = rng.integers(20, size=240)
    ease = rng.normal(1.9, 0.9, 20)[patient]  # some patients are harder than others
    logits = rng.normal(size=(240, 4))
    logits[np.arange(240), labels] += ease
    logits[labels == 1, 2] += 0.9  # segmental sclerosis is taken for global sclerosis
    answers = labels, softmax(1.6 * logits)
    groups = [f"{i:02d}" for i in patient]
    results = compute_metrics(*answers, groups=groups, class_names=CLASSES)
    results["curves"] = compute_curves(*answers, groups=groups, class_names=CLASSES)
    pair = next(p for p in draw_curves(results) if p["name"] == "segmental sclerosis")
    charts = {
        "per-patient": draw_groups(count_by_group(*answers, groups), "patients"),
        "confusion": draw_confusion(results),
        "roc": pair["roc"],
        "precision-recall": pair["precision_recall"],
        "reliability": draw_reliability(results["reliability"]["bins"]),
    }
    for name, chart in charts.items():
        if chart is not None:
            chart.save(FOLDER / f"reading-{name}.svg")


if __name__ == "__main__":
    main()
