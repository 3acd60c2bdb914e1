"""The comparer of recordings on small recordings written by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from record_commands import main, read_commands
from safetensors.numpy import save_file

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def write_recording(
    folder: Path,
    *,
    seconds: float = 1.5,
    auc: float = 0.875,
    weights: Any = WEIGHTS,
    pixels: Any = PIXELS,
    scores: tuple[float, ...] = (0.25, 0.75),
    version: str = "2.9.0",
    code: str = "a = 1\n",
) -> Path:
    """One command with a file of each kind, as the recorder lays it out."""
    run = folder / "outputs" / "train"
    (run / "model").mkdir(parents=True)
    (folder / "printed").mkdir()
    plan = {
        "folder": str(folder),
        "repository": f"/checkouts/{folder.name}",
        "commands": {"train": {"arguments": ["train"], "exit_code": 0, "seconds": seconds}},
    }
    (folder / "recording.json").write_text(json.dumps(plan))
    results = {
        "metrics": {"macro_auc": {"value": auc, "note": None}},
        "labels": [3, 4],
        "timing": {"total": seconds},
        "base": f"/checkouts/{folder.name}/mini",
        "transformers_version": version,
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), "lr": 0.001}))
    card = ["# Card", f"AUC {auc:.7f}, on 2026-01-0{int(seconds)}", f"| total, s | {seconds} |"]
    table = ["| method | AUC | seconds a draw |", "| --- | --- | --- |", f"| a | 0.9 | {seconds} |"]
    (run / "README.md").write_text("\n".join([*card, "", *table]))
    (run / "model" / "code.py").write_text(code)
    save_file({"head.weight": weights}, run / "model" / "model.safetensors")
    Image.fromarray(pixels).save(run / "figure.png")
    rows = pyarrow.table({"file": ["a", "b"], "p": list(scores)})
    pyarrow.parquet.write_table(rows, run / "predictions.parquet")
    (run / "predictions.csv").write_text(f"file,p\na,{scores[0]}\nb,{scores[1]}\n")
    (folder / "printed" / "train.stdout").write_text("image  class\n1      viable\n")
    (folder / "printed" / "train.stderr").write_text(f"the run is in {folder}/outputs/train\n")
    return folder


@pytest.fixture
def lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The differences that `compare` prints of the two recordings; its exit code fits them."""

    def run(*options: object) -> list[str]:
        before, after = tmp_path / "before", tmp_path / "after"
        code = main(["compare", str(before), str(after), *map(str, options)])
        printed = capsys.readouterr().out.splitlines()
        assert code == bool(printed)
        return printed

    return run


@pytest.fixture(autouse=True)
def before(tmp_path: Path) -> None:
    write_recording(tmp_path / "before")


def test_paths_times_versions_and_last_bits_are_no_difference(tmp_path: Path, lines: Any) -> None:
    write_recording(
        tmp_path / "after",
        seconds=2.25,
        auc=0.8750002,
        weights=WEIGHTS * np.float32(1 + 2e-6),
        pixels=PIXELS + 1,
        scores=(0.2500001, 0.75),
        version="2.10.1",
    )
    assert lines() == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"auc": 0.8752},
            ["README.md, line 2: ", "results.json.metrics.macro_auc.value: 0.875 -> "],
        ),
        ({"weights": WEIGHTS + (WEIGHTS == 7)}, ["model.safetensors.head.weight: 1 of 12 values"]),
        ({"weights": WEIGHTS[:2]}, ["head.weight: float32[3, 4] -> float32[2, 4]"]),
        ({"weights": WEIGHTS.astype(np.float16)}, ["head.weight: float32[3, 4] -> float16"]),
        ({"pixels": PIXELS + 3}, ["figure.png.pixels: 48 of 48 values differ, by at most 3"]),
        (
            {"scores": (0.2501, 0.75)},
            ["predictions.csv.p[0]: ", "predictions.parquet.p[0]: 0.25 -"],
        ),
    ],
)
def test_a_changed_number_is_one_line_a_file(
    changed: dict[str, Any], expected: list[str], tmp_path: Path, lines: Any
) -> None:
    write_recording(tmp_path / "after", **changed)
    found = lines()
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found, strict=True))


