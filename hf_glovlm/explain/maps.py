"""Heat maps of a classifier: the evidence for a class in each patch of an image.

One table, `HEAT_MAPS`; an entry is a class decorated with `@register_map`. A map shows what a model
uses, not what is the matter with a glomerulus. Research use only, not for diagnosis.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn

from ..data.columns import OUTLINE
from ..data.folder import ImageValue, decode_image, open_image
from ..data.outlines import open_outlined, outlined
from ..errors import GloVLMError, nearest
from ..inference import embed_prompts, evaluation_mode
from ..inference.prediction import class_names
from ..model.heads import CacheHead, DenseCacheHead
from ..model.outlines import draw_centre, split_channels
from ..model.towers import TowerPair
from .attention import read_attention, roll_out, weigh_by_gradient
from .patches import (
    Floats,
    Mask,
    View,
    blank_image,
    central_ellipse,
    has_patches,
    mean_colour,
    pooled_inside,
    reveal,
    view_image,
)

if TYPE_CHECKING:
    from ..model import GloVLMForImageClassification, GloVLMProcessor

Where = Literal["given", "outline", "centre", "central ellipse"]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Heat map: the evidence for a class in each patch, with the scores that belong beside it.

    Args:
        values: `[rows, columns]`, in the method's own unit (see `HEAT_MAPS`); higher is more.
        method: A name of `HEAT_MAPS`.
        target: The class, or the text, that is explained.
        index: Its place in `classes`.
        classes: What it was chosen from.
        scores: Probability of each class `[K]`.
        glomerulus_blanked: The same with the glomerulus filled with the image's mean colour.
        context_blanked: The same with everything but the glomerulus filled.
        mask: Where the glomerulus was taken to be: a mask that was `given`; the image's `outline`;
            the circle in the middle that a model with outline `centre` sees; or for want of all a
            `central ellipse` of 0.8 times the image's width and height.
        view: Where the patches lie in the image.
        synthetic: Whether the model learned from synthetic images.
    """

    values: Floats
    method: str
    target: str
    index: int
    classes: list[str]
    scores: list[float]
    glomerulus_blanked: list[float]
    context_blanked: list[float]
    mask: Where
    view: View
    synthetic: bool = False

    @property
    def score(self) -> float:
        """Probability of the target."""
        return self.scores[self.index]

    @property
    def legend(self) -> str:
        """What a colour stands for: `evidence for sclerosed`."""
        if HEAT_MAPS[self.method].of_class:
            return f"evidence for {self.target}"
        return "share of a patch, the same for every class"

    def on_image(self) -> Floats:
        """The values laid over the whole image `[height, width]`; NaN where nothing was seen."""
        return self.view.spread(self.values)

    def describe(self) -> dict[str, Any]:
        """All but the map itself, for a JSON file."""
        return {
            "method": self.method,
            "target": self.target,
            "score": self.score,
            "glomerulus_blanked": self.glomerulus_blanked[self.index],
            "context_blanked": self.context_blanked[self.index],
            "mask": self.mask,
            "scores": dict(zip(self.classes, self.scores, strict=True)),
            "grid": [self.view.rows, self.view.columns],
            "box": [round(edge, 2) for edge in self.view.box],
            "synthetic": self.synthetic,
        }


@dataclass(frozen=True)
class Target:
    """Target of an explanation: a class, or a text against the texts of the classes.

    Args:
        names: What is chosen from.
        index: What is explained.
        logits: From image features `[n, dim]` to `[n, K]`.
        contrast: The same as cosines, where the head compares these; else the logits again.
    """

    names: list[str]
    index: int
    logits: Callable[[Tensor], Tensor]
    contrast: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ExplainedImage:
    """One image with the target that is explained; made by `prepare_image`.

    Args:
        model: The classifier, in evaluation mode.
        target: What is explained.
        view: Where the patches lie.
        inputs: Of the image, for the model.
        scores: Probability of each class: of the image, with the glomerulus blanked and with the
            context blanked `[3, K]`.
        mask: Where the glomerulus was taken to be, see `HeatMap`.
        window: For occlusion, in patches.
        batch_size: Images at a time.
    """

    model: Any
    target: Target
    view: View
    inputs: dict[str, Tensor]
    scores: NDArray[np.float64]
    mask: Where
    window: int = 1
    batch_size: int = 32

    def score_shown(self, shown: Tensor) -> NDArray[np.float64]:
        """Probability of the target while only some patches are shown.

        Args:
            shown: Boolean `[n, rows * columns]`; the others have the image's mean colour.

        Returns:
            `[n]`.
        """
        colour = mean_colour(self.inputs)
        batches = reveal(self.inputs, shown, colour, self.view, self.batch_size)
        return classify(self.model, self.target, batches)[:, self.target.index]

    def draw(self, method: str) -> HeatMap:
        """The heat map by one method; see `explain`."""
        values = find_map(method).draw(self).float().cpu().numpy()
        return HeatMap(
            values=values.reshape(self.view.rows, self.view.columns),
            method=method,
            target=self.target.names[self.target.index],
            index=self.target.index,
            classes=self.target.names,
            scores=self.scores[0].tolist(),
            glomerulus_blanked=self.scores[1].tolist(),
            context_blanked=self.scores[2].tolist(),
            mask=self.mask,
            view=self.view,
            synthetic=bool(self.model.config.synthetic),
        )


