"""The benches run and compare like with like. Nothing here depends on how long anything took."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Glovlm
from PIL import Image
from tiny import tiny_clip, tiny_pair, tiny_siglip2
from tokenizers import Tokenizer

from hf_glovlm import runs
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import engines, prediction
from hf_glovlm.lab import benches
from hf_glovlm.lab.benches import BENCHES, Bench, document, gpu, page
from hf_glovlm.lab.benches.cache import bench_cache
from hf_glovlm.lab.benches.data import bench_data, count_reads
from hf_glovlm.lab.benches.encode import _grow_tokenizer, bench_encode
from hf_glovlm.lab.benches.gpu import bench_gpu
from hf_glovlm.lab.benches.heads import ON_FEATURES, bench_heads
from hf_glovlm.lab.benches.methods import bench_methods
from hf_glovlm.lab.benches.metrics import bench_auc, bench_metrics, plain_metrics
from hf_glovlm.lab.benches.near_duplicates import KINDS, bench_near_duplicates
from hf_glovlm.lab.benches.runtimes import bench_runtimes
from hf_glovlm.lab.benches.startup import STARTS, bench_startup
from hf_glovlm.lab.benches.study import bench_study
from hf_glovlm.lab.benches.timing import UnavailableError, as_row, shortest_in_turn
from hf_glovlm.lab.benches.towers import Shape
from hf_glovlm.lab.benches.train import TimedTraining, bench_train
from hf_glovlm.methods import METHODS
from hf_glovlm.metrics import compute_metrics
from hf_glovlm.model import GloVLMModel


def test_the_loop_computes_what_the_bootstrap_does() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=80)
    probabilities = rng.dirichlet(np.ones(3), size=80)
    plain = plain_metrics(labels, probabilities)
    ours = compute_metrics(labels, probabilities, n_resamples=0)
    for name in ("accuracy", "balanced_accuracy", "macro_auc", "auprc", "macro_f1", "brier", "nll"):
        assert plain[name] == pytest.approx(ours["metrics"][name]["value"])
    for k in range(3):
        for name in ("recall", "specificity", "auc", "auprc"):
            assert plain[f"{name}_{k}"] == pytest.approx(ours["per_class"][str(k)][name]["value"])


def test_metrics_rows() -> None:
    rows = bench_metrics(n=200, n_groups=12, n_classes=3, n_resamples=40, loop_resamples=2)
    fast, *loops = rows
    assert fast["ratio"] is None
    for row in loops:
        assert row["ratio"] == pytest.approx(row["value"] / fast["value"], rel=0.02)
        assert "extrapolated from 2 resamples" in row["what"]


def test_rows_of_areas_and_near_duplicates() -> None:
    rows = list(bench_auc(sizes=(60, 90), n_groups=8, n_resamples=20, repeats=1))
    assert [row["name"] for row in rows] == ["metrics.auc_60", "metrics.auc_90"]
    assert min(row["value"] * row["ratio"] for row in rows) > 0
    assert {"distinct", "equal", "clustered"} == {*KINDS}
    time, memory = bench_near_duplicates(n=200, kinds=["clustered"], repeats=1)
    assert time["name"] == "near_duplicates.clustered"
    assert time["ratio"] > 0
    assert memory["name"] == "near_duplicates.memory_clustered"
    assert 0 <= memory["value"] < 100


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
        monkeypatch.setattr(prediction, broken, lambda value, draft: white)
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


def test_heads_are_compared_with_a_plain_loop_and_timed_at_a_large_size() -> None:
    trained = ("tip_adapter_f", "classifier")  # the shortest
    rows = bench_heads(
        n_classes=3, shots=3, dim=16, repeats=1, trained=trained, large=(2, 1, 8), queries=5
    )
    by_name = {row["name"]: row for row in rows}
    for name in trained:
        ours = by_name[f"methods.heads_{name}"]
        expected = by_name[f"methods.heads_{name}_loop"]["value"] / ours["value"]
        assert ours["ratio"] == pytest.approx(expected, rel=0.02)
    at_size = {f"methods.large_{name}" for name in ON_FEATURES} - {"methods.large_transclip"}
    assert at_size | {"methods.transclip_5", "methods.slowest_head"} <= set(by_name)


def test_startup_rows() -> None:
    bare = {"python": STARTS["python"], "json": ("`import json`", "import json")}
    first, second = bench_startup(starts=bare, repeats=1)
    assert (first["name"], first["ratio"]) == ("startup.python", None)
    assert second["ratio"] == pytest.approx(second["value"] / first["value"], rel=0.02)
    with pytest.raises(GloVLMError, match="failed: NameError: name 'nowhere' is not defined"):
        bench_startup(starts={"python": ("bare", "nowhere")}, repeats=1)


SMALL = Shape(image_size=32, patch=8, vision=(64, 4), text=(64, 2), context=40)


def test_an_epoch_stands_beside_that_of_a_plain_loop_of_equal_loss() -> None:
    methods = ["lora", "vanilla", "prompt_tuning"]  # convlm: among the rows of a GPU
    rows = list(bench_train(shape=SMALL, methods=methods, patients=1, epochs=2))
    for method, (plain, ours, before) in zip(
        methods, (rows[i : i + 3] for i in (0, 3, 6)), strict=True
    ):
        assert ours["ratio"] == pytest.approx(plain["value"] / ours["value"], rel=0.02)
        assert before["ratio"] == pytest.approx(before["value"] / plain["value"], rel=0.02)
        assert f"an epoch of {method}, 5 synthetic images, batches of 5" in ours["what"]


def test_a_training_of_another_loss_is_not_timed() -> None:
    timed = TimedTraining("an epoch", losses=[(1.0, 1.0), (0.9, 0.9002)])
    timed.check(1e-3)
    with pytest.raises(GloVLMError, match="the loss of epoch 2, an epoch, gives"):
        timed.check(1e-4)


def test_each_opening_and_each_decoding_of_an_image_counts_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        (folder / "table.csv").write_text("a")
    with count_reads(inside) as counted:
        for folder in (inside, outside):
            (folder / "table.csv").read_text()
            (folder / "a.png").read_bytes()
        with Image.open(inside / "a.png") as image:
            image.load()
            np.asarray(image.convert("L"))  # of pixels that are there
    Image.open(inside / "a.png").load()  # nobody counts any more
    assert counted == {"reads": 2, "decodes": 1}


def test_data_rows_are_means_over_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []

    def run(config: Any) -> None:
        paths = sorted(Path(config.data).rglob("*.png"))
        assert len(paths) == 10
        header = (Path(config.data) / "metadata.csv").read_text().splitlines()[0]
        assert ("patient_id" in header) == ("groups" in config.output_dir)
        for path in paths if "cold" in config.output_dir else paths[:1]:
            Image.open(path).load()
        caches.append(os.environ["GLOVLM_CACHE"])

    before = os.environ.get("GLOVLM_CACHE")
    monkeypatch.setattr(runs, "run", run)
    rows = {row["name"]: row for row in bench_data(patients=2, per_patient=5)}
    for suffix in ("", "_groups"):
        for kind in ("reads", "decodes"):
            assert rows[f"data.{kind}{suffix}_cold"]["value"] == 1
            assert rows[f"data.{kind}{suffix}"]["value"] == 0.1
        cold, warm = (rows[f"data.run{suffix}{state}"] for state in ("_cold", ""))
        assert warm["ratio"] == pytest.approx(cold["value"] / warm["value"], rel=0.02)
    assert [caches.index(cache) for cache in caches] == [0, 0, 2, 2]  # warm: the cold one's
    assert os.environ.get("GLOVLM_CACHE") == before


def test_runtimes_stand_beside_the_bare_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engines.open_engine

    def open_engine(model: Any, processor: Any, *, precision: str, runtime: str, **_: Any) -> Any:
        if runtime == "openvino":
            raise GloVLMError("It is not installed.")
        engine = plain(model, processor)
        if (precision, runtime) == ("fp32", "torch"):
            return engine

        def pool(inputs: Any) -> tuple[Any, Any]:
            pooled, middle = engine.pool(inputs)
            return pooled + 0.01 * pooled.flip(1), middle

        return replace(engine, precision="int8", runtime="onnx", pool=pool)

    monkeypatch.setattr(engines, "open_engine", open_engine)
    choices = [("fp32", "torch"), ("int8", "onnx"), ("fp32", "openvino")]
    rows = list(bench_runtimes(shape=TINY, choices=choices, batch_size=2, repeats=1))
    by_name = {row["name"].removeprefix("encode."): row for row in rows}
    assert by_name["runtime_bare"]["ratio"] is None
    assert by_name["torch_fp32_agreement"]["value"] == pytest.approx(1)
    assert 0.98 < by_name["onnx_int8_agreement"]["value"] < 1
    assert by_name["openvino_fp32"]["value"] is None
    assert "not measured: It is not installed." in by_name["openvino_fp32"]["what"]
    ratios = [by_name[name]["ratio"] for name in ("torch_fp32", "onnx_int8")]
    assert by_name["best"]["ratio"] == max(ratios)
    assert "what auto takes (onnx in int8)" in by_name["auto"]["what"]


ON_CPU: dict[str, Any] = {"device": "cpu", "shape": SMALL, "batch_sizes": (2,), "patients": 1}
ON_CPU |= {"epochs": 2, "repeats": 1, "compiler": "nowhere"}


def test_gpu_rows_on_a_cpu() -> None:
    rows = bench_gpu(**ON_CPU, arms=("fp32", "tf32", "bf16", "compiled"), methods=["convlm"])
    by_name = {row["name"].removeprefix("gpu."): row for row in rows}
    assert by_name["fp32_distance"]["value"] == 0
    assert 0 < by_name["bf16_distance"]["value"] < gpu.TOLERANCE["bf16"]
    assert by_name["bf16_distance"]["ratio"] < 1
    assert by_name["bare_2"]["ratio"] is None
    assert min(by_name[name]["ratio"] for name in ("fp32_2", "bf16_2")) > 0
    for name, reason in (("tf32", "one of CUDA devices"), ("compiled", "Invalid backend")):
        assert by_name[f"{name}_distance"]["value"] is None
        assert reason in by_name[f"{name}_distance"]["what"]
        assert f"{name}_2" not in by_name
    assert by_name["convlm_distance"]["value"] == 0  # the same loop, on the same device
    assert by_name["convlm"]["ratio"] > 0


def test_a_batch_that_does_not_fit_leaves_a_row_without_a_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = gpu._pool_bare

    def pool(tower: Any, pixels: Any) -> Any:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(tower, pixels)

    monkeypatch.setattr(gpu, "_pool_bare", pool)
    given = {**ON_CPU, "batch_sizes": (4, 2)}
    rows = {row["name"]: row for row in bench_gpu(**given, arms=["fp32"], methods=[])}
    assert rows["gpu.fp32_4"]["value"] is None
    assert "a batch of 4 does not fit" in rows["gpu.fp32_4"]["what"]
    assert rows["gpu.fp32_2"]["value"] > 0


def test_features_far_from_the_cpus_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.TOLERANCE, "bf16", 1e-6)
    rows = bench_gpu(**ON_CPU, arms=("bf16", "fp32"), methods=[])
    names = [next(rows)["name"] for _ in range(4)]
    assert names == ["gpu.bf16_distance", "gpu.fp32_distance", "gpu.bare_2", "gpu.fp32_2"]
    with pytest.raises(GloVLMError, match=r"gpu\.bf16_distance is .*, beyond the tolerance"):
        next(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_bench_is_one_sentence(glovlm: Glovlm) -> None:
    done = glovlm("bench", "gpu", "--json")
    assert done.code == 1
    assert "gpu is not complete: `bench gpu` measures a CUDA GPU, and PyTorch" in done.err
    assert json.loads(done.out)["rows"] == []


# ------------------------------------------------------------------------- registry and document


@pytest.mark.parametrize("name", BENCHES)
def test_a_registered_bench_is_there_and_takes_its_options(name: str) -> None:
    known: set[str] = set()
    for place in BENCHES[name].functions:
        parameters = inspect.signature(benches.load_function(place)).parameters
        known |= set(parameters)
        needed = {k for k, p in parameters.items() if p.default is p.empty}
        assert needed <= set(BENCHES[name].needs)
    assert {*BENCHES[name].takes, *BENCHES[name].needs} <= known
    assert (BENCHES[name].summary is None) or benches.load_function(BENCHES[name].summary)


def _row(name: str, value: float | None, ratio: float | None = None) -> dict[str, Any]:
    return as_row(name, value, "s", ratio, f"{name} in words")


def _fails() -> Iterator[dict[str, Any]]:
    yield _row("bad.first", 1.0)
    raise GloVLMError("It stopped.")


def _raises(error: BaseException) -> Callable[[], list[dict[str, Any]]]:
    def bench() -> list[dict[str, Any]]:
        raise error

    return bench


FAKES: dict[str, Callable[..., Any]] = {
    "good": lambda: [_row("good.time", 2.0, 0.5)],
    "bad": _fails,
    "broken": _raises(ZeroDivisionError("division\nby zero")),
    "absent": _raises(UnavailableError("No such device.")),
    "last": lambda backbone="mini": [_row(f"last.{backbone}", 3.0)],
    "interrupted": _raises(KeyboardInterrupt()),
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts fake benches, by name, in the place of all others."""

    def put(*names: str) -> None:
        monkeypatch.setattr(benches, "load_function", FAKES.__getitem__)
        for name in list(BENCHES):
            monkeypatch.delitem(BENCHES, name)
        for name in names:
            # Of two functions, one takes the option.
            places, takes = (("good", "last"), ("backbone",)) if name == "last" else ((name,), ())
            monkeypatch.setitem(BENCHES, name, Bench(places, name, takes=takes))

    return put


