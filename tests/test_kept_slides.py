"""Slides, bags and crops that are kept: what they are made of, who writes them, full disks."""

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from command_line import Glovlm
from fresh_process import Completed, inherited, run_forks
from PIL import Image
from scn_made import write_scn
from slide_model import outline, train, write_outlines
from slides_made import write_slide
from tiny import tiny_images

from hf_glovlm.errors import GloVLMError
from hf_glovlm.slides.files.bags import BagWriter, read_bag
from hf_glovlm.slides.files.crops import cut_crops

SIDE = 64
SENTENCE = "cannot be written"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("model"))


def make_slide(path: Path, seed: int = 0) -> Path:
    """A slide without compression: of any seed as long as of any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, 512, 384, lesions=3, lesion_side=SIDE, seed=seed, compression="none")
    return path


def overwrite(path: Path, other: Path) -> None:
    """Other bytes under the name, length and time of a file."""
    status, content = path.stat(), other.read_bytes()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def leftovers(folder: Path) -> list[str]:
    ends = (".tmp", ".part", "unfinished")
    return [path.name for path in folder.rglob("*") if path.name.endswith(ends)]


@pytest.fixture
def glovlm(glovlm: Glovlm) -> Glovlm:
    """The command, which never ends in a traceback."""

    def call(*arguments: object) -> Any:
        try:
            return glovlm(*arguments)
        except Exception as error:
            raise AssertionError(f"a traceback: {error!r}") from error

    return call


@pytest.fixture
def classify(run: Path, glovlm: Glovlm) -> Callable[..., Any]:
    """Classify slides into a folder, by the command."""

    def call(output: Path, *slides: Path, options: tuple[object, ...] = (), code: int = 0) -> Any:
        command = ("slide", run, *slides, "--tile-size", SIDE, "--output-dir", output)
        done = glovlm(*command, *options)
        assert done.code == code, done.err
        return done

    return call


# ----------------------------------------------------------------------------------- identity


def test_a_slide_that_was_overwritten_is_classified_anew(
    tmp_path: Path, classify: Callable[..., Any]
) -> None:
    slide, output, fresh = make_slide(tmp_path / "S1.tiff"), tmp_path / "out", tmp_path / "fresh"
    classify(output, slide)
    before = results(output)
    overwrite(slide, make_slide(tmp_path / "other.tiff", seed=5))
    done = classify(output, slide)
    classify(fresh, slide)
    assert results(output) == results(fresh) != before
    assert "S1 is done again: the slide's file has changed" in done.err
    for name in ("features", "scores"):
        with (
            h5py.File(output / "features/S1.h5") as one,
            h5py.File(fresh / "features/S1.h5") as two,
        ):
            assert np.array_equal(one[name], two[name])


def test_results_of_another_slide_of_the_same_name_stay(
    tmp_path: Path, classify: Callable[..., Any]
) -> None:
    one, two = (make_slide(tmp_path / f"p{i}" / "PAS.tiff", seed=i) for i in (1, 2))
    output = tmp_path / "out"
    classify(output, one)
    kept = [*output.rglob("*.parquet"), *output.rglob("*.h5")]
    before = {path: path.read_bytes() for path in kept}
    done = classify(output, two, code=2)
    assert "another slide of this name" in done.errors[0]
    assert {path: path.read_bytes() for path in before} == before
    moved = tmp_path / "moved" / "PAS.tiff"
    moved.parent.mkdir()
    one.rename(moved)
    assert "done again" not in classify(output, moved).err


@pytest.mark.parametrize("spoiled", ["scores", "settings", "all"])
def test_a_bag_that_is_damaged_is_named_and_encoded_again(
    tmp_path: Path, classify: Callable[..., Any], spoiled: str
) -> None:
    slide, output = make_slide(tmp_path / "S1.tiff"), tmp_path / "out"
    classify(output, slide)
    bag = output / "features" / "S1.h5"
    with h5py.File(bag, "r+") as file:
        expected = [file[name][()] for name in ("features", "coords", "scores")]
        if spoiled in file:
            file[spoiled][1, 0] += 3
        elif spoiled == "settings":
            file.attrs["settings"] = file.attrs["settings"].replace("lesion", "tissue", 1)
    if spoiled == "all":
        bag.write_bytes(bag.read_bytes()[:1000])
    before = results(output)
    done = classify(output, slide)
    with h5py.File(bag) as file:
        for name, values in zip(("features", "coords", "scores"), expected, strict=True):
            assert np.array_equal(file[name], values), name
        assert "lesion" in file.attrs["settings"]
    assert "S1 is done again: S1.h5 is" in done.err
    assert results(output) == before
    assert leftovers(output) == []


def test_results_of_a_slide_that_are_damaged_are_made_again(
    tmp_path: Path, classify: Callable[..., Any]
) -> None:
    slide, output = make_slide(tmp_path / "S1.tiff"), tmp_path / "out"
    classify(output, slide)
    folder = output / "slides" / "S1"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "tiles.geojson").unlink()
    content = bytearray((folder / "tiles.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tiles.parquet").write_bytes(content)
    entry = (folder / "slide.json").read_text()
    (folder / "slide.json").write_text(entry.replace('"lesion"', '"tissue"'))
    classify(output, slide)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert results(output)["kind"] == "slides"


def test_classes_that_were_renamed_are_not_those_of_former_results(
    tmp_path: Path, classify: Callable[..., Any], run: Path
) -> None:
    slide, output = make_slide(tmp_path / "S1.tiff"), tmp_path / "out"
    classify(output, slide)
    config = run / "model" / "config.json"
    kept = config.read_text()
    try:
        text = kept.replace("lesion", "LESION").replace("tissue", "lesion")
        config.write_text(text.replace("LESION", "tissue"))
        (run / "manifest.json").unlink(missing_ok=True)
        done = classify(output, slide, code=1)  # its bag is of the former classes
    finally:
        config.write_text(kept)
    assert "other settings (classes" in done.printed


def write_bag(path: Path, features: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = BagWriter(path, dim=features.shape[1], n_scores=2, attributes={"name": path.stem})
    writer.append(features, np.arange(2 * len(features)).reshape(-1, 2), features[:, :2])
    writer.complete()


def test_no_flipped_bit_of_a_bag_gives_other_numbers(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.h5", np.random.default_rng(3)
    write_bag(path, rng.normal(size=(40, 6)).astype(np.float32))
    good, content = read_bag(path, scores=True), path.read_bytes()
    refused = 0
    for bit in rng.choice(8 * len(content), 150, replace=False):
        spoiled = bytearray(content)
        spoiled[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(spoiled)
        try:
            bag = read_bag(path, scores=True)
        except GloVLMError:
            refused += 1
            continue
        assert np.array_equal(bag.features, good.features), bit
        assert np.array_equal(bag.coords, good.coords), bit
        assert np.array_equal(bag.scores, good.scores), bit
        assert bag.attributes == good.attributes, bit
    assert refused > 20


def write_bags(folder: Path) -> list[object]:
    """Bags of 8 patients; the command that learns from them."""
    rng = np.random.default_rng(0)
    lines = ["slide,label,patient_id"]
    for i in range(8):
        features = rng.normal(size=(12, 6)).astype(np.float32) + 2 * (i % 2)
        write_bag(folder / "bags" / f"s{i}.h5", features)
        lines.append(f"s{i},{'ab'[i % 2]},p{i}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    files = ("--features", folder / "bags", "--labels", folder / "slides.csv")
    return ["mil", *files, "--aggregator", "mean", "--epochs", 2, "--n-resamples", 20]


def test_a_damaged_bag_is_not_learned_from(tmp_path: Path, glovlm: Glovlm) -> None:
    command = write_bags(tmp_path)
    with h5py.File(tmp_path / "bags" / "s3.h5", "r+") as file:
        file["features"][2, 1] += 1
    done = glovlm(*command, "--output-dir", tmp_path / "run")
    assert done.code == 2
    (sentence,) = done.errors
    assert "s3.h5" in sentence
    assert "damaged" in sentence
    assert not (tmp_path / "run").exists()


def test_another_slide_of_the_same_name_leaves_the_first_ones_crops(
    tmp_path: Path, glovlm: Glovlm
) -> None:
    outlines = write_outlines(tmp_path / "a.geojson", [outline(100, 90, 60, "1", label="x")])
    slides = [make_slide(tmp_path / f"p{i}" / "PAS.tiff", seed=i) for i in (1, 2)]
    out = tmp_path / "crops"

    def cut(slide: Path, patient: str, *more: object) -> Any:
        command = ("data", "crops", slide, outlines, "--output-dir", out, "--patient-id", patient)
        return glovlm(*command, "--label-property", "label", *more)

    assert cut(slides[0], "P1").code == 0
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    refused = cut(slides[1], "P2")
    assert [(row["slide_id"], row["patient_id"]) for row in rows(out)] == [("PAS", "P1")]
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before
    assert refused.code == 2
    (sentence,) = refused.errors
    for part in (str(slides[1]), "'PAS'", "P1", "P2", "--slide-id"):
        assert part in sentence
    assert cut(slides[1], "P2", "--slide-id", "PAS-2").code == 0
    assert cut(slides[0], "P1").code == 0  # the same slide again
    moved = tmp_path / "moved.tiff"
    shutil.copy(slides[0], moved)
    assert "cut as 'PAS' before" in cut(moved, "P1").err
    patients = {row["slide_id"]: row["patient_id"] for row in rows(out)}
    assert patients == {"PAS": "P1", "PAS-2": "P2", "moved": "P1"}


def test_anonymous_numbers_belong_to_contents(
    tmp_path: Path, classify: Callable[..., Any], glovlm: Glovlm, run: Path
) -> None:
    one, two, three = (make_slide(tmp_path / f"Jane Doe {i}.tiff", seed=i) for i in (1, 2, 3))
    output = tmp_path / "out"

    def hidden(*slides: Path, case: str = "MRN 483905", code: int = 0) -> list[str]:
        classify(output, *slides, options=("--anonymise", "--case", case), code=code)
        return [entry["slide"] for entry in results(output)["slides"]]

    assert hidden(one) == ["slide_001"]
    first = {p.name: p.read_bytes() for p in (output / "slides" / "slide_001").iterdir()}
    assert hidden(two) == ["slide_002"]
    assert {p.name: p.read_bytes() for p in (output / "slides" / "slide_001").iterdir()} == first
    assert hidden(three, two, one, case="MRN 483906") == ["slide_003", "slide_002", "slide_001"]
    assert [entry["case"] for entry in results(output)["cases"]] == ["case_002"]
    renamed = tmp_path / "again.tiff"
    shutil.copy(one, renamed)
    assert hidden(renamed) == ["slide_001"]
    assert results(output)["cases"][0]["case"] == "case_001"
    twice = ("slide", run, one, renamed, "--tile-size", SIDE, "--anonymise")
    done = glovlm(*twice, "--output-dir", output)
    assert done.code == 2
    assert "are the same slide" in done.errors[0]
    for path in output.rglob("*"):
        assert "Jane" not in path.name
        assert not path.is_file() or b"Jane" not in path.read_bytes(), path.name
        assert not path.is_file() or b"48390" not in path.read_bytes(), path.name


# ---------------------------------------------------------------------------------- one writer

CUT = """
import os, sys
from pathlib import Path
from hf_glovlm.slides.files.crops import cut_crops

