"""Leave-one-slide-out error of a slide's class percentage, counted and corrected.

Counting calls is biased by the classifier's errors. A confusion matrix from labelled slides, or EM
over the slide's own unlabelled objects, undoes a part of that, and may add noise of its own: which
of the two weighs more is a matter of measurement.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from numpy.typing import ArrayLike, NDArray

from ..backbones import load_backbone
from ..calibration import estimate_prior
from ..calibration.inputs import softmax
from ..data import all_rows, group_rows, load_dataset
from ..data.folder import column
from ..data.groups import Groups
from ..data.splits import ShotsFrom, draw_episode
from ..errors import GloVLMError, nearest
from ..inference import FeatureCache, embed_images
from ..intervals import mean_interval
from ..slides.prevalence import LIMIT, confusion_counts, estimate_fractions, informative_calls
from ..training import adapt_features

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Correction = Literal["expected", "adjusted", "adjusted_all", "em"]

CORRECTIONS: dict[str, str] = {
    "counted": "the classifier's calls, counted",
    "expected": "mean probability over the slide's objects",
    "adjusted": "count corrected by the confusion matrix of the support, each of its slides left "
    "out in turn",
    "adjusted_all": "count corrected by the confusion matrix of all labelled objects of the other "
    "slides, each left out in turn",
    "em": "EM over the slide's unlabelled objects (transductive)",
}
READS_HIGH = 10.0  # per cent; a slide without the lesion that reads more is counted


def leave_slides_out(
    features: ArrayLike,
    labels: ArrayLike,
    slides: Sequence[str],
    *,
    class_names: Sequence[str] | None = None,
    target: str | None = None,
    shots: int = 8,
    draws: int = 30,
    min_objects: int = 10,
    seed: int = 0,
    method: str = "linear_probe",
    settings: Mapping[str, Any] | None = None,
    shots_from: ShotsFrom = "spread",
    corrections: Sequence[Correction] = get_args(Correction),
    n_resamples: int = 2000,
    on_slide: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Leave-one-slide-out error of the percentage of a class on a slide.

    For every slide with enough objects, and every draw: shots of each class are taken from the
    other slides (`data.draw_episode`), a method is fitted on them and the slide's objects are
    classified. No label of the slide is used by any estimate.
    `adjusted` measures its confusion matrix on the support alone, each of the support's slides
    left out of a fit of its own; `adjusted_all` on every labelled object of the other slides,
    classified by fits that leave their slide out, so it needs far more labels. Either is used as
    in the results of `glovlm slide`: the estimate is the share by the posterior. Where
    that would report no correction the plain count stands, and how often is reported.

    Args:
        features: `[n, dim]`.
        labels: Class numbers `[n]`.
        slides: Slide of each object.
        class_names: `[K]`; class numbers when not given.
        target: Whose percentage; the last class when not given.
        shots: Labelled objects of each class.
        draws: Supports drawn for each slide.
        min_objects: Slides with fewer are not tested; they still give shots.
        seed: Of draws and bootstrap.
        method: A method on features.
        settings: Its settings.
        shots_from: `spread` takes one of each slide in turn; else see `data.draw_episode`.
        corrections: Which estimates stand beside the plain count.
        n_resamples: Bootstrap resamples, over slides.
        on_slide: Called with each slide: its name, its place, how many there are.

    Returns:
        `estimates`: rows of `name`, `what`, `labels_used`, `transductive`, and in percentage points
        over slides and draws, slides weighing the same: `error` (mean absolute) and `bias`
        (estimate minus truth), each with `ci95` over slides; `against_counted` (its error minus
        that of counting, paired); `reads_high` (share of the evaluations of slides without the
        class that read 10% or more, `None` without such slides); `fell_back` (share in which the
        plain count stood in). `slides`: `slide`, `n`, `truth` and the mean of each estimate, in per
        cent. `target`, `shots`, `draws`, `n_slides`, `min_objects`, `method`, `shots_from`,
        `seed`.

    Raises:
        GloVLMError: A length or name is wrong, fewer than two slides are large enough, or the
            other slides lack shots.
    """
    objects = _labelled(features, labels, slides, class_names)
    names = objects.class_names
    target = names[-1] if target is None else target
    for name, known in [(target, names), *((c, CORRECTIONS) for c in corrections)]:
        if name not in known:
            raise GloVLMError(
                f"Expected one of {', '.join(known)}, found '{name}'.{nearest(name, known)}"
            )
    chosen = [name for name in CORRECTIONS if name in {"counted", *corrections}]
    column, tested = names.index(target), _large_enough(objects.slides, min_objects, draws)
    fit = _fitting(objects, method, settings, seed)
    estimates: list[list[dict[str, _Estimate]]] = []
    for i, slide in enumerate(tested):
        if on_slide is not None:
            on_slide(slide, i, len(tested))
        supports = [
            draw_support(
                objects.labels,
                objects.slides,
                objects.slides == slide,
                names,
                shots=shots,
                seed=seed,
                draw=draw,
                shots_from=shots_from,
            )
            for draw in range(draws)
        ]
        estimates.append(_estimates(objects, slide, column, supports, fit, chosen))
    own_labels = [objects.labels[objects.slides == slide] for slide in tested]
    truth = np.array([100 * np.mean(own == column) for own in own_labels])
    return {
        "target": target,
        "shots": shots,
        "draws": draws,
        "n_slides": len(tested),
        "min_objects": min_objects,
        "method": method,
        "shots_from": shots_from,
        "seed": seed,
        "estimates": _summarise(estimates, truth, n_resamples, seed),
        "slides": [
            {"slide": slide, "n": len(own_labels[i]), "truth": float(truth[i])}
            | {name: float(np.mean([e[name].percent for e in estimates[i]])) for name in chosen}
            for i, slide in enumerate(tested)
        ],
    }


