"""Mapping of published tensors to the parameters of a transformers module."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from transformers import AutoModel
from transformers.initialization import no_init_weights

from ...errors import GloVLMError
from ...model import GloVLMModel


@dataclass
class Converted:
    """Converted checkpoint, in transformers' names, not yet written.

    Args:
        kind: Of the checkpoint.
        model: The module, without memory of its own.
        state: Its tensors, float32.
        images: Arguments of its `CLIPImageProcessor`.
        tokenizer: Which family of tokenizers it needs: `clip`, `conch`, `wordpiece`, or `""`.
        max_length: Longest text in tokens; 0 for a vision tower.
        dropped: Published tensors left out on purpose.
        notes: Remarks for the user.
    """

    kind: str
    model: Any
    state: dict[str, Any]
    images: dict[str, Any]
    tokenizer: str = ""
    max_length: int = 0
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Move:
    """Tensor mapping from published names to a module's parameters; unused ones are errors.

    Args:
        tensors: By their published names.
        kind: Of the checkpoint.
        drop: Patterns of the names that are left out on purpose.
    """

    def __init__(self, tensors: Mapping[str, Any], kind: str, drop: Sequence[str]) -> None:
        self.kind = kind
        self.dropped = [name for name in tensors if any(fnmatch(name, p) for p in drop)]
        self.left = {n: tensor for n, tensor in tensors.items() if n not in set(self.dropped)}
        self.model: Any = None
        self.state: dict[str, Any] = {}
        self.notes: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a published tensor that decides the module's sizes."""
        if name not in self.left:
            raise GloVLMError(
                f"Tensor '{name}' of a {self.kind} checkpoint is missing: take the complete file, "
                "or name the right kind."
            )
        return tuple(self.left[name].shape)

    def depth(self, prefix: str) -> int:
        """Number of blocks."""
        matches = [re.match(re.escape(prefix) + r"(\d+)\.", name) for name in self.left]
        return 1 + max((int(match[1]) for match in matches if match), default=0)

    def build(self, config: Any) -> None:
        """Build the target module, without memory."""
        with torch.device("meta"), no_init_weights():
            is_pair = config.model_type == "glovlm"
            self.model = GloVLMModel(config) if is_pair else AutoModel.from_config(config)
        self._shapes = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}

    def has(self, target: str) -> bool:
        """Whether the module has this parameter."""
        return target in self._shapes

    def take(self, name: str, *shape: int) -> Any:
        """Take a published tensor, in fp32."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            self._problems.append(f"'{name}' {list(shape)} is missing")
        elif tuple(tensor.shape) != shape:
            self._problems.append(f"'{name}' is {list(tensor.shape)}, expected {list(shape)}")
        else:
            return tensor.to(torch.float32)
        return torch.empty(shape, device="meta")

    def put(self, target: str, tensor: Any) -> None:
        """Set a parameter."""
        self.state[target] = tensor.clone().contiguous()

    def fill(self, target: str, value: float = 0.0) -> None:
        """Set a parameter that the checkpoint lacks to a constant."""
        self.put(target, torch.full(self._shapes[target], value))

    def identity(self, target: str) -> None:
        """Set a linear layer to the identity."""
        self.put(f"{target}.weight", torch.eye(*self._shapes[f"{target}.weight"]))
        self.fill(f"{target}.bias")

    def copy(self, name: str, target: str) -> None:
        """Copy a tensor unchanged."""
        self.put(target, self.take(name, *self._shapes[target]))

    def transpose(self, name: str, target: str) -> None:
        """Copy a matrix applied from the right, `x @ matrix`, transposed to a layer's weight."""
        self.put(target, self.take(name, *reversed(self._shapes[target])).T)

    def split(self, name: str, targets: Sequence[str]) -> None:
        """Split stacked rows: q, k and v, or gate and value."""
        rows, *columns = self._shapes[targets[0]]
        stack = self.take(name, len(targets) * rows, *columns)
        for target, part in zip(targets, stack.chunk(len(targets)), strict=True):
            self.put(target, part)

    def layer(self, name: str, target: str) -> None:
        """Copy a linear layer or a norm, with its bias where the module has one."""
        for part in ("weight", "bias"):
            if self.has(f"{target}.{part}"):
                self.copy(f"{name}.{part}", f"{target}.{part}")

    def layers(self, names: Mapping[str, str], source: str, target: str) -> None:
        """Copy the layers of a block."""
        for name, new in names.items():
            self.layer(f"{source}.{name}", f"{target}.{new}")

    def scale(self, target: str) -> None:
        """Copy the logarithm of the logit scale, a scalar or a vector of one."""
        shape = (1,) if self.shape("logit_scale") == (1,) else ()
        self.put(target, self.take("logit_scale", *shape).reshape(()))

    def finish(self) -> None:
        """Check that every tensor was used and fits.

        Raises:
            GloVLMError: A tensor is missing, misshapen or left over.
        """
        unknown = [f"'{name}' {list(t.shape)} is unknown" for name, t in self.left.items()]
        if problems := [*self._problems, *unknown]:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise GloVLMError(
                f"The tensors are not those of a {self.kind} checkpoint: {'; '.join(problems[:5])}"
                f"{more}. Name the right kind, or put the configuration that was published with "
                "the weights beside them."
            )

    def converted(self, images: dict[str, Any], tokenizer: str = "", length: int = 0) -> Converted:
        """The converted checkpoint."""
        return Converted(
            kind=self.kind,
            model=self.model,
            state=self.state,
            images=images,
            tokenizer=tokenizer,
            max_length=length,
            dropped=self.dropped,
            notes=self.notes,
        )
