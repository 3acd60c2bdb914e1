"""Learned contexts: CoOp, KgCoOp, ProGrad and BiomedCoOp are the formulae of their papers."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attaching import CLASSES, NAMES, PROMPTS, SGD, attach, default_recipe, trained_names
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from tiny import (
    CONTEXT,
    tiny_bert,
    tiny_clip,
    tiny_images,
    tiny_pair,
    tiny_siglip,
    tiny_siglip2,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerance import assert_same_numbers
from torch import nn
from transformers import AutoModel, AutoTokenizer, CLIPModel, PreTrainedTokenizerFast

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import ClassInfo, all_rows, load_dataset
from hf_glovlm.data.terminology import described_prompts
from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, StepState, TowerMethod, give_joint_space
from hf_glovlm.methods.context_tokens import (
    ContextConfig,
    ContextEmbedding,
    context_length,
    divergence,
    find_embedding,
    prompt_features,
    prompt_sets,
    unit_means,
    unused_token_ids,
    within,
)
from hf_glovlm.training import AdaptConfig, adapt
from hf_glovlm.training.losses import TowerStep

METHOD_NAMES = ("prompt_tuning", "kgcoop", "prograd", "biomedcoop")
FROM_WORDS = ("kgcoop", "prograd", "biomedcoop")
Array = NDArray[np.float64]


def load(make: Any = tiny_clip) -> tuple[Any, Any]:
    """A backbone with a joint space, frozen, as `adapt` hands it to a method."""
    model, processor = load_backbone(str(make()))
    if make is tiny_pair:
        pooled, labels = torch.randn(6, 64), torch.tensor([0, 0, 1, 1, 2, 2])
        give_joint_space(model, pooled, labels, unit(3, 32))
    return model.requires_grad_(False), processor


def unit(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def further_loss(method: TowerMethod, state: StepState) -> torch.Tensor:
    """What a method minimises beside the cross-entropy, or does not oppose."""
    loss = method.penalty(state)
    if loss is None:
        loss = method.reference_loss(state)
    assert loss is not None
    return loss


def context_of(tuning: TowerMethod) -> nn.Parameter:
    (context,) = tuning.groups[0]["params"]
    assert isinstance(context, nn.Parameter)
    return context


def text_features(model: Any, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = model.get_text_features(
            encoded["input_ids"], encoded["attention_mask"]
        ).pooler_output
    return features


def plain_prototypes(prompts: list[list[str]], make: Any = tiny_clip) -> torch.Tensor:
    """Class prototypes of plain texts on a fresh backbone."""
    model, processor = load(make)
    with torch.no_grad():
        prototypes: torch.Tensor = model.class_prototypes(**processor.encode_prompts(prompts))
    return prototypes


def rows_unit(x: Array) -> Array:
    scaled: Array = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return scaled


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    result: Array = e / e.sum(-1, keepdims=True)
    return result


def double(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().double().numpy()
    return array


# -------------------------------------------------------------------------------- pinned constants

COOP = {**SGD, "lr": 2e-3, "batch_size": 32}
EPOCHS = ((1, 50), (2, 100), (4, 100), (8, 200), (16, 200))
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    *(("prompt_tuning", k, {**COOP, "epochs": e}) for k, e in EPOCHS),
    *(("prograd", k, {**COOP, "epochs": e}) for k, e in EPOCHS),
    *(
        ("kgcoop", k, {**SGD, "lr": 2e-3, "batch_size": 128, "epochs": 100})
        for k in (1, 2, 4, 8, 16)
    ),
    *(
        ("biomedcoop", k, {**SGD, "lr": 2.5e-3, "batch_size": 4, "epochs": 100})
        for k in (1, 2, 4, 8, 16)
    ),
]
SHARED = {
    "context_tokens": 16,
    "init": "",
    "class_specific": False,
    "init_std": 0.02,
    "projection_lr": 1e-3,
}
WORDS = {**SHARED, "context_tokens": 0, "init": "a photo of a"}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "prompt_tuning": SHARED,
    "kgcoop": {**WORDS, "weight": 8.0},
    "prograd": {**SHARED, "init": "a photo of a", "init_std": 0.0, "temperature": 1.0},
    "biomedcoop": {
        **WORDS,
        "consistency": 0.5,
        "distillation": 0.5,
        "tau": 1.5,
        "prompts": "terminology",
    },
}


@pytest.mark.parametrize(("name", "shots", "expected"), RECIPES)
def test_recipes_are_the_published_ones(name: str, shots: int, expected: dict[str, Any]) -> None:
    recipe = default_recipe(name, shots)
    assert {key: recipe[key] for key in expected} == expected


def test_settings_are_the_published_ones() -> None:
    assert {n: METHODS[n].describe()["settings"] for n in SETTINGS} == SETTINGS
    assert {name for name, _, _ in RECIPES} == set(SETTINGS) == set(METHOD_NAMES)


# ------------------------------------------------------------------------------------ what trains


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_context_alone_trains(name: str) -> None:
    model, processor = load()
    tuning = attach(name, model, processor)
    parameter = "backbone.text_model.embeddings.token_embedding.context"
    assert trained_names(model, tuning) == [{parameter}]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {parameter}
    assert (tuning.trains_vision, tuning.trains_text) == (False, True)
    assert tuning.class_texts == [[f"{n}."] for n in NAMES]
    state = StepState(unit(2, 24), unit(3, 24), 9 * unit(2, 3), torch.arange(2), torch.ones(2))
    assert (tuning.penalty(state) is not None) == (name in ("kgcoop", "biomedcoop"))
    assert (tuning.reference_loss(state) is not None) == (name == "prograd")

    model, processor = load(tiny_pair)
    tuning = attach(name, model, processor)
    context, projection = trained_names(model, tuning)
    assert {n.rpartition(".")[2] for n in context} == {"context"}
    assert projection == {f"backbone.visual_projection.{n}" for n in ("weight", "bias")}
    assert tuning.groups[1]["lr"] == 1e-3
    noted = any("no knowledge of images" in note for note in tuning.notes)
    assert noted is (name != "prompt_tuning")


def test_a_random_context_starts_as_a_small_normal_draw() -> None:
    model, processor = load()
    context = context_of(attach("prompt_tuning", model, processor, context_tokens=45))
    assert context.shape == (45, 32)
    assert context.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", FROM_WORDS)
@pytest.mark.parametrize("make", [tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2])
def test_a_context_from_words_starts_as_the_text_with_these_words(name: str, make: Any) -> None:
    model, processor = load(make)
    # ProGrad puts further tokens in front, which start from zero: here it has none.
    words = processor.tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    extra: dict[str, Any] = {"context_tokens": 0} if name == "prograd" else {}
    tuning = attach(name, model, processor, **extra)
    assert len(processor.context_token_ids) == len(words) == len(context_of(tuning))
    with torch.no_grad():
        mine = model.class_prototypes(**processor.encode_prompts(tuning.class_texts))
    expected = plain_prototypes([[f"a photo of a {n}."] for n in NAMES], make)
    if make is tiny_siglip2:  # one tokenizer over whole sentences: the seam may fall otherwise
        table = find_embedding(load(make)[0].backbone)[1].weight
        assert torch.equal(context_of(tuning), table[words])
    else:
        assert (mine - expected).abs().max() < 1e-5


@pytest.mark.parametrize("class_specific", [False, True])
def test_words_stand_last_among_more_tokens(class_specific: bool) -> None:
    model, processor = load()
    table = find_embedding(model.backbone)[1].weight.clone()
    words = processor.tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    kind: dict[str, Any] = {"class_specific": class_specific}
    tuning = attach("prograd", model, processor, **kind)
    context = context_of(tuning).view(3 if class_specific else 1, 16, -1)
    for one in context:
        assert torch.equal(one[-len(words) :], table[words])
        assert one[: -len(words)].abs().max() == 0
    # CoOp draws the tokens in front of the words.
    model, processor = load()
    tuning = attach("prompt_tuning", model, processor, init="a photo of a", **kind)
    context = context_of(tuning).view(3 if class_specific else 1, 16, -1)
    for one in context:
        assert torch.equal(one[-len(words) :], table[words])
        assert one[: -len(words)].std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("chosen", "words", "length"),
    [
        ({}, 0, 16),
        ({}, 4, 16),
        ({"context_tokens": 0}, 7, 7),
        ({"context_tokens": 45}, 45, 45),
        ({"context_tokens": 1}, 1, 1),
    ],
)
def test_a_context_has_as_many_tokens_as_asked_or_as_its_words(
    chosen: dict[str, Any], words: int, length: int
) -> None:
    assert context_length(ContextConfig(**chosen), words, CONTEXT) == length


@pytest.mark.parametrize(
    ("chosen", "words", "sentence"),
    [
        ({"context_tokens": 0}, 0, "from 1, to 45 context tokens, found 0"),
        ({"context_tokens": -2}, 0, "found -2"),
        ({"context_tokens": 2, "init": "a photo of a"}, 4, "4, those of 'a photo of a', to 45"),
        ({"context_tokens": 46}, 0, "found 46; set context_tokens"),
    ],
)
def test_a_context_without_room_is_refused(
    chosen: dict[str, Any], words: int, sentence: str
) -> None:
    with pytest.raises(GloVLMError, match=sentence):
        context_length(ContextConfig(**chosen), words, CONTEXT)


# ----------------------------------------------------------------------------------- CoOp's tokens


@pytest.mark.parametrize("folder", [tiny_clip, tiny_bert], ids=["clip", "bert"])
def test_the_compact_context_equals_pefts_trainable_tokens(folder: Any) -> None:
    model, processor = load(tiny_clip if folder is tiny_clip else tiny_pair)
    theirs = copy.deepcopy(model)
    tuning = attach("prompt_tuning", model, processor, context_tokens=5)
    context = context_of(tuning)
    ids = processor.context_token_ids
    encoded = processor.encode_prompts(tuning.class_texts)
    name, _ = find_embedding(theirs.backbone)
    wrapped = get_peft_model(
        theirs.backbone, TrainableTokensConfig(token_indices=ids, target_modules=[name])
    )
    for key, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.data.copy_(context.data)
    expected = text_features(theirs, encoded)
    assert_same_numbers(text_features(model, encoded), expected)

    # The gradients too, or training on one and saving the other would not be the same method.
    model.get_text_features(
        encoded["input_ids"], encoded["attention_mask"]
    ).pooler_output.square().sum().backward()
    theirs.get_text_features(
        encoded["input_ids"], encoded["attention_mask"]
    ).pooler_output.square().sum().backward()
    (delta,) = (p for n, p in wrapped.named_parameters() if "trainable_tokens_delta" in n)
    assert context.grad is not None
    assert delta.grad is not None
    assert_same_numbers(context.grad, delta.grad)

    tuning.finish(None)
    assert (text_features(model, encoded) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "kgcoop"])
def test_a_context_equals_embeddings_spliced_in_by_hand(method: str, class_specific: bool) -> None:
    model, processor = load()
    stock = CLIPModel.from_pretrained(tiny_clip()).eval()
    more = {"context_tokens": 3} if method == "prompt_tuning" else {"init": "a viable photo"}
    tuning = attach(method, model, processor, class_specific=class_specific, **more)
    context = context_of(tuning)
    context.data.normal_(std=0.5)
    length = len(context) // (3 if class_specific else 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    table = stock.text_model.embeddings.token_embedding
    with torch.no_grad():
        mine = model.class_prototypes(**processor.encode_prompts(tuning.class_texts))
        for k, name in enumerate(NAMES):  # [start][v1 ... vM][name].[end]
            ids = torch.tensor([tokenizer(f"{name}.")["input_ids"]])
            learned = context[length * k :][:length] if class_specific else context
            spliced = torch.cat([table(ids)[:, :1], learned[None], table(ids)[:, 1:]], dim=1)
            filled = torch.cat([ids[:, :1], torch.full((1, length), 440), ids[:, 1:]], dim=1)
            hook = table.register_forward_hook(lambda *_, spliced=spliced: spliced)
            feature = stock.get_text_features(input_ids=filled).pooler_output
            hook.remove()
            assert_same_numbers(mine[k : k + 1], nn.functional.normalize(feature, dim=-1))


def test_class_specific_contexts_are_apart() -> None:
    model, processor = load()
    tuning = attach("prompt_tuning", model, processor, context_tokens=4, class_specific=True)
    context = context_of(tuning)
    rows = processor.context_token_ids
    assert context.shape == (12, 32)
    assert [len(row) for row in rows] == [4, 4, 4]
    assert len({i for row in rows for i in row}) == 12
    encoded = processor.encode_prompts(tuning.class_texts)
    for k in range(3):
        assert encoded["input_ids"][k, 1:5].tolist() == rows[k]
    before = text_features(model, encoded)
    with torch.no_grad():
        context[4:8].normal_()  # the context of the second class
    moved = (text_features(model, encoded) - before).abs().amax(1)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() == 0


@pytest.mark.parametrize("make", [tiny_clip, tiny_pair, tiny_siglip])
def test_the_context_stands_where_a_text_begins(make: Any) -> None:
    _, processor = load_backbone(str(make()))
    plain = processor.tokenizer("viable.")["input_ids"]
    processor.context_token_ids = [7, 8, 9]
    (row,) = processor.encode_prompts([["viable."]])["input_ids"].tolist()
    start = 0 if make is tiny_siglip else 1  # SigLIP has no start token
    assert row[: len(plain) + 3] == [*plain[:start], 7, 8, 9, *plain[start:]]


@given(
    st.sampled_from([tiny_clip, tiny_bert, tiny_siglip]),
    st.lists(st.text(max_size=30), min_size=1, max_size=4),
    st.integers(1, 40),
)
@settings(max_examples=40)
def test_the_rows_of_a_context_are_used_by_no_text(
    folder: Any, texts: list[str], count: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rows = len(tokenizer) + 16
    ids = unused_token_ids(SimpleNamespace(tokenizer=tokenizer), rows, [texts], count)
    assert len(ids) == len(set(ids)) == count
    assert all(0 <= i < rows for i in ids)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert not set(ids) & {i for row in tokenizer(texts)["input_ids"] for i in row}


def test_a_context_stays_below_the_end_token_where_that_is_the_highest() -> None:
    words = [f"word{i}" for i in range(30)]
    vocab = {w: i for i, w in enumerate([*words, "<start>", "<end>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )
    # The embedding has rows above the end token, as resized models have.
    ids = unused_token_ids(SimpleNamespace(tokenizer=tokenizer), 64, [["word29 word5"]], 4)
    assert ids == [28, 27, 26, 25]


def test_a_vocabulary_with_too_few_unused_rows_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    with pytest.raises(GloVLMError, match=r"needs 999 vocabulary rows.*Lower context_tokens"):
        unused_token_ids(SimpleNamespace(tokenizer=tokenizer), 300, PROMPTS, 999)


def test_a_context_for_each_of_a_thousand_classes_fits_clips_vocabulary() -> None:
    many = [[f"class {i}."] for i in range(1000)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip())
    ids = unused_token_ids(SimpleNamespace(tokenizer=tokenizer), 49_408, many, 16_000)
    assert len(set(ids)) == 16_000
    classes = [ClassInfo(t, t.rstrip("."), (t,)) for (t,) in many]
    with pytest.raises(GloVLMError, match=r"needs 16000 vocabulary rows.*class_specific"):
        attach("prompt_tuning", *load(), classes, class_specific=True)


def test_a_context_embedding_leaves_every_other_row_alone() -> None:
    base = nn.Embedding(20, 6)
    context = ContextEmbedding(base, [19, 3, 7], init_std=1.0)
    ids = torch.arange(20).reshape(4, 5)
    out = context(ids).reshape(20, 6)
    for row in range(20):
        expected = context.context[[19, 3, 7].index(row)] if row in (3, 7, 19) else base.weight[row]
        assert torch.equal(out[row], expected)
    assert set(context.state_dict()) == {"context", "base.weight"}


# ------------------------------------------------------------------------------ hand-made prompts


@pytest.mark.parametrize("make", [tiny_clip, tiny_pair, tiny_siglip])
def test_every_prompt_is_encoded_as_if_alone(make: Any) -> None:
    model, processor = load(make)
    prompts = [["a viable tuft", "PAS"], ["collagen"], ["a crescent of the tuft", "normal", "H&E"]]
    features = prompt_features(model, processor, prompts)
    assert [len(f) for f in features] == [2, 1, 3]
    for texts, actual in zip(prompts, features, strict=True):
        for text, feature in zip(texts, actual, strict=True):
            alone = text_features(model, processor.encode_prompts([[text]]))[0]
            assert_same_numbers(feature, nn.functional.normalize(alone, dim=0))
    expected = [rows_unit(double(f).mean(0)) for f in features]
    assert_same_numbers(unit_means(features), np.stack(expected))
    assert not any(f.requires_grad for f in features)


@pytest.mark.parametrize("name", FROM_WORDS)
def test_hand_made_prompts_are_read_without_a_former_context(name: str) -> None:
    def penalty(former: list[int] | None) -> float:
        torch.manual_seed(0)
        model, processor = load()
        processor.context_token_ids = former
        tuning = attach(name, model, processor, context_tokens=16)
        torch.manual_seed(1)
        features, prototypes = unit(4, 24), unit(3, 24)
        logits = 10 * features @ prototypes.T
        labels = torch.tensor([0, 1, 2, 0])
        state = StepState(features, prototypes, logits, labels, torch.ones(4))
        return further_loss(tuning, state).item()

    assert penalty([440, 441]) == penalty(None)


KNOWN = [
    ClassInfo("global_sclerosis", "Global sclerosis", ("own of global",)),
    ClassInfo("x17", "viable glomeruli", ("own of viable",)),
    ClassInfo("a dog", "a dog", ("own of dog", "again")),
]


def test_prompt_sets_come_from_the_terminology_by_either_name() -> None:
    texts, notes = prompt_sets(KNOWN, "terminology")
    assert texts == [
        described_prompts("global sclerosis"),
        described_prompts("viable glomerulus"),
        ["own of dog", "again"],
    ]
    assert "own for a dog: the classes' own prompts stood in" in notes[0]
    assert notes[1] == "Definitions used as prompts and not verified: viable glomerulus."
    assert len(notes) == 2


@pytest.mark.parametrize(
    "labels",
    [
        ("sclerotic glomerulus", "sclerosed_glomerulus"),  # two labels of one term
        ("lupus nephritis class IV", "normal dogs"),  # a label of a whole biopsy
    ],
)
def test_prompt_sets_that_distinguish_nothing_are_not_used(labels: tuple[str, ...]) -> None:
    classes = [ClassInfo(n, n, (f"own of {n}",)) for n in labels]
    texts, notes = prompt_sets(classes, "terminology")
    assert texts == [[f"own of {n}"] for n in labels]
    assert all(n in notes[0] for n in labels)


def test_prompt_sets_may_be_the_classes_own() -> None:
    assert prompt_sets(KNOWN, "classes") == ([list(c.prompts) for c in KNOWN], [])
    with pytest.raises(GloVLMError, match=r"'prompts' of method 'biomedcoop'.*'terminology'\?"):
        attach("biomedcoop", *load(), prompts="terminologies")


# ------------------------------------------------------------------------------------- the losses


@st.composite
def states(draw: st.DrawFn, dim: int = 24) -> StepState:
    """A step in double precision; some rows may only pad."""
    n, classes = draw(st.integers(1, 6)), 3
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features, prototypes = (
        nn.functional.normalize(torch.randn(m, dim, generator=generator).double(), dim=-1)
        for m in (n, classes)
    )
    weight = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)))
    weight[0] = 1.0
    logits = draw(st.sampled_from([1.0, 10.0, 30.0])) * features @ prototypes.T
    return StepState(features, prototypes, logits, torch.zeros(n, dtype=torch.long), weight)


def hand_made(prompts: list[list[str]]) -> list[Array]:
    """Unit features of every prompt, one text at a time."""
    model, processor = load()
    return [
        np.stack(
            [
                rows_unit(double(text_features(model, processor.encode_prompts([[text]]))[0]))
                for text in texts
            ]
        )
        for texts in prompts
    ]


@pytest.fixture(scope="module")
def own() -> list[Array]:
    return hand_made(PROMPTS)


@pytest.fixture(scope="module")
def attached() -> dict[str, tuple[Any, TowerMethod]]:
    methods = {}
    for name in FROM_WORDS:
        model, processor = load()
        methods[name] = (model, attach(name, model, processor))
    return methods


def class_means(prompts: list[Array]) -> Array:
    """A unit vector for each class."""
    return np.stack([rows_unit(p.mean(0)) for p in prompts])


def divergence_by_hand(
    model: Any, own: list[Array], state: StepState, temperature: float = 1.0
) -> Array:
    """For each image, from the zero-shot prediction to that of the step."""
    zero_shot = float(model.logit_scale.exp()) * double(state.features) @ class_means(own).T
    p, q = softmax(zero_shot / temperature), softmax(double(state.logits) / temperature)
    result: Array = (p * np.log(p / q)).sum(1)
    return result


@given(data=st.data())
def test_kgcoop_adds_the_distance_to_the_hand_made_texts(
    own: list[Array], attached: dict[str, tuple[Any, TowerMethod]], data: st.DataObject
) -> None:
    state = data.draw(states())
    _, tuning = attached["kgcoop"]
    t, h = double(state.prototypes), class_means(own)
    expected = 8.0 * (1 - np.mean([t[k] @ h[k] for k in range(3)]))
    assert further_loss(tuning, state).item() == pytest.approx(expected, abs=1e-5)


@given(data=st.data())
def test_prograd_is_guided_by_the_zero_shot_predictions(
    own: list[Array], attached: dict[str, tuple[Any, TowerMethod]], data: st.DataObject
) -> None:
    state = data.draw(states())
    model, tuning = attached["prograd"]
    expected = divergence_by_hand(model, own, state)[state.weight.numpy() > 0].mean()
    assert further_loss(tuning, state).item() == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_temperature_softens_both_softmaxes(temperature: float, own: list[Array]) -> None:
    model, processor = load()
    tuning = attach("prograd", model, processor, temperature=temperature)
    features, prototypes = unit(5, 24), unit(3, 24)
    logits = 7 * features @ prototypes.T
    state = StepState(features, prototypes, logits, torch.zeros(5).long(), torch.ones(5))
    expected = divergence_by_hand(model, own, state, temperature).mean()
    assert further_loss(tuning, state).item() == pytest.approx(expected, abs=1e-5)


def kept_by_the_paper(scores: Array, tau: float) -> NDArray[np.bool_]:
    """Median, median absolute deviation, then standardised, as in the paper."""
    s = np.median(scores)
    z = (scores - s) / np.median(np.abs(scores - s))
    kept: NDArray[np.bool_] = np.abs((z - z.mean()) / z.std(ddof=1)) <= tau
    return kept


@given(
    st.lists(st.floats(-50, 50), min_size=3, max_size=30, unique=True), st.sampled_from([1.0, 1.5])
)
def test_the_filter_is_the_papers_without_its_detour(values: list[float], tau: float) -> None:
    scores = np.array(values)
    spread = np.abs(scores - np.median(scores))
    distance = np.abs(scores - scores.mean()) / scores.std(ddof=1)
    if np.median(spread) < 1e-6 or np.abs(distance - tau).min() < 1e-6:
        return  # nothing to divide by, or on the edge
    assert within(torch.from_numpy(scores), tau).tolist() == kept_by_the_paper(scores, tau).tolist()


@pytest.mark.parametrize("scores", [[3.0], [2.0, 2.0, 2.0], [0.1] * 7])
def test_scores_that_do_not_differ_are_all_kept(scores: list[float]) -> None:
    assert within(torch.tensor(scores), 1.5).all()


def test_a_filter_that_would_keep_nothing_keeps_all() -> None:
    assert within(torch.tensor([0.0, 1.0]), 0.1).all()
    assert within(torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0]), 1.5).tolist() == [True] * 4 + [False]


def biomedcoop_by_hand(
    prompts: list[Array], state: StepState, scale: float, l1: float, l2: float, tau: float
) -> tuple[float, int]:
    """The penalty and how many sets were left out, in plain loops."""
    f = double(state.features)[state.weight.numpy() > 0]
    number = max(len(p) for p in prompts)
    sets = [np.stack([p[i % len(p)] for p in prompts]) for i in range(number)]
    scores = np.array([np.mean([max(scale * row @ c for c in one) for row in f]) for one in sets])
    kept = kept_by_the_paper(scores, tau)
    teacher = rows_unit(np.mean([one for one, k in zip(sets, kept, strict=True) if k], axis=0))
    consistency = ((double(state.prototypes) - class_means(prompts)) ** 2).mean()
    p = softmax(scale * f @ teacher.T)
    q = softmax(double(state.logits)[state.weight.numpy() > 0])
    distillation = (p * np.log(p / q)).sum() / p.size
    return l1 * consistency + l2 * distillation, int((~kept).sum())


UNEVEN = [
    ["viable", "a crescent", "PAS", "the tuft", "collagen of a glomerulus", "H&E, normal"],
    ["sclerosed", "part of the tuft", "obliterated"],
    ["mesangial", "an expansion", "loops", "silver", "a photo of the kidney"],
]
UNEVEN_CLASSES = [ClassInfo(f"c{k}", f"c{k}", tuple(p)) for k, p in enumerate(UNEVEN)]


@pytest.mark.parametrize(("l1", "l2", "tau"), [(0.5, 0.5, 1.5), (2.0, 0.0, 1.5), (0.0, 3.0, 0.8)])
def test_biomedcoop_adds_consistency_and_filtered_distillation(
    l1: float, l2: float, tau: float
) -> None:
    model, processor = load()
    chosen = {"consistency": l1, "distillation": l2, "tau": tau, "prompts": "classes"}
    tuning = attach("biomedcoop", model, processor, UNEVEN_CLASSES, **chosen)
    features = hand_made(UNEVEN)
    scale = float(model.logit_scale.exp())
    left_out = set()
    for seed in range(12):
        torch.manual_seed(seed)
        f = nn.functional.normalize(torch.randn(4, 24).double(), dim=-1)
        t = nn.functional.normalize(torch.randn(3, 24).double(), dim=-1)
        weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
        state = StepState(f, t, 9 * f @ t.T, torch.zeros(4).long(), weight)
        expected, out = biomedcoop_by_hand(features, state, scale, l1, l2, tau)
        left_out.add(out)
        assert further_loss(tuning, state).item() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert len(left_out) > 1 or left_out != {0}  # the filter did something


def test_biomedcoop_with_one_prompt_a_class_has_nothing_to_leave_out() -> None:
    classes = [ClassInfo(n, n, (f"a {n} tuft",)) for n in NAMES]
    model, processor = load()
    tuning = attach("biomedcoop", model, processor, classes, prompts="classes")
    hand = plain_prototypes([list(c.prompts) for c in classes])
    features = unit(4, 24)
    logits = model.logit_scale.exp() * features @ hand.T
    state = StepState(features, hand, logits, torch.zeros(4).long(), torch.ones(4))
    assert further_loss(tuning, state).item() == pytest.approx(0, abs=1e-6)


def test_a_part_of_a_batch_that_only_pads_costs_a_finite_number() -> None:
    logits = torch.randn(2, 3)
    assert divergence(logits, logits + 1, torch.zeros(2)).item() == 0
    for name in FROM_WORDS:
        model, processor = load()
        tuning = attach(name, model, processor)
        state = StepState(unit(2, 24), unit(3, 24), logits, torch.zeros(2).long(), torch.zeros(2))
        assert torch.isfinite(further_loss(tuning, state))


# --------------------------------------------------------------------------------- a training step


def batch(n: int = 5, classes: int = 3, width: int = 32) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Pooled vectors, labels and weights of a step."""
    return torch.randn(n, width), torch.arange(n) % classes, torch.ones(n)


