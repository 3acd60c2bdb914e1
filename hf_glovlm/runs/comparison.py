"""Comparison of finished runs, or of finished studies, on the same test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GloVLMError
from ..files import check_kind, read_json, read_manifest, results_kind, short_path
from ..inference import Predictions
from ..metrics import PairedRun, adjust_holm, compare_methods
from ..rendering import group_unit
from .results import Content, RunResult
from .study_config import COMPARED
from .study_report import Outcome

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "compare_runs"]

Source = str | Path | RunResult
Line = tuple[str, str, int]  # backbone, method, shots


class Comparison(Content):
    """Comparison of runs on the same images: a mapping as `--json` prints it.

    `lines` holds a comparison each: one of runs, or one for every backbone, method and number of
    shots that studies share. In it `runs` are the compared ones, the reference first, each with
    `metrics` (`value`, `ci95`), `right` (images that it names right) and, but for the reference,
    `versus_reference`: `metrics` as `compare_methods` gives them, `p_holm`, `only_reference` and
    `only_own` (images that one of both names right).
    """

    def to_frame(self) -> "pandas.DataFrame":
        """A row a line, run and metric, with its value, its difference and the p-values."""
        import pandas

        rows = []
        for line in self["lines"]:
            for run in line["runs"]:
                for name, value in run["metrics"].items():
                    versus = run["versus_reference"]
                    one = versus["metrics"][name] if versus else {}
                    low, high = one.get("ci95") or (None, None)
                    rows.append(
                        {
                            "line": line["line"],
                            "run": run["name"],
                            "metric": name,
                            "value": value["value"],
                            "difference": one.get("value"),
                            "low": low,
                            "high": high,
                            "p_value": one.get("p_value"),
                            "p_holm": versus["p_holm"][name] if versus else None,
                        }
                    )
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        frame = self.to_frame().to_string(index=False, float_format="{:.3f}".format)
        title = f"{len(self['names'])} compared, differences from {self['names'][0]}"
        return "\n".join([title, frame, *self["notes"]])


@dataclass(frozen=True)
class _Tested:
    """Predictions of one run: what a comparison needs of them.

    Attributes:
        labels: Names of the true classes, `[n]`.
        probabilities: `[n, K]`.
        groups: Of each image; `None` where unknown.
        file_names: Of each.
        class_names: The `K` classes.
        data: `name`, `fingerprint`, `group_column` and `split_hash`, where known.
        synthetic: Whether the images are.
    """

    labels: NDArray[np.str_]
    probabilities: NDArray[np.float64]
    groups: Sequence[str] | None
    file_names: Sequence[str]
    class_names: Sequence[str]
    data: Mapping[str, Any]
    synthetic: bool = False

    @classmethod
    def of(
        cls, name: str, predictions: Predictions, results: Mapping[str, Any] | None
    ) -> "_Tested":
        """What a run predicted for labelled images."""
        labels = predictions.labels
        if labels is None or (labels < 0).any():
            raise GloVLMError(
                f"'{name}' has images without a label: what is compared must have been measured."
            )
        data = (results or {}).get("data", {})
        classes = list(predictions.class_names)
        return cls(
            labels=np.array(classes)[labels],
            probabilities=predictions.probabilities,
            groups=predictions.groups,
            file_names=predictions.file_names,
            class_names=classes,
            data={key: data.get(key) for key in ("fingerprint", "group_column", "split_hash")},
            synthetic=bool((results or {}).get("synthetic")),
        )


def compare_runs(
    *sources: Source,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] = COMPARED,
    shared: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare finished runs, or finished studies, on the same test images.

    Image by image: differences from the first, with a bootstrap over patients (of studies crossed
    with label draws), and p-values by Holm over all differences of a metric.

    Args:
        sources: Two or more: folders of `glovlm train`, results of `run` or `evaluate`, or parquet
            files of predictions; or folders of `glovlm study`, compared line by line.
        names: What to call them; by default the folders.
        metrics: Names in `METRICS` that rank and have an interval.
        shared: Compare on the images that all were tested on, where they differ.
        n_resamples: Bootstrap resamples, 1 or more.
        seed: Of the bootstrap.

    Raises:
        GloVLMError: Test images, classes, labels or patients differ, or something is damaged.
    """
    if len(sources) < 2:
        raise GloVLMError(f"Expected two runs or more to compare, found {len(sources)}.")
    titles = _names(sources, names)
    kinds = [_kind(source) for source in sources]
    if len({kind == "study" for kind in kinds}) > 1:
        a = titles[kinds.index("study")]
        b = next(t for t, k in zip(titles, kinds, strict=True) if k != "study")
        raise GloVLMError(f"'{a}' is a study and '{b}' is none: compare runs, or studies.")
    options = {"metrics": metrics, "n_resamples": n_resamples, "seed": seed}
    notes: list[str] = []
    if kinds[0] == "study":
        of = [_read_study(Path(str(source)).expanduser()) for source in sources]
        compared = _compare_studies(titles, of, shared, notes)
    else:
        runs = [_read_run(s, t) for s, t in zip(sources, titles, strict=True)]
        aligned = _align(titles, runs, shared, notes)
        compared = [(None, titles, [(0, aligned)] if aligned else [])]
    tested = [one for _, _, draws in compared for _, runs in draws for one in runs]
    unit = group_unit(next((c for r in tested if (c := r.data["group_column"])), "group_id"))
    lines = [_compare(line, of, draws, unit, options) for line, of, draws in compared]
    _adjust(lines, metrics)
    if any(one.groups is None for one in tested):
        notes.append("The patients are unknown: intervals are over images, and too narrow.")
    return Comparison(
        {
            "kind": "comparison",
            "names": titles,
            "metrics": [*metrics],
            "unit": unit,
            "synthetic": any(one.synthetic for one in tested),
            "lines": lines,
            "notes": [*dict.fromkeys(notes)],
        }
    )


