"""Settings: what is no sense is refused in a sentence, wherever it is given, before any work."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Glovlm
from tiny import tiny_clip, tiny_images

import hf_glovlm
from hf_glovlm import AdaptConfig, GloVLMError, MilConfig, SlideConfig, TrainConfig
from hf_glovlm.methods import METHODS, FeatureMethod
from hf_glovlm.slides.mil.aggregators import AGGREGATORS, build_aggregator

ROOT = Path(hf_glovlm.__file__).parents[1]
NAN, INF = math.nan, math.inf


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    """Fail instead of waiting."""

    def late(*_: Any) -> None:
        raise AssertionError(f"no answer within {limit} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("settings") / "data", per_class=4, groups=4)


# -------------------------------------------------------------------- the command line refuses

TRAIN = [
    # finite
    (["--set", "C=.nan"], "method_config: C must be a finite number; found nan"),
    (["--set", "C=.inf"], "method_config: C must be a finite number; found inf"),
    (["--method", "lora", "--lr", "nan"], "lr must be a finite number; found nan"),
    (["--method", "lora", "--lr", "inf"], "lr must be a finite number; found inf"),
    (["--method", "lora", "--weight-decay", "nan"], "weight_decay must be a finite number"),
    (["--method", "lora", "--clip-norm", "inf"], "clip_norm must be a finite number"),
    (["--test-fraction", "nan"], "test_fraction must be a finite number"),
    (["--alpha", "nan"], "alpha must be a finite number"),
    (["--method", "lora", "--set", "tuner_config={lora_alpha: .nan}"], "finite"),
    # in bounds
    (["--set", "C=-1"], "'C' of method 'linear_probe' must be above 0; found -1"),
    (["--set", "C=0"], "'C' of method 'linear_probe' must be above 0; found 0"),
    (["--method", "lora", "--set", "dropout=1"], "must be 0 or more and below 1"),
    (["--method", "lora", "--set", "r=0"], "'r' of method 'lora' must be 1 or more"),
    (["--method", "lora", "--set", "towers=vison"], "one of both, vision, text; found 'vison'"),
    (["--method", "lora", "--weight-decay", "-1"], "weight_decay must be 0 or more; found -1"),
    (["--test-fraction", "1"], "test_fraction must be above 0 and below 1"),
    (["--calibration-groups", "1", "--max-risk", "2"], "max_risk must be above 0 and below 1"),
    # of a size that a machine can do
    (["--seed", "4294967296"], "seed must be at most 4,294,967,295; found 4294967296"),
    (["--seed", str(2**64)], "seed must be at most"),
    (["--method", "lora", "--epochs", str(10**15)], "epochs must be at most"),
    (["--method", "lora", "--max-steps", str(10**15)], "max_steps must be at most"),
    (["--method", "lora", "--batch-size", str(10**12)], "batch_size must be at most"),
    (["--n-resamples", str(10**12)], "n_resamples must be at most"),
    (["--shots", str(10**12)], "shots must be at most"),
    (["--draw", str(10**12)], "draw must be at most"),
    (["--method", "classifier", "--set", f"hidden={10**12}"], "'hidden' .* must be at most"),
    (["--method", "lp_plus_plus", "--set", f"epochs={10**15}"], "'epochs' .* must be at most"),
    # prevalences
    (["--prior", "viable=.2,viable=.2"], "each class once"),
    (["--prior", "viable=.2,sclerosed=.2,mesangial=.2"], "prior must sum to 1; found 0.6"),
    (["--prior", "viable=-.5,sclerosed=1,mesangial=.5"], "prior must be above 0; found -0.5"),
    (["--prior", "viable=nan,sclerosed=.5,mesangial=.5"], "prior must be a finite number"),
    (["--prior", "viable=2,sclerosed=.5,mesangial=.5"], "prior must be at most 1; found 2"),
    # text that a file can hold
    (["--stain", "\udcff"], "stain must be text in UTF-8"),
    (["--set", "C=\udcff"], "it is not UTF-8 text"),
    (["--set", "\udcff=1"], "method_config must be text in UTF-8"),
    (["--method", "\udcff"], "method must be text in UTF-8"),
    (["--data", "\udcff"], "data must be text in UTF-8"),
    (["--output-dir", "\udcff"], "output_dir must be text in UTF-8"),
    (["--stain", "a\0b"], "stain must be text without a null character"),
    (["--shots", "\udcff=1"], "shots must be text in UTF-8"),
    (["--shots", "9" * 5000], "Expected --shots N"),
    # one number, one reading
    (["--set", "max_iter=010"], "010 is one number to some readers and another to others"),
    (["--set", "C=[1"], "is no YAML"),
]  # fmt: skip
SLIDE = [
    (["--overlap", "nan"], "overlap must be a finite number"),
    (["--overlap", "-.5"], "overlap must be 0 or more"),
    (["--overlap", "1"], "overlap must be at most 0.9"),
    (["--margin", "nan"], "margin must be a finite number"),
    (["--margin", "-1"], "margin must be 1 or more"),
    (["--min-tissue", "nan"], "min_tissue must be a finite number"),
    (["--threshold", "nan"], "threshold must be a finite number"),
    (["--mpp", "nan"], "mpp must be a finite number"),
    (["--mpp", "0"], "mpp must be above 0"),
    (["--tile-mpp", "-1"], "tile_mpp must be above 0"),
    (["--tile-size", "10000000"], "tile_size must be at most 8,192; found 10000000"),
    (["--workers", "1000000"], "workers must be at most 1,024"),
    (["--batch-size", str(10**12)], "batch_size must be at most"),
    (["--top", str(10**20)], "top must be at most"),
]
MIL = [
    (["--lr", "inf"], "lr must be a finite number"),
    (["--weight-decay", "nan"], "weight_decay must be a finite number"),
    (["--weight-decay", "-1"], "weight_decay must be 0 or more"),
    (["--test-fraction", "nan"], "test_fraction must be a finite number"),
    (["--validation-fraction", "nan"], "validation_fraction must be a finite number"),
    (["--epochs", str(10**15)], "epochs must be at most"),
    (["--folds", str(10**12)], "folds must be at most"),
    (["--seed", str(2**63)], "seed must be at most"),
    (["--n-resamples", str(10**12)], "n_resamples must be at most"),
    (["--set", "dropout=.nan"], "dropout must be a finite number"),
    (["--set", f"width={10**12}"], "'width' of aggregator 'abmil' must be at most"),
    (["--device", "cuda:99"], "device must be one of auto, cpu; found 'cuda:99'"),
]
PRETRAIN = [
    (["--patients", str(10**12)], "patients must be at most"),
    (["--workers", "1000000"], "workers must be at most 1,024"),
    (["--seed", "-1"], "seed must be 0 or more"),
    (["--seed", str(2**63)], "seed must be at most"),
    (["--epochs", str(10**15)], "epochs must be at most"),
]
COMMANDS: dict[str, list[Any]] = {
    "train": ["--data", "DATA", "--output-dir", "OUT", "--backbone", "TINY", "--shots", 1],
    "slide": ["nowhere", "a.svs", "--output-dir", "OUT"],
    "mil": ["--features", "nowhere", "--labels", "no.csv", "--output-dir", "OUT"],
    "pretrain": ["--output-dir", "OUT"],
}
TABLES = {"train": TRAIN, "slide": SLIDE, "mil": MIL, "pretrain": PRETRAIN}
REFUSED = [(name, *case) for name, cases in TABLES.items() for case in cases]


@pytest.mark.parametrize(("command", "given", "sentence"), REFUSED, ids=str)
def test_a_value_without_sense_is_refused_before_any_work(
    command: str, given: list[str], sentence: str, glovlm: Glovlm, data: Path, tmp_path: Path
) -> None:
    places = {"DATA": data, "OUT": tmp_path / "out", "TINY": tiny_clip()}
    base = [places.get(word, word) for word in COMMANDS[command]]
    with seconds(20):
        done = glovlm(command, *base, *given)
    assert done.code == 2, done
    assert len(done.errors) == 1
    assert re.search(sentence, done.errors[0]), done.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:99", "cuda:-1", "meta", "xpu", "gpu", "7"])
@pytest.mark.parametrize("method", ["linear_probe", "classifier"])
def test_a_device_that_is_not_there_is_refused_with_and_without_accelerate(
    method: str, device: str, glovlm: Glovlm, data: Path, tmp_path: Path
) -> None:
    done = glovlm(
        "train", "--data", data, "--output-dir", tmp_path / "o", "--backbone", tiny_clip(),
        "--shots", 1, "--method", method, "--device", device,
    )  # fmt: skip
    assert done.code == 2, done
    assert device in done.errors[0]
    assert "auto" in done.errors[0]
    assert not (tmp_path / "o").exists()


# -------------------------------------------------------------------------------------- YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcde", "bcdef", strict=True)
)
YAML = {
    "alias bomb": (BOMB, "more than 100,000 values, aliases included"),
    "alias of itself": ("a: &a [*a]", "the alias '*a' stands for nothing before it"),
    "deep nesting": ("a: " + "[" * 100_000, "nested more than 32 deep"),
    "deep blocks": ("".join(f"{'  ' * i}a:\n" for i in range(500)), "nested more than 32 deep"),
    "many values": ("".join(f"k{i}: 1\n" for i in range(70_000)), "more than 100,000 values"),
    "large file": ("a: " + "x" * 2**20, "found more than 1 MiB"),
    "key twice": ("data: d\ndata: e", "line 2: not valid YAML: the key 'data' stands there twice"),
    "key twice below": ("shots: {a: 1, a: 2}", "the key 'a' stands there twice"),
    "octal seed": ("seed: 010", "010 is one number to some readers and another to others"),
    "octal that is none": ("seed: 09", "write it without the leading 0"),
    "seed in quotes": ("seed: '010'", "seed must be a whole number; found '010'"),
    "hours": ("seed: 1:30", "seed must be a whole number; found '1:30'"),
    "nan": ("lr: .nan", "lr must be a finite number"),
    "inf": ("alpha: -.inf", "alpha must be a finite number"),
    "endless number": ("seed: " + "9" * 6000, "a number of 6000 digits is too long"),
    "date for a number": ("seed: 2024-01-01", "seed must be a whole number; found '2024-01-01'"),
    "tab": ("\tdata: d", "not valid YAML"),
    "control character": ("data: \x07", "control characters are not allowed"),
    "null character": ('data: "a\\0b"', "data must be text without a null character"),
    "Latin-1": ("stain: é".encode("latin-1"), "is not UTF-8"),
    "UTF-16": ("data: d".encode("utf-16"), "is not UTF-8"),
    "two documents": ("data: d\n---\ndata: e", "several documents"),
    "code": ("data: !!python/object/apply:os.getcwd []", "is not read: write plain values"),
    "a set": ("shots: !!set {a}", "is not read: write plain values"),
    "nothing": ("", "expected keys and values at the top, found nothing"),
    "a list": ("- data", "expected keys and values at the top, found a list"),
    "list for text": ("data: d\noutput_dir: [o]", "output_dir must be text; found ['o']"),
    "list for a number": ("lr: [1]", "lr must be a number or nothing; found [1]"),
    "mapping for a choice": ("loss: {a: 1}", "loss must be one of prototypes"),
    "truth for a number": ("seed: yes", "seed must be a whole number; found True"),
    "number for truth": ("augment: 1", "augment must be true or false; found 1"),
    "bare no where there is none": ("loss: no", "loss must be one of prototypes"),
    "nothing for a number": ("seed:", "seed must be a whole number; found None"),
    "key that is a number": ("7: 1", "Unknown setting '7'"),
    "merge key": ("<<: {data: d}", "Unknown setting '<<'"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_hostile_file_is_refused_within_a_second_or_two(
    case: str, glovlm: Glovlm, tmp_path: Path
) -> None:
    content, sentence = YAML[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = [] if "output_dir" in str(content)[:40] else ["--output-dir", tmp_path / "o"]
    given += [] if "data" in str(content)[:60] else ["--data", tmp_path]
    with seconds(5):
        done = glovlm("train", "--config", path, *given)
    assert done.code == 2, done
    assert sentence in done.errors[0]
    assert len(done.errors[0]) < 1000
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nothing"])
def test_only_a_regular_file_is_read(kind: str, glovlm: Glovlm, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with seconds(5):
        done = glovlm("train", "--config", path, "--data", "d", "--output-dir", tmp_path / "o")
    assert done.code == 2, done
    assert "Expected a YAML file" in done.errors[0]


def test_frozen_episodes_are_a_regular_file(glovlm: Glovlm, data: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("pipe.json", "deep.json"):
        with seconds(20):
            done = glovlm(
                "train", "--data", data, "--output-dir", tmp_path / "o", "--backbone", tiny_clip(),
                "--episodes", tmp_path / name,
            )  # fmt: skip
        assert done.code == 2, done
        assert name in done.errors[0]
    (tmp_path / "study.yaml").write_text(
        f"data: d\nmethods: [linear_probe]\nepisodes: {tmp_path / 'pipe.json'}\n"
    )
    with seconds(20):
        done = glovlm("study", "--config", tmp_path / "study.yaml", "--output-dir", tmp_path / "s")
    assert done.code == 2, done
    assert "a device or pipe" in done.errors[0]


def test_classes_and_catalogue_are_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(f"classes:\n  a: {{prompts: [x]}}\n{BOMB}")
    with seconds(5), pytest.raises(GloVLMError, match="aliases included"):
        hf_glovlm.load_classes(["a", "b"], prompts=path)
    path.unlink()
    os.mkfifo(path)
    with seconds(5), pytest.raises(GloVLMError, match="a device or pipe"):
        hf_glovlm.load_classes(["a", "b"], prompts=path)


def test_a_study_is_read_by_the_same_rules(glovlm: Glovlm, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    for line, sentence in (
        ("shots: 010", "010 is one number"),
        ("lr: .nan", "lr must be a finite number"),
        (f"draws: {10**12}", "at most 100,000 draws"),
        (f"seed: {2**70}", "seed must be at most"),
        ("device: cuda:99", "Device 'cuda:99' was asked for"),
        (
            "methods: [{name: gda, method_config: {alpha: .nan}}]\nreference: gda",
            "alpha must be a finite number",
        ),
    ):
        methods = "" if "methods" in line else "methods: [linear_probe]\n"
        path.write_text(f"data: d\n{methods}{line}\n")
        with seconds(10):
            done = glovlm("study", "--config", path, "--output-dir", tmp_path / "o")
        assert done.code == 2, done
        assert sentence in done.errors[0]
    assert not (tmp_path / "o").exists()


def test_an_empty_mapping_is_none(tmp_path: Path) -> None:
    given = {"data": "d", "output_dir": "o", "method_config": None}
    assert TrainConfig.from_mapping(given).method_config == {}


def test_words_are_read_as_a_person_means_them(tmp_path: Path) -> None:
    from hf_glovlm.settings import read_yaml

    words = {
        "2024-01-01": "2024-01-01", "1:30": "1:30", "1e-3": "1e-3", "1.5e3": 1500.0, ".5": 0.5,
        "0x1F": 31, "1_000": 1000, "-7": -7, "0": 0, "0.0": 0.0, "no": False, "Yes": True,
        "ON": True,
        "y": "y", "~": None, "": None, "'no'": "no", '"010"': "010", "!!str 010": "010", "=": "=",
        "[1, [a]]": [1, ["a"]], "{01: 1, no: 2}": {"01": 1, "no": 2},
    }  # fmt: skip
    path = tmp_path / "a.yaml"
    path.write_text(
        "".join(f"k{i}: {word}\n" for i, word in enumerate(words)), encoding="utf-8-sig"
    )
    assert list(read_yaml(path).values()) == list(words.values())
    path.write_text("a: &x {b: 1}\nc: *x\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}}


# ---------------------------------------------------------------- every declaration, from Python

CONFIGS: list[tuple[type, dict[str, Any]]] = [
    (TrainConfig, {"data": "d", "output_dir": "o"}),
    (AdaptConfig, {}),
    (MilConfig, {"features": "f", "labels": "l", "output_dir": "o"}),
    (SlideConfig, {"model": "m", "slides": ["s"], "output_dir": "o"}),
]


def numbers(config: type, required: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that hold a number, and its kind."""
    for name, value in asdict(config(**required)).items():  # type: ignore[call-overload]
        hint = str(next(f.type for f in fields(config) if f.name == name))
        if type(value) in (int, float) or (value is None and ("int" in hint or "float" in hint)):
            yield name, value


