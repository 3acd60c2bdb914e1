"""Captions written by image-to-text models: tiny real architectures with random weights."""

import csv
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from tiny import _TOWER, CLASSES, SIZE, _bert_tokenizer, _session, tiny_images
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_glovlm.data.folder import column, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import captioning
from hf_glovlm.inference.captioning import QUESTION, load_captioner, write_captions

TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} assistant :"
)
_SIZE = {"height": SIZE, "width": SIZE}
_CROP = {"size": {"shortest_edge": SIZE}, "crop_size": _SIZE}
_SPREAD = {"initializer_range": 0.5}  # else random models say the same of every image


def _ids(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


def _blip(folder):
    tokenizer = _bert_tokenizer()
    text = _TOWER | _ids(tokenizer) | _SPREAD | {"encoder_hidden_size": 32}
    config = BlipConfig(
        text_config=text | {"sep_token_id": tokenizer.sep_token_id, "max_position_embeddings": 64},
        vision_config=_TOWER | _SPREAD | {"image_size": SIZE, "patch_size": 8},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=_SIZE), tokenizer).save_pretrained(folder)


def _git(folder):
    tokenizer = _bert_tokenizer()
    config = GitConfig(
        vision_config=_TOWER | {"image_size": SIZE, "patch_size": 8},
        max_position_embeddings=64,
        **_TOWER | _ids(tokenizer) | _SPREAD,
    )
    GitForCausalLM(config).save_pretrained(folder)
    GitProcessor(CLIPImageProcessor(**_CROP), tokenizer).save_pretrained(folder)


