"""The loop: same batches, same rates, same weights, however it is cut into parts or interrupted."""

import copy
import itertools
import json
import math
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from remembers import Remembers
from safetensors import safe_open
from tiny import tiny_clip, tiny_images
from torch import Tensor, nn

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.files import write_text
from hf_glovlm.inference.views import reframe
from hf_glovlm.methods import Recipe
from hf_glovlm.model import MLPHead
from hf_glovlm.model.heads import CacheHead, ResidualHead
from hf_glovlm.training import loop
from hf_glovlm.training.loop import (
    FeatureSource,
    ImageSource,
    TensorSource,
    ViewSource,
    fit,
    gather,
    learning_rate,
    seed_everything,
    world_size,
)
from hf_glovlm.training.losses import HeadStep

ADAMW = Recipe(lr=1e-2, epochs=5, batch_size=5, weight_decay=0.05)
SGD = Recipe(lr=0.1, epochs=5, batch_size=4, optimizer="sgd", schedule="cosine", warmup_epochs=1)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def support(n: int = 11, dim: int = 6, classes: int = 3) -> TensorSource:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % classes
    inputs = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return TensorSource(inputs + labels.unsqueeze(1), labels)


def plain_step(dim: int = 6, classes: int = 3) -> HeadStep:
    """Two layers in float64, nothing random, no batch statistics."""
    torch.manual_seed(1)
    return HeadStep(nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, classes)).double())


def random_step() -> HeadStep:
    """Dropout and batch statistics."""
    torch.manual_seed(1)
    return HeadStep(MLPHead(6, 3, hidden=16, dropout=0.5).double())


def groups(step: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(step.parameters())}]


