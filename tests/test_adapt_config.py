"""`AdaptConfig`: how to train, checked before anything is loaded."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_clip, tiny_images

from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.runs.config import TrainConfig
from hf_glovlm.training import AdaptConfig, adapt


def test_what_cannot_be_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(GloVLMError, match=r"loss must be one of .*Did you mean 'infonce'"):
        adapt("no such backbone", "lora", None, config={"loss": "infonc"})  # type: ignore[arg-type]
    with pytest.raises(GloVLMError, match="Expected settings by their names"):
        adapt("no such backbone", "lora", None, config=7)  # type: ignore[arg-type]


def test_settings_are_those_of_the_method() -> None:
    with pytest.raises(GloVLMError, match="has no setting 'rank'"):
        adapt("nowhere", "lora", None, config={"method_config": {"rank": 2}})  # type: ignore[arg-type]


def test_a_run_hands_over_all_that_it_shares_with_an_adaptation() -> None:
    given: dict[str, Any] = {
        "method_config": {"vision_layers": 1}, "loss": "infonce", "cross_validate": True,
        "max_steps": 7, "seed": 3, "augment": True, "clip_norm": 0.5, "resume": True,
    }  # fmt: skip
    recipe = {"epochs": 2, "lr": 1e-3}
    run = TrainConfig(data="nowhere", output_dir="o", method="vanilla", **given, **recipe)
    assert run.adaptation("work") == AdaptConfig(**given, recipe=recipe, output_dir="work")
    # The replay of frozen blocks changes no result, so a run has no setting for it.
    shared = {f.name for f in fields(AdaptConfig)} & {f.name for f in fields(TrainConfig)}
    assert {f.name for f in fields(AdaptConfig)} - shared == {"recipe", "replay"}


def test_a_mapping_does_for_a_config(tmp_path: Path) -> None:
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images", per_class=2)))
    given: dict[str, Any] = {"seed": 1, "recipe": {"epochs": 2}}
    heads = []
    for config in (given, AdaptConfig(**given), {**given, "seed": 2}):
        head = adapt(str(tiny_clip()), "classifier", rows, config=config).model.head
        heads.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
