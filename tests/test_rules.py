"""Rule by surface: what may be published, what may be measured, what names somebody, whole files.

Each rule stands in one place; these tables run it over every door that must keep it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from command_line import Completed, Glovlm
from PIL import Image
from space_page import SPACE  # puts the Space's modules on the path
from tiny import tiny_clip, tiny_images
from transformers.utils.hub import PushToHubMixin

import hf_glovlm
from hf_glovlm import GloVLMConfig, GloVLMError, GloVLMModel, load_classifier, load_dataset
from hf_glovlm.backbones import BACKBONES
from hf_glovlm.cli import app
from hf_glovlm.data.splits import all_rows
from hf_glovlm.model import configuration_glovlm
from hf_glovlm.publish.licences import check_publishing
from hf_glovlm.publish.source import read_run
from hf_glovlm.publish.staging import staged
from hf_glovlm.runs import RunResult, TrainConfig, run

assert SPACE.is_dir()
REASON = "These weights are random and were made by a test."
PATIENT, SLIDE = "Zimmermann_Anneliese", "S-18-4711-PAS"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of patients, with slides of which one bears a striking name."""
    folder = tiny_images(tmp_path_factory.mktemp("Ward-Round") / "images", per_class=8)
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    rows = [f"{row},{SLIDE}_{row[-1]}" for row in rows]
    text = "\n".join([f"{header},slide_id", *rows, ""])
    (folder / "metadata.csv").write_text(text.replace("patient_0", PATIENT))
    return folder


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = run(
        TrainConfig(
            data=str(data), output_dir=str(folder), backbone=str(tiny_clip()), shots=2,
            method="lora", epochs=1, n_resamples=20,
        )
    )  # fmt: skip
    assert isinstance(made, RunResult)
    return folder


# -------------------------------------------------------------------------------------- licences

BASES: dict[str, tuple[str | None, str | None, list[str] | None]] = {
    "free": ("own-weights", "mit", []),
    "non-commercial": ("own-weights", "cc-by-nc-4.0", ["non-commercial"]),
    "gated": ("google/medsiglip-448", "health-ai-developer-foundations", []),
    "a gated folder": ("MedSigLIP-448", None, None),
    "no derivatives": ("own-weights", "cc-by-nd-4.0", ["no-derivatives"]),
    "no derivatives by name": ("own-weights", "CC-BY-NC-ND-4.0", None),
    "half of a pair": ("mahmoodlab/UNI+own-text", "cc-by-nc-nd-4.0 + mit", []),
    "unknown": ("own-weights", None, None),
}
LOCKED = [name for name in BASES if name not in ("free", "non-commercial", "unknown")]


def on_base(run_folder: Path, base: str, folder: Path) -> Path:
    """A copy of the run whose model is on another base."""
    copy = Path(shutil.copytree(run_folder, folder))
    (copy / "manifest.json").unlink(missing_ok=True)
    config = json.loads((copy / "model" / "config.json").read_text())
    keys = ("backbone_name", "backbone_license", "backbone_restrictions")
    config |= dict(zip(keys, BASES[base], strict=True))
    (copy / "model" / "config.json").write_text(json.dumps(config))
    return copy


def by_command(*arguments: object) -> Callable[[Path], str | None]:
    """A command on the run; why it refused."""

    def ask(folder: Path) -> str | None:
        words = [str(folder if word == "RUN" else word) for word in arguments]
        if "export" in words:
            words += ["--output-dir", str(folder / "out")]
        # The sentence is what the command raises first.
        return None if app.main(words) == 0 else "refused"

    return ask


def from_python(call: Callable[[Path], Any]) -> Callable[[Path], str | None]:
    def ask(folder: Path) -> str | None:
        try:
            call(folder)
        except ValueError as error:
            return str(error)
        return None

    return ask


def download(folder: Path) -> None:
    """What the Space does for its button, with the model of the run."""
    import work
    from shelf import Loaded, Settings

    model, processor, _ = load_classifier(str(folder))
    loaded = Loaded("adapted here", model.glovlm, processor, model)
    adapted = work.AdaptedModel(loaded, [], "", None, [], "a card")
    work.zip_model(adapted, folder / "downloads", Settings())


def adapt_there(folder: Path) -> None:
    """What the Space does with a former run as the base of another adaptation."""
    import work
    from shelf import Loaded, Settings
    from uploads import make_examples

    towers, processor = hf_glovlm.load_backbone(str(folder))
    support = {x: [i for i in make_examples() if i.label == x] for x in ("viable", "atubular")}
    adapted = work.adapt_classifier(Loaded("x", towers, processor, None), support, "prototype")
    work.zip_model(adapted, folder / "downloads", Settings())


