"""Slide labels from bags. All bags here are synthetic: what is measured is that the parts work.

A synthetic tile is Gaussian noise; a tile of the disease is shifted in one direction, as is, in
every slide alike, a fifth of the tiles in another direction that means nothing.
"""

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cases import case_of
from fresh_process import run_two_ranks
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tolerance import assert_same_numbers

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.bags import Bag, BagWriter, read_bag
from hf_glovlm.slides.mil import MilConfig, apply_mil, load_aggregator, train_mil
from hf_glovlm.slides.mil.aggregators import AGGREGATORS
from hf_glovlm.slides.mil.cohort import Bags, BagSource, read_cohort, split_cohort

REPOSITORY = Path(__file__).resolve().parent.parent
DIM = 16
TINY = {
    "mean": {"width": 16},
    "max": {"width": 16},
    "abmil": {"width": 16, "hidden": 16},
    "transmil": {"width": 16, "heads": 2, "landmarks": 16},
}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def write_bag(path: Path, features: NDArray[Any], **attributes: Any) -> Path:
    side = math.ceil(math.sqrt(len(features)))
    places = np.arange(len(features))
    coords = 224 * np.stack([places % side, places // side], 1)
    facts = {"fingerprint": "a" * 32, "tile_mpp": 0.5, "tile_size": 224, "synthetic": True}
    writer = BagWriter(path, dim=features.shape[1], attributes=facts | attributes)
    writer.append(features, coords)
    return writer.complete()


def make_cohort(
    folder: Path,
    slides: int = 20,
    tiles: int = 60,
    planted: int = 4,
    *,
    per_patient: int = 1,
    seed: int = 0,
) -> tuple[Path, Path, dict[str, NDArray[np.bool_]]]:
    """Bags and their table; which tiles of each slide are planted.

    Every second slide (of a patient: all) is diseased.
    """
    rng = np.random.default_rng(seed)
    disease, nothing = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
    folder.mkdir(parents=True)
    rows, truth = [], {}
    for i in range(slides):
        patient = i // per_patient
        features = rng.normal(size=(tiles + i % 7, DIM))
        lit = np.zeros(len(features), dtype=bool)
        if patient % 2:
            lit[rng.choice(len(features), planted, replace=False)] = True
        features[lit] += 5 * disease
        features[rng.choice(len(features), len(features) // 5, replace=False)] += 5 * nothing
        write_bag(folder / f"s{i:02d}.h5", features.astype(np.float32))
        truth[f"s{i:02d}"] = lit
        rows.append((f"s{i:02d}.svs", "tumour" if patient % 2 else "normal", f"p{patient:02d}"))
    return folder, write_table(folder.parent / "slides.csv", rows), truth


def write_table(
    path: Path, rows: Sequence[Sequence[str]], header: str = "slide,label,patient_id"
) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return path


def read_table(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))[1:]


Cohort = tuple[Path, Path, dict[str, NDArray[np.bool_]]]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Twenty patients with a slide each; never written into."""
    return make_cohort(tmp_path_factory.mktemp("cohort") / "features")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Six patients with two small slides each; never written into."""
    folder = tmp_path_factory.mktemp("small") / "features"
    return make_cohort(folder, slides=12, tiles=12, per_patient=2)


def settings(cohort: Cohort, output: Path, **options: Any) -> MilConfig:
    features, labels, _ = cohort
    name, where = options.get("aggregator", "abmil"), "TINY in tests/test_mil.py"
    own = case_of(TINY, name, "AGGREGATORS", where, "its settings for a small bag")
    return MilConfig(
        features=str(features),
        labels=str(labels),
        output_dir=str(output),
        device="cpu",
        **{"aggregator_config": own, "epochs": 3, "n_resamples": 50, "lr": 2e-3, **options},
    )


def read_rows(path: Path) -> dict[str, list[Any]]:
    observed: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return observed


def tile_auc(run: Path, truth: dict[str, NDArray[np.bool_]], column: str) -> float:
    """AUC over all tiles of the diseased test slides: planted against not."""
    lit, heat = [], []
    for name, planted in truth.items():
        place = run / "attention" / f"{name}.parquet"
        if planted.any() and place.is_file():
            values = np.array(read_rows(place)[column])
            if column == "attention":
                values = values * len(values)  # bags of different sizes
            lit.append(planted)
            heat.append(values)
    return float(roc_auc_score(np.concatenate(lit), np.concatenate(heat)))


# ------------------------------------------------------------------------------- it can learn


def test_disease_in_few_tiles_is_learned_and_the_heat_lights_them(
    cohort: Cohort, tmp_path: Path
) -> None:
    """Twenty synthetic slides, ten a class, 4 of 60 tiles diseased; every slide is tested by a
    model that never saw it (five folds), and so are its tiles."""
    sizes = {"width": 64, "hidden": 64}
    results = train_mil(
        settings(cohort, tmp_path / "run", folds=5, epochs=30, aggregator_config=sizes)
    )
    assert results["synthetic"] is True
    assert results["n"] == 20
    assert results["metrics"]["macro_auc"]["value"] >= 0.95
    assert tile_auc(tmp_path / "run", cohort[2], "score_tumour") >= 0.9
    assert tile_auc(tmp_path / "run", cohort[2], "attention") >= 0.9


@pytest.mark.parametrize("aggregator", sorted(AGGREGATORS))
def test_every_aggregator_makes_a_whole_run(small: Cohort, tmp_path: Path, aggregator: str) -> None:
    config = settings(small, tmp_path / "run", aggregator=aggregator, epochs=2)
    results = train_mil(config)
    made = {p.name for p in (tmp_path / "run").iterdir()}
    assert made == {
        *("model", "attention", "predictions.parquet", "config.yaml", "log.jsonl", "README.md"),
        *("manifest.json", "results.json", ".lock"),
    }
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert results["environment"]["num_processes"] == 1
    assert {"macro_auc", "balanced_accuracy", "ece"} <= set(results["metrics"])
    rows = read_rows(tmp_path / "run" / "predictions.parquet")
    assert set(rows["split_hash"]) == {results["data"]["split_hash"]}
    assert len(rows["slide"]) == results["n"] == 4  # two of six patients, two slides each
    assert np.add(rows["p_normal"], rows["p_tumour"]) == pytest.approx(1)
    attended = {p.stem for p in (tmp_path / "run" / "attention").iterdir()}
    assert attended == set(rows["slide"])
    tiles = read_rows(tmp_path / "run" / "attention" / f"{rows['slide'][0]}.parquet")
    bag = read_bag(small[0] / f"{rows['slide'][0]}.h5")
    assert np.array_equal(np.stack([tiles["x"], tiles["y"]], 1), bag.coords)
    assert ("attention" in tiles) == AGGREGATORS[aggregator].has_attention
    assert {"score_normal", "score_tumour"} < set(tiles)
    again = MilConfig.from_mapping(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert again == config


def test_the_card_says_what_it_is_and_names_no_slide_or_place(
    small: Cohort, tmp_path: Path
) -> None:
    results = train_mil(settings(small, tmp_path / "run", epochs=1))
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("(synthetic images)") == 2
    for sentence in (
        "Research use only, not for diagnosis",
        "Macro-AUC",
        "intervals are over patients",
    ):
        assert sentence in card
    assert results["data"]["split_hash"] in card
    for hidden in ("s00", "p00", str(tmp_path), str(small[0])):
        assert hidden not in card


# ----------------------------------------------------------------------------- what is on disk


def test_the_saved_classifier_says_what_the_run_said(small: Cohort, tmp_path: Path) -> None:
    train_mil(settings(small, tmp_path / "run", epochs=2))
    rows = read_rows(tmp_path / "run" / "predictions.parquet")
    loaded = load_aggregator(tmp_path / "run" / "model")
    assert loaded.classes == ["normal", "tumour"]
    for i, name in enumerate(rows["slide"]):
        bag = read_bag(small[0] / f"{name}.h5")
        for source in (tmp_path / "run", loaded):
            prediction = apply_mil(source, bag)
            assert prediction.label == rows["predicted"][i]
            assert_same_numbers(prediction.probabilities["tumour"], rows["p_tumour"][i])
            assert sum(prediction.probabilities.values()) == pytest.approx(1)
            tiles = read_rows(tmp_path / "run" / "attention" / f"{name}.parquet")
            assert_same_numbers(prediction.attention, list(tiles["attention"]))
            assert_same_numbers(prediction.tile_scores[:, 1], list(tiles["score_tumour"]))
            assert prediction.notes == ()


def test_features_and_tiles_of_another_kind_are_refused(small: Cohort, tmp_path: Path) -> None:
    train_mil(settings(small, tmp_path / "run", epochs=1))
    loaded = load_aggregator(tmp_path / "run")
    bag = read_bag(small[0] / "s00.h5")

    def other(features: Any = bag.features, **attributes: Any) -> Bag:
        facts = {**bag.attributes, **attributes}
        return replace(bag, features=np.asarray(features, np.float32), attributes=facts)

    with pytest.raises(GloVLMError, match="have width 17, the classifier was trained on width 16"):
        apply_mil(loaded, other(np.zeros((5, 17))))
    with pytest.raises(
        GloVLMError, match=r"another model \(bbbbbbbbbbbb\) than .*\(aaaaaaaaaaaa\)"
    ):
        apply_mil(loaded, other(fingerprint="b" * 32))
    with pytest.raises(GloVLMError, match="has no tile"):
        apply_mil(loaded, other(np.zeros((0, 16))))
    assert apply_mil(loaded, other(tile_mpp=0.51)).notes == ()
    difference = "scale: the training has 0.5 micrometres per pixel, s00 has 1 "
    with pytest.raises(GloVLMError, match=f"{difference}.*--allow-scale"):
        apply_mil(loaded, other(tile_mpp=1.0))
    (note,) = apply_mil(loaded, other(tile_mpp=1.0), allow_scale=True).notes
    assert difference in note
    (note,) = apply_mil(loaded, other(fingerprint=None)).notes
    assert "do not say which model" in note


@pytest.mark.parametrize("harm", ["nothing", "no weights", "other json", "torn"])
def test_what_is_no_classifier_of_slides_is_refused(
    small: Cohort, tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "run"
    if harm != "nothing":
        train_mil(settings(small, folder, epochs=1))
    if harm == "no weights":
        (folder / "model" / "model.safetensors").unlink()
    if harm == "other json":
        (folder / "model" / "config.json").write_text('{"model_type": "glovlm"}')
    if harm == "torn":
        (folder / "model" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(GloVLMError, match=r"Expected a slide classifier in|since it was written"):
        load_aggregator(folder)


# ---------------------------------------------------------------------------------- the sides


@pytest.mark.parametrize(
    "options",
    [{}, {"validation_fraction": 0.4}, {"folds": 3}, {"folds": 2, "validation_fraction": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_patient_is_on_two_sides(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], seed: int
) -> None:
    made = make_cohort(tmp_path / "features", slides=24, tiles=2, planted=1, per_patient=2)
    config = settings(made, tmp_path / "run", seed=seed, **options)
    data = read_cohort(config)
    parts = split_cohort(data, config)
    assert len(parts) == options.get("folds", 0) + 1
    tested: list[int] = []
    for sides in parts:
        held = [{data.groups[i] for i in s} for s in (sides.train, sides.validation, sides.test)]
        assert sum(map(len, held)) == len(set.union(*held))
        assert bool(held[1]) == ("validation_fraction" in options)
        assert {data.labels[i] for i in sides.train} == {0, 1}
        assert len(sides.train) + len(sides.validation) + len(sides.test) == 24
        tested += sides.test
    assert len(tested) == len(set(tested))
    if "folds" in options:
        assert sorted(tested) == list(range(24))
        assert parts[-1].test == []
        sizes = [len(p.test) for p in parts[:-1]]
        assert max(sizes) - min(sizes) <= 2  # a patient
        for sides in parts[:-1]:
            assert {data.labels[i] for i in sides.test} == {0, 1}


def test_the_epoch_is_chosen_on_validation_and_never_on_test(small: Cohort, tmp_path: Path) -> None:
    config = settings(small, tmp_path / "one", epochs=4, validation_fraction=0.4)
    results = train_mil(config)
    (training,) = results["training"]["trainings"]
    log = [json.loads(r) for r in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    scores = [row["validation_macro_auc"] for row in log]
    assert training["chosen_epoch"] == 1 + scores.index(max(scores))
    assert results["data"]["sides"][0]["validation"]["groups"] == 2
    # Other test labels: the same weights, and so the same epoch.
    rows = read_table(small[1])
    tested = set(read_rows(tmp_path / "one" / "predictions.parquet")["slide"])
    side = read_cohort(config), split_cohort(read_cohort(config), config)[0]
    kept = {
        **{side[0].names[i]: "train" for i in side[1].train},
        **{side[0].names[i]: "val" for i in side[1].validation},
    }
    turned = {"normal": "tumour", "tumour": "normal"}
    declared = [
        (s, turned[label] if s[:-4] in tested else label, p, kept.get(s[:-4], "test"))
        for s, label, p in rows
    ]
    table = write_table(tmp_path / "turned.csv", declared, "slide,label,patient_id,split")
    other = train_mil(replace(config, labels=str(table), output_dir=str(tmp_path / "two")))
    assert other["metrics"]["macro_auc"]["value"] == pytest.approx(
        1 - results["metrics"]["macro_auc"]["value"]
    )
    weights = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_declared_split_is_kept(small: Cohort, tmp_path: Path) -> None:
    rows = [(*row, "test" if row[2] in {"p01", "p02"} else "train") for row in read_table(small[1])]
    table = write_table(tmp_path / "s.csv", rows, "slide,label,patient_id,split")
    config = replace(settings(small, tmp_path / "run", epochs=1), labels=str(table))
    train_mil(config)
    tested = read_rows(tmp_path / "run" / "predictions.parquet")
    assert set(tested["patient"]) == {"p01", "p02"}
    with pytest.raises(GloVLMError, match="declares a split, so leave folds out"):
        train_mil(replace(config, folds=3, output_dir=str(tmp_path / "other")))


def test_without_patients_slides_are_split_and_it_is_said(small: Cohort, tmp_path: Path) -> None:
    table = write_table(tmp_path / "s.csv", [r[:2] for r in read_table(small[1])], "slide,label")
    results = train_mil(
        replace(settings(small, tmp_path / "run", epochs=1), labels=str(table), overwrite=True)
    )
    assert results["data"]["group_column"] == "slide_id"
    assert results["data"]["patients"] is None
    assert "Patients are unknown: the same patient may stand on both sides." in results["notes"]
    assert "intervals are over slides" in results["notes"][0]
    assert read_rows(tmp_path / "run" / "predictions.parquet")["patient"] == [None] * results["n"]


# ---------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("balance", [True, False])
def test_each_class_is_drawn_as_often_where_that_is_asked_for(
    small: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: bool
) -> None:
    rows = [[*r, "train"] for r in read_table(small[1])]
    rows = [r for r in rows if r[1] == "normal" or r[0] == "s02.svs"]
    rows += [["s06.svs", "tumour", "p03", "test"]]
    table = write_table(tmp_path / "s.csv", rows, "slide,label,patient_id,split")
    drawn: list[int] = []
    fetch = BagSource.fetch

    def watch(source: BagSource, index: Sequence[int]) -> torch.Tensor:
        drawn.extend(source.labels[list(index)].tolist())
        return fetch(source, index)

    monkeypatch.setattr(BagSource, "fetch", watch)
    config = settings(small, tmp_path / "run", epochs=20, balance=balance)
    train_mil(replace(config, labels=str(table)))
    assert len(drawn) == 20 * 7
    share = float(np.mean(drawn))
    assert 0.35 < share < 0.65 if balance else share == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({}, 125), ({"batch_size": 4}, 500), ({"epochs": 7}, 7)],  # eight slides learn
)
def test_few_slides_are_passed_more_often(
    small: Cohort, tmp_path: Path, options: dict[str, Any], epochs: int
) -> None:
    config = settings(small, tmp_path / "run", **{"epochs": None, **options})
    seen: list[int] = []

    def stop(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch":
            seen.append(what["epochs"])
            raise Killed

    with pytest.raises(Killed):
        train_mil(config, on_event=stop)
    assert seen == [epochs]


def test_tiles_are_described_by_the_training_slides_alone(small: Cohort, tmp_path: Path) -> None:
    config = settings(small, tmp_path / "run")
    data = read_cohort(config)
    (sides,) = split_cohort(data, config)
    mean, spread = data.describe_tiles(sides.train)
    parts = [read_bag(small[0] / f"{data.names[i]}.h5").features for i in sides.train]
    weights = np.concatenate([np.full(len(p), 1 / len(p)) for p in parts])
    tiles = np.concatenate(parts).astype(np.float64)
    expected = np.average(tiles, axis=0, weights=weights)
    assert mean.numpy() == pytest.approx(expected, abs=1e-9)
    variance = np.average((tiles - expected) ** 2, axis=0, weights=weights)
    assert spread.numpy() == pytest.approx(np.sqrt(variance), abs=1e-9)
    train_mil(config)
    assert load_aggregator(tmp_path / "run").aggregator.mean.numpy() == pytest.approx(
        expected, abs=1e-6
    )


def test_a_training_step_sees_at_most_so_many_tiles_drawn_anew(small: Cohort) -> None:
    bags = Bags([small[0] / "s00.h5", small[0] / "s01.h5"])
    source = BagSource(bags, [1, 0, 1], [0, 1], max_tiles=5)
    assert source.labels.tolist() == [1, 0, 1]
    whole = torch.from_numpy(bags[1].features)
    drawn = [source.fetch([0])[0] for _ in range(2)]
    assert all(part.shape == (5, DIM) for part in drawn)
    assert not torch.equal(*drawn)
    places = [int((whole == row).all(1).nonzero()) for row in drawn[0]]
    assert places == sorted(set(places))
    assert torch.equal(BagSource(bags, [1], [0, 1], None).fetch([0])[0], whole)


def test_bags_beyond_the_memory_are_read_again(
    small: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [small[0] / "s00.h5", small[0] / "s01.h5"]
    monkeypatch.setattr(
        "hf_glovlm.slides.mil.cohort.KEEP_BYTES", read_bag(paths[0]).features.nbytes
    )
    bags = Bags(paths)
    for _ in range(2):
        for i, path in enumerate(paths):
            assert np.array_equal(bags[i].features, read_bag(path).features)
    assert list(bags.kept) == [0]


def test_the_same_seed_gives_the_same_run_and_another_another(
    small: Cohort, tmp_path: Path
) -> None:
    weights = []
    for i, options in enumerate(({}, {}, {"seed": 1}, {"batch_size": 4}, {"max_tiles": 4})):
        config = settings(small, tmp_path / str(i), **{"epochs": 2, **options})
        train_mil(config)
        weights.append(load_file(tmp_path / str(i) / "model" / "model.safetensors"))
    same = [all(torch.equal(w[n], weights[0][n]) for n in w) for w in weights]
    assert same == [True, True, False, False, False]


class Killed(Exception):
    pass


def kill_at(training: int, epoch: int) -> Callable[[str, dict[str, Any]], None]:
    def watch(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch" and (what["training"], what["epoch"]) == (training, epoch):
            raise Killed

    return watch


def test_a_killed_run_goes_on_and_ends_in_the_very_same_table(
    small: Cohort, tmp_path: Path
) -> None:
    config = settings(small, tmp_path / "straight", epochs=3, folds=2, max_tiles=6)
    expected = train_mil(config)
    broken = replace(config, output_dir=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        train_mil(broken, on_event=kill_at(1, 2))
    assert {p.name for p in (tmp_path / "broken").iterdir()} == {".lock", "unfinished"}
    with pytest.raises(GloVLMError, match="already holds a run"):
        train_mil(broken)
    with pytest.raises(GloVLMError, match=r"other settings \(lr was 0.002 and is 0.1\)"):
        train_mil(replace(broken, resume=True, lr=0.1))
    calls: list[tuple[int, int]] = []

    def note(kind: str, what: dict[str, Any]) -> None:
        if kind == "epoch":
            calls.append((what["training"], what["epoch"]))

    results = train_mil(replace(broken, resume=True), on_event=note)
    assert calls == [(1, 3), (2, 1), (2, 2), (2, 3)]
    assert results["metrics"] == expected["metrics"]
    tables = [read_rows(tmp_path / n / "predictions.parquet") for n in ("straight", "broken")]
    assert tables[0] == tables[1]
    assert not (tmp_path / "broken" / "unfinished").exists()
    assert train_mil(replace(broken, resume=True)) == results  # finished: nothing is done again


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    made = make_cohort(tmp_path / "features", slides=8, tiles=3, planted=1)
    config = settings(made, tmp_path / "run", epochs=2)
    with pytest.raises(Killed):
        train_mil(config, on_event=kill_at(0, 1))
    (made[0] / "s00.h5").unlink()
    write_bag(made[0] / "s00.h5", np.ones((3, DIM), np.float32))
    with pytest.raises(
        GloVLMError, match=r"Since the run in .* was begun, the features have changed"
    ):
        train_mil(replace(config, resume=True))
    assert train_mil(replace(config, overwrite=True))["n"] == 2


def test_a_finished_run_is_not_taken_up_with_other_labels_or_patients(tmp_path: Path) -> None:
    made = make_cohort(tmp_path / "features", slides=8, tiles=3, planted=1)
    config = settings(made, tmp_path / "run", epochs=1)
    results = train_mil(config)
    assert train_mil(replace(config, resume=True)) == results
    table = made[1].read_text()
    rows = table.splitlines()
    for what, changed in (
        ("labels", [rows[0], *(row.replace("normal", "new") for row in rows[1:])]),
        ("groups", [rows[0], *(f"{row}9" for row in rows[1:])]),
    ):
        made[1].write_text("\n".join(changed) + "\n")
        with pytest.raises(GloVLMError, match=rf"the {what} have changed.*--overwrite"):
            train_mil(replace(config, resume=True))
    made[1].write_text(table)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for act in (
        lambda: load_aggregator(tmp_path / "run"),
        lambda: train_mil(replace(config, resume=True)),
    ):
        with pytest.raises(GloVLMError, match=r"model\.safetensors' has changed"):
            act()


# ------------------------------------------------------------------------------------ bad input


def break_cohort(folder: Path, harm: str) -> Cohort:
    """Eight slides of four patients with one thing wrong."""
    made = make_cohort(folder / "features", slides=8, tiles=3, planted=1, per_patient=2)
    rows = read_table(made[1])
    bags = made[0]
    if harm == "missing":
        (bags / "s03.h5").unlink()
    if harm == "one class":
        rows = [[s, "normal", p] for s, _, p in rows]
    if harm == "one patient":
        rows = [[s, "rare" if p == "p01" else label, p] for s, label, p in rows]
    if harm == "width":
        (bags / "s05.h5").unlink()
        write_bag(bags / "s05.h5", np.ones((3, DIM + 1), np.float32))
    if harm == "model":
        (bags / "s05.h5").unlink()
        write_bag(bags / "s05.h5", np.ones((3, DIM), np.float32), fingerprint="b" * 32)
    if harm in ("copy", "copy of a label"):
        source = read_bag(bags / "s00.h5").features
        target = "s02" if harm == "copy" else "s01"
        (bags / f"{target}.h5").unlink()
        write_bag(bags / f"{target}.h5", source)
        if harm == "copy of a label":
            rows[1][1] = "tumour"
    if harm in ("empty", "not finite"):
        import h5py

        features = np.zeros((0, DIM)) if harm == "empty" else np.full((2, DIM), np.nan)
        with h5py.File(bags / "s04.h5", "w") as file:
            file["features"], file["coords"] = features, np.zeros((len(features), 2), np.int64)
    return bags, write_table(made[1], rows), made[2]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", r"1 of 8 slides have no file \(s03\)"),
        ("one class", "at least two classes, found one"),
        ("one patient", "The class rare has 1 patient, so it cannot be both learned and tested"),
        ("width", "s05 has features of width 17, the slides before it of width 16"),
        ("model", "s05 was encoded by another model than s00"),
        ("copy", "s00 and s02 hold the very same features but differ in patient or label"),
        ("copy of a label", "s00 and s01 hold the very same features"),
        ("empty", r"s04 has no tile \(an empty bag\)"),
        ("not finite", "s04 holds features that are not finite"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(
    tmp_path: Path, harm: str, message: str
) -> None:
    config = settings(break_cohort(tmp_path, harm), tmp_path / "run")
    with pytest.raises(GloVLMError, match=message):
        train_mil(config)
    assert not (tmp_path / "run").exists()


def test_a_feature_file_without_a_row_is_left_out_and_noted(small: Cohort, tmp_path: Path) -> None:
    table = write_table(tmp_path / "s.csv", [r for r in read_table(small[1]) if r[2] != "p05"])
    config = replace(settings(small, tmp_path / "run", epochs=1), labels=str(table))
    results = train_mil(config)
    assert "2 feature files have no row and were left out." in results["notes"]


def test_a_loss_that_is_not_finite_leaves_nothing_behind(small: Cohort, tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="The loss became"):
        train_mil(settings(small, tmp_path / "run", lr=1e30, epochs=6))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "abmill"}, r"Unknown aggregator 'abmill'.*'abmil'"),
        ({"aggregator_config": {"depth": 2}}, "no setting 'depth'"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"max_tiles": 0}, "max_tiles must be above 0"),
        ({"seed": -1}, "0 or more; found -1"),
        ({"folds": 1}, "folds must be 2 or more"),
        ({"test_fraction": 1.0}, "test_fraction must be above 0 and below 1"),
        ({"validation_fraction": -0.1}, "validation_fraction must be 0 or more and below 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
        ({"device": "gpu"}, "device must be one of auto, cpu"),
        ({"fold": 3}, r"Unknown setting 'fold' in the configuration.*'folds'"),
        ({"labels": ""}, "A run needs labels: give --labels"),
    ],
)
def test_a_wrong_setting_is_refused(options: dict[str, Any], message: str) -> None:
    required = {"features": "f", "labels": "l.csv", "output_dir": "o"}
    with pytest.raises(GloVLMError, match=message):
        MilConfig.from_mapping(required | options)


def test_more_folds_than_patients_are_refused(small: Cohort, tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match="7 folds need as many patients or slides, found 6"):
        train_mil(settings(small, tmp_path / "run", folds=7))


def test_a_folder_of_something_else_is_not_touched(small: Cohort, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GloVLMError, match="holds files that are no run of ours"):
        train_mil(settings(small, tmp_path))
    with pytest.raises(GloVLMError, match="must be a folder"):
        train_mil(settings(small, tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------- two processes


@pytest.mark.long
def test_two_processes_train_to_the_weights_of_one(small: Cohort, tmp_path: Path) -> None:
    """Without dropout and sampled tiles, which each process draws for itself."""
    config = settings(
        small,
        tmp_path / "one",
        epochs=2,
        batch_size=3,
        lr=1e-3,
        aggregator_config={**TINY["abmil"], "dropout": 0.0},
    )
    one = train_mil(config)
    two = replace(config, output_dir=str(tmp_path / "two"))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two.to_repeat()))
    run_two_ranks(Path(__file__).resolve(), tmp_path / "two.yaml")
    observed = json.loads((tmp_path / "two" / "results.json").read_text())
    assert observed["environment"]["num_processes"] == 2
    assert observed["data"] == one["data"]
    weights = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two")]
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) < 1e-4
    losses = [
        [json.loads(r)["loss"] for r in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


if __name__ == "__main__":
    train_mil(MilConfig.from_mapping(yaml.safe_load(Path(sys.argv[1]).read_text())))
