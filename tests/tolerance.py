"""How near numbers must be that the same mathematics gives by another way."""

from typing import Any

import numpy as np
import torch

__all__ = ["assert_same_numbers"]


def assert_same_numbers(
    actual: Any, expected: Any, *, roundings: float = 300, scale: float | None = None
) -> None:
    """Assert that two arrays are equal but for the rounding of floating-point sums.

    A matrix product adds its terms in an order that the kernel chooses, and the library chooses the
    kernel by the processor, the number of threads, the size of the batch and the address at which
    an array begins. So only the same call on the same buffers gives the same bits. Weights read
    from a mapped file, another process, a batch cut otherwise or a padded text give the same
    mathematics in another order: each sum may be off by a rounding of its largest term, and a
    network of n such sums by about n of them.

    So the bound is `roundings` units of rounding (float32: 1.2e-7) of the largest value, by default
    4e-5 of it: networks of the size of the tests' differ by up to ten units, a fault in a weight, a
    mask or an order by a hundred thousand.

    Args:
        actual: A tensor, an array, a number or nested lists of numbers, which count as float32.
        expected: The same.
        roundings: Largest difference in units of rounding, of the coarser type of the two.
        scale: The size of the terms that were added, where they cancel: by default the largest
            absolute value expected.
    """
    one, eps_one = _read(actual)
    other, eps_other = _read(expected)
    assert one.shape == other.shape, f"shape {one.shape} instead of {other.shape}"
    assert np.array_equal(np.isfinite(one), np.isfinite(other)), "finite at other places"
    finite = np.isfinite(other)
    np.testing.assert_array_equal(one[~finite], other[~finite])  # infinities by sign
    one, other = one[finite], other[finite]
    if scale is None:
        scale = float(np.abs(other).max(initial=0))
    eps = max(eps_one, eps_other)
    np.testing.assert_allclose(one, other, rtol=0, atol=roundings * eps * scale)


def _read(values: Any) -> tuple[np.ndarray, float]:
    """Values in float64, and the rounding of the type that they were computed in."""
    if isinstance(values, torch.Tensor):
        dtype = values.dtype if values.is_floating_point() else torch.float64
        return values.detach().cpu().double().numpy(), torch.finfo(dtype).eps
    array = np.asarray(values)
    kind = array.dtype if isinstance(values, np.ndarray | np.generic) else np.dtype(np.float32)
    eps = float(np.finfo(kind).eps) if kind.kind == "f" else 0.0
    return array.astype(np.float64), eps
