"""Graphs of towers of every kind: they compute what the model does."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_explain import classifier
from test_outline_input import disc, picture

from hf_glovlm import open_engine
from hf_glovlm.data.outlines import outlined

pytestmark = pytest.mark.long


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("outline", ["ignore", "blank+pool"])
@pytest.mark.parametrize("name", ["clip", "siglip", "pair"])
def test_a_graph_computes_the_tower(name: str, outline: str, runtime: str) -> None:
    if find_spec("openvino" if runtime == "openvino" else "onnxruntime") is None:
        pytest.skip(f"no {runtime} is installed")
    model, processor = classifier(name)
    model.config.outline = model.glovlm.config.outline = processor.outline = outline
    images: list[Any] = [outlined(picture(i, 44), disc(44, 0.2 + 0.1 * i)) for i in range(3)]
    inputs = dict(processor(images=images, return_tensors="pt"))
    assert inputs["pixel_values"].shape[1] == (4 if "pool" in outline else 3)
    with torch.inference_mode():
        plain = model.glovlm.pool_images_and_middle(**inputs)
    engine = open_engine(model, processor, runtime=runtime)
    for ours, theirs in zip(engine.pool(inputs), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