slide, outlines, out, margin, last = sys.argv[1:]
slide = slide.replace("RANK", os.environ.get("RANK", ""))

def stop(done, total):
    if done == int(last):
        os.kill(os.getpid(), 9)

cut_crops(Path(slide), Path(outlines), Path(out), margin=float(margin), on_progress=stop)
"""


def cut_in_forks(
    folder: Path, slide: Path, margin: float, last: int, n: int = 1
) -> list[Completed]:
    own = [inherited() | {"RANK": str(i)} for i in range(n)]
    command = ["-c", CUT, slide, folder / "a.geojson", folder / "crops", margin, last]
    return run_forks(command, folder=folder, environments=own)


def write_crop_inputs(folder: Path, n: int = 1) -> None:
    for i in range(n):
        make_slide(folder / f"s{i}.tiff", seed=i)
    name = {"classification": {"name": "x"}}
    boxes = [outline(40 + 90 * (i % 5), 50 + 80 * (i // 5), 48, str(i), **name) for i in range(15)]
    write_outlines(folder / "a.geojson", boxes)


def contradictions(folder: Path) -> list[str]:
    """Rows of `metadata.csv` whose file is another crop, or none."""
    wrong = []
    for row in rows(folder):
        with Image.open(folder / row["file_name"]) as image:
            if image.size != (int(row["width"]), int(row["height"])):
                wrong.append(row["file_name"])
    return wrong


def test_crops_that_are_cut_anew_and_killed_agree_with_their_table(tmp_path: Path) -> None:
    write_crop_inputs(tmp_path)
    out, slide = tmp_path / "crops", tmp_path / "s0.tiff"
    cut_crops(slide, tmp_path / "a.geojson", out)
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    (killed,) = cut_in_forks(tmp_path, slide, 3, 7)
    assert killed.code == -9
    assert contradictions(out) == []
    assert {p: p.read_bytes() for p in out.rglob("*.png") if ".unf" not in str(p)} == before
    cut_crops(slide, tmp_path / "a.geojson", out, margin=3)
    assert {row["width"] for row in rows(out)} == {"144"}
    assert contradictions(out) == leftovers(out) == []


def test_crops_whose_move_was_killed_are_whole_to_the_next_reader(tmp_path: Path) -> None:
    from hf_glovlm import load_dataset
    from hf_glovlm.data.folder import open_image

    write_crop_inputs(tmp_path)
    out, slide = tmp_path / "crops", tmp_path / "s0.tiff"
    cut_crops(slide, tmp_path / "a.geojson", out)
    move = "import hf_glovlm.files as f, os\nreal = f.os.replace\nmoved = []\n"
    move += (
        "def replace(a, b):\n    moved.append(str(b).endswith('.png') and '.unf' not in str(b))\n"
    )
    move += "    sum(moved) == 5 and os.kill(os.getpid(), 9)\n    real(a, b)\n"
    move += "f.os.replace = replace\n"
    command = ["-c", move + CUT, slide, tmp_path / "a.geojson", out, 3, 0]
    (killed,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert killed.code == -9
    images = load_dataset(out)["all"]
    assert contradictions(out) == leftovers(out) == []
    assert {open_image(row["image"]).size for row in images} == {(144, 144)}


def test_three_commands_that_cut_at_once_all_arrive(tmp_path: Path) -> None:
    write_crop_inputs(tmp_path, 3)
    ended = cut_in_forks(tmp_path, tmp_path / "sRANK.tiff", 1.25, 0, n=3)
    assert [one.code for one in ended] == [0, 0, 0], [one.error for one in ended]
    held = [row["slide_id"] for row in rows(tmp_path / "crops")]
    assert {name: held.count(name) for name in held} == {"s0": 15, "s1": 15, "s2": 15}


SECOND = """
import sys
from pathlib import Path
from hf_glovlm.cli import main
from hf_glovlm.slides.classify import classify_slides
from hf_glovlm.slides.config import SlideConfig

