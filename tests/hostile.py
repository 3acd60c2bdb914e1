"""Hostile input: seeded YAML files, command lines and tables of images, run in this process.

Whatever a person may hand over by mistake or in bad faith ends in a sentence within some seconds:
exit code 0, 1 or 2, no traceback, no hang. Everything is drawn from a seed, so that a case that
fails is named by its number. Nothing here writes outside of the folder that it is given.
"""

import contextlib
import io
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 20  # seconds of one command
MEMORY = 6 * 2**30  # bytes beyond what this process maps already

TRAIN = {
    "data": "{nowhere}", "output_dir": "{out}", "backbone": "mini", "method": "lora", "shots": 4,
    "seed": 1, "lr": "1e-3", "epochs": 3, "weight_decay": 0.1, "batch_size": 8, "prompts": "auto",
    "method_config": {"rank": 4}, "conformal": "aps", "calibration_groups": 2, "alpha": 0.1,
    "prior": {"a": 0.2, "b": 0.8}, "device": "cpu", "mixed_precision": "no", "n_resamples": 100,
    "test_fraction": 0.5, "stain": "PAS", "tracker": None, "augment": True, "max_risk": 0.1,
}  # fmt: skip
MIL = {
    "features": "{nowhere}", "labels": "{nowhere}", "output_dir": "{out}", "aggregator": "abmil",
    "aggregator_config": {"width": 16}, "epochs": 2, "lr": 1e-4, "folds": 3, "max_tiles": 100,
    "test_fraction": 0.3, "batch_size": 1, "clip_norm": 1.0, "seed": 0,
}  # fmt: skip
STUDY = {
    "data": "{nowhere}", "methods": ["prototype", {"name": "lora", "label": "x", "epochs": 2}],
    "backbones": ["mini"], "shots": [2, 4], "draws": 2, "reference": "prototype", "seed": 0,
}  # fmt: skip
SLIDE = {"model": "{nowhere}", "slides": ["{nowhere}"], "output_dir": "{out}", "overlap": 0.1}

