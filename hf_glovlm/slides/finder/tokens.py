"""Patch tokens of a picture as a map, of any vision tower.

A picture is brought to a size that patches divide and encoded in windows that overlap, so that
memory does not grow with it; where windows overlap, their tokens are averaged with weights that
fall towards a window's border, for which the tower lacks the context.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ...errors import GloVLMError
from ...files import digest_value
from ...inference.prediction import exact_inference, move_inputs
from ...model.towers import accepted_arguments, patch_grid

Store: TypeAlias = MutableMapping[str, NDArray[np.float16]]

LAST = 1.0  # the tower's own last states, behind its final norm
MOST_CELLS = 160_000  # of a picture: some 0.7 GB of tokens at three depths of a small tower
_WINDOW = 48  # patches along a window's side, where a tower interpolates its positions
_STRIDE = 32  # pixels of a tower without patches; convolutional ones end at this stride


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Token map: a vector for each cell of a grid that covers a picture.

    Attributes:
        tokens: `[rows, columns, dim]`, float32, of half precision.
        size: Width and height of the picture, in its pixels.
    """

    tokens: NDArray[np.float32]
    size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def rows(self) -> NDArray[np.float32]:
        """Tokens `[rows * columns, dim]`, row by row."""
        return self.tokens.reshape(-1, self.tokens.shape[-1])

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell, in pixels of the picture."""
        rows, columns = self.tokens.shape[:2]
        return self.size[0] / columns, self.size[1] / rows


class TokenEncoder:
    """Encoder of pictures to token maps.

    Args:
        model: A `GloVLMModel` of `load_backbone`.
        processor: Its `GloVLMProcessor`: mean and standard deviation of the colours are taken from
            it, its resizing and cropping are not.
        store: Where tokens are kept by a digest of the picture and of what is asked, and looked up
            before the tower is; any mapping, also one on disk. It belongs to this tower alone.

    Raises:
        GloVLMError: The tower takes no pictures but packed patches.
    """

    def __init__(self, model: Any, processor: Any, *, store: Store | None = None) -> None:
        self.model, self.processor, self.store = model, processor, store
        self.tower: Any = model.backbone.vision_model
        self.config: Any = model.config._backbone().vision_config
        size = getattr(self.config, "patch_size", None) or _STRIDE
        self.patch = int(max(size) if isinstance(size, list | tuple) else size)
        if hasattr(processor.image_processor, "max_num_patches"):
            raise GloVLMError(
                f"The tower '{self.config.model_type}' takes packed patches, not pictures, so its "
                "tokens are no map: use a backbone whose pictures have one fixed size."
            )

    @property
    def interpolates(self) -> bool:
        """Whether the tower takes pictures of any size, and not of its own input size alone."""
        known = accepted_arguments(self.tower, {"interpolate_pos_encoding": True})
        return bool(known) or "dinov2" in self.config.model_type or not self._fixed_size

    @property
    def _fixed_size(self) -> int:
        size = getattr(self.config, "image_size", None)
        if getattr(self.config, "patch_size", None) is None or size is None:
            return 0
        return int(max(size) if isinstance(size, list | tuple) else size)

    def encode(
        self,
        picture: NDArray[np.uint8],
        grid: tuple[int, int],
        *,
        depths: Sequence[float] = (LAST,),
    ) -> TokenMap:
        """Encode a picture as a map of tokens.

        Args:
            picture: `[height, width, 3]`, uint8.
            grid: Rows and columns of patches that the picture is brought to.
            depths: Share of the tower's blocks behind which tokens are taken, in 0 ... 1, joined;
                1 are its last states.

        Returns:
            The map; `dim` is the tower's width times the number of depths.

        Raises:
            GloVLMError: The tower's states are no map, or the grid has more than `MOST_CELLS`.
        """
        size = (picture.shape[1], picture.shape[0])
        if grid[0] * grid[1] > MOST_CELLS:
            raise GloVLMError(
                f"A picture of {size[0]} x {size[1]} pixels has {grid[0]} x {grid[1]} tokens at "
                f"the working scale, more than {MOST_CELLS:,}: cut it into windows."
            )
        if self.store is None:
            return TokenMap(self._encode(picture, grid, depths).astype(np.float32), size)
        content = digest_array(picture)
        parts = []
        for depth in depths:
            key = self._key(content, grid, depth)
            if key not in self.store:
                missing = [d for d in depths if self._key(content, grid, d) not in self.store]
                tokens = self._encode(picture, grid, missing)
                for d, part in zip(missing, np.split(tokens, len(missing), -1), strict=True):
                    self.store[self._key(content, grid, d)] = np.ascontiguousarray(part)
            parts.append(self.store[key])
        return TokenMap(np.concatenate(parts, -1).astype(np.float32), size)

    @staticmethod
    def _key(content: str, grid: tuple[int, int], depth: float) -> str:
        return digest_value([content, list(grid), float(depth)])

    def _encode(
        self, picture: NDArray[np.uint8], grid: tuple[int, int], depths: Sequence[float]
    ) -> NDArray[np.float16]:
        """Tokens `[rows, columns, dim]`, window by window."""
        rows, columns = grid
        resized = Image.fromarray(picture).resize(
            (columns * self.patch, rows * self.patch), Image.Resampling.BICUBIC
        )
        fixed = self._fixed_size // self.patch
        side = _WINDOW if self.interpolates else fixed
        pad_rows, pad_columns = (0, 0) if self.interpolates else (fixed - rows, fixed - columns)
        pixels = np.asarray(resized)
        if pad_rows > 0 or pad_columns > 0:  # a tower of one size gets what is missing mirrored
            pad = ((0, max(pad_rows, 0) * self.patch), (0, max(pad_columns, 0) * self.patch))
            pixels = np.pad(pixels, (*pad, (0, 0)), mode="symmetric")
        high, wide = pixels.shape[0] // self.patch, pixels.shape[1] // self.patch
        total: Any = None
        weight = np.zeros((high, wide, 1), np.float32)
        for top, down in _spans(high, side):
            for left, across in _spans(wide, side):
                part = pixels[
                    top * self.patch : down * self.patch, left * self.patch : across * self.patch
                ]
                tokens = self._window(part, (down - top, across - left), depths)
                if total is None:
                    total = np.zeros((high, wide, tokens.shape[-1]), np.float32)
                tent = _tent(down - top)[:, None, None] * _tent(across - left)[None, :, None]
                total[top:down, left:across] += tokens * tent
                weight[top:down, left:across] += tent
        total /= weight
        # Half precision whether kept or not, so that a kept map gives the same detections.
        largest = np.finfo(np.float16).max
        return total[:rows, :columns].clip(-largest, largest).astype(np.float16)

    def _window(
        self, pixels: NDArray[np.uint8], grid: tuple[int, int], depths: Sequence[float]
    ) -> NDArray[np.float32]:
        """Tokens `[rows, columns, dim]` of one window."""
        inputs = self.processor.image_processor(
            images=Image.fromarray(pixels),
            do_resize=False,
            do_center_crop=False,
            return_tensors="pt",
        )
        values = move_inputs({"pixel_values": inputs["pixel_values"]}, self.model)["pixel_values"]
        lists = [m for m in self.tower.modules() if isinstance(m, nn.ModuleList)]
        blocks = max(lists, key=len, default=nn.ModuleList())
        seen: dict[int, torch.Tensor] = {}

        def reader(number: int) -> Any:
            def read(module: nn.Module, args: Any, output: Any) -> None:
                seen[number] = output[0] if isinstance(output, tuple) else output

            return read

        places = [None if d >= LAST else max(round(d * len(blocks)), 1) - 1 for d in depths]
        hooks = [
            blocks[number].register_forward_hook(reader(number))
            for number in {n for n in places if n is not None}
        ]
        options = accepted_arguments(self.tower, {"interpolate_pos_encoding": True})
        try:
            with exact_inference(self.model):
                last = self.tower(pixel_values=values, **options).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        states = [last if n is None else seen[n] for n in places]
        return np.concatenate([self._as_map(one, values, grid) for one in states], axis=-1)

    def _as_map(
        self, states: torch.Tensor, values: torch.Tensor, grid: tuple[int, int]
    ) -> NDArray[np.float32]:
        """States of one picture as `[rows, columns, width]`, patches last among them."""
        if states.dim() == 4:
            state = states[0].permute(1, 2, 0)
        else:
            rows, columns = grid
            if getattr(self.config, "patch_size", None) is not None:
                rows, columns = patch_grid(self.config, values)
            while rows * columns > states.shape[1] and rows % 2 == 0:
                rows, columns = rows // 2, columns // 2  # a hierarchical tower merges patches
            if rows * columns > states.shape[1]:
                raise GloVLMError(
                    f"The tower '{self.config.model_type}' returns {states.shape[1]} tokens of a "
                    f"grid of {grid[0]} x {grid[1]} patches, which are no map: use another one."
                )
            state = states[0, states.shape[1] - rows * columns :].reshape(rows, columns, -1)
        array: NDArray[np.float32] = state.float().cpu().numpy()
        if array.shape[:2] != grid:
            high, wide = (
                (np.arange(n) * have // n) for n, have in zip(grid, array.shape[:2], strict=True)
            )
            array = array[high][:, wide]
        return array


def digest_array(picture: NDArray[np.uint8]) -> str:
    """Digest of a picture: its shape and its bytes, 32 hexadecimal digits."""
    import xxhash

    digest = xxhash.xxh3_128(repr(picture.shape).encode())
    digest.update(np.ascontiguousarray(picture).data)
    return str(digest.hexdigest())


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Spans of at most `side` that cover a length, spread evenly, overlapping by a quarter."""
    if length <= side:
        return [(0, length)]
    count = -(-(length - side) // max(side * 3 // 4, 1)) + 1
    starts = np.linspace(0, length - side, count).round().astype(int)
    return [(int(start), int(start) + side) for start in starts]


def _tent(length: int) -> NDArray[np.float32]:
    """Weights along a window, highest in its middle, above 0 at its ends."""
    place = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1))
    return place.astype(np.float32)
