"""Synthetic images of glomeruli: deterministic, continuous in severity, and without a shortcut."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fresh_process import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.phantoms import (
    CLASSES,
    STAINS,
    SyntheticImage,
    draw_patient,
    render_cohort,
    render_glomerulus,
    write_cohort,
)

LESIONS = CLASSES[1:]
SHORTCUT_LIMIT = 0.60
# The training prompts of Glo-VLMs.
PROMPTS = {
    "viable": "A pathology image of viable glomerulus",
    "ischemic": "A pathology image of ischemic glomerulus",
    "segmental_sclerosis": "A pathology image of segmentally sclerotic glomerulus",
    "global_sclerosis": "A pathology image of globally sclerotic glomerulus",
    "atubular": "A pathology image of atubular glomerulus",
}

Array = NDArray[np.float64]


def grey(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float64).mean(axis=2)


def corners(values: Array, part: float = 0.16) -> Array:
    """The four corners of a map, which no lesion reaches, side by side."""
    k = round(len(values) * part)
    return np.concatenate([values[:k, :k], values[:k, -k:], values[-k:, :k], values[-k:, -k:]])


# --- one picture


@pytest.mark.parametrize("class_name", CLASSES)
def test_same_arguments_give_the_same_image(class_name: str) -> None:
    first, second = (render_glomerulus(class_name, seed=11) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.caption == second.caption
    assert (first.severity, first.stain) == (second.severity, second.stain)
    other = render_glomerulus(class_name, seed=12)
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.long
def test_another_process_with_another_hash_seed_draws_the_same(tmp_path: Path) -> None:
    script = (
        "import hashlib, json\n"
        "from hf_glovlm.lab.phantoms import render_glomerulus\n"
        "p = render_glomerulus('ischemic', seed=3)\n"
        "drawn = hashlib.sha256(p.image.tobytes() + p.caption.encode()).hexdigest()\n"
        "print(json.dumps({'drawn': drawn, 'hash': hash('ischemic')}))"
    )
    item = render_glomerulus("ischemic", seed=3)
    expected = hashlib.sha256(item.image.tobytes() + item.caption.encode()).hexdigest()
    result = run_script(script, home=tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
    assert result["drawn"] == expected
    assert result["hash"] != hash("ischemic")


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32), stain=st.sampled_from(STAINS))
def test_no_class_can_be_recognised_at_severity_zero(seed: int, stain: str) -> None:
    pictures = {
        render_glomerulus(c, seed=seed, severity=0, stain=stain).image.tobytes() for c in CLASSES
    }
    assert len(pictures) == 1


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_class_and_severity_change_neither_optics_nor_the_tissue_around(seed: int) -> None:
    """Stain, blur, noise, light and tubules are alike: the corners are the same pixels."""
    pictures = [np.asarray(render_glomerulus(c, seed=seed, severity=1).image) for c in CLASSES]
    quarters = [np.split(corners(picture[..., 1], 0.1), 4) for picture in pictures]
    for class_name, quarter in zip(CLASSES, quarters, strict=True):
        same = sum(np.array_equal(a, b) for a, b in zip(quarters[0], quarter, strict=True))
        # The tubule that an atubular glomerulus lacks may reach into one corner.
        assert same >= (3 if class_name == "atubular" else 4), (class_name, same)
    images = [render_glomerulus(c, seed=seed) for c in CLASSES]
    assert len({p.stain for p in images}) == len({p.severity for p in images}) == 1


@pytest.mark.parametrize("class_name", LESIONS)
def test_the_picture_departs_from_viable_steadily_with_severity(class_name: str) -> None:
    steps = (0.0, 0.01, 0.25, 0.5, 1.0)
    distance = np.zeros(len(steps))
    for seed in range(12):
        pictures = [grey(render_glomerulus(class_name, seed=seed, severity=s).image) for s in steps]
        distance += [np.abs(p - pictures[0]).mean() for p in pictures]
    assert (np.diff(distance) > 0).all(), distance
    assert distance[1] < 0.15 * distance[-1]  # no jump at the start


@pytest.mark.parametrize("size", [16, 63, 96, 160])
def test_every_size_shows_the_same_glomerulus(size: int) -> None:
    for class_name in CLASSES:
        patient = draw_patient(4)
        large = render_glomerulus(class_name, seed=8, size=192, patient=patient).image
        image = render_glomerulus(class_name, seed=8, size=size, patient=patient).image
        assert image.size == (size, size)
        assert image.mode == "RGB"
        shrunk = np.asarray(large.resize((16, 16), Image.Resampling.BOX), dtype=float)
        seen = np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(shrunk.ravel(), seen.ravel())[0, 1] > 0.9


def test_patients_differ_and_mark_their_pictures() -> None:
    patients = [draw_patient(seed) for seed in range(5)]
    assert len({p.hue for p in patients}) == 5
    assert draw_patient(2) == patients[2]
    images = [render_glomerulus("viable", seed=1, patient=p) for p in patients]
    assert [p.patient_id for p in images] == [p.patient_id for p in patients]
    assert len({p.image.tobytes() for p in images}) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render_glomerulus("ischaemic", seed=0), "Did you mean 'ischemic'"),
        (lambda: render_glomerulus("viable", seed=0, stain="pas"), "Did you mean 'PAS'"),
        (lambda: render_glomerulus("viable", seed=0, severity=1.1), "severity of 0 to 1"),
        (lambda: render_glomerulus("viable", seed=0, severity=float("nan")), "severity of 0 to 1"),
        (lambda: render_glomerulus("viable", seed=-1), "seed of 0 or more"),
        (lambda: render_glomerulus("viable", seed=0, size=8), "size of 16 to 1024"),
        (lambda: draw_patient(-3), "seed of 0 or more"),
        (lambda: render_cohort(0, 5, seed=0), "at least 1 patient"),
        (lambda: render_cohort(1, 5, seed=0, classes=()), "one or more different classes"),
        (lambda: render_cohort(1, 5, seed=0, classes=("viable",) * 2), "different classes"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        call()


# --- captions


def test_captions_name_their_own_class_and_stain() -> None:
    words = {
        "viable": ("viable", "normal", "healthy"),
        "ischemic": ("ischemic", "ischaemic"),
        "segmental_sclerosis": ("segmental",),
        "global_sclerosis": ("global",),
        "atubular": ("atubular", "lost its tubule"),
    }
    dyes = {
        "PAS": ("PAS", "periodic acid"),
        "H&E": ("H&E", "hematoxylin"),
        "silver": ("silver",),
        "trichrome": ("trichrome",),
    }
    for class_name in CLASSES:
        images = [render_glomerulus(class_name, seed=seed, size=16) for seed in range(70)]
        captions = Counter(p.caption for p in images)
        assert captions[PROMPTS[class_name]] >= 8
        assert len(captions) >= 28
        named = sum(any(w in p.caption for w in words[class_name]) for p in images)
        assert named >= 45  # the rest tells what is seen
        for item in images:
            for other in set(CLASSES) - {class_name}:
                assert not any(w in item.caption for w in words[other]), item.caption
            for other in set(STAINS) - {item.stain}:
                assert not any(w in item.caption for w in dyes[other]), item.caption


# --- a cohort


@pytest.fixture(scope="module")
def cohort() -> list[SyntheticImage]:
    return render_cohort(60, 10, seed=2024)


def test_classes_are_balanced_within_and_over_patients(cohort: list[SyntheticImage]) -> None:
    assert set(Counter(p.class_name for p in cohort).values()) == {120}
    assert set(Counter((p.patient_id, p.class_name) for p in cohort).values()) == {2}
    assert len({p.patient_id for p in cohort}) == 60
    uneven = Counter(p.class_name for p in render_cohort(3, 4, seed=0, size=16))
    assert max(uneven.values()) - min(uneven.values()) == 1


def tissue_noise(image: Image.Image) -> Array:
    kernel = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    return np.abs(ndimage.convolve(grey(image), kernel))


def png_bytes(image: Image.Image) -> float:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return float(buffer.tell())


SHORTCUTS: dict[str, Callable[[Image.Image], float]] = {
    "blur, corners": lambda i: float(corners(ndimage.laplace(grey(i))).var()),
    "blur, whole picture": lambda i: float(ndimage.laplace(grey(i)).var()),
    "noise, corners": lambda i: float(corners(tissue_noise(i)).mean()),
    "noise, whole picture": lambda i: float(tissue_noise(i).mean()),
    "background brightness, corners": lambda i: float(corners(grey(i)).mean()),
    "background brightness, glass": lambda i: float(np.percentile(grey(i), 99)),
    "file size": png_bytes,
}


def tuft_size(image: Image.Image) -> float:
    """Tissue, not glass, among the pixels around the middle."""
    values = grey(image)
    rows, columns = np.indices(values.shape) - len(values) / 2
    middle = values[np.hypot(rows, columns) < 0.33 * len(values)]
    return float((middle < 0.88 * np.percentile(values, 99)).mean())


def class_aucs(values: Array, labels: Array) -> dict[str, float]:
    """How well one number ranks each class against the others, in whichever direction."""
    areas = {c: float(roc_auc_score(labels == c, values)) for c in CLASSES}
    return {c: max(area, 1 - area) for c, area in areas.items()}


def grouped_auc(features: Array, labels: Array, patients: Array) -> float:
    """Macro one-vs-rest AUC of a logistic regression, tested on patients it has not seen."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probability = cross_val_predict(
        model, features, labels, groups=patients, cv=GroupKFold(5), method="predict_proba"
    )
    return float(roc_auc_score(labels, probability, multi_class="ovr", average="macro"))