SCALARS: list[Any] = [
    "", " ", "-1", "0", "-0.0", "1e400", ".nan", "-.inf", "9" * 400, "010", "0x10", "0o17", "1_000",
    "no", "yes", "~", "null", "2026-11-30", "12:30:45", "=", "<<", "a=b=c", "a=,b=", "é", "\u200b",
    "🦠", "\u202e", "..", "../../x", "/dev/null/x", "con", "cuda:7", "cuda:x", "mps", "meta", "[",
    "{", "&a", "*a", "!!python/object:os.system", "!x", "%", "`", "@", "|", ">", "'", '"', "#",
    "-", "?", ":", "{{", "}}", "{0}", "%s", "$HOME", "~nobody", "\t", "\\", "x" * 5000, "a/b/c",
    "http://127.0.0.1:1/x", "file:///x", "hf://x", "1 2", "1,5", "1e-3", "True", "NaN", "inf",
    str(2**31), str(2**63), str(2**64), "-9223372036854775809", "1e18", "0.1", "0.999999999999",
]  # fmt: skip
NINE = "[" + ", ".join(["*{0}"] * 9) + "]"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} {NINE.format(before)}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
BLOCKS = [
    BOMB,
    "x: &x [*x]\n", "x: &x {y: *x}\n", "[" * 5000, "{a: " * 3000, "- " * 4000, "? " * 500,
    "a: !!python/object/apply:os.system ['true']\n", "a: !!binary x\n", "a: !!set {x, y}\n",
    "a: !!timestamp x\n", "a: !!float x\n", "a: !!int 0b2\n", "<<: [1, 2]\n", "a: 1\na: 2\n",
    "? [a, b]\n: 1\n", "? {a: b}\n: 1\n", "1: 2\n", "null: 1\n", ".nan: 1\n", "- a\n- b\n", "a\n",
    "--- a\n--- b\n", "%YAML 9.9\n---\na: 1\n", "%TAG ! tag:x,2000:\n---\n!a b\n", "a:\tb\n",
    "\ta: b\n", "a: b: c\n", "a: 'x\n", 'a: "\\q"\n', 'a: "\\U0011ffff"\n', "a: |99\n  x\n",
    "\x00", "a: \x07\n", "\ufeff\ufeffa: 1\n", "a: \ud7ff\n", "", "\n\n#\n", "...\n", "---\n",
    "a: {b: {c: {d: [1, {e: 2}]}}}\n", f"a: {'9' * 5000}\n", f"a: 1{'e9' * 3}\n", "a: 1:" * 999,
]  # fmt: skip
BYTES = [b"\xff\xfea\x00", b"\x80\x81", b"\xc3\x28: 1\n", b"\x89PNG\r\n\x1a\n", bytes(4096)]
OPTIONS = {
    "train": ("--data --output-dir --backbone --method --shots --seed --episodes --draw"
              " --shots-from --prompts --stain --validation-shots --test-fraction --loss --set"
              " --epochs --lr"
              " --weight-decay --batch-size --max-steps --calibration-groups --conformal --alpha"
              " --max-risk --prior --mixed-precision --accumulate --clip-norm --tracker --device"
              " --n-resamples --config"),
    "mil": ("--features --labels --output-dir --aggregator --set --epochs --lr --weight-decay"
            " --batch-size --seed --folds --test-fraction --validation-fraction --max-tiles"
            " --clip-norm --mixed-precision --device --n-resamples --config"),
    "slide": ("--output-dir --mpp --tile-mpp --tile-size --overlap --min-tissue --objects --margin"
              " --aggregator --top --heatmap-class --threshold --cases --case --workers"
              " --batch-size --device"),
    "study": "--config --output-dir --workers",
    "evaluate": "--data --output --predictions --split --batch-size --device --n-resamples",
    "predict": "--output --mpp --batch-size --device",
    "explain": "--output-dir --method --class --text --masks --window --opacity --device",
    "explain-check": "--data --masks --method --window --device",
    "data check": "", "data get": "", "datasets": "--json", "methods": "--json",
    "data crops": ("--output-dir --mpp --margin --label-property --colours --slide-id --patient-id"
                   " --min-extent --cases --scene --classes --exclude --origin"),
    "data caption": "--model --question --output --batch-size --max-new-tokens --device",
    "card": "--output", "push": "--branch --reason", "export": "--output-dir --format --data",
    "backbones convert": "--output-dir --kind --revision", "backbones modules": "--towers --last",
    "cache clear": "", "cache list": "--json", "bench": "--backbone --data --output --compare",
    "nothing": "--x",
}  # fmt: skip
READ = {"--data", "--masks", "--objects", "--cases", "--features", "--labels", "--model"}
READ |= {"--aggregator", "--episodes", "--backbone", "--prompts", "--compare"}
ARGUMENTS = {"slide": 2, "evaluate": 1, "predict": 2, "explain": 2, "explain-check": 1}
ARGUMENTS |= {"data check": 1, "data get": 1, "data crops": 2, "data caption": 1, "card": 1}
ARGUMENTS |= {"push": 2, "export": 1, "backbones convert": 1, "backbones modules": 1}
ARGUMENTS |= {"cache clear": 1, "bench": 1, "train": 0, "mil": 0, "study": 0}
PLACES = {"data", "features", "labels", "output_dir"}
NEVER = {"cache clear": {""}}  # an empty key clears all


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it should: its number, the command line, what came."""

    number: int
    arguments: list[str]
    reason: str


class Hostile:
    """Maker of hostile cases in one folder.

    Args:
        folder: Where everything is written, and the working folder of the commands.
        good: Existing inputs by kind, `model`, `data`, `image`, that some cases get.
    """

    def __init__(self, folder: Path, good: dict[str, Path]) -> None:
        self.folder, self.good = folder, good
        self.nowhere = folder / "nowhere"
        (folder / "empty").mkdir()
        (folder / "odd").mkdir()
        (folder / "odd" / "results.json").write_text("{")
        (folder / "odd" / "config.json").write_text('{"id2label": [1]}')
        (folder / "odd" / "config.yaml").write_text("[")
        (folder / "odd" / "study.json").write_text("1")
        (folder / "text.txt").write_text("text")
        os.mkfifo(folder / "pipe")
        (folder / "device").symlink_to("/dev/zero")
        (folder / "loop").symlink_to("loop")
        with (folder / "sparse.tif").open("wb") as stream:
            stream.truncate(2**33)
        for name, content in zip(("a.png", "a.svs", "a.h5", "a.geojson"), BYTES, strict=False):
            (folder / "odd" / name).write_bytes(content)
        places = ("nowhere", "empty", "odd", "text.txt", "pipe", "device", "loop", "sparse.tif")
        self.places = [folder / name for name in places]
        self.places += [folder / "odd" / name for name in ("a.png", "a.svs", "a.h5", "a.geojson")]

    def case(self, number: int) -> list[str]:
        """Arguments of a case; the same for the same number."""
        rng = random.Random(f"hostile {number}")
        make: Callable[[random.Random], list[str]] = rng.choice([self._yaml, self._line])
        arguments = make(rng)
        # A NUL cannot be in an argument; what a shell cannot hand over is no case.
        return [part.replace("\x00", "") for part in arguments]

    def _yaml(self, rng: random.Random) -> list[str]:
        command, base = rng.choice([("train", TRAIN), ("mil", MIL), ("study", STUDY)])
        path = self.folder / f"case-{rng.randrange(50)}.yaml"
        kind = rng.random()
        if kind < 0.15:
            path.write_bytes(rng.choice(BYTES))
        elif kind < 0.35:
            text = rng.choice(BLOCKS)
            if rng.random() < 0.5:
                text = self._write(base) + text
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        elif kind < 0.5:
            text = self._write(base)
            for _ in range(rng.randrange(1, 4)):
                i = rng.randrange(len(text))
                text = (
                    text[:i]
                    + rng.choice(["\t", ":", "&", "*", "\x00", "[", "'", ""])
                    + text[i + 1 :]
                )
            path.write_text(text)
        else:
            path.write_text(self._write(self._spoil(base, rng)))
        out = ["--output-dir", str(self.folder / "out")] if command == "study" else []
        return [command, "--config", str(path), *out]

    def _write(self, values: Any) -> str:
        import yaml

        text: str = yaml.safe_dump(values, allow_unicode=True)
        return text.replace("'{nowhere}'", str(self.nowhere)).replace(
            "'{out}'", str(self.folder / "out")
        )

    def _spoil(self, base: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        values = dict(base)
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice([*values, "unknown", "Lr", "méthode", ""])
            value = self._value(rng)
            # Nothing is read or written elsewhere, so no place becomes another text.
            if key not in PLACES or not isinstance(value, str):
                values[key] = value
        return values

    def _value(self, rng: random.Random) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: rng.choice(SCALARS),
            lambda: rng.choice([True, False, None, 0, -1, 1.5, 1e308, float("nan"), float("inf")]),
            lambda: rng.choice([2**31, 2**63, 10**30, -(10**9), 1e-320]),
            lambda: [rng.choice(SCALARS) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(SCALARS): rng.choice([1, -1, None, "x", [1]]) for _ in range(2)},
            lambda: [[[]]],
        ]
        return rng.choice(kinds)()

    def _line(self, rng: random.Random) -> list[str]:
        command = rng.choice([*OPTIONS])
        options = OPTIONS[command].split()
        line = command.split()
        for _ in range(ARGUMENTS.get(command, rng.randrange(2))):
            line.append(self._place(rng))
        if command in NEVER:
            line = [*command.split(), "zz" + rng.choice(SCALARS)[:50]]
        for _ in range(rng.randrange(4)):
            if options:
                name = rng.choice(options)
                line += self._option(name, rng)
        for name in ("--output-dir", "--output", "--data", "--masks", "--config", "--model"):
            if name in options and name not in line and rng.random() < 0.8:
                line += self._option(name, rng)
        if rng.random() < 0.1:
            line.insert(
                rng.randrange(len(line) + 1), rng.choice(["--", "-", "--help", "-x", "--Lr"])
            )
        return line

    def _option(self, name: str, rng: random.Random) -> list[str]:
        if name == "--json":
            return [name]
        if name in ("--output-dir", "--output", "--predictions"):
            places = [self.folder / "out", *self.places, self.folder / "out" / ("y" * 300)]
            return [name, str(rng.choice(places))]
        if name == "--config":
            return self._yaml(rng)[1:3] if rng.random() < 0.5 else [name, self._place(rng)]
        if name in READ:
            return [name, self._place(rng)]
        if name == "--set":
            return [
                name,
                f"{rng.choice(['C', 'rank', 'x', ''])}{rng.choice(['=', ''])}"
                + rng.choice(SCALARS),
            ]
        return [name, rng.choice(SCALARS)]

    def _place(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.25:
            return str(rng.choice([*self.good.values()]))
        return str(rng.choice(self.places)) if kind < 0.8 else rng.choice(SCALARS)

    def run(self, number: int) -> Failure | None:
        """Run a case here; what was wrong with its end, if anything."""
        from hf_glovlm.cli import main

        arguments, printed = self.case(number), io.StringIO()
        here = Path.cwd()
        os.chdir(self.folder)
        start = time.monotonic()
        try:
            with (
                _alarm(LIMIT),
                _memory(MEMORY),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                code = main(arguments)
        except BaseException:
            return Failure(number, arguments, traceback.format_exc()[-1500:])
        finally:
            os.chdir(here)
        text = printed.getvalue()
        if time.monotonic() - start > LIMIT:
            return Failure(number, arguments, f"took more than {LIMIT} s")
        if code not in (0, 1, 2):
            return Failure(number, arguments, f"exit code {code}: {text[-500:]}")
        if "memory does not suffice" in text:
            return Failure(number, arguments, f"more than {MEMORY >> 30} GiB: {text[-500:]}")
        if "Traceback" in text:
            return Failure(number, arguments, text[-1500:])
        if code == 2 and not any(line.startswith("error: ") for line in text.splitlines()):
            return Failure(number, arguments, f"no sentence: {text[-500:]}")
        return None


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise in the middle of what hangs."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"hangs: no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, where a library goes on after it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory(most: int) -> Iterator[None]:
    """Let what takes the whole memory fail here, not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ------------------------------------------------------------------------------- tables of images

