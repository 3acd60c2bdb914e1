"""Other stains than those learned from: trained on one, tested on another, centred and not.

Patients are split in halves; a support of some images a class is drawn from one half, in the stains
that a model is to learn from, and the other half is tested, in each stain. All arms of a draw have
one split, and arms that learn from the same stains have one support, so that differences are paired
over patients and draws.

`python -m hf_glovlm.lab.stain_bench experiments/stains.yaml --data FOLDER --backbone NAME
--run ignored` prints a row for each arm and for each comparison.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..calibration.inputs import softmax
from ..data import all_rows, load_dataset
from ..data.folder import column
from ..data.stains import read_stains
from ..errors import GloVLMError
from ..inference import FeatureCache, embed_images
from ..inference.outlines import set_outline
from ..inference.stains import find_centres, fit_centres
from ..metrics import PairedRun, compute_metrics, paired_differences
from ..settings import read_yaml
from ..training import AdaptConfig, adapt_features

Row = dict[str, Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

METRICS = ("macro_auc", "balanced_accuracy")
MIN_PATIENTS = 3  # of each class on either side; a draw with fewer is drawn again
_MOST_TRIES = 10_000


@dataclass(frozen=True)
class Stained:
    """Labelled features with stain and patient of each.

    Attributes:
        features: By the way that they are centred, `[n, dim]` each.
        labels: Class numbers `[n]`.
        stains: `[n]`.
        patients: `[n]`.
        names: Of the classes.
    """

    features: Mapping[str, Floats]
    labels: Ints
    stains: NDArray[np.str_]
    patients: NDArray[np.str_]
    names: list[str]

    def select(self, kept: NDArray[np.bool_]) -> "Stained":
        """Some of the images; centres stay those of all."""
        features = {way: values[kept] for way, values in self.features.items()}
        of = (self.labels[kept], self.stains[kept], self.patients[kept])
        return Stained(features, *of, self.names)


def centre_all_ways(features: Floats, stains: Sequence[str | None]) -> dict[str, Floats]:
    """Features centred in each way that is compared, by the means of all images.

    Args:
        features: `[n, dim]`, not normalised.
        stains: Of each image.

    Returns:
        `none`; `stain`, as the package does; `raw`: means of features that are not normalised;
        `global`: one mean for all stains.
    """
    import torch

    ways = {"none": features}
    for way, by in (("stain", stains), ("global", ["all"] * len(stains))):
        centres, _ = fit_centres(features, by)
        values = centres(torch.from_numpy(features), find_centres(centres, by))
        ways[way] = values.numpy()
    own = np.array([stain or "" for stain in stains])
    means = {stain: features[own == stain].mean(0) for stain in set(own)}
    ways["raw"] = features - np.stack([means[stain] for stain in own])
    return ways


def draw_split(
    data: Stained, train: Sequence[str], test: Sequence[str], seed: int, draw: int
) -> tuple[NDArray[np.bool_], int]:
    """Draw the half of the patients to learn from.

    Args:
        data: All images.
        train: Stains in which each class needs 3 patients on that side.
        test: Stains in which each class needs 3 on the other.
        seed: Of all draws.
        draw: Number of this one.

    Returns:
        Which images are of these patients `[n]`, and how many draws were drawn again.

    Raises:
        GloVLMError: No draw has as many.
    """
    rng = np.random.default_rng([seed, draw])
    patients = np.unique(data.patients)
    for tries in range(_MOST_TRIES):
        half = rng.permutation(patients)[: len(patients) // 2]
        inside = np.isin(data.patients, half)
        if all(_enough(data, inside, s) for s in train) and all(
            _enough(data, ~inside, s) for s in test
        ):
            return inside, tries
    raise GloVLMError(
        f"No split into halves has {MIN_PATIENTS} patients of every class on both sides in "
        f"{', '.join({*train, *test})}: leave a class out."
    )


def _enough(data: Stained, side: NDArray[np.bool_], stain: str) -> bool:
    rows = side & (data.stains == stain)
    held = [len(np.unique(data.patients[rows & (data.labels == k)])) for k in _classes(data)]
    return min(held) >= MIN_PATIENTS


def _classes(data: Stained) -> list[int]:
    return [int(k) for k in np.unique(data.labels)]


def draw_support(data: Stained, among: NDArray[np.bool_], shots: int, seed: Sequence[int]) -> Ints:
    """Draw at most so many images of each class, one of each patient in turn."""
    rng = np.random.default_rng(list(seed))
    chosen: list[int] = []
    for k in _classes(data):
        rows = np.flatnonzero(among & (data.labels == k))
        rank = {p: i for i, p in enumerate(rng.permutation(np.unique(data.patients[rows])))}
        turn: dict[str, int] = {}
        keys = []
        for row in rng.permutation(rows):
            patient = data.patients[row]
            turn[patient] = turn.get(patient, -1) + 1
            keys.append((turn[patient], rank[patient], int(row)))
        chosen += [row for *_, row in sorted(keys)[:shots]]
    return np.array(chosen)


def _fit(
    data: Stained, way: str, support: Ints, method: str, seed: int
) -> Callable[[NDArray[np.bool_]], NDArray[np.float64]]:
    """Probabilities of tested images, by a method on features fitted on the support."""
    numbers = np.searchsorted(_classes(data), data.labels)
    values = data.features[way]
    fitted = adapt_features(method, values[support], numbers[support], seed=seed)
    return lambda test: softmax(fitted.predict_logits(values[test]).astype(np.float64))


Arm = tuple[str, str, str, int, str]  # stains learned from, tested, method, shots, centring
Tested = tuple[Ints, list[str], NDArray[np.float64]]  # labels, patients, probabilities


def _run_arms(
    data: Stained, part: Mapping[str, Any], run: Mapping[str, Any], seed: int
) -> tuple[dict[Arm, list[Tested]], int]:
    """All arms of a part over all draws, and how many draws were drawn again."""
    arms: dict[Arm, list[Tested]] = {}
    each = {f"each of {'+'.join(stains)}": stains for stains in part.get("train_each", ())}
    trains, tests = part["train"], part["test"]
    numbers = np.searchsorted(_classes(data), data.labels)
    every = [sorted({*chain(*stains)}) for stains in (trains, tests)]
    enough = part.get("enough") or dict(zip(("train", "test"), every, strict=True))
    sides = {"+".join(stains): np.isin(data.stains, stains) for stains in (*trains, *tests)}
    own = {stain: np.isin(data.stains, stain) for stain in every[0]}
    again = 0
    for draw in range(run["draws"]):
        if "tested_patients" in part:
            of = np.unique(data.patients[np.isin(data.stains, part["tested_patients"])])
            inside = ~np.isin(data.patients, of)
        else:
            inside, tries = draw_split(data, enough["train"], enough["test"], seed, draw)
            again += tries
        for name, shots in product([*map("+".join, trains), *each], run["shots"]):
            # Of one stain, the support is the same whether another is learned from beside it.
            within = {s: own[s] for s in each[name]} if name in each else {name: sides[name]}
            support = np.concatenate(
                [
                    draw_support(data, inside & rows, shots, [seed, draw, *stain.encode()])
                    for stain, rows in within.items()
                ]
            )
            for method, way in product(run["methods"], run["ways"]):
                predict = _fit(data, way, support, method, draw)
                for tested in map("+".join, tests):
                    test = ~inside & sides[tested]
                    of_test = (numbers[test], data.patients[test].tolist(), predict(test))
                    arms.setdefault((name, tested, method, shots, way), []).append(of_test)
    return arms, again


def _means(tested: Sequence[Tested]) -> dict[str, float | None]:
    """Mean of each metric over the draws in which it is defined."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for labels, _, probabilities in tested:
        measured = compute_metrics(labels, probabilities, n_resamples=0)["metrics"]
        for name in METRICS:
            if measured[name]["value"] is not None:
                values[name].append(measured[name]["value"])
    return {name: float(np.mean(v)) if v else None for name, v in values.items()}