def push_former(folder: Path) -> None:
    hf_glovlm.load_backbone(str(folder))[0].push_to_hub("lab/model")


def push_model(folder: Path) -> None:
    load_classifier(str(folder))[0].push_to_hub("lab/model")


def save_and_push(folder: Path) -> None:
    load_classifier(str(folder))[0].save_pretrained(folder / "saved", push_to_hub=True)


def push_towers(folder: Path) -> None:
    load_classifier(str(folder))[0].glovlm.push_to_hub("lab/model")


def push_pipeline(folder: Path) -> None:
    transformers.pipeline("image-classification", str(folder / "model")).push_to_hub("lab/model")


def train_further(folder: Path, **options: Any) -> Any:
    """A `Trainer` on the run's model, and a row to train on."""
    model, processor, _ = load_classifier(str(folder))
    pixels = processor(images=Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"][0]
    settings = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, **options,
    )  # fmt: skip
    rows: Any = [{"pixel_values": pixels, "labels": 0}]
    return transformers.Trainer(model, settings, train_dataset=rows)


def push_trainer(folder: Path) -> None:
    train_further(folder, save_strategy="no").push_to_hub()


def push_checkpoints(folder: Path) -> None:
    train_further(folder, push_to_hub=True, save_steps=1, hub_always_push=True).train()


def push_when_saved(folder: Path) -> None:
    """A `Trainer` that saves here first, which is allowed."""
    trainer = train_further(folder, push_to_hub=True, save_strategy="no")
    try:
        trainer.save_model()
    finally:
        assert (folder / "trainer" / "model.safetensors").is_file()


EXPORT = ("export", "RUN", "--reason", REASON, "--format")
PUSH = ("push", "RUN", "lab/model", "--dry-run")
DOORS: dict[str, Callable[[Path], str | None]] = {  # that let weights of the base out
    "push": by_command(*PUSH, "--reason", REASON),
    "export onnx": by_command(*EXPORT, "onnx"),
    "export int8": by_command(*EXPORT, "int8"),
    "export clip": by_command(*EXPORT, "clip"),
    "export_model": from_python(
        lambda folder: hf_glovlm.export_model(folder, folder / "out", data=None)
    ),
    "the Space": from_python(download),
    "the Space, from a former run": from_python(adapt_there),
    "push_to_hub of a former run's towers": from_python(push_former),
    "push_to_hub": from_python(push_model),
    "save and push": from_python(save_and_push),
    "push_to_hub of the towers": from_python(push_towers),
    "push_to_hub of a pipeline": from_python(push_pipeline),
    "push_to_hub of Trainer": from_python(push_trainer),
    "checkpoints of Trainer": from_python(push_checkpoints),
    "save_model of Trainer": from_python(push_when_saved),
}
WITHOUT_REASON: dict[str, Callable[[Path], str | None]] = {
    "push": by_command(*PUSH),
    "push --adapter-only": by_command(*PUSH, "--adapter-only"),
    "export onnx": by_command("export", "RUN", "--format", "onnx"),
    "export clip": by_command("export", "RUN", "--format", "clip"),
    **{name: DOORS[name] for name in ("export_model", "the Space", "push_to_hub", "save and push")},
    "push_to_hub of a pipeline": from_python(push_pipeline),
}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would leave by transformers' own ways."""
    sent: list[str] = []
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda *_, **__: sent.append("files") or ""
    )
    nowhere = SimpleNamespace(
        create_repo=lambda *_, **__: SimpleNamespace(repo_id="lab/model"),
        upload_folder=lambda *_, **__: sent.append("folder"),
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: nowhere)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: nowhere)
        monkeypatch.setattr(
            f"{module}.create_and_tag_model_card",
            lambda *_, **__: SimpleNamespace(save=lambda path: None),
        )
    return sent


# Every door with two of the bases in turn, so that every base stands before several of the doors.
@pytest.mark.parametrize(
    ("door", "base"),
    [
        pytest.param(door, base, marks=() if (i - k) % len(LOCKED) < 2 else pytest.mark.long)
        for i, door in enumerate(DOORS)
        for k, base in enumerate(LOCKED)
    ],
)
def test_no_door_lets_the_weights_of_a_locked_base_out(
    door: str, base: str, run_folder: Path, tmp_path: Path, uploads: list[str]
) -> None:
    folder = on_base(run_folder, base, tmp_path / "run")
    assert DOORS[door](folder) is not None
    assert uploads == []
    assert not (folder / "out").exists()
    assert not list(folder.rglob("*.zip"))


