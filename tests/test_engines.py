"""Engines: the default computes what the model does, others nearly so, and auto only measures.

One tower becomes a graph here, once; tests/long has the other kinds.
"""

import builtins
import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Glovlm
from tiny import CLASSES, tiny_clip, tiny_images, tiny_siglip2
from torch import Tensor

from hf_glovlm import (
    FeatureCache,
    GloVLMError,
    MemoryCache,
    Predictions,
    build_zero_shot,
    embed_images,
    evaluate,
    load_dataset,
    open_engine,
)
from hf_glovlm.backbones import load_backbone
from hf_glovlm.inference import Engine, engines

KINDS = [("bf16", "torch"), ("fp16", "torch"), ("fp32", "onnx"), ("int8", "onnx")]
KINDS += [("fp32", "openvino")]


@cache
def backbone() -> tuple[Any, Any]:
    return load_backbone(str(tiny_clip()))


@cache
def batch() -> dict[str, Tensor]:
    _, processor = backbone()
    pictures = [engines._draw(seed) for seed in range(20, 25)]
    return dict(processor(images=pictures, return_tensors="pt"))


@cache
def opened(precision: str, runtime: str) -> Engine:
    if runtime == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    return open_engine(*backbone(), precision=precision, runtime=runtime)


# ------------------------------------------------------------------------------ what is computed


