"""Publishing with the real client against a loopback Hub: what leaves, what does not, and back."""

import base64
import errno
import json
import shutil
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from fresh_process import run_without_the_package
from hub_server import TOKEN, Fault, Hub, Repository, serve
from PIL import Image
from safetensors import safe_open
from tiny import CLASSES, tiny_bert, tiny_clip, tiny_dinov2, tiny_images
from tolerance import assert_same_numbers
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor

from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import load_classifier
from hf_glovlm.publish.adapter_only import load_model, load_published
from hf_glovlm.publish.plain_clip import export_clip
from hf_glovlm.publish.upload import PushReport, push
from hf_glovlm.runs import run
from hf_glovlm.runs.config import TrainConfig

CLIP = "openai/clip-vit-base-patch32"
PAIR = "facebook/dinov2-small+sentence-transformers/all-MiniLM-L6-v2"
REASON = "The authors agreed in writing that heads may be shared."
PATIENTS = [f"Zimmermann-Anneliese-19{40 + i}" for i in range(4)]
FOLDER = "Station-7B-Biopsies"

SCRIPT = """
import json, sys

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline

name, revision, file = sys.argv[1:]
trusted = {"trust_remote_code": True, "revision": revision}
processor = AutoProcessor.from_pretrained(name, **trusted)
classifier = AutoModelForImageClassification.from_pretrained(name, **trusted).eval()
model = AutoModel.from_pretrained(name, **trusted).eval()
inputs = processor(images=Image.open(file), return_tensors="pt")
with torch.no_grad():
    logits = classifier(**inputs).logits[0]
    features = model.get_image_features(**inputs).pooler_output[0]
classify = pipeline("image-classification", model=name, **trusted)
scores = {row["label"]: row["score"] for row in classify(file, top_k=3)}
print(json.dumps({"logits": logits.tolist(), "features": features.tolist(), "scores": scores}))
"""


# ------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    vision, text = PAIR.split("+")
    with serve(Hub({CLIP: tiny_clip(), vision: tiny_dinov2(), text: tiny_bert()})) as served:
        with pytest.MonkeyPatch.context() as patch:
            constants = huggingface_hub.constants
            patch.setattr(constants, "ENDPOINT", served.url)
            patch.setattr(
                constants,
                "HUGGINGFACE_CO_URL_TEMPLATE",
                served.url + "/{repo_id}/resolve/{revision}/{filename}",
            )
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
            # transformers keeps a client of its own, with the endpoint of its first use
            patch.setattr(transformers.utils.hub, "_hf_api", None)
            huggingface_hub.utils.disable_progress_bars()
            yield served
            huggingface_hub.utils.enable_progress_bars()
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Nobody sleeps; how long one would have is kept."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    served = request.getfixturevalue("hub") if "hub" in request.fixturenames else None
    if served is not None:
        _forget(served)
    yield waited
    if served is not None:
        _forget(served)  # runs may be made after this test, and no fault of it may hit them


def _forget(served: Hub) -> None:
    for kept in (served.repositories, served.blobs, served.faults, served.sent):
        kept.clear()
    served.requests.clear()
    served.chunk = None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose patients, files and folder have striking names."""
    folder = tiny_images(tmp_path_factory.mktemp("data") / FOLDER)
    lines = (folder / "metadata.csv").read_text().splitlines()
    rows = []
    for line in lines[1:]:
        file, label, patient = line.split(",")
        person = PATIENTS[int(patient[-1])]
        new = f"{label}/{person}-{Path(file).stem}-case-4711.png"
        (folder / file).rename(folder / new)
        rows.append(f"{new},{label},{person}")
    (folder / "metadata.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(hub: Hub, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real runs on bases that were loaded from the Hub, and one from a folder."""
    root = tmp_path_factory.mktemp("Ward-Round-Results")
    made = {
        "lora": (CLIP, "lora", {"epochs": 2, "lr": 1e-2}),
        "probe": (
            PAIR,
            "linear_probe",
            {"calibration_groups": 1, "conformal": "lac", "alpha": 0.4},
        ),
        "vanilla": (CLIP, "vanilla", {"epochs": 1}),
        "vpt": (CLIP, "vpt", {"epochs": 1}),
        "local": (str(tiny_clip()), "lora", {"epochs": 1}),
        "pair": (PAIR, "lora", {"epochs": 1}),
    }
    for name, (backbone, method, more) in made.items():
        run(
            TrainConfig(
                data=str(data),
                output_dir=str(root / name),
                backbone=backbone,
                method=method,
                shots=1,
                n_resamples=20,
                **more,
            )
        )
    return {name: root / name for name in made}