def by_hand(
    model: Any, processor: Any, tuning: TowerMethod, inputs: tuple[Any, ...], hand: torch.Tensor
) -> tuple[Array, Array]:
    """Gradients of the cross-entropy and of the divergence, each from a forward pass of its own."""
    x, labels, _ = inputs
    actual = []
    for kind in ("cross-entropy", "divergence"):
        t = model.class_prototypes(**processor.encode_prompts(tuning.class_texts))
        f = nn.functional.normalize(model.project_images(x), dim=-1)
        scale = model.logit_scale.exp()
        q = (scale * f @ t.T).log_softmax(-1)
        if kind == "divergence":
            p = (scale * f @ hand.T).softmax(-1)
            loss = (p * (p.log() - q)).sum(-1).mean()
        else:
            loss = -q[torch.arange(len(labels)), labels].mean()
        (g,) = torch.autograd.grad(loss, [context_of(tuning)])
        actual.append(double(g))
    return actual[0], actual[1]


@pytest.mark.parametrize("class_specific", [False, True])
def test_prograd_projects_a_gradient_that_opposes_the_guide(class_specific: bool) -> None:
    hand = plain_prototypes(PROMPTS)
    seen = set()
    for seed in range(8):
        model, processor = load()
        tuning = attach("prograd", model, processor, class_specific=class_specific)
        torch.manual_seed(seed)
        context_of(tuning).data.normal_(std=0.5)
        x, _, weight = batch()
        f = nn.functional.normalize(model.project_images(x), dim=-1)
        order = (f @ hand.T).argsort(1)
        labels = order[:, -1] if seed % 2 else order[:, 0]  # as zero-shot says, or the contrary
        inputs = (x, labels, weight)
        g, h = by_hand(model, processor, tuning, inputs, hand)
        expected, conflict = g, (g * h).sum() < 0
        if conflict:
            expected = g - (g * h).sum() / (h * h).sum() * h
            assert abs((expected * h).sum()) < 1e-9 * np.linalg.norm(g) * np.linalg.norm(h) + 1e-12
            assert np.abs(expected - g).max() > 1e-3 * np.abs(g).max()
        step = TowerStep(tuning, "prototypes")
        step.train()
        step(*inputs, len(x)).backward()
        actual = context_of(tuning).grad
        assert actual is not None
        mine = double(actual)
        assert np.abs(mine - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
        seen.add(bool(conflict))
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["kgcoop", "biomedcoop"])
def test_a_penalty_is_added_to_the_cross_entropy(name: str) -> None:
    model, processor = load()
    tuning = attach(name, model, processor)
    x, labels, weight = batch()
    step = TowerStep(tuning, "prototypes")
    with torch.no_grad():
        f = nn.functional.normalize(model.project_images(x), dim=-1)
        t = model.class_prototypes(**processor.encode_prompts(tuning.class_texts))
        logits = model.logit_scale.exp() * f @ t.T
        penalty = further_loss(tuning, StepState(f, t, logits, labels, weight)).item()
        expected = nn.functional.cross_entropy(logits, labels).item() + penalty
        loss = step(x, labels, weight, len(x)).item()
    assert penalty > 1e-3
    assert loss == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------- as one method


