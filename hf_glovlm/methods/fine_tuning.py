"""Fine-tuning of the towers: of blocks, of everything, and parameter-efficient with PEFT."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import GloVLMError
from ..settings import Settings, setting
from .contract import Recipe, StepState, TowerMethod, register
from .peft_tuners import (
    AdaLoraBudget,
    build_config,
    describe_tuner,
    find_tuner,
    in_attention,
    tuner_arguments,
)

TOWERS = {
    "both": ("vision_model", "text_model"),
    "vision": ("vision_model",),
    "text": ("text_model",),
}
# How the families of transformers name the same four projections.
ATTENTION_NAMES = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("out_proj", "o_proj", "attention.output.dense"),
}


def tower_layers(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """Transformer blocks of a tower: its longest module list.

    Returns:
        The name inside the tower, and the list.

    Raises:
        GloVLMError: The tower has no blocks (a convolutional network).
    """
    lists = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise GloVLMError(
            f"{type(tower).__name__} has no list of transformer blocks, so its last blocks cannot "
            "be adapted: use a transformer tower, or a method on features (linear_probe)."
        )
    return max(lists, key=lambda pair: len(pair[1]))


def target_modules(
    backbone: Any,
    towers: str = "both",
    *,
    last: int = 0,
    layers: Sequence[int] = (),
    projections: str = "qkvo",
    mlp: bool = False,
) -> list[str]:
    """Names of the linear maps of a backbone's blocks, as PEFT's `target_modules` takes them.

    Args:
        backbone: A dual encoder with `vision_model` and `text_model`, such as a `CLIPModel`; a
            `GloVLMModel` or a classifier with one inside; or the folder or name of either.
        towers: `both`, `vision` or `text`.
        last: How many blocks, counted from the end; 0 is all of them.
        layers: Or which blocks, counted from 0, negative ones from the end; empty goes by `last`.
        projections: Of the attention, letters of `qkvo`.
        mlp: Whether the linear maps outside the attention are named too.

    Returns:
        Full names relative to the backbone, block by block. PEFT matches the ends of names, so
        they serve for the models around it, too.

    Raises:
        GloVLMError: A tower, a block or a projection does not exist.
    """
    backbone = _dual_encoder(backbone)
    unknown = set(projections) - set(ATTENTION_NAMES)
    if unknown:
        raise GloVLMError(f"Attention projections are q, k, v and o; found '{min(unknown)}'.")
    names = []
    for prefix, block in _blocks(backbone, towers, last, layers):
        linear = [n for n, module in block.named_modules() if isinstance(module, nn.Linear)]
        for kind in projections:
            endings = tuple(f".{name}" for name in ATTENTION_NAMES[kind])
            matching = [n for n in linear if f".{n}".endswith(endings)]
            if not matching:
                raise GloVLMError(
                    f"No '{kind}' projection was found in {prefix} ({type(block).__name__}); known "
                    f"names: {', '.join(ATTENTION_NAMES[kind])}."
                )
            names += [f"{prefix}.{n}" for n in matching]
        if mlp:
            names += [f"{prefix}.{n}" for n in linear if not in_attention(n)]
    return names


def adapter_base(model: Any) -> str:
    """Base model of an adapter: what stock `AutoModel.from_pretrained` loads first."""
    if model.name_or_path:  # a model of ours, adapted before: no longer the weights it came from
        return str(model.name_or_path)
    if model.config.is_pair:
        return str(model.config.backbone_name or "")
    local = getattr(model.config.backbone_config, "_name_or_path", "")
    return str(local or model.config.backbone_name)


def wrap_with_peft(model: Any, settings: Any) -> Any:
    """Put a PEFT adapter into a model's backbone, which is changed in place."""
    from peft import get_peft_model

    base = adapter_base(model)
    with _quiet_peft():
        peft_model = get_peft_model(model.backbone, settings)
    peft_model.peft_config["default"].base_model_name_or_path = base
    if not model.name_or_path:
        peft_model.peft_config["default"].revision = model.config.backbone_revision
    return peft_model