def test_the_default_computes_what_the_model_does() -> None:
    model, processor = backbone()
    engine = open_engine(model, processor)
    with torch.inference_mode():
        plain = model.pool_images_and_middle(**batch())
    for ours, theirs in zip(engine.pool(batch()), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert (engine.key, engine.notes, engine.versions()) == ("", [], {})
    assert engine.describe() == {"precision": "fp32", "runtime": "torch"}


@pytest.mark.parametrize(("precision", "runtime"), KINDS)
def test_every_other_engine_computes_nearly_that(precision: str, runtime: str) -> None:
    engine, plain = opened(precision, runtime), open_engine(*backbone())
    small = 1e-5 if precision == "fp32" else 0.05
    for n in (1, 5):  # a graph takes any batch
        part = {name: tensor[:n] for name, tensor in batch().items()}
        for ours, theirs in zip(engine.pool(part), plain.pool(part), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == torch.float32
            gap = float((ours - theirs).abs().max() / theirs.abs().max())
            assert 0 < gap < small
    assert engine.key == f"-{runtime}-{precision}"
    assert engine.describe() == {"precision": precision, "runtime": runtime}
    assert f"by {runtime} in {precision}" in engine.notes[0]
    assert "openvino_telemetry" not in sys.modules  # which would report that it is used
    assert {*engine.versions()} == {"onnx": {"onnxruntime"}, "torch": set()}.get(runtime, {runtime})


def test_tf32_leaves_the_setting_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with engines._computing("cuda", "tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
    assert ("tf32", "torch") in engines._candidates("auto", "auto", "cuda")
    assert {r for _, r in engines._candidates("auto", "auto", "cuda")} == {"torch"}


def test_features_of_another_engine_are_stored_apart(tmp_path: Path) -> None:
    images = load_dataset(tiny_images(tmp_path, per_class=2))["all"]
    cache = MemoryCache()
    plain = embed_images(*backbone(), images, cache=cache)
    rough = embed_images(*backbone(), images, cache=cache, engine=opened("bf16", "torch"))
    assert (plain != rough).any()
    again = embed_images(*backbone(), images, cache=cache)
    assert (plain == again).all()


def test_a_model_that_changed_needs_a_new_engine(tmp_path: Path) -> None:
    images = load_dataset(tiny_images(tmp_path, per_class=1))["all"]
    other, processor = load_backbone(str(tiny_clip()))
    with pytest.raises(GloVLMError, match="one of another model"):
        embed_images(other, processor, images, engine=opened("bf16", "torch"))
    engine = open_engine(other, processor, precision="fp32", runtime="onnx")  # the kept graph
    embed_images(other, processor, images, engine=engine)
    with torch.no_grad():
        other.backbone.vision_model.post_layernorm.weight.mul_(1.01)
    with pytest.raises(GloVLMError, match="has changed since its engine was opened"):
        embed_images(other, processor, images, engine=engine)


# ----------------------------------------------------------------------------------- kept graphs


def test_a_graph_is_kept_listed_and_made_again_when_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened("int8", "onnx")
    (entry,) = [e for e in FeatureCache().entries() if "as a graph" in e.name]
    folder = FeatureCache().folder / entry.key
    assert entry.size > sum(f.stat().st_size for f in folder.glob("*/*.onnx"))
    made: list[Path] = []
    write = engines.quantise_graph

    def count(source: Path, target: Path, **kind: bool) -> None:
        made.append(target)
        write(source, target, **kind)

    monkeypatch.setattr(engines, "quantise_graph", count)
    open_engine(*backbone(), precision="int8", runtime="onnx")
    assert made == []
    graph = folder / "int8" / "tower.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    engine = open_engine(*backbone(), precision="int8", runtime="onnx")
    assert len(made) == 1
    assert torch.equal(engine.pool(batch())[0], opened("int8", "onnx").pool(batch())[0])


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engines.Session.run
    monkeypatch.setattr(
        engines.Session, "run", lambda *given: [values * 1.01 for values in run(*given)]
    )
    with pytest.raises(GloVLMError, match="does not compute this vision tower"):
        open_engine(*backbone(), runtime="onnx")


# ------------------------------------------------------------------------------------------ auto


class Clock:
    """Time by which each engine takes what a test says, whatever it really takes."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        return self.now


def choose(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, float],
    change: Callable[[str, Tensor], Tensor] = lambda name, pooled: pooled,
    **options: Any,
) -> tuple[Engine, list[str]]:
    """Ask auto of engines that take as many seconds an image."""
    clock, notes = Clock(seconds), list[str]()
    plain = open_engine(*backbone()).pool

    def pool_as(name: str) -> engines.Pool:
        def pool(inputs: Any) -> tuple[Tensor, Tensor]:
            clock.now += seconds[name] * len(inputs["pixel_values"])
            pooled, middle = plain(inputs)
            return change(name, pooled), middle

        return pool

    def open_choice(example: Any, choice: tuple[str, str]) -> engines.Pool:
        name = "-".join(reversed(choice))
        if name not in seconds:
            raise GloVLMError(f"no {name} here")
        return pool_as(name)

    monkeypatch.setattr(engines, "_open", open_choice)
    monkeypatch.setattr(engines, "_has_fast_products", lambda *given: True)
    monkeypatch.setattr(engines.time, "perf_counter", clock.perf_counter)
    asked = {"precision": "auto", "runtime": "auto"} | options
    return open_engine(*backbone(), on_note=notes.append, **asked), notes


def turn(name: str, pooled: Tensor) -> Tensor:
    """Features in int8 that agree with fp32 by a cosine of about .99."""
    return pooled + 0.1 * pooled.roll(1, dims=1) if name == "onnx-int8" else pooled


@pytest.mark.parametrize(
    ("seconds", "change", "options", "expected", "note"),
    [
        ({"torch-fp32": 1, "torch-bf16": 0.5, "onnx-int8": 0.3}, None, {}, "onnx-int8", "3.33"),
        ({"torch-fp32": 1, "torch-bf16": 0.5, "onnx-int8": 0.3}, turn, {}, "torch-bf16", "2.00"),
        ({"torch-fp32": 1, "torch-bf16": 0.95}, None, {}, "torch-fp32", "nothing"),
        ({"torch-fp32": 1, "torch-bf16": 5}, None, {}, "torch-fp32", "nothing"),
        ({"onnx-fp32": 1, "onnx-int8": 0.5}, None, {"runtime": "onnx"}, "onnx-int8", "2.00"),
        ({"torch-fp32": 1, "torch-bf16": 0.1}, None, {"workload": 3}, "torch-fp32", "little work"),
        ({"torch-bf16": 9, "openvino-bf16": 1}, turn, {"precision": "bf16"}, "openvino-bf16", "9"),
    ],
    ids=["fastest", "agreeing", "margin", "never-slower", "within", "little-work", "named"],
)  # fmt: skip
def test_auto_takes_the_fastest_that_agrees_and_gains(
    seconds: dict[str, float],
    change: Any,
    options: dict[str, Any],
    expected: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = () if change is None else (change,)
    engine, notes = choose(monkeypatch, seconds, *given, **options)
    assert f"{engine.runtime}-{engine.precision}" == expected
    assert note in notes[-1]
    assert engine.measured is not None
    json.dumps(engine.describe())
    rates = {f"{r['runtime']}-{r['precision']}": r for r in engine.measured["candidates"]}
    for name, taken in seconds.items():
        if "images_per_second" in rates.get(name, {}):
            assert rates[name]["images_per_second"] == pytest.approx(1 / taken)
    if change is turn and "onnx-int8" in seconds:
        assert rates["onnx-int8"]["agreement"] < engines.AGREEMENT
        assert "agree with fp32 by less than 0.998" in rates["onnx-int8"]["left_out"]


def test_what_auto_took_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = choose(monkeypatch, {"torch-fp32": 1, "torch-bf16": 0.5})
    kept = json.loads(json.dumps(first.describe()))
    again, notes = choose(monkeypatch, {"torch-fp32": 1, "torch-bf16": 9}, kept=kept)
    assert (again.describe(), notes) == (first.describe(), [])
    other, _ = choose(monkeypatch, {"torch-fp32": 1}, kept=kept, precision="fp32")
    assert other.precision == "fp32"  # what is named now counts


def test_nothing_that_can_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GloVLMError, match="no onnx-fp32 here"):
        choose(monkeypatch, {}, runtime="onnx")


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("precision", "runtime", "reason"),
    [
        ("fp64", "torch", "Unknown precision 'fp64'"),
        ("fp32", "onx", r"Unknown runtime 'onx'.*Did you mean 'onnx'\?"),
        ("int8", "torch", "no precision int8 on 'cpu'.* or the runtime onnx"),
        ("bf16", "onnx", "no precision bf16.* or the runtime torch or openvino"),
        ("tf32", "auto", "one of CUDA devices"),
    ],
)
def test_what_does_not_go_together_is_refused(precision: str, runtime: str, reason: str) -> None:
    with pytest.raises(GloVLMError, match=reason):
        open_engine(*backbone(), precision=precision, runtime=runtime)


def test_a_tower_of_varying_shapes_is_no_graph() -> None:
    with pytest.raises(GloVLMError, match="SigLIP 2 takes each image in a shape of its own"):
        open_engine(*load_backbone(str(tiny_siglip2())), runtime="onnx")


def test_weights_of_another_type_are_refused_but_by_the_default() -> None:
    model, processor = load_backbone(str(tiny_clip()))
    model.bfloat16()
    assert open_engine(model, processor).is_default
    with pytest.raises(GloVLMError, match="Expected a model in float32, found bfloat16"):
        open_engine(model, processor, precision="bf16")


@pytest.mark.parametrize(
    ("runtime", "package", "extra"), [("onnx", "onnxruntime", "export"), ("openvino",) * 3]
)
def test_a_missing_package_is_named(
    runtime: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = builtins.__import__

    def hide(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return find(name, *args, **kwargs)

    opened("fp32", "onnx")
    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(GloVLMError, match=rf"pip install 'hf-glovlm\[{extra}\]'"):
        open_engine(*backbone(), runtime=runtime)
    engine = open_engine(*backbone(), precision="fp32", runtime="auto", seconds=0.0)
    assert engine.measured is not None
    left = {row["runtime"]: row.get("left_out", "") for row in engine.measured["candidates"]}
    assert f"hf-glovlm[{extra}]" in left[runtime]


def test_measured_numbers_take_no_auto(tmp_path: Path) -> None:
    images = tiny_images(tmp_path, per_class=1)
    engine = Engine(backbone()[0], "bf16", "torch", {}, opened("bf16", "torch").pool)
    with pytest.raises(GloVLMError, match="asked for by name"):
        embed_images(*backbone(), load_dataset(images)["all"], engine=engine)
    with pytest.raises(GloVLMError, match="An evaluation takes no auto"):
        evaluate(tmp_path, images, precision="auto")


# ------------------------------------------------------------------------------------- commands


def test_results_state_what_computed_them(tmp_path: Path, glovlm: Glovlm) -> None:
    data = tiny_images(tmp_path / "images", per_class=2)
    prompts = {name: [f"a {name} glomerulus"] for name in CLASSES}
    classifier = build_zero_shot(*backbone(), prompts)
    model = tmp_path / "run" / "model"
    classifier.save_pretrained(model)
    backbone()[1].save_pretrained(model)
    output = tmp_path / "results.json"
    where = (model, "--data", data, "--output", output)
    table = tmp_path / "predictions.parquet"
    about = {"precision": "int8", "runtime": "onnx"}
    for asked, stated in (((), None), (("--precision", "int8", "--runtime", "onnx"), about)):
        done = glovlm("evaluate", *where, "--predictions", table, "--n-resamples", 9, *asked)
        assert done.code == 0, done.err
        results = json.loads(output.read_text())
        assert {k: results["config"].get(k) for k in about} == (stated or dict.fromkeys(about))
        assert ("onnxruntime" in results["environment"]) == (stated is not None)
        assert any("by onnx in int8" in text for text in results["notes"]) == bool(stated)
        assert Predictions.load(table).engine == stated
    done = glovlm("predict", model, data, "--precision", "auto")
    assert done.code == 0, done.err
    assert "auto: torch in fp32; there is too little work to measure for" in done.err
    refused = glovlm("predict", model, data, "--precision", "int8")
    assert (refused.code, len(refused.errors)) == (2, 1)