model, slide, output = sys.argv[1:]
codes = []

def second(kind, what):
    if kind == "tiles" and not codes:
        codes.append(main(["slide", model, slide, "--tile-size", "64", "--output-dir", output]))

given = {"model": model, "slides": [slide], "output_dir": output, "tile_size": 64}
classify_slides(SlideConfig.from_mapping(given), on_event=second)
print(codes)
sys.exit(codes != [2])
"""


def test_a_second_command_over_slides_waits_for_none_and_is_refused(
    tmp_path: Path, run: Path
) -> None:
    slide = make_slide(tmp_path / "S1.tiff")
    command = ["-c", SECOND, run, slide, tmp_path / "out"]
    (done,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert done.out.splitlines()[-1] == "[2]", done.error
    assert "Another process writes to" in done.error


# --------------------------------------------------------------------------------- the machine

FULL = """
import json, resource, sys
sys.dont_write_bytecode = True  # Python would keep what it could not write whole
from hf_glovlm.cli import main

for limit, *arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code = main(arguments)
    print("END", code, file=sys.stderr)
"""


def run_limited(folder: Path, *commands: tuple[object, ...]) -> list[str]:
    """Commands, one after the other, whose files may be as large as the first argument says.

    Returns:
        What each prints to the error stream, with its exit code in the end.
    """
    given = [[limit, *map(str, arguments)] for limit, *arguments in commands]
    (done,) = run_forks(["-c", FULL, json.dumps(given)], folder=folder, environments=[inherited()])
    assert "Traceback" not in done.error, done.error
    assert "Exception ignored" not in done.error, done.error
    assert done.code == 0, done.error
    return re.findall(r".*?END \d+", done.error, re.DOTALL)


def test_a_full_disk_fails_slides_in_a_sentence(tmp_path: Path, run: Path, glovlm: Glovlm) -> None:
    """The finished bag finds no room, then the heat map."""
    slide, output = make_slide(tmp_path / "s1.tiff"), tmp_path / "out"
    command = ("slide", run, slide, "--tile-size", SIDE, "--output-dir", output, "--json")
    for printed in run_limited(tmp_path, (8000, *command), (25_000, *command)):
        assert "s1: failed ('" in printed
        assert SENTENCE in printed
        assert printed.endswith("END 1")
    assert leftovers(output) == []
    assert not (output / "slides" / "s1").exists()
    assert glovlm(*command).code == 0
    assert [entry["status"] for entry in results(output)["slides"]] == ["done"]


def test_a_full_disk_leaves_neither_crops_nor_a_run(tmp_path: Path) -> None:
    write_crop_inputs(tmp_path)
    crops = ("data", "crops", tmp_path / "s0.tiff", tmp_path / "a.geojson", "--output-dir")
    mil = (*write_bags(tmp_path), "--output-dir")
    commands = [(1200, *crops, tmp_path / "crops"), (1500, *mil, tmp_path / "run")]
    for printed in run_limited(tmp_path, *commands):
        assert printed.endswith("END 2")
        (sentence,) = [line for line in printed.splitlines() if "error: " in line]
        assert SENTENCE in sentence
    left = [path.name for name in ("crops", "run") for path in (tmp_path / name).rglob("*")]
    assert not [name for name in left if name.endswith((".tmp", ".png", ".csv"))]


STOPPED = """
import os, signal, sys, threading, time
from hf_glovlm.cli import main
from hf_glovlm.progress import Count

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
number = int(sys.argv.pop(1))
reach = Count.reach