class MapMethod(ABC):
    """Heat map method: an entry of `HEAT_MAPS`.

    Attributes:
        name: On the command line.
        title: In figures.
        unit: What a value is.
        citation: Where the method is from.
        of_class: Whether the map is evidence for the target, not the same for every class.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    citation: ClassVar[str]
    of_class: ClassVar[bool] = True

    @abstractmethod
    def draw(self, case: ExplainedImage) -> Tensor:
        """Values of the patches, `[rows * columns]`; refuses models that it does not apply to."""


HEAT_MAPS: dict[str, MapMethod] = {}


def register_map(method: type[MapMethod]) -> type[MapMethod]:
    """List a heat map in the table; refuse one that does not describe itself."""
    for attribute in ("name", "title", "unit", "citation"):
        if not hasattr(method, attribute):
            raise TypeError(f"{method.__name__} must state '{attribute}'.")
    if method.name in HEAT_MAPS:
        raise TypeError(f"There is already a heat map '{method.name}'.")
    HEAT_MAPS[method.name] = method()
    return method


def explain(
    model: "GloVLMForImageClassification",
    processor: "GloVLMProcessor",
    image: ImageValue,
    *,
    method: str = "gradient",
    target: str | int | None = None,
    text: str | None = None,
    mask: ArrayLike | None = None,
    window: int = 1,
    batch_size: int = 32,
) -> HeatMap:
    """Heat map of one image.

    Args:
        model: The classifier; left in the mode and with the attention back end that it had.
        processor: Its processor.
        image: A picture, a path, or `{"path", "bytes"}`; with its outline, for a model that was
            adapted to outlined images.
        method: A name of `HEAT_MAPS`.
        target: The explained class, by name or number; by default the most probable.
        text: Any text to explain instead, against the prompts of the model's classes. Needs an
            image and a text tower that share a space.
        mask: Where the glomerulus is, `[height, width]` of the image; above 0 is inside. It is the
            outline, in place of the image's own, for a model that was adapted to outlined images.
        window: For `occlusion`: side of the blank in patches.
        batch_size: Images at a time.

    Raises:
        GloVLMError: The image cannot be read, the method does not apply to this model, or the
            class, the text or the mask does not fit.
    """
    find_map(method)
    with evaluation_mode(model):
        case = prepare_image(
            model,
            processor,
            image,
            target=target,
            text=text,
            mask=mask,
            window=window,
            batch_size=batch_size,
        )
        return case.draw(method)


def prepare_image(
    model: Any,
    processor: Any,
    image: ImageValue,
    *,
    target: str | int | None = None,
    text: str | None = None,
    mask: ArrayLike | None = None,
    window: int = 1,
    batch_size: int = 32,
) -> ExplainedImage:
    """Prepare an image and its target for many maps; see `explain`. The model must be `still`."""
    if window < 1 or batch_size < 1:
        raise GloVLMError(
            f"Expected a window and a batch size of 1 or more, found {window} and {batch_size}."
        )
    outline = getattr(processor, "outline", "ignore")
    picture, inside, where = place_glomerulus(image, outline, mask)
    seen = [picture, *(blank_image(picture, part) for part in (inside, ~inside))]
    if outline not in ("ignore", "centre") and where in ("given", "outline"):
        seen = [outlined(one, inside) for one in seen]
    view, inputs = view_image(model, processor, seen[0])
    explained = choose_target(model, processor, inputs, target, text)
    blanked = [view_image(model, processor, one)[1] for one in seen[1:]]
    scores = classify(model, explained, [inputs, *blanked])
    return ExplainedImage(model, explained, view, inputs, scores, where, window, batch_size)


def place_glomerulus(
    image: ImageValue, outline: str = "ignore", mask: ArrayLike | None = None
) -> tuple[Image.Image, Mask, Where]:
    """Where the glomerulus lies in an image.

    Args:
        image: As `open_image` takes it.
        outline: What the model sees of an outline.
        mask: Where a person says that it lies `[height, width]`.

    Returns:
        The whole image in RGB, True inside `[height, width]`, and how that is known.

    Raises:
        GloVLMError: The image cannot be read, or the mask does not fit.
    """
    own = decode_image(image)
    if OUTLINE in own.info or outline not in ("ignore", "centre"):
        own = open_outlined(own)
        picture = own.convert("RGB")
    else:
        own = picture = open_image(own)
    if mask is not None:
        return picture, check_mask(mask, picture), "given"
    if own.mode == "RGBA":
        return picture, np.asarray(own.getchannel("A")) > 0, "outline"
    if outline == "centre":
        return picture, np.asarray(draw_centre(picture).getchannel("A")) > 0, "centre"
    return picture, central_ellipse(*picture.size), "central ellipse"


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Nearest neighbours in the support of each of n images, the nearest first.

    Args:
        indices: Row of the support, in the order in which the model learned it `[n, k]`.
        labels: Class of each `[n][k]`.
        cosines: `[n, k]`.
    """

    indices: NDArray[np.int64]
    labels: list[list[str]]
    cosines: Floats