@pytest.mark.parametrize(("config", "required"), CONFIGS, ids=lambda value: str(value)[-20:])
def test_no_number_is_text_or_truth_or_endless(config: type, required: dict[str, Any]) -> None:
    seen = 0
    for name, _ in numbers(config, required):
        for wrong in (NAN, INF, -INF, "many", True, [1], 10**400, -(10**400)):
            with pytest.raises(GloVLMError, match=name):
                config(**required, **{name: wrong})
        seen += 1
    assert seen > 3


def own_settings() -> Iterator[tuple[str, Callable[[dict[str, Any]], Any], dict[str, Any]]]:
    for name, method in METHODS.items():
        yield name, method.configure, asdict(method.Config())
    for name, kind in AGGREGATORS.items():
        yield (
            name,
            lambda given, name=name: build_aggregator(name, 4, 2, given),
            asdict(kind.Config()),
        )


@pytest.mark.parametrize(
    ("name", "configure", "settings"), list(own_settings()), ids=lambda v: str(v)[:20]
)
def test_a_methods_numbers_are_numbers(
    name: str, configure: Callable[[dict[str, Any]], Any], settings: dict[str, Any]
) -> None:
    configure(settings)
    for key, value in settings.items():
        if type(value) in (int, float):
            for wrong in (NAN, INF, -INF, "many", True, None, [1], 10**400):
                with pytest.raises(GloVLMError, match=f"'{key}' of "):
                    configure({key: wrong})
        if type(value) is int:
            with pytest.raises(GloVLMError, match=f"'{key}' of "):
                configure({key: 10**12})
        if type(value) is float:  # no rate, weight or share of these is below 0
            with pytest.raises(GloVLMError, match=f"'{key}' of "):
                configure({key: -0.5})