def interrupt():
    for _ in range(3):  # somebody in a hurry
        os.kill(os.getpid(), number)
        time.sleep(0.002)

def stop(count, done, detail=None):
    reach(count, done, detail)
    if count.what == "tiles" and done == 8:
        threading.Thread(target=interrupt).start()
        time.sleep(5)  # no further tile before the first signal

Count.reach = stop
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_closes_the_slide_and_says_what_is_kept(
    tmp_path: Path, run: Path, number: int, code: int
) -> None:
    slide, output = make_slide(tmp_path / "s1.tiff"), tmp_path / "out"
    if number == signal.SIGINT:  # OpenSlide, which aborts where it is closed while it reads
        pixels = tifffile.imread(slide)
        slide = slide.with_suffix(".scn")
        write_scn(slide, (1024, 768), [(256, 128, pixels)])
    options = ("--tile-size", SIDE, "--batch-size", 8, "--output-dir", output)
    command = ["-c", STOPPED, int(number), "slide", run, slide, *options]
    (done,) = run_forks(command, folder=tmp_path, environments=[inherited()])
    assert done.code == code, done.error
    assert "0 of 1 slides are done; the same command goes on" in done.error
    assert "Traceback" not in done.error
    assert leftovers(output) == ["s1.h5.part"]


@pytest.mark.parametrize("place", ["/proc/glovlm/out", "n" * 300])
def test_a_place_that_takes_no_file_is_named(
    tmp_path: Path, run: Path, glovlm: Glovlm, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_crop_inputs(tmp_path)
    tiny_images(tmp_path / "images", per_class=1)
    image = next((tmp_path / "images").rglob("*.png"))
    for command in (
        ("slide", run, "s0.tiff", "--tile-size", SIDE),
        ("data", "crops", "s0.tiff", "a.geojson"),
        ("explain", run, image),
        write_bags(tmp_path),
    ):
        done = glovlm(*command, "--output-dir", place)
        assert done.code == 2, command
        assert len(done.errors) == 1
        assert "Traceback" not in done.err


def test_crops_hide_no_data_of_others(tmp_path: Path, glovlm: Glovlm) -> None:
    write_crop_inputs(tmp_path)
    tiny_images(tmp_path / "classes", per_class=1)
    (tmp_path / "classes" / "metadata.csv").unlink()
    tiny_images(tmp_path / "table", per_class=1)
    own = "file_name,label,slide_id,age\nviable/image_00.png,viable,A,3\n"
    (tmp_path / "table" / "metadata.csv").write_text(own)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    for name in ("classes", "table", "notes", "."):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        command = ("data", "crops", tmp_path / "s0.tiff", tmp_path / "a.geojson")
        done = glovlm(*command, "--output-dir", tmp_path / name)
        assert done.code == 2, name
        assert "choose another folder" in done.errors[0]
        after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert {path: after.get(path) for path in before} == before


def test_slides_replace_no_file_of_others(tmp_path: Path, run: Path, glovlm: Glovlm) -> None:
    slide = make_slide(tmp_path / "in" / "S1.tiff")
    beside = tmp_path / "in" / "slides" / "S1"  # as the pictures of a MIRAX slide lie
    beside.mkdir(parents=True)
    (beside / "Data0000.dat").write_text("pixels")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    command = ("slide", run, slide, "--tile-size", SIDE, "--output-dir")
    for output in (tmp_path / "mine", tmp_path / "in"):
        done = glovlm(*command, output)
        assert done.code == 2, output
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    assert (beside / "Data0000.dat").read_text() == "pixels"
    slide.rename(tmp_path / "S1.tiff")
    done = glovlm(
        "slide", run, tmp_path / "S1.tiff", "--tile-size", SIDE, *command[-1:], beside.parents[1]
    )
    assert done.code == 2
    assert (beside / "Data0000.dat").read_text() == "pixels"


def test_heat_maps_go_neither_into_the_data_nor_over_other_files(
    tmp_path: Path, run: Path, glovlm: Glovlm
) -> None:
    data = tiny_images(tmp_path / "data", per_class=1)
    image = data / "viable" / "image_00.png"
    for folder in (data / "viable", data):
        done = glovlm("explain", run, image, "--output-dir", folder)
        assert done.code == 2, folder
        assert "holds the images" in done.errors[0]
    assert sorted(p.name for p in (data / "viable").iterdir()) == ["image_00.png"]
    out = tmp_path / "out"
    out.mkdir()
    for name in ("image_00.gradient.png", "gradient.json"):
        (out / name).write_text("mine")
        done = glovlm("explain", run, image, "--output-dir", out)
        assert done.code == 2
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    for _ in range(2):  # what it wrote itself it writes again
        assert glovlm("explain", run, image, "--output-dir", out).code == 0


# ------------------------------------------------------------------------------------- hostile


def _claims(file: Any) -> None:
    file.create_dataset("features", (10**10, 512), np.float32, chunks=(1024, 512))
    file.create_dataset("coords", (10**10, 2), np.int64, chunks=(1024, 2))


def _bomb(file: Any) -> None:
    shape = (2_000_000, 1024)
    file.create_dataset("features", shape, np.float32, chunks=(4096, 1024), compression="gzip")
    file.create_dataset("coords", (2_000_000, 2), np.int64, chunks=True, compression="gzip")


def _references(file: Any) -> None:
    file["a"] = np.zeros(3)
    kind = h5py.special_dtype(ref=h5py.Reference)
    file.create_dataset("features", (3, 2), dtype=kind)[:] = file["a"].ref
    file["coords"] = np.zeros((3, 2), int)


def _texts(file: Any) -> None:
    file["features"] = np.array([[b"a", b"b"]] * 3)
    file["coords"] = np.zeros((3, 2), int)


def _nowhere(file: Any) -> None:
    file["features"] = h5py.ExternalLink("nowhere.h5", "/x")
    file["coords"] = h5py.SoftLink("/nothing")


def _empty(file: Any) -> None:
    file["features"], file["coords"] = h5py.Empty("f4"), h5py.Empty("i8")


def _no_places(file: Any) -> None:
    file["features"], file["coords"] = np.ones((3, 2)), np.full((3, 2), np.nan)


def _attributes(file: Any) -> None:
    file["features"], file["coords"] = np.zeros((3, 2)), np.zeros((3, 2), int)
    file.attrs["checksums"] = file["features"].ref


@pytest.mark.parametrize(
    "write",
    [_claims, _bomb, _references, _texts, _nowhere, _empty, _no_places, _attributes],
    ids=lambda write: write.__name__.strip("_"),
)
def test_a_hostile_feature_file_is_refused_in_a_sentence(
    tmp_path: Path, glovlm: Glovlm, write: Callable[[Any], None]
) -> None:
    command = write_bags(tmp_path)
    with h5py.File(tmp_path / "bags" / "s0.h5", "w") as file:
        write(file)
    done = glovlm(*command, "--output-dir", tmp_path / "run")
    assert done.code == 2
    assert len(done.errors) == 1
    assert "s0.h5" in done.errors[0]