def _encoder_decoder(folder):
    tokenizer = _bert_tokenizer()
    encoder = ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **_TOWER | _SPREAD))
    decoder = BertLMHeadModel(
        BertConfig(
            is_decoder=True,
            add_cross_attention=True,
            max_position_embeddings=64,
            **_TOWER | _ids(tokenizer) | _SPREAD,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.sep_token_id
    model.save_pretrained(folder)
    ViTImageProcessor(size=_SIZE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _llava(folder, template=TEMPLATE):
    tokenizer = _bert_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=8, **_TOWER | _SPREAD),
        text_config=LlamaConfig(
            max_position_embeddings=256, num_key_value_heads=4, **_TOWER | _ids(tokenizer) | _SPREAD
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.temperature = 0.7  # as published checkpoints carry it
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(**_CROP),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


MAKERS = {
    "llava": _llava,
    "blip": _blip,
    "git": _git,
    "vision-encoder-decoder": _encoder_decoder,
}


@cache
def made(kind: str) -> Path:
    folder = _session() / f"captioner_{kind}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        MAKERS[kind](folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_model_captions_and_other_cells_stay(kind: str, tmp_path: Path) -> None:
    data = tiny_images(tmp_path / "d", per_class=2, groups=2)
    before = rows(data / "metadata.csv")
    seen: list[tuple[int, int]] = []
    summary = write_captions(
        data,
        model=made(kind),
        batch_size=4,
        max_new_tokens=6,
        on_progress=lambda *progress: seen.append(progress),
    )
    assert summary.kind.startswith(kind)
    assert summary.kind.endswith("chat" if kind == "llava" else "captioner")
    assert summary.question == (QUESTION if kind == "llava" else None)
    assert (summary.written, summary.kept, seen) == (6, 0, [(4, 6), (6, 6)])
    after = rows(data / "metadata.csv")
    assert [{k: v for k, v in row.items() if k != "caption"} for row in after] == before
    loaded = load_dataset(data)["all"]
    by_name = {row["file_name"]: row["caption"] for row in after}
    assert column(loaded, "caption") == [by_name[n] for n in column(loaded, "file_name")]
    assert len({text for text in by_name.values() if text}) > 1  # it looks at the image
    assert all("user" not in text and "assistant" not in text for text in by_name.values())
    about = json.loads((data / "captions.json").read_text())
    assert "not by a person" in about["note"]
    assert about["question"] == summary.question
    assert {p.name for p in data.iterdir()} == {*CLASSES, "metadata.csv", "captions.json"}


def test_greedy_decoding_is_the_model_s_own_and_batches_do_not_matter(tmp_path: Path) -> None:
    from hf_glovlm.data.folder import open_image

    data = tiny_images(tmp_path, per_class=1)
    captioner = load_captioner(made("llava"))
    images = [open_image(value) for value in column(load_dataset(data)["all"], "image")]
    together = captioner.describe(images, 5)
    assert together == [captioner.describe([image], 5)[0] for image in images]
    processor, model = captioner.processor, captioner.model
    prompt = f"user : <image> {QUESTION} assistant :"
    tokens = processor(images=images[0], text=prompt, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    for _ in range(5):  # arg max, one token after the other
        logits = model(**tokens).logits[0, -1]
        ids = torch.cat([tokens["input_ids"], logits.argmax()[None, None]], dim=1)
        tokens["input_ids"], tokens["attention_mask"] = ids, torch.ones_like(ids)
        if int(ids[0, -1]) == processor.tokenizer.sep_token_id:
            break
    words = processor.tokenizer.decode(tokens["input_ids"][0, length:], skip_special_tokens=True)
    assert together[0] == " ".join(words.split())


@pytest.mark.parametrize("output", [None, "out/captions.parquet", "copy.csv"])
def test_a_killed_run_goes_on_and_leaves_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    made("blip")
    results = []
    progress: list[int] = []
    for name in ("whole", "killed"):
        data = tiny_images(tmp_path / name, per_class=3)
        target = None if output is None else tmp_path / name / output
        options = {"model": made("blip"), "batch_size": 2, "max_new_tokens": 5, "output": target}
        described: list[int] = []
        if name == "killed":
            real = captioning.Captioner.describe

            def dying(self, images, tokens, real=real, described=described):
                if len(described) == 2:
                    raise KeyboardInterrupt
                described.append(len(images))
                return real(self, images, tokens)

            before = (data / "metadata.csv").read_bytes()
            monkeypatch.setattr(captioning.Captioner, "describe", dying)
            with pytest.raises(KeyboardInterrupt):
                write_captions(data, **options)
            monkeypatch.setattr(captioning.Captioner, "describe", real)
            assert (data / "metadata.csv").read_bytes() == before
            journal = next((target or data / "x").parent.glob(".*.captions/*.jsonl"))
            with journal.open("a") as stream:
                stream.write('{"half a li')
            with pytest.raises(GloVLMError, match="another model, question or batch size"):
                write_captions(data, **options | {"max_new_tokens": 4})
            write_captions(data, **options, on_progress=lambda n, _: progress.append(n))
            assert progress == [6, 8, 9]  # the first two batches were not done again
            assert not journal.exists()
        else:
            assert write_captions(data, **options).written == 9
        results.append((target or data / "metadata.csv").read_bytes())
        if output is not None:
            assert "caption" not in rows(data / "metadata.csv")[0]
    assert results[0] == results[1]
    if output and output.endswith("parquet"):
        table = pq.read_table(tmp_path / "whole" / output)
        assert table.column_names == ["file_name", "caption"]
        assert len(table) == 9


def _interrupted(data: Path, model: Path, n: int) -> None:
    """Caption some images, two at a time, and stop."""

    def stop(done: int, _: int) -> None:
        if done == n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(data, model=model, batch_size=2, max_new_tokens=5, on_progress=stop)


def test_an_image_that_changed_since_is_captioned_again(tmp_path: Path) -> None:
    results = []
    for name in ("whole", "killed"):
        data = tiny_images(tmp_path / name, per_class=2)
        images = sorted(data.rglob("*.png"))
        if name == "killed":
            _interrupted(data, made("blip"), 4)
        Pillow.new("RGB", (SIZE, SIZE), "black").save(images[0])
        summary = write_captions(data, model=made("blip"), batch_size=2, max_new_tokens=5)
        assert summary.written == 6
        results.append((data / "metadata.csv").read_bytes())
    assert results[0] == results[1]


def test_other_weights_or_another_process_do_not_mix_their_captions(tmp_path: Path) -> None:
    data = tiny_images(tmp_path / "d", per_class=2)
    model = tmp_path / "model"
    shutil.copytree(made("blip"), model)
    _interrupted(data, model, 2)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if weights[name].ndim == 2)
    weights[name] += 0.1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(GloVLMError, match="of a run with another model"):
        write_captions(data, model=model, batch_size=2, max_new_tokens=5)
    other = tiny_images(tmp_path / "other", per_class=1)

    def second(done: int, _: int) -> None:
        with pytest.raises(GloVLMError, match="Another process writes to"):
            write_captions(other, model=model)

    write_captions(other, model=model, max_new_tokens=4, on_progress=second)
    assert {path.name for path in other.iterdir()} == {*CLASSES, "metadata.csv", "captions.json"}


@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet", "captions.json"])
def test_captions_replace_no_table_of_others(tmp_path: Path, name: str) -> None:
    data = tiny_images(tmp_path / "d", per_class=1)
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"file_name": ["x"], "caption": ["a person's"]}), place)
    else:
        place.write_text("file_name,caption\nx.png,a person's\n" if "csv" in name else "{}")
    before = place.read_bytes()
    output = place if name != "captions.json" else tmp_path / "out" / "new.csv"
    with pytest.raises(GloVLMError, match=f"'{place}' is there already"):
        write_captions(data, model=made("git"), max_new_tokens=3, output=output)
    assert place.read_bytes() == before
    assert [path.name for path in place.parent.iterdir()] == [name]


