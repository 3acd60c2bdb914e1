"""Label draws, predictions and thresholds of the comparison of outlines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..calibration.inputs import softmax
from ..data import draw_episode
from ..data.folder import column
from ..errors import GloVLMError
from ..files import write_table
from ..training import adapt_features

if TYPE_CHECKING:
    from datasets import Dataset

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_DRAWS = 10_000  # numbers of draws that are tried


@dataclass(frozen=True)
class Draw:
    """Label draw: which rows are learned from, class by class in the order drawn, and tested.

    Attributes:
        number: Of the draw under the plan's seed.
        support: Rows for the most shots, by class.
        test: Sorted rows.
    """

    number: int
    support: tuple[Ints, ...]
    test: Ints

    def first(self, shots: int) -> Ints:
        """Support rows of so many shots at most a class."""
        return np.concatenate([rows[:shots] for rows in self.support])


def draw_supports(
    rows: "Dataset", groups: Sequence[str], *, shots: int, seed: int, draws: int, least: int
) -> tuple[list[Draw], int]:
    """Draw episodes with enough groups of each class on both sides.

    Draws are numbered from 0; those with fewer groups are passed over, so to speak drawn again.

    Args:
        rows: `file_name`, `label` and the group's column.
        groups: Group of each row.
        shots: Labelled images a class; all that there are where a side holds fewer.
        seed: Of the draws.
        draws: How many to keep.
        least: Groups of each class on each side.

    Returns:
        The draws, and how many were passed over.

    Raises:
        GloVLMError: There are not so many among the first 10,000.
    """
    labels, ids = np.asarray(column(rows, "label"), np.int64), np.asarray(groups)
    kept: list[Draw] = []
    for number in range(MOST_DRAWS):
        episode = draw_episode(rows, shots=shots, seed=seed, draw=number, allow_fewer=True)
        test = np.array(episode.test, np.int64)
        pool = np.setdiff1d(np.arange(len(labels)), test)
        held = [
            len(set(ids[side][labels[side] == k]))
            for side in (pool, test)
            for k in np.unique(labels)
        ]
        if min(held) >= least:
            kept.append(as_draw(number, episode.support, test, labels))
        if len(kept) == draws:
            return kept, number + 1 - draws
    raise GloVLMError(
        f"Only {len(kept)} of {MOST_DRAWS:,} draws have {least} groups of each class on both "
        f"sides; {draws} were asked for."
    )


def as_draw(number: int, support: Sequence[int], test: Ints, labels: Ints) -> Draw:
    """A draw of an episode's rows."""
    rows = np.array(support, np.int64)
    return Draw(number, tuple(rows[labels[rows] == k] for k in np.unique(labels)), test)


# ---------------------------------------------------------------------------------------- cells


@dataclass
class Cells:
    """Predictions of one arm: `[draws]` arrays `[test rows, K]` by method and shots."""

    draws: Sequence[Draw]
    probabilities: dict[tuple[str, int], list[Floats]] = field(default_factory=dict)

    def save(self, path: Path, plan: str) -> None:
        """Write parquet: a row a prediction, with `method`, `shots`, `draw`, `row`, `p_0` ..."""
        parts = [
            (method, shots, draw, p)
            for (method, shots), values in self.probabilities.items()
            for draw, p in zip(self.draws, values, strict=True)
        ]
        sizes = [len(p) for *_, p in parts]
        columns: dict[str, Any] = {
            "method": np.repeat([method for method, *_ in parts], sizes),
            "shots": np.repeat([shots for _, shots, *_ in parts], sizes),
            "draw": np.repeat([draw.number for _, _, draw, _ in parts], sizes),
            "row": np.concatenate([draw.test for _, _, draw, _ in parts]),
        }
        stacked = np.concatenate([p for *_, p in parts])
        columns |= {f"p_{k}": stacked[:, k] for k in range(stacked.shape[1])}
        write_table(path, columns, {b"plan": plan.encode()})

    @classmethod
    def load(cls, path: Path, plan: str, draws: Sequence[Draw]) -> "Cells | None":
        """Read what `save` wrote for the same plan; `None` where there is nothing of it."""
        if not path.is_file():
            return None
        table = pq.read_table(path)
        if (table.schema.metadata or {}).get(b"plan") != plan.encode():
            return None
        stacked = np.stack(
            [table[name].to_numpy() for name in table.column_names if name.startswith("p_")], axis=1
        )
        keys = list(zip(table["method"].to_pylist(), table["shots"].to_pylist(), strict=True))
        cells, at = cls(draws), 0
        while at < len(keys):
            key, values = keys[at], []
            for draw in draws:
                values.append(stacked[at : at + len(draw.test)])
                at += len(draw.test)
            cells.probabilities[key] = values
        return cells


