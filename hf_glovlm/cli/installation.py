"""The command `glovlm doctor`: what is installed, what the machine can do, what stands in the way.

`examine` reads facts and judges nothing; `judge` makes sentences of facts and reads nothing.
Without `--online` no network is used. OpenVINO is never imported: its version is read off its
files.
"""

import os
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .. import __version__
from ..environment import package_version
from ..errors import GloVLMError, nearest
from .console import note, print_json, print_table
from .options import JsonFlag, Texts

if TYPE_CHECKING:
    from ..backbones import Backbone

__all__ = ["Finding", "Machine", "Need", "Place", "doctor", "examine", "judge"]

EXTRAS = {  # what each is for
    "slides": "whole slides, crops and sheets",
    "space": "the page of a Space",
    "export": "ONNX graphs",
    "openvino": "graphs on processors, by OpenVINO",
    "openclip": "published open_clip and timm weights",
    "docs": "the pages of the documentation",
    "dev": "tests and checks",
}
SHOWN = (  # of which the versions matter
    "torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "evaluate",
    "huggingface-hub", "tokenizers", "safetensors", "numpy", "scipy", "pillow", "gradio",
    "openslide-python", "tifffile", "onnxruntime", "openvino", "open-clip-torch", "timm",
)  # fmt: skip
LEAST_DISK = 5e9  # bytes: a large backbone and its conversion
LEAST_MEMORY = 4e9  # bytes that a backbone of 300 M weights takes with its images
TIMEOUT = 5.0  # seconds for each answer of the Hub
_TRUE = {"1", "ON", "YES", "TRUE"}  # as the Hub's client reads its variables
_REACHED = "the Hub answers"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Need:
    """Need of an extra: a package, the least version, and the version that is there."""

    package: str
    least: str
    there: str | None

    @property
    def is_met(self) -> bool:
        """Whether it is there, and new enough."""
        return self.there is not None and _numbers(self.there) >= _numbers(self.least)

    @property
    def in_words(self) -> str:
        """What is missing, or too old."""
        if self.there is None:
            return self.package
        return f"{self.package} {self.least} or newer (found {self.there})"


@dataclass(frozen=True)
class Place:
    """Folder that is written to."""

    what: str
    path: str
    free: int | None  # bytes
    size: int | None = None  # bytes that are used there by us
    writable: bool = True
    variable: str | None = None  # that moves it elsewhere


