"""Activation cache: frozen leading blocks of a tower run once, then their output is replayed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GloVLMError
from ..methods import tower_layers

KEEP_BYTES = 2**30  # most memory that the recorded states of one tower may take
CHUNK = 32  # rows that go through the tower together while they are recorded


class Replay:
    """Replay of a tower from behind its frozen blocks, from states that were recorded once.

    Its embedding still runs, on whatever input it is given then: it makes masks and shapes.

    Args:
        tower: A transformer tower.
        frozen: How many leading blocks to leave out.
    """

    def __init__(self, tower: nn.Module, frozen: int) -> None:
        _, self.blocks = tower_layers(tower)
        self.frozen = frozen
        self.more: int | None = None  # members behind the state, where a block returns a tuple

    def record(
        self, run: Callable[[slice], Any], rows: int, keep_bytes: int = KEEP_BYTES
    ) -> Tensor | None:
        """Run the tower on every row and keep what leaves the last frozen block.

        Args:
            run: Runs the tower on some rows.
            rows: Number of rows.
            keep_bytes: Most memory to take.

        Returns:
            `[rows, tokens, width]` in main memory; `None` if that is more than `keep_bytes`.
        """
        part: Tensor

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal part
            part = _state(output)
            self.more = len(output) - 1 if isinstance(output, tuple) else None

        states: Tensor | None = None
        hook = self.blocks[self.frozen - 1].register_forward_hook(keep)
        try:
            for chunk in _chunks(rows):
                with torch.no_grad():
                    run(chunk)
                if states is None:
                    if rows * part[0].nbytes > keep_bytes:
                        return None
                    states = torch.empty(rows, *part.shape[1:], dtype=part.dtype)
                states[chunk] = part.cpu()
        finally:
            hook.remove()
        return states

    @contextmanager
    def play(self, states: Tensor) -> Iterator[None]:
        """Context in which the tower takes its frozen blocks' output from `states`.

        Args:
            states: `[n, tokens, width]`, rows of what `record` returned, on the tower's device.
        """
        recorded = _Recorded(states, self.more)
        replaced = list(self.blocks[: self.frozen])
        try:
            for i in range(self.frozen):
                self.blocks[i] = recorded
            yield
        finally:
            for i, block in enumerate(replaced):
                self.blocks[i] = block


def record_tower(
    tower: nn.Module,
    run: Callable[[slice], Tensor],
    rows: int,
    blank: Callable[[slice], Tensor] | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Replay, Tensor] | None:
    """Record the frozen blocks of a tower, if there are any and nothing stands against it.

    Args:
        tower: As it is during training, with the parts in training mode that will be.
        run: Runs the tower on some of the rows and returns features of these `[n, dim]`.
        rows: Number of rows.
        blank: The same from an empty input of the same shape, if that will stand in
            for the input; `run` when not given.
        keep_bytes: Most memory to take.

    Returns:
        The replay and the states of all rows `[rows, tokens, width]`; `None` if the first block
        changes from step to step, if something random goes before, if memory does not suffice, or
        if the tower gives other features from its recorded states (it reads the first blocks'
        output elsewhere too).
    """
    frozen = frozen_blocks(tower, lambda: run(slice(0, 1)))
    if frozen == 0:
        return None
    replay = Replay(tower, frozen)
    states = replay.record(run, rows, keep_bytes)
    if states is None:
        return None
    chunk = next(_chunks(rows))
    with torch.no_grad():
        plain = run(chunk)
        try:
            with replay.play(states[chunk].to(plain.device)):
                played = (blank or run)(chunk)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None  # a tower that cannot run without its first blocks runs with them
    same = torch.allclose(plain, played, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    return (replay, states) if same else None


def frozen_blocks(tower: nn.Module, run: Callable[[], Any]) -> int:
    """Number of leading blocks of a tower whose output is the same at every step.

    Whatever trains in or before a block (its weights, an adapter, inserted
    tokens, an embedding) makes its output require a gradient.

    Args:
        tower: As it is during training, with the parts in training mode that will be.
        run: Runs the tower on any input.

    Returns:
        0 if the first block changes, or if a part that is not behind the frozen blocks is in
        training mode and may draw random numbers; the number of all blocks if none changes.
    """
    try:
        _, blocks = tower_layers(tower)
    except GloVLMError:
        return 0
    seen: list[int] = []
    changes: list[bool] = []

    def note(i: int, output: Any) -> None:
        seen.append(i)
        changes.append(_state(output).requires_grad)

    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output, i=i: note(i, output))
        for i, block in enumerate(blocks)
    ]
    try:
        with torch.enable_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if seen != list(range(len(blocks))):  # not one after the other, once each
        return 0
    frozen = changes.index(True) if True in changes else len(blocks)
    behind = {id(part) for block in blocks[frozen:] for part in block.modules()}
    random = any(part.training for part in tower.modules() if id(part) not in behind)
    return 0 if random else frozen


class _Recorded(nn.Module):
    """Stands for frozen blocks: returns their recorded output in the form in which they do."""

    def __init__(self, states: Tensor, more: int | None) -> None:
        super().__init__()
        self.states = states
        self.more = more

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.states if self.more is None else (self.states, *[None] * self.more)


def _state(output: Any) -> Tensor:
    """The tokens `[n, length, width]` that a block returns, alone or first of a tuple."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK, rows)) for first in range(0, rows, CHUNK))
