"""Record `glovlm` commands and compare two recordings, to show that a refactoring changes nothing.

    python tests/record_commands.py record --repository OLD --output-dir BEFORE
    python tests/record_commands.py record --repository NEW --output-dir AFTER --inputs BEFORE
    python tests/record_commands.py compare BEFORE AFTER [--expected FILE] [--code]

`record` runs the commands of record_commands.yaml on synthetic data with fixed seeds and keeps what
they print and write, as it is. The second recording takes the inputs of the first. `compare`
decides what counts: paths, times, versions and floats below the tolerance do not; it prints every
other difference in one line and exits with 1 if there is one. A deliberate change is declared in a
YAML file:

    renames:      # applied to the file names and texts of the first recording
      - {from: REGEX, to: TEXT, reason: why}
    differences:  # printed lines that are accepted, by regular expression
      - {line: REGEX, reason: why}
"""

import argparse
import csv
import difflib
import importlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

COMMANDS = Path(__file__).with_suffix(".yaml")
LIMIT = 180  # seconds of one command, which is then killed by SIGALRM (exit code -14)
# Imported once; each command then runs in a fork and imports only the package itself.
LIBRARIES = [
    "accelerate", "datasets", "evaluate", "h5py", "matplotlib.pyplot", "openslide", "peft",
    "PIL.Image", "pyarrow.parquet", "safetensors.torch", "scipy.optimize", "tifffile", "torch",
    "torchvision", "transformers.models.clip.modeling_clip", "typer",
]  # fmt: skip


# --------------------------------------------------------------------------------------- record


def read_commands(path: Path = COMMANDS) -> dict[str, list[str]]:
    """The arguments of each command, by its name, in the order in which they run."""
    commands = {}
    for entry, content in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        several = content if isinstance(content, dict) else {"each": [""], "run": content}
        for word in several["each"]:
            name, text = (s.replace("{each}", word) for s in (entry, several["run"]))
            commands[name] = shlex.split(text.replace("{output}", f"outputs/{name}"))
    return commands


