"""Loaded weights at other addresses: what another library or another file would do to the tests.

A kernel of a matrix product may depend on where an array begins (`docs/reproducibility.md`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["loaded_weights_moved"]


def move(module: Any, by: int) -> None:
    """Lay each parameter and buffer anew, `by` bytes behind an address that 64 divides."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and not tensor.is_meta:
            start = max(1, by // tensor.element_size())
            storage = torch.empty(tensor.numel() + start, dtype=tensor.dtype, device=tensor.device)
            moved = storage[start:].view(tensor.shape)
            tensor.data = moved.copy_(tensor.detach())


@contextmanager
def loaded_weights_moved(by: int) -> Iterator[None]:
    """Move the weights of every model that is loaded in this process; none where `by` is 0."""
    if not by:
        yield
        return
    from torch import nn
    from transformers import PreTrainedModel

    load, fill = PreTrainedModel.from_pretrained.__func__, nn.Module.load_state_dict

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        loaded = load(cls, *arguments, **options)
        move(loaded[0] if isinstance(loaded, tuple) else loaded, by)
        return loaded

    def load_state_dict(module: Any, state: Any, strict: bool = True, assign: bool = False) -> Any:
        report = fill(module, state, strict=strict, assign=assign)
        if assign:  # else the values were copied to where the module's own lay
            move(module, by)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(nn.Module, "load_state_dict", load_state_dict)
        yield
