"""Draft decoding: never below twice the input's size, kept with the model, and off by default."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_clip, tiny_siglip2

from hf_glovlm import AdaptConfig
from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import load_dataset, open_image
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import (
    Predictions,
    embed_images,
    encoder_key,
    load_classifier,
    predict,
)
from hf_glovlm.inference.drafts import set_draft
from hf_glovlm.runs import TrainConfig, run


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((127, 300), (127, 300)),
        ((128, 300), (64, 150)),
        ((300, 255), (150, 128)),
        ((257, 256), (65, 64)),
        ((3000, 511), (750, 128)),
        ((512, 3000), (64, 375)),
    ],
)
def test_a_jpeg_is_decoded_at_the_least_size_that_is_left(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    for kind, decoded in (("JPEG", expected), ("PNG", size)):
        buffer = io.BytesIO()
        smooth(*size).save(buffer, kind)
        value = {"bytes": buffer.getvalue(), "path": None}
        assert open_image(value, draft=64).size == decoded
        assert open_image(value).size == size


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts") / "photographs"
    for k, label in enumerate(("one", "other")):
        (folder / label).mkdir(parents=True)
        for i in range(5):
            smooth(400, 340, seed=10 * k + i).save(folder / label / f"{i}.jpg", quality=90)
    return folder


def test_a_model_decodes_as_it_was_adapted(photographs: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"backbone": str(tiny_clip()), "shots": 2, "n_resamples": 20}
    config = TrainConfig(
        data=str(photographs), output_dir=str(tmp_path / "run"), draft=True, cache=False, **values
    )
    notes = " ".join(run(config)["notes"])
    model, processor, _ = load_classifier(tmp_path / "run")
    side = processor.draft_side
    assert side == 2 * model.config.backbone_config.vision_config.image_size
    assert f"at least {side} (draft)" in notes
    stored = Predictions.load(tmp_path / "run/predictions.parquet")
    rows = load_dataset(photographs)["all"]
    names = rows["file_name"][:]
    test = rows.select([names.index(name) for name in stored.file_names])
    np.testing.assert_array_equal(predict(model, processor, test).logits, stored.logits)

    drafted, key = embed_images(model.glovlm, processor, rows), encoder_key(model.glovlm, processor)
    processor.draft = False
    whole = embed_images(model.glovlm, processor, rows)
    assert encoder_key(model.glovlm, processor) != key
    assert not np.array_equal(drafted, whole)
    lengths = np.linalg.norm(drafted, axis=1) * np.linalg.norm(whole, axis=1)
    assert ((drafted * whole).sum(1) / lengths).min() > 0.999

    place = tmp_path / "run/model/processor_config.json"
    saved = json.loads(place.read_text())
    assert saved.pop("draft") is True
    (tmp_path / "run/manifest.json").unlink()  # which would name the file
    place.write_text(json.dumps(saved))
    with pytest.raises(GloVLMError, match="saved with draft False, and the model learned with"):
        load_classifier(tmp_path / "run")


def test_nothing_is_saved_of_it_where_it_is_off(tmp_path: Path) -> None:
    model, processor = load_backbone(str(tiny_clip()))
    assert processor.draft_side == 0
    assert "draft" not in model.config.to_dict()
    processor.save_pretrained(tmp_path)
    assert "draft" not in json.loads((tmp_path / "processor_config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"outline": "centre"}, "outline takes a part"),
        ({"views": 4}, "views or augment takes a part"),
        ({"augment": True}, "views or augment takes a part"),
    ],
)
def test_what_takes_a_part_of_an_image_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(GloVLMError, match=what):
        AdaptConfig(draft=True, **settings)


def test_a_transform_without_a_fixed_size_is_refused() -> None:
    model, processor = load_backbone(str(tiny_siglip2()))
    with pytest.raises(GloVLMError, match="resizes to no fixed size"):
        set_draft(model, processor, True)
    assert (model.config.draft, processor.draft) == (False, False)