def record(
    repository: Path, output_dir: Path, inputs: Path | None = None, only: str = ""
) -> dict[str, Any]:
    """Run the commands on the package of a repository.

    Args:
        repository: A checkout that holds `hf_glovlm/`.
        output_dir: New or empty folder; takes `recording.json`, `inputs/`, and for each command
            `outputs/NAME/`, `printed/NAME.stdout` and `printed/NAME.stderr`.
        inputs: An earlier recording whose inputs are used, so that both recordings have the same.
        only: Regular expression; commands whose name does not match are left out.

    Returns:
        The content of `recording.json`.
    """
    repository, folder = repository.resolve(), output_dir.resolve()
    if not (repository / "hf_glovlm").is_dir():
        raise SystemExit(f"error: {repository} holds no package hf_glovlm.")
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"error: {folder} is in use: give a new or an empty folder.")
    home = folder / "home"
    for place in ("outputs", "printed", "home/tmp"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    if inputs is not None:
        shutil.copytree(inputs / "inputs", folder / "inputs")
    commands = {name: run for name, run in read_commands().items() if re.search(only, name)}
    plan = {
        "folder": str(folder),
        "repository": str(repository),
        "commands": {name: {"arguments": arguments} for name, arguments in commands.items()},
    }
    write_json(folder / "recording.json", plan)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(repository),
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "HF_HOME": str(home / "huggingface"),
        "GLOVLM_CACHE": str(home / "features"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "COLUMNS": "100",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }
    # -P: this script's folder is not on the path of what is recorded.
    worker = [sys.executable, "-P", str(Path(__file__).resolve()), "worker"]
    subprocess.run(worker, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=True)
    shutil.rmtree(home)  # caches
    done: dict[str, Any] = json.loads((folder / "recording.json").read_text())
    return done


def run_worker() -> None:
    """Run the planned commands in this process's folder, each in a fork of its own."""
    recording = json.loads(Path("recording.json").read_text())
    start = time.perf_counter()
    for name in LIBRARIES:
        importlib.import_module(name)
    if not Path("inputs").exists():
        printed = Path("printed/inputs")
        code = in_fork(draw_inputs, printed)
        if code:
            raise SystemExit(f"error: no inputs: {printed.with_suffix('.stderr').read_text()}")
        for path in printed.parent.glob("inputs.*"):
            path.unlink()
    for i, (name, command) in enumerate(recording["commands"].items(), 1):
        begun = time.perf_counter()

        def run(command: Mapping[str, Any] = command) -> int:
            return run_command(command["arguments"], recording["repository"])

        command["exit_code"] = in_fork(run, Path("printed") / name)
        command["seconds"] = round(time.perf_counter() - begun, 2)
        total = len(recording["commands"])
        code, seconds = command["exit_code"], command["seconds"]
        print(f"{i}/{total} {name}: exit code {code}, {seconds:.1f} s", flush=True)
    recording["seconds"] = round(time.perf_counter() - start, 1)
    write_json(Path("recording.json"), recording)


def in_fork(work: Callable[[], int | None], printed: Path) -> int:
    """The exit code of some work in a fork of this process, its streams kept in two files."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: Any = 1
    try:
        signal.alarm(LIMIT)
        for stream, ending in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{printed}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, stream)
        seed_everything()
        code = work() or 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # as Python does at the end of a program
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def seed_everything() -> None:
    """Start each command from the same random state."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def draw_inputs() -> None:
    """Make the data of all commands."""
    sys.path.append(str(COMMANDS.parent))
    from record_inputs import make_inputs

    make_inputs(Path("inputs"))


def run_command(arguments: Sequence[str], repository: str) -> int:
    """One command, as the entry point runs it."""
    sys.argv = ["glovlm", *arguments]
    from hf_glovlm import __file__ as origin
    from hf_glovlm.cli import main

    if not Path(origin).is_relative_to(repository):
        raise RuntimeError(f"Expected the package of {repository}, found {origin}.")
    return main(list(arguments))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------- what is compared

# float32 keeps 24 bits (6e-8 relative). Sums in another order move the last few of them, and a few
# optimiser steps multiply that; a change of method, seed or data moves far more than this.
RTOL, ATOL = 1e-5, 1e-6
LEVELS = 1  # of 255: where such a float is rounded to a pixel
MASKS = [  # in texts, after the paths
    (r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?", "<date>"),
    (r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?=,? ?(?:s|ms|seconds?|minutes?|hours?|[kMG]i?B)\b)", "<size>"),
    (r"(?<![\w.])\d+\.\d+\.\d+(?:[.+]\w+)*", "<version>"),
    (r"\S+\.py:\d+|File \"[^\"]+\", line \d+, in \S+", "<code>"),  # of a warning, of a traceback
    (r"^(\| [\w ]+, (?:s|MiB)) \| [\d.]+ \|$", r"\1 | <size> |"),  # a row of a card
    (r"^(README\.md|results\.json) +[\d,]+$", r"\1  <size>"),  # files that hold times
    (r"^(speed_ratio|milliseconds) +[\d.]+$", r"\1  <size>"),
    (r"(?<=\S)[ \u2500]{2,}", "  "),  # a column is as wide as its longest path
]
MASKED_PLACES = re.compile(  # in JSON, YAML and tables
    r"\.(timing|environment|(median_|milli)?seconds|speed_ratio|created|last_used|commit"
    r"|peak_memory_mib|cache_megabytes|files\.(README\.md|results\.json))$"
    r"|^cache-list.*\.size$"  # of files that hold when they were written
)
DECIMAL = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]?\d+))(?![\w.])")
CODE = ".py"  # remote code in a model's folder: compared only when asked for
MOST = 120  # characters of a value that are printed
IMAGES = (".png", ".jpg", ".tiff")


class Pixels(NamedTuple):
    """An image."""

    values: np.ndarray[Any, Any]


class Lines(list[str]):
    """A text."""


@dataclass
class Expected:
    """Declared changes, and how often each was met."""

    renames: list[Mapping[str, str]] = field(default_factory=list)
    differences: list[Mapping[str, str]] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path | None) -> "Expected":
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
        expected = cls(**(values or {}))
        for entry in [*expected.renames, *expected.differences]:
            if set(entry) not in ({"from", "to", "reason"}, {"line", "reason"}):
                raise SystemExit(
                    f"error: {path}: expected from, to, reason or line, reason: {entry}."
                )
        return expected

    def rename(self, text: str) -> str:
        """A text of the first recording as the second is expected to have it."""
        for entry in self.renames:
            text, n = re.subn(entry["from"], entry["to"], text)
            self.met[entry["from"]] += n
        return text

    def accepts(self, line: str) -> bool:
        """Whether a difference was declared."""
        for entry in self.differences:
            if re.search(entry["line"], line):
                self.met[entry["line"]] += 1
                return True
        return False


