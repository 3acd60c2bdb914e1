"""What leaves with a run: no identifier of its data in any spelling, no file from elsewhere."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file
from tiny import tiny_clip, tiny_images

import hf_glovlm
from hf_glovlm import GloVLMError, push
from hf_glovlm.publish import upload
from hf_glovlm.publish.plain_clip import export_clip
from hf_glovlm.runs import TrainConfig, run

REASON = "These weights are random and were made by a test."
PATIENTS = ("483905", "7", "P1", "Zimmermann_Anneliese")
SLIDE, READER = "HB-4711-PAS", "Dr. Huber"
MODEL = Path(hf_glovlm.__file__).parent / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of patients with long and short names, in files that bear the slide's."""
    data = tiny_images(tmp_path_factory.mktemp("data") / "images", per_class=8)
    header, *rows = (data / "metadata.csv").read_text().splitlines()
    lines = [f"{header},slide_id,reader"]
    for row in rows:
        file, label, patient = row.split(",")
        named = file.replace("image_", "hb4711-tile-")
        (data / file).rename(data / named)
        slide = SLIDE if patient[-1] == "0" else f"s{patient[-1]}"
        lines.append(f"{named},{label},{PATIENTS[int(patient[-1])]},{slide},{READER}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(
        TrainConfig(
            data=str(data), output_dir=str(folder), backbone=str(tiny_clip()), shots=1,
            method="lora", epochs=1, n_resamples=5,
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The run, of which no checksum is kept: what others send."""
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    (folder / "manifest.json").unlink()
    return folder


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text("utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def with_prompt(folder: Path, text: str) -> None:
    """A class whose prompt a person wrote."""
    change(folder / "model/config.json", lambda c: c["prompts"][0].append(text))
    change(folder / "results.json", lambda c: c["data"]["classes"][0]["prompts"].append(text))


def leave(folder: Path, repo_id: str = "lab/model", reason: str = REASON) -> dict[str, bytes]:
    """All that a push would send."""
    with upload.staged(upload.read_run(folder), repo_id, "full", reason) as stage:
        files = (path for path in stage.rglob("*") if path.is_file())
        return {path.relative_to(stage).as_posix(): path.read_bytes() for path in files}


def refuse(folder: Path, match: str, **more: Any) -> None:
    asked = {"repo_id": "lab/model", "reason": REASON, **more}
    with pytest.raises(GloVLMError, match=match) as raised:
        push(folder, asked.pop("repo_id"), dry_run=True, **asked)
    assert "\n" not in str(raised.value)


NAMED = [
    "patient 483905 has", "seen_in_483905_too", "Pat483905x", "0483905", "see %34%383905",
    "see &#52;83905", "zimmermann, ANNELIESE", "ZimmermannAnneliese",
    "Zimmermann\u200b Annelie\u00adse",
    unicodedata.normalize("NFD", "as Zímmermann_Anneliese"), "as in P1", "as in p-01", "patient 7",
    "case no. 7", "as 7 showed", "in HB 4711 PAS", "hb4711-tile-00.png", "as dr. huber reads it",
]  # fmt: skip
SHAPED = [
    "a TCGA-B0-4710-01Z tile", "of 3.5.1940", "on 1940-05-03", "in S-19-0815", "in H2019/12345",
    "see /mnt/scans/list", r"see C:\scans\list", "see file:///scans/list", "MRN 00123456",
]  # fmt: skip
HARMLESS = [
    "grade 7 sclerosis", "a tuft at 7x", "0.7 of the tuft", "P12 on top", "a photo of a glomerulus",
    "class 7", "70% of the tuft", "a PAS-stained image, 20x", "H&E and/or silver", "in 1940",
    "Gleason pattern 3+7", "from 2019-2021",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMED)
def test_a_prompt_that_names_somebody_in_any_spelling_is_refused(text: str, copy: Path) -> None:
    with_prompt(copy, text)
    refuse(copy, r"config\.json names .* in 'prompts\.0.*(Rename|rename)")


@pytest.mark.parametrize("text", SHAPED)
def test_a_prompt_that_looks_like_a_case_or_a_place_is_refused(text: str, copy: Path) -> None:
    with_prompt(copy, text)
    refuse(copy, "looks like (a|an) (path|date|TCGA|accession|record)")


def test_a_short_identifier_is_a_word_of_its_own_and_no_grade(copy: Path) -> None:
    for text in HARMLESS:
        with_prompt(copy, text)
    files = leave(copy)
    assert all(text in json.loads(files["config.json"])["prompts"][0] for text in HARMLESS)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def with_weights(folder: Path, **metadata: str) -> None:
    file = folder / "model/model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", **metadata})


PLACES: dict[str, Callable[[Path], None]] = {
    "a key of config.json": lambda f: change(
        f / "model/config.json", lambda c: c.update({"of 483905": 1})
    ),
    "a column of config.json": lambda f: change(
        f / "model/config.json", lambda c: c.update({"patient_id": 7})
    ),
    "a class": lambda f: change(
        f / "model/config.json", lambda c: c["id2label"].update({"0": "like 483905"})
    ),
    "a display name": lambda f: change(
        f / "results.json", lambda c: c["data"]["classes"][0].update({"display_name": "P1"})
    ),
    "a special token": lambda f: change(
        f / "model/tokenizer_config.json", lambda c: c.update({"extra": ["<483905>"]})
    ),
    "the vocabulary": lambda f: change(
        f / "model/tokenizer.json", lambda c: c["model"]["vocab"].update({"483905</w>": 10**6})
    ),
    "an older vocabulary": lambda f: write(f / "model/vocab.txt", "a\n483905\nb\n"),
    "the metadata of the weights": lambda f: with_weights(f, note="of 483905"),
    "a figure": lambda f: write(f / "figures/reliability.svg", "<svg><text>483905</text></svg>"),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_what_leaves_names_somebody(place: str, copy: Path) -> None:
    PLACES[place](copy)
    refuse(copy, "Nothing was published: ")


def test_what_a_person_adds_to_the_command_is_searched(copy: Path) -> None:
    refuse(copy, "483905", repo_id="lab/of-483905")
    refuse(copy, "'7'", reason="The authors agreed, as case 7 is theirs and they know of it.")


def test_sentences_and_names_of_the_results_are_dropped(copy: Path) -> None:
    def edit(content: Any) -> None:
        content["notes"] += [
            "483905 is odd.",
            "Of patient 7.",
            "Well, 7 of 9.",
            "See TCGA-B0-4710.",
        ]
        content["data"]["name"] = content["config"]["data"] = "biopsies of P1"

    change(copy / "results.json", edit)
    files = leave(copy)
    for name in ("results.json", "README.md"):
        text = files[name].decode()
        assert "Well, 7 of 9." in text
        assert [word for word in ("483905", "patient 7", "4710", "of P1") if word in text] == []


def test_exports_name_nobody_either(copy: Path, tmp_path: Path) -> None:
    def edit(content: Any) -> None:
        content["id2label"]["0"] = name = "like 483905"
        content["label2id"] = {v: int(k) for k, v in content["id2label"].items()}
        assert name in content["label2id"]

    change(copy / "model/config.json", edit)
    for export in (
        lambda: export_clip(copy, tmp_path / "out", reason=REASON),
        lambda: hf_glovlm.export_model(copy, tmp_path / "out", reason=REASON),
    ):
        with pytest.raises(GloVLMError, match="483905"):
            export()
        assert not (tmp_path / "out").exists()


def test_without_its_lists_a_run_is_not_published(copy: Path) -> None:
    with_prompt(copy, "as in P1")
    for name in ("predictions.parquet", "episodes.json"):
        (copy / name).unlink()
    refuse(copy, "names 'P1'")  # the run keeps a list of its own
    (copy / "identifiers.json").unlink(missing_ok=True)
    refuse(copy, "no longer holds predictions.parquet and episodes.json")


# ------------------------------------------------------------------------------- which files leave


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def elsewhere(folder: Path, name: str, text: str) -> Path:
    file = folder.parent / name
    file.write_text(text)
    return file


def linked_vocabulary(folder: Path) -> None:
    link(folder / "model/merges.txt", elsewhere(folder, "secret", "#version: 0.2\na b\n"))


def linked_figure(folder: Path) -> None:
    link(folder / "figures/reliability.svg", elsewhere(folder, "secret", "<svg></svg>"))


def linked_model(folder: Path) -> None:
    (folder / "model").rename(folder.parent / "elsewhere")
    link(folder / "model", folder.parent / "elsewhere")


def linked_results(folder: Path) -> None:
    (folder / "results.json").rename(folder.parent / "other.json")
    link(folder / "results.json", folder.parent / "other.json")


def code_from_elsewhere(folder: Path) -> None:
    secret = elsewhere(folder, "secret.py", "password = 'x'\n")
    place = str(secret.with_suffix(""))
    change(folder / "model/config.json", lambda c: c["auto_map"].update(AutoModel=f"{place}.Model"))


def code_of_others(folder: Path) -> None:
    (folder / "model/mine.py").write_text("print('run by whoever loads it')\n")
    change(folder / "model/config.json", lambda c: c["auto_map"].update(AutoModel="mine.Model"))


def weights_from_elsewhere(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "put",
    [
        linked_vocabulary, linked_figure, linked_model, linked_results, code_from_elsewhere,
        code_of_others, weights_from_elsewhere,
    ],
)  # fmt: skip
def test_only_regular_files_of_the_run_and_code_of_the_package_leave(
    put: Callable[[Path], None], copy: Path
) -> None:
    put(copy)
    refuse(copy, "a link, a pipe|none of this package|to name files beside it")


@pytest.mark.parametrize("name", ["heads.py", "config.json", "tokenizer_config.json"])
def test_what_has_changed_since_it_was_saved_is_refused(
    name: str, made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    assert push(folder, "lab/model", dry_run=True, reason=REASON).files
    with (folder / "model" / name).open("a") as stream:
        stream.write("\n")
    refuse(folder, f"{name}' has changed since it was written")


def test_the_code_that_leaves_is_the_packages_own(copy: Path) -> None:
    (copy / "model/heads.py").write_text("print('run by whoever loads it')\n")
    report = push(copy, "lab/model", dry_run=True, reason=REASON)
    assert any("heads.py" in sentence for sentence in report.left_out)
    files = leave(copy)
    names = {name for name in files if name.endswith(".py")}
    assert names >= {"modeling_glovlm.py", "heads.py", "configuration_glovlm.py"}
    assert all(files[name] == (MODEL / name).read_bytes() for name in names)


def test_a_figure_leaves_as_pixels_alone(copy: Path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Title", "483905")
    (copy / "figures").mkdir()
    Image.new("RGB", (8, 8), "red").save(copy / "figures/reliability.png", pnginfo=about)
    assert b"483905" not in leave(copy)["figures/reliability.png"]


def test_a_pipe_is_no_file(copy: Path) -> None:
    (copy / "model/vocab.txt").unlink(missing_ok=True)
    os.mkfifo(copy / "model/vocab.txt")
    refuse(copy, "a pipe")
