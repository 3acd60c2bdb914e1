"""Second route to the methods inside the towers: CLIP and what each puts into it, in float64.

As `second_route.py`: written from papers and their released recipes alone, an image, a text, an
attention head at a time; the gradient is that of the formula as it stands here. Every training
runs full batches, so that no order matters, and without dropout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from second_route import (
    Array,
    adam,
    direction,
    leaf,
    mean_cross_entropy,
    sgd,
    warm_cosine,
)

Weights = dict[str, torch.Tensor]
Optimise = Callable[[Callable[[], torch.Tensor]], None]


@dataclass(frozen=True)
class Task:
    """What a method inside the towers starts from.

    Args:
        weights: A CLIPModel's state dict in float64.
        heads: Attention heads of both towers.
        images: Pixels `[n, 3, height, width]`.
        labels: `[n]`.
        prompts: Per class, the token numbers of its prompts, from start to end token.
        names: Per class, the token numbers of " name.", alone.
        words: The token numbers of "a photo of a", alone.
    """

    weights: Weights
    heads: int
    images: torch.Tensor
    labels: torch.Tensor
    prompts: list[list[list[int]]]
    names: list[list[int]]
    words: list[int]

    @property
    def start(self) -> int:
        """Token that starts a text."""
        return self.prompts[0][0][0]

    @property
    def end(self) -> int:
        """Token that ends it."""
        return self.prompts[0][0][-1]


@dataclass(frozen=True)
class Trained:
    """Loss at every step, logits at the end, what trained, and how often a rule had an effect."""

    losses: list[float]
    logits: Array
    parameters: list[torch.Tensor]
    effect: int = 1


def norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """Layer norm."""
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.pow(2).mean(-1, keepdim=True)
    return centred / (spread + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """Linear map with bias."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention over tokens `[length, width]`; also the weights of every head."""
    size = q.shape[-1] // heads
    outs, maps = [], []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        maps.append(torch.softmax(scores, -1))
        outs.append(maps[-1] @ v[:, part])
    return torch.cat(outs, -1), torch.stack(maps)