def test_configs_are_values(tmp_path: Path) -> None:
    for config, required in CONFIGS:
        made = config(**required)
        for field in fields(config):
            with pytest.raises(FrozenInstanceError):
                setattr(made, field.name, None)
        assert replace(made) == made
        assert config(**asdict(made)) == made


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np
    import torch

    made = TrainConfig(
        data=Path("d"), output_dir=Path("o"), seed=np.int64(3), test_fraction=np.float32(0.25),
        augment=np.bool_(True), method="classifier", lr=torch.tensor(0.5), shots={"a": np.int8(2)},
    )  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(made.to_repeat())) == made.to_repeat()
    assert (made.seed, made.test_fraction, made.shots) == (3, 0.25, {"a": 2})


RULES: list[tuple[type, dict[str, Any], str]] = [
    (AdaptConfig, {"loss": "infonc"}, "loss must be one of .*Did you mean 'infonce'"),
    (AdaptConfig, {"seed": -1}, "seed must be 0 or more; found -1"),
    (AdaptConfig, {"accumulate": 0}, "accumulate must be 1 or more"),
    (AdaptConfig, {"accumulate": 2, "loss": "infonce"}, "negatives are the whole batch; found 2"),
    (AdaptConfig, {"max_steps": 0}, "max_steps must be above 0; found 0"),
    (AdaptConfig, {"clip_norm": -1.0}, "clip_norm must be above 0"),
    (AdaptConfig, {"recipe": {"lr": 0.0}}, "lr must be above 0"),
    (AdaptConfig, {"recipe": {"epochs": 0}}, "epochs must be above 0"),
    (AdaptConfig, {"recipe": {"batchsize": 4}}, "no 'batchsize' .*Did you mean 'batch_size'"),
    (AdaptConfig, {"recipe": 3}, "recipe must be a mapping of names to values; found 3"),
    (AdaptConfig, {"resume": True}, "give output_dir"),
    (AdaptConfig, {"sed": 1}, "Unknown setting 'sed' .*Did you mean 'seed'"),
    (TrainConfig, {"data": ""}, "needs data: give --data"),
    (TrainConfig, {"data": 7}, "data must be a folder, .* or a DatasetDict; found int"),
    (TrainConfig, {"output_dir": " "}, "output_dir must not be empty"),
    (
        TrainConfig,
        {"method": "linear_probe", "lr": 0.1, "epochs": 3},
        "it has no epochs, lr to set",
    ),
    (TrainConfig, {"method": "linear_probe", "lr": 0.0}, "lr must be above 0"),
    (SlideConfig, {"slides": "one.svs"}, "slides must be a list of texts; found 'one.svs'"),
    (SlideConfig, {"slides": []}, "A run over slides needs slides: give SLIDES or 'slides:'"),
    (SlideConfig, {"case": "a", "cases": "b"}, "Give either --cases"),
    (
        MilConfig,
        {"aggregator": "transmil", "aggregator_config": {"width": 20}},
        "multiple of heads",
    ),
]


