"""The real client of the Hub loads every published layout by id, resumes, and works offline."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import published
import pytest
import torch
from fresh_process import run_script
from hub_server import TOKEN, Hub, serve
from huggingface_hub import hf_hub_download
from tiny import tiny_bert, tiny_clip, tiny_dinov2, tiny_siglip
from tolerance import assert_same_numbers
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_glovlm.backbones import BACKBONES, load_backbone
from hf_glovlm.backbones.checkpoints import Checkpoint
from hf_glovlm.errors import GloVLMError

# Name by which it is loaded: the Hub ids that are read.
LOADED = {
    "clip-vit-b-32": ["openai/clip-vit-base-patch32"],
    "plip": ["vinid/plip"],
    "siglip-b-16": ["google/siglip-base-patch16-224"],
    "quiltnet-b-32": ["wisdomik/QuiltNet-B-32"],
    "wisdomik/QuiltNet-B-16": ["wisdomik/QuiltNet-B-16"],
    "somebody/own-clip": ["somebody/own-clip"],
    "pathgen-clip": ["jamessyx/PathGen-CLIP"],
    "biomedclip": ["microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"],
    "conch": ["MahmoodLab/conch"],
    "keep": ["Astaxanthin/KEEP"],
    "virchow2+minilm": ["paige-ai/Virchow2", "sentence-transformers/all-MiniLM-L6-v2"],
    "hibou-b+minilm": ["histai/hibou-b", "sentence-transformers/all-MiniLM-L6-v2"],
    "dinov2-small+minilm": ["facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2"],
}
OFFLINE = ["clip-vit-b-32", "quiltnet-b-32", "somebody/own-clip", "conch", "virchow2+minilm"]
REFUSED = {
    "uni+minilm": "gated.*https://huggingface.co/MahmoodLab/UNI and run `hf auth login`",
    "medsiglip": "gated.*https://huggingface.co/google/medsiglip-448 and run `hf auth login`",
    "nobody/here": "'nobody/here' cannot be loaded: there is no nobody/here on the Hub",
    "phikon-v2+minilm": "'phikon-v2' cannot be loaded: there is no owkin/phikon-v2",
    "somebody/notes": "'somebody/notes' cannot be loaded",
}
BROKEN = "wisdomik/QuiltNet-B-16/open_clip_pytorch_model.bin"
SCRIPT = """
import json, logging, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2**16  # what arrived before a break is kept in such pieces
import torch
from hf_glovlm.backbones import load_backbone

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("hf_glovlm").addHandler(handler)
results = {}
for name in sys.argv[1:]:
    messages.clear()
    try:
        model, processor = load_backbone(name)
    except ValueError as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
        continue
    ids = processor(text=["a viable glomerulus"], return_tensors="pt")
    with torch.no_grad():
        pooled = model.get_text_features(**ids).pooler_output[0]
    config = model.config
    results[name] = {
        "text": pooled.tolist(),
        "path": model.name_or_path,
        "messages": list(messages),
        **{key: getattr(config, f"backbone_{key}") for key in
           ("name", "revision", "license", "restrictions")},
    }
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    plip = tiny_clip(root)
    torch.save(AutoModel.from_pretrained(plip).state_dict(), plip / "pytorch_model.bin")
    (plip / "model.safetensors").unlink()
    (root / "notes").mkdir()
    (root / "notes" / "README.md").write_text("no model")
    quiltnet = published.quiltnet(root / "quiltnet")
    return {
        "openai/clip-vit-base-patch32": tiny_clip(),
        "vinid/plip": plip,
        "google/siglip-base-patch16-224": tiny_siglip(),
        "wisdomik/QuiltNet-B-32": quiltnet,
        "wisdomik/QuiltNet-B-16": quiltnet,
        "somebody/own-clip": quiltnet,
        "jamessyx/PathGen-CLIP": published.pathgen_clip(root / "pathgen"),
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": published.biomedclip(
            root / "biomedclip"
        ),
        "MahmoodLab/conch": published.conch(root / "conch"),
        "Astaxanthin/KEEP": published.keep(root / "keep"),
        "MahmoodLab/UNI": published.uni(root / "uni"),
        "google/medsiglip-448": tiny_siglip(),
        "paige-ai/Virchow2": published.virchow2(root / "virchow2"),
        "histai/hibou-b": _hibou(root / "hibou"),
        "facebook/dinov2-small": tiny_dinov2(),
        "sentence-transformers/all-MiniLM-L6-v2": tiny_bert(),
        "somebody/notes": root / "notes",
    }


