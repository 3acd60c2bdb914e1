"""Document of benches: rows, and the machine, versions and commit they are of; comparison."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...environment import describe_environment
from ...errors import GloVLMError
from ...files import check_fields, read_json
from . import Finished

Document = dict[str, Any]
Row = dict[str, Any]

KIND = "bench"
# Instructions of a processor that decide which precision and runtime are fast on it.
FLAGS: tuple[str, ...] = (
    *("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"),
    *("amx_bf16", "amx_fp16", "amx_int8", "asimddp", "bf16", "i8mm", "sve"),
)
_CPUINFO = Path("/proc/cpuinfo")
MACHINE = {  # what describes a machine, in words
    "cpu": "processor",
    "flags": "instructions",
    "cores": "cores",
    "threads": "threads of PyTorch",
    "memory_gib": "memory in GiB",
    "gpu": "GPU",
}
_FIELDS: dict[str, tuple[type, ...]] = {"machine": (dict,), "versions": (dict,), "rows": (list,)}
_OF_A_ROW: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "value": (float, type(None)),
    "unit": (str,),
    "ratio": (float, type(None)),
    "what": (str,),
}


def new_document() -> Document:
    """Document without rows: `kind`, `machine`, `versions`, `commit`, `rows`, `unfinished`."""
    facts = describe_environment("cpu")
    hardware = ("platform", "device", "gpu", "threads", "num_processes")
    versions = {name: value for name, value in facts.items() if name not in hardware}
    return {
        "kind": KIND,
        "machine": describe_machine(),
        "versions": versions | {name: _installed(name) for name in ("onnxruntime", "openvino")},
        "commit": find_commit(),
        "rows": [],
        "unfinished": {},
    }


def add_finished(document: Document, done: Finished) -> None:
    """Add the rows of a bench, and why it gave no more."""
    document["rows"] += done.rows
    if done.failure is not None:
        reasons = [document["unfinished"].get(done.bench), done.failure]
        document["unfinished"][done.bench] = " ".join(filter(None, reasons))


def describe_machine() -> dict[str, Any]:
    """Hardware that timings depend on: the keys of `MACHINE`; `None` where it is not stated."""
    import torch

    about = _read_cpuinfo()
    flags = set((about.get("flags") or about.get("Features") or "").split())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": _count_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "gpu": gpu,
    }


def find_commit() -> str | None:
    """Commit of a clone, in short; an installed package has none."""
    clone = Path(__file__).resolve().parents[3]
    if not (clone / ".git").exists():
        return None
    command = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def read_document(path: Path) -> Document:
    """Read a document that `glovlm bench --json` or `--output` wrote.

    Raises:
        GloVLMError: It is missing, damaged or something else, or its rows have no ratios.
    """
    content: Document = read_json(path)
    if content.get("kind") != KIND:
        raise GloVLMError(
            f"Expected the JSON of `glovlm bench`, found something else in '{path}': give a file "
            "that `glovlm bench --output FILE` wrote."
        )
    check_fields(path, content, _FIELDS)
    for row in content["rows"]:
        if not isinstance(row, dict) or "name" not in row:
            raise GloVLMError(
                f"Expected rows with name, value, unit and ratio in '{path}', found others: the "
                "rows of `bench intervals` are not compared; give the JSON of another bench."
            )
        check_fields(path, row, _OF_A_ROW)
    return content


def compare_documents(after: Document, before: Document) -> list[str]:
    """Put the rows of an earlier document beside those of a later one, which is changed.

    Its rows get `before` (`value` and `ratio` of then, or `None`) and `quotient` (of both: now
    over then); the document gets `before`: machine, versions and commit of then, and the rows that
    it alone has.

    Returns:
        Sentences: where machine or versions differ, and which rows are in one alone.
    """
    then = {row["name"]: row for row in before["rows"]}
    for row in after["rows"]:
        old = then.pop(row["name"], None)
        row["before"] = old and {"value": old["value"], "ratio": old["ratio"]}
        row["quotient"] = {key: _quotient(row, old, key) for key in ("value", "ratio")}
    about = {key: before.get(key) for key in ("machine", "versions", "commit")}
    after["before"] = about | {"rows": list(then.values())}
    notes = differences(after, before)
    new = [row["name"] for row in after["rows"] if row["before"] is None]
    for names, where in ((new, "now"), (list(then), "before")):
        if names:
            notes.append(f"Measured {where} alone: {', '.join(names)}.")
    return notes


def differences(after: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Sentences on what differs between the machines and the versions of two documents."""
    sentences = []
    for part, title, words, warning in (
        ("machine", "Another machine", MACHINE, "compare ratios; seconds cannot be compared"),
        ("versions", "Other versions", {}, "what differs may be theirs"),
    ):
        one, other = before.get(part) or {}, after.get(part) or {}
        changed = [
            f"{words.get(name, name)} {_shown(one.get(name))} before, {_shown(other.get(name))} now"
            for name in dict.fromkeys([*one, *other])
            if one.get(name) != other.get(name)
        ]
        if changed:
            sentences.append(f"{title} ({'; '.join(changed)}): {warning}.")
    return sentences


def comparison_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of a table, of rows that `compare_documents` has put beside earlier ones."""
    return [
        {
            "name": row["name"],
            "unit": row["unit"],
            "before": (row["before"] or {}).get("value"),
            "after": row["value"],
            "after/before": row["quotient"]["value"],
            "ratio_before": (row["before"] or {}).get("ratio"),
            "ratio_after": row["ratio"],
            "ratio after/before": row["quotient"]["ratio"],
        }
        for row in rows
    ]


def _quotient(now: Row, then: Row | None, key: str) -> float | None:
    one, other = now[key], then and then[key]
    if one is None or not other:
        return None
    return float(f"{one / other:.3g}")


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read_cpuinfo() -> dict[str, str]:
    """Fields of the first processor, where Linux states them."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.split("\n\n")[0].splitlines()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _count_cores() -> int | None:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows states it elsewhere
        return None