def nearest_support(model: Any, features: ArrayLike, *, k: int = 3) -> Neighbours:
    """Nearest support images, for a model that keeps their features (Tip-Adapter).

    Names of files are never kept, so the number of a row is all there is. Where the keys were
    trained (`tip_adapter_f`), they have moved away from the images they started from.

    Args:
        model: A classifier whose head is a cache.
        features: Image features `[n, dim]`, as `embed_images` gives them.
        k: How many; fewer where the cache is smaller.

    Raises:
        GloVLMError: The model keeps no support, or the features are not its own.
    """
    head = model.head
    if k < 1:
        raise GloVLMError(f"Expected 1 neighbour or more, found {k}.")
    if getattr(head, "kind", None) not in (CacheHead.kind, DenseCacheHead.kind):
        raise GloVLMError(
            "This model carries no support images: its head is "
            f"'{getattr(head, 'kind', type(head).__name__)}'. Adapt with tip_adapter to have them."
        )
    rows = torch.as_tensor(np.asarray(features, np.float32))
    keys = nn.functional.normalize(head.keys.detach().float().cpu(), dim=-1)
    if rows.dim() != 2 or rows.shape[1] != keys.shape[1]:
        raise GloVLMError(
            f"Expected features [n, {keys.shape[1]}] of this model, found {tuple(rows.shape)}."
        )
    cosines, indices = (nn.functional.normalize(rows, dim=-1) @ keys.T).topk(min(k, len(keys)))
    names, label = class_names(model.config), head.value_matrix().detach().cpu().argmax(1)
    labels = [[names[label[i]] for i in row] for row in indices.tolist()]
    return Neighbours(indices.numpy(), labels, cosines.numpy())


# ------------------------------------------------------------------------------------- targets


def find_map(name: str) -> MapMethod:
    """Find a heat map by its name.

    Raises:
        GloVLMError: There is none; lists those there are and names the nearest.
    """
    if name not in HEAT_MAPS:
        raise GloVLMError(
            f"Unknown heat map '{name}': expected {', '.join(HEAT_MAPS)}.{nearest(name, HEAT_MAPS)}"
        )
    return HEAT_MAPS[name]


def choose_target(
    model: Any,
    processor: Any,
    inputs: dict[str, Tensor],
    target: str | int | None = None,
    text: str | None = None,
) -> Target:
    """Make a target of a class or a text.

    Args:
        model: The classifier.
        processor: Its processor.
        inputs: Of the image, for the class that is most probable.
        target: A class's name or number.
        text: A text instead.

    Raises:
        GloVLMError: There is no such class; both are given; texts cannot be compared with images.
    """
    names = class_names(model.config)
    if text is not None:
        if target is not None:
            raise GloVLMError("Ask for a class or for a text, not for both.")
        return _text_target(model, processor, names, text)

    def compare(features: Tensor) -> Tensor:
        unit = nn.functional.normalize(features, dim=-1)
        cosines: Tensor = unit @ model.head.weight.T
        return cosines

    contrast = compare if getattr(model.head, "cosine", False) else model.classify_features
    if target is None:
        first = Target(names, 0, model.classify_features, contrast)
        index = int(classify(model, first, [inputs])[0].argmax())
    elif isinstance(target, int) and 0 <= target < len(names):
        index = target
    elif target in names:
        index = names.index(str(target))
    else:
        raise GloVLMError(
            f"'{target}' is no class of this model, which knows {', '.join(names)}."
            f"{nearest(str(target), names)}"
        )
    return Target(names, index, model.classify_features, contrast)


