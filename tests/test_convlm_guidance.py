"""Pretraining of ConVLM's autoencoders: that texts enter, and that it keeps to the formulas."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from attaching import CLASSES, adapt_with
from datasets import Dataset
from numpy.typing import NDArray
from tiny import tiny_clip, tiny_images, tiny_pair
from torch import Tensor, nn

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, TowerMethod, give_joint_space
from hf_glovlm.training import Adapted

Array = NDArray[Any]
LABELS = torch.tensor([0, 1, 2, 2, 1, 2])  # uneven classes
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
PAIRS = [(0, 1), (0, 2), (1, 2)]
BACKBONES = {"clip": tiny_clip, "pair": tiny_pair}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes, four images each."""
    return all_rows(load_dataset(tiny_images(tmp_path_factory.mktemp("data") / "a", per_class=4)))


def published(backbone: str, rows: Dataset, **options: Any) -> Adapted:
    """Adapt at the published learning rate, which by itself hardly moves the autoencoders."""
    model, processor = load_backbone(str(BACKBONES[backbone]()))
    recipe = {"epochs": 2, "batch_size": 6}
    return adapt_with(
        model, "convlm", rows, processor=processor, classes=CLASSES, recipe=recipe, **options
    )


def attached(backbone: str, **settings: Any) -> tuple[Any, TowerMethod]:
    """A model in float64 with the method attached, the autoencoders as they start."""
    model, processor = load_backbone(str(BACKBONES[backbone]()))
    torch.manual_seed(0)
    if model.config.is_pair:
        texts = nn.functional.normalize(torch.randn(3, 32), dim=-1)
        give_joint_space(model, torch.randn(6, 64), torch.arange(6) % 3, texts)
    model.double().requires_grad_(False)
    method = METHODS["convlm"]
    assert isinstance(method, TowerMethod)
    return model, method.attach(model, processor, CLASSES, method.configure(settings))


def pretrain(tuning: TowerMethod, seed: int = 0) -> None:
    tuning.pretrain(lambda index: IMAGES[list(index)], LABELS, seed)


