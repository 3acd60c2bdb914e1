"""What is made of a model that sees outlines: pipelines, maps, cards; and what is hidden."""

import base64
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
from PIL import Image
from safetensors.torch import save_file
from test_card import make_results
from test_explain import classifier
from test_export import by_the_sidecar
from test_outline_input import all_of, disc, picture, save_png, write_crops
from tiny import CLASSES, tiny_clip
from transformers import ImageClassificationPipeline, pipeline

from hf_glovlm import adapt, describe_limits, load_backbone, open_outlined, predict
from hf_glovlm.data.catalog import load_classes
from hf_glovlm.data.outlines import outlined
from hf_glovlm.data.terminology import described_prompts, find_term, prompts_for, terms
from hf_glovlm.data.visibility import hidden_classes, visible_prompts
from hf_glovlm.errors import GloVLMError
from hf_glovlm.explain import explain, measure_faithfulness, show_outline
from hf_glovlm.explain.attention import read_attention
from hf_glovlm.explain.patches import mean_colour, reveal, view_image
from hf_glovlm.inference import load_classifier
from hf_glovlm.methods.context_tokens import prompt_sets
from hf_glovlm.model import processing_glovlm
from hf_glovlm.publish import adapter_only, plain_clip
from hf_glovlm.publish.card import render_card
from hf_glovlm.publish.onnx_graph import ExportReport, describe_input
from hf_glovlm.publish.staging import _check_code

SEEING = ("blank", "pool", "blank+pool")


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    folder = write_crops(tmp_path_factory.mktemp("crops"))
    return folder, all_of(folder)


@pytest.fixture(scope="module")
def saved(
    crops: tuple[Path, Dataset], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Any]:
    """A model that learned inside of outlines: its folder, itself, and its processor."""
    adapted = adapt(str(tiny_clip()), "linear_probe", crops[1], config={"outline": "blank+pool"})
    adapted.model.config.backbone_name, adapted.model.config.backbone_license = "own", "mit"
    folder = tmp_path_factory.mktemp("model")
    adapted.save(folder)
    return folder, adapted.model, adapted.processor


def scores(rows: Any) -> dict[str, float]:
    return {row["label"]: row["score"] for row in rows}


# -------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("trusted", [None, True])
def test_a_pipeline_sees_the_outline(
    crops: tuple[Path, Dataset], saved: tuple[Path, Any, Any], trusted: bool | None
) -> None:
    folder, model, processor = saved
    found = predict(model, processor, crops[1].select([0]))
    expected = dict(zip(found.class_names, found.probabilities[0].tolist(), strict=True))
    path = crops[0] / crops[1]["file_name"][0]
    text = base64.b64encode(path.read_bytes()).decode()
    classify: Any = pipeline("image-classification", model=str(folder), trust_remote_code=trusted)
    for source in (str(path), Image.open(path), text, f"data:image/png;base64,{text}"):
        assert scores(classify(source)) == pytest.approx(expected, abs=1e-5)
    bare = scores(classify(Image.open(path).convert("RGB")))
    assert bare != pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="Expected an image, a path, an http"):
        classify("glomerulus.png")


def test_a_zero_shot_pipeline_sees_the_outline(
    crops: tuple[Path, Dataset], saved: tuple[Path, Any, Any]
) -> None:
    folder, model, processor = saved
    path, texts = crops[0] / crops[1]["file_name"][0], ["a pale tuft", "a dark tuft"]
    compare: Any = pipeline("zero-shot-image-classification", model=str(folder))
    rows = compare(str(path), candidate_labels=texts, hypothesis_template="{}")
    inputs = processor(images=open_outlined(path), text=texts, return_tensors="pt")
    with torch.no_grad():
        expected = model.glovlm(**inputs).logits_per_image[0].softmax(0).tolist()
    assert scores(rows) == pytest.approx(dict(zip(texts, expected, strict=True)), abs=1e-5)


