"""Every method equals a second route, written from its published formulas alone, in float64."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import second_route as features_route
import second_route_towers as towers_route
import torch
from cases import case_of
from second_route import ON_FEATURES, Array, softmax
from second_route_towers import IN_TOWERS, Task
from tiny import CLASSES, WIDTH, tiny_clip, tiny_images
from transformers import PreTrainedTokenizerFast

from hf_glovlm import METHODS, AdaptConfig, adapt, adapt_features, load_backbone, load_dataset
from hf_glovlm.data import ClassInfo
from hf_glovlm.methods import Recipe

ROUTES: Mapping[str, Callable[..., Any]] = {**ON_FEATURES, **IN_TOWERS}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_second_route(name: str) -> None:
    case_of(ROUTES, name, "METHODS", "tests/second_route.py", "its formula, with loops")


def test_no_second_route_outlives_its_method() -> None:
    assert set(ROUTES) == set(METHODS)


# --- methods on features ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Images of each class, queries, width, logit scale."""

    shots: tuple[int, ...]
    queries: int
    width: int
    scale: float

    def __str__(self) -> str:
        each = "-".join(map(str, self.shots))
        return f"{len(self.shots)}_classes_of_{each}_queries_{self.queries}_width_{self.width}"


SMALL = Sizes((4, 4, 4), 20, 16, 100.0)
UNBALANCED = Sizes((1, 3, 2, 5, 2), 31, 24, 50.0)
TWO = Sizes((8, 8), 47, 12, 100.0)
ONE_SHOT = Sizes((1,) * 7, 11, 10, 30.0)
SIZES = (SMALL, UNBALANCED, TWO, ONE_SHOT)

# Settings beside the defaults, each at one size.
FURTHER: dict[str, list[dict[str, Any]]] = {
    "gda": [{"alpha": 1.0, "support_prior": True}],
    "tip_adapter": [{"alpha": 3.0, "beta": 5.5, "balance": False}],
    "transclip": [
        {"text": 1.0, "gamma": 0.02},
        {"gamma": 0.0, "neighbours": 0},
        # So near to indifference that every step counts: five, ten, the start of sigma, the last.
        {"text": 0.05, "gamma": 0.002, "neighbours": 14},
    ],
    "linear_probe": [{"C": 1.0}],
    "lp_plus_plus": [{"epochs": 23, "alpha_every": 4, "momentum": 0.5, "alpha_start": 100.0}],
    "taskres": [{"alpha": 1.0, "length": 1.0}],
    "tip_adapter_f": [{"alpha": 3.0, "beta": 5.5, "balance": False}],
}

# Trained through the loop at their published length: two sizes, which keeps this file short.
# `classifier` and `clip_adapter` have full batches there (16 and 32), so no order matters.
TRAINED = ("zs_lp", "clap", "taskres", "clip_adapter", "tip_adapter_f", "prolip", "classifier")

# What no formula gives: dropout is drawn, and the MLP is wide only to be slow here.
FIXED: dict[str, dict[str, Any]] = {"classifier": {"dropout": 0.0, "hidden": 20}}

# Largest difference of logits around their mean over classes, as a share of the largest of them:
# float32 against float64, after up to 300 steps where it trains. Adam divides each coordinate by
# its own size and so enlarges rounding where a gradient is near 0.
TOLERANCE = {
    "transclip": 1e-5,
    "taskres": 1e-4,
    "prolip": 1e-5,
    "classifier": 2e-3,
    "linear_probe": 1e-2,
}


LONG = ("zs_lp", "clap", "prolip")  # of 300 steps, several times


def on_feature_cases() -> Iterator[Any]:
    """Every method at its sizes, and further settings at one."""
    for name in ON_FEATURES:
        for sizes in SIZES[:2] if name in TRAINED else SIZES:
            again = name in LONG and sizes != SIZES[0]
            marks = pytest.mark.long if again else ()
            yield pytest.param(name, sizes, {}, id=f"{name}-{sizes}", marks=marks)
        for settings in FURTHER.get(name, []):
            label = ",".join(f"{key}={value}" for key, value in settings.items())
            sizes = SMALL if name in TRAINED else UNBALANCED
            yield pytest.param(name, sizes, settings, id=f"{name}-{label}")


def draw(sizes: Sizes) -> tuple[Array, Array, Array, Array]:
    """Support, labels, texts and queries: classes that overlap, and a mean that all share."""
    rng = np.random.default_rng(len(sizes.shots))
    classes, width = len(sizes.shots), sizes.width
    labels = rng.permutation(np.repeat(np.arange(classes), sizes.shots))
    centres = rng.normal(size=(classes, width))
    common, lengths = 1.5 * rng.normal(size=width), rng.uniform(1, 4, size=(sizes.queries, 1))
    support = centres[labels] + common + rng.normal(size=(len(labels), width))
    query = centres[rng.integers(0, classes, sizes.queries)] + common
    query = (query + rng.normal(size=query.shape)) * lengths
    texts = 3 * (0.5 * centres + common + 0.5 * rng.normal(size=centres.shape))
    return support, labels, texts, query


