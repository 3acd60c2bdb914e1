"""Hostile folders: seeded copies of a run in which files are missing, damaged, linked or lying.

Whatever reads one ends in a sentence or in success, and never looks at or touches what lies
outside of the folder that it was given. A case that fails is named by its number.
"""

import json
import math
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from hostile import BOMB, BYTES, Failure, _alarm

REASON = "These weights are random and were made by a test."
LIMIT = 60  # seconds of one case
HUGE = 10**30
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, HUGE, -HUGE, math.nan, math.inf, 2**63, "", "x", "..", "../../outside",
    "/etc/hostname", "\u202e", "x" * 10_000, "a\x00b", "é" * 300, [], [[]], [None], {}, {"": None},
    {"a": {"b": [1, {"c": HUGE}]}}, ["x"] * 100, "adaptation", "study", "mil", "évil\n---\nx: y",
    "{{ x }}", "<script>", "http://127.0.0.1:9/x", "file:///etc/hostname", "patient 4711",
]  # fmt: skip
DEEP = b"[" * 50_000
WIDE = b'{"a": [' + b"{}, " * 100_000 + b"{}]}"
SPOILT = [b"", b"{}", b"[]", b"null", b"1", b'"x"', DEEP, WIDE, b"\xff\xfe{", bytes(2000), *BYTES]
FILES = (
    "results.json", "config.yaml", "episodes.json", "predictions.parquet", "manifest.json",
    "identifiers.json", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
    "model/tokenizer_config.json", "model/processor_config.json", "model/heads.py",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "README.md",
)  # fmt: skip
INDEX = "model/model.safetensors.index.json"


