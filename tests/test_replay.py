"""Blocks that do not change are run once, and nothing else about training is any different."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from attaching import attach
from tiny import tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from hf_glovlm.backbones import load_backbone
from hf_glovlm.methods import Recipe, TowerMethod, give_joint_space, tower_layers
from hf_glovlm.model import GloVLMConfig, GloVLMModel
from hf_glovlm.training.frozen_cache import Replay, frozen_blocks, record_tower
from hf_glovlm.training.loop import TensorSource, fit

LABELS = torch.arange(11) % 3
RECIPE = Recipe(lr=1e-3, epochs=4, batch_size=4, schedule="cosine", final_lr=0.01)


def load(make: Any = tiny_clip) -> tuple[Any, Any]:
    model, processor = load_backbone(str(make()))
    if model.config.is_pair:
        texts = nn.functional.normalize(torch.randn(3, 32), dim=-1)
        give_joint_space(model, torch.randn(6, 64), torch.arange(6) % 3, texts)
    return model.eval().requires_grad_(False), processor


def deep_clip(layers: int = 4) -> tuple[Any, Any]:
    """The small CLIP with more blocks."""
    config = CLIPConfig.from_pretrained(tiny_clip())
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GloVLMModel(GloVLMConfig(backbone_config=config), backbone=CLIPModel(config))
    return model.eval().requires_grad_(False), load()[1]


class Step(nn.Module):
    """Cross-entropy of images against class texts, each tower run in full or behind its blocks."""

    def __init__(self, model: Any, processor: Any, tuning: TowerMethod, pixels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.text = processor.encode_prompts(tuning.class_texts)
        self.pixels = pixels
        self.blank: Tensor | None = None
        self.vision: Any = None
        self.words: Any = None

    def train(self, mode: bool = True) -> "Step":
        super().train(False)
        for name, module in self.named_modules():
            if "lora_dropout." in name:
                module.train(mode)
        return self

    def images(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def texts(self, rows: slice) -> Tensor:
        mask = self.text["attention_mask"][rows]
        features: Tensor = self.model.get_text_features(
            self.text["input_ids"][rows], mask
        ).pooler_output
        return features

    def record(self) -> tuple[Any, Any]:
        """Record both towers, as training is about to begin."""
        self.train()
        towers, blank = self.model.backbone, torch.zeros_like(self.pixels[:1])
        self.vision = record_tower(
            towers.vision_model,
            lambda rows: self.images(self.pixels[rows]),
            len(self.pixels),
            blank=lambda rows: self.images(blank),
        )
        self.words = record_tower(towers.text_model, self.texts, len(self.text["input_ids"]))
        self.blank = blank if self.vision else None
        return self.vision, self.words

    def source(self) -> TensorSource:
        return TensorSource(self.vision[1] if self.vision else self.pixels, LABELS)

    def forward(self, inputs: Tensor, labels: Tensor, weight: Tensor, total: int) -> Tensor:
        with self.vision[0].play(inputs) if self.vision else nullcontext():
            features = self.images(inputs if self.blank is None else self.blank)
        with self.words[0].play(self.words[1]) if self.words else nullcontext():
            prototypes = self.model.class_prototypes(**self.text)
        features = nn.functional.normalize(features, dim=-1)
        losses = nn.functional.cross_entropy(20 * features @ prototypes.T, labels, reduction="none")
        return (weight * losses).sum() / total


def trained(
    make: Any, method: str, settings: dict[str, Any], replay: bool
) -> tuple[list[float], list[Tensor], tuple[int, int]]:
    """Losses of the epochs, what was learned, and how many blocks of each tower were left out."""
    torch.manual_seed(0)
    model, processor = deep_clip() if make is deep_clip else load(make)
    # In float64: AdamW divides by the size of a gradient, which would blow up what rounding leaves.
    tuning = attach(method, model.double(), processor, **settings)
    step = Step(model, processor, tuning, torch.randn(11, 3, 32, 32).double())
    if replay:
        step.record()
    log = fit(step, tuning.groups, step.source(), RECIPE, accelerator=Accelerator(cpu=True), seed=3)
    learned = [p.detach().clone() for g in tuning.groups for p in g["params"]]
    left_out = [part[0].frozen if part else 0 for part in (step.vision, step.words)]
    return [row["loss"] for row in log], learned, (left_out[0], left_out[1])


# ----------------------------------------------------------------------------- nothing is different

CASES: list[tuple[Any, str, dict[str, Any], tuple[int, int]]] = [
    (tiny_clip, "vanilla", {"vision_layers": 1, "text_layers": 1}, (1, 1)),
    (deep_clip, "vanilla", {"vision_layers": 1, "text_layers": 2}, (3, 2)),
    (deep_clip, "vanilla", {"vision_layers": 3, "text_layers": 4}, (1, 0)),
    (tiny_siglip, "vanilla", {"vision_layers": 1, "text_layers": 1}, (1, 1)),
    (tiny_pair, "vanilla", {"vision_layers": 1, "text_layers": 1}, (1, 1)),
    (tiny_pair, "lora", {}, (1, 1)),
    (tiny_clip, "lora", {"dropout": 0.5}, (1, 1)),
    (deep_clip, "lora", {"layers": [2], "tuner": "DORA"}, (2, 2)),
]


@pytest.mark.parametrize(("make", "method", "settings", "left_out"), CASES)
def test_the_loss_curve_and_what_is_learned_are_the_same(
    make: Any, method: str, settings: dict[str, Any], left_out: tuple[int, int]
) -> None:
    plain, learned, none = trained(make, method, settings, replay=False)
    replayed, again, actual = trained(make, method, settings, replay=True)
    assert (none, actual) == ((0, 0), left_out)
    assert plain[-1] < plain[0]
    assert np.abs(np.array(plain) - np.array(replayed)).max() < 1e-5
    assert max(float((a - b).abs().max()) for a, b in zip(learned, again, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("make", "method", "settings"),
    [(deep_clip, "vanilla", {"vision_layers": 2, "text_layers": 1}), (tiny_pair, "lora", {})],
)
def test_gradients_are_the_same(make: Any, method: str, settings: dict[str, Any]) -> None:
    gradients = []
    for replay in (False, True):
        torch.manual_seed(0)
        model, processor = make() if make is deep_clip else load(make)
        tuning = attach(method, model, processor, **settings)
        params = tuning.trained
        step = Step(model, processor, tuning, torch.randn(11, 3, 32, 32)).eval()
        with torch.no_grad():
            for p in params:  # LoRA's second half starts at zero, and with it half the gradients
                p.add_(
                    0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                )
        if replay:
            step.record()
            step.eval()
        index = [4, 0, 9]
        step(step.source().fetch(index), LABELS[index], torch.ones(3), 3).backward()
        gradients.append([p.grad.clone() if p.grad is not None else None for p in params])
    for plain, replayed in zip(*gradients, strict=True):
        assert (plain is None) == (replayed is None)
        if plain is not None and replayed is not None:
            assert (plain - replayed).abs().max() < 1e-5 * max(1.0, float(plain.abs().max()))
    assert sum(g is not None for g in gradients[0]) >= 8


def test_frozen_blocks_are_not_run_again() -> None:
    model, processor = deep_clip()
    tuning = attach("vanilla", model, processor, vision_layers=1, text_layers=1)
    step = Step(model, processor, tuning, torch.randn(11, 3, 32, 32))
    step.record()
    ran: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    step(step.source().fetch([0, 1]), LABELS[:2], torch.ones(2), 2)
    assert {n.rpartition(".")[2] for n in ran} == {"3"}
    assert len(ran) == 2
    blocks = tower_layers(model.backbone.vision_model)[1]
    assert [type(block).__name__ for block in blocks] == ["CLIPEncoderLayer"] * 4
    ran.clear()
    step.images(torch.randn(1, 3, 32, 32))  # outside, every block runs: validation, prediction
    assert len(ran) == 4


# ---------------------------------------------------------------------------- what counts as frozen


def count(model: Any, tower: str) -> int:
    pixels, ids = torch.randn(1, 3, 32, 32), torch.tensor([[1, 5, 2]])
    run = {
        "vision": lambda: model.get_image_features(pixels),
        "text": lambda: model.get_text_features(ids, torch.ones_like(ids)),
    }
    return frozen_blocks(getattr(model.backbone, f"{tower}_model"), run[tower])


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, tiny_pair])
def test_a_tower_that_does_not_train_is_frozen_as_a_whole(make: Any) -> None:
    model, _ = load(make)
    assert (count(model, "vision"), count(model, "text")) == (2, 2)
    model.requires_grad_(True)
    assert (count(model, "vision"), count(model, "text")) == (0, 0)


@pytest.mark.parametrize("layer", range(4))
def test_a_block_counts_as_changing_from_the_first_that_trains(layer: int) -> None:
    model, _ = deep_clip()
    tower_layers(model.backbone.vision_model)[1][layer].layer_norm2.bias.requires_grad_(True)
    assert (count(model, "vision"), count(model, "text")) == (layer, 4)


def test_an_embedding_that_trains_changes_every_block() -> None:
    model, _ = deep_clip()
    model.backbone.vision_model.embeddings.class_embedding.requires_grad_(True)
    assert count(model, "vision") == 0


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("prompt_tuning", {"context_tokens": 2}, (4, 0)),
        ("lora", {"layers": [1, 3]}, (1, 1)),
        ("lora", {"towers": "text"}, (4, 3)),
        ("clip_lora", {}, (0, 0)),
        ("full", {}, (0, 0)),
        ("vanilla", {"vision_layers": 2, "text_layers": 0}, (2, 4)),
        ("adapter", {}, (0, 4)),
        ("vpt", {}, (0, 4)),
        ("maple", {"depth": 2}, (0, 0)),
    ],
)
def test_every_method_is_seen_through(
    method: str, settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    model, processor = deep_clip()
    tuning = attach(method, model, processor, **settings)
    step = Step(model, processor, tuning, torch.randn(11, 3, 32, 32)).train()
    assert (count(step.model, "vision"), count(step.model, "text")) == expected
    recorded = step.record()
    assert tuple(r is not None for r in recorded) == tuple(n > 0 for n in expected)


def test_randomness_before_the_trained_blocks_is_not_recorded() -> None:
    model, _ = load(tiny_pair)
    dropout = tower_layers(model.backbone.text_model)[1][0].attention.output.dropout
    assert count(model, "text") == 2
    dropout.train()
    assert count(model, "text") == 0
    dropout.eval()
    model.backbone.text_model.embeddings.dropout.train()
    assert count(model, "text") == 0
    model.eval()
    last = tower_layers(model.backbone.text_model)[1][1]
    last.requires_grad_(True)
    last.output.dropout.train()  # behind the frozen block it may be as random as it likes
    assert count(model, "text") == 1


def test_a_tower_without_blocks_is_left_alone() -> None:
    tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert frozen_blocks(tower, lambda: tower(torch.randn(1, 3, 8, 8))) == 0


# ------------------------------------------------------------------------------- odd towers, memory


class Block(nn.Module):
    """A block that returns what `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.form = form

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        x = torch.tanh(self.linear(x)) + (0 if bias is None else bias)
        if self.form == "plain":
            return x
        return (x, None) if self.form == "pair" else (x, x.mean(1, keepdim=True))


class Odd(nn.Module):
    """A tower of such blocks, which may read its first block in another way."""

    def __init__(self, form: str, twice: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(form) for _ in range(3))
        self.form, self.twice = form, twice

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for i in (0, 1, 2, 2) if self.twice else (0, 1, 2):
            out = self.layers[i](x, bias)
            x = out if self.form == "plain" else out[0]
            if self.form == "shared" and i == 0:
                bias = out[1]  # as T5's first block hands its position bias to the others
        return x.mean(1)


@pytest.mark.parametrize("form", ["plain", "pair"])
def test_a_block_may_return_a_tensor_or_a_tuple(form: str) -> None:
    tower = Odd(form).eval().requires_grad_(False)
    tower.layers[2].requires_grad_(True)
    x = torch.randn(70, 5, 6)  # more than one chunk
    actual = record_tower(tower, lambda rows: tower(x[rows]), 70)
    assert actual is not None
    replay, states = actual
    assert (replay.frozen, states.shape) == (2, (70, 5, 6))
    index = [69, 0, 33]
    with replay.play(states[index]):
        played = tower(torch.zeros(1, 5, 6))
    assert_same_numbers(played, tower(x[index]))
    played.sum().backward()
    assert tower.layers[2].linear.weight.grad is not None


@pytest.mark.parametrize(("form", "twice"), [("shared", False), ("plain", True)])
def test_a_tower_that_is_more_than_a_row_of_blocks_runs_in_full(form: str, twice: bool) -> None:
    tower = Odd(form, twice).eval().requires_grad_(False)
    tower.layers[2].requires_grad_(True)
    x = torch.randn(4, 5, 6)
    assert record_tower(tower, lambda rows: tower(x[rows]), 4) is None
    assert all(isinstance(layer, Block) for layer in tower.layers)


def test_states_beyond_the_memory_are_not_kept() -> None:
    tower = Odd("plain").eval().requires_grad_(False)
    x = torch.randn(40, 5, 6)
    needed = 40 * 5 * 6 * 4

    def actual(keep_bytes: int) -> Any:
        return record_tower(tower, lambda rows: tower(x[rows]), 40, keep_bytes=keep_bytes)

    assert actual(needed - 1) is None
    assert actual(needed)[1].nbytes == needed


def test_the_blocks_come_back_after_an_error() -> None:
    tower = Odd("plain").eval().requires_grad_(False)
    blocks = list(tower.layers)
    replay = Replay(tower, 2)
    with pytest.raises(RuntimeError, match="mat1"), replay.play(torch.zeros(1, 5, 7)):
        tower(torch.zeros(1, 5, 6))
    assert list(tower.layers) == blocks
    assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, tiny_siglip2, tiny_pair])
def test_texts_of_many_lengths_are_played_back_by_their_rows(make: Any) -> None:
    model, processor = load(make)
    tower_layers(model.backbone.text_model)[1][1].requires_grad_(True)
    text = processor.encode_prompts(
        [["a tuft", "an ischemic tuft, wrinkled"], ["PAS"], ["collagen"]]
    )

    def run(rows: slice) -> Tensor:
        mask = text["attention_mask"][rows]
        features: Tensor = model.get_text_features(text["input_ids"][rows], mask).pooler_output
        return features

    actual = record_tower(model.backbone.text_model, run, 4)
    assert actual is not None
    replay, states = actual
    assert replay.frozen == 1
    for rows in (slice(0, 4), slice(1, 3)):  # as chunks of texts go through the tower
        with replay.play(states[rows]):
            played = run(rows)
        assert (played - run(rows)).abs().max() < 1e-5


def test_recording_follows_the_precision_it_is_called_in() -> None:
    model, _ = deep_clip()
    tower_layers(model.backbone.vision_model)[1][3].requires_grad_(True)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = record_tower(
            model.backbone.vision_model,
            lambda rows: model.get_image_features(pixels[rows]).pooler_output,
            3,
        )
        assert actual is not None
        with actual[0].play(actual[1]):
            played = model.get_image_features(pixels[:1]).pooler_output
        plain = model.get_image_features(pixels).pooler_output
    assert torch.equal(played, plain)