def _text_target(model: Any, processor: Any, names: list[str], text: str) -> Target:
    if not model.config.joint_space or not text.strip():
        raise GloVLMError(
            "A text can be asked about where image and text towers share a space; "
            + ("these two do not: ask for a class." if text.strip() else "and it is empty.")
        )
    encoded = processor(text=[text], return_tensors="pt")
    device = next(model.parameters()).device
    ids = encoded["input_ids"].to(device)
    mask = encoded["attention_mask"].to(device) if "attention_mask" in encoded else None
    prompts = model.config.prompts or [[name] for name in names]
    others = torch.from_numpy(embed_prompts(model.glovlm, processor, prompts)).to(device)
    with torch.no_grad():
        given = model.glovlm.class_prototypes(
            ids, mask, torch.zeros(1, dtype=torch.long).to(device)
        )
        texts = torch.cat([given, others.to(given.dtype)])
        scale = model.glovlm.logit_scale.exp()

    def compare(features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1) @ texts.T

    return Target([text, *names], 0, lambda features: scale * compare(features), compare)


def classify(
    model: Any, target: Target, batches: Iterable[dict[str, Tensor]]
) -> NDArray[np.float64]:
    """Probability of each class for batches of inputs: `[n, K]`."""
    with torch.no_grad():
        logits = [
            target.logits(model.glovlm.get_image_features(**inputs).pooler_output)
            for inputs in batches
        ]
    probabilities: NDArray[np.float64] = torch.cat(logits).double().softmax(-1).cpu().numpy()
    return probabilities


def check_mask(mask: ArrayLike, image: Image.Image) -> Mask:
    """A mask `[height, width]` as booleans.

    Raises:
        GloVLMError: It is not as large as the image, or has no inside or no outside.
    """
    given = np.asarray(mask)
    inside: Mask = given > 0
    if given.shape != (image.height, image.width):
        raise GloVLMError(
            f"Expected a mask of {image.height} x {image.width} (height, width) as the image, "
            f"found {' x '.join(map(str, given.shape))}."
        )
    if inside.all() or not inside.any():
        raise GloVLMError(
            "Expected a mask with the glomerulus inside and tissue outside, found "
            f"{'no outside' if inside.all() else 'nothing inside'}: leave the mask out instead."
        )
    return inside


# ----------------------------------------------------------------------------------- the table


def _pooling(model: Any) -> str:
    return model.config.vision_pooling if model.config.is_pair else "pooler"


@register_map
class Rollout(MapMethod):
    """Attention rollout: `attention.roll_out`."""

    name = "rollout"
    title = "Attention rollout"
    unit = "share of the patch in the pooled vector, by attention alone; the same for every class"
    citation = "Abnar and Zuidema 2020, arXiv:2005.00928"
    of_class = False

    def draw(self, case: ExplainedImage) -> Tensor:
        attention = read_attention(case.model, case.inputs, case.view)
        return roll_out(attention, _pooling(case.model))


@register_map
class GradientAttention(MapMethod):
    """Gradient-weighted attention: `attention.weigh_by_gradient`."""

    name = "gradient"
    title = "Gradient-weighted attention"
    unit = "attention that raises the class's logit, added up over the layers"
    citation = "Chefer et al. 2021, arXiv:2103.15679"

    def draw(self, case: ExplainedImage) -> Tensor:
        def score(features: Tensor) -> Tensor:
            return case.target.logits(features)[0, case.target.index]

        attention = read_attention(case.model, case.inputs, case.view, score)
        return weigh_by_gradient(attention, _pooling(case.model))


@register_map
class PatchSimilarity(MapMethod):
    """Contrast of cosines: each patch token, pooled alone, with the class and with the others.

    Where the inside of an outline is pooled, a patch outside of it has no part in that: its value
    is 0.
    """

    name = "similarity"
    title = "Similarity of patch and class"
    unit = (
        "the patch token's cosine with the class minus the mean of the others' (logits, where the "
        "head compares no cosines)"
    )
    citation = "after Zhou et al. 2022, arXiv:2112.01071"

    def draw(self, case: ExplainedImage) -> Tensor:
        with torch.no_grad():
            similar = case.target.contrast(_features_alone(case))
        others = [k for k in range(similar.shape[1]) if k != case.target.index]
        contrast = similar[:, case.target.index] - similar[:, others].mean(1)
        inside = pooled_inside(case.model, case.inputs, case.view)
        return contrast if inside is None else contrast * (inside > 0)