# ------------------------------------------------------------------------------ what is compared


def _names(sources: Sequence[Source], given: Sequence[str] | None) -> list[str]:
    """What each is called: the end of its path that no other shares."""
    if given is not None:
        if len(given) != len(sources) or len({*given}) < len(given):
            raise GloVLMError(
                f"Expected {len(sources)} different names, one a run; found {', '.join(given)}."
            )
        return [*given]
    places = [
        Path(s.folder if isinstance(s, RunResult) else s).expanduser().absolute() for s in sources
    ]
    places = [place.with_suffix("") if place.suffix == ".parquet" else place for place in places]
    if len({*places}) < len(places):
        raise GloVLMError("A run comes twice: nothing is to compare with itself.")
    depth = 1
    while len({p.parts[-depth:] for p in places}) < len(places):
        depth += 1
    return ["/".join(p.parts[-depth:]) for p in places]


def _kind(source: Source) -> str:
    if isinstance(source, RunResult):
        return results_kind(source) or ""
    place = Path(source).expanduser()
    if place.suffix == ".parquet" and place.is_file():
        return "predictions"
    if (place / "report.json").is_file() and not (place / "results.json").is_file():
        check_kind(place, "study")
        return "study"
    if place.is_file():
        kind = results_kind(read_json(place))
        if kind == "evaluation":
            raise GloVLMError(
                f"The results in '{short_path(place)}' hold no predictions: evaluate with "
                "--predictions FILE.parquet and give that file."
            )
    if not place.is_dir():
        raise GloVLMError(
            f"Expected the folder of a run or a study, or a parquet file of predictions; found "
            f"nothing at '{short_path(place)}'."
        )
    return "run"


def _read_run(source: Source, name: str) -> _Tested:
    if isinstance(source, RunResult):
        return _Tested.of(name, source.load_predictions(), source)
    place = Path(source).expanduser()
    if place.suffix == ".parquet":
        return _Tested.of(name, Predictions.load(place), None)
    check_kind(place, "adaptation", "mil", "study")
    if not (place / "results.json").is_file():
        raise GloVLMError(
            f"Expected a finished run, found no results.json in '{short_path(place)}': give the "
            "folder that was its --output-dir."
        )
    result = RunResult(read_json(place / "results.json"), place)
    return _Tested.of(name, result.load_predictions(), result)


