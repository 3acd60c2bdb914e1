"""Whatever the method, a few labelled images become one class of model that works everywhere."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attaching import adapt_with
from datasets import ClassLabel, Dataset
from fresh_process import run_script
from safetensors.torch import load_file, save_file
from tiny import CLASSES, tiny_clip, tiny_images, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, CLIPModel, pipeline

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import ClassInfo, all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import FeatureCache, embed_images, embed_prompts, predict
from hf_glovlm.methods import METHODS, HeadMethod, TowerMethod, give_joint_space
from hf_glovlm.model import GloVLMModel, GloVLMProcessor
from hf_glovlm.training import AdaptConfig, Adapted, adapt
from hf_glovlm.training.losses import HeadStep, TowerStep, infonce

BACKBONES: dict[str, Callable[[], Any]] = {"clip": tiny_clip, "pair": tiny_pair}
TOWER = [name for name, m in METHODS.items() if isinstance(m, TowerMethod)]
TRAINED = [name for name, m in METHODS.items() if isinstance(m, TowerMethod | HeadMethod)]
EVERY = [
    (method, backbone)
    for method in METHODS
    for backbone in BACKBONES
    if (method, backbone) != ("zero_shot", "pair")
]
QUICK = {"epochs": 2}
# They start from the class texts and see the whole support at every step: nothing is drawn.
WITHOUT_CHANCE = {"zs_lp", "clap", "taskres", "tip_adapter_f", "prolip"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes, eight images each."""
    folder = tiny_images(tmp_path_factory.mktemp("data") / "support")
    return all_rows(load_dataset(folder))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same classes, other patients and noise."""
    folder = tiny_images(tmp_path_factory.mktemp("data") / "unseen", per_class=12, seed=9)
    return all_rows(load_dataset(folder))


def pick(rows: Dataset, *counts: int) -> Dataset:
    """The first images of each class."""
    labels = rows["label"][:]
    index = [
        i
        for k, count in enumerate(counts)
        for i in [j for j, label in enumerate(labels) if label == k][:count]
    ]
    return rows.select(index)


@cache
def _loaded(name: str) -> tuple[GloVLMModel, GloVLMProcessor]:
    return load_backbone(str(BACKBONES[name]()))


def backbone(name: str) -> tuple[GloVLMModel, GloVLMProcessor]:
    """A copy of its own, which takes less time than to load it again."""
    return copy.deepcopy(_loaded(name))


def quick(method: str, name: str, support: Dataset, **options: Any) -> Adapted:
    model, processor = backbone(name)
    given: dict[str, Any] = {"processor": processor, "recipe": QUICK if method in TRAINED else {}}
    if METHODS[method].transductive:
        given["query"] = support
    return adapt_with(model, method, support, **{**given, **options})


def weights(adapted: Adapted) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in adapted.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def pixels(processor: GloVLMProcessor, rows: Dataset) -> Tensor:
    values: Tensor = processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]
    return values


def accuracy(adapted: Adapted, rows: Dataset) -> float:
    predictions = predict(adapted.model, adapted.processor, rows)
    assert predictions.labels is not None
    return float((predictions.probabilities.argmax(1) == predictions.labels).mean())


# --------------------------------------------------------------------- every method, every backbone


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_a_method_leaves_a_classifier_that_reloads_and_predicts_the_same(
    method: str, name: str, rows: Dataset, unseen: Dataset, tmp_path: Path
) -> None:
    """Unbalanced classes, a single image of one, and a last batch of one image are enough."""
    recipe = {**QUICK, "batch_size": 11} if method in TRAINED else {}
    adapted = quick(method, name, pick(rows, 8, 1, 3), recipe=recipe)
    assert not adapted.model.training
    if method in TRAINED:
        assert len(adapted.log) == 2
        assert all(math.isfinite(row["loss"]) for row in adapted.log)
    some = unseen.select(range(0, 36, 9))
    x = pixels(adapted.processor, some)
    with torch.no_grad():
        logits = adapted.model(pixel_values=x).logits
    assert logits.shape == (4, 3)
    assert torch.isfinite(logits).all()

    adapted.save(tmp_path)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(reloaded) is type(adapted.model)
    processor = GloVLMProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        actual = reloaded(pixel_values=pixels(processor, some)).logits
    assert_same_numbers(actual, logits)
    assert reloaded.config.id2label == dict(enumerate(CLASSES))
    assert reloaded.config.label2id == {n: k for k, n in enumerate(CLASSES)}
    assert [len(texts) for texts in reloaded.config.prompts] == [1, 1, 1]

    classify = pipeline(
        "image-classification", model=reloaded, image_processor=processor.image_processor
    )
    probabilities = logits.softmax(-1)
    # One image at a time rounds otherwise than four: in float32, relative to the largest logit.
    noise = max(1e-5, 1e-6 * float(logits.abs().max()))
    for row, answer in enumerate(classify(list(some["image"]))):
        expected = {n: probabilities[row, k].item() for k, n in enumerate(CLASSES)}
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(expected, abs=noise)

    predictions = predict(adapted.model, adapted.processor, some)
    assert np.abs(predictions.logits - logits.numpy()).max() < 1e-3 * float(logits.abs().max())


@pytest.mark.long
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_one_image_of_each_class_is_enough(method: str, name: str, rows: Dataset) -> None:
    adapted = quick(method, name, pick(rows, 1, 1, 1))
    assert math.isfinite(sum(float(t.double().abs().sum()) for t in weights(adapted).values()))
    assert all(math.isfinite(row["loss"]) for row in adapted.log)


# That the same seed gives the same weights, resuming says of every method.
@pytest.mark.parametrize("name", ["clip", pytest.param("pair", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "method",
    [
        name
        if name in ("classifier", "taskres", "lora")
        else pytest.param(name, marks=pytest.mark.long)
        for name in TRAINED
    ],
)
def test_a_seed_gives_the_same_weights_and_another_gives_others(
    method: str, name: str, rows: Dataset
) -> None:
    support = pick(rows, 3, 2, 2)
    first = weights(quick(method, name, support, seed=4))
    torch.rand(100)  # what ran before must not matter
    assert same(weights(quick(method, name, support, seed=4)), first)
    other = weights(quick(method, name, support, seed=5))
    if method in WITHOUT_CHANCE:
        assert all(torch.allclose(other[n], first[n], atol=1e-5) for n in first)
    else:
        assert not same(other, first)


def test_closed_forms_do_not_depend_on_the_seed(rows: Dataset) -> None:
    for method in ("zero_shot", "linear_probe"):
        assert same(*(weights(quick(method, "clip", rows, seed=s)) for s in (0, 1)))


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "classifier"])
def test_methods_on_features_leave_the_towers_as_they_came(method: str, rows: Dataset) -> None:
    adapted = quick(method, "clip", rows)
    before = backbone("clip")[0].state_dict()
    assert same(adapted.model.glovlm.state_dict(), before)
    assert adapted.frozen_tower


@pytest.mark.parametrize(
    ("method", "still"), [("prompt_tuning", ["vision_model", "visual_projection", "logit_scale"])]
)
def test_a_method_on_the_text_side_leaves_the_image_side_as_it_came(
    method: str, still: list[str], rows: Dataset
) -> None:
    adapted = quick(method, "clip", rows)
    before = backbone("clip")[0].state_dict()
    after = adapted.model.glovlm.state_dict()
    assert after.keys() == before.keys()
    kept = {n for n in before if any(part in n for part in still)}
    assert same({n: after[n] for n in kept}, {n: before[n] for n in kept})
    changed = {n for n in before if not torch.equal(after[n], before[n])}
    assert changed == {"backbone.text_model.embeddings.token_embedding.weight"}
    assert adapted.frozen_tower


def test_the_first_context_step_begins_where_the_pretrained_model_is(rows: Dataset) -> None:
    # Only the context's rows move, however long it trains.
    adapted = quick("prompt_tuning", "clip", rows, method_config={"context_tokens": 5})
    key = "backbone.text_model.embeddings.token_embedding.weight"
    before, after = backbone("clip")[0].state_dict()[key], adapted.model.glovlm.state_dict()[key]
    moved = torch.nonzero((before != after).any(1)).flatten().tolist()
    assert sorted(moved) == sorted(adapted.processor.context_token_ids)
    assert adapted.trainable_parameters == 5 * 32


@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [
        ("zero_shot", "clip", 0),
        ("linear_probe", "clip", 3 * 24 + 3),
        ("linear_probe", "pair", 3 * 64 + 3),
        ("classifier", "clip", 24 * 512 + 512 + 2 * 512 + 512 * 3 + 3),
        ("lora", "clip", 1024),
        ("lora", "pair", 1024 + 64 * 32 + 32),
        ("prompt_tuning", "clip", 16 * 32),
        ("prompt_tuning", "pair", 16 * 32 + 64 * 32 + 32),
    ],
)
def test_the_trainable_parameters_are_counted(
    method: str, name: str, expected: int, rows: Dataset
) -> None:
    recipe = {"epochs": 1} if method in TRAINED else {}
    adapted = quick(method, name, pick(rows, 1, 1, 1), recipe=recipe)
    assert adapted.trainable_parameters == expected


# ---------------------------------------------------------------------------------- what is refused


# Methods on features all take the same ones.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            name,
            marks=pytest.mark.long
            if not isinstance(m, TowerMethod) and name not in ("linear_probe", "tip_adapter_f")
            else (),
        )
        for name, m in METHODS.items()
        if name != "convlm"
    ],
)
def test_siglip2_adapts_but_for_methods_inside_its_vision_tower(method: str, rows: Dataset) -> None:
    inside = METHODS[method].family in ("image side", "both sides")
    refused = pytest.raises(GloVLMError, match="in a shape of its own") if inside else nullcontext()
    query = rows.select_columns(["image"])
    config = AdaptConfig(max_steps=2) if isinstance(METHODS[method], TowerMethod) else None
    with refused:
        adapt(str(tiny_siglip2()), method, rows, query=query, config=config)


def test_zero_shot_on_a_pair_is_refused(rows: Dataset) -> None:
    with pytest.raises(GloVLMError, match=r"never trained together.*linear_probe"):
        quick("zero_shot", "pair", rows)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "zero_shot"])
def test_a_class_without_an_image_is_refused_by_name(method: str, rows: Dataset) -> None:
    with pytest.raises(GloVLMError, match=r"at least one labelled image of every class.*sclerosed"):
        quick(method, "clip", pick(rows, 2, 0, 2))


def test_zero_shot_needs_no_image(rows: Dataset) -> None:
    assert same(*(weights(quick("zero_shot", "clip", pick(rows, n, n, n))) for n in (0, 3)))


def test_a_loss_that_explodes_is_an_error(rows: Dataset) -> None:
    with pytest.raises(GloVLMError, match=r"The loss became nan.*Lower --lr"):
        quick("vanilla", "clip", rows, recipe={"lr": 1e30, "epochs": 5})


# ---------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    ("method", "name", "recipe"),
    [
        ("linear_probe", "clip", {}),
        ("linear_probe", "pair", {}),
        ("classifier", "clip", {"epochs": 40}),
        ("lora", "clip", {"epochs": 30, "lr": 2e-2}),
        ("lora", "pair", {"epochs": 20, "lr": 2e-3}),
        ("vanilla", "clip", {"epochs": 15, "lr": 1e-3}),
        ("prompt_tuning", "pair", {"epochs": 20}),
    ],
)
def test_training_beats_chance_on_unseen_patients(
    method: str, name: str, recipe: dict[str, Any], rows: Dataset, unseen: Dataset
) -> None:
    adapted = quick(method, name, rows, recipe=recipe)
    assert accuracy(adapted, unseen) >= 0.8
    if adapted.log:
        assert adapted.log[-1]["loss"] < adapted.log[0]["loss"]


def test_permuted_labels_fall_to_chance(rows: Dataset, unseen: Dataset) -> None:
    scores = []
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(rows["label"][:]).tolist()
        permuted = rows.remove_columns("label").add_column("label", order)
        permuted = permuted.cast_column("label", ClassLabel(names=list(CLASSES)))
        scores.append(accuracy(quick("linear_probe", "clip", permuted), unseen))
    assert abs(np.mean(scores) - 1 / 3) < 0.25


# ------------------------------------------------------------------------ stock adapter, without us

STOCK = """
import json, sys, torch
sys.modules["hf_glovlm"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModel
models = []
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder + "/adapter").eval()
    given = load_file(folder + "/given.safetensors")
    with torch.no_grad():
        image = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
        text = model.get_text_features(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).pooler_output
    save_file(
        {"image": image.contiguous(), "text": text.contiguous()}, folder + "/features.safetensors"
    )
    models.append(type(model).__name__)
