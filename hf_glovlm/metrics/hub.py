"""Metrics as `evaluate.Metric` objects, for users of the Hub's `evaluate` library."""

import importlib
from functools import cache
from typing import Any

import numpy as np

from ..arrays import check_cosines
from ..errors import GloVLMError, nearest
from .measuring import compute_metrics
from .table import METRICS, Metric


def evaluate_metric(name: str, **options: Any) -> Any:
    """A metric as an `evaluate.Metric`; needs neither network nor Hub.

    `compute(predictions=probabilities, references=labels)` returns `{name: value}`; with
    `n_resamples=2000` (and `groups=[...]`) also `<name>_ci95`, `<name>_note` and
    `<name>_undefined_resamples`. `alignment` and `similarity_gap` take cosines as predictions; of
    `quadratic_kappa` the class indices are the grades, or `grades=[...]` states those.

    Args:
        name: A name in `METRICS`.
        **options: Passed to `evaluate.Metric`. `keep_in_memory` is on by default, so
            that predictions about patients are not written to the shared cache folder.

    Raises:
        GloVLMError: If there is no such metric.
    """
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise GloVLMError(f"Expected one of {known}, found '{name}'.{nearest(name, METRICS)}")
    return _evaluate_class(name, METRICS[name])(**{"keep_in_memory": True} | options)


@cache
def _evaluate_class(name: str, row: Metric) -> type[Any]:
    # `import evaluate` pulls in torch and transformers (9 s), so it waits until someone asks. A
    # factory, because with a module `__getattr__` mypy would accept every misspelt name of this
    # module; import_module and type(), because evaluate has no types to import or inherit from.
    evaluate, datasets = map(importlib.import_module, ("evaluate", "datasets"))
    low, high = row.bounds
    ranks = {True: " Higher is better.", False: " Lower is better.", None: ""}[row.higher_is_better]

    def _info(self: Any) -> Any:
        table = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=f"{row.definition} Range: {low:g} to {high:g}.{ranks}",
            citation="",
            inputs_description="predictions: [n, K]; references: class indices [n].",
            features=datasets.Features(predictions=table, references=datasets.Value("int64")),
        )

    def _compute(self: Any, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"n_resamples": 0} | options
        if row.of_similarities:
            cosines = check_cosines(predictions)
            arguments["similarities"] = cosines
            predictions = np.full(cosines.shape, 1 / cosines.shape[1])
        if row.of_grades:
            arguments = {"grades": range(np.shape(predictions)[1])} | arguments
        entry = compute_metrics(references, predictions, **arguments)["metrics"][name]
        if arguments["n_resamples"] == 0:
            return {name: entry["value"]}
        return {name if key == "value" else f"{name}_{key}": v for key, v in entry.items()}

    # evaluate names a metric after its class: MacroAuc is macro_auc
    title = name.title().replace("_", "")
    return type(title, (evaluate.Metric,), {"_info": _info, "_compute": _compute})
