"""Class texts: two classes of one vector are refused with the reason, and cut texts are noted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, CONTEXT, tiny_bert, tiny_clip, tiny_dinov2, tiny_images, tiny_siglip

import hf_glovlm
from hf_glovlm.backbones import load_backbone
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import embed_prompts
from hf_glovlm.inference.sentences import build_zero_shot

LONG = "a pathology image of " + "a globally sclerosed glomerulus and " * CONTEXT


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tiny_images(tmp_path / "images")


def write_prompts(folder: Path, prompts: dict[str, str]) -> None:
    lines = [f"  {name}: {{prompts: [{json.dumps(text)}]}}" for name, text in prompts.items()]
    (folder / "classes.yaml").write_text("classes:\n" + "\n".join(lines) + "\n")


def pooled_at_the_start(tmp_path: Path) -> str:
    """A CLIP whose text tower reads its start token, where nothing of the text has entered yet."""
    folder = tiny_clip(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["eos_token_id"] = text["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


SAME = dict.fromkeys(CLASSES, "a photo of a glomerulus")
FAR = {name: f"{LONG} {name}" for name in CLASSES}
OWN = {name: f"a photo of a {name} glomerulus" for name in CLASSES}


@pytest.mark.parametrize("method", ["zero_shot", "tip_adapter", "lora", "prompt_tuning", "vanilla"])
@pytest.mark.parametrize(
    ("prompts", "backbone", "reason"),
    [
        (SAME, lambda tmp: str(tiny_clip()), "share the prompt"),
        (FAR, lambda tmp: str(tiny_clip()), "stops reading"),
        (FAR, lambda tmp: str(tiny_siglip()), "stops reading"),
        (OWN, pooled_at_the_start, "pools them at a place in front of the difference"),
    ],
    ids=["one template", "beyond the context", "beyond the context of siglip", "wrong end token"],
)
def test_classes_whose_texts_give_one_vector_are_refused_before_training(
    method: str,
    prompts: dict[str, str],
    backbone: Callable[[Path], str],
    reason: str,
    images: Path,
    tmp_path: Path,
) -> None:
    if method == "prompt_tuning" and prompts is not OWN:
        pytest.skip("it writes its own texts from the classes' names")
    write_prompts(images, prompts)
    config = hf_glovlm.TrainConfig(
        data=str(images), backbone=backbone(tmp_path), method=method, shots=1, cache=False,
        max_steps=1 if method in ("lora", "prompt_tuning", "vanilla") else None,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(GloVLMError, match=f"'mesangial' and 'sclerosed' .*{reason}"):
        hf_glovlm.run(config)
    assert not (tmp_path / "run" / "results.json").exists()


def test_words_that_a_tokenizer_does_not_keep_apart_are_refused(tmp_path: Path) -> None:
    pair = f"{tiny_dinov2()}+{tiny_bert()}"
    model, processor = load_backbone(pair)
    with pytest.raises(GloVLMError, match=r"tokenizer reads .* as the same tokens"):
        embed_prompts(model, processor, [["硝子化"], ["半月体"]], names=["hyaline", "crescent"])
    vectors = embed_prompts(model, processor, [["viable"], ["sclerosed"]], names=["v", "s"])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_own_words_of_one_vector_are_refused(tmp_path: Path) -> None:
    model, processor = load_backbone(pooled_at_the_start(tmp_path))
    words = {"viable": ["a viable glomerulus"], "sclerosed": ["a sclerosed glomerulus"]}
    with pytest.raises(GloVLMError, match="give one and the same vector"):
        build_zero_shot(model, processor, words)


def test_the_stock_pipeline_refuses_texts_of_one_vector(tmp_path: Path, images: Path) -> None:
    from transformers import pipeline

    for backbone, refused in ((pooled_at_the_start(tmp_path), True), (str(tiny_clip()), False)):
        model, processor = load_backbone(backbone)
        folder = tmp_path / f"saved-{refused}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        ask: Any = pipeline("zero-shot-image-classification", model=str(folder))
        image, labels = str(next(images.rglob("*.png"))), ["viable", "sclerosed"]
        if refused:
            with pytest.raises(ValueError, match="gives them one vector"):
                ask(image, candidate_labels=labels)
        else:
            assert {answer["label"] for answer in ask(image, candidate_labels=labels)} == {*labels}
        shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["zero_shot", "lora"])
def test_texts_that_are_cut_are_noted(method: str, images: Path, tmp_path: Path) -> None:
    write_prompts(images, OWN | {"viable": f"a viable glomerulus, {LONG}"})
    results = hf_glovlm.run(
        hf_glovlm.TrainConfig(
            data=str(images), backbone=str(tiny_clip()), method=method, shots=1, cache=False,
            max_steps=1 if method == "lora" else None, output_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    (note,) = [n for n in results["notes"] if "cut" in n]
    assert f"1 of 3 class texts are longer than the {CONTEXT} tokens" in note
    assert "a viable glomerulus" in note


def test_texts_of_one_class_and_of_a_batch_may_repeat() -> None:
    model, processor = load_backbone(str(tiny_clip()))
    twice = [["a viable glomerulus"] * 2, ["a sclerosed glomerulus"]]
    embed_prompts(model, processor, twice, names=["viable", "sclerosed"])
    encoded = processor(text=["a tuft", "a tuft"], return_tensors="pt")
    pixels = torch.zeros(1, 3, 32, 32)
    output = model.eval()(**encoded, pixel_values=pixels)
    assert output.logits_per_image.shape == (1, 2)


# ------------------------------------------------------------------------------- the backbone


def test_photographs_need_a_named_backbone(images: Path, tmp_path: Path) -> None:
    run = {"data": str(images), "output_dir": str(tmp_path / "run"), "shots": 1, "cache": False}
    with pytest.raises(GloVLMError, match=r"need a backbone.*--backbone.*synthetic images only"):
        hf_glovlm.run(hf_glovlm.TrainConfig(**run))
    assert not (tmp_path / "run").exists()


def test_a_study_of_photographs_needs_a_named_backbone(images: Path) -> None:
    with pytest.raises(GloVLMError, match="need a backbone"):
        hf_glovlm.StudyConfig.from_mapping({"data": str(images), "methods": ["linear_probe"]})


def test_mini_on_photographs_is_named_in_terminal_notes_and_card(
    images: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    results = hf_glovlm.run(
        hf_glovlm.TrainConfig(
            data=str(images), backbone="mini", output_dir=str(tmp_path / "run"), shots=1,
            cache=False,
        ),
        on_event=lambda kind, what: stages.append(what["name"]) if kind == "stage" else None,
    )  # fmt: skip
    assert "loading the backbone: mini" in stages
    words = "has seen synthetic images only"
    assert any(words in note for note in results["notes"])
    assert words in " ".join((tmp_path / "run" / "README.md").read_text().split())


def test_synthetic_images_take_the_embedded_backbone(tmp_path: Path) -> None:
    cohort = hf_glovlm.write_cohort(tmp_path / "cohort", 6, 5, seed=1)
    results = hf_glovlm.run(
        hf_glovlm.TrainConfig(
            data=str(cohort), output_dir=str(tmp_path / "run"), shots=1, cache=False
        )
    )
    assert results["backbone"]["name"] == results["config"]["backbone"] == "mini"
    assert not any("photographs" in note for note in results["notes"])