@pytest.mark.parametrize(("config", "given", "sentence"), RULES, ids=str)
def test_rules_of_each_config(config: Any, given: dict[str, Any], sentence: str) -> None:
    required = next(known for kind, known in CONFIGS if kind is config)
    with pytest.raises(GloVLMError, match=sentence):
        config.from_mapping({**required, **given})


@pytest.mark.parametrize("config", [AdaptConfig, TrainConfig, MilConfig, SlideConfig])
@pytest.mark.parametrize("given", [7, "seed", [("seed", 1)], {7: 1}])
def test_settings_are_given_by_name(config: Any, given: Any) -> None:
    with pytest.raises(GloVLMError, match=r"by their names|Unknown setting '7'"):
        config.from_mapping(given)
    with pytest.raises(GloVLMError, match=r"by their names|has no setting '7'"):
        METHODS["lora"].configure(given)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_solved_has_no_recipe_and_what_is_trained_has_one(method: str) -> None:
    base: dict[str, Any] = {"data": "d", "output_dir": "o", "method": method}
    base["shots"] = 0 if method == "zero_shot" else 2
    given = {"epochs": 2, "lr": 1e-3, "weight_decay": 0.0, "batch_size": 4}
    if not isinstance(METHODS[method], FeatureMethod):
        assert TrainConfig(**base, **given).adaptation("o").recipe == given
        return
    assert TrainConfig(**base).adaptation("o").recipe == {}
    for name, value in given.items():
        with pytest.raises(GloVLMError, match=f"'{method}' is solved, .* it has no {name} to set"):
            TrainConfig(**base, **{name: value})


