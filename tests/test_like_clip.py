"""What transformers offers for CLIPModel and its image classifiers: the same for ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tolerance import assert_same_numbers
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_glovlm import GloVLMModel, adapt, load_backbone, load_dataset, target_modules
from hf_glovlm.errors import GloVLMError

KINDS: dict[str, Callable[[], Any]] = {
    "clip": tiny.tiny_clip,
    "siglip": tiny.tiny_siglip,
    "pair": tiny.tiny_pair,
}
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for i in range(6)
]
STOCK = ["clip", "siglip"]


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each kind, and a classifier beside it."""
    root = tmp_path_factory.mktemp("saved")
    support = load_dataset(tiny.tiny_images(root / "images", per_class=2))["all"]
    for name, make in KINDS.items():
        model, processor = load_backbone(str(make()))
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        adapt(model, "linear_probe", support, processor=processor).save(root / f"{name}-adapted")
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def model(kind: str, saved: dict[str, Path]) -> Any:
    return AutoModel.from_pretrained(saved[kind]).eval()


@pytest.fixture
def classifier(kind: str, saved: dict[str, Path]) -> Any:
    return AutoModelForImageClassification.from_pretrained(saved[f"{kind}-adapted"]).eval()


@pytest.fixture(scope="module")
def processor(kind: str) -> Any:
    return load_backbone(str(KINDS[kind]()))[1]


@pytest.fixture
def pixels(processor: Any) -> Any:
    return processor(images=IMAGES[:2], return_tensors="pt")["pixel_values"]


# ------------------------------------------------------------------------------------- pipelines


def test_the_pipeline_of_image_features(model: Any, processor: Any, pixels: Any) -> None:
    try:
        features = pipeline(
            "image-feature-extraction", model=model, image_processor=processor.image_processor
        )
        tokens = np.array(features(IMAGES[0]))
        pooled = np.array(features(IMAGES[0], pool=True))
    except ValueError as error:
        pytest.fail(str(error))
    with torch.no_grad():
        expected = model.get_image_features(pixels[:1])
    assert_same_numbers(tokens, expected.last_hidden_state)
    assert_same_numbers(pooled, expected.pooler_output)


def test_nothing_or_a_loss_of_images_alone_is_refused(model: Any, pixels: Any) -> None:
    with pytest.raises(ValueError, match="pixel_values and input_ids"):
        model()
    with pytest.raises(ValueError, match="pixel_values and input_ids"):
        model(pixel_values=pixels, return_loss=True)


# ------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("kind", STOCK, indirect=False)
def test_losses_and_tuples_are_those_of_the_stock_model(kind: str) -> None:
    stock = AutoModel.from_pretrained(str(KINDS[kind]())).eval()
    ours, processor = load_backbone(str(KINDS[kind]()))
    length = stock.config.text_config.max_position_embeddings
    inputs = processor(
        images=IMAGES[:3],
        text=["viable", "sclerosed", "mesangial"],
        padding="max_length",
        max_length=length,
        return_tensors="pt",
    )
    if kind == "siglip":
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        expected = stock(**inputs, return_loss=True, return_dict=False)
        actual = ours(**inputs, return_loss=True, return_dict=False)
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert [type(part) for part in actual] == [type(part) for part in expected]
    for mine, theirs in zip(actual[1:5], expected[1:5], strict=True):
        assert mine.shape == theirs.shape


def test_features_as_a_tuple(model: Any, processor: Any, pixels: Any) -> None:
    ids = processor(text=["viable"], return_tensors="pt")["input_ids"]
    for encode, given in ((model.get_image_features, pixels), (model.get_text_features, ids)):
        with torch.no_grad():
            whole = encode(given)
            try:
                parts = encode(given, return_dict=False)
            except AttributeError as error:
                pytest.fail(str(error))
        assert isinstance(parts, tuple)
        assert parts[1].equal(whole.pooler_output)