def test_other_models_keep_their_pipeline(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    model, processor = classifier("clip")
    images = processor.image_processor
    whole: Any = pipeline("image-classification", model=model, image_processor=images)
    assert type(whole) is ImageClassificationPipeline
    _, seeing, own = saved
    options: dict[str, Any] = {"model": seeing, "image_processor": own.image_processor}
    with pytest.raises(ValueError, match=r"outline 'blank\+pool'.*give pipeline\(.*processor=pro"):
        pipeline("image-classification", **options)
    classify: Any = pipeline("image-classification", processor=own, **options)
    classify.save_pretrained(tmp_path)
    _, processor, _ = load_classifier(tmp_path)
    assert processor.outline == "blank+pool"


def test_a_picture_without_an_outline_is_noticed_at_once(
    saved: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(processing_glovlm.logger, "warning_once", notes.append)
    load_classifier(saved[0])  # its checks have an outline, or they would use up the warning
    assert notes == []
    classify: Any = pipeline("image-classification", model=str(saved[0]))
    classify(picture())
    assert len(notes) == 1
    assert "without an outline" in notes[0]


def test_predict_says_what_is_hidden_and_leaves_out_an_empty_outline(
    crops: tuple[Path, Dataset], saved: tuple[Path, Any, Any], tmp_path: Path, glovlm: Glovlm
) -> None:
    bare, empty = picture(9), picture(9).convert("RGBA")
    empty.putalpha(0)
    for name, image in (("bare", bare), ("empty", empty)):
        image.save(tmp_path / f"{name}.png")
    done = glovlm("predict", saved[0], crops[0] / "pale", tmp_path, "--json")
    assert done.code == 1
    assert len(json.loads(done.out)) == 5
    said = " ".join(done.err.split())
    assert "The outline of" in said
    assert "empty.png encloses nothing" in said
    assert "1 of 5 images have no outline" in said
    assert hidden_classes([], "blank+pool", "capsule")[0] in said


# ------------------------------------------------------------------------------------------- maps


def seeing(name: str, outline: str, **options: Any) -> tuple[Any, Any]:
    model, processor = classifier(name, **options)
    model.config.outline = processor.outline = outline
    return model, processor


@pytest.mark.parametrize("method", ["rollout", "gradient", "similarity", "occlusion"])
def test_maps_inside_of_all_are_those_of_mean_pooling(method: str) -> None:
    image = picture(1, 32)
    whole = explain(*classifier("pair", vision_pooling="mean"), image, method=method, target=1)
    inside = explain(*seeing("pair", "pool", vision_pooling="mean"), image, method=method, target=1)
    np.testing.assert_allclose(inside.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_rollout_is_the_mean_over_the_patches_inside(name: str) -> None:
    model, processor = seeing(name, "pool")
    image, half = picture(2, 32), np.zeros((32, 32), bool)
    half[:16] = True  # two of four rows of patches
    rows = [np.arange(32)[:, None] // 8 == k for k in range(2)]

    def roll(inside: Any) -> Any:
        picture = outlined(image, np.broadcast_to(inside, half.shape))
        return explain(model, processor, picture, method="rollout").values

    np.testing.assert_allclose(roll(half), (roll(rows[0]) + roll(rows[1])) / 2, rtol=1e-4)
    heat = explain(model, processor, outlined(image, half), method="similarity")
    assert heat.mask == "outline"
    assert (heat.values[:2] != 0).all()
    assert (heat.values[2:] == 0).all()  # never pooled


def test_an_attentional_pooler_attends_inside_alone() -> None:
    model, processor = seeing("conch", "pool")
    image = outlined(picture(3, 40), disc(40, 0.35, (0.5, 0.5)))
    view, inputs = view_image(model, processor, image)
    attention = read_attention(model, inputs, view, lambda features: features.sum())
    assert attention.pooling is not None
    assert attention.inside is not None
    assert (attention.pooling[:, attention.inside == 0] == 0).all()
    assert attention.pooling.sum(1) == pytest.approx(1)
    assert explain(model, processor, image, method="gradient").values.max() > 0


def test_what_is_blanked_is_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = seeing("clip", "pool")
    image, inside = picture(4, 32), disc(32)
    view, inputs = view_image(model, processor, outlined(image, inside))
    pixels = inputs["pixel_values"]
    assert tuple(pixels.shape) == (1, 4, 32, 32)
    colour = mean_colour(inputs)
    assert torch.equal(colour, pixels[0, :3].mean((1, 2)))
    nothing = torch.zeros(2, view.rows * view.columns, dtype=torch.bool)
    (blank,) = reveal(inputs, nothing, colour, view, 8)
    assert torch.equal(blank["pixel_values"][1, 3], pixels[0, 3])
    assert torch.equal(blank["pixel_values"][1, :3], colour.view(3, 1, 1).expand(3, 32, 32))


def test_a_mask_is_the_outline_of_a_picture_without_one() -> None:
    model, processor = seeing("clip", "blank+pool")
    image, inside = picture(5, 40), disc(40)
    own = explain(model, processor, outlined(image, inside), method="occlusion")
    given = explain(model, processor, image, method="occlusion", mask=inside)
    assert (own.mask, given.mask) == ("outline", "given")
    np.testing.assert_array_equal(given.values, own.values)
    assert own.glomerulus_blanked == given.glomerulus_blanked
    # Outside is grey already, so blanking it changes nothing.
    assert own.context_blanked == pytest.approx(own.scores)
    curves = [
        measure_faithfulness(model, processor, image, given, mask=inside, steps=4, orders=1),
        measure_faithfulness(model, processor, outlined(image, inside), own, steps=4, orders=1),
    ]
    np.testing.assert_array_equal(curves[0].deletion, curves[1].deletion)
    whole = explain(*classifier("clip"), outlined(image, inside), method="occlusion")
    assert whole.mask == "outline"  # also for a model that sees all
    centre = explain(*seeing("clip", "centre"), image, method="occlusion")
    assert centre.mask == "centre"


def test_a_picture_is_shown_whole_and_paler_outside() -> None:
    image, inside = picture(6), disc()
    shown = np.asarray(show_outline(outlined(image, inside)), int)
    whole = np.asarray(image, int)
    assert (shown[inside] == whole[inside]).all()
    assert (shown[~inside] >= whole[~inside]).all()
    assert shown[~inside].mean() > whole[~inside].mean() + 20
    assert (np.asarray(show_outline(image)) == whole).all()


# -------------------------------------------------------------------------------------- published


def test_processor_and_model_agree_on_the_outline(
    saved: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    _, model, processor = saved
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for file, changes, message in (
        ("processor_config.json", {"outline": "ignore"}, r"'ignore', and the .* 'blank\+pool'"),
        ("config.json", {"outline": "inside"}, "'outline'.*to be one of ignore, centre"),
        ("config.json", {"outline": None}, "'outline'"),
        ("config.json", {"outline_of": "hilum"}, "'outline_of'.*capsule, tuft"),
    ):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(GloVLMError, match=message):
            load_classifier(tmp_path)
        (tmp_path / file).write_text(before)
    assert load_classifier(tmp_path)[1].outline == "blank+pool"


def test_the_sidecar_of_a_graph_tells_the_outline(saved: tuple[Path, Any, Any]) -> None:
    _, model, processor = saved
    image, inside = picture(7, 44), disc(44)
    prepared = processor(images=outlined(image, inside), return_tensors="pt")["pixel_values"]
    report = ExportReport(Path(), "model.onnx", "onnx", 18, 1, 1, 0.0, None)
    about = describe_input(model, processor, prepared, report)
    assert about["input"]["shape"] == ["batch", 4, 32, 32]
    outline = about["outline"]
    assert (outline["mode"], outline["around"]) == ("blank+pool", "capsule")
    # From the sidecar alone: grey outside, then the steps; the outline takes all but the last.
    filled = np.where(inside[..., None], np.asarray(image), outline["fill_outside"])
    colours = by_the_sidecar(about, Image.fromarray(filled.astype(np.uint8)))
    plain = {"preprocessing": about["preprocessing"] | {"mean": [0] * 3, "std": [1] * 3}}
    alpha = Image.fromarray(inside.astype(np.uint8) * 255).convert("RGB")
    pixels = np.concatenate([colours, by_the_sidecar(plain, alpha)[:, :1]], axis=1)
    np.testing.assert_allclose(prepared, pixels, atol=0.05)


def test_a_plain_clip_is_refused(
    saved: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"config": {"method": "linear_probe"}}
    run = SimpleNamespace(config=saved[1].config, results=results, identifiers=None)
    monkeypatch.setattr(plain_clip, "read_run", lambda folder: run)
    monkeypatch.setattr(plain_clip, "refuse_named", lambda *args: None)
    with pytest.raises(GloVLMError, match=r"inside of an outline \(outline 'blank\+pool'\)"):
        plain_clip.export_clip(tmp_path, tmp_path / "clip")


def test_a_head_alone_keeps_the_outline(
    saved: tuple[Path, Any, Any],
    crops: tuple[Path, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, model, processor = saved
    base, plain = load_backbone(str(tiny_clip()))
    towers = dict(base.backbone.state_dict())
    monkeypatch.setattr(adapter_only, "_load_base", lambda config, adapter: (towers, plain))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("glovlm.")}
    save_file(kept, tmp_path / adapter_only.BESIDE)
    (tmp_path / adapter_only.PARTS).write_text(json.dumps(model.config.to_dict()))
    loaded, own = adapter_only.load_published(tmp_path)
    assert (own.outline, loaded.config.outline_of) == ("blank+pool", "capsule")
    again = predict(loaded, own, crops[1])
    before = predict(model, processor, crops[1])
    np.testing.assert_allclose(again.logits, before.logits, atol=1e-5)


def test_no_pipeline_of_others_is_published(saved: tuple[Path, Any, Any]) -> None:
    content = json.loads((saved[0] / "config.json").read_text())
    assert set(content["custom_pipelines"]) == {
        *("image-classification", "zero-shot-image-classification")
    }
    _check_code(Path("config.json"), content)
    for impl in ("pipeline_glovlm.Other", "someone/code--pipeline_glovlm.Mine"):
        content["custom_pipelines"]["image-classification"] = {"impl": impl}
        with pytest.raises(GloVLMError, match="which is none of this package"):
            _check_code(Path("config.json"), content)


@pytest.mark.parametrize("around", ["tuft", "capsule", None])
def test_the_card_says_what_is_seen_and_what_is_hidden(around: str | None) -> None:
    results = make_results()
    assert "What the model sees" not in render_card(results)
    results["training"] |= {"outline": "blank+pool", "outline_of": around}
    hidden = hidden_classes(CLASSES, "blank+pool", around)
    results["notes"] += hidden
    card = render_card(results)
    assert "What the model sees of an image: the inside of its outline, on grey" in card
    stated = "Around what is not stated." if around is None else f"go around the {around}."
    assert stated in card
    for sentence in hidden:
        assert card.count(sentence) == 1
    assert card.index(hidden[0]) > card.index("## Limits")


# ----------------------------------------------------------------------------------------- hidden


def test_every_crescent_is_seen_outside_of_the_tuft() -> None:
    """Independent of the file's own field: by the words of names and definitions."""
    for term in terms():
        words = f"{term.name} {' '.join(term.synonyms)} {term.definition}".lower()
        if term.level == "biopsy":
            assert term.seen_in == "anywhere"
        elif "crescent" in words or "adhesion" in term.name or "capsular" in term.name:
            assert term.seen_in == "capsule", term.name
        elif "periglomerular" in words or "interstitium" in words:
            assert term.seen_in == "around", term.name
    assert find_term("ischemic").seen_in == "capsule"
    assert find_term("global sclerosis").seen_in == "tuft"


HIDDEN = [  # outline, what it goes around; which of these are named as not seen, in which place
    ("ignore", "tuft", []),
    *((outline, "tuft", ["crescent, Ischemic Glomeruli", "PGF"]) for outline in SEEING),
    *((outline, "capsule", ["PGF"]) for outline in SEEING),
    *((outline, None, ["PGF"]) for outline in SEEING),
    ("centre", None, ["PGF"]),
]


@pytest.mark.parametrize(("outline", "around", "named"), HIDDEN)
def test_what_an_outline_hides(outline: str, around: str | None, named: list[str]) -> None:
    classes = ["viable", "crescent", "Ischemic_Glomeruli", "PGF", "a dog"]
    sentences = hidden_classes(classes, outline, around)
    if outline == "ignore":
        assert sentences == []
        return
    first, *rest = sentences
    assert "around" in first
    assert ("crescents" in first) == (outline != "centre" and around != "capsule")
    assert [
        r.split("does not look: ")[1].split(". Its")[0].split(" (dom")[0] for r in rest
    ] == named
    assert all(("unverified: Ischemic" in r) == ("Ischemic" in r) for r in rest)
    assert len(hidden_classes(["viable", "sclerosed"], outline, around)) == 1


def test_limits_and_notes_say_it(saved: tuple[Path, Any, Any], crops: tuple[Path, Dataset]) -> None:
    sentence = hidden_classes([], "blank+pool", "capsule")[0]
    assert sentence in describe_limits(saved[1].config)
    adapted = adapt(str(tiny_clip()), "linear_probe", crops[1], config={"outline": "pool"})
    assert hidden_classes([], "pool", "capsule")[0] in adapted.notes


@pytest.mark.parametrize("term", [t for t in terms() if t.promptable], ids=lambda t: t.name)
def test_prompts_name_no_more_than_is_seen(term: Any) -> None:
    outside = ("kidney section", "interstitium", "tubule", "periglomerular")
    for prompts in (prompts_for(term), described_prompts(term)):
        assert visible_prompts(prompts) == tuple(prompts)
        for around in ("capsule", "tuft"):
            hidden = outside if around == "capsule" else (*outside, "bowman", "capsule", "crescent")
            kept = visible_prompts(prompts, "blank", around)
            assert kept
            assert set(kept) <= set(prompts)
            left = [sum(p.lower().count(word) for word in hidden) for p in kept]
            assert max(left) <= 1  # no more than the name of the class itself
            assert max(left) == 0 or term.seen_in != "tuft"


def test_classes_of_a_task_are_described_by_what_is_seen(caplog: Any) -> None:
    names = ["viable", "crescent"]
    seen = {"outline": "pool", "outline_of": "tuft"}
    whole = load_classes(names, prompts="terminology")
    inside = load_classes(names, prompts="terminology", **seen)  # type: ignore[arg-type]
    assert any("kidney section" in p for p in whole[0].prompts)
    for before, after in zip(whole, inside, strict=True):
        assert set(after.prompts) < set(before.prompts)
        assert not any("kidney section" in p for p in after.prompts)
    texts, _ = prompt_sets(whole, "terminology", *seen.values())
    assert not any("Bowman" in text for text in texts[0])
    assert any("Bowman" in text for text in prompt_sets(whole, "terminology")[0][0])
    with caplog.at_level(logging.WARNING):
        own = prompt_sets(inside, "classes", *seen.values())[0]
    assert own == [list(c.prompts) for c in inside]  # what a person wrote stays


def test_a_file_without_its_text_is_outlined_all_the_same(tmp_path: Path) -> None:
    path = save_png(outlined(picture(8), disc()), tmp_path / "a.png")
    heat = explain(*seeing("clip", "blank"), path, method="occlusion")
    assert heat.mask == "outline"
    assert "mask" in heat.describe()
