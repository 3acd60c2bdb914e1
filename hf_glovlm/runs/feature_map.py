"""Map of image features: their first two principal components, with the class texts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import read_json, write_json
from ..inference import embed_images, embed_prompts, resolve_device
from ..methods import get_method
from .config import MINI, TrainConfig
from .loading import Loader, task_classes

__all__ = ["map_features", "project", "read_maps", "write_maps"]

FILE = "maps.json"
MOST_IMAGES = 1_000  # points of a map; each class has its share of them


def write_maps(folder: Path, backbones: Mapping[str, TrainConfig], loader: Loader) -> None:
    """Write the maps of a study's backbones; those that are there stay, if made of the same.

    Args:
        folder: Of the study.
        backbones: Settings of one cell by the name of its backbone in the report.
        loader: Has the data and the backbones.
    """
    before = {one["backbone"]: one for one in read_maps(folder)}
    maps = []
    for name, config in backbones.items():
        made_from = json.loads(json.dumps(loader.inputs(config), default=str))
        kept = before.get(name)
        if kept is None or kept["made_from"] != made_from:
            try:
                kept = map_features(config, loader)
            except Exception as error:  # whatever it is, a picture is no reason to lose a study
                kept = {"classes": [], "note": f"No map: {error}"}
        maps.append({"backbone": name, "made_from": made_from, **kept})
    if maps != [*before.values()]:
        write_json(folder / FILE, {"kind": "maps", "maps": maps})


def read_maps(folder: Path) -> list[dict[str, Any]]:
    """The maps that `write_maps` wrote; none where there is no such file."""
    if not (folder / FILE).is_file():
        return []
    maps: list[dict[str, Any]] = read_json(folder / FILE).get("maps", [])
    return maps


def map_features(config: TrainConfig, loader: Loader) -> dict[str, Any]:
    """Principal components of the image features of a frozen backbone, before any adaptation.

    Args:
        config: Of a cell: data, backbone, prompts.
        loader: Has the data and the backbone.

    Returns:
        `explained` (part of the variance along both axes), `n_images`, `n_shown`, `classes` (a list
        of `name`, `n_shown`, `images` `[n, 2]`, `text` `[2]` or `None`) and `note`.
    """
    from ..data.folder import column

    rows, _, _ = loader.data(config)
    names: list[str] = rows.features["label"].names
    labels = np.array(column(rows, "label"))
    shown = _choose(labels, MOST_IMAGES)
    model, processor = loader.backbone(config.backbone or MINI, get_method("zero_shot"))
    images = embed_images(
        model, processor, rows.select(shown), device=resolve_device(config.device),
        cache=loader.features() if config.cache else None,
    )  # fmt: skip
    joint = bool(model.has_joint_space)
    texts = None
    if joint:
        prompts = [list(one.prompts) for one in task_classes(config, names)]
        texts = embed_prompts(model, processor, prompts)
    places, of_texts, explained = project(images, texts)
    own = labels[shown]
    return {
        "explained": [round(float(part), 4) for part in explained],
        "n_images": len(labels),
        "n_shown": len(shown),
        "classes": [
            {
                "name": name,
                "n_shown": int((own == k).sum()),
                "images": places[own == k].round(4).tolist(),
                "text": None if of_texts is None else of_texts[k].round(4).tolist(),
            }
            for k, name in enumerate(names)
        ],
        "note": "" if joint else "Towers that were never trained together: no class texts.",
    }


def project(
    images: NDArray[Any], texts: NDArray[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.float64]]:
    """Principal components of unit vectors, and other unit vectors along them.

    Images and texts lie in different places (Liang et al. 2022, modality gap), so each are centred
    on their own mean. The sign of an axis is that of its largest entry.

    Args:
        images: Features `[n, d]`.
        texts: Features of the classes `[K, d]`.

    Returns:
        Places of the images `[n, 2]` and of the texts `[K, 2]`, and the explained parts of the
        images' variance `[2]`.
    """

    def centred(features: NDArray[Any]) -> NDArray[np.float64]:
        wide = np.asarray(features, np.float64)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        unit = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
        return np.asarray(unit - unit.mean(0))

    points = centred(images)
    _, spread, axes = np.linalg.svd(points, full_matrices=False)
    axes = np.vstack([axes[:2], np.zeros((max(0, 2 - len(axes)), points.shape[1]))])
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], axis=1))
    axes *= np.where(signs == 0, 1, signs)
    total = float(np.square(spread).sum())
    explained = np.zeros(2)
    explained[: len(spread)] = np.square(spread[:2]) / total if total > 0 else 0
    return points @ axes.T, None if texts is None else centred(texts) @ axes.T, explained


def _choose(labels: NDArray[Any], most: int, seed: int = 0) -> list[int]:
    """Rows of the map: all, or of each class its share, drawn."""
    if len(labels) <= most:
        return [*range(len(labels))]
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for k in np.unique(labels):
        own = np.flatnonzero(labels == k)
        share = max(1, int(most * len(own) / len(labels)))
        chosen += rng.permutation(own)[:share].tolist()
    return sorted(chosen)
