"""The Space without a browser: what it takes and refuses, what it does, and its endpoints."""

import base64
import csv
import html
import io
import json
import os
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import tiny
import torch
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from test_outline_input import write_crops

import hf_glovlm
from hf_glovlm import GloVLMError
from hf_glovlm.runs import cross_validation

from space_page import SPACE, Served, serve  # isort: skip - puts the Space's modules on the path
import markup
import work
from desk import Desk, Session
from gate import MAX_JSON
from shelf import Settings, Shelf
from uploads import (
    Upload,
    check_name,
    make_examples,
    read_patients,
    read_upload,
    read_uploads,
    sweep,
    take_files,
)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(Settings())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("drawings")
    for image in make_examples():
        (folder / image.name).write_bytes(image.content)
    return sorted(folder.iterdir())


# ------------------------------------------------------------------------------------- uploads


def bomb_png(width: int, height: int) -> bytes:
    """A PNG that says it is huge; its few bytes of data would unpack to a thousand times more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(4_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(8_000_000))
    return stream.getvalue()


def png(width: int = 40, height: int = 40, colour: str = "purple") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
BAD = {
    "text.png": (b"this is not an image", "not an image"),
    "huge.png": (bomb_png(20_000, 10_000), "pixels"),
    "empty.png": (b"", "empty"),
    "bomb.zip": (bomb_zip(), "not an image"),
    "script.svg": (SVG, "not an image"),
    "large.png": (png(5000, 4000), "16,000,000"),
    "../../etc/cron.d/x.png": (png(), "plain file name"),
    "..\\x.png": (png(), "plain file name"),
    "..": (png(), "plain file name"),
    "line\nbreak.png": (png(), "plain file name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_with_a_sentence(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(GloVLMError, match=re.escape(reason)) as caught:
        read_upload(name, content)
    assert len(str(caught.value).splitlines()) == 1
    good, refused = read_uploads([(name, content), ("good.png", png())])
    assert [image.name for image in good] == ["good.png"]
    assert reason in refused[0]


def test_limits_of_number_and_name() -> None:
    some = [(f"{i}.png", png()) for i in range(4)]
    images, refused = read_uploads([*some, some[0]], limit=3)
    assert [i.name for i in images] == ["0.png", "1.png", "2.png"]
    assert len(refused) == 2
    again, refused = read_uploads([some[0], some[3]], images[:1])
    assert [i.name for i in again] == ["0.png", "3.png"]
    assert "there already" in refused[0]


def test_uploads_are_read_once_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "upload"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (folder / "a.png").write_bytes(b"content")
    entry = {"path": str(folder / "a.png"), "orig_name": "b.png"}
    assert take_files([entry]) == [("b.png", b"content")]
    assert not (folder / "a.png").exists()
    assert take_files([entry]) == [("b.png", b"content")]  # another's equal file, just read
    with pytest.raises(GloVLMError, match="upload it again"):
        take_files([{"path": str(folder / "c.png")}])
    elsewhere = SPACE / "README.md"
    for files in ([{"path": str(elsewhere)}], [{"path": f"{folder}/../../../x"}], ["a"], [{}]):
        with pytest.raises(GloVLMError, match="uploaded files"):
            take_files(files)  # type: ignore[arg-type]
    assert elsewhere.exists()


def test_what_lies_for_long_is_swept(tmp_path: Path) -> None:
    for name, age in (("old/model.zip", 700), ("new/model.zip", 0)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
        for path in (tmp_path / name, (tmp_path / name).parent):
            os.utime(path, (time.time() - age,) * 2)
    sweep(tmp_path, 600)
    assert [p.name for p in tmp_path.rglob("*.zip")] == ["model.zip"]
    assert (tmp_path / "new" / "model.zip").exists()
    sweep(tmp_path, -1)
    sweep(tmp_path, -1)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_patients() -> None:
    assert read_patients(b"\xef\xbb\xbffile_name,patient_id\na.png,P1\nb.png,\n") == {
        "a.png": "P1",
        "b.png": "",
    }
    for text, reason in (
        (b"name,patient\na,b\n", "columns"),
        (b"", "columns"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"file_name,patient_id\n../a.png,P1\n", "plain file name"),
        (b"file_name,patient_id\na.png,P1\na.png,P2\n", "two patients"),
    ):
        with pytest.raises(GloVLMError, match=reason):
            read_patients(text)
    check_name("P012_3 (copy).png")


# ---------------------------------------------------------------------------------- which model


def test_which_models_may_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, own = Settings(), Settings(folders=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)  # looks like a Hub id
    names = (
        str(tmp_path), "/etc/passwd", "..", "~/x", "owner/name", "a/../b", "plip+/etc", "../a/b",
    )  # fmt: skip
    for name in names:
        with pytest.raises(GloVLMError, match="own machine"):
            hosted.check(name)
        own.check(name)
    for name in ("mini", "someone/model", "vinid/plip", "plip"):
        hosted.check(name)
    listed = Settings(model="org/a", listed=("org/b",))
    listed.check("org/a")
    with pytest.raises(GloVLMError, match="not among them"):
        listed.check("mini")
    monkeypatch.setenv("GLOVLM_MODEL", "org/a")
    monkeypatch.setenv("GLOVLM_MODELS", "org/b, org/c")
    assert Settings.from_environment() == Settings("org/a", ("org/b", "org/c"), False)


def test_two_models_stay_and_pairs_say_why(tmp_path: Path) -> None:
    shelf = Shelf(Settings(folders=True))
    mini = shelf.get("")
    assert shelf.get("mini") is mini
    pair = shelf.get(tiny.tiny_pair())
    with pytest.raises(GloVLMError, match="never trained together"):
        pair.ask()
    assert "never trained together" in markup.show_model(pair)
    shelf.get(str(tiny.tiny_clip()))
    assert shelf.get("mini") is not mini  # the third has sent it away
    with pytest.raises(GloVLMError):
        shelf.get(str(tmp_path))


def test_what_computes_is_the_owners_choice_and_stated(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, kept = make_examples()[:2], list[Any]()
    exact = work.classify(shelf.get(""), images).answers

    def choose(towers: Any, processor: Any, **asked: Any) -> Any:
        assert (asked["precision"], asked["runtime"]) == ("auto", "torch")
        kept.append(asked["kept"])
        return replace(
            hf_glovlm.open_engine(towers, processor, precision="bf16"), measured={"a": 1}
        )

    monkeypatch.setenv("GLOVLM_PRECISION", "auto")
    monkeypatch.setattr("shelf.open_engine", choose)
    desk = Desk(replace(Settings.from_environment(), folders=True))
    foot = markup.show_engine(desk.shelf.engine)
    assert "in bf16 by torch, the fastest here" in foot
    assert "adapted here, in fp32 by torch" in foot
    answer = desk._answer(desk.shelf.get(""), images, [])
    assert answer["engine"] == {"precision": "bf16", "runtime": "torch"}
    own = work.ask_in_words(desk.shelf.get(""), {"a": ["a scar"], "b": ["an open glomerulus"]})
    assert own.engine.precision == "bf16"
    assert work.classify(own, images).answers
    for row, plain in zip(answer["answers"], exact, strict=True):
        assert row["probabilities"] != plain.probabilities
        assert row["probabilities"] == pytest.approx(plain.probabilities, abs=0.05)
    desk.shelf.get(str(tiny.tiny_clip()))
    assert kept == [None, {"precision": "bf16", "runtime": "torch", "measured": {"a": 1}}]
    assert markup.show_engine(shelf.engine).count("Images are encoded in fp32 by torch.") == 1
    monkeypatch.undo()
    with pytest.raises(GloVLMError, match="Unknown precision 'fp8'"):
        _ = Shelf(Settings(precision="fp8")).engine


# ------------------------------------------------------------------------------------- the work


def test_answers_are_those_of_the_package(shelf: Shelf) -> None:
    images, loaded = make_examples()[:6], shelf.get("")
    result = work.classify(loaded, images)
    model, processor = hf_glovlm.load_backbone("mini")
    words = {c.name: list(c.prompts) for c in hf_glovlm.load_classes(work_classes())}
    inputs = processor(
        images=[hf_glovlm.open_image({"bytes": i.content, "path": i.name}) for i in images],
        return_tensors="pt",
    )
    texts = hf_glovlm.embed_prompts(model, processor, list(words.values()))
    features = model.get_image_features(**inputs).pooler_output.detach().numpy()
    features /= (features**2).sum(1, keepdims=True) ** 0.5
    logits = model.logit_scale.exp().item() * features @ texts.T
    assert [list(words)[k] for k in logits.argmax(1)] == [a.label for a in result.answers]
    for answer in result.answers:
        assert sum(answer.probabilities.values()) == pytest.approx(1)
    page = markup.show_answers(result, images)
    assert html.escape(hf_glovlm.describe_limits(loaded.ask().config)[0]) in page
    assert markup.WARNING not in page  # which stands at the top of the page, once
    assert markup.HEADER.count(markup.WARNING) == 1
    assert markup.WARNING not in markup.read_card()


def work_classes() -> list[str]:
    from uploads import CLASSES

    return list(CLASSES)


def test_names_and_sentences_are_escaped(shelf: Shelf) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    image = read_upload(name, png())
    result = work.classify(shelf.get(""), [image])
    shown = markup.show_tray([image], [name]) + markup.show_answers(result, [image])
    assert "<img src=x" not in shown
    assert work.to_csv([{"file_name": "=cmd()"}], [], []).splitlines()[1].startswith("'=cmd()")


def answer_of(probabilities: dict[str, float], **more: Any) -> Any:
    about = {
        "file_name": "a.png", "label": max(probabilities, key=probabilities.__getitem__),
        "probabilities": probabilities, "classes": None, "answered": None, "sentence": "s",
        "support_distance": None,
    }  # fmt: skip
    return SimpleNamespace(**(about | more))


def test_bars_stand_by_size_and_the_first_is_named() -> None:
    names = [f"class_{k}" for k in range(9)]
    probabilities = dict(
        zip(names, [0.01, 0.02, 0.5, 0.03, 0.3, 0.04, 0.05, 0.02, 0.03], strict=True)
    )
    result = work.Classification([answer_of(probabilities)], "", [], [])
    page = markup.show_answers(result, make_examples()[:1])
    numbers = [float(n) for n in re.findall(r'class="n">([\d.]+)<', page)]
    assert numbers == sorted(probabilities.values(), reverse=True)
    assert re.findall(r"<dt>([^<]*) <span class=tag>most probable</span>", page) == ["class 2"]
    assert "3 further classes, each below 0.03" in page


def test_an_image_unlike_the_support_is_named_so() -> None:
    far = answer_of({"a": 0.9, "b": 0.1}, answered=False, support_distance=2.3)
    near = answer_of({"a": 0.9, "b": 0.1}, support_distance=0.4)
    result = work.Classification([far, near], "", [], [])
    page = markup.show_answers(result, make_examples()[:2])
    assert page.count("Unlike what this model learned from.") == 1
    assert "2 images classified, 1 unlike what the model learned from." in page
    assert "0.4 of the limit" in page
    assert page.count('class="bars unsure"') == 1
    rows = work.to_table(result)
    assert [row["unlike_support"] for row in rows] == ["yes", "no"]
    table = list(csv.DictReader(io.StringIO(work.to_csv(rows, [], []))))
    assert [row["answers"] for row in table] == ["no", ""]
    assert [row["support_distance"] for row in table] == ["2.3", "0.4"]
    assert "<td>yes</td><td>2.3</td>" in markup.show_batch(rows, [], [])


def test_two_models_stand_side_by_side() -> None:
    one = work.Classification([answer_of({"a": 0.9, "b": 0.1})] * 2, "", ["x", "both"], [])
    second = [answer_of({"a": 0.9, "b": 0.1}), answer_of({"a": 0.1, "b": 0.9})]
    other = work.Classification(second, "", ["both"], [])
    page = markup.show_pair(["<m>", "n"], [one, other], make_examples()[:2])
    assert "The two name the same class for 1 of 2 images." in page
    assert page.count("Both name the same class") == page.count("They name different classes") == 1
    assert page.count("both") == 1
    assert "&lt;m&gt;: x" in page


def test_patients_come_from_names_or_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    desk, session = Desk(Settings()), Session()
    chosen = [(d, f"{d.patient}_{d.label}.png") for part in support().values() for d in part]
    for place, label in enumerate(support()):
        files = [(name, d.content) for d, name in chosen if d.label == label]
        session.support[place], _ = read_uploads(files)
    (tmp_path / "t.csv").write_text(
        "file_name,patient_id\n" + "".join(f"{name},{d.patient}\n" for d, name in chosen)
    )
    table = [{"path": str(tmp_path / "t.csv"), "orig_name": "t.csv"}]
    for by_name, given, expected in (
        (False, None, "cannot be estimated"),
        (True, None, "Each of 4"),
        (False, table, "Each of 4"),
    ):
        _, _, shown, *_ = desk.adapt(
            "mini", "prototype", "ignore", by_name, given, session, *support(), *[""] * 6,
            progress=lambda *_, **__: None,
        )  # fmt: skip
        assert expected in shown
    assert session.adapted is not None
    assert session.adapted.loaded.ask().config.guard["groups"] == 4  # patients, not images


def test_own_words(shelf: Shelf) -> None:
    loaded, images = shelf.get(""), make_examples()[:3]
    prompts = work.read_words("scar: a sclerotic glomerulus | collagen\n\nopen : viable glomerulus")
    assert prompts == {"scar": [" a sclerotic glomerulus ", " collagen"], "open ": []} or prompts
    result = work.classify(work.ask_in_words(loaded, prompts), images)
    assert {a.label for a in result.answers} <= {"scar", "open"}
    assert loaded.ask().config.num_labels == 5  # the shared model is as it was
    for text, reason in (
        ("a: x", "two classes"), ("a: x\nb", "colon"), ("a: x\na: y", "twice"),
        ("a: x\nb: x", "share"), ("a: x\nb:", "has none"), ("a: x\nb: " + "y" * 2000, "1000"),
    ):  # fmt: skip
        with pytest.raises(GloVLMError, match=reason):
            work.ask_in_words(loaded, work.read_words(text))


@pytest.mark.parametrize("method", ["rollout", "gradient", "similarity", "occlusion"])
def test_heat_maps(shelf: Shelf, method: str) -> None:
    image = make_examples()[3]
    heat = work.draw_heat(shelf.get(""), image, method, "viable")
    assert heat.about["target"] == "viable"
    assert len(heat.about["values"]) == 8
    assert "data:image/jpeg" in markup.show_heat(heat)


def support() -> dict[str, list[Any]]:
    labels = ("viable", "global_sclerosis")
    return {x: [i for i in make_examples() if i.label == x] for x in labels}


def test_adapting_measures_by_patient_and_can_be_loaded(shelf: Shelf, tmp_path: Path) -> None:
    shares: list[float] = []
    loaded = shelf.get("")
    before = {k: v.clone() for k, v in loaded.towers.state_dict().items()}
    adapted = work.adapt_classifier(
        loaded, support(), "tip_adapter", on_progress=lambda p, what: shares.append(p)
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert adapted.results is not None
    assert adapted.results["n_groups"] == 4
    assert "Each of 4 patients" in adapted.estimate
    assert all((before[k] == v).all() for k, v in loaded.towers.state_dict().items())
    assert all(weight.requires_grad for weight in loaded.towers.parameters())
    result = work.classify(adapted.loaded, make_examples()[:2])
    assert result.neighbours[0][0][0] == 0  # the nearest support image of the first is itself
    assert make_examples()[0].name in markup.show_answers(
        result, make_examples()[:2], adapted.support
    )
    archive = zipfile.ZipFile(work.zip_model(adapted, tmp_path, Settings()))
    archive.extractall(tmp_path / "out")
    everything = b"".join(archive.read(n) for n in archive.namelist() if "safetensors" not in n)
    assert b"P001" not in everything
    assert b"drawing_" not in everything
    card = archive.read("model/README.md").decode()
    assert adapted.estimate in card
    assert "not for diagnosis" in card
    assert card.count("(synthetic images)") == 3
    assert yaml.safe_load(card.split("---")[1])["tags"][0] == "glomerulus"
    again = Shelf(Settings(folders=True)).get(str(tmp_path / "out" / "model"))
    repeat = work.classify(again, make_examples()[:2])
    for a, b in zip(result.answers, repeat.answers, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_a_download_names_no_patient_and_no_file(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("like P002", "as in drawing_P003_viable.png", "of 3.5.1940"):
        named = dict(zip(("viable", name), support().values(), strict=True))
        adapted = work.adapt_classifier(shelf.get(""), named, "prototype")
        with pytest.raises(GloVLMError, match="There is no download here"):
            work.zip_model(adapted, tmp_path / "downloads", Settings())
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_card_is_tagged_by_what_the_classes_are(shelf: Shelf) -> None:
    mucosa = dict(zip(("normal mucosa", "dysplasia"), support().values(), strict=False))
    card = work.adapt_classifier(shelf.get(""), mucosa, "prototype").card
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert tags == ["histopathology", "few-shot", "not-for-diagnosis", "synthetic"]


def test_without_patients_no_performance_is_estimated(shelf: Shelf) -> None:
    unknown = {
        label: [read_upload(f"{label}{i}.png", image.content) for i, image in enumerate(part)]
        for label, part in support().items()
    }
    adapted = work.adapt_classifier(shelf.get(""), unknown, "prototype")
    assert adapted.results is None
    assert "cannot be estimated from this upload: no patient ids" in adapted.estimate
    some = {image.name: "P1" for image in unknown["viable"]}
    assert "of 4 of 8" in work.adapt_classifier(shelf.get(""), unknown, "prototype", some).estimate
    one = some | {image.name: f"P{i}" for i, image in enumerate(unknown["global_sclerosis"])}
    estimate = work.adapt_classifier(shelf.get(""), unknown, "prototype", one).estimate
    assert "'viable' has 1" in estimate


def test_what_cannot_be_adapted(shelf: Shelf) -> None:
    both = support()
    for given, method, reason in (
        ({"a": both["viable"]}, "prototype", "2 to 8"),
        ({"a": both["viable"], "b": both["viable"]}, "prototype", "one class"),
        (both, "lora", "Unknown method"),
        (both, "transclip", "Unknown method"),
    ):
        with pytest.raises(GloVLMError, match=reason):
            work.adapt_classifier(shelf.get(""), given, method)
    assert {"linear_probe", "tip_adapter", "clip_adapter"} <= set(cross_validation.frozen_methods())


def test_no_derivatives_stay_on_the_machine(shelf: Shelf, tmp_path: Path) -> None:
    adapted = work.adapt_classifier(shelf.get(""), support(), "prototype")
    adapted.loaded.ask().config.backbone_restrictions = ["no-derivatives"]
    with pytest.raises(GloVLMError, match="forbids"):
        work.zip_model(adapted, tmp_path / "hosted", Settings())
    assert not (tmp_path / "hosted").exists()
    assert work.zip_model(adapted, tmp_path / "own", Settings(folders=True)).is_file()


# -------------------------------------------------------------------------------- the endpoints


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("space") / "uploads") as page:
        yield page
    assert list(page.folder.iterdir()) == []


@pytest.fixture(scope="module")
def client(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(
        served.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads"))
    )


def test_endpoints(client: Client, files: list[Path], served: Served) -> None:
    two = [handle_file(str(path)) for path in files[:2]]
    result = client.predict(two, api_name="/classify")
    assert [a["file_name"] for a in result["answers"]] == [path.name for path in files[:2]]
    assert result["limits"][-1] == "Research use only, not for diagnosis."
    assert result["engine"] == {"precision": "fp32", "runtime": "torch"}
    described = client.predict(api_name="/describe")
    assert [c["name"] for c in described["classes"]] == list(result["answers"][0]["probabilities"])
    words = {"a": ["a scar"], "b": ["an open glomerulus"]}
    assert client.predict(two, words, api_name="/own_words")["answers"][0]["label"] in words
    assert client.predict(two, "mini", "mini", api_name="/compare")["same"] == 2
    table = list(csv.DictReader(io.StringIO(client.predict(two, api_name="/batch"))))
    assert table[0]["predicted"] == result["answers"][0]["label"]
    assert table[0]["note"] == " ".join(described["limits"])
    heat = client.predict(two[0], api_name="/heat_map")
    assert heat["target"] == result["answers"][0]["label"]
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
        "/describe", "/classify", "/own_words", "/compare", "/batch", "/heat_map", "/adapt",
    }  # fmt: skip


def test_adapting_by_endpoint_leaves_no_image_behind(
    client: Client, files: list[Path], served: Served
) -> None:
    chosen = [i for part in support().values() for i in part]
    by_name = {path.name: path for path in files}
    result = client.predict(
        [handle_file(str(by_name[i.name])) for i in chosen],
        [i.label for i in chosen],
        "linear_probe",
        [i.patient for i in chosen],
        api_name="/adapt",
    )
    assert "Each of 4 patients" in result["estimate"]
    assert "model/model.safetensors" in zipfile.ZipFile(result["model"]).namelist()
    left = [path.name for path in served.folder.rglob("*") if path.is_file()]
    assert left == ["glovlm-model.zip"]  # the images were read, then deleted


@pytest.mark.parametrize("name", ["text.png", "huge.png", "empty.png", "bomb.zip", "script.svg"])
def test_endpoints_refuse_with_the_same_sentence(client: Client, name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AppError, match=reason):
        client.predict([handle_file(str(tmp_path / name))], api_name="/classify")


def test_endpoints_read_no_files_of_the_server(client: Client, served: Served) -> None:
    kept = SPACE / "README.md"
    with pytest.raises(AppError, match="uploaded files"):
        client.predict([{"path": str(kept)}], api_name="/classify")
    marked = {"path": str(kept), "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{served.url}gradio_api/call/classify", json={"data": [[marked]]})
    event = httpx.get(f"{served.url}gradio_api/call/classify/{answer.json()['event_id']}").text
    assert "event: error" in event
    assert kept.exists()
    with pytest.raises(AppError, match="Hub id"):
        client.predict("/etc/passwd", api_name="/describe")


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server of somebody else: its address, and what it was asked for."""
    asked: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_port}/one.png", asked
        other.shutdown()
    assert asked == []


