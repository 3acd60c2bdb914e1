"""Configuration of a study: the grid of backbones, methods, shots and label draws."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.splits import EPISODES
from ..errors import GloVLMError, nearest
from ..files import is_plain_name, read_text
from ..inference import resolve_device
from ..metrics import METRICS
from ..settings import Settings, read_values, setting, shown
from .config import MINI, TrainConfig, choose_backbone

__all__ = [
    "Cell",
    "StudyConfig",
    "StudyGoal",
    "StudyMethod",
    "check_names",
    "read_frozen",
    "short_name",
]

COMPARED = ("macro_auc", "balanced_accuracy")
MOST_CELLS = 100_000
RECORDED = "reference_logistic_regression"  # what a file of frozen episodes may hold per draw
_OF_CELL = {"data", "output_dir", "backbone", "method", "shots", "draw"}
_OF_CELL |= {"overwrite", "resume", "save_model", "controls"}
_SETTINGS = {f.name for f in fields(TrainConfig)} - _OF_CELL


@dataclass(frozen=True)
class StudyMethod:
    """Method of a study, with its settings and its label draws: one line of the report.

    Attributes:
        name: What the report and the folders call it.
        method: A name of `glovlm methods`.
        draws: Numbers of the label draws.
        settings: Fields of `TrainConfig`, over those of the study.
    """

    name: str
    method: str
    draws: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyGoal:
    """Goal of a study: what a method shall reach, written before it is run.

    Attributes:
        method: A line of the report.
        metric: A metric that is summarised; of those compared for a gain.
        shots: Of which number of shots; of each if not given.
        backbone: Of which backbone; of each if not given.
        least: What its mean over draws shall be at least.
        most: What it shall be at most.
        gain: What its paired difference from the reference shall be at least, with an interval
            that excludes 0.
    """

    method: str
    metric: str = "macro_auc"
    shots: int | None = None
    backbone: str | None = None
    least: float | None = None
    most: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Cell:
    """Cell of the grid: one run; `name` is its folder below `cells/`."""

    backbone: str
    method: StudyMethod
    shots: int
    draw: int

    @cached_property
    def name(self) -> str:
        """Path below `cells/`."""
        return f"{short_name(self.backbone)}/{self.method.name}/{self.shots}/draw-{self.draw:02d}"


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Configuration of a study: the grid."""

    data: str = setting(help="Folder, parquet file, or Hub id.", group="Data")
    methods: tuple[StudyMethod, ...] = setting(
        help="The lines of the report: names of methods, or mappings of a `name`, a `label` for "
        "the report, `draws` and settings of `train`.",
        group="Method",
        form="a list of methods",
    )
    backbones: tuple[str, ...] = setting(help="As `train` takes one.", group="Method")
    shots: tuple[int, ...] = setting(
        (8,), help="Labelled images per class; one or a list.", group="Labels", least=0, most=10**6
    )
    reference: str = setting(
        "linear_probe", help="The line that the others are compared with.", group="Method"
    )
    settings: dict[str, Any] = setting(
        factory=dict,
        help="In the YAML file beside these: settings of `train` for every cell (`episodes`, "
        "`seed`, `prompts`, ...), and `draws`, the number of label draws or a list of them.",
        group="Labels",
    )
    goals: tuple[StudyGoal, ...] = setting(
        (),
        help="What shall be reached, each a mapping of `method`, `metric`, `shots`, `backbone` and "
        "one of `least`, `most` or `gain` (over the reference); those missed are named first.",
        group="Method",
        form="a list of goals",
    )
    controls: bool = setting(
        False,
        help="Also measure the negative controls, over the draws of the reference method.",
        group="Output",
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """Configuration from the values of a YAML file.

        Args:
            values: `data`, `methods` (names, or mappings of `name`, a `label` for the report,
                `draws` and fields of `TrainConfig`), `backbones`, `shots` (one or a list), `draws`
                (a number or a list; by default all of the episodes file, else 10), `reference`,
                `goals` (mappings of the fields of `StudyGoal`), `controls`, and fields of
                `TrainConfig` for every cell.

        Raises:
            GloVLMError: A key is unknown or missing, a value is wrong, a name comes twice.
        """
        own = dict(values)
        for key in ("data", "methods"):
            if not own.get(key):
                raise GloVLMError(f"A study needs '{key}:'; its configuration has none.")
        data, methods, reference = own.pop("data"), own.pop("methods"), own.pop("reference", None)
        named = _listed(own.pop("backbones", own.pop("backbone", None)) or [])
        backbones = named or [MINI]
        frozen_shots, frozen = read_frozen(own.get("episodes"))
        shots = _listed(own.pop("shots", frozen_shots or 8))
        draws = own.pop("draws", sorted(frozen) or 10)
        if frozen and shots != [frozen_shots]:
            raise GloVLMError(
                f"The frozen episodes have {frozen_shots} shots, the study asks for {shots}: leave "
                "'shots:' or 'episodes:' out."
            )
        lines = tuple(_read_method(given, draws, frozen) for given in _listed(methods))
        reference = str(reference or "linear_probe")
        names = [line.name for line in lines]
        for listed in (names, [short_name(str(b)) for b in backbones]):
            if len(set(listed)) < len(listed):
                raise GloVLMError(f"A name comes twice in {', '.join(listed)}: give a 'label:'.")
        if reference not in names:
            raise GloVLMError(
                f"The reference '{reference}' is none of the methods {', '.join(names)}."
                f"{nearest(reference, names)}"
            )
        controls = own.pop("controls", False)
        goals = tuple(
            _read_goal(given, names, reference, shots, [short_name(str(b)) for b in backbones])
            for given in _listed(own.pop("goals", None) or [])
        )
        known = {"data", "methods", "backbones", "shots", "draws", "reference", "goals"}
        settings = _settings(own, known | {"controls"})
        study = cls(
            data, lines, tuple(backbones), tuple(shots), reference, settings, goals, controls
        )
        for device in {study.train_config(cell, "").device for cell in study.extremes()}:
            resolve_device(device)
        if not named:
            choose_backbone(None, data)
        return study

    def check(self) -> None:
        """Rules over several settings."""
        runs = sum(len(line.draws) for line in self.methods) * len(self.backbones) * len(self.shots)
        if runs > MOST_CELLS:
            raise GloVLMError(
                f"A study has at most {MOST_CELLS:,} cells, and these would be {runs:,}: leave "
                "draws, shots, backbones or methods out."
            )

    def cells(self) -> list[Cell]:
        """Every cell; all methods of a draw before the next draw, so that a part compares too."""
        return [
            Cell(backbone, method, shots, draw)
            for backbone in self.backbones
            for shots in self.shots
            for draw in sorted({d for m in self.methods for d in m.draws})
            for method in self.methods
            if draw in method.draws
        ]

    def extremes(self) -> list[Cell]:
        """The cells of the first and last draw of each line: the others differ in it alone."""
        return [
            Cell(backbone, method, shots, draw)
            for backbone in self.backbones
            for shots in self.shots
            for method in self.methods
            for draw in {min(method.draws), max(method.draws)}
        ]

    def train_config(self, cell: Cell, output_dir: str | Path) -> TrainConfig:
        """Training configuration of a cell."""
        values = {
            **self.settings,
            **cell.method.settings,
            "data": self.data,
            "output_dir": str(Path(output_dir) / "cells" / cell.name),
            "backbone": cell.backbone,
            "method": cell.method.method,
            "shots": cell.shots,
            "draw": cell.draw,
            "save_model": False,
        }
        try:
            return TrainConfig(**values)
        except GloVLMError as error:
            raise GloVLMError(f"'{cell.method.name}' of the study: {error}") from None


def check_names(cells: Sequence[Cell]) -> None:
    """Refuse names that are no folder below `cells/`, or one folder for two lines."""
    lines = {(cell.backbone, cell.method.name) for cell in cells}
    for backbone, method in sorted(lines):
        for name in (short_name(backbone), method):
            if not is_plain_name(name):
                raise GloVLMError(
                    f"The study keeps its cells in folders of these names, and '{name}' cannot be "
                    "one: give a 'label:' of letters, digits, '-' and '_', or a backbone's folder "
                    "by another path."
                )
    if len({cell.name.casefold() for cell in cells}) < len(cells):
        raise GloVLMError("Two lines of the study would share a folder: give them a 'label:' each.")


def short_name(backbone: str) -> str:
    """Name a backbone for folders and headings: the last part of each path or Hub id."""
    places = [os.path.abspath(Path(part).expanduser()) for part in backbone.split("+")]
    return "+".join(Path(place).name for place in places)


# ------------------------------------------------------------------------- reading the settings


def _read_method(given: Any, draws: Any, frozen: Mapping[int, Any]) -> StudyMethod:
    line = dict(given) if isinstance(given, dict) else {"name": given}
    method, numbers = line.pop("name", None), line.pop("draws", draws)
    name = line.pop("label", method)
    plain = is_plain_name(str(name)) and re.fullmatch(r"[\w.-]+", str(name))
    if not isinstance(method, str) or not plain:
        raise GloVLMError(
            f"Expected the name of a method, or 'name:' with a 'label:' of letters, digits, '-' "
            f"and '_'; found {given!r}."
        )
    if type(numbers) is int and numbers > MOST_CELLS:
        raise GloVLMError(f"A study has at most {MOST_CELLS:,} draws; found {shown(numbers)}.")
    chosen = list(range(numbers)) if type(numbers) is int else numbers
    good = isinstance(chosen, list) and all(type(n) is int and n >= 0 for n in chosen)
    if not good or not chosen or len(set(chosen)) < len(chosen):
        raise GloVLMError(f"Expected draws as a number or a list of different ones: {numbers!r}.")
    absent = sorted(set(chosen) - set(frozen))
    if frozen and absent:
        raise GloVLMError(
            f"Method '{name}' asks for draw {absent[0]}, and the episodes file holds "
            f"{len(frozen)} draws, {min(frozen)} to {max(frozen)}."
        )
    return StudyMethod(str(name), method, tuple(chosen), _settings(line, {"label", "draws"}))


def _read_goal(
    given: Any,
    methods: Sequence[str],
    reference: str,
    shots: Sequence[Any],
    backbones: Sequence[str],
) -> StudyGoal:
    known = [f.name for f in fields(StudyGoal)]
    if not isinstance(given, dict) or not {"method"} <= set(given) <= set(known):
        raise GloVLMError(f"Expected a goal as a mapping of {', '.join(known)}; found {given!r}.")
    bounds = [key for key in ("least", "most", "gain") if given.get(key) is not None]
    numbers = all(type(given[key]) in (int, float) for key in bounds)
    if len(bounds) != 1 or not numbers:
        raise GloVLMError(
            f"A goal has a number as one of 'least', 'most' and 'gain'; found {given!r}."
        )
    goal = StudyGoal(**given)
    metrics = COMPARED if goal.gain is not None else [k for k, m in METRICS.items() if m.summarised]
    for value, listed, what in (
        (goal.method, methods, "method"),
        (goal.metric, metrics, "metric"),
        (goal.shots, [None, *shots], "shots"),
        (goal.backbone, [None, *backbones], "backbone"),
    ):
        if value not in listed:
            options = ", ".join(str(one) for one in listed if one is not None)
            near = nearest(str(value), [str(one) for one in listed])
            raise GloVLMError(f"A goal's {what} is one of {options}; found {value!r}.{near}")
    if goal.gain is not None and goal.method == reference:
        raise GloVLMError(f"A goal asks for a gain of '{reference}' over itself: name another.")
    return goal


def _settings(values: Mapping[str, Any], also: set[str]) -> dict[str, Any]:
    for key in values:
        if key not in _SETTINGS:
            near = nearest(str(key), _SETTINGS | also)
            raise GloVLMError(f"A study has no setting '{key}'.{near}")
    return read_values(TrainConfig, values)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def read_frozen(path: str | None) -> tuple[int | None, dict[int, dict[str, float]]]:
    """Shots of an episodes file, and what it records of each draw; nothing without a file."""
    if path is None:
        return None, {}
    try:
        content = json.loads(read_text(Path(path).expanduser(), EPISODES))
        draws = {int(d["draw"]): d.get(RECORDED) or {} for d in content["draws"]}
        return int(content["shots"]), draws
    except GloVLMError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GloVLMError(f"{path} is not a file of frozen episodes as a run writes it.") from None