def fit_cells(
    support: NDArray[Any],
    query: NDArray[Any],
    labels: Ints,
    draws: Sequence[Draw],
    methods: Sequence[str],
    shots: Sequence[int],
    seed: int,
) -> Cells:
    """Fit each method on each draw, and predict its test side.

    Args:
        support: Features `[n, dim]` of the images as they are learned from.
        query: Features `[n, dim]` of the same images as they are tested.
        labels: Class numbers `[n]`.
        draws: Rows of each draw.
        methods: Methods on features.
        shots: Labels a class.
        seed: Of everything random in a method.
    """
    cells = Cells(draws)
    for method in methods:
        for number in shots:
            cells.probabilities[method, number] = [
                fit(method, support, labels, draw.first(number), seed)(query[draw.test])
                for draw in draws
            ]
    return cells


def fit(method: str, features: NDArray[Any], labels: Ints, rows: Ints, seed: int) -> Any:
    """Function from features `[m, dim]` to probabilities `[m, K]`."""
    adapted = adapt_features(method, features[rows], labels[rows], seed=seed)
    return lambda x: softmax(adapted.predict_logits(x).astype(np.float64))


def left_out_scores(
    method: str,
    features: NDArray[Any],
    labels: Ints,
    groups: Sequence[str],
    rows: Ints,
    target: int,
    seed: int,
) -> tuple[Floats, NDArray[np.bool_]]:
    """Left-out probabilities of one class, see `left_out_probabilities`.

    Returns:
        Scores `[m]` of the rows that have one, and whether they are of the class.
    """
    kept, p = left_out_probabilities(method, features, labels, groups, rows, seed)
    return p[:, target], labels[kept] == target


def left_out_probabilities(
    method: str,
    features: NDArray[Any],
    labels: Ints,
    groups: Sequence[str],
    rows: Ints,
    seed: int,
) -> tuple[Ints, Floats]:
    """Probabilities of support rows, each of whose groups is left out of a fit in turn.

    A group that holds the only rows of a class cannot be left out: its rows have none.

    Returns:
        Rows that have probabilities `[m]`, group by group; the probabilities `[m, K]`.
    """
    ids = np.asarray(groups)
    kept: list[Ints] = []
    probabilities: list[Floats] = []
    for group in np.unique(ids[rows]):
        own = ids[rows] == group
        if len(np.unique(labels[rows[~own]])) < len(np.unique(labels[rows])):
            continue
        p = fit(method, features, labels, rows[~own], seed)(features[rows[own]])
        kept.append(rows[own])
        probabilities.append(p)
    if not kept:
        return np.empty(0, np.int64), np.empty((0, int(labels.max()) + 1))
    return np.concatenate(kept), np.concatenate(probabilities)


def choose_threshold(scores: Floats, truth: NDArray[np.bool_], rule: str) -> float | None:
    """Threshold of a probability, from which on an image is called.

    Args:
        scores: Left-out probabilities `[n]`.
        truth: Whether each is of the class.
        rule: `youden`: sensitivity + specificity is largest; `keep_90`: the highest that calls at
            least 90% of the class; halfway to the next lower score, as scores between are as good.

    Returns:
        `None` where either side has no score.
    """
    if not truth.any() or truth.all():
        return None
    candidates = np.unique(scores)[::-1]
    called = scores[None] >= candidates[:, None]
    sensitivity, others = called[:, truth].mean(1), called[:, ~truth].mean(1)
    if rule == "youden":
        best = int((sensitivity - others).argmax())
    elif rule == "keep_90":
        best = int((sensitivity >= 0.9).argmax())
    else:
        raise GloVLMError(f"Unknown rule '{rule}'; expected youden or keep_90.")
    lower = candidates[best + 1] if best + 1 < len(candidates) else 0.0
    return float((candidates[best] + lower) / 2)


def choose_rule(measured: Mapping[str, Mapping[str, float]], least: float = 0.9) -> str:
    """Threshold rule by its `sensitivity` and `specificity`.

    Of those whose sensitivity is enough the most specific, else the most sensitive.
    """
    enough = [rule for rule, row in measured.items() if row["sensitivity"] >= least]
    if enough:
        return max(enough, key=lambda rule: measured[rule]["specificity"])
    return max(measured, key=lambda rule: measured[rule]["sensitivity"])