def save_and_merge(model: Any, peft_model: Any, folder: Path | None) -> None:
    """Write the adapter alone, then add it to the backbone's weights for good.

    Args:
        model: The `GloVLMModel` whose backbone was wrapped.
        peft_model: What `wrap_with_peft` returned.
        folder: Takes the adapter; `None` writes none.
    """
    with _quiet_peft():
        if folder is not None:
            # PEFT keeps names in sets, whose order changes from process to process.
            for config in peft_model.peft_config.values():
                for name, value in vars(config).items():
                    if isinstance(value, set | frozenset):
                        setattr(config, name, sorted(value, key=str))
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        model.backbone = peft_model.merge_and_unload()


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence warnings of peft 0.21 that do not concern a user."""
    with warnings.catch_warnings():
        for message in (
            ".*gradient_checkpointing",
            "Could not find a config file in",
            "Failed to load the CUDA extension",  # BOFT's; it has another way
            "Setting boft_n_butterfly_factor",
            "Unsupported layer type",  # LN_TUNING's; it takes layer norms all the same
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@dataclass(frozen=True)
class VanillaConfig(Settings):
    """Settings of `vanilla` (Glo-VLMs, CLIP and PLIP)."""

    vision_layers: int = setting(4, help="Last vision blocks that train.", least=0, most=10_000)
    text_layers: int = setting(2, help="Last text blocks that train.", least=0, most=10_000)
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class Vanilla(TowerMethod):
    """Partial fine-tuning: the last blocks of both towers and the logit scale."""

    name = "vanilla"
    family = "both sides"
    trains = "the last 4 vision and 2 text blocks, logit scale"
    citation = "Glo-VLMs, arXiv:2511.11984"
    Config = VanillaConfig
    config: VanillaConfig

    def recipe(self, shots: int, config: VanillaConfig) -> Recipe:
        return Recipe(lr=1e-4, epochs=20, batch_size=5, schedule="cosine", final_lr=0.01)

    def build(self) -> None:
        vision, text = self.config.vision_layers, self.config.text_layers
        self.trains_vision, self.trains_text = vision > 0, text > 0
        parameters: list[nn.Parameter] = []
        for tower, last in (("vision", vision), ("text", text)):
            if last > 0:
                for _, block in _blocks(self.model.backbone, tower, last):
                    parameters += block.parameters()
        parameters.append(self.model.logit_scale)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.groups = [{"params": parameters}]
        self.train_projection()


@dataclass(frozen=True)
class FullConfig(Settings):
    """Settings of `full`."""

    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class Full(TowerMethod):
    """Full fine-tuning: both towers, their projections and the logit scale.

    Its recipe is ours, from no paper: `vanilla`'s epochs and batches at a tenth of its rate.
    """

    name = "full"
    family = "both sides"
    trains = "both towers, projections, logit scale"
    citation = "no paper; the recipe is this package's own"
    Config = FullConfig
    trains_vision = True
    trains_text = True

    def recipe(self, shots: int, config: FullConfig) -> Recipe:
        return Recipe(lr=1e-5, epochs=20, batch_size=5)

    def build(self) -> None:
        model = self.model.requires_grad_(True)
        # What no feature depends on stays as it is: a pooler that is not read, a mask token.
        for parameter in unused_parameters(model, self.processor, self.class_texts[0][:1]):
            parameter.requires_grad_(False)
        # The projection of a pair makes a group of its own.
        apart = model.backbone.visual_projection.parameters() if model.config.is_pair else ()
        others = {id(p) for p in apart}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
        self.groups = [{"params": rest}]
        self.train_projection()


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Settings of `lora` (Glo-VLMs, CLIP and PLIP)."""

    tuner: str = setting(
        "LORA",
        help="Any tuner of PEFT by name, in capitals or not: LORA (also RSLORA, DORA), VERA, "
        "ADALORA, IA3, OFT, BOFT, HRA, LOHA, LOKR, FOURIERFT, ...",
    )
    tuner_config: dict[str, Any] = setting(
        factory=dict,
        help="Further arguments of the tuner's config in PEFT; they win over the next three.",
    )
    r: int = setting(
        4,
        help="Rank, where the tuner adds something of a rank; of AdaLoRA the rank that remains, "
        "from one and a half times as much.",
        least=1,
        most=4096,
    )
    alpha: int = setting(
        16,
        help="Scaling numerator: LoRA's updates are multiplied by alpha / r.",
        least=1,
        most=10**6,
    )
    dropout: float = setting(0.1, help="On the input of the low-rank path.", least=0, below=1)
    towers: Literal["both", "vision", "text"] = setting("both", help="Which towers adapt.")
    last: int = setting(
        1, help="Blocks of each tower, counted from the end; 0 is all.", least=0, most=10_000
    )
    layers: list[int] = setting(
        factory=list,
        help="Or their numbers, counted from 0, negative ones from the end; empty goes by `last`.",
    )
    projections: str = setting("qv", help="Attention projections, letters of qkvo.")
    mlp: bool = setting(
        False, help="Whether the blocks' linear maps outside the attention are adapted too."
    )
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class Lora(TowerMethod):
    """LoRA: low-rank updates of q and v in the last block of both towers, or any tuner of PEFT.

    The logit scale stays as pretrained (the published code trains it at 2e-5, which moves it by
    less than 0.01 in 20 epochs), so that the adapter alone holds all that changed.
    """

    name = "lora"
    family = "both sides"
    trains = "rank-4 updates of q and v in the last block of both towers"
    saves_adapter = True
    citation = "Hu et al. 2021, arXiv:2106.09685; settings of Glo-VLMs, arXiv:2511.11984"
    Config: ClassVar[type] = LoraSettings

    def recipe(self, shots: int, config: Any) -> Recipe:
        return Recipe(lr=2e-5, epochs=20, batch_size=5)

    def lora_settings(self) -> LoraSettings:
        """Settings of LoRA: the method's own, or those that a variant of it fixes."""
        settings: LoraSettings = self.config
        return settings

    def build(self) -> None:
        model, settings = self.model, self.lora_settings()
        self.trains_vision = settings.towers != "text"
        self.trains_text = settings.towers != "vision"
        tuner, switches = find_tuner(settings.tuner)
        name_targets = _norms if tuner == "LN_TUNING" else _maps
        names = name_targets(model.backbone, settings)
        targets = {name: model.backbone.get_submodule(name) for name in names}
        arguments = tuner_arguments(
            tuner,
            targets,
            r=settings.r,
            alpha=settings.alpha,
            dropout=settings.dropout,
            given={**switches, **settings.tuner_config},
        )
        joins = model.config.is_pair
        arguments["modules_to_save"] = ["visual_projection"] if joins else None
        try:
            self.peft_model = wrap_with_peft(model, build_config(tuner, arguments))
        except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
            raise GloVLMError(
                f"{describe_tuner(tuner, arguments)[0]} It cannot be built so: "
                f"{str(error).rstrip('.')}. Change it in tuner_config."
            ) from error
        # PEFT changes the towers in place: the model goes on holding them, adapted.
        trained = [(n, p) for n, p in self.peft_model.named_parameters() if p.requires_grad]
        self.groups = [{"params": [p for n, p in trained if "modules_to_save" not in n]}]
        if joins:
            saved = [p for n, p in trained if "modules_to_save" in n]
            self.groups.append({"params": saved, "lr": settings.projection_lr})
        if tuner != "LORA" or switches or settings.tuner_config:
            self.notes = describe_tuner(tuner, arguments)
        self.budget = AdaLoraBudget(self.peft_model) if tuner == "ADALORA" else None

    def begin(self, steps: int) -> None:
        if self.budget is not None:
            self.budget.begin(steps)

    def after_step(self, step: int) -> None:
        if self.budget is not None:
            self.budget.after_step(step)

    def penalty(self, state: StepState) -> Tensor | None:
        return None if self.budget is None else self.budget.penalty()

    def finish(self, folder: Path | None) -> None:
        if self.budget is not None:
            self.budget.keep_every_rank()
        save_and_merge(self.model, self.peft_model, folder)


