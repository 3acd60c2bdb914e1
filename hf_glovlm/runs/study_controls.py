"""Negative controls of a study: those of `controls` over the draws of its reference method."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import digest_value, read_json, write_json
from ..inference import embed_images, resolve_device
from ..inference.prediction import move_model
from ..methods import get_method
from ..progress import counted
from .config import MINI
from .controls import Draw, measure_controls, read_tables
from .loading import Loader
from .study_config import Cell, StudyConfig, short_name
from .workflow import read_task

__all__ = ["read_controls", "write_controls"]

FILE = "controls.json"


def write_controls(config: StudyConfig, folder: Path, loader: Loader) -> None:
    """Write the controls of every backbone and number of shots; those that are there stay.

    Args:
        config: The grid; nothing is measured unless it asks for controls.
        folder: Of the study.
        loader: Has the data and the backbones.
    """
    if not config.controls:
        return
    loader = loader if loader.keep else Loader(keep=True)  # all draws are of the same rows
    before = {(one["backbone"], one["shots"]): one for one in read_controls(folder, every=True)}
    measured = []
    for backbone, shots, cells in counted(_sections(config), "controls"):
        name = short_name(backbone)
        made_from = _made_from(config, cells, folder, loader)
        kept = before.get((name, shots))
        if kept is None or kept["made_from"] != made_from or not kept["controls"]:
            own = {"backbone": name, "shots": shots, "n_draws": len(cells)}
            try:
                kept = own | {"controls": _measure(config, cells, folder, loader)}
            except Exception as error:  # whatever it is, a control is no reason to lose a study
                kept = own | {"controls": {}, "note": f"No controls: {error}"}
            kept |= {"made_from": made_from}
        measured.append(kept)
        if before.get((name, shots)) != kept:  # a study that is killed goes on here
            before[name, shots] = kept
            write_json(folder / FILE, {"kind": "controls", "controls": [*before.values()]})
    if measured != [*before.values()]:
        write_json(folder / FILE, {"kind": "controls", "controls": measured})


def read_controls(folder: Path, *, every: bool = False) -> list[dict[str, Any]]:
    """Controls that `write_controls` wrote: `backbone`, `shots`, `n_draws`, `controls`.

    Args:
        folder: Of the study.
        every: Also what each was made from.
    """
    if not (folder / FILE).is_file():
        return []
    rows: list[dict[str, Any]] = read_json(folder / FILE).get("controls", [])
    return [{k: v for k, v in row.items() if every or k != "made_from"} for row in rows]


def _sections(config: StudyConfig) -> list[tuple[str, int, list[Cell]]]:
    """Cells of the reference method by backbone and number of shots."""
    sections: dict[tuple[str, int], list[Cell]] = {}
    for cell in config.cells():
        if cell.method.name == config.reference:
            sections.setdefault((cell.backbone, cell.shots), []).append(cell)
    return [(*key, cells) for key, cells in sections.items()]


def _made_from(
    config: StudyConfig, cells: Sequence[Cell], folder: Path, loader: Loader
) -> dict[str, Any]:
    """What decides the numbers: data, weights, settings and draws."""
    first = config.train_config(cells[0], folder)
    ignored = ("output_dir", "device", "cache", "draw", "save_model", "overwrite", "resume")
    settings = {k: v for k, v in first.to_repeat().items() if k not in ignored}
    inputs = json.loads(json.dumps(loader.inputs(first), default=str))
    return {
        "inputs": inputs,
        "settings": digest_value(json.loads(json.dumps(settings, default=str))),
        "draws": [cell.draw for cell in cells],
    }


def _measure(
    config: StudyConfig, cells: Sequence[Cell], folder: Path, loader: Loader
) -> dict[str, dict[str, Any]]:
    """Measure the controls over all draws of one backbone and number of shots."""
    configs = [config.train_config(cell, folder) for cell in cells]
    tasks = [read_task(one, loader) for one in configs]
    first, task = configs[0], tasks[0]
    model, processor = loader.backbone(first.backbone or MINI, get_method("zero_shot"))
    device = resolve_device(first.device)
    move_model(model, device)
    embed = partial(
        embed_images,
        model,
        processor,
        device=device,
        cache=loader.features() if first.cache else None,
    )
    draws = [
        Draw(one.episode.support, one.episode.test, of.seed + of.draw)
        for one, of in zip(tasks, configs, strict=True)
    ]
    used = [row for draw in draws for row in (*draw.support, *draw.test)]
    return measure_controls(
        read_tables(task.rows, used, embed, task.report.looks),
        draws,
        task.labels,
        task.groups,
        len(task.classes),
        n_resamples=first.n_resamples,
        seed=first.seed,
    )