@pytest.fixture(scope="module")
def picture(data: Path) -> Path:
    return next(data.glob("viable/*.png"))


def _push(runs: dict[str, Path], name: str, repo_id: str = "lab/model", **kw: Any) -> PushReport:
    return push(runs[name], repo_id, token=TOKEN, **{"reason": REASON, **kw})


def _logits(folder: Path | str, picture: Path) -> torch.Tensor:
    classifier, processor, _ = load_classifier(str(folder))
    return _answer(classifier, processor, picture)


def _answer(classifier: Any, processor: Any, picture: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = classifier(
            **processor(images=Image.open(picture), return_tensors="pt")
        ).logits[0]
    return logits


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


# ----------------------------------------------------------------------------------- what leaves


def test_a_dry_run_lists_exactly_what_leaves(hub: Hub, runs: dict[str, Path]) -> None:
    before = _contents(runs["lora"])
    sentences: list[str] = []
    planned = _push(runs, "lora", dry_run=True)
    assert not hub.requests
    assert planned.commit is None
    report = _push(runs, "lora", on_progress=sentences.append)
    repository = hub.repositories["lab/model"]
    there = {k: len(v) for k, v in repository.files().items() if k != ".gitattributes"}
    assert planned.files == report.files == there
    assert len(repository.commits) == 2  # the Hub's own, and ours
    assert report.commit == repository.branches["main"]
    assert report.commit_url == f"{hub.url}/lab/model/commit/{report.commit}"
    assert report.url == f"{hub.url}/lab/model"
    assert {"predictions.parquet stays here.", "episodes.json stays here."} <= set(report.left_out)
    assert any("Sending" in sentence for sentence in sentences)
    assert _contents(runs["lora"]) == before
    _push(runs, "lora")
    assert len(repository.commits) == 2  # nothing new, no commit


def _secrets(runs: dict[str, Path], data: Path) -> list[bytes]:
    files = [path.name for path in data.rglob("*.png")]
    places = [str(data), str(data.parent), str(runs["lora"].parent), str(Path.home()) + "/"]
    hashes = [sha256(patient.encode()).hexdigest() for patient in PATIENTS]
    pieces = ["Zimmermann", "Anneliese", "case-4711", "Ward-Round"]
    named = [*PATIENTS, *files, *(Path(f).stem for f in files), *places, *hashes, *pieces]
    return [name.lower().encode() for name in named]


@pytest.mark.parametrize(
    ("name", "adapter_only"),
    [("lora", False), ("lora", True), ("probe", False), ("probe", True), ("local", False)],
)
def test_nothing_that_leaves_names_a_person_a_file_or_a_place(
    name: str, adapter_only: bool, hub: Hub, runs: dict[str, Path], data: Path
) -> None:
    results = json.loads((runs[name] / "results.json").read_text())
    assert results["data"]["support_groups_sha256"]  # what must not leave is there
    report = _push(runs, name, adapter_only=adapter_only)
    bodies = [body for _, _, body in hub.sent]
    for body in list(bodies):
        for line in body.splitlines():
            if line.startswith(b'{"key": "file"'):
                bodies.append(base64.b64decode(json.loads(line)["value"]["content"]))
    bodies += [*hub.blobs.values(), *hub.repositories["lab/model"].files().values()]
    bodies += [path.encode() for _, path, _ in hub.requests]
    assert len(bodies) > len(report.files)
    for secret in _secrets(runs, data):
        assert not [body for body in bodies if secret in body.lower()], secret
    weights = [n for n in report.files if n.endswith(".safetensors")]
    for file in weights:
        (data.parent / "weights").write_bytes(hub.repositories["lab/model"].files()[file])
        with safe_open(data.parent / "weights", "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_sentence_that_names_a_patient_stays_here(
    hub: Hub, runs: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs["probe"], tmp_path / "run"))
    results = json.loads((copy / "results.json").read_text())
    results["notes"] += [f"{PATIENTS[0]} is odd.", "See /mnt/scans/2024/list.txt.", "All is well."]
    results["surprise"] = PATIENTS[1]
    results["config"]["tracker_of_tomorrow"] = PATIENTS[2]
    (copy / "results.json").write_text(json.dumps(results))
    report = push(copy, "lab/model", token=TOKEN, reason=REASON)
    files = hub.repositories["lab/model"].files()
    assert "2 texts of results.json stay here" in " ".join(report.left_out)
    assert b"All is well." in files["README.md"]
    assert b"All is well." in files["results.json"]
    assert b"Zimmermann" not in files["README.md"] + files["results.json"]
    assert b"/mnt/scans" not in files["README.md"] + files["results.json"]