@dataclass(frozen=True)
class _Objects:
    """Labelled objects of several slides."""

    features: NDArray[Any]
    labels: Ints
    slides: NDArray[np.object_]
    class_names: list[str]


@dataclass(frozen=True)
class _Estimate:
    """Estimated percentage of a class on a slide."""

    percent: float
    labels_used: int
    fell_back: bool


def _labelled(
    features: ArrayLike,
    labels: ArrayLike,
    slides: Sequence[str],
    class_names: Sequence[str] | None,
) -> _Objects:
    x, y = np.asarray(features), np.asarray(labels)
    ids = np.array([str(slide) for slide in slides], dtype=object)
    if x.ndim != 2 or y.shape != x.shape[:1] or ids.shape != y.shape or y.dtype.kind not in "iu":
        raise GloVLMError(
            f"Expected features [n, dim] with a class number and a slide each, found {x.shape}, "
            f"{y.shape} and {len(ids)}."
        )
    names = [str(k) for k in range(int(y.max()) + 1)] if class_names is None else list(class_names)
    return _Objects(x, y, ids, names)


def _large_enough(slides: NDArray[np.object_], min_objects: int, draws: int) -> list[str]:
    """Test slides: those that are left out in turn, sorted."""
    sizes = Counter(slides)
    tested = sorted(slide for slide, n in sizes.items() if n >= min_objects)
    if len(tested) < 2 or len(sizes) < 3 or draws < 1:
        raise GloVLMError(
            f"Expected three slides, two of them with {min_objects} objects or more, and a draw; "
            f"found {len(sizes)} slides, {len(tested)} so large, {draws} draws."
        )
    return tested


def draw_support(
    labels: Ints,
    groups: Sequence[str] | NDArray[np.object_],
    tested: NDArray[np.bool_],
    names: Sequence[str],
    *,
    shots: int,
    seed: int,
    draw: int,
    shots_from: ShotsFrom = "spread",
) -> Ints:
    """Support rows, drawn from those that are not tested as for any episode.

    Args:
        labels: Class numbers `[n]`.
        groups: Slide or patient of each row; none is tested in part.
        tested: Which rows are tested, `[n]`.
        names: The classes.
        shots: Labelled objects of each class.
        seed: Of the draws.
        draw: Number of the draw.
        shots_from: See `data.draw_episode`.
    """
    text = Value("string")
    columns = {
        "file_name": [str(row) for row in range(len(labels))],
        "label": labels.tolist(),
        "split": np.where(tested, "test", "train").tolist(),
    }
    features = Features({"file_name": text, "label": ClassLabel(names=list(names)), "split": text})
    rows = Dataset.from_dict(columns, features=features)
    given = Groups("slide_id", [str(group) for group in groups], "")
    episode = draw_episode(
        rows, shots=shots, seed=seed, draw=draw, shots_from=shots_from, groups=given
    )
    return np.array(episode.support, np.int64)


