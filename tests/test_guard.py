"""Images unlike the support are said, and never classified in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from command_line import Glovlm
from PIL import Image
from scipy.stats import t
from tolerance import assert_same_numbers
from transformers import AutoModel, AutoModelForImageClassification

from hf_glovlm import Predictions, adapt, evaluate, load_backbone, load_dataset, predict
from hf_glovlm.inference.guard import NO_GUARD, fit_guard
from hf_glovlm.inference.sentences import (
    build_zero_shot,
    describe_limits,
    describe_predictions,
)


def cloud(n: int, seed: int = 0, dim: int = 12) -> tuple[Any, list[int]]:
    """Two classes on either side of a common direction."""
    rng = np.random.default_rng(seed)
    labels = [i % 2 for i in range(n)]
    centres = np.eye(dim)[:2] + 3 * np.eye(dim)[2]
    return (centres[labels] + rng.normal(0, 0.1, (n, dim))).astype(np.float32), labels


def by_hand(x: Any, labels: Any, queries: Any) -> Any:
    """Mahalanobis to the nearest class mean, half shrunk, by the formula."""
    x, queries = (v.astype(np.float64) for v in (x, queries))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    y = np.array(labels)
    means = {k: x[y == k].mean(0) for k in set(labels)}
    rest = np.stack([row - means[k] for row, k in zip(x, labels, strict=True)])
    covariance = rest.T @ rest / (len(x) - len(means))
    dim = x.shape[1]
    shrunk = 0.5 * covariance + 0.5 * np.trace(covariance) / dim * np.eye(dim)
    precision = np.linalg.inv(shrunk)
    far = [[(q - m) @ precision @ (q - m) for m in means.values()] for q in queries]
    return np.sqrt(np.min(far, axis=1) / dim)


def test_the_distance_and_its_limit_follow_their_formulas() -> None:
    x, labels = cloud(12)
    groups = [f"p{i // 2}" for i in range(12)]
    guard = fit_guard(x, labels, groups)
    assert guard is not None
    left_out = np.concatenate([
        by_hand(
            np.delete(x, [2 * g, 2 * g + 1], 0),
            [labels[i] for i in range(12) if i // 2 != g],
            x[2 * g : 2 * g + 2],
        )
        for g in range(6)
    ])  # fmt: skip
    limit = left_out.mean() + t.ppf(0.975, 5) * left_out.std(ddof=1) * np.sqrt(7 / 6)
    assert guard.threshold == pytest.approx(limit, rel=1e-5)
    queries = np.concatenate([cloud(5, seed=1)[0], np.eye(12)[5:8].astype(np.float32)])
    actual = guard(torch.from_numpy(queries))
    assert_same_numbers(actual, by_hand(x, labels, queries) / limit)
    assert (actual[-3:] > 1).all()
    half = guard.half()(torch.from_numpy(queries).half())
    torch.testing.assert_close(half, actual, rtol=0.05, atol=0.02)


def test_few_images_of_the_same_kind_are_flagged() -> None:
    shares = []
    for seed in range(40):
        guard = fit_guard(*cloud(16, seed))
        assert guard is not None
        queries = torch.from_numpy(cloud(200, 1000 + seed)[0])
        shares.append(float((guard(queries) > 1).float().mean()))
    assert np.mean(shares) < 0.04


@pytest.mark.parametrize(
    ("n", "labels", "groups"),
    [
        (0, [], None),
        (2, [0, 1], None),  # one shot: nothing of a class measures the rest of it
        (8, None, ["p"] * 8),  # one patient
        (8, None, ["p", "q"] * 4),  # two, each of one class
    ],
)
def test_a_support_too_small_has_no_guard(n: int, labels: Any, groups: Any) -> None:
    x, y = cloud(n)
    assert fit_guard(x, y if labels is None else labels, groups) is None


def test_copies_of_one_image_have_no_guard() -> None:
    assert fit_guard(np.repeat(cloud(2)[0], 4, 0), [0] * 4 + [1] * 4) is None


def test_a_large_support_stays_cheap() -> None:
    x, labels = cloud(3000, dim=8)
    guard = fit_guard(x, labels, [str(i // 3) for i in range(3000)])
    assert guard is not None
    assert guard.directions.shape == (8, 8)
    assert guard.images == 1000
    assert float((guard(torch.from_numpy(x)) > 1).float().mean()) == pytest.approx(0.025, abs=0.02)


# ------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("backbone", [tiny.tiny_clip, tiny.tiny_siglip, tiny.tiny_pair])
def test_what_is_compared_is_the_mean_patch_of_the_middle(backbone: Any) -> None:
    model, _ = load_backbone(str(backbone()))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled, middle = model.pool_images_and_middle(pixels)
        states = model.get_image_features(pixels, output_hidden_states=True).hidden_states
        assert pooled.equal(model.pool_images(pixels))
    blocks = len(states) - 1
    assert_same_numbers(middle, states[blocks // 2 + 1][:, -16:].mean(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_images(tmp_path_factory.mktemp("guard") / "discs", per_class=12, groups=12)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run's folder."""
    from hf_glovlm import TrainConfig
    from hf_glovlm import run as train

    output = folder.parent / "run"
    train(
        TrainConfig(
            data=str(folder), output_dir=str(output), backbone=str(tiny.tiny_clip()),
            method="linear_probe", shots=6, cache=False, n_resamples=20,
        )
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def strange(folder: Path) -> Path:
    """Noise, which no disc is like, and one of the discs."""
    place = folder.parent / "strange"
    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"noise_{i}.png")
    Image.open(folder / "viable" / "image_00.png").save(place / "viable.png")
    return place