def mlp(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """A CLIP block's MLP, with its quick GELU."""
    hidden = linear(x, w, f"{name}.mlp.fc1")
    return linear(hidden * torch.sigmoid(1.702 * hidden), w, f"{name}.mlp.fc2")


def block(x: torch.Tensor, w: Weights, name: str, heads: int, causal: bool) -> torch.Tensor:
    """A CLIP block."""
    inner = norm(x, w, f"{name}.layer_norm1")
    q, k, v = (linear(inner, w, f"{name}.self_attn.{p}_proj") for p in "qkv")
    x = x + linear(attend(q, k, v, heads, causal)[0], w, f"{name}.self_attn.out_proj")
    return x + mlp(norm(x, w, f"{name}.layer_norm2"), w, name)


def depth(w: Weights, tower: str) -> int:
    """Blocks of a tower."""
    return sum(1 for name in w if name.startswith(tower) and name.endswith("layer_norm1.bias"))


def embedded(w: Weights, ids: list[int]) -> torch.Tensor:
    """Token embeddings."""
    return w["text_model.embeddings.token_embedding.weight"][ids]


def text(
    w: Weights,
    heads: int,
    tokens: torch.Tensor,
    deeper: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Unit feature of one text `[length, width]` that ends with its end token.

    `deeper`: tokens that replace those behind the start token before blocks 1, 2, ...
    """
    x = tokens + w["text_model.embeddings.position_embedding.weight"][: len(tokens)]
    for i in range(depth(w, "text_model")):
        if 0 < i <= len(deeper):
            x = torch.cat([x[:1], deeper[i - 1], x[1 + len(deeper[i - 1]) :]])
        x = block(x, w, f"text_model.encoder.layers.{i}", heads, causal=True)
    return direction(norm(x[-1], w, "text_model.final_layer_norm") @ w["text_projection.weight"].T)


def patches(w: Weights, image: torch.Tensor) -> torch.Tensor:
    """Class token and patches of an image, with their positions."""
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    side = kernel.shape[-1]
    rows = [w["vision_model.embeddings.class_embedding"]]
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            window = image[:, top : top + side, left : left + side]
            rows.append((kernel * window).sum((1, 2, 3)))
    return torch.stack(rows) + w["vision_model.embeddings.position_embedding.weight"]


def image_feature(
    w: Weights,
    heads: int,
    image: torch.Tensor,
    *,
    first: torch.Tensor | None = None,
    deeper: Sequence[torch.Tensor] = (),
    bottlenecks: Sequence[Sequence[torch.Tensor]] = (),
) -> torch.Tensor:
    """Projected feature of one image.

    Tokens join at the end: `first` before the first norm, `deeper` in their place before blocks
    1, 2, ... A bottleneck stands on a block's MLP, inside the residual:
    x + mlp + up(relu(down(mlp))).
    """
    x = patches(w, image)
    if first is not None:
        x = torch.cat([x, first])
    x = norm(x, w, "vision_model.pre_layrnorm")
    for i in range(depth(w, "vision_model")):
        name = f"vision_model.encoder.layers.{i}"
        if 0 < i <= len(deeper):
            x = torch.cat([x[: -len(deeper[i - 1])], deeper[i - 1]])
        if not bottlenecks:
            x = block(x, w, name, heads, causal=False)
            continue
        inner = norm(x, w, f"{name}.layer_norm1")
        q, k, v = (linear(inner, w, f"{name}.self_attn.{p}_proj") for p in "qkv")
        x = x + linear(attend(q, k, v, heads, False)[0], w, f"{name}.self_attn.out_proj")
        out = mlp(norm(x, w, f"{name}.layer_norm2"), w, name)
        down, down_bias, up, up_bias = bottlenecks[i]
        x = x + out + torch.relu(out @ down.T + down_bias) @ up.T + up_bias
    return norm(x[0], w, "vision_model.post_layernorm") @ w["visual_projection.weight"].T


def images(task: Task, w: Weights, **changes: Any) -> torch.Tensor:
    """Unit features of all images."""
    return torch.stack([direction(image_feature(w, task.heads, x, **changes)) for x in task.images])


def prompt_features(task: Task, w: Weights) -> list[torch.Tensor]:
    """Per class, the unit features of its prompts."""
    return [
        torch.stack([text(w, task.heads, embedded(w, ids)) for ids in of_class])
        for of_class in task.prompts
    ]


def class_texts(task: Task, w: Weights) -> torch.Tensor:
    """Zero-shot weights: prompts averaged and normalised again."""
    return torch.stack([direction(each.mean(0)) for each in prompt_features(task, w)])


def scale_of(w: Weights) -> torch.Tensor:
    """Factor between cosines and logits."""
    return w["logit_scale"].exp()


def trained(
    parameters: list[torch.Tensor],
    logits: Callable[[], torch.Tensor],
    loss: Callable[[], torch.Tensor],
    optimise: Optimise,
) -> Trained:
    """Run an optimiser and keep the loss of every step."""
    losses: list[float] = []

    def recorded() -> torch.Tensor:
        value = loss()
        losses.append(float(value.detach()))
        return value

    optimise(recorded)
    with torch.no_grad():
        return Trained(losses, logits().numpy(), parameters)


def coop_sgd(parameters: list[torch.Tensor], lr: float, epochs: int) -> Optimise:
    """The optimiser of CoOp and all that build on it: SGD, momentum .9, weight decay 5e-4."""
    rates = [warm_cosine(epoch, epochs, lr) for epoch in range(epochs)]
    return lambda loss: sgd(parameters, loss, rates, weight_decay=5e-4)


def cosine_to(lr: float, last: float, epochs: int) -> list[float]:
    """Cosine from lr to last."""
    return [
        last + (lr - last) / 2 * (1 + math.cos(math.pi * step / epochs)) for step in range(epochs)
    ]


def info_nce(logits: torch.Tensor, labels: torch.Tensor, masked: bool) -> torch.Tensor:
    """Symmetric InfoNCE with the diagonal as targets.

    As published, two images of one class are each other's negatives though their text is the
    same; masked, such pairs are left out.
    """
    if masked:
        keep = logits.clone()
        for i in range(len(labels)):
            for j in range(len(labels)):
                if i != j and labels[i] == labels[j]:
                    keep[i, j] = -torch.inf
        logits = keep
    targets = torch.arange(len(labels))
    return (mean_cross_entropy(logits, targets) + mean_cross_entropy(logits.T, targets)) / 2


def fine_tuned(
    task: Task, names: list[str], rates: list[float], loss_name: str = "prototypes"
) -> Trained:
    """AdamW with weight decay 1e-2 on some of the towers' own weights."""
    w = dict(task.weights)
    parameters = []
    for name in names:
        w[name] = leaf(w[name])
        parameters.append(w[name])

    def logits() -> torch.Tensor:
        return scale_of(w) * images(task, w) @ class_texts(task, w).T

    def loss() -> torch.Tensor:
        if loss_name == "prototypes":
            return mean_cross_entropy(logits(), task.labels)
        return info_nce(logits()[:, task.labels], task.labels, masked=loss_name == "infonce")

    def optimise(loss: Callable[[], torch.Tensor]) -> None:
        adam(parameters, loss, rates, weight_decay=1e-2, decoupled=True)

    return trained(parameters, logits, loss, optimise)


def vanilla(
    task: Task,
    start: Weights,
    epochs: int,
    *,
    vision_layers: int = 4,
    text_layers: int = 2,
    loss: str = "prototypes",
) -> Trained:
    """Glo-VLMs' partial fine-tuning: last blocks of both towers and the logit scale.

    AdamW at 1e-4 along a cosine to 1% of it. Projections and last norms stay.
    """
    names = []
    for tower, count in (("vision_model", vision_layers), ("text_model", text_layers)):
        last = depth(task.weights, tower)
        for i in range(max(0, last - count), last):
            prefix = f"{tower}.encoder.layers.{i}."
            names += [name for name in task.weights if name.startswith(prefix)]
    return fine_tuned(task, [*names, "logit_scale"], cosine_to(1e-4, 1e-6, epochs), loss)


def full(task: Task, start: Weights, epochs: int) -> Trained:
    """Everything trains, at a tenth of vanilla's rate; the recipe is the package's own."""
    return fine_tuned(task, list(task.weights), [1e-5] * epochs)


def low_rank(task: Task, start: Weights, factor: float, rates: list[float]) -> Trained:
    """W + factor B A on each map that `start` holds a pair for, without dropout."""
    pairs = {name: leaf(value) for name, value in start.items()}

    def weights() -> Weights:
        w = dict(task.weights)
        for name, a in pairs.items():
            if ".lora_A." in name:
                target = name.split(".lora_A.")[0] + ".weight"
                b = pairs[name.replace(".lora_A.", ".lora_B.")]
                w[target] = w[target] + factor * b @ a
        return w

    def logits() -> torch.Tensor:
        w = weights()
        return scale_of(w) * images(task, w) @ class_texts(task, w).T

    def optimise(loss: Callable[[], torch.Tensor]) -> None:
        adam(parameters, loss, rates, weight_decay=1e-2, decoupled=True)

    parameters = list(pairs.values())
    return trained(parameters, logits, lambda: mean_cross_entropy(logits(), task.labels), optimise)


def lora(task: Task, start: Weights, epochs: int) -> Trained:
    """Glo-VLMs' LoRA: alpha / r = 16 / 4, AdamW at a constant 2e-5."""
    return low_rank(task, start, 16 / 4, [2e-5] * epochs)


def clip_lora(task: Task, start: Weights, epochs: int) -> Trained:
    """CLIP-LoRA: alpha / sqrt(r) = 1 / sqrt(2), AdamW at 2e-4 along a cosine to 1e-6."""
    return low_rank(task, start, 1 / math.sqrt(2), cosine_to(2e-4, 1e-6, epochs))


def with_context(
    task: Task, w: Weights, context: torch.Tensor, k: int, middle: Sequence[int] = ()
) -> torch.Tensor:
    """Embeddings of [start] [context] middle class k. [end]."""
    return torch.cat(
        [
            embedded(w, [task.start]),
            context,
            embedded(w, [*middle, *task.names[k], task.end]),
        ]
    )


def learned_texts(task: Task, context: torch.Tensor) -> torch.Tensor:
    """Class texts with a learned context `[M, width]`, or one a class, `[K, M, width]`."""
    w, classes = task.weights, len(task.names)
    own = context if context.ndim == 3 else context.expand(classes, *context.shape)
    return torch.stack(
        [text(w, task.heads, with_context(task, w, own[k], k)) for k in range(classes)]
    )


def context_method(
    task: Task,
    start: Weights,
    epochs: int,
    lr: float,
    further: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Trained:
    """CoOp, with a further loss of class texts and logits."""
    w, context = task.weights, leaf(*start.values())
    features = images(task, w)

    def logits() -> torch.Tensor:
        return scale_of(w) * features @ learned_texts(task, context).T

    def loss() -> torch.Tensor:
        value = mean_cross_entropy(logits(), task.labels)
        if further is not None:
            value = value + further(learned_texts(task, context), logits())
        return value

    return trained([context], logits, loss, coop_sgd([context], lr, epochs))


def prompt_tuning(task: Task, start: Weights, epochs: int) -> Trained:
    """CoOp: [start] [v1 ... vM] [class]. with v trained by the cross-entropy at 2e-3."""
    return context_method(task, start, epochs, 2e-3)


def kgcoop(task: Task, start: Weights, epochs: int, *, weight: float = 8.0) -> Trained:
    """KgCoOp: CoOp + lambda (1 - mean_k cos(t_k(v), t_k^hand)), lambda = 8."""
    by_hand = class_texts(task, task.weights)

    def further(texts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        near = sum(t_k @ h_k for t_k, h_k in zip(texts, by_hand, strict=True))
        return weight * (1 - near / len(by_hand))

    return context_method(task, start, epochs, 2e-3, further)


def prograd(task: Task, start: Weights, epochs: int, *, temperature: float = 1.0) -> Trained:
    """ProGrad: where the cross-entropy's gradient opposes that of KL(zero-shot || learned), it
    loses its part along it."""
    w, context = task.weights, leaf(*start.values())
    features = images(task, w)
    teacher = torch.softmax(scale_of(w) * features @ class_texts(task, w).T / temperature, 1)

    def logits() -> torch.Tensor:
        return scale_of(w) * features @ learned_texts(task, context).T

    losses, speed, opposed = [], torch.zeros_like(context), 0
    for epoch in range(epochs):
        out = logits()
        entropy = mean_cross_entropy(out, task.labels)
        student = torch.log_softmax(out / temperature, 1)
        divergence = (teacher * (teacher.log() - student)).sum() / len(out)
        (g,) = torch.autograd.grad(entropy, context, retain_graph=True)
        (r,) = torch.autograd.grad(divergence, context)
        along = float((g * r).sum())
        if along < 0:
            opposed += 1
            g = g - along / float((r * r).sum()) * r
        losses.append(float(entropy.detach()))
        with torch.no_grad():
            speed.mul_(0.9).add_(g + 5e-4 * context)
            context.sub_(warm_cosine(epoch, epochs, 2e-3) * speed)
    with torch.no_grad():
        return Trained(losses, logits().numpy(), [context], opposed)


def biomedcoop(
    task: Task,
    start: Weights,
    epochs: int,
    *,
    consistency: float = 0.5,
    distillation: float = 0.5,
    tau: float = 1.5,
) -> Trained:
    """BiomedCoOp: CoOp + l1 MSE(t(v), mean prompts) + l2 KL(kept prompts || learned) / (n K).

    Prompt i of every class is one set, whose score is the batch mean of its largest logit; a set
    is kept if the standardised score is within tau. The divergence is `kl_div(log learned, log
    zero-shot)` of the released code, in which the zero-shot probabilities weigh.
    """
    w = task.weights
    every = prompt_features(task, w)
    mean_prompts = torch.stack([direction(of_class.mean(0)) for of_class in every])
    features = images(task, w)
    sets = []
    for i in range(max(len(of_class) for of_class in every)):
        sets.append(torch.stack([of_class[i % len(of_class)] for of_class in every]))
    scores = torch.stack([(scale_of(w) * features @ each.T).max(1).values.mean() for each in sets])
    median = scores.sort().values[(len(scores) - 1) // 2]
    z = (scores - median) / (scores - median).abs().median()
    z = (z - z.mean()) / z.std()
    kept = [each for each, score in zip(sets, z, strict=True) if abs(float(score)) <= tau]
    teacher = direction(torch.stack(kept).mean(0))
    log_teacher = torch.log_softmax(scale_of(w) * features @ teacher.T, 1)

    def further(texts: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_student = torch.log_softmax(logits, 1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum() / logits.numel()
        distance = (texts - mean_prompts).pow(2).mean()
        return consistency * distance + distillation * divergence

    return replace(
        context_method(task, start, epochs, 2.5e-3, further), effect=len(sets) - len(kept)
    )


def cocoop(task: Task, start: Weights, epochs: int) -> Trained:
    """CoCoOp: v_m + h(f), h = Linear - ReLU - Linear of the unit image feature, at 2e-3."""
    w = task.weights
    context, down, down_bias, up, up_bias = parameters = [leaf(p) for p in start.values()]
    features = images(task, w)

    def logits() -> torch.Tensor:
        rows = []
        for f in features:
            shift = torch.relu(f @ down.T + down_bias) @ up.T + up_bias
            rows.append(scale_of(w) * learned_texts(task, context + shift) @ f)
        return torch.stack(rows)

    return trained(
        parameters,
        logits,
        lambda: mean_cross_entropy(logits(), task.labels),
        coop_sgd(parameters, 2e-3, epochs),
    )


def vpt(task: Task, start: Weights, epochs: int, *, deep: bool = True) -> Trained:
    """VPT as MaPLe compares with it: tokens beside the patches, new ones before every block.

    The first stand before the first norm. SGD at 2.5e-3.
    """
    w, table = task.weights, leaf(*start.values())
    texts = class_texts(task, w)

    def logits() -> torch.Tensor:
        deeper = list(table[1:]) if deep else []
        return scale_of(w) * images(task, w, first=table[0], deeper=deeper) @ texts.T

    return trained(
        [table],
        logits,
        lambda: mean_cross_entropy(logits(), task.labels),
        coop_sgd([table], 2.5e-3, epochs),
    )


def adapter(task: Task, start: Weights, epochs: int) -> Trained:
    """Glo-VLMs' adapter: x + mlp + up(relu(down(mlp))) in every vision block, AdamW at 1e-3."""
    w, parameters = task.weights, [leaf(p) for p in start.values()]
    bottlenecks = [parameters[i : i + 4] for i in range(0, len(parameters), 4)]
    texts = class_texts(task, w)

    def logits() -> torch.Tensor:
        return scale_of(w) * images(task, w, bottlenecks=bottlenecks) @ texts.T

    def optimise(loss: Callable[[], torch.Tensor]) -> None:
        adam(parameters, loss, [1e-3] * epochs, weight_decay=1e-2, decoupled=True)

    return trained(parameters, logits, lambda: mean_cross_entropy(logits(), task.labels), optimise)


def maple(task: Task, start: Weights, epochs: int) -> Trained:
    """MaPLe: [start] [v1 v2] of a [class]., and vision tokens that are linear in the text's.

    The first vision tokens stand before the first norm; before each further block new tokens, of
    text and vision, take the place of the last block's. SGD at 3.5e-3.
    """
    w = task.weights
    context, deeper, *couplings = parameters = [leaf(p) for p in start.values()]
    rest = task.words[len(context) :]

    def logits() -> torch.Tensor:
        vision = []
        for i, tokens in enumerate([context, *deeper]):
            vision.append(tokens @ couplings[2 * i].T + couplings[2 * i + 1])
        texts = torch.stack(
            [
                text(w, task.heads, with_context(task, w, context, k, rest), list(deeper))
                for k in range(len(task.names))
            ]
        )
        return scale_of(w) * images(task, w, first=vision[0], deeper=vision[1:]) @ texts.T

    return trained(
        parameters,
        logits,
        lambda: mean_cross_entropy(logits(), task.labels),
        coop_sgd(parameters, 3.5e-3, epochs),
    )


def convlm(
    task: Task,
    start: Weights,
    epochs: int,
    *,
    layers: Sequence[int] = (0, 1),
    theta: float = 0.9,
    keep: float = 0.9,
    fuse: bool = True,
    weight_v: float = 1.0,
    weight_c: float = 1.0,
) -> Trained:
    """ConVLM: text-guided class queries in training, dropped patches fused, raw dot products.

    At a guided layer q_cls <- theta q_cls + (1 - theta) AE_c(t_y), in training alone; the
    ceil(keep N) patches that the class token attends to most (mean over heads) go on, the others
    as one token, the sum of s_i x_i, behind attention and residual and before the MLP. Loss: CE +
    weight_v sum_l mean|AE_c(t_y) - x_cls| + weight_c sum_l mean|AE_v(q_cls) - t_y|, x_cls behind
    the last norm. Adam at 1e-5 with L2 of 1e-4, the projection at 5e-3 with 1e-5, halved at each
    quarter.
    """
    w = dict(task.weights)
    texts = class_texts(task, w)
    encoders = {name: leaf(value) for name, value in start.items()}
    to_vision = [
        [p for n, p in encoders.items() if f"to_vision.{i}." in n] for i in range(len(layers))
    ]
    to_text = [[p for n, p in encoders.items() if f"to_text.{i}." in n] for i in range(len(layers))]
    towers = [name for name in w if name.startswith("vision_model")]
    for name in [*towers, "visual_projection.weight"]:
        w[name] = leaf(w[name])
    parameters = [*encoders.values(), *(w[name] for name in towers)]
    projection = w["visual_projection.weight"]

    def made_of_text(i: int, t: torch.Tensor) -> torch.Tensor:
        w0, b0, w1, b1, w2, b2 = to_vision[i]
        hidden = torch.relu(torch.relu(t @ w0.T + b0) @ w1.T + b1)
        return torch.sigmoid(hidden @ w2.T + b2)

    def made_of_query(i: int, q: torch.Tensor) -> torch.Tensor:
        w0, b0, w1, b1 = to_text[i]
        return torch.relu(torch.relu(q @ w0.T + b0) @ w1.T + b1)

    def encode(image: torch.Tensor, t: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Class token behind the last norm, and the two further losses."""
        x = norm(patches(w, image), w, "vision_model.pre_layrnorm")
        made, reading = [], x.new_zeros(())
        for i in range(depth(w, "vision_model")):
            name = f"vision_model.encoder.layers.{i}"
            inner = norm(x, w, f"{name}.layer_norm1")
            q, k, v = (linear(inner, w, f"{name}.self_attn.{p}_proj") for p in "qkv")
            if i in layers and t is not None:
                number = list(layers).index(i)
                made.append(made_of_text(number, t))
                cls = theta * q[0] + (1 - theta) * made[-1]
                reading = reading + (made_of_query(number, cls) - t).abs().mean()
                q = torch.cat([cls[None], q[1:]])
            out, maps = attend(q, k, v, task.heads, causal=False)
            x = x + linear(out, w, f"{name}.self_attn.out_proj")
            if i in layers and keep < 1:
                scores = maps[:, 0, 1:].mean(0)
                order = scores.argsort(descending=True)
                count = math.ceil(keep * len(scores))
                kept = [x[0], *(x[1 + j] for j in order[:count])]
                if fuse and count < len(scores):
                    kept.append(sum(scores[j] * x[1 + j] for j in order[count:]))
                x = torch.stack(kept)
            x = x + mlp(norm(x, w, f"{name}.layer_norm2"), w, name)
        cls = norm(x[0], w, "vision_model.post_layernorm")
        making = sum(((each - cls).abs().mean() for each in made), x.new_zeros(()))
        return cls, weight_v * making + weight_c * reading

    def logits() -> torch.Tensor:
        return torch.stack([encode(x, None)[0] @ projection.T @ texts.T for x in task.images])

    def loss() -> torch.Tensor:
        rows, further = [], torch.zeros((), dtype=torch.float64)
        for x, label in zip(task.images, task.labels, strict=True):
            cls, value = encode(x, texts[label])
            rows.append(cls @ projection.T @ texts.T)
            further = further + value / len(task.labels)
        return mean_cross_entropy(torch.stack(rows), task.labels) + further

    halves = [0.5 ** (4 * epoch // epochs) for epoch in range(epochs)]

    def optimise(loss: Callable[[], torch.Tensor]) -> None:
        adam(
            [*parameters, projection],
            loss,
            [1e-5 * half for half in halves],
            [1e-4] * len(parameters) + [1e-5],
            factors=[1.0] * len(parameters) + [500.0],
        )

    return trained([*parameters, projection], logits, loss, optimise)


IN_TOWERS: dict[str, Callable[..., Trained]] = {
    "vanilla": vanilla,
    "full": full,
    "lora": lora,
    "clip_lora": clip_lora,
    "prompt_tuning": prompt_tuning,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "biomedcoop": biomedcoop,
    "cocoop": cocoop,
    "vpt": vpt,
    "adapter": adapter,
    "maple": maple,
    "convlm": convlm,
}
