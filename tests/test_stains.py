"""Stains: stated by a column or the user, contradicted by names, and centred within each."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Glovlm
from datasets import Dataset
from slide_model import train
from slides_made import write_slide
from tiny import tiny_clip, tiny_images
from tolerance import assert_same_numbers
from transformers import AutoModelForImageClassification

from hf_glovlm import adapt, adapt_features, embed_images, load_backbone, load_dataset, predict
from hf_glovlm.data import all_rows
from hf_glovlm.data.stains import (
    contradictions,
    find_stain_in_name,
    name_stain,
    read_stains,
    state_stains,
)
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import load_classifier
from hf_glovlm.inference.sentences import build_zero_shot, describe_limits
from hf_glovlm.inference.stains import find_centres, fit_centres
from hf_glovlm.lab.stain_bench import Stained, draw_split, draw_support
from hf_glovlm.publish.onnx_graph import export_classifier
from hf_glovlm.slides.classify import classify_slides
from hf_glovlm.slides.config import SlideConfig
from hf_glovlm.slides.encoding import encode_slide
from hf_glovlm.slides.files.bags import read_bag
from hf_glovlm.slides.stains import stain_flags


@pytest.mark.parametrize(
    ("written", "stain"),
    [
        ("PASM", "silver"),
        ("h&e", "H&E"),
        ("Masson's_Trichrome", "trichrome"),
        (" Congo  red", "Congo red"),  # not in the terminology
        ("N/A", None),
        ("", None),
        (None, None),
    ],
)
def test_a_stain_has_one_name(written: str | None, stain: str | None) -> None:
    assert name_stain(written) == stain


@pytest.mark.parametrize(
    ("name", "stain"),
    [
        ("p07_PASM_2", "silver"),
        ("S-18-162_PAS.svs", "PAS"),
        ("block A, Masson trichrome (3).ndpi", "trichrome"),
        ("case_H&E", "H&E"),
        ("p07PASM", None),
        ("pasture_heart_triple", None),
        ("PAS_then_HE", None),  # two that differ
        ("normal/12.png", None),
    ],
)
def test_a_name_says_a_stain_as_a_whole_word(name: str, stain: str | None) -> None:
    assert find_stain_in_name(name) == stain


def rows_of(stains: list[str | None] | None, names: list[str]) -> Dataset:
    columns: dict[str, list[Any]] = {"file_name": names}
    return Dataset.from_dict(columns if stains is None else {**columns, "stain": stains})


def test_the_column_counts_and_the_user_fills_in_what_it_leaves_open() -> None:
    rows = rows_of(["Masson", "trichrome", None, "congo-red", "Congo red"], [*"abcde"])
    stated, notes = state_stains(rows, "HE")
    assert stated["stain"][:] == ["trichrome", "trichrome", "H&E", "congo-red", "congo-red"]
    assert stated.column_names == rows.column_names
    assert len(notes) == 3
    assert "given as H&E" in notes[0]
    assert "congo-red of 2 and trichrome of 2" in notes[0]
    assert "'Congo red' and 'congo-red'" in notes[1]
    assert "'Masson' and 'trichrome'" in notes[2]
    assert state_stains(rows_of(None, ["a"]), "PAS")[0]["stain"][:] == ["PAS"]
    assert "stain" not in state_stains(rows_of(None, ["a_PAS"]))[0].column_names


def test_names_contradict_and_never_decide() -> None:
    rows = rows_of(["H&E", "HE", "PAS", None, None], ["1_PAS", "2_pas", "3_PAS", "4_PASM", "5"])
    assert read_stains(rows) == ["H&E", "H&E", "PAS", None, None]
    stated, silent = contradictions(rows)
    assert "stated as H&E, and 2 names say PAS" in stated
    assert "silver of 1" in silent
    assert "--stain" in silent
    assert contradictions(rows_of(["PAS"], ["3_PAS"])) == contradictions(rows_of(None, ["3"])) == []


# ------------------------------------------------------------------------------------ centres


def means_by_hand(features: Any, by: list[str]) -> dict[str | None, Any]:
    """Mean of the unit features of each stain; of all means, under `None`."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = {stain: unit[np.array(by) == stain].mean(0) for stain in {*by}}
    return {**means, None: np.mean([*means.values()], axis=0)}