NAMES = ["1.png", "2.png", "x/3.png", "x/4.png", "é.png", "6.PNG"]
CELLS = [
    "a", "b", "é", "", " ", "NA", "nan", "0,25", "0.25", "1,250", "-1", "1e400", "P1", "p1", "P01",
    "train", "Test", "dev", "eval", "\u200b", "a\u0301", "\u202e", "🦠", "\ufeff", "x" * 1000,
    "y" * 140_000, '"', '""', '"open', "a,b", "a;b", "a\tb", "a|b", "a\nb", "a\r\nb", "\\", "\x00",
    "../1.png", "/1.png", "C:\\1.png", ".\\1.png", "./x/3.png", "3.png", "3", "9" * 400, "\x85",
    "\u2028", "\x1a", "=1+1", "{}", "[1]", "null", "1.png", "2.png", "x\\4.png", "~", "a/b/c",
]  # fmt: skip
COLUMNS = [
    "file_name", "label", "split", "patient_id", "mpp", "filename", "file", "image", "path",
    "class", "diagnosis", "Patient ID", "patient", "subject", "slide", "case_id", "Label", "lable",
    "", " ", "\ufeffsplit", "FILE NAME", "caption", "x" * 300, "a;b", "a,b", "stain", "group_id",
]  # fmt: skip
HARMLESS = ["patient_id", "stain", "caption", "note", "x" * 300, "a;b", "é"]
RULES = [
    None,
    None,
    None,
    "parent",
    "(",
    "(.)",
    "(P\\d+)",
    "((a|a)+)+$",
    "(?P<patient>\\w)",
    "x" * 600,
]