ENDPOINTS = ("call/classify", "run/classify", "api/classify", "queue/join", "call/v2/classify")
JSON_TYPES = (
    "application/json", "Application/JSON", "application/JSON; charset=utf-8",
    "application/json ;charset=UTF-8",
)  # fmt: skip
OTHER_TYPES = (
    None, "", "text/plain", "application/problem+json", "application/json; charset=utf-16",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain, x/json",
)  # fmt: skip


def send(url: str, content: Any, kind: str | None = "application/json") -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(url, content=body, headers={} if kind is None else {"content-type": kind})


def marked(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def asking(endpoint: str, file: Any) -> dict[str, Any]:
    if "v2" in endpoint:
        return {"files": [file]}
    return {"data": [[file]], "session_hash": "s", "fn_index": 0}


def test_nothing_is_fetched_from_other_servers(
    served: Served, elsewhere: tuple[str, list[str]]
) -> None:
    """Gradio would download a file that is named by its URL; here somebody listens for that."""
    url, _ = elsewhere
    for endpoint, kind in product(ENDPOINTS, JSON_TYPES):
        sent = asking(endpoint, marked(url))
        answer = send(f"{served.url}gradio_api/{endpoint}", sent, kind)
        assert answer.status_code == 400, (endpoint, kind)
        assert "upload the file" in answer.json()["detail"]
    large = b'{"data": ["' + b"x" * MAX_JSON + b'"]}'
    answer = send(f"{served.url}gradio_api/call/describe", large)
    assert answer.status_code == 413


def test_every_way_to_write_a_url_is_refused(
    served: Served, elsewhere: tuple[str, list[str]]
) -> None:
    url, _ = elsewhere
    upload = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", png())})
    (place,) = upload.json()
    other = url.removeprefix("http:")
    files: list[Any] = [
        url, f" {url}", url.upper(), f"\t{url}", f"ht\ntp:{other}", f"https:{other}", other,
        url.replace("http", "%68ttp"), "file:///etc/hostname", "FTP://127.0.0.1/x",
        "data:image/png;base64,AAAA", marked(f" {url}"), marked(url.upper()), marked(other),
        marked("file:///etc/hostname"), marked("data:image/png;base64,AAAA"), marked("one.png"),
        marked(place, url=url), marked(place, url=f"{url}?/gradio_api/file=x"), {"url": url},
        {"image": {"deep": [marked(url)]}}, {url: 1},
    ]  # fmt: skip
    for file in files:
        answer = send(f"{served.url}gradio_api/call/classify", {"data": [[file]]})
        assert (answer.status_code, file) == (400, file)
    own = f"{served.url}gradio_api/file={place}"
    sent = {"data": [[marked(place, url=own)], "", None]}
    answer = send(f"{served.url}gradio_api/call/classify", sent)
    assert answer.status_code == 200
    event = httpx.get(
        f"{served.url}gradio_api/call/classify/{answer.json()['event_id']}", timeout=60
    )
    assert "event: error" not in event.text
    assert not Path(place).exists()
    for path in (url, quote(url, safe=""), f" {url}", "/etc/hostname", "../../etc/hostname"):
        for route in ("file=", "proxy=", "file/"):
            answer = httpx.get(f"{served.url}gradio_api/{route}{path}")
            assert answer.status_code in (403, 404), (route, path)
    assert httpx.get(f"{served.url}?image={quote(url)}").status_code == 400


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_body_of_another_kind_is_refused(served: Served, kind: str | None) -> None:
    for endpoint in ("call/describe", "queue/join"):
        answer = send(f"{served.url}gradio_api/{endpoint}", {"data": [""]}, kind)
        assert answer.status_code == 415


def test_what_the_page_does_not_know_is_refused(served: Served) -> None:
    url = f"{served.url}gradio_api/"
    for route in (
        "component_server", "process_recording", "vibe-edit", "vibe-code", "stream/x", "login",
        "run-history/connect", "profiling/clear", "call/describe/x/y", "queue/join/x",
    ):  # fmt: skip
        answer = send(f"{url}{route}", {"data": [""]})
        assert answer.status_code == 404, route
        assert "knows no such request" in answer.json()["detail"]
    for method in ("PUT", "DELETE", "PATCH"):
        assert httpx.request(method, f"{url}call/describe").status_code == 405
    for body in (b"[]", b"1", b"{", b"\xff\xfe", b'{"data": {}}', b"{}", b'{"data": [], "x": 1}'):
        assert send(f"{url}call/describe", body).status_code == 400, body
    assert send(f"{url}upload", {"data": []}).status_code == 415


def test_a_name_that_leads_elsewhere_and_a_file_that_is_too_large(served: Served) -> None:
    url, folder = served.url, served.folder
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("../../evil.png", png())})
    (place,) = answer.json()
    assert Path(place).resolve().is_relative_to(folder.resolve())
    Path(place).unlink()
    with pytest.raises(GloVLMError, match="plain file name"):
        read_upload("../../evil.png", png())
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(21 * 2**20))})
    assert answer.status_code == 413