@pytest.mark.parametrize("base", ["unknown", "gated"])
@pytest.mark.parametrize("door", WITHOUT_REASON)
def test_without_a_reason_no_door_opens_for_an_unknown_base(
    door: str, base: str, run_folder: Path, tmp_path: Path, uploads: list[str]
) -> None:
    assert WITHOUT_REASON[door](on_base(run_folder, base, tmp_path / "run")) is not None
    assert uploads == []


@pytest.mark.parametrize("base", ["free", "non-commercial"])
@pytest.mark.parametrize("door", ["push", "the Space", "push_to_hub", "save and push"])
def test_every_door_opens_for_a_base_that_may_be_passed_on(
    door: str, base: str, run_folder: Path, tmp_path: Path, uploads: list[str]
) -> None:
    assert DOORS[door](on_base(run_folder, base, tmp_path / "run")) is None
    assert len(uploads) == ("hub" in door or "save" in door)


def test_a_model_is_always_saved_here(run_folder: Path, tmp_path: Path) -> None:
    model, *_ = load_classifier(str(on_base(run_folder, "gated", tmp_path / "run")))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_gated_base_in_the_hubs_own_cache_stays_gated(tmp_path: Path) -> None:
    place = tmp_path / "models--google--medsiglip-448" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_clip(), place)
    config = hf_glovlm.load_backbone(str(place))[0].config
    with pytest.raises(GloVLMError, match="no option overrides"):
        check_publishing(config, "full", REASON)
    assert (config.backbone_name, config.backbone_revision) == (
        *("google/medsiglip-448", "0123abcd"),
    )


INVENTED: list[tuple[Any, Any, Any]] = [
    *BASES.values(),
    *((row.name, row.license, row.restrictions) for row in BACKBONES.values()),
    *((row.hub_id, row.license, row.restrictions) for row in BACKBONES.values()),
    *((row.hub_id, None, None) for row in BACKBONES.values()),
    *((f"{row.name.upper()}+minilm", f"{row.license} + mit", None) for row in BACKBONES.values()),
    *(((row.hub_id or "").rpartition("/")[2], "mit", []) for row in BACKBONES.values()),
    (None, None, None), ("", "", []), ("a+b", "mit", []), ("a+b", "mit + not verified", []),
    ("a/b", "Not Verified", []), ("a/b", "no-derivatives-1.0", []), ("a/b", "land-1.0", []),
    ("a/b", "cc by nd", None), ("x/conch", "mit", []), ("conch-2", "mit", []), ("a", " + mit", []),
    ("a", "mit", ["no-derivatives", "non-commercial"]), ("MahmoodLab/CONCH+a", "mit + mit", []),
]  # fmt: skip


@pytest.fixture(scope="module")
def towers() -> Any:
    return hf_glovlm.load_backbone(str(tiny_clip()))[0]


def test_a_models_own_refusal_is_the_rule(towers: GloVLMModel, uploads: list[str]) -> None:
    different, before = [], towers.config
    for name, licence, restrictions in INVENTED:
        config = GloVLMConfig(
            backbone_config=before.backbone_config, backbone_name=name, backbone_license=licence,
            backbone_restrictions=restrictions,
        )  # fmt: skip
        towers.config = config
        pushed = from_python(lambda _: towers.push_to_hub("lab/model"))(Path())
        ruled = from_python(lambda _, config=config: check_publishing(config, "full"))(Path())  # type: ignore[misc]
        if (pushed is None) != (ruled is None):
            different.append((name, licence, restrictions, pushed, ruled))
    towers.config = before
    assert different == []
    assert 0 < len(uploads) < len(INVENTED)


def test_the_models_list_of_locked_bases_is_that_of_the_table() -> None:
    rows = [row for row in BACKBONES.values() if row.gated or row.no_derivatives]
    ids = [(row.hub_id or "").lower() for row in rows]
    names = {*ids, *(one.rpartition("/")[2] for one in ids), *(row.name for row in rows)}
    assert names == configuration_glovlm.LOCKED_BASES
    assert hf_glovlm.check_publishing is check_publishing


# ----------------------------------------------------------------------- what was learned from


def split_of(run_folder: Path, data: Path) -> tuple[set[str], set[str]]:
    """Patients that the model learned from, and the others."""
    hashes = set(
        json.loads((run_folder / "results.json").read_text())["data"]["support_groups_sha256"]
    )
    patients = set(all_rows(load_dataset(data))["patient_id"])
    learned = {one for one in patients if sha256(one.encode()).hexdigest() in hashes}
    assert learned
    assert patients - learned
    return learned, patients - learned


