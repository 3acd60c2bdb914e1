"""Where a single file of output may go: over an earlier one of its kind, and over nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Glovlm
from tiny import tiny_clip, tiny_images

from hf_glovlm.cli import app


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data"), per_class=4)


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ("--data", data, "--backbone", tiny_clip(), "--output-dir", folder)
    assert app.main(["train", *map(str, arguments), "--shots", "1", "--n-resamples", "20"]) == 0
    return folder


class Place(NamedTuple):
    """What a case is made of; `here` is its own folder, `data` a copy of the images."""

    run: Path
    data: Path
    here: Path

    def image(self) -> Path:
        return self.data / "viable" / "image_00.png"

    def text(self, name: str, content: str = "mine, not yours\n") -> Path:
        (self.here / name).write_text(content)
        return self.here / name

    def link(self, name: str, target: Path, *, hard: bool = False) -> Path:
        (os.link if hard else os.symlink)(target, self.here / name)
        return self.here / name

    def pipe(self, name: str) -> Path:
        os.mkfifo(self.here / name)
        return self.here / name

    def parquet(self, name: str) -> Path:
        pq.write_table(pa.table({"a": [1]}), self.here / name)
        return self.here / name

    def without_table(self) -> Path:
        (self.data / "metadata.csv").unlink()
        return self.data

    def own(self, name: str, source: str) -> Path:
        shutil.copyfile(self.run / source, self.here / name)
        return self.here / name

    def own_run(self) -> Path:
        """A run without its model."""
        for name in ("results.json", "config.yaml", "predictions.parquet"):
            self.own(name, name)
        return self.here

    def predict(self, output: Path, images: Path | None = None) -> list[Any]:
        return ["predict", self.run, images or self.image(), "--output", output]

    def evaluate(self, output: Path, *more: object) -> list[Any]:
        asked = ("--allow-seen", "--n-resamples", 20, *more)
        return ["evaluate", self.run, "--data", self.data, "--output", output, *asked]


Case = tuple[Callable[[Place], list[Any]], str]
REFUSED: dict[str, Case] = {
    "the image itself": (lambda p: p.predict(p.image()), "read or written by this same command"),
    "the image behind a link": (
        lambda p: p.predict(p.link("all", p.data) / "viable" / "image_00.png"),
        "read or written by this same command",
    ),
    "the image by a hard link": (
        lambda p: p.predict(p.link("x.csv", p.image(), hard=True)),
        "read or written by this same command",
    ),
    "the image in capitals": (
        lambda p: p.predict(p.image().with_name("IMAGE_00.PNG")),
        "read or written by this same command",
    ),
    "a table of somebody": (lambda p: p.predict(p.text("x.csv")), "name another file"),
    "a table of the data": (lambda p: p.predict(p.data / "metadata.csv", p.data), "not replaced"),
    "a table that would be read as data": (
        lambda p: p.predict(p.without_table() / "metadata.csv", p.data),
        "part of the data",
    ),
    "a link": (lambda p: p.predict(p.link("x.csv", p.text("y"))), "is a link to"),
    "a link to nothing": (lambda p: p.predict(p.link("x.csv", p.here / "y")), "is a link to"),
    "a link to a device": (lambda p: p.predict(p.link("x.csv", Path("/dev/null"))), "a device"),
    "a pipe": (lambda p: p.predict(p.pipe("x.csv")), "a pipe"),
    "a name that is too long": (lambda p: p.predict(p.here / f"{'x' * 240}.csv"), "too long"),
    "below a file": (lambda p: p.predict(p.text("x") / "y.csv"), "Not a directory"),
    "results of somebody": (lambda p: p.evaluate(p.text("r.json", "{}")), "glovlm evaluate"),
    "predictions of a run": (
        lambda p: p.evaluate(p.here / "r", "--predictions", p.own_run() / "predictions.parquet"),
        "belongs to a run",
    ),
    "results that are no JSON": (lambda p: p.evaluate(p.text("r.json")), "not replaced"),
    "results of a run": (lambda p: p.evaluate(p.own("x.json", "results.json")), "not replaced"),
    "a table over results": (lambda p: p.evaluate(p.data / "metadata.csv"), "not replaced"),
    "parquet of somebody": (
        lambda p: p.evaluate(p.here / "r.json", "--predictions", p.parquet("p.parquet")),
        "not replaced",
    ),
    "results over predictions": (
        lambda p: p.evaluate(p.here / "r", "--predictions", p.here / "r"),
        "read or written by this same command",
    ),
    "a README of somebody": (
        lambda p: ["card", p.run, "--output", p.text("README.md", "# My thesis\n")],
        "not replaced",
    ),
    "a card behind a link": (
        lambda p: ["card", p.run, "--output", p.link("README.md", p.run / "README.md")],
        "is a link to",
    ),
    "results as the card": (
        lambda p: ["card", p.run, "--output", p.run / "results.json"],
        "read or written by this same command",
    ),
    "captions over a table of somebody": (
        lambda p: ["data", "caption", p.data, "--model", p.here, "--output", p.text("x.csv")],
        "not replaced",
    ),
    "captions over a pipe": (
        lambda p: ["data", "caption", p.data, "--model", p.here, "--output", p.pipe("x.csv")],
        "a pipe",
    ),
}


def contents(*folders: Path) -> dict[Path, Any]:
    """Every path below, what kind it is, and the bytes of files."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {
        path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in paths
    }


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_of_others_is_replaced(
    case: str, data: Path, run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    make, words = REFUSED[case]
    (tmp_path / "here").mkdir()
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    arguments = make(Place(run_folder, copy, tmp_path / "here"))
    before = contents(tmp_path)
    try:
        done = glovlm(*arguments)
    except OSError as error:
        pytest.fail(f"a crash: {error}")
    assert done.code == 2, done
    assert len(done.errors) == 1, done.err
    assert words in done.errors[0]
    assert contents(tmp_path) == before


def test_an_earlier_output_is_replaced(
    data: Path, run_folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    place = Place(run_folder, data, tmp_path)
    place.text("config.yaml", "data: images\n")  # for runs that are yet to be
    table, results, rows = (tmp_path / n for n in ("x.csv", "results.json", "p.parquet"))
    for images in (place.image(), data):
        assert glovlm(*place.predict(table, images)).code == 0
    assert len(table.read_text().splitlines()) == 13
    for _ in range(2):
        assert glovlm(*place.evaluate(results, "--predictions", rows)).code == 0
        card = glovlm("card", run_folder, "--output", tmp_path / "card" / "README.md")
        assert card.code == 0, card.err
    assert json.loads(results.read_text())["n"] == 12
