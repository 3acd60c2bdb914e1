"""`glovlm doctor`: what machines that are made up get to hear, and what the real one prints."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Glovlm

from hf_glovlm.cli import installation
from hf_glovlm.cli.installation import Machine, Need, Place, examine, judge, read_extras

GPU = {"name": "H", "memory": 8e10, "bf16": True}
FINE = Machine(
    versions={"torch": "2.14.1"},
    python="3.12.1",
    cores=8,
    threads=8,
    memory=16_000_000_000,
    places=[Place("cache of features", "~/c", 50_000_000_000, 0, True, "GLOVLM_CACHE")],
    gated={"conch": "https://huggingface.co/MahmoodLab/conch"},
    extras={
        "slides": [Need("tifffile", "2025.3", "2026.1")],
        "export": [Need("onnx", "1.19", None), Need("torch", "2.12", "2.11.0+cpu")],
    },
)


def place(**changes: Any) -> list[Place]:
    return [replace(FINE.places[0], **changes)]


@pytest.mark.parametrize(
    ("changes", "about", "sentence", "remedy"),
    [
        ({"offline": ["HF_HUB_OFFLINE"]}, "Hub", "HF_HUB_OFFLINE is set, and no known", "Unset"),
        ({"nvidia_driver": True}, "GPU", "built without CUDA", "pytorch.org"),
        ({"nvidia_driver": True, "cuda_build": "12.8"}, "GPU", "CUDA 12.8) cannot use", "driver"),
        ({"threads": 1, "thread_limit": "1"}, "threads", "lets PyTorch use 1 of 8", "Unset"),
        ({"threads": 16}, "threads", "16 threads on 8 cores", "OMP_NUM_THREADS=8"),
        ({"memory": 2_000_000_000}, "memory", "2 GB of memory are free", "--batch-size"),
        ({"places": place(free=900_000_000)}, "disk", "has 900 MB left", "GLOVLM_CACHE"),
        ({"places": place(writable=False)}, "disk", "cannot be written", "GLOVLM_CACHE"),
        ({"places": place(writable=False, variable=None)}, "disk", "cannot", "--output-dir"),
        ({"online": {"the Hub answers": "no answer (SSLError)"}}, "Hub", "SSLError", "proxy"),
        ({"online": {"the Hub answers": "yes", "access to conch": "no, it is gated"}},
         "Hub", "access to conch: no", "https://huggingface.co/MahmoodLab/conch"),
    ],
)  # fmt: skip
def test_each_obstacle_has_one_sentence_and_a_remedy(
    changes: dict[str, Any], about: str, sentence: str, remedy: str
) -> None:
    (found,) = judge(replace(FINE, **changes))
    assert found.about == about
    assert sentence in found.sentence
    assert remedy in found.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"offline": ["HF_HUB_OFFLINE"], "cached": ["plip"]},
        {"nvidia_driver": True, "gpus": [GPU]},
        {"threads": 4},  # cores that share one unit
        {"memory": None, "places": place(free=None)},
        {"online": {"the Hub answers": "yes", "access to conch": "yes"}},
    ],
)
def test_nothing_is_said_of_what_is_fine(changes: dict[str, Any]) -> None:
    assert judge(replace(FINE, **changes)) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": [GPU]}, "--precision bf16 is faster on this GPU"),
        ({"gpus": [GPU | {"bf16": False}]}, "--precision fp16"),
        ({"mps": True}, "--precision auto"),
        ({"instructions": ["avx2"]}, "have no instructions here"),
        ({"instructions": ["avx512_vnni"]}, "--precision int8 with --runtime onnx is fast"),
        ({"instructions": ["amx_bf16", "amx_int8"]}, "--precision bf16 or int8 with"),
    ],
)
def test_precisions_are_those_with_instructions(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in installation.sensible_precisions(replace(FINE, **changes))


@pytest.mark.parametrize(
    ("clone", "command"),
    [(None, "pip install 'hf-glovlm[export]'"), ("~/glovlm", "pip install -e ~/glovlm'[export]'")],
)
def test_an_extra_lacks_what_is_missing_or_too_old(clone: str | None, command: str) -> None:
    machine = replace(FINE, clone=clone)
    (found,) = judge(machine, ["slides", "export"])
    assert found.asked
    assert "onnx, torch 2.12 or newer (found 2.11.0+cpu) are missing" in found.sentence
    assert found.remedy == command


@pytest.mark.parametrize(
    ("least", "there", "met"),
    [("1.19", "1.19.0", True), ("1.19", "1.2", False), ("3", "3.0.0rc1", True),
     ("0.6.2", "0.6.10", True), ("2025.3", "2024.12.30", False), ("0", "0.0.1", True),
     ("1", None, False)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(least: str, there: str | None, met: bool) -> None:
    assert Need("x", least, there).is_met is met


def test_extras_are_read_off_the_declaration(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[project.optional-dependencies]\n"
        'slides = ["numpy>=1", "no_such.package>=4,<5"]\n'
        'dev = ["hf-glovlm[slides]", "pytest>=8"]\n'
    )
    extras = read_extras(tmp_path)
    assert [*extras] == ["slides", "dev"]
    assert [need.package for need in extras["dev"]] == ["numpy", "no-such.package", "pytest"]
    assert [need.is_met for need in extras["dev"]] == [True, False, True]
    assert extras["slides"][1] == Need("no-such.package", "4", None)


def test_the_clone_declares_what_is_for_something() -> None:
    declared = read_extras(Path(installation.__file__).parents[2])
    assert set(declared) <= set(installation.EXTRAS)


# ----------------------------------------------------------------------------------- the command


def test_the_command_describes_this_machine_without_network_or_secrets(
    glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setitem(sys.modules, "openvino", None)  # its import fails, and is never tried

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    done = glovlm("doctor", "--json")
    facts = json.loads(done.out)
    assert done.code == 0
    assert (facts["token"], facts["online"], facts["offline"]) == (True, None, ["HF_HUB_OFFLINE"])
    assert all(facts["versions"][name] for name in ("hf-glovlm", "torch", "transformers", "peft"))
    assert {"conch", "uni"} <= set(facts["gated"])
    assert facts["findings"][0]["about"] == "Hub"  # tests are offline, and no backbone is here
    table = glovlm("doctor")
    assert "transformers" in table.out
    assert "HF_HUB_OFFLINE" in table.out
    assert "hf_secret" not in done.out + done.err + table.out + table.err


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (("slides",), 0, ""),
        (("export",), 1, "pip install 'hf-glovlm[export]'"),
        (("slides", "export", "--json"), 1, "onnx, torch 2.12 or newer (found 2.11.0+cpu)"),
        (("expotr",), 2, "Did you mean 'export'?"),
    ],
)
def test_it_fails_by_what_was_asked_for(
    glovlm: Glovlm,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    printed: str,
) -> None:
    monkeypatch.setattr(installation, "examine", lambda *, online: FINE)
    done = glovlm("doctor", *arguments)
    assert done.code == code
    assert printed in done.out + done.err


@pytest.mark.parametrize("answer", ["yes", "gated", "absent", "silent"])
def test_the_hub_is_asked_for_a_few_seconds_and_only_if_told(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    asked: list[str] = []

    def head(url: str, *, timeout: float) -> None:
        assert timeout <= 5
        asked.append(url)
        response = httpx.Response(403, request=httpx.Request("HEAD", url))
        if answer == "silent":
            raise httpx.ConnectTimeout("too slow")
        if answer in ("gated", "absent") and "MahmoodLab" in url:
            raise (GatedRepoError if answer == "gated" else RepositoryNotFoundError)(
                "no", response=response
            )

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
    assert examine().online is None
    assert asked == []
    answers = dict(examine(online=True).online or {})
    if answer == "silent":
        assert answers == {"the Hub answers": "no answer (ConnectTimeout)"}
        assert len(asked) == 1
    else:
        assert answers["the Hub answers"] == "yes"
        assert answers["access to conch"].startswith("yes" if answer == "yes" else "no")
        assert answers["access to medsiglip"] == "yes"
