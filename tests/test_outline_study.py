"""The comparison of outlines: its drawing, its draws, its arithmetic, and a small run of all of it.

The pictures are synthetic; no number of them says anything about tissue.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from numpy.typing import NDArray
from PIL import Image

from hf_glovlm.data.outlines import open_outlined
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import predict
from hf_glovlm.lab import outline_cells, outline_study
from hf_glovlm.lab.outline_cells import (
    choose_rule,
    choose_threshold,
    draw_supports,
    left_out_scores,
)
from hf_glovlm.lab.outline_study import Arm, Study, judge, run_study
from hf_glovlm.lab.outlined_crops import (
    SHAPES,
    draw_shape,
    place_sizes,
    read_glomeruli,
    render_crops,
)
from hf_glovlm.training import adapt

BLOBS = ((20, 20, "plain"), (70, 34, "striped"))  # left, top, class; 24 pixels high
TABLE = {"table": "metadata.csv", "pictures": ".", "picture": "picture", "group": "slide_id"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of two blobs each: colour masks and GeoJSON of the same outlines."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = ["file_name,label,slide_id,stain,picture,bbox,object"]
    for k in range(8):
        pixels = rng.integers(120, 200, (90, 120, 3), dtype=np.uint8)
        mask = np.zeros((90, 120, 3), np.uint8)
        features = []
        for i, (left, top, label) in enumerate(BLOBS):
            x1, y1, width = left + 24 + 2 * k + i, top + 24, 24 + 2 * k + i  # no two of one size
            box = np.s_[top:y1, left:x1]
            pixels[box] = 230
            if label == "striped":
                pixels[box][::4] = (90, 30, 120)
            mask[box] = (0, 255, 0) if label == "plain" else (255, 0, 0)
            ring = [[left, top], [x1, top], [x1, y1], [left, y1], [left, top]]
            features.append(
                {
                    "type": "Feature",
                    "id": f"{k}-{label}",
                    "geometry": {"type": "Polygon", "coordinates": [ring]},
                    "properties": {},
                }
            )
            reach = round(0.625 * width)
            x, y = left + width // 2, top + 12
            square = f"{x - reach} {y - reach} {x + reach} {y + reach}"
            stain = "PAS" if k % 2 else "HE"
            lines.append(f"{label}/{k}.png,{label},S{k},{stain},P{k},{square},{k}-{label}")
        Image.fromarray(pixels).save(folder / f"P{k}.png")
        Image.fromarray(mask).save(folder / f"P{k}_mask.png")
        content = {"type": "FeatureCollection", "features": features}
        (folder / f"P{k}.geojson").write_text(json.dumps(content))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_outlines_are_the_same_from_a_mask_and_from_geojson(root: Path) -> None:
    blobs = read_glomeruli(TABLE | {"box": "bbox"}, root)
    drawn = read_glomeruli(TABLE | {"object": "object"}, root)
    assert len(blobs) == 16
    for one, other in zip(blobs, drawn, strict=True):
        assert (one.name, one.corner, one.inside.shape) == (
            other.name,
            other.corner,
            other.inside.shape,
        )
        assert one.inside.all()
        assert other.inside.all()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (TABLE | {"object": "label"}, "no outline with the id 'plain'"),
        (TABLE | {"group": "slide", "box": "bbox"}, "no column 'slide'.*'slide_id'"),
        (TABLE | {"picture": "stain", "box": "bbox"}, "HE_mask.png"),
    ],
)
def test_what_has_no_outline_is_named(root: Path, about: dict[str, str], message: str) -> None:
    with pytest.raises(GloVLMError, match=message):
        read_glomeruli(about, root)


def test_the_square_is_whole_and_its_alpha_the_shape(root: Path) -> None:
    glomeruli = read_glomeruli(TABLE | {"box": "bbox"}, root)[:2]
    images = {
        shape: [
            open_outlined(value)
            for value in render_crops(glomeruli, margin=2, shape=shape, seed=1)["image"]
        ]
        for shape in SHAPES
    }
    squares = [np.asarray(image.convert("RGB")) for image in images["outline"]]
    assert squares[0].shape == (48, 48, 3)
    picture = np.asarray(Image.open(root / "P0.png"))
    np.testing.assert_array_equal(squares[0], picture[8:56, 8:56])
    for shape in set(SHAPES) - {"silhouette"}:
        for square, image in zip(squares, images[shape], strict=True):
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), square)
    silhouette = images["silhouette"][0]
    assert silhouette.mode == "RGB"
    assert sorted(set(np.asarray(silhouette).ravel().tolist())) == [0, 200]
    assert images["whole"][0].mode == "RGB"  # nothing lies outside


def _ellipse() -> NDArray[np.bool_]:
    y, x = np.mgrid[:120, :120]
    inside: NDArray[np.bool_] = ((x - 60) / 40) ** 2 + ((y - 55) / 28) ** 2 < 1
    return inside


def test_shapes_in_place_of_an_outline() -> None:
    inside, rng = _ellipse(), np.random.default_rng(0)
    drawn = {shape: draw_shape(inside, shape, rng) for shape in SHAPES}
    np.testing.assert_array_equal(drawn["outside"], ~inside)
    rows, columns = np.nonzero(drawn["circle"])
    assert drawn["circle"].sum() == pytest.approx(inside.sum(), rel=0.02)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=1)
    assert (rows.mean(), columns.mean()) == pytest.approx((55, 60), abs=0.6)
    for shape, part in (("moved_5", 0.05), ("moved_15", 0.15)):
        rows, columns = np.nonzero(drawn[shape])
        moved = np.hypot(rows.mean() - 55, columns.mean() - 60)
        assert moved == pytest.approx(part * 80, abs=0.6)
        scale = np.sqrt(len(rows) / inside.sum())
        assert abs(scale - 1) == pytest.approx(part, abs=0.01)


def test_a_size_is_an_angle(root: Path) -> None:
    glomeruli = read_glomeruli(TABLE | {"box": "bbox"}, root)[:1]
    angle = np.arctan2(*place_sizes(glomeruli)[0][::-1])
    diameter = 2 * np.sqrt(24 * 24 / np.pi)
    assert angle == pytest.approx(np.pi / 2 * np.log2(diameter) / 10)


# ------------------------------------------------------------------------------------- arithmetic


def _rows(labels: list[int], groups: list[str]) -> Dataset:
    features = {"file_name": Value("string"), "label": ClassLabel(names=["a", "b"])}
    columns = {"file_name": [str(i) for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(
        columns | {"patient_id": groups}, Features(features | {"patient_id": Value("string")})
    )


def test_draws_have_enough_patients_of_each_class_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = [0, 0, 1] * 6 + [0] * 12
    groups = [f"P{i // 3}" for i in range(18)] + [f"Q{i // 2}" for i in range(12)]
    rows = _rows(labels, groups)
    draws, passed_over = draw_supports(rows, groups, shots=2, seed=3, draws=8, least=3)
    numbers = [draw.number for draw in draws]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 7 + passed_over
    assert passed_over > 0
    for draw in draws:
        tested = {groups[row] for row in draw.test}
        for k in (0, 1):
            held = {group for group, label in zip(groups, labels, strict=True) if label == k}
            assert min(len(held & tested), len(held - tested)) >= 3
        assert not {groups[row] for row in draw.first(2)} & tested
        assert [len(rows) for rows in draw.support] == [2, 2]
        assert set(draw.first(1)) < set(draw.first(2))
    monkeypatch.setattr(outline_cells, "MOST_DRAWS", 5)
    with pytest.raises(GloVLMError, match="6 groups of each class"):
        draw_supports(rows, groups, shots=2, seed=3, draws=1, least=6)


@pytest.mark.parametrize(
    ("rule", "scores", "truth", "threshold"),
    [
        ("youden", [0.9, 0.8, 0.3, 0.2], [1, 1, 0, 0], 0.55),
        ("youden", [0.9, 0.2, 0.3, 0.1], [1, 1, 0, 0], 0.6),  # ties: the highest
        ("keep_90", [0.9, 0.2, 0.3, 0.1], [1, 1, 0, 0], 0.15),
        ("keep_90", [0.9, 0.2, 0.3], [1, 1, 0], 0.1),  # halfway to nothing
        ("youden", [0.9, 0.2], [1, 1], None),
        ("youden", [], [], None),
    ],
)
def test_thresholds(
    rule: str, scores: list[float], truth: list[int], threshold: float | None
) -> None:
    found = choose_threshold(np.array(scores), np.array(truth, bool), rule)
    assert found == (threshold if threshold is None else pytest.approx(threshold))


def test_scores_of_the_support_are_by_fits_without_their_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = np.array([0, 0, 1, 1, 1, 0])
    groups = ["A", "A", "B", "C", "C", "D"]
    fitted: list[set[str]] = []

    def fit(_: str, __: Any, ___: Any, rows: Any, ____: int) -> Callable[[Any], Any]:
        fitted.append({groups[row] for row in rows})
        return lambda x: np.tile([0.25, 0.75], (len(x), 1))

    monkeypatch.setattr(outline_cells, "fit", fit)
    rows = np.array([0, 2, 3, 4])  # A alone has class 0: it cannot be left out
    scores, truth = left_out_scores("gda", np.eye(6), labels, groups, rows, 1, 0)
    assert fitted == [{"A", "C"}, {"A", "B"}]
    assert scores.tolist() == [0.75] * 3
    assert truth.tolist() == [True] * 3


def test_the_rule_of_the_threshold() -> None:
    rows = {
        "one": {"sensitivity": 0.95, "specificity": 0.5},
        "two": {"sensitivity": 0.91, "specificity": 0.7},
        "three": {"sensitivity": 0.85, "specificity": 0.9},
    }
    assert choose_rule(rows) == "two"
    assert choose_rule(rows, least=0.99) == "one"


# -------------------------------------------------------------------------------------- a small run


def _plan() -> dict[str, Any]:
    return {
        "purpose": "development",
        "backbone": "mini",
        "data": TABLE | {"box": "bbox"},
        "target": "striped",
        "seed": 5,
        "bootstrap_seed": 6,
        "resamples": 20,
        "draws": {
            "seed": 7, "count": 2, "shots": [1, 2], "least_groups": 3, "without": {"S0": ["S0"]},
        },
        "methods": ["linear_probe", "gda"],
        "margins": [1.25],
        "arms": {"ignore": {"outline": "ignore"}, "blank+pool": {"outline": "blank+pool"}},
        "reference": "ignore",
        "candidates": ["blank+pool"],
        "margin_gain": 0.01,
        "thresholds": ["youden"],
        "controls": {
            "circle": {"outline": "chosen", "shape": "circle"},
            "moved": {"outline": "chosen", "shape": "moved_15", "support": "outline"},
            "size": {"outline": "size"},
        },
        "transfer": {"train": "HE", "test": "PAS", "without": ["S1"], "seed": 8},
        "frozen": {
            "episodes": "episodes.json", "draws": 1, "shots": [1], "margin": 1.25, "method": "gda",
            "arms": {"ignore": {"outline": "ignore", "before": {"1": [0.8, 0.9, 0.7]}}},
        },
        "goals": {"macro_auc": {"2": 0.99}, "sensitivity": 1.01, "gain_at": 2},
    }  # fmt: skip


def test_a_plan_runs_once_and_reports_all_of_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOVLM_CACHE", str(tmp_path / "features"))
    episode = {"draw": 0, "support": ["plain/0.png", "striped/0.png"], "test_groups": ["S4", "S5"]}
    about = {"set": "x", "shots": 1, "sampler": "spread", "group_column": "slide_id"}
    (root / "episodes.json").write_text(json.dumps(about | {"draws": [episode]}))
    report = run_study(_plan(), root, tmp_path / "out")
    arms = {(row["arm"], row["population"]) for row in report["results"]}
    assert len(arms) == 7
    assert len(report["results"]) == 7 * 4
    for row in report["results"]:
        assert (row["gain"] is None) == (row["arm"] == "ignore")
    assert report["recipe"]["outline"] == "blank+pool"
    assert [goal["met"] for goal in report["goals"]][1:2] == [False]
    assert {row["tested"] for row in report["transfer"]} == {"all", "without S1"}
    assert [row["images"] for row in report["transfer"]] == [8] * 4 + [6] * 4
    page = (tmp_path / "out" / "report.md").read_text()
    assert "**missed**" in page
    assert "0.800 / 0.900 / 0.700" in page
    assert "of which" in page

    study = Study(_plan(), root, tmp_path / "out")
    (draw, _), _ = study.populations["all"]
    images = study.images(1.25)
    adapted = adapt(
        "mini", "linear_probe", images.select(draw.first(2)), config={"outline": "blank+pool"}
    )
    p = predict(adapted.model, adapted.processor, images.select(draw.test)).probabilities
    cells = study.cells(Arm("blank+pool", "blank+pool", 1.25))
    np.testing.assert_allclose(cells.probabilities["linear_probe", 2][0], p, atol=1e-5)

    def encode(*_: Any, **__: Any) -> Any:
        raise AssertionError("encoded twice")

    monkeypatch.setattr(outline_study, "embed_images", encode)
    monkeypatch.setattr(outline_study.Study, "at_threshold", lambda *_: _measured())
    monkeypatch.setattr(outline_study, "transfer", lambda *_: [])
    again = run_study(_plan(), root, tmp_path / "out")
    assert again["results"] == report["results"]


@pytest.mark.parametrize(
    ("name", "message"), [("goals", "lacks goals;"), ("candidates", "lacks a recipe")]
)
def test_a_plan_that_lacks_something_is_refused(root: Path, name: str, message: str) -> None:
    plan = _plan()
    del plan[name]
    with pytest.raises(GloVLMError, match=message):
        Study(plan, root, root)


def _measured() -> dict[str, float]:
    names = ("sensitivity", "sensitivity_sd", "specificity", "specificity_sd")
    return dict.fromkeys(names, 0.5)


def test_a_goal_is_met_where_value_and_interval_say_so() -> None:
    def row(arm: str, shots: int, auc: float, gain: tuple[float, float, float]) -> dict[str, Any]:
        value, *ci95 = gain
        return {
            "arm": arm, "margin": 1.25, "population": "all", "method": "gda", "shots": shots,
            "macro_auc": {"mean": auc}, "gain": {"macro_auc": {"value": value, "ci95": ci95}},
        }  # fmt: skip

    report = {
        "best": "pool",
        "recipe": {"margin": 1.25, "methods": {1: "gda", 8: "gda"}, "threshold": "youden"},
        "at_threshold": {"pool": {"youden": {"sensitivity": 0.9}}},
        "results": [row("pool", 1, 0.9, (0.1, -0.1, 0.3)), row("pool", 8, 0.99, (0.2, 0.1, 0.3))],
    }
    before = {"arm": "pool", "method": "gda", "value": 0.2, "ci95": [0.05, 0.4]}
    goals = {
        "macro_auc": {"8": 0.99, "1": 0.95},
        "sensitivity": 0.9,
        "gain_at": 8,
        "gains": [before | {"shots": 1}, before | {"shots": 8}],
    }
    met = [goal["met"] for goal in judge(report, goals)]
    assert met == [True, False, True, True, False, True]
