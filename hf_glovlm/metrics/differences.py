"""Paired differences of methods: a bootstrap over groups crossed with label draws."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import intervals
from ..arrays import check_groups, check_predictions
from ..errors import GloVLMError, nearest
from .measuring import make_entry, note_few
from .resamples import Floats, Sample, multiplicities, resample_groups, statistics
from .table import METRICS

_KEPT = 8_000_000  # groups times resamples whose multiplicities are drawn once for all runs, 64 MB


@dataclass(frozen=True, eq=False)
class PairedRun:
    """Paired run: two methods, `a` and `b`, on the test side of one label draw.

    Attributes:
        draw: Number of the label draw (episode).
        labels: Class indices, `[n]`.
        groups: Group of each image, `[n]`; the same id is the same group in every run.
        probabilities_a: `[n, K]`, rows sum to 1.
        probabilities_b: `[n, K]`, the same images in the same order.
    """

    draw: int
    labels: ArrayLike
    groups: Sequence[str]
    probabilities_a: ArrayLike
    probabilities_b: ArrayLike


def paired_differences(
    runs: Sequence[PairedRun],
    metrics: Sequence[str] = ("macro_auc", "balanced_accuracy"),
    n_resamples: int = 2000,
    seed: int = 0,
    *,
    unit: str = "groups",
) -> dict[str, dict[str, Any]]:
    """Paired differences of methods `b` and `a`: a bootstrap over groups crossed with draws.

    Label draws redraw the same few groups, so their spread alone is no interval. Each resample
    draws groups (from the union over all runs) and draws, both with replacement; the group
    multiplicities weight the images inside each drawn run, and the difference b - a is averaged
    over the drawn runs in which it is defined.

    Args:
        runs: One `PairedRun` per draw; test sides may differ.
        metrics: Names in `METRICS` that rank methods and need no similarities.
        n_resamples: Bootstrap resamples, at least 1.
        seed: Seed of the bootstrap.
        unit: What a group is, in the plural, for the verdict (`"slides"`).

    Returns:
        Per metric `value` (mean of b - a over draws), `ci95`, `note`, `n_groups`, `n_draws`,
        `undefined_resamples` (no drawn run was defined), `undefined_runs` (drawn runs left out of
        a mean, over all resamples), `verdict` on b: "better" or "worse" if the interval excludes 0,
        else "not distinguishable with N <unit>"; `p_value` of no difference (see
        `intervals.no_difference`), not adjusted; `a` and `b`, the mean over draws of each alone
        with its interval (`value`, `ci95`).

    Raises:
        GloVLMError: If there is no run, a draw comes twice, or an input is bad.
    """
    return compare_methods({"b": runs}, metrics, n_resamples, seed, unit=unit)["b"]


def compare_methods(
    methods: Mapping[str, Sequence[PairedRun]],
    metrics: Sequence[str] = ("macro_auc", "balanced_accuracy"),
    n_resamples: int = 2000,
    seed: int = 0,
    *,
    unit: str = "groups",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired differences of several methods from one: `paired_differences` of each, by its name.

    Methods whose runs hold the very same draws, labels, groups and probabilities of `a` (the same
    objects) are compared together: what is of `a` and of the resamples is computed once.

    Args:
        methods: The runs of each method `b`; the others as `paired_differences` takes them.
        metrics: Names in `METRICS`.
        n_resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        unit: What a group is, in the plural.

    Raises:
        GloVLMError: As `paired_differences`.
    """
    for name in metrics:
        if name not in METRICS:
            raise GloVLMError(f"Expected a metric, found '{name}'.{nearest(name, METRICS)}")
        if METRICS[name].higher_is_better is None:
            raise GloVLMError(f"Expected a metric that ranks methods, '{name}' only describes.")
        if METRICS[name].of_similarities:
            raise GloVLMError(f"Expected a metric of probabilities, '{name}' is one of cosines.")
        if METRICS[name].of_grades:
            raise GloVLMError(f"Expected a metric of any classes, '{name}' is one of grades.")
        if METRICS[name].scale == "none":
            raise GloVLMError(
                f"Expected a metric that has an interval, '{name}' has none: its bootstrap is "
                "biased. Compare macro_auc, balanced_accuracy or brier."
            )
    alike: dict[Any, list[str]] = {}
    for name, runs in methods.items():
        if not runs or n_resamples < 1:
            given = f"{len(runs)} runs and {n_resamples} resamples"
            raise GloVLMError(f"Expected at least one run and one resample, found {given}.")
        if len({run.draw for run in runs}) < len(runs):
            raise GloVLMError("Expected one run per draw, found a draw twice: pass each draw once.")
        parts = ((id(r.labels), id(r.groups), id(r.probabilities_a), r.draw) for r in runs)
        alike.setdefault(tuple(parts), []).append(name)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for names in alike.values():
        same = [methods[name] for name in names]
        rows |= zip(names, _compare(same, metrics, n_resamples, seed, unit), strict=True)
    return {name: rows[name] for name in methods}