@dataclass(frozen=True)
class ClipLoraSettings(Settings):
    """Settings of `clip_lora`, as published."""

    r: int = setting(2, help="Rank.", least=1, most=4096)
    alpha: int = setting(
        1,
        help="Scaling numerator: updates are multiplied by alpha / sqrt(r).",
        least=1,
        most=10**6,
    )
    dropout: float = setting(0.25, help="On the input of the low-rank path.", least=0, below=1)
    projection_lr: float = setting(
        1e-3, help="Learning rate of the projection of a pair of towers.", least=0
    )


@register
class ClipLora(Lora):
    """CLIP-LoRA: rank-stabilised updates of q, k and v in every block of both towers.

    The published texts are "a photo of a {class}."; here they are the prompts of the classes, as
    everywhere in this package. Random crops and flips are published too: `augment` turns ours on.
    """

    name = "clip_lora"
    trains = "rank-2 updates of q, k and v in every block of both towers"
    citation = "CLIP-LoRA: Zanella and Ben Ayed 2024, arXiv:2405.18541"
    Config = ClipLoraSettings

    def recipe(self, shots: int, config: ClipLoraSettings) -> Recipe:
        return Recipe(
            lr=2e-4,
            weight_decay=1e-2,
            epochs=0,
            steps=500 * max(shots, 1),
            batch_size=32,
            schedule="cosine",
            final_lr=5e-3,  # down to 1e-6
            by_step=True,
        )

    def lora_settings(self) -> LoraSettings:
        given = dataclasses.asdict(self.config)
        return LoraSettings(tuner="RSLORA", last=0, projections="qkv", **given)