def test_a_bench_that_fails_loses_no_row(
    fakes: Callable[..., None], glovlm: Glovlm, tmp_path: Path
) -> None:
    fakes("bad", "broken", "absent", "last")
    output = tmp_path / "bench.json"
    for _ in range(2):  # an earlier document is replaced
        done = glovlm("bench", "--json", "--output", output, "--backbone", "plip")
    assert done.code == 1
    content = json.loads(done.out)
    assert content == json.loads(output.read_text())
    assert [row["name"] for row in content["rows"]] == ["bad.first", "good.time", "last.plip"]
    assert content["unfinished"] == {
        "bad": "It stopped.",
        "broken": "ZeroDivisionError: division by zero",
        "absent": "No such device.",
    }
    assert content["kind"] == "bench"
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(content["machine"]) == set(document.MACHINE)
    assert content["machine"]["threads"] == torch.get_num_threads()
    lines = done.err.splitlines()
    assert lines[:2] == ["bad, 1 of 4 ...", "bad: 0 s, not complete"]
    assert "absent is left out: No such device." in lines


def test_only_what_the_machine_lacks_is_no_failure_unless_it_was_named(
    fakes: Callable[..., None], glovlm: Glovlm
) -> None:
    fakes("good", "absent")
    assert [glovlm("bench").code, glovlm("bench", "good").code] == [0, 0]
    assert glovlm("bench", "absent").code == 1


