"""The machine: full and read-only disks, signals, places that cannot be used."""

import os
from pathlib import Path

import pytest
from fresh_process import Completed, inherited, run_forks

from hf_glovlm.lab.phantoms import write_cohort

# Files of this process cannot grow beyond the first argument: what a full disk does, at any size.
FULL = """
import resource, sys
sys.dont_write_bytecode = True  # half a file of it would stay
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
from hf_glovlm.cli import main
sys.exit(main(sys.argv[2:]))
"""
# SIGTERM as soon as a file is there; the thread ends with the process.
TERMINATED = """
import os, signal, sys, threading, time
from pathlib import Path

def end():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end, daemon=True).start()
from hf_glovlm.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run(script: str, *arguments: object, folder: Path) -> Completed:
    (done,) = run_forks(["-c", script, *arguments], folder=folder, environments=[inherited()])
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cohort`, `model` (a run) and `study.yaml`."""
    from hf_glovlm.cli import main

    folder = tmp_path_factory.mktemp("place")
    write_cohort(folder / "cohort", 4, 6, seed=1)
    train = ["train", "--data", str(folder / "cohort"), "--method", "prototype", "--shots", "1"]
    assert main([*train, "--n-resamples", "20", "--output-dir", str(folder / "model")]) == 0
    train[4:] = ["zero_shot", "--shots", "0"]
    assert main([*train, "--n-resamples", "20", "--output-dir", str(folder / "texts")]) == 0
    (folder / "study.yaml").write_text(
        "data: cohort\nmethods: [prototype, linear_probe]\nreference: prototype\ndraws: 1\n"
        "shots: 1\nn_resamples: 20\n"
    )
    return folder


TRAIN = "train --data cohort --shots 1 --n-resamples 20 --no-cache"
COMMANDS = {
    "train": (TRAIN + " --method lora --epochs 1 --output-dir {out}", 20_000),
    "train a head": (TRAIN + " --method prototype --output-dir {out}", 20_000),
    "train from the start": (TRAIN + " --method prototype --output-dir {out}", 700),
    "study": ("study --config study.yaml --output-dir {out}", 2_000),
    "predict": ("predict model cohort --output {out}/answers.csv", 1_200),
    "evaluate": ("evaluate model --data cohort --allow-seen --output {out}/r.json", 700),
    "evaluate rows": (
        "evaluate model --data cohort --allow-seen --output {out}/r.json"
        " --predictions {out}/p.parquet --n-resamples 5",
        2_000,
    ),
    "card": ("card model --output {out}/card.md", 700),
    "export": ("export texts --format clip --output-dir {out}", 20_000),
    "explain": ("explain model cohort/viable/P000_000.png --output-dir {out}", 700),
    "pretrain": ("pretrain --patients 1 --per-patient 2 --epochs 1 --output-dir {out}", 20_000),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(
    name: str, place: Path, tmp_path: Path
) -> None:
    command, most = COMMANDS[name]
    out = tmp_path / "out"
    line = command.replace("P000_000", next((place / "cohort/viable").iterdir()).stem)
    done = run(FULL, most, *line.format(out=out).split(), folder=place)
    assert "Traceback" not in done.error, done.error[-3000:]
    assert done.code == 2, done.error[-2000:]
    assert "no space" in done.error or "File too large" in done.error
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert [name for name in left if name.endswith(".tmp")] == []
    assert not (out / "results.json").exists()
    if name.startswith("train "):  # nothing had trained, so there is nothing to go on with
        assert left == []


READ_ONLY = "/proc/1"  # a folder in which even root makes no file


@pytest.mark.parametrize(
    "out", [f"{READ_ONLY}/out", "x" * 300, "a" + "/b" * 3000], ids=["no-disk", "name", "path"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_a_sentence(
    name: str,
    out: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hf_glovlm.cli import main

    monkeypatch.chdir(place)
    line = COMMANDS[name][0].replace("P000_000", next((place / "cohort/viable").iterdir()).stem)
    assert main(line.format(out=out).split()) in (1, 2)
    error = capsys.readouterr().err
    assert "cannot be" in error
    assert len(error.splitlines()[-1]) < 1000


def test_a_container_that_ends_a_training_keeps_what_it_has(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = [*TRAIN.split(), "--method", "lora", "--epochs", "10000", "--output-dir", out]
    done = run(TERMINATED, out / "unfinished" / "checkpoint.safetensors", *long, folder=place)
    assert done.code == 143
    assert done.error.splitlines()[-1] == "terminated: the last complete result is kept"
    assert (out / "unfinished" / "checkpoint.safetensors").is_file()
    assert [p.name for p in (out / "unfinished").iterdir() if p.suffix == ".tmp"] == []


def test_nobody_reads_on(place: Path) -> None:
    """`glovlm datasets | head -1` is no error."""
    script = """
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
from hf_glovlm.cli import main
sys.exit(main(["datasets", "--json"]))
"""
    done = run(script, folder=place)
    assert done.code in (0, 1)
    assert done.error == ""


def test_a_full_standard_output_is_a_sentence(place: Path) -> None:
    script = """
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
from hf_glovlm.cli import main
code = main(["datasets", "--json"])
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.exit(code)
"""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    done = run(script, folder=place)
    assert done.code == 2
    assert done.error.startswith("error: ")
    assert "No space left" in done.error