Predict = Callable[[Any], Floats]  # rows -> probabilities [m, K]


def _fitting(
    objects: _Objects, method: str, settings: Mapping[str, Any] | None, seed: int
) -> Callable[[Ints], Predict]:
    """Function that fits a method on some rows and returns a classifier of others."""
    features, labels = objects.features, objects.labels

    def fit(support: Ints) -> Predict:
        adapted = adapt_features(
            method, features[support], labels[support], seed=seed, method_config=settings
        )
        return lambda rows: softmax(adapted.predict_logits(features[rows]).astype(np.float64))

    return fit


def _estimates(
    objects: _Objects,
    slide: str,
    column: int,
    supports: Sequence[Ints],
    fit: Callable[[Ints], Predict],
    chosen: Sequence[str],
) -> list[dict[str, _Estimate]]:
    """Chosen estimates of one class on a slide, from each support."""
    inside = objects.slides == slide
    calls, plain, confusions = [], [], []
    for support in supports:
        predict = fit(support)
        p = predict(inside)
        calls.append(np.bincount(p.argmax(axis=1), minlength=len(objects.class_names)))
        plain.append({"counted": calls[-1] / len(p), "expected": p.mean(axis=0)})
        if "em" in chosen:
            plain[-1]["em"] = estimate_prior(p).prior
        if {"adjusted", "adjusted_all"} & set(chosen):
            held_out = np.unique(objects.slides[~inside if "adjusted_all" in chosen else support])
            confusions.append(_confusions_by_slide(fit, predict, objects, support, held_out))
    values = {name: [100 * each[name][column] for each in plain] for name in plain[0]}
    fell_back = {name: [False] * len(supports) for name in chosen}
    for name in {"adjusted", "adjusted_all"} & set(chosen):
        tables = np.stack([each[name] for each in confusions])
        informative = [
            bool(table.any(axis=1).all() and informative_calls(table)[column] >= LIMIT)
            for table in tables
        ]
        corrected = 100 * estimate_fractions(np.stack(calls), tables).share[:, column]
        values[name] = np.where(informative, corrected, values["counted"]).tolist()
        fell_back[name] = [not enough for enough in informative]
    return [
        {
            name: _Estimate(
                float(values[name][draw]),
                int((~inside).sum()) if name == "adjusted_all" else len(support),
                fell_back[name][draw],
            )
            for name in chosen
        }
        for draw, support in enumerate(supports)
    ]


def _confusions_by_slide(
    fit: Callable[[Ints], Predict],
    whole: Predict,
    objects: _Objects,
    support: Ints,
    held_out: Iterable[str],
) -> dict[str, Ints]:
    """Leave-one-slide-out confusion matrices: each slide by a fit without its own rows.

    A slide that holds the support's only rows of a class cannot be left out, and is not counted;
    one without any is classified by `whole`, the fit on all of the support.

    Returns:
        `adjusted` over the rows of the support, `adjusted_all` over all rows of the slides.
    """
    labels, n_classes = objects.labels, len(objects.class_names)
    table = np.zeros((2, n_classes, n_classes), np.int64)
    for slide in held_out:
        kept = support[objects.slides[support] != slide]
        if len(np.unique(labels[kept])) < n_classes:
            continue
        predict = fit(kept) if len(kept) < len(support) else whole
        rows = np.flatnonzero(objects.slides == slide)
        calls = predict(rows).argmax(axis=1)
        shown = np.isin(rows, support)
        table[0] += confusion_counts(labels[rows[shown]], calls[shown], n_classes)
        table[1] += confusion_counts(labels[rows], calls, n_classes)
    return {"adjusted": table[0], "adjusted_all": table[1]}