def around_mean(logits: Array) -> Array:
    """Logits without what all classes of an image share, which no probability depends on."""
    return logits - logits.mean(axis=1, keepdims=True)


def normal(value: torch.Tensor, deviation: float) -> None:
    """Drawn from N(0, deviation^2), as far as this many draws can show."""
    slack = 4 / math.sqrt(2 * value.numel())
    assert value.std().item() == pytest.approx(deviation, rel=slack)
    assert abs(value.mean().item()) < 4 * deviation / math.sqrt(value.numel())


def uniform(value: torch.Tensor, bound: float) -> None:
    """Uniform within the bound: Kaiming with a = sqrt 5, the start of a linear map."""
    assert value.abs().max().item() <= bound
    slack = 4 / math.sqrt(2 * value.numel())
    assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=max(slack, 0.1))


def zero(value: torch.Tensor) -> None:
    assert not value.any()


def remember_head(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Take down the random values that a head starts from."""
    start: dict[str, torch.Tensor] = {}
    build = type(METHODS[name]).build

    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        head = build(self, *args, **kwargs)
        start.update({n: p.detach().clone() for n, p in head.named_parameters() if p.requires_grad})
        return head

    monkeypatch.setattr(type(METHODS[name]), "build", remembering)
    return start


def same_logits(ours: Array, second: Array, tolerance: float) -> None:
    ours, second = around_mean(ours.astype(np.float64)), around_mean(second)
    largest = np.abs(second).max()
    difference = np.abs(ours - second).max()
    assert difference <= tolerance * largest, (
        f"logits differ by {difference:.1e} of {largest:.1e}, probabilities by "
        f"{np.abs(softmax(ours) - softmax(second)).max():.1e}"
    )


@pytest.mark.parametrize(("name", "sizes", "settings"), list(on_feature_cases()))
def test_method_on_features_equals_its_formula(
    name: str, sizes: Sizes, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    support, labels, texts, query = draw(sizes)
    further: dict[str, Any] = dict(settings)
    if name in ("clip_adapter", "classifier"):
        further["start"] = remember_head(name, monkeypatch)
    transductive = METHODS[name].transductive
    adapted = adapt_features(
        name,
        support,
        labels,
        texts,
        logit_scale=sizes.scale,
        query_features=query if transductive else None,
        method_config={**settings, **FIXED.get(name, {})},
    )
    if "start" in further:
        uniform(next(iter(further["start"].values())), 1 / math.sqrt(sizes.width))
    ours = adapted.query_logits if transductive else adapted.predict_logits(query)
    second = ON_FEATURES[name](support, labels, texts, query, scale=sizes.scale, **further)
    assert ours.shape == (sizes.queries, len(sizes.shots))
    same_logits(ours, second, TOLERANCE.get(name, 2e-6 if name not in TRAINED else 5e-6))


def test_ss_text_strength_has_its_floor() -> None:
    """Over 1,000 images 1 / N would be under 0.001, which is the least lambda."""
    sizes = Sizes((700, 500), 9, 6, 100.0)
    support, labels, texts, query = draw(sizes)
    ours = adapt_features("ss_text", support, labels, texts).predict_logits(query)
    same_logits(ours, features_route.ss_text(support, labels, texts, query, scale=100.0), 2e-6)
    texts[:] = texts[::-1]  # that the texts count at all beside so many images
    other = features_route.ss_text(support, labels, texts, query, scale=100.0)
    assert np.abs(around_mean(ours) - around_mean(other)).max() > 1e-3


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_linear_probe_reaches_the_optimum(classes: int) -> None:
    """Convex, so only where it stops can differ: probabilities, with a large common offset."""
    rng = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), 4)
    centres, offset = rng.normal(size=(classes, 10)), 6 * rng.normal(size=10)
    support = centres[labels] + 0.5 * rng.normal(size=(len(labels), 10)) + offset
    query = centres[rng.integers(0, classes, 40)] + 0.5 * rng.normal(size=(40, 10)) + offset
    ours = adapt_features("linear_probe", support, labels).predict_logits(query)
    second = features_route.linear_probe(support, labels, support, query, scale=100.0)
    difference = np.abs(softmax(ours.astype(np.float64)) - softmax(second)).max()
    assert difference < 1e-3, f"probabilities differ by {difference:.1e}"


# --- methods inside the towers ----------------------------------------------------------------

HEADS = 4  # of tiny_clip
PROMPTS = (
    ("a tuft with mesangial expansion.", "mesangial expansion", "mesangial cells"),
    ("a globally sclerosed glomerulus", "collagen", "sclerosed, wrinkled", "a sclerosed tuft"),
    ("a viable glomerulus", "open capillary loops", "normal", "a viable tuft, PAS stain"),
)
INFOS = [
    ClassInfo(name=name, display_name=name, prompts=prompts)
    for name, prompts in zip(CLASSES, PROMPTS, strict=True)
]
LABELS = (1, 1, 2, 2, 0)  # against the zero-shot answers, which gives ProGrad's rule work


@functools.cache
def support_rows() -> Any:
    """Two images each of two classes, one of the third."""
    folder = tiny_images(tiny_clip().parent / "parity", per_class=2, groups=2)
    rows = load_dataset(str(folder))["all"].select(range(len(LABELS)))
    kind = rows.features["label"]
    return rows.remove_columns("label").add_column("label", list(LABELS), feature=kind)


def tiny_backbone() -> tuple[Any, Any]:
    """A CLIP whose norms, biases and scale are all unlike their starts, so that each counts."""
    model, processor = load_backbone(str(tiny_clip()))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.backbone.logit_scale.fill_(math.log(30.0))
    return model, processor


def short(name: str) -> str:
    """A parameter's name in CLIPModel."""
    return name.removeprefix("backbone.")


def task_of(model: Any, processor: Any) -> Task:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_clip())
    rows = support_rows()
    images = [row["image"].convert("RGB") for row in rows]
    return Task(
        weights={short(n): p.detach().double().clone() for n, p in model.named_parameters()},
        heads=HEADS,
        images=processor(images=images, return_tensors="pt")["pixel_values"].double(),
        labels=torch.tensor(rows["label"]),
        prompts=[[tokenizer(text)["input_ids"] for text in info.prompts] for info in INFOS],
        names=[tokenizer(f"{info.display_name}.")["input_ids"][1:-1] for info in INFOS],
        words=tokenizer("a photo of a")["input_ids"][1:-1],
    )