def test_what_is_measured_outlives_an_interruption(
    fakes: Callable[..., None], glovlm: Glovlm, tmp_path: Path
) -> None:
    fakes("good", "interrupted", "last")
    done = glovlm("bench", "--json", "--output", tmp_path / "bench.json")
    assert done.code == 130
    assert [row["name"] for row in json.loads(done.out)["rows"]] == ["good.time"]
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(done.out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("cahce", "Did you mean 'cache'"),
        ("tissue encode", "`bench tissue` runs alone"),
        ("counting", "`bench counting` needs --data and --backbone."),
        ("metrics --backbone mini", "--backbone is for "),
        ("intervals --compare bench.json", "has no ratios to compare"),
        ("metrics --compare nowhere.json", "nowhere.json"),
        ("metrics --compare text.json", "is damaged or no JSON"),
        ("metrics --compare run.json", "Expected the JSON of `glovlm bench`, found something else"),
        ("metrics --compare rows.json", "is damaged: expected 'value' to be a number or nothing"),
        ("metrics --compare other.json", "`bench intervals` are not compared"),
        ("metrics --output run.json", "not the JSON of `glovlm bench`"),
        ("metrics --compare bench.json --output bench.json", "by this same command"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: str, expected: str, glovlm: Glovlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benches, "load_function", lambda place: pytest.fail(place))
    empty = {"kind": "bench", "machine": {}, "versions": {}, "rows": []}
    for name, content in {
        "text": "{",
        "run": json.dumps({"kind": "study"}),
        "bench": json.dumps(empty),
        "rows": json.dumps(empty | {"rows": [_row("a.b", 1.0) | {"value": "1"}]}),
        "other": json.dumps(empty | {"rows": [{"metric": "accuracy"}]}),
    }.items():
        (tmp_path / f"{name}.json").write_text(content)
    done = glovlm("bench", *arguments.split())
    assert (done.code, len(done.errors)) == (2, 1)
    assert expected in done.errors[0]


def _document(rows: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    about = {"cpu": "one", "flags": ["avx2"], "threads": 2} | machine
    versions = {"torch": "2.0"}
    content = {"kind": "bench", "machine": about, "versions": versions, "commit": "abc"}
    return content | {"rows": rows, "unfinished": {}}


BEFORE = [_row("metrics.a", 4.0, 2.0), _row("metrics.b", 0.0), _row("metrics.gone", 1.0)]
AFTER = [_row("metrics.a", 1.0, 3.0), _row("metrics.b", 5.0), _row("metrics.new", None)]


def test_rows_are_compared_by_name(
    fakes: Callable[..., None], glovlm: Glovlm, tmp_path: Path
) -> None:
    fakes("good")
    then = _document([_row("good.time", 8.0, 0.25), _row("good.gone", 1.0)], cpu="another")
    (tmp_path / "old.json").write_text(json.dumps(then))
    done = glovlm("bench", "--compare", tmp_path / "old.json")
    assert done.code == 0
    (row,) = (line.split() for line in done.out.splitlines() if line.startswith("good.time"))
    assert row == ["good.time", "s", "8", "2", "0.250", "0.250", "0.500", "2"]
    assert "Another machine (processor another before, " in done.err
    assert "compare ratios; seconds cannot be compared." in done.err
    assert "Measured before alone: good.gone." in done.err
    row = json.loads(glovlm("bench", "--compare", tmp_path / "old.json", "--json").out)["rows"][0]
    assert row["before"] == {"value": 8.0, "ratio": 0.25}
    assert row["quotient"] == {"value": 0.25, "ratio": 2.0}


def test_comparing_names_what_stands_in_one_alone_and_divides_by_nothing_absent() -> None:
    after = _document([dict(row) for row in AFTER])
    notes = document.compare_documents(after, _document(BEFORE))
    assert notes == ["Measured now alone: metrics.new.", "Measured before alone: metrics.gone."]
    quotients = [(row["quotient"]["value"], row["quotient"]["ratio"]) for row in after["rows"]]
    assert quotients == [(0.25, 1.5), (None, None), (None, None)]


def test_the_page_holds_every_row_and_judges_the_goals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goals = (
        page.Goal("metrics.a", "ratio", 3.0, "three times"),
        page.Goal("metrics.b", "value", 4.0, "four seconds", most=True),
        page.Goal("metrics.new", "value", 4.0, "not there"),
        page.Goal("metrics.a", "value", 1.0, "of others", instructions=frozenset(["amx_int8"])),
    )
    monkeypatch.setattr(page, "GOALS", goals)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(_document(BEFORE)))
    after.write_text(json.dumps(_document(AFTER) | {"unfinished": {"gpu": "No GPU."}}))
    page.main([str(after), "--before", str(before)])
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "| three times | `metrics.a` | at least 3 | 2 | 3 | met |",
        "| four seconds | `metrics.b` | at most 4 | 0 | 5 | **missed** |",
        "| not there | `metrics.new` | at least 4 |  |  | not measured |",
        "| of others | `metrics.a` | at least 1 | 4 | 1 | another processor |",
        "| `a` | 4 | 1 | s | 0.25 | 2 | 3 | metrics.a in words |",
        "| `b` | 0 | 5 | s |  |  |  | metrics.b in words |",
        "| `new` |  |  | s |  |  |  | metrics.new in words |",
        "| `gone` | 1 |  | s |  |  |  | metrics.gone in words |",
        "`gpu` is not complete here: No GPU.",
        "* Measured before alone: metrics.gone.",
    ):
        assert line in lines
    page.main([str(after)])
    lines = capsys.readouterr().out.splitlines()
    assert "| `a` | 1 | s | 3 | metrics.a in words |" in lines
    assert "| processor | one |" in lines