def test_the_page_asks_nothing_of_other_servers(served: Served) -> None:
    config = httpx.get(f"{served.url}config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert config["max_file_size"] == 20 * 2**20
    css = httpx.get(f"{served.url}theme.css").text
    assert set(re.findall(r"https?://[^/'\")]+", css)) <= {"http://www.w3.org"}  # a name space


def test_a_session_that_nobody_uses_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which importing the page sets
    import app

    now = datetime.now()
    holder = SimpleNamespace(
        session_data={"old": 1, "new": 2},
        time_last_used={"old": now - timedelta(hours=1), "new": now},
    )
    app.forget(SimpleNamespace(state_holder=holder), 1800)  # type: ignore[arg-type]
    assert list(holder.session_data) == list(holder.time_last_used) == ["new"]


# ---------------------------------------------------------------------------------- its README


def test_the_readme_configures_the_space_and_its_example_runs(
    served: Served, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio
    from huggingface_hub import SpaceCardData
    from huggingface_hub.repocard import RepoCard

    text = (SPACE / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert isinstance(SpaceCardData(**front), SpaceCardData)
    assert RepoCard(text).data.license == "apache-2.0"
    assert front["sdk_version"] == gradio.__version__
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    assert "not for diagnosis" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "glomerulus.png").write_bytes(files[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:7860", served.url), {})


@pytest.mark.long
def test_a_few_clients_at_once(served: Served, files: list[Path]) -> None:
    from space_load import press

    report = press(served.url, files[0], clients=4, seconds=1.0)
    assert report["errors"] == []
    assert report["answers"] >= 4


# ------------------------------------------------------------------------------------- outlines


def outlined_uploads(folder: Path, structure: str = "tuft") -> dict[str, list[Upload]]:
    support: dict[str, list[Upload]] = {}
    for path in sorted(write_crops(folder, structure).glob("*/*.png")):
        image = read_upload(f"{path.parent.name}_{path.name}", path.read_bytes())
        support.setdefault(path.parent.name, []).append(replace(image, patient=f"P{path.stem}"))
    return support


def test_an_outline_goes_through_the_page(shelf: Shelf, tmp_path: Path) -> None:
    support = outlined_uploads(tmp_path)
    first = support["pale"][0]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(first.thumbnail.split(",")[1])))
    path = tmp_path / "pale" / "0.png"
    whole = np.asarray(hf_glovlm.open_image(path), float)
    inside = np.asarray(Image.open(path).getchannel("A")) > 0
    shown = np.asarray(thumbnail, float)
    # Nothing of the picture is hidden: paler outside, but not blank.
    assert abs(shown[inside].mean() - whole[inside].mean()) < 5
    assert shown[~inside].mean() > whole[~inside].mean() + 20
    assert shown[~inside].std() > 10
    assert "8 images, 8 with an outline" in markup.show_tray(
        [i for p in support.values() for i in p]
    )
    adapted = work.adapt_classifier(shelf.get(""), support, "linear_probe", outline="blank+pool")
    model, processor = adapted.loaded.ask(), adapted.loaded.processor
    assert (model.config.outline, processor.outline) == ("blank+pool", "blank+pool")
    assert adapted.results is not None  # left out one patient at a time, inside of the outlines too
    hidden = "crescents, adhesions, ischaemia"
    assert hidden in adapted.card
    assert any(hidden in note for note in adapted.notes)
    assert hidden in markup.show_model(adapted.loaded)
    assert "inside of the outline" in markup.show_model(adapted.loaded)
    images = support["pale"] + support["dark"]
    answers = work.classify(adapted.loaded, images)
    pictures = [hf_glovlm.open_outlined({"bytes": i.content, "path": i.name}) for i in images]
    with torch.no_grad():
        expected = model(**processor(images=pictures, return_tensors="pt")).logits.softmax(-1)
    actual = [list(answer.probabilities.values()) for answer in answers.answers]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert not any("have no outline" in sentence for sentence in answers.limits)
    whole = work.classify(shelf.get(""), [images[0], make_examples()[0]])
    assert whole.limits[0].startswith("1 of 2 images have an outline, which has no part here")
    bare = work.classify(adapted.loaded, [read_upload("bare.png", png()), *images[:1]])
    assert bare.limits[0].startswith("1 of 2 images have no outline")
    heat = work.draw_heat(adapted.loaded, first, "occlusion")
    assert any("the outline is taken for the glomerulus" in text for text in heat.sentences)


def test_an_outline_that_is_needed_is_asked_for(shelf: Shelf, tmp_path: Path) -> None:
    support = outlined_uploads(tmp_path)
    support["pale"][0] = read_upload("bare.png", png())
    with pytest.raises(GloVLMError, match=r"needs the outline .* 1 of 8 have none"):
        work.adapt_classifier(shelf.get(""), support, "prototype", outline="blank+pool")
    centred = work.adapt_classifier(shelf.get(""), support, "prototype", outline="centre")
    assert "a circle in the middle" in markup.show_model(centred.loaded)
    with pytest.raises(GloVLMError, match="outline"):
        work.adapt_classifier(shelf.get(""), support, "prototype", outline="inside")