def _read_study(place: Path) -> dict[Line, dict[int, _Tested]]:
    """Finished cells of a study: by line, then by draw."""
    lines: dict[Line, dict[int, _Tested]] = {}
    before = None
    for folder in sorted(place.glob("cells/*/*/*/draw-*")):
        if not (folder / "results.json").is_file():
            continue
        before = one = Outcome.read(folder, read_manifest(folder), before)
        backbone, method, shots, draw = folder.relative_to(place / "cells").parts
        data = {key: one.results["data"].get(key) for key in ("fingerprint", "group_column")}
        tested = _Tested(
            np.array(one.class_names)[one.labels], one.probabilities, one.groups, one.file_names,
            one.class_names, data | {"split_hash": one.results["data"]["split_hash"]},
            bool(one.results["synthetic"]),
        )  # fmt: skip
        number = int(draw.removeprefix("draw-"))
        lines.setdefault((backbone, method, int(shots)), {})[number] = tested
    if not lines:
        raise GloVLMError(f"No cell of the study in '{short_path(place)}' is finished.")
    return lines


def _compare_studies(
    titles: Sequence[str],
    studies: Sequence[Mapping[Line, Mapping[int, _Tested]]],
    shared: bool,
    notes: list[str],
) -> list[tuple[str | None, list[str], list[tuple[int, list[_Tested]]]]]:
    """Lines that all studies have, each with its draws on the same images."""
    common = [line for line in studies[0] if all(line in other for other in studies)]
    keys: list[list[Line]] = [[line] * len(studies) for line in common]
    if not common:
        if any(len(study) > 1 for study in studies):
            listed = "; ".join(
                f"{title}: " + ", ".join(map(_line_name, study))
                for title, study in zip(titles, studies, strict=True)
            )
            raise GloVLMError(f"The studies share no backbone, method and shots ({listed}).")
        keys = [[next(iter(study)) for study in studies]]  # one line each
        each = (
            f"{title} has {_line_name(*study)}"
            for title, study in zip(titles, studies, strict=True)
        )
        notes.append(f"Different lines are compared: {'; '.join(each)}.")
    compared: list[tuple[str | None, list[str], list[tuple[int, list[_Tested]]]]] = []
    why: list[str] = []
    for lines in keys:
        of = [study[line] for study, line in zip(studies, lines, strict=True)]
        draws = []
        for draw in sorted(set.intersection(*(set(one) for one in of))):
            try:
                draws.append((draw, _align(titles, [one[draw] for one in of], shared, notes)))
            except GloVLMError as error:
                why.append(str(error))
        if draws:
            compared.append((_line_name(lines[0]), [*titles], draws))
    if not compared:
        reason = why[0] if why else "They share no label draw."
        raise GloVLMError(f"No draw of the studies can be paired. {reason}")
    if why:
        notes.append(f"Left out: {len(why)} draws, whose test images differ.")
    return compared


def _line_name(line: Line) -> str:
    return f"{line[1]}, {line[0]}, {line[2]} shots"


