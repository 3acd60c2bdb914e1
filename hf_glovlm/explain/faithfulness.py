"""Faithfulness of heat maps to their model, and how much of the heat lies on the glomerulus.

Deletion and insertion (RISE, arXiv 1806.07421), heat inside an annotated glomerulus against its
area, and maps of the same model with its weights shuffled (arXiv 1810.03292).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..data.folder import ImageValue
from ..errors import GloVLMError
from ..inference import evaluation_mode
from ..intervals import count_effective_groups, mean_interval
from ..progress import counted
from .maps import HEAT_MAPS, ExplainedImage, HeatMap, explain, prepare_image

BOUNDS = {"heat": (0.0, 1.0), "area": (0.0, 1.0), "excess": (-1.0, 1.0)}

Curve = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curves:
    """Deletion and insertion curves: probability of a class as patches go or come, hottest first.

    Args:
        fractions: Share of the patches that were changed `[steps + 1]`, 0 to 1.
        deletion: Probability while patches are blanked; low is faithful.
        insertion: Probability while patches are revealed in a blank image; high is faithful.
        random_deletion: The same in random orders, their mean.
        random_insertion: The same in random orders, their mean.
    """

    fractions: Curve
    deletion: Curve
    insertion: Curve
    random_deletion: Curve
    random_insertion: Curve

    def areas(self) -> dict[str, float]:
        """Area under each curve, and what the map gains over random order (above 0 is better)."""
        areas = {
            name: float(np.trapezoid(getattr(self, name), self.fractions))
            for name in ("deletion", "insertion", "random_deletion", "random_insertion")
        }
        areas["deletion_gain"] = areas["random_deletion"] - areas["deletion"]
        areas["insertion_gain"] = areas["insertion"] - areas["random_insertion"]
        return areas


def measure_faithfulness(
    model: Any,
    processor: Any,
    image: ImageValue,
    heat: HeatMap,
    *,
    mask: ArrayLike | None = None,
    steps: int = 16,
    orders: int = 3,
    seed: int = 0,
    batch_size: int = 32,
) -> Curves:
    """Deletion and insertion curves of a map: the hottest patches are blanked or revealed first.

    Args:
        model: The classifier that the map is of.
        processor: Its processor.
        image: The image that the map is of.
        heat: The map.
        mask: Where the glomerulus is, if `explain` was given it.
        steps: In how many equal parts the patches go; at most one a patch.
        orders: Random orders to compare with.
        seed: Draws these.
        batch_size: Images at a time.

    Raises:
        GloVLMError: The map is not of this image, or `steps` or `orders` is below 1.
    """
    with evaluation_mode(model):
        text = heat.target if len(heat.classes) > len(model.config.id2label) else None
        target = heat.target if text is None else None
        case = prepare_image(
            model, processor, image, target=target, text=text, mask=mask, batch_size=batch_size
        )
        if case.view != heat.view:
            raise GloVLMError("The heat map is of another image, or of another model.")
        return _follow(case, heat, _follow_random(case, steps, orders, seed), seed)


def _follow_random(
    case: ExplainedImage, steps: int, orders: int, seed: int
) -> tuple[Curve, Curve, Curve, NDArray[np.int64]]:
    """Mean curves over random orders, and the numbers of patches at which they are taken."""
    if steps < 1 or orders < 1:
        raise GloVLMError(f"Expected 1 step and order or more, found {steps} and {orders}.")
    n = case.view.rows * case.view.columns
    cuts = np.unique(np.linspace(0, n, min(steps, n) + 1).round().astype(np.int64))
    rng = np.random.default_rng(seed)
    curves = np.mean([_along(case, rng.permutation(n), cuts) for _ in range(orders)], axis=0)
    return cuts / n, curves[0], curves[1], cuts


def _follow(
    case: ExplainedImage,
    heat: HeatMap,
    random: tuple[Curve, Curve, Curve, NDArray[np.int64]],
    seed: int,
) -> Curves:
    fractions, random_deletion, random_insertion, cuts = random
    # Equal patches fall in a drawn order, or a flat map would gain from how images are scanned.
    tie = np.random.default_rng([seed, 1]).permutation(heat.values.size)
    deletion, insertion = _along(case, np.lexsort((tie, -heat.values.ravel())), cuts)
    return Curves(fractions, deletion, insertion, random_deletion, random_insertion)


def _along(case: ExplainedImage, order: NDArray[np.int64], cuts: NDArray[np.int64]) -> Curve:
    """Probability while patches are blanked in this order, and while they are revealed `[2, s]`."""
    place = torch.from_numpy(np.argsort(order))
    gone = place < torch.from_numpy(cuts).unsqueeze(1)
    return case.score_shown(torch.cat([~gone, gone])).reshape(2, -1)


def heat_inside(heat: HeatMap, mask: ArrayLike) -> dict[str, float]:
    """Compare heat inside a mask with the mask's area, over what the model saw.

    Args:
        heat: A map; where it has negative values only the positive ones are heat.
        mask: `[height, width]` of the image; above 0 is inside.

    Returns:
        `heat` (share of the heat inside; with no heat at all that of the area), `area` (share of
        the area inside) and `auc` (chance that a patch inside is hotter than one outside, patches
        counted by how much of them lies in; a tie counts one half).
    """
    inside = heat.view.cover(np.asarray(mask) > 0).astype(np.float64).ravel()
    values = heat.values.astype(np.float64).ravel()
    hot, area = values.clip(min=0), float(inside.mean())
    share = float(hot @ inside / hot.sum()) if hot.sum() > 0 else area
    above = np.sign(values[:, None] - values[None, :]) / 2 + 0.5
    pairs = inside.sum() * (1 - inside).sum()
    auc = float(inside @ above @ (1 - inside) / pairs) if pairs > 0 else 0.5
    return {"heat": share, "area": area, "auc": auc}


def measure_maps(
    model: Any,
    processor: Any,
    images: Sequence[ImageValue],
    masks: Iterable[ArrayLike],
    *,
    methods: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    curves: bool = False,
    window: int = 1,
    steps: int = 16,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure the maps of many images with their masks, a row an image and method.

    Args:
        model: The classifier; it should not have learned from the images' slides.
        processor: Its processor.
        images: n images.
        masks: Where the glomerulus is in each `[height, width]`.
        methods: Names of `HEAT_MAPS`; all by default.
        targets: Class of each image; by default the one that is most probable.
        curves: Whether to measure deletion and insertion, too.
        window: For `occlusion`: side of the blank in patches.
        steps: See `measure_faithfulness`.
        seed: Draws random orders.

    Returns:
        Rows for `summarise_maps`, and per method that does not apply to this model, why.
    """
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    pieces = enumerate(zip(images, masks, strict=True))
    for number, (image, mask) in counted(pieces, "images", total=len(images)):
        target = None if targets is None else targets[number]
        with evaluation_mode(model):
            case = prepare_image(model, processor, image, target=target, mask=mask, window=window)
            random = _follow_random(case, steps, 1, seed + number) if curves else None
            for method in methods or HEAT_MAPS:
                if method in refused:
                    continue
                try:
                    heat = case.draw(method)
                except GloVLMError as error:
                    if number or method not in HEAT_MAPS:
                        raise
                    refused[method] = str(error)
                    continue
                row = {
                    "image": number,
                    "method": method,
                    "score": heat.score,
                    "glomerulus_blanked": heat.glomerulus_blanked[heat.index],
                    "context_blanked": heat.context_blanked[heat.index],
                    **heat_inside(heat, mask),
                }
                if random is not None:
                    row |= _follow(case, heat, random, seed + number).areas()
                rows.append(row)
    return rows, refused