def centred_by_hand(features: Any, means: Any, own: list[str | None]) -> Any:
    """Unit features less the mean of their stain's, of length one again."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    rest = unit - np.stack([means.get(stain, means[None]) for stain in own])
    return rest / np.linalg.norm(rest, axis=1, keepdims=True)


def test_features_are_centred_by_the_mean_of_their_stain() -> None:
    features = np.random.default_rng(0).normal(1, 1, (20, 6)).astype(np.float32)
    by = ["PAS"] * 12 + ["silver"] * 8
    centres, (note,) = fit_centres(features, by)
    assert "PAS 12, silver 8" in note
    assert "transductive" in note
    tensor = torch.from_numpy(features)
    means = means_by_hand(features, by)
    for own in (by, ["H&E", None, *by[2:]]):
        ids = find_centres(centres, own)
        assert_same_numbers(centres(tensor, ids), centred_by_hand(features, means, own))
    assert torch.equal(find_centres(centres, ["pas", "Silver", "H&E"]), torch.tensor([0, 1, -1]))
    assert_same_numbers(centres(tensor), centred_by_hand(features, means, [None] * 20))


def test_a_stain_of_few_images_has_no_centre_of_its_own() -> None:
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    centres, notes = fit_centres(features, [*["PAS"] * 10, "silver", None])
    assert centres.stains == ["PAS"]
    assert "silver 1" in notes[1]
    assert "1 of 12 images have no stain" in notes[2]
    with pytest.raises(GloVLMError, match=r"at least 8 images of a stain.*found PAS 7, silver 5"):
        fit_centres(features, ["PAS"] * 7 + ["silver"] * 5)
    with pytest.raises(GloVLMError, match=r"no stain of any of 12 images.*--stain"):
        fit_centres(features, [None] * 12)


@pytest.fixture(scope="module")
def stained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny images of three classes in two stains, and the name of a slide for each."""
    folder = tiny_images(tmp_path_factory.mktemp("stains") / "data")
    with (folder / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row["stain"] = "Masson" if i % 8 < 4 else "PASM"
        row["slide_id"] = f"{row['patient_id']} {'HE' if i == 0 else ''}"
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("method", ["linear_probe", "tip_adapter"])
def test_a_head_learns_from_centred_features_and_takes_the_centres_along(
    method: str, stained: Path, tmp_path: Path
) -> None:
    rows, _ = state_stains(all_rows(load_dataset(stained)))
    support = rows.select(range(0, 24, 2))
    model, processor = load_backbone(str(tiny_clip()))
    features = embed_images(model, processor, rows).astype(np.float64)
    stains = read_stains(rows)
    means = means_by_hand(features, [s or "" for s in stains])
    expected = centred_by_hand(features, means, stains)
    texts = None
    if method == "tip_adapter":
        plain = adapt(model, method, support, processor=processor).model.head
        texts = plain.text.weight.detach().numpy()
    scale = model.logit_scale.exp().item()
    labels = support["label"][:]
    reference = adapt_features(method, expected[::2], labels, texts, logit_scale=scale)

    adapted = adapt(
        model,
        method,
        support,
        processor=processor,
        unlabelled=rows.remove_columns("label"),
        config={"centre": "stain"},
    )
    assert any("centred within each stain" in note for note in adapted.notes)
    assert adapted.model.config.stains == ["silver", "trichrome"]
    adapted.save(tmp_path / "model")
    loaded, _, _ = load_classifier(tmp_path / "model")
    for classifier in (adapted.model, loaded):
        predicted = predict(classifier, processor, rows)
        assert predicted.notes == [n for n in predicted.notes if "stated as trichrome" in n]
        assert_same_numbers(predicted.logits, reference.predict_logits(expected), roundings=10_000)
        assert predicted.similarities is None
    # Of a stain without a centre, and of none, the mean of the centres stands in, and it is said.
    other, _ = state_stains(rows.remove_columns("stain"), "PAS")
    by_mean = centred_by_hand(features, means, [None] * 24)
    predicted = predict(loaded, processor, other)
    assert_same_numbers(predicted.logits, reference.predict_logits(by_mean), roundings=10_000)
    assert "24 of 24 images are of a stain that the model did not learn from: PAS 24" in " ".join(
        predicted.notes
    )
    assert "24 of 24 images have no centre" in " ".join(predicted.notes)


def test_without_a_stain_the_model_itself_warns_once(
    stained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, _ = state_stains(all_rows(load_dataset(stained)))
    adapted = adapt(str(tiny_clip()), "linear_probe", rows, config={"centre": "stain"})
    adapted.save(tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert "stained silver and trichrome alone" in " ".join(describe_limits(model.config))
    assert "where none is stated" in " ".join(describe_limits(model.config))
    plain = build_zero_shot(model.glovlm, adapted.processor, {"a": ["a tuft"], "b": ["a cast"]})
    assert plain.centres is plain.config.stain_centres is plain.config.stains is None
    pixels = torch.randn(2, 3, 32, 32)
    logging.getLogger("transformers").propagate = True
    try:
        with torch.no_grad():
            first, second = model(pixels).logits, model(pixels).logits
            known = model(pixels, stain_ids=torch.tensor([-1, -1])).logits
            one = model(pixels, stain_ids=torch.tensor([0, 1])).logits
    finally:
        logging.getLogger("transformers").propagate = False
    assert torch.equal(first, second)
    assert torch.equal(first, known)
    assert not torch.allclose(first, one)
    assert [r.message for r in caplog.records if "centres features by the stain" in r.message]
    model.config.backbone_license = "mit"
    with pytest.raises(GloVLMError, match="a graph has no input that states it"):
        export_classifier(model, adapted.processor, tmp_path / "graph")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("lora", "trains what makes the features"),
        ("prolip", "trains what makes the features"),
        ("zero_shot", "a prior correction that nobody declared"),
        ("linear_probe", "found no stain of any of 24 images"),
    ],
)
def test_what_cannot_be_centred_is_refused(method: str, sentence: str, tmp_path: Path) -> None:
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images")))
    with pytest.raises(GloVLMError, match=sentence):
        adapt(str(tiny_clip()), method, rows, config={"centre": "stain"})


# --------------------------------------------------------------------------------- a whole run


def test_a_run_states_stains_and_later_images_are_compared_with_them(
    stained: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    run = tmp_path / "run"
    given = ("--backbone", tiny_clip(), "--method", "gda", "--shots", 2, "--n-resamples", 20)
    done = glovlm(
        "train", "--data", stained, "--output-dir", run, *given, "--centre", "stain",
        "--calibration-groups", 1, "--stain", "HE",
    )  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads((run / "results.json").read_text())
    notes = " ".join(results["notes"])
    assert "silver 12, trichrome 12" in notes
    assert "given as H&E, and the column stain says silver of 12 and trichrome of 12" in notes
    assert "stated as trichrome, and 1 name says H&E" in notes
    assert results["data"]["stain"] == ["silver", "trichrome"]
    learned = results["data"]["trained_stains"]
    assert learned == json.loads((run / "model" / "config.json").read_text())["stains"]
    assert f"it learned from {', '.join(learned)}" in (run / "README.md").read_text()
    assert {*results["subgroups"]["stain"]} == {"silver", "trichrome"}

    done = glovlm("data", "check", stained)
    assert "stated as trichrome, and 1 name says H&E" in done.err
    other = tiny_images(tmp_path / "other", per_class=2, seed=1)
    done = glovlm("predict", run, other, "--stain", "Congo red")
    assert done.code == 0
    assert "6 of 6 images are of a stain that the model did not learn from: Congo red 6" in done.err
    assert "6 of 6 images have no centre of their own stain" in done.err
    done = glovlm("predict", run, stained)  # whose table states them
    assert "did not learn from" not in done.err
    assert "no centre" not in done.err
    done = glovlm(
        "evaluate",
        run,
        "--data",
        other,
        "--stain",
        "PAS",
        "--allow-seen",
        "--n-resamples",
        20,
        "--output",
        tmp_path / "e.json",
    )
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "e.json").read_text())
    assert "did not learn from: PAS 6" in " ".join(results["notes"])
    assert results["data"]["stain"] == ["PAS"]