def test_a_prompt_that_names_a_patient_is_refused(
    hub: Hub, runs: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs["probe"], tmp_path / "run"))
    config = json.loads((copy / "model" / "config.json").read_text())
    config["prompts"][0] = [f"like that of {PATIENTS[3]}"]
    (copy / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GloVLMError, match=r"config\.json names .Zimmermann"):
        push(copy, "lab/model", token=TOKEN, reason=REASON)
    assert not hub.requests


def test_figures_leave_by_name(hub: Hub, runs: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs["probe"], tmp_path / "run"))
    (copy / "figures").mkdir()
    (copy / "figures" / "reliability.svg").write_text("<svg><path/></svg>")
    (copy / "figures" / "heat_map_01.png").write_bytes(b"an image of somebody")
    (copy / "model" / "notes.py").write_text("# mine")
    (copy / "model" / "scan.png").write_bytes(b"an image")
    report = push(copy, "lab/model", dry_run=True, reason=REASON)
    assert "figures/reliability.svg" in report.files
    assert not {"notes.py", "scan.png", "figures/heat_map_01.png"} & set(report.files)
    assert any("heat_map_01" in sentence for sentence in report.left_out)
    (copy / "figures" / "reliability.svg").write_text("<svg><image href='data:'/></svg>")
    with pytest.raises(GloVLMError, match="holds an image"):
        push(copy, "lab/model", dry_run=True, reason=REASON)