def test_the_committed_page_is_made_of_the_committed_documents() -> None:
    docs = Path(benches.__file__).parents[3] / "docs"
    if not (docs / "performance.md").is_file():
        pytest.skip("it has not been measured")
    after, before = (
        document.read_document(docs / "performance" / f"{name}.json")
        for name in ("after", "before")
    )
    assert (docs / "performance.md").read_text() == page.render_performance(after, before)


def test_a_goal_is_of_a_row_that_its_bench_gives() -> None:
    assert {goal.row.partition(".")[0] for goal in page.GOALS} <= set(BENCHES)


def test_instructions_are_those_that_the_system_states(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = "model name\t: A processor\nflags\t\t: fpu avx2 amx_int8 avx"
    (tmp_path / "cpuinfo").write_text(f"{first}\n\nflags\t: sve\n")
    monkeypatch.setattr(document, "_CPUINFO", tmp_path / "cpuinfo")
    about = document.describe_machine()
    assert (about["cpu"], about["flags"]) == ("A processor", ["avx2", "amx_int8"])
    monkeypatch.setattr(document, "_CPUINFO", tmp_path / "nowhere")
    assert document.describe_machine()["flags"] == []


def test_study_rows_part_a_cell_and_time_cells_that_are_finished() -> None:
    rows = bench_study(shape=TINY, n_patients=4, per_patient=5, shots=1, draws=3, n_cells=8)
    value = {row["name"].removeprefix("study."): row["value"] for row in rows}
    for backbone in ("mini", "clip"):
        parts = [value[f"{part}_{backbone}"] for part in ("fitting", "metrics", "overhead")]
        assert min(parts) > 0
        assert max(parts) < value[f"cell_{backbone}"]
    assert value["resume_10000"] > value["resume"] > 0
    assert "8 finished cells" in rows[-2]["what"]