@dataclass(frozen=True)
class Machine:
    """Facts of an installation and its machine, as `examine` reads them."""

    versions: Mapping[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    clone: str | None = None  # folder of a clone, from which it is installed
    python: str = ""
    platform: str = ""
    processor: str = ""
    instructions: Sequence[str] = ()
    cores: int = 1  # that this process may use
    threads: int = 1  # of PyTorch
    thread_limit: str | None = None  # OMP_NUM_THREADS
    memory: int | None = None  # bytes that are available
    gpus: Sequence[Mapping[str, Any]] = ()  # name, memory, bf16
    mps: bool = False
    cuda_build: str | None = None
    nvidia_driver: bool = False
    places: Sequence[Place] = ()
    offline: Sequence[str] = ()  # variables that are set
    token: bool = False
    cached: Sequence[str] = ()  # known backbones whose weights are here
    gated: Mapping[str, str] = field(default_factory=dict)  # name -> page
    extras: Mapping[str, Sequence[Need]] = field(default_factory=dict)
    online: Mapping[str, str] | None = None  # what the Hub answered, by question


@dataclass(frozen=True)
class Finding:
    """Finding in plain words.

    Attributes:
        about: What it is of, such as `disk`.
        sentence: What is so.
        remedy: What to do.
        asked: Whether it was asked for, so that the command fails by it.
    """

    about: str
    sentence: str
    remedy: str
    asked: bool = False


# --------------------------------------------------------------------------------------- judging


def judge(machine: Machine, extras: Sequence[str] = ()) -> list[Finding]:
    """Find what is missing, or stands in the way of a fast and whole run.

    Args:
        machine: The facts.
        extras: Those that are asked for.

    Returns:
        What was asked for first.
    """
    findings = [
        *_judge_extras(machine, extras),
        *_judge_hub(machine),
        *_judge_devices(machine),
        *_judge_threads(machine),
        *_judge_places(machine),
    ]
    return sorted(findings, key=lambda finding: not finding.asked)


def _judge_extras(machine: Machine, asked: Sequence[str]) -> list[Finding]:
    findings = []
    for name in asked:
        missing = [need.in_words for need in machine.extras.get(name, ()) if not need.is_met]
        if missing:
            what = EXTRAS.get(name)
            findings.append(
                Finding(
                    f"extra {name}",
                    f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
                    + (f" for {what}." if what else "."),
                    install_command(machine, name),
                    asked=True,
                )
            )
    return findings


def install_command(machine: Machine, extra: str) -> str:
    """The command that installs an extra: of a clone in place, else from an index."""
    where = f"-e {machine.clone}'[{extra}]'" if machine.clone else f"'hf-glovlm[{extra}]'"
    return f"pip install {where}"


def _judge_hub(machine: Machine) -> list[Finding]:
    findings = []
    if machine.offline and not machine.cached:
        findings.append(
            Finding(
                "Hub",
                f"{', '.join(machine.offline)} is set, and no known backbone lies in the cache: "
                "only mini and folders of your own can be loaded.",
                f"Unset {machine.offline[0]} once and load the backbone, or give --backbone a "
                "folder.",
            )
        )
    for question, answer in (machine.online or {}).items():
        if answer != "yes":
            remedy = _hub_remedy(machine, question, answer)
            asked = question == _REACHED
            findings.append(Finding("Hub", f"{question}: {answer}.", remedy, asked))
    return findings


def _hub_remedy(machine: Machine, question: str, answer: str) -> str:
    page = machine.gated.get(question.removeprefix("access to "))
    if page is not None and answer.startswith("no"):
        return f"Ask for access at {page}, then run hf auth login."
    return "Look whether a proxy or firewall is between, or work offline with folders."


def _judge_devices(machine: Machine) -> list[Finding]:
    if machine.nvidia_driver and not machine.gpus:
        why = (
            "this PyTorch was built without CUDA"
            if machine.cuda_build is None
            else f"this PyTorch (CUDA {machine.cuda_build}) cannot use it"
        )
        return [
            Finding(
                "GPU",
                f"There is an NVIDIA driver, and {why}: all is computed on the processor.",
                "Install the PyTorch that fits the driver: https://pytorch.org/get-started/locally",
            )
        ]
    return []


def _judge_threads(machine: Machine) -> list[Finding]:
    if machine.threads < machine.cores and machine.thread_limit is not None:
        return [
            Finding(
                "threads",
                f"OMP_NUM_THREADS={machine.thread_limit} lets PyTorch use {machine.threads} of "
                f"{machine.cores} cores.",
                "Unset OMP_NUM_THREADS, unless several processes share the machine.",
            )
        ]
    if machine.threads > machine.cores:
        return [
            Finding(
                "threads",
                f"PyTorch uses {machine.threads} threads on {machine.cores} cores, which is slower "
                "than one a core.",
                f"Set OMP_NUM_THREADS={machine.cores}.",
            )
        ]
    return []


def _judge_places(machine: Machine) -> list[Finding]:
    findings = []
    for place in machine.places:
        elsewhere = (
            f"set {place.variable} to a folder" if place.variable else "give another --output-dir"
        )
        if not place.writable:
            findings.append(
                Finding(
                    "disk",
                    f"The {place.what} {place.path} cannot be written.",
                    f"Make it writable, or {elsewhere} that is.",
                )
            )
        elif place.free is not None and place.free < LEAST_DISK:
            findings.append(
                Finding(
                    "disk",
                    f"The {place.what} {place.path} has {size_in_words(place.free)} left; a large "
                    f"backbone needs {size_in_words(LEAST_DISK)}.",
                    f"Free space there, or {elsewhere} with room.",
                )
            )
    if machine.memory is not None and machine.memory < LEAST_MEMORY:
        findings.append(
            Finding(
                "memory",
                f"{size_in_words(machine.memory)} of memory are free; a backbone with its images "
                f"needs about {size_in_words(LEAST_MEMORY)}.",
                "Close other programs, or give --batch-size 4 and --workers 1.",
            )
        )
    return findings


def sensible_precisions(machine: Machine) -> str:
    """Precisions that this machine is fast in, in a sentence."""
    if machine.gpus:
        if all(gpu["bf16"] for gpu in machine.gpus):
            return "fp32; --precision bf16 is faster on this GPU, fp16 as fast"
        return "fp32; --precision fp16 is faster on this GPU, bf16 is emulated"
    if machine.mps:
        return "fp32; --precision fp16 may be faster: try --precision auto"
    flags = {*machine.instructions}
    fast = []
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        fast.append("bf16")
    if flags & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"}:
        fast.append("int8 with --runtime onnx")
    if fast:
        return f"fp32; --precision {' or '.join(fast)} is fast on this processor"
    return "fp32; bf16 and int8 have no instructions here and are slower"


# --------------------------------------------------------------------------------------- reading


def examine(*, online: bool = False) -> Machine:
    """Read the facts of this installation and machine.

    Args:
        online: Ask the Hub, for a few seconds at most.
    """
    import platform

    import torch
    from huggingface_hub import constants, get_token

    from ..backbones import BACKBONES
    from ..inference.engines import describe_processor
    from ..lab.benches.document import find_commit

    processor = describe_processor(torch.device("cpu"))
    hub = Path(constants.HF_HUB_CACHE)
    rows = [row for row in BACKBONES.values() if row.hub_id is not None]
    gated = {row.name: str(row.page) for row in rows if row.gated}
    clone = _find_clone()
    return Machine(
        versions={"hf-glovlm": __version__} | {name: package_version(name) for name in SHOWN},
        commit=find_commit(),
        clone=None if clone is None else _at_home(clone),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=processor["name"],
        instructions=processor["instructions"],
        cores=_usable_cores(),
        threads=processor["threads"],
        thread_limit=os.environ.get("OMP_NUM_THREADS"),
        memory=_available_memory(),
        gpus=_describe_gpus(torch),
        mps=torch.backends.mps.is_available(),
        cuda_build=torch.version.cuda,
        nvidia_driver=Path("/proc/driver/nvidia/version").exists()
        or shutil.which("nvidia-smi") is not None,
        places=_examine_places(hub),
        offline=[name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE],
        token=get_token() is not None,
        cached=[row.name for row in rows if _is_cached(hub, str(row.hub_id))],
        gated=gated,
        extras=read_extras(clone),
        online=_ask_hub([row for row in rows if row.gated]) if online else None,
    )


def _find_clone() -> Path | None:
    """Folder of the clone that this package is imported from, if it is one."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def read_extras(clone: Path | None) -> dict[str, list[Need]]:
    """What each extra needs: as the clone declares it, else as the installed package does."""
    declared: dict[str, list[str]] = {}
    if clone is not None:
        content = tomllib.loads((clone / "pyproject.toml").read_text(encoding="utf-8"))
        declared = content["project"]["optional-dependencies"]
    else:
        from importlib.metadata import PackageNotFoundError, requires

        with suppress(PackageNotFoundError):
            for line in requires("hf-glovlm") or ():
                requirement, _, marker = line.partition(";")
                named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
                if named:
                    declared.setdefault(named[1], []).append(requirement)
    order = [*EXTRAS, *declared]
    return {name: _needs(declared, name) for name in dict.fromkeys(order) if name in declared}


def _needs(declared: Mapping[str, Sequence[str]], extra: str) -> list[Need]:
    """Needs of an extra, and of the extras of ours that it names."""
    needs: dict[str, Need] = {}
    for line in declared[extra]:
        match = re.match(r"\s*([\w.-]+)\s*(?:\[([\w\s,-]*)\])?", line)
        name = match[1].lower().replace("_", "-") if match else line
        if name == "hf-glovlm":
            for other in (match[2] or "").split(",") if match else ():
                needs |= {need.package: need for need in _needs(declared, other.strip())}
            continue
        least = re.search(r">=\s*([\d.]+)", line)
        needs[name] = Need(name, least[1] if least else "0", package_version(name))
    return list(needs.values())


def _numbers(version: str) -> tuple[int, ...]:
    """`2.11.0+cpu` -> (2, 11), without zeros at the end."""
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_memory() -> int | None:
    """Memory that can still be taken, in bytes; `None` where no system states it."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _describe_gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": one.name, "memory": one.total_memory, "bf16": (one.major, one.minor) >= (8, 0)}
        for one in properties
    ]