def shortcut_aucs(
    measure: Callable[[Image.Image], float], cohort: list[SyntheticImage]
) -> tuple[dict[str, float], float]:
    labels = np.array([p.class_name for p in cohort])
    patients = np.array([p.patient_id for p in cohort])
    values = np.array([measure(p.image) for p in cohort])
    ranks = values.argsort().argsort() / len(values)
    features = np.stack([ranks, ranks**2, ranks**3], axis=1)  # any smooth relation to the class
    return class_aucs(values, labels), grouped_auc(features, labels, patients)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_no_shortcut_predicts_the_class(name: str, cohort: list[SyntheticImage]) -> None:
    by_class, learned = shortcut_aucs(SHORTCUTS[name], cohort)
    macro = float(np.mean(list(by_class.values())))
    shown = " ".join(f"{c} {area:.3f}" for c, area in by_class.items())
    print(f"synthetic images, {name}: macro AUC {macro:.3f}, learned {learned:.3f} ({shown})")
    assert macro <= SHORTCUT_LIMIT, shown
    assert max(learned, 1 - learned) <= SHORTCUT_LIMIT


def test_a_planted_shortcut_is_caught(cohort: list[SyntheticImage]) -> None:
    """The guard can fail: lesions photographed slightly out of focus are detected."""
    planted = [
        SyntheticImage(
            p.image if p.class_name == "viable" else p.image.filter(ImageFilter.GaussianBlur(0.7)),
            p.class_name,
            p.severity,
            p.stain,
            p.patient_id,
            p.caption,
        )
        for p in cohort[:400]
    ]
    by_class, _ = shortcut_aucs(SHORTCUTS["blur, corners"], planted)
    assert by_class["viable"] > 0.7