def _compare(
    methods: Sequence[Sequence[PairedRun]],
    metrics: Sequence[str],
    n_resamples: int,
    seed: int,
    unit: str,
) -> list[dict[str, dict[str, Any]]]:
    """`compare_methods` of runs that differ in the probabilities of b alone."""
    runs = methods[0]
    checked, known = [], dict[int, NDArray[np.str_]]()  # runs often share their groups
    for run, *others in zip(*methods, strict=True):
        given = (run.probabilities_a, run.probabilities_b, *(r.probabilities_b for r in others))
        pairs = [check_predictions(run.labels, p) for p in given]
        y, key = pairs[0][0], id(run.groups)
        if key not in known or len(known[key]) != len(y):
            known[key] = check_groups(run.groups, len(y))
        checked.append((y, [p for _, p in pairs]))
    n_classes = {p.shape[1] for _, tables in checked for p in tables}
    if len(n_classes) > 1:
        raise GloVLMError(f"Expected the same classes in all runs, found {n_classes} columns.")

    union = np.unique(np.concatenate(list(known.values())))
    held = np.zeros((len(union), n_classes.pop()), dtype=bool)
    shares = np.zeros((2, len(union)))  # of images, and as a mean over classes
    rng = np.random.default_rng(seed)
    drawn = multiplicities(rng, len(runs), n_resamples)
    points = np.empty((len(methods), len(metrics), len(runs)))
    total, defined = np.zeros((2, len(methods), len(metrics), n_resamples))
    each = np.empty((1 + len(methods), len(metrics), len(runs)))  # of a, then of every b
    of_a_total, of_a_defined = np.zeros((2, len(metrics), n_resamples))
    most = max(len(labels) for labels, *_ in checked)
    # run by run, so that the tables of one are held at a time; all runs share the groups drawn
    draw = partial(resample_groups, len(union), n_resamples, most)
    kept = list(draw(rng)) if len(union) * n_resamples <= _KEPT else None
    numbers = {key: np.unique(ids, return_inverse=True) for key, ids in known.items()}
    for at, (y, tables) in enumerate(checked):
        own, group = numbers[id(runs[at].groups)]
        place = np.searchsorted(union, own)
        held[place[group], y] = True
        of_a, *of_b = (Sample(y, p, group, len(own), None, n_resamples) for p in tables)
        for over_classes in (False, True):
            shares[int(over_classes), place] += of_a.shares(over_classes) / len(runs)
        each[:, :, at] = _values([of_a, *of_b], metrics, np.ones((len(own), 1)))[:, :, 0]
        points[:, :, at] = each[1:, :, at] - each[0, :, at]
        for columns, weights in kept or draw(deepcopy(rng)):
            weights = weights if len(own) == len(union) else weights[place]
            values = _values([of_a, *of_b], metrics, weights)
            for rows, (above, below) in (
                (values[1:] - values[0], (total, defined)),
                (values[0], (of_a_total, of_a_defined)),
            ):
                undefined = np.isnan(rows)
                times = np.where(undefined, 0, drawn[at, columns])
                above[..., columns] += np.where(undefined, 0, rows) * times
                below[..., columns] += times
    resampled, of_a_alone = (
        np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
        for above, below in ((total, defined), (of_a_total, of_a_defined))
    )

    def alone(of: int, i: int, name: str) -> dict[str, Any]:
        mean = summarise_draws(each[of, i].tolist())["mean"]
        over, scale = METRICS[name].over_classes, METRICS[name].scale
        # the labels are the same, so b is undefined where a is, and b is a and their difference
        drawn_values = of_a_alone[i] if of == 0 else of_a_alone[i] + resampled[of - 1, i]
        row = make_entry(
            np.nan if mean is None else mean,
            drawn_values,
            shares[int(over)],
            METRICS[name].bounds,
            scale,
        )
        return {"value": row["value"], "ci95": row["ci95"]}

    def entry(of: int, i: int, name: str) -> dict[str, Any]:
        spread = summarise_draws(points[of, i].tolist())
        lost = len(runs) - spread["n_draws"]
        low, high = METRICS[name].bounds
        at_bound = METRICS[name].scale == "log-odds" and abs(spread["mean"] or 0) >= high - low
        row = make_entry(
            np.nan if spread["mean"] is None else spread["mean"],
            resampled[of, i],
            shares[int(METRICS[name].over_classes)],
            (low - high, high - low),
            # at its very bound a difference has no spread, and every group is one trial
            "log-odds" if at_bound else "plain",
            f"undefined in {lost} of {len(runs)} draws" if lost else "",
            note_few(len(union), held.sum(0).min()),
        )
        p_value = None
        if row["ci95"]:
            groups = intervals.count_effective_groups(shares[int(METRICS[name].over_classes)])
            drawn_values = resampled[of, i][~np.isnan(resampled[of, i])]
            p_value = intervals.no_difference(row["value"], drawn_values, groups)
        low, high = row["ci95"] or (0, 0)
        verdict = f"not distinguishable with {len(union)} {unit}"
        if low > 0 or high < 0:
            verdict = "better" if (low > 0) == METRICS[name].higher_is_better else "worse"
        return row | {
            "n_groups": len(union),
            "n_draws": len(runs),
            "undefined_runs": int(n_resamples * len(runs) - defined[of, i].sum()),
            "verdict": verdict,
            "p_value": p_value,
            "a": alone(0, i, name),
            "b": alone(1 + of, i, name),
        }

    return [
        {name: entry(of, i, name) for i, name in enumerate(metrics)} for of in range(len(methods))
    ]


