"""The outline of a glomerulus as input: what a model sees, what it pools, and bad outlines."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, PngImagePlugin
from tiny import tiny_clip, tiny_pair, tiny_siglip, tiny_siglip2
from tolerance import assert_same_numbers

from hf_glovlm import adapt, load_dataset, predict
from hf_glovlm.backbones import load_backbone
from hf_glovlm.data.folder import column, open_image
from hf_glovlm.data.outlines import OUTLINE, open_outlined, outlined, outlines_of, structure_of
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import FeatureCache, embed_images, load_classifier
from hf_glovlm.inference.outlines import outline_notes
from hf_glovlm.inference.prediction import ImageRows
from hf_glovlm.inference.views import draw_view
from hf_glovlm.methods import METHODS, TowerMethod
from hf_glovlm.model.outlines import (
    FILL,
    KEY,
    OUTLINES,
    choose_inside,
    cover_patches,
    draw_centre,
    mean_inside,
    take_apart,
)
from hf_glovlm.runs.evaluation import image_rows, list_images
from hf_glovlm.settings import declarations
from hf_glovlm.training.config import AdaptConfig
from hf_glovlm.training.frozen_cache import Replay

SIDE = 64


def picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def disc(side: int = SIDE, radius: float = 0.3, at: tuple[float, float] = (0.4, 0.55)) -> Any:
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    return (x - at[0]) ** 2 + (y - at[1]) ** 2 <= radius**2


def save_png(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    if KEY in image.info:
        text.add_text(KEY, image.info[KEY])
    image.save(path, pnginfo=text)
    return path


def write_crops(folder: Path, structure: str = "capsule", n: int = 4) -> Path:
    """Two classes that differ inside of the outline alone."""
    rows = []
    for k, name in enumerate(("pale", "dark")):
        for i in range(n):
            pixels = np.asarray(picture(10 * k + i)).copy()
            inside = disc(at=(0.35 + 0.05 * i, 0.5))
            pixels[inside] = pixels[inside] // 4 + (150 if k == 0 else 20)
            image = outlined(Image.fromarray(pixels), inside, structure)
            save_png(image, folder / name / f"{i}.png")
            rows.append([f"{name}/{i}.png", name, f"patient {i}", structure])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "label", "patient_id", OUTLINE], *rows])
    return folder


def all_of(folder: Path) -> Dataset:
    return load_dataset(folder)["all"]


# ------------------------------------------------------------------------------------- pictures


def test_the_settings_and_the_model_know_the_same_outlines() -> None:
    assert declarations(AdaptConfig)["outline"].choices == OUTLINES
    assert KEY == OUTLINE


def test_what_a_model_sees_of_a_picture() -> None:
    image, inside = outlined(picture(), disc(), "capsule"), disc()
    whole = np.asarray(picture())
    for outline in OUTLINES:
        seen, mask = take_apart(image, outline)
        hidden = ~inside if "blank" in outline else np.zeros_like(inside)
        if outline == "centre":
            across = (np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2) ** 2
            hidden = across.sum(0) > (0.4 * SIDE) ** 2
        expected = np.where(hidden[..., None], FILL, whole)
        assert (np.asarray(seen) == expected).all(), outline
        assert (np.asarray(mask) > 0).sum() == (~hidden if outline == "centre" else inside).sum()


def test_a_file_keeps_the_whole_square_and_its_outline(tmp_path: Path) -> None:
    path = save_png(outlined(picture(), disc(), "tuft"), tmp_path / "a.png")
    assert (np.asarray(open_image(path)) == np.asarray(picture())).all()
    back = open_outlined(path)
    assert back.info[KEY] == "tuft"
    assert (np.asarray(back.convert("RGB")) == np.asarray(picture())).all()
    assert (np.asarray(back.getchannel("A")) == 255 * disc()).all()


def test_an_alpha_channel_that_states_nothing(tmp_path: Path) -> None:
    image = picture()
    image.putalpha(Image.fromarray(np.uint8(255 * disc())))
    image.save(tmp_path / "a.png")
    assert (np.asarray(open_image(tmp_path / "a.png"))[~disc()] == 255).all()  # as before: on white
    assert open_outlined(tmp_path / "a.png").info[KEY] == "unstated"
    image.putalpha(255)
    image.save(tmp_path / "b.png")
    assert open_outlined(tmp_path / "b.png").mode == "RGB"  # it hides nothing


@pytest.mark.parametrize("levels", [1, 255, "1-bit", "colour", "jpeg", "16 bits"])
def test_masks_of_all_kinds(tmp_path: Path, levels: Any) -> None:
    inside, path = disc(), tmp_path / ("m.jpg" if levels == "jpeg" else "m.png")
    picture().save(tmp_path / "a.png")
    if levels == "colour":
        mask = Image.fromarray(np.uint8(inside[..., None] * np.array([0, 200, 0])))
    elif levels == "16 bits":
        mask = Image.fromarray(np.uint16(inside * 3))
    else:
        value = levels if isinstance(levels, int) else 255
        mask = Image.fromarray(np.uint8(inside * value))
        mask = mask.convert("1") if levels == "1-bit" else mask
    mask.save(path)
    alpha = np.asarray(open_outlined(tmp_path / "a.png", path).getchannel("A")) > 0
    assert (alpha != inside).mean() < (0.02 if levels == "jpeg" else 1e-9)


def test_bad_masks(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "empty.png")
    Image.fromarray(np.uint8(255 * disc(32))).save(tmp_path / "small.png")
    Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)).save(tmp_path / "all.png")
    with pytest.raises(GloVLMError, match="encloses nothing"):
        open_outlined(tmp_path / "a.png", tmp_path / "empty.png")
    with pytest.raises(GloVLMError, match=r"32 x 32 pixels.*64 x 64"):
        open_outlined(tmp_path / "a.png", tmp_path / "small.png")
    assert open_outlined(tmp_path / "a.png", tmp_path / "all.png").mode == "RGB"


def test_views_cut_and_turn_the_outline_along() -> None:
    pixels = np.where(disc()[..., None], [180, 60, 120], [250, 250, 250]).astype(np.uint8)
    image = outlined(Image.fromarray(pixels), disc(), "capsule")
    for key in range(5):
        view = draw_view(image, bytes([key]) * 16)
        dark = np.asarray(view.convert("RGB"))[..., 1] < 150
        assert view.info[KEY] == "capsule"
        assert (dark == (np.asarray(view.getchannel("A")) > 0)).all()
    plain = draw_view(Image.fromarray(pixels), bytes(16))
    assert (np.asarray(draw_view(image, bytes(16)).convert("RGB")) == np.asarray(plain)).all()


def test_the_circle_is_drawn_before_a_view_is_cut() -> None:
    view = draw_view(draw_centre(picture()), bytes(16))
    _, mask = take_apart(view, "centre")
    assert (np.asarray(mask) == np.asarray(view.getchannel("A"))).all()


# --------------------------------------------------------------------------------------- pooling


def test_parts_of_patches_and_which_count() -> None:
    inside = torch.zeros(1, 9, 8)  # the last row is in no patch
    inside[0, :4, :4], inside[0, 0, 4:7], inside[0, 4:, :2] = 1, 1, 1
    coverage = cover_patches(inside, (2, 2), (4, 4))
    assert coverage.tolist() == [[1.0, 3 / 16, 0.5, 0.0]]
    assert choose_inside(coverage).tolist() == [[1, 0, 0, 0]]  # half is not more than half
    thin = torch.tensor([[0.25, 0.0], [0.0, 0.0]])
    assert choose_inside(thin).tolist() == [[0.25, 0], [1, 1]]
    tokens = torch.arange(8.0).view(2, 2, 2)
    assert mean_inside(tokens, thin).tolist() == [[0, 1], [5, 6]]


def expected_pooled(make: Any, model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Mean of the tower's patch tokens inside, patch by patch."""
    tower: Any = model.backbone.vision_model
    states = tower(pixel_values=pixels[:, :3]).last_hidden_state
    if make is tiny_clip:
        states = tower.post_layernorm(states)
    size = int(tower.config.patch_size)
    rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
    pooled = []
    for n in range(len(pixels)):
        chosen = [
            states[n, states.shape[1] - rows * columns + r * columns + c]
            for r in range(rows)
            for c in range(columns)
            if pixels[n, 3, r * size : (r + 1) * size, c * size : (c + 1) * size].mean() > 0.5
        ]
        assert 0 < len(chosen) < rows * columns
        pooled.append(torch.stack(chosen).mean(0))
    both = torch.stack(pooled)
    return torch.nn.functional.normalize(both, dim=-1) if model.config.normalize_pooled else both


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip, tiny_pair])
def test_pooled_tokens_are_those_inside(make: Any) -> None:
    model, processor = load_backbone(str(make()))
    model.eval()
    if make is tiny_clip:  # a norm that does something
        torch.nn.init.normal_(model.backbone.vision_model.post_layernorm.weight)
    images = [outlined(picture(i), disc(at=(0.3 + 0.1 * i, 0.5)), "capsule") for i in range(3)]
    model.config.outline = processor.outline = "pool"
    with torch.inference_mode():
        inputs = processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"]
        pooled = model.pool_images(pixels)
        features = model.get_image_features(pixels).pooler_output
        middle = model.pool_images_and_middle(pixels)
        expected = expected_pooled(make, model, pixels)
        assert pixels.shape[1] == 4
        assert_same_numbers(pooled, expected)
        assert_same_numbers(features, model.project_images(expected))
        assert_same_numbers(middle[0], expected)
        assert middle[1].shape == (3, 32)
        # Without an outline all is inside, whatever way that is stated.
        assert_same_numbers(
            model.pool_images(pixels[:, :3]),
            model.pool_images(torch.cat([pixels[:, :3], torch.ones_like(pixels[:, :1])], 1)),
        )
        model.config.outline = processor.outline = "ignore"
        plain = processor(images=images, return_tensors="pt")["pixel_values"]
        assert plain.shape[1] == 3
        assert_same_numbers(plain, pixels[:, :3])
        assert_same_numbers(model.pool_images(pixels), model.pool_images(plain))