def _dual_encoder(model: Any) -> Any:
    """The dual encoder in a model of ours or of the same name on disk; others as they are."""
    if isinstance(model, str | Path):
        from ..backbones import load_backbone

        model = load_backbone(str(model))[0]
    model = getattr(model, "glovlm", model)
    return getattr(model, "backbone", model)


def _blocks(
    backbone: Any, towers: str, last: int = 0, layers: Sequence[int] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The chosen blocks of the chosen towers, with their names in the backbone."""
    if towers not in TOWERS:
        raise GloVLMError(f"Towers are {', '.join(TOWERS)}; found '{towers}'.")
    for tower in TOWERS[towers]:
        if not hasattr(backbone, tower):
            raise GloVLMError(
                f"Expected a dual encoder with {' and '.join(TOWERS['both'])}, such as a "
                f"GloVLMModel or a CLIPModel; found {type(backbone).__name__} without {tower}."
            )
        path, blocks = tower_layers(getattr(backbone, tower))
        count = len(blocks)
        wrong = [i for i in layers if not -count <= i < count]
        if wrong:
            raise GloVLMError(
                f"The {tower} has blocks 0 to {count - 1}; found {wrong[0]} in `layers`."
            )
        chosen = range(count)[-last:] if last else range(count)
        for i in sorted({i % count for i in layers}) or chosen:
            yield f"{tower}.{path}.{i}", blocks[i]


def _maps(backbone: Any, config: LoraSettings) -> list[str]:
    shared = ("towers", "last", "layers", "projections", "mlp")
    return target_modules(backbone, **{name: getattr(config, name) for name in shared})


def _norms(backbone: Any, config: LoraSettings) -> list[str]:
    return [
        f"{prefix}.{name}"
        for prefix, block in _blocks(backbone, config.towers, config.last, config.layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
    ]


def unused_parameters(model: Any, processor: Any, texts: list[str]) -> list[nn.Parameter]:
    """Unused parameters: neither an image's nor a text's features depend on them."""
    from PIL import Image

    encoded = processor.encode_prompts([texts])
    pixels = processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    device = model.logit_scale.device
    image = model.get_image_features(pixels.to(device, model.dtype)).pooler_output
    text = model.class_prototypes(**{k: v.to(device) for k, v in encoded.items()})
    value = (image.sum() + text.sum()) * model.logit_scale
    named = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, named, allow_unused=True)
    return [p for p, g in zip(named, gradients, strict=True) if g is None]
