"""File statistics and the shortcut probe: what they measure, flag, and leave alone."""

import io
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hf_glovlm.data.file_statistics import (
    IN_FILES,
    SHORTCUTS,
    STATISTICS,
    FileStatistics,
    measure_file,
)
from hf_glovlm.runs.shortcuts import _fold_groups, describe_probe, fit_predict, probe_labels

SCENE = np.random.default_rng(0).integers(60, 200, (40, 40, 3)).astype(np.uint8)


def scene(side: int = 120) -> Image.Image:
    return Image.fromarray(SCENE).resize((side, side), Image.Resampling.BICUBIC)


def measured(picture: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, float]:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    content = file.getvalue()
    with Image.open(io.BytesIO(content)) as image:
        values = measure_file(content, image.convert("RGB"))
    return dict(zip(IN_FILES, values.tolist(), strict=True))


def test_a_header_says_how_a_file_was_compressed() -> None:
    strong = measured(scene(), "JPEG", quality=40, subsampling=2)
    weak = measured(scene(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0" + bytes(50))
    plain = measured(scene().convert("L"))
    with Image.open(io.BytesIO(_jpeg(40))) as image:
        tables = image.quantization  # type: ignore[attr-defined]
    assert strong["quantisation"] == np.mean(tables[0])
    assert strong["quantisation_colour"] == np.mean(tables[1])
    assert (strong["subsampling"], weak["subsampling"]) == (2, 0)
    assert weak["embedded"] > 50 > strong["embedded"] == 0
    assert math.isnan(plain["quantisation"])
    assert (plain["channels"], plain["width"], plain["aspect"]) == (1, 120, 1)


def _jpeg(quality: int) -> bytes:
    file = io.BytesIO()
    scene().save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_blocks_of_an_earlier_jpeg_are_seen_in_a_png() -> None:
    with Image.open(io.BytesIO(_jpeg(20))) as image:
        before = measured(image.convert("RGB"))
    assert before["blockiness"] > measured(scene())["blockiness"] + 0.1


def test_blur_and_scale_are_measured_in_the_frame_and_not_by_contrast() -> None:
    frame = ("sharpness_1", "sharpness_2", "texture_4", "texture_8", "blockiness")
    sharp = measured(scene())
    other = scene()
    other.paste((255, 255, 255), (20, 20, 100, 100))  # another object in the same surroundings
    assert [measured(other)[name] for name in frame] == [sharp[name] for name in frame]
    assert measured(other)["focus"] != sharp["focus"]
    blurred = measured(scene().filter(ImageFilter.GaussianBlur(1.5)))
    assert blurred["sharpness_1"] < sharp["sharpness_1"] - 0.05
    pale = scene().point([round(128 + (v - 128) / 2) for v in range(256)] * 3)
    assert measured(pale)["sharpness_1"] == pytest.approx(sharp["sharpness_1"], abs=0.05)
    enlarged = measured(scene(240))
    assert enlarged["texture_4"] < sharp["texture_4"] - 0.3


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (17, 17), (40, 3)])
def test_the_smallest_images_are_measured_too(size: tuple[int, int]) -> None:
    values = measured(scene().resize(size))
    assert [values["width"], values["height"]] == [*size]
    assert not any(np.isinf(value) for value in values.values())


# ------------------------------------------------------------------------------- the classifier


def test_a_plain_classifier_learns_what_differs_and_nothing_from_what_does_not() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (60, 20, 20))
    values = rng.normal(size=(100, 3))
    values[:, 1] += 6 * labels
    values[::7, 0] = np.nan
    predicted = fit_predict(values, labels, values, 3)
    np.testing.assert_allclose(predicted.sum(1), 1)
    assert (predicted.argmax(1) == labels).mean() > 0.95
    alike = np.column_stack([np.ones(100), np.full(100, np.nan)])
    np.testing.assert_allclose(fit_predict(alike, labels, alike[:4], 3), 1 / 3)
    # A class that is not there to learn from is named for nothing.
    two = fit_predict(values[labels < 2], labels[labels < 2], values[labels < 2], 3)
    assert (two.argmax(1) < 2).all()


def test_a_fold_holds_whole_groups_and_a_share_of_every_class() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 4)
    labels = np.where(rng.random(120) < 0.2, 1, 0)
    folds = _fold_groups(labels, groups.astype(str), 2)
    assert {len({*folds[groups == group]}) for group in range(30)} == {1}
    assert len({*folds}) == 10
    assert all((labels[folds == fold] == 1).any() for fold in range(10) if labels.sum() > 20)


# ------------------------------------------------------------------------------------ the probe


def files(n: int, seed: int) -> tuple[NDArray[np.float64], list[str]]:
    """Statistics of n images of 12 patients, that differ by patient and say nothing of a class."""
    rng = np.random.default_rng(seed)
    patients = np.arange(n) % 12
    values = np.exp(rng.normal(size=(12, len(STATISTICS)))[patients] + rng.normal(size=(n, 1)))
    values[:, [*STATISTICS].index("format")] = 1
    return values, [f"P{patient}" for patient in patients]


def probed(values: NDArray[np.float64], labels: NDArray[Any], groups: list[str]) -> dict[str, Any]:
    classes = [f"class {k}" for k in range(int(labels.max()) + 1)]
    statistics = FileStatistics(tuple(STATISTICS), values)
    return probe_labels(statistics, labels.tolist(), classes, groups, n_resamples=200)


@pytest.mark.parametrize("name", ["width", "quantisation", "sharpness_2", "texture_4"])
def test_a_shortcut_is_flagged_with_the_statistics_that_carry_it(name: str) -> None:
    values, groups = files(120, 0)
    labels = np.random.default_rng(2).integers(0, 3, 120)
    values[:, [*STATISTICS].index(name)] = np.where(labels == 1, 3.0, 1.0)
    probe = probed(values, labels, groups)
    assert probe["flagged"]
    assert probe["carriers"][0] == STATISTICS[name].group
    assert {flag["class"] for flag in probe["flags"]} >= {"class 1"}
    assert all("class 1" in pair["classes"] for pair in probe["pairs"][:2])
    assert probe["groups"][STATISTICS[name].group]["title"] in describe_probe(probe)


def test_sets_without_a_shortcut_are_not_flagged() -> None:
    flagged = 0
    for seed in range(3):
        values, groups = files(96, seed)
        labels = np.random.default_rng(100 + seed).integers(0, 2, 96)
        content = [i for i, one in enumerate(STATISTICS.values()) if one.group not in SHORTCUTS]
        values[:, content] = labels[:, None]  # what sees the tissue does not count
        flagged += probed(values, labels, groups)["flagged"]
    assert flagged == 0


def test_what_tells_patients_apart_is_no_shortcut() -> None:
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(16), 8)
    own = np.exp(rng.normal(size=(16, len(STATISTICS))))[patients]  # the same in all their images
    labels = (patients % 2).astype(int)
    own[:, [*STATISTICS].index("format")] = 0
    probe = probed(own, labels, [f"P{patient}" for patient in patients])
    assert not probe["flagged"]
    assert probe["n_groups"] == 16


def test_one_group_a_class_is_not_measured() -> None:
    values, _ = files(20, 0)
    labels = np.repeat([0, 1], 10)
    probe = probed(values, labels, ["a"] * 10 + ["b"] * 10)
    assert probe["value"] is None
    assert not probe["flagged"]
    assert "fewer than two classes lie in two groups" in describe_probe(probe)