def test_the_mask_goes_through_the_transform_of_the_picture() -> None:
    _, processor = load_backbone(str(tiny_clip()))
    inside = disc(90)[:, :70]
    image = outlined(picture(side=90).crop((0, 0, 70, 90)), inside)
    processor.outline = "pool"
    part = processor(images=image, return_tensors="pt")["pixel_values"][0, 3]
    drawn = Image.fromarray(np.uint8(inside * 255)).convert("RGB")
    processor.outline = "ignore"
    as_image = processor(images=drawn, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert_same_numbers(part, as_image[0, 0].clamp(0, 1))


def test_blanked_pictures_hide_the_outside_from_the_model() -> None:
    model, processor = load_backbone(tiny_pair())
    inside = disc()
    other = np.where(inside[..., None], np.asarray(picture()), np.asarray(picture(7)))
    images = [outlined(picture(), inside), outlined(Image.fromarray(other), inside)]
    for outline, same in (("blank", True), ("blank+pool", True), ("pool", False)):
        model.config.outline = processor.outline = outline
        with torch.inference_mode():
            pooled = model.pool_images(processor(images=images, return_tensors="pt").pixel_values)
        assert torch.equal(pooled[0], pooled[1]) == same, outline


def test_arrays_of_four_channels() -> None:
    _, processor = load_backbone(str(tiny_clip()))
    processor.outline = "blank+pool"
    image = outlined(picture(), disc())
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for given in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert torch.equal(processor(images=[given], return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="uint8 arrays"):
        processor(images=[array / 255.0], return_tensors="pt")


# ------------------------------------------------------------------------------------- the road


def test_a_mask_column_is_an_outline(tmp_path: Path) -> None:
    crops = all_of(write_crops(tmp_path / "alpha"))
    rows = [["file_name", "label", "patient_id", "mask", OUTLINE]]
    for name, image in zip(crops["file_name"], crops["image"], strict=True):
        part = name.replace("/", "_")
        for folder, kind in (("images", image.convert("RGB")), ("masks", image.getchannel("A"))):
            (tmp_path / "plain" / folder).mkdir(parents=True, exist_ok=True)
            kind.save(tmp_path / "plain" / folder / part)
        rows.append([f"images/{part}", name.split("/")[0], name[-5], f"masks/{part}", "capsule"])
    with (tmp_path / "plain" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    masked = all_of(tmp_path / "plain")
    # As `glovlm predict` lists the same folder: no mask is an image, and each image has its own.
    paths, notes, _ = list_images([tmp_path / "plain"])
    assert [*paths] == sorted(masked["file_name"])
    assert notes == ["8 images are masks of others and are not classified."]
    assert outlines_of(image_rows(paths)) == ["capsule"] * 8
    in_order = image_rows({name: paths[name] for name in masked["file_name"]})
    assert ImageRows(in_order, "pool").digests() == ImageRows(masked, "pool").digests()
    assert outlines_of(masked) == outlines_of(crops) == ["capsule"] * 8
    model, processor = load_backbone(str(tiny_clip()))
    cache = FeatureCache(tmp_path / "cache")
    features = {}
    for outline in OUTLINES:
        model.config.outline = processor.outline = outline
        features[outline] = embed_images(model, processor, crops, cache=cache)
        assert_same_numbers(features[outline], embed_images(model, processor, masked, cache=cache))
        again = embed_images(model, processor, masked, cache=cache)  # from the cache
        assert_same_numbers(features[outline], again)
    for one in OUTLINES:
        for other in OUTLINES[: OUTLINES.index(one)]:
            assert not np.allclose(features[one], features[other], atol=1e-5), (one, other)


def test_another_mask_is_another_image_to_the_cache(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    for name, at in (("one", 0.3), ("two", 0.6)):
        Image.fromarray(np.uint8(255 * disc(at=(at, 0.5)))).save(tmp_path / f"{name}.png")
    columns = {
        "image": [str(tmp_path / "a.png")] * 3,
        "mask": [str(tmp_path / "one.png"), str(tmp_path / "two.png"), None],
    }
    rows = Dataset.from_dict(columns, Features({"image": ImageFeature(), "mask": ImageFeature()}))
    assert len({*ImageRows(rows, "pool").digests()}) == 3
    assert len({*ImageRows(rows, "ignore").digests()}) == 1
    assert outlines_of(rows) == ["unstated", "unstated", None]


def test_a_mask_column_that_is_none(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    table = folder / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",mask", *(f"{line},yes" for line in lines[1:])]))
    assert "mask" not in all_of(folder).column_names  # says nothing of files
    table.write_text(
        "\n".join([lines[0] + ",mask", lines[1] + ",a/b.png", lines[2] + ",pale/1.png"])
    )
    with pytest.raises(GloVLMError, match=r"1 of 2 rows name a file that is not there \(a/b.png"):
        load_dataset(folder)


SEES = ("linear_probe", "lora", "adapter", "convlm", "tip_adapter_f")


@pytest.mark.parametrize("method", SEES)
def test_every_kind_of_method_learns_inside_and_keeps_it(tmp_path: Path, method: str) -> None:
    rows = all_of(write_crops(tmp_path / "crops"))
    config: dict[str, Any] = {"outline": "blank+pool"}
    if isinstance(METHODS[method], TowerMethod):
        config |= {"recipe": {"epochs": 1}}
    adapted = adapt(str(tiny_clip()), method, rows, config=config)
    assert (adapted.model.config.outline, adapted.model.config.outline_of) == (
        "blank+pool",
        "capsule",
    )
    before = predict(adapted.model, adapted.processor, rows)
    adapted.save(tmp_path / "model")
    model, processor, _ = load_classifier(tmp_path / "model")
    assert (model.config.outline, processor.outline) == ("blank+pool", "blank+pool")
    after = predict(model, processor, rows)
    assert_same_numbers(after.logits, before.logits)
    # The same as the model's own forward pass on a picture with alpha.
    images = [open_outlined(value) for value in column(rows, "image")]
    with torch.inference_mode():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    assert_same_numbers(logits, after.logits)
    # What lies outside does not count.
    changed = [
        outlined(
            Image.fromarray(
                np.where(np.asarray(i)[..., 3:] > 0, np.asarray(i)[..., :3], 90).astype(np.uint8)
            ),
            np.asarray(i)[..., 3] > 0,
        )
        for i in images
    ]
    with torch.inference_mode():
        same = model(**processor(images=changed, return_tensors="pt")).logits
    assert torch.equal(same, logits)


@contextmanager
def patched_replay() -> Iterator[list[int]]:
    """Counts the batches that start behind frozen blocks."""
    played: list[int] = []
    play = Replay.play

    def counted(self: Replay, states: torch.Tensor) -> Any:
        played.append(len(states))
        return play(self, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "play", counted)
        yield played


@pytest.mark.parametrize("outline", ["pool", "blank+pool"])
def test_frozen_blocks_are_replayed_with_their_outlines(tmp_path: Path, outline: str) -> None:
    rows = all_of(write_crops(tmp_path / "crops"))
    weights = []
    for replay in (True, False):
        config = {
            "outline": outline, "replay": replay, "recipe": {"epochs": 2},
            "method_config": {"vision_layers": 1},
        }  # fmt: skip
        with patched_replay() as played:
            adapted = adapt(str(tiny_clip()), "vanilla", rows, config=config)
        assert bool(played) == replay
        weights.append(predict(adapted.model, adapted.processor, rows).logits)
    assert_same_numbers(weights[0], weights[1])


def test_support_without_an_outline_is_refused(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    picture(3).save(folder / "pale" / "0.png")
    rows = all_of(folder)
    with pytest.raises(GloVLMError, match=r"needs the outline .* 1 of 8 have none.*outline centre"):
        adapt(str(tiny_clip()), "linear_probe", rows, config={"outline": "pool"})
    adapted = adapt(str(tiny_clip()), "linear_probe", rows, config={"outline": "centre"})
    assert any("circle in the middle" in note for note in adapted.notes)
    assert not any("class texts may say less" in note for note in adapted.notes)
    with_texts = adapt(str(tiny_clip()), "tip_adapter", rows, config={"outline": "centre"})
    assert any("class texts may say less" in note for note in with_texts.notes)
    assert outline_notes(adapted.model.config, rows) == []


def test_a_model_says_when_it_gets_no_outline(tmp_path: Path, caplog: Any) -> None:
    rows = all_of(write_crops(tmp_path / "a"))
    adapted = adapt(str(tiny_clip()), "linear_probe", rows, config={"outline": "pool"})
    assert outline_notes(adapted.model.config, rows) == []
    bare = Dataset.from_dict({"image": [picture(i) for i in range(3)]})
    (note,) = outline_notes(adapted.model.config, bare)
    assert note.startswith("3 of 3 images have no outline")
    tufts = all_of(write_crops(tmp_path / "b", "tuft"))
    (note,) = outline_notes(adapted.model.config, tufts)
    assert "8 of 8 outlines go around the tuft" in note
    predicted = predict(adapted.model, adapted.processor, bare)
    assert np.isfinite(predicted.probabilities).all()


def test_what_outlines_go_around() -> None:
    assert structure_of(["capsule", "unstated"]) == "capsule"
    assert structure_of(["unstated", "unstated"]) is None
    assert structure_of(["unstated"], "tuft") == "tuft"
    with pytest.raises(GloVLMError, match="1 outlines go around the capsule and 2 around the tuft"):
        structure_of(["capsule", "tuft", "tuft"])
    with pytest.raises(GloVLMError, match="around the tuft, and outline_of says capsule"):
        structure_of(["tuft"], "capsule")


def test_a_word_that_is_no_structure(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("patient 0,capsule", "patient 0,tufft"))
    with pytest.raises(GloVLMError, match=r"capsule or the tuft; found 'tufft'.*'tuft'"):
        adapt(str(tiny_clip()), "linear_probe", all_of(folder), config={"outline": "pool"})


def test_a_tower_that_cannot_pool_inside() -> None:
    rows = Dataset.from_dict(
        {"image": [outlined(picture(i), disc()) for i in range(4)], "label": [0, 1, 0, 1]}
    ).class_encode_column("label")
    with pytest.raises(GloVLMError, match="SigLIP 2 takes each image in a shape of its own"):
        adapt(str(tiny_siglip2()), "linear_probe", rows, config={"outline": "pool"})
    assert adapt(str(tiny_siglip2()), "linear_probe", rows, config={"outline": "blank"}).model


def test_a_projection_fits_the_outline_that_it_was_made_with(tmp_path: Path) -> None:
    rows = all_of(write_crops(tmp_path / "crops"))
    config = {"recipe": {"epochs": 1}}
    adapt(tiny_pair(), "lora", rows, config=config | {"outline": "pool"}).save(tmp_path / "pool")
    adapt(tiny_pair(), "lora", rows, config=config).save(tmp_path / "whole")
    for folder, other in (("pool", "ignore"), ("whole", "blank+pool")):
        with pytest.raises(GloVLMError, match=f"not with outline '{other.replace('+', '.')}'"):
            adapt(str(tmp_path / folder), "linear_probe", rows, config={"outline": other})
    again = adapt(str(tmp_path / "pool"), "linear_probe", rows, config={"outline": "pool"})
    assert again.model.config.pools_inside