def test_captions_of_a_person_are_kept(tmp_path: Path) -> None:
    data = tiny_images(tmp_path, per_class=2)
    lines = (data / "metadata.csv").read_text().splitlines()
    changed = [f"{lines[0]},Caption,,"] + [f"{line}, ,a,b" for line in lines[1:]]
    changed[1] = changed[1].replace(", ,", ',"a tuft, says a person",')
    (data / "metadata.csv").write_text("\n".join(changed) + "\n")
    assert column(load_dataset(data)["all"], "caption") == ["a tuft, says a person", *[""] * 5]
    summary = write_captions(data, model=made("git"), max_new_tokens=4)
    assert (summary.written, summary.kept) == (5, 1)
    with (data / "metadata.csv").open(newline="") as stream:
        header, first, second, *_ = list(csv.reader(stream))
    assert header == ["file_name", "label", "patient_id", "Caption", "", ""]
    assert first[3:] == ["a tuft, says a person", "a", "b"]
    assert second[4:] == ["a", "b"]
    assert write_captions(data, model=made("git")).written == len(summary.empty)
    assert write_captions(data, model=made("git"), max_new_tokens=3, overwrite=True).written == 6
    lines = (data / "metadata.csv").read_text().splitlines()
    lines[1] = re.sub(",[^,]*", ",", lines[1], count=1)  # its label
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    (data / "manifest.json").write_text('{"kind": "crops", "made_from": {}, "files": {}}')
    options = {"max_new_tokens": 3, "overwrite": True}
    assert write_captions(data, model=made("git"), **options).written == 5  # one is to be labelled
    assert len((data / "metadata.csv").read_text().splitlines()) == 7


def test_class_folders_with_a_split_get_a_table(tmp_path: Path) -> None:
    tiny_images(tmp_path / "train", per_class=1)
    tiny_images(tmp_path / "test", per_class=1, seed=1)
    with pytest.raises(GloVLMError, match=r"a metadata\.csv each; join them"):
        write_captions(tmp_path, model=made("git"))
    for part in ("train", "test"):
        (tmp_path / part / "metadata.csv").unlink()
    before = load_dataset(tmp_path)
    write_captions(tmp_path, model=made("git"), max_new_tokens=3)
    after = load_dataset(tmp_path)
    for split in ("train", "test"):
        assert column(after[split], "file_name") == column(before[split], "file_name")
        assert column(after[split], "label") == column(before[split], "label")
        assert "caption" in after[split].column_names


def test_captions_of_a_parquet_file_survive_loading(tmp_path: Path) -> None:
    data = tiny_images(tmp_path, classes=("a", "b"), per_class=1)
    table = pa.table(
        {
            "image": ["a/image_00.png", "b/image_00.png"],
            "label": ["a", "b"],
            "caption": [" a tuft ", None],
        }
    )
    schema = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}).arrow_schema
    label = pa.array([0, 1], schema.field("label").type)
    table = table.set_column(1, "label", label).replace_schema_metadata(schema.metadata)
    pq.write_table(table, data / "set.parquet")
    loaded = load_dataset(data / "set.parquet")["all"]
    assert column(loaded, "caption") == ["a tuft", ""]
    assert loaded.features["caption"].dtype == "string"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"question": "Is this a SCLEROSED glomerulus?"}, "names the class 'sclerosed'"),
        ({"question": " "}, "question is empty"),
        ({"output": Path("x.txt")}, "ending in .csv or .parquet"),
        ({"batch_size": 0}, "at least 1"),
        ({"model": "no/such-model"}, "'no/such-model' is no model that transformers can load"),
    ],
)
def test_bad_requests_give_one_sentence(tmp_path: Path, options, sentence: str) -> None:
    data = tiny_images(tmp_path, per_class=1)
    with pytest.raises(GloVLMError, match=sentence) as caught:
        write_captions(data, **{"model": made("git")} | options)
    assert "\n" not in str(caught.value)
    assert "caption" not in rows(data / "metadata.csv")[0]


def test_models_that_cannot_caption_are_refused(tmp_path: Path) -> None:
    from tiny import tiny_clip

    with pytest.raises(GloVLMError, match="is a clip model, which writes no text"):
        load_captioner(tiny_clip())
    _llava(tmp_path, template=None)
    with pytest.raises(GloVLMError, match="without a chat template"):
        load_captioner(tmp_path)