def test_predict_names_images_unlike_the_support(
    run: Path, strange: Path, glovlm: Glovlm, tmp_path: Path
) -> None:
    done = glovlm("predict", run, strange, "--json")
    assert done.code == 0
    rows = {row["file_name"]: row for row in json.loads(done.out)}
    assert {row.get("unlike_support") for row in rows.values()} == {"yes", "no"}
    for name, row in rows.items():
        assert row["unlike_support"] == ("yes" if name.startswith("noise") else "no")
        assert (row["support_distance"] > 1) == name.startswith("noise")
        # The class is what the probabilities say, as ever.
        best = max((k for k in row if k.startswith("p_")), key=lambda k: row[k])
        assert row["predicted"] == best.removeprefix("p_")
    glovlm("predict", run, strange, "--output", tmp_path / "table.csv")
    table = pd.read_csv(tmp_path / "table.csv")
    assert dict(zip(table.file_name, table.unlike_support, strict=True)) == {
        name: row["unlike_support"] for name, row in rows.items()
    }


def test_evaluate_counts_images_unlike_the_support(folder: Path, run: Path, strange: Path) -> None:
    lines = ["file_name,label,patient_id"]
    names = [*tiny.CLASSES, "viable"]
    files = sorted(strange.glob("*.png"))
    lines += [f"{p.name},{names[i]},new_{i}" for i, p in enumerate(files)]
    (strange / "metadata.csv").write_text("\n".join(lines) + "\n")
    results = evaluate(str(run), str(strange), n_resamples=10, cache=False, allow_seen=True)
    (strange / "metadata.csv").unlink()
    assert any("3 of 4 images are unlike the support" in note for note in results["notes"])
    assert results["n"] == 4


@pytest.mark.parametrize("method", ["prototype", "tip_adapter", "linear_probe", "lora", "full"])
@pytest.mark.parametrize("backbone", [tiny.tiny_clip, tiny.tiny_pair])
def test_every_adapted_model_keeps_its_guard(
    method: str, backbone: Any, folder: Path, tmp_path: Path
) -> None:
    rows = load_dataset(folder)["all"]
    config = {"recipe": {"epochs": 1}} if method in ("lora", "full") else {}
    adapted = adapt(str(backbone()), method, rows, config=config, groups=rows["patient_id"])
    kept = adapted.model.config.guard
    assert kept["groups"] == 12
    expected = predict(adapted.model, adapted.processor, rows)
    assert expected.support_distances is not None
    adapted.save(tmp_path / "model")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    actual = predict(again, adapted.processor, rows)
    distances = actual.support_distances
    # Whitening divides by a small spread, which magnifies rounding.
    np.testing.assert_allclose(distances, expected.support_distances, rtol=1e-3, atol=1e-3)
    assert again.config.guard == kept
    assert AutoModel.from_pretrained(tmp_path / "model").config.guard == kept
    actual.save(tmp_path / "p.parquet")
    loaded = Predictions.load(tmp_path / "p.parquet")
    np.testing.assert_array_equal(loaded.support_distances, actual.support_distances)
    np.testing.assert_array_equal(loaded.unlike_support, actual.unlike_support)


def test_a_sentence_says_that_an_image_is_unlike_the_support(folder: Path) -> None:
    rows = load_dataset(folder)["all"]
    adapted = adapt(str(tiny.tiny_clip()), "linear_probe", rows)
    predictions = predict(adapted.model, adapted.processor, rows.select(range(2)))
    predictions.support_distances = np.array([0.4, 2.5])
    near, far = describe_predictions(predictions, adapted.model.config)
    assert "unlike" not in near.sentence
    assert near.answered is None
    assert far.answered is False
    assert far.sentence.startswith("No answer: the image is unlike")
    assert "2.5 times" in far.sentence
    assert far.label == predictions.predicted[1]
    assert NO_GUARD not in describe_limits(adapted.model.config)


def test_a_model_without_a_guard_says_so(folder: Path, run: Path) -> None:
    rows = load_dataset(folder)["all"]
    adapted = adapt(str(tiny.tiny_clip()), "linear_probe", rows)
    adapted.model.set_guard(None)
    predictions = predict(adapted.model, adapted.processor, rows)
    assert predictions.support_distances is predictions.unlike_support is None
    assert NO_GUARD in describe_limits(adapted.model.config)
    prompts = {name: [name] for name in tiny.CLASSES}
    own = adapt(str(tiny.tiny_clip()), "linear_probe", rows)
    words = build_zero_shot(own.model.glovlm, own.processor, prompts)
    assert words.guard is words.config.guard is None


def test_new_classes_leave_the_old_guard(folder: Path, run: Path) -> None:
    new = AutoModelForImageClassification.from_pretrained(
        run / "model", id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True
    )
    assert new.guard is new.config.guard is None
