"""The synthetic data on which `record_commands.py` runs its commands.

It is made once and kept in a recording; `--inputs` hands it to the next one, since tokenizers that
are trained twice order their vocabularies differently. Only the functions of `DRAWN_BY` are the
package's own.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import published
import tiny
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

# The functions that draw the inputs: where they move to, and where they were.
DRAWN_BY = {
    "write_cohort": ("hf_glovlm.lab.phantoms", "hf_glovlm.data.phantoms"),
    "write_slide": ("hf_glovlm.lab.slide_bench", "hf_glovlm.slides.benchmark"),
}


def make_inputs(folder: Path) -> None:
    """Make the data of all commands: cohorts, masks, slides, outlines, settings, tiny models."""
    write_cohort, write_slide = map(find_function, DRAWN_BY)
    write_cohort(folder / "cohort", 12, 10, seed=1)
    write_cohort(folder / "other", 4, 5, seed=3)
    for name, letter in (("cohort", "P"), ("other", "Q")):  # no patient is in both
        table = folder / name / "metadata.csv"
        header, *rows = table.read_text().splitlines()
        rows = [row.replace(",P0", f",{letter}0") + ",0.5" for row in rows]
        write_text(table, [f"{header},mpp", *rows])
    disc = make_disc(96)
    for path in (folder / "other").rglob("*.png"):
        mask = folder / "masks" / path.relative_to(folder / "other")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(disc).save(mask)

    (folder / "unreadable").mkdir()
    shutil.copy(folder / "other/viable/P001_001.png", folder / "unreadable/good.png")
    (folder / "unreadable/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    for name in ("one", "two"):  # one image with two labels
        (folder / "contradiction" / name).mkdir(parents=True)
        shutil.copy(folder / "other/viable/P001_001.png", folder / "contradiction" / name)

    (folder / "slides").mkdir()
    rows = ["slide,label,patient_id"]
    for i in range(8):
        lesions = 3 * (i % 2)
        path = folder / "slides" / f"s{i}.tiff"
        write_slide(path, 640, 560, lesions=lesions, lesion_side=64, seed=i)
        rows.append(f"s{i},{'lesion' if lesions else 'none'},P{i}")
    write_text(folder / "slides.csv", rows)
    (folder / "broken.svs").write_bytes(b"II*\0 no slide")

    boxes = ((150, 120, 80, "viable"), (250, 200, 60, "sclerosed"), (60, 300, 50, None))
    features = [outline(i, *box) for i, box in enumerate(boxes)]
    write_json(folder / "s1.geojson", {"type": "FeatureCollection", "features": features})
    mask = np.zeros((560, 640, 3), dtype=np.uint8)
    for (x, y, side, _), colour in zip(boxes, ((0, 128, 0), (255, 0, 0)), strict=False):
        mask[y : y + side, x : x + side][make_disc(side) > 0] = colour
    Image.fromarray(mask).save(folder / "s1-mask.png")

    study = ["data: inputs/cohort", "methods: [prototype, linear_probe, tip_adapter]", "draws: 2"]
    write_text(folder / "study.yaml", [*study, "shots: 2", "n_resamples: 50"])
    write_text(folder / "misspelt.yaml", ["data: inputs/cohort", "methd: lora"])
    make_models(folder / "models")


def make_models(folder: Path) -> None:
    """Save tiny models with random weights: towers, published layouts, an image-to-text model."""
    for make in (tiny.tiny_siglip2, tiny.tiny_dinov2, tiny.tiny_bert):
        make(folder)
    for kind, publish in published.LAYOUTS.items():
        (folder / kind).mkdir()
        publish(folder / kind)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny_bert")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = ViTConfig(**size, num_attention_heads=2, image_size=32, patch_size=16)
    text = BertConfig(
        **size,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        is_decoder=True,
        add_cross_attention=True,
    )
    model = VisionEncoderDecoderModel(encoder=ViTModel(vision), decoder=BertLMHeadModel(text))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "captioner")
    tokenizer.save_pretrained(folder / "captioner")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "captioner")


def find_function(name: str) -> Callable[..., Any]:
    """A function that draws inputs, in the first module of its row that there is."""
    for module in DRAWN_BY[name]:
        with suppress(ModuleNotFoundError):
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
            return found
    raise ModuleNotFoundError(
        f"{name} is in none of {', '.join(DRAWN_BY[name])}: add its module to DRAWN_BY, or give "
        "--inputs."
    )


def make_disc(side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A white disc on black, four fifths as wide as its square."""
    down, across = np.mgrid[:side, :side] - (side - 1) / 2
    return (255 * (np.hypot(down, across) < 0.4 * side)).astype(np.uint8)


def outline(number: int, x: int, y: int, side: int, name: str | None) -> dict[str, Any]:
    """A square as QuPath writes it."""
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {
        "type": "Feature",
        "id": f"object-{number}",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name}} if name else {},
    }


def write_text(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
