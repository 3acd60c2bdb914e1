"""Prompt learning (CoOp and its successors): learned context tokens before the class name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.catalog import ClassInfo
from ..data.terminology import described_prompts, terms_of
from ..data.visibility import visible_prompts
from ..errors import GloVLMError
from ..settings import Settings, setting
from .contract import Recipe, StepState, TowerMethod, coop_epochs, coop_recipe, register
from .fine_tuning import save_and_merge, wrap_with_peft

# --------------------------------------------------------------------------- what the methods share


@dataclass(frozen=True)
class ContextConfig(Settings):
    """Settings of a learned context; by default CoOp's 16 random tokens, shared by all classes."""

    context_tokens: int = setting(
        16, help="Number of learned tokens M; 0 takes as many as `init` has.", least=0, most=10_000
    )
    init: str = setting(
        "", help="Words from whose token embeddings the last of these start (a photo of a)."
    )
    class_specific: bool = setting(False, help="Whether every class has its own context.")
    init_std: float = setting(
        0.02,
        help="Standard deviation of the normal draw that the other tokens start from.",
        least=0,
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


class ContextMethod(TowerMethod):
    """Learned context: `[start][v1 ... vM][class name].[end]`, of which only v1 ... vM train.

    Saved as PEFT trainable tokens, on rows of the vocabulary that no prompt uses.
    """

    family = "text side"
    trains = "M context token embeddings"
    saves_adapter = True
    trains_text = True
    config: ContextConfig

    def prompts(self, classes: Sequence[ClassInfo], config: Any) -> list[list[str]]:
        return [[f"{c.display_name}."] for c in classes]

    def build(self) -> None:
        config, processor, backbone = self.config, self.processor, self.model.backbone
        self.embedding_name, self.embedding = find_embedding(backbone)
        words = processor.tokenizer(config.init, add_special_tokens=False)["input_ids"]
        length = context_length(config, len(words), processor.max_length)
        sets = len(self.classes) if config.class_specific else 1
        self.token_ids = unused_token_ids(
            processor, self.embedding.num_embeddings, self.class_texts, sets * length
        )
        rows = [self.token_ids[i * length :][:length] for i in range(sets)]
        processor.context_token_ids = rows if config.class_specific else rows[0]
        self.context = ContextEmbedding(self.embedding, self.token_ids, config.init_std)
        if words:
            start = self.context.context.data.view(sets, length, -1)
            start[:, length - len(words) :] = self.embedding.weight.data[words]
        backbone.set_submodule(self.embedding_name, self.context)
        self.groups = [{"params": [self.context.context]}]
        self.train_projection()

    def finish(self, folder: Path | None) -> None:
        from peft import TrainableTokensConfig

        self.model.backbone.set_submodule(self.embedding_name, self.embedding)
        settings = TrainableTokensConfig(
            token_indices=self.token_ids, target_modules=[self.embedding_name], init_weights=True
        )
        peft_model = wrap_with_peft(self.model, settings)
        for key, parameter in peft_model.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.data.copy_(self.context.context.data)
        save_and_merge(self.model, peft_model, folder)


class AnchoredContextMethod(ContextMethod):
    """Learned context whose class texts stay near those of hand-made prompts."""

    def hand_made_prompts(self) -> list[list[str]]:
        """Per class, the prompts to stay near."""
        return [list(c.prompts) for c in self.classes]

    def build(self) -> None:
        self.processor.context_token_ids = None  # hand-made prompts have no learned context
        self.prompt_features = prompt_features(self.model, self.processor, self.hand_made_prompts())
        self.hand_made = unit_means(self.prompt_features)
        if self.model.config.is_pair:
            self.notes.append(
                "The towers of a pair met on the support alone, so the hand-made prompts that "
                f"'{self.name}' stays near carry no knowledge of images."
            )
        super().build()


# -------------------------------------------------------------------------------------- the methods


@register
class PromptTuning(ContextMethod):
    """CoOp: cross-entropy over class texts with a learned context, unified or class-specific."""

    name = "prompt_tuning"
    citation = "CoOp: Zhou et al. 2022, arXiv:2109.01134"
    Config = ContextConfig

    def recipe(self, shots: int, config: ContextConfig) -> Recipe:
        return coop_recipe(coop_epochs(shots))


@dataclass(frozen=True)
class KgCoOpConfig(ContextConfig):
    """Settings of `kgcoop`: as many tokens as "a photo of a" has (4 for CLIP), started from it."""

    context_tokens: int = 0
    init: str = "a photo of a"
    weight: float = setting(8.0, help="Of the distance to the hand-made prompts, lambda.", least=0)


@register
class KgCoOp(AnchoredContextMethod):
    """KgCoOp: CoOp whose class texts stay near the hand-made ones.

    Adds `lambda * (1 - mean_k cos(t_k, h_k))`: `t_k` is the class text with the learned context,
    `h_k` the mean of the class's own prompts, which in pathology are the hand-made ones.
    """

    name = "kgcoop"
    citation = "KgCoOp: Yao et al. 2023, arXiv:2303.13283"
    Config = KgCoOpConfig
    config: KgCoOpConfig

    def recipe(self, shots: int, config: KgCoOpConfig) -> Recipe:
        return coop_recipe(100, batch_size=128)

    def penalty(self, state: StepState) -> Tensor:
        cosines = (state.prototypes * self.hand_made.to(state.prototypes)).sum(-1)
        weighted: Tensor = self.config.weight * (1 - cosines.mean())
        return weighted


@dataclass(frozen=True)
class ProGradConfig(ContextConfig):
    """Settings of `prograd`: 16 tokens, the last started from words, the others from 0."""

    init: str = "a photo of a"
    init_std: float = 0.0
    temperature: float = setting(1.0, help="Of both softmaxes in the reference loss, T.", above=0)


@register
class ProGrad(AnchoredContextMethod):
    """ProGrad: CoOp whose gradient never opposes the pretrained model's predictions.

    The reference loss is `KL(p || q)`, averaged over the images: `p` is the softmax of the
    zero-shot logits over the mean of each class's own prompts, `q` that of the learned context,
    both at temperature T. Only its direction counts: where the gradients conflict, that of the
    cross-entropy loses its part along this one (lambda = 1).
    """

    name = "prograd"
    citation = "ProGrad: Zhu et al. 2023, arXiv:2205.14865"
    Config = ProGradConfig
    config: ProGradConfig
    whole_batch = True

    def recipe(self, shots: int, config: ProGradConfig) -> Recipe:
        return coop_recipe(coop_epochs(shots))

    def reference_loss(self, state: StepState) -> Tensor:
        zero_shot = zero_shot_logits(self.model, state, self.hand_made)
        temperature = self.config.temperature
        return divergence(zero_shot / temperature, state.logits / temperature, state.weight)


@dataclass(frozen=True)
class BiomedCoOpConfig(ContextConfig):
    """Settings of `biomedcoop`: as many tokens as "a photo of a" has, started from it.

    The paper tunes both weights for each data set (0.25 to 1); here they are fixed at 0.5, its
    values for LC25000, so that no validation is needed.
    """

    context_tokens: int = 0
    init: str = "a photo of a"
    consistency: float = setting(
        0.5, help="Weight of the distance to the mean prompt, lambda 1.", least=0
    )
    distillation: float = setting(
        0.5, help="Weight of the divergence from the zero-shot logits, lambda 2.", least=0
    )
    tau: float = setting(1.5, help="Largest standardised score of a prompt that is kept.", least=0)
    prompts: Literal["terminology", "classes"] = setting(
        "terminology", help="Where the prompt sets come from."
    )


@register
class BiomedCoOp(AnchoredContextMethod):
    """BiomedCoOp: CoOp with many prompts of each class as teachers, outlying prompts left out.

    Adds `l1 * mean((t - h)^2) + l2 * sum_i KL(p_i || q_i) / (n K)` over the n images of a batch
    and the K classes. `t` holds the class texts with the learned context, `h` the unit means of all
    prompts of each class, `q` is the softmax of `scale * f @ t.T`, and `p` that of
    `scale * f @ g.T`, where `g` are the unit means of the prompts that the batch keeps.

    The i-th prompts of all classes are one set (a class with fewer begins again, i modulo their
    number). Its score is `s_i = mean over images of max_k(scale * f . e_ki)`, and a set is kept if
    `|s_i - mean(s)| <= tau * std(s)` (with n - 1). The paper first takes `(s - median) / MAD`,
    which this standardisation cancels. All are kept where scores do not differ.

    The paper's prompts are GPT-4's; ours are names and synonyms x templates, without and with the
    definition, of the terminology. A class that it does not know goes by its own prompts.
    """

    name = "biomedcoop"
    citation = "BiomedCoOp: Koleilat et al. 2025, arXiv:2411.15232"
    Config = BiomedCoOpConfig
    config: BiomedCoOpConfig
    whole_batch = True  # the filter sees it

    def recipe(self, shots: int, config: BiomedCoOpConfig) -> Recipe:
        return coop_recipe(100, lr=2.5e-3, batch_size=4)

    def hand_made_prompts(self) -> list[list[str]]:
        seen = self.model.config.outline, self.model.config.outline_of
        texts, self.notes = prompt_sets(self.classes, self.config.prompts, *seen)
        return texts

    def build(self) -> None:
        super().build()
        number = max(map(len, self.prompt_features))
        turns = torch.arange(number, device=self.hand_made.device)
        self.sets = torch.stack(  # [number, K, dim]
            [features[turns % len(features)] for features in self.prompt_features], dim=1
        )

    def penalty(self, state: StepState) -> Tensor:
        config, teachers = self.config, self.sets.to(state.prototypes)
        with torch.no_grad():
            scale = self.model.logit_scale.exp()
            best = scale * torch.stack([(state.features @ t.T).amax(1) for t in teachers])
            kept = within(mean_over_images(best, state.weight), config.tau)
            selected = nn.functional.normalize(teachers[kept].mean(0), dim=-1)
        consistency = nn.functional.mse_loss(state.prototypes, self.hand_made.to(state.prototypes))
        teacher = zero_shot_logits(self.model, state, selected)
        distillation = divergence(teacher, state.logits, state.weight) / len(selected)
        weighted: Tensor = config.consistency * consistency + config.distillation * distillation
        return weighted


# -------------------------------------------------------------------------------- hand-made prompts


def prompt_sets(
    classes: Sequence[ClassInfo],
    source: str,
    outline: str = "ignore",
    outline_of: str | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Prompt ensembles of each class, from which `biomedcoop` learns.

    Args:
        classes: The classes.
        source: `terminology`, for classes that it has and a crop can show, or `classes`: their
            own prompts.
        outline: What the model does with outlines; those of the terminology's texts that name
            what is hidden are left out.
        outline_of: What the outlines go around.

    Returns:
        At least one text a class, and sentences for the results.
    """
    if source == "classes":
        return [list(c.prompts) for c in classes], []
    known = terms_of([(c.name, c.display_name) for c in classes])
    texts = [
        list(c.prompts)
        if term is None
        else list(visible_prompts(described_prompts(term), outline, outline_of))
        for c, term in zip(classes, known, strict=True)
    ]
    notes = []
    unknown = [c.display_name for c, term in zip(classes, known, strict=True) if term is None]
    if unknown:
        notes.append(
            f"The terminology gives no prompts of their own for {', '.join(unknown)}: the classes' "
            "own prompts stood in."
        )
    unsure = [term.name for term in known if term is not None and not term.verified]
    if unsure:
        notes.append(f"Definitions used as prompts and not verified: {', '.join(unsure)}.")
    return texts, notes


@torch.no_grad()
def prompt_features(model: Any, processor: Any, prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Text features of every single prompt, encoded a chunk at a time.

    Args:
        model: A `GloVLMModel`.
        processor: Its processor, without a learned context.
        prompts: At least one text a class.

    Returns:
        Per class, unit features `[P_k, dim]`.
    """
    encoded = processor.encode_prompts([[text] for of_class in prompts for text in of_class])
    encoded = {key: value.to(model.logit_scale.device) for key, value in encoded.items()}
    features: Tensor = model.class_prototypes(**encoded)
    return list(features.split([len(of_class) for of_class in prompts]))


def unit_means(features: Sequence[Tensor]) -> Tensor:
    """Class prototypes `[K, dim]`: the normalised means of unit features `[P_k, dim]`."""
    return nn.functional.normalize(torch.stack([f.mean(0) for f in features]), dim=-1)


def zero_shot_logits(model: Any, state: StepState, prototypes: Tensor) -> Tensor:
    """Zero-shot logits `[n, K]` of a step's images for fixed class texts `[K, dim]`."""
    features = state.features.detach()
    scale: Tensor = model.logit_scale.detach().exp()
    return scale * features @ prototypes.to(features).T


def divergence(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Kullback-Leibler divergence from teacher to student, the weighted mean over images.

    Args:
        teacher: Logits `[n, K]`.
        student: Logits `[n, K]`.
        weight: `[n]`, 0 for rows that only pad.
    """
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return mean_over_images((p.exp() * (p - q)).sum(-1), weight)


def mean_over_images(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of the last axis `[..., n]` over the rows of weight 1; zero where there is none."""
    return (values * weight.to(values)).sum(-1) / weight.sum().clamp(min=1)


def within(scores: Tensor, tau: float) -> Tensor:
    """Outlier filter: which scores `[n]` lie at most `tau` standard deviations from their mean.

    Returns:
        Booleans `[n]`; all true where none lies within.
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    if len(scores) > 1:
        near = (scores - scores.mean()).abs() <= tau * scores.std()
        kept = near if near.any() else kept
    return kept


# ----------------------------------------------------------------------------- the context's tokens


def context_length(config: ContextConfig, words: int, max_length: int) -> int:
    """Number of learned context tokens M.

    Args:
        config: Settings of the context.
        words: Number of tokens of `config.init`.
        max_length: Longest text in tokens.

    Raises:
        GloVLMError: M is not positive, smaller than `words`, or leaves no room for a class name.
    """
    length = config.context_tokens or words
    most = max_length - 3  # start, end, and one token of the class name
    if not max(words, 1) <= length <= most:
        least = f"{words}, those of '{config.init}'" if words else "1"
        raise GloVLMError(
            f"Expected from {least}, to {most} context tokens, found {length}; set context_tokens "
            "or init."
        )
    return length


class ContextEmbedding(nn.Module):
    """Token embedding of which a few rows train, without a copy of the table.

    Gives what PEFT's trainable tokens give, without their copy of the vocabulary at every step.

    Args:
        base: The pretrained embedding, frozen.
        token_ids: The rows that train.
        init_std: Standard deviation of their normal start.
    """

    def __init__(self, base: nn.Embedding, token_ids: list[int], init_std: float) -> None:
        super().__init__()
        self.base = base
        like = base.weight
        start = torch.randn(len(token_ids), base.embedding_dim) * init_std
        self.context = nn.Parameter(start.to(like.device, like.dtype))
        position = torch.full((base.num_embeddings,), -1, device=like.device)
        position[token_ids] = torch.arange(len(token_ids), device=like.device)
        self.register_buffer("position", position, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The pretrained table, for code that asks for its type or device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up `[n, length]` tokens: `[n, length, width]`."""
        where = self.position[input_ids]  # type: ignore[index]
        learned = self.context[where.clamp(min=0)]
        return torch.where((where >= 0).unsqueeze(-1), learned, self.base(input_ids))


def find_embedding(backbone: nn.Module) -> tuple[str, nn.Embedding]:
    """Token embedding of the text tower, after its name inside the backbone."""
    embedding = backbone.text_model.get_input_embeddings()  # type: ignore[union-attr, operator]
    name = next(n for n, m in backbone.named_modules() if m is embedding)
    return name, embedding


def unused_token_ids(
    processor: Any, num_embeddings: int, prompts: list[list[str]], count: int
) -> list[int]:
    """Rows of the token embedding that no prompt uses, from the rare end of the vocabulary.

    Args:
        processor: A `GloVLMProcessor`.
        num_embeddings: Rows of the embedding.
        prompts: The texts in use.
        count: How many rows are needed.

    Raises:
        GloVLMError: The vocabulary has too few such rows.
    """
    tokenizer = processor.tokenizer
    rows = tokenizer([text for of_class in prompts for text in of_class])["input_ids"]
    taken = {i for row in rows for i in row} | set(tokenizer.all_special_ids)
    # A CLIP whose end token has the id 2 (OpenAI's by its old configuration) is read at the
    # highest id of a text: the context must not be that, or nothing behind it would count.
    unused = [i for i in range(min(map(max, rows)) - 1, -1, -1) if i not in taken][:count]
    if len(unused) < count:
        unused = [i for i in range(num_embeddings - 1, -1, -1) if i not in taken][:count]
    if len(unused) < count:
        raise GloVLMError(
            f"Prompt tuning needs {count} vocabulary rows that no prompt uses; this tokenizer has "
            f"{len(unused)}. Lower context_tokens or do not use class_specific."
        )
    return unused
