"""ONNX graphs of models that see outlines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import ask, classifier, read_export
from test_outline_input import disc, picture

from hf_glovlm.data.outlines import outlined
from hf_glovlm.publish.onnx_graph import export_classifier

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_graph_takes_the_outline_as_a_fourth_channel(name: str, tmp_path: Path) -> None:
    model, processor = classifier(name)
    model.config.outline = processor.outline = "blank+pool"
    export_classifier(model, processor, tmp_path / "graph")
    assert read_export(tmp_path / "graph")["input"]["shape"] == ["batch", 4, 32, 32]
    images = [outlined(picture(i, 44), disc(44, 0.2 + 0.1 * i)) for i in range(3)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        whole = model(pixel_values=pixels[:, :3]).logits
    np.testing.assert_allclose(ask(tmp_path / "graph", pixels), expected, atol=1e-4)
    assert not torch.allclose(whole, expected, atol=1e-3)
