"""Inputs of the long checks, made once: patients, slides, outlines, a classifier, bags."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cohort`, `slides`, `s0.geojson` ..., `model`, `bags`, `slides.csv`, `study.yaml`."""
    from command_process import run
    from slides_made import write_slide

    from hf_glovlm.lab.phantoms import write_cohort

    folder = tmp_path_factory.mktemp("inputs")
    write_cohort(folder / "cohort", 8, 8, seed=1)
    (folder / "slides").mkdir()
    rows = ["slide,label,patient_id"]
    for i in range(6):
        lesions = 3 * (i % 2)
        path = folder / "slides" / f"s{i}.tiff"
        write_slide(path, 640, 560, lesions=lesions, lesion_side=64, seed=i)
        rows.append(f"s{i},{'lesion' if lesions else 'none'},P{i}")
        features = [
            {
                "type": "Feature",
                "id": f"{i}-{j}",
                "geometry": {"type": "Polygon", "coordinates": [_square(x, y, 60)]},
                "properties": {"classification": {"name": ("viable", "sclerosed")[j % 2]}},
            }
            for j, (x, y) in enumerate((x, y) for x in range(80, 400, 80) for y in (120, 300))
        ]
        content = {"type": "FeatureCollection", "features": features}
        (folder / f"s{i}.geojson").write_text(json.dumps(content))
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")
    (folder / "study.yaml").write_text(
        f"data: {folder / 'cohort'}\nmethods: [prototype, linear_probe, tip_adapter]\ndraws: 3\n"
        "shots: 2\nn_resamples: 50\n"
    )
    train = ["train", "--data", folder / "cohort", "--method", "prototype", "--shots", "2"]
    done = run([*train, "--output-dir", folder / "model"], folder / "train.log")
    assert done.code == 0, done.printed
    slides = sorted((folder / "slides").iterdir())
    command = ["slide", folder / "model", *slides, "--tile-size", "64"]
    done = run([*command, "--output-dir", folder / "made"], folder / "slide.log")
    assert done.code == 0, done.printed
    (folder / "made" / "features").rename(folder / "bags")
    return folder


def _square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