class HostileFolders:
    """Maker of hostile runs.

    Args:
        run: A good run with a model and an adapter.
        data: Labelled images.
        folder: Where all is written.
    """

    def __init__(self, run: Path, data: Path, folder: Path) -> None:
        self.run_folder, self.data, self.folder = run, data, folder
        self.outside = folder / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.txt").write_text("secret-of-somebody-else")
        shutil.copyfile(run / "model/model.safetensors", self.outside / "secret.safetensors")
        shutil.copyfile(run / "results.json", self.outside / "secret.json")

    def make(self, number: int) -> tuple[Path, list[str], random.Random]:
        """A case: the folder, and what was done to it."""
        rng = random.Random(f"folder {number}")
        case = self.folder / f"case-{number}"
        shutil.copytree(self.run_folder, case)
        if rng.random() < 0.7:
            (case / "manifest.json").unlink()  # else its checksums would tell at once
        done = []
        ways = [
            self._remove, self._truncate, self._spoil, self._field, self._field, self._field,
            self._link, self._pipe, self._folder, self._extra, self._index, self._journal,
            self._code, self._yaml,
        ]  # fmt: skip
        for way in rng.choices(ways, k=rng.randrange(1, 4)):
            done.append(f"{way.__name__}: {way(case, rng)}")
        return case, done, rng

    def run(self, number: int) -> Failure | None:
        """Read a case in every way that a person may; what was wrong, if anything."""
        case, done, rng = self.make(number)
        before, opened = self._snapshot(), []
        name, read = rng.choice([*READERS.items()])
        words = [name, *done]
        printed, start = StringIO(), time.monotonic()
        try:
            with (
                _watched(self.outside, opened),
                _alarm(LIMIT),
                redirect_stdout(printed),
                redirect_stderr(printed),
            ):
                read(case, self)
        except BaseException as error:
            from hf_glovlm import GloVLMError

            if not isinstance(error, GloVLMError):
                return Failure(number, words, traceback.format_exc()[-1500:])
            if "\n" in str(error):
                return Failure(number, words, f"several lines: {error}")
        finally:
            shutil.rmtree(case, ignore_errors=True)
        if "Traceback" in printed.getvalue():
            return Failure(number, words, printed.getvalue()[-1500:])
        if time.monotonic() - start > LIMIT:
            return Failure(number, words, f"took more than {LIMIT} s")
        if self._snapshot() != before:
            return Failure(number, words, "something outside of the folder has changed")
        if opened and name in ("push", "clip"):
            return Failure(number, words, f"read outside of the folder: {opened}")
        return None

    def _snapshot(self) -> dict[str, bytes]:
        files = sorted(path for path in self.outside.rglob("*") if path.is_file())
        return {path.name: path.read_bytes() for path in files}

    # ------------------------------------------------------------------------- what is done

    def _file(self, case: Path, rng: random.Random) -> Path:
        files = [case / name for name in FILES if (case / name).is_file()]
        return rng.choice(files) if files else case / "results.json"

    def _remove(self, case: Path, rng: random.Random) -> str:
        file = self._file(case, rng)
        file.unlink(missing_ok=True)
        return file.name

    def _truncate(self, case: Path, rng: random.Random) -> str:
        file = self._file(case, rng)
        if file.is_file():
            file.write_bytes(file.read_bytes()[: rng.randrange(1 + file.stat().st_size)])
        return file.name

    def _spoil(self, case: Path, rng: random.Random) -> str:
        file = self._file(case, rng)
        if not file.is_dir():
            file.unlink(missing_ok=True)
            file.write_bytes(rng.choice(SPOILT))
        return file.name

    def _field(self, case: Path, rng: random.Random) -> str:
        files = [case / n for n in FILES if n.endswith(".json") and (case / n).is_file()]
        file = rng.choice(files) if files else case / "results.json"
        try:
            part = whole = json.loads(file.read_text("utf-8"))
            path = []
            for _ in range(rng.randrange(1, 5)):
                if not isinstance(part, dict | list) or not part:
                    break
                key = rng.choice([*part] if isinstance(part, dict) else [*range(len(part))])
                path.append(key)
                holder, part = part, part[key]
            value = rng.choice(VALUES)
            holder[path[-1]] = value
            file.write_text(json.dumps(whole))
        except (OSError, ValueError, UnboundLocalError, RecursionError):
            return f"{file.name} as it is"
        return f"{file.name} {path} = {value!r:.60}"

    def _link(self, case: Path, rng: random.Random) -> str:
        if rng.random() < 0.2:
            name = rng.choice(["model", "adapter", "figures"])
            shutil.rmtree(case / name, ignore_errors=True)
            if not os.path.lexists(case / name):
                (case / name).symlink_to(self.outside)
            return name
        file = rng.choice([self._file(case, rng), case / "model/merges.txt", case / INDEX])
        if file.parent.is_dir() and not file.is_dir():
            file.unlink(missing_ok=True)
            file.symlink_to(rng.choice([*sorted(self.outside.iterdir()), Path("loop"), file]))
        return file.name

    def _pipe(self, case: Path, rng: random.Random) -> str:
        file = self._file(case, rng)
        if not file.is_dir():
            file.unlink(missing_ok=True)
            os.mkfifo(file)
        return file.name

    def _folder(self, case: Path, rng: random.Random) -> str:
        file = self._file(case, rng)
        if not file.is_dir():
            file.unlink(missing_ok=True)
            file.mkdir()
        return file.name

    def _extra(self, case: Path, rng: random.Random) -> str:
        names = ["model/adapter_config.json", "model/vocab.json", "model/merges.txt", "report.json"]
        names += ["model/preprocessor_config.json", "model/special_tokens_map.json", "journal.json"]
        names += [
            "model/model-00001-of-00002.safetensors",
            "figures/reliability.svg",
            "glovlm.json",
        ]
        file = case / rng.choice([*names, "study.json", "pretraining.json", "adapter_config.json"])
        file.parent.mkdir(exist_ok=True)
        if not os.path.lexists(file):
            file.write_bytes(rng.choice([*SPOILT, b'{"a": "b"}', b"<svg><image href='x'/></svg>"]))
        odd = os.fsencode(case) + b"/\xff\xfe" + bytes([rng.randrange(65, 90)])
        with open(odd, "wb") as stream:
            stream.write(b"x")
        return file.name

    def _index(self, case: Path, rng: random.Random) -> str:
        outside = os.path.relpath(self.outside / "secret.safetensors", case / "model")
        name = rng.choice([outside, str(self.outside / "secret.safetensors"), "x", 3, None])
        content = {"metadata": {"total_size": rng.choice(VALUES[:10])}, "weight_map": {"a": name}}
        if (case / "model").is_dir() and not os.path.lexists(case / INDEX):
            (case / INDEX).write_text(json.dumps(content))
            if rng.random() < 0.7 and (case / "model/model.safetensors").is_file():
                (case / "model/model.safetensors").unlink()
        return f"weights in {name}"

    def _journal(self, case: Path, rng: random.Random) -> str:
        work = case / "unfinished"
        work.mkdir(exist_ok=True)
        names = [rng.choice(["../../outside/secret.txt", "model", "/tmp/x", "..", 3, "a/../../b"])]
        content = {"move": names, "remove": [rng.choice(["../outside", "results.json", None])]}
        (work / "journal.json").write_text(json.dumps(rng.choice([content, {"move": names}, []])))
        return f"journal {names}"

    def _code(self, case: Path, rng: random.Random) -> str:
        names = [str(self.outside / "secret.Model"), "../../outside/secret.M", "heads", "a.b.c"]
        value = rng.choice([*names, None, 3, [], ["x.Y", None], "owner/name--x.Y"])
        for name in ("model/config.json", "model/processor_config.json"):
            if not (case / name).is_file():  # a pipe of another mutation would never end
                continue
            try:
                content = json.loads((case / name).read_text("utf-8"))
                content["auto_map"] = {"AutoModel": value, "AutoProcessor": value}
                (case / name).write_text(json.dumps(content))
            except (OSError, ValueError, TypeError, RecursionError):
                continue
        return f"code {value!r}"

    def _yaml(self, case: Path, rng: random.Random) -> str:
        text = rng.choice(
            [BOMB, "data: 1\noutput_dir: x\n", "a: &a [*a]\n", "data: x\n", "[" * 999]
        )
        if not (case / "config.yaml").is_dir():
            (case / "config.yaml").unlink(missing_ok=True)
            (case / "config.yaml").write_text(text)
        return text[:20]


