"""The scale that a model sees, what it was adapted at, and the refusal of a very different one."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import SIZE, tiny_clip, tiny_images, tiny_siglip, tiny_siglip2
from transformers import AutoImageProcessor

from hf_glovlm.cli import main
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference.scale import (
    NOT_COMPARED,
    check_scale,
    describe_scale,
    input_mpp,
    known_scale,
    listed_mpp,
    support_scale,
)

CLIP = AutoImageProcessor.from_pretrained(tiny_clip())  # shorter side to 32, then a crop
SIGLIP = AutoImageProcessor.from_pretrained(tiny_siglip())  # squashed to 32 x 32
SIGLIP2 = AutoImageProcessor.from_pretrained(tiny_siglip2())  # 16 patches of 8 x 8 at most


@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [
        (CLIP, (SIZE, SIZE), 0.5),
        (CLIP, (2 * SIZE, 2 * SIZE), 1.0),
        (CLIP, (SIZE // 2, SIZE // 2), 0.25),
        (CLIP, (10 * SIZE, 2 * SIZE), 1.0),  # what is cropped away does not count
        (SIGLIP, (2 * SIZE, 2 * SIZE), 1.0),
        (SIGLIP, (4 * SIZE, SIZE), 1.0),
        (SIGLIP2, (2 * SIZE, 2 * SIZE), 1.0),
        (SIGLIP2, (4 * SIZE, SIZE), 1.0),
    ],
)
def test_micrometres_per_input_pixel(images: Any, size: tuple[int, int], expected: float) -> None:
    assert input_mpp(images, 0.5, *size) == pytest.approx(expected)


def test_without_resizing_the_scale_stays() -> None:
    assert input_mpp(SimpleNamespace(do_resize=False), 0.5, 999, 7) == 0.5


@given(
    st.floats(0.05, 20), st.integers(8, 4000), st.integers(8, 4000), st.sampled_from([CLIP, SIGLIP])
)
def test_a_picture_of_the_same_tissue(mpp: float, width: int, height: int, images: Any) -> None:
    """A picture scanned twice as finely reaches the model at the same scale."""
    fine = input_mpp(images, mpp / 2, 2 * width, 2 * height)
    assert math.isclose(fine, input_mpp(images, mpp, width, height))


def _rows(folder: Path, mpp: list[float | None], sides: list[int]) -> Dataset:
    folder.mkdir(exist_ok=True)
    for i, side in enumerate(sides):
        Image.new("RGB", (side, side), "pink").save(folder / f"{i}.png")
    paths = [str(folder / f"{i}.png") for i in range(len(sides))]
    features = Features({"image": ImageFeature(), "mpp": Value("float64")})
    return Dataset.from_dict({"image": paths, "mpp": mpp}, features)


def test_the_median_over_what_is_known(tmp_path: Path) -> None:
    rows = _rows(tmp_path, [0.5, None, 0.5, 0.25, 1.0], [SIZE, SIZE, 2 * SIZE, SIZE, SIZE])
    assert known_scale(CLIP, rows) == pytest.approx(0.75)  # of 0.5, 1.0, 0.25, 1.0
    assert known_scale(CLIP, rows.select([1])) is None
    assert known_scale(CLIP, rows.remove_columns("mpp")) is None


def test_an_unreadable_image_is_left_to_the_decoder(tmp_path: Path) -> None:
    rows = _rows(tmp_path, [0.5, 4.0], [SIZE, SIZE])
    (tmp_path / "1.png").write_bytes(b"no image")
    assert known_scale(CLIP, rows) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("adapted", "mpp", "allow", "refused"),
    [
        (0.5, 0.5, False, False),
        (0.5, 0.74, False, False),
        (0.5, 0.76, False, True),
        (0.5, 0.34, False, False),
        (0.5, 0.32, False, True),
        (0.5, 5.0, True, False),
        (None, 5.0, False, False),
        (0.5, None, False, False),
    ],
)
def test_at_most_one_and_a_half_times(
    adapted: float | None, mpp: float | None, allow: bool, refused: bool, tmp_path: Path
) -> None:
    # Twice as wide as the model's input: what counts is micrometres per pixel of the image itself.
    support = _rows(tmp_path / "support", [adapted], [2 * SIZE])
    config = SimpleNamespace(mpp=adapted, image_scale=support_scale(support))
    model, processor = SimpleNamespace(config=config), SimpleNamespace(image_processor=CLIP)
    rows = _rows(tmp_path, [mpp], [2 * SIZE])
    if refused:
        with pytest.raises(GloVLMError, match=r"of 0\.5 .* times apart.*--allow-scale"):
            check_scale(model, processor, rows)
    else:
        scale = check_scale(model, processor, rows, allow=allow)
        assert scale.mpp == ("unknown" if mpp is None else mpp)
        assert scale.input_mpp == ("unknown" if mpp is None else 2 * mpp)
        assert any("times apart" in note for note in scale.notes) == allow


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ([100, 200, 300], ""),
        ([200], ""),
        ([20, 200, 300], "1 of 3 images are smaller or larger than all"),
        ([1000, 2000], r"2 of 2 .* 500 to 1000 micrometres \(median 750\).* 50 to 150"),
    ],
)
def test_sizes_are_reported_and_never_refused(sides: list[int], said: str, tmp_path: Path) -> None:
    support = _rows(tmp_path / "support", [0.5] * 5, [100, 150, 200, 250, 300])
    config = SimpleNamespace(mpp=1.0, image_scale=support_scale(support))
    assert config.image_scale == pytest.approx(
        {"mpp": 0.5, "low": 50, "p5": 55, "median": 100, "p95": 145, "high": 150}
    )
    model, processor = SimpleNamespace(config=config), SimpleNamespace(image_processor=CLIP)
    notes = check_scale(model, processor, _rows(tmp_path, [0.5] * len(sides), sides)).notes
    assert len(notes) == bool(said)
    assert re.search(said, " ".join(notes))


@pytest.mark.parametrize("stated", [None, {}, {"mpp": 0.5}, {"mpp": "x"}, [1]])
def test_a_model_that_does_not_state_it_refuses_nothing(stated: Any, tmp_path: Path) -> None:
    config = SimpleNamespace(mpp=9.0, image_scale=stated)
    model, processor = SimpleNamespace(config=config), SimpleNamespace(image_processor=CLIP)
    scale = check_scale(model, processor, _rows(tmp_path, [0.5], [SIZE]))
    assert (scale.mpp, scale.notes) == (0.5, (NOT_COMPARED,))


def test_unknown_is_written_as_unknown() -> None:
    assert describe_scale(None) == "unknown"
    assert describe_scale(1 / 3) == 0.3333


def test_scales_listed_beside_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = [tmp_path / "a" / "x.png", tmp_path / "y.png", tmp_path / "z.png", tmp_path / "w.png"]
    lines = ["file_name,mpp", "a/x.png,0.25", "y.png,", "w.png,about 1"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert listed_mpp(files) == [0.25, None, None, None]


# ------------------------------------------------------------------------------- from end to end


def _with_scale(folder: Path, mpp: str) -> Path:
    lines = (folder / "metadata.csv").read_text().splitlines()
    lines = [f"{lines[0]},mpp", *(f"{line},{mpp}" for line in lines[1:])]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def train(mpp: str) -> Path:
        if mpp not in made:
            folder = tmp_path_factory.mktemp("run")
            data = _with_scale(tiny_images(folder / "data"), mpp)
            made[mpp] = folder / "run"
            command = ["train", "--data", data, "--backbone", tiny_clip(), "--shots", 2]
            command += ["--output-dir", made[mpp], "--n-resamples", 1]
            assert main([str(part) for part in command]) == 0
        return made[mpp]

    return train


def test_a_run_stores_its_scale(trained: Callable[[str], Path]) -> None:
    run = trained("0.4")
    # Pictures of 40 px become 32 px.
    assert json.loads((run / "model" / "config.json").read_text())["mpp"] == pytest.approx(0.5)
    assert json.loads((run / "results.json").read_text())["data"]["mpp"] == 0.5
    stored = json.loads((run / "model" / "config.json").read_text())["image_scale"]
    assert stored == pytest.approx(
        dict.fromkeys(("low", "p5", "median", "p95", "high"), 16) | {"mpp": 0.4}
    )
    other = trained("")
    assert json.loads((other / "model" / "config.json").read_text())["mpp"] is None
    assert json.loads((other / "results.json").read_text())["data"]["mpp"] == "unknown"


def test_the_commands_refuse_another_scale(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("0.4")
    same = _with_scale(tiny_images(tmp_path / "same", seed=1), "0.5")
    other = _with_scale(tiny_images(tmp_path / "other", seed=2), "2.0")
    unknown = tiny_images(tmp_path / "unknown", seed=3)

    def run_on(command: str, data: Path, *more: str) -> tuple[int, str]:
        given = ["--data", str(data), "--output", str(tmp_path / "r.json"), "--n-resamples", "1"]
        given = given if command == "evaluate" else [str(data)]
        code = main([command, str(run), *given, *more])
        return code, capsys.readouterr().err

    for command in ("predict", "evaluate"):
        seen = ["--allow-seen"] if command == "evaluate" else []
        assert run_on(command, same, *seen)[0] == 0
        code, output = run_on(command, other, *seen)
        assert code == 2
        assert "images of 0.4 micrometres per pixel, and these have 2" in output
        assert "5.0 times apart" in output
        assert run_on(command, other, "--allow-scale", *seen)[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["data"]["mpp"] == 2.5
    code, output = run_on("predict", unknown)
    assert code == 0
    assert "micrometres per input pixel: unknown; the model was adapted at 0.5" in output
    assert run_on("predict", unknown, "--mpp", "4")[0] == 2
    assert run_on("predict", unknown, "--mpp", "0.4")[0] == 0
    assert run_on("predict", unknown, "--mpp", "0")[0] == 2
    assert run_on("evaluate", unknown, "--allow-seen")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["data"]["mpp"] == "unknown"