def _compare(a: Sequence[Tested], b: Sequence[Tested], run: Mapping[str, Any]) -> Row:
    runs = [
        PairedRun(i, labels, patients, p, q)
        for i, ((labels, patients, p), (_, _, q)) in enumerate(zip(a, b, strict=True))
    ]
    compared = paired_differences(runs, METRICS, run["resamples"], run["seed"], unit="patients")
    return {
        name: {key: row[key] for key in ("value", "ci95", "verdict")}
        for name, row in compared.items()
    }


def _pairs(arms: Mapping[Arm, Any], reference: Mapping[str, str]) -> Iterator[tuple[str, Arm, Arm]]:
    """Compared arms: each centring with none, and what was learned from with a reference."""
    for arm in arms:
        train, test, method, shots, way = arm
        if way != "none":
            yield f"{way} - none", (train, test, method, shots, "none"), arm
        own = reference.get(test)
        other = (own or "", test, method, shots, way)
        if other in arms and own != train:
            yield f"learned from {train} - from {own}", other, arm


def bench_stains(
    run: Mapping[str, Any],
    data: str | Path,
    backbone: str,
    *,
    on_part: Callable[[str], None] | None = None,
) -> list[Row]:
    """Compare models on stains that they learned from and on others, centred and not.

    Args:
        run: `methods`, `shots`, `ways` (see `centre_all_ways`), `seed`, `draws`, `resamples` and
            `parts`; `outline`, if other than ignored. A part has a `name`, `train` and `test`
            (lists of lists of stains), and may have `train_each` (the same, with so many shots of
            each stain), `classes`, `paired` (stains that each patient must have), `enough` (see
            `draw_split`), `tested_patients` (those with a stain, in place of a draw), `without`
            (patients), `reference` (by what is tested, with what else was learned from is
            compared) and `descriptive` (no comparison).
        data: A folder of images whose table has the columns `patient_id` and `stain`.
        backbone: As `--backbone` takes it; its features come through the cache.
        on_part: Called with the name of each part.
    """
    rows = all_rows(load_dataset(str(data)))
    model, processor = load_backbone(backbone)
    set_outline(model, processor, AdaptConfig(outline=run.get("outline", "ignore")), rows)
    features = embed_images(model, processor, rows, cache=FeatureCache())
    stains = read_stains(rows)
    every = Stained(
        centre_all_ways(features, stains),
        np.asarray(column(rows, "label"), np.int64),
        np.array([stain or "" for stain in stains]),
        np.array(column(rows, "patient_id")),
        rows.features["label"].names,
    )
    results: list[Row] = []
    for part in run["parts"]:
        if on_part is not None:
            on_part(part["name"])
        results += _measure_part(_choose(every, part), part, run)
    return results