@dataclass
class Recording:
    """A folder that `record` wrote."""

    folder: Path
    root: str  # where it was when it was recorded
    repository: str
    commands: dict[str, dict[str, Any]]
    rename: Callable[[str], str] = str

    @classmethod
    def read(cls, folder: Path, rename: Callable[[str], str] = str) -> "Recording":
        file = folder / "recording.json"
        if not file.is_file():
            raise SystemExit(f"error: {folder} is no recording: it has no {file.name}.")
        plan = json.loads(file.read_text())
        return cls(folder, plan["folder"], plan["repository"], plan["commands"], rename)

    def files(self) -> dict[str, Path]:
        """Every file by its name in the report: `NAME/...`, `NAME stdout`, `inputs/...`."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            if path.is_file() and parts[0] in ("outputs", "inputs", "printed"):
                name = "/".join(parts[1:] if parts[0] == "outputs" else parts)
                if parts[0] == "printed":
                    name = " ".join(parts[1].rsplit(".", 1))
                found[self.rename(name)] = path
        return found

    def last_error(self, name: str) -> str:
        """The last line that a command wrote on the error stream."""
        lines = (self.folder / "printed" / f"{name}.stderr").read_text().splitlines()
        return self.plain(lines[-1]) if lines else ""

    def plain(self, text: str) -> str:
        """A text without what may differ: paths, dates, times, sizes of memory, versions."""
        for place, name in ((self.root, "<recording>"), (self.repository, "<repository>")):
            text = text.replace(place, name)
        text = self.rename(text)
        for pattern, name in MASKS:
            text = re.sub(pattern, name, text)
        return text.rstrip()

    def value(self, path: Path) -> Any:
        """The content of a file, for comparing."""
        return self.normalise(read_file(path))

    def normalise(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, Lines):
            return Lines(mask_seconds(map(self.plain, value)))
        if isinstance(value, list | tuple) and not isinstance(value, Pixels):
            return [self.normalise(entry) for entry in value]
        if isinstance(value, dict):
            return {self.plain(str(k)): self.normalise(v) for k, v in value.items()}
        return value


def mask_seconds(lines: Iterable[str]) -> Iterator[str]:
    """Mask the columns of Markdown tables whose heading has seconds."""
    timed: list[int] = []
    for line in lines:
        cells = line.split(" | ")
        if not line.startswith("|"):
            timed = []
        elif any("seconds" in cell for cell in cells):
            timed = [k for k, cell in enumerate(cells) if "seconds" in cell]
        elif timed:
            masked = ("<size>" if k in timed else cell for k, cell in enumerate(cells))
            line = " | ".join(masked)
        yield line


def read_file(path: Path) -> Any:
    """The content of a file as mappings, lists, scalars, arrays, images or lines of text."""
    ending, raw = path.suffix.lower(), path.read_bytes()
    if ending in IMAGES:
        from PIL import Image

        with suppress(OSError), Image.open(io.BytesIO(raw)) as image:
            return {"mode": image.mode, "pixels": Pixels(np.asarray(image))}
        return sha256(raw).hexdigest()  # torn on purpose
    if ending == ".safetensors":
        from safetensors.numpy import load

        return load(raw)
    if ending == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pydict()
    if ending == ".h5":
        return read_h5(path)
    if ending == ".onnx":
        return describe_graph(raw)
    if ending == ".npz":
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return dict(arrays)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return sha256(raw).hexdigest()
    if ending in (".json", ".geojson", ".stdout"):
        with suppress(json.JSONDecodeError):
            return json.loads(text)
    if ending == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if ending in (".yaml", ".yml"):
        return yaml.safe_load(text)
    if ending == ".csv":
        header, *rows = csv.reader(io.StringIO(text))
        return {name: [row[k] for row in rows] for k, name in enumerate(header)}
    return Lines(text.splitlines())


def read_h5(path: Path) -> dict[str, Any]:
    """Data sets and attributes."""
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        for key, value in item.attrs.items():
            plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            found[f"{name}@{key}"] = plain
        if isinstance(item, h5py.Dataset):
            values = item[()]
            text = np.asarray(values).dtype.kind in "OS"
            found[name] = [str(v) for v in np.ravel(values)] if text else np.asarray(values)

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


def describe_graph(raw: bytes) -> dict[str, Any]:
    """Inputs and outputs of an ONNX graph, its operators' version, and what it says of itself."""
    import onnx

    model = onnx.load_from_string(raw)

    def ports(values: Any) -> dict[str, Any]:
        return {
            v.name: [v.type.tensor_type.elem_type]
            + [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    return {
        "inputs": ports(model.graph.input),
        "outputs": ports(model.graph.output),
        "opset": {entry.domain: entry.version for entry in model.opset_import},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


# ------------------------------------------------------------------------------------- compare


def differences(place: str, before: Any, after: Any, code: bool = False) -> Iterator[str]:
    """Each difference of two normalised values in one line that begins with its place."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = f"{place}.{key}"
            if key not in before or key not in after:
                side, value = ("first", before) if key in before else ("second", after)
                yield f"{inner}: only in the {side} recording ({short(value[key])})"
            elif not MASKED_PLACES.search(inner) and (code or not key.endswith(CODE)):
                yield from differences(inner, before[key], after[key], code)
    elif isinstance(before, Pixels) and isinstance(after, Pixels):
        yield from array_differences(place, before.values, after.values, LEVELS)
    elif isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        yield from array_differences(place, before, after)
    elif isinstance(before, Lines) and isinstance(after, Lines):
        yield from line_differences(place, before, after, code)
    elif isinstance(before, list) and isinstance(after, list):
        yield from list_differences(place, before, after, code)
    elif not same(before, after):
        yield f"{place}: {change(before, after)}"


def same(before: Any, after: Any) -> bool:
    """Whether two scalars are equal; floats, and those within texts, within the tolerance."""
    numbers = (int, float)
    if isinstance(before, bool) or isinstance(after, bool):
        return before is after
    if isinstance(before, numbers) and isinstance(after, numbers):
        if isinstance(before, int) and isinstance(after, int):
            return before == after
        both = math.isnan(before) and math.isnan(after)
        return both or math.isclose(before, after, rel_tol=RTOL, abs_tol=ATOL)
    if isinstance(before, str) and isinstance(after, str) and before != after:
        parts = DECIMAL.split(before), DECIMAL.split(after)
        if parts[0][::2] != parts[1][::2]:
            return False
        pairs = zip(parts[0][1::2], parts[1][1::2], strict=True)
        return all(same(float(x), float(y)) for x, y in pairs)
    return type(before) is type(after) and bool(before == after)


def array_differences(
    place: str, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any], levels: int = 0
) -> Iterator[str]:
    shapes = [f"{a.dtype}{list(a.shape)}" for a in (before, after)]
    if shapes[0] != shapes[1]:
        yield f"{place}: {shapes[0]} -> {shapes[1]}"
        return
    if before.dtype.kind not in "iufb":
        other, by = before != after, ""
    else:
        x, y = before.astype(np.float64), after.astype(np.float64)
        exact = before.dtype.kind != "f"
        rtol, atol = (0.0, float(levels)) if exact else (RTOL, ATOL)
        other = ~np.isclose(y, x, rtol=rtol, atol=atol, equal_nan=True)
        by = f", by at most {np.nanmax(np.abs(x - y)):.2g}" if other.any() else ""
    if other.any():
        yield f"{place}: {int(other.sum())} of {other.size} values differ{by}"


def list_differences(place: str, before: list[Any], after: list[Any], code: bool) -> Iterator[str]:
    """Up to three entries that differ; of more, how many and the first."""
    if len(before) != len(after):
        yield f"{place}: {len(before)} entries -> {len(after)} ({change(before, after)})"
        return
    pairs = enumerate(zip(before, after, strict=True))
    found = [[*differences(f"{place}[{i}]", x, y, code)] for i, (x, y) in pairs]
    found = [lines for lines in found if lines]
    if len(found) > 3:
        yield f"{place}: {len(found)} of {len(before)} entries differ; {found[0][0]}"
        return
    for lines in found:
        yield from lines


def line_differences(place: str, before: Lines, after: Lines, code: bool) -> Iterator[str]:
    def plain(lines: Lines) -> list[str]:  # sizes of code that is listed
        return lines if code else [re.sub(r"(\S+\.py)  [\d,]+", r"\1", line) for line in lines]

    one, two = plain(before), plain(after)
    blocks = difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes()
    for kind, i, end_i, j, end_j in blocks:
        if kind == "replace" and end_i - i == end_j - j:
            for k, (x, y) in enumerate(zip(one[i:end_i], two[j:end_j], strict=True)):
                if not same(x, y):
                    yield f"{place}, line {i + k + 1}: {change(x, y)}"
        elif kind != "equal":
            for k, line in enumerate(one[i:end_i]):
                yield f"{place}, line {i + k + 1}: {short(line)} -> nothing"
            for line in two[j:end_j]:
                yield f"{place}, after line {end_i}: nothing -> {short(line)}"


def change(before: Any, after: Any) -> str:
    """Two values in one line; of long ones what lies around the first difference."""
    texts = [repr(before), repr(after)]
    shorter = min(map(len, texts))
    same_until = next((i for i in range(shorter) if texts[0][i] != texts[1][i]), shorter)
    start = max(same_until - 30, 0)
    if max(map(len, texts)) > MOST and start:
        texts = [f"...{text[start:]}" for text in texts]
    return " -> ".join(cut(text) for text in texts)


def short(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, np.ndarray | Pixels):
        array = value.values if isinstance(value, Pixels) else value
        return f"{array.dtype}{list(array.shape)}"
    return cut(repr(value))


def cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def compare(
    before: Recording, after: Recording, code: bool = False, only: str = ""
) -> Iterator[str]:
    """Every difference of two recordings in one line: exit codes, inputs, then files.

    Of a command with another exit code only this and the last line of its errors is reported.

    Args:
        before: The first recording.
        after: The second recording.
        code: Whether remote code is compared, too.
        only: Regular expression; commands whose name does not match are left out.
    """
    files = before.files(), after.files()
    commands = [*before.commands, *(n for n in after.commands if n not in before.commands)]
    commands = [name for name in commands if re.search(only, name)]
    compared = ["inputs"]
    for name in commands:
        if name not in before.commands or name not in after.commands:
            side = "first" if name in before.commands else "second"
            yield f"{name}: recorded only in the {side} recording"
            continue
        codes = [of.commands[name]["exit_code"] for of in (before, after)]
        if codes[0] == codes[1]:
            compared.append(name)
        else:
            ends = [of.last_error(name) for of in (before, after)]
            yield f"{name}: exit code {codes[0]} -> {codes[1]} ({change(*ends)})"
    place = {name: k for k, name in enumerate(compared)}
    names = [(place.get(re.split(r"[/ ]", n)[0], -1), n) for n in {*files[0], *files[1]}]
    for _, name in sorted(entry for entry in names if entry[0] >= 0):
        if name not in files[0] or name not in files[1]:
            side = "first" if name in files[0] else "second"
            yield f"{name}: only in the {side} recording"
        elif code or not name.endswith(CODE):
            yield from differences(
                name, before.value(files[0][name]), after.value(files[1][name]), code
            )


def changed_code(before: Recording, after: Recording) -> Counter[str]:
    """In how many places each file of remote code differs."""
    files = before.files(), after.files()
    shared = [name for name in files[0] if name.endswith(CODE) and name in files[1]]
    return Counter(
        Path(name).name
        for name in shared
        if files[0][name].read_bytes() != files[1][name].read_bytes()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run the commands and keep what they leave")
    recorder.add_argument("--repository", type=Path, required=True, help="a checkout")
    recorder.add_argument("--output-dir", type=Path, required=True, help="a new or empty folder")
    recorder.add_argument("--inputs", type=Path, help="a recording whose inputs are used")
    recorder.add_argument("--only", default="", metavar="REGEX", help="names of commands")
    comparer = commands.add_parser("compare", help="print each difference of two recordings")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    comparer.add_argument("--only", default="", metavar="REGEX", help="names of commands")
    comparer.add_argument("--expected", type=Path, help="YAML of declared changes")
    comparer.add_argument("--code", action="store_true", help="also compare remote code")
    commands.add_parser("worker")  # of record
    given = parser.parse_args(arguments)
    if given.command == "worker":
        run_worker()
        return 0
    if given.command == "record":
        done = record(given.repository, given.output_dir, given.inputs, given.only)
        print(f"{len(done['commands'])} commands recorded in {done['seconds']:.0f} seconds")
        return 0

    expected = Expected.read(given.expected)
    before, after = Recording.read(given.before, expected.rename), Recording.read(given.after)
    found = 0
    for line in compare(before, after, given.code, given.only):
        if not expected.accepts(line):
            found += 1
            print(line)
    for name, n in sorted(changed_code(before, after).items()):
        print(f"information: remote code {name} differs in {n} places", file=sys.stderr)
    for entry in [*expected.renames, *expected.differences]:
        pattern = entry.get("from", entry.get("line", ""))
        print(
            f"information: expected, {expected.met[pattern]} times: {pattern} ({entry['reason']})",
            file=sys.stderr,
        )
    shared = [n for n in before.commands if n in after.commands and re.search(given.only, n)]
    print(f"{len(shared)} commands compared, {found} differences", file=sys.stderr)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