def _align(
    titles: Sequence[str], runs: Sequence[_Tested], shared: bool, notes: list[str]
) -> list[_Tested]:
    """The same images of all runs, in the order of the first; classes in its order, too."""
    first = runs[0]
    places = [_places(title, run) for title, run in zip(titles, runs, strict=True)]
    names = [name for name in places[0] if all(name in other for other in places)]
    for title, run in zip(titles[1:], runs[1:], strict=True):
        if {*run.class_names} != {*first.class_names}:
            raise GloVLMError(
                f"'{titles[0]}' knows the classes {', '.join(first.class_names)} and '{title}' "
                f"{', '.join(run.class_names)}: only runs of the same classes can be compared."
            )
    sizes = [len(other) for other in places]
    if any(size != len(names) for size in sizes):
        tested = ", ".join(f"'{t}' on {n}" for t, n in zip(titles, sizes, strict=True))
        if not names or not shared:
            remedy = " Compare on these alone with --shared." if names else ""
            raise GloVLMError(
                f"The test images differ: {tested}; {len(names)} are shared by all.{remedy}"
            )
        notes.append(f"Compared on the {len(names)} shared test images; tested were {tested}.")
    aligned = []
    for title, run, place in zip(titles, runs, places, strict=True):
        rows = [place[name] for name in names]
        columns = [[*run.class_names].index(name) for name in first.class_names]
        aligned.append(
            _Tested(
                run.labels[rows],
                run.probabilities[np.ix_(rows, columns)],
                None if run.groups is None else [run.groups[row] for row in rows],
                names, first.class_names, run.data, run.synthetic,
            )
        )  # fmt: skip
        for what, own, other in (
            ("labels", aligned[-1].labels, aligned[0].labels),
            ("patients or groups", aligned[-1].groups, aligned[0].groups),
        ):
            if own is None or other is None:
                continue
            differ = int(np.sum(np.asarray(own) != np.asarray(other)))
            if differ:
                raise GloVLMError(
                    f"{differ} of {len(names)} test images have other {what} in '{title}' than in "
                    f"'{titles[0]}': they are other images, or were labelled anew."
                )
    prints = {run.data["fingerprint"] for run in runs} - {None}
    if len(prints) > 1:
        notes.append(
            "The data of the runs have different fingerprints: images are matched by their names, "
            "so make sure that files of one name are the same image."
        )
    return aligned


def _places(title: str, run: _Tested) -> dict[str, int]:
    places = {name: row for row, name in enumerate(run.file_names)}
    if len(places) < len(run.file_names):
        raise GloVLMError(
            f"'{title}' has test images of one name: they cannot be matched with another run's."
        )
    return places


# ------------------------------------------------------------------------------- how they compare


def _compare(
    line: str | None,
    titles: Sequence[str],
    draws: Sequence[tuple[int, Sequence[_Tested]]],
    unit: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All runs of a line against the first."""
    pairs: dict[str, list[PairedRun]] = {title: [] for title in titles[1:]}
    right: dict[str, list[NDArray[np.bool_]]] = {title: [] for title in titles}
    every_group: set[str] = set()
    for draw, runs in draws:
        classes = [*runs[0].class_names]
        labels = np.array([classes.index(name) for name in runs[0].labels])
        known = next((run.groups for run in runs if run.groups is not None), None)
        groups = [*runs[0].file_names] if known is None else [*known]
        every_group |= {*groups}
        for title, run in zip(titles, runs, strict=True):
            right[title].append(run.probabilities.argmax(1) == labels)
            if title != titles[0]:
                p = runs[0].probabilities, run.probabilities
                pairs[title].append(PairedRun(draw, labels, groups, *p))
    arguments = (options["metrics"], options["n_resamples"], options["seed"])
    rows = compare_methods(pairs, *arguments, unit=unit)
    ours = np.concatenate(right[titles[0]])
    reference = {name: row["a"] for name, row in rows[titles[1]].items()}
    compared = [
        {
            "name": titles[0],
            "metrics": reference,
            "right": int(ours.sum()),
            "versus_reference": None,
        }
    ]
    for title, entries in rows.items():
        own = np.concatenate(right[title])
        compared.append(
            {
                "name": title,
                "metrics": {name: row["b"] for name, row in entries.items()},
                "right": int(own.sum()),
                "versus_reference": {
                    "metrics": {
                        name: {k: v for k, v in row.items() if k not in ("a", "b")}
                        for name, row in entries.items()
                    },
                    "only_reference": int((ours & ~own).sum()),
                    "only_own": int((own & ~ours).sum()),
                },
            }
        )
    counts = {"n": len(ours), "n_groups": len(every_group), "n_draws": len(draws)}
    return {"line": line, **counts, "runs": compared}


def _adjust(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Give every difference its p-value by Holm, over all of its metric."""
    versus = [of for line in lines for run in line["runs"] if (of := run["versus_reference"])]
    for of in versus:
        of["p_holm"] = {}
    for name in metrics:
        adjusted = adjust_holm([of["metrics"][name]["p_value"] for of in versus])
        for of, p in zip(versus, adjusted, strict=True):
            of["p_holm"][name] = p