def test_what_a_lesion_changes_is_only_reported(cohort: list[SyntheticImage]) -> None:
    for name, measure in {
        "mean colour": lambda i: float(grey(i).mean()),
        "outer tuft size": tuft_size,
    }.items():
        by_class, learned = shortcut_aucs(measure, cohort)
        print(f"synthetic images, {name}: learned {learned:.3f}", by_class)
        assert all(0.5 <= area <= 1 for area in by_class.values())


def test_the_lesion_itself_can_be_learned_and_permuted_labels_cannot(
    cohort: list[SyntheticImage],
) -> None:
    """Grey levels and texture by ring around the middle are enough to see most lesions."""
    size = cohort[0].image.width
    rows, columns = np.indices((size, size)) - size / 2
    ring = (np.hypot(rows, columns) / (size / 2) * 10).astype(int)
    features = []
    for item in cohort:
        values = grey(item.image)
        texture = np.abs(ndimage.laplace(values))
        features.append([m[ring == r].mean() for m in (values, texture) for r in range(8)])
    table = np.array(features)
    labels = np.array([p.class_name for p in cohort])
    patients = np.array([p.patient_id for p in cohort])
    auc = grouped_auc(table, labels, patients)
    permuted = grouped_auc(table, np.random.default_rng(0).permutation(labels), patients)
    print(f"synthetic images, ring profile: macro AUC {auc:.3f}, permuted labels {permuted:.3f}")
    assert auc > 0.8
    assert abs(permuted - 0.5) < 0.08


# --- on disk


def test_a_written_cohort_reads_back(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", 3, 5, seed=5, size=32)
    images = render_cohort(3, 5, seed=5, size=32)
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["file_name", "label", "patient_id", "stain"]
    assert len(rows) == len(images) == len({row["file_name"] for row in rows})
    for row, item in zip(rows, images, strict=True):
        assert row["file_name"].startswith(f"{item.class_name}/")
        assert (row["label"], row["patient_id"]) == (item.class_name, item.patient_id)
        assert (row["stain"], row["caption"]) == (item.stain, item.caption)
        with Image.open(folder / row["file_name"]) as image:
            assert image.format == "PNG"
            assert image.tobytes() == item.image.tobytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*CLASSES, "metadata.csv", "DRAWINGS"]
    )
    assert "Synthetic images" in (folder / "DRAWINGS").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["cohort"]


def test_a_cohort_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "note.txt").write_text("mine")
    with pytest.raises(GloVLMError, match="new or empty folder"):
        write_cohort(used, 1, 5, seed=0, size=16)
    assert (used / "note.txt").read_text() == "mine"

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_cohort(tmp_path / "new", 1, 5, seed=0, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["used"]
    monkeypatch.undo()
    (tmp_path / "new").mkdir()
    assert write_cohort(tmp_path / "new", 1, 5, seed=0, size=16) == tmp_path / "new"
