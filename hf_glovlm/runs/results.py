"""Run results: settings, data, metrics with intervals and notes of one run."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finish_interrupted, read_manifest, refuse_damage

if TYPE_CHECKING:
    import pandas

    from ..inference import Predictions


class Content(Mapping[str, Any]):
    """Content of a file of results, as a mapping that nobody changes.

    Args:
        content: What the file holds.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def to_dict(self) -> dict[str, Any]:
        """A copy of everything, as the JSON file holds it."""
        return copy.deepcopy(self._content)


class RunResult(Content):
    """Results of a run: the content of `results.json`, and where model and predictions lie.

    A mapping as the JSON file is one (`result["metrics"]["macro_auc"]["value"]`); every key of it
    is an attribute, too (`result.metrics`). In a console it shows its metrics as a table.

    Args:
        content: What `results.json` holds.
        folder: The folder of the run.

    Attributes:
        config: Settings that repeat the run.
        data: Classes, counts, groups and fingerprint of the data.
        metrics: `{name: {"value", "ci95": [low, high], ...}}`.
        per_class: `{class: {name: ...}}`.
        notes: Sentences that belong beside the numbers.
    """

    def __init__(self, content: Mapping[str, Any], folder: str | Path) -> None:
        super().__init__(content)
        self.folder = Path(folder)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._content:
            return self._content[name]
        raise AttributeError(f"a run's results have no '{name}'; they hold {', '.join(self)}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._content})

    def to_frame(self) -> "pandas.DataFrame":
        """Metrics as a table: a row a metric; columns `value`, `low`, `high` (95% interval)."""
        import pandas

        rows = {
            name: (entry["value"], *(entry.get("ci95") or (None, None)))
            for name, entry in self["metrics"].items()
        }
        columns = ["value", "low", "high"]
        frame = pandas.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)
        return frame.rename_axis("metric")

    def load_model(self) -> tuple[Any, Any]:
        """The adapted classifier and its processor."""
        from ..inference import load_classifier

        model, processor, _ = load_classifier(str(self.folder))
        return model, processor

    def load_predictions(self) -> "Predictions":
        """Probabilities, labels and groups of the test images."""
        from ..inference import Predictions

        finish_interrupted(self.folder)
        if (manifest := read_manifest(self.folder)) is not None:
            refuse_damage(self.folder, manifest, ["predictions.parquet"])
        return Predictions.load(self.folder / "predictions.parquet")

    def __repr__(self) -> str:
        method = self["method"]["name"]
        title = f"{method}: {self['n']} test images of {self['n_groups']} groups"
        kind = " (synthetic images)" if self["synthetic"] else ""
        lines = [f"{title}{kind}", self.to_frame().to_string(float_format="{:.3f}".format)]
        return "\n".join([*lines, *self["notes"]])
