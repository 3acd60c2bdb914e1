"""Compatibility: a model folder of version 0.1 loads and gives the same predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tolerance import assert_same_numbers
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor

import hf_glovlm

FROZEN = Path(__file__).parent / "frozen"


@pytest.fixture(scope="module")
def image() -> Image.Image:
    y, x = np.mgrid[0:48, 0:40]
    channels = [(5 * x) % 256, (7 * y) % 256, (3 * x + 2 * y) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("version", ["0.1"])
def test_frozen_folder_gives_the_same_logits(version: str, image: Image.Image) -> None:
    folder = FROZEN / f"model-{version}"
    expected = json.loads((FROZEN / f"model-{version}.json").read_text())
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**processor(images=image, return_tensors="pt")).logits[0]
    assert_same_numbers(logits, expected["logits"])
    assert {str(k): v for k, v in model.config.id2label.items()} == expected["id2label"]
    assert model.config.prompts == expected["prompts"]


@pytest.mark.parametrize("version", ["0.1"])
def test_frozen_folder_is_also_a_backbone(version: str) -> None:
    folder = FROZEN / f"model-{version}"
    model, _ = hf_glovlm.load_backbone(str(folder))
    other = AutoModel.from_pretrained(folder)
    assert isinstance(other, hf_glovlm.GloVLMModel)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_no_frozen_folder_names_a_place_on_some_disk() -> None:
    for path in FROZEN.rglob("*.json"):
        text = path.read_text()
        assert not any(place in text for place in ("/tmp/", "/home/", "/work/")), path