def _hibou(folder: Path) -> Path:
    """A stock model whose repository says that it needs code of its own."""
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "hibou", "auto_map": {"AutoModel": "modeling_hibou.HibouModel"}}
    (folder / "config.json").write_text(json.dumps(about))
    transform = (tiny_dinov2() / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(transform)
    return folder


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    gated = {row.hub_id for row in BACKBONES.values() if row.gated and row.hub_id}
    granted = gated - {"MahmoodLab/UNI", "google/medsiglip-448"}
    curt = frozenset({"google/medsiglip-448"})
    with serve(Hub(folders, frozenset(gated), frozenset(granted), curt, {BROKEN})) as served:
        yield served


def _load(home: Path, names: list[str], **environment: str) -> dict[str, Any]:
    own = {"GLOVLM_CACHE": str(home / "glovlm")}
    own |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return run_script(SCRIPT, *names, home=home, **own, **environment)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> dict[str, Any]:
    """What a fresh machine with a token finds."""
    return _load(home, [*LOADED, *REFUSED], HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def offline(online: dict[str, Any], home: Path) -> dict[str, Any]:
    """What it finds later without a network."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    return _load(home, [*OFFLINE, "uni+minilm"], **nowhere)


@pytest.mark.parametrize("name", LOADED)
def test_loaded_by_id(name: str, hub: Hub, online: dict[str, Any]) -> None:
    results = online[name]
    assert "error" not in results, results
    assert results["name"] == "+".join(LOADED[name])
    assert results["revision"] == "+".join(map(hub.commit, LOADED[name]))
    assert results["path"] == "" or results["path"] == LOADED[name][0]
    rows = [row for row in BACKBONES.values() if row.hub_id in LOADED[name]]
    if rows:
        assert results["license"] == " + ".join(row.license for row in rows)
        assert set(results["restrictions"]) == {r for row in rows for r in row.restrictions}
    else:
        assert results["license"] is None


@pytest.mark.parametrize("name", [name for name in LOADED if "+" not in name])
def test_the_same_as_from_a_folder(
    name: str, folders: dict[str, Path], online: dict[str, Any]
) -> None:
    model, processor = load_backbone(str(folders[LOADED[name][0]]))
    ids = processor(text=["a viable glomerulus"], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**ids).pooler_output[0]
    assert_same_numbers(online[name]["text"], expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_sentence(name: str, online: dict[str, Any]) -> None:
    error = online[name]["error"]
    assert error.startswith("GloVLMError: ")
    assert "\n" not in error
    assert re.search(REFUSED[name], error), error


def test_licences_are_logged_once(online: dict[str, Any]) -> None:
    messages = [line for line in online["conch"]["messages"] if "commercial" in line]
    assert len(messages) == 1
    assert "cc-by-nc-nd-4.0" in messages[0]
    assert not [line for line in online["quiltnet-b-32"]["messages"] if "commercial" in line]


def test_converted_once_and_each_file_downloaded_once(
    hub: Hub, online: dict[str, Any], offline: dict[str, Any]
) -> None:
    assert any("Converting" in line for line in online["conch"]["messages"])
    assert not any("Converting" in line for line in offline["conch"]["messages"])
    commit = hub.commit("MahmoodLab/conch")
    ranges = hub.downloads(f"MahmoodLab/conch/resolve/{commit}/pytorch_model.bin")
    assert ranges == [None]


def test_a_broken_download_is_resumed(hub: Hub, online: dict[str, Any]) -> None:
    hub_id, _, file = BROKEN.rpartition("/")
    first, *later = hub.downloads(f"{hub_id}/resolve/{hub.commit(hub_id)}/{file}")
    assert first is None
    assert len(later) == 1
    assert later[0] is not None
    assert int(later[0].removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_from_the_cache(name: str, online: dict[str, Any], offline: dict[str, Any]) -> None:
    assert_same_numbers(offline[name]["text"], online[name]["text"])
    ignored = {"messages", "path", "text"}
    assert {k: v for k, v in offline[name].items() if k not in ignored} == {
        k: v for k, v in online[name].items() if k not in ignored
    }


def test_offline_without_the_files(offline: dict[str, Any]) -> None:
    assert "HF_HUB_OFFLINE" in offline["uni+minilm"]["error"]


@pytest.mark.parametrize(
    ("hub_id", "revision", "expected"),
    [
        ("openai/clip-vit-base-patch32", "absent", "has no such revision"),
        ("MahmoodLab/UNI", None, "ask for access at https://huggingface.co/MahmoodLab/UNI"),
    ],
)
def test_what_the_hub_refuses_to_a_stranger(
    hub_id: str, revision: str | None, expected: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has no token."""
    download = partial(hf_hub_download, endpoint=hub.url)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # A client that is online first asks huggingface.co for the names of agents.
    agents = huggingface_hub.utils._detect_agent
    monkeypatch.setattr(agents, "_registry", agents._EMPTY_REGISTRY)
    with pytest.raises(GloVLMError, match=expected):
        Checkpoint(hub_id, hub_id, revision, gated=True).fetch("config.json")


def test_converted_weights_outlive_the_cache_of_the_hub(
    hub: Hub, online: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is offline and its Hub cache is empty."""
    monkeypatch.setenv("GLOVLM_CACHE", str(home / "glovlm"))
    commit = hub.commit("MahmoodLab/conch")
    assert Checkpoint("MahmoodLab/conch", "conch").convert().name == commit
    model, _ = load_backbone("conch")
    assert model.config.backbone_revision == commit