def test_the_config_asks_for_outputs(kind: str, saved: dict[str, Path], pixels: Any) -> None:
    folder = saved[f"{kind}-adapted"]
    load = AutoModelForImageClassification.from_pretrained
    with torch.no_grad():
        assert load(folder)(pixels).hidden_states is None
        asked = load(folder, output_hidden_states=True)(pixels)
        parts = load(folder, return_dict=False)(pixels)
    assert asked.hidden_states is not None
    assert len(asked.hidden_states) == 3
    assert isinstance(parts, tuple)
    assert parts[0].equal(asked.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_has_one_dtype(
    kind: str, saved: dict[str, Path], pixels: Any, dtype: torch.dtype
) -> None:
    model = AutoModelForImageClassification.from_pretrained(saved[f"{kind}-adapted"], dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        exact = AutoModelForImageClassification.from_pretrained(saved[f"{kind}-adapted"])(pixels)
        logits = model(pixels.to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact.logits, atol=0.2, rtol=0.1)


# ------------------------------------------------------------------------------------- embeddings


def test_the_token_embedding_is_resized(
    kind: str, saved: dict[str, Path], processor: Any, tmp_path: Path
) -> None:
    ids = processor(text=["a viable glomerulus", "sclerosed"], return_tensors="pt")["input_ids"]
    for name, auto in ((kind, AutoModel), (f"{kind}-adapted", AutoModelForImageClassification)):
        model = auto.from_pretrained(saved[name]).eval()
        towers = model if isinstance(model, GloVLMModel) else model.glovlm
        before = model.get_input_embeddings().num_embeddings
        with torch.no_grad():
            expected = towers.get_text_features(ids).pooler_output
        try:
            assert model.resize_token_embeddings(before + 5).num_embeddings == before + 5
        except NotImplementedError as error:
            pytest.fail(str(error))
        model.save_pretrained(tmp_path / name)
        again = auto.from_pretrained(tmp_path / name).eval()
        assert again.get_input_embeddings().num_embeddings == before + 5
        towers = again if isinstance(again, GloVLMModel) else again.glovlm
        with torch.no_grad():
            assert_same_numbers(towers.get_text_features(ids).pooler_output, expected)


def test_the_token_embedding_is_replaced(model: Any, classifier: Any) -> None:
    for one in (model, classifier):
        old = one.get_input_embeddings()
        new = torch.nn.Embedding(old.num_embeddings, old.embedding_dim)
        try:
            one.set_input_embeddings(new)
        except NotImplementedError as error:
            pytest.fail(str(error))
        assert one.get_input_embeddings() is new


def test_a_class_token_at_the_end_keeps_its_place() -> None:
    model, _ = load_backbone(tiny.tiny_pair())
    rows = model.get_input_embeddings().num_embeddings
    model.config.text_pooling = "appended_cls"
    try:
        with pytest.raises(ValueError, match="class token"):
            model.resize_token_embeddings(rows + 2)
    except NotImplementedError as error:
        pytest.fail(str(error))
    assert model.resize_token_embeddings().num_embeddings == rows


# ------------------------------------------------------------------------------------- training


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


@pytest.mark.parametrize(
    ("problem_type", "labels", "by_hand"),
    [
        (
            "single_label_classification",
            np.array([0, 1, 2, 0, 1, 2]),
            lambda z, y: -z.log_softmax(1)[torch.arange(6), y].mean(),
        ),
        (
            "multi_label_classification",
            np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]],
            lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(z, y),
        ),
        (
            "regression",
            np.arange(18, dtype=np.float32).reshape(6, 3) / 10,
            lambda z, y: ((z - y) ** 2).mean(),
        ),
    ],
)
def test_trainer_measures_the_logits(
    problem_type: str,
    labels: Any,
    by_hand: Any,
    classifier: Any,
    processor: Any,
    tmp_path: Path,
) -> None:
    classifier.config.problem_type = problem_type
    inputs = processor(images=IMAGES, return_tensors="pt")
    rows = [
        {**{k: v[i] for k, v in inputs.items()}, "labels": torch.as_tensor(labels[i])}
        for i in range(6)
    ]
    seen: list[Any] = []

    def measure(evaluated: Any) -> dict[str, float]:
        seen.append(evaluated.predictions)
        return {"images": len(evaluated.label_ids)}

    trainer = Trainer(classifier, arguments(tmp_path), train_dataset=rows, compute_metrics=measure)
    trainer.train()
    measured = trainer.evaluate(rows)
    with torch.no_grad():
        logits = classifier.eval()(**inputs).logits
    assert isinstance(seen[0], np.ndarray), "more than the logits"
    assert_same_numbers(seen[0], logits)
    assert_same_numbers(trainer.predict(rows).predictions, logits)
    assert measured["eval_images"] == 6
    expected = float(by_hand(logits, torch.as_tensor(labels)))
    # Trainer averages over batches, of 5 and 1
    assert measured["eval_loss"] == pytest.approx(expected, rel=0.6)