# ------------------------------------------------------------------------------------ readers


def _load(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm import load_classifier

    load_classifier(str(case))


def _load_published(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm import load_published

    load_published(str(case / "model"))


def _backbone(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm import load_backbone

    load_backbone(str(case / "model"))


def _card(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm.publish.card import write_card

    write_card(case, case / "card.md")


def _push(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm import push

    push(case, "lab/model", dry_run=True, reason=REASON)


def _clip(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm.publish.plain_clip import export_clip

    export_clip(case, case / "exported", reason=REASON)


def _evaluate(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm import evaluate

    evaluate(str(case), str(cases.data), allow_seen=True, n_resamples=2)


def _commands(case: Path, cases: HostileFolders) -> None:
    from hf_glovlm.cli import main

    asked = ["--dry-run", "--reason", REASON]
    for words in (["push", str(case), "lab/model", *asked], ["card", str(case)]):
        code = main(words)
        assert code in (0, 2), f"exit code {code}"


READERS: dict[str, Callable[[Path, HostileFolders], None]] = {
    "load": _load, "published": _load_published, "backbone": _backbone, "card": _card,
    "push": _push, "clip": _clip, "evaluate": _evaluate, "commands": _commands,
}  # fmt: skip

_watching: list[tuple[str, list[str]]] = []


def _hear(event: str, arguments: Any) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | bytes):
        folder, opened = _watching[-1]
        path = os.fsdecode(arguments[0])
        if os.path.realpath(path).startswith(folder):
            opened.append(path)


_hooked: list[bool] = []


@contextmanager
def _watched(folder: Path, opened: list[str]) -> Any:
    """Note the files of a folder that are opened while the block runs."""
    if not _hooked:  # a hook cannot be taken off again
        sys.addaudithook(_hear)
        _hooked.append(True)
    _watching.append((str(folder.resolve()), opened))
    try:
        yield
    finally:
        _watching.pop()