def _features_alone(case: ExplainedImage) -> Tensor:
    """Image features of each patch token as if it were all that is pooled: `[patches, dim]`.

    Where class token and mean are joined, the image's own class token stays.
    """
    model, view = case.model, case.view
    backbone = model.glovlm.backbone
    tower = backbone.vision_model
    if not has_patches(model) or getattr(model.config, "context", None):
        raise GloVLMError(
            "Patch tokens cannot be compared with classes here: "
            + (
                "context-guided layers drop some of them"
                if has_patches(model)
                else f"{type(tower).__name__} is no plain vision transformer"
            )
            + ". Use 'occlusion'."
        )
    colours, _ = split_channels(case.inputs["pixel_values"])
    outputs = tower(**case.inputs | {"pixel_values": colours})
    tokens, count = outputs.last_hidden_state[0], view.rows * view.columns
    room = case.inputs["pixel_values"].shape[1] if "spatial_shapes" in case.inputs else count
    prefix = len(tokens) - room
    tokens = tokens[: prefix + count]
    # Two of the same, so that a pooler that leaves the first token out still has one.
    alone = tokens[prefix:].unsqueeze(1).expand(-1, 2, -1)
    pooled: Tensor = alone[:, 0]
    if pooled_inside(model, case.inputs, view) is not None:
        pooled = model.glovlm.pool_tokens(alone, alone.new_ones(alone.shape[:2]))
    elif not isinstance(backbone, TowerPair):
        pooled = _own_pooling(tower, tokens, outputs.pooler_output)(alone)
    else:
        if backbone.vision_pooler is not None:
            pooled = backbone.vision_pooler(alone)
        elif model.config.vision_pooling == "pooler":
            pooled = _own_pooling(tower, tokens, outputs.pooler_output)(alone)
        elif model.config.vision_pooling == "cls_mean":
            pooled = torch.cat([tokens[:1].expand(count, -1), pooled], dim=-1)
        if model.config.normalize_pooled:
            pooled = nn.functional.normalize(pooled, dim=-1)
    features: Tensor = model.glovlm.project_images(pooled)
    return features


def _own_pooling(tower: Any, tokens: Tensor, pooled: Tensor) -> Callable[[Tensor], Tensor]:
    """Pooling of a tower, from tokens `[n, length, width]`: the one that gives its own vector."""
    norm = getattr(tower, "post_layernorm", None)
    ways = [getattr(tower, "head", None), getattr(tower, "pooler", None)]
    ways += [None if norm is None else lambda x: norm(x[:, 0]), lambda x: x[:, 0]]
    way: Callable[[Tensor], Tensor]
    for way in filter(None, ways):
        own = way(tokens.unsqueeze(0))
        if own.shape == pooled.shape and torch.allclose(own, pooled, rtol=1e-3, atol=1e-4):
            return way
    raise GloVLMError(
        f"{type(tower).__name__} pools its tokens in a way of its own, so patches cannot be "
        "compared with classes: use 'gradient' or 'occlusion'."
    )


@register_map
class Occlusion(MapMethod):
    """Occlusion: fall of the probability when a window of patches is blanked."""

    name = "occlusion"
    title = "Occlusion"
    unit = "how far the class's probability falls when the patch is blanked"
    citation = "Zeiler and Fergus 2014, arXiv:1311.2901"

    def draw(self, case: ExplainedImage) -> Tensor:
        view, side = case.view, case.window
        row = torch.arange(view.rows).unsqueeze(1) // side
        column = torch.arange(view.columns).unsqueeze(0) // side
        window = (row * (int(column.max()) + 1) + column).flatten()
        shown = window != torch.arange(int(window.max()) + 1).unsqueeze(1)
        whole = case.scores[0, case.target.index]
        return torch.from_numpy(whole - case.score_shown(shown))[window]


@register_map
class KeptPatches(MapMethod):
    """Patch selection of context-guided layers (method convlm)."""

    name = "kept"
    title = "Patches kept"
    unit = "share of the context-guided layers that keep the patch; the same for every class"
    citation = "ConVLM, doi:10.1016/j.inffus.2025.103737"
    of_class = False

    def draw(self, case: ExplainedImage) -> Tensor:
        model = case.model
        if not getattr(model.config, "context", None):
            raise GloVLMError(
                "Only a model with context-guided layers (method convlm) drops patches, and this "
                "one keeps all: use 'gradient' or 'occlusion'."
            )
        with torch.no_grad():
            layers = model.glovlm.kept_patches(**case.inputs)
        count = torch.zeros(case.view.rows * case.view.columns)
        for layer in layers:
            numbers = layer[0].cpu()
            count[numbers[numbers >= 0]] += 1  # -1 stands for all that were fused into one
        return count / len(layers)