def state(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def class_texts(model: Any, processor: Any) -> Tensor:
    with torch.no_grad():
        encoded = processor.encode_prompts([list(c.prompts) for c in CLASSES])
        texts: Tensor = model.class_prototypes(**encoded)
    return texts


def guidance(model: Any, texts: Tensor) -> Tensor:
    """What the autoencoders make of the texts `[layers, n, width]`."""
    with torch.no_grad():
        return torch.stack([read_text(texts) for read_text in model.context.to_vision])


# ----------------------------------------------------------------------------- whether text enters


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("clip", {}),
        pytest.param("clip", {"target": "layer"}, marks=pytest.mark.long),
        pytest.param("clip", {"blocks": 2}, marks=pytest.mark.long),
        ("pair", {}),
        pytest.param("pair", {"weight_v": 0.0}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_each_class_moves_the_class_tokens_query_its_own_way(
    backbone: str, settings: dict[str, Any], rows: Dataset
) -> None:
    """These small encoders hardly tell the texts apart, so little is much here."""
    adapted = published(backbone, rows, method_config=settings)
    model = adapted.model.glovlm
    texts = class_texts(model, adapted.processor)
    assert guidance(model, texts).std(1).mean() > 1e-4
    queries = []
    for text in texts:  # one image under each class's text
        model.eval()
        model.context.train()
        with model.context.read(text[None]) as seen, torch.no_grad():
            model.get_image_features(IMAGES[:1].float())
        queries.append(torch.cat(seen.queries))
    assert torch.stack(queries).std(0).mean() > 1e-5  # 1 - theta of it


def test_the_spread_of_the_guidance_is_a_fact_with_a_note_where_no_text_enters(
    rows: Dataset,
) -> None:
    for settings, enters in ({"autoencoder_steps": 0}, False), ({"autoencoder_lr": 1e-2}, True):
        adapted = published("clip", rows, method_config=settings)
        model = adapted.model.glovlm
        made = guidance(model, class_texts(model, adapted.processor))
        expected = np.mean([(made[:, i] - made[:, j]).abs().mean() for i, j in PAIRS])
        assert adapted.facts["guidance_spread"] == pytest.approx(expected, rel=1e-5)
        assert (adapted.facts["guidance_spread"] >= 0.01) == enters
        notes = [note for note in adapted.notes if "The text did not enter" in note]
        assert len(notes) == (not enters)
        assert enters or "Raise autoencoder_steps (now 0)" in notes[0]
    for settings in {"theta": 1.0}, {"context": "none"}:  # none is meant to enter
        adapted = published("clip", rows, method_config=settings)
        assert "guidance_spread" not in adapted.facts
        assert not any("did not enter" in note for note in adapted.notes)


def test_captions_guide_each_by_its_own_text(rows: Dataset) -> None:
    texts = [f"a {word} tuft" for word in ("red", "open", "solid", "pale")] * 3
    support = rows.add_column("caption", texts)
    settings = {"context": "captions", "autoencoder_lr": 1e-2}
    adapted = published("clip", support, method_config=settings)
    model = adapted.model.glovlm
    encoded = adapted.processor.encode_prompts([[text] for text in texts])
    with torch.no_grad():
        made = guidance(model, model.class_prototypes(**encoded))
    pairs = [(made[:, i] - made[:, j]).abs().mean() for i, j in combinations(range(12), 2)]
    assert adapted.facts["guidance_spread"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert adapted.facts["guidance_spread"] > 1e-3


# ------------------------------------------------------------------------------------- by formula


class _ByHand:
    """A stack of linear layers in numpy: one row forward, its gradient backward, Adam."""

    def __init__(self, layers: Any) -> None:
        self.kinds = [type(layer).__name__ for layer in layers]
        self.values = [
            [p.detach().numpy().copy() for p in (layer.weight, layer.bias)]
            for layer in layers
            if isinstance(layer, nn.Linear)
        ]
        self.moments = [[np.zeros((2, *v.shape)) for v in pair] for pair in self.values]
        self.gradients = [[np.zeros_like(v) for v in pair] for pair in self.values]

    def forward(self, x: Array) -> Array:
        self.seen, linear = [x], iter(self.values)
        for kind in self.kinds:
            if kind == "Linear":
                weight, bias = next(linear)
                x = weight @ x + bias
            else:
                x = np.maximum(x, 0) if kind == "ReLU" else 1 / (1 + np.exp(-x))
            self.seen.append(x)
        return x

    def backward(self, gradient: Array) -> None:
        place = len(self.values)
        for kind, before, after in zip(
            self.kinds[::-1], self.seen[-2::-1], self.seen[::-1], strict=False
        ):
            if kind == "Linear":
                place -= 1
                self.gradients[place][0] += np.outer(gradient, before)
                self.gradients[place][1] += gradient
                gradient = self.values[place][0].T @ gradient
            else:
                gradient = gradient * ((after > 0) if kind == "ReLU" else after * (1 - after))

    def step(self, number: int, lr: float) -> None:
        for values, moments, gradients in zip(
            self.values, self.moments, self.gradients, strict=True
        ):
            for value, (first, second), gradient in zip(values, moments, gradients, strict=True):
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient**2 - second)
                size = np.sqrt(second / (1 - 0.999**number)) + 1e-8
                value -= lr * first / (1 - 0.9**number) / size
                gradient[...] = 0


def _recorded(model: Any, target: str) -> tuple[Array, Array]:
    """Class tokens and queries `[layers, n, width]` of the plain tower, by hooks."""
    guide, notes = model.context, dict[str, list[Tensor]](tokens=[], queries=[])
    tower = model.backbone.vision_model
    stack = guide.blocks or getattr(tower.encoder, "layers", getattr(tower.encoder, "layer", None))

    def note(_module: Any, given: Any, made: Tensor) -> None:
        notes["tokens"].append(given[0][:, 0])
        notes["queries"].append(made[:, 0])

    hooks = []
    for layer in guide.layers:
        attention = getattr(stack[layer], "self_attn", getattr(stack[layer], "attention", None))
        hooks.append(attention.q_proj.register_forward_hook(note))
    with torch.no_grad():
        output = model.eval().backbone.vision_model(IMAGES)
    for hook in hooks:
        hook.remove()
    final = getattr(output, "pooler_output", None)
    if final is None:
        final = output.last_hidden_state[:, 0]
    tokens = notes["tokens"] if target == "layer" else [final] * len(guide.layers)
    return torch.stack(tokens).numpy(), torch.stack(notes["queries"]).numpy()


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [("clip", {"theta": 0.4}), ("pair", {"target": "layer"}), ("pair", {"blocks": 2})],
    ids=str,
)
def test_the_pretraining_is_the_one_written_out(backbone: str, settings: dict[str, Any]) -> None:
    more = {"autoencoder_steps": 5, "autoencoder_lr": 0.01, "keep": 0.5}
    model, tuning = attached(backbone, **more, **settings)
    guide, processor = model.context, tuning.processor
    texts = class_texts(model, processor).numpy()
    readers = [[_ByHand(part) for part in parts] for parts in (guide.to_vision, guide.to_text)]
    tokens, queries = _recorded(model, settings.get("target", "final"))
    theta, counts = settings.get("theta", 0.9), LABELS.bincount().tolist()
    for number in range(1, 6):
        for layer, (to_vision, to_text) in enumerate(zip(*readers, strict=True)):
            for i, k in enumerate(LABELS.tolist()):
                share = 1 / (3 * counts[k])  # every class a third of the mean
                guess = to_vision.forward(texts[k])
                to_vision.backward(share * np.sign(guess - tokens[layer, i]) / len(guess))
                query = theta * queries[layer, i] + (1 - theta) * guess
                back = to_text.forward(query)
                to_text.backward(share * np.sign(back - texts[k]) / len(back))
            to_vision.step(number, 0.01)
            to_text.step(number, 0.01)
    before = state(model)
    pretrain(tuning)
    for parts, hands in zip((guide.to_vision, guide.to_text), readers, strict=True):
        for part, hand in zip(parts, hands, strict=True):
            linear = [layer for layer in part if isinstance(layer, nn.Linear)]
            for layer, (weight, bias) in zip(linear, hand.values, strict=True):
                assert np.abs(layer.weight.detach().numpy() - weight).max() < 1e-9
                assert np.abs(layer.bias.detach().numpy() - bias).max() < 1e-9
    for name, tensor in model.state_dict().items():  # the towers rest
        assert tensor.equal(before[name]) == (".to_" not in name), name
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_draws_from_a_support_beyond_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_glovlm.methods.convlm.BATCH", 4)
    ends = []
    for seed in (0, 0, 1):
        model, tuning = attached("clip", autoencoder_steps=5)
        torch.manual_seed(7 + len(ends))  # another's draws change nothing
        untouched = torch.get_rng_state()
        pretrain(tuning, seed)
        assert torch.get_rng_state().equal(untouched)
        ends.append(model.context.to_vision[0][0].weight.detach().clone())
    assert ends[0].equal(ends[1])
    assert not ends[0].equal(ends[2])


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ({}, {"to_vision", "to_text"}),
        ({"weight_c": 0.0}, {"to_vision"}),
        ({"theta": 1.0, "weight_v": 0.0}, {"to_text"}),
        ({"context": "none"}, set()),
        ({"autoencoder_steps": 0}, set()),
    ],
    ids=["both train", "no weight_c", "no weight_v", "no context", "no steps"],
)
def test_what_no_loss_or_query_reads_stays(settings: dict[str, Any], moved: set[str]) -> None:
    model, tuning = attached("clip", **{"autoencoder_steps": 2, **settings})
    before = state(model.context)
    pretrain(tuning)
    changed = {
        n.split(".")[0] for n, t in model.context.state_dict().items() if not t.equal(before[n])
    }
    assert changed == moved


def test_a_rate_that_is_too_high_is_refused_by_its_name(rows: Dataset) -> None:
    with pytest.raises(GloVLMError, match=r"autoencoder_lr .* is too high"):
        published("clip", rows, method_config={"autoencoder_lr": 1e30})