def _choose(data: Stained, part: Mapping[str, Any]) -> Stained:
    """Images of a part: of its classes and patients."""
    used = {stain for stains in (*part["train"], *part["test"]) for stain in stains}
    numbers = [data.names.index(name) for name in part.get("classes", data.names)]
    kept = np.isin(data.stains, [*used]) & np.isin(data.labels, numbers)
    for stain in part.get("paired", ()):
        kept &= np.isin(data.patients, np.unique(data.patients[data.stains == stain]))
    return data.select(kept & ~np.isin(data.patients, part.get("without", [])))


def _measure_part(data: Stained, part: Mapping[str, Any], run: Mapping[str, Any]) -> list[Row]:
    arms, again = _run_arms(data, part, run, run["seed"])
    about = {
        "part": part["name"],
        "images": len(data.labels),
        "patients": len(np.unique(data.patients)),
        "drawn_again": again,
    }
    keys = ("train", "test", "method", "shots", "centre")
    results: list[Row] = [
        {**about, **dict(zip(keys, arm, strict=True)), **_means(tested)}
        for arm, tested in arms.items()
    ]
    if part.get("descriptive"):
        return results
    return results + [
        {
            **about,
            "compared": what,
            **dict(zip(keys, b, strict=True)),
            **_compare(arms[a], arms[b], run),
        }
        for what, a, b in _pairs(arms, part.get("reference", {}))
    ]


def main() -> None:
    """Run the benchmark of a file and print its rows as JSON lines."""
    parser = argparse.ArgumentParser(description=bench_stains.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", required=True, help="Folder of images by class, with a table.")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--run", required=True, help="Which of the file's runs.")
    given = parser.parse_args()
    content = read_yaml(given.file)
    run = {**content["settings"], **content["runs"][given.run]}
    for row in bench_stains(run, given.data, given.backbone):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
