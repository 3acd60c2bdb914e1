"""What the methods between the blocks leave behind loads and predicts as any other model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attaching import CLASSES, NAMES
from by_hand import IMAGES, pixels
from datasets import Dataset
from fresh_process import load_without_the_package
from tiny import tiny_clip, tiny_images, tiny_pair
from tolerance import assert_same_numbers

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.inference import predict
from hf_glovlm.model import GloVLMForImageClassification
from hf_glovlm.training import AdaptConfig, adapt

IMAGE = IMAGES[0].crop((0, 0, 36, 36))
MINE = ("vpt", "adapter", "maple", "cocoop")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes, four images each."""
    folder = tiny_images(tmp_path_factory.mktemp("data") / "support", per_class=4)
    return all_rows(load_dataset(folder))


def adapted_quickly(name: str, backbone: str, rows: Dataset) -> Any:
    model, processor = load_backbone(tiny_pair() if backbone == "pair" else str(tiny_clip()))
    return adapt(
        model,
        name,
        rows,
        processor=processor,
        classes=CLASSES,
        config=AdaptConfig({"reduction": 2} if name == "cocoop" else {}, QUICK[name], seed=3),
    )


QUICK: dict[str, dict[str, Any]] = {
    "vpt": {"epochs": 5, "lr": 0.05},
    "maple": {"epochs": 5, "lr": 0.02},
    "cocoop": {"epochs": 4, "lr": 1.0, "batch_size": 12},
    "adapter": {"epochs": 5},
}


@pytest.fixture(scope="module")
def runs(rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each method on CLIP and on a pair, adapted and saved: the result and its folder."""
    actual = {}
    for name in MINE:
        for backbone in ("clip", "pair"):
            folder = tmp_path_factory.mktemp(f"{name}-{backbone}")
            adapted = adapted_quickly(name, backbone, rows)
            adapted.save(folder)
            IMAGE.save(folder / "image.png")
            actual[f"{name}-{backbone}"] = (adapted, folder)
    return actual


ALL_RUNS = [f"{name}-{backbone}" for name in MINE for backbone in ("clip", "pair")]


@pytest.mark.parametrize("run", ALL_RUNS)
def test_adapt_learns_and_leaves_the_towers_alone(run: str, runs: dict[str, Any]) -> None:
    adapted, _ = runs[run]
    name, backbone = run.split("-")
    assert adapted.log[-1]["loss"] < adapted.log[0]["loss"]
    original, _ = load_backbone(tiny_pair() if backbone == "pair" else str(tiny_clip()))
    state = adapted.model.glovlm.state_dict()
    embedding = next(
        k for k in state if k.endswith(("token_embedding.weight", "word_embeddings.weight"))
    )
    for key, value in original.state_dict().items():
        if key == embedding and name == "maple":
            changed = (state[key] != value).any(1).nonzero().flatten().tolist()
            assert changed == sorted(adapted.processor.context_token_ids)
        elif "visual_projection" not in key:
            assert state[key].equal(value), key
    added = {key.split(".")[0] for key in set(state) - set(original.state_dict())}
    assert added - {"backbone"} == ({"inserts"} if name != "cocoop" else set())


@pytest.mark.parametrize("run", ALL_RUNS)
def test_save_and_load_is_exact(run: str, runs: dict[str, Any], rows: Dataset) -> None:
    adapted, folder = runs[run]
    loading: Any = GloVLMForImageClassification.from_pretrained(folder, output_loading_info=True)
    read, report = loading
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = adapted.model.state_dict()
    assert read.state_dict().keys() == state.keys()
    assert all(value.equal(state[key]) for key, value in read.state_dict().items())
    inputs = pixels(adapted.processor, torch.float32)
    with torch.no_grad():
        expected = adapted.model(**inputs).logits
        assert_same_numbers(read(**inputs).logits, expected)
    predicted = predict(read, adapted.processor, rows).logits
    with torch.no_grad():
        pictures = adapted.processor(images=list(rows["image"]), return_tensors="pt")
        whole = read(**pictures).logits.numpy()
    np.testing.assert_allclose(predicted, whole, atol=1e-4 * np.abs(whole).max())
    model, processor = load_backbone(str(folder))  # a backbone for the next method
    prompts = processor.encode_prompts(adapted.model.config.prompts)
    with torch.no_grad():
        texts = model.class_prototypes(**prompts)
        assert_same_numbers(texts, adapted.model.glovlm.class_prototypes(**prompts))


@pytest.mark.parametrize("name", MINE)
def test_the_same_seed_gives_the_same_model(name: str, runs: dict[str, Any], rows: Dataset) -> None:
    first, _ = runs[f"{name}-clip"]
    again = adapted_quickly(name, "clip", rows)
    state = first.model.state_dict()
    assert all(value.equal(state[key]) for key, value in again.model.state_dict().items())


TEXTS = """
prompts = processor.encode_prompts(model.config.prompts)
found["texts"] = model.glovlm.class_prototypes(**prompts).tolist()
"""


def test_remote_code_without_the_package(runs: dict[str, Any], tmp_path: Path) -> None:
    chosen = ("vpt-pair", "adapter-clip", "maple-clip", "cocoop-pair")
    result = load_without_the_package([runs[name][1] for name in chosen], tmp_path, TEXTS)
    for name in chosen:
        adapted, folder = runs[name]
        actual = result[folder.name]
        inputs = adapted.processor(images=[IMAGE], return_tensors="pt")
        prompts = adapted.processor.encode_prompts(adapted.model.config.prompts)
        with torch.no_grad():
            expected = adapted.model(**inputs).logits[0]
            prototypes = adapted.model.glovlm.class_prototypes(**prompts)
        assert_same_numbers(actual["logits"], expected)
        assert_same_numbers(actual["texts"], prototypes)
        probabilities = dict(zip(NAMES, expected.softmax(0).tolist(), strict=True))
        assert actual["scores"] == pytest.approx(probabilities, abs=1e-5), name
