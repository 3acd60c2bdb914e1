"""Texts become the ids that each published model was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hf_glovlm.backbones.conversion import vocabularies

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def clip_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours, read back from where it was saved, and open_clip's."""
    ours = vocabularies._clip(tmp_path_factory.mktemp("none"), 77)
    folder = tmp_path_factory.mktemp("clip")
    ours.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), open_clip.tokenizer._tokenizer


LONG = " ".join(f"segmental sclerosis {i}," for i in range(60))


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a glomerulus.",
        "  Two\tspaces\nand a LINE break ",
        "H&E, PAS; (40\u00d7), 0.25 \u00b5m/px, 10%!?",
        "H&amp;E &lt;b&gt; &quot;q&quot;",
        "Bowman\u2019s \u2018capsule\u2019 \u201cquoted\u201d",
        "\ufb01brosis and eff\ufb02uent",
        "it's they're we've I'd don't",
        "na\u00efve caf\u00e9 \u00c9t\u00e9 cafe\u0301",
        "\u7cf8\u7403 \U0001f52c \u03b1-smooth",
        "12345 x2y3",
        "",
        LONG,
    ],
)
def test_ids_are_open_clips(clip_tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = clip_tokenizers
    expected = theirs([text])[0]
    actual = ours([text], truncation=True)["input_ids"][0]
    assert actual == expected[: len(actual)].tolist()
    assert not expected[len(actual) :].any()
    assert actual[-1] == 49407  # a text that is cut keeps its end
    assert len(ours) == 49408


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=40))
@settings(max_examples=100)
def test_ids_of_any_text(clip_tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = clip_tokenizers
    if open_clip.tokenizer.ftfy.fix_text(text) != text or "&" in text or "\xad" in text:
        return  # what ftfy mends beyond quotes and ligatures is not followed
    assert ours(text)["input_ids"] == [49406, *theirs.encode(text), 49407]


def test_a_text_comes_back(clip_tokenizers: tuple[Any, Any]) -> None:
    ours, _ = clip_tokenizers
    ids = ours("a viable glomerulus")["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True).strip() == "a viable glomerulus"


@pytest.mark.parametrize("source", ["tokenizer.json", "merges.txt", "open_clip", "cache", ""])
def test_where_clips_vocabulary_comes_from(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, an installed open_clip, the Hub's cache; else there is none, and that is said."""
    merges = [("a", "b</w>"), ("c", "ab</w>")]
    entries = ["a", "b</w>", "c", "ab</w>", "cab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    file = json.dumps({"model": {"vocab": vocabulary, "merges": [" ".join(m) for m in merges]}})
    (tmp_path / "elsewhere.json").write_text(file)
    if source == "tokenizer.json":
        (tmp_path / source).write_text(file)
    elif source == "merges.txt":
        lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
        (tmp_path / source).write_text("\n".join(lines))
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    cached = str(tmp_path / "elsewhere.json") if source == "cache" else None
    monkeypatch.setattr(vocabularies, "try_to_load_from_cache", lambda *names: cached)
    if source != "open_clip":
        monkeypatch.setattr(vocabularies, "find_spec", lambda name: None)
    actual = vocabularies._clip_vocabulary(tmp_path)
    if source == "open_clip":
        assert actual is not None
        assert (len(actual[0]), actual[0]["<|endoftext|>"]) == (49408, 49407)
    else:
        assert actual == ((vocabulary, merges) if source else None)


def test_joined_merges_are_the_same_tokenizer(tmp_path: Path) -> None:
    ours = vocabularies._clip(tmp_path / "none", 77)
    ours.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    before = file.read_text()
    vocabularies.join_merges(tmp_path)
    assert len(file.read_text()) < len(before) / 2
    assert all(isinstance(merge, str) for merge in json.loads(file.read_text())["model"]["merges"])
    joined = Tokenizer.from_file(str(file)).to_str()
    assert json.loads(joined) == json.loads(before)  # it writes pairs again
    once = file.read_text()
    vocabularies.join_merges(tmp_path)
    assert file.read_text() == once


@pytest.mark.parametrize(
    "merges", [None, [], [["a b", "c"]], [["a", "b"], ["", "c d"]], [["#version", "b"]]]
)
def test_what_cannot_be_joined_stays(merges: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    vocabularies.join_merges(tmp_path)  # none is there
    file.write_text(json.dumps({"model": {} if merges is None else {"merges": merges}}))
    before = file.read_text()
    vocabularies.join_merges(tmp_path)
    assert file.read_text() == before


def test_a_word_list_becomes_a_tokenizer(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "renal", "cor", "##tex", "Tuft"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    ids = vocabularies._wordpiece(tmp_path, 16)("Renal cortex tuft")["input_ids"]
    assert ids == [2, 5, 6, 7, 1, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    ids = vocabularies._wordpiece(tmp_path, 16)("Renal cortex Tuft")["input_ids"]
    assert ids == [2, 1, 6, 7, 8, 3]