@pytest.mark.parametrize("kind", STOCK, indirect=False)
def test_trainer_measures_the_similarities(kind: str, tmp_path: Path) -> None:
    model, processor = load_backbone(str(KINDS[kind]()))
    texts = ["viable glomerulus", "sclerosed", "mesangial"] * 2
    inputs = processor(images=IMAGES, text=texts, padding="max_length", return_tensors="pt")
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(6)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {**torch.utils.data.default_collate(batch), "return_loss": True}

    seen: list[Any] = []
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=collate,
        compute_metrics=lambda evaluated: seen.append(evaluated.predictions) or {},  # type: ignore[func-returns-value]
    )
    assert np.isfinite(trainer.train().training_loss)
    predicted = trainer.predict(rows[:5])
    assert isinstance(predicted.predictions, np.ndarray), "more than the similarities"
    with torch.no_grad():
        logits = model.eval()(**collate(rows[:5])).logits_per_image
    assert_same_numbers(predicted.predictions, logits)


def test_new_classes_start_clean(kind: str, saved: dict[str, Path], pixels: Any) -> None:
    old = AutoModelForImageClassification.from_pretrained(saved[f"{kind}-adapted"])
    old.config.temperature, old.config.calibration = 2.0, {"notes": ["Of three classes."]}
    folder = saved[f"{kind}-adapted"].parent / f"{kind}-calibrated"
    old.save_pretrained(folder)
    new = AutoModelForImageClassification.from_pretrained(
        folder, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    assert (new.config.temperature, new.config.calibration, new.config.prompts) == (1.0, None, None)
    loss = new(pixels, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert new.head.weight.grad is not None
    assert AutoModelForImageClassification.from_pretrained(
        saved[kind], num_labels=4
    )(pixels).logits.shape == (2, 4)  # fmt: skip


# ------------------------------------------------------------------------------------- PEFT


def test_target_modules_of_whatever_holds_the_towers(kind: str, saved: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(saved[kind])
    adapted = AutoModelForImageClassification.from_pretrained(saved[f"{kind}-adapted"])
    expected = target_modules(model.backbone, "vision", last=1)
    holders = [model, adapted, str(saved[kind]), saved[f"{kind}-adapted"], str(KINDS[kind]())]
    try:
        names = [target_modules(holder, "vision", last=1) for holder in holders]
    except AttributeError as error:
        pytest.fail(str(error))
    assert names == [expected] * len(holders)
    from peft import LoraConfig, get_peft_model

    for holder in (model, adapted):
        tuned = get_peft_model(holder, LoraConfig(target_modules=expected))
        layers = {n.rpartition(".lora_A")[0] for n, _ in tuned.named_modules() if ".lora_A." in n}
        assert len(layers) == len(expected)


def test_target_modules_of_stock_models() -> None:
    stock = CLIPModel.from_pretrained(tiny.tiny_clip())
    assert target_modules(stock) == target_modules(load_backbone(str(tiny.tiny_clip()))[0].backbone)
    try:
        with pytest.raises(GloVLMError, match=r"Expected a dual encoder.*found BertModel"):
            target_modules(AutoModel.from_pretrained(tiny.tiny_bert()))
    except AttributeError as error:
        pytest.fail(str(error))
