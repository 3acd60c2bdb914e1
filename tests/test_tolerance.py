"""The bound for equal numbers lets rounding pass and stops a fault."""

import numpy as np
import pytest
import torch
from tolerance import assert_same_numbers
from torch import nn

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def test_sums_in_another_order_pass() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    with torch.no_grad():
        expected, actual = layers(X), X
        for layer in layers:
            order = torch.randperm(64)
            actual = actual[:, order] @ layer.weight[:, order].T + layer.bias
    assert not torch.equal(actual, expected)
    assert_same_numbers(actual, expected)
    assert_same_numbers(actual.numpy().tolist(), expected)  # as another process prints them


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * (1 + 1e-4),
        lambda x: x.bfloat16().float(),
        lambda x: x.roll(1, 0),
        lambda x: torch.where(x == x.max(), x + 1e-3, x),
        lambda x: torch.where(x == x.max(), torch.nan, x),
        lambda x: torch.where(x == x.max(), torch.inf, x),
        lambda x: x[:-1],
        lambda x: x[:, :1],
    ],
)
def test_a_fault_does_not(change: object) -> None:
    with pytest.raises(AssertionError):
        assert_same_numbers(change(X), X)  # type: ignore[operator]


def test_the_bound_is_that_of_the_coarser_type_and_of_the_largest_value() -> None:
    double = np.linspace(0, 10, 7)
    assert_same_numbers(double + 1e-13, double)
    assert_same_numbers(double.astype(np.float32), double)
    with pytest.raises(AssertionError):
        assert_same_numbers(double + 1e-11, double)
    assert_same_numbers(double + 1e-11, double, scale=1e3)
    assert_same_numbers(np.zeros(3), np.zeros(3))
    with pytest.raises(AssertionError):
        assert_same_numbers(np.full(3, 1e-30), np.zeros(3))
    with pytest.raises(AssertionError):
        assert_same_numbers(np.array([1, 2]), np.array([1, 3]))  # integers are equal or are not