def test_the_card_says_what_is_inherited_and_how_to_load_it(
    hub: Hub,
    runs: dict[str, Path],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _push(runs, "probe", adapter_only=True)
    card = hub.repositories["lab/model"].files()["README.md"].decode()
    about = huggingface_hub.ModelCard(card).data
    assert about.base_model == PAIR.split("+")
    assert about.base_model_relation == "adapter"
    assert REASON in card
    assert "RUN/model" not in card
    assert 'load_published("lab/model")' in card
    assert "Research use only" in card
    shutil.copyfile(picture, tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(card.partition("## How to use")[2].split("```")[1].removeprefix("python"), namespace)
    assert_same_numbers(namespace["logits"][0], _logits(runs["probe"], picture))


# ------------------------------------------------------------------------------------- and back


def test_loaded_by_id_without_the_package_then_offline(
    hub: Hub, runs: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    report = _push(runs, "lora", "lab/merged")
    assert report.commit is not None
    hub.repositories["lab/merged"].commit("main", {}, "later, all is gone")  # the pin holds
    arguments = ("lab/merged", report.commit, picture)
    load = partial(run_without_the_package, SCRIPT, *arguments, home=tmp_path)
    online = load(HF_ENDPOINT=hub.url)
    offline = load(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    for name in ("logits", "features"):
        assert_same_numbers(offline[name], online[name])
    assert offline["scores"] == pytest.approx(online["scores"], abs=1e-5)
    logits = _logits(runs["lora"], picture)
    assert_same_numbers(online["logits"], logits)
    scores = [online["scores"][name] for name in CLASSES]
    torch.testing.assert_close(torch.tensor(scores), logits.softmax(-1), rtol=0, atol=1e-5)
    with_package = AutoModel.from_pretrained("lab/merged", revision=report.commit).eval()
    processor = AutoProcessor.from_pretrained("lab/merged", revision=report.commit)
    inputs = processor(images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        features = with_package.get_image_features(**inputs).pooler_output[0]
    assert_same_numbers(online["features"], features)


def test_loaded_by_id_with_the_package(hub: Hub, runs: dict[str, Path], picture: Path) -> None:
    _push(runs, "probe", "lab/probe")
    expected = _logits(runs["probe"], picture)
    assert_same_numbers(_logits("lab/probe", picture), expected)
    assert_same_numbers(_answer(*load_published("lab/probe"), picture), expected)
    classifier = AutoModelForImageClassification.from_pretrained("lab/probe").eval()
    processor = AutoProcessor.from_pretrained("lab/probe")
    assert_same_numbers(_answer(classifier, processor, picture), expected)


def test_an_adapter_alone(hub: Hub, runs: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    report = _push(runs, "lora", "lab/adapter", adapter_only=True)
    assert report.what == "adapter"
    assert set(report.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "classes.yaml",
        "glovlm.json", "head.safetensors", "results.json",
    }  # fmt: skip
    about = json.loads(hub.repositories["lab/adapter"].files()["adapter_config.json"])
    assert about["base_model_name_or_path"] == CLIP
    assert about["revision"] == hub.commit(CLIP)
    expected = _logits(runs["lora"], picture)
    published = load_published("lab/adapter", revision=report.commit)
    assert_same_numbers(_answer(*published, picture), expected)
    # Transformers puts the adapter onto the base by itself.
    merged, processor, _ = load_classifier(str(runs["lora"]))
    stock = AutoModel.from_pretrained("lab/adapter").eval()
    inputs = processor(images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        features = stock.get_image_features(**inputs).pooler_output
        own = merged.glovlm.get_image_features(**inputs).pooler_output
        plain = AutoModel.from_pretrained(CLIP).get_image_features(**inputs).pooler_output
    assert_same_numbers(features, own)
    assert (plain - own).abs().max() > 1e-3  # it did learn


def test_a_head_alone(hub: Hub, runs: dict[str, Path], picture: Path) -> None:
    report = _push(runs, "probe", "lab/head", adapter_only=True)
    assert report.what == "head"
    assert "adapter_config.json" not in report.files
    content = hub.repositories["lab/head"].files()["head.safetensors"]
    assert len(content) < 5000  # no tower in it
    expected = _logits(runs["probe"], picture)
    assert_same_numbers(_answer(*load_model("lab/head")[:2], picture), expected)


def test_inserts_leave_with_the_head(hub: Hub, runs: dict[str, Path], picture: Path) -> None:
    _push(runs, "vpt", "lab/vpt", adapter_only=True)
    expected = _logits(runs["vpt"], picture)
    assert_same_numbers(_answer(*load_published("lab/vpt"), picture), expected)


def test_weights_and_an_adapter_never_share_a_repository(hub: Hub, runs: dict[str, Path]) -> None:
    for adapter_only in (False, True, False):
        report = _push(runs, "lora", adapter_only=adapter_only)
        files = set(hub.repositories["lab/model"].files())
        assert files == {*report.files, ".gitattributes"}
        assert ("adapter_config.json" in files) != ("model.safetensors" in files)
    assert len(hub.repositories["lab/model"].commits) == 4


REFUSED = {
    "no id": ("lora", "model", {}, "owner/name"),
    "an empty id": ("lora", "", {}, "owner/name"),
    "a path": ("lora", "a/b/c", {}, "owner/name"),
    "spaces": ("lora", "lab/my model", {}, "owner/name"),
    "both": ("lora", "lab/model", {"merge": True, "adapter_only": True}, "alone, or merged"),
    "nothing to merge": ("probe", "lab/model", {"merge": True}, "left no adapter"),
    "a local base": ("local", "lab/model", {"adapter_only": True}, "no Hub id and commit"),
    "a pair": ("pair", "lab/model", {"adapter_only": True}, "adapter of the pair"),
    "towers changed": ("vanilla", "lab/model", {"adapter_only": True}, "changed the weights"),
    "no licence": ("local", "lab/model", {"reason": None}, "licence of 'tiny_clip' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_sent(case: str, hub: Hub, runs: dict[str, Path]) -> None:
    name, repo_id, more, expected = REFUSED[case]
    with pytest.raises(GloVLMError, match=expected):
        _push(runs, name, repo_id, **more)
    assert not hub.sent
    assert not hub.repositories


# ---------------------------------------------------------------------------------- what goes wrong

PASSING = {
    "a connection dropped in the middle of the weights": Fault("PUT", "lfs/", 0),
    "an error of the store": Fault("PUT", "lfs/", 500, 2),
    "too many requests": Fault("PUT", "lfs/", 429, headers={"Retry-After": "7"}),
    "an error before anything": Fault("POST", "api/repos/create", 502),
    "too many repositories": Fault("POST", "api/repos/create", 429, headers={"Retry-After": "7"}),
    "an error of the list": Fault("POST", "preupload", 503),
    "an error of the commit": Fault("POST", "/commit/", 500, 2),
    "a commit cut short": Fault("POST", "/commit/", 0),
    "a commit whose answer is lost": Fault("POST", "/commit/", -1),
    "somebody else was faster": Fault("POST", "/commit/", 412),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_tried_again(
    case: str, hub: Hub, runs: dict[str, Path], quiet: list[float]
) -> None:
    fault = PASSING[case]
    hub.faults.append(Fault(fault.method, fault.path, fault.status, fault.times, fault.headers))
    report = _push(runs, "lora")
    assert hub.faults[0].times == 0
    assert quiet
    if fault.headers:
        assert max(quiet) >= 7
    repository = hub.repositories["lab/model"]
    assert len(repository.commits) == 2  # not one more
    assert set(repository.files()) == {*report.files, ".gitattributes"}
    assert report.commit == repository.branches["main"]
    assert len(hub.uploads()) - (fault.method == "PUT" and fault.status > 0) * fault.times == 1


def test_what_does_not_pass_leaves_nothing_and_resumes(
    hub: Hub, runs: dict[str, Path], quiet: list[float]
) -> None:
    hub.faults.append(Fault("POST", "/commit/", 503, 1000))
    with pytest.raises(GloVLMError, match=r"there whole or not at all"):
        _push(runs, "lora")
    assert len(quiet) < 10  # bounded
    repository = hub.repositories["lab/model"]
    assert set(repository.files()) == {".gitattributes"}  # no half of a model
    assert len(hub.uploads()) == 1
    hub.faults.clear()
    _push(runs, "lora")
    assert len(hub.uploads()) == 1  # the weights were there
    assert "model.safetensors" in repository.files()


def test_large_files_in_parts(hub: Hub, runs: dict[str, Path]) -> None:
    hub.chunk = 2**16
    _push(runs, "lora")
    local = (runs["lora"] / "model" / "model.safetensors").read_bytes()
    assert len(hub.uploads()) == -(-len(local) // hub.chunk) > 1
    assert hub.repositories["lab/model"].files()["model.safetensors"] == local


@pytest.mark.parametrize(
    ("repo_id", "token", "expected"),
    [
        ("lab/model", "hf_wrong_and_secret", "run `hf auth login`"),
        ("lab/model", None, "No token .* run `hf auth login`"),
        ("others/model", TOKEN, "belongs to somebody else"),
        ("others/theirs", TOKEN, "belongs to somebody else"),
    ],
)
def test_who_may_not_publish(
    repo_id: str, token: str | None, expected: str, hub: Hub, runs: dict[str, Path]
) -> None:
    theirs = Repository()
    theirs.commit("main", {"README.md": b"theirs"}, "theirs")
    hub.repositories["others/theirs"] = theirs
    with pytest.raises(GloVLMError, match=expected) as raised:
        push(runs["lora"], repo_id, token=token)
    assert "secret" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert theirs.files() == {"README.md": b"theirs"}
    assert len(hub.repositories) == 1


def test_a_private_repository_stays_private(hub: Hub, runs: dict[str, Path]) -> None:
    _push(runs, "lora", "lab/hidden", private=True)
    assert hub.repositories["lab/hidden"].private
    _push(runs, "lora", "lab/open")
    before = dict(hub.repositories["lab/open"].commits)
    with pytest.raises(GloVLMError, match="exists and is public"):
        _push(runs, "probe", "lab/open", private=True)
    assert hub.repositories["lab/open"].commits == before


def test_a_branch(hub: Hub, runs: dict[str, Path]) -> None:
    report = _push(runs, "lora", branch="trial")
    repository = hub.repositories["lab/model"]
    assert set(repository.files("main")) == {".gitattributes"}
    assert set(repository.files("trial")) == {*report.files, ".gitattributes"}


def test_a_full_disk(
    hub: Hub, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.copyfile", full)
    before = _contents(runs["lora"])
    with pytest.raises(GloVLMError, match=r"is full: set TMPDIR"):
        _push(runs, "lora")
    assert not list(tmp_path.iterdir())
    assert not hub.sent
    assert _contents(runs["lora"]) == before


def test_offline(hub: Hub, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GloVLMError, match="HF_HUB_OFFLINE"):
        _push(runs, "lora")
    assert _push(runs, "lora", dry_run=True).files
    with pytest.raises(GloVLMError, match="lab/nowhere cannot be loaded"):
        load_published("lab/nowhere")


# -------------------------------------------------------------------------------- a plain CLIP


def test_a_plain_clip(runs: dict[str, Path], data: Path, picture: Path, tmp_path: Path) -> None:
    folder = export_clip(runs["lora"], tmp_path / "clip")
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in folder.glob("*.json"))
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "CLIPModel"
    assert type(processor).__name__ == "CLIPProcessor"
    texts = [f"A pathology image of {name}" for name in CLASSES]
    inputs = processor(images=Image.open(picture), text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    expected = _logits(runs["lora"], picture)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    written = "".join(p.read_text(errors="ignore") for p in folder.iterdir())
    assert "Zimmermann" not in written
    assert str(data.parent) not in written
    with pytest.raises(GloVLMError, match="there already"):
        export_clip(runs["lora"], folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pair", "Only a CLIP .* a pair of towers"),
        ("vpt", "changed the blocks"),
        ("local", "licence of 'tiny_clip' is not known"),
    ],
)
def test_no_plain_clip(name: str, expected: str, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GloVLMError, match=expected):
        export_clip(runs[name], tmp_path / "clip")
    assert not list(tmp_path.iterdir())
