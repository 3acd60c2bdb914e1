"""Classification metrics with bootstrap intervals over groups: arrays in, dict out.

Every interval is made (by `intervals`) from a bootstrap that draws groups with replacement, see
`resamples`; what a metric is stands in its row of `METRICS`.
"""

from .differences import (
    PairedRun,
    adjust_holm,
    compare_methods,
    paired_differences,
    summarise_draws,
)
from .hub import evaluate_metric
from .measuring import compute_metrics, compute_subgroups, recall_by_group
from .resamples import Resamples, Sample, mean_of
from .table import METRICS, Metric

__all__ = [
    "METRICS",
    "Metric",
    "PairedRun",
    "Resamples",
    "Sample",
    "adjust_holm",
    "compare_methods",
    "compute_metrics",
    "compute_subgroups",
    "evaluate_metric",
    "mean_of",
    "paired_differences",
    "recall_by_group",
    "summarise_draws",
]