@pytest.fixture(scope="module")
def support(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes of 1, 3 and 2 images."""
    rows = all_rows(load_dataset(tiny_images(tmp_path_factory.mktemp("data") / "images")))
    labels = rows["label"][:]
    index = [[i for i, label in enumerate(labels) if label == k] for k in range(3)]
    return rows.select([*index[0][:1], *index[1][:3], *index[2][:2]])


def one_shot(support: Dataset) -> Dataset:
    labels = support["label"][:]
    return support.select([labels.index(k) for k in range(3)])


@pytest.mark.parametrize("name", FROM_WORDS)
@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, tiny_pair])
def test_peft_alone_loads_the_saved_context(
    make: Any, name: str, support: Dataset, tmp_path: Path
) -> None:
    model, processor = load_backbone(str(make()))
    adapted = adapt(
        model,
        name,
        support,
        processor=processor,
        classes=CLASSES,
        config=AdaptConfig(recipe={"epochs": 3, "lr": 0.05}, output_dir=tmp_path),
    )
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == (
        "TRAINABLE_TOKENS"
    )
    if make is tiny_pair:
        fresh, _ = load_backbone(tiny_pair())
        stock = PeftModel.from_pretrained(fresh.backbone, tmp_path / "adapter").eval()
    else:
        stock = AutoModel.from_pretrained(tmp_path / "adapter").eval()
    encoded = adapted.processor.encode_prompts([[f"{n}."] for n in NAMES])
    inputs = {k: encoded[k] for k in ("input_ids", "attention_mask")}
    if make is tiny_siglip:
        inputs.pop("attention_mask")  # it was trained to see the padding
    with torch.no_grad():
        theirs = stock.get_text_features(**inputs).pooler_output
    mine = text_features(adapted.model.glovlm, encoded)
    untouched = text_features(load_backbone(str(make()))[0], encoded)
    assert (theirs - mine).abs().max() < 1e-5
    assert (untouched - mine).abs().max() > 1e-3


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_one_image_a_class_is_enough_and_a_seed_decides(name: str, support: Dataset) -> None:
    def run(seed: int) -> torch.Tensor:
        model, processor = load_backbone(str(tiny_clip()))
        adapted = adapt(
            model,
            name,
            one_shot(support),
            processor=processor,
            classes=CLASSES,
            config=AdaptConfig(recipe={"epochs": 2}, seed=seed),
        )
        weight: torch.Tensor = adapted.model.head.weight
        assert torch.isfinite(weight).all()
        return weight.detach()

    first = run(0)
    assert torch.equal(run(0), first)
    if name == "prompt_tuning":  # the others start from words, and a batch holds every image
        assert not torch.equal(run(1), first)


def test_kgcoop_stays_nearer_to_the_hand_made_texts_than_coop(support: Dataset) -> None:
    hand = plain_prototypes(PROMPTS)

    def distance(name: str, **chosen: Any) -> float:
        model, processor = load_backbone(str(tiny_clip()))
        adapted = adapt(
            model,
            name,
            one_shot(support),
            processor=processor,
            classes=CLASSES,
            config=AdaptConfig(chosen, {"epochs": 30, "lr": 1e-3}),
        )
        return 1 - float((adapted.model.head.weight.detach() * hand).sum(1).mean())

    words = {"context_tokens": 0, "init": "a photo of a"}
    alone, near = distance("prompt_tuning", **words), distance("kgcoop")
    assert near < 0.5 * alone


def test_what_stood_in_for_the_terminology_is_in_the_results(support: Dataset) -> None:
    model, processor = load_backbone(str(tiny_clip()))
    classes = [ClassInfo(n, n, (f"own of {n}",)) for n in ("viable", "a dog", "a cat")]
    options: dict[str, Any] = {"processor": processor, "config": {"recipe": {"epochs": 1}}}
    adapted = adapt(model, "biomedcoop", one_shot(support), classes=classes, **options)
    assert any("own for a dog, a cat" in note for note in adapted.notes)
    assert any("not verified: viable glomerulus" in note for note in adapted.notes)