@pytest.mark.parametrize("wrong", [object(), {1, 2}, b"x", lambda: 0, {"a": {"b": object()}}])
def test_settings_of_others_are_values_that_a_file_can_hold(wrong: Any) -> None:
    with pytest.raises(GloVLMError, match="tuner_config"):
        METHODS["lora"].configure({"tuner_config": {"x": wrong}})


def test_a_recipe_in_part_is_checked_like_the_rest() -> None:
    for given, sentence in (
        ({"lr": NAN}, "lr must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"schedule": "cosin"}, "schedule must be one of .*mean 'cosine'"),
        ({"steps": 10**12}, "steps must be at most"),
        ({"by_step": 1}, "by_step must be true or false"),
    ):
        with pytest.raises(GloVLMError, match=sentence):
            AdaptConfig(recipe=given)
    assert AdaptConfig(recipe={"lr": "1e-3", "final_lr": 0}).recipe == {"lr": 1e-3, "final_lr": 0}


# --------------------------------------------------- one declaration: options, results, card, docs


def declared_classes() -> list[type]:
    from hf_glovlm.lab.pretraining_config import PretrainConfig
    from hf_glovlm.runs.study import StudyConfig

    own = [method.Config for method in METHODS.values()]
    own += [kind.Config for kind in AGGREGATORS.values()]
    return list(dict.fromkeys([*(c for c, _ in CONFIGS), StudyConfig, PretrainConfig, *own]))


def test_every_setting_is_explained_in_its_class_and_on_the_page() -> None:
    from hf_glovlm.cli.reference import render_reference
    from hf_glovlm.settings import Settings, declarations

    page = render_reference()
    for config in declared_classes():
        assert issubclass(config, Settings)
        for name, declared in declarations(config).items():
            assert declared.help, name
            assert f"        {name}: {declared.help}" in (config.__doc__ or "")
            assert declared.help.replace("|", "\\|") in page
            assert declared.required or declared.default is not None or declared.unset, name
    file = ROOT / "docs" / "settings.md"
    assert file.read_text(encoding="utf-8") == page, "write it again: make docs"


def options_of_command(command: str) -> dict[str, Any]:
    import typer

    from hf_glovlm.cli.app import app

    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[command].params}


