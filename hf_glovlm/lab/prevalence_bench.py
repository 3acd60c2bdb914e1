"""How often corrected percentages hold the truth: simulated biopsies whose fractions are known.

Each biopsy is a few objects drawn from class fractions and called by a classifier of known rates,
whose confusion matrix was measured on as many labelled objects of each class. The last class has
the prevalence that is asked for; two others share the rest 2 to 1. Of three classes' errors, three
quarters go to the next class (after the last: the first) and a quarter to the one after it.

`python -m hf_glovlm.lab.prevalence_bench experiments/counting.yaml` prints a row for each cell.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..settings import read_yaml
from ..slides.prevalence import LIMIT, estimate_fractions, informative_calls

Row = dict[str, Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_AT_ONCE = 200  # biopsies in one call: memory


def simulate_cell(
    classes: int,
    objects: int,
    accuracy: float,
    prevalence: float,
    labels: int,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Row:
    """Coverage and width of corrected percentages, over simulated biopsies.

    Args:
        classes: 2 or 3.
        objects: In each biopsy.
        accuracy: Probability that an object is called by its class, whichever that is; so the
            balanced accuracy.
        prevalence: Fraction of the last class.
        labels: Labelled objects of each class behind each confusion matrix.
        draws: Biopsies, each with a confusion matrix of its own.
        seed: Of everything.

    Returns:
        The setting; `corrected`, the share of biopsies whose calls are informative enough for a
        correction; over these, of the last class, `coverage` of the fraction, `own` of the share
        of the class in the biopsy itself, `width` of the intervals in points; and `others`, the
        least coverage of another class. `None` where nothing is corrected.

    Raises:
        GloVLMError: There are other than two or three classes.
    """
    if classes not in (2, 3):
        raise GloVLMError(f"Expected 2 or 3 classes, found {classes}.")
    rng = np.random.default_rng(
        [seed, classes, objects, round(100 * accuracy), round(100 * prevalence), labels]
    )
    others = {2: [1.0], 3: [2 / 3, 1 / 3]}[classes]
    fractions = np.array([*((1 - prevalence) * np.array(others)), prevalence])
    errors = {2: [1.0], 3: [3 / 4, 1 / 4]}[classes]
    row = np.array([accuracy, *((1 - accuracy) * np.array(errors))])
    rates = np.stack([np.roll(row, k) for k in range(classes)])
    true = rng.multinomial(objects, fractions, size=draws)
    calls = rng.multinomial(true, rates).sum(axis=1)
    tables = rng.multinomial(labels, rates, size=(draws, classes))
    low, high, informative = _correct(calls, tables, seed)

    def covered(values: Floats) -> NDArray[np.bool_]:
        return np.asarray((low <= values) & (values <= high))

    done = informative[:, -1]
    if not done.any():
        measured = dict.fromkeys(("coverage", "own", "width", "others"))
    else:
        of_fraction = covered(fractions)
        others_done = [of_fraction[informative[:, k], k] for k in range(classes - 1)]
        measured = {
            "coverage": float(of_fraction[done, -1].mean()),
            "own": float(covered(true / objects)[done, -1].mean()),
            "width": float(100 * (high - low)[done, -1].mean()),
            "others": min(float(each.mean()) for each in others_done if len(each)),
        }
    return {
        "classes": classes,
        "objects": objects,
        "accuracy": accuracy,
        "prevalence": prevalence,
        "labels": labels,
        "draws": draws,
        "corrected": float(done.mean()),
        **measured,
    }


def _correct(calls: Ints, tables: Ints, seed: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Bounds and which calls are informative, each `[draws, K]`; no draw is done twice."""
    classes = calls.shape[1]
    given = np.concatenate([calls, tables.reshape(len(calls), -1)], axis=1)
    rows, place = np.unique(given, axis=0, return_inverse=True)
    bounds = [
        estimate_fractions(
            part[:, :classes], part[:, classes:].reshape(-1, classes, classes), seed=seed
        )
        for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE))
    ]
    low, high = (
        np.concatenate(each)[place] for each in ([b.low for b in bounds], [b.high for b in bounds])
    )
    matrices, which = np.unique(tables.reshape(len(calls), -1), axis=0, return_inverse=True)
    enough = [informative_calls(m.reshape(classes, classes), seed=seed) >= LIMIT for m in matrices]
    return low, high, np.array(enough)[which]


def main() -> None:
    """Run the simulation of a file and print its rows as JSON lines."""
    parser = argparse.ArgumentParser(description=simulate_cell.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--draws", type=int, help="Biopsies a cell, instead of the file's.")
    parser.add_argument("--classes", type=int, help="Only the cells of so many classes.")
    parser.add_argument("--objects", type=int, help="Only the cells of so many objects.")
    given = parser.parse_args()
    run: Mapping[str, Any] = read_yaml(given.file)["run"]
    for grid in run["grids"]:
        for classes, *cell in itertools.product(
            *(grid[name] for name in ("classes", "objects", "accuracy", "prevalence", "labels"))
        ):
            if given.classes in (None, classes) and given.objects in (None, cell[0]):
                draws = given.draws or run["draws"]
                row = simulate_cell(classes, *cell, draws=draws, seed=run["seed"])
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
