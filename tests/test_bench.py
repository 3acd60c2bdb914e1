"""The benches run and compare like with like. Nothing here depends on how long anything took."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_clip, tiny_pair, tiny_siglip2
from tokenizers import Tokenizer

from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import prediction
from hf_glovlm.lab.benches import run_benches
from hf_glovlm.lab.benches.cache import bench_cache
from hf_glovlm.lab.benches.encode import _grow_tokenizer, bench_encode
from hf_glovlm.lab.benches.methods import bench_methods
from hf_glovlm.lab.benches.metrics import bench_metrics, plain_metrics
from hf_glovlm.lab.benches.timing import shortest_in_turn
from hf_glovlm.lab.benches.towers import Shape
from hf_glovlm.methods import METHODS
from hf_glovlm.metrics import compute_metrics
from hf_glovlm.model import GloVLMModel


def test_the_loop_computes_what_the_bootstrap_does() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=80)
    probabilities = rng.dirichlet(np.ones(3), size=80)
    plain = plain_metrics(labels, probabilities)
    ours = compute_metrics(labels, probabilities, n_resamples=0)
    for name in ("accuracy", "balanced_accuracy", "macro_auc", "macro_f1", "brier"):
        assert plain[name] == pytest.approx(ours["metrics"][name]["value"])
    for k in range(3):
        for name in ("recall", "specificity", "auc"):
            assert plain[f"{name}_{k}"] == pytest.approx(ours["per_class"][str(k)][name]["value"])


def test_metrics_rows() -> None:
    rows = bench_metrics(n=200, n_groups=12, n_classes=3, n_resamples=40, loop_resamples=2)
    fast, *loops = rows
    assert fast["ratio"] is None
    for row in loops:
        assert row["ratio"] == pytest.approx(row["value"] / fast["value"], rel=0.02)
        assert "extrapolated from 2 resamples" in row["what"]


def test_cache_rows() -> None:
    cold, warm = bench_cache(backbone=str(tiny_clip()), n_patients=2, per_patient=3, repeats=1)
    assert cold["ratio"] is None
    assert min(cold["value"], warm["value"]) > 0
    assert warm["ratio"] == pytest.approx(cold["value"] / warm["value"], rel=0.02)
    assert all("6 synthetic images" in row["what"] for row in (cold, warm))


TINY = Shape(image_size=32, patch=8, vision=(64, 2), text=(64, 2), context=40)
FEW: dict[str, Any] = {"n_files": 5, "side": 48, "batch_size": 2, "repeats": 1}


@pytest.mark.parametrize("backbone", [None, tiny_clip, tiny_siglip2])
def test_encode_rows(backbone: Callable[[], Path] | None) -> None:
    given = {"backbone": str(backbone())} if backbone else {"shape": TINY, "vocabulary": 900}
    rows = bench_encode(**given, **FEW)
    by_name = {row["name"].removeprefix("encode."): row for row in rows}
    pairs = {"load": "load_bare", "tensors": "bare", "files": "preprocessed"}
    assert sorted(by_name) == sorted([*pairs, *pairs.values()])
    for ours, base in pairs.items():
        # Of two times and of two rates: each is ours over that of the bare way.
        assert by_name[base]["ratio"] is None
        expected = by_name[ours]["value"] / by_name[base]["value"]
        assert by_name[ours]["ratio"] == pytest.approx(expected, rel=0.02)
    assert "5 JPEG files of 48 px" in by_name["files"]["what"]
    assert ("random weights" in by_name["load"]["what"]) == (backbone is None)


@pytest.mark.parametrize(
    ("broken", "message"),
    [("pool_images", "the bare module's features"), ("open_image", "files and tensors")],
)
def test_what_differs_is_not_timed(
    broken: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "pool_images":
        plain = GloVLMModel.pool_images
        monkeypatch.setattr(GloVLMModel, broken, lambda self, **kw: plain(self, **kw) + 1e-3)
    else:
        white = Image.new("RGB", (48, 48), "white")
        monkeypatch.setattr(prediction, broken, lambda value: white)
    with pytest.raises(GloVLMError, match=message):
        bench_encode(shape=TINY, vocabulary=900, **FEW)


def test_a_pair_has_no_bare_module() -> None:
    with pytest.raises(GloVLMError, match="is a pair of two"):
        bench_encode(backbone=tiny_pair(), **FEW)


def test_each_work_takes_its_turn() -> None:
    calls: list[str] = []
    works = [partial(calls.append, name) for name in "ab"]
    assert len(shortest_in_turn(works, 3)) == 2
    assert "".join(calls) == "ababab"


def test_a_tokenizer_grows_to_the_size_asked_for(tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_clip() / "tokenizer.json", tmp_path))
    _grow_tokenizer(path, 1000)
    assert Tokenizer.from_file(str(path)).get_vocab_size() == 1000


def test_methods_rows_compare_what_gives_the_same() -> None:
    shape = Shape(image_size=32, patch=8, vision=(64, 4), text=(64, 3), context=40)
    rows = bench_methods(
        shape=shape, n_classes=3, shots=4, dim=32, rows=60, loop_pairs=5, repeats=1
    )
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == len(rows)
    pairs = {
        "methods.text_cut_4": "methods.text_full_4",
        "methods.text_once": "methods.text_each_step",
        "methods.epoch_2_0_once": "methods.epoch_2_0_plain",
        "methods.search": "methods.search_loop",
    }
    for ours, plain in pairs.items():
        expected = by_name[plain]["value"] / by_name[ours]["value"]
        assert by_name[ours]["ratio"] == pytest.approx(expected, rel=0.02)
    training_free = {name for name, m in METHODS.items() if m.family == "training-free"}
    assert training_free <= {name.removeprefix("methods.") for name in by_name}


def test_an_unknown_bench_is_named() -> None:
    with pytest.raises(GloVLMError, match="Did you mean 'cache'"):
        run_benches(["cahce"])