def trainable(method: Any) -> dict[str, torch.Tensor]:
    """What trains in an attached method, as it is now."""
    names = {id(p): short(n) for n, p in method.model.named_parameters()}
    parameters = [p for group in method.groups for p in group["params"]]
    return {names[id(p)]: p.detach().clone() for p in parameters}


def remember_towers(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Take down what trains in a tower method before its first step."""
    start: dict[str, torch.Tensor] = {}
    begin = type(METHODS[name]).begin

    def remembering(self: Any, steps: int) -> None:
        begin(self, steps)
        start.update(trainable(self))

    monkeypatch.setattr(type(METHODS[name]), "begin", remembering)
    return start


@dataclasses.dataclass(frozen=True)
class Inside:
    """A training of a few steps: settings of ours, those of the second route, the loss."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    route: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: str = "prototypes"
    epochs: int = 3


WORDS = {"init": "a photo of a", "context_tokens": 4}
INSIDE: dict[str, dict[str, Inside]] = {
    "vanilla": {
        "last_blocks": Inside(
            {"vision_layers": 1, "text_layers": 1}, {"vision_layers": 1, "text_layers": 1}
        ),
        "published_loss": Inside(loss="infonce_published", route={"loss": "infonce_published"}),
        "masked_loss": Inside(loss="infonce", route={"loss": "infonce"}),
    },
    "full": {"all": Inside()},
    "lora": {"without_dropout": Inside({"dropout": 0.0})},
    "clip_lora": {"without_dropout": Inside({"dropout": 0.0})},
    "prompt_tuning": {
        "unified": Inside(),
        "class_specific_from_words": Inside({"class_specific": True, **WORDS}),
    },
    "kgcoop": {"published": Inside()},
    "prograd": {"published": Inside(), "warm": Inside({"temperature": 4.0}, {"temperature": 4.0})},
    "biomedcoop": {"own_prompts": Inside({"prompts": "classes", "tau": 0.9}, {"tau": 0.9})},
    "cocoop": {"published": Inside()},
    "vpt": {"deep": Inside(), "shallow": Inside({"deep": False}, {"deep": False})},
    "adapter": {"published": Inside()},
    "maple": {"published": Inside()},
    "convlm": {
        "published": Inside(epochs=4),
        "dropped": Inside(
            {"keep": 0.6, "fuse": False, "theta": 0.5, "layers": [1], "weight_c": 0.5},
            {"keep": 0.6, "fuse": False, "theta": 0.5, "layers": (1,), "weight_c": 0.5},
            epochs=4,
        ),
    },
}


def inside_cases() -> Iterator[Any]:
    """Every method inside the towers, and its variants."""
    for name in IN_TOWERS:
        for label, case in INSIDE[name].items():
            yield pytest.param(name, case, id=f"{name}-{label}")


def own_parameters(task: Task, start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the start that the method brought with it."""
    return {name: value for name, value in start.items() if name not in task.weights}


@pytest.mark.parametrize(("name", "case"), list(inside_cases()))
def test_method_inside_the_towers_equals_its_formula(
    name: str, case: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss at every step, logits at the end, and how many numbers train."""
    start = remember_towers(name, monkeypatch)
    model, processor = tiny_backbone()
    task = task_of(model, processor)
    recipe = {"epochs": case.epochs, "steps": None, "batch_size": 64, "sampling": "shuffled"}
    adapted = adapt(
        model,
        name,
        support_rows(),
        processor=processor,
        classes=INFOS,
        config=AdaptConfig(method_config=case.settings, recipe=recipe, loss=case.loss),
    )
    with torch.no_grad():
        ours = adapted.model(pixel_values=task.images.float()).logits.double().numpy()
    start = own_parameters(task, start)
    if case.settings.get("class_specific"):
        start = {n: p.reshape(len(INFOS), -1, WIDTH) for n, p in start.items()}

    second = IN_TOWERS[name](task, start, case.epochs, **case.route)
    before = IN_TOWERS[name](task, start, 0, **case.route)
    assert adapted.trainable_parameters == sum(p.numel() for p in second.parameters)
    assert second.effect > 0, "no step met what the method is about"
    assert [row["loss"] for row in adapted.log] == pytest.approx(second.losses, abs=1e-5)
    moved = np.abs(second.logits - before.logits).max()
    difference = np.abs(ours - second.logits).max()
    assert difference < 1e-3 * moved, f"logits moved by {moved:.1e} and differ by {difference:.1e}"


def test_prolip_starts_from_the_towers_projection() -> None:
    model, processor = tiny_backbone()
    task = task_of(model, processor)
    with torch.no_grad():
        pooled = model.pool_images(task.images.float()).double().numpy()
        texts = towers_route.class_texts(task, task.weights).numpy()
    adapted = adapt(model, "prolip", support_rows(), processor=processor, classes=INFOS)
    with torch.no_grad():
        ours = adapted.model(pixel_values=task.images.float()).logits.double().numpy()
    second = features_route.prolip(
        pooled,
        task.labels.numpy(),
        texts,
        pooled,
        scale=30.0,
        projection=task.weights["visual_projection.weight"],
    )
    same_logits(ours, second, 1e-5)


# --- initial values ---------------------------------------------------------------------------


def check_lora(task: Task, start: dict[str, torch.Tensor]) -> None:
    for name, value in start.items():
        if ".lora_A." in name:
            uniform(value, 1 / math.sqrt(WIDTH))
        else:
            zero(value)


def check_context(task: Task, start: dict[str, torch.Tensor]) -> None:
    (context,) = start.values()
    assert context.shape == (16, WIDTH)
    normal(context, 0.02)


def check_words(task: Task, start: dict[str, torch.Tensor]) -> None:
    (context,) = start.values()
    torch.testing.assert_close(context.double(), towers_route.embedded(task.weights, task.words))


def check_words_behind_zeros(task: Task, start: dict[str, torch.Tensor]) -> None:
    (context,) = start.values()
    assert context.shape == (16, WIDTH)
    zero(context[:-4])
    check_words(task, {"context": context[-4:]})


def check_vpt(task: Task, start: dict[str, torch.Tensor]) -> None:
    (table,) = start.values()
    assert table.shape == (2, 8, WIDTH)  # new ones before every block
    normal(table, 0.02)


def check_adapter(task: Task, start: dict[str, torch.Tensor]) -> None:
    weights = [value.flatten() for value in start.values() if value.ndim == 2]
    assert {tuple(v.shape) for v in start.values()} == {
        (WIDTH // 12, WIDTH),
        (WIDTH // 12,),
        (WIDTH, WIDTH // 12),
        (WIDTH,),
    }
    normal(torch.cat(weights), 0.02)
    for value in start.values():
        if value.ndim == 1:
            zero(value)


def check_maple(task: Task, start: dict[str, torch.Tensor]) -> None:
    context, deeper, *couplings = start.values()
    two = dataclasses.replace(task, words=task.words[:2])
    check_words(two, {"context": context})
    assert deeper.shape == (1, 2, WIDTH)  # the second block's, of 9 that there would be
    normal(deeper, 0.02)
    assert [c.shape for c in couplings] == [(WIDTH, WIDTH), (WIDTH,)] * 2
    for value in couplings:
        assert value.abs().max().item() <= 1 / math.sqrt(WIDTH)


def check_cocoop(task: Task, start: dict[str, torch.Tensor]) -> None:
    context, down, down_bias, up, up_bias = start.values()
    check_words(task, {"context": context})
    dim = task.weights["visual_projection.weight"].shape[0]
    assert down.shape == (dim // 16, dim)
    assert up.shape == (WIDTH, dim // 16)
    assert max(down.abs().max().item(), down_bias.abs().max().item()) <= 1 / math.sqrt(dim)
    assert max(up.abs().max().item(), up_bias.abs().max().item()) <= 1 / math.sqrt(dim // 16)


def check_convlm(task: Task, start: dict[str, torch.Tensor]) -> None:
    dim = task.weights["text_projection.weight"].shape[0]
    linear = [(WIDTH, dim), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)] * 2
    linear += [(dim, WIDTH), (dim, dim)] * 2
    assert [tuple(value.shape) for value in start.values() if value.ndim == 2] == linear


STARTS: dict[str, Callable[[Task, dict[str, torch.Tensor]], None]] = {
    "lora": check_lora,
    "clip_lora": check_lora,
    "prompt_tuning": check_context,
    "kgcoop": check_words,
    "biomedcoop": check_words,
    "prograd": check_words_behind_zeros,
    "vpt": check_vpt,
    "adapter": check_adapter,
    "maple": check_maple,
    "cocoop": check_cocoop,
    "convlm": check_convlm,
}


@pytest.mark.parametrize("name", [n for n in IN_TOWERS if n not in ("vanilla", "full")])
def test_initial_values(name: str) -> None:
    check = case_of(STARTS, name, "IN_TOWERS", "test_parity.STARTS", "what it starts from")
    model, processor = tiny_backbone()
    task = task_of(model, processor)
    model.requires_grad_(False)
    torch.manual_seed(0)
    attached = METHODS[name].attach(model, processor, INFOS, METHODS[name].configure({}))
    check(task, own_parameters(task, trainable(attached)))


# --- constants --------------------------------------------------------------------------------

Line = tuple[Any, str]  # the value, and where it stands, or why it is our own
PROJECTION: Line = (1e-3, "own: of a pair of towers without a trained projection")
COSINE_WEIGHT_DECAY: Line = (5e-4, "CoOp: Dassl's default for SGD")

# Every setting of every method: a new one needs a line here.
SETTINGS: dict[str, dict[str, Line]] = {
    "zero_shot": {"prompt_sets": (0, "own: MI-Zero's prompt sampling is off unless asked for")},
    "prototype": {},
    "ss_text": {},
    "ss_text_plus": {},
    "gda": {
        "alpha": (0.1, "own: GDA-CLIP searches it; a middle of its grid without validation"),
        "support_prior": (False, "own: GDA-CLIP takes support shares, here nothing on prevalence"),
    },
    "tip_adapter": {
        "alpha": (1.17, "Tip-Adapter: init_alpha of ImageNet"),
        "beta": (1.0, "Tip-Adapter: init_beta of ImageNet"),
        "balance": (True, "own: published for balanced supports, where it changes nothing"),
    },
    "transclip": {
        "text": (0.5, "TransCLIP: lambda with labelled images (1 without)"),
        "gamma": (0.2, "own: the largest of TransCLIP's grid, which validation searches"),
        "neighbours": (3, "TransCLIP: k of the affinity graph"),
        "support_edges": (False, "own: TransCLIP has them, its release with rows in wrong order"),
    },
    "linear_probe": {
        "C": (100.0, "own: within CLIP's sweep 1e-6 to 1e6; few shots cannot choose it"),
        "max_iter": (1000, "CLIP: lbfgs, at most 1000 iterations"),
    },
    "lp_plus_plus": {
        "epochs": (300, "LP++: 300 epochs of full batches"),
        "alpha_start": (250.0, "LP++: alpha starts at 250 times the mean own cosine"),
        "alpha_every": (10, "LP++: a step of alpha every 10th epoch"),
        "momentum": (0.9, "LP++: SGD with momentum 0.9"),
    },
    "zs_lp": {"length": (10.0, "own: class texts of about CLIP's length, as CLAP's code has them")},
    "clap": {"length": (10.0, "own: class texts of about CLIP's length, as CLAP's code has them")},
    "taskres": {
        "length": (10.0, "TaskRes: residuals beside texts that are not normalised, about 10"),
        "alpha": (0.5, "TaskRes: 0.5, but 1.0 on Flowers"),
    },
    "clip_adapter": {
        "reduction": (4, "CLIP-Adapter: D to D / 4"),
        "ratio": (0.2, "CLIP-Adapter: r = 0.2"),
    },
    "tip_adapter_f": {
        "alpha": (1.17, "Tip-Adapter: init_alpha of ImageNet"),
        "beta": (1.0, "Tip-Adapter: init_beta of ImageNet"),
        "balance": (True, "own: published for balanced supports, where it changes nothing"),
    },
    "prolip": {"strength": (None, "ProLIP: lambda = 1 / shots where there is no validation")},
    "classifier": {
        "hidden": (512, "Glo-VLMs: Linear(512, 512)"),
        "dropout": (0.5, "Glo-VLMs: Dropout 0.5"),
    },
    "vanilla": {
        "vision_layers": (4, "Glo-VLMs, CLIP and PLIP: last 4 vision layers (CONCH: 2)"),
        "text_layers": (2, "Glo-VLMs: last 2 text layers"),
        "projection_lr": PROJECTION,
    },
    "full": {"projection_lr": PROJECTION},
    "lora": {
        "tuner": ("LORA", "Glo-VLMs: peft's LoRA"),
        "tuner_config": ({}, "own: nothing beside the published settings"),
        "r": (4, "Glo-VLMs: r 4"),
        "alpha": (16, "Glo-VLMs: alpha 16"),
        "dropout": (0.1, "Glo-VLMs: dropout 0.1"),
        "towers": ("both", "Glo-VLMs, CLIP and PLIP: both towers"),
        "last": (1, "Glo-VLMs, CLIP and PLIP: layer 11 of 12"),
        "layers": ([], "own: by `last`"),
        "projections": ("qv", "Glo-VLMs, CLIP and PLIP: q_proj and v_proj"),
        "mlp": (False, "Glo-VLMs, CLIP and PLIP: attention alone"),
        "projection_lr": PROJECTION,
    },
    "clip_lora": {
        "r": (2, "CLIP-LoRA: r 2"),
        "alpha": (1, "CLIP-LoRA: alpha 1, scaling alpha / sqrt(r)"),
        "dropout": (0.25, "CLIP-LoRA: 0.25 on the input"),
        "projection_lr": PROJECTION,
    },
    "prompt_tuning": {
        "context_tokens": (16, "CoOp: M = 16"),
        "init": ("", "CoOp: random unless M = 4"),
        "class_specific": (False, "CoOp: unified; class-specific is optional"),
        "init_std": (0.02, "CoOp: N(0, 0.02)"),
        "projection_lr": PROJECTION,
    },
    "kgcoop": {
        "context_tokens": (0, "KgCoOp: as many as its words, M = 4"),
        "init": ("a photo of a", "KgCoOp: from words"),
        "class_specific": (False, "CoOp: unified"),
        "init_std": (0.02, "CoOp: N(0, 0.02)"),
        "projection_lr": PROJECTION,
        "weight": (8.0, "KgCoOp: lambda 8 in its scripts (1 in its code)"),
    },
    "prograd": {
        "context_tokens": (16, "ProGrad: M = 16"),
        "init": ("a photo of a", "ProGrad: the last tokens start from words"),
        "class_specific": (False, "CoOp: unified"),
        "init_std": (0.0, "ProGrad: the tokens before them start at 0"),
        "projection_lr": PROJECTION,
        "temperature": (1.0, "ProGrad: T = 1 (0.25 to 4 by data set)"),
    },
    "biomedcoop": {
        "context_tokens": (0, "BiomedCoOp: as many as its words, M = 4"),
        "init": ("a photo of a", "BiomedCoOp: from words"),
        "class_specific": (False, "CoOp: unified"),
        "init_std": (0.02, "CoOp: N(0, 0.02)"),
        "projection_lr": PROJECTION,
        "consistency": (0.5, "BiomedCoOp: by data set; 0.5 on LC25000, its histology"),
        "distillation": (0.5, "BiomedCoOp: by data set; 0.5 on LC25000, its histology"),
        "tau": (1.5, "BiomedCoOp: 1.5 in few-shot runs (1.25 base to novel)"),
        "prompts": ("terminology", "own: in place of GPT-4's 50 prompts a class"),
    },
    "vpt": {
        "tokens": (8, "VPT in MaPLe's comparison: N_CTX 8"),
        "deep": (True, "VPT in MaPLe's comparison: depth 12 of 12"),
        "projection_lr": PROJECTION,
    },
    "adapter": {
        "reduction": (12, "Glo-VLMs: reduction factor 768 // 64 = 12"),
        "placement": ("mlp", "Glo-VLMs, CLIP and PLIP: inside the block, on the MLP's output"),
        "projection_lr": PROJECTION,
    },
    "maple": {
        "context_tokens": (2, "MaPLe: 2 tokens"),
        "depth": (9, "MaPLe: J = 9 (3 across data sets)"),
        "init": ("a photo of a", "MaPLe: its first two words"),
        "projection_lr": PROJECTION,
    },
    "cocoop": {
        "context_tokens": (4, "CoCoOp: M = 4"),
        "init": ("a photo of a", "CoCoOp: from words"),
        "reduction": (16, "CoCoOp: D to D / 16"),
        "projection_lr": PROJECTION,
    },
    "convlm": {
        "layers": ([], "ConVLM: 3, 6 and 9 of 12 blocks, as shares of the depth"),
        "theta": (0.9, "ConVLM: theta 0.9, hard-coded"),
        "keep": (0.9, "ConVLM: kappa 0.9"),
        "keep_schedule": ("constant", "ConVLM: its cosine is commented out"),
        "keep_start": (0.25, "EViT: the cosine begins at epoch 10, of ConVLM's 40"),
        "fuse": (True, "ConVLM: fuse_token True"),
        "renormalize": (False, "ConVLM: weights are not renormalised"),
        "context": ("classes", "ConVLM's code: by class label (its figure: captions)"),
        "target": ("final", "ConVLM's code: the final class token (its figure: the layer's)"),
        "weight_v": (1.0, "ConVLM: loss_global_alignment 1"),
        "weight_c": (1.0, "ConVLM: loss_sr 1"),
        "logits": ("raw", "ConVLM: no normalisation of the image side, no temperature"),
        "blocks": (0, "ConVLM's code: the whole tower (its figure: blocks on a frozen one)"),
        "projection_lr": (5e-3, "ConVLM: mlp_g at 5e-3"),
        "autoencoder_steps": (
            400,
            "own: ConVLM trains them from the start, for thousands of steps",
        ),
        "autoencoder_lr": (1e-3, "own: ConVLM's 1e-5 moves them within thousands of steps only"),
    },
}

SHOTS = (1, 2, 4, 8, 16, 32)
COOP_EPOCHS: Line = (
    {1: 50, 2: 100, 4: 100, 8: 200, 16: 200, 32: 200},
    "CoOp: 50 at one shot, 100 at 2 and 4, 200 at 8 and 16 (32: own)",
)
COOP: dict[str, Line] = {
    "lr": (2e-3, "CoOp: SGD 2e-3"),
    "epochs": COOP_EPOCHS,
    "batch_size": (32, "CoOp: batch 32"),
    "optimizer": ("sgd", "CoOp: SGD, momentum 0.9"),
    "weight_decay": COSINE_WEIGHT_DECAY,
    "schedule": ("cosine", "CoOp: cosine"),
    "warmup_epochs": (1, "CoOp: one epoch"),
    "warmup_lr": (1e-5, "CoOp: at a constant 1e-5"),
}
CLAP: dict[str, Line] = {
    **COOP,
    "lr": (0.1, "CLAP: SGD 0.1, momentum 0.9"),
    "epochs": (300, "CLAP: 300 epochs"),
    "batch_size": (256, "CLAP: batch 256"),
    "weight_decay": (0.0, "CLAP: weight decay 0"),
}
GLO_VLMS: dict[str, Line] = {
    "epochs": (20, "Glo-VLMs: up to 20 epochs"),
    "batch_size": (5, "Glo-VLMs: batch 5"),
    "optimizer": ("adamw", "Glo-VLMs: AdamW"),
    "weight_decay": (1e-2, "Glo-VLMs: 0.01, which is AdamW's default too"),
    "schedule": ("constant", "Glo-VLMs: none named"),
    "patience": (7, "Glo-VLMs: patience 7"),
    "min_delta": (1e-3, "Glo-VLMs: min_delta 0.001 of the validation AUC"),
    "sampling": ("shuffled", "Glo-VLMs, CLIP and PLIP: shuffled"),
}

# Every field of every recipe that is not `Recipe`'s own default, and of those what papers name.
RECIPES: dict[str, dict[str, Line]] = {
    "zs_lp": CLAP,
    "clap": CLAP,
    "taskres": {
        **COOP,
        "lr": (2e-3, "TaskRes: 2e-3 (2e-4 on ImageNet)"),
        "epochs": (
            {1: 100, 2: 100, 4: 100, 8: 200, 16: 200, 32: 200},
            "TaskRes: 100 up to 4 shots, 200 at 8 and 16 (32: own)",
        ),
        "batch_size": (256, "TaskRes: batch 256"),
        "optimizer": ("adam", "TaskRes: Adam"),
        "weight_decay": (5e-4, "TaskRes under Dassl: 5e-4, part of Adam's gradient"),
    },
    "clip_adapter": COOP,  # "CLIP-Adapter: CoOp's optimiser and schedule"
    "tip_adapter_f": {
        "lr": (1e-3, "Tip-Adapter-F: AdamW 1e-3"),
        "epochs": (20, "Tip-Adapter-F: 20 epochs (100 on EuroSAT)"),
        "batch_size": (256, "Tip-Adapter-F: batch 256"),
        "optimizer": ("adamw", "Tip-Adapter-F: AdamW"),
        "weight_decay": (1e-2, "Tip-Adapter-F: AdamW's default"),
        "eps": (1e-4, "Tip-Adapter-F: eps 1e-4"),
        "schedule": ("cosine", "Tip-Adapter-F: cosine"),
        "by_step": (True, "Tip-Adapter-F: over epochs times batches"),
    },
    "prolip": {
        "lr": (1e-5, "ProLIP: 1e-5 where there is no validation"),
        "epochs": (300, "ProLIP: 300 views, one an epoch"),
        "batch_size": (2**31 - 1, "ProLIP: full batches"),
        "optimizer": ("adamw", "ProLIP: Adam, which without weight decay is AdamW"),
        "weight_decay": (0.0, "ProLIP: its own penalty holds the weights"),
        "eps": (1e-4, "ProLIP: as Tip-Adapter-F, on whose code it stands"),
        "schedule": ("cosine", "ProLIP: cosine"),
        "by_step": (True, "ProLIP: a step an epoch"),
    },
    "classifier": {
        **GLO_VLMS,
        "lr": (1e-3, "Glo-VLMs: 1e-3"),
        "batch_size": (16, "Glo-VLMs: batch 16"),
        "weight_decay": (1e-4, "Glo-VLMs: 1e-4"),
    },
    "vanilla": {
        **GLO_VLMS,
        "lr": (1e-4, "Glo-VLMs, CLIP and PLIP: 1e-4 (CONCH: 2e-5)"),
        "schedule": ("cosine", "Glo-VLMs, CLIP and PLIP: cosine (CONCH: constant)"),
        "final_lr": (0.01, "Glo-VLMs: to 1% of the rate"),
    },
    "full": {**GLO_VLMS, "lr": (1e-5, "own: vanilla's recipe at a tenth of its rate")},
    "lora": {**GLO_VLMS, "lr": (2e-5, "Glo-VLMs: 2e-5")},
    "clip_lora": {
        "lr": (2e-4, "CLIP-LoRA: AdamW 2e-4"),
        "epochs": (0, "own: not used where steps are counted"),
        "steps": ({shots: 500 * shots for shots in SHOTS}, "CLIP-LoRA: 500 iterations a shot"),
        "batch_size": (32, "CLIP-LoRA: batch 32"),
        "optimizer": ("adamw", "CLIP-LoRA: AdamW, betas 0.9 and 0.999"),
        "weight_decay": (1e-2, "CLIP-LoRA: 1e-2 (1e2 in its first release cost 25 points)"),
        "schedule": ("cosine", "CLIP-LoRA: cosine"),
        "by_step": (True, "CLIP-LoRA: over iterations"),
        "final_lr": (5e-3, "CLIP-LoRA: to 1e-6, of 2e-4"),
    },
    "prompt_tuning": COOP,
    "kgcoop": {
        **COOP,
        "epochs": (100, "KgCoOp: 100 epochs"),
        "batch_size": (128, "KgCoOp: batch 128"),
    },
    "prograd": COOP,  # "ProGrad: 2e-3 in the port to medical images; all else as CoOp"
    "biomedcoop": {
        **COOP,
        "lr": (2.5e-3, "BiomedCoOp: SGD 2.5e-3"),
        "epochs": (100, "BiomedCoOp: 100 epochs in few-shot runs"),
        "batch_size": (4, "BiomedCoOp: batch 4"),
    },
    "vpt": {
        **COOP,
        "lr": (2.5e-3, "VPT in MaPLe's comparison: 2.5e-3"),
        "epochs": (5, "VPT in MaPLe's comparison: 5 epochs"),
        "batch_size": (4, "VPT in MaPLe's comparison: batch 4"),
    },
    "adapter": {**GLO_VLMS, "lr": (1e-3, "Glo-VLMs, CLIP and PLIP: 1e-3 (CONCH: 1e-4)")},
    "maple": {
        **COOP,
        "lr": (3.5e-3, "MaPLe: SGD 3.5e-3"),
        "epochs": (5, "MaPLe: 5 epochs"),
        "batch_size": (4, "MaPLe: batch 4"),
    },
    "cocoop": {
        **COOP,
        "epochs": (10, "CoCoOp: 10 epochs"),
        "batch_size": (1, "CoCoOp: batch 1"),
    },
    "convlm": {
        "lr": (1e-5, "ConVLM: ViT at 1e-5"),
        "epochs": (40, "ConVLM: 40 epochs"),
        "batch_size": (256, "ConVLM: batch 256"),
        "optimizer": ("adam", "ConVLM: Adam"),
        "weight_decay": (1e-4, "ConVLM: ViT 1e-4"),
        "schedule": ("steps", "ConVLM: halved at epochs 10, 20 and 30"),
        "sampling": ("class_balanced", "ConVLM: WeightedRandomSampler over 1 / class count"),
        "patience": (1000, "own: no early stop; ConVLM chose its epoch on the test set"),
    },
}

# What validation searches.
GRIDS: dict[str, dict[str, Line]] = {
    "gda": {
        "alpha": (
            tuple(10.0**power for power in range(-4, 3)),
            "GDA-CLIP: 1e-4 to 100 by factors of ten",
        )
    },
    "tip_adapter": {
        "beta": (tuple(0.1 + i * (7 - 0.1) / 200 for i in range(200)), "Tip-Adapter: ImageNet"),
        "alpha": (tuple(0.1 + j * (3 - 0.1) / 20 for j in range(20)), "Tip-Adapter: ImageNet"),
    },
    "transclip": {"gamma": ((0.002, 0.01, 0.02, 0.2), "TransCLIP: chosen on validation")},
    "linear_probe": {
        "C": (
            tuple(10.0**power for power in range(-2, 5)),
            "own: CLIP's sweep has 1e-6 to 1e6 and 8 steps of a binary search",
        )
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_the_published_one_or_named_as_our_own(name: str) -> None:
    lines = case_of(SETTINGS, name, "METHODS", "test_parity.SETTINGS", "a line for each setting")
    ours = METHODS[name].describe()["settings"]
    assert set(ours) == set(lines), "settings and lines of test_parity.SETTINGS differ"
    for setting, (value, where) in lines.items():
        assert ours[setting] == value, f"{name}.{setting}: {where}"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if hasattr(m, "recipe")])
def test_every_recipe_is_the_published_one_or_named_as_our_own(name: str) -> None:
    lines = case_of(RECIPES, name, "METHODS", "test_parity.RECIPES", "a line for each field")
    method = METHODS[name]
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Recipe)
        if field.default is not dataclasses.MISSING
    }
    for shots in SHOTS:
        recipe = dataclasses.asdict(method.recipe(shots, method.configure({})))
        for field, ours in recipe.items():
            if field in lines:
                value, where = lines[field]
                value = value[shots] if isinstance(value, dict) else value
                assert ours == pytest.approx(value), f"{name}.{field} at {shots} shots: {where}"
            else:
                assert ours == defaults[field], f"{name}.{field} = {ours} has no line in RECIPES"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if getattr(m, "grid", {})])
def test_every_grid_is_the_published_one_or_named_as_our_own(name: str) -> None:
    lines = case_of(GRIDS, name, "METHODS", "test_parity.GRIDS", "a line for each searched value")
    grid = METHODS[name].grid
    assert set(grid) == set(lines)
    for setting, (values, where) in lines.items():
        assert grid[setting] == pytest.approx(values), f"{name}.{setting}: {where}"


def test_every_line_has_its_source() -> None:
    """A line is a paper's, "Name: words", or "own: words"; no line outlives its method."""
    for table in (SETTINGS, RECIPES, GRIDS):
        assert set(table) <= set(METHODS)
        for lines in table.values():
            for _, where in lines.values():
                source, _, words = where.partition(": ")
                assert source, where
                assert words, where