@pytest.mark.parametrize(
    ("command", "config", "own"),
    [("train", TrainConfig, "method_config"), ("mil", MilConfig, "aggregator_config"),
     ("slide", SlideConfig, "")],
)  # fmt: skip
def test_a_command_has_an_option_for_each_setting_with_its_true_default(
    command: str, config: type, own: str
) -> None:
    from hf_glovlm.settings import declarations

    options = options_of_command(command)
    table = declarations(config)
    assert set(options) - {"config", "settings", "as_json", "help"} == set(table) - {own}
    for name, declared in table.items():
        if name == own:
            assert options["settings"].opts == ["--set"]
            continue
        option = options[name]
        assert option.default is None
        if not declared.argument:
            assert f"--{name.replace('_', '-')}" in option.opts
        if not declared.required:
            assert f"(default: {declared.default_text})" in option.help
            assert option.rich_help_panel == declared.group
    in_order = [name for name in options if name in table]
    assert not any(
        table[late].required and not table[early].required for early, late in pairwise(in_order)
    )


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\nfrom hf_glovlm.cli import main\n"
        "for command in ('train', 'slide', 'mil', 'pretrain', 'study'): main([command, '--help'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_one_more_setting_is_read_shown_kept_and_documented(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared in one place, it stands in YAML, options, results, card and reference."""
    import typer
    from typer.testing import CliRunner

    import hf_glovlm.cli.reference as reference
    from hf_glovlm.cli.options import JsonFlag, options_of
    from hf_glovlm.settings import setting

    @dataclass(frozen=True)
    class MoreConfig(TrainConfig):
        """A run's settings, and one more."""

        jitter: float = setting(
            0.25, help="Share of the stain that varies.", group="Training", least=0, most=1
        )

    made: list[MoreConfig] = []
    app = typer.Typer()

    @app.command()
    @options_of(MoreConfig, own="method_config")
    def command(checked: MoreConfig, as_json: JsonFlag = False) -> None:
        """Do it."""
        made.append(checked)

    path = tmp_path / "run.yaml"
    path.write_text("jitter: 5e-1\n")
    base = ["--data", str(data), "--output-dir", str(tmp_path / "run"), "--config", str(path)]
    runner = CliRunner()
    for more in ([], ["--jitter", "0.75"]):
        assert runner.invoke(app, [*base, *more], catch_exceptions=False).exit_code == 0
    assert [config.jitter for config in made] == [0.5, 0.75]
    with pytest.raises(GloVLMError, match="jitter must be at most 1; found 7"):
        runner.invoke(app, [*base, "--jitter", "7"], catch_exceptions=False)
    (option,) = (p for p in typer.main.get_command(app).params if p.name == "jitter")
    assert option.help == "Share of the stain that varies. (default: 0.25)"  # type: ignore[attr-defined]
    assert option.rich_help_panel == "Training"  # type: ignore[attr-defined]

    config = replace(
        made[0], backbone=str(tiny_clip()), shots=1, n_resamples=10, cache=False, save_model=False
    )
    results = hf_glovlm.run(config)
    assert results["config"]["jitter"] == config.to_repeat()["jitter"] == 0.5
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["jitter"] == 0.5
    assert "| jitter | `0.5` |" in (tmp_path / "run" / "README.md").read_text()

    monkeypatch.setattr(reference, "TrainConfig", MoreConfig)
    row = "| `jitter` | a number | 0.25 | 0 ... 1 | Share of the stain that varies. |"
    assert row in reference.render_reference()
    assert "jitter: Share of the stain that varies." in str(MoreConfig.__doc__)


def test_a_card_shows_no_text_that_a_person_wrote() -> None:
    """Choices may be shown; free text may name a place."""
    from hf_glovlm.publish.card import NOT_IN_SETTINGS
    from hf_glovlm.settings import declarations

    for name, declared in declarations(TrainConfig).items():
        free = str in (declared.hint, *getattr(declared.hint, "__args__", ()))
        assert not free or name in NOT_IN_SETTINGS, name
    assert set(declarations(TrainConfig)) >= NOT_IN_SETTINGS
