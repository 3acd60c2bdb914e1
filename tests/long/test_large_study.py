"""A finished study of many cells: every one is checked, and the report is that of its cells."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_clip, tiny_images

from hf_glovlm.errors import GloVLMError
from hf_glovlm.lab.benches.study import copy_cell
from hf_glovlm.runs.study import StudyConfig, run_study, write_report

pytestmark = pytest.mark.long

DRAWS = 300


def test_a_finished_study_of_many_cells(tmp_path: Path) -> None:
    data, output = tiny_images(tmp_path / "discs", groups=6), tmp_path / "O"
    values: dict[str, Any] = {
        "data": str(data),
        "backbone": str(tiny_clip()),
        "methods": ["linear_probe", "zero_shot"],
        "shots": 2,
        "n_resamples": 50,
    }
    run_study(StudyConfig.from_mapping({**values, "draws": 1}), output)
    for first in sorted(output.glob("cells/*/*/*/draw-00")):
        for draw in range(1, DRAWS):
            copy_cell(first, draw)
    config = StudyConfig.from_mapping({**values, "draws": DRAWS})
    ends: list[str] = []
    report = run_study(config, output, on_event=lambda kind, what: ends.append(what["status"]))
    assert ends == ["skipped"] * 2 * DRAWS
    assert write_report(config, output) == report
    for line in report["sections"][0]["methods"]:
        assert line["draws"] == list(range(DRAWS))
        assert line["metrics"]["macro_auc"]["sd"] == pytest.approx(0)  # they are copies
    last = max(output.glob("cells/*/zero_shot/*/draw-*"))
    for name in ("predictions.parquet", "results.json", "episodes.json"):
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(GloVLMError, match=rf"{name}.* has changed"):
            run_study(config, output)
        (last / name).write_bytes(content)