def _summarise(
    draws: Sequence[Sequence[Mapping[str, _Estimate]]], truth: Floats, n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Summary rows, one an estimate, over slides and draws; every interval over slides."""
    rows = np.random.default_rng(seed).integers(len(truth), size=(n_resamples, len(truth)))

    def entry(by_slide: Floats) -> dict[str, Any]:
        value = float(by_slide.mean())
        if not n_resamples:
            return {"value": value, "ci95": None}
        bounds = mean_interval(value, by_slide[rows].mean(axis=1), len(by_slide))
        return {"value": value, "ci95": list(bounds)}

    percent = {
        name: np.array([[each[name].percent for each in of_slide] for of_slide in draws])
        for name in draws[0][0]
    }
    every = [each for of_slide in draws for each in of_slide]
    deviation = {name: values - truth[:, None] for name, values in percent.items()}
    error = {name: np.abs(values).mean(axis=1) for name, values in deviation.items()}
    absent = truth == 0
    return [
        {
            "name": name,
            "what": CORRECTIONS[name],
            "labels_used": round(sum(each[name].labels_used / len(every) for each in every)),
            "transductive": name == "em",
            "error": entry(error[name]),
            "bias": entry(deviation[name].mean(axis=1)),
            "against_counted": entry(error[name] - error["counted"]),
            "reads_high": float((values[absent] >= READS_HIGH).mean()) if absent.any() else None,
            "fell_back": float(np.mean([each[name].fell_back for each in every])),
        }
        for name, values in percent.items()
    ]


def bench_counting(
    data: str,
    backbone: str,
    *,
    target: str | None = None,
    shots: int = 8,
    draws: int = 30,
    min_objects: int = 10,
    seed: int = 0,
    method: str = "linear_probe",
    shots_from: ShotsFrom = "spread",
    group_column: str = "slide_id",
    device: str | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Benchmark of the error of a slide's percentage on labelled glomeruli; see `leave_slides_out`.

    Args:
        data: A labelled data set whose rows name their slide.
        backbone: As `--backbone` takes it; its features come through the cache.
        target: Whose percentage; the last class when not given.
        shots: Labelled objects of each class.
        draws: Supports drawn for each slide.
        min_objects: Slides with fewer are not tested.
        seed: Of draws and bootstrap.
        method: A method on features.
        shots_from: How shots are spread over the slides; see `data.draw_episode`.
        group_column: The column that names the slide.
        device: Where images are encoded.
        progress: Whether to show that on the terminal.

    Returns:
        Rows as the other benches give them (`name`, `value`, `unit`, `ratio`, `what`), and `ci95`
        over slides: the error and the bias of each estimate, and how often a slide without the
        class reads 10% or more. The `ratio` of an error is its part of counting's.
    """
    rows = all_rows(load_dataset(data))
    groups = group_rows(rows, group_column=group_column)
    model, processor = load_backbone(backbone)
    features = embed_images(
        model, processor, rows, device=device, cache=FeatureCache(), progress=progress
    )
    study = leave_slides_out(
        features,
        np.asarray(column(rows, "label"), np.int64),
        groups.ids,
        class_names=rows.features["label"].names,
        target=target,
        shots=shots,
        draws=draws,
        min_objects=min_objects,
        seed=seed,
        method=method,
        shots_from=shots_from,
    )
    return bench_rows(study)


def bench_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Benchmark rows of a study by `leave_slides_out`."""
    setting = (
        f"per cent of {study['target']}, {study['n_slides']} slides left out in turn, "
        f"{study['draws']} draws of {study['shots']} shots "
        f"({study['shots_from']}), {study['method']}"
    )
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, ratio: float | None, what: str, ci95: Any) -> None:
        row = {"name": f"counting.{name}", "value": round(value, 3), "unit": unit}
        bounds = None if ci95 is None else [round(bound, 3) for bound in ci95]
        part = None if ratio is None else round(ratio, 3)
        rows.append({**row, "ratio": part, "what": what, "ci95": bounds})

    plain = study["estimates"][0]["error"]["value"]
    for estimate in study["estimates"]:
        name, error, bias = estimate["name"], estimate["error"], estimate["bias"]
        what = f"{estimate['what']}; {estimate['labels_used']} labels; {setting}"
        part = error["value"] / plain if plain else None
        mean = f"mean absolute error: {what}"
        add(f"{name}.error", error["value"], "points", part, mean, error["ci95"])
        mean = f"mean of estimate minus truth: {what}"
        add(f"{name}.bias", bias["value"], "points", None, mean, bias["ci95"])
        if estimate["reads_high"] is not None:
            high = f"slides without {study['target']} that read 10% or more: {what}"
            add(f"{name}.reads_high", 100 * estimate["reads_high"], "%", None, high, None)
    return rows