def _examine_places(hub: Path) -> list[Place]:
    from ..inference import FeatureCache

    cache = FeatureCache().folder
    return [
        _examine_place("output folder", Path.cwd(), None, measured=False),
        _examine_place("cache of features", cache, "GLOVLM_CACHE"),
        _examine_place("cache of the Hub", hub, "HF_HOME"),
    ]


def _examine_place(what: str, path: Path, variable: str | None, measured: bool = True) -> Place:
    """Facts of a folder, or of the nearest one above it that is there."""
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    free = None
    with suppress(OSError):
        free = shutil.disk_usage(there).free
    used = _used(path) if measured else None
    return Place(what, _at_home(path), free, used, os.access(there, os.W_OK | os.X_OK), variable)


def _at_home(path: Path) -> str:
    """Path without the name of a home, as a report of a fault travels."""
    with suppress(ValueError, RuntimeError):
        return str(Path("~") / path.relative_to(Path.home()))
    return str(path)


def _used(folder: Path) -> int:
    """Bytes of the files in a folder; what a link points to is not counted twice."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _is_cached(hub: Path, repo_id: str) -> bool:
    snapshots = hub / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    with suppress(OSError):
        return any(any(snapshot.iterdir()) for snapshot in snapshots.iterdir())
    return False


def _ask_hub(gated: "Sequence[Backbone]") -> dict[str, str]:
    """What the Hub answers: whether it is reached, and which gated backbones may be loaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    def ask(repo_id: str) -> str:
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, "README.md"), timeout=TIMEOUT)
        except GatedRepoError:
            return "no, it is gated and access was not given"
        except RepositoryNotFoundError:
            return "no, the token does not see it, or there is none"
        except EntryNotFoundError:
            return "yes"
        except OfflineModeIsEnabled:
            return "not asked, since HF_HUB_OFFLINE is set"
        except Exception as error:  # proxies, certificates, timeouts: in its own words
            return f"no answer ({type(error).__name__})"
        return "yes"

    answers = {_REACHED: ask("openai/clip-vit-base-patch32")}
    if answers[_REACHED] == "yes":
        answers |= {f"access to {row.name}": ask(str(row.hub_id)) for row in gated}
    return answers