def with_masks(data: Path, folder: Path) -> Path:
    """A disc for every image."""
    down, across = np.mgrid[:40, :40]
    disc = Image.fromarray(np.uint8(255 * (np.hypot(down - 20, across - 20) < 12)))
    for path in data.rglob("*.png"):
        mask = folder / path.relative_to(data)
        mask.parent.mkdir(parents=True, exist_ok=True)
        disc.save(mask)
    return folder


def by_slide(data: Path, folder: Path) -> Path:
    """The same images, of which only the slides are known, by other names."""
    copy = Path(shutil.copytree(data, folder))
    header, *rows = (copy / "metadata.csv").read_text().splitlines()
    rows = [f"{row.rsplit(',', 2)[0]},slide {row[-1]}" for row in rows]
    (copy / "metadata.csv").write_text("\n".join([header.replace("patient_id,", ""), *rows]))
    return copy


def check_heat(glovlm: Glovlm, run_folder: Path, data: Path, masks: Path) -> Completed:
    more = ("--masks", masks, "--method", "gradient", "--json")
    return glovlm("explain-check", run_folder, "--data", data, *more)


def test_evaluate_refuses_what_was_learned_from(
    run_folder: Path, data: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    learned, others = split_of(run_folder, data)
    sentence = f"learned from {len(learned)} of the {len(learned | others)} groups"
    asked = ("evaluate", run_folder, "--data", data, "--output", tmp_path / "r.json")
    done = glovlm(*asked, "--n-resamples", 5)
    assert done.code == 2
    assert sentence in done.err
    with pytest.raises(GloVLMError, match=sentence):
        hf_glovlm.evaluate(run_folder, data)
    rows = all_rows(load_dataset(data))
    unseen = rows.select([i for i, p in enumerate(rows["patient_id"]) if p in others])
    measured = hf_glovlm.evaluate(str(run_folder), unseen, n_resamples=5)
    assert measured["kind"] == "evaluation"
    assert measured.n == len(unseen) == len(measured.predictions.labels)
    assert measured.data["groups_seen_in_training"] == 0
    assert "balanced_accuracy" in repr(measured)
    both = hf_glovlm.evaluate(run_folder, rows, allow_seen=True, n_resamples=5)
    assert both.data["groups_seen_in_training"] == len(learned)
    json.dumps(both.to_dict())


def test_heat_maps_are_measured_by_the_same_rule(
    run_folder: Path, data: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    learned, others = split_of(run_folder, data)
    sentence = f"learned from {len(learned)} of the {len(learned | others)} groups"
    masks = with_masks(data, tmp_path / "masks")
    done = check_heat(glovlm, run_folder, data, masks)
    assert done.code == 0, done.err
    rows = all_rows(load_dataset(data))
    left = sum(patient in learned for patient in rows["patient_id"])
    assert f"{left} images of groups that the model learned from" in done.err
    (measured,) = json.loads(done.out)["methods"].values()
    assert measured["groups"] == len(others)
    # The same images by slides alone are known by their pixels.
    slides = by_slide(data, tmp_path / "slides")
    done = check_heat(glovlm, run_folder, slides, masks)
    assert done.code == 0, done.err
    assert f"{left} images of groups that the model learned from" in done.err
    done = glovlm("evaluate", run_folder, "--data", slides, "--output", tmp_path / "r.json")
    assert done.code == 2
    assert sentence in done.err


def test_a_model_without_its_run_is_measured_with_a_word(
    run_folder: Path, data: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    alone = Path(shutil.copytree(run_folder / "model", tmp_path / "alone"))
    masks = with_masks(data, tmp_path / "masks")
    for done in (
        check_heat(glovlm, alone, data, masks),
        glovlm("evaluate", alone, "--data", data, "--output", tmp_path / "r.json"),
    ):
        assert done.code == 0, done.err
        assert "learned from some of these groups cannot be known" in done.err


def leaking_episodes(run_folder: Path, data: Path, file: Path, side: str) -> Path:
    """A frozen split in which an image of a tested patient is learned from, too."""
    content = json.loads((run_folder / "episodes.json").read_text())
    draw = content["draws"][0]
    rows = all_rows(load_dataset(data)).remove_columns("image")
    tested = [row["file_name"] for row in rows if row["patient_id"] in draw["test_groups"]]
    draw[side] = [*draw.get(side, []), tested[0]]
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("side", ["support", "validation", "calibration"])
@pytest.mark.parametrize("surface", ["train", "study"])
def test_a_frozen_split_that_leaks_is_refused(
    surface: str, side: str, run_folder: Path, data: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    episodes = leaking_episodes(run_folder, data, tmp_path / "frozen.json", side)
    grid = {"data": str(data), "backbone": str(tiny_clip()), "episodes": str(episodes)}
    grid |= {"n_resamples": 5, "method": "linear_probe", "output_dir": str(tmp_path / "out")}
    if surface == "study":
        grid = {k: v for k, v in grid.items() if k not in ("method", "output_dir")}
        grid |= {"methods": ["linear_probe"], "draws": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(grid))
    more = ("--output-dir", tmp_path / "out") if surface == "study" else ()
    done = glovlm(surface, "--config", tmp_path / "c.yaml", *more)
    assert done.code == 2, done
    assert f"on both the {side} and the test side" in done.err


def test_what_is_left_out_was_not_learned_from() -> None:
    from hf_glovlm.runs.evaluation import check_unlearned, measure
    from hf_glovlm.runs.provenance import hash_groups

    learned = hash_groups(["P1", "P2"])
    check_unlearned(learned, ["P3", "P4", "P4"])
    with pytest.raises(GloVLMError, match="learned from 1 of the 2 groups"):
        check_unlearned(learned, ["P3", "P2", "P2"])
    predictions: Any = SimpleNamespace(labels=[0, 1], groups=["P3", "P1"])
    with pytest.raises(GloVLMError, match="learned from 1 of the 2 groups"):
        measure(predictions, learned=learned)
    with pytest.raises(GloVLMError, match="1 of the images are the same"):
        check_unlearned({*learned, "pixels"}, ["P3"], ["pixels", "others"])


# ------------------------------------------------------------------------------------ identifiers


def test_no_text_of_a_run_that_others_read_names_somebody(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    assert PATIENT in (run_folder / "episodes.json").read_text()  # it is there to be named
    names = [PATIENT, SLIDE, "Ward-Round", str(data.parent), str(tiny_clip().parent)]
    with staged(read_run(run_folder), "lab/model", "full", REASON) as stage:
        texts = {path.name: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    for beside in ("README.md", "log.jsonl"):
        texts[f"RUN/{beside}"] = (run_folder / beside).read_bytes()
    named = [
        (file, name) for file, text in texts.items() for name in names if name.encode() in text
    ]
    assert named == []
    assert {"README.md", "results.json", "classes.yaml", "config.json"} <= set(texts)


# ----------------------------------------------------------------------------------- whole files


def predict(run_folder: Path, data: Path, out: Path) -> list[Any]:
    return ["predict", run_folder, data, "--output", out / "p.csv"]


def evaluate(run_folder: Path, data: Path, out: Path) -> list[Any]:
    asked = ("--allow-seen", "--n-resamples", 5, "--output", out / "r.json")
    return ["evaluate", run_folder, "--data", data, *asked]


def evaluate_into_parquet(run_folder: Path, data: Path, out: Path) -> list[Any]:
    return [*evaluate(run_folder, data, out), "--predictions", out / "p.parquet"]


def card(run_folder: Path, data: Path, out: Path) -> list[Any]:
    return ["card", run_folder, "--output", out / "README.md"]


def explain(run_folder: Path, data: Path, out: Path) -> list[Any]:
    return ["explain", run_folder, data / "viable" / "image_00.png", "--output-dir", out]


def train(run_folder: Path, data: Path, out: Path) -> list[Any]:
    asked = ("--backbone", tiny_clip(), "--shots", 1, "--n-resamples", 5, "--overwrite")
    return ["train", "--data", data, "--output-dir", out, *asked]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    "command", [predict, evaluate, evaluate_into_parquet, card, explain, train]
)
@pytest.mark.parametrize("again", [False, True])
def test_a_disk_that_fails_leaves_what_was_there(
    again: bool, command: Any, run_folder: Path, data: Path, tmp_path: Path, glovlm: Glovlm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    arguments = command(run_folder, data, out)
    if again:
        done = glovlm(*arguments)
        assert done.code == 0, done.err
    before = files_of(out)
    assert bool(before) == again
    replace = os.replace

    def fail(source: Any, target: Any, **more: Any) -> None:
        if Path(target).is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target, **more)

    monkeypatch.setattr(os, "replace", fail)
    try:
        done = glovlm(*arguments)
    except OSError as error:
        done = Completed(1, "", f"a crash: {error}")
    monkeypatch.setattr(os, "replace", replace)
    assert done.code == 2, done.err
    assert len(done.errors) == 1
    assert "No space left" in done.errors[0]
    assert files_of(out) == before
