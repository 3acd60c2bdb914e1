"""Tables of a study: its cells and its summary, as CSV and as parquet.

Tidy: one row a cell, or one row a backbone, method, number of shots and metric. The CSV file is for
people: a text that a spreadsheet would take for a formula begins with an apostrophe in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_csv, write_table
from ..metrics import METRICS
from ..tables import as_text

__all__ = ["CELL_COLUMNS", "SUMMARY_COLUMNS", "write_tables"]

CELL_COLUMNS = {
    "backbone": "Last part of its path or Hub id.",
    "method": "Line of the study.",
    "shots": "Labelled images per class.",
    "draw": "Number of the label draw.",
    "status": "`done`, `failed` or `missing`.",
    "error": "Why it failed.",
    "images": "Test images.",
    "groups": "Patients (cases, slides) of these.",
    "labels": "Labels spent, those of the validation too.",
    "trainable_parameters": "Of the method.",
    "seconds": "Of the whole cell.",
    "peak_memory_mib": "Highest memory of its process, in MiB.",
    **{name: row.definition for name, row in METRICS.items()},
}
SUMMARY_COLUMNS = {
    "backbone": CELL_COLUMNS["backbone"],
    "method": CELL_COLUMNS["method"],
    "shots": CELL_COLUMNS["shots"],
    "metric": "As the columns of the cells are called.",
    "draws": "Label draws in which it is defined.",
    "mean": "Mean over label draws.",
    "sd": "Standard deviation over label draws: no interval.",
    "low": "Lower bound of the 95% interval of the mean, over groups crossed with draws.",
    "high": "Upper bound.",
    "reference": "Line that it is compared with.",
    "paired_draws": "Draws on identical splits and supports.",
    "difference": "Mean paired difference, the reference subtracted.",
    "difference_low": "Lower bound of its 95% interval, over groups crossed with draws.",
    "difference_high": "Upper bound.",
    "p_value": "Of no difference, two-sided.",
    "p_holm": "The same, adjusted for all comparisons of the metric in the study (Holm).",
    "verdict": "`better`, `worse` or `not distinguishable ...`, by the interval.",
    "labels_least": "Labels spent in a draw, the least.",
    "labels_most": "The most.",
    "trainable_parameters": CELL_COLUMNS["trainable_parameters"],
    "median_seconds": "Median over the cells.",
    "peak_memory_mib": CELL_COLUMNS["peak_memory_mib"],
}


def write_tables(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `cells` and `summary`, each as `.csv` and `.parquet`.

    Args:
        folder: Of the study.
        report: Content of `report.json`.
    """
    tables = (("cells", CELL_COLUMNS, _cells(report)), ("summary", SUMMARY_COLUMNS, _rows(report)))
    for name, columns, rows in tables:
        each = [[row.get(column) for column in columns] for row in rows]
        write_csv(folder / f"{name}.csv", [*columns], ([*map(as_text, row)] for row in each))
        write_table(folder / f"{name}.parquet", _typed(columns, each), metadata={
            f"column {column}": meaning for column, meaning in columns.items()
        })  # fmt: skip


_TEXTS = {"backbone", "method", "metric", "status", "error", "reference", "verdict"}
_COUNTS = {"shots", "draw", "images", "groups", "labels", "trainable_parameters", "draws"}
_COUNTS |= {"paired_draws", "labels_least", "labels_most"}


def _typed(columns: Mapping[str, str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Columns with one type each, also where all of it is empty."""
    import pyarrow as pa

    def kind(name: str) -> Any:
        if name in _TEXTS:
            return pa.string()
        return pa.int64() if name in _COUNTS else pa.float64()

    return {name: pa.array([row[k] for row in rows], kind(name)) for k, name in enumerate(columns)}


def _cells(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    done = [{**cell, **cell["metrics"], "status": "done"} for cell in report["cells"]]
    other = [(failure["cell"], "failed", failure["error"]) for failure in report["failures"]]
    other += [(name, "missing", None) for name in report["missing"]]
    for place, status, error in other:
        backbone, method, shots, draw = place.split("/")
        names = {"backbone": backbone, "method": method, "shots": int(shots)}
        draw = int(draw.removeprefix("draw-"))
        done.append({**names, "draw": draw, "status": status, "error": error})
    return done


def _rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for section in report["sections"]:
        for line in section["methods"]:
            versus = line["versus_reference"]
            least, most = line["label_budget"]["labels"]
            of_line = {
                "backbone": section["backbone"],
                "method": line["name"],
                "shots": section["shots"],
                "labels_least": least,
                "labels_most": most,
                **{k: line[k] for k in ("trainable_parameters", "median_seconds")},
                "peak_memory_mib": line["peak_memory_mib"],
            }
            for metric, value in line["metrics"].items():
                low, high = value.get("ci95") or (None, None)
                row = {
                    "metric": metric,
                    "draws": value["n_draws"],
                    "mean": value["mean"],
                    "sd": value["sd"],
                    "low": low,
                    "high": high,
                }
                if versus and metric in versus["metrics"]:
                    one = versus["metrics"][metric]
                    low, high = one["ci95"] or (None, None)
                    row |= {
                        "reference": report["reference"],
                        "paired_draws": one["n_draws"],
                        "difference": one["value"],
                        "difference_low": low,
                        "difference_high": high,
                        "p_value": one["p_value"],
                        "p_holm": versus["p_holm"][metric],
                        "verdict": one["verdict"],
                    }
                rows.append(of_line | row)
    return rows