assert not any(name.startswith("hf_glovlm.") for name in sys.modules)
print(json.dumps({"models": models}))
"""


def test_stock_transformers_loads_an_adapter_as_the_adapted_clip(
    rows: Dataset, tmp_path: Path
) -> None:
    given: dict[str, dict[str, Tensor]] = {}
    for method in ("lora", "prompt_tuning"):
        folder = tmp_path / method
        recipe = {"epochs": 4, "lr": 0.05}
        adapted = quick(method, "clip", rows, recipe=recipe, output_dir=folder)
        adapted.save(folder / "model")
        held = {path.name for path in (folder / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= held
        assert sum(p.stat().st_size for p in (folder / "adapter").iterdir()) < 40_000
        # For prompt tuning the learned context stands between the start and the class name.
        texts = [[f"{n}."] for n in CLASSES] if method == "prompt_tuning" else [["viable tuft"]]
        processor = GloVLMProcessor.from_pretrained(folder / "model")
        encoded = processor.encode_prompts(texts)
        if method == "prompt_tuning":
            assert encoded["input_ids"][0, 1:17].tolist() == processor.context_token_ids
        x = pixels(processor, rows.select([0, 9, 18]))
        given[method] = {"pixel_values": x, **encoded}
        save_file(given[method], folder / "given.safetensors")

    places = [tmp_path / method for method in given]
    assert run_script(STOCK, *places, home=tmp_path, HF_HUB_OFFLINE="1") == {
        "models": ["CLIPModel"] * 2
    }
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    for method, inputs in given.items():
        folder = tmp_path / method
        theirs = load_file(folder / "features.safetensors")
        merged = AutoModelForImageClassification.from_pretrained(folder / "model").glovlm.eval()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            image = merged.get_image_features(inputs["pixel_values"]).pooler_output
            text = merged.get_text_features(ids, mask).pooler_output
            before = stock.get_text_features(input_ids=ids).pooler_output
        assert (theirs["image"] - image).abs().max() < 1e-5
        assert (theirs["text"] - text).abs().max() < 1e-5
        assert (before - text).abs().max() > 1e-3  # it did change something


def test_merged_lora_weights_are_base_plus_scaled_product(rows: Dataset, tmp_path: Path) -> None:
    recipe = {"epochs": 3, "lr": 0.05}
    adapted = quick("lora", "clip", rows, recipe=recipe, output_dir=tmp_path)
    base = {n: t.clone() for n, t in backbone("clip")[0].backbone.state_dict().items()}
    merged = adapted.model.glovlm.backbone.state_dict()
    assert merged.keys() == base.keys()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key, a in adapter.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            base[name] += 4.0 * adapter[key.replace("lora_A", "lora_B")] @ a
    assert len(adapter) == 8
    assert max(float((merged[n] - base[n]).abs().max()) for n in base) < 1e-6


def test_an_adapter_of_a_pair_applies_to_the_pair(rows: Dataset, tmp_path: Path) -> None:
    from peft import PeftModel

    adapted = quick("lora", "pair", rows, output_dir=tmp_path, recipe={"epochs": 3, "lr": 0.05})
    model, processor = backbone("pair")
    projection = adapted.model.glovlm.backbone.visual_projection
    model.backbone.set_visual_projection(
        torch.zeros_like(projection.weight), torch.zeros_like(projection.bias)
    )
    wrapped = PeftModel.from_pretrained(model.backbone, tmp_path / "adapter").eval()
    x = pixels(processor, rows.select([0, 9]))
    with torch.no_grad():
        theirs = wrapped.get_image_features(pixel_values=x).pooler_output
        mine = adapted.model.glovlm.get_image_features(x).pooler_output
    assert (theirs - mine).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_an_adapter_names_the_weights_that_it_belongs_to(
    method: str, rows: Dataset, tmp_path: Path
) -> None:
    def base(folder: Path) -> tuple[str, str | None]:
        held = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        return held["base_model_name_or_path"], held["revision"]

    support = pick(rows, 1, 1, 1)
    model, processor = backbone("clip")
    model.config.backbone_revision = "c0ffee"
    options: dict[str, Any] = {"processor": processor, "recipe": QUICK}
    first = adapt_with(model, method, support, output_dir=tmp_path / "a", **options)
    assert base(tmp_path / "a") == (str(tiny_clip()), "c0ffee")
    # Adapted a second time, the base is the once adapted model and no more the pretrained one.
    first.save(tmp_path / "model")
    model, processor = load_backbone(str(tmp_path / "model"))
    options["processor"] = processor
    adapt_with(model, method, support, output_dir=tmp_path / "b", **options)
    assert base(tmp_path / "b") == (str(tmp_path / "model"), None)


def test_a_former_adapter_is_replaced_as_a_whole(rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "left.safetensors").write_bytes(b"old")
    quick("lora", "clip", pick(rows, 1, 1, 1), output_dir=tmp_path)
    assert not (tmp_path / "adapter" / "left.safetensors").exists()


# --------------------------------------------------------------------------------------- the losses


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def by_hand(
    images: Tensor, texts: Tensor, labels: list[int], weight: list[float], scale: float, mask: bool
) -> float:
    """Symmetric InfoNCE, one pair at a time."""
    n, total = len(labels), 0.0
    counted = [i for i in range(n) if weight[i] > 0]
    for i in counted:
        others = [j for j in counted if j == i or not (mask and labels[j] == labels[i])]
        for row in (
            [scale * float(images[i] @ texts[j]) for j in others],
            [scale * float(images[j] @ texts[i]) for j in others],
        ):
            own = row[others.index(i)]
            total += (math.log(sum(math.exp(value) for value in row)) - own) / 2
    return total / len(counted)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    ("labels", "weight"),
    [
        ([0, 1, 2, 1, 0], [1, 1, 1, 1, 1]),
        ([0, 1, 2, 1, 0, 0], [1, 1, 1, 1, 1, 0]),
        ([2, 2, 2], [1, 1, 1]),
        ([0, 1, 0, 0], [1, 1, 0, 0]),
    ],
    ids=str,
)
def test_infonce_is_the_double_loop(labels: list[int], weight: list[float], mask: bool) -> None:
    images, prototypes = unit(len(labels), 7), unit(3, 7)
    texts = prototypes[labels]
    expected = by_hand(images, texts, labels, weight, 12.0, mask)
    index, counted = torch.tensor(labels), torch.tensor(weight)
    actual = infonce(images, texts, index, counted, torch.tensor(12.0), mask)
    assert float(actual) == pytest.approx(expected, abs=1e-9)


def test_the_published_infonce_is_clips_own_loss() -> None:
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    model, processor = backbone("clip")
    prompts = [["viable"], ["sclerosed"], ["mesangial"]]
    labels = torch.tensor([0, 1, 1, 2, 0])
    encoded = processor.encode_prompts(prompts)
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        theirs = stock(
            input_ids=encoded["input_ids"][labels],
            attention_mask=encoded["attention_mask"][labels],
            pixel_values=x,
            return_loss=True,
        ).loss
        tuning = METHODS["vanilla"].attach(model, processor, three(prompts), _vanilla())
        step = TowerStep(tuning, "infonce_published")
        mine = step(x, labels, torch.ones(5), 5)
        masked = TowerStep(tuning, "infonce")(x, labels, torch.ones(5), 5)
    assert float(mine) == pytest.approx(float(theirs), abs=1e-5)
    assert float(masked) < float(mine)  # the false negatives are out of the denominator


def three(prompts: list[list[str]]) -> list[ClassInfo]:
    return [ClassInfo(n, n, tuple(p)) for n, p in zip(CLASSES, prompts, strict=True)]


def _vanilla() -> Any:
    return METHODS["vanilla"].configure({})


def test_masking_changes_nothing_where_every_class_stands_once() -> None:
    images, texts, labels = unit(3, 5), unit(3, 5), torch.tensor([2, 0, 1])
    a, b = (
        infonce(images, texts, labels, torch.ones(3), torch.tensor(9.0), mask)
        for mask in (True, False)
    )
    assert float(a) == pytest.approx(float(b), abs=1e-12)


def test_a_batch_of_one_class_has_no_negatives() -> None:
    images, texts = unit(4, 5).requires_grad_(), unit(1, 5).expand(4, 5)
    loss = infonce(images, texts, torch.zeros(4).long(), torch.ones(4), torch.tensor(9.0), True)
    loss.backward()
    assert loss.item() == 0
    assert images.grad is not None
    assert images.grad.abs().max() == 0


def test_the_prototype_loss_is_cross_entropy_over_class_texts() -> None:
    model, processor = backbone("clip")
    prompts = [["viable", "a viable tuft"], ["sclerosed"], ["mesangial"]]
    tuning = METHODS["vanilla"].attach(model, processor, three(prompts), _vanilla())
    step = TowerStep(tuning, "prototypes")
    x, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 1, 2, 0])
    weight = torch.tensor([1.0, 1, 1, 1, 0])
    with torch.no_grad():
        loss = step(x, labels, weight, 4)
        logits = step.classify(x)
        expected = nn.functional.cross_entropy(logits[:4], labels[:4])
        features = nn.functional.normalize(model.get_image_features(x).pooler_output, dim=-1)
        prototypes = model.class_prototypes(**processor.encode_prompts(prompts))
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    scale = model.logit_scale.exp()
    assert torch.allclose(logits, scale * features @ prototypes.T, atol=1e-5)


@pytest.mark.parametrize("loss", ["infonce", "infonce_published"])
def test_contrastive_losses_train(loss: Any, rows: Dataset) -> None:
    adapted = quick("vanilla", "clip", rows, loss=loss, recipe={"epochs": 6, "lr": 1e-3})
    assert adapted.log[-1]["loss"] < adapted.log[0]["loss"]


def test_only_what_a_method_added_drops_out(rows: Dataset) -> None:
    model, processor = backbone("pair")
    model.config.backbone_config.text_config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    labels = torch.tensor([0, 1, 2])
    model.requires_grad_(False)
    classes = [ClassInfo(n, n, (n,)) for n in CLASSES]
    model.backbone.set_visual_projection(torch.randn(32, 64), torch.zeros(32))
    tuning = METHODS["lora"].attach(model, processor, classes, METHODS["lora"].configure({}))
    for parameter in tuning.groups[0]["params"]:
        parameter.data.normal_()
    step = TowerStep(tuning, "prototypes").train()
    training = {n for n, m in step.named_modules() if m.training}
    assert training
    added = {n for n in training if "lora" not in n}
    # PEFT's layers look at their own flag; what they wrap stays as it is in evaluation.
    assert all(type(step.get_submodule(n)).__module__.startswith("peft.") for n in added)
    assert any("lora_dropout" in n for n in training)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert step(x, labels, torch.ones(3), 3) != step(x, labels, torch.ones(3), 3)
        step.eval()
        assert step(x, labels, torch.ones(3), 3) == step(x, labels, torch.ones(3), 3)


# ----------------------------------------------------------------------------------- early stopping


STOPPING = [name for name in TRAINED if METHODS[name].validation == "early stopping"]


@pytest.mark.parametrize("method", STOPPING)
def test_the_best_epoch_on_validation_is_kept(
    method: str, rows: Dataset, unseen: Dataset, tmp_path: Path
) -> None:
    """The weights that come out are those of the epoch whose validation score was best."""
    recipe = {"epochs": 6, "lr": 0.02, "patience": 2}
    adapted = quick(method, "clip", pick(rows, 2, 2, 2), recipe=recipe, validation=unseen)
    scores = [row["validation_macro_auc"] for row in adapted.log]
    best = 0
    for epoch, score in enumerate(scores):
        if score > scores[best] + 0.001:
            best = epoch
    assert len(scores) == min(6, best + 3)
    predictions = predict(adapted.model, adapted.processor, unseen)
    from hf_glovlm.metrics import compute_metrics

    measured = compute_metrics(predictions.labels, predictions.probabilities, n_resamples=0)
    assert measured["metrics"]["macro_auc"]["value"] == pytest.approx(scores[best], abs=1e-3)

    # The very weights of a run that stops there.
    straight = quick(method, "clip", pick(rows, 2, 2, 2), recipe={**recipe, "epochs": best + 1})
    if METHODS[method].recipe(2, METHODS[method].configure({})).schedule == "constant":
        assert same(weights(straight), weights(adapted))


# -------------------------------------------------------------------------- images are encoded once


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many images each pass through a vision tower holds."""
    passes: list[int] = []
    plain = GloVLMModel.pool_images

    def noted(self: GloVLMModel, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        passes.append(len(pixel_values))
        return plain(self, pixel_values, **kwargs)

    monkeypatch.setattr(GloVLMModel, "pool_images", noted)
    return passes


@pytest.mark.parametrize("name", BACKBONES)
def test_a_frozen_tower_encodes_each_image_once_for_all_methods_and_seeds(
    name: str, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_encodings(monkeypatch)
    cache = FeatureCache(tmp_path)
    first = quick("classifier", name, rows, cache=cache)
    assert sum(passes) == len(rows)
    passes.clear()
    for method, seed in itertools.product(("linear_probe", "classifier", "prompt_tuning"), (1, 2)):
        adapted = quick(method, name, rows, cache=cache, seed=seed)
        assert adapted.frozen_tower
        predict(adapted.model, adapted.processor, rows, cache=cache)
    assert passes == []
    # A cached feature is the feature.
    uncached = quick("classifier", name, rows)
    assert same(weights(uncached), weights(first))


def test_frozen_towers_are_not_encoded_again_in_every_epoch(
    rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_encodings(monkeypatch)
    for method in ("classifier", "prompt_tuning"):
        passes.clear()
        quick(method, "clip", rows, recipe={"epochs": 5})
        assert sum(passes) == len(rows)


def test_what_changes_the_tower_says_so(rows: Dataset) -> None:
    support = pick(rows, 1, 1, 1)
    for method, frozen in (("lora", False), ("vanilla", False), ("prompt_tuning", True)):
        assert quick(method, "clip", support).frozen_tower is frozen
    text_only = quick("vanilla", "clip", support, method_config={"vision_layers": 0})
    assert text_only.frozen_tower


# ----------------------------------------------------------------------------- further ways to call


def test_a_backbone_may_be_named(rows: Dataset) -> None:
    adapted = adapt(str(tiny_clip()), "linear_probe", rows)
    assert adapted.model.config.id2label[1] == "sclerosed"
    assert adapted.processor.tokenizer is not None


@pytest.mark.parametrize("method", [m for m in TOWER if m != "cocoop"])  # its texts differ by image
def test_a_pair_starts_from_the_ridge_fit_to_the_texts_that_it_trains_with(
    method: str, rows: Dataset
) -> None:
    still = {"projection_lr": 1e-12}
    recipe = {"epochs": 1, "lr": 1e-12}
    adapted = quick(method, "pair", rows, recipe=recipe, method_config=still)
    assert "ridge fit" in adapted.notes[0]
    model, processor = backbone("pair")
    pooled = torch.from_numpy(embed_images(model, processor, rows, project=False))
    labels = torch.tensor(rows["label"][:])
    give_joint_space(model, pooled, labels, adapted.model.head.weight.detach())
    expected = model.backbone.visual_projection.state_dict()
    actual = adapted.model.glovlm.backbone.visual_projection.state_dict()
    assert max(float((actual[n] - expected[n]).abs().max()) for n in expected) < 1e-4
    assert accuracy(adapted, rows) == 1


def test_an_adapted_model_can_be_adapted_again(rows: Dataset, tmp_path: Path) -> None:
    quick("lora", "pair", rows).save(tmp_path)
    model, processor = load_backbone(str(tmp_path))
    assert model.has_joint_space
    start = model.backbone.visual_projection.weight.clone()
    support = pick(rows, 2, 2, 2)
    config = AdaptConfig(recipe={"epochs": 1, "lr": 1e-9})
    again = adapt(model, "vanilla", support, processor=processor, config=config)
    now = again.model.glovlm.backbone.visual_projection.weight
    assert (now - start).abs().max() < 0.01  # trained on, not fitted anew
    assert again.notes == []


def test_resuming_gives_the_uninterrupted_model(rows: Dataset, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Killed

    support = pick(rows, 2, 2, 2)
    for method, name in zip(TRAINED, itertools.cycle(BACKBONES), strict=False):  # each on one tower
        folder = tmp_path / f"{method}-{name}"
        options: dict[str, Any] = {"recipe": {"epochs": 4}, "seed": 3}
        straight = quick(method, name, support, **options)
        with pytest.raises(Killed):
            quick(method, name, support, output_dir=folder, on_epoch=stop, **options)
        resumed = quick(method, name, support, output_dir=folder, resume=True, **options)
        assert same(weights(resumed), weights(straight)), (method, name)
        assert len(resumed.log) == 4


@pytest.mark.parametrize(("method", "settings"), [("lora", {"dropout": 0.0}), ("vanilla", {})])
def test_accumulation_does_not_change_a_tower(
    method: str, settings: dict[str, Any], rows: Dataset
) -> None:
    results = []
    for parts in (1, 3):
        model, processor = backbone("clip")
        options: dict[str, Any] = {"method_config": settings, "recipe": QUICK, "accumulate": parts}
        support = pick(rows, 3, 2, 2)
        adapted = adapt_with(model.double(), method, support, processor=processor, **options)
        results.append(weights(adapted))
    whole, cut = results
    assert max(float((whole[n] - cut[n]).abs().max()) for n in whole) < 1e-6


def test_accumulation_does_not_change_a_head_with_batch_norm(rows: Dataset) -> None:
    assert same(*(weights(quick("classifier", "clip", rows, accumulate=n)) for n in (1, 4)))


def test_augmentation_reaches_the_tower_and_only_it(rows: Dataset) -> None:
    support = pick(rows, 2, 2, 2)
    plain, augmented = (
        weights(quick("vanilla", "clip", support, augment=a)) for a in (False, True)
    )
    assert not same(plain, augmented)


def test_a_model_in_double_precision_trains(rows: Dataset) -> None:
    model, processor = backbone("clip")
    config = {"recipe": {"epochs": 1}}
    adapted = adapt(
        model.double(), "vanilla", pick(rows, 1, 1, 1), processor=processor, config=config
    )
    assert adapted.model.glovlm.dtype == torch.float64


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "vanilla", "linear_probe"])
def test_siglip_adapts_too(method: str, rows: Dataset, tmp_path: Path) -> None:
    model, processor = load_backbone(str(tiny_siglip()))
    config = AdaptConfig(recipe=QUICK if method in TRAINED else {}, output_dir=tmp_path)
    support = pick(rows, 2, 2, 2)
    adapted = adapt(model, method, support, processor=processor, config=config)
    adapted.save(tmp_path / "model")
    x = pixels(processor, support)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_same_numbers(reloaded(x).logits, adapted.model(x).logits)


def test_given_classes_name_the_prompts(rows: Dataset) -> None:
    classes = three([["viable"], ["a", "b"], ["c"]])
    adapted = quick("zero_shot", "clip", rows, classes=classes)
    assert adapted.model.config.prompts == [["viable"], ["a", "b"], ["c"]]
    head = adapted.model.head.weight
    expected = embed_prompts(*backbone("clip"), [["viable"], ["a", "b"], ["c"]])
    assert_same_numbers(head, expected)


def test_the_head_holds_the_texts_as_the_adapted_towers_see_them(rows: Dataset) -> None:
    for method in TOWER:
        if method == "cocoop":  # its texts differ by image
            continue
        settings = {"logits": "cosine"} if method == "convlm" else {}
        adapted = quick(method, "clip", pick(rows, 2, 2, 2), method_config=settings)
        prompts = adapted.model.config.prompts
        texts = embed_prompts(adapted.model.glovlm, adapted.processor, prompts)
        assert np.abs(adapted.model.head.weight.detach().numpy() - texts).max() < 1e-5
        assert adapted.model.head.cosine
        scale = adapted.model.glovlm.logit_scale.exp().item()
        assert adapted.model.head.scale.item() == pytest.approx(scale)


def test_one_row_alone_passes_a_head_with_batch_norm() -> None:
    step = HeadStep(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    one, two = torch.randn(1, 4), torch.randn(2, 4)
    step(one, torch.tensor([1]), torch.ones(1), 1).backward()
    assert step.head[1].num_batches_tracked == 0
    step(two, torch.tensor([1, 0]), torch.ones(2), 2)
    assert step.head[1].num_batches_tracked == 1


def test_the_log_is_plain_json(rows: Dataset, tmp_path: Path) -> None:
    adapted = quick("lora", "clip", pick(rows, 1, 1, 1), output_dir=tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == adapted.log


def test_features_of_a_pair_are_its_pooled_vectors(rows: Dataset) -> None:
    model, processor = backbone("pair")
    plain = embed_images(model, processor, rows.select([0, 1]))
    adapted = quick("linear_probe", "pair", rows)
    again = embed_images(adapted.model.glovlm, processor, rows.select([0, 1]))
    assert_same_numbers(again, plain)
    assert plain.shape == (2, 64)