def test_a_missing_file_is_a_difference(tmp_path: Path, lines: Any) -> None:
    run = write_recording(tmp_path / "after") / "outputs" / "train"
    (run / "predictions.csv").unlink()
    (run / "new.txt").write_text("more")
    assert lines() == [
        "train/new.txt: only in the second recording",
        "train/predictions.csv: only in the first recording",
    ]


def test_another_exit_code_stands_for_all_that_follows_from_it(tmp_path: Path, lines: Any) -> None:
    after = write_recording(tmp_path / "after", auc=0.9)
    plan = json.loads((after / "recording.json").read_text())
    plan["commands"]["train"]["exit_code"] = 2
    plan["commands"]["predict"] = plan["commands"]["train"]
    (after / "recording.json").write_text(json.dumps(plan))
    (after / "printed" / "train.stderr").write_text("loading ...\nerror: no data\n")
    assert lines() == [
        "train: exit code 0 -> 2 ('the run is in <recording>/outputs/train' -> 'error: no data')",
        "predict: recorded only in the second recording",
    ]


def test_printed_words_and_integers_count(tmp_path: Path, lines: Any) -> None:
    after = write_recording(tmp_path / "after")
    (after / "printed" / "train.stdout").write_text("image  class\n2      viable\nmore\n")
    assert lines() == [
        "train stdout, line 2: '1  viable' -> nothing",
        "train stdout, after line 2: nothing -> '2  viable'",
        "train stdout, after line 2: nothing -> 'more'",
    ]


def test_commands_are_chosen_by_name(tmp_path: Path, lines: Any) -> None:
    write_recording(tmp_path / "after", auc=0.9)
    assert len(lines("--only", "^train$")) == 2
    assert lines("--only", "predict") == []


def test_changed_inputs_come_first(tmp_path: Path, lines: Any) -> None:
    after = write_recording(tmp_path / "after", auc=0.9)
    (after / "inputs").mkdir()
    (after / "inputs" / "slides.csv").write_text("slide,label\n")
    assert lines()[0] == "inputs/slides.csv: only in the second recording"


def test_remote_code_counts_only_when_asked_for(
    tmp_path: Path, lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recording(tmp_path / "after", code="a = 2\n")
    assert lines() == []
    assert lines("--code") == ["train/model/code.py, line 1: 'a = 1' -> 'a = 2'"]
    main(["compare", str(tmp_path / "before"), str(tmp_path / "after")])
    assert "code.py differs in 1 places" in capsys.readouterr().err


def test_declared_changes_are_no_difference(
    tmp_path: Path, lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    after = write_recording(tmp_path / "after", auc=0.9)
    (after / "printed" / "train.stdout").write_text("image  label\n1      viable\n")
    shutil.move(after / "outputs" / "train" / "figure.png", after / "outputs" / "train" / "map.png")
    expected = tmp_path / "expected.yaml"
    content: dict[str, Any] = {
        "renames": [
            {"from": r"\bclass\b", "to": "label", "reason": "one word for it"},
            {"from": "figure", "to": "map", "reason": "says what it shows"},
        ],
        "differences": [{"line": r"macro_auc|README", "reason": "a corrected metric"}],
    }
    expected.write_text(yaml.safe_dump(content))
    assert lines("--expected", expected) == []
    main(["compare", str(tmp_path / "before"), str(after), "--expected", str(expected)])
    assert "expected, 2 times: macro_auc|README (a corrected metric)" in capsys.readouterr().err
    content["differences"][0].pop("reason")
    expected.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="reason"):
        lines("--expected", expected)


def test_a_folder_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no recording"):
        main(["compare", str(tmp_path / "before"), str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no package"):
        main(["record", "--repository", str(tmp_path), "--output-dir", str(tmp_path / "new")])


def test_every_method_is_recorded() -> None:
    from hf_glovlm import METHODS

    commands = read_commands()
    assert {f"train-{name}" for name in METHODS} <= set(commands)
    assert not any("{" in argument for run in commands.values() for argument in run)
