"""What a run cannot do is refused when it is described, before anything is loaded."""

from typing import Any

import pytest

from hf_glovlm.errors import GloVLMError
from hf_glovlm.methods import METHODS, FeatureMethod
from hf_glovlm.runs.config import TrainConfig

SOLVED = [name for name, method in METHODS.items() if isinstance(method, FeatureMethod)]
TRAINED = [name for name in METHODS if name not in SOLVED]


def make(method: str, **given: Any) -> TrainConfig:
    shots = 0 if method == "zero_shot" else 2
    return TrainConfig(data="nowhere", output_dir="o", method=method, shots=shots, **given)


@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.parametrize("name", ["epochs", "lr", "weight_decay", "batch_size"])
def test_what_is_solved_has_no_recipe(method: str, name: str) -> None:
    assert make(method).adaptation("o").recipe == {}
    with pytest.raises(GloVLMError, match=f"'{method}' is solved, .* it has no {name} to set"):
        make(method, **{name: 1})


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_trained_has_one(method: str) -> None:
    given = {"epochs": 2, "lr": 1e-3, "weight_decay": 0.0, "batch_size": 4}
    assert make(method, **given).adaptation("o").recipe == given


def test_all_that_is_too_much_is_named() -> None:
    with pytest.raises(GloVLMError, match="it has no epochs, lr to set"):
        make("linear_probe", lr=0.1, epochs=3)
    with pytest.raises(
        GloVLMError, match="lr must be above 0"
    ):  # what is wrong anywhere comes first
        make("linear_probe", lr=0)