def summarise_draws(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and spread of one metric over label draws: no interval, since groups are not redrawn.

    Args:
        values: One value per draw; None or NaN where the metric is undefined.

    Returns:
        `mean`, `sd` (n - 1; None for fewer than two values), `n_draws` (defined ones), `note`.

    Raises:
        GloVLMError: If there is no draw.
    """
    if len(values) == 0:
        raise GloVLMError("Expected the value of at least one draw, found none: run a draw first.")
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    kept = array[~np.isnan(array)]
    note = "spread over label draws, not an interval over groups"
    if len(kept) < len(array):
        note += f"; undefined in {len(array) - len(kept)} of {len(array)} draws"
    return {
        "mean": float(kept.mean()) if len(kept) else None,
        "sd": float(kept.std(ddof=1)) if len(kept) > 1 else None,
        "n_draws": len(kept),
        "note": note,
    }


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number: Holm's step-down procedure.

    Of those below .05 the chance that any at all is by chance is 5% at most, however the
    comparisons depend on each other (Holm, Scand J Statist 1979;6:65).

    Args:
        p_values: Of all comparisons of a family; `None` where there is none, which does not count.

    Returns:
        At its place, each adjusted, 1 at most.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _values(samples: Sequence[Sample], metrics: Sequence[str], weights: Floats) -> Floats:
    """Metrics of each sample, `[samples, metrics, R]`, under weightings `[G, R]`."""
    functions = {name: METRICS[name].function for name in metrics}
    rows = (statistics(functions, sample, weights).values() for sample in samples)
    return np.stack([np.concatenate(list(row)) for row in rows])
