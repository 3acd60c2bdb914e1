"""`mini` on synthetic images: a known-answer test of the whole chain, never a result."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel

from hf_glovlm.backbones import MINI, load_backbone
from hf_glovlm.data import catalog_entry
from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.demo import DEMO_METHODS, run_demo
from hf_glovlm.lab.phantoms import CLASSES, render_cohort, render_glomerulus
from hf_glovlm.lab.pretraining import PretrainConfig, pretrain


@pytest.fixture(scope="module")
def mini() -> tuple[Any, Any]:
    return load_backbone("mini")


def probabilities(
    mini: tuple[Any, Any], images: list[Image.Image], texts: list[list[str]] | None = None
) -> np.ndarray[Any, Any]:
    """Zero-shot class probabilities [n, 5]; by default one published prompt a class."""
    model, processor = mini
    prompts = {c.name: c.prompts[0] for c in catalog_entry("synthetic_glomeruli").classes}
    encoded = processor.encode_prompts(texts or [[prompts[c]] for c in CLASSES])
    with torch.inference_mode():
        prototypes = model.class_prototypes(**encoded)
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixels).pooler_output
        features = torch.nn.functional.normalize(features, dim=-1)
        return (model.logit_scale.exp() * features @ prototypes.T).softmax(-1).numpy()


def test_it_is_small_says_what_it_is_and_is_plain_clip() -> None:
    assert 2e6 <= sum(p.stat().st_size for p in MINI.iterdir()) <= 4e6
    card = " ".join((MINI / "README.md").read_text().split())
    assert "synthetic images" in card
    assert "Not for diagnosis" in card
    facts = json.loads((MINI / "pretraining.json").read_text())
    assert f"{facts['accuracy']:.3f} on synthetic images" in card
    stock = AutoModel.from_pretrained(MINI)
    assert isinstance(stock, CLIPModel)
    assert stock.dtype == torch.float16  # as stored
    assert load_backbone("mini")[0].dtype == torch.float32


def test_zero_shot_on_unseen_synthetic_patients(mini: tuple[Any, Any]) -> None:
    cohort = render_cohort(12, 10, seed=777)
    guess = probabilities(mini, [p.image for p in cohort]).argmax(1)
    truth = np.array([CLASSES.index(p.class_name) for p in cohort])
    assert (guess == truth).mean() >= 0.6  # chance is 0.2
    rng = np.random.default_rng(0)
    permuted = np.mean([(guess == rng.permutation(truth)).mean() for _ in range(20)])
    assert abs(permuted - 0.2) < 0.06


TEMPLATES = ("a photo of a {}", "{}", "an H&E image of {}", "what you see is {}, she wrote")


@pytest.mark.parametrize("template", TEMPLATES)
def test_zero_shot_reads_the_class_in_any_template(mini: tuple[Any, Any], template: str) -> None:
    cohort = render_cohort(12, 10, seed=778)
    truth = np.array([CLASSES.index(p.class_name) for p in cohort])
    shown = {c.name: c.display_name for c in catalog_entry("synthetic_glomeruli").classes}
    texts = [[template.format(shown[c].lower())] for c in CLASSES]
    guess = probabilities(mini, [p.image for p in cohort], texts)
    assert (guess.argmax(1) == truth).mean() >= 0.85


def test_a_text_is_pooled_at_its_end(mini: tuple[Any, Any]) -> None:
    stock = AutoModel.from_pretrained(MINI).float()
    tokenizer = mini[1].tokenizer
    ids = tokenizer(
        ["a photo of a viable glomerulus", "a photo of a sclerotic glomerulus"],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        one, other = stock.get_text_features(**ids).pooler_output
    assert torch.cosine_similarity(one, other, dim=0) < 0.9
    end = tokenizer.eos_token_id
    assert end == max(tokenizer.get_vocab().values())  # for readers of the highest id too
    assert stock.config.text_config.eos_token_id == end
    assert end not in (tokenizer.pad_token_id, tokenizer.bos_token_id)


@pytest.mark.parametrize("name", [c for c in CLASSES if c != "viable"])
def test_a_lesions_score_rises_with_its_severity(mini: tuple[Any, Any], name: str) -> None:
    steps = (0.0, 0.4, 0.7, 1.0)
    images = [render_glomerulus(name, seed=i, severity=s).image for s in steps for i in range(24)]
    shares = probabilities(mini, images)
    lesion, viable = shares[:, CLASSES.index(name)], shares[:, CLASSES.index("viable")]
    # Against viable, since severity 0 is viable: the severest forms of two lesions look alike.
    score = (lesion / (lesion + viable)).reshape(len(steps), -1).mean(1)
    assert score[0] < 0.5 < score[-1]
    assert (np.diff(score) > -0.02).all(), score


def test_the_demo_does_the_main_job(tmp_path: Path) -> None:
    demo = run_demo(tmp_path / "demo", patients=20, per_patient=5)
    assert demo["reload_difference"] < 1e-4
    assert Path(demo["figure"]).stat().st_size > 10_000
    for method in DEMO_METHODS:
        results = demo["runs"][method]
        assert results["synthetic"] is True
        assert "synthetic" in (tmp_path / "demo" / method / "README.md").read_text()
        assert results["metrics"]["macro_auc"]["value"] > 0.8
    assert demo["runs"]["lora"]["data"]["support"]["label_budget"] == 40
    with pytest.raises(GloVLMError, match="new or empty folder"):
        run_demo(tmp_path / "demo")


@pytest.mark.long
def test_pretraining_makes_a_loadable_folder_and_repeats_itself(tmp_path: Path) -> None:
    def make(name: str) -> dict[str, Any]:
        return pretrain(
            PretrainConfig(
                str(tmp_path / name), seed=3, patients=4, per_patient=5, epochs=2, batch_size=10,
                image_size=32, patch_size=8, workers=1,
            )
        )  # fmt: skip

    facts = make("a")
    assert facts["images"] == 20
    assert len(facts["log"]) == 2
    assert facts["log"][1]["loss"] < facts["log"][0]["loss"] + 0.5
    assert not list((tmp_path / "a").glob("*checkpoint*"))
    make("b")
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in "ab")
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
    model, processor = load_backbone(str(tmp_path / "a"))
    assert processor.tokenizer("a glomerulus")["input_ids"][-1] == processor.tokenizer.eos_token_id
    assert model.has_joint_space


def test_pretraining_goes_on_with_its_own_images_and_settings_alone(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any]) -> None:
        raise Killed

    config = PretrainConfig(
        str(tmp_path / "out"), seed=3, patients=4, per_patient=5, epochs=2, batch_size=10,
        image_size=32, patch_size=8, workers=1,
    )  # fmt: skip
    with pytest.raises(Killed):
        pretrain(config, on_epoch=kill)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(GloVLMError, match=r"the images have changed.*--overwrite"):
        pretrain(replace(config, resume=True, patients=5))
    epochs: list[int] = []
    pretrain(replace(config, resume=True), on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [2]
    facts = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert facts["kind"] == "pretraining"
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(GloVLMError, match=r"model\.safetensors' has changed"):
        load_backbone(str(tmp_path / "out"))


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="multiple of patch_size"):
        pretrain(PretrainConfig(str(tmp_path), image_size=96, patch_size=10))