def size_in_words(size: float | None) -> str:
    """`1.23 GB`, `45 MB`; `-` where it is not known."""
    if size is None:
        return "-"
    unit, value = ("GB", size / 1e9) if size >= 1e9 else ("MB", size / 1e6)
    return f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"


# -------------------------------------------------------------------------------------- printing


def doctor(
    extras: Annotated[
        Texts, Argument(help=f"Extras that must be whole: {', '.join(EXTRAS)}.")
    ] = None,
    online: Annotated[
        bool, Option("--online", help="Ask the Hub, too: a few seconds, one try.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Look at the installation: versions, devices, disk, access, and what each extra lacks.

    What a bug report needs, too (--json). Exit code 1 if an extra that is named lacks something, or
    the Hub does not answer with --online.
    """
    machine = examine(online=online)
    asked = extras or []
    for name in asked:
        if name not in machine.extras:
            known = [*machine.extras] or [*EXTRAS]
            raise GloVLMError(
                f"There is no extra '{name}': expected {', '.join(known)}.{nearest(name, known)}"
            )
    findings = judge(machine, asked)
    if as_json:
        facts = asdict(machine) | {"precision": sensible_precisions(machine)}
        print_json(facts | {"findings": [asdict(finding) for finding in findings]})
    else:
        _print(machine, findings)
    if any(finding.asked for finding in findings):
        raise typer.Exit(1)
    if not findings:
        note("nothing stands in the way")


def _print(machine: Machine, findings: Sequence[Finding]) -> None:
    of = f" ({machine.commit})" if machine.commit else ""
    versions = [["python", machine.python]]
    versions += [[name, str(value or "-")] for name, value in machine.versions.items()]
    versions[1][1] += of
    print_table("Versions", ["package", "version"], versions)
    print_table("Machine", ["", ""], _machine_rows(machine))
    places = [
        [place.what, place.path, size_in_words(place.free), size_in_words(place.size)]
        for place in machine.places
    ]
    print_table("Disk", ["", "folder", "free", "used"], places)
    print_table("Hub", ["", ""], _hub_rows(machine))
    rows, commands = [], []
    for name, needs in machine.extras.items():
        missing = [need.in_words for need in needs if not need.is_met]
        rows.append([name, EXTRAS.get(name, ""), ", ".join(missing) or "nothing"])
        commands += [install_command(machine, name)] if missing else []
    print_table("Extras", ["extra", "for", "lacks"], rows)
    if commands:  # not in the table, where they would be wrapped
        typer.echo("\n".join(["To get them", *commands, ""]))
    if findings:
        advice = [[finding.about, finding.sentence, finding.remedy] for finding in findings]
        print_table("To look at", ["", "found", "what to do"], advice)


def _machine_rows(machine: Machine) -> list[list[str]]:
    devices = [f"{gpu['name']}, {size_in_words(gpu['memory'])}" for gpu in machine.gpus]
    devices += ["Apple GPU (mps)"] if machine.mps else []
    memory = "-" if machine.memory is None else f"{size_in_words(machine.memory)} free"
    return [
        ["system", machine.platform],
        ["processor", machine.processor],
        ["instructions", ", ".join(machine.instructions) or "not known"],
        ["cores, threads", f"{machine.cores}, {machine.threads}"],
        ["memory", memory],
        ["GPU", "; ".join(devices) or "none"],
        ["precision", sensible_precisions(machine)],
    ]


def _hub_rows(machine: Machine) -> list[list[str]]:
    rows = [
        ["offline", ", ".join(machine.offline) or "no"],
        ["token", "there is one" if machine.token else "none: hf auth login makes one"],
        ["backbones here", ", ".join(["mini", *machine.cached])],
        ["gated backbones", ", ".join(machine.gated)],
    ]
    if machine.gated:
        page = next(iter(machine.gated.values()))
        rows.append(["access", f"ask on the backbone's page, such as {page}, then hf auth login"])
    rows += [[question, answer] for question, answer in (machine.online or {}).items()]
    return rows
