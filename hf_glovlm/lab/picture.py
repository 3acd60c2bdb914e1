"""Picture of the README: from outlined glomeruli to counts, on synthetic images alone.

`python -m hf_glovlm.lab.picture docs/pictures/road.svg` draws it: a synthetic biopsy, the class
that a model of eight labels a class gives each glomerulus, and the counts with their intervals.
"""

import base64
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..files import write_text
from ..model import GloVLMForImageClassification, GloVLMProcessor
from ..rendering import render_page
from ..runs import TrainConfig, run
from ..slides.counting import count_classes
from .phantoms import SyntheticImage, draw_patient, render_glomerulus, write_cohort

SHOTS, SIDE, COLUMNS = 8, 128, 5  # labels a class; pixels and glomeruli of a row
# A synthetic biopsy: how many glomeruli of each class.
BIOPSY = {"viable": 9, "global_sclerosis": 5, "ischemic": 3, "segmental_sclerosis": 3}


def render_biopsy(seed: int) -> list[SyntheticImage]:
    """Synthetic glomeruli of one patient in one stain, their classes mixed."""
    patient = draw_patient(seed)
    names = [name for name, n in BIOPSY.items() for _ in range(n)]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        render_glomerulus(names[i], seed=seed + i, stain="PAS", size=SIDE, patient=patient)
        for i in order
    ]


def classify(images: Sequence[Image.Image]) -> tuple[list[str], list[list[float]]]:
    """Class names, and probabilities of each image by `mini` with a linear probe, `[n, K]`."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_cohort(Path(folder, "cohort"), 24, 15, seed=1)
        output = Path(folder, "run")
        run(TrainConfig(data=str(cohort), output_dir=str(output), shots=SHOTS, cache=False))
        model = GloVLMForImageClassification.from_pretrained(output / "model").eval()
        processor = GloVLMProcessor.from_pretrained(output / "model")
        with torch.inference_mode():
            logits = model(**processor(images=list(images), return_tensors="pt")).logits
    names = [model.config.id2label[k] for k in range(logits.shape[1])]
    return names, logits.softmax(-1).tolist()


def draw_picture(seed: int = 42) -> str:
    """The picture as SVG, in light and dark."""
    biopsy = render_biopsy(seed)
    names, probabilities = classify([one.image for one in biopsy])
    counts = count_classes(probabilities, names)["all"]["classes"]
    shown = sorted(names, key=lambda name: -counts[name]["count"])
    calls = [names[max(range(len(names)), key=row.__getitem__)] for row in probabilities]
    return render_page("road.svg.j2", values_of(biopsy, calls, probabilities, shown, counts))


def values_of(
    biopsy: Sequence[SyntheticImage],
    calls: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    shown: Sequence[str],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """What `road.svg.j2` names."""
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(biopsy) // COLUMNS) * SIDE))
    for i, one in enumerate(biopsy):
        sheet.paste(one.image, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=72)
    return {
        "sheet": base64.b64encode(stream.getvalue()).decode("ascii"),
        "glomeruli": [
            {
                "column": i % COLUMNS,
                "row": i // COLUMNS,
                "series": shown.index(call) + 1,
                "p": max(row),
            }
            for i, (call, row) in enumerate(zip(calls, probabilities, strict=True))
        ],
        "classes": [{"name": name.replace("_", " "), **counts[name]} for name in shown],
        "n": len(biopsy),
        "shots": SHOTS,
    }


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), draw_picture())