class HostileTables:
    """Maker of hostile tables beside a few images.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        self.folder = folder
        for i, name in enumerate(NAMES):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 255 - 40 * i, 90)).save(path)

    def write(self, number: int) -> tuple[Path, dict[str, Any], dict[str, str]]:
        """Write the table of a case; its path, the columns to ask for, labels known by name."""
        import json

        rng = random.Random(f"table {number}")
        sane = rng.random() < 0.5
        header = ["file_name", "label"] if sane else []
        among = rng.choice([COLUMNS, HARMLESS]) if sane else COLUMNS
        header += rng.choices(among, k=rng.randrange(0 if sane else 1, 4))
        rows = []
        for i in range(rng.randrange(8)):
            row = [rng.choice(CELLS) for _ in header]
            if sane:
                row[:2] = [NAMES[i % len(NAMES)], "ab"[i % 2]]
            if rng.random() < 0.1:  # ragged
                row = rng.choice([row[:-1], [*row, rng.choice(CELLS)], []])
            rows.append(row)
        separator = rng.choice(",,,;\t| ")
        newline = rng.choice(["\n", "\n", "\r\n", "\r"])
        lines = [
            separator.join(map(self._quoted(rng, separator), cells)) for cells in [header, *rows]
        ]
        ends = [newline if rng.random() < 0.95 else "\r\n" for _ in lines]
        text = "".join(line + end for line, end in zip(lines, ends, strict=True))
        suffix = rng.choice([".csv", ".csv", ".csv", ".tsv", ".jsonl"])
        if suffix == ".jsonl":
            pairs = [dict(zip(header, row, strict=False)) for row in rows]
            text = "\n".join(json.dumps(pair, ensure_ascii=rng.random() < 0.5) for pair in pairs)
        encoding = rng.choice(
            ["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le", "cp1252", "cp437"]
        )
        content = text.encode(encoding, "replace")
        changed = rng.choice([0, 0, 0, 1, 5]) if content else 0
        for _ in range(changed):
            place = rng.randrange(len(content))
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        for path in self.folder.glob("*.*"):
            if path.suffix in (".csv", ".tsv", ".jsonl"):
                path.unlink()
        path = self.folder / (rng.choice(["metadata", "metadata", "labels"]) + suffix)
        path.write_bytes(content)
        asked = {
            name: rng.choice(COLUMNS)
            for name in ("image_column", "label_column", "group_column")
            if rng.random() < 0.04
        }
        if rng.random() < 0.2 and (rule := rng.choice(RULES)):
            asked["group_from"] = rule
        clean = sane and not changed and not asked and len({*header}) == len(header)
        known = {row[0]: row[1] for row in rows if clean and len(row) > 1}
        return path, asked, known

    def _quoted(self, rng: random.Random, separator: str) -> Callable[[str], str]:
        careful = rng.random() < 0.7

        def quote(cell: str) -> str:
            if careful and any(c in cell for c in f'{separator}"\r\n'):
                return '"' + cell.replace('"', '""') + '"'
            return cell

        return quote

    def run(self, number: int) -> Failure | None:
        """Read and check a case; what was wrong with its end, if anything."""
        import logging

        from hf_glovlm.data import Columns, check_dataset, load_dataset
        from hf_glovlm.errors import GloVLMError

        path, asked, known = self.write(number)
        about = [str(number), path.name, str(asked)]
        logging.getLogger("hf_glovlm").disabled = True
        try:
            with _alarm(LIMIT), _memory(MEMORY):
                read = load_dataset(self.folder, columns=Columns(**asked))
                check_dataset(read)
        except GloVLMError as error:
            one_line = len(str(error)) < 5000
            return None if one_line else Failure(number, about, f"no sentence: {error}"[:500])
        except BaseException:
            return Failure(number, about, traceback.format_exc()[-1500:])
        finally:
            logging.getLogger("hf_glovlm").disabled = False
        for rows in read.values():
            labels = [rows.features["label"].names[k] for k in rows["label"]]
            for name, label in zip(rows["file_name"], labels, strict=True):
                if name not in NAMES or known.get(name, label) != label:
                    return Failure(number, about, f"another reading: {name} is {label}")
        return None