def summarise_maps(
    rows: Sequence[dict[str, Any]],
    groups: Sequence[str],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Average the rows of `measure_maps`, with 95% intervals over groups.

    Args:
        rows: They may come from several models, if no image is in two of them.
        groups: Patient or slide of each image, by the rows' `image`.
        n_resamples: Bootstrap resamples of whole groups.
        seed: Of the bootstrap.

    Returns:
        Per method `images`, `groups` and a `{"value", "ci95"}` each for the mean of every column,
        `excess` (heat minus area) and `ratio` (mean heat over mean area).
    """
    summary: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        ids = [groups[row["image"]] for row in of]
        columns = {
            name: np.array([row[name] for row in of], np.float64)
            for name in of[0]
            if name not in ("image", "method")
        }
        ones = np.ones(len(of))
        columns["excess"] = columns["heat"] - columns["area"]
        means: dict[str, Any] = {
            name: _mean(values, ones, ids, n_resamples, seed, BOUNDS.get(name, (-np.inf, np.inf)))
            for name, values in columns.items()
        }
        heat, area = columns["heat"], columns["area"]
        means["ratio"] = _mean(heat, area, ids, n_resamples, seed, (0, np.inf))
        summary[method] = {"images": len(of), "groups": len(set(ids)), **means}
    return summary


def evaluate_maps(
    model: Any,
    processor: Any,
    images: Sequence[ImageValue],
    masks: Iterable[ArrayLike],
    groups: Sequence[str],
    **options: Any,
) -> dict[str, Any]:
    """Measure the maps of one model: `measure_maps`, then `summarise_maps`.

    Args:
        model: The classifier.
        processor: Its processor.
        images: n images.
        masks: Where the glomerulus is in each.
        groups: Patient or slide of each.
        **options: Of `measure_maps`.

    Returns:
        `methods` (see `summarise_maps`) and `not_applicable` (why, per method).

    Raises:
        GloVLMError: The numbers of images and groups differ, or there are none.
    """
    if not len(images) or len(images) != len(groups):
        raise GloVLMError(
            f"Expected one group an image, found {len(images)} images and {len(groups)} groups."
        )
    rows, refused = measure_maps(model, processor, images, masks, **options)
    return {"methods": summarise_maps(rows, groups), "not_applicable": refused}


def shuffle_weights(model: Any, seed: int = 0) -> Any:
    """Copy a classifier and shuffle the entries of each weight of its vision tower and head.

    What a map shows of the copy comes from the architecture and the image, not from what was
    learned.

    Args:
        model: The classifier.
        seed: Of the shuffling.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "text_model." not in name and weight.numel() > 1:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return other


def compare_with_shuffled(
    model: Any,
    processor: Any,
    images: Sequence[ImageValue],
    *,
    masks: Sequence[ArrayLike | None] | None = None,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    window: int = 1,
) -> dict[str, float]:
    """Correlate each map with that of the same model with its weights shuffled.

    Args:
        model: The classifier.
        processor: Its processor.
        images: The images.
        masks: Where the glomerulus is in each, see `explain`.
        methods: Names of `HEAT_MAPS`; by default all that apply.
        seed: Of the shuffling.
        window: For `occlusion`.

    Returns:
        Per method the mean rank correlation (Spearman) over the images. Near 0 is good: the maps
        depend on what was learned.
    """
    from scipy.stats import rankdata

    other = shuffle_weights(model, seed)
    correlations: dict[str, list[float]] = {}
    pairs = list(zip(images, masks or [None] * len(images), strict=True))
    for method in methods or HEAT_MAPS:
        for image, mask in pairs:
            options: dict[str, Any] = {"method": method, "mask": mask, "window": window}
            try:
                heat = explain(model, processor, image, **options)
            except GloVLMError:
                if methods:
                    raise
                break
            again = explain(other, processor, image, target=heat.target, **options)
            ranks = [rankdata(h.values.ravel()) for h in (heat, again)]
            flat = min(rank.std() for rank in ranks) == 0
            value = 0.0 if flat else float(np.corrcoef(*ranks)[0, 1])
            correlations.setdefault(method, []).append(value)
    return {method: float(np.mean(values)) for method, values in correlations.items()}


def _mean(
    numerator: Curve,
    denominator: Curve,
    groups: Sequence[str],
    n_resamples: int,
    seed: int,
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """A ratio of sums, with the t interval of a bootstrap that draws whole groups."""
    value = float(numerator.sum() / denominator.sum())
    names, group = np.unique(np.array(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        return {"value": value, "ci95": None}
    sums = np.stack([np.bincount(group, part) for part in (numerator, denominator)])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), n_resamples)
    above, below = drawn @ sums[0], drawn @ sums[1]
    effective = count_effective_groups(sums[1] / sums[1].sum())
    return {"value": value, "ci95": list(mean_interval(value, above / below, effective, bounds))}
