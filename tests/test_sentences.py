"""Predictions in words, copies that share weights, and leave-one-patient-out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from hf_glovlm import GloVLMError, adapt, load_backbone, load_dataset, predict
from hf_glovlm.calibration import abstention_threshold, fit_conformal
from hf_glovlm.inference import Predictions
from hf_glovlm.inference.cache import MemoryCache
from hf_glovlm.inference.sentences import (
    RESEARCH_ONLY,
    build_zero_shot,
    calibration_columns,
    copy_sharing_weights,
    describe_classes,
    describe_image_scale,
    describe_limits,
    describe_predictions,
)
from hf_glovlm.runs import cross_validation
from hf_glovlm.runs.cross_validation import leave_patients_out

NAMES = ["big_scar", "viable", "other"]


def predictions(rows: list[list[float]]) -> Predictions:
    p = np.array(rows)
    return Predictions(p, np.log(p).astype(np.float32), NAMES, [f"{i}.png" for i in range(len(p))])


def config(**calibration: Any) -> Any:
    return SimpleNamespace(
        calibration=calibration or None,
        temperature=1.0,
        synthetic=False,
        backbone_name="x",
        stains=None,
        stain_centres=None,
        guard={"images": 16},
        id2label=dict(enumerate(NAMES)),
        outline="ignore",
        outline_of=None,
    )


def test_plain_predictions() -> None:
    first, second = describe_predictions(
        predictions([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05]]), config()
    )
    assert (first.label, second.label) == ("viable", "big_scar")
    assert first.probabilities == pytest.approx({"big_scar": 0.2, "viable": 0.7, "other": 0.1})
    assert first.classes is first.answered is None
    assert second.sentence == "big scar, with a probability of 0.90."
    assert calibration_columns(predictions([[0.2, 0.7, 0.1]]), {}) == {}


def test_sets_and_abstention_agree_with_their_definition() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.3] * 3, size=400)
    y = np.array([rng.choice(3, p=row) for row in p])
    sets = fit_conformal(p, y, method="lac", alpha=0.1, class_names=NAMES)
    abstain = abstention_threshold(p, y, 0.2)
    assert abstain.threshold is not None
    calibration = {"conformal": sets.to_dict(), "abstention": abstain.to_dict(), "notes": ["Note."]}
    in_words = describe_predictions(predictions(p[:50].tolist()), config(**calibration))
    columns = calibration_columns(predictions(p[:50].tolist()), calibration)
    for row, prediction, members, yes in zip(
        p, in_words, columns["set"], columns["answers"], strict=False
    ):
        inside = {name for name, value in zip(NAMES, row, strict=True)
                  if 1 - value <= sets.thresholds[0]}  # fmt: skip
        assert prediction.classes is not None
        assert set(prediction.classes) == inside
        assert set(members.split(" or ")) == (inside or {"none"})
        assert prediction.answered is bool(row.max() >= abstain.threshold) is (yes == "yes")
        assert prediction.sentence.startswith("No answer") is not prediction.answered
    assert {a.answered for a in in_words} == {True, False}
    assert describe_limits(config(**calibration)) == ["Note.", RESEARCH_ONLY]
    never = abstention_threshold(p[:5], y[:5], 0.01).to_dict()
    (prediction,) = describe_predictions(
        predictions([[0.98, 0.01, 0.01]]), config(abstention=never)
    )
    assert prediction.answered is False
    assert "no confidence" in prediction.sentence


def test_limits_name_synthetic_images() -> None:
    for about in ({"synthetic": True}, {"backbone_name": "mini"}):
        limits = describe_limits(SimpleNamespace(**(vars(config()) | about)))
        assert "synthetic" in limits[0]
        assert limits[-1] == RESEARCH_ONLY
    assert not any("synthetic" in sentence for sentence in describe_limits(config()))


@pytest.fixture(scope="module")
def backbone() -> tuple[Any, Any]:
    return load_backbone(str(tiny.tiny_clip()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tiny.tiny_images(tmp_path_factory.mktemp("images"), per_class=8, groups=4)
    return load_dataset(folder)["all"]


def test_a_copy_shares_weights_and_nothing_else(backbone: tuple[Any, Any]) -> None:
    model = backbone[0]
    own = copy_sharing_weights(model)
    pairs = list(zip(model.named_parameters(), own.named_parameters(), strict=True))
    shared = {n: a.data_ptr() == b.data_ptr() for (n, a), (_, b) in pairs}
    assert {n for n, same in shared.items() if not same} == {n for n in shared if "projection" in n}
    own.requires_grad_(False).train()
    own.config.temperature = 3.0
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.config.temperature == 1.0


def test_zero_shot_from_prompts_equals_adapt(backbone: tuple[Any, Any], rows: Dataset) -> None:
    model, processor = backbone
    before = model.config.to_dict()
    prompts = {name: [f"A pathology image of {name}"] for name in tiny.CLASSES}
    classifier = build_zero_shot(model, processor, prompts)
    adapted = adapt(copy_sharing_weights(model), "zero_shot", rows.select([]), processor=processor)
    one, other = predict(classifier, processor, rows), predict(adapted.model, processor, rows)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    assert model.config.to_dict() == before
    described = describe_classes(classifier.config)
    assert described[2].prompts == ("A pathology image of viable",)
    assert "Capillary" in (described[2].definition or "")
    assert "unknown" in describe_image_scale(classifier, processor, rows)
    classifier.config.mpp = 0.5
    assert "cannot be checked" in describe_image_scale(classifier, processor, rows)
    pair = load_backbone(tiny.tiny_pair())
    with pytest.raises(GloVLMError, match="never trained together"):
        build_zero_shot(*pair, prompts)


@pytest.mark.parametrize(
    "method", ["prototype", "linear_probe", pytest.param("prolip", marks=pytest.mark.long)]
)
def test_leave_one_patient_out_equals_refitting(
    backbone: tuple[Any, Any], rows: Dataset, method: str
) -> None:
    model, processor = backbone
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    patients = list(rows["patient_id"])
    progress: list[tuple[int, int]] = []
    estimate = leave_patients_out(
        model, processor, method, rows, patients,
        on_patient=lambda k, n: progress.append((k, n)),
    )  # fmt: skip
    assert progress == [(k, 4) for k in range(1, 5)]
    assert estimate.patients == 4
    assert estimate.predictions is not None
    assert estimate.results is not None
    # One fold by hand, from a model loaded anew and without any cache.
    out = [i for i, p in enumerate(patients) if p == "patient_2"]
    rest = [i for i in range(len(rows)) if i not in out]
    fresh, own = load_backbone(str(tiny.tiny_clip()))
    adapted = adapt(fresh, method, rows.select(rest), processor=own)
    expected = predict(adapted.model, own, rows.select(out)).probabilities
    np.testing.assert_allclose(estimate.predictions.probabilities[out], expected, atol=2e-4)
    predicted = estimate.predictions.probabilities.argmax(1)
    assert estimate.results["metrics"]["accuracy"]["value"] == pytest.approx(
        float((predicted == np.array(rows["label"][:])).mean())
    )
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert "Each of 4 patients" in estimate.sentence


def test_leave_one_patient_out_errors(backbone: tuple[Any, Any], rows: Dataset) -> None:
    model, processor = backbone
    by_class = [f"p{label}" for label in rows["label"]]
    for patients, reason in (
        (None, "no patient ids"), ([""] * len(rows), "no patient ids"),
        (["a", *[""] * (len(rows) - 1)], f"known of 1 of {len(rows)}"),
        (by_class, "'mesangial' has 1"),
    ):  # fmt: skip
        estimate = leave_patients_out(model, processor, "prototype", rows, patients)
        assert estimate.sentence.startswith("Performance cannot be estimated from this upload")
        assert reason in estimate.sentence
        assert estimate.results is estimate.predictions is None
    with pytest.raises(GloVLMError, match="frozen features"):
        leave_patients_out(model, processor, "lora", rows, by_class)
    assert "zero_shot" not in cross_validation.frozen_methods()
    assert "transclip" not in cross_validation.frozen_methods()


def test_the_memory_cache_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path))
    cache = MemoryCache()
    cache.put("a", [b"1" * 16], np.ones((1, 3), np.float32))
    assert cache.get("b", [b"1" * 16]) == {}
    np.testing.assert_array_equal(cache.get("a", [b"1" * 16, b"2" * 16])[b"1" * 16], np.ones(3))
    assert list(tmp_path.iterdir()) == []