def state(step: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in step.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


# ------------------------------------------------------------------------------------ learning rate


@pytest.mark.parametrize(("epochs", "final_lr"), [(20, 0.01), (7, 0.0), (1, 0.5)])
def test_the_cosine_is_torchs(epochs: int, final_lr: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, final_lr * 1e-4)
    recipe = Recipe(lr=1e-4, epochs=epochs, batch_size=5, schedule="cosine", final_lr=final_lr)
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        rate = learning_rate(recipe, 1e-4, epoch, recipe.epochs)
        assert rate == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        schedule.step()


def test_coops_first_epoch_is_at_the_warm_up_rate_and_its_cosine_begins_after() -> None:
    recipe = Recipe(
        lr=2e-3, epochs=50, batch_size=32, schedule="cosine", warmup_epochs=1, warmup_lr=1e-5
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    assert learning_rate(recipe, 2e-3, 0, recipe.epochs) == 1e-5
    for epoch in range(1, 50):
        expected = optimizer.param_groups[0]["lr"]
        rate = learning_rate(recipe, 2e-3, epoch, recipe.epochs)
        assert rate == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()


def test_each_group_has_its_own_rate(accelerator: Accelerator) -> None:
    step = plain_step()
    first, last = step.head[0], step.head[2]
    before = state(step)
    recipe = Recipe(lr=0.5, epochs=1, batch_size=99, weight_decay=0.0, optimizer="sgd")
    source = support()
    log = fit(
        step,
        [{"params": list(first.parameters())}, {"params": list(last.parameters()), "lr": 0.01}],
        source,
        recipe,
        accelerator=accelerator,
    )
    assert log[0]["lr"] == 0.5
    moved = {n: before[n] - t for n, t in state(step).items()}
    again = plain_step()
    again(source.inputs, source.labels, torch.ones(11), 11).backward()
    for name, parameter in again.named_parameters():
        rate = 0.5 if name.startswith("head.0") else 0.01
        assert torch.allclose(moved[name], rate * parameter.grad, atol=1e-12)


# ------------------------------------------------------------------------------- batches and steps


class Watched(TensorSource):
    """Notes which rows were asked for."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source.inputs, source.labels)
        self.asked: list[list[int]] = []

    def fetch(self, index: Sequence[int]) -> Tensor:
        self.asked.append(list(index))
        return super().fetch(index)


def test_every_row_is_seen_once_an_epoch_in_a_new_order(accelerator: Accelerator) -> None:
    orders = []
    for seed in (0, 0, 1):
        source = Watched(support())
        step = plain_step()
        recipe = replace(ADAMW, epochs=3)
        fit(step, groups(step), source, recipe, accelerator=accelerator, seed=seed)
        assert [len(batch) for batch in source.asked] == [5, 5, 1] * 3
        epochs = [list(itertools.chain(*source.asked[i : i + 3])) for i in (0, 3, 6)]
        assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        orders.append(epochs)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("build", [plain_step, random_step])  # the last batch is one row
@pytest.mark.parametrize("views", [0, 3])
@pytest.mark.parametrize(
    ("recipe", "clip_norm"), [(ADAMW, 0.1), (SGD, None), (replace(ADAMW, batch_size=99), None)]
)
def test_slices_of_features_train_as_rows_that_are_fetched_one_by_one(
    accelerator: Accelerator,
    build: Callable[[], HeadStep],
    views: int,
    recipe: Recipe,
    clip_norm: float | None,
) -> None:
    recipe = replace(recipe, sampling="class_balanced" if views else "shuffled")
    given_ = support(n=11)
    shown = given_.inputs.unsqueeze(1) + torch.arange(max(views, 1)).view(1, -1, 1)

    class Fetched(TensorSource):
        epoch = -1

        def fetch(self, index: Sequence[int]) -> Tensor:
            return torch.stack([shown[i, self.epoch % shown.shape[1]] for i in index])

    by_rows, by_slices = build(), build()
    rows, steps = Fetched(given_.inputs, given_.labels), recipe.epochs

    def note(row: dict[str, Any]) -> None:
        rows.epoch = row["epoch"]

    rows.epoch = 0
    whole = ViewSource(shown, given_.labels) if views else FeatureSource(*vars(given_).values())
    options: dict[str, Any] = {"accelerator": accelerator, "clip_norm": clip_norm, "seed": 3}
    expected = fit(by_rows, groups(by_rows), rows, recipe, on_epoch=note, **options)
    log = fit(by_slices, groups(by_slices), whole, recipe, **options)
    assert same(state(by_slices), state(by_rows))
    assert len(log) == steps
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in expected])


@pytest.mark.parametrize("head", [ResidualHead(6, 3, 2), CacheHead(6, 3, 4)])
def test_features_that_are_normalised_once_train_as_at_every_step(
    accelerator: Accelerator, head: nn.Module
) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    given_, heads = support(), [copy.deepcopy(head).double() for _ in range(2)]
    steps = [HeadStep(heads[0]), HeadStep(heads[1], on_unit=True)]
    unit = nn.functional.normalize(given_.inputs, dim=-1)
    for step, inputs in zip(steps, (given_.inputs, unit), strict=True):
        source = FeatureSource(inputs, given_.labels)
        fit(step, groups(step), source, ADAMW, accelerator=accelerator)
    assert same(state(steps[0]), state(steps[1]))
    assert not same(state(steps[1].head), state(copy.deepcopy(head).double()))


def test_full_batches_train_as_plain_torch_does(accelerator: Accelerator) -> None:
    recipe = replace(ADAMW, epochs=6, batch_size=11, schedule="cosine", final_lr=0.01)
    source, step = support(), plain_step()
    log = fit(step, groups(step), source, recipe, accelerator=accelerator)

    oracle = plain_step()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=1e-4)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(oracle.head(source.inputs), source.labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert furthest(state(step), state(oracle)) < 1e-9
    assert [row["loss"] for row in log] == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_accumulating_parts_equals_the_whole_batch(
    accelerator: Accelerator, recipe: Recipe, parts: int
) -> None:
    whole, cut = plain_step(), plain_step()
    logs = [
        fit(step, groups(step), support(), recipe, accelerator=accelerator, accumulate=n)
        for step, n in ((whole, 1), (cut, parts))
    ]
    assert furthest(state(whole), state(cut)) < 1e-10
    losses = [[row["loss"] for row in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(accelerator: Accelerator) -> None:
    recipe = Recipe(lr=1.0, epochs=1, batch_size=11, weight_decay=0.0, optimizer="sgd")
    moves = []
    for clip_norm in (None, 0.01, 1e6):
        step = plain_step()
        before = state(step)
        fit(step, groups(step), support(), recipe, accelerator=accelerator, clip_norm=clip_norm)
        moves.append(torch.cat([(before[n] - t).flatten() for n, t in state(step).items()]))
    without, clipped, loose = moves
    assert without.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped / clipped.norm(), without / without.norm(), atol=1e-6)
    assert torch.equal(loose, without)


def test_mixed_precision_reaches_the_step() -> None:
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        step = plain_step().float()
        source = TensorSource(support().inputs.float(), support().labels)
        mixed = Accelerator(cpu=True, mixed_precision=precision)
        log = fit(step, groups(step), source, ADAMW, accelerator=mixed)
        assert {p.dtype for p in step.parameters()} == {torch.float32}
        losses.append(log[-1]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_scaled_loss_trains_as_the_loss(accelerator: Accelerator, recipe: Recipe) -> None:
    """With fp16 the loss is multiplied against underflow; the step has to take that back."""
    plain, scaled = plain_step(), plain_step()
    fit(plain, groups(plain), support(), recipe, accelerator=accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    fit(scaled, groups(scaled), support(), recipe, accelerator=accelerator)
    assert furthest(state(plain), state(scaled)) < 1e-9


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True), st.integers(1, 8))
def test_processes_share_a_batch_without_loss_or_double_counting(
    batch: list[int], processes: int
) -> None:
    shares = [loop._share(batch, rank, processes) for rank in range(processes)]
    sizes = {len(index) for index, _ in shares} | {len(weight) for _, weight in shares}
    assert len(sizes) == 1  # every process takes part in every step
    counted = [
        row
        for index, weight in shares
        for row, w in zip(index, weight.tolist(), strict=True)
        if w == 1
    ]
    assert sorted(counted) == sorted(batch)
    assert all(row in batch for index, _ in shares for row in index)


def test_one_process_gathers_nothing() -> None:
    x = torch.randn(3)
    assert world_size() == 1
    assert gather(x) is x


def test_a_loss_that_is_not_finite_stops_before_it_harms(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    source, step = support(), plain_step()
    source.inputs[4, 2] = math.nan
    before = state(step)
    recipe = replace(ADAMW, batch_size=11)
    with pytest.raises(
        GloVLMError, match=r"The loss became nan in epoch 1: the learning rate \(0\.01\).*--lr"
    ):
        fit(step, groups(step), source, recipe, accelerator=accelerator, output_dir=tmp_path)
    assert same(state(step), before)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_is_too_high_is_named_as_the_cause(accelerator: Accelerator) -> None:
    step = plain_step()
    recipe = Recipe(lr=1e200, epochs=30, batch_size=11, optimizer="sgd")
    with pytest.raises(GloVLMError, match=r"became (nan|inf) in epoch \d+: the learning rate \(1e"):
        fit(step, groups(step), support(), recipe, accelerator=accelerator)


# ----------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def kill_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Killed

    return stop


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("epoch", [1, 4])
def test_a_resumed_run_ends_in_the_very_same_weights(
    accelerator: Accelerator, tmp_path: Path, recipe: Recipe, epoch: int
) -> None:
    straight = random_step()
    expected = fit(straight, groups(straight), support(), recipe, accelerator=accelerator, seed=3)
    options: dict[str, Any] = {"accelerator": accelerator, "seed": 3, "output_dir": tmp_path}
    first = random_step()
    with pytest.raises(Killed):
        fit(first, groups(first), support(), recipe, on_epoch=kill_after(epoch), **options)
    torch.manual_seed(99)
    torch.rand(17)
    calls: list[int] = []
    second = random_step()
    log = fit(
        second,
        groups(second),
        support(),
        recipe,
        resume=True,
        on_epoch=lambda row: calls.append(row["epoch"]),
        **options,
    )
    assert calls == list(range(epoch + 1, 6))
    assert same(state(second), state(straight))
    assert without_time(log) == without_time(expected)
    assert [json.loads(r) for r in (tmp_path / "log.jsonl").read_text().splitlines()] == log


def test_a_run_killed_inside_an_epoch_goes_on_from_the_last_whole_one(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    class Breaks(TensorSource):
        left = 7  # three batches an epoch

        def fetch(self, index: Sequence[int]) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return super().fetch(index)

    straight, first, second = random_step(), random_step(), random_step()
    fit(straight, groups(straight), support(), ADAMW, accelerator=accelerator)
    broken = Breaks(support().inputs, support().labels)
    with pytest.raises(Killed):
        fit(first, groups(first), broken, ADAMW, accelerator=accelerator, output_dir=tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    fit(
        second,
        groups(second),
        support(),
        ADAMW,
        accelerator=accelerator,
        output_dir=tmp_path,
        resume=True,
    )
    assert same(state(second), state(straight))


def test_resuming_keeps_the_best_epoch_and_the_patience(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    scores = [0.6, 0.9, 0.7, 0.7, 0.7, 0.95]
    recipe = replace(ADAMW, epochs=6, patience=3)

    def validator(values: Sequence[float]) -> Callable[[], float]:
        return iter(values).__next__

    straight = random_step()
    expected = fit(
        straight,
        groups(straight),
        support(),
        recipe,
        accelerator=accelerator,
        validate=validator(scores),
    )
    assert len(expected) == 5  # two bad epochs after the best are borne, the third is the last
    options: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path}
    first, second = random_step(), random_step()
    with pytest.raises(Killed):
        fit(
            first,
            groups(first),
            support(),
            recipe,
            validate=validator(scores),
            on_epoch=kill_after(4),
            **options,
        )
    log = fit(
        second,
        groups(second),
        support(),
        recipe,
        validate=validator(scores[4:]),
        resume=True,
        **options,
    )
    assert without_time(log) == without_time(expected)
    assert same(state(second), state(straight))


def test_resuming_a_finished_run_changes_nothing(accelerator: Accelerator, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path}
    first, second = random_step(), random_step()
    log = fit(first, groups(first), support(), ADAMW, **options)
    again = fit(
        second,
        groups(second),
        support(),
        ADAMW,
        resume=True,
        on_epoch=lambda row: pytest.fail("an epoch was run"),
        **options,
    )
    assert again == log
    assert same(state(second), state(first))


def test_resuming_without_a_checkpoint_begins(accelerator: Accelerator, tmp_path: Path) -> None:
    step = plain_step()
    log = fit(
        step,
        groups(step),
        support(),
        ADAMW,
        accelerator=accelerator,
        output_dir=tmp_path / "new",
        resume=True,
    )
    assert len(log) == 5


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [(replace(ADAMW, lr=2e-2), 0, "'lr': 0.01"), (ADAMW, 1, "seed 0"), (SGD, 0, "'adamw'")],
)
def test_a_checkpoint_of_other_settings_is_refused(
    accelerator: Accelerator, tmp_path: Path, recipe: Recipe, seed: int, message: str
) -> None:
    options: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path}
    step = plain_step()
    fit(step, groups(step), support(), ADAMW, **options)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(GloVLMError, match=r"written with other settings.*--overwrite") as caught:
        fit(step, groups(step), support(), recipe, seed=seed, resume=True, **options)
    assert message in str(caught.value)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("other", ["names", "shapes"])
def test_a_checkpoint_of_another_model_is_refused(
    accelerator: Accelerator, tmp_path: Path, other: str
) -> None:
    options: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path}
    step = HeadStep(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)).double())
    fit(step, groups(step), support(), ADAMW, **options)
    # One row would fill four silently.
    layers = [nn.Linear(6, 4), nn.Linear(4, 3)] if other == "shapes" else [nn.Linear(6, 3)]
    wrong = HeadStep(nn.Sequential(*layers).double())
    before = state(wrong)
    with pytest.raises(GloVLMError, match="belongs to another method or backbone"):
        fit(wrong, groups(wrong), support(), ADAMW, resume=True, **options)
    assert same(state(wrong), before)


# --------------------------------------------------------------------------------- early stopping


def weights_by_epoch(accelerator: Accelerator, recipe: Recipe) -> list[dict[str, Tensor]]:
    step = random_step()
    seen: list[dict[str, Tensor]] = []
    fit(
        step,
        groups(step),
        support(),
        recipe,
        accelerator=accelerator,
        on_epoch=lambda row: seen.append(state(step)),
    )
    return seen


@pytest.mark.parametrize(
    ("scores", "epochs_run", "best"),
    [
        ([0.5, 0.8, 0.7, 0.6, 0.5, 0.9], 4, 2),  # patience 2, then the best so far
        ([0.5, 0.6, 0.7, 0.8, 0.9, 0.95], 6, 6),
        ([0.5, 0.5005, 0.5009, 0.9, 0.9, 0.9], 3, 1),  # gains below min_delta are none
        ([0.9, 0.8, 0.95, 0.8, 0.8, 0.99], 5, 3),
    ],
)
def test_the_best_epoch_on_validation_is_kept(
    accelerator: Accelerator, scores: list[float], epochs_run: int, best: int
) -> None:
    recipe = replace(ADAMW, epochs=6, patience=2)
    seen = weights_by_epoch(accelerator, recipe)
    step = random_step()
    log = fit(
        step,
        groups(step),
        support(),
        recipe,
        accelerator=accelerator,
        validate=iter(scores).__next__,
    )
    assert [row["validation_macro_auc"] for row in log] == scores[:epochs_run]
    assert same(state(step), seen[best - 1])
    assert not step.training


def test_without_validation_the_last_epoch_is_kept(accelerator: Accelerator) -> None:
    recipe = replace(ADAMW, epochs=6, patience=1)
    seen = weights_by_epoch(accelerator, recipe)
    assert len(seen) == 6
    step = random_step()
    fit(step, groups(step), support(), recipe, accelerator=accelerator)
    assert same(state(step), seen[-1])


# ------------------------------------------------------------------------------------ what is kept


def test_the_log_has_one_row_an_epoch(accelerator: Accelerator, tmp_path: Path) -> None:
    step = plain_step()
    calls: list[dict[str, Any]] = []
    log = fit(
        step,
        groups(step),
        support(),
        replace(SGD, epochs=3),
        accelerator=accelerator,
        output_dir=tmp_path,
        validate=lambda: 0.5,
        on_epoch=lambda row: calls.append(dict(row)),
    )
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == log == calls
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert {row["epochs"] for row in log} == {3}
    assert set(log[0]) == {"epoch", "epochs", "loss", "lr", "seconds", "validation_macro_auc"}
    assert log[0]["lr"] == 1e-5
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_checkpoint_is_one_safetensors_file_and_nothing_is_pickled(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    step = random_step()
    fit(
        step,
        groups(step),
        support(),
        ADAMW,
        accelerator=accelerator,
        output_dir=tmp_path,
        validate=lambda: 0.5,
    )
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.safetensors", "log.jsonl"}
    for path in tmp_path.iterdir():
        assert not zipfile.is_zipfile(path)
        assert path.read_bytes()[:1] != b"\x80"
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as stored:
        keys = set(stored.keys())
        facts = json.loads(stored.metadata()["facts"])
    trained = {n for n, _ in step.named_parameters()}
    buffers = {n for n, _ in step.named_buffers()}
    assert {f"now.{n}" for n in trained | buffers} <= keys
    assert {f"best.{n}" for n in trained | buffers} <= keys
    assert {k.partition(".")[0] for k in keys} == {"now", "best", "moment"}
    assert facts["seed"] == 0
    assert facts["recipe"]["lr"] == 1e-2


def test_frozen_weights_are_not_in_the_checkpoint(accelerator: Accelerator, tmp_path: Path) -> None:
    step = plain_step()
    for parameter in step.head[0].parameters():
        parameter.requires_grad_(False)
    fit(
        step,
        [{"params": list(step.head[2].parameters())}],
        support(),
        ADAMW,
        accelerator=accelerator,
        output_dir=tmp_path,
    )
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as stored:
        now = {key for key in stored.keys() if key.startswith("now.")}  # noqa: SIM118
    assert now == {"now.head.2.weight", "now.head.2.bias"}


def test_a_tracker_gets_every_epoch() -> None:
    remembers = Remembers()
    tracked = Accelerator(cpu=True, log_with=remembers)
    tracked.init_trackers("test")
    step = plain_step()
    log = fit(step, groups(step), support(), replace(ADAMW, epochs=2), accelerator=tracked)
    assert [epoch for epoch, _ in remembers.rows] == [1, 2]
    assert [row["loss"] for _, row in remembers.rows] == [row["loss"] for row in log]


def test_seeds_reach_every_generator() -> None:
    def draws(*numbers: int) -> tuple[float, ...]:
        seed_everything(*numbers)
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    assert draws(0, 1) == draws(0, 1)
    for a, b in itertools.combinations(
        [draws(0), draws(1), draws(0, 1), draws(0, 0), draws(1, 0)], 2
    ):
        assert all(x != y for x, y in zip(a, b, strict=True))


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_text(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old\n"
    write_text(path, "new\n")
    assert path.read_text() == "new\n"


# ------------------------------------------------------------------------------------------ images


class Counting:
    """A real processor that notes how often it is called."""

    outline, draft_side = "ignore", 0

    def __init__(self, processor: Any) -> None:
        self.processor, self.calls = processor, 0

    def __call__(self, **kwargs: Any) -> Any:
        self.calls += 1
        return self.processor(**kwargs)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Any, Tensor, Counting]:
    rows = all_rows(load_dataset(tiny_images(tmp_path / "images", per_class=2)))
    _, processor = load_backbone(str(tiny_clip()))
    return rows, torch.tensor(rows["label"][:]), Counting(processor)


def test_an_image_is_prepared_once_and_as_the_processor_does(
    images: tuple[Any, Tensor, Counting],
) -> None:
    rows, labels, processor = images
    source = ImageSource(rows, labels, processor)
    batch = source.fetch([4, 0, 4])
    expected = processor.processor(
        images=[rows[i]["image"] for i in (4, 0, 4)], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(batch, expected)
    source.fetch([0, 4])
    assert processor.calls == 2


def test_prepared_images_stay_within_the_memory_given(
    images: tuple[Any, Tensor, Counting],
) -> None:
    rows, labels, processor = images
    one = ImageSource(rows, labels, processor).fetch([0]).nbytes
    whole = ImageSource(rows, labels, processor).fetch(range(6))
    source = ImageSource(rows, labels, processor, keep_bytes=2 * one)
    for index in ([0, 1], [2, 3], [1, 5], [4]):
        assert torch.equal(source.fetch(index), whole[index])
        assert len(source.kept) <= 2
    # A batch that does not fit is fetched all the same.
    assert torch.equal(source.fetch([5, 4, 3, 2, 1, 0]), whole[[5, 4, 3, 2, 1, 0]])


def test_augmentation_is_drawn_anew_from_torchs_generator(
    images: tuple[Any, Tensor, Counting],
) -> None:
    rows, labels, processor = images
    source = ImageSource(rows, labels, processor, augment=True)
    torch.manual_seed(5)
    first, second = source.fetch([0]), source.fetch([0])
    torch.manual_seed(5)
    assert torch.equal(source.fetch([0]), first)
    assert not torch.equal(first, second)
    assert processor.calls == 3


def test_augmentation_crops_at_least_half_and_turns_every_way() -> None:
    rows, columns = np.mgrid[:40, :60]
    pixels = np.stack([4 * columns, 6 * rows, 0 * rows], axis=-1).astype(np.uint8)
    ways = set()
    for seed in range(60):
        torch.manual_seed(seed)
        turned = reframe(Image.fromarray(pixels), torch.rand(5).tolist())
        assert turned.width * turned.height >= 0.5 * 40 * 60 * 0.95
        array = np.asarray(turned).astype(int)
        across, down = array[0, -1] - array[0, 0], array[-1, 0] - array[0, 0]
        ways.add((*np.sign(across[:2]), *np.sign(down[:2])))
        assert array[..., 0].max() <= pixels[..., 0].max()
    assert len(ways) == 8