# ------------------------------------------------------------------------------------- slides


@pytest.mark.parametrize(
    ("stain", "name", "parts"),
    [
        ("silver", "S1_PASM", ["learned from PAS"]),
        ("H&E", "S1_PASM", ["stated as H&E, and the slide's name says silver", "stained H&E"]),
        (None, "S1_PAS", ["seems to say PAS: --stain"]),
        (None, "S1", []),
        ("PAS", "S1", []),
    ],
)
def test_the_stain_of_a_slide_is_compared(stain: str | None, name: str, parts: list[str]) -> None:
    model = SimpleNamespace(config=SimpleNamespace(stains=["PAS"]), centres=None)
    flags = stain_flags(model, stain, name)
    assert len(flags) == len(parts)
    assert all(part in flag for part, flag in zip(parts, flags, strict=True))


def test_a_slide_is_centred_by_its_stain(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", 256, 192, mpp=0.5, lesions=0, seed=1)
    train(tmp_path)
    model, processor, _ = load_classifier(tmp_path / "run")
    features = np.random.default_rng(0).normal(size=(16, model.config.image_feature_dim))
    by = ["PAS"] * 8 + ["silver"] * 8
    model.set_centres(fit_centres(features.astype(np.float32), by)[0])
    model.save_pretrained(tmp_path / "run" / "model")
    settings: dict[str, Any] = {"tile_size": 64, "stain": "silver"}
    done = encode_slide(model, processor, tmp_path / "a.tiff", tmp_path / "silver.h5", **settings)
    (tmp_path / "cases.csv").write_text("slide_id,stain\na,Congo red\n")
    values = {
        "model": str(tmp_path / "run"),
        "slides": [str(tmp_path / "a.tiff")],
        "cases": str(tmp_path / "cases.csv"),
        "output_dir": str(tmp_path / "out"),
        "tile_size": 64,
    }
    (entry,) = classify_slides(SlideConfig.from_mapping(values))["slides"]
    assert entry["stain"] == "Congo red"
    assert "no centre of this slide's (Congo red; centres: PAS, silver)" in " ".join(entry["flags"])
    paths = (done.path, tmp_path / "out" / "features" / "a.h5")
    own, mean = (read_bag(path, scores=True) for path in paths)
    assert np.array_equal(own.features, mean.features)
    means = means_by_hand(features, by)
    for bag, stain in ((own, "silver"), (mean, None)):
        centred = centred_by_hand(bag.features, means, [stain] * len(bag.features))
        with torch.no_grad():
            expected = model.head(torch.from_numpy(centred).float())
        assert_same_numbers(bag.scores, expected, roundings=10_000)
    with pytest.raises(GloVLMError, match=r"--stain is H&E and .* has Congo red"):
        classify_slides(SlideConfig.from_mapping({**values, "stain": "HE"}))


# ------------------------------------------------------------------------------ the comparison


def test_a_split_has_three_patients_of_each_class_and_a_support_takes_each_in_turn() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{i:02d}" for i in range(10)], 5)
    labels, stains = rng.binomial(1, 0.5, 50), np.array(["PAS", "silver"])[rng.integers(0, 2, 50)]
    data = Stained({}, labels, stains, patients, ["a", "b"])
    again = 0
    for draw in range(5):
        inside, tries = draw_split(data, ["PAS"], ["PAS", "silver"], 0, draw)
        again += tries
        assert len({*patients[inside]}) == 5
        for side, stain in ((inside, "PAS"), (~inside, "PAS"), (~inside, "silver")):
            rows = side & (stains == stain)
            assert min(len({*patients[rows & (labels == k)]}) for k in (0, 1)) >= 3
        support = draw_support(data, inside, 8, [0, draw])
        for k in (0, 1):
            own = patients[support[labels[support] == k]].tolist()
            there = {*patients[inside & (labels == k)]}
            assert len(own) == min(8, int((inside & (labels == k)).sum()))
            assert {*own} == there or len({*own}) == 8  # every patient before one comes again
        few = draw_support(data, inside, 2, [0, draw])
        assert {*few} <= {*support}
    assert again > 0
    with pytest.raises(GloVLMError, match="leave a class out"):
        draw_split(data.select(patients < "p04"), ["PAS"], ["PAS"], 0, 0)
